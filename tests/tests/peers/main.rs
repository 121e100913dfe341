//! Experts that come from the memory of other nodes: the same bits whatever the peers and the disks
//! do, and nothing that a peer says is believed.

mod cluster;
mod disks;
mod hostile;
mod liars;
mod turns;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    expert::{ExpertKey, GatedMlp},
    import::random::{RandomClass, RandomShape, write_random_hf},
    residency::ResidenceStats,
};
use lite_llm_tests::imported;
use lite_llm_transport::{
    messages::{TraceContext, WeightsRequest},
    session::Hello,
};

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn hello() -> Hello {
    Hello::new(DETERMINISM_VERSION)
}

/// Waits, but not for ever.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(Duration::from_secs(60), future).await;
    waited.unwrap_or_else(|_| panic!("{what}: nothing happened for a minute"))
}

/// A model whose experts are of several parts on the wire.
fn large() -> (tempfile::TempDir, Arc<Checkpoint>) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("hf");
    let tiny = RandomShape::tiny(RandomClass::Olmoe);
    let shape = RandomShape { layers: 1, hidden: 256, intermediate: 1000, ..tiny };
    write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    let (imported, checkpoint) = imported(source, None);
    drop(folder);
    (imported, checkpoint)
}

/// The bytes of an expert, as they lie in memory.
fn bytes_of(expert: &GatedMlp) -> Vec<u8> {
    [&expert.gate, &expert.up, &expert.down].iter().flat_map(|m| m.data().to_vec()).collect()
}

fn request(checkpoint: &Checkpoint, key: ExpertKey) -> WeightsRequest {
    let ExpertKey { layer, tier, group, expert } = key;
    let (checkpoint, trace) = (checkpoint.id(), TraceContext::default());
    WeightsRequest { checkpoint, trace, layer, tier, group, expert }
}

/// What came from peers.
fn peers(all: &[ResidenceStats]) -> ResidenceStats {
    all.iter().find(|place| place.name == "peers").cloned().unwrap_or_default()
}
