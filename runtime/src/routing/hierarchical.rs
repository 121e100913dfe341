//! Hierarchical sparse expert routing (HSER): tier → group → expert.
//!
//! Shapes: hidden states `[rows, hidden]`; tier gate `[tiers, hidden]`; group gate of a tier
//! `[groups, hidden]`; expert gate of a group `[experts_per_group, hidden]`. A gate with one
//! candidate is left out: its softmax is 1.
//!
//! Work per token is `T + k_tier·G + k_tier·k_group·E` dot products: only the gates of chosen
//! tiers and groups are computed. A flat mixture is one tier of one group.

use std::sync::Arc;

use lite_llm_kernels::{
    cpu::Cpu,
    device::{Device, DeviceError},
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::matmul,
    rows::Rows,
};

use super::{
    Gate, GateTrace, Route, Router, Routes, ScoreError,
    select::{Among, Choice, Place, Scratch, top_k},
};
use crate::{config::MoeConfig, expert::ExpertKey, random::hash_name, tier::TierMask};

/// Gates of one tier in one layer.
pub struct TierGates {
    /// Scores the tier's groups; `None` if there is one.
    pub groups: Option<PackedMatrix>,
    /// Scores each group's experts.
    pub experts: Vec<PackedMatrix>,
}

/// Routes on the host, whatever computes the rest, with gates in f32.
pub struct HierarchicalRouter {
    layer: usize,
    moe: Arc<MoeConfig>,
    tier_gate: Option<PackedMatrix>,
    tiers: Vec<TierGates>,
    /// What names each tier where scores are equal.
    names: Vec<u64>,
}

/// A chosen branch of the hierarchy on its way down, for one row.
#[derive(Debug, Clone, Copy)]
struct Branch {
    row: u32,
    /// Orders of choice from the tier down, 10 bits each: sorts a row's branches.
    place: u32,
    tier: u32,
    group: u32,
    weight: f32,
}

impl Branch {
    /// The place of the choice that comes `order`th below this branch. `ModelConfig::check` allows
    /// at most 1024 routes, so an order has 10 bits.
    fn below(&self, order: u32) -> u32 {
        self.place << 10 | order
    }
}

impl HierarchicalRouter {
    /// A router of one layer.
    ///
    /// # Panics
    /// If the gates are not those that `moe` describes.
    pub fn new(
        layer: usize,
        moe: Arc<MoeConfig>,
        tier_gate: Option<PackedMatrix>,
        tiers: Vec<TierGates>,
    ) -> Self {
        assert_eq!(tiers.len(), moe.tiers.len(), "gates for every tier");
        assert_eq!(tier_gate.is_some(), moe.tiers.len() > 1, "a tier gate iff there is a choice");
        let names = moe.tiers.iter().map(|tier| hash_name(tier.id.as_str())).collect();
        Self { layer, moe, tier_gate, tiers, names }
    }

    /// Chooses one level for every branch: `gate` scores the candidates `open` says are open. A
    /// branch whose scores have no order ends here, and its row is one of `out`'s failures.
    #[allow(clippy::too_many_arguments)]
    fn choose(
        &self,
        cpu: &Cpu,
        hidden: &[&[f32]],
        gate: Option<&PackedMatrix>,
        among: Among<'_>,
        k: usize,
        branches: &[Branch],
        open: impl Fn(&Branch, usize) -> bool,
        out: &mut Routes,
        trace: Option<(&mut Vec<GateTrace>, Gate)>,
        mut descend: impl FnMut(&Branch, u32, Choice),
    ) {
        let Some(gate) = gate else {
            let only = Choice { index: 0, probability: 1.0 };
            return branches.iter().for_each(|branch| descend(branch, 0, only));
        };
        let rows: Vec<&[f32]> = branches.iter().map(|b| hidden[b.row as usize]).collect();
        let mut scores = vec![0.0; rows.len() * gate.n()];
        matmul::matmul(cpu, Rows::List(&rows), gate, None, &mut scores);
        let place = Place { seed: self.moe.routing.seed, layer: self.layer, among };
        let (mut scratch, mut candidates, mut choices) =
            (Scratch::default(), Vec::with_capacity(gate.n()), Vec::with_capacity(k));
        let mut traced = trace
            .as_ref()
            .map(|(_, name)| GateTrace::new(*name, gate.n(), branches.iter().map(|b| b.row)));
        for (branch, scores) in branches.iter().zip(scores.chunks_exact(gate.n())) {
            candidates.clear();
            candidates.extend(
                (0u32..)
                    .zip(scores.iter().copied())
                    .filter(|&(index, _)| open(branch, index as usize)),
            );
            if let Err(score) = top_k(place, k, &candidates, &mut scratch, &mut choices) {
                let (layer, level, row) = (self.layer, place.level(), branch.row as usize);
                out.fail_row(ScoreError { layer, level, row, score });
                continue;
            }
            if let Some(traced) = &mut traced {
                traced.push(scores, &candidates, scratch.probabilities());
            }
            for (order, &choice) in (0u32..).zip(&choices) {
                descend(branch, order, choice);
            }
        }
        if let (Some((all, _)), Some(traced)) = (trace, traced) {
            all.push(traced);
        }
    }
}

