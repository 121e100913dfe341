//! Drafts of a smaller set of tiers: the same backbone with one tier only, whose keys and values are in
//! pages of their own.
//!
//! A draft is a chunk of a pass like any other, but of another set of tiers, so its experts may be
//! anywhere. It goes on with a sequence token by token, and the sequence's next own pass verifies them
//! all at once.
//!
//! Whether drafts pay is measured, for it depends on where experts are: a token with drafts, and the
//! drafts before it, against one without. Where nobody says what time it is, the share of right guesses
//! decides, as for other guesses.
//!
//! Invariants: what fails a draft ends drafting, never the sequence; drafts take pages from nobody, and
//! give theirs up to whoever needs some; only tokens that were generated make pages known to others.

use std::{sync::Arc, time::Instant};

use super::{Drafter, GUESS_MAX};
use crate::{
    kv::{PagePool, PageTable, Prefix},
    tier::TierMask,
};

/// Tokens without drafts whose time is measured before the first draft.
const PLAIN_FIRST: u32 = 4;
/// Verified drafts after which the time without them is measured again, and tokens of that.
const PLAIN_AGAIN: (u32, u32) = (32, 2);
/// Weight of the newest time.
const NEWEST: f32 = 0.3;

/// What a tier drafts for one sequence.
#[derive(Debug)]
pub(crate) struct TierDraft {
    /// Index of the tier.
    pub(crate) tier: usize,
    pub(crate) tiers: Arc<TierMask>,
    pub(crate) table: PageTable,
    /// What the tier goes on with after the sequence's tokens.
    pub(crate) ahead: Vec<u32>,
    /// The pass that the sequence is in computes for the draft.
    pub(crate) in_pass: bool,
    root: Prefix,
    /// Positions in its pages, of the sequence's tokens and then of those ahead.
    cached: usize,
    /// It cannot go on.
    over: bool,
    pace: Pace,
}

impl TierDraft {
    pub(crate) fn new(tier: usize, tiers: TierMask, tenant: &str) -> Self {
        Self {
            tier,
            root: Prefix::root(tenant, &tiers),
            tiers: Arc::new(tiers),
            table: PageTable::default(),
            ahead: Vec::new(),
            in_pass: false,
            cached: 0,
            over: false,
            pace: Pace::default(),
        }
    }

    /// Pages that somebody else could have.
    pub(crate) fn spare_pages(&self) -> usize {
        if self.in_pass { 0 } else { self.table.pages().len() }
    }

    /// Tokens that a draft is to have, if there is room for so many.
    pub(crate) fn wants(&self, drafter: &Drafter, room: usize) -> usize {
        if self.over || self.pace.wants_plain() { 0 } else { drafter.wants(room) }
    }

    /// The next tokens to compute, at most so many, the first one's position, and whether they end with
    /// the last; or nothing if no page is free for them.
    pub(crate) fn next(
        &mut self,
        pool: &mut PagePool,
        tokens: &[u32],
        most: usize,
    ) -> Option<(Vec<u32>, usize, bool)> {
        if self.table.pages().is_empty() && self.ahead.is_empty() {
            self.cached = self.table.adopt(pool, self.root, tokens);
        }
        let end = tokens.len() + self.ahead.len();
        let count = (end - self.cached).min(most);
        if count == 0 || self.table.reserve(pool, self.cached + count).is_err() {
            return None;
        }
        // What it catches up with is no part of what a draft costs from then on.
        self.pace.cold |= count > GUESS_MAX + 1;
        let text = tokens.iter().chain(&self.ahead).skip(self.cached).take(count);
        Some((text.copied().collect(), self.cached, self.cached + count == end))
    }

    /// So many positions more are in its pages; after the last one comes this token.
    pub(crate) fn computed(&mut self, positions: usize, next: Option<u32>) {
        self.cached += positions;
        self.ahead.extend(next);
    }

    /// The sequence has these tokens by now, of which `before` are older than the draft. Returns how
    /// many were drafted.
    pub(crate) fn settle(&mut self, pool: &mut PagePool, tokens: &[u32], before: usize) -> usize {
        let ahead = std::mem::take(&mut self.ahead);
        let own = &tokens[before.min(tokens.len())..];
        let right = ahead.iter().zip(own).take_while(|(ahead, own)| ahead == own).count();
        self.cached = self.cached.min(before + right);
        self.table.show(pool, self.root, tokens, self.cached);
        ahead.len()
    }

    /// Gives its pages back; what is drafted later begins anew.
    pub(crate) fn release(&mut self, pool: &mut PagePool) {
        self.table.release(pool);
        (self.cached, self.ahead) = (0, Vec::new());
        self.rest();
    }

    /// Ends it for good.
    pub(crate) fn fail(&mut self, pool: &mut PagePool) {
        self.release(pool);
        self.over = true;
    }

    /// The time until the next token says nothing.
    pub(crate) fn rest(&mut self) {
        self.pace.since = None;
    }

    /// So many tokens came, of which so many were drafted or meant to be. Says what a token takes with
    /// drafts, as a share of what it takes without, where that is known.
    pub(crate) fn came(
        &mut self,
        now: Option<Instant>,
        gained: usize,
        drafted: usize,
    ) -> Option<f32> {
        self.pace.came(now?, gained, drafted)
    }
}

