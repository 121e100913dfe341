//! Token batches: hidden states to experts, and each route's output back.
//!
//! Shapes: `hidden [rows, width]`, `outputs [calls, width]` in the order of the request's calls,
//! both f32, row after row.
//!
//! Invariants:
//! - Numbers lie in 64-byte lanes at the start of the frame, padded with zeros at the end only,
//!   so the first row starts at a multiple of 64, and every row if the width is a multiple of 16.
//! - The sender's kernel writes them where they are sent from ([`OutgoingExpertBatch::rows_mut`]);
//!   the receiver's reads them where they arrived ([`ExpertBatchView::hidden`]).
//! - A view exists only of a message whose every field was checked, by arithmetic that cannot
//!   overflow.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use rkyv::{
    Archive, Deserialize, Place, Portable, Serialize,
    bytecheck::CheckBytes,
    rancor::{self, Fallible},
    rend::f32_le,
    ser::{Positional, Writer},
    vec::{ArchivedVec, VecResolver},
};

use super::{MessageError, TraceContext, layout};
use crate::{
    frame::{FRAME_BYTES_MAX, Frame, FrameKind, OutgoingFrame},
    pool::{BufferPool, PoolBuffer},
};

/// Widest hidden state, in numbers.
pub const WIDTH_MAX: u32 = 1 << 16;
/// Most rows of one batch.
pub const BATCH_ROWS_MAX: u32 = 1 << 16;
/// Most expert calls of one batch.
pub const BATCH_CALLS_MAX: u32 = 1 << 18;
/// Longest reason of a failure, in bytes; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 4096;

/// Bytes of a frame that are neither numbers nor calls, at most.
const HEAD_BYTES: usize = 512;
/// Bytes of one call, at most, in the frame.
const CALL_BYTES: usize = size_of::<ArchivedExpertCall>();
/// Numbers of a lane.
const LANE: usize = 16;

/// Most calls of one batch of this width whose outputs still fit one frame.
pub fn calls_max(width: u32) -> u32 {
    let bytes = (FRAME_BYTES_MAX - HEAD_BYTES) / (4 * width.max(1) as usize).next_multiple_of(64);
    (bytes as u32).min(BATCH_CALLS_MAX)
}

/// Sixteen numbers at a multiple of 64 bytes: what frames align activations by.
#[derive(Clone, Copy, Portable, CheckBytes, Pod, Zeroable)]
#[bytecheck(crate = rkyv::bytecheck)]
#[repr(C, align(64))]
struct Lane([f32_le; LANE]);

/// One expert is to run on one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ExpertCall {
    /// Row of the batch.
    pub row: u32,
    /// Index of the tier in the model's order.
    pub tier: u16,
    /// Group within the tier.
    pub group: u32,
    /// Expert within the group.
    pub expert: u32,
}

/// A request to the node that owns some experts of a layer: everything but the hidden states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertBatch {
    /// The dispatch, as its sender numbered it; the reply repeats it.
    pub id: u64,
    /// The dispatch's span.
    pub trace: TraceContext,
    /// Layer of the model.
    pub layer: u16,
    /// Numbers of a hidden state.
    pub width: u32,
    /// Hidden states that follow.
    pub rows: u32,
    /// Which expert runs on which row.
    pub calls: Vec<ExpertCall>,
}

/// The outputs of a batch's calls, in their order: everything but the numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertOutputs {
    /// The dispatch that is answered.
    pub id: u64,
    /// The span of the work.
    pub trace: TraceContext,
    /// Numbers of an output.
    pub width: u32,
    /// Outputs that follow: one per call.
    pub rows: u32,
}

/// An expert whose calls in a batch were not computed, while those of others were; what lies in
/// their place among the outputs is unspecified.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FailedExpert {
    /// Index of the tier in the model's order.
    pub tier: u16,
    /// Group within the tier.
    pub group: u32,
    /// Expert within the group.
    pub expert: u32,
    /// What happened.
    pub reason: String,
}

/// How the reason of an expert begins that its node does not hold at present (since protocol 3).
const ABSENT: &str = "absent: ";

impl FailedExpert {
    /// The same, of a node that does not hold the expert: another may, or this one again soon.
    pub fn absent(self) -> Self {
        Self { reason: format!("{ABSENT}{}", self.reason), ..self }
    }

