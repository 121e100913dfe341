//! A run: the phases of a curriculum over a stream of batches, step by step, with checkpoints.
//!
//! A pure machine but for its files: [`Run::advance`] does one step and says what happened; the caller shows it
//! and keeps the time. What a run computes is a function of its configuration and text: where it is
//! interrupted, and how often, changes no bit.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::happened::loads;
pub use super::happened::{Happened, StepRecord, TierLoad, TierRecord};
use super::{
    TrainError,
    balance::BalanceLosses,
    config::{PhaseConfig, TrainConfig},
    data::{DataError, Dataset},
    engine::{Engine, Saving},
    grow::GrowError,
    params::{Params, shapes},
    phase::{Begun, begin, check_all},
    source::{Source, SourceError},
    spread::{Ranks, Spread},
    starvation,
    state::{self, Progress, RunLock, StateError},
    step::{Objective, StepOptions},
    trainer::{StepReport, Trainer},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, index::Hash, writer::Text},
    config::ConfigError,
    routing::Gate,
    tier::{TierMask, TierSetError},
    tokenizer::{Tokenizer, TokenizerError},
};
use lite_llm_kernels::cpu::Cpu;

/// How often in a row ranks may be lost before a step is done.
const LOSSES_MAX: usize = 20;

/// Why a run does not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A key of the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A phase names tiers that the model lacks.
    #[error("phase {phase}: {source}")]
    Tiers {
        /// Name of the phase.
        phase: String,
        /// What is wrong.
        source: TierSetError,
    },
    /// A phase cannot be begun.
    #[error("phase {phase}: {reason}")]
    Phase {
        /// Name of the phase.
        phase: String,
        /// Why, and what would do.
        reason: String,
    },
    /// The text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tokenizer of the model.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model or tokenizer to begin with.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint of the run.
    #[error(transparent)]
    State(#[from] StateError),
    /// A new tier.
    #[error("phase {phase}: {source}")]
    Grow {
        /// Name of the phase.
        phase: String,
        /// What is wrong.
        source: Box<GrowError>,
    },
    /// A step.
    #[error("step {step} (phase {phase}, rows {first}..{end} of the data's order): {source}")]
    Step {
        /// Step of the run.
        step: u64,
        /// Name of the phase.
        phase: String,
        /// First sample of its batch.
        first: u64,
        /// One behind the last.
        end: u64,
        /// What is wrong.
        source: TrainError,
    },
    /// A look at what is held out.
    #[error(
        "after step {step} (phase {phase}), rows {first}..{end} of those that are held out: {source}"
    )]
    HeldOut {
        /// Step of the run.
        step: u64,
        /// Name of the phase.
        phase: String,
        /// First row of the batch, among those held out.
        first: usize,
        /// One behind the last.
        end: usize,
        /// What is wrong.
        source: TrainError,
    },
    /// Ranks that compute together.
    #[error("after step {step}: {source}")]
    Ranks {
        /// Step of the run.
        step: u64,
        /// What is wrong.
        source: TrainError,
    },
    /// A step left a number that is NaN or infinite.
    #[error(
        "step {step} (phase {phase}): {tensor} holds {value} after it; the run diverges: lower the learning \
         rate, clip the gradient's norm, or warm up longer; it is not saved, and the last checkpoint is as \
         it was"
    )]
    Diverged {
        /// Step of the run.
        step: u64,
        /// Name of the phase.
        phase: String,
        /// Parameter or state of the optimizer.
        tensor: String,
        /// What it holds.
        value: f32,
    },
    /// There is something to go on from, and nobody said so.
    #[error(
        "{0} holds checkpoints or the model of a run; go on with --resume, or name another `out`"
    )]
    Exists(String),
}

/// See the module's text.
pub struct Run {
    cpu: Arc<Cpu>,
    config: TrainConfig,
    out: PathBuf,
    /// What of the configuration may not change, beside phases that have begun.
    fixed: serde_json::Value,
    text: Text,
    data: Dataset,
    base: PathBuf,
    engine: Engine,
    mask: TierMask,
    progress: Progress,
    pending: Vec<Happened>,
    done: bool,
    /// Others who compute, if there are any.
    ranks: Option<Arc<dyn Ranks>>,
    /// A checkpoint that is being written.
    saving: Option<Saving>,
    /// What the last step is still to be followed by: not before its caller has written down what it said.
    due: Option<Due>,
    /// Keeps other trainers out of the folder.
    _lock: RunLock,
}

