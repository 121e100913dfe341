//! The threads that tokenise prompts.
//!
//! They are always the same: the allocator keeps some of what each thread has needed at most, which for a
//! prompt of megabytes is many times its size, and a pool of threads that come and go would add that up.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;

/// Cloning shares them. They end when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Threads(mpsc::Sender<Work>);

impl Threads {
    /// Starts so many.
    pub(super) fn start(count: usize) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<Work>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..count {
            let receiver = receiver.clone();
            let serve = move || {
                // The lock is let go of before the work is done.
                while let Ok(work) = { receiver.lock().recv() } {
                    work();
                }
            };
            std::thread::Builder::new().name("lite-llm-tokens".into()).spawn(serve)?;
        }
        Ok(Self(sender))
    }

    /// Does some work there; nothing, if it panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (done, result) = oneshot::channel();
        let work = move || {
            if let Ok(found) = catch_unwind(AssertUnwindSafe(work)) {
                // Whoever waited may be gone.
                let _ = done.send(found);
            }
        };
        self.0.send(Box::new(work)).ok()?;
        result.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, thread};

    use super::*;

    #[tokio::test]
    async fn work_is_done_by_the_same_few_threads_also_after_a_panic() {
        let threads = Threads::start(2).unwrap();
        let mut seen = HashSet::new();
        for number in 0..50 {
            assert_eq!(threads.run::<()>(|| panic!("on purpose")).await, None);
            let (found, id) = threads.run(move || (number, thread::current().id())).await.unwrap();
            assert_eq!(found, number);
            seen.insert(id);
        }
        assert!(seen.len() <= 2, "{seen:?}");
    }
}
