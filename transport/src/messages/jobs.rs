//! Jobs: what a client asks the coordinator, what a home node reports, what flows back.
//!
//! These are small or rare beside expert batches, so they are owned values, decoded once.

#![allow(missing_docs, reason = "rkyv derives undocumented structs for enums with named fields")]

use rkyv::{Archive, Deserialize, Serialize};

use super::{
    ClusterStatus, DetachedReply, DetachedRequest, MessageError, NodeResidences, TraceContext,
};

/// What the model is to continue.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Prompt {
    /// Text, for the coordinator's tokenizer.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// A conversation as JSON, for the coordinator's chat template and tokenizer.
    Chat(String),
}

impl Prompt {
    /// Bytes of its text, which is to be tokenised.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) | Self::Chat(text) => text.len(),
            Self::Tokens(_) => 0,
        }
    }
}

/// Which logits are sent back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub enum LogitsWanted {
    /// None: just tokens.
    #[default]
    None,
    /// Those of every position.
    All,
}

/// One inference job, as a client writes it.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct JobRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate; 0 evaluates the prompt only.
    pub max_new_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all candidates.
    pub top_k: u32,
    /// 1 keeps all candidates.
    pub top_p: f32,
    /// Seed of the sampling.
    pub seed: u64,
    /// A `TierSet` as people write it: `all`, `tier_1b,tier_10b`, `..tier_10b`; and, where one of its
    /// tiers guesses tokens, `drafted by` that: `all drafted by tier_1b`.
    pub tiers: String,
    /// Whether the end-of-text token ends the job.
    pub stop_at_eos: bool,
    /// Which logits to send back.
    pub want_logits: LogitsWanted,
    /// Whether to send back which experts ran.
    pub want_routes: bool,
    /// Tokens of the prompt per step; 0 lets the node choose.
    pub prefill_chunk: u32,
    /// The client's span.
    pub trace: TraceContext,
}

impl JobRequest {
    /// A greedy continuation of a prompt by exactly so many tokens, with all tiers.
    pub fn greedy(prompt: Prompt, max_new_tokens: u32) -> Self {
        Self {
            prompt,
            max_new_tokens,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            tiers: "all".into(),
            stop_at_eos: false,
            want_logits: LogitsWanted::None,
            want_routes: false,
            prefill_chunk: 0,
            trace: TraceContext::default(),
        }
    }
}

/// What is added to the logit of a token; −∞ excludes it.
#[derive(Debug, Clone, Copy, PartialEq, Archive, Serialize, Deserialize)]
pub struct TokenBias {
    /// The token.
    pub id: u32,
    /// What is added.
    pub bias: f32,
}

/// Longest grammar, in bytes.
pub const GRAMMAR_BYTES_MAX: usize = 128 << 10;

/// The form of an answer: tokens that would leave it are not chosen.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Grammar {
    /// JSON that this JSON schema describes.
    JsonSchema(String),
    /// All of it matches this regular expression.
    Regex(String),
    /// It is of this language, in llguidance's dialect of Lark.
    Lark(String),
}

impl Grammar {
    /// As it was written.
    pub fn text(&self) -> &str {
        let (Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text)) = self;
        text
    }
}

/// How tokens are chosen, beyond what a [`JobRequest`] says. The default changes nothing.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Choosing {
    /// Only tokens at least this times as probable as the best; 0 is no limit.
    pub min_p: f32,
    /// Logits of tokens that were seen are divided by it if positive, else multiplied; 1 is off.
    pub repetition: f32,
    /// Taken from the logits of tokens that were generated.
    pub presence: f32,
    /// Taken from the logits of tokens for each time that they were generated.
    pub frequency: f32,
    /// Tokens whose logits are shifted, each at most once.
    pub bias: Vec<TokenBias>,
    /// Report tokens as [`JobEventBody::Scored`], each with so many of the likeliest.
    pub logprobs: Option<u32>,
    /// The form of the answer, if it has one.
    pub grammar: Option<Grammar>,
}

impl Default for Choosing {
    fn default() -> Self {
        Self {
            min_p: 0.0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            bias: Vec::new(),
            logprobs: None,
            grammar: None,
        }
    }
}

/// What a job is to those that schedule it. It never changes a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Serving {
    /// Whose it is; the coordinator fills it in. Tenants get equal shares, and none learns from how soon
    /// an answer comes what others have asked.
    pub tenant: String,
    /// Higher ones go first.
    pub priority: i8,
    /// Tokens are guessed from the text, and several verified in one pass. Where a tier guesses them,
    /// [`JobRequest::tiers`] says so.
    pub speculate: bool,
}

/// Natural logarithm of a token's probability.
#[derive(Debug, Clone, Copy, PartialEq, Archive, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// At most 0.
    pub logprob: f32,
}

/// Candidates of a token whose log-probabilities travel with it, at most.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// Why a job ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum EndReason {
    /// It generated as many tokens as it was allowed.
    Length,
    /// The model ended the text.
    EndOfText,
    /// The model's context is full.
    Context,
    /// Somebody cancelled it.
    Cancelled,
}

/// Something that happened to a job: home node → coordinator → client.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct JobEvent {
    /// The job, as the coordinator numbered it.
    pub job: u64,
    /// The span in which it happened.
    pub trace: TraceContext,
    /// What happened.
    pub body: JobEventBody,
}

