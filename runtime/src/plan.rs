//! How fast a model will be, beforehand: sizes and rates in, tokens per second out.
//!
//! What a token waits for is found by sending routing through the machines that decide in earnest, in
//! simulated time: see [`replay`](crate::residency::replay) for how devices and computing overlap. A
//! plan is that of a prompt, then of tokens that are generated:
//!
//! - Workers begin as after a start: memory and local disks hold what has room.
//! - A prompt is computed in chunks on one worker; each chunk demands the experts of all its rows.
//!   The time to the first token is that of the prompt's chunks.
//! - All streams generate together, one row each. The first quarter of the tokens is not counted:
//!   the caches are those of a prompt.
//! - Workers are machines of their own: each has its memory, its disk and its way to the source.
//!
//! Left out: reading keys and values, attention's quadratic part, dense layers' uneven cost, writing
//! to the local disk, verification beyond its latency, two passes in flight at a time (only several
//! streams have those), and what tasks and messages cost (some per cent of a small model's time).

pub mod gpu;

use std::sync::Arc;

use crate::{
    config::MoeConfig,
    residency::{
        policy::{self, Shape},
        replay::{Compute, Device, Place, Replay, ReplayOptions, RowAt, Tally},
    },
    trace::Trace,
};

/// Where experts come from that are neither in memory nor on a cache's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// The checkpoint's folder on a disk.
    Disk,
    /// An object store.
    Archive,
}

/// What a plan is of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What there is of experts in a layer.
    pub moe: Arc<MoeConfig>,
    /// Numbers of the sparse layers.
    pub layers: Vec<u16>,
    /// Bytes that an expert takes in memory, by tier.
    pub expert_bytes: Vec<u64>,
    /// Bytes of what every token is computed with, which each worker has in memory.
    pub dense_bytes: u64,
    /// Workers, of equal machines.
    pub workers: usize,
    /// Bytes of experts that a worker may have in memory.
    pub dram: u64,
    /// A worker's cache on a local disk: bytes, and the disk.
    pub nvme: Option<(u64, Device)>,
    /// Where every expert is.
    pub source: Device,
    /// What that is.
    pub source_kind: SourceKind,
    /// What computing takes.
    pub compute: Compute,
    /// Routing; streams take texts by turns.
    pub traces: Vec<Arc<Trace>>,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a prompt that are computed at once.
    pub chunk: usize,
    /// Sequences that generate at the same time.
    pub streams: usize,
    /// Tokens that each generates.
    pub tokens: usize,
}

/// What bounds a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Computing, which for few rows is reading weights from memory.
    Compute,
    /// Bytes per second of the local disk.
    Disk,
    /// Bytes per second of the archive.
    Archive,
    /// The first byte of a fetch.
    Latency,
    /// Other workers.
    Network,
}

/// Bytes of all workers together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Bytes of all experts.
    pub experts: u64,
    /// Of experts in memory.
    pub dram: u64,
    /// Of experts in caches on local disks, the ones that are in memory, too, included.
    pub nvme: u64,
    /// Of the dense part, in each worker's memory.
    pub dense: u64,
}

/// What is to be expected.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Tokens per second of all streams together.
    pub tokens_per_second: f64,
    /// Seconds to a prompt's first token.
    pub first_token: f64,
    /// Tokens that `decode` is of.
    pub tokens: usize,
    /// Where the time of generating goes.
    pub decode: Tally,
    /// Where the time of the prompt goes.
    pub prefill: Tally,
    /// Where bytes are.
    pub places: Places,
    /// What bounds generating.
    pub bound: Bound,
}

/// What could be bought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purchase {
    /// So many bytes of memory more, on each worker.
    Dram(u64),
    /// A disk of twice the rate and half the latency.
    Disk,
    /// A way to the archive of twice the rate and half the latency.
    Archive,
    /// Memory of twice the bandwidth.
    Memory,
    /// One more machine.
    Worker,
}

/// Gains of less than this are no reason to buy anything.
const GAIN_MIN: f64 = 1.05;

impl Plan {
    /// Bytes of all experts.
    pub fn experts(&self) -> u64 {
        let tiers = self.moe.tiers.iter().zip(&self.expert_bytes).filter(|(tier, _)| !tier.absent);
        let layer: u64 = tiers.map(|(tier, bytes)| u64::from(tier.experts()) * bytes).sum();
        layer * self.layers.len() as u64
    }

    /// Uniform routing for a plan of so many tokens: one text for each of up to eight streams.
    pub fn uniform(
        moe: &MoeConfig,
        layers: usize,
        tokens: usize,
        streams: usize,
    ) -> Result<Vec<Arc<Trace>>, String> {
        let texts = 0..streams.clamp(1, 8) as u64;
        texts.map(|seed| Trace::uniform(layers, moe, tokens, seed).map(Arc::new)).collect()
    }

