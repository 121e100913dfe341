//! `train`, `grad`, `tier` and `tokenizer`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};
use lite_llm_kernels::simd::Simd;
use lite_llm_runtime::tier::{TierId, TierSet};

use super::ModelPath;

/// `train`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct TrainArgs {
    /// Something beside a run.
    #[command(subcommand)]
    pub what: Option<TrainCommand>,
    /// A run.
    #[command(flatten)]
    pub run: RunTrainArgs,
}

/// What there is beside a run.
#[derive(Debug, Subcommand)]
pub enum TrainCommand {
    /// Draw a run's losses, balance and load.
    Plot(TrainPlotArgs),
    /// Help a run that was started with --workers, from this or another machine.
    Worker(TrainWorkerArgs),
}

/// `train plot`.
#[derive(Debug, Args)]
pub struct TrainPlotArgs {
    /// Folder of the run.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// SVG file to write [default: plot.svg in the run's folder].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// `train worker`.
#[derive(Debug, Args)]
pub struct TrainWorkerArgs {
    /// Where the run listens.
    #[arg(long, value_name = "ADDR:PORT")]
    pub hub: SocketAddr,
    /// Token file of the run.
    #[arg(long, value_name = "FILE")]
    pub token: PathBuf,
    /// Its name [default: w and the number of the process].
    #[arg(long)]
    pub name: Option<String>,
    /// Say nothing when the run ends: for those that the run itself starts.
    #[arg(long, hide = true)]
    pub quiet: bool,
    /// How it is computed.
    #[command(flatten)]
    pub compute: TrainComputeArgs,
}

/// A run.
#[derive(Debug, Args)]
pub struct RunTrainArgs {
    /// The run: model, data, phases. Paths in it are relative to its folder.
    #[arg(value_name = "CONFIG.toml", required = true)]
    pub config: Option<PathBuf>,
    /// Compute gradients in so many processes; no bit depends on it [default: in this one].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
    /// Where workers connect (QUIC, UDP).
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0", requires = "workers")]
    pub listen: SocketAddr,
    /// Go on from the last checkpoint of the run, if there is one.
    #[arg(long)]
    pub resume: bool,
    /// How it is computed.
    #[command(flatten)]
    pub compute: TrainComputeArgs,
}

/// Threads and instructions; neither changes a result.
#[derive(Debug, Clone, Args)]
pub struct TrainComputeArgs {
    /// Compute threads, of each worker if there are any [default: the machine's cores, shared].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Vector instructions: scalar, avx2, avx512, neon [default: the best here].
    #[arg(long)]
    pub simd: Option<Simd>,
}

/// `grad`.
#[derive(Debug, Args)]
pub struct GradArgs {
    /// Checkpoint folder.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// JSON file {"prompts": [[ids…], …]}: the rows of one batch.
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// safetensors file to write: loss.* and the gradient of each parameter by its name.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Tiers that are used: all, tier_1b,tier_10b or ..tier_10b.
    #[arg(long, default_value = "all")]
    pub tiers: TierSet,
    /// Weights of the balance losses over tiers, groups and experts.
    #[arg(long, value_name = "T,G,E", value_delimiter = ',', num_args = 3)]
    pub balance: Option<Vec<f64>>,
    /// Rows of a micro-batch [default: all at once].
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    pub micro_rows: Option<u32>,
    /// Compute layers again instead of keeping their activations.
    #[arg(long)]
    pub recompute: bool,
    /// How it is computed.
    #[command(flatten)]
    pub compute: TrainComputeArgs,
}

/// What to do with the tiers of a checkpoint.
#[derive(Debug, Subcommand)]
pub enum TierCommand {
    /// Add a tier to the checkpoint in a folder, by adding files: earlier manifests still open.
    Add(TierAddArgs),
    /// List the tiers of a checkpoint.
    List(ModelPath),
    /// Drop the tier that was added last, with the manifest that added it.
    Drop(TierDropArgs),
}

/// `tier drop`.
#[derive(Debug, Args)]
pub struct TierDropArgs {
    /// Checkpoint folder.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// The tier: it must be the last, so that nothing else is dropped by mistake.
    #[arg(long)]
    pub name: TierId,
}

/// `tier add`.
#[derive(Debug, Args)]
pub struct TierAddArgs {
    /// Checkpoint folder.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of the tier, for example tier_10b.
    #[arg(long)]
    pub name: TierId,
    /// Groups in a layer.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub groups: u32,
    /// Experts in a group.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub experts: u32,
    /// Inner width of its experts [default: the model's].
    #[arg(long)]
    pub intermediate: Option<usize>,
    /// Format of its experts: f32, bf16, int8, int6 or int4 [default: the checkpoint's].
    #[arg(long)]
    pub dtype: Option<lite_llm_kernels::dtype::DType>,
    /// Where it would like to be: hbm, dram, nvme or archive.
    #[arg(long, default_value = "dram", value_parser = placement)]
    pub placement: lite_llm_runtime::tier::Residence,
    /// What it begins with: random:SEED, copy:TIER or means.
    #[arg(long, default_value = "random:0")]
    pub init: String,
}

fn placement(text: &str) -> Result<lite_llm_runtime::tier::Residence, String> {
    use lite_llm_runtime::tier::Residence;
    match text {
        "hbm" => Ok(Residence::Hbm),
        "dram" => Ok(Residence::Dram),
        "nvme" => Ok(Residence::Nvme),
        "archive" => Ok(Residence::Archive),
        _ => Err("hbm, dram, nvme or archive is expected".into()),
    }
}

/// What to do about tokenizers.
#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Learn a byte-level BPE tokenizer from text.
    Train(TokenizerTrainArgs),
}

/// `tokenizer train`.
#[derive(Debug, Args)]
pub struct TokenizerTrainArgs {
    /// Files of text or JSONL (a "text" on each line), plain or compressed with zstd (.zst); the last
    /// part of a name may have a *.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<String>,
    /// Entries of the vocabulary: 256 bytes, the end token, and what is learned.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub vocab: usize,
    /// How the token is spelled that ends a text; it becomes entry 0.
    #[arg(long, value_name = "TOKEN", default_value = "<|endoftext|>")]
    pub end: String,
    /// File to write.
    #[arg(long, value_name = "FILE", default_value = "tokenizer.json")]
    pub out: PathBuf,
}
