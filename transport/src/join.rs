//! Joining: how the holder of a token gets a certificate of the cluster.
//!
//! The joiner verifies the coordinator against the token's certificate, shows none itself, and
//! speaks a protocol on which nothing else is served. It proves the token's secret by a keyed hash
//! over keying material of this very TLS session, so the secret never crosses the wire and a proof
//! is of no use elsewhere. It sends a signing request: its private key never leaves it.
//!
//! Invariants: the role is that of the secret that was proven; only workers and clients join;
//! nothing of a request but the number of its secret is looked at before its proof; who has proven
//! nothing has [`PROOF_TIMEOUT`] for it, and less when others wait.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use rkyv::{Archive, Deserialize, Serialize};
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;

use crate::{
    connection::{CLOSE_DONE, CLOSE_REFUSED, busy_in, describe, greet, is_silence},
    identity::{ClusterCa, Identity, IdentityError, OPERATOR, Role, checked_name, signing_request},
    messages::{decode, encode},
    moment::utc,
    patience::{BUSY_PATIENCE, Hint, Patience},
    secrets::SecretId,
    session::{Hello, Session, SessionError},
    socket,
    tls::{self, BindError},
    token::JoinToken,
};

/// How long one try to join may take.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a joiner may take from the end of TLS to its proof. Less than [`HELLO_TIMEOUT`], so that
/// one that is merely slow is told to come again, and not that it is no joiner.
///
/// [`HELLO_TIMEOUT`]: crate::session::HELLO_TIMEOUT
pub const PROOF_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long a joiner may take to read the answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest request or reply, in bytes.
const JOIN_BYTES_MAX: usize = 16 << 10;

const EXPORT_LABEL: &[u8] = b"EXPORTER-lite-llm-join";
const PROOF_CONTEXT: &[u8] = b"lite-llm join proof 2";

/// The cluster could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No coordinator there.
    #[error(
        "no coordinator answered at {address} ({reason}); is it running, and is the address right?"
    )]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// Why not.
        reason: String,
        /// Whether there was no answer at all.
        silent: bool,
    },
    /// No place for another joiner at present.
    #[error(
        "the coordinator at {address} is busy with other joiners and had no place for this one, \
         try after try; try again later, or for longer"
    )]
    Busy {
        /// Where.
        address: SocketAddr,
        /// When to come again, if it was told.
        retry_after: Option<Duration>,
    },
    /// Another cluster's coordinator.
    #[error(
        "the coordinator at {address} is not the one of this token (cluster {cluster}): {reason}; \
         copy the token that it wrote when it started"
    )]
    OtherCluster {
        /// Where.
        address: SocketAddr,
        /// The token's cluster.
        cluster: String,
        /// What TLS found.
        reason: String,
    },
    /// Another release.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It said no.
    #[error("the coordinator at {address} refused to let {name} join: {reason}")]
    Refused {
        /// Where.
        address: SocketAddr,
        /// Who asked.
        name: String,
        /// Its reason.
        reason: String,
    },
    /// It said nothing.
    #[error("the coordinator at {address} did not answer within {JOIN_TIMEOUT:?}")]
    TimedOut {
        /// Where.
        address: SocketAddr,
    },
    /// A name or key of ours.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A socket or TLS of ours.
    #[error(transparent)]
    Bind(#[from] BindError),
}

impl JoinError {
    fn hint(&self) -> Hint {
        match self {
            JoinError::Busy { retry_after, .. } => Hint::Busy(*retry_after),
            JoinError::Unreachable { silent: true, .. }
            | JoinError::Session(SessionError::TimedOut { .. })
            | JoinError::TimedOut { .. } => Hint::Silence,
            _ => Hint::Final,
        }
    }
}

#[derive(Archive, Serialize, Deserialize)]
struct JoinRequest {
    token: SecretId,
    proof: [u8; 32],
    name: String,
    role: String,
    request: Vec<u8>,
}

#[derive(Archive, Serialize, Deserialize)]
enum JoinReply {
    Accepted {
        certificate: Vec<u8>,
        /// For workers: what they share with the coordinator.
        shared: Option<[u8; 32]>,
    },
    Refused {
        reason: String,
    },
}

