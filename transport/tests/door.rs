//! The door: who is refused by which listener, as one table; who is sent away, and what a crowd
//! of strangers cannot do.

mod support;

use std::{
    net::UdpSocket,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use lite_llm_transport::{
    endpoint::{ConnectError, Endpoint, Expect, JOINS_MAX, PER_SOURCE_MAX},
    identity::{ClusterCa, Identity, OPERATOR, Role},
    join::{JoinError, PROOF_TIMEOUT, join, join_within},
    messages::{Revoked, RevokedNames, decode, encode},
    session::Hello,
    token::JoinToken,
};
use support::{
    intruder::{Joiner, Secret, forged, intrude, stolen},
    *,
};
use tokio::task::JoinSet;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A cluster whose authority lies in a folder, as a coordinator's does.
struct Cluster {
    state: tempfile::TempDir,
    ca: Arc<ClusterCa>,
    head: Endpoint,
    w1: Endpoint,
}

impl Cluster {
    fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let ca = Arc::new(ClusterCa::open_or_create(state.path()).unwrap());
        let (head, w1) = (coordinator(&ca), worker(&ca, "w1"));
        Self { state, ca, head, w1 }
    }

    /// The same authority as another process has it.
    fn elsewhere(&self) -> ClusterCa {
        ClusterCa::open(self.state.path()).unwrap()
    }

    fn token(&self, role: Role) -> JoinToken {
        self.ca.join_token(role, self.head.local_addr().unwrap().to_string()).unwrap()
    }

    /// The secret of the token of a role, and of one that is written now.
    fn secret(&self, token: &JoinToken) -> Secret {
        let path = self.state.path().join("copied-token");
        token.write(&path).unwrap();
        Secret::of(&path)
    }

    async fn join(&self, role: Role, name: &str) -> Result<Identity, JoinError> {
        let address = self.head.local_addr().unwrap();
        soon("join", join(address, &self.token(role), role, name, &Hello::new(1))).await
    }
}

/// Connects and waits until the other side has handed the connection out, or says why not.
async fn connect(identity: &Identity, to: &Endpoint) -> Result<(), ConnectError> {
    let address = to.local_addr().unwrap();
    let from = Endpoint::outgoing(address, identity, options()).unwrap();
    let expect = Expect::Peer(to.who().clone());
    let connection = soon("connect", from.connect(address, &expect)).await?;
    soon("accept", to.accept()).await.unwrap();
    drop(connection);
    Ok(())
}

/// Nobody was handed out, and the refusal was reported.
async fn refused_by(listener: &Endpoint) -> String {
    let refusal = soon("a refusal", listener.next_refusal()).await.unwrap();
    let accepted = tokio::time::timeout(Duration::from_millis(30), listener.accept()).await;
    assert!(accepted.is_err(), "handed out, after: {}", refusal.reason);
    refusal.reason
}

const ALPN: &[u8] = b"lite-llm/1";

