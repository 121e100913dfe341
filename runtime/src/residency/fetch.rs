//! Bringing experts' bytes into memory: what is asked of a source of experts, and the source that is
//! a local folder, read by the block reader.
//!
//! [`LocalFetcher`] has the block reader fill the slots, and threads beside it verify them. An expert
//! that does not lie in its file as it is used (a compressed one) is read and unpacked by those
//! threads instead. What waits for them is bounded in bytes by the pool that the slots are of.

use std::{
    collections::HashMap,
    fmt, io,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use lite_llm_kernels::slots::Slot;
use parking_lot::Mutex;

use super::{
    archive::bring,
    machine::Urgency,
    work::{Answer, Next, Queue, Tally},
};
use crate::{
    blocks::{BlockFile, BlockReader, Priority, Read, ReadId, Unread},
    checkpoint::{Checkpoint, CheckpointError, ExpertPlace},
    expert::{ExpertKey, GatedMlp, StoreError},
};

/// Files of a folder that stay open.
const FILES_MAX: usize = 128;

/// How a fetch ended.
#[derive(Debug)]
pub enum Fetched {
    /// The expert, verified.
    Here(GatedMlp),
    /// It was cancelled before it began. Its slot was given back before this is told.
    Cancelled,
    /// It could not be had. Its slot, too, was given back before.
    Failed(StoreError),
}

/// Told once how a fetch ended, from another thread than the one that asked.
pub type Done = Box<dyn FnOnce(Fetched) + Send>;

/// Brings experts. At most one fetch of a key is under way at a time.
pub trait Fetcher: fmt::Debug + Send + Sync {
    /// Brings an expert into a slot of its bytes. `done` is never called from within this, nor from
    /// within the calls below, so a caller may hold a lock that `done` takes.
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done);
    /// Somebody waits for it now.
    fn promote(&self, key: ExpertKey);
    /// It is not wanted any more: [`Fetched::Cancelled`] if it has not begun.
    fn cancel(&self, key: ExpertKey);
    /// An expert, verified, that came by another way while this was not fetching it: to be kept where
    /// what this fetches is kept. May take as long as deleting a few files does.
    fn keep(&self, _key: ExpertKey, _expert: &GatedMlp) {}
    /// How it reads, for people.
    fn describe(&self) -> String;
    /// Another takes its place: it lets go of what only one may have, and goes on without. Waits
    /// until that is done.
    fn retire(&self) {}
    /// The places that it brings experts from, the fastest first.
    fn residences(&self) -> Vec<ResidenceStats> {
        Vec::new()
    }
}

/// What a place of experts holds and has done so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResidenceStats {
    /// What it is and where, for people.
    pub name: String,
    /// Bytes that it holds; 0 of a place that holds all there is.
    pub held: u64,
    /// Bytes that it may hold; nothing of a place that holds all there is.
    pub budget: Option<u64>,
    /// Experts that were brought from it.
    pub hits: u64,
    /// Experts that were asked of it and came from the next place, or from nowhere.
    pub misses: u64,
    /// Experts that were fetched into it because they were predicted.
    pub prefetches: u64,
    /// Of those, the ones that were wanted.
    pub prefetches_used: u64,
    /// Experts that were let go.
    pub evictions: u64,
    /// Bytes of the experts that were brought: into memory, or from any other place.
    pub bytes_read: u64,
    /// Of those, the ones that memory let go without a use.
    pub bytes_in_vain: u64,
    /// Experts whose bytes were not what was written, or not there.
    pub damaged: u64,
    /// Reads that failed for another reason, and writes.
    pub failures: u64,
}

/// Brings experts of a checkpoint in a local folder.
pub struct LocalFetcher {
    shared: Arc<Shared>,
}

struct Shared {
    checkpoint: Arc<Checkpoint>,
    reader: Arc<BlockReader>,
    files: Mutex<OpenFiles>,
    /// Reads that the reader has.
    under_way: Mutex<HashMap<ExpertKey, (ReadId, Urgency)>>,
    queue: Arc<Queue<Job>>,
    tally: Tally,
}

/// Work of the threads. The slot comes first: it is given back before the answer is told, also in a
/// panic.
enum Job {
    /// Bytes that were read.
    Verify(Slot, Answer),
    /// An expert that no block reader can read.
    Bring(Slot, Answer),
    /// What failed, or was cancelled, before anything was to be verified.
    Tell(Fetched, Answer),
}

/// The files that were used last.
#[derive(Default)]
struct OpenFiles {
    uses: u64,
    /// With when it was used last.
    files: HashMap<String, (Arc<BlockFile>, u64)>,
}

impl fmt::Debug for LocalFetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalFetcher({})", self.shared.checkpoint.location())
    }
}

impl LocalFetcher {
    /// Reads experts of a checkpoint; `threads` of its own verify them.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(
        checkpoint: Arc<Checkpoint>,
        reader: Arc<BlockReader>,
        threads: usize,
    ) -> io::Result<Self> {
        let (files, under_way) = (Mutex::default(), Mutex::default());
        let (queue, tally) = (Queue::new(), Tally::default());
        let shared = Arc::new(Shared { checkpoint, reader, files, under_way, queue, tally });
        let of_threads = shared.clone();
        shared.queue.work("verify", threads, move |next| of_threads.work(next))?;
        Ok(Self { shared })
    }
}

impl Drop for LocalFetcher {
    fn drop(&mut self) {
        // What was read already is answered by the threads, what was not by the reader.
        self.shared.queue.close();
        let under_way: Vec<ReadId> =
            self.shared.under_way.lock().values().map(|&(id, _)| id).collect();
        under_way.into_iter().for_each(|id| self.shared.reader.cancel(id));
    }
}

