//! One request on its way: its tokens, its pages, and what it still wants.

use std::sync::Arc;

use lite_llm_kernels::kv::PAGE_TOKENS;
use tracing::Span;

use crate::{
    config::ModelConfig,
    draft::{Drafter, Speculation, tier::TierDraft},
    grammar::Guide,
    kv::{PageTable, Prefix},
    sampler::{BIAS_MAX, Chooser, Sampling, SamplingError, TOP_LOGPROBS_MAX},
    tier::{TierId, TierMask, TierSet, TierSetError},
};

/// What is asked of the model.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Tokens that were generated before, elsewhere: they are read like the prompt, and what comes
    /// after them has the bits that it would have had there.
    pub generated: Vec<u32>,
    /// Tokens to generate at most, those before among them.
    pub max_new_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Added to the logits of tokens, each at most once; −∞ excludes.
    pub bias: Vec<(u32, f32)>,
    /// The form of the answer, at its beginning. It wants `stop_at_eos`.
    pub guide: Option<Guide>,
    /// Tell how likely each token was, and each of so many of the likeliest.
    pub logprobs: Option<u32>,
    /// Tiers that may be used.
    pub tiers: TierSet,
    /// End at a token that ends a text.
    pub stop_at_eos: bool,
    /// Give the logits of every position.
    pub logits: bool,
    /// Give the routes of every position.
    pub routes: bool,
    /// Tokens of the prompt per pass at most; 0 lets the engine decide.
    pub prefill_chunk: usize,
    /// Guess tokens and verify several in one pass. Never changes what is generated.
    pub speculate: Speculation,
    /// Whose it is: tenants get equal shares, and use no prefix that another has computed.
    pub tenant: String,
    /// Higher ones go first, and take pages from lower ones.
    pub priority: i8,
    /// The span that its work belongs to.
    pub span: Span,
}

impl Request {
    /// A greedy continuation of a prompt.
    pub fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            generated: Vec::new(),
            max_new_tokens,
            sampling: Sampling::GREEDY,
            bias: Vec::new(),
            guide: None,
            logprobs: None,
            tiers: TierSet::All,
            stop_at_eos: false,
            logits: false,
            routes: false,
            prefill_chunk: 0,
            speculate: Speculation::Off,
            tenant: String::new(),
            priority: 0,
            span: Span::none(),
        }
    }

    /// Checks it against a model: the tiers that it may use, or why it cannot be served.
    pub fn check(&self, config: &ModelConfig) -> Result<TierMask, RequestError> {
        let context = config.context;
        if self.prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        // With nothing to generate, a prompt may fill the context.
        let room = if self.max_new_tokens == 0 { context } else { context.saturating_sub(1) };
        if self.prompt.len() > room {
            return Err(RequestError::PromptTooLong { tokens: self.prompt.len(), context });
        }
        let vocab = config.vocab;
        let tokens = self.prompt.iter().chain(&self.generated);
        if let Some((position, &id)) = tokens.enumerate().find(|(_, id)| **id as usize >= vocab) {
            return Err(RequestError::UnknownToken { id, position, vocab });
        }
        let (tokens, most) = (self.generated.len(), self.max_new_tokens);
        if tokens > most || self.prompt.len() + tokens > context {
            return Err(RequestError::GeneratedTooMuch { tokens, most: most.min(context) });
        }
        self.sampling.check()?;
        self.check_bias(vocab)?;
        if let Some(found) = self.logprobs.filter(|top| *top > TOP_LOGPROBS_MAX) {
            return Err(RequestError::TooManyLogprobs { found });
        }
        let tiers = config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        let mask = self.tiers.mask(tiers)?;
        self.drafting(&mask, config)?;
        Ok(mask)
    }

    /// The tier that drafts, by index and as a set of its own.
    fn drafting(
        &self,
        mask: &TierMask,
        config: &ModelConfig,
    ) -> Result<Option<(usize, TierMask)>, DraftError> {
        let Speculation::Tier(tier) = &self.speculate else { return Ok(None) };
        let tiers = config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        if tiers.is_empty() {
            return Err(DraftError::NoTiers { tier: tier.clone() });
        }
        let alone = TierSet::Only(vec![tier.clone()]).mask(tiers)?;
        let index = (0..tiers.len()).find(|&index| alone.allows(index)).unwrap_or_default();
        let (tier, set) = (tier.clone(), self.tiers.clone());
        match mask.allows(index) {
            false => Err(DraftError::NotAllowed { tier, set }),
            true if mask.count() == 1 => Err(DraftError::Same { tier }),
            true => Ok(Some((index, alone))),
        }
    }

    fn check_bias(&self, vocab: usize) -> Result<(), RequestError> {
        let bias = &self.bias;
        let is_wrong = |value: f32| value.is_nan() || value == f32::INFINITY;
        if bias.len() > BIAS_MAX {
            return Err(RequestError::TooMuchBias { found: bias.len() });
        }
        let unfit = bias.iter().find(|(id, value)| *id as usize >= vocab || is_wrong(*value));
        if let Some(&(id, value)) = unfit {
            return Err(RequestError::Bias { id, value, vocab });
        }
        let mut ids: Vec<u32> = bias.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        match ids.windows(2).find(|two| two[0] == two[1]) {
            Some(twice) => Err(RequestError::BiasTwice { id: twice[0] }),
            None => Ok(()),
        }
    }
}

