//! The guarantee against starvation (specification, 5.4): before a phase, assignments per expert and step against
//! ρ; during it, experts that got no token in a window of steps.
//!
//! A_t is the assignments of one layer to tier t in a step, by even gates: tokens × the share of tokens that choose the
//! tier (k_tier of the tiers of the set) × its groups and experts per token. M_t is its experts in a layer. So
//! A_t / M_t is what an expert of one layer can expect; with at least ρ, the chance of no token in T steps is at
//! most e^(−Tρ).

use super::{balance::Sums, params::Params};
use crate::{config::ModelConfig, routing::Gate, tier::TierMask};

/// What a phase can expect of a tier.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// Name of the tier.
    pub tier: String,
    /// A_t: assignments per layer and step.
    pub assignments: f64,
    /// M_t: experts per layer.
    pub experts: u64,
}

impl Expected {
    /// A_t / M_t.
    pub fn ratio(&self) -> f64 {
        self.assignments / self.experts as f64
    }

    /// What falls below ρ, in a sentence with what would do; `None` if it does not. `tokens` are those of a
    /// step.
    pub fn below(&self, rho: f64, tokens: usize) -> Option<String> {
        let ratio = self.ratio();
        (ratio < rho).then(|| {
            let needed = (tokens as f64 * rho / ratio).ceil();
            let most = (self.assignments / rho).floor();
            format!(
                "tier {}: {:.2} assignments per expert and step are expected ({:.0} for {} experts of a layer), \
                 starvation.rho asks for {rho}: give {needed:.0} tokens a step (data.batch, data.sequence), or \
                 no more than {most:.0} experts",
                self.tier, ratio, self.assignments, self.experts
            )
        })
    }
}

/// What every trained tier of a set can expect of a step of so many tokens.
pub fn expected(
    model: &ModelConfig,
    mask: &TierMask,
    trained: &[usize],
    tokens: usize,
) -> Vec<Expected> {
    let Some(moe) = &model.moe else { return Vec::new() };
    let share = (f64::from(moe.routing.k_tier) / mask.count().max(1) as f64).min(1.0);
    let of = |&tier: &usize| {
        let config = &moe.tiers[tier];
        Expected {
            tier: config.id.to_string(),
            assignments: tokens as f64 * share * moe.routes_of(tier) as f64,
            experts: u64::from(config.experts()),
        }
    };
    trained.iter().filter(|tier| mask.allows(**tier)).map(of).collect()
}

/// Marks the experts that a step used, `last_used[layer][flat]`; tiers that were added find room. Of a tier
/// that the step's set leaves out all are marked: their window begins when they are first used.
pub fn mark(
    params: &Params,
    mask: &TierMask,
    sums: &Sums,
    step: u64,
    last_used: &mut Vec<Vec<u64>>,
) {
    let Some(moe) = &params.config().moe else { return };
    last_used.resize(sums.layers.len(), Vec::new());
    for (layer, used) in sums.layers.iter().zip(last_used) {
        used.resize(moe.experts(), step.saturating_sub(1));
        let mut at = 0;
        for (tier, config) in moe.tiers.iter().enumerate() {
            let here = at..at + config.experts() as usize;
            at = here.end;
            if !mask.allows(tier) {
                used[here].fill(step);
            }
        }
        for (gate, sums) in layer {
            let Gate::Experts { tier, group } = *gate else { continue };
            let before: usize = moe.tiers[..tier].iter().map(|t| t.experts() as usize).sum();
            let first = before + group * moe.tiers[tier].experts_per_group as usize;
            for (e, _) in sums.routes.iter().enumerate().filter(|(_, routes)| **routes > 0) {
                used[first + e] = step;
            }
        }
    }
}

/// Experts of a tier, over all layers, without a token in the last `window` steps.
pub fn starved(
    params: &Params,
    tier: usize,
    step: u64,
    window: u64,
    last_used: &[Vec<u64>],
) -> usize {
    let Some(moe) = &params.config().moe else { return 0 };
    let before: usize = moe.tiers[..tier].iter().map(|t| t.experts() as usize).sum();
    let here = before..before + moe.tiers[tier].experts() as usize;
    let of = |used: &Vec<u64>| {
        let here = used.get(here.clone()).unwrap_or(&[]);
        here.iter().filter(|last| **last + window <= step).count()
    };
    last_used.iter().map(of).sum()
}
