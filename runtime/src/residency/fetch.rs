//! Bringing experts' bytes into memory: from a local folder by the block reader, verified on
//! threads beside it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
    thread,
};

use crossbeam_channel::{Sender, unbounded};
use lite_llm_kernels::{buffer::Buffer, slots::Slot};
use parking_lot::Mutex;

use super::machine::Urgency;
use crate::{
    blocks::{BlockFile, BlockReader, Priority, Read, ReadId},
    checkpoint::{Checkpoint, ExpertPlace},
    expert::{ExpertKey, GatedMlp, StoreError},
};

/// How a fetch ended.
#[derive(Debug)]
pub enum Fetched {
    /// The expert, verified.
    Here(GatedMlp),
    /// It was cancelled before it began.
    Cancelled,
    /// It could not be had.
    Failed(StoreError),
}

/// Told how a fetch ended, from another thread than the one that asked.
pub type Done = Box<dyn FnOnce(Fetched) + Send>;

/// Brings experts. At most one fetch of a key is under way at a time.
pub trait Fetcher: fmt::Debug + Send + Sync {
    /// Brings an expert into a slot of at least its bytes. `done` is never called before this
    /// returns.
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done);
    /// Somebody waits for it now.
    fn promote(&self, key: ExpertKey);
    /// It is not wanted any more: [`Fetched::Cancelled`] if it has not begun.
    fn cancel(&self, key: ExpertKey);
    /// How it reads, for people.
    fn describe(&self) -> String;
}

/// Brings experts of a checkpoint in a local folder, or in the program.
pub struct LocalFetcher {
    shared: Arc<Shared>,
}

struct Shared {
    checkpoint: Arc<Checkpoint>,
    reader: Arc<BlockReader>,
    files: Mutex<HashMap<String, Arc<BlockFile>>>,
    under_way: Mutex<HashMap<ExpertKey, ReadId>>,
    verify: Sender<Job>,
}

/// Work of the verifying threads.
enum Job {
    /// Bytes that were read.
    Verify { key: ExpertKey, bytes: Buffer, done: Done },
    /// An expert that lies in the program.
    Copy { key: ExpertKey, slot: Slot, done: Done },
    /// What failed before anything was read.
    Tell { fetched: Fetched, done: Done },
}

impl fmt::Debug for LocalFetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalFetcher({})", self.shared.checkpoint.location())
    }
}

impl LocalFetcher {
    /// Reads experts of a checkpoint; `threads` of its own verify them.
    pub fn new(
        checkpoint: Arc<Checkpoint>,
        reader: Arc<BlockReader>,
        threads: usize,
    ) -> std::io::Result<Self> {
        let (verify, jobs) = unbounded::<Job>();
        let (files, under_way) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { checkpoint, reader, files, under_way, verify });
        for number in 0..threads.max(1) {
            let (jobs, shared) = (jobs.clone(), Arc::downgrade(&shared));
            // It ends when the fetcher does, whose sender is the last.
            thread::Builder::new().name(format!("verify-{number}")).spawn(move || {
                for job in jobs {
                    work(&shared, job);
                }
            })?;
        }
        Ok(Self { shared })
    }
}

fn work(shared: &Weak<Shared>, job: Job) {
    let checked = |key, bytes: Result<Buffer, StoreError>| {
        let Some(shared) = shared.upgrade() else { return Fetched::Cancelled };
        let expert = bytes.and_then(|bytes| {
            let expert = shared.checkpoint.expert_from(key, bytes);
            expert.map_err(|error| unreadable(key, &error))
        });
        expert.map_or_else(Fetched::Failed, Fetched::Here)
    };
    match job {
        Job::Verify { key, bytes, done } => done(checked(key, Ok(bytes))),
        Job::Copy { key, mut slot, done } => {
            let copied = match shared.upgrade() {
                Some(shared) => shared.checkpoint.read_expert(key, &mut slot),
                None => return done(Fetched::Cancelled),
            };
            let bytes =
                copied.map_err(|error| unreadable(key, &error)).and_then(|()| own(key, slot));
            done(checked(key, bytes));
        }
        Job::Tell { fetched, done } => done(fetched),
    }
}

fn own(key: ExpertKey, slot: Slot) -> Result<Buffer, StoreError> {
    Buffer::from_owner(slot).map_err(|error| unreadable(key, &error))
}

fn unreadable(key: ExpertKey, error: &dyn fmt::Display) -> StoreError {
    StoreError::Unreadable { key, reason: error.to_string() }
}

impl Shared {
    fn file(&self, place: &ExpertPlace) -> Result<Option<Arc<BlockFile>>, String> {
        let Some(path) = &place.file else { return Ok(None) };
        let mut files = self.files.lock();
        if let Some(file) = files.get(&place.path) {
            return Ok(Some(file.clone()));
        }
        let file = BlockFile::open(path).map_err(|error| error.to_string())?;
        let file = Arc::new(file);
        files.insert(place.path.clone(), file.clone());
        Ok(Some(file))
    }
}

impl Fetcher for LocalFetcher {
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done) {
        let shared = &self.shared;
        let place = shared.checkpoint.expert_place(key);
        let file = place.map_err(|error| error.to_string()).and_then(|place| {
            let file = shared.file(&place)?;
            Ok((place, file))
        });
        let job = match file {
            Err(reason) => {
                Job::Tell { fetched: Fetched::Failed(StoreError::Unreadable { key, reason }), done }
            }
            Ok((_, None)) => Job::Copy { key, slot, done },
            Ok((place, Some(file))) => {
                let weak = Arc::downgrade(shared);
                let finished = move |read: std::io::Result<Slot>| {
                    let Some(shared) = weak.upgrade() else { return done(Fetched::Cancelled) };
                    shared.under_way.lock().remove(&key);
                    let job = match read {
                        Ok(slot) => match own(key, slot) {
                            Ok(bytes) => Job::Verify { key, bytes, done },
                            Err(error) => Job::Tell { fetched: Fetched::Failed(error), done },
                        },
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                            Job::Tell { fetched: Fetched::Cancelled, done }
                        }
                        Err(error) => {
                            Job::Tell { fetched: Fetched::Failed(unreadable(key, &error)), done }
                        }
                    };
                    // The threads live as long as the fetcher.
                    let _ = shared.verify.send(job);
                };
                let priority = match urgency {
                    Urgency::Demand => Priority::Demand,
                    Urgency::Prefetch => Priority::Prefetch,
                };
                // Locked until its number is noted: it may end before.
                let mut under_way = shared.under_way.lock();
                let done = Box::new(finished);
                let id =
                    shared.reader.submit(Read { file, offset: place.offset, slot, priority, done });
                under_way.insert(key, id);
                return;
            }
        };
        // As above.
        let _ = shared.verify.send(job);
    }

    fn promote(&self, key: ExpertKey) {
        if let Some(id) = self.shared.under_way.lock().get(&key) {
            self.shared.reader.promote(*id);
        }
    }

    fn cancel(&self, key: ExpertKey) {
        let id = self.shared.under_way.lock().get(&key).copied();
        if let Some(id) = id {
            self.shared.reader.cancel(id);
        }
    }

    fn describe(&self) -> String {
        self.shared.reader.describe()
    }
}
