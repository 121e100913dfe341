//! Bytes that kernels read in place: owned while they are written, shared once they are complete.
//!
//! Invariant: every [`Buffer`] and [`AlignedBytes`] starts at a multiple of [`ALIGN`].

use std::{
    fmt,
    ops::{Deref, DerefMut, Range},
    sync::Arc,
};

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

/// Shared, immutable, aligned bytes: owned memory or a received message.
#[derive(Clone)]
pub struct Buffer {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Buffer {
    /// Shares all of `owner`'s bytes without copying them.
    pub fn from_owner(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self, Misaligned> {
        let whole = 0..owner.as_ref().len();
        Self { owner: Arc::new(owner), range: 0..0 }.at(whole)
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

    /// All of the memory that this is a part of.
    pub fn whole(&self) -> &[u8] {
        (*self.owner).as_ref()
    }

    fn at(self, range: Range<usize>) -> Result<Self, Misaligned> {
        let found = (*self.owner).as_ref()[range.clone()].as_ptr() as usize % ALIGN;
        if found != 0 && !range.is_empty() {
            return Err(Misaligned { found });
        }
        Ok(Self { owner: self.owner, range })
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
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
}
