//! From logits to a token: bias, penalties, temperature, top-k, top-p, min-p, and a draw.
//!
//! Invariant (determinism contract, rules 7 and 9): the token is a function of the logits, the
//! settings, what was seen, the seed and the token's position; the same on every device. Exactly,
//! in f32 where nothing else is said, every operation rounded by itself:
//! 1. *Adjusted logits* z, per token id. From the logit: plus the id's bias; if the id was seen at
//!    all and `repetition` is not 1, `z = z > 0 ? z / repetition : z · repetition`; if it was
//!    generated n > 0 times, minus `frequency · n`, then minus `presence`. A bias of −∞ excludes; so
//!    does a form of the answer, if it has one, in which the id may not come next.
//! 2. *Greedy*, where temperature is 0: the smallest id among those of the largest z.
//! 3. *Weights* `w = exp((z − m) / temperature)`, m being the largest z and exp the kernels' own.
//! 4. *Thresholds*. Ids rank by z, larger first, +0 and −0 alike; equal z by id, smaller first.
//!    Let S(J) be the sum by rule 3, in order of ids, of the row that has w at ids in J and +0
//!    elsewhere. It never falls as J grows, so that thresholds may be searched for in any way.
//!    - top-k (not 0) keeps the first k ids, which are K; otherwise K is all;
//!    - top-p (not 1) keeps the fewest first ids of K for which S is at least `top_p · S(K)`;
//!    - min-p keeps ids with `w >= min_p` (the best weighs 1).
//! 5. *The draw* walks what is kept in order of ids. In f64: t = u · S(kept), with u of 53 bits from
//!    (seed, position). The sums of leaves of 256 ids are taken from t, upwards, until it would
//!    be negative: the token is in that leaf; if it never is, in the last leaf whose sum is not 0.
//!    There the weights are taken from t in the same way; if it never is negative, the token is
//!    the last kept of the leaf that does not weigh 0.

mod chooser;

use std::{borrow::Cow, cmp::Ordering};

use lite_llm_kernels::ops::{
    LEAF, softmax,
    sum::{self, leaf_sums},
    tree,
};
use serde::{Deserialize, Serialize};

pub(crate) use self::chooser::Chooser;
pub use self::chooser::{BIAS_MAX, Chosen, Score, TOP_LOGPROBS_MAX, score};
use crate::{
    grammar::Mask,
    random::{Purpose, random_unit},
};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Only the k best tokens may be chosen; 0 is no limit.
    pub top_k: u32,
    /// Only the smallest set of best tokens whose probability reaches this; 1 is no limit.
    pub top_p: f32,
    /// Only tokens at least this times as probable as the best; 0 is no limit.
    #[serde(default)]
    pub min_p: f32,
    /// Logits of tokens that were seen are divided by it if positive, else multiplied; 1 is off.
    #[serde(default = "one")]
    pub repetition: f32,
    /// Taken from the logits of tokens that were generated.
    #[serde(default)]
    pub presence: f32,
    /// Taken from the logits of tokens for each time that they were generated.
    #[serde(default)]
    pub frequency: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

fn one() -> f32 {
    1.0
}

impl Sampling {
    /// Always the token with the largest logit.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition: 1.0,
        presence: 0.0,
        frequency: 0.0,
        seed: 0,
    };

    /// Whether what was seen changes the choice.
    pub fn is_penalised(&self) -> bool {
        (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)
    }

    /// Says what is wrong with the settings, if anything.
    pub fn check(&self) -> Result<(), SamplingError> {
        let wrong = |name, found, range| Err(SamplingError { name, found, range });
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return wrong("temperature", self.temperature, "at least 0");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return wrong("top-p", self.top_p, "above 0, at most 1");
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return wrong("min-p", self.min_p, "at least 0, at most 1");
        }
        if !(self.repetition.is_finite() && self.repetition > 0.0) {
            return wrong("repetition penalty", self.repetition, "a finite number above 0");
        }
        for (name, found) in
            [("presence penalty", self.presence), ("frequency penalty", self.frequency)]
        {
            if !found.is_finite() {
                return wrong(name, found, "a finite number");
            }
        }
        Ok(())
    }
}

