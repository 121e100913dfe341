//! `/v1/batches`: a file of requests becomes detached jobs of the ledger, which finishes them whatever
//! happens to the coordinator, and their results become the lines of two files.
//!
//! Invariants: a batch is taken whole or not at all, and is on disk before anybody is told of it: what a
//! line asks for is checked as if it were asked alone; an owner sees its own batches only; a line has
//! the bits that its request would have alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    sync::Arc,
};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, Request, State},
    http::HeaderMap,
};
use futures::{Stream, stream};
use lite_llm_actors::ledger::{Jobs, LedgerError};
use lite_llm_transport::messages::{
    BATCH_JOBS_MAX, DetachedBatch, DetachedJob, DetachedReport, DetachedState, DetachedStatus,
    JobRange, JobRequest, JobsQuery, LABEL_BYTES_MAX, LISTED_MAX, NOTE_BYTES_MAX, Prompt,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Api, Caller,
    ask::{Asked, Body, Kind},
    body::{BODY_BYTES_MAX, parse},
    calls::{Calls, Said, ToolUse},
    choice::Finish,
    error::ApiError,
    files::{NO_FILES, Window, listed, no_file, on_disk, opened},
    generate::{Tokenised, with_calls},
    show::{Show, Whole, call_of, usage},
};
use crate::commands::unix_time;

/// Batches that are made at a time: each is held in memory until it is on disk.
pub(super) const MAKING_MAX: usize = 2;
/// What clients may keep with a batch.
const METADATA_MAX: usize = 16;
const METADATA_KEY_MAX: usize = 64;
const METADATA_TEXT_MAX: usize = 512;
/// Results that are asked of the ledger at a time.
const REPORTS_MAX: usize = 64;
/// Files of batches whose sizes are remembered.
const SIZES_MAX: usize = 1024;

/// What a batch is asked for with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    input_file_id: String,
    endpoint: String,
    completion_window: String,
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
    /// Answers are kept as long as the coordinator says.
    #[serde(default, rename = "output_expires_after")]
    _output_expires_after: Option<serde::de::IgnoredAny>,
}

/// A line of its file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    custom_id: String,
    method: String,
    url: String,
    body: Body,
}

/// What is kept with a batch beside its jobs.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// Of this layout.
    lite_llm_batch: u32,
    endpoint: String,
    input_file_id: String,
    completion_window: String,
    metadata: Option<Map<String, Value>>,
    /// What the model was called when it was made, and what fixes its bits.
    model: String,
    fingerprint: String,
}

/// The two files of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Answers.
    Output,
    /// What failed, or was cancelled.
    Errors,
}

impl Part {
    fn file(self, batch: u64) -> String {
        match self {
            Self::Output => format!("file-batch-{batch}-output"),
            Self::Errors => format!("file-batch-{batch}-errors"),
        }
    }

    /// The batch and the part that a name means, if it is a name of such a file.
    pub(super) fn of_file(id: &str) -> Option<(u64, Self)> {
        let (batch, part) = id.strip_prefix("file-batch-")?.split_once('-')?;
        let part = match part {
            "output" => Self::Output,
            "errors" => Self::Errors,
            _ => return None,
        };
        Some((batch.parse().ok()?, part))
    }

    fn has(self, state: DetachedState) -> bool {
        let failed = matches!(state, DetachedState::Failed | DetachedState::Cancelled);
        state.has_ended() && failed == (self == Self::Errors)
    }
}

fn kind_of(endpoint: &str) -> Option<Kind> {
    match endpoint {
        "/v1/chat/completions" => Some(Kind::Chat),
        "/v1/completions" => Some(Kind::Text),
        _ => None,
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Refused(reason) => Self::bad(reason),
            LedgerError::Full(reason) => Self::busy(reason, std::time::Duration::from_secs(60)),
            LedgerError::Busy(_) | LedgerError::Unknown(_) | LedgerError::Stopping => {
                Self::unavailable(error.to_string())
            }
        }
    }
}