/// How long a token takes with drafts and without.
#[derive(Debug, Default)]
struct Pace {
    /// When the last token came, if the time since then says something.
    since: Option<Instant>,
    /// Seconds for a token.
    plain: Option<f32>,
    drafted: Option<f32>,
    /// Tokens without drafts that are still to be measured, once there is a clock.
    plains: u32,
    /// Drafts since then.
    drafts: u32,
    /// The draft that is not verified yet has caught up with the sequence.
    cold: bool,
    /// There is a clock.
    timed: bool,
}

impl Pace {
    fn wants_plain(&self) -> bool {
        self.plains > 0
    }

    fn came(&mut self, now: Instant, gained: usize, drafted: usize) -> Option<f32> {
        if gained == 0 {
            return None;
        }
        if !self.timed {
            (self.timed, self.plains) = (true, PLAIN_FIRST);
        }
        let since = self.since.replace(now);
        let cold = std::mem::take(&mut self.cold) && drafted > 0;
        let seconds = now.saturating_duration_since(since?).as_secs_f32() / gained as f32;
        let mean = match drafted {
            0 => {
                self.plains = self.plains.saturating_sub(1);
                &mut self.plain
            }
            // Drafts were dear before, and all of this one is wrong: it needs no second look.
            _ if cold && gained == 1 && self.drafted.is_some() => return Some(f32::INFINITY),
            // It is not known to be dear, nor to be cheap.
            _ if cold => return Some(1.0),
            _ => {
                self.drafts += 1;
                if self.drafts >= PLAIN_AGAIN.0 {
                    (self.drafts, self.plains) = (0, PLAIN_AGAIN.1);
                }
                &mut self.drafted
            }
        };
        *mean = Some(mean.map_or(seconds, |mean| mean + NEWEST * (seconds - mean)));
        Some(self.drafted? / self.plain?.max(f32::MIN_POSITIVE))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lite_llm_kernels::kv::PAGE_TOKENS;

    use super::*;

    #[test]
    fn drafts_end_where_they_take_longer_than_they_save() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let mut at = Duration::ZERO;
        let mut came = |ms, gained, drafted| {
            at += Duration::from_millis(ms);
            pace.came(start + at, gained, drafted)
        };
        assert_eq!(came(500, 1, 0), None, "when the first token came says nothing");
        for _ in 0..PLAIN_FIRST {
            assert_eq!(came(10, 1, 0), None);
        }
        let near = |found: Option<f32>, expected: f32| (found.unwrap() - expected).abs() < 1e-3;
        assert!(near(came(30, 4, 3), 0.75));
        assert!(near(came(60, 4, 3), 0.975), "15 ms for a token, but less on the average");
        assert!(near(came(60, 4, 3), 1.1325));
    }

    #[test]
    fn what_catching_up_took_is_not_counted_and_time_without_drafts_is_measured_again() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        pace.came(start, 1, 0);
        assert!(pace.wants_plain());
        for step in 1..=u64::from(PLAIN_FIRST) {
            pace.came(start + Duration::from_millis(10 * step), 1, 0);
        }
        assert!(!pace.wants_plain());
        pace.cold = true;
        assert_eq!(pace.came(start + Duration::from_secs(9), 2, 2), Some(1.0));
        pace.cold = true;
        assert_eq!(pace.came(start + Duration::from_secs(9), 1, 2), Some(1.0));
        assert_eq!(pace.drafted, None);
        for step in 0..u64::from(PLAIN_AGAIN.0) {
            pace.came(start + Duration::from_secs(9) + Duration::from_millis(step), 2, 2);
        }
        assert!(pace.wants_plain());
        pace.cold = true;
        assert_eq!(pace.came(start + Duration::from_secs(10), 2, 2), Some(1.0));
        pace.cold = true;
        assert_eq!(pace.came(start + Duration::from_secs(11), 1, 2), Some(f32::INFINITY));
    }

    #[test]
    fn pages_hold_what_was_generated_and_forget_what_was_not() {
        let mut pool = PagePool::new(8);
        let mut draft = TierDraft::new(0, TierMask::new(vec![true, false]), "");
        let mut tokens: Vec<u32> = (0..PAGE_TOKENS as u32 - 2).collect();
        let (text, start, ends) = draft.next(&mut pool, &tokens, 500).unwrap();
        assert_eq!((text, start, ends), (tokens.clone(), 0, true));
        draft.computed(tokens.len(), Some(7));
        for next in [8, 9, 10, 11] {
            let (text, start, ends) = draft.next(&mut pool, &tokens, 500).unwrap();
            assert_eq!((text.len(), ends), (1, true));
            assert_eq!(start, tokens.len() + draft.ahead.len() - 1);
            draft.computed(1, Some(next));
        }
        // One was right; the second was not, so the page's last position has another token.
        let before = tokens.len();
        tokens.extend([7, 99]);
        assert_eq!(draft.settle(&mut pool, &tokens, before), 5);
        assert_eq!((draft.cached, draft.ahead.len()), (before + 1, 0));
        assert_eq!(PageTable::shared(&pool, draft.root, &[&tokens[..], &[1]].concat()), 0);
        let (text, start, _) = draft.next(&mut pool, &tokens, 500).unwrap();
        assert_eq!((text, start), (vec![99], before + 1));
        draft.computed(1, None);
        draft.settle(&mut pool, &tokens, tokens.len());
        assert_eq!(PageTable::shared(&pool, draft.root, &[&tokens[..], &[1]].concat()), 1);
        draft.release(&mut pool);
        assert_eq!(pool.free(), 8);
    }
}
