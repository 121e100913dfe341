//! A line a second at most about what strangers do, with a count of what is not said.
//!
//! A pure machine: what happens goes in with its time, lines come out. The first of a burst is
//! said at once; of all that follow within the interval the last is kept, and said with the number
//! of the others when the interval is over.
//!
//! Invariants: between two lines lies [`Throttle::new`]'s interval at least; the lines said and the
//! counts in them add up to all that happened; memory is two items, however much happens.

use std::time::{Duration, Instant};

/// What happens to a throttle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<T> {
    /// Something that is worth a line.
    Happened(T),
    /// Time went by.
    Tick,
}

/// A line to be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<T> {
    /// What happened last.
    pub last: T,
    /// How many others happened since the line before, of which nothing is said.
    pub others: u64,
}

/// The machine.
#[derive(Debug)]
pub struct Throttle<T> {
    interval: Duration,
    /// Before this moment nothing is said.
    quiet_until: Option<Instant>,
    held: Option<Line<T>>,
    ready: Option<Line<T>>,
}

impl<T> Throttle<T> {
    /// A throttle that says one line in every `interval` at most.
    pub fn new(interval: Duration) -> Self {
        Self { interval, quiet_until: None, held: None, ready: None }
    }

    /// Something happened, or time went by.
    pub fn handle(&mut self, now: Instant, event: Event<T>) {
        if let Event::Happened(last) = event {
            let others = self.held.take().map_or(0, |line| line.others + 1);
            self.held = Some(Line { last, others });
        }
        if self.quiet_until.is_some_and(|until| now < until) {
            return;
        }
        self.quiet_until = self.held.is_some().then(|| now + self.interval);
        if let Some(mut line) = self.held.take() {
            // A line that nobody took is one of those of which nothing is said.
            line.others += self.ready.take().map_or(0, |missed| missed.others + 1);
            self.ready = Some(line);
        }
    }

    /// The line to be said now, if any.
    pub fn poll_command(&mut self) -> Option<Line<T>> {
        self.ready.take()
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.quiet_until.filter(|_| self.held.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_is_said_at_once_and_the_last_of_the_others_with_their_number() {
        let start = Instant::now();
        let mut throttle = Throttle::new(SECOND);
        throttle.handle(start, Event::Happened(0));
        assert_eq!(throttle.poll_command(), Some(Line { last: 0, others: 0 }));
        assert_eq!(throttle.poll_timeout(), None);
        for i in 1..=1000 {
            throttle.handle(start + i * SECOND / 2000, Event::Happened(i));
            assert_eq!(throttle.poll_command(), None);
        }
        assert_eq!(throttle.poll_timeout(), Some(start + SECOND));
        throttle.handle(start + SECOND, Event::Tick);
        assert_eq!(throttle.poll_command(), Some(Line { last: 1000, others: 999 }));
        // Two seconds later all is quiet again, so the next is said at once.
        throttle.handle(start + 3 * SECOND, Event::Happened(7));
        assert_eq!(throttle.poll_command(), Some(Line { last: 7, others: 0 }));
    }

    #[test]
    fn a_flood_gives_a_line_a_second_and_the_counts_add_up() {
        let start = Instant::now();
        let mut throttle = Throttle::new(SECOND);
        let (mut lines, mut said) = (Vec::new(), 0);
        for i in 0..170_000_u64 {
            let now = start + Duration::from_micros(i * 59);
            throttle.handle(now, Event::Happened(i));
            // Polled late, and sometimes not at all.
            if let Some(line) = (i % 7 == 0).then(|| throttle.poll_command()).flatten() {
                lines.push(now);
                said += line.others + 1;
            }
        }
        throttle.handle(start + 60 * SECOND, Event::Tick);
        said += throttle.poll_command().map_or(0, |line| line.others + 1);
        assert_eq!(said, 170_000);
        assert!(lines.len() <= 11, "{} lines in 10 s", lines.len());
        assert!(lines.windows(2).all(|pair| pair[1] - pair[0] >= SECOND - SECOND / 100));
    }
}
