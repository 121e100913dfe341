//! Frames: a length, a kind, and bytes in an aligned buffer.
//!
//! On the wire: `u32` length of the body, `u16` kind, `u16` zero, then the body; little endian.
//!
//! Invariants: a length is checked against the limits of [`crate::limits`] before a buffer is taken,
//! and against [`FRAME_BYTES_MAX`] in any case; memory grows with the bytes that arrive, not with those that are claimed (see [`crate::pool`]);
//! [`FrameReceiver::recv`] copies each byte exactly once, [`FrameSender::send`] copies none.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;

use crate::{
    connection::{Claim, Connection},
    identity::PeerIdentity,
    messages::{self, Message, MessageError},
    pool::{BufferPool, PoolBuffer, PoolError},
};

/// Longest body of a frame.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// How long one frame may take from its first byte to its last, either way.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(20);

const HEADER_BYTES: usize = 8;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FrameKind {
    /// A [`messages::ExpertBatch`].
    ExpertBatch = 1,
    /// A [`messages::ExpertOutputs`].
    ExpertOutputs = 2,
    /// A [`messages::ExpertFailure`].
    ExpertFailure = 3,
    /// A [`messages::JobEvent`].
    JobEvent = 4,
    /// A [`messages::ClientRequest`].
    ClientRequest = 5,
    /// A [`messages::ClientReply`].
    ClientReply = 6,
    // 7 and 8 were jobs of protocol 3.
    /// A [`messages::WeightsRequest`].
    WeightsRequest = 9,
    /// A [`messages::WeightsReply`].
    WeightsReply = 10,
    /// A part of an expert's bytes: see [`messages::weights`].
    Weights = 11,
    /// A [`messages::JobOrder`].
    JobOrder = 12,
    /// A [`messages::TrainMessage`].
    Train = 13,
}

impl FrameKind {
    fn from_wire(kind: u16) -> Option<Self> {
        use FrameKind::*;
        let mut known = [
            ExpertBatch,
            ExpertOutputs,
            ExpertFailure,
            JobEvent,
            ClientRequest,
            ClientReply,
            WeightsRequest,
            WeightsReply,
            Weights,
            JobOrder,
            Train,
        ]
        .into_iter();
        known.find(|known| *known as u16 == kind)
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A frame that could not be sent or received. The stream is of no use afterwards.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A claimed length beyond the limit.
    #[error("{peer} announced a frame of {found} bytes; at most {limit} are taken here")]
    TooLong {
        /// Who sent it.
        peer: PeerIdentity,
        /// What it claims.
        found: u32,
        /// What such a stream takes.
        limit: usize,
    },
    /// More frames at once than one peer may begin.
    #[error(
        "{peer} began frames of more than {limit} bytes in all, and completed none of them; it may \
         send less at once"
    )]
    TooMany {
        /// Who sent them.
        peer: PeerIdentity,
        /// How many bytes it may begin.
        limit: usize,
    },
    /// A frame of ours beyond what the peer takes.
    #[error(
        "a frame of {found} bytes was not sent: {peer} takes {limit} on such a stream; send less at \
         once"
    )]
    Oversize {
        /// Who it was for.
        peer: PeerIdentity,
        /// Its length.
        found: usize,
        /// What such a stream takes.
        limit: usize,
    },
    /// A header that is none.
    #[error("{peer} sent a frame of unknown kind {found}; it does not speak this protocol")]
    UnknownKind {
        /// Who sent it.
        peer: PeerIdentity,
        /// The kind, with the reserved field in the upper half.
        found: u32,
    },
    /// The stream ended inside a frame.
    #[error("{peer} ended a stream after {found} of the {expected} bytes of a frame")]
    Truncated {
        /// Who sent it.
        peer: PeerIdentity,
        /// Bytes that came.
        found: usize,
        /// Bytes that were announced.
        expected: usize,
    },
    /// The stream or the connection is gone.
    #[error("lost the stream with {peer}: {reason}")]
    Lost {
        /// Who it was with.
        peer: PeerIdentity,
        /// Why.
        reason: String,
    },
    /// The peer neither fails nor goes on.
    #[error("{peer} did not {what} a frame within {waited:?}")]
    TimedOut {
        /// Who was waited for.
        peer: PeerIdentity,
        /// What it should have done.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// An earlier frame was abandoned half-way.
    #[error("an earlier frame to {peer} was abandoned half-way; open another stream")]
    Abandoned {
        /// Who it was for.
        peer: PeerIdentity,
    },
    /// No memory for it.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// What crossed one connection so far.
#[derive(Debug, Default)]
pub struct WireCounts {
    frames_sent: AtomicU64,
    bytes_sent: AtomicU64,
    frames_received: AtomicU64,
    bytes_received: AtomicU64,
    bytes_copied: AtomicU64,
}

/// [`WireCounts`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WireTotals {
    /// Frames sent.
    pub frames_sent: u64,
    /// Bytes of their bodies.
    pub bytes_sent: u64,
    /// Frames received in full.
    pub frames_received: u64,
    /// Bytes of their bodies.
    pub bytes_received: u64,
    /// Bytes of bodies that this crate copied: on receipt, from QUIC's chunks into the buffer.
    pub bytes_copied: u64,
}

