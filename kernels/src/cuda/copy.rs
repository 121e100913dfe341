//! Copies that nobody waits for: host memory that the device reads by itself, a second stream, and
//! events between the two.
//!
//! Invariant: memory of either side stays where it is until a copy from or to it has ended. What is
//! being copied belongs to the copy ([`Uploading`], [`Arriving`]), which waits when it is dropped.
//!
//! # Panics
//! All functions, if ranges leave their buffers.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut, Range},
    ptr::NonNull,
    sync::{Arc, atomic::Ordering},
};

use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::{
    Cuda, failed,
    memory::{self, Dev},
    show,
};
use crate::{buffer::Buffer, device::DeviceError};

/// A stream of work, done in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Where kernels run, and everything that does not name a stream.
    Compute,
    /// For copies beside it.
    Copy,
}

/// A place in a stream.
pub struct Event(CudaEvent);

struct Block {
    at: NonNull<u8>,
    context: Arc<CudaContext>,
}

// SAFETY: memory of the process, of which each `Pinned` has a part of its own.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `Cuda::pinned`, freed once, and copies hold their `Pinned`.
            let _ = unsafe { result::free_host(self.at.as_ptr().cast()) };
        }
    }
}

/// Values in memory of the host that the device can read and write while nobody waits.
pub struct Pinned<T> {
    block: Arc<Block>,
    /// Bytes from the block's begin.
    from: usize,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Pinned<T> {
    /// Pieces of so many values each, the last of what is left, of one block of memory.
    ///
    /// # Panics
    /// If `each` is 0.
    pub fn split(self, each: usize) -> Vec<Self> {
        assert!(each > 0, "pieces of something");
        let piece = |at: usize| Self {
            block: self.block.clone(),
            from: self.from + at * size_of::<T>(),
            len: each.min(self.len - at),
            of: PhantomData,
        };
        (0..self.len).step_by(each).map(piece).collect()
    }

    fn begin(&self) -> *mut T {
        // SAFETY: inside the block, which is as aligned as T: pages, and whole values.
        unsafe { self.block.at.as_ptr().add(self.from).cast() }
    }
}

impl<T: Pod> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values, zeros at first, that are this one's alone; a copy that writes to them
        // owns it.
        unsafe { std::slice::from_raw_parts(self.begin(), self.len) }
    }
}

impl<T: Pod> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; a copy that reads them shares it, so that nobody has it mutably.
        unsafe { std::slice::from_raw_parts_mut(self.begin(), self.len) }
    }
}

/// A copy to the device under way. Its source cannot be written to before it is dropped or waited
/// for.
#[must_use = "dropping it waits for the copy"]
pub struct Uploading {
    event: Event,
    _from: Arc<dyn Send + Sync>,
    _to: Option<Arc<memory::Block>>,
}

impl Uploading {
    /// When it has ended.
    pub fn event(&self) -> &Event {
        &self.event
    }
}

impl Drop for Uploading {
    fn drop(&mut self) {
        // On a device that is lost nothing is under way.
        let _ = self.event.0.synchronize();
    }
}

/// A copy from the device under way, and where to.
#[must_use = "dropping it waits for the copy"]
pub struct Arriving<T> {
    event: Event,
    to: Option<Pinned<T>>,
    _from: Option<Arc<memory::Block>>,
}

impl<T> Arriving<T> {
    /// When it has ended.
    pub fn event(&self) -> &Event {
        &self.event
    }
}

impl<T> Drop for Arriving<T> {
    fn drop(&mut self) {
        if self.to.is_some() {
            let _ = self.event.0.synchronize();
        }
    }
}

/// Bytes of a page of the host's memory.
const PAGE: usize = 4096;

/// Bytes below which locking does not pay.
const LOCKED_MIN: usize = 64 << 10;

/// Pages of the host that the device reads by itself as long as this is there.
pub struct Locked {
    /// Keeps them.
    _buffer: Buffer,
    /// Addresses.
    pages: Range<usize>,
    context: Arc<CudaContext>,
}

impl Drop for Locked {
    fn drop(&mut self) {
        // A copy from it may be under way.
        if memory::wait_for_all(&self.context) {
            // SAFETY: registered by `Cuda::lock`, and nothing reads it any more.
            let _ = unsafe { sys::cuMemHostUnregister(self.pages.start as *mut _) };
        }
    }
}

impl Cuda {
    /// Locks the memory that a buffer is a part of where it is, so that [`Cuda::put_from`] copies from it at
    /// the rate of the bus: its whole pages, which nobody else has a part of. `None` if that does not pay
    /// or the driver cannot do it.
    pub fn lock(&self, buffer: &Buffer) -> Result<Option<Locked>, DeviceError> {
        let whole = buffer.whole().as_ptr_range();
        let from = (whole.start as usize).next_multiple_of(PAGE);
        let to = whole.end as usize / PAGE * PAGE;
        if to < from + LOCKED_MIN {
            return Ok(None);
        }
        self.context.bind_to_thread().map_err(|e| self.fail(e))?;
        // SAFETY: memory of this process, which the buffer keeps; the device only reads it.
        let locked = unsafe {
            sys::cuMemHostRegister_v2(from as *mut _, to - from, sys::CU_MEMHOSTREGISTER_PORTABLE)
        }
        .result();
        let (context, buffer) = (self.context.clone(), buffer.clone());
        Ok(locked.ok().map(|()| Locked { _buffer: buffer, pages: from..to, context }))
    }

