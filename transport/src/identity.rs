//! Who is who: the cluster's certificate authority, and the identities that it issues.
//!
//! A certificate names its holder and role as `<name>.<role>.lite-llm`, and the role alone as
//! `<role>.lite-llm`, so that one may ask for "w1" or for "the coordinator".
//!
//! Invariants: private keys never leave the process that made them, but for the CA's, which lies
//! in a file that only its owner reads; nothing but the CA decides a role; names are DNS labels; a
//! certificate says when it was issued.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject,
};

use crate::{
    messages::trace::hex,
    moment::{from_millis, millis},
    random,
    revocation::{REVOKED_BYTES_MAX, RevokedList},
    secrets::{JoinSecrets, cut},
    state::{
        CA_FILE, REVOKED_FILE, SECRETS_FILE, Source, StateDir, StateError, Watched, read_private,
        write_private,
    },
    token::JoinToken,
};

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

/// Longest file of an authority or of secrets, in bytes.
const STATE_FILE_BYTES_MAX: u64 = 64 << 10;
const CA_FIRST_LINE: &str = "lite-llm cluster CA 2";
const CA_FIRST_LINE_1: &str = "lite-llm cluster CA 1";
/// Name of the client that has the authority's folder itself, and may do what no token gives. Nobody
/// joins under it.
pub const OPERATOR: &str = "operator";

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

/// The certificate that a peer showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Digest of it.
    pub fingerprint: [u8; 32],
    /// When the authority issued it, to the millisecond; 1970 for one that does not say, which is
    /// older than any that does.
    pub issued: SystemTime,
}

impl PeerCertificate {
    /// Reads the certificate of a chain that TLS has verified.
    pub(crate) fn from_chain(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let leaf = chain.first()?;
        let fingerprint = *blake3::hash(leaf).as_bytes();
        let certificate = webpki::EndEntityCert::try_from(leaf).ok()?;
        let issued = Serial::issued(certificate.serial()).unwrap_or(UNIX_EPOCH);
        Some(Self { fingerprint, issued })
    }
}

/// A certificate's serial number: a mark, its moment of issue, and chance.
///
/// The dates in a certificate are whole seconds, and leave room for clocks that differ.
struct Serial;

impl Serial {
    const MARK: u8 = b'L';
    const BYTES: usize = 1 + 8 + 8;

    fn make(from: SystemTime) -> Result<[u8; Self::BYTES], String> {
        let mut serial = [0; Self::BYTES];
        serial[0] = Self::MARK;
        serial[1..9].copy_from_slice(&millis(from).to_be_bytes());
        random::fill(&mut serial[9..])?;
        Ok(serial)
    }

    fn issued(serial: &[u8]) -> Option<SystemTime> {
        let (mark, rest) = serial.split_first()?;
        let millis = rest.first_chunk::<8>()?;
        (*mark == Self::MARK && serial.len() == Self::BYTES)
            .then(|| from_millis(u64::from_be_bytes(*millis)))
    }
}

/// Something is wrong with a name, a certificate, or the file that holds the authority.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A name that cannot be one.
    #[error("{0:?} cannot name a node: 1 to 63 of a-z, 0-9 and '-' are expected, no '-' at an end")]
    Name(String),
    /// The state folder or a file of it.
    #[error(transparent)]
    State(#[from] StateError),
    /// A folder without an authority.
    #[error(
        "{} holds no cluster: there is no {CA_FILE}; a coordinator makes it when it first starts. \
         Say with --state where yours keeps it",
        path.display()
    )]
    NoCluster {
        /// The folder.
        path: PathBuf,
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
    /// A signing request that is none.
    #[error("the request for a certificate is damaged: {0}")]
    Request(String),
    /// The cryptography failed.
    #[error("could not make a certificate: {0}")]
    Certificate(String),
    /// Something that cannot be done to the secrets of tokens, or to the list of revoked names.
    #[error("{0}")]
    Change(String),
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
    /// What workers and the coordinator share; clients have none.
    shared: Option<[u8; 32]>,
}

