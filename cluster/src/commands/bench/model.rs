//! `lite-llm bench decode` and `bench prefill`: a cluster in this process beside the same engine
//! called without actors or network.
//!
//! Both have the same weights, threads and prompt, and take turns; both must say the same tokens,
//! or the measurement is void. Decode counts the tokens after the first, prefill the prompt's up
//! to the first; several requests count together, from the first one's beginning to the last
//! one's end.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lite_llm_actors::node::{NodeDevice, check_math, device::gpu_engine};
use lite_llm_kernels::{
    cpu::Cpu, cuda_device::Gpu, device::Device, kv::KvDType, measure::read_bandwidth,
};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::{Checkpoint, inspect::bytes_per_token},
    engine::{Engine, Event, Step},
    expert::ExpertStore,
    random::{Purpose, random_u64},
    sequence::Request,
    store::DramStore,
};
use lite_llm_transport::messages::{JobEventBody, JobRequest, Prompt};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{
    processes::Cluster,
    profile::{Profile, profile},
    samples::{Goal, Samples, print_table},
};
use crate::{
    cli::BenchModelArgs,
    commands::{bad_input, open_model},
    progress::{Progress, Unit},
    size::Size,
};

/// What is asked of a cluster of one worker against the engine alone, in tokens per second.
const RATIO: f64 = 0.95;
/// What is asked of two requests, each at home on a worker process of one thread, against both in
/// one engine of two threads.
const DECODE_APART: f64 = 0.85;
const PREFILL_APART: f64 = 0.9;

/// Bytes that are read to see how fast memory is between two runs: more than caches hold.
const READ_BYTES: usize = 256 << 20;

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
#[derive(Clone)]
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

    /// Times between tokens.
    fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.tokens.windows(2).map(|pair| pair[1].1.duration_since(pair[0].1))
    }
}

/// Tokens per second of a phase of requests that ran together.
fn rate(timelines: &[Timeline], phase: Phase, prompt: usize) -> f64 {
    let firsts = timelines.iter().filter_map(|t| t.tokens.first().map(|(_, at)| *at));
    let lasts = timelines.iter().filter_map(|t| t.tokens.last().map(|(_, at)| *at));
    let (count, from, to) = match phase {
        Phase::Decode => {
            let count = timelines.iter().map(|t| t.tokens.len().saturating_sub(1)).sum();
            (count, firsts.min(), lasts.max())
        }
        Phase::Prefill => {
            (prompt * timelines.len(), timelines.iter().map(|t| t.submitted).min(), firsts.max())
        }
    };
    let (Some(from), Some(to)) = (from, to) else { return 0.0 };
    count as f64 / to.duration_since(from).as_secs_f64().max(1e-9)
}

pub(super) async fn measure(phase: Phase, args: BenchModelArgs, json: bool) -> Result<()> {
    let checkpoint = open_model(args.model.as_ref())?;
    let work = |run| work(phase, &args, &checkpoint, run).map(Arc::new);
    let first = work(0)?;
    let alone = match args.cluster_only {
        true => None,
        false => Some(Alone::load(checkpoint.clone(), &args).await?),
    };
    let loading = Instant::now();
    let cluster = Cluster::start(checkpoint.clone(), &args).await?;
    let mut report = Report {
        phase,
        model: checkpoint.location(),
        workers: args.local.workers.into(),
        threads: args.local.compute.threads(args.local.workers.into()),
        simd: args.local.compute.simd()?.to_string(),
        processes: args.processes,
        prompt: first.prompt(),
        sequences: first.prompts.len(),
        generate: first.generate,
        load: loading.elapsed(),
        cluster: Samples::default(),
        alone: alone.is_some().then(Samples::default),
        gaps: Samples::default(),
        alone_gaps: Samples::default(),
        bytes_per_token: bytes_per_token(checkpoint.config(), checkpoint.dtype()),
        read: Samples::default(),
        profile: None,
    };
    let reader =
        report.reads_weights().then(|| Arc::new(Cpu::best(report.threads * report.workers)));
    let mut progress =
        Progress::new(&format!("bench {}", phase.name()), Unit::Things("runs"), json);
    let runs = u64::from(args.runs);
    let result = async {
        // The first of each warms up and is not counted.
        for run in 0..=runs {
            progress.update(run, runs + 1, "");
            let work = work(run)?;
            let ours = run_in_cluster(&cluster, &work).await?;
            let theirs = match &alone {
                None => None,
                Some(alone) => Some(alone.run(&work).await?),
            };
            if let Some(theirs) = &theirs {
                ensure!(
                    ours.iter().map(Timeline::ids).eq(theirs.iter().map(Timeline::ids)),
                    "the cluster and the engine alone generated different tokens: \
                     what was measured is not the same work"
                );
            }
            if run > 0 {
                report.take(&ours, theirs.as_deref());
                if let Some(reader) = reader.clone() {
                    let read = move || read_bandwidth(&reader, READ_BYTES);
                    report.read.push(tokio::task::spawn_blocking(read).await?);
                }
            }
        }
        if let (true, Some(alone)) = (args.profile, &alone) {
            report.profile = Some(alone.profile(&work(runs + 1)?).await?);
        }
        Ok(())
    }
    .await;
    progress.finish();
    cluster.stop().await;
    result.map(|()| match json {
        true => say!("{}", report.json()),
        false => report.print(),
    })
}

