//! A connection to one verified peer, and its streams.
//!
//! A stream begins with a header that names its kind; the acceptor checks that the peer's role may
//! open such a stream before anybody sees it. Who may open what:
//!
//! | kind | opened by | accepted by |
//! |---|---|---|
//! | control | coordinator, worker | coordinator, worker (not worker to worker) |
//! | experts | worker | worker |
//! | job | coordinator | worker |
//! | client | client | coordinator |
//! | weights | worker | worker |
//! | training | coordinator | worker |
//!
//! Invariants: a peer that opens what it may not is disconnected; a stream whose header is late is
//! dropped and holds up no other; the connection lives as long as a handle or a frame stream of it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use quinn::{ConnectionError, VarInt};
pub use quinn::{RecvStream as RawReceiver, SendStream as RawSender};
use tokio::{
    sync::{Mutex, mpsc},
    time::timeout,
};

use crate::{
    frame::{FrameReceiver, FrameSender, WireCounts, WireTotals},
    identity::{PeerCertificate, PeerIdentity, Role},
    limits::{FrameLimits, PeerLimits},
    pool::BufferPool,
    session::{Command, Event, HELLO_HEADER_BYTES, Hello, Session, SessionError},
};

/// Silence after which a peer is lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long opening a stream, or its header, may take.
pub const STREAM_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a refused peer has to read why.
const REFUSAL_LINGER: Duration = Duration::from_millis(500);
/// Streams that were opened by the peer and wait to be accepted.
const STREAMS_WAITING_MAX: usize = 64;

const STREAM_MARK: [u8; 3] = *b"LLS";

/// Application error codes of a close.
pub(crate) const CLOSE_DONE: VarInt = VarInt::from_u32(0);
pub(crate) const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);
pub(crate) const CLOSE_VIOLATION: VarInt = VarInt::from_u32(2);
/// There is no room; the reason says when to come again. See [`busy_in`].
pub(crate) const CLOSE_BUSY: VarInt = VarInt::from_u32(3);
pub(crate) const CLOSE_REVOKED: VarInt = VarInt::from_u32(4);
const CLOSE_DISMISSED: VarInt = VarInt::from_u32(5);

const BUSY_REASON: &str = "busy, come again in ms: ";

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StreamKind {
    /// The actors' control plane: raw bytes.
    Control = 1,
    /// Expert batches and their replies.
    Experts = 2,
    /// One job: its start, then its events. Its end is the job's.
    Job = 3,
    /// A client's requests and the coordinator's replies.
    Client = 4,
    /// Requests for experts' weights, and those.
    Weights = 5,
    /// What ranks of a training are told, and what they ask of each other.
    Train = 6,
}

impl StreamKind {
    fn from_wire(kind: u8) -> Option<Self> {
        use StreamKind::*;
        [Control, Experts, Job, Client, Weights, Train]
            .into_iter()
            .find(|known| *known as u8 == kind)
    }

    /// Whether two roles have anything to say to each other.
    pub(crate) fn any_between(one: Role, other: Role) -> bool {
        use StreamKind::*;
        let between = |kind: Self| kind.allowed(one, other) || kind.allowed(other, one);
        [Control, Experts, Job, Client, Weights, Train].into_iter().any(between)
    }

    /// Whether a peer of one role may open such a stream to the other.
    pub fn allowed(self, opener: Role, acceptor: Role) -> bool {
        use Role::*;
        matches!(
            (self, opener, acceptor),
            (StreamKind::Control, Coordinator, Worker | Coordinator)
                | (StreamKind::Control, Worker, Coordinator)
                | (StreamKind::Experts | StreamKind::Weights | StreamKind::Train, Worker, Worker)
                | (StreamKind::Job | StreamKind::Train, Coordinator, Worker)
                | (StreamKind::Client, Client, Coordinator)
        )
    }
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StreamKind::Control => "control",
            StreamKind::Experts => "experts",
            StreamKind::Job => "job",
            StreamKind::Client => "client",
            StreamKind::Weights => "weights",
            StreamKind::Train => "training",
        })
    }
}

