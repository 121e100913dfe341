//! A job at the coordinator: it goes to a home node on a stream of its own, and what comes back goes
//! to its reader. A home that is lost is replaced: the job goes on elsewhere from its prompt and its
//! tokens so far, with the bits that it would have had.
//!
//! Invariants: a job's reader gets exactly one last event, and no token twice, whatever fails but the
//! coordinator itself ([`JobProgress`] sees to that); a reader that goes away cancels its job; a reader that is slow
//! slows its own job only (each job has its own stream and its own bounded queue).

use std::{sync::Arc, time::Duration};

use lite_llm_runtime::tokenizer::{DecodeStream, Tokenizer};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    frame::{FrameReceiver, FrameSender},
    messages::{
        Choosing, EndReason, JobEvent, JobEventBody, JobOrder, JobRequest, Prompt, Serving,
    },
};
use ractor::ActorRef;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{Span, debug};

use super::{
    CoordinatorMessage,
    progress::{JobProgress, Next, Take},
};
use crate::{
    trace::{self, Operation},
    words::gone,
};

/// Events of one job that may wait for a client.
pub(crate) const CLIENT_EVENTS_MAX: usize = 64;
/// How long a home may say nothing of a job: it waits its turn there, or reads a long prompt.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// Pause before a job is offered again, when a node did not take it.
const OFFER_PAUSE: Duration = Duration::from_millis(100);

/// Where a job is to run.
#[derive(Debug, Clone)]
pub struct JobHome {
    /// The node's name.
    pub(super) name: String,
    /// The connection to it.
    pub(super) connection: Connection,
    /// Turns to a reason when its jobs are to go elsewhere.
    pub(super) leave: watch::Receiver<Option<String>>,
}

/// A job as it is submitted.
pub struct Submission {
    /// The job; its prompt is token ids by now.
    pub request: JobRequest,
    /// How its tokens are chosen.
    pub choosing: Choosing,
    /// What it is to those that schedule it.
    pub serving: Serving,
    /// What of it was generated and read before.
    pub generated: Vec<u32>,
    /// Who submits it; nobody if it is this process.
    pub client: Option<String>,
    /// What it is to be called in traces; nothing if a span above it says so.
    pub operation: Option<Operation>,
    /// How long it waits for a node, if not as long as others.
    pub patience: Option<Duration>,
    /// Where its events go.
    pub events: mpsc::Sender<JobEvent>,
}

/// Why a job was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotSubmitted {
    /// It cannot be served, or not now.
    #[error("{0}")]
    Refused(String),
    /// All nodes have said how much their caches hold, and none holds it.
    #[error("{0}")]
    FitsNowhere(String),
}

/// A job at the coordinator.
pub(super) struct Job {
    pub(super) id: u64,
    /// The span that says what it used, and the tokens of its prompt.
    pub(super) described: Option<(Span, u64)>,
    pub(super) request: JobRequest,
    pub(super) choosing: Choosing,
    pub(super) serving: Serving,
    pub(super) progress: JobProgress,
    pub(super) coordinator: ActorRef<CoordinatorMessage>,
    pub(super) events: mpsc::Sender<JobEvent>,
    pub(super) cancelled: watch::Receiver<bool>,
    /// How it ended.
    pub(super) finish: Vec<&'static str>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    /// How long it waits for a node that takes it.
    pub(super) patience: Duration,
}

/// How an attempt ended.
enum Attempt {
    /// The reader was told, or is gone.
    Ended,
    /// Somebody wants it to end.
    Cancelled,
    /// The home is lost, or its jobs are to go elsewhere.
    Lost(String),
    /// The home did not begin.
    NotTaken(String),
}

/// Where a job is to run next.
enum Where {
    Home(JobHome),
    /// Nowhere: somebody wants it to end.
    Cancelled,
    /// Nowhere: no node could take it in time.
    Nobody(String),
    /// Nowhere: the coordinator stops. Its readers lose their connections and, as after its sudden
    /// end, may go on when it is there again.
    Stopped,
}

impl Job {
    /// Brings the job to its end.
    pub(super) async fn run(mut self) {
        self.bring_to_end().await;
        if let Some((span, input)) = &self.described {
            trace::describe_end(span, *input, self.progress.generated().len() as u64, &self.finish);
        }
    }