type Tensor = <Cpu as lite_llm_kernels::device::Device>::Tensor;

impl HierarchicalRouter {
    /// [`Router::route`], with what every gate said, for training: gates of tiers, then of groups by
    /// tier, then of experts by tier and group; those that nobody came to are left out.
    pub fn route_traced(
        &self,
        cpu: &Cpu,
        hidden: &Tensor,
        masks: &[&TierMask],
        out: &mut Routes,
    ) -> Vec<GateTrace> {
        let mut trace = Vec::new();
        let k_expert = |tier| self.moe.k_expert(tier) as usize;
        self.route_to(k_expert, cpu, hidden.as_slice(), masks, out, Some(&mut trace));
        trace
    }

    /// Routes with so many experts for each chosen group of a tier.
    #[allow(clippy::too_many_arguments)]
    fn route_to(
        &self,
        k_expert: impl Fn(usize) -> usize,
        cpu: &Cpu,
        hidden: &[f32],
        masks: &[&TierMask],
        out: &mut Routes,
        mut trace: Option<&mut Vec<GateTrace>>,
    ) {
        out.clear();
        let routing = &self.moe.routing;
        let width = hidden.len() / masks.len().max(1);
        let rows: Vec<&[f32]> = hidden.chunks_exact(width.max(1)).collect();
        let roots: Vec<Branch> = (0..rows.len() as u32)
            .map(|row| Branch { row, place: 0, tier: 0, group: 0, weight: 1.0 })
            .collect();

        let mut tiers = Vec::new();
        self.choose(
            cpu,
            &rows,
            self.tier_gate.as_ref(),
            Among::Tiers(&self.names),
            routing.k_tier as usize,
            &roots,
            |branch, tier| masks[branch.row as usize].allows(tier),
            out,
            trace.as_deref_mut().map(|all| (all, Gate::Tiers)),
            |branch, order, choice| {
                let weight = choice.probability;
                tiers.push(Branch { place: order, tier: choice.index, weight, ..*branch });
            },
        );

        let mut groups = Vec::new();
        for (tier, gates) in self.tiers.iter().enumerate() {
            let here: Vec<Branch> =
                tiers.iter().filter(|b| b.tier as usize == tier).copied().collect();
            if !here.is_empty() {
                self.choose(
                    cpu,
                    &rows,
                    gates.groups.as_ref(),
                    Among::Groups { tier: self.names[tier] },
                    self.moe.k_group(tier) as usize,
                    &here,
                    |_, _| true,
                    out,
                    trace.as_deref_mut().map(|all| (all, Gate::Groups { tier })),
                    |branch, order, choice| {
                        groups.push(Branch {
                            place: branch.below(order),
                            group: choice.index,
                            weight: branch.weight * choice.probability,
                            ..*branch
                        });
                    },
                );
            }
        }

        // Branches of one group are scored together; the sort keeps rows in order within it.
        groups.sort_by_key(|b| (b.tier, b.group));
        let mut chosen: Vec<(Branch, ExpertKey)> = Vec::new();
        for here in groups.chunk_by(|a, b| (a.tier, a.group) == (b.tier, b.group)) {
            let (tier, group) = (here[0].tier, here[0].group);
            let key =
                |expert| ExpertKey { layer: self.layer as u16, tier: tier as u16, group, expert };
            self.choose(
                cpu,
                &rows,
                Some(&self.tiers[tier as usize].experts[group as usize]),
                Among::Experts { tier: self.names[tier as usize], group },
                k_expert(tier as usize),
                here,
                |_, _| true,
                out,
                trace
                    .as_deref_mut()
                    .map(|all| (all, Gate::Experts { tier: tier as usize, group: group as usize })),
                |branch, order, choice| {
                    let place = branch.below(order);
                    let weight = branch.weight * choice.probability;
                    chosen.push((Branch { place, weight, ..*branch }, key(choice.index)));
                },
            );
        }
        chosen.sort_by_key(|(b, _)| (b.row, b.place));

        // A row that failed anywhere has no routes at all.
        if !out.failures().is_empty() {
            let failed = |row: u32| {
                out.failures().binary_search_by_key(&(row as usize), |failure| failure.row).is_ok()
            };
            chosen.retain(|(branch, _)| !failed(branch.row));
        }
        let mut next = chosen.as_slice();
        for row in 0..rows.len() as u32 {
            let count = next.iter().take_while(|(b, _)| b.row == row).count();
            let (mine, rest) = next.split_at(count);
            next = rest;
            let sum: f32 = mine.iter().map(|(b, _)| b.weight).sum();
            let divisor = if routing.renormalize && sum > 0.0 { sum } else { 1.0 };
            out.push_row((0u16..).zip(mine).map(|(priority, (branch, key))| Route {
                key: *key,
                weight: branch.weight / divisor,
                priority,
            }));
        }
    }
}

