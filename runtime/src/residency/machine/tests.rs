//! The machine through its events and commands: one thing at a time, and random schedules of all.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{early::TRIAL_AGAIN, *};
use crate::{
    config::{RoutingConfig, Scoring},
    random::{Purpose, random_u64},
    residency::policy::{Ageing, Foresight, Lru, Shape},
    tier::{Residence, TIER_1B, TIER_10B, TierConfig},
};

const EXPERT: u64 = 10;

fn key(layer: u16, expert: u32) -> ExpertKey {
    ExpertKey { layer, tier: 0, group: 0, expert }
}

/// Two tiers of one group of 64 experts.
fn moe() -> MoeConfig {
    let tier = |id, placement| TierConfig { placement, ..TierConfig::new(id, 1, 64, 0) };
    MoeConfig {
        tiers: vec![tier(TIER_1B, Residence::Dram), tier(TIER_10B, Residence::Nvme)],
        routing: RoutingConfig {
            k_tier: 1,
            k_group: 1,
            k_expert: 2,
            scoring: Scoring::SoftmaxTopK,
            renormalize: true,
            seed: 0,
        },
        ..MoeConfig::without_experts()
    }
}

fn level(budget: u64, layers: u16, experts: u32) -> Residency {
    let policy = Box::new(Lru::new(Shape::new(usize::from(layers), &moe())));
    level_with(budget, layers, experts, policy)
}

fn level_with(budget: u64, layers: u16, experts: u32, policy: Box<dyn Policy>) -> Residency {
    let expert_bytes = vec![EXPERT, 3 * EXPERT];
    let moe = Arc::new(moe());
    let mut level =
        Residency::new(ResidencyOptions { moe, budget, expert_bytes, policy, prefetch: true });
    let all = (0..layers).flat_map(|l| (0..experts).map(move |e| key(l, e)));
    level.handle(Event::Keep(all.collect()));
    level
}

/// A sequence's next token is routed.
fn route(level: &mut Residency, layer: u16, experts: &[u32]) {
    let experts = experts.iter().map(|&e| key(layer, e)).collect();
    let row = RoutedRow { stream: 1, last: [0; 3], experts, near: Vec::new() };
    level.handle(Event::Routed { layer, rows: vec![row] });
}

fn commands(level: &mut Residency) -> Vec<Command> {
    std::iter::from_fn(|| level.poll_command()).collect()
}

fn demand(level: &mut Residency, layer: u16, experts: &[u32]) -> Vec<Command> {
    let wanted = experts.iter().map(|&e| (key(layer, e), 1)).collect();
    level.handle(Event::Demand(wanted));
    commands(level)
}

/// Demands, lets everything arrive, and uses it.
fn serve(level: &mut Residency, layer: u16, experts: &[u32]) -> Vec<Command> {
    route(level, layer, experts);
    let mut all = demand(level, layer, experts);
    let mut at = 0;
    while at < all.len() {
        match all[at] {
            Command::Fetch(key, _) => level.handle(Event::Arrived(key)),
            Command::Ready(key) => level.handle(Event::Used(vec![key])),
            _ => {}
        }
        all.extend(commands(level));
        at += 1;
    }
    all
}

fn fetches(commands: &[Command]) -> Vec<u32> {
    let fetched = commands.iter().filter_map(|command| match command {
        Command::Fetch(key, _) => Some(key.expert),
        _ => None,
    });
    fetched.collect()
}

