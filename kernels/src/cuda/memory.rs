//! Memory of the device, and what a kernel is launched with.
//!
//! Invariants:
//! - A [`Block`] that belongs to no pool is freed when its last [`Dev`] is dropped, after all work has
//!   ended that was given to the device before: dropping one waits, so nothing of that kind is dropped
//!   while a step runs.
//! - A block of the pool goes back to it at once. Its next user writes to it by the same stream, after
//!   whatever still reads it.

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::c_void,
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
};

use cudarc::driver::{CudaContext, result};

/// Several of a process share a GPU's context, and none may wait for all of its work while another records
/// some: who records has this exclusively, who waits has it beside others.
pub(super) static RECORDING: RwLock<()> = RwLock::new(());

thread_local! {
    /// Whether this thread records.
    pub(super) static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// Waits for all work of a context, unless this thread records. Whether it has.
pub(super) fn wait_for_all(context: &CudaContext) -> bool {
    if RECORDS.get() {
        return false;
    }
    let _waits = RECORDING.read().unwrap_or_else(PoisonError::into_inner);
    context.bind_to_thread().is_ok() && context.synchronize().is_ok()
}

/// The smallest block of a pool, in bytes.
const BLOCK_MIN: usize = 512;

/// Memory that was allocated at once.
pub(super) struct Block {
    at: u64,
    bytes: usize,
    context: Arc<CudaContext>,
    pool: Weak<Pool>,
}

impl Block {
    pub(super) fn new(at: u64, bytes: usize, context: Arc<CudaContext>) -> Self {
        Self { at, bytes, context, pool: Weak::new() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.free().entry(self.bytes).or_default().push(self.at);
            return;
        }
        // Freeing need not wait for a stream that does not wait for others: kernels would lose
        // their memory (seen as illegal addresses).
        if wait_for_all(&self.context) {
            // SAFETY: allocated in this size, and freed once. A device that is lost has nothing to
            // free.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

/// Blocks that are used again and again, by size: powers of two.
#[derive(Default)]
pub(super) struct Pool {
    free: Mutex<HashMap<usize, Vec<u64>>>,
}

impl Pool {
    fn free(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<u64>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of the block that so many bytes get.
    pub(super) fn size(bytes: usize) -> usize {
        bytes.max(BLOCK_MIN).next_power_of_two()
    }

    /// A block that is free.
    pub(super) fn take(self: &Arc<Self>, size: usize, context: &Arc<CudaContext>) -> Option<Block> {
        let at = self.free().get_mut(&size)?.pop()?;
        Some(self.adopt(at, size, context))
    }

    /// A block that comes back here when it is dropped.
    pub(super) fn adopt(self: &Arc<Self>, at: u64, size: usize, of: &Arc<CudaContext>) -> Block {
        Block { at, bytes: size, context: of.clone(), pool: Arc::downgrade(self) }
    }

    /// Addresses of all blocks that are free, which are forgotten here.
    pub(super) fn drain(&self) -> Vec<u64> {
        self.free().drain().flat_map(|(_, blocks)| blocks).collect()
    }
}

/// `len` values of T in the device's memory: a whole allocation or a part of one.
pub struct Dev<T> {
    pub(super) at: u64,
    pub(super) len: usize,
    block: Option<Arc<Block>>,
    of: PhantomData<T>,
}

// SAFETY: an address on the device; the driver's calls may come from any thread.
unsafe impl<T> Send for Dev<T> {}
// SAFETY: as above; it is written to through the stream of one `Cuda` only.
unsafe impl<T> Sync for Dev<T> {}

impl<T> Dev<T> {
    /// The beginning of a block, or nothing.
    pub(super) fn new(block: Option<Block>, len: usize) -> Self {
        let at = block.as_ref().map_or(0, |block| block.at);
        assert!(
            len * size_of::<T>() <= block.as_ref().map_or(0, |block| block.bytes),
            "inside its block"
        );
        Self { at, len, block: block.map(Arc::new), of: PhantomData }
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it lies in, which stays taken while somebody has this.
    pub(super) fn block(&self) -> Option<Arc<Block>> {
        self.block.clone()
    }

    /// Where the first value is, for tables of addresses.
    pub fn address(&self) -> u64 {
        self.at
    }

    /// `len` values of U from byte `from` on, in the same memory.
    ///
    /// # Panics
    /// If they leave it, or are not aligned.
    pub fn part<U>(&self, from: usize, len: usize) -> Dev<U> {
        let end = from.checked_add(len * size_of::<U>()).expect("a size");
        assert!(end <= self.len * size_of::<T>(), "values leave the device's buffer");
        let at = self.at + from as u64;
        assert!(at.is_multiple_of(align_of::<U>() as u64), "aligned values");
        Dev { at, len, block: self.block.clone(), of: PhantomData }
    }
}

/// Arguments of a kernel, each in words of its own: little-endian, so that a shorter argument is
/// the beginning of its word.
///
/// In a box: rustc 1.95 was seen to reuse the stack slot of arguments that had been moved into a call
/// for the next ones without emptying it.
#[derive(Default)]
pub(super) struct Args(Box<Words>);

#[derive(Default)]
struct Words {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Args {
    pub(super) fn word(mut self, word: u64) -> Self {
        self.0.starts.push(self.0.words.len());
        self.0.words.push(word);
        self
    }

    pub(super) fn u32(self, value: usize) -> Self {
        self.word(u64::from(u32::try_from(value).expect("a size fits 32 bits")))
    }

    pub(super) fn f32(self, value: f32) -> Self {
        self.word(u64::from(value.to_bits()))
    }

    pub(super) fn dev<T>(self, memory: &Dev<T>) -> Self {
        self.word(memory.at)
    }

    /// A structure by value, as words.
    pub(super) fn structure(mut self, words: &[u64]) -> Self {
        self.0.starts.push(self.0.words.len());
        self.0.words.extend_from_slice(words);
        self
    }

    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        let Words { words, starts } = &mut *self.0;
        starts.iter().map(|&at| (&raw mut words[at]).cast()).collect()
    }
}

/// Two 32-bit fields of a structure.
pub(super) fn pair(low: usize, high: usize) -> u64 {
    let half = |value: usize| u64::from(u32::try_from(value).expect("a size fits 32 bits"));
    half(low) | half(high) << 32
}
