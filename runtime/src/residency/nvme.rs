//! A cache of experts in a folder of a local disk, between the host's memory and an archive.
//!
//! ```text
//! fetch ─┬─ on the disk ──▶ block reader ──▶ verify ─┬─ right ──▶ answer
//!        │                                           └─ wrong, or it cannot be read ─┐
//!        └─ not there ──▶ archive (verifies) ◀───── the same slot ───────────────────┘
//!                            ├──▶ answer
//!                            └──▶ copy, if the disk keeps up ──▶ writing thread ──▶ disk
//! a peer brought it (it is verified) ──▶ keep ──┘
//! ```
//!
//! Which files there are, and who goes, is in `disk.rs`. Nothing in the folder is believed: every
//! expert that leaves it is verified by the checkpoint's hash. So it needs no syncing, survives
//! restarts and kills, and may be damaged or deleted at any time: that costs a fetch from the archive.
//! A disk that takes nothing more costs speed, never an answer.
//!
//! Invariants: a fetch has one slot, from its beginning to its end, whatever fails on the way; a file
//! that is being read is not deleted; what waits to be written is [`WRITES_MAX`] experts at most,
//! beside the budget of the memory, and whoever finds no place there is not kept.

mod disk;

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread::{self, JoinHandle},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use lite_llm_kernels::slots::{SLOT_ALIGN, Slot, SlotPool};
use parking_lot::Mutex;

use self::disk::{Disk, name};
use super::{
    fetch::{Done, Fetched, Fetcher, ResidenceStats, priority},
    machine::Urgency,
    policy::Policy,
    work::{Answer, Next, Queue, Tally},
};
use crate::{
    blocks::{BlockFile, BlockReader, Read, ReadId, Unread, write_file},
    checkpoint::Checkpoint,
    expert::{ExpertKey, GatedMlp},
};

/// Experts that wait to be written, the largest ones; of smaller ones as many as take their room.
pub const WRITES_MAX: usize = 4;

/// What a disk cache is made of.
#[derive(Debug)]
pub struct NvmeOptions {
    /// Folder on the disk, of this process alone.
    pub folder: PathBuf,
    /// Bytes that its files may have.
    pub budget: u64,
    /// Whose experts.
    pub checkpoint: Arc<Checkpoint>,
    /// Reads the files.
    pub reader: Arc<BlockReader>,
    /// Where experts come from that are not on the disk.
    pub below: Arc<dyn Fetcher>,
    /// Who is to be let go. It hears of every expert that is asked for, each as a token's only one.
    pub policy: Box<dyn Policy>,
    /// Threads that verify what was read.
    pub threads: usize,
}

/// See the module's text.
pub struct NvmeFetcher {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Held while this process may write to the folder.
    lock: Mutex<Option<File>>,
}

struct Shared {
    /// What the user named.
    root: PathBuf,
    /// The checkpoint's part of it.
    folder: PathBuf,
    checkpoint: Arc<Checkpoint>,
    reader: Arc<BlockReader>,
    below: Arc<dyn Fetcher>,
    disk: Mutex<Disk>,
    /// Locked while a fetch is handed on, so that who promotes or cancels it finds it somewhere.
    under_way: Mutex<HashMap<ExpertKey, Fetch>>,
    queue: Arc<Queue<Job>>,
    /// Memory of what waits to be written.
    staging: Arc<SlotPool>,
    write: Mutex<Option<Sender<(ExpertKey, Slot)>>>,
    tally: Tally,
}

/// A fetch that was not answered yet.
struct Fetch {
    urgency: Urgency,
    cancelled: bool,
    /// While the reader has it. Else it is in the queue, or below.
    read: Option<ReadId>,
}

/// Work of the threads that verify. The slot comes first: it is given back before the answer is told,
/// also in a panic.
enum Job {
    Verify(Slot, Answer),
    Unread(Unread, Answer),
}

