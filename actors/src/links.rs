//! A node's connections to the other nodes, and the tasks that carry frames over them.
//!
//! Each ordered pair of nodes has one long-lived stream: batches go out on it, answers come back.
//! Of two nodes the one with the higher index dials. Everything a task cannot deliver ends the
//! connection, and a connection that ends is told to the lane at once.
//!
//! Invariants: every queue has a bound; a task never waits for a lane longer than
//! [`INBOX_TIMEOUT`]; nothing here looks at numbers.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Sender, TrySendError};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect},
    frame::{FrameError, FrameReceiver, FrameSender, OutgoingFrame},
    identity::Role,
    messages::{ExpertBatchView, ExpertFailure, ExpertReplyView, NodeAddress},
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tracing::{debug, warn};

use crate::lane::{LaneEvent, LaneInbox, OUTBOX_MAX, Peer};

/// How long all nodes of an epoch may take to connect to each other.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a lane may take to make room in its inbox.
pub const INBOX_TIMEOUT: Duration = Duration::from_secs(20);

/// The connections of one node to others.
pub struct Links {
    endpoint: Endpoint,
    inbox: LaneInbox,
    connections: Mutex<HashMap<String, Connection>>,
    changed: Notify,
}

/// Peers whose streams are open but do not yet lead into a lane.
pub struct LinkedPeers {
    streams: Vec<Option<(String, FrameSender, FrameReceiver)>>,
}

impl Links {
    /// Connections over an endpoint; what peers ask for goes to the lane of `inbox`.
    pub fn new(endpoint: Endpoint, inbox: LaneInbox) -> Arc<Self> {
        Arc::new(Self { endpoint, inbox, connections: Mutex::default(), changed: Notify::new() })
    }

    /// Takes in connections of other nodes until the endpoint is closed.
    pub async fn accept(self: Arc<Self>) {
        while let Some(connection) = self.endpoint.accept().await {
            // The coordinator is dialed, and clients have no business here.
            if connection.peer().role == Role::Worker {
                self.clone().keep(connection);
            }
        }
    }

    fn keep(self: Arc<Self>, connection: Connection) {
        let name = connection.peer().name.clone();
        debug!(peer = %connection.peer(), "connected");
        self.connections.lock().insert(name, connection.clone());
        self.changed.notify_waiters();
        tokio::spawn(async move { self.serve(connection).await });
    }

    /// Answers the streams that a peer opens, until its connection ends.
    async fn serve(&self, connection: Connection) {
        while let Some(stream) = connection.accept_stream().await {
            if stream.kind != StreamKind::Experts {
                continue;
            }
            let (sender, receiver) = stream.into_frames();
            tokio::spawn(serve_batches(sender, receiver, connection.clone(), self.inbox.clone()));
        }
        let mut connections = self.connections.lock();
        let name = &connection.peer().name;
        if connections.get(name).is_some_and(|kept| kept.is_same(&connection)) {
            connections.remove(name);
        }
    }

    /// Connects to all other nodes of an epoch and opens a stream to each.
    pub async fn connect(
        self: &Arc<Self>,
        nodes: &[NodeAddress],
        me: u16,
    ) -> Result<LinkedPeers, String> {
        let deadline = tokio::time::Instant::now() + LINK_TIMEOUT;
        let mut streams = Vec::with_capacity(nodes.len());
        for (index, node) in nodes.iter().enumerate() {
            if index == usize::from(me) {
                streams.push(None);
                continue;
            }
            let connection = if index < usize::from(me) {
                self.dial(node).await
            } else {
                tokio::time::timeout_at(deadline, self.dialed_by(node)).await.map_err(|_| {
                    let (name, address) = (&node.name, &node.address);
                    format!("worker {name} ({address}) did not connect within {LINK_TIMEOUT:?}")
                })
            }?;
            let (sender, receiver) = connection
                .open_stream(StreamKind::Experts)
                .await
                .map_err(|error| error.to_string())?;
            streams.push(Some((node.name.clone(), sender, receiver)));
        }
        Ok(LinkedPeers { streams })
    }

    async fn dial(self: &Arc<Self>, node: &NodeAddress) -> Result<Connection, String> {
        if let Some(connection) = self.live(node) {
            return Ok(connection);
        }
        let address: SocketAddr = node.address.parse().map_err(|_| {
            format!(
                "worker {} says that it listens on {:?}; host:port is expected",
                node.name, node.address
            )
        })?;
        let connection = self
            .endpoint
            .connect(address, &Expect::worker(&node.name))
            .await
            .map_err(|error| error.to_string())?;
        self.clone().keep(connection.clone());
        Ok(connection)
    }

