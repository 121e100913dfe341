//! The ledger: detached jobs, which a coordinator finishes whatever happens to it.
//!
//! ```text
//! Jobs (handle)  ──bounded queue──▶  keeper: one OS thread
//!                                    ├─ Ledger   what is to be written, run, answered: a pure machine
//!                                    ├─ Store    redb, one file in the state folder
//!                                    └─ runners  one task per job that runs, as an ordinary job
//! ```
//!
//! Invariants:
//! - who was told that a job is accepted finds it after any crash: the answer follows the sync;
//! - a job ends once: its ending is written once and never changed, and is shown only when it is on
//!   disk. A job that ran when the coordinator died runs again from its prompt and the tokens that
//!   were written, and gets the bits that it would have had;
//! - a batch is taken once per owner and key, so whoever was not answered may ask again;
//! - writes are grouped: while one is synced, all that comes waits for the next;
//! - jobs and bytes are bounded, and what does not fit is refused with a reason;
//! - an owner sees and cancels its own jobs only;
//! - there are three answers: taken, refused, and not known. Refused was not taken and is not on disk, not
//!   even by an earlier question of the same key; where a disk fails or is slow, nobody knows, and
//!   whoever asks again with the same key finds out. The ledger is opened anew.

#[cfg(test)]
mod campaign;
mod desk;
mod events;
mod keeper;
mod machine;
mod runner;
mod store;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, time::Duration};

pub use desk::{Jobs, LedgerError};
pub use events::{Command, Event, Record, Rules, Saved, SavedBatch, SavedJob};
pub use machine::{Ledger, job_bytes};
pub(crate) use runner::RunsOn;

/// Jobs that have not ended, at most.
pub const OPEN_JOBS_MAX: usize = 100_000;
/// Bytes of jobs and results, at most; what open jobs may generate counts as generated.
pub const LEDGER_BYTES_MAX: u64 = 4 << 30;
/// Detached jobs that run at a time: others' jobs are to have their turn, too.
pub const RUNNING_MAX: usize = 64;

/// How a ledger is kept.
#[derive(Debug, Clone)]
pub struct LedgerOptions {
    /// Its file, which is made if it is missing.
    pub file: PathBuf,
    /// How long results are kept.
    pub keep: Keep,
}

/// How long the results of jobs are kept after their end, batch by batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// For so long.
    pub time: Duration,
    /// The newest so many jobs. The batch that ended last is kept whole, however large it is.
    pub jobs: u64,
}

impl Default for Keep {
    /// A week, and a hundred thousand jobs.
    fn default() -> Self {
        Self { time: Duration::from_secs(7 * 24 * 3600), jobs: 100_000 }
    }
}
