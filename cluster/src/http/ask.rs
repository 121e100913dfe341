//! What a body asks for: OpenAI's fields, those that vLLM and llama.cpp added, and our own, checked
//! and turned into jobs.
//!
//! A field that is not known is refused by name, so that a slip of the pen is seen. Of OpenAI's,
//! those that cannot change the answer are taken and not looked at; those that would change it and
//! that nobody here knows are refused unless they hold their default.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use lite_llm_runtime::draft::{BadSpeculation, Speculation, drafted};
use lite_llm_transport::messages::{
    Choosing, JobRequest, LogitsWanted, Prompt, STOP_BYTES_MAX, STOPS_MAX, Serving, TokenBias,
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value};

use crate::bias;

use super::{
    admission::Load,
    calls::{ToolUse, tool_use},
    chat,
    error::ApiError,
    form::form,
    prompts::PromptField,
};

/// Jobs of one request: its prompts, each `n` times.
pub(super) const JOBS_MAX: usize = 64;
/// Most candidates whose log-probabilities are told.
pub(super) const TOP_LOGPROBS_MAX: u32 = 20;
/// Longest `deadline_ms`: a day.
const DEADLINE_MAX_MS: u64 = 24 * 3600 * 1000;

/// Which of the two ways to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// A body of either.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Body {
    pub(super) model: Option<String>,
    prompt: Option<PromptField>,
    messages: Option<Vec<chat::Message>>,
    tools: Option<Vec<chat::Tool>>,
    tool_choice: Option<Value>,
    response_format: Option<Value>,
    regex: Option<String>,
    grammar: Option<String>,
    chat_template_kwargs: Option<Map<String, Value>>,

    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    n: Option<u32>,
    stop: Option<OneOrMore>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<u32>,

    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<Seed>,
    ignore_eos: Option<bool>,

    tiers: Option<String>,
    priority: Option<i64>,
    speculate: Option<String>,
    deadline_ms: Option<u64>,

    // Taken, and without a say in the answer.
    #[serde(rename = "user")]
    _user: Option<IgnoredAny>,
    #[serde(rename = "metadata")]
    _metadata: Option<IgnoredAny>,
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
    #[serde(rename = "cache_prompt")]
    _cache_prompt: Option<IgnoredAny>,
    #[serde(rename = "parallel_tool_calls")]
    _parallel_tool_calls: Option<IgnoredAny>,

    // They would change the answer.
    best_of: Option<u32>,
    echo: Option<bool>,
    suffix: Option<String>,
    modalities: Option<Vec<String>>,
    audio: Option<IgnoredAny>,
    prediction: Option<IgnoredAny>,
    web_search_options: Option<IgnoredAny>,
    functions: Option<IgnoredAny>,
    function_call: Option<IgnoredAny>,
    reasoning_effort: Option<IgnoredAny>,
    verbosity: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts is expected")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// A flag in a chat, a number in a completion.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "logprobs: true, false, or (for completions) a number is expected")]
enum Logprobs {
    Wanted(bool),
    Top(u32),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "seed: a whole number of 64 bits is expected")]
enum Seed {
    Positive(u64),
    Negative(i64),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<IgnoredAny>,
}

/// A body that was checked, as far as that goes without the model.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) kind: Kind,
    /// One or more, each answered `n` times.
    pub(super) prompts: Vec<Prompt>,
    pub(super) n: u32,
    /// What all jobs have in common. The prompt is empty; of the `n` of a prompt the next has the next
    /// seed.
    pub(super) request: JobRequest,
    /// Nobody said how many tokens are wanted: as many as fit.
    pub(super) open_ended: bool,
    pub(super) choosing: Choosing,
    /// Without its tenant, whom the caller's key tells.
    pub(super) serving: Serving,
    pub(super) stop: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) deadline: Option<Duration>,
    /// How calls of tools are told from text.
    pub(super) tool_use: ToolUse,
}

impl Body {
    /// One that was put together from fields that were checked, and from some that are passed on.
    pub(super) fn of_fields(fields: Value) -> Result<Self, ApiError> {
        serde_json::from_value(fields).map_err(|error| ApiError::bad(error.to_string()))
    }

