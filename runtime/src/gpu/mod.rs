//! A pass on a GPU: from layer to layer without coming back to the host, while it can.
//!
//! Where all experts are in the GPU's memory and only tokens are wanted, a pass goes from its tokens to
//! the next ones: what it needs goes to the device once, and what comes back is a few words a row. Steps of
//! decoding are recorded as graphs. Where experts are missing each layer's routes are read
//! back, and what is missing is copied from the host's memory, or the pass stops there.
//!
//! Shapes: `N` rows, `H` hidden, `C` = N · k routes, `L` rows whose logits are wanted, `V` vocabulary,
//! as in [`crate::forward`].

mod graphs;
mod layers;
mod plan;
mod sparse;

use std::sync::Arc;

use lite_llm_kernels::{
    cuda::{
        Cuda, Dev,
        launch::{DevKv, DevMatrix, Experts, Linear},
        sample::NONE,
    },
    cuda_device::Gpu,
    device::{DeviceError, Draw},
    ops::rope,
};
use parking_lot::Mutex;

use self::{
    graphs::Graphs,
    layers::{Rows, Work},
    plan::{HostPlan, Plan},
    sparse::{Routing, Sparse},
};
use crate::{
    backbone::{Backbone, FeedForwardLayer},
    config::ModelConfig,
    expert::{ExpertStore, GatedMlp},
    forward::{Carried, Carrier, Chunk, Reached, Tensors},
    residency::HbmStore,
};

type Done = Result<(), DeviceError>;

/// Bytes that the rotary table of all positions may take in the GPU's memory.
const ROTARY_BYTES_MAX: usize = 128 << 20;

struct State {
    /// By layer; nothing for a dense one.
    sparse: Vec<Option<Sparse>>,
    /// A network that every row passes, as a table of one: a dense layer, or a shared expert.
    dense: Vec<Option<Experts>>,
    /// All experts of all layers are held.
    complete: bool,
    /// They can be.
    fits: bool,
    /// Routes are read from a recording, layer by layer.
    recorded_routes: bool,
    /// Zeros between two kernels.
    counters: Dev<u32>,
    graphs: Graphs,
}

/// What passes share.
struct Shared {
    store: Arc<HbmStore>,
    routing: Option<Routing>,
    /// `[context, head_dim]`, unless that is too much.
    rotary: Option<Dev<f32>>,
    state: Mutex<State>,
}

/// See the module's text.
pub struct GpuCarrier(Arc<Shared>);

/// What a pass needs of the device, there or still on the host.
enum Planned {
    /// Only tokens are wanted, and all experts are in the GPU's memory.
    Whole(HostPlan),
    Layers(Box<(Plan, Work)>),
}

struct Pass {
    shared: Arc<Shared>,
    planned: Planned,
}

impl GpuCarrier {
    /// A carrier for the model of a backbone, whose experts `store` has. `None` if there is nothing
    /// that it can carry.
    pub fn new(
        backbone: &Backbone<Gpu>,
        store: Arc<HbmStore>,
    ) -> Result<Option<Self>, DeviceError> {
        let (config, cuda) = (&backbone.config, backbone.device.cuda());
        let normed = backbone.layers.iter().any(|layer| layer.q_norm.is_some());
        // A norm of the only head is one of the whole row, too.
        if normed && config.attention.heads == 1 {
            return Ok(None);
        }
        let routing = match &config.moe {
            None => None,
            Some(moe) => match Routing::new(cuda, moe)? {
                None => return Ok(None),
                routing => routing,
            },
        };
        let mut state = State {
            sparse: Vec::new(),
            dense: Vec::new(),
            complete: false,
            fits: store.holds_all(config),
            recorded_routes: backbone.layers.iter().any(|layer| match &layer.feed_forward {
                FeedForwardLayer::Sparse(moe) => moe.router.recorded(0).is_some(),
                FeedForwardLayer::Dense(_) => false,
            }),
            counters: cuda.filled(counters(config, 1), 0)?,
            graphs: Graphs::default(),
        };
        for (index, layer) in backbone.layers.iter().enumerate() {
            let (sparse, dense) = match &layer.feed_forward {
                FeedForwardLayer::Dense(mlp) => (None, Some(dense(&backbone.device, mlp)?)),
                FeedForwardLayer::Sparse(layer) => {
                    let (Some(routing), Some(gates)) = (&routing, layer.router.gates()) else {
                        return Ok(None);
                    };
                    let shared =
                        layer.shared.as_ref().map(|shared| dense(&backbone.device, &shared.mlp));
                    let sparse = Sparse::new(&backbone.device, config, routing, index, &gates)?;
                    (Some(sparse), shared.transpose()?)
                }
            };
            state.sparse.push(sparse);
            state.dense.push(dense);
        }
        let rotary = rotary_table(backbone)?;
        Ok(Some(Self(Arc::new(Shared { store, routing, rotary, state: Mutex::new(state) }))))
    }
}

