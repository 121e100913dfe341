//! Writes a checkpoint: shards first, then pages and indexes, and the manifest last.
//!
//! [`Writer::create`] begins one in a folder, [`Writer::upload`] in an object store;
//! [`Writer::extend`] adds tiers to one that exists: what they need stands in a folder of its own
//! (`v2/` for `manifest.2.json`), so that no file that an earlier manifest names is touched, and
//! every earlier manifest still opens.
//!
//! Invariants: a file appears under its name only when it is complete and synced; a manifest
//! appears when everything that it names is there, and only if there is none of its number;
//! nothing but the leftovers of an interrupted writer is ever overwritten. Memory is bounded by
//! what the caller hands over at once, and with compression by a few experts.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use lite_llm_kernels::{DETERMINISM_VERSION, dtype::DType};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    Checkpoint, CheckpointError, DATA_ALIGN, FORMAT_VERSION,
    archive::Archive,
    codec::{Compression, Packed, ZSTD},
    folder::{Folder, Staged},
    index::{DenseIndex, FileRef, GroupPage, Hash, LayerShard, Section, Shard, Stored, TierIndex},
    layout::{Part, SectionSpec, TensorSpec, padding},
    manifest::{Manifest, TextFiles, TierRef, manifest_name},
    upload::Upload,
};
use crate::{config::ModelConfig, tier::TierConfig};

/// File that marks a folder or prefix as being written to.
pub const STAGING_MARK: &str = "import.staging";

/// Bytes of sections that wait to be compressed together, beyond the first.
const BATCH_BYTES_MAX: usize = 256 << 20;
/// What the padding behind a compressed section can add to a header.
const PADDING_ENTRY_BYTES: usize = 192;

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
    target: Target,
    config: ModelConfig,
    dtype: DType,
    /// What it extends.
    parent: Option<Manifest>,
    /// Folder of the files that it writes, with a `/`; empty for the first manifest.
    folder: String,
    shards: BTreeMap<Part, Shard>,
    compression: Option<Compression>,
    packed: Packed,
}

/// Where files go.
#[derive(Debug)]
enum Target {
    Folder(Folder),
    Store(Upload),
}

/// Receives the bytes of one tensor, in as many pieces as suits the caller.
#[derive(Debug)]
pub struct TensorSink<'a> {
    out: Out<'a>,
    path: &'a str,
    left: u64,
}

/// Where a sink's bytes go.
#[derive(Debug)]
enum Out<'a> {
    File(&'a mut File, &'a mut blake3::Hasher),
    /// A section that will be compressed.
    Memory(&'a mut Vec<u8>),
}

impl TensorSink<'_> {
    /// Appends bytes.
    ///
    /// # Panics
    /// If the tensor would get more bytes than its shape takes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        assert!(bytes.len() as u64 <= self.left, "a tensor gets the bytes of its shape");
        self.left -= bytes.len() as u64;
        match &mut self.out {
            Out::Memory(memory) => {
                memory.extend_from_slice(bytes);
                Ok(())
            }
            Out::File(file, hasher) => {
                hasher.update(bytes);
                file.write_all(bytes).map_err(CheckpointError::io(self.path, "write"))
            }
        }
    }
}

impl Writer {
    /// Begins a checkpoint in a folder that is empty, new, or left by an interrupted writer.
    pub fn create(dir: &Path, config: &ModelConfig, dtype: DType) -> Result<Self, CheckpointError> {
        check(config, || dir.display().to_string())?;
        Ok(Self::new(Target::Folder(Folder::create(dir)?), config.clone(), dtype))
    }

    /// Begins a checkpoint in an object store, below a prefix that is empty or was left by an
    /// interrupted import of the same: `stamp` is the hash of all that decides what is written.
    /// [`Writer::is_written`] tells which shards an interrupted import brought there.
    pub fn upload(
        archive: Arc<dyn Archive>,
        stamp: Hash,
        config: &ModelConfig,
        dtype: DType,
    ) -> Result<Self, CheckpointError> {
        check(config, || archive.location())?;
        Ok(Self::new(Target::Store(Upload::begin(archive, stamp)?), config.clone(), dtype))
    }

