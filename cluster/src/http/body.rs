//! Bodies of requests: their bytes, their depth and the number of their values are bounded before
//! memory is used for what they say.
//!
//! Invariants: a body takes room as it arrives, never for what it claims; one that arrives makes others
//! leave that stand still, so that slow clients keep nobody out; each has a deadline.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, header},
};
use futures::StreamExt;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};

use super::error::ApiError;

/// Longest body, in bytes: a prompt of 4 MiB, with its escapes.
pub(super) const BODY_BYTES_MAX: usize = 8 << 20;
/// Bytes of bodies that are held at a time, of all requests together.
const BODIES_BYTES_MAX: usize = 64 << 20;
/// How long a body may take to arrive, and how long it may stand still.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
pub(super) const BODY_IDLE_MAX: Duration = Duration::from_secs(10);
/// How long the rest of one that is too long is read, and thrown away: who sends it hears why it is refused
/// only then.
const REST_TIMEOUT: Duration = Duration::from_secs(2);
/// One that has stood still for so long makes room for others that need it.
const STILL: Duration = Duration::from_millis(250);
/// How long a body waits for room.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);
/// Deepest nesting of arrays and objects.
const DEPTH_MAX: usize = 64;
/// Most token ids of a body's prompts, of which each takes four bytes.
const PROMPT_VALUES_MAX: usize = 1 << 20;
/// Most values of all the rest: parsed, each may take some hundred bytes.
const VALUES_MAX: usize = 1 << 16;

/// Room for the bodies that are read and parsed at a time.
#[derive(Clone)]
pub(super) struct Bodies(Arc<Room>);

struct Room {
    bytes: Arc<Semaphore>,
    /// Bodies that arrive.
    open: Mutex<BTreeMap<u64, Arc<Arriving>>>,
    begun: AtomicU64,
}

/// A body that arrives.
struct Arriving {
    /// When some of it came.
    last: Mutex<Instant>,
    /// It waits for room itself, so that nothing of it can come.
    waits: AtomicBool,
    /// Others need its room.
    leave: Notify,
}

/// Its entry among those that arrive.
struct Entry<'a> {
    room: &'a Room,
    number: u64,
    arriving: Arc<Arriving>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.room.open.lock().remove(&self.number);
    }
}

impl Room {
    fn enter(&self) -> Entry<'_> {
        let number = self.begun.fetch_add(1, Relaxed);
        let (last, leave) = (Mutex::new(Instant::now()), Notify::new());
        let waits = AtomicBool::new(false);
        let arriving = Arc::new(Arriving { last, waits, leave });
        self.open.lock().insert(number, arriving.clone());
        Entry { room: self, number, arriving }
    }

    /// Tells those that stand still that others need their room, the stillest first, one a time.
    fn make_room(&self, but: u64) {
        let open = self.open.lock();
        let other = |(number, other): &(&u64, &Arc<Arriving>)| {
            **number != but && !other.waits.load(Relaxed)
        };
        let others = open.iter().filter(other).map(|(_, other)| other);
        let still = others.map(|other| (*other.last.lock(), other)).min_by_key(|(last, _)| *last);
        if let Some((_, other)) = still.filter(|(last, _)| last.elapsed() >= STILL) {
            other.leave.notify_one();
        }
    }
}

impl Bodies {
    /// Room for as much as is ever held.
    pub(super) fn new() -> Self {
        Self::of(BODIES_BYTES_MAX)
    }

    fn of(bytes: usize) -> Self {
        let (bytes, open) = (Arc::new(Semaphore::new(bytes)), Mutex::default());
        Self(Arc::new(Room { bytes, open, begun: AtomicU64::new(0) }))
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
        if length.is_some_and(|claims| claims > BODY_BYTES_MAX) {
            return Err(ApiError::too_large(BODY_BYTES_MAX));
        }
        // Room is held until the body is parsed.
        let (bytes, _room) = self.read(body).await?;
        parse(&bytes)
    }

    /// The bytes of a body, and the room that they take.
    async fn read(&self, body: Body) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
        let entry = self.0.enter();
        let arriving = entry.arriving.clone();
        let arrive = async {
            let (mut bytes, mut room): (Vec<u8>, Option<OwnedSemaphorePermit>) = Default::default();
            let (mut parts, until) = (body.into_data_stream(), Instant::now() + BODY_TIMEOUT);
            loop {
                let part = next(&mut parts, until).await?;
                let Some(part) = part else { return Ok((bytes, room)) };
                if bytes.len() + part.len() > BODY_BYTES_MAX {
                    drop((bytes, room));
                    rest(&mut parts).await;
                    return Err(ApiError::too_large(BODY_BYTES_MAX));
                }
                *arriving.last.lock() = Instant::now();
                arriving.waits.store(true, Relaxed);
                let more = self.room(part.len(), entry.number).await;
                arriving.waits.store(false, Relaxed);
                let more = more?;
                match &mut room {
                    Some(room) => room.merge(more),
                    None => room = Some(more),
                }
                bytes.extend_from_slice(&part);
            }
        };
        tokio::select! {
            read = arrive => read,
            () = arriving.leave.notified() => Err(ApiError::still(STILL)),
        }
    }

    async fn room(&self, bytes: usize, of: u64) -> Result<OwnedSemaphorePermit, ApiError> {
        // No part of a body has more bytes than a whole one may have.
        let bytes = bytes as u32;
        let until = Instant::now() + ROOM_TIMEOUT;
        loop {
            if let Ok(room) = self.0.bytes.clone().try_acquire_many_owned(bytes) {
                return Ok(room);
            }
            self.0.make_room(of);
            let waits = until.min(Instant::now() + STILL);
            let room = timeout_at(waits, self.0.bytes.clone().acquire_many_owned(bytes)).await;
            if let Ok(Ok(room)) = room {
                return Ok(room);
            }
            if Instant::now() >= until {
                let message = format!("{BODIES_BYTES_MAX} bytes of bodies are being read already");
                return Err(ApiError::busy(message, Duration::from_secs(1)));
            }
        }
    }
}

