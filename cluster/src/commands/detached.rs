//! Jobs that are left with a coordinator: `lite-llm submit --detach` and `--wait`, `jobs`, `job`,
//! `cancel`.
//!
//! Every question may be asked again: where the connection is lost it is, of the coordinator that is
//! there then. A batch has a key, so that asking again takes no job twice.

use std::{
    collections::BTreeSet,
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail};
use lite_llm_actors::coordinator::PROMPT_BYTES_MAX;
use lite_llm_transport::{
    messages::{
        BATCH_JOBS_MAX, ClientReply, ClientRequest, DetachedBatch, DetachedJob, DetachedReply,
        DetachedReport, DetachedRequest, DetachedState, DetachedStatus, JobRange, JobsQuery,
        LISTED_MAX, Prompt,
    },
    moment::utc,
    state::StateDir,
};
use serde_json::{Value, json};
use tracing::debug_span;

use super::{
    bad_input,
    client::{FileJob, OTHER_QUESTION, Reconnecting, Refused, read_jobs},
    default_state,
    run::read_prompt,
};
use crate::{
    cli::{CancelArgs, ClientArgs, JobArgs, JobsArgs, Numbers, OwnerArgs, SubmitArgs},
    progress::{Progress, Unit},
    telemetry,
};

/// Longer than the coordinator's ledger may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the coordinator is to hold back an answer while nothing ends, in milliseconds.
const WAIT_MS: u32 = 10_000;
/// Pause before a question is asked again.
const AGAIN_PAUSE: Duration = Duration::from_millis(250);
/// Bytes of prompts of one batch: a frame holds them, and the rest of their jobs.
const BATCH_BYTES_MAX: usize = 3 << 20;
/// Bytes of the rest of a job, at least.
const JOB_BYTES: usize = 512;
/// Results that are asked for at once.
const REPORTS_MAX: usize = 256;
/// The file in the state folder that holds the name of whoever leaves jobs.
const NAME_FILE: &str = "client.name";

/// The ledger of a coordinator, asked from outside.
struct Ledger {
    client: Reconnecting,
}

impl Ledger {
    async fn of(args: &OwnerArgs) -> Result<Self> {
        if args.all {
            let client = Reconnecting::as_operator(&args.client, args.state.clone()).await?;
            return Ok(Self { client });
        }
        Self::of_client(&args.client)
    }

    fn of_client(args: &ClientArgs) -> Result<Self> {
        let name = match &args.name {
            Some(name) => name.clone(),
            None => own_name()?,
        };
        let args = ClientArgs { name: Some(name), ..args.clone() };
        Ok(Self { client: Reconnecting::new(&args) })
    }

    /// Asks, and asks again where no answer came, for as long as `--retry` says after the last one.
    async fn ask(&self, request: DetachedRequest) -> Result<DetachedReply> {
        let request = ClientRequest::Detached(request);
        let deadline = Instant::now() + self.client.retry();
        loop {
            let client = self.client.client().await?;
            match client.answer_within(ANSWER_TIMEOUT, &request).await {
                Ok(ClientReply::Detached(DetachedReply::Unknown(reason))) => {
                    if Instant::now() >= deadline {
                        bail!(
                            "it is not known whether it was done: {reason}; look before you ask again: \
                             `lite-llm jobs`"
                        );
                    }
                    tokio::time::sleep(AGAIN_PAUSE).await;
                }
                Ok(ClientReply::Detached(reply)) => return Ok(reply),
                Ok(_) => bail!(OTHER_QUESTION),
                Err(error) if error.is::<Refused>() || Instant::now() >= deadline => {
                    return Err(error);
                }
                Err(_) => tokio::time::sleep(AGAIN_PAUSE).await,
            }
        }
    }

    async fn list(&self, query: JobsQuery) -> Result<Vec<DetachedStatus>> {
        match self.ask(DetachedRequest::List(query)).await? {
            DetachedReply::List(jobs) => Ok(jobs),
            _ => bail!(OTHER_QUESTION),
        }
    }