    /// Checks everything. `unix_time` is what chat templates show.
    pub(super) fn check(self, kind: Kind, unix_time: i64) -> Result<Asked, ApiError> {
        self.refuse_what_is_not_known()?;
        let n = self.n.unwrap_or(1);
        if n == 0 || n as usize > JOBS_MAX {
            return Err(ApiError::invalid("n", format!("n is {n}; 1 to {JOBS_MAX} is expected")));
        }
        let mut choosing = self.choosing(kind)?;
        let mut request = self.request(kind)?;
        let serving = self.serving(&mut request)?;
        let open_ended = self.max_tokens.or(self.max_completion_tokens).is_none();
        let stop = stops(self.stop)?;
        let deadline = match self.deadline_ms {
            None => None,
            Some(ms @ 1..=DEADLINE_MAX_MS) => Some(Duration::from_millis(ms)),
            Some(ms) => {
                let message = format!("deadline_ms is {ms}; 1 to {DEADLINE_MAX_MS} is expected");
                return Err(ApiError::invalid("deadline_ms", message));
            }
        };
        let stream = self.stream.unwrap_or(false);
        let options = self.stream_options;
        if options.is_some() && !stream {
            let message = "stream_options is for answers with stream: true";
            return Err(ApiError::invalid("stream_options", message));
        }
        let include_usage = options.and_then(|options| options.include_usage).unwrap_or(false);
        let (format, mut forced) = (self.response_format, None);
        let (prompts, tool_use) = match kind {
            Kind::Text => {
                let chat_only: [(&'static str, bool); 5] = [
                    ("messages", self.messages.is_some()),
                    ("tools", self.tools.is_some()),
                    ("tool_choice", self.tool_choice.is_some()),
                    ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
                    ("max_completion_tokens", self.max_completion_tokens.is_some()),
                ];
                if let Some((name, _)) = chat_only.into_iter().find(|(_, given)| *given) {
                    let message = format!("{name} is for /v1/chat/completions");
                    return Err(ApiError::invalid(name, message));
                }
                (prompts(self.prompt)?, ToolUse::None)
            }
            Kind::Chat => {
                if self.prompt.is_some() {
                    let message = "prompt is for /v1/completions; messages is expected";
                    return Err(ApiError::invalid("prompt", message));
                }
                let mut tools = self.tools.unwrap_or_default();
                let tool_use = tool_use(self.tool_choice.as_ref(), &tools)?;
                forced = tool_use.schema(&tools);
                if tool_use == ToolUse::None {
                    tools.clear();
                }
                let asked = chat::Conversation {
                    messages: self.messages.unwrap_or_default(),
                    tools,
                    forced: forced.is_some(),
                    variables: self.chat_template_kwargs.unwrap_or_default(),
                };
                (vec![Prompt::Chat(asked.check(unix_time)?)], tool_use)
            }
        };
        choosing.grammar = form(format.as_ref(), self.regex, self.grammar, forced)?;
        if choosing.grammar.is_some() && !request.stop_at_eos {
            let message = "an answer of a form ends where that is whole: leave ignore_eos out";
            return Err(ApiError::invalid("ignore_eos", message));
        }
        let jobs = prompts.len() * n as usize;
        if jobs > JOBS_MAX {
            let message = format!("prompts × n is {jobs}; at most {JOBS_MAX} are taken at once");
            return Err(ApiError::invalid("n", message));
        }
        Ok(Asked {
            kind,
            prompts,
            n,
            request,
            open_ended,
            choosing,
            serving,
            stop,
            stream,
            include_usage,
            deadline,
            tool_use,
        })
    }

    fn refuse_what_is_not_known(&self) -> Result<(), ApiError> {
        let text = |modalities: &Vec<String>| modalities.iter().all(|what| what == "text");
        let refused: [(&'static str, bool, &str); 11] = [
            ("best_of", self.best_of.is_some_and(|of| of != self.n.unwrap_or(1)), "leave it out"),
            ("echo", self.echo == Some(true), "leave it out, or put the prompt before the answer"),
            ("suffix", self.suffix.as_ref().is_some_and(|s| !s.is_empty()), "leave it out"),
            ("modalities", !self.modalities.as_ref().is_none_or(text), "only text is served"),
            ("audio", self.audio.is_some(), "only text is served"),
            ("prediction", self.prediction.is_some(), "leave it out"),
            ("web_search_options", self.web_search_options.is_some(), "leave it out"),
            ("functions", self.functions.is_some(), "use tools"),
            ("function_call", self.function_call.is_some(), "use tool_choice"),
            (
                "reasoning_effort",
                self.reasoning_effort.is_some(),
                "give what the model's template reads in chat_template_kwargs",
            ),
            ("verbosity", self.verbosity.is_some(), "leave it out"),
        ];
        for (name, given, remedy) in refused {
            if given {
                let message = format!("{name} is not supported: {remedy}");
                return Err(ApiError::unsupported(name, message));
            }
        }
        Ok(())
    }

    fn request(&self, kind: Kind) -> Result<JobRequest, ApiError> {
        let most = match (self.max_completion_tokens, self.max_tokens) {
            (Some(a), Some(b)) if a != b => {
                let message =
                    format!("max_completion_tokens is {a} and max_tokens is {b}; give one of them");
                return Err(ApiError::invalid("max_tokens", message));
            }
            (a, b) => a.or(b),
        };
        let max_new_tokens = match most {
            Some(0) => {
                let message = "max_tokens is 0; at least 1 is expected";
                return Err(ApiError::invalid("max_tokens", message));
            }
            Some(most) => u32::try_from(most).unwrap_or(u32::MAX),
            // OpenAI's defaults: a few tokens, and what the context has room for.
            None if kind == Kind::Text => 16,
            None => u32::MAX,
        };
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            k => u32::try_from(k).map_err(|_| {
                let message = format!("top_k is {k}; 0 or more is expected, or -1 for no limit");
                ApiError::invalid("top_k", message)
            })?,
        };
        let tiers = self.tiers.clone().unwrap_or_else(|| "all".into());
        if let Err(error) = tiers.parse::<lite_llm_runtime::tier::TierSet>() {
            return Err(ApiError::invalid("tiers", format!("tiers: {error}")));
        }
        Ok(JobRequest {
            prompt: Prompt::Tokens(Vec::new()),
            max_new_tokens,
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(1.0),
            seed: match self.seed {
                Some(Seed::Positive(seed)) => seed,
                Some(Seed::Negative(seed)) => seed as u64,
                // The library's keys are the system's random numbers; half the range stays exact in
                // every reader of JSON.
                None => RandomState::new().hash_one(0) >> 32,
            },
            tiers,
            stop_at_eos: !self.ignore_eos.unwrap_or(false),
            want_logits: LogitsWanted::None,
            want_routes: false,
            prefill_chunk: 0,
            trace: Default::default(),
        })
    }

    /// What the job is to those that schedule it. A tier that drafts stands among those of the request.
    fn serving(&self, request: &mut JobRequest) -> Result<Serving, ApiError> {
        let given = self.priority.unwrap_or(0);
        let priority = i8::try_from(given).map_err(|_| {
            let message =
                format!("priority is {given}; -128 to 127 is expected, higher ones go first");
            ApiError::invalid("priority", message)
        })?;
        let speculation = self.speculate.as_deref().map(str::parse::<Speculation>).transpose();
        let speculation = speculation
            .map_err(|error: BadSpeculation| {
                ApiError::invalid("speculate", format!("speculate: {error}"))
            })?
            .unwrap_or_default();
        if let Speculation::Tier(tier) = &speculation {
            request.tiers = drafted(&request.tiers, tier);
        }
        let speculate = speculation == Speculation::Ngram;
        Ok(Serving { tenant: String::new(), priority, speculate })
    }

    fn choosing(&self, kind: Kind) -> Result<Choosing, ApiError> {
        let logprobs = match (kind, self.logprobs, self.top_logprobs) {
            (Kind::Chat, None | Some(Logprobs::Wanted(false)), None) => None,
            (Kind::Chat, None | Some(Logprobs::Wanted(false)), Some(0)) => None,
            (Kind::Chat, None | Some(Logprobs::Wanted(false)), Some(_)) => {
                let message = "top_logprobs goes with logprobs: true";
                return Err(ApiError::invalid("top_logprobs", message));
            }
            (Kind::Chat, Some(Logprobs::Wanted(true)), top) => Some(top.unwrap_or(0)),
            (Kind::Chat, Some(Logprobs::Top(_)), _) => {
                let message = "logprobs: true or false is expected; top_logprobs is the number";
                return Err(ApiError::invalid("logprobs", message));
            }
            (Kind::Text, _, Some(_)) => {
                let message = "top_logprobs is for chats; logprobs is the number here";
                return Err(ApiError::invalid("top_logprobs", message));
            }
            (Kind::Text, None | Some(Logprobs::Wanted(false)), None) => None,
            (Kind::Text, Some(Logprobs::Top(top)), None) => Some(top),
            (Kind::Text, Some(Logprobs::Wanted(true)), None) => {
                let message = "logprobs: a number is expected, of candidates for each token";
                return Err(ApiError::invalid("logprobs", message));
            }
        };
        if let Some(found) = logprobs.filter(|top| *top > TOP_LOGPROBS_MAX) {
            let name = if kind == Kind::Chat { "top_logprobs" } else { "logprobs" };
            let message = format!("{name} is {found}; at most {TOP_LOGPROBS_MAX} is expected");
            return Err(ApiError::invalid(name, message));
        }
        let ranges = [
            ("presence_penalty", self.presence_penalty, -2.0..=2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0..=2.0),
            ("repetition_penalty", self.repetition_penalty, 0.01..=100.0),
        ];
        for (name, given, range) in ranges {
            if let Some(found) = given.filter(|given| !range.contains(given)) {
                let (least, most) = (range.start(), range.end());
                let message = format!("{name} is {found}; {least} to {most} is expected");
                return Err(ApiError::invalid(name, message));
            }
        }
        let bias = self.logit_bias.as_ref().map_or_else(|| Ok(Vec::new()), biases)?;
        let defaults = Choosing::default();
        Ok(Choosing {
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition: self.repetition_penalty.unwrap_or(defaults.repetition),
            presence: self.presence_penalty.unwrap_or(defaults.presence),
            frequency: self.frequency_penalty.unwrap_or(defaults.frequency),
            bias,
            logprobs,
            grammar: None,
        })
    }
}

/// What a prompt and an answer of `most` tokens take, before anybody has tokenised it: a token has a
/// byte at least.
pub(super) fn load_of(prompt: &Prompt, most: u32, positions: usize) -> Load {
    let bytes = match prompt {
        Prompt::Tokens(ids) => ids.len(),
        Prompt::Text(text) | Prompt::Chat(text) => text.len(),
    };
    let prompt = bytes.min(positions);
    let answer = (most as usize).min(positions - prompt);
    Load { jobs: 1, prompt: prompt as u64, answer: answer as u64 }
}

impl Asked {
    /// What all its answers take: see [`load_of`].
    pub(super) fn load(&self, positions: usize) -> Load {
        let mut load = Load { jobs: 0, prompt: 0, answer: 0 };
        for prompt in &self.prompts {
            let one = load_of(prompt, self.request.max_new_tokens, positions);
            load.jobs += self.n as usize;
            load.prompt += one.prompt * u64::from(self.n);
            load.answer += one.answer * u64::from(self.n);
        }
        load
    }
}

fn biases(given: &BTreeMap<String, f32>) -> Result<Vec<TokenBias>, ApiError> {
    // Ids are numbers: "7" and "07" are one token.
    let ids = given.iter().map(|(token, &value)| Ok((bias::token(token)?, value)));
    let bias = ids.collect::<Result<Vec<_>, String>>().and_then(bias::biases);
    bias.map_err(|error| ApiError::invalid("logit_bias", format!("logit_bias: {error}")))
}

fn stops(given: Option<OneOrMore>) -> Result<Vec<String>, ApiError> {
    let stop = match given {
        None => Vec::new(),
        Some(OneOrMore::One(stop)) => vec![stop],
        Some(OneOrMore::More(stops)) => stops,
    };
    if stop.len() > STOPS_MAX {
        let message = format!("stop has {} texts; at most {STOPS_MAX} are taken", stop.len());
        return Err(ApiError::invalid("stop", message));
    }
    if let Some(long) = stop.iter().find(|text| text.len() > STOP_BYTES_MAX) {
        let found = long.len();
        let message =
            format!("a text of stop has {found} bytes; at most {STOP_BYTES_MAX} are taken");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stop)
}

fn prompts(given: Option<PromptField>) -> Result<Vec<Prompt>, ApiError> {
    let prompts: Vec<Prompt> = match given {
        None => return Err(ApiError::invalid("prompt", "prompt is missing")),
        Some(PromptField::Text(text)) => vec![Prompt::Text(text)],
        Some(PromptField::Ids(ids)) => vec![Prompt::Tokens(ids)],
        Some(PromptField::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
        Some(PromptField::Many(many)) => many.into_iter().map(Prompt::Tokens).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "prompt is an empty list"));
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::body::parse, *};

