//! What an expert is worth keeping: policies of a cache of experts.
//!
//! A policy hears which experts every token of every sequence was routed to and gives each expert
//! of a layer a value; whoever needs room lets the least valuable go. It knows nothing of what is
//! here, on its way or pinned: that is [`Residency`](super::Residency)'s.
//!
//! Invariants:
//! - Equal calls give equal bits on every machine: no clock, no random numbers, `+ − × ÷` on f32 in
//!   a fixed order.
//! - Values are within 0 to 1 and may be compared between layers.
//! - The state is bounded, also if no sequence is ever said to have ended.

mod ageing;
mod foresight;
mod gate;
mod odds;
mod recency;

use std::fmt::Debug;

pub use self::{
    ageing::Ageing,
    foresight::Foresight,
    recency::{Lru, Segmented},
};
pub(super) use self::{foresight::DISCOUNT, gate::Gate};
use crate::config::{ModelConfig, MoeConfig};

/// What one token of one sequence is routed to in one layer. Experts are indices of the layer's flat
/// list, best first.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The sequence.
    pub stream: u64,
    /// Ids of this token and the two before it; anything constant where there are none.
    pub last: [u32; 3],
    /// What it uses.
    pub experts: &'a [u32],
    /// A wider choice of the same gate, if it was asked (the early one: see
    /// [`ForwardPass::predict`](crate::forward::ForwardPass::predict)); or nothing.
    pub near: &'a [u32],
}

/// See the module's text. Layers are numbered without gaps.
pub trait Policy: Debug + Send {
    /// A token is routed.
    fn used(&mut self, layer: usize, row: &Row<'_>);
    /// All rows of a pass were said, in this layer.
    fn passed(&mut self, _layer: usize) {}
    /// A sequence is over.
    fn ended(&mut self, _stream: u64) {}
    /// What it is worth to keep an expert, 0 to 1.
    fn value(&self, layer: usize, expert: u32) -> f32;
    /// Bytes of its state.
    fn bytes(&self) -> usize;
}

/// What a policy is to know of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers with experts.
    pub layers: usize,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts of a token.
    pub active: usize,
}

impl Shape {
    /// That of so many layers of these experts.
    pub fn new(layers: usize, moe: &MoeConfig) -> Self {
        Self { layers, experts: moe.experts(), active: moe.routes_max(|_| true).max(1) }
    }

    /// That of a model; none if it has no experts.
    pub fn of(config: &ModelConfig) -> Option<Self> {
        config.moe.as_ref().map(|moe| Self::new(config.sparse_layers().count(), moe))
    }
}

/// The policy that serves best: [`Foresight`] with a state of at most 1/64 of the cache's bytes and
/// 16 MiB; where that is too little for it, [`Ageing`].
pub fn best(shape: Shape, budget: u64) -> Box<dyn Policy> {
    let most = usize::try_from(budget / 64).unwrap_or(usize::MAX).min(16 << 20);
    match Foresight::within(shape, most) {
        Some(policy) => Box::new(policy),
        None => Box::new(Ageing::new(shape)),
    }
}

#[cfg(test)]
mod tests;