impl WireCounts {
    /// The totals so far.
    pub fn totals(&self) -> WireTotals {
        WireTotals {
            frames_sent: self.frames_sent.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
            frames_received: self.frames_received.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            bytes_copied: self.bytes_copied.load(Relaxed),
        }
    }

    /// The one place where bytes of a body are copied.
    fn copy(&self, from: &[u8], to: &mut [u8]) {
        to.copy_from_slice(from);
        self.bytes_copied.fetch_add(from.len() as u64, Relaxed);
    }
}

/// A received frame; cloning shares its bytes.
#[derive(Clone)]
pub struct Frame {
    kind: FrameKind,
    body: Arc<Body>,
}

struct Body {
    buffer: PoolBuffer,
    len: usize,
}

impl Frame {
    /// A frame made of a copy of these bytes: for tests and for networks in memory.
    pub fn copied(kind: FrameKind, bytes: &[u8], pool: &BufferPool) -> Result<Self, PoolError> {
        let mut buffer = pool.take(bytes.len())?;
        buffer[..bytes.len()].copy_from_slice(bytes);
        Ok(Self { kind, body: Arc::new(Body { buffer, len: bytes.len() }) })
    }

    /// What it holds.
    pub fn kind(&self) -> FrameKind {
        self.kind
    }

    /// Its body, which starts at a multiple of 64.
    pub fn bytes(&self) -> &[u8] {
        &self.body.buffer[..self.body.len]
    }

    /// The message in it, checked, in place.
    pub fn view<T: Message>(&self) -> Result<&T::Archived, MessageError> {
        if self.kind != T::KIND {
            return Err(MessageError::Kind { found: self.kind, expected: T::KIND });
        }
        messages::access::<T>(self.bytes())
    }

    /// The message in it, checked, as an owned value.
    pub fn decode<T: Message>(&self) -> Result<T, MessageError> {
        let message: T = messages::to_owned(self.view::<T>()?)?;
        message.check()?;
        Ok(message)
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({}, {} bytes)", self.kind, self.body.len)
    }
}

/// A frame that is ready to be sent; cloning shares its bytes.
#[derive(Debug, Clone)]
pub struct OutgoingFrame {
    kind: FrameKind,
    body: Bytes,
}

/// The written part of a buffer.
struct Written {
    buffer: PoolBuffer,
    len: usize,
}

impl AsRef<[u8]> for Written {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl OutgoingFrame {
    /// Serialises a message that is an owned value.
    pub fn message<T: Message>(message: &T) -> Result<Self, MessageError> {
        let bytes = messages::serialize(message);
        if bytes.len() > FRAME_BYTES_MAX {
            let what = std::any::type_name::<T>().rsplit("::").next().unwrap_or("a message");
            return Err(MessageError::TooLarge { what, bytes: bytes.len() as u64 });
        }
        Ok(Self { kind: T::KIND, body: Bytes::from_owner(bytes) })
    }

    pub(crate) fn from_buffer(kind: FrameKind, buffer: PoolBuffer, len: usize) -> Self {
        Self { kind, body: Bytes::from_owner(Written { buffer, len }) }
    }