    /// Whether the node does not hold the expert; if not, it could not run it.
    pub fn is_absent(&self) -> bool {
        self.reason.starts_with(ABSENT)
    }

    /// Why it was not run, for people.
    pub fn why(&self) -> &str {
        self.reason.strip_prefix(ABSENT).unwrap_or(&self.reason)
    }
}

/// A batch that was not computed.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ExpertFailure {
    /// The dispatch that is answered.
    pub id: u64,
    /// What happened.
    pub reason: String,
}

impl ExpertFailure {
    /// A failure whose reason is cut to [`REASON_BYTES_MAX`].
    pub fn new(id: u64, reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
        Self { id, reason }
    }
}

/// Lanes that already lie at the start of the frame.
///
/// Pointers of a valid archive ascend in the order of the fields, so this is the first field.
struct LanesAtStart {
    lanes: usize,
}

impl Archive for LanesAtStart {
    type Archived = ArchivedVec<Lane>;
    type Resolver = VecResolver;

    fn resolve(&self, resolver: VecResolver, out: Place<Self::Archived>) {
        ArchivedVec::resolve_from_len(self.lanes, resolver, out);
    }
}

impl<S: Fallible + ?Sized> Serialize<S> for LanesAtStart {
    fn serialize(&self, _: &mut S) -> Result<VecResolver, S::Error> {
        Ok(VecResolver::from_pos(0))
    }
}

/// The root of a batch's frame.
#[derive(Archive, Serialize)]
struct BatchRoot {
    hidden: LanesAtStart,
    calls: Vec<ExpertCall>,
    id: u64,
    trace: TraceContext,
    layer: u16,
    width: u32,
    rows: u32,
}

/// The root of an outputs' frame.
#[derive(Archive, Serialize)]
struct OutputsRoot {
    outputs: LanesAtStart,
    failed: Vec<FailedExpert>,
    id: u64,
    trace: TraceContext,
    width: u32,
    rows: u32,
}

/// A batch whose hidden states are being written, in the bytes that will be sent.
#[derive(Debug)]
pub struct OutgoingExpertBatch {
    batch: ExpertBatch,
    buffer: PoolBuffer,
}

impl OutgoingExpertBatch {
    /// Reserves the frame of a batch.
    pub fn new(batch: ExpertBatch, pool: &BufferPool) -> Result<Self, MessageError> {
        check_batch(&batch)?;
        let calls = batch.calls.len() * CALL_BYTES;
        let buffer = reserve("ExpertBatch", batch.rows, batch.width, calls, pool)?;
        Ok(Self { batch, buffer })
    }

    /// The hidden states `[rows, width]`, to be written in full: before that they are unspecified.
    pub fn rows_mut(&mut self) -> &mut [f32] {
        numbers_mut(&mut self.buffer, self.batch.rows, self.batch.width)
    }

    /// Where row `i` is written.
    ///
    /// # Panics
    /// If the batch has no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.batch.width as usize;
        &mut self.rows_mut()[row * width..][..width]
    }

    /// The batch, ready to be sent.
    pub fn finish(mut self) -> OutgoingFrame {
        let ExpertBatch { id, trace, layer, width, rows, calls } = self.batch;
        let hidden = pad(&mut self.buffer, rows, width);
        let root = BatchRoot { hidden, calls, id, trace, layer, width, rows };
        let from = root.hidden.lanes * size_of::<Lane>();
        let writer = FrameWriter { bytes: &mut self.buffer, position: from };
        let bytes = rkyv::api::high::to_bytes_in::<_, rancor::Error>(&root, writer)
            .expect("the buffer was reserved for this many calls")
            .position;
        OutgoingFrame::from_buffer(FrameKind::ExpertBatch, self.buffer, bytes)
    }
}

/// Outputs that are being written, in the bytes that will be sent.
#[derive(Debug)]
pub struct OutgoingExpertOutputs {
    outputs: ExpertOutputs,
    buffer: PoolBuffer,
}

impl OutgoingExpertOutputs {
    /// Reserves the frame of a reply.
    pub fn new(outputs: ExpertOutputs, pool: &BufferPool) -> Result<Self, MessageError> {
        check_shape("ExpertOutputs", outputs.rows, BATCH_CALLS_MAX, outputs.width)?;
        let buffer = reserve("ExpertOutputs", outputs.rows, outputs.width, 0, pool)?;
        Ok(Self { outputs, buffer })
    }

