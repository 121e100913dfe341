//! One UDP socket: where connections come from, and where they lead.
//!
//! Invariants: a connection is handed out only when both sides know each other by certificates of
//! the cluster that are not revoked, and have introduced themselves; who comes in is decided by
//! `admission`. Nothing listens but where it was told to.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{ConnectionError, crypto::rustls::QuicClientConfig};
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::timeout,
};

use crate::{
    admission::{Admission, Desk, accept, certified},
    connection::{
        CLOSE_DONE, CLOSE_REFUSED, CLOSE_REVOKED, Connection, busy_in, describe, greet, is_revoked,
        is_silence,
    },
    identity::{ClusterCa, Identity, PeerIdentity, Role},
    messages::Revoked,
    patience::{BUSY_PATIENCE, Hint, Patience},
    peers::Peers,
    pool::BufferPool,
    refusals::Refusals,
    revocation::RevokedList,
    session::{Hello, Session, SessionError},
    socket::{client_config, local_address_for, open, server_config, welcome},
    tls,
};
pub use crate::{
    door::{CONNECTIONS_MAX, HANDSHAKES_MAX, JOINS_MAX, PER_SOURCE_MAX},
    refusals::Refusal,
    socket::{CONNECTION_WINDOW_BYTES, KEEP_ALIVE_INTERVAL, STREAM_WINDOW_BYTES},
    tls::BindError,
};

/// How long one try to connect may take, from its first packet to the end of the handshake.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// Connections that wait to be accepted.
const WAITING_MAX: usize = 64;
/// How long closing may take. Peers are told at once; the rest of the wait answers what they still
/// send, and a handshake with nobody would have QUIC wait for seconds.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(300);
const NO_NAME: &str = "its certificate names no node of a cluster";

/// A peer that could not be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody there.
    #[error(
        "could not connect to {peer} at {address}: {reason}; is it running, and is the address \
         right?"
    )]
    Silent {
        /// Whom we want.
        peer: String,
        /// Where.
        address: SocketAddr,
        /// For how long nothing came.
        reason: String,
    },
    /// Not whom we want, or it does not want us.
    #[error("could not connect to {peer} at {address}: {reason}")]
    Failed {
        /// Whom we want.
        peer: String,
        /// Where.
        address: SocketAddr,
        /// Why not.
        reason: String,
    },
    /// Somebody else there.
    #[error("{found} answered at {address}, where {peer} is expected")]
    Other {
        /// Whom we want.
        peer: String,
        /// Where.
        address: SocketAddr,
        /// Who answered.
        found: PeerIdentity,
    },
    /// No place for another connection at present.
    #[error(
        "{peer} at {address} is busy and had no place for another connection, try after try; try \
         again later"
    )]
    Busy {
        /// Whom we want.
        peer: String,
        /// Where.
        address: SocketAddr,
        /// When to come again, if it was told.
        retry_after: Option<Duration>,
    },
    /// The certificate of one side was revoked: trying again is of no use.
    #[error("could not connect to {peer} at {address}: {reason}")]
    Revoked {
        /// Whom we want.
        peer: String,
        /// Where.
        address: SocketAddr,
        /// Whose, and what to do.
        reason: String,
    },
    /// Another release.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl ConnectError {
    fn hint(&self) -> Hint {
        match self {
            ConnectError::Busy { retry_after, .. } => Hint::Busy(*retry_after),
            ConnectError::Silent { .. } => Hint::Silence,
            ConnectError::Session(SessionError::TimedOut { .. }) => Hint::Silence,
            _ => Hint::Final,
        }
    }
}

/// Whom we want to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// Whoever has this role.
    Role(Role),
    /// This one.
    Peer(PeerIdentity),
}

impl Expect {
    /// The worker of this name.
    pub fn worker(name: impl Into<String>) -> Self {
        Expect::Peer(PeerIdentity { name: name.into(), role: Role::Worker })
    }

    /// The coordinator, whatever its name.
    pub fn coordinator() -> Self {
        Expect::Role(Role::Coordinator)
    }

    fn domain(&self) -> String {
        match self {
            Expect::Role(role) => role.domain(),
            Expect::Peer(peer) => peer.domain(),
        }
    }

