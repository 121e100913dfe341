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
mod read;
mod tries;
mod write;

use std::{
    fmt,
    fs::File,
    future::Future,
    path::Path as FsPath,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use futures::executor::block_on;
use lite_llm_runtime::checkpoint::{
    Checkpoint, CheckpointError,
    archive::{Archive, ArchiveError, ArchiveFailure},
};
use object_store::{ObjectStore, multipart::MultipartStore, path::Path};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    task::{JoinHandle, coop::unconstrained},
    time::timeout,
};

use failure::Failure;
pub use location::is_url;
use location::{Kind, Opened};
pub use tries::Limits;
use tries::Tries;

/// Threads of the requests' runtime.
const IO_THREADS: usize = 2;
/// Parts of one operation on their way at once.
const PARTS_AT_ONCE: usize = 4;
/// Chunks that wait for the reader.
const CHUNKS_MAX: usize = 64;

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
///
/// Who waits may be within a poll of another runtime. What of tokio is polled here would take from
/// the budget of that poll, and is never ready again when it is used up: hence `unconstrained`.
struct Task<T>(JoinHandle<T>);

impl<T> Task<T> {
    fn join(mut self) -> T {
        match block_on(unconstrained(&mut self.0)) {
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
        block_on(unconstrained(async {
            while let Some((at, bytes)) = chunks.recv().await {
                out[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }));
        task.join()
    }

    fn begin_put(&self, path: &str, bytes: u64) -> Result<Option<String>, ArchiveError> {
        if !self.0.puts_in_parts(bytes) {
            return Ok(None);
        }
        let (inner, path) = (self.0.clone(), path.to_owned());
        wait(&self.0.location, async move { inner.begin_put(&path).await.map(Some) })
    }

    fn put(
        &self,
        path: &str,
        file: &File,
        bytes: u64,
        begun: Option<&str>,
    ) -> Result<(), ArchiveError> {
        let (inner, path, begun) = (self.0.clone(), path.to_owned(), begun.map(str::to_owned));
        let file = file.try_clone().map_err(|e| self.0.disk(&path, e.kind()))?;
        let put = async move { inner.put(&path, Arc::new(file), bytes, begun).await };
        wait(&self.0.location, put)
    }

    fn abandon_put(&self, path: &str, begun: &str) -> Result<(), ArchiveError> {
        let (inner, path, begun) = (self.0.clone(), path.to_owned(), begun.to_owned());
        wait(&self.0.location, async move { inner.abandon_put(&path, &begun).await })
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
}
