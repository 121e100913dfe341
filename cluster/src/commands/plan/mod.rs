//! `lite-llm plan`: how fast a model will be here, what bounds it, and what to buy next.

mod gpu;
mod measure;
mod show;

use std::{sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use lite_llm_actors::node::DeviceChoice;
use lite_llm_kernels::{cpu::Cpu, math::Math, slots::SLOT_ALIGN};
use lite_llm_runtime::{
    checkpoint::{Checkpoint, inspect::bytes_per_token},
    engine::PASS_TOKENS_MAX,
    plan::{Plan, Prediction, Purchase, SourceKind},
    residency::replay::{Compute, Device, RowTime},
    trace::{self, Trace},
};

use self::{
    gpu::GpuReport,
    measure::{Kernels, Samples},
};
use super::{bad_input, open_model};
use crate::{
    cli::{ComputeArgs, PlanArgs},
    machine,
    size::Size,
};

/// Until the first byte of an object store comes, if only its rate is given.
const ARCHIVE_LATENCY: Duration = Duration::from_millis(30);

/// A plan, what it was made from, and what came of it.
struct Report {
    model: String,
    dtype: &'static str,
    threads: usize,
    routing: String,
    plan: Plan,
    /// Bytes per second that memory gives, as measured and as planned with.
    memory: [f64; 2],
    /// Bytes of an expert of the largest tier, and the time of one row of it and of the rest of a
    /// layer, as measured.
    block: u64,
    kernels: Kernels,
    /// A fetch of one expert alone in seconds, how it was read, and what a disk gives, if one was
    /// measured.
    one: f64,
    how: String,
    disk: Option<f64>,
    measured_in: Duration,
    now: Prediction,
    next: Vec<(Purchase, Prediction)>,
    gpu: Option<GpuReport>,
}

pub(super) async fn plan(args: PlanArgs, json: bool) -> Result<()> {
    let report = tokio::task::spawn_blocking(move || report(&args)).await??;
    match json {
        true => say!("{}", report.json()),
        false => report.print(),
    }
    Ok(())
}

fn report(args: &PlanArgs) -> Result<Report> {
    let checkpoint = open_model(args.model.as_ref())?;
    let config = checkpoint.config();
    let Some(moe) = config.moe.clone().filter(|_| config.sparse_layers().next().is_some()) else {
        return Err(bad_input(anyhow!(
            "{} has no experts: it is computed as fast as memory is read; see `lite-llm bench decode`",
            checkpoint.location()
        )));
    };
    let layers: Vec<u16> = config.sparse_layers().map(|layer| layer as u16).collect();
    let slot = |bytes: &u64| bytes.next_multiple_of(SLOT_ALIGN as u64);
    let expert_bytes: Vec<u64> = checkpoint.tier_expert_bytes().iter().map(slot).collect();
    let block = expert_bytes.iter().copied().max().unwrap_or(0);
    let of_token = |tier: usize| moe.routes_of(tier) * checkpoint.tier_expert_bytes()[tier];
    let active = moe.largest_choice(of_token) * layers.len() as u64;
    let dense_bytes = bytes_per_token(config, checkpoint.dtype()).saturating_sub(active);
    let compute = ComputeArgs {
        threads: args.threads,
        simd: args.simd,
        dram: args.dram,
        nvme: None,
        kv: Some(Size(0)),
        device: DeviceChoice::Cpu,
        hbm: None,
        math: Math::Exact,
    };
    let dram = compute.dram_bytes(1, checkpoint.dense_bytes());
    if dram < block {
        return Err(bad_input(anyhow!(
            "--dram {}: an expert takes {}; give room for some of them",
            Size(dram),
            Size(block)
        )));
    }
    let (tokens, streams) = (args.tokens as usize, usize::from(args.streams));
    let moe = Arc::new(moe);
    let (traces, routing) = match &args.trace {
        None => {
            let length = args.prompt_tokens as usize + tokens;
            let traces = Plan::uniform(&moe, layers.len(), length, streams);
            let traces = traces.map_err(|reason| bad_input(anyhow!(reason)))?;
            (traces, "uniform routing".to_owned())
        }
        Some(path) => {
            let traces = trace::read(path).map_err(bad_input)?;
            traces.iter().try_for_each(|trace| fits(trace, layers.len(), moe.experts()))?;
            let routing = format!("routing of {}", path.display());
            (traces.into_iter().map(Arc::new).collect(), routing)
        }
    };
    let begun = std::time::Instant::now();
    let device = compute.cpu(1)?;
    let found = rates(args, &checkpoint, &device, block, dense_bytes)?;
    let measured_in = begun.elapsed();
    let plan = Plan {
        moe,
        layers,
        expert_bytes,
        dense_bytes,
        workers: args.workers.into(),
        dram,
        nvme: found.nvme,
        source: found.source,
        source_kind: found.kind,
        compute: Compute {
            dense: found.dense,
            experts: found.experts,
            together: None,
            network: args.network_latency.0.as_secs_f64(),
        },
        traces,
        prompt: args.prompt_tokens as usize,
        chunk: PASS_TOKENS_MAX,
        streams,
        tokens,
    };
    let now = plan.predict();
    Ok(Report {
        model: checkpoint.location(),
        dtype: checkpoint.dtype().name(),
        threads: device.pool().threads(),
        routing,
        next: plan.purchases(&now),
        now,
        gpu: gpu::report(args, config, &plan)?,
        plan,
        memory: found.memory,
        block,
        kernels: found.kernels,
        one: found.one,
        how: found.how,
        disk: found.disk,
        measured_in,
    })
}

/// A trace is of this model, as far as can be seen.
fn fits(trace: &Trace, layers: usize, experts: usize) -> Result<()> {
    // A text may leave some experts out.
    match trace.layers() == layers && trace.experts <= experts {
        true => Ok(()),
        false => Err(bad_input(anyhow!(
            "--trace: {} is of {} layers of {} experts, the model has {layers} of {experts}; record \
             one with `lite-llm eval --trace` and this model",
            trace.name,
            trace.layers(),
            trace.experts
        ))),
    }
}

/// What was measured or given.
struct Rates {
    memory: [f64; 2],
    kernels: Kernels,
    dense: RowTime,
    experts: Vec<RowTime>,
    one: f64,
    how: String,
    disk: Option<f64>,
    nvme: Option<(u64, Device)>,
    source: Device,
    kind: SourceKind,
}

fn rates(
    args: &PlanArgs,
    checkpoint: &Arc<Checkpoint>,
    cpu: &Arc<Cpu>,
    block: u64,
    dense_bytes: u64,
) -> Result<Rates> {
    let Some(moe) = &checkpoint.config().moe else { return Err(anyhow!("there are no experts")) };
    let far = checkpoint.location().contains("://");
    let measured = measure::memory(cpu);
    let memory = args.memory_bandwidth.map_or(measured, |rate| rate.0 as f64);
    let samples = Samples::fetch(checkpoint, moe)?;
    let kernels = measure::kernels(checkpoint, cpu, &samples, dense_bytes, far)?;
    // Few rows are as fast as memory; many are not.
    let scaled = |time: &RowTime| RowTime {
        first: (time.first * measured / memory).max(time.each),
        each: time.each,
    };
    let given = args.disk_bandwidth.map(|rate| rate.0 as f64);
    let local = match given {
        Some(_) => None,
        None => measure::disk(checkpoint, block)?,
    };
    let latency = args.archive_latency.map(|time| time.0.as_secs_f64());
    let archive = args.archive_bandwidth.map(|rate| Device {
        latency: latency.unwrap_or(ARCHIVE_LATENCY.as_secs_f64()),
        rate: rate.0 as f64,
    });
    let (source, kind) = match archive {
        Some(archive) => (archive, SourceKind::Archive),
        None => {
            let rate = given.filter(|_| !far).or(local).unwrap_or(samples.rate);
            let device = measure::device(&samples, block, rate);
            let kind = if far { SourceKind::Archive } else { SourceKind::Disk };
            (Device { latency: latency.filter(|_| far).unwrap_or(device.latency), ..device }, kind)
        }
    };
    let nvme = match &args.nvme {
        None => None,
        Some(nvme) => {
            let rate = match given {
                Some(rate) => rate,
                None => measure::folder(&nvme.folder, block)?,
            };
            // Of a store, a fetch alone says nothing about a disk.
            let disk = match far {
                true => Device { latency: 0.0, rate },
                false => measure::device(&samples, block, rate),
            };
            Some((nvme.budget.0, disk))
        }
    };
    let disk = nvme.map(|(_, disk)| disk.rate).or(local);
    let (dense, experts) = (scaled(&kernels.dense), kernels.experts.iter().map(scaled).collect());
    let (one, how) = (samples.one, samples.how.clone());
    let memory = [measured, memory];
    Ok(Rates { memory, kernels, dense, experts, one, how, disk, nvme, source, kind })
}

/// Warns of a plan that this machine has no memory for.
fn room(plan: &Plan) -> Option<(u64, u64)> {
    let needed = plan.dram.min(plan.experts()) + plan.dense_bytes;
    let total = machine::total_memory()?;
    (needed > total).then_some((needed, total))
}
