//! Where a checkpoint's files are: a folder, an object store, or bytes within the program.
//!
//! Invariants: no path reaches outside (no absolute path, no `..`, no link that leads out), and
//! nothing is allocated before the file was seen to be as large as the index says. The
//! size of an object is known from the index and compared with every answer: asking for it first
//! would cost a round trip per read.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use lite_llm_kernels::buffer::{AlignedBytes, Buffer};

use super::{
    CheckpointError,
    archive::{Archive, ArchiveFailure},
    manifest::{MANIFEST_V1, manifest_name, manifest_number},
};

/// Files compiled into a program: path within the checkpoint, and content.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

/// Threads that read from a store at once.
const ARCHIVE_READERS: usize = 8;
/// Manifests that are counted in a store without listings: each was an extension of the model.
const MANIFESTS_MAX: u64 = 1000;
/// Memory that an index may ask for before the size of its object was seen.
const TRUSTED_BYTES: usize = 64 << 20;

/// The files of one checkpoint.
#[derive(Debug, Clone)]
pub enum Files {
    /// A folder, by its canonical path.
    Dir(PathBuf),
    /// A prefix of an object store.
    Archive(Arc<dyn Archive>),
    /// Bytes within the program.
    Embedded(EmbeddedFiles),
}

/// A file that was opened and measured.
#[derive(Debug)]
pub enum OpenFile {
    /// On disk.
    File {
        /// The handle, read by position.
        file: File,
        /// Size when it was opened.
        bytes: u64,
    },
    /// In an object store.
    Object {
        /// The store.
        archive: Arc<dyn Archive>,
        /// Size that it has to have; every read compares it.
        bytes: u64,
    },
    /// Within the program.
    Embedded(&'static [u8]),
}

/// Says whether a path from a manifest is plain: relative, forward, made of ordinary names.
pub fn is_plain(path: &str) -> bool {
    let name_ok = |name: &str| !name.is_empty() && name != "." && name != "..";
    path.len() <= 1024
        && path.bytes().all(|b| b.is_ascii_graphic() && b != b'\\' && b != b':')
        && path.split('/').all(name_ok)
}

impl Files {
    /// The files below a folder.
    pub fn dir(dir: &Path) -> Result<Self, CheckpointError> {
        let shown = dir.display().to_string();
        let dir = fs::canonicalize(dir).map_err(CheckpointError::io(shown, "open the folder"))?;
        Ok(Self::Dir(dir))
    }

    /// For messages.
    pub fn location(&self) -> String {
        match self {
            Files::Dir(dir) => dir.display().to_string(),
            Files::Archive(archive) => archive.location(),
            Files::Embedded(_) => "the embedded checkpoint".into(),
        }
    }

    /// Threads that read from here at once to good effect: in a store, latency is what costs.
    pub fn readers(&self) -> usize {
        match self {
            Files::Archive(_) => ARCHIVE_READERS,
            _ => std::thread::available_parallelism().map_or(1, |n| n.get()),
        }
    }

    /// Whether a plain path exists. A store that does not answer is an error, not an absence.
    pub fn exists(&self, path: &str) -> Result<bool, CheckpointError> {
        Ok(match self {
            Files::Dir(dir) => dir.join(path).exists(),
            Files::Archive(archive) => archive.size(path)?.is_some(),
            Files::Embedded(files) => files.iter().any(|(name, _)| *name == path),
        })
    }

    /// Numbers of the manifests that are there, upwards.
    pub fn manifests(&self) -> Result<Vec<u64>, CheckpointError> {
        let mut numbers: Vec<u64> = match self {
            Files::Dir(dir) => {
                let io = || CheckpointError::io(dir.display().to_string(), "list");
                let entries = fs::read_dir(dir).map_err(io())?;
                let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
                let names = names.collect::<Result<Vec<_>, _>>().map_err(io())?;
                names.iter().filter_map(|name| manifest_number(name.to_str()?)).collect()
            }
            Files::Archive(archive) => match archive.list("")? {
                Some(objects) => {
                    objects.iter().filter_map(|(name, _)| manifest_number(name)).collect()
                }
                None => count_up(&**archive)?,
            },
            Files::Embedded(files) => {
                files.iter().filter_map(|(name, _)| manifest_number(name)).collect()
            }
        };
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Whether there is a checkpoint of this or an earlier format.
    pub fn holds_checkpoint(&self) -> Result<bool, CheckpointError> {
        Ok(!self.manifests()?.is_empty() || self.exists(MANIFEST_V1)?)
    }

    /// Opens one file.
    pub fn open(&self, path: &str) -> Result<OpenFile, CheckpointError> {
        if !is_plain(path) {
            return Err(self.unsafe_path(path));
        }
        match self {
            Files::Archive(archive) => {
                let absent =
                    || CheckpointError::Absent { location: self.location(), what: path.into() };
                let bytes = archive.size(path)?.ok_or_else(absent)?;
                Ok(OpenFile::Object { archive: archive.clone(), bytes })
            }
            Files::Dir(dir) => {
                let io = |action| CheckpointError::io(dir.join(path).display().to_string(), action);
                let file = File::open(self.real_path(path)?).map_err(io("open"))?;
                let bytes = file.metadata().map_err(io("read its size"))?.len();
                Ok(OpenFile::File { file, bytes })
            }
            Files::Embedded(files) => {
                let found = files.iter().find(|(name, _)| *name == path);
                let (_, bytes) = found.ok_or_else(|| CheckpointError::Absent {
                    location: self.location(),
                    what: path.into(),
                })?;
                Ok(OpenFile::Embedded(bytes))
            }
        }
    }

    /// Where a path within a folder leads, to a regular file below that folder.
    pub fn real_path(&self, path: &str) -> Result<PathBuf, CheckpointError> {
        let Files::Dir(dir) = self else {
            let (location, what) = (self.location(), format!("{path} in a local folder"));
            return Err(CheckpointError::Absent { location, what });
        };
        let io = |action| CheckpointError::io(dir.join(path).display().to_string(), action);
        if !is_plain(path) {
            return Err(self.unsafe_path(path));
        }
        let real = fs::canonicalize(dir.join(path)).map_err(io("open"))?;
        if !real.starts_with(dir) {
            return Err(self.unsafe_path(path));
        }
        // Opening a pipe would wait for a writer, so the kind is asked first.
        if !fs::metadata(&real).map_err(io("read its size"))?.is_file() {
            return Err(CheckpointError::malformed(path, "not a regular file"));
        }
        Ok(real)
    }

    fn unsafe_path(&self, path: &str) -> CheckpointError {
        CheckpointError::UnsafePath { path: path.into(), location: self.location() }
    }

    /// Opens one file that must have exactly this size. Of an object that is found out when it is
    /// read.
    pub fn open_sized(&self, path: &str, expected: u64) -> Result<OpenFile, CheckpointError> {
        if let Files::Archive(archive) = self
            && is_plain(path)
        {
            return Ok(OpenFile::Object { archive: archive.clone(), bytes: expected });
        }
        let file = self.open(path)?;
        if file.bytes() != expected {
            return Err(CheckpointError::Size { path: path.into(), found: file.bytes(), expected });
        }
        Ok(file)
    }
}

impl OpenFile {
    /// Size of the file.
    pub fn bytes(&self) -> u64 {
        match self {
            OpenFile::File { bytes, .. } | OpenFile::Object { bytes, .. } => *bytes,
            OpenFile::Embedded(bytes) => bytes.len() as u64,
        }
    }

