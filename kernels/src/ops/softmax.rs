//! Softmax of one row: largest value, exp of the differences, their sum by rule 3, a division each.

use crate::{
    ops::{function::exp, sum},
    simd::{Simd, vectorised},
};

/// Replaces a row by its softmax. One NaN makes the whole row NaN.
pub fn softmax(row: &mut [f32]) {
    softmax_with(Simd::best(), row);
}

vectorised! {
    pub(crate) fn softmax_with(row: &mut [f32]) {
        let largest = largest(row);
        for x in row.iter_mut() {
            *x = exp(*x - largest);
        }
        let total = sum::sum(row);
        for x in row.iter_mut() {
            *x /= total;
        }
    }
}

/// Replaces every value by `exp((value − largest) / temperature)`.
pub fn weights(row: &mut [f32], largest: f32, temperature: f32) {
    weights_with(Simd::best(), row, largest, temperature);
}

vectorised! {
    fn weights_with(row: &mut [f32], largest: f32, temperature: f32) {
        for x in row.iter_mut() {
            *x = exp((*x - largest) / temperature);
        }
    }
}

/// Backward of a softmax with result p: `ds_i = p_i (dp_i − Σ_j p_j dp_j)`, in place on dp, the sum by
/// rule 3.
///
/// # Panics
/// If the lengths differ.
pub fn softmax_backward(p: &[f32], dp: &mut [f32]) {
    assert_eq!(p.len(), dp.len(), "p and dp are of one length");
    softmax_backward_with(Simd::best(), p, dp);
}

vectorised! {
    pub(crate) fn softmax_backward_with(p: &[f32], dp: &mut [f32]) {
        let along = sum::sum_products(p, dp);
        for (dp, &p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - along);
        }
    }
}

/// The largest value; −infinity for none. Which of +0 and −0 is returned, and what a NaN does,
/// is open: neither can be seen after exp and the sum.
#[inline(always)]
pub(crate) fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (whole, rest) = values.as_chunks::<8>();
    for chunk in whole {
        for i in 0..8 {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}
