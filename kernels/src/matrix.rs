//! Weights of a linear map, packed for products that vectorise over outputs.
//!
//! Layout, which is also the layout on disk: outputs are cut into panels of [`PANEL`]; the last
//! panel is filled with zeros. A panel stores, for k upwards, its 32 weights side by side:
//! - f32: `[panel][k][32]`;
//! - bf16: `[panel][k / 2][32][2]`, two consecutive k of one output in one 32-bit word, the even
//!   k in the low half; an odd K is filled with one zero row;
//! - int8, int6, int4: `[panel][k / 32]` blocks, each with its scales: see [`crate::blocks`].
//!
//! Invariant: packing never changes a value except by rounding to the stored format
//! (nearest, ties to even; for blocks as [`crate::blocks`] says).

use half::{bf16, f16};

use crate::{
    blocks::{BLOCK, BlockLayout},
    buffer::{AlignedBytes, Buffer},
    dtype::DType,
};

/// Outputs per panel.
pub const PANEL: usize = 32;

/// Packed bytes that do not fit the shape they are said to have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{dtype} matrix [{n}, {k}] takes {expected} packed bytes, found {found}")]
pub struct LayoutError {
    dtype: DType,
    n: usize,
    k: usize,
    expected: usize,
    found: usize,
}

/// Row-major values `[n, k]` to pack, in the format that they come in.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16.
    Bf16(&'a [bf16]),
    /// f16.
    F16(&'a [f16]),
    /// Integers in blocks of [`BLOCK`] along K, which is a multiple of it: value = scale · q.
    /// A format of blocks keeps the integers of a block where it can hold them, and rounds the
    /// scale to bf16.
    Blocks {
        /// One scale per block.
        scales: &'a [f32],
        /// The integers `[n, k]`.
        q: &'a [i8],
    },
}

/// Weights `[n, k]`: n outputs of k inputs each.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    dtype: DType,
    n: usize,
    k: usize,
    data: Buffer,
}

impl PackedMatrix {
    /// Bytes that a packed `[n, k]` takes; `None` if that overflows.
    pub fn packed_bytes(dtype: DType, n: usize, k: usize) -> Option<usize> {
        n.div_ceil(PANEL).checked_mul(Self::panel_bytes(dtype, k)?)
    }

    /// Bytes of one panel; `None` if that overflows.
    pub(crate) fn panel_bytes(dtype: DType, k: usize) -> Option<usize> {
        match dtype {
            DType::F32 => k.checked_mul(PANEL * 4),
            DType::Bf16 => k.checked_next_multiple_of(2)?.checked_mul(PANEL * 2),
            DType::Int8 | DType::Int6 | DType::Int4 => {
                k.div_ceil(BLOCK).checked_mul(BlockLayout::of(dtype)?.bytes)
            }
        }
    }

    /// Takes packed bytes as they are.
    pub fn new(dtype: DType, n: usize, k: usize, data: Buffer) -> Result<Self, LayoutError> {
        match Self::packed_bytes(dtype, n, k) {
            Some(expected) if expected == data.len() => Ok(Self { dtype, n, k, data }),
            expected => Err(LayoutError {
                dtype,
                n,
                k,
                expected: expected.unwrap_or(usize::MAX),
                found: data.len(),
            }),
        }
    }

    /// Packs row-major values `[n, k]`.
    ///
    /// # Panics
    /// If `source` does not hold n · k values.
    pub fn pack(dtype: DType, n: usize, k: usize, source: Source<'_>) -> Self {
        let bytes = Self::packed_bytes(dtype, n, k).expect("a matrix in memory has a size");
        let mut data = AlignedBytes::zeroed(bytes);
        pack_into(dtype, n, k, source, &mut data);
        Self { dtype, n, k, data: data.into() }
    }

    /// Stored format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The packed bytes.
    pub fn data(&self) -> &Buffer {
        &self.data
    }

    /// The weights of panel p in f32 format: `[k][PANEL]`.
    pub fn panel_f32(&self, p: usize) -> &[f32] {
        let words = self.k * PANEL;
        &bytemuck::cast_slice(&self.data)[p * words..(p + 1) * words]
    }

    /// The weights of panel p in bf16 format: `[ceil(k / 2)][PANEL]` words of two k each.
    pub fn panel_bf16(&self, p: usize) -> &[u32] {
        let words = self.k.div_ceil(2) * PANEL;
        &bytemuck::cast_slice(&self.data)[p * words..(p + 1) * words]
    }

    /// The weight of output j for input i.
    pub fn get(&self, j: usize, i: usize) -> f32 {
        let (p, lane) = (j / PANEL, j % PANEL);
        if let Some(layout) = BlockLayout::of(self.dtype) {
            let block = p * self.k.div_ceil(BLOCK) + i / BLOCK;
            return layout.get(&self.data[block * layout.bytes..][..layout.bytes], lane, i % BLOCK);
        }
        if self.dtype == DType::F32 {
            return self.panel_f32(p)[i * PANEL + lane];
        }
        let word = self.panel_bf16(p)[(i / 2) * PANEL + lane];
        f32::from_bits(if i.is_multiple_of(2) { word << 16 } else { word & 0xffff_0000 })
    }

    /// The k weights of output j, widened exactly.
    pub fn row(&self, j: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "a row has k values");
        for (i, value) in out.iter_mut().enumerate() {
            *value = self.get(j, i);
        }
    }
}

