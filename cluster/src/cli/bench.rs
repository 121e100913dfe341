//! What can be asked of `lite-llm bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lite_llm_kernels::simd::Simd;

use super::{LocalArgs, TrainComputeArgs};

/// `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: BenchCommand,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Products against the gemm crate and the memory's bandwidth.
    Kernels(BenchKernelsArgs),
    /// Decode speed: a cluster of one worker against the same forward pass alone.
    Decode(BenchModelArgs),
    /// Prefill speed.
    Prefill(BenchModelArgs),
    /// Dispatch and combine between two processes over QUIC.
    Transport(BenchTransportArgs),
    /// The other half of `bench transport`; it is started by it.
    #[command(hide = true)]
    TransportPeer(BenchTransportPeerArgs),
    /// Hit rates of the expert cache on recorded routing, policy by policy.
    Store(BenchStoreArgs),
    /// Decode by a GPU whose memory holds a part of the experts, routed by a recording.
    Hbm(BenchHbmArgs),
    /// Steps of training on random weights and tokens.
    Train(BenchTrainArgs),
    /// Write a Hugging Face folder with random weights.
    RandomModel(RandomModelArgs),
}

/// `bench kernels`.
#[derive(Debug, Args)]
pub struct BenchKernelsArgs {
    /// Threads [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Vector instructions: scalar, avx2, avx512, neon [default: the best here].
    #[arg(long)]
    pub simd: Option<Simd>,
    /// Runs of each measurement; the median counts.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
}

/// `bench decode` and `bench prefill`.
#[derive(Debug, Args)]
pub struct BenchModelArgs {
    /// Checkpoint folder or URL [default: the small model inside this program].
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// Tokens of the prompt [default: 64 for decode, 512 for prefill, if the context has room].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: Option<u32>,
    /// Seed of the prompt's tokens.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokens to generate (decode).
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(2..=65536)
    )]
    pub generate: u32,
    /// Runs of each measurement, alternating; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
    /// Requests at the same time, each with its own prompt.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub sequences: u16,
    /// Measure the cluster only: half the memory, and nothing to compare with.
    #[arg(long)]
    pub cluster_only: bool,
    /// Start every worker as a process of its own.
    #[arg(long)]
    pub processes: bool,
    /// Say where the time of a step of the engine alone goes.
    #[arg(long, conflicts_with = "cluster_only")]
    pub profile: bool,
    /// Workers.
    #[command(flatten)]
    pub local: LocalArgs,
}

/// `bench hbm`.
#[derive(Debug, Args)]
pub struct BenchHbmArgs {
    /// Checkpoint folder or URL [default: the small model inside this program].
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// A safetensors file with recorded experts, `routes.NAME` u8 [layers, tokens, k]; the model's layers repeat
    /// the recording's.
    #[arg(long, value_name = "FILE")]
    pub routes: PathBuf,
    /// NAME of what was recorded.
    #[arg(long, value_name = "NAME", default_value = "prose")]
    pub domain: String,
    /// Tokens of each prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Tokens to generate.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    pub generate: u32,
    /// Runs; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
    /// Requests at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub sequences: u16,
    /// The device, and its memory.
    #[command(flatten)]
    pub local: LocalArgs,
}

/// `bench store`.
#[derive(Debug, Args)]
pub struct BenchStoreArgs {
    /// Routing that `eval --trace` has recorded; several times for several texts of one model.
    #[arg(long, value_name = "FILE", required = true)]
    pub trace: Vec<PathBuf>,
    /// Experts of each layer that have room [default: 12, 25, 50 and 75 % of them].
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub slots: Vec<u32>,
    /// Experts that the disk brings in the time that a layer takes to be computed.
    #[arg(
        long,
        value_name = "EXPERTS,…",
        value_delimiter = ',',
        default_value = "2",
        value_parser = disk_rate
    )]
    pub disk: Vec<f64>,
    /// Read only so many tokens of each text.
    #[arg(
        long,
        value_name = "N",
        default_value_t = u32::MAX,
        hide_default_value = true,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub tokens: u32,
    /// Tokens after which another text has its turn.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 512,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub turn: u32,
    /// SVG file to draw the hit rates into.
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,
}

fn disk_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("a positive number of experts is expected".into()),
    }
}

/// What a round trip of `bench transport` carries.
#[derive(Debug, Clone, Args)]
pub struct BenchLoadArgs {
    /// Tokens of a batch.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub rows: u32,
    /// Elements of a hidden state.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub hidden: u32,
    /// Experts per token.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub top_k: u32,
}

/// `bench transport`.
#[derive(Debug, Args)]
pub struct BenchTransportArgs {
    /// What travels.
    #[command(flatten)]
    pub load: BenchLoadArgs,
    /// Round trips of each run.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rounds: u32,
    /// Runs of each measurement, alternating; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
}

/// `bench transport-peer`.
#[derive(Debug, Args)]
pub struct BenchTransportPeerArgs {
    /// Token file.
    #[arg(long)]
    pub token: PathBuf,
    /// What travels.
    #[command(flatten)]
    pub load: BenchLoadArgs,
}

/// `bench train`.
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    /// manpages, mini or tiny.
    #[arg(long, default_value = "manpages")]
    pub shape: String,
    /// Rows and tokens of a step, which is one micro-batch.
    #[arg(long, default_value = "8x128", value_name = "ROWSxTOKENS")]
    pub batch: String,
    /// Steps that are counted; the median counts.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub steps: u16,
    /// Compute activations again for the backward pass instead of keeping them.
    #[arg(long)]
    pub recompute: bool,
    /// Threads and instructions.
    #[command(flatten)]
    pub compute: TrainComputeArgs,
}

/// `bench random-model`.
#[derive(Debug, Args)]
pub struct RandomModelArgs {
    /// Folder to write.
    pub dir: PathBuf,
    /// olmoe-mini, olmoe-1b-7b or tiny.
    #[arg(long, default_value = "olmoe-mini")]
    pub shape: String,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}
