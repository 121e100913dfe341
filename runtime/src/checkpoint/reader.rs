//! Reads a checkpoint, part by part, checking every byte that it hands out.
//!
//! A shard on disk is mapped once, for all tensors that are in use; with the last of them the
//! mapping goes too. Hashing is what loading costs, so where many tensors are wanted, several
//! threads share them.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use lite_llm_kernels::{
    buffer::{Buffer, WeakBuffer},
    dtype::DType,
    matrix::PackedMatrix,
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;

use super::{
    CheckpointError, MANIFEST_BYTES_MAX,
    index::{DenseIndex, FileRef, GroupPage, Hash, LayerShard, Shard, TensorEntry, TierIndex},
    layout::{EXPERT_ROUTER, GROUP_ROUTER, Part, expert_position},
    manifest::{MANIFEST, Manifest},
    parallel::try_map,
    source::{EmbeddedFiles, Files, OpenFile},
    writer::STAGING_MARK,
};
use crate::{
    config::{ModelConfig, MoeConfig},
    expert::{ExpertKey, GatedMlp},
};

/// An open checkpoint: its manifest and dense index, and the pages that were needed so far.
#[derive(Debug)]
pub struct Checkpoint {
    files: Files,
    manifest: Manifest,
    dense: DenseIndex,
    tiers: Mutex<HashMap<usize, Arc<TierIndex>>>,
    pages: Mutex<HashMap<(usize, u32), Arc<GroupPage>>>,
    headers_seen: Mutex<HashSet<String>>,
    maps: Mutex<HashMap<String, WeakBuffer>>,
}

/// The values of one tensor.
#[derive(Debug)]
pub(crate) enum Tensor {
    /// Packed weights.
    Matrix(PackedMatrix),
    /// Norms and biases.
    Vector(Vec<f32>),
}

