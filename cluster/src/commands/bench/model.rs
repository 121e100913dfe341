//! `lite-llm bench decode` and `bench prefill`: a cluster in this process beside the same engine
//! called without actors or network.
//!
//! Both have the same weights, threads and prompt, and take turns; both must say the same tokens,
//! or the measurement is void. Decode counts the tokens after the first, prefill the prompt's up
//! to the first.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lite_llm_actors::local::LocalCluster;
use lite_llm_kernels::{cpu::Cpu, kv::KvDType};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::{Engine, Event, Step},
    random::{Purpose, random_u64},
    sequence::Request,
    store::DramStore,
};
use lite_llm_transport::messages::{JobEventBody, JobRequest, Prompt};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::samples::{Goal, Samples, print_table};
use crate::{
    cli::BenchModelArgs,
    commands::{bad_input, open_model},
    progress::{Progress, Unit},
};

/// What is asked of a cluster of one worker against the engine alone, in tokens per second.
const RATIO: f64 = 0.95;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Decode,
    Prefill,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Decode => "decode",
            Phase::Prefill => "prefill",
        }
    }
}

/// When a request's tokens came.
struct Timeline {
    submitted: Instant,
    /// Every token and when it was there.
    tokens: Vec<(u32, Instant)>,
}

impl Timeline {
    fn begin() -> Self {
        Self { submitted: Instant::now(), tokens: Vec::new() }
    }

    fn push(&mut self, id: u32) {
        self.tokens.push((id, Instant::now()));
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|(id, _)| *id).collect()
    }

    /// Tokens per second of a phase.
    fn rate(&self, phase: Phase, prompt: usize) -> f64 {
        let (Some((_, first)), Some((_, last))) = (self.tokens.first(), self.tokens.last()) else {
            return 0.0;
        };
        let (count, time) = match phase {
            Phase::Decode => (self.tokens.len() - 1, last.duration_since(*first)),
            Phase::Prefill => (prompt, first.duration_since(self.submitted)),
        };
        count as f64 / time.as_secs_f64().max(1e-9)
    }

    /// Times between tokens.
    fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.tokens.windows(2).map(|pair| pair[1].1.duration_since(pair[0].1))
    }
}

pub(super) async fn measure(phase: Phase, args: BenchModelArgs, json: bool) -> Result<()> {
    let checkpoint = open_model(args.model.as_ref())?;
    let work = Arc::new(work(phase, &args, &checkpoint)?);
    let alone = match args.cluster_only {
        true => None,
        false => Some(Alone::load(checkpoint.clone(), &args).await?),
    };
    let loading = Instant::now();
    let cluster = args.local.cluster(checkpoint.clone()).await?;
    let mut report = Report {
        phase,
        model: checkpoint.location(),
        workers: args.local.workers.into(),
        threads: args.local.compute.threads(args.local.workers.into()),
        simd: args.local.compute.simd()?.to_string(),
        prompt: work.prompt.len(),
        generate: work.generate,
        load: loading.elapsed(),
        cluster: Samples::default(),
        alone: alone.is_some().then(Samples::default),
        gaps: Samples::default(),
        alone_gaps: Samples::default(),
    };
    let mut progress =
        Progress::new(&format!("bench {}", phase.name()), Unit::Things("runs"), json);
    let runs = u64::from(args.runs);
    let result = async {
        // The first of each warms up and is not counted.
        for run in 0..=runs {
            progress.update(run, runs + 1, "");
            let ours = run_in_cluster(&cluster, &work).await?;
            let theirs = match &alone {
                None => None,
                Some(alone) => Some(alone.run(&work).await?),
            };
            if let Some(theirs) = &theirs {
                ensure!(
                    ours.ids() == theirs.ids(),
                    "the cluster and the engine alone generated different tokens: \
                     what was measured is not the same work"
                );
            }
            if run > 0 {
                report.take(&ours, theirs.as_ref());
            }
        }
        Ok(())
    }
    .await;
    progress.finish();
    cluster.stop().await;
    result.map(|()| match json {
        true => println!("{}", report.json()),
        false => report.print(),
    })
}

/// The request that is repeated.
struct Work {
    prompt: Vec<u32>,
    generate: usize,
}

