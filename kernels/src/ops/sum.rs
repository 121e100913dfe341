//! Rule 3 of the determinism contract: sums over a row.
//!
//! The row is cut in leaves of [`LEAF`]. Inside a leaf, value i is added to virtual lane i mod 8,
//! i upwards, lanes starting at +0.0; then `((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7))`. Leaves
//! meet in the tree of [`super::tree`], so that a row that is cut at nodes of it keeps its sum.

use crate::{
    ops::tree::{LEAF, Sum},
    simd::vectorised,
};

/// Virtual lanes; fixed by the determinism contract.
pub const LANES: usize = 8;

/// The sum of the lanes by the fixed tree.
#[inline(always)]
pub(crate) fn tree(l: [f32; LANES]) -> f32 {
    let half = [l[0] + l[4], l[1] + l[5], l[2] + l[6], l[3] + l[7]];
    (half[0] + half[2]) + (half[1] + half[3])
}

/// One leaf, of what `add` makes of a lane and a value.
#[inline(always)]
fn leaf<T: Copy>(values: &[T], add: impl Fn(f32, T) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[i] = add(lanes[i], chunk[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = add(*lane, x);
    }
    tree(lanes)
}

/// The sum of what `add` adds of each value.
#[inline(always)]
pub fn sum_by<T: Copy>(values: &[T], add: impl Fn(f32, T) -> f32) -> f32 {
    match values.len() {
        0..=LEAF => leaf(values, add),
        _ => {
            let mut sum = Sum::of(values.len().div_ceil(LEAF));
            let mut rest = values;
            while !rest.is_empty() {
                let (first, more) = rest.split_at(LEAF.min(rest.len()));
                sum.add(leaf(first, &add));
                rest = more;
            }
            sum.total()
        }
    }
}

/// The sum of all values.
#[inline(always)]
pub fn sum(values: &[f32]) -> f32 {
    sum_by(values, |sum, x| sum + x)
}

/// The sums of the leaves of a row, in order: [`super::tree::fold`] makes its sum of them.
pub fn leaf_sums(values: &[f32]) -> Vec<f32> {
    values.chunks(LEAF).map(|values| leaf(values, |sum, x| sum + x)).collect()
}

/// The sum of all squares, each added by a fused multiply-add.
#[inline(always)]
pub(crate) fn sum_of_squares(values: &[f32]) -> f32 {
    sum_by(values, |sum, x: f32| x.mul_add(x, sum))
}

/// The sum of all products of two rows of one length, each added by a fused multiply-add.
#[inline(always)]
pub(crate) fn sum_products(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = Sum::of(a.len().div_ceil(LEAF));
    let (mut a, mut b) = (a, &b[..a.len()]);
    while !a.is_empty() {
        let len = LEAF.min(a.len());
        sum.add(leaf_of_products(&a[..len], &b[..len]));
        (a, b) = (&a[len..], &b[len..]);
    }
    sum.total()
}

/// One leaf of products.
#[inline(always)]
fn leaf_of_products(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, more_a), (b, more_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(more_a).zip(more_b) {
        *lane = a.mul_add(b, *lane);
    }
    tree(lanes)
}

vectorised! {
    /// `sum_products` by itself, with the instructions of a set: without them each fused
    /// multiply-add would be a call of the library's.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        sum_products(a, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tree::fold;

    /// The rule as it is written, from the root down.
    fn by_the_rule(values: &[f32], add: fn(f32, f32) -> f32) -> f32 {
        let leaves = values.len().div_ceil(256);
        if leaves > 1 {
            let earlier = 1 << (leaves - 1).ilog2();
            let (a, b) = values.split_at(earlier * 256);
            return by_the_rule(a, add) + by_the_rule(b, add);
        }
        let mut l = [0.0f32; 8];
        for (i, x) in values.iter().enumerate() {
            l[i % 8] = add(l[i % 8], *x);
        }
        ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
    }

    #[test]
    fn the_order_is_eight_lanes_a_leaf_and_the_written_trees() {
        let mut differs = [0; 2];
        for len in (0..100).chain([255, 256, 257, 511, 512, 513, 768, 1000, 2048, 2049, 5000]) {
            let values: Vec<f32> = (0..len).map(|i| (i as f32 * 12.9898).sin() * 43.5).collect();
            let found = sum(&values);
            assert_eq!(found.to_bits(), by_the_rule(&values, |a, x| a + x).to_bits(), "{len}");
            let squares = by_the_rule(&values, |a, x| x.mul_add(x, a));
            assert_eq!(sum_of_squares(&values).to_bits(), squares.to_bits(), "{len}");
            let plain = values.iter().fold(0.0f32, |a, b| a + b);
            differs[0] += usize::from(plain.to_bits() != found.to_bits());
            let one_leaf = leaf(&values, |a, x| a + x);
            differs[1] += usize::from(len > 256 && one_leaf.to_bits() != found.to_bits());
        }
        assert!(differs[0] > 20 && differs[1] > 5, "the data can tell orders apart: {differs:?}");
    }

    #[test]
    fn products_have_the_bits_of_the_rule_in_every_set() {
        for len in [0, 1, 9, 256, 300, 1000] {
            let of = |by: f32| (0..len).map(|i| (i as f32 * by).sin() * 43.5).collect::<Vec<_>>();
            let (a, b) = (of(12.9898), of(78.233));
            let pairs: Vec<[f32; 2]> = a.iter().zip(&b).map(|(a, b)| [*a, *b]).collect();
            let expected = sum_by(&pairs, |sum, [a, b]: [f32; 2]| a.mul_add(b, sum));
            for simd in crate::simd::Simd::available() {
                assert_eq!(dot(simd, &a, &b).to_bits(), expected.to_bits(), "{len} {simd}");
            }
        }
    }

    #[test]
    fn a_row_cut_at_a_node_keeps_its_sum() {
        let values: Vec<f32> = (0..2048).map(|i| (i as f32 * 78.233).sin() * 1e3).collect();
        for ranks in [2, 4, 8] {
            let parts: Vec<f32> = values.chunks(2048 / ranks).map(sum_of_squares).collect();
            assert_eq!(fold(parts.into_iter()).to_bits(), sum_of_squares(&values).to_bits());
        }
    }
}
