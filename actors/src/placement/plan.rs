//! A placement from the one before and from who is there.
//!
//! Invariants: equal inputs give equal outputs; a holder that is still there keeps what it holds,
//! unless shares become more even by giving it away; what a member holds and what it is to load
//! fit in its budget *together*, for it serves the one while it loads the other; every expert has
//! a holder, or the plan is refused. What such a step cannot do yet, a plan that is made from its
//! outcome can: plans are to be repeated until nothing changes.
//!
//! Experts are dealt by turns ([`PlacementRule`]); a *slot* is one entry of a turn: the experts
//! whose number modulo the length of the turn is the slot's.

use std::cmp::Reverse;

use lite_llm_runtime::{
    config::{ModelConfig, MoeConfig},
    random::{Purpose, random_u64},
};
use lite_llm_transport::messages::{PLACEMENT_HOLDERS_MAX, PlacementRule};

use super::{Placement, PlacementPolicy, distinct, holders_of, in_turn};

/// Longest turn. A tier of more experts is spread to within this share of it, which matters where
/// budgets are all but full.
const TURN_MAX: usize = 4096;
/// Most copies of an expert that make sense to ask for.
pub const COPIES_MAX: u16 = 16;
const _: () = assert!(TURN_MAX * COPIES_MAX as usize <= PLACEMENT_HOLDERS_MAX);

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

impl DoesNotFit {
    /// How many times the budgets would do for everything twice, and some more.
    pub(crate) fn times(&self) -> u64 {
        2 + 3 * self.needed.div_ceil(self.budget.max(1))
    }
}

/// Spreads a model's experts, `bytes[tier]` each, over members with these budgets in bytes; at an
/// index of `None` there is nobody, or somebody who is to hold nothing.
pub fn plan(
    config: &ModelConfig,
    bytes: &[u64],
    old: Option<&Placement>,
    members: &[Option<u64>],
    copies: u16,
    policy: PlacementPolicy,
) -> Result<Placement, DoesNotFit> {
    let mut planner = Planner::new(config, bytes, old, members, copies);
    planner.trim();
    // Heavy slots first: light ones fit in what they leave.
    let mut order: Vec<usize> = (0..planner.tiers.len()).collect();
    order.sort_by_key(|&tier| Reverse(planner.tiers[tier].weight(0)));
    for &tier in &order {
        if planner.tiers[tier].rule.is_none() {
            planner.spread(tier);
        }
    }
    if !order.iter().all(|&tier| planner.fill(tier, 1)) {
        return Err(does_not_fit(config, bytes, members));
    }
    for copies in 2..=planner.copies {
        for &tier in &order {
            planner.fill(tier, copies);
        }
    }
    for &tier in &order {
        planner.balance(tier);
    }
    for tier in &mut planner.tiers {
        match policy {
            PlacementPolicy::Random(seed) if tier.rule.is_none() => tier.shuffle(seed),
            PlacementPolicy::Random(_) | PlacementPolicy::Balanced => {}
        }
        tier.order();
    }
    let short = policy == PlacementPolicy::Balanced;
    let dealt = members.iter().filter(|budget| budget.is_some_and(|bytes| bytes > 0)).count();
    let copies = planner.copies;
    let rules = planner.tiers.into_iter().map(|tier| tier.into_rule(copies, short, dealt));
    Ok(Placement::new(config, rules.collect()).expect("a rule was made for every tier"))
}

fn does_not_fit(config: &ModelConfig, bytes: &[u64], members: &[Option<u64>]) -> DoesNotFit {
    let layers = config.sparse_layers().count() as u64;
    let tiers = config.moe.as_ref().map_or(&[][..], |moe: &MoeConfig| &moe.tiers);
    let here = tiers.iter().zip(bytes).filter(|(tier, _)| !tier.absent);
    let count = |groups: u32, experts: u32| layers * u64::from(groups) * u64::from(experts);
    let each: Vec<(u64, u64)> =
        here.map(|(t, bytes)| (count(t.groups, t.experts_per_group), *bytes)).collect();
    let words = each.iter().map(|(experts, bytes)| format!("{experts} of {bytes} bytes each"));
    let sum = |sum: u64, more: u64| sum.saturating_add(more);
    DoesNotFit {
        needed: each.iter().map(|(experts, bytes)| experts.saturating_mul(*bytes)).fold(0, sum),
        experts: words.collect::<Vec<_>>().join(", "),
        budget: members.iter().flatten().copied().fold(0, sum),
        nodes: members.iter().flatten().count(),
    }
}