    /// The outputs `[calls, width]`, to be written in full: before that they are unspecified.
    pub fn rows_mut(&mut self) -> &mut [f32] {
        numbers_mut(&mut self.buffer, self.outputs.rows, self.outputs.width)
    }

    /// Where the output of call `i` is written.
    ///
    /// # Panics
    /// If the request has no such call.
    pub fn row_mut(&mut self, call: usize) -> &mut [f32] {
        let width = self.outputs.width as usize;
        &mut self.rows_mut()[call * width..][..width]
    }

    /// The reply, ready to be sent.
    pub fn finish(self) -> OutgoingFrame {
        self.frame(Vec::new())
    }

    /// The same where some experts of the batch could not be run. It is copied into a buffer that
    /// has room for the reasons, each cut to [`REASON_BYTES_MAX`].
    pub fn finish_without(
        mut self,
        mut failed: Vec<FailedExpert>,
        pool: &BufferPool,
    ) -> Result<OutgoingFrame, MessageError> {
        let ExpertOutputs { rows, width, .. } = self.outputs;
        let mut bytes = 0;
        for FailedExpert { reason, .. } in &mut failed {
            reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
            bytes += size_of::<ArchivedFailedExpert>() + reason.len().next_multiple_of(8);
        }
        let mut buffer = reserve("ExpertOutputs", rows, width, bytes, pool)?;
        numbers_mut(&mut buffer, rows, width).copy_from_slice(self.rows_mut());
        Ok(Self { outputs: self.outputs, buffer }.frame(failed))
    }

    fn frame(mut self, failed: Vec<FailedExpert>) -> OutgoingFrame {
        let ExpertOutputs { id, trace, width, rows } = self.outputs;
        let outputs = pad(&mut self.buffer, rows, width);
        let root = OutputsRoot { outputs, failed, id, trace, width, rows };
        let from = root.outputs.lanes * size_of::<Lane>();
        let writer = FrameWriter { bytes: &mut self.buffer, position: from };
        let bytes = rkyv::api::high::to_bytes_in::<_, rancor::Error>(&root, writer)
            .expect("the buffer was reserved with room for the head")
            .position;
        OutgoingFrame::from_buffer(FrameKind::ExpertOutputs, self.buffer, bytes)
    }
}

/// A received batch, checked; its numbers are read where they arrived.
#[derive(Debug, Clone)]
pub struct ExpertBatchView {
    batch: ExpertBatch,
    frame: Frame,
    numbers: Range<usize>,
}

impl ExpertBatchView {
    /// Checks every field of a received batch.
    pub fn check(frame: &Frame) -> Result<Self, MessageError> {
        const WHAT: &str = "ExpertBatch";
        let root = root::<ArchivedBatchRoot>(frame, FrameKind::ExpertBatch)?;
        let (rows, width) = (root.rows.to_native(), root.width.to_native());
        check_count(WHAT, "calls", root.calls.len(), BATCH_CALLS_MAX)?;
        let calls = root.calls.iter().map(|call| ExpertCall {
            row: call.row.to_native(),
            tier: call.tier.to_native(),
            group: call.group.to_native(),
            expert: call.expert.to_native(),
        });
        let batch = ExpertBatch {
            id: root.id.to_native(),
            trace: root.trace.to_native(),
            layer: root.layer.to_native(),
            width,
            rows,
            calls: calls.collect(),
        };
        check_batch(&batch)?;
        let numbers = check_lanes(WHAT, frame, &root.hidden, rows, width)?;
        Ok(Self { batch, frame: frame.clone(), numbers })
    }

    /// Everything but the hidden states.
    pub fn head(&self) -> &ExpertBatch {
        &self.batch
    }

    /// Which expert runs on which row.
    pub fn calls(&self) -> &[ExpertCall] {
        &self.batch.calls
    }

    /// The hidden states `[rows, width]`, in place.
    pub fn hidden(&self) -> &[f32] {
        bytemuck::cast_slice(&self.frame.bytes()[self.numbers.clone()])
    }