    /// Takes a batch, and says which numbers it has.
    async fn submit(&self, jobs: Vec<DetachedJob>) -> Result<JobRange> {
        let mut key = [0; 16];
        // The standard library's keys are the system's random numbers.
        key[..8].copy_from_slice(&RandomState::new().hash_one(0).to_le_bytes());
        key[8..].copy_from_slice(&RandomState::new().hash_one(1).to_le_bytes());
        let batch = DetachedBatch { key, note: String::new(), jobs };
        match self.ask(DetachedRequest::Submit(batch)).await? {
            DetachedReply::Accepted(jobs) => Ok(jobs),
            _ => bail!(OTHER_QUESTION),
        }
    }

    /// All that is known of jobs; `each` has one after the other.
    async fn report(
        &self,
        mut jobs: &[u64],
        mut each: impl FnMut(DetachedReport) -> Result<()>,
    ) -> Result<()> {
        while !jobs.is_empty() {
            let some = jobs[..jobs.len().min(REPORTS_MAX)].to_vec();
            let asked = some.len();
            let reports = match self.ask(DetachedRequest::Report(some)).await? {
                DetachedReply::Report(reports) => reports,
                _ => bail!(OTHER_QUESTION),
            };
            // Those that are gone are left out; a long answer ends early.
            let seen = match reports.last() {
                None => asked,
                Some(last) => 1 + jobs.iter().position(|job| *job == last.status.job).unwrap_or(0),
            };
            jobs = &jobs[seen..];
            reports.into_iter().try_for_each(&mut each)?;
        }
        Ok(())
    }

    /// Waits until jobs have ended; `each` has their results as they come. Returns how many failed.
    async fn wait(
        &self,
        ranges: &[JobRange],
        quiet: bool,
        mut each: impl FnMut(DetachedReport) -> Result<()>,
    ) -> Result<u64> {
        let total = ranges.iter().map(|jobs| jobs.last - jobs.first + 1).sum();
        let mut progress = Progress::new("waiting for jobs", Unit::Things("jobs"), quiet);
        let (mut done, mut failed) = (0, 0);
        for &jobs in ranges {
            let mut have = BTreeSet::new();
            let mut ended = 0;
            loop {
                let query = JobsQuery { jobs, most: LISTED_MAX as u32, ended, wait_ms: WAIT_MS };
                let listed = self.list(query).await?;
                if listed.is_empty() {
                    return Err(no_jobs(jobs));
                }
                let over = listed.iter().filter(|job| job.state.has_ended()).map(|job| job.job);
                let over: Vec<u64> = over.collect();
                let new: Vec<u64> =
                    over.iter().copied().filter(|job| !have.contains(job)).collect();
                self.report(&new, |report| {
                    have.insert(report.status.job);
                    done += 1;
                    failed += u64::from(report.status.state == DetachedState::Failed);
                    progress.update(done, total, "");
                    each(report)
                })
                .await?;
                ended = over.len() as u32;
                if over.len() == listed.len() {
                    break;
                }
                progress.update(done, total, "");
            }
        }
        progress.finish();
        Ok(failed)
    }
}

/// Under which name this user's detached jobs are: made on first use, at random.
fn own_name() -> Result<String> {
    let state = default_state()?;
    StateDir::open_or_create(&state).map_err(bad_input)?;
    name_in(&state)
}

/// The name that a folder holds, which is made if there is none. It is there whole or not at all.
fn name_in(state: &Path) -> Result<String> {
    let path = state.join(NAME_FILE);
    let shown = path.display();
    let cannot = |what: &str| format!("{shown}: cannot {what}; give --as NAME");
    let kept = || match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    };
    // Earlier releases could be killed between making the file and writing it.
    if kept().with_context(|| cannot("read"))?.trim().is_empty() {
        let user = std::env::var("USER").unwrap_or_default().to_lowercase();
        let user: String = user
            .chars()
            .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            .take(24)
            .collect();
        let user = if user.is_empty() { "client" } else { &user };
        let name = format!("{user}-{:016x}\n", RandomState::new().hash_one(0));
        let made = || -> std::io::Result<()> {
            let mut unfinished = tempfile::Builder::new().prefix(NAME_FILE).tempfile_in(state)?;
            unfinished.write_all(name.as_bytes())?;
            unfinished.as_file().sync_all()?;
            if path.exists() {
                // It is empty, as was seen above.
                unfinished.persist(&path)?;
            } else if let Err(error) = unfinished.persist_noclobber(&path)
                && error.error.kind() != std::io::ErrorKind::AlreadyExists
            {
                return Err(error.error);
            }
            File::open(state)?.sync_all()
        };
        made().with_context(|| cannot("write"))?;
    }
    let name = kept().with_context(|| cannot("read"))?;
    Ok(name.trim().to_owned())
}

