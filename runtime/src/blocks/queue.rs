//! What waits to be read: demands first, within them and within prefetches the oldest first.
//!
//! Invariant: a read is in one of the queues, or an engine has it and it is listed as under way.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use lite_llm_kernels::slots::Slot;

use super::{BlockFile, Done, Read};

/// How urgent a read is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for it.
    Demand,
    /// Somebody may want it soon.
    Prefetch,
}

/// A read, as engines do it.
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) file: Arc<BlockFile>,
    pub(super) offset: u64,
    pub(super) slot: Slot,
    pub(super) priority: Priority,
    pub(super) done: Done,
    /// Bytes at its beginning that are read already, where an engine puts it back.
    pub(super) read: usize,
}

/// What its owner said of a read since an engine has it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Said {
    pub(super) promoted: bool,
    pub(super) cancelled: bool,
}

#[derive(Default)]
pub(super) struct Queue {
    demands: VecDeque<Job>,
    prefetches: VecDeque<Job>,
    under_way: HashMap<u64, Said>,
    /// Something was said of a read that is under way.
    said: bool,
    cancelled: Vec<Job>,
    closed: bool,
    ids: u64,
    /// The ring's thread sleeps, and is to be woken.
    pub(super) asleep: bool,
}

impl Queue {
    pub(super) fn push(&mut self, read: Read) -> u64 {
        let Read { file, offset, slot, priority, done } = read;
        let id = self.ids;
        self.ids += 1;
        self.of(priority).push_back(Job { id, file, offset, slot, priority, done, read: 0 });
        id
    }

    fn of(&mut self, priority: Priority) -> &mut VecDeque<Job> {
        match priority {
            Priority::Demand => &mut self.demands,
            Priority::Prefetch => &mut self.prefetches,
        }
    }

    pub(super) fn promote(&mut self, id: u64) {
        if let Some(said) = self.under_way.get_mut(&id) {
            (said.promoted, self.said) = (true, true);
        } else if let Some(at) = self.prefetches.iter().position(|job| job.id == id) {
            let job = self.prefetches.remove(at).expect("it is there");
            self.demands.push_back(Job { priority: Priority::Demand, ..job });
        }
    }

    pub(super) fn cancel(&mut self, id: u64) {
        if let Some(said) = self.under_way.get_mut(&id) {
            (said.cancelled, self.said) = (true, true);
            return;
        }
        for queue in [&mut self.prefetches, &mut self.demands] {
            if let Some(at) = queue.iter().position(|job| job.id == id) {
                self.cancelled.extend(queue.remove(at));
            }
        }
    }

    /// Takes no more, and cancels what has not begun.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.cancelled.extend(self.demands.drain(..).chain(self.prefetches.drain(..)));
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Those to be told that their reads were cancelled.
    pub(super) fn take_cancelled(&mut self) -> Vec<Job> {
        std::mem::take(&mut self.cancelled)
    }

    /// The next read of a priority. It is under way until [`Queue::ended`].
    pub(super) fn pop(&mut self, priority: Priority) -> Option<Job> {
        let job = self.of(priority).pop_front()?;
        self.under_way.insert(job.id, Said::default());
        Some(job)
    }

    /// Takes back a read of which a part is done, to be next of its priority.
    pub(super) fn put_back(&mut self, mut job: Job) {
        let said = self.under_way.remove(&job.id).unwrap_or_default();
        if said.promoted {
            job.priority = Priority::Demand;
        }
        if said.cancelled || self.closed {
            self.cancelled.push(job);
        } else {
            self.of(job.priority).push_front(job);
        }
    }

    /// A read that was under way is no more.
    pub(super) fn ended(&mut self, id: u64) {
        self.under_way.remove(&id);
    }

    /// Whether something was said of reads under way since this was asked last.
    pub(super) fn take_said(&mut self) -> bool {
        std::mem::take(&mut self.said)
    }

    /// What was said of a read that is under way.
    pub(super) fn said(&self, id: u64) -> Said {
        self.under_way.get(&id).copied().unwrap_or_default()
    }
}
