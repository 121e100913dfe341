//! Writes a checkpoint: shards first, then pages and indexes, and the manifest last.
//!
//! [`Writer::create`] begins one, [`Writer::extend`] adds tiers to one that exists: what they need
//! stands in a folder of its own (`v2/` for `manifest.2.json`), so that no file that an earlier
//! manifest names is touched, and every earlier manifest still opens.
//!
//! Invariants: a file appears under its name only when it is complete and synced; a manifest
//! appears when everything that it names is on disk, and only if there is none of its number;
//! nothing but the leftovers of an interrupted writer is ever overwritten. Memory is bounded by
//! what the caller hands over at once.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use lite_llm_kernels::{DETERMINISM_VERSION, dtype::DType};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    Checkpoint, CheckpointError, DATA_ALIGN, FORMAT_VERSION,
    index::{DenseIndex, FileRef, GroupPage, Hash, LayerShard, Section, Shard, TierIndex},
    layout::{Part, SectionSpec, TensorSpec, padding},
    manifest::{Manifest, TextFiles, TierRef, manifest_name},
    source::Files,
};
use crate::{config::ModelConfig, tier::TierConfig};

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
    /// What it extends.
    parent: Option<Manifest>,
    /// Folder of the files that it writes, with a `/`; empty for the first manifest.
    folder: String,
    shards: BTreeMap<Part, Shard>,
    /// The mark, locked as long as this writer lives.
    _lock: File,
}