impl RunError {
    /// Whether others are to be found, and the run goes on.
    fn is_loss(&self) -> bool {
        let (Self::Step { source, .. } | Self::HeldOut { source, .. } | Self::Ranks { source, .. }) =
            self
        else {
            return false;
        };
        matches!(source, TrainError::Lost(_))
    }
}

/// What follows a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// A checkpoint.
    Checkpoint,
    /// The end of its phase.
    End,
}

/// The text files of a checkpoint.
pub fn text_of(checkpoint: &Checkpoint) -> Result<Text, CheckpointError> {
    Ok(Text {
        tokenizer_json: checkpoint.tokenizer_json()?,
        chat_template: checkpoint.chat_template()?,
        special_tokens: checkpoint.manifest().text.special_tokens.clone(),
    })
}

impl Run {
    /// Begins a run, or goes on with one (`resume`). Paths of the configuration are relative to `base`.
    pub fn open(
        config: TrainConfig,
        base: &Path,
        cpu: Arc<Cpu>,
        resume: bool,
    ) -> Result<Self, RunError> {
        config.check()?;
        let out = base.join(&config.out);
        let lock = RunLock::take(&out)?;
        let saved = state::list(&out)?;
        // Its end would write over the model that is there, which may be the source.
        let model = out.join(state::MODEL);
        if !resume && !saved.is_empty() || saved.is_empty() && model.exists() {
            return Err(RunError::Exists(out.display().to_string()));
        }
        let source = Source::open(&config.model, base)?;
        let text = source.text().clone();
        let end = source.config().eos_tokens.first().copied();
        let tokenizer = Tokenizer::from_json(&text.tokenizer_json)?;
        let settings = (config.data.sequence, config.data.held_out, config.seed);
        let data = Dataset::read(base, &config.data.files, &tokenizer, end, settings)?;
        let fixed = fixed(&config, &data, &source);
        let opened = open_or_begin(&config, &out, (&fixed, &source), &cpu)?;
        let Opened { trainer, mask, progress, pending } = opened;
        let longest = trainer.params().config().context;
        if config.data.sequence > longest {
            return Err(RunError::Config(ConfigError {
                field: "data.sequence".into(),
                found: config.data.sequence.to_string(),
                expected: format!("1 to {longest} tokens, the model's context, are expected"),
            }));
        }
        let done = progress.phase >= config.phase.len();
        let mut run = Self {
            cpu,
            config,
            out,
            fixed,
            text,
            data,
            base: base.to_owned(),
            engine: Engine::Here(Box::new(trainer)),
            mask,
            progress,
            pending,
            done,
            ranks: None,
            saving: None,
            due: None,
            _lock: lock,
        };
        if done {
            // It may have been interrupted while the model was written. One that is whole is left as it
            // is: tiers may have been added to it since.
            let path = run.out.join(state::MODEL);
            let model = match Checkpoint::open(&path) {
                Ok(_) => path.display().to_string(),
                Err(_) => run.finish()?,
            };
            run.pending.push(Happened::Done { model });
        }
        Ok(run)
    }

    /// Trains with these ranks from now on; no bit depends on it. When some of them are lost, the run goes
    /// on from its last checkpoint with those that are there.
    pub fn share(&mut self, ranks: Arc<dyn Ranks>) -> Result<(), RunError> {
        self.ranks = Some(ranks);
        let trainer = self.engine.take().map_err(|source| self.ranks_error(source))?;
        match self.spread(trainer) {
            Err(error) if error.is_loss() => self.again(&error.to_string()),
            other => other,
        }
    }

    /// The run's folder.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Its configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Steps done, and steps of all phases at most.
    pub fn steps(&self) -> (u64, u64) {
        (self.progress.step, self.config.phase.iter().map(|phase| phase.steps).sum())
    }

