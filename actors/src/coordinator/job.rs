//! A job at the coordinator: it goes to its home node on a stream of its own, and what comes back
//! goes to its reader.
//!
//! Invariants: a job's reader gets exactly one last event, whatever fails; a reader that goes
//! away cancels its job; a reader that is slow slows its own job only (each job has its own
//! stream and its own bounded queue).

use std::sync::Arc;

use lite_llm_runtime::tokenizer::Tokenizer;
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    messages::{JobEvent, JobEventBody, JobStart, Prompt},
};
use tokio::sync::{mpsc, watch};

use crate::membership::gone;

/// Events of one job that may wait for a client.
pub(super) const CLIENT_EVENTS_MAX: usize = 64;

/// A job at the coordinator.
pub(super) struct Job {
    pub(super) start: JobStart,
    pub(super) home: Connection,
    pub(super) events: mpsc::Sender<JobEvent>,
    /// Turns to a reason when the cluster can no longer serve.
    pub(super) suspended: watch::Receiver<Option<String>>,
    pub(super) cancelled: watch::Receiver<bool>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
}

impl Job {
    /// Brings the job to its home node and its events to its reader.
    pub(super) async fn run(mut self) {
        let job = self.start.job;
        let trace = self.start.request.trace;
        if let Some(reason) = self.pump().await {
            let body = JobEventBody::Failed { reason };
            // A reader that is gone needs no last event.
            let _ = self.events.send(JobEvent { job, trace, body }).await;
        }
    }

    /// Returns why the job failed, unless its reader was told how it ended or is gone.
    async fn pump(&mut self) -> Option<String> {
        let connection = self.home.clone();
        let gone = |error: &dyn std::fmt::Display| {
            let lost = connection.close_reason();
            let how = lost.map_or_else(|| error.to_string(), |lost| lost.reason);
            Some(gone(&connection.peer().name, &how))
        };
        let (mut sender, mut receiver) = match self.home.open_stream(StreamKind::Job).await {
            Ok(stream) => stream,
            Err(error) => return gone(&error),
        };
        if let Err(error) = sender.send_message(&self.start).await {
            return gone(&error);
        }
        let mut text = self.tokenizer.as_ref().map(|tokenizer| match &self.start.request.prompt {
            Prompt::Tokens(prompt) => tokenizer.stream_after(prompt),
            Prompt::Text(_) | Prompt::Chat(_) => tokenizer.stream(),
        });
        let mut generated = 0u32;
        loop {
            let frame = tokio::select! {
                frame = receiver.recv() => frame,
                reason = suspended(&mut self.suspended) => return Some(reason),
                () = cancelled(&mut self.cancelled) => {
                    // The home node sees the stream end and stops; so does the reader.
                    let reason = lite_llm_transport::messages::EndReason::Cancelled;
                    let body = JobEventBody::Done { reason, generated };
                    let (job, trace) = (self.start.job, self.start.request.trace);
                    let _ = self.events.send(JobEvent { job, trace, body }).await;
                    return None;
                }
            };
            let mut event = match frame {
                Ok(Some(frame)) => match frame.decode::<JobEvent>() {
                    Ok(event) => event,
                    Err(error) => return gone(&error),
                },
                Ok(None) => {
                    let reason = "its home node ended this job without a word: it is stopping, or \
                                  the job's events were not read fast enough; submit it again";
                    return Some(reason.to_owned());
                }
                Err(error) => return gone(&error),
            };
            if let JobEventBody::Token { id, text: piece, .. } = &mut event.body {
                generated += 1;
                *piece = text.as_mut().map(|text| text.push(*id)).filter(|piece| !piece.is_empty());
            }
            let last = event.body.is_last();
            if last && let Some(text) = text.as_mut().map(|t| t.finish()).filter(|t| !t.is_empty())
            {
                // What the last tokens left open, and no further token will complete.
                let (job, trace) = (event.job, event.trace);
                let rest = JobEvent { job, trace, body: JobEventBody::Text(text) };
                if self.events.send(rest).await.is_err() {
                    return None;
                }
            }
            // A reader that is gone drops its end; dropping the stream tells the home node.
            if self.events.send(event).await.is_err() || last {
                return None;
            }
        }
    }
}

async fn suspended(watch: &mut watch::Receiver<Option<String>>) -> String {
    match watch.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "the coordinator stops".into(),
    }
}

async fn cancelled(watch: &mut watch::Receiver<bool>) {
    if watch.wait_for(|cancelled| *cancelled).await.is_err() {
        std::future::pending::<()>().await;
    }
}
