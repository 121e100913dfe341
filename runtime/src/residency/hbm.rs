//! Experts in the memory of one GPU or several: what they compute with, over a store in the host's memory.
//!
//! What is in the GPU's memory is also below, as long as that holds it: this level only saves copies.
//! The least recently used goes first, but for what a long prompt reads ([`HbmStore::scan`]): that goes before
//! anything else, so that it does not drive out what the next tokens need.
//!
//! Invariants:
//! - Memory for experts, used and spare, never exceeds the budget of any GPU.
//! - An expert's GPU is a function of its key.
//! - Memory below is locked only while all that it serves stays there ([`ExpertStore::is_whole`]), and let go
//!   before the first of it goes.
//! - An expert that somebody holds stays where it is. One that nobody holds may still be read by work
//!   that the device was given: its successor is copied by the same stream, after that.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::Arc,
};

use lite_llm_kernels::{
    cuda::{Cuda, Dev, copy::Locked, launch::DevMatrix},
    cuda_device::Gpu,
    device::DeviceError,
    matrix::PackedMatrix,
};
use parking_lot::Mutex;

use super::{ResidenceStats, RoutedRow};
use crate::{
    config::ModelConfig,
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError, Waker},
};

/// Matrices of an expert begin at a multiple of this many bytes.
const ALIGN: usize = 256;

/// An expert of the GPU's memory.
type Resident = Arc<GatedMlp<DevMatrix>>;

struct Held {
    expert: Resident,
    memory: Dev<u8>,
    /// When it was last asked for; below 0 for what was only scanned.
    used: i64,
}

/// One GPU's memory.
#[derive(Default)]
struct Inner {
    held: HashMap<ExpertKey, Held>,
    /// By when they were last used.
    ages: BTreeMap<i64, ExpertKey>,
    /// Memory of experts that have gone, by bytes.
    spare: BTreeMap<usize, Vec<Dev<u8>>>,
    /// Bytes of all of these.
    bytes: u64,
    /// Bytes of those that are held.
    held_bytes: u64,
    clock: i64,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    hits: u64,
    misses: u64,
    evictions: u64,
    copied: u64,
}

/// Memory below that is locked, by its address, so that copies go at the rate of the bus; nothing where that
/// cannot be done.
type LockedMemory = HashMap<usize, Option<Locked>>;

/// See the module's text.
pub struct HbmStore {
    gpu: Arc<Gpu>,
    below: Arc<dyn ExpertStore>,
    /// Of each GPU.
    budget: u64,
    /// Bytes of an expert, by tier.
    expert_bytes: Vec<u64>,
    /// By GPU.
    places: Vec<Mutex<Inner>>,
    locked: Arc<Mutex<LockedMemory>>,
}

/// Bytes of an expert's slot, and where its matrices begin.
fn layout(expert: &GatedMlp) -> ([usize; 3], usize) {
    let mut end = 0;
    let starts = [&expert.gate, &expert.up, &expert.down].map(|matrix| {
        let start = end;
        end = (start + matrix.data().len()).next_multiple_of(ALIGN);
        start
    });
    (starts, end)
}

/// Where the memory begins in which a matrix lies, maybe beside others.
fn memory_of(matrix: &PackedMatrix) -> usize {
    matrix.data().whole().as_ptr() as usize
}

impl Inner {
    fn touch(&mut self, key: ExpertKey, scans: bool) -> Option<Resident> {
        let held = self.held.get_mut(&key)?;
        if !scans {
            self.clock += 1;
            self.ages.remove(&held.used);
            held.used = self.clock;
            self.ages.insert(held.used, key);
        }
        Some(held.expert.clone())
    }

    /// When something that comes now was last asked for.
    fn age(&mut self, scans: bool) -> i64 {
        self.clock += 1;
        if scans { self.clock - i64::MAX } else { self.clock }
    }

    /// Lets the least recently used go that nobody holds, its memory to be used again.
    fn evict(&mut self) -> bool {
        let free = |key: &&ExpertKey| {
            self.held.get(*key).is_some_and(|held| Arc::strong_count(&held.expert) == 1)
        };
        let Some(key) = self.ages.values().find(free).copied() else { return false };
        let Some(held) = self.held.remove(&key) else { return false };
        self.ages.remove(&held.used);
        self.stats.evictions += 1;
        self.held_bytes -= held.memory.len() as u64;
        self.spare.entry(held.memory.len()).or_default().push(held.memory);
        true
    }
}