impl Checkpoint {
    /// Opens the checkpoint in a folder. Reads the manifest and the dense index, no weights.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        Self::from_files(Files::dir(&dir.into())?)
    }

    /// Opens a checkpoint that is part of the program.
    pub fn embedded(files: EmbeddedFiles) -> Result<Self, CheckpointError> {
        Self::from_files(Files::Embedded(files))
    }

    fn from_files(files: Files) -> Result<Self, CheckpointError> {
        if !files.exists(MANIFEST) {
            let location = files.location();
            return Err(match files.exists(STAGING_MARK) {
                true => CheckpointError::Unfinished { location },
                false => CheckpointError::NoManifest { location },
            });
        }
        let file = files.open(MANIFEST)?;
        if file.bytes() > MANIFEST_BYTES_MAX {
            let reason = format!("{} bytes, at most {MANIFEST_BYTES_MAX} expected", file.bytes());
            return Err(CheckpointError::malformed(MANIFEST, reason));
        }
        let manifest = Manifest::from_bytes(MANIFEST, &file.read(MANIFEST, 0..file.bytes())?)?;
        let dense: DenseIndex = read_json(&files, &manifest.dense)?;
        check_dense(&manifest, &dense)?;
        Ok(Self {
            files,
            manifest,
            dense,
            tiers: Mutex::default(),
            pages: Mutex::default(),
            headers_seen: Mutex::default(),
            maps: Mutex::default(),
        })
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.manifest.model
    }

    /// Format of projections and experts.
    pub fn dtype(&self) -> DType {
        self.manifest.dtype
    }

    /// Root hash: the name of this checkpoint.
    pub fn id(&self) -> [u8; 32] {
        self.manifest.root.0
    }

    /// Where it lies, for messages.
    pub fn location(&self) -> String {
        self.files.location()
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// A matrix of the dense part, such as `embed` or `layers.0.attention.q`.
    pub fn dense_matrix(&self, name: &str) -> Result<PackedMatrix, CheckpointError> {
        let (shard, entry) = self.dense_entry(name)?;
        self.matrix(shard, entry)
    }

    /// All matrices of the dense part by their names, verified by `threads` threads.
    pub fn dense_matrices(
        &self,
        threads: usize,
    ) -> Result<HashMap<String, PackedMatrix>, CheckpointError> {
        let layers = self.dense.layers.iter().map(|l| &l.shard);
        let tensors = std::iter::once(&self.dense.model)
            .chain(layers)
            .flat_map(|shard| shard.tensors.iter().map(move |entry| (shard, entry)))
            .filter(|(_, entry)| entry.shape.len() == 2);
        let tensors: Vec<_> = tensors.collect();
        let loaded = try_map(threads, &tensors, |(shard, entry)| {
            Ok((entry.name.clone(), self.matrix(shard, entry)?))
        })?;
        Ok(loaded.into_iter().collect())
    }

    /// A vector of the dense part, such as `norm`.
    pub fn dense_vector(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let (shard, entry) = self.dense_entry(name)?;
        if entry.shape.len() != 1 {
            return Err(self.absent(format!("vector {name}: it is a matrix")));
        }
        let bytes = self.tensor_bytes(shard, entry)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Whether the dense part has a tensor of this name.
    pub fn has_dense(&self, name: &str) -> bool {
        self.dense_entry(name).is_ok()
    }

    /// Gate over the groups of a tier in a sparse layer; `None` if the tier has one group.
    pub fn group_router(
        &self,
        layer: usize,
        tier: usize,
    ) -> Result<Option<PackedMatrix>, CheckpointError> {
        let index = self.tier_index(tier)?;
        if self.moe()?.tiers[tier].groups == 1 {
            return Ok(None);
        }
        let found = index.routers.iter().find(|r| r.layer == layer);
        let router = found.ok_or_else(|| self.absent(format!("experts in layer {layer}")))?;
        let entry = self.entry(&router.shard, GROUP_ROUTER)?;
        self.matrix(&router.shard, entry).map(Some)
    }

    /// Gate over the experts of one group in a sparse layer.
    pub fn expert_router(
        &self,
        layer: usize,
        tier: usize,
        group: u32,
    ) -> Result<PackedMatrix, CheckpointError> {
        let page = self.page(tier, group)?;
        let shard = self.layer_shard(&page, layer)?;
        self.matrix(shard, self.entry(shard, EXPERT_ROUTER)?)
    }

    /// The weights of one expert: three matrices, one after the other in the same memory.
    pub fn expert(&self, key: ExpertKey) -> Result<GatedMlp, CheckpointError> {
        let page = self.page(key.tier as usize, key.group)?;
        let shard = self.layer_shard(&page, key.layer as usize)?;
        let entries = self.expert_entries(shard, key)?;
        let file = self.open_shard(shard)?;
        let (from, last) = (entries[0].offset, &entries[2]);
        let whole = file.read(&shard.path, from..last.offset + last.bytes)?;
        let matrix = |entry: &TensorEntry| {
            let at = (entry.offset - from) as usize;
            let bytes = whole.slice(at..at + entry.bytes as usize).map_err(|e| {
                CheckpointError::malformed(&shard.path, format!("{}: {e}", entry.name))
            })?;
            to_matrix(shard, entry, verified(shard, entry, bytes)?)
        };
        Ok(GatedMlp {
            gate: matrix(&entries[0])?,
            up: matrix(&entries[1])?,
            down: matrix(&entries[2])?,
        })
    }

    /// Bytes that an expert takes, from the index alone.
    pub fn expert_bytes(&self, key: ExpertKey) -> Result<u64, CheckpointError> {
        let page = self.page(key.tier as usize, key.group)?;
        let shard = self.layer_shard(&page, key.layer as usize)?;
        Ok(self.expert_entries(shard, key)?.iter().map(|e| e.bytes).sum())
    }

    /// The tokenizer, in the format of the `tokenizers` library.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>, CheckpointError> {
        Ok(read_whole(&self.files, &self.manifest.text.tokenizer)?.to_vec())
    }

    /// The template of conversations, if there is one.
    pub fn chat_template(&self) -> Result<Option<String>, CheckpointError> {
        let Some(file) = &self.manifest.text.chat_template else { return Ok(None) };
        let bytes = read_whole(&self.files, file)?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| CheckpointError::malformed(&file.path, e.to_string()))?;
        Ok(Some(text.to_owned()))
    }

    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    pub(super) fn dense_index(&self) -> &DenseIndex {
        &self.dense
    }

    /// Describes one shard; what it says was checked.
    pub(crate) fn shard(&self, part: Part) -> Result<Shard, CheckpointError> {
        let (layer, found) = match part {
            Part::Model => return Ok(self.dense.model.clone()),
            Part::Layer(layer) => {
                (layer, self.dense.layers.get(layer).map(|layer| layer.shard.clone()))
            }
            Part::GroupRouter { tier, layer } => {
                let index = self.tier_index(tier)?;
                let router = index.routers.iter().find(|router| router.layer == layer);
                (layer, router.map(|router| router.shard.clone()))
            }
            Part::Group { tier, layer, group } => {
                (layer, self.page(tier, group)?.shard(layer).cloned())
            }
        };
        found.ok_or_else(|| self.absent(format!("such part of layer {layer}")))
    }

    /// One tensor of a shard, verified.
    pub(crate) fn tensor(
        &self,
        shard: &Shard,
        entry: &TensorEntry,
    ) -> Result<Tensor, CheckpointError> {
        let bytes = self.tensor_bytes(shard, entry)?;
        match entry.shape.len() {
            2 => to_matrix(shard, entry, bytes).map(Tensor::Matrix),
            _ => Ok(Tensor::Vector(bytemuck::pod_collect_to_vec(&bytes))),
        }
    }

    fn absent(&self, what: String) -> CheckpointError {
        CheckpointError::Absent { location: self.location(), what }
    }

    fn moe(&self) -> Result<&MoeConfig, CheckpointError> {
        self.config().moe.as_ref().ok_or_else(|| self.absent("experts".into()))
    }

    fn dense_entry(&self, name: &str) -> Result<(&Shard, &TensorEntry), CheckpointError> {
        let layer = name.strip_prefix("layers.").and_then(|rest| rest.split('.').next());
        let shard = match layer.and_then(|l| l.parse::<usize>().ok()) {
            Some(layer) => self.dense.layers.get(layer).map(|l| &l.shard),
            None => Some(&self.dense.model),
        };
        let found = shard.and_then(|shard| Some((shard, shard.tensor(name)?)));
        found.ok_or_else(|| self.absent(format!("dense tensor {name:?}")))
    }

    fn entry<'a>(&self, shard: &'a Shard, name: &str) -> Result<&'a TensorEntry, CheckpointError> {
        shard.tensor(name).ok_or_else(|| self.absent(format!("{name} in {}", shard.path)))
    }

    fn layer_shard<'a>(
        &self,
        page: &'a GroupPage,
        layer: usize,
    ) -> Result<&'a Shard, CheckpointError> {
        page.shard(layer).ok_or_else(|| self.absent(format!("experts in layer {layer}")))
    }

    fn expert_entries<'a>(
        &self,
        shard: &'a Shard,
        key: ExpertKey,
    ) -> Result<&'a [TensorEntry], CheckpointError> {
        let at = expert_position(key.expert);
        shard.tensors.get(at..at + 3).ok_or_else(|| self.absent(key.to_string()))
    }

    /// The index of a tier, read when first needed.
    pub(super) fn tier_index(&self, tier: usize) -> Result<Arc<TierIndex>, CheckpointError> {
        if let Some(index) = self.tiers.lock().get(&tier) {
            return Ok(index.clone());
        }
        let Some(reference) = self.manifest.tiers.get(tier) else {
            return Err(self.absent(format!("tier {tier}")));
        };
        let index: TierIndex = read_json(&self.files, &reference.index)?;
        check_tier(&self.manifest, tier, &index)?;
        let index = Arc::new(index);
        self.tiers.lock().insert(tier, index.clone());
        Ok(index)
    }

    /// The index of a group, read when first needed.
    pub(super) fn page(&self, tier: usize, group: u32) -> Result<Arc<GroupPage>, CheckpointError> {
        if let Some(page) = self.pages.lock().get(&(tier, group)) {
            return Ok(page.clone());
        }
        let index = self.tier_index(tier)?;
        let Some(reference) = index.pages.get(group as usize) else {
            return Err(self.absent(format!("group {group} in tier {}", index.tier)));
        };
        let page: GroupPage = read_json(&self.files, reference)?;
        check_page(&self.manifest, tier, group, &reference.path, &page)?;
        let page = Arc::new(page);
        self.pages.lock().insert((tier, group), page.clone());
        Ok(page)
    }

    /// Opens a shard of the right size whose header is the one that was written; on disk, one
    /// mapping serves all who use the shard at a time.
    fn open_shard(&self, shard: &Shard) -> Result<OpenFile, CheckpointError> {
        let mapped = |maps: &HashMap<String, WeakBuffer>| maps.get(&shard.path)?.upgrade();
        if let Some(map) = mapped(&self.maps.lock()) {
            return Ok(OpenFile::Mapped(map));
        }
        let file = self.files.open_sized(&shard.path, shard.bytes)?;
        if !self.headers_seen.lock().contains(&shard.path) {
            check_header(shard, &file)?;
            self.headers_seen.lock().insert(shard.path.clone());
        }
        let file = file.map();
        if let OpenFile::Mapped(map) = &file {
            let mut maps = self.maps.lock();
            // Another thread may have been faster.
            if let Some(map) = mapped(&maps) {
                return Ok(OpenFile::Mapped(map));
            }
            maps.insert(shard.path.clone(), map.downgrade());
        }
        Ok(file)
    }

    fn tensor_bytes(&self, shard: &Shard, entry: &TensorEntry) -> Result<Buffer, CheckpointError> {
        let file = self.open_shard(shard)?;
        let bytes = file.read(&shard.path, entry.offset..entry.offset + entry.bytes)?;
        verified(shard, entry, bytes)
    }

    fn matrix(&self, shard: &Shard, entry: &TensorEntry) -> Result<PackedMatrix, CheckpointError> {
        if entry.shape.len() != 2 {
            return Err(self.absent(format!("matrix {}: it is a vector", entry.name)));
        }
        to_matrix(shard, entry, self.tensor_bytes(shard, entry)?)
    }
}

