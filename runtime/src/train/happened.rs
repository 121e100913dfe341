//! What a run says of itself, for people and files.

use std::collections::BTreeMap;

use serde::Serialize;

use super::balance::{GateSums, Sums};
use crate::{
    config::ModelConfig,
    routing::Gate,
    tier::{TierConfig, TierMask},
};

/// What a step of a run left for people and files.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Happened {
    /// A phase begins.
    Phase {
        /// Its name.
        name: String,
        /// Steps at most.
        steps: u64,
        /// Parameters that are trained, and all.
        trained: u64,
        /// See `trained`.
        parameters: u64,
        /// What may starve.
        warnings: Vec<String>,
    },
    /// A step.
    Step(Box<StepRecord>),
    /// A look at what is held out.
    Evaluated {
        /// Step of the run.
        step: u64,
        /// Name of the phase.
        phase: String,
        /// Mean cross-entropy held out, in nats.
        held_out: f64,
    },
    /// Load of every expert in one step, at each look.
    Load {
        /// Step of the run.
        step: u64,
        /// Name of the phase.
        phase: String,
        /// By tier of the set.
        tiers: Vec<TierLoad>,
    },
    /// A checkpoint was written.
    Saved {
        /// Step of the run.
        step: u64,
        /// Its folder.
        path: String,
    },
    /// Workers were lost: steps behind this one are done again.
    Resumed {
        /// Step of the run.
        step: u64,
        /// What happened.
        reason: String,
    },
    /// All phases are over.
    Done {
        /// The model.
        model: String,
    },
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Step of the run, from 1.
    pub step: u64,
    /// Name of the phase.
    pub phase: String,
    /// Cross-entropy before the step, in nats.
    pub ce: f64,
    /// KL of the gates' means from even, per level, and the others, none times its weight.
    pub kl_tier: f64,
    /// See `kl_tier`.
    pub kl_group: f64,
    /// See `kl_tier`.
    pub kl_expert: f64,
    /// The flat classes' own loss.
    pub aux: f64,
    /// Router z-loss.
    pub z: f64,
    /// λ/2 · |p − p₀|² of what is pulled.
    pub pull: f64,
    /// What was minimised.
    pub total: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Forward passes over the batch: 2 where statistics had to be known first.
    pub forward_passes: u32,
    /// By tier of the set.
    pub tiers: Vec<TierRecord>,
}

/// A tier in one step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierRecord {
    /// Its name.
    pub tier: String,
    /// Assignments to its experts, over all layers.
    pub assignments: u64,
    /// Experts without a token in the window.
    pub starved: usize,
    /// e^(−window · A_t / M_t) by what was counted: the bound on an expert's chance to starve.
    pub bound: f64,
}

/// Load of a tier's experts in one step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierLoad {
    /// Its name.
    pub tier: String,
    /// Groups in a layer.
    pub groups: u32,
    /// Assignments by layer and expert, group after group.
    pub layers: Vec<Vec<u64>>,
}

/// The load of every expert, by tier of a set.
pub(super) fn loads(model: &ModelConfig, mask: &TierMask, sums: &Sums) -> Vec<TierLoad> {
    let tiers = model.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let of_tier = |(tier, config): (usize, &TierConfig)| {
        let of_layer = |gates: &BTreeMap<Gate, GateSums>| {
            let of_group = |group| match gates.get(&Gate::Experts { tier, group }) {
                Some(sums) => sums.routes.clone(),
                None => vec![0; config.experts_per_group as usize],
            };
            (0..config.groups as usize).flat_map(of_group).collect()
        };
        let layers = sums.layers.iter().map(of_layer).collect();
        TierLoad { tier: config.id.to_string(), groups: config.groups, layers }
    };
    let allowed = tiers.iter().enumerate().filter(|(tier, _)| mask.allows(*tier));
    allowed.map(of_tier).collect()
}
