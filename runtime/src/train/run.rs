//! A run: the phases of a curriculum over a stream of batches, step by step, with checkpoints.
//!
//! A pure machine but for its files: [`Run::advance`] does one step and says what happened; the caller shows it
//! and keeps the time. What a run computes is a function of its configuration and text: where it is
//! interrupted, and how often, changes no bit.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use lite_llm_kernels::cpu::Cpu;
use serde::Serialize;

use super::{
    TrainError,
    balance::BalanceLosses,
    config::{PhaseConfig, TrainConfig},
    data::{DataError, Dataset},
    grow::GrowError,
    params::{Params, shapes},
    phase::{Begun, begin, check_all},
    shared::Workers,
    starvation,
    state::{self, Progress, RunLock, StateError},
    step::{Objective, StepOptions, evaluate},
    trainer::{StepReport, Trainer},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, index::Hash, writer::Text},
    config::ConfigError,
    routing::Gate,
    tier::{TierMask, TierSetError},
    tokenizer::{Tokenizer, TokenizerError},
};

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
    /// The model to begin with.
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

/// What a step of a run left for people and files.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Happened {
    /// A phase begins.
    Phase {
        /// Its name.
        name: String,
        /// Steps at most.
        steps: u64,
        /// Parameters that are trained, and all.
        trained: u64,
        /// See `trained`.
        parameters: u64,
        /// What may starve.
        warnings: Vec<String>,
    },
    /// A step.
    Step(Box<StepRecord>),
    /// A look at what is held out.
    Evaluated {
        /// Step of the run.
        step: u64,
        /// Name of the phase.
        phase: String,
        /// Mean cross-entropy held out, in nats.
        held_out: f64,
    },
    /// A checkpoint was written.
    Saved {
        /// Step of the run.
        step: u64,
        /// Its folder.
        path: String,
    },
    /// All phases are over.
    Done {
        /// The model.
        model: String,
    },
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Step of the run, from 1.
    pub step: u64,
    /// Name of the phase.
    pub phase: String,
    /// Cross-entropy before the step, in nats.
    pub ce: f64,
    /// KL of the gates' means from even, per level, and the others, none times its weight.
    pub kl_tier: f64,
    /// See `kl_tier`.
    pub kl_group: f64,
    /// See `kl_tier`.
    pub kl_expert: f64,
    /// The flat classes' own loss.
    pub aux: f64,
    /// Router z-loss.
    pub z: f64,
    /// λ/2 · |p − p₀|² of what is pulled.
    pub pull: f64,
    /// What was minimised.
    pub total: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Forward passes over the batch: 2 where statistics had to be known first.
    pub forward_passes: u32,
    /// By tier of the set.
    pub tiers: Vec<TierRecord>,
}