    /// The same, at as many homes as it takes.
    async fn bring_to_end(&mut self) {
        let mut text = self.text();
        let mut offered_until = Instant::now() + self.patience;
        // Nodes that did not take it or lost it, the last one last.
        let mut refused = Vec::new();
        let mut refusal = None;
        let last = loop {
            let home = match self.home(offered_until, refused.clone()).await {
                Where::Home(home) => home,
                Where::Cancelled => break self.progress.cancel(),
                Where::Nobody(mut reason) => {
                    if let Some(refusal) = refusal {
                        reason = format!("{reason} (the last that was asked said: {refusal})");
                    }
                    break self.progress.fail(reason);
                }
                Where::Stopped => return,
            };
            let attempt = self.progress.attempt();
            debug!(job = self.id, home = %home.name, attempt, "a job goes to its home");
            match self.attempt(&home, &mut text).await {
                Attempt::Ended => return,
                Attempt::Cancelled => break self.progress.cancel(),
                Attempt::Lost(reason) => {
                    debug!(job = self.id, %reason, "a job loses its home");
                    match self.progress.lost() {
                        Next::Again(_) => {
                            // What fails at once, again and again, is not to be tried in a rush.
                            sleep(OFFER_PAUSE * self.progress.barren().saturating_sub(1)).await;
                            offered_until = Instant::now() + self.patience;
                            avoid(&mut refused, home.name);
                        }
                        Next::GiveUp(last) => break Some(last),
                        Next::Ended => return,
                    }
                }
                Attempt::NotTaken(reason) if Instant::now() >= offered_until => {
                    let reason =
                        format!("no worker took the job within {:?}: {reason}", self.patience);
                    break self.progress.fail(reason);
                }
                Attempt::NotTaken(reason) => {
                    refusal = Some(reason);
                    avoid(&mut refused, home.name);
                    sleep(OFFER_PAUSE).await;
                }
            }
        };
        if let Some(last) = last {
            // A reader that is gone needs no last event.
            let _ = self.pass(last, &mut text).await;
        }
    }

    /// The text of what comes, after what has come.
    fn text(&self) -> Option<DecodeStream> {
        let tokenizer = self.tokenizer.as_ref()?;
        let mut text = match &self.request.prompt {
            Prompt::Tokens(prompt) => tokenizer.stream_after(prompt),
            Prompt::Text(_) | Prompt::Chat(_) => tokenizer.stream(),
        };
        for &id in self.progress.generated() {
            text.push(id);
        }
        Some(text)
    }

    /// Where it is to run, but at these nodes only if there is no other.
    async fn home(&mut self, until: Instant, refused: Vec<String>) -> Where {
        let job = self.id;
        let home = |reply| CoordinatorMessage::Home { job, refused, reply };
        let asked = self.coordinator.call(home, None);
        let patience = self.patience;
        tokio::select! {
            home = timeout_at(until, asked) => match home {
                Ok(Ok(ractor::rpc::CallResult::Success(Ok(home)))) => Where::Home(home),
                Ok(Ok(ractor::rpc::CallResult::Success(Err(reason)))) => Where::Nobody(reason),
                Ok(_) => Where::Stopped,
                Err(_) => {
                    let words = CoordinatorMessage::WhyNot;
                    let why = ractor::call!(self.coordinator, words).unwrap_or_default();
                    Where::Nobody(format!(
                        "no worker could take the job within {patience:?}: {why}"
                    ))
                }
            },
            () = cancelled(&mut self.cancelled) => Where::Cancelled,
            () = self.events.closed() => Where::Cancelled,
        }
    }

