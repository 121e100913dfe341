//! Guesses of what a sequence goes on with, by looking up its own text (prompt lookup) or by running
//! the model with one of its tiers (`draft/tier.rs`), and when they pay.
//!
//! Guesses are verified in one pass: its k + 1 rows have the bits that each of them has alone
//! (determinism contract), and a token is a function of its logits, the seed and its position. So what
//! is generated never depends on them, only its time does.
//!
//! A row more is not free: it brings experts of its own. So as many tokens are guessed as were right
//! before, none for a while after too few were, and for some times as long each time that happens again.
//!
//! Ideas: "prompt lookup decoding" (A. Saxena, 2023), which vLLM and transformers have as `ngram`;
//! "speculative decoding" (Y. Leviathan and others, 2023) for drafts of a smaller model.

pub(crate) mod tier;

use std::{fmt, str::FromStr};

use crate::tier::{BadTierName, TierId, TierSet, TierSetError};

/// How the tokens of a request are guessed.
///
/// Written by people as `off`, `ngram` or `tier:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Speculation {
    /// Not at all.
    #[default]
    Off,
    /// By looking up what came after the last tokens before.
    Ngram,
    /// By running the model with this tier only.
    Tier(TierId),
}

/// What says no way of guessing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSpeculation {
    /// No such way.
    #[error("{0:?} is no way to guess tokens; off, ngram or tier:NAME is expected")]
    Unknown(String),
    /// The name after `tier:` is none.
    #[error(transparent)]
    Name(#[from] BadTierName),
}

impl FromStr for Speculation {
    type Err = BadSpeculation;

    fn from_str(text: &str) -> Result<Self, BadSpeculation> {
        match text.split_once(':') {
            Some(("tier", name)) => Ok(Self::Tier(name.parse()?)),
            None if text == "off" => Ok(Self::Off),
            None if text == "ngram" => Ok(Self::Ngram),
            _ => Err(BadSpeculation::Unknown(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Speculation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Ngram => f.write_str("ngram"),
            Self::Tier(tier) => write!(f, "tier:{tier}"),
        }
    }
}

/// What stands between a set of tiers and the tier that drafts for it, in one text.
const DRAFTED_BY: &str = " drafted by ";

/// Tiers as people write them, and the tier that drafts for them: see [`DraftedTiers`].
pub fn drafted(tiers: &str, by: &TierId) -> String {
    format!("{tiers}{DRAFTED_BY}{by}")
}

/// The tiers that a request may use, and the one that drafts for them, as they travel in one text:
/// `all`, `..tier_10b drafted by tier_1b`.
///
/// A node of a release that knows of no drafts refuses the second, for it names no tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftedTiers {
    /// The tiers.
    pub tiers: TierSet,
    /// The one that drafts.
    pub draft: Option<TierId>,
}

impl FromStr for DraftedTiers {
    type Err = TierSetError;

    fn from_str(text: &str) -> Result<Self, TierSetError> {
        match text.split_once(DRAFTED_BY) {
            None => Ok(Self { tiers: text.parse()?, draft: None }),
            Some((tiers, draft)) => Ok(Self { tiers: tiers.parse()?, draft: Some(draft.parse()?) }),
        }
    }
}

impl fmt::Display for DraftedTiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.tiers)?;
        self.draft.iter().try_for_each(|draft| write!(f, "{DRAFTED_BY}{draft}"))
    }
}

/// Tokens of one guess at most.
pub const GUESS_MAX: usize = 12;
/// Tokens of one guess at first.
const GUESS_FIRST: usize = 3;
/// Tokens that must have been there before in the same order, the longest tried first.
const MATCHES: [usize; 3] = [5, 4, 3];
/// Positions that are looked through, from the end.
const LOOK_BACK: usize = 16_384;
/// Share of the guessed tokens that must be right, on the average of the last guesses.
const RIGHT_MIN: f32 = 0.6;
/// Share of the time of a token without guesses that one with them takes where they pay well.
const COST_LOW: f32 = 0.9;
/// Weight of the newest guess.
const NEWEST: f32 = 0.3;
/// Tokens without a guess after too many wrong ones, at first and at most.
const PAUSES: (u32, u32) = (16, 1024);
/// How many times as long the next pause is, where guesses cost a look into a text, and where they cost
/// passes of their own.
const LONGER: u32 = 2;
const LONGER_MEASURED: u32 = 4;

/// What guesses of one sequence were worth.
#[derive(Debug)]
pub(crate) struct Drafter {
    /// Tokens of the next guess at most.
    next: usize,
    right: f32,
    /// Tokens until the next guess, and how many there will be after the next failure.
    paused: u32,
    pause: u32,
}

impl Default for Drafter {
    fn default() -> Self {
        Self { next: GUESS_FIRST, right: 1.0, paused: 0, pause: PAUSES.0 }
    }
}

impl Drafter {
    /// One whose first guess comes after a pause that others of its kind have come to need; 0 is none.
    pub(crate) fn paused(pause: u32) -> Self {
        let next = (LONGER_MEASURED * pause).clamp(PAUSES.0, PAUSES.1);
        Self { paused: pause, pause: next, ..Self::default() }
    }

    /// Tokens that the next guess is to have, if there is room for so many.
    pub(crate) fn wants(&self, room: usize) -> usize {
        if self.paused > 0 { 0 } else { self.next.min(room) }
    }

