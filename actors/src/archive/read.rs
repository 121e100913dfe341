//! Listings, sizes and reads.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path as FsPath, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use lite_llm_runtime::checkpoint::archive::ArchiveError;
use object_store::{GetOptions, GetRange, GetResultPayload};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{Inner, PARTS_AT_ONCE, failure::Failure, location::Kind, tries::Tries};

/// A read of more is cut in parts of so many bytes, read together.
const PART_BYTES: usize = 8 << 20;
/// A local file is read in pieces of so many bytes, as a network would bring them: of those that
/// wait for the reader there may be [`super::CHUNKS_MAX`].
const FILE_PIECE_BYTES: u64 = 256 << 10;

impl Inner {
    pub(super) async fn list(&self, folder: &str) -> Result<Vec<(String, u64)>, ArchiveError> {
        let at = self.path(folder);
        let at = (!at.as_ref().is_empty()).then_some(at);
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let listing = self.heard(self.store.list_with_delimiter(at.as_ref()));
            let failure = match tries.attempt(listing).await {
                Ok(found) => {
                    let objects = found.objects.iter();
                    let objects =
                        objects.filter_map(|o| Some((o.location.filename()?.to_owned(), o.size)));
                    let folders = found.common_prefixes.iter();
                    let folders =
                        folders.filter_map(|at| Some((format!("{}/", at.filename()?), 0)));
                    return Ok(objects.chain(folders).collect());
                }
                // A folder that nobody made holds nothing.
                Err(Failure::Absent) if self.kind == Kind::File => return Ok(vec![]),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, folder, &tries))?;
        }
    }

    pub(super) async fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError> {
        let at = self.path(path);
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let options = GetOptions { head: true, ..GetOptions::default() };
            let head = self.heard(self.store.get_opts(&at, options));
            let failure = match tries.attempt(head).await {
                Ok(found) => return Ok(Some(found.meta.size)),
                Err(Failure::Absent) => return Ok(None),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
    }

    /// Reads a range, in parts, and sends its bytes with their position.
    pub(super) async fn read(
        &self,
        path: &str,
        from: u64,
        len: usize,
        sender: mpsc::Sender<(usize, Bytes)>,
    ) -> Result<u64, ArchiveError> {
        let all = Tries::new(&self.limits, len as u64);
        let deadline = all.deadline;
        let parts = (0..len).step_by(PART_BYTES).map(|at| {
            let range = from + at as u64..from + len.min(at + PART_BYTES) as u64;
            let (inner, sender) = (&self, &sender);
            async move { inner.read_part(path, range, at, deadline, sender).await }
        });
        let sizes: Vec<u64> =
            stream::iter(parts).buffer_unordered(PARTS_AT_ONCE).try_collect().await?;
        if sizes.iter().any(|size| *size != sizes[0]) {
            return Err(self.error(&Failure::WrongRange, path, 1, all.begun.elapsed()));
        }
        Ok(sizes[0])
    }

    async fn read_part(
        &self,
        path: &str,
        range: Range<u64>,
        at: usize,
        deadline: Instant,
        sender: &mpsc::Sender<(usize, Bytes)>,
    ) -> Result<u64, ArchiveError> {
        let mut tries = Tries::until(&self.limits, deadline);
        let got = AtomicU64::new(0);
        loop {
            let before = got.load(Relaxed);
            let failure = match tries.attempt(self.read_on(path, &range, at, &got, sender)).await {
                Ok(size) => return Ok(size),
                Err(failure) => failure,
            };
            let progressed = got.load(Relaxed) > before;
            let again = tries.again(failure, progressed).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
    }

    /// One attempt at a part, from where the last one came to.
    async fn read_on(
        &self,
        path: &str,
        range: &Range<u64>,
        at: usize,
        got: &AtomicU64,
        sender: &mpsc::Sender<(usize, Bytes)>,
    ) -> Result<u64, Failure> {
        let begin = range.start + got.load(Relaxed);
        let wanted = GetRange::Bounded(begin..range.end);
        let options = GetOptions { range: Some(wanted), ..GetOptions::default() };
        let answer = match self.heard(self.store.get_opts(&self.path(path), options)).await {
            // The range begins behind the object's end: its size tells.
            Err(Failure::Status(416, _)) => {
                let options = GetOptions { head: true, ..GetOptions::default() };
                let head = self.heard(self.store.get_opts(&self.path(path), options)).await?;
                return beyond(head.meta.size, range);
            }
            answer => answer?,
        };
        let size = answer.meta.size;
        let expected = range.end - begin;
        if answer.range != (begin..range.end) {
            return beyond(size, range);
        }
        let mut chunks = match answer.payload {
            GetResultPayload::Stream(chunks) => chunks,
            GetResultPayload::File(file, name) => {
                let (file, root) = (Arc::new(file), self.root()?);
                let inside = tokio::task::spawn_blocking(move || lies_below(&name, &root)).await;
                inside.map_err(|_| Failure::Strange)??;
                let pieces = (begin..range.end).step_by(FILE_PIECE_BYTES as usize);
                let end = range.end;
                let pieces = stream::iter(pieces).then(move |from| {
                    let (file, len) = (file.clone(), FILE_PIECE_BYTES.min(end - from));
                    let read = move || read_file(&file, from, len as usize);
                    async {
                        tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(e.into()))
                    }
                });
                pieces
                    .map_err(|source| object_store::Error::Generic {
                        store: "file",
                        source: source.into(),
                    })
                    .boxed()
            }
        };
        let mut found = 0;
        while found < expected {
            let chunk = match timeout(self.limits.idle, chunks.next()).await {
                Ok(Some(chunk)) => chunk?,
                Ok(None) => return Err(Failure::Short { found, expected }),
                Err(_) => return Err(Failure::Silent(self.limits.idle)),
            };
            found += chunk.len() as u64;
            if found > expected {
                return Err(Failure::WrongRange);
            }
            let place = at + got.fetch_add(chunk.len() as u64, Relaxed) as usize;
            if sender.send((place, chunk)).await.is_err() {
                // Nobody waits for it any more.
                return Err(Failure::Late);
            }
        }
        Ok(size)
    }

    /// The folder of a checkpoint in the local file system.
    fn root(&self) -> Result<PathBuf, Failure> {
        let root = FsPath::new("/").join(self.prefix.as_ref());
        root.canonicalize().map_err(|error| Failure::Disk(error.kind()))
    }
}

/// What an answer with other bytes than a range means, if the object has this size: its size, if it
/// ends before the range does.
fn beyond(size: u64, range: &Range<u64>) -> Result<u64, Failure> {
    if size < range.end { Ok(size) } else { Err(Failure::WrongRange) }
}

/// Whether a file lies below a folder, whatever links say.
fn lies_below(name: &FsPath, root: &FsPath) -> Result<(), Failure> {
    let real = name.canonicalize().map_err(|error| Failure::Disk(error.kind()))?;
    if real.starts_with(root) { Ok(()) } else { Err(Failure::Outside) }
}

fn read_file(file: &File, from: u64, len: usize) -> std::io::Result<Bytes> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes.into())
}
