//! Copies values from a source into a shard, in pieces of bounded size.
//!
//! Packing works panel by panel, so a piece is a whole number of panels and the packed bytes of
//! the pieces, one after the other, are the packed bytes of the matrix.

use half::{bf16, f16};
use lite_llm_kernels::{
    buffer::AlignedBytes,
    dtype::DType,
    matrix::{PANEL, PackedMatrix, Source},
};

use super::{
    ImportError, PIECE_BYTES,
    gguf::blocks::Blocks,
    names::Origin,
    not_finite,
    pack::{NotFinite, Packer},
    tensors::{RowOrder, SourceDType, Tensors, View},
};
use crate::checkpoint::{
    layout::{Shape, TensorSpec},
    writer::TensorSink,
};

/// Copies tensors of one source, with buffers that are used again.
pub(super) struct Copier<'a> {
    source: &'a Tensors,
    read: AlignedBytes,
    ordered: AlignedBytes,
    blocks: Blocks,
    packer: Packer,
}

impl<'a> Copier<'a> {
    pub(super) fn new(source: &'a Tensors) -> Self {
        Self {
            source,
            read: AlignedBytes::zeroed(0),
            ordered: AlignedBytes::zeroed(0),
            blocks: Blocks::default(),
            packer: Packer::new(),
        }
    }

    pub(super) fn copy(
        &mut self,
        origin: &Origin,
        spec: &TensorSpec,
        sink: &mut TensorSink<'_>,
    ) -> Result<(), ImportError> {
        match (origin, spec.shape) {
            (Origin::Rows(view), Shape::Matrix { n, k }) => {
                let rows = view.rows_in(PIECE_BYTES, PANEL);
                for from in (0..n).step_by(rows) {
                    let piece = view.slice(from, rows.min(n - from));
                    self.pack(&piece, from, spec.dtype, k, sink)?;
                }
                Ok(())
            }
            (Origin::Rows(view), Shape::Vector { .. }) => {
                let values = self.values(view)?;
                Ok(sink.write(bytemuck::cast_slice(&values))?)
            }
            (Origin::Means(view, ranges), shape) => {
                let values = self.values(view)?;
                let mut means = Vec::with_capacity(ranges.len() * view.cols);
                for range in ranges {
                    for col in 0..view.cols {
                        let column = range.clone().map(|row| values[row * view.cols + col]);
                        let sum: f64 = column.map(f64::from).sum();
                        means.push((sum / range.len() as f64) as f32);
                    }
                }
                if let Shape::Vector { .. } = shape {
                    return Ok(sink.write(bytemuck::cast_slice(&means))?);
                }
                let matrix =
                    PackedMatrix::pack(spec.dtype, ranges.len(), view.cols, Source::F32(&means));
                Ok(sink.write(matrix.data())?)
            }
        }
    }

    /// Packs some rows of a tensor, from row `from` on.
    fn pack(
        &mut self,
        piece: &View,
        from: usize,
        dtype: DType,
        k: usize,
        sink: &mut TensorSink<'_>,
    ) -> Result<(), ImportError> {
        fill(self.source, piece, &mut self.read, &mut self.ordered)?;
        let source = typed(piece, &self.read, &mut self.blocks);
        match self.packer.pack(dtype, piece.rows, k, source) {
            Ok(packed) => Ok(sink.write(packed)?),
            Err(at) => {
                let (tensor, path) = self.source.name_of(piece);
                Err(not_finite(path, tensor, NotFinite { row: from + at.row, ..at }))
            }
        }
    }

    fn values(&mut self, view: &View) -> Result<Vec<f32>, ImportError> {
        fill(self.source, view, &mut self.read, &mut self.ordered)?;
        let source = typed(view, &self.read, &mut self.blocks);
        if let Some(at) = source.first_not_finite() {
            let (row, col, value) = (at / view.cols, at % view.cols, source.get(at));
            let (tensor, path) = self.source.name_of(view);
            return Err(not_finite(path, tensor, NotFinite { row, col, value }));
        }
        Ok(source.to_f32())
    }
}

/// Reads the bytes of a view, its rows in plain order; `ordered` is used where they are not.
fn fill(
    source: &Tensors,
    view: &View,
    read: &mut AlignedBytes,
    ordered: &mut AlignedBytes,
) -> Result<(), ImportError> {
    let bytes = view.bytes() as usize;
    grow(read, bytes);
    source.read(view, &mut read[..bytes])?;
    let RowOrder::Interleaved { head } = view.order else { return Ok(()) };
    grow(ordered, bytes);
    let row = view.row_bytes();
    for (i, to) in ordered[..bytes].chunks_exact_mut(row).enumerate() {
        // Row i of half h of a head stands at 2 i + h in the file.
        let (first, in_head) = (i - i % head, i % head);
        let from = first + in_head % (head / 2) * 2 + in_head / (head / 2);
        to.copy_from_slice(&read[from * row..][..row]);
    }
    std::mem::swap(read, ordered);
    Ok(())
}

fn grow(buffer: &mut AlignedBytes, bytes: usize) {
    if buffer.len() < bytes {
        *buffer = AlignedBytes::zeroed(bytes);
    }
}

fn typed<'a>(view: &View, read: &'a AlignedBytes, blocks: &'a mut Blocks) -> Source<'a> {
    let bytes = &read[..view.bytes() as usize];
    match view.dtype {
        SourceDType::F32 => Source::F32(bytemuck::cast_slice::<u8, f32>(bytes)),
        SourceDType::Bf16 => Source::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
        SourceDType::F16 => Source::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
        SourceDType::Q8 => blocks.q8_0(bytes),
        SourceDType::Q4 => blocks.q4_0(bytes),
        SourceDType::Q6K => blocks.q6_k(bytes),
    }
}
