//! One dispatch of a pass: which of its calls are where, and what came back.

use std::collections::{BTreeMap, HashMap};

use lite_llm_runtime::{
    config::ModelConfig,
    expert::ExpertKey,
    forward::{Dispatch, FailedRoute},
    moe_layer::{ExpertCall, ExpertFailure},
    routing::{Route, Routes},
};
use lite_llm_transport::{
    frame::OutgoingFrame,
    messages::{
        self, ExpertBatch, ExpertOutputsView, OutgoingExpertBatch, TraceContext, experts::calls_max,
    },
    pool::BufferPool,
};

use crate::placement::Owners;

/// Where the output of a route is.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// Row of the outputs that were computed here.
    Here(u32),
    /// Row of the reply to a batch.
    There { batch: u64, row: u32 },
}

/// A batch that was sent.
struct Sent {
    peer: u16,
    calls: u32,
    outputs: Option<ExpertOutputsView>,
    complete: bool,
    /// Why none of it was computed.
    failed: Option<String>,
}

/// What a pass waits for.
#[derive(Default)]
pub(super) struct Flight {
    width: usize,
    /// One entry per route of the dispatch.
    parts: Vec<Part>,
    /// Outputs computed here, `[calls, width]`.
    here: Vec<f32>,
    /// Experts that could not be run here, and why.
    failed_here: Vec<(ExpertKey, String)>,
    sent: HashMap<u64, Sent>,
}

/// What splitting a dispatch needs to know.
pub(super) struct Split<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) owners: &'a Owners,
    /// Index of this node.
    pub(super) here: u16,
}

/// A frame for a peer, with the number of its batch.
type Outgoing = (u64, u16, OutgoingFrame);

/// A batch for one peer, as it grows.
#[derive(Default)]
struct Batch {
    /// Rows of the dispatch that are sent, each once.
    rows: Vec<u32>,
    calls: Vec<messages::ExpertCall>,
    /// Route of each call.
    routes: Vec<u32>,
}

impl Split<'_> {
    /// Splits a dispatch by owner and writes a frame for each other node that owns a part. `here`
    /// is memory for the outputs that are computed here: see [`Flight::into_memory`].
    pub(super) fn split(
        &self,
        dispatch: &Dispatch<'_>,
        next_id: &mut u64,
        trace: TraceContext,
        buffers: &BufferPool,
        mut here: Vec<f32>,
    ) -> Result<(Flight, Vec<Outgoing>), String> {
        let width = self.config.hidden;
        let mut flight = Flight { width, ..Flight::default() };
        let mut frames = Vec::new();
        let mut batches: BTreeMap<u16, Batch> = BTreeMap::new();
        let mut calls_here = 0;
        for (index, (row, route)) in (0u32..).zip(dispatch.routes.with_rows()) {
            let owner = self.owners.owner(route.key);
            if owner == self.here {
                flight.parts.push(Part::Here(calls_here));
                calls_here += 1;
                continue;
            }
            let batch = batches.entry(owner).or_default();
            batch.push(index, row as u32, route);
            flight.parts.push(Part::There { batch: 0, row: 0 });
            if batch.calls.len() as u32 == calls_max(width as u32) {
                let batch = batches.remove(&owner).unwrap_or_default();
                frames.extend(flight.send(batch, owner, dispatch, next_id, trace, buffers));
            }
        }
        for (owner, batch) in batches {
            frames.extend(flight.send(batch, owner, dispatch, next_id, trace, buffers));
        }
        here.resize(calls_here as usize * width, 0.0);
        flight.here = here;
        Ok((flight, frames))
    }
}

impl Batch {
    fn push(&mut self, index: u32, row: u32, route: &Route) {
        // Rows come in order, so a row that is sent already is the last one.
        if self.rows.last() != Some(&row) {
            self.rows.push(row);
        }
        self.calls.push(messages::ExpertCall {
            row: self.rows.len() as u32 - 1,
            tier: route.key.tier,
            group: route.key.group,
            expert: route.key.expert,
        });
        self.routes.push(index);
    }
}

impl Flight {
    fn send(
        &mut self,
        batch: Batch,
        peer: u16,
        dispatch: &Dispatch<'_>,
        next_id: &mut u64,
        trace: TraceContext,
        buffers: &BufferPool,
    ) -> Option<Outgoing> {
        let id = *next_id;
        *next_id += 1;
        let Batch { rows, calls, routes } = batch;
        for (row, &route) in (0u32..).zip(&routes) {
            self.parts[route as usize] = Part::There { batch: id, row };
        }
        let count = calls.len() as u32;
        let head = ExpertBatch {
            id,
            trace,
            layer: dispatch.layer as u16,
            width: self.width as u32,
            rows: rows.len() as u32,
            calls,
        };
        let mut sent = Sent { peer, calls: count, outputs: None, complete: false, failed: None };
        let mut frame = match OutgoingExpertBatch::new(head, buffers) {
            Ok(frame) => frame,
            Err(error) => {
                (sent.complete, sent.failed) = (true, Some(error.to_string()));
                self.sent.insert(id, sent);
                return None;
            }
        };
        for (out, &row) in frame.rows_mut().chunks_exact_mut(self.width).zip(&rows) {
            out.copy_from_slice(&dispatch.hidden[row as usize * self.width..][..self.width]);
        }
        self.sent.insert(id, sent);
        Some((id, peer, frame.finish()))
    }

