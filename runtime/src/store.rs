//! Experts held in the memory of the host, within a budget, until they are let go by name: for those
//! who compute without a cluster. Nodes have a [cache](crate::residency::ExpertCache).

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};

use crate::{
    checkpoint::{Checkpoint, try_map},
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
};

/// The DRAM residence of experts.
///
/// Invariant: the bytes held never exceed the budget, those of experts that were let go but are
/// still computed with included; room is claimed before bytes are read.
pub struct DramStore {
    experts: RwLock<HashMap<ExpertKey, Arc<GatedMlp>>>,
    /// Experts that were let go while somebody computed with them, and their bytes.
    leaving: Mutex<Vec<(Weak<GatedMlp>, u64)>>,
    resident: AtomicU64,
    budget: u64,
}

impl DramStore {
    /// An empty store for at most `budget` bytes.
    pub fn new(budget: u64) -> Self {
        let (experts, leaving) = (RwLock::default(), Mutex::default());
        Self { experts, leaving, resident: AtomicU64::new(0), budget }
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

    /// Lets an expert go; whoever computes with it keeps it until done, and its bytes count until
    /// then.
    pub fn remove(&self, key: ExpertKey) {
        if let Some(expert) = self.experts.write().remove(&key) {
            let bytes = expert.bytes();
            self.leaving.lock().push((Arc::downgrade(&expert), bytes));
        }
        self.settle();
    }

    /// Frees the budget of experts that have left.
    fn settle(&self) {
        self.leaving.lock().retain(|(expert, bytes)| {
            let here = expert.strong_count() > 0;
            if !here {
                self.resident.fetch_sub(*bytes, Ordering::Relaxed);
            }
            here
        });
    }

    fn claim(&self, key: ExpertKey, needed: u64) -> Result<(), StoreError> {
        self.settle();
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
        self.settle();
        self.resident.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_an_expert_that_is_computed_with_are_not_given_away() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let checkpoint = Checkpoint::open(demo).unwrap();
        let keys: Vec<_> = checkpoint.config().expert_keys().take(2).collect();
        let bytes = checkpoint.expert_bytes(keys[0]).unwrap();
        let store = DramStore::new(bytes);
        store.load(&checkpoint, keys[0]).unwrap();
        let lease = store.fetch(keys[0]).unwrap();
        store.remove(keys[0]);
        assert!(matches!(store.fetch(keys[0]), Err(StoreError::NotHere { .. })));
        assert_eq!(store.resident_bytes(), bytes);
        let full = store.load(&checkpoint, keys[1]);
        assert!(matches!(full, Err(StoreError::OverBudget { free: 0, .. })), "{full:?}");
        drop(lease);
        assert_eq!(store.resident_bytes(), 0);
        store.load(&checkpoint, keys[1]).unwrap();
    }
}
