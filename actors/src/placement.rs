//! Which nodes hold which expert.
//!
//! A placement is a few rules over ranges of (tier, group), however many experts there are. Each
//! expert has as many holders as copies were asked for; where nodes or budgets allow fewer, a
//! holder is named twice, and counts once. Placement never changes a result, only where work is
//! done. [`plan`] makes one from what was before and from who is there.
//!
//! Experts of a rule are numbered by sparse layer, then group, then expert; number i is held by entry
//! `i mod entries` of its holders, of `copies` nodes. A node is named by its slot in the membership.

mod plan;

use std::ops::Range;

use lite_llm_runtime::{config::ModelConfig, expert::ExpertKey};
use lite_llm_transport::messages::PlacementRule;

pub use self::plan::{COPIES_MAX, DoesNotFit, plan};

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

/// Holders of a model's experts, as indices of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    rules: Vec<PlacementRule>,
    /// Per layer: how many sparse layers come before it.
    ordinals: Vec<u64>,
    sparse_layers: u64,
    experts_per_group: Vec<u32>,
}

/// Rules that do not place every expert of the model once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator's placement {0}")]
pub struct BadPlacement(String);

impl Placement {
    /// Takes rules that place every group of every tier that is here.
    pub fn new(config: &ModelConfig, rules: Vec<PlacementRule>) -> Result<Self, BadPlacement> {
        let tiers = config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        let mut ranges: Vec<Vec<Range<u32>>> = vec![Vec::new(); tiers.len()];
        for rule in &rules {
            let range = rule.first_group..rule.end_group;
            let turns = rule.holders.len().checked_rem(usize::from(rule.copies)) == Some(0);
            match ranges.get_mut(usize::from(rule.tier)) {
                Some(of_tier) if turns && !range.is_empty() && !rule.holders.is_empty() => {
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
        Ok(Self { rules, ordinals, sparse_layers: ordinal, experts_per_group })
    }

    /// The rules, as they travel.
    pub fn rules(&self) -> &[PlacementRule] {
        &self.rules
    }

    /// Who computes an expert of the model: the first is asked first. A node is named twice where
    /// holders are fewer than copies.
    ///
    /// # Panics
    /// If the expert's group is not placed, or the model has no such layer; an expert beyond its group
    /// gets some holder.
    pub fn holders(&self, key: ExpertKey) -> &[u16] {
        let placed = |rule: &&PlacementRule| {
            rule.tier == key.tier && (rule.first_group..rule.end_group).contains(&key.group)
        };
        let rule = self.rules.iter().find(placed).expect("every group is placed");
        let per_group = u64::from(self.experts_per_group[usize::from(key.tier)]);
        let groups = u64::from(rule.end_group - rule.first_group);
        let group = self.ordinals[usize::from(key.layer)] * groups
            + u64::from(key.group - rule.first_group);
        let copies = usize::from(rule.copies);
        let turns = rule.holders.len() / copies;
        let turn = (group * per_group + u64::from(key.expert)) % turns as u64;
        &rule.holders[turn as usize * copies..][..copies]
    }

    /// Whether a node is to hold an expert of the model.
    pub fn holds(&self, node: u16, key: ExpertKey) -> bool {
        self.holders(key).contains(&node)
    }

    /// Bytes that each of so many nodes holds, with experts of `bytes[tier]` each.
    pub fn held(&self, bytes: &[u64], nodes: usize) -> Vec<u64> {
        let mut held = vec![0u64; nodes];
        for (rule, experts, holders) in self.turns() {
            let part = experts.saturating_mul(bytes[usize::from(rule.tier)]);
            for node in distinct(holders) {
                if let Some(held) = held.get_mut(usize::from(node)) {
                    *held = held.saturating_add(part);
                }
            }
        }
        held
    }

    /// Whether some expert has no holder for which `alive` holds.
    pub fn missing(&self, alive: impl Fn(u16) -> bool) -> bool {
        self.without_holder(alive) > 0
    }

    /// How many experts have no holder for which `alive` holds.
    pub fn without_holder(&self, alive: impl Fn(u16) -> bool) -> u64 {
        let lost = self.turns().filter(|(_, _, holders)| !holders.iter().any(|node| alive(*node)));
        lost.fold(0, |sum, (_, experts, _)| sum.saturating_add(experts))
    }

    /// Fewest holders, of those for which `alive` holds, that an expert has; the most that can be
    /// said where there are no experts.
    pub fn copies(&self, alive: impl Fn(u16) -> bool) -> usize {
        let living = |holders: &[u16]| distinct(holders).filter(|node| alive(*node)).count();
        let counts = self.turns().map(|(_, _, holders)| living(holders));
        counts.min().unwrap_or(usize::MAX)
    }

    /// Whether a node holds anything.
    pub fn names(&self, node: u16) -> bool {
        self.turns().any(|(_, _, holders)| holders.contains(&node))
    }

    /// How many nodes there must be for every index to name one.
    pub fn nodes(&self) -> usize {
        let all = self.rules.iter().flat_map(|rule| &rule.holders);
        all.max().map_or(0, |node| usize::from(*node) + 1)
    }

    /// The same with one holder of each expert only, of those for which `alive` holds, as evenly as
    /// a glance allows. An expert without such a holder keeps its first.
    pub fn thinned(&self, alive: impl Fn(u16) -> bool) -> Self {
        let mut load = vec![0u64; self.nodes()];
        let mut thin = |rule: &PlacementRule| {
            let one = |holders: &[u16]| {
                let living = distinct(holders).filter(|node| alive(*node));
                let least = living.min_by_key(|node| load[usize::from(*node)]);
                let kept = least.unwrap_or(holders[0]);
                load[usize::from(kept)] += 1;
                kept
            };
            let holders = rule.holders.chunks(usize::from(rule.copies)).map(one).collect();
            PlacementRule { copies: 1, holders, ..rule.clone() }
        };
        Self { rules: self.rules.iter().map(&mut thin).collect(), ..self.clone() }
    }

    /// Whether all that `other` gives to its node `theirs` is held by the node `ours` of this one.
    /// Placements whose rules are cut differently are not compared: it is said to lack something.
    pub fn covers(&self, ours: u16, other: &Placement, theirs: u16) -> bool {
        other.rules.iter().all(|rule| {
            let range = |r: &PlacementRule| (r.tier, r.first_group, r.end_group);
            let Some(own) = self.rules.iter().find(|own| range(own) == range(rule)) else {
                return !rule.holders.contains(&theirs);
            };
            let chunks = |rule: &PlacementRule| rule.holders.len() / usize::from(rule.copies);
            let (own_turns, turns) = (chunks(own), chunks(rule));
            let both = lcm(own_turns as u64, turns as u64).min(other.experts(rule));
            // Turns of one plan divide each other; others are too many to look at.
            both <= COMPARED_MAX
                && (0..both as usize).all(|i| {
                    !holders_of(rule, i % turns).contains(&theirs)
                        || holders_of(own, i % own_turns).contains(&ours)
                })
        })
    }

    /// Experts that a rule places.
    fn experts(&self, rule: &PlacementRule) -> u64 {
        let groups = u64::from(rule.end_group - rule.first_group);
        self.sparse_layers * groups * u64::from(self.experts_per_group[usize::from(rule.tier)])
    }

    /// Every entry of every rule's turn that has experts: the rule, their number, their holders.
    fn turns(&self) -> impl Iterator<Item = (&PlacementRule, u64, &[u16])> {
        self.rules.iter().flat_map(|rule| {
            let experts = self.experts(rule);
            let turns = (rule.holders.len() / usize::from(rule.copies)) as u64;
            let entries = (0..).zip(rule.holders.chunks(usize::from(rule.copies)));
            let counted =
                entries.map(move |(turn, holders)| (rule, in_turn(experts, turns, turn), holders));
            counted.filter(|(_, experts, _)| *experts > 0)
        })
    }
}

/// Longest common turn of two placements that is compared.
const COMPARED_MAX: u64 = 1 << 20;

/// Each node once. There are few.
fn distinct(holders: &[u16]) -> impl Iterator<Item = u16> {
    let first = |(at, node): &(usize, &u16)| !holders[..*at].contains(node);
    holders.iter().enumerate().filter(first).map(|(_, node)| *node)
}

fn holders_of(rule: &PlacementRule, turn: usize) -> &[u16] {
    let copies = usize::from(rule.copies);
    &rule.holders[turn * copies..][..copies]
}

/// How many of the numbers below `count` are `turn` modulo `turns`.
fn in_turn(count: u64, turns: u64, turn: u64) -> u64 {
    count / turns + u64::from(turn < count % turns)
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_model;

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
        let with = |rules: &[(u32, u32)]| Placement::new(&config, rules.iter().map(rule).collect());
        assert!(with(&[(1, 3), (0, 1)]).is_ok());
        for bad in [&[(0, 2)][..], &[(0, 2), (1, 3)], &[(1, 3)], &[(0, 4)], &[(0, 3), (0, 0)], &[]]
        {
            assert!(with(bad).is_err(), "{bad:?}");
        }
        let other = PlacementRule { tier: 1, ..rule(&(0, 3)) };
        assert!(Placement::new(&config, vec![rule(&(0, 3)), other]).is_err());
        for copies in [0, 3] {
            let torn = PlacementRule { copies, ..rule(&(0, 3)) };
            assert!(Placement::new(&config, vec![torn]).is_err(), "{copies} copies of 2 holders");
        }
    }

    fn placed(layers: usize, experts: u32, copies: u16, holders: &[u16]) -> Placement {
        let holders = holders.to_vec();
        let rule = PlacementRule { tier: 0, first_group: 0, end_group: 1, copies, holders };
        Placement::new(&tiny_model(layers, experts), vec![rule]).unwrap()
    }

    #[test]
    fn a_holder_that_is_named_twice_counts_once() {
        let placement = placed(1, 4, 2, &[0, 0, 1, 2]);
        assert_eq!(placement.held(&[10], 3), [20, 20, 20]);
        assert_eq!(placement.copies(|_| true), 1);
        assert!(placement.missing(|node| node != 0));
        assert!(!placement.missing(|node| node != 1), "the other copy is alive");
        assert_eq!(placement.without_holder(|node| node == 1), 2);
        let key = ExpertKey { layer: 0, tier: 0, group: 0, expert: 3 };
        assert_eq!(placement.holders(key), [1, 2]);
        assert!(placement.holds(2, key) && !placement.holds(0, key));
    }

    #[test]
    fn shares_of_turns_of_different_length_are_compared() {
        let (short, long) = (placed(2, 6, 1, &[0, 1]), placed(2, 6, 1, &[0, 1, 0, 2, 0, 1]));
        assert!(short.covers(1, &long, 2) && short.covers(1, &long, 1));
        assert!(!long.covers(1, &short, 1) && long.covers(0, &short, 0));
        assert!(!short.covers(0, &long, 2));
        assert!(long.covers(1, &short, 7), "who is given nothing lacks nothing");
    }
}
