//! Training: a node of a step, from who has the parameters to a worker, and what it gives back.
//!
//! ```text
//! coordinator                               worker
//!   Model, Values … ──────────────────────▶         what changed since it was last told
//!   Work            ──────────────────────▶
//!                   ◀────────────────────── Computed, or Failed
//! ```
//!
//! Each message says how many bytes follow, in frames of [`super::weights::WEIGHTS_CHUNK_BYTES`] at most
//! ([`super::OutgoingWeights`]); their layout is the runtime's (`train::shared`), which checks it.

#![allow(missing_docs, reason = "rkyv derives undocumented structs for enums with named fields")]

use rkyv::{Archive, Deserialize, Serialize};

use super::Message;
use crate::frame::FrameKind;

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum TrainMessage {
    /// The configuration of a model; its parameters are zeros until they come.
    Model {
        /// Their number.
        bytes: u64,
    },
    /// Values of some parameters.
    Values {
        /// Their number.
        bytes: u64,
    },
    /// A node of a step.
    Work {
        /// Which.
        number: u64,
        /// Their number.
        bytes: u64,
    },
    /// What a node gave.
    Computed {
        /// Which.
        number: u64,
        /// Their number.
        bytes: u64,
    },
    /// Why a node gave nothing.
    Failed {
        /// Which.
        number: u64,
        /// Their number.
        bytes: u64,
    },
}

impl TrainMessage {
    /// Bytes that follow.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Model { bytes }
            | Self::Values { bytes }
            | Self::Work { bytes, .. }
            | Self::Computed { bytes, .. }
            | Self::Failed { bytes, .. } => bytes,
        }
    }
}

impl Message for TrainMessage {
    const KIND: FrameKind = FrameKind::Train;
}
