//! What plans promise, each seen to fail with the promise broken.

use lite_llm_runtime::{expert::ExpertKey, tier::TierConfig};

use super::*;
use crate::testing::{Draws, tiny_model};

const BALANCED: PlacementPolicy = PlacementPolicy::Balanced;

fn some(budgets: &[u64]) -> Vec<Option<u64>> {
    budgets.iter().copied().map(Some).collect()
}

/// Experts per node, counted by key and compared with what `held` says.
fn counts(config: &ModelConfig, placement: &Placement, nodes: usize) -> Vec<u64> {
    let mut counts = vec![0; nodes];
    for key in config.expert_keys() {
        let held = (0..nodes).filter(|&node| placement.holds(node as u16, key));
        held.for_each(|node| counts[node] += 1);
    }
    let tiers = config.moe.as_ref().map_or(0, |moe| moe.tiers.len());
    assert_eq!(counts, placement.held(&vec![1; tiers], nodes), "held counts as holds says");
    counts
}

#[test]
fn every_expert_has_a_holder_and_loads_are_even() {
    let config = tiny_model(3, 8);
    let placement = plan(&config, &[10], None, &some(&[1000; 3]), 1, BALANCED).unwrap();
    assert_eq!(counts(&config, &placement, 3), [8, 8, 8]);
    assert_eq!(placement.rules()[0].holders, [0, 1, 2]);
}

#[test]
fn budgets_are_kept_to_the_last_byte() {
    let config = tiny_model(3, 8);
    for budgets in [[45, 200, 10], [40, 190, 10], [0, 240, 0], [80, 80, 80]] {
        let placement = plan(&config, &[10], None, &some(&budgets), 1, BALANCED).unwrap();
        let counts = counts(&config, &placement, 3);
        let kept = counts.iter().zip(&budgets).all(|(n, budget)| n * 10 <= *budget);
        assert!(kept && counts.iter().sum::<u64>() == 24, "{budgets:?} {counts:?}");
    }
    let error = plan(&config, &[10], None, &some(&[100, 139]), 1, BALANCED).unwrap_err();
    assert!(error.to_string().contains("240 bytes (24 of 10 bytes each), the nodes give 239"));
    assert!(plan(&config, &[10], None, &[], 1, BALANCED).is_err());
}

#[test]
fn a_placement_is_small_however_many_experts_there_are() {
    let mut config = tiny_model(16, 1 << 10);
    if let Some(moe) = &mut config.moe {
        moe.tiers[0].groups = 1 << 20;
    }
    let experts = 16u64 << 30;
    let even = plan(&config, &[1], None, &some(&[experts; 2]), 1, BALANCED).unwrap();
    assert_eq!(even.rules()[0].holders, [0, 1]);
    let uneven = some(&[experts / 4, experts]);
    let placement = plan(&config, &[1], None, &uneven, 1, BALANCED).unwrap();
    assert!(placement.rules()[0].holders.len() <= TURN_MAX);
    let held = placement.held(&[1], 2);
    assert!(held[0] <= experts / 4 && held[0] + held[1] == experts, "{held:?}");
    // A short turn is drawn out for a third, without any other move.
    let three = some(&[experts; 3]);
    let joined = plan(&config, &[1], Some(&even), &three, 1, BALANCED).unwrap();
    let held = joined.held(&[1], 3);
    let (most, least) = (held.iter().max().unwrap(), held.iter().min().unwrap());
    assert!(most - least <= experts.div_ceil(TURN_MAX as u64), "{held:?}");
    assert!(
        joined.rules()[0].holders.iter().zip([0, 1].iter().cycle()).all(|(a, b)| a == b || *a == 2)
    );
}

#[test]
fn seeds_give_different_placements_within_budgets() {
    let config = tiny_model(3, 8);
    let budgets = some(&[100, 140]);
    let with =
        |seed| plan(&config, &[10], None, &budgets, 1, PlacementPolicy::Random(seed)).unwrap();
    assert_ne!(with(1), with(2));
    assert_eq!(with(1), with(1));
    assert_eq!(counts(&config, &with(3), 2), [10, 14]);
}

#[test]
fn copies_are_with_different_members_and_their_firsts_are_even() {
    let config = tiny_model(3, 8);
    for nodes in 2..6usize {
        let placement = plan(&config, &[10], None, &some(&vec![480; nodes]), 2, BALANCED).unwrap();
        assert_eq!(placement.copies(|_| true), 2);
        let mut firsts = vec![0; nodes];
        config.expert_keys().for_each(|key| firsts[usize::from(placement.holders(key)[0])] += 1);
        for counts in [counts(&config, &placement, nodes), firsts] {
            let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
            assert!(most - least <= 1, "{nodes} nodes: {counts:?}");
        }
        // What one loses falls to many.
        if nodes > 3 {
            let seconds = config.expert_keys().map(|key| placement.holders(key));
            let mut of_first: Vec<u16> = seconds.filter(|h| h[0] == 0).map(|h| h[1]).collect();
            of_first.sort_unstable();
            of_first.dedup();
            assert!(of_first.len() >= nodes - 2, "{of_first:?}");
        }
    }
    let alone = plan(&config, &[10], None, &some(&[480]), 2, BALANCED).unwrap();
    assert_eq!((alone.copies(|_| true), alone.rules()[0].copies), (1, 2));
    let tight = plan(&config, &[10], None, &some(&[120, 130]), 2, BALANCED).unwrap();
    assert_eq!(tight.copies(|_| true), 1, "no error for a lack of further copies");
}

