//! What a node computes with: processors of the host, or a GPU that they feed.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use lite_llm_kernels::{
    cpu::Cpu,
    cuda::{
        Cuda,
        compile::{Folders, Source},
    },
    cuda_device::Gpu,
    device::{Device, DeviceError},
    dtype::DType,
    kv::KvDType,
    ops::tree::LEAF,
};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    config::ModelConfig,
    engine::{Engine, PASS_TOKENS_MAX},
    expert::ExpertStore,
    gpu::GpuCarrier,
    residency::HbmStore,
};

/// Part of a GPU's free memory that experts leave to activations: a twelfth.
const ACTIVATIONS_SHARE: u64 = 12;

/// Tokens of a GPU's pass at most.
const GPU_PASS_TOKENS: usize = 2048;

/// Bytes that attention of a pass may take for its sums.
const ATTENTION_BYTES: usize = 2 << 30;

/// Which device is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// Processors of the host.
    #[default]
    Cpu,
    /// GPUs, by number, of which each worker has some: workers of one process take turns.
    Cuda(Vec<Vec<usize>>),
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no device; expected cpu, cuda:0, cuda:0+1 for one worker with two GPUs or, for several workers, \
     cuda:0,1"
)]
pub struct NoDevice(String);

impl FromStr for DeviceChoice {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        let wrong = || NoDevice(text.to_owned());
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(vec![vec![0]])),
            Some(("cuda", numbers)) => {
                let numbers = numbers.split(',').map(|of_worker| {
                    of_worker.split('+').map(str::parse).collect::<Result<Vec<usize>, _>>()
                });
                let numbers: Result<Vec<_>, _> = numbers.collect();
                let once = |all: &Vec<usize>| (1..all.len()).all(|i| !all[..i].contains(&all[i]));
                match numbers {
                    Ok(numbers) if numbers.iter().all(once) => Ok(Self::Cuda(numbers)),
                    _ => Err(wrong()),
                }
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(numbers) => {
                let of_worker = |numbers: &Vec<usize>| {
                    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join("+")
                };
                let numbers: Vec<_> = numbers.iter().map(of_worker).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
        }
    }
}

impl DeviceChoice {
    /// The device of worker `number` of `workers` in this process, fed by `cpu`. `hbm_bytes` of its
    /// memory, of each GPU of several, are for experts; by default what is free.
    pub fn open(
        &self,
        (number, workers): (usize, usize),
        cpu: Arc<Cpu>,
        hbm_bytes: Option<u64>,
    ) -> Result<NodeDevice, DeviceError> {
        let Self::Cuda(numbers) = self else { return Ok(NodeDevice::Cpu(cpu)) };
        let folders = Folders { cache: kernel_cache(), sources: None };
        let mut own = numbers[number % numbers.len()].iter();
        let first = Cuda::open(own.next().copied().unwrap_or(0), folders.clone())?;
        let gpu = own.try_fold(Gpu::new(first, cpu), |gpu, &number| {
            gpu.beside(Cuda::open(number, folders.clone())?)
        })?;
        let sharers = workers.div_ceil(numbers.len()) as u64;
        Ok(NodeDevice::Cuda { gpu: Arc::new(gpu), hbm_bytes, sharers })
    }
}

/// Where compiled kernels are kept: `LITE_LLM_CACHE`, or the user's cache folder.
fn kernel_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = set("LITE_LLM_CACHE").or_else(|| {
        let caches = set("XDG_CACHE_HOME");
        let caches = caches.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        caches.map(|caches| caches.join("lite-llm"))
    });
    folder.map(|folder| folder.join("cuda"))
}

/// A device that was opened.
#[derive(Clone)]
pub enum NodeDevice {
    /// Processors of the host.
    Cpu(Arc<Cpu>),
    /// A GPU.
    Cuda {
        /// The GPU, and the processors that feed it.
        gpu: Arc<Gpu>,
        /// Bytes of its memory that are for experts; nothing for what is free.
        hbm_bytes: Option<u64>,
        /// Workers that share it.
        sharers: u64,
    },
}

impl From<Arc<Cpu>> for NodeDevice {
    fn from(cpu: Arc<Cpu>) -> Self {
        Self::Cpu(cpu)
    }
}

impl NodeDevice {
    /// The processors of the host.
    pub fn cpu(&self) -> &Arc<Cpu> {
        match self {
            Self::Cpu(cpu) => cpu,
            Self::Cuda { gpu, .. } => gpu.cpu(),
        }
    }

    /// Name for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu(cpu) => cpu.describe(),
            Self::Cuda { gpu, .. } => gpu.describe(),
        }
    }

    /// See [`Device::progress`].
    pub fn progress(&self) -> u64 {
        match self {
            Self::Cpu(cpu) => cpu.progress(),
            Self::Cuda { gpu, .. } => gpu.progress(),
        }
    }
}

