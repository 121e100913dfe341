//! Whether there is room for a job: among those that run, and ever in some node's cache.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use lite_llm_transport::messages::{JobRequest, Prompt};

use super::{CoordinatorState, JOBS_MAX};

/// Positions that the largest cache of a node holds.
pub(crate) type Largest = Arc<AtomicU64>;

impl CoordinatorState {
    fn caches(&self) -> impl Iterator<Item = u64> {
        self.nodes.values().map(|node| node.status.kv_tokens)
    }

    /// A node has said how it is.
    pub(super) fn note_largest_cache(&self) {
        self.arguments.kv_tokens.store(self.caches().max().unwrap_or(0), Relaxed);
    }

    /// Whether there is room for a job, now and ever.
    pub(super) fn check_room(&self, request: &JobRequest) -> Result<(), String> {
        if self.jobs.len() >= JOBS_MAX {
            return Err(format!("{JOBS_MAX} jobs are running or waiting; try again later"));
        }
        check(self.caches(), request, self.arguments.config.context)
    }
}

/// Whether the cache of some node, of which these hold so many positions, holds as many as a job may
/// come to. One that has not said how many its cache holds may.
fn check(
    caches: impl Iterator<Item = u64>,
    request: &JobRequest,
    context: usize,
) -> Result<(), String> {
    let (nodes, least, largest) =
        caches.fold((0, u64::MAX, 0), |(nodes, a, b), held| (nodes + 1, a.min(held), b.max(held)));
    let prompt = match &request.prompt {
        Prompt::Tokens(ids) => ids.len() as u64,
        Prompt::Text(_) | Prompt::Chat(_) => 0,
    };
    let needed = (prompt + u64::from(request.max_new_tokens)).min(context as u64);
    if nodes == 0 || least == 0 || needed <= largest {
        return Ok(());
    }
    Err(format!(
        "the job may come to {needed} tokens, and the largest cache of a worker holds {largest}: ask \
         for fewer tokens, or give a worker a larger --kv"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_cache_counts_and_what_is_not_known_may_be_larger() {
        let request = JobRequest::greedy(Prompt::Tokens(vec![1; 100]), 100);
        let check = |caches: &[u64]| check(caches.iter().copied(), &request, 4096);
        assert!(check(&[64, 256]).is_ok() && check(&[]).is_ok() && check(&[64, 0]).is_ok());
        assert!(check(&[64, 192]).unwrap_err().contains("200 tokens"));
    }
}
