//! A pass on a GPU: layer after layer without coming back to the host, while it can.
//!
//! Carries passes of flat mixtures (one tier of one group) and of dense layers; the routes of others
//! are chosen on the host, layer by layer ([`crate::forward`]). Where all experts are in the GPU's
//! memory nothing is read back before the logits; else each layer's routes are, and what is missing is
//! copied from the host's memory, or the pass stops there.
//!
//! Shapes: `N` rows, `H` hidden, `C` = N · k routes, `V` vocabulary, as in [`crate::forward`].
//!
//! Invariant: an expert whose address is in a layer's table is held until the work that may
//! read it was given to the device.

use std::sync::Arc;

use lite_llm_kernels::{
    cuda::{
        Cuda, Dev,
        fast::Math,
        launch::{Choose, DevKv, DevMatrix, DevQueries, Experts, Linear, row_words},
        one::{Heads, Norm, Routes},
    },
    cuda_device::{Gpu, GpuTensor},
    device::DeviceError,
    dtype::DType,
    kv::PAGE_TOKENS,
};
use parking_lot::Mutex;

use crate::{
    backbone::{Backbone, BackboneLayer, FeedForwardLayer},
    config::{ModelConfig, MoeConfig},
    expert::{ExpertKey, ExpertStore, GatedMlp},
    forward::{Carried, Carrier, Chunk, Reached, Tensors},
    random::{Purpose, hash_name, random_u64},
    residency::HbmStore,
    routing::Level,
};

type Done = Result<(), DeviceError>;

/// Rows of a tile of attention.
const ATTENTION_ROWS: usize = 64;

/// Experts that are held in the GPU's memory.
type Held = Vec<Option<Arc<GatedMlp<DevMatrix>>>>;

/// The experts of a sparse layer, and what chooses among them.
struct Sparse {
    gate: DevMatrix,
    /// Of equal scores: see [`random_u64`].
    seed: u64,
    experts: Experts,
    /// What the table holds.
    addresses: Vec<[u64; 3]>,
    held: Held,
    /// The routes of a single row.
    one: Routes,
}

struct State {
    /// By layer; nothing for a dense one.
    sparse: Vec<Option<Sparse>>,
    /// A network that every row passes, as a table of one: a dense layer, or a shared expert.
    dense: Vec<Option<Experts>>,
    /// All experts of all layers are held.
    complete: bool,
    /// Zeros between two kernels.
    counters: Dev<u32>,
}

/// See the module's text.
pub struct GpuCarrier {
    store: Arc<HbmStore>,
    moe: Option<MoeConfig>,
    names: Dev<u64>,
    state: Arc<Mutex<State>>,
}

/// What a pass takes to the device once.
struct Plan {
    rows: usize,
    slots: Dev<[u32; 2]>,
    queries: DevQueries,
    /// First rows and counts; none where every row is a sequence of its own.
    tiles: Option<Dev<[u32; 2]>>,
    zeros: Dev<u32>,
}

struct Pass {
    store: Arc<HbmStore>,
    names: Dev<u64>,
    state: Arc<Mutex<State>>,
    plan: Plan,
    work: Work,
    moe: Option<(usize, bool)>,
}

/// Memory of a pass beside its tensors.
struct Work {
    /// Rows as products of integers read them.
    records: Dev<f32>,
    /// `[N, experts]`.
    scores: Dev<f32>,
    /// `[C]`.
    index: Dev<u32>,
    /// `[C]`.
    weight: Dev<f32>,
    /// Of each layer, whether a row's scores are not all finite: `[layers, N]`.
    bad: Dev<u32>,
}

