//! A file that blocks are read of: directly where the file system allows it, else through the page
//! cache, which is told to forget what was read.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use lite_llm_kernels::slots::Slot;

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
    /// Through it, opened when it is first needed: few files have both handles. Nothing if the
    /// path names no file any more.
    plain: OnceLock<Option<File>>,
    /// Direct reads were refused.
    refused: AtomicBool,
}

impl fmt::Debug for BlockFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockFile({})", self.path.display())
    }
}

impl BlockFile {
    /// Opens a regular file, with O_DIRECT if its file system has that. Errors name the path.
    pub fn open(path: &Path) -> io::Result<Self> {
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: open: {error}", path.display()))
        };
        // Opening a pipe would wait for a writer, so the kind is asked first.
        if !fs::metadata(path).map_err(named)?.is_file() {
            return Err(named(io::Error::other("not a regular file")));
        }
        let direct = open_direct(path);
        let plain = match direct {
            Some(_) => OnceLock::new(),
            None => Some(open_plain(path).map_err(named)?).into(),
        };
        Ok(Self { path: path.to_owned(), direct, plain, refused: AtomicBool::new(false) })
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
            // Without the other handle the system will say what is wrong with this one.
            Some(file) => (self.plain().unwrap_or(file), false),
            None => (self.plain().expect("it was opened first"), false),
        }
    }

    fn plain(&self) -> Option<&File> {
        self.plain.get_or_init(|| open_plain(&self.path).ok()).as_ref()
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
        if let Some(plain) = self.plain.get().and_then(Option::as_ref) {
            advise(plain, offset, bytes, Advice::Forget);
        }
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

fn open_plain(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    // What is read next is known to nobody but us.
    advise(&file, 0, 0, Advice::Random);
    Ok(file)
}

/// Writes a slot's bytes to a new file, or over what is there: past the page cache where the file
/// system allows it, else through it, which is then told to forget them. What the file holds
/// after the system fails is not known.
pub fn write_file(path: &Path, slot: &mut Slot) -> io::Result<()> {
    let bytes = slot.len() as u64;
    if let Some(mut file) = create_direct(path) {
        // All of the slot's blocks: the last one ends beyond what is to be in the file.
        let written = file.write_all(slot.raw_mut()).and_then(|()| file.set_len(bytes));
        match written {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            }
            other => return other,
        }
    }
    let mut file = File::create(path)?;
    file.write_all(slot)?;
    // Only what is on the disk is forgotten.
    file.sync_data()?;
    advise(&file, 0, 0, Advice::Forget);
    Ok(())
}

#[cfg(target_os = "linux")]
fn create_direct(path: &Path) -> Option<File> {
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt};
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn create_direct(_: &Path) -> Option<File> {
    None
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