impl HbmStore {
    /// An empty store of at most `budget` bytes in each GPU's memory over one in the host's memory, whose
    /// bytes are given by tier.
    pub fn new(
        gpu: Arc<Gpu>,
        below: Arc<dyn ExpertStore>,
        budget: u64,
        expert_bytes: Vec<u64>,
    ) -> Self {
        let places = gpu.cudas().iter().map(|_| Mutex::default()).collect();
        let locked: Arc<Mutex<LockedMemory>> = Arc::default();
        let weak = Arc::downgrade(&locked);
        // Who keeps memory locked keeps it from those that are to come.
        below.on_leaving(Box::new(move || {
            let locked = weak.upgrade();
            locked.inspect(|locked| locked.lock().clear()).is_some()
        }));
        Self { gpu, below, budget, expert_bytes, places, locked }
    }

    /// Bytes that it may hold.
    pub fn budget(&self) -> u64 {
        self.budget * self.places.len() as u64
    }

    /// Which of the GPUs an expert is for.
    pub(crate) fn place_of(&self, key: ExpertKey) -> usize {
        (key.group as usize + key.expert as usize) % self.places.len()
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The addresses of an expert that is here: gate, up, down.
    pub(crate) fn addresses(expert: &GatedMlp<DevMatrix>) -> [u64; 3] {
        [&expert.gate, &expert.up, &expert.down].map(|matrix| matrix.data().address())
    }

    /// Whether all experts of a model fit.
    pub fn holds_all(&self, config: &ModelConfig) -> bool {
        let mut bytes = vec![0; self.places.len()];
        for key in config.expert_keys() {
            let expert = self.expert_bytes.get(usize::from(key.tier)).copied().unwrap_or(0);
            bytes[self.place_of(key)] += expert + 3 * ALIGN as u64;
        }
        bytes.iter().all(|&bytes| bytes <= self.budget)
    }

    /// What it holds and has done so far.
    pub fn residence(&self) -> ResidenceStats {
        let mut all = ResidenceStats {
            name: "hbm".into(),
            budget: Some(self.budget()),
            ..ResidenceStats::default()
        };
        for inner in &self.places {
            let inner = inner.lock();
            all.held += inner.held_bytes;
            all.hits += inner.stats.hits;
            all.misses += inner.stats.misses;
            all.evictions += inner.stats.evictions;
            all.bytes_read += inner.stats.copied;
        }
        all
    }

    /// Memory for an expert.
    fn room(&self, inner: &mut Inner, key: ExpertKey, bytes: usize) -> Result<Dev<u8>, StoreError> {
        loop {
            if let Some(memory) = inner.spare.get_mut(&bytes).and_then(Vec::pop) {
                return Ok(memory);
            }
            if inner.bytes + bytes as u64 <= self.budget {
                let cuda = &self.gpu.cudas()[self.place_of(key)];
                let memory = cuda.room(bytes).map_err(|error| failed(key, &error))?;
                inner.bytes += bytes as u64;
                return Ok(memory);
            }
            // Memory of another size is given back, which waits for the device.
            let other = inner.spare.iter_mut().find_map(|(&size, free)| Some((size, free.pop()?)));
            if let Some((size, _)) = other {
                inner.bytes -= size as u64;
            } else if !inner.evict() {
                return Err(StoreError::OverBudget {
                    key,
                    needed: bytes as u64,
                    free: self.budget - inner.bytes,
                    budget: self.budget,
                });
            }
        }
    }

    /// Locks an expert's memory below, if that stays where it is and is read more than once.
    fn lock(&self, locked: &mut LockedMemory, host: &GatedMlp) -> Result<(), DeviceError> {
        if !self.below.is_whole() {
            return Ok(());
        }
        for matrix in [&host.gate, &host.up, &host.down] {
            if let Entry::Vacant(place) = locked.entry(memory_of(matrix)) {
                place.insert(self.gpu.cuda().lock(matrix.data())?);
            }
        }
        Ok(())
    }

    /// Gives the device the copy of an expert. Its memory below stays until the copy has ended: it is
    /// locked only as long as it stays, and what is not locked has been read when this returns.
    fn copy(
        &self,
        cuda: &Cuda,
        memory: &Dev<u8>,
        starts: [usize; 3],
        expert: &GatedMlp,
        locked: &LockedMemory,
    ) -> Result<GatedMlp<DevMatrix>, DeviceError> {
        let place = |start: usize, matrix: &PackedMatrix| {
            let data = memory.part::<u8>(start, matrix.data().len());
            let locked = locked.get(&memory_of(matrix)).and_then(Option::as_ref);
            cuda.put_from(&data, matrix.data(), locked)?;
            Ok(cuda.matrix_at(matrix.dtype(), matrix.n(), matrix.k(), data))
        };
        Ok(GatedMlp {
            gate: place(starts[0], &expert.gate)?,
            up: place(starts[1], &expert.up)?,
            down: place(starts[2], &expert.down)?,
        })
    }
}

fn failed(key: ExpertKey, error: &DeviceError) -> StoreError {
    StoreError::Unreadable { key, reason: error.to_string() }
}

impl HbmStore {
    /// As [`ExpertStore::fetch`], for a pass that reads most experts once: what it brings goes first when
    /// room is needed, and what is here is not used by it.
    pub fn scan(&self, key: ExpertKey) -> Result<Resident, StoreError> {
        self.have(key, true)
    }

