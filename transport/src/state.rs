//! The folder in which a coordinator keeps what makes it the coordinator, and who may touch it.
//!
//! | file | holds |
//! |---|---|
//! | `cluster-ca.pem` | the authority's certificate and private key |
//! | `join-secrets` | the secrets of the tokens, and the one that workers share |
//! | `client.token`, `worker.token` | the tokens, to be copied to where they are used |
//! | `revoked` | names whose certificates are no longer good |
//! | `keys` | hashes of the HTTP API's keys, and their limits |
//! | `coordinator.lock` | locked while a coordinator runs, with its process number |
//! | `edit.lock` | locked for the moment in which one of the others is changed |
//!
//! Invariants: the folder is made for its owner only, and one into which others may write is
//! refused; so is a file of it that others may read or write. Files are replaced in one step, so
//! that a reader finds the old one or the new one. One coordinator at a time.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

use crate::{messages::trace::hex, random};

/// How long changing a file may wait for somebody else who changes one.
const EDIT_TIMEOUT: Duration = Duration::from_secs(5);
const EDIT_RETRY: Duration = Duration::from_millis(20);

pub(crate) const CA_FILE: &str = "cluster-ca.pem";
pub(crate) const SECRETS_FILE: &str = "join-secrets";
pub(crate) const REVOKED_FILE: &str = "revoked";
pub(crate) const KEYS_FILE: &str = "keys";
pub(crate) const CLIENT_TOKEN_FILE: &str = "client.token";
pub(crate) const WORKER_TOKEN_FILE: &str = "worker.token";
const COORDINATOR_LOCK: &str = "coordinator.lock";
const EDIT_LOCK: &str = "edit.lock";

/// The state folder, or a file of it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read or written.
    #[error("could not {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A secret that others can read or replace.
    #[error(
        "{} holds a secret of the cluster and has mode {mode:o}; others may neither read nor write \
         it: chmod 600 {}",
        path.display(), path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A folder in which others can replace secrets.
    #[error(
        "the state folder {} has mode {mode:o}, so that others may replace what is in it: chmod \
         700 {}, and make new tokens with `lite-llm token` if others use this machine",
        path.display(), path.display()
    )]
    Open {
        /// The folder.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Something is there that is no folder.
    #[error("{} is no folder; give another with --state", path.display())]
    NoFolder {
        /// What is there.
        path: PathBuf,
    },
    /// A second coordinator.
    #[error(
        "a coordinator of the state {} is running ({holder}); stop it first, or give this one \
         another --state", path.display()
    )]
    Running {
        /// The folder.
        path: PathBuf,
        /// Who holds the lock.
        holder: String,
    },
    /// Something else is in a file.
    #[error("{} is damaged: {found}; restore it, or remove it: then {then}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
        /// What follows from removing it.
        then: &'static str,
    },
    /// Something that none of these files ever is.
    #[error("{} is no file of a cluster: {found}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// Somebody else is changing it, for too long.
    #[error("{} was locked for {EDIT_TIMEOUT:?} by another process; try again", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
}

/// A state folder whose permissions were checked.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

/// The right to be the coordinator of a state; it ends with the value, or with the process.
#[derive(Debug)]
pub struct CoordinatorLock {
    _file: File,
}

impl StateDir {
    /// The folder, which is made if it is missing.
    pub fn open_or_create(path: &Path) -> Result<Self, StateError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        if !path.exists() {
            builder.create(path).map_err(failed("make the folder", path))?;
        }
        Self::open(path)
    }

    /// The folder, which is there.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let metadata = fs::metadata(path).map_err(failed("find the state folder", path))?;
        if !metadata.is_dir() {
            return Err(StateError::NoFolder { path: path.to_owned() });
        }
        let mode = mode(&metadata);
        if mode & 0o022 != 0 {
            return Err(StateError::Open { path: path.to_owned(), mode });
        }
        let state = Self { path: path.to_owned() };
        for name in
            [CA_FILE, SECRETS_FILE, REVOKED_FILE, KEYS_FILE, CLIENT_TOKEN_FILE, WORKER_TOKEN_FILE]
        {
            let path = state.file(name);
            if path.exists() {
                check_private(&path)?;
            }
        }
        Ok(state)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Becomes the one coordinator of this state.
    pub fn lock_coordinator(&self) -> Result<CoordinatorLock, StateError> {
        let path = self.file(COORDINATOR_LOCK);
        let mut file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // A lock of which the holder cannot be read is held all the same.
                let _ = file.take(32).read_to_string(&mut text);
                let pid = text.trim().parse::<u32>();
                let holder = pid.map_or("process unknown".into(), |pid| format!("process {pid}"));
                return Err(StateError::Running { path: self.path.clone(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
        }
        let pid = format!("{}\n", std::process::id());
        let written = file.set_len(0).and_then(|()| file.write_all(pid.as_bytes()));
        written.map_err(failed("write", &path))?;
        Ok(CoordinatorLock { _file: file })
    }

    /// Keeps others from changing a file of this state until the value is dropped.
    pub(crate) fn lock_edits(&self) -> Result<File, StateError> {
        let path = self.file(EDIT_LOCK);
        let file = open_lock(&path)?;
        let deadline = Instant::now() + EDIT_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(EDIT_RETRY);
                }
                Err(TryLockError::WouldBlock) => return Err(StateError::Locked { path }),
                Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
            }
        }
    }
}

