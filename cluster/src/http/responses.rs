//! `/v1/responses`: OpenAI's newer way to ask for an answer, as far as that is text. It becomes a chat,
//! and its answer is told in the newer words, whole or as events.
//!
//! Nothing is stored: each request brings the whole conversation. What would need a store, tools of
//! OpenAI's own, or more than text is refused by name.
//!
//! Invariant: a request has the tokens of the chat that it becomes, for the same seed.

use std::{collections::VecDeque, convert::Infallible, pin::Pin, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{StreamExt, stream};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout};
use tracing::{Instrument, Span};

use super::{
    Api, ask,
    ask::Kind,
    choice::{Finish, Piece},
    error::ApiError,
    generate::{Answering, HEAD_WAIT, KEEP_ALIVE, answering, request_span},
    show::Show,
};

/// A body. What OpenAI has and is not here is unknown, and refused as such.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Body {
    model: Option<String>,
    input: Option<Input>,
    instructions: Option<String>,
    max_output_tokens: Option<u64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    text: Option<Text>,
    stream: Option<bool>,
    metadata: Option<Map<String, Value>>,

    // Our own, as chats have them.
    seed: Option<Value>,
    top_k: Option<Value>,
    min_p: Option<Value>,
    tiers: Option<Value>,
    priority: Option<Value>,
    speculate: Option<Value>,
    deadline_ms: Option<Value>,

    // Taken, and without a say in the answer.
    #[serde(rename = "user")]
    _user: Option<IgnoredAny>,
    #[serde(rename = "store")]
    _store: Option<IgnoredAny>,
    #[serde(rename = "service_tier")]
    _service_tier: Option<IgnoredAny>,
    #[serde(rename = "safety_identifier")]
    _safety_identifier: Option<IgnoredAny>,
    #[serde(rename = "prompt_cache_key")]
    _prompt_cache_key: Option<IgnoredAny>,
    #[serde(rename = "prompt_cache_retention")]
    _prompt_cache_retention: Option<IgnoredAny>,
    #[serde(rename = "parallel_tool_calls")]
    _parallel_tool_calls: Option<IgnoredAny>,
    #[serde(rename = "stream_options")]
    _stream_options: Option<IgnoredAny>,

    // They would change the answer, or what becomes of it.
    background: Option<bool>,
    conversation: Option<IgnoredAny>,
    previous_response_id: Option<IgnoredAny>,
    prompt: Option<IgnoredAny>,
    include: Option<Vec<IgnoredAny>>,
    tools: Option<Vec<IgnoredAny>>,
    tool_choice: Option<Value>,
    max_tool_calls: Option<IgnoredAny>,
    reasoning: Option<Value>,
    top_logprobs: Option<u64>,
    truncation: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "input: a text or a list of messages is expected")]
