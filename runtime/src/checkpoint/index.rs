//! Indexes: which shard holds which section, where in it, and with which hashes.
//!
//! Invariant: a [`Shard`] that passed `Shard::check` holds exactly the sections that the model's
//! configuration asks for, in their order and aligned as [`super::layout`] says, from the end of
//! its header to the end of the file. Names, formats and shapes of the tensors within a section
//! are a function of the configuration, and stand in the shard's own header, too.

use std::fmt;

use lite_llm_kernels::dtype::DType;
use serde::{Deserialize, Serialize};

use super::{
    CheckpointError, DATA_ALIGN, HEADER_BYTES_MAX, codec::EXPANSION_MAX, layout::Part,
    source::is_plain,
};
use crate::{config::ModelConfig, tier::TierId};

/// A blake3 hash, written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The hash of some values, as they lie in memory.
    pub fn of_f32s(values: &[f32]) -> Self {
        Self::of(bytemuck::cast_slice(values))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Hash {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
        match blake3::Hash::from_hex(&text) {
            Ok(hash) if lower => Ok(Self(*hash.as_bytes())),
            _ => Err(format!("{text:?} is no hash; 64 of 0-9 and a-f are expected")),
        }
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> String {
        hash.to_string()
    }
}

/// A whole file, by its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Path within the checkpoint.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Hash of all of it.
    pub blake3: Hash,
}

/// A range of a shard that is read and verified as one: a tensor of the dense part, a gate, or the
/// three matrices of an expert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// Name within the shard: a tensor's, or `experts.3`.
    pub name: String,
    /// Where its stored bytes begin in the file.
    pub offset: u64,
    /// Bytes as kernels use them.
    pub bytes: u64,
    /// Their hash.
    pub blake3: Hash,
    /// How it is stored, where that differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Stored>,
}

/// How a section's bytes are stored, if not as kernels use them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// What packed them: [`super::codec::ZSTD`].
    pub codec: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// Their hash.
    pub blake3: Hash,
}

impl Section {
    /// Bytes that it takes in the file.
    pub fn stored_bytes(&self) -> u64 {
        self.stored.as_ref().map_or(self.bytes, |stored| stored.bytes)
    }

    /// Hash of the bytes in the file.
    pub fn stored_blake3(&self) -> Hash {
        self.stored.as_ref().map_or(self.blake3, |stored| stored.blake3)
    }
}

/// One safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Path within the checkpoint.
    pub path: String,
    /// Size of the file.
    pub bytes: u64,
    /// Size of everything before the data.
    pub header_bytes: u64,
    /// Hash of everything before the data.
    pub header_blake3: Hash,
    /// Sections in the order of their bytes.
    pub sections: Vec<Section>,
}

/// A shard that belongs to a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerShard {
    /// Layer of the model.
    pub layer: usize,
    /// Its file.
    pub shard: Shard,
}

/// `dense/index.json`: everything that every token needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenseIndex {
    /// Embedding, last norm, output projection.
    pub model: Shard,
    /// One per layer.
    pub layers: Vec<LayerShard>,
}

/// `tiers/<tier>/index.json`: the pages of one tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierIndex {
    /// Which tier.
    pub tier: TierId,
    /// The tier's row of the tier gate and, with several groups, the gate over them: one shard per
    /// sparse layer.
    pub routers: Vec<LayerShard>,
    /// One page per group.
    pub pages: Vec<FileRef>,
}

/// `tiers/<tier>/g00000.json`: the shards of one group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupPage {
    /// Which tier.
    pub tier: TierId,
    /// Which group of it.
    pub group: u32,
    /// One shard per sparse layer.
    pub layers: Vec<LayerShard>,
}

impl GroupPage {
    /// The shard of a layer.
    pub fn shard(&self, layer: usize) -> Option<&Shard> {
        self.layers.iter().find(|l| l.layer == layer).map(|l| &l.shard)
    }
}

/// `state.json`: what training needs beside the weights. Its sections are named by whoever trains;
/// everybody else verifies them and lets them be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateIndex {
    /// Files of optimizer moments, counters and the like.
    pub shards: Vec<Shard>,
}

impl Shard {
    /// A section by its name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }

