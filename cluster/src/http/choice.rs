//! One answer on its way: the events of a job become pieces of text, until it ends by itself, by a
//! text that ends answers, or by its deadline.
//!
//! Invariants: one last piece; whoever drops a choice cancels its job; nothing of a stop text is
//! handed out.

use std::time::Duration;

use futures::{Stream, stream};
use lite_llm_runtime::stop::StopTexts;
use lite_llm_transport::messages::{EndReason, JobEvent, JobEventBody, ScoredToken, TokenLogprob};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use super::error::ApiError;

/// A token with its log-probability and those of the best candidates.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scored {
    pub(super) token: TokenLogprob,
    pub(super) top: Vec<TokenLogprob>,
}

/// How an answer ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// The model ended it, or a stop text did.
    Stop,
    /// It has as many tokens as it may have, or as the context has room for.
    Length,
    /// The model ended it, and has called tools.
    ToolCalls,
}

impl Finish {
    /// How an answer ended whose job ended so; nothing if it was cancelled.
    pub(super) fn of(reason: EndReason) -> Option<Self> {
        match reason {
            EndReason::EndOfText => Some(Self::Stop),
            EndReason::Length | EndReason::Context => Some(Self::Length),
            EndReason::Cancelled => None,
        }
    }

    /// The word.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What comes next of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    /// More of it.
    Text {
        /// What may be shown.
        text: String,
        /// Tokens that came: one, or none where only text did.
        tokens: u32,
        /// With its log-probability, if that was asked for.
        scored: Option<Scored>,
    },
    /// Nothing follows.
    End(Finish),
}

/// When an answer must have ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    pub(super) limit: Duration,
    pub(super) at: Instant,
}

/// See the module's text.
pub(super) struct Choice {
    events: mpsc::Receiver<JobEvent>,
    stop: StopTexts,
    deadline: Option<Deadline>,
    tokens: u32,
    /// It ends after the piece that was given last.
    ends: Option<Finish>,
    over: bool,
}

impl Choice {
    /// The answer whose events these are.
    pub(super) fn new(
        events: mpsc::Receiver<JobEvent>,
        stop: StopTexts,
        deadline: Option<Deadline>,
    ) -> Self {
        Self { events, stop, deadline, tokens: 0, ends: None, over: false }
    }

    /// Its pieces, each with the number of the choice. An error is the last of them.
    pub(super) fn pieces(
        self,
        index: u32,
    ) -> impl Stream<Item = (u32, Result<Piece, ApiError>)> + Send {
        stream::unfold(self, move |mut choice| async move {
            let piece = choice.next().await?;
            Some(((index, piece), choice))
        })
    }

