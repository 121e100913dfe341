//! One of several ranks that train a model together: it owns experts and a part of all else, with the optimizer's
//! states of what it owns, computes nodes of each batch, and serves the others its experts.
//!
//! ```text
//! trainer ── Order ──▶ perform ── Call: rows to experts, gradients to owners ──▶ another rank's serve
//!         ◀── Given ──         ◀── outputs ──
//! ```
//!
//! [`Rank::perform`] is called by one thread, [`Rank::serve`] by others beside it. Invariants: no lock is held while
//! another rank is waited for, but for the shared one of a pass, which nobody asks for exclusively before all
//! ranks have given what they computed; what is kept belongs to one round ([`Work::round`]), and goes with it.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};

use lite_llm_kernels::{
    cpu::Cpu,
    ops::{
        gated::{self, GatedTape},
        leaves::{LeafPlan, Place},
    },
    rows::Rows,
};
use parking_lot::{Mutex, RwLock};

use super::{
    TrainError,
    batch::{Batch, Row},
    exchange::{self, At, Backward, Call, Exchange, Forward, Others},
    gradients::{Gradients, NodeSums},
    moe::{ExpertPart, each, weights_of},
    orders::{Begin, Given, Kind, OfNode, Order, Tensor, Wanted, Work},
    params::{FeedForwardIds, MlpIds, ParamId, Params},
    step::{self, Node, Objective, StepOptions},
    trained::Trained,
    trainer::{Pull, Trainer},
};
use crate::{expert::ExpertKey, tier::TierMask};

/// Bytes of values in one message, unless one parameter has more.
pub(super) const TENSORS_BYTES: usize = 64 << 20;

/// See the module's text.
pub struct Rank {
    cpu: Arc<Cpu>,
    exchange: Arc<dyn Exchange>,
    model: RwLock<Option<Model>>,
    round: Mutex<Round>,
}

struct Model {
    /// Of what this rank owns.
    trainer: Trainer,
    rank: usize,
    ranks: usize,
    owners: Vec<usize>,
    /// Which parameters are trained, whoever owns them.
    wanted: Vec<bool>,
    experts: BTreeMap<ExpertKey, MlpIds>,
    /// Which parameters are of experts: only their owner has them.
    of_experts: Vec<bool>,
    /// What the next step applies.
    ready: Vec<Option<Vec<f32>>>,
}

/// What is kept of the work that is under way.
#[derive(Default)]
struct Round {
    number: u64,
    /// Rows of its batch.
    batch: usize,
    /// By the rank that asked.
    served: HashMap<(usize, u64, usize), Served>,
    sums: NodeSums,
}

/// A forward pass of another rank through experts of this one.
struct Served {
    node: Range<usize>,
    places: Vec<Place>,
    /// `[places, hidden]`.
    x: Vec<f32>,
    experts: Vec<(MlpIds, Vec<u32>, GatedTape)>,
}

fn lost(reason: impl Into<String>) -> TrainError {
    TrainError::Lost(reason.into())
}

fn misfit(what: &str) -> TrainError {
    TrainError::Workers(format!("another rank sends {what} that do not fit the model"))
}

/// The matrices of every expert, and which parameters they are.
pub(super) fn experts_of(params: &Params) -> (BTreeMap<ExpertKey, MlpIds>, Vec<bool>) {
    let mut experts = BTreeMap::new();
    let mut of_experts = vec![false; params.list().len()];
    for (layer, ids) in params.ids().layers.iter().enumerate() {
        let FeedForwardIds::Sparse { tiers, .. } = &ids.feed_forward else { continue };
        for (tier, of_tier) in tiers.iter().enumerate() {
            for (group, of_group) in (0u32..).zip(&of_tier.each) {
                for (expert, ids) in (0u32..).zip(&of_group.experts) {
                    let (layer, tier) = (layer as u16, tier as u16);
                    experts.insert(ExpertKey { layer, tier, group, expert }, *ids);
                    [ids.gate, ids.up, ids.down].iter().for_each(|id| of_experts[*id] = true);
                }
            }
        }
    }
    (experts, of_experts)
}