/// A tier in one step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierRecord {
    /// Its name.
    pub tier: String,
    /// Assignments to its experts, over all layers.
    pub assignments: u64,
    /// Experts without a token in the window.
    pub starved: usize,
    /// e^(−window · A_t / M_t) by what was counted: the bound on an expert's chance to starve.
    pub bound: f64,
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
    trainer: Trainer,
    mask: TierMask,
    progress: Progress,
    pending: Vec<Happened>,
    done: bool,
    /// Others who compute, if there are any.
    workers: Option<Box<dyn Workers>>,
    /// Keeps other trainers out of the folder.
    _lock: RunLock,
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
        let named =
            config.model.from.as_ref().or(config.model.new.as_ref().map(|new| &new.tokenizer));
        let source = Checkpoint::open(base.join(named.map_or("", String::as_str)))?;
        let text = text_of(&source)?;
        let end = source.config().eos_tokens.first().copied();
        let tokenizer = Tokenizer::from_json(&text.tokenizer_json)?;
        let settings = (config.data.sequence, config.data.held_out, config.seed);
        let data = Dataset::read(base, &config.data.files, &tokenizer, end, settings)?;
        let fixed = fixed(&config, &data, &source);
        let loaded = match saved.last() {
            Some((_, dir)) => {
                Some(state::load(dir, |progress| config_hash(&fixed, &config.phase, progress))?)
            }
            None => None,
        };
        let (params, progress, tensors) = match loaded {
            Some(state::Loaded { params, progress, tensors }) => (params, progress, tensors),
            None => {
                let params = match &config.model.new {
                    Some(new) => Params::random(new.config(source.config())?, config.seed),
                    None => Params::load(&source)?,
                };
                let progress = Progress {
                    step: 0,
                    phase: 0,
                    step_in_phase: 0,
                    samples: 0,
                    best: None,
                    since_best: 0,
                    last_used: Vec::new(),
                };
                (params, progress, Default::default())
            }
        };
        let longest = params.config().context;
        if config.data.sequence > longest {
            return Err(RunError::Config(ConfigError {
                field: "data.sequence".into(),
                found: config.data.sequence.to_string(),
                expected: format!("1 to {longest} tokens, the model's context, are expected"),
            }));
        }
        let done = progress.phase >= config.phase.len();
        let index = progress.phase.min(config.phase.len() - 1);
        let fresh = progress.step_in_phase == 0 && !done;
        if !done {
            check_all(&config, index, params.config(), fresh)?;
        }
        let begun = begin(&config, index, params, &cpu, fresh)?;
        let Begun { mut trainer, mask, event } = begun;
        if progress.step_in_phase > 0 {
            let missing =
                trainer.restore(progress.step_in_phase, |name| tensors.get(name).cloned());
            missing.map_err(|name| StateError::Bad {
                path: out.display().to_string(),
                reason: format!("the checkpoint's state lacks {name}; remove its folder to go on from the one before"),
            })?;
        }
        let pending = if done { Vec::new() } else { vec![event] };
        let mut run = Self {
            cpu,
            config,
            out,
            fixed,
            text,
            data,
            trainer,
            mask,
            progress,
            pending,
            done,
            workers: None,
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

    /// Lets others compute gradients from now on; no bit depends on it.
    pub fn share(&mut self, workers: Box<dyn Workers>) {
        self.workers = Some(workers);
    }

    /// The run's folder.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Steps done, and steps of all phases at most.
    pub fn steps(&self) -> (u64, u64) {
        (self.progress.step, self.config.phase.iter().map(|phase| phase.steps).sum())
    }

    /// The data.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// The parameters as they are.
    pub fn params(&self) -> &Params {
        self.trainer.params()
    }

    /// One step, with what comes before and after it; nothing once [`Happened::Done`] was said.
    pub fn advance(&mut self) -> Result<Vec<Happened>, RunError> {
        let mut events = std::mem::take(&mut self.pending);
        if self.done {
            return Ok(events);
        }
        let phase = self.config.phase[self.progress.phase].clone();
        events.push(Happened::Step(Box::new(self.step(&phase)?)));
        let look = self.config.data.evaluate_every;
        let mut over = self.progress.step_in_phase >= phase.steps;
        let looks = over || (look > 0 && self.progress.step.is_multiple_of(look));
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
            self.progress.phase += 1;
            self.progress.step_in_phase = 0;
            (self.progress.best, self.progress.since_best) = (None, 0);
            events.push(self.save(&phase)?);
            if self.progress.phase >= self.config.phase.len() {
                self.done = true;
                events.push(Happened::Done { model: self.finish()? });
            } else {
                let params = self.trainer.params().clone();
                let begun = begin(&self.config, self.progress.phase, params, &self.cpu, true)?;
                (self.trainer, self.mask) = (begun.trainer, begun.mask);
                self.pending.push(begun.event);
            }
        } else if every > 0 && self.progress.step.is_multiple_of(every) {
            events.push(self.save(&phase)?);
        }
        Ok(events)
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

    fn step(&mut self, phase: &PhaseConfig) -> Result<StepRecord, RunError> {
        let rows = self.config.data.batch;
        let first = self.progress.samples;
        let batch = self.data.batch(first, rows);
        let lr = phase.schedule().at(self.progress.step_in_phase + 1);
        let mask = self.mask.clone();
        let options = StepOptions { mask: &mask, ..self.options(phase) };
        let workers = self.workers.as_mut().map(|workers| &mut **workers as &mut dyn Workers);
        let report = self.trainer.step_by(workers, &batch, &options, lr);
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
        let (params, sums) = (self.trainer.params(), &report.losses.sums);
        let step = self.progress.step;
        starvation::mark(params, &self.mask, sums, step, &mut self.progress.last_used);
        Ok(self.record(phase, report))
    }

    fn record(&self, phase: &PhaseConfig, report: StepReport) -> StepRecord {
        let StepReport { losses, grad_norm, lr, pull } = report;
        let BalanceLosses { tier, group, expert, aux, z } = losses.balance;
        let params = self.trainer.params();
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
    fn held_out(&self, phase: &PhaseConfig) -> Result<Option<f64>, RunError> {
        let (mut nats, mut predictions) = (0.0, 0);
        let options = self.options(phase);
        let mut end = 0;
        for batch in self.data.held_out(self.config.data.batch) {
            let first = end;
            end += batch.rows.len();
            let losses =
                evaluate(&self.cpu, self.trainer.params(), &batch, &options).map_err(|source| {
                    let (step, phase) = (self.progress.step, phase.name.clone());
                    RunError::HeldOut { step, phase, first, end, source }
                })?;
            nats += losses.ce * losses.predictions as f64;
            predictions += losses.predictions;
        }
        Ok((predictions > 0).then(|| nats / predictions as f64))
    }

    fn save(&self, phase: &PhaseConfig) -> Result<Happened, RunError> {
        if let Some((tensor, value)) = self.trainer.not_finite() {
            let (step, phase) = (self.progress.step, phase.name.clone());
            return Err(RunError::Diverged { step, phase, tensor, value });
        }
        let keep = self.config.checkpoint.keep;
        // A phase that has not begun remembers nothing.
        let states = self.trainer.states().filter(|_| self.progress.step_in_phase > 0);
        let hash = config_hash(&self.fixed, &self.config.phase, &self.progress);
        let (params, to) = (self.trainer.params(), (hash, keep));
        let path = state::save(&self.out, params, &self.text, &self.progress, states, to)?;
        Ok(Happened::Saved { step: self.progress.step, path: path.display().to_string() })
    }

    /// Writes the model beside the checkpoints.
    fn finish(&self) -> Result<String, RunError> {
        let path = self.out.join(state::MODEL);
        let io = |action| {
            let path = path.display().to_string();
            move |source| StateError::Io { path, action, source }
        };
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(io("remove"))?;
        }
        state::write_model(&path, self.trainer.params(), &self.text)?;
        Ok(path.display().to_string())
    }
}

/// Names all that decides the bits of a run.
fn fixed(config: &TrainConfig, data: &Dataset, source: &Checkpoint) -> serde_json::Value {
    let TrainConfig { seed, model, data: of_data, compute, .. } = config;
    serde_json::json!({
        "seed": seed, "model": model, "precision": compute.precision,
        "sequence": of_data.sequence, "batch": of_data.batch, "held_out": of_data.held_out,
        "evaluate_every": of_data.evaluate_every,
        "data": data.hash().to_string(), "from": source.manifest().root.to_string(),
        "parameters": shapes(source.config()).len(),
    })
}

/// Of what has shaped a run so far: phases that have not begun may still be changed.
fn config_hash(fixed: &serde_json::Value, phases: &[PhaseConfig], progress: &Progress) -> Hash {
    let begun = progress.phase + usize::from(progress.step_in_phase > 0);
    let phases = &phases[..begun.min(phases.len())];
    Hash::of(serde_json::json!({ "fixed": fixed, "phases": phases }).to_string().as_bytes())
}
