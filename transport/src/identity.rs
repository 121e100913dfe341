//! Who is who: the cluster's certificate authority, and the identities that it issues.
//!
//! A certificate names its holder and role as `<name>.<role>.lite-llm`, and the role alone as
//! `<role>.lite-llm`, so that one may ask for "w1" or for "the coordinator".
//!
//! Invariants: private keys never leave the process that made them, but for the CA's, which lies
//! in a file that only its owner reads; nothing but the CA decides a role; names are DNS labels.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject,
};

use crate::{messages::trace::hex_into, tls, token::JoinToken};

/// How long a certificate of a coordinator or a worker is valid.
pub const NODE_VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long a certificate of a client is valid.
pub const CLIENT_VALIDITY: Duration = Duration::from_secs(24 * 3600);
/// How long a new certificate authority is valid.
pub const CA_VALIDITY: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// By how much clocks of a cluster may differ.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(3600);
/// Longest name, in bytes: that of a DNS label.
pub const NAME_BYTES_MAX: usize = 63;

const CA_FILE: &str = "cluster-ca.pem";
const CA_FIRST_LINE: &str = "lite-llm cluster CA 1";
const DOMAIN: &str = "lite-llm";

/// What a peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Owns requests, membership and placement.
    Coordinator,
    /// Holds experts, is home to sequences.
    Worker,
    /// Submits jobs and looks.
    Client,
}

impl Role {
    const ALL: [Role; 3] = [Role::Coordinator, Role::Worker, Role::Client];

    /// The role, as certificates spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Worker => "worker",
            Role::Client => "client",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }

    /// The name that every certificate of this role holds.
    pub(crate) fn domain(self) -> String {
        format!("{}.{DOMAIN}", self.as_str())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who a peer is, as its verified certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// Its name.
    pub name: String,
    /// What it may do.
    pub role: Role,
}

impl PeerIdentity {
    /// The name in a certificate for this peer.
    pub(crate) fn domain(&self) -> String {
        format!("{}.{}", self.name, self.role.domain())
    }

    /// Reads the identity of a chain that TLS has verified.
    pub(crate) fn from_chain(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let leaf = webpki::EndEntityCert::try_from(chain.first()?).ok()?;
        leaf.valid_dns_names().find_map(|domain| {
            let (name, rest) = domain.split_once('.')?;
            let (role, rest) = rest.split_once('.')?;
            let role = Role::from_name(role)?;
            (rest == DOMAIN && is_name(name)).then(|| Self { name: name.to_owned(), role })
        })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// Something is wrong with a name, a certificate, or the file that holds the authority.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A name that cannot be one.
    #[error("{0:?} cannot name a node: 1 to 63 of a-z, 0-9 and '-' are expected, no '-' at an end")]
    Name(String),
    /// A file that cannot be read or written.
    #[error("could not {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file with something else in it.
    #[error(
        "{} is no cluster CA: {found}; a file whose first line is {CA_FIRST_LINE:?} is expected. \
         Restore it, or remove it for a new cluster, which every worker must join anew",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// A private key that others can read.
    #[error(
        "{} holds the cluster's private key and has mode {mode:o}; others may not read it: chmod 600",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A signing request that is none.
    #[error("the request for a certificate is damaged: {0}")]
    Request(String),
    /// The cryptography failed.
    #[error("could not make a certificate: {0}")]
    Certificate(String),
}

impl From<rcgen::Error> for IdentityError {
    fn from(error: rcgen::Error) -> Self {
        IdentityError::Certificate(error.to_string())
    }
}

/// What a process proves itself with: its certificate chain and private key.
pub struct Identity {
    who: PeerIdentity,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) authority: CertificateDer<'static>,
}

impl Identity {
    /// Name and role.
    pub fn who(&self) -> &PeerIdentity {
        &self.who
    }

    pub(crate) fn new(
        who: PeerIdentity,
        leaf: CertificateDer<'static>,
        key: &KeyPair,
        authority: CertificateDer<'static>,
    ) -> Self {
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Self { who, chain: vec![leaf], key, authority }
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            who: self.who.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            authority: self.authority.clone(),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.who)
    }
}

/// The authority of one cluster, and the secret that lets others join it.
pub struct ClusterCa {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    secret: [u8; 32],
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterCa({})", self.cluster())
    }
}

impl ClusterCa {
    /// Reads the authority in this folder, or makes one if there is none.
    ///
    /// Several processes may do this at once: one of them makes it.
    pub fn open_or_create(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join(CA_FILE);
        let failed = |action| {
            let path = path.clone();
            move |source| IdentityError::File { action, path, source }
        };
        fs::create_dir_all(state_dir).map_err(failed("make the folder of"))?;
        if !fs::exists(&path).map_err(failed("find"))? {
            let text = Self::make(SystemTime::now())?;
            write_private(&path, &text, false).map_err(failed("write"))?;
        }
        check_private(&path)?;
        let text = fs::read_to_string(&path).map_err(failed("read"))?;
        Self::parse(&text).map_err(|found| IdentityError::Damaged { path, found })
    }

    /// An authority that lives in memory only: for one process, and for tests.
    pub fn ephemeral() -> Result<Self, IdentityError> {
        let text = Self::make(SystemTime::now())?;
        Self::parse(&text).map_err(IdentityError::Certificate)
    }