    async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        if self.over {
            return None;
        }
        if let Some(finish) = self.ends {
            self.over = true;
            return Some(Ok(Piece::End(finish)));
        }
        let piece = self.wait().await;
        self.over = !matches!(piece, Ok(Piece::Text { .. }));
        if self.over {
            // Nobody reads what may still come: the job ends here.
            self.events.close();
        }
        Some(piece)
    }

    async fn wait(&mut self) -> Result<Piece, ApiError> {
        loop {
            let event = match self.deadline {
                None => self.events.recv().await,
                // Events that are there already do not stretch it.
                Some(Deadline { limit, at }) if Instant::now() >= at => {
                    return Err(ApiError::deadline(limit, self.tokens));
                }
                Some(Deadline { limit, at }) => timeout_at(at, self.events.recv())
                    .await
                    .map_err(|_| ApiError::deadline(limit, self.tokens))?,
            };
            let Some(event) = event else {
                return Err(ApiError::unavailable("the server is stopping; ask again later"));
            };
            match event.body {
                JobEventBody::Token { text, .. } => {
                    return Ok(self.token(text.unwrap_or_default(), None));
                }
                JobEventBody::Scored(token) => {
                    let ScoredToken { id, text, logprob, top, .. } = *token;
                    let scored = Scored { token: TokenLogprob { id, logprob }, top };
                    return Ok(self.token(text.unwrap_or_default(), Some(scored)));
                }
                JobEventBody::Text(text) => {
                    let text = self.settle(&text);
                    return Ok(Piece::Text { text, tokens: 0, scored: None });
                }
                JobEventBody::Done { reason, .. } => {
                    let finish = Finish::of(reason).ok_or_else(ApiError::cancelled)?;
                    let rest = self.stop.finish();
                    if rest.is_empty() {
                        return Ok(Piece::End(finish));
                    }
                    self.ends = Some(finish);
                    return Ok(Piece::Text { text: rest, tokens: 0, scored: None });
                }
                JobEventBody::Failed { reason } | JobEventBody::NotTaken { reason } => {
                    return Err(match self.tokens {
                        0 => ApiError::unavailable(reason),
                        _ => ApiError::failed(reason),
                    });
                }
                JobEventBody::Logits { .. }
                | JobEventBody::Routes { .. }
                | JobEventBody::Progress { .. } => {}
            }
        }
    }

    fn token(&mut self, text: String, scored: Option<Scored>) -> Piece {
        self.tokens += 1;
        Piece::Text { text: self.settle(&text), tokens: 1, scored }
    }

    fn settle(&mut self, text: &str) -> String {
        let text = self.stop.push(text);
        if self.stop.stopped() {
            self.ends = Some(Finish::Stop);
            // What would follow is not wanted: the job ends here.
            self.events.close();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    fn choice(stops: &[&str], events: Vec<JobEventBody>) -> (Choice, mpsc::Sender<JobEvent>) {
        let (sender, receiver) = mpsc::channel(64);
        for body in events {
            sender.try_send(JobEvent { job: 1, trace: Default::default(), body }).unwrap();
        }
        let stop = StopTexts::new(stops.iter().map(|&stop| stop.to_owned()));
        (Choice::new(receiver, stop, None), sender)
    }

    fn token(index: u32, text: &str) -> JobEventBody {
        JobEventBody::Token { index, id: 7, text: Some(text.into()) }
    }

    fn text(text: &str, tokens: u32) -> Result<Piece, ApiError> {
        Ok(Piece::Text { text: text.into(), tokens, scored: None })
    }

    async fn all(choice: Choice) -> Vec<Result<Piece, ApiError>> {
        choice
            .pieces(3)
            .map(|(index, piece)| (index == 3).then_some(piece).unwrap())
            .collect()
            .await
    }

    #[tokio::test]
    async fn a_stop_text_ends_the_answer_and_its_job() {
        let events = vec![token(0, "one S"), token(1, "TOP two"), token(2, "three")];
        let (choice, sender) = choice(&["STOP"], events);
        let pieces = all(choice).await;
        assert_eq!(pieces, [text("one ", 1), text("", 1), Ok(Piece::End(Finish::Stop))]);
        assert!(sender.is_closed());
    }

    #[tokio::test]
    async fn what_was_held_back_is_shown_at_the_end() {
        let done = JobEventBody::Done { reason: EndReason::Length, generated: 1 };
        let (choice, _sender) = choice(&["STOP"], vec![token(0, "one ST"), done]);
        let expected = [text("one ", 1), text("ST", 0), Ok(Piece::End(Finish::Length))];
        assert_eq!(all(choice).await, expected);
    }

    #[tokio::test]
    async fn failures_and_deadlines_are_the_last_piece() {
        let failed = JobEventBody::Failed { reason: "no worker".into() };
        let (choice_, _sender) = choice(&[], vec![failed.clone()]);
        let pieces = all(choice_).await;
        assert_eq!((pieces.len(), pieces[0].as_ref().unwrap_err().status.as_u16()), (1, 503));
        let (choice_, _sender) = choice(&[], vec![token(0, "a"), failed]);
        assert_eq!(all(choice_).await[1].as_ref().unwrap_err().status.as_u16(), 500);
        let (mut late, sender) = choice(&[], vec![token(0, "a")]);
        let limit = Duration::from_millis(20);
        late.deadline = Some(Deadline { limit, at: Instant::now() + limit });
        let pieces = all(late).await;
        assert_eq!((pieces.len(), pieces[1].as_ref().unwrap_err().status.as_u16()), (2, 504));
        assert!(sender.is_closed());
    }
}