    fn new(target: Target, config: ModelConfig, dtype: DType) -> Self {
        Self {
            target,
            config,
            dtype,
            parent: None,
            folder: String::new(),
            shards: BTreeMap::new(),
            compression: None,
            packed: Packed::default(),
        }
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
            check(&config, || path)?;
            Ok((parent, config))
        };
        // A mistake leaves no mark; and what is highest is asked again under the lock.
        extended(tiers)?;
        let target = Folder::lock(dir)?;
        let (parent, config) = extended(tiers)?;
        // Nobody names these: a writer of this number was interrupted.
        let folder = format!("v{}/", parent.number + 1);
        target.remove(&folder)?;
        let new = Self::new(Target::Folder(target), config, parent.dtype);
        Ok(Self { parent: Some(parent), folder, ..new })
    }

    /// Compresses the sections of experts, each by itself.
    pub fn compress(self, compression: Option<Compression>) -> Self {
        Self { compression, ..self }
    }

    /// The model that is being written.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What compression did so far.
    pub fn packed(&self) -> Packed {
        self.packed
    }

    /// Whether an interrupted import wrote this part already: then it is not to be written again.
    pub fn is_written(&mut self, part: Part) -> Result<bool, CheckpointError> {
        let path = self.path_of(part);
        let Target::Store(upload) = &mut self.target else { return Ok(false) };
        let Some(shard) = upload.uploaded(&path)? else { return Ok(false) };
        // An entry that another version or hand wrote is as good as none.
        let good = shard.check(&path, part, &self.config, self.dtype).is_ok();
        if good {
            self.shards.insert(part, shard);
        }
        Ok(good)
    }

    fn path_of(&self, part: Part) -> String {
        format!("{}{}", self.folder, part.path(&self.config))
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
        let path = self.path_of(part);
        let specs: Vec<_> = part.sections(&self.config, self.dtype).collect();
        let compression = self.compression.filter(|_| matches!(part, Part::Group { .. }));
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let mut staged = self.stage(&path)?;
        let header_bytes = header_room(&specs, compression.is_some());
        let mut shard = ShardWriter {
            file: &mut staged.file,
            path: &path,
            at: header_bytes,
            sections: Vec::with_capacity(specs.len()),
        };
        shard.seek()?;
        let mut waiting: Vec<(&SectionSpec, Vec<u8>)> = Vec::new();
        for (i, spec) in specs.iter().enumerate() {
            match compression.filter(|_| is_expert(spec)) {
                None => shard.write(spec, &mut fill)?,
                Some(compression) => {
                    waiting.push((spec, shard.collect(spec, &mut fill)?));
                    let bytes: usize = waiting.iter().map(|(_, bytes)| bytes.len()).sum();
                    let last = i + 1 == specs.len();
                    if last || waiting.len() >= threads || bytes >= BATCH_BYTES_MAX {
                        let (specs, sections): (Vec<_>, Vec<_>) = waiting.drain(..).unzip();
                        let packed =
                            compression.pack_all(&path, threads, &sections, &mut self.packed)?;
                        for ((spec, bytes), packed) in specs.iter().zip(&sections).zip(packed) {
                            shard.write_packed(spec, bytes, packed)?;
                        }
                    }
                }
            }
        }
        // Experts are a shard's last sections, so none waits here, and sections are in their order.
        assert!(waiting.is_empty(), "the last section of a group is an expert");
        let ShardWriter { at, sections, .. } = shard;
        let header = header(&specs, &sections, header_bytes);
        staged.file.write_all_at(&header, 0).map_err(CheckpointError::io(&path, "write"))?;
        let shard =
            Shard { path, bytes: at, header_bytes, header_blake3: Hash::of(&header), sections };
        match &mut self.target {
            Target::Folder(folder) => folder.commit(staged, &shard.path)?,
            Target::Store(upload) => upload.commit(staged, &shard)?,
        }
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
        let path = manifest_name(number);
        let folders = self.folders();
        match self.target {
            Target::Folder(folder) => folder.finish(&folders, &path, &bytes)?,
            Target::Store(upload) => upload.finish(&path, &bytes)?,
        }
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

    fn take(&mut self, part: Part) -> Shard {
        let shard = self.shards.remove(&part);
        shard.unwrap_or_else(|| panic!("{part:?} was written before the checkpoint is finished"))
    }

    fn layers(&mut self, layers: &[usize], part: impl Fn(usize) -> Part) -> Vec<LayerShard> {
        let shard = |&layer: &usize| LayerShard { layer, shard: self.take(part(layer)) };
        layers.iter().map(shard).collect()
    }

    fn stage(&self, path: &str) -> Result<Staged, CheckpointError> {
        match &self.target {
            Target::Folder(folder) => folder.stage(path),
            Target::Store(upload) => upload.stage(),
        }
    }

    fn write_file(&self, path: &str, bytes: &[u8]) -> Result<FileRef, CheckpointError> {
        match &self.target {
            Target::Folder(folder) => {
                let mut staged = folder.stage(path)?;
                staged.file.write_all(bytes).map_err(CheckpointError::io(path, "write"))?;
                folder.commit(staged, path)?;
            }
            Target::Store(upload) => upload.write(path, bytes)?,
        }
        Ok(FileRef { path: path.into(), bytes: bytes.len() as u64, blake3: Hash::of(bytes) })
    }

    fn write_json(&self, path: &str, value: &impl Serialize) -> Result<FileRef, CheckpointError> {
        let bytes = serde_json::to_vec(value).expect("an index has only string keys");
        self.write_file(path, &bytes)
    }

    /// Folders on disk of the files that were written.
    fn folders(&self) -> Vec<PathBuf> {
        let Target::Folder(folder) = &self.target else { return vec![] };
        let top = folder.dir().join(&self.folder);
        let mut folders = vec![top.join("dense"), top.clone(), folder.dir().to_owned()];
        if let Some(moe) = &self.config.moe {
            folders.extend(moe.tiers.iter().map(|t| top.join("tiers").join(t.id.as_str())));
            folders.push(top.join("tiers"));
        }
        folders
    }
}