impl<D: Device> Router<D> for HierarchicalRouter {
    fn route(
        &self,
        device: &D,
        hidden: &D::Tensor,
        masks: &[&TierMask],
        out: &mut Routes,
    ) -> Result<(), DeviceError> {
        let k_expert = |tier| self.moe.k_expert(tier) as usize;
        self.route_to(k_expert, device.host(), &device.read(hidden)?, masks, out, None);
        Ok(())
    }

    fn route_wider(
        &self,
        device: &D,
        hidden: &D::Tensor,
        masks: &[&TierMask],
        out: &mut Routes,
    ) -> Result<(), DeviceError> {
        // An order of choice has 10 bits.
        let wider = |k: usize| (k + k.div_ceil(2)).min(1024);
        let k_expert = |tier| wider(self.moe.k_expert(tier) as usize);
        self.route_to(k_expert, device.host(), &device.read(hidden)?, masks, out, None);
        out.sort_by_weight();
        Ok(())
    }

    fn gates(&self) -> Option<PackedMatrix> {
        if let ([TierGates { groups: None, experts }], None) = (&self.tiers[..], &self.tier_gate)
            && let [gate] = &experts[..]
        {
            return Some(gate.clone());
        }
        let hidden = self.tiers.iter().find_map(|tier| tier.experts.first())?.k();
        let mut rows = Vec::new();
        let mut add = |gate: Option<&PackedMatrix>, n: usize| {
            let from = rows.len();
            rows.resize(from + n * hidden, 0.0);
            if let Some(gate) = gate {
                let own = rows[from..].chunks_exact_mut(hidden).enumerate();
                own.for_each(|(row, values)| gate.row(row, values));
            }
        };
        if let Some(gate) = &self.tier_gate {
            add(Some(gate), gate.n());
        }
        for (gates, tier) in self.tiers.iter().zip(&self.moe.tiers) {
            if tier.groups > 1 {
                add(gates.groups.as_ref(), tier.groups as usize);
            }
        }
        for (gates, tier) in self.tiers.iter().zip(&self.moe.tiers) {
            for group in 0..tier.groups as usize {
                add(gates.experts.get(group), tier.experts_per_group as usize);
            }
        }
        let n = rows.len() / hidden;
        Some(PackedMatrix::pack(DType::F32, n, hidden, Source::F32(&rows)))
    }
}
