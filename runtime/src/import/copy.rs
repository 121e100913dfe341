//! Copies values from a source folder into a shard, in pieces of bounded size.
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
    hf_tensors::{HfDType, HfTensors, View},
    names::Origin,
    not_finite,
    pack::Packer,
};
use crate::checkpoint::{
    layout::{Shape, TensorSpec},
    writer::TensorSink,
};

/// Copies tensors of one folder, with buffers that are used again.
pub(super) struct Copier<'a> {
    source: &'a HfTensors,
    read: AlignedBytes,
    packer: Packer,
}

impl<'a> Copier<'a> {
    pub(super) fn new(source: &'a HfTensors) -> Self {
        Self { source, read: AlignedBytes::zeroed(0), packer: Packer::new() }
    }

    pub(super) fn copy(
        &mut self,
        origin: &Origin,
        spec: &TensorSpec,
        sink: &mut TensorSink<'_>,
    ) -> Result<(), ImportError> {
        match (origin, spec.shape) {
            (Origin::Rows(view), Shape::Matrix { n, k }) => {
                let rows = (PIECE_BYTES / view.row_bytes().max(1) / PANEL).max(1) * PANEL;
                for from in (0..n).step_by(rows) {
                    let piece = view.slice(from, rows.min(n - from));
                    self.pack(&piece, spec.dtype, k, sink)?;
                }
                Ok(())
            }
            (Origin::Rows(view), Shape::Vector { .. }) => {
                let values = self.values(view)?;
                Ok(sink.write(bytemuck::cast_slice(&values))?)
            }
            (Origin::Means(view, ranges), _) => {
                let values = self.values(view)?;
                let mut means = Vec::with_capacity(ranges.len() * view.cols);
                for range in ranges {
                    for col in 0..view.cols {
                        let column = range.clone().map(|row| values[row * view.cols + col]);
                        let sum: f64 = column.map(f64::from).sum();
                        means.push((sum / range.len() as f64) as f32);
                    }
                }
                let matrix =
                    PackedMatrix::pack(spec.dtype, ranges.len(), view.cols, Source::F32(&means));
                Ok(sink.write(matrix.data())?)
            }
        }
    }

    /// Packs some rows of a tensor.
    fn pack(
        &mut self,
        piece: &View,
        dtype: DType,
        k: usize,
        sink: &mut TensorSink<'_>,
    ) -> Result<(), ImportError> {
        self.fill(piece)?;
        let source = typed(piece.dtype, &self.read[..piece.bytes() as usize]);
        match self.packer.pack(dtype, piece.rows, k, source) {
            Ok(packed) => Ok(sink.write(packed)?),
            Err(at) => {
                let (tensor, path) = self.source.name_of(piece);
                Err(not_finite(path, tensor, at.value, dtype))
            }
        }
    }

    fn values(&mut self, view: &View) -> Result<Vec<f32>, ImportError> {
        self.fill(view)?;
        Ok(match typed(view.dtype, &self.read[..view.bytes() as usize]) {
            Source::F32(values) => values.to_vec(),
            Source::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
            Source::F16(values) => values.iter().map(|v| v.to_f32()).collect(),
        })
    }

    fn fill(&mut self, view: &View) -> Result<(), ImportError> {
        let bytes = view.bytes() as usize;
        grow(&mut self.read, bytes);
        self.source.read(view, &mut self.read[..bytes])
    }
}

fn grow(buffer: &mut AlignedBytes, bytes: usize) {
    if buffer.len() < bytes {
        *buffer = AlignedBytes::zeroed(bytes);
    }
}

fn typed(dtype: HfDType, bytes: &[u8]) -> Source<'_> {
    match dtype {
        HfDType::F32 => Source::F32(bytemuck::cast_slice::<u8, f32>(bytes)),
        HfDType::Bf16 => Source::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
        HfDType::F16 => Source::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
    }
}
