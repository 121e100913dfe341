//! Which node owns which expert.
//!
//! A pure function of the model, the nodes' budgets and the policy. A placement is a few rules over
//! ranges of (tier, group), however many experts there are; every expert has exactly one owner.
//! Placement never changes a result, only where work is done.

use std::ops::Range;

use lite_llm_runtime::{
    config::{ModelConfig, MoeConfig},
    expert::ExpertKey,
    random::{Purpose, random_u64},
};
use lite_llm_transport::messages::PlacementRule;

/// How experts are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlacementPolicy {
    /// In turn over the nodes, as budgets allow.
    #[default]
    Balanced,
    /// The same shares in an order that a seed makes: for tests of the claim that placement does
    /// not matter.
    Random(u64),
}

/// Longest turn of owners. A tier of more experts is spread to within this share of it, which
/// matters where budgets are all but full.
const TURN_MAX: u64 = 4096;

/// The experts do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the experts take {needed} bytes ({experts}), the nodes give {budget} \
     ({nodes} nodes); add workers or raise --dram"
)]
pub struct DoesNotFit {
    needed: u64,
    experts: String,
    budget: u64,
    nodes: usize,
}

/// Owners of a model's experts, as indices of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owners {
    rules: Vec<PlacementRule>,
    /// Per layer: how many sparse layers come before it.
    ordinals: Vec<u64>,
    experts_per_group: Vec<u32>,
}

/// Rules that do not place every expert of the model once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator's placement {0}")]
pub struct BadPlacement(String);

impl Owners {
    /// Takes rules that place every group of every tier that is here.
    pub fn new(config: &ModelConfig, rules: Vec<PlacementRule>) -> Result<Self, BadPlacement> {
        let tiers = config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        let mut ranges: Vec<Vec<Range<u32>>> = vec![Vec::new(); tiers.len()];
        for rule in &rules {
            let range = rule.first_group..rule.end_group;
            match ranges.get_mut(usize::from(rule.tier)) {
                Some(of_tier) if !range.is_empty() && !rule.holders.is_empty() => {
                    of_tier.push(range);
                }
                _ => return Err(BadPlacement(format!("has a rule for nothing: {rule:?}"))),
            }
        }
        for (tier, mut of_tier) in tiers.iter().zip(ranges) {
            of_tier.sort_unstable_by_key(|range| range.start);
            let ends = of_tier.iter().map(|range| range.end);
            let whole = of_tier
                .iter()
                .map(|r| r.start)
                .eq(std::iter::once(0).chain(ends).take(of_tier.len()))
                && of_tier.last().map_or(0, |range| range.end) == tier.groups;
            let id = &tier.id;
            // Nodes that have not the same tiers would choose among others, and answer otherwise.
            match (tier.absent, of_tier.is_empty()) {
                (true, true) => {}
                (true, false) => {
                    return Err(BadPlacement(format!(
                        "has {id}, whose files are not here: copy them"
                    )));
                }
                (false, true) => {
                    let reason =
                        format!("lacks {id}, whose files are here: copy them to the coordinator");
                    return Err(BadPlacement(reason));
                }
                (false, false) if whole => {}
                (false, false) => {
                    let reason =
                        format!("does not place each of {id}'s {} groups once", tier.groups);
                    return Err(BadPlacement(reason));
                }
            }
        }
        let mut ordinals = Vec::with_capacity(config.layers.len());
        let mut sparse = config.sparse_layers().peekable();
        let mut ordinal = 0;
        for layer in 0..config.layers.len() {
            ordinals.push(ordinal);
            ordinal += u64::from(sparse.next_if_eq(&layer).is_some());
        }
        let experts_per_group = tiers.iter().map(|t| t.experts_per_group).collect();
        Ok(Self { rules, ordinals, experts_per_group })
    }

    /// The rules, as they travel.
    pub fn rules(&self) -> &[PlacementRule] {
        &self.rules
    }

    /// Who computes an expert of the model.
    ///
    /// # Panics
    /// If the model has no such expert.
    pub fn owner(&self, key: ExpertKey) -> u16 {
        let placed = |rule: &&PlacementRule| {
            rule.tier == key.tier && (rule.first_group..rule.end_group).contains(&key.group)
        };
        let rule = self.rules.iter().find(placed).expect("every group is placed");
        let per_group = u64::from(self.experts_per_group[usize::from(key.tier)]);
        let groups = u64::from(rule.end_group - rule.first_group);
        let group = self.ordinals[usize::from(key.layer)] * groups
            + u64::from(key.group - rule.first_group);
        let turns = rule.holders.len() as u64 / u64::from(rule.copies);
        let turn = (group * per_group + u64::from(key.expert)) % turns;
        rule.holders[(turn * u64::from(rule.copies)) as usize]
    }