    /// How long the pause was that began last or, before the first, will be.
    pub(crate) fn last_pause(&self) -> u32 {
        self.paused.max(PAUSES.0)
    }

    /// Whether guesses that take such a share of the time are no mere luck of the measurement.
    pub(crate) fn pays_well(cost: Option<f32>) -> bool {
        cost.is_none_or(|cost| cost <= COST_LOW)
    }

    /// Whether it waits for the time of another guess.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused > 0
    }

    /// What may come after these tokens: at most `room`.
    pub(crate) fn guess(&self, tokens: &[u32], room: usize) -> Vec<u32> {
        let most = self.wants(room);
        if most == 0 {
            return Vec::new();
        }
        let text = &tokens[tokens.len().saturating_sub(LOOK_BACK)..];
        for length in MATCHES.into_iter().filter(|&length| length < text.len()) {
            let (before, end) = text.split_at(text.len() - length);
            // The latest that has something after it.
            let found = text[..text.len() - 1]
                .windows(length)
                .rposition(|window| window == end)
                .filter(|&at| at < before.len());
            if let Some(at) = found {
                let next = &text[at + length..];
                return next[..most.min(next.len())].to_vec();
            }
        }
        Vec::new()
    }

    /// Of so many guessed tokens, so many were right. Called after each pass, with 0 of 0 if nothing
    /// was guessed. `cost` is the time of a token with guesses, as a share of that without, where
    /// it was measured.
    pub(crate) fn verified(&mut self, guessed: usize, right: usize, cost: Option<f32>) {
        if guessed == 0 {
            self.paused = self.paused.saturating_sub(1);
            return;
        }
        self.next = if right == guessed { (2 * guessed).min(GUESS_MAX) } else { right.max(1) };
        self.right += NEWEST * (right as f32 / guessed as f32 - self.right);
        let (pays, pays_well) = match cost {
            Some(cost) => (cost <= 1.0, cost <= COST_LOW),
            None => (self.right >= RIGHT_MIN, self.right > (1.0 + RIGHT_MIN) / 2.0),
        };
        if !pays {
            let longer = if cost.is_some() { LONGER_MEASURED } else { LONGER };
            (self.paused, self.pause) = (self.pause, (longer * self.pause).min(PAUSES.1));
            // One that is right after the pause keeps it on.
            self.right = RIGHT_MIN;
        } else if pays_well {
            self.pause = PAUSES.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_is_guessed_and_longer_while_it_is_right() {
        let mut drafter = Drafter::default();
        let text: Vec<u32> = (0..40).chain([99]).chain(10..15).collect();
        assert_eq!(drafter.guess(&text, 100), [15, 16, 17]);
        assert_eq!(drafter.guess(&text, 2), [15, 16]);
        drafter.verified(3, 3, None);
        assert_eq!(drafter.guess(&text, 100), [15, 16, 17, 18, 19, 20]);
        drafter.verified(6, 2, None);
        assert_eq!(drafter.guess(&text, 100), [15, 16]);
        assert!(drafter.guess(&[1, 2, 3, 4, 5], 100).is_empty(), "nothing comes again");
        let again = [7, 7, 7, 7, 7, 7, 7];
        assert_eq!(drafter.guess(&again, 100), [7], "as much as there is after it");
    }

    #[test]
    fn what_travels_in_one_text_reads_back() {
        for text in ["all", "..tier_10b", "tier_1b,tier_10b drafted by tier_1b"] {
            assert_eq!(text.parse::<DraftedTiers>().unwrap().to_string(), text);
        }
        assert!("all drafted by".parse::<DraftedTiers>().is_err());
        assert!("all drafted by Tier 1".parse::<DraftedTiers>().is_err());
        // As a release without drafts reads it.
        assert!("all drafted by tier_1b".parse::<TierSet>().is_err());
        for text in ["off", "ngram", "tier:tier_1b"] {
            assert_eq!(text.parse::<Speculation>().unwrap().to_string(), text);
        }
        let error = "tier".parse::<Speculation>().unwrap_err().to_string();
        assert!(error.contains("off, ngram or tier:NAME"), "{error}");
        assert!("tier:".parse::<Speculation>().is_err());
        assert!("ngram:tier_1b".parse::<Speculation>().is_err());
    }

    #[test]
    fn what_was_measured_counts_for_more_than_what_was_right() {
        let mut drafter = Drafter::default();
        drafter.verified(3, 3, Some(1.1));
        assert_eq!((drafter.wants(9), drafter.last_pause()), (0, PAUSES.0));
        let mut drafter = Drafter::default();
        (0..20).for_each(|_| drafter.verified(3, 1, Some(0.5)));
        assert_eq!(drafter.wants(9), 1);
        assert_eq!(Drafter::paused(64).last_pause(), 64);
        assert_eq!(Drafter::paused(0).wants(9), GUESS_FIRST);
    }

    #[test]
    fn wrong_guesses_end_and_are_tried_more_and_more_seldom() {
        let (mut drafter, text) = (Drafter::default(), [1, 2, 3, 4, 1, 2, 3]);
        let (mut guesses, passes) = (0, 4000);
        for _ in 0..passes {
            let guessed = drafter.guess(&text, 100).len();
            guesses += u32::from(guessed > 0);
            drafter.verified(guessed, 0, None);
        }
        assert!((6..16).contains(&guesses), "{guesses} of {passes}");
    }
}