/// The requests that are repeated.
struct Work {
    /// All of one length.
    prompts: Vec<Vec<u32>>,
    generate: usize,
}

impl Work {
    /// Tokens of each prompt.
    fn prompt(&self) -> usize {
        self.prompts.first().map_or(0, Vec::len)
    }
}

/// Each run has prompts of its own: what is cached of another's would not be computed.
fn work(phase: Phase, args: &BenchModelArgs, checkpoint: &Checkpoint, run: u64) -> Result<Work> {
    let config = args.local.served(checkpoint)?;
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
    let sequences = u64::from(args.sequences);
    let prompts = (run * sequences..(run + 1) * sequences)
        .map(|s| (s * prompt as u64..(s + 1) * prompt as u64).map(token).collect())
        .collect();
    Ok(Work { prompts, generate })
}

/// What the engine alone is to do, and where its answer goes.
type Order = (Arc<Work>, bool, oneshot::Sender<Result<Answer>>);
/// When the tokens of each request came, and where the time went if that was asked for.
type Answer = (Vec<Timeline>, Option<Profile>);

/// The engine without actors or network, on a thread of its own, as a node's lane is.
struct Alone {
    orders: mpsc::Sender<Order>,
}

impl Alone {
    async fn load(checkpoint: Arc<Checkpoint>, args: &BenchModelArgs) -> Result<Self> {
        let (compute, kv_dtype) = (args.local.compute.clone(), args.local.kv_dtype);
        let context = args.local.context;
        let workers = usize::from(args.local.workers);
        // As many threads as all workers together.
        let cpu = Arc::new(Cpu::new(compute.threads(workers) * workers, compute.simd()?));
        let hbm = compute.hbm.map(|size| size.0);
        check_math(compute.math, &checkpoint).map_err(bad_input)?;
        let device = compute.device.open((0, 1), cpu, hbm, compute.math).map_err(bad_input)?;
        let (orders, inbox) = mpsc::channel::<Order>();
        let (loaded, ready) = oneshot::channel();
        let kv_bytes = compute.kv_bytes(1)?;
        let cache = (kv_bytes, kv_dtype);
        let load = move || -> Result<Box<dyn RunAlone>> {
            match device {
                NodeDevice::Cpu(cpu) => {
                    let store = DramStore::new(u64::MAX);
                    store.load_all(&checkpoint)?;
                    let backbone = Backbone::load_served(&checkpoint, context, cpu, |_, _| {})?;
                    let engine = Engine::with_cache(Arc::new(backbone), kv_bytes, kv_dtype)?;
                    Ok(Box::new(AloneEngine { engine, store: Arc::new(store), requests: 0 }))
                }
                NodeDevice::Cuda { gpu, hbm_bytes, .. } => {
                    let alone = gpu_alone(&checkpoint, context, gpu, hbm_bytes, cache)?;
                    Ok(Box::new(alone))
                }
            }
        };
        let life = move || match load() {
            Err(error) => drop(loaded.send(Err(error))),
            Ok(mut engine) => {
                // The asking side may have been interrupted, here and below.
                drop(loaded.send(Ok(())));
                for (work, profiled, done) in inbox {
                    let answer = match profiled {
                        false => engine.run(&work).map(|timelines| (timelines, None)),
                        true => {
                            let (timelines, profile) = profile(|| engine.run(&work));
                            timelines.map(|timelines| (timelines, Some(profile)))
                        }
                    };
                    drop(done.send(answer));
                }
            }
        };
        std::thread::Builder::new().name("lite-llm-alone".into()).spawn(life)?;
        ready.await.context("the engine's thread ended while it loaded")??;
        Ok(Self { orders })
    }

