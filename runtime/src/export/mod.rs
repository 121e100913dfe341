//! Export: a checkpoint becomes a Hugging Face folder that transformers loads with equal logits.
//!
//! [`class`] finds the class that computes what the model does, and writes its `config.json`; here its
//! tensors are written, each read when its turn comes, under the names that
//! [`crate::import::hf_names`] knows the way back from. What was imported from such a folder comes back
//! with the same values; int8, int6 and int4 weights come as the f32 numbers that they stand for.
//!
//! Invariant: the folder appears under its name when it is whole; what is there is never overwritten.

pub mod class;

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use half::bf16;
use lite_llm_kernels::dtype::DType;
use serde_json::{Map, Value, json};

use self::class::Class;
use crate::{
    checkpoint::folder::sync_folder,
    checkpoint::{Checkpoint, CheckpointError},
    import::hf_names::parameters_of,
    train::{params::shapes, stored::Stored},
};

/// Bytes of a file of weights, as transformers cuts them.
pub const FILE_BYTES: u64 = 5_000_000_000;

/// Why a checkpoint was not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No class of transformers computes what the model does.
    #[error("{location}: no class of transformers computes this model: {reasons}")]
    Class {
        /// The checkpoint.
        location: String,
        /// Of each class what does not fit.
        reasons: String,
    },
    /// The folder to write is there.
    #[error("{0} is there already; name a folder that is not")]
    Exists(String),
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> ExportError {
    let path = path.display().to_string();
    move |source| ExportError::Io { path, action, source }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Class in transformers.
    pub architecture: &'static str,
    /// Format of the weights.
    pub dtype: DType,
    /// Bytes of weights.
    pub bytes: u64,
    /// Files of weights.
    pub files: usize,
}

/// A tensor of the folder.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Our parameters, one behind the other.
    from: Vec<String>,
}

impl Tensor {
    fn bytes(&self, dtype: DType) -> u64 {
        let values: u64 = self.shape.iter().map(|n| *n as u64).product();
        values * if dtype == DType::Bf16 { 2 } else { 4 }
    }
}

/// Writes a folder that is not there yet, in files of at most `file_bytes` (one tensor at least each).
/// `progress` hears bytes of weights done and in all.
pub fn export(
    checkpoint: &Checkpoint,
    out: &Path,
    file_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Exported, ExportError> {
    // `dir/` is `dir`: what is staged lies beside it, not in it.
    let out = &out.components().collect::<PathBuf>();
    if out.exists() {
        return Err(ExportError::Exists(out.display().to_string()));
    }
    let config = checkpoint.config();
    let class = Class::of(config)
        .map_err(|reasons| ExportError::Class { location: checkpoint.location(), reasons })?;
    let shapes = shapes(config);
    let tensors: Vec<Tensor> = class
        .tensors(config)
        .into_iter()
        .map(|name| {
            let from = parameters_of(config, &name).unwrap_or_default();
            let shape = from.first().and_then(|from| shapes.get(from)).cloned();
            Tensor { name, shape: shape.unwrap_or_default(), from }
        })
        .collect();
    let stored = Stored::new(checkpoint);
    let dtype = dtype(checkpoint, &stored, &tensors)?;
    let total = tensors.iter().map(|tensor| tensor.bytes(dtype)).sum();
    let mut files: Vec<Vec<&Tensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in &tensors {
        let bytes = tensor.bytes(dtype);
        if filled > 0 && filled + bytes > file_bytes {
            files.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        files.last_mut().into_iter().for_each(|file| file.push(tensor));
    }

    let staging = staging(out);
    if staging.exists() {
        fs::remove_dir_all(&staging).map_err(io(&staging, "remove"))?;
    }
    fs::create_dir_all(&staging).map_err(io(&staging, "create"))?;
    let mut map = Map::new();
    let mut done = 0;
    for (i, file) in files.iter().enumerate() {
        let name = match files.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        map.extend(file.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        write_weights(&staging.join(name), file, dtype, &stored, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?;
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = staging.join(name);
        let mut file = File::create(&path).map_err(io(&path, "create"))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io(&path, "write"))
    };
    let write_json = |name: &str, value: &Value| write(name, format!("{value:#}\n").as_bytes());
    if files.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        write_json("model.safetensors.index.json", &index)?;
    }
    write("tokenizer.json", &checkpoint.tokenizer_json()?)?;
    let mut of_text = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
        "model_max_length": config.context,
    });
    for (role, token) in &checkpoint.manifest().text.special_tokens {
        of_text[role] = json!(token);
    }
    write_json("tokenizer_config.json", &of_text)?;
    if let Some(template) = checkpoint.chat_template()? {
        write("chat_template.jinja", template.as_bytes())?;
    }
    let generation = json!({ "bos_token_id": config.bos_token, "eos_token_id": config.eos_tokens });
    write_json("generation_config.json", &generation)?;
    write_json("config.json", &class.config(config, dtype))?;
    sync_folder(&staging)?;
    fs::rename(&staging, out).map_err(io(out, "rename"))?;
    sync_folder(out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
    Ok(Exported { architecture: class.architecture(), dtype, bytes: total, files: files.len() })
}

fn staging(out: &Path) -> PathBuf {
    let mut staging = out.to_path_buf().into_os_string();
    staging.push(".staging");
    staging.into()
}

/// bf16 where the checkpoint is, and gates, norms and biases, which it keeps in f32, lose nothing by it.
fn dtype(
    checkpoint: &Checkpoint,
    stored: &Stored<'_>,
    tensors: &[Tensor],
) -> Result<DType, ExportError> {
    let tiers = checkpoint.config().moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let others = tiers.iter().any(|tier| tier.dtype.is_some_and(|dtype| dtype != DType::Bf16));
    if checkpoint.dtype() != DType::Bf16 || others {
        return Ok(DType::F32);
    }
    let small = |name: &&String| {
        let last = name.rsplit('.').next().unwrap_or(name);
        name.contains("router") || last.ends_with("norm") || last.ends_with("_bias")
    };
    for name in tensors.iter().flat_map(|tensor| &tensor.from).filter(small) {
        let exact = |x: f32| bf16::from_f32(x).to_f32().to_bits() == x.to_bits();
        if !stored.values(name)?.into_iter().all(exact) {
            return Ok(DType::F32);
        }
    }
    Ok(DType::Bf16)
}

fn write_weights(
    path: &Path,
    tensors: &[&Tensor],
    dtype: DType,
    stored: &Stored<'_>,
    wrote: &mut dyn FnMut(u64),
) -> Result<(), ExportError> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0;
    let shown = if dtype == DType::Bf16 { "BF16" } else { "F32" };
    for tensor in tensors {
        let end = at + tensor.bytes(dtype);
        let entry = json!({ "dtype": shown, "shape": tensor.shape, "data_offsets": [at, end] });
        header.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).map_err(io(path, "create"))?);
    let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(io(path, "write"));
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for tensor in tensors {
        for name in &tensor.from {
            let values = stored.values(name)?;
            match dtype {
                DType::Bf16 => {
                    let halves: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
                    write(bytemuck::cast_slice(&halves))?;
                }
                _ => write(bytemuck::cast_slice(&values))?,
            }
        }
        wrote(tensor.bytes(dtype));
    }
    let file = file.into_inner().map_err(|e| io(path, "write")(e.into_error()))?;
    file.sync_all().map_err(io(path, "sync"))
}
