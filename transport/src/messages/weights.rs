//! Weights of one expert, from the memory of one node to that of another (since protocol 3).
//!
//! ```text
//! who lacks it                              who may have it
//!   WeightsRequest ───────────────────────▶
//!                  ◀─────────────────────── WeightsReply: Here { bytes }, NotHere or Busy
//!                  ◀─────────────────────── frames of Weights, `bytes` bytes in all, if it is here
//! ```
//!
//! A stream takes one request after the other. If the expert is let go while it is being sent, another
//! reply ends it: what was received is of no use then. The bytes are those of the checkpoint, so the
//! receiver verifies them by its hash, and believes nothing else that is said here.

#![allow(missing_docs, reason = "rkyv derives undocumented structs for enums with named fields")]

use rkyv::{Archive, Deserialize, Serialize};

use super::{Message, MessageError, TraceContext};
use crate::{
    frame::{Frame, FrameKind, OutgoingFrame},
    pool::{BufferPool, PoolBuffer},
};

/// Most bytes of an expert in one frame: what a sender holds of it at a time.
pub const WEIGHTS_CHUNK_BYTES: usize = 1 << 20;
/// Longest request, in bytes; they all have one length, which is less.
pub const WEIGHTS_REQUEST_BYTES_MAX: usize = 1 << 10;

/// Asks for an expert that its receiver has in memory at this moment.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct WeightsRequest {
    /// Root hash of the checkpoint that the sender computes with.
    pub checkpoint: [u8; 32],
    /// The fetch's span.
    pub trace: TraceContext,
    /// Layer of the model.
    pub layer: u16,
    /// Index of the tier in the model's order.
    pub tier: u16,
    /// Group within the tier.
    pub group: u32,
    /// Expert within the group.
    pub expert: u32,
}

/// What is answered, and what ends an answer that cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum WeightsReply {
    /// So many bytes follow, as they lie in memory.
    Here {
        /// Their number.
        bytes: u64,
    },
    /// It is not in memory, or of another checkpoint, or none of the model's.
    NotHere,
    /// Others are being served; it may be here.
    Busy,
}

impl Message for WeightsRequest {
    const KIND: FrameKind = FrameKind::WeightsRequest;
}

impl Message for WeightsReply {
    const KIND: FrameKind = FrameKind::WeightsReply;
}

/// A part of an expert's bytes that is being written, in the bytes that will be sent.
#[derive(Debug)]
pub struct OutgoingWeights {
    buffer: PoolBuffer,
    bytes: usize,
}

impl OutgoingWeights {
    /// Reserves the frame of so many bytes.
    ///
    /// # Errors
    /// If they are none or more than [`WEIGHTS_CHUNK_BYTES`], or if there is no memory.
    pub fn new(bytes: usize, pool: &BufferPool) -> Result<Self, MessageError> {
        check_chunk(bytes, WEIGHTS_CHUNK_BYTES)?;
        Ok(Self { buffer: pool.take(bytes)?, bytes })
    }

    /// The part, to be written in full: before that it is unspecified.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.bytes]
    }

    /// The part, ready to be sent.
    pub fn finish(self) -> OutgoingFrame {
        OutgoingFrame::from_buffer(FrameKind::Weights, self.buffer, self.bytes)
    }
}

/// What comes after [`WeightsReply::Here`].
#[derive(Debug, Clone)]
pub enum WeightsPart {
    /// A part, in the order of the expert's bytes.
    Bytes(Frame),
    /// There is no more.
    Ended(WeightsReply),
}

impl WeightsPart {
    /// Checks a received frame of which at most `wanted` bytes are still to come.
    ///
    /// # Errors
    /// If it is neither a part nor a reply, is empty, or has more bytes than are to come.
    pub fn check(frame: Frame, wanted: usize) -> Result<Self, MessageError> {
        if frame.kind() != FrameKind::Weights {
            return Ok(Self::Ended(frame.decode()?));
        }
        check_chunk(frame.bytes().len(), wanted.min(WEIGHTS_CHUNK_BYTES))?;
        Ok(Self::Bytes(frame))
    }
}

fn check_chunk(found: usize, max: usize) -> Result<(), MessageError> {
    if (1..=max).contains(&found) {
        return Ok(());
    }
    Err(MessageError::Field {
        what: "Weights",
        field: "number of bytes",
        found: found as u64,
        expected: format!("1 to {max}"),
    })
}