/// Joins the cluster of a token and returns an identity, kept in memory only. Told that there is no
/// room, it tries again for [`BUSY_PATIENCE`].
pub async fn join(
    address: SocketAddr,
    token: &JoinToken,
    role: Role,
    name: &str,
    hello: &Hello,
) -> Result<Identity, JoinError> {
    join_within(BUSY_PATIENCE, address, token, role, name, hello).await
}

/// Like [`join`], with another patience: after it no further try is begun.
pub async fn join_within(
    patience: Duration,
    address: SocketAddr,
    token: &JoinToken,
    role: Role,
    name: &str,
    hello: &Hello,
) -> Result<Identity, JoinError> {
    let mut patience = Patience::new(tokio::time::Instant::now().into_std(), patience);
    loop {
        match join_once(address, token, role, name, hello).await {
            Err(error) if patience.try_again(error.hint()).await => {}
            ended => return ended,
        }
    }
}

async fn join_once(
    address: SocketAddr,
    token: &JoinToken,
    role: Role,
    name: &str,
    hello: &Hello,
) -> Result<Identity, JoinError> {
    let who = checked_name(role, name)?;
    let (request, key) = signing_request()?;
    let endpoint = socket::outgoing(address)?;
    let config = socket::client_config(tls::joiner(token.certificate())?, address);
    let joining = async {
        let unreachable = |reason, silent| JoinError::Unreachable { address, reason, silent };
        let connecting = endpoint
            .connect_with(config, address, &Role::Coordinator.domain())
            .map_err(|e| unreachable(e.to_string(), false))?;
        let quic = connecting.await.map_err(|error| match (busy_in(&error), &error) {
            (Some(busy), _) => JoinError::Busy { address, retry_after: busy.retry_after },
            (None, quinn::ConnectionError::TransportError(_)) => JoinError::OtherCluster {
                address,
                cluster: token.cluster(),
                reason: describe(&error),
            },
            _ => unreachable(describe(&error), is_silence(&error)),
        })?;
        // Whatever fails from here on fails because it had no room, if it says so.
        let ended = || {
            let error = quic.close_reason()?;
            match busy_in(&error) {
                Some(busy) => Some(JoinError::Busy { address, retry_after: busy.retry_after }),
                None => is_silence(&error).then(|| unreachable(describe(&error), true)),
            }
        };
        let peer = format!("the coordinator at {address}");
        let session = Session::new(role, peer, hello.clone()).computing(role == Role::Worker);
        let greeted = greet(&quic, true, session).await;
        greeted.map_err(|error| ended().unwrap_or_else(|| error.into()))?;
        let reply = ask(&quic, token, role, name, request).await;
        let refused = |reason| JoinError::Refused { address, name: name.to_owned(), reason };
        let reply = reply.map_err(|error| {
            let reason = || quic.close_reason().map_or(error, |error| describe(&error));
            ended().unwrap_or_else(|| refused(reason()))
        })?;
        quic.close(CLOSE_DONE, b"joined");
        match reply {
            JoinReply::Accepted { certificate, shared } => {
                let leaf = CertificateDer::from(certificate);
                Ok(Identity::new(who, leaf, &key, token.certificate().clone(), shared))
            }
            JoinReply::Refused { reason } => Err(refused(reason)),
        }
    };
    let joined = timeout(JOIN_TIMEOUT, joining).await;
    endpoint.close(CLOSE_DONE, b"joined");
    let _ = timeout(Duration::from_millis(200), endpoint.wait_idle()).await;
    joined.unwrap_or(Err(JoinError::TimedOut { address }))
}

async fn ask(
    quic: &quinn::Connection,
    token: &JoinToken,
    role: Role,
    name: &str,
    request: Vec<u8>,
) -> Result<JoinReply, String> {
    let id = token.id();
    let proof = prove(quic, token.secret(), &id, role.as_str(), name, &request)?;
    let (name, role) = (name.to_owned(), role.as_str().to_owned());
    let request = JoinRequest { token: id, proof: *proof.as_bytes(), name, role, request };
    let (mut send, mut recv) = quic.open_bi().await.map_err(|e| describe(&e))?;
    send.write_all(&encode(&request)).await.map_err(|e| e.to_string())?;
    send.finish().map_err(|e| e.to_string())?;
    let reply = recv.read_to_end(JOIN_BYTES_MAX).await.map_err(|e| e.to_string())?;
    decode(&reply).map_err(|e| e.to_string())
}

