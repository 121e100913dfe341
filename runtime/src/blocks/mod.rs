//! Reads blocks of local files into slots of memory: many at once, the urgent ones first, past the
//! system's page cache, so that what a process holds is what it counts and nothing is copied.
//!
//! Invariants: every read that was submitted is answered exactly once, from a thread of the reader's
//! (never from within [`BlockReader::submit`] or [`BlockReader::cancel`]), at the latest when the
//! reader is dropped; what is asked of the disk at any time is bounded; while a demanded read waits,
//! nothing is asked for on behalf of a prefetch.
//!
//! One thread drives io_uring where the system allows it. Elsewhere (older kernels, most containers'
//! seccomp profiles) some threads call pread.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use lite_llm_kernels::slots::Slot;
use parking_lot::{Condvar, Mutex};

use self::queue::{Job, Queue};
pub use self::{
    file::{BlockFile, write_file},
    queue::Priority,
};

#[cfg(target_os = "linux")]
mod by_ring;
mod by_threads;
mod file;
pub mod measure;
mod queue;
#[cfg(target_os = "linux")]
mod ring;

/// Reads of this alignment in the file go past the page cache.
pub const BLOCK_ALIGN: u64 = lite_llm_kernels::slots::SLOT_ALIGN as u64;

/// How long any thread sleeps before it looks again whether it is still needed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Told when a read ended: the slot, full, or why it is not.
pub type Done = Box<dyn FnOnce(Result<Slot, Unread>) + Send>;

/// A read that failed or was cancelled.
#[derive(Debug)]
pub struct Unread {
    /// Why.
    pub error: io::Error,
    /// The slot, with any content; none where the system may still write into it.
    pub slot: Option<Slot>,
}

impl From<Unread> for io::Error {
    fn from(unread: Unread) -> Self {
        unread.error
    }
}

/// A read to be done.
pub struct Read {
    /// Of what.
    pub file: Arc<BlockFile>,
    /// Where it begins in the file, in bytes. Multiples of [`BLOCK_ALIGN`] are read directly,
    /// others through the page cache.
    pub offset: u64,
    /// What is filled, all of its length. The bytes up to its next multiple of 4 KiB may be
    /// written to as well.
    pub slot: Slot,
    /// How urgent it is.
    pub priority: Priority,
    /// Called once, on a thread of the reader's, which meanwhile starts no other read: it should
    /// hand on what it gets. Errors name the file and the position;
    /// [`Interrupted`](io::ErrorKind::Interrupted) says that the read was cancelled, or that the
    /// reader was dropped; [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) that the file ends
    /// before the read does.
    pub done: Done,
}

/// Names a read to its [`BlockReader`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReadId(u64);

/// How blocks are read.
#[derive(Debug, Clone)]
pub struct BlockOptions {
    /// Use io_uring, if the system allows it.
    pub ring: bool,
    /// Read past the page cache, where the file system allows it.
    pub direct: bool,
    /// Bytes of one request to the disk, at most: reads are cut into equal parts. Larger ones cost
    /// less time of the processor, smaller ones let a demand begin earlier.
    pub chunk: usize,
    /// Bytes in flight from which on no more is asked for. Where there is no io_uring, `threads`
    /// limits what is in flight.
    pub in_flight: usize,
    /// The same for prefetches: a demand that comes waits for these at most.
    pub prefetch_in_flight: usize,
    /// Threads, where there is no io_uring.
    pub threads: usize,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            ring: true,
            direct: true,
            chunk: 1 << 20,
            in_flight: 16 << 20,
            prefetch_in_flight: 4 << 20,
            threads: 8,
        }
    }
}

/// What a reader has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that ended well.
    pub reads: u64,
    /// Bytes of these, as asked for.
    pub bytes: u64,
    /// Reads that were cancelled, or left when the reader was dropped.
    pub cancelled: u64,
    /// Reads that failed.
    pub failed: u64,
    /// Requests made of the system.
    pub requests: u64,
    /// Requests among them that went through the page cache.
    pub cached: u64,
    /// Requests among them that had to be made again: after a signal, a short read, or a refusal
    /// of O_DIRECT.
    pub again: u64,
    /// Reads submitted and not answered now.
    pub waiting: u64,
}

/// What the reader's threads share with it.
struct Shared {
    options: BlockOptions,
    queue: Mutex<Queue>,
    /// Wakes the threads of [`by_threads`].
    arrived: Condvar,
    /// The ring's thread drives the reads.
    by_ring: AtomicBool,
    #[cfg(target_os = "linux")]
    bell: Option<ring::Bell>,
    tally: Tally,
}

#[derive(Default)]
struct Tally {
    reads: AtomicU64,
    bytes: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    requests: AtomicU64,
    cached: AtomicU64,
    /// Aligned requests among them, which would have gone past the page cache.
    undirected: AtomicBool,
    again: AtomicU64,
    waiting: AtomicU64,
}

