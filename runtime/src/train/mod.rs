//! Training: gradients, losses, optimizers, and the curriculum of growing tiers.
//!
//! Read [`params`] (what is trained), `pass.rs` (forward with a tape, and backward), [`step`] (the gradient of a
//! global batch), [`optimizer`], [`trainer`], then [`config`] and [`run`] (phases, data, checkpoints).
//!
//! # Contract
//! - **Bits.** Losses, gradients and parameters are a function of the parameters before, the global
//!   batch, the TierSet and the settings of losses and optimizer; not of micro-batches, threads, SIMD, or
//!   of what is kept and what is computed again (determinism contract, rules 1, 3 and 8). A micro-batch or a rank
//!   owns nodes of the tree over the rows of the global batch ([`lite_llm_kernels::ops::leaves::nodes`]).
//! - **Forward** is inference's forward pass, bit for bit, of each document by itself.
//! - **Nothing outside**: no clock, no threads but the device's; files only in [`data`], [`state`] and
//!   [`run`], whose caller gives the paths.

pub mod balance;
pub mod batch;
mod bytes;
pub mod config;
pub mod data;
mod engine;
pub mod exchange;
pub mod gradients;
pub mod grow;
mod happened;
mod idle;
mod moe;
pub mod optimizer;
pub mod orders;
pub mod params;
mod pass;
mod phase;
pub mod precision;
pub mod rank;
pub mod run;
pub mod schedule;
pub mod source;
pub mod spread;
pub mod starvation;
pub mod state;
pub mod step;
pub(crate) mod stored;
pub mod trained;
pub mod trainer;

use self::batch::Flat;

pub use self::{bytes::Damaged, pass::LOGITS_MAX};

/// Whether a layer's activations are kept for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// All are kept.
    #[default]
    None,
    /// A layer keeps what it was given, and computes the rest again.
    Layer,
}

/// Why a step did not come to its end. Parameters are as they were before it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TrainError {
    /// A number is NaN or infinite.
    #[error(
        "row {row} of the batch: {tensor} holds {value}; the run diverges: lower the learning rate, clip the \
         gradient's norm, or warm up longer, and go on from the last checkpoint"
    )]
    NotFinite {
        /// Which tensor.
        tensor: String,
        /// Row of the global batch.
        row: usize,
        /// What it holds.
        value: f32,
    },
    /// The norm of the gradient is NaN or infinite.
    #[error(
        "the gradient of {parameter} is not finite; the run diverges: lower the learning rate, clip the \
         gradient's norm, or warm up longer, and go on from the last checkpoint"
    )]
    Gradient {
        /// The first parameter with such a gradient.
        parameter: String,
    },
    /// All gradients together are too large for a number.
    #[error(
        "the norm of all gradients is {norm}, beyond the largest number; the run diverges: lower the learning \
         rate, clip the gradient's norm, or warm up longer, and go on from the last checkpoint"
    )]
    Norm {
        /// What it is.
        norm: f32,
    },
    /// A rank is lost: the run goes on from its last checkpoint when there are others.
    #[error("{0}")]
    Lost(String),
    /// Those who compute are gone, or say what cannot be.
    #[error("{0}; what is saved is as it was: go on with --resume")]
    Workers(String),
    /// A batch that cannot be trained on.
    #[error("{0}")]
    Batch(String),
}

impl TrainError {
    /// Names the row of the global batch instead of the token's place in the pass.
    fn at(self, flat: &Flat) -> Self {
        match self {
            Self::NotFinite { tensor, row, value } => {
                let row = flat.places.get(row).map_or(row, |place| place.row as usize);
                Self::NotFinite { tensor, row, value }
            }
            other => other,
        }
    }
}
