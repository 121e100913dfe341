//! The gradient of a global batch, micro-batch by micro-batch.
//!
//! A micro-batch is a node of rule 8's tree over the rows of the batch, so how many rows it has changes
//! no bit. The balance losses need sums over the whole batch before their logarithm: with more than
//! one micro-batch a forward pass for these sums runs first ([`StepLosses::forward_passes`] says so).

use std::ops::Range;

use lite_llm_kernels::{
    cpu::Cpu,
    ops::leaves::{nodes, sides},
};

use super::{
    Recompute, TrainError,
    balance::{BalanceLosses, BalanceWeights, Sums},
    batch::{Batch, Flat},
    gradients::Gradients,
    params::Params,
    pass::Pass,
    shared::{Computed, Wanted, Work, Workers},
};
use crate::{routing::Routes, tier::TierMask};

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Weight of the cross-entropy: 1, or 0 for the gradients of the other losses alone.
    pub cross_entropy: f64,
    /// Weights of the others.
    pub balance: BalanceWeights,
}

/// How a step is computed.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions<'a> {
    /// Tiers that are used.
    pub mask: &'a TierMask,
    /// What is minimised.
    pub objective: Objective,
    /// What is kept for the backward pass.
    pub recompute: Recompute,
    /// Rows of a micro-batch at most.
    pub micro_rows: usize,
}

/// What a step, or an evaluation, found.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepLosses {
    /// Mean cross-entropy of the predictions, in nats.
    pub ce: f64,
    /// The other losses, none multiplied by its weight.
    pub balance: BalanceLosses,
    /// What was minimised.
    pub total: f64,
    /// Predictions in the batch.
    pub predictions: usize,
    /// Tokens in the batch.
    pub tokens: usize,
    /// What the gates said.
    pub sums: Sums,
    /// Forward passes over the batch.
    pub forward_passes: u32,
}

/// What a forward pass gives, for comparison.
#[derive(Debug, Default)]
pub struct Outputs {
    /// `[N, vocab]`.
    pub logits: Vec<f32>,
    /// Of every sparse layer.
    pub routes: Vec<Routes>,
}

/// Runs the nodes of a tree over rows, none with more than `most` rows, and lets their results meet.
fn fold<T>(
    node: Range<usize>,
    most: usize,
    run: &mut impl FnMut(Range<usize>) -> Result<T, TrainError>,
    meet: &mut impl FnMut(T, T) -> T,
) -> Result<T, TrainError> {
    match sides(&node) {
        Some([earlier, later]) if node.len() > most => {
            let earlier = fold(earlier, most, run, meet)?;
            let later = fold(later, most, run, meet)?;
            Ok(meet(earlier, later))
        }
        _ => run(node),
    }
}

/// Says whether some rows of a batch can be trained on.
pub(super) fn check(params: &Params, batch: &Batch, rows: Range<usize>) -> Result<(), TrainError> {
    let config = params.config();
    if batch.tokens() == 0 {
        return Err(TrainError::Batch(
            "the batch has no tokens; at least one row is expected".into(),
        ));
    }
    for (index, row) in batch.rows.iter().enumerate().skip(rows.start).take(rows.len()) {
        let bad =
            |what: String| Err(TrainError::Batch(format!("row {index} of the batch: {what}")));
        let tokens = row.tokens.len();
        let ids = row.tokens.iter().chain(row.targets.iter().flatten());
        if let Some(id) = ids.copied().find(|id| *id as usize >= config.vocab) {
            return bad(format!("token {id}; the model's vocabulary has {}", config.vocab));
        }
        if tokens == 0 || tokens > config.context {
            return bad(format!(
                "{tokens} tokens; 1 to {} are expected, the model's context",
                config.context
            ));
        }
        let starts = &row.documents;
        if row.targets.len() != tokens
            || starts.first() != Some(&0)
            || !starts.is_sorted_by(|a, b| a < b)
            || starts.last().is_some_and(|&last| last >= tokens)
        {
            return bad("its targets or documents do not fit its tokens".into());
        }
    }
    Ok(())
}

