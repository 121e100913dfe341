//! `lite-llm bench hbm`: decode by a GPU whose memory holds a part of the experts, routed as a recording
//! says; beside it, the rate at which the bus copies.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lite_llm_actors::node::{NodeDevice, device::gpu_engine};
use lite_llm_kernels::{
    buffer::{AlignedBytes, Buffer},
    cpu::Cpu,
    cuda_device::Gpu,
};
use lite_llm_runtime::{
    backbone::Backbone,
    engine::{Event, Step},
    random::{Purpose, random_u64},
    residency::ResidenceStats,
    routing::{RecordedRouter, RecordedRoutes},
    sequence::Request,
    store::DramStore,
};
use safetensors::SafeTensors;
use serde_json::json;

use super::samples::{Samples, print_table};
use crate::{
    cli::BenchHbmArgs,
    commands::{bad_input, open_model},
    size::Size,
};

/// Bytes of the copies by which the bus is measured.
const COPY_BYTES: usize = 256 << 20;

/// What one run gave.
struct Run {
    rate: f64,
    seconds: f64,
    copied: u64,
    hits: u64,
    misses: u64,
}

pub(super) async fn measure(args: BenchHbmArgs, json: bool) -> Result<()> {
    tokio::task::spawn_blocking(move || run(&args, json)).await?
}

/// The routes of `routes.NAME`, `[layers, tokens, k]` bytes, of a safetensors file.
fn read(file: &Path, name: &str, experts: usize) -> Result<RecordedRoutes> {
    let bytes = fs::read(file).with_context(|| format!("{}: cannot be read", file.display()))?;
    let tensors = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("{}: no safetensors file", file.display()))?;
    let name = format!("routes.{name}");
    let tensor = tensors.tensor(&name).with_context(|| {
        let names: Vec<_> =
            tensors.names().into_iter().filter(|n| n.starts_with("routes.")).collect();
        format!("{}: no {name}; there are {}", file.display(), names.join(", "))
    })?;
    let shape: [usize; 3] = tensor.shape().try_into().ok().with_context(|| {
        format!("{}: {name} is {:?}, not [layers, tokens, k]", file.display(), tensor.shape())
    })?;
    Ok(RecordedRoutes::new(tensor.data(), shape, experts)?)
}

