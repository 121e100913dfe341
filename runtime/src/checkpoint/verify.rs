//! Verification of a whole checkpoint: every file's size and every hash.
//!
//! Memory stays small: sections are hashed in pieces, never held. Damage does not stop it, so one
//! run names every damaged file.

use std::fmt;

use serde::Serialize;

use super::{
    Checkpoint, CheckpointError,
    index::{Hash, Section, Shard},
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
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} errors", self.errors.len())?;
        self.errors.iter().try_for_each(|error| write!(f, "\n  {error}"))
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
            Err(error) => errors.push(error),
        }
    }

    let shards = shards(checkpoint, &mut report, &mut errors);
    let total = shards.iter().map(|s| s.bytes).sum();
    let mut done = 0;
    let mut piece = vec![0; PIECE_BYTES];
    for shard in &shards {
        let before = done;
        let result = (|| {
            let file = checkpoint.files().open_sized(&shard.path, shard.bytes)?;
            check_header(shard, &file)?;
            let mut at = shard.header_bytes;
            for section in &shard.sections {
                progress(done, total, &shard.path);
                let checked = check_padding(shard, at..section.offset, &file)
                    .and_then(|()| check_stored(shard, section, &file, &mut piece));
                match checked {
                    Ok(()) => report.sections += 1,
                    Err(error) => errors.push(error),
                }
                at = section.offset + section.stored_bytes();
                done = before + at;
            }
            Ok(())
        })();
        match result {
            Ok(()) => report.files += 1,
            Err(error) => errors.push(error),
        }
        done = before + shard.bytes;
        report.bytes += shard.bytes;
        progress(done, total, &shard.path);
    }
    if errors.is_empty() { Ok(report) } else { Err(Damage { errors }) }
}

/// Every shard whose index can be read.
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
                continue;
            }
        };
        report.files += 1;
        shards.extend(index.routers.iter().map(|l| l.shard.clone()));
        for group in 0..index.pages.len() {
            match checkpoint.page(tier, group as u32) {
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

/// Hashes what is stored. What is packed is not unpacked: its stored bytes are those that were
/// written if their hash is.
fn check_stored(
    shard: &Shard,
    section: &Section,
    file: &OpenFile,
    piece: &mut [u8],
) -> Result<(), CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < section.stored_bytes() {
        let len = (section.stored_bytes() - at).min(piece.len() as u64) as usize;
        file.read_into(&shard.path, section.offset + at, &mut piece[..len])?;
        hasher.update(&piece[..len]);
        at += len as u64;
    }
    let found = Hash(*hasher.finalize().as_bytes());
    let as_stored = Section { blake3: section.stored_blake3(), ..section.clone() };
    check_section(shard, &as_stored, found)
}

/// What lies between sections is zeros.
fn check_padding(
    shard: &Shard,
    range: std::ops::Range<u64>,
    file: &OpenFile,
) -> Result<(), CheckpointError> {
    let mut bytes = [0; super::DATA_ALIGN as usize];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(bytes.len() as u64) as usize;
        file.read_into(&shard.path, at, &mut bytes[..len])?;
        if let Some(odd) = bytes[..len].iter().position(|b| *b != 0) {
            let reason = format!("byte {} between sections is not zero", at + odd as u64);
            return Err(CheckpointError::malformed(&shard.path, reason));
        }
        at += len as u64;
    }
    Ok(())
}
