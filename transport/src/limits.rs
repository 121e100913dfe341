//! How much a peer may send before anybody has to look at it, in one place.
//!
//! By stream, the longest frame:
//!
//! | kind | from who opened it | from who accepted it |
//! |---|---|---|
//! | experts | 64 MiB: a batch | 64 MiB: its outputs |
//! | job | 20 MiB and a bit: the start, with all token ids | 64 MiB: events |
//! | client | 8 MiB and a bit: a request, with prompt and answer so far | 64 MiB: events |
//! | weights | 1 KiB: a request | 1 MiB: a part of an expert |
//! | training | 1 MiB: a part of an order, of rows or of parameters | 1 MiB: a part of what is given |
//! | control | no frames of ours: `actors::control` bounds its messages | |
//!
//! By connection, for what the peer is:
//!
//! | peer | streams open | sent ahead and unread | frames begun and not complete |
//! |---|---|---|---|
//! | no certificate seen yet | 2 | 64 KiB | - |
//! | client | 64 | 8 MiB | 128 MiB |
//! | worker, coordinator | 1024 | 64 MiB | 1 GiB |
//!
//! Invariants: a length is compared with its limit before memory is used for it; memory grows with
//! bytes that arrive, so that the limits of the last column bound claims, not only bytes; whoever
//! is beyond a limit loses the stream, and is told the limit. A sender is told before it sends.

use crate::{
    connection::StreamKind,
    frame::FRAME_BYTES_MAX,
    identity::Role,
    messages::weights::{WEIGHTS_CHUNK_BYTES, WEIGHTS_REQUEST_BYTES_MAX},
};

/// What a request has beside its prompt: the ids of an answer that goes on, a million of them, and
/// a bit for all the rest.
const BESIDE_PROMPT_BYTES: usize = (4 << 20) + (64 << 10);
/// Longest frame of a client: a prompt of 4 MiB of text, or a million token ids.
pub const REQUEST_BYTES_MAX: usize = (4 << 20) + BESIDE_PROMPT_BYTES;
/// Longest start of a job: a token id for each byte of such a prompt.
pub const JOB_START_BYTES_MAX: usize = (16 << 20) + BESIDE_PROMPT_BYTES;

/// The longest frames of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// From who opened it.
    pub opener: usize,
    /// From who accepted it.
    pub acceptor: usize,
}

impl FrameLimits {
    /// Those of a kind.
    pub fn of(kind: StreamKind) -> Self {
        let (opener, acceptor) = match kind {
            StreamKind::Experts | StreamKind::Control => (FRAME_BYTES_MAX, FRAME_BYTES_MAX),
            StreamKind::Job => (JOB_START_BYTES_MAX, FRAME_BYTES_MAX),
            StreamKind::Client => (REQUEST_BYTES_MAX, FRAME_BYTES_MAX),
            StreamKind::Weights => (WEIGHTS_REQUEST_BYTES_MAX, WEIGHTS_CHUNK_BYTES),
            StreamKind::Train => (WEIGHTS_CHUNK_BYTES, WEIGHTS_CHUNK_BYTES),
        };
        Self { opener, acceptor }
    }
}

/// What one peer may have under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Streams that it may have open.
    pub streams: u32,
    /// Bytes that it may send ahead on all its streams.
    pub window_bytes: u32,
    /// Bytes of frames that it has begun and not completed.
    pub frame_bytes: usize,
}

impl PeerLimits {
    /// Before its certificate is seen.
    pub const STRANGER: Self = Self { streams: 2, window_bytes: 64 << 10, frame_bytes: 0 };
    /// A client.
    pub const CLIENT: Self = Self { streams: 64, window_bytes: 8 << 20, frame_bytes: 128 << 20 };
    /// A worker or the coordinator.
    pub const NODE: Self = Self { streams: 1024, window_bytes: 64 << 20, frame_bytes: 1 << 30 };

    /// Those of a role.
    pub fn of(role: Role) -> Self {
        match role {
            Role::Client => Self::CLIENT,
            Role::Worker | Role::Coordinator => Self::NODE,
        }
    }
}