    /// Hidden state `i`, in place.
    ///
    /// # Panics
    /// If the batch has no such row; every call's row exists.
    pub fn row(&self, row: usize) -> &[f32] {
        let width = self.batch.width as usize;
        &self.hidden()[row * width..][..width]
    }
}

/// Received outputs, checked; they are read where they arrived.
#[derive(Debug, Clone)]
pub struct ExpertOutputsView {
    outputs: ExpertOutputs,
    failed: Vec<FailedExpert>,
    frame: Frame,
    numbers: Range<usize>,
}

impl ExpertOutputsView {
    fn check(frame: &Frame) -> Result<Self, MessageError> {
        const WHAT: &str = "ExpertOutputs";
        let root = root::<ArchivedOutputsRoot>(frame, FrameKind::ExpertOutputs)?;
        let (rows, width) = (root.rows.to_native(), root.width.to_native());
        check_shape(WHAT, rows, BATCH_CALLS_MAX, width)?;
        let numbers = check_lanes(WHAT, frame, &root.outputs, rows, width)?;
        let (id, trace) = (root.id.to_native(), root.trace.to_native());
        let outputs = ExpertOutputs { id, trace, width, rows };
        // An expert that failed had a call.
        if root.failed.len() > rows as usize {
            return Err(MessageError::Field {
                what: WHAT,
                field: "failed experts",
                found: root.failed.len() as u64,
                expected: format!("at most {rows}, one per call,"),
            });
        }
        root.failed.iter().try_for_each(|expert| check_reason(WHAT, &expert.reason))?;
        let failed = root.failed.iter().map(|expert| FailedExpert {
            tier: expert.tier.to_native(),
            group: expert.group.to_native(),
            expert: expert.expert.to_native(),
            reason: expert.reason.as_str().to_owned(),
        });
        Ok(Self { outputs, failed: failed.collect(), frame: frame.clone(), numbers })
    }

    /// Experts whose calls were not computed.
    pub fn failed(&self) -> &[FailedExpert] {
        &self.failed
    }

    /// Everything but the numbers.
    pub fn head(&self) -> &ExpertOutputs {
        &self.outputs
    }

    /// The outputs `[calls, width]`, in place.
    pub fn outputs(&self) -> &[f32] {
        bytemuck::cast_slice(&self.frame.bytes()[self.numbers.clone()])
    }

    /// The output of call `i`, in place.
    ///
    /// # Panics
    /// If there is no such output: compare `head().rows` with the calls that were sent.
    pub fn row(&self, call: usize) -> &[f32] {
        let width = self.outputs.width as usize;
        &self.outputs()[call * width..][..width]
    }
}

/// What answers a batch.
#[derive(Debug, Clone)]
pub enum ExpertReplyView {
    /// It was computed.
    Outputs(ExpertOutputsView),
    /// It was not.
    Failure(ExpertFailure),
}

impl ExpertReplyView {
    /// Checks every field of a received reply.
    pub fn check(frame: &Frame) -> Result<Self, MessageError> {
        if frame.kind() == FrameKind::ExpertFailure {
            return Ok(Self::Failure(frame.decode()?));
        }
        ExpertOutputsView::check(frame).map(Self::Outputs)
    }

    /// The dispatch that is answered.
    pub fn id(&self) -> u64 {
        match self {
            Self::Outputs(view) => view.outputs.id,
            Self::Failure(failure) => failure.id,
        }
    }
}

fn root<T>(frame: &Frame, expected: FrameKind) -> Result<&T, MessageError>
where
    T: super::WireArchived,
{
    if frame.kind() != expected {
        return Err(MessageError::Kind { found: frame.kind(), expected });
    }
    let bytes = frame.bytes();
    rkyv::access::<T, rancor::Error>(bytes).map_err(|error| layout::<T>(bytes.len(), error))
}

fn check_batch(batch: &ExpertBatch) -> Result<(), MessageError> {
    const WHAT: &str = "ExpertBatch";
    check_shape(WHAT, batch.rows, BATCH_ROWS_MAX, batch.width)?;
    check_count(WHAT, "calls", batch.calls.len(), BATCH_CALLS_MAX)?;
    // A row that no call reads would only take memory.
    check_count(WHAT, "rows", batch.rows as usize, batch.calls.len() as u32)?;
    // The reply has a row per call, and must fit a frame as well.
    check_count(WHAT, "calls", batch.calls.len(), calls_max(batch.width))?;
    match batch.calls.iter().find(|call| call.row >= batch.rows) {
        None => Ok(()),
        Some(call) => Err(MessageError::Field {
            what: WHAT,
            field: "row of a call",
            found: call.row.into(),
            expected: format!("less than the batch's {} rows", batch.rows),
        }),
    }
}

