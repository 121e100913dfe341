//! Plans whose times were computed by hand.

use super::*;
use crate::{
    config::{RoutingConfig, Scoring},
    residency::replay::RowTime,
    tier::{TIER_1B, TierConfig},
};

const MIB: u64 = 1 << 20;

fn moe(experts: u32, active: u32) -> Arc<MoeConfig> {
    let routing = RoutingConfig {
        k_tier: 1,
        k_group: 1,
        k_expert: active,
        scoring: Scoring::SoftmaxTopK,
        renormalize: true,
        seed: 0,
    };
    let tiers = vec![TierConfig::new(TIER_1B, 1, experts, 0)];
    Arc::new(MoeConfig { routing, tiers, ..MoeConfig::without_experts() })
}

/// One layer of two experts of a MiB, which every token uses: a second for the dense part, a half for
/// an expert, three until a fetch begins and two until it ends.
fn plan(dram: u64) -> Plan {
    let moe = moe(2, 2);
    Plan {
        traces: Plan::uniform(&moe, 1, 64, 1).unwrap(),
        moe,
        layers: vec![0],
        expert_bytes: vec![MIB],
        dense_bytes: 5 * MIB,
        workers: 1,
        dram,
        nvme: None,
        source: Device { latency: 3.0, rate: MIB as f64 / 2.0 },
        source_kind: SourceKind::Disk,
        compute: Compute {
            dense: RowTime { first: 1.0, each: 0.25 },
            experts: vec![RowTime { first: 0.5, each: 0.25 }],
            together: None,
            network: 0.125,
        },
        prompt: 8,
        chunk: 4,
        streams: 1,
        tokens: 16,
    }
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-9 * expected.abs(), "{found}, expected {expected}");
}

#[test]
fn a_model_in_memory_is_as_fast_as_computing() {
    let plan = plan(2 * MIB);
    let now = plan.predict();
    near(now.tokens_per_second, 1.0 / 2.0);
    // Two chunks of four rows: a second of dense part, and a second of each expert.
    near(now.first_token, 2.0 * 3.0);
    assert_eq!((now.bound, now.tokens, now.decode.hit_rate()), (Bound::Compute, 12, 1.0));
    let places = Places { experts: 2 * MIB, dram: 2 * MIB, nvme: 0, dense: 5 * MIB };
    assert_eq!(now.places, places);
    // Memory of twice the bandwidth halves both. Another machine halves the experts' second, and
    // costs a round trip: 1 + 1/2 + 1/8.
    let next = plan.purchases(&now);
    let gains: Vec<_> = next.iter().map(|(what, then)| (*what, then.tokens_per_second)).collect();
    assert_eq!(gains.len(), 2, "{gains:?}");
    assert_eq!((gains[0].0, gains[1].0), (Purchase::Memory, Purchase::Worker));
    near(gains[0].1, 1.0);
    near(gains[1].1, 1.0 / 1.625);
}

#[test]
fn a_model_that_half_fits_waits_for_its_disk_and_wants_memory() {
    let mut plan = plan(MIB);
    let now = plan.predict();
    assert_eq!(now.decode.hit_rate(), 0.5);
    // The dense part, the expert that is here, the other's latency, transfer and computing.
    near(now.tokens_per_second, 1.0 / (1.0 + 0.5 + 3.0 + 2.0 + 0.5));
    assert_eq!(now.bound, Bound::Latency);
    assert_eq!(now.decode.source_bytes, 12 * MIB);
    let next = plan.purchases(&now);
    assert_eq!(next[0].0, Purchase::Dram(MIB));
    near(next[0].1.tokens_per_second, 0.5);
    // Another machine brings as much memory, and computes half of the experts, but is a whole one.
    let (last, then) = next.last().unwrap();
    assert_eq!(*last, Purchase::Worker);
    near(then.tokens_per_second, 1.0 / 1.625);
    assert!(next.iter().any(|(what, _)| *what == Purchase::Disk), "{next:?}");

    plan.source = Device { latency: 0.5, rate: MIB as f64 / 9.0 };
    assert_eq!(plan.predict().bound, Bound::Disk);
    plan.source_kind = SourceKind::Archive;
    let now = plan.predict();
    assert_eq!(now.bound, Bound::Archive);
    let next = plan.purchases(&now);
    assert!(next.iter().any(|(what, _)| *what == Purchase::Archive), "{next:?}");

    // A local disk that holds all keeps the archive idle.
    plan.nvme = Some((2 * MIB, Device { latency: 0.0, rate: MIB as f64 }));
    let now = plan.predict();
    near(now.tokens_per_second, 1.0 / (1.0 + 0.5 + 1.0 + 0.5));
    assert_eq!((now.decode.source_bytes, now.places.nvme), (0, 2 * MIB));
}

#[test]
fn with_uniform_routing_the_hit_rate_is_the_share_that_fits_and_more_memory_never_hurts() {
    let moe = moe(16, 2);
    let mut before = 0.0;
    for room in [4u64, 8, 12, 16] {
        let plan = Plan {
            traces: Plan::uniform(&moe, 3, 1000, 1).unwrap(),
            moe: moe.clone(),
            layers: vec![0, 2, 5],
            dram: 3 * room * MIB,
            tokens: 900,
            ..plan(0)
        };
        let now = plan.predict();
        let (rate, share) = (now.decode.hit_rate(), room as f64 / 16.0);
        assert!((rate - share).abs() < 0.05, "{rate} of {share}");
        assert!(now.tokens_per_second > before, "{room}: {}", now.tokens_per_second);
        before = now.tokens_per_second;
    }
}

#[test]
fn streams_share_what_they_wait_for() {
    let plan = plan(MIB);
    let alone = plan.predict();
    let four =
        Plan { streams: 4, traces: Plan::uniform(&plan.moe, 1, 64, 4).unwrap(), ..plan }.predict();
    // Four rows: a second of dense part, a second of each expert, one fetch.
    near(four.tokens_per_second, 4.0 / (1.0 + 1.0 + 5.0 + 1.0));
    assert!(four.tokens_per_second > 3.0 * alone.tokens_per_second);
    assert_eq!(four.tokens, 48);
}
