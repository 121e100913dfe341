//! Who gets in: every way of not belonging, against every kind of listener. No stream of such a
//! peer is ever handed out, and both sides are told why.

mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use lite_llm_transport::{
    connection::StreamKind,
    endpoint::{ConnectError, Endpoint, Expect, Options},
    identity::{CLOCK_SKEW_MAX, ClusterCa, Identity, Role},
    join::JoinError,
    session::Hello,
    token::JoinToken,
};
use support::{
    intruder::{forged, intrude},
    *,
};

/// Both kinds of listeners of one cluster.
fn listeners(ca: &Arc<ClusterCa>) -> [Endpoint; 2] {
    [coordinator(ca), worker(ca, "w1")]
}

/// The listener names its reason, and hands out nothing.
async fn refused(listener: &Endpoint, words: &[&str]) {
    let refusal = soon("a refusal", listener.next_refusal()).await.unwrap();
    for word in words {
        assert!(refusal.reason.contains(word), "{:?} lacks {word:?}", refusal.reason);
    }
    let accepted = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(accepted.is_err(), "a refused peer was handed out");
}

async fn connect(identity: &Identity, to: &Endpoint, hello: Hello) -> Result<(), ConnectError> {
    let from = Endpoint::bind(loopback(), identity, Options::new(hello)).unwrap();
    let expect = Expect::Peer(to.who().clone());
    soon("connect", from.connect(to.local_addr().unwrap(), &expect)).await.map(drop)
}

async fn join(
    address: SocketAddr,
    token: &JoinToken,
    role: Role,
    name: &str,
    hello: Hello,
) -> Result<Identity, JoinError> {
    soon("join", lite_llm_transport::join::join(address, token, role, name, &hello)).await
}

#[tokio::test]
async fn members_connect_and_know_each_other() {
    let ca = authority();
    let (head, w1) = (coordinator(&ca), worker(&ca, "w1"));
    let address = head.local_addr().unwrap();
    let expect = Expect::coordinator();
    let (near, far) =
        soon("connect", async { tokio::join!(w1.connect(address, &expect), head.accept()) }).await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(near.peer(), head.who());
    assert_eq!(far.peer(), w1.who());
    assert_eq!(far.hello(), &Hello::new(1));
}

#[tokio::test]
async fn without_a_certificate_nothing_is_served() {
    let ca = authority();
    for listener in listeners(&ca) {
        intrude(&listener, b"lite-llm/1", None).await;
        refused(&listener, &[]).await;
    }
}

#[tokio::test]
async fn the_join_protocol_serves_nothing_but_joining() {
    let ca = authority();
    let head = coordinator(&ca);
    let why = intrude(&head, b"lite-llm-join/2", None).await;
    assert!(why.contains("closed") || why.contains("joiner"), "{why}");
    refused(&head, &["joiner"]).await;
    // A worker does not serve joins at all.
    let w1 = worker(&ca, "w1");
    intrude(&w1, b"lite-llm-join/2", None).await;
    refused(&w1, &[]).await;
    // A joiner of an earlier release is told so.
    let why = intrude(&head, b"lite-llm-join/1", None).await;
    assert!(why.contains("install the same release"), "{why}");
}

#[tokio::test]
async fn an_unknown_protocol_is_refused() {
    let ca = authority();
    for listener in listeners(&ca) {
        intrude(&listener, b"h3", None).await;
        refused(&listener, &[]).await;
    }
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let ca = authority();
    for listener in listeners(&ca) {
        intrude(&listener, b"lite-llm/1", Some(forged())).await;
        refused(&listener, &["certificate"]).await;
    }
}

