//! Routing on the device (`route.cu`): one level, or from the scores of all of a layer's gates to routes.
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use super::{
    Cuda, Grid,
    compile::Source,
    launch::{Choose, Done, Experts, THREADS, WARPS},
    memory::{Args, Dev, pair},
};
use crate::{device::DeviceError, ops::tree::LEAF};

/// A tier as routing sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TierShape {
    /// What names it where scores are equal.
    pub name: u64,
    /// Groups.
    pub groups: usize,
    /// Experts of a group.
    pub experts: usize,
    /// Groups that are chosen.
    pub k_group: usize,
    /// Experts that are chosen in each.
    pub k_expert: usize,
}

impl TierShape {
    fn branches(&self) -> usize {
        self.k_group.min(self.groups)
    }

    fn routes(&self) -> usize {
        self.branches() * self.k_expert.min(self.experts)
    }
}

/// The gates of every layer of a model: how their scores lie in a row, one after the other.
///
/// First the tiers' scores, where there are several tiers; then tier by tier those of its groups, where
/// there are several; then tier by tier, group by group, those of experts.
pub struct Gates {
    tiers: Dev<[u32; 8]>,
    names: Dev<u64>,
    k_tier: usize,
    seed: u64,
    renormalise: bool,
    cols: usize,
    branches: usize,
    routes: usize,
    experts: usize,
    widest: usize,
}

impl Gates {
    /// Scores of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Routes of a row at most.
    pub fn routes(&self) -> usize {
        self.routes
    }

    /// Experts of a layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Words of a row's choices.
    fn fixed(&self) -> usize {
        4 * self.k_tier + 3 * self.branches + 2 * self.routes
    }

    /// Words of a choice that is made.
    fn room(&self) -> usize {
        4 * self.widest + self.widest.div_ceil(LEAF) + 4
    }
}

/// Routes of rows, made once for as many as there may be.
pub struct Descended {
    /// `[rows, routes]`: the expert in the layer's table, in order of routes; `u32::MAX` past the
    /// row's count.
    pub index: Dev<u32>,
    /// `[rows, routes]`; 0 past the row's count.
    pub weight: Dev<f32>,
    /// `[rows]`.
    pub count: Dev<u32>,
    /// `[rows]`: 0, or 1 + the level (0 tiers, 1 groups, 2 experts) of the gate that gave a score that
    /// is no finite number, and that score's bits. Such a row has no routes.
    pub bad: Dev<[u32; 2]>,
}

