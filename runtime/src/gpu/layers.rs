//! One layer of a pass, given to the device: attention, then the feed-forward part.

use lite_llm_kernels::{
    cuda::{
        Cuda, Dev,
        launch::{DevKv, Experts, Linear, row_words},
        one::{Heads, Norm},
    },
    cuda_device::{Gpu, GpuTensor},
    device::DeviceError,
    math::Math,
};

use super::{
    Done, Shared, State,
    plan::Plan,
    sparse::{Chosen, Routing},
};
use crate::{
    backbone::{Backbone, BackboneLayer, FeedForwardLayer},
    config::ModelConfig,
    forward::{Reached, Tensors},
};

/// Rows of a pass from which on it reads most experts anyway.
const SCAN_ROWS: usize = 64;

/// Activations of a pass; shapes as in [`Tensors`].
pub(super) struct Rows {
    pub(super) x: Dev<f32>,
    pub(super) rotary: Dev<f32>,
    pub(super) normed: Dev<f32>,
    q: Dev<f32>,
    k: Dev<f32>,
    v: Dev<f32>,
    attended: Dev<f32>,
    delta: Dev<f32>,
}

/// Memory of a pass beside its activations.
pub(super) struct Work {
    /// Rows as products of integers, or fast ones, read them.
    records: Dev<f32>,
    /// `[N, scores]`.
    scores: Dev<f32>,
    chosen: Chosen,
    /// Of each layer, whether a row's scores are not all finite: `[layers, N, 2]`.
    pub(super) bad: Dev<u32>,
}

impl Rows {
    /// Room for so many rows.
    pub(super) fn new(cuda: &Cuda, config: &ModelConfig, rows: usize) -> Result<Self, DeviceError> {
        let attention = &config.attention;
        let room = |cols: usize| cuda.scratch(rows * cols);
        let (heads, kv_heads) = (attention.heads, attention.kv_heads);
        let head = attention.head_dim;
        Ok(Self {
            x: room(config.hidden)?,
            rotary: room(head)?,
            normed: room(config.hidden)?,
            q: room(heads * head)?,
            k: room(kv_heads * head)?,
            v: room(kv_heads * head)?,
            attended: room(heads * head)?,
            delta: room(config.hidden)?,
        })
    }

    /// Those of a pass that the host sees, too.
    pub(super) fn of(tensors: &Tensors<Gpu>) -> Self {
        let data = |tensor: &GpuTensor| tensor.data().part(0, tensor.data().len());
        Self {
            x: data(&tensors.x),
            rotary: data(&tensors.rotary),
            normed: data(&tensors.normed),
            q: data(&tensors.q),
            k: data(&tensors.k),
            v: data(&tensors.v),
            attended: data(&tensors.attended),
            delta: data(&tensors.delta),
        }
    }
}

impl Work {
    /// Room for so many rows; `bad` is emptied.
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        routing: Option<&Routing>,
        rows: usize,
        bad: Dev<u32>,
    ) -> Result<Self, DeviceError> {
        let cuda = gpu.cuda();
        let widest = config.hidden.max(config.attention.heads * config.attention.head_dim);
        let (scores, routes) = routing.map_or((0, 0), |routing| (routing.scores(), routing.routes));
        cuda.fill(&bad, 0)?;
        Ok(Self {
            records: cuda.scratch(rows * gpu.record_words(widest))?,
            scores: cuda.scratch(rows * scores)?,
            chosen: Chosen {
                index: cuda.scratch(rows * routes)?,
                weight: cuda.scratch(rows * routes)?,
                count: cuda.scratch(rows)?,
            },
            bad,
        })
    }

    /// Room for the records of rows of k values.
    fn records(&self, gpu: &Gpu, rows: usize, k: usize) -> Dev<f32> {
        self.records.part(0, rows * gpu.record_words(k))
    }
}

