//! Buffers that frames live in: aligned, reused, and backed by memory only where bytes arrived.
//!
//! Invariants: every buffer starts at a page, so at a multiple of 64; its bytes are always
//! initialised (zero, or what an earlier frame left); idle buffers never exceed the pool's limit.
//! A fresh buffer is an anonymous mapping: claiming 64 MiB costs address space, and memory grows
//! page by page as bytes are written, without ever moving what was written before.

use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use memmap2::MmapMut;
use parking_lot::Mutex;

/// Most bytes that a pool keeps for reuse, unless it is told otherwise.
pub const IDLE_BYTES_MAX: usize = 256 << 20;

/// Smallest buffer, in bytes.
const BUFFER_BYTES_MIN: usize = 16 << 10;

/// Buffers of at least this size are asked for in large pages.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Memory for a buffer was refused.
#[derive(Debug, thiserror::Error)]
#[error("could not map {bytes} bytes for a buffer: {source}; free memory, or lower the load")]
pub struct PoolError {
    bytes: usize,
    source: io::Error,
}

/// Buffers for reuse, shared by everything that sends and receives on one endpoint.
#[derive(Clone)]
pub struct BufferPool {
    shelf: Arc<Shelf>,
}

struct Shelf {
    idle: Mutex<Idle>,
    idle_bytes_max: usize,
}

/// Idle buffers by the base-2 logarithm of their size.
struct Idle {
    classes: [Vec<MmapMut>; usize::BITS as usize],
    bytes: usize,
}

impl Default for BufferPool {
    fn default() -> Self {
        Self::new(IDLE_BYTES_MAX)
    }
}

impl BufferPool {
    /// A pool that keeps at most `idle_bytes_max` bytes for reuse.
    pub fn new(idle_bytes_max: usize) -> Self {
        let idle = Mutex::new(Idle { classes: [const { Vec::new() }; _], bytes: 0 });
        Self { shelf: Arc::new(Shelf { idle, idle_bytes_max }) }
    }

    /// A buffer of at least `bytes` bytes. Its content is unspecified.
    pub fn take(&self, bytes: usize) -> Result<PoolBuffer, PoolError> {
        let size = bytes.max(BUFFER_BYTES_MIN).checked_next_power_of_two().unwrap_or(bytes);
        let idle = {
            let mut idle = self.shelf.idle.lock();
            let found = idle.classes[size.ilog2() as usize].pop();
            idle.bytes -= found.as_ref().map_or(0, |memory| memory.len());
            found
        };
        let memory = match idle {
            Some(memory) => memory,
            None => map(size).map_err(|source| PoolError { bytes: size, source })?,
        };
        Ok(PoolBuffer { memory: Some(memory), shelf: self.shelf.clone() })
    }

    /// Bytes that wait for reuse.
    pub fn idle_bytes(&self) -> usize {
        self.shelf.idle.lock().bytes
    }
}

/// Fresh memory, in large pages where the system has them: fewer faults, fewer lookups.
fn map(size: usize) -> io::Result<MmapMut> {
    let memory = MmapMut::map_anon(size)?;
    #[cfg(target_os = "linux")]
    if size >= HUGE_PAGE_BYTES {
        // Advice: without it everything is the same but slower.
        let _ = memory.advise(memmap2::Advice::HugePage);
    }
    Ok(memory)
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferPool({} idle bytes)", self.idle_bytes())
    }
}

/// A buffer of a [`BufferPool`], to which it returns when dropped.
pub struct PoolBuffer {
    /// Present until the drop.
    memory: Option<MmapMut>,
    shelf: Arc<Shelf>,
}

impl Deref for PoolBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.memory.as_deref().unwrap_or_default()
    }
}

impl DerefMut for PoolBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for PoolBuffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let mut idle = self.shelf.idle.lock();
        if idle.bytes + memory.len() <= self.shelf.idle_bytes_max {
            idle.bytes += memory.len();
            idle.classes[memory.len().ilog2() as usize].push(memory);
        }
    }
}

impl fmt::Debug for PoolBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolBuffer({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_taken_again_and_idle_memory_is_bounded() {
        let pool = BufferPool::new(64 << 10);
        let first = pool.take(20_000).unwrap();
        let address = first.as_ptr();
        assert_eq!(address as usize % 64, 0);
        assert!(first.len() >= 20_000);
        drop(first);
        let again = pool.take(30_000).unwrap();
        assert_eq!(again.as_ptr(), address);
        let others: Vec<_> = (0..8).map(|_| pool.take(32 << 10).unwrap()).collect();
        drop((again, others));
        assert_eq!(pool.idle_bytes(), 64 << 10);
    }
}