    async fn run(&self, work: &Arc<Work>) -> Result<Vec<Timeline>> {
        Ok(self.order(work, false).await?.0)
    }

    async fn profile(&self, work: &Arc<Work>) -> Result<Profile> {
        Ok(self.order(work, true).await?.1.unwrap_or_default())
    }

    async fn order(&self, work: &Arc<Work>, profiled: bool) -> Result<Answer> {
        let (done, answer) = oneshot::channel();
        // An engine that is gone drops the order, which the next line tells.
        let _ = self.orders.send((work.clone(), profiled, done));
        answer.await.context("the engine's thread ended")?
    }
}

/// What [`Alone`]'s thread owns.
struct AloneEngine<D: Device> {
    engine: Engine<D>,
    store: Arc<dyn ExpertStore<D::Matrix>>,
    requests: u64,
}

/// An engine, whatever it computes with.
trait RunAlone {
    /// [`Engine::run_local`], with a look at the clock at every token.
    fn run(&mut self, work: &Work) -> Result<Vec<Timeline>>;
}

/// An engine on a GPU, with what holds its experts.
fn gpu_alone(
    checkpoint: &Checkpoint,
    context: Option<usize>,
    gpu: Arc<Gpu>,
    hbm_bytes: Option<u64>,
    cache: (u64, KvDType),
) -> Result<AloneEngine<Gpu>> {
    let below = DramStore::new(u64::MAX);
    below.load_all(checkpoint)?;
    let backbone = Backbone::load_served(checkpoint, context, gpu, |_, _| {})?;
    let backbone = Arc::new(backbone);
    let below = Arc::new(below);
    let (engine, store) = gpu_engine(&backbone, below, checkpoint, cache, (hbm_bytes, 1))?;
    Ok(AloneEngine { engine, store, requests: 0 })
}

impl<D: Device> RunAlone for AloneEngine<D> {
    fn run(&mut self, work: &Work) -> Result<Vec<Timeline>> {
        let mut timelines = vec![Timeline::begin(); work.prompts.len()];
        let first = self.requests;
        for prompt in &work.prompts {
            let request = Request::greedy(prompt.clone(), work.generate);
            self.engine.submit(self.requests, request).map_err(bad_input)?;
            self.requests += 1;
        }
        let mut running = timelines.len();
        while running > 0 {
            match self.engine.step() {
                Step::Idle => bail!("the engine stopped before its requests ended"),
                Step::Advanced => {}
                Step::Dispatch(pass) => self.engine.run_pass(pass, &*self.store),
            }
            while let Some(event) = self.engine.poll_event() {
                match event {
                    Event::Token { id, sequence, .. } => {
                        timelines[(sequence - first) as usize].push(id);
                    }
                    Event::Ended { .. } => running -= 1,
                    Event::Failed { reason, .. } => bail!("the engine alone: {reason}"),
                    Event::Prefilled { .. } | Event::Logits { .. } | Event::Routes { .. } => {}
                }
            }
        }
        Ok(timelines)
    }
}

async fn run_in_cluster(cluster: &Cluster, work: &Work) -> Result<Vec<Timeline>> {
    let requests = work.prompts.iter().map(|prompt| request_of_cluster(cluster, prompt, work));
    futures::future::try_join_all(requests).await
}

async fn request_of_cluster(cluster: &Cluster, prompt: &[u32], work: &Work) -> Result<Timeline> {
    let mut timeline = Timeline::begin();
    let request = JobRequest::greedy(Prompt::Tokens(prompt.to_vec()), work.generate as u32);
    let (_, mut events) = cluster.coordinator().submit(request).await?;
    loop {
        let event = events.recv().await.context("the coordinator ended the job without a word")?;
        match event.body {
            JobEventBody::Token { id, .. } => timeline.push(id),
            JobEventBody::Done { .. } => return Ok(timeline),
            JobEventBody::Failed { reason } | JobEventBody::NotTaken { reason } => {
                bail!("the cluster: {reason}")
            }
            JobEventBody::Progress { .. }
            | JobEventBody::Text(_)
            | JobEventBody::Logits { .. }
            | JobEventBody::Routes { .. }
            | JobEventBody::Scored(_) => {}
        }
    }
}

