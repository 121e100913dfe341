//! Bodies of requests: their bytes, their depth and the number of their values are bounded before
//! memory is used for what they say.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, header},
};
use serde::de::DeserializeOwned;
use tokio::{sync::Semaphore, time::timeout};

use super::error::ApiError;

/// Longest body, in bytes: a prompt of 4 MiB, with its escapes.
pub(super) const BODY_BYTES_MAX: usize = 8 << 20;
/// Bytes of bodies that are held at a time, of all requests together.
const BODIES_BYTES_MAX: usize = 64 << 20;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Deepest nesting of arrays and objects.
const DEPTH_MAX: usize = 64;
/// Most values of a body: a million token ids, and all the rest. Parsed, each takes tens of bytes.
const VALUES_MAX: usize = (1 << 20) + (1 << 16);

/// Room for the bodies that are read and parsed at a time.
#[derive(Clone)]
pub(super) struct Bodies(Arc<Semaphore>);

impl Bodies {
    /// Room for as much as is ever held.
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(BODIES_BYTES_MAX)))
    }

    /// Reads a body and what its JSON says.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<T, ApiError> {
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.and_then(|kind| kind.split(';').next()).map(str::trim);
        // A browser sends other types across origins without asking.
        if !kind.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json")) {
            return Err(ApiError::media_type());
        }
        let length = headers.get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let claims = length.unwrap_or(BODY_BYTES_MAX);
        if claims > BODY_BYTES_MAX {
            return Err(ApiError::too_large(BODY_BYTES_MAX));
        }
        // Held until the body is parsed.
        let _room = self.0.try_acquire_many(claims as u32).map_err(|_| {
            let message = format!("{BODIES_BYTES_MAX} bytes of bodies are being read already");
            ApiError::busy(message, Duration::from_secs(1))
        })?;
        let read = timeout(BODY_TIMEOUT, axum::body::to_bytes(body, BODY_BYTES_MAX)).await;
        let bytes = read.map_err(|_| ApiError::too_slow(BODY_TIMEOUT))?;
        let bytes = bytes.map_err(|_| ApiError::too_large(BODY_BYTES_MAX))?;
        parse(&bytes)
    }
}

/// What JSON says, if it stays within the bounds.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    check_bounds(bytes)?;
    serde_json::from_slice(bytes).map_err(|error| {
        // The library quotes what it found: as much of it as a person reads.
        let mut said = error.to_string();
        said.truncate(said.floor_char_boundary(600));
        ApiError::bad(format!("the body is not what is expected: {said}"))
    })
}

/// Walks over JSON without keeping anything of it.
fn check_bounds(bytes: &[u8]) -> Result<(), ApiError> {
    let (mut depth, mut values, mut text, mut escaped) = (0usize, 1usize, false, false);
    for &byte in bytes {
        if text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => text = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => text = true,
            b'[' | b'{' => {
                depth += 1;
                values += 1;
                if depth > DEPTH_MAX {
                    let message = format!("the body is nested deeper than {DEPTH_MAX}");
                    return Err(ApiError::bad(message));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
    }
    if values > VALUES_MAX {
        let message = format!("the body has {values} values; at most {VALUES_MAX} are taken");
        return Err(ApiError::bad(message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn depth_and_number_of_values_are_bounded_and_texts_are_no_structure() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse::<Value>(nested(DEPTH_MAX).as_bytes()).is_ok());
        for bad in [nested(DEPTH_MAX + 1), "[".repeat(1 << 20), "{\"a\":".repeat(1000)] {
            let error = parse::<Value>(bad.as_bytes()).unwrap_err();
            assert_eq!(error.status, 400);
        }
        let text = serde_json::to_vec(&"[{\\\"".repeat(10_000)).unwrap();
        assert!(parse::<Value>(&text).is_ok());
        let many = format!("[{}0]", "0,".repeat(VALUES_MAX));
        assert!(parse::<Value>(many.as_bytes()).unwrap_err().message.contains("values"));
        for bad in ["", "nul", "{\"a\":1,}", "\u{0}", "\"\\"] {
            assert_eq!(parse::<Value>(bad.as_bytes()).unwrap_err().status, 400, "{bad:?}");
        }
    }
}