/// The rotary table of all positions.
fn rotary_table(backbone: &Backbone<Gpu>) -> Result<Option<Dev<f32>>, DeviceError> {
    let (config, device) = (&backbone.config, &backbone.device);
    let values = config.context * config.attention.head_dim;
    if values * size_of::<f32>() > ROTARY_BYTES_MAX {
        return Ok(None);
    }
    let positions: Vec<u32> = (0..config.context as u32).collect();
    let mut table = vec![0.0; values];
    let Backbone { inv_freq, rotary_scale, .. } = backbone;
    rope::rotary_table(device.cpu(), &positions, inv_freq, *rotary_scale, &mut table);
    device.cuda().upload(&table).map(Some)
}

/// Words of counters that kernels of so many rows want.
fn counters(config: &ModelConfig, rows: usize) -> usize {
    rows * config.attention.heads + config.hidden
}

/// One network as a table of one.
fn dense(gpu: &Gpu, mlp: &GatedMlp<DevMatrix>) -> Result<Experts, DeviceError> {
    Ok(Experts {
        dtype: mlp.gate.dtype(),
        math: gpu.math(),
        hidden: mlp.gate.k(),
        intermediate: mlp.gate.n(),
        table: gpu.cuda().upload(&[HbmStore::addresses(mlp)])?,
    })
}