impl GpuCarrier {
    /// A carrier for the model of a backbone, whose experts `store` has. `None` if there is nothing
    /// that it can carry.
    pub fn new(
        backbone: &Backbone<Gpu>,
        store: Arc<HbmStore>,
    ) -> Result<Option<Self>, DeviceError> {
        let (config, cuda) = (&backbone.config, backbone.device.cuda());
        let moe = config.moe.clone();
        let normed = backbone.layers.iter().any(|layer| layer.q_norm.is_some());
        // A norm of the only head is one of the whole row, too.
        if normed && config.attention.heads == 1 {
            return Ok(None);
        }
        if moe.as_ref().is_some_and(|moe| moe.tiers.len() != 1 || moe.tiers[0].groups != 1) {
            return Ok(None);
        }
        let tier = moe.as_ref().map(|moe| hash_name(moe.tiers[0].id.as_str()));
        let mut state = State {
            sparse: Vec::new(),
            dense: Vec::new(),
            complete: false,
            counters: cuda.filled(counters(config, 1), 0)?,
        };
        for (index, layer) in backbone.layers.iter().enumerate() {
            let (sparse, dense) = match &layer.feed_forward {
                FeedForwardLayer::Dense(mlp) => (None, Some(dense(cuda, mlp)?)),
                FeedForwardLayer::Sparse(layer) => {
                    let (Some(moe), Some(gate)) = (&moe, layer.router.flat_gate()) else {
                        return Ok(None);
                    };
                    let shared = layer.shared.as_ref().map(|shared| dense(cuda, &shared.mlp));
                    (
                        Some(sparse(cuda, config, moe, index, cuda.matrix(gate)?)?),
                        shared.transpose()?,
                    )
                }
            };
            state.sparse.push(sparse);
            state.dense.push(dense);
        }
        let names = cuda.upload(&[tier.unwrap_or(0)])?;
        Ok(Some(Self { store, moe, names, state: Arc::new(Mutex::new(state)) }))
    }
}

/// Words of counters that kernels of so many rows want.
fn counters(config: &ModelConfig, rows: usize) -> usize {
    rows * config.attention.kv_heads + config.hidden
}

/// One network as a table of one.
fn dense(cuda: &Cuda, mlp: &GatedMlp<DevMatrix>) -> Result<Experts, DeviceError> {
    Ok(Experts {
        dtype: mlp.gate.dtype(),
        math: Math::Exact,
        hidden: mlp.gate.k(),
        intermediate: mlp.gate.n(),
        table: cuda.upload(&[HbmStore::addresses(mlp)])?,
    })
}

fn sparse(
    cuda: &Cuda,
    config: &ModelConfig,
    moe: &MoeConfig,
    layer: usize,
    gate: DevMatrix,
) -> Result<Sparse, DeviceError> {
    let n = gate.n();
    let place = (layer as u64) << 8 | Level::Expert as u64;
    let experts = Experts {
        // Known when the first has come.
        dtype: DType::F32,
        math: Math::Exact,
        hidden: config.hidden,
        intermediate: moe.intermediate(0),
        table: cuda.filled(n, 0)?,
    };
    Ok(Sparse {
        one: cuda.routes(n, moe.k_expert(0) as usize)?,
        seed: random_u64(moe.routing.seed, Purpose::TieBreak, place),
        gate,
        experts,
        addresses: vec![[0; 3]; n],
        held: vec![None; n],
    })
}

impl Sparse {
    fn key(layer: usize, expert: u32) -> ExpertKey {
        ExpertKey { layer: layer as u16, tier: 0, group: 0, expert }
    }

    /// Has these experts in the table; false if one cannot be had now.
    fn have(
        &mut self,
        store: &HbmStore,
        layer: usize,
        experts: impl Iterator<Item = u32>,
    ) -> Result<bool, DeviceError> {
        let (mut changed, mut all) = (false, true);
        for expert in experts {
            let place = expert as usize;
            if place >= self.held.len() || self.held[place].is_some() {
                continue;
            }
            // Whoever runs it by itself says why it cannot be had.
            let Ok(weights) = store.fetch(Self::key(layer, expert)) else {
                all = false;
                break;
            };
            let dtype = weights.gate.dtype();
            if self.held.iter().all(Option::is_none) {
                self.experts.dtype = dtype;
            }
            if [dtype, weights.up.dtype(), weights.down.dtype()] != [self.experts.dtype; 3] {
                all = false;
                break;
            }
            let addresses = HbmStore::addresses(&weights);
            changed |= self.addresses[place] != addresses;
            self.addresses[place] = addresses;
            self.held[place] = Some(weights);
        }
        if changed {
            store.gpu().cuda().write(&self.experts.table, 0, &self.addresses)?;
        }
        Ok(all)
    }

    /// Lets go of all experts, which the device has been told to compute with.
    fn release(&mut self) {
        self.held.iter_mut().for_each(|held| *held = None);
    }
}

impl State {
    /// Holds all experts of all layers, if that is possible.
    fn complete(&mut self, store: &HbmStore) -> Result<(), DeviceError> {
        if self.complete {
            return Ok(());
        }
        for (layer, sparse) in self.sparse.iter_mut().enumerate() {
            let Some(sparse) = sparse else { continue };
            let all = 0..sparse.held.len() as u32;
            if !sparse.have(store, layer, all)? {
                self.sparse.iter_mut().flatten().for_each(Sparse::release);
                return Ok(());
            }
        }
        self.complete = true;
        Ok(())
    }
}

