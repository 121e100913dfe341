//! The sequences of one node and the passes that carry them forward.
//!
//! A pure machine but for arithmetic: no threads, no clock, no I/O. The caller repeats
//!
//! ```text
//! step ─▶ Dispatch(pass): run its experts (dispatch), then combine(pass, outputs) or fail(pass)
//!      ─▶ Advanced:       look for other work, call again
//!      ─▶ Idle:           nothing to do until something is submitted or combined
//! ```
//!
//! and drains [`Engine::poll_event`]. Several passes may be in flight, so that one waits for
//! experts while another computes. Sequences that decode go before prompts.
//!
//! Invariants: a sequence is in at most one pass; its pages are reserved for its whole life
//! when it is admitted, so a running sequence never waits for memory; every admitted sequence
//! ends with exactly one [`Event::Ended`] or [`Event::Failed`].

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use lite_llm_kernels::{
    device::{Device, DeviceError},
    kv::{KvDType, KvShape, PAGE_TOKENS},
};

use tracing::{Span, debug_span};

use crate::{
    backbone::Backbone,
    expert::ExpertStore,
    forward::{Chunk, Dispatch, ForwardError, ForwardPass, Progress, WantedLogits},
    kv::PagePool,
    moe_layer::run_all,
    sampler::sample,
    sequence::{EndReason, Request, RequestError, Sequence},
};

/// Tokens of one pass at most.
pub const PASS_TOKENS_MAX: usize = 512;
/// Passes in flight at most.
pub const PASSES_MAX: usize = 2;
/// Requests that may wait for pages.
pub const WAITING_MAX: usize = 1024;

/// A pass in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PassId(pub u64);

/// What [`Engine::step`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// This pass needs experts.
    Dispatch(PassId),
    /// Something went forward; there may be more to do.
    Advanced,
    /// Nothing can go forward now.
    Idle,
}

/// What happened to a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Positions of the prompt that are done.
    Prefilled {
        /// Which request.
        sequence: u64,
        /// Positions done.
        done: usize,
        /// Positions of the prompt.
        total: usize,
    },
    /// A token was generated.
    Token {
        /// Which request.
        sequence: u64,
        /// Its place among the generated tokens.
        index: usize,
        /// The token.
        id: u32,
    },
    /// Logits of consecutive positions.
    Logits {
        /// Which request.
        sequence: u64,
        /// Position of the first row.
        first: usize,
        /// `[rows, vocab]`.
        values: Vec<f32>,
    },
    /// Experts of consecutive positions.
    Routes {
        /// Which request.
        sequence: u64,
        /// Position of the first row.
        first: usize,
        /// Rows.
        rows: usize,
        /// Sparse layers.
        layers: usize,
        /// Flat indices `[sparse layers, rows, K]`, in route order.
        experts: Vec<i32>,
    },
    /// The request ended well.
    Ended {
        /// Which request.
        sequence: u64,
        /// Why.
        reason: EndReason,
        /// Tokens generated.
        generated: usize,
    },
    /// The request failed.
    Failed {
        /// Which request.
        sequence: u64,
        /// Why.
        reason: String,
    },
}

struct Pass<D: Device> {
    forward: ForwardPass<D>,
    sequences: Vec<u64>,
    waiting: bool,
}

/// See the module's text.
pub struct Engine<D: Device> {
    backbone: Arc<Backbone<D>>,
    arena: D::KvArena,
    pool: PagePool,
    sequences: BTreeMap<u64, Sequence>,
    waiting: VecDeque<u64>,
    running: Vec<u64>,
    passes: BTreeMap<PassId, Pass<D>>,
    next_pass: u64,
    events: VecDeque<Event>,
}

impl<D: Device> Engine<D> {
    /// An engine whose caches take at most `kv_bytes` (at least one page is always there), and
    /// keep keys and values as they were computed.
    pub fn new(backbone: Arc<Backbone<D>>, kv_bytes: u64) -> Result<Self, DeviceError> {
        Self::with_cache(backbone, kv_bytes, KvDType::F32)
    }

