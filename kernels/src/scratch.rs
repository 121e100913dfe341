//! Working memory of operations, kept by each thread between calls.
//!
//! Invariant: contents are whatever the last user left; a user writes before it reads.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

use crate::buffer::AlignedBytes;

thread_local! {
    static FREE: RefCell<Vec<AlignedBytes>> = const { RefCell::new(Vec::new()) };
}

/// Aligned f32 memory that goes back to its thread when dropped.
pub(crate) struct Scratch {
    bytes: AlignedBytes,
    len: usize,
}

/// `len` values of unspecified content.
pub(crate) fn take(len: usize) -> Scratch {
    let bytes_needed = len * size_of::<f32>();
    let mut free = FREE.take();
    // The smallest that fits; else the largest, to be replaced by a larger one.
    let at = free.partition_point(|b| b.len() < bytes_needed).min(free.len().saturating_sub(1));
    let kept = (!free.is_empty()).then(|| free.remove(at));
    FREE.set(free);
    let bytes = match kept {
        Some(bytes) if bytes.len() >= bytes_needed => bytes,
        _ => AlignedBytes::zeroed(bytes_needed.next_power_of_two()),
    };
    Scratch { bytes, len }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let bytes = std::mem::replace(&mut self.bytes, AlignedBytes::zeroed(0));
        FREE.with_borrow_mut(|free| {
            let at = free.partition_point(|b| b.len() < bytes.len());
            free.insert(at, bytes);
        });
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.bytes[..self.len * size_of::<f32>()])[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        let len = self.len;
        &mut bytemuck::cast_slice_mut(&mut self.bytes[..len * size_of::<f32>()])[..len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_and_nested_users_get_their_own() {
        let first = {
            let a = take(100);
            let b = take(100);
            assert_ne!(a.as_ptr(), b.as_ptr());
            a.as_ptr()
        };
        let (a, b) = (take(90), take(80));
        assert!(a.as_ptr() == first || b.as_ptr() == first);
        assert_eq!((a.len(), b.len()), (90, 80));
    }
}
