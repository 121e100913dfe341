//! A prefix of an object store that a checkpoint is written to.
//!
//! A shard is written to an unnamed temporary file first (its header tells where everything ends),
//! and uploaded when it is whole, while the next one is made. What was uploaded is read back and
//! compared; then its index entry is written to the journal, so that an import that was interrupted
//! goes on behind its last whole shard. What is uploaded in parts is noted there before the first:
//! whoever goes on behind a kill ends it, for its parts take room in the store. Journal and mark are
//! removed behind the manifest.
//!
//! Invariants: nothing opens before everything is there, for the manifest comes last; the manifest is
//! created only if there is none. Stores have no locks: the mark says what is being imported, and
//! only the import of the very same joins it. Two that do write the same bytes, and where one ends
//! what the other is uploading, that one begins it again. The journal of another import is not read.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    sync::Arc,
    thread::{self, JoinHandle},
};

use super::{
    CheckpointError,
    archive::{Archive, ArchiveFailure},
    folder::Staged,
    index::{Hash, Shard},
    source::Files,
    writer::STAGING_MARK,
};

/// Where index entries of uploaded shards are kept until the manifest names them: in a folder for
/// each stamp.
const JOURNAL: &str = "import.journal";
/// How often a shard is begun again whose upload somebody else has ended.
const BEGUN_MAX: u32 = 5;
/// Largest journal entry or mark that is read.
const NOTE_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are read back at once: several parts of the archive's.
const PIECE_BYTES: usize = 32 << 20;

/// An upload that is under way.
#[derive(Debug)]
pub(super) struct Upload {
    archive: Arc<dyn Archive>,
    /// Hash of all that decides what is written.
    stamp: Hash,
    /// Whether an interrupted import left shards here.
    resumed: bool,
    /// The shard on its way: one, while the next is made.
    pending: Option<JoinHandle<Result<(), CheckpointError>>>,
    /// Journal entries that were written.
    journal: Vec<String>,
}

impl Upload {
    /// Takes a prefix that is empty, or was left by an interrupted import of the same: `stamp` is
    /// the hash of everything that decides which bytes are written.
    pub(super) fn begin(archive: Arc<dyn Archive>, stamp: Hash) -> Result<Self, CheckpointError> {
        let location = archive.location();
        let occupied = |reason| CheckpointError::Occupied { location: location.clone(), reason };
        let files = Files::Archive(archive.clone());
        if files.holds_checkpoint()? {
            return Err(occupied("already holds a checkpoint"));
        }
        let objects = archive.list("")?.unwrap_or_default();
        let marked = objects.iter().any(|(name, _)| name == STAGING_MARK);
        if !marked && !objects.is_empty() {
            return Err(occupied("is not empty"));
        }
        let mark = format!("{stamp}\n");
        let fresh = archive.create(STAGING_MARK, mark.as_bytes())?;
        if !fresh && read_note(&*archive, STAGING_MARK)?.as_deref() != Some(mark.as_bytes()) {
            return Err(occupied(
                "holds an unfinished import of another model, or with other options",
            ));
        }
        // Another import may have ended since.
        if files.holds_checkpoint()? {
            if fresh {
                archive.remove(&[STAGING_MARK.into()])?;
            }
            return Err(occupied("already holds a checkpoint"));
        }
        Ok(Self { archive, stamp, resumed: !fresh, pending: None, journal: Vec::new() })
    }

    /// For messages.
    pub(super) fn location(&self) -> String {
        self.archive.location()
    }

    /// What an interrupted import uploaded under a path, if it is whole.
    pub(super) fn uploaded(&mut self, path: &str) -> Result<Option<Shard>, CheckpointError> {
        if !self.resumed {
            return Ok(None);
        }
        let [entry, parts] = self.notes(path);
        let whole = self.whole(path, &entry)?;
        if whole.is_none()
            && let Some(begun) = read_note(&*self.archive, &parts)?
            && let Ok(begun) = std::str::from_utf8(&begun)
        {
            self.archive.abandon_put(path, begun)?;
        }
        // One that is not whole is written again, and noted then.
        self.journal.extend(whole.iter().flat_map(|_| [entry.clone(), parts.clone()]));
        Ok(whole)
    }

    /// What the journal says of a shard that is there.
    fn whole(&self, path: &str, entry: &str) -> Result<Option<Shard>, CheckpointError> {
        let Some(note) = read_note(&*self.archive, entry)? else { return Ok(None) };
        // What is torn or strange is uploaded again.
        let shard = serde_json::from_slice::<Shard>(&note).ok().filter(|shard| shard.path == path);
        let Some(shard) = shard else { return Ok(None) };
        Ok((self.archive.size(path)? == Some(shard.bytes)).then_some(shard))
    }

    /// A shard's entry in the journal, and what is noted there of its upload in parts.
    fn notes(&self, path: &str) -> [String; 2] {
        ["json", "parts"].map(|kind| format!("{JOURNAL}/{}/{path}.{kind}", self.stamp))
    }

