//! Import: a Hugging Face folder, a GGUF file, or a checkpoint of another format, becomes a native
//! checkpoint.
//!
//! # Contract
//! - **Nothing is written before everything was looked at**: the configuration is understood
//!   ([`hf_config`]), every tensor is found with the right shape and format (`names`), none is
//!   left over, and the tokenizer loads. Then weights are copied, piece by piece.
//! - **Memory** does not grow with the model or with its largest tensor: a few buffers of
//!   [`PIECE_BYTES`], and with compression one expert per core.
//! - **Values** are those of the source, bit for bit, unless `dtype` asks for rounding; what becomes
//!   of GGUF's blocks is said in [`gguf`]. Gates, norms and biases become f32, which is exact from
//!   every source format. Weights that are NaN or infinite are refused in every format.
//! - **Checkpoints** as sources are converted, so that tokenizer, template and tiers stay. A damaged
//!   tensor ends the conversion where it is met, and one tensor of the source is mapped at a time.
//! - **Interruption** leaves a place without a manifest: nothing opens. The next import into a
//!   folder starts over; the next import of the same into a store goes on behind its last shard.
//! - **Distrust.** A folder or file is data from strangers: sizes are checked against files before use,
//!   nothing in it is executed, and no name in it reaches another folder.

mod copy;
pub mod gguf;
pub mod hf_config;
pub mod hf_names;
mod hf_rope;
mod hf_tensors;
mod keys;
mod names;
mod native;
mod pack;
pub mod random;
mod tensors;
pub mod text;
pub mod tiers;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use lite_llm_kernels::dtype::DType;

use crate::{
    checkpoint::{
        Checkpoint, CheckpointError,
        archive::Archive,
        codec::{Compression, Packed},
        index::Hash,
        inspect::{Summary, inspect},
        layout::Part,
        writer::Writer,
    },
    config::ModelConfig,
};

use pack::NotFinite;
use tensors::SourceDType;
pub use tiers::{Routes, TierCut};

/// Bytes of a tensor that are in memory at once.
pub const PIECE_BYTES: usize = 8 << 20;

/// What to import, and how.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The Hugging Face folder, a GGUF file, or a checkpoint.
    pub source: PathBuf,
    /// The checkpoint at `source`, if that is a URL, which this crate cannot open.
    pub opened: Option<Arc<Checkpoint>>,
    /// Where the checkpoint is to be.
    pub out: Destination,
    /// Format of projections and experts, and with them of embeddings; by default the source's
    /// own, widened to f32 where it is f16 or mixed; of GGUF's Q8_0 int8, of Q4_0 int4. Needed to convert a checkpoint.
    pub dtype: Option<DType>,
    /// Cut the experts into tiers and groups; by default one tier of one group.
    pub tiers: Option<TierCut>,
    /// How many tiers, groups and experts a token goes to.
    pub routes: Option<Routes>,
    /// Compress experts.
    pub compress: Option<Compression>,
}

/// Where a checkpoint is to be.
#[derive(Debug, Clone)]
pub enum Destination {
    /// A folder: new, empty, or left by an interrupted import.
    Folder(PathBuf),
    /// A prefix of an object store: empty, or left by an interrupted import of the same.
    Store(Arc<dyn Archive>),
}

impl From<&Path> for Destination {
    fn from(folder: &Path) -> Self {
        Self::Folder(folder.to_owned())
    }
}

impl ImportOptions {
    /// Imports a source as it is.
    pub fn new(source: impl Into<PathBuf>, out: impl Into<Destination>) -> Self {
        let (source, out) = (source.into(), out.into());
        let (dtype, tiers, routes, compress) = (None, None, None, None);
        Self { source, opened: None, out, dtype, tiers, routes, compress }
    }

