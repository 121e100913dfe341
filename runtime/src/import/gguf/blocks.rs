//! GGUF's blocks, opened for packing.
//!
//! Layouts are those of `ggml-common.h` in llama.cpp:
//! - Q8_0, 32 weights: scale f16, then q as 32 i8; weight = scale · q.
//! - Q4_0, 32 weights: scale f16, then 16 bytes: byte i holds q + 8 of weight i in its low half and
//!   of weight i + 16 in its high half; weight = scale · q.
//! - Q6_K, 256 weights: 128 bytes of low halves, 64 bytes of high quarters, 16 scales i8, scale d
//!   f16. For both halves h of 128 weights, with low = 64 bytes, high = 32 bytes, scales = 8: weight
//!   32 g + l of the half has the low bits in byte 32 (g mod 2) + l, in its high half if g ≥ 2, and
//!   the bits above in bits 2 g of high byte l; weight = d · scale\[2 g + l / 16\] · (q − 32).

use half::f16;
use lite_llm_kernels::{blocks::BLOCK, matrix::Source};

use crate::import::tensors::SourceDType;

/// Opened blocks, in buffers that are used again.
#[derive(Default)]
pub(in crate::import) struct Blocks {
    scales: Vec<f32>,
    q: Vec<i8>,
    values: Vec<f32>,
}

impl Blocks {
    /// Opens blocks of Q8_0.
    pub(in crate::import) fn q8_0(&mut self, bytes: &[u8]) -> Source<'_> {
        self.open(bytes, SourceDType::Q8, |block, q| {
            for (q, byte) in q.iter_mut().zip(block) {
                *q = byte.cast_signed();
            }
        })
    }

    /// Opens blocks of Q4_0.
    pub(in crate::import) fn q4_0(&mut self, bytes: &[u8]) -> Source<'_> {
        self.open(bytes, SourceDType::Q4, |block, q| {
            let (low, high) = q.split_at_mut(BLOCK / 2);
            for ((low, high), byte) in low.iter_mut().zip(high).zip(block) {
                *low = (byte & 15).cast_signed() - 8;
                *high = (byte >> 4).cast_signed() - 8;
            }
        })
    }

    fn open(
        &mut self,
        bytes: &[u8],
        dtype: SourceDType,
        integers: impl Fn(&[u8], &mut [i8]),
    ) -> Source<'_> {
        let (_, block_bytes) = dtype.block();
        let blocks = bytes.len() / block_bytes;
        self.scales.clear();
        self.q.resize(blocks * BLOCK, 0);
        for (block, q) in bytes.chunks_exact(block_bytes).zip(self.q.chunks_exact_mut(BLOCK)) {
            let (scale, rest) = block.split_at(2);
            self.scales.push(half(scale));
            integers(rest, q);
        }
        Source::Blocks { scales: &self.scales, q: &self.q }
    }

    /// Opens blocks of Q6_K.
    pub(in crate::import) fn q6_k(&mut self, bytes: &[u8]) -> Source<'_> {
        let (values, block_bytes) = SourceDType::Q6K.block();
        self.values.resize(bytes.len() / block_bytes * values, 0.0);
        let blocks = bytes.chunks_exact(block_bytes).zip(self.values.chunks_exact_mut(values));
        for (block, out) in blocks {
            let (low, rest) = block.split_at(128);
            let (high, rest) = rest.split_at(64);
            let (scales, d) = rest.split_at(16);
            let d = half(d);
            for (i, out) in out.iter_mut().enumerate() {
                let (h, g, l) = (i / 128, i % 128 / 32, i % 32);
                let low = low[h * 64 + g % 2 * 32 + l] >> (g / 2 * 4) & 15;
                let high = high[h * 32 + l] >> (2 * g) & 3;
                let scale = scales[h * 8 + 2 * g + l / 16].cast_signed();
                let q = (low | high << 4).cast_signed() - 32;
                *out = d * f32::from(scale) * f32::from(q);
            }
        }
        Source::F32(&self.values)
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}