#[test]
fn uneven_members_hold_all_copies_if_there_is_any_way() {
    let config = tiny_model(2, 10);
    let placement = plan(&config, &[1], None, &some(&[20, 10, 10]), 2, BALANCED).unwrap();
    assert_eq!(placement.copies(|_| true), 2);
    assert_eq!(counts(&config, &placement, 3), [20, 10, 10]);
}

/// Per slot of the longer turn: who is new there.
fn moves(config: &ModelConfig, old: &Placement, new: &Placement) -> Vec<(ExpertKey, u16)> {
    let keys = config.expert_keys();
    let moved = keys.flat_map(|key| {
        let gained = distinct(new.holders(key)).filter(move |node| !old.holds(*node, key));
        gained.map(move |node| (key, node)).collect::<Vec<_>>()
    });
    moved.collect()
}

#[test]
fn a_joiner_gets_its_share_and_nothing_else_moves() {
    let config = tiny_model(6, 10);
    for copies in [1, 2] {
        for nodes in 2..6usize {
            let mut members = some(&vec![10_000; nodes]);
            let old = plan(&config, &[10], None, &members, copies, BALANCED).unwrap();
            members.push(Some(10_000));
            let new = plan(&config, &[10], Some(&old), &members, copies, BALANCED).unwrap();
            let moves = moves(&config, &old, &new);
            assert!(moves.iter().all(|(_, node)| usize::from(*node) == nodes), "{moves:?}");
            let share = 60 * usize::from(copies) / (nodes + 1);
            assert!((share..=share + 1).contains(&moves.len()), "{} of {share}", moves.len());
            // Its share is spread over the layers.
            let mut layers = [0; 6];
            moves.iter().for_each(|(key, _)| layers[usize::from(key.layer)] += 1);
            let (most, least) = (layers.iter().max().unwrap(), layers.iter().min().unwrap());
            assert!(most - least <= 3, "{layers:?}");
        }
    }
}

#[test]
fn what_a_lost_member_held_is_spread_and_the_rest_stays() {
    let config = tiny_model(6, 10);
    let mut members = some(&[10_000; 4]);
    for copies in [1, 2] {
        let old = plan(&config, &[10], None, &members, copies, BALANCED).unwrap();
        members[1] = None;
        let new = plan(&config, &[10], Some(&old), &members, copies, BALANCED).unwrap();
        let lost = counts(&config, &old, 4)[1] as usize;
        assert_eq!(moves(&config, &old, &new).len(), lost);
        let now = counts(&config, &new, 4);
        assert!(now[1] == 0 && [0, 2, 3].iter().all(|&n| now[n].abs_diff(now[0]) <= 1), "{now:?}");
        // It comes back before anybody moved: nothing moves.
        members[1] = Some(10_000);
        assert_eq!(plan(&config, &[10], Some(&old), &members, copies, BALANCED).unwrap(), old);
    }
}

#[test]
fn old_and_new_fit_together() {
    // One could take what the lost one held only if it gave up what it serves.
    let config = tiny_model(1, 4);
    let old = plan(&config, &[10], None, &some(&[20, 20]), 1, BALANCED).unwrap();
    let members = [Some(30), None, Some(10)];
    let new = plan(&config, &[10], Some(&old), &members, 1, BALANCED).unwrap();
    assert_eq!(counts(&config, &new, 3), [3, 0, 1]);
    // The first is full with what it serves; it would give something away, but takes nothing.
    let members = [Some(20), None, Some(100)];
    let new = plan(&config, &[10], Some(&old), &members, 1, BALANCED).unwrap();
    assert!(moves(&config, &old, &new).iter().all(|(_, node)| *node == 2));
}

#[test]
fn who_comes_back_with_less_room_keeps_what_fits() {
    let config = tiny_model(1, 8);
    let old = plan(&config, &[10], None, &some(&[80, 80]), 1, BALANCED).unwrap();
    let new = plan(&config, &[10], Some(&old), &[Some(15), Some(80)], 1, BALANCED).unwrap();
    assert_eq!(counts(&config, &new, 2), [1, 7]);
    assert!(moves(&config, &old, &new).iter().all(|(_, node)| *node == 1));
}

