//! TLS as this crate uses it: 1.3 only, aws-lc-rs, one authority per cluster, no resumption.
//!
//! Sessions are never resumed: a resumed one would not look at the certificate's dates again.

use std::{fmt, io, net::SocketAddr, sync::Arc};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use rustls_pki_types::CertificateDer;

use crate::identity::Identity;

/// Protocol of members: both sides show a certificate of the cluster.
pub(crate) const ALPN_MEMBER: &[u8] = b"lite-llm/1";
/// Protocol of joiners: they hold a token, and no certificate yet.
pub(crate) const ALPN_JOIN: &[u8] = b"lite-llm-join/2";
/// Protocol of joiners of earlier releases, who are told so.
pub(crate) const ALPN_JOIN_1: &[u8] = b"lite-llm-join/1";

/// An endpoint that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be listened on.
    #[error("could not listen on {address}: {source}; is it in use, or not of this machine?")]
    Socket {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The certificates cannot be used.
    #[error("TLS cannot be set up with this identity: {0}")]
    Tls(String),
}

impl BindError {
    pub(crate) fn tls(error: impl fmt::Display) -> Self {
        BindError::Tls(error.to_string())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, BindError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).map_err(BindError::tls)?;
    Ok(Arc::new(roots))
}

/// What a member shows and expects where it connects.
pub(crate) fn client(identity: &Identity) -> Result<Arc<QuicClientConfig>, BindError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(BindError::tls)?
        .with_root_certificates(roots(&identity.authority)?)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(BindError::tls)?;
    quic_client(config, ALPN_MEMBER)
}

/// What a joiner expects where it connects; it has nothing to show yet.
pub(crate) fn joiner(
    authority: &CertificateDer<'static>,
) -> Result<Arc<QuicClientConfig>, BindError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(BindError::tls)?
        .with_root_certificates(roots(authority)?)
        .with_no_client_auth();
    quic_client(config, ALPN_JOIN)
}

fn quic_client(mut config: ClientConfig, alpn: &[u8]) -> Result<Arc<QuicClientConfig>, BindError> {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(QuicClientConfig::try_from(config).map_err(BindError::tls)?))
}

/// What an endpoint shows and expects where it is connected to.
///
/// With `joins`, connections without a certificate come through TLS; they may speak
/// [`ALPN_JOIN`] only, which the endpoint enforces before it reads a stream.
pub(crate) fn server(identity: &Identity, joins: bool) -> Result<Arc<QuicServerConfig>, BindError> {
    let mut config = server_config(identity, joins)?;
    config.alpn_protocols = vec![ALPN_MEMBER.to_vec()];
    if joins {
        config.alpn_protocols.extend([ALPN_JOIN.to_vec(), ALPN_JOIN_1.to_vec()]);
    }
    Ok(Arc::new(QuicServerConfig::try_from(config).map_err(BindError::tls)?))
}

/// TLS that lets in holders of this cluster's certificates, and with `joins` those who hold none.
pub(crate) fn server_config(identity: &Identity, joins: bool) -> Result<ServerConfig, BindError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(&identity.authority)?, provider());
    let verifier = if joins { verifier.allow_unauthenticated() } else { verifier };
    let verifier: Arc<dyn ClientCertVerifier> = verifier.build().map_err(BindError::tls)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(BindError::tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(BindError::tls)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

impl Identity {
    /// TLS for a TCP listener of this process: it lets in members of the cluster only.
    pub fn tcp_server_config(&self) -> Result<Arc<ServerConfig>, BindError> {
        server_config(self, false).map(Arc::new)
    }
}
