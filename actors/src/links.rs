//! A node's connections to the other nodes, and the tasks that carry frames over them.
//!
//! Each ordered pair of nodes has one long-lived stream: batches go out on it, answers come back.
//! Of two nodes the one with the higher index dials. Everything a task cannot deliver ends the
//! connection; that is told to the lane at once, and the connection is made anew, for as long as the
//! other is a node of this cluster.
//!
//! Invariants: every queue has a bound; a task never waits for a lane longer than
//! [`INBOX_TIMEOUT`]; nothing here looks at numbers.

use std::{
    collections::{BTreeMap, HashMap},
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
    messages::{ExpertBatchView, ExpertFailure, ExpertReplyView, NodeAddress, Revoked},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
};
use tracing::{debug, warn};

use crate::{
    lane::{LaneEvent, LaneInbox, OUTBOX_MAX, ReplyQueue},
    peers::{self, Served},
};

/// How long a lane may take to make room in its inbox.
pub const INBOX_TIMEOUT: Duration = Duration::from_secs(20);
/// Pauses between two attempts to reach a node: the first, and the longest.
const REDIAL_PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long a node that is to dial may take before it counts as unreachable.
const DIALED_WITHIN: Duration = Duration::from_secs(1);
/// How long a node that has experts may take to be connected with.
const REACH_TIMEOUT: Duration = Duration::from_secs(2);

/// The connections of one node to others.
pub struct Links {
    endpoint: Endpoint,
    inbox: LaneInbox,
    /// What is given to peers that ask for experts' weights.
    served: Served,
    connections: Mutex<HashMap<String, Connection>>,
    changed: Notify,
    /// The tasks that keep a link to each node.
    keepers: Mutex<HashMap<Link, AbortHandle>>,
    /// Nodes that cannot be reached, and why.
    down: Mutex<BTreeMap<String, String>>,
}

/// A link that is to stand.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Link {
    index: u16,
    name: String,
    address: String,
    /// Index of this node.
    me: u16,
}

impl Link {
    /// Whether this node dials; if not, it waits to be dialed.
    fn dials(&self) -> bool {
        self.index < self.me
    }
}

