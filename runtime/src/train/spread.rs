//! Training by several ranks: data parallel over the rows of a batch, expert parallel over experts, with each
//! parameter's master and optimizer states at one owner.
//!
//! A step: each rank computes its nodes of the batch (sums for the balance losses first, where they have to be
//! known); gradients meet at the parameters' owners; the norm of all of them is added up here, in the order of
//! parameters; owners step what is theirs, and tell the others of what all of them hold. Whatever the number of
//! ranks, whoever owns what and whoever computes which node, the bits are those of [`Trainer::step`].

use std::{collections::HashMap, ops::Range, sync::Arc};

use lite_llm_kernels::ops::leaves::{nodes, sides};

use super::{
    TrainError,
    balance::{BalanceWeights, Sums},
    batch::Batch,
    config::OptimizerConfig,
    orders::{Begin, Given, Kind, OfNode, Order, Prepared, Tensor, Wanted, Work},
    params::{ParamId, Params},
    rank::{TENSORS_BYTES, experts_of},
    step::{self, StepLosses, StepOptions},
    trainer::{StepReport, Trainer, norm_and_pull},
};

/// The ranks, by their numbers from 0.
pub trait Ranks: Send + Sync {
    /// Gathers them for a new beginning, without those that are lost: how many there are.
    fn gather(&self) -> Result<usize, TrainError>;

    /// Tells each rank something ([`Order`] as bytes), and waits for what all of them give ([`Given`]).
    fn tell(&self, orders: Vec<Arc<Vec<u8>>>) -> Result<Vec<Vec<u8>>, TrainError>;
}

/// See the module's text.
pub struct Spread {
    ranks: Arc<dyn Ranks>,
    count: usize,
    /// Without values and states, which are with the ranks.
    trainer: Trainer,
    owners: Vec<usize>,
    round: u64,
}

/// The owner of each parameter: experts one after another, all else by size, so that each rank has about as much.
fn owners(params: &Params, ranks: usize) -> Vec<usize> {
    let (experts, of_experts) = experts_of(params);
    let mut owners = vec![0; params.list().len()];
    let mut load = vec![0; ranks];
    for (place, (key, ids)) in experts.iter().enumerate() {
        // The next layer begins with another rank, so that few experts of a layer are spread, too.
        let owner = (place + usize::from(key.layer)) % ranks;
        for id in [ids.gate, ids.up, ids.down] {
            owners[id] = owner;
            load[owner] += params.list()[id].len();
        }
    }
    let mut rest: Vec<ParamId> = (0..owners.len()).filter(|id| !of_experts[*id]).collect();
    rest.sort_by_key(|id| (std::cmp::Reverse(params.list()[*id].len()), *id));
    for id in rest {
        let owner = (0..ranks).min_by_key(|rank| load[*rank]).unwrap_or(0);
        owners[id] = owner;
        load[owner] += params.list()[id].len();
    }
    owners
}

/// Nodes of the tree over rows for each rank, cut so that the one with the most rows has few; of two ways that are
/// alike, that with fewer nodes.
fn shares(rows: usize, ranks: usize) -> Vec<Vec<Range<usize>>> {
    let cut = |most: usize| {
        let mut shares = vec![Vec::new(); ranks];
        let (mut rank, mut has, mut left) = (0, 0, rows);
        for node in nodes(rows, most) {
            let fair = left.div_ceil(ranks - rank);
            if has > 0 && has + node.len() > fair && rank + 1 < ranks {
                (left, has, rank) = (left - has, 0, rank + 1);
            }
            has += node.len();
            shares[rank].push(node);
        }
        shares
    };
    let worst = |shares: &[Vec<Range<usize>>]| {
        shares.iter().map(|nodes| nodes.iter().map(Range::len).sum::<usize>()).max().unwrap_or(0)
    };
    let mut most = rows.div_ceil(ranks).max(1);
    let mut best = cut(most);
    while most > 1 {
        most = most.div_ceil(2);
        let other = cut(most);
        if worst(&other) < worst(&best) {
            best = other;
        }
    }
    best
}

