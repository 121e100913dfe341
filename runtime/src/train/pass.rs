//! One pass over a node of the global batch: forward with a tape, then backward.
//!
//! Shapes: `N` tokens of the node's rows, `H` hidden, `A` = heads · head_dim, `B` = kv_heads · head_dim, `V`
//! vocabulary.
//!
//! Invariants: forward has the bits of [`crate::forward::ForwardPass`] for each document by itself;
//! what a layer keeps or computes again (`recompute`) has the same bits; logits exist for a piece of
//! [`LOGITS_MAX`] values at a time, or of as many values as the head has parameters, if these are more.

mod head;

use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS, Query},
    ops::{
        arena::KvArena,
        attention::attention,
        attention_backward::{Attended, AttentionGradients, AttentionShape, attention_backward},
        elementwise,
        gated::{self, GatedTape},
        leaves::{LeafPlan, Place},
        norm::{rms_norm, rms_norm_backward, rms_norm_in_place},
        panel_sums::{RowMajor, products},
        rope::{rope, rope_backward, rotary_table},
        row_sums::{Factor, sum_rows},
    },
    rows::Rows,
};

use super::{
    Recompute, TrainError,
    balance::{BalanceWeights, Sums, layer_sums},
    batch::Flat,
    exchange::Others,
    gradients::Gradients,
    moe::{self, Context, Elsewhere, MoeTape},
    params::{FeedForwardIds, LayerIds, LinearIds, ParamId, Params},
};
use crate::{config::AttentionConfig, rope::Rotary, routing::Routes, tier::TierMask};

/// Logits that exist at a time; more only where the head itself has more parameters.
pub const LOGITS_MAX: usize = 1 << 22;

/// What a pass computes with.
pub(super) struct Pass<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) params: &'a Params,
    pub(super) mask: &'a TierMask,
    pub(super) recompute: Recompute,
    /// Whether the router z-loss is wanted.
    pub(super) with_z: bool,
    /// See [`LOGITS_MAX`].
    logits_max: usize,
    flat: Flat,
    /// Ranks that have some of the experts, and the number of this pass.
    others: Option<(&'a Others<'a>, u64)>,
    tokens: LeafPlan,
    /// Rotary table `[N, head_dim]`.
    table: Vec<f32>,
}

/// What a forward pass left.
pub(super) struct Tape {
    layers: Vec<LayerTape>,
    /// The residual stream after the last layer `[N, H]`.
    last: Tensor,
    /// Sums of the gates over the node.
    pub(super) sums: Sums,
    /// Routes of each sparse layer.
    pub(super) routes: Vec<Routes>,
}

struct LayerTape {
    /// The residual stream before the layer `[N, H]`.
    x: Tensor,
    /// Absent where it is to be computed again.
    kept: Option<(Kept, FeedForwardTape)>,
}

/// What a layer's backward pass needs.
struct Kept {
    normed: Tensor,
    /// q and k before their norms, where there are norms.
    raw_qk: Option<[Vec<f32>; 2]>,
    /// q, k and v before they are limited, where they are.
    unclipped: Option<[Vec<f32>; 3]>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// The residual stream after attention `[N, H]`.
    middle: Tensor,
    ffn_normed: Tensor,
}

enum FeedForwardTape {
    Dense(GatedTape),
    Sparse(MoeTape),
}

impl Tape {
    /// What the gates said; memory goes back to who computes.
    pub(super) fn into_sums(self, cpu: &Cpu) -> (Sums, Vec<Routes>) {
        cpu.give_tensor(self.last);
        for LayerTape { x, kept } in self.layers {
            cpu.give_tensor(x);
            kept.into_iter().for_each(|(kept, _)| kept.recycle(cpu));
        }
        (self.sums, self.routes)
    }
}

impl Kept {
    /// Gives the memory back to who computes, to be used again.
    fn recycle(self, cpu: &Cpu) {
        let Self { normed, raw_qk, unclipped, q, k, v, attended, middle, ffn_normed } = self;
        [normed, middle, ffn_normed].into_iter().for_each(|tensor| cpu.give_tensor(tensor));
        let raw = raw_qk.into_iter().flatten().chain(unclipped.into_iter().flatten());
        raw.chain([q, k, v, attended]).for_each(|values| cpu.give(values));
    }
}

