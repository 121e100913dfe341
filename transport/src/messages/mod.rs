//! What is said on the wire: rkyv messages, each checked once, on receipt.
//!
//! [`experts`] is the data plane, read in place; [`weights`] moves experts themselves; [`jobs`],
//! [`detached`] and [`cluster`] are small owned values;
//! every message carries a [`trace::TraceContext`] or belongs to a job that has one.
//! Messages are data only: nothing in them is code, a path that is opened, or a type name.

use rkyv::{
    Archive, Deserialize, Portable, Serialize,
    api::high::{HighDeserializer, HighSerializer, HighValidator},
    bytecheck::CheckBytes,
    rancor,
    ser::allocator::ArenaHandle,
    util::AlignedVec,
};

pub mod cluster;
pub mod detached;
pub mod experts;
pub mod jobs;
pub mod trace;
pub mod training;
pub mod view;
pub mod weights;

pub use cluster::{
    Assignment, ClusterStatus, NodeAddress, NodeInfo, NodeReport, NodeResidences, NodeStatus,
    NodeVitals, PLACEMENT_HOLDERS_MAX, PLACEMENT_RULES_MAX, PlacementRule, RESIDENCES_MAX,
    REVOKED_MAX, ResidenceStatus, Revoked, RevokedNames, ScheduleStatus,
};
pub use detached::{
    BATCH_JOBS_MAX, DetachedBatch, DetachedJob, DetachedReply, DetachedReport, DetachedRequest,
    DetachedState, DetachedStatus, JobEnding, JobRange, JobsQuery, LABEL_BYTES_MAX, LISTED_MAX,
    NOTE_BYTES_MAX, RESULTS_BYTES_MAX, STOP_BYTES_MAX, STOPS_MAX, WAIT_MS_MAX,
};
pub use experts::{
    ExpertBatch, ExpertBatchView, ExpertCall, ExpertFailure, ExpertOutputs, ExpertOutputsView,
    ExpertReplyView, FailedExpert, OutgoingExpertBatch, OutgoingExpertOutputs,
};
pub use jobs::{
    Choosing, ClientReply, ClientRequest, EndReason, GRAMMAR_BYTES_MAX, Grammar, JobEvent,
    JobEventBody, JobOrder, JobRequest, LogitsWanted, Prompt, ScoredToken, Serving,
    TOP_LOGPROBS_MAX, TokenBias, TokenLogprob,
};
pub use trace::TraceContext;
pub use training::TrainMessage;
pub use view::{EXPERTS_VIEWED_MAX, ExpertPlace, LINKS_VIEWED_MAX, LinkView, NodeView};
pub use weights::{
    OutgoingWeights, WEIGHTS_CHUNK_BYTES, WeightsPart, WeightsReply, WeightsRequest,
};

use crate::{
    frame::{FRAME_BYTES_MAX, FrameKind},
    pool::PoolError,
};

/// Bytes that are not the message they are said to be, or a message that may not be sent.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// A frame of another kind.
    #[error("a frame of kind {found} arrived where {expected} is expected")]
    Kind {
        /// The frame's kind.
        found: FrameKind,
        /// The kind asked for.
        expected: FrameKind,
    },
    /// Bytes that have no valid layout.
    #[error("{what} of {bytes} bytes has no valid layout: {reason}; the peer sends damaged data")]
    Layout {
        /// The type asked for.
        what: &'static str,
        /// Their number.
        bytes: usize,
        /// What the check found.
        reason: String,
    },
    /// A field that contradicts the others or a limit.
    #[error("{what}: {field} is {found}; {expected} is expected")]
    Field {
        /// The message.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it may be.
        expected: String,
    },
    /// More than one frame may hold.
    #[error(
        "{what} takes {bytes} bytes; a frame holds at most {FRAME_BYTES_MAX}: send less at once"
    )]
    TooLarge {
        /// The message.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
    /// No memory for it.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// A type that can travel as bytes. Implemented by every rkyv type of this crate.
pub trait Wire:
    Archive<Archived: WireArchived + Deserialize<Self, HighDeserializer<rancor::Error>>>
    + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
    + Sized
{
}

impl<T> Wire for T where
    T: Archive<Archived: WireArchived + Deserialize<T, HighDeserializer<rancor::Error>>>
        + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
{
}

/// The archived form of a [`Wire`] type: it can be checked.
pub trait WireArchived: Portable + for<'a> CheckBytes<HighValidator<'a, rancor::Error>> {}

impl<T: Portable + for<'a> CheckBytes<HighValidator<'a, rancor::Error>>> WireArchived for T {}

/// A [`Wire`] type with a frame kind of its own.
pub trait Message: Wire {
    /// The kind of frames that hold it.
    const KIND: FrameKind;

    /// Whether its fields fit each other; asked once, on receipt.
    fn check(&self) -> Result<(), MessageError> {
        Ok(())
    }
}

impl Message for ExpertFailure {
    const KIND: FrameKind = FrameKind::ExpertFailure;

    fn check(&self) -> Result<(), MessageError> {
        experts::check_reason("ExpertFailure", &self.reason)
    }
}
impl Message for JobEvent {
    const KIND: FrameKind = FrameKind::JobEvent;

    fn check(&self) -> Result<(), MessageError> {
        self.body.check()
    }
}
impl Message for ClientRequest {
    const KIND: FrameKind = FrameKind::ClientRequest;

    fn check(&self) -> Result<(), MessageError> {
        match self {
            ClientRequest::Detached(DetachedRequest::Submit(batch)) => batch.check(),
            ClientRequest::Order(order) => order.check(),
            _ => Ok(()),
        }
    }
}
impl Message for JobOrder {
    const KIND: FrameKind = FrameKind::JobOrder;

    fn check(&self) -> Result<(), MessageError> {
        Self::check(self)
    }
}
impl Message for ClientReply {
    const KIND: FrameKind = FrameKind::ClientReply;

    fn check(&self) -> Result<(), MessageError> {
        match self {
            ClientReply::Event(event) => event.check(),
            _ => Ok(()),
        }
    }
}

/// A value as bytes, for the payload of an actor's message.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    serialize(value).into_vec()
}

/// A value from bytes that [`encode`] made, checked.
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T, MessageError> {
    let mut aligned = AlignedVec::<16>::with_capacity(bytes.len());
    aligned.extend_from_slice(bytes);
    rkyv::from_bytes::<T, rancor::Error>(&aligned).map_err(|error| layout::<T>(bytes.len(), error))
}

pub(crate) fn serialize<T: Wire>(value: &T) -> AlignedVec {
    rkyv::to_bytes::<rancor::Error>(value)
        .expect("serialising into growing memory fails only when memory is exhausted, which aborts")
}

pub(crate) fn access<T: Wire>(bytes: &[u8]) -> Result<&T::Archived, MessageError> {
    rkyv::access::<T::Archived, rancor::Error>(bytes).map_err(|e| layout::<T>(bytes.len(), e))
}

pub(crate) fn to_owned<T: Wire>(archived: &T::Archived) -> Result<T, MessageError> {
    rkyv::deserialize::<T, rancor::Error>(archived)
        .map_err(|error| layout::<T>(size_of::<T::Archived>(), error))
}

fn layout<T>(bytes: usize, error: rancor::Error) -> MessageError {
    let what = std::any::type_name::<T>().rsplit("::").next().unwrap_or("a message");
    MessageError::Layout { what, bytes, reason: error.to_string() }
}
