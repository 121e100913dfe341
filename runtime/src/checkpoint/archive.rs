//! What a checkpoint needs of an object store: few operations, all of them blocking.
//!
//! The implementation over HTTP lives in the actors' crate, where sockets are allowed. Retries,
//! deadlines and credentials are its business; an error that arrives here is final.
//!
//! Paths are relative to the checkpoint's prefix, plain ([`super::source::is_plain`]), and separated
//! by `/`.

use std::{
    fmt::{self, Debug},
    fs::File,
};

/// The objects below a prefix of a store.
pub trait Archive: Debug + Send + Sync {
    /// The URL of the prefix, for messages and for opening it again. It holds no credentials.
    fn location(&self) -> String;

    /// Names and sizes of the objects that lie in a folder itself, not deeper; `""` is the prefix.
    /// `None` if this kind of store has no listing.
    fn list(&self, folder: &str) -> Result<Option<Vec<(String, u64)>>, ArchiveError>;

    /// Size of an object; `None` if there is none of this name.
    fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError>;

    /// Fills `out` with an object's bytes from a position on, and returns the size of the whole
    /// object. Several threads may read at once, and should where latency matters.
    fn read_into(&self, path: &str, from: u64, out: &mut [u8]) -> Result<u64, ArchiveError>;

    /// Writes the first `bytes` bytes of a file as an object, replacing what is there.
    fn put(&self, path: &str, file: &File, bytes: u64) -> Result<(), ArchiveError>;

    /// Creates a small object if there is none of this name; says whether it did. Of several
    /// callers, at most one is told so.
    fn create(&self, path: &str, bytes: &[u8]) -> Result<bool, ArchiveError>;

    /// Removes objects; such as are not there do not matter.
    fn remove(&self, paths: &[String]) -> Result<(), ArchiveError>;
}

/// Why an object store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveError {
    /// URL of the object.
    pub object: String,
    /// Which kind of failure.
    pub kind: ArchiveFailure,
    /// What happened, and what to do about it.
    pub reason: String,
}

/// Kinds of failures that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveFailure {
    /// There is no such object.
    Absent,
    /// The store refuses: credentials or permissions.
    Denied,
    /// The store did not answer in time, or not in full, however often it was asked.
    Unavailable,
    /// The store cannot do what is asked of it.
    Unsupported,
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

impl std::error::Error for ArchiveError {}
