//! How often and how long a store is asked before an operation has failed.
//!
//! Invariant: the time between the first attempt and the last is bounded by the deadline, pauses
//! included.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::failure::Failure;

/// Bytes per second with which large operations are given time beyond [`Limits::deadline`].
const SLOWEST_BYTES_PER_S: f64 = 256.0 * 1024.0;

/// Attempts in a row in vain after which somebody who waits is told so: with the default pauses some
/// three seconds.
const SAID_AT: u32 = 6;

/// How long stores are waited for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// An operation on few bytes ends by then, tried as often as that allows; one on more has a
    /// second more for every 256 KiB.
    pub deadline: Duration,
    /// An attempt that hears nothing for so long has failed.
    pub idle: Duration,
    /// Pause before the second attempt; it doubles each time, and half of it is random.
    pub backoff: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            idle: Duration::from_secs(15),
            backoff: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

impl Limits {
    pub(super) fn time_for(&self, bytes: u64, base: Duration) -> Duration {
        base + Duration::from_secs_f64(bytes as f64 / SLOWEST_BYTES_PER_S)
    }
}

/// The attempts of one operation.
pub(super) struct Tries {
    pub(super) begun: Instant,
    pub(super) deadline: Instant,
    limits: Limits,
    pub(super) tries: u32,
    /// Attempts in a row that brought nothing.
    barren: u32,
    last: Option<Failure>,
}

impl Tries {
    pub(super) fn new(limits: &Limits, bytes: u64) -> Self {
        Self::until(limits, Instant::now() + limits.time_for(bytes, limits.deadline))
    }

    /// Attempts that share their deadline with others.
    pub(super) fn until(limits: &Limits, deadline: Instant) -> Self {
        let begun = Instant::now();
        Self { begun, deadline, limits: *limits, tries: 0, barren: 0, last: None }
    }

    pub(super) async fn attempt<T>(
        &mut self,
        attempt: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        self.tries += 1;
        timeout_at(self.deadline, attempt).await.unwrap_or(Err(Failure::Late))
    }

    /// Waits until it is time for the next attempt; or gives the failure back if there is none.
    pub(super) async fn again(
        &mut self,
        failure: Failure,
        progressed: bool,
    ) -> Result<(), Failure> {
        if failure == Failure::Late {
            // What went wrong before says more.
            return Err(self.last.take().unwrap_or(failure));
        }
        if !failure.may_pass() {
            return Err(failure);
        }
        self.barren = if progressed { 0 } else { self.barren + 1 };
        let doubled = self.limits.backoff * 2u32.pow(self.barren.saturating_sub(1).min(16));
        let pause = doubled.min(self.limits.backoff_max);
        let random = uuid::Uuid::new_v4().as_u128() as u32;
        let pause = pause / 2 + pause.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0);
        if Instant::now() + pause >= self.deadline {
            return Err(failure);
        }
        if self.barren == SAID_AT {
            tracing::warn!(%failure, tries = self.tries, "an object store is asked again and again");
        }
        tracing::debug!(%failure, tries = self.tries, ?pause, "an object store is asked again");
        self.last = Some(failure);
        sleep(pause).await;
        Ok(())
    }
}
