//! `lite-llm bench train`: steps of training on random weights and tokens.
//!
//! The shapes are those of `bench_train_torch.py`, which PyTorch is measured with (see `benches/train_speed.py`): AdamW, f32,
//! no loss beside cross-entropy. The first two steps are not counted. What forward, backward and the optimizer
//! take is measured after the steps: an evaluation, the gradients alone, and the median step less these.

use std::{sync::Arc, time::Instant};

use anyhow::{Result, anyhow};
use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    config::{
        AttentionConfig, FeedForward, LayerConfig, ModelConfig, MoeConfig, QkNorm, RopeScaling,
        RoutingConfig, Scoring,
    },
    tier::{TIER_1B, TierConfig, TierMask},
    train::{
        Recompute, TrainError,
        balance::BalanceWeights,
        batch::{Batch, Row},
        optimizer::AdamW,
        params::Params,
        step::{Objective, StepOptions, evaluate},
        trained::Trained,
        trainer::Trainer,
    },
};
use serde_json::{Value, json};

use super::samples::{Samples, print_table};
use crate::{
    cli::BenchTrainArgs,
    commands::bad_input,
    progress::{Progress, Unit},
    size::Size,
};

/// Steps that are not counted.
const WARM_UP: usize = 2;
/// Measurements of the parts of a step.
const PARTS: usize = 3;

pub(super) async fn measure(args: BenchTrainArgs, json: bool) -> Result<()> {
    let BenchTrainArgs { shape, batch, steps, recompute, compute } = args;
    let cpu = compute.cpu()?;
    let config = model(&shape).map_err(bad_input)?;
    let of_batch = batch.split_once('x').and_then(|(rows, tokens)| {
        Some((rows.parse::<usize>().ok()?, tokens.parse::<usize>().ok()?))
    });
    let most = config.context;
    let (rows, tokens) = of_batch
        .filter(|&(rows, tokens)| (1..=4096).contains(&rows) && (1..=most).contains(&tokens))
        .ok_or_else(|| {
            let expected = format!("ROWSxTOKENS, such as 8x128, at most 4096x{most}, is expected");
            bad_input(anyhow!("--batch {batch}: {expected}"))
        })?;
    let recompute = if recompute { Recompute::Layer } else { Recompute::None };
    let job = Job { shape, rows, tokens, steps: usize::from(steps), recompute };
    let report = tokio::task::spawn_blocking(move || job.run(cpu, config, json)).await??;
    match json {
        true => say!("{}", report.json()),
        false => report.print(),
    }
    Ok(())
}

/// The model of a shape.
fn model(shape: &str) -> Result<ModelConfig> {
    // Vocabulary, hidden, layers, heads, key/value heads, head_dim, experts, experts per token, inner width.
    let (of, qk_norm, tied_embeddings) = match shape {
        // That of models/manpages-moe, of the class Qwen3-MoE.
        "manpages" => ([2048, 192, 5, 6, 2, 32, 16, 2, 128], QkNorm::PerHead, true),
        // 502 million parameters of the class OLMoE, 117 million active.
        "mini" => ([32_000, 1024, 8, 8, 8, 128, 32, 4, 512], QkNorm::Whole, false),
        "tiny" => ([64, 16, 2, 2, 1, 8, 4, 2, 8], QkNorm::PerHead, true),
        other => return Err(anyhow!("--shape {other}: manpages, mini or tiny is expected")),
    };
    let [vocab, hidden, layers, heads, kv_heads, head_dim, experts, k, intermediate] = of;
    let layer = LayerConfig { window: None, feed_forward: FeedForward::Sparse };
    let routing = RoutingConfig {
        k_tier: 1,
        k_group: 1,
        k_expert: k as u32,
        scoring: Scoring::SoftmaxTopK,
        renormalize: tied_embeddings,
        seed: 0,
    };
    let attention = AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        qk_norm,
        qkv_bias: false,
        output_bias: false,
        clip_qkv: None,
    };
    let tiers = vec![TierConfig::new(TIER_1B, 1, experts as u32, 0)];
    let config = ModelConfig {
        architecture: "hser".into(),
        vocab,
        hidden,
        context: 4096,
        norm_eps: 1e-5,
        tied_embeddings,
        attention,
        layers: vec![layer; layers],
        moe: Some(MoeConfig { intermediate, tiers, routing, shared: None }),
        bos_token: None,
        eos_tokens: Vec::new(),
    };
    config.check()?;
    Ok(config)
}

/// What is measured.
struct Job {
    shape: String,
    rows: usize,
    tokens: usize,
    steps: usize,
    recompute: Recompute,
}

impl Job {
    /// The batch of a step: random tokens, each to be predicted.
    fn batch(&self, vocab: usize, step: usize) -> Batch {
        let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(step as u64 + 1);
        let mut token = || {
            // xorshift, which is random enough to be routed everywhere.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) % vocab as u64) as u32
        };
        let rows = (0..self.rows).map(|_| Row::whole((0..self.tokens).map(|_| token()).collect()));
        Batch { rows: rows.collect() }
    }