/// Forward passes over a batch of so many rows that is cut in so many nodes: sums for the balance
/// losses come first, unless one micro-batch has all rows.
fn forward_passes(options: &StepOptions<'_>, rows: usize, nodes: usize) -> u32 {
    let balanced = options.objective.balance != BalanceWeights::default();
    1 + u32::from(balanced && (nodes > 1 || rows > options.micro_rows.max(1)))
}

/// Losses and gradients of a batch; `wanted` names the parameters whose gradients are computed.
pub fn gradients(
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
    wanted: &[bool],
) -> Result<(StepLosses, Gradients), TrainError> {
    check(params, batch, 0..batch.rows.len())?;
    let scale = scale(options, batch);
    let whole = 0..batch.rows.len();
    let forward_passes = forward_passes(options, whole.len(), 1);
    let (loss, sums, mut gradients) =
        node(cpu, params, batch, options, wanted, scale, whole, None)?;
    gradients.fold_into(cpu, params.list().len(), params.ids().embed);
    let losses = losses(batch, loss, sums, options, forward_passes);
    Ok((losses, gradients))
}

/// What the loss of each prediction is multiplied by.
fn scale(options: &StepOptions<'_>, batch: &Batch) -> f32 {
    (options.objective.cross_entropy / batch.predictions().max(1) as f64) as f32
}

/// What the gates say over a node.
pub(super) fn sums(
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
    node: Range<usize>,
) -> Result<Sums, TrainError> {
    let mut sums = |rows| {
        let pass = new_pass(cpu, params, batch, options, rows);
        pass.forward().map(|tape| tape.sums)
    };
    fold(node, options.micro_rows.max(1), &mut sums, &mut Sums::meet)
}

/// Loss, sums and gradients of a node; those of the embedding as a table of inputs are behind the
/// parameters'. `known` are the sums over the whole batch; if they are not, the node is the whole batch.
#[allow(clippy::too_many_arguments)]
pub(super) fn node(
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
    wanted: &[bool],
    scale: f32,
    node: Range<usize>,
    known: Option<&Sums>,
) -> Result<(f32, Sums, Gradients), TrainError> {
    let most = options.micro_rows.max(1);
    let balance = options.objective.balance;
    let before = if known.is_some() || node.len() <= most || balance == BalanceWeights::default() {
        None
    } else {
        Some(sums(cpu, params, batch, options, node.clone())?)
    };
    let known = known.or(before.as_ref());
    let mut run = |rows: Range<usize>| {
        let pass = new_pass(cpu, params, batch, options, rows);
        let tape = pass.forward()?;
        let mut gradients = Gradients::new(params.list().len() + 1);
        let own = tape.sums.clone();
        let sums = known.unwrap_or(&own);
        let loss = pass.backward(tape, scale, wanted, sums, &balance, &mut gradients)?;
        Ok((loss, own, gradients))
    };
    fold(node, most, &mut run, &mut |a, b| meet(cpu, a, b))
}

type OfNode = (f32, Sums, Gradients);

fn meet(cpu: &Cpu, a: OfNode, b: OfNode) -> OfNode {
    (a.0 + b.0, a.1.meet(b.1), a.2.meet(cpu, b.2))
}