#[tokio::test]
async fn a_member_refuses_a_listener_of_another_cluster() {
    let (ca, other) = (authority(), authority());
    let stranger = other.identity(Role::Worker, "w1").unwrap();
    for listener in listeners(&ca) {
        let error = connect(&stranger, &listener, Hello::new(1)).await.unwrap_err().to_string();
        assert!(error.contains("another cluster"), "{error}");
    }
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_both_sides() {
    let ca = authority();
    let day = Duration::from_secs(24 * 3600);
    let long_ago = SystemTime::now() - 10 * day;
    let expired = ca.identity_valid(Role::Worker, "old", long_ago, day).unwrap();
    for listener in listeners(&ca) {
        let error = connect(&expired, &listener, Hello::new(1)).await.unwrap_err().to_string();
        assert!(error.contains("expired"), "{error}");
        refused(&listener, &["certificate"]).await;
    }
    let later = SystemTime::now() + CLOCK_SKEW_MAX + day;
    let early = ca.identity_valid(Role::Worker, "early", later, day).unwrap();
    let listener = worker(&ca, "w1");
    assert!(connect(&early, &listener, Hello::new(1)).await.is_err());
    // An expired listener is refused by who connects.
    let listener = Endpoint::bind(loopback(), &expired, options()).unwrap();
    let member = ca.identity(Role::Worker, "w2").unwrap();
    let error = connect(&member, &listener, Hello::new(1)).await.unwrap_err().to_string();
    assert!(error.contains("expired"), "{error}");
}

#[tokio::test]
async fn somebody_else_at_an_address_is_refused() {
    let ca = authority();
    let (w1, w2) = (worker(&ca, "w1"), worker(&ca, "w2"));
    let address = w2.local_addr().unwrap();
    for expect in [Expect::worker("w3"), Expect::coordinator()] {
        let error = soon("connect", w1.connect(address, &expect)).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
    }
}

#[tokio::test]
async fn a_client_cannot_pose_as_a_listener() {
    let ca = authority();
    let client = ca.identity(Role::Client, "c1").unwrap();
    // A client's endpoint does not listen, whatever address it has.
    let endpoint = Endpoint::bind(loopback(), &client, options()).unwrap();
    let address = endpoint.local_addr().unwrap();
    let w1 = worker(&ca, "w1");
    let started = Instant::now();
    let error = soon("connect", w1.connect(address, &Expect::Role(Role::Client))).await;
    assert!(error.is_err());
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn another_version_is_refused_and_both_versions_are_named_on_both_sides() {
    let ca = authority();
    let w2 = ca.identity(Role::Worker, "w2").unwrap();
    for listener in listeners(&ca) {
        let us = listener.who().role.as_str();
        let newer = Hello { protocol: 5, ..Hello::new(1) };
        let error = connect(&w2, &listener, newer).await.unwrap_err().to_string();
        assert!(error.contains("protocol 4") && error.contains("this worker 5"), "{error}");
        let ours = format!("this {us} 4");
        refused(&listener, &["worker w2 speaks protocol 5", &ours, "same release"]).await;

        let error = connect(&w2, &listener, Hello::new(9)).await.unwrap_err().to_string();
        assert!(error.contains("contract 1") && error.contains("worker by 9"), "{error}");
        refused(&listener, &["contract 9"]).await;
    }
}

#[tokio::test]
async fn a_role_opens_only_its_own_streams() {
    let ca = authority();
    let head = coordinator(&ca);
    let identity = ca.identity(Role::Client, "c1").unwrap();
    let address = head.local_addr().unwrap();
    let client = Endpoint::outgoing(address, &identity, options()).unwrap();
    let expect = Expect::coordinator();
    let (near, far) =
        soon("connect", async { tokio::join!(client.connect(address, &expect), head.accept()) })
            .await;
    let (near, far) = (near.unwrap(), far.unwrap());
    for kind in [StreamKind::Control, StreamKind::Experts, StreamKind::Job, StreamKind::Weights] {
        let error = near.open_stream(kind).await.err().unwrap().to_string();
        assert!(error.contains("client may not open"), "{error}");
    }
    let _stream = near.open_stream(StreamKind::Client).await.unwrap();
    assert_eq!(soon("accept", far.accept_stream()).await.unwrap().kind, StreamKind::Client);
}

#[tokio::test]
async fn a_token_makes_its_role_and_no_other() {
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    for (role, name) in [(Role::Worker, "w7"), (Role::Client, "c7")] {
        let token = ca.join_token(role, "").unwrap();
        let joining = join(address, &token, role, name, Hello::new(1));
        let identity = joining.await.unwrap();
        assert_eq!((identity.who().role, identity.who().name.as_str()), (role, name));
        // Only nodes are given what nodes share.
        let shared = ca.identity(Role::Coordinator, "head").unwrap().control_cookie();
        assert_eq!(identity.control_cookie(), shared.filter(|_| role == Role::Worker));
        connect(&identity, &head, Hello::new(1)).await.unwrap();
        assert_eq!(soon("accept", head.accept()).await.unwrap().peer(), identity.who());
    }
    assert!(ca.join_token(Role::Coordinator, "").is_err());
    let token = ca.join_token(Role::Worker, "").unwrap();
    let joining = join(address, &token, Role::Coordinator, "evil", Hello::new(1));
    let error = joining.await.unwrap_err();
    assert!(error.to_string().contains("not as \"coordinator\""), "{error}");
    refused(&head, &["not as"]).await;
    for name in ["", "a.coordinator.lite-llm", "W1", "-a", &"a".repeat(64)] {
        let joining = join(address, &token, Role::Worker, name, Hello::new(1));
        assert!(matches!(joining.await, Err(JoinError::Identity(_))), "{name:?}");
    }
}

#[tokio::test]
async fn a_wrong_secret_is_refused_on_both_sides() {
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    // The right certificate with another cluster's secret.
    let (mine, theirs) = (folder.path().join("mine"), folder.path().join("theirs"));
    ca.join_token(Role::Worker, "").unwrap().write(&mine).unwrap();
    authority().join_token(Role::Worker, "").unwrap().write(&theirs).unwrap();
    let line = |path, name: &str| {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().find(|line| line.starts_with(name)).unwrap().to_owned()
    };
    let text = std::fs::read_to_string(&mine).unwrap();
    let text = text.replace(&line(&mine, "secret"), &line(&theirs, "secret"));
    let body = text[..text.find("check").unwrap()].to_owned();
    let check = blake3::hash(body.as_bytes()).to_hex();
    std::fs::write(&mine, format!("{body}check {}\n", &check[..16])).unwrap();
    let token = JoinToken::read(&mine).unwrap();
    let joining = join(address, &token, Role::Worker, "w1", Hello::new(1));
    let error = joining.await.unwrap_err().to_string();
    assert!(error.contains("secret of its join token is wrong"), "{error}");
    refused(&head, &["secret"]).await;
}

#[tokio::test]
async fn a_token_of_another_cluster_is_noticed_by_the_joiner() {
    let (ca, other) = (authority(), authority());
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    let token = other.join_token(Role::Worker, "").unwrap();
    let joining = join(address, &token, Role::Worker, "w1", Hello::new(1));
    let error = joining.await.unwrap_err();
    assert!(matches!(error, JoinError::OtherCluster { .. }), "{error}");
    assert!(error.to_string().contains(&other.cluster()), "{error}");
}

#[tokio::test]
async fn a_joiner_of_another_version_is_told_so() {
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    let token = ca.join_token(Role::Worker, "").unwrap();
    let newer = Hello { protocol: 5, ..Hello::new(1) };
    let joining = join(address, &token, Role::Worker, "w1", newer);
    let error = joining.await.unwrap_err().to_string();
    assert!(error.contains("protocol 4") && error.contains("this worker 5"), "{error}");
    refused(&head, &["protocol 5", "this coordinator 4"]).await;
}

#[tokio::test]
async fn nobody_there_is_an_error_within_its_deadline() {
    let ca = authority();
    let socket = std::net::UdpSocket::bind(loopback()).unwrap();
    let address = socket.local_addr().unwrap();
    let (token, started) = (ca.join_token(Role::Worker, "").unwrap(), Instant::now());
    let joining = join(address, &token, Role::Worker, "w1", Hello::new(1));
    let error = joining.await.unwrap_err().to_string();
    assert!(error.contains("is it running"), "{error}");
    let w1 = worker(&ca, "w1");
    let expect = Expect::coordinator();
    let error = soon("connect", w1.connect(address, &expect)).await.unwrap_err().to_string();
    assert!(error.contains("is it running"), "{error}");
    // A joiner tries again, for there may be a crowd; a member's connection ends with its first try.
    let patience = lite_llm_transport::patience::BUSY_PATIENCE;
    assert!(started.elapsed() < patience + Duration::from_secs(20));
}

#[tokio::test]
async fn closing_does_not_wait_for_a_handshake_with_nobody() {
    let ca = authority();
    let w1 = worker(&ca, "w1");
    let silent = std::net::UdpSocket::bind(loopback()).unwrap();
    let (to, expect) = (silent.local_addr().unwrap(), Expect::Peer(coordinator(&ca).who().clone()));
    let dial = tokio::spawn({
        let w1 = w1.clone();
        async move { w1.connect(to, &expect).await.map(drop) }
    });
    let mut datagram = [0; 2048];
    silent.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    tokio::task::spawn_blocking(move || silent.recv_from(&mut datagram).unwrap()).await.unwrap();
    let begun = Instant::now();
    w1.close("the test ends").await;
    // A process that is told to end has a second to leave in good order.
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
    dial.abort();
}