/// A receiver keeps a reason for every call that it is for.
pub(super) fn check_reason(what: &'static str, reason: &str) -> Result<(), MessageError> {
    match reason.len() {
        ..=REASON_BYTES_MAX => Ok(()),
        found => Err(MessageError::Field {
            what,
            field: "bytes of a reason",
            found: found as u64,
            expected: format!("at most {REASON_BYTES_MAX}"),
        }),
    }
}

fn check_shape(
    what: &'static str,
    rows: u32,
    rows_max: u32,
    width: u32,
) -> Result<(), MessageError> {
    check_count(what, "rows", rows as usize, rows_max)?;
    check_count(what, "width", width as usize, WIDTH_MAX)?;
    let bytes = 4 * u64::from(rows) * u64::from(width);
    if bytes > FRAME_BYTES_MAX as u64 {
        Err(MessageError::TooLarge { what, bytes })
    } else {
        Ok(())
    }
}

fn check_count(
    what: &'static str,
    field: &'static str,
    found: usize,
    max: u32,
) -> Result<(), MessageError> {
    if (1..=max as usize).contains(&found) {
        return Ok(());
    }
    let expected = format!("1 to {max}");
    Err(MessageError::Field { what, field, found: found as u64, expected })
}

/// Where in the frame the numbers of a checked shape lie.
fn check_lanes(
    what: &'static str,
    frame: &Frame,
    found: &ArchivedVec<Lane>,
    rows: u32,
    width: u32,
) -> Result<Range<usize>, MessageError> {
    let expected = lanes(rows, width);
    if found.len() != expected {
        return Err(MessageError::Field {
            what,
            field: "number of lanes",
            found: found.len() as u64,
            expected: format!("{expected}, for {rows} rows of {width},"),
        });
    }
    let start = found.as_ptr() as usize - frame.bytes().as_ptr() as usize;
    Ok(start..start + numbers(rows, width) * size_of::<f32>())
}

fn numbers(rows: u32, width: u32) -> usize {
    rows as usize * width as usize
}

fn lanes(rows: u32, width: u32) -> usize {
    numbers(rows, width).div_ceil(LANE)
}

fn reserve(
    what: &'static str,
    rows: u32,
    width: u32,
    calls: usize,
    pool: &BufferPool,
) -> Result<PoolBuffer, MessageError> {
    let bytes = lanes(rows, width) * size_of::<Lane>() + calls + HEAD_BYTES;
    if bytes > FRAME_BYTES_MAX {
        return Err(MessageError::TooLarge { what, bytes: bytes as u64 });
    }
    Ok(pool.take(bytes)?)
}

fn numbers_mut(buffer: &mut PoolBuffer, rows: u32, width: u32) -> &mut [f32] {
    bytemuck::cast_slice_mut(&mut buffer[..numbers(rows, width) * size_of::<f32>()])
}

/// Zeroes what follows the last row in its lane.
fn pad(buffer: &mut PoolBuffer, rows: u32, width: u32) -> LanesAtStart {
    let lanes = lanes(rows, width);
    let end = numbers(rows, width) * size_of::<f32>();
    buffer[end..lanes * size_of::<Lane>()].fill(0);
    LanesAtStart { lanes }
}

/// Writes what follows the lanes, into the same buffer.
struct FrameWriter<'a> {
    bytes: &'a mut [u8],
    position: usize,
}

impl Positional for FrameWriter<'_> {
    fn pos(&self) -> usize {
        self.position
    }
}

impl<E: rancor::Source> Writer<E> for FrameWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), E> {
        let room = self.bytes.get_mut(self.position..self.position + bytes.len());
        room.ok_or_else(|| E::new(OutOfRoom))?.copy_from_slice(bytes);
        self.position += bytes.len();
        Ok(())
    }
}

/// A frame's head did not fit what was reserved for it.
#[derive(Debug, thiserror::Error)]
#[error("the head of a frame takes more than was reserved for it")]
struct OutOfRoom;