impl fmt::Debug for NvmeFetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NvmeFetcher({}, {:?})", self.shared.root.display(), self.shared.below)
    }
}

impl NvmeFetcher {
    /// A cache in a folder, with what an earlier process has left there.
    ///
    /// # Errors
    /// If there is no such folder and it cannot be made, if another process uses it, or if the model
    /// has no experts. A folder that cannot be written to is no error: what is there is used.
    pub fn open(options: NvmeOptions) -> io::Result<Self> {
        let NvmeOptions { folder: root, budget, checkpoint, reader, below, policy, threads } =
            options;
        let (disk, folder, lock) = disk::open(&root, budget, &checkpoint, policy)?;
        let largest = checkpoint.tier_expert_bytes().into_iter().max().unwrap_or(0);
        let staging = WRITES_MAX as u64 * largest.next_multiple_of(SLOT_ALIGN as u64);
        let (write, writes) = bounded(WRITES_MAX);
        let shared = Arc::new(Shared {
            root,
            folder,
            checkpoint,
            reader,
            below,
            disk: Mutex::new(disk),
            under_way: Mutex::default(),
            queue: Queue::new(),
            staging: SlotPool::new(staging),
            write: Mutex::new(Some(write)),
            tally: Tally::default(),
        });
        // Made first: if a thread cannot be had, dropping it ends the others.
        let (writer, lock) = (Mutex::new(None), Mutex::new(lock));
        let fetcher = Self { shared: shared.clone(), writer, lock };
        let of_thread = shared.clone();
        let writer = thread::Builder::new().name("nvme-write".into());
        *fetcher.writer.lock() = Some(writer.spawn(move || of_thread.write_all(&writes))?);
        let of_threads = shared.clone();
        shared.queue.work("nvme", threads, move |next| of_threads.work(next))?;
        Ok(fetcher)
    }
}

impl Drop for NvmeFetcher {
    /// Ends when what waits to be written is written: then another process may use the folder.
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.queue.close();
        let under_way: Vec<ReadId> =
            shared.under_way.lock().values().filter_map(|fetch| fetch.read).collect();
        under_way.into_iter().for_each(|id| shared.reader.cancel(id));
        self.retire();
    }
}

impl Shared {
    fn work(self: &Arc<Self>, next: Next<Job>) {
        match next {
            Next::Begin(Job::Verify(slot, answer)) => {
                let key = answer.key;
                match self.checkpoint.expert_from(key, slot) {
                    Ok(expert) => {
                        self.disk.lock().release(key);
                        self.under_way.lock().remove(&key);
                        self.tally.hit(expert.bytes());
                        answer.tell(Fetched::Here(expert));
                    }
                    Err((error, slot)) => {
                        self.lost(key, &error);
                        self.again(slot, answer, &error);
                    }
                }
            }
            Next::Begin(Job::Unread(Unread { error, slot }, answer))
                if error.kind() != io::ErrorKind::Interrupted =>
            {
                self.lost(answer.key, &error);
                self.again(slot, answer, &error);
            }
            Next::Begin(Job::Unread(unread, answer))
            | Next::Cancelled(Job::Unread(unread, answer)) => {
                drop(unread);
                self.cancelled(answer);
            }
            Next::Cancelled(Job::Verify(slot, answer)) => {
                drop(slot);
                self.cancelled(answer);
            }
        }
    }

    fn cancelled(&self, answer: Answer) {
        self.disk.lock().release(answer.key);
        self.under_way.lock().remove(&answer.key);
        answer.tell(Fetched::Cancelled);
    }

    /// A file is not what it should be.
    fn lost(&self, key: ExpertKey, error: &dyn fmt::Display) {
        tracing::warn!(%key, %error, "it is not on the disk as it was written, and comes from below");
        self.tally.damaged.fetch_add(1, Relaxed);
        self.disk.lock().lost(key);
    }

