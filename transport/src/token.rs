//! The join token: what a worker or client is given to enter a cluster.
//!
//! A text file: a first line with format and version, then `cluster`, `coordinator` and `secret`,
//! the cluster's certificate, and a check over all of it. Whoever holds it may join: it is as
//! secret as a password, and written so that only its owner reads it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use rustls_pki_types::CertificateDer;

use crate::{
    identity::{cluster_name, hex, write_private},
    messages::trace::hex_into,
};

const FIRST_LINE: &str = "lite-llm join token 1";
/// Longest token that is read, in bytes.
pub const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// A token file that is not one.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read or written.
    #[error("could not {action} the join token {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Something else is in it.
    #[error(
        "{} is no join token: {found}; a file whose first line is {FIRST_LINE:?} is expected. \
         Copy it again from the coordinator, which writes it when it starts",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
}

/// What a joiner holds: the certificate to trust, the secret to prove, an address to try.
#[derive(Clone)]
pub struct JoinToken {
    certificate: CertificateDer<'static>,
    secret: [u8; 32],
    address: String,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken(cluster {}, coordinator {})", self.cluster(), self.address)
    }
}

impl JoinToken {
    pub(crate) fn new(
        certificate: CertificateDer<'static>,
        secret: [u8; 32],
        address: String,
    ) -> Self {
        Self { certificate, secret, address }
    }

    /// Name of the cluster: a digest of its certificate.
    pub fn cluster(&self) -> String {
        cluster_name(&self.certificate)
    }

    /// Where the coordinator listened when it wrote the token.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The secret by which members of this cluster's control plane know each other, beside their
    /// certificates.
    pub fn control_cookie(&self) -> String {
        hex(&blake3::derive_key("lite-llm control plane 1", &self.secret))
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// Reads a token file.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::File { action: "read", path: path.to_owned(), source };
        let damaged = |found| TokenError::Damaged { path: path.to_owned(), found };
        let size = fs::metadata(path).map_err(failed)?.len();
        if size > TOKEN_BYTES_MAX {
            return Err(damaged(format!("it has {size} bytes, more than any token")));
        }
        let bytes = fs::read(path).map_err(failed)?;
        let text = String::from_utf8(bytes).map_err(|_| damaged("it is not text".to_owned()))?;
        Self::parse(&text).map_err(damaged)
    }

    /// Writes a token file that only its owner reads, replacing an older one.
    pub fn write(&self, path: &Path) -> Result<(), TokenError> {
        write_private(path, &self.to_text(), true).map_err(|source| TokenError::File {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    fn to_text(&self) -> String {
        let (cluster, address, secret) = (self.cluster(), &self.address, hex(&self.secret));
        let certificate = hex(&self.certificate);
        let body = format!(
            "{FIRST_LINE}\ncluster {cluster}\ncoordinator {address}\nsecret {secret}\n\
             certificate {certificate}\n"
        );
        let check = check(&body);
        format!("{body}check {check}\n")
    }

    fn parse(text: &str) -> Result<Self, String> {
        let first = text.lines().next().unwrap_or_default();
        if first != FIRST_LINE {
            let first: String = first.chars().take(80).collect();
            return Err(format!("its first line is {first:?}"));
        }
        let (body, last) = text
            .trim_end()
            .rsplit_once('\n')
            .ok_or_else(|| "it ends after its first line".to_owned())?;
        let body = format!("{body}\n");
        if last.strip_prefix("check ") != Some(check(&body).as_str()) {
            return Err("its check does not fit its content, so it is damaged or cut".to_owned());
        }
        let field = |name: &str| {
            body.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
                .ok_or_else(|| format!("its line `{name}` is missing"))
        };
        let mut secret = [0; 32];
        hex_into(field("secret")?, &mut secret).ok_or("its secret is not 64 hex digits")?;
        let digits = field("certificate")?;
        let mut certificate = vec![0; digits.len() / 2];
        hex_into(digits, &mut certificate).ok_or("its certificate is not hex digits")?;
        let certificate = CertificateDer::from(certificate);
        if webpki::anchor_from_trusted_cert(&certificate).is_err() {
            return Err("its certificate cannot be used".to_owned());
        }
        Ok(Self { certificate, secret, address: field("coordinator")?.to_owned() })
    }
}

fn check(body: &str) -> String {
    hex(&blake3::hash(body.as_bytes()).as_bytes()[..8])
}
