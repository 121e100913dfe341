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
pub(super) struct Place<'a> {
    pub(super) seed: u64,
    pub(super) layer: usize,
    pub(super) among: Among<'a>,
}

/// What candidates are, by names that stay when tiers come and go. A tier is named by
/// [`hash_name`] of its id.
#[derive(Debug, Clone, Copy)]
pub(super) enum Among<'a> {
    /// Candidate i is the tier of the i-th name.
    Tiers(&'a [u64]),
    /// Candidate i is group i of a tier.
    Groups { tier: u64 },
    /// Candidate i is expert i of a group.
    Experts { tier: u64, group: u32 },
}

impl Place<'_> {
    pub(super) fn level(&self) -> Level {
        match self.among {
            Among::Tiers(_) => Level::Tier,
            Among::Groups { .. } => Level::Group,
            Among::Experts { .. } => Level::Expert,
        }
    }

    /// Candidates of equal score are chosen in the order of these numbers, small ones first:
    /// `h = random(seed, layer · 2^8 + level)`, `h = random(h, tier)`,
    /// `h = random(h, group · 2^32 + expert)`, all for [`Purpose::TieBreak`], with 0 for what the
    /// level does not have.
    fn tie_break(&self, index: u32) -> u64 {
        let (tier, group, expert) = match self.among {
            Among::Tiers(names) => (names[index as usize], 0, 0),
            Among::Groups { tier } => (tier, index, 0),
            Among::Experts { tier, group } => (tier, group, index),
        };
        let level = (self.layer as u64) << 8 | self.level() as u64;
        let candidate = u64::from(group) << 32 | u64::from(expert);
        [level, tier, candidate]
            .into_iter()
            .fold(self.seed, |hash, name| random_u64(hash, Purpose::TieBreak, name))
    }
}

/// Scratch memory of a selection, reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    order: Vec<u32>,
    probabilities: Vec<f32>,
}

impl Scratch {
    /// Softmax over the candidates of the last selection, in their order.
    pub(super) fn probabilities(&self) -> &[f32] {
        &self.probabilities
    }
}

/// The `k` best of the candidates `(index, score)`, best first.
///
/// Scores are compared, not probabilities; equal scores (−0 equals +0) by [`Place::tie_break`].
/// A score that is no finite number is returned as the error.
pub(super) fn top_k(
    place: Place<'_>,
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
    let k = k.min(candidates.len());
    if k == 0 {
        out.clear();
        return Ok(());
    }
    // k is small: most candidates are compared once, with the last of those so far.
    for candidate in 0..candidates.len() as u32 {
        let full = order.len() == k;
        if full && order.last().is_some_and(|&last| better(last, candidate).is_lt()) {
            continue;
        }
        let place = order.partition_point(|&at| better(at, candidate).is_lt());
        order.truncate(k - 1);
        order.insert(place, candidate);
    }

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
    use crate::random::hash_name;

    fn place(seed: u64) -> Place<'static> {
        let tier = hash_name("tier_1b");
        Place { seed, layer: 3, among: Among::Experts { tier, group: 0 } }
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
    fn tie_breaks_are_pinned_for_ever_and_know_no_flat_index() {
        // Computed by another program, from the definition.
        let names = ["tier_1b", "tier_10b", "tier_100b", "tier_1t"].map(hash_name);
        let tier = hash_name("tier_10b");
        for (among, index, bits) in [
            (Among::Tiers(&names), 0, 0x2cf0_3b6d_56bd_4dc0_u64),
            (Among::Groups { tier }, 5, 0x6ea3_40e8_b32c_e0a1),
            (Among::Experts { tier, group: 5 }, 7, 0xddde_55cc_51d1_d0f4),
        ] {
            let found = Place { seed: 11, layer: 3, among }.tie_break(index);
            assert_eq!(found, bits, "{among:?} {index}: {found:#x}");
        }
        assert_eq!(chosen(5, 8, &[1.0; 8]), [7, 0, 4, 1, 2, 6, 5, 3]);
        let order = |names: &[u64]| {
            let place = Place { seed: 5, layer: 3, among: Among::Tiers(names) };
            let candidates: Vec<_> = (0..names.len() as u32).map(|i| (i, 2.5)).collect();
            let mut out = Vec::new();
            top_k(place, 4, &candidates, &mut Scratch::default(), &mut out).unwrap();
            out.iter().map(|c| names[c.index as usize]).collect::<Vec<_>>()
        };
        assert_eq!(order(&names), [3, 1, 0, 2].map(|i| names[i]));
        // A tier that comes or goes leaves the others in their order.
        assert_eq!(order(&names[1..]), [3, 1, 2].map(|i| names[i]));
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