/// Why a request cannot be served.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Nothing to continue.
    #[error("the prompt is empty; at least one token is expected")]
    EmptyPrompt,
    /// More than the model can see.
    #[error(
        "the prompt has {tokens} tokens; this model sees {context}, \
         of which one must be left for the answer: shorten the prompt"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Positions that the model was made for.
        context: usize,
    },
    /// It claims to have generated more than it may.
    #[error("{tokens} tokens are said to be generated already; at most {most} may be")]
    GeneratedTooMuch {
        /// How many.
        tokens: usize,
        /// The limit.
        most: usize,
    },
    /// A token that the model does not know.
    #[error("token {id} at position {position}: this model's vocabulary has {vocab} tokens")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Where in the prompt.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// More memory than the node gives to caches.
    #[error(
        "the request needs {needed} cache pages for {tokens} tokens, this node has {pages}; \
         ask for fewer tokens or give the node a larger --kv"
    )]
    CacheTooSmall {
        /// Pages needed.
        needed: usize,
        /// Tokens that they would hold.
        tokens: usize,
        /// Pages of the node.
        pages: usize,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests wait already; try again later")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// A sampling setting is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// A bias of no token, or that is no number.
    #[error(
        "the bias of token {id} is {value}; a number below infinity is expected, of one of this \
         model's {vocab} tokens"
    )]
    Bias {
        /// The token.
        id: u32,
        /// Its bias.
        value: f32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Two biases of one token.
    #[error("token {id} has two biases; one is expected")]
    BiasTwice {
        /// The token.
        id: u32,
    },
    /// More biases than are looked at for every token.
    #[error("{found} tokens are biased; at most {BIAS_MAX} may be")]
    TooMuchBias {
        /// How many.
        found: usize,
    },
    /// More candidates than are told.
    #[error("log-probabilities of {found} candidates; at most {TOP_LOGPROBS_MAX} are told")]
    TooManyLogprobs {
        /// How many.
        found: u32,
    },
    /// The set of tiers does not suit the model.
    #[error(transparent)]
    Tiers(#[from] TierSetError),
    /// The tier that is to draft cannot.
    #[error("speculate: {0}")]
    Draft(#[from] DraftError),
    /// The same number was given to two requests.
    #[error("request {0} exists already")]
    Duplicate(u64),
}

/// Why a tier cannot draft for a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// The model has no such tier, or not its files.
    #[error(transparent)]
    Tier(#[from] TierSetError),
    /// The model has no experts.
    #[error("tier {tier} is to draft, but this model has no tiers; ngram works with every model")]
    NoTiers {
        /// What was asked for.
        tier: TierId,
    },
    /// The request may not use it.
    #[error(
        "tier {tier} is to draft, but the request's tiers are {set}; choose a tier among those, or \
         allow it"
    )]
    NotAllowed {
        /// What was asked for.
        tier: TierId,
        /// The tiers of the request.
        set: TierSet,
    },
    /// It is all that the request uses.
    #[error(
        "tier {tier} is to draft, but the request uses no other: a draft would take as long as the \
         answer; allow more tiers, or leave it out"
    )]
    Same {
        /// What was asked for.
        tier: TierId,
    },
}

/// Why a sequence ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// It generated as many tokens as it was to.
    Length,
    /// It generated a token that ends a text.
    EndOfText,
    /// The model's context is full.
    Context,
    /// It was cancelled.
    Cancelled,
}

/// What a sequence that decodes does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Guess {
    /// Its next token, and what comes after it if these are right.
    Verify(Vec<u32>),
    /// A tier drafts another token.
    Draft,
}

/// A request that was admitted.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: Request,
    pub(crate) tiers: Arc<TierMask>,
    pub(crate) chooser: Chooser,
    /// Prompt and generated tokens.
    pub(crate) tokens: Vec<u32>,
    /// Positions in the cache.
    pub(crate) cached: usize,
    /// Positions whose logits and routes were told, where they are wanted.
    pub(crate) reported: usize,
    /// How many came before it.
    pub(crate) arrived: u64,
    /// Where the prefixes of its tokens begin.
    pub(crate) root: Prefix,
    pub(crate) table: PageTable,
    pub(crate) in_pass: bool,
    pub(crate) drafter: Drafter,
    /// What one of its tiers drafts, if one is to.
    pub(crate) draft: Option<TierDraft>,
    /// Tokens that it had when it was last verified.
    pub(crate) verified: usize,
    /// Tokens after its own that a pass computes in the hope that they will be generated.
    pub(crate) guessed: Vec<u32>,
    /// Its reader has fallen behind.
    pub(crate) held: bool,
    pub(crate) cancelled: bool,
}

