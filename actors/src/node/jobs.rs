//! The jobs that a coordinator sends to a home node: one stream each, whose end is the job's.
//!
//! Invariants: a job that was taken gets exactly one last event, unless its stream is lost; a stream
//! that ends cancels its job.

use lite_llm_runtime::{config::ModelConfig, sampler::Sampling, sequence::Request, tier::TierSet};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    frame::{FrameReceiver, FrameSender},
    messages::{JobEvent, JobEventBody, JobRequest, JobStart, LogitsWanted, Prompt},
};
use tokio::sync::mpsc;
use tracing::{Instrument, Span, debug, debug_span};

use crate::{
    lane::{self, JOB_EVENTS_MAX, LaneEvent, LaneInbox},
    links::deliver,
    trace,
};

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
    if !matches!(request.prompt, Prompt::Tokens(_)) {
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
