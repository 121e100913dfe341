//! Joining: how the holder of a token gets a certificate of the cluster.
//!
//! The joiner verifies the coordinator against the token's certificate, shows none itself, and
//! speaks a protocol on which nothing else is served. It proves the secret by a keyed hash over
//! keying material of this very TLS session, so the secret never crosses the wire and a proof is
//! of no use elsewhere. It sends a signing request: its private key never leaves it.
//!
//! Invariants: only workers and clients join; nothing of a request is looked at before its proof.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rkyv::{Archive, Deserialize, Serialize};
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;

use crate::{
    connection::{CLOSE_DONE, CLOSE_REFUSED, describe, greet},
    endpoint,
    identity::{ClusterCa, Identity, IdentityError, Role, checked_name, signing_request},
    messages::{decode, encode},
    session::{Hello, Session, SessionError},
    tls::{self, BindError},
    token::JoinToken,
};

/// How long joining may take.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(8);
/// Longest request or reply, in bytes.
const JOIN_BYTES_MAX: usize = 16 << 10;

const EXPORT_LABEL: &[u8] = b"EXPORTER-lite-llm-join";
const PROOF_CONTEXT: &[u8] = b"lite-llm join proof 1";

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

#[derive(Archive, Serialize, Deserialize)]
struct JoinRequest {
    proof: [u8; 32],
    name: String,
    role: String,
    request: Vec<u8>,
}

#[derive(Archive, Serialize, Deserialize)]
enum JoinReply {
    Accepted { certificate: Vec<u8> },
    Refused { reason: String },
}

/// Joins the cluster of a token and returns an identity, kept in memory only.
pub async fn join(
    address: SocketAddr,
    token: &JoinToken,
    role: Role,
    name: &str,
    hello: &Hello,
) -> Result<Identity, JoinError> {
    let who = checked_name(role, name)?;
    let (request, key) = signing_request()?;
    let endpoint = endpoint::outgoing(address)?;
    let config = endpoint::client_config(tls::joiner(token.certificate())?, address);
    let joining = async {
        let connecting = endpoint
            .connect_with(config, address, &Role::Coordinator.domain())
            .map_err(|e| JoinError::Unreachable { address, reason: e.to_string() })?;
        let quic = connecting.await.map_err(|error| match &error {
            quinn::ConnectionError::TransportError(_) => JoinError::OtherCluster {
                address,
                cluster: token.cluster(),
                reason: describe(&error),
            },
            _ => JoinError::Unreachable { address, reason: describe(&error) },
        })?;
        let peer = format!("the coordinator at {address}");
        greet(&quic, true, Session::new(role, peer, hello.clone())).await?;
        let reply = ask(&quic, token, role, name, request).await;
        let refused = |reason| JoinError::Refused { address, name: name.to_owned(), reason };
        let reply = reply.map_err(|error| {
            refused(quic.close_reason().map_or(error, |error| describe(&error)))
        })?;
        quic.close(CLOSE_DONE, b"joined");
        match reply {
            JoinReply::Accepted { certificate } => {
                let leaf = CertificateDer::from(certificate);
                Ok(Identity::new(who, leaf, &key, token.certificate().clone()))
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
    let proof = prove(quic, token.secret(), role.as_str(), name, &request)?;
    let (name, role) = (name.to_owned(), role.as_str().to_owned());
    let request = encode(&JoinRequest { proof: *proof.as_bytes(), name, role, request });
    let (mut send, mut recv) = quic.open_bi().await.map_err(|e| describe(&e))?;
    send.write_all(&request).await.map_err(|e| e.to_string())?;
    send.finish().map_err(|e| e.to_string())?;
    let reply = recv.read_to_end(JOIN_BYTES_MAX).await.map_err(|e| e.to_string())?;
    decode(&reply).map_err(|e| e.to_string())
}

/// Serves one joiner, on a connection that speaks the join protocol.
///
/// Returns who joined, or why nobody did. The caller bounds its time.
pub(crate) async fn serve(
    quic: &quinn::Connection,
    ca: &Arc<ClusterCa>,
    hello: &Hello,
) -> Result<String, String> {
    let joiner = format!("the joiner at {}", quic.remote_address());
    let session = Session::new(Role::Coordinator, &joiner, hello.clone());
    greet(quic, false, session).await.map_err(|error| error.to_string())?;
    let (mut send, mut recv) = quic.accept_bi().await.map_err(|e| describe(&e))?;
    let request = recv.read_to_end(JOIN_BYTES_MAX).await.map_err(|e| e.to_string())?;
    let decided = decide(quic, ca, &request);
    let reply = match &decided {
        Ok((_, certificate)) => JoinReply::Accepted { certificate: certificate.clone() },
        Err(reason) => JoinReply::Refused { reason: reason.clone() },
    };
    send.write_all(&encode(&reply)).await.map_err(|e| e.to_string())?;
    send.finish().map_err(|e| e.to_string())?;
    // The joiner closes when it has read the reply.
    quic.closed().await;
    quic.close(CLOSE_REFUSED, b"");
    decided.map(|(who, _)| who).map_err(|reason| format!("{joiner} was refused: {reason}"))
}

/// Checks the proof, then issues what was asked for.
fn decide(
    quic: &quinn::Connection,
    ca: &ClusterCa,
    request: &[u8],
) -> Result<(String, Vec<u8>), String> {
    let JoinRequest { proof, name, role, request } =
        decode(request).map_err(|error| error.to_string())?;
    let expected = prove(quic, ca.secret(), &role, &name, &request)?;
    // Compared in constant time: that is what `Hash` does.
    if expected != blake3::Hash::from_bytes(proof) {
        return Err("the secret of its join token is wrong; copy the token that the coordinator \
                    wrote when it started"
            .to_owned());
    }
    let role = match Role::from_name(&role) {
        Some(role @ (Role::Worker | Role::Client)) => role,
        _ => return Err(format!("one joins as worker or client, not as {role:?}")),
    };
    let certificate =
        ca.issue(&request, role, &name, SystemTime::now()).map_err(|error| error.to_string())?;
    Ok((format!("{role} {name}"), certificate))
}

/// A keyed hash over this TLS session and everything that is asked for.
fn prove(
    quic: &quinn::Connection,
    secret: &[u8; 32],
    role: &str,
    name: &str,
    request: &[u8],
) -> Result<blake3::Hash, String> {
    let mut session = [0; 32];
    quic.export_keying_material(&mut session, EXPORT_LABEL, b"")
        .map_err(|_| "TLS exports no keying material".to_owned())?;
    let mut hasher = blake3::Hasher::new_keyed(secret);
    for part in [PROOF_CONTEXT, &session, role.as_bytes(), name.as_bytes(), request] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Endpoint, Options};

    /// A connection that speaks the join protocol and has introduced itself.
    async fn greeted(head: &Endpoint, token: &JoinToken) -> (quinn::Endpoint, quinn::Connection) {
        let address = head.local_addr().unwrap();
        let endpoint = endpoint::outgoing(address).unwrap();
        let tls = tls::joiner(token.certificate()).unwrap();
        let config = endpoint::client_config(tls, address);
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
        let token = ca.join_token("");
        let request = |quic: &quinn::Connection, proven: &str, asked: &str| {
            let (csr, _key) = signing_request().unwrap();
            let proof = prove(quic, token.secret(), "worker", proven, &csr).unwrap();
            let (name, role) = (asked.to_owned(), "worker".to_owned());
            encode(&JoinRequest { proof: *proof.as_bytes(), name, role, request: csr })
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
