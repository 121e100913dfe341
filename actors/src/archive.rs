//! Object stores as archives of checkpoints: what is blocking and simple in
//! [`lite_llm_runtime::checkpoint::archive`], over the asynchronous `object_store` crate.
//!
//! Requests run on a small runtime of their own, so that whoever reads may block: compute threads,
//! storage threads, commands. Bytes come to the reader in the chunks in which the network brings
//! them and are copied once, to where they are wanted.
//!
//! Invariants: an operation ends within its deadline ([`Limits`]), with an answer or with an error
//! that names the object and what to do; a read that broke off goes on where it was; more bytes than
//! were asked for are never taken; no error, log line or `Debug` holds credentials.

mod failure;
mod location;
mod tries;

use std::{
    fmt,
    fs::File,
    future::Future,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path as FsPath, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, executor::block_on, stream};
use lite_llm_runtime::checkpoint::{
    Checkpoint, CheckpointError,
    archive::{Archive, ArchiveError, ArchiveFailure},
};
use object_store::{
    GetOptions, GetRange, GetResultPayload, ObjectStore, PutMode, PutPayload,
    multipart::{MultipartStore, PartId},
    path::Path,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout},
};

use failure::Failure;
pub use location::is_url;
use location::{Kind, Opened};
pub use tries::Limits;
use tries::Tries;

/// Threads of the requests' runtime.
const IO_THREADS: usize = 2;
/// A read of more is cut in parts of so many bytes, read together.
const PART_BYTES: usize = 8 << 20;
/// Parts of one operation on their way at once.
const PARTS_AT_ONCE: usize = 4;
/// Chunks that wait for the reader.
const CHUNKS_MAX: usize = 64;
/// An object of more is written in parts; S3 takes none below 5 MiB.
const PUT_BYTES: u64 = 16 << 20;
/// Parts that one object may have; S3's limit is 10,000.
const PUT_PARTS_MAX: u64 = 9_000;
/// Where settings and credentials come from, and how long stores are waited for.
#[derive(Clone, Default)]
pub struct StoreOptions {
    /// Variables as they stand in the environment: `AWS_…`, `GOOGLE_…`, `AZURE_…`.
    pub environment: Vec<(String, String)>,
    /// Deadlines and pauses.
    pub limits: Limits,
}

impl StoreOptions {
    /// This process's environment.
    pub fn from_env() -> Self {
        let text = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((key.into_string().ok()?, value.into_string().ok()?))
        };
        let environment = std::env::vars_os().filter_map(text).collect();
        Self { environment, limits: Limits::default() }
    }
}

/// A prefix of an object store. Clones share its connections.
#[derive(Clone)]
pub struct StoreArchive(Arc<Inner>);

struct Inner {
    location: String,
    kind: Kind,
    store: Arc<dyn ObjectStore>,
    multipart: Option<Arc<dyn MultipartStore>>,
    prefix: Path,
    limits: Limits,
}

impl fmt::Debug for StoreArchive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The store itself may know secrets.
        f.debug_tuple("StoreArchive").field(&self.0.location).finish()
    }
}

/// Opens the checkpoint at a location: a folder, or a URL with or without `@N`.
pub fn open_checkpoint(location: &FsPath) -> Result<Checkpoint, CheckpointError> {
    match location.to_str() {
        Some(url) if is_url(location) => open_checkpoint_url(url, &StoreOptions::from_env()),
        _ => Checkpoint::open(location),
    }
}

/// Opens the checkpoint at a URL, with or without `@N`.
pub fn open_checkpoint_url(
    url: &str,
    options: &StoreOptions,
) -> Result<Checkpoint, CheckpointError> {
    let (url, number) = location::split_number(url);
    Checkpoint::open_archive(Arc::new(StoreArchive::open(url, options)?), number)
}

/// The requests' runtime. It lives as long as the process: dropping one is not allowed everywhere.
static IO: LazyLock<Result<Runtime, String>> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread()
        .worker_threads(IO_THREADS)
        .thread_name("lite-llm-archive")
        .enable_all()
        .build();
    runtime.map_err(|error| error.to_string())
});

/// Runs something on the requests' runtime and waits for it, on a thread of any kind.
fn wait<T: Send + 'static>(
    location: &str,
    future: impl Future<Output = Result<T, ArchiveError>> + Send + 'static,
) -> Result<T, ArchiveError> {
    let task = Task(io(location)?.spawn(future));
    task.join()
}

