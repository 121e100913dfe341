//! `lite-llm train`, `grad` and `tier add`: everything in one process.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write,
    path::Path,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, anyhow};
use lite_llm_kernels::{cpu::Cpu, simd::Simd};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    train::{
        Recompute,
        balance::BalanceWeights,
        batch::{Batch, Row},
        config::TrainConfig,
        grow::{add_tier, tier_parameters},
        params::Params,
        run::{Happened, Run, StepRecord},
        step::{Objective, StepOptions, gradients},
    },
};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::json;

use super::bad_input;
use crate::{
    cli::{GradArgs, TierAddArgs, TierCommand, TrainArgs, TrainComputeArgs},
    machine,
};

/// Metrics of a run: a line of JSON for each thing that happened.
const METRICS: &str = "metrics.jsonl";

impl TrainComputeArgs {
    fn cpu(&self) -> Result<Arc<Cpu>> {
        let threads = self.threads.map_or_else(machine::cores, usize::from);
        let simd = self.simd.unwrap_or_else(Simd::best);
        if !simd.is_available() {
            let here: Vec<_> = Simd::available().iter().map(|s| s.to_string()).collect();
            return Err(bad_input(anyhow!(
                "--simd {simd}: this processor has {}",
                here.join(", ")
            )));
        }
        Ok(Arc::new(Cpu::new(threads, simd)))
    }
}

pub(super) async fn train(args: TrainArgs, json: bool) -> Result<()> {
    // Steps block; the command's thread is to hear an interruption.
    tokio::task::spawn_blocking(move || run(&args, json)).await?
}

fn run(args: &TrainArgs, json: bool) -> Result<()> {
    let path = args.config.display();
    let text = fs::read_to_string(&args.config)
        .with_context(|| format!("{path}: cannot read"))
        .map_err(bad_input)?;
    let config: TrainConfig =
        toml::from_str(&text).map_err(|error| bad_input(anyhow!("{path}: {error}")))?;
    let base = args.config.parent().unwrap_or(Path::new("")).to_owned();
    let mut run = Run::open(config, &base, args.compute.cpu()?, args.resume)
        .map_err(|error| bad_input(anyhow!("{path}: {error}")))?;
    fs::create_dir_all(run.out())
        .with_context(|| format!("{}: cannot create", run.out().display()))?;
    let (done, steps) = run.steps();
    let mut metrics = Metrics::open(&run.out().join(METRICS), done)?;
    let [rows, held_out] = run.data().rows();
    if !json {
        say!(
            "{} tokens of text: {rows} rows to train on, {held_out} held out; {done} of {steps} steps done",
            run.data().tokens()
        );
    }
    let mut pace = Pace::new(done, steps);
    loop {
        let events = run.advance()?;
        if events.is_empty() {
            return Ok(());
        }
        let mut over = false;
        for event in events {
            metrics.write(&event, pace.seconds())?;
            over |= matches!(event, Happened::Done { .. });
            show(&event, &mut pace, json);
        }
        if over {
            return Ok(());
        }
    }
}

/// How fast a run goes.
struct Pace {
    begun: Instant,
    last: Instant,
    tokens: usize,
    /// Steps when it began, and in all.
    from: u64,
    steps: u64,
}

impl Pace {
    /// Seconds between two lines.
    const INTERVAL: f64 = 2.0;

    fn new(from: u64, steps: u64) -> Self {
        Self { begun: Instant::now(), last: Instant::now(), tokens: 0, from, steps }
    }

    fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Tokens per second since it began, and seconds left.
    fn estimate(&self, step: u64) -> (f64, f64) {
        let seconds = self.seconds().max(1e-9);
        let each = seconds / (step - self.from).max(1) as f64;
        (self.tokens as f64 / seconds, each * self.steps.saturating_sub(step) as f64)
    }
}

fn show(event: &Happened, pace: &mut Pace, json: bool) {
    if let Happened::Step(record) = event {
        pace.tokens += record.tokens;
    }
    if json {
        if let Ok(text) = serde_json::to_string(event) {
            say!("{text}");
        }
        return;
    }
    match event {
        Happened::Phase { name, steps, trained, parameters, warnings } => {
            say!("phase {name}: {steps} steps, {trained} of {parameters} parameters trained");
            warnings.iter().for_each(|warning| remark!("warning: {warning}"));
        }
        Happened::Step(record) => show_step(record, pace),
        Happened::Evaluated { step, phase, held_out } => {
            say!("step {step} ({phase}): held out {held_out:.4} nats");
        }
        Happened::Saved { path, .. } => say!("saved {path}"),
        Happened::Done { model } => {
            say!("done: {model}; try it with `lite-llm run --model {model} \"…\"`");
        }
    }
}

fn show_step(record: &StepRecord, pace: &mut Pace) {
    if record.step > 1 && pace.last.elapsed().as_secs_f64() < Pace::INTERVAL {
        return;
    }
    pace.last = Instant::now();
    let StepRecord { step, ce, kl_tier, kl_group, kl_expert, lr, grad_norm, .. } = record;
    let (speed, left) = pace.estimate(*step);
    let starved: usize = record.tiers.iter().map(|tier| tier.starved).sum();
    say!(
        "step {step} of {}: loss {ce:.4}, balance {kl_tier:.3} {kl_group:.3} {kl_expert:.3}, norm {grad_norm:.2}, \
         lr {lr:.2e}, {starved} starved, {speed:.0} tokens/s, {left:.0} s left",
        pace.steps
    );
}