impl Spread {
    /// Gives a trainer's parameters and states to ranks.
    pub fn begin(
        ranks: Arc<dyn Ranks>,
        trainer: Trainer,
        optimizer: OptimizerConfig,
    ) -> Result<Self, TrainError> {
        let count = ranks.gather()?;
        let owners = owners(trainer.params(), count);
        let (trained, decays, pull) = trainer.settings();
        let begin = |rank| Begin {
            model: trainer.params().config().as_ref().clone(),
            precision: trainer.params().precision(),
            rank,
            ranks: count,
            owners: owners.clone(),
            trained: trained.to_vec(),
            decays: decays.to_vec(),
            optimizer,
            pull,
            steps: trainer.steps(),
        };
        let orders: Vec<Order> =
            (0..count).map(|rank| Order::Begin(Box::new(begin(rank)))).collect();
        let of_experts = experts_of(trainer.params()).1;
        let mut spread = Self { ranks, count, trainer, owners, round: 0 };
        spread.tell_each(orders)?;
        let mut to: Vec<Vec<Tensor>> = vec![Vec::new(); count];
        let mut bytes = 0;
        for id in 0..spread.owners.len() {
            for tensor in spread.trainer.tensors(id) {
                bytes += 4 * tensor.values.len();
                let everybody = tensor.kind == Kind::Values && !of_experts[id];
                match everybody {
                    true => to.iter_mut().for_each(|to| to.push(tensor.clone())),
                    false => to[spread.owners[id]].push(tensor),
                }
            }
            if bytes >= TENSORS_BYTES || id + 1 == spread.owners.len() {
                let orders = to.iter_mut().map(|to| Order::Tensors(std::mem::take(to)));
                spread.tell_each(orders.collect())?;
                bytes = 0;
            }
        }
        spread.trainer.hollow();
        Ok(spread)
    }

    /// Parameters without values: shapes and configuration.
    pub fn params(&self) -> &Params {
        self.trainer.params()
    }

    fn tell_each(&mut self, orders: Vec<Order>) -> Result<Vec<Given>, TrainError> {
        let orders = orders.iter().map(|order| order.to_bytes().map(Arc::new));
        let orders = orders.collect::<Result<_, _>>()?;
        self.tell(orders)
    }

    fn tell_all(&mut self, order: &Order) -> Result<Vec<Given>, TrainError> {
        let order = Arc::new(order.to_bytes()?);
        self.tell(vec![order; self.count])
    }

    fn tell(&mut self, orders: Vec<Arc<Vec<u8>>>) -> Result<Vec<Given>, TrainError> {
        let given = self.ranks.tell(orders)?;
        let model = self.trainer.params().config();
        let given: Vec<Given> =
            given.iter().map(|bytes| Given::from_bytes(bytes, model)).collect::<Result<_, _>>()?;
        if given.len() == self.count { Ok(given) } else { Err(other()) }
    }

    /// What nodes of a batch give, of all ranks, in their order.
    fn work(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
        shares: &[Vec<Range<usize>>],
        wanted: &Wanted,
    ) -> Result<Vec<OfNode>, TrainError> {
        self.round += 1;
        let tiers = self.params().config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
        let tiers: Vec<bool> = (0..tiers).map(|tier| options.mask.allows(tier)).collect();
        let node = |node: &Range<usize>| (node.clone(), batch.rows[node.clone()].to_vec());
        let order = |nodes: &Vec<Range<usize>>| {
            Order::Work(Box::new(Work {
                round: self.round,
                batch: batch.rows.len(),
                nodes: nodes.iter().map(node).collect(),
                tiers: tiers.clone(),
                balance: options.objective.balance,
                recompute: options.recompute,
                micro_rows: options.micro_rows,
                wanted: wanted.clone(),
            }))
        };
        let orders = shares.iter().map(order).collect();
        let mut all = Vec::new();
        for (given, nodes) in self.tell_each(orders)?.into_iter().zip(shares) {
            match given {
                Given::Nodes(given) if given.len() == nodes.len() => all.extend(given),
                _ => return Err(other()),
            }
        }
        Ok(all)
    }

