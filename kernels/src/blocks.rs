//! Integers in blocks that share a scale: weights in `int8`, `int6` and `int4`, and the activations
//! that meet them.
//!
//! **Weights.** 32 consecutive k of one output make a block: value = scale · q, exactly, with the
//! scale in bf16 (so that no weight that bf16 can hold is out of range).
//! - int8: q in −127..=127, scale = largest magnitude / 127, rounded up to bf16;
//! - int6: q in −32..=31, and int4: q in −8..=7; of 9 and 17 scales on each side of zero, around
//!   largest / 32 and largest / 8, the one with the least squared error in units of the largest
//!   weight, the first among equals. The scale may be negative, so that the largest weight can take
//!   the lowest q (as in llama.cpp's Q4_0).
//!
//! **A block of a panel**, as it lies in memory and on disk: first the scales of the panel's 32
//! outputs as 16 words, output i in the low half of word i and output i + 16 in the high half;
//! then words of one output each, 32 words side by side:
//! - int8, 8 rows of words: byte j of row g is q + 128 of k = 4g + j. 1088 bytes in all;
//! - int6, 6 rows of words: byte j of row 3h + r holds q + 32 of k = 16h + 4r + j in its low six
//!   bits and, above them, bits 2r and 2r + 1 of that of k = 16h + 12 + j. 832 bytes in all;
//! - int4, 4 rows of words: byte j of row g holds q + 8 of k = 8g + j in its low half and of
//!   k = 8g + 4 + j in its high half. 576 bytes in all.
//!
//! K that is no multiple of 32 is filled with q = 0.
//!
//! **Activations.** A row `[k]` becomes one record of [`RECORD_WORDS`] words per block: 32 bytes q,
//! the scale (f32), and −Σ q (i32, which takes the offset of the weights off a product).
//! scale = largest / 127, q = x · (127 / largest) rounded to nearest, ties to even.
//!
//! **Both.** A block whose largest magnitude is below 2⁻¹⁰⁰ counts as zeros. A block that holds
//! NaN or infinity gets the scale NaN, and so becomes whatever is computed from it.

use std::ops::RangeInclusive;

use crate::{
    dtype::DType,
    matrix::PANEL,
    simd::{Simd, vectorised},
};

/// k's per block; fixed by the determinism contract.
pub const BLOCK: usize = 32;

/// Words of 4 bytes that the activations of one block take.
pub const RECORD_WORDS: usize = BLOCK / 4 + 2;

/// Scales that are tried for a block.
struct Search {
    /// The lowest q, as a positive number.
    half: f32,
    /// How many steps the largest weight has with the first scale.
    most: f32,
    /// How many fewer it has with the next.
    fewer: f32,
    /// Scales on each side of zero.
    scales: usize,
}

/// The largest weight becomes ±32.5 to ±30.5, cut off at −32 and 31.
const INT6: Search = Search { half: 32.0, most: 32.5, fewer: 0.25, scales: 9 };
/// The largest weight becomes ±9 to ±6.6, cut off at −8 and 7.
const INT4: Search = Search { half: 8.0, most: 9.0, fewer: 0.15, scales: 17 };

/// Below this magnitude a block counts as zeros: 2⁻¹⁰⁰.
const NOTHING: f32 = f32::from_bits(27 << 23);

/// Bytes of the scales of a block of a panel.
pub(crate) const SCALE_BYTES: usize = PANEL * 2;
/// Bytes of a block of a panel in int8.
pub(crate) const INT8_BYTES: usize = SCALE_BYTES + BLOCK * PANEL;
/// Bytes of a block of a panel in int6.
pub(crate) const INT6_BYTES: usize = SCALE_BYTES + BLOCK * PANEL * 3 / 4;
/// Bytes of a block of a panel in int4.
pub(crate) const INT4_BYTES: usize = SCALE_BYTES + BLOCK * PANEL / 2;

/// Where the scale of a lane lies in a block of a panel, in units of bf16.
fn scale_at(lane: usize) -> usize {
    lane % 16 * 2 + lane / 16
}

/// A bf16 scale, widened.
fn scale(block: &[u8], lane: usize) -> f32 {
    let at = 2 * scale_at(lane);
    f32::from_bits(u32::from(u16::from_le_bytes([block[at], block[at + 1]])) << 16)
}

/// Of the finite bf16 values that are at least `x`, the least; `x` is not negative.
fn bf16_up(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0xffff) & 0xffff_0000)
}

