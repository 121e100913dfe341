//! The shell around the door: takes connections, and gives those of members to the endpoint.
//!
//! Invariants: a connection is handed out only after mutual TLS within the cluster, after the list
//! of revoked names was asked, and after the handshake of [`crate::session`]; everything else ends
//! before any stream is read by anybody, and is reported. One slow handshake holds up no other, and
//! [`crate::door`] bounds them all; whoever has no place or loses it is told when to come again.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use quinn::{Incoming, ServerConfig, crypto::rustls::HandshakeData};
use rustls_pki_types::CertificateDer;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    connection::{
        CLOSE_BUSY, CLOSE_REFUSED, CLOSE_REVOKED, Connection, StreamKind, busy_reason, describe,
        greet,
    },
    door::{Busy, Door, Entered, Room, Ticket},
    endpoint::Options,
    identity::{ClusterCa, PeerCertificate, PeerIdentity, Role},
    join::{self, PROOF_TIMEOUT},
    peers::Peers,
    refusals::Refusals,
    revocation::REVOKED_POLL_INTERVAL,
    session::Session,
    socket::welcome,
    tls,
};

/// How long TLS may take a stranger.
const TLS_TIMEOUT: Duration = Duration::from_secs(3);

/// Who gets in.
pub(crate) struct Admission {
    pub(crate) loopback: Arc<ServerConfig>,
    pub(crate) network: Arc<ServerConfig>,
    pub(crate) who: PeerIdentity,
    pub(crate) ca: Option<Arc<ClusterCa>>,
    pub(crate) options: Options,
    pub(crate) peers: Arc<Peers>,
    pub(crate) refusals: Arc<Refusals>,
    pub(crate) desk: Arc<Desk>,
}

/// The door, and how to reach those who are inside.
#[derive(Default)]
pub(crate) struct Desk {
    state: Mutex<DeskState>,
}

#[derive(Default)]
struct DeskState {
    door: Door,
    /// Strangers; what is sent is when to come again.
    inside: HashMap<Ticket, oneshot::Sender<Duration>>,
}

