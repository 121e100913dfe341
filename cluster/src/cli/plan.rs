//! `plan`.

use std::path::PathBuf;

use clap::Args;
use lite_llm_kernels::simd::Simd;

use crate::{
    size::{NvmeArg, Rate, Size},
    time::Time,
};

/// `plan`. What no flag says is measured here, in about three seconds.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Checkpoint folder or URL [default: the small model inside this program].
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// Memory for experts, per worker [default: what is free, shared by the workers].
    #[arg(long, value_name = "SIZE")]
    pub dram: Option<Size>,
    /// A cache of experts on a local disk, per worker.
    #[arg(long, value_name = "DIR:SIZE")]
    pub nvme: Option<NvmeArg>,
    /// Workers, each on a machine like this one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: u16,
    /// Compute threads per worker [default: the machine's cores].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Vector instructions: scalar, avx2, avx512, neon [default: the best here].
    #[arg(long)]
    pub simd: Option<Simd>,
    /// What an object store gives each worker; of a model in a folder this plans as if it were in one.
    #[arg(long, value_name = "SIZE/s")]
    pub archive_bandwidth: Option<Rate>,
    /// How long an object store takes until the first byte comes [with --archive-bandwidth: 30ms].
    #[arg(long, value_name = "TIME")]
    pub archive_latency: Option<Time>,
    /// What the local disk gives.
    #[arg(long, value_name = "SIZE/s")]
    pub disk_bandwidth: Option<Rate>,
    /// What memory gives all threads of a worker together, when they read.
    #[arg(long, value_name = "SIZE/s")]
    pub memory_bandwidth: Option<Rate>,
    /// With several workers: how long rows take to another one and back, the time of their experts
    /// left out.
    #[arg(long, value_name = "TIME", default_value = "0.3ms")]
    pub network_latency: Time,
    /// Routing that `eval --trace` has recorded with this model [default: uniform].
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Sequences that generate at the same time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub streams: u16,
    /// Tokens that each of them generates, of which the first quarter is not counted.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub tokens: u32,
}
