//! The gradient of a global batch, micro-batch by micro-batch.
//!
//! A micro-batch is a node of rule 8's tree over the rows of the batch, so how many rows it has changes
//! no bit. The balance losses need sums over the whole batch before their logarithm: with more than
//! one micro-batch a forward pass for these sums runs first ([`StepLosses::forward_passes`] says so).

use std::ops::Range;

use lite_llm_kernels::{cpu::Cpu, ops::leaves::sides};

use super::{
    Recompute, TrainError,
    balance::{BalanceLosses, BalanceWeights, Sums},
    batch::{Batch, Flat},
    exchange::Others,
    gradients::Gradients,
    params::Params,
    pass::Pass,
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
pub(super) fn fold<T>(
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
pub(super) fn forward_passes(options: &StepOptions<'_>, rows: usize, nodes: usize) -> u32 {
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
    let of = Node { cpu, params, batch, options, others: None };
    let (loss, sums, mut gradients) = of.gradients(whole, wanted, scale, None)?;
    gradients.fold_into(cpu, params.list().len(), params.ids().embed);
    let losses = losses(batch, loss, sums, options, forward_passes);
    Ok((losses, gradients))
}

/// What the loss of each prediction is multiplied by.
pub(super) fn scale(options: &StepOptions<'_>, batch: &Batch) -> f32 {
    (options.objective.cross_entropy / batch.predictions().max(1) as f64) as f32
}

/// What a node of a batch is computed with.
#[derive(Clone, Copy)]
pub(super) struct Node<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) params: &'a Params,
    pub(super) batch: &'a Batch,
    pub(super) options: &'a StepOptions<'a>,
    /// Ranks that have some of the experts.
    pub(super) others: Option<&'a Others<'a>>,
}

impl<'a> Node<'a> {
    fn pass(&self, rows: Range<usize>) -> Pass<'a> {
        let Self { cpu, params, batch, options, others } = *self;
        let with_z = options.objective.balance.z != 0.0;
        let flat = Flat::new(batch, rows);
        Pass::new(cpu, params, options.mask, options.recompute, with_z, flat, others)
    }

    fn most(&self) -> usize {
        self.options.micro_rows.max(1)
    }

    /// What the gates say.
    pub(super) fn sums(&self, node: Range<usize>) -> Result<Sums, TrainError> {
        let mut sums = |rows| self.pass(rows).forward(false).map(|tape| tape.into_sums(self.cpu).0);
        fold(node, self.most(), &mut sums, &mut Sums::meet)
    }

    /// The sum of the predictions' losses, and what the gates say.
    pub(super) fn losses(&self, node: Range<usize>) -> Result<(f32, Sums), TrainError> {
        let mut run = |rows: Range<usize>| {
            let pass = self.pass(rows);
            let tape = pass.forward(false)?;
            let loss = pass.loss(&tape)?;
            Ok((loss, tape.into_sums(self.cpu).0))
        };
        fold(node, self.most(), &mut run, &mut meet_losses)
    }

    /// Loss, sums and gradients; those of the embedding as a table of outputs are behind the
    /// parameters'. `known` are the sums over the whole batch; if they are not, the node is the whole batch.
    pub(super) fn gradients(
        &self,
        node: Range<usize>,
        wanted: &[bool],
        scale: f32,
        known: Option<&Sums>,
    ) -> Result<(f32, Sums, Gradients), TrainError> {
        let balance = self.options.objective.balance;
        let all = node.len() <= self.most() || balance == BalanceWeights::default();
        let before = if known.is_some() || all { None } else { Some(self.sums(node.clone())?) };
        let known = known.or(before.as_ref());
        let mut run = |rows: Range<usize>| {
            let pass = self.pass(rows);
            let tape = pass.forward(true)?;
            let mut gradients = Gradients::new(self.params.list().len() + 1);
            let own = tape.sums.clone();
            let sums = known.unwrap_or(&own);
            let loss = pass.backward(tape, scale, wanted, sums, &balance, &mut gradients)?;
            Ok((loss, own, gradients))
        };
        let cpu = self.cpu;
        let mut meet = |a: OfNode, b: OfNode| (a.0 + b.0, a.1.meet(b.1), a.2.meet(cpu, b.2));
        fold(node, self.most(), &mut run, &mut meet)
    }
}

type OfNode = (f32, Sums, Gradients);

/// The sides of a node.
pub(super) fn meet_losses(a: (f32, Sums), b: (f32, Sums)) -> (f32, Sums) {
    (a.0 + b.0, a.1.meet(b.1))
}

/// Losses of a batch, without gradients.
pub fn evaluate(
    cpu: &Cpu,
    params: &Params,
    batch: &Batch,
    options: &StepOptions<'_>,
) -> Result<StepLosses, TrainError> {
    check(params, batch, 0..batch.rows.len())?;
    let of = Node { cpu, params, batch, options, others: None };
    let (loss, sums) = of.losses(0..batch.rows.len())?;
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
    let pass = Node { cpu, params, batch, options, others: None }.pass(0..batch.rows.len());
    let tape = pass.forward(false)?;
    let logits = pass.logits(&tape);
    Ok(Outputs { logits, routes: tape.into_sums(cpu).1 })
}

pub(super) fn losses(
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
