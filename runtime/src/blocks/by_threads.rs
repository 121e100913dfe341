//! Reads by pread, where there is no io_uring: each thread does one read at a time, a prefetch in
//! pieces, between which a demand goes first.

use std::{io, os::unix::fs::FileExt, sync::atomic::Ordering::Relaxed};

use super::{
    LOOK_AGAIN, Shared,
    queue::{Job, Priority},
};

/// Requests of a prefetch between looks at the demands.
const PIECE: usize = 4;

/// Interruptions and refusals of one request, until it counts as failed.
pub(super) const AGAIN: u32 = 1000;

enum Next {
    Cancelled(Vec<Job>),
    Read(Job),
    End,
}

/// Reads until the queue is closed and empty.
pub(super) fn work(shared: &Shared) {
    loop {
        match next(shared) {
            Next::Cancelled(jobs) => shared.answer_cancelled(jobs),
            Next::End => return,
            Next::Read(mut job) => match read_piece(shared, &mut job) {
                Ok(false) => shared.queue.lock().put_back(job),
                Ok(true) => {
                    shared.queue.lock().ended(job.id);
                    shared.answer(job.done, Ok(job.slot));
                }
                Err(error) => {
                    shared.queue.lock().ended(job.id);
                    let slot = Some(job.slot);
                    shared.answer(job.done, Err(super::Unread { error, slot }));
                }
            },
        }
    }
}

fn next(shared: &Shared) -> Next {
    let mut queue = shared.queue.lock();
    loop {
        let cancelled = queue.take_cancelled();
        if !cancelled.is_empty() {
            return Next::Cancelled(cancelled);
        }
        let job = queue.pop(Priority::Demand).or_else(|| queue.pop(Priority::Prefetch));
        if let Some(job) = job {
            return Next::Read(job);
        }
        if queue.is_closed() {
            return Next::End;
        }
        shared.arrived.wait_for(&mut queue, LOOK_AGAIN);
    }
}

/// Reads on; says whether all is read.
fn read_piece(shared: &Shared, job: &mut Job) -> io::Result<bool> {
    let options = &shared.options;
    let (file, offset, wanted) = (&job.file, job.offset, job.slot.len());
    let raw = job.slot.raw_mut();
    let piece = match job.priority {
        Priority::Demand => raw.len(),
        Priority::Prefetch => options.chunk.saturating_mul(PIECE),
    };
    let end = raw.len().min(job.read.saturating_add(piece));
    let (mut at, mut again) = (job.read, 0);
    while at < end && at < wanted {
        let here = offset + at as u64;
        let (handle, direct) = file.handle(options.direct, here, end - at);
        shared.counted(direct, here, end - at);
        match handle.read_at(&mut raw[at..end], here) {
            Ok(0) => return Err(file.ends(offset, wanted, at)),
            Ok(n) => {
                if !direct {
                    file.forget(here, n);
                }
                at += n;
            }
            Err(error) if again < AGAIN && shared.once_more(file, &error, direct) => again += 1,
            Err(error) => return Err(file.error(here, end - at, &error)),
        }
    }
    job.read = at;
    Ok(at >= wanted)
}

impl Shared {
    /// Counts a request.
    pub(super) fn counted(&self, direct: bool, offset: u64, bytes: usize) {
        self.tally.requests.fetch_add(1, Relaxed);
        if !direct {
            self.tally.cached.fetch_add(1, Relaxed);
            if (offset | bytes as u64).is_multiple_of(super::BLOCK_ALIGN) {
                self.tally.undirected.store(true, Relaxed);
            }
        }
    }

    /// Whether a request that failed is to be made again.
    pub(super) fn once_more(
        &self,
        file: &super::BlockFile,
        error: &io::Error,
        direct: bool,
    ) -> bool {
        let passing = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
        let again = passing || file.refuses_direct(error, direct);
        if again {
            self.tally.again.fetch_add(1, Relaxed);
        }
        again
    }
}