/// Cuts a list of jobs in ranges that one answer can list.
fn windows(jobs: JobRange) -> Vec<JobRange> {
    let starts = (jobs.first..=jobs.last).step_by(LISTED_MAX);
    let window = |first| JobRange { first, last: jobs.last.min(first + LISTED_MAX as u64 - 1) };
    starts.map(window).collect()
}

fn no_jobs(jobs: JobRange) -> anyhow::Error {
    let what = if jobs.first == jobs.last { "job" } else { "jobs" };
    bad_input(anyhow!(
        "{what} {}: not among yours; `lite-llm jobs` lists those, and --as or --all those of others",
        Numbers(jobs)
    ))
}

pub(super) async fn submit(args: SubmitArgs, json: bool) -> Result<()> {
    let from_file = args.file.is_some();
    let jobs = match &args.prompt {
        Some(prompt) => {
            let prompt = read_prompt(prompt, PROMPT_BYTES_MAX).await?;
            let request = args.sampling.request(args.sampling.remote_prompt(&prompt));
            let sampling = args.sampling.clone();
            vec![FileJob { prompt, sampling, request, custom_id: None }]
        }
        None => read_jobs(&args)?,
    };
    if jobs.is_empty() {
        return Err(bad_input(anyhow!("there are no jobs in the file")));
    }
    args.sampling.tell_seed();
    let span = debug_span!("submit");
    let trace = telemetry::context_of(&span);
    let ledger = Ledger::of_client(&args.client)?;
    let (mut ranges, mut batch, mut bytes): (Vec<JobRange>, Vec<DetachedJob>, _) =
        (Vec::new(), Vec::new(), 0);
    for FileJob { sampling, mut request, custom_id, .. } in jobs {
        request.trace = trace;
        let label = custom_id.unwrap_or_default();
        let of_prompt = match &request.prompt {
            Prompt::Text(text) | Prompt::Chat(text) => text.len(),
            Prompt::Tokens(ids) => ids.len() * 4,
        };
        let stop: usize = sampling.stop.iter().map(|text| text.len() + 16).sum();
        let (serving, choosing) = (sampling.serving(), sampling.choosing()?);
        let bias = size_of_val(&choosing.bias[..]);
        let size = JOB_BYTES + of_prompt + stop + bias + label.len();
        if batch.len() == BATCH_JOBS_MAX || (!batch.is_empty() && bytes + size > BATCH_BYTES_MAX) {
            ranges.push(accept(&ledger, std::mem::take(&mut batch), &ranges, json).await?);
            bytes = 0;
        }
        bytes += size;
        let plain = DetachedJob::plain(request);
        let job = DetachedJob { serving, choosing, stop: sampling.stop, label, ..plain };
        batch.push(job);
    }
    ranges.push(accept(&ledger, batch, &ranges, json).await?);
    if !args.wait {
        told(&ranges, json);
    } else {
        if !json {
            for jobs in &ranges {
                remark!("accepted: {}; `lite-llm job {0} --wait` gets them, too", Numbers(*jobs));
            }
        }
        results(&ledger, &ranges, args.out.as_deref(), json, from_file || json).await?;
    }
    ledger.client.close().await;
    Ok(())
}

/// Has a batch accepted. If it is not, the numbers of those before it are said: they will be finished.
async fn accept(
    ledger: &Ledger,
    batch: Vec<DetachedJob>,
    before: &[JobRange],
    json: bool,
) -> Result<JobRange> {
    let accepted = ledger.submit(batch).await;
    if accepted.is_err() && !before.is_empty() {
        told(before, json);
    }
    accepted
}

