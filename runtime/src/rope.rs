//! Rotary tables: the frequencies of a model's pairs, and the scale of their cosines and sines.
//!
//! The formulas are those of transformers' `modeling_rope_utils`, computed in f64 by a pinned crate
//! and rounded once. Where a formula depends on a length, it is the context that the model is
//! served with, never the current length (rule 4 of the determinism contract): transformers takes
//! the longest position so far, so a key that was rotated before the base grew keeps its old angle.
//!
//! Shapes: `inv_freq` `[head_dim / 2]`; pair i of a head has the frequency `theta^(-2 i / head_dim)`
//! before scaling (RoFormer, Su et al. 2021, section 3.2).

use std::f64::consts::PI;

use crate::config::{AttentionConfig, RopeScaling};

/// What rotates queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Radians per position, `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Cosines and sines are multiplied by this.
    pub scale: f32,
}

impl Rotary {
    /// The table of a checked configuration that is served with `context` positions.
    pub fn new(attention: &AttentionConfig, context: usize) -> Self {
        let (theta, dim) = (attention.rope_theta, attention.head_dim);
        let pairs = 0..dim / 2;
        let power = |base: f64, i: usize| libm::pow(base, -(2.0 * i as f64 / dim as f64));
        let plain = |i| power(theta, i);
        let (inv_freq, scale): (Vec<f64>, f64) = match &attention.rope_scaling {
            RopeScaling::None => (pairs.map(plain).collect(), 1.0),
            RopeScaling::Linear { factor } => (pairs.map(|i| plain(i) / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor, original } => {
                let served = context.max(*original) as f64;
                let growth = factor * served / *original as f64 - (factor - 1.0);
                let base = theta * libm::pow(growth, dim as f64 / (dim as f64 - 2.0));
                (pairs.map(|i| power(base, i)).collect(), 1.0)
            }
            &RopeScaling::Yarn {
                factor,
                original,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            } => {
                let (low, high) = ramp(theta, dim, original, (beta_fast, beta_slow), truncate);
                let blended = |i: usize| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    plain(i) / factor * divided + plain(i) * (1.0 - divided)
                };
                (pairs.map(blended).collect(), attention_factor)
            }
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let blended = |i: usize| {
                    let frequency = plain(i);
                    let turns = original as f64 * frequency / (2.0 * PI);
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    match kept {
                        kept if kept < 0.0 => frequency / factor,
                        kept if kept > 1.0 => frequency,
                        kept => (1.0 - kept) * frequency / factor + kept * frequency,
                    }
                };
                (pairs.map(blended).collect(), 1.0)
            }
            RopeScaling::LongRope { short, long, original, attention_factor } => {
                let factors = if context > *original { long } else { short };
                let divided = pairs.zip(factors).map(|(i, factor)| plain(i) / factor);
                (divided.collect(), *attention_factor)
            }
        };
        let inv_freq = inv_freq.into_iter().map(|frequency| frequency as f32).collect();
        Self { inv_freq, scale: scale as f32 }
    }
}

/// Between which pairs YaRN goes over from frequencies that are kept to those that are divided.
fn ramp(theta: f64, dim: usize, original: usize, betas: (f64, f64), truncate: bool) -> (f64, f64) {
    let dim = dim as f64;
    // The pair that turns so often within the original context.
    let pair = |turns: f64| {
        dim * libm::log(original as f64 / (turns * 2.0 * PI)) / (2.0 * libm::log(theta))
    };
    let (mut low, mut high) = (pair(betas.0), pair(betas.1));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // As transformers has it, against a division by zero.
    if low == high {
        high += 0.001;
    }
    (low, high)
}

/// YaRN's factor of attention where a configuration does not say it: of the lengthening alone, or
/// the ratio of two of them.
pub fn yarn_attention_factor(factor: f64, mscales: Option<(f64, f64)>) -> f64 {
    let mscale = |weight: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * weight * libm::log(factor) + 1.0,
    };
    mscales.map_or_else(|| mscale(1.0), |(over, under)| mscale(over) / mscale(under))
}

/// LongRoPE's factor of attention where a configuration does not say it.
pub fn long_attention_factor(factor: f64, original: usize) -> f64 {
    match factor <= 1.0 {
        true => 1.0,
        false => libm::sqrt(1.0 + libm::log(factor) / libm::log(original as f64)),
    }
}