fn io(location: &str) -> Result<&'static Runtime, ArchiveError> {
    IO.as_ref().map_err(|reason| ArchiveError {
        object: location.to_owned(),
        kind: ArchiveFailure::Unavailable,
        reason: format!("the system gives no threads: {reason}"),
    })
}

/// A task that ends with whoever waits for it.
struct Task<T>(JoinHandle<T>);

impl<T> Task<T> {
    fn join(mut self) -> T {
        match block_on(&mut self.0) {
            Ok(value) => value,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => unreachable!("nobody else ends it, and its runtime lives on"),
            },
        }
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl StoreArchive {
    /// Opens the store of a URL: `s3://`, `gs://`, `az://`, `http(s)://` or `file://`. Asks nobody
    /// yet, so what is wrong with it shows with the first request.
    pub fn open(url: &str, options: &StoreOptions) -> Result<Self, ArchiveError> {
        let limits = options.limits;
        let Opened { kind, location, prefix, store, multipart } =
            location::open(url, &options.environment, &limits)?;
        Ok(Self(Arc::new(Inner { location, kind, store, multipart, prefix, limits })))
    }
}

impl Archive for StoreArchive {
    fn location(&self) -> String {
        self.0.location.clone()
    }

    fn list(&self, folder: &str) -> Result<Option<Vec<(String, u64)>>, ArchiveError> {
        if self.0.kind == Kind::Http {
            // Few web servers list, and no two alike.
            return Ok(None);
        }
        let (inner, folder) = (self.0.clone(), folder.to_owned());
        wait(&self.0.location, async move { inner.list(&folder).await.map(Some) })
    }

    fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError> {
        let (inner, path) = (self.0.clone(), path.to_owned());
        wait(&self.0.location, async move { inner.size(&path).await })
    }