/// A setting outside its range.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{name} is {found}; {range} is expected")]
pub struct SamplingError {
    name: &'static str,
    found: f32,
    range: &'static str,
}

/// A token that occurs before the position that is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The token.
    pub id: u32,
    /// How often it was generated; 0 if it is of the prompt alone.
    pub generated: u32,
}

/// What else a sequence brings to the choice. Each id occurs once in each list.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// Added to the logits of tokens; −∞ excludes.
    pub bias: &'a [(u32, f32)],
    /// The tokens of prompt and answer so far.
    pub seen: &'a [Seen],
    /// What may come next, if the answer has a form.
    pub mask: Option<&'a Mask>,
}

/// Why there is no next token. It concerns one row, never its batch.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model gave something that has no order.
    #[error(
        "the logit of token {token} is {value}; a finite number is expected: \
         the model's weights or the hidden state hold NaN or infinity"
    )]
    NotFinite {
        /// The first such token.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// Bias and penalties left the range of numbers.
    #[error("bias and penalties make {value} of the logit of token {token}; use smaller ones")]
    Adjusted {
        /// The token.
        token: u32,
        /// What became of its logit.
        value: f32,
    },
    /// Bias or history names a token that the model does not have.
    #[error("there is no token {token}: the vocabulary has {vocab}")]
    NoSuchToken {
        /// The token.
        token: u32,
        /// Tokens of the vocabulary.
        vocab: usize,
    },
    /// Nothing may be chosen.
    #[error("the bias excludes every token; leave at least one")]
    AllExcluded,
    /// The form of the answer leaves nothing.
    #[error("no token continues the answer in its form; use another grammar, or less bias")]
    NoContinuation,
}

/// Chooses the token at `position` from its `logits`.
///
/// `sampling` is as [`Sampling::check`] wants it.
pub fn choose(
    logits: &[f32],
    sampling: &Sampling,
    context: Context<'_>,
    position: u64,
) -> Result<u32, SampleError> {
    // All of them without a way out in between: that becomes vectors.
    if !logits.iter().fold(true, |all, v| all & v.is_finite()) {
        let found = logits.iter().copied().enumerate().find(|(_, v)| !v.is_finite());
        let (token, value) = found.unwrap_or_default();
        return Err(SampleError::NotFinite { token, value });
    }
    let z = adjust(logits, sampling, context)?;
    let best = argmax(&z);
    let largest = z.get(best as usize).copied().unwrap_or(f32::NEG_INFINITY);
    if largest == f32::NEG_INFINITY {
        return Err(match context.mask {
            Some(_) => SampleError::NoContinuation,
            None => SampleError::AllExcluded,
        });
    }
    if sampling.temperature == 0.0 {
        return Ok(best);
    }
    let mut weights = z.to_vec();
    softmax::weights(&mut weights, largest, sampling.temperature);
    limit(&z, &mut weights, sampling);
    Ok(draw(&weights, random_unit(sampling.seed, Purpose::Sampling, position)))
}

/// [`choose`] for logits that are known to be finite and not empty, without a context.
pub fn sample(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
    choose(logits, sampling, Context::default(), position).unwrap_or_else(|_| argmax(logits))
}

