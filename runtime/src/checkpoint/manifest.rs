//! The manifest: what the model is, and the hash of every index.
//!
//! Invariant: `root` is the blake3 hash of the manifest's own bytes with the 64 digits of `root`
//! replaced by zeros. So a manifest with one byte changed is refused, and whoever knows the root
//! knows every byte of the checkpoint.

use std::collections::BTreeMap;

use lite_llm_kernels::{DETERMINISM_VERSION, dtype::DType};
use serde::{Deserialize, Serialize};

use super::{
    CheckpointError, FORMAT_VERSION,
    index::{FileRef, Hash},
};
use crate::{config::ModelConfig, tier::TierId};

/// Name of the only manifest of format 1.
pub const MANIFEST_V1: &str = "manifest.json";

/// Name of the manifest with a number, from 1.
pub fn manifest_name(number: u64) -> String {
    format!("manifest.{number}.json")
}

/// The number in a manifest's name, if it is one.
pub fn manifest_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("manifest.")?.strip_suffix(".json")?;
    let number = digits.parse().ok()?;
    (number > 0 && manifest_name(number) == name).then_some(number)
}

const NO_ROOT: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// `manifest.N.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the layout.
    pub format: u32,
    /// Version of the determinism contract.
    pub determinism: u32,
    /// Hash of this file with these digits zeroed.
    pub root: Hash,
    /// N of its name: 1, and one more with every extension.
    pub number: u64,
    /// Root of the manifest that this one extends.
    pub parent: Option<Hash>,
    /// Format of projections, and of experts whose tier has none of its own. Gates, norms and biases are f32; for the embedding and
    /// the head see [`super::layout`].
    pub dtype: DType,
    /// The model.
    pub model: ModelConfig,
    /// Index of the dense part.
    pub dense: FileRef,
    /// Index of each tier, in the model's order.
    pub tiers: Vec<TierRef>,
    /// How text becomes tokens.
    pub text: TextFiles,
    /// Index of what training needs beside the weights: a [`super::index::StateIndex`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<FileRef>,
}

/// A tier and its index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierRef {
    /// Which tier.
    pub id: TierId,
    /// Its index.
    pub index: FileRef,
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextFiles {
    /// In the format of the `tokenizers` library.
    pub tokenizer: FileRef,
    /// Jinja template of conversations.
    pub chat_template: Option<FileRef>,
    /// Texts of the tokenizer's special tokens, by the names that templates have for them:
    /// `bos_token`, `eos_token`, `unk_token`, ….
    pub special_tokens: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Versions {
    format: u64,
    determinism: u64,
}

impl Manifest {
    /// The bytes of the file, with the root computed; `self.root` is ignored.
    pub fn to_bytes(&self) -> (Vec<u8>, Hash) {
        let zeroed = Self { root: Hash([0; 32]), ..self.clone() };
        let mut text =
            serde_json::to_string_pretty(&zeroed).expect("a manifest has only string keys");
        text.push('\n');
        let root = Hash::of(text.as_bytes());
        (text.replacen(NO_ROOT, &root.to_string(), 1).into_bytes(), root)
    }

    /// Reads and checks a manifest.
    pub fn from_bytes(path: &str, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let malformed = |e: serde_json::Error| CheckpointError::malformed(path, e.to_string());
        let versions: Versions = serde_json::from_slice(bytes).map_err(malformed)?;
        let version = |what, found: u64, expected: u32| {
            if found == u64::from(expected) {
                return Ok(());
            }
            Err(CheckpointError::Version { path: path.into(), what, found, expected })
        };
        version("format", versions.format, FORMAT_VERSION)?;
        version("determinism contract", versions.determinism, DETERMINISM_VERSION)?;
        let manifest: Self = serde_json::from_slice(bytes).map_err(malformed)?;

        let text = std::str::from_utf8(bytes)
            .map_err(|e| CheckpointError::malformed(path, e.to_string()))?;
        let zeroed = text.replacen(&manifest.root.to_string(), NO_ROOT, 1);
        let found = Hash::of(zeroed.as_bytes());
        if found != manifest.root {
            return Err(CheckpointError::Damaged {
                path: path.into(),
                part: "the manifest".into(),
                found,
                expected: manifest.root,
            });
        }
        manifest
            .model
            .check()
            .map_err(|source| CheckpointError::Config { path: path.into(), source })?;
        let tiers = manifest.model.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        if !tiers.iter().map(|t| &t.id).eq(manifest.tiers.iter().map(|t| &t.id)) {
            return Err(CheckpointError::malformed(
                path,
                "`tiers` does not list the tiers of `model.moe.tiers` in their order",
            ));
        }
        Ok(manifest)
    }
}