impl Api {
    fn ledger(&self) -> Result<&Jobs, ApiError> {
        self.coordinator.jobs().ok_or_else(|| ApiError::not_found(NO_FILES))
    }
}

/// Takes a batch.
pub(super) async fn create(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let (parts, body) = request.into_parts();
    let wanted: Wanted = api.bodies.json(&parts.headers, body).await?;
    api.ledger()?;
    let Some(kind) = kind_of(&wanted.endpoint) else {
        let message = "endpoint: /v1/chat/completions or /v1/completions is expected";
        return Err(ApiError::invalid("endpoint", message));
    };
    if wanted.completion_window != "24h" {
        let message = "completion_window: 24h is expected; the jobs run until they have ended";
        return Err(ApiError::invalid("completion_window", message));
    }
    check_metadata(wanted.metadata.as_ref())?;
    let owner = caller.owner();
    let given = key_of(&owner, &parts.headers);
    // What would be refused now may have been taken when its answer was lost.
    if let Some(key) = given
        && let Some(taken) = api.ledger()?.known(&owner, key).await?
    {
        return Ok(Json(describe(&api, &owner, taken.first).await?));
    }
    let key = given.unwrap_or_else(|| *uuid::Uuid::new_v4().as_bytes());
    let making = api.making.try_acquire().map_err(|_| {
        let message = format!("{MAKING_MAX} batches are being made already");
        ApiError::busy(message, std::time::Duration::from_secs(5))
    })?;
    let file = opened(&api, owner.clone(), &wanted.input_file_id).await?;
    let mut lines = BufReader::new(file);
    let (mut jobs, mut names) = (Vec::new(), BTreeSet::new());
    for number in 1.. {
        let read = on_disk(move || {
            let line = read_line(&mut lines);
            (line, lines)
        });
        let (line, rest) = read.await?;
        lines = rest;
        let named = |error: ApiError| error.in_line(number);
        let Some(line) = line.map_err(named)? else { break };
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if jobs.len() == BATCH_JOBS_MAX {
            let message = format!("the file has more than {BATCH_JOBS_MAX} requests: split it");
            return Err(ApiError::invalid("input_file_id", message));
        }
        let job = job_of(&api, &caller, (kind, &wanted.endpoint), &line).await.map_err(named)?;
        if !names.insert(job.label.clone()) {
            let label = job.label;
            return Err(named(ApiError::bad(format!("custom_id {label:?} was there before"))));
        }
        jobs.push(job);
    }
    if jobs.is_empty() {
        return Err(ApiError::invalid("input_file_id", "the file has no requests"));
    }
    let note = Note {
        lite_llm_batch: 1,
        endpoint: wanted.endpoint,
        input_file_id: wanted.input_file_id,
        completion_window: wanted.completion_window,
        metadata: wanted.metadata,
        model: api.name.clone(),
        fingerprint: api.fingerprint.clone(),
    };
    let note = json!(note).to_string();
    if note.len() > NOTE_BYTES_MAX {
        let message = format!("metadata takes more than {NOTE_BYTES_MAX} bytes");
        return Err(ApiError::invalid("metadata", message));
    }
    let taken = api.coordinator.detach(&owner, DetachedBatch { key, note, jobs }).await;
    drop(making);
    // Clients ask again by themselves after a 503. Under another key that would be another batch.
    let once = |error: ApiError, remedy: &str| match given {
        Some(_) => error,
        None => error.once(remedy),
    };
    let taken = taken.map_err(|error| match error {
        LedgerError::Unknown(_) | LedgerError::Stopping => once(
            error.into(),
            "GET /v1/batches tells whether it was taken; with a header Idempotency-Key it may be sent \
             again without being taken twice",
        ),
        refused => refused.into(),
    })?;
    let shown = describe(&api, &owner, taken.first).await;
    let shown = shown.map_err(|error| {
        once(error, &format!("batch_{} was taken: do not send it again", taken.first))
    })?;
    Ok(Json(shown))
}

