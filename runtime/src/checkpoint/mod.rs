//! The native checkpoint: a folder whose parts load without the rest.
//!
//! # Contract
//! - **Layout.** `manifest.N.json` names one index of the dense part and one per tier; a tier's
//!   index is paged by group; pages name the shards. Shards are valid safetensors files, one per
//!   (tier, layer, group), made of sections ([`layout`]) that lie there as kernels read them. An
//!   expert is one section, and starts at a multiple of [`DATA_ALIGN`].
//! - **Identity.** Everything is reached by hash from the manifest, and the hash of the manifest
//!   ([`Checkpoint::id`]) names the checkpoint. Each section's hash is checked whenever it is read.
//! - **Growth.** A tier is added by adding files: [`writer::Writer::extend`] writes them to a folder
//!   of their own and, last, `manifest.N+1.json`, which names what was there and what is new. The
//!   highest number opens, `DIR@N` an earlier one, with the bits that it always had.
//! - **Absence.** A folder that lacks the index of a tier opens without that tier
//!   ([`crate::tier::TierConfig::absent`]).
//! - **Consistency.** Files are written under staging names and synced; the manifest comes last,
//!   and only if there is none of its number. A folder without a manifest is no checkpoint, and
//!   opening it says so. A file that a manifest names is never written to.
//! - **Stores.** A checkpoint may be the prefix of an object store ([`archive::Archive`]) with the
//!   same paths and bytes, so the same root hash; shards are uploaded whole and read back before
//!   the manifest is created ([`writer::Writer::upload`]).
//! - **Compression.** A section may be stored compressed ([`codec`]); its index entry has the hashes
//!   of both. What kernels compute with is the same to the bit.
//! - **Distrust.** Sizes are compared with the file before anything is allocated, shapes with the
//!   model's configuration before anything is read, and no path leaves the folder.
//! - **Memory.** Weights are read into memory of the process's own and verified there: a file that
//!   changes or goes afterwards changes nothing that is computed with, and what a process holds is
//!   what its memory says.
//! - **Concurrency.** Reading takes `&self` from any number of threads. Nothing here retries: an
//!   error names the file and what is wrong with it. An archive has retried before it says so.

pub mod archive;
pub mod codec;
mod experts;
pub(crate) mod folder;
pub mod index;
pub mod inspect;
pub mod layout;
pub mod manifest;
mod parallel;
mod reader;
pub mod source;
mod upload;
pub mod verify;
pub mod writer;

use std::io;

pub use experts::ExpertPlace;
pub(crate) use parallel::try_map;
pub use reader::Checkpoint;
pub(crate) use reader::Tensor;

/// Version of the layout that is described here.
pub const FORMAT_VERSION: u32 = 2;
/// Alignment of a shard's data: a page of memory, and what O_DIRECT reads ask for.
pub const DATA_ALIGN: u64 = 4096;
/// Largest manifest.
pub const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Largest header of a shard.
pub const HEADER_BYTES_MAX: u64 = 100 << 20;

/// Why a checkpoint, or a part of one, cannot be used. Paths are relative to the checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
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
    /// There is no manifest.
    #[error(
        "{location} is no checkpoint: it has no manifest.N.json; name the folder or URL that `lite-llm import` wrote"
    )]
    NoManifest {
        /// Where it was looked for.
        location: String,
    },
    /// An import was interrupted here.
    #[error("{location} holds an unfinished import and no manifest; run the import again")]
    Unfinished {
        /// The folder.
        location: String,
    },
    /// It was written by a program of another time.
    #[error(
        "{path}: {what} version {found}, expected {expected}; import the model again, or use the program that wrote this"
    )]
    Version {
        /// The manifest.
        path: String,
        /// Which version differs.
        what: &'static str,
        /// Version in the file.
        found: u64,
        /// Version that this program reads.
        expected: u32,
    },
    /// The file is not what its kind should be.
    #[error("{path}: {reason}; the checkpoint is damaged or was edited: import or copy it again")]
    Malformed {
        /// Which file.
        path: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// Bytes differ from those that were written.
    #[error(
        "{path}: {part} has blake3 {found}, expected {expected}; the file is damaged: copy it again"
    )]
    Damaged {
        /// Which file.
        path: String,
        /// Which tensor or section of it.
        part: String,
        /// Hash of what is there.
        found: index::Hash,
        /// Hash of what was written.
        expected: index::Hash,
    },
    /// The file is shorter or longer than the index says.
    #[error(
        "{path}: {found} bytes, expected {expected}; the file is truncated or was replaced: copy it again"
    )]
    Size {
        /// Which file.
        path: String,
        /// Its size.
        found: u64,
        /// Its size in the index.
        expected: u64,
    },
    /// A path that could reach outside the checkpoint.
    #[error(
        "path {path:?} leaves {location}; paths in a checkpoint are relative, plain and inside it"
    )]
    UnsafePath {
        /// The path.
        path: String,
        /// The checkpoint.
        location: String,
    },
    /// The checkpoint has no such part.
    #[error("{location} has no {what}")]
    Absent {
        /// The checkpoint.
        location: String,
        /// What was asked for.
        what: String,
    },
    /// `DIR@N` names a manifest that is not there.
    #[error("{location} has no manifest.{number}.json; it has {here}")]
    NoNumber {
        /// The folder.
        location: String,
        /// What was asked for.
        number: u64,
        /// The numbers that are there.
        here: String,
    },
    /// Another writer extended the checkpoint meanwhile.
    #[error(
        "{location}: {manifest} appeared while a checkpoint with this name was written; look at what is there, and write again"
    )]
    Raced {
        /// The folder.
        location: String,
        /// The manifest.
        manifest: String,
    },
    /// A section is stored in a way that this program cannot read.
    #[error(
        "{path}: {section} is packed with {codec:?}, which this version does not read; use a newer one"
    )]
    Codec {
        /// The shard.
        path: String,
        /// Which section of it.
        section: String,
        /// What packed it.
        codec: String,
    },
    /// A section does not unpack to what was packed.
    #[error("{path}: {section} does not unpack: {reason}; the file is damaged: copy it again")]
    Unpack {
        /// The shard.
        path: String,
        /// Which section of it.
        section: String,
        /// What the decoder said.
        reason: String,
    },
    /// An object store refused or did not answer.
    #[error(transparent)]
    Archive(#[from] archive::ArchiveError),
    /// The place to write to is in use.
    #[error("{location} {reason}; choose another place, or remove it first")]
    Occupied {
        /// The folder or URL.
        location: String,
        /// By what.
        reason: &'static str,
    },
    /// The configuration describes no model that can run.
    #[error("{path}: model.{source}")]
    Config {
        /// The manifest.
        path: String,
        /// What is wrong.
        source: crate::config::ConfigError,
    },
}

impl CheckpointError {
    fn io(path: impl Into<String>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, action, source }
    }

    fn malformed(path: &str, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), reason: reason.into() }
    }
}