enum Input {
    Text(String),
    Items(Vec<Value>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Text {
    format: Option<Value>,
    verbosity: Option<IgnoredAny>,
}

/// What an answer repeats of its request.
#[derive(Debug, Clone)]
struct Asked {
    instructions: Option<String>,
    max_output_tokens: Option<u64>,
    temperature: f64,
    top_p: f64,
    format: Value,
    metadata: Map<String, Value>,
}

impl Body {
    fn refuse_what_is_not_here(&self) -> Result<(), ApiError> {
        let whole = "nothing is stored: send the whole conversation as input";
        let verbosity = self.text.as_ref().is_some_and(|text| text.verbosity.is_some());
        let choice = self.tool_choice.as_ref().and_then(Value::as_str);
        let forced = self.tool_choice.is_some() && !matches!(choice, Some("auto" | "none"));
        let reasons = self.reasoning.as_ref().is_some_and(|reasoning| match reasoning {
            Value::Object(fields) => fields.values().any(|value| !value.is_null()),
            _ => true,
        });
        let truncates = self.truncation.as_ref().is_some_and(|how| how != "disabled");
        let refused: [(&'static str, bool, &str); 12] = [
            ("background", self.background == Some(true), "use /v1/batches"),
            ("conversation", self.conversation.is_some(), whole),
            ("previous_response_id", self.previous_response_id.is_some(), whole),
            ("prompt", self.prompt.is_some(), "write it into instructions"),
            ("include", self.include.as_ref().is_some_and(|all| !all.is_empty()), "leave it out"),
            (
                "tools",
                self.tools.as_ref().is_some_and(|tools| !tools.is_empty()),
                "/v1/chat/completions has functions",
            ),
            ("tool_choice", forced, "/v1/chat/completions has functions"),
            ("max_tool_calls", self.max_tool_calls.is_some(), "leave it out"),
            ("reasoning", reasons, "leave it out"),
            ("text.verbosity", verbosity, "leave it out"),
            (
                "top_logprobs",
                self.top_logprobs.is_some_and(|top| top > 0),
                "/v1/chat/completions has log-probabilities",
            ),
            ("truncation", truncates, "only disabled is served: shorten the input"),
        ];
        for (name, given, remedy) in refused {
            if given {
                let message = format!("{name} is not supported: {remedy}");
                return Err(ApiError::unsupported(name, message));
            }
        }
        Ok(())
    }

    /// The chat that it becomes, and what its answer repeats.
    fn check(self) -> Result<(ask::Body, Asked), ApiError> {
        self.refuse_what_is_not_here()?;
        if self.max_output_tokens == Some(0) {
            let message = "max_output_tokens is 0; at least 1 is expected";
            return Err(ApiError::invalid("max_output_tokens", message));
        }
        let mut messages: Vec<Value> = Vec::new();
        let instructions = self.instructions.iter();
        messages.extend(instructions.map(|text| json!({ "role": "system", "content": text })));
        match self.input {
            None => return Err(ApiError::invalid("input", "input is missing")),
            Some(Input::Text(text)) => messages.push(json!({ "role": "user", "content": text })),
            Some(Input::Items(items)) if items.is_empty() => {
                return Err(ApiError::invalid("input", "input is an empty list"));
            }
            Some(Input::Items(items)) => {
                for (number, item) in items.iter().enumerate() {
                    messages.push(message(number, item)?);
                }
            }
        }
        let format = self.text.and_then(|text| text.format);
        let format = format.unwrap_or_else(|| json!({ "type": "text" }));
        let (temperature, top_p) = (self.temperature.unwrap_or(1.0), self.top_p.unwrap_or(1.0));
        let fields = json!({
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "response_format": response_format(&format)?,
            "stream": self.stream,
            "seed": self.seed,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "tiers": self.tiers,
            "priority": self.priority,
            "speculate": self.speculate,
            "deadline_ms": self.deadline_ms,
        });
        let asked = Asked {
            instructions: self.instructions,
            max_output_tokens: self.max_output_tokens,
            temperature,
            top_p,
            format,
            metadata: self.metadata.unwrap_or_default(),
        };
        Ok((ask::Body::of_fields(fields)?, asked))
    }
}

/// An item of the input as a message of a chat.
fn message(number: usize, item: &Value) -> Result<Value, ApiError> {
    let wrong = |what: String| {
        let message = format!("input[{number}]: {what}");
        Err(ApiError::invalid("input", message))
    };
    let shown = |value: &Value| value.to_string().chars().take(40).collect::<String>();
    match item.get("type") {
        None => {}
        Some(kind) if kind == "message" => {}
        Some(kind) => {
            return wrong(format!("type {}; only messages are served", shown(kind)));
        }
    }
    let role = match item.get("role").and_then(Value::as_str) {
        Some(role @ ("user" | "assistant" | "system" | "developer")) => role,
        _ => return wrong("role user, assistant, system or developer is expected".into()),
    };
    let content = match item.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in parts {
                let piece = part.get("text").and_then(Value::as_str);
                match (part.get("type").and_then(Value::as_str), piece) {
                    (Some("input_text" | "output_text" | "text"), Some(piece)) => {
                        text.push_str(piece);
                    }
                    (kind, _) => {
                        let kind: String = kind.unwrap_or("none").chars().take(40).collect();
                        return wrong(format!("a part of type {kind:?}; only text is served"));
                    }
                }
            }
            text
        }
        _ => return wrong("content is missing: a text or a list of parts is expected".into()),
    };
    Ok(json!({ "role": role, "content": content }))
}

/// `text.format` as chats have it.
fn response_format(format: &Value) -> Result<Value, ApiError> {
    let wrong = |message: &str| Err(ApiError::invalid("text.format", message));
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(Value::Null),
        Some("json_object") => Ok(json!({ "type": "json_object" })),
        Some("json_schema") => match format.get("schema") {
            Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                Ok(json!({ "type": "json_schema", "json_schema": { "schema": schema } }))
            }
            _ => wrong("text.format: schema is missing, which is a JSON schema"),
        },
        _ => wrong("text.format: type text, json_object or json_schema is expected"),
    }
}

