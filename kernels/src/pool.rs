//! Compute threads that share the tasks of one operation.
//!
//! A [`Pool`] of n threads is the caller of [`Pool::run`] and n − 1 workers. Tasks are claimed
//! from a counter, so which thread computes what varies; results must not depend on it.
//!
//! Invariants:
//! - workers *join* a job while it is open and only then read it; `run` closes the job and
//!   waits for those who joined, so a sleeping worker delays nobody and no job outlives its `run`;
//! - one job at a time: callers on several threads take turns; a task that calls `run` again
//!   computes its inner tasks itself;
//! - `run` allocates nothing;
//! - an idle worker spins for a while ([`SPIN`], if nothing else is asked for) and then sleeps; while it spins it may fetch what
//!   was announced with [`Pool::announce`], as may the caller between two jobs.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    fmt, hint,
    panic::{self, AssertUnwindSafe},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread,
    time::{Duration, Instant},
};

use crate::simd::prefetch;

/// How long an idle thread spins before it parks, if nothing else is asked for.
pub const SPIN: Duration = Duration::from_micros(50);

/// Bytes of what is expected per thread that fetches: a part of its own cache.
const FETCH_MAX: usize = 256 << 10;
/// Bytes that it prefetches between two checks for work.
const FETCH_STEP: usize = 2 << 10;

/// Low bits of the state: how many workers have joined the open job.
const JOINED: u64 = (1 << 31) - 1;
/// Set while workers may join.
const OPEN: u64 = 1 << 31;
/// One step of the job number, in the high bits.
const JOB: u64 = 1 << 32;

type Task = dyn Fn(usize) + Sync;
type Payload = Box<dyn Any + Send>;

thread_local! {
    /// Whether this thread is computing a task of some pool.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of compute threads.
pub struct Pool {
    shared: Arc<Shared>,
    turn: Mutex<()>,
    workers: Vec<thread::JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const Task,
    tasks: usize,
}

#[repr(align(128))]
struct OwnLine<T>(T);

struct Shared {
    state: OwnLine<AtomicU64>,
    next: OwnLine<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    spin: Duration,
    sleepers: AtomicUsize,
    caller_sleeps: AtomicBool,
    bed: Mutex<()>,
    wake_workers: Condvar,
    wake_caller: Condvar,
    panicked: Mutex<Option<Payload>>,
    /// What is expected to be read next and has not been fetched: first byte and end. Only ever
    /// fetched, never read, so nothing is lost if the two do not match for a moment.
    expected: [AtomicUsize; 2],
    /// Jobs that have ended.
    jobs: AtomicU64,
}

// SAFETY: `job` is written only while the state is closed and nobody has joined, by the one
// caller whose turn it is, and read only by threads that have joined an open job; the state's
// atomic operations order the two. The task pointer is `Sync` to call and outlives its job.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] among them.
    ///
    /// # Panics
    /// If `threads` is zero or the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        Self::spinning(threads, SPIN)
    }

    /// [`Pool::new`], whose idle threads spin for so long before they sleep.
    ///
    /// # Panics
    /// As [`Pool::new`].
    pub fn spinning(threads: usize, spin: Duration) -> Self {
        assert!(threads >= 1, "a pool has at least its caller");
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            state: OwnLine(AtomicU64::new(0)),
            next: OwnLine(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            // More threads than cores: a spinning thread would keep the core from a working one.
            spin: if threads <= cores { spin } else { Duration::ZERO },
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            bed: Mutex::new(()),
            wake_workers: Condvar::new(),
            wake_caller: Condvar::new(),
            panicked: Mutex::new(None),
            expected: [const { AtomicUsize::new(0) }; 2],
            jobs: AtomicU64::new(0),
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = shared.clone();
                thread::Builder::new()
                    .name(format!("compute-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system starts a compute thread")
            })
            .collect();
        Self { shared, turn: Mutex::new(()), workers }
    }

    /// Threads, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Jobs that have ended so far: it stands still where the threads are stuck or idle.
    pub fn progress(&self) -> u64 {
        self.shared.jobs.load(Relaxed)
    }

    /// Says what the next jobs probably read first; idle threads fetch some of it.
    pub fn announce(&self, bytes: &[u8]) {
        let len = bytes.len().min(self.workers.len().max(1) * FETCH_MAX);
        let [at, end] = &self.shared.expected;
        let start = bytes.as_ptr().addr();
        end.store(0, Relaxed);
        at.store(start, Relaxed);
        end.store(start + len, Relaxed);
    }

    /// Fetches a piece of what is expected, for a caller who has nothing else to do. Returns
    /// whether there was one.
    pub fn prefetch_piece(&self) -> bool {
        self.shared.fetch()
    }

    /// Calls `task(0)` … `task(tasks - 1)`, each once, on all threads; returns when all are done.
    ///
    /// # Panics
    /// With a task's own panic, after the tasks that had begun have ended.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || IN_TASK.get() {
            (0..tasks).for_each(task);
            self.shared.jobs.fetch_add(1, Relaxed);
            return;
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased for the time of this call only: `finish` below waits
        // until no thread can reach the task any more, and nothing between can unwind.
        let task: *const Task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), _>(task) };
        // SAFETY: it is our turn, and the last job was closed and left by all.
        unsafe { *shared.job.get() = Some(Job { task, tasks }) };
        shared.next.0.store(0, Relaxed);
        let before = shared.state.0.load(Relaxed);
        shared.state.0.store((before & !(JOINED | OPEN)).wrapping_add(JOB) | OPEN, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            drop(lock(&shared.bed));
            shared.wake_workers.notify_all();
        }
        shared.claim(Job { task, tasks });
        shared.finish();
        shared.jobs.fetch_add(1, Relaxed);
        let payload = lock(&shared.panicked).take();
        if let Some(payload) = payload {
            panic::resume_unwind(payload);
        }
    }
}

