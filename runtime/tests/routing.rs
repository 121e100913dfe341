//! Hierarchical routing chooses what its definition says, at all three levels, for every kind of
//! tier set; and a token's routes do not depend on its company.

use std::sync::Arc;

use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    dtype::DType,
    matrix::{PackedMatrix, Source},
    simd::Simd,
};
use lite_llm_runtime::{
    config::{MoeConfig, RoutingConfig, Scoring},
    random::{Purpose, random_unit},
    routing::{HierarchicalRouter, Route, Router, Routes, TierGates},
    tier::{TIER_1B, TIER_10B, TIER_100B, TierConfig, TierSet},
};

const HIDDEN: usize = 20;
const GROUPS: [u32; 3] = [2, 3, 2];
const EXPERTS: [u32; 3] = [4, 5, 6];

fn values(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| (random_unit(seed, Purpose::Weights, i) * 2.0 - 1.0) as f32).collect()
}

fn pack(rows: usize, values: &[f32]) -> PackedMatrix {
    PackedMatrix::pack(DType::F32, rows, HIDDEN, Source::F32(values))
}

/// Gates as plain rows, and the router made of them.
struct Model {
    moe: Arc<MoeConfig>,
    tier_gate: Vec<f32>,
    group_gates: Vec<Vec<f32>>,
    expert_gates: Vec<Vec<Vec<f32>>>,
    router: HierarchicalRouter,
}

fn model(k: (u32, u32, u32), renormalize: bool, seed: u64) -> Model {
    let tiers = [TIER_1B, TIER_10B, TIER_100B]
        .into_iter()
        .zip(GROUPS.into_iter().zip(EXPERTS))
        .map(|(id, (groups, experts))| TierConfig::new(id, groups, experts, 0))
        .collect();
    let moe = Arc::new(MoeConfig {
        intermediate: 8,
        tiers,
        routing: RoutingConfig {
            k_tier: k.0,
            k_group: k.1,
            k_expert: k.2,
            scoring: Scoring::SoftmaxTopK,
            renormalize,
            seed: 11,
        },
        shared: None,
    });
    let tier_gate = values(seed, 3 * HIDDEN);
    let group_gates: Vec<Vec<f32>> =
        (0..3).map(|t| values(seed + 1 + t as u64, GROUPS[t] as usize * HIDDEN)).collect();
    let expert_gates: Vec<Vec<Vec<f32>>> = (0..3)
        .map(|t| {
            (0..GROUPS[t])
                .map(|g| {
                    let seed = seed + 100 + t as u64 * 10 + u64::from(g);
                    values(seed, EXPERTS[t] as usize * HIDDEN)
                })
                .collect()
        })
        .collect();
    let gates = (0..3)
        .map(|t| TierGates {
            groups: Some(pack(GROUPS[t] as usize, &group_gates[t])),
            experts: expert_gates[t].iter().map(|g| pack(EXPERTS[t] as usize, g)).collect(),
        })
        .collect();
    let router = HierarchicalRouter::new(0, moe.clone(), Some(pack(3, &tier_gate)), gates);
    Model { moe, tier_gate, group_gates, expert_gates, router }
}

fn hidden(rows: usize) -> Tensor {
    let mut tensor = Tensor::zeros(rows, HIDDEN);
    tensor.as_mut_slice().copy_from_slice(&values(77, rows * HIDDEN));
    tensor
}

impl Model {
    fn route(&self, hidden: &Tensor, set: &str) -> Routes {
        let set: TierSet = set.parse().unwrap();
        let mask = set.mask(&self.moe.tiers).unwrap();
        let masks = vec![&mask; hidden.rows()];
        let mut routes = Routes::default();
        self.router.route(&Cpu::new(2, Simd::best()), hidden, &masks, &mut routes).unwrap();
        routes
    }