/// Receives the bytes of one tensor, in as many pieces as suits the caller.
#[derive(Debug)]
pub struct TensorSink<'a> {
    file: &'a mut File,
    path: &'a str,
    hasher: &'a mut blake3::Hasher,
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
        if dir.exists() && !dir.is_dir() {
            return Err(occupied("is a file"));
        }
        fs::create_dir_all(dir).map_err(io("create"))?;
        let files = Files::dir(dir)?;
        let unfinished = dir.join(STAGING_MARK).exists();
        if files.holds_checkpoint()? {
            return Err(occupied("already holds a checkpoint"));
        }
        if !unfinished && fs::read_dir(dir).map_err(io("list"))?.next().is_some() {
            return Err(occupied("is not empty"));
        }
        let lock = lock(dir)?;
        // Another import may have ended since.
        if files.holds_checkpoint()? {
            return Err(occupied("already holds a checkpoint"));
        }
        remove_leftovers(dir).map_err(io("remove the leftovers of an unfinished import"))?;
        Ok(Self {
            dir: dir.to_owned(),
            config: config.clone(),
            dtype,
            parent: None,
            folder: String::new(),
            shards: BTreeMap::new(),
            _lock: lock,
        })
    }

    /// Begins to add tiers to the checkpoint in a folder: behind its tiers, or in the place of none.
    /// Only the parts of these tiers ([`Part::of_tier`]) are to be written. The folder's highest
    /// manifest is extended, whatever is open elsewhere.
    pub fn extend(dir: &Path, tiers: &[TierConfig]) -> Result<Self, CheckpointError> {
        let extended = |tiers: &[TierConfig]| -> Result<_, CheckpointError> {
            let parent = Checkpoint::open(dir)?.manifest().clone();
            let mut config = parent.model.clone();
            let Some(moe) = &mut config.moe else {
                let location = dir.display().to_string();
                return Err(CheckpointError::Absent { location, what: "sparse layers".into() });
            };
            moe.tiers.extend_from_slice(tiers);
            let path = manifest_name(parent.number + 1);
            config.check().map_err(|source| CheckpointError::Config { path, source })?;
            Ok((parent, config))
        };
        // A mistake leaves no mark; and what is highest is asked again under the lock.
        extended(tiers)?;
        let lock = lock(dir)?;
        let (parent, config) = extended(tiers)?;
        let number = parent.number + 1;
        // Nobody names these: a writer of this number was interrupted.
        let folder = format!("v{number}/");
        match fs::remove_dir_all(dir.join(&folder)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(CheckpointError::io(folder, "remove the leftovers in")(e));
            }
            _ => {}
        }
        Ok(Self {
            dir: dir.to_owned(),
            config,
            dtype: parent.dtype,
            parent: Some(parent),
            folder,
            shards: BTreeMap::new(),
            _lock: lock,
        })
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
        let path = format!("{}{}", self.folder, part.path(&self.config));
        let specs: Vec<_> = part.sections(&self.config, self.dtype).collect();
        let header = header(&specs);
        let (mut file, staging) = self.create_staging(&path)?;
        let io = |action| CheckpointError::io(&path, action);
        file.write_all(&header).map_err(io("write"))?;
        let mut at = header.len() as u64;
        let mut sections = Vec::with_capacity(specs.len());
        for spec in &specs {
            let offset = at.next_multiple_of(spec.align);
            file.write_all(&vec![0; (offset - at) as usize]).map_err(io("write"))?;
            at = offset;
            let mut hasher = blake3::Hasher::new();
            for tensor in &spec.tensors {
                let bytes = tensor.bytes().expect("ModelConfig::check bounds every width");
                let mut sink =
                    TensorSink { file: &mut file, path: &path, hasher: &mut hasher, left: bytes };
                fill(tensor, &mut sink)?;
                assert_eq!(sink.left, 0, "{} gets all its bytes", tensor.name);
                at += bytes;
            }
            sections.push(Section {
                name: spec.name.clone(),
                offset,
                bytes: at - offset,
                blake3: Hash(*hasher.finalize().as_bytes()),
                stored: None,
            });
        }
        self.commit(file, &staging, &path)?;
        let shard = Shard {
            path,
            bytes: at,
            header_bytes: header.len() as u64,
            header_blake3: Hash::of(&header),
            sections,
        };
        self.shards.insert(part, shard);
        Ok(())
    }

    /// Writes text files, indexes and, last, the manifest. Returns the checkpoint's root hash. An
    /// extension keeps the text files of what it extends, and `text` says nothing.
    ///
    /// # Panics
    /// If a part that is to be written was not.
    pub fn finish(mut self, text: &Text) -> Result<Hash, CheckpointError> {
        let parent = self.parent.take();
        let (dense, text, mut tiers) = match &parent {
            Some(parent) => (parent.dense.clone(), parent.text.clone(), parent.tiers.clone()),
            None => (self.write_dense()?, self.write_text(text)?, Vec::new()),
        };
        let all = self.config.moe.as_ref().map_or(vec![], |moe| moe.tiers.clone());
        for (tier, config) in all.iter().enumerate().skip(tiers.len()) {
            tiers.push(TierRef { id: config.id.clone(), index: self.write_tier(tier, config)? });
        }
        let number = parent.as_ref().map_or(1, |parent| parent.number + 1);
        let manifest = Manifest {
            format: FORMAT_VERSION,
            determinism: DETERMINISM_VERSION,
            root: Hash([0; 32]),
            number,
            parent: parent.as_ref().map(|parent| parent.root),
            dtype: self.dtype,
            model: self.config.clone(),
            dense,
            tiers,
            text,
            state: None,
        };
        let (bytes, root) = manifest.to_bytes();
        self.sync_folders()?;
        self.write_manifest(&manifest_name(number), &bytes)?;
        let mark = self.dir.join(STAGING_MARK);
        fs::remove_file(&mark)
            .map_err(CheckpointError::io(mark.display().to_string(), "remove"))?;
        Ok(root)
    }

    fn write_dense(&mut self) -> Result<FileRef, CheckpointError> {
        let layers: Vec<usize> = (0..self.config.layers.len()).collect();
        let dense =
            DenseIndex { model: self.take(Part::Model), layers: self.layers(&layers, Part::Layer) };
        self.write_json("dense/index.json", &dense)
    }

    fn write_tier(&mut self, tier: usize, config: &TierConfig) -> Result<FileRef, CheckpointError> {
        let sparse: Vec<usize> = self.config.sparse_layers().collect();
        let mut pages = Vec::new();
        for group in 0..config.groups {
            let layers = self.layers(&sparse, |layer| Part::Group { tier, layer, group });
            let page = GroupPage { tier: config.id.clone(), group, layers };
            let path = format!("{}tiers/{}/g{group:05}.json", self.folder, config.id);
            pages.push(self.write_json(&path, &page)?);
        }
        let routers = self.layers(&sparse, |layer| Part::TierRouter { tier, layer });
        let index = TierIndex { tier: config.id.clone(), routers, pages };
        self.write_json(&format!("{}tiers/{}/index.json", self.folder, config.id), &index)
    }

    fn write_text(&self, text: &Text) -> Result<TextFiles, CheckpointError> {
        let tokenizer = self.write_file("tokenizer.json", &text.tokenizer_json)?;
        let chat_template = match &text.chat_template {
            Some(template) => Some(self.write_file("chat_template.jinja", template.as_bytes())?),
            None => None,
        };
        Ok(TextFiles { tokenizer, chat_template, special_tokens: text.special_tokens.clone() })
    }

    /// Makes the manifest appear, whole and only if there is none of its name.
    fn write_manifest(&self, path: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (mut file, staging) = self.create_staging(path)?;
        let io = |action| CheckpointError::io(path, action);
        file.write_all(bytes).map_err(io("write"))?;
        file.sync_all().map_err(io("sync"))?;
        let linked = match fs::hard_link(&staging, self.dir.join(path)) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Err(e),
            // A file system without links: what is torn by a crash is refused by its hash.
            Err(_) => File::create_new(self.dir.join(path)).and_then(|mut file| {
                file.write_all(bytes)?;
                file.sync_all()
            }),
            Ok(()) => Ok(()),
        };
        match linked {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(CheckpointError::Raced {
                    location: self.dir.display().to_string(),
                    manifest: path.into(),
                });
            }
            linked => linked.map_err(io("create"))?,
        }
        fs::remove_file(&staging).map_err(io("remove the staging name of"))?;
        sync_folder(&self.dir)
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
        let top = self.dir.join(&self.folder);
        let mut folders = vec![top.join("dense"), top.clone(), self.dir.clone()];
        if let Some(moe) = &self.config.moe {
            folders.extend(moe.tiers.iter().map(|t| top.join("tiers").join(t.id.as_str())));
            folders.push(top.join("tiers"));
        }
        folders.iter().filter(|dir| dir.exists()).try_for_each(|dir| sync_folder(dir))
    }
}

