//! Recorded or random routing through [`Residency`] itself, with devices that take time: a
//! discrete-event simulation, in seconds of its own.
//!
//! A pass goes through its sparse layers one after the other. In each:
//!
//! 1. the dense part is computed; what was predicted for this layer arrives meanwhile;
//! 2. the layer's experts are demanded, each by the worker that owns it, and the next layer's are
//!    predicted;
//! 3. each worker computes what it has, then what has arrived by then, and so on, and waits only when
//!    nothing is left to be computed;
//! 4. the slowest worker ends the layer; several workers take a round trip of the network as well.
//!
//! So a layer takes max(fetches, computing) and what cannot overlap: the dense part, the first
//! missing expert's latency, the last one's computing.
//!
//! A device transfers one expert after the other, demanded before predicted ones, and breaks none
//! off. A transfer begins `latency` after it was asked for at the earliest: latencies overlap with
//! each other and with transfers.
//!
//! Invariants: every second of the simulation is counted once in [`Tally`]; equal inputs give equal
//! results.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::{AddAssign, Sub},
    sync::Arc,
};

use super::{
    machine::{Command, Counters, Event, Residency, ResidencyOptions, RoutedRow, Urgency},
    policy::Policy,
};
use crate::{config::MoeConfig, expert::ExpertKey, trace::Trace};

/// Rows of a pass for which the next experts are predicted, at most; as the engine has it.
const PREDICTED_ROWS_MAX: usize = 16;

/// Brings experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    /// Seconds from a request to its first byte.
    pub latency: f64,
    /// Bytes per second of all requests together; infinite where that takes no time.
    pub rate: f64,
}

impl Device {
    /// One that takes no time.
    pub const INSTANT: Self = Self { latency: 0.0, rate: f64::INFINITY };
}

/// Seconds for a number of rows: reading the weights bounds few, multiplying many.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowTime {
    /// Of one row; no number of rows takes less.
    pub first: f64,
    /// Of each of many rows.
    pub each: f64,
}

impl RowTime {
    /// Seconds of so many rows.
    pub fn of(&self, rows: usize) -> f64 {
        if rows == 0 { 0.0 } else { self.first.max(self.each * rows as f64) }
    }
}

/// What computing takes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Compute {
    /// The part of a sparse layer before its experts are known: attention, norms, gates, and the
    /// layer's share of whatever is no sparse layer.
    pub dense: RowTime,
    /// An expert, by tier.
    pub experts: Vec<RowTime>,
    /// If set, a layer's experts are computed in so many seconds together, and not before all of
    /// them are here.
    pub together: Option<f64>,
    /// Seconds that a layer takes to send rows to other workers and to have their outputs.
    pub network: f64,
}

/// A worker's memory and what it is filled from.
#[derive(Debug)]
pub struct Place {
    /// Bytes of experts in its memory, and who is let go.
    pub dram: (u64, Box<dyn Policy>),
    /// A cache on a local disk: bytes, who is let go, and the disk.
    pub nvme: Option<(u64, Box<dyn Policy>, Device)>,
    /// Has every expert.
    pub source: Device,
}

/// A row of a pass: a token of a text.
#[derive(Debug, Clone, Copy)]
pub struct RowAt<'a> {
    /// The sequence.
    pub stream: u64,
    /// The text.
    pub trace: &'a Trace,
    /// Which token of it.
    pub token: usize,
}

/// What has happened so far. Seconds are of the simulation, and add up to `seconds`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// Seconds in all.
    pub seconds: f64,
    /// Of them: computing what is dense.
    pub dense: f64,
    /// Computing experts.
    pub experts: f64,
    /// Waiting while the local disk's cache transfers.
    pub nvme: f64,
    /// Waiting while the source transfers.
    pub source: f64,
    /// Waiting for the first byte of either.
    pub latency: f64,
    /// Waiting for other workers.
    pub network: f64,
    /// By sparse layer: experts that were demanded, and those of them that were in memory.
    pub demands: Vec<u64>,
    /// See `demands`.
    pub hits: Vec<u64>,
    /// Bytes of the experts that were demanded.
    pub demanded_bytes: u64,
    /// Bytes that the local disk's cache has brought.
    pub nvme_bytes: u64,
    /// Bytes that the source has brought.
    pub source_bytes: u64,
}

impl Tally {
    /// Part of the demanded experts that were in memory.
    pub fn hit_rate(&self) -> f64 {
        self.hits.iter().sum::<u64>() as f64 / self.demands.iter().sum::<u64>().max(1) as f64
    }
}

