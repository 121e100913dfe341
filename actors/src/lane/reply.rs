//! The answer to a batch of another node, computed where it will be sent from.

use std::collections::BTreeSet;

use lite_llm_runtime::{
    expert::ExpertKey,
    moe_layer::{ExpertCall, ExpertFailure},
};
use lite_llm_transport::{
    connection::Connection,
    frame::OutgoingFrame,
    messages::{self, ExpertBatchView, ExpertOutputs, FailedExpert, OutgoingExpertOutputs},
    pool::BufferPool,
};
use tokio::sync::mpsc;
use tracing::Span;

use super::flight::{Failing, failing};
use crate::trace;

/// Where the answers to a peer's batches go.
#[derive(Debug, Clone)]
pub struct ReplyQueue {
    queue: mpsc::Sender<OutgoingFrame>,
    connection: Connection,
}

impl ReplyQueue {
    /// Answers that go into a queue are written to this connection.
    pub fn new(queue: mpsc::Sender<OutgoingFrame>, connection: Connection) -> Self {
        Self { queue, connection }
    }

    /// Queues an answer. A peer that does not take its answers loses its connection: it hears of
    /// that at once, and of an answer that was dropped only by waiting in vain.
    pub fn send(&self, frame: OutgoingFrame) {
        // A queue that is closed has lost its connection already.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(frame) {
            self.connection.close("it does not take the answers to its batches");
        }
    }
}

/// An answer in the making.
pub(super) enum Reply {
    /// Outputs, to be written by the down projections.
    Outputs(OutgoingExpertOutputs, Span),
    /// The batch cannot be computed.
    Refused(String),
}

fn key(layer: u16, call: &messages::ExpertCall) -> ExpertKey {
    ExpertKey { layer, tier: call.tier, group: call.group, expert: call.expert }
}

impl Reply {
    /// Reserves an answer's frame, or says why there will be none.
    pub(super) fn reserve(view: &ExpertBatchView, width: usize, buffers: &BufferPool) -> Self {
        let head = view.head();
        let span = trace::remote_span("expert shard", head.trace, head.layer, head.calls.len());
        if head.width as usize != width {
            let found = head.width;
            return Self::Refused(format!(
                "hidden states of width {found}; this model has {width}"
            ));
        }
        let outputs = ExpertOutputs {
            id: head.id,
            trace: trace::context_of(&span),
            width: head.width,
            rows: head.calls.len() as u32,
        };
        match OutgoingExpertOutputs::new(outputs, buffers) {
            Ok(outputs) => Self::Outputs(outputs, span),
            Err(error) => Self::Refused(error.to_string()),
        }
    }

    /// The calls whose outputs this answer holds.
    pub(super) fn calls<'a>(
        &'a mut self,
        view: &'a ExpertBatchView,
        width: usize,
    ) -> impl Iterator<Item = ExpertCall<'a>> {
        let outputs = match self {
            Self::Outputs(outputs, _) => outputs.rows_mut(),
            Self::Refused(_) => &mut [],
        };
        view.calls().iter().zip(outputs.chunks_exact_mut(width)).map(|(call, output)| ExpertCall {
            key: key(view.head().layer, call),
            row: view.row(call.row as usize),
            output,
        })
    }

    /// The frame to be sent. Of the experts that could not be run, it names those of this batch;
    /// its other calls are answered.
    pub(super) fn finish(
        self,
        view: &ExpertBatchView,
        failures: &[ExpertFailure],
        buffers: &BufferPool,
    ) -> Option<OutgoingFrame> {
        let head = view.head();
        let refuse = |reason: &str| {
            OutgoingFrame::message(&messages::ExpertFailure::new(head.id, reason)).ok()
        };
        let (outputs, _span) = match self {
            Self::Outputs(outputs, span) => (outputs, span),
            Self::Refused(reason) => return refuse(&reason),
        };
        let keys = || head.calls.iter().map(|call| key(head.layer, call));
        let called: BTreeSet<ExpertKey> =
            if failures.is_empty() { BTreeSet::new() } else { keys().collect() };
        let called = |failure: &&ExpertFailure| called.contains(&failure.key);
        let named = |failure: &ExpertFailure| {
            let ExpertKey { tier, group, expert, .. } = failure.key;
            let failed = FailedExpert { tier, group, expert, reason: failure.error.to_string() };
            match failing(&failure.error) {
                Failing::Absent => failed.absent(),
                Failing::Broken => failed,
            }
        };
        let failed: Vec<FailedExpert> = failures.iter().filter(called).map(named).collect();
        if failed.is_empty() {
            return Some(outputs.finish());
        }
        match outputs.finish_without(failed, buffers) {
            Ok(frame) => Some(frame),
            Err(error) => refuse(&error.to_string()),
        }
    }
}