    fn ask(kind: Kind, body: Value) -> Result<Asked, ApiError> {
        parse::<Body>(&serde_json::to_vec(&body).unwrap())?.check(kind, 0)
    }

    #[track_caller]
    fn refused(kind: Kind, body: Value, words: &str) {
        let error = ask(kind, body).unwrap_err();
        assert!(error.message.contains(words), "{words:?}: {error:?}");
        assert!(error.status.is_client_error());
    }

    #[test]
    fn defaults_are_those_of_openai() {
        let asked = ask(Kind::Text, json!({ "prompt": "a" })).unwrap();
        let JobRequest { max_new_tokens, temperature, top_p, top_k, stop_at_eos, .. } =
            asked.request;
        assert_eq!((max_new_tokens, temperature, top_p), (16, 1.0, 1.0));
        assert_eq!((top_k, stop_at_eos, asked.n, asked.stream), (0, true, 1, false));
        assert_eq!(asked.choosing, Choosing::default());
        let chat = json!({ "messages": [{ "role": "user", "content": "a" }] });
        assert_eq!(ask(Kind::Chat, chat).unwrap().request.max_new_tokens, u32::MAX);
    }

    #[test]
    fn prompts_are_texts_or_ids_or_lists_of_them() {
        let prompts = |prompt: Value| ask(Kind::Text, json!({ "prompt": prompt })).unwrap().prompts;
        assert_eq!(prompts(json!("a")), [Prompt::Text("a".into())]);
        assert_eq!(prompts(json!([1, 2])), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts(json!(["a", "b"])).len(), 2);
        assert_eq!(prompts(json!([[1], [2, 3]]))[1], Prompt::Tokens(vec![2, 3]));
        refused(Kind::Text, json!({}), "prompt is missing");
        refused(Kind::Text, json!({ "prompt": [["a"]] }), "token ids");
        refused(Kind::Text, json!({ "prompt": [-1] }), "token ids");
        refused(Kind::Text, json!({ "prompt": [1, "a"] }), "token ids");
        refused(Kind::Text, json!({ "prompt": [[1], "a"] }), "token ids");
        refused(Kind::Text, json!({ "prompt": [1, 4294967296_u64] }), "token ids");
        refused(Kind::Text, json!({ "prompt": { "a": 1 } }), "token ids");
        refused(Kind::Text, json!({ "prompt": [] }), "empty list");
        refused(Kind::Text, json!({ "prompt": vec![vec![1]; 65] }), "at most 64");
    }

