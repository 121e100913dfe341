//! Stable top-k with a seeded tie-break, and the probabilities of what was chosen.

use std::cmp::Ordering;

use lite_llm_kernels::ops::softmax::softmax;

use super::Level;
use crate::random::{Purpose, random_u64};

/// One candidate of a level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    /// Index of the candidate within its level.
    pub(super) index: u32,
    /// Softmax over the level's candidates.
    pub(super) probability: f32,
}

/// Where a selection happens: it seeds the order of equal scores.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) seed: u64,
    pub(super) layer: usize,
    pub(super) level: Level,
    /// Index of the first candidate among all of this level in the layer.
    pub(super) first: u64,
}

impl Place {
    /// Order of candidates with equal scores: a hash of (seed, layer, level, candidate).
    fn tie_break(&self, index: u32) -> u64 {
        let place = (self.layer as u64) << 8 | self.level as u64;
        let seed = random_u64(self.seed, Purpose::TieBreak, place);
        random_u64(seed, Purpose::TieBreak, self.first + u64::from(index))
    }
}

/// Scratch memory of a selection, reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    order: Vec<u32>,
    probabilities: Vec<f32>,
}

/// The `k` best of the candidates `(index, score)`, best first.
///
/// Scores are compared, not probabilities; equal scores (−0 equals +0) by [`Place::tie_break`].
/// A score that is no finite number is returned as the error.
pub(super) fn top_k(
    place: Place,
    k: usize,
    candidates: &[(u32, f32)],
    scratch: &mut Scratch,
    out: &mut Vec<Choice>,
) -> Result<(), f32> {
    if let Some((_, score)) = candidates.iter().find(|(_, score)| !score.is_finite()) {
        return Err(*score);
    }
    let better = |a: u32, b: u32| -> Ordering {
        let ((index_a, score_a), (index_b, score_b)) =
            (candidates[a as usize], candidates[b as usize]);
        // Finite scores always compare.
        score_b
            .partial_cmp(&score_a)
            .unwrap_or(Ordering::Equal)
            .then_with(|| place.tie_break(index_a).cmp(&place.tie_break(index_b)))
            .then(index_a.cmp(&index_b))
    };
    let order = &mut scratch.order;
    order.clear();
    order.extend(0..candidates.len() as u32);
    let k = k.min(order.len());
    if k == 0 {
        out.clear();
        return Ok(());
    }
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, |&a, &b| better(a, b));
        order.truncate(k);
    }
    order.sort_unstable_by(|&a, &b| better(a, b));

    let probabilities = &mut scratch.probabilities;
    probabilities.clear();
    probabilities.extend(candidates.iter().map(|&(_, score)| score));
    softmax(probabilities);
    out.clear();
    out.extend(order.iter().map(|&at| Choice {
        index: candidates[at as usize].0,
        probability: probabilities[at as usize],
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(seed: u64) -> Place {
        Place { seed, layer: 3, level: Level::Expert, first: 0 }
    }

    fn chosen(seed: u64, k: usize, scores: &[f32]) -> Vec<u32> {
        let candidates: Vec<_> = (0..).zip(scores.iter().copied()).collect();
        let mut out = Vec::new();
        top_k(place(seed), k, &candidates, &mut Scratch::default(), &mut out).unwrap();
        out.iter().map(|c| c.index).collect()
    }

    #[test]
    fn the_best_come_first() {
        assert_eq!(chosen(0, 3, &[0.1, 5.0, -2.0, 5.5, 4.0]), [3, 1, 4]);
        assert_eq!(chosen(0, 9, &[1.0, 2.0]), [1, 0]);
    }

    #[test]
    fn equal_scores_are_ordered_by_the_seed_and_zero_has_no_sign() {
        let scores = [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0];
        let orders: std::collections::HashSet<_> =
            (0..64).map(|seed| chosen(seed, 3, &scores)).collect();
        assert!(orders.len() > 32, "the seed must matter: {} orders", orders.len());
        assert_eq!(chosen(5, 3, &scores), chosen(5, 3, &[0.0; 8]));
    }

    #[test]
    fn a_shuffled_list_of_candidates_gives_the_same_choice() {
        let mut candidates: Vec<(u32, f32)> = (0..40).map(|i| (i, (i % 4) as f32)).collect();
        let (mut forward, mut backward) = (Vec::new(), Vec::new());
        top_k(place(1), 6, &candidates, &mut Scratch::default(), &mut forward).unwrap();
        candidates.reverse();
        top_k(place(1), 6, &candidates, &mut Scratch::default(), &mut backward).unwrap();
        let indices = |c: &[Choice]| c.iter().map(|c| c.index).collect::<Vec<_>>();
        assert_eq!(indices(&forward), indices(&backward));
    }

    #[test]
    fn a_score_that_is_no_number_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let candidates = [(0, 1.0), (1, bad)];
            let mut out = Vec::new();
            let result = top_k(place(0), 1, &candidates, &mut Scratch::default(), &mut out);
            assert!(result.is_err());
        }
    }
}
