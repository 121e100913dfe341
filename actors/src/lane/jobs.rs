//! The jobs at home in a lane, and how what they generate reaches their readers.
//!
//! Invariant: a job's last event is sent exactly once; a reader that does not keep up loses its
//! job, never the lane's time.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use lite_llm_runtime::{engine::Event, sampler::Score, sequence};
use lite_llm_transport::messages::{
    EndReason, JobEvent, JobEventBody, ScoredToken, TokenLogprob, TraceContext,
};
use tokio::sync::mpsc;
use tracing::Span;

use super::Ticket;
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
    held: bool,
    /// Why it ended, where its reader could not be told.
    epitaph: Arc<OnceLock<String>>,
    _span: Span,
}

impl Job {
    pub(super) fn new(
        id: u64,
        vocab: usize,
        logits: bool,
        events: mpsc::Sender<JobEvent>,
        epitaph: Arc<OnceLock<String>>,
        span: Span,
    ) -> Self {
        Self {
            id,
            events,
            trace: trace::context_of(&span),
            vocab,
            logits,
            held: false,
            epitaph,
            _span: span,
        }
    }

    fn end(self, body: JobEventBody) {
        // A reader that is gone or behind cannot be told.
        let _ = self.events.try_send(JobEvent { job: self.id, trace: self.trace, body });
    }

    /// Whether its reader is so far behind that it is to generate no more for now.
    fn is_behind(&self) -> bool {
        self.events.capacity() < self.events.max_capacity() / 2
    }
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Jobs {
    jobs: HashMap<Ticket, Job>,
}

impl Jobs {
    pub(super) fn insert(&mut self, ticket: Ticket, job: Job) {
        self.jobs.insert(ticket, job);
    }

    /// Jobs that are to be held back from now on, or no more.
    pub(super) fn backlogs(&mut self) -> impl Iterator<Item = (Ticket, bool)> {
        self.jobs.iter_mut().filter(|(_, job)| job.logits).filter_map(|(&ticket, job)| {
            let held = job.is_behind();
            (std::mem::replace(&mut job.held, held) != held).then_some((ticket, held))
        })
    }

    /// Whether some job is held back.
    pub(super) fn any_held(&self) -> bool {
        self.jobs.values().any(|job| job.held)
    }

    /// Passes an engine's event on. Returns a job whose reader does not keep up.
    pub(super) fn publish(&mut self, event: Event) -> Option<u64> {
        match event {
            Event::Token { sequence, index, id, score } => {
                let (index, text) = (index as u32, None);
                let body = match score {
                    None => JobEventBody::Token { index, id, text },
                    Some(Score { logprob, top }) => {
                        let named = |(id, logprob)| TokenLogprob { id, logprob };
                        let top = top.into_iter().map(named).collect();
                        JobEventBody::Scored(ScoredToken { index, id, text, logprob, top }.into())
                    }
                };
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

    fn fail(&mut self, ticket: Ticket, reason: &str) {
        self.last(ticket, JobEventBody::Failed { reason: reason.to_owned() });
    }

    /// Gives a job back: it did not begin, and another node may take it.
    pub(super) fn not_taken(&mut self, ticket: Ticket, reason: String) {
        self.last(ticket, JobEventBody::NotTaken { reason });
    }

    fn logits(&mut self, sequence: Ticket, first: usize, values: &[f32]) -> Option<u64> {
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

    fn send(&mut self, id: Ticket, body: JobEventBody) -> Option<u64> {
        let job = self.jobs.get(&id)?;
        match job.events.try_send(JobEvent { job: job.id, trace: job.trace, body }) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.jobs.remove(&id);
                Some(id)
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                // The reader reads what waits, then finds the reason.
                if let Some(job) = self.jobs.remove(&id) {
                    let reason = format!(
                        "{} events of this job were not read: read them faster, or submit it again",
                        job.events.max_capacity()
                    );
                    let _ = job.epitaph.set(reason);
                }
                Some(id)
            }
        }
    }

    fn last(&mut self, id: Ticket, body: JobEventBody) {
        if let Some(job) = self.jobs.remove(&id) {
            job.end(body);
        }
    }
}
