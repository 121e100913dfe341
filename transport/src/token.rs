//! The join token: what a worker or client is given to enter a cluster.
//!
//! A text file: a first line with format and version, then its role, the cluster, the coordinator's
//! address, the number, beginning, end and text of its secret, the cluster's certificate, and a
//! check over all of it. Whoever holds it may join as what it makes, and as nothing else: it is as
//! secret as a password, written so that only its owner reads it, and not read if others could.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustls_pki_types::CertificateDer;

use crate::{
    identity::{Role, cluster_name},
    messages::trace::{hex, hex_into},
    moment::{from_seconds, seconds, utc},
    secrets::{JoinSecret, SecretId, cut},
    state::{CLIENT_TOKEN_FILE, StateError, WORKER_TOKEN_FILE, read_private, write_private},
};

const FIRST_LINE: &str = "lite-llm join token 2";
/// The one token of earlier releases, which made workers and clients alike.
const FIRST_LINE_1: &str = "lite-llm join token 1";
/// Longest token that is read, in bytes.
pub const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// A token file that is not one.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("could not {action} the join token {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others can read it, or it could not be written.
    #[error(transparent)]
    State(StateError),
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
    secret: JoinSecret,
    address: String,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (role, cluster, address) = (self.role(), self.cluster(), &self.address);
        write!(f, "JoinToken({role} of cluster {cluster}, coordinator {address})")
    }
}

impl From<StateError> for TokenError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::File { action, path, source } => Self::File { action, path, source },
            // Readable, and yet nothing that a token could be.
            StateError::Unfit { path, found } => Self::Damaged { path, found },
            error => Self::State(error),
        }
    }
}

impl JoinToken {
    pub(crate) fn new(
        certificate: CertificateDer<'static>,
        secret: JoinSecret,
        address: String,
    ) -> Self {
        Self { certificate, secret, address }
    }

    /// Where the token of a role lies in a coordinator's state folder.
    pub fn path_in(state: &Path, role: Role) -> PathBuf {
        state.join(match role {
            Role::Worker => WORKER_TOKEN_FILE,
            Role::Client | Role::Coordinator => CLIENT_TOKEN_FILE,
        })
    }

    /// Name of the cluster: a digest of its certificate.
    pub fn cluster(&self) -> String {
        cluster_name(&self.certificate)
    }

    /// What it makes.
    pub fn role(&self) -> Role {
        self.secret.role
    }

    /// When it ceases to let others join.
    pub fn expires(&self) -> SystemTime {
        self.secret.expires
    }

    /// Where the coordinator listened when it wrote the token.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(crate) fn id(&self) -> SecretId {
        self.secret.id
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret.secret
    }

    /// Reads a token file, if its owner is the only one who can.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let text = read_private(path, TOKEN_BYTES_MAX)?;
        let damaged = |found| TokenError::Damaged { path: path.to_owned(), found };
        Self::parse(&text).map_err(damaged)
    }

    /// Writes a token file that only its owner reads, replacing an older one.
    pub fn write(&self, path: &Path) -> Result<(), TokenError> {
        Ok(write_private(path, &self.to_text(), true)?)
    }

    fn to_text(&self) -> String {
        let (cluster, address) = (self.cluster(), &self.address);
        let JoinSecret { id, role, secret, issued, expires } = &self.secret;
        let (id, secret, until) = (hex(id), hex(secret), utc(*expires));
        let (issued, expires) = (seconds(*issued), seconds(*expires));
        let certificate = hex(&self.certificate);
        let body = format!(
            "{FIRST_LINE}\nrole {role}\ncluster {cluster}\ncoordinator {address}\nnumber {id}\n\
             issued {issued}\nexpires {expires}\nuntil {until}\nsecret {secret}\n\
             certificate {certificate}\n"
        );
        let check = check(&body);
        format!("{body}check {check}\n")
    }

    fn parse(text: &str) -> Result<Self, String> {
        let first = text.lines().next().unwrap_or_default();
        if first == FIRST_LINE_1 {
            return Err(format!(
                "it is one of an earlier release, which let workers and clients in alike; now \
                 {WORKER_TOKEN_FILE} makes workers and {CLIENT_TOKEN_FILE} makes clients"
            ));
        }
        if first != FIRST_LINE {
            return Err(format!("its first line is {:?}", cut(first)));
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
        let role = match Role::from_name(field("role")?) {
            Some(role @ (Role::Worker | Role::Client)) => role,
            _ => return Err("its role is neither worker nor client".to_owned()),
        };
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        hex_into(field("number")?, &mut id).ok_or("its number is not 16 hex digits")?;
        hex_into(field("secret")?, &mut secret).ok_or("its secret is not 64 hex digits")?;
        let moment = |name: &str| {
            let seconds = field(name)?.parse();
            seconds.map(from_seconds).map_err(|_| format!("its line `{name}` is no moment"))
        };
        let (issued, expires) = (moment("issued")?, moment("expires")?);
        let digits = field("certificate")?;
        let mut certificate = vec![0; digits.len() / 2];
        hex_into(digits, &mut certificate).ok_or("its certificate is not hex digits")?;
        let certificate = CertificateDer::from(certificate);
        if webpki::anchor_from_trusted_cert(&certificate).is_err() {
            return Err("its certificate cannot be used".to_owned());
        }
        let secret = JoinSecret { id, role, secret, issued, expires };
        Ok(Self { certificate, secret, address: field("coordinator")?.to_owned() })
    }
}

fn check(body: &str) -> String {
    hex(&blake3::hash(body.as_bytes()).as_bytes()[..8])
}
