//! Verification of a whole checkpoint: every file's size and every hash, of what is compressed both
//! as it is stored and as it is used.
//!
//! Memory stays small: sections are hashed in pieces, never held. Damage does not stop it, so one
//! run names every damaged file. A store that does not answer does: each read would wait for its
//! deadline in vain.

use std::{
    fmt,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
};

use serde::Serialize;

use super::{
    Checkpoint, CheckpointError,
    archive::{ArchiveError, ArchiveFailure},
    codec::{HashUnpacked, bad_frame, check_codec, check_stored},
    index::{Hash, Shard},
    parallel::try_map,
    reader::{check_header, check_section, read_whole},
    source::OpenFile,
};

const PIECE_BYTES: usize = 8 << 20;

/// What was verified.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Files read, manifest and indexes included.
    pub files: u64,
    /// Sections (tensors of the dense part, gates, experts) whose hashes agree.
    pub sections: u64,
    /// Those of them that are stored compressed, and were unpacked.
    pub compressed: u64,
    /// Tiers whose files are not here, and were not verified.
    pub absent_tiers: Vec<String>,
    /// Bytes of weights.
    pub bytes: u64,
}

/// Everything that is wrong with a checkpoint.
#[derive(Debug)]
pub struct Damage {
    /// Each naming a file.
    pub errors: Vec<CheckpointError>,
    /// Whether the last of them is that the store does not answer, so that not everything was looked
    /// at.
    pub stopped: bool,
}

impl Damage {
    fn new(errors: Vec<CheckpointError>) -> Self {
        let stopped = errors.last().is_some_and(is_unavailable);
        Self { errors, stopped }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} errors", self.errors.len())?;
        self.errors.iter().try_for_each(|error| write!(f, "\n  {error}"))?;
        match self.stopped {
            true => {
                f.write_str("\n  the rest was not looked at; verify again when the store answers")
            }
            false => Ok(()),
        }
    }
}

impl std::error::Error for Damage {}

/// Checks every hash. `progress` hears bytes done, bytes in all, and the shard at hand.
pub fn verify(
    checkpoint: &Checkpoint,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<Report, Damage> {
    let mut errors = Vec::new();
    // Manifest and dense index were checked when the checkpoint was opened.
    let mut report = Report { files: 2, ..Report::default() };
    let text = &checkpoint.manifest().text;
    for file in std::iter::once(&text.tokenizer).chain(&text.chat_template) {
        match read_whole(checkpoint.files(), file) {
            Ok(_) => report.files += 1,
            Err(error) => {
                errors.push(error);
                if errors.last().is_some_and(is_unavailable) {
                    return Err(Damage::new(errors));
                }
            }
        }
    }

    let shards = shards(checkpoint, &mut report, &mut errors);
    if errors.last().is_some_and(is_unavailable) {
        return Err(Damage::new(errors));
    }
    let total = shards.iter().map(|s| s.bytes).sum();
    let threads = checkpoint.files().readers();
    let open = |shard: &Shard| checkpoint.files().open_sized(&shard.path, shard.bytes);

    // A shard that is not there is one error, not one per section.
    let (mut whole, mut done) = (Vec::new(), 0);
    let stopped = each(
        threads,
        &shards,
        |shard, _| check_header(shard, &open(shard)?),
        |shard, result| {
            match result {
                Ok(()) => {
                    whole.push(shard);
                    done += shard.header_bytes;
                }
                Err(error) => {
                    errors.push(error);
                    // What cannot be read counts as done.
                    done += shard.bytes;
                }
            }
            progress(done, total, &shard.path);
        },
    );
    if let Err(error) = stopped {
        errors.push(error);
        return Err(Damage::new(errors));
    }
    report.files += whole.len() as u64;
    report.bytes = whole.iter().map(|shard| shard.bytes).sum();
    let sections: Vec<(&Shard, usize)> =
        whole.iter().flat_map(|shard| (0..shard.sections.len()).map(|i| (*shard, i))).collect();
    let stopped = each(
        threads,
        &sections,
        |(shard, i), piece| check_bytes(shard, *i, &open(shard)?, piece),
        |(shard, i), result| {
            let section = &shard.sections[*i];
            done += section.offset + section.stored_bytes() - end_before(shard, *i);
            progress(done, total, &shard.path);
            match result {
                Ok(()) => {
                    report.sections += 1;
                    report.compressed += u64::from(section.stored.is_some());
                }
                Err(error) => errors.push(error),
            }
        },
    );
    if let Err(error) = stopped {
        errors.push(error);
        return Err(Damage::new(errors));
    }
    progress(total, total, "");
    if errors.is_empty() { Ok(report) } else { Err(Damage::new(errors)) }
}

fn is_unavailable(error: &CheckpointError) -> bool {
    let kind = |error: &ArchiveError| error.kind == ArchiveFailure::Unavailable;
    matches!(error, CheckpointError::Archive(error) if kind(error))
}

/// Checks every item on several threads, and hears of each here, in the order of the items. When a
/// store does not answer, nothing more is begun, and that is the error.
fn each<'a, T: Sync>(
    threads: usize,
    items: &'a [T],
    check: impl Fn(&T, &mut Vec<u8>) -> Result<(), CheckpointError> + Sync,
    mut hear: impl FnMut(&'a T, Result<(), CheckpointError>),
) -> Result<(), CheckpointError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads.min(items.len()) {
            let (sender, next, stop, check) = (sender.clone(), &next, &stop, &check);
            scope.spawn(move || {
                let mut piece = Vec::new();
                while !stop.load(Relaxed) {
                    let i = next.fetch_add(1, Relaxed);
                    let Some(item) = items.get(i) else { return };
                    // The other end hears every item.
                    let _ = sender.send((i, check(item, &mut piece)));
                }
            });
        }
        drop(sender);
        let mut early: Vec<Option<Result<(), CheckpointError>>> = Vec::new();
        early.resize_with(items.len(), || None);
        let (mut heard, mut unavailable) = (0, None);
        for (i, result) in receiver {
            match result {
                Err(error) if is_unavailable(&error) => {
                    stop.store(true, Relaxed);
                    unavailable.get_or_insert(error);
                }
                result => early[i] = Some(result),
            }
            while let Some(result) = early.get_mut(heard).and_then(Option::take) {
                hear(&items[heard], result);
                heard += 1;
            }
        }
        let Some(error) = unavailable else { return Ok(()) };
        for (item, result) in items.iter().zip(early) {
            result.into_iter().for_each(|result| hear(item, result));
        }
        Err(error)
    })
}

