//! What a plan says of GPUs: those of this machine, or those that are described.

use std::time::Instant;

use anyhow::{Result, anyhow};
use lite_llm_actors::node::kernel_cache;
use lite_llm_kernels::{
    cuda::{self, Cuda, compile::Folders},
    device::DeviceError,
    kv::{KvShape, PAGE_TOKENS},
};
use lite_llm_runtime::{
    config::ModelConfig,
    plan::{
        Plan,
        gpu::{Below, GpuBound, GpuPlan, GpuStep, Gpus},
    },
};
use serde_json::{Value, json};

use super::show::{rate, share, speed_of, time};
use crate::{
    cli::{GpuName, PlanArgs},
    commands::{bad_input, bench::samples::print_table},
    size::Size,
};

/// Batches for which a limit is said.
const BATCHES: [usize; 3] = [1, 8, 64];
/// Bytes read to measure a GPU's memory, and copied to measure the way there.
const READ_BYTES: u64 = 1 << 30;
const COPY_BYTES: usize = 64 << 20;

/// A plan for GPUs, and where its figures are from.
pub(super) struct GpuReport {
    what: String,
    from: &'static str,
    plan: GpuPlan,
    steps: Vec<GpuStep>,
}

/// What a card gives, as measured for benches/RESULTS.md.
fn known(name: GpuName) -> Gpus {
    let (hbm, rate, copy) = match name {
        GpuName::H100 => (78, 2.985e12, 53e9),
        GpuName::H200 => (139, 4.256e12, 55e9),
    };
    Gpus { count: 1, hbm: hbm << 30, rate, copy }
}

/// What the first GPU of this machine gives; nothing if there is none.
fn found() -> Result<Option<(String, usize, Gpus)>> {
    let Ok((_, gpus)) = cuda::find() else { return Ok(None) };
    let Some(first) = gpus.first() else { return Ok(None) };
    let (rate, copy) = measured(first.free)?;
    let hbm = first.free;
    // Of `cuda:0 (NVIDIA H100 80GB HBM3)` what it is.
    let name = first.name.split_once('(').map_or(&*first.name, |(_, name)| name);
    let name = name.trim_end_matches(')').to_owned();
    Ok(Some((name, gpus.len(), Gpus { count: 1, hbm, rate, copy })))
}

/// Bytes per second that the first GPU reads from its memory, and that it gets from the host's as
/// experts do.
fn measured(free: u64) -> Result<(f64, f64), DeviceError> {
    let cuda = Cuda::open(0, Folders { cache: kernel_cache(), sources: None })?;
    let most = READ_BYTES.min(free / 4);
    let reading = |bytes: u64| -> Result<f64, DeviceError> {
        let (memory, out) = (cuda.filled::<u8>(bytes as usize / 16 * 16, 0)?, cuda.filled(1, 0)?);
        cuda.scramble(&memory, 1)?;
        // The fastest of a few: the first has to load the kernel.
        let times = (0..4).map(|_| cuda.time(|| cuda.read_all(&memory, &out)));
        let fastest = times.collect::<Result<Vec<_>, _>>()?.into_iter().fold(f32::MAX, f32::min);
        Ok(bytes as f64 / f64::from(fastest) * 1e3)
    };
    // Much only where that takes no time.
    let first = reading(most / 64)?;
    let rate = if first > 1e11 { reading(most)? } else { first };
    let values = vec![1u8; COPY_BYTES.min(most as usize)];
    let memory = cuda.filled::<u8>(values.len(), 0)?;
    let mut quickest = f64::INFINITY;
    for _ in 0..4 {
        let begun = Instant::now();
        cuda.write(&memory, 0, &values)?;
        quickest = quickest.min(begun.elapsed().as_secs_f64());
    }
    Ok((rate, values.len() as f64 / quickest))
}