impl Cuda {
    /// Chooses the k best candidates of every branch: `scores` is `[branches, n]`, `index` and
    /// `weight` are `[branches, k]`, `bad` is `[branches]`, 1 where a score is not finite.
    pub fn choose(
        &self,
        scores: &Dev<f32>,
        how: Choose<'_>,
        index: &Dev<u32>,
        weight: &Dev<f32>,
        bad: &Dev<u32>,
    ) -> Done {
        let (n, branches) = (how.n, bad.len());
        assert_eq!(scores.len(), branches * n, "scores are [branches, n]");
        how.check(branches, index, weight);
        let args = Args::default().dev(scores).structure(&how.words());
        let args = args.dev(index).dev(weight).dev(bad);
        let shared = (4 * n + n.div_ceil(LEAF) + 4) * size_of::<f32>();
        let grid = Grid { shared, ..Grid::new(branches, 32) };
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Route, "choose", grid, args) }
    }

    /// Divides the weights of every row by their sum, added in order.
    pub fn renormalise(&self, weights: &Dev<f32>, per_row: usize) -> Done {
        assert!(per_row > 0 && weights.len().is_multiple_of(per_row), "whole rows");
        let rows = weights.len() / per_row;
        let args = Args::default().dev(weights).u32(per_row).u32(rows);
        // SAFETY: whole rows.
        unsafe { self.launch(Source::Route, "renormalise", self.each(rows), args) }
    }

    /// What [`Cuda::descend`] needs to know of a model; `seed` is that of its routing.
    pub fn gates(
        &self,
        tiers: &[TierShape],
        k_tier: usize,
        seed: u64,
        renormalise: bool,
    ) -> Result<Gates, DeviceError> {
        assert!(!tiers.is_empty() && k_tier > 0, "a tier to choose");
        let small = |n: usize| u32::try_from(n).expect("a size fits 32 bits");
        let mut cols = if tiers.len() > 1 { tiers.len() } else { 0 };
        let groups_at: Vec<u32> = tiers
            .iter()
            .map(|tier| {
                let at = cols;
                cols += if tier.groups > 1 { tier.groups } else { 0 };
                if tier.groups > 1 { small(at) } else { u32::MAX }
            })
            .collect();
        let (mut first, mut words) = (0, Vec::new());
        for (tier, groups_at) in tiers.iter().zip(groups_at) {
            let TierShape { groups, experts, k_group, k_expert, .. } = *tier;
            assert!(
                groups > 0 && experts > 0 && k_group > 0 && k_expert > 0,
                "something to choose"
            );
            let [groups_, experts_, k_group, k_expert] =
                [groups, experts, k_group, k_expert].map(small);
            let (at, from) = (small(cols), small(first));
            words.push([groups_, experts_, k_group, k_expert, groups_at, at, from, 0]);
            cols += groups * experts;
            first += groups * experts;
        }
        let k_tier = k_tier.min(tiers.len());
        let most = |of: fn(&TierShape) -> usize| {
            let mut each: Vec<usize> = tiers.iter().map(of).collect();
            each.sort_unstable_by(|a, b| b.cmp(a));
            each[..k_tier].iter().sum()
        };
        let widest = tiers.iter().map(|t| t.groups.max(t.experts)).max().unwrap_or(0);
        let names: Vec<u64> = tiers.iter().map(|t| t.name).collect();
        Ok(Gates {
            tiers: self.upload(&words)?,
            names: self.upload(&names)?,
            k_tier,
            seed,
            renormalise,
            cols,
            branches: most(TierShape::branches),
            routes: most(TierShape::routes),
            experts: first,
            widest: widest.max(tiers.len()),
        })
    }

    /// Room for the routes of so many rows.
    pub fn descended(&self, gates: &Gates, rows: usize) -> Result<Descended, DeviceError> {
        Ok(Descended {
            index: self.filled(rows * gates.routes, 0xff)?,
            weight: self.filled(rows * gates.routes, 0)?,
            count: self.filled(rows, 0)?,
            bad: self.filled(rows, 0)?,
        })
    }

    /// Words of a processor for the routes of a row.
    fn descent_room(&self) -> usize {
        (self.shared_max as usize - 1024) / size_of::<f32>()
    }

    /// Whether [`Cuda::descend`] can be used with these gates.
    pub fn descend_fits(&self, gates: &Gates) -> bool {
        gates.fixed() + gates.room() <= self.descent_room()
    }

    /// Routes every row of `scores`, `[rows, cols]`, of a layer. `masks`: a bit per tier that the row
    /// may use, whole words per row; of none, all.
    pub fn descend(
        &self,
        gates: &Gates,
        layer: usize,
        scores: &Dev<f32>,
        masks: Option<&Dev<u32>>,
        to: &Descended,
    ) -> Done {
        let rows = to.count.len();
        let Gates { k_tier, cols, branches, routes, .. } = *gates;
        let mask_words = gates.tiers.len().div_ceil(32);
        assert_eq!(scores.len(), rows * cols, "scores are [rows, cols]");
        assert_eq!((to.index.len(), to.weight.len()), (rows * routes, rows * routes), "all routes");
        assert_eq!(to.bad.len(), rows, "one per row");
        assert!(masks.is_none_or(|m| m.len() == rows * mask_words), "a bit per tier");
        let room = gates.room();
        let words = [
            gates.tiers.at,
            gates.names.at,
            masks.map_or(0, |m| m.at),
            gates.seed,
            pair(layer, gates.tiers.len()),
            pair(k_tier, mask_words),
            pair(cols, branches),
            pair(routes, room),
            u64::from(gates.renormalise),
        ];
        let fixed = gates.fixed();
        let most = self.descent_room();
        assert!(self.descend_fits(gates), "gates that fit a processor");
        let warps = branches.clamp(1, WARPS).min((most - fixed) / room);
        let args = Args::default().dev(scores).structure(&words);
        let args = args.dev(&to.index).dev(&to.weight).dev(&to.count).dev(&to.bad);
        let shared = (fixed + warps * room) * size_of::<f32>();
        let grid = Grid { shared, ..Grid::new(rows, warps as u32 * 32) };
        // SAFETY: shapes as asserted; the tiers' places are those of a row of `cols`.
        unsafe { self.launch(Source::Route, "descend", grid, args) }
    }

    /// Which routes go to experts that the table lacks: `out[0]` says how many, `out[1..]` which, in
    /// order. Routes outside the table are none.
    pub fn absent_routes(&self, routes: &Dev<u32>, experts: &Experts, out: &Dev<u32>) -> Done {
        assert!(out.len() > routes.len(), "room for all routes and their number");
        let args = Args::default().dev(routes).u32(routes.len()).dev(&experts.table);
        let args = args.u32(experts.table.len()).dev(out);
        let threads = (routes.len().next_multiple_of(32) as u32).clamp(THREADS / 8, 1024);
        // SAFETY: there is room for every route.
        unsafe { self.launch(Source::Route, "absent_routes", Grid::new(1, threads), args) }
    }
}