impl Sequence {
    /// Admits a request that a model can serve.
    pub(crate) fn new(
        mut request: Request,
        arrived: u64,
        config: &ModelConfig,
    ) -> Result<Self, RequestError> {
        let tiers = Arc::new(request.check(config)?);
        let draft = request.drafting(&tiers, config).map_err(RequestError::Draft)?;
        let draft = draft.map(|(tier, mask)| TierDraft::new(tier, mask, &request.tenant));
        let tokens = [&request.prompt[..], &request.generated].concat();
        let guide = request.guide.take();
        let Request { sampling, logprobs, prompt, generated, .. } = &request;
        let bias = request.bias.clone();
        let chooser = Chooser::new(*sampling, bias, *logprobs, prompt, generated, guide);
        Ok(Self {
            root: Prefix::root(&request.tenant, &tiers),
            request,
            tiers,
            chooser,
            verified: tokens.len(),
            tokens,
            cached: 0,
            reported: 0,
            arrived,
            table: PageTable::default(),
            in_pass: false,
            drafter: Drafter::default(),
            draft,
            guessed: Vec::new(),
            held: false,
            cancelled: false,
        })
    }

    /// Whether a pass may take it.
    pub(crate) fn is_free(&self) -> bool {
        !self.in_pass && !self.held
    }

    /// Pages for the tokens that it has, and one more.
    pub(crate) fn pages_soon(&self) -> usize {
        (self.tokens.len() + 1).div_ceil(PAGE_TOKENS)
    }

    /// Whether it has one token to compute.
    pub(crate) fn decodes(&self) -> bool {
        self.tokens.len() - self.cached <= 1
    }

    /// Whether it may use what is in the cache: not if something is wanted of every position.
    pub(crate) fn shares(&self) -> bool {
        !self.request.logits && !self.request.routes
    }

    /// What to do in its next pass, if that has so many rows at most.
    pub(crate) fn guess(&self, rows: usize, config: &ModelConfig) -> Guess {
        if !self.decodes() || !self.shares() {
            return Guess::Verify(Vec::new());
        }
        // The last one that may be generated needs no row of its own.
        let left = self.tokens_max(config).saturating_sub(self.tokens.len() + 1);
        let room = left.min(rows.saturating_sub(1));
        match &self.draft {
            Some(draft) => {
                let wanted = draft.wants(&self.drafter, room);
                let ends = |id: &u32| self.request.stop_at_eos && config.eos_tokens.contains(id);
                let whole = draft.ahead.len() >= wanted || draft.ahead.last().is_some_and(ends);
                match whole {
                    true => Guess::Verify(draft.ahead[..wanted.min(draft.ahead.len())].to_vec()),
                    false => Guess::Draft,
                }
            }
            None if self.request.speculate == Speculation::Ngram => {
                Guess::Verify(self.drafter.guess(&self.tokens, room))
            }
            None => Guess::Verify(Vec::new()),
        }
    }

    /// What is drafted so far, at most so many tokens.
    pub(crate) fn drafted(&self, most: usize) -> Vec<u32> {
        self.draft.iter().flat_map(|draft| &draft.ahead).copied().take(most).collect()
    }

    /// Whether the pass that it is in computes for its draft.
    pub(crate) fn drafts(&self) -> bool {
        self.draft.as_ref().is_some_and(|draft| draft.in_pass)
    }

    /// Pages that its draft could give to somebody else.
    pub(crate) fn spare_pages(&self) -> usize {
        self.draft.as_ref().map_or(0, TierDraft::spare_pages)
    }

    /// Holds it back, or lets it go on.
    pub(crate) fn hold(&mut self, held: bool) {
        self.held = held;
        self.draft.iter_mut().for_each(TierDraft::rest);
    }

    /// Tokens generated so far.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Positions that it can come to need in the cache.
    pub(crate) fn tokens_max(&self, config: &ModelConfig) -> usize {
        self.request.prompt.len().saturating_add(self.request.max_new_tokens).min(config.context)
    }

    /// Why it is at its end, if it is.
    pub(crate) fn end(&self, config: &ModelConfig) -> Option<EndReason> {
        let last = self.tokens.last();
        if self.cancelled {
            Some(EndReason::Cancelled)
        } else if self.generated() > 0
            && self.request.stop_at_eos
            && last.is_some_and(|id| config.eos_tokens.contains(id))
        {
            Some(EndReason::EndOfText)
        } else if self.generated() >= self.request.max_new_tokens
            && self.cached >= self.request.prompt.len()
        {
            Some(EndReason::Length)
        } else if self.tokens.len() >= config.context && self.cached >= self.request.prompt.len() {
            Some(EndReason::Context)
        } else {
            None
        }
    }
}
