//! Plans whose times were computed by hand.

use super::{
    gpu::{Below, GpuBound, GpuPlan, Gpus},
    *,
};
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

/// OLMoE-1B-7B in bf16 on one H100, in round numbers: 16 layers of 64 experts of 12.6 MB of which a token
/// uses 8, 740 MB of dense weights, keys and values of 131,072 bytes a position.
fn olmoe_on(gpus: Gpus) -> GpuPlan {
    GpuPlan {
        gpus,
        experts_hbm: None,
        kv: 4_000_000_000,
        moe: moe(64, 8),
        layers: 16,
        expert_bytes: vec![12_600_000],
        dense_bytes: 740_000_000,
        position_bytes: 131_072,
        context: 0,
        dram: u64::MAX,
        nvme: None,
        source: 1e9,
    }
}

const H100: Gpus = Gpus { count: 1, hbm: 80_000_000_000, rate: 2.985e12, copy: 53e9 };

#[test]
fn a_gpu_that_holds_all_is_bound_by_the_bytes_that_it_reads() {
    let mut plan = olmoe_on(H100);
    // (80 − 4 − 0.74) · 11/12 GB have room for all 12.9024.
    assert_eq!((plan.room(), plan.resident()), (Some(68_988_333_334), 12_902_400_000));
    // One token: 8 of 64 experts in 16 layers.
    let one = plan.step(1);
    near(one.experts, 1_612_800_000.0);
    near(one.seconds, (0.74e9 + 1.6128e9) / 2.985e12);
    near(one.tokens_per_second(), 2.985e12 / 2.3528e9);
    // Eight: 64 · (1 − (7/8)^8) experts of a layer.
    let touched = 1.0 - 0.875f64.powf(8.0);
    near(plan.step(8).seconds, (0.74e9 + 12.9024e9 * touched) / 2.985e12);
    // With keys and values of 512 positions, 64 sequences read 4.3 GB more.
    plan.context = 512;
    let many = plan.step(64);
    assert_eq!(many.kv, 64.0 * 512.0 * 131_072.0);
    let read = 0.74e9 + 12.9024e9 * (1.0 - 0.875f64.powf(64.0)) + 4_294_967_296.0;
    near(many.read, read);
    near(many.tokens_per_second(), 64.0 * 2.985e12 / read);
    assert_eq!((many.bound, many.copied, many.fetched), (GpuBound::Hbm, 0.0, 0.0));
}

#[test]
fn experts_that_hbm_lacks_are_bound_by_the_link_and_those_that_dram_lacks_by_the_disk() {
    let mut plan = olmoe_on(H100);
    plan.experts_hbm = Some(12_902_400_000 / 4);
    // A quarter is here; three quarters of 1.6128 GB are copied at 53 GB/s.
    let one = plan.step(1);
    near(one.copied, 1_209_600_000.0);
    near(one.tokens_per_second(), 53e9 / 1_209_600_000.0);
    assert_eq!((one.bound, one.fetched), (GpuBound::Copy, 0.0));
    // DRAM for a half: the rest comes from a source of 1 GB/s.
    plan.dram = 12_902_400_000 / 2;
    let one = plan.step(1);
    near(one.fetched, 806_400_000.0);
    near(one.seconds, 0.8064);
    assert_eq!(one.bound, GpuBound::Source);
    // A disk for three quarters: a quarter of 1.6128 GB from each, the disk half as fast.
    plan.nvme = Some(Below { holds: 12_902_400_000 / 4 * 3, rate: 0.5e9 });
    let one = plan.step(1);
    near(one.seconds, 0.8064);
    assert_eq!(one.bound, GpuBound::Disk);
    // More than there is room for, and a GPU without room for the dense part.
    plan.experts_hbm = Some(76_000_000_000);
    assert_eq!((plan.room(), plan.resident()), (None, 0));
    plan.gpus.hbm = 4_000_000_000;
    assert_eq!(plan.room(), None);
}

#[test]
fn two_gpus_share_experts_and_sequences_but_not_the_dense_part() {
    let one = olmoe_on(H100);
    let two = GpuPlan { gpus: Gpus { count: 2, ..H100 }, ..one.clone() };
    let experts = 12.9024e9 * (1.0 - 0.875f64.powf(64.0));
    near(two.step(64).seconds, (0.74e9 + experts / 2.0) / 2.985e12);
    // A single sequence has its keys and values on one of them.
    let long = GpuPlan { context: 1000, ..two };
    near(long.step(1).seconds, (0.74e9 + 0.8064e9 + 131_072_000.0) / 2.985e12);
    assert!(long.step(64).tokens_per_second() > one.step(64).tokens_per_second());
}
