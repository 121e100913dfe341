//! Guesses of what a sequence goes on with, by looking up its own text (prompt lookup), and when they
//! pay.
//!
//! Guesses are verified in one pass: its k + 1 rows have the bits that each of them has alone
//! (determinism contract), and a token is a function of its logits, the seed and its position. So what
//! is generated never depends on them, only its time does.
//!
//! A row more is not free: it brings experts of its own. So as many tokens are guessed as were right
//! before, none for a while after too few were, and for twice as long each time that happens again.
//!
//! Idea: "prompt lookup decoding" (A. Saxena, 2023); vLLM and transformers have it as `ngram`.

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
/// Weight of the newest guess.
const NEWEST: f32 = 0.3;
/// Tokens without a guess after too many wrong ones, at first and at most.
const PAUSES: (u32, u32) = (16, 1024);

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
    /// What may come after these tokens: at most `room`.
    pub(crate) fn guess(&self, tokens: &[u32], room: usize) -> Vec<u32> {
        let most = self.next.min(room);
        if self.paused > 0 || most == 0 {
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
    /// was guessed.
    pub(crate) fn verified(&mut self, guessed: usize, right: usize) {
        if guessed == 0 {
            self.paused = self.paused.saturating_sub(1);
            return;
        }
        self.next = if right == guessed { (2 * guessed).min(GUESS_MAX) } else { right.max(1) };
        self.right += NEWEST * (right as f32 / guessed as f32 - self.right);
        if self.right < RIGHT_MIN {
            (self.paused, self.pause) = (self.pause, (2 * self.pause).min(PAUSES.1));
            // One that is right after the pause keeps it on.
            self.right = RIGHT_MIN;
        } else if self.right > (1.0 + RIGHT_MIN) / 2.0 {
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
        drafter.verified(3, 3);
        assert_eq!(drafter.guess(&text, 100), [15, 16, 17, 18, 19, 20]);
        drafter.verified(6, 2);
        assert_eq!(drafter.guess(&text, 100), [15, 16]);
        assert!(drafter.guess(&[1, 2, 3, 4, 5], 100).is_empty(), "nothing comes again");
        let again = [7, 7, 7, 7, 7, 7, 7];
        assert_eq!(drafter.guess(&again, 100), [7], "as much as there is after it");
    }

    #[test]
    fn wrong_guesses_end_and_are_tried_more_and_more_seldom() {
        let (mut drafter, text) = (Drafter::default(), [1, 2, 3, 4, 1, 2, 3]);
        let (mut guesses, passes) = (0, 4000);
        for _ in 0..passes {
            let guessed = drafter.guess(&text, 100).len();
            guesses += u32::from(guessed > 0);
            drafter.verified(guessed, 0);
        }
        assert!((6..16).contains(&guesses), "{guesses} of {passes}");
    }
}