    fn checked(&self, path: &str, range: &Range<u64>) -> Result<Range<usize>, CheckpointError> {
        let fits = range.start <= range.end && range.end <= self.bytes();
        match (fits, usize::try_from(range.start), usize::try_from(range.end)) {
            (true, Ok(start), Ok(end)) => Ok(start..end),
            _ => Err(CheckpointError::Size {
                path: path.into(),
                found: self.bytes(),
                expected: range.end,
            }),
        }
    }

    /// A range in memory that kernels can use: embedded bytes are borrowed when they are aligned,
    /// others are read.
    pub fn read(&self, path: &str, range: Range<u64>) -> Result<Buffer, CheckpointError> {
        let at = self.checked(path, &range)?;
        let borrowed = match self {
            OpenFile::File { .. } | OpenFile::Object { .. } => None,
            OpenFile::Embedded(bytes) => Buffer::from_owner(&bytes[at.clone()]).ok(),
        };
        if let Some(buffer) = borrowed {
            return Ok(buffer);
        }
        if let OpenFile::Object { archive, bytes } = self
            && at.len() > TRUSTED_BYTES
        {
            let found = archive.size(path)?.unwrap_or(0);
            if found != *bytes {
                let (path, expected) = (path.into(), *bytes);
                return Err(CheckpointError::Size { path, found, expected });
            }
        }
        let mut bytes = AlignedBytes::zeroed(at.len());
        self.read_into(path, range.start, &mut bytes)?;
        Ok(bytes.into())
    }

    /// Fills `out` from a position.
    pub fn read_into(&self, path: &str, from: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let at = self.checked(path, &(from..from.saturating_add(out.len() as u64)))?;
        match self {
            OpenFile::File { file, .. } => {
                file.read_exact_at(out, from).map_err(CheckpointError::io(path, "read"))
            }
            OpenFile::Object { archive, bytes } => match archive.read_into(path, from, out)? {
                found if found == *bytes => Ok(()),
                found => Err(CheckpointError::Size { path: path.into(), found, expected: *bytes }),
            },
            OpenFile::Embedded(bytes) => {
                out.copy_from_slice(&bytes[at]);
                Ok(())
            }
        }
    }
}

/// Numbers of the manifests in a store without listings: they are counted from 1 without gaps.
fn count_up(archive: &dyn Archive) -> Result<Vec<u64>, CheckpointError> {
    let mut numbers = Vec::new();
    for number in 1..=MANIFESTS_MAX {
        match archive.size(&manifest_name(number)) {
            Ok(Some(_)) => numbers.push(number),
            Ok(None) => return Ok(numbers),
            // A store that does not list for us does not say what is not there, either.
            Err(error) if error.kind == ArchiveFailure::Denied && number > 1 => return Ok(numbers),
            Err(error) => return Err(error.into()),
        }
    }
    let reason = format!(
        "the server has an answer for every name from 1 to {MANIFESTS_MAX}, so which is the last \
         cannot be told; name one with @N behind the URL, or correct the URL"
    );
    Err(CheckpointError::malformed(&manifest_name(MANIFESTS_MAX), reason))
}

#[cfg(test)]
mod tests {
    use super::is_plain;

    #[test]
    fn only_paths_that_stay_inside_are_plain() {
        for good in ["manifest.json", "tiers/tier_1b/g00000.json"] {
            assert!(is_plain(good), "{good}");
        }
        let bad = ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", "a\\b", "c:x", "a\0b"];
        for bad in bad {
            assert!(!is_plain(bad), "{bad:?}");
        }
    }
}