/// How somebody may be first once less, and somebody else once more.
struct Chain {
    to: usize,
    /// Slots, each with who is to become its first.
    firsts: Vec<(usize, u16)>,
}

/// A tier's turn, as it becomes.
struct Tier {
    tier: u16,
    groups: u32,
    experts: u64,
    bytes: u64,
    /// What was before, if it had this form.
    rule: Option<PlacementRule>,
    /// Per slot: members that hold it now.
    old: Vec<Vec<u16>>,
    /// Per slot: members that are to hold it, each once.
    slots: Vec<Vec<u16>>,
    /// Per member: in how many slots it is.
    count: Vec<u64>,
}

impl Tier {
    /// Bytes of a slot's experts.
    fn weight(&self, slot: usize) -> u64 {
        let experts = in_turn(self.experts, self.slots.len() as u64, slot as u64);
        experts.saturating_mul(self.bytes)
    }

    /// The slots in an order in which every beginning is spread over the turn, and so over layers.
    fn scattered(&self) -> impl Iterator<Item = usize> + use<> {
        let turn = self.slots.len();
        let by_ratio = (turn as f64 * 0.618) as usize;
        let coprime = |step: &usize| gcd(*step, turn) == 1;
        let step = (by_ratio.max(1)..=turn).find(coprime).unwrap_or(1);
        (0..turn).map(move |i| i * step % turn)
    }

    /// The same shares in another order. Only slots of equal weight change places.
    fn shuffle(&mut self, seed: u64) {
        let heavy = (self.experts % self.slots.len() as u64) as usize;
        let (heavy, light) = self.slots.split_at_mut(heavy);
        for slots in [heavy, light] {
            for last in (1..slots.len()).rev() {
                let draw =
                    random_u64(seed, Purpose::Placement, u64::from(self.tier) << 32 | last as u64);
                slots.swap(last, (draw % (last as u64 + 1)) as usize);
            }
        }
    }

    /// Chooses who is asked first, so that every member is for as many slots, as far as may be:
    /// while a chain of slots leads from one who is first too often to one who is too rarely.
    fn order(&mut self) {
        let mut firsts = vec![0u64; self.count.len()];
        self.slots.iter().for_each(|holders| firsts[usize::from(holders[0])] += 1);
        let mut nodes: Vec<usize> = (0..firsts.len()).filter(|&n| self.count[n] > 0).collect();
        loop {
            nodes.sort_by_key(|&node| Reverse(firsts[node]));
            let chains = nodes.iter().find_map(|&node| Some((node, self.chain(node, &firsts)?)));
            let Some((from, Chain { to, firsts: chain })) = chains else { return };
            for (slot, first) in chain {
                let holders = &mut self.slots[slot];
                let at = holders.iter().position(|holder| *holder == first).expect("it holds it");
                holders.swap(0, at);
            }
            firsts[from] -= 1;
            firsts[to] += 1;
        }
    }

