//! The CPU as a [`Device`]: each operation is a function of [`crate::ops`].

use std::borrow::Cow;

use crate::{
    cpu::{Cpu, Tensor},
    device::{Device, DeviceError, Projection, Swiglu, SwigluGroup},
    kv::{KvShape, KvSlot, Query},
    matrix::PackedMatrix,
    ops::{arena::KvArena, attention, elementwise, embed, matmul, norm, rope, swiglu},
};

impl Device for Cpu {
    type Tensor = Tensor;
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type KvArena = KvArena;

    fn describe(&self) -> String {
        let threads = self.pool().threads();
        format!("cpu ({}, {threads} thread{})", self.simd(), if threads == 1 { "" } else { "s" })
    }

    fn host(&self) -> &Cpu {
        self
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

    fn prefetch(&self, next: &PackedMatrix) {
        self.pool().announce(next.data());
    }

    fn prefetch_piece(&self) -> bool {
        self.pool().prefetch_piece()
    }

    fn progress(&self) -> u64 {
        self.pool().progress()
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

    fn rotary_table(
        &self,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        rope::rotary_table(self, positions, inv_freq, scale, out.as_mut_slice());
        Ok(())
    }

    fn rope(&self, x: &mut Tensor, table: &Tensor) -> Result<(), DeviceError> {
        rope::rope(self, x.as_mut_slice(), table.cols(), table.as_slice());
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
