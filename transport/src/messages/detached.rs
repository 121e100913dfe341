//! Detached jobs: those that a coordinator keeps in its ledger until they have ended and their results
//! were kept for as long as its owner said, whoever waits for them.
//!
//! [`DetachedJob`] and [`JobEnding`] are also what the ledger's file holds: a layout that changes
//! needs a new format of that file, and a way to read the old one.

use rkyv::{Archive, Deserialize, Serialize};

use super::{Choosing, JobRequest, MessageError, Serving, jobs::check_grammar};

/// Most jobs of a batch.
pub const BATCH_JOBS_MAX: usize = 4096;
/// Longest note of a batch and longest label of a job, in bytes.
pub const NOTE_BYTES_MAX: usize = 16 << 10;
/// See [`NOTE_BYTES_MAX`].
pub const LABEL_BYTES_MAX: usize = 512;
/// Texts that end an answer, at most, and bytes of each.
pub const STOPS_MAX: usize = 16;
/// See [`STOPS_MAX`].
pub const STOP_BYTES_MAX: usize = 1 << 10;
/// Longest wait that a query may ask for, in milliseconds.
pub const WAIT_MS_MAX: u32 = 20_000;
/// Most jobs that one answer lists.
pub const LISTED_MAX: usize = 4096;
/// Bytes of texts and token ids after which an answer with results ends; one job's are always whole.
pub const RESULTS_BYTES_MAX: usize = 8 << 20;

/// A job for the ledger.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct DetachedJob {
    /// What is to be computed; in the ledger its prompt is token ids.
    pub request: JobRequest,
    /// How its tokens are chosen; log-probabilities are not kept.
    pub choosing: Choosing,
    /// What it is to those that schedule it. Its tenant is its owner.
    pub serving: Serving,
    /// Texts that end the answer where they appear, and are left out.
    pub stop: Vec<String>,
    /// The client's own name for it, which comes back with the result.
    pub label: String,
    /// What whoever took it needs to show its answer; nobody else reads it.
    pub shape: String,
}

impl DetachedJob {
    /// A job without any of what can be left out.
    pub fn plain(request: JobRequest) -> Self {
        Self {
            request,
            choosing: Choosing::default(),
            serving: Serving::default(),
            stop: Vec::new(),
            label: String::new(),
            shape: String::new(),
        }
    }

    fn check(&self) -> Result<(), MessageError> {
        let field = |field, found: usize, most: usize| {
            let (found, expected) = (found as u64, format!("{most} at most"));
            Err(MessageError::Field { what: "a job", field, found, expected })
        };
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0);
        for (name, found, most) in [
            ("length of its label", self.label.len(), LABEL_BYTES_MAX),
            ("length of its shape", self.shape.len(), LABEL_BYTES_MAX),
            ("number of stop texts", self.stop.len(), STOPS_MAX),
            ("length of a stop text", longest, STOP_BYTES_MAX),
        ] {
            if found > most {
                return field(name, found, most);
            }
        }
        check_grammar(self.choosing.grammar.as_ref())
    }
}

/// Jobs that are taken together, or not at all.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct DetachedBatch {
    /// Chosen at random by the client. A batch whose key its owner has used is not taken again: who
    /// was not told whether it was taken asks once more.
    pub key: [u8; 16],
    /// Kept with the batch for its owner.
    pub note: String,
    /// At least one.
    pub jobs: Vec<DetachedJob>,
}

impl DetachedBatch {
    /// Whether sizes are within bounds. To be asked once, on receipt.
    pub fn check(&self) -> Result<(), MessageError> {
        let field = |field, found: usize, expected: String| {
            let found = found as u64;
            Err(MessageError::Field { what: "a batch of jobs", field, found, expected })
        };
        let jobs = self.jobs.len();
        if jobs == 0 || jobs > BATCH_JOBS_MAX {
            return field("number of jobs", jobs, format!("1 to {BATCH_JOBS_MAX}"));
        }
        if self.note.len() > NOTE_BYTES_MAX {
            return field(
                "length of its note",
                self.note.len(),
                format!("{NOTE_BYTES_MAX} at most"),
            );
        }
        self.jobs.iter().try_for_each(DetachedJob::check)
    }
}

/// How far a detached job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub enum DetachedState {
    /// It waits for its turn.
    Waiting,
    /// It was accepted for a model, or a way of serving it, that the coordinator does not serve now.
    OtherModel,
    /// It runs.
    Running,
    /// It generated as many tokens as it was allowed.
    Length,
    /// The model ended the text.
    EndOfText,
    /// The model's context is full.
    Context,
    /// One of its stop texts came.
    Stop,
    /// Its owner cancelled it.
    Cancelled,
    /// It could not be computed.
    Failed,
}

impl DetachedState {
    /// Whether it is over.
    pub fn has_ended(self) -> bool {
        !matches!(self, Self::Waiting | Self::OtherModel | Self::Running)
    }

    /// One word, for people and programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::OtherModel => "other_model",
            Self::Running => "running",
            Self::Length => "length",
            Self::EndOfText => "end_of_text",
            Self::Context => "context",
            Self::Stop => "stop",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// A detached job in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct DetachedStatus {
    /// Its number.
    pub job: u64,
    /// The number of its batch: that of the batch's first job.
    pub batch: u64,
    /// How far it is.
    pub state: DetachedState,
    /// Tokens that it has generated, of which the coordinator knows.
    pub tokens: u32,
    /// When it was accepted, in milliseconds since 1970.
    pub accepted: u64,
    /// When it ended; 0 if it has not.
    pub ended: u64,
}

/// How a detached job ended.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct JobEnding {
    /// How.
    pub state: DetachedState,
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// The tokens that it generated.
    pub ids: Vec<u32>,
    /// Their text, without a stop text.
    pub text: String,
    /// Why it failed; empty if it did not.
    pub reason: String,
}

/// A detached job with all that is known of it.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct DetachedReport {
    /// How far it is.
    pub status: DetachedStatus,
    /// The job, as it was accepted.
    pub job: DetachedJob,
    /// Text of its prompt, as the model sees it; empty if the model has no tokenizer.
    pub prompt: String,
    /// How it ended, if it has.
    pub ending: Option<JobEnding>,
}

/// Which jobs are meant. Only the asker's own are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct JobRange {
    /// The first.
    pub first: u64,
    /// The last; all from the first on have numbers below `u64::MAX`.
    pub last: u64,
}

/// A question for the state of some jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct JobsQuery {
    /// Which.
    pub jobs: JobRange,
    /// The newest so many of them, [`LISTED_MAX`] at most.
    pub most: u32,
    /// Jobs of these that had ended when the asker last heard of them.
    pub ended: u32,
    /// Wait so many milliseconds at most, while no more than those have ended.
    pub wait_ms: u32,
}

/// What somebody wants of the ledger.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum DetachedRequest {
    /// Take these jobs.
    Submit(DetachedBatch),
    /// How far are they?
    List(JobsQuery),
    /// All that is known of these jobs, by number; as many as fit in an answer, in this order.
    Report(Vec<u64>),
    /// End these jobs.
    Cancel(JobRange),
}

/// What the ledger answers.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum DetachedReply {
    /// The jobs are on disk and have these numbers.
    Accepted(JobRange),
    /// How far they are, the oldest first.
    List(Vec<DetachedStatus>),
    /// All that is known of the first of the jobs that were asked for.
    Report(Vec<DetachedReport>),
    /// So many of the jobs were ended by this; others had ended.
    Cancelled(u64),
    /// Nobody knows whether what was asked is on disk, and why: ask again, with the same key.
    Unknown(String),
}