/// `x` in bf16, to nearest, ties to even; `x` is finite.
#[inline(always)]
fn bf16_nearest(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

/// Adding it rounds to whole numbers: 1.5 · 2²³.
const MAGIC: f32 = 12_582_912.0;

/// Whole number nearest to `x`, ties to even; |x| is below 2²².
#[inline(always)]
fn nearest(x: f32) -> i32 {
    (x + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()).cast_signed()
}

vectorised! {
    /// One block of int8: its scale and integers.
    fn quantise_int8(x: &[f32; BLOCK]) -> (f32, [i8; BLOCK]) {
        let largest = match largest_magnitude(x) {
            Ok(largest) => largest,
            Err(scale) => return (scale, [0; BLOCK]),
        };
        let scale = bf16_up(largest / 127.0);
        (scale, x.map(|v| nearest(v / scale).clamp(-127, 127) as i8))
    }
}

vectorised! {
    /// One block of int6 or int4: its scale and integers.
    fn quantise_searched(x: &[f32; BLOCK], search: &Search) -> (f32, [i8; BLOCK]) {
        let &Search { half, most, fewer, scales } = search;
        let largest = match largest_magnitude(x) {
            Ok(largest) => largest,
            Err(scale) => return (scale, [0; BLOCK]),
        };
        let mut best = (f32::INFINITY, 0.0);
        for i in 0..scales {
            let steps = most - fewer * i as f32;
            let per_step = 1.0 / steps;
            for sign in [-1.0f32, 1.0] {
                let scale = bf16_nearest(sign * largest / steps);
                let inverse = 1.0 / scale;
                let mut errors = [0.0f32; 8];
                // Loops over lanes with nothing else in them: they become vectors.
                for group in 0..BLOCK / 8 {
                    for (lane, error) in errors.iter_mut().enumerate() {
                        let exact = x[group * 8 + lane] * inverse;
                        let rounded = (exact.clamp(-half, half - 1.0) + MAGIC) - MAGIC;
                        let off = (exact - rounded) * per_step;
                        *error += off * off;
                    }
                }
                let error = errors.iter().sum::<f32>();
                if error < best.0 {
                    best = (error, scale);
                }
            }
        }
        let inverse = 1.0 / best.1;
        let mut q = [0; BLOCK];
        for (q, x) in q.iter_mut().zip(x) {
            *q = nearest((x * inverse).clamp(-half, half - 1.0)) as i8;
        }
        (best.1, q)
    }
}

/// The largest magnitude of a block, or the scale of a block of zeros that stands for it: 0 where
/// it counts as zeros, NaN where something is not finite.
#[inline(always)]
fn largest_magnitude(x: &[f32; BLOCK]) -> Result<f32, f32> {
    // As integers, NaN is above infinity and infinity above every number.
    let mut largest = 0;
    for v in x {
        largest = largest.max(v.to_bits() & 0x7fff_ffff);
    }
    match f32::from_bits(largest) {
        largest if largest < NOTHING => Err(0.0),
        largest if largest.is_finite() => Ok(largest),
        _ => Err(f32::NAN),
    }
}

fn set_scale(block: &mut [u8], lane: usize, scale: f32) {
    let at = 2 * scale_at(lane);
    block[at..at + 2].copy_from_slice(&((scale.to_bits() >> 16) as u16).to_le_bytes());
}

/// Where byte j of a row of words lies in a block.
fn byte_at(row: usize, lane: usize, j: usize) -> usize {
    SCALE_BYTES + (row * PANEL + lane) * 4 + j
}

/// How a format of blocks stores one.
pub(crate) struct BlockLayout {
    /// Bytes of a block of a panel.
    pub(crate) bytes: usize,
    /// The integers that it holds.
    range: RangeInclusive<i8>,
    /// Scale and integers of 32 weights.
    quantise: fn(&[f32; BLOCK]) -> (f32, [i8; BLOCK]),
    /// Writes the integers of one output.
    put: fn(&[i8; BLOCK], usize, &mut [u8]),
    /// Reads the integer of an output and k.
    get: fn(&[u8], usize, usize) -> i8,
}

impl BlockLayout {
    /// The layout of a format of blocks.
    pub(crate) fn of(dtype: DType) -> Option<&'static Self> {
        static INT8_LAYOUT: BlockLayout = BlockLayout {
            bytes: INT8_BYTES,
            range: -127..=127,
            quantise: |x| quantise_int8(Simd::best(), x),
            put: put_int8,
            get: |block, lane, k| (block[byte_at(k / 4, lane, k % 4)] ^ 0x80).cast_signed(),
        };
        static INT6_LAYOUT: BlockLayout = BlockLayout {
            bytes: INT6_BYTES,
            range: -32..=31,
            quantise: |x| quantise_searched(Simd::best(), x, &INT6),
            put: put_int6,
            get: get_int6,
        };
        static INT4_LAYOUT: BlockLayout = BlockLayout {
            bytes: INT4_BYTES,
            range: -8..=7,
            quantise: |x| quantise_searched(Simd::best(), x, &INT4),
            put: put_int4,
            get: get_int4,
        };
        match dtype {
            DType::F32 | DType::Bf16 => None,
            DType::Int8 => Some(&INT8_LAYOUT),
            DType::Int6 => Some(&INT6_LAYOUT),
            DType::Int4 => Some(&INT4_LAYOUT),
        }
    }

    /// Writes 32 weights of one output, rounded to the format.
    pub(crate) fn pack(&self, x: &[f32; BLOCK], lane: usize, block: &mut [u8]) {
        let (scale, q) = (self.quantise)(x);
        set_scale(block, lane, scale);
        (self.put)(&q, lane, block);
    }

    /// Writes 32 weights of one output that are integers with a scale already: the integers stay
    /// if the format holds them all, and the scale becomes bf16.
    pub(crate) fn repack(&self, scale: f32, q: &[i8; BLOCK], lane: usize, block: &mut [u8]) {
        if q.iter().all(|q| self.range.contains(q)) {
            set_scale(block, lane, bf16_nearest(scale));
            (self.put)(q, lane, block);
        } else {
            self.pack(&q.map(|q| scale * f32::from(q)), lane, block);
        }
    }

    /// The weight of k within a block.
    pub(crate) fn get(&self, block: &[u8], lane: usize, k: usize) -> f32 {
        scale(block, lane) * f32::from((self.get)(block, lane, k))
    }
}

