//! The page for people, and what it shows: nodes, where experts are, and requests under way.
//!
//! Invariant: no text of a request is shown to anybody but who asked, nor whose a request is.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Json,
    extract::State,
    http::header,
    response::{Html, IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{Api, Caller, error::ApiError, health::describe};

const PAGE: &str = include_str!("page.html");
/// Nothing is fetched from elsewhere, and nobody shows the page inside their own.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                      img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; \
                      frame-ancestors 'none'";
/// Requests that are shown.
const REQUESTS_MAX: usize = 100;

/// The page.
pub(super) async fn page() -> Response {
    let head = [(header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-cache")];
    (head, Html(PAGE)).into_response()
}

/// What it shows.
pub(super) async fn cluster(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    let asker = caller.key.as_ref().map(|(name, _)| name.as_str());
    let (status, residences) = describe(&api.coordinator).await?;
    let places: BTreeMap<&str, &Vec<_>> =
        residences.iter().map(|node| (node.name.as_str(), &node.residences)).collect();
    let nodes = status.nodes.iter().map(|node| {
        let places = places.get(node.name.as_str()).map_or(&[][..], |places| places);
        let places = places.iter().map(|place| {
            json!({
                "name": place.name,
                "held": place.held,
                "budget": place.budget,
                "hits": place.hits,
                "misses": place.misses,
                "bytes": place.bytes,
            })
        });
        json!({
            "name": node.name,
            "state": node.state,
            "loaded": node.loaded,
            "experts": node.total,
            "sequences": node.sequences,
            "tokens_per_second": node.tokens_per_second,
            "residences": places.collect::<Vec<_>>(),
        })
    });
    let requests = api.requests.lock();
    let shown = requests.newest().take(REQUESTS_MAX).map(|one| one.json(asker));
    Ok(Json(json!({
        "model": api.name,
        "fingerprint": api.fingerprint,
        "state": status.state,
        "waiting_for": status.waiting_for,
        "tokens_per_second": status.tokens_per_second,
        "jobs_done": status.jobs_done,
        "running": api.metrics.running.get(),
        "waiting": api.metrics.waiting.get(),
        "nodes": nodes.collect::<Vec<_>>(),
        "requests": shown.collect::<Vec<_>>(),
    })))
}