    /// The same, with the format of keys and values.
    pub fn with_cache(
        backbone: Arc<Backbone<D>>,
        kv_bytes: u64,
        kv_dtype: KvDType,
    ) -> Result<Self, DeviceError> {
        let attention = &backbone.config.attention;
        let shape = KvShape {
            layers: backbone.config.layers.len(),
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            dtype: kv_dtype,
        };
        let pages = (kv_bytes / shape.page_bytes() as u64).clamp(1, u32::MAX.into()) as usize;
        Ok(Self {
            arena: backbone.device.kv_arena(shape, pages)?,
            pool: PagePool::new(pages),
            backbone,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            passes: BTreeMap::new(),
            next_pass: 0,
            events: VecDeque::new(),
        })
    }

    /// The model.
    pub fn backbone(&self) -> &Arc<Backbone<D>> {
        &self.backbone
    }

    /// Requests that were admitted and have not ended.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Admits a request under a number of the caller's.
    pub fn submit(&mut self, id: u64, request: Request) -> Result<(), RequestError> {
        let sequence = Sequence::new(request, &self.backbone.config)?;
        let tokens = sequence.tokens_max(&self.backbone.config);
        let (needed, pages) = (tokens.div_ceil(PAGE_TOKENS), self.pool.capacity());
        if needed > pages {
            return Err(RequestError::CacheTooSmall { needed, tokens, pages });
        }
        if self.sequences.contains_key(&id) {
            return Err(RequestError::Duplicate(id));
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(RequestError::QueueFull { waiting: self.waiting.len() });
        }
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
        Ok(())
    }

