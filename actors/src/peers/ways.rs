//! Which way an expert comes soonest: a pure estimate from what was measured.
//!
//! Time per byte is taken where a way is busy from one end of a fetch to the next, so that it is the
//! rate of all its fetches together; where it is idle, from the beginning of a fetch, so that it has
//! the latency. With the bytes that are under way already, it says when one more expert would be here.
//! A way that was not used for a while is tried with one expert, for it may have become faster.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use lite_llm_runtime::expert::ExpertKey;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;
/// Least time between two trials of a way that seems slower.
const TRIAL_PAUSE: Duration = Duration::from_secs(10);
/// And how often as long it is as a fetch that way: what trials cost is a fiftieth, at most.
const TRIAL_PAUSES: f64 = 50.0;
/// How long a way that failed is left alone: the first time, and at most. It doubles with each failure
/// that follows another, so that a peer that hangs costs less and less.
pub const FAILED_PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(160));
/// How long a peer that did not have an expert is not asked for it again.
const ABSENT_FOR: Duration = Duration::from_secs(2);
/// Experts that a peer is known not to have, at most.
const ABSENT_MAX: usize = 4096;
/// Time of an answer that it is not here, before there was one, in seconds.
const ASK_GUESS: f64 = 0.001;

/// How fast a way is.
#[derive(Debug, Default)]
pub(super) struct Pace {
    seconds_per_byte: Option<f64>,
    /// Bytes that were asked for and are neither here nor given up.
    under_way: u64,
    ended: Option<Instant>,
    tried: Option<Instant>,
    /// Until then it is not used.
    barred_until: Option<Instant>,
    /// Until then it is used only where no other way is left.
    shunned_until: Option<Instant>,
    /// How often it failed since it last worked.
    failures: u32,
}

impl Pace {
    pub(super) fn began(&mut self, bytes: u64, now: Instant) {
        self.under_way += bytes;
        self.tried = Some(now);
    }

    /// It ended without a measurement.
    pub(super) fn gave_up(&mut self, bytes: u64) {
        self.under_way = self.under_way.saturating_sub(bytes);
    }

    /// An expert came.
    pub(super) fn brought(&mut self, bytes: u64, began: Instant, now: Instant) {
        self.gave_up(bytes);
        self.works();
        let since = self.ended.map_or(began, |ended| ended.max(began));
        let sample = now.saturating_duration_since(since).as_secs_f64() / bytes.max(1) as f64;
        self.seconds_per_byte = Some(blend(self.seconds_per_byte, sample));
        self.ended = Some(now);
    }

    /// Is not to be used for so long.
    pub(super) fn bar(&mut self, now: Instant, pause: Duration) {
        let until = now + pause;
        self.barred_until = Some(self.barred_until.map_or(until, |before| before.max(until)));
    }

    /// It failed. What fails while it is left alone began before, and is the same failure.
    pub(super) fn failed(&mut self, now: Instant) {
        if self.shunned(now) {
            return;
        }
        let (first, longest) = FAILED_PAUSES;
        let pause = first.saturating_mul(1 << self.failures.min(16)).min(longest);
        self.failures = self.failures.saturating_add(1);
        self.shunned_until = Some(now + pause);
        self.bar(now, first);
    }

    /// It answered: what failed before is no sign any more.
    pub(super) fn works(&mut self) {
        self.failures = 0;
    }

    pub(super) fn barred(&self, now: Instant) -> bool {
        self.barred_until.is_some_and(|until| now < until)
    }

    pub(super) fn shunned(&self, now: Instant) -> bool {
        self.barred(now) || self.shunned_until.is_some_and(|until| now < until)
    }

    /// It failed last time, and whether it does again is being tried.
    fn is_on_trial(&self) -> bool {
        self.failures > 0 && self.under_way > 0
    }

    fn seconds(&self, bytes: u64) -> Option<f64> {
        self.seconds_per_byte.map(|each| each * (self.under_way + bytes) as f64)
    }

    /// Whether it is time to see how fast it is now.
    fn due(&self, bytes: u64, now: Instant) -> bool {
        let each = self.seconds_per_byte.unwrap_or(0.0);
        let dear = Duration::try_from_secs_f64(TRIAL_PAUSES * each * bytes as f64);
        let pause = TRIAL_PAUSE.max(dear.unwrap_or(Duration::MAX));
        let since = |tried| now.saturating_duration_since(tried);
        self.under_way == 0 && self.tried.is_none_or(|tried| since(tried) >= pause)
    }
}

/// What is known of a peer.
#[derive(Debug)]
pub(super) struct Odds {
    pub(super) pace: Pace,
    /// Share of what it was asked for lately that it had.
    here: f64,
    /// Time of its answer that it has not, in seconds.
    ask: f64,
    absent: HashMap<ExpertKey, Instant>,
}