/// What has happened since an earlier one.
impl Sub<&Tally> for &Tally {
    type Output = Tally;

    fn sub(self, earlier: &Tally) -> Tally {
        let each = |now: &[u64], then: &[u64]| now.iter().zip(then).map(|(a, b)| a - b).collect();
        Tally {
            seconds: self.seconds - earlier.seconds,
            dense: self.dense - earlier.dense,
            experts: self.experts - earlier.experts,
            nvme: self.nvme - earlier.nvme,
            source: self.source - earlier.source,
            latency: self.latency - earlier.latency,
            network: self.network - earlier.network,
            demands: each(&self.demands, &earlier.demands),
            hits: each(&self.hits, &earlier.hits),
            demanded_bytes: self.demanded_bytes - earlier.demanded_bytes,
            nvme_bytes: self.nvme_bytes - earlier.nvme_bytes,
            source_bytes: self.source_bytes - earlier.source_bytes,
        }
    }
}

/// What a simulation is of.
#[derive(Debug)]
pub struct ReplayOptions {
    /// What there is of experts in a layer.
    pub moe: Arc<MoeConfig>,
    /// Numbers of the sparse layers, in the order of the traces'.
    pub layers: Vec<u16>,
    /// Bytes of an expert, by tier.
    pub expert_bytes: Vec<u64>,
    /// The workers. Experts are spread evenly over them.
    pub workers: Vec<Place>,
    /// What computing takes.
    pub compute: Compute,
    /// Whether predictions are followed.
    pub early: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Replay {
    moe: Arc<MoeConfig>,
    layers: Vec<u16>,
    compute: Compute,
    early: bool,
    workers: Vec<Worker>,
    tally: Tally,
}

/// Where a fetch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    Nvme,
    Source,
}

#[derive(Debug)]
struct Worker {
    level: Residency,
    nvme: Option<Residency>,
    queues: [Queue; 2],
    now: f64,
    /// Demanded, here, and not computed with yet.
    ready: Vec<ExpertKey>,
    /// Demanded and not here.
    missing: usize,
    /// Of what ended its current layer: seconds of the tally.
    spent: Spent,
    /// Bytes that each device has brought.
    bytes: [u64; 2],
}

#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    experts: f64,
    /// By device.
    waited: [f64; 2],
    latency: f64,
}

impl AddAssign<Spent> for Tally {
    fn add_assign(&mut self, spent: Spent) {
        self.experts += spent.experts;
        self.nvme += spent.waited[0];
        self.source += spent.waited[1];
        self.latency += spent.latency;
    }
}

/// The requests to a device.
#[derive(Debug)]
struct Queue {
    device: Device,
    /// With when they were asked for.
    demanded: VecDeque<(ExpertKey, f64)>,
    predicted: VecDeque<(ExpertKey, f64)>,
    /// What it transfers, and when that ends.
    moving: Option<(ExpertKey, f64)>,
    /// When the last transfer ended.
    free: f64,
}

impl Queue {
    fn new(device: Device) -> Self {
        let (demanded, predicted) = (VecDeque::new(), VecDeque::new());
        Self { device, demanded, predicted, moving: None, free: 0.0 }
    }

    fn begin(&mut self, bytes: impl Fn(ExpertKey) -> u64) {
        if self.moving.is_none() {
            let next = self.demanded.pop_front().or_else(|| self.predicted.pop_front());
            self.moving = next.map(|(key, asked)| {
                let from = self.free.max(asked + self.device.latency);
                (key, from + bytes(key) as f64 / self.device.rate)
            });
        }
    }

    fn take_predicted(&mut self, key: ExpertKey) -> Option<(ExpertKey, f64)> {
        let at = self.predicted.iter().position(|(other, _)| *other == key)?;
        self.predicted.remove(at)
    }
}