/// A stream that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The roles don't allow it.
    #[error("a {us} may not open a stream of kind {kind} to {peer}")]
    Forbidden {
        /// The kind.
        kind: StreamKind,
        /// Our role.
        us: Role,
        /// The other side.
        peer: PeerIdentity,
    },
    /// The connection is gone.
    #[error(transparent)]
    Lost(#[from] ConnectionLost),
    /// The peer accepts no more streams.
    #[error("{peer} took no further stream within {STREAM_TIMEOUT:?}; it has too many open")]
    TimedOut {
        /// The other side.
        peer: PeerIdentity,
    },
}

/// A connection that ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("lost {peer} at {address}: {reason}")]
pub struct ConnectionLost {
    /// The other side.
    pub peer: PeerIdentity,
    /// Where it was.
    pub address: SocketAddr,
    /// Why.
    pub reason: String,
    /// Whether coming back is of no use: a certificate was revoked, or the peer was dismissed.
    pub for_good: bool,
}

/// A connection to a verified peer. Clones share it; it closes when the last one and its last
/// frame stream are dropped, and what is under way then is lost: [`FrameSender::finish`] a stream
/// whose last frames matter.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

struct Inner {
    quic: quinn::Connection,
    us: PeerIdentity,
    peer: PeerIdentity,
    certificate: PeerCertificate,
    hello: Hello,
    pool: BufferPool,
    counts: Arc<WireCounts>,
    /// Bytes of frames that the peer has begun and not completed.
    claimed: AtomicUsize,
    streams: Mutex<mpsc::Receiver<Opened>>,
}

/// A stream whose header was checked.
struct Opened {
    kind: StreamKind,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

/// A stream that the peer opened and may open.
pub struct AcceptedStream {
    /// What it carries.
    pub kind: StreamKind,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    connection: Connection,
}

impl AcceptedStream {
    /// The stream as frames.
    pub fn into_frames(self) -> (FrameSender, FrameReceiver) {
        let FrameLimits { opener, acceptor } = FrameLimits::of(self.kind);
        self.connection.frames((self.send, acceptor), (self.recv, opener))
    }

    /// The stream as bytes. It does not keep the connection alive.
    pub fn into_raw(self) -> (RawSender, RawReceiver) {
        (self.send, self.recv)
    }
}

/// A connection that does not live for being known here.
pub(crate) struct WeakConnection(Weak<Inner>);

impl WeakConnection {
    pub(crate) fn upgrade(&self) -> Option<Connection> {
        self.0.upgrade().map(|inner| Connection { inner })
    }

    pub(crate) fn is_live(&self) -> bool {
        self.upgrade().is_some_and(|connection| connection.inner.quic.close_reason().is_none())
    }
}

/// A part of what a peer may have begun to send; given back with the drop.
pub(crate) struct Claim {
    connection: Connection,
    bytes: usize,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.connection.inner.claimed.fetch_sub(self.bytes, Relaxed);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.quic.close(CLOSE_DONE, b"no longer needed");
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({} at {})", self.inner.peer, self.address())
    }
}