    /// The data.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// One step, with what comes before it; nothing once [`Happened::Done`] was said. What was said of a step is to
    /// be written down before the next call: that saves it.
    pub fn advance(&mut self) -> Result<Vec<Happened>, RunError> {
        let mut events = std::mem::take(&mut self.pending);
        if let Some(saving) = self.saving.take_if(|saving| saving.is_over()) {
            events.push(saving.wait()?);
        }
        if self.done {
            return Ok(events);
        }
        let next = match self.due.take() {
            Some(due) => self.follow(due, &mut events),
            None => Ok(()),
        };
        let next = next.and_then(|()| if self.done { Ok(()) } else { self.next(&mut events) });
        match next {
            Err(error) if error.is_loss() => {
                self.again(&error.to_string())?;
                events.append(&mut self.pending);
                Ok(events)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(events),
        }
    }

    /// Writes a checkpoint after this step, whatever the configuration says, unless one is being written.
    pub fn checkpoint(&mut self) -> Result<(), RunError> {
        if self.done
            || self.progress.step_in_phase == 0
            || self.saving.is_some()
            || self.due.is_some()
        {
            return Ok(());
        }
        let mut events = Vec::new();
        let begun = self.save(&mut events);
        self.pending.append(&mut events);
        match begun {
            Err(error) if error.is_loss() => self.again(&error.to_string()),
            other => other,
        }
    }

    fn next(&mut self, events: &mut Vec<Happened>) -> Result<(), RunError> {
        let phase = self.config.phase[self.progress.phase].clone();
        let (record, load) = self.step(&phase)?;
        events.push(Happened::Step(Box::new(record)));
        let look = self.config.data.evaluate_every;
        let mut over = self.progress.step_in_phase >= phase.steps;
        let looks = over || (look > 0 && self.progress.step.is_multiple_of(look));
        if looks {
            let (step, phase) = (self.progress.step, phase.name.clone());
            events.push(Happened::Load { step, phase, tiers: load });
        }
        if looks && let Some(held_out) = self.held_out(&phase)? {
            let (step, name) = (self.progress.step, phase.name.clone());
            events.push(Happened::Evaluated { step, phase: name, held_out });
            if self.progress.best.is_none_or(|best| held_out < best) {
                (self.progress.best, self.progress.since_best) = (Some(held_out), 0);
            } else {
                self.progress.since_best += 1;
            }
            over |= phase.patience > 0 && self.progress.since_best >= phase.patience;
        }
        let every = self.config.checkpoint.every;
        if over {
            self.due = Some(Due::End);
        } else if every > 0 && self.progress.step.is_multiple_of(every) {
            self.due = Some(Due::Checkpoint);
        }
        Ok(())
    }

    /// Does what the last step is to be followed by.
    fn follow(&mut self, due: Due, events: &mut Vec<Happened>) -> Result<(), RunError> {
        if due == Due::Checkpoint {
            return self.save(events);
        }
        self.progress.phase += 1;
        self.progress.step_in_phase = 0;
        (self.progress.best, self.progress.since_best) = (None, 0);
        self.save(events)?;
        // What comes next begins with what is on the disk.
        events.extend(self.saved()?);
        if self.progress.phase >= self.config.phase.len() {
            events.push(Happened::Done { model: self.finish()? });
            self.done = true;
            return Ok(());
        }
        let params = self.whole()?.into_params();
        let begun = begin(&self.config, self.progress.phase, params, &self.cpu, true)?;
        self.mask = begun.mask;
        events.push(begun.event);
        self.spread(begun.trainer)
    }

    fn ranks_error(&self, source: TrainError) -> RunError {
        RunError::Ranks { step: self.progress.step, source }
    }

    /// Trains with this from now on: with the ranks, if there are any.
    fn spread(&mut self, trainer: Trainer) -> Result<(), RunError> {
        let phase = self.progress.phase.min(self.config.phase.len() - 1);
        let optimizer = self.config.phase[phase].optimizer;
        self.engine = match &self.ranks {
            Some(ranks) => Spread::begin(ranks.clone(), trainer, optimizer)
                .map(|spread| Engine::Spread(Box::new(spread)))
                .map_err(|source| self.ranks_error(source))?,
            None => Engine::Here(Box::new(trainer)),
        };
        Ok(())
    }

    /// The trainer with all values and states.
    fn whole(&mut self) -> Result<Trainer, RunError> {
        let whole = self.engine.whole();
        whole.map_err(|source| self.ranks_error(source))
    }

    /// Goes on from the last checkpoint with the ranks that are there.
    fn again(&mut self, reason: &str) -> Result<(), RunError> {
        let mut reason = reason.to_owned();
        for _ in 0..LOSSES_MAX {
            let saved = self.saved()?;
            self.pending.extend(saved);
            let source = Source::open(&self.config.model, &self.base)?;
            let from = (&self.fixed, &source);
            let opened = open_or_begin(&self.config, &self.out, from, &self.cpu)?;
            (self.mask, self.progress, self.due) = (opened.mask, opened.progress, None);
            let step = self.progress.step;
            match self.spread(opened.trainer) {
                Err(error) if error.is_loss() => reason = error.to_string(),
                Err(error) => return Err(error),
                Ok(()) => {
                    self.pending.push(Happened::Resumed { step, reason });
                    self.pending.extend(opened.pending);
                    return Ok(());
                }
            }
        }
        let source = TrainError::Workers(format!("{reason}, {LOSSES_MAX} times in a row"));
        Err(self.ranks_error(source))
    }

    fn options(&self, phase: &PhaseConfig) -> StepOptions<'_> {
        let micro = self.config.compute.micro_rows;
        StepOptions {
            mask: &self.mask,
            objective: Objective { cross_entropy: 1.0, balance: phase.balance.into() },
            recompute: self.config.compute.recompute,
            micro_rows: if micro == 0 { usize::MAX } else { micro },
        }
    }