    fn fits(&self, found: &PeerIdentity) -> bool {
        match self {
            Expect::Role(role) => *role == found.role,
            Expect::Peer(peer) => peer == found,
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expect::Role(role) => write!(f, "a {role}"),
            Expect::Peer(peer) => write!(f, "{peer}"),
        }
    }
}

/// What an endpoint is given besides its address and identity.
#[derive(Debug, Clone)]
pub struct Options {
    /// How this process introduces itself.
    pub hello: Hello,
    /// Where frames live.
    pub pool: BufferPool,
}

impl Options {
    /// A pool of its own, and this introduction.
    pub fn new(hello: Hello) -> Self {
        Self { hello, pool: BufferPool::default() }
    }
}

/// A UDP socket and its connections. Clones share it; it closes with the last one.
#[derive(Clone)]
pub struct Endpoint {
    inner: Arc<Inner>,
}

struct Inner {
    quic: quinn::Endpoint,
    who: PeerIdentity,
    tls: Arc<QuicClientConfig>,
    options: Options,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    refusals: Mutex<mpsc::Receiver<Refusal>>,
    peers: Arc<Peers>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.quic.close(CLOSE_DONE, b"the process ends");
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({} at {:?})", self.inner.who, self.inner.quic.local_addr())
    }
}

impl Endpoint {
    /// Listens on an address, as a member of the cluster. A client listens to nobody.
    pub fn bind(
        address: SocketAddr,
        identity: &Identity,
        options: Options,
    ) -> Result<Self, BindError> {
        Self::start(address, identity, None, options)
    }

    /// Listens as the coordinator, which also lets holders of its tokens join, and watches who is
    /// revoked.
    pub fn bind_coordinator(
        address: SocketAddr,
        identity: &Identity,
        ca: Arc<ClusterCa>,
        options: Options,
    ) -> Result<Self, BindError> {
        Self::start(address, identity, Some(ca), options)
    }

    /// An endpoint that only connects, on a free port of the interface that leads to `toward`.
    pub fn outgoing(
        toward: SocketAddr,
        identity: &Identity,
        options: Options,
    ) -> Result<Self, BindError> {
        Self::start(local_address_for(toward), identity, None, options)
    }

