//! Answers as OpenAI's clients read them, whole and in chunks.

use lite_llm_runtime::tokenizer::Tokenizer;
use lite_llm_transport::messages::TokenLogprob;
use serde_json::{Map, Value, json};

use super::{
    ask::Kind,
    calls::Call,
    choice::{Finish, Scored},
};

/// Log-probabilities below it are told as it: JSON has no infinity, and OpenAI's clients know this.
const LOGPROB_MIN: f32 = -9999.0;

/// What all parts of one answer say.
pub(super) struct Show {
    pub(super) kind: Kind,
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: i64,
    pub(super) model: String,
    /// Equal where equal seeds give equal bits: names weights, formats and contract.
    pub(super) fingerprint: String,
    pub(super) seed: u64,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) include_usage: bool,
}

/// A choice that has ended.
#[derive(Debug, Default)]
pub(super) struct Whole {
    pub(super) text: String,
    pub(super) calls: Vec<Value>,
    pub(super) scored: Vec<Scored>,
    pub(super) finish: Option<Finish>,
}

impl Show {
    fn head(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), json!(self.id));
        map.insert("object".into(), json!(object));
        map.insert("created".into(), json!(self.created));
        map.insert("model".into(), json!(self.model));
        map.insert("system_fingerprint".into(), json!(self.fingerprint));
        map.insert("seed".into(), json!(self.seed));
        map.insert("choices".into(), json!(choices));
        map
    }

    /// An answer in one piece.
    pub(super) fn whole(&self, choices: &[Whole], usage: Value) -> Value {
        let shown = (0..).zip(choices).map(|(index, choice): (u32, _)| {
            let finish = choice.finish.map(Finish::as_str);
            let logprobs = self.logprobs(&choice.scored);
            match self.kind {
                Kind::Chat => json!({
                    "index": index,
                    "message": message(choice),
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }),
                Kind::Text => json!({
                    "index": index,
                    "text": choice.text,
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }),
            }
        });
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Text => "text_completion",
        };
        let mut whole = self.head(object, shown.collect());
        whole.insert("usage".into(), usage);
        Value::Object(whole)
    }

    /// What a stream of a chat begins with: who speaks. Completions begin with text.
    pub(super) fn opening(&self, index: u32) -> Option<String> {
        let delta = json!({ "role": "assistant", "content": "" });
        (self.kind == Kind::Chat).then(|| self.chunk(index, delta, Value::Null, None))
    }

    /// More of a choice.
    pub(super) fn more(&self, index: u32, text: &str, scored: Option<&Scored>) -> String {
        let logprobs = self.logprobs(scored.map_or(&[], std::slice::from_ref));
        let more = match self.kind {
            Kind::Chat => json!({ "content": text }),
            Kind::Text => json!(text),
        };
        self.chunk(index, more, logprobs, None)
    }

    /// A call of a choice, whole.
    pub(super) fn call(&self, index: u32, mut call: Value, number: usize) -> String {
        call["index"] = json!(number);
        self.chunk(index, json!({ "tool_calls": [call] }), Value::Null, None)
    }

    /// The end of a choice.
    pub(super) fn end(&self, index: u32, finish: Finish) -> String {
        let nothing = match self.kind {
            Kind::Chat => json!({}),
            Kind::Text => json!(""),
        };
        self.chunk(index, nothing, Value::Null, Some(finish))
    }

    /// The last chunk of a stream whose reader wants to know what it used.
    pub(super) fn usage(&self, usage: Value) -> String {
        let mut chunk = self.head(self.chunk_object(), Vec::new());
        chunk.insert("usage".into(), usage);
        Value::Object(chunk).to_string()
    }

    fn chunk_object(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Text => "text_completion",
        }
    }

    fn chunk(&self, index: u32, more: Value, logprobs: Value, finish: Option<Finish>) -> String {
        let name = match self.kind {
            Kind::Chat => "delta",
            Kind::Text => "text",
        };
        let choice = json!({
            "index": index,
            name: more,
            "logprobs": logprobs,
            "finish_reason": finish.map(Finish::as_str),
        });
        let mut chunk = self.head(self.chunk_object(), vec![choice]);
        if self.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        Value::Object(chunk).to_string()
    }

    fn logprobs(&self, scored: &[Scored]) -> Value {
        if scored.is_empty() {
            return Value::Null;
        }
        match self.kind {
            Kind::Chat => {
                let content: Vec<Value> = scored
                    .iter()
                    .map(|scored| {
                        let mut entry = self.entry(&scored.token);
                        let top: Vec<Value> =
                            scored.top.iter().map(|token| self.entry(token).into()).collect();
                        entry.insert("top_logprobs".into(), json!(top));
                        Value::Object(entry)
                    })
                    .collect();
                json!({ "content": content, "refusal": null })
            }
            Kind::Text => {
                let texts = scored.iter().map(|scored| self.text(scored.token.id));
                let texts: Vec<String> = texts.collect();
                let values: Vec<f32> = scored.iter().map(|s| bounded(s.token.logprob)).collect();
                let top: Vec<Map<String, Value>> = scored
                    .iter()
                    .map(|scored| {
                        let named = |t: &TokenLogprob| (self.text(t.id), json!(bounded(t.logprob)));
                        scored.top.iter().map(named).collect()
                    })
                    .collect();
                // Of the answer, in characters of the tokens' own texts.
                let mut offset = 0;
                let offsets: Vec<usize> = texts
                    .iter()
                    .map(|text| {
                        let after = offset + text.chars().count();
                        std::mem::replace(&mut offset, after)
                    })
                    .collect();
                json!({
                    "tokens": texts,
                    "token_logprobs": values,
                    "top_logprobs": top,
                    "text_offset": offsets,
                })
            }
        }
    }

    fn entry(&self, token: &TokenLogprob) -> Map<String, Value> {
        let text = self.text(token.id);
        // Part of a character has no text of its own, and no bytes that could be told.
        let whole = !text.contains(char::REPLACEMENT_CHARACTER);
        let bytes = whole.then(|| text.as_bytes().to_vec());
        let mut entry = Map::new();
        entry.insert("token".into(), json!(text));
        entry.insert("logprob".into(), json!(bounded(token.logprob)));
        entry.insert("bytes".into(), json!(bytes));
        entry
    }

    /// The text of one token by itself.
    fn text(&self, id: u32) -> String {
        match &self.tokenizer {
            Some(tokenizer) => tokenizer.decode_with_special(&[id]),
            None => format!("token_id:{id}"),
        }
    }
}

/// A call as clients read it, and send it back.
pub(super) fn call(call: Call) -> Value {
    call_of(format!("call_{}", uuid::Uuid::new_v4().simple()), call)
}

/// The same under an id.
pub(super) fn call_of(id: String, call: Call) -> Value {
    json!({
        "id": id,
        "type": "function",
        "function": { "name": call.name, "arguments": call.arguments },
    })
}

fn message(choice: &Whole) -> Value {
    let mut message = json!({ "role": "assistant", "content": choice.text, "refusal": null });
    if !choice.calls.is_empty() {
        message["tool_calls"] = json!(choice.calls);
        if choice.text.trim().is_empty() {
            message["content"] = Value::Null;
        }
    }
    message
}

fn bounded(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// What a request used, in tokens.
pub(super) fn usage(prompt: u64, completion: u64) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    })
}
