//! The files of a disk cache: which there are, which are to go, and whether the disk takes any.
//!
//! An expert is a file of its bytes as kernels use them, in a folder that is named after the
//! checkpoint's root hash; its name says which. Folders of other checkpoints stay as long as their
//! files have room beside.
//!
//! Invariants: the bytes of all these files, those that are being written included, never exceed the
//! budget, each counted in blocks; what cannot be deleted goes on counting, and nothing is written
//! in its place; only files that bear our names are ever deleted.

use std::{
    collections::BTreeSet,
    fs::{self, DirEntry, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use super::super::{
    machine::{Command, Event, Residency, ResidencyOptions, RoutedRow},
    policy::Policy,
};
use crate::{blocks::BLOCK_ALIGN, checkpoint::Checkpoint, expert::ExpertKey};

/// Extension of a file that is being written.
pub(super) const STAGING: &str = "part";
const LOCK: &str = "lite-llm.lock";
/// What the names of checkpoints' folders begin with.
const PREFIX: &str = "experts-";
/// Writes that fail in a row before the disk is left alone for a while.
const FAILURES_MAX: u32 = 3;
/// Experts that are not offered to a disk that fails, at most, until it is tried again: twice as
/// many with each failure.
const LEFT_ALONE_MAX: u32 = 1024;

/// See the module's text.
pub(super) struct Disk {
    folder: PathBuf,
    level: Residency,
    /// What is not the level's and counts: other checkpoints' files, the first to go last, and what
    /// could not be deleted.
    others: Vec<(PathBuf, u64)>,
    others_bytes: u64,
    /// Writes that failed in a row.
    failures: u32,
    left_alone: u32,
    said: bool,
    closed: bool,
}

/// A file that an earlier process left.
struct Left {
    modified: SystemTime,
    key: Option<ExpertKey>,
    path: PathBuf,
    bytes: u64,
}

/// Name of an expert's file.
pub(super) fn name(key: ExpertKey) -> String {
    let ExpertKey { layer, tier, group, expert } = key;
    format!("{layer}-{tier}-{group}-{expert}")
}

fn key_of(name: &str) -> Option<ExpertKey> {
    let mut parts = name.split('-').map(|part| part.parse::<u32>().ok());
    let mut next = || parts.next().flatten();
    let (layer, tier, group, expert) = (next()?, next()?, next()?, next()?);
    let (layer, tier) = (layer.try_into().ok()?, tier.try_into().ok()?);
    let key = ExpertKey { layer, tier, group, expert };
    (name == self::name(key)).then_some(key)
}

fn blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_ALIGN)
}

/// Deletes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes a folder into use: its state, the checkpoint's part of it, and the lock to be held as long
/// as it is used.
pub(super) fn open(
    root: &Path,
    budget: u64,
    checkpoint: &Checkpoint,
    policy: Box<dyn Policy>,
) -> io::Result<(Disk, PathBuf, Option<File>)> {
    let named = |error: io::Error| {
        io::Error::new(error.kind(), format!("disk cache {}: {error}", root.display()))
    };
    let smallest = checkpoint.tier_expert_bytes().into_iter().map(blocks).min().unwrap_or(0);
    if budget < smallest {
        let reason =
            format!("{budget} bytes have no room for an expert of {smallest}; give --nvme more");
        return Err(named(io::Error::new(io::ErrorKind::InvalidInput, reason)));
    }
    let id: String = checkpoint.id()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = root.join(format!("{PREFIX}{id}"));
    if let Err(error) = fs::create_dir_all(&folder) {
        if !root.is_dir() {
            let reason = format!("{error}; --nvme names a folder that is there or can be made");
            return Err(named(io::Error::new(error.kind(), reason)));
        }
        tracing::warn!(folder = %root.display(), %error, "nothing can be kept on this disk");
    }
    let lock = lock(root).map_err(named)?;
    let moe = checkpoint.config().moe.clone().map(Arc::new).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "a model without experts needs no disk cache")
    })?;
    let expert_bytes = checkpoint.tier_expert_bytes().into_iter().map(blocks).collect();
    let options = ResidencyOptions { budget, expert_bytes, moe, policy, prefetch: false };
    let mut disk = Disk {
        folder: folder.clone(),
        level: Residency::new(options),
        others: Vec::new(),
        others_bytes: 0,
        failures: 0,
        left_alone: 0,
        said: false,
        closed: false,
    };
    let known: BTreeSet<ExpertKey> = checkpoint.config().expert_keys().collect();
    disk.level.handle(Event::Keep(known.clone()));
    let whole = |left: &Left| {
        let key = left.key.filter(|key| known.contains(key))?;
        (checkpoint.expert_bytes(key).ok()? == left.bytes).then_some(key)
    };
    disk.recover(root, whole).map_err(named)?;
    Ok((disk, folder, lock))
}