    /// What it holds.
    pub fn kind(&self) -> FrameKind {
        self.kind
    }

    /// Its body.
    pub fn bytes(&self) -> &[u8] {
        &self.body
    }
}

/// The sending half of a stream of frames.
pub struct FrameSender {
    stream: quinn::SendStream,
    connection: Connection,
    /// Longest frame that the peer takes here.
    limit: usize,
    /// A frame was begun and not completed.
    half_sent: bool,
}

impl FrameSender {
    pub(crate) fn new(stream: quinn::SendStream, connection: Connection, limit: usize) -> Self {
        Self { stream, connection, limit, half_sent: false }
    }

    /// Sends a frame: its bytes are handed to QUIC as they lie.
    ///
    /// Returns once QUIC took them. A call that is dropped half-way makes the stream useless, and
    /// the next call says so.
    pub async fn send(&mut self, frame: OutgoingFrame) -> Result<(), FrameError> {
        if self.half_sent {
            return Err(FrameError::Abandoned { peer: self.connection.peer().clone() });
        }
        let bytes = frame.body.len();
        if bytes > self.limit {
            let (peer, limit) = (self.connection.peer().clone(), self.limit);
            return Err(FrameError::Oversize { peer, found: bytes, limit });
        }
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&(bytes as u32).to_le_bytes());
        header[4..6].copy_from_slice(&(frame.kind as u16).to_le_bytes());
        let mut chunks = [Bytes::copy_from_slice(&header), frame.body];
        self.half_sent = true;
        match tokio::time::timeout(FRAME_TIMEOUT, self.stream.write_all_chunks(&mut chunks)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(self.lost(error)),
            Err(_) => {
                let peer = self.connection.peer().clone();
                return Err(FrameError::TimedOut { peer, what: "take", waited: FRAME_TIMEOUT });
            }
        }
        self.half_sent = false;
        self.connection.counts().frames_sent.fetch_add(1, Relaxed);
        self.connection.counts().bytes_sent.fetch_add(bytes as u64, Relaxed);
        Ok(())
    }

    /// Sends a message that is an owned value.
    pub async fn send_message<T: Message>(&mut self, message: &T) -> Result<(), SendError> {
        Ok(self.send(OutgoingFrame::message(message)?).await?)
    }

    /// Ends the stream, and waits until the peer has everything that was sent.
    pub async fn finish(mut self) -> Result<(), FrameError> {
        if self.stream.finish().is_err() {
            return Err(self.lost("it was stopped"));
        }
        match tokio::time::timeout(FRAME_TIMEOUT, self.stream.stopped()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.lost(error)),
            Err(_) => {
                let peer = self.connection.peer().clone();
                Err(FrameError::TimedOut { peer, what: "take", waited: FRAME_TIMEOUT })
            }
        }
    }

    fn lost(&self, reason: impl fmt::Display) -> FrameError {
        lost(&self.connection, reason)
    }
}

/// A message that could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// It may not be sent.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// It could not be sent.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// The receiving half of a stream of frames.
pub struct FrameReceiver {
    stream: quinn::RecvStream,
    connection: Connection,
    pool: BufferPool,
    /// Longest frame that is taken.
    limit: usize,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    partial: Option<Partial>,
}

/// A frame of which some bytes are there.
struct Partial {
    kind: FrameKind,
    buffer: PoolBuffer,
    len: usize,
    filled: usize,
    deadline: tokio::time::Instant,
    /// Its part of what the peer may have begun.
    _claim: Claim,
}

impl FrameReceiver {
    pub(crate) fn new(
        stream: quinn::RecvStream,
        connection: Connection,
        pool: BufferPool,
        limit: usize,
    ) -> Self {
        let header = [0; HEADER_BYTES];
        Self { stream, connection, pool, limit, header, header_filled: 0, partial: None }
    }

