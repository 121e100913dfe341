//! Writes: whole, in parts, only if there is nothing; and removals.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use lite_llm_runtime::checkpoint::archive::ArchiveError;
use object_store::{
    GetOptions, PutMode, PutPayload,
    multipart::{MultipartStore, PartId},
    path::Path,
};
use tokio::time::{Instant, timeout};

use super::{Inner, PARTS_AT_ONCE, failure::Failure, location::Kind, tries::Tries};

/// An object of more is written in parts; S3 takes none below 5 MiB.
const PUT_BYTES: u64 = 16 << 20;
/// Parts that one object may have; S3's limit is 10,000.
const PUT_PARTS_MAX: u64 = 9_000;
/// Time that a removal has for each object, beyond [`super::Limits::deadline`].
const REMOVAL_TIME: Duration = Duration::from_millis(250);

impl Inner {
    /// Whether an object of this size is begun with [`Inner::begin_put`].
    pub(super) fn puts_in_parts(&self, bytes: u64) -> bool {
        self.multipart.is_some() && bytes > PUT_BYTES
    }

    fn parts_store(&self, path: &str) -> Result<&dyn MultipartStore, ArchiveError> {
        let unsupported = || self.error(&Failure::Unsupported, path, 1, Duration::ZERO);
        self.multipart.as_deref().ok_or_else(unsupported)
    }

    pub(super) async fn begin_put(&self, path: &str) -> Result<String, ArchiveError> {
        let (multipart, at) = (self.parts_store(path)?, self.path(path));
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let create = self.heard(multipart.create_multipart(&at));
            let failure = match tries.attempt(create).await {
                Ok(id) => return Ok(id),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
    }

    pub(super) async fn abandon_put(&self, path: &str, id: &str) -> Result<(), ArchiveError> {
        let (multipart, at, id) = (self.parts_store(path)?, self.path(path), id.to_owned());
        let mut tries = Tries::new(&self.limits, 0);
        loop {
            let abort = self.heard(multipart.abort_multipart(&at, &id));
            let failure = match tries.attempt(abort).await {
                Ok(()) | Err(Failure::Absent) => return Ok(()),
                Err(failure) => failure,
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
    }

    pub(super) async fn put(
        &self,
        path: &str,
        file: Arc<File>,
        bytes: u64,
        begun: Option<String>,
    ) -> Result<(), ArchiveError> {
        let at = self.path(path);
        if self.kind == Kind::File {
            return self.put_file(path, &at, &file, bytes).await;
        }
        let multipart = self.parts_store(path)?;
        let id = match begun {
            Some(id) => id,
            None if self.puts_in_parts(bytes) => self.begin_put(path).await?,
            None => return self.put_whole(path, &at, &file, bytes).await,
        };
        let result = self.put_parts(path, &at, &id, &file, bytes, multipart).await;
        if result.is_err() {
            // Parts that are left cost their owner money. If this fails too, whoever noted the name
            // of the upload can end it; or the store's rules for unfinished uploads do.
            let _ = self.heard(multipart.abort_multipart(&at, &id)).await;
        }
        result
    }

    async fn put_whole(
        &self,
        path: &str,
        at: &Path,
        file: &Arc<File>,
        bytes: u64,
    ) -> Result<(), ArchiveError> {
        let body = self.piece(path, file, 0, bytes).await?;
        let mut tries = Tries::new(&self.limits, bytes);
        loop {
            let put = self.store.put_opts(at, body.clone().into(), PutMode::Overwrite.into());
            let Err(failure) = tries.attempt(self.sent(bytes, put)).await else {
                return Ok(());
            };
            let again = tries.again(failure, false).await;
            again.map_err(|failure| self.failed(&failure, path, &tries))?;
        }
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

    pub(super) async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, ArchiveError> {
        let at = self.path(path);
        let mut tries = Tries::new(&self.limits, bytes.len() as u64);
        if self.kind == Kind::Http {
            return Err(self.error(&Failure::Unsupported, path, 1, Duration::ZERO));
        }
        // An attempt that broke off may have been heard; one that met another has not.
        let mut perhaps = false;
        loop {
            let body = PutPayload::from(bytes.clone());
            let put = self.store.put_opts(&at, body, PutMode::Create.into());
            let failure = match tries.attempt(self.sent(bytes.len() as u64, put)).await {
                Ok(_) => return Ok(true),
                Err(Failure::Exists) => return Ok(perhaps && self.holds(&at, &bytes).await),
                Err(failure) => failure,
            };
            perhaps |= !matches!(failure, Failure::Status(409, _));
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

    pub(super) async fn remove(&self, paths: &[String]) -> Result<(), ArchiveError> {
        let time = self.limits.deadline + REMOVAL_TIME * paths.len() as u32;
        let mut tries = Tries::until(&self.limits, Instant::now() + time);
        // Answers come in the order of their paths.
        let mut done = 0;
        loop {
            let before = done;
            let rest: Vec<_> = paths[done..].iter().map(|path| Ok(self.path(path))).collect();
            let mut removed = self.store.delete_stream(stream::iter(rest).boxed());
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
                    done += 1;
                }
            };
            let Err(failure) = tries.attempt(removed).await else { return Ok(()) };
            let again = tries.again(failure, done > before).await;
            again.map_err(|failure| self.failed(&failure, "", &tries))?;
        }
    }
}