/// Adds bias and takes penalties: step 1.
fn adjust<'a>(
    logits: &'a [f32],
    sampling: &Sampling,
    context: Context<'_>,
) -> Result<Cow<'a, [f32]>, SampleError> {
    let Sampling { repetition, presence, frequency, .. } = *sampling;
    let seen = if sampling.is_penalised() { context.seen } else { &[] };
    if context.bias.is_empty() && seen.is_empty() && context.mask.is_none() {
        return Ok(Cow::Borrowed(logits));
    }
    let mut z = logits.to_vec();
    let vocab = z.len();
    let at = |token: u32| match token as usize {
        at if at < vocab => Ok(at),
        _ => Err(SampleError::NoSuchToken { token, vocab }),
    };
    for &(token, bias) in context.bias {
        z[at(token)?] += bias;
    }
    for &Seen { id, generated } in seen {
        let z = &mut z[at(id)?];
        if repetition != 1.0 {
            *z = if *z > 0.0 { *z / repetition } else { *z * repetition };
        }
        if generated > 0 {
            *z -= frequency * generated as f32;
            *z -= presence;
        }
    }
    // An overflow downwards excludes what should have been far below; one upwards hides an order.
    let touched = context.bias.iter().map(|(id, _)| *id).chain(seen.iter().map(|s| s.id));
    for token in touched {
        let value = z[token as usize];
        if value.is_nan() || value == f32::INFINITY {
            return Err(SampleError::Adjusted { token, value });
        }
    }
    if let Some(mask) = context.mask {
        for (id, z) in (0..).zip(&mut z) {
            if !mask.allows(id) {
                *z = f32::NEG_INFINITY;
            }
        }
    }
    Ok(Cow::Owned(z))
}

/// Makes 0 of the weights of what top-k, top-p and min-p leave out: step 4.
fn limit(z: &[f32], weights: &mut [f32], sampling: &Sampling) {
    let k = match sampling.top_k as usize {
        0 => z.len(),
        k => k.min(z.len()),
    };
    if k < z.len() || sampling.top_p < 1.0 {
        let better = |a: &u32, b: &u32| -> Ordering {
            let order = z[*b as usize].partial_cmp(&z[*a as usize]);
            order.unwrap_or(Ordering::Equal).then(a.cmp(b))
        };
        let mut order: Vec<u32> = (0..z.len() as u32).collect();
        let mut row = vec![0.0; z.len()];
        let mut total_of = |kept: &[u32]| {
            row.fill(0.0);
            kept.iter().for_each(|&id| row[id as usize] = weights[id as usize]);
            sum::sum(&row)
        };
        if k < order.len() {
            order.select_nth_unstable_by(k - 1, better);
            order.truncate(k);
        }
        let kept = if sampling.top_p < 1.0 {
            let wanted = sampling.top_p * total_of(&order);
            // The best few in their order, more of them until they reach what is wanted.
            let mut few = FEW.min(order.len());
            loop {
                if few < order.len() {
                    order.select_nth_unstable_by(few - 1, better);
                }
                if few == order.len() || total_of(&order[..few]) >= wanted {
                    break;
                }
                few = (8 * few).min(order.len());
            }
            order[..few].sort_unstable_by(better);
            let (mut below, mut reaches) = (0, few);
            while reaches - below > 1 {
                let middle = below.midpoint(reaches);
                match total_of(&order[..middle]) >= wanted {
                    true => reaches = middle,
                    false => below = middle,
                }
            }
            &order[..reaches]
        } else {
            &order[..]
        };
        total_of(kept);
        weights.copy_from_slice(&row);
    }
    if sampling.min_p > 0.0 {
        for weight in weights {
            *weight = if *weight >= sampling.min_p { *weight } else { 0.0 };
        }
    }
}

/// Tokens that top-p tries first: most often it needs no more.
const FEW: usize = 64;

/// The id at which the share `unit` of all weight is reached: step 5.
fn draw(weights: &[f32], unit: f64) -> u32 {
    let leaves = leaf_sums(weights);
    let total = tree::fold(leaves.iter().copied());
    let mut left = unit * f64::from(total);
    let leaf = take(&leaves, &mut left);
    let from = leaf * LEAF;
    let leaf = &weights[from..weights.len().min(from + LEAF)];
    (from + take(leaf, &mut left)) as u32
}

/// Takes parts from `left` until it would be negative, and returns where; else the last part that
/// is not 0.
fn take(parts: &[f32], left: &mut f64) -> usize {
    let mut last = 0;
    for (i, &part) in parts.iter().enumerate() {
        if part > 0.0 {
            last = i;
            let rest = *left - f64::from(part);
            if rest < 0.0 {
                return i;
            }
            *left = rest;
        }
    }
    last
}

