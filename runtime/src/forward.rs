//! One forward pass: a batch of chunks of sequences through all layers.
//!
//! [`ForwardPass::advance`] runs until it needs experts or has logits. It *returns* what it
//! needs instead of calling out, so the same code runs alone, in an actor and in a test:
//!
//! ```text
//! advance ─▶ Experts ─▶ (caller runs dispatch().routes on its rows, anywhere) ─▶ combine ─▶ advance ─▶ … ─▶ Logits
//! ```
//!
//! Shapes: `N` rows = all tokens of all chunks, `H` hidden, `A` = heads · head_dim,
//! `B` = kv_heads · head_dim, `L` rows whose logits are wanted, `V` vocabulary.
//!
//! Invariants:
//! - A row's values are a function of its own sequence alone (determinism contract): chunks share
//!   kernels, never numbers.
//! - What fails one row ends its chunk alone ([`ForwardPass::failure`]): its rows become zeros, are
//!   routed nowhere, and leave nothing in the cache that is not finite. The others have the bits
//!   that they would have had without it. Only what the device refuses as a whole ends a pass.

mod carrier;
mod failure;

use std::{borrow::Cow, ops::Range, sync::Arc};

use lite_llm_kernels::{
    device::{Device, DeviceError, Draw, Projection},
    kv::{KvSlot, PAGE_TOKENS, Query},
};

use tracing::{Span, debug_span, trace_span};

pub use self::carrier::{Carried, Carrier, Reached};
use crate::{
    backbone::{Backbone, BackboneLayer, FeedForwardLayer},
    routing::Routes,
    tier::TierMask,
};

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
    /// Position of the first of them; all before it are in the cache.
    pub start: usize,
    /// The sequence's pages, with room for these tokens.
    pub pages: Vec<u32>,
    /// Tiers that this sequence may use.
    pub tiers: Arc<TierMask>,
    /// Rows whose logits are wanted.
    pub logits: WantedLogits,
}

/// Rows of a chunk whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedLogits {
    /// None: a chunk of a prompt that goes on.
    None,
    /// The last row: what to sample from.
    Last,
    /// Every row: evaluation.
    All,
}

/// Where a pass has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Experts are needed: see [`ForwardPass::dispatch`], then [`ForwardPass::combine`].
    Experts,
    /// Done: see [`ForwardPass::logits`].
    Logits,
}

/// What experts are needed for.
pub struct Dispatch<'a> {
    /// Layer of the model.
    pub layer: usize,
    /// Normalised hidden states `[N, H]`.
    pub hidden: Cow<'a, [f32]>,
    /// Routes of the N rows.
    pub routes: &'a Routes,
}

/// An output that did not come: the row that it was for cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedRoute {
    /// Which route of the dispatch.
    pub route: usize,
    /// Why, naming the expert.
    pub reason: String,
}

/// Why a chunk ended early; the other chunks of its pass go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChunkError {
    /// A number is NaN or infinite.
    #[error(
        "position {position}, token {token}: {tensor} holds {value}; the model's weights are \
         damaged or too large: `lite-llm verify` its folder, or import it again"
    )]
    NotFinite {
        /// Position in the sequence.
        position: usize,
        /// The token there.
        token: u32,
        /// Which tensor, with its layer.
        tensor: String,
        /// What it holds.
        value: f32,
    },
    /// An expert could not be run.
    #[error("position {position}: {reason}")]
    Expert {
        /// Position in the sequence.
        position: usize,
        /// Why, naming the expert.
        reason: String,
    },
}

/// One batch on its way through the layers.
pub struct ForwardPass<D: Device> {
    backbone: Arc<Backbone<D>>,
    chunks: Vec<Chunk>,
    /// Why chunks ended early, one entry per chunk.
    failures: Vec<Option<ChunkError>>,
    /// Chunks that failed and whose rows in the cache are still to be cleared.
    unclean: Vec<usize>,
    slots: Vec<KvSlot>,
    layer: usize,
    waiting: bool,
    record: bool,
    recorded: Vec<Routes>,
    routes: Routes,
    /// Without room before the first layer is computed.
    tensors: Tensors<D>,
    started: bool,
    carried: Option<Box<dyn Carried<D>>>,
    /// Tokens that a carrier has chosen.
    chosen: Option<Vec<u32>>,
    span: Span,
    layer_span: Span,
}