impl Links {
    /// Connections over an endpoint; what peers ask for goes to the lane of `inbox`.
    pub fn new(endpoint: Endpoint, inbox: LaneInbox) -> Arc<Self> {
        Arc::new(Self {
            endpoint,
            inbox,
            served: Served::default(),
            connections: Mutex::default(),
            changed: Notify::new(),
            keepers: Mutex::default(),
            down: Mutex::default(),
        })
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

    /// Nodes that cannot be reached.
    pub fn unreachable(&self) -> Vec<String> {
        self.down.lock().keys().cloned().collect()
    }

    /// Keeps a link to each of these nodes, and to no others. The lane is to know the nodes by then.
    pub fn keep_to(self: &Arc<Self>, nodes: &[NodeAddress], me: u16) {
        let here = usize::from(me);
        let others =
            nodes.iter().enumerate().filter(|(i, node)| *i != here && !node.name.is_empty());
        let wanted: Vec<Link> = others
            .map(|(index, node)| Link {
                index: index as u16,
                name: node.name.clone(),
                address: node.address.clone(),
                me,
            })
            .collect();
        let mut keepers = self.keepers.lock();
        keepers.retain(|link, keeper| {
            let stays = wanted.contains(link);
            if !stays {
                keeper.abort();
            }
            stays
        });
        self.down.lock().retain(|name, _| wanted.iter().any(|link| link.name == *name));
        for link in wanted {
            let keep = || tokio::spawn(self.clone().keep_link(link.clone())).abort_handle();
            keepers.entry(link.clone()).or_insert_with(keep);
        }
    }

    /// What this node gives to peers.
    pub fn served(&self) -> &Served {
        &self.served
    }

    /// A connection to a node, which need not be of the epoch that is served: the one that stands, or
    /// a new one.
    ///
    /// # Errors
    /// If it cannot be had within a few seconds.
    pub async fn reach(self: &Arc<Self>, node: &NodeAddress) -> Result<Connection, String> {
        let NodeAddress { name, address } = node.clone();
        let link = Link { index: 0, name, address, me: 0 };
        match tokio::time::timeout(REACH_TIMEOUT, self.dial(&link)).await {
            Ok(connection) => connection,
            Err(_) => Err(format!("worker {} was not reached within {REACH_TIMEOUT:?}", link.name)),
        }
    }

    /// Has no connection with these any more. A list replaces the one before.
    pub fn revoke(&self, names: Vec<Revoked>) {
        self.endpoint.set_revoked(names);
    }

    /// Messages and bytes that were sent to each node since its connection was made, by name.
    pub fn traffic(&self) -> Vec<(String, u64, u64)> {
        let connections = self.connections.lock();
        let sent = |(name, connection): (&String, &Connection)| {
            let totals = connection.totals();
            (name.clone(), totals.frames_sent, totals.bytes_sent)
        };
        let mut traffic: Vec<_> = connections.iter().map(sent).collect();
        drop(connections);
        traffic.sort();
        traffic
    }

    /// Keeps no link any more.
    pub fn stop(&self) {
        self.keepers.lock().drain().for_each(|(_, keeper)| keeper.abort());
    }

    fn keep(self: Arc<Self>, connection: Connection) {
        let name = connection.peer().name.clone();
        debug!(peer = %connection.peer(), "connected");
        self.connections.lock().insert(name, connection.clone());
        self.changed.notify_waiters();
        tokio::spawn(async move { self.serve(connection).await });
    }

    /// Answers the streams that a peer opens, until its connection ends.
    async fn serve(self: &Arc<Self>, connection: Connection) {
        let streams = peers::streams();
        while let Some(stream) = connection.accept_stream().await {
            match stream.kind {
                StreamKind::Experts => {
                    let (sender, receiver) = stream.into_frames();
                    let (connection, inbox) = (connection.clone(), self.inbox.clone());
                    tokio::spawn(serve_batches(sender, receiver, connection, inbox));
                }
                StreamKind::Weights => {
                    // One more than are allowed is dropped, and its opener sees it end.
                    let Ok(turn) = streams.clone().try_acquire_owned() else { continue };
                    let links = self.clone();
                    let (connection, stream) = (connection.clone(), stream.into_frames());
                    tokio::spawn(async move {
                        let (served, pool) = (&links.served, links.endpoint.pool());
                        served.serve(stream, &connection, pool).await;
                        drop(turn);
                    });
                }
                _ => {}
            }
        }
        let mut connections = self.connections.lock();
        let name = &connection.peer().name;
        if connections.get(name).is_some_and(|kept| kept.is_same(&connection)) {
            connections.remove(name);
        }
    }

    /// Makes a link, carries frames over it, and makes it anew when it is lost.
    async fn keep_link(self: Arc<Self>, link: Link) {
        let (first, longest) = REDIAL_PAUSES;
        let mut pause = first;
        loop {
            let reason = match self.open(&link).await {
                Ok((connection, sender, receiver)) => {
                    self.down.lock().remove(&link.name);
                    pause = first;
                    let reason = self.carry(link.index, sender, receiver).await;
                    // A stream is lost alone where its peer broke a rule.
                    connection.close(&reason);
                    reason
                }
                Err(reason) => reason,
            };
            debug!(peer = %link.name, %reason, "no link");
            self.down.lock().insert(link.name.clone(), reason);
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(longest);
        }
    }

    async fn open(
        self: &Arc<Self>,
        link: &Link,
    ) -> Result<(Connection, FrameSender, FrameReceiver), String> {
        let connection = match link.dials() {
            true => self.dial(link).await?,
            false => self.dialed_by(link).await,
        };
        let (sender, receiver) =
            connection.open_stream(StreamKind::Experts).await.map_err(|error| error.to_string())?;
        Ok((connection, sender, receiver))
    }

    /// Carries frames between a stream and the lane. Returns how that ended.
    async fn carry(&self, peer: u16, sender: FrameSender, receiver: FrameReceiver) -> String {
        let Some(lane) = self.inbox.load_full() else {
            return "this worker's lane has not begun".to_owned();
        };
        let (outbox, frames) = mpsc::channel(OUTBOX_MAX);
        if !deliver(&lane, LaneEvent::PeerUp { peer, outbox }).await {
            return "this worker's lane takes no events".to_owned();
        }
        let reason = tokio::select! {
            reason = send_batches(sender, frames) => reason,
            reason = read_replies(peer, receiver, &lane) => reason,
        };
        deliver(&lane, LaneEvent::PeerLost { peer, reason: reason.clone() }).await;
        reason
    }

    async fn dial(self: &Arc<Self>, link: &Link) -> Result<Connection, String> {
        if let Some(connection) = self.live(link) {
            return Ok(connection);
        }
        let Link { name, address, .. } = link;
        let address: SocketAddr = address.parse().map_err(|_| {
            format!("worker {name} says that it listens on {address:?}; host:port is expected")
        })?;
        let connection = self
            .endpoint
            .connect(address, &Expect::worker(name))
            .await
            .map_err(|error| error.to_string())?;
        self.clone().keep(connection.clone());
        Ok(connection)
    }

    /// The connection to this very node, if it stands: one of the same name that died and was
    /// started again listens on another port.
    fn live(&self, link: &Link) -> Option<Connection> {
        let port = link.address.parse::<SocketAddr>().ok()?.port();
        let kept = self.connections.lock().get(&link.name).cloned()?;
        (kept.close_reason().is_none() && kept.address().port() == port).then_some(kept)
    }

    async fn dialed_by(&self, link: &Link) -> Connection {
        loop {
            let changed = self.changed.notified();
            if let Some(connection) = self.live(link) {
                return connection;
            }
            // What nobody dials is reported as unreachable meanwhile.
            if tokio::time::timeout(DIALED_WITHIN, changed).await.is_err() {
                let reason = format!("it has not connected within {DIALED_WITHIN:?}");
                self.down.lock().insert(link.name.clone(), reason);
            }
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

/// Brings a peer's answers to the lane. Returns how the stream ended.
async fn read_replies(peer: u16, mut receiver: FrameReceiver, lane: &Sender<LaneEvent>) -> String {
    loop {
        let reply = match receiver.recv().await {
            Ok(Some(frame)) => ExpertReplyView::check(&frame),
            Ok(None) => return "it closed its stream".to_owned(),
            Err(error) => return how(error),
        };
        match reply {
            Ok(reply) => {
                if !deliver(lane, LaneEvent::Reply { peer, reply }).await {
                    return "this worker's lane takes no answers".to_owned();
                }
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// Sends a peer its batches. Returns how the stream ended.
async fn send_batches(
    mut sender: FrameSender,
    mut frames: mpsc::Receiver<OutgoingFrame>,
) -> String {
    while let Some(frame) = frames.recv().await {
        if let Err(error) = sender.send(frame).await {
            return how(error);
        }
    }
    "this worker's lane has ended".to_owned()
}

/// Brings a peer's batches to the lane and the answers back.
async fn serve_batches(
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
    connection: Connection,
    inbox: LaneInbox,
) {
    let (queue, mut replies) = mpsc::channel::<OutgoingFrame>(OUTBOX_MAX);
    let reply = ReplyQueue::new(queue, connection.clone());
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
                reply.send(frame);
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