impl Carrier<Gpu> for GpuCarrier {
    fn begin(
        &self,
        backbone: &Backbone<Gpu>,
        chunks: &[Chunk],
    ) -> Result<Option<Box<dyn Carried<Gpu>>>, DeviceError> {
        let config = &backbone.config;
        // What is not in the host's memory is waited for by whoever keeps count of it.
        if self.moe.is_some()
            && (!self.store.is_complete() || chunks.iter().any(|c| !c.tiers.allows(0)))
        {
            return Ok(None);
        }
        let cuda = backbone.device.cuda();
        let mut state = self.state.lock();
        if self.store.holds_all(config) {
            state.complete(&self.store)?;
        }
        let plan = Plan::new(cuda, chunks)?;
        if state.counters.len() < counters(config, plan.rows) {
            state.counters = cuda.filled(counters(config, plan.rows.next_power_of_two()), 0)?;
        }
        drop(state);
        let rows = plan.rows;
        let (experts, k) = self
            .moe
            .as_ref()
            .map_or((0, 0), |moe| (moe.tiers[0].experts() as usize, moe.k_expert(0) as usize));
        let widest = config.hidden.max(config.attention.heads * config.attention.head_dim);
        let work = Work {
            records: cuda.scratch(rows * row_words(DType::Int8, Math::Exact, widest))?,
            scores: cuda.scratch(rows * experts)?,
            index: cuda.scratch(rows * k)?,
            weight: cuda.scratch(rows * k)?,
            bad: cuda.scratch(rows * config.layers.len())?,
        };
        cuda.fill(&work.bad, 0)?;
        Ok(Some(Box::new(Pass {
            store: self.store.clone(),
            names: self.names.part(0, self.names.len()),
            state: self.state.clone(),
            plan,
            work,
            moe: self.moe.as_ref().map(|moe| (k, moe.routing.renormalize)),
        })))
    }
}

impl Plan {
    fn new(cuda: &Cuda, chunks: &[Chunk]) -> Result<Self, DeviceError> {
        let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let stride = chunks.iter().map(|chunk| chunk.pages.len()).max().unwrap_or(0);
        let (mut slots, mut positions, mut tables, mut tiles) = (vec![], vec![], vec![], vec![]);
        for chunk in chunks {
            let (mut first, end) = (positions.len(), positions.len() + chunk.tokens.len());
            while first < end {
                let count = (end - first).min(ATTENTION_ROWS);
                tiles.push([first as u32, count as u32]);
                first += count;
            }
            for position in chunk.start..chunk.start + chunk.tokens.len() {
                let page = chunk.pages[position / PAGE_TOKENS];
                slots.push([page, (position % PAGE_TOKENS) as u32]);
                positions.push(position as u32);
                tables.extend_from_slice(&chunk.pages);
                tables.resize(tables.len() + stride - chunk.pages.len(), 0);
            }
        }
        let longest = positions.iter().copied().max().unwrap_or(0) as usize;
        Ok(Self {
            rows,
            slots: cuda.lend(&slots)?,
            queries: DevQueries {
                tables: cuda.lend(&tables)?,
                stride,
                positions: cuda.lend(&positions)?,
                longest,
            },
            tiles: (tiles.len() < rows).then(|| cuda.lend(&tiles)).transpose()?,
            zeros: cuda.lend(&vec![0; rows])?,
        })
    }
}

/// The parts of a tensor that pass and device share.
fn all(tensor: &GpuTensor) -> &Dev<f32> {
    tensor.data()
}

impl Pass {
    fn cuda(&self) -> &Cuda {
        self.store.gpu().cuda()
    }

    /// Room for the records of rows of k values.
    fn records(&self, k: usize) -> Dev<f32> {
        self.work.records.part(0, self.plan.rows * row_words(DType::Int8, Math::Exact, k))
    }

