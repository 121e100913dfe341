//! Reads a checkpoint, part by part, checking every byte that it hands out.
//!
//! Weights are read into memory of our own, and verified there: a file that changes afterwards cannot
//! change a result, and what a process holds is what its memory says. Hashing is what loading costs,
//! so where many tensors are wanted, several threads share them.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use lite_llm_kernels::{
    buffer::{AlignedBytes, Buffer},
    dtype::DType,
    matrix::PackedMatrix,
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;

use super::{
    CheckpointError, MANIFEST_BYTES_MAX,
    archive::Archive,
    codec::{read_packed, unpack_section},
    index::{
        DenseIndex, FileRef, GroupPage, Hash, LayerShard, Section, Shard, StateIndex, TierIndex,
    },
    layout::{EXPERT_ROUTER, GROUP_ROUTER, Part, Shape, TIER_ROUTER, TensorSpec},
    manifest::{MANIFEST_V1, Manifest, manifest_name},
    parallel::try_map,
    source::{EmbeddedFiles, Files, OpenFile},
    writer::STAGING_MARK,
};
use crate::config::{ModelConfig, MoeConfig};

/// An open checkpoint: its manifest and dense index, and the pages that were needed so far.
#[derive(Debug)]
pub struct Checkpoint {
    files: Files,
    manifest: Manifest,
    /// The manifest's model, where tiers know whether their files are here.
    config: ModelConfig,
    dense: DenseIndex,
    state: Option<StateIndex>,
    tiers: Mutex<HashMap<usize, Arc<TierIndex>>>,
    pages: Mutex<HashMap<(usize, u32), Arc<GroupPage>>>,
    headers_seen: Mutex<HashSet<String>>,
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
    /// Opens the checkpoint in a folder by its highest manifest, or `DIR@N` by `manifest.N.json`.
    /// Reads the manifest and the dense index, no weights.
    pub fn open(location: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let location = location.into();
        let numbered = || {
            let (dir, number) = location.to_str()?.rsplit_once('@')?;
            Some((PathBuf::from(dir), number.parse().ok()?))
        };
        match numbered() {
            Some((dir, number)) if !location.exists() => {
                Self::from_files(Files::dir(&dir)?, Some(number))
            }
            _ => Self::from_files(Files::dir(&location)?, None),
        }
    }

    /// Opens the checkpoint in an object store, by its highest manifest or by one of a number.
    pub fn open_archive(
        archive: Arc<dyn Archive>,
        number: Option<u64>,
    ) -> Result<Self, CheckpointError> {
        Self::from_files(Files::Archive(archive), number)
    }

    /// Opens a checkpoint that is part of the program.
    pub fn embedded(files: EmbeddedFiles) -> Result<Self, CheckpointError> {
        Self::from_files(Files::Embedded(files), None)
    }

    fn from_files(files: Files, number: Option<u64>) -> Result<Self, CheckpointError> {
        let path = manifest_path(&files, number)?;
        let file = files.open(&path)?;
        if file.bytes() > MANIFEST_BYTES_MAX {
            let reason = format!("{} bytes, at most {MANIFEST_BYTES_MAX} expected", file.bytes());
            return Err(CheckpointError::malformed(&path, reason));
        }
        let manifest = Manifest::from_bytes(&path, &file.read(&path, 0..file.bytes())?)?;
        if manifest_name(manifest.number) != path {
            let reason = format!("it says that its number is {}", manifest.number);
            return Err(CheckpointError::malformed(&path, reason));
        }
        let dense: DenseIndex = read_json(&files, &manifest.dense)?;
        check_dense(&manifest, &dense)?;
        let state: Option<StateIndex> =
            manifest.state.as_ref().map(|file| read_json(&files, file)).transpose()?;
        if let (Some(state), Some(file)) = (&state, &manifest.state) {
            state.shards.iter().try_for_each(|shard| shard.check_state(&file.path))?;
        }
        let mut config = manifest.model.clone();
        let tiers = config.moe.iter_mut().flat_map(|moe| &mut moe.tiers);
        for (tier, reference) in tiers.zip(&manifest.tiers) {
            tier.absent = !files.exists(&reference.index.path)?;
        }
        Ok(Self {
            files,
            manifest,
            config,
            dense,
            state,
            tiers: Mutex::default(),
            pages: Mutex::default(),
            headers_seen: Mutex::default(),
        })
    }

