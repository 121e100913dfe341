//! `plan`.

use std::{fmt, path::PathBuf};

use clap::{Args, ValueEnum};
use lite_llm_kernels::{kv::KvDType, simd::Simd};

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
    /// How keys and values are kept: f32, bf16 (half the memory), int8 (a quarter).
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub kv_dtype: KvDType,
    /// GPUs.
    #[command(flatten)]
    pub gpu: PlanGpuArgs,
}

/// A card whose figures are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GpuName {
    /// H100 SXM 80GB.
    H100,
    /// H200 SXM.
    H200,
}

impl fmt::Display for GpuName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::H100 => "H100",
            Self::H200 => "H200",
        })
    }
}

/// GPUs of a plan. What no flag says is that of this machine's first GPU, measured, if it has one.
#[derive(Debug, Args)]
pub struct PlanGpuArgs {
    /// A card whose figures are known.
    #[arg(long, value_name = "CARD", ignore_case = true)]
    pub gpu: Option<GpuName>,
    /// GPUs of each worker's machine; 0 for a plan without [default: 1, or those here].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=16))]
    pub gpus: Option<u16>,
    /// Memory of a GPU.
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<Size>,
    /// Its memory for experts [default: what the rest of the model leaves].
    #[arg(long, value_name = "SIZE")]
    pub hbm: Option<Size>,
    /// What a GPU reads from its memory.
    #[arg(long, value_name = "SIZE/s")]
    pub hbm_bandwidth: Option<Rate>,
    /// What a GPU gets from the host's memory.
    #[arg(long, value_name = "SIZE/s")]
    pub copy_bandwidth: Option<Rate>,
}

impl PlanGpuArgs {
    /// Whether a GPU is asked for.
    pub fn any(&self) -> bool {
        let Self { gpu, gpus, gpu_memory, hbm, hbm_bandwidth, copy_bandwidth } = self;
        let sizes = gpu_memory.is_some() || hbm.is_some();
        let rates = hbm_bandwidth.is_some() || copy_bandwidth.is_some();
        gpu.is_some() || gpus.is_some_and(|gpus| gpus > 0) || sizes || rates
    }
}
