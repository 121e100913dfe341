//! Experts held in the memory of the host, within a budget.
//!
//! Experts of a checkpoint on disk are mapped: the budget counts the bytes that computing with
//! them needs in memory, however many processes of the host share those.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;

use crate::{
    checkpoint::{Checkpoint, try_map},
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
};

/// The DRAM residence of experts.
///
/// Invariant: the bytes held never exceed the budget; room is claimed before bytes are read.
pub struct DramStore {
    experts: RwLock<HashMap<ExpertKey, Arc<GatedMlp>>>,
    resident: AtomicU64,
    budget: u64,
}

impl DramStore {
    /// An empty store for at most `budget` bytes.
    pub fn new(budget: u64) -> Self {
        Self { experts: RwLock::default(), resident: AtomicU64::new(0), budget }
    }

    /// Bytes that it may hold.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Number of experts held.
    pub fn len(&self) -> usize {
        self.experts.read().len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads an expert from a checkpoint, verifying it, and keeps it. Returns its bytes; 0 if it
    /// was here already.
    pub fn load(&self, checkpoint: &Checkpoint, key: ExpertKey) -> Result<u64, StoreError> {
        if self.experts.read().contains_key(&key) {
            return Ok(0);
        }
        let unreadable = |error: &dyn std::fmt::Display| StoreError::Unreadable {
            key,
            reason: error.to_string(),
        };
        let bytes = checkpoint.expert_bytes(key).map_err(|e| unreadable(&e))?;
        self.claim(key, bytes)?;
        match checkpoint.expert(key) {
            Ok(expert) => {
                if self.experts.write().insert(key, Arc::new(expert)).is_some() {
                    self.resident.fetch_sub(bytes, Ordering::Relaxed);
                }
                Ok(bytes)
            }
            Err(error) => {
                self.resident.fetch_sub(bytes, Ordering::Relaxed);
                Err(unreadable(&error))
            }
        }
    }

    /// Loads every expert of a model, verified by as many threads as the machine has cores.
    pub fn load_all(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let keys: Vec<_> = checkpoint.config().expert_keys().collect();
        try_map(threads, &keys, |&key| self.load(checkpoint, key)).map(drop)
    }

    /// Lets an expert go; whoever computes with it keeps it until done.
    pub fn remove(&self, key: ExpertKey) {
        if let Some(expert) = self.experts.write().remove(&key) {
            self.resident.fetch_sub(expert.bytes(), Ordering::Relaxed);
        }
    }

    fn claim(&self, key: ExpertKey, needed: u64) -> Result<(), StoreError> {
        let room = |held: u64| held.checked_add(needed).filter(|&total| total <= self.budget);
        self.resident.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).map(|_| ()).map_err(
            |held| StoreError::OverBudget {
                key,
                needed,
                free: self.budget - held,
                budget: self.budget,
            },
        )
    }
}

impl ExpertStore for DramStore {
    fn fetch(&self, key: ExpertKey) -> Result<Arc<GatedMlp>, StoreError> {
        self.experts.read().get(&key).cloned().ok_or(StoreError::NotHere { key })
    }

    fn resident_bytes(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }
}