/// Locks a folder against other processes. A file system without locks has none to be in the way
/// either; one that cannot be written to is not written to by others.
fn lock(root: &Path) -> io::Result<Option<File>> {
    let path = root.join(LOCK);
    let file = File::options().create(true).append(true).open(&path);
    let Ok(file) = file.or_else(|_| File::open(&path)) else { return Ok(None) };
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another process uses this folder as its cache; give each a folder of its own",
        )),
        _ => Ok(Some(file)),
    }
}

/// The files of ours in a folder.
fn list(folder: &Path) -> Vec<Left> {
    // What cannot be listed cannot be used, and is not in the way of an answer.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(left).collect()
}

fn left(entry: DirEntry) -> Option<Left> {
    let file = entry.file_name();
    let file = file.to_str()?;
    let key = key_of(file);
    let staged = || file.strip_suffix(STAGING).and_then(|name| name.strip_suffix('.'));
    if key.is_none() && staged().and_then(key_of).is_none() {
        return None;
    }
    let metadata = entry.metadata().ok()?;
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let (key, bytes) = (key.filter(|_| metadata.is_file()), metadata.len());
    Some(Left { modified, key, path: entry.path(), bytes })
}

impl Disk {
    /// Takes note of what earlier processes left, as far as it is whole by its size and has room, the
    /// youngest first; deletes the rest.
    fn recover(
        &mut self,
        root: &Path,
        whole: impl Fn(&Left) -> Option<ExpertKey>,
    ) -> io::Result<()> {
        let mut ours = list(&self.folder);
        ours.sort_by(|a, b| b.modified.cmp(&a.modified).then_with(|| a.path.cmp(&b.path)));
        let (mut kept, mut held) = (Vec::new(), 0);
        for left in ours {
            let bytes = blocks(left.bytes);
            match whole(&left).filter(|_| held + bytes <= self.level.budget()) {
                Some(key) => {
                    held += bytes;
                    kept.push(key);
                }
                None => self.delete(left.path, left.bytes),
            }
        }
        // The youngest is the one that was used last.
        for key in kept.into_iter().rev() {
            self.asked(key);
            self.level.handle(Event::Demand(vec![(key, 1)]));
            match self.carry_out(key) {
                true => self.written(key),
                false => {
                    self.release(key);
                    self.delete(self.folder.join(name(key)), self.level.bytes(key));
                }
            }
        }
        let mut others = Vec::new();
        for entry in fs::read_dir(root)? {
            let path = entry?.path();
            let is_other = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with(PREFIX) && path != self.folder);
            if is_other {
                others.extend(list(&path));
                // Only if it is empty.
                let _ = fs::remove_dir(&path);
            }
        }
        others.sort_by(|a, b| b.modified.cmp(&a.modified).then_with(|| a.path.cmp(&b.path)));
        self.others_bytes += others.iter().map(|left| blocks(left.bytes)).sum::<u64>();
        // What could not be deleted is tried last.
        self.others.extend(others.into_iter().map(|left| (left.path, blocks(left.bytes))));
        if let Err(error) = self.make_room() {
            self.say(&error);
        }
        let (folder, held, budget) = (self.folder.display(), self.held(), self.budget());
        tracing::debug!(%folder, held, budget, "took a disk cache into use");
        Ok(())
    }

    /// An expert is asked for. If it is here, it stays until it is released or lost.
    pub(super) fn asked(&mut self, key: ExpertKey) -> bool {
        let row = RoutedRow { stream: 0, last: [0; 3], experts: vec![key], near: Vec::new() };
        self.level.handle(Event::Routed { layer: key.layer, rows: vec![row] });
        let here = self.level.is_here(key) && !self.closed;
        if here {
            self.level.handle(Event::Demand(vec![(key, 1)]));
        }
        self.carry_out(key);
        here
    }

    /// It was read.
    pub(super) fn release(&mut self, key: ExpertKey) {
        self.level.handle(Event::Used(vec![key]));
        self.carry_out(key);
    }

    /// Its file is not what it should be, or gone.
    pub(super) fn lost(&mut self, key: ExpertKey) {
        let bytes = self.level.bytes(key);
        self.level.handle(Event::Used(vec![key]));
        self.level.handle(Event::Lost(key));
        self.carry_out(key);
        if !self.closed {
            self.delete(self.folder.join(name(key)), bytes);
        }
    }

    /// Whether an expert is to be written; [`Disk::written`] or [`Disk::not_written`] then says what
    /// came of it. An error was counted as a failure of the disk.
    pub(super) fn admit(&mut self, key: ExpertKey) -> Result<bool, ()> {
        if self.closed || self.left_alone > 0 {
            self.left_alone = self.left_alone.saturating_sub(1);
            return Ok(false);
        }
        self.level.handle(Event::Demand(vec![(key, 1)]));
        if !self.carry_out(key) {
            // It is there, it is being written, or all others are in use.
            self.release(key);
            return Ok(false);
        }
        if let Err(error) = self.make_room() {
            self.not_written(key);
            self.failed(&error);
            return Err(());
        }
        Ok(true)
    }

    /// Its file is there.
    pub(super) fn written(&mut self, key: ExpertKey) {
        self.failures = 0;
        self.level.handle(Event::Arrived(key));
        self.release(key);
    }

    /// It was not written after all.
    pub(super) fn not_written(&mut self, key: ExpertKey) {
        self.level.handle(Event::Failed(key, String::new()));
        self.carry_out(key);
    }

    /// The disk did not take what it was to take.
    pub(super) fn failed(&mut self, error: &io::Error) {
        self.failures += 1;
        if let Some(more) = self.failures.checked_sub(FAILURES_MAX) {
            self.left_alone = (1 << more.min(10)).min(LEFT_ALONE_MAX);
            self.say(error);
        }
    }

    /// Deletes nothing from now on, and has nothing to be read or written.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Bytes of what is here and of what is being written.
    pub(super) fn held(&self) -> u64 {
        self.level.held_bytes()
    }

    /// Bytes that it may hold.
    pub(super) fn budget(&self) -> u64 {
        self.level.budget()
    }

    fn say(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.said, true) {
            let folder = self.folder.display();
            tracing::warn!(
                %folder, %error,
                "this disk takes no more experts; what is not there comes from below, more slowly"
            );
        }
    }

    /// Does what the level wants; says whether an expert has room.
    fn carry_out(&mut self, of: ExpertKey) -> bool {
        let mut room = false;
        while let Some(command) = self.level.poll_command() {
            match command {
                Command::Fetch(key, _) if key == of => room = true,
                // Nobody waits for it any more.
                Command::Fetch(key, _) => self.level.handle(Event::Failed(key, String::new())),
                Command::Evict(key) => {
                    self.delete(self.folder.join(name(key)), self.level.bytes(key));
                }
                Command::Promote(_)
                | Command::Cancel(_)
                | Command::Ready(_)
                | Command::Refuse(..)
                | Command::Loaded(_) => {}
            }
        }
        room
    }

    /// Deletes a file, or counts it among those that stay.
    fn delete(&mut self, path: PathBuf, bytes: u64) {
        if remove(&path).is_err() {
            let bytes = blocks(bytes);
            self.others_bytes += bytes;
            self.others.insert(0, (path, bytes));
        }
    }

    /// Deletes others' files until what the level holds has room beside them.
    fn make_room(&mut self) -> io::Result<()> {
        while self.level.held_bytes() + self.others_bytes > self.level.budget() {
            let Some((path, bytes)) = self.others.last() else { break };
            remove(path)?;
            self.others_bytes -= bytes;
            self.others.pop();
        }
        Ok(())
    }
}