struct Report {
    phase: Phase,
    model: String,
    workers: usize,
    threads: usize,
    simd: String,
    processes: bool,
    prompt: usize,
    sequences: usize,
    generate: usize,
    /// From nothing to a cluster that can serve.
    load: Duration,
    /// Tokens per second.
    cluster: Samples,
    alone: Option<Samples>,
    /// Seconds between tokens.
    gaps: Samples,
    alone_gaps: Samples,
    bytes_per_token: u64,
    /// Bytes per second that memory gave between the runs.
    read: Samples,
    profile: Option<Profile>,
}

impl Report {
    fn take(&mut self, ours: &[Timeline], theirs: Option<&[Timeline]>) {
        let gaps = |timelines: &[Timeline]| -> Vec<f64> {
            timelines.iter().flat_map(|t| t.gaps().map(|gap| gap.as_secs_f64())).collect()
        };
        self.cluster.push(rate(ours, self.phase, self.prompt));
        self.gaps.extend(gaps(ours));
        if let (Some(alone), Some(theirs)) = (&mut self.alone, theirs) {
            alone.push(rate(theirs, self.phase, self.prompt));
            self.alone_gaps.extend(gaps(theirs));
        }
    }

    fn ratio(&self) -> Option<f64> {
        self.alone.as_ref().map(|alone| self.cluster.median() / alone.median())
    }

    /// Whether a token's time is that of reading its weights: several requests share some.
    fn reads_weights(&self) -> bool {
        self.phase == Phase::Decode && self.sequences == 1
    }

    /// Bytes per second of weights that the cluster's tokens take, and the engine's alone.
    fn weights_read(&self) -> [Option<f64>; 2] {
        let rate = |samples: &Samples| samples.median() * self.bytes_per_token as f64;
        let cluster = self.reads_weights().then(|| rate(&self.cluster));
        [cluster, cluster.and(self.alone.as_ref().map(rate))]
    }

    /// Asked are decoding one request with one worker, and a request at home on each of several
    /// worker processes.
    fn goal(&self) -> Option<Goal> {
        let apart = self.processes && self.threads == 1;
        let asked = match (self.phase, self.workers, self.sequences) {
            (Phase::Decode, 1, 1) => RATIO,
            (Phase::Decode, 2, 2) if apart => DECODE_APART,
            (Phase::Prefill, 2, 2) if apart => PREFILL_APART,
            _ => return None,
        };
        self.ratio().map(|ratio| Goal { ratio, asked })
    }

    fn print(&self) {
        say!(
            "{} · {} worker{}{} x {} thread{} of {} · loaded in {:.2} s",
            self.model,
            self.workers,
            if self.processes { " process" } else { "" },
            match (self.workers, self.processes) {
                (1, _) => "",
                (_, false) => "s",
                (_, true) => "es",
            },
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.simd,
            self.load.as_secs_f64(),
        );
        say!(
            "{}: {} x {} tokens of prompt, {} generated · medians of {} runs, ± half the spread\n",
            self.phase.name(),
            self.sequences,
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
            (Some(goal), _) => say!("\nratio {}", goal.show()),
            (None, Some(ratio)) => say!("\nratio {ratio:.3}"),
            (None, None) => {}
        }
        if let ([Some(cluster), alone], memory @ 1.0..) = (self.weights_read(), self.read.median())
        {
            say!(
                "reads {} of weights per token: {:.1} GB/s, {:.2} of the {:.1} GB/s that memory \
                 gave between the runs{}",
                Size(self.bytes_per_token),
                cluster / 1e9,
                cluster / memory,
                memory / 1e9,
                alone.map_or(String::new(), |alone| format!("; alone {:.2}", alone / memory)),
            );
        }
        if let Some(profile) = &self.profile {
            let tokens = match self.phase {
                Phase::Decode => self.prompt + self.generate,
                Phase::Prefill => self.prompt,
            };
            profile.print(tokens * self.sequences);
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
            "processes": self.processes,
            "sequences": self.sequences,
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
            "bytes_per_token": self.bytes_per_token,
            "weights_bytes_per_second": self.weights_read()[0],
            "memory_bytes_per_second": self.reads_weights().then(|| self.read.json()),
            "asked": self.goal().map(|goal| goal.asked),
            "profile": self.profile.as_ref().map(Profile::json),
        })
    }
}