    /// What is to be expected of it.
    ///
    /// # Panics
    /// If it has no worker, no trace, or a trace without tokens or of another model.
    pub fn predict(&self) -> Prediction {
        let shape = Shape::new(self.layers.len(), &self.moe);
        let place = || Place {
            dram: (self.dram, policy::best(shape, self.dram)),
            nvme: self.nvme.map(|(bytes, disk)| (bytes, policy::best(shape, bytes), disk)),
            source: self.source,
        };
        let mut replay = Replay::new(ReplayOptions {
            moe: self.moe.clone(),
            layers: self.layers.clone(),
            expert_bytes: self.expert_bytes.clone(),
            workers: (0..self.workers).map(|_| place()).collect(),
            compute: self.compute.clone(),
            early: true,
        });
        replay.fill();
        let row = |stream: usize, at: usize| {
            let texts = self.traces.len();
            let trace = &*self.traces[stream % texts];
            // Streams of one text are at different places of it.
            let token = (at + stream / texts * 97) % trace.tokens.len();
            RowAt { stream: stream as u64 + 1, trace, token }
        };
        let prompt: Vec<RowAt<'_>> = (0..self.prompt).map(|at| row(0, at)).collect();
        for chunk in prompt.chunks(self.chunk.max(1)) {
            replay.pass(chunk, chunk.len());
        }
        let prefill = replay.tally().clone();
        let (mut before, warm) = (prefill.clone(), self.tokens / 4);
        let dense_rows = self.streams.div_ceil(self.workers);
        for at in 0..self.tokens {
            if at == warm {
                before = replay.tally().clone();
            }
            let rows: Vec<_> = (0..self.streams).map(|s| row(s, self.prompt + at)).collect();
            replay.pass(&rows, dense_rows);
        }
        let decode = replay.tally() - &before;
        let tokens = (self.tokens - warm) * self.streams;
        Prediction {
            tokens_per_second: tokens as f64 / decode.seconds,
            first_token: prefill.seconds,
            tokens,
            bound: self.bound(&decode),
            decode,
            prefill,
            places: self.places(),
        }
    }

    fn bound(&self, tally: &Tally) -> Bound {
        let (mut disk, mut archive) = (tally.nvme, 0.0);
        match self.source_kind {
            SourceKind::Disk => disk += tally.source,
            SourceKind::Archive => archive += tally.source,
        }
        let all = [
            (tally.dense + tally.experts, Bound::Compute),
            (disk, Bound::Disk),
            (archive, Bound::Archive),
            (tally.latency, Bound::Latency),
            (tally.network, Bound::Network),
        ];
        let most = all.into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
        most.map_or(Bound::Compute, |(_, bound)| bound)
    }

    fn places(&self) -> Places {
        let (experts, workers) = (self.experts(), self.workers as u64);
        let of = |each: u64| each.saturating_mul(workers).min(experts);
        Places {
            experts,
            dram: of(self.dram),
            nvme: of(self.nvme.map_or(0, |(bytes, _)| bytes)),
            dense: self.dense_bytes * workers,
        }
    }

    /// What could be bought next, and what would come of it: parts of the machines there are, the best
    /// first, then one more machine, which has parts of every kind. Only what is worth it.
    pub fn purchases(&self, now: &Prediction) -> Vec<(Purchase, Prediction)> {
        let better =
            |device: Device| Device { latency: device.latency / 2.0, rate: device.rate * 2.0 };
        let mut all: Vec<(Purchase, Self)> = Vec::new();
        let missing = self.experts().div_ceil(self.workers as u64).saturating_sub(self.dram);
        if missing > 0 {
            let more = whole(missing.min(self.dram.max(1)));
            all.push((Purchase::Dram(more), Self { dram: self.dram + more, ..self.clone() }));
        }
        let source = better(self.source);
        match (self.source_kind, self.nvme) {
            (SourceKind::Disk, _) => all.push((Purchase::Disk, Self { source, ..self.clone() })),
            (SourceKind::Archive, nvme) => {
                all.push((Purchase::Archive, Self { source, ..self.clone() }));
                if let Some((bytes, disk)) = nvme {
                    let nvme = Some((bytes, better(disk)));
                    all.push((Purchase::Disk, Self { nvme, ..self.clone() }));
                }
            }
        }
        let mut compute = self.compute.clone();
        let times = std::iter::once(&mut compute.dense).chain(&mut compute.experts);
        times.for_each(|time| time.first = (time.first / 2.0).max(time.each));
        all.push((Purchase::Memory, Self { compute, ..self.clone() }));
        all.push((Purchase::Worker, Self { workers: self.workers + 1, ..self.clone() }));
        let mut all: Vec<_> = all.into_iter().map(|(what, plan)| (what, plan.predict())).collect();
        all.retain(|(_, then)| then.tokens_per_second > now.tokens_per_second * GAIN_MIN);
        let order = |(what, then): &(Purchase, Prediction)| {
            (*what == Purchase::Worker, -then.tokens_per_second)
        };
        all.sort_by(|a, b| {
            let ((a, less), (b, more)) = (order(a), order(b));
            a.cmp(&b).then(less.total_cmp(&more))
        });
        all
    }
}

/// Bytes rounded up to what is sold: whole GiB, or MiB where that is much.
fn whole(bytes: u64) -> u64 {
    bytes.next_multiple_of(if bytes >= 1 << 29 { 1 << 30 } else { 1 << 20 })
}

#[cfg(test)]
mod tests;
