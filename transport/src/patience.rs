//! Trying again when told that there is no room, for as long as the caller has patience.
//!
//! Invariants: whoever says when to come again is obeyed; nobody is tried again after the end of
//! the patience; what will not get better by waiting is not tried again.

use std::time::{Duration, Instant};

use crate::random::jittered;

/// How long those try who are not told how long to.
pub const BUSY_PATIENCE: Duration = Duration::from_secs(10);

/// The pause after which a first try again comes, where the other side named none.
const PAUSE: Duration = Duration::from_millis(50);
/// How often such pauses double.
const DOUBLINGS_MAX: u32 = 4;
/// The longest pause that anybody can impose.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long silence is tried where nobody has ever answered: a crowd at a coordinator's door may keep
/// it from answering for some seconds, and an address that is wrong will never answer.
pub const SILENCE_PATIENCE: Duration = Duration::from_secs(15);

/// What a failure says about trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hint {
    /// It would fail again.
    Final,
    /// There is no room now; perhaps after this time.
    Busy(Option<Duration>),
    /// Nobody answered.
    Silence,
}

/// How often and how long something was tried.
#[derive(Debug)]
pub(crate) struct Patience {
    end: Instant,
    /// Somebody is there, and was busy.
    was_busy: bool,
    /// Until when silence is tried where nobody has ever answered.
    silent_until: Instant,
    tries: u32,
}

impl Patience {
    pub(crate) fn new(now: Instant, patience: Duration) -> Self {
        let end = now.checked_add(patience).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        Self { end, was_busy: false, silent_until: now + SILENCE_PATIENCE, tries: 0 }
    }

    /// Patience with those who are busy, but not with those who say nothing.
    pub(crate) fn with_the_busy(now: Instant, patience: Duration) -> Self {
        Self { silent_until: now, ..Self::new(now, patience) }
    }

    /// The same with somebody who has answered lately.
    pub(crate) fn known(self) -> Self {
        Self { was_busy: true, ..self }
    }

    /// How long to pause before another try; `None` if there is to be none.
    pub(crate) fn pause(&mut self, now: Instant, hint: Hint) -> Option<Duration> {
        let pause = PAUSE * (1 << self.tries.min(DOUBLINGS_MAX));
        self.tries += 1;
        let pause = match hint {
            Hint::Final => return None,
            Hint::Busy(named) => {
                self.was_busy = true;
                named.unwrap_or(pause).min(PAUSE_MAX)
            }
            // In a crowd packets are lost; where nobody is, waiting does not help.
            Hint::Silence if self.was_busy || now < self.silent_until => pause,
            Hint::Silence => return None,
        };
        (now + pause <= self.end).then_some(pause)
    }

    /// Waits until it is time for another try, or says that there is to be none.
    pub(crate) async fn try_again(&mut self, hint: Hint) -> bool {
        match self.pause(tokio::time::Instant::now().into_std(), hint) {
            Some(pause) => {
                tokio::time::sleep(jittered(pause)).await;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_named_pause_is_obeyed_and_others_grow_until_patience_ends() {
        let now = Instant::now();
        let mut patience = Patience::new(now, 2 * SECOND);
        assert_eq!(patience.pause(now, Hint::Busy(Some(SECOND))), Some(SECOND));
        assert_eq!(patience.pause(now, Hint::Busy(None)), Some(2 * PAUSE));
        assert_eq!(patience.pause(now, Hint::Busy(None)), Some(4 * PAUSE));
        assert_eq!(patience.pause(now, Hint::Silence), Some(8 * PAUSE));
        assert_eq!(patience.pause(now, Hint::Busy(Some(3 * SECOND))), None);
        assert_eq!(patience.pause(now + 2 * SECOND, Hint::Busy(None)), None);
        assert_eq!(patience.pause(now, Hint::Final), None);
        // Nobody can make us wait for ever.
        let mut patience = Patience::new(now, Duration::MAX);
        assert_eq!(patience.pause(now, Hint::Busy(Some(Duration::MAX))), Some(PAUSE_MAX));
    }

    #[test]
    fn where_nobody_ever_answered_patience_ends_sooner() {
        let now = Instant::now();
        let mut patience = Patience::new(now, 60 * SECOND);
        assert!(patience.pause(now, Hint::Silence).is_some());
        assert!(patience.pause(now + SILENCE_PATIENCE - SECOND, Hint::Silence).is_some());
        assert!(patience.pause(now + SILENCE_PATIENCE, Hint::Silence).is_none());
        let mut known = Patience::new(now, 60 * SECOND).known();
        assert!(known.pause(now + SILENCE_PATIENCE, Hint::Silence).is_some());
        let mut patience = Patience::with_the_busy(now, 60 * SECOND);
        assert!(patience.pause(now, Hint::Silence).is_none());
        assert!(patience.pause(now, Hint::Busy(None)).is_some());
        assert!(patience.pause(now, Hint::Silence).is_some(), "somebody is there");
        assert!(Patience::new(now, Duration::ZERO).pause(now, Hint::Silence).is_none());
    }
}