    fn step(&mut self, phase: &PhaseConfig) -> Result<(StepRecord, Vec<TierLoad>), RunError> {
        let rows = self.config.data.batch;
        let first = self.progress.samples;
        let batch = self.data.batch(first, rows);
        let lr = phase.schedule().at(self.progress.step_in_phase + 1);
        let mask = self.mask.clone();
        let options = StepOptions { mask: &mask, ..self.options(phase) };
        let report = self.engine.step(&batch, &options, lr);
        let report = report.map_err(|source| RunError::Step {
            step: self.progress.step + 1,
            phase: phase.name.clone(),
            first,
            end: first + rows as u64,
            source,
        })?;
        self.progress.step += 1;
        self.progress.step_in_phase += 1;
        self.progress.samples += rows as u64;
        let (params, sums) = (self.engine.params(), &report.losses.sums);
        let step = self.progress.step;
        starvation::mark(params, &self.mask, sums, step, &mut self.progress.last_used);
        let load = loads(params.config(), &self.mask, sums);
        Ok((self.record(phase, report), load))
    }

    fn record(&self, phase: &PhaseConfig, report: StepReport) -> StepRecord {
        let StepReport { losses, grad_norm, lr, pull } = report;
        let BalanceLosses { tier, group, expert, aux, z } = losses.balance;
        let params = self.engine.params();
        let tiers = params.config().moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        let window = self.config.starvation.window;
        let of_tier = |(index, config): (usize, &crate::tier::TierConfig)| {
            let gates = losses.sums.layers.iter().flatten();
            let here = gates
                .filter(|(gate, _)| matches!(gate, Gate::Experts { tier, .. } if *tier == index));
            let assignments: u64 = here.flat_map(|(_, sums)| &sums.routes).sum();
            let experts = u64::from(config.experts()) * losses.sums.layers.len() as u64;
            let ratio = assignments as f64 / experts.max(1) as f64;
            TierRecord {
                tier: config.id.to_string(),
                assignments,
                starved: starvation::starved(
                    params,
                    index,
                    self.progress.step,
                    window,
                    &self.progress.last_used,
                ),
                bound: libm::exp(-(window as f64) * ratio),
            }
        };
        let allowed = tiers.iter().enumerate().filter(|(index, _)| self.mask.allows(*index));
        StepRecord {
            step: self.progress.step,
            phase: phase.name.clone(),
            ce: losses.ce,
            kl_tier: tier,
            kl_group: group,
            kl_expert: expert,
            aux,
            z,
            pull,
            total: losses.total + pull,
            grad_norm,
            lr,
            tokens: losses.tokens,
            forward_passes: losses.forward_passes,
            tiers: allowed.map(of_tier).collect(),
        }
    }

    /// Mean cross-entropy of what is held out; `None` if nothing is.
    fn held_out(&mut self, phase: &PhaseConfig) -> Result<Option<f64>, RunError> {
        let (mut nats, mut predictions) = (0.0, 0);
        let mask = self.mask.clone();
        let options = StepOptions { mask: &mask, ..self.options(phase) };
        let mut end = 0;
        for batch in self.data.held_out(self.config.data.batch) {
            let first = end;
            end += batch.rows.len();
            let losses = self.engine.evaluate(&batch, &options).map_err(|source| {
                let (step, phase) = (self.progress.step, phase.name.clone());
                RunError::HeldOut { step, phase, first, end, source }
            })?;
            nats += losses.ce * losses.predictions as f64;
            predictions += losses.predictions;
        }
        Ok((predictions > 0).then(|| nats / predictions as f64))
    }