fn work(phase: Phase, args: &BenchModelArgs, checkpoint: &Checkpoint) -> Result<Work> {
    let config = checkpoint.config();
    let generate = match phase {
        Phase::Decode => args.generate as usize,
        Phase::Prefill => 1,
    };
    let room = config.context.saturating_sub(generate);
    let prompt = args.prompt.map_or_else(
        || room.min(if phase == Phase::Decode { 64 } else { 512 }),
        |prompt| prompt as usize,
    );
    if prompt == 0 || prompt > room {
        return Err(bad_input(anyhow::anyhow!(
            "a prompt of {prompt} tokens and {generate} generated ones: \
             this model sees {} tokens; give a smaller --prompt or --generate",
            config.context
        )));
    }
    let token = |at| (random_u64(args.seed, Purpose::Sampling, at) % config.vocab as u64) as u32;
    Ok(Work { prompt: (0..prompt as u64).map(token).collect(), generate })
}

/// What the engine alone is to do, and where its answer goes.
type Order = (Arc<Work>, oneshot::Sender<Result<Timeline>>);

/// The engine without actors or network, on a thread of its own, as a node's lane is.
struct Alone {
    orders: mpsc::Sender<Order>,
}

impl Alone {
    async fn load(checkpoint: Arc<Checkpoint>, args: &BenchModelArgs) -> Result<Self> {
        let (compute, kv_dtype) = (args.local.compute.clone(), args.local.kv_dtype);
        let workers = usize::from(args.local.workers);
        // As many threads as all workers together.
        let device = Arc::new(Cpu::new(compute.threads(workers) * workers, compute.simd()?));
        let (orders, inbox) = mpsc::channel::<Order>();
        let (loaded, ready) = oneshot::channel();
        let life = move || match AloneEngine::load(&checkpoint, device, compute.kv.0, kv_dtype) {
            Err(error) => drop(loaded.send(Err(error))),
            Ok(mut engine) => {
                // The asking side may have been interrupted, here and below.
                drop(loaded.send(Ok(())));
                for (work, done) in inbox {
                    drop(done.send(engine.run(&work)));
                }
            }
        };
        std::thread::Builder::new().name("lite-llm-alone".into()).spawn(life)?;
        ready.await.context("the engine's thread ended while it loaded")??;
        Ok(Self { orders })
    }

    async fn run(&self, work: &Arc<Work>) -> Result<Timeline> {
        let (done, timeline) = oneshot::channel();
        // An engine that is gone drops the order, which the next line tells.
        let _ = self.orders.send((work.clone(), done));
        timeline.await.context("the engine's thread ended")?
    }
}

/// What [`Alone`]'s thread owns.
struct AloneEngine {
    engine: Engine<Cpu>,
    store: DramStore,
    requests: u64,
}

impl AloneEngine {
    fn load(
        checkpoint: &Checkpoint,
        device: Arc<Cpu>,
        kv_bytes: u64,
        kv_dtype: KvDType,
    ) -> Result<Self> {
        let store = DramStore::new(u64::MAX);
        store.load_all(checkpoint)?;
        let backbone = Backbone::load(checkpoint, device, |_, _| {})?;
        let engine = Engine::with_cache(Arc::new(backbone), kv_bytes, kv_dtype)?;
        Ok(Self { engine, store, requests: 0 })
    }

    /// [`Engine::run_local`], with a look at the clock at every token.
    fn run(&mut self, work: &Work) -> Result<Timeline> {
        let mut timeline = Timeline::begin();
        let request = Request::greedy(work.prompt.clone(), work.generate);
        self.requests += 1;
        self.engine.submit(self.requests, request).map_err(bad_input)?;
        loop {
            match self.engine.step() {
                Step::Idle => bail!("the engine stopped before its request ended"),
                Step::Advanced => {}
                Step::Dispatch(pass) => self.engine.run_pass(pass, &self.store),
            }
            while let Some(event) = self.engine.poll_event() {
                match event {
                    Event::Token { id, .. } => timeline.push(id),
                    Event::Ended { .. } => return Ok(timeline),
                    Event::Failed { reason, .. } => bail!("the engine alone: {reason}"),
                    Event::Prefilled { .. } | Event::Logits { .. } | Event::Routes { .. } => {}
                }
            }
        }
    }
}