    /// A chain of slots from a member to another that is first at least two times less.
    fn chain(&self, from: usize, firsts: &[u64]) -> Option<Chain> {
        // Per member that was reached: through which slot, and from whom.
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; firsts.len()];
        let mut at = vec![from];
        let mut next = 0;
        while let Some(&node) = at.get(next) {
            next += 1;
            let slots = self.slots.iter().enumerate();
            for (slot, holders) in slots.filter(|(_, holders)| usize::from(holders[0]) == node) {
                for &holder in &holders[1..] {
                    let holder = usize::from(holder);
                    if holder != from && reached[holder].is_none() {
                        reached[holder] = Some((slot, node));
                        at.push(holder);
                    }
                }
            }
        }
        let to = *at[1..].iter().min_by_key(|&&node| firsts[node])?;
        if firsts[from] < firsts[to] + 2 {
            return None;
        }
        let mut chain = Vec::new();
        let mut node = to;
        while node != from {
            let (slot, before) = reached[node]?;
            chain.push((slot, node as u16));
            node = before;
        }
        Some(Chain { to, firsts: chain })
    }

    /// The turn as it travels. One that repeats itself after one round of the members may be cut
    /// `short`.
    fn into_rule(self, copies: usize, short: bool, members: usize) -> PlacementRule {
        let padded = |mut holders: Vec<u16>| {
            let first = holders[0];
            holders.resize(copies, first);
            holders
        };
        let fresh = self.rule.is_none();
        let mut slots: Vec<Vec<u16>> = self.slots.into_iter().map(padded).collect();
        if let Some(rule) = self.rule {
            let turns = rule.holders.len() / usize::from(rule.copies);
            let as_before = |(slot, holders): (usize, &Vec<u16>)| {
                holders_of(&rule, slot % turns) == holders.as_slice()
            };
            if usize::from(rule.copies) == copies && slots.iter().enumerate().all(as_before) {
                return rule;
            }
        }
        let repeats =
            |turn: usize| (turn..slots.len()).all(|slot| slots[slot] == slots[slot - turn]);
        if fresh && short && (1..slots.len()).contains(&members) && repeats(members) {
            slots.truncate(members);
        }
        let holders = slots.concat();
        let (tier, end_group, copies) = (self.tier, self.groups, copies as u16);
        PlacementRule { tier, first_group: 0, end_group, copies, holders }
    }
}

struct Planner<'a> {
    members: &'a [Option<u64>],
    copies: usize,
    tiers: Vec<Tier>,
    /// Per member: bytes that it holds, with those that it is to load.
    taken: Vec<u64>,
}

impl<'a> Planner<'a> {
    fn new(
        config: &ModelConfig,
        bytes: &[u64],
        old: Option<&Placement>,
        members: &'a [Option<u64>],
        copies: u16,
    ) -> Self {
        let copies = usize::from(copies.clamp(1, COPIES_MAX));
        let layers = config.sparse_layers().count() as u64;
        let dealt = members.iter().flatten().count().clamp(1, TURN_MAX);
        let moe = config.moe.as_ref();
        let mut tiers = Vec::new();
        for (tier, of_tier) in (0u16..).zip(moe.iter().flat_map(|moe| &moe.tiers)) {
            let groups = of_tier.groups;
            let experts = layers * u64::from(groups) * u64::from(of_tier.experts_per_group);
            if of_tier.absent || experts == 0 {
                continue;
            }
            let same = |rule: &&PlacementRule| rule.tier == tier && rule.end_group == groups;
            let rule = old.and_then(|old| old.rules().iter().find(same));
            let rule = rule.filter(|rule| {
                rule.first_group == 0 && rule.holders.len() / usize::from(rule.copies) <= TURN_MAX
            });
            let turns = rule.map(|rule| rule.holders.len() / usize::from(rule.copies));
            let unit = turns.unwrap_or(dealt);
            // A turn that is repeated, or as long as the experts are many, says the same.
            let turn = (TURN_MAX / unit * unit).min(usize::try_from(experts).unwrap_or(TURN_MAX));
            let living = |node: &u16| members.get(usize::from(*node)).is_some_and(Option::is_some);
            let before = |slot: usize| {
                let holders = rule.map(|rule| holders_of(rule, slot % unit));
                holders.map_or_else(Vec::new, |all| distinct(all).filter(living).collect())
            };
            let old: Vec<Vec<u16>> = (0..turn).map(before).collect();
            let slots: Vec<Vec<u16>> =
                old.iter().map(|all| all.iter().take(copies).copied().collect()).collect();
            let mut count = vec![0; members.len()];
            slots.iter().flatten().for_each(|&node| count[usize::from(node)] += 1);
            let (rule, bytes) = (rule.cloned(), bytes[usize::from(tier)]);
            tiers.push(Tier { tier, groups, experts, bytes, rule, old, slots, count });
        }
        let mut taken = vec![0u64; members.len()];
        for tier in &tiers {
            for (slot, holders) in tier.old.iter().enumerate() {
                for &node in holders {
                    let taken = &mut taken[usize::from(node)];
                    *taken = taken.saturating_add(tier.weight(slot));
                }
            }
        }
        Self { members, copies, tiers, taken }
    }