    /// The model; tiers whose files are not here say so.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Format of projections, and of experts whose tier has none of its own.
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

    /// What opens this very manifest again, also when the checkpoint has been extended: `DIR@N`.
    pub fn address(&self) -> String {
        format!("{}@{}", self.files.location(), self.manifest.number)
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// A matrix of the dense part, such as `embed` or `layers.0.attention.q`.
    pub fn dense_matrix(&self, name: &str) -> Result<PackedMatrix, CheckpointError> {
        match self.dense_tensor(name)? {
            (shard, section, spec) if spec.is_matrix() => self.matrix(shard, section, &spec),
            _ => Err(self.absent(format!("matrix {name}: it is a vector"))),
        }
    }

    /// All matrices of the dense part by their names, verified by `threads` threads.
    pub fn dense_matrices(
        &self,
        threads: usize,
    ) -> Result<HashMap<String, PackedMatrix>, CheckpointError> {
        let layers = (0..).map(Part::Layer).zip(self.dense.layers.iter().map(|l| &l.shard));
        let tensors: Vec<_> = std::iter::once((Part::Model, &self.dense.model))
            .chain(layers)
            .flat_map(|(part, shard)| {
                let specs = part.tensors(&self.config, self.dtype());
                shard.sections.iter().zip(specs).map(move |(section, spec)| (shard, section, spec))
            })
            .filter(|(_, _, spec)| spec.is_matrix())
            .collect();
        let loaded = try_map(threads, &tensors, |(shard, section, spec)| {
            Ok::<_, CheckpointError>((spec.name.clone(), self.matrix(shard, section, spec)?))
        })?;
        Ok(loaded.into_iter().collect())
    }

    /// A vector of the dense part, such as `norm`.
    pub fn dense_vector(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        match self.dense_tensor(name)? {
            (shard, section, spec) if !spec.is_matrix() => self.vector(shard, section),
            _ => Err(self.absent(format!("vector {name}: it is a matrix"))),
        }
    }

    /// Whether a tensor of the dense part is a matrix; the others are vectors.
    pub fn is_dense_matrix(&self, name: &str) -> Result<bool, CheckpointError> {
        Ok(self.dense_tensor(name)?.2.is_matrix())
    }

    /// Whether the dense part has a tensor of this name.
    pub fn has_dense(&self, name: &str) -> bool {
        self.dense_tensor(name).is_ok()
    }

    /// A tier's row of the tier gate in a sparse layer, `[hidden]`.
    pub fn tier_router(&self, layer: usize, tier: usize) -> Result<Vec<f32>, CheckpointError> {
        let index = self.tier_index(tier)?;
        let shard = self.router_shard(&index, layer)?;
        self.vector(shard, self.section(shard, TIER_ROUTER)?)
    }

    /// Gate over the groups of a tier in a sparse layer; `None` if the tier has one group.
    pub fn group_router(
        &self,
        layer: usize,
        tier: usize,
    ) -> Result<Option<PackedMatrix>, CheckpointError> {
        let index = self.tier_index(tier)?;
        let groups = self.moe()?.tiers[tier].groups as usize;
        if groups == 1 {
            return Ok(None);
        }
        self.gate(self.router_shard(&index, layer)?, GROUP_ROUTER, groups).map(Some)
    }

    /// Gate over the experts of one group in a sparse layer.
    pub fn expert_router(
        &self,
        layer: usize,
        tier: usize,
        group: u32,
    ) -> Result<PackedMatrix, CheckpointError> {
        let page = self.page(tier, group)?;
        let experts = self.moe()?.tiers[tier].experts_per_group as usize;
        self.gate(self.layer_shard(&page, layer)?, EXPERT_ROUTER, experts)
    }

    /// Bytes of all that every token needs: everything but experts and their gates.
    pub fn dense_bytes(&self) -> u64 {
        let shards = self.dense.layers.iter().map(|layer| &layer.shard).chain([&self.dense.model]);
        shards.flat_map(|shard| &shard.sections).map(|section| section.bytes).sum()
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

    pub(super) fn state_index(&self) -> Option<&StateIndex> {
        self.state.as_ref()
    }

    /// Describes one shard; what it says was checked.
    pub(crate) fn shard(&self, part: Part) -> Result<Shard, CheckpointError> {
        let (layer, found) = match part {
            Part::Model => return Ok(self.dense.model.clone()),
            Part::Layer(layer) => {
                (layer, self.dense.layers.get(layer).map(|layer| layer.shard.clone()))
            }
            Part::TierRouter { tier, layer } => {
                let index = self.tier_index(tier)?;
                (layer, self.router_shard(&index, layer).ok().cloned())
            }
            Part::Group { tier, layer, group } => {
                (layer, self.page(tier, group)?.shard(layer).cloned())
            }
        };
        found.ok_or_else(|| self.absent(format!("such part of layer {layer}")))
    }

    /// The tensors of a section, verified.
    pub(crate) fn tensors(
        &self,
        shard: &Shard,
        section: &Section,
        specs: &[TensorSpec],
    ) -> Result<Vec<Tensor>, CheckpointError> {
        let whole = self.section_bytes(shard, section)?;
        let tensor = |(spec, bytes): (&TensorSpec, Buffer)| match spec.is_matrix() {
            true => to_matrix(shard, spec, bytes).map(Tensor::Matrix),
            false => Ok(Tensor::Vector(bytemuck::pod_collect_to_vec(&bytes))),
        };
        specs.iter().zip(split(shard, &whole, specs)?).map(tensor).collect()
    }

    pub(super) fn absent(&self, what: String) -> CheckpointError {
        CheckpointError::Absent { location: self.location(), what }
    }

    pub(super) fn moe(&self) -> Result<&MoeConfig, CheckpointError> {
        self.config().moe.as_ref().ok_or_else(|| self.absent("experts".into()))
    }

    fn dense_tensor(&self, name: &str) -> Result<(&Shard, &Section, TensorSpec), CheckpointError> {
        let layer = name.strip_prefix("layers.").and_then(|rest| rest.split('.').next());
        let (part, shard) = match layer.and_then(|l| l.parse::<usize>().ok()) {
            Some(layer) => (Part::Layer(layer), self.dense.layers.get(layer).map(|l| &l.shard)),
            None => (Part::Model, Some(&self.dense.model)),
        };
        let found = shard.and_then(|shard| {
            let mut specs = part.tensors(&self.config, self.dtype()).enumerate();
            let (at, spec) = specs.find(|(_, spec)| spec.name == name)?;
            Some((shard, shard.sections.get(at)?, spec))
        });
        found.ok_or_else(|| self.absent(format!("dense tensor {name:?}")))
    }

    fn section<'a>(&self, shard: &'a Shard, name: &str) -> Result<&'a Section, CheckpointError> {
        shard.section(name).ok_or_else(|| self.absent(format!("{name} in {}", shard.path)))
    }

