//! Bringing experts from where each read may take long: an object store, or what has to be unpacked
//! first. Threads of its own do nothing else but read, verify and answer.
//!
//! Whoever asks never waits: where an expert lies is looked up on those threads too, for that may be
//! a request to the store. What waits for them is bounded in bytes by the pool that the slots are of.
//! A compressed expert takes its stored bytes beside its slot while it is unpacked, once per thread.

use std::{
    fmt, io,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use lite_llm_kernels::slots::Slot;

use super::{
    fetch::{Done, Fetched, Fetcher, ResidenceStats},
    machine::Urgency,
    work::{Answer, Next, Queue, Tally},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError},
    expert::{ExpertKey, GatedMlp},
};

/// Brings experts of a checkpoint wherever it lies, by blocking reads on threads of its own.
pub struct ArchiveFetcher {
    shared: Arc<Shared>,
}

struct Shared {
    checkpoint: Arc<Checkpoint>,
    queue: Arc<Queue<Job>>,
    tally: Tally,
}

/// The slot comes first: it is given back before the answer is told, also in a panic.
struct Job(Slot, Answer);

impl fmt::Debug for ArchiveFetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArchiveFetcher({})", self.shared.checkpoint.location())
    }
}

impl ArchiveFetcher {
    /// Reads experts of a checkpoint on so many threads: each is one request at a time, so a store
    /// wants several, bytes within the program one or two.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(checkpoint: Arc<Checkpoint>, threads: usize) -> io::Result<Self> {
        let (queue, tally) = (Queue::new(), Tally::default());
        let shared = Arc::new(Shared { checkpoint, queue, tally });
        let of_threads = shared.clone();
        shared.queue.work("archive", threads, move |next| of_threads.work(next))?;
        Ok(Self { shared })
    }
}

impl Drop for ArchiveFetcher {
    fn drop(&mut self) {
        // The threads end with what they are reading; nobody waits for a store that is slow.
        self.shared.queue.close();
    }
}

/// Reads an expert and verifies it. Wrong bytes are read once more: what damages them may be on the
/// way here.
pub(super) fn bring(
    checkpoint: &Checkpoint,
    key: ExpertKey,
    mut slot: Slot,
    tally: &Tally,
) -> Result<GatedMlp, CheckpointError> {
    checkpoint.read_expert(key, &mut slot)?;
    match checkpoint.expert_from(key, slot) {
        Err((error @ CheckpointError::Damaged { .. }, Some(mut slot))) => {
            tracing::warn!(%key, %error, "it is read once more");
            tally.damaged.fetch_add(1, Relaxed);
            checkpoint.read_expert(key, &mut slot)?;
            checkpoint.expert_from(key, slot).map_err(|(error, _)| error)
        }
        other => other.map_err(|(error, _)| error),
    }
}

impl Shared {
    fn work(&self, next: Next<Job>) {
        match next {
            Next::Begin(Job(slot, answer)) => {
                match bring(&self.checkpoint, answer.key, slot, &self.tally) {
                    Ok(expert) => {
                        self.tally.hit(expert.bytes());
                        answer.tell(Fetched::Here(expert));
                    }
                    Err(error) => {
                        self.tally.misses.fetch_add(1, Relaxed);
                        self.tally.failures.fetch_add(1, Relaxed);
                        answer.fail(error);
                    }
                }
            }
            Next::Cancelled(Job(slot, answer)) => {
                drop(slot);
                answer.tell(Fetched::Cancelled);
            }
        }
    }
}

impl Fetcher for ArchiveFetcher {
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done) {
        let job = Job(slot, Answer::new(key, done));
        if self.shared.queue.push(key, urgency, job).is_err() {
            unreachable!("it is closed when the fetcher is dropped");
        }
    }

    fn promote(&self, key: ExpertKey) {
        self.shared.queue.promote(key);
    }

    fn cancel(&self, key: ExpertKey) {
        self.shared.queue.cancel(key);
    }

    fn describe(&self) -> String {
        self.shared.checkpoint.location()
    }

    fn residences(&self) -> Vec<ResidenceStats> {
        let location = self.shared.checkpoint.location();
        let name = match self.shared.checkpoint.is_stored() {
            true => format!("archive {location}"),
            false => location,
        };
        vec![self.shared.tally.stats(name, 0, None)]
    }
}