impl Connection {
    pub(crate) fn new(
        quic: quinn::Connection,
        us: PeerIdentity,
        (peer, certificate): (PeerIdentity, PeerCertificate),
        hello: Hello,
        pool: BufferPool,
    ) -> Self {
        let (opened, streams) = mpsc::channel(STREAMS_WAITING_MAX);
        tokio::spawn(accept_streams(quic.clone(), us.role, peer.clone(), opened));
        let (counts, streams) = (Arc::default(), Mutex::new(streams));
        let claimed = AtomicUsize::new(0);
        let inner = Inner { quic, us, peer, certificate, hello, pool, counts, claimed, streams };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn downgrade(&self) -> WeakConnection {
        WeakConnection(Arc::downgrade(&self.inner))
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerIdentity {
        &self.inner.peer
    }

    /// The certificate that the other end showed.
    pub fn certificate(&self) -> &PeerCertificate {
        &self.inner.certificate
    }

    /// What the other end runs.
    pub fn hello(&self) -> &Hello {
        &self.inner.hello
    }

    /// Where the other end is.
    pub fn address(&self) -> SocketAddr {
        self.inner.quic.remote_address()
    }

    /// What crossed it so far.
    pub fn totals(&self) -> WireTotals {
        self.inner.counts.totals()
    }

    /// Datagrams that were sent and never arrived: the kernel's buffers overflowed, or the network's.
    pub fn datagrams_lost(&self) -> u64 {
        self.inner.quic.stats().path.lost_packets
    }

    /// Whether two handles are of one connection.
    pub fn is_same(&self, other: &Connection) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn counts(&self) -> &WireCounts {
        &self.inner.counts
    }

    /// Opens a stream of frames. Open few and keep them: a new one costs a round trip's work.
    pub async fn open_stream(
        &self,
        kind: StreamKind,
    ) -> Result<(FrameSender, FrameReceiver), StreamError> {
        let (send, recv) = self.open_raw(kind).await?;
        let FrameLimits { opener, acceptor } = FrameLimits::of(kind);
        Ok(self.frames((send, opener), (recv, acceptor)))
    }

    /// Opens a stream of bytes. It does not keep the connection alive.
    pub async fn open_raw(
        &self,
        kind: StreamKind,
    ) -> Result<(RawSender, RawReceiver), StreamError> {
        let (us, peer) = (self.inner.us.role, &self.inner.peer);
        if !kind.allowed(us, peer.role) {
            return Err(StreamError::Forbidden { kind, us, peer: peer.clone() });
        }
        let opening = async {
            let (mut send, recv) =
                self.inner.quic.open_bi().await.map_err(|error| self.lost(&error))?;
            let [a, b, c] = STREAM_MARK;
            let written = send.write_all(&[a, b, c, kind as u8]).await;
            written.map_err(|error| self.lost_with(error.to_string()))?;
            Ok((send, recv))
        };
        match timeout(STREAM_TIMEOUT, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(StreamError::TimedOut { peer: peer.clone() }),
        }
    }

    /// The next stream that the peer opened, or `None` when the connection has ended.
    pub async fn accept_stream(&self) -> Option<AcceptedStream> {
        let Opened { kind, send, recv } = self.inner.streams.lock().await.recv().await?;
        Some(AcceptedStream { kind, send, recv, connection: self.clone() })
    }

    /// Waits until the connection has ended, and says why. A silent peer is noticed after
    /// [`IDLE_TIMEOUT`].
    pub async fn closed(&self) -> ConnectionLost {
        let error = self.inner.quic.closed().await;
        self.lost(&error)
    }

    /// Why the connection has ended, if it has.
    pub fn close_reason(&self) -> Option<ConnectionLost> {
        self.inner.quic.close_reason().map(|error| self.lost(&error))
    }

    /// Ends the connection at once; the peer is told why.
    pub fn close(&self, reason: &str) {
        self.inner.quic.close(CLOSE_DONE, reason.as_bytes());
    }

    /// Ends the connection at once; the peer is told why, and that it is not to come back.
    pub fn dismiss(&self, reason: &str) {
        self.close_with(CLOSE_DISMISSED, reason);
    }

    pub(crate) fn close_with(&self, code: VarInt, reason: &str) {
        self.inner.quic.close(code, reason.as_bytes());
    }

    /// A stream as frames, each half with its longest frame.
    fn frames(
        &self,
        (send, sent_max): (RawSender, usize),
        (recv, received_max): (RawReceiver, usize),
    ) -> (FrameSender, FrameReceiver) {
        let pool = self.inner.pool.clone();
        let sender = FrameSender::new(send, self.clone(), sent_max);
        (sender, FrameReceiver::new(recv, self.clone(), pool, received_max))
    }

    /// Counts a frame that the peer begins; `Err` is how many bytes it may have begun at most.
    pub(crate) fn claim(&self, bytes: usize) -> Result<Claim, usize> {
        let limit = PeerLimits::of(self.inner.peer.role).frame_bytes;
        let claimed = self.inner.claimed.fetch_add(bytes, Relaxed);
        let claim = Claim { connection: self.clone(), bytes };
        if claimed + bytes > limit { Err(limit) } else { Ok(claim) }
    }

    fn lost(&self, error: &ConnectionError) -> ConnectionLost {
        ConnectionLost { for_good: is_for_good(error), ..self.lost_with(describe(error)) }
    }

    fn lost_with(&self, reason: String) -> ConnectionLost {
        let (peer, address) = (self.inner.peer.clone(), self.address());
        ConnectionLost { peer, address, reason, for_good: false }
    }
}

/// Reads the headers of the streams that the peer opens, each in its own time.
async fn accept_streams(
    quic: quinn::Connection,
    us: Role,
    peer: PeerIdentity,
    opened: mpsc::Sender<Opened>,
) {
    // Bounded by the number of streams that QUIC lets the peer have open.
    while let Ok((send, mut recv)) = quic.accept_bi().await {
        let (quic, peer, opened) = (quic.clone(), peer.clone(), opened.clone());
        tokio::spawn(async move {
            let mut header = [0; 4];
            let read = timeout(STREAM_TIMEOUT, recv.read_exact(&mut header)).await;
            if !matches!(read, Ok(Ok(()))) {
                tracing::warn!(%peer, "dropped a stream that came without its header");
                return;
            }
            let [a, b, c, kind] = header;
            let kind = StreamKind::from_wire(kind).filter(|_| [a, b, c] == STREAM_MARK);
            match kind.filter(|kind| kind.allowed(peer.role, us)) {
                // The connection ended if nobody takes it.
                Some(kind) => drop(opened.send(Opened { kind, send, recv }).await),
                None => {
                    let what = kind.map_or("an unknown kind".to_owned(), |k| format!("kind {k}"));
                    let reason =
                        format!("a {} may not open a stream of {what} to a {us}", peer.role);
                    tracing::warn!(%peer, %reason, "closed a connection");
                    quic.close(CLOSE_VIOLATION, reason.as_bytes());
                }
            }
        });
    }
}

/// The other side has no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full {
    /// When to come again, if it said so.
    pub(crate) retry_after: Option<Duration>,
}

/// The reason of a close with [`CLOSE_BUSY`].
pub(crate) fn busy_reason(retry_after: Duration) -> String {
    format!("{BUSY_REASON}{}", retry_after.as_millis())
}

/// Whether a connection ended with the wish that the peer stays away.
fn is_for_good(error: &ConnectionError) -> bool {
    let dismissed = |close: &quinn::ApplicationClose| close.error_code == CLOSE_DISMISSED;
    is_revoked(error)
        || matches!(error, ConnectionError::ApplicationClosed(close) if dismissed(close))
}

/// Whether a connection ended because the certificate of one side was revoked.
pub(crate) fn is_revoked(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_REVOKED)
}