/// Every way of not belonging, against every listener: a cell is what the listener says, and
/// nothing is handed out or issued in any.
#[tokio::test]
async fn every_stranger_is_refused_by_every_listener() {
    let cluster = Cluster::start();
    let Cluster { ca, head, w1, state } = &cluster;
    let mut table: Vec<(&str, [String; 3])> = Vec::new();
    let none = || "-".to_owned();

    // What each shows who connects as a member.
    type Show = Box<dyn Fn(&Path) -> Option<support::intruder::Shown>>;
    let shows: [(&str, Show, &str); 5] = [
        ("no certificate", Box::new(|_| None), "certificate"),
        ("wrong CA", Box::new(|_| Some(forged())), "certificate"),
        (
            "no such role",
            Box::new(|state| Some(stolen(state, &["w9.admin.lite-llm", "admin.lite-llm"]))),
            "shows no certificate",
        ),
        (
            "wrong name",
            Box::new(|state| Some(stolen(state, &["W_9.worker.lite-llm", "worker.lite-llm"]))),
            "shows no certificate",
        ),
        (
            "wrong domain",
            Box::new(|state| Some(stolen(state, &["w9.worker.example.com"]))),
            "shows no certificate",
        ),
    ];
    for (what, show, word) in &shows {
        let mut cells = [none(), none(), none()];
        for (cell, listener) in cells.iter_mut().zip([head, w1]) {
            intrude(listener, ALPN, show(state.path())).await;
            *cell = refused_by(listener).await;
            assert!(cell.contains(word), "{what}: {cell}");
        }
        table.push((what, cells));
    }

    let long_ago = SystemTime::now() - 10 * DAY;
    let expired = ca.identity_valid(Role::Worker, "old", long_ago, DAY).unwrap();
    let mut cells = [none(), none(), none()];
    for (cell, listener) in cells.iter_mut().zip([head, w1]) {
        assert!(connect(&expired, listener).await.is_err());
        *cell = refused_by(listener).await;
        assert!(cell.contains("expired"), "{cell}");
    }
    table.push(("expired certificate", cells));

    let client = ca.identity(Role::Client, "c1").unwrap();
    assert!(connect(&client, w1).await.is_err());
    let refused = refused_by(w1).await;
    assert!(refused.contains("client has no business with a worker"), "{refused}");
    table.push(("wrong role", [none(), refused, none()]));

    let gone = ca.identity(Role::Worker, "gone").unwrap();
    ca.revoke("gone").unwrap();
    w1.set_revoked(head.watch_revoked().borrow().clone());
    let mut cells = [none(), none(), none()];
    for (cell, listener) in cells.iter_mut().zip([head, w1]) {
        let error = connect(&gone, listener).await.map(drop).unwrap_err().to_string();
        *cell = refused_by(listener).await;
        assert!(cell.contains("worker gone was revoked"), "{cell}");
        assert!(error.contains("revoked"), "{error}");
        // The worker learns of it from the coordinator.
        w1.set_revoked(head.watch_revoked().borrow().clone());
    }
    table.push(("revoked", cells));

    // Joiners.
    let other = ClusterCa::ephemeral().unwrap();
    let good = cluster.secret(&cluster.token(Role::Worker));
    let begin = || async { Joiner::begin(head).await.unwrap() };
    let mut joins: Vec<(&str, String, &str)> = Vec::new();

    let reason = begin().await.send(b"no request at all").await.unwrap();
    joins.push(("join: garbage", reason, "layout"));
    let foreign = cluster.secret(&other.join_token(Role::Worker, "").unwrap());
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&foreign, "worker", "w9")).await.unwrap();
    joins.push(("join: token of another CA", reason, "not one of those"));
    let joiner = begin().await;
    let wrong = Secret { number: good.number, secret: foreign.secret };
    let reason = joiner.send(&joiner.request(&wrong, "worker", "w9")).await.unwrap();
    joins.push(("join: wrong secret", reason, "secret of its join token is wrong"));
    let (first, second) = (begin().await, begin().await);
    let request = first.request(&good, "worker", "w9");
    let reason = second.send(&request).await.unwrap();
    joins.push(("join: replayed", reason, "secret of its join token is wrong"));
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&good, "client", "c9")).await.unwrap();
    joins.push(("join: token of the other role", reason, "makes workers; a client needs client"));
    let clients = cluster.secret(&cluster.token(Role::Client));
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&clients, "worker", "w9")).await.unwrap();
    joins.push(("join: ... and the other way", reason, "makes clients; a worker needs worker"));
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&good, "coordinator", "evil")).await.unwrap();
    joins.push(("join: wrong role", reason, "not as \"coordinator\""));
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&good, "worker", "a.coordinator.lite-llm")).await;
    joins.push(("join: wrong name", reason.unwrap(), "cannot name a node"));
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&good, "worker", "gone")).await.unwrap();
    joins.push(("join: revoked name", reason, "--undo"));
    // Another process makes a token that is over at once.
    cluster.elsewhere().rotate(Role::Worker, Duration::ZERO, DAY).unwrap();
    let late = cluster.secret(&cluster.token(Role::Worker));
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&late, "worker", "w9")).await.unwrap();
    joins.push(("join: expired token", reason, "expired at"));
    cluster.elsewhere().rotate(Role::Worker, DAY, Duration::ZERO).unwrap();
    let joiner = begin().await;
    let reason = joiner.send(&joiner.request(&good, "worker", "w9")).await.unwrap();
    joins.push(("join: rotated token", reason, "not one of those that are good now"));
    for (what, reason, word) in joins {
        assert!(reason.contains(word), "{what}: {reason}");
        let said = refused_by(head).await;
        assert!(said.contains(&reason), "{what}: {said} lacks {reason}");
        // A worker serves no joiners at all.
        table.push((what, [none(), none(), reason]));
    }
    intrude(w1, b"lite-llm-join/2", None).await;
    table.push(("any joiner", [none(), refused_by(w1).await, none()]));

    for (what, [head, worker, join]) in &table {
        println!("{what:30} | coordinator: {head} | worker: {worker} | join: {join}");
    }
    assert_eq!(table.len(), 20);
    // They serve on.
    let identity = cluster.join(Role::Worker, "w9").await.unwrap();
    connect(&identity, head).await.unwrap();
    connect(&identity, w1).await.unwrap();
}