    /// As [`Cuda::put`], of a buffer some of whose memory may be locked: that is read when its turn comes, so
    /// it must stay as it is until then.
    pub fn put_from(
        &self,
        to: &Dev<u8>,
        buffer: &Buffer,
        locked: Option<&Locked>,
    ) -> Result<(), DeviceError> {
        let begin = buffer.as_ptr() as usize;
        let pages = locked.map_or(0..0, |locked| locked.pages.clone());
        // What the driver takes for locked must be so from its first byte to its last.
        let inside = |address: usize| address.saturating_sub(begin).min(buffer.len());
        let cuts = [0, inside(pages.start), inside(pages.end), buffer.len()];
        cuts.windows(2)
            .try_for_each(|cut| self.put(to, cut[0], &buffer[cut[0]..cut[1].max(cut[0])]))
    }

    fn lane(&self, lane: Lane) -> &CudaStream {
        match lane {
            Lane::Compute => &self.stream,
            Lane::Copy => &self.copies,
        }
    }

    /// `len` zeros in memory that the device reads by itself.
    pub fn pinned<T: Pod>(&self, len: usize) -> Result<Pinned<T>, DeviceError> {
        let bytes = (len * size_of::<T>()).max(1);
        self.context.bind_to_thread().map_err(|e| self.fail(e))?;
        let no_room = |e: DriverError| {
            let what = format!("{bytes} bytes of locked host memory: {}", show(e));
            failed(&self.name, what)
        };
        // SAFETY: owned by what is returned, and zeros are values of T.
        let at = unsafe {
            let at = result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE).map_err(no_room)?;
            let at =
                NonNull::new(at.cast::<u8>()).ok_or_else(|| failed(&self.name, "no memory"))?;
            at.as_ptr().write_bytes(0, bytes);
            at
        };
        let block = Arc::new(Block { at, context: self.context.clone() });
        Ok(Pinned { block, from: 0, len, of: PhantomData })
    }

    /// Where the stream is now.
    pub fn record(&self, lane: Lane) -> Result<Event, DeviceError> {
        self.lane(lane).record_event(None).map(Event).map_err(|e| self.fail(e))
    }

    /// What is given to the stream from now on waits for the event; the host does not.
    pub fn stream_wait(&self, lane: Lane, event: &Event) -> Result<(), DeviceError> {
        self.lane(lane).wait(&event.0).map_err(|e| self.fail(e))
    }

    /// Whether a stream has come to the event.
    pub fn has_passed(&self, event: &Event) -> Result<bool, DeviceError> {
        self.context.bind_to_thread().map_err(|e| self.fail(e))?;
        event.0.try_is_complete().map_err(|e| self.fail(e))
    }

    /// Waits until a stream has come to the event.
    pub fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        event.0.synchronize().map_err(|e| self.fail(e))
    }

    /// A copy in a recorded graph would outlive what it copies from.
    fn may_copy(&self, lane: Lane) -> Result<(), DeviceError> {
        if lane == Lane::Compute && self.recording.load(Ordering::Relaxed) {
            let what = "copies that nobody waits for cannot be recorded: make them before";
            return Err(failed(&self.name, what));
        }
        self.context.bind_to_thread().map_err(|e| self.fail(e))
    }

    /// The event after a copy; without one the copy has ended.
    fn after(&self, lane: Lane) -> Result<Event, DeviceError> {
        self.record(lane).inspect_err(|_| {
            let _ = self.lane(lane).synchronize();
        })
    }

    /// Copies values `range` to value `at` on, in the stream; returns at once. What is read on the
    /// other stream must wait for the copy's event.
    pub fn upload_async<T: Pod + Send + Sync>(
        &self,
        lane: Lane,
        from: &Arc<Pinned<T>>,
        range: Range<usize>,
        to: &Dev<T>,
        at: usize,
    ) -> Result<Uploading, DeviceError> {
        self.may_copy(lane)?;
        let values = &from[range];
        assert!(at + values.len() <= to.len(), "values leave the device's buffer");
        if !values.is_empty() {
            let (bytes, at) = (bytemuck::cast_slice(values), to.at + (at * size_of::<T>()) as u64);
            // SAFETY: inside the buffer; the source lives and is not written to until the event.
            unsafe { result::memcpy_htod_async::<u8>(at, bytes, self.lane(lane).cu_stream()) }
                .map_err(|e| self.fail(e))?;
        }
        Ok(Uploading { event: self.after(lane)?, _from: from.clone(), _to: to.block() })
    }

    /// Copies values `range` of the device to the beginning of `to`, in the stream; returns at once.
    pub fn download_async<T: Pod>(
        &self,
        lane: Lane,
        from: &Dev<T>,
        range: Range<usize>,
        mut to: Pinned<T>,
    ) -> Result<Arriving<T>, DeviceError> {
        self.may_copy(lane)?;
        assert!(range.start <= range.end && range.end <= from.len(), "values of the buffer");
        let at = from.at + (range.start * size_of::<T>()) as u64;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut to[..range.len()]);
        if !bytes.is_empty() {
            // SAFETY: both sides are inside their buffers; the host's is owned until the event.
            unsafe { result::memcpy_dtoh_async(bytes, at, self.lane(lane).cu_stream()) }
                .map_err(|e| self.fail(e))?;
        }
        Ok(Arriving { event: self.after(lane)?, to: Some(to), _from: from.block() })
    }

    /// The values, when they have come.
    pub fn arrived<T>(&self, mut copy: Arriving<T>) -> Result<Pinned<T>, DeviceError> {
        self.wait_for(&copy.event)?;
        copy.to.take().ok_or_else(|| failed(&self.name, "a copy without values"))
    }
}