impl OpenFiles {
    fn get(&mut self, place: &ExpertPlace, of: &Checkpoint) -> io::Result<Arc<BlockFile>> {
        self.uses += 1;
        if let Some((file, used)) = self.files.get_mut(&place.path) {
            *used = self.uses;
            return Ok(file.clone());
        }
        let path = of.real_path(&place.path).map_err(io::Error::other)?;
        let file = Arc::new(BlockFile::open(&path)?);
        if self.files.len() >= FILES_MAX {
            let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(path, _)| path.clone()) {
                // Reads of it that are under way keep it open.
                self.files.remove(&oldest);
            }
        }
        self.files.insert(place.path.clone(), (file.clone(), self.uses));
        Ok(file)
    }
}

impl Shared {
    fn work(&self, next: Next<Job>) {
        match next {
            Next::Begin(Job::Verify(slot, answer)) => {
                let expert = self.checkpoint.expert_from(answer.key, slot);
                self.tell(expert.map_err(|(error, _)| error), answer);
            }
            Next::Begin(Job::Bring(slot, answer)) => {
                let expert = bring(&self.checkpoint, answer.key, slot, &self.tally);
                self.tell(expert, answer);
            }
            Next::Cancelled(Job::Verify(slot, answer) | Job::Bring(slot, answer)) => {
                drop(slot);
                answer.tell(Fetched::Cancelled);
            }
            Next::Begin(Job::Tell(fetched, answer))
            | Next::Cancelled(Job::Tell(fetched, answer)) => answer.tell(fetched),
        }
    }

    fn tell(&self, expert: Result<GatedMlp, CheckpointError>, answer: Answer) {
        match expert {
            Ok(expert) => {
                self.tally.hit(expert.bytes());
                answer.tell(Fetched::Here(expert));
            }
            Err(error) => {
                let damaged = matches!(error, CheckpointError::Damaged { .. });
                let what = if damaged { &self.tally.damaged } else { &self.tally.failures };
                what.fetch_add(1, Relaxed);
                self.tally.misses.fetch_add(1, Relaxed);
                answer.fail(error);
            }
        }
    }

    /// Hands on what was read.
    fn was_read(&self, read: Result<Slot, Unread>, answer: Answer) {
        let key = answer.key;
        let job = match read {
            Ok(slot) => Job::Verify(slot, answer),
            Err(Unread { error, slot }) => {
                drop(slot);
                Job::Tell(self.not_read(key, &error), answer)
            }
        };
        // Under the lock: who promotes it finds it there, or in the queue.
        let mut under_way = self.under_way.lock();
        let urgency = under_way.remove(&key).map_or(Urgency::Demand, |(_, urgency)| urgency);
        let closed = self.queue.push(key, urgency, job);
        drop(under_way);
        if let Err(job) = closed {
            self.work(Next::Cancelled(job));
        }
    }

    fn not_read(&self, key: ExpertKey, error: &io::Error) -> Fetched {
        if error.kind() == io::ErrorKind::Interrupted {
            return Fetched::Cancelled;
        }
        self.tally.misses.fetch_add(1, Relaxed);
        self.tally.failures.fetch_add(1, Relaxed);
        Fetched::Failed(StoreError::Unreadable { key, reason: error.to_string() })
    }
}

impl Fetcher for LocalFetcher {
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done) {
        let (shared, answer) = (&self.shared, Answer::new(key, done));
        // A file of the folder is read here, if this is the first expert of its group.
        let place = shared.checkpoint.expert_place(key).map_err(io::Error::other);
        let file = place.and_then(|place| match place.file {
            Some(_) => {
                Ok(Some((shared.files.lock().get(&place, &shared.checkpoint)?, place.offset)))
            }
            None => Ok(None),
        });
        let job = match file {
            Ok(Some((file, offset))) => {
                let of_reader = shared.clone();
                let done = Box::new(move |read| of_reader.was_read(read, answer));
                let priority = priority(urgency);
                // Locked until its number is noted: it may end before.
                let mut under_way = shared.under_way.lock();
                let id = shared.reader.submit(Read { file, offset, slot, priority, done });
                under_way.insert(key, (id, urgency));
                return;
            }
            Ok(None) => Job::Bring(slot, answer),
            Err(error) => {
                drop(slot);
                Job::Tell(shared.not_read(key, &error), answer)
            }
        };
        if shared.queue.push(key, urgency, job).is_err() {
            unreachable!("it is closed when the fetcher is dropped");
        }
    }

    fn promote(&self, key: ExpertKey) {
        let mut under_way = self.shared.under_way.lock();
        match under_way.get_mut(&key) {
            Some((id, urgency)) => {
                *urgency = Urgency::Demand;
                self.shared.reader.promote(*id);
            }
            None => self.shared.queue.promote(key),
        }
    }

    fn cancel(&self, key: ExpertKey) {
        let under_way = self.shared.under_way.lock();
        match under_way.get(&key) {
            Some((id, _)) => self.shared.reader.cancel(*id),
            None => self.shared.queue.cancel(key),
        }
    }

    fn describe(&self) -> String {
        let Shared { checkpoint, reader, .. } = &*self.shared;
        match checkpoint.is_local() {
            true => format!("{} by {}", checkpoint.location(), reader.describe()),
            // What lies in the program or in a store is no block reader's.
            false => checkpoint.location(),
        }
    }

    fn residences(&self) -> Vec<ResidenceStats> {
        let name = format!("folder {}", self.shared.checkpoint.location());
        vec![self.shared.tally.stats(name, 0, None)]
    }
}

/// The reader's word for an urgency.
pub(super) fn priority(urgency: Urgency) -> Priority {
    match urgency {
        Urgency::Demand => Priority::Demand,
        Urgency::Prefetch => Priority::Prefetch,
    }
}
