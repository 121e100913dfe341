//! One UDP socket: where connections come from, and who may have one.
//!
//! Invariants: a connection is handed out only after mutual TLS within the cluster and the
//! handshake of [`crate::session`]; everything else ends before any stream is read by anybody,
//! and is reported by [`Endpoint::next_refusal`]. One slow handshake holds up no other, and their
//! number is bounded. Nothing listens but where it was told to.
//!
//! Two ways of driving QUIC: on loopback, datagrams as large as the kernel takes and no
//! segmentation offload (which would send ten at once); elsewhere discovery of the path's limit,
//! with offload.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{
    ClientConfig, ConnectionError, EndpointConfig, Incoming, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
};
use rustls_pki_types::CertificateDer;
use tokio::{
    sync::{Mutex, Semaphore, mpsc},
    time::timeout,
};

pub use crate::tls::BindError;
use crate::{
    connection::{CLOSE_DONE, CLOSE_REFUSED, Connection, IDLE_TIMEOUT, describe, greet},
    identity::{ClusterCa, Identity, PeerIdentity, Role},
    join::{self, JOIN_TIMEOUT},
    pool::BufferPool,
    session::{Hello, Session, SessionError},
    tls,
};

/// How often an idle connection says that it lives.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a connection may take from its first packet to the end of the handshake.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// Streams that one peer may have open.
pub const STREAMS_MAX: u32 = 1024;
/// Bytes that one peer may send ahead on one stream.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// Bytes that one peer may send ahead on all its streams.
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Connections of one endpoint.
pub const CONNECTIONS_MAX: usize = 1024;
/// Handshakes of one endpoint at the same time.
pub const HANDSHAKES_MAX: usize = 64;