impl Default for Odds {
    fn default() -> Self {
        Self { pace: Pace::default(), here: 0.5, ask: ASK_GUESS, absent: HashMap::new() }
    }
}

impl Odds {
    pub(super) fn had(&mut self, bytes: u64, began: Instant, now: Instant) {
        self.pace.brought(bytes, began, now);
        self.here = blend(Some(self.here), 1.0);
    }

    pub(super) fn had_not(&mut self, key: ExpertKey, bytes: u64, began: Instant, now: Instant) {
        self.pace.gave_up(bytes);
        self.pace.works();
        self.here = blend(Some(self.here), 0.0);
        let took = now.saturating_duration_since(began).as_secs_f64();
        self.ask = blend(Some(self.ask), took);
        if self.absent.len() >= ABSENT_MAX {
            self.absent.clear();
        }
        self.absent.insert(key, now);
    }

    fn may_have(&self, key: ExpertKey, now: Instant) -> bool {
        let absent = |at: &Instant| now.saturating_duration_since(*at) < ABSENT_FOR;
        !self.pace.barred(now) && !self.absent.get(&key).is_some_and(absent)
    }

    /// Seconds until an expert is here if it is asked for it first, where the next way takes `next`.
    /// One whose rate is not known is believed to be twice as fast.
    fn expected(&self, bytes: u64, next: f64) -> f64 {
        let comes = self.pace.seconds(bytes).unwrap_or(next / 2.0);
        self.here * comes + (1.0 - self.here) * (self.ask + next)
    }
}

/// Which of some peers to ask for an expert; `None` to take the next way. `must` is set where that
/// has failed.
pub(super) fn choose<'a>(
    next: &Pace,
    peers: impl Iterator<Item = (&'a str, &'a Odds)>,
    (key, bytes): (ExpertKey, u64),
    must: bool,
    now: Instant,
) -> Option<&'a str> {
    let peers: Vec<_> = peers.filter(|(_, odds)| odds.may_have(key, now)).collect();
    let good = |odds: &Odds| !odds.pace.shunned(now) && !odds.pace.is_on_trial();
    let (good, bad): (Vec<_>, Vec<_>) = peers.into_iter().partition(|(_, odds)| good(odds));
    if must || next.shunned(now) {
        let among = if must && good.is_empty() { &bad } else { &good };
        let expected = |odds: &Odds| odds.expected(bytes, f64::from(u16::MAX));
        let best = among.iter().min_by(|(_, a), (_, b)| expected(a).total_cmp(&expected(b)));
        return best.map(|(name, _)| *name);
    }
    let peers = good;
    if let Some((name, _)) = peers.iter().find(|(_, odds)| odds.pace.due(bytes, now)) {
        return Some(name);
    }
    // Before it is measured there is nothing to compare with.
    let seconds = next.seconds(bytes).filter(|_| !next.due(bytes, now))?;
    let expected = peers.iter().map(|(name, odds)| (*name, odds.expected(bytes, seconds)));
    let best = expected.min_by(|(_, a), (_, b)| a.total_cmp(b));
    best.filter(|(_, expected)| *expected < seconds).map(|(name, _)| name)
}