impl Shared {
    /// Claims tasks of a job until none is left.
    fn claim(&self, job: Job) {
        IN_TASK.set(true);
        loop {
            let i = self.next.0.fetch_add(1, Relaxed);
            if i >= job.tasks {
                break;
            }
            // SAFETY: the job is open or we have joined it, so `run` has not returned.
            let task = unsafe { &*job.task };
            if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| task(i))) {
                lock(&self.panicked).get_or_insert(payload);
                self.next.0.store(job.tasks, Relaxed);
            }
        }
        IN_TASK.set(false);
    }

    /// Closes the job and waits until every worker that joined has left.
    fn finish(&self) {
        let mut state = self.state.0.fetch_and(!OPEN, SeqCst) & !OPEN;
        let from = Instant::now();
        while state & JOINED != 0 {
            if from.elapsed() < self.spin {
                hint::spin_loop();
            } else {
                let mut bed = lock(&self.bed);
                self.caller_sleeps.store(true, SeqCst);
                while self.state.0.load(SeqCst) & JOINED != 0 {
                    bed = self.wake_caller.wait(bed).unwrap_or_else(PoisonError::into_inner);
                }
                self.caller_sleeps.store(false, SeqCst);
            }
            state = self.state.0.load(SeqCst);
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        while let Some(job_number) = self.await_job(seen) {
            seen = job_number;
            if !self.join(job_number) {
                continue;
            }
            // SAFETY: we have joined, so the job stays as it is until we leave.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job {
                self.claim(job);
            }
            let state = self.state.0.fetch_sub(1, SeqCst) - 1;
            if state & (JOINED | OPEN) == 0 && self.caller_sleeps.load(SeqCst) {
                drop(lock(&self.bed));
                self.wake_caller.notify_one();
            }
        }
    }

    /// The number of an open job other than `seen`; `None` when the pool ends.
    fn await_job(&self, seen: u64) -> Option<u64> {
        let fresh = || {
            let state = self.state.0.load(SeqCst);
            (state & OPEN != 0 && state / JOB != seen).then_some(state / JOB)
        };
        let from = Instant::now();
        loop {
            if self.stop.load(SeqCst) {
                return None;
            }
            if let Some(job) = fresh() {
                return Some(job);
            }
            if from.elapsed() < self.spin {
                if !self.fetch() {
                    (0..16).for_each(|_| hint::spin_loop());
                }
                continue;
            }
            let mut bed = lock(&self.bed);
            self.sleepers.fetch_add(1, SeqCst);
            while fresh().is_none() && !self.stop.load(SeqCst) {
                bed = self.wake_workers.wait(bed).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, SeqCst);
        }
    }

    /// Fetches a piece of what is expected; whether there was one.
    fn fetch(&self) -> bool {
        let [at, end] = &self.expected;
        if at.load(Relaxed) >= end.load(Relaxed) {
            return false;
        }
        let from = at.fetch_add(FETCH_STEP, Relaxed);
        let to = end.load(Relaxed).min(from.saturating_add(FETCH_STEP));
        (from..to).step_by(64).for_each(|at| prefetch(ptr::without_provenance(at)));
        from < to
    }

    /// Joins job `number`, unless it has been closed meanwhile.
    fn join(&self, number: u64) -> bool {
        self.state
            .0
            .fetch_update(SeqCst, SeqCst, |state| {
                (state & OPEN != 0 && state / JOB == number).then_some(state + 1)
            })
            .is_ok()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(lock(&self.shared.bed));
        self.shared.wake_workers.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches every panic of its tasks, so there is nothing to learn here.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

/// Locks; a panic of another holder leaves nothing half done here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count_calls(pool: &Pool, tasks: usize) -> Vec<usize> {
        let calls: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|i| {
            calls[i].fetch_add(1, SeqCst);
        });
        calls.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_exactly_once_whatever_the_threads() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 3, 64, 1000] {
                assert_eq!(count_calls(&pool, tasks), vec![1; tasks]);
            }
        }
    }

    #[test]
    fn many_short_jobs_with_pauses_lose_no_wake_up() {
        let pool = Pool::new(3);
        for round in 0..3000 {
            assert_eq!(count_calls(&pool, 5), vec![1; 5]);
            if round % 100 == 0 {
                thread::sleep(Duration::from_micros(100));
            }
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        assert_eq!(count_calls(&pool, 9), vec![1; 9]);
                    }
                });
            }
        });
    }

    #[test]
    fn more_pools_than_cores_all_make_progress() {
        thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    let pool = Pool::new(2);
                    for _ in 0..300 {
                        assert_eq!(count_calls(&pool, 6), vec![1; 6]);
                    }
                });
            }
        });
    }

    #[test]
    fn expected_memory_is_never_touched_and_may_be_gone() {
        let pool = Pool::new(3);
        for _ in 0..200 {
            // Whoever read or wrote it once it is gone would be killed.
            let gone = memmap2::MmapMut::map_anon(64 << 10).unwrap();
            pool.announce(&gone);
            drop(gone);
            assert_eq!(count_calls(&pool, 4), vec![1; 4]);
            // Idle threads fetch now.
            thread::sleep(Duration::from_micros(20));
        }
    }

    #[test]
    fn a_caller_fetches_what_is_expected_piece_by_piece_to_its_end() {
        let pool = Pool::new(1);
        assert!(!pool.prefetch_piece(), "nothing was announced");
        for (bytes, pieces) in [(1, 1), (FETCH_STEP, 1), (5 * FETCH_STEP + 1, 6)] {
            pool.announce(&vec![0; bytes]);
            let fetched = (0..100).take_while(|_| pool.prefetch_piece()).count();
            assert_eq!(fetched, pieces, "{bytes} bytes");
        }
        pool.announce(&vec![0; 2 * FETCH_MAX]);
        let fetched = (0..10_000).take_while(|_| pool.prefetch_piece()).count();
        assert_eq!(fetched, FETCH_MAX / FETCH_STEP, "no more than its cache holds");
    }

    #[test]
    fn a_task_may_run_tasks_of_its_own() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        pool.run(8, &|_| {
            pool.run(8, &|_| {
                total.fetch_add(1, SeqCst);
            });
        });
        assert_eq!(total.into_inner(), 64);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for bad in [0, 3, 31] {
            let caught = panic::catch_unwind(AssertUnwindSafe(|| {
                pool.run(32, &|i| assert_ne!(i, bad, "task refuses"));
            }));
            assert!(caught.is_err());
            assert_eq!(count_calls(&pool, 32), vec![1; 32]);
        }
    }
}