/// The field that a chat calls otherwise.
fn renamed(error: ApiError) -> ApiError {
    error.renamed(&[
        ("messages", "input"),
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
    ])
}

pub(super) async fn create(
    State(api): State<Arc<Api>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let span = request_span(request.uri().path());
    let (parts, body) = request.into_parts();
    let work = async {
        let body: Body = api.bodies.json(&parts.headers, body).await?;
        let stream = body.stream.unwrap_or(false);
        let (chat, asked) = body.check()?;
        let answering = answering(&api, &parts, Kind::Chat, chat, arrived).await;
        Ok::<_, ApiError>((answering.map_err(renamed)?, asked, stream))
    };
    let (answering, asked, stream) = work.instrument(span.clone()).await?;
    let told = Telling {
        id: format!("resp_{}", uuid::Uuid::new_v4().simple()),
        item: format!("msg_{}", uuid::Uuid::new_v4().simple()),
        asked,
        text: String::new(),
    };
    match stream {
        true => streamed(answering, told, span).await,
        false => whole(answering, told).instrument(span).await,
    }
}

/// An answer that is told.
struct Telling {
    id: String,
    /// The id of its only message.
    item: String,
    asked: Asked,
    /// What was said so far.
    text: String,
}

impl Telling {
    /// The message, as far as it has come; `finish` is how it ended.
    fn message(&self, finish: Option<Finish>) -> Value {
        let status = match finish {
            None => "in_progress",
            Some(Finish::Length) => "incomplete",
            Some(_) => "completed",
        };
        let content = if finish.is_some() { vec![self.part()] } else { Vec::new() };
        json!({
            "id": self.item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        })
    }

    fn part(&self) -> Value {
        json!({ "type": "output_text", "text": self.text, "annotations": [], "logprobs": [] })
    }

    /// The response: before it has ended without usage.
    fn response(&self, show: &Show, ended: Option<(Finish, Value)>) -> Value {
        let (status, finish, usage) = match ended {
            None => ("in_progress", None, Value::Null),
            Some((Finish::Length, usage)) => ("incomplete", Some(Finish::Length), usage),
            Some((finish, usage)) => ("completed", Some(finish), usage),
        };
        let output: Vec<Value> =
            finish.map(|finish| self.message(Some(finish))).into_iter().collect();
        let incomplete =
            (finish == Some(Finish::Length)).then(|| json!({ "reason": "max_output_tokens" }));
        let Asked { instructions, max_output_tokens, temperature, top_p, format, metadata } =
            &self.asked;
        json!({
            "id": self.id,
            "object": "response",
            "created_at": show.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": incomplete,
            "instructions": instructions,
            "max_output_tokens": max_output_tokens,
            "model": show.model,
            "output": output,
            "parallel_tool_calls": true,
            "previous_response_id": null,
            "reasoning": { "effort": null, "summary": null },
            "store": false,
            "temperature": temperature,
            "text": { "format": format },
            "tool_choice": "auto",
            "tools": [],
            "top_p": top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": metadata,
            "system_fingerprint": show.fingerprint,
            "seed": show.seed,
        })
    }
}

/// What a request used, in tokens. Which of them were found in a cache is not counted for each request.
fn usage(input: u64, output: u64) -> Value {
    json!({
        "input_tokens": input,
        "input_tokens_details": { "cached_tokens": 0 },
        "output_tokens": output,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": input + output,
    })
}

async fn whole(mut answering: Answering, mut told: Telling) -> Result<Response, ApiError> {
    let mut end = Finish::Stop;
    while let Some((index, piece)) = answering.pieces.next().await {
        match piece.map_err(renamed)? {
            Piece::Text { text, tokens, .. } => {
                answering.place.tokens(index, tokens);
                told.text.push_str(&text);
            }
            Piece::End(finish) => {
                answering.place.ended(index, finish);
                end = finish;
            }
        }
    }
    let usage = usage(answering.prompt, answering.place.generated());
    Ok(Json(told.response(&answering.show, Some((end, usage)))).into_response())
}

