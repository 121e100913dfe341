//! Reads by io_uring: one thread asks for parts of reads, as many at once as it may.

use std::{
    collections::{HashMap, VecDeque},
    io,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed, mpsc},
    thread::{self, JoinHandle},
};

use super::{
    Done, LOOK_AGAIN, Shared, Unread,
    by_threads::{self, AGAIN},
    interrupted, part_bytes,
    queue::{Job, Priority, Queue},
    ring::{Part, Ring, Target},
};

/// Requests in flight, at most; bytes in flight are what limits them.
const DEPTH: usize = 256;

/// Waits of [`LOOK_AGAIN`] for what is in flight, after the reader was dropped.
const LAST_WAITS: u32 = 10;

/// Starts the thread, if this system has a ring.
pub(super) fn start(shared: Arc<Shared>) -> io::Result<Option<JoinHandle<()>>> {
    let (ready, is_ready) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().name("blocks".into()).spawn(move || {
        // Made here: a ring belongs to the thread that made it.
        let ring = Ring::new(DEPTH);
        shared.by_ring.store(ring.is_ok(), Relaxed);
        // Whoever started it waits for this.
        let _ = ready.send(ring.is_ok());
        if let Ok(ring) = ring {
            work(&shared, ring);
        }
    })?;
    Ok(is_ready.recv().unwrap_or(false).then_some(thread))
}

/// A read of which something was asked for.
struct Open {
    target: Rc<Target>,
    priority: Priority,
    done: Done,
    /// Bytes that its owner wants.
    wanted: usize,
    /// The same, up to the next block.
    bytes: usize,
    /// Bytes of a request.
    chunk: usize,
    /// Bytes that were asked for.
    asked: usize,
    /// Requests in flight or to be made again.
    requests: u32,
    again: u32,
    /// Where the file was found to end, from where the read begins.
    end: Option<usize>,
    /// Why it will not be read to the end.
    error: Option<io::Error>,
}

impl Open {
    fn new(job: Job, chunk: usize) -> Self {
        let Job { file, offset, mut slot, priority, done, .. } = job;
        let (wanted, bytes) = (slot.len(), slot.raw_mut().len());
        let chunk = part_bytes(bytes, chunk);
        let target = Target::new(slot, file, offset);
        let (asked, requests, again, end, error) = (0, 0, 0, None, None);
        Self { target, priority, done, wanted, bytes, chunk, asked, requests, again, end, error }
    }

    /// Whether there is more to ask for.
    fn goes_on(&self) -> bool {
        self.error.is_none() && self.end.is_none() && self.asked < self.bytes
    }

    /// Whether its owner can be told how it ended.
    fn is_over(&self) -> bool {
        self.requests == 0 && !self.goes_on()
    }

    fn next(&mut self, id: u64, direct: bool) -> Part {
        let (at, bytes) = (self.asked, self.chunk.min(self.bytes - self.asked));
        self.asked += bytes;
        self.requests += 1;
        Part { id, at, bytes, direct, prefetch: self.priority == Priority::Prefetch }
    }

    fn fail(&mut self, error: &io::Error) {
        let target = &self.target;
        self.error.get_or_insert_with(|| target.file().error(target.offset(), self.wanted, error));
    }

    /// Tells its owner how it ended.
    fn tell(self, shared: &Shared) {
        let Self { target, done, wanted, end, error, .. } = self;
        let end = end.filter(|&end| end < wanted);
        let ended = end.map(|end| target.file().ends(target.offset(), wanted, end));
        // Of what is in flight the kernel has the slot.
        let result = match (error.or(ended), Target::into_slot(target)) {
            (None, Some(slot)) => Ok(slot),
            (None, None) => Err(Unread { error: io::ErrorKind::ResourceBusy.into(), slot: None }),
            (Some(error), slot) => Err(Unread { error, slot }),
        };
        shared.answer(done, result);
    }
}

/// What the ring's thread is at.
#[derive(Default)]
struct Reads {
    open: HashMap<u64, Open>,
    /// Those of which there is more to ask for.
    demands: VecDeque<u64>,
    prefetches: VecDeque<u64>,
    /// What is to be asked for again.
    again: VecDeque<Part>,
    over: Vec<u64>,
    /// Bytes.
    in_flight: usize,
    prefetch_in_flight: usize,
}

impl Reads {
    fn of(&mut self, priority: Priority) -> &mut VecDeque<u64> {
        match priority {
            Priority::Demand => &mut self.demands,
            Priority::Prefetch => &mut self.prefetches,
        }
    }

    /// Does what owners said of the reads that are open.
    fn listen(&mut self, queue: &Queue) {
        for (&id, open) in &mut self.open {
            let said = queue.said(id);
            if said.promoted && open.priority == Priority::Prefetch {
                open.priority = Priority::Demand;
                if let Some(at) = self.prefetches.iter().position(|&other| other == id) {
                    self.prefetches.remove(at);
                    self.demands.push_back(id);
                }
            }
            if (said.cancelled || queue.is_closed()) && open.goes_on() {
                open.fail(&interrupted());
                self.demands.retain(|&other| other != id);
                self.prefetches.retain(|&other| other != id);
                if open.is_over() {
                    self.over.push(id);
                }
            }
        }
    }