impl Replay {
    /// One that has not begun: nothing is in memory.
    pub fn new(options: ReplayOptions) -> Self {
        let ReplayOptions { moe, layers, expert_bytes, workers, compute, early } = options;
        let count = workers.len();
        let own = |worker: usize| -> BTreeSet<ExpertKey> {
            let tiers = &moe.tiers;
            let keys = layers.iter().flat_map(|&layer| {
                (0..moe.experts()).filter_map({
                    let moe = &moe;
                    move |flat| ExpertKey::from_flat(moe, layer.into(), flat)
                })
            });
            let here = keys.filter(|key| !tiers[usize::from(key.tier)].absent);
            here.filter(|&key| owner(&moe, count, key) == worker).collect()
        };
        let level = |budget, policy, prefetch, own: &BTreeSet<ExpertKey>| {
            let (moe, expert_bytes) = (moe.clone(), expert_bytes.clone());
            let options = ResidencyOptions { moe, budget, expert_bytes, policy, prefetch };
            let mut level = Residency::new(options);
            level.handle(Event::Keep(own.clone()));
            level
        };
        let workers = workers.into_iter().enumerate().map(|(number, place)| {
            let own = own(number);
            let (budget, policy) = place.dram;
            let memory = level(budget, policy, early, &own);
            let (nvme, disk) = match place.nvme {
                Some((budget, policy, disk)) => (Some(level(budget, policy, false, &own)), disk),
                None => (None, Device::INSTANT),
            };
            Worker {
                level: memory,
                nvme,
                queues: [Queue::new(disk), Queue::new(place.source)],
                now: 0.0,
                ready: Vec::new(),
                missing: 0,
                spent: Spent::default(),
                bytes: [0; 2],
            }
        });
        let none = vec![0; layers.len()];
        let tally = Tally { demands: none.clone(), hits: none, ..Tally::default() };
        Self { workers: workers.collect(), tally, moe, layers, compute, early }
    }

    /// Fills memory and local disks with what has room, in no time, as a worker that starts does.
    pub fn fill(&mut self) {
        for worker in &mut self.workers {
            for layer in &self.layers {
                for flat in 0..self.moe.experts() {
                    let Some(key) = ExpertKey::from_flat(&self.moe, (*layer).into(), flat) else {
                        continue;
                    };
                    let levels = [Some(&mut worker.level), worker.nvme.as_mut()];
                    levels.into_iter().flatten().for_each(|level| load(level, key));
                }
            }
        }
    }

    /// What has happened so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// What the memory of all workers has done so far.
    pub fn counters(&self) -> Counters {
        let all = self.workers.iter().map(|worker| worker.level.counters());
        all.fold(Counters::default(), |a, b| Counters {
            hits: a.hits + b.hits,
            misses: a.misses + b.misses,
            fetches: a.fetches + b.fetches,
            prefetches: a.prefetches + b.prefetches,
            prefetches_used: a.prefetches_used + b.prefetches_used,
            prefetches_in_vain: a.prefetches_in_vain + b.prefetches_in_vain,
            prefetch_regrets: a.prefetch_regrets + b.prefetch_regrets,
            evictions: a.evictions + b.evictions,
            bytes_in: a.bytes_in + b.bytes_in,
            bytes_in_vain: a.bytes_in_vain + b.bytes_in_vain,
        })
    }

    /// A sequence is over.
    pub fn ended(&mut self, stream: u64) {
        for worker in &mut self.workers {
            let levels = [Some(&mut worker.level), worker.nvme.as_mut()];
            levels.into_iter().flatten().for_each(|level| level.handle(Event::Ended(stream)));
        }
    }