    /// An unnamed file, which is gone with this process, whatever ends it.
    pub(super) fn stage(&self) -> Result<Staged, CheckpointError> {
        let place = std::env::temp_dir();
        let file = tempfile::tempfile_in(&place).map_err(CheckpointError::io(
            place.display().to_string(),
            "make a temporary file (TMPDIR says where, it needs room for one shard) in",
        ))?;
        Ok(Staged { file, name: None })
    }

    /// Uploads a shard, in the background.
    pub(super) fn commit(&mut self, staged: Staged, shard: &Shard) -> Result<(), CheckpointError> {
        self.settle()?;
        let (archive, shard) = (self.archive.clone(), shard.clone());
        let [entry, parts] = self.notes(&shard.path);
        self.journal.extend([entry.clone(), parts.clone()]);
        let upload = move || {
            put(&*archive, &shard.path, &staged.file, shard.bytes, Some(&parts))?;
            let note = serde_json::to_vec(&shard).expect("an index has only string keys");
            write(&*archive, &entry, &note)
        };
        let spawned = thread::Builder::new().name("lite-llm-upload".into()).spawn(upload);
        let spawned = spawned.map_err(CheckpointError::io("the upload", "start a thread for"))?;
        self.pending = Some(spawned);
        Ok(())
    }

    /// Uploads a small file.
    pub(super) fn write(&self, path: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        write(&*self.archive, path, bytes)
    }

    /// Makes the manifest appear, if there is none of its name.
    pub(super) fn finish(mut self, path: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.settle()?;
        if !self.archive.create(path, bytes)?
            && read_note(&*self.archive, path)?.as_deref() != Some(bytes)
        {
            let (location, manifest) = (self.location(), path.into());
            return Err(CheckpointError::Raced { location, manifest });
        }
        self.journal.push(STAGING_MARK.into());
        if let Err(error) = self.archive.remove(&self.journal) {
            // The checkpoint is whole; these are in nobody's way.
            tracing::warn!(%error, "the journal of the import could not be removed");
        }
        Ok(())
    }

    /// Waits for the shard on its way.
    fn settle(&mut self) -> Result<(), CheckpointError> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        pending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // An import that failed elsewhere: what is on its way is allowed to arrive.
        if let Some(pending) = self.pending.take() {
            let _ = pending.join();
        }
    }
}

fn write(archive: &dyn Archive, path: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    let io = || CheckpointError::io(path, "stage");
    let mut file = tempfile::tempfile().map_err(io())?;
    file.write_all(bytes).map_err(io())?;
    put(archive, path, &file, bytes.len() as u64, None)
}

/// Uploads a file, reads it back and compares. Where `parts` is, the upload is noted if it is one in
/// parts.
fn put(
    archive: &dyn Archive,
    path: &str,
    file: &File,
    bytes: u64,
    parts: Option<&str>,
) -> Result<(), CheckpointError> {
    let mut tries = 1;
    loop {
        let mut begun = None;
        if let Some(parts) = parts {
            begun = archive.begin_put(path, bytes)?;
            if let Some(begun) = &begun {
                write(archive, parts, begun.as_bytes())?;
            }
        }
        match archive.put(path, file, bytes, begun.as_deref()) {
            Ok(()) => break,
            // Another import of the same goes on behind this one, and has ended what was begun.
            Err(error)
                if error.kind == ArchiveFailure::Absent && begun.is_some() && tries < BEGUN_MAX =>
            {
                tries += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let piece = bytes.min(PIECE_BYTES as u64) as usize;
    let (mut there, mut here) = (vec![0; piece], vec![0; piece]);
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(piece as u64) as usize;
        let found = archive.read_into(path, at, &mut there[..len])?;
        if found != bytes {
            return Err(CheckpointError::Size { path: path.into(), found, expected: bytes });
        }
        file.read_exact_at(&mut here[..len], at)
            .map_err(CheckpointError::io(path, "read again"))?;
        if let Some(odd) = (0..len).find(|&i| there[i] != here[i]) {
            let odd = at + odd as u64;
            let reason = format!("byte {odd} was read back from the store with another value");
            return Err(CheckpointError::malformed(path, reason));
        }
        at += len as u64;
    }
    Ok(())
}

/// A small object, if it is there.
fn read_note(archive: &dyn Archive, path: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
    let Some(bytes) = archive.size(path)? else { return Ok(None) };
    if bytes > NOTE_BYTES_MAX {
        let reason = format!("{bytes} bytes, at most {NOTE_BYTES_MAX} expected");
        return Err(CheckpointError::malformed(path, reason));
    }
    let mut note = vec![0; bytes as usize];
    if bytes > 0 {
        archive.read_into(path, 0, &mut note)?;
    }
    Ok(Some(note))
}