/// Says which numbers were given.
fn told(ranges: &[JobRange], json: bool) {
    let jobs: u64 = ranges.iter().map(|jobs| jobs.last - jobs.first + 1).sum();
    if json {
        let ranges: Vec<_> =
            ranges.iter().map(|jobs| json!({ "first": jobs.first, "last": jobs.last })).collect();
        say!("{}", json!({ "accepted": jobs, "jobs": ranges }));
        return;
    }
    for jobs in ranges {
        say!("{}", Numbers(*jobs));
    }
    let numbers = Numbers(ranges[0]);
    remark!(
        "{jobs} accepted, and finished whatever happens; their results: lite-llm job {numbers} --wait"
    );
}

/// Waits for jobs and writes their results; as one text if it is one job and `lines` are not wanted.
async fn results(
    ledger: &Ledger,
    ranges: &[JobRange],
    out: Option<&Path>,
    json: bool,
    lines: bool,
) -> Result<()> {
    let mut file = out.map(OutFile::create).transpose()?;
    let quiet = json && out.is_none();
    let wait = ledger.wait(ranges, quiet, |report| {
        match &mut file {
            Some(file) => file.line(&line(&report))?,
            None if lines => say!("{}", line(&report)),
            None => show(&report),
        }
        Ok(())
    });
    let failed = wait.await?;
    if let Some(file) = file {
        let path = file.finish()?;
        remark!("results written to {}", path.display());
    }
    match failed {
        0 => Ok(()),
        failed => bail!("{failed} jobs failed; their results say why"),
    }
}

/// A file of results, which appears when it is whole.
struct OutFile {
    path: PathBuf,
    staging: PathBuf,
    file: BufWriter<File>,
}

impl OutFile {
    fn create(path: &Path) -> Result<Self> {
        let mut staging = path.as_os_str().to_owned();
        staging.push(".part");
        let staging = PathBuf::from(staging);
        let file = File::create(&staging)
            .with_context(|| format!("{}: cannot write", staging.display()))
            .map_err(bad_input)?;
        Ok(Self { path: path.to_owned(), staging, file: BufWriter::new(file) })
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        let written = writeln!(self.file, "{line}");
        written.with_context(|| format!("{}: cannot write", self.staging.display()))
    }

    fn finish(self) -> Result<PathBuf> {
        let shown = self.staging.display().to_string();
        let written = self.file.into_inner().map_err(|error| error.into_error());
        written
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&self.staging, &self.path))
            .with_context(|| format!("{shown}: cannot write"))?;
        Ok(self.path)
    }
}

/// A result as a line of JSON.
fn line(report: &DetachedReport) -> Value {
    let status = &report.status;
    let index = status.job - status.batch;
    let mut line = json!({
        "job": status.job,
        "batch": status.batch,
        "index": index,
        "state": status.state.as_str(),
        "prompt": report.prompt,
    });
    if !report.job.label.is_empty() {
        line["custom_id"] = report.job.label.as_str().into();
    }
    match &report.ending {
        None => line["tokens"] = status.tokens.into(),
        Some(end) if end.state == DetachedState::Failed => {
            line["error"] = end.reason.as_str().into();
        }
        Some(end) => {
            // As `submit` says it of a job that is attached.
            line["end"] = format!("{:?}", end.state).into();
            line["text"] = end.text.as_str().into();
            line["ids"] = end.ids.clone().into();
        }
    }
    line
}

/// A job for people.
fn show(report: &DetachedReport) {
    let status = &report.status;
    match &report.ending {
        Some(end) if end.state == DetachedState::Failed => {
            say!("job {} failed: {}", status.job, end.reason);
        }
        Some(end) => {
            say!("\n{}{}", report.prompt, end.text);
            remark!("[job {}: {} tokens, {}]", status.job, end.ids.len(), status.state.as_str());
        }
        None => say!("job {} is {}, {} tokens", status.job, status.state.as_str(), status.tokens),
    }
}

