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
    math::Math,
};
use lite_llm_runtime::{
    backbone::Backbone, checkpoint::Checkpoint, engine::Engine, expert::ExpertStore,
    gpu::GpuCarrier, residency::HbmStore,
};

/// Number of fast bf16 among the formats of sources.
const FAST: u8 = 5;
/// Inputs of a product that is done in tiles wherever these can be used.
const LEAF: usize = 256;

/// Part of a GPU's free memory that experts leave to activations: a twelfth.
const ACTIVATIONS_SHARE: u64 = 12;

/// Which device is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// Processors of the host.
    #[default]
    Cpu,
    /// These GPUs, by number: workers of one process take turns.
    Cuda(Vec<usize>),
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device; expected cpu, cuda:0 or, for several workers, cuda:0,1")]
pub struct NoDevice(String);

impl FromStr for DeviceChoice {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        let wrong = || NoDevice(text.to_owned());
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(vec![0])),
            Some(("cuda", numbers)) => {
                let numbers: Result<_, _> = numbers.split(',').map(str::parse).collect();
                numbers.map(Self::Cuda).map_err(|_| wrong())
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
                let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
        }
    }
}

impl DeviceChoice {
    /// The device of worker `number` of `workers` in this process, fed by `cpu`, with products computed
    /// by `math`. `hbm_bytes` of its memory are for experts; by default what is free.
    pub fn open(
        &self,
        (number, workers): (usize, usize),
        cpu: Arc<Cpu>,
        hbm_bytes: Option<u64>,
        math: Math,
    ) -> Result<NodeDevice, DeviceError> {
        let Self::Cuda(numbers) = self else {
            let reason = "a CPU computes exactly: --math fast needs --device cuda".to_owned();
            return match math {
                Math::Exact => Ok(NodeDevice::Cpu(cpu)),
                Math::Fast => Err(DeviceError::Failed { device: cpu.describe(), reason }),
            };
        };
        let folders = Folders { cache: kernel_cache(), sources: None };
        let cuda = Cuda::open(numbers[number % numbers.len()], folders)?;
        let sharers = workers.div_ceil(numbers.len()) as u64;
        let gpu = Arc::new(Gpu::new(cuda, cpu).by(math));
        Ok(NodeDevice::Cuda { gpu, hbm_bytes, sharers })
    }
}

/// Where compiled kernels are kept: `LITE_LLM_CACHE`, or the user's cache folder.
pub fn kernel_cache() -> Option<PathBuf> {
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

    /// With `--math fast`: the architecture, on which alone such bits are equal.
    pub fn fast(&self) -> Option<String> {
        match self {
            Self::Cuda { gpu, .. } if gpu.math() == Math::Fast => {
                Some(gpu.cuda().arch().to_owned())
            }
            _ => None,
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

/// Formats of a model's weights, those of its gates left out.
fn formats(checkpoint: &Checkpoint) -> impl Iterator<Item = DType> + '_ {
    let tiers = checkpoint.config().moe.iter().flat_map(|moe| &moe.tiers);
    let dtype = checkpoint.dtype();
    tiers.map(move |tier| tier.dtype.unwrap_or(dtype)).chain([dtype])
}

/// A model that is not computed so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{model} has weights in {dtype}: --math fast is for bf16 alone; leave it out, or import the model \
     with --dtype bf16"
)]
pub struct NotFast {
    model: String,
    dtype: DType,
}

/// Whether a model can be computed so.
pub fn check_math(math: Math, checkpoint: &Checkpoint) -> Result<(), NotFast> {
    let other = formats(checkpoint).find(|&dtype| math == Math::Fast && !math.is_fast(dtype));
    other.map_or(Ok(()), |dtype| Err(NotFast { model: checkpoint.location(), dtype }))
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
    // A fast pass comes back to the host in every layer: nothing carries it yet.
    let carrier = match gpu.math() {
        Math::Exact => GpuCarrier::new(backbone, store.clone())?,
        Math::Fast => None,
    };
    Ok((engine.carried_by(carrier.map(|carrier| Arc::new(carrier) as _)), store))
}

/// Bytes of a GPU's memory for experts, now that everything else has its place.
fn hbm_budget(gpu: &Gpu, asked: Option<u64>, sharers: u64) -> Result<u64, DeviceError> {
    let (free, _) = gpu.cuda().memory()?;
    let free = free as u64;
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
    // Sources number formats in the order of these lists.
    let place = |found: Option<usize>| found.and_then(|at| u8::try_from(at).ok()).unwrap_or(0);
    let fast = gpu.math() == Math::Fast;
    let pairs = kv == KvDType::Bf16;
    let kv = place(KvDType::ALL.iter().position(|other| *other == kv));
    let mut sources = vec![Source::Elementwise, Source::Norm, Source::Route, Source::Sample];
    sources.push(Source::Attention(kv));
    // Gates are in f32.
    let mut formats: Vec<u8> = std::iter::once(DType::F32)
        .chain(formats(checkpoint).filter(|_| !fast))
        .map(|dtype| place(DType::ALL.iter().position(|other| *other == dtype)))
        .collect();
    formats.sort_unstable();
    formats.dedup();
    for format in formats {
        let of = [Source::Matmul, Source::Swiglu, Source::One, Source::Tile];
        sources.extend(of.map(|of| of(format)));
    }
    if fast {
        sources.extend([Source::Matmul(FAST), Source::Swiglu(FAST), Source::One(FAST)]);
        sources.extend(pairs.then_some(Source::AttentionFast));
        if gpu.cuda().tensor_fits(LEAF) {
            let wide = gpu.cuda().is_wide();
            sources.extend(wide.then_some(Source::TensorWide).or(Some(Source::Tensor)));
        }
    }
    sources.into_iter().try_for_each(|source| gpu.cuda().load(source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let parse = |text: &str| text.parse::<DeviceChoice>();
        assert_eq!(parse("cpu"), Ok(DeviceChoice::Cpu));
        assert_eq!(parse("cuda"), Ok(DeviceChoice::Cuda(vec![0])));
        assert_eq!(parse("cuda:0,1"), Ok(DeviceChoice::Cuda(vec![0, 1])));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cpu:0", "cuda:0,"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse("cuda:0,1").unwrap().to_string(), "cuda:0,1");
    }
}