#[tokio::test]
async fn a_revoked_name_loses_its_connections_and_comes_back_only_with_a_new_certificate() {
    let cluster = Cluster::start();
    let Cluster { head, w1, .. } = &cluster;
    let old = cluster.join(Role::Worker, "w2").await.unwrap();
    let from = Endpoint::bind(loopback(), &old, options()).unwrap();
    let meet = async |to: &Endpoint| {
        let (address, expect) = (to.local_addr().unwrap(), Expect::Peer(to.who().clone()));
        let near = soon("connect", from.connect(address, &expect)).await.unwrap();
        (near, soon("accept", to.accept()).await.unwrap())
    };
    let ((to_head, at_head), (to_w1, at_w1)) = (meet(head).await, meet(w1).await);
    assert_eq!(at_head.certificate(), at_w1.certificate());
    let age = SystemTime::now().duration_since(at_head.certificate().issued).unwrap();
    assert!(age < Duration::from_secs(20), "issued {age:?} ago");
    let mut news = head.watch_revoked();

    cluster.elsewhere().revoke("w2").unwrap();
    let lost = soon("the coordinator closes", to_head.closed()).await;
    assert!(lost.for_good);
    let lost = lost.to_string();
    assert!(lost.contains("worker w2 was revoked at") && lost.contains("--undo"), "{lost}");
    // What the coordinator sends to workers.
    soon("news", news.changed()).await.unwrap();
    let names = RevokedNames { names: news.borrow_and_update().clone() };
    names.check().unwrap();
    let names: RevokedNames = decode(&encode(&names)).unwrap();
    assert!(to_w1.close_reason().is_none());
    w1.set_revoked(names.names);
    let lost = soon("the worker closes", to_w1.closed()).await.to_string();
    assert!(lost.contains("revoked"), "{lost}");
    for listener in [head, w1] {
        let error = connect(&old, listener).await.unwrap_err();
        assert!(matches!(error, ConnectError::Revoked { .. }), "{error}");
    }
    let error = cluster.join(Role::Worker, "w2").await.unwrap_err().to_string();
    assert!(error.contains("lite-llm revoke w2 --undo"), "{error}");
    // Whom the worker itself would connect to.
    let address = from.local_addr().unwrap();
    let error = w1.connect(address, &Expect::worker("w2")).await.map(drop).unwrap_err().to_string();
    assert!(error.contains("worker w2 was revoked"), "{error}");

    assert!(cluster.elsewhere().undo_revoke("w3").is_err());
    cluster.elsewhere().undo_revoke("w2").unwrap();
    let error = connect(&old, head).await.unwrap_err().to_string();
    assert!(error.contains("revoked"), "the old certificate: {error}");
    let new = cluster.join(Role::Worker, "w2").await.unwrap();
    connect(&new, head).await.unwrap();
    soon("news", news.changed()).await.unwrap();
    w1.set_revoked(news.borrow().clone());
    connect(&new, w1).await.unwrap();
}