/// An engine on a GPU, over a store in the host's memory, and what holds experts in the GPU's.
/// `cache` says how many bytes keys and values take, and how they are kept; `hbm` how many bytes
/// experts may take (nothing for what is free), and how many share the GPU.
///
/// # Errors
/// A kernel does not compile, or the GPU has no room.
pub fn gpu_engine(
    backbone: &Arc<Backbone<Gpu>>,
    below: Arc<dyn ExpertStore>,
    checkpoint: &Checkpoint,
    cache: (u64, KvDType),
    hbm: (Option<u64>, u64),
) -> Result<(Engine<Gpu>, Arc<HbmStore>), DeviceError> {
    let gpu = &backbone.device;
    let (kv_bytes, kv_dtype) = cache;
    load_kernels(gpu, checkpoint, kv_dtype)?;
    let engine = Engine::with_cache(backbone.clone(), kv_bytes, kv_dtype)?;
    // After the cache, for what is free is theirs.
    let budget = hbm_budget(gpu, hbm.0, hbm.1)?;
    let bytes = checkpoint.tier_expert_bytes();
    let store = Arc::new(HbmStore::new(gpu.clone(), below, budget, bytes));
    let carrier = GpuCarrier::new(backbone, store.clone())?;
    let engine = engine.pass_tokens(pass_tokens(&backbone.config));
    Ok((engine.carried_by(carrier.map(|carrier| Arc::new(carrier) as _)), store))
}

/// Tokens of a pass: many, so that weights are read once for them, but no more than attention has room
/// for, which keeps a sum for each head of a token and each leaf of what the token sees.
fn pass_tokens(config: &ModelConfig) -> usize {
    let leaves = config.context / LEAF + 1;
    let attention = &config.attention;
    let row = attention.heads * leaves * (attention.head_dim + 2) * size_of::<f32>();
    (ATTENTION_BYTES / row.max(1)).clamp(PASS_TOKENS_MAX, GPU_PASS_TOKENS)
}

/// Bytes of each GPU's memory for experts, now that everything else has its place.
fn hbm_budget(gpu: &Gpu, asked: Option<u64>, sharers: u64) -> Result<u64, DeviceError> {
    let mut free = u64::MAX;
    for cuda in gpu.cudas() {
        free = free.min(cuda.memory()?.0 as u64);
    }
    match asked {
        None => Ok((free - free / ACTIVATIONS_SHARE) / sharers.max(1)),
        Some(needed) if needed <= free => Ok(needed),
        Some(needed) => Err(DeviceError::OutOfMemory { device: gpu.describe(), needed, free }),
    }
}

/// Compiles or loads what a model's passes need, with keys and values in format `kv`: at its first use a
/// kernel would keep the lane for longer than a node may show no progress. What is loaded already
/// takes no time.
pub(super) fn load_kernels(
    gpu: &Gpu,
    checkpoint: &Checkpoint,
    kv: KvDType,
) -> Result<(), DeviceError> {
    let tiers = checkpoint.config().moe.iter().flat_map(|moe| &moe.tiers);
    let dtype = checkpoint.dtype();
    let weights = tiers.map(|tier| tier.dtype.unwrap_or(dtype)).chain([dtype]);
    // Sources number formats in the order of these lists.
    let place = |found: Option<usize>| found.and_then(|at| u8::try_from(at).ok()).unwrap_or(0);
    let kv = place(KvDType::ALL.iter().position(|other| *other == kv));
    let mut sources = vec![Source::Elementwise, Source::Norm, Source::Route, Source::Sample];
    sources.push(Source::Attention(kv));
    // Gates are in f32.
    let mut formats: Vec<u8> = std::iter::once(DType::F32)
        .chain(weights)
        .map(|dtype| place(DType::ALL.iter().position(|other| *other == dtype)))
        .collect();
    formats.sort_unstable();
    formats.dedup();
    for format in formats {
        let of = [Source::Matmul, Source::Swiglu, Source::One, Source::Tile];
        sources.extend(of.map(|of| of(format)));
    }
    gpu.cudas().iter().try_for_each(|cuda| cuda.load(&sources))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let parse = |text: &str| text.parse::<DeviceChoice>();
        assert_eq!(parse("cpu"), Ok(DeviceChoice::Cpu));
        assert_eq!(parse("cuda"), Ok(DeviceChoice::Cuda(vec![vec![0]])));
        assert_eq!(parse("cuda:0,1"), Ok(DeviceChoice::Cuda(vec![vec![0], vec![1]])));
        assert_eq!(parse("cuda:0+1,2"), Ok(DeviceChoice::Cuda(vec![vec![0, 1], vec![2]])));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cpu:0", "cuda:0,", "cuda:0+", "cuda:0+0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse("cuda:0+1,2").unwrap().to_string(), "cuda:0+1,2");
    }
}