fn sync_folder(dir: &Path) -> Result<(), CheckpointError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(CheckpointError::io(dir.display().to_string(), "sync"))
}

/// Makes the mark of a folder that is being written to, and locks it: one writer at a time, and none
/// that died is in the way.
fn lock(dir: &Path) -> Result<File, CheckpointError> {
    let mark = dir.join(STAGING_MARK);
    let io = |action| CheckpointError::io(mark.display().to_string(), action);
    loop {
        let file = File::options().create(true).append(true).open(&mark).map_err(io("create"))?;
        // A file system without locks has none to be in the way either.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let reason = "is being written to by another process";
            return Err(CheckpointError::Occupied { dir: dir.to_owned(), reason });
        }
        // Whoever held it may have removed it since it was opened: then it locks nothing.
        let (ours, there) = (file.metadata().map_err(io("look at"))?, fs::metadata(&mark));
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
}

/// Removes what an interrupted writer left.
fn remove_leftovers(dir: &Path) -> std::io::Result<()> {
    for name in ["dense", "tiers"] {
        match fs::remove_dir_all(dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    for name in ["tokenizer.json", "chat_template.jinja", &manifest_name(1)] {
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
fn header(specs: &[SectionSpec]) -> Vec<u8> {
    let mut map = Map::new();
    let version = FORMAT_VERSION.to_string();
    map.insert("__metadata__".into(), json!({ "format": "lite-llm", "version": version }));
    let mut at = 0u64;
    for spec in specs {
        let begin = at.next_multiple_of(spec.align);
        if let Some((name, bytes)) = padding(at, begin) {
            let entry = json!({ "dtype": "U8", "shape": [bytes], "data_offsets": [at, begin] });
            map.insert(name, entry);
            at = begin;
        }
        for tensor in &spec.tensors {
            let end = at + tensor.bytes().expect("ModelConfig::check bounds every width");
            let dtype = match tensor.dtype {
                DType::F32 => "F32",
                DType::Bf16 => "BF16",
                DType::Int8 | DType::Int6 | DType::Int4 => "U8",
            };
            let entry = json!({
                "dtype": dtype, "shape": tensor.stored_dims(), "data_offsets": [at, end]
            });
            map.insert(tensor.name.clone(), entry);
            at = end;
        }
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    let padded = (8 + text.len() as u64).next_multiple_of(DATA_ALIGN) - 8;
    text.resize(padded as usize, b' ');
    [&padded.to_le_bytes()[..], &text].concat()
}
