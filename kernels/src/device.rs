//! The seam between the model and what computes it.
//!
//! [`Device`] is all that a forward pass asks of a machine. [`crate::cpu::Cpu`] is one
//! implementation, [`crate::cuda_device::Gpu`] another. All tensors are row-major f32 activations
//! `[rows, cols]`; weights are whatever the device made of a packed matrix.

use std::borrow::Cow;

use bytemuck::{Pod, Zeroable};

use crate::{cpu::Cpu, kv::KvShape, kv::KvSlot, kv::Query, matrix::PackedMatrix};

/// Why a device could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device has no room for an allocation.
    #[error("{device}: out of memory: {needed} bytes asked, {free} bytes free")]
    OutOfMemory {
        /// Which device.
        device: String,
        /// Bytes asked for.
        needed: u64,
        /// Bytes that were free.
        free: u64,
    },
    /// The device failed; nothing computed since can be trusted.
    #[error("{device}: {reason}")]
    Failed {
        /// Which device.
        device: String,
        /// What it reported.
        reason: String,
    },
}

/// Weights of one gated feed-forward network: `down( silu(gate·x) * (up·x) )`.
pub struct Swiglu<'a, M> {
    /// `[intermediate, hidden]`.
    pub gate: &'a M,
    /// `[intermediate, hidden]`.
    pub up: &'a M,
    /// `[hidden, intermediate]`.
    pub down: &'a M,
}

impl<M> Clone for Swiglu<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Swiglu<'_, M> {}

/// One network and the rows that it is to be applied to.
pub struct SwigluGroup<'a, M> {
    /// The network.
    pub weights: Swiglu<'a, M>,
    /// Input rows, each `[hidden]`, wherever they lie: they are read in place.
    pub rows: Vec<&'a [f32]>,
    /// Output rows, each `[hidden]`, one per input row.
    pub outputs: Vec<&'a mut [f32]>,
}

/// One linear map of [`Device::project`].
pub struct Projection<'a, D: Device + ?Sized> {
    /// `[n, k]`.
    pub weight: &'a D::Matrix,
    /// `[n]`.
    pub bias: Option<&'a D::Vector>,
    /// `[rows, n]`.
    pub out: &'a mut D::Tensor,
}

/// How a row's token is chosen: the determinism contract's rule 9 without bias and penalties.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// 0 is greedy.
    pub temperature: f32,
    /// Above 0, at most 1, which is no limit.
    pub top_p: f32,
    /// 0 is no limit.
    pub min_p: f32,
    /// 0 is no limit.
    pub top_k: u32,
    /// The row's random number, from 0, below 1.
    pub unit: f64,
}

