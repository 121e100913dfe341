//! From logits to a token: greedy, temperature, top-k, top-p, with a seed.
//!
//! Invariant (determinism contract, rule 7): the token is a function of the logits, the
//! settings, the seed and the token's position.

use lite_llm_kernels::ops::function::exp;
use serde::{Deserialize, Serialize};

use crate::random::{Purpose, random_unit};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Only the k best tokens may be chosen; 0 is no limit.
    pub top_k: u32,
    /// Only the smallest set of best tokens whose probability reaches this; 1 is no limit.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the token with the largest logit.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Says what is wrong with the settings, if anything.
    pub fn check(&self) -> Result<(), SamplingError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(SamplingError {
                name: "temperature",
                found: self.temperature,
                range: "at least 0",
            });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError {
                name: "top-p",
                found: self.top_p,
                range: "above 0, at most 1",
            });
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

/// Chooses the token at `position` from its `logits` (finite, not empty).
pub fn sample(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
    if sampling.temperature == 0.0 {
        return argmax(logits);
    }
    // Best first; equal logits by token id, so that the order is the same everywhere.
    let better =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let k = sampling.top_k as usize;
    if k > 0 && k < order.len() {
        order.select_nth_unstable_by(k - 1, better);
        order.truncate(k);
    }
    order.sort_unstable_by(better);

    let best = logits[order[0] as usize];
    let mut weights: Vec<f64> = order
        .iter()
        .map(|&id| f64::from(exp((logits[id as usize] - best) / sampling.temperature)))
        .collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let nucleus = weights.iter().position(|w| {
        kept += w;
        kept >= f64::from(sampling.top_p) * total
    });
    if let Some(last) = nucleus {
        weights.truncate(last + 1);
    }

    let total: f64 = weights.iter().sum();
    let mut left = random_unit(sampling.seed, Purpose::Sampling, position) * total;
    for (id, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    order[weights.len() - 1]
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
