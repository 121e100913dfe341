//! The page's playground: an answer token by token, each with the experts that it was computed with.
//!
//! A way of our own beside OpenAI's, for people: events of a stream, each a JSON object. It is let in,
//! counted and bounded as any other request is.

use std::{convert::Infallible, sync::Arc};

use axum::{
    extract::{Request, State},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::stream;
use lite_llm_actors::{
    node::jobs,
    trace::{self, Operation},
};
use lite_llm_transport::messages::{
    Choosing, EndReason, JobEvent, JobEventBody, JobRequest, LogitsWanted, Prompt, ScoredToken,
    Serving,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::Instant};
use tracing::{Instrument, Span, debug};

use super::{
    Api, Caller,
    admission::Load,
    ask::load_of,
    choice::Finish,
    error::ApiError,
    generate::{KEEP_ALIVE, request_span},
    place::Place,
};
use crate::telemetry;

/// Most tokens of an answer: each is shown with all of its experts.
const TOKENS_MAX: u32 = 1024;
/// Candidates of a token that are shown.
const CANDIDATES: u32 = 3;

/// What the page asks.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    prompt: String,
    /// Wrap it in the model's chat template.
    #[serde(default)]
    chat: bool,
    max_tokens: u32,
    temperature: f32,
    seed: u64,
    tiers: String,
}

pub(super) async fn play(
    State(api): State<Arc<Api>>,
    request: Request,
) -> Result<Response, ApiError> {
    let span = request_span(request.uri().path());
    let playing = begin(&api, request).instrument(span).await?;
    let events = stream::unfold(playing, |mut playing| async move {
        let data = playing.next().await?.to_string();
        Some((Ok::<_, Infallible>(Event::default().data(data)), playing))
    });
    let head = [("x-accel-buffering", "no")];
    let alive = KeepAlive::new().interval(KEEP_ALIVE);
    Ok((head, Sse::new(events).keep_alive(alive)).into_response())
}

async fn begin(api: &Arc<Api>, request: Request) -> Result<Playing, ApiError> {
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    let asked: Asked = api.bodies.json(&parts.headers, body).await?;
    if !(1..=TOKENS_MAX).contains(&asked.max_tokens) {
        let message = format!("1 to {TOKENS_MAX} tokens are shown here");
        return Err(ApiError::invalid("max_tokens", message));
    }
    let caller = parts.extensions.get::<Caller>().cloned().unwrap_or_default();
    let prompt = match asked.chat {
        true => {
            let turn = json!({ "messages": [{ "role": "user", "content": asked.prompt }] });
            Prompt::Chat(turn.to_string())
        }
        false => Prompt::Text(asked.prompt),
    };
    // By its bytes, before anything is computed for it.
    let context = api.config.context as u64;
    let load = load_of(&prompt, asked.max_tokens, api.config.context);
    let mut place = api.enter(&caller, arrived.into_std(), load)?;
    let ids = api.coordinator.encode(prompt).await;
    let ids = ids.map_err(|error| ApiError::prompt("prompt", &error))?;
    let count = ids.len() as u64;
    if count >= context {
        let message =
            format!("the prompt has {count} tokens; this model sees {context}: shorten it");
        return Err(ApiError::invalid("prompt", message));
    }
    let request = JobRequest {
        prompt: Prompt::Tokens(ids),
        max_new_tokens: asked.max_tokens,
        temperature: asked.temperature,
        top_k: 0,
        top_p: 1.0,
        seed: asked.seed,
        tiers: asked.tiers,
        stop_at_eos: true,
        want_logits: LogitsWanted::None,
        want_routes: true,
        prefill_chunk: 0,
        trace: telemetry::context_of(&Span::current()),
    };
    let choosing = Choosing { logprobs: Some(CANDIDATES), ..Choosing::default() };
    jobs::check_order(&request, &choosing, &[], &api.config).map_err(ApiError::bad)?;
    let answer = u64::from(asked.max_tokens).min(context - count);
    place.settle(Load { jobs: 1, prompt: count, answer })?;
    let operation = if asked.chat { Operation::Chat } else { Operation::TextCompletion };
    trace::describe(&Span::current(), operation, &api.name, &request);
    place.describe(count);
    debug!(prompt = count, most = asked.max_tokens, "let in from the page");
    let serving = Serving { tenant: caller.tenant(), ..Serving::default() };
    let submitted = api.coordinator.submit_described(request, choosing, serving).await;
    let (_, events) = submitted.map_err(|error| ApiError::unavailable(error.to_string()))?;
    Ok(Playing { api: api.clone(), events, place, last: arrived, routes: Value::Null, over: false })
}