async fn streamed(
    mut answering: Answering,
    told: Telling,
    span: Span,
) -> Result<Response, ApiError> {
    let first = Pin::new(&mut answering.pieces);
    if let Ok(Some((_, Err(error)))) = timeout(HEAD_WAIT, first.peek()).await {
        return Err(renamed(error.clone()));
    }
    let mut streaming =
        Streaming { answering, told, ready: VecDeque::new(), number: 0, ended: false };
    streaming.open();
    let events = stream::unfold((streaming, span), |(mut streaming, span)| async move {
        let (name, data) = streaming.next().instrument(span.clone()).await?;
        let event = Event::default().event(name).data(data.to_string());
        Some((Ok::<_, Infallible>(event), (streaming, span)))
    });
    let alive = KeepAlive::new().interval(KEEP_ALIVE);
    // Proxies that gather an answer would hide that it comes in pieces.
    let head = [("x-accel-buffering", "no")];
    Ok((head, Sse::new(events).keep_alive(alive)).into_response())
}

/// An answer as it comes: its events, numbered one after the other.
struct Streaming {
    answering: Answering,
    told: Telling,
    /// What is to be sent next.
    ready: VecDeque<(&'static str, Value)>,
    /// Of the next event.
    number: u64,
    ended: bool,
}

impl Streaming {
    fn push(&mut self, name: &'static str, mut fields: Value) {
        fields["type"] = json!(name);
        fields["sequence_number"] = json!(self.number);
        self.number += 1;
        self.ready.push_back((name, fields));
    }

    /// The same, of the only part of the only message.
    fn push_part(&mut self, name: &'static str, mut fields: Value) {
        fields["item_id"] = json!(self.told.item);
        fields["output_index"] = json!(0);
        fields["content_index"] = json!(0);
        self.push(name, fields);
    }

    fn open(&mut self) {
        let response = self.told.response(&self.answering.show, None);
        self.push("response.created", json!({ "response": response }));
        self.push("response.in_progress", json!({ "response": response }));
        let item = json!({ "output_index": 0, "item": self.told.message(None) });
        self.push("response.output_item.added", item);
        let part = json!({ "part": self.told.part() });
        self.push_part("response.content_part.added", part);
    }

    fn close(&mut self, finish: Finish) {
        let text = json!({ "text": self.told.text, "logprobs": [] });
        self.push_part("response.output_text.done", text);
        let part = json!({ "part": self.told.part() });
        self.push_part("response.content_part.done", part);
        let item = json!({ "output_index": 0, "item": self.told.message(Some(finish)) });
        self.push("response.output_item.done", item);
        let usage = usage(self.answering.prompt, self.answering.place.generated());
        let response = self.told.response(&self.answering.show, Some((finish, usage)));
        let name = match finish {
            Finish::Length => "response.incomplete",
            Finish::Stop | Finish::ToolCalls => "response.completed",
        };
        self.push(name, json!({ "response": response }));
    }

    fn fail(&mut self, error: &ApiError) {
        let mut response = self.told.response(&self.answering.show, None);
        response["status"] = json!("failed");
        response["error"] = json!({ "code": "server_error", "message": error.message });
        self.push("response.failed", json!({ "response": response }));
    }

    async fn next(&mut self) -> Option<(&'static str, Value)> {
        while self.ready.is_empty() && !self.ended {
            match self.answering.pieces.next().await {
                Some((index, Ok(Piece::Text { text, tokens, .. }))) => {
                    self.answering.place.tokens(index, tokens);
                    if !text.is_empty() {
                        self.told.text.push_str(&text);
                        let delta = json!({ "delta": text, "logprobs": [] });
                        self.push_part("response.output_text.delta", delta);
                    }
                }
                Some((index, Ok(Piece::End(finish)))) => {
                    self.answering.place.ended(index, finish);
                    self.close(finish);
                    self.ended = true;
                }
                Some((_, Err(error))) => {
                    self.fail(&error);
                    self.ended = true;
                }
                None => self.ended = true,
            }
        }
        self.ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::body::parse, *};

    fn check(body: Value) -> Result<(ask::Asked, Asked), ApiError> {
        let (chat, asked) = parse::<Body>(&serde_json::to_vec(&body).unwrap())?.check()?;
        Ok((chat.check(Kind::Chat, 7).map_err(renamed)?, asked))
    }