    #[test]
    fn numbers_at_their_extremes_are_refused_or_mean_what_they_say() {
        let with = |name: &str, value: Value| {
            let mut body = json!({ "prompt": "a" });
            body[name] = value;
            body
        };
        for (name, value, words) in [
            ("n", json!(0), "n is 0"),
            ("n", json!(u32::MAX), "n is"),
            ("n", json!(u64::MAX), "expected u32"),
            ("n", json!(-1), "expected u32"),
            ("max_tokens", json!(0), "at least 1"),
            ("max_tokens", json!(-1), "expected u64"),
            ("max_tokens", json!(1e300), "expected u64"),
            ("top_k", json!(-2), "top_k is -2"),
            ("top_k", json!(i64::MAX), "top_k is"),
            ("deadline_ms", json!(0), "deadline_ms is 0"),
            ("deadline_ms", json!(u64::MAX), "deadline_ms is"),
            ("logprobs", json!(21), "at most 20"),
            ("logprobs", json!(u32::MAX), "at most 20"),
            ("logprobs", json!(true), "a number is expected"),
            ("top_logprobs", json!(1), "is for chats"),
            ("stop", json!(vec!["a"; 17]), "at most 16"),
            ("stop", json!(["a".repeat(2000)]), "bytes"),
            ("logit_bias", json!({ "x": 1 }), "no token id"),
            ("logit_bias", json!({ "1": 101 }), "-100 to 100"),
            ("logit_bias", json!({ "1": 1, "01": 1 }), "twice"),
            ("tiers", json!("a,,b"), "tiers"),
            ("seed", json!(1.5), "seed"),
            ("priority", json!(1000), "higher ones go first"),
            ("speculate", json!("tea leaves"), "ngram"),
            ("speculate", json!("tier:Big One"), "cannot name a tier"),
            ("echo", json!(true), "not supported"),
            ("temprature", json!(1), "unknown field `temprature`"),
            ("stream_options", json!({ "include_usage": true }), "stream: true"),
        ] {
            refused(Kind::Text, with(name, value), words);
        }
        let asked = |name: &str, value: Value| ask(Kind::Text, with(name, value)).unwrap();
        assert_eq!(asked("max_tokens", json!(u64::MAX)).request.max_new_tokens, u32::MAX);
        assert_eq!(asked("seed", json!(u64::MAX)).request.seed, u64::MAX);
        assert_eq!(asked("seed", json!(-1)).request.seed, u64::MAX);
        assert_eq!(asked("top_k", json!(-1)).request.top_k, 0);
        let by_tier = asked("speculate", json!("tier:tier_1b"));
        assert_eq!(by_tier.request.tiers, "all drafted by tier_1b");
        assert!(!by_tier.serving.speculate && asked("speculate", json!("ngram")).serving.speculate);
        let never = asked("logit_bias", json!({ "7": -100 })).choosing.bias;
        assert_eq!(never, [TokenBias { id: 7, bias: f32::NEG_INFINITY }]);
        for fine in ["user", "metadata", "cache_prompt", "store"] {
            asked(fine, json!({ "a": [1] }));
        }
        asked("echo", json!(false));
        asked("functions", Value::Null);
    }

