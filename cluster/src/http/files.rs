//! `/v1/files`: what batches read is uploaded, and what they have answered is read.
//!
//! Answers are no files: they are written from the ledger whenever somebody reads them, and are there
//! for as long as its jobs are.

use std::{fs::File, io::Read, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::{Body, Bytes},
    extract::{
        FromRequest, FromRequestParts, Multipart, Path, Query, Request, State, multipart::Field,
    },
    http::{header, request::Parts},
    response::{IntoResponse, Response},
};
use futures::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Api, Caller,
    batches::{self, Part},
    body::BODY_IDLE_MAX,
    error::ApiError,
    store::{About, Arriving, Files, NotKept},
};

/// How long a file may take to arrive.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// Fields beside the file, and bytes of each.
const FIELDS_MAX: usize = 16;
const FIELD_BYTES_MAX: usize = 1 << 10;
/// Bytes of a file that are sent at a time.
const PART_BYTES: usize = 64 << 10;
/// What files are for.
const PURPOSE: &str = "batch";
/// What is said where no files are kept.
pub(super) const NO_FILES: &str = "this process keeps no files and no batches: only a coordinator \
                                   with a state folder does (lite-llm coordinator --http ADDR)";

impl Api {
    pub(super) fn files(&self) -> Result<&Files, ApiError> {
        self.files.as_ref().ok_or_else(|| ApiError::not_found(NO_FILES))
    }
}

/// Does what waits for the disk where it keeps nobody else waiting.
pub(super) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    spawn_blocking(work).await.map_err(|error| ApiError::failed(error.to_string()))
}

/// An owner's file at the beginning of its content.
pub(super) async fn opened(api: &Api, owner: String, id: &str) -> Result<File, ApiError> {
    let (files, asked) = (api.files()?.clone(), id.to_owned());
    let file = on_disk(move || files.read(&owner, &asked)).await?;
    file.map_err(|error| ApiError::disk(&error))?.ok_or_else(|| no_file(id))
}

impl From<NotKept> for ApiError {
    fn from(error: NotKept) -> Self {
        match error {
            NotKept::TooMuch(reason) => Self::invalid("file", reason),
            NotKept::Disk(error) => Self::disk(&error),
        }
    }
}

pub(super) fn no_file(id: &str) -> ApiError {
    let id: String = id.chars().take(100).collect();
    ApiError::not_found(format!("no file is named {id:?}, among yours"))
}

fn shown(id: &str, about: &About) -> Value {
    object(id, &about.name, about.bytes, about.created, PURPOSE)
}

/// A file as clients read it.
fn object(id: &str, name: &str, bytes: u64, created: i64, purpose: &str) -> Value {
    json!({
        "id": id,
        "object": "file",
        "bytes": bytes,
        "created_at": created,
        "filename": name,
        "purpose": purpose,
        "status": "processed",
    })
}

/// Takes a file.
pub(super) async fn upload(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let files = api.files()?;
    let expected = "a form is expected (multipart/form-data) with purpose=batch and a file";
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|_| ApiError::bad(expected))?;
    let until = Instant::now() + UPLOAD_TIMEOUT;
    let (mut purpose, mut arrived): (Option<String>, Option<(Arriving, String)>) = (None, None);
    for number in 0.. {
        let field = timeout_at(until, timeout(BODY_IDLE_MAX, form.next_field())).await;
        let field = field.map_err(|_| ApiError::too_slow(UPLOAD_TIMEOUT))?;
        let field = field.map_err(|_| ApiError::too_slow(BODY_IDLE_MAX))?;
        let Some(mut field) = field.map_err(|_| ApiError::bad(expected))? else { break };
        if number >= FIELDS_MAX {
            return Err(ApiError::bad(format!("the form has more than {FIELDS_MAX} fields")));
        }
        match field.name() {
            Some("file") if arrived.is_none() => {
                let name = field.file_name().unwrap_or("upload.jsonl").to_owned();
                let begun = files.clone();
                let mut file = on_disk(move || begun.begin()).await??;
                while let Some(part) = next(&mut field, until).await? {
                    file = on_disk(move || file.push(&part).map(|()| file)).await??;
                }
                arrived = Some((file, name));
            }
            name => {
                let is_purpose = name == Some("purpose");
                let mut text = Vec::new();
                while let Some(part) = next(&mut field, until).await? {
                    text.extend_from_slice(&part);
                    if text.len() > FIELD_BYTES_MAX {
                        let message = format!("a field has more than {FIELD_BYTES_MAX} bytes");
                        return Err(ApiError::bad(message));
                    }
                }
                if is_purpose {
                    purpose = Some(String::from_utf8_lossy(&text).into_owned());
                }
            }
        }
    }
    if purpose.as_deref() != Some(PURPOSE) {
        let found = purpose.unwrap_or_default();
        let message = format!("purpose is {found:?}; {PURPOSE} is expected");
        return Err(ApiError::invalid("purpose", message));
    }
    let Some((file, name)) = arrived else {
        return Err(ApiError::invalid("file", expected));
    };
    let owner = caller.owner();
    let (id, about) = on_disk(move || file.finish(&owner, &name)).await??;
    Ok(Json(shown(&id, &about)))
}