/// Every shard whose index can be read. An error that a store does not answer ends the search, and
/// is the last.
pub(super) fn shards(
    checkpoint: &Checkpoint,
    report: &mut Report,
    errors: &mut Vec<CheckpointError>,
) -> Vec<Shard> {
    let dense = checkpoint.dense_index();
    let mut shards = vec![dense.model.clone()];
    shards.extend(dense.layers.iter().map(|l| l.shard.clone()));
    shards.extend(checkpoint.state_index().iter().flat_map(|state| state.shards.clone()));
    report.files += u64::from(checkpoint.state_index().is_some());
    for (tier, reference) in checkpoint.manifest().tiers.iter().enumerate() {
        if !checkpoint.config().has_tier(tier) {
            report.absent_tiers.push(reference.id.to_string());
            continue;
        }
        let index = match checkpoint.tier_index(tier) {
            Ok(index) => index,
            Err(error) => {
                errors.push(error);
                if errors.last().is_some_and(is_unavailable) {
                    return shards;
                }
                continue;
            }
        };
        report.files += 1;
        let groups: Vec<u32> = (0..index.pages.len() as u32).collect();
        let read = |group: &u32| match checkpoint.page(tier, *group) {
            Err(error) if is_unavailable(&error) => Err(error),
            page => Ok(page),
        };
        let pages = match try_map(checkpoint.files().readers(), &groups, read) {
            Ok(pages) => pages,
            Err(error) => {
                errors.push(error);
                return shards;
            }
        };
        shards.extend(index.routers.iter().map(|l| l.shard.clone()));
        for page in pages {
            match page {
                Ok(page) => {
                    report.files += 1;
                    shards.extend(page.layers.iter().map(|l| l.shard.clone()));
                }
                Err(error) => errors.push(error),
            }
        }
    }
    shards
}

/// Where what precedes a section ends.
fn end_before(shard: &Shard, section: usize) -> u64 {
    match section.checked_sub(1).map(|before| &shard.sections[before]) {
        Some(before) => before.offset + before.stored_bytes(),
        None => shard.header_bytes,
    }
}

/// Checks a section and the padding before it: zeros, then bytes of the right hash that unpack, if
/// they are compressed, to bytes of the right hash.
fn check_bytes(
    shard: &Shard,
    at: usize,
    file: &OpenFile,
    piece: &mut Vec<u8>,
) -> Result<(), CheckpointError> {
    piece.resize(PIECE_BYTES, 0);
    let section = &shard.sections[at];
    let frame = |error: std::io::Error| bad_frame(shard, section, error.to_string());
    let mut unpacked = None;
    if let Some(stored) = &section.stored {
        check_codec(shard, section, stored)?;
        unpacked = Some(HashUnpacked::new(section).map_err(frame)?);
    }
    let mut as_stored = blake3::Hasher::new();
    let mut bad = None;
    let (mut at, end) = (end_before(shard, at), section.offset + section.stored_bytes());
    while at < end {
        let len = (end - at).min(piece.len() as u64) as usize;
        file.read_into(&shard.path, at, &mut piece[..len])?;
        let zeros = section.offset.saturating_sub(at).min(len as u64) as usize;
        if let Some(odd) = piece[..zeros].iter().position(|b| *b != 0) {
            let reason = format!("byte {} between sections is not zero", at + odd as u64);
            return Err(CheckpointError::malformed(&shard.path, reason));
        }
        let bytes = &piece[zeros..len];
        as_stored.update(bytes);
        if let Some(hash) = &mut unpacked
            && bad.is_none()
        {
            bad = hash.update(bytes).err();
        }
        at += len as u64;
    }
    // Damage in the file is named as such, not by what it does to the decoder.
    check_stored(shard, section, Hash(*as_stored.finalize().as_bytes()))?;
    match (unpacked, bad) {
        (None, _) => Ok(()),
        (Some(_), Some(error)) => Err(frame(error)),
        (Some(hash), None) => check_section(shard, section, hash.finish().map_err(frame)?),
    }
}
