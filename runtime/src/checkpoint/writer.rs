//! Writes a checkpoint: shards first, then pages and indexes, and the manifest last.
//!
//! Invariants: a file appears under its name only when it is complete and synced; the manifest is
//! renamed into place when everything that it names is on disk; nothing but the leftovers of an
//! interrupted writer is ever overwritten. Memory is bounded by what the caller hands over at once.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use lite_llm_kernels::{DETERMINISM_VERSION, dtype::DType};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    CheckpointError, DATA_ALIGN, FORMAT_VERSION,
    index::{DenseIndex, FileRef, GroupPage, Hash, LayerShard, Shard, TensorEntry, TierIndex},
    layout::{Part, TensorSpec},
    manifest::{MANIFEST, Manifest, TextFiles, TierRef},
};
use crate::config::ModelConfig;

/// File that marks a folder as being written to.
pub const STAGING_MARK: &str = "import.staging";
const STAGING_SUFFIX: &str = ".staging";

/// What is known about text when a checkpoint is written.
#[derive(Debug, Clone, Default)]
pub struct Text {
    /// Content of `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// Template of conversations.
    pub chat_template: Option<String>,
    /// Texts of the tokenizer's special tokens by name: `bos_token`, `eos_token`, ….
    pub special_tokens: BTreeMap<String, String>,
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    config: ModelConfig,
    dtype: DType,
    shards: BTreeMap<Part, Shard>,
}

/// Receives the bytes of one tensor, in as many pieces as suits the caller.
#[derive(Debug)]
pub struct TensorSink<'a> {
    file: &'a mut File,
    path: &'a str,
    hasher: blake3::Hasher,
    left: u64,
}

impl TensorSink<'_> {
    /// Appends bytes.
    ///
    /// # Panics
    /// If the tensor would get more bytes than its shape takes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        assert!(bytes.len() as u64 <= self.left, "a tensor gets the bytes of its shape");
        self.left -= bytes.len() as u64;
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(CheckpointError::io(self.path, "write"))
    }
}

impl Writer {
    /// Begins a checkpoint in a folder that is empty, new, or left by an interrupted writer.
    pub fn create(dir: &Path, config: &ModelConfig, dtype: DType) -> Result<Self, CheckpointError> {
        config.check().map_err(|source| CheckpointError::Config {
            path: dir.display().to_string(),
            source,
        })?;
        let io = |action| CheckpointError::io(dir.display().to_string(), action);
        let occupied = |reason| CheckpointError::Occupied { dir: dir.to_owned(), reason };
        if dir.exists() {
            if !dir.is_dir() {
                return Err(occupied("is a file"));
            }
            if dir.join(MANIFEST).exists() {
                return Err(occupied("already holds a checkpoint"));
            }
            if dir.join(STAGING_MARK).exists() {
                remove_leftovers(dir)
                    .map_err(io("remove the leftovers of an unfinished import"))?;
            } else if fs::read_dir(dir).map_err(io("list"))?.next().is_some() {
                return Err(occupied("is not empty"));
            }
        }
        fs::create_dir_all(dir).map_err(io("create"))?;
        let mark = dir.join(STAGING_MARK);
        fs::write(&mark, "a checkpoint is being written here\n")
            .map_err(CheckpointError::io(mark.display().to_string(), "write"))?;
        let config = config.clone();
        Ok(Self { dir: dir.to_owned(), config, dtype, shards: BTreeMap::new() })
    }

