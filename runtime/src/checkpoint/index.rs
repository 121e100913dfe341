//! Indexes: which shard holds which tensor, where in it, and with which hash.
//!
//! Invariant: a [`Shard`] that passed `Shard::check` holds exactly the tensors that the model's
//! configuration asks for, in their order, without gaps, from the end of its header to the end of
//! the file.

use std::fmt;

use lite_llm_kernels::dtype::DType;
use serde::{Deserialize, Serialize};

use super::{CheckpointError, DATA_ALIGN, HEADER_BYTES_MAX, layout::Part};
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

/// One tensor of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Name within the shard.
    pub name: String,
    /// Stored format.
    pub dtype: DType,
    /// Logical shape: `[n, k]` of a packed matrix, `[n]` of a vector.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// How many there are.
    pub bytes: u64,
    /// Their hash.
    pub blake3: Hash,
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
    /// Tensors in the order of their bytes.
    pub tensors: Vec<TensorEntry>,
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
    /// Gates over its groups, one per sparse layer; none for a tier of one group.
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

impl Shard {
    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Compares the entry with what the configuration asks for. `index` is the file it stands in.
    pub(super) fn check(
        &self,
        index: &str,
        part: Part,
        config: &ModelConfig,
        dtype: DType,
    ) -> Result<(), CheckpointError> {
        let bad = |reason: String| {
            let path = &self.path;
            Err(CheckpointError::malformed(index, format!("shard {path:?}: {reason}")))
        };
        let path = part.path(config);
        if self.path != path {
            return bad(format!("expected path {path:?}"));
        }
        if self.header_bytes < DATA_ALIGN
            || self.header_bytes > HEADER_BYTES_MAX
            || !self.header_bytes.is_multiple_of(DATA_ALIGN)
        {
            return bad(format!(
                "header of {} bytes, expected a multiple of {DATA_ALIGN} up to {HEADER_BYTES_MAX}",
                self.header_bytes
            ));
        }
        let count = part.tensor_count(config);
        if self.tensors.len() as u64 != count {
            return bad(format!("{} tensors, expected {count}", self.tensors.len()));
        }
        let mut at = self.header_bytes;
        for (entry, spec) in self.tensors.iter().zip(part.tensors(config, dtype)) {
            let name = &entry.name;
            if *name != spec.name {
                return bad(format!("tensor {name:?}, expected {:?}", spec.name));
            }
            if entry.shape != spec.dims() || entry.dtype != spec.dtype {
                return bad(format!(
                    "tensor {name:?} is {} {:?}, expected {} {:?} by the model's configuration",
                    entry.dtype,
                    entry.shape,
                    spec.dtype,
                    spec.dims()
                ));
            }
            if Some(entry.bytes) != spec.bytes() || entry.offset != at {
                return bad(format!(
                    "tensor {name:?} takes {} bytes from {}, expected {:?} from {at}",
                    entry.bytes,
                    entry.offset,
                    spec.bytes()
                ));
            }
            at = match at.checked_add(entry.bytes) {
                Some(end) => end,
                None => return bad(format!("tensor {name:?} ends beyond 2^64")),
            };
        }
        if self.bytes != at {
            return bad(format!("{} bytes, expected {at} by its tensors", self.bytes));
        }
        Ok(())
    }
}
