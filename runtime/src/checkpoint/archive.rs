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

    /// What lies in a folder itself, not deeper; `""` is the prefix: names and sizes of objects and,
    /// of each folder within it, the name with a `/` behind it, and 0. `None` if this kind of store
    /// has no listing.
    fn list(&self, folder: &str) -> Result<Option<Vec<(String, u64)>>, ArchiveError>;

    /// Size of an object; `None` if there is none of this name.
    fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError>;

    /// Fills `out` with an object's bytes from a position on, and returns the size of the whole
    /// object. Several threads may read at once, and should where latency matters.
    fn read_into(&self, path: &str, from: u64, out: &mut [u8]) -> Result<u64, ArchiveError>;

    /// Begins to write an object that is so large that it is written in parts, and returns the
    /// store's name for that; `None` if one of this size is not. What is begun takes room in the
    /// store, and nobody sees it, until [`Archive::put`] or [`Archive::abandon_put`] ends it: whoever
    /// may be killed between notes the name.
    fn begin_put(&self, path: &str, bytes: u64) -> Result<Option<String>, ArchiveError>;

    /// Writes the first `bytes` bytes of a file as an object, replacing what is there; `begun` is
    /// what [`Archive::begin_put`] returned, if it was called. Of what fails no part is left, as far
    /// as the store can be reached.
    fn put(
        &self,
        path: &str,
        file: &File,
        bytes: u64,
        begun: Option<&str>,
    ) -> Result<(), ArchiveError>;

    /// Ends what was begun and not put. That it is not there any more does not matter.
    fn abandon_put(&self, path: &str, begun: &str) -> Result<(), ArchiveError>;

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