/// Activations of a pass, allocated for its rows.
pub struct Tensors<D: Device> {
    /// Residual stream `[N, H]`.
    pub x: D::Tensor,
    /// Rotary table `[N, head_dim]`.
    pub rotary: D::Tensor,
    /// Normalised states `[N, H]`.
    pub normed: D::Tensor,
    /// Queries `[N, A]`.
    pub q: D::Tensor,
    /// Keys `[N, B]`.
    pub k: D::Tensor,
    /// Values `[N, B]`.
    pub v: D::Tensor,
    /// Output of attention `[N, A]`.
    pub attended: D::Tensor,
    /// What is added to the residual stream `[N, H]`.
    pub delta: D::Tensor,
    /// `[L, H]`.
    pub wanted: D::Tensor,
    /// `[L, V]`.
    pub logits: D::Tensor,
}

impl<D: Device> Tensors<D> {
    /// Room for so many rows.
    fn new(backbone: &Backbone<D>, rows: usize) -> Result<Self, DeviceError> {
        let (device, attention) = (&*backbone.device, &backbone.config.attention);
        let (hidden, head) = (backbone.config.hidden, attention.head_dim);
        let tensor = |cols| device.tensor(rows, cols);
        Ok(Self {
            x: tensor(hidden)?,
            rotary: tensor(head)?,
            normed: tensor(hidden)?,
            q: tensor(attention.heads * head)?,
            k: tensor(attention.kv_heads * head)?,
            v: tensor(attention.kv_heads * head)?,
            attended: tensor(attention.heads * head)?,
            delta: tensor(hidden)?,
            wanted: device.tensor(0, 0)?,
            logits: device.tensor(0, 0)?,
        })
    }
}

/// The tiers that each row may use.
fn tiers(chunks: &[Chunk]) -> Vec<&TierMask> {
    chunks.iter().flat_map(|c| std::iter::repeat_n(&*c.tiers, c.tokens.len())).collect()
}

/// Where a position of a sequence lies in the cache.
fn slot(pages: &[u32], position: usize) -> KvSlot {
    KvSlot { page: pages[position / PAGE_TOKENS], offset: (position % PAGE_TOKENS) as u32 }
}

impl<D: Device> ForwardPass<D> {
    /// Begins a pass; `record` keeps every sparse layer's routes; the spans of the layers are
    /// children of `span`.
    ///
    /// # Panics
    /// If a chunk is empty or its pages have no room for it.
    pub fn new(
        backbone: Arc<Backbone<D>>,
        chunks: Vec<Chunk>,
        record: bool,
        span: Span,
    ) -> Result<Self, DeviceError> {
        let mut slots = Vec::new();
        for chunk in &chunks {
            assert!(!chunk.tokens.is_empty(), "a chunk has tokens");
            let positions = chunk.start..chunk.start + chunk.tokens.len();
            slots.extend(positions.map(|position| slot(&chunk.pages, position)));
        }
        let tensors = Tensors::new(&backbone, 0)?;
        Ok(Self {
            backbone,
            failures: vec![None; chunks.len()],
            unclean: Vec::new(),
            chunks,
            slots,
            layer: 0,
            waiting: false,
            record,
            recorded: Vec::new(),
            routes: Routes::default(),
            tensors,
            started: false,
            carried: None,
            chosen: None,
            layer_span: Span::none(),
            span,
        })
    }

    /// Lets a carrier take it through the layers, where it can. Before [`ForwardPass::advance`]. With
    /// `draws`, one for each row whose logits are wanted, it may choose the tokens, too: then there are
    /// no logits.
    pub fn carried_by(
        &mut self,
        carrier: &dyn Carrier<D>,
        draws: Option<&[Draw]>,
    ) -> Result<(), DeviceError> {
        // Who wants to see the routes wants them on the host.
        if !self.record {
            self.carried = carrier.begin(&self.backbone, &self.chunks, draws)?;
        }
        Ok(())
    }

    /// Takes tokens and positions to the device, for the first layer.
    fn start(&mut self) -> Result<(), DeviceError> {
        let backbone = &*self.backbone;
        let device = &*backbone.device;
        let ids: Vec<u32> = self.chunks.iter().flat_map(|c| &c.tokens).copied().collect();
        if !self.started {
            let positions = self.chunks.iter().flat_map(|c| (c.start..).take(c.tokens.len()));
            let positions: Vec<u32> = positions.map(|position| position as u32).collect();
            let mut tensors = Tensors::new(backbone, ids.len())?;
            let (inv_freq, scale) = (&backbone.inv_freq, backbone.rotary_scale);
            device.rotary_table(&positions, inv_freq, scale, &mut tensors.rotary)?;
            self.tensors = tensors;
            self.started = true;
        }
        device.embed(&backbone.embed, &ids, &mut self.tensors.x)
    }