/// The key of a batch, if its client gives it one: what is said in `Idempotency-Key` takes none twice.
fn key_of(owner: &str, headers: &HeaderMap) -> Option<[u8; 16]> {
    let given = headers.get("idempotency-key")?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(owner.as_bytes()).update(&[0]).update(given.as_bytes());
    let mut key = [0; 16];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Some(key)
}

fn check_metadata(metadata: Option<&Map<String, Value>>) -> Result<(), ApiError> {
    let fits = |(key, value): (&String, &Value)| {
        let text = value.as_str().is_some_and(|text| text.chars().count() <= METADATA_TEXT_MAX);
        key.chars().count() <= METADATA_KEY_MAX && text
    };
    let Some(metadata) = metadata else { return Ok(()) };
    match metadata.len() <= METADATA_MAX && metadata.iter().all(fits) {
        true => Ok(()),
        false => Err(ApiError::invalid(
            "metadata",
            format!(
                "metadata: {METADATA_MAX} texts at most are expected, with keys of \
                 {METADATA_KEY_MAX} characters and {METADATA_TEXT_MAX} each"
            ),
        )),
    }
}

/// The next line, without its end.
fn read_line(lines: &mut impl BufRead) -> Result<Option<Vec<u8>>, ApiError> {
    let mut line = Vec::new();
    let mut most = std::io::Read::take(lines, BODY_BYTES_MAX as u64 + 1);
    let read = most.read_until(b'\n', &mut line);
    match read.map_err(|error| ApiError::disk(&error))? {
        0 => Ok(None),
        _ if line.len() > BODY_BYTES_MAX => Err(ApiError::too_large(BODY_BYTES_MAX)),
        _ => {
            line.pop_if(|end| *end == b'\n');
            Ok(Some(line))
        }
    }
}

