//! How one sequence chooses its tokens: its settings, what it has seen, and what is told of a choice.
//!
//! Invariant: everything here is a function of the settings and the tokens before, so that a sequence
//! that goes on elsewhere from its tokens chooses as it would have here.

use lite_llm_kernels::{
    device::Draw,
    ops::{softmax, sum},
};

use super::{Context, SampleError, Sampling, Seen, choose};
use crate::{
    grammar::{GrammarError, Guide},
    random::{Purpose, random_unit},
};

/// Most candidates of a token whose log-probabilities are told.
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Most tokens whose logits are biased.
pub const BIAS_MAX: usize = 1024;

/// How likely a token was, by the model's own logits: before bias, penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// Natural logarithm of the chosen token's probability, at most 0.
    pub logprob: f32,
    /// The likeliest tokens with theirs: likelier ones first, equal ones by id.
    pub top: Vec<(u32, f32)>,
}

/// The score of `token` among `logits`, which are finite, with the `top` best.
///
/// With m the largest logit z and S the sum by rule 3 of exp(z − m), a token's is
/// (z − m) − ln S in f64, rounded once.
pub fn score(logits: &[f32], token: u32, top: u32) -> Score {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights = logits.to_vec();
    softmax::weights(&mut weights, largest, 1.0);
    let total = libm::log(f64::from(sum::sum(&weights)));
    let logprob = |z: f32| ((f64::from(z) - f64::from(largest)) - total).min(0.0) as f32;
    let mut best: Vec<u32> = (0..logits.len() as u32).collect();
    let top = (top as usize).min(best.len());
    let better = |a: &u32, b: &u32| {
        let order = logits[*b as usize].partial_cmp(&logits[*a as usize]);
        order.unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
    };
    if top > 0 && top < best.len() {
        best.select_nth_unstable_by(top - 1, better);
    }
    best.truncate(top);
    best.sort_unstable_by(better);
    Score {
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&z| logprob(z)),
        top: best.into_iter().map(|id| (id, logprob(logits[id as usize]))).collect(),
    }
}

/// A token, and how likely it was if somebody wants to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The token.
    pub id: u32,
    /// See [`Score`].
    pub score: Option<Score>,
}

/// Why a sequence has no next token.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum ChooseError {
    /// The row, or what is asked of it.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The form of the answer.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Chooser {
    sampling: Sampling,
    bias: Vec<(u32, f32)>,
    logprobs: Option<u32>,
    /// Sorted by id; kept only where penalties look at it.
    seen: Vec<Seen>,
    /// Where the answer is in its form, if it has one.
    guide: Option<Guide>,
}

impl Chooser {
    /// For a sequence of this prompt, which generated these tokens before, elsewhere.
    pub(crate) fn new(
        sampling: Sampling,
        bias: Vec<(u32, f32)>,
        logprobs: Option<u32>,
        prompt: &[u32],
        generated: &[u32],
        guide: Option<Guide>,
    ) -> Self {
        let mut seen = Vec::new();
        if sampling.is_penalised() {
            let mut ids = prompt.to_vec();
            ids.sort_unstable();
            ids.dedup();
            seen = ids.into_iter().map(|id| Seen { id, generated: 0 }).collect();
        }
        let mut chooser = Self { sampling, bias, logprobs, seen, guide };
        generated.iter().for_each(|&id| chooser.take(id));
        chooser
    }

    /// The next token of the sequence, at `position`.
    pub(crate) fn choose(&mut self, logits: &[f32], position: u64) -> Result<Chosen, ChooseError> {
        let mask = self.guide.as_mut().map(Guide::mask).transpose()?;
        let context = Context { bias: &self.bias, seen: &self.seen, mask: mask.as_ref() };
        let id = choose(logits, &self.sampling, context, position)?;
        let score = self.logprobs.map(|top| score(logits, id, top));
        self.take(id);
        Ok(Chosen { id, score })
    }

    /// What a device needs to choose the token at `position`, if nothing but the settings matters and
    /// nobody wants to see more than the token.
    pub(crate) fn draw(&self, position: u64) -> Option<Draw> {
        let Sampling { temperature, top_k, top_p, min_p, seed, .. } = self.sampling;
        let plain = self.bias.is_empty() && self.guide.is_none() && self.logprobs.is_none();
        let unit = random_unit(seed, Purpose::Sampling, position);
        (plain && !self.sampling.is_penalised()).then_some(Draw {
            temperature,
            top_p,
            min_p,
            top_k,
            unit,
        })
    }

