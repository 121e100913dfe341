//! Threads that do a fetcher's work, the urgent first, and the promise that every fetch is answered.
//!
//! Invariants: nothing that is put into a [`Queue`] is lost: a thread begins it, or is told that it
//! was cancelled; a panic ends one job, not its thread; an [`Answer`] is told once, in a panic too.
//! No answer comes from within [`Queue::push`], [`Queue::cancel`] or [`Queue::close`].

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use parking_lot::{Condvar, Mutex};

use super::{
    fetch::{Done, Fetched, ResidenceStats},
    machine::Urgency,
};
use crate::expert::{ExpertKey, StoreError};

/// Who is to be told how a fetch ended.
pub(super) struct Answer {
    pub(super) key: ExpertKey,
    done: Option<Done>,
}

impl Answer {
    pub(super) fn new(key: ExpertKey, done: Done) -> Self {
        Self { key, done: Some(done) }
    }

    /// Tells it. What was fetched into must have been given back before.
    pub(super) fn tell(mut self, fetched: Fetched) {
        if let Some(done) = self.done.take() {
            done(fetched);
        }
    }

    /// Tells that it could not be had.
    pub(super) fn fail(self, reason: impl ToString) {
        let (key, reason) = (self.key, reason.to_string());
        self.tell(Fetched::Failed(StoreError::Unreadable { key, reason }));
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            let reason = "reading it failed in a way that was not foreseen; the log says where";
            let error = StoreError::Unreadable { key: self.key, reason: reason.into() };
            // Already unwinding, another panic would end the process.
            let _ = catch_unwind(AssertUnwindSafe(|| done(Fetched::Failed(error))));
        }
    }
}

/// What a thread is to do.
pub(super) enum Next<J> {
    Begin(J),
    /// It was cancelled before it began, or the queue was closed.
    Cancelled(J),
}

struct Waiting<J> {
    demands: VecDeque<(ExpertKey, J)>,
    prefetches: VecDeque<(ExpertKey, J)>,
    cancelled: Vec<J>,
    closed: bool,
}

/// Jobs by urgency. It has no bound of its own: every job has a slot of a pool, whose budget is the
/// bound.
pub(super) struct Queue<J> {
    waiting: Mutex<Waiting<J>>,
    arrived: Condvar,
}

impl<J: Send + 'static> Queue<J> {
    pub(super) fn new() -> Arc<Self> {
        let waiting = Waiting {
            demands: VecDeque::new(),
            prefetches: VecDeque::new(),
            cancelled: Vec::new(),
            closed: false,
        };
        Arc::new(Self { waiting: Mutex::new(waiting), arrived: Condvar::new() })
    }

    /// Starts threads that do the jobs until the queue is closed and empty. If one cannot be had,
    /// the queue is closed.
    pub(super) fn work(
        self: &Arc<Self>,
        name: &str,
        threads: usize,
        work: impl Fn(Next<J>) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let work = Arc::new(work);
        for number in 0..threads.max(1) {
            let (queue, work) = (self.clone(), work.clone());
            let thread = thread::Builder::new().name(format!("{name}-{number}"));
            let started = thread.spawn(move || {
                while let Some(next) = queue.next() {
                    // It was printed when it happened, and whoever waits was told by its answer.
                    let _ = catch_unwind(AssertUnwindSafe(|| work(next)));
                }
            });
            if let Err(error) = started {
                self.close();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Queues a job; gives it back if the queue is closed.
    pub(super) fn push(&self, key: ExpertKey, urgency: Urgency, job: J) -> Result<(), J> {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return Err(job);
        }
        match urgency {
            Urgency::Demand => waiting.demands.push_back((key, job)),
            Urgency::Prefetch => waiting.prefetches.push_back((key, job)),
        }
        drop(waiting);
        self.arrived.notify_one();
        Ok(())
    }

    /// Somebody waits for it now.
    pub(super) fn promote(&self, key: ExpertKey) {
        let mut waiting = self.waiting.lock();
        if let Some(at) = waiting.prefetches.iter().position(|(other, _)| *other == key) {
            let job = waiting.prefetches.remove(at);
            waiting.demands.extend(job);
        }
    }

    /// It is not to be begun any more.
    pub(super) fn cancel(&self, key: ExpertKey) {
        let mut guard = self.waiting.lock();
        let waiting = &mut *guard;
        for queue in [&mut waiting.prefetches, &mut waiting.demands] {
            if let Some(at) = queue.iter().position(|(other, _)| *other == key) {
                waiting.cancelled.extend(queue.remove(at).map(|(_, job)| job));
            }
        }
        drop(guard);
        self.arrived.notify_one();
    }

    /// Takes no more, and cancels what has not begun.
    pub(super) fn close(&self) {
        let mut guard = self.waiting.lock();
        let waiting = &mut *guard;
        waiting.closed = true;
        let jobs = waiting.demands.drain(..).chain(waiting.prefetches.drain(..));
        waiting.cancelled.extend(jobs.map(|(_, job)| job));
        drop(guard);
        self.arrived.notify_all();
    }

    fn next(&self) -> Option<Next<J>> {
        let mut waiting = self.waiting.lock();
        loop {
            if let Some(job) = waiting.cancelled.pop() {
                return Some(Next::Cancelled(job));
            }
            if let Some((_, job)) = waiting.demands.pop_front() {
                return Some(Next::Begin(job));
            }
            if let Some((_, job)) = waiting.prefetches.pop_front() {
                return Some(Next::Begin(job));
            }
            if waiting.closed {
                return None;
            }
            self.arrived.wait(&mut waiting);
        }
    }
}

/// What a residence has done so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) damaged: AtomicU64,
    pub(super) failures: AtomicU64,
}

impl Tally {
    /// An expert was brought from here.
    pub(super) fn hit(&self, bytes: u64) {
        self.hits.fetch_add(1, Relaxed);
        self.bytes_read.fetch_add(bytes, Relaxed);
    }

    pub(super) fn stats(&self, name: String, held: u64, budget: Option<u64>) -> ResidenceStats {
        let get = |number: &AtomicU64| number.load(Relaxed);
        ResidenceStats {
            name,
            held,
            budget,
            hits: get(&self.hits),
            misses: get(&self.misses),
            bytes_read: get(&self.bytes_read),
            damaged: get(&self.damaged),
            failures: get(&self.failures),
            ..ResidenceStats::default()
        }
    }
}
