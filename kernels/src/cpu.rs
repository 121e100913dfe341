//! The CPU as a [`Device`].
//!
//! Owns the compute threads and the choice of instructions; neither changes a result.

use std::borrow::Cow;

pub use crate::ops::arena::KvArena;
use crate::{
    buffer::AlignedBytes,
    device::{Device, DeviceError, Projection, Swiglu, SwigluGroup},
    kv::{KvShape, KvSlot, Query},
    matrix::PackedMatrix,
    ops::{attention, elementwise, embed, matmul, norm, rope, swiglu},
    pool::Pool,
    rows::Rows,
    simd::Simd,
};

/// Compute threads and the instructions that they use.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    simd: Simd,
}

impl Cpu {
    /// A CPU of `threads` threads, the caller's among them.
    ///
    /// # Panics
    /// If `threads` is zero, or this machine lacks the instructions.
    pub fn new(threads: usize, simd: Simd) -> Self {
        assert!(simd.is_available(), "this machine has no {simd}");
        Self { pool: Pool::new(threads), simd }
    }

    /// A CPU of `threads` threads with the fastest instructions of this machine.
    ///
    /// # Panics
    /// If `threads` is zero.
    pub fn best(threads: usize) -> Self {
        Self::new(threads, Simd::best())
    }

    /// The instructions in use.
    pub fn simd(&self) -> Simd {
        self.simd
    }

    /// The compute threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// Activations `[rows, cols]` in aligned memory.
pub struct Tensor {
    rows: usize,
    cols: usize,
    bytes: AlignedBytes,
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, bytes: AlignedBytes::zeroed(rows * cols * size_of::<f32>()) }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    pub fn as_slice(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.bytes[..self.rows * self.cols * size_of::<f32>()])
            [..self.rows * self.cols]
    }

    /// All values, row by row.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        &mut bytemuck::cast_slice_mut(&mut self.bytes[..len * size_of::<f32>()])[..len]
    }

    /// Row i.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.as_slice()[i * self.cols..(i + 1) * self.cols]
    }

    /// The rows as kernels take them.
    pub fn as_rows(&self) -> Rows<'_> {
        Rows::Dense { values: self.as_slice(), cols: self.cols.max(1) }
    }

    /// Changes the shape; contents are lost. Memory is kept where it is large enough.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        if self.bytes.len() < rows * cols * size_of::<f32>() {
            *self = Self::zeros(rows, cols);
        }
        (self.rows, self.cols) = (rows, cols);
    }
}

impl Device for Cpu {
    type Tensor = Tensor;
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type KvArena = KvArena;

    fn describe(&self) -> String {
        let threads = self.pool.threads();
        format!("cpu ({}, {threads} thread{})", self.simd, if threads == 1 { "" } else { "s" })
    }

    fn matrix(&self, packed: PackedMatrix) -> Result<PackedMatrix, DeviceError> {
        Ok(packed)
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>, DeviceError> {
        Ok(values.to_vec())
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor, DeviceError> {
        Ok(Tensor::zeros(rows, cols))
    }

    fn reshape(&self, t: &mut Tensor, rows: usize, cols: usize) -> Result<(), DeviceError> {
        t.reshape(rows, cols);
        Ok(())
    }

    fn read<'a>(&self, t: &'a Tensor) -> Result<Cow<'a, [f32]>, DeviceError> {
        Ok(Cow::Borrowed(t.as_slice()))
    }

    fn write(&self, t: &mut Tensor, values: &[f32]) -> Result<(), DeviceError> {
        t.as_mut_slice().copy_from_slice(values);
        Ok(())
    }

    fn expect(&self, next: &PackedMatrix) {
        self.pool.expect(next.data());
    }

    fn fetch_expected(&self) -> bool {
        self.pool.fetch_expected()
    }

    fn embed(
        &self,
        table: &PackedMatrix,
        ids: &[u32],
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        embed::embed(self, table, ids, out.as_mut_slice());
        Ok(())
    }

    fn rms_norm(
        &self,
        x: &Tensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        norm::rms_norm(self, x.as_slice(), weight, eps, out.as_mut_slice());
        Ok(())
    }

    fn rms_norm_in_place(
        &self,
        x: &mut Tensor,
        weight: &Vec<f32>,
        eps: f32,
    ) -> Result<(), DeviceError> {
        norm::rms_norm_in_place(self, x.as_mut_slice(), weight, eps);
        Ok(())
    }

    fn matmul(
        &self,
        x: &Tensor,
        w: &PackedMatrix,
        bias: Option<&Vec<f32>>,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        matmul::matmul(self, x.as_rows(), w, bias.map(Vec::as_slice), out.as_mut_slice());
        Ok(())
    }

    fn project(
        &self,
        x: &Tensor,
        projections: [Projection<'_, Self>; 3],
    ) -> Result<(), DeviceError> {
        let mut linears = projections.map(|p| matmul::Linear {
            weight: p.weight,
            bias: p.bias.map(Vec::as_slice),
            out: p.out.as_mut_slice(),
        });
        matmul::matmul_many(self, x.as_rows(), &mut linears);
        Ok(())
    }

    fn clamp(&self, x: &mut Tensor, limit: f32) -> Result<(), DeviceError> {
        elementwise::clamp(self, x.as_mut_slice(), limit);
        Ok(())
    }

    fn turns(
        &self,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        rope::turns(self, positions, inv_freq, scale, out.as_mut_slice());
        Ok(())
    }

    fn rope(&self, x: &mut Tensor, turns: &Tensor) -> Result<(), DeviceError> {
        rope::rope(self, x.as_mut_slice(), turns.cols(), turns.as_slice());
        Ok(())
    }

    fn kv_arena(&self, shape: KvShape, pages: usize) -> Result<KvArena, DeviceError> {
        Ok(KvArena::new(shape, pages))
    }

    fn kv_append(
        &self,
        arena: &mut KvArena,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
        slots: &[KvSlot],
    ) -> Result<(), DeviceError> {
        arena.append(self, layer, k.as_slice(), v.as_slice(), slots);
        Ok(())
    }

    fn attention(
        &self,
        arena: &KvArena,
        layer: usize,
        q: &Tensor,
        queries: &[Query<'_>],
        scale: f32,
        window: Option<u32>,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        let (q, out) = (q.as_slice(), out.as_mut_slice());
        attention::attention(self, arena, layer, q, queries, scale, window, out);
        Ok(())
    }

    fn select_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), DeviceError> {
        elementwise::select_rows(x.as_rows(), rows, out.as_mut_slice());
        Ok(())
    }

    fn weighted_sum(
        &self,
        parts: &[&[f32]],
        weights: &[f32],
        ends: &[u32],
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        elementwise::weighted_sum(self, parts, weights, ends, out.as_mut_slice());
        Ok(())
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<(), DeviceError> {
        elementwise::add(self, x.as_mut_slice(), y.as_slice());
        Ok(())
    }

    fn swiglu(
        &self,
        x: &Tensor,
        weights: Swiglu<'_, PackedMatrix>,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        swiglu::swiglu(self, x.as_rows(), weights, out.as_mut_slice());
        Ok(())
    }

    fn sigmoid_gate(&self, x: &mut Tensor, logits: &Tensor) -> Result<(), DeviceError> {
        elementwise::sigmoid_gate(self, x.as_mut_slice(), logits.as_slice());
        Ok(())
    }

    fn swiglu_groups(
        &self,
        groups: &mut [SwigluGroup<'_, PackedMatrix>],
    ) -> Result<(), DeviceError> {
        swiglu::swiglu_groups(self, groups);
        Ok(())
    }
}