/// Reads blocks of files; see the module's text. Dropping it cancels what has not begun, waits for
/// what has, and answers both.
pub struct BlockReader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl BlockReader {
    /// Starts the reader's threads. Fails only where the system gives none.
    pub fn new(options: BlockOptions) -> io::Result<Arc<Self>> {
        let options = BlockOptions {
            // A request's length is 32 bits for the ring.
            chunk: options.chunk.clamp(BLOCK_ALIGN as usize, 1 << 30),
            threads: options.threads.clamp(1, 64),
            ..options
        };
        #[cfg(target_os = "linux")]
        let bell = options.ring.then(ring::Bell::new).and_then(Result::ok);
        let shared = Arc::new(Shared {
            options,
            queue: Mutex::default(),
            arrived: Condvar::new(),
            by_ring: AtomicBool::new(false),
            #[cfg(target_os = "linux")]
            bell,
            tally: Tally::default(),
        });
        // Made first: if a thread cannot be had, dropping it ends the others.
        let mut reader = Self { shared: shared.clone(), threads: Vec::new() };
        #[cfg(target_os = "linux")]
        if shared.bell.is_some()
            && let Some(thread) = by_ring::start(shared.clone())?
        {
            reader.threads.push(thread);
            return Ok(Arc::new(reader));
        }
        for number in 0..shared.options.threads {
            let shared = shared.clone();
            let thread = thread::Builder::new().name(format!("blocks-{number}"));
            reader.threads.push(thread.spawn(move || by_threads::work(&shared))?);
        }
        Ok(Arc::new(reader))
    }

    /// Queues a read. It is answered through its `done`.
    pub fn submit(&self, read: Read) -> ReadId {
        self.shared.tally.waiting.fetch_add(1, Relaxed);
        ReadId(self.change(|queue| queue.push(read)))
    }

    /// Makes a prefetch a demand. Does nothing to a read that has ended.
    pub fn promote(&self, ReadId(id): ReadId) {
        self.change(|queue| queue.promote(id));
    }

    /// Cancels what has not been asked of the disk yet of a read: its `done` is told
    /// [`Interrupted`](io::ErrorKind::Interrupted), unless all of it was asked for.
    pub fn cancel(&self, ReadId(id): ReadId) {
        self.change(|queue| queue.cancel(id));
    }

    /// How it reads, for people.
    pub fn describe(&self) -> String {
        let by = if self.shared.by_ring.load(Relaxed) { "io_uring" } else { "pread" };
        let cached = !self.shared.options.direct || self.shared.tally.undirected.load(Relaxed);
        format!("{by}, {}", if cached { "page cache" } else { "O_DIRECT" })
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        let tally = &self.shared.tally;
        let get = |number: &AtomicU64| number.load(Relaxed);
        Counters {
            reads: get(&tally.reads),
            bytes: get(&tally.bytes),
            cancelled: get(&tally.cancelled),
            failed: get(&tally.failed),
            requests: get(&tally.requests),
            cached: get(&tally.cached),
            again: get(&tally.again),
            waiting: get(&tally.waiting),
        }
    }

    /// Changes the queue, and wakes who waits for that.
    fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let mut queue = self.shared.queue.lock();
        let result = change(&mut queue);
        // Set again under this lock, by who goes to sleep.
        let asleep = std::mem::take(&mut queue.asleep);
        drop(queue);
        self.shared.arrived.notify_one();
        #[cfg(target_os = "linux")]
        if let Some(bell) = self.shared.bell.as_ref().filter(|_| asleep) {
            bell.ring();
        }
        #[cfg(not(target_os = "linux"))]
        let _ = asleep;
        result
    }
}

impl fmt::Debug for BlockReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockReader({}, {:?})", self.describe(), self.counters())
    }
}

impl Drop for BlockReader {
    fn drop(&mut self) {
        self.change(Queue::close);
        self.shared.arrived.notify_all();
        for thread in self.threads.drain(..) {
            // The last to hold the reader may be a `done`, on this very thread. Others end when
            // what was asked of the disk has come, or after a while if it does not.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    /// Tells a read's owner how it ended.
    fn answer(&self, done: Done, result: Result<Slot, Unread>) {
        let tally = &self.tally;
        tally.waiting.fetch_sub(1, Relaxed);
        let ended = match &result {
            Ok(slot) => {
                tally.bytes.fetch_add(slot.len() as u64, Relaxed);
                &tally.reads
            }
            Err(unread) if unread.error.kind() == io::ErrorKind::Interrupted => &tally.cancelled,
            Err(_) => &tally.failed,
        };
        ended.fetch_add(1, Relaxed);
        // A panic was printed when it happened; other reads' owners are not to blame for it.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| done(result)));
    }

    /// Tells those whose reads were cancelled before they began.
    fn answer_cancelled(&self, jobs: Vec<Job>) {
        for job in jobs {
            let error = job.file.error(job.offset, job.slot.len(), &interrupted());
            self.answer(job.done, Err(Unread { error, slot: Some(job.slot) }));
        }
    }
}

/// Bytes of the parts that a read is cut into. They are equal: a small one at the end would cost as
/// much as a large one.
#[cfg(target_os = "linux")]
fn part_bytes(bytes: usize, chunk: usize) -> usize {
    bytes.div_ceil(bytes.div_ceil(chunk).max(1)).next_multiple_of(BLOCK_ALIGN as usize)
}

fn interrupted() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "cancelled")
}
