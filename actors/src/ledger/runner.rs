//! A detached job as it runs: an ordinary job of the coordinator, whose answer goes to the ledger.
//!
//! Invariants: its ending is a function of the job alone, wherever its answer was broken off before:
//! text and stop texts are followed from the first token; only an end of the job itself ends it: while
//! there is no worker, or the coordinator cannot take it, it is submitted again, but not for ever where
//! the workers that are there could never serve it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use lite_llm_runtime::{
    stop::StopTexts,
    tokenizer::{DecodeStream, Tokenizer},
};
use lite_llm_transport::messages::{
    DetachedJob, DetachedState, EndReason, JobEnding, JobEventBody, Prompt, Serving,
};
use ractor::ActorRef;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep},
};
use tracing::debug;

use super::keeper::Wish;
use crate::{
    coordinator::{CLIENT_EVENTS_MAX, CoordinatorMessage, NotSubmitted, Submission},
    trace::Operation,
};

/// How long a detached job waits for a worker that takes it. Nobody sits before it.
const PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Pause before it is submitted again, and the longest one.
const AGAIN_PAUSE: Duration = Duration::from_millis(250);
const AGAIN_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a job may fit in no worker's cache: one that is started again may have another.
const FITS_NOWHERE_MAX: Duration = Duration::from_secs(600);
/// Failures in a row, none of which brought a token, that end a job.
const FAILURES_MAX: u32 = 5;
/// How often the ledger hears of tokens.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// What runs detached jobs.
#[derive(Clone)]
pub(crate) struct RunsOn {
    coordinator: ActorRef<CoordinatorMessage>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    fits_nowhere_max: Duration,
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    // A clock before 1970 is none.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The answer so far.
struct Answer {
    ids: Vec<u32>,
    text: String,
    stream: Option<DecodeStream>,
    stop: StopTexts,
}

impl Answer {
    /// One of which these tokens are known. Tokens after a stop text are none of it.
    fn new(job: &DetachedJob, tokenizer: Option<&Tokenizer>, known: &[u32]) -> Self {
        let prompt = match &job.request.prompt {
            Prompt::Tokens(ids) => &ids[..],
            Prompt::Text(_) | Prompt::Chat(_) => &[],
        };
        let stream = tokenizer.map(|tokenizer| tokenizer.stream_after(prompt));
        let stop = StopTexts::new(job.stop.iter().cloned());
        let mut answer = Self { ids: Vec::new(), text: String::new(), stream, stop };
        for &id in known {
            answer.push(id);
        }
        answer
    }

    fn push(&mut self, id: u32) {
        if self.stop.stopped() {
            return;
        }
        self.ids.push(id);
        if let Some(stream) = &mut self.stream {
            let piece = stream.push(id);
            self.text.push_str(&self.stop.push(&piece));
        }
    }