    /// The memory of the outputs that were computed here, for the next flight.
    pub(super) fn into_memory(self) -> Vec<f32> {
        self.here
    }

    /// Whether some calls are to be run here.
    pub(super) fn has_local(&self) -> bool {
        !self.here.is_empty()
    }

    /// The calls that are to be run here.
    pub(super) fn local_calls<'a>(
        &'a mut self,
        dispatch: &'a Dispatch<'_>,
    ) -> impl Iterator<Item = ExpertCall<'a>> {
        let width = self.width;
        let ours = dispatch
            .routes
            .with_rows()
            .zip(&self.parts)
            .filter(|(_, part)| matches!(part, Part::Here(_)));
        ours.zip(self.here.chunks_exact_mut(width)).map(move |(((row, route), _), output)| {
            ExpertCall { key: route.key, row: &dispatch.hidden[row * width..][..width], output }
        })
    }

    /// Takes the outputs of a batch.
    pub(super) fn take(
        &mut self,
        id: u64,
        peer: u16,
        view: ExpertOutputsView,
    ) -> Result<(), String> {
        let Some(sent) = self.sent.get_mut(&id) else { return Ok(()) };
        let (rows, width) = (view.head().rows, view.head().width as usize);
        if sent.peer != peer || rows != sent.calls || width != self.width {
            return Err(format!(
                "it sent {rows} outputs of width {width}; {} of width {} are expected",
                sent.calls, self.width
            ));
        }
        sent.outputs = Some(view);
        Ok(())
    }

    /// Notes that the exchange is done with a batch.
    pub(super) fn complete(&mut self, id: u64) {
        if let Some(sent) = self.sent.get_mut(&id) {
            sent.complete = true;
        }
    }

    /// Notes that nothing of a batch will come, for a reason that names its node.
    pub(super) fn fail(&mut self, id: u64, reason: String) {
        if let Some(sent) = self.sent.get_mut(&id) {
            (sent.complete, sent.failed) = (true, Some(reason));
        }
    }

    /// Notes the experts that could not be run here.
    pub(super) fn fail_here(&mut self, failures: &[ExpertFailure]) {
        let named = |failure: &ExpertFailure| (failure.key, failure.error.to_string());
        self.failed_here.extend(failures.iter().map(named));
    }

    /// Whether some outputs will not come.
    pub(super) fn has_failures(&self) -> bool {
        let failed = |sent: &Sent| {
            sent.failed.is_some() || sent.outputs.as_ref().is_some_and(|v| !v.failed().is_empty())
        };
        !self.failed_here.is_empty() || self.sent.values().any(failed)
    }

    /// The routes of the dispatch whose outputs will not come. `refused` says that a node could not
    /// run an expert.
    pub(super) fn failed_routes(
        &self,
        routes: &Routes,
        refused: impl Fn(u16, &str) -> String,
    ) -> Vec<FailedRoute> {
        let reason = |key: ExpertKey, part: &Part| match *part {
            Part::Here(_) => {
                let failed = self.failed_here.iter().find(|(failed, _)| *failed == key);
                failed.map(|(_, reason)| reason.clone())
            }
            Part::There { batch, .. } => {
                let sent = self.sent.get(&batch)?;
                let ours = (key.tier, key.group, key.expert);
                let failed = sent.outputs.iter().flat_map(ExpertOutputsView::failed);
                let mut failed = failed.filter(|f| (f.tier, f.group, f.expert) == ours);
                let expert = failed.next().map(|failed| refused(sent.peer, &failed.reason));
                sent.failed.clone().or(expert)
            }
        };
        let parts = routes.all().iter().zip(&self.parts).enumerate();
        parts
            .filter_map(|(route, (Route { key, .. }, part))| {
                reason(*key, part).map(|reason| FailedRoute { route, reason })
            })
            .collect()
    }

    /// Whether every output is there, or known not to come.
    pub(super) fn is_complete(&self) -> bool {
        self.sent.values().all(|sent| sent.complete)
    }

    /// The output of every route, in order, where it lies; nothing where it did not come.
    pub(super) fn parts(&self) -> Vec<&[f32]> {
        let part = |part: &Part| match *part {
            Part::Here(row) => &self.here[row as usize * self.width..][..self.width],
            Part::There { batch, row } => {
                let sent = self.sent.get(&batch).and_then(|sent| sent.outputs.as_ref());
                sent.map_or(&[][..], |outputs| outputs.row(row as usize))
            }
        };
        self.parts.iter().map(part).collect()
    }
}