fn run(args: &BenchHbmArgs, json: bool) -> Result<()> {
    let checkpoint = open_model(args.model.as_ref())?;
    let config = args.local.served(&checkpoint)?;
    let moe = config.moe.clone().map(Arc::new).context("this model has no experts")?;
    let routes = Arc::new(read(&args.routes, &args.domain, moe.experts()).map_err(bad_input)?);
    ensure!(
        moe.tiers.len() == 1 && moe.tiers[0].groups == 1 && moe.k_expert(0) as usize == routes.k(),
        "{} routes of a token were recorded; this model's tokens have {} tiers, {} groups and {} routes",
        routes.k(),
        moe.tiers.len(),
        moe.tiers[0].groups,
        moe.k_expert(0),
    );
    let compute = &args.local.compute;
    let cpu = Arc::new(Cpu::new(compute.threads(1), compute.simd()?));
    let hbm = compute.hbm.map(|size| size.0);
    let device = compute.device.open((0, 1), cpu, hbm, compute.math).map_err(bad_input)?;
    let NodeDevice::Cuda { gpu, hbm_bytes, .. } = device else {
        return Err(bad_input(anyhow::anyhow!("bench hbm needs --device cuda:0")));
    };
    let below = DramStore::new(u64::MAX);
    below.load_all(&checkpoint)?;
    let context = args.local.context;
    let mut backbone = Backbone::load_served(&checkpoint, context, gpu.clone(), |_, _| {})?;
    RecordedRouter::install(&mut backbone, &routes, &moe);
    let cache = (compute.kv_bytes(1)?, args.local.kv_dtype);
    let backbone = Arc::new(backbone);
    let (mut engine, store) =
        gpu_engine(&backbone, Arc::new(below), &checkpoint, cache, (hbm_bytes, 1))?;
    let prompt = args.prompt as usize;
    let mut runs = Vec::new();
    // The first fills the GPU's memory and is not counted.
    for run in 0..=u64::from(args.runs) {
        let sequences = u64::from(args.sequences);
        for sequence in run * sequences..(run + 1) * sequences {
            let tokens = sequence * prompt as u64..(sequence + 1) * prompt as u64;
            let token = |at| (random_u64(0, Purpose::Sampling, at) % config.vocab as u64) as u32;
            let request = Request::greedy(tokens.map(token).collect(), args.generate as usize);
            engine.submit(sequence, request).map_err(bad_input)?;
        }
        let mut begun = 0;
        let mut from: Option<(Instant, ResidenceStats)> = None;
        let mut to: Option<(Instant, ResidenceStats)> = None;
        let (mut tokens, mut running) = (0u64, sequences);
        while running > 0 {
            match engine.step() {
                Step::Idle => anyhow::bail!("the engine stopped before its requests ended"),
                Step::Advanced => {}
                Step::Dispatch(pass) => engine.run_pass(pass, &*store),
            }
            while let Some(event) = engine.poll_event() {
                match event {
                    Event::Token { index: 0, .. } => begun += 1,
                    Event::Token { .. } if from.is_some() && to.is_none() => tokens += 1,
                    Event::Ended { .. } => {
                        running -= 1;
                        to.get_or_insert_with(|| (Instant::now(), store.residence()));
                    }
                    Event::Failed { reason, .. } => anyhow::bail!("{reason}"),
                    _ => {}
                }
            }
            // While all of them decode, as in `bench decode`.
            if begun == sequences && from.is_none() {
                from = Some((Instant::now(), store.residence()));
            }
        }
        if let (true, Some((from, before)), Some((to, after))) = (run > 0, from, to) {
            let seconds = to.duration_since(from).as_secs_f64().max(1e-9);
            runs.push(Run {
                rate: tokens as f64 / seconds,
                seconds,
                copied: after.bytes_read - before.bytes_read,
                hits: after.hits - before.hits,
                misses: after.misses - before.misses,
            });
        }
    }
    let bus = bus_rate(&gpu)?;
    let samples = |of: fn(&Run) -> f64| {
        let mut samples = Samples::default();
        samples.extend(runs.iter().map(of));
        samples
    };
    let (rate, copied) = (samples(|r| r.rate), samples(|r| r.copied as f64 / r.seconds));
    let hits = samples(|r| r.hits as f64 / (r.hits + r.misses).max(1) as f64);
    if json {
        say!(
            "{}",
            json!({
                "bench": "hbm",
                "model": checkpoint.location(),
                "device": compute.device.to_string(),
                "hbm_bytes": store.budget(),
                "sequences": args.sequences,
                "tokens_per_second": rate.json(),
                "hit_rate": hits.json(),
                "copied_bytes_per_second": copied.json(),
                "bus_bytes_per_second": bus,
            })
        );
        return Ok(());
    }
    say!(
        "{} · {} of the GPU's memory for experts · {} x {} tokens of prompt, {} generated\n",
        checkpoint.location(),
        Size(store.budget()),
        args.sequences,
        args.prompt,
        args.generate
    );
    let share = copied.median() / bus;
    print_table(
        &["tokens/s", "hits", "copied GB/s", "of the bus"],
        &[vec![
            rate.show(1),
            format!("{:.3}", hits.median()),
            format!("{:.1}", copied.median() / 1e9),
            format!("{share:.2} of {:.1} GB/s", bus / 1e9),
        ]],
    );
    Ok(())
}

/// Bytes per second that the bus copies from locked memory to the GPU.
fn bus_rate(gpu: &Gpu) -> Result<f64> {
    let host = Buffer::from(AlignedBytes::zeroed(COPY_BYTES));
    let cuda = gpu.cuda();
    let locked = cuda.lock(&host)?.context("the driver does not lock the host's memory")?;
    let room = cuda.room(COPY_BYTES)?;
    let mut seconds = Samples::default();
    for _ in 0..5 {
        let from = Instant::now();
        cuda.put_from(&room, &host, Some(&locked))?;
        cuda.wait()?;
        seconds.push(from.elapsed().max(Duration::from_nanos(1)).as_secs_f64());
    }
    Ok(COPY_BYTES as f64 / seconds.median())
}