/// A model of several tiers of several groups.
fn random_model(random: &mut Draws) -> (ModelConfig, Vec<u64>) {
    let mut config = tiny_model(1 + random.below(4) as usize, 1 + random.below(9) as u32);
    let tiers = 1 + random.below(2);
    if let Some(moe) = &mut config.moe {
        let first = moe.tiers[0].clone();
        moe.tiers = (0..tiers)
            .map(|_| TierConfig { groups: 1 + random.below(3) as u32, ..first.clone() })
            .collect();
    }
    let bytes = (0..tiers).map(|_| 1 + random.below(20)).collect();
    (config, bytes)
}

/// Members come, go, come back with other budgets; plans follow plans.
#[test]
fn random_histories() {
    let (mut plans, mut refused) = (0, 0);
    for seed in 0..2000u64 {
        let mut random = Draws(seed);
        let (config, bytes) = random_model(&mut random);
        let each = |key: &ExpertKey| bytes[usize::from(key.tier)];
        let total: u64 = config.expert_keys().map(|key| each(&key)).sum();
        let copies = 1 + random.below(3) as u16;
        let mut members: Vec<Option<u64>> = Vec::new();
        let mut old: Option<Placement> = None;
        for _ in 0..6 {
            if members.len() < 6 && random.below(2) == 0 {
                members.push(None);
            }
            for _ in 0..=random.below(2) {
                if let Some(at) = random.next().checked_rem(members.len() as u64) {
                    let budget = total / 4 + random.below(total * 2);
                    let present = members[at as usize].is_some();
                    members[at as usize] = (!present || random.below(3) == 0).then_some(budget);
                }
            }
            let with =
                |old: Option<&Placement>| plan(&config, &bytes, old, &members, copies, BALANCED);
            let new = with(old.as_ref());
            assert_eq!(new, with(old.as_ref()), "seed {seed}: equal inputs, equal output");
            let Ok(new) = new else {
                refused += 1;
                let roomy = members.iter().flatten().any(|b| *b >= total);
                assert!(!roomy, "seed {seed}: one member could hold all");
                continue;
            };
            plans += 1;
            check(seed, &config, &bytes, old.as_ref(), &new, &members);
            // Repeated, it comes to rest, with even shares where there is room.
            let mut settled = new.clone();
            let mut steps = 0;
            loop {
                let next = with(Some(&settled)).unwrap();
                check(seed, &config, &bytes, Some(&settled), &next, &members);
                if next == settled {
                    break;
                }
                (settled, steps) = (next, steps + 1);
                assert!(steps < 20, "seed {seed}: it does not come to rest");
            }
            old = Some(if random.below(2) == 0 { new } else { settled });
        }
    }
    assert!(plans > 4000 && refused > 100, "{plans} plans, {refused} refused");
}

/// Every expert has a living holder; what is held and what is gained fit together.
fn check(
    seed: u64,
    config: &ModelConfig,
    bytes: &[u64],
    old: Option<&Placement>,
    new: &Placement,
    members: &[Option<u64>],
) {
    let living = |node: u16| members.get(usize::from(node)).is_some_and(Option::is_some);
    let held = new.held(bytes, members.len());
    let before = old.map(|old| old.held(bytes, members.len()));
    let mut union = before.clone().unwrap_or(vec![0; members.len()]);
    for key in config.expert_keys() {
        assert!(new.holders(key).iter().all(|node| living(*node)), "seed {seed}: a dead holder");
        for node in distinct(new.holders(key)) {
            if !old.is_some_and(|old| old.holds(node, key)) {
                union[usize::from(node)] += bytes[usize::from(key.tier)];
            }
        }
    }
    for (node, budget) in members.iter().enumerate() {
        let Some(budget) = *budget else { continue };
        assert!(
            held[node] <= budget,
            "seed {seed}: node {node} is given {} of {budget}",
            held[node]
        );
        // Who came back with less does not hold what it held.
        let shrunk = before.as_ref().is_some_and(|before| before[node] > budget);
        assert!(shrunk || union[node] <= budget, "seed {seed}: node {node} needs {}", union[node]);
    }
}

#[test]
fn firsts_are_even_after_losses_and_joins_too() {
    let config = tiny_model(6, 10);
    let mut members = some(&[10_000; 4]);
    let mut old = plan(&config, &[10], None, &members, 2, BALANCED).unwrap();
    for (node, budget) in [(1, None), (1, Some(10_000)), (0, None), (3, None), (0, Some(10_000))] {
        members[node] = budget;
        old = plan(&config, &[10], Some(&old), &members, 2, BALANCED).unwrap();
        let mut firsts = [0; 4];
        config.expert_keys().for_each(|key| firsts[usize::from(old.holders(key)[0])] += 1);
        let present = (0..4).filter(|&node| members[node].is_some());
        let counts: Vec<u64> = present.map(|node| firsts[node]).collect();
        let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
        assert!(most - least <= 1, "{counts:?}");
    }
}
