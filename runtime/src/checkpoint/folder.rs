//! A folder that a checkpoint is written to.
//!
//! Invariants: one writer at a time, and none that died is in the way; a file appears under its name
//! when it is complete and synced; a manifest appears only if there is none of its name; nothing but
//! the leftovers of an interrupted writer is ever overwritten.

use std::{
    fs::{self, File, TryLockError},
    io::{ErrorKind, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{CheckpointError, manifest::manifest_name, source::Files, writer::STAGING_MARK};

const STAGING_SUFFIX: &str = ".staging";

/// A folder, locked as long as this lives.
#[derive(Debug)]
pub(super) struct Folder {
    dir: PathBuf,
    /// The mark, locked.
    _lock: File,
}

/// A file that has not got its name yet.
#[derive(Debug)]
pub(super) struct Staged {
    /// To be written to.
    pub(super) file: File,
    /// Its staging name; none if it is uploaded from here.
    pub(super) name: Option<PathBuf>,
}

impl Folder {
    /// Takes a folder that is empty, new, or left by an interrupted writer.
    pub(super) fn create(dir: &Path) -> Result<Self, CheckpointError> {
        let io = |action| CheckpointError::io(dir.display().to_string(), action);
        let occupied = |reason| occupied(dir, reason);
        if dir.exists() && !dir.is_dir() {
            return Err(occupied("is a file"));
        }
        fs::create_dir_all(dir).map_err(io("create"))?;
        let files = Files::dir(dir)?;
        let unfinished = dir.join(STAGING_MARK).exists();
        if files.holds_checkpoint()? {
            return Err(occupied("already holds a checkpoint"));
        }
        if !unfinished && fs::read_dir(dir).map_err(io("list"))?.next().is_some() {
            return Err(occupied("is not empty"));
        }
        let folder = Self::lock(dir)?;
        // Another import may have ended since.
        if files.holds_checkpoint()? {
            return Err(occupied("already holds a checkpoint"));
        }
        remove_leftovers(dir).map_err(io("remove the leftovers of an unfinished import"))?;
        Ok(folder)
    }

    /// Makes the mark of a folder that is being written to, and locks it.
    pub(super) fn lock(dir: &Path) -> Result<Self, CheckpointError> {
        let mark = dir.join(STAGING_MARK);
        let io = |action| CheckpointError::io(mark.display().to_string(), action);
        loop {
            let file =
                File::options().create(true).append(true).open(&mark).map_err(io("create"))?;
            // A file system without locks has none to be in the way either.
            if let Err(TryLockError::WouldBlock) = file.try_lock() {
                return Err(occupied(dir, "is being written to by another process"));
            }
            // Whoever held it may have removed it since it was opened: then it locks nothing.
            let (ours, there) = (file.metadata().map_err(io("look at"))?, fs::metadata(&mark));
            if there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
                return Ok(Self { dir: dir.to_owned(), _lock: file });
            }
        }
    }

    /// Where it is.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Removes a folder within, if it is there.
    pub(super) fn remove(&self, folder: &str) -> Result<(), CheckpointError> {
        match fs::remove_dir_all(self.dir.join(folder)) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(CheckpointError::io(folder, "remove the leftovers in")(e))
            }
            _ => Ok(()),
        }
    }

    /// Creates a file under its staging name.
    pub(super) fn stage(&self, path: &str) -> Result<Staged, CheckpointError> {
        let (file, name) = self.create_staging(path)?;
        Ok(Staged { file, name: Some(name) })
    }

    fn create_staging(&self, path: &str) -> Result<(File, PathBuf), CheckpointError> {
        let name = self.dir.join(format!("{path}{STAGING_SUFFIX}"));
        let io = |action| CheckpointError::io(name.display().to_string(), action);
        if let Some(parent) = name.parent() {
            fs::create_dir_all(parent).map_err(io("create the folder of"))?;
        }
        let file = File::create(&name).map_err(io("create"))?;
        Ok((file, name))
    }

    /// Gives a file its name.
    pub(super) fn commit(&self, staged: Staged, path: &str) -> Result<(), CheckpointError> {
        staged.file.sync_all().map_err(CheckpointError::io(path, "sync"))?;
        let Some(name) = staged.name else { return Ok(()) };
        fs::rename(name, self.dir.join(path)).map_err(CheckpointError::io(path, "rename"))
    }

    /// Makes a manifest appear, whole and only if there is none of its name, and removes the mark.
    /// `folders` are those of the files that it names.
    pub(super) fn finish(
        self,
        folders: &[PathBuf],
        path: &str,
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        folders.iter().filter(|dir| dir.exists()).try_for_each(|dir| sync_folder(dir))?;
        let (mut file, name) = self.create_staging(path)?;
        let io = |action| CheckpointError::io(path, action);
        file.write_all(bytes).map_err(io("write"))?;
        file.sync_all().map_err(io("sync"))?;
        let linked = match fs::hard_link(&name, self.dir.join(path)) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(e),
            // A file system without links: what is torn by a crash is refused by its hash.
            Err(_) => File::create_new(self.dir.join(path)).and_then(|mut file| {
                file.write_all(bytes)?;
                file.sync_all()
            }),
            Ok(()) => Ok(()),
        };
        match linked {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                return Err(CheckpointError::Raced {
                    location: self.dir.display().to_string(),
                    manifest: path.into(),
                });
            }
            linked => linked.map_err(io("create"))?,
        }
        fs::remove_file(&name).map_err(io("remove the staging name of"))?;
        self.end()
    }

    /// Removes a manifest, then the folder of its files: an interruption between the two leaves files that
    /// nobody names, and the next writer of that number removes them.
    pub(super) fn drop_manifest(self, number: u64) -> Result<(), CheckpointError> {
        let path = manifest_name(number);
        let removed = fs::remove_file(self.dir.join(&path));
        removed.map_err(CheckpointError::io(path, "remove"))?;
        sync_folder(&self.dir)?;
        self.remove(&format!("v{number}"))?;
        self.end()
    }

    /// Removes the mark.
    fn end(self) -> Result<(), CheckpointError> {
        sync_folder(&self.dir)?;
        let mark = self.dir.join(STAGING_MARK);
        fs::remove_file(&mark).map_err(CheckpointError::io(mark.display().to_string(), "remove"))
    }
}

fn occupied(dir: &Path, reason: &'static str) -> CheckpointError {
    CheckpointError::Occupied { location: dir.display().to_string(), reason }
}

pub(crate) fn sync_folder(dir: &Path) -> Result<(), CheckpointError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(CheckpointError::io(dir.display().to_string(), "sync"))
}

/// Removes what an interrupted writer left.
fn remove_leftovers(dir: &Path) -> std::io::Result<()> {
    for name in ["dense", "tiers"] {
        match fs::remove_dir_all(dir.join(name)) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    for name in ["tokenizer.json", "chat_template.jinja", &manifest_name(1)] {
        for name in [name.to_owned(), format!("{name}{STAGING_SUFFIX}")] {
            match fs::remove_file(dir.join(name)) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}
