//! `lite-llm train`, and beside it `grad`, `tier` and `tokenizer`.

mod gauges;
mod grad;
mod heat;
mod metrics;
mod plot;
mod share;
mod tier;
mod tokenizer;

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use lite_llm_kernels::{cpu::Cpu, simd::Simd};
use lite_llm_runtime::train::{
    config::TrainConfig,
    run::{Happened, Run, StepRecord},
    spread::Ranks,
};
use tokio::time::timeout;
use tracing::debug_span;

use self::{gauges::Gauges, metrics::Metrics};
pub(super) use self::{grad::grad, tier::tier, tokenizer::tokenizer};
use super::bad_input;
use crate::{
    cli::{RunTrainArgs, TrainArgs, TrainCommand, TrainComputeArgs},
    machine,
    otlp::Reports,
    telemetry,
};

/// How long compute threads spin between two operations of a step: what lies between is shorter than waking up.
const SPIN: Duration = Duration::from_millis(1);

impl TrainComputeArgs {
    /// Threads of a training.
    pub(super) fn cpu(&self) -> Result<Arc<Cpu>> {
        let threads = self.threads.map_or_else(machine::cores, usize::from);
        let simd = self.simd.unwrap_or_else(Simd::best);
        if !simd.is_available() {
            let here: Vec<_> = Simd::available().iter().map(|s| s.to_string()).collect();
            return Err(bad_input(anyhow!(
                "--simd {simd}: this processor has {}",
                here.join(", ")
            )));
        }
        Ok(Arc::new(Cpu::spinning(threads, simd, SPIN)))
    }
}

/// What this process is called in traces.
pub(super) fn role(args: &TrainArgs) -> String {
    match &args.what {
        Some(TrainCommand::Worker(args)) => format!("train worker {}", share::name(args)),
        _ => format!("train {}", std::process::id()),
    }
}

pub(super) async fn train(args: TrainArgs, json: bool) -> Result<()> {
    match args.what {
        Some(TrainCommand::Plot(args)) => return plot::plot(&args, json),
        Some(TrainCommand::Worker(args)) => return share::worker(args).await,
        None => {}
    }
    let (args, opened) = tokio::task::spawn_blocking(move || {
        let run = open(&args.run);
        (args.run, run)
    })
    .await?;
    let run = opened?;
    let shared = match args.workers {
        Some(count) => Some(share::Shared::start(&args, count).await?),
        None => None,
    };
    let ranks = shared.as_ref().map(share::Shared::ranks);
    let gauges = Gauges::new()?;
    let reports = telemetry::receiver().and_then(Reports::new).map(Arc::new);
    let (shown, sender) = (gauges.clone(), reports.clone());
    let exporting = reports.clone().map(|reports| {
        let gauges = gauges.clone();
        let gather = move || std::future::ready(Ok(gauges.families()));
        tokio::spawn(async move { reports.export(gather).await })
    });
    // Steps block; the command's thread is to hear an interruption.
    let ended = tokio::task::spawn_blocking(move || perform(run, ranks, &shown, json)).await;
    exporting.inspect(|task| task.abort());
    if let Some(last) = sender {
        // A receiver that does not take it has been complained of.
        let _ = timeout(LAST_REPORT_MAX, last.send(&gauges.families())).await;
    }
    if let Some(shared) = shared {
        shared.stop().await;
    }
    ended?
}

/// How long the last report of metrics may take.
const LAST_REPORT_MAX: Duration = Duration::from_secs(3);

/// The run that a configuration describes, where it is.
fn open(args: &RunTrainArgs) -> Result<Run> {
    let config =
        args.config.as_ref().ok_or_else(|| bad_input(anyhow!("CONFIG.toml is missing")))?;
    let path = config.display();
    let text = fs::read_to_string(config)
        .with_context(|| format!("{path}: cannot read"))
        .map_err(bad_input)?;
    let base = config.parent().unwrap_or(Path::new("")).to_owned();
    let config: TrainConfig =
        toml::from_str(&text).map_err(|error| bad_input(anyhow!("{path}: {error}")))?;
    Run::open(config, &base, args.compute.cpu()?, args.resume)
        .map_err(|error| bad_input(anyhow!("{path}: {error}")))
}

fn perform(mut run: Run, ranks: Option<Arc<dyn Ranks>>, gauges: &Gauges, json: bool) -> Result<()> {
    if let Some(ranks) = ranks {
        run.share(ranks)?;
    }
    let (done, steps) = run.steps();
    let mut metrics = Metrics::open(run.out(), done)?;
    let [rows, held_out] = run.data().rows();
    if !json {
        say!(
            "{} tokens of text: {rows} rows to train on, {held_out} held out; {done} of {steps} steps done",
            run.data().tokens()
        );
    }
    let mut pace = Pace::new(done, steps);
    let minutes = run.config().checkpoint.minutes;
    let mut saved = Instant::now();
    loop {
        let (done, _) = run.steps();
        let events = debug_span!("step", otel.name = "training step", step = done + 1)
            .in_scope(|| run.advance())?;
        if events.is_empty() {
            return Ok(());
        }
        let mut over = false;
        for event in events {
            metrics.write(&event, pace.seconds())?;
            gauges.observe(&event, pace.estimate(done).0);
            over |= matches!(event, Happened::Done { .. });
            show(&event, &mut pace, json);
        }
        if minutes > 0 && saved.elapsed() >= Duration::from_secs(60 * minutes) {
            run.checkpoint()?;
            saved = Instant::now();
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
        let each = seconds / step.saturating_sub(self.from).max(1) as f64;
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
        Happened::Load { .. } => {}
        Happened::Resumed { step, reason } => {
            remark!("warning: {reason}; going on from step {step}");
        }
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
