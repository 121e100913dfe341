//! The ring, with a safe face: memory and files that the kernel works with stay until it is done.
//! Beside it what else is asked of the kernel with `unsafe`: this crate has no more of that.
//!
//! Why `unsafe`: the kernel writes into a slot between the submission of a request and its
//! completion, which no borrow can say. Here a request owns a share of its [`Target`], which owns the
//! slot and the file, and hands out neither while a request has a share. If a ring is dropped
//! before its requests are complete, what they point to is leaked rather than freed.

use std::{
    fs::File,
    io,
    mem::{self, ManuallyDrop},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use io_uring::{IoUring, opcode, types};
use lite_llm_kernels::slots::Slot;

use super::{BlockFile, file::Advice};

/// What marks the completion that says that the bell was rung.
const BELL: u64 = u64::MAX;

/// Wakes the ring's thread from another.
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: it takes numbers, and returns a new descriptor or -1.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as just seen it is a new descriptor, which nobody else has.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: 8 bytes of this frame are read. It fails only if the bell has been rung 2^64 - 1
        // times already, and then the thread wakes anyway.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    fn silence(&self) {
        let mut count = [0u8; 8];
        // SAFETY: 8 bytes of this frame are written. It does not block; if it was silent, nothing
        // happens.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

/// Advice about a range of a file; 0 bytes are all from `offset`. What the system makes of it
/// changes no result.
pub(super) fn advise(file: &File, offset: u64, bytes: usize, advice: Advice) {
    let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else { return };
    let advice = match advice {
        Advice::Random => libc::POSIX_FADV_RANDOM,
        Advice::Forget => libc::POSIX_FADV_DONTNEED,
    };
    // SAFETY: it takes numbers, and the descriptor of an open file.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, bytes, advice) };
}

/// A slot that is being filled from a file.
pub(super) struct Target {
    slot: Slot,
    base: *mut u8,
    bytes: usize,
    file: Arc<BlockFile>,
    offset: u64,
}

impl Target {
    pub(super) fn new(mut slot: Slot, file: Arc<BlockFile>, offset: u64) -> Rc<Self> {
        let raw = slot.raw_mut();
        let (base, bytes) = (raw.as_mut_ptr(), raw.len());
        Rc::new(Self { slot, base, bytes, file, offset })
    }

    /// The slot, if no request is in flight.
    pub(super) fn into_slot(target: Rc<Self>) -> Option<Slot> {
        Rc::try_unwrap(target).ok().map(|target| target.slot)
    }

    pub(super) fn file(&self) -> &BlockFile {
        &self.file
    }

    /// Where the read begins in the file.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }
}

/// A part of a target, from a position in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// Of the read, for its owner.
    pub(super) id: u64,
    pub(super) at: usize,
    pub(super) bytes: usize,
    /// Made by the direct handle.
    pub(super) direct: bool,
    pub(super) prefetch: bool,
}

struct Flight {
    part: Part,
    /// Its share of what the kernel works with.
    _target: Rc<Target>,
}

/// A ring of one thread.
pub(super) struct Ring {
    uring: ManuallyDrop<IoUring>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// The kernel watches the bell.
    listens: bool,
}

impl Ring {
    /// A ring for `depth` requests in flight, or why this system has none that serves.
    pub(super) fn new(depth: usize) -> io::Result<Self> {
        let depth = depth.clamp(1, 4096);
        let entries = (depth + 1).next_power_of_two() as u32;
        // Completions are delivered when this thread asks for them, without interrupting it.
        // Kernels before 6.1 do not know that.
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::builder().build(entries))?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let flights = (0..depth).map(|_| None).collect();
        let free = (0..depth).rev().collect();
        Ok(Self { uring: ManuallyDrop::new(uring), flights, free, listens: false })
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Whether one more request has room.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Prepares a request, to be submitted with the next [`Ring::wait`]. `direct` says that it may
    /// go past the page cache. Returns the part as it was prepared; nothing if there is no room.
    ///
    /// # Panics
    /// If the part leaves the target.
    pub(super) fn push(&mut self, target: &Rc<Target>, part: Part) -> Option<Part> {
        let end = part.at.checked_add(part.bytes).expect("parts lie in their targets");
        assert!(end <= target.bytes, "parts lie in their targets");
        let bytes = u32::try_from(part.bytes).expect("a part has less than 4 GiB");
        let index = self.free.pop()?;
        let offset = target.offset + part.at as u64;
        let (file, direct) = target.file.handle(part.direct, offset, part.bytes);
        let part = Part { direct, ..part };
        // SAFETY: `at` lies in the target, as just seen.
        let begin = unsafe { target.base.add(part.at) };
        let request = opcode::Read::new(types::Fd(file.as_raw_fd()), begin, bytes);
        let request = request.offset(offset).build().user_data(index as u64);
        // SAFETY: the kernel writes `bytes` bytes from `begin`, which lie in the target's slot, as
        // just seen, and reads of an open file of the target's. The flight's share keeps both until
        // the completion has come. The slot is not lent out before, and parts of one slot that
        // overlap would be written in any order but are not looked at.
        let pushed = unsafe { self.uring.submission().push(&request) };
        if pushed.is_err() {
            // More entries than requests were asked for, and every wait empties them all.
            self.free.push(index);
            return None;
        }
        self.flights[index] = Some(Flight { part, _target: target.clone() });
        Some(part)
    }

    /// Submits what was prepared, as far as the system takes it now.
    pub(super) fn submit(&self) {
        // What goes wrong here goes wrong with the next wait as well, which says so.
        let _ = self.uring.submit();
    }

    /// Submits what was prepared and waits for a completion, for the bell, or for `timeout`.
    /// Appends what is complete: the part, and the bytes read or the error.
    pub(super) fn wait(
        &mut self,
        bell: &Bell,
        timeout: Duration,
        complete: &mut Vec<(Part, io::Result<usize>)>,
    ) -> io::Result<()> {
        if !self.listens {
            let poll = opcode::PollAdd::new(types::Fd(bell.0.as_raw_fd()), libc::POLLIN as u32);
            // SAFETY: it names a descriptor, which the kernel keeps open by itself, and no memory.
            let pushed = unsafe { self.uring.submission().push(&poll.build().user_data(BELL)) };
            self.listens = pushed.is_ok();
        }
        let time = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&time);
        let waited = match self.uring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // What was not submitted now, for want of memory or of room for completions, is
                // submitted with the next wait.
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        };
        for entry in self.uring.completion() {
            if entry.user_data() == BELL {
                self.listens = false;
                bell.silence();
                continue;
            }
            let index = entry.user_data() as usize;
            let Some(flight) = self.flights.get_mut(index).and_then(Option::take) else { continue };
            self.free.push(index);
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            complete.push((flight.part, result));
        }
        waited
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_flight() == 0 {
            // SAFETY: it is not used after this.
            unsafe { ManuallyDrop::drop(&mut self.uring) };
            return;
        }
        // The kernel may still write into these.
        self.flights.drain(..).for_each(mem::forget);
    }
}