    /// The chunks of this batch.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Why a chunk ended early, if it did.
    pub fn failure(&self, chunk: usize) -> Option<&ChunkError> {
        self.failures[chunk].as_ref()
    }

    /// Rows of [`ForwardPass::logits`] that belong to a chunk.
    pub fn logit_rows(&self, chunk: usize) -> usize {
        match self.chunks[chunk].logits {
            _ if self.failures[chunk].is_some() => 0,
            WantedLogits::None => 0,
            WantedLogits::Last => 1,
            WantedLogits::All => self.chunks[chunk].tokens.len(),
        }
    }

    /// The span of the layer that it is in.
    pub fn layer_span(&self) -> &Span {
        &self.layer_span
    }

    /// Runs until experts are needed or logits are there.
    ///
    /// # Panics
    /// If it was called while experts are awaited.
    pub fn advance(&mut self, arena: &mut D::KvArena) -> Result<Progress, DeviceError> {
        assert!(!self.waiting, "combine comes before advance");
        let backbone = self.backbone.clone();
        if !self.started && !self.carried.as_ref().is_some_and(|carried| carried.is_whole()) {
            self.start()?;
        }
        while let Some(layer) = backbone.layers.get(self.layer) {
            self.clean(arena)?;
            if self.failures.iter().all(Option::is_some) {
                break;
            }
            self.layer_span = debug_span!(parent: &self.span, "layer", layer = self.layer);
            let _layer = self.layer_span.clone().entered();
            let device = &*backbone.device;
            let attended = match &mut self.carried {
                Some(carried) => {
                    match carried.carry(&backbone, self.layer, &mut self.tensors, arena)? {
                        Reached::Tokens(tokens) => {
                            self.layer = backbone.layers.len();
                            self.chosen = Some(tokens);
                            return Ok(Progress::Logits);
                        }
                        Reached::End => {
                            self.layer = backbone.layers.len();
                            break;
                        }
                        Reached::Experts { layer } => {
                            self.layer = layer;
                            true
                        }
                        Reached::NotFinite => {
                            self.carried = None;
                            self.begin_anew()?;
                            continue;
                        }
                    }
                }
                None => false,
            };
            let layer = if attended { &backbone.layers[self.layer] } else { layer };
            if !attended {
                debug_span!("attention").in_scope(|| self.attend(layer, arena))?;
                let t = &mut self.tensors;
                device.rms_norm(&t.x, &layer.ffn_norm, backbone.config.norm_eps, &mut t.normed)?;
            }
            let t = &mut self.tensors;
            match &layer.feed_forward {
                FeedForwardLayer::Dense(mlp) => {
                    device.swiglu(&t.normed, mlp.swiglu(), &mut t.delta)?;
                    device.add(&mut t.x, &t.delta)?;
                    self.layer += 1;
                }
                FeedForwardLayer::Sparse(moe) => {
                    let tiers = tiers(&self.chunks);
                    debug_span!("route").in_scope(|| {
                        moe.router.route(device, &t.normed, &tiers, &mut self.routes)
                    })?;
                    if !self.routes.failures().is_empty() {
                        self.fail_unrouted()?;
                    }
                    if self.failures.iter().any(Option::is_some) {
                        self.drop_failed_routes();
                    }
                    if self.record {
                        self.recorded.push(self.routes.clone());
                    }
                    self.waiting = true;
                    return Ok(Progress::Experts);
                }
            }
        }
        self.layer_span = Span::none();
        self.check_hidden()?;
        self.clean(arena)?;
        debug_span!(parent: &self.span, "logits").in_scope(|| self.compute_logits())?;
        self.clean(arena)?;
        Ok(Progress::Logits)
    }

    /// Goes back to the first layer: what the layers wrote into the cache is written again.
    fn begin_anew(&mut self) -> Result<(), DeviceError> {
        self.layer = 0;
        self.unclean = (0..self.chunks.len()).filter(|&c| self.failures[c].is_some()).collect();
        self.start()
    }

    /// Tells the device what comes after the experts that are awaited: for a caller who has to
    /// wait for them.
    pub fn prefetch_next(&self) {
        self.prefetch(self.layer + 1);
    }

    /// Rows of this batch.
    pub fn rows(&self) -> usize {
        self.slots.len()
    }

