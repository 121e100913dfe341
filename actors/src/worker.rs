//! A worker: it joins a cluster, shows its node actor, and serves until it is sent away.
//!
//! A coordinator that is lost is waited for; the node, its experts and its links outlive it.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_runtime::residency::{ExpertCache, NvmeFolder};
use lite_llm_transport::{
    PROTOCOL_VERSION, RELEASE,
    connection::{Connection, StreamKind},
    endpoint::{ConnectError, Endpoint, Expect, Options},
    identity::{Identity, Role},
    join::join,
    messages::{Assignment, NodeInfo},
    session::Hello,
    token::JoinToken,
};
use parking_lot::Mutex;
use ractor::{Actor, ActorRef, pg};
use tracing::{info, warn};

use crate::{
    control::ControlPlane,
    coordinator::scope,
    lane::{LaneInbox, LaneLimits},
    links::Links,
    node::{
        Model, NODES, NodeActor, NodeDevice, NodeMessage, NodeOptions, StoreSlot,
        grammars::GrammarDesk, jobs::serve_jobs,
    },
};

/// How long a worker waits for a coordinator that is gone, if it is not told.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a node that has something to do may take to move, in milliseconds.
const MOVES_WITHIN_MS: u64 = 300;
/// Pauses between two attempts to reach a coordinator: the first, and the longest.
const RECONNECT_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

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
    pub device: NodeDevice,
    /// Bytes of experts that it holds in memory at most.
    pub dram_bytes: u64,
    /// Whether those are for the rest of the model, too: what it takes is only known when the
    /// coordinator has said which model that is.
    pub dram_holds_rest: bool,
    /// A folder of a local disk for experts that memory does not hold, if there is to be one.
    pub nvme: Option<NvmeFolder>,
    /// Bytes of caches of keys and values.
    pub kv_bytes: u64,
    /// Where the model is.
    pub model: Model,
    /// Whether the coordinator is another process; if not, it is an actor of this one.
    pub remote: bool,
    /// How long it waits for a coordinator that is gone, and its requests for experts that are.
    pub patience: Duration,
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
    links: Arc<Links>,
    home: Home,
    session: Session,
}

/// How the coordinator is reached.
struct Home {
    endpoint: Endpoint,
    identity: Identity,
    coordinator: SocketAddr,
    cookie: String,
    remote: bool,
    patience: Duration,
    inbox: LaneInbox,
    grammars: GrammarDesk,
    /// See [`NodeOptions::serving`].
    serving: Arc<Mutex<Option<Assignment>>>,
    /// See [`NodeOptions::session`].
    sessions: Arc<AtomicU64>,
}

/// What stands while the coordinator is there.
struct Session {
    connection: Connection,
    control: Option<ControlPlane>,
}

impl Home {
    /// Connects to the coordinator and takes its jobs.
    async fn connect(&self) -> Result<Session, ConnectError> {
        let expect = Expect::coordinator();
        let connection = self.endpoint.connect(self.coordinator, &expect).await?;
        // Nothing that an earlier coordinator, or this one before, said counts on.
        self.sessions.fetch_add(1, Relaxed);
        *self.serving.lock() = None;
        tokio::spawn(serve_jobs(connection.clone(), self.inbox.clone(), self.grammars.clone()));
        Ok(Session { connection, control: None })
    }

    /// Opens the control plane, on which the coordinator finds the node.
    async fn control(&self, session: &mut Session) -> Result<(), WorkerError> {
        if self.remote {
            let control =
                ControlPlane::start(&self.identity, &self.cookie).await.map_err(failed)?;
            let stream = match session.connection.open_raw(StreamKind::Control).await {
                Ok(stream) => stream,
                Err(error) => {
                    control.stop();
                    return Err(failed(error));
                }
            };
            control.connect(&session.connection.peer().to_string(), stream, false);
            session.control = Some(control);
        }
        Ok(())
    }