/// Whether a connection ended for want of room.
///
/// Before TLS is done there are no reasons: then a refusal is the answer of a full room, and an
/// error of the application that of one in which others needed the place.
pub(crate) fn busy_in(error: &ConnectionError) -> Option<Full> {
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_BUSY => {
            let reason = String::from_utf8_lossy(&close.reason);
            let millis = reason.strip_prefix(BUSY_REASON).and_then(|digits| digits.parse().ok());
            Some(Full { retry_after: millis.map(Duration::from_millis) })
        }
        // CONNECTION_REFUSED and APPLICATION_ERROR (RFC 9000, 20.1).
        ConnectionError::ConnectionClosed(close)
            if matches!(u64::from(close.error_code), 0x02 | 0x0c) =>
        {
            Some(Full { retry_after: None })
        }
        _ => None,
    }
}

/// Runs the handshake's machine over the first stream of a connection.
///
/// Afterwards a refused peer is given a moment to read our introduction, then it is told why.
pub(crate) async fn greet(
    quic: &quinn::Connection,
    initiator: bool,
    mut session: Session,
) -> Result<Hello, SessionError> {
    let now = || tokio::time::Instant::now().into_std();
    session.handle(now(), Event::Opened);
    let mut streams = None;
    loop {
        let event = match session.poll_command() {
            Some(Command::Ready(hello)) => return Ok(hello),
            Some(Command::Fail(error)) => {
                if let Some((mut send, _recv)) = streams {
                    let _: Result<(), _> = quinn::SendStream::finish(&mut send);
                    let _ = timeout(REFUSAL_LINGER, quic.closed()).await;
                }
                // Closing once more would hide why the peer closed.
                if quic.close_reason().is_none() {
                    quic.close(CLOSE_REFUSED, error.to_string().as_bytes());
                }
                return Err(error);
            }
            Some(Command::Send(hello)) => {
                let deadline = session.poll_timeout().unwrap_or_else(now);
                let opened = async {
                    let opened =
                        if initiator { quic.open_bi().await } else { quic.accept_bi().await };
                    let (mut send, recv) = opened.map_err(|error| describe(&error))?;
                    let written = send.write_all(&hello.to_bytes()).await;
                    written.map_err(|error| describe_write(quic, error))?;
                    Ok::<_, String>((send, recv))
                };
                match tokio::time::timeout_at(deadline.into(), opened).await {
                    Ok(Ok(opened)) => {
                        streams = Some(opened);
                        continue;
                    }
                    Ok(Err(reason)) => Event::Lost(reason),
                    Err(_) => Event::Tick,
                }
            }
            None => {
                let deadline = session.poll_timeout().unwrap_or_else(now);
                let read = async {
                    match &mut streams {
                        Some((_, recv)) => read_hello(quic, recv).await,
                        None => Event::Garbled,
                    }
                };
                tokio::time::timeout_at(deadline.into(), read).await.unwrap_or(Event::Tick)
            }
        };
        session.handle(now(), event);
    }
}