    /// The text of a new authority's file.
    fn make(now: SystemTime) -> Result<String, IdentityError> {
        let mut secret = [0; 32];
        tls::random(&mut secret).map_err(IdentityError::Certificate)?;
        // A name of its own, so that a peer of another cluster is told just that.
        let mut random = [0; 8];
        tls::random(&mut random).map_err(IdentityError::Certificate)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let name = format!("lite-llm cluster {}", hex(&random));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        set_validity(&mut params, now, CA_VALIDITY);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let (secret, certificate, key) = (hex(&secret), certificate.pem(), key.serialize_pem());
        Ok(format!("{CA_FIRST_LINE}\nsecret {secret}\n{certificate}{key}"))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        match lines.next() {
            Some(CA_FIRST_LINE) => {}
            other => return Err(format!("its first line is {:?}", other.unwrap_or_default())),
        }
        let mut secret = [0; 32];
        let digits = lines.next().and_then(|line| line.strip_prefix("secret "));
        digits
            .and_then(|digits| hex_into(digits, &mut secret))
            .ok_or("its second line is not `secret` and 64 hex digits")?;
        let certificate = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|error| format!("its certificate cannot be read ({error})"))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes())
            .map_err(|error| format!("its private key cannot be read ({error})"))?;
        let key = KeyPair::try_from(&key)
            .map_err(|error| format!("its private key cannot be used ({error})"))?;
        let anchor = webpki::EndEntityCert::try_from(&certificate)
            .map_err(|error| format!("its certificate cannot be used ({error})"))?;
        if anchor.subject_public_key_info().as_ref() != key.subject_public_key_info() {
            return Err("its private key and its certificate do not belong together".to_owned());
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| format!("its certificate cannot be used ({error})"))?;
        Ok(Self { certificate, issuer, secret })
    }

    /// Name of the cluster: a digest of its certificate.
    pub fn cluster(&self) -> String {
        cluster_name(&self.certificate)
    }

    /// What a joiner needs: the certificate to trust, the secret to prove, an address to try.
    pub fn join_token(&self, address: impl Into<String>) -> JoinToken {
        JoinToken::new(self.certificate.clone(), self.secret, address.into())
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// An identity whose key is made here: for the process that holds the authority.
    pub fn identity(&self, role: Role, name: &str) -> Result<Identity, IdentityError> {
        let validity = if role == Role::Client { CLIENT_VALIDITY } else { NODE_VALIDITY };
        self.identity_valid(role, name, SystemTime::now(), validity)
    }

    /// Like [`Self::identity`], valid from `from` for `validity`.
    pub fn identity_valid(
        &self,
        role: Role,
        name: &str,
        from: SystemTime,
        validity: Duration,
    ) -> Result<Identity, IdentityError> {
        let who = checked_name(role, name)?;
        let key = KeyPair::generate()?;
        let leaf = self.sign(&key, &who, from, validity)?;
        Ok(Identity::new(who, leaf, &key, self.certificate.clone()))
    }

    /// A certificate for whoever made this signing request. Its key is all that is taken from it.
    pub fn issue(
        &self,
        request: &[u8],
        role: Role,
        name: &str,
        now: SystemTime,
    ) -> Result<Vec<u8>, IdentityError> {
        let who = checked_name(role, name)?;
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
                .map_err(|error| IdentityError::Request(error.to_string()))?;
        let validity = if role == Role::Client { CLIENT_VALIDITY } else { NODE_VALIDITY };
        Ok(self.sign(&request.public_key, &who, now, validity)?.to_vec())
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        who: &PeerIdentity,
        from: SystemTime,
        validity: Duration,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let mut params = CertificateParams::new(vec![who.domain(), who.role.domain()])?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, who.domain());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A client never answers: its certificate cannot pose as a server's.
        params.extended_key_usages = match who.role {
            Role::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            _ => vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
        };
        set_validity(&mut params, from, validity);
        Ok(params.signed_by(key, &self.issuer)?.der().clone())
    }
}

/// A signing request and its key, for a joiner.
pub(crate) fn signing_request() -> Result<(Vec<u8>, KeyPair), IdentityError> {
    let key = KeyPair::generate()?;
    let request = CertificateParams::default().serialize_request(&key)?;
    Ok((request.der().to_vec(), key))
}

pub(crate) fn checked_name(role: Role, name: &str) -> Result<PeerIdentity, IdentityError> {
    if is_name(name) {
        Ok(PeerIdentity { name: name.to_owned(), role })
    } else {
        Err(IdentityError::Name(name.chars().take(80).collect()))
    }
}

pub(crate) fn cluster_name(certificate: &CertificateDer<'_>) -> String {
    hex(&blake3::hash(certificate).as_bytes()[..8])
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file that only its owner reads, in one step; an existing one is kept unless replaced.
pub(crate) fn write_private(path: &Path, text: &str, replace: bool) -> io::Result<()> {
    let mut random = [0; 8];
    tls::random(&mut random).map_err(io::Error::other)?;
    let mut staging = path.as_os_str().to_owned();
    staging.push(format!(".{}.new", hex(&random)));
    let staging = PathBuf::from(staging);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = (|| {
        let mut file = options.open(&staging)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        if replace {
            return fs::rename(&staging, path);
        }
        // A link fails where a file is: whoever came first made the authority.
        match fs::hard_link(&staging, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    })();
    if !replace || written.is_err() {
        let _ = fs::remove_file(&staging);
    }
    written
}

#[cfg(unix)]
fn check_private(path: &Path) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = fs::metadata(path).map_err(|source| IdentityError::File {
        action: "read the permissions of",
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        Ok(())
    } else {
        Err(IdentityError::Exposed { path: path.to_owned(), mode })
    }
}

#[cfg(not(unix))]
fn check_private(_: &Path) -> Result<(), IdentityError> {
    Ok(())
}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Sets when a certificate is valid, to the second.
fn set_validity(params: &mut CertificateParams, from: SystemTime, validity: Duration) {
    let since = |moment: SystemTime| {
        Duration::from_secs(moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
    };
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since(from - CLOCK_SKEW_MAX);
    params.not_after = epoch + since(from + validity);
}
