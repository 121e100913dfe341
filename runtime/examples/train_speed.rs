//! Scratch: speed of a training step. `train_speed manpages|mini BATCHxTOKENS STEPS THREADS`
use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    config::*,
    tier::{TIER_1B, TierConfig, TierMask},
    train::{
        Recompute,
        balance::BalanceWeights,
        batch::{Batch, Row},
        optimizer::AdamW,
        params::Params,
        step::{self, Objective, StepOptions},
        trained::Trained,
        trainer::Trainer,
    },
};
use std::{sync::Arc, time::Instant};
fn rss() -> u64 {
    let s = std::fs::read_to_string("/proc/self/status").unwrap();
    s.lines()
        .find(|l| l.starts_with("VmHWM"))
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}
fn stat() -> [u64; 3] {
    let s = std::fs::read_to_string("/proc/self/stat").unwrap();
    let v: Vec<u64> = s
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .skip(1)
        .map(|x| x.parse().unwrap_or(0))
        .collect();
    [v[6], v[10], v[11]]
}
fn main() {
    if std::env::var("KEEP").is_ok() {
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        }
    }
    if std::env::var("ONE").is_ok() {
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
    let args: Vec<String> = std::env::args().collect();
    let mini = args[1] == "mini";
    let (b, t) = args[2].split_once('x').unwrap();
    let (b, t): (usize, usize) = (b.parse().unwrap(), t.parse().unwrap());
    let steps: usize = args[3].parse().unwrap();
    let threads: usize = args[4].parse().unwrap();
    let pick = |m: usize, p: usize| if mini { m } else { p };
    let layer = LayerConfig { window: None, feed_forward: FeedForward::Sparse };
    let config = ModelConfig {
        architecture: "hser".into(),
        vocab: pick(32000, 2048),
        hidden: pick(1024, 192),
        context: 4096,
        norm_eps: 1e-5,
        tied_embeddings: !mini,
        attention: AttentionConfig {
            heads: pick(8, 6),
            kv_heads: pick(8, 2),
            head_dim: pick(128, 32),
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            qk_norm: if mini { QkNorm::Whole } else { QkNorm::PerHead },
            qkv_bias: false,
            output_bias: false,
            clip_qkv: None,
        },
        layers: vec![layer; pick(8, 5)],
        moe: Some(MoeConfig {
            intermediate: pick(512, 128),
            tiers: vec![TierConfig::new(TIER_1B, 1, pick(32, 16) as u32, 0)],
            routing: RoutingConfig {
                k_tier: 1,
                k_group: 1,
                k_expert: pick(4, 2) as u32,
                scoring: Scoring::SoftmaxTopK,
                renormalize: !mini,
                seed: 0,
            },
            shared: None,
        }),
        bos_token: None,
        eos_tokens: vec![],
    };
    let vocab = config.vocab as u64;
    let params = Params::random(config, 7);
    let n = params.list().len();
    let total: usize = params.list().iter().map(|p| p.values().len()).sum();
    let cpu = Arc::new(Cpu::best(threads));
    let mut trainer = Trainer::new(
        cpu.clone(),
        params,
        Box::new(AdamW::default()),
        vec![Trained::All; n],
        vec![true; n],
        None,
    );
    let mask = TierMask::new(vec![true]);
    let options = StepOptions {
        mask: &mask,
        objective: Objective { cross_entropy: 1.0, balance: BalanceWeights::default() },
        recompute: Recompute::None,
        micro_rows: b,
    };
    let mut x = 88172645463325252u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) % vocab
    };
    let mut times = vec![];
    for s in 0..steps + 2 {
        let batch = Batch {
            rows: (0..b).map(|_| Row::whole((0..t).map(|_| next() as u32).collect())).collect(),
        };
        let s0 = stat();
        let t0 = Instant::now();
        let report = trainer.step(&batch, &options, 1e-4).unwrap();
        let dt = t0.elapsed().as_secs_f64();
        let s1 = stat();
        eprintln!(
            "step {s}: {dt:.4} s, loss {}, minor faults {}, user {} sys {} (10 ms)",
            report.losses.ce,
            s1[0] - s0[0],
            s1[1] - s0[1],
            s1[2] - s0[2]
        );
        if s >= 2 {
            times.push(dt)
        }
        if s == steps + 1 {
            let mut h = 0xcbf2_9ce4_8422_2325u64;
            for p in trainer.params().list() {
                for v in p.values() {
                    h = (h ^ u64::from(v.to_bits())).wrapping_mul(0x0100_0000_01b3);
                }
            }
            times.sort_by(f64::total_cmp);
            let med = times[times.len() / 2];
            println!(
                "{} {} params {total}: {:.0} tokens/s ({:.0}..{:.0}), peak {} MB, hash {h:016x}",
                args[1],
                args[2],
                (b * t) as f64 / med,
                (b * t) as f64 / times[times.len() - 1],
                (b * t) as f64 / times[0],
                rss()
            );
            for _ in 0..2 {
                let t0 = Instant::now();
                step::evaluate(&cpu, trainer.params(), &batch, &options).unwrap();
                let t1 = Instant::now();
                let g = trainer.gradients(&batch, &options).unwrap();
                let t2 = Instant::now();
                drop(g);
                println!(
                    "  evaluate {:.4}, gradients {:.4} (step {med:.4})",
                    (t1 - t0).as_secs_f64(),
                    (t2 - t1).as_secs_f64()
                );
            }
        }
    }
}