async fn read_hello(quic: &quinn::Connection, recv: &mut quinn::RecvStream) -> Event {
    let lost = |error: quinn::ReadExactError| match quic.close_reason() {
        Some(error) => Event::Lost(describe(&error)),
        None => Event::Lost(error.to_string()),
    };
    let mut header = [0; HELLO_HEADER_BYTES];
    if let Err(error) = recv.read_exact(&mut header).await {
        return lost(error);
    }
    let Some(len) = Hello::fields_len(header) else { return Event::Garbled };
    let mut fields = vec![0; len];
    if let Err(error) = recv.read_exact(&mut fields).await {
        return lost(error);
    }
    Hello::from_fields(&fields).map_or(Event::Garbled, Event::Received)
}

fn describe_write(quic: &quinn::Connection, error: quinn::WriteError) -> String {
    quic.close_reason().map_or_else(|| error.to_string(), |error| describe(&error))
}

/// Whether a connection ended without a word: nobody answered, or the other side cut the handshake off
/// because it took too long there or others needed its place.
pub(crate) fn is_silence(error: &ConnectionError) -> bool {
    match error {
        ConnectionError::TimedOut => true,
        ConnectionError::ApplicationClosed(close) => close.reason.is_empty(),
        _ => false,
    }
}

/// Why a connection ended, for people.
pub(crate) fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::TimedOut => format!("it did not answer for {IDLE_TIMEOUT:?}"),
        ConnectionError::LocallyClosed => "this side closed it".to_owned(),
        ConnectionError::Reset => "it was restarted".to_owned(),
        ConnectionError::ApplicationClosed(close) => {
            if close.reason.is_empty() {
                return "it ended the connection without a word, as in a crowd".to_owned();
            }
            let reason = String::from_utf8_lossy(&close.reason);
            let reason: String = reason.chars().filter(|c| !c.is_control()).take(500).collect();
            format!("it closed the connection ({reason})")
        }
        ConnectionError::ConnectionClosed(close) => match alert(u64::from(close.error_code)) {
            Some(alert) => format!("it refused this side's certificate: {alert}"),
            None => format!("it ended the connection ({close})"),
        },
        ConnectionError::TransportError(error) => match alert(u64::from(error.code)) {
            Some(alert) => format!("its certificate was refused: {alert} ({})", error.reason),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}

