//! Load balancing: what gates said over the whole global batch, the losses of it, and their gradients
//! with respect to probabilities.
//!
//! The hierarchical loss (specification, 5.2): `Σ α · KL(u ‖ uniform)`, `KL = Σ u ln(u n)`, where u is
//! the mean of a gate's softmax over the tokens that came to it and n its open candidates; averaged
//! over sparse layers, summed over tiers and groups. A gate to which no token came contributes nothing. The
//! gradient with respect to a token's probability p_j is `α / layers · (ln(u_j n) + 1) / tokens`; the 1 is left
//! out, for the backward pass of the softmax takes it away again.
//!
//! The flat classes' own (Switch Transformer, Fedus et al. 2021, as transformers' `load_balancing_loss_func`
//! has it): `E · Σ_e f_e P_e`, f the assignments and P the probabilities of expert e, summed over
//! layers, divided by layers · tokens; f is constant.
//!
//! Router z-loss (ST-MoE, Zoph et al. 2022): the mean over tokens of `ln(Σ exp s)²`, of every gate, averaged
//! over sparse layers.
//!
//! Sums of probabilities are rule 8's; what is made of them is f64 on the host.

use std::{collections::BTreeMap, ops::Range};

use lite_llm_kernels::{
    cpu::Cpu,
    ops::{
        leaves::{LeafPlan, Place},
        row_sums::{Factor, sum_rows},
    },
    rows::Rows,
};

use super::bytes::{Damaged, Reader, Writer};
use crate::{
    config::ModelConfig,
    routing::{Gate, GateTrace, Route, Routes, trace_of},
};

/// Weights of the losses beside cross-entropy.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BalanceWeights {
    /// Of the KL over tiers.
    pub tier: f64,
    /// Of the KL over groups.
    pub group: f64,
    /// Of the KL over experts.
    pub expert: f64,
    /// Of the flat classes' loss.
    pub aux: f64,
    /// Of the router z-loss.
    pub z: f64,
}

/// What one gate said, summed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GateSums {
    /// Σ p of each candidate.
    pub probabilities: Vec<f32>,
    /// Tokens that came.
    pub tokens: u64,
    /// Candidates that were open.
    pub open: Vec<bool>,
    /// Routes through each candidate (of an expert's gate: its assignments).
    pub routes: Vec<u64>,
    /// Σ ln(Σ exp s)², if it was asked for.
    pub z: f32,
}

/// Sums of every gate, by sparse layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sums {
    /// One map per sparse layer, in order.
    pub layers: Vec<BTreeMap<Gate, GateSums>>,
}

impl Sums {
    /// Whether they are of the gates of a model, or of nothing.
    pub(super) fn fit(&self, config: &ModelConfig) -> bool {
        let Some(moe) = &config.moe else { return self.layers.is_empty() };
        let candidates = |gate: &Gate| match *gate {
            Gate::Tiers => Some(moe.tiers.len()),
            Gate::Groups { tier } => Some(moe.tiers.get(tier)?.groups as usize),
            Gate::Experts { tier, group } => {
                let tier = moe.tiers.get(tier)?;
                (group < tier.groups as usize).then_some(tier.experts_per_group as usize)
            }
        };
        let fits = |(gate, sums): (&Gate, &GateSums)| {
            let all = [sums.probabilities.len(), sums.open.len(), sums.routes.len()];
            candidates(gate).is_some_and(|count| all == [count; 3])
        };
        let layers = [0, config.sparse_layers().count()];
        layers.contains(&self.layers.len()) && self.layers.iter().flatten().all(fits)
    }
}

/// The losses beside cross-entropy, none multiplied by its weight.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BalanceLosses {
    /// KL over tiers.
    pub tier: f64,
    /// KL over groups.
    pub group: f64,
    /// KL over experts.
    pub expert: f64,
    /// The flat classes' loss.
    pub aux: f64,
    /// Router z-loss.
    pub z: f64,
}

/// ln Σ exp of scores that are open.
pub(super) fn log_sum_exp(scores: &[f32], open: &[bool]) -> f64 {
    let open = || scores.iter().zip(open).filter(|(_, open)| **open).map(|(s, _)| f64::from(*s));
    let largest = open().fold(f64::NEG_INFINITY, f64::max);
    largest + libm::log(open().map(|s| libm::exp(s - largest)).sum::<f64>())
}