    /// What it would choose at `position`, which may lie ahead, but for the form of the answer and for
    /// what would have been seen by then: a guess.
    pub(crate) fn guess(&self, logits: &[f32], position: u64) -> Option<u32> {
        let context = Context { bias: &self.bias, seen: &self.seen, mask: None };
        choose(logits, &self.sampling, context, position).ok()
    }

    /// How many of these tokens, from the first, the form of the answer allows.
    pub(crate) fn possible(&self, ids: &[u32]) -> usize {
        self.guide.as_ref().map_or(ids.len(), |guide| guide.possible(ids))
    }

    fn take(&mut self, id: u32) {
        if let Some(guide) = &mut self.guide {
            // One that left its form stays in error, which the next choice tells.
            let _ = guide.take(id);
        }
        if !self.sampling.is_penalised() {
            return;
        }
        match self.seen.binary_search_by_key(&id, |seen| seen.id) {
            Ok(at) => self.seen[at].generated = self.seen[at].generated.saturating_add(1),
            Err(at) => self.seen.insert(at, Seen { id, generated: 1 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use lite_llm_kernels::ops::function;

    use super::*;

    #[test]
    fn scores_are_by_the_rule() {
        let logits = [1.0, 3.0, 2.0, 3.0, -1.0];
        let w = logits.map(|z: f32| function::exp(z - 3.0));
        // Rule 3, of a row that ends within its first leaf.
        let total = ((w[0] + w[4]) + w[2]) + (w[1] + w[3]);
        let expected = |z: f32| (f64::from(z - 3.0) - libm::log(f64::from(total))) as f32;
        let found = score(&logits, 2, 3);
        assert_eq!(found.logprob.to_bits(), expected(2.0).to_bits());
        let bits = |pairs: &[(u32, f32)]| -> Vec<(u32, u32)> {
            pairs.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect()
        };
        let best = [(1, expected(3.0)), (3, expected(3.0)), (2, expected(2.0))];
        assert_eq!(bits(&found.top), bits(&best));
        assert!((found.logprob + 1.924_866).abs() < 1e-5, "{found:?}");
        assert!(score(&logits, 0, 0).top.is_empty());
        assert_eq!(score(&logits, 0, 99).top.len(), 5);
        assert_eq!(score(&[0.0], 0, 1), Score { logprob: 0.0, top: vec![(0, 0.0)] });
    }

    #[test]
    fn a_sequence_that_goes_on_elsewhere_has_seen_the_same() {
        let sampling = Sampling {
            temperature: 1.0,
            repetition: 1.2,
            presence: 0.5,
            frequency: 0.3,
            seed: 5,
            ..Sampling::GREEDY
        };
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 11) as f32 * 0.2).collect();
        let prompt = [3, 9, 3, 44];
        let run = |generated: &[u32], count: usize| {
            let mut chooser =
                Chooser::new(sampling, vec![(7, 1.0)], None, &prompt, generated, None);
            let first = (prompt.len() + generated.len()) as u64;
            let choose = |at| chooser.choose(&logits, first + at as u64).unwrap().id;
            (0..count).map(choose).collect::<Vec<_>>()
        };
        let whole = run(&[], 40);
        for cut in [1, 7, 39] {
            assert_eq!(run(&whole[..cut], 40 - cut), whole[cut..]);
        }
        let unlike = Sampling { frequency: 0.0, presence: 0.0, repetition: 1.0, ..sampling };
        let mut plain = Chooser::new(unlike, Vec::new(), None, &prompt, &[], None);
        plain.choose(&logits, 4).unwrap();
        assert!(plain.seen.is_empty(), "nothing is kept that nobody looks at");
    }

    #[test]
    fn penalties_keep_an_answer_from_repeating_itself() {
        let logits = [1.0, 0.9, 0.8];
        let sampling = Sampling { frequency: 0.15, ..Sampling::GREEDY };
        let mut chooser = Chooser::new(sampling, Vec::new(), None, &[0, 0, 0], &[], None);
        let mut choose = |at| chooser.choose(&logits, at).unwrap().id;
        // What was only read is not penalised by frequency.
        assert_eq!([choose(3), choose(4), choose(5), choose(6)], [0, 1, 0, 2]);
    }
}