/// The TLS alerts that have to do with certificates, in words.
fn alert(code: u64) -> Option<&'static str> {
    // QUIC carries TLS alerts as 0x100 + alert (RFC 9001, 4.8).
    match code.checked_sub(0x100)? {
        42 | 46 => Some("it is not acceptable; join this cluster with its token"),
        45 => Some("it is expired or not valid yet; compare the clocks, then join again"),
        48 => Some("it belongs to another cluster; join this one with its token"),
        51 => Some("it does not belong to this cluster; join it with its token"),
        116 => Some("there is none; join this cluster with its token"),
        120 => Some("the two have no protocol in common; install the same release on both"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        endpoint::{Endpoint, Expect, Options},
        identity::ClusterCa,
    };

    async fn pair() -> ([Endpoint; 2], Connection, Connection) {
        let ca = ClusterCa::ephemeral().unwrap();
        let endpoints = ["w1", "w2"].map(|name| {
            let identity = ca.identity(Role::Worker, name).unwrap();
            let options = Options::new(Hello::new(1));
            Endpoint::bind("127.0.0.1:0".parse().unwrap(), &identity, options).unwrap()
        });
        let address = endpoints[1].local_addr().unwrap();
        let expect = Expect::worker("w2");
        let (near, far) =
            tokio::join!(endpoints[0].connect(address, &expect), endpoints[1].accept());
        (endpoints, near.unwrap(), far.unwrap())
    }

    #[tokio::test]
    async fn a_peer_that_opens_what_it_may_not_is_disconnected_and_nobody_sees_the_stream() {
        for header in [*b"LLS\x03", *b"LLS\x01", *b"LLS\x63", *b"GET "] {
            let (_endpoints, near, far) = pair().await;
            let (mut send, _recv) = near.inner.quic.open_bi().await.unwrap();
            send.write_all(&header).await.unwrap();
            assert!(far.accept_stream().await.is_none(), "{header:?} was handed out");
            let why = near.closed().await.to_string();
            assert!(why.contains("worker may not open a stream"), "{why}");
        }
    }

    #[tokio::test]
    async fn who_is_turned_away_hears_when_to_come_again() {
        let named = busy_reason(Duration::from_millis(120));
        for (reason, retry_after) in
            [(&*named, Some(Duration::from_millis(120))), ("busy, come again in ms: soon", None)]
        {
            let (_endpoints, near, far) = pair().await;
            far.close_with(CLOSE_BUSY, reason);
            let error = near.inner.quic.closed().await;
            assert_eq!(busy_in(&error), Some(Full { retry_after }), "{reason}");
            // The same words with another code are no such thing.
            let (_endpoints, near, far) = pair().await;
            far.close_with(CLOSE_REFUSED, reason);
            assert_eq!(busy_in(&near.inner.quic.closed().await), None);
        }
    }

    #[tokio::test]
    async fn a_stream_whose_header_is_late_holds_up_no_other() {
        let (_endpoints, near, far) = pair().await;
        let (mut late, _recv) = near.inner.quic.open_bi().await.unwrap();
        late.write_all(b"LL").await.unwrap();
        let _stream = near.open_stream(StreamKind::Experts).await.unwrap();
        let accepted = timeout(STREAM_TIMEOUT / 2, far.accept_stream()).await.unwrap();
        assert_eq!(accepted.unwrap().kind, StreamKind::Experts);
    }
}
