//! What the tests of this crate share: a cluster of endpoints on loopback.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod intruder;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    frame::{FrameReceiver, FrameSender},
    identity::{ClusterCa, Role},
    messages::{ExpertBatch, ExpertCall, TraceContext},
    session::Hello,
};

pub(crate) fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub(crate) fn options() -> Options {
    Options::new(Hello::new(1))
}

/// Nothing in these tests may hang: a minute is more than any of them needs.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(20), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing happened for 20 s"),
    }
}

pub(crate) fn authority() -> Arc<ClusterCa> {
    Arc::new(ClusterCa::ephemeral().unwrap())
}

pub(crate) fn coordinator(ca: &Arc<ClusterCa>) -> Endpoint {
    let identity = ca.identity(Role::Coordinator, "head").unwrap();
    Endpoint::bind_coordinator(loopback(), &identity, ca.clone(), options()).unwrap()
}

pub(crate) fn worker(ca: &ClusterCa, name: &str) -> Endpoint {
    let identity = ca.identity(Role::Worker, name).unwrap();
    Endpoint::bind(loopback(), &identity, options()).unwrap()
}

/// Two workers and both ends of their connection.
pub(crate) struct Pair {
    pub(crate) endpoints: [Endpoint; 2],
    pub(crate) near: Connection,
    pub(crate) far: Connection,
}

pub(crate) async fn pair() -> Pair {
    let ca = authority();
    let endpoints = [worker(&ca, "w1"), worker(&ca, "w2")];
    let address = endpoints[1].local_addr().unwrap();
    let expect = Expect::worker("w2");
    let (near, far) = soon("connect", async {
        tokio::join!(endpoints[0].connect(address, &expect), endpoints[1].accept())
    })
    .await;
    Pair { endpoints, near: near.unwrap(), far: far.unwrap() }
}

impl Pair {
    /// A stream of expert batches from near to far.
    pub(crate) async fn stream(
        &self,
    ) -> ((FrameSender, FrameReceiver), (FrameSender, FrameReceiver)) {
        let near = soon("open", self.near.open_stream(StreamKind::Experts)).await.unwrap();
        let far = soon("accept", self.far.accept_stream()).await.unwrap();
        (near, far.into_frames())
    }
}

/// A batch in which every row calls `k` experts.
pub(crate) fn batch(id: u64, rows: u32, width: u32, k: u32) -> ExpertBatch {
    let call = |row| move |expert| ExpertCall { row, tier: 1, group: row % 3, expert: expert * 2 };
    let calls = (0..rows).flat_map(|row| (0..k).map(call(row))).collect();
    let trace = TraceContext { trace_id: [7; 16], span_id: [5; 8], flags: 1 };
    ExpertBatch { id, trace, layer: 11, width, rows, calls }
}