    /// Computes rows in all layers, in one pass whose dense part has `dense_rows` rows on the worker
    /// that has most.
    pub fn pass(&mut self, rows: &[RowAt<'_>], dense_rows: usize) {
        for layer in 0..self.layers.len() {
            self.layer(rows, dense_rows, layer);
        }
    }

    fn layer(&mut self, rows: &[RowAt<'_>], dense_rows: usize, layer: usize) {
        let (moe, number) = (self.moe.clone(), self.layers[layer]);
        let keys = |number: u16, experts: &[u16]| -> Vec<ExpertKey> {
            let key = |&flat: &u16| ExpertKey::from_flat(&moe, number.into(), flat.into());
            experts.iter().filter_map(key).collect()
        };
        let dense = self.compute.dense.of(dense_rows);
        self.tally.dense += dense;
        let mut now = self.tally.seconds + dense;
        let routed: Vec<RoutedRow> = rows
            .iter()
            .map(|at| RoutedRow {
                stream: at.stream,
                last: std::array::from_fn(|k| {
                    at.token.checked_sub(k).map_or(0, |token| at.trace.tokens[token])
                }),
                experts: keys(number, at.trace.routes(layer, at.token)),
                near: keys(number, at.trace.predicted(layer, at.token)),
            })
            .collect();
        // In the order in which they are named, with their rows.
        let (mut wanted, mut places): (Vec<(ExpertKey, u32)>, BTreeMap<ExpertKey, usize>) =
            Default::default();
        for &key in routed.iter().flat_map(|row| &row.experts) {
            let at = *places.entry(key).or_insert(wanted.len());
            match wanted.get_mut(at) {
                Some((_, rows)) => *rows += 1,
                None => wanted.push((key, 1)),
            }
        }
        let next = match self.layers.get(layer + 1) {
            Some(&next) if self.early && rows.len() <= PREDICTED_ROWS_MAX => {
                by_place(rows.iter().map(|at| at.trace.predicted(layer + 1, at.token)))
                    .map_or_else(Vec::new, |flats| keys(next, &flats))
            }
            _ => Vec::new(),
        };
        self.tally.demands[layer] += wanted.len() as u64;
        let count = self.workers.len();
        let mut slowest = (now, Spent::default());
        for (at, worker) in self.workers.iter_mut().enumerate() {
            let own = |key: &ExpertKey| owner(&moe, count, *key) == at;
            worker.until(now);
            worker.now = now;
            worker.heard(number, &routed, own);
            let wanted: Vec<_> = wanted.iter().filter(|(key, _)| own(key)).copied().collect();
            let next: Vec<_> = next.iter().filter(|key| own(key)).copied().collect();
            let bytes: u64 = wanted.iter().map(|(key, _)| worker.level.bytes(*key)).sum();
            self.tally.demanded_bytes += bytes;
            self.tally.hits[layer] += worker.layer(&wanted, next, &self.compute);
            if worker.now > slowest.0 {
                slowest = (worker.now, worker.spent);
            }
        }
        now = slowest.0;
        self.tally += slowest.1;
        if count > 1 {
            now += self.compute.network;
            self.tally.network += self.compute.network;
        }
        self.tally.seconds = now;
        self.tally.nvme_bytes = self.workers.iter().map(|worker| worker.bytes[0]).sum();
        self.tally.source_bytes = self.workers.iter().map(|worker| worker.bytes[1]).sum();
    }
}

/// The worker that an expert belongs to: neighbours of one layer go to different ones.
fn owner(moe: &MoeConfig, workers: usize, key: ExpertKey) -> usize {
    (key.flat(moe) + usize::from(key.layer)) % workers.max(1)
}

/// The rows' first choices, then their second ones, each expert once; none if there is none.
fn by_place<'a>(rows: impl Iterator<Item = &'a [u16]>) -> Option<Vec<u16>> {
    let rows: Vec<&[u16]> = rows.collect();
    let longest = rows.iter().map(|row| row.len()).max().filter(|&longest| longest > 0)?;
    let (mut seen, mut flats) = (BTreeSet::new(), Vec::new());
    for place in 0..longest {
        let at_place = rows.iter().filter_map(|row| row.get(place)).copied();
        flats.extend(at_place.filter(|flat| seen.insert(*flat)));
    }
    Some(flats)
}

/// Has an expert here if there is room.
fn load(level: &mut Residency, key: ExpertKey) {
    level.handle(Event::Load(key));
    while let Some(command) = level.poll_command() {
        if let Command::Fetch(key, _) = command {
            level.handle(Event::Arrived(key));
        }
    }
}

impl Worker {
    /// Levels learn what is routed to them.
    fn heard(&mut self, layer: u16, rows: &[RoutedRow], own: impl Fn(&ExpertKey) -> bool) {
        let mut rows = rows.to_vec();
        for row in &mut rows {
            row.experts.retain(&own);
            row.near.retain(&own);
        }
        if let Some(nvme) = &mut self.nvme {
            nvme.handle(Event::Routed { layer, rows: rows.clone() });
        }
        self.level.handle(Event::Routed { layer, rows });
    }

    /// Computes what is demanded of it. Returns how many of it were here.
    fn layer(
        &mut self,
        wanted: &[(ExpertKey, u32)],
        next: Vec<ExpertKey>,
        compute: &Compute,
    ) -> u64 {
        let rows: BTreeMap<ExpertKey, u32> = wanted.iter().copied().collect();
        let before = self.level.counters().hits;
        self.spent = Spent::default();
        (self.missing, self.ready) = (wanted.len(), Vec::new());
        self.level.handle(Event::Demand(wanted.to_vec()));
        let hits = self.level.counters().hits - before;
        self.carry_out();
        if !next.is_empty() {
            self.level.handle(Event::Predicted(next));
            self.carry_out();
        }
        let mut all = Vec::with_capacity(wanted.len());
        while self.missing > 0 || !self.ready.is_empty() {
            // A layer that has no room for all of it passes through in parts.
            let comes = self.missing > 0 && self.next(f64::MAX).is_some();
            let waits = self.ready.is_empty() || (compute.together.is_some() && comes);
            if waits {
                self.wait();
                continue;
            }
            let ready = std::mem::take(&mut self.ready);
            let time = match compute.together {
                Some(time) => time,
                None => ready.iter().map(|key| expert_time(compute, *key, rows[key])).sum(),
            };
            self.spent.experts += time;
            self.until(self.now + time);
            all.clear();
            all.extend(ready);
            self.level.handle(Event::Used(all.clone()));
            self.carry_out();
        }
        hits
    }