impl Model {
    fn begin(cpu: &Arc<Cpu>, begin: Begin) -> Result<Self, TrainError> {
        let Begin {
            model,
            precision,
            rank,
            ranks,
            owners,
            trained,
            decays,
            optimizer,
            pull,
            steps,
        } = begin;
        model.check().map_err(|error| TrainError::Workers(error.to_string()))?;
        let mut params = Params::hollow(model);
        params.set_precision(precision);
        let count = params.list().len();
        let fits = [owners.len(), trained.len(), decays.len()] == [count; 3];
        let rows = |(trained, param): (&Trained, &super::params::Param)| match trained {
            Trained::Rows(rows) => rows.iter().all(|row| *row < param.shape[0]),
            _ => true,
        };
        if !fits || owners.iter().any(|owner| *owner >= ranks) || rank >= ranks {
            return Err(misfit("orders"));
        }
        if !trained.iter().zip(params.list()).all(rows) {
            return Err(misfit("rows"));
        }
        let (experts, of_experts) = experts_of(&params);
        let wanted = trained.iter().map(|trained| *trained != Trained::Nothing).collect();
        let own = trained.into_iter().zip(&owners);
        let own = own.map(|(t, owner)| if *owner == rank { t } else { Trained::Nothing }).collect();
        let mut trainer = Trainer::new(cpu.clone(), params, optimizer.build(), own, decays, None);
        trainer.pull(pull.map(|strength| Pull::hollow(strength, count)));
        trainer.begin_at(steps);
        let ready = Vec::new();
        Ok(Self { trainer, rank, ranks, owners, wanted, experts, of_experts, ready })
    }

    fn put(&mut self, tensors: Vec<Tensor>) -> Result<(), TrainError> {
        match tensors.into_iter().all(|tensor| self.trainer.put(tensor)) {
            true => Ok(()),
            false => Err(misfit("values")),
        }
    }

    /// The owner of a gradient; of those behind the last parameter, the embedding's.
    fn owner(&self, id: ParamId) -> usize {
        let embed = self.trainer.params().ids().embed;
        self.owners[if id == self.owners.len() { embed } else { id }]
    }
}

impl Round {
    /// Takes up a round, if it is not over.
    fn enter(&mut self, number: u64, batch: usize) -> Result<(), TrainError> {
        if number > self.number {
            *self = Self { number, batch, ..Self::default() };
        }
        match (number, batch) == (self.number, self.batch) {
            true => Ok(()),
            false => Err(lost("another rank is at another step")),
        }
    }
}

impl Rank {
    /// A rank that knows nothing yet, and its way to the others.
    pub fn new(cpu: Arc<Cpu>, exchange: Arc<dyn Exchange>) -> Self {
        Self { cpu, exchange, model: RwLock::new(None), round: Mutex::new(Round::default()) }
    }

    /// Does what the trainer says. Blocks, also for what other ranks give.
    pub fn perform(&self, order: Order) -> Result<Given, TrainError> {
        let begun = || lost("it was told nothing of a model");
        match order {
            Order::Begin(begin) => {
                let model = Model::begin(&self.cpu, *begin)?;
                *self.model.write() = Some(model);
                *self.round.lock() = Round::default();
            }
            Order::Tensors(tensors) => {
                self.model.write().as_mut().ok_or_else(begun)?.put(tensors)?;
            }
            Order::Work(work) => return self.work(*work),
            Order::Prepare => {
                let mut model = self.model.write();
                let model = model.as_mut().ok_or_else(begun)?;
                return Ok(self.prepare(model));
            }
            Order::Apply(at) => {
                let calls = {
                    let mut model = self.model.write();
                    let model = model.as_mut().ok_or_else(begun)?;
                    let ready = std::mem::take(&mut model.ready);
                    if ready.len() != model.owners.len() {
                        return Err(lost("a step was to be applied that was not prepared"));
                    }
                    model.trainer.apply(at, ready);
                    news(model)
                };
                for calls in calls {
                    self.exchange.ask(calls)()?;
                }
            }
            Order::Read(ids) => {
                let model = self.model.read();
                let model = model.as_ref().ok_or_else(begun)?;
                if ids.iter().any(|id| *id >= model.owners.len()) {
                    return Err(misfit("orders"));
                }
                let tensors = ids.into_iter().flat_map(|id| model.trainer.tensors(id));
                return Ok(Given::Tensors(tensors.collect()));
            }
        }
        Ok(Given::Done)
    }

    fn work(&self, work: Work) -> Result<Given, TrainError> {
        let model = self.model.read_recursive();
        let model = model.as_ref().ok_or_else(|| lost("it was told nothing of a model"))?;
        let Work { round, batch: rows, nodes, tiers, balance, recompute, micro_rows, wanted } =
            work;
        let params = model.trainer.params();
        let count = params.config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
        if tiers.len() != count {
            return Err(misfit("tiers"));
        }
        self.round.lock().enter(round, rows)?;
        // What others compute is not looked at.
        let mut batch = Batch { rows: vec![Row::default(); rows] };
        let mut ranges = Vec::with_capacity(nodes.len());
        for (node, of_node) in nodes {
            batch.rows[node.clone()].clone_from_slice(&of_node);
            step::check(params, &batch, node.clone())?;
            ranges.push(node);
        }
        let mask = TierMask::new(tiers);
        let objective = Objective { cross_entropy: 1.0, balance };
        let options = StepOptions { mask: &mask, objective, recompute, micro_rows };
        let others = Others::new(&*self.exchange, (&model.owners, model.rank), (round, rows));
        let others = (model.ranks > 1).then_some(&others);
        let of = Node { cpu: &self.cpu, params, batch: &batch, options: &options, others };
        let run = |node: Range<usize>| {
            let (loss, sums) = match &wanted {
                Wanted::Sums => (0.0, of.sums(node)?),
                Wanted::Losses => of.losses(node)?,
                Wanted::Gradients { scale, known } => {
                    let found =
                        of.gradients(node.clone(), &model.wanted, *scale, known.as_ref())?;
                    let (loss, sums, gradients) = found;
                    self.give(model, (round, rows), node, gradients)?;
                    (loss, sums)
                }
            };
            Ok(OfNode { loss, sums })
        };
        ranges.into_iter().map(run).collect::<Result<_, _>>().map(Given::Nodes)
    }