#[tokio::test]
async fn nobody_joins_under_the_name_of_the_operator() {
    let cluster = Cluster::start();
    for role in [Role::Client, Role::Worker] {
        let error = cluster.join(role, OPERATOR).await.unwrap_err().to_string();
        assert!(error.contains("nobody joins as operator"), "{error}");
    }
    // Whoever has the authority's folder needs no token.
    let operator = cluster.elsewhere().identity(Role::Client, OPERATOR).unwrap();
    connect(&operator, &cluster.head).await.unwrap();
}

#[tokio::test]
async fn a_running_coordinator_notices_a_rotation_and_certificates_go_on() {
    let cluster = Cluster::start();
    let address = cluster.head.local_addr().unwrap();
    let old = cluster.token(Role::Client);
    let member = cluster.join(Role::Client, "c1").await.unwrap();
    let hello = Hello::new(1);
    cluster.elsewhere().rotate(Role::Client, DAY, DAY).unwrap();
    join(address, &old, Role::Client, "c2", &hello).await.unwrap();
    cluster.elsewhere().rotate(Role::Client, DAY, Duration::ZERO).unwrap();
    let error = join(address, &old, Role::Client, "c3", &hello).await.unwrap_err().to_string();
    assert!(error.contains("copy the token that the coordinator wrote last"), "{error}");
    join(address, &cluster.token(Role::Client), Role::Client, "c3", &hello).await.unwrap();
    connect(&member, &cluster.head).await.unwrap();
    // The other token, and what workers share, are as they were.
    let shared = cluster.ca.identity(Role::Coordinator, "head").unwrap().control_cookie();
    let worker = cluster.join(Role::Worker, "w7").await.unwrap();
    assert!(shared.is_some() && worker.control_cookie() == shared);
    assert_eq!(member.control_cookie(), None);
}