    /// Where the next sparse layer will probably route the rows: what its gates say of the hidden
    /// states that this layer's gates have seen, the likeliest first and half as many again as they
    /// choose. No rows if there is no such layer.
    pub fn predict(&self) -> Result<Routes, DeviceError> {
        let mut routes = Routes::default();
        let mut next = self.backbone.layers.iter().skip(self.layer + 1);
        let next = next.find_map(|layer| match &layer.feed_forward {
            FeedForwardLayer::Sparse(moe) => Some(moe),
            FeedForwardLayer::Dense(_) => None,
        });
        if let Some(moe) = next {
            let device = &*self.backbone.device;
            let (states, tiers) = (&self.tensors.normed, tiers(&self.chunks));
            moe.router.route_wider(device, states, &tiers, &mut routes)?;
        }
        Ok(routes)
    }

    /// Says that a layer, or the logits after the last, come next.
    fn prefetch(&self, layer: usize) {
        let backbone = &*self.backbone;
        let next = match backbone.layers.get(layer) {
            Some(layer) => &layer.q.weight,
            None => backbone.head.as_ref().unwrap_or(&backbone.embed),
        };
        backbone.device.prefetch(next);
    }

    /// The chunk of a row, and the row's position in its sequence.
    fn place(&self, row: usize) -> (usize, usize) {
        let mut chunks = (0..self.chunks.len()).map(|chunk| (chunk, self.rows_of(chunk)));
        let (chunk, rows) = chunks.find(|(_, rows)| row < rows.end).expect("a row of the pass");
        (chunk, self.chunks[chunk].start + row - rows.start)
    }

    /// The rows of a chunk.
    fn rows_of(&self, chunk: usize) -> Range<usize> {
        let first = self.chunks[..chunk].iter().map(|chunk| chunk.tokens.len()).sum();
        first..first + self.chunks[chunk].tokens.len()
    }

    /// Whether each row's chunk goes on.
    fn rows_alive(&self) -> Vec<bool> {
        let chunks = self.chunks.iter().zip(&self.failures);
        chunks.flat_map(|(c, f)| std::iter::repeat_n(f.is_none(), c.tokens.len())).collect()
    }

    fn attend(
        &mut self,
        layer: &BackboneLayer<D>,
        arena: &mut D::KvArena,
    ) -> Result<(), DeviceError> {
        let backbone = &*self.backbone;
        let (device, config) = (&*backbone.device, &backbone.config);
        let attention = &config.attention;
        let t = &mut self.tensors;
        let qkv = trace_span!("qkv").entered();
        device.rms_norm(&t.x, &layer.attention_norm, config.norm_eps, &mut t.normed)?;
        let linears = [(&layer.q, &mut t.q), (&layer.k, &mut t.k), (&layer.v, &mut t.v)];
        let projections = linears.map(|(linear, out)| Projection {
            weight: &linear.weight,
            bias: linear.bias.as_ref(),
            out,
        });
        device.project(&t.normed, projections)?;
        drop(qkv);
        device.prefetch(&layer.o.weight);
        let rope = trace_span!("rope_and_kv").entered();
        for (norm, x) in [(&layer.q_norm, &mut t.q), (&layer.k_norm, &mut t.k)] {
            if let Some(norm) = norm {
                device.rms_norm_in_place(x, norm, config.norm_eps)?;
            }
        }
        if let Some(limit) = attention.clip_qkv {
            for x in [&mut t.q, &mut t.k, &mut t.v] {
                device.clamp(x, limit)?;
            }
        }
        for x in [&mut t.q, &mut t.k] {
            device.rope(x, &t.rotary)?;
        }
        device.kv_append(arena, self.layer, &t.k, &t.v, &self.slots)?;
        drop(rope);
        let queries: Vec<Query<'_>> = self
            .chunks
            .iter()
            .flat_map(|c| {
                (c.start..c.start + c.tokens.len())
                    .map(|position| Query { pages: &c.pages, position: position as u32 })
            })
            .collect();
        let scale = 1.0 / (attention.head_dim as f32).sqrt();
        let window = config.layers[self.layer].window;
        device.attention(arena, self.layer, &t.q, &queries, scale, window, &mut t.attended)?;
        let _output = trace_span!("attention_output").entered();
        device.matmul(&t.attended, &layer.o.weight, layer.o.bias.as_ref(), &mut t.delta)?;
        device.add(&mut t.x, &t.delta)?;
        Ok(())
    }

