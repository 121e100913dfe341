//! Whether the server lives, whether it can serve, and what it has done.
//!
//! Invariant: `/ready` says yes only if a token was generated lately: by somebody's job, or by one that
//! it runs itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use lite_llm_actors::coordinator::CoordinatorHandle;
use lite_llm_transport::messages::{
    ClusterStatus, JobEventBody, JobRequest, NodeResidences, Prompt,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Api, error::ApiError};

/// A token of this age proves that tokens can be generated.
const FRESH: Duration = Duration::from_secs(10);
/// How long a job of one token may take to give it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the cluster may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// When the last token came, and whose turn it is to make one.
#[derive(Default)]
pub(super) struct Readiness {
    last: Mutex<Option<Instant>>,
    probing: tokio::sync::Mutex<()>,
}

impl Readiness {
    /// A token was generated.
    pub(super) fn token(&self, now: Instant) {
        *self.last.lock() = Some(now);
    }

    fn age(&self) -> Option<Duration> {
        self.last.lock().map(|last| last.elapsed()).filter(|age| *age <= FRESH)
    }
}

/// The process answers.
pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Tokens are generated.
pub(super) async fn ready(State(api): State<Arc<Api>>) -> Result<Json<Value>, ApiError> {
    let yes = |age: Duration| {
        Json(json!({ "status": "ready", "last_token_seconds_ago": age.as_secs_f64() }))
    };
    if let Some(age) = api.readiness.age() {
        return Ok(yes(age));
    }
    // One asks for all who wait.
    let probe = async {
        let _mine = api.readiness.probing.lock().await;
        match api.readiness.age() {
            Some(age) => Ok(age),
            None => one_token(&api).await.map(|()| Duration::ZERO),
        }
    };
    let age = timeout(PROBE_TIMEOUT, probe).await.map_err(|_| {
        ApiError::unavailable(format!("no token was generated within {PROBE_TIMEOUT:?}"))
    })??;
    Ok(yes(age))
}

async fn one_token(api: &Api) -> Result<(), ApiError> {
    let request = JobRequest::greedy(Prompt::Tokens(vec![0]), 1);
    let submitted = api.coordinator.submit(request).await;
    let (_, mut events) = submitted.map_err(|error| ApiError::unavailable(error.to_string()))?;
    while let Some(event) = events.recv().await {
        match event.body {
            JobEventBody::Token { .. } => {
                api.readiness.token(Instant::now());
                return Ok(());
            }
            JobEventBody::Failed { reason } => return Err(ApiError::unavailable(reason)),
            _ => {}
        }
    }
    Err(ApiError::unavailable("the coordinator is stopping"))
}

/// How the cluster is, and where its experts are.
pub(super) async fn describe(
    coordinator: &CoordinatorHandle,
) -> Result<(ClusterStatus, Vec<NodeResidences>), ApiError> {
    let asked = async { tokio::try_join!(coordinator.status(), coordinator.residences()) };
    let silent =
        |_| ApiError::unavailable(format!("the cluster said nothing within {STATUS_TIMEOUT:?}"));
    let said = timeout(STATUS_TIMEOUT, asked).await.map_err(silent)?;
    said.map_err(|error| ApiError::unavailable(error.to_string()))
}

/// Metrics for Prometheus.
pub(super) async fn metrics(State(api): State<Arc<Api>>) -> Result<Response, ApiError> {
    let (status, residences) = describe(&api.coordinator).await?;
    let text = api.metrics.text(&status, &residences);
    let text = text.map_err(|error| ApiError::failed(error.to_string()))?;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, text).into_response())
}