/// What happened to a job.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum JobEventBody {
    /// A token was generated.
    Token {
        /// How many were generated before it.
        index: u32,
        /// Its id.
        id: u32,
        /// The text that it completes, if any.
        text: Option<String>,
    },
    /// Logits `[rows, width]` of consecutive positions.
    Logits {
        /// Position of the first row.
        first_row: u32,
        /// How many positions.
        rows: u32,
        /// Size of the vocabulary.
        width: u32,
        /// Row after row.
        values: Vec<f32>,
    },
    /// Which experts ran, `[layers, rows, k]`, each by its index in the layer's flat list.
    Routes {
        /// Position of the first row.
        first_row: u32,
        /// Layers with experts.
        layers: u32,
        /// How many positions.
        rows: u32,
        /// Most experts of a position.
        k: u32,
        /// Layer after layer, row after row; −1 where a position has fewer.
        ids: Vec<i32>,
    },
    /// More of the prompt was read.
    Progress {
        /// Tokens read.
        prefilled: u32,
        /// Tokens of the prompt.
        total: u32,
    },
    /// The job ended well.
    Done {
        /// Why.
        reason: EndReason,
        /// Tokens that it generated.
        generated: u32,
    },
    /// The job ended badly.
    Failed {
        /// What happened, and what to do.
        reason: String,
    },
    /// Text that the tokens before it left open, when no further token completes it.
    Text(String),
    /// Its home did not begin with it; another node may. Never sent to clients.
    NotTaken {
        /// Why.
        reason: String,
    },
    /// A token was generated, of a job that asks how likely its tokens are. Boxed, so that the others
    /// keep their layout.
    Scored(Box<ScoredToken>),
}

/// A token, and how likely it was.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct ScoredToken {
    /// How many were generated before it.
    pub index: u32,
    /// Its id.
    pub id: u32,
    /// The text that it completes, if any.
    pub text: Option<String>,
    /// Natural logarithm of its probability by the model's own logits.
    pub logprob: f32,
    /// The likeliest tokens in its place, likelier ones first.
    pub top: Vec<TokenLogprob>,
}

impl JobOrder {
    /// Whether sizes are within bounds. To be asked once, on receipt.
    pub(super) fn check(&self) -> Result<(), MessageError> {
        check_grammar(self.choosing.grammar.as_ref())
    }
}

/// Whether a grammar is no longer than one may be.
pub(super) fn check_grammar(grammar: Option<&Grammar>) -> Result<(), MessageError> {
    match grammar.map_or(0, |grammar| grammar.text().len()) {
        0..=GRAMMAR_BYTES_MAX => Ok(()),
        found => Err(MessageError::Field {
            what: "a job",
            field: "length of its grammar",
            found: found as u64,
            expected: format!("{GRAMMAR_BYTES_MAX} at most"),
        }),
    }
}

impl JobEventBody {
    /// Whether nothing follows.
    pub fn is_last(&self) -> bool {
        use JobEventBody::{Done, Failed, NotTaken};
        matches!(self, Done { .. } | Failed { .. } | NotTaken { .. })
    }

    /// Whether there are as many numbers as the shape says.
    pub(super) fn check(&self) -> Result<(), MessageError> {
        let (what, found, shape): (_, _, &[u32]) = match self {
            JobEventBody::Logits { rows, width, values, .. } => {
                ("Logits", values.len(), &[*rows, *width])
            }
            JobEventBody::Routes { layers, rows, k, ids, .. } => {
                ("Routes", ids.len(), &[*layers, *rows, *k])
            }
            JobEventBody::Scored(token) if token.top.len() > TOP_LOGPROBS_MAX => {
                let (what, field, found) = ("ScoredToken", "number of candidates", token.top.len());
                let expected = format!("at most {TOP_LOGPROBS_MAX}");
                return Err(MessageError::Field { what, field, found: found as u64, expected });
            }
            _ => return Ok(()),
        };
        let product = |size: u64, &by: &u32| size.checked_mul(u64::from(by));
        if shape.iter().try_fold(1, product) == Some(found as u64) {
            return Ok(());
        }
        let expected = format!("the product of {shape:?}");
        Err(MessageError::Field { what, field: "number of values", found: found as u64, expected })
    }
}

/// A client asks the coordinator.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum ClientRequest {
    /// How is the cluster?
    Status,
    /// End this job.
    Cancel(u64),
    /// Move a worker's work and experts away, and let it go.
    Drain(String),
    /// Where are the nodes' experts?
    Residences,
    /// Run a job, or the rest of it where a connection was lost; its number is the coordinator's to
    /// give.
    Order(Box<JobOrder>),
    /// A question of the ledger.
    Detached(DetachedRequest),
}

/// The coordinator answers a client.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum ClientReply {
    /// The job runs, or waits for its turn; its events follow.
    Accepted {
        /// Its number.
        job: u64,
    },
    /// Something happened to the job.
    Event(JobEvent),
    /// How the cluster is.
    Status(ClusterStatus),
    /// The request was not taken.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// What was asked is being done.
    Noted,
    /// Where the experts of those nodes are that answered.
    Residences(Vec<NodeResidences>),
    /// The ledger's answer.
    Detached(DetachedReply),
}

/// A job goes to a home node: from its beginning, or from where it was elsewhere.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct JobOrder {
    /// Number of the job.
    pub job: u64,
    /// The job; its prompt is token ids by now.
    pub request: JobRequest,
    /// How its tokens are chosen.
    pub choosing: Choosing,
    /// What it is to those that schedule it.
    pub serving: Serving,
    /// What it has generated.
    pub generated: Vec<u32>,
}

impl From<JobRequest> for JobOrder {
    /// From its beginning, with the defaults, under no number.
    fn from(request: JobRequest) -> Self {
        let (choosing, serving) = (Choosing::default(), Serving::default());
        Self { job: 0, request, choosing, serving, generated: Vec::new() }
    }
}