fn put_int8(q: &[i8; BLOCK], lane: usize, block: &mut [u8]) {
    for (k, q) in q.iter().enumerate() {
        block[byte_at(k / 4, lane, k % 4)] = q.cast_unsigned() ^ 0x80;
    }
}

fn put_int6(q: &[i8; BLOCK], lane: usize, block: &mut [u8]) {
    let q = q.map(|q| (q + 32).cast_unsigned());
    for k in (0..BLOCK).filter(|k| k % 16 < 12) {
        let spread = q[k / 16 * 16 + 12 + k % 4] >> (k % 16 / 4 * 2);
        block[byte_at(k / 16 * 3 + k % 16 / 4, lane, k % 4)] = q[k] | spread << 6;
    }
}

fn get_int6(block: &[u8], lane: usize, k: usize) -> i8 {
    let row = |r: usize| block[byte_at(k / 16 * 3 + r, lane, k % 4)];
    let q = match k % 16 / 4 {
        3 => row(0) >> 6 | row(1) >> 6 << 2 | row(2) >> 6 << 4,
        r => row(r) & 63,
    };
    q.cast_signed() - 32
}

fn put_int4(q: &[i8; BLOCK], lane: usize, block: &mut [u8]) {
    for (k, q) in q.iter().enumerate() {
        let at = byte_at(k / 8, lane, k % 4);
        let nibble = (q + 8).cast_unsigned();
        // The low half comes first and overwrites what was there.
        block[at] = if k % 8 < 4 { nibble } else { block[at] | nibble << 4 };
    }
}

fn get_int4(block: &[u8], lane: usize, k: usize) -> i8 {
    let byte = block[byte_at(k / 8, lane, k % 4)];
    (if k % 8 < 4 { byte & 15 } else { byte >> 4 }).cast_signed() - 8
}

/// Words that the records of a row of k values take.
pub fn record_words(k: usize) -> usize {
    k.div_ceil(BLOCK) * RECORD_WORDS
}

vectorised! {
    /// [`quantise`], for callers that hold a `Cpu`.
    pub(crate) fn quantise_row(x: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), record_words(x.len()), "one record per block");
        let mut blocks = x.chunks_exact(BLOCK);
        let mut records = out.chunks_exact_mut(RECORD_WORDS);
        for (block, record) in (&mut blocks).zip(&mut records) {
            quantise_block(block.try_into().expect("a whole block"), record);
        }
        if let Some(record) = records.next() {
            let mut block = [0.0; BLOCK];
            block[..blocks.remainder().len()].copy_from_slice(blocks.remainder());
            quantise_block(&block, record);
        }
    }
}

/// Turns a row `[k]` into records; `out` is of [`record_words`] words, of which only the bits
/// matter.
///
/// # Panics
/// If this machine lacks the instructions.
pub fn quantise(simd: Simd, x: &[f32], out: &mut [f32]) {
    assert!(simd.is_available(), "this machine has no {simd}");
    quantise_row(simd, x, out);
}

#[inline(always)]
fn quantise_block(x: &[f32; BLOCK], record: &mut [f32]) {
    let largest = match largest_magnitude(x) {
        Ok(largest) => largest,
        Err(scale) => {
            record.fill(0.0);
            record[BLOCK / 4] = scale;
            return;
        }
    };
    let (scale, inverse) = (largest / 127.0, 127.0 / largest);
    let mut q = [0i8; BLOCK];
    let mut sum = 0;
    for (q, v) in q.iter_mut().zip(x) {
        let whole = nearest(v * inverse);
        sum += whole;
        *q = whole as i8;
    }
    for (word, q) in record.iter_mut().zip(q.chunks_exact(4)) {
        let bytes = [q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8];
        *word = f32::from_bits(u32::from_le_bytes(bytes));
    }
    record[BLOCK / 4] = scale;
    record[BLOCK / 4 + 1] = f32::from_bits((-sum).cast_unsigned());
}

/// The values that a row's records stand for: scale · q.
pub fn dequantise_row(records: &[f32], out: &mut [f32]) {
    assert_eq!(records.len(), record_words(out.len()), "one record per block");
    for (out, record) in out.chunks_mut(BLOCK).zip(records.chunks_exact(RECORD_WORDS)) {
        for (k, out) in out.iter_mut().enumerate() {
            let q = record[k / 4].to_bits().to_le_bytes()[k % 4].cast_signed();
            *out = record[BLOCK / 4] * f32::from(q);
        }
    }
}