    /// Bytes that each of so many nodes owns, with experts of `bytes[tier]` each.
    pub fn held(&self, config: &ModelConfig, bytes: &[u64], nodes: usize) -> Vec<u64> {
        let mut held = vec![0; nodes];
        let layers = config.sparse_layers().count() as u64;
        for rule in &self.rules {
            let tier = usize::from(rule.tier);
            let groups = u64::from(rule.end_group - rule.first_group);
            let experts = layers * groups * u64::from(self.experts_per_group[tier]);
            let turns = rule.holders.len() as u64 / u64::from(rule.copies);
            for (turn, holders) in (0..).zip(rule.holders.chunks(usize::from(rule.copies))) {
                held[usize::from(holders[0])] += in_turn(experts, turns, turn) * bytes[tier];
            }
        }
        held
    }
}

/// How many of the numbers below `count` are `turn` modulo `turns`.
fn in_turn(count: u64, turns: u64, turn: u64) -> u64 {
    count / turns + u64::from(turn < count % turns)
}

/// Spreads a model's experts, `bytes[tier]` each, over nodes with these budgets in bytes.
pub fn place(
    config: &ModelConfig,
    bytes: &[u64],
    budgets: &[u64],
    policy: PlacementPolicy,
) -> Result<Owners, DoesNotFit> {
    let layers = config.sparse_layers().count() as u64;
    let mut left = budgets.to_vec();
    let mut rules = Vec::new();
    let moe = config.moe.as_ref();
    for (tier, of_tier) in moe.iter().flat_map(|moe| moe.tiers.iter().enumerate()) {
        if of_tier.absent || layers == 0 {
            continue;
        }
        let experts = layers * u64::from(of_tier.groups) * u64::from(of_tier.experts_per_group);
        let room: Vec<u64> = left.iter().map(|left| left / bytes[tier].max(1)).collect();
        let turn = share(experts, &room)
            .and_then(|shares| turn(experts, &shares, &room))
            .ok_or_else(|| does_not_fit(config, bytes, budgets))?;
        let holders = match policy {
            PlacementPolicy::Balanced => turn,
            PlacementPolicy::Random(seed) => shuffled(turn, seed, tier as u64),
        };
        for (at, &node) in (0..).zip(&holders) {
            left[usize::from(node)] -= in_turn(experts, holders.len() as u64, at) * bytes[tier];
        }
        let (tier, end_group) = (tier as u16, of_tier.groups);
        rules.push(PlacementRule { tier, first_group: 0, end_group, copies: 1, holders });
    }
    Ok(Owners::new(config, rules).expect("a rule was made for every tier"))
}

fn does_not_fit(config: &ModelConfig, bytes: &[u64], budgets: &[u64]) -> DoesNotFit {
    let layers = config.sparse_layers().count() as u64;
    let tiers = config.moe.as_ref().map_or(&[][..], |moe: &MoeConfig| &moe.tiers);
    let here = tiers.iter().zip(bytes).filter(|(tier, _)| !tier.absent);
    let count = |groups: u32, experts: u32| layers * u64::from(groups) * u64::from(experts);
    let each: Vec<(u64, u64)> =
        here.map(|(t, bytes)| (count(t.groups, t.experts_per_group), *bytes)).collect();
    let words = each.iter().map(|(experts, bytes)| format!("{experts} of {bytes} bytes each"));
    DoesNotFit {
        needed: each.iter().map(|(experts, bytes)| experts * bytes).sum(),
        experts: words.collect::<Vec<_>>().join(", "),
        budget: budgets.iter().sum(),
        nodes: budgets.len(),
    }
}

/// Cuts a number of experts into shares that are as even as the nodes' room allows.
fn share(experts: u64, room: &[u64]) -> Option<Vec<u64>> {
    let mut shares = vec![0; room.len()];
    let mut nodes: Vec<usize> = (0..room.len()).collect();
    nodes.sort_by_key(|&node| room[node]);
    let mut left = experts;
    for (at, &node) in nodes.iter().enumerate() {
        // Those with less room went first: who is left shares what is left.
        let even = left.div_ceil((nodes.len() - at) as u64);
        shares[node] = even.min(room[node]);
        left -= shares[node];
    }
    (left == 0).then_some(shares)
}

/// The order in which experts go to nodes, by turns: every node in turn where shares are even,
/// else as often as its share says, evenly spread. `None` if no turn keeps within the room.
fn turn(experts: u64, shares: &[u64], room: &[u64]) -> Option<Vec<u16>> {
    let fits = |turn: &[u16]| {
        let mut held = vec![0; room.len()];
        for (at, &node) in (0..).zip(turn) {
            held[usize::from(node)] += in_turn(experts, turn.len() as u64, at);
        }
        held.iter().zip(room).all(|(held, room)| held <= room)
    };
    let nodes: Vec<u16> = (0..room.len() as u16).collect();
    if fits(&nodes) {
        return Some(nodes);
    }
    let turns = experts.min(TURN_MAX);
    // Slots of a turn per node. Where experts are more than slots, the remainders decide.
    let mut slots: Vec<u64> = shares
        .iter()
        .map(|share| (u128::from(*share) * u128::from(turns) / u128::from(experts)) as u64)
        .collect();
    while slots.iter().sum::<u64>() < turns {
        let owed = |node: &usize| {
            let (share, slots) = (u128::from(shares[*node]), u128::from(slots[*node]));
            (share * u128::from(turns)).saturating_sub(slots * u128::from(experts))
        };
        let most = (0..shares.len()).rev().max_by_key(owed)?;
        slots[most] += 1;
    }
    // Each slot goes to the node that is furthest behind its part.
    let mut taken = vec![0u64; slots.len()];
    let mut order = Vec::with_capacity(turns as usize);
    for at in 1..=turns {
        let behind = |node: &usize| {
            i128::from(slots[*node]) * i128::from(at) - i128::from(taken[*node]) * i128::from(turns)
        };
        let open = (0..slots.len()).rev().filter(|&node| taken[node] < slots[node]);
        let next = open.max_by_key(behind)?;
        taken[next] += 1;
        order.push(next as u16);
    }
    fits(&order).then_some(order)
}