    /// The model that is being written.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Writes one shard. `fill` is called for every tensor in order and hands its bytes to the
    /// sink: packed for a matrix, little-endian f32 for a vector.
    ///
    /// # Panics
    /// If `fill` hands over fewer or more bytes than a tensor's shape takes.
    pub fn write_part<E: From<CheckpointError>>(
        &mut self,
        part: Part,
        mut fill: impl FnMut(&TensorSpec, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = part.path(&self.config);
        let specs: Vec<_> = part.tensors(&self.config, self.dtype).collect();
        let header = header(&specs);
        let (mut file, staging) = self.create_staging(&path)?;
        file.write_all(&header).map_err(CheckpointError::io(&path, "write"))?;
        let mut at = header.len() as u64;
        let mut tensors = Vec::with_capacity(specs.len());
        for spec in &specs {
            let bytes = spec.bytes().expect("ModelConfig::check bounds every width");
            let hasher = blake3::Hasher::new();
            let mut sink = TensorSink { file: &mut file, path: &path, hasher, left: bytes };
            fill(spec, &mut sink)?;
            assert_eq!(sink.left, 0, "{} gets all its bytes", spec.name);
            tensors.push(TensorEntry {
                name: spec.name.clone(),
                dtype: spec.dtype,
                shape: spec.dims(),
                offset: at,
                bytes,
                blake3: Hash(*sink.hasher.finalize().as_bytes()),
            });
            at += bytes;
        }
        self.commit(file, &staging, &path)?;
        let shard = Shard {
            path,
            bytes: at,
            header_bytes: header.len() as u64,
            header_blake3: Hash::of(&header),
            tensors,
        };
        self.shards.insert(part, shard);
        Ok(())
    }

    /// Writes text files, indexes and, last, the manifest. Returns the checkpoint's root hash.
    ///
    /// # Panics
    /// If a part of the model was not written.
    pub fn finish(mut self, text: &Text) -> Result<Hash, CheckpointError> {
        let layers: Vec<usize> = (0..self.config.layers.len()).collect();
        let sparse: Vec<usize> = self.config.sparse_layers().collect();
        let dense =
            DenseIndex { model: self.take(Part::Model), layers: self.layers(&layers, Part::Layer) };
        let dense = self.write_json("dense/index.json", &dense)?;

        let mut tiers = Vec::new();
        let tier_configs = self.config.moe.as_ref().map_or(vec![], |moe| moe.tiers.clone());
        for (tier, config) in tier_configs.into_iter().enumerate() {
            let mut pages = Vec::new();
            for group in 0..config.groups {
                let layers = self.layers(&sparse, |layer| Part::Group { tier, layer, group });
                let page = GroupPage { tier: config.id.clone(), group, layers };
                let path = format!("tiers/{}/g{group:05}.json", config.id);
                pages.push(self.write_json(&path, &page)?);
            }
            let routed = if config.groups > 1 { &sparse[..] } else { &[] };
            let routers = self.layers(routed, |layer| Part::GroupRouter { tier, layer });
            let index = TierIndex { tier: config.id.clone(), routers, pages };
            let index = self.write_json(&format!("tiers/{}/index.json", config.id), &index)?;
            tiers.push(TierRef { id: config.id, index });
        }

        let tokenizer = self.write_file("tokenizer.json", &text.tokenizer_json)?;
        let chat_template = match &text.chat_template {
            Some(template) => Some(self.write_file("chat_template.jinja", template.as_bytes())?),
            None => None,
        };
        let text = TextFiles::new(tokenizer, chat_template, text.special_tokens.clone());
        let manifest = Manifest {
            format: FORMAT_VERSION,
            determinism: DETERMINISM_VERSION,
            root: Hash([0; 32]),
            dtype: self.dtype,
            model: self.config.clone(),
            dense,
            tiers,
            text,
        };
        let (bytes, root) = manifest.to_bytes();
        self.sync_folders()?;
        self.write_file(MANIFEST, &bytes)?;
        sync_folder(&self.dir)?;
        let mark = self.dir.join(STAGING_MARK);
        fs::remove_file(&mark)
            .map_err(CheckpointError::io(mark.display().to_string(), "remove"))?;
        Ok(root)
    }

    fn take(&mut self, part: Part) -> Shard {
        let shard = self.shards.remove(&part);
        shard.unwrap_or_else(|| panic!("{part:?} was written before the checkpoint is finished"))
    }

    fn layers(&mut self, layers: &[usize], part: impl Fn(usize) -> Part) -> Vec<LayerShard> {
        let shard = |&layer: &usize| LayerShard { layer, shard: self.take(part(layer)) };
        layers.iter().map(shard).collect()
    }

    fn create_staging(&self, path: &str) -> Result<(File, PathBuf), CheckpointError> {
        let staging = self.dir.join(format!("{path}{STAGING_SUFFIX}"));
        let io = |action| CheckpointError::io(staging.display().to_string(), action);
        if let Some(parent) = staging.parent() {
            fs::create_dir_all(parent).map_err(io("create the folder of"))?;
        }
        let file = File::create(&staging).map_err(io("create"))?;
        Ok((file, staging))
    }

    fn commit(&self, file: File, staging: &Path, path: &str) -> Result<(), CheckpointError> {
        file.sync_all().map_err(CheckpointError::io(path, "sync"))?;
        fs::rename(staging, self.dir.join(path)).map_err(CheckpointError::io(path, "rename"))
    }

    fn write_file(&self, path: &str, bytes: &[u8]) -> Result<FileRef, CheckpointError> {
        let (mut file, staging) = self.create_staging(path)?;
        file.write_all(bytes).map_err(CheckpointError::io(path, "write"))?;
        self.commit(file, &staging, path)?;
        Ok(FileRef { path: path.into(), bytes: bytes.len() as u64, blake3: Hash::of(bytes) })
    }

    fn write_json(&self, path: &str, value: &impl Serialize) -> Result<FileRef, CheckpointError> {
        let bytes = serde_json::to_vec(value).expect("an index has only string keys");
        self.write_file(path, &bytes)
    }

    fn sync_folders(&self) -> Result<(), CheckpointError> {
        let mut folders = vec![self.dir.join("dense"), self.dir.clone()];
        if let Some(moe) = &self.config.moe {
            folders.extend(moe.tiers.iter().map(|t| self.dir.join("tiers").join(t.id.as_str())));
            folders.push(self.dir.join("tiers"));
        }
        folders.iter().filter(|dir| dir.exists()).try_for_each(|dir| sync_folder(dir))
    }
}

fn sync_folder(dir: &Path) -> Result<(), CheckpointError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(CheckpointError::io(dir.display().to_string(), "sync"))
}

/// Removes what an interrupted writer left, and the mark last, so that it can be interrupted too.
fn remove_leftovers(dir: &Path) -> std::io::Result<()> {
    for name in ["dense", "tiers"] {
        match fs::remove_dir_all(dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    for name in ["tokenizer.json", "chat_template.jinja", MANIFEST] {
        for name in [name.to_owned(), format!("{name}{STAGING_SUFFIX}")] {
            match fs::remove_file(dir.join(name)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The safetensors header: length, JSON, and blanks up to the alignment of data.
fn header(specs: &[TensorSpec]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "lite-llm", "version": "1" }));
    let mut at = 0;
    for spec in specs {
        let end = at + spec.bytes().expect("ModelConfig::check bounds every width");
        let dtype = match spec.dtype {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::Int8 | DType::Int6 | DType::Int4 => "U8",
        };
        let entry =
            json!({ "dtype": dtype, "shape": spec.stored_dims(), "data_offsets": [at, end] });
        map.insert(spec.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    let padded = (8 + text.len() as u64).next_multiple_of(DATA_ALIGN) - 8;
    text.resize(padded as usize, b' ');
    [&padded.to_le_bytes()[..], &text].concat()
}
