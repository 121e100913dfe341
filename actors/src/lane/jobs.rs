//! The jobs at home in a lane, and how what they generate reaches their readers.
//!
//! Invariant: a job's last event is sent exactly once; a reader that does not keep up loses its
//! job, never the lane's time.

use std::collections::HashMap;

use lite_llm_runtime::{engine::Event, sequence};
use lite_llm_transport::messages::{EndReason, JobEvent, JobEventBody, TraceContext};
use tokio::sync::mpsc;
use tracing::Span;

use crate::trace;

/// Bytes of logits in one event at most (but at least one row).
const LOGITS_BYTES_MAX: usize = 1 << 20;

/// A job whose events go to a reader.
pub(super) struct Job {
    id: u64,
    events: mpsc::Sender<JobEvent>,
    trace: TraceContext,
    vocab: usize,
    /// Its events are large, so it is held back while many wait.
    logits: bool,
    _span: Span,
}

impl Job {
    pub(super) fn new(
        id: u64,
        vocab: usize,
        logits: bool,
        events: mpsc::Sender<JobEvent>,
        span: Span,
    ) -> Self {
        Self { id, events, trace: trace::context_of(&span), vocab, logits, _span: span }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Ends it with a reason.
    pub(super) fn fail(self, reason: &str) {
        self.end(JobEventBody::Failed { reason: reason.to_owned() });
    }

    fn end(self, body: JobEventBody) {
        // A reader that is gone or behind cannot be told.
        let _ = self.events.try_send(JobEvent { job: self.id, trace: self.trace, body });
    }

    /// Whether its reader is so far behind that it is to generate no more for now.
    fn is_held(&self) -> bool {
        self.logits && self.events.capacity() < self.events.max_capacity() / 2
    }
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Jobs {
    jobs: HashMap<u64, Job>,
}

impl Jobs {
    pub(super) fn insert(&mut self, job: Job) {
        self.jobs.insert(job.id, job);
    }

    /// Jobs with large events, each with whether it is to be held back.
    pub(super) fn backlogs(&self) -> impl Iterator<Item = (u64, bool)> {
        self.jobs.values().filter(|job| job.logits).map(|job| (job.id, job.is_held()))
    }

    /// Whether some job is held back.
    pub(super) fn any_held(&self) -> bool {
        self.jobs.values().any(Job::is_held)
    }

    /// Passes an engine's event on. Returns a job whose reader does not keep up.
    pub(super) fn publish(&mut self, event: Event) -> Option<u64> {
        match event {
            Event::Token { sequence, index, id } => {
                let body = JobEventBody::Token { index: index as u32, id, text: None };
                self.send(sequence, body)
            }
            Event::Prefilled { sequence, done, total } => {
                let (prefilled, total) = (done as u32, total as u32);
                self.send(sequence, JobEventBody::Progress { prefilled, total })
            }
            Event::Logits { sequence, first, values } => self.logits(sequence, first, &values),
            Event::Routes { sequence, first, rows, layers, experts } => {
                let per_row = (rows * layers).max(1);
                let body = JobEventBody::Routes {
                    first_row: first as u32,
                    layers: layers as u32,
                    rows: rows as u32,
                    k: (experts.len() / per_row) as u32,
                    ids: experts,
                };
                self.send(sequence, body)
            }
            Event::Ended { sequence, reason, generated } => {
                let reason = match reason {
                    sequence::EndReason::Length => EndReason::Length,
                    sequence::EndReason::EndOfText => EndReason::EndOfText,
                    sequence::EndReason::Context => EndReason::Context,
                    sequence::EndReason::Cancelled => EndReason::Cancelled,
                };
                self.last(sequence, JobEventBody::Done { reason, generated: generated as u32 });
                None
            }
            Event::Failed { sequence, reason } => {
                self.fail(sequence, &reason);
                None
            }
        }
    }

    pub(super) fn fail(&mut self, job: u64, reason: &str) {
        self.last(job, JobEventBody::Failed { reason: reason.to_owned() });
    }

    pub(super) fn fail_all(&mut self, reason: &str) {
        let all: Vec<u64> = self.jobs.keys().copied().collect();
        all.into_iter().for_each(|job| self.fail(job, reason));
    }

    fn logits(&mut self, sequence: u64, first: usize, values: &[f32]) -> Option<u64> {
        let width = self.jobs.get(&sequence)?.vocab;
        let rows = (LOGITS_BYTES_MAX / (4 * width)).max(1);
        for (part, values) in values.chunks(rows * width).enumerate() {
            let body = JobEventBody::Logits {
                first_row: (first + part * rows) as u32,
                rows: (values.len() / width) as u32,
                width: width as u32,
                values: values.to_vec(),
            };
            if let Some(abandoned) = self.send(sequence, body) {
                return Some(abandoned);
            }
        }
        None
    }

    fn send(&mut self, id: u64, body: JobEventBody) -> Option<u64> {
        let job = self.jobs.get(&id)?;
        match job.events.try_send(JobEvent { job: id, trace: job.trace, body }) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.jobs.remove(&id);
                Some(id)
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                // Dropping the sender after its queue is read ends the reader's stream, and the
                // reader sees a job that ended without its last event.
                self.jobs.remove(&id);
                Some(id)
            }
        }
    }

    fn last(&mut self, id: u64, body: JobEventBody) {
        if let Some(job) = self.jobs.remove(&id) {
            job.end(body);
        }
    }
}