    /// Begins to write a checkpoint, beside the steps that follow, when the one before is written.
    fn save(&mut self, events: &mut Vec<Happened>) -> Result<(), RunError> {
        events.extend(self.saved()?);
        let trainer = self.whole()?;
        if let Some((tensor, value)) = trainer.not_finite() {
            let last = self.progress.phase - usize::from(self.progress.step_in_phase == 0);
            let (step, phase) = (self.progress.step, self.config.phase[last].name.clone());
            return Err(RunError::Diverged { step, phase, tensor, value });
        }
        let hash = config_hash(&self.fixed, &self.config.phase, &self.progress);
        let keep = self.config.checkpoint.keep;
        let (out, text) = (self.out.clone(), self.text.clone());
        self.saving = Some(Saving::begin(out, trainer, text, self.progress.clone(), (hash, keep))?);
        Ok(())
    }

    /// Waits for the checkpoint that is being written, if one is.
    fn saved(&mut self) -> Result<Option<Happened>, RunError> {
        self.saving.take().map(Saving::wait).transpose()
    }

    /// Writes the model beside the checkpoints.
    fn finish(&mut self) -> Result<String, RunError> {
        let path = self.out.join(state::MODEL);
        let io = |action| {
            let path = path.display().to_string();
            move |source| StateError::Io { path, action, source }
        };
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(io("remove"))?;
        }
        let written = state::write_model(&path, self.whole()?.params(), &self.text);
        let shown = path.display().to_string();
        written.map_err(|source| StateError::Write { path: shown, source: source.into() })?;
        Ok(path.display().to_string())
    }
}

impl Drop for Run {
    /// What is being written is not lost with a step that failed.
    fn drop(&mut self) {
        if let Some(saving) = self.saving.take() {
            // It has nobody to tell; the checkpoints before are as they were.
            let _ = saving.wait();
        }
    }
}

/// A run where it is.
struct Opened {
    trainer: Trainer,
    mask: TierMask,
    progress: Progress,
    pending: Vec<Happened>,
}

/// Goes on from the last checkpoint of a run, or begins it.
fn open_or_begin(
    config: &TrainConfig,
    out: &Path,
    (fixed, source): (&serde_json::Value, &Source),
    cpu: &Arc<Cpu>,
) -> Result<Opened, RunError> {
    let (params, progress, mut tensors) = match state::list(out)?.last() {
        Some((_, dir)) => {
            let hash = |progress: &Progress| config_hash(fixed, &config.phase, progress);
            let state::Loaded { params, progress, tensors } = state::load(dir, hash)?;
            (params, progress, tensors)
        }
        None => {
            let params = match &config.model.new {
                Some(new) => Params::random(new.config(source.config())?, config.seed),
                None => source.params()?,
            };
            (params, Progress::default(), Default::default())
        }
    };
    let done = progress.phase >= config.phase.len();
    let index = progress.phase.min(config.phase.len() - 1);
    let fresh = progress.step_in_phase == 0 && !done;
    if !done {
        check_all(config, index, params.config(), fresh)?;
    }
    let Begun { mut trainer, mask, event } = begin(config, index, params, cpu, fresh)?;
    if progress.step_in_phase > 0 {
        let missing = trainer.restore(progress.step_in_phase, |name| tensors.remove(name));
        missing.map_err(|name| StateError::Bad {
            path: out.display().to_string(),
            reason: format!(
                "the checkpoint's state lacks {name}; remove its folder to go on from the one before"
            ),
        })?;
    }
    let pending = if done { Vec::new() } else { vec![event] };
    Ok(Opened { trainer, mask, progress, pending })
}

/// Names all that decides the bits of a run.
fn fixed(config: &TrainConfig, data: &Dataset, source: &Source) -> serde_json::Value {
    let TrainConfig { seed, model, data: of_data, compute, .. } = config;
    serde_json::json!({
        "seed": seed, "model": model, "precision": compute.precision,
        "sequence": of_data.sequence, "batch": of_data.batch, "held_out": of_data.held_out,
        "evaluate_every": of_data.evaluate_every,
        "data": data.hash().to_string(), "from": source.root().to_string(),
        "parameters": shapes(source.config()).len(),
    })
}

/// Of what has shaped a run so far: phases that have not begun may still be changed.
fn config_hash(fixed: &serde_json::Value, phases: &[PhaseConfig], progress: &Progress) -> Hash {
    let begun = progress.phase + usize::from(progress.step_in_phase > 0);
    let phases = &phases[..begun.min(phases.len())];
    Hash::of(serde_json::json!({ "fixed": fixed, "phases": phases }).to_string().as_bytes())
}
