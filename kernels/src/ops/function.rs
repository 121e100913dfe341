//! exp, sigmoid and silu: our own, so that they give the same bits everywhere.
//!
//! Only additions, multiplications, divisions and fused multiply-adds of f32, all of which IEEE
//! 754 fixes. exp is within 1 ulp, sigmoid and silu within 3, over the whole range: too large
//! gives infinity, too small passes through the subnormals to zero, NaN gives NaN.

use std::f32::consts::LOG2_E;

#[cfg(test)]
use crate::simd::vectorised;

/// Adding it rounds to an integer, which then lies in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; n · high is exact for every |n| < 2^9.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// e to the x.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Beyond these the result is infinity or zero anyway; a NaN compares false and stays.
    let x = if x > 120.0 { 120.0 } else { x };
    let x = if x < -120.0 { -120.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // Minimax for (exp(r) - 1 - r) / r² on |r| <= ln 2 / 2.
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = (r * r).mul_add(p, r) + 1.0;
    // 2^n in two factors, so that neither leaves the normal range and the last product rounds once.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23).cast_unsigned())
}

/// 1 / (1 + exp(-x)).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    // exp of the negative side only: no overflow, and small results keep their digits.
    let e = exp(-x.abs());
    let numerator = if x < 0.0 { e } else { 1.0 };
    numerator / (1.0 + e)
}

/// x · sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[cfg(test)]
vectorised! {
    /// [`exp`] of every value, in place.
    pub(crate) fn exp_all(values: &mut [f32]) {
        for x in values {
            *x = exp(*x);
        }
    }
}

#[cfg(test)]
vectorised! {
    /// [`silu`] of every value, in place.
    pub(crate) fn silu_all(values: &mut [f32]) {
        for x in values {
            *x = silu(*x);
        }
    }
}