/// [`gradients`], computed by others: the batch is cut in nodes of the tree, and they meet here.
pub fn gradients_by(
    workers: &mut dyn Workers,
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
    wanted: &[bool],
) -> Result<(StepLosses, Gradients), TrainError> {
    check(params, batch, 0..batch.rows.len())?;
    let whole = 0..batch.rows.len();
    let most = whole.len().div_ceil(workers.count().max(1));
    let cut = nodes(whole.len(), most);
    let tiers = params.config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
    let balance = options.objective.balance;
    let work = |node: &Range<usize>, wanted: Wanted| Work {
        node: node.clone(),
        rows: batch.rows[node.clone()].to_vec(),
        tiers: (0..tiers).map(|tier| options.mask.allows(tier)).collect(),
        balance,
        recompute: options.recompute,
        micro_rows: options.micro_rows,
        wanted,
    };
    let other = || TrainError::Workers("a worker gave what it was not asked for".into());
    let mut ask = |wanted: &Wanted| -> Result<_, TrainError> {
        let asked = cut.iter().map(|node| work(node, wanted.clone())).collect();
        let found = workers.compute(params, asked)?;
        if found.len() == cut.len() { Ok(found.into_iter()) } else { Err(other()) }
    };
    let balanced = balance != BalanceWeights::default();
    let known = if balanced && cut.len() > 1 {
        let mut found = ask(&Wanted::Sums)?;
        let mut next = |_| match found.next() {
            Some(Computed::Sums(sums)) => Ok(sums),
            _ => Err(other()),
        };
        Some(fold(whole.clone(), most, &mut next, &mut Sums::meet)?)
    } else {
        None
    };
    let passes = forward_passes(options, whole.len(), cut.len());
    let scale = scale(options, batch);
    let mut found = ask(&Wanted::Gradients { of: wanted.to_vec(), scale, known })?;
    // Nodes come in their order, as the tree is walked.
    let mut next = |_| match found.next() {
        Some(Computed::Gradients { loss, sums, gradients }) => Ok((loss, sums, gradients)),
        _ => Err(other()),
    };
    let (loss, sums, mut gradients) = fold(whole, most, &mut next, &mut |a, b| meet(cpu, a, b))?;
    gradients.fold_into(cpu, params.list().len(), params.ids().embed);
    Ok((losses(batch, loss, sums, options, passes), gradients))
}

/// Losses of a batch, without gradients.
pub fn evaluate(
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
) -> Result<StepLosses, TrainError> {
    check(params, batch, 0..batch.rows.len())?;
    let mut run = |rows: Range<usize>| {
        let pass = new_pass(cpu, params, batch, options, rows);
        let tape = pass.forward()?;
        Ok((pass.loss(&tape)?, tape.sums))
    };
    let mut meet = |a: (f32, Sums), b: (f32, Sums)| (a.0 + b.0, a.1.meet(b.1));
    let whole = 0..batch.rows.len();
    let (loss, sums) = fold(whole, options.micro_rows.max(1), &mut run, &mut meet)?;
    Ok(losses(batch, loss, sums, options, 1))
}

/// Logits and routes of a batch whose logits fit into memory.
pub fn outputs(
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
) -> Result<Outputs, TrainError> {
    check(params, batch, 0..batch.rows.len())?;
    let pass = new_pass(cpu, params, batch, options, 0..batch.rows.len());
    let tape = pass.forward()?;
    Ok(Outputs { logits: pass.logits(&tape), routes: tape.routes })
}

fn new_pass<'a>(
    cpu: &'a Cpu,
    params: &'a Params,
    batch: &Batch,
    options: &StepOptions<'a>,
    rows: Range<usize>,
) -> Pass<'a> {
    let with_z = options.objective.balance.z != 0.0;
    let flat = Flat::new(batch, rows);
    Pass::new(cpu, params, options.mask, options.recompute, with_z, flat)
}

fn losses(
    batch: &Batch,
    loss: f32,
    sums: Sums,
    options: &StepOptions<'_>,
    forward_passes: u32,
) -> StepLosses {
    let predictions = batch.predictions();
    let ce = f64::from(loss) / predictions.max(1) as f64;
    let balance = sums.losses();
    let Objective { cross_entropy, balance: weights } = options.objective;
    let total = cross_entropy * ce + balance.weighted(&weights);
    let tokens = batch.tokens();
    StepLosses { ce, balance, total, predictions, tokens, sums, forward_passes }
}
