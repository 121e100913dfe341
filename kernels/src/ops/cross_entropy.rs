//! Cross-entropy of logits with one right answer per row, and its gradient.
//!
//! Per row with logits z and target t: m the largest, s = Σ exp(z − m) by rule 3,
//! `loss = ln s + (m − z_t)` (the logarithm in f64 by the pinned `libm`, rounded once), and
//! `dz_i = (exp(z_i − m) / s − [i = t]) · scale`.

use crate::{
    cpu::Cpu,
    ops::{
        elementwise::{for_rows, for_rows_of},
        function::exp,
        softmax::largest,
        sum,
    },
    simd::vectorised,
};

/// What a row's softmax needs to be made again, piece by piece.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowSoftmax {
    /// The largest logit.
    pub largest: f32,
    /// Σ exp(z − largest).
    pub sum: f32,
    /// The loss of the row; 0 without a target.
    pub loss: f32,
}

/// Softmax and loss of every row of `logits` `[targets.len(), vocabulary]`; rows without a target have
/// no loss.
///
/// # Panics
/// If the shapes do not fit, or a target is outside the vocabulary.
pub fn losses(cpu: &Cpu, logits: &[f32], targets: &[Option<u32>]) -> Vec<RowSoftmax> {
    let mut rows = vec![RowSoftmax::default(); targets.len()];
    if targets.is_empty() {
        return rows;
    }
    let vocabulary = logits.len() / targets.len();
    assert_eq!(logits.len(), targets.len() * vocabulary, "logits are [rows, vocabulary]");
    let mut sums = vec![0.0; 2 * targets.len()];
    for_rows_of(cpu, &mut sums, 2, logits.len(), |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(2)) {
            let logits = &logits[row * vocabulary..][..vocabulary];
            [out[0], out[1]] = largest_and_sum(cpu.simd(), logits);
        }
    });
    for (row, (of, target)) in rows.iter_mut().zip(targets).enumerate() {
        (of.largest, of.sum) = (sums[2 * row], sums[2 * row + 1]);
        if let Some(target) = *target {
            assert!((target as usize) < vocabulary, "target {target} of {vocabulary}");
            let z = logits[row * vocabulary + target as usize];
            of.loss = libm::log(f64::from(of.sum)) as f32 + (of.largest - z);
        }
    }
    rows
}

/// Replaces logits of columns `from..` of each row by their gradient times `scale`; rows without a
/// target become zero. `logits` is `[targets.len(), columns]`.
///
/// # Panics
/// If the shapes do not fit.
pub fn gradient(
    cpu: &Cpu,
    logits: &mut [f32],
    rows: &[RowSoftmax],
    targets: &[Option<u32>],
    from: usize,
    scale: f32,
) {
    if targets.is_empty() {
        return;
    }
    assert_eq!(rows.len(), targets.len(), "one softmax per row");
    let columns = logits.len() / targets.len();
    for_rows(cpu, logits, columns, |first, logits| {
        for (row, z) in (first..).zip(logits.chunks_exact_mut(columns)) {
            let Some(target) = targets[row] else {
                z.fill(0.0);
                continue;
            };
            let at = (target as usize).checked_sub(from).filter(|at| *at < columns);
            row_gradient(cpu.simd(), z, rows[row], at, scale);
        }
    });
}

vectorised! {
    fn largest_and_sum(logits: &[f32]) -> [f32; 2] {
        let largest = largest(logits);
        [largest, sum::sum_by(logits, |sum, z| sum + exp(z - largest))]
    }
}

vectorised! {
    fn row_gradient(z: &mut [f32], row: RowSoftmax, at: Option<usize>, scale: f32) {
        for z in z.iter_mut() {
            *z = exp(*z - row.largest) / row.sum * scale;
        }
        if let Some(at) = at {
            z[at] -= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::simd::Simd;

    #[test]
    fn rows_are_shared_by_threads_where_there_is_much_to_sum_and_keep_their_bits() {
        let (rows, vocabulary) = (40, 2000);
        let logits: Vec<f32> = (0..rows * vocabulary).map(|i| (i as f32).sin() * 9.0).collect();
        let targets: Vec<Option<u32>> = (0..rows as u32).map(|i| Some(i * 31)).collect();
        let one = losses(&Cpu::new(1, Simd::Scalar), &logits, &targets);
        assert_eq!(losses(&Cpu::best(3), &logits, &targets), one);
        let pieces = AtomicUsize::new(0);
        let mut out = vec![0.0; 2 * rows];
        for_rows_of(&Cpu::best(2), &mut out, 2, logits.len(), |_, _| {
            pieces.fetch_add(1, Ordering::Relaxed);
        });
        assert!(pieces.into_inner() > 1, "one thread would do all rows");
    }
}