/// What tells one content of a file from the next without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
    inode: u64,
}

impl Stamp {
    /// The stamp of a file, if it is there.
    pub(crate) fn of(path: &Path) -> Result<Option<Self>, StateError> {
        match fs::metadata(path) {
            Ok(metadata) => {
                #[cfg(unix)]
                let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
                #[cfg(not(unix))]
                let inode = 0;
                let (len, modified) = (metadata.len(), metadata.modified().ok());
                Ok(Some(Self { len, modified, inode }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("look at", path)(error)),
        }
    }
}

/// What a small private file says, read again whenever the file was replaced.
pub(crate) struct Watched<T> {
    source: Option<Source<T>>,
    kept: Mutex<(Option<Stamp>, Arc<T>)>,
}

/// Where the value comes from.
pub(crate) struct Source<T> {
    pub(crate) path: PathBuf,
    pub(crate) bytes_max: u64,
    /// Reads the text, or says what a missing file means.
    pub(crate) parse: fn(Option<&str>) -> Result<T, String>,
    /// What follows from removing the file.
    pub(crate) without: &'static str,
}

impl<T> Source<T> {
    fn read(&self) -> Result<T, StateError> {
        let text = match self.path.exists() {
            true => Some(read_private(&self.path, self.bytes_max)?),
            false => None,
        };
        (self.parse)(text.as_deref()).map_err(|found| {
            let (path, then) = (self.path.clone(), self.without);
            StateError::Damaged { path, found, then }
        })
    }
}

impl<T: Clone> Watched<T> {
    /// A value that is in no file.
    pub(crate) fn in_memory(value: T) -> Self {
        Self { source: None, kept: Mutex::new((None, Arc::new(value))) }
    }

    /// The value of a file.
    pub(crate) fn open(source: Source<T>) -> Result<Self, StateError> {
        let stamp = Stamp::of(&source.path)?;
        let value = source.read()?;
        Ok(Self { source: Some(source), kept: Mutex::new((stamp, Arc::new(value))) })
    }

    /// The value as the file has it now. An error leaves the one before with [`Self::last`].
    pub(crate) fn now(&self) -> Result<Arc<T>, StateError> {
        let mut kept = self.kept.lock();
        let Some(source) = &self.source else { return Ok(kept.1.clone()) };
        // Looked at before reading: what is replaced meanwhile is read again the next time.
        let stamp = Stamp::of(&source.path)?;
        if stamp != kept.0 {
            *kept = (stamp, Arc::new(source.read()?));
        }
        Ok(kept.1.clone())
    }

    /// The value as it was when it could last be read.
    pub(crate) fn last(&self) -> Arc<T> {
        self.kept.lock().1.clone()
    }

    /// Keeps a changed value.
    pub(crate) fn replace(&self, value: T, text: &str) -> Result<(), StateError> {
        let mut kept = self.kept.lock();
        let mut stamp = None;
        if let Some(source) = &self.source {
            write_private(&source.path, text, true)?;
            stamp = Stamp::of(&source.path)?;
        }
        *kept = (stamp, Arc::new(value));
        Ok(())
    }
}

/// Reads a small private file of at most `bytes_max` bytes, and nothing if others could.
pub(crate) fn read_private(path: &Path, bytes_max: u64) -> Result<String, StateError> {
    check_private(path)?;
    let file = File::open(path).map_err(failed("read", path))?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    let unfit = |found| StateError::Unfit { path: path.to_owned(), found };
    if bytes.len() as u64 > bytes_max {
        return Err(unfit(format!("it has more than {bytes_max} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| unfit("it is not text".to_owned()))
}

/// Writes a file that only its owner reads, in one step; an existing one is kept unless replaced.
pub(crate) fn write_private(path: &Path, text: &str, replace: bool) -> Result<(), StateError> {
    write_in_one_step(path, text, replace).map_err(failed("write", path))
}

fn write_in_one_step(path: &Path, text: &str, replace: bool) -> io::Result<()> {
    let mut random = [0; 8];
    random::fill(&mut random).map_err(io::Error::other)?;
    let mut staging = path.as_os_str().to_owned();
    staging.push(format!(".{}.new", hex(&random)));
    let staging = PathBuf::from(staging);
    let written = (|| {
        let mut file = private_options().create_new(true).open(&staging)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        if replace {
            return fs::rename(&staging, path);
        }
        // A link fails where a file is: whoever came first made it.
        match fs::hard_link(&staging, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    })();
    if !replace || written.is_err() {
        // What is left is a file that nobody reads.
        let _ = fs::remove_file(&staging);
    }
    written
}

fn private_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn open_lock(path: &Path) -> Result<File, StateError> {
    let opened = private_options().read(true).create(true).truncate(false).open(path);
    opened.map_err(failed("open", path))
}

/// Refuses a file that others can read or write.
pub(crate) fn check_private(path: &Path) -> Result<(), StateError> {
    let metadata = fs::metadata(path).map_err(failed("read", path))?;
    match mode(&metadata) {
        mode if mode & 0o077 == 0 => Ok(()),
        mode => Err(StateError::Exposed { path: path.to_owned(), mode }),
    }
}

#[cfg(unix)]
fn mode(metadata: &fs::Metadata) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777
}

/// Elsewhere permissions are not looked at.
#[cfg(not(unix))]
fn mode(_: &fs::Metadata) -> u32 {
    0
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::File { action, path, source }
}
