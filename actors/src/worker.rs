//! A worker: it joins a cluster, shows its node actor, and serves until it is sent away.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwapOption;
use lite_llm_kernels::{DETERMINISM_VERSION, cpu::Cpu};
use lite_llm_runtime::store::DramStore;
use lite_llm_transport::{
    PROTOCOL_VERSION, RELEASE,
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    identity::Role,
    join::join,
    messages::NodeInfo,
    session::Hello,
    token::JoinToken,
};
use ractor::{Actor, ActorRef, pg};
use tracing::info;

use crate::{
    control::ControlPlane,
    coordinator::scope,
    links::Links,
    node::{Model, NODES, NodeActor, NodeMessage, NodeOptions, StoreSlot, jobs::serve_jobs},
};

/// What a worker is started with.
pub struct WorkerOptions {
    /// Where the coordinator is.
    pub coordinator: SocketAddr,
    /// What lets the worker in.
    pub token: JoinToken,
    /// Its name in the cluster.
    pub name: String,
    /// Where it listens for other workers; port 0 takes any.
    pub listen: SocketAddr,
    /// What computes.
    pub device: Arc<Cpu>,
    /// Bytes of experts that it holds at most.
    pub dram_bytes: u64,
    /// Bytes of caches of keys and values.
    pub kv_bytes: u64,
    /// Where the model is.
    pub model: Model,
    /// Whether the coordinator is another process; if not, it is an actor of this one.
    pub remote: bool,
}

/// Why a worker did not start or ended.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WorkerError(String);

fn failed(error: impl std::fmt::Display) -> WorkerError {
    WorkerError(error.to_string())
}

/// A running worker.
pub struct Worker {
    name: String,
    node: ActorRef<NodeMessage>,
    ended: tokio::task::JoinHandle<()>,
    farewell: Arc<OnceLock<String>>,
    store: StoreSlot,
    endpoint: Endpoint,
    connection: Connection,
    control: Option<ControlPlane>,
}

impl Worker {
    /// Joins a cluster and shows the node.
    pub async fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        let WorkerOptions { coordinator, token, name, listen, device, .. } = options;
        let hello = Hello::new(DETERMINISM_VERSION);
        let identity =
            join(coordinator, &token, Role::Worker, &name, &hello).await.map_err(failed)?;
        let endpoint = Endpoint::bind(listen, &identity, Options::new(hello)).map_err(failed)?;
        let mut address = endpoint.local_addr().map_err(failed)?;
        if address.ip().is_unspecified() {
            address.set_ip(local_address(coordinator).map_err(failed)?.ip());
        }
        let connection =
            endpoint.connect(coordinator, &Expect::coordinator()).await.map_err(failed)?;
        let inbox = Arc::new(ArcSwapOption::empty());
        let links = Links::new(endpoint.clone(), inbox.clone());
        let info = NodeInfo {
            name: name.clone(),
            address: address.to_string(),
            release: RELEASE.into(),
            protocol: PROTOCOL_VERSION,
            determinism: DETERMINISM_VERSION,
            budget_bytes: options.dram_bytes,
            threads: device.pool().threads() as u32,
            pid: std::process::id(),
        };
        let buffers = endpoint.pool().clone();
        let (farewell, store) = (Arc::new(OnceLock::new()), StoreSlot::default());
        let node = NodeOptions {
            info,
            device,
            kv_bytes: options.kv_bytes,
            model: options.model,
            links: links.clone(),
            inbox: inbox.clone(),
            buffers,
            store: store.clone(),
            farewell: farewell.clone(),
        };
        let (node, ended) = Actor::spawn(None, NodeActor, node).await.map_err(failed)?;
        tokio::spawn(links.accept());
        tokio::spawn(serve_jobs(connection.clone(), inbox));
        pg::join_scoped(scope(&token), NODES.into(), vec![node.get_cell()]);
        let control = match options.remote {
            true => {
                let cookie = identity.control_cookie().ok_or_else(|| {
                    failed("the coordinator gave no secret of the control plane to this worker")
                })?;
                let control = ControlPlane::start(&identity, &cookie).await.map_err(failed)?;
                let stream = connection.open_raw(StreamKind::Control).await.map_err(failed)?;
                control.connect(&connection.peer().to_string(), stream, false);
                Some(control)
            }
            false => None,
        };
        info!(worker = %name, %address, %coordinator, "joined");
        Ok(Self { name, node, ended, farewell, store, endpoint, connection, control })
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The store of its experts, once it has an assignment.
    pub fn store(&self) -> Option<Arc<DramStore>> {
        self.store.lock().clone()
    }

    /// Serves until the coordinator is gone or sends it away, or the node stopped; says why.
    /// [`Worker::stop`] is still to be called.
    pub async fn run(&mut self) -> WorkerError {
        let reason = tokio::select! {
            lost = self.connection.closed() => format!("lost the coordinator: {}", lost.reason),
            _ = &mut self.ended => match self.farewell.get() {
                Some(reason) => reason.clone(),
                None => "the node stopped".to_owned(),
            },
        };
        WorkerError(reason)
    }

    /// Leaves the cluster.
    pub async fn stop(self) {
        let _ = self.node.stop_and_wait(None, None).await;
        if let Some(control) = &self.control {
            control.stop();
        }
        self.endpoint.close("the worker stops").await;
    }
}

/// The address, with any port, from which this machine reaches another.
pub fn local_address(toward: SocketAddr) -> std::io::Result<SocketAddr> {
    let any: SocketAddr = match toward {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Connecting a UDP socket sends nothing; it only asks for the route.
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(toward)?;
    Ok(SocketAddr::new(socket.local_addr()?.ip(), 0))
}