    /// What is needed, after [`Progress::Experts`].
    pub fn dispatch(&self) -> Result<Dispatch<'_>, DeviceError> {
        let hidden = self.backbone.device.read(&self.tensors.normed)?;
        Ok(Dispatch { layer: self.layer, hidden, routes: &self.routes })
    }

    /// The routes of the dispatch.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// Takes the experts' outputs, `parts[c]` that of route c of the dispatch, and goes on to
    /// the next layer. The rows of routes that failed end here; their parts may be anything.
    ///
    /// # Panics
    /// If no experts are awaited or the parts are not one per route.
    pub fn combine(&mut self, parts: &[&[f32]], failed: &[FailedRoute]) -> Result<(), DeviceError> {
        assert!(self.waiting, "combine follows a dispatch");
        assert_eq!(parts.len(), self.routes.all().len(), "one output per route");
        self.prefetch(self.layer + 1);
        let mut parts = Cow::Borrowed(parts);
        if !failed.is_empty() {
            for FailedRoute { route, reason } in failed {
                let row = self.routes.row_of(*route);
                let (chunk, position) = self.place(row);
                self.fail(chunk, ChunkError::Expert { position, reason: reason.clone() });
            }
            let alive = self.rows_alive();
            let kept = self.routes.with_rows().zip(parts.iter());
            let kept = kept.filter(|((row, _), _)| alive[*row]).map(|(_, part)| *part).collect();
            parts = Cow::Owned(kept);
            self.drop_failed_routes();
        }
        let _span = debug_span!(parent: &self.layer_span, "combine").entered();
        let backbone = self.backbone.clone();
        let device = &*backbone.device;
        let t = &mut self.tensors;
        let FeedForwardLayer::Sparse(moe) = &backbone.layers[self.layer].feed_forward else {
            unreachable!("only sparse layers wait for experts");
        };
        moe.combine(device, &t.normed, &self.routes, &parts, &mut t.delta)?;
        device.add(&mut t.x, &t.delta)?;
        self.waiting = false;
        self.layer += 1;
        Ok(())
    }

    fn compute_logits(&mut self) -> Result<(), DeviceError> {
        let mut wanted = Vec::new();
        let mut end = 0;
        for (index, chunk) in self.chunks.iter().enumerate() {
            end += chunk.tokens.len() as u32;
            wanted.extend(end - self.logit_rows(index) as u32..end);
        }
        let backbone = &*self.backbone;
        let device = &*backbone.device;
        let t = &mut self.tensors;
        let (hidden, vocab) = (backbone.config.hidden, backbone.config.vocab);
        device.reshape(&mut t.wanted, wanted.len(), hidden)?;
        device.reshape(&mut t.normed, wanted.len(), hidden)?;
        device.reshape(&mut t.logits, wanted.len(), vocab)?;
        device.select_rows(&t.x, &wanted, &mut t.wanted)?;
        device.rms_norm(&t.wanted, &backbone.norm, backbone.config.norm_eps, &mut t.normed)?;
        let head = backbone.head.as_ref().unwrap_or(&backbone.embed);
        device.matmul(&t.normed, head, None, &mut t.logits)?;
        // The next pass begins with layer 0.
        self.prefetch(0);
        if !device.is_finite(&self.tensors.logits)? {
            let logits = device.read(&self.tensors.logits)?.into_owned();
            self.fail_logits(&wanted, logits)?;
        }
        Ok(())
    }

    /// Logits `[L, V]` of the wanted rows, chunk by chunk, after [`Progress::Logits`].
    pub fn logits(&self) -> Result<Cow<'_, [f32]>, DeviceError> {
        self.backbone.device.read(&self.tensors.logits)
    }

    /// A token of each row of [`ForwardPass::logits`], if a carrier has chosen them or the device does:
    /// see [`Device::choose`]. `draws` says how, if nothing but a token of each row is wanted.
    pub fn choose(
        &self,
        draws: impl FnOnce() -> Option<Vec<Draw>>,
    ) -> Result<Option<Vec<u32>>, DeviceError> {
        let device = &self.backbone.device;
        if let Some(chosen) = &self.chosen {
            return Ok(Some(chosen.clone()));
        }
        let chooses = device.chooses(self.backbone.config.vocab);
        let draws = chooses.then(draws).flatten();
        draws.map_or(Ok(None), |draws| device.choose(&self.tensors.logits, &draws))
    }

    /// The routes of every sparse layer, if they were to be recorded.
    pub fn recorded_routes(&self) -> &[Routes] {
        &self.recorded
    }
}
