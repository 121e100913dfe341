//! Memory of the device, and what a kernel is launched with.
//!
//! Invariant: a [`Dev`] frees its memory when it is dropped, after all work has ended that was given
//! to the device before. So nothing is dropped while a step runs.

use std::{ffi::c_void, marker::PhantomData, sync::Arc};

use cudarc::driver::{CudaContext, result};

/// `len` values of T in the device's memory.
pub struct Dev<T> {
    pub(super) at: u64,
    pub(super) len: usize,
    pub(super) context: Arc<CudaContext>,
    pub(super) of: PhantomData<T>,
}

// SAFETY: an address on the device; the driver's calls may come from any thread.
unsafe impl<T> Send for Dev<T> {}
// SAFETY: as above; it is written to through the stream of one `Cuda` only.
unsafe impl<T> Sync for Dev<T> {}

impl<T> Dev<T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the first value is, for tables of addresses.
    pub fn address(&self) -> u64 {
        self.at
    }
}

impl<T> Drop for Dev<T> {
    fn drop(&mut self) {
        // Freeing need not wait for a stream that does not wait for others: kernels would lose
        // their memory (seen as illegal addresses).
        if self.at != 0 && self.context.synchronize().is_ok() {
            // SAFETY: allocated by `Cuda::alloc`, and freed once. A device that is lost has
            // nothing to free.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

/// Arguments of a kernel, each in words of its own: little-endian, so that a shorter argument is
/// the beginning of its word.
#[derive(Default)]
pub(super) struct Args {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Args {
    pub(super) fn word(mut self, word: u64) -> Self {
        self.starts.push(self.words.len());
        self.words.push(word);
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
        self.starts.push(self.words.len());
        self.words.extend_from_slice(words);
        self
    }

    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        self.starts.iter().map(|&at| (&raw mut self.words[at]).cast()).collect()
    }
}

/// Two 32-bit fields of a structure.
pub(super) fn pair(low: usize, high: usize) -> u64 {
    let half = |value: usize| u64::from(u32::try_from(value).expect("a size fits 32 bits"));
    half(low) | half(high) << 32
}