pub(super) fn check_header(shard: &Shard, file: &OpenFile) -> Result<(), CheckpointError> {
    let header = file.read(&shard.path, 0..shard.header_bytes)?;
    let found = Hash::of(&header);
    if found != shard.header_blake3 {
        return Err(CheckpointError::Damaged {
            path: shard.path.clone(),
            part: "the header".into(),
            found,
            expected: shard.header_blake3,
        });
    }
    Ok(())
}

fn verified(shard: &Shard, entry: &TensorEntry, bytes: Buffer) -> Result<Buffer, CheckpointError> {
    let found = Hash::of(&bytes);
    if found != entry.blake3 {
        return Err(CheckpointError::Damaged {
            path: shard.path.clone(),
            part: format!("tensor {:?}", entry.name),
            found,
            expected: entry.blake3,
        });
    }
    Ok(bytes)
}

fn to_matrix(
    shard: &Shard,
    entry: &TensorEntry,
    bytes: Buffer,
) -> Result<PackedMatrix, CheckpointError> {
    PackedMatrix::new(entry.dtype, entry.shape[0], entry.shape[1], bytes)
        .map_err(|e| CheckpointError::malformed(&shard.path, format!("{}: {e}", entry.name)))
}

fn check_dense(manifest: &Manifest, dense: &DenseIndex) -> Result<(), CheckpointError> {
    let (path, model, dtype) = (&manifest.dense.path, &manifest.model, manifest.dtype);
    dense.model.check(path, Part::Model, model, dtype)?;
    if !dense.layers.iter().map(|l| l.layer).eq(0..model.layers.len()) {
        let reason = format!("expected layers 0 to {}, each once", model.layers.len() - 1);
        return Err(CheckpointError::malformed(path, reason));
    }
    for LayerShard { layer, shard } in &dense.layers {
        shard.check(path, Part::Layer(*layer), model, dtype)?;
    }
    Ok(())
}