    fn read_into(&self, path: &str, from: u64, out: &mut [u8]) -> Result<u64, ArchiveError> {
        if out.is_empty() {
            let absent = || self.0.error(&Failure::Absent, path, 1, Duration::ZERO);
            return self.size(path)?.ok_or_else(absent);
        }
        let (sender, mut chunks) = mpsc::channel::<(usize, Bytes)>(CHUNKS_MAX);
        let (inner, path, len) = (self.0.clone(), path.to_owned(), out.len());
        let read = async move { inner.read(&path, from, len, sender).await };
        let task = Task(io(&self.0.location)?.spawn(read));
        block_on(async {
            while let Some((at, bytes)) = chunks.recv().await {
                out[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        });
        task.join()
    }

    fn put(&self, path: &str, file: &File, bytes: u64) -> Result<(), ArchiveError> {
        let (inner, path) = (self.0.clone(), path.to_owned());
        let file = file.try_clone().map_err(|e| self.0.disk(&path, e.kind()))?;
        wait(&self.0.location, async move { inner.put(&path, Arc::new(file), bytes).await })
    }

    fn create(&self, path: &str, bytes: &[u8]) -> Result<bool, ArchiveError> {
        let (inner, path, bytes) = (self.0.clone(), path.to_owned(), Bytes::copy_from_slice(bytes));
        wait(&self.0.location, async move { inner.create(&path, bytes).await })
    }

    fn remove(&self, paths: &[String]) -> Result<(), ArchiveError> {
        let (inner, paths) = (self.0.clone(), paths.to_vec());
        wait(&self.0.location, async move { inner.remove(&paths).await })
    }
}

impl Inner {
    fn path(&self, path: &str) -> Path {
        self.prefix.parts().chain(Path::from(path).parts()).collect()
    }

    fn error(&self, failure: &Failure, path: &str, tries: u32, elapsed: Duration) -> ArchiveError {
        let object = match path {
            "" => self.location.clone(),
            path => format!("{}/{path}", self.location),
        };
        failure.error(self.kind, object, tries, elapsed)
    }

    fn disk(&self, path: &str, kind: std::io::ErrorKind) -> ArchiveError {
        self.error(&Failure::Disk(kind), path, 1, Duration::ZERO)
    }

    fn failed(&self, failure: &Failure, path: &str, tries: &Tries) -> ArchiveError {
        self.error(failure, path, tries.tries, tries.begun.elapsed())
    }

    /// A request that answers within the idle time.
    async fn heard<T>(
        &self,
        request: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, Failure> {
        self.sent(0, request).await
    }

    /// A request that answers within the idle time when it has sent so many bytes.
    async fn sent<T>(
        &self,
        bytes: u64,
        request: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, Failure> {
        let time = self.limits.time_for(bytes, self.limits.idle);
        match timeout(time, request).await {
            Ok(answer) => answer.map_err(Failure::from),
            Err(_) => Err(Failure::Silent(time)),
        }
    }

    async fn list(&self, folder: &str) -> Result<Vec<(String, u64)>, ArchiveError> {
        let at = self.path(folder);
        let at = (!at.as_ref().is_empty()).then_some(at);
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let listing = self.heard(self.store.list_with_delimiter(at.as_ref()));
            let failure = match tries.attempt(listing).await {
                Ok(found) => {
                    let name = |path: &Path| path.filename().map(str::to_owned);
                    let objects = found.objects.into_iter();
                    return Ok(objects
                        .filter_map(|o| Some((name(&o.location)?, o.size)))
                        .collect());
                }
                // A folder that nobody made holds nothing.
                Err(Failure::Absent) if self.kind == Kind::File => return Ok(vec![]),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, folder, &tries))?;
        }
    }

    async fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError> {
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
    async fn read(
        self: Arc<Self>,
        path: &str,
        from: u64,
        len: usize,
        sender: mpsc::Sender<(usize, Bytes)>,
    ) -> Result<u64, ArchiveError> {
        let deadline = Tries::new(&self.limits, len as u64).deadline;
        let parts = (0..len).step_by(PART_BYTES).map(|at| {
            let range = from + at as u64..from + len.min(at + PART_BYTES) as u64;
            let (inner, path, sender) = (self.clone(), path.to_owned(), sender.clone());
            async move { inner.read_part(&path, range, at, deadline, &sender).await }
        });
        let sizes: Vec<u64> =
            stream::iter(parts).buffer_unordered(PARTS_AT_ONCE).try_collect().await?;
        // Whoever knows the size compares it; where answers differ, any that is wrong will do.
        let odd = sizes.iter().find(|size| **size != sizes[0]);
        Ok(*odd.unwrap_or(&sizes[0]))
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
                return Ok(head.meta.size);
            }
            answer => answer?,
        };
        let size = answer.meta.size;
        let expected = range.end - begin;
        if answer.range != (begin..range.end) {
            // The object ends before the range does: its size tells.
            return if size < range.end { Ok(size) } else { Err(Failure::WrongRange) };
        }
        let mut chunks = match answer.payload {
            GetResultPayload::Stream(chunks) => chunks,
            GetResultPayload::File(file, name) => {
                let root = self.root()?;
                let read = move || read_file(&file, &name, &root, begin, expected as usize);
                let read = tokio::task::spawn_blocking(read).await;
                let bytes = read.map_err(|_| Failure::Strange)??;
                stream::iter([Ok(bytes)]).boxed()
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

    async fn put(&self, path: &str, file: Arc<File>, bytes: u64) -> Result<(), ArchiveError> {
        let at = self.path(path);
        if self.kind == Kind::File {
            return self.put_file(path, &at, &file, bytes).await;
        }
        let Some(multipart) = &self.multipart else {
            return Err(self.error(&Failure::Unsupported, path, 1, Duration::ZERO));
        };
        if bytes <= PUT_BYTES {
            let body = self.piece(path, &file, 0, bytes).await?;
            let mut tries = Tries::new(&self.limits, bytes);
            loop {
                let put = self.store.put_opts(&at, body.clone().into(), PutMode::Overwrite.into());
                let Err(failure) = tries.attempt(self.sent(bytes, put)).await else {
                    return Ok(());
                };
                let again = tries.again(failure, false).await;
                again.map_err(|failure| self.failed(&failure, path, &tries))?;
            }
        }
        let mut tries = Tries::new(&self.limits, 0);
        let id = loop {
            let create = self.heard(multipart.create_multipart(&at));
            let failure = match tries.attempt(create).await {
                Ok(id) => break id,
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        };
        let result = self.put_parts(path, &at, &id, &file, bytes, &**multipart).await;
        if result.is_err() {
            // Parts that are left cost their owner money. If this fails too, the store's rules for
            // unfinished uploads are what remains.
            let _ = self.heard(multipart.abort_multipart(&at, &id)).await;
        }
        result
    }

    async fn put_parts(
        &self,
        path: &str,
        at: &Path,
        id: &String,
        file: &Arc<File>,
        bytes: u64,
        multipart: &dyn MultipartStore,
    ) -> Result<(), ArchiveError> {
        let part_bytes = PUT_BYTES.max(bytes.div_ceil(PUT_PARTS_MAX));
        let parts = (0..bytes.div_ceil(part_bytes)).map(|index| async move {
            let from = index * part_bytes;
            let len = part_bytes.min(bytes - from);
            let body = self.piece(path, file, from, len).await?;
            let mut tries = Tries::new(&self.limits, len);
            loop {
                let put = multipart.put_part(at, id, index as usize, body.clone().into());
                let failure = match tries.attempt(self.sent(len, put)).await {
                    Ok(part) => return Ok::<PartId, ArchiveError>(part),
                    Err(failure) => failure,
                };
                let again = tries.again(failure, false).await;
                again.map_err(|failure| self.failed(&failure, path, &tries))?;
            }
        });
        let parts: Vec<PartId> = stream::iter(parts).buffered(PARTS_AT_ONCE).try_collect().await?;
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let complete = multipart.complete_multipart(at, id, parts.clone());
            let failure = match tries.attempt(self.heard(complete)).await {
                Ok(_) => return Ok(()),
                // An earlier attempt may have been heard, and its answer lost.
                Err(Failure::Absent) if tries.tries > 1 => return Ok(()),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
    }

    /// Writes a file of the local file system, piece by piece, which appears when it is whole.
    async fn put_file(
        &self,
        path: &str,
        at: &Path,
        file: &Arc<File>,
        bytes: u64,
    ) -> Result<(), ArchiveError> {
        let failed =
            |error: object_store::Error| self.error(&Failure::from(error), path, 1, Duration::ZERO);
        let mut upload = self
            .store
            .put_multipart_opts(at, object_store::PutMultipartOptions::default())
            .await
            .map_err(failed)?;
        let mut from = 0;
        while from < bytes {
            let len = PUT_BYTES.min(bytes - from);
            let body = self.piece(path, file, from, len).await?;
            upload.put_part(body.into()).await.map_err(failed)?;
            from += len;
        }
        upload.complete().await.map(drop).map_err(failed)
    }

    /// Bytes of the file that is uploaded.
    async fn piece(
        &self,
        path: &str,
        file: &Arc<File>,
        from: u64,
        len: u64,
    ) -> Result<Bytes, ArchiveError> {
        let file = file.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, from).map(|()| Bytes::from(bytes))
        });
        let read = read.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        read.map_err(|error| self.disk(path, error.kind()))
    }

    async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, ArchiveError> {
        let at = self.path(path);
        let mut tries = Tries::new(&self.limits, bytes.len() as u64);
        if self.kind == Kind::Http {
            return Err(self.error(&Failure::Unsupported, path, 1, Duration::ZERO));
        }
        loop {
            let body = PutPayload::from(bytes.clone());
            let put = self.store.put_opts(&at, body, PutMode::Create.into());
            let failure = match tries.attempt(self.sent(bytes.len() as u64, put)).await {
                Ok(_) => return Ok(true),
                // An earlier attempt may have been heard, and its answer lost: then it is ours.
                Err(Failure::Exists) if tries.tries > 1 => {
                    return Ok(self.holds(&at, &bytes).await);
                }
                Err(Failure::Exists) => return Ok(false),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
    }

    async fn holds(&self, at: &Path, bytes: &Bytes) -> bool {
        let Ok(answer) = self.heard(self.store.get_opts(at, GetOptions::default())).await else {
            return false;
        };
        match timeout(self.limits.deadline, answer.bytes()).await {
            Ok(Ok(found)) => found == *bytes,
            _ => false,
        }
    }

    async fn remove(&self, paths: &[String]) -> Result<(), ArchiveError> {
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let all: Vec<_> = paths.iter().map(|path| Ok(self.path(path))).collect();
            let mut removed = self.store.delete_stream(stream::iter(all).boxed());
            let removed = async {
                loop {
                    match timeout(self.limits.idle, removed.next()).await {
                        Ok(None) => return Ok(()),
                        Ok(Some(Ok(_))) => {}
                        Ok(Some(Err(error))) => match Failure::from(error) {
                            Failure::Absent => {}
                            failure => return Err(failure),
                        },
                        Err(_) => return Err(Failure::Silent(self.limits.idle)),
                    }
                }
            };
            let Err(failure) = tries.attempt(removed).await else { return Ok(()) };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, "", &tries))?;
        }
    }
}

/// Bytes of a file that lies below a folder, whatever links say.
fn read_file(
    file: &File,
    name: &FsPath,
    root: &FsPath,
    from: u64,
    len: usize,
) -> Result<Bytes, Failure> {
    let disk = |error: std::io::Error| Failure::Disk(error.kind());
    if !name.canonicalize().map_err(disk)?.starts_with(root) {
        return Err(Failure::Outside);
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, from).map_err(disk)?;
    Ok(bytes.into())
}
