//! One function over many items on a few threads, for hashing.
//!
//! Invariant: results and errors do not depend on the number of threads: results keep the order of
//! their items, and of several errors the first item's is returned.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};

use parking_lot::Mutex;

/// Applies `f` to every item on `threads` threads, the caller's among them. After an error no
/// further item is begun.
pub(crate) fn try_map<T: Sync, R: Send, E: Send>(
    threads: usize,
    items: &[T],
    f: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<R, E>)>> = Mutex::new(Vec::with_capacity(items.len()));
    let work = || {
        loop {
            let i = next.fetch_add(1, Relaxed);
            let Some(item) = items.get(i) else { return };
            let result = f(item);
            if result.is_err() {
                // Items are begun in order, so the first error is among those begun by now.
                next.store(items.len(), Relaxed);
            }
            done.lock().push((i, result));
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(items.len()) {
            scope.spawn(work);
        }
        work();
    });
    let mut done = done.into_inner();
    done.sort_unstable_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::try_map;

    #[test]
    fn results_keep_their_order_and_the_first_error_counts() {
        let items: Vec<usize> = (0..100).collect();
        for threads in [1, 2, 7] {
            let squares = try_map(threads, &items, |i| Ok::<_, usize>(i * i)).unwrap();
            assert!(squares.iter().enumerate().all(|(i, square)| *square == i * i));
            let error = try_map(threads, &items, |i| if i % 40 == 39 { Err(*i) } else { Ok(*i) });
            assert_eq!(error, Err(39));
        }
        assert_eq!(try_map(3, &[], |_: &u8| Ok::<_, ()>(())), Ok(vec![]));
    }
}
