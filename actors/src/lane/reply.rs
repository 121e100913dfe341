//! The answer to a batch of another node, computed where it will be sent from.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use lite_llm_runtime::{
    expert::ExpertKey,
    moe_layer::{ExpertCall, ExpertFailure},
    residency::{ROUTED_ROWS_MAX, RoutedRow},
};
use lite_llm_transport::{
    connection::Connection,
    frame::OutgoingFrame,
    messages::{self, ExpertBatchView, ExpertOutputs, FailedExpert, OutgoingExpertOutputs},
    pool::BufferPool,
};
use tokio::sync::mpsc;
use tracing::Span;

use super::flight::{Failing, count, failing, is_coming, not_come};
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
    Outputs {
        outputs: OutgoingExpertOutputs,
        /// Calls that were run, or cannot be.
        done: Vec<bool>,
        failed: Vec<FailedExpert>,
        span: Span,
    },
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
            Ok(outputs) => {
                let (done, failed) = (vec![false; head.calls.len()], Vec::new());
                Self::Outputs { outputs, done, failed, span }
            }
            Err(error) => Self::Refused(error.to_string()),
        }
    }

    /// Experts of all calls of a batch, with their rows.
    pub(super) fn wanted(view: &ExpertBatchView) -> Vec<(ExpertKey, u32)> {
        count(view.calls().iter().map(|call| key(view.head().layer, call)))
    }

    /// What the rows of a batch are routed to on this node, for a policy to learn from: whose rows
    /// they are is not said, so all are taken for one sequence's.
    pub(super) fn routed(view: &ExpertBatchView) -> Vec<RoutedRow> {
        let mut rows: BTreeMap<u32, Vec<ExpertKey>> = BTreeMap::new();
        for call in view.calls() {
            rows.entry(call.row).or_default().push(key(view.head().layer, call));
        }
        let skipped = rows.len().saturating_sub(ROUTED_ROWS_MAX);
        let row = |experts| RoutedRow { stream: u64::MAX, last: [0; 3], experts, near: vec![] };
        rows.into_values().skip(skipped).map(row).collect()
    }

    /// The calls that are still to be run.
    pub(super) fn calls<'a>(
        &'a mut self,
        view: &'a ExpertBatchView,
        width: usize,
    ) -> impl Iterator<Item = ExpertCall<'a>> {
        let (outputs, done) = match self {
            Self::Outputs { outputs, done, .. } => (outputs.rows_mut(), &done[..]),
            Self::Refused(_) => (&mut [][..], &[][..]),
        };
        let calls = view.calls().iter().zip(done).zip(outputs.chunks_exact_mut(width));
        calls.filter(|((_, done), _)| !**done).map(|((call, _), output)| ExpertCall {
            key: key(view.head().layer, call),
            row: view.row(call.row as usize),
            output,
        })
    }

    /// Notes that they were run, but for these experts. Returns whether all is done: of some,
    /// the expert may only be on its way.
    pub(super) fn ran(&mut self, view: &ExpertBatchView, failures: &[ExpertFailure]) -> bool {
        let Self::Outputs { done, failed, .. } = self else { return true };
        if failures.is_empty() {
            done.fill(true);
            return true;
        }
        let failures: BTreeMap<ExpertKey, &ExpertFailure> =
            failures.iter().map(|failure| (failure.key, failure)).collect();
        let mut named = BTreeSet::new();
        for (call, done) in view.calls().iter().zip(done.iter_mut()).filter(|(_, done)| !**done) {
            let key = key(view.head().layer, call);
            let Some(failure) = failures.get(&key) else {
                *done = true;
                continue;
            };
            if is_coming(&failure.error) {
                continue;
            }
            *done = true;
            if named.insert(key) {
                let ExpertKey { tier, group, expert, .. } = key;
                let reason = failure.error.to_string();
                let expert = FailedExpert { tier, group, expert, reason };
                failed.push(match failing(&failure.error) {
                    Failing::Absent => expert.absent(),
                    Failing::Broken => expert,
                });
            }
        }
        done.iter().all(|done| *done)
    }

    /// Whether it says only that nothing of the batch is computed.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    /// How many calls were run, or cannot be.
    pub(super) fn done(&self) -> usize {
        match self {
            Self::Outputs { done, .. } => done.iter().filter(|done| **done).count(),
            Self::Refused(_) => 0,
        }
    }

    /// Says of the calls whose experts have not come in time that they are absent.
    pub(super) fn give_up(&mut self, view: &ExpertBatchView, waited: Duration) {
        let Self::Outputs { done, failed, .. } = self else { return };
        let mut named = BTreeSet::new();
        for (call, done) in view.calls().iter().zip(done.iter_mut()).filter(|(_, done)| !**done) {
            *done = true;
            let key = key(view.head().layer, call);
            if named.insert(key) {
                let ExpertKey { tier, group, expert, .. } = key;
                let reason = format!("{key}: {}", not_come(waited));
                failed.push(FailedExpert { tier, group, expert, reason }.absent());
            }
        }
    }

    /// The frame to be sent. It names the experts that could not be run; the other calls are
    /// answered.
    pub(super) fn finish(
        self,
        view: &ExpertBatchView,
        buffers: &BufferPool,
    ) -> Option<OutgoingFrame> {
        let refuse = |reason: &str| {
            OutgoingFrame::message(&messages::ExpertFailure::new(view.head().id, reason)).ok()
        };
        let (outputs, failed, _span) = match self {
            Self::Outputs { outputs, failed, span, .. } => (outputs, failed, span),
            Self::Refused(reason) => return refuse(&reason),
        };
        if failed.is_empty() {
            return Some(outputs.finish());
        }
        match outputs.finish_without(failed, buffers) {
            Ok(frame) => Some(frame),
            Err(error) => refuse(&error.to_string()),
        }
    }
}