/// A plan for the GPUs that are described, or else for those that are here.
pub(super) fn report(
    args: &PlanArgs,
    config: &ModelConfig,
    plan: &Plan,
) -> Result<Option<GpuReport>> {
    let given = &args.gpu;
    let described = given.gpu_memory.zip(given.hbm_bandwidth).zip(given.copy_bandwidth);
    let (name, each, from, mut gpus) = match (given.gpu, described) {
        (Some(name), _) => (name.to_string(), 1, "known", known(name)),
        (None, Some(((memory, reads), copies))) => {
            let (rate, copy) = (reads.0 as f64, copies.0 as f64);
            ("GPU".to_owned(), 1, "given", Gpus { count: 1, hbm: memory.0, rate, copy })
        }
        (None, None) if given.gpus == Some(0) => return Ok(None),
        (None, None) => match found()? {
            Some((name, each, gpus)) => (name, each, "measured here", gpus),
            None if given.any() => {
                return Err(bad_input(anyhow!(
                    "there is no GPU here to measure: name one (--gpu h100), or give --gpu-memory, \
                     --hbm-bandwidth and --copy-bandwidth"
                )));
            }
            None => return Ok(None),
        },
    };
    let each = given.gpus.map_or(each, usize::from);
    if each == 0 {
        return Ok(None);
    }
    gpus.count = each * plan.workers;
    gpus.hbm = given.gpu_memory.map_or(gpus.hbm, |size| size.0);
    gpus.rate = given.hbm_bandwidth.map_or(gpus.rate, |rate| rate.0 as f64);
    gpus.copy = given.copy_bandwidth.map_or(gpus.copy, |rate| rate.0 as f64);
    let shape = KvShape {
        layers: config.layers.len(),
        kv_heads: config.attention.kv_heads,
        head_dim: config.attention.head_dim,
        dtype: args.kv_dtype,
    };
    let position_bytes = (shape.page_bytes() / PAGE_TOKENS) as u64;
    let (workers, context) = (plan.workers as u64, plan.prompt + plan.tokens);
    let most = BATCHES[BATCHES.len() - 1].div_ceil(gpus.count) * context.next_multiple_of(64);
    let of_all = |rate: f64| rate * plan.workers as f64;
    let plan = GpuPlan {
        gpus,
        experts_hbm: given.hbm.map(|size| size.0),
        kv: most as u64 * position_bytes,
        moe: plan.moe.clone(),
        layers: plan.layers.len(),
        expert_bytes: plan.expert_bytes.clone(),
        dense_bytes: plan.dense_bytes,
        position_bytes,
        context,
        dram: plan.dram.saturating_mul(workers),
        nvme: plan.nvme.map(|(bytes, disk)| Below {
            holds: bytes.saturating_mul(workers),
            rate: of_all(disk.rate),
        }),
        source: of_all(plan.source.rate),
    };
    if plan.room().is_none() {
        return Err(bad_input(anyhow!(
            "a GPU of {} has no room: dense weights take {}, keys and values of {} sequences of {} \
             positions {}{}",
            Size(plan.gpus.hbm),
            Size(plan.dense_bytes),
            BATCHES[BATCHES.len() - 1],
            context,
            Size(plan.kv),
            plan.experts_hbm.map_or(String::new(), |asked| format!(", experts {}", Size(asked)))
        )));
    }
    let steps = BATCHES.map(|batch| plan.step(batch)).to_vec();
    Ok(Some(GpuReport { what: name, from, plan, steps }))
}

fn bound(what: GpuBound) -> &'static str {
    match what {
        GpuBound::Hbm => "reading HBM",
        GpuBound::Copy => "copying experts to HBM",
        GpuBound::Disk => "the disk, for what DRAM lacks",
        GpuBound::Source => "the source, for what DRAM lacks",
    }
}

impl GpuReport {
    pub(super) fn print(&self) {
        let GpuPlan { gpus, .. } = self.plan;
        let (all, here) = (self.plan.experts(), self.plan.resident());
        say!(
            "\nwith {} × {} ({}): {} of memory each, read at {}, filled from the host at {}",
            gpus.count,
            self.what,
            self.from,
            Size(gpus.hbm),
            rate(gpus.rate),
            rate(gpus.copy)
        );
        say!(
            "  in HBM        {} of {} of experts ({}); on each GPU {} of dense weights, and {} of keys \
             and values ({} a position)",
            Size(here),
            Size(all),
            share(here, all),
            Size(self.plan.dense_bytes),
            Size(self.plan.kv),
            Size(self.plan.position_bytes)
        );
        say!(
            "  a decode step reads what it touches once, and is as slow as the slowest of reading and \
             copying: tokens/s at most, uniform routing, context {}\n",
            self.plan.context
        );
        let size = |bytes: f64| Size(bytes as u64).to_string();
        let rows = self.steps.iter().map(|step| {
            vec![
                step.batch.to_string(),
                speed_of(step.tokens_per_second()),
                size(step.experts),
                size(step.read),
                size(step.copied),
                size(step.fetched),
                format!("{}: {}", bound(step.bound), time(step.seconds)),
            ]
        });
        let heading =
            ["batch", "tokens/s", "experts", "read", "copied", "from below DRAM", "bound"];
        print_table(&heading, &rows.collect::<Vec<_>>());
    }

    pub(super) fn json(&self) -> Value {
        let plan = &self.plan;
        let steps = self.steps.iter().map(|step| {
            json!({
                "batch": step.batch,
                "tokens_per_second_at_most": step.tokens_per_second(),
                "expert_bytes": step.experts,
                "kv_bytes": step.kv,
                "read_bytes": step.read,
                "copied_bytes": step.copied,
                "fetched_bytes": step.fetched,
                "bound": format!("{:?}", step.bound).to_lowercase(),
            })
        });
        json!({
            "name": self.what,
            "figures": self.from,
            "gpus": plan.gpus.count,
            "memory_bytes": plan.gpus.hbm,
            "hbm_bytes_per_second": plan.gpus.rate,
            "copy_bytes_per_second": plan.gpus.copy,
            "experts_in_hbm_bytes": plan.resident(),
            "kv_bytes": plan.kv,
            "kv_bytes_per_position": plan.position_bytes,
            "context": plan.context,
            "decode": steps.collect::<Vec<_>>(),
        })
    }
}