/// Peers that finish TLS, say hello, and sit there.
async fn silent_joiners(to: &Endpoint, count: usize) -> Vec<Joiner> {
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let mut joiners = JoinSet::new();
    for _ in 0..count {
        let (to, endpoint) = (to.clone(), endpoint.clone());
        joiners.spawn(async move { Joiner::begin_from(endpoint, &to).await.ok() });
    }
    joiners.join_all().await.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_joiners_keep_out_neither_members_nor_joiners_and_are_told_to_come_again() {
    let cluster = Cluster::start();
    let member = cluster.join(Role::Worker, "w2").await.unwrap();
    let mut silent = silent_joiners(&cluster.head, 160).await;
    let mut longest = Duration::ZERO;
    for i in 0..30 {
        let started = Instant::now();
        connect(&member, &cluster.head).await.unwrap();
        let elapsed = started.elapsed();
        assert!(elapsed < Duration::from_secs(1), "a member waited for {elapsed:?}");
        let client = cluster.join(Role::Client, &format!("c{i}")).await.unwrap();
        connect(&client, &cluster.head).await.unwrap();
        longest = longest.max(started.elapsed());
        silent.extend(silent_joiners(&cluster.head, 16).await);
    }
    // Less than the silent may stay where nobody wants their place.
    assert!(
        longest < PROOF_TIMEOUT - Duration::from_millis(200),
        "a joiner waited for {longest:?}"
    );
    println!("the longest wait among silent joiners: {longest:?}");
    let ends: Vec<_> = silent.iter().filter_map(|joiner| joiner.quic.close_reason()).collect();
    // The code of "busy", which joiners of every release know.
    let busy = |end: &&quinn::ConnectionError| match end {
        quinn::ConnectionError::ApplicationClosed(close) => {
            close.error_code == 3u32.into() && close.reason.starts_with(b"busy, come again in ms: ")
        }
        _ => false,
    };
    assert!(ends.iter().filter(busy).count() > 30, "{ends:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_at_once_all_get_in_and_the_impatient_are_told_busy() {
    let cluster = Arc::new(Cluster::start());
    let address = cluster.head.local_addr().unwrap();
    let rush = async |patience: Duration, count: usize| {
        let mut rush = JoinSet::new();
        for i in 0..count {
            let token = cluster.token(Role::Client);
            rush.spawn(async move {
                let (role, name) = (Role::Client, format!("c{i}"));
                join_within(patience, address, &token, role, &name, &Hello::new(1)).await
            });
        }
        let joined = rush.join_all().await;
        let (inside, outside): (Vec<_>, Vec<_>) = joined.into_iter().partition(Result::is_ok);
        (inside.len(), outside.into_iter().filter_map(Result::err).collect::<Vec<_>>())
    };
    let (_, errors) = soon("a rush without patience", rush(Duration::ZERO, 300)).await;
    assert!(!errors.is_empty(), "300 at once are more than {PER_SOURCE_MAX} of {JOINS_MAX}");
    // On a slow machine some hear nothing in time, but nobody is refused.
    let busy = errors.iter().filter(|error| matches!(error, JoinError::Busy { .. })).count();
    assert!(busy > 0, "{errors:?}");
    assert!(!errors.iter().any(|error| matches!(error, JoinError::Refused { .. })), "{errors:?}");
    let started = Instant::now();
    let (inside, errors) = soon("a rush", rush(Duration::from_secs(30), 300)).await;
    assert!(errors.is_empty(), "{inside} of 300, then {errors:?}");
    println!("300 joiners at once: {:?}", started.elapsed());
}

/// Somebody whose first packet is honest, and who never goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_never_end_keep_nobody_out() {
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    // A relay that forwards what clients send first, and drops every answer.
    let first = UdpSocket::bind(loopback()).unwrap();
    first.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let relay = first.local_addr().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stops = stop.clone();
    let relaying = thread::spawn(move || {
        let mut packet = [0; 65_536];
        let mut onwards = Vec::new();
        while !stops.load(Relaxed) {
            let Ok((bytes, _)) = first.recv_from(&mut packet) else { continue };
            // Each from an address of its own, as far as a host has them.
            let socket = UdpSocket::bind(loopback()).unwrap();
            let _ = socket.send_to(&packet[..bytes], address);
            onwards.push(socket);
            if onwards.len() > 500 {
                onwards.clear();
            }
        }
    });
    let worker_token = ca.join_token(Role::Worker, "").unwrap();
    let mut stalled = tokio::task::JoinSet::new();
    for i in 0..150 {
        let token = worker_token.clone();
        stalled.spawn(async move {
            let (role, name, hello) = (Role::Worker, format!("s{i}"), Hello::new(1));
            join_within(Duration::ZERO, relay, &token, role, &name, &hello).await.is_ok()
        });
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    let token = ca.join_token(Role::Client, "").unwrap();
    let mut longest = Duration::ZERO;
    for i in 0..10 {
        let begun = Instant::now();
        let name = format!("c{i}");
        soon("join", join(address, &token, Role::Client, &name, &Hello::new(1))).await.unwrap();
        longest = longest.max(begun.elapsed());
    }
    println!("the longest wait among stalled handshakes: {longest:?}");
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    assert!(stalled.join_all().await.into_iter().all(|joined| !joined));
    stop.store(true, Relaxed);
    relaying.join().unwrap();
}

#[test]
fn names_of_the_list_are_bounded() {
    let revoked = |i: u64| Revoked { name: format!("w{i}"), until: i, barred: true };
    let names = RevokedNames { names: (0..5000).map(revoked).collect() };
    assert!(names.check().unwrap_err().to_string().contains("4096"));
}