    fn have(&self, key: ExpertKey, scans: bool) -> Result<Resident, StoreError> {
        let place = self.place_of(key);
        let (cuda, mut inner) = (&self.gpu.cudas()[place], self.places[place].lock());
        if let Some(expert) = inner.touch(key, scans) {
            inner.stats.hits += 1;
            return Ok(expert);
        }
        let host = self.below.fetch(key)?;
        inner.stats.misses += 1;
        let (starts, bytes) = layout(&host);
        // Described only if somebody traces.
        let _span = tracing::debug_span!(
            "fetch", %key, from = "memory", to = "hbm", bytes, why = "demanded"
        )
        .entered();
        let memory = self.room(&mut inner, key, bytes)?;
        let copy = || {
            let mut locked = self.locked.lock();
            // What was copied once and has gone will probably be copied again.
            if inner.stats.evictions > 0 {
                self.lock(&mut locked, &host)?;
            }
            self.copy(cuda, &memory, starts, &host, &locked)
        };
        let expert = match copy() {
            Ok(expert) => Arc::new(expert),
            Err(error) => {
                inner.spare.entry(bytes).or_default().push(memory);
                return Err(failed(key, &error));
            }
        };
        self.gpu.ended();
        inner.stats.copied += host.bytes();
        let used = inner.age(scans);
        inner.ages.insert(used, key);
        inner.held.insert(key, Held { expert: expert.clone(), memory, used });
        inner.held_bytes += bytes as u64;
        Ok(expert)
    }
}

impl ExpertStore<DevMatrix> for HbmStore {
    fn fetch(&self, key: ExpertKey) -> Result<Resident, StoreError> {
        self.have(key, false)
    }

    fn want(&self, experts: &[(ExpertKey, u32)]) {
        self.below.want(experts);
    }

    fn used(&self, experts: &[ExpertKey]) {
        self.below.used(experts);
    }

    fn predict(&self, experts: &[ExpertKey]) {
        self.below.predict(experts);
    }

    fn on_arrival(&self, wake: Waker) {
        self.below.on_arrival(wake);
    }

    fn routed(&self, layer: u16, rows: Vec<RoutedRow>) {
        self.below.routed(layer, rows);
    }

    fn ended(&self, stream: u64) {
        self.below.ended(stream);
    }

    fn is_complete(&self) -> bool {
        self.below.is_complete()
    }

    fn is_whole(&self) -> bool {
        self.below.is_whole()
    }

    fn wants_predictions(&self) -> bool {
        self.below.wants_predictions()
    }

    fn resident_bytes(&self) -> u64 {
        self.below.resident_bytes()
    }
}