impl State {
    /// Holds all experts of all layers, if that is possible.
    fn complete(&mut self, store: &HbmStore, routing: &Routing) -> Done {
        if self.complete {
            return Ok(());
        }
        for sparse in self.sparse.iter_mut().flatten() {
            let all = sparse.present(routing);
            if !sparse.have(store, all.into_iter(), false)? {
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
        draws: Option<&[Draw]>,
    ) -> Result<Option<Box<dyn Carried<Gpu>>>, DeviceError> {
        let (config, shared) = (&backbone.config, &self.0);
        let tiers = shared.routing.as_ref().map_or(0, Routing::tiers);
        // What is not in the host's memory is waited for by whoever keeps count of it.
        if shared.routing.is_some()
            && (!shared.store.is_whole()
                || tiers == 1 && chunks.iter().any(|chunk| !chunk.tiers.allows(0)))
        {
            return Ok(None);
        }
        let cuda = backbone.device.cuda();
        let mut state = shared.state.lock();
        match &shared.routing {
            Some(routing) if state.fits => state.complete(&shared.store, routing)?,
            Some(_) => {}
            None => state.complete = true,
        }
        let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum::<usize>();
        if state.counters.len() < counters(config, rows) {
            state.counters = cuda.filled(counters(config, rows.next_power_of_two()), 0)?;
        }
        let whole = state.complete
            && !state.recorded_routes
            && shared.rotary.is_some()
            && cuda.samples(config.vocab);
        let planned = match draws {
            Some(draws) if whole => Planned::Whole(HostPlan::new(chunks, draws, tiers)),
            _ => {
                let plan = HostPlan::new(chunks, &[], tiers).lend(cuda)?;
                let bad = cuda.scratch(2 * rows * config.layers.len())?;
                let work = Work::new(&backbone.device, config, shared.routing.as_ref(), rows, bad)?;
                Planned::Layers(Box::new((plan, work)))
            }
        };
        Ok(Some(Box::new(Pass { shared: shared.clone(), planned })))
    }
}

impl Shared {
    fn cuda(&self) -> &Cuda {
        self.store.gpu().cuda()
    }

    /// Gives the device a whole pass. Its results: of each layer and row whether scores are not finite, two
    /// words; of each wanted row its token, two words; of each row the first value of the last hidden state
    /// that is not finite.
    fn whole(
        &self,
        state: &mut State,
        backbone: &Backbone<Gpu>,
        kv: &DevKv,
        plan: &Plan,
    ) -> Result<Dev<u32>, DeviceError> {
        let (cuda, config) = (self.cuda(), &backbone.config);
        let (rows, wanted, hidden) = (plan.rows, plan.wanted.len(), config.hidden);
        let layers = 2 * rows * config.layers.len();
        let results = cuda.scratch::<u32>(layers + rows + 2 * wanted)?;
        let word = size_of::<u32>();
        let t = Rows::new(cuda, config, rows)?;
        let bad = results.part(0, layers);
        let work = Work::new(&backbone.device, config, self.routing.as_ref(), rows, bad)?;
        // First, for a step's attention reads it before the kernel before it has ended.
        if let Some(table) = &self.rotary {
            let head = config.attention.head_dim;
            cuda.select_rows(table, &plan.queries.positions, head, &t.rotary)?;
        }
        cuda.embed(&backbone.embed, &plan.ids, &t.x)?;
        for index in 0..backbone.layers.len() {
            self.attend(state, backbone, index, plan, &work, &t, kv)?;
            // All experts are here.
            self.feed_forward(state, backbone, index, plan, &work, &t)?;
        }
        cuda.finite(&t.x, &results.part((layers + 2 * wanted) * word, rows))?;
        if wanted > 0 {
            let last = cuda.scratch(wanted * hidden)?;
            cuda.select_rows(&t.x, &plan.wanted, hidden, &last)?;
            let head = backbone.head.as_ref().unwrap_or(&backbone.embed);
            let gpu = self.store.gpu();
            let reads = gpu.reads_records(head.dtype());
            let words = if reads { gpu.record_words(hidden) } else { 0 };
            let (records, normed) = (cuda.scratch(wanted * words)?, cuda.scratch(wanted * hidden)?);
            let (norm, records_of) = (&backbone.norm, reads.then_some(&records));
            gpu.norm_rows(&last, norm, config.norm_eps, &normed, records_of)?;
            let logits = cuda.scratch(wanted * config.vocab)?;
            let product = [Linear { weight: head, bias: None, out: &logits }];
            self.store.gpu().linears(&normed, &records, wanted, &product, false)?;
            let weights = cuda.scratch(logits.len())?;
            let tokens = results.part(layers * word, wanted);
            cuda.sample(&logits, &plan.draws, &weights, &tokens)?;
        }
        Ok(results)
    }

    /// A pass from its tokens to the next ones.
    fn carry_whole(
        &self,
        backbone: &Backbone<Gpu>,
        host: &HostPlan,
        kv: &DevKv,
    ) -> Result<Reached, DeviceError> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let layout = host.layout();
        let mut graphs = std::mem::take(&mut state.graphs);
        let kept = state.counters.part(0, state.counters.len());
        if self.store.gpu().cudas().len() > 1 {
            graphs.refuse();
        }
        let replayed = graphs.run(self.cuda(), host, kv.address(), &kept, |memory| {
            self.whole(state, backbone, kv, &layout.views(memory))
        });
        state.graphs = graphs;
        let results = match replayed? {
            Some(results) => results,
            None => self.whole(state, backbone, kv, &host.lend(self.cuda())?)?,
        };
        let results = self.cuda().download(&results)?;
        self.store.gpu().ended();
        let (flags, rest) = results.split_at(2 * layout.rows * backbone.config.layers.len());
        let (tokens, finite) = rest.split_at(rest.len() - layout.rows);
        let tokens: Vec<u32> = tokens.chunks_exact(2).map(|token| token[0]).collect();
        let fine = flags.iter().all(|&bad| bad == 0) && finite.iter().all(|&at| at == NONE);
        Ok(if fine && tokens.iter().all(|&token| token != NONE) {
            Reached::Tokens(tokens)
        } else {
            Reached::NotFinite
        })
    }
}

impl Carried<Gpu> for Pass {
    fn is_whole(&self) -> bool {
        matches!(self.planned, Planned::Whole(_))
    }

    fn carry(
        &mut self,
        backbone: &Backbone<Gpu>,
        layer: usize,
        tensors: &mut Tensors<Gpu>,
        arena: &mut DevKv,
    ) -> Result<Reached, DeviceError> {
        let shared = &self.shared;
        let (plan, work) = match &self.planned {
            Planned::Whole(host) => return shared.carry_whole(backbone, host, arena),
            Planned::Layers(both) => (&both.0, &both.1),
        };
        let t = Rows::of(tensors);
        let mut state = shared.state.lock();
        for index in layer..backbone.layers.len() {
            shared.attend(&state, backbone, index, plan, work, &t, arena)?;
            match shared.feed_forward(&mut state, backbone, index, plan, work, &t)? {
                Reached::End => {}
                stopped => return Ok(stopped),
            }
        }
        let bad = shared.cuda().download(&work.bad)?;
        Ok(if bad.iter().any(|&bad| bad != 0) { Reached::NotFinite } else { Reached::End })
    }
}