/// The metrics of a run.
struct Metrics {
    file: File,
    path: String,
}

impl Metrics {
    /// Opens them; what was written beyond the step that a run goes on from is dropped.
    fn open(path: &Path, done: u64) -> Result<Self> {
        let shown = path.display().to_string();
        let io = |what: &str| format!("{shown}: cannot {what}");
        let old = fs::read_to_string(path).unwrap_or_default();
        let kept: String = old
            .lines()
            .filter(|line| {
                let value: Option<serde_json::Value> = serde_json::from_str(line).ok();
                value.is_some_and(|v| v["step"].as_u64().is_none_or(|step| step <= done))
            })
            .map(|line| format!("{line}\n"))
            .collect();
        fs::write(path, kept).with_context(|| io("write"))?;
        let file = OpenOptions::new().append(true).open(path).with_context(|| io("open"))?;
        Ok(Self { file, path: shown })
    }

    fn write(&mut self, event: &Happened, seconds: f64) -> Result<()> {
        let mut value = serde_json::to_value(event)?;
        value["seconds"] = json!(seconds);
        writeln!(self.file, "{value}").with_context(|| format!("{}: cannot write", self.path))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    prompts: Vec<Vec<u32>>,
}

pub(super) fn grad(args: GradArgs, json: bool) -> Result<()> {
    let shown = args.tokens.display();
    let text = fs::read(&args.tokens)
        .with_context(|| format!("{shown}: cannot read"))
        .map_err(bad_input)?;
    let tokens: Tokens = serde_json::from_slice(&text)
        .with_context(|| format!("{shown}: {{\"prompts\": [[ids…], …]}} is expected"))
        .map_err(bad_input)?;
    let checkpoint = Checkpoint::open(&args.model).map_err(bad_input)?;
    let params = Params::load(&checkpoint).map_err(bad_input)?;
    let tiers = params.config().moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let mask = args.tiers.mask(tiers).map_err(bad_input)?;
    let [tier, group, expert] = match args.balance.as_deref() {
        Some(&[tier, group, expert]) => [tier, group, expert],
        _ => [0.0; 3],
    };
    let balance = BalanceWeights { tier, group, expert, ..Default::default() };
    let batch = Batch { rows: tokens.prompts.into_iter().map(Row::whole).collect() };
    let options = StepOptions {
        mask: &mask,
        objective: Objective { cross_entropy: 1.0, balance },
        recompute: if args.recompute { Recompute::Layer } else { Recompute::None },
        micro_rows: args.micro_rows.map_or(usize::MAX, |rows| rows as usize),
    };
    let wanted = vec![true; params.list().len()];
    let (losses, found) = gradients(&*args.compute.cpu()?, &params, &batch, &options, &wanted)
        .map_err(|error| bad_input(anyhow!("{shown}: {error}")))?;
    let scalars = [
        ("loss.ce", losses.ce),
        ("loss.lb_tier", losses.balance.tier),
        ("loss.lb_group", losses.balance.group),
        ("loss.lb_expert", losses.balance.expert),
        ("loss.total", losses.total),
    ];
    let scalars = scalars.map(|(name, value)| (name, value.to_le_bytes()));
    let mut views = BTreeMap::new();
    for (name, bytes) in &scalars {
        views.insert((*name).to_owned(), TensorView::new(Dtype::F64, vec![], bytes)?);
    }
    let zeros: Vec<Vec<f32>> = params
        .list()
        .iter()
        .enumerate()
        .map(|(id, p)| if found.get(id).is_some() { vec![] } else { vec![0.0; p.values().len()] })
        .collect();
    for (id, param) in params.list().iter().enumerate() {
        let values = found.get(id).unwrap_or(&zeros[id]);
        let bytes = bytemuck::cast_slice(values);
        views.insert(param.name.clone(), TensorView::new(Dtype::F32, param.shape.clone(), bytes)?);
    }
    safetensors::serialize_to_file(&views, None, &args.out)
        .with_context(|| format!("{}: cannot write", args.out.display()))?;
    if json {
        say!("{}", json!({ "out": args.out, "ce": losses.ce, "total": losses.total }));
    } else {
        say!("loss {:.6} nats; gradients written to {}", losses.ce, args.out.display());
    }
    Ok(())
}

pub(super) fn tier(command: TierCommand, json: bool) -> Result<()> {
    let TierCommand::Add(args) = command;
    add(args, json)
}

fn add(args: TierAddArgs, json: bool) -> Result<()> {
    let init = args.init.parse().map_err(|error| bad_input(anyhow!("--init: {error}")))?;
    let checkpoint = Checkpoint::open(&args.dir).map_err(bad_input)?;
    let mut tier = lite_llm_runtime::tier::TierConfig::new(args.name, args.groups, args.experts, 0);
    (tier.intermediate, tier.dtype, tier.placement) =
        (args.intermediate, args.dtype, args.placement);
    tier.parameters = tier_parameters(checkpoint.config(), &tier);
    let name = tier.id.clone();
    let root = add_tier(&args.dir, tier, &init).map_err(bad_input)?;
    let number = Checkpoint::open(&args.dir)?.manifest().number;
    if json {
        say!("{}", json!({ "tier": name.as_str(), "manifest": number, "root": root.to_string() }));
    } else {
        say!("{name} added: manifest.{number}.json, root {root}; earlier manifests still open");
    }
    Ok(())
}