    /// Connects again, for as long as the worker is patient.
    async fn reconnect(&self, lost: &str) -> Result<Session, WorkerError> {
        let patience = self.patience;
        let deadline = tokio::time::Instant::now() + patience;
        let (mut pause, longest) = RECONNECT_PAUSES;
        loop {
            let error = match self.connect().await {
                Ok(mut session) => match self.control(&mut session).await {
                    Ok(()) => return Ok(session),
                    Err(error) => error,
                },
                // It will never be let in again.
                Err(error @ ConnectError::Revoked { .. }) => return Err(failed(error)),
                Err(error) => failed(error),
            };
            if tokio::time::Instant::now() + pause > deadline {
                return Err(WorkerError(format!(
                    "lost the coordinator: {lost}; it did not come back within {patience:?} \
                     (--patience): {error}"
                )));
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(longest);
        }
    }
}

impl Worker {
    /// Joins a cluster and shows the node.
    pub async fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        let WorkerOptions { coordinator, token, name, listen, device, .. } = options;
        let hello = Hello { fast: device.fast(), ..Hello::new(DETERMINISM_VERSION) };
        let identity =
            join(coordinator, &token, Role::Worker, &name, &hello).await.map_err(failed)?;
        let endpoint = Endpoint::bind(listen, &identity, Options::new(hello)).map_err(failed)?;
        let mut address = endpoint.local_addr().map_err(failed)?;
        if address.ip().is_unspecified() {
            address.set_ip(local_address(coordinator).map_err(failed)?.ip());
        }
        let inbox: LaneInbox = Arc::new(ArcSwapOption::empty());
        let links = Links::new(endpoint.clone(), inbox.clone());
        let home = Home {
            endpoint: endpoint.clone(),
            coordinator,
            cookie: identity.control_cookie().unwrap_or_default(),
            identity,
            remote: options.remote,
            patience: options.patience,
            inbox: inbox.clone(),
            grammars: GrammarDesk::default(),
            serving: Arc::default(),
            sessions: Arc::default(),
        };
        let mut session = home.connect().await.map_err(failed)?;
        let info = NodeInfo {
            name: name.clone(),
            address: address.to_string(),
            release: RELEASE.into(),
            protocol: PROTOCOL_VERSION,
            determinism: DETERMINISM_VERSION,
            budget_bytes: options.dram_bytes,
            threads: device.cpu().pool().threads() as u32,
            pid: std::process::id(),
        };
        let (farewell, store) = (Arc::new(OnceLock::new()), StoreSlot::default());
        let node = NodeOptions {
            info,
            device,
            dram_holds_rest: options.dram_holds_rest,
            nvme: options.nvme,
            kv_bytes: options.kv_bytes,
            model: options.model,
            links: links.clone(),
            inbox,
            grammars: home.grammars.clone(),
            buffers: endpoint.pool().clone(),
            store: store.clone(),
            hbm: Arc::default(),
            farewell: farewell.clone(),
            holding: Arc::default(),
            serving: home.serving.clone(),
            session: home.sessions.clone(),
            limits: LaneLimits { patience: options.patience, ..LaneLimits::default() },
        };
        let (node, ended) = Actor::spawn(None, NodeActor, node).await.map_err(failed)?;
        tokio::spawn(links.clone().accept());
        pg::join_scoped(scope(&token), NODES.into(), vec![node.get_cell()]);
        home.control(&mut session).await?;
        info!(worker = %name, %address, %coordinator, "joined");
        Ok(Self { name, node, ended, farewell, store, links, home, session })
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The store of its experts, once it has an assignment.
    pub fn store(&self) -> Option<Arc<ExpertCache>> {
        self.store.lock().clone()
    }

    /// Serves until the coordinator is gone for good or sends it away, or the node stopped; says
    /// why. [`Worker::stop`] is still to be called.
    pub async fn run(&mut self) -> WorkerError {
        loop {
            let again = async {
                let lost = self.session.connection.closed().await;
                // Two that take a name from each other would go on for ever, and one that is revoked
                // is never let in.
                if lost.for_good {
                    return Err(WorkerError(lost.reason));
                }
                let lost = lost.reason;
                warn!(worker = %self.name, reason = %lost, "lost the coordinator; trying again");
                moves(&self.node, self.home.patience).await?;
                self.home.reconnect(&lost).await
            };
            let session = tokio::select! {
                biased;
                _ = &mut self.ended => {
                    let farewell = self.farewell.get().cloned();
                    return WorkerError(farewell.unwrap_or_else(|| "the node stopped".to_owned()));
                }
                session = again => session,
            };
            match session {
                Ok(session) => {
                    let before = std::mem::replace(&mut self.session, session);
                    if let Some(control) = before.control {
                        control.stop();
                    }
                    info!(worker = %self.name, "the coordinator is back");
                }
                Err(error) => return error,
            }
        }
    }

    /// Leaves the cluster.
    pub async fn stop(self) {
        self.links.stop();
        let _ = self.node.stop_and_wait(None, None).await;
        if let Some(control) = &self.session.control {
            control.stop();
        }
        self.home.endpoint.close("the worker stops").await;
    }
}

/// Waits until a node makes progress, if it has something to do: one that is stuck would take a
/// share that it cannot serve.
async fn moves(node: &ActorRef<NodeMessage>, patience: Duration) -> Result<(), WorkerError> {
    let deadline = tokio::time::Instant::now() + patience;
    let mut before = None;
    while tokio::time::Instant::now() < deadline {
        let vitals = ractor::call_t!(node, NodeMessage::Vitals, MOVES_WITHIN_MS);
        let Some(vitals) = vitals.ok().and_then(|vitals| vitals.into_inner().ok()) else {
            // It has stopped, which is noticed elsewhere.
            return Ok(());
        };
        if !vitals.busy || before.is_some_and(|before| before != vitals.progress) {
            return Ok(());
        }
        before = Some(vitals.progress);
        tokio::time::sleep(Duration::from_millis(MOVES_WITHIN_MS)).await;
    }
    Err(WorkerError(format!(
        "its compute thread has made no progress for {patience:?} (--patience): start it again"
    )))
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
