//! Sums over a row: 8 virtual lanes and a fixed tree.
//!
//! Value i is added to lane i mod 8, i upwards, lanes starting at +0.0; then
//! `((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7))`.

/// Virtual lanes; fixed by the determinism contract.
pub const LANES: usize = 8;

/// The sum of the lanes by the fixed tree.
#[inline(always)]
pub(crate) fn tree(l: [f32; LANES]) -> f32 {
    let half = [l[0] + l[4], l[1] + l[5], l[2] + l[6], l[3] + l[7]];
    (half[0] + half[2]) + (half[1] + half[3])
}

/// The sum of all values.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += x;
    }
    tree(lanes)
}

/// The sum of all squares, each added by a fused multiply-add.
#[inline(always)]
pub(crate) fn sum_of_squares(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[i] = chunk[i].mul_add(chunk[i], lanes[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(x, *lane);
    }
    tree(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_eight_lanes_and_the_written_tree() {
        let mut differs_from_a_plain_loop = 0;
        for len in 0..100 {
            let values: Vec<f32> = (0..len).map(|i| (i as f32 * 12.9898).sin() * 43.5).collect();
            let (mut l, mut squares) = ([0.0f32; 8], [0.0f32; 8]);
            for (i, x) in values.iter().enumerate() {
                l[i % 8] += x;
                squares[i % 8] = x.mul_add(*x, squares[i % 8]);
            }
            let fold =
                |l: [f32; 8]| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
            assert_eq!(sum(&values).to_bits(), fold(l).to_bits());
            assert_eq!(sum_of_squares(&values).to_bits(), fold(squares).to_bits());
            let plain = values.iter().fold(0.0f32, |a, b| a + b);
            differs_from_a_plain_loop += usize::from(plain.to_bits() != sum(&values).to_bits());
        }
        assert!(differs_from_a_plain_loop > 20, "the data can tell orders apart");
    }
}
