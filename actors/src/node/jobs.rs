//! The jobs that a coordinator sends to a home node: one stream each, whose end is the job's.
//!
//! Invariants: a job that was taken gets exactly one last event, unless its stream is lost; a stream
//! that ends cancels its job.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use lite_llm_runtime::{
    config::ModelConfig,
    draft::{DraftedTiers, Speculation},
    sampler::Sampling,
    sequence::Request,
};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    frame::{FrameReceiver, FrameSender},
    messages::{Choosing, JobEvent, JobEventBody, JobOrder, JobRequest, LogitsWanted, Prompt},
};
use tokio::sync::mpsc;
use tracing::{Instrument, Span, debug, debug_span};

use super::grammars::{FormError, GrammarDesk};
use crate::{
    lane::{self, JOB_EVENTS_MAX, LaneEvent, LaneInbox},
    links::deliver,
    trace,
};

/// Tickets given out by this process: see [`lane::Ticket`].
static TICKETS: AtomicU64 = AtomicU64::new(0);

/// Serves the job streams that a coordinator opens to a node, until the connection ends.
pub async fn serve_jobs(connection: Connection, inbox: LaneInbox, grammars: GrammarDesk) {
    while let Some(stream) = connection.accept_stream().await {
        if stream.kind == StreamKind::Job {
            let (sender, receiver) = stream.into_frames();
            tokio::spawn(serve_job(sender, receiver, inbox.clone(), grammars.clone()));
        }
    }
}

async fn serve_job(
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
    inbox: LaneInbox,
    grammars: GrammarDesk,
) {
    let start = match receiver.recv().await {
        Ok(Some(frame)) => frame.decode::<JobOrder>().map_err(|error| error.to_string()),
        Ok(None) => return,
        Err(error) => Err(error.to_string()),
    };
    let order = match start {
        Ok(start) => start,
        Err(error) => {
            debug!(%error, "a job stream brought no job");
            return;
        }
    };
    let (job, trace) = (order.job, order.request.trace);
    let span = debug_span!("node", job);
    trace::adopt(&span, trace);
    let (events, mut queue) = mpsc::channel(JOB_EVENTS_MAX);
    let (ticket, epitaph) = (TICKETS.fetch_add(1, Relaxed), Arc::new(OnceLock::new()));
    let guide = match &order.choosing.grammar {
        None => Ok(None),
        Some(grammar) => grammars.read(grammar).await.map(Some),
    };
    // The lane of now: another may have begun while the grammar was read.
    let home = inbox.load_full();
    let refused = match (guide, &home) {
        (_, None) => {
            let reason = "this worker has no experts loaded at present".into();
            Some(JobEventBody::NotTaken { reason })
        }
        (Err(FormError::Busy(reason)), _) => Some(JobEventBody::NotTaken { reason }),
        (Err(FormError::Form(reason)), _) => Some(JobEventBody::Failed { reason }),
        (Ok(guide), Some(lane)) => match engine_request(order, &span) {
            Err(reason) => Some(JobEventBody::Failed { reason }),
            Ok(request) => {
                let request = Request { guide, ..request };
                let (epitaph, span) = (epitaph.clone(), span.clone());
                let start = lane::JobStart { job, ticket, request, events, epitaph, span };
                let taken = deliver(lane, LaneEvent::Start(Box::new(start))).await;
                let reason = "this worker is busy or stopping".to_owned();
                (!taken).then_some(JobEventBody::NotTaken { reason })
            }
        },
    };
    if let Some(body) = refused {
        if sender.send_message(&JobEvent { job, trace, body }).await.is_ok() {
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
        if let Some(reason) = epitaph.get() {
            let body = JobEventBody::Failed { reason: reason.clone() };
            if sender.send_message(&JobEvent { job, trace, body }).await.is_err() {
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
    if let Some(lane) = home {
        // The lane ignores jobs that have ended; a lane that is gone has ended them all.
        deliver(&lane, LaneEvent::Cancel(ticket)).await;
    }
}

/// Whether a model can serve a job, asked before anything is sent. Text is not looked at: its
/// tokens are.
pub fn check(request: &JobRequest, config: &ModelConfig) -> Result<(), String> {
    check_order(request, &Choosing::default(), &[], config)
}

/// The same with all that can be asked for, of a job that has generated these tokens.
pub fn check_order(
    request: &JobRequest,
    choosing: &Choosing,
    generated: &[u32],
    config: &ModelConfig,
) -> Result<(), String> {
    if !matches!(request.prompt, Prompt::Tokens(_)) {
        return Ok(());
    }
    let (choosing, generated) = (choosing.clone(), generated.to_vec());
    let order = JobOrder { choosing, generated, ..request.clone().into() };
    let request = engine_request(order, &Span::none())?;
    request.check(config).map(drop).map_err(|error| error.to_string())
}

/// A job as the engine takes it.
fn engine_request(order: JobOrder, span: &Span) -> Result<Request, String> {
    let JobOrder { request, choosing, serving, generated, .. } = order;
    if choosing.grammar.is_some() && !request.stop_at_eos {
        return Err("an answer of a form ends where that is whole: leave ignore_eos out".into());
    }
    let Prompt::Tokens(prompt) = request.prompt else {
        return Err("a home node takes token ids, not text".into());
    };
    let tiers = request.tiers.parse::<DraftedTiers>();
    let DraftedTiers { tiers, draft } = tiers.map_err(|error| format!("tiers: {error}"))?;
    let speculate = match draft {
        Some(tier) => Speculation::Tier(tier),
        None if serving.speculate => Speculation::Ngram,
        None => Speculation::Off,
    };
    Ok(Request {
        prompt,
        generated,
        max_new_tokens: request.max_new_tokens as usize,
        sampling: Sampling {
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            min_p: choosing.min_p,
            repetition: choosing.repetition,
            presence: choosing.presence,
            frequency: choosing.frequency,
            seed: request.seed,
        },
        guide: None,
        bias: choosing.bias.into_iter().map(|bias| (bias.id, bias.bias)).collect(),
        logprobs: choosing.logprobs,
        tiers,
        stop_at_eos: request.stop_at_eos,
        logits: request.want_logits == LogitsWanted::All,
        routes: request.want_routes,
        prefill_chunk: request.prefill_chunk as usize,
        speculate,
        tenant: serving.tenant,
        priority: serving.priority,
        span: span.clone(),
    })
}