    /// The whole of it, when no further token comes.
    fn end(mut self, state: DetachedState, reason: String) -> JobEnding {
        if let Some(stream) = &mut self.stream {
            let piece = stream.finish();
            self.text.push_str(&self.stop.push(&piece));
        }
        let state = match (self.stop.stopped(), state) {
            (true, _) => DetachedState::Stop,
            (false, state) => {
                let rest = self.stop.finish();
                self.text.push_str(&rest);
                state
            }
        };
        JobEnding { state, at: now(), ids: self.ids, text: self.text, reason }
    }
}

/// How one submission ended.
enum Ended {
    With(DetachedState, String),
    /// It is to be submitted again.
    Broken(String),
    /// The same, unless it is so for long.
    FitsNowhere(String),
    /// The same, unless it fails again and again: what failed it may pass (a lost holder of an expert,
    /// a disk that hung).
    Failed(String),
    /// The coordinator is gone.
    Gone,
}

impl RunsOn {
    pub(crate) fn new(
        coordinator: ActorRef<CoordinatorMessage>,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Self {
        Self { coordinator, tokenizer, fits_nowhere_max: FITS_NOWHERE_MAX }
    }

    /// Runs a job to its end, from the tokens that are known, and tells the ledger.
    pub(super) async fn run(
        self,
        (number, owner): (u64, String),
        job: DetachedJob,
        known: Vec<u32>,
        ledger: mpsc::Sender<Wish>,
    ) {
        let mut answer = Answer::new(&job, self.tokenizer.as_deref(), &known);
        // Tokens that the ledger knows.
        let mut told = answer.ids.len();
        let (mut pause, mut failures, mut fits_nowhere) = (AGAIN_PAUSE, 0, None);
        let (state, reason) = loop {
            if answer.stop.stopped() {
                break (DetachedState::Stop, String::new());
            }
            let had = answer.ids.len();
            let submitted = self.submit((number, &owner), &job, (&mut answer, &mut told), &ledger);
            let reason = match submitted.await {
                Ended::With(state, reason) => break (state, reason),
                Ended::Gone => return,
                Ended::Broken(reason) => reason,
                Ended::FitsNowhere(reason) => {
                    let since = *fits_nowhere.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.fits_nowhere_max {
                        break (DetachedState::Failed, reason);
                    }
                    reason
                }
                Ended::Failed(reason) => {
                    failures = if answer.ids.len() > had { 1 } else { failures + 1 };
                    if failures == FAILURES_MAX {
                        break (DetachedState::Failed, reason);
                    }
                    reason
                }
            };
            debug!(job = number, %reason, "a detached job is submitted again");
            if answer.ids.len() > had {
                (pause, fits_nowhere) = (AGAIN_PAUSE, None);
            }
            sleep(pause).await;
            pause = (pause * 2).min(AGAIN_PAUSE_MAX);
        };
        let ending = answer.end(state, reason);
        // A ledger that is gone will run it again.
        let _ = ledger.send(Wish::Ended { job: number, ending }).await;
    }

    async fn submit(
        &self,
        (number, owner): (u64, &str),
        job: &DetachedJob,
        (answer, told): (&mut Answer, &mut usize),
        ledger: &mpsc::Sender<Wish>,
    ) -> Ended {
        let (events, mut receiver) = mpsc::channel(CLIENT_EVENTS_MAX);
        let generated = answer.ids.clone();
        let patience = Some(PATIENCE);
        let (request, choosing) = (job.request.clone(), job.choosing.clone());
        let serving = Serving { tenant: owner.to_owned(), ..job.serving.clone() };
        let submission = Box::new(Submission {
            request,
            choosing,
            serving,
            generated,
            client: None,
            operation: Some(Operation::TextCompletion),
            patience,
            events,
        });
        let submit = |reply| CoordinatorMessage::Submit(submission, reply);
        match ractor::call!(self.coordinator, submit) {
            Ok(Ok(_)) => {}
            Ok(Err(NotSubmitted::FitsNowhere(reason))) => return Ended::FitsNowhere(reason),
            Ok(Err(NotSubmitted::Refused(reason))) => return Ended::Broken(reason),
            Err(_) => return Ended::Gone,
        }
        let mut last = Instant::now();
        while let Some(event) = receiver.recv().await {
            match event.body {
                JobEventBody::Token { index, id, .. } if index as usize == answer.ids.len() => {
                    answer.push(id);
                    if answer.stop.stopped() {
                        // The job's reader goes, which ends it.
                        return Ended::With(DetachedState::Stop, String::new());
                    }
                    if last.elapsed() >= PROGRESS_INTERVAL {
                        let (from, tokens) = (*told as u32, answer.ids[*told..].to_vec());
                        let progress = Wish::Progress { job: number, from, tokens };
                        // A ledger that is behind hears of them with the next: waiting for a disk
                        // would hold up the lane.
                        match ledger.try_send(progress) {
                            Ok(()) => (*told, last) = (answer.ids.len(), Instant::now()),
                            Err(TrySendError::Full(_)) => {}
                            Err(TrySendError::Closed(_)) => return Ended::Gone,
                        }
                    }
                }
                JobEventBody::Done { reason, .. } => {
                    let state = match reason {
                        EndReason::Length => DetachedState::Length,
                        EndReason::EndOfText => DetachedState::EndOfText,
                        EndReason::Context => DetachedState::Context,
                        EndReason::Cancelled => {
                            return Ended::Broken("it was cancelled by nobody".into());
                        }
                    };
                    return Ended::With(state, String::new());
                }
                JobEventBody::Failed { reason } => return Ended::Failed(reason),
                _ => {}
            }
        }
        Ended::Broken("its events broke off".into())
    }
}

#[cfg(test)]
mod tests {
    use lite_llm_transport::messages::JobRequest;
    use ractor::{Actor, ActorProcessingErr};
    use tokio::time::timeout;

    use super::*;

    /// A coordinator whose workers' caches are too small, but for a while at first.
    struct Small;

    impl Actor for Small {
        type Msg = CoordinatorMessage;
        type State = u32;
        type Arguments = ();

        async fn pre_start(
            &self,
            _: ActorRef<Self::Msg>,
            (): (),
        ) -> Result<u32, ActorProcessingErr> {
            Ok(0)
        }

        async fn handle(
            &self,
            _: ActorRef<Self::Msg>,
            message: Self::Msg,
            asked: &mut u32,
        ) -> Result<(), ActorProcessingErr> {
            if let CoordinatorMessage::Submit(_, reply) = message {
                *asked += 1;
                let refused = match *asked {
                    1 => NotSubmitted::Refused("4096 jobs are running".into()),
                    _ => NotSubmitted::FitsNowhere("give a worker a larger --kv".into()),
                };
                let _ = reply.send(Err(refused));
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_job_that_no_worker_could_ever_serve_ends() {
        let (coordinator, _) = Actor::spawn(None, Small, ()).await.unwrap();
        let fits_nowhere_max = Duration::from_millis(300);
        let runs_on = RunsOn { fits_nowhere_max, ..RunsOn::new(coordinator.clone(), None) };
        let (ledger, mut wishes) = mpsc::channel(8);
        let job = DetachedJob::plain(JobRequest::greedy(Prompt::Tokens(vec![1]), 9));
        let run = runs_on.run((7, "anna".into()), job, Vec::new(), ledger);
        timeout(Duration::from_secs(20), run).await.expect("it is submitted for ever");
        let Some(Wish::Ended { job: 7, ending }) = wishes.recv().await else { panic!("no end") };
        assert_eq!((ending.state, ending.ids.len()), (DetachedState::Failed, 0));
        assert!(ending.reason.contains("--kv"), "{}", ending.reason);
        coordinator.stop(None);
    }
}