    #[test]
    fn a_response_becomes_a_chat() {
        let (chat, asked) = check(json!({
            "instructions": "be brief",
            "input": [
                { "role": "user", "content": "a" },
                { "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                  "content": [{ "type": "output_text", "text": "b", "annotations": [] }] },
                { "role": "user", "content": [
                    { "type": "input_text", "text": "c" }, { "type": "input_text", "text": "d" } ] },
            ],
            "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "tiers": "..tier_1b",
            "metadata": { "a": "b" }, "store": true, "tools": [], "tool_choice": "auto",
            "reasoning": { "effort": null }, "truncation": "disabled",
        }))
        .unwrap();
        let lite_llm_transport::messages::Prompt::Chat(text) = &chat.prompts[0] else { panic!() };
        let found: Value = serde_json::from_str(text).unwrap();
        let expected = json!([
            { "role": "system", "content": "be brief" }, { "role": "user", "content": "a" },
            { "role": "assistant", "content": "b" }, { "role": "user", "content": "cd" },
        ]);
        assert_eq!(found["messages"], expected);
        let request = &chat.request;
        assert_eq!((request.max_new_tokens, request.temperature, request.seed), (9, 0.5, 3));
        assert_eq!((request.top_p, &request.tiers[..]), (0.9, "..tier_1b"));
        assert_eq!((asked.temperature, asked.metadata["a"].as_str()), (0.5, Some("b")));
        let format = json!({ "type": "json_schema", "name": "n", "strict": true,
                             "schema": { "type": "object" } });
        let (chat, _) = check(json!({ "input": "a", "text": { "format": format } })).unwrap();
        assert!(chat.choosing.grammar.is_some() && chat.open_ended);
    }

    #[test]
    fn what_is_not_here_is_refused_by_name() {
        for (field, value, words) in [
            ("previous_response_id", json!("resp_1"), "nothing is stored"),
            ("conversation", json!("conv_1"), "nothing is stored"),
            ("background", json!(true), "/v1/batches"),
            ("tools", json!([{ "type": "web_search" }]), "tools is not supported"),
            ("tool_choice", json!("required"), "tool_choice is not supported"),
            ("include", json!(["reasoning.encrypted_content"]), "include is not supported"),
            ("reasoning", json!({ "effort": "low" }), "reasoning is not supported"),
            ("prompt", json!({ "id": "p" }), "instructions"),
            ("top_logprobs", json!(3), "log-probabilities"),
            ("truncation", json!("auto"), "shorten the input"),
            ("text", json!({ "verbosity": "low" }), "text.verbosity"),
            ("text", json!({ "format": { "type": "grammar" } }), "json_schema is expected"),
            ("text", json!({ "format": { "type": "json_schema" } }), "schema is missing"),
            ("max_output_tokens", json!(0), "at least 1"),
            ("temperature", json!("hot"), "expected f64"),
            ("tiers", json!("a,,b"), "tiers"),
            ("n", json!(2), "unknown field `n`"),
            ("input", json!([]), "an empty list"),
            ("input", json!(3), "a text or a list of messages"),
            ("input", json!([{ "type": "item_reference", "id": "a" }]), "only messages are served"),
            ("input", json!([{ "role": "tool", "content": "a" }]), "role user, assistant"),
            ("input", json!([{ "role": "user" }]), "content is missing"),
            (
                "input",
                json!([{ "role": "user", "content": [{ "type": "input_image" }] }]),
                "only text is served",
            ),
        ] {
            let mut body = json!({ "input": "a" });
            body[field] = value;
            let error = check(body).unwrap_err();
            assert!(error.message.contains(words), "{words:?}: {error:?}");
            assert!(error.status.is_client_error());
        }
        assert!(check(json!({})).unwrap_err().message.contains("input is missing"));
    }

    #[test]
    fn what_is_taken_is_what_the_description_says() {
        const NOT_DESCRIBED: [&str; 19] = [
            "background",
            "conversation",
            "include",
            "max_tool_calls",
            "parallel_tool_calls",
            "previous_response_id",
            "prompt",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning",
            "safety_identifier",
            "service_tier",
            "store",
            "stream_options",
            "tool_choice",
            "tools",
            "top_logprobs",
            "truncation",
            "user",
        ];
        let error = serde_json::from_str::<Body>("{\"?\":1}").unwrap_err().to_string();
        let taken = error.split('`').skip(1).step_by(2).skip(1).map(str::to_owned);
        let mut taken: Vec<String> = taken.collect();
        taken.sort();
        let described: Value = serde_json::from_str(super::super::OPENAPI).unwrap();
        let fields = &described["components"]["schemas"]["Respond"]["properties"];
        let fields = fields.as_object().unwrap().keys().cloned();
        let mut described: Vec<String> = fields.chain(NOT_DESCRIBED.map(str::to_owned)).collect();
        described.sort();
        assert_eq!(taken, described);
    }
}