/// The job of a line, whose prompt is token ids.
async fn job_of(
    api: &Api,
    caller: &Caller,
    (kind, endpoint): (Kind, &str),
    line: &[u8],
) -> Result<DetachedJob, ApiError> {
    let Line { custom_id, method, url, body } = parse(line)?;
    if method != "POST" || url != endpoint {
        let message = format!("method POST and url {endpoint} are expected, as of the batch");
        return Err(ApiError::bad(message));
    }
    if custom_id.is_empty() || custom_id.len() > LABEL_BYTES_MAX {
        let message = format!("custom_id: 1 to {LABEL_BYTES_MAX} bytes are expected");
        return Err(ApiError::bad(message));
    }
    if let Some(asked) = body.model.as_ref().filter(|asked| **asked != api.name) {
        return Err(ApiError::no_model(asked, &api.name));
    }
    let mut asked = body.check(kind, unix_time())?;
    let not_kept: [(&'static str, bool, &str); 4] = [
        ("stream", asked.stream, "a batch answers in a file"),
        ("logprobs", asked.choosing.logprobs.is_some(), "log-probabilities are not kept"),
        ("deadline_ms", asked.deadline.is_some(), "nobody waits for it"),
        ("n", asked.n * asked.prompts.len() as u32 != 1, "give each answer a line of its own"),
    ];
    if let Some((name, _, why)) = not_kept.into_iter().find(|(_, given, _)| *given) {
        return Err(ApiError::unsupported(name, format!("{name} is not for batches: {why}")));
    }
    api.check_rights(caller, &asked)?;
    let Tokenised { mut jobs, .. } = api.tokenise(&mut asked).await?;
    let Asked { choosing, serving, stop, tool_use, .. } = asked;
    let request = jobs.pop().ok_or_else(|| ApiError::bad("a prompt is missing"))?;
    let (label, shape) = (custom_id, tool_use.to_text());
    Ok(DetachedJob { request, choosing, serving, stop, label, shape })
}

/// What is kept of a batch, and how far its jobs are.
struct Found {
    note: Note,
    jobs: Vec<DetachedStatus>,
}

/// An owner's batch, if it was made here.
async fn find(api: &Api, owner: &str, batch: u64) -> Result<Option<Found>, ApiError> {
    let ledger = api.ledger()?;
    let Some(note) = ledger.note(Some(owner), batch).await? else { return Ok(None) };
    let Ok(note) = serde_json::from_str::<Note>(&note) else { return Ok(None) };
    let jobs = JobRange { first: batch, last: batch.saturating_add(BATCH_JOBS_MAX as u64 - 1) };
    // The newest of the range are another batch's, if this one is small.
    let mut found: Vec<DetachedStatus> = Vec::new();
    let mut last = jobs.last;
    loop {
        let jobs = JobRange { first: batch, last };
        let query = JobsQuery { jobs, most: LISTED_MAX as u32, ended: 0, wait_ms: 0 };
        let listed = ledger.list(Some(owner), query).await?;
        let own = listed.iter().filter(|job| job.batch == batch).copied();
        found = own.chain(found).collect();
        match listed.first() {
            Some(first) if listed.len() == LISTED_MAX && first.job > batch => last = first.job - 1,
            _ => break,
        }
    }
    Ok(Some(Found { note, jobs: found }))
}

fn no_batch(id: &str) -> ApiError {
    let id: String = id.chars().take(100).collect();
    ApiError::not_found(format!("no batch is named {id:?}, among yours"))
}

fn number_of(id: &str) -> Result<u64, ApiError> {
    let number = id.strip_prefix("batch_").and_then(|number| number.parse().ok());
    number.ok_or_else(|| no_batch(id))
}

/// A batch as clients read it.
async fn describe(api: &Api, owner: &str, batch: u64) -> Result<Value, ApiError> {
    let id = format!("batch_{batch}");
    let found = find(api, owner, batch).await?.ok_or_else(|| no_batch(&id))?;
    let Found { note, jobs } = found;
    let count = |part: Part| jobs.iter().filter(|job| part.has(job.state)).count();
    let (completed, failed) = (count(Part::Output), count(Part::Errors));
    let over = completed + failed == jobs.len();
    let cancelled = jobs.iter().any(|job| job.state == DetachedState::Cancelled);
    let status = match (over, cancelled) {
        (false, _) => "in_progress",
        (true, true) => "cancelled",
        (true, false) => "completed",
    };
    let at = |ms: u64| json!(ms / 1000);
    let began = at(jobs.first().map_or(0, |job| job.accepted));
    let ended =
        if over { at(jobs.iter().map(|job| job.ended).max().unwrap_or(0)) } else { Value::Null };
    let when = |is: bool| if is { ended.clone() } else { Value::Null };
    let file =
        |part: Part, any: bool| if over && any { json!(part.file(batch)) } else { Value::Null };
    Ok(json!({
        "id": id,
        "object": "batch",
        "endpoint": note.endpoint,
        "errors": null,
        "input_file_id": note.input_file_id,
        "completion_window": note.completion_window,
        "status": status,
        "output_file_id": file(Part::Output, completed > 0),
        "error_file_id": file(Part::Errors, failed > 0),
        "created_at": began,
        "in_progress_at": began,
        "expires_at": null,
        "finalizing_at": ended,
        "completed_at": when(over && !cancelled),
        "failed_at": null,
        "expired_at": null,
        "cancelling_at": null,
        "cancelled_at": when(over && cancelled),
        "request_counts": { "total": jobs.len(), "completed": completed, "failed": failed },
        "metadata": note.metadata,
        "model": note.model,
    }))
}

/// How far a batch is.
pub(super) async fn retrieve(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(describe(&api, &caller.owner(), number_of(&id)?).await?))
}

/// Ends what has not ended of a batch.
pub(super) async fn cancel(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (owner, batch) = (caller.owner(), number_of(&id)?);
    let found = find(&api, &owner, batch).await?.ok_or_else(|| no_batch(&id))?;
    let jobs = JobRange { first: batch, last: batch + found.jobs.len() as u64 - 1 };
    api.ledger()?.cancel(Some(&owner), jobs).await?;
    Ok(Json(describe(&api, &owner, batch).await?))
}