    fn run(self, cpu: Arc<Cpu>, config: ModelConfig, json: bool) -> Result<Report, TrainError> {
        let mut progress = Progress::new("bench train", Unit::Things("steps"), json);
        let total = (WARM_UP + self.steps + PARTS) as u64;
        let (threads, simd) = (cpu.pool().threads(), cpu.simd().to_string());
        let vocab = config.vocab;
        let params = Params::random(config, 7);
        let count = params.list().len();
        let parameters = params.list().iter().map(|param| param.values().len()).sum();
        let decays = params.list().iter().map(|param| param.shape.len() > 1).collect();
        let trained = vec![Trained::All; count];
        let optimizer = Box::new(AdamW::default());
        let mut trainer = Trainer::new(cpu.clone(), params, optimizer, trained, decays, None);
        let mask = TierMask::new(vec![true]);
        let options = StepOptions {
            mask: &mask,
            objective: Objective { cross_entropy: 1.0, balance: BalanceWeights::default() },
            recompute: self.recompute,
            micro_rows: self.rows,
        };
        let (mut steps, mut loss) = (Samples::default(), 0.0);
        for step in 0..WARM_UP + self.steps {
            let batch = self.batch(vocab, step);
            progress.update(step as u64, total, "steps");
            let from = Instant::now();
            loss = trainer.step(&batch, &options, 1e-4)?.losses.ce;
            if step >= WARM_UP {
                steps.push(from.elapsed().as_secs_f64());
            }
        }
        // Before the parts are measured: their memory is not a step's.
        let peak = peak_memory();
        let batch = self.batch(vocab, 0);
        let (mut forward, mut gradients) = (Samples::default(), Samples::default());
        for part in 0..PARTS {
            progress.update((WARM_UP + self.steps + part) as u64, total, "parts");
            let from = Instant::now();
            evaluate(&cpu, trainer.params(), &batch, &options)?;
            forward.push(from.elapsed().as_secs_f64());
            let from = Instant::now();
            let (_, found) = trainer.gradients(&batch, &options)?;
            gradients.push(from.elapsed().as_secs_f64());
            found.recycle(&cpu);
        }
        progress.finish();
        Ok(Report { job: self, threads, simd, parameters, steps, forward, gradients, peak, loss })
    }
}

/// The most memory that this process has had, in bytes, where the system says so.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// What was found.
struct Report {
    job: Job,
    threads: usize,
    simd: String,
    parameters: usize,
    /// Seconds of a step, of a forward pass with the loss, and of forward and backward.
    steps: Samples,
    forward: Samples,
    gradients: Samples,
    peak: Option<u64>,
    /// Of the last step.
    loss: f64,
}

impl Report {
    fn rates(&self) -> Samples {
        self.steps.rates((self.job.rows * self.job.tokens) as f64)
    }

    /// Seconds of forward, backward and the optimizer.
    fn parts(&self) -> [(&'static str, f64); 3] {
        let [forward, gradients, step] =
            [&self.forward, &self.gradients, &self.steps].map(Samples::median);
        let backward = (gradients - forward).max(0.0);
        let optimizer = (step - gradients).max(0.0);
        [("forward", forward), ("backward", backward), ("optimizer", optimizer)]
    }

    fn print(&self) {
        let Job { shape, rows, tokens, steps, .. } = &self.job;
        let (threads, simd, loss) = (self.threads, &self.simd, self.loss);
        say!(
            "{shape}, {} parameters, {rows} x {tokens} tokens, {threads} threads, {simd}",
            self.parameters
        );
        say!("{} tokens/s, median of {steps} steps; loss {loss:.4}", self.rates().show(0));
        if let Some(peak) = self.peak {
            say!("{} of memory at most", Size(peak));
        }
        say!("");
        let step = self.steps.median().max(1e-9);
        let rows = self.parts().map(|(name, seconds)| {
            vec![name.into(), format!("{seconds:.4}"), format!("{:.0} %", 100.0 * seconds / step)]
        });
        print_table(&["part", "seconds", "of a step"], &rows);
    }

    fn json(&self) -> Value {
        let Job { shape, rows, tokens, recompute, .. } = &self.job;
        let parts: serde_json::Map<String, Value> =
            self.parts().into_iter().map(|(name, seconds)| (name.into(), json!(seconds))).collect();
        json!({
            "shape": shape, "rows": rows, "tokens": tokens, "recompute": recompute, "threads": self.threads,
            "simd": self.simd, "parameters": self.parameters, "tokens_per_second": self.rates().json(),
            "seconds": parts, "peak_bytes": self.peak, "loss": self.loss,
        })
    }
}