    /// Compares the entry with what the configuration asks for. `index` is the file it stands in.
    pub(super) fn check(
        &self,
        index: &str,
        part: Part,
        config: &ModelConfig,
        dtype: DType,
    ) -> Result<(), CheckpointError> {
        let bad = |reason: String| self.bad(index, reason);
        // A later manifest's shards stand in a folder of their own: see `Writer::extend`.
        let path = part.path(config);
        if self.path != path && !self.path.ends_with(&format!("/{path}")) {
            return bad(format!("expected path {path:?}"));
        }
        let count = part.section_count(config);
        if self.sections.len() as u64 != count {
            return bad(format!("{} sections, expected {count}", self.sections.len()));
        }
        let mut at = self.header_bytes;
        for (section, spec) in self.sections.iter().zip(part.sections(config, dtype)) {
            let name = &section.name;
            if *name != spec.name {
                return bad(format!("section {name:?}, expected {:?}", spec.name));
            }
            let (bytes, from) = (spec.bytes(), at.checked_next_multiple_of(spec.align));
            if Some(section.bytes) != bytes || Some(section.offset) != from {
                return bad(format!(
                    "section {name:?} holds {} bytes from {}, expected {bytes:?} from {from:?} by \
                     the model's configuration",
                    section.bytes, section.offset
                ));
            }
            // Compression that does not shrink is not used, and memory is taken by these numbers.
            let least = section.bytes.div_ceil(EXPANSION_MAX);
            let odd = |stored: &&Stored| !(least..section.bytes).contains(&stored.bytes);
            if let Some(stored) = section.stored.as_ref().filter(odd) {
                return bad(format!(
                    "section {name:?} is stored in {} bytes, expected {least} or more and fewer \
                     than {}",
                    stored.bytes, section.bytes
                ));
            }
            at = match section.offset.checked_add(section.stored_bytes()) {
                Some(end) => end,
                None => return bad(format!("section {name:?} ends beyond 2^64")),
            };
        }
        self.check_frame(index, at)
    }

    /// Checks a shard of training state, whose sections nobody but training knows.
    pub(super) fn check_state(&self, index: &str) -> Result<(), CheckpointError> {
        let mut at = self.header_bytes;
        for section in &self.sections {
            let end = section.offset.checked_add(section.stored_bytes());
            match end {
                Some(end) if section.offset >= at => at = end,
                _ => return self.bad(index, format!("section {:?} overlaps", section.name)),
            }
        }
        self.check_frame(index, at)
    }

    /// What every shard has: a plain path, a header of whole pages, sections up to its end.
    fn check_frame(&self, index: &str, end: u64) -> Result<(), CheckpointError> {
        if !is_plain(&self.path) {
            return self.bad(index, "expected a plain path".into());
        }
        if !(DATA_ALIGN..=HEADER_BYTES_MAX).contains(&self.header_bytes)
            || !self.header_bytes.is_multiple_of(DATA_ALIGN)
        {
            let reason = format!(
                "header of {} bytes, expected a multiple of {DATA_ALIGN} up to {HEADER_BYTES_MAX}",
                self.header_bytes
            );
            return self.bad(index, reason);
        }
        if self.bytes != end {
            return self
                .bad(index, format!("{} bytes, expected {end} by its sections", self.bytes));
        }
        Ok(())
    }

    fn bad(&self, index: &str, reason: String) -> Result<(), CheckpointError> {
        let path = &self.path;
        Err(CheckpointError::malformed(index, format!("shard {path:?}: {reason}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn a_section_is_not_said_to_be_stored_in_fewer_bytes_than_can_be() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let checkpoint = Checkpoint::open(demo).unwrap();
        let part = Part::Group { tier: 0, layer: 0, group: 0 };
        let mut shard = checkpoint.shard(part).unwrap();
        let Section { bytes, blake3, .. } = shard.sections[1];
        assert!(bytes > EXPANSION_MAX);
        shard.sections[1].stored = Some(Stored { codec: "zstd".into(), bytes: 1, blake3 });
        let checked = shard.check("page", part, checkpoint.config(), checkpoint.dtype());
        let error = checked.unwrap_err().to_string();
        assert!(error.contains("stored in 1 bytes, expected"), "{error}");
    }
}
