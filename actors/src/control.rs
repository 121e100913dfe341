//! The control plane: ractor_cluster over a stream of our own QUIC connection.
//!
//! ractor_cluster always opens a TCP listener of its own. It is bound to loopback on a port that
//! nobody is told, and behind TLS that demands a certificate of the cluster: nothing plain is
//! ever spoken, and nobody uses it.
//!
//! All workers know the cookie, and ractor_cluster believes any name and shows any number of actors:
//! what a worker says to a coordinator is vetted first (`vetted.rs`).

mod vetted;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use self::vetted::Vetted;
use lite_llm_transport::{
    connection::{RawReceiver, RawSender},
    identity::Identity,
};
use ractor::{Actor, ActorRef};
use ractor_cluster::{
    BoxRead, BoxWrite, ClusterBidiStream, IncomingEncryptionMode, NodeServer, NodeServerMessage,
    node::NodeConnectionMode,
};

/// Longest message of the control plane, in bytes: an assignment of a large model.
pub const CONTROL_BYTES_MAX: u64 = 16 << 20;

/// How long the list of sessions may take: it is in this process.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(5);

/// A QUIC stream as ractor_cluster takes it.
struct ControlStream {
    sender: RawSender,
    receiver: RawReceiver,
    peer: String,
    /// The peer opened it, and may say only what a node has to.
    accepted: bool,
}

impl ClusterBidiStream for ControlStream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        let Self { sender, receiver, peer, accepted } = *self;
        match accepted {
            true => (Box::new(Vetted::new(receiver, peer)), Box::new(sender)),
            false => (Box::new(receiver), Box::new(sender)),
        }
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.peer.clone())
    }
}

/// This process's end of the control plane.
#[derive(Clone)]
pub struct ControlPlane {
    server: ActorRef<NodeServerMessage>,
}

/// The control plane could not be started.
#[derive(Debug, thiserror::Error)]
#[error("could not start the control plane of {name}: {reason}")]
pub struct ControlError {
    name: String,
    reason: String,
}

impl ControlPlane {
    /// Starts it. `cookie` is a secret that all members of the cluster share.
    pub async fn start(identity: &Identity, cookie: &str) -> Result<Self, ControlError> {
        // Of two sessions with one name ractor_cluster ends one, and not always the dead one: a member
        // that comes back has another name.
        let name = format!("{} {}", identity.who(), unique());
        let failed = |reason: String| ControlError { name: name.clone(), reason };
        let tls = identity.tcp_server_config().map_err(|error| failed(error.to_string()))?;
        let server = NodeServer::new(
            0,
            cookie.to_owned(),
            name.clone(),
            // ractor_cluster tells nodes apart by host: each of ours counts as a host.
            name.clone(),
            Some(IncomingEncryptionMode::Tls(tls.into())),
            Some(NodeConnectionMode::Isolated),
        )
        .with_listen_addr(IpAddr::V4(Ipv4Addr::LOCALHOST))
        .with_max_inbound_frame_size(CONTROL_BYTES_MAX);
        let (server, _) =
            Actor::spawn(None, server, ()).await.map_err(|error| failed(error.to_string()))?;
        Ok(Self { server })
    }

    /// Speaks with a peer over an open stream; `accepted` if the peer opened it.
    pub fn connect(&self, peer: &str, stream: (RawSender, RawReceiver), accepted: bool) {
        let (sender, receiver) = stream;
        let peer = peer.to_owned();
        let stream = Box::new(ControlStream { sender, receiver, peer, accepted });
        let message = NodeServerMessage::ConnectionOpenedExternal { stream, is_server: accepted };
        // Its server stops only with the process.
        let _ = self.server.cast(message);
    }

    /// Whose connection a session came through, as its certificate says.
    pub async fn peer_of(&self, session: u64) -> Option<String> {
        let timeout = SESSIONS_TIMEOUT.as_millis() as u64;
        let sessions =
            ractor::call_t!(self.server, NodeServerMessage::GetSessions, timeout).ok()?;
        sessions.into_values().find(|known| known.node_id == session).map(|known| known.peer_addr)
    }

    /// Ends it.
    pub fn stop(&self) {
        self.server.stop(None);
    }
}

/// A word that no other start of a control plane has.
fn unique() -> String {
    static STARTS: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (nanos, starts) = (since.as_nanos(), STARTS.fetch_add(1, Relaxed));
    format!("{:x}-{nanos:x}-{starts:x}", std::process::id())
}