    /// Ends a request as soon as it is in no pass. Unknown numbers are ignored: the request may
    /// have ended by itself.
    pub fn cancel(&mut self, id: u64) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.cancelled = true;
            if !sequence.in_pass {
                self.end(id, EndReason::Cancelled);
            }
        }
    }

    /// Holds a sequence back, or lets it go on: for a reader that has fallen behind.
    pub fn hold(&mut self, id: u64, held: bool) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.held = held;
        }
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Goes one step forward: see the module's text.
    pub fn step(&mut self) -> Step {
        let ready = self.passes.iter().find(|(_, pass)| !pass.waiting).map(|(&id, _)| id);
        let id = match ready {
            Some(id) => id,
            None if self.passes.len() < PASSES_MAX => match self.begin() {
                Some(id) => id,
                None => return Step::Idle,
            },
            None => return Step::Idle,
        };
        let pass = self.passes.get_mut(&id).expect("it was found or begun above");
        match pass.forward.advance(&mut self.arena) {
            Ok(Progress::Experts) => {
                pass.waiting = true;
                Step::Dispatch(id)
            }
            Ok(Progress::Logits) => {
                self.finish(id);
                Step::Advanced
            }
            Err(error) => {
                self.fail(id, &error.to_string());
                Step::Advanced
            }
        }
    }

    /// What a pass needs, after [`Step::Dispatch`].
    ///
    /// # Panics
    /// If the pass does not exist.
    pub fn dispatch(&self, pass: PassId) -> Result<Dispatch<'_>, ForwardError> {
        self.passes[&pass].forward.dispatch()
    }

    /// Tells the device what a pass reads when its experts are there: for a caller who has to
    /// wait for them, and may call [`Device::fetch_expected`] meanwhile.
    pub fn expect_next(&self, pass: PassId) {
        if let Some(pass) = self.passes.get(&pass) {
            pass.forward.expect_next();
        }
    }

    /// The span of the layer that a pass is in.
    pub fn span(&self, pass: PassId) -> Span {
        self.passes.get(&pass).map_or_else(Span::none, |pass| pass.forward.layer_span().clone())
    }

    /// Gives a pass the outputs of its experts, one per route of its dispatch.
    pub fn combine(&mut self, id: PassId, parts: &[&[f32]]) {
        let Some(pass) = self.passes.get_mut(&id) else { return };
        pass.waiting = false;
        if let Err(error) = pass.forward.combine(parts) {
            self.fail(id, &error.to_string());
        }
    }

    /// Ends a pass and all requests in it.
    pub fn fail(&mut self, id: PassId, reason: &str) {
        let Some(pass) = self.passes.remove(&id) else { return };
        for sequence in pass.sequences {
            self.release(sequence);
            self.events.push_back(Event::Failed { sequence, reason: reason.to_owned() });
        }
    }

    /// Runs everything that was submitted, with all experts in one store.
    pub fn run_local(&mut self, store: &dyn ExpertStore<D::Matrix>) {
        loop {
            match self.step() {
                Step::Idle => return,
                Step::Advanced => {}
                Step::Dispatch(pass) => self.run_pass(pass, store),
            }
        }
    }

    /// Runs all experts that a pass needs in one store.
    pub fn run_pass(&mut self, pass: PassId, store: &dyn ExpertStore<D::Matrix>) {
        let experts = debug_span!(parent: &self.span(pass), "experts").entered();
        let device = self.backbone.device.clone();
        let outputs = self
            .dispatch(pass)
            .and_then(|dispatch| Ok(run_all(&*device, store, &dispatch.hidden, dispatch.routes)?));
        drop(experts);
        match outputs {
            Ok(outputs) => {
                let width = self.backbone.config.hidden;
                let parts: Vec<&[f32]> = outputs.chunks_exact(width).collect();
                self.combine(pass, &parts);
            }
            Err(error) => self.fail(pass, &error.to_string()),
        }
    }

    /// Moves waiting sequences to the running ones while there are pages for their whole life.
    fn admit(&mut self) {
        while let Some(&id) = self.waiting.front() {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                self.waiting.pop_front();
                continue;
            };
            let tokens = sequence.tokens_max(&self.backbone.config);
            if sequence.table.reserve(&mut self.pool, tokens).is_err() {
                return;
            }
            self.waiting.pop_front();
            self.running.push(id);
        }
    }

    /// Begins a pass over the running sequences that are in none, if there are any.
    fn begin(&mut self) -> Option<PassId> {
        self.admit();
        let mut free: Vec<u64> =
            self.running.iter().copied().filter(|id| self.sequences[id].is_free()).collect();
        // Decoding sequences (one token to go) first; the sort is stable, so those that waited
        // longest lead.
        free.sort_by_key(|id| {
            let sequence = &self.sequences[id];
            sequence.tokens.len() - sequence.cached > 1
        });
        let (mut chunks, mut carried, mut room) = (Vec::new(), Vec::new(), PASS_TOKENS_MAX);
        let mut record = false;
        for id in free {
            if room == 0 {
                break;
            }
            let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
            let limit = match sequence.request.prefill_chunk {
                0 => PASS_TOKENS_MAX,
                chunk => chunk,
            };
            let left = sequence.tokens.len() - sequence.cached;
            let count = left.min(limit).min(room);
            let logits = match (sequence.request.logits, count == left) {
                (true, _) => WantedLogits::All,
                (false, true) if sequence.request.max_new_tokens > 0 => WantedLogits::Last,
                _ => WantedLogits::None,
            };
            chunks.push(Chunk {
                tokens: sequence.tokens[sequence.cached..][..count].to_vec(),
                start: sequence.cached,
                pages: sequence.table.pages().to_vec(),
                tiers: sequence.tiers.clone(),
                logits,
            });
            record |= sequence.request.routes;
            sequence.in_pass = true;
            carried.push(id);
            room -= count;
        }
        if chunks.is_empty() {
            return None;
        }
        let id = PassId(self.next_pass);
        self.next_pass += 1;
        let rows = PASS_TOKENS_MAX - room;
        // A pass belongs to its oldest request's trace; the others are linked to it.
        let mut spans = carried.iter().map(|id| &self.sequences[id].request.span);
        let first = spans.next().cloned().unwrap_or_else(Span::none);
        let span = debug_span!(parent: &first, "pass", rows, sequences = carried.len());
        spans.for_each(|other| {
            span.follows_from(other);
        });
        match ForwardPass::new(self.backbone.clone(), chunks, record, span) {
            Ok(forward) => {
                self.passes.insert(id, Pass { forward, sequences: carried, waiting: false });
                Some(id)
            }
            Err(error) => {
                for sequence in carried {
                    self.release(sequence);
                    self.events.push_back(Event::Failed { sequence, reason: error.to_string() });
                }
                None
            }
        }
    }

    /// Takes a finished pass apart: tokens, logits, routes, ends.
    fn finish(&mut self, id: PassId) {
        let Some(Pass { forward, sequences, .. }) = self.passes.remove(&id) else { return };
        // Those that had their turn go to the back.
        self.running.retain(|id| !sequences.contains(id));
        self.running.extend(&sequences);
        let backbone = self.backbone.clone();
        let config = &backbone.config;
        let logits = match forward.logits() {
            Ok(logits) => logits,
            Err(error) => {
                for sequence in sequences {
                    self.release(sequence);
                    self.events.push_back(Event::Failed { sequence, reason: error.to_string() });
                }
                return;
            }
        };
        let (mut first_row, mut rest) = (0, &*logits);
        for (&id, chunk) in sequences.iter().zip(forward.chunks()) {
            let rows = chunk.tokens.len();
            let wanted = match chunk.logits {
                WantedLogits::None => 0,
                WantedLogits::Last => 1,
                WantedLogits::All => rows,
            };
            let (mine, others) = rest.split_at(wanted * config.vocab);
            rest = others;
            let sequence = self.sequences.get_mut(&id).expect("carried sequences exist");
            sequence.in_pass = false;
            sequence.cached += rows;
            if sequence.request.routes {
                let moe = config.moe.as_ref();
                let experts = forward
                    .recorded_routes()
                    .iter()
                    .flat_map(|routes| {
                        (first_row..first_row + rows)
                            .flat_map(|row| moe.map(|moe| routes.flat_row(row, moe)))
                            .flatten()
                    })
                    .map(|expert| expert as i32)
                    .collect();
                self.events.push_back(Event::Routes {
                    sequence: id,
                    first: chunk.start,
                    rows,
                    layers: forward.recorded_routes().len(),
                    experts,
                });
            }
            first_row += rows;
            if sequence.request.logits {
                let (first, values) = (chunk.start, mine.to_vec());
                self.events.push_back(Event::Logits { sequence: id, first, values });
            }
            if chunk.start < sequence.request.prompt.len() {
                let (done, total) = (sequence.cached, sequence.request.prompt.len());
                self.events.push_back(Event::Prefilled { sequence: id, done, total });
            }
            let at_end = sequence.cached == sequence.tokens.len();
            if at_end
                && sequence.generated() < sequence.request.max_new_tokens
                && !sequence.cancelled
            {
                let last = &mine[mine.len() - config.vocab..];
                let token = sample(last, &sequence.request.sampling, sequence.tokens.len() as u64);
                let index = sequence.generated();
                sequence.tokens.push(token);
                self.events.push_back(Event::Token { sequence: id, index, id: token });
            }
            if let Some(reason) = self.sequences[&id].end(config) {
                self.end(id, reason);
            }
        }
    }

    fn end(&mut self, id: u64, reason: EndReason) {
        if let Some(sequence) = self.release(id) {
            let generated = sequence.generated();
            self.events.push_back(Event::Ended { sequence: id, reason, generated });
        }
    }

    fn release(&mut self, id: u64) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        sequence.table.release(&mut self.pool);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        Some(sequence)
    }
}