/// Connections that wait to be accepted, and refusals that wait to be looked at.
const WAITING_MAX: usize = 64;
/// Congestion window of a new connection: within a machine or a rack nothing is gained by probing.
const INITIAL_WINDOW_BYTES: u64 = 16 << 20;
/// Largest datagram that is taken from a peer.
const DATAGRAM_BYTES_MAX: u16 = 65_500;
/// Largest datagram over loopback; a larger start than this one aborts inside quinn.
const LOOPBACK_MTU_START: u16 = 16_000;
const LOOPBACK_MTU_MAX: u16 = 65_400;
/// Largest datagram on a network with jumbo frames.
const NETWORK_MTU_MAX: u16 = 8_952;
/// Bytes that a socket is asked to hold in the kernel, either way: a burst of large datagrams
/// overflows the default, and each loss costs a round of recovery. The kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 16 << 20;
/// What a peer on this machine may send ahead in any case.
const LOOPBACK_WINDOW_BYTES_MIN: u32 = 256 << 10;
/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A peer that could not be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody there, or not whom we want.
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
    /// Another release.
    #[error(transparent)]
    Session(#[from] SessionError),
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

/// Somebody who did not get a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Where it came from.
    pub address: SocketAddr,
    /// Why it was refused.
    pub reason: String,
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

    /// Listens as the coordinator, which also lets holders of the token join.
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
        let (refusals_in, refusals) = mpsc::channel(WAITING_MAX);
        if who.role != Role::Client {
            let admission = Admission {
                loopback: server_config(tls::server(identity, ca.is_some())?, true),
                network: server_config(tls::server(identity, ca.is_some())?, false),
                who: who.clone(),
                ca,
                options: options.clone(),
            };
            quic.set_server_config(Some(admission.network.as_ref().clone()));
            tokio::spawn(accept(quic.clone(), Arc::new(admission), accepted_in, refusals_in));
        }
        let tls = tls::client(identity)?;
        let (accepted, refusals) = (Mutex::new(accepted), Mutex::new(refusals));
        Ok(Self { inner: Arc::new(Inner { quic, who, tls, options, accepted, refusals }) })
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

    /// Connects to a peer, and verifies that it is the one that is expected.
    pub async fn connect(
        &self,
        address: SocketAddr,
        expect: &Expect,
    ) -> Result<Connection, ConnectError> {
        let failed = |reason| ConnectError::Failed { peer: expect.to_string(), address, reason };
        let config = client_config(self.inner.tls.clone(), address);
        let connecting = async {
            let connecting = self
                .inner
                .quic
                .connect_with(config, address, &expect.domain())
                .map_err(|error| failed(error.to_string()))?;
            let quic = connecting.await.map_err(|error| match error {
                ConnectionError::TimedOut => failed(format!(
                    "nothing answered for {IDLE_TIMEOUT:?}; is it running, and is the address right?"
                )),
                error => failed(describe(&error)),
            })?;
            let found = identity_of(&quic).ok_or_else(|| failed(NO_NAME.to_owned()))?;
            if !expect.fits(&found) {
                quic.close(CLOSE_REFUSED, b"another peer is expected here");
                return Err(ConnectError::Other { peer: expect.to_string(), address, found });
            }
            let Inner { who, options, .. } = &*self.inner;
            let session = Session::new(who.role, &found, options.hello.clone());
            let hello = greet(&quic, true, session).await?;
            Ok(Connection::new(quic, who.clone(), found, hello, options.pool.clone()))
        };
        timeout(CONNECT_TIMEOUT, connecting)
            .await
            .unwrap_or_else(|_| Err(failed(format!("no answer within {CONNECT_TIMEOUT:?}"))))
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

const NO_NAME: &str = "its certificate names no node of a cluster";

/// Who gets in.
struct Admission {
    loopback: Arc<ServerConfig>,
    network: Arc<ServerConfig>,
    who: PeerIdentity,
    ca: Option<Arc<ClusterCa>>,
    options: Options,
}

/// Takes connections, each handshake in a task of its own.
async fn accept(
    quic: quinn::Endpoint,
    admission: Arc<Admission>,
    accepted: mpsc::Sender<Connection>,
    refusals: mpsc::Sender<Refusal>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    while let Some(incoming) = quic.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        if quic.open_connections() > CONNECTIONS_MAX {
            incoming.refuse();
            continue;
        }
        let crowded = handshakes.available_permits() < HANDSHAKES_MAX / 2;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            // Whoever invents its address ends here.
            let _ = incoming.retry();
            continue;
        }
        let (admission, accepted, refusals) =
            (admission.clone(), accepted.clone(), refusals.clone());
        tokio::spawn(async move {
            let address = incoming.remote_address();
            match admission.admit(incoming).await {
                Ok(Some(connection)) => {
                    drop(permit);
                    drop(accepted.send(connection).await);
                }
                Ok(None) => {}
                Err(reason) => {
                    tracing::warn!(%address, %reason, "refused a connection");
                    drop(refusals.try_send(Refusal { address, reason }));
                }
            }
        });
    }
}

impl Admission {
    /// A member's connection; nothing for a joiner that was served; why not for anybody else.
    async fn admit(&self, incoming: Incoming) -> Result<Option<Connection>, String> {
        let loopback = incoming.remote_address().ip().is_loopback();
        let config = if loopback { &self.loopback } else { &self.network };
        let handshake = async {
            let connecting = incoming.accept_with(config.clone()).map_err(|e| describe(&e))?;
            connecting.await.map_err(|error| describe(&error))
        };
        let quic = timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| format!("its TLS handshake took more than {CONNECT_TIMEOUT:?}"))??;
        let refuse = |reason: String| {
            quic.close(CLOSE_REFUSED, reason.as_bytes());
            Err(reason)
        };
        match (protocol_of(&quic).as_deref(), identity_of(&quic), &self.ca) {
            (Some(tls::ALPN_JOIN), _, Some(ca)) => {
                let serving = join::serve(&quic, ca, &self.options.hello);
                match timeout(JOIN_TIMEOUT, serving).await {
                    Ok(Ok(who)) => {
                        tracing::info!(%who, address = %quic.remote_address(), "joined");
                        Ok(None)
                    }
                    Ok(Err(reason)) => refuse(reason),
                    Err(_) => refuse(format!("joining took more than {JOIN_TIMEOUT:?}")),
                }
            }
            (Some(tls::ALPN_MEMBER), Some(peer), _) => {
                let session = Session::new(self.who.role, &peer, self.options.hello.clone());
                let hello = greet(&quic, false, session).await.map_err(|e| e.to_string())?;
                let (us, pool) = (self.who.clone(), self.options.pool.clone());
                Ok(Some(Connection::new(quic, us, peer, hello, pool)))
            }
            (Some(tls::ALPN_MEMBER), None, _) => {
                refuse("it shows no certificate of this cluster; join it with its token".to_owned())
            }
            (protocol, ..) => {
                let name = String::from_utf8_lossy(protocol.unwrap_or_default()).into_owned();
                refuse(format!("it speaks {name:?}, which is not served here"))
            }
        }
    }
}

