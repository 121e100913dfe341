//! Kernels from source to code for the device found: NVRTC at first use, then a file.
//!
//! Source is part of the binary (`kernels/cuda/*.cu`). What is compiled is kept in a folder under
//! the hash of source, architecture, options and compiler, so that a change of any gives another
//! file. A file that is damaged fails to load and is compiled anew.

use std::{
    collections::HashSet,
    ffi::CString,
    fs,
    path::{Path, PathBuf},
};

use cudarc::nvrtc::{result, sys};

use super::launch::{format, kv_source};
use crate::{dtype::DType, kv::KvDType, math::Math};

/// Arithmetic rounds as it is written: the determinism contract depends on these.
const OPTIONS: [&str; 5] =
    ["--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--std=c++17"];

/// The files, as they were when this was built.
const FILES: [(&str, &str); 17] = [
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("product.cuh", include_str!("../../cuda/product.cuh")),
    ("choose.cuh", include_str!("../../cuda/choose.cuh")),
    ("elementwise.cu", include_str!("../../cuda/elementwise.cu")),
    ("norm.cu", include_str!("../../cuda/norm.cu")),
    ("route.cu", include_str!("../../cuda/route.cu")),
    ("sample.cu", include_str!("../../cuda/sample.cu")),
    ("attention.cu", include_str!("../../cuda/attention.cu")),
    ("attention_tile.cuh", include_str!("../../cuda/attention_tile.cuh")),
    ("matmul.cu", include_str!("../../cuda/matmul.cu")),
    ("swiglu.cu", include_str!("../../cuda/swiglu.cu")),
    ("one.cu", include_str!("../../cuda/one.cu")),
    ("tile.cu", include_str!("../../cuda/tile.cu")),
    ("tensor.cuh", include_str!("../../cuda/tensor.cuh")),
    ("tensor.cu", include_str!("../../cuda/tensor.cu")),
    ("tensor_wide.cu", include_str!("../../cuda/tensor_wide.cu")),
    ("attention_fast.cu", include_str!("../../cuda/attention_fast.cu")),
];

/// Where code comes from and is kept.
#[derive(Debug, Clone, Default)]
pub struct Folders {
    /// Compiled code is kept here.
    pub cache: Option<PathBuf>,
    /// Sources are read from here instead of the binary, where they are found: for work on them.
    pub sources: Option<PathBuf>,
}

impl Folders {
    fn file(&self, name: &str) -> String {
        let found = self.sources.as_ref().and_then(|s| fs::read_to_string(s.join(name)).ok());
        found.unwrap_or_else(|| {
            let file = FILES.iter().find(|(file, _)| *file == name);
            file.expect("a source is one of the files").1.to_owned()
        })
    }
}

/// A file of kernels, for one format where it depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Value by value.
    Elementwise,
    /// RMS norm.
    Norm,
    /// Selection of routes.
    Route,
    /// Tokens from logits.
    Sample,
    /// Attention and its cache, of [`crate::kv::KvDType`] in order.
    Attention(u8),
    /// Attention of [`super::fast::Math::Fast`].
    AttentionFast,
    /// Products, of [`crate::dtype::DType`] in order; 5 is fast bf16.
    Matmul(u8),
    /// Gated networks, alike.
    Swiglu(u8),
    /// Products of a single row, alike.
    One(u8),
    /// Products of many rows, of [`crate::dtype::DType`] in order.
    Tile(u8),
    /// The same of fast bf16.
    Tensor,
    /// The same by Hopper's instruction for four warps.
    TensorWide,
}

impl Source {
    /// Every source there is.
    pub fn all() -> Vec<Source> {
        let mut all = vec![Source::Elementwise, Source::Norm, Source::Route, Source::Sample];
        all.extend([Source::AttentionFast, Source::Tensor, Source::TensorWide]);
        all.extend((0..3).map(Source::Attention));
        all.extend((0..6).map(Source::Matmul));
        all.extend((0..6).map(Source::Swiglu));
        all.extend((0..6).map(Source::One));
        all.extend((0..5).map(Source::Tile));
        all
    }

    /// The file's name, for people.
    pub fn name(self) -> String {
        match self {
            Source::Attention(kv) => format!("{} (KV {kv})", self.file()),
            Source::Matmul(format)
            | Source::Swiglu(format)
            | Source::One(format)
            | Source::Tile(format) => {
                format!("{} (FORMAT {format})", self.file())
            }
            _ => self.file().to_owned(),
        }
    }

