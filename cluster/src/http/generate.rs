//! `/v1/chat/completions` and `/v1/completions`: from a body to jobs, and from their events to an
//! answer, whole or as it comes.
//!
//! Invariants: a request is let in by its bytes before it is tokenised; whoever leaves takes its
//! jobs along; what waits for a reader is a few events of each job.

use std::{collections::VecDeque, convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body as HttpBody,
    extract::{Request, State},
    http::request::Parts,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{
    Stream, StreamExt,
    stream::{self, Peekable},
};
use lite_llm_actors::{
    node::{grammars::FormError, jobs},
    trace::{self, Operation},
};
use lite_llm_runtime::{prompt::Prompts, stop::StopTexts};
use lite_llm_transport::messages::{JobRequest, Prompt};
use tokio::time::{Instant, timeout};
use tracing::{Instrument, Span, debug_span};

use super::{
    Api, Caller,
    admission::Load,
    ask::{Asked, Body, Kind},
    calls::{Calls, Said, ToolUse},
    choice::{Choice, Deadline, Finish, Piece},
    error::ApiError,
    place::Place,
    show::{Show, Whole, call, usage},
};
use crate::{commands::unix_time, telemetry};

/// How long the head of a stream waits for the first event, so that what fails at once has a status of
/// its own. A client must see the head before its patience ends.
pub(super) const HEAD_WAIT: Duration = Duration::from_secs(5);
/// Log-probabilities of an answer, at most: each takes the better part of a kilobyte while an answer is
/// put together.
const LOGPROBS_MAX: u64 = 200_000;
/// How often a stream that has nothing to say shows that it is alive.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) type Pieces = Pin<Box<dyn Stream<Item = (u32, Result<Piece, ApiError>)> + Send>>;

pub(super) async fn chat(api: State<Arc<Api>>, request: Request) -> Result<Response, ApiError> {
    generate(api.0, Kind::Chat, request).await
}

pub(super) async fn completions(
    api: State<Arc<Api>>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(api.0, Kind::Text, request).await
}

async fn generate(api: Arc<Api>, kind: Kind, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let span = request_span(request.uri().path());
    let (parts, body): (_, HttpBody) = request.into_parts();
    let work = async {
        let body: Body = api.bodies.json(&parts.headers, body).await?;
        answering(&api, &parts, kind, body, arrived).await
    };
    let answering = work.instrument(span.clone()).await?;
    answering.respond(span).await
}

/// The span of a request, which all work for it belongs to.
pub(super) fn request_span(path: &str) -> Span {
    debug_span!("http", path)
}

/// The answer to a body, whose jobs have begun when this returns.
pub(super) async fn answering(
    api: &Arc<Api>,
    parts: &Parts,
    kind: Kind,
    body: Body,
    arrived: Instant,
) -> Result<Answering, ApiError> {
    if let Some(asked) = body.model.as_ref().filter(|asked| **asked != api.name) {
        return Err(ApiError::no_model(asked, &api.name));
    }
    let asked = body.check(kind, unix_time())?;
    let deadline = asked.deadline.map(|limit| Deadline { limit, at: arrived + limit });
    let caller = parts.extensions.get::<Caller>().cloned().unwrap_or_default();
    let answering = begin(api, &caller, arrived.into_std(), asked, deadline);
    match deadline {
        None => answering.await,
        Some(Deadline { limit, at }) => tokio::time::timeout_at(at, answering)
            .await
            .unwrap_or_else(|_| Err(ApiError::deadline(limit, 0))),
    }
}

/// Jobs of a request whose prompts are token ids, which the model can serve.
pub(super) struct Tokenised {
    /// One for each prompt, each to be answered `n` times.
    pub(super) jobs: Vec<JobRequest>,
    /// What they take.
    pub(super) load: Load,
    /// Tokens of the prompts.
    pub(super) tokens: u64,
}

impl Api {
    /// Whether whoever asks may ask for this.
    pub(super) fn check_rights(&self, caller: &Caller, asked: &Asked) -> Result<(), ApiError> {
        let most = caller.key.as_ref().map_or(0, |(_, limits)| limits.priority);
        let found = asked.serving.priority;
        if found > most {
            let whose = match &caller.key {
                Some((name, _)) => format!("key {name} may ask for {most} at most"),
                None => format!("{most} is the highest without a key that allows more"),
            };
            let remedy = "`lite-llm key add NAME --priority N` makes one that may";
            return Err(ApiError::priority(format!("priority is {found}; {whose}: {remedy}")));
        }
        let named = self.coordinator.prompts().is_some_and(Prompts::names_tools);
        if asked.tool_use == ToolUse::Auto && !named {
            let message = "the model's chat template does not tell it of tools: leave them out";
            return Err(ApiError::unsupported("tools", message));
        }
        Ok(())
    }

    /// Tokenises the prompts of a request that was let in by their bytes, and checks its jobs.
    pub(super) async fn tokenise(&self, asked: &mut Asked) -> Result<Tokenised, ApiError> {
        let field = if asked.kind == Kind::Chat { "messages" } else { "prompt" };
        if let Some(grammar) = &asked.choosing.grammar {
            let read = self.coordinator.check_grammar(grammar).await;
            read.map_err(|error| match error {
                FormError::Busy(reason) => ApiError::busy(reason, Duration::from_secs(1)),
                FormError::Form(reason) => ApiError::form(reason),
            })?;
        }
        let (n, positions) = (asked.n, self.coordinator.positions_max());
        let bytes = asked.prompts.iter().map(Prompt::text_bytes).sum();
        let room = self.coordinator.room_for(bytes);
        let room = room.map_err(|error| ApiError::prompt(field, &error))?;
        let mut all =
            Tokenised { jobs: Vec::new(), load: Load { jobs: 0, prompt: 0, answer: 0 }, tokens: 0 };
        for prompt in std::mem::take(&mut asked.prompts) {
            let ids = self.coordinator.encode_in(&room, prompt).await;
            let ids = ids.map_err(|error| ApiError::prompt(field, &error))?;
            let count = ids.len() as u64;
            if ids.len() >= self.config.context {
                let message = format!(
                    "the prompt has {count} tokens; this model sees {}, of which one at least must \
                     be left for the answer: shorten the prompt",
                    self.config.context
                );
                return Err(ApiError::invalid(field, message).coded("context_length_exceeded"));
            }
            let mut request = JobRequest { prompt: Prompt::Tokens(ids), ..asked.request.clone() };
            if asked.open_ended {
                // As many as fit where it can run; of one that fits nowhere whoever runs it says so.
                let room = (positions as u64).saturating_sub(count).max(1) as u32;
                request.max_new_tokens = request.max_new_tokens.min(room);
            }
            jobs::check_order(&request, &asked.choosing, &[], &self.config)
                .map_err(ApiError::bad)?;
            // As whoever runs it would say, but so that nobody asks again.
            let most = (count + u64::from(request.max_new_tokens)).min(self.config.context as u64);
            if most > positions as u64 {
                let message = format!(
                    "prompt and answer may come to {most} tokens, and the largest cache of a worker \
                     holds {positions}: ask for fewer tokens, or give a worker a larger --kv"
                );
                let error = ApiError::invalid("max_tokens", message);
                return Err(error.coded("context_length_exceeded"));
            }
            let room = (self.config.context as u64).saturating_sub(count);
            all.load.jobs += n as usize;
            all.load.prompt += count * u64::from(n);
            all.load.answer += u64::from(request.max_new_tokens).min(room) * u64::from(n);
            let candidates = asked.choosing.logprobs.map_or(0, |top| u64::from(top) + 1);
            if all.load.answer.saturating_mul(candidates) > LOGPROBS_MAX {
                let message = format!(
                    "log-probabilities of {} tokens with {candidates} candidates each are asked for; {LOGPROBS_MAX} \
                     in all are given: set max_tokens, or ask for fewer",
                    all.load.answer
                );
                return Err(ApiError::invalid("logprobs", message));
            }
            all.tokens += count;
            all.jobs.push(request);
        }
        Ok(all)
    }
}

/// Lets in, tokenises, checks and submits.
async fn begin(
    api: &Arc<Api>,
    caller: &Caller,
    arrived: std::time::Instant,
    mut asked: Asked,
    deadline: Option<Deadline>,
) -> Result<Answering, ApiError> {
    api.check_rights(caller, &asked)?;
    asked.serving.tenant = caller.tenant();
    let operation = match asked.kind {
        Kind::Chat => Operation::Chat,
        Kind::Text => Operation::TextCompletion,
    };
    trace::describe(&Span::current(), operation, &api.name, &asked.request);
    asked.request.trace = telemetry::context_of(&Span::current());
    let mut place = api.enter(caller, arrived, asked.load(api.config.context))?;
    let Tokenised { jobs, load, tokens } = api.tokenise(&mut asked).await?;
    place.settle(load)?;
    place.describe(tokens);
    let Asked {
        kind, n, request, choosing, serving, stop, stream, include_usage, tool_use, ..
    } = asked;
    let mut choices: Vec<Pieces> = Vec::new();
    for request in jobs {
        for copy in 0..n {
            let seed = request.seed.wrapping_add(u64::from(copy));
            let request = JobRequest { seed, ..request.clone() };
            let submitted =
                api.coordinator.submit_described(request, choosing.clone(), serving.clone()).await;
            let (_, events) = submitted.map_err(|e| ApiError::unavailable(e.to_string()))?;
            let choice = Choice::new(events, StopTexts::new(stop.iter().cloned()), deadline);
            let index = choices.len() as u32;
            choices.push(Box::pin(choice.pieces(index)));
        }
    }
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let show = Show {
        kind,
        id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
        created: unix_time(),
        model: api.name.clone(),
        fingerprint: api.fingerprint.clone(),
        seed: request.seed,
        tokenizer: api.coordinator.prompts().map(|prompts| prompts.tokenizer().clone()),
        include_usage,
    };
    let open = choices.len();
    let pieces = stream::select_all(choices).peekable();
    let calls = (0..open).map(|_| (Calls::new(tool_use.clone()), 0)).collect();
    Ok(Answering { show, pieces, calls, open, place, prompt: tokens, stream })
}

/// An answer whose jobs run.
pub(super) struct Answering {
    pub(super) show: Show,
    pub(super) pieces: Peekable<stream::SelectAll<Pieces>>,
    /// What each choice calls, and how often it did.
    calls: Vec<(Calls, usize)>,
    /// Choices that have not ended.
    open: usize,
    pub(super) place: Place,
    /// Tokens of the prompts.
    pub(super) prompt: u64,
    stream: bool,
}

impl Answering {
    async fn respond(mut self, span: Span) -> Result<Response, ApiError> {
        if !self.stream {
            return self.whole().instrument(span).await;
        }
        let first = Pin::new(&mut self.pieces);
        if let Ok(Some((_, Err(error)))) = timeout(HEAD_WAIT, first.peek()).await {
            return Err(error.clone());
        }
        let ready = (0..self.open as u32).filter_map(|index| self.show.opening(index)).collect();
        let streaming = Streaming { answering: self, ready, ended: false, span };
        let events = stream::unfold(streaming, |mut streaming| async move {
            let data = streaming.next().await?;
            Some((Ok::<_, Infallible>(Event::default().data(data)), streaming))
        });
        let alive = KeepAlive::new().interval(KEEP_ALIVE);
        // Proxies that gather an answer would hide that it comes in pieces.
        let head = [("x-accel-buffering", "no")];
        Ok((head, Sse::new(events).keep_alive(alive)).into_response())
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        let mut choices: Vec<Whole> = (0..self.open).map(|_| Whole::default()).collect();
        while let Some((index, piece)) = self.pieces.next().await {
            let (choice, (calls, _)) =
                (&mut choices[index as usize], &mut self.calls[index as usize]);
            let settled = match piece? {
                Piece::Text { text, tokens, scored } => {
                    self.place.tokens(index, tokens);
                    choice.scored.extend(scored);
                    calls.push(&text)
                }
                Piece::End(finish) => {
                    let rest = calls.finish();
                    let finish = with_calls(finish, calls);
                    self.place.ended(index, finish);
                    choice.finish = Some(finish);
                    rest
                }
            };
            for said in settled {
                match said {
                    Said::Text(text) => choice.text.push_str(&text),
                    Said::Call(called) => choice.calls.push(call(called)),
                }
            }
        }
        let usage = usage(self.prompt, self.place.generated());
        Ok(Json(self.show.whole(&choices, usage)).into_response())
    }
}

/// An answer as it comes: the data of its events, one after the other.
struct Streaming {
    answering: Answering,
    /// What is to be sent next.
    ready: VecDeque<String>,
    ended: bool,
    span: Span,
}

impl Streaming {
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            let Answering { show, pieces, calls, open, place, prompt, .. } = &mut self.answering;
            match pieces.next().instrument(self.span.clone()).await {
                Some((index, Ok(piece))) => {
                    let (calls, called) = &mut calls[index as usize];
                    let (settled, mut scored, finish) = match piece {
                        Piece::Text { text, tokens, scored } => {
                            place.tokens(index, tokens);
                            (calls.push(&text), scored, None)
                        }
                        Piece::End(finish) => (calls.finish(), None, Some(finish)),
                    };
                    for said in settled {
                        self.ready.push_back(match said {
                            Said::Text(text) => show.more(index, &text, scored.take().as_ref()),
                            Said::Call(one) => {
                                *called += 1;
                                show.call(index, call(one), *called - 1)
                            }
                        });
                    }
                    // A token without text is told, too, if its probability is asked for.
                    if let Some(scored) = scored {
                        self.ready.push_back(show.more(index, "", Some(&scored)));
                    }
                    if let Some(finish) = finish {
                        let finish = with_calls(finish, calls);
                        place.ended(index, finish);
                        self.ready.push_back(show.end(index, finish));
                        *open -= 1;
                    }
                }
                Some((_, Err(error))) => {
                    // Without [DONE]: what came is not the whole answer.
                    self.ready.push_back(error.json().to_string());
                    self.ended = true;
                }
                None => self.ended = true,
            }
            if *open == 0 && !self.ended {
                if show.include_usage {
                    self.ready.push_back(show.usage(usage(*prompt, place.generated())));
                }
                self.ready.push_back("[DONE]".into());
                self.ended = true;
            }
        }
        self.ready.pop_front()
    }
}

/// How an answer ended, if something was called in it.
pub(super) fn with_calls(finish: Finish, calls: &Calls) -> Finish {
    match finish {
        Finish::Stop if calls.called() => Finish::ToolCalls,
        finish => finish,
    }
}
