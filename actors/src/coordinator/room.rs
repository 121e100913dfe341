//! Whether there is room for a job: among those that run, and ever in some node's cache.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use lite_llm_transport::messages::{JobRequest, Prompt};

use super::{CoordinatorState, JOBS_MAX, NotSubmitted};

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

    /// Whether there is room for a job, now and ever; the positions that it may come to.
    pub(super) fn check_room(&self, request: &JobRequest) -> Result<u64, NotSubmitted> {
        if self.jobs.len() >= JOBS_MAX {
            let reason = format!("{JOBS_MAX} jobs are running or waiting; try again later");
            return Err(NotSubmitted::Refused(reason));
        }
        let positions = positions(request, self.arguments.config.context);
        match too_large(self.caches(), positions) {
            Some(reason) => Err(NotSubmitted::FitsNowhere(reason)),
            None => Ok(positions),
        }
    }

    /// Why no node that is here can take a job that was taken: those that could may have left since.
    pub(super) fn fits_nowhere(&self, job: u64) -> Option<String> {
        self.jobs.get(&job).and_then(|job| too_large(self.caches(), job.positions))
    }
}

/// Positions that a job may come to.
fn positions(request: &JobRequest, context: usize) -> u64 {
    let prompt = match &request.prompt {
        Prompt::Tokens(ids) => ids.len() as u64,
        Prompt::Text(_) | Prompt::Chat(_) => 0,
    };
    (prompt + u64::from(request.max_new_tokens)).min(context as u64)
}

/// Why no cache, of which these hold so many positions, holds as many as are needed, if that is so. One
/// that has not said how many it holds may.
fn too_large(caches: impl Iterator<Item = u64>, needed: u64) -> Option<String> {
    let (nodes, least, largest) =
        caches.fold((0, u64::MAX, 0), |(nodes, a, b), held| (nodes + 1, a.min(held), b.max(held)));
    (nodes > 0 && least > 0 && needed > largest).then(|| {
        format!(
            "the job may come to {needed} tokens, and the largest cache of a worker holds {largest}: \
             ask for fewer tokens, or give a worker a larger --kv"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_cache_counts_and_what_is_not_known_may_be_larger() {
        let request = JobRequest::greedy(Prompt::Tokens(vec![1; 100]), 100);
        let needed = positions(&request, 4096);
        let too_large = |caches: &[u64]| too_large(caches.iter().copied(), needed);
        for caches in [&[64, 256][..], &[], &[64, 0]] {
            assert_eq!(too_large(caches), None, "{caches:?}");
        }
        assert!(too_large(&[64, 192]).unwrap().contains("200 tokens"));
        assert_eq!(positions(&request, 150), 150);
    }
}