    /// Products of the pass's rows: see [`Gpu::linears`].
    fn products(
        &self,
        rows: &Dev<f32>,
        records: &Dev<f32>,
        products: &[Linear<'_>],
        adds: bool,
    ) -> Done {
        self.store.gpu().linears(rows, records, self.plan.rows, products, adds)
    }

    /// Networks over the pass's rows: see [`Gpu::networks`].
    fn networks(
        &self,
        experts: &Experts,
        index: &Dev<u32>,
        (rows, records): (&Dev<f32>, &Dev<f32>),
    ) -> Result<Dev<f32>, DeviceError> {
        let per_row = index.len() / self.plan.rows;
        self.store.gpu().networks(experts, index, per_row, rows, records)
    }

    /// `x += attention`, and what it writes into the cache.
    fn attend(
        &self,
        state: &State,
        backbone: &Backbone<Gpu>,
        index: usize,
        t: &Tensors<Gpu>,
        kv: &DevKv,
    ) -> Done {
        let (cuda, layer, config) = (self.cuda(), &backbone.layers[index], &backbone.config);
        let attention = &config.attention;
        let Plan { rows, slots, queries, tiles, .. } = &self.plan;
        let scale = 1.0 / (attention.head_dim as f32).sqrt();
        let window = config.layers[index].window;
        let (x, q, k, v) = (all(&t.x), all(&t.q), all(&t.k), all(&t.v));
        let qkv = [(&layer.q, q), (&layer.k, k), (&layer.v, v)].map(|(linear, out)| Linear {
            weight: &linear.weight,
            bias: linear.bias.as_ref(),
            out,
        });
        let norms = match (&layer.q_norm, &layer.k_norm) {
            (Some(q), Some(k)) => Some((q, k, config.norm_eps)),
            _ => None,
        };
        let heads = Heads { q, k, v, norms, rotary: Some(all(&t.rotary)) };
        let parts =
            cuda.attention_parts(*rows, attention.heads, attention.head_dim, queries.longest)?;
        let attended = all(&t.attended);
        let one = self.one_row(backbone, layer);
        let norm = Norm { weight: &layer.attention_norm, eps: config.norm_eps };
        if one {
            cuda.linear_one(x, Some(norm), &qkv, false)?;
        } else {
            let records = self.records(config.hidden);
            let reads = qkv.iter().any(|linear| linear.weight.dtype().is_quantised());
            self.normed(x, norm, all(&t.normed), reads.then_some(&records))?;
            self.products(all(&t.normed), &records, &qkv, false)?;
        }
        if one && attention.clip_qkv.is_none() && cuda.attention_step_fits(kv) {
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
                        cuda.rope(x, all(&t.rotary), attention.head_dim)?;
                    }
                    cuda.kv_append(kv, index, k, v, slots)?;
                }
            }
            match tiles {
                Some(tiles) if cuda.attention_rows_fits(kv) => cuda.attention_rows(
                    kv, index, q, queries, tiles, scale, window, &parts, attended,
                )?,
                _ => cuda.attention(kv, index, q, queries, scale, window, &parts, attended)?,
            }
        }
        // With a bias, the sum is rounded before it is added.
        let adds = layer.o.bias.is_none();
        let out = if adds { x } else { all(&t.delta) };
        let o = [Linear { weight: &layer.o.weight, bias: layer.o.bias.as_ref(), out }];
        if one {
            cuda.linear_one(attended, None, &o, adds)?;
        } else {
            let records = self.records(layer.o.weight.k());
            if layer.o.weight.dtype().is_quantised() {
                cuda.quantise(attended, layer.o.weight.k(), *rows, &records)?;
            }
            self.products(attended, &records, &o, adds)?;
        }
        if !adds {
            cuda.add(x, out)?;
        }
        Ok(())
    }

    /// Whether a layer's attention is done by kernels of a single row.
    fn one_row(&self, backbone: &Backbone<Gpu>, layer: &BackboneLayer<Gpu>) -> bool {
        let same = layer.q.weight.dtype() == layer.k.weight.dtype()
            && layer.q.weight.dtype() == layer.v.weight.dtype();
        self.plan.rows == 1
            && same
            && self.cuda().one_fits(backbone.config.hidden)
            && self.cuda().one_fits(layer.o.weight.k())
    }

    /// `out = norm(x)`, and its records if weights of integers read it.
    fn normed(
        &self,
        x: &Dev<f32>,
        by: Norm<'_>,
        out: &Dev<f32>,
        records: Option<&Dev<f32>>,
    ) -> Done {
        self.cuda().norm_rows(x, by.weight, by.eps, Some(out), records)
    }

    /// `x +=` what the feed-forward part gives, unless its experts are not all here.
    fn feed_forward(
        &self,
        state: &mut State,
        backbone: &Backbone<Gpu>,
        index: usize,
        t: &Tensors<Gpu>,
    ) -> Result<Reached, DeviceError> {
        let (cuda, layer) = (self.cuda(), &backbone.layers[index]);
        let (x, normed, delta) = (all(&t.x), all(&t.normed), all(&t.delta));
        let eps = backbone.config.norm_eps;
        let State { sparse, dense, complete, counters } = state;
        let by = Norm { weight: &layer.ffn_norm, eps };
        let records = self.records(backbone.config.hidden);
        let (Some(sparse), Some((k, renormalise))) = (&mut sparse[index], self.moe) else {
            if let Some(experts) = &dense[index] {
                let reads = experts.dtype.is_quantised();
                self.normed(x, by, normed, reads.then_some(&records))?;
                let parts = self.networks(experts, &self.plan.zeros, (normed, &records))?;
                cuda.add(x, &parts)?;
            }
            return Ok(Reached::End);
        };
        let how = Choose {
            n: sparse.gate.n(),
            k,
            seed: sparse.seed,
            masks: None,
            tier_names: &self.names,
            level: Level::Expert as usize,
            tiers: None,
            groups: None,
            parents: None,
            renormalise,
        };
        let shared = match &layer.feed_forward {
            FeedForwardLayer::Sparse(moe) => moe.shared.as_ref(),
            FeedForwardLayer::Dense(_) => None,
        };
        let rows = self.plan.rows;
        let bad = self.work.bad.part::<u32>(index * rows * size_of::<u32>(), rows);
        let Experts { hidden, intermediate, dtype, math, .. } = sparse.experts;
        if rows == 1
            && *complete
            && shared.is_none()
            && cuda.one_fits(hidden)
            && cuda.one_fits(intermediate)
        {
            sparse.one.bad = bad;
            cuda.route_one(x, Some(by), &sparse.gate, how, &sparse.experts, &sparse.one)?;
            let between = cuda.scratch(k * row_words(dtype, math, intermediate))?;
            let parts = cuda.scratch(k * hidden)?;
            let (experts, routes) = (&sparse.experts, &sparse.one);
            cuda.swiglu_one(x, Some(by), experts, routes, &between, &parts, counters, x)?;
            return Ok(Reached::End);
        }
        // The format of experts may not be known yet.
        self.normed(x, by, normed, Some(&records))?;
        let gate = [Linear { weight: &sparse.gate, bias: None, out: &self.work.scores }];
        cuda.matmul(normed, rows, &gate, false)?;
        cuda.choose(&self.work.scores, how, &self.work.index, &self.work.weight, &bad)?;
        if !*complete {
            if cuda.download(&bad)?.iter().any(|&bad| bad != 0) {
                return Ok(Reached::NotFinite);
            }
            let chosen = cuda.download(&self.work.index)?;
            if !sparse.have(&self.store, index, chosen.into_iter())? {
                sparse.release();
                return Ok(Reached::Experts { layer: index });
            }
        }
        let both = (normed, &records);
        let parts = self.networks(&sparse.experts, &self.work.index, both)?;
        if !*complete {
            sparse.release();
        }
        let out = if shared.is_some() { delta } else { x };
        cuda.weighted_sum(&parts, &self.work.weight, k, shared.is_none(), out)?;
        if let (Some(shared), Some(experts)) = (shared, &dense[index]) {
            let extra = self.networks(experts, &self.plan.zeros, both)?;
            if let Some(gate) = &shared.gate {
                let logits = cuda.scratch(rows)?;
                let product = [Linear { weight: gate, bias: None, out: &logits }];
                self.products(normed, &records, &product, false)?;
                cuda.sigmoid_gate(&extra, &logits)?;
            }
            cuda.add(delta, &extra)?;
            cuda.add(x, delta)?;
        }
        Ok(Reached::End)
    }
}

impl Carried<Gpu> for Pass {
    fn carry(
        &mut self,
        backbone: &Backbone<Gpu>,
        layer: usize,
        tensors: &mut Tensors<Gpu>,
        arena: &mut DevKv,
    ) -> Result<Reached, DeviceError> {
        let state = self.state.clone();
        let mut state = state.lock();
        for index in layer..backbone.layers.len() {
            self.attend(&state, backbone, index, tensors, arena)?;
            match self.feed_forward(&mut state, backbone, index, tensors)? {
                Reached::End => {}
                stopped => return Ok(stopped),
            }
        }
        let bad = self.cuda().download(&self.work.bad)?;
        Ok(if bad.iter().any(|&bad| bad != 0) { Reached::NotFinite } else { Reached::End })
    }
}
