//! Experts in a GPU's memory: what it computes with, over a store in the host's memory.
//!
//! What is in the GPU's memory is also below, as long as that holds it: this level only saves copies.
//! The least recently used goes first.
//!
//! Invariants:
//! - Memory for experts, used and spare, never exceeds the budget.
//! - An expert that somebody holds stays where it is. One that nobody holds may still be read by work
//!   that the device was given: its successor is copied by the same stream, after that.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use lite_llm_kernels::{
    cuda::{Dev, launch::DevMatrix},
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
    /// When it was last asked for.
    used: u64,
}

#[derive(Default)]
struct Inner {
    held: HashMap<ExpertKey, Held>,
    /// By when they were last used.
    ages: BTreeMap<u64, ExpertKey>,
    /// Memory of experts that have gone, by bytes.
    spare: BTreeMap<usize, Vec<Dev<u8>>>,
    /// Bytes of all of these.
    bytes: u64,
    /// Bytes of those that are held.
    held_bytes: u64,
    clock: u64,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    hits: u64,
    misses: u64,
    evictions: u64,
    copied: u64,
}

/// See the module's text.
pub struct HbmStore {
    gpu: Arc<Gpu>,
    below: Arc<dyn ExpertStore>,
    budget: u64,
    /// Bytes of an expert, by tier.
    expert_bytes: Vec<u64>,
    inner: Mutex<Inner>,
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

impl Inner {
    fn touch(&mut self, key: ExpertKey) -> Option<Resident> {
        let held = self.held.get_mut(&key)?;
        self.clock += 1;
        self.ages.remove(&held.used);
        held.used = self.clock;
        self.ages.insert(held.used, key);
        Some(held.expert.clone())
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
    /// An empty store of at most `budget` bytes over one in the host's memory,
    /// whose bytes are given by tier.
    pub fn new(
        gpu: Arc<Gpu>,
        below: Arc<dyn ExpertStore>,
        budget: u64,
        expert_bytes: Vec<u64>,
    ) -> Self {
        Self { gpu, below, budget, expert_bytes, inner: Mutex::default() }
    }

    /// Bytes that it may hold.
    pub fn budget(&self) -> u64 {
        self.budget
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
        let Some(moe) = &config.moe else { return true };
        let layers = config.sparse_layers().count() as u64;
        let slot = |bytes: &u64| bytes + 3 * ALIGN as u64;
        let tiers = moe.tiers.iter().zip(&self.expert_bytes);
        let all: u64 = tiers.map(|(tier, bytes)| tier.experts() as u64 * slot(bytes)).sum();
        all * layers <= self.budget
    }

    /// What it holds and has done so far.
    pub fn residence(&self) -> ResidenceStats {
        let inner = self.inner.lock();
        ResidenceStats {
            name: "hbm".into(),
            held: inner.held_bytes,
            budget: Some(self.budget),
            hits: inner.stats.hits,
            misses: inner.stats.misses,
            evictions: inner.stats.evictions,
            bytes_read: inner.stats.copied,
            ..ResidenceStats::default()
        }
    }

    /// Memory for an expert.
    fn room(&self, inner: &mut Inner, key: ExpertKey, bytes: usize) -> Result<Dev<u8>, StoreError> {
        loop {
            if let Some(memory) = inner.spare.get_mut(&bytes).and_then(Vec::pop) {
                return Ok(memory);
            }
            if inner.bytes + bytes as u64 <= self.budget {
                let memory = self.gpu.cuda().room(bytes).map_err(|error| failed(key, &error))?;
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

    fn copy(
        &self,
        memory: &Dev<u8>,
        starts: [usize; 3],
        expert: &GatedMlp,
    ) -> Result<GatedMlp<DevMatrix>, DeviceError> {
        let cuda = self.gpu.cuda();
        let place = |start: usize, matrix: &PackedMatrix| {
            let data = memory.part::<u8>(start, matrix.data().len());
            cuda.write(&data, 0, matrix.data())?;
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

impl ExpertStore<DevMatrix> for HbmStore {
    fn fetch(&self, key: ExpertKey) -> Result<Resident, StoreError> {
        let mut inner = self.inner.lock();
        if let Some(expert) = inner.touch(key) {
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
        let expert = match self.copy(&memory, starts, &host) {
            Ok(expert) => Arc::new(expert),
            Err(error) => {
                inner.spare.entry(bytes).or_default().push(memory);
                return Err(failed(key, &error));
            }
        };
        self.gpu.ended();
        inner.stats.copied += host.bytes();
        inner.clock += 1;
        let used = inner.clock;
        inner.ages.insert(used, key);
        inner.held.insert(key, Held { expert: expert.clone(), memory, used });
        inner.held_bytes += bytes as u64;
        Ok(expert)
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

    fn wants_predictions(&self) -> bool {
        self.below.wants_predictions()
    }

    fn resident_bytes(&self) -> u64 {
        self.below.resident_bytes()
    }
}
