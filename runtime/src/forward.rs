//! One forward pass: a batch of chunks of sequences through all layers.
//!
//! [`ForwardPass::advance`] runs until it needs experts or has logits. It *returns* what it
//! needs instead of calling out, so the same code runs alone, in an actor and in a test:
//!
//! ```text
//! advance ─▶ Experts ─▶ (caller runs dispatch().calls, anywhere) ─▶ combine ─▶ advance ─▶ … ─▶ Logits
//! ```
//!
//! Shapes: `N` rows = all tokens of all chunks, `H` hidden, `A` = heads · head_dim,
//! `B` = kv_heads · head_dim, `L` rows whose logits are wanted, `V` vocabulary.
//!
//! Invariant: a row's values are a function of its own sequence alone (determinism contract):
//! chunks share kernels, never numbers.

use std::{borrow::Cow, sync::Arc};

use lite_llm_kernels::{
    device::{Device, DeviceError, Projection},
    kv::{KvSlot, PAGE_TOKENS, Query},
};

use tracing::{Span, debug_span, trace_span};

use crate::{
    backbone::{Backbone, BackboneLayer, FeedForwardLayer},
    moe_layer::ExpertError,
    routing::{RouteError, Routes},
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

/// Why a pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Routing failed.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Experts failed.
    #[error(transparent)]
    Experts(#[from] ExpertError),
    /// A logit is no number.
    #[error("the logits of row {row} hold {value}; the model's weights hold NaN or infinity")]
    NotANumber {
        /// Row among those whose logits were wanted.
        row: usize,
        /// What was found.
        value: f32,
    },
}

/// One batch on its way through the layers.
pub struct ForwardPass<D: Device> {
    backbone: Arc<Backbone<D>>,
    chunks: Vec<Chunk>,
    slots: Vec<KvSlot>,
    layer: usize,
    waiting: bool,
    record: bool,
    recorded: Vec<Routes>,
    routes: Routes,
    tensors: Tensors<D>,
    span: Span,
    layer_span: Span,
}

/// Activations of a pass; made once, shaped per batch.
struct Tensors<D: Device> {
    /// Residual stream `[N, H]`.
    x: D::Tensor,
    /// Rotary turns `[N, head_dim]`.
    turns: D::Tensor,
    /// Normalised states `[N, H]`.
    normed: D::Tensor,
    /// Queries `[N, A]`.
    q: D::Tensor,
    /// Keys `[N, B]`.
    k: D::Tensor,
    /// Values `[N, B]`.
    v: D::Tensor,
    /// Output of attention `[N, A]`.
    attended: D::Tensor,
    /// What is added to the residual stream `[N, H]`.
    delta: D::Tensor,
    /// `[L, H]`.
    wanted: D::Tensor,
    /// `[L, V]`.
    logits: D::Tensor,
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
    ) -> Result<Self, ForwardError> {
        let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in &chunks {
            assert!(!chunk.tokens.is_empty(), "a chunk has tokens");
            for (position, &id) in (chunk.start..).zip(&chunk.tokens) {
                ids.push(id);
                positions.push(position as u32);
                slots.push(KvSlot {
                    page: chunk.pages[position / PAGE_TOKENS],
                    offset: (position % PAGE_TOKENS) as u32,
                });
            }
        }
        let device = &*backbone.device;
        let attention = &backbone.config.attention;
        let (hidden, head) = (backbone.config.hidden, attention.head_dim);
        let tensor = |cols| device.tensor(ids.len(), cols);
        let mut x = tensor(hidden)?;
        device.embed(&backbone.embed, &ids, &mut x)?;
        let mut turns = tensor(head)?;
        device.turns(&positions, &backbone.inv_freq, backbone.rotary_scale, &mut turns)?;
        let tensors = Tensors {
            x,
            turns,
            normed: tensor(hidden)?,
            q: tensor(attention.heads * head)?,
            k: tensor(attention.kv_heads * head)?,
            v: tensor(attention.kv_heads * head)?,
            attended: tensor(attention.heads * head)?,
            delta: tensor(hidden)?,
            wanted: device.tensor(0, 0)?,
            logits: device.tensor(0, 0)?,
        };
        Ok(Self {
            backbone,
            chunks,
            slots,
            layer: 0,
            waiting: false,
            record,
            recorded: Vec::new(),
            routes: Routes::default(),
            tensors,
            layer_span: Span::none(),
            span,
        })
    }

    /// The chunks of this batch.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The span of the layer that it is in.
    pub fn layer_span(&self) -> &Span {
        &self.layer_span
    }

    /// Runs until experts are needed or logits are there.
    ///
    /// # Panics
    /// If it was called while experts are awaited.
    pub fn advance(&mut self, arena: &mut D::KvArena) -> Result<Progress, ForwardError> {
        assert!(!self.waiting, "combine comes before advance");
        let backbone = self.backbone.clone();
        while let Some(layer) = backbone.layers.get(self.layer) {
            self.layer_span = debug_span!(parent: &self.span, "layer", layer = self.layer);
            let _layer = self.layer_span.clone().entered();
            debug_span!("attention").in_scope(|| self.attend(layer, arena))?;
            let device = &*backbone.device;
            let t = &mut self.tensors;
            device.rms_norm(&t.x, &layer.ffn_norm, backbone.config.norm_eps, &mut t.normed)?;
            match &layer.feed_forward {
                FeedForwardLayer::Dense(mlp) => {
                    device.swiglu(&t.normed, mlp.swiglu(), &mut t.delta)?;
                    device.add(&mut t.x, &t.delta)?;
                    self.layer += 1;
                }
                FeedForwardLayer::Sparse(moe) => {
                    let tiers: Vec<&TierMask> = self
                        .chunks
                        .iter()
                        .flat_map(|c| std::iter::repeat_n(&*c.tiers, c.tokens.len()))
                        .collect();
                    debug_span!("route").in_scope(|| {
                        moe.router.route(device, &t.normed, &tiers, &mut self.routes)
                    })?;
                    if self.record {
                        self.recorded.push(self.routes.clone());
                    }
                    self.waiting = true;
                    return Ok(Progress::Experts);
                }
            }
        }
        self.layer_span = Span::none();
        debug_span!(parent: &self.span, "logits").in_scope(|| self.project())?;
        Ok(Progress::Logits)
    }

    /// Tells the device what comes after the experts that are awaited: for a caller who has to
    /// wait for them.
    pub fn expect_next(&self) {
        self.expect(self.layer + 1);
    }

    /// Says that a layer, or the logits after the last, come next.
    fn expect(&self, layer: usize) {
        let backbone = &*self.backbone;
        let next = match backbone.layers.get(layer) {
            Some(layer) => &layer.q.weight,
            None => backbone.head.as_ref().unwrap_or(&backbone.embed),
        };
        backbone.device.expect(next);
    }

    fn attend(
        &mut self,
        layer: &BackboneLayer<D>,
        arena: &mut D::KvArena,
    ) -> Result<(), ForwardError> {
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
        device.expect(&layer.o.weight);
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
            device.rope(x, &t.turns)?;
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
    pub fn dispatch(&self) -> Result<Dispatch<'_>, ForwardError> {
        let hidden = self.backbone.device.read(&self.tensors.normed)?;
        Ok(Dispatch { layer: self.layer, hidden, routes: &self.routes })
    }

    /// Takes the experts' outputs, `parts[c]` that of route c of the dispatch, and goes on to
    /// the next layer.
    ///
    /// # Panics
    /// If no experts are awaited or the parts are not one per route.
    pub fn combine(&mut self, parts: &[&[f32]]) -> Result<(), ForwardError> {
        assert!(self.waiting, "combine follows a dispatch");
        assert_eq!(parts.len(), self.routes.all().len(), "one output per route");
        self.expect(self.layer + 1);
        let _span = debug_span!(parent: &self.layer_span, "combine").entered();
        let backbone = self.backbone.clone();
        let device = &*backbone.device;
        let t = &mut self.tensors;
        let FeedForwardLayer::Sparse(moe) = &backbone.layers[self.layer].feed_forward else {
            unreachable!("only sparse layers wait for experts");
        };
        moe.combine(device, &t.normed, &self.routes, parts, &mut t.delta)?;
        device.add(&mut t.x, &t.delta)?;
        self.waiting = false;
        self.layer += 1;
        Ok(())
    }

    fn project(&mut self) -> Result<(), ForwardError> {
        let mut wanted = Vec::new();
        let mut first = 0;
        for chunk in &self.chunks {
            let end = first + chunk.tokens.len() as u32;
            match chunk.logits {
                WantedLogits::None => {}
                WantedLogits::Last => wanted.push(end - 1),
                WantedLogits::All => wanted.extend(first..end),
            }
            first = end;
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
        // The next pass begins there.
        self.expect(0);
        let logits = device.read(&self.tensors.logits)?;
        // All of them without a way out in between: that becomes vectors.
        let finite = logits.iter().fold(true, |all, v| all & v.is_finite());
        if !finite && let Some(at) = logits.iter().position(|v| !v.is_finite()) {
            return Err(ForwardError::NotANumber { row: at / vocab, value: logits[at] });
        }
        Ok(())
    }

    /// Logits `[L, V]` of the wanted rows, chunk by chunk, after [`Progress::Logits`].
    pub fn logits(&self) -> Result<Cow<'_, [f32]>, ForwardError> {
        Ok(self.backbone.device.read(&self.tensors.logits)?)
    }

    /// The routes of every sparse layer, if they were to be recorded.
    pub fn recorded_routes(&self) -> &[Routes] {
        &self.recorded
    }
}