fn protocol_of(quic: &quinn::Connection) -> Option<Vec<u8>> {
    quic.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

fn identity_of(quic: &quinn::Connection) -> Option<PeerIdentity> {
    let chain = quic.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    PeerIdentity::from_chain(&chain)
}

/// A socket that only connects.
pub(crate) fn outgoing(toward: SocketAddr) -> Result<quinn::Endpoint, BindError> {
    open(local_address_for(toward))
}

fn local_address_for(toward: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match (toward, toward.ip().is_loopback()) {
        (SocketAddr::V4(_), true) => Ipv4Addr::LOCALHOST.into(),
        (SocketAddr::V4(_), false) => Ipv4Addr::UNSPECIFIED.into(),
        (SocketAddr::V6(_), true) => Ipv6Addr::LOCALHOST.into(),
        (SocketAddr::V6(_), false) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}

fn open(address: SocketAddr) -> Result<quinn::Endpoint, BindError> {
    let failed = |source| BindError::Socket { address, source };
    let socket = UdpSocket::bind(address).map_err(failed)?;
    let options = socket2::SockRef::from(&socket);
    // What is not granted is lived without.
    let _ = options.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = options.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(DATAGRAM_BYTES_MAX).expect("within QUIC's bounds");
    quinn::Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime)).map_err(failed)
}

pub(crate) fn client_config(tls: Arc<QuicClientConfig>, toward: SocketAddr) -> ClientConfig {
    let mut config = ClientConfig::new(tls);
    config.transport_config(Arc::new(transport(toward.ip().is_loopback())));
    config
}

fn server_config(tls: Arc<QuicServerConfig>, loopback: bool) -> Arc<ServerConfig> {
    let mut config = ServerConfig::with_crypto(tls);
    config.transport_config(Arc::new(transport(loopback)));
    // Nodes do not wander: a packet from elsewhere is not theirs.
    config.migration(false);
    Arc::new(config)
}

/// How far a peer on this machine may send ahead: no further than half of what the kernel holds
/// for a socket, since what overflows it is lost, and a round trip is short.
fn loopback_window() -> (u32, u32) {
    let granted = (|| {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        let options = socket2::SockRef::from(&socket);
        options.set_recv_buffer_size(SOCKET_BUFFER_BYTES).ok()?;
        u32::try_from(options.recv_buffer_size().ok()?).ok()
    })();
    let window = (granted.unwrap_or(0) / 2).clamp(LOOPBACK_WINDOW_BYTES_MIN, STREAM_WINDOW_BYTES);
    // One stream that nobody reads must not hold up the others.
    (window, CONNECTION_WINDOW_BYTES / STREAM_WINDOW_BYTES * window)
}

fn transport(loopback: bool) -> TransportConfig {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_BYTES);
    let mut discovery = MtuDiscoveryConfig::default();
    let mut config = TransportConfig::default();
    let mut window = (STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES);
    if loopback {
        discovery.upper_bound(LOOPBACK_MTU_MAX);
        config.initial_mtu(LOOPBACK_MTU_START).enable_segmentation_offload(false);
        window = loopback_window();
    } else {
        discovery.upper_bound(NETWORK_MTU_MAX);
    }
    config
        .mtu_discovery_config(Some(discovery))
        .congestion_controller_factory(Arc::new(cubic))
        .stream_receive_window(VarInt::from_u32(window.0))
        .receive_window(VarInt::from_u32(window.1))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE_INTERVAL))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("two seconds fit QUIC's field")));
    config
}