    /// Gives a node's gradients to those who own the parameters.
    fn give(
        &self,
        model: &Model,
        (round, batch): (u64, usize),
        node: Range<usize>,
        mut gradients: Gradients,
    ) -> Result<(), TrainError> {
        let mut to: BTreeMap<usize, Vec<(ParamId, Vec<f32>)>> = BTreeMap::new();
        for id in 0..=model.owners.len() {
            if let Some(gradient) = gradients.take(id) {
                to.entry(model.owner(id)).or_default().push((id, gradient));
            }
        }
        let own = to.remove(&model.rank);
        let call = |(rank, list)| {
            let gradients = exchange::Gradients { round, batch, node: node.clone(), list };
            (rank, Call::Gradients(gradients).to_bytes())
        };
        let taken = self.exchange.ask(to.into_iter().map(call).collect());
        for (id, gradient) in own.into_iter().flatten() {
            self.round.lock().sums.add(&self.cpu, batch, (id, node.clone()), gradient);
        }
        taken().map(drop)
    }

    fn prepare(&self, model: &mut Model) -> Given {
        let count = model.owners.len();
        let mut gradients = Gradients::new(count + 1);
        let mut round = self.round.lock();
        let rows = round.batch;
        for id in (0..=count).filter(|id| model.owner(*id) == model.rank) {
            if let Some(gradient) = round.sums.take(&self.cpu, rows, id) {
                gradients.set(id, gradient);
            }
        }
        drop(round);
        gradients.fold_into(&self.cpu, count, model.trainer.params().ids().embed);
        let ready = model.trainer.prepare(gradients);
        model.ready = ready.each;
        Given::Prepared(ready.prepared)
    }

    /// Answers another rank's call; blocks while it computes.
    pub fn serve(&self, from: usize, call: &[u8]) -> Result<Vec<u8>, TrainError> {
        let call = Call::from_bytes(call)?;
        if let Call::Values(tensors) = call {
            let mut model = self.model.write();
            let model = model.as_mut().ok_or_else(|| lost("it was told nothing of a model"))?;
            let foreign = |t: &Tensor| {
                t.kind == Kind::Values && model.owners.get(t.id).is_some_and(|o| *o != model.rank)
            };
            if !tensors.iter().all(foreign) {
                return Err(misfit("values"));
            }
            return model.put(tensors).map(|()| Vec::new());
        }
        // A pass that holds the lock may wait for this answer: waiting writers go after it.
        let model = self.model.read_recursive();
        let model = model.as_ref().ok_or_else(|| lost("it was told nothing of a model"))?;
        match call {
            Call::Forward(forward) => self.forward(model, from, forward),
            Call::Backward(backward) => self.backward(model, from, backward),
            Call::Gradients(exchange::Gradients { round, batch, node, list }) => {
                let sizes = model.trainer.params();
                let fits = |(id, gradient): &(ParamId, Vec<f32>)| {
                    let of = if *id == model.owners.len() { sizes.ids().embed } else { *id };
                    let len = sizes.list().get(of).map(|param| param.len());
                    len == Some(gradient.len()) && model.owner(*id) == model.rank
                };
                if !list.iter().all(fits) {
                    return Err(misfit("gradients"));
                }
                self.round.lock().enter(round, batch)?;
                for (id, gradient) in list {
                    let at = (id, node.clone());
                    self.round.lock().sums.add(&self.cpu, batch, at, gradient);
                }
                Ok(Vec::new())
            }
            Call::Values(_) => unreachable!("values were taken above"),
        }
    }

