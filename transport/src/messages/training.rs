//! Training: what the trainer tells a rank, what ranks ask of each other, and what is given for it.
//!
//! ```text
//! coordinator                            worker                             worker
//!   Ranks, Order  ─────────────────────▶
//!                                          Rank, Call ───────────────────▶
//!                                                     ◀─────────────────── Given, or Failed
//!                 ◀───────────────────── Given, or Failed
//! ```
//!
//! Each message says how many bytes follow, in frames of [`super::weights::WEIGHTS_CHUNK_BYTES`] at most
//! ([`super::OutgoingWeights`]); their layout is the runtime's (`train::orders`, `train::exchange`), which checks it.

#![allow(missing_docs, reason = "rkyv derives undocumented structs for enums with named fields")]

use rkyv::{Archive, Deserialize, Serialize};

use super::{Message, TraceContext};
use crate::frame::FrameKind;

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum TrainMessage {
    /// Who trains together from now on: a line with address and name of each, by rank.
    Ranks {
        /// Which of them the worker is.
        rank: u32,
        /// Counts the beginnings.
        epoch: u64,
        /// Their number.
        bytes: u64,
    },
    /// Something for a rank to do.
    Order {
        /// The span that it belongs to.
        trace: TraceContext,
        /// Their number.
        bytes: u64,
    },
    /// The first on a stream between ranks: whose calls follow.
    Rank {
        /// Which rank.
        rank: u32,
        /// Of which beginning.
        epoch: u64,
    },
    /// What a rank asks of another.
    Call {
        /// The span that it belongs to.
        trace: TraceContext,
        /// Their number.
        bytes: u64,
    },
    /// What an order or a call gave.
    Given {
        /// Their number.
        bytes: u64,
    },
    /// Why it gave nothing.
    Failed {
        /// Their number.
        bytes: u64,
    },
}

impl TrainMessage {
    /// Bytes that follow.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Rank { .. } => 0,
            Self::Ranks { bytes, .. }
            | Self::Order { bytes, .. }
            | Self::Call { bytes, .. }
            | Self::Given { bytes }
            | Self::Failed { bytes } => bytes,
        }
    }
}

impl Message for TrainMessage {
    const KIND: FrameKind = FrameKind::Train;
}