/// The token with the largest logit; the smallest id among equals.
fn argmax(logits: &[f32]) -> u32 {
    // The largest first, in lanes that become vectors, then where it is.
    let (chunks, rest) = logits.as_chunks::<16>();
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    let largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    logits.iter().position(|&logit| logit == largest).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of the settings below, at five positions. They change only with the version of the
    /// determinism contract.
    const PINNED: [[u32; 5]; 8] = [
        [3, 3, 3, 3, 3],
        [1481, 387, 765, 997, 1108],
        [1481, 201, 745, 989, 1178],
        [1481, 370, 766, 989, 1104],
        [1481, 370, 766, 989, 1108],
        [1481, 530, 788, 1039, 1149],
        [1481, 387, 765, 997, 1108],
        [1481, 370, 765, 998, 1108],
    ];

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn counts(sampling: Sampling) -> [u32; 5] {
        let mut counts = [0; 5];
        for position in 0..20_000 {
            counts[sample(&LOGITS, &sampling, position) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(sample(&LOGITS, &Sampling::GREEDY, 9), 1);
        // Wherever it is, among fewer and more than a whole number of lanes.
        for len in [1, 2, 15, 16, 17, 33, 100] {
            for at in 0..len {
                let mut logits = vec![-2.0; len];
                logits[at..].fill(-1.0);
                assert_eq!(sample(&logits, &Sampling::GREEDY, 9), at as u32, "{at} of {len}");
            }
        }
        assert_eq!(sample(&[-1.0, -0.0, 0.0], &Sampling::GREEDY, 9), 1, "zeros are equal");
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let counts = counts(Sampling { temperature: 1.0, ..Sampling::GREEDY });
        let weights = LOGITS.map(|l| f64::from(l).exp());
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            let (found, expected) = (f64::from(*count) / 20_000.0, weight / total);
            assert!((found - expected).abs() < 0.015, "{found} for {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_leave_out_the_rest() {
        let base = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let two = counts(Sampling { top_k: 2, ..base });
        assert_eq!([two[0], two[2], two[4]], [0, 0, 0]);
        let nucleus = counts(Sampling { top_p: 0.5, ..base });
        assert_eq!([nucleus[0], nucleus[2], nucleus[4]], [0, 0, 0]);
        assert!(nucleus[1] > 0 && nucleus[3] > 0);
        assert_eq!(counts(Sampling { top_p: 0.01, ..base })[1], 20_000);
    }

    /// Logits of a vocabulary of several leaves, some equal, both zeros among them.
    fn wide(seed: u64) -> Vec<f32> {
        (0..1500)
            .map(|i| match random_unit(seed, Purpose::Weights, i) {
                unit if i % 7 == 0 => (unit * 4.0).floor() as f32 - 2.0,
                unit if i % 11 == 0 => {
                    if unit < 0.5 {
                        -0.0
                    } else {
                        0.0
                    }
                }
                unit => (unit * 12.0 - 8.0) as f32,
            })
            .collect()
    }

    /// The module's text once more, as plainly as can be.
    fn by_the_rule(logits: &[f32], s: &Sampling, context: Context<'_>, position: u64) -> u32 {
        let mut z = logits.to_vec();
        for &(id, bias) in context.bias {
            z[id as usize] += bias;
        }
        for &Seen { id, generated } in context.seen {
            let z = &mut z[id as usize];
            *z = if *z > 0.0 { *z / s.repetition } else { *z * s.repetition };
            if generated > 0 {
                *z -= s.frequency * generated as f32;
                *z -= s.presence;
            }
        }
        let mut rank: Vec<usize> = (0..z.len()).collect();
        rank.sort_by(|&a, &b| z[b].partial_cmp(&z[a]).unwrap().then(a.cmp(&b)));
        if s.temperature == 0.0 {
            return rank[0] as u32;
        }
        let w: Vec<f32> = z
            .iter()
            .map(|x| lite_llm_kernels::ops::function::exp((x - z[rank[0]]) / s.temperature))
            .collect();
        let row = |ids: &[usize]| {
            let mut row = vec![0.0; w.len()];
            ids.iter().for_each(|&id| row[id] = w[id]);
            row
        };
        let total = |ids: &[usize]| -> f32 {
            let leaves: Vec<f32> = row(ids)
                .chunks(256)
                .map(|leaf| {
                    let mut l = [0.0f32; 8];
                    leaf.iter().enumerate().for_each(|(i, w)| l[i % 8] += w);
                    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
                })
                .collect();
            assert_eq!(leaves.len(), 6);
            ((leaves[0] + leaves[1]) + (leaves[2] + leaves[3])) + (leaves[4] + leaves[5])
        };
        if s.top_k > 0 {
            rank.truncate(s.top_k as usize);
        }
        if s.top_p < 1.0 {
            let wanted = s.top_p * total(&rank);
            let count = (1..=rank.len()).find(|&n| total(&rank[..n]) >= wanted).unwrap();
            rank.truncate(count);
        }
        rank.retain(|&id| w[id] >= s.min_p);
        let mut t = random_unit(s.seed, Purpose::Sampling, position) * f64::from(total(&rank));
        for (i, leaf) in row(&rank).chunks(256).enumerate() {
            let mut of_leaf = rank.clone();
            of_leaf.retain(|id| id / 256 == i);
            let rest = t - f64::from(total(&of_leaf));
            if rest >= 0.0 {
                t = rest;
                continue;
            }
            for (id, w) in leaf.iter().enumerate() {
                let rest = t - f64::from(*w);
                if rest < 0.0 {
                    return (i * 256 + id) as u32;
                }
                t = rest;
            }
        }
        panic!("this draw falls through, which has its own test")
    }

    #[test]
    fn tokens_are_those_of_the_rule_and_pinned_for_ever() {
        let base = Sampling { temperature: 0.8, seed: 42, ..Sampling::GREEDY };
        let penalties = Sampling { repetition: 1.3, presence: 0.5, frequency: 0.25, ..base };
        let all = Sampling { top_k: 700, top_p: 0.9, min_p: 0.01, ..penalties };
        let bias = [(3, 2.5), (14, f32::NEG_INFINITY), (1499, 1.0)];
        let seen = [(7, 0), (14, 3), (21, 1), (600, 40), (1400, 2)]
            .map(|(id, generated)| Seen { id, generated });
        let context = Context { bias: &bias, seen: &seen, mask: None };
        let mut found = Vec::new();
        for (sampling, pinned) in [
            (Sampling::GREEDY, PINNED[0]),
            (base, PINNED[1]),
            (Sampling { top_k: 40, ..base }, PINNED[2]),
            (Sampling { top_p: 0.7, ..base }, PINNED[3]),
            (Sampling { min_p: 0.05, ..base }, PINNED[4]),
            (Sampling { top_k: 300, top_p: 0.5, temperature: 1.7, ..base }, PINNED[5]),
            (penalties, PINNED[6]),
            (all, PINNED[7]),
        ] {
            for position in 0..40 {
                let logits = wide(position % 5);
                let token = choose(&logits, &sampling, context, position).unwrap();
                let rule = by_the_rule(&logits, &sampling, context, position);
                assert_eq!(token, rule, "{sampling:?} at {position}");
            }
            let tokens = [0, 1, 2, 3, 1 << 40]
                .map(|position| choose(&wide(9), &sampling, context, position).unwrap());
            found.push((tokens, pinned));
        }
        let (tokens, pinned): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        assert_eq!(tokens, pinned);
    }

    #[test]
    fn equal_logits_are_ordered_by_id() {
        let logits = [1.0, 2.0, 2.0, 2.0, 2.0, 0.0];
        let base = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        for (sampling, last) in [
            (Sampling { top_k: 2, ..base }, 2),
            (Sampling { top_p: 0.6, ..base }, 3),
            (Sampling { min_p: 0.99, ..base }, 4),
        ] {
            let tokens: Vec<u32> = (0..500).map(|p| sample(&logits, &sampling, p)).collect();
            assert!(tokens.iter().all(|t| (1..=last).contains(t)), "{sampling:?}: {tokens:?}");
            assert!((1..=last).all(|t| tokens.contains(&t)), "{sampling:?}: {tokens:?}");
        }
    }

    #[test]
    fn thresholds_are_reached_by_what_equals_them() {
        let base = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let of = |sampling| {
            let mut weights = vec![1.0; 4];
            limit(&[0.5; 4], &mut weights, &sampling);
            weights
        };
        assert_eq!(of(Sampling { top_p: 0.5, ..base }), [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(of(Sampling { top_p: 0.51, ..base }), [1.0, 1.0, 1.0, 0.0]);
        assert_eq!(of(Sampling { min_p: 1.0, ..base }), [1.0; 4]);
    }

    #[test]
    fn bias_and_penalties_come_in_their_order() {
        let sampling =
            Sampling { repetition: 2.0, presence: 0.5, frequency: 0.25, ..Sampling::GREEDY };
        let seen = [(0, 3), (1, 0), (2, 1), (3, 0)].map(|(id, generated)| Seen { id, generated });
        let context = Context { bias: &[(1, -5.0), (4, 1.0)], seen: &seen, mask: None };
        let z = adjust(&[4.0, 3.0, -1.0, 0.0, 7.0, 8.0], &sampling, context).unwrap();
        assert_eq!(z[..], [2.0 - 0.75 - 0.5, -4.0, -2.0 - 0.25 - 0.5, 0.0, 8.0, 8.0]);
        // The bias alone, where penalties are off.
        let z = adjust(&[4.0, 3.0, 0.0, 0.0, 7.0], &Sampling::GREEDY, context).unwrap();
        assert_eq!(z[..], [4.0, -2.0, 0.0, 0.0, 8.0]);
    }

    #[test]
    fn the_walk_of_a_draw_is_in_f64() {
        let small = 2f64.powi(-20);
        let mut left = 1.0 + small - 2f64.powi(-50);
        assert_eq!(take(&[1.0, small as f32, 1.0], &mut left), 1);
        let mut left = 1.0 + small;
        assert_eq!(take(&[1.0, small as f32, 1.0], &mut left), 2);
    }

    #[test]
    fn a_draw_that_falls_through_takes_the_last_that_weighs() {
        let mut weights = vec![0.0; 600];
        (weights[3], weights[300], weights[301]) = (0.25, 0.5, 0.0);
        assert_eq!(draw(&weights, 0.0), 3);
        assert_eq!(draw(&weights, 0.34), 300);
        assert_eq!(draw(&weights, 1.0), 300, "units are below 1, but products round");
    }

    #[test]
    fn what_cannot_be_sampled_is_an_error_that_says_why() {
        let context = Context { bias: &[(1, f32::NEG_INFINITY)], seen: &[], mask: None };
        let sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = choose(&[0.0, 1.0, bad, bad], &sampling, context, 0).unwrap_err();
            assert!(error.to_string().starts_with("the logit of token 2 is "), "{error}");
        }
        for (bias, expected) in [
            (&[(0, f32::NEG_INFINITY), (1, f32::NEG_INFINITY)][..], SampleError::AllExcluded),
            (&[(7, 1.0)], SampleError::NoSuchToken { token: 7, vocab: 2 }),
            (&[(1, f32::INFINITY)], SampleError::Adjusted { token: 1, value: f32::INFINITY }),
        ] {
            for sampling in [sampling, Sampling::GREEDY] {
                let found = choose(&[0.0, 1.0], &sampling, Context { bias, ..context }, 0);
                assert_eq!(found, Err(expected));
            }
        }
        assert_eq!(choose(&[0.0, 1.0], &Sampling::GREEDY, context, 0), Ok(0));
        assert_eq!(choose(&[], &sampling, Context::default(), 0), Err(SampleError::AllExcluded));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let bad = Sampling { top_p: 0.0, ..Sampling::GREEDY };
        assert_eq!(
            bad.check().unwrap_err().to_string(),
            "top-p is 0; above 0, at most 1 is expected"
        );
        assert!(Sampling { temperature: f32::NAN, ..Sampling::GREEDY }.check().is_err());
    }
}