    fn file(self) -> &'static str {
        match self {
            Source::Elementwise => "elementwise.cu",
            Source::Norm => "norm.cu",
            Source::Route => "route.cu",
            Source::Sample => "sample.cu",
            Source::Attention(_) => "attention.cu",
            Source::Matmul(_) => "matmul.cu",
            Source::Swiglu(_) => "swiglu.cu",
            Source::One(_) => "one.cu",
            Source::Tile(_) => "tile.cu",
            Source::Tensor => "tensor.cu",
            Source::TensorWide => "tensor_wide.cu",
            Source::AttentionFast => "attention_fast.cu",
        }
    }

    fn text(self, folders: &Folders) -> String {
        let (define, parts): (_, &[&str]) = match self {
            Source::Attention(kv) => (format!("#define KV {kv}\n"), &[]),
            Source::Matmul(format) | Source::Swiglu(format) | Source::Tile(format) => {
                (format!("#define FORMAT {format}\n"), &["tensor.cuh", "product.cuh"])
            }
            Source::One(format) => {
                (format!("#define FORMAT {format}\n"), &["tensor.cuh", "product.cuh", "choose.cuh"])
            }
            Source::Tensor | Source::TensorWide => (String::new(), &["tensor.cuh", "product.cuh"]),
            Source::AttentionFast => (String::new(), &["tensor.cuh"]),
            Source::Route => (String::new(), &["choose.cuh"]),
            Source::Elementwise | Source::Norm | Source::Sample => (String::new(), &[]),
        };
        let parts: String = parts.iter().map(|part| folders.file(part)).collect();
        // Many rows of a sequence have tiles of their own where the cache is bf16.
        let behind = match self {
            Source::Attention(1) => folders.file("attention_tile.cuh"),
            _ => String::new(),
        };
        let common = folders.file("common.cuh");
        format!("{common}{define}{parts}{}{behind}", folders.file(self.file()))
    }
}

/// Whether NVRTC is there to compile with.
pub fn compiler_present() -> bool {
    // SAFETY: it opens a library, whose initialisers NVIDIA answers for.
    unsafe { sys::is_culib_present() }
}

/// The version of NVRTC, which is there.
fn version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two integers to write to. A failure leaves 0.0, which is only a name.
    let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// Compiles a source for an architecture (`sm_90a`) to the device's own code.
pub fn compile(source: Source, arch: &str, folders: &Folders) -> Result<Vec<u8>, String> {
    if !compiler_present() {
        return Err("NVRTC (libnvrtc.so.13) was not found: install CUDA 13.0's NVRTC, or put its \
                    folder on LD_LIBRARY_PATH"
            .into());
    }
    let failed = |what: String| format!("{} for {arch}: {what}", source.name());
    let text = CString::new(source.text(folders)).map_err(|e| failed(e.to_string()))?;
    let program = result::create_program(&text, None).map_err(|e| failed(e.to_string()))?;
    let mut options: Vec<String> = OPTIONS.iter().map(|&o| o.to_owned()).collect();
    options.push(format!("--gpu-architecture={arch}"));
    // SAFETY: the program was just made, lives until it is destroyed below, and the buffer has
    // the size that NVRTC asks for.
    unsafe {
        let compiled = result::compile_program(program, &options)
            .map_err(|e| {
                let log = result::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
                failed(format!("{e}\n{}", String::from_utf8_lossy(&log)))
            })
            .and_then(|()| {
                let mut size = 0;
                let done = sys::nvrtcGetCUBINSize(program, &mut size).result();
                let mut code = vec![0u8; size];
                done.and_then(|()| sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result())
                    .map_err(|e| failed(e.to_string()))?;
                Ok(code)
            });
        let _ = result::destroy_program(program);
        compiled
    }
}

/// The file that a source's code is kept in.
fn kept_at(cache: &Path, source: Source, arch: &str, folders: &Folders) -> PathBuf {
    let mut hash = blake3::Hasher::new();
    hash.update(source.text(folders).as_bytes());
    let (major, minor) = version();
    hash.update(format!("\0{arch}\0{OPTIONS:?}\0{major}.{minor}").as_bytes());
    cache.join(format!("{}.cubin", hash.finalize().to_hex()))
}

/// The code of a source: from the cache if it is there and `fresh` is not asked for, else
/// compiled and kept. A folder that cannot be written to only costs the next start its time.
pub fn code(source: Source, arch: &str, folders: &Folders, fresh: bool) -> Result<Vec<u8>, String> {
    let Some(cache) = folders.cache.as_deref().filter(|_| compiler_present()) else {
        return compile(source, arch, folders);
    };
    let path = kept_at(cache, source, arch, folders);
    if !fresh && let Ok(code) = fs::read(&path) {
        return Ok(code);
    }
    let code = compile(source, arch, folders)?;
    let staged = path.with_extension(format!("{}.tmp", std::process::id()));
    let kept = fs::create_dir_all(cache)
        .and_then(|()| fs::write(&staged, &code))
        .and_then(|()| fs::rename(&staged, &path));
    if kept.is_err() {
        let _ = fs::remove_file(&staged);
    }
    Ok(code)
}

/// What passes of a model need, whose dense matrices and whose networks (experts, too) are in these formats,
/// with keys and values in format `kv`. Gates are in f32, of few candidates each.
pub fn sources(dense: &[DType], networks: &[DType], kv: KvDType, math: Math) -> Vec<Source> {
    let mut all = vec![Source::Elementwise, Source::Norm, Source::Route, Source::Sample];
    let gates = format(DType::F32, math);
    all.extend([kv_source(kv), Source::Matmul(gates), Source::One(gates)]);
    if math == Math::Fast && kv == KvDType::Bf16 {
        all.push(Source::AttentionFast);
    }
    for (dtypes, of) in [
        (dense, Source::Matmul as fn(u8) -> Source),
        (networks, Source::Swiglu as fn(u8) -> Source),
    ] {
        for &dtype in dtypes {
            let number = format(dtype, math);
            all.extend([of(number), Source::One(number)]);
            match math.is_fast(dtype) {
                true => all.extend([Source::Tensor, Source::TensorWide]),
                false => all.push(Source::Tile(number)),
            }
        }
    }
    let mut seen = HashSet::new();
    all.retain(|source| seen.insert(*source));
    all
}
