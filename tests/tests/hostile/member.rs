//! A worker that has a valid token and certificate, joins as it should, and means no good.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use lite_llm_actors::node::Loaded;
use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_transport::{
    PROTOCOL_VERSION, RELEASE,
    connection::Connection,
    endpoint::{Endpoint, Expect, Options},
    identity::{Identity, Role},
    join::join,
    messages::{NodeInfo, NodeReport, NodeStatus, NodeVitals, encode},
};

use crate::{
    cluster::{Cluster, HONEST, hello, loopback, soon},
    control::{Call, Control, Said},
};

/// See the module's text.
#[derive(Clone)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) endpoint: Endpoint,
    identity: Identity,
    coordinator: SocketAddr,
    /// The scope of the cluster's process groups.
    pub(crate) scope: String,
    /// Where the honest worker's data plane is.
    honest: SocketAddr,
}

impl Member {
    pub(crate) async fn join(cluster: &Cluster, name: &str) -> Self {
        let token = cluster.token(Role::Worker);
        let coordinator = token.address().parse().unwrap();
        let hello = hello();
        let joining = join(coordinator, &token, Role::Worker, name, &hello);
        let identity = soon("join", joining).await.unwrap();
        let endpoint = Endpoint::bind(loopback(), &identity, Options::new(hello)).unwrap();
        let scope = format!("lite-llm {}", token.cluster());
        let status = cluster.client("observer").await.status().await;
        let honest = status.nodes.iter().find(|node| node.name == HONEST).unwrap();
        let honest = honest.address.parse().unwrap();
        Self { name: name.to_owned(), endpoint, identity, coordinator, scope, honest }
    }

    /// A connection to the coordinator.
    pub(crate) async fn connect(&self) -> Connection {
        let expect = Expect::coordinator();
        let connecting = self.endpoint.connect(self.coordinator, &expect);
        soon("connect to the coordinator", connecting).await.unwrap()
    }

    /// A connection to the honest worker.
    pub(crate) async fn dial(&self) -> Connection {
        let expect = Expect::worker(HONEST);
        let connecting = self.endpoint.connect(self.honest, &expect);
        soon("connect to the honest worker", connecting).await.unwrap()
    }

    /// A name for a session of the control plane, such as an honest worker makes.
    pub(crate) fn session(&self) -> String {
        static SESSIONS: AtomicU64 = AtomicU64::new(0);
        format!("worker {} {:x}", self.name, SESSIONS.fetch_add(1, Relaxed))
    }

    pub(crate) fn cookie(&self) -> String {
        self.identity.control_cookie().unwrap()
    }

    pub(crate) async fn control(&self, connection: &Connection) -> Control {
        let (cookie, name) = (self.cookie(), self.session());
        let session = Control::open(connection, &cookie, &name, 1);
        soon("a session of the control plane", session).await.expect("a session")
    }

    pub(crate) fn info(&self) -> NodeInfo {
        NodeInfo {
            name: self.name.clone(),
            address: self.endpoint.local_addr().unwrap().to_string(),
            release: RELEASE.into(),
            protocol: PROTOCOL_VERSION,
            determinism: DETERMINISM_VERSION,
            budget_bytes: 1 << 30,
            threads: 1,
            pid: 1,
        }
    }

    pub(crate) fn vitals(&self) -> NodeVitals {
        static PROGRESS: AtomicU64 = AtomicU64::new(0);
        let status = NodeStatus {
            name: self.name.clone(),
            address: self.info().address,
            state: "ready".into(),
            experts: 8,
            expert_bytes: 1,
            budget: 1 << 30,
            sequences: 0,
            tokens_per_second: 0.0,
            loaded: 8,
            total: 8,
            kv_tokens: 0,
        };
        let progress = PROGRESS.fetch_add(1, Relaxed);
        NodeVitals { status, busy: false, progress, unreachable: Vec::new() }
    }

    /// What an honest node with all its experts answers.
    pub(crate) fn plausible(&self, call: &Call) -> Vec<u8> {
        match call.variant.as_str() {
            "Describe" => encode(&NodeReport { info: self.info(), holding: None }),
            "Vitals" => encode(&self.vitals()),
            _ => encode(&Loaded { error: None }),
        }
    }

    /// Shows a node and answers for it until the session has ended.
    pub(crate) async fn pretend(
        &self,
        mut control: Control,
        actors: Vec<u64>,
        mut answer: impl FnMut(&Call) -> Vec<u8>,
    ) {
        control.show(&self.scope, actors).await;
        while let Some(said) = control.next().await {
            if let Said::Call(call) = said {
                let answer = answer(&call);
                control.answer(&call, answer).await;
            }
        }
    }
}

/// Takes the streams that the coordinator opens, and drops them: jobs that come here go elsewhere.
pub(crate) fn drop_jobs(connection: Connection) {
    tokio::spawn(async move { while connection.accept_stream().await.is_some() {} });
}