    /// What nodes give, met in the tree.
    fn losses_of(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
        shares: &[Vec<Range<usize>>],
        wanted: &Wanted,
    ) -> Result<(f32, Sums), TrainError> {
        let given = self.work(batch, options, shares, wanted)?;
        let mut nodes: HashMap<Range<usize>, OfNode> =
            shares.iter().flatten().cloned().zip(given).collect();
        meet(&mut nodes, 0..batch.rows.len()).ok_or_else(other)
    }

    /// One step on a batch, with the bits of [`Trainer::step`].
    pub fn step(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
        lr: f64,
    ) -> Result<StepReport, TrainError> {
        let rows = batch.rows.len();
        step::check(self.params(), batch, 0..rows)?;
        let shares = shares(rows, self.count);
        let cut = shares.iter().flatten().count();
        let balanced = options.objective.balance != BalanceWeights::default();
        let known = match balanced && cut > 1 {
            true => Some(self.losses_of(batch, options, &shares, &Wanted::Sums)?.1),
            false => None,
        };
        let wanted = Wanted::Gradients { scale: step::scale(options, batch), known };
        let (loss, sums) = self.losses_of(batch, options, &shares, &wanted)?;
        let mut all: Vec<Prepared> = Vec::new();
        for given in self.tell_all(&Order::Prepare)? {
            match given {
                Given::Prepared(prepared) => all.extend(prepared),
                _ => return Err(other()),
            }
        }
        all.sort_by_key(|prepared| prepared.id);
        let params = self.trainer.params();
        let name = |id: ParamId| params.list().get(id).map_or_else(String::new, |p| p.name.clone());
        let (grad_norm, pull) = norm_and_pull(all.into_iter(), name)?;
        let at = self.trainer.next(lr, grad_norm);
        self.tell_all(&Order::Apply(at))?;
        self.trainer.begin_at(at.t);
        let passes = step::forward_passes(options, rows, cut);
        let losses = step::losses(batch, loss, sums, options, passes);
        Ok(StepReport { losses, grad_norm, lr, pull })
    }

    /// Losses of a batch, without gradients.
    pub fn evaluate(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
    ) -> Result<StepLosses, TrainError> {
        let rows = batch.rows.len();
        step::check(self.params(), batch, 0..rows)?;
        let shares = shares(rows, self.count);
        let (loss, sums) = self.losses_of(batch, options, &shares, &Wanted::Losses)?;
        Ok(step::losses(batch, loss, sums, options, 1))
    }

    /// The trainer with all values and states, as they are now; ranks keep theirs.
    pub fn collect(&mut self) -> Result<Trainer, TrainError> {
        let mut whole = self.trainer.clone();
        let mut left: Vec<Vec<ParamId>> = vec![Vec::new(); self.count];
        // From the last to the first, to be taken from the end.
        for id in (0..self.owners.len()).rev() {
            left[self.owners[id]].push(id);
        }
        while left.iter().any(|ids| !ids.is_empty()) {
            let mut part = |ids: &mut Vec<ParamId>| {
                let (mut now, mut bytes) = (Vec::new(), 0);
                while let Some(id) = ids.pop_if(|_| bytes < TENSORS_BYTES) {
                    // Values, two states and what it is pulled toward.
                    bytes += 16 * self.trainer.params().list()[id].len();
                    now.push(id);
                }
                Order::Read(now)
            };
            let orders = left.iter_mut().map(&mut part).collect();
            for given in self.tell_each(orders)? {
                let Given::Tensors(tensors) = given else { return Err(other()) };
                if !tensors.into_iter().all(|tensor| whole.put(tensor)) {
                    return Err(other());
                }
            }
        }
        match whole.params().list().iter().all(|param| param.values().len() == param.len()) {
            true => Ok(whole),
            false => Err(other()),
        }
    }
}

fn other() -> TrainError {
    TrainError::Workers("a worker gave what it was not asked for".into())
}

fn meet(nodes: &mut HashMap<Range<usize>, OfNode>, node: Range<usize>) -> Option<(f32, Sums)> {
    if let Some(OfNode { loss, sums }) = nodes.remove(&node) {
        return Some((loss, sums));
    }
    let [earlier, later] = sides(&node)?;
    Some(step::meet_losses(meet(nodes, earlier)?, meet(nodes, later)?))
}