    /// Fetches from below what the disk did not give.
    fn again(self: &Arc<Self>, slot: Option<Slot>, answer: Answer, error: &dyn fmt::Display) {
        let key = answer.key;
        let mut under_way = self.under_way.lock();
        let fetch = under_way.remove(&key);
        let (urgency, cancelled) =
            fetch.map_or((Urgency::Demand, false), |fetch| (fetch.urgency, fetch.cancelled));
        match slot {
            Some(slot) if !cancelled => self.from_below(&mut under_way, slot, urgency, answer),
            Some(slot) => {
                drop((under_way, slot));
                answer.tell(Fetched::Cancelled);
            }
            // The system may still write into it, so it counts; another has no room.
            None => {
                drop(under_way);
                answer.fail(error);
            }
        }
    }

    /// Fetches from below, and keeps what comes.
    fn from_below(
        self: &Arc<Self>,
        under_way: &mut HashMap<ExpertKey, Fetch>,
        slot: Slot,
        urgency: Urgency,
        answer: Answer,
    ) {
        let key = answer.key;
        under_way.insert(key, Fetch { urgency, cancelled: false, read: None });
        // Below ends when this does.
        let shared = Arc::downgrade(self);
        let done = Box::new(move |fetched| {
            if let Some(shared) = shared.upgrade() {
                shared.under_way.lock().remove(&key);
                if !matches!(fetched, Fetched::Cancelled) {
                    shared.tally.misses.fetch_add(1, Relaxed);
                }
                if let Fetched::Here(expert) = &fetched {
                    shared.offer(key, expert);
                }
            }
            answer.tell(fetched);
        });
        self.below.fetch(key, slot, urgency, done);
    }

    /// Has an expert written, unless the disk has no room or is behind.
    fn offer(&self, key: ExpertKey, expert: &GatedMlp) {
        // A copy: what is computed with goes back to its pool when that is over, not when it is
        // written.
        let Ok(mut slot) = self.staging.take(expert.bytes() as usize) else { return };
        let admitted = self.disk.lock().admit(key);
        match admitted {
            Ok(true) => {}
            Ok(false) => return,
            Err(()) => {
                self.tally.failures.fetch_add(1, Relaxed);
                return;
            }
        }
        let mut rest = &mut slot[..];
        for matrix in [&expert.gate, &expert.up, &expert.down] {
            let (part, after) = rest.split_at_mut(matrix.data().len());
            part.copy_from_slice(matrix.data());
            rest = after;
        }
        let write = self.write.lock().clone();
        if write.is_none_or(|write| write.try_send((key, slot)).is_err()) {
            self.disk.lock().not_written(key);
        }
    }

    fn write_all(&self, writes: &Receiver<(ExpertKey, Slot)>) {
        for (key, mut slot) in writes {
            let written = write_one(&self.folder, &self.folder.join(name(key)), &mut slot);
            drop(slot);
            let mut disk = self.disk.lock();
            match written {
                Ok(()) => disk.written(key),
                Err(error) => {
                    self.tally.failures.fetch_add(1, Relaxed);
                    disk.not_written(key);
                    disk.failed(&error);
                }
            }
        }
    }

    /// Hands on what was read.
    fn was_read(self: &Arc<Self>, read: Result<Slot, Unread>, answer: Answer) {
        let key = answer.key;
        let job = match read {
            Ok(slot) => Job::Verify(slot, answer),
            Err(unread) => Job::Unread(unread, answer),
        };
        let mut under_way = self.under_way.lock();
        let urgency = under_way.get_mut(&key).map_or(Urgency::Demand, |fetch| {
            fetch.read = None;
            fetch.urgency
        });
        let closed = self.queue.push(key, urgency, job);
        drop(under_way);
        if let Err(job) = closed {
            self.work(Next::Cancelled(job));
        }
    }
}

/// Whether a file that was not opened is not there, or not ours to read.
fn is_about_the_file(error: &io::Error) -> bool {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound, Other, PermissionDenied};
    matches!(error.kind(), NotFound | PermissionDenied | NotADirectory | IsADirectory | Other)
}