    /// The connection to this very node, if it stands: one of the same name that died and was
    /// started again listens on another port.
    fn live(&self, node: &NodeAddress) -> Option<Connection> {
        let port = node.address.parse::<SocketAddr>().ok()?.port();
        let kept = self.connections.lock().get(&node.name).cloned()?;
        (kept.close_reason().is_none() && kept.address().port() == port).then_some(kept)
    }

    async fn dialed_by(&self, node: &NodeAddress) -> Connection {
        loop {
            let changed = self.changed.notified();
            if let Some(connection) = self.live(node) {
                return connection;
            }
            changed.await;
        }
    }
}

impl LinkedPeers {
    /// The peers as a lane takes them, and what is left to start once the lane is there.
    pub fn into_peers(self) -> (Vec<Option<Peer>>, PendingReaders) {
        let (mut peers, mut pending) = (Vec::new(), Vec::new());
        for (index, stream) in self.streams.into_iter().enumerate() {
            peers.push(stream.map(|(name, sender, receiver)| {
                let (outbox, frames) = mpsc::channel(OUTBOX_MAX);
                pending.push((index as u16, sender, receiver, frames));
                Peer { name, outbox }
            }));
        }
        (peers, PendingReaders { pending })
    }
}

type PendingReader = (u16, FrameSender, FrameReceiver, mpsc::Receiver<OutgoingFrame>);

/// Streams to peers whose tasks have not begun.
pub struct PendingReaders {
    pending: Vec<PendingReader>,
}

impl PendingReaders {
    /// Starts the tasks; they end with the lane or with the connection.
    pub fn start(self, lane: &Sender<LaneEvent>) {
        for (peer, mut sender, receiver, mut frames) in self.pending {
            let lost = lane.clone();
            tokio::spawn(async move {
                while let Some(frame) = frames.recv().await {
                    if let Err(error) = sender.send(frame).await {
                        let reason = how(error);
                        deliver(&lost, LaneEvent::PeerLost { peer, reason }).await;
                        return;
                    }
                }
            });
            tokio::spawn(read_replies(peer, receiver, lane.clone()));
        }
    }
}

/// How a stream was lost, without saying again with whom.
fn how(error: FrameError) -> String {
    match error {
        FrameError::Lost { reason, .. } => reason,
        other => other.to_string(),
    }
}

async fn read_replies(peer: u16, mut receiver: FrameReceiver, lane: Sender<LaneEvent>) {
    let reason = loop {
        let reply = match receiver.recv().await {
            Ok(Some(frame)) => ExpertReplyView::check(&frame),
            Ok(None) => break "it closed its stream".to_owned(),
            Err(error) => break how(error),
        };
        match reply {
            Ok(reply) => {
                if !deliver(&lane, LaneEvent::Reply { peer, reply }).await {
                    return;
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    deliver(&lane, LaneEvent::PeerLost { peer, reason }).await;
}

/// Brings a peer's batches to the lane and the answers back.
async fn serve_batches(
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
    connection: Connection,
    inbox: LaneInbox,
) {
    let (reply, mut replies) = mpsc::channel::<OutgoingFrame>(OUTBOX_MAX);
    let writer = connection.clone();
    tokio::spawn(async move {
        while let Some(frame) = replies.recv().await {
            if let Err(error) = sender.send(frame).await {
                debug!(peer = %writer.peer(), %error, "a reply was not sent");
                writer.close("a reply could not be sent");
                return;
            }
        }
    });
    loop {
        let frame = match receiver.recv().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                debug!(peer = %connection.peer(), %error, "a stream of batches ended");
                return;
            }
        };
        let view = match ExpertBatchView::check(&frame) {
            Ok(view) => view,
            Err(error) => {
                warn!(peer = %connection.peer(), %error, "closing a connection");
                connection.close(&error.to_string());
                return;
            }
        };
        let id = view.head().id;
        let event = LaneEvent::Batch { view, reply: reply.clone() };
        let taken = match inbox.load_full() {
            Some(lane) => deliver(&lane, event).await,
            None => false,
        };
        if !taken {
            let failure = ExpertFailure::new(id, "it has no experts loaded at present");
            if let Ok(frame) = OutgoingFrame::message(&failure) {
                // The writer is gone only if the peer is.
                let _ = reply.send(frame).await;
            }
        }
    }
}

/// Puts an event into a lane's inbox. False if the lane is gone or takes nothing.
pub async fn deliver(lane: &Sender<LaneEvent>, mut event: LaneEvent) -> bool {
    let deadline = Instant::now() + INBOX_TIMEOUT;
    loop {
        match lane.try_send(event) {
            Ok(()) => return true,
            Err(TrySendError::Disconnected(_)) => return false,
            Err(TrySendError::Full(_)) if Instant::now() >= deadline => return false,
            Err(TrySendError::Full(back)) => event = back,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