/// A place inside. It is free again when this is dropped.
struct Place {
    desk: Arc<Desk>,
    ticket: Ticket,
    evicted: Option<oneshot::Receiver<Duration>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.desk.state.lock();
        state.door.leave(self.ticket);
        state.inside.remove(&self.ticket);
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl Desk {
    fn is_crowded(&self) -> bool {
        self.state.lock().door.is_crowded()
    }

    fn enter(self: &Arc<Self>, room: Room, address: IpAddr) -> Result<Place, Busy> {
        let mut state = self.state.lock();
        let Entered { ticket, evicted } = state.door.enter(now(), room, address)?;
        if let Some((other, retry_after)) = evicted
            && let Some(other) = state.inside.remove(&other)
        {
            // One that leaves by itself at this moment needs not be told.
            let _ = other.send(retry_after);
        }
        let (sender, evicted) = oneshot::channel();
        state.inside.insert(ticket, sender);
        Ok(Place { desk: self.clone(), ticket, evicted: Some(evicted) })
    }

    fn enter_member(self: &Arc<Self>, role: Role, address: IpAddr) -> Result<Place, Busy> {
        let ticket = self.state.lock().door.enter_member(now(), role, address)?;
        Ok(Place { desk: self.clone(), ticket, evicted: None })
    }

    fn busy(&self) -> Busy {
        self.state.lock().door.busy(now())
    }
}

impl Place {
    /// Does something for so long, unless somebody else needs the place.
    async fn hold<T>(&mut self, limit: Duration, work: impl Future<Output = T>) -> Result<T, Cut> {
        let evicted = async {
            match &mut self.evicted {
                // A sender that is gone sends nothing; that is no eviction.
                Some(evicted) => match evicted.await {
                    Ok(retry_after) => retry_after,
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            done = timeout(limit, work) => done.map_err(|_| Cut::TimedOut),
            retry_after = evicted => Err(Cut::Evicted(retry_after)),
        }
    }
}

/// Why somebody's time was over.
enum Cut {
    TimedOut,
    Evicted(Duration),
}

/// Takes connections, each handshake in a task of its own, until the endpoint is closed.
pub(crate) async fn accept(
    quic: quinn::Endpoint,
    admission: Arc<Admission>,
    accepted: mpsc::Sender<Connection>,
) {
    let mut looks = interval(REVOKED_POLL_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let refusals = admission.refusals.clone();
    let says = tokio::spawn(async move { refusals.say_held().await });
    loop {
        tokio::select! {
            incoming = quic.accept() => match incoming {
                Some(incoming) => admission.clone().receive(incoming, &accepted),
                None => break,
            },
            _ = looks.tick() => admission.refresh(),
        }
    }
    says.abort();
}

impl Admission {
    fn refresh(&self) {
        if let Some(ca) = &self.ca {
            self.peers.refresh(ca);
        }
    }

    /// Decides at the door, without waiting.
    fn receive(self: Arc<Self>, incoming: Incoming, accepted: &mpsc::Sender<Connection>) {
        let address = incoming.remote_address();
        let unproven = !incoming.remote_address_validated() && incoming.may_retry();
        if unproven && self.desk.is_crowded() {
            // Whoever invents its address ends here.
            let _ = incoming.retry();
            return;
        }
        let place = match self.desk.enter(Room::Handshake, address.ip()) {
            Ok(place) => place,
            Err(_) => {
                incoming.refuse();
                let reason = "too many handshakes at once; it was told to come again".to_owned();
                self.refusals.note(address, reason);
                return;
            }
        };
        let accepted = accepted.clone();
        tokio::spawn(async move {
            match self.admit(incoming, place).await {
                Ok(Some(connection)) => drop(accepted.send(connection).await),
                Ok(None) => {}
                Err(reason) => self.refusals.note(address, reason),
            }
        });
    }

    /// A member's connection; nothing for a joiner that was served; why not for anybody else.
    async fn admit(
        &self,
        incoming: Incoming,
        mut place: Place,
    ) -> Result<Option<Connection>, String> {
        let address = incoming.remote_address();
        let config = if address.ip().is_loopback() { &self.loopback } else { &self.network };
        let handshake = async {
            let connecting = incoming.accept_with(config.clone()).map_err(|e| describe(&e))?;
            connecting.await.map_err(|error| describe(&error))
        };
        // One that is cut off here is told nothing but that the application ended it.
        let quic = place.hold(TLS_TIMEOUT, handshake).await.map_err(|cut| match cut {
            Cut::TimedOut => format!("its TLS handshake took more than {TLS_TIMEOUT:?}"),
            Cut::Evicted(_) => "others needed its place in the handshake".to_owned(),
        })??;
        drop(place);
        let refuse = |reason: String| {
            quic.close(CLOSE_REFUSED, reason.as_bytes());
            Err(reason)
        };
        match (protocol_of(&quic).as_deref(), certified(&quic), &self.ca) {
            (Some(tls::ALPN_JOIN), _, Some(ca)) => self.serve_joiner(&quic, ca, address).await,
            (Some(tls::ALPN_JOIN_1), _, Some(_)) => refuse(
                "the joiner is of an earlier release, whose tokens are no longer good; install the \
                 same release on both"
                    .to_owned(),
            ),
            (Some(tls::ALPN_MEMBER), Some(peer), _) => self.greet_member(quic, peer).await,
            (Some(tls::ALPN_MEMBER), None, _) => {
                refuse("it shows no certificate of this cluster; join it with its token".to_owned())
            }
            (protocol, ..) => {
                let name = String::from_utf8_lossy(protocol.unwrap_or_default()).into_owned();
                refuse(format!("it speaks {name:?}, which is not served here"))
            }
        }
    }

    async fn greet_member(
        &self,
        quic: quinn::Connection,
        (peer, certificate): (PeerIdentity, PeerCertificate),
    ) -> Result<Option<Connection>, String> {
        let us = self.who.role;
        if !StreamKind::any_between(peer.role, us) {
            let reason =
                format!("a {} has no business with a {us}; ask the coordinator", peer.role);
            quic.close(CLOSE_REFUSED, reason.as_bytes());
            return Err(reason);
        }
        self.refresh();
        if let Some(reason) = self.peers.refuses(&peer, &certificate) {
            quic.close(CLOSE_REVOKED, reason.as_bytes());
            return Err(reason);
        }
        let place = match self.desk.enter_member(peer.role, quic.remote_address().ip()) {
            Ok(place) => place,
            Err(busy) => {
                turn_away(&quic, busy.retry_after);
                return Err(format!("no place for {peer}: too many connections"));
            }
        };
        welcome(&quic, peer.role);
        let computes = ![self.who.role, peer.role].contains(&Role::Client);
        let session = Session::new(self.who.role, &peer, self.options.hello.clone());
        let session = session.computing(computes);
        let hello = greet(&quic, false, session).await.map_err(|e| e.to_string())?;
        let (us, pool) = (self.who.clone(), self.options.pool.clone());
        let connection = Connection::new(quic.clone(), us, (peer, certificate), hello, pool);
        self.peers.keep(&connection)?;
        tokio::spawn(async move {
            quic.closed().await;
            drop(place);
        });
        Ok(Some(connection))
    }

    async fn serve_joiner(
        &self,
        quic: &quinn::Connection,
        ca: &ClusterCa,
        address: SocketAddr,
    ) -> Result<Option<Connection>, String> {
        let mut place = match self.desk.enter(Room::Join, address.ip()) {
            Ok(place) => place,
            Err(busy) => {
                turn_away(quic, busy.retry_after);
                return Err("too many joiners at once; it was told to come again".to_owned());
            }
        };
        let heard = place.hold(PROOF_TIMEOUT, join::hear(quic, ca, &self.options.hello)).await;
        let decision = match heard {
            Ok(Ok(decision)) => decision,
            Ok(Err(reason)) => {
                quic.close(CLOSE_REFUSED, reason.as_bytes());
                return Err(reason);
            }
            Err(Cut::TimedOut) => {
                // Perhaps this machine is slow, and not the joiner idle.
                turn_away(quic, self.desk.busy().retry_after);
                return Err(format!("the joiner at {address} proved nothing in {PROOF_TIMEOUT:?}"));
            }
            Err(Cut::Evicted(retry_after)) => {
                turn_away(quic, retry_after);
                return Err(format!("others needed the place of the joiner at {address}"));
            }
        };
        // Whoever has proven a secret is no stranger.
        let place = if decision.is_accepted() { None } else { Some(place) };
        let told = decision.tell(quic).await;
        drop(place);
        let who = told?;
        tracing::info!(%who, %address, "joined");
        Ok(None)
    }
}

fn turn_away(quic: &quinn::Connection, retry_after: Duration) {
    quic.close(CLOSE_BUSY, busy_reason(retry_after).as_bytes());
}

fn protocol_of(quic: &quinn::Connection) -> Option<Vec<u8>> {
    quic.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// Who the peer is by its certificate, if it showed one that names a node.
pub(crate) fn certified(quic: &quinn::Connection) -> Option<(PeerIdentity, PeerCertificate)> {
    let chain = quic.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Some((PeerIdentity::from_chain(&chain)?, PeerCertificate::from_chain(&chain)?))
}