#[test]
fn what_is_here_is_ready_at_once_and_what_is_pinned_stays() {
    let mut level = level(3 * EXPERT, 1, 8);
    assert_eq!(fetches(&serve(&mut level, 0, &[0, 1, 2])), [0, 1, 2]);
    assert_eq!(demand(&mut level, 0, &[1]), [Command::Ready(key(0, 1))]);
    // 1 is pinned: the others go, the least recently used first; of one token's, the worst ranked.
    let all = demand(&mut level, 0, &[3]);
    assert_eq!(all, [Command::Evict(key(0, 2)), Command::Fetch(key(0, 3), Urgency::Demand)]);
    let all = demand(&mut level, 0, &[4]);
    assert_eq!(all, [Command::Evict(key(0, 0)), Command::Fetch(key(0, 4), Urgency::Demand)]);
    assert_eq!(demand(&mut level, 0, &[5]), [], "there is no room before something was used");
    level.handle(Event::Used(vec![key(0, 1)]));
    let all = commands(&mut level);
    assert_eq!(all, [Command::Evict(key(0, 1)), Command::Fetch(key(0, 5), Urgency::Demand)]);
}

#[test]
fn two_demands_of_one_expert_are_one_fetch() {
    let mut level = level(3 * EXPERT, 1, 8);
    assert_eq!(fetches(&demand(&mut level, 0, &[0])), [0]);
    assert_eq!(demand(&mut level, 0, &[0]), []);
    level.handle(Event::Arrived(key(0, 0)));
    assert_eq!(commands(&mut level), [Command::Ready(key(0, 0))]);
}

#[test]
fn a_demand_that_a_layer_cannot_hold_goes_around_it() {
    let lru = || -> Box<dyn Policy> { Box::new(Lru::new(Shape::new(2, &moe()))) };
    for policy in [lru(), Box::new(Blind)] {
        let mut level = level_with(16 * EXPERT, 2, 64, policy);
        let own: Vec<u32> = (0..8).collect();
        for layer in 0..2 {
            serve(&mut level, layer, &own);
        }
        let before = level.counters();
        let all: Vec<u32> = (0..64).collect();
        serve(&mut level, 0, &all);
        let after = level.counters();
        assert_eq!((after.hits - before.hits, after.misses - before.misses), (8, 56));
        // Two slots were passed through: at most two of what was here had to go.
        let mut kept = 0;
        for layer in [1, 0] {
            let ready = demand(&mut level, layer, &own);
            kept += ready.iter().filter(|command| matches!(command, Command::Ready(_))).count();
            level.handle(Event::Used(own.iter().map(|&e| key(layer, e)).collect()));
        }
        assert!(kept >= 14, "{kept} of 16 are left");
    }
}

#[test]
fn predictions_are_fetched_behind_demands_promoted_and_cancelled() {
    let mut level = level(64 * EXPERT, 2, 32);
    serve(&mut level, 0, &[0]);
    level.handle(Event::Predicted(vec![key(1, 3), key(1, 4)]));
    let all = commands(&mut level);
    let prefetch = |e| Command::Fetch(key(1, e), Urgency::Prefetch);
    assert_eq!(all, [prefetch(3), prefetch(4)]);
    let all = demand(&mut level, 1, &[3]);
    assert_eq!(all, [Command::Cancel(key(1, 4)), Command::Promote(key(1, 3))]);
    level.handle(Event::Cancelled(key(1, 4)));
    level.handle(Event::Arrived(key(1, 3)));
    assert_eq!(commands(&mut level), [Command::Ready(key(1, 3))]);
    let counters = level.counters();
    assert_eq!((counters.prefetches_used, counters.prefetches_in_vain), (1, 1));
    assert_eq!(level.held_bytes(), 2 * EXPERT);
}

/// Predicts, and lets everything arrive.
fn predict(level: &mut Residency, layer: u16, experts: &[u32]) -> Vec<u32> {
    level.handle(Event::Predicted(experts.iter().map(|&e| key(layer, e)).collect()));
    let all = commands(level);
    let mut arrived = Vec::new();
    for command in &all {
        if let Command::Fetch(key, Urgency::Prefetch) = command {
            level.handle(Event::Arrived(*key));
            arrived.push(key.expert);
        }
    }
    assert_eq!(commands(level), []);
    arrived
}

/// Thinks nothing of any expert.
#[derive(Debug)]
struct Blind;

