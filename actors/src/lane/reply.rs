//! The answer to a batch of another node, computed where it will be sent from.

use lite_llm_runtime::{
    expert::{ExpertKey, ExpertStore},
    moe_layer::ExpertCall,
};
use lite_llm_transport::{
    frame::OutgoingFrame,
    messages::{self, ExpertBatchView, ExpertFailure, ExpertOutputs, OutgoingExpertOutputs},
    pool::BufferPool,
};
use tracing::Span;

use super::RemoteBatch;
use crate::trace;

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
    pub(super) fn reserve(
        batch: &RemoteBatch,
        width: usize,
        store: &dyn ExpertStore,
        buffers: &BufferPool,
    ) -> Self {
        let head = batch.view.head();
        let span = trace::remote_span("expert shard", head.trace, head.layer, head.calls.len());
        if head.width as usize != width {
            let found = head.width;
            return Self::Refused(format!(
                "hidden states of width {found}; this model has {width}"
            ));
        }
        if let Some(error) =
            head.calls.iter().find_map(|call| store.fetch(key(head.layer, call)).err())
        {
            return Self::Refused(error.to_string());
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

    /// The frame to be sent; `failed` says that the outputs were not computed.
    pub(super) fn finish(
        self,
        view: &ExpertBatchView,
        failed: Option<&str>,
    ) -> Option<OutgoingFrame> {
        let refuse =
            |reason: &str| OutgoingFrame::message(&ExpertFailure::new(view.head().id, reason)).ok();
        match (self, failed) {
            (Self::Outputs(outputs, _span), None) => Some(outputs.finish()),
            (Self::Outputs(..), Some(reason)) => refuse(reason),
            (Self::Refused(reason), _) => refuse(&reason),
        }
    }
}