/// More of a field that is to be whole until then.
async fn next(field: &mut Field<'_>, until: Instant) -> Result<Option<Bytes>, ApiError> {
    let part = timeout_at(until, timeout(BODY_IDLE_MAX, field.chunk())).await;
    let part = part.map_err(|_| ApiError::too_slow(UPLOAD_TIMEOUT))?;
    let part = part.map_err(|_| ApiError::too_slow(BODY_IDLE_MAX))?;
    part.map_err(|_| ApiError::bad("the form broke off"))
}

/// Which part of a list is wanted. Other fields that clients send have no say in it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Window {
    pub(super) limit: Option<u32>,
    pub(super) after: Option<String>,
    purpose: Option<String>,
    order: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Window {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let window = Query::<Self>::from_request_parts(parts, state).await;
        let Query(window) = window.map_err(|error| {
            let found = error.body_text();
            ApiError::bad(format!(
                "{found}; as limit a whole number up to 4294967295 is expected, as after a list's \
                 last_id, as order asc or desc"
            ))
        })?;
        Ok(window)
    }
}

/// A list, as clients read it: `all` is what comes after the window's begin, and one more if there is.
pub(super) fn listed(mut all: Vec<Value>, most: usize) -> Json<Value> {
    let has_more = all.len() > most;
    all.truncate(most);
    let id = |one: Option<&Value>| one.map_or(Value::Null, |one| one["id"].clone());
    let (first, last) = (id(all.first()), id(all.last()));
    Json(json!({
        "object": "list", "data": all, "first_id": first, "last_id": last, "has_more": has_more,
    }))
}

/// An owner's uploaded files.
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    window: Window,
) -> Result<Json<Value>, ApiError> {
    let most = window.limit.unwrap_or(10_000).clamp(1, 10_000) as usize;
    if window.purpose.is_some_and(|purpose| purpose != PURPOSE) {
        return Ok(listed(Vec::new(), most));
    }
    let (files, owner) = (api.files()?.clone(), caller.owner());
    let mut all = on_disk(move || files.list(&owner)).await?;
    if window.order.as_deref() == Some("asc") {
        all.reverse();
    }
    if let Some(after) = window.after {
        let at = all.iter().position(|(id, _)| *id == after).ok_or_else(|| no_file(&after))?;
        all.drain(..=at);
    }
    Ok(listed(all.iter().take(most + 1).map(|(id, about)| shown(id, about)).collect(), most))
}

/// What is known of a file.
pub(super) async fn retrieve(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if let Some((batch, part)) = Part::of_file(&id) {
        let lines = batches::Lines::of(&api, &caller, batch, part).await?;
        let created = lines.created();
        let bytes = lines.bytes().await?;
        return Ok(Json(object(&id, &format!("{id}.jsonl"), bytes, created, "batch_output")));
    }
    let (files, owner, asked) = (api.files()?.clone(), caller.owner(), id.clone());
    let about = on_disk(move || files.about(&owner, &asked)).await?;
    let about = about.ok_or_else(|| no_file(&id))?;
    Ok(Json(shown(&id, &about)))
}

/// Forgets an uploaded file. Batches that were made of it have what they need.
pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if Part::of_file(&id).is_some() {
        let message = "answers of a batch go when their time has come (coordinator --keep-jobs)";
        return Err(ApiError::bad(message));
    }
    let (files, owner, asked) = (api.files()?.clone(), caller.owner(), id.clone());
    match on_disk(move || files.delete(&owner, &asked)).await? {
        true => Ok(Json(json!({ "id": id, "object": "file", "deleted": true }))),
        false => Err(no_file(&id)),
    }
}

/// What a file holds.
pub(super) async fn content(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let head = [(header::CONTENT_TYPE, "application/jsonl")];
    if let Some((batch, part)) = Part::of_file(&id) {
        let lines = batches::Lines::of(&api, &caller, batch, part).await?;
        return Ok((head, Body::from_stream(lines.stream())).into_response());
    }
    let file = opened(&api, caller.owner(), &id).await?;
    let parts = stream::try_unfold(file, |mut file| async move {
        let read = spawn_blocking(move || {
            let mut part = vec![0; PART_BYTES];
            let count = file.read(&mut part)?;
            part.truncate(count);
            Ok::<_, std::io::Error>((part, file))
        });
        let (part, file) = read.await.map_err(std::io::Error::other)??;
        Ok::<_, std::io::Error>((!part.is_empty()).then_some((Bytes::from(part), file)))
    });
    Ok((head, Body::from_stream(parts)).into_response())
}