pub(super) async fn jobs(args: JobsArgs, json: bool) -> Result<()> {
    let ledger = Ledger::of(&args.owner).await?;
    let jobs = JobRange { first: 0, last: u64::MAX };
    let query = JobsQuery { jobs, most: args.most, ended: 0, wait_ms: 0 };
    let listed = ledger.list(query).await?;
    ledger.client.close().await;
    if json {
        for job in &listed {
            let ended = if job.ended == 0 { Value::Null } else { job.ended.into() };
            say!(
                "{}",
                json!({
                    "job": job.job,
                    "batch": job.batch,
                    "state": job.state.as_str(),
                    "tokens": job.tokens,
                    "accepted_ms": job.accepted,
                    "ended_ms": ended,
                })
            );
        }
        return Ok(());
    }
    let time = |millis| utc(UNIX_EPOCH + Duration::from_millis(millis));
    say!("{:>8} {:>8} {:<12} {:>7} {:<24} ended", "job", "batch", "state", "tokens", "accepted");
    for job in &listed {
        let ended = if job.ended == 0 { String::new() } else { time(job.ended) };
        let (state, accepted) = (job.state.as_str(), time(job.accepted));
        say!(
            "{:>8} {:>8} {state:<12} {:>7} {accepted:<24} {ended}",
            job.job,
            job.batch,
            job.tokens
        );
    }
    Ok(())
}

pub(super) async fn job(args: JobArgs, json: bool) -> Result<()> {
    let ledger = Ledger::of(&args.owner).await?;
    let Numbers(jobs) = args.jobs;
    let lines = json || jobs.first != jobs.last;
    let ranges = known(&ledger, jobs).await?;
    if args.wait {
        results(&ledger, &ranges, args.out.as_deref(), json, lines).await?;
    } else {
        for jobs in ranges {
            let query = JobsQuery { jobs, most: LISTED_MAX as u32, ended: 0, wait_ms: 0 };
            let listed: Vec<u64> = ledger.list(query).await?.iter().map(|job| job.job).collect();
            let shown = ledger.report(&listed, |report| {
                if lines {
                    say!("{}", line(&report))
                } else {
                    show(&report)
                }
                Ok(())
            });
            shown.await?;
        }
    }
    ledger.client.close().await;
    Ok(())
}

/// Jobs of a range that there are, in ranges that one answer can list.
async fn known(ledger: &Ledger, jobs: JobRange) -> Result<Vec<JobRange>> {
    let query = |jobs| JobsQuery { jobs, most: 1, ended: 0, wait_ms: 0 };
    let last = ledger.list(query(jobs)).await?.pop().ok_or_else(|| no_jobs(jobs))?;
    // Numbers beyond the last are cut off here, so that a slip of the keyboard asks no million times.
    let jobs = JobRange { last: last.job, ..jobs };
    let mut ranges = windows(jobs);
    if ranges.len() > 1 {
        let mut some = Vec::new();
        for jobs in ranges {
            if !ledger.list(query(jobs)).await?.is_empty() {
                some.push(jobs);
            }
        }
        ranges = some;
    }
    Ok(ranges)
}

pub(super) async fn cancel(args: CancelArgs, json: bool) -> Result<()> {
    let ledger = Ledger::of(&args.owner).await?;
    let Numbers(jobs) = args.jobs;
    let query = JobsQuery { jobs, most: 1, ended: 0, wait_ms: 0 };
    if ledger.list(query).await?.is_empty() {
        return Err(no_jobs(jobs));
    }
    let cancelled = match ledger.ask(DetachedRequest::Cancel(jobs)).await? {
        DetachedReply::Cancelled(cancelled) => cancelled,
        _ => bail!(OTHER_QUESTION),
    };
    ledger.client.close().await;
    match (json, cancelled) {
        (true, _) => say!("{}", json!({ "cancelled": cancelled })),
        (false, 0) => say!("none of them was open any more"),
        (false, 1) => say!("1 job cancelled"),
        (false, jobs) => say!("{jobs} jobs cancelled"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_and_one_that_a_crash_left_empty_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let name = name_in(folder.path()).unwrap();
        assert!(!name.is_empty());
        assert_eq!(name_in(folder.path()).unwrap(), name);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        std::fs::write(folder.path().join(NAME_FILE), "").unwrap();
        let other = name_in(folder.path()).unwrap();
        assert!(!other.is_empty() && other != name);
        assert_eq!(name_in(folder.path()).unwrap(), other);
    }
}