/// Removes the highest manifest of the checkpoint in a folder, and its files, if it is this one, and one
/// before it stays. Whoever has the checkpoint open loses what it has not read yet.
pub(crate) fn drop_highest(dir: &Path, number: u64) -> Result<(), CheckpointError> {
    let folder = Folder::lock(dir)?;
    let highest = Checkpoint::open(dir)?.manifest().number;
    if highest != number || number < 2 {
        let (location, manifest) = (dir.display().to_string(), manifest_name(highest));
        return Err(CheckpointError::Raced { location, manifest });
    }
    folder.drop_manifest(number)
}

fn check(config: &ModelConfig, path: impl FnOnce() -> String) -> Result<(), CheckpointError> {
    config.check().map_err(|source| CheckpointError::Config { path: path(), source })
}

/// Writes the sections of one shard, one behind the other.
struct ShardWriter<'a> {
    file: &'a mut File,
    path: &'a str,
    at: u64,
    sections: Vec<Section>,
}

impl ShardWriter<'_> {
    fn seek(&mut self) -> Result<(), CheckpointError> {
        let sought = self.file.seek(SeekFrom::Start(self.at));
        sought.map(drop).map_err(CheckpointError::io(self.path, "write"))
    }

    /// Zeros up to where a section begins.
    fn align(&mut self, spec: &SectionSpec) -> Result<u64, CheckpointError> {
        let offset = self.at.next_multiple_of(spec.align);
        self.append(&vec![0; (offset - self.at) as usize])?;
        Ok(offset)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.at += bytes.len() as u64;
        self.file.write_all(bytes).map_err(CheckpointError::io(self.path, "write"))
    }

    /// Writes a section as kernels use it, tensor by tensor.
    fn write<E: From<CheckpointError>>(
        &mut self,
        spec: &SectionSpec,
        fill: &mut impl FnMut(&TensorSpec, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let offset = self.align(spec)?;
        let mut hasher = blake3::Hasher::new();
        for tensor in &spec.tensors {
            let out = Out::File(self.file, &mut hasher);
            fill_tensor(out, self.path, tensor, fill)?;
            self.at += bytes_of(tensor);
        }
        let blake3 = Hash(*hasher.finalize().as_bytes());
        let (name, bytes) = (spec.name.clone(), self.at - offset);
        self.sections.push(Section { name, offset, bytes, blake3, stored: None });
        Ok(())
    }

    /// A section's bytes in memory.
    fn collect<E: From<CheckpointError>>(
        &self,
        spec: &SectionSpec,
        fill: &mut impl FnMut(&TensorSpec, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<Vec<u8>, E> {
        let bytes = spec.tensors.iter().map(bytes_of).sum::<u64>();
        let mut memory = Vec::with_capacity(bytes as usize);
        for tensor in &spec.tensors {
            fill_tensor(Out::Memory(&mut memory), self.path, tensor, fill)?;
        }
        Ok(memory)
    }

    /// Writes a section compressed, or as it is where that would not shrink it.
    fn write_packed(
        &mut self,
        spec: &SectionSpec,
        bytes: &[u8],
        packed: Option<Vec<u8>>,
    ) -> Result<(), CheckpointError> {
        let offset = self.align(spec)?;
        let stored = packed.as_ref().map(|packed| Stored {
            codec: ZSTD.into(),
            bytes: packed.len() as u64,
            blake3: Hash::of(packed),
        });
        self.append(packed.as_deref().unwrap_or(bytes))?;
        self.sections.push(Section {
            name: spec.name.clone(),
            offset,
            bytes: bytes.len() as u64,
            blake3: Hash::of(bytes),
            stored,
        });
        Ok(())
    }
}

fn fill_tensor<E: From<CheckpointError>>(
    out: Out<'_>,
    path: &str,
    tensor: &TensorSpec,
    fill: &mut impl FnMut(&TensorSpec, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut sink = TensorSink { out, path, left: bytes_of(tensor) };
    fill(tensor, &mut sink)?;
    assert_eq!(sink.left, 0, "{} gets all its bytes", tensor.name);
    Ok(())
}

fn bytes_of(tensor: &TensorSpec) -> u64 {
    tensor.bytes().expect("ModelConfig::check bounds every width")
}

/// Whether a section is an expert's: only those are worth compressing.
fn is_expert(spec: &SectionSpec) -> bool {
    spec.align == DATA_ALIGN
}

/// Bytes of the header of a shard: of one that is compressed at most, for where its sections end
/// is known when they are written.
fn header_room(specs: &[SectionSpec], compressed: bool) -> u64 {
    let mut at = 0u64;
    let sections: Vec<Section> = specs
        .iter()
        .map(|spec| {
            let (name, bytes) = (spec.name.clone(), spec.tensors.iter().map(bytes_of).sum());
            let offset = at.next_multiple_of(spec.align);
            at = offset + bytes;
            Section { name, offset, bytes, blake3: Hash([0; 32]), stored: None }
        })
        .collect();
    let padding = if compressed { specs.len() * PADDING_ENTRY_BYTES } else { 0 };
    let text = header_text(specs, &sections, 0);
    (8 + text.len() as u64 + padding as u64).next_multiple_of(DATA_ALIGN)
}

/// The safetensors header: length, JSON, and blanks up to where the data begins.
fn header(specs: &[SectionSpec], sections: &[Section], bytes: u64) -> Vec<u8> {
    let mut text = header_text(specs, sections, bytes);
    let padded = bytes - 8;
    assert!(text.len() as u64 <= padded, "the header has room");
    text.resize(padded as usize, b' ');
    [&padded.to_le_bytes()[..], &text].concat()
}

/// The JSON of a header, where data begins at `data` in the file. A compressed section is one
/// tensor of bytes, named after its codec.
fn header_text(specs: &[SectionSpec], sections: &[Section], data: u64) -> Vec<u8> {
    let mut map = Map::new();
    let version = FORMAT_VERSION.to_string();
    map.insert("__metadata__".into(), json!({ "format": "lite-llm", "version": version }));
    let mut at = 0u64;
    for (spec, section) in specs.iter().zip(sections) {
        let begin = section.offset - data;
        if let Some((name, bytes)) = padding(at, begin) {
            let entry = json!({ "dtype": "U8", "shape": [bytes], "data_offsets": [at, begin] });
            map.insert(name, entry);
            at = begin;
        }
        if let Some(stored) = &section.stored {
            let end = at + stored.bytes;
            let entry =
                json!({ "dtype": "U8", "shape": [stored.bytes], "data_offsets": [at, end] });
            map.insert(format!("{}.{}", section.name, stored.codec), entry);
            at = end;
            continue;
        }
        for tensor in &spec.tensors {
            let end = at + bytes_of(tensor);
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
    let mut header = Value::Object(map);
    // In the order of their names, also where a dependency has serde_json keep another.
    header.sort_all_objects();
    header.to_string().into_bytes()
}
