//! What clients ask of a coordinator about jobs.

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use lite_llm_transport::messages::JobRange;

use super::{HostPort, SamplingArgs};
use crate::time::Time;

/// Where the coordinator is and what lets us in.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// The coordinator's address or host name, with its port [default: the address in the token].
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<HostPort>,
    /// The client.token that the coordinator wrote [default: the one of this machine's coordinator].
    #[arg(long, value_name = "FILE")]
    pub token: Option<PathBuf>,
    /// How long to try again when the coordinator is busy or lost; jobs go on where they were.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub retry: Time,
    /// Name whose detached jobs are meant; keep it to yourself: whoever has a token and knows it
    /// is taken for you [default: a random one, made once and kept in client.name in the state
    /// folder].
    #[arg(long = "as", value_name = "NAME", env = "LITE_LLM_CLIENT")]
    pub name: Option<String>,
}

/// `submit`.
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// What to continue; `-` reads standard input.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    pub prompt: Option<String>,
    /// JSON lines: {"prompt": "…"} with any of max_tokens, temperature, top_k, top_p, min_p,
    /// presence_penalty, frequency_penalty, repetition_penalty, logit_bias ({"70": -100}), seed, tiers,
    /// stop, chat, system, and custom_id, which comes back with the result.
    #[arg(long, value_name = "JOBS.jsonl")]
    pub file: Option<PathBuf>,
    /// Leave the jobs with the coordinator, which finishes them whatever happens to it or to this
    /// command; print their numbers as soon as they are on its disk.
    #[arg(long)]
    pub detach: bool,
    /// The same, then wait for their results and print them as JSON lines.
    #[arg(long)]
    pub wait: bool,
    /// With --wait: write the results here; the file appears when all are there.
    #[arg(long, value_name = "RESULTS.jsonl", requires = "wait")]
    pub out: Option<PathBuf>,
    /// Where.
    #[command(flatten)]
    pub client: ClientArgs,
    /// Sampling.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Whose detached jobs.
#[derive(Debug, Clone, Args)]
pub struct OwnerArgs {
    /// Everybody's jobs: for whoever has the coordinator's state folder.
    #[arg(long)]
    pub all: bool,
    /// With --all: where the coordinator keeps the cluster's authority.
    #[arg(long, value_name = "DIR", env = "LITE_LLM_STATE")]
    pub state: Option<PathBuf>,
    /// Where.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `jobs`.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// List the newest so many.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub most: u32,
    /// Whose.
    #[command(flatten)]
    pub owner: OwnerArgs,
}

/// `job`.
#[derive(Debug, Args)]
pub struct JobArgs {
    /// Number of the job, or FIRST-LAST.
    pub jobs: Numbers,
    /// Wait until they have ended.
    #[arg(long)]
    pub wait: bool,
    /// With --wait: write the results here as JSON lines; the file appears when all are there.
    #[arg(long, value_name = "RESULTS.jsonl", requires = "wait")]
    pub out: Option<PathBuf>,
    /// Whose.
    #[command(flatten)]
    pub owner: OwnerArgs,
}

/// `cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// Number of the job, or FIRST-LAST.
    pub jobs: Numbers,
    /// Whose.
    #[command(flatten)]
    pub owner: OwnerArgs,
}

/// A job's number, or the first and last of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers(pub JobRange);

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if first > 0 && first <= last => {
                Ok(Self(JobRange { first, last }))
            }
            _ => {
                Err("a job's number is expected, such as 17, or FIRST-LAST, such as 17-516".into())
            }
        }
    }
}

impl std::fmt::Display for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let JobRange { first, last } = self.0;
        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
    }
}

/// How long results are kept, or how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepJobs {
    /// For so long after their end.
    Time(Time),
    /// The newest so many.
    Count(u64),
}

impl FromStr for KeepJobs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(count) = text.parse() {
            return Ok(Self::Count(count));
        }
        text.parse().map(Self::Time).map_err(|_| {
            format!("{text:?}: a time is expected, such as 7d, or a number of jobs, such as 10000")
        })
    }
}

impl std::fmt::Display for KeepJobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KeepJobs::Time(time) => time.fmt(f),
            KeepJobs::Count(count) => count.fmt(f),
        }
    }
}
