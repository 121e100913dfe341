//! Hugging Face folders for tests: where they are, and how to read and rewrite them.
//!
//! Weights are read by the `safetensors` crate, not by the code under test.

#![allow(dead_code)] // Each test binary uses a part of this.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lite_llm_runtime::{
    checkpoint::{Checkpoint, inspect::Summary},
    import::{ImportError, ImportOptions, import},
};
use serde_json::Value;

/// Folders of the four classes that are imported.
pub(crate) const IMPORTED: [&str; 5] =
    ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_moe_bf16_sharded"];

/// A folder of reference models, if this machine has them.
pub(crate) fn reference(name: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("LITE_LLM_SHARED").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let dir = shared.unwrap_or(beside).join("hf-refs").join(name);
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!("skipped: {} is not here; set LITE_LLM_SHARED", dir.display());
    None
}

/// A tensor as its file has it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Raw {
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: safetensors::Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// The values, widened exactly.
    pub(crate) fn values(&self) -> Vec<f32> {
        let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
        match self.dtype {
            safetensors::Dtype::F32 => {
                let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                self.bytes.chunks(4).map(word).collect()
            }
            safetensors::Dtype::BF16 => {
                self.bytes.chunks(2).map(|b| half::bf16::from_bits(half(b)).to_f32()).collect()
            }
            safetensors::Dtype::F16 => {
                self.bytes.chunks(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect()
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// All tensors of a folder.
pub(crate) fn tensors(dir: &Path) -> BTreeMap<String, Raw> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = fs::read(&path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in file.tensors() {
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                all.insert(name, Raw { dtype, shape, bytes: view.data().to_vec() });
            }
        }
    }
    all
}

/// Writes tensors as one file.
pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Raw>) {
    let views = tensors.iter().map(|(name, raw)| {
        let view = safetensors::tensor::TensorView::new(raw.dtype, raw.shape.clone(), &raw.bytes);
        (name.as_str(), view.unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Copies a folder's files, weights and all.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        // By content: the originals may be read-only.
        let bytes = fs::read(&path).unwrap();
        fs::write(to.join(path.file_name().unwrap()), bytes).unwrap();
    }
}

/// Copies a folder with its weights changed, as a single file.
pub(crate) fn rewrite(from: &Path, to: &Path, change: impl FnOnce(&mut BTreeMap<String, Raw>)) {
    copy(from, to);
    for entry in fs::read_dir(to).unwrap() {
        let path = entry.unwrap().path();
        if path.to_str().unwrap().contains("model-")
            || path.ends_with("model.safetensors.index.json")
        {
            fs::remove_file(path).unwrap();
        }
    }
    let mut all = tensors(from);
    change(&mut all);
    write_tensors(&to.join("model.safetensors"), &all);
}

/// Changes a JSON file of a folder.
pub(crate) fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

pub(crate) fn options(source: &Path, out: &Path) -> ImportOptions {
    ImportOptions::new(source, out)
}

pub(crate) fn try_import(source: &Path, out: &Path) -> Result<Summary, ImportError> {
    import(&options(source, out), &mut |_, _, _| {})
}

/// Imports with no options and opens the result.
pub(crate) fn imported(source: &Path, out: &Path) -> Checkpoint {
    try_import(source, out).unwrap();
    Checkpoint::open(out).unwrap()
}