/// A copy in memory of `cpu`.
fn copied(cpu: &Cpu, values: &[f32]) -> Vec<f32> {
    let mut copy = cpu.take(values.len());
    copy.copy_from_slice(values);
    copy
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        cpu: &'a Cpu,
        params: &'a Params,
        mask: &'a TierMask,
        recompute: Recompute,
        with_z: bool,
        flat: Flat,
        others: Option<&'a Others<'a>>,
    ) -> Self {
        let config = params.config();
        let Rotary { inv_freq, scale } = Rotary::new(&config.attention, config.context);
        let mut table = vec![0.0; flat.len() * config.attention.head_dim];
        rotary_table(cpu, &flat.positions, &inv_freq, scale, &mut table);
        let tokens = LeafPlan::of_tokens(&flat.places, flat.rows.clone());
        // The head's gradient takes as much.
        let logits_max = LOGITS_MAX.max(config.vocab * config.hidden);
        let others = others.map(|others| (others, others.next_pass()));
        Self { cpu, params, mask, recompute, with_z, logits_max, flat, others, tokens, table }
    }

    fn rows(&self) -> usize {
        self.flat.len()
    }

    /// `x + more`, of x's shape.
    fn plus(&self, x: &Tensor, more: &[f32]) -> Tensor {
        let mut sum = self.cpu.take_tensor(x.rows(), x.cols());
        elementwise::sum(self.cpu, x.as_slice(), more, sum.as_mut_slice());
        sum
    }

    fn attention(&self) -> &AttentionConfig {
        &self.params.config().attention
    }

    fn shape(&self, layer: usize) -> AttentionShape {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = *self.attention();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let window = self.params.config().layers[layer].window;
        AttentionShape { heads, kv_heads, head_dim, scale, window }
    }

    /// Through all layers. `backward`: the backward pass is to come.
    pub(super) fn forward(&self, backward: bool) -> Result<Tape, TrainError> {
        let config = self.params.config();
        let mut x = self.cpu.take_tensor(self.rows(), config.hidden);
        let table = Rows::dense(self.params.weight(self.params.ids().embed), config.hidden);
        elementwise::select_rows(table, &self.flat.ids, x.as_mut_slice());
        let mut tape = Tape {
            layers: Vec::with_capacity(config.layers.len()),
            last: Tensor::zeros(0, 0),
            sums: Sums::default(),
            routes: Vec::new(),
        };
        let keep = backward && self.recompute == Recompute::None;
        for layer in 0..config.layers.len() {
            let (after, kept, feed_forward) = self.layer(layer, &x, keep)?;
            if let FeedForwardTape::Sparse(moe) = &feed_forward {
                let MoeTape { traces, routes, .. } = moe;
                let (places, rows) = (&self.flat.places, self.flat.rows.clone());
                let sums = layer_sums(self.cpu, traces, routes, places, rows, self.with_z);
                tape.sums.layers.push(sums);
                tape.routes.push(routes.clone());
            }
            let kept = match keep {
                true => Some((kept, feed_forward)),
                false => {
                    kept.recycle(self.cpu);
                    None
                }
            };
            tape.layers.push(LayerTape { x: std::mem::replace(&mut x, after), kept });
        }
        tape.last = x;
        Ok(tape)
    }

    /// What comes out of one layer, and what its backward pass needs, which is next to come if `keep`.
    fn layer(
        &self,
        layer: usize,
        x: &Tensor,
        keep: bool,
    ) -> Result<(Tensor, Kept, FeedForwardTape), TrainError> {
        let Self { cpu, params, .. } = *self;
        let (config, rows) = (params.config(), self.rows());
        let ids = &params.ids().layers[layer];
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape(layer);
        let mut normed = cpu.take_tensor(rows, config.hidden);
        let norm = params.values(ids.attention_norm);
        rms_norm(cpu, x.as_slice(), norm, config.norm_eps, normed.as_mut_slice());
        params.precision().round(cpu, normed.as_mut_slice());
        let mut qkv = [heads, kv_heads, kv_heads].map(|n| cpu.take(rows * n * head_dim));
        let [q, k, v] = &mut qkv;
        let outs = [q, k, v];
        let mut linears: Vec<RowMajor<'_>> = ids
            .qkv
            .iter()
            .zip(outs)
            .map(|(ids, out)| RowMajor {
                weight: params.weight(ids.weight),
                bias: ids.bias.map(|id| params.values(id)),
                out,
            })
            .collect();
        products(cpu, normed.as_rows(), &mut linears);
        drop(linears);
        let raw_qk = ids.qk_norm.map(|norms| {
            let raw = [&qkv[0], &qkv[1]].map(|x| copied(cpu, x));
            for (x, id) in qkv.iter_mut().zip(norms) {
                rms_norm_in_place(cpu, x, params.values(id), config.norm_eps);
            }
            raw
        });
        let unclipped = config.attention.clip_qkv.map(|limit| {
            let before = qkv.each_ref().map(|x| copied(cpu, x));
            for x in &mut qkv {
                elementwise::clamp(cpu, x, limit);
            }
            before
        });
        let [mut q, mut k, v] = qkv;
        for x in [&mut q, &mut k] {
            rope(cpu, x, head_dim, &self.table);
        }
        let mut attended = cpu.take(q.len());
        self.attend(layer, [&q, &k, &v], &mut attended);
        let mut delta = cpu.take(rows * config.hidden);
        let bias = ids.o.bias.map(|id| params.values(id));
        let rounded = params.precision().rounded(cpu, &attended);
        let from = Rows::Dense { values: &rounded, cols: heads * head_dim };
        let weight = params.weight(ids.o.weight);
        products(cpu, from, &mut [RowMajor { weight, bias, out: &mut delta }]);
        let middle = self.plus(x, &delta);
        cpu.give(delta);
        let mut ffn_normed = cpu.take_tensor(rows, config.hidden);
        let norm = params.values(ids.ffn_norm);
        rms_norm(cpu, middle.as_slice(), norm, config.norm_eps, ffn_normed.as_mut_slice());
        params.precision().round(cpu, ffn_normed.as_mut_slice());
        let (after, feed_forward) = match &ids.feed_forward {
            FeedForwardIds::Dense(mlp) => {
                let weights = moe::weights_of(params, *mlp);
                let tape = gated::forward(cpu, ffn_normed.as_rows(), weights);
                (self.plus(&middle, &tape.y), FeedForwardTape::Dense(tape))
            }
            FeedForwardIds::Sparse { .. } => {
                let elsewhere = self.others.map(|(others, pass)| Elsewhere {
                    others,
                    pass,
                    flat: &self.flat,
                    keep,
                });
                let (out, tape) =
                    moe::forward(cpu, params, layer, self.mask, &ffn_normed, elsewhere)
                        .map_err(|error| error.at(&self.flat))?;
                let after = self.plus(&middle, &out);
                cpu.give(out);
                (after, FeedForwardTape::Sparse(tape))
            }
        };
        let kept = Kept { normed, raw_qk, unclipped, q, k, v, attended, middle, ffn_normed };
        Ok((after, kept, feed_forward))
    }

    /// Attention of every document by itself, by way of pages, as inference has it.
    fn attend(&self, layer: usize, [q, k, v]: [&[f32]; 3], out: &mut [f32]) {
        let AttentionShape { kv_heads, head_dim, scale, window, .. } = self.shape(layer);
        let shape = KvShape { layers: 1, kv_heads, head_dim, dtype: KvDType::F32 };
        let mut pages: Vec<Vec<u32>> = Vec::new();
        let mut next = 0;
        for document in &self.flat.documents {
            let count = document.len().div_ceil(PAGE_TOKENS) as u32;
            pages.push((next..next + count).collect());
            next += count;
        }
        let mut arena = KvArena::new(shape, next.max(1) as usize);
        let (mut slots, mut queries) = (Vec::new(), Vec::new());
        for (pages, document) in pages.iter().zip(&self.flat.documents) {
            for position in 0..document.len() {
                let offset = (position % PAGE_TOKENS) as u32;
                slots.push(KvSlot { page: pages[position / PAGE_TOKENS], offset });
                queries.push(Query { pages, position: position as u32 });
            }
        }
        arena.append(self.cpu, 0, k, v, &slots);
        attention(self.cpu, &arena, 0, q, &queries, scale, window, out);
    }

    /// Backward of everything. `scale` multiplies the loss of each prediction (0: only the balance losses
    /// are differentiated). Returns the sum of the predictions' losses.
    pub(super) fn backward(
        &self,
        mut tape: Tape,
        scale: f32,
        wanted: &[bool],
        sums: &Sums,
        balance: &BalanceWeights,
        gradients: &mut Gradients,
    ) -> Result<f32, TrainError> {
        let (params, ids) = (self.params, self.params.ids().clone());
        let context = Context {
            cpu: self.cpu,
            params,
            flat: &self.flat,
            wanted,
            tokens: &self.tokens,
            sums,
            balance,
            others: self.others,
        };
        let normed = self.normed(&tape);
        let (loss, dnormed) = self.head_backward(&normed, scale, wanted, gradients)?;
        self.cpu.give_tensor(normed);
        let last = std::mem::replace(&mut tape.last, Tensor::zeros(0, 0));
        let mut dx = self.cpu.take(dnormed.len());
        self.norm_backward(ids.norm, last.as_slice(), &dnormed, &mut dx, wanted, gradients);
        self.cpu.give_tensor(last);
        let mut sparse = tape.sums.layers.len();
        for (layer, of_layer) in tape.layers.into_iter().enumerate().rev() {
            let kept = match of_layer.kept {
                Some(kept) => kept,
                None => {
                    let (after, kept, feed_forward) = self.layer(layer, &of_layer.x, true)?;
                    self.cpu.give_tensor(after);
                    (kept, feed_forward)
                }
            };
            let is_sparse = matches!(kept.1, FeedForwardTape::Sparse(_));
            sparse -= usize::from(is_sparse);
            self.layer_backward(&context, (layer, sparse), kept, &of_layer.x, &mut dx, gradients)?;
            self.cpu.give_tensor(of_layer.x);
        }
        if wanted[ids.embed] {
            gradients.set(ids.embed, self.embed_gradient(&dx));
        }
        self.cpu.give(dnormed);
        self.cpu.give(dx);
        Ok(loss)
    }

    fn norm_backward(
        &self,
        id: ParamId,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        wanted: &[bool],
        gradients: &mut Gradients,
    ) {
        let weight = self.params.values(id);
        let eps = self.params.config().norm_eps;
        let cols = x.len() / self.rows().max(1);
        let mut each = self.cpu.take(if wanted[id] { self.rows() * weight.len() } else { 0 });
        let of_weight = wanted[id].then_some(&mut each[..]);
        rms_norm_backward(self.cpu, x, cols, weight, eps, dy, dx, of_weight);
        if wanted[id] {
            gradients.set(id, self.column_sums(&each, weight.len()));
        }
        self.cpu.give(each);
    }

    /// The sum over all tokens of rows `[N, cols]`, by rule 8.
    fn column_sums(&self, rows: &[f32], cols: usize) -> Vec<f32> {
        let mut sums = vec![0.0; cols];
        sum_rows(self.cpu, Factor::One, Rows::dense(rows, cols), cols, &self.tokens, &mut sums);
        sums
    }

    /// The gradient of a linear map's input, `[N, inputs]`; those of its parameters are set.
    fn linear_backward(
        &self,
        ids: LinearIds,
        x: &[f32],
        dy: &[f32],
        wanted: &[bool],
        gradients: &mut Gradients,
    ) -> Vec<f32> {
        let rows = self.rows();
        let (n, k) = (dy.len() / rows, x.len() / rows);
        let mut dx = self.cpu.take(x.len());
        let weight = Rows::dense(self.params.weight(ids.weight), k);
        let rounded = self.params.precision().rounded(self.cpu, dy);
        let factor = Factor::PerOutput(Rows::dense(&rounded, n));
        sum_rows(self.cpu, factor, weight, k, &LeafPlan::of(n), &mut dx);
        if wanted[ids.weight] {
            let mut gradient = self.cpu.take(n * k);
            let factor = Factor::PerTerm(Rows::dense(&rounded, n));
            sum_rows(self.cpu, factor, Rows::dense(x, k), k, &self.tokens, &mut gradient);
            gradients.set(ids.weight, gradient);
        }
        if let Some(bias) = ids.bias.filter(|id| wanted[*id]) {
            gradients.set(bias, self.column_sums(dy, n));
        }
        dx
    }

    /// dx `[N, H]` is the gradient of what comes out, and becomes that of what went in.
    fn layer_backward(
        &self,
        of: &Context<'_>,
        (layer, sparse): (usize, usize),
        (kept, feed_forward): (Kept, FeedForwardTape),
        x: &Tensor,
        dx: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<(), TrainError> {
        let (cpu, wanted) = (self.cpu, of.wanted);
        let ids: &LayerIds = &self.params.ids().layers[layer];
        let hidden = &kept.ffn_normed;
        let mut dnormed = match (&ids.feed_forward, feed_forward) {
            (FeedForwardIds::Dense(mlp), FeedForwardTape::Dense(tape)) => {
                let mut dnormed = cpu.take(dx.len());
                dnormed.fill(0.0);
                moe::mlp_backward(of, *mlp, &tape, hidden, dx, &mut dnormed, gradients);
                dnormed
            }
            (_, FeedForwardTape::Sparse(tape)) => {
                moe::backward(of, layer, sparse, tape, hidden, dx, gradients)?
            }
            _ => unreachable!("a layer has the tape of its kind"),
        };
        let mut more = cpu.take(dx.len());
        let middle = kept.middle.as_slice();
        self.norm_backward(ids.ffn_norm, middle, &dnormed, &mut more, wanted, gradients);
        elementwise::add(cpu, dx, &more);

        let attended = self.params.precision().rounded(self.cpu, &kept.attended);
        let dattended = self.linear_backward(ids.o, &attended, dx, wanted, gradients);
        let shape = self.shape(layer);
        let mut of_qkv = [&kept.q, &kept.k, &kept.v].map(|x| cpu.take(x.len()));
        let [dq, dk, dv] = &mut of_qkv;
        let attended =
            Attended { q: &kept.q, k: &kept.k, v: &kept.v, out: &kept.attended, dout: &dattended };
        let into = AttentionGradients { dq, dk, dv };
        attention_backward(cpu, shape, &self.flat.documents, attended, into);
        cpu.give(dattended);
        for d in &mut of_qkv[..2] {
            rope_backward(cpu, d, shape.head_dim, &self.table);
        }
        if let (Some(limit), Some(before)) = (self.attention().clip_qkv, &kept.unclipped) {
            for (d, x) in of_qkv.iter_mut().zip(before) {
                elementwise::clamp_backward(cpu, x, limit, d);
            }
        }
        if let (Some(norms), Some(raw)) = (ids.qk_norm, &kept.raw_qk) {
            for ((d, raw), id) in of_qkv.iter_mut().zip(raw).zip(norms) {
                let dy = std::mem::replace(d, cpu.take(d.len()));
                self.norm_backward(id, raw, &dy, d, wanted, gradients);
                cpu.give(dy);
            }
        }
        // From q, then k, then v.
        dnormed.fill(0.0);
        for (ids, d) in ids.qkv.iter().zip(&of_qkv) {
            let part = self.linear_backward(*ids, kept.normed.as_slice(), d, wanted, gradients);
            elementwise::add(cpu, &mut dnormed, &part);
            cpu.give(part);
        }
        self.norm_backward(
            ids.attention_norm,
            x.as_slice(),
            &dnormed,
            &mut more,
            wanted,
            gradients,
        );
        elementwise::add(cpu, dx, &more);
        of_qkv.into_iter().chain([dnormed, more]).for_each(|values| cpu.give(values));
        kept.recycle(cpu);
        Ok(())
    }

    /// The gradient of the embedding as a table of inputs: per token id the sum over its places, by
    /// rule 8.
    fn embed_gradient(&self, dx: &[f32]) -> Vec<f32> {
        let config = self.params.config();
        let (hidden, vocab) = (config.hidden, config.vocab);
        let mut by_id: Vec<(u32, u32)> =
            (0u32..).zip(&self.flat.ids).map(|(row, &id)| (id, row)).collect();
        by_id.sort_unstable();
        let mut gradient = self.cpu.take(vocab * hidden);
        gradient.fill(0.0);
        for same in by_id.chunk_by(|a, b| a.0 == b.0) {
            let row = |&(_, row): &(u32, u32)| &dx[row as usize * hidden..][..hidden];
            let rows: Vec<&[f32]> = same.iter().map(row).collect();
            let places: Vec<Place> =
                same.iter().map(|&(_, row)| self.flat.places[row as usize]).collect();
            let plan = LeafPlan::of_tokens(&places, self.flat.rows.clone());
            let out = &mut gradient[same[0].0 as usize * hidden..][..hidden];
            sum_rows(self.cpu, Factor::One, Rows::List(&rows), hidden, &plan, out);
        }
        gradient
    }
}