/// What a forward pass asks of the machine that computes it.
///
/// Outputs are given in their right shape; a caller that passes a wrong one has a defect, and that
/// panics.
/// Every operation obeys the determinism contract.
pub trait Device: Send + Sync + 'static {
    /// Activations, f32 `[rows, cols]`, in the device's memory.
    type Tensor: Send + 'static;
    /// Weights of a linear map, in the device's own layout.
    type Matrix: Send + Sync + 'static;
    /// A short f32 vector (norm weights, biases).
    type Vector: Send + Sync + 'static;
    /// Pages of keys and values for all layers and sequences.
    type KvArena: Send + 'static;

    /// Name for people, for example `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// The processors of its host: itself, or those that feed it.
    fn host(&self) -> &Cpu;

    /// Takes packed weights to the device (on a CPU: the same memory).
    fn matrix(&self, packed: PackedMatrix) -> Result<Self::Matrix, DeviceError>;
    /// Takes a vector to the device.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, DeviceError>;
    /// An uninitialised-by-contract tensor `[rows, cols]`.
    fn tensor(&self, rows: usize, cols: usize) -> Result<Self::Tensor, DeviceError>;
    /// Changes a tensor's shape, reusing its memory where it is large enough; contents are lost.
    fn reshape(&self, t: &mut Self::Tensor, rows: usize, cols: usize) -> Result<(), DeviceError>;
    /// The values `[rows * cols]`; borrowed where the host can see the device's memory.
    fn read<'a>(&self, t: &'a Self::Tensor) -> Result<Cow<'a, [f32]>, DeviceError>;
    /// Whether all values are finite numbers.
    fn is_finite(&self, t: &Self::Tensor) -> Result<bool, DeviceError> {
        // No early exit, so that the loop vectorises.
        Ok(self.read(t)?.iter().fold(true, |all, v| all & v.is_finite()))
    }
    /// Whether it chooses tokens of so many itself: see [`Device::choose`].
    fn chooses(&self, _vocabulary: usize) -> bool {
        false
    }
    /// Chooses a token of each row of finite `logits`, `[rows, vocabulary]`; `None` if that is left to
    /// the host.
    fn choose(
        &self,
        _logits: &Self::Tensor,
        _draws: &[Draw],
    ) -> Result<Option<Vec<u32>>, DeviceError> {
        Ok(None)
    }
    /// Copies `[rows * cols]` values into a tensor.
    fn write(&self, t: &mut Self::Tensor, values: &[f32]) -> Result<(), DeviceError>;

    /// Says which weights are probably read next. Threads that have nothing to do may fetch their
    /// beginnings toward themselves; results do not depend on it.
    fn prefetch(&self, _next: &Self::Matrix) {}
    /// Fetches a piece of what is expected, for a caller who has nothing else to do. Returns
    /// whether there was one.
    fn prefetch_piece(&self) -> bool {
        false
    }

    /// Operations that have ended so far: it stands still while the device is stuck or idle.
    fn progress(&self) -> u64 {
        0
    }

    /// Why the device can compute nothing more, if something has happened to it that only a new process
    /// gets over.
    fn lost(&self) -> Option<String> {
        None
    }

    /// `out[r, :] = table[ids[r], :]`. `table` is `[vocabulary, cols]`.
    fn embed(
        &self,
        table: &Self::Matrix,
        ids: &[u32],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// `out = x / sqrt(mean(x²) + eps) * weight`, over each whole row.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// The same in place over each consecutive run of `weight.len()` elements of every row
    /// (a head, or the whole row).
    fn rms_norm_in_place(
        &self,
        x: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(), DeviceError>;
    /// `out = x · wᵀ (+ bias)`: `[rows, k] · [n, k]ᵀ → [rows, n]`.
    fn matmul(
        &self,
        x: &Self::Tensor,
        w: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// [`Device::matmul`] of the same rows with several weights of one kind of format (blocks of
    /// integers, or not), as one piece of work.
    fn project(
        &self,
        x: &Self::Tensor,
        projections: [Projection<'_, Self>; 3],
    ) -> Result<(), DeviceError>;
    /// Limits every element to `[-limit, limit]`.
    fn clamp(&self, x: &mut Self::Tensor, limit: f32) -> Result<(), DeviceError>;
    /// The rotary table that [`Device::rope`] reads: row r of out `[rows, head_dim]` holds the cosines, then the
    /// sines of the angles `positions[r] · inv_freq` (a product in f32), times `scale` (1 unless a
    /// scaling variant says otherwise). `inv_freq` is `[head_dim / 2]`.
    fn rotary_table(
        &self,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// Rotary positions, half-split pairs (i, i + head_dim/2), in place on every head of every
    /// row. `table` is what [`Device::rotary_table`] made for the same rows.
    fn rope(&self, x: &mut Self::Tensor, table: &Self::Tensor) -> Result<(), DeviceError>;

    /// An arena of `pages` pages of [`crate::kv::PAGE_TOKENS`] tokens each, for every layer.
    /// Memory may be taken as pages are first written.
    fn kv_arena(&self, shape: KvShape, pages: usize) -> Result<Self::KvArena, DeviceError>;
    /// Writes keys and values (`[rows, kv_heads * head_dim]`) of `layer` into their slots.
    fn kv_append(
        &self,
        arena: &mut Self::KvArena,
        layer: usize,
        k: &Self::Tensor,
        v: &Self::Tensor,
        slots: &[KvSlot],
    ) -> Result<(), DeviceError>;
    /// Causal attention of each row `r` of `q` (`[rows, heads * head_dim]`) over the cached keys
    /// `0..=queries[r].position` of its sequence, the last `window` of them where one is given.
    /// Head h reads key/value head `h / (heads / kv_heads)`.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        arena: &Self::KvArena,
        layer: usize,
        q: &Self::Tensor,
        queries: &[Query<'_>],
        scale: f32,
        window: Option<u32>,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `out[i, :] = x[rows[i], :]`.
    fn select_rows(
        &self,
        x: &Self::Tensor,
        rows: &[u32],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// `out[r, :] = Σ weights[i] · parts[i]` for i in `ends[r - 1]..ends[r]`, in that order, by
    /// fused multiply-add from +0. `ends` has one entry per row of `out`; parts lie where their
    /// sender left them (4-byte aligned host memory).
    fn weighted_sum(
        &self,
        parts: &[&[f32]],
        weights: &[f32],
        ends: &[u32],
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// `x += y`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<(), DeviceError>;
    /// One gated feed-forward network over all rows: a dense layer or a shared expert.
    fn swiglu(
        &self,
        x: &Self::Tensor,
        weights: Swiglu<'_, Self::Matrix>,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
    /// Multiplies row r by `sigmoid(logits[r, 0])`; `logits` is `[rows, 1]`.
    fn sigmoid_gate(&self, x: &mut Self::Tensor, logits: &Self::Tensor) -> Result<(), DeviceError>;
    /// Many networks, each over its own rows, as one piece of work (the experts of a layer).
    /// Every output is written, whatever it held. Rows and outputs are host memory on devices that
    /// share it, else pinned staging.
    fn swiglu_groups(
        &self,
        groups: &mut [SwigluGroup<'_, Self::Matrix>],
    ) -> Result<(), DeviceError>;
}
