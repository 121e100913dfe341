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

/// Beyond this e^x is infinity, and e^-x and x · e^-x are zero.
const LIMIT: f32 = 120.0;

/// e to the x.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let [p, a, b] = factors(x);
    p * a * b
}

/// Three factors of e to the x: one near 1 and two powers of two, neither of which leaves the
/// normal range, so that the product of the three rounds at the last step only.
#[inline(always)]
fn factors(x: f32) -> [f32; 3] {
    let x = limited(x);
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
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let half = n >> 1;
    [p, power_of_two(half), power_of_two(n.wrapping_sub(half))]
}

/// Within ±[`LIMIT`]; a NaN compares false and stays.
#[inline(always)]
fn limited(x: f32) -> f32 {
    let x = if x > LIMIT { LIMIT } else { x };
    if x < -LIMIT { -LIMIT } else { x }
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

/// x · sigmoid(x); 0 at −infinity, which is the limit.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    let [p, a, b] = factors(-x.abs());
    // x goes in before the powers of two: the product with it may be normal where e^x is not.
    let numerator = if x < 0.0 { limited(x) * p * a * b } else { x };
    numerator / (1.0 + p * a * b)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Simd;

    /// Distance to the exact value in units of the last place that an f32 has there.
    fn ulps(found: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        if found == nearest || (found.is_nan() && exact.is_nan()) {
            return 0.0;
        }
        let size = f64::from(nearest.abs().max(f32::MIN_POSITIVE));
        let spacing = 2f64.powi(libm::ilogb(size) - 23);
        (f64::from(found) - exact).abs() / spacing
    }

    /// Every 997th f32 of all that there are, and the interesting ones.
    fn inputs() -> impl Iterator<Item = f32> {
        let special = [0.0, -0.0, 1.0, 88.722_83, 88.722_84, -87.336_54, -103.97, -104.0, 1e-45];
        (0..u32::MAX / 997).map(|i| f32::from_bits(i * 997)).chain(special)
    }

    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        inputs().map(|x| ulps(f(x), exact(f64::from(x)))).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_accurate_over_the_whole_range() {
        assert!(worst(exp, libm::exp) <= 1.0);
        let exact_sigmoid = |x: f64| {
            let e = libm::exp(-x.abs());
            if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
        };
        assert!(worst(sigmoid, exact_sigmoid) <= 3.0);
        let silu_error =
            worst(silu, |x| if x == f64::NEG_INFINITY { 0.0 } else { x * exact_sigmoid(x) });
        assert!(silu_error <= 3.0, "{silu_error}");
    }

    #[test]
    fn edges_are_exact() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan() && silu(f32::NAN).is_nan());
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(-100.0) > 0.0 && exp(-100.0) < f32::MIN_POSITIVE, "subnormal");
        assert_eq!(exp(-110.0).to_bits(), 0);
        assert_eq!((sigmoid(200.0), sigmoid(-200.0)), (1.0, 0.0));
        assert_eq!(silu(0.0).to_bits(), 0);
        assert_eq!(silu(f32::NEG_INFINITY), 0.0);
        assert_eq!(silu(f32::MIN), 0.0);
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let inputs: Vec<f32> = inputs().step_by(7).collect();
        for front in [exp_all as fn(Simd, &mut [f32]), silu_all] {
            let mut expected = inputs.clone();
            front(Simd::Scalar, &mut expected);
            for simd in Simd::available() {
                let mut found = inputs.clone();
                front(simd, &mut found);
                for ((f, e), x) in found.iter().zip(&expected).zip(&inputs) {
                    let same = f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan());
                    assert!(same, "{simd}: {x:e} gives {f:e}, scalar {e:e}");
                }
            }
        }
    }

    #[test]
    fn the_bits_are_those_of_version_1() {
        // Part of the determinism contract: another value here is another contract version.
        let hash = |f: fn(f32) -> f32| {
            inputs().map(f).fold(0xcbf2_9ce4_8422_2325_u64, |hash, y| {
                let bits = if y.is_nan() { 0x7fc0_0000 } else { y.to_bits() };
                (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3)
            })
        };
        assert_eq!(
            [hash(exp), hash(sigmoid), hash(silu)],
            [760_826_761_777_529_454, 11_263_256_880_942_692_025, 2_008_256_854_338_218_974]
        );
    }
}