    /// A member that came back with a smaller budget does not hold what it held: what it has no
    /// room for is taken from it, first what others hold, too.
    fn trim(&mut self) {
        for (node, budget) in self.members.iter().enumerate() {
            let Some(budget) = *budget else { continue };
            for others in [1, 0] {
                for tier in &mut self.tiers {
                    for slot in tier.scattered() {
                        if self.taken[node] <= budget {
                            break;
                        }
                        let weight = tier.weight(slot);
                        let holds = |holders: &[u16]| holders.contains(&(node as u16));
                        if !holds(&tier.old[slot]) || tier.old[slot].len() <= others {
                            continue;
                        }
                        tier.old[slot].retain(|holder| usize::from(*holder) != node);
                        if holds(&tier.slots[slot]) {
                            tier.count[node] -= 1;
                            tier.slots[slot].retain(|holder| usize::from(*holder) != node);
                        }
                        self.taken[node] -= weight;
                    }
                }
            }
        }
    }

    fn fits(&self, tier: usize, slot: usize, node: u16) -> bool {
        let of_tier = &self.tiers[tier];
        let taken = self.taken[usize::from(node)];
        self.members[usize::from(node)].is_some_and(|budget| {
            of_tier.old[slot].contains(&node)
                || taken.checked_add(of_tier.weight(slot)).is_some_and(|bytes| bytes <= budget)
        })
    }

    fn add(&mut self, tier: usize, slot: usize, node: u16) {
        let of_tier = &mut self.tiers[tier];
        if !of_tier.old[slot].contains(&node) {
            self.taken[usize::from(node)] += of_tier.weight(slot);
        }
        of_tier.slots[slot].push(node);
        of_tier.count[usize::from(node)] += 1;
    }

    fn remove(&mut self, tier: usize, slot: usize, node: u16) {
        let of_tier = &mut self.tiers[tier];
        // What is held already stays held until the new placement serves.
        if !of_tier.old[slot].contains(&node) {
            self.taken[usize::from(node)] -= of_tier.weight(slot);
        }
        of_tier.slots[slot].retain(|holder| *holder != node);
        of_tier.count[usize::from(node)] -= 1;
    }

    /// Deals a tier that nobody holds: as evenly as room allows, a member's slots far apart.
    fn spread(&mut self, tier: usize) {
        let of_tier = &self.tiers[tier];
        let (turn, weight) = (of_tier.slots.len() as u64, of_tier.weight(0).max(1));
        let left = |(budget, taken): (&Option<u64>, &u64)| budget.map_or(0, |b| b - taken) / weight;
        let room: Vec<u64> = self.members.iter().zip(&self.taken).map(left).collect();
        let shares = share(turn, &room);
        let mut dealt = vec![0u64; shares.len()];
        for slot in 0..turn {
            // Each slot goes to the member that is furthest behind its part.
            let behind = |node: &usize| {
                i128::from(shares[*node]) * i128::from(slot + 1)
                    - i128::from(dealt[*node]) * i128::from(turn)
            };
            let open = (0..shares.len()).rev().filter(|&node| dealt[node] < shares[node]);
            let Some(next) = open.max_by_key(behind) else { return };
            dealt[next] += 1;
            self.add(tier, slot as usize, next as u16);
        }
    }