impl Policy for Blind {
    fn used(&mut self, _layer: usize, _row: &Row<'_>) {}
    fn value(&self, _layer: usize, _expert: u32) -> f32 {
        0.0
    }
    fn bytes(&self) -> usize {
        0
    }
}

#[test]
fn a_gate_that_is_wrong_is_soon_trusted_no_more_and_one_that_is_right_is() {
    // One place of its list is right, the other wrong.
    for right in [0, 1] {
        let mut level = level_with(16 * EXPERT, 1, 64, Box::new(Blind));
        let (mut used, mut wrong) = (0, 0);
        for round in 0..200 {
            // What is wrong goes soon: of equal value, it is the first.
            let next = 14 + round * 11 % 49;
            let mut named = [next, round % 14];
            named.rotate_left(right);
            let fetched = predict(&mut level, 0, &named);
            if round >= 100 {
                used += fetched.iter().filter(|&&e| e >= 14).count();
                wrong += fetched.iter().filter(|&&e| e < 14).count();
            }
            serve(&mut level, 0, &[next, next + 1]);
        }
        assert!(used > 50 && wrong == 0, "{used} and {wrong}");
    }
}

/// The predicted expert is used by every other token; what goes for it, by all.
#[test]
fn predictions_that_cost_more_than_they_bring_are_not_followed_for_a_while() {
    let mut level = level_with(8 * EXPERT, 1, 64, Box::new(Blind));
    let round = |level: &mut Residency, round: u32| {
        let predicted = 20 + round % 40;
        let fetched = predict(level, 0, &[predicted]).len();
        let used = if round.is_multiple_of(2) { predicted } else { 7 };
        serve(level, 0, &[0, 1, 2, 3, 4, 5, 6, used]);
        fetched
    };
    let mut rounds = 0;
    while level.follows_predictions() {
        round(&mut level, rounds);
        rounds += 1;
        assert!(rounds < 1000, "{:?}", level.counters());
    }
    assert!(level.counters().prefetches_used > 10, "the gate was right: {:?}", level.counters());
    assert_eq!(round(&mut level, rounds), 0);
    let mut again = 0;
    for _ in 0..TRIAL_AGAIN + 600 {
        rounds += 1;
        again += round(&mut level, rounds);
    }
    assert!(again > 400, "{again} when it was tried again");
}

/// A layer uses four of its eight usual experts by turns, and two by one token each. There is room
/// for all the usual ones and for two more.
#[test]
fn what_was_fetched_for_one_token_goes_first_if_it_is_worth_least() {
    let shape = Shape::new(4, &moe());
    let ageing: Box<dyn Policy> = Box::new(Ageing::new(shape));
    let ours = Foresight::within(shape, 4 << 20).unwrap();
    for policy in [ageing, Box::new(ours)] {
        let mut level = level_with(34 * EXPERT, 4, 64, policy);
        let mut before = Counters::default();
        for token in 0..400 {
            if token == 200 {
                before = level.counters();
            }
            for layer in 0..4 {
                let (usual, once) = (4 * (token % 2), 8 + token * 2 % 56);
                let usual = [usual, usual + 1, usual + 2, usual + 3];
                serve(&mut level, layer, &[&usual[..], &[once, once + 1]].concat());
            }
        }
        let hits = level.counters().hits - before.hits;
        assert!(hits >= 200 * 4 * 4 * 99 / 100, "{hits} of {}", 200 * 4 * 4);
    }
}

/// Counts what it hears.
#[derive(Debug, Default)]
struct Listener(Arc<Heard>);

#[derive(Debug, Default)]
struct Heard {
    rows: [AtomicU32; 2],
    /// The first row of either sequence, by its token.
    first: [AtomicU32; 2],
    passed: AtomicU32,
    ended: AtomicU32,
}

impl Policy for Listener {
    fn used(&mut self, layer: usize, row: &Row<'_>) {
        assert_eq!((layer, row.experts, row.near), (2, &[70, 3][..], &[3][..]));
        let stream = row.stream as usize;
        if self.0.rows[stream].fetch_add(1, Relaxed) == 0 {
            self.0.first[stream].store(row.last[0], Relaxed);
        }
    }
    fn passed(&mut self, layer: usize) {
        self.0.passed.fetch_add(layer as u32, Relaxed);
    }
    fn ended(&mut self, stream: u64) {
        self.0.ended.store(stream as u32, Relaxed);
    }
    fn value(&self, _layer: usize, _expert: u32) -> f32 {
        0.0
    }
    fn bytes(&self) -> usize {
        0
    }
}

#[test]
fn the_policy_hears_the_last_rows_of_each_sequence_by_flat_index_and_who_ended() {
    let heard = Arc::<Heard>::default();
    let mut level = level_with(8 * EXPERT, 1, 8, Box::new(Listener(heard.clone())));
    // Sparse layers may be numbered with gaps; layer 0 was served before.
    level.handle(Event::Keep([key(3, 0), key(7, 1)].into()));
    let rows = (0..200u32).map(|n| RoutedRow {
        stream: u64::from(n < 150),
        last: [n, 0, 0],
        experts: vec![ExpertKey { tier: 1, ..key(7, 6) }, key(7, 3)],
        near: vec![key(7, 3), key(7, 64)],
    });
    level.handle(Event::Routed { layer: 7, rows: rows.collect() });
    level.handle(Event::Routed { layer: 5, rows: Vec::new() });
    level.handle(Event::Ended(9));
    let loads = |counts: &[AtomicU32; 2]| [counts[0].load(Relaxed), counts[1].load(Relaxed)];
    assert_eq!(loads(&heard.rows), [32, 32]);
    assert_eq!(loads(&heard.first), [200 - 32, 150 - 32]);
    assert_eq!((heard.passed.load(Relaxed), heard.ended.load(Relaxed)), (2, 9));
}

#[test]
fn a_tier_that_would_rather_be_elsewhere_goes_before_one_that_would_be_here() {
    let elsewhere = |e| ExpertKey { tier: 1, ..key(0, e) };
    for (first, second) in [(elsewhere(0), key(0, 1)), (key(0, 1), elsewhere(0))] {
        let mut level = level_with(4 * EXPERT, 1, 8, Box::new(Blind));
        level.handle(Event::Keep([first, second, key(0, 2)].into()));
        for used in [first, second] {
            level.handle(Event::Demand(vec![(used, 1)]));
            level.handle(Event::Arrived(used));
            level.handle(Event::Used(vec![used]));
        }
        commands(&mut level);
        let all = demand(&mut level, 0, &[2]);
        assert_eq!(all.first(), Some(&Command::Evict(elsewhere(0))));
    }
}

/// Three sequences side by side use more than a layer's share, the same again and again.
#[test]
fn what_passes_through_stays_if_it_is_worth_more_than_what_stayed() {
    let mut level = level(16 * EXPERT, 2, 64);
    for layer in 0..2 {
        serve(&mut level, layer, &(40..48).collect::<Vec<_>>());
    }
    let all: Vec<u32> = (0..10).collect();
    (0..20).for_each(|_| drop(serve(&mut level, 0, &all)));
    let before = level.counters().hits;
    serve(&mut level, 0, &all);
    let kept = level.counters().hits - before;
    assert!(kept >= 7, "{kept} of 10 are here at once");
}

#[test]
fn what_is_served_no_more_goes_and_is_refused() {
    let mut level = level(2 * EXPERT, 1, 8);
    serve(&mut level, 0, &[0]);
    demand(&mut level, 0, &[1, 0, 2]);
    level.handle(Event::Keep([key(0, 1)].into()));
    let all = commands(&mut level);
    assert!(matches!(&all[..], [Command::Refuse(refused, _)] if *refused == key(0, 2)), "{all:?}");
    level.handle(Event::Used(vec![key(0, 0)]));
    assert_eq!(commands(&mut level), [Command::Evict(key(0, 0))]);
    level.handle(Event::Demand(vec![(key(0, 7), 1)]));
    assert!(matches!(commands(&mut level)[..], [Command::Refuse(..)]));
}

/// What the machine adds up as it goes is what its entries add up to.
fn check_sums(level: &Residency) {
    let sum = |test: &dyn Fn(&ExpertKey, &Entry) -> bool| -> u64 {
        let all = level.entries.iter().filter(|(key, entry)| test(key, entry));
        all.map(|(key, _)| level.bytes(*key)).sum()
    };
    let takes = |entry: &Entry| entry.state != State::Waiting;
    let fetching = |entry: &Entry| matches!(entry.state, State::Fetching { .. });
    assert_eq!(level.held, sum(&|_, entry| takes(entry)));
    assert_eq!(level.passing, sum(&|_, entry| takes(entry) && entry.passing));
    assert_eq!(level.predicted, sum(&|_, entry| fetching(entry) && entry.early != Early::No));
    assert_eq!(level.fetching, level.entries.values().filter(|entry| fetching(entry)).count());
    for layer in &level.layers {
        let of = |key: &ExpertKey, entry: &Entry| key.layer == layer.number && takes(entry);
        assert_eq!(layer.held, sum(&of));
        assert_eq!(layer.passing, sum(&|key, entry| of(key, entry) && entry.passing));
    }
}

/// Random schedules against what the machine's text promises.
#[test]
fn random_schedules() {
    let schedules: u64 = std::env::var("LITE_LLM_SCHEDULES")
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(3000);
    let mut seen = Counters::default();
    for seed in 0..schedules {
        let mut draws = seed;
        let mut below = |n: u64| {
            draws = random_u64(draws, Purpose::Placement, 0);
            draws % n.max(1)
        };
        let (layers, experts) = (1 + below(3) as u16, 2 + below(10) as u32);
        let budget = (3 + below(20)) * EXPERT;
        let sized =
            |l: u16, e: u32| ExpertKey { tier: u16::from(e.is_multiple_of(5)), ..key(l, e) };
        let all: Vec<ExpertKey> =
            (0..layers).flat_map(|l| (0..experts).map(move |e| sized(l, e))).collect();
        let shape = Shape::new(usize::from(layers), &moe());
        let policy: Box<dyn Policy> = match seed % 8 {
            0 => Box::new(Foresight::within(shape, 256 << 10).unwrap()),
            1..4 => Box::new(Ageing::new(shape)),
            _ => Box::new(Lru::new(shape)),
        };
        let mut level = level_with(budget, layers, 1, policy);
        level.handle(Event::Keep(all.iter().copied().collect()));
        // What a lane would know: who is pinned and ready, who waits, which fetches run.
        let (mut ready, mut waits) = (BTreeSet::new(), BTreeSet::new());
        let (mut fetching, mut here) = (BTreeMap::new(), BTreeSet::new());
        let mut loads = BTreeSet::new();
        let steps = 40 + below(60);
        for step in 0..steps + 2000 {
            let ending = step >= steps;
            if ending && waits.is_empty() && ready.is_empty() && fetching.is_empty() {
                break;
            }
            assert!(step < steps + 1999, "seed {seed}: {waits:?} wait for ever");
            match below(if ending { 4 } else { 8 }) {
                0 | 1 if !fetching.is_empty() => {
                    let at = below(fetching.len() as u64) as usize;
                    let (&key, &cancelling) = fetching.iter().nth(at).unwrap();
                    fetching.remove(&key);
                    match below(6) {
                        0 if !ending => level.handle(Event::Failed(key, "broken".into())),
                        1 if cancelling => level.handle(Event::Cancelled(key)),
                        _ => {
                            here.insert(key);
                            level.handle(Event::Arrived(key));
                        }
                    }
                }
                2 | 3 => {
                    let some: Vec<ExpertKey> =
                        ready.iter().copied().filter(|_| below(3) > 0 || ending).collect();
                    ready.retain(|key| !some.contains(key));
                    level.handle(Event::Used(some));
                }
                4 | 5 => {
                    let layer = below(u64::from(layers)) as u16;
                    let wanted: BTreeSet<ExpertKey> = (0..1 + below(6))
                        .map(|_| sized(layer, below(u64::from(experts)) as u32))
                        .collect();
                    waits.extend(wanted.iter().copied());
                    let experts: Vec<ExpertKey> = wanted.iter().copied().collect();
                    let (stream, near) = (below(3), experts.clone());
                    let row = RoutedRow { stream, last: [below(4) as u32; 3], experts, near };
                    level.handle(Event::Routed { layer, rows: vec![row] });
                    if below(8) == 0 {
                        level.handle(Event::Ended(stream));
                    }
                    level.handle(Event::Demand(wanted.into_iter().map(|key| (key, 1)).collect()));
                }
                6 => {
                    let layer = below(u64::from(layers)) as u16;
                    let keys =
                        (0..below(4)).map(|_| sized(layer, below(u64::from(experts)) as u32));
                    let keys: Vec<ExpertKey> = keys.collect();
                    level.handle(Event::Predicted(keys));
                }
                7 if below(4) == 0 => {
                    let kept = all.iter().copied().filter(|_| below(8) > 0);
                    let kept: BTreeSet<ExpertKey> = kept.collect();
                    level.handle(Event::Keep(kept));
                }
                7 => {
                    let key = all[below(all.len() as u64) as usize];
                    loads.insert(key);
                    level.handle(Event::Load(key));
                }
                _ => {}
            }
            for command in commands(&mut level) {
                match command {
                    Command::Fetch(key, _) => {
                        let twice = fetching.insert(key, false).is_some() || here.contains(&key);
                        assert!(!twice, "seed {seed}: {key} is fetched twice");
                    }
                    Command::Promote(key) => assert!(fetching.contains_key(&key), "seed {seed}"),
                    Command::Cancel(key) => {
                        let known = fetching.get_mut(&key).map(|cancelling| *cancelling = true);
                        assert!(known.is_some(), "seed {seed}: {key} is not on its way");
                    }
                    Command::Evict(key) => {
                        assert!(!ready.contains(&key), "seed {seed}: {key} is in use");
                        assert!(here.remove(&key), "seed {seed}: {key} is not here");
                    }
                    Command::Ready(key) => {
                        assert!(here.contains(&key), "seed {seed}: {key} is not here");
                        // Who demanded it may have taken that back.
                        if waits.remove(&key) {
                            ready.insert(key);
                        }
                    }
                    Command::Refuse(key, _) => {
                        waits.remove(&key);
                    }
                    Command::Loaded(key) => drop(loads.remove(&key)),
                }
            }
            let bytes = |key: &ExpertKey| level.bytes(*key);
            let held: u64 = here.iter().chain(fetching.keys()).map(bytes).sum();
            assert!(held <= budget, "seed {seed}: {held} of {budget}");
            assert_eq!(held, level.held_bytes(), "seed {seed}");
            check_sums(&level);
        }
        assert!(loads.is_empty(), "seed {seed}: {loads:?} were never said to be loaded");
        let counters = level.counters();
        seen.hits += counters.hits;
        seen.evictions += counters.evictions;
        seen.prefetches_used += counters.prefetches_used;
    }
    assert!(seen.hits > schedules && seen.evictions > schedules && seen.prefetches_used > 100);
}

#[test]
fn equal_events_give_equal_commands() {
    let run = || {
        let mut level = level(6 * EXPERT, 2, 16);
        let mut all = Vec::new();
        for round in 0..40u32 {
            all.extend(serve(&mut level, (round % 2) as u16, &[round % 16, (round * 7) % 16]));
            level.handle(Event::Predicted(vec![key((round % 2) as u16, (round * 5) % 16)]));
            all.extend(commands(&mut level));
        }
        all
    };
    assert_eq!(run(), run());
}
