//! Packs rows of values on all cores, for import and conversion.
//!
//! Panels are independent, so the bytes are the same however many threads pack them. A
//! weight that is NaN or infinite is not packed: whoever packs hears where the first one is.

use lite_llm_kernels::{
    buffer::AlignedBytes,
    dtype::DType,
    matrix::{PANEL, PackedMatrix, Source, pack_into},
};

/// Bytes that are worth a thread.
const SHARE_BYTES_MIN: usize = 32 << 10;

/// A buffer for packed bytes that is used again, and the threads that fill it.
pub(super) struct Packer {
    threads: usize,
    packed: AlignedBytes,
}

/// A weight that no model computes with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NotFinite {
    pub(super) row: usize,
    pub(super) col: usize,
    pub(super) value: f32,
}

impl Packer {
    pub(super) fn new() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { threads, packed: AlignedBytes::zeroed(0) }
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Packs row-major values `[n, k]`.
    pub(super) fn pack(
        &mut self,
        dtype: DType,
        n: usize,
        k: usize,
        source: Source<'_>,
    ) -> Result<&[u8], NotFinite> {
        if let Some(at) = source.first_not_finite() {
            return Err(NotFinite { row: at / k, col: at % k, value: source.get(at) });
        }
        let bytes =
            PackedMatrix::packed_bytes(dtype, n, k).expect("ModelConfig::check bounds every width");
        if self.packed.len() < bytes {
            self.packed = AlignedBytes::zeroed(bytes);
        }
        let packed = &mut self.packed[..bytes];
        packed.fill(0);
        let panels = n.div_ceil(PANEL);
        let panel_bytes = (bytes / panels.max(1)).max(1);
        let share = panels.div_ceil(self.threads).max(SHARE_BYTES_MIN.div_ceil(panel_bytes));
        let (rows, share_bytes) = (share * PANEL, panel_bytes * share);
        std::thread::scope(|scope| {
            for (i, part) in packed.chunks_mut(share_bytes).enumerate() {
                let (from, to) = (i * rows, n.min((i + 1) * rows));
                let source = source.slice(from * k, to * k);
                let mut pack = move || pack_into(dtype, to - from, k, source, part);
                // The last share is the caller's.
                if to == n {
                    pack();
                } else {
                    scope.spawn(pack);
                }
            }
        });
        Ok(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_do_not_depend_on_threads_and_what_is_not_finite_is_found() {
        let (n, k) = (5 * PANEL + 7, 700);
        let mut values: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
        for dtype in DType::ALL {
            let whole = PackedMatrix::pack(dtype, n, k, Source::F32(&values));
            for threads in [1, 2, 3, 100] {
                let mut packer = Packer { threads, ..Packer::new() };
                let packed = packer.pack(dtype, n, k, Source::F32(&values)).unwrap();
                assert!(packed == &whole.data()[..], "{dtype}, {threads} threads");
            }
        }
        values[100 * k + 3] = f32::NEG_INFINITY;
        let mut packer = Packer::new();
        for dtype in DType::ALL {
            let error = packer.pack(dtype, n, k, Source::F32(&values)).unwrap_err();
            assert_eq!(error, NotFinite { row: 100, col: 3, value: f32::NEG_INFINITY });
        }
    }
}