    fn start(
        address: SocketAddr,
        identity: &Identity,
        ca: Option<Arc<ClusterCa>>,
        options: Options,
    ) -> Result<Self, BindError> {
        let who = identity.who().clone();
        let quic = open(address)?;
        let (accepted_in, accepted) = mpsc::channel(WAITING_MAX);
        let (refused, refusals) = Refusals::new();
        let peers = Peers::new();
        if let Some(ca) = &ca {
            peers.refresh(ca);
        }
        if who.role != Role::Client {
            let admission = Admission {
                loopback: server_config(tls::server(identity, ca.is_some())?, true),
                network: server_config(tls::server(identity, ca.is_some())?, false),
                who: who.clone(),
                ca,
                options: options.clone(),
                peers: peers.clone(),
                refusals: refused,
                desk: Arc::new(Desk::default()),
            };
            quic.set_server_config(Some(admission.network.as_ref().clone()));
            tokio::spawn(accept(quic.clone(), Arc::new(admission), accepted_in));
        }
        let tls = tls::client(identity)?;
        let (accepted, refusals) = (Mutex::new(accepted), Mutex::new(refusals));
        Ok(Self { inner: Arc::new(Inner { quic, who, tls, options, accepted, refusals, peers }) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.quic.local_addr()
    }

    /// Name and role that it shows.
    pub fn who(&self) -> &PeerIdentity {
        &self.inner.who
    }

    /// The buffers of its frames.
    pub fn pool(&self) -> &BufferPool {
        &self.inner.options.pool
    }

    /// Connects to a peer, and verifies that it is the one that is expected. Told that there is no
    /// room, it tries again for [`BUSY_PATIENCE`].
    pub async fn connect(
        &self,
        address: SocketAddr,
        expect: &Expect,
    ) -> Result<Connection, ConnectError> {
        let now = tokio::time::Instant::now().into_std();
        self.connect_with(Patience::with_the_busy(now, BUSY_PATIENCE), address, expect).await
    }

    /// Like [`Self::connect`], to somebody who has answered lately: silence is tried again, too, until
    /// patience ends, after which no further try is begun.
    pub async fn connect_within(
        &self,
        patience: Duration,
        address: SocketAddr,
        expect: &Expect,
    ) -> Result<Connection, ConnectError> {
        let now = tokio::time::Instant::now().into_std();
        self.connect_with(Patience::new(now, patience).known(), address, expect).await
    }

    async fn connect_with(
        &self,
        mut patience: Patience,
        address: SocketAddr,
        expect: &Expect,
    ) -> Result<Connection, ConnectError> {
        loop {
            match self.connect_once(address, expect).await {
                Err(error) if patience.try_again(error.hint()).await => {}
                ended => return ended,
            }
        }
    }

    async fn connect_once(
        &self,
        address: SocketAddr,
        expect: &Expect,
    ) -> Result<Connection, ConnectError> {
        let failed = |reason| ConnectError::Failed { peer: expect.to_string(), address, reason };
        let silent = |reason| ConnectError::Silent { peer: expect.to_string(), address, reason };
        let revoked = |reason| ConnectError::Revoked { peer: expect.to_string(), address, reason };
        let ended = |error: &ConnectionError| match (busy_in(error), error) {
            (Some(full), _) => {
                let (peer, retry_after) = (expect.to_string(), full.retry_after);
                Some(ConnectError::Busy { peer, address, retry_after })
            }
            _ if is_silence(error) => Some(silent(describe(error))),
            _ => is_revoked(error).then(|| revoked(describe(error))),
        };
        let config = client_config(self.inner.tls.clone(), address);
        let connecting = async {
            let connecting = self
                .inner
                .quic
                .connect_with(config, address, &expect.domain())
                .map_err(|error| failed(error.to_string()))?;
            let quic = connecting
                .await
                .map_err(|error| ended(&error).unwrap_or_else(|| failed(describe(&error))))?;
            let (found, certificate) =
                certified(&quic).ok_or_else(|| failed(NO_NAME.to_owned()))?;
            if !expect.fits(&found) {
                quic.close(CLOSE_REFUSED, b"another peer is expected here");
                return Err(ConnectError::Other { peer: expect.to_string(), address, found });
            }
            let Inner { who, options, peers, .. } = &*self.inner;
            if let Some(reason) = peers.refuses(&found, &certificate) {
                quic.close(CLOSE_REVOKED, reason.as_bytes());
                return Err(revoked(reason));
            }
            welcome(&quic, found.role);
            let computes = ![who.role, found.role].contains(&Role::Client);
            let session = Session::new(who.role, &found, options.hello.clone());
            let session = session.computing(computes);
            let hello = greet(&quic, true, session).await.map_err(|error| {
                let told = quic.close_reason().and_then(|reason| ended(&reason));
                told.unwrap_or_else(|| error.into())
            })?;
            let (us, pool) = (who.clone(), options.pool.clone());
            let connection = Connection::new(quic, us, (found, certificate), hello, pool);
            peers.keep(&connection).map_err(revoked)?;
            Ok(connection)
        };
        timeout(CONNECT_TIMEOUT, connecting)
            .await
            .unwrap_or_else(|_| Err(silent(format!("no answer within {CONNECT_TIMEOUT:?}"))))
    }

    /// Replaces the list of revoked names: peers whose certificates it refuses get no connection,
    /// and lose the one they have. A coordinator's endpoint does this by itself, by its folder.
    pub fn set_revoked(&self, names: Vec<Revoked>) {
        self.inner.peers.set(Arc::new(RevokedList::new(names)));
    }

    /// The list of revoked names, whenever it changes: for a coordinator, to pass it on to workers.
    pub fn watch_revoked(&self) -> watch::Receiver<Vec<Revoked>> {
        self.inner.peers.watch()
    }

    /// The next peer that connected, or `None` when the endpoint is closed.
    pub async fn accept(&self) -> Option<Connection> {
        self.inner.accepted.lock().await.recv().await
    }

    /// The next peer that was refused, or `None` when the endpoint is closed. The oldest are
    /// kept if nobody looks.
    pub async fn next_refusal(&self) -> Option<Refusal> {
        self.inner.refusals.lock().await.recv().await
    }

    /// Closes all connections and waits, briefly, until the peers know.
    pub async fn close(&self, reason: &str) {
        self.inner.quic.close(CLOSE_DONE, reason.as_bytes());
        let _ = timeout(CLOSE_TIMEOUT, self.inner.quic.wait_idle()).await;
    }
}