    /// Begins to write the checkpoint.
    fn writer(&self, config: &ModelConfig, dtype: DType) -> Result<Writer, ImportError> {
        let writer = match &self.out {
            Destination::Folder(folder) => Writer::create(folder, config, dtype)?,
            Destination::Store(archive) => {
                Writer::upload(archive.clone(), self.stamp(config, dtype)?, config, dtype)?
            }
        };
        Ok(writer.compress(self.compress))
    }

    /// Opens what was written.
    fn open(&self) -> Result<Checkpoint, CheckpointError> {
        match &self.out {
            Destination::Folder(folder) => Checkpoint::open(folder),
            Destination::Store(archive) => Checkpoint::open_archive(archive.clone(), None),
        }
    }

    /// Hash of all that decides which bytes are written, as far as it can be told without reading
    /// the weights: an import that was interrupted is continued by one of the same stamp.
    fn stamp(&self, config: &ModelConfig, dtype: DType) -> Result<Hash, ImportError> {
        let io = |action| ImportError::io(&self.source, action);
        let mut files = vec![self.source.clone()];
        if self.opened.is_some() {
            files.clear();
        } else if self.source.is_dir() {
            let entries = fs::read_dir(&self.source).map_err(io("list"))?;
            files = entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<Result<_, _>>()
                .map_err(io("list"))?;
            files.sort();
        }
        let mut text = format!(
            "{} {dtype} {:?}\n",
            env!("CARGO_PKG_VERSION"),
            self.compress.map(|compression| compression.level)
        );
        if let Some(checkpoint) = &self.opened {
            text.push_str(&format!("{}\n", checkpoint.manifest().root));
        }
        for file in files {
            let metadata = fs::metadata(&file).map_err(ImportError::io(&file, "look at"))?;
            let changed = metadata.modified().ok();
            let changed = changed.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            let name = file.file_name().unwrap_or_default();
            text.push_str(&format!("{name:?} {} {changed:?}\n", metadata.len()));
        }
        let config = serde_json::to_string(config).expect("a configuration has only string keys");
        text.push_str(&config);
        Ok(Hash::of(text.as_bytes()))
    }
}

/// Why a folder was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A key of a JSON file.
    #[error("{path}: {key} is {found}; {expected}")]
    Key {
        /// Which file.
        path: String,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A class of model that is not known here.
    #[error(
        "{path}: architecture {found} is not known; {} are: convert the model to one of them, or ask for this one",
        hf_config::KNOWN
    )]
    Architecture {
        /// Which file.
        path: String,
        /// The class.
        found: String,
    },
    /// The configuration describes no model that can run.
    #[error("{path}: {source}")]
    Config {
        /// Which file.
        path: String,
        /// What is wrong.
        source: crate::config::ConfigError,
    },
    /// A file that is not what it should be.
    #[error("{path}: {found}; {expected}")]
    File {
        /// Which file.
        path: String,
        /// What was found.
        found: String,
        /// What was expected, and what to do.
        expected: String,
    },
    /// A tensor that is not what it should be.
    #[error("{path}: tensor {tensor}: {found}; {expected}")]
    Tensor {
        /// Which file, or the folder if none holds the tensor.
        path: String,
        /// Which tensor.
        tensor: String,
        /// What was found.
        found: String,
        /// What was expected, and what to do.
        expected: String,
    },
    /// `--tiers` or `--routes` that does not fit the model.
    #[error("{option} {text:?}: {reason}")]
    Cut {
        /// Which option.
        option: &'static str,
        /// Its text.
        text: String,
        /// What does not fit, and what would.
        reason: String,
    },
    /// The checkpoint could not be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl ImportError {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Io { path, action, source }
    }

    fn file(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        let path = path.display().to_string();
        Self::File { path, found: found.into(), expected: expected.into() }
    }
}

/// A weight that is NaN or infinite. It would fail every request that meets it, so it is refused
/// before it is stored, in every format.
fn not_finite(path: String, tensor: String, at: NotFinite) -> ImportError {
    let NotFinite { row, col, value } = at;
    ImportError::Tensor {
        path,
        tensor,
        found: format!("the weight in row {row}, column {col} is {value}"),
        expected: "finite weights; the source is damaged or its training failed".into(),
    }
}