    #[test]
    fn log_probabilities_have_two_spellings() {
        let chat = |more: Value| {
            let mut body = json!({ "messages": [{ "role": "user", "content": "a" }] });
            let more = more.as_object().unwrap().clone();
            body.as_object_mut().unwrap().extend(more);
            ask(Kind::Chat, body)
        };
        let top = |asked: Result<Asked, ApiError>| asked.unwrap().choosing.logprobs;
        assert_eq!(top(chat(json!({ "logprobs": true }))), Some(0));
        assert_eq!(top(chat(json!({ "logprobs": true, "top_logprobs": 5 }))), Some(5));
        assert_eq!(top(chat(json!({ "logprobs": false }))), None);
        assert!(chat(json!({ "top_logprobs": 5 })).is_err());
        assert!(chat(json!({ "logprobs": 5 })).is_err());
        assert_eq!(top(ask(Kind::Text, json!({ "prompt": "a", "logprobs": 3 }))), Some(3));
    }

    /// Fields that clients of others send, and that are not for new ones.
    const NOT_DESCRIBED: [&str; 20] = [
        "audio",
        "best_of",
        "cache_prompt",
        "echo",
        "function_call",
        "functions",
        "metadata",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "suffix",
        "user",
        "verbosity",
        "web_search_options",
    ];

    #[test]
    fn what_is_taken_is_what_the_description_says() {
        let error = serde_json::from_str::<Body>("{\"?\":1}").unwrap_err().to_string();
        let taken = error.split('`').skip(1).step_by(2).skip(1).map(str::to_owned);
        let mut taken: Vec<String> = taken.collect();
        taken.sort();
        let described: Value = serde_json::from_str(super::super::OPENAPI).unwrap();
        let fields = &described["components"]["schemas"]["Generate"]["properties"];
        let fields = fields.as_object().unwrap().keys().cloned();
        let mut described: Vec<String> = fields.chain(NOT_DESCRIBED.map(str::to_owned)).collect();
        described.sort();
        assert_eq!(taken, described);
    }
}