/// What was decided about a joiner, before it is told.
pub(crate) struct Decision {
    joiner: String,
    send: quinn::SendStream,
    decided: Result<Joined, String>,
}

struct Joined {
    who: String,
    certificate: Vec<u8>,
    shared: Option<[u8; 32]>,
}

/// Hears one joiner, on a connection that speaks the join protocol, as far as its proof. The caller
/// bounds its time.
pub(crate) async fn hear(
    quic: &quinn::Connection,
    ca: &ClusterCa,
    hello: &Hello,
) -> Result<Decision, String> {
    let joiner = format!("the joiner at {}", quic.remote_address());
    // Whether it is a client is not known yet; a worker is told when it has joined, too.
    let session = Session::new(Role::Coordinator, &joiner, hello.clone()).computing(false);
    greet(quic, false, session).await.map_err(|error| error.to_string())?;
    let (send, mut recv) = quic.accept_bi().await.map_err(|e| describe(&e))?;
    let request = recv.read_to_end(JOIN_BYTES_MAX).await.map_err(|e| e.to_string())?;
    let decided = decide(quic, ca, &request);
    Ok(Decision { joiner, send, decided })
}

impl Decision {
    /// Whether it proved a secret and may come in.
    pub(crate) fn is_accepted(&self) -> bool {
        self.decided.is_ok()
    }

    /// Tells the joiner. Returns who joined, or why nobody did.
    pub(crate) async fn tell(self, quic: &quinn::Connection) -> Result<String, String> {
        let Self { joiner, mut send, decided } = self;
        let (reply, outcome) = match decided {
            Ok(Joined { who, certificate, shared }) => {
                (JoinReply::Accepted { certificate, shared }, Ok(who))
            }
            Err(reason) => {
                let outcome = Err(format!("{joiner} was refused: {reason}"));
                (JoinReply::Refused { reason }, outcome)
            }
        };
        let telling = async {
            send.write_all(&encode(&reply)).await.map_err(|e| e.to_string())?;
            send.finish().map_err(|e| e.to_string())?;
            // The joiner closes when it has read the reply.
            quic.closed().await;
            Ok::<_, String>(())
        };
        let told = timeout(REPLY_TIMEOUT, telling).await;
        quic.close(CLOSE_REFUSED, b"");
        match told {
            Ok(Ok(())) => outcome,
            Ok(Err(reason)) => outcome.and(Err(reason)),
            Err(_) => outcome.and(Err(format!("{joiner} did not take its answer"))),
        }
    }
}

/// Checks the proof, then issues what was asked for.
fn decide(quic: &quinn::Connection, ca: &ClusterCa, request: &[u8]) -> Result<Joined, String> {
    let JoinRequest { token, proof, name, role, request } =
        decode(request).map_err(|error| error.to_string())?;
    let secrets = ca.secrets().map_err(|error| {
        // What is wrong with its files is not a stranger's business.
        tracing::error!(%error, "nobody can join");
        "it cannot read the secrets of its tokens; its log says why".to_owned()
    })?;
    let secret = secrets.find(&token).ok_or(
        "its join token is not one of those that are good now; copy the token that the coordinator \
         wrote last",
    )?;
    let expected = prove(quic, &secret.secret, &token, &role, &name, &request)?;
    // Compared in constant time: that is what `Hash` does.
    if expected != blake3::Hash::from_bytes(proof) {
        return Err("the secret of its join token is wrong; copy the token that the coordinator \
                    wrote when it started"
            .to_owned());
    }
    let now = SystemTime::now();
    if secret.has_expired(now) {
        let (made, ended) = (secret.role, utc(secret.expires));
        return Err(format!(
            "its join token expired at {ended}; make a new one where the coordinator is: \
             lite-llm token {made} --rotate"
        ));
    }
    let asked = match Role::from_name(&role) {
        Some(role @ (Role::Worker | Role::Client)) => role,
        _ => return Err(format!("one joins as worker or client, not as {role:?}")),
    };
    if asked != secret.role {
        let made = secret.role;
        return Err(format!("this token makes {made}s; a {asked} needs {asked}.token"));
    }
    let revoked = ca.revoked().map_err(|error| {
        tracing::error!(%error, "nobody can join");
        "it cannot read its list of revoked names; its log says why".to_owned()
    })?;
    if name == OPERATOR {
        return Err(format!("nobody joins as {OPERATOR}: choose another name"));
    }
    if let Some(reason) = revoked.bars(&name) {
        return Err(reason);
    }
    let certificate = ca.issue(&request, asked, &name, now).map_err(|error| error.to_string())?;
    let shared = (asked == Role::Worker).then_some(secrets.shared);
    Ok(Joined { who: format!("{asked} {name}"), certificate, shared })
}