    /// The next frame, or `None` after the last one.
    ///
    /// Waits for a frame to begin as long as the connection lives. A call that is dropped loses
    /// nothing: the next one goes on where it was.
    pub async fn recv(&mut self) -> Result<Option<Frame>, FrameError> {
        let mut partial = match self.partial.take() {
            Some(partial) => partial,
            None => match self.begin().await? {
                Some(partial) => partial,
                None => return Ok(None),
            },
        };
        while partial.filled < partial.len {
            let wanted = partial.len - partial.filled;
            let deadline = partial.deadline;
            // Kept here while waiting, so that a dropped call does not lose it.
            let kept = self.partial.insert(partial);
            let arrived =
                tokio::time::timeout_at(deadline, self.stream.read_chunk(wanted, true)).await;
            let filled = kept.filled;
            let len = kept.len;
            let chunk = match arrived {
                Ok(Ok(Some(chunk))) => chunk.bytes,
                Ok(Ok(None)) => return Err(self.truncated(filled, len)),
                Ok(Err(error)) => return Err(self.lost(error)),
                Err(_) => {
                    let peer = self.connection.peer().clone();
                    let what = "complete";
                    return Err(FrameError::TimedOut { peer, what, waited: FRAME_TIMEOUT });
                }
            };
            partial = self.partial.take().expect("put there before the wait");
            self.connection
                .counts()
                .copy(&chunk, &mut partial.buffer[filled..filled + chunk.len()]);
            partial.filled += chunk.len();
        }
        self.header_filled = 0;
        self.connection.counts().frames_received.fetch_add(1, Relaxed);
        self.connection.counts().bytes_received.fetch_add(partial.len as u64, Relaxed);
        let Partial { kind, buffer, len, .. } = partial;
        Ok(Some(Frame { kind, body: Arc::new(Body { buffer, len }) }))
    }

    /// Receives a message that is an owned value.
    pub async fn recv_message<T: Message>(&mut self) -> Result<Option<T>, RecvError> {
        match self.recv().await? {
            Some(frame) => Ok(Some(frame.decode::<T>()?)),
            None => Ok(None),
        }
    }

    /// Reads and judges a header.
    async fn begin(&mut self) -> Result<Option<Partial>, FrameError> {
        while self.header_filled < HEADER_BYTES {
            let read = self.stream.read(&mut self.header[self.header_filled..]).await;
            match read {
                Ok(Some(bytes)) => self.header_filled += bytes,
                Ok(None) if self.header_filled == 0 => return Ok(None),
                Ok(None) => return Err(self.truncated(self.header_filled, HEADER_BYTES)),
                Err(error) => return Err(self.lost(error)),
            }
        }
        let [a, b, c, d, e, f, g, h] = self.header;
        let (len, kind, zero) = (
            u32::from_le_bytes([a, b, c, d]),
            u16::from_le_bytes([e, f]),
            u16::from_le_bytes([g, h]),
        );
        let peer = || self.connection.peer().clone();
        let kind = match FrameKind::from_wire(kind) {
            Some(kind) if zero == 0 => kind,
            _ => {
                let found = u32::from(zero) << 16 | u32::from(kind);
                return Err(FrameError::UnknownKind { peer: peer(), found });
            }
        };
        let limit = self.limit.min(FRAME_BYTES_MAX);
        if len as usize > limit {
            return Err(FrameError::TooLong { peer: peer(), found: len, limit });
        }
        let claim = self.connection.claim(len as usize);
        let claim = claim.map_err(|limit| FrameError::TooMany { peer: peer(), limit })?;
        let buffer = self.pool.take(len as usize)?;
        let deadline = tokio::time::Instant::now() + FRAME_TIMEOUT;
        Ok(Some(Partial { kind, buffer, len: len as usize, filled: 0, deadline, _claim: claim }))
    }

    fn truncated(&self, found: usize, expected: usize) -> FrameError {
        FrameError::Truncated { peer: self.connection.peer().clone(), found, expected }
    }

    fn lost(&self, reason: impl fmt::Display) -> FrameError {
        lost(&self.connection, reason)
    }
}

/// A stream that failed: because its connection ended, or by itself.
fn lost(connection: &Connection, reason: impl fmt::Display) -> FrameError {
    let reason = match connection.close_reason() {
        Some(ended) => ended.reason,
        None => reason.to_string(),
    };
    FrameError::Lost { peer: connection.peer().clone(), reason }
}

/// A message that could not be received.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// What came is not that message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Nothing whole came.
    #[error(transparent)]
    Frame(#[from] FrameError),
}