    /// The definition, in f64: softmax over the open candidates of each level, top k, product.
    fn expected(&self, state: &[f32], open: [bool; 3]) -> Vec<((u16, u32, u32), f64)> {
        let level = |gate: &[f32], open: &dyn Fn(usize) -> bool, k: usize| {
            let scores: Vec<(usize, f64)> = gate
                .chunks_exact(HIDDEN)
                .map(|row| row.iter().zip(state).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum())
                .enumerate()
                .filter(|(i, _)| open(*i))
                .collect();
            let total: f64 = scores.iter().map(|(_, s)| s.exp()).sum();
            let mut chosen: Vec<(usize, f64)> =
                scores.into_iter().map(|(i, s)| (i, s.exp() / total)).collect();
            chosen.sort_by(|a, b| b.1.total_cmp(&a.1));
            chosen.truncate(k);
            chosen
        };
        let routing = &self.moe.routing;
        let mut all = Vec::new();
        for (t, pt) in level(&self.tier_gate, &|t| open[t], routing.k_tier as usize) {
            for (g, pg) in level(&self.group_gates[t], &|_| true, routing.k_group as usize) {
                let gate = &self.expert_gates[t][g];
                for (e, pe) in level(gate, &|_| true, routing.k_expert as usize) {
                    all.push(((t as u16, g as u32, e as u32), pt * pg * pe));
                }
            }
        }
        if routing.renormalize {
            let sum: f64 = all.iter().map(|(_, w)| w).sum();
            all.iter_mut().for_each(|(_, w)| *w /= sum);
        }
        all
    }
}

fn key(route: &Route) -> (u16, u32, u32) {
    (route.key.tier, route.key.group, route.key.expert)
}

#[test]
fn the_choice_is_the_definition_at_all_levels_and_for_all_sets() {
    let sets = [
        ("all", [true; 3]),
        ("tier_10b", [false, true, false]),
        ("tier_1b,tier_100b", [true, false, true]),
        ("..tier_10b", [true, true, false]),
    ];
    for (k, renormalize) in
        [((1, 1, 1), false), ((1, 2, 3), true), ((2, 2, 2), false), ((3, 1, 4), true)]
    {
        let model = model(k, renormalize, 5);
        let states = hidden(40);
        for (set, open) in sets {
            let routes = model.route(&states, set);
            assert_eq!(routes.rows(), 40);
            for row in 0..40 {
                let expected = model.expected(states.row(row), open);
                let found = routes.row(row);
                let keys: Vec<_> = found.iter().map(key).collect();
                let wanted: Vec<_> = expected.iter().map(|(key, _)| *key).collect();
                assert_eq!(keys, wanted, "set {set}, k {k:?}, row {row}");
                for (route, (_, weight)) in found.iter().zip(&expected) {
                    let difference = (f64::from(route.weight) - weight).abs();
                    assert!(difference < 1e-5, "set {set}, row {row}: {difference}");
                }
                let priorities: Vec<u16> = found.iter().map(|route| route.priority).collect();
                assert_eq!(priorities, (0..found.len() as u16).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn a_token_is_routed_alone_as_in_company() {
    let model = model((2, 1, 2), true, 5);
    let states = hidden(33);
    let together = model.route(&states, "all");
    for row in 0..33 {
        let mut alone = Tensor::zeros(1, HIDDEN);
        alone.as_mut_slice().copy_from_slice(states.row(row));
        assert_eq!(model.route(&alone, "all").row(0), together.row(row), "row {row}");
    }
}

#[test]
fn rows_of_one_batch_may_have_different_sets() {
    let model = model((2, 1, 1), false, 5);
    let states = hidden(2);
    let masks: Vec<_> = ["tier_1b", "all"]
        .iter()
        .map(|set| set.parse::<TierSet>().unwrap().mask(&model.moe.tiers).unwrap())
        .collect();
    let mut routes = Routes::default();
    let masks: Vec<_> = masks.iter().collect();
    model.router.route(&Cpu::new(1, Simd::best()), &states, &masks, &mut routes).unwrap();
    assert_eq!(routes.row(0).len(), 1, "one tier is open to the first row");
    assert_eq!(routes.row(1).len(), 2);
    assert_eq!(routes.row(1), model.route(&states, "all").row(1));
}

#[test]
fn a_row_that_is_not_finite_has_an_error_of_its_own_and_the_others_their_routes() {
    let model = model((1, 1, 1), false, 5);
    let healthy = model.route(&hidden(3), "all");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut states = hidden(3);
        states.as_mut_slice()[HIDDEN + 4] = bad;
        let routes = model.route(&states, "all");
        let [error] = routes.failures() else { panic!("one error: {:?}", routes.failures()) };
        assert_eq!(error.row, 1);
        let named = error.to_string();
        assert!(named.starts_with("layer 0: the tier gate gave "), "{named}");
        assert!(routes.row(1).is_empty());
        assert_eq!((routes.row(0), routes.row(2)), (healthy.row(0), healthy.row(2)));
        // Nothing of it stays.
        model.route(&hidden(3), "all");
    }
}