async fn run_in_cluster(cluster: &LocalCluster, work: &Work) -> Result<Timeline> {
    let mut timeline = Timeline::begin();
    let request = JobRequest::greedy(Prompt::Tokens(work.prompt.clone()), work.generate as u32);
    let (_, mut events) = cluster.coordinator().submit(request).await?;
    loop {
        let event = events.recv().await.context("the coordinator ended the job without a word")?;
        match event.body {
            JobEventBody::Token { id, .. } => timeline.push(id),
            JobEventBody::Done { .. } => return Ok(timeline),
            JobEventBody::Failed { reason } => bail!("the cluster: {reason}"),
            JobEventBody::Progress { .. }
            | JobEventBody::Text(_)
            | JobEventBody::Logits { .. }
            | JobEventBody::Routes { .. } => {}
        }
    }
}

struct Report {
    phase: Phase,
    model: String,
    workers: usize,
    threads: usize,
    simd: String,
    prompt: usize,
    generate: usize,
    /// From nothing to a cluster that can serve.
    load: Duration,
    /// Tokens per second.
    cluster: Samples,
    alone: Option<Samples>,
    /// Seconds between tokens.
    gaps: Samples,
    alone_gaps: Samples,
}

impl Report {
    fn take(&mut self, ours: &Timeline, theirs: Option<&Timeline>) {
        self.cluster.push(ours.rate(self.phase, self.prompt));
        self.gaps.extend(ours.gaps().map(|gap| gap.as_secs_f64()));
        if let (Some(alone), Some(theirs)) = (&mut self.alone, theirs) {
            alone.push(theirs.rate(self.phase, self.prompt));
            self.alone_gaps.extend(theirs.gaps().map(|gap| gap.as_secs_f64()));
        }
    }

    fn ratio(&self) -> Option<f64> {
        self.alone.as_ref().map(|alone| self.cluster.median() / alone.median())
    }

    /// The ratio that is asked is that of decoding with one worker.
    fn goal(&self) -> Option<Goal> {
        let asked = self.phase == Phase::Decode && self.workers == 1;
        self.ratio().filter(|_| asked).map(|ratio| Goal { ratio, asked: RATIO })
    }

    fn print(&self) {
        println!(
            "{} · {} worker{} x {} thread{} of {} · loaded in {:.2} s",
            self.model,
            self.workers,
            if self.workers == 1 { "" } else { "s" },
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.simd,
            self.load.as_secs_f64(),
        );
        println!(
            "{}: {} tokens of prompt, {} generated · medians of {} runs, ± half the spread\n",
            self.phase.name(),
            self.prompt,
            self.generate,
            self.cluster.len(),
        );
        let row = |name: &str, rates: &Samples, gaps: &Samples| {
            let mut row = vec![name.to_owned(), rates.show(1)];
            if self.phase == Phase::Decode {
                let ms = |share| format!("{:.2}", gaps.percentile(share) * 1e3);
                row.extend([ms(0.5), ms(0.99)]);
            }
            row
        };
        let mut rows = vec![row("cluster", &self.cluster, &self.gaps)];
        if let Some(alone) = &self.alone {
            rows.push(row("engine alone", alone, &self.alone_gaps));
        }
        let heading = match self.phase {
            Phase::Decode => &["", "tokens/s", "p50 ms", "p99 ms"][..],
            Phase::Prefill => &["", "tokens/s"],
        };
        print_table(heading, &rows);
        match (self.goal(), self.ratio()) {
            (Some(goal), _) => println!("\nratio {}", goal.show()),
            (None, Some(ratio)) => println!("\nratio {ratio:.3}"),
            (None, None) => {}
        }
    }

    fn json(&self) -> Value {
        let gaps = |gaps: &Samples| {
            let ms = |share| gaps.percentile(share) * 1e3;
            (self.phase == Phase::Decode).then(|| json!({ "p50_ms": ms(0.5), "p99_ms": ms(0.99) }))
        };
        json!({
            "bench": self.phase.name(),
            "model": self.model,
            "workers": self.workers,
            "threads_per_worker": self.threads,
            "simd": self.simd,
            "prompt_tokens": self.prompt,
            "generated_tokens": self.generate,
            "load_seconds": self.load.as_secs_f64(),
            "cluster_tokens_per_second": self.cluster.json(),
            "cluster_between_tokens": gaps(&self.gaps),
            "engine_tokens_per_second": self.alone.as_ref().map(Samples::json),
            "engine_between_tokens": self.alone.as_ref().and_then(|_| gaps(&self.alone_gaps)),
            "ratio": self.ratio(),
            "asked": self.goal().map(|goal| goal.asked),
        })
    }
}