/// The sums of one layer's gates over the tokens of a node.
pub(super) fn layer_sums(
    cpu: &Cpu,
    traces: &[GateTrace],
    routes: &Routes,
    places: &[Place],
    rows: Range<usize>,
    with_z: bool,
) -> BTreeMap<Gate, GateSums> {
    let mut counts: Vec<Vec<u64>> = traces.iter().map(|trace| vec![0; trace.candidates]).collect();
    let mut count = |gate, candidate: usize| {
        if let Some(at) = trace_of(traces, gate) {
            counts[at][candidate] += 1;
        }
    };
    for Route { key, .. } in routes.all() {
        let (tier, group) = (key.tier as usize, key.group as usize);
        count(Gate::Tiers, tier);
        count(Gate::Groups { tier }, group);
        count(Gate::Experts { tier, group }, key.expert as usize);
    }
    let mut sums = BTreeMap::new();
    for (trace, routes) in traces.iter().zip(counts) {
        let tokens: Vec<Place> = trace.rows.iter().map(|&row| places[row as usize]).collect();
        let plan = LeafPlan::of_tokens(&tokens, rows.clone());
        let n = trace.candidates;
        let mut probabilities = vec![0.0; n];
        let values = Rows::dense(&trace.probabilities, n);
        sum_rows(cpu, Factor::One, values, n, &plan, &mut probabilities);
        let mut z = [0.0];
        if with_z {
            let of = |s| libm::pow(log_sum_exp(s, &trace.open), 2.0) as f32;
            let each: Vec<f32> = trace.scores.chunks_exact(n).map(of).collect();
            sum_rows(cpu, Factor::One, Rows::dense(&each, 1), 1, &plan, &mut z);
        }
        let gate = GateSums {
            probabilities,
            tokens: tokens.len() as u64,
            open: trace.open.clone(),
            routes,
            z: z[0],
        };
        sums.insert(trace.gate, gate);
    }
    sums
}

impl Sums {
    /// The sums of two sides of a node.
    pub(super) fn meet(mut self, later: Self) -> Self {
        for (earlier, later) in self.layers.iter_mut().zip(later.layers) {
            for (gate, later) in later {
                let Some(sums) = earlier.get_mut(&gate) else {
                    earlier.insert(gate, later);
                    continue;
                };
                for (sum, more) in sums.probabilities.iter_mut().zip(later.probabilities) {
                    *sum += more;
                }
                for (sum, more) in sums.routes.iter_mut().zip(later.routes) {
                    *sum += more;
                }
                sums.tokens += later.tokens;
                sums.z += later.z;
            }
        }
        self
    }

    /// The losses.
    pub fn losses(&self) -> BalanceLosses {
        let mut losses = BalanceLosses::default();
        let layers = self.layers.len().max(1) as f64;
        for (gate, sums) in self.layers.iter().flatten() {
            let kl = sums.kl() / layers;
            match gate {
                Gate::Tiers => losses.tier += kl,
                Gate::Groups { .. } => losses.group += kl,
                Gate::Experts { .. } => losses.expert += kl,
            }
            losses.z += f64::from(sums.z) / sums.tokens.max(1) as f64 / layers;
        }
        losses.aux = self.aux().map_or(0.0, |(loss, _)| loss);
        losses
    }

    /// The flat classes' loss, and its gradient with respect to each probability of each expert gate,
    /// where every layer is one tier of one group.
    fn aux(&self) -> Option<(f64, Vec<f64>)> {
        const FLAT: Gate = Gate::Experts { tier: 0, group: 0 };
        let gates: Vec<&GateSums> =
            self.layers.iter().map(|layer| layer.get(&FLAT)).collect::<Option<_>>()?;
        let n = gates.first()?.probabilities.len();
        let tokens: u64 = gates.iter().map(|gate| gate.tokens).sum();
        if tokens == 0 || self.layers.iter().any(|layer| layer.len() != 1) {
            return None;
        }
        let mean = |of: &dyn Fn(&GateSums) -> f64| gates.iter().map(|g| of(g)).sum::<f64>();
        let mut loss = 0.0;
        let mut gradient = Vec::with_capacity(n);
        for e in 0..n {
            let f = mean(&|gate| gate.routes[e] as f64) / tokens as f64;
            let p = mean(&|gate| f64::from(gate.probabilities[e])) / tokens as f64;
            loss += n as f64 * f * p;
            gradient.push(n as f64 * f / tokens as f64);
        }
        Some((loss, gradient))
    }

