//! Which way a checkpoint's experts come into memory.

use std::{io, path::PathBuf, sync::Arc};

use super::{
    archive::ArchiveFetcher,
    fetch::{Fetcher, LocalFetcher},
    nvme::{NvmeFetcher, NvmeOptions},
    policy::{Segmented, Shape},
};
use crate::{blocks::BlockReader, checkpoint::Checkpoint};

/// Requests to an object store at a time that serve well: latency is what costs.
pub const REQUESTS: usize = 8;
/// Threads that copy experts which lie within the program, at most.
const COPIERS_MAX: usize = 2;

/// How experts are to be fetched.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Reads local files.
    pub reader: Arc<BlockReader>,
    /// A disk cache, if there is to be one.
    pub nvme: Option<NvmeFolder>,
    /// Threads that verify and unpack.
    pub threads: usize,
    /// Requests to an object store at a time, such as [`REQUESTS`]; each has a thread.
    pub requests: usize,
}

/// A folder of a local disk for experts that lie elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeFolder {
    /// Where.
    pub folder: PathBuf,
    /// Bytes that its files may have.
    pub budget: u64,
}

/// The way of a checkpoint's experts into memory: from its folder by the block reader, from a store or
/// the program by threads of their own, and by way of the disk cache, if there is one.
///
/// # Errors
/// If the disk cache cannot be used (see [`NvmeFetcher::open`]), or the system gives no thread.
pub fn fetcher_for(
    checkpoint: &Arc<Checkpoint>,
    options: FetchOptions,
) -> io::Result<Arc<dyn Fetcher>> {
    let FetchOptions { reader, nvme, threads, requests } = options;
    let source: Arc<dyn Fetcher> = if checkpoint.is_local() {
        Arc::new(LocalFetcher::new(checkpoint.clone(), reader.clone(), threads)?)
    } else {
        let threads = match checkpoint.is_stored() {
            true => requests,
            false => threads.min(COPIERS_MAX),
        };
        Arc::new(ArchiveFetcher::new(checkpoint.clone(), threads)?)
    };
    let (Some(NvmeFolder { folder, budget }), Some(shape)) = (nvme, Shape::of(checkpoint.config()))
    else {
        return Ok(source);
    };
    let bytes = checkpoint.tier_expert_bytes().into_iter().max().unwrap_or(1).max(1);
    let slots = budget / bytes / shape.layers.max(1) as u64;
    let nvme = NvmeFetcher::open(NvmeOptions {
        folder,
        budget,
        checkpoint: checkpoint.clone(),
        reader,
        below: source,
        // Of what misses in memory, much is wanted once. That is not to drive out the rest.
        policy: Box::new(Segmented::new(shape, usize::try_from(slots).unwrap_or(usize::MAX))),
        threads,
    })?;
    Ok(Arc::new(nvme))
}