/// Writes a file that has its name when it is whole.
fn write_one(folder: &Path, path: &Path, slot: &mut Slot) -> io::Result<()> {
    let staging = path.with_extension(disk::STAGING);
    let written = match write_file(&staging, slot) {
        // The folder may have been deleted.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(folder).and_then(|()| write_file(&staging, slot))
        }
        other => other,
    };
    let written = written.and_then(|()| fs::rename(&staging, path));
    if written.is_err() {
        let _ = fs::remove_file(&staging);
    }
    written
}

impl Fetcher for NvmeFetcher {
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done) {
        let (shared, answer) = (&self.shared, Answer::new(key, done));
        let here = shared.disk.lock().asked(key);
        let file = here.then(|| BlockFile::open(&shared.folder.join(name(key))));
        match &file {
            // For want of descriptors, say. The file may be what it was.
            Some(Err(error)) if !is_about_the_file(error) => {
                shared.tally.failures.fetch_add(1, Relaxed);
                shared.disk.lock().release(key);
            }
            Some(Err(error)) => shared.lost(key, error),
            Some(Ok(_)) | None => {}
        }
        let mut under_way = shared.under_way.lock();
        let Some(Ok(file)) = file else {
            return shared.from_below(&mut under_way, slot, urgency, answer);
        };
        let of_reader = shared.clone();
        let done = Box::new(move |read| of_reader.was_read(read, answer));
        let read =
            Read { file: Arc::new(file), offset: 0, slot, priority: priority(urgency), done };
        let read = Some(shared.reader.submit(read));
        under_way.insert(key, Fetch { urgency, cancelled: false, read });
    }

    fn promote(&self, key: ExpertKey) {
        let Shared { under_way, reader, queue, below, .. } = &*self.shared;
        let mut under_way = under_way.lock();
        let Some(fetch) = under_way.get_mut(&key) else { return };
        fetch.urgency = Urgency::Demand;
        match fetch.read {
            Some(id) => reader.promote(id),
            None => {
                queue.promote(key);
                below.promote(key);
            }
        }
    }

    fn cancel(&self, key: ExpertKey) {
        let Shared { under_way, reader, queue, below, .. } = &*self.shared;
        let mut under_way = under_way.lock();
        let Some(fetch) = under_way.get_mut(&key) else { return };
        fetch.cancelled = true;
        match fetch.read {
            Some(id) => reader.cancel(id),
            None => {
                queue.cancel(key);
                below.cancel(key);
            }
        }
    }

    fn keep(&self, key: ExpertKey, expert: &GatedMlp) {
        let here = {
            let mut disk = self.shared.disk.lock();
            let here = disk.asked(key);
            if here {
                disk.release(key);
            }
            here
        };
        if !here {
            self.shared.offer(key, expert);
        }
    }

    /// Ends when what waits to be written is written: then another may use the folder.
    fn retire(&self) {
        self.shared.write.lock().take();
        if let Some(writer) = self.writer.lock().take() {
            let _ = writer.join();
        }
        // What is still being read deletes nothing of whoever is next.
        self.shared.disk.lock().close();
        self.lock.lock().take();
    }

    fn describe(&self) -> String {
        let Shared { root, reader, below, disk, .. } = &*self.shared;
        let gib = disk.lock().budget() as f64 / (1u64 << 30) as f64;
        let (root, by) = (root.display(), reader.describe());
        format!("{gib:.1} GiB of {root} by {by}, then {}", below.describe())
    }

    fn residences(&self) -> Vec<ResidenceStats> {
        let Shared { root, tally, below, disk, .. } = &*self.shared;
        let (held, budget) = {
            let disk = disk.lock();
            (disk.held(), disk.budget())
        };
        let name = format!("nvme {}", root.display());
        let mut all = vec![tally.stats(name, held, Some(budget))];
        all.extend(below.residences());
        all
    }
}
