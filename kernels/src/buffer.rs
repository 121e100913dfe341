//! Bytes that kernels read in place: owned while they are written, shared once they are complete.
//!
//! Invariant: every [`Buffer`] and [`AlignedBytes`] starts at a multiple of [`ALIGN`].

use std::{
    fmt,
    fs::File,
    io,
    ops::{Deref, DerefMut, Range},
    sync::{Arc, Weak},
};

use memmap2::{Advice, Mmap, MmapOptions};

/// Alignment of buffers in bytes: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// A buffer that does not start where kernels need it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("buffer starts at {found} modulo {ALIGN}; it must start at a multiple of {ALIGN}")]
pub struct Misaligned {
    found: usize,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; ALIGN]);

/// Owned, zeroed, aligned bytes, to be filled and then shared as a [`Buffer`].
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self { lines: bytemuck::zeroed_vec(len.div_ceil(ALIGN)), len }
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// What a buffer keeps alive.
trait Owner: Send + Sync {
    fn bytes(&self) -> &[u8];
    /// Says that these bytes will be read soon.
    fn will_need(&self, _: Range<usize>) {}
}

struct Memory<T>(T);

impl<T: AsRef<[u8]> + Send + Sync> Owner for Memory<T> {
    fn bytes(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl Owner for Mmap {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn will_need(&self, range: Range<usize>) {
        // It is only advice: where it is not taken, pages are read as they are touched.
        let _ = self.advise_range(Advice::WillNeed, range.start, range.len());
    }
}

/// Shared, immutable, aligned bytes: owned memory, a mapped file, or a received message.
#[derive(Clone)]
pub struct Buffer {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

impl Buffer {
    /// Shares all of `owner`'s bytes without copying them.
    pub fn from_owner(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self, Misaligned> {
        Self::owned_by(Arc::new(Memory(owner)))
    }

    fn owned_by(owner: Arc<dyn Owner>) -> Result<Self, Misaligned> {
        let whole = 0..owner.bytes().len();
        Self { owner, range: 0..0 }.at(whole)
    }

    /// Maps the first `bytes` bytes of a file, to be read in place: nothing is read before it is
    /// used, and all processes that map the file share its pages.
    ///
    /// The file must not change while it is mapped, which holds for the shards of a checkpoint:
    /// they are complete before they get their names, and are never written to again. As with
    /// every program that maps files, truncating one kills the process with SIGBUS, and so does a
    /// disk that cannot be read; bytes written over are seen by whoever reads them next.
    pub fn map(file: &File, bytes: usize) -> io::Result<Self> {
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the mapping is read-only and lies within the file, as just seen. That nobody
        // writes to or truncates the file meanwhile is asked for above; no system can enforce it.
        let map = unsafe { MmapOptions::new().len(bytes).map(file)? };
        Ok(Self::owned_by(Arc::new(map)).expect("mappings start at pages"))
    }

    /// Says that all of it will be read soon, so that the system fetches what is not in memory
    /// in large pieces. Several threads that read a mapped file at several places look to it as if
    /// they jumped about, and it would fetch single pages.
    pub fn will_need(&self) {
        self.owner.will_need(self.range.clone());
    }

    /// The same bytes, without keeping their memory.
    pub fn downgrade(&self) -> WeakBuffer {
        WeakBuffer { owner: Arc::downgrade(&self.owner), range: self.range.clone() }
    }

    /// A part of this buffer, sharing its memory.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, Misaligned> {
        assert!(range.start <= range.end && range.end <= self.len(), "slice leaves the buffer");
        let from = self.range.start;
        Self { owner: self.owner.clone(), range: 0..0 }.at(from + range.start..from + range.end)
    }

    fn at(self, range: Range<usize>) -> Result<Self, Misaligned> {
        let found = self.owner.bytes()[range.clone()].as_ptr() as usize % ALIGN;
        if found != 0 && !range.is_empty() {
            return Err(Misaligned { found });
        }
        Ok(Self { owner: self.owner, range })
    }
}

/// A [`Buffer`] that does not keep its memory.
#[derive(Clone)]
pub struct WeakBuffer {
    owner: Weak<dyn Owner>,
    range: Range<usize>,
}

impl WeakBuffer {
    /// The buffer, if something still holds its memory.
    pub fn upgrade(&self) -> Option<Buffer> {
        Some(Buffer { owner: self.owner.upgrade()?, range: self.range.clone() })
    }
}

impl fmt::Debug for WeakBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WeakBuffer({} bytes)", self.range.len())
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }
}

impl From<AlignedBytes> for Buffer {
    fn from(bytes: AlignedBytes) -> Self {
        Self::from_owner(bytes).expect("AlignedBytes is aligned by its type")
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn slices_share_memory_and_refuse_misaligned_starts() {
        let mut bytes = AlignedBytes::zeroed(300);
        bytes[128] = 7;
        let whole = Buffer::from(bytes);
        let part = whole.slice(128..300).unwrap();
        assert_eq!(part[0], 7);
        assert_eq!(part.as_ptr(), whole[128..].as_ptr());
        assert!(whole.slice(1..64).is_err());
    }

    #[test]
    fn a_mapped_file_is_read_in_place_and_let_go_with_its_last_buffer() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        file.write_all(&bytes).unwrap();
        let whole = Buffer::map(&file, bytes.len()).unwrap();
        whole.will_need();
        assert_eq!(whole[..], bytes);
        let weak = whole.downgrade();
        let part = whole.slice(4096..5000).unwrap();
        assert_eq!(part.as_ptr(), whole[4096..].as_ptr());
        drop(whole);
        assert_eq!(weak.upgrade().unwrap()[..], bytes, "the part keeps the mapping");
        drop(part);
        assert!(weak.upgrade().is_none());
        assert!(Buffer::map(&file, bytes.len() + 1).is_err(), "more than the file has");
        assert!(Buffer::map(&file, 0).unwrap().is_empty());
    }
}
