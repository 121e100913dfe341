//! A file that blocks are read of: directly where the file system allows it, else through the page
//! cache, which is told to forget what was read.

use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use super::BLOCK_ALIGN;
#[cfg(target_os = "linux")]
use super::ring::advise;

/// What the system is told of a range of a file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Advice {
    /// Nothing beyond what is asked for will be.
    Random,
    /// It will not be asked for again.
    Forget,
}

/// An open file, for [`Read`](super::Read)s.
pub struct BlockFile {
    path: PathBuf,
    /// Past the page cache.
    direct: Option<File>,
    /// Through it.
    plain: File,
    /// Direct reads were refused.
    refused: AtomicBool,
}

impl fmt::Debug for BlockFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockFile({})", self.path.display())
    }
}

impl BlockFile {
    /// Opens a file, twice: with O_DIRECT, if its file system has that, and without. Errors name
    /// the path.
    pub fn open(path: &Path) -> io::Result<Self> {
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: open: {error}", path.display()))
        };
        let plain = File::open(path).map_err(named)?;
        // What is read next is known to nobody but us.
        advise(&plain, 0, 0, Advice::Random);
        let (direct, refused) = (open_direct(path), AtomicBool::new(false));
        Ok(Self { path: path.to_owned(), direct, plain, refused })
    }

    /// Its path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The handle for a request, and whether it is the direct one.
    pub(super) fn handle(&self, direct: bool, offset: u64, bytes: usize) -> (&File, bool) {
        let aligned = (offset | bytes as u64).is_multiple_of(BLOCK_ALIGN);
        match &self.direct {
            Some(file) if direct && aligned && !self.refused.load(Relaxed) => (file, true),
            _ => (&self.plain, false),
        }
    }

    /// Takes note that a request failed; says whether the other handle may do.
    pub(super) fn refuses_direct(&self, error: &io::Error, direct: bool) -> bool {
        let refused =
            direct && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP));
        if refused {
            self.refused.store(true, Relaxed);
        }
        refused
    }

    /// Has the page cache forget what was read through it.
    pub(super) fn forget(&self, offset: u64, bytes: usize) {
        advise(&self.plain, offset, bytes, Advice::Forget);
    }

    /// An error that says what was read.
    pub(super) fn error(&self, offset: u64, bytes: usize, error: &io::Error) -> io::Error {
        let path = self.path.display();
        io::Error::new(error.kind(), format!("{path}: read {bytes} bytes at {offset}: {error}"))
    }

    /// The error of a file that ends within a read.
    pub(super) fn ends(&self, offset: u64, bytes: usize, found: usize) -> io::Error {
        let reason = format!("the file ends after {found} of them");
        self.error(offset, bytes, &io::Error::new(io::ErrorKind::UnexpectedEof, reason))
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt};
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &File, _: u64, _: usize, _: Advice) {}
