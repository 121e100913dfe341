//! A job's way between the coordinator and its home node: one stream, whose end is the job's.
//!
//! Invariants: a job's reader gets exactly one last event, whatever fails; a reader that goes
//! away cancels its job; a reader that is slow slows its own job only (each job has its own
//! stream and its own bounded queue).

use std::sync::Arc;

use lite_llm_runtime::{
    config::ModelConfig, sampler::Sampling, sequence::Request, tier::TierSet, tokenizer::Tokenizer,
};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    frame::{FrameReceiver, FrameSender},
    messages::{JobEvent, JobEventBody, JobRequest, JobStart, LogitsWanted, Prompt},
};
use tokio::sync::{mpsc, watch};
use tracing::{Instrument, Span, debug, debug_span};

use crate::{
    lane::{self, JOB_EVENTS_MAX, LaneEvent},
    links::deliver,
    membership::gone,
    router::LaneInbox,
    trace,
};

/// Events of one job that may wait for a client.
pub const CLIENT_EVENTS_MAX: usize = 64;

/// A job at the coordinator.
pub(crate) struct Job {
    pub(crate) start: JobStart,
    pub(crate) home: Connection,
    pub(crate) events: mpsc::Sender<JobEvent>,
    /// Turns to a reason when the cluster can no longer serve.
    pub(crate) suspended: watch::Receiver<Option<String>>,
    pub(crate) cancelled: watch::Receiver<bool>,
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
}

impl Job {
    /// Brings the job to its home node and its events to its reader.
    pub(crate) async fn run(mut self) {
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
        let mut text = self.tokenizer.as_ref().map(|tokenizer| tokenizer.stream());
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

/// Serves the job streams that a coordinator opens to a node, until the connection ends.
pub async fn serve_jobs(connection: Connection, inbox: LaneInbox) {
    while let Some(stream) = connection.accept_stream().await {
        if stream.kind == StreamKind::Job {
            let (sender, receiver) = stream.into_frames();
            tokio::spawn(serve_job(sender, receiver, inbox.clone()));
        }
    }
}

async fn serve_job(mut sender: FrameSender, mut receiver: FrameReceiver, inbox: LaneInbox) {
    let start = match receiver.recv().await {
        Ok(Some(frame)) => frame.decode::<JobStart>().map_err(|error| error.to_string()),
        Ok(None) => return,
        Err(error) => Err(error.to_string()),
    };
    let JobStart { job, request } = match start {
        Ok(start) => start,
        Err(error) => {
            debug!(%error, "a job stream brought no job");
            return;
        }
    };
    let trace = request.trace;
    let span = debug_span!("node", job);
    trace::adopt(&span, trace);
    let (events, mut queue) = mpsc::channel(JOB_EVENTS_MAX);
    let lane = inbox.load_full();
    let refused = match (engine_request(request, &span), &lane) {
        (Err(reason), _) => Some(reason),
        (Ok(_), None) => Some("this worker has no experts loaded at present".into()),
        (Ok(request), Some(lane)) => {
            let start = lane::JobStart { job, request, events, span: span.clone() };
            let taken = deliver(lane, LaneEvent::Start(Box::new(start))).await;
            (!taken).then(|| "this worker is busy or stopping; submit it again".into())
        }
    };
    if let Some(reason) = refused {
        let event = JobEvent { job, trace, body: JobEventBody::Failed { reason } };
        if sender.send_message(&event).await.is_ok() {
            // The coordinator hangs up when it has read the last event.
            let _ = sender.finish().await;
        }
        return;
    }
    let pump = async {
        while let Some(event) = queue.recv().await {
            if sender.send_message(&event).await.is_err() {
                return;
            }
        }
        // As above.
        let _ = sender.finish().await;
    };
    tokio::select! {
        () = pump.instrument(span) => {}
        // Nothing more is ever sent on this stream: whatever comes means that the job is over.
        _ = receiver.recv() => {}
    }
    if let Some(lane) = lane {
        // The lane ignores jobs that have ended; a lane that is gone has ended them all.
        deliver(&lane, LaneEvent::Cancel(job)).await;
    }
}

/// Whether a model can serve a job, asked before anything is sent. Text is not looked at: its
/// tokens are.
pub fn check(request: &JobRequest, config: &ModelConfig) -> Result<(), String> {
    if matches!(request.prompt, Prompt::Text(_)) {
        return Ok(());
    }
    let request = engine_request(request.clone(), &Span::none())?;
    request.check(config).map(drop).map_err(|error| error.to_string())
}

/// A job as the engine takes it.
fn engine_request(request: JobRequest, span: &Span) -> Result<Request, String> {
    let Prompt::Tokens(prompt) = request.prompt else {
        return Err("a home node takes token ids, not text".into());
    };
    let tiers: TierSet = request.tiers.parse().map_err(|error| format!("tiers: {error}"))?;
    Ok(Request {
        prompt,
        max_new_tokens: request.max_new_tokens as usize,
        sampling: Sampling {
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            seed: request.seed,
            ..Sampling::GREEDY
        },
        tiers,
        stop_at_eos: request.stop_at_eos,
        logits: request.want_logits == LogitsWanted::All,
        routes: request.want_routes,
        prefill_chunk: request.prefill_chunk as usize,
        span: span.clone(),
    })
}