/// A turn in another order. One that is short is repeated first, so that there is an order to have.
fn shuffled(turn: Vec<u16>, seed: u64, tier: u64) -> Vec<u16> {
    let mut turn = turn.repeat((64 / turn.len()).max(1));
    for last in (1..turn.len()).rev() {
        let draw = random_u64(seed, Purpose::Placement, tier << 32 | last as u64);
        turn.swap(last, (draw % (last as u64 + 1)) as usize);
    }
    turn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_model;

    fn counts(config: &ModelConfig, owners: &Owners, nodes: usize) -> Vec<u64> {
        let mut counts = vec![0; nodes];
        config.expert_keys().for_each(|key| counts[usize::from(owners.owner(key))] += 1);
        let tiers = owners.experts_per_group.len();
        assert_eq!(
            counts,
            owners.held(config, &vec![1; tiers], nodes),
            "held counts as owner says"
        );
        counts
    }

    #[test]
    fn every_expert_has_one_owner_and_loads_are_even() {
        let config = tiny_model(3, 8);
        let owners = place(&config, &[10], &[1000, 1000, 1000], PlacementPolicy::Balanced).unwrap();
        assert_eq!(counts(&config, &owners, 3), [8, 8, 8]);
        assert_eq!(owners.rules().len(), 1);
    }

    #[test]
    fn budgets_are_kept_to_the_last_byte() {
        let config = tiny_model(3, 8);
        for budgets in [[45, 200, 10], [40, 190, 10], [0, 240, 0], [80, 80, 80]] {
            let policy = PlacementPolicy::Balanced;
            let owners = place(&config, &[10], &budgets, policy).unwrap();
            let counts = counts(&config, &owners, 3);
            let kept = counts.iter().zip(&budgets).all(|(n, budget)| n * 10 <= *budget);
            assert!(kept && counts.iter().sum::<u64>() == 24, "{budgets:?} {counts:?}");
        }
        let error = place(&config, &[10], &[100, 139], PlacementPolicy::Balanced).unwrap_err();
        assert!(error.to_string().contains("240 bytes (24 of 10 bytes each), the nodes give 239"));
        assert!(place(&config, &[10], &[], PlacementPolicy::Balanced).is_err());
    }

    #[test]
    fn a_placement_is_small_however_many_experts_there_are() {
        let mut config = tiny_model(16, 1 << 10);
        if let Some(moe) = &mut config.moe {
            moe.tiers[0].groups = 1 << 20;
        }
        let experts = 16u64 << 30;
        let even = place(&config, &[1], &[experts, experts], PlacementPolicy::Balanced).unwrap();
        assert_eq!(even.rules()[0].holders, [0, 1]);
        let uneven = [experts / 4, experts];
        let owners = place(&config, &[1], &uneven, PlacementPolicy::Balanced).unwrap();
        assert!(owners.rules()[0].holders.len() <= TURN_MAX as usize);
        let held = owners.held(&config, &[1], 2);
        assert!(held[0] <= experts / 4 && held[0] + held[1] == experts, "{held:?}");
    }

    #[test]
    fn seeds_give_different_placements() {
        let config = tiny_model(3, 8);
        let with = |seed| place(&config, &[1], &[99, 99], PlacementPolicy::Random(seed)).unwrap();
        assert_ne!(with(1), with(2));
        assert_eq!(with(1), with(1));
    }

    #[test]
    fn rules_that_leave_a_group_out_or_place_it_twice_are_refused() {
        let mut config = tiny_model(2, 4);
        if let Some(moe) = &mut config.moe {
            moe.tiers[0].groups = 3;
        }
        let rule = |&(first_group, end_group): &(u32, u32)| PlacementRule {
            tier: 0,
            first_group,
            end_group,
            copies: 1,
            holders: vec![0, 1],
        };
        let with = |rules: &[(u32, u32)]| Owners::new(&config, rules.iter().map(rule).collect());
        assert!(with(&[(1, 3), (0, 1)]).is_ok());
        for bad in [&[(0, 2)][..], &[(0, 2), (1, 3)], &[(1, 3)], &[(0, 4)], &[(0, 3), (0, 0)], &[]]
        {
            assert!(with(bad).is_err(), "{bad:?}");
        }
        let other = PlacementRule { tier: 1, ..rule(&(0, 3)) };
        assert!(Owners::new(&config, vec![rule(&(0, 3)), other]).is_err());
    }
}