    fn router_shard<'a>(
        &self,
        index: &'a TierIndex,
        layer: usize,
    ) -> Result<&'a Shard, CheckpointError> {
        let found = index.routers.iter().find(|router| router.layer == layer);
        let absent = || self.absent(format!("experts in layer {layer}"));
        found.map(|router| &router.shard).ok_or_else(absent)
    }

    pub(super) fn layer_shard<'a>(
        &self,
        page: &'a GroupPage,
        layer: usize,
    ) -> Result<&'a Shard, CheckpointError> {
        page.shard(layer).ok_or_else(|| self.absent(format!("experts in layer {layer}")))
    }

    /// A gate `[n, hidden]`.
    fn gate(&self, shard: &Shard, name: &str, n: usize) -> Result<PackedMatrix, CheckpointError> {
        let shape = Shape::Matrix { n, k: self.config.hidden };
        let spec = TensorSpec { name: name.into(), dtype: DType::F32, shape };
        self.matrix(shard, self.section(shard, name)?, &spec)
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

    /// Opens a shard of the right size whose header is the one that was written.
    fn open_shard(&self, shard: &Shard) -> Result<OpenFile, CheckpointError> {
        let file = self.files.open_sized(&shard.path, shard.bytes)?;
        if !self.headers_seen.lock().contains(&shard.path) {
            check_header(shard, &file)?;
            self.headers_seen.lock().insert(shard.path.clone());
        }
        Ok(file)
    }

    /// A section as kernels use it, verified.
    pub(super) fn section_bytes(
        &self,
        shard: &Shard,
        section: &Section,
    ) -> Result<Buffer, CheckpointError> {
        let file = self.open_shard(shard)?;
        let bytes = match &section.stored {
            Some(stored) => {
                let packed = read_packed(shard, section, stored, &file)?;
                let mut bytes = AlignedBytes::zeroed(section.bytes as usize);
                unpack_section(shard, section, &packed, &mut bytes)?;
                bytes.into()
            }
            None => file.read(&shard.path, section.offset..section.offset + section.bytes)?,
        };
        check_section(shard, section, Hash::of(&bytes))?;
        Ok(bytes)
    }

    fn matrix(
        &self,
        shard: &Shard,
        section: &Section,
        spec: &TensorSpec,
    ) -> Result<PackedMatrix, CheckpointError> {
        to_matrix(shard, spec, self.section_bytes(shard, section)?)
    }

    fn vector(&self, shard: &Shard, section: &Section) -> Result<Vec<f32>, CheckpointError> {
        Ok(bytemuck::pod_collect_to_vec(&self.section_bytes(shard, section)?))
    }
}

