//! What happens to a ledger, what it wants done, and what is written.

use std::collections::BTreeMap;

use lite_llm_transport::messages::{DetachedBatch, DetachedState, JobEnding, JobRange};

use super::Keep;

/// What bounds a ledger, and what its coordinator serves.
#[derive(Debug, Clone)]
pub struct Rules {
    /// What fixes a job's bits beside the job itself: a hash of the model and how it is served. Jobs
    /// that were accepted with another one are not run.
    pub model: [u8; 32],
    /// Positions with which the model is served.
    pub context: u64,
    /// Jobs that run at a time.
    pub running_max: usize,
    /// Jobs that have not ended.
    pub open_max: usize,
    /// Bytes of jobs and results.
    pub bytes_max: u64,
    /// How long results are kept.
    pub keep: Keep,
}

/// What happens to a ledger.
#[derive(Debug)]
pub enum Event {
    /// Somebody submits jobs, whose sizes were checked; [`Command::Accepted`] or
    /// [`Command::Refused`].
    Accept {
        /// Who is to be answered.
        caller: u64,
        /// Whose jobs they are.
        owner: String,
        /// The jobs; their prompts are token ids.
        batch: DetachedBatch,
    },
    /// Somebody wants to know whether a batch of this key was taken; [`Command::Accepted`] or
    /// [`Command::NotKnown`].
    Known {
        /// Who is to be answered.
        caller: u64,
        /// Whose batch it would be.
        owner: String,
        /// Its key.
        key: [u8; 16],
    },
    /// A running job has generated tokens.
    Progress {
        /// The job.
        job: u64,
        /// How many it had generated before.
        from: u32,
        /// The tokens.
        tokens: Vec<u32>,
    },
    /// A running job has ended.
    Ended {
        /// The job.
        job: u64,
        /// How.
        ending: JobEnding,
    },
    /// Somebody wants jobs to end; [`Command::Cancelled`] in any case.
    Cancel {
        /// Who is to be answered.
        caller: u64,
        /// Whose jobs; anybody's if nobody is named.
        owner: Option<String>,
        /// Which.
        jobs: JobRange,
    },
    /// A write is on disk.
    Synced {
        /// Which.
        write: u64,
    },
    /// Time went by.
    Tick,
    /// All that is known is to be written.
    Flush,
}

/// Something that is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// Jobs were taken. They have consecutive numbers.
    Batch {
        /// The first job's number, which is the batch's.
        first: u64,
        /// Whose they are.
        owner: String,
        /// [`Rules::model`] of that time.
        model: [u8; 32],
        /// When.
        at: u64,
        /// The jobs.
        batch: DetachedBatch,
    },
    /// A job generated tokens.
    Tokens {
        /// The job.
        job: u64,
        /// How many it had generated before.
        from: u32,
        /// The tokens.
        tokens: Vec<u32>,
    },
    /// A job ended.
    Ended {
        /// The job.
        job: u64,
        /// How.
        ending: JobEnding,
    },
    /// A batch is not kept any longer.
    Forgotten {
        /// Its number.
        first: u64,
        /// Its jobs.
        jobs: u64,
    },
}

/// What a ledger wants done.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// Write all of these or, if that fails, none; [`Event::Synced`] when they are on disk.
    Write {
        /// Number of this write.
        write: u64,
        /// In this order.
        records: Vec<Record>,
    },
    /// Jobs are taken and on disk.
    Accepted {
        /// Who asked.
        caller: u64,
        /// Their numbers.
        jobs: JobRange,
    },
    /// No batch of that key was taken.
    NotKnown {
        /// Who asked.
        caller: u64,
    },
    /// Jobs are not taken.
    Refused {
        /// Who asked.
        caller: u64,
        /// Why, and what to do.
        reason: String,
    },
    /// Jobs have ended, on disk, which had not.
    Cancelled {
        /// Who asked.
        caller: u64,
        /// How many.
        jobs: u64,
    },
    /// Run a job, from the tokens that are written.
    Run {
        /// The job.
        job: u64,
        /// Whose it is.
        owner: String,
    },
    /// Stop a job that runs: it has ended otherwise.
    Stop {
        /// The job.
        job: u64,
    },
    /// Something is to be seen that was not: jobs that were taken, or have ended.
    Changed,
}

/// What was written, as it is found again.
#[derive(Debug, Default)]
pub struct Saved {
    /// The number of the next job.
    pub next: u64,
    /// Batches by their numbers.
    pub batches: BTreeMap<u64, SavedBatch>,
}

/// A batch as it is found again.
#[derive(Debug)]
pub struct SavedBatch {
    /// Whose.
    pub owner: String,
    /// Its key.
    pub key: [u8; 16],
    /// [`Rules::model`] when it was taken.
    pub model: [u8; 32],
    /// When it was taken.
    pub at: u64,
    /// Its jobs.
    pub jobs: Vec<SavedJob>,
}

/// A job as it is found again.
#[derive(Debug)]
pub struct SavedJob {
    /// What it and its answer are counted with, by [`job_bytes`](super::job_bytes).
    pub bytes: (u64, u64),
    /// Tokens that are written.
    pub tokens: u32,
    /// How and when it ended, if it has, and bytes of its result.
    pub ended: Option<(DetachedState, u64, u64)>,
}