fn blend(before: Option<f64>, newest: f64) -> f64 {
    before.map_or(newest, |before| before + NEWEST * (newest - before))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 1 << 20;

    fn key(expert: u32) -> ExpertKey {
        ExpertKey { layer: 0, tier: 0, group: 0, expert }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Fetches that take so long and follow each other.
    fn use_next(next: &mut Pace, now: &mut Instant, takes: Duration, times: usize) {
        for _ in 0..times {
            next.began(BYTES, *now);
            let began = *now;
            *now += takes;
            next.brought(BYTES, began, *now);
        }
    }

    fn ask(peer: &mut Odds, now: &mut Instant, takes: Duration, times: usize) {
        for _ in 0..times {
            peer.pace.began(BYTES, *now);
            let began = *now;
            *now += takes;
            peer.had(BYTES, began, *now);
        }
    }

    fn chosen(next: &Pace, peer: &Odds, now: Instant) -> bool {
        choose(next, [("w2", peer)].into_iter(), (key(1), BYTES), false, now).is_some()
    }

    #[test]
    fn the_faster_way_is_taken_and_the_slower_one_tried_now_and_then() {
        let (mut next, mut peer, mut now) = (Pace::default(), Odds::default(), Instant::now());
        assert!(chosen(&next, &peer, now), "a peer that was never asked is tried");
        ask(&mut peer, &mut now, ms(2), 1);
        assert!(!chosen(&next, &peer, now), "and so is the next way");
        use_next(&mut next, &mut now, ms(50), 3);
        assert!(chosen(&next, &peer, now), "2 ms against 50");
        ask(&mut peer, &mut now, ms(300), 40);
        use_next(&mut next, &mut now, ms(1), 40);
        assert!(!chosen(&next, &peer, now), "300 ms against 1");
        // A trial of what takes 0.3 s comes at most every 15 s.
        let mut tried = 0;
        for _ in 0..120 {
            use_next(&mut next, &mut now, ms(500), 1);
            use_next(&mut next, &mut now, ms(1), 30);
            if chosen(&next, &peer, now) {
                ask(&mut peer, &mut now, ms(300), 1);
                tried += 1;
            }
        }
        assert!((3..=5).contains(&tried), "{tried} in a minute");
    }

    #[test]
    fn what_is_under_way_counts_so_that_both_ways_are_used() {
        let (mut next, mut peer, mut now) = (Pace::default(), Odds::default(), Instant::now());
        use_next(&mut next, &mut now, ms(10), 20);
        ask(&mut peer, &mut now, ms(5), 60);
        let (mut from_peer, mut from_next) = (0, 0);
        for _ in 0..60 {
            if chosen(&next, &peer, now) {
                peer.pace.began(BYTES, now);
                from_peer += 1;
            } else {
                next.began(BYTES, now);
                from_next += 1;
            }
        }
        assert!(from_peer > from_next && from_next > 10, "{from_peer} and {from_next}");
    }

    #[test]
    fn a_peer_that_seldom_has_what_it_is_asked_for_is_left_alone() {
        let (mut next, mut peer, mut now) = (Pace::default(), Odds::default(), Instant::now());
        use_next(&mut next, &mut now, ms(2), 3);
        ask(&mut peer, &mut now, ms(1), 3);
        assert!(chosen(&next, &peer, now));
        for expert in 2..22 {
            peer.pace.began(BYTES, now);
            peer.had_not(key(expert), BYTES, now, now + ms(1));
        }
        assert!(!chosen(&next, &peer, now), "asking costs half as much as fetching");
        peer.had_not(key(1), BYTES, now, now);
        let of = |now| choose(&next, [("w2", &peer)].into_iter(), (key(1), BYTES), true, now);
        assert_eq!(of(now), None, "it has just said that it has not");
        assert_eq!(of(now + ABSENT_FOR), Some("w2"));
    }

    #[test]
    fn a_way_that_failed_is_left_alone_for_a_while() {
        let (mut next, mut peer, mut now) = (Pace::default(), Odds::default(), Instant::now());
        use_next(&mut next, &mut now, ms(1), 9);
        ask(&mut peer, &mut now, ms(100), 9);
        assert!(!chosen(&next, &peer, now));
        next.failed(now);
        let (first, _) = FAILED_PAUSES;
        assert!(chosen(&next, &peer, now) && !chosen(&next, &peer, now + first));
        peer.pace.failed(now);
        assert!(!chosen(&next, &peer, now), "then the next way says why");
    }

    #[test]
    fn a_peer_that_hangs_is_tried_less_and_less_often_and_by_one_fetch_at_a_time() {
        let (mut next, mut peer, mut now) = (Pace::default(), Odds::default(), Instant::now());
        ask(&mut peer, &mut now, ms(1), 3);
        use_next(&mut next, &mut now, ms(100), 3);
        let (first, longest) = FAILED_PAUSES;
        let mut expected = first;
        for round in 0..12 {
            for _ in 0..4 {
                peer.pace.began(BYTES, now);
            }
            // All that were under way fail one after the other: that is one failure.
            for late in 0..4 {
                peer.pace.gave_up(BYTES);
                peer.pace.failed(now + ms(late));
            }
            assert!(!chosen(&next, &peer, now + expected - ms(1)), "round {round}");
            now += expected;
            assert!(chosen(&next, &peer, now), "round {round}: after {expected:?}");
            peer.pace.began(BYTES, now);
            assert!(!chosen(&next, &peer, now), "one shows whether it still hangs");
            let must = |now| choose(&next, [("w2", &peer)].into_iter(), (key(1), BYTES), true, now);
            assert!(must(now).is_some(), "where there is no other way, it is asked");
            peer.pace.gave_up(BYTES);
            expected = (2 * expected).min(longest);
        }
        assert_eq!(expected, longest);
        // Where there is no other way it is asked again after the first pause, whatever it has grown to.
        peer.pace.failed(now);
        let must = |now| choose(&next, [("w2", &peer)].into_iter(), (key(1), BYTES), true, now);
        assert!(must(now + first - ms(1)).is_none() && must(now + first).is_some());
        now += longest;
        // So that it is not tried instead.
        use_next(&mut next, &mut now, ms(100), 1);
        ask(&mut peer, &mut now, ms(1), 1);
        peer.pace.failed(now);
        assert!(!chosen(&next, &peer, now + first - ms(1)));
        assert!(chosen(&next, &peer, now + first), "it worked meanwhile: the first pause again");
    }
}
