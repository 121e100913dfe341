//! Where every expert is, how often it was chosen, and what crosses the links between nodes: for the
//! page's heat map.
//!
//! Invariant: nodes are asked at most every [`FRESH`], however many look; what is shown of them is
//! bounded by their own bounds and by [`NODES_MAX`].

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use lite_llm_runtime::config::{ModelConfig, MoeConfig};
use lite_llm_transport::messages::{EXPERTS_VIEWED_MAX, ExpertPlace, NodeView};
use serde_json::{Value, json};
use tokio::{sync::Mutex, time::timeout};

use super::{Api, error::ApiError};

/// For so long an answer is given to others, too.
const FRESH: Duration = Duration::from_millis(500);
/// How long nodes may take to answer, together.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Nodes that are shown.
const NODES_MAX: usize = 64;

/// The last answer.
#[derive(Default)]
pub(super) struct Watched(Mutex<Option<(Instant, Arc<str>)>>);

pub(super) async fn experts(State(api): State<Arc<Api>>) -> Result<Response, ApiError> {
    // One asks for all who look.
    let mut last = api.watched.0.lock().await;
    let fresh = last.as_ref().filter(|(at, _)| at.elapsed() <= FRESH);
    let text = match fresh {
        Some((_, text)) => text.clone(),
        None => {
            let asked = timeout(ASK_TIMEOUT, api.coordinator.views()).await;
            let views = asked.map_err(|_| {
                ApiError::unavailable(format!("the nodes said nothing within {ASK_TIMEOUT:?}"))
            })?;
            let views = views.map_err(|error| ApiError::unavailable(error.to_string()))?;
            let text: Arc<str> = shown(&api.config, &api.expert_bytes, &views).to_string().into();
            *last = Some((Instant::now(), text.clone()));
            text
        }
    };
    drop(last);
    let head = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    Ok((head, text.to_string()).into_response())
}

/// All views as one.
fn shown(config: &ModelConfig, expert_bytes: &[u64], views: &[NodeView]) -> Value {
    let experts = config.moe.as_ref().map_or(0, MoeConfig::experts);
    let sparse: Vec<usize> = config.sparse_layers().collect();
    let layers = EXPERTS_VIEWED_MAX.checked_div(experts).unwrap_or(0).min(sparse.len());
    let mut loads = vec![0u64; layers * experts];
    // The node that has it, in its memory if there is one, and whether it is there.
    let mut homes: Vec<(i64, bool)> = vec![(-1, false); layers * experts];
    for (node, view) in (0i64..).zip(views.iter().take(NODES_MAX)) {
        // A node that has not begun tells of nothing; one of another model is not listened to.
        if view.places.len() != homes.len() {
            continue;
        }
        for ((load, home), (more, place)) in
            loads.iter_mut().zip(&mut homes).zip(view.loads.iter().zip(&view.places))
        {
            *load = load.saturating_add(*more);
            match place {
                ExpertPlace::Memory if !home.1 => *home = (node, true),
                ExpertPlace::Away if home.0 < 0 => *home = (node, false),
                _ => {}
            }
        }
    }
    let mut first = 0;
    let tiers = config.moe.iter().flat_map(|moe| &moe.tiers).zip(expert_bytes);
    let tiers: Vec<Value> = tiers
        .map(|(tier, bytes)| {
            let experts = tier.experts() as usize;
            let from = first;
            first += experts;
            json!({
                "name": tier.id.to_string(),
                "first": from,
                "experts": experts,
                "groups": tier.groups,
                "expert_bytes": bytes,
                "absent": tier.absent,
            })
        })
        .collect();
    let nodes: Vec<Value> = views
        .iter()
        .take(NODES_MAX)
        .map(|view| {
            let links = view.links.iter().map(
                |link| json!({ "to": link.peer, "messages": link.sent, "bytes": link.sent_bytes }),
            );
            json!({ "name": view.name, "links": links.collect::<Vec<_>>() })
        })
        .collect();
    json!({
        "layers": &sparse[..layers],
        "layers_left_out": sparse.len() - layers,
        "experts": experts,
        "tiers": tiers,
        "nodes": nodes,
        "nodes_left_out": views.len().saturating_sub(NODES_MAX),
        "homes": homes.iter().map(|home| home.0).collect::<Vec<_>>(),
        "in_memory": homes.iter().map(|home| u8::from(home.1)).collect::<Vec<_>>(),
        "loads": loads,
    })
}

#[cfg(test)]
mod tests {
    use lite_llm_runtime::checkpoint::Checkpoint;

    use super::*;

    #[test]
    fn views_of_all_nodes_become_one() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let checkpoint = Checkpoint::open(demo).unwrap();
        let config = checkpoint.config();
        let experts = config.moe.as_ref().unwrap().experts();
        let layers = config.sparse_layers().count();
        let view = |name: &str, place: ExpertPlace, load: u64| NodeView {
            name: name.into(),
            layers: layers as u32,
            experts: experts as u32,
            places: vec![place; layers * experts],
            loads: vec![load; layers * experts],
            links: Vec::new(),
        };
        let mut b = view("b", ExpertPlace::Elsewhere, 2);
        b.places[1] = ExpertPlace::Memory;
        let strange =
            NodeView { places: vec![ExpertPlace::Memory], ..view("c", ExpertPlace::Memory, 9) };
        let views = [view("a", ExpertPlace::Away, 1), b, strange];
        let shown = shown(config, &checkpoint.tier_expert_bytes(), &views);
        assert_eq!(shown["loads"].as_array().unwrap().len(), layers * experts);
        assert_eq!((&shown["loads"][0], &shown["homes"][0]), (&json!(3), &json!(0)));
        assert_eq!((&shown["in_memory"][0], &shown["in_memory"][1]), (&json!(0), &json!(1)));
        assert_eq!(shown["homes"][1], json!(1));
        let tiers = shown["tiers"].as_array().unwrap();
        let all: u64 = tiers.iter().map(|tier| tier["experts"].as_u64().unwrap()).sum();
        assert_eq!(all as usize, experts);
    }
}