/// The next part of a body that is to be there until then.
pub(super) async fn next<S, E>(parts: &mut S, until: Instant) -> Result<Option<Bytes>, ApiError>
where
    S: StreamExt<Item = Result<Bytes, E>> + Unpin,
{
    let part = timeout_at(until, timeout(BODY_IDLE_MAX, parts.next())).await;
    let part = part.map_err(|_| ApiError::too_slow(BODY_TIMEOUT))?;
    let part = part.map_err(|_| ApiError::too_slow(BODY_IDLE_MAX))?;
    part.transpose().map_err(|_| ApiError::bad("the body broke off"))
}

/// Reads as much again as a body may have, and keeps nothing of it.
async fn rest<S, E>(parts: &mut S)
where
    S: StreamExt<Item = Result<Bytes, E>> + Unpin,
{
    let read = async {
        let mut left = BODY_BYTES_MAX;
        while let Some(Ok(part)) = parts.next().await {
            let Some(less) = left.checked_sub(part.len()) else { return };
            left = less;
        }
    };
    // Who goes on after that sees its connection closed.
    let _ = timeout(REST_TIMEOUT, read).await;
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
    let (mut depth, mut text, mut escaped) = (0usize, None, false);
    let (mut values, mut of_prompt) = (1usize, 0usize);
    // The fields that it is in: of the body, and of the body in a line of a batch's file.
    let (mut last, mut fields): (&[u8], [&[u8]; 2]) = (b"", [b"", b""]);
    for (at, &byte) in bytes.iter().enumerate() {
        if let Some(begin) = text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => (last, text) = (&bytes[begin..at], None),
                _ => {}
            }
            continue;
        }
        let in_prompt = depth > 1
            && (fields[0] == b"prompt" || depth > 2 && fields == [&b"body"[..], b"prompt"]);
        let count = if in_prompt { &mut of_prompt } else { &mut values };
        match byte {
            b'"' => text = Some(at + 1),
            b':' if (1..=2).contains(&depth) => fields[depth - 1] = last,
            b'[' | b'{' => {
                *count += 1;
                depth += 1;
                if depth > DEPTH_MAX {
                    let message = format!("the body is nested deeper than {DEPTH_MAX}");
                    return Err(ApiError::bad(message));
                }
                if depth <= 2 {
                    fields[depth - 1] = b"";
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => *count += 1,
            _ => {}
        }
    }
    for (what, found, most) in
        [("values", values, VALUES_MAX), ("values in its prompts", of_prompt, PROMPT_VALUES_MAX)]
    {
        if found > most {
            let message = format!("the body has {found} {what}; at most {most} are taken");
            return Err(ApiError::bad(message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use serde_json::{Value, json};

    use super::*;

    fn headers() -> HeaderMap {
        let kind = "application/json".parse().unwrap();
        HeaderMap::from_iter([(header::CONTENT_TYPE, kind)])
    }

    /// A body of which so many bytes come, and then nothing.
    fn stuck(bytes: usize) -> Body {
        let first = stream::iter([Ok::<_, std::io::Error>(Bytes::from(vec![b' '; bytes]))]);
        Body::from_stream(first.chain(stream::pending()))
    }

    #[tokio::test]
    async fn slow_bodies_keep_nobody_out() {
        for bytes in [0, 1 << 10] {
            let bodies = Bodies::of(8 << 10);
            let slow: Vec<_> = (0..8)
                .map(|_| {
                    let bodies = bodies.clone();
                    tokio::spawn(async move {
                        let mut headers = headers();
                        headers.insert(header::CONTENT_LENGTH, (BODY_BYTES_MAX as u64).into());
                        bodies.json::<Value>(&headers, stuck(bytes)).await
                    })
                })
                .collect();
            tokio::time::sleep(2 * STILL).await;
            let headers = headers();
            let quick = bodies.json::<Value>(&headers, Body::from("{\"a\": 1}"));
            assert_eq!(timeout(STILL * 2, quick).await.unwrap().unwrap(), json!({ "a": 1 }));
            let told = slow.iter().filter(|slow| slow.is_finished()).count();
            assert_eq!(told, usize::from(bytes > 0), "one of them made room");
            slow.iter().for_each(tokio::task::JoinHandle::abort);
        }
    }

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
        for (body, taken) in [
            (json!({ "prompt": vec![7; 100_000] }), true),
            (json!({ "body": { "n": 1, "prompt": [vec![7; 100_000]] } }), true),
            (json!({ "prompt": [], "stop": vec![7; 100_000] }), false),
            (json!({ "metadata": { "prompt": vec![7; 100_000] } }), false),
            (json!({ "messages": [{ "prompt": vec![7; 100_000] }] }), false),
            (json!({ "prompt": vec![7; PROMPT_VALUES_MAX + 2] }), false),
        ] {
            let found = parse::<Value>(&serde_json::to_vec(&body).unwrap());
            assert_eq!(found.is_ok(), taken, "{:?}", found.err());
        }
        for bad in ["", "nul", "{\"a\":1,}", "\u{0}", "\"\\"] {
            assert_eq!(parse::<Value>(bad.as_bytes()).unwrap_err().status, 400, "{bad:?}");
        }
    }
}