/// An answer on its way. Dropping it ends its job.
struct Playing {
    api: Arc<Api>,
    events: mpsc::Receiver<JobEvent>,
    place: Place,
    /// When the last token came.
    last: Instant,
    /// Experts of the row whose token comes next: layer by layer, by their numbers in the layer.
    routes: Value,
    over: bool,
}

impl Playing {
    async fn next(&mut self) -> Option<Value> {
        while !self.over {
            let Some(event) = self.events.recv().await else {
                self.over = true;
                let error = ApiError::unavailable("the server is stopping; ask again later");
                return Some(error.json());
            };
            if let Some(said) = self.said(event.body) {
                return Some(said);
            }
        }
        None
    }

    fn said(&mut self, body: JobEventBody) -> Option<Value> {
        match body {
            JobEventBody::Routes { layers, rows, k, ids, .. } => {
                self.routes = last_row(layers, rows, k, &ids);
                None
            }
            JobEventBody::Token { id, text, .. } => {
                Some(self.token(id, text.unwrap_or_default(), Value::Null, Value::Null))
            }
            JobEventBody::Scored(token) => {
                let ScoredToken { id, text, logprob, top, .. } = *token;
                let named = top.iter().map(|other| {
                    json!({ "text": self.text_of(other.id), "probability": other.logprob.exp() })
                });
                let named = json!(named.collect::<Vec<_>>());
                let probability = json!(logprob.exp());
                Some(self.token(id, text.unwrap_or_default(), probability, named))
            }
            JobEventBody::Text(text) => Some(json!({ "text": text })),
            JobEventBody::Progress { prefilled, total } => {
                Some(json!({ "read": prefilled, "of": total }))
            }
            JobEventBody::Done { reason, generated } => {
                self.over = true;
                let Some(finish) = Finish::of(reason) else {
                    return Some(ApiError::cancelled().json());
                };
                let word = match reason {
                    EndReason::EndOfText => "the model ended it",
                    EndReason::Context => "the context is full",
                    _ => "it has as many tokens as were asked for",
                };
                self.place.ended(0, finish);
                Some(json!({ "end": word, "tokens": generated }))
            }
            JobEventBody::Failed { reason } => {
                self.over = true;
                Some(ApiError::failed(reason).json())
            }
            JobEventBody::Logits { .. } | JobEventBody::NotTaken { .. } => None,
        }
    }

    fn token(&mut self, id: u32, text: String, probability: Value, others: Value) -> Value {
        self.place.tokens(0, 1);
        let now = Instant::now();
        let seconds = (now - std::mem::replace(&mut self.last, now)).as_secs_f64();
        json!({
            "token": id,
            // By itself: the text of an answer may come later, with the token that completes it.
            "piece": self.text_of(id),
            "text": text,
            "milliseconds": 1e3 * seconds,
            "probability": probability,
            "candidates": others,
            "experts": self.routes.take(),
        })
    }

    fn text_of(&self, id: u32) -> String {
        let prompts = self.api.coordinator.prompts();
        prompts.map_or_else(
            || format!("token {id}"),
            |prompts| prompts.tokenizer().decode_with_special(&[id]),
        )
    }
}

/// The experts of the last of some rows, layer by layer. Rows are `[layers, rows, k]`, −1 where there is
/// none; nothing if the numbers do not fit.
fn last_row(layers: u32, rows: u32, k: u32, ids: &[i32]) -> Value {
    let (layers, rows, k) = (layers as usize, rows as usize, k as usize);
    if rows == 0 || layers.checked_mul(rows).and_then(|n| n.checked_mul(k)) != Some(ids.len()) {
        return Value::Null;
    }
    let layer = |layer: usize| {
        let from = (layer * rows + rows - 1) * k;
        ids[from..from + k].iter().copied().filter(|id| *id >= 0).collect::<Vec<_>>()
    };
    json!((0..layers).map(layer).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_the_experts_of_the_row_before_it() {
        let ids = [1, 2, 3, -1, 5, 6, 7, 8];
        assert_eq!(last_row(2, 2, 2, &ids), json!([[3], [7, 8]]));
        assert_eq!(last_row(2, 0, 2, &[]), Value::Null);
        assert_eq!(last_row(2, 2, 3, &ids), Value::Null);
        assert_eq!(last_row(u32::MAX, u32::MAX, 2, &ids), Value::Null);
    }
}
