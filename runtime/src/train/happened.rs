//! What a run says of itself, for people and files.

use serde::Serialize;

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