/// Path of the manifest to open: the highest, or the one that was asked for.
fn manifest_path(files: &Files, number: Option<u64>) -> Result<String, CheckpointError> {
    // One that was asked for by its number is not looked for among the others.
    if let (Some(number), Files::Archive(_)) = (number, files) {
        let path = manifest_name(number);
        if files.exists(&path)? {
            return Ok(path);
        }
    }
    let numbers = files.manifests()?;
    let location = files.location();
    match (number, numbers.last()) {
        (Some(number), _) if numbers.contains(&number) => Ok(manifest_name(number)),
        (Some(number), Some(_)) => {
            let here: Vec<String> = numbers.iter().map(|&n| manifest_name(n)).collect();
            Err(CheckpointError::NoNumber { location, number, here: here.join(", ") })
        }
        (None, Some(&last)) => Ok(manifest_name(last)),
        // Reading it says which version it is.
        (_, None) if files.exists(MANIFEST_V1)? => Ok(MANIFEST_V1.into()),
        (_, None) if files.exists(STAGING_MARK)? => Err(CheckpointError::Unfinished { location }),
        (_, None) => Err(CheckpointError::NoManifest { location }),
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

/// Compares the hash of a section's bytes, as kernels use them, with the index.
pub(super) fn check_section(
    shard: &Shard,
    section: &Section,
    found: Hash,
) -> Result<(), CheckpointError> {
    if found == section.blake3 {
        return Ok(());
    }
    Err(CheckpointError::Damaged {
        path: shard.path.clone(),
        part: section.name.clone(),
        found,
        expected: section.blake3,
    })
}

/// Cuts a section into its tensors, which share its memory.
pub(super) fn split(
    shard: &Shard,
    whole: &Buffer,
    specs: &[TensorSpec],
) -> Result<Vec<Buffer>, CheckpointError> {
    let mut at = 0;
    let cut = |spec: &TensorSpec| {
        let end = at + spec.bytes().unwrap_or(u64::MAX) as usize;
        let bytes = whole
            .slice(at..end)
            .map_err(|e| CheckpointError::malformed(&shard.path, format!("{}: {e}", spec.name)));
        at = end;
        bytes
    };
    specs.iter().map(cut).collect()
}

pub(super) fn to_matrix(
    shard: &Shard,
    spec: &TensorSpec,
    bytes: Buffer,
) -> Result<PackedMatrix, CheckpointError> {
    let Shape::Matrix { n, k } = spec.shape else {
        let reason = format!("{} is a vector, a matrix is expected", spec.name);
        return Err(CheckpointError::malformed(&shard.path, reason));
    };
    PackedMatrix::new(spec.dtype, n, k, bytes)
        .map_err(|e| CheckpointError::malformed(&shard.path, format!("{}: {e}", spec.name)))
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
    if !index.routers.iter().map(|r| r.layer).eq(model.sparse_layers()) {
        return malformed("expected a router for every sparse layer".into());
    }
    for LayerShard { layer, shard } in &index.routers {
        let part = Part::TierRouter { tier, layer: *layer };
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
