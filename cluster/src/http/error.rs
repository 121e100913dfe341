//! What goes wrong with a request, in the shape that OpenAI's clients read:
//! `{"error": {"message", "type", "param", "code"}}`.
//!
//! Invariant: a message says what was found, what was expected and what to do; it names nothing of
//! this machine but what the caller sent.

use std::{io::ErrorKind, time::Duration};

use axum::{
    body::to_bytes,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use lite_llm_actors::coordinator::EncodeError;
use serde_json::{Value, json};
use tracing::warn;

/// What OpenAI's clients look at before they ask again by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Bytes of a refusal of the framework's own.
const SAID_MAX: usize = 4096;

/// A request that is not answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<&'static str>,
    pub(super) message: String,
    retry_after: Option<Duration>,
    /// Clients are not to send the same again by themselves.
    once: bool,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, kind, code: None, param: None, message, retry_after: None, once: false }
    }

    /// The caller's mistake, in this field.
    pub(super) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::bad(message) }
    }

    /// The caller's mistake, in no field of its own.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field that would change the answer, and that nobody here looks at.
    pub(super) fn unsupported(param: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// No key, or none that is good.
    pub(super) fn unauthorized(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// Whoever asks may not.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// A form of answers that cannot be had.
    pub(super) fn form(message: impl Into<String>) -> Self {
        Self { param: Some("response_format"), ..Self::bad(message) }
    }

    /// A priority that whoever asks may not have.
    pub(super) fn priority(message: impl Into<String>) -> Self {
        Self { param: Some("priority"), ..Self::forbidden(message) }
    }

    /// There is no such thing.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// Another model than the one that is served.
    pub(super) fn no_model(asked: &str, served: &str) -> Self {
        let asked: String = asked.chars().take(100).collect();
        let message = format!("there is no model {asked:?}; this server has {served:?}");
        let error = Self { param: Some("model"), ..Self::not_found(message) };
        Self { code: Some("model_not_found"), ..error }
    }

    /// Another method than the path has.
    pub(super) fn method() -> Self {
        let message = "this path has another method; /openapi.json lists them";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// A body of more bytes than are taken.
    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than {limit} bytes: send less at once");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// A body that is no JSON by its own account.
    pub(super) fn media_type() -> Self {
        let message = "Content-Type: application/json is expected";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// A body that did not come in time.
    pub(super) fn too_slow(limit: Duration) -> Self {
        let message = format!("the body did not arrive within {limit:?}");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// A body that stood still while others needed its room.
    pub(super) fn still(limit: Duration) -> Self {
        let message =
            format!("nothing of the body came for {limit:?} while others waited: send it faster");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// More than is admitted at present.
    pub(super) fn busy(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        let code = Some("rate_limit_exceeded");
        Self { retry_after: Some(retry_after), code, ..error }
    }

    /// The cluster cannot serve at present.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { retry_after: Some(Duration::from_secs(5)), ..error }
    }

    /// The job failed.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Somebody ended the job.
    pub(super) fn cancelled() -> Self {
        Self::failed("the job was cancelled")
    }

    /// The disk does not do what the request needs. What it says may name paths, so the log has it.
    pub(super) fn disk(error: &std::io::Error) -> Self {
        warn!(%error, "a file of the API cannot be read or written");
        let kind = error.kind();
        match kind {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                let message = format!("the server's disk takes no more: {kind}");
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", message)
            }
            _ => Self::failed(format!("the server's disk fails: {kind}; its log says more")),
        }
    }

    /// A prompt that has no tokens, in this field.
    pub(super) fn prompt(field: &'static str, error: &EncodeError) -> Self {
        match error {
            EncodeError::Busy(_) => Self::busy(error.to_string(), Duration::from_secs(1)),
            EncodeError::Prompt(_) => Self::invalid(field, error.to_string()),
        }
    }

    /// Nobody knows whether it was done, and sent again it would be done again.
    pub(super) fn once(self, remedy: &str) -> Self {
        let message = format!("{}: {remedy}", self.message);
        let code = Some("outcome_unknown");
        Self { message, code, retry_after: None, once: true, ..self }
    }

    /// The caller's own limit of time has passed.
    pub(super) fn deadline(limit: Duration, tokens: u32) -> Self {
        let message = format!(
            "deadline_ms of {} has passed after {tokens} tokens: allow more time or ask for less",
            limit.as_millis()
        );
        let error = Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message);
        Self { code: Some("deadline_exceeded"), param: Some("deadline_ms"), ..error }
    }

    /// The same, where another name is that of the field: pairs of an old and a new one.
    pub(super) fn renamed(self, names: &[(&'static str, &'static str)]) -> Self {
        let new = names.iter().find(|(old, _)| self.param == Some(*old)).map(|(_, new)| *new);
        Self { param: new.or(self.param), ..self }
    }

    /// The same with a code that clients look at.
    pub(super) fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The same, of a line of a file.
    pub(super) fn in_line(self, number: u64) -> Self {
        let message = format!("line {number}: {}", self.message);
        Self { message, param: Some("input_file_id"), ..self }
    }

    /// As it is sent.
    pub(super) fn json(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        if let Some(pause) = self.retry_after {
            let seconds = HeaderValue::from(pause.as_secs().max(1));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        if self.once {
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let bearer = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
        }
        response
    }
}

/// Refusals of the framework's own, of a path that is no text for example, in the shape of ours.
pub(super) async fn shaped(response: Response) -> Response {
    let kind = response.headers().get(header::CONTENT_TYPE);
    let plain = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if !plain || !response.status().is_client_error() {
        return response;
    }
    let status = response.status();
    let said = to_bytes(response.into_body(), SAID_MAX).await.unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    ApiError::new(status, "invalid_request_error", said).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn a_full_disk_is_told_from_one_that_fails_and_names_no_path() {
        let full = ApiError::disk(&ErrorKind::StorageFull.into());
        let broken = ApiError::disk(&Error::other("/secret/place: input/output error"));
        assert_eq!((full.status.as_u16(), broken.status.as_u16()), (507, 500));
        assert!(!broken.message.contains("secret"), "{broken:?}");
    }

    /// OpenAI's clients ask again by themselves after any status of 500 and more, but for this header.
    #[test]
    fn what_may_have_been_done_is_not_to_be_sent_again() {
        let response = ApiError::unavailable("slow").once("look first").into_response();
        assert_eq!(response.headers()["x-should-retry"], "false");
        assert!(response.headers().get(header::RETRY_AFTER).is_none());
        let response = ApiError::unavailable("slow").into_response();
        assert!(response.headers().get("x-should-retry").is_none());
        assert_eq!(response.headers()[header::RETRY_AFTER], "5");
    }
}
