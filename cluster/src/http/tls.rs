//! TLS of the HTTP API: a certificate and its key from files.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail};
use rustls::{ServerConfig, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_rustls::TlsAcceptor;

/// What takes connections in with this certificate, its issuers after it, and this key; all PEM.
///
/// # Errors
/// If a file cannot be read, holds nothing of the kind, or the key is another certificate's.
pub(crate) fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor> {
    let shown = certificate.display();
    let read = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain: Vec<CertificateDer<'static>> =
        read.with_context(|| format!("--http-cert {shown}: a certificate in PEM is expected"))?;
    if chain.is_empty() {
        bail!("--http-cert {shown}: there is no certificate in it; PEM is expected");
    }
    let secret = PrivateKeyDer::from_pem_file(key).with_context(|| {
        format!("--http-key {}: a private key in PEM is expected", key.display())
    })?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS has no version that is safe")?
        .with_no_client_auth()
        .with_single_cert(chain, secret);
    let mut config = config.with_context(|| {
        format!("--http-cert {shown} and --http-key {} do not fit each other", key.display())
    })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
