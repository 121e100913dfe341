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
//! What goes into a pass is planned by `schedule.rs`; this file carries it out.
//!
//! Invariants: every admitted sequence ends with exactly one [`Event::Ended`] or
//! [`Event::Failed`]; what fails a sequence ends no other; after a failure the next pass begins.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use lite_llm_kernels::{
    device::{Device, DeviceError, Draw},
    kv::{KvDType, KvShape},
};

use tracing::{Span, debug_span};

pub use crate::schedule::{PASS_TOKENS_MAX, ScheduleStats, WAITING_MAX};
use crate::{
    backbone::Backbone,
    expert::{ExpertKey, ExpertStore},
    forward::{Carrier, Chunk, Dispatch, FailedRoute, ForwardPass, Progress},
    moe_layer::{ExpertFailure, run_all},
    residency::{ROUTED_ROWS_MAX, RoutedRow},
    routing::{Route, Routes},
    sampler::{Chosen, Score},
    schedule::{Plan, Schedule},
    sequence::{EndReason, Request, RequestError},
};

/// Passes in flight at most.
pub const PASSES_MAX: usize = 2;

/// Rows of a pass for which the next experts are predicted, at most.
const PREDICTED_ROWS_MAX: usize = 16;

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
        /// How likely it was, if the request asks for it.
        score: Option<Score>,
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
        /// Flat indices `[sparse layers, rows, K]`, in route order; K is the most routes that a token
        /// of this request can have, and a row with fewer ends with −1.
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
    schedule: Schedule,
    passes: BTreeMap<PassId, Pass<D>>,
    next_pass: u64,
    /// Decodes may be in several passes.
    apart: bool,
    carrier: Option<Arc<dyn Carrier<D>>>,
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
            schedule: Schedule::new(pages),
            backbone,
            passes: BTreeMap::new(),
            next_pass: 0,
            apart: false,
            carrier: None,
            events: VecDeque::new(),
        })
    }

    /// The same, whose passes a device carries through the layers where it can.
    pub fn carried_by(mut self, carrier: Option<Arc<dyn Carrier<D>>>) -> Self {
        self.carrier = carrier;
        self
    }

    /// The same, with at most so many tokens in a pass, which never changes what is computed.
    pub fn pass_tokens(mut self, tokens: usize) -> Self {
        self.schedule.pass_tokens = tokens.max(1);
        self
    }

    /// The model.
    pub fn backbone(&self) -> &Arc<Backbone<D>> {
        &self.backbone
    }

    /// Requests that were admitted and have not ended.
    pub fn sequences(&self) -> usize {
        self.schedule.len()
    }

    /// What was scheduled so far.
    pub fn stats(&self) -> ScheduleStats {
        self.schedule.stats()
    }

    /// Whether sequences that decode may begin a pass beside one that decodes, which reads the dense
    /// weights twice: for a caller whose passes wait for something slow.
    pub fn allow_apart(&mut self, apart: bool) {
        self.apart = apart;
    }

    /// Says what time it is: whether drafts of a tier pay is measured by that. It never changes what is
    /// generated.
    pub fn at(&mut self, now: Instant) {
        self.schedule.at(now);
    }

    /// Admits a request under a number of the caller's.
    pub fn submit(&mut self, id: u64, request: Request) -> Result<(), RequestError> {
        self.schedule.submit(id, request, &self.backbone.config)
    }

    /// Ends a request as soon as it is in no pass. Unknown numbers are ignored: the request may
    /// have ended by itself.
    pub fn cancel(&mut self, id: u64) {
        if let Some(sequence) = self.schedule.get_mut(id) {
            sequence.cancelled = true;
            if !sequence.in_pass {
                self.end(id, EndReason::Cancelled);
            }
        }
    }

    /// Holds a sequence back, or lets it go on: for a reader that has fallen behind.
    pub fn hold(&mut self, id: u64, held: bool) {
        if let Some(sequence) = self.schedule.get_mut(id) {
            sequence.hold(held);
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
                Begun::Pass(id) => id,
                // Those that could not begin have ended; others may be able to.
                Begun::Failed => return Step::Advanced,
                Begun::Nothing => return Step::Idle,
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
    pub fn dispatch(&self, pass: PassId) -> Result<Dispatch<'_>, DeviceError> {
        self.passes[&pass].forward.dispatch()
    }

    /// The routes of a pass's dispatch.
    pub fn routes(&self, pass: PassId) -> Option<&Routes> {
        self.passes.get(&pass).map(|pass| pass.forward.routes())
    }

    /// Tells the device what a pass reads once its experts are there: for a caller who has to
    /// wait for them, and may call [`Device::prefetch_piece`] meanwhile.
    pub fn prefetch_next(&self, pass: PassId) {
        if let Some(pass) = self.passes.get(&pass) {
            pass.forward.prefetch_next();
        }
    }

    /// What the next sparse layer's gates say of the rows of a pass: see [`ForwardPass::predict`].
    pub fn predicted(&self, pass: PassId) -> Result<Routes, DeviceError> {
        self.passes.get(&pass).map_or_else(|| Ok(Routes::default()), |pass| pass.forward.predict())
    }

    /// The same, but no rows for a pass of so many that it needs nearly all experts.
    pub fn predict(&self, pass: PassId) -> Routes {
        let pass = self.passes.get(&pass).filter(|pass| pass.forward.rows() <= PREDICTED_ROWS_MAX);
        // What the device cannot do now it will say when it is to do it.
        pass.and_then(|pass| pass.forward.predict().ok()).unwrap_or_default()
    }

    /// What the rows of a pass's dispatch are routed to, for a policy to learn from: the layer, and
    /// the last rows of each sequence. `early` is what was predicted for them, if anything was.
    pub fn routed(&self, pass: PassId, early: &Routes) -> Option<(u16, Vec<RoutedRow>)> {
        let Pass { forward, sequences, .. } = self.passes.get(&pass)?;
        let routes = forward.routes();
        let layer = routes.all().first()?.key.layer;
        let keys = |routes: &[Route]| routes.iter().map(|route| route.key).collect();
        let (mut rows, mut first) = (Vec::new(), 0);
        for (chunk, &stream) in forward.chunks().iter().zip(sequences) {
            let sequence = self.schedule.get(stream);
            let tokens = sequence.map_or(&[][..], |sequence| &sequence.tokens);
            let all = chunk.tokens.len();
            // What a draft is routed to says nothing of the answer's tokens.
            if sequence.is_some_and(|sequence| sequence.drafts()) {
                first += all;
                continue;
            }
            for row in all.saturating_sub(ROUTED_ROWS_MAX)..all {
                let experts: Vec<ExpertKey> = keys(routes.row(first + row));
                if experts.is_empty() {
                    continue;
                }
                let near = (early.rows() == routes.rows()).then(|| keys(early.row(first + row)));
                let at = chunk.start + row;
                let token =
                    |back: usize| at.checked_sub(back).and_then(|at| tokens.get(at)).copied();
                let last = std::array::from_fn(|back| token(back).unwrap_or(0));
                rows.push(RoutedRow { stream, last, experts, near: near.unwrap_or_default() });
            }
            first += all;
        }
        Some((layer, rows))
    }

    /// The span of the layer that a pass is in.
    pub fn span(&self, pass: PassId) -> Span {
        self.passes.get(&pass).map_or_else(Span::none, |pass| pass.forward.layer_span().clone())
    }

    /// Gives a pass the outputs of its experts, one per route of its dispatch. The requests of
    /// routes that failed end when the pass does; their parts may be anything.
    pub fn combine(&mut self, id: PassId, parts: &[&[f32]], failed: &[FailedRoute]) {
        let Some(pass) = self.passes.get_mut(&id) else { return };
        pass.waiting = false;
        if let Err(error) = pass.forward.combine(parts, failed) {
            self.fail(id, &error.to_string());
        }
    }

    /// Ends a pass and all requests in it: for what concerns them all.
    pub fn fail(&mut self, id: PassId, reason: &str) {
        if let Some(pass) = self.passes.remove(&id) {
            self.fail_all(&pass, reason);
        }
    }

    fn fail_all(&mut self, pass: &Pass<D>, reason: &str) {
        for (chunk, &sequence) in pass.sequences.iter().enumerate() {
            let reason = match pass.forward.failure(chunk) {
                Some(own) => own.to_string(),
                None => reason.to_owned(),
            };
            self.fail_sequence(sequence, reason);
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
        let outputs = self.dispatch(pass).map(|dispatch| {
            let (outputs, failures) = run_all(&*device, store, &dispatch.hidden, dispatch.routes);
            (outputs, failed_routes(dispatch.routes, &failures))
        });
        drop(experts);
        match outputs {
            Ok((outputs, failed)) => {
                let width = self.backbone.config.hidden;
                let parts: Vec<&[f32]> = outputs.chunks_exact(width).collect();
                self.combine(pass, &parts, &failed);
            }
            Err(error) => self.fail(pass, &error.to_string()),
        }
    }

    /// Begins the next pass.
    fn begin(&mut self) -> Begun {
        let Some(plan) = self.schedule.plan(self.apart, &self.backbone.config) else {
            return Begun::Nothing;
        };
        let Plan { chunks, sequences, record, span } = plan;
        let begun = ForwardPass::new(self.backbone.clone(), chunks, record, span);
        let begun = begun.and_then(|mut pass| {
            if let Some(carrier) = &self.carrier {
                pass.carried_by(&**carrier, self.draws(&pass, &sequences).as_deref())?;
            }
            Ok(pass)
        });
        match begun {
            Ok(forward) => {
                let id = PassId(self.next_pass);
                self.next_pass += 1;
                self.passes.insert(id, Pass { forward, sequences, waiting: false });
                Begun::Pass(id)
            }
            Err(error) => {
                for sequence in sequences {
                    self.fail_sequence(sequence, error.to_string());
                }
                Begun::Failed
            }
        }
    }

    /// Takes a finished pass apart: tokens, logits, routes, ends.
    fn finish(&mut self, id: PassId) {
        let Some(pass) = self.passes.remove(&id) else { return };
        let outcome = pass.forward.choose(|| self.draws(&pass.forward, &pass.sequences));
        let outcome = outcome.and_then(|chosen| match chosen {
            Some(tokens) => Ok((Some(tokens), Cow::default())),
            None => Ok((None, pass.forward.logits()?)),
        });
        let (chosen, logits) = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return self.fail_all(&pass, &error.to_string()),
        };
        let Pass { forward, sequences, .. } = &pass;
        let vocab = self.backbone.config.vocab;
        self.schedule.turn(sequences);
        let mut chosen = chosen.as_deref();
        let (mut first_row, mut rest) = (0, &*logits);
        for (index, (&id, chunk)) in sequences.iter().zip(forward.chunks()).enumerate() {
            let rows = forward.logit_rows(index);
            let told = match &mut chosen {
                Some(tokens) => Told::Token(tokens.split_off(..rows).and_then(<[u32]>::first)),
                None => {
                    let (mine, others) = rest.split_at(rows * vocab);
                    rest = others;
                    Told::Logits(mine)
                }
            };
            let draft = self.schedule.was_draft(id);
            match forward.failure(index) {
                Some(_) if draft => self.schedule.draft_failed(id),
                None if draft => self.schedule.drafted(id, chunk.tokens.len(), told.logits()),
                Some(error) => self.fail_sequence(id, error.to_string()),
                None => self.take(id, chunk, first_row, told, forward.recorded_routes()),
            }
            if draft && self.schedule.get(id).is_some_and(|sequence| sequence.cancelled) {
                self.end(id, EndReason::Cancelled);
            }
            first_row += chunk.tokens.len();
        }
    }

    /// What the device needs to choose a token of each row of a pass's logits; `None` if one of its
    /// sequences wants more of them.
    fn draws(&self, pass: &ForwardPass<D>, sequences: &[u64]) -> Option<Vec<Draw>> {
        let rows = sequences.iter().enumerate();
        let rows = rows.filter(|(index, _)| pass.logit_rows(*index) > 0);
        rows.map(|(index, &id)| {
            let sequence = self.schedule.get(id)?;
            let one = pass.logit_rows(index) == 1 && sequence.guessed.is_empty();
            let draws = one && !sequence.request.logits && !sequence.drafts();
            draws.then(|| sequence.chooser.draw(sequence.tokens.len() as u64)).flatten()
        })
        .collect()
    }

    /// Takes what a pass computed for one sequence, whose chunk begins at row `first_row`.
    fn take(
        &mut self,
        id: u64,
        chunk: &Chunk,
        first_row: usize,
        told: Told<'_>,
        routes: &[Routes],
    ) {
        let (mut chosen, logits) = match told {
            Told::Token(token) => (token.copied(), &[][..]),
            Told::Logits(logits) => (None, logits),
        };
        let config = &self.backbone.config;
        let rows = chunk.tokens.len();
        self.schedule.computed(id, rows);
        let sequence = self.schedule.get_mut(id).expect("carried sequences exist");
        let end = sequence.cached;
        // What was told before it lost its pages is not told again.
        let first = chunk.start.max(sequence.reported);
        let skipped = first - chunk.start;
        if sequence.request.routes && first < end {
            let moe = config.moe.as_ref();
            let k = moe.map_or(0, |moe| moe.routes_max(|tier| chunk.tiers.allows(tier)));
            let mut experts = Vec::with_capacity(routes.len() * (rows - skipped) * k);
            for (routes, moe) in routes.iter().zip(moe.into_iter().cycle()) {
                for row in first_row + skipped..first_row + rows {
                    let end = experts.len() + k;
                    experts.extend(routes.flat_row(row, moe).map(|expert| expert as i32));
                    experts.resize(end, -1);
                }
            }
            let (rows, layers) = (rows - skipped, routes.len());
            self.events.push_back(Event::Routes { sequence: id, first, rows, layers, experts });
        }
        if sequence.request.logits && first < end {
            let values = logits[skipped * config.vocab..].to_vec();
            self.events.push_back(Event::Logits { sequence: id, first, values });
        }
        if chunk.start < sequence.request.prompt.len() && sequence.reported < end {
            let (done, total) = (sequence.cached, sequence.request.prompt.len());
            self.events.push_back(Event::Prefilled { sequence: id, done, total });
        }
        sequence.reported = sequence.reported.max(end);
        let at_end = sequence.cached == sequence.tokens.len();
        // One that goes on elsewhere may be at its end already.
        let mut goes_on = at_end && sequence.end(config).is_none();
        // The rows of its last token and, if that is followed by what was guessed, of the guesses.
        let guessed = sequence.guessed.len();
        let mut last = logits.chunks_exact(config.vocab).rev().take(guessed + 1).rev();
        let mut right = 0;
        while goes_on && sequence.generated() < sequence.request.max_new_tokens {
            let (position, index) = (sequence.tokens.len() as u64, sequence.generated());
            let choice = match (chosen.take(), last.next()) {
                (Some(id), _) => Ok(Chosen { id, score: None }),
                (None, Some(logits)) => sequence.chooser.choose(logits, position),
                (None, None) => break,
            };
            let Chosen { id: token, score } = match choice {
                Ok(chosen) => chosen,
                Err(error) => return self.fail_sequence(id, error.to_string()),
            };
            goes_on = sequence.guessed.get(right) == Some(&token);
            sequence.tokens.push(token);
            self.events.push_back(Event::Token { sequence: id, index, id: token, score });
            goes_on &= sequence.end(config).is_none();
            right += usize::from(goes_on);
        }
        let end = sequence.end(config);
        self.schedule.verified(id, right);
        if let Some(reason) = end {
            self.end(id, reason);
        }
    }

    fn end(&mut self, id: u64, reason: EndReason) {
        if let Some(sequence) = self.schedule.release(id) {
            let generated = sequence.generated();
            self.events.push_back(Event::Ended { sequence: id, reason, generated });
        }
    }

    fn fail_sequence(&mut self, id: u64, reason: String) {
        if self.schedule.release(id).is_some() {
            self.events.push_back(Event::Failed { sequence: id, reason });
        }
    }
}

/// What a pass tells of a sequence's last rows.
enum Told<'a> {
    /// The token that the device has chosen, if its rows wanted logits.
    Token(Option<&'a u32>),
    /// Their logits.
    Logits(&'a [f32]),
}

impl<'a> Told<'a> {
    /// None where the device has chosen.
    fn logits(self) -> &'a [f32] {
        match self {
            Told::Token(_) => &[],
            Told::Logits(logits) => logits,
        }
    }
}

/// What came of beginning a pass.
enum Begun {
    Pass(PassId),
    /// Its sequences have ended.
    Failed,
    /// No sequence can go forward.
    Nothing,
}

/// The routes of experts that could not be run.
pub fn failed_routes(routes: &Routes, failures: &[ExpertFailure]) -> Vec<FailedRoute> {
    if failures.is_empty() {
        return Vec::new();
    }
    let failed = |(index, route): (usize, &Route)| {
        let failure = failures.iter().find(|failure| failure.key == route.key)?;
        Some(FailedRoute { route: index, reason: failure.error.to_string() })
    };
    routes.all().iter().enumerate().filter_map(failed).collect()
}
