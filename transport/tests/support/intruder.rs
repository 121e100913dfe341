//! Somebody who does not belong: a QUIC program of its own, that trusts anybody and shows what it
//! likes.

use std::{path::Path, sync::Arc};

use lite_llm_transport::{
    endpoint::Endpoint,
    messages::{decode, encode},
    session::Hello,
};
use quinn::crypto::rustls::QuicClientConfig;
use rkyv::{Archive, Deserialize, Serialize};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{
        CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject,
    },
};

use super::{loopback, soon};

/// A certificate and its key.
pub(crate) type Shown = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// A client that trusts anybody and shows what it likes.
#[derive(Debug)]
struct Gullible(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects with foreign means, speaks, and returns why the connection ended.
pub(crate) async fn intrude(to: &Endpoint, alpn: &[u8], shows: Option<Shown>) -> String {
    let config = foreign(alpn, shows);
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let connecting = endpoint.connect_with(config, to.local_addr().unwrap(), "x").unwrap();
    let quic = match soon("handshake", connecting).await {
        Ok(quic) => quic,
        Err(error) => return error.to_string(),
    };
    if let Ok((mut send, _recv)) = quic.open_bi().await {
        let _ = send.write_all(&Hello::new(1).to_bytes()).await;
        let _ = send.write_all(b"LLS\x01hello?").await;
    }
    soon("end", quic.closed()).await.to_string()
}

/// QUIC as a stranger's program would do it.
pub(crate) fn foreign(alpn: &[u8], shows: Option<Shown>) -> quinn::ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut tls = match shows {
        Some((chain, key)) => tls.with_client_auth_cert(vec![chain], key).unwrap(),
        None => tls.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}

/// A certificate for "w9.worker.lite-llm" by an authority of the intruder's own.
pub(crate) fn forged() -> Shown {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "lite-llm cluster");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = rcgen::Issuer::new(params, ca_key);
    let names = vec!["w9.worker.lite-llm".to_owned(), "worker.lite-llm".to_owned()];
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    (leaf.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

/// A certificate for these names by the real authority, as nobody but a thief of its file can make.
pub(crate) fn stolen(state: &Path, names: &[&str]) -> Shown {
    let text = std::fs::read_to_string(state.join("cluster-ca.pem")).unwrap();
    let key = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).unwrap();
    let key = rcgen::KeyPair::try_from(&key).unwrap();
    let certificate = CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&certificate, key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = params.signed_by(&key, &issuer).unwrap();
    (leaf.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

/// A request to join, as this protocol lays it.
#[derive(Archive, Serialize, Deserialize)]
struct Request {
    token: [u8; 8],
    proof: [u8; 32],
    name: String,
    role: String,
    request: Vec<u8>,
}

#[derive(Archive, Serialize, Deserialize)]
#[allow(dead_code, reason = "laid as the coordinator lays it")]
enum Reply {
    Accepted { certificate: Vec<u8>, shared: Option<[u8; 32]> },
    Refused { reason: String },
}

/// The number and the secret in the text of a token file.
pub(crate) struct Secret {
    pub(crate) number: [u8; 8],
    pub(crate) secret: [u8; 32],
}

impl Secret {
    pub(crate) fn of(token: &Path) -> Self {
        let text = std::fs::read_to_string(token).unwrap();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            let digits = |i: usize| u8::from_str_radix(&line[2 * i..2 * i + 2], 16).unwrap();
            (0..line.len() / 2).map(digits).collect::<Vec<u8>>()
        };
        let (number, secret) = (field("number "), field("secret "));
        Self { number: number.try_into().unwrap(), secret: secret.try_into().unwrap() }
    }
}

/// A joiner that went through TLS and said who it is, and nothing more.
pub(crate) struct Joiner {
    _endpoint: quinn::Endpoint,
    pub(crate) quic: quinn::Connection,
}

impl Joiner {
    pub(crate) async fn begin(to: &Endpoint) -> Result<Self, String> {
        let endpoint = quinn::Endpoint::client(loopback()).unwrap();
        Self::begin_from(endpoint, to).await
    }

    pub(crate) async fn begin_from(
        endpoint: quinn::Endpoint,
        to: &Endpoint,
    ) -> Result<Self, String> {
        let config = foreign(b"lite-llm-join/2", None);
        let connecting = endpoint.connect_with(config, to.local_addr().unwrap(), "x").unwrap();
        let quic = soon("handshake", connecting).await.map_err(|error| error.to_string())?;
        let (mut send, recv) = quic.open_bi().await.map_err(|error| error.to_string())?;
        send.write_all(&Hello::new(1).to_bytes()).await.map_err(|error| error.to_string())?;
        // Both halves stay open, as they do in the real one.
        std::mem::forget((send, recv));
        Ok(Self { _endpoint: endpoint, quic })
    }

    /// A request that proves a secret in this session.
    pub(crate) fn request(&self, secret: &Secret, role: &str, name: &str) -> Vec<u8> {
        let key = rcgen::KeyPair::generate().unwrap();
        let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let request = request.der().to_vec();
        let mut session = [0; 32];
        self.quic.export_keying_material(&mut session, b"EXPORTER-lite-llm-join", b"").unwrap();
        let mut hasher = blake3::Hasher::new_keyed(&secret.secret);
        let context: &[u8] = b"lite-llm join proof 2";
        let (number, role_bytes) = (&secret.number[..], role.as_bytes());
        for part in [context, &session, number, role_bytes, name.as_bytes(), &request] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let (token, proof) = (secret.number, *hasher.finalize().as_bytes());
        let (name, role) = (name.to_owned(), role.to_owned());
        encode(&Request { token, proof, name, role, request })
    }

    /// What comes back for a request: nothing for a certificate, or the reason why there is none.
    pub(crate) async fn send(&self, request: &[u8]) -> Option<String> {
        let answered = async {
            let (mut send, mut recv) = self.quic.open_bi().await.ok()?;
            send.write_all(request).await.ok()?;
            send.finish().ok()?;
            recv.read_to_end(1 << 16).await.ok()
        };
        let reply = soon("an answer", answered).await;
        self.quic.close(0u32.into(), b"");
        match reply.and_then(|bytes| decode::<Reply>(&bytes).ok()) {
            Some(Reply::Accepted { .. }) => None,
            Some(Reply::Refused { reason }) => Some(reason),
            None => Some("no answer".to_owned()),
        }
    }
}