/// An owner's batches, the newest first.
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    window: Window,
) -> Result<Json<Value>, ApiError> {
    let (owner, most) = (caller.owner(), window.limit.unwrap_or(20).clamp(1, 100) as usize);
    let below = window.after.as_deref().map(number_of).transpose()?.unwrap_or(u64::MAX);
    let mut all = Vec::new();
    for batch in api.ledger()?.batches(&owner, below, most + 1).await? {
        match describe(&api, &owner, batch).await {
            Ok(batch) => all.push(batch),
            // It was let go meanwhile.
            Err(error) if error.status == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listed(all, most))
}

/// Bytes of files of batches that have ended, by batch and part.
pub(super) type Sizes = BTreeMap<(u64, Part), u64>;

/// The lines of one of a batch's files, of which all jobs have ended.
pub(super) struct Lines {
    api: Arc<Api>,
    owner: String,
    batch: u64,
    note: Note,
    part: Part,
    kind: Kind,
    created: i64,
    /// Jobs whose lines are still to come.
    jobs: Vec<u64>,
}

impl Lines {
    pub(super) async fn of(
        api: &Arc<Api>,
        caller: &Caller,
        batch: u64,
        part: Part,
    ) -> Result<Self, ApiError> {
        let (owner, id) = (caller.owner(), part.file(batch));
        let found = find(api, &owner, batch).await?.ok_or_else(|| no_file(&id))?;
        let Found { note, jobs } = found;
        if jobs.iter().any(|job| !job.state.has_ended()) {
            return Err(ApiError::not_found(format!("{id} is there when the batch has ended")));
        }
        let kind = kind_of(&note.endpoint).ok_or_else(|| no_file(&id))?;
        let created = (jobs.iter().map(|job| job.ended).max().unwrap_or(0) / 1000) as i64;
        let own = jobs.iter().filter(|job| part.has(job.state));
        let mut jobs: Vec<u64> = own.map(|job| job.job).collect();
        // The next one last.
        jobs.reverse();
        Ok(Self { api: api.clone(), owner, batch, note, part, kind, created, jobs })
    }

    /// When the last of its jobs ended, in seconds since 1970.
    pub(super) fn created(&self) -> i64 {
        self.created
    }

    /// Bytes of all of them. They are counted once: results of a batch that has ended do not change.
    pub(super) async fn bytes(mut self) -> Result<u64, ApiError> {
        let (api, of) = (self.api.clone(), (self.batch, self.part));
        if let Some(bytes) = api.sizes.lock().get(&of) {
            return Ok(*bytes);
        }
        let mut bytes = 0;
        while let Some(lines) = self.next().await? {
            bytes += lines.len() as u64;
        }
        let mut sizes = api.sizes.lock();
        // Numbers are not given twice, so what goes are the sizes of the oldest batches.
        while sizes.len() >= SIZES_MAX && sizes.pop_first().is_some() {}
        sizes.insert(of, bytes);
        Ok(bytes)
    }

    /// All of them, some at a time.
    pub(super) fn stream(self) -> impl Stream<Item = Result<Bytes, std::io::Error>> {
        stream::try_unfold(self, |mut lines| async move {
            let next = lines.next().await.map_err(|error| std::io::Error::other(error.message))?;
            Ok(next.map(|text| (Bytes::from(text), lines)))
        })
    }

    /// The next few.
    async fn next(&mut self) -> Result<Option<String>, ApiError> {
        if self.jobs.is_empty() {
            return Ok(None);
        }
        let some: Vec<u64> = self.jobs.iter().rev().take(REPORTS_MAX).copied().collect();
        let reports = self.api.ledger()?.report(Some(&self.owner), some).await?;
        let Some(last) = reports.last().map(|report| report.status.job) else {
            // They were let go meanwhile: what came is not all.
            return Err(ApiError::not_found("the results were let go"));
        };
        self.jobs.retain(|job| *job > last);
        let lines = reports.iter().map(|report| format!("{}\n", self.line(report)));
        Ok(Some(lines.collect()))
    }

    fn line(&self, report: &DetachedReport) -> Value {
        let number = report.status.job;
        let mut line = json!({
            "id": format!("batch_req_{number}"),
            "custom_id": report.job.label,
            "response": null,
            "error": null,
        });
        match self.part {
            Part::Output => {
                line["response"] = json!({
                    "status_code": 200,
                    "request_id": format!("req_{number}"),
                    "body": self.body(report),
                });
            }
            Part::Errors => {
                let cancelled = report.status.state == DetachedState::Cancelled;
                let reason = report.ending.as_ref().map(|ending| ending.reason.as_str());
                let reason = reason.filter(|_| !cancelled).unwrap_or("the batch was cancelled");
                let code = if cancelled { "batch_cancelled" } else { "failed" };
                line["error"] = json!({ "code": code, "message": reason });
            }
        }
        line
    }

    /// What the request would have been answered with alone.
    fn body(&self, report: &DetachedReport) -> Value {
        let JobRequest { prompt, seed, .. } = &report.job.request;
        let prompt = match prompt {
            Prompt::Tokens(ids) => ids.len() as u64,
            Prompt::Text(_) | Prompt::Chat(_) => 0,
        };
        let prefix = if self.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let show = Show {
            kind: self.kind,
            id: format!("{prefix}-job-{}", report.status.job),
            created: (report.status.ended / 1000) as i64,
            model: self.note.model.clone(),
            fingerprint: self.note.fingerprint.clone(),
            seed: *seed,
            tokenizer: None,
            include_usage: false,
        };
        let mut choice = Whole::default();
        let Some(ending) = &report.ending else { return Value::Null };
        let mut calls = Calls::new(ToolUse::from_text(&report.job.shape));
        let mut said = calls.push(&ending.text);
        said.extend(calls.finish());
        for (index, said) in said.into_iter().enumerate() {
            match said {
                Said::Text(text) => choice.text.push_str(&text),
                Said::Call(call) => {
                    let id = format!("call_{}_{index}", report.status.job);
                    choice.calls.push(call_of(id, call));
                }
            }
        }
        let finish = match ending.state {
            DetachedState::EndOfText | DetachedState::Stop => Finish::Stop,
            _ => Finish::Length,
        };
        choice.finish = Some(with_calls(finish, &calls));
        show.whole(&[choice], usage(prompt, ending.ids.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_batches_have_names() {
        for part in [Part::Output, Part::Errors] {
            assert_eq!(Part::of_file(&part.file(17)), Some((17, part)));
        }
        for other in ["file-abc", "file-batch-x-output", "file-batch-1-input", "file-batch-1"] {
            assert_eq!(Part::of_file(other), None);
        }
        let part = |state| (Part::Output.has(state), Part::Errors.has(state));
        assert_eq!(part(DetachedState::Running), (false, false));
        assert_eq!(part(DetachedState::Length), (true, false));
        assert_eq!(part(DetachedState::Failed), (false, true));
    }

    #[test]
    fn a_client_that_names_its_request_takes_none_twice() {
        let named = |name: &'static str| {
            let name = axum::http::HeaderValue::from_static(name);
            HeaderMap::from_iter([(axum::http::HeaderName::from_static("idempotency-key"), name)])
        };
        assert_eq!(key_of("a", &named("x")), key_of("a", &named("x")));
        assert_ne!(key_of("a", &named("x")), key_of("b", &named("x")));
        assert_ne!(key_of("a", &named("x")), key_of("a", &named("y")));
        assert_eq!(key_of("a", &HeaderMap::new()), None);
    }

    #[test]
    fn lines_are_bounded() {
        let mut lines = BufReader::new(&b"{}\n\n{\"a\": 1}"[..]);
        let all: Vec<_> = std::iter::from_fn(|| read_line(&mut lines).unwrap()).collect();
        assert_eq!(all, [&b"{}"[..], b"", b"{\"a\": 1}"]);
        let long = vec![b' '; BODY_BYTES_MAX + 2];
        assert_eq!(read_line(&mut BufReader::new(&long[..])).unwrap_err().status, 413);
    }
}
