//! What GPUs allow: the limit of a decode step, which is bytes over bandwidth.
//!
//! A step of `B` sequences reads the dense weights once, the keys and values of all sequences, and
//! every expert that one of them is routed to: with uniform routing `E · (1 − (1 − k/E)^B)` of `E`
//! experts, `k` a token. Experts that HBM does not hold are copied from the host, and those that the
//! host does not hold are read there first; copies and reads overlap with computing at best, so the
//! slowest of these bounds the step. With uniform routing a level's hit rate is the share of the experts
//! that it holds.
//!
//! Of several GPUs each has the dense part and its share of experts and of sequences.
//!
//! Left out: the time of computing, of launches, and of rows that travel between GPUs. So this is a limit
//! and not a promise.

use std::sync::Arc;

use crate::config::MoeConfig;

/// Part of a GPU's memory that experts leave to activations: a twelfth, as a worker has it.
const ACTIVATIONS_SHARE: u64 = 12;

/// Equal GPUs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpus {
    /// How many, of all workers together.
    pub count: usize,
    /// Bytes of memory of each.
    pub hbm: u64,
    /// Bytes per second that each reads from it.
    pub rate: f64,
    /// Bytes per second that each gets from the host's pinned memory.
    pub copy: f64,
}

/// A level below HBM: bytes of experts that it holds, and bytes per second that it gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Below {
    /// Bytes of experts of all workers together.
    pub holds: u64,
    /// Bytes per second of all workers together.
    pub rate: f64,
}

/// What a plan for GPUs is of.
#[derive(Debug, Clone)]
pub struct GpuPlan {
    /// The GPUs.
    pub gpus: Gpus,
    /// Bytes of each GPU for experts, if they are not what is left.
    pub experts_hbm: Option<u64>,
    /// Bytes of each GPU for keys and values: taken from it at once.
    pub kv: u64,
    /// What there is of experts in a layer.
    pub moe: Arc<MoeConfig>,
    /// Layers with experts.
    pub layers: usize,
    /// Bytes of an expert, by tier.
    pub expert_bytes: Vec<u64>,
    /// Bytes of weights that every token reads.
    pub dense_bytes: u64,
    /// Bytes of keys and values of a position, in all layers.
    pub position_bytes: u64,
    /// Positions that each sequence has.
    pub context: usize,
    /// The host's memory.
    pub dram: u64,
    /// A local disk's cache.
    pub nvme: Option<Below>,
    /// Bytes per second at which all else is read, of all workers together.
    pub source: f64,
}

/// What bounds a step on GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuBound {
    /// Reading HBM.
    Hbm,
    /// Copying experts from the host.
    Copy,
    /// Reading them from the local disk.
    Disk,
    /// Reading them from the source.
    Source,
}

/// A step of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuStep {
    /// Sequences.
    pub batch: usize,
    /// Bytes of experts that it touches.
    pub experts: f64,
    /// Bytes of keys and values that it reads.
    pub kv: f64,
    /// Bytes that all GPUs read.
    pub read: f64,
    /// Bytes that are copied to them.
    pub copied: f64,
    /// Of these, what the host's memory lacks.
    pub fetched: f64,
    /// Seconds at least.
    pub seconds: f64,
    /// What bounds it.
    pub bound: GpuBound,
}

impl GpuStep {
    /// Tokens per second at most.
    pub fn tokens_per_second(&self) -> f64 {
        self.batch as f64 / self.seconds
    }
}

impl GpuPlan {
    /// Bytes of all experts.
    pub fn experts(&self) -> u64 {
        let tiers = self.moe.tiers.iter().zip(&self.expert_bytes).filter(|(tier, _)| !tier.absent);
        let layer: u64 = tiers.map(|(tier, bytes)| u64::from(tier.experts()) * bytes).sum();
        layer * self.layers as u64
    }

    /// Bytes of experts that a GPU has room for, beside the dense weights, keys and values; nothing
    /// if these do not fit.
    pub fn room(&self) -> Option<u64> {
        let free = self.gpus.hbm.checked_sub(self.dense_bytes + self.kv)?;
        let room = free - free / ACTIVATIONS_SHARE;
        self.experts_hbm.map_or(Some(room), |asked| (asked <= free).then_some(asked))
    }

    /// Bytes of experts in the memory of all GPUs.
    pub fn resident(&self) -> u64 {
        let all = self.room().unwrap_or(0).saturating_mul(self.gpus.count as u64);
        all.min(self.experts())
    }

    /// Bytes of a layer's experts that so many tokens touch, with uniform routing.
    fn touched(&self, batch: usize) -> f64 {
        let here = self.moe.tiers.iter().filter(|tier| !tier.absent).count().max(1);
        let chosen = (self.moe.routing.k_tier as usize).min(here) as f64 / here as f64;
        let tiers = self.moe.tiers.iter().enumerate().filter(|(_, tier)| !tier.absent);
        let bytes = tiers.map(|(index, tier)| {
            let experts = f64::from(tier.experts());
            let missed = 1.0 - chosen * self.moe.routes_of(index) as f64 / experts;
            experts * (1.0 - missed.max(0.0).powf(batch as f64)) * self.expert_bytes[index] as f64
        });
        bytes.sum()
    }

    /// The limit of a step of so many sequences.
    ///
    /// # Panics
    /// If there is no GPU.
    pub fn step(&self, batch: usize) -> GpuStep {
        let Gpus { count, rate, copy, .. } = self.gpus;
        assert!(count > 0, "some GPU");
        let count = count as f64;
        let all = self.experts().max(1) as f64;
        let experts = self.touched(batch) * self.layers as f64;
        let kv = batch as f64 * self.context as f64 * self.position_bytes as f64;
        let read = self.dense_bytes as f64 * count.min(batch as f64) + experts + kv;
        let beyond = |holds: u64| 1.0 - (holds as f64 / all).min(1.0);
        // What is in HBM is below, too, as long as that holds it.
        let in_hbm = self.resident();
        let in_dram = in_hbm.max(self.dram);
        let on_disk = self.nvme.map_or(in_dram, |nvme| in_dram.max(nvme.holds));
        let (copied, fetched) = (experts * beyond(in_hbm), experts * beyond(in_dram));
        let from_source = experts * beyond(on_disk);
        let busiest = (batch as f64 / count).ceil() / batch as f64;
        // The GPU with most sequences.
        let reads = (self.dense_bytes as f64 + experts / count + kv * busiest) / rate;
        let disk = self.nvme.map_or(0.0, |nvme| (fetched - from_source) / nvme.rate);
        let times = [
            (GpuBound::Hbm, reads),
            (GpuBound::Copy, copied / count / copy),
            (GpuBound::Disk, disk),
            (GpuBound::Source, if from_source > 0.0 { from_source / self.source } else { 0.0 }),
        ];
        let slowest = |a: (GpuBound, f64), b: (GpuBound, f64)| if b.1 > a.1 { b } else { a };
        let (bound, seconds) = times.into_iter().fold((GpuBound::Hbm, 0.0), slowest);
        GpuStep { batch, experts, kv, read, copied, fetched, seconds, bound }
    }
}