impl Shared {
    /// `x += attention`, and what it writes into the cache.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attend(
        &self,
        state: &State,
        backbone: &Backbone<Gpu>,
        index: usize,
        plan: &Plan,
        work: &Work,
        t: &Rows,
        kv: &DevKv,
    ) -> Done {
        let (cuda, layer, config) = (self.cuda(), &backbone.layers[index], &backbone.config);
        let gpu = self.store.gpu();
        let attention = &config.attention;
        let Plan { rows, slots, queries, tiles, .. } = plan;
        let scale = 1.0 / (attention.head_dim as f32).sqrt();
        let window = config.layers[index].window;
        let Rows { x, q, k, v, attended, .. } = t;
        let qkv = [(&layer.q, q), (&layer.k, k), (&layer.v, v)].map(|(linear, out)| Linear {
            weight: &linear.weight,
            bias: linear.bias.as_ref(),
            out,
        });
        let norms = match (&layer.q_norm, &layer.k_norm) {
            (Some(q), Some(k)) => Some((q, k, config.norm_eps)),
            _ => None,
        };
        let heads = Heads { q, k, v, norms, rotary: Some(&t.rotary) };
        let parts =
            cuda.attention_parts(*rows, attention.heads, attention.head_dim, queries.longest)?;
        let one = self.one_row(*rows, backbone, layer);
        let norm = Norm { weight: &layer.attention_norm, eps: config.norm_eps };
        if one {
            cuda.linear_one(x, Some(norm), &qkv, false)?;
        } else {
            let records = work.records(gpu, *rows, config.hidden);
            let reads = qkv.iter().any(|linear| gpu.reads_records(linear.weight.dtype()));
            self.normed(x, norm, &t.normed, reads.then_some(&records))?;
            gpu.linears(&t.normed, &records, *rows, &qkv, false)?;
        }
        let fast = gpu.math() == Math::Fast && cuda.attention_fast_fits(kv, attention.heads);
        if one && !fast && attention.clip_qkv.is_none() && cuda.attention_step_fits(kv) {
            let counters = &state.counters;
            cuda.attention_step(
                kv, index, heads, queries, scale, window, &parts, counters, attended,
            )?;
        } else {
            match attention.clip_qkv {
                None => cuda.heads_keep(kv, index, heads, slots)?,
                Some(limit) => {
                    for (norm, x) in [(&layer.q_norm, q), (&layer.k_norm, k)] {
                        if let Some(norm) = norm {
                            cuda.rms_norm(x, norm, config.norm_eps, x)?;
                        }
                    }
                    for x in [q, k, v] {
                        cuda.clamp(x, limit)?;
                    }
                    for x in [q, k] {
                        cuda.rope(x, &t.rotary, attention.head_dim)?;
                    }
                    cuda.kv_append(kv, index, k, v, slots)?;
                }
            }
            match tiles {
                Some(tiles) if fast => cuda.attention_rows_fast(
                    kv, index, q, queries, tiles, scale, window, &parts, attended,
                )?,
                None if fast => {
                    cuda.attention_fast(kv, index, q, queries, scale, window, &parts, attended)?
                }
                Some(tiles) if cuda.attention_rows_fits(kv) => cuda.attention_rows(
                    kv, index, q, queries, tiles, scale, window, &parts, attended,
                )?,
                _ => cuda.attention(kv, index, q, queries, scale, window, &parts, attended)?,
            }
        }
        // With a bias, the sum is rounded before it is added.
        let adds = layer.o.bias.is_none();
        let out = if adds { x } else { &t.delta };
        let o = [Linear { weight: &layer.o.weight, bias: layer.o.bias.as_ref(), out }];
        if one && cuda.one_linear_fits(layer.o.weight.k()) {
            cuda.linear_one(attended, None, &o, adds)?;
        } else {
            let k = layer.o.weight.k();
            let records = work.records(gpu, *rows, k);
            if gpu.reads_records(layer.o.weight.dtype()) {
                gpu.record(attended, k, *rows, &records)?;
            }
            gpu.linears(attended, &records, *rows, &o, adds)?;
        }
        if !adds {
            cuda.add(x, out)?;
        }
        Ok(())
    }

    /// Whether a layer's attention is done by kernels of a single row.
    fn one_row(&self, rows: usize, backbone: &Backbone<Gpu>, layer: &BackboneLayer<Gpu>) -> bool {
        let same = layer.q.weight.dtype() == layer.k.weight.dtype()
            && layer.q.weight.dtype() == layer.v.weight.dtype();
        rows == 1 && same && self.cuda().one_fits(backbone.config.hidden)
    }

    /// `out = norm(x)`, and its records if weights of integers read it.
    fn normed(
        &self,
        x: &Dev<f32>,
        by: Norm<'_>,
        out: &Dev<f32>,
        records: Option<&Dev<f32>>,
    ) -> Done {
        self.store.gpu().norm_rows(x, by.weight, by.eps, out, records)
    }

    /// `x +=` what the feed-forward part gives, unless its experts are not all here.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn feed_forward(
        &self,
        state: &mut State,
        backbone: &Backbone<Gpu>,
        index: usize,
        plan: &Plan,
        work: &Work,
        t: &Rows,
    ) -> Result<Reached, DeviceError> {
        let (cuda, gpu, layer) = (self.cuda(), self.store.gpu(), &backbone.layers[index]);
        let Rows { x, normed, delta, .. } = t;
        let rows = plan.rows;
        let State { sparse, dense, complete, counters, .. } = state;
        let by = Norm { weight: &layer.ffn_norm, eps: backbone.config.norm_eps };
        let records = work.records(gpu, rows, backbone.config.hidden);
        let (Some(sparse), Some(routing)) = (&mut sparse[index], &self.routing) else {
            if let Some(experts) = &dense[index] {
                let reads = gpu.reads_records(experts.dtype);
                self.normed(x, by, normed, reads.then_some(&records))?;
                let parts = gpu.networks(&[vec![experts]], &plan.zeros, 1, (normed, &records))?;
                cuda.add(x, &parts)?;
            }
            return Ok(Reached::End);
        };
        let shared = match &layer.feed_forward {
            FeedForwardLayer::Sparse(moe) => moe.shared.as_ref(),
            FeedForwardLayer::Dense(_) => None,
        };
        let k = routing.routes;
        let bad = work.bad.part::<u32>(2 * index * rows * size_of::<u32>(), 2 * rows);
        let Experts { hidden, intermediate, dtype, math, .. } = sparse.places[0][0];
        let recorded = match &layer.feed_forward {
            FeedForwardLayer::Sparse(moe) => moe.router.recorded(rows),
            FeedForwardLayer::Dense(_) => None,
        };
        if rows == 1
            && *complete
            && recorded.is_none()
            && shared.is_none()
            && gpu.cudas().len() == 1
            && routing.is_flat()
            && cuda.one_fits(hidden)
            && cuda.one_fits(intermediate)
        {
            sparse.one.bad = bad.part(0, 1);
            let (how, gate, experts) =
                (routing.choice(sparse), &sparse.gates, &sparse.places[0][0]);
            cuda.route_one(x, Some(by), gate, how, experts, &sparse.one)?;
            let between = cuda.scratch(k * row_words(dtype, math, intermediate))?;
            let parts = cuda.scratch(k * hidden)?;
            let routes = &sparse.one;
            cuda.swiglu_one(x, Some(by), experts, routes, &between, &parts, counters, x)?;
            return Ok(Reached::End);
        }
        // The format of experts may not be known yet.
        let reads = !*complete
            || sparse.formats().any(|dtype| gpu.reads_records(dtype))
            || dense[index].as_ref().is_some_and(|dense| gpu.reads_records(dense.dtype))
            || shared.and_then(|s| s.gate.as_ref()).is_some_and(|g| gpu.reads_records(g.dtype()));
        self.normed(x, by, normed, reads.then_some(&records))?;
        let gates = [Linear { weight: &sparse.gates, bias: None, out: &work.scores }];
        cuda.matmul(normed, rows, &gates, false)?;
        let (scores, chosen) = ((&work.scores, plan.masks.as_ref()), &work.chosen);
        routing.choose(cuda, index, sparse, scores, (chosen, &bad))?;
        if let Some(recorded) = recorded {
            cuda.put(&chosen.index, 0, &recorded)?;
        }
        if !*complete {
            if cuda.download(&bad)?.iter().any(|&bad| bad != 0) {
                return Ok(Reached::NotFinite);
            }
            let index_of = cuda.download(&chosen.index)?;
            if !sparse.have(&self.store, index_of.into_iter(), rows > SCAN_ROWS)? {
                sparse.release();
                return Ok(Reached::Experts { layer: index });
            }
        }
        let both = (normed, &records);
        let places: Vec<Vec<&Experts>> =
            sparse.places.iter().map(|tiers| tiers.iter().collect()).collect();
        let parts = gpu.networks(&places, &chosen.index, k, both)?;
        if !*complete {
            sparse.release();
        }
        let (out, adds) = if shared.is_some() { (delta, false) } else { (x, true) };
        let counts = (!routing.is_flat()).then_some(&chosen.count);
        cuda.weighted_sum_of(&parts, &chosen.weight, counts, k, adds, out)?;
        if let (Some(shared), Some(experts)) = (shared, &dense[index]) {
            let extra = gpu.networks(&[vec![experts]], &plan.zeros, 1, both)?;
            if let Some(gate) = &shared.gate {
                let logits = cuda.scratch(rows)?;
                let product = [Linear { weight: gate, bias: None, out: &logits }];
                gpu.linears(normed, &records, rows, &product, false)?;
                cuda.sigmoid_gate(&extra, &logits)?;
            }
            cuda.add(delta, &extra)?;
            cuda.add(x, delta)?;
        }
        Ok(Reached::End)
    }
}