impl Identity {
    /// Name and role.
    pub fn who(&self) -> &PeerIdentity {
        &self.who
    }

    /// The secret by which the coordinator and the workers of a cluster know each other's control
    /// plane, beside their certificates. It is handed out at joining, to workers only.
    pub fn control_cookie(&self) -> Option<String> {
        self.shared.map(|shared| hex(&blake3::derive_key("lite-llm control plane 2", &shared)))
    }

    pub(crate) fn new(
        who: PeerIdentity,
        leaf: CertificateDer<'static>,
        key: &KeyPair,
        authority: CertificateDer<'static>,
        shared: Option<[u8; 32]>,
    ) -> Self {
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Self { who, chain: vec![leaf], key, authority, shared }
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            who: self.who.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            authority: self.authority.clone(),
            shared: self.shared,
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.who)
    }
}

/// The authority of one cluster, the secrets that let others join it, and who was sent away.
///
/// What lies in its state folder may be changed by another process; it is read again when it was.
pub struct ClusterCa {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    state: Option<StateDir>,
    secrets: Watched<JoinSecrets>,
    revoked: Watched<RevokedList>,
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
        let state = StateDir::open_or_create(state_dir)?;
        let now = SystemTime::now();
        let (authority, secrets) = (state.file(CA_FILE), state.file(SECRETS_FILE));
        if !authority.exists() {
            write_private(&authority, &Self::make(now)?, false)?;
        }
        if !secrets.exists() {
            let made = JoinSecrets::new(now).map_err(IdentityError::Certificate)?;
            write_private(&secrets, &made.to_text(), false)?;
        }
        Self::read(state)
    }

    /// Reads the authority in this folder.
    pub fn open(state_dir: &Path) -> Result<Self, IdentityError> {
        let state = StateDir::open(state_dir)?;
        if !state.file(CA_FILE).exists() {
            return Err(IdentityError::NoCluster { path: state_dir.to_owned() });
        }
        // An authority of an earlier release has no such secrets yet.
        Self::open_or_create(state_dir)
    }

    fn read(state: StateDir) -> Result<Self, IdentityError> {
        let path = state.file(CA_FILE);
        let text = read_private(&path, STATE_FILE_BYTES_MAX)?;
        let damaged = |found| IdentityError::Damaged { path, found };
        let (certificate, issuer) = parse(&text).map_err(damaged)?;
        let secrets = Watched::open(Source {
            path: state.file(SECRETS_FILE),
            bytes_max: STATE_FILE_BYTES_MAX,
            parse: |text| JoinSecrets::parse(text.ok_or("it is missing")?),
            without: "the coordinator makes new tokens at its next start, and all old ones end",
        })?;
        let revoked = Watched::open(Source {
            path: state.file(REVOKED_FILE),
            bytes_max: REVOKED_BYTES_MAX,
            parse: RevokedList::parse,
            without: "nobody is revoked any more",
        })?;
        Ok(Self { certificate, issuer, state: Some(state), secrets, revoked })
    }

    /// An authority that lives in memory only: for one process, and for tests.
    pub fn ephemeral() -> Result<Self, IdentityError> {
        let now = SystemTime::now();
        let (certificate, issuer) = parse(&Self::make(now)?).map_err(IdentityError::Certificate)?;
        let secrets = JoinSecrets::new(now).map_err(IdentityError::Certificate)?;
        let secrets = Watched::in_memory(secrets);
        let revoked = Watched::in_memory(RevokedList::default());
        Ok(Self { certificate, issuer, state: None, secrets, revoked })
    }

    /// The text of a new authority's file.
    fn make(now: SystemTime) -> Result<String, IdentityError> {
        // A name of its own, so that a peer of another cluster is told just that.
        let mut number = [0; 8];
        random::fill(&mut number).map_err(IdentityError::Certificate)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let name = format!("lite-llm cluster {}", hex(&number));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        set_validity(&mut params, now, CA_VALIDITY);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let (certificate, key) = (certificate.pem(), key.serialize_pem());
        Ok(format!("{CA_FIRST_LINE}\n{certificate}{key}"))
    }

    /// The folder that it lies in, if it lies in one.
    pub fn state(&self) -> Option<&StateDir> {
        self.state.as_ref()
    }

    /// Name of the cluster: a digest of its certificate.
    pub fn cluster(&self) -> String {
        cluster_name(&self.certificate)
    }

    /// What a joiner of this role needs: the certificate to trust, the secret to prove, an address
    /// to try.
    pub fn join_token(
        &self,
        role: Role,
        address: impl Into<String>,
    ) -> Result<JoinToken, IdentityError> {
        let secrets = self.secrets.now()?;
        let secret = secrets.current(role).cloned();
        let secret = secret.ok_or_else(|| {
            IdentityError::Change(format!("one joins as worker or client, not as {role}"))
        })?;
        Ok(JoinToken::new(self.certificate.clone(), secret, address.into()))
    }

    /// Ends the token of a role, at once or after `grace`, and makes another that lets others join
    /// for `validity`. Certificates that were issued go on.
    pub fn rotate(
        &self,
        role: Role,
        validity: Duration,
        grace: Duration,
    ) -> Result<(), IdentityError> {
        let _lock = self.lock_edits()?;
        let mut secrets = (*self.secrets.now()?).clone();
        let rotated = secrets.rotate(role, SystemTime::now(), validity, grace);
        rotated.map_err(IdentityError::Change)?;
        let text = secrets.to_text();
        Ok(self.secrets.replace(secrets, &text)?)
    }

    /// Sends a name away: its certificates are good no more, and nobody may join under it.
    pub fn revoke(&self, name: &str) -> Result<(), IdentityError> {
        checked_name(Role::Worker, name)?;
        self.change_revoked(|list| list.revoke(name, SystemTime::now()))
    }

    /// Lets others join under a revoked name again. Its old certificates stay refused.
    pub fn undo_revoke(&self, name: &str) -> Result<(), IdentityError> {
        self.change_revoked(|list| list.undo(name))
    }

    fn change_revoked(
        &self,
        change: impl FnOnce(&mut RevokedList) -> Result<(), String>,
    ) -> Result<(), IdentityError> {
        let _lock = self.lock_edits()?;
        let mut list = (*self.revoked.now()?).clone();
        change(&mut list).map_err(IdentityError::Change)?;
        let text = list.to_text();
        Ok(self.revoked.replace(list, &text)?)
    }

    fn lock_edits(&self) -> Result<Option<fs::File>, IdentityError> {
        Ok(self.state.as_ref().map(StateDir::lock_edits).transpose()?)
    }

    /// Who is sent away now.
    pub(crate) fn revoked(&self) -> Result<Arc<RevokedList>, IdentityError> {
        Ok(self.revoked.now()?)
    }

    /// Who was sent away when that could last be read.
    pub(crate) fn last_revoked(&self) -> Arc<RevokedList> {
        self.revoked.last()
    }

    pub(crate) fn secrets(&self) -> Result<Arc<JoinSecrets>, IdentityError> {
        Ok(self.secrets.now()?)
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
        let shared = match role {
            Role::Client => None,
            Role::Worker | Role::Coordinator => Some(self.secrets.last().shared),
        };
        Ok(Identity::new(who, leaf, &key, self.certificate.clone(), shared))
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
        let serial = Serial::make(from).map_err(IdentityError::Certificate)?;
        params.serial_number = Some(serial.to_vec().into());
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

/// Reads the text of an authority's file. What an earlier release kept there as the secret of its
/// one token is passed over: nobody joins with it any more.
fn parse(text: &str) -> Result<(CertificateDer<'static>, Issuer<'static, KeyPair>), String> {
    let first = text.lines().next().unwrap_or_default();
    if first != CA_FIRST_LINE && first != CA_FIRST_LINE_1 {
        return Err(format!("its first line is {:?}", cut(first)));
    }
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
    Ok((certificate, issuer))
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