impl<'a> Source<'a> {
    /// How many values there are.
    fn len(&self) -> usize {
        match self {
            Source::F32(values) => values.len(),
            Source::Bf16(values) => values.len(),
            Source::F16(values) => values.len(),
            Source::Blocks { q, .. } => q.len(),
        }
    }

    /// Value i, widened exactly (the product of scale and integer is rounded to f32).
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Source::F32(values) => values[i],
            Source::Bf16(values) => values[i].to_f32(),
            Source::F16(values) => values[i].to_f32(),
            Source::Blocks { scales, q } => scales[i / BLOCK] * f32::from(q[i]),
        }
    }

    /// All values, as [`Source::get`] widens them.
    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// The values from one index up to another; whole blocks of them.
    pub fn slice(&self, from: usize, to: usize) -> Source<'a> {
        match self {
            Source::F32(values) => Source::F32(&values[from..to]),
            Source::Bf16(values) => Source::Bf16(&values[from..to]),
            Source::F16(values) => Source::F16(&values[from..to]),
            Source::Blocks { scales, q } => {
                Source::Blocks { scales: &scales[from / BLOCK..to / BLOCK], q: &q[from..to] }
            }
        }
    }

    /// Where the first value is that is NaN or infinite. Formats of blocks cannot hold one: its
    /// whole block would become NaN.
    pub fn first_not_finite(&self) -> Option<usize> {
        match self {
            Source::F32(values) => values.iter().position(|v| !v.is_finite()),
            Source::Bf16(values) => values.iter().position(|v| !v.is_finite()),
            Source::F16(values) => values.iter().position(|v| !v.is_finite()),
            Source::Blocks { scales, .. } => {
                scales.iter().position(|v| !v.is_finite()).map(|block| block * BLOCK)
            }
        }
    }
}

/// Packs row-major values `[n, k]` into `out`, which must be zeroed and of
/// [`PackedMatrix::packed_bytes`] length.
pub fn pack_into(dtype: DType, n: usize, k: usize, source: Source<'_>, out: &mut [u8]) {
    match source {
        Source::F32(values) => pack_values(dtype, n, k, values, |v| v, bf16::from_f32, out),
        Source::Bf16(values) => pack_values(dtype, n, k, values, bf16::to_f32, |v| v, out),
        Source::F16(values) => {
            pack_values(dtype, n, k, values, f16::to_f32, |v| bf16::from_f32(v.to_f32()), out)
        }
        Source::Blocks { scales, q } => match BlockLayout::of(dtype) {
            Some(layout) => pack_blocks(dtype, layout, [n, k], scales, q, out),
            None => pack_into(dtype, n, k, Source::F32(&source.to_f32()), out),
        },
    }
}

fn pack_values<T: Copy>(
    dtype: DType,
    n: usize,
    k: usize,
    values: &[T],
    to_f32: impl Fn(T) -> f32,
    to_bf16: impl Fn(T) -> bf16,
    out: &mut [u8],
) {
    assert_eq!(values.len(), n * k, "source holds n * k values");
    let layout = BlockLayout::of(dtype);
    each_row(dtype, n, k, out, |j, lane, panel| {
        let row = &values[j * k..][..k];
        match (layout, dtype) {
            (Some(layout), _) => {
                // The last block is filled with zeros.
                for (values, block) in row.chunks(BLOCK).zip(panel.chunks_exact_mut(layout.bytes)) {
                    let mut x = [0.0; BLOCK];
                    for (x, &v) in x.iter_mut().zip(values) {
                        *x = to_f32(v);
                    }
                    layout.pack(&x, lane, block);
                }
            }
            (None, DType::F32) => {
                let panel: &mut [f32] = bytemuck::cast_slice_mut(panel);
                for (i, &v) in row.iter().enumerate() {
                    panel[i * PANEL + lane] = to_f32(v);
                }
            }
            (None, _) => {
                let panel: &mut [bf16] = bytemuck::cast_slice_mut(panel);
                for (i, &v) in row.iter().enumerate() {
                    panel[(i / 2) * PANEL * 2 + lane * 2 + i % 2] = to_bf16(v);
                }
            }
        }
    });
}

fn pack_blocks(
    dtype: DType,
    layout: &BlockLayout,
    [n, k]: [usize; 2],
    scales: &[f32],
    q: &[i8],
    out: &mut [u8],
) {
    assert!(k.is_multiple_of(BLOCK), "whole blocks in a row");
    assert_eq!((scales.len(), q.len()), (n * k / BLOCK, n * k), "source holds n * k values");
    each_row(dtype, n, k, out, |j, lane, panel| {
        let scales = &scales[j * k / BLOCK..];
        let (q, _) = q[j * k..][..k].as_chunks();
        for ((scale, q), block) in scales.iter().zip(q).zip(panel.chunks_exact_mut(layout.bytes)) {
            layout.repack(*scale, q, lane, block);
        }
    });
}

/// Hands every row with its lane to `pack`, which writes it to its panel.
fn each_row(
    dtype: DType,
    n: usize,
    k: usize,
    out: &mut [u8],
    mut pack: impl FnMut(usize, usize, &mut [u8]),
) {
    assert_eq!(Some(out.len()), PackedMatrix::packed_bytes(dtype, n, k), "room for the panels");
    let panel_bytes = PackedMatrix::panel_bytes(dtype, k).expect("a matrix in memory has a size");
    if panel_bytes == 0 {
        return;
    }
    for (p, panel) in out.chunks_exact_mut(panel_bytes).enumerate() {
        for lane in 0..PANEL.min(n - p * PANEL) {
            pack(p * PANEL + lane, lane, panel);
        }
    }
}