    /// Prepares requests while there is room.
    fn fill(&mut self, shared: &Shared, queue: &mut Queue, ring: &mut Ring) {
        while self.in_flight < shared.options.in_flight.max(1) && ring.has_room() {
            let Some(part) = self.next(shared, queue) else { return };
            let Some(open) = self.open.get(&part.id) else { continue };
            match ring.push(&open.target, part) {
                Some(part) => {
                    let offset = open.target.offset() + part.at as u64;
                    shared.counted(part.direct, offset, part.bytes);
                    self.in_flight += part.bytes;
                    self.prefetch_in_flight += if part.prefetch { part.bytes } else { 0 };
                }
                None => return self.again.push_front(part),
            }
        }
    }

    /// The next part to ask for.
    fn next(&mut self, shared: &Shared, queue: &mut Queue) -> Option<Part> {
        let options = &shared.options;
        if let Some(part) = self.again.pop_front() {
            return Some(part);
        }
        for priority in [Priority::Demand, Priority::Prefetch] {
            if priority == Priority::Prefetch
                && self.prefetch_in_flight >= options.prefetch_in_flight.max(1)
            {
                return None;
            }
            loop {
                let Some(&id) = self.of(priority).front() else {
                    let Some(job) = queue.pop(priority) else { break };
                    self.of(priority).push_back(job.id);
                    self.open.insert(job.id, Open::new(job, options.chunk));
                    continue;
                };
                if let Some(open) = self.open.get_mut(&id).filter(|open| open.goes_on()) {
                    return Some(open.next(id, options.direct));
                }
                self.of(priority).pop_front();
            }
        }
        None
    }

    /// A request is complete.
    fn landed(&mut self, shared: &Shared, part: Part, result: io::Result<usize>) {
        self.in_flight -= part.bytes;
        self.prefetch_in_flight -= if part.prefetch { part.bytes } else { 0 };
        let Some(open) = self.open.get_mut(&part.id) else { return };
        open.requests -= 1;
        let rest = match result {
            Ok(0) => {
                open.end = Some(open.end.map_or(part.at, |end| end.min(part.at)));
                None
            }
            Ok(n) => {
                if !part.direct {
                    open.target.file().forget(open.target.offset() + part.at as u64, n);
                }
                let at = part.at + n;
                // What is missing beyond what is wanted may not exist.
                let missing = n < part.bytes && at < open.wanted;
                missing.then(|| Part { at, bytes: part.bytes - n, ..part })
            }
            Err(error) => {
                let again =
                    open.again < AGAIN && shared.once_more(open.target.file(), &error, part.direct);
                if !again {
                    open.fail(&error);
                }
                open.again += 1;
                again.then_some(part)
            }
        };
        if let Some(rest) = rest.filter(|_| open.error.is_none()) {
            open.requests += 1;
            self.again.push_back(Part { direct: shared.options.direct, ..rest });
        }
        if open.is_over() {
            self.over.push(part.id);
        }
    }

    fn take_over(&mut self, queue: &mut Queue) -> Vec<Open> {
        let over = self.over.drain(..).filter_map(|id| {
            queue.ended(id);
            self.open.remove(&id)
        });
        over.collect()
    }
}

fn work(shared: &Shared, mut ring: Ring) {
    let Some(bell) = &shared.bell else { return };
    let (mut reads, mut complete, mut last_waits) = (Reads::default(), Vec::new(), 0);
    let broken = loop {
        let mut queue = shared.queue.lock();
        if queue.take_said() || queue.is_closed() {
            reads.listen(&queue);
        }
        reads.fill(shared, &mut queue, &mut ring);
        let (over, cancelled) = (reads.take_over(&mut queue), queue.take_cancelled());
        let (closed, answers) = (queue.is_closed(), over.len() + cancelled.len() > 0);
        // Under the lock: what is submitted from now on rings.
        queue.asleep = !answers;
        drop(queue);
        if answers {
            // The disk works meanwhile.
            ring.submit();
            over.into_iter().for_each(|open| open.tell(shared));
            shared.answer_cancelled(cancelled);
            continue;
        }
        if closed && reads.open.is_empty() {
            return;
        }
        if last_waits == LAST_WAITS {
            break io::Error::new(io::ErrorKind::TimedOut, "the disk does not answer");
        }
        let waited = ring.wait(bell, LOOK_AGAIN, &mut complete);
        last_waits += u32::from(closed && complete.is_empty());
        for (part, result) in complete.drain(..) {
            reads.landed(shared, part, result);
        }
        if let Err(error) = waited {
            break error;
        }
    };
    // What is in flight will not be known: its memory is leaked with the ring.
    drop(ring);
    shared.by_ring.store(false, Relaxed);
    let mut queue = shared.queue.lock();
    reads.open.keys().for_each(|&id| queue.ended(id));
    drop(queue);
    for mut open in reads.open.into_values() {
        open.fail(&broken);
        open.tell(shared);
    }
    // Reads that come from now on.
    by_threads::work(shared);
}