fn check_tier(manifest: &Manifest, tier: usize, index: &TierIndex) -> Result<(), CheckpointError> {
    let (path, model) = (&manifest.tiers[tier].index.path, &manifest.model);
    let malformed = |reason: String| Err(CheckpointError::malformed(path, reason));
    let Some(config) = model.moe.as_ref().and_then(|moe| moe.tiers.get(tier)) else {
        return malformed("the model has no such tier".into());
    };
    if index.tier != config.id {
        return malformed(format!("tier {}, expected {}", index.tier, config.id));
    }
    if index.pages.len() != config.groups as usize {
        return malformed(format!("{} pages, expected {}", index.pages.len(), config.groups));
    }
    let routed = model.sparse_layers().filter(|_| config.groups > 1);
    if !index.routers.iter().map(|r| r.layer).eq(routed) {
        return malformed(
            "expected a group gate for every sparse layer of a tier of groups".into(),
        );
    }
    for LayerShard { layer, shard } in &index.routers {
        let part = Part::GroupRouter { tier, layer: *layer };
        shard.check(path, part, model, manifest.dtype)?;
    }
    Ok(())
}

fn check_page(
    manifest: &Manifest,
    tier: usize,
    group: u32,
    path: &str,
    page: &GroupPage,
) -> Result<(), CheckpointError> {
    let (model, id) = (&manifest.model, &manifest.tiers[tier].id);
    let malformed = |reason: String| Err(CheckpointError::malformed(path, reason));
    if page.tier != *id || page.group != group {
        return malformed(format!(
            "group {} of tier {}, expected group {group} of {id}",
            page.group, page.tier
        ));
    }
    if !page.layers.iter().map(|l| l.layer).eq(model.sparse_layers()) {
        return malformed("expected a shard for every sparse layer".into());
    }
    for LayerShard { layer, shard } in &page.layers {
        let part = Part::Group { tier, layer: *layer, group };
        shard.check(path, part, model, manifest.dtype)?;
    }
    Ok(())
}

/// Reads a file that is named by its hash.
pub(super) fn read_whole(files: &Files, file: &FileRef) -> Result<Buffer, CheckpointError> {
    let open = files.open_sized(&file.path, file.bytes)?;
    let bytes = open.read(&file.path, 0..file.bytes)?;
    let found = Hash::of(&bytes);
    if found != file.blake3 {
        return Err(CheckpointError::Damaged {
            path: file.path.clone(),
            part: "the file".into(),
            found,
            expected: file.blake3,
        });
    }
    Ok(bytes)
}

fn read_json<T: DeserializeOwned>(files: &Files, file: &FileRef) -> Result<T, CheckpointError> {
    let bytes = read_whole(files, file)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| CheckpointError::malformed(&file.path, e.to_string()))
}