    /// What the losses, times their weights, add to the gradient of each probability of a gate's
    /// tokens.
    pub(super) fn gradient(&self, layer: usize, gate: Gate, weights: &BalanceWeights) -> Vec<f32> {
        let Some(sums) = self.layers.get(layer).and_then(|gates| gates.get(&gate)) else {
            return Vec::new();
        };
        let alpha = match gate {
            Gate::Tiers => weights.tier,
            Gate::Groups { .. } => weights.group,
            Gate::Experts { .. } => weights.expert,
        };
        let (tokens, n) = (sums.tokens.max(1) as f64, sums.candidates() as f64);
        let scale = alpha / self.layers.len() as f64 / tokens;
        let aux = if weights.aux == 0.0 { None } else { self.aux().map(|(_, gradient)| gradient) };
        let of = |(e, &sum): (usize, &f32)| {
            let u = f64::from(sum) / tokens;
            let kl = if u > 0.0 && alpha != 0.0 { scale * libm::log(u * n) } else { 0.0 };
            (kl + aux.as_ref().map_or(0.0, |aux| weights.aux * aux[e])) as f32
        };
        sums.probabilities.iter().enumerate().map(of).collect()
    }

    /// What the z-loss, times its weight, adds to the gradient of a score, per probability and unit of
    /// ln Σ exp.
    pub(super) fn z_scale(&self, layer: usize, gate: Gate, weights: &BalanceWeights) -> f64 {
        let sums = self.layers.get(layer).and_then(|gates| gates.get(&gate));
        let tokens = sums.map_or(1, |sums| sums.tokens.max(1)) as f64;
        2.0 * weights.z / self.layers.len().max(1) as f64 / tokens
    }
}

impl Sums {
    /// Appends all of it.
    pub(super) fn write(&self, to: &mut Writer) {
        to.number(self.layers.len());
        for layer in &self.layers {
            to.number(layer.len());
            for (gate, sums) in layer {
                let (kind, tier, group) = match *gate {
                    Gate::Tiers => (0, 0, 0),
                    Gate::Groups { tier } => (1, tier, 0),
                    Gate::Experts { tier, group } => (2, tier, group),
                };
                [kind, tier, group].iter().for_each(|n| to.number(*n));
                to.f32s(&sums.probabilities);
                to.number(sums.tokens as usize);
                to.flags(&sums.open);
                to.u64s(&sums.routes);
                to.f32(sums.z);
            }
        }
    }

    /// Takes what [`Sums::write`] has appended.
    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let mut layers = Vec::new();
        for _ in 0..from.count(8)? {
            let mut layer = BTreeMap::new();
            for _ in 0..from.count(60)? {
                let gate = match (from.number()?, from.number()?, from.number()?) {
                    (0, _, _) => Gate::Tiers,
                    (1, tier, _) => Gate::Groups { tier },
                    (2, tier, group) => Gate::Experts { tier, group },
                    _ => return Err(Damaged),
                };
                let sums = GateSums {
                    probabilities: from.f32s()?,
                    tokens: from.number()? as u64,
                    open: from.flags()?,
                    routes: from.u64s()?,
                    z: from.f32()?,
                };
                let n = sums.probabilities.len();
                if sums.open.len() != n || sums.routes.len() != n {
                    return Err(Damaged);
                }
                layer.insert(gate, sums);
            }
            layers.push(layer);
        }
        Ok(Self { layers })
    }
}

impl GateSums {
    fn candidates(&self) -> usize {
        self.open.iter().filter(|open| **open).count()
    }

    /// KL of the mean probabilities from the uniform distribution.
    pub fn kl(&self) -> f64 {
        let (tokens, n) = (self.tokens as f64, self.candidates() as f64);
        let term = |sum: &f32| {
            let u = f64::from(*sum) / tokens;
            if u > 0.0 { u * libm::log(u * n) } else { 0.0 }
        };
        if self.tokens == 0 { 0.0 } else { self.probabilities.iter().map(term).sum() }
    }
}

impl BalanceLosses {
    /// Each times its weight, together.
    pub fn weighted(&self, weights: &BalanceWeights) -> f64 {
        weights.tier * self.tier
            + weights.group * self.group
            + weights.expert * self.expert
            + weights.aux * self.aux
            + weights.z * self.z
    }
}