    /// Until the next arrival.
    fn wait(&mut self) {
        let (from, key, ends) = self.next(f64::MAX).expect("what is demanded is on its way");
        let waited = (ends - self.now).max(0.0);
        let device = self.queues[from as usize].device;
        let moving = waited.min(self.level.bytes(key) as f64 / device.rate);
        self.spent.waited[from as usize] += moving;
        self.spent.latency += waited - moving;
        self.arrived(from, key, ends);
    }

    /// Time passes; what arrives meanwhile is taken note of.
    fn until(&mut self, time: f64) {
        while let Some((from, key, ends)) = self.next(time) {
            self.arrived(from, key, ends);
        }
        self.now = self.now.max(time);
    }

    /// The next arrival, if that is until then.
    fn next(&self, until: f64) -> Option<(Origin, ExpertKey, f64)> {
        let ends = |from: Origin| {
            let (key, ends) = self.queues[from as usize].moving?;
            (ends <= until).then_some((from, key, ends))
        };
        let both = [ends(Origin::Nvme), ends(Origin::Source)];
        both.into_iter().flatten().min_by(|a, b| a.2.total_cmp(&b.2))
    }

    fn arrived(&mut self, from: Origin, key: ExpertKey, ends: f64) {
        let queue = &mut self.queues[from as usize];
        (queue.moving, queue.free) = (None, ends);
        self.now = self.now.max(ends);
        self.bytes[from as usize] += self.level.bytes(key);
        self.level.handle(Event::Arrived(key));
        self.carry_out();
    }

    fn carry_out(&mut self) {
        while let Some(command) = self.level.poll_command() {
            match command {
                Command::Fetch(key, urgency) => {
                    let from = self.place_of(key);
                    let queue = &mut self.queues[from as usize];
                    let to = match urgency {
                        Urgency::Demand => &mut queue.demanded,
                        Urgency::Prefetch => &mut queue.predicted,
                    };
                    to.push_back((key, self.now));
                }
                Command::Promote(key) => {
                    for queue in &mut self.queues {
                        let found = queue.take_predicted(key);
                        queue.demanded.extend(found);
                    }
                }
                Command::Cancel(key) => {
                    let found = self.queues.iter_mut().any(|q| q.take_predicted(key).is_some());
                    if found {
                        self.level.handle(Event::Cancelled(key));
                    }
                }
                Command::Ready(key) => {
                    self.missing -= 1;
                    self.ready.push(key);
                }
                // One that no budget can hold, or of a tier that is not here.
                Command::Refuse(..) => self.missing -= 1,
                Command::Evict(_) | Command::Loaded(_) => {}
            }
        }
        let level = &self.level;
        self.queues.iter_mut().for_each(|queue| queue.begin(|key| level.bytes(key)));
    }

    /// Where an expert is fetched from. The local disk keeps what passes it, in no time: writing is
    /// behind everything else.
    fn place_of(&mut self, key: ExpertKey) -> Origin {
        let Some(nvme) = &mut self.nvme else { return Origin::Source };
        let mut from = Origin::Nvme;
        nvme.handle(Event::Demand(vec![(key, 1)]));
        while let Some(command) = nvme.poll_command() {
            match command {
                Command::Fetch(key, _) => {
                    from = Origin::Source;
                    nvme.handle(Event::Arrived(key));
                }
                Command::Refuse(..) => from = Origin::Source,
                _ => {}
            }
        }
        nvme.handle(Event::Used(vec![key]));
        while nvme.poll_command().is_some() {}
        from
    }
}

fn expert_time(compute: &Compute, key: ExpertKey, rows: u32) -> f64 {
    let time = compute.experts.get(usize::from(key.tier)).copied().unwrap_or_default();
    time.of(rows as usize)
}

#[cfg(test)]
mod tests;
