//! Verification of a whole checkpoint: every file's size and every hash.
//!
//! Memory stays small: tensors are hashed in pieces, never held. Damage does not stop it, so one
//! run names every damaged file.

use std::fmt;

use serde::Serialize;

use super::{
    Checkpoint, CheckpointError,
    index::{Hash, Shard, TensorEntry},
    reader::{check_header, read_whole},
    source::OpenFile,
};

const PIECE_BYTES: usize = 8 << 20;

/// What was verified.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Files read, manifest and indexes included.
    pub files: u64,
    /// Tensors whose hashes agree.
    pub tensors: u64,
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
            done += shard.header_bytes;
            for entry in &shard.tensors {
                progress(done, total, &shard.path);
                match check_tensor(shard, entry, &file, &mut piece) {
                    Ok(()) => report.tensors += 1,
                    Err(error) => errors.push(error),
                }
                done += entry.bytes;
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
    for tier in 0..checkpoint.manifest().tiers.len() {
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

fn check_tensor(
    shard: &Shard,
    entry: &TensorEntry,
    file: &OpenFile,
    piece: &mut [u8],
) -> Result<(), CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < entry.bytes {
        let len = (entry.bytes - at).min(piece.len() as u64) as usize;
        file.read_into(&shard.path, entry.offset + at, &mut piece[..len])?;
        hasher.update(&piece[..len]);
        at += len as u64;
    }
    let found = Hash(*hasher.finalize().as_bytes());
    if found != entry.blake3 {
        return Err(CheckpointError::Damaged {
            path: shard.path.clone(),
            part: format!("tensor {:?}", entry.name),
            found,
            expected: entry.blake3,
        });
    }
    Ok(())
}