    /// Runs it at one home.
    async fn attempt(&mut self, home: &JobHome, text: &mut Option<DecodeStream>) -> Attempt {
        let connection = &home.connection;
        let lost = |error: &dyn std::fmt::Display| {
            let lost = connection.close_reason();
            let how = lost.map_or_else(|| error.to_string(), |lost| lost.reason);
            Attempt::Lost(gone(&home.name, &how))
        };
        let mut leave = home.leave.clone();
        let streams = tokio::select! {
            streams = self.begin(connection) => streams,
            reason = left(&mut leave) => return Attempt::Lost(reason),
        };
        let (_sender, mut receiver) = match streams {
            Ok(streams) => streams,
            Err(error) => return lost(&error),
        };
        loop {
            let frame = tokio::select! {
                frame = timeout(SILENCE_MAX, receiver.recv()) => match frame {
                    Ok(frame) => frame,
                    Err(_) => return lost(&format!("nothing of a job for {SILENCE_MAX:?}")),
                },
                () = self.events.closed() => return Attempt::Ended,
                reason = left(&mut leave) => return Attempt::Lost(reason),
                // The home node sees the stream end and stops.
                () = cancelled(&mut self.cancelled) => return Attempt::Cancelled,
            };
            let event = match frame {
                Ok(Some(frame)) => match frame.decode::<JobEvent>() {
                    Ok(event) => event,
                    Err(error) => {
                        connection.close(&error.to_string());
                        return lost(&error);
                    }
                },
                Ok(None) => return lost(&"it is stopping"),
                Err(error) => return lost(&error),
            };
            if let JobEventBody::NotTaken { reason } = event.body {
                return Attempt::NotTaken(reason);
            }
            let (body, last) = match self.progress.take(self.progress.attempt(), event.body) {
                Take::Drop => continue,
                Take::Violation(reason) => {
                    connection.close(&reason);
                    return lost(&reason);
                }
                Take::Pass(body) => (body, false),
                Take::Last(body) => (body, true),
            };
            // A reader that is gone drops its end; dropping the stream tells the home.
            if self.pass(body, text).await.is_err() || last {
                return Attempt::Ended;
            }
        }
    }

    /// Opens a stream to a home and says what is to be done.
    async fn begin(&self, connection: &Connection) -> Result<(FrameSender, FrameReceiver), String> {
        let (mut sender, receiver) =
            connection.open_stream(StreamKind::Job).await.map_err(|error| error.to_string())?;
        let order = JobOrder {
            job: self.id,
            request: self.request.clone(),
            choosing: self.choosing.clone(),
            serving: self.serving.clone(),
            generated: self.progress.generated().to_vec(),
        };
        sender.send_message(&order).await.map_err(|error| error.to_string())?;
        Ok((sender, receiver))
    }

    /// Gives an event to the reader, with its text. An error if the reader is gone.
    async fn pass(
        &mut self,
        mut body: JobEventBody,
        text: &mut Option<DecodeStream>,
    ) -> Result<(), Gone> {
        let token = match &mut body {
            JobEventBody::Token { id, text, .. } => Some((*id, text)),
            JobEventBody::Scored(token) => Some((token.id, &mut token.text)),
            _ => None,
        };
        if let Some((id, piece)) = token {
            *piece = text.as_mut().map(|text| text.push(id)).filter(|piece| !piece.is_empty());
        }
        self.finish.extend(finish(&body));
        if body.is_last()
            && let Some(text) = text.as_mut().map(DecodeStream::finish).filter(|t| !t.is_empty())
        {
            // What the last tokens left open, and no further token will complete.
            self.tell(JobEventBody::Text(text)).await?;
        }
        self.tell(body).await
    }

    async fn tell(&self, body: JobEventBody) -> Result<(), Gone> {
        let event = JobEvent { job: self.id, trace: self.request.trace, body };
        self.events.send(event).await.map_err(|_| Gone)
    }
}

/// How an answer ended, if this is its end, in the words of OpenAI's API and OpenTelemetry's conventions.
fn finish(body: &JobEventBody) -> Option<&'static str> {
    match body {
        JobEventBody::Done { reason, .. } => Some(match reason {
            EndReason::EndOfText => "stop",
            EndReason::Length | EndReason::Context => "length",
            EndReason::Cancelled => "cancelled",
        }),
        JobEventBody::Failed { .. } => Some("error"),
        _ => None,
    }
}

/// Puts a node behind all others.
fn avoid(refused: &mut Vec<String>, name: String) {
    refused.retain(|other| *other != name);
    refused.push(name);
}

/// The reader of a job is gone.
struct Gone;

async fn left(watch: &mut watch::Receiver<Option<String>>) -> String {
    match watch.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "it left the cluster".into(),
    }
}

async fn cancelled(watch: &mut watch::Receiver<bool>) {
    if watch.wait_for(|cancelled| *cancelled).await.is_err() {
        std::future::pending::<()>().await;
    }
}