    /// Gives slots with fewer holders than so many one more, each to the member with the least.
    /// Returns whether all have enough.
    fn fill(&mut self, tier: usize, copies: usize) -> bool {
        let nodes = self.members.len();
        // How often two members share a slot: who shares much with the first comes last, so that
        // what one loses falls to many.
        let mut shared = vec![0u32; if copies > 1 { nodes * nodes } else { 0 }];
        let pair = |a: u16, b: u16| usize::from(a) * nodes + usize::from(b);
        if copies > 1 {
            for holders in self.tiers[tier].slots.iter().filter(|holders| holders.len() > 1) {
                holders[1..].iter().for_each(|&node| shared[pair(holders[0], node)] += 1);
            }
        }
        let mut all = true;
        for slot in 0..self.tiers[tier].slots.len() {
            let holders = &self.tiers[tier].slots[slot];
            if holders.len() >= copies {
                continue;
            }
            let first = holders.first().copied();
            let open = (0..nodes as u16).filter(|node| !holders.contains(node));
            let least = |node: &u16| {
                let with_first =
                    first.map_or(0, |first| shared.get(pair(first, *node)).copied().unwrap_or(0));
                let at = usize::from(*node);
                (self.tiers[tier].count[at], with_first, self.taken[at], *node)
            };
            match open.filter(|node| self.fits(tier, slot, *node)).min_by_key(least) {
                Some(node) => {
                    self.add(tier, slot, node);
                    if let Some(first) = first {
                        shared[pair(first, node)] += 1;
                    }
                }
                None => all &= copies > 1 && self.exchange(tier, slot),
            }
        }
        all
    }

    /// Room is left only with members that hold this slot already: one of them takes over what
    /// another was to load, and that other loads this slot.
    fn exchange(&mut self, tier: usize, slot: usize) -> bool {
        let holders = self.tiers[tier].slots[slot].clone();
        for &roomy in &holders {
            for other in 0..self.tiers[tier].slots.len() {
                let of_other = &self.tiers[tier].slots[other];
                if of_other.contains(&roomy) || !self.fits(tier, other, roomy) {
                    continue;
                }
                let loads = |node: &&u16| {
                    !holders.contains(node) && !self.tiers[tier].old[other].contains(node)
                };
                for giver in of_other.iter().filter(loads).copied().collect::<Vec<_>>() {
                    self.remove(tier, other, giver);
                    if self.fits(tier, slot, giver) {
                        self.add(tier, other, roomy);
                        self.add(tier, slot, giver);
                        return true;
                    }
                    self.add(tier, other, giver);
                }
            }
        }
        false
    }

    /// Moves slots from who has most to who has least, until they are even within one slot.
    fn balance(&mut self, tier: usize) {
        let living = |node: &usize| self.members[*node].is_some();
        let mut nodes: Vec<usize> = (0..self.members.len()).filter(living).collect();
        let scattered: Vec<usize> = self.tiers[tier].scattered().collect();
        loop {
            let count = &self.tiers[tier].count;
            nodes.sort_by_key(|&node| (Reverse(count[node]), node));
            let pairs = nodes.iter().flat_map(|&from| {
                let less = move |to: &&usize| count[from] > count[**to] + 1;
                nodes.iter().rev().take_while(less).map(move |&to| (from as u16, to as u16))
            });
            let found = pairs.into_iter().find_map(|(from, to)| {
                let slot = self.movable(tier, &scattered, from, to)?;
                Some((slot, from, to))
            });
            let Some((slot, from, to)) = found else { return };
            self.remove(tier, slot, from);
            self.add(tier, slot, to);
        }
    }

    /// A slot that one member can give another: best one that the other has, then one that the
    /// giver has not.
    fn movable(&self, tier: usize, slots: &[usize], from: u16, to: u16) -> Option<usize> {
        let of_tier = &self.tiers[tier];
        let given = |slot: &&usize| {
            let holders = &of_tier.slots[**slot];
            holders.contains(&from) && !holders.contains(&to) && self.fits(tier, **slot, to)
        };
        let cost = |slot: &&usize| {
            let old = &of_tier.old[**slot];
            (!old.contains(&to), old.contains(&from))
        };
        slots.iter().filter(given).min_by_key(cost).copied()
    }
}

/// Cuts a number of slots into shares that are as even as the members' room allows.
fn share(slots: u64, room: &[u64]) -> Vec<u64> {
    let mut shares = vec![0; room.len()];
    let mut nodes: Vec<usize> = (0..room.len()).collect();
    nodes.sort_by_key(|&node| room[node]);
    let mut left = slots;
    for (at, &node) in nodes.iter().enumerate() {
        // Those with less room went first: who is left shares what is left.
        let even = left.div_ceil((nodes.len() - at) as u64);
        shares[node] = even.min(room[node]);
        left -= shares[node];
    }
    shares
}

fn gcd(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;
