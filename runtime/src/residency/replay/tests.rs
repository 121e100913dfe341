//! Cases whose times were computed by hand.

use super::*;
use crate::{
    config::{RoutingConfig, Scoring},
    residency::policy::{Lru, Shape},
    tier::{TIER_1B, TierConfig},
};

const BYTES: u64 = 1000;

/// Every token is routed to all experts.
fn moe(experts: u32) -> MoeConfig {
    let routing = RoutingConfig {
        k_tier: 1,
        k_group: 1,
        k_expert: experts,
        scoring: Scoring::SoftmaxTopK,
        renormalize: true,
        seed: 0,
    };
    let tiers = vec![TierConfig::new(TIER_1B, 1, experts, 0)];
    MoeConfig { routing, tiers, ..MoeConfig::without_experts() }
}

fn seconds(first: f64) -> RowTime {
    RowTime { first, each: first / 4.0 }
}

/// An expert takes two seconds to be transferred, after three.
const DISK: Device = Device { latency: 3.0, rate: 500.0 };

struct Setup {
    experts: u32,
    layers: u16,
    /// Experts that have room in memory, and on a local disk.
    dram: u64,
    nvme: Option<(u64, Device)>,
    workers: usize,
    expert: f64,
}

impl Setup {
    fn start(&self) -> (Replay, Trace) {
        let moe = moe(self.experts);
        let shape = Shape::new(self.layers.into(), &moe);
        let lru = || Box::new(Lru::new(shape));
        let place = || Place {
            dram: (self.dram * BYTES, lru()),
            nvme: self.nvme.map(|(room, disk)| (room * BYTES, lru() as Box<dyn Policy>, disk)),
            source: DISK,
        };
        let trace = Trace::uniform(self.layers.into(), &moe, 16, 0).unwrap();
        let replay = Replay::new(ReplayOptions {
            layers: (0..self.layers).collect(),
            moe: Arc::new(moe),
            expert_bytes: vec![BYTES],
            workers: (0..self.workers).map(|_| place()).collect(),
            compute: Compute {
                dense: seconds(1.0),
                experts: vec![seconds(self.expert)],
                together: None,
                network: 0.25,
            },
            early: true,
        });
        (replay, trace)
    }
}

const SETUP: Setup = Setup { experts: 2, layers: 1, dram: 2, nvme: None, workers: 1, expert: 0.5 };

fn decode(replay: &mut Replay, trace: &Trace, tokens: usize) {
    (0..tokens).for_each(|token| replay.pass(&[RowAt { stream: 1, trace, token }], 1));
}

/// Every second is counted, and counted once.
fn check(tally: &Tally) {
    let Tally { seconds, dense, experts, nvme, source, latency, network, .. } = tally;
    let sum = dense + experts + nvme + source + latency + network;
    assert!((sum - seconds).abs() < 1e-9, "{tally:?}");
}

#[test]
fn what_is_all_in_memory_takes_the_time_of_computing() {
    let (mut replay, trace) = Setup { layers: 2, dram: 4, ..SETUP }.start();
    replay.fill();
    decode(&mut replay, &trace, 3);
    let tally = replay.tally();
    check(tally);
    // Three tokens, two layers: one second, and twice a half.
    assert_eq!((tally.seconds, tally.dense, tally.experts), (12.0, 6.0, 6.0));
    assert_eq!((tally.hit_rate(), tally.source_bytes), (1.0, 0));
    assert_eq!((&tally.demands[..], tally.demanded_bytes), (&[6, 6][..], 12_000));
}

#[test]
fn a_layer_takes_the_latency_and_what_is_longer_transfers_or_computing() {
    let (mut replay, trace) = SETUP.start();
    decode(&mut replay, &trace, 1);
    let tally = replay.tally();
    check(tally);
    // Asked for at 1; the first moves from 4 to 6 and is computed until 6.5, the other moves from 6
    // to 8.
    assert_eq!((tally.seconds, tally.source, tally.latency), (8.5, 3.5, 3.0));
    assert_eq!((tally.hits[0], tally.source_bytes), (0, 2000));

    let (mut replay, trace) = Setup { expert: 5.0, ..SETUP }.start();
    decode(&mut replay, &trace, 1);
    let tally = replay.tally();
    check(tally);
    // The first is computed from 6 to 11; the other is here by then.
    assert_eq!((tally.seconds, tally.source, tally.latency), (16.0, 2.0, 3.0));
}

#[test]
fn what_is_here_is_computed_while_the_others_come() {
    // A slot for one of two: the other goes around it, token after token.
    let (mut replay, trace) = Setup { dram: 1, expert: 4.0, ..SETUP }.start();
    replay.fill();
    decode(&mut replay, &trace, 1);
    let tally = replay.tally();
    check(tally);
    assert_eq!((tally.hits[0], tally.demands[0]), (1, 2));
    // There is no room for the other before the first was used, at 5: it moves from 8 to 10.
    assert_eq!((tally.seconds, tally.source, tally.latency), (14.0, 2.0, 3.0));
}

#[test]
fn a_local_disk_serves_what_it_keeps() {
    let fast = Device { latency: 0.5, rate: 1000.0 };
    let (mut replay, trace) = Setup { nvme: Some((2, fast)), dram: 1, ..SETUP }.start();
    replay.fill();
    decode(&mut replay, &trace, 1);
    let tally = replay.tally();
    check(tally);
    // One is here and computed until 1.5; the other moves from 2 to 3.
    assert_eq!((tally.seconds, tally.nvme, tally.latency), (3.5, 1.0, 0.5));
    assert_eq!((tally.nvme_bytes, tally.source_bytes), (1000, 0));

    // A disk that was empty: what it lacks comes from the source, once.
    let (mut replay, trace) = Setup { nvme: Some((2, fast)), dram: 1, ..SETUP }.start();
    decode(&mut replay, &trace, 4);
    check(replay.tally());
    assert_eq!(replay.tally().source_bytes, 2000);
    assert!(replay.tally().nvme_bytes > 0);
}

#[test]
fn workers_share_a_layer_and_wait_for_the_network() {
    let (mut replay, trace) = Setup { layers: 3, dram: 3, workers: 2, ..SETUP }.start();
    replay.fill();
    decode(&mut replay, &trace, 2);
    let tally = replay.tally();
    check(tally);
    // Each has one expert of each layer.
    assert_eq!((tally.seconds, tally.network), (6.0 * (1.0 + 0.5 + 0.25), 1.5));
    assert_eq!(tally.hit_rate(), 1.0);
}

#[test]
fn rows_of_a_pass_share_an_expert() {
    let (mut replay, trace) = SETUP.start();
    replay.fill();
    let rows: Vec<RowAt<'_>> =
        (0..8).map(|token| RowAt { stream: 1, trace: &trace, token }).collect();
    replay.pass(&rows, 8);
    let tally = replay.tally();
    check(tally);
    // Eight rows take twice as long as one: four of them are as many as reading the weights hides.
    assert_eq!((tally.dense, tally.experts), (2.0, 2.0 * 1.0 + 0.0 * tally.source));
    let first = tally.clone();
    decode(&mut replay, &trace, 1);
    let since = replay.tally() - &first;
    check(&since);
    assert_eq!(since.demands, [2]);
}