/// A keyed hash over this TLS session and everything that is asked for.
fn prove(
    quic: &quinn::Connection,
    secret: &[u8; 32],
    token: &SecretId,
    role: &str,
    name: &str,
    request: &[u8],
) -> Result<blake3::Hash, String> {
    let mut session = [0; 32];
    quic.export_keying_material(&mut session, EXPORT_LABEL, b"")
        .map_err(|_| "TLS exports no keying material".to_owned())?;
    let mut hasher = blake3::Hasher::new_keyed(secret);
    for part in [PROOF_CONTEXT, &session, token, role.as_bytes(), name.as_bytes(), request] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::endpoint::{Endpoint, Options};

    /// A connection that speaks the join protocol and has introduced itself.
    async fn greeted(head: &Endpoint, token: &JoinToken) -> (quinn::Endpoint, quinn::Connection) {
        let address = head.local_addr().unwrap();
        let endpoint = socket::outgoing(address).unwrap();
        let tls = tls::joiner(token.certificate()).unwrap();
        let config = socket::client_config(tls, address);
        let domain = Role::Coordinator.domain();
        let quic = endpoint.connect_with(config, address, &domain).unwrap().await.unwrap();
        greet(&quic, true, Session::new(Role::Worker, "head", Hello::new(1))).await.unwrap();
        (endpoint, quic)
    }

    async fn send(quic: &quinn::Connection, request: &[u8]) -> JoinReply {
        let (mut send, mut recv) = quic.open_bi().await.unwrap();
        send.write_all(request).await.unwrap();
        send.finish().unwrap();
        decode(&recv.read_to_end(JOIN_BYTES_MAX).await.unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_proof_is_worth_nothing_in_another_session_or_for_another_request() {
        let ca = Arc::new(ClusterCa::ephemeral().unwrap());
        let identity = ca.identity(Role::Coordinator, "head").unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let options = Options::new(Hello::new(1));
        let head = Endpoint::bind_coordinator(address, &identity, ca.clone(), options).unwrap();
        let token = ca.join_token(Role::Worker, "").unwrap();
        let request = |quic: &quinn::Connection, proven: &str, asked: &str| {
            let (csr, _key) = signing_request().unwrap();
            let id = token.id();
            let proof = prove(quic, token.secret(), &id, "worker", proven, &csr).unwrap();
            let (name, role) = (asked.to_owned(), "worker".to_owned());
            let proof = *proof.as_bytes();
            encode(&JoinRequest { token: id, proof, name, role, request: csr })
        };
        let (_first_endpoint, first) = greeted(&head, &token).await;
        let (_second_endpoint, second) = greeted(&head, &token).await;
        let (_third_endpoint, third) = greeted(&head, &token).await;
        let good = request(&first, "w1", "w1");
        let other_name = request(&third, "w1", "w2");
        assert!(matches!(send(&second, &good).await, JoinReply::Refused { .. }), "replayed");
        assert!(matches!(send(&third, &other_name).await, JoinReply::Refused { .. }), "renamed");
        assert!(matches!(send(&first, &good).await, JoinReply::Accepted { .. }));
    }
}