/// Imports a folder or file. `progress` hears bytes done, bytes in all, and the shard at hand.
pub fn import(
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<Summary, ImportError> {
    import_measured(options, progress).map(|(summary, _)| summary)
}

/// The same, with what compression did.
pub fn import_measured(
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<(Summary, Packed), ImportError> {
    if native::is_checkpoint(options) {
        return native::convert(options, progress);
    }
    let source = &options.source;
    let (mut config, tensors, text) = match source.is_dir() {
        true => {
            let config = hf_config::read(source)?;
            (config, hf_tensors::open(source)?, text::read(source)?)
        }
        false => gguf::open(source)?,
    };
    text::settle_ends(source, &mut config, &text);
    tiers::cut(&mut config, options.tiers.as_ref(), options.routes.as_ref())?;
    check(source, &config)?;
    config.tied_embeddings = names::tied(&tensors, &config)?;

    let mut names = names::Names::new(&tensors, &config);
    let mut plan = Vec::new();
    let mut formats = Vec::new();
    for part in Part::all(&config) {
        // Any format will do here: names and shapes do not depend on it.
        for spec in part.tensors(&config, DType::F32) {
            let origin = names.origin(part, &spec)?;
            if names::follows_model_dtype(&spec.name) {
                formats.push((origin.dtype(), origin.bytes()));
            }
            plan.push(origin);
        }
    }
    names.check_all_used()?;
    let total = plan.iter().map(|origin| origin.bytes()).sum();

    let dtype = options.dtype.unwrap_or_else(|| own_dtype(&formats));
    let mut writer = options.writer(&config, dtype)?;
    let mut copier = copy::Copier::new(&tensors);
    let mut plan = plan.iter();
    let mut done = 0;
    for part in Part::all(&config) {
        let path = part.path(&config);
        if writer.is_written(part)? {
            let tensors = part.tensors(&config, DType::F32).count();
            done += plan.by_ref().take(tensors).map(|origin| origin.bytes()).sum::<u64>();
            progress(done, total, &path);
            continue;
        }
        writer.write_part(part, |spec, sink| {
            let origin = plan.next().expect("the plan has an origin for every tensor");
            progress(done, total, &path);
            copier.copy(origin, spec, sink)?;
            done += origin.bytes();
            Ok::<_, ImportError>(())
        })?;
    }
    progress(done, total, "the manifest");
    let packed = writer.packed();
    writer.finish(&text)?;
    Ok((inspect(&options.open()?)?, packed))
}

/// The format for weights that come in these, of so many bytes each: one that loses nothing or,
/// where most are in blocks, the one of most of them.
fn own_dtype(formats: &[(SourceDType, u64)]) -> DType {
    let any = |dtype| formats.iter().any(|(found, _)| *found == dtype);
    let weights = |wanted: &dyn Fn(SourceDType) -> bool| {
        let of = |(dtype, bytes): &(SourceDType, u64)| {
            let (values, block_bytes) = dtype.block();
            if wanted(*dtype) { bytes / block_bytes as u64 * values as u64 } else { 0 }
        };
        formats.iter().map(of).sum::<u64>()
    };
    let (blocks, all) = (weights(&SourceDType::is_quantised), weights(&|_| true));
    if blocks > all / 2 {
        let fours = weights(&|dtype| dtype == SourceDType::Q4);
        if fours > blocks / 2 { DType::Int4 } else { DType::Int8 }
    } else if blocks > 0 || any(SourceDType::F32) || any(SourceDType::F16) {
        DType::F32
    } else {
        DType::Bf16
    }
}

fn check(source: &Path, config: &ModelConfig) -> Result<(), ImportError> {
    let path = match source.is_dir() {
        true => source.join(hf_config::CONFIG),
        false => source.to_owned(),
    };
    let path = path.display().to_string();
    config.check().map_err(|source| ImportError::Config { path, source })
}