    fn forward(&self, model: &Model, from: usize, call: Forward) -> Result<Vec<u8>, TrainError> {
        let Forward { at, batch, node, keep, places, x, experts } = call;
        let params = model.trainer.params();
        let hidden = params.config().hidden;
        let inside = |place: &Place| node.contains(&(place.row as usize));
        let mut known = Vec::with_capacity(experts.len());
        for (key, rows) in experts {
            let ids = model.experts.get(&key).filter(|_| usize::from(key.layer) == at.layer);
            let ids = ids.filter(|ids| model.owners[ids.gate] == model.rank);
            let ids = *ids.ok_or_else(|| misfit("experts"))?;
            let fits = rows.is_sorted_by(|a, b| a < b)
                && rows.last().is_some_and(|last| (*last as usize) < places.len());
            if !fits {
                return Err(misfit("rows"));
            }
            known.push((ids, rows, GatedTape::default()));
        }
        let sorted = places.is_sorted_by(|a, b| a < b) && places.iter().all(inside);
        if x.len() != places.len() * hidden || !sorted {
            return Err(misfit("rows"));
        }
        self.round.lock().enter(at.round, batch)?;
        let known = each(&self.cpu, known, |(ids, rows, tape)| {
            let rows = picked(&x, hidden, rows);
            *tape = gated::forward(&self.cpu, Rows::List(&rows), weights_of(params, *ids));
        });
        let outputs: Vec<&[f32]> = known.iter().map(|(_, _, tape)| &tape.y[..]).collect();
        let outputs = outputs.concat();
        if keep {
            let served = Served { node, places, x, experts: known };
            self.round.lock().served.insert((from, at.pass, at.layer), served);
        }
        Ok(exchange::values_to_bytes(&[&outputs]))
    }

    fn backward(&self, model: &Model, from: usize, call: Backward) -> Result<Vec<u8>, TrainError> {
        let Backward { at: At { round, pass, layer }, dout, weights } = call;
        let params = model.trainer.params();
        let hidden = params.config().hidden;
        let (served, batch) = {
            let mut now = self.round.lock();
            let served = now.served.remove(&(from, pass, layer)).filter(|_| now.number == round);
            (served.ok_or_else(|| lost("another rank is at another step"))?, now.batch)
        };
        let Served { node, places, x, experts } = served;
        let routes: usize = experts.iter().map(|(_, rows, _)| rows.len()).sum();
        if dout.len() != x.len() || weights.len() != routes {
            return Err(misfit("gradients"));
        }
        let mut rest = &weights[..];
        let mut parts = Vec::with_capacity(experts.len());
        for (ids, rows, tape) in experts {
            let (own, others) = rest.split_at(rows.len());
            rest = others;
            parts.push((ids, rows, tape, own.to_vec(), None));
        }
        let parts = each(&self.cpu, parts, |(ids, rows, tape, weights, done)| {
            let of: Vec<Place> = rows.iter().map(|&row| places[row as usize]).collect();
            let part = ExpertPart {
                x: picked(&x, hidden, rows),
                tape,
                weights: std::mem::take(weights),
                dout: picked(&dout, hidden, rows),
                plan: LeafPlan::of_tokens(&of, node.clone()),
            };
            *done = Some(part.backward(&self.cpu, params, *ids, &model.wanted));
        });
        let (mut dw, mut dx) = (Vec::with_capacity(routes), Vec::with_capacity(routes * hidden));
        for (ids, _, _, _, done) in parts {
            let Some((of_weights, of)) = done else { continue };
            dw.extend(of_weights);
            dx.extend(of.x);
            for (id, gradient) in
                [ids.gate, ids.up, ids.down].into_iter().zip(of.weights.into_iter().flatten())
            {
                self.round.lock().sums.add(&self.cpu, batch, (id, node.clone()), gradient);
            }
        }
        Ok(exchange::values_to_bytes(&[&dw, &dx]))
    }
}

/// Some rows of `[rows, width]`.
fn picked<'a>(x: &'a [f32], width: usize, rows: &[u32]) -> Vec<&'a [f32]> {
    rows.iter().map(|&row| &x[row as usize * width..][..width]).collect()
}

/// What the others are to be told after a step, in messages of bounded size.
fn news(model: &Model) -> Vec<Vec<(usize, Vec<u8>)>> {
    let own = |id: &ParamId| {
        model.owners[*id] == model.rank && model.wanted[*id] && !model.of_experts[*id]
    };
    let mut all = Vec::new();
    let (mut now, mut bytes) = (Vec::new(), 0);
    let mut send = |now: &mut Vec<Tensor>| {
        let call = Call::Values(std::mem::take(now)).to_bytes();
        let others = (0..model.ranks).filter(|rank| *rank != model.rank);
        all.push(others.map(|rank| (rank, call.clone())).collect());
    };
    for id in (0..model.owners.len()).filter(own) {
        let values = model.trainer.params().values(id).to_vec();
        bytes += 4 * values.len();
        now.push(Tensor { id, kind: Kind::Values, values });
        if bytes >= TENSORS_BYTES {
            send(&mut now);
            bytes = 0;
        }
    }
    if !now.is_empty() {
        send(&mut now);
    }
    all
}
