//! Which experts a token goes to.
//!
//! [`Router`] is the interface, [`HierarchicalRouter`] its implementation on host memory.
//! Invariant (determinism contract, rule 5): a token's routes are a function of its hidden
//! state, the gates, the seed and the allowed tiers; of nothing else. So a row that cannot be
//! routed has no routes and an error of its own ([`Routes::failures`]), and the other rows have the
//! routes that they would have had without it.

mod hierarchical;
mod recorded;
mod select;
mod trace;

use std::collections::BTreeSet;

use lite_llm_kernels::{
    device::{Device, DeviceError},
    matrix::PackedMatrix,
};

pub use self::{
    hierarchical::{HierarchicalRouter, TierGates},
    recorded::{BadRecording, RecordedRouter, RecordedRoutes},
    trace::{Gate, GateTrace, trace_of},
};
use crate::{config::MoeConfig, expert::ExpertKey, tier::TierMask};

/// One expert chosen for one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Route {
    /// The expert: its tier, group and number within the group.
    pub key: ExpertKey,
    /// What its output is multiplied by.
    pub weight: f32,
    /// Place among the token's routes, from 0; outputs are added in this order.
    pub priority: u16,
}

/// The routes of a batch of tokens.
///
/// Rows may have different numbers of routes, for their sets of tiers may differ.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routes {
    routes: Vec<Route>,
    ends: Vec<u32>,
    failures: Vec<ScoreError>,
}

impl Routes {
    /// Tokens that have been routed.
    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    /// All routes: those of row 0 by priority, then those of row 1, …
    pub fn all(&self) -> &[Route] {
        &self.routes
    }

    /// Where each row's routes end in [`Routes::all`].
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Range of a row's routes in [`Routes::all`].
    pub fn range(&self, row: usize) -> std::ops::Range<usize> {
        let start = if row == 0 { 0 } else { self.ends[row - 1] as usize };
        start..self.ends[row] as usize
    }

    /// The routes of one row, by priority.
    pub fn row(&self, row: usize) -> &[Route] {
        &self.routes[self.range(row)]
    }

    /// Each route with the row that it belongs to, in the order of [`Routes::all`].
    pub fn with_rows(&self) -> impl Iterator<Item = (usize, &Route)> {
        (0..self.rows()).flat_map(|row| self.row(row).iter().map(move |route| (row, route)))
    }

    /// Forgets all rows and keeps the memory.
    pub fn clear(&mut self) {
        self.routes.clear();
        self.ends.clear();
        self.failures.clear();
    }

    /// Adds the next row's routes, by priority.
    pub fn push_row(&mut self, routes: impl IntoIterator<Item = Route>) {
        self.routes.extend(routes);
        self.ends.push(self.routes.len() as u32);
    }

    /// Rows that could not be routed, by row, each once; they have no routes.
    pub fn failures(&self) -> &[ScoreError] {
        &self.failures
    }

    /// Says that a row, whose routes are empty, could not be routed. Only the first reason for a
    /// row counts.
    pub fn fail_row(&mut self, error: ScoreError) {
        let at = self.failures.partition_point(|other| other.row < error.row);
        if self.failures.get(at).is_none_or(|other| other.row != error.row) {
            self.failures.insert(at, error);
        }
    }

    /// The row that a route of [`Routes::all`] belongs to.
    pub fn row_of(&self, route: usize) -> usize {
        self.ends.partition_point(|&end| end as usize <= route)
    }

    /// Takes the routes of all rows away but those that `keep` names; the rows stay.
    pub fn keep_rows(&mut self, keep: impl Fn(usize) -> bool) {
        let (mut from, mut to) = (0, 0);
        for row in 0..self.ends.len() {
            let end = self.ends[row] as usize;
            if keep(row) {
                self.routes.copy_within(from..end, to);
                to += end - from;
            }
            self.ends[row] = to as u32;
            from = end;
        }
        self.routes.truncate(to);
    }

    /// All experts, each once: the first choices of all rows, then the second, …
    pub fn likeliest(&self) -> Vec<ExpertKey> {
        let longest = (0..self.rows()).map(|row| self.row(row).len()).max().unwrap_or(0);
        let (mut seen, mut keys) = (BTreeSet::new(), Vec::new());
        for place in 0..longest {
            let keyed = |row: usize| self.row(row).get(place).map(|route| route.key);
            keys.extend((0..self.rows()).filter_map(keyed).filter(|key| seen.insert(*key)));
        }
        keys
    }

    /// Orders the routes of each row by weight, the greatest first.
    fn sort_by_weight(&mut self) {
        for row in 0..self.rows() {
            let routes = self.range(row);
            self.routes[routes].sort_by(|a, b| b.weight.total_cmp(&a.weight));
        }
    }

    /// Flat indices of a row's experts, in route order.
    pub fn flat_row<'a>(
        &'a self,
        row: usize,
        moe: &'a MoeConfig,
    ) -> impl Iterator<Item = usize> + 'a {
        self.row(row).iter().map(|route| route.key.flat(moe))
    }
}

/// Why a row could not be routed: a gate gave a score that is no number, so there is no order of
/// candidates.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "layer {layer}: the {level} gate gave {score} for row {row}; \
     the model's weights or the hidden state hold NaN or infinity"
)]
pub struct ScoreError {
    /// Layer of the model.
    pub layer: usize,
    /// `tier`, `group` or `expert`.
    pub level: Level,
    /// Row of the batch.
    pub row: usize,
    /// What the gate gave.
    pub score: f32,
}

/// The three levels of hierarchical routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// Which tier.
    Tier = 0,
    /// Which group of a tier.
    Group = 1,
    /// Which expert of a group.
    Expert = 2,
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Level::Tier => "tier",
            Level::Group => "group",
            Level::Expert => "expert",
        })
    }
}

/// Chooses experts for hidden states.
pub trait Router<D: Device>: Send + Sync {
    /// Routes every row of `hidden` (`[rows, hidden]`) within its own set of tiers and replaces
    /// the contents of `out`. A row that cannot be routed is one of [`Routes::failures`]; only
    /// what concerns all rows is an error.
    fn route(
        &self,
        device: &D,
        hidden: &D::Tensor,
        tiers: &[&TierMask],
        out: &mut Routes,
    ) -> Result<(), DeviceError>;

    /// The same with half as many experts again of each chosen group, and a row's routes by weight:
    /// where else it might have gone. Nothing is computed with it.
    fn route_wider(
        &self,
        device: &D,
        hidden: &D::Tensor,
        tiers: &[&TierMask],
        out: &mut Routes,
    ) -> Result<(), DeviceError> {
        self.route(device, hidden, tiers, out)
    }

    /// All gates as one matrix `[scores, hidden]` in f32: of tiers, where there are several; tier by tier of
    /// its groups, where there are several; tier by tier and group by group of experts. Rows of absent
    /// tiers are zeros. Nothing if it does not choose by gates.
    fn gates(&self) -> Option<PackedMatrix> {
        None
    }

    /// The experts of the next rows, `[rows, k]`, by number in the layer, if these were recorded
    /// ([`RecordedRouter`]); of no rows, nothing is used up.
    fn recorded(&self, _rows: usize) -> Option<Vec<u32>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(expert: u32) -> Route {
        let key = ExpertKey { layer: 0, tier: 0, group: 0, expert };
        Route { key, weight: 1.0, priority: 0 }
    }

    #[test]
    fn rows_lose_their_routes_and_keep_their_places() {
        let mut routes = Routes::default();
        for row in 0..4u32 {
            routes.push_row((0..row).map(|i| route(10 * row + i)));
        }
        let of: Vec<_> = (0..6).map(|route| routes.row_of(route)).collect();
        assert_eq!(of, [1, 2, 2, 3, 3, 3]);
        routes.keep_rows(|row| row != 2);
        assert_eq!(routes.rows(), 4);
        assert_eq!(routes.row(1), [route(10)]);
        assert!(routes.row(2).is_empty());
        assert_eq!(routes.row(3), [route(30), route(31), route(32)]);
        assert_eq!(routes.all().len(), 4);
    }

    #[test]
    fn the_first_reason_of_a_row_counts_and_rows_are_in_order() {
        let mut routes = Routes::default();
        let error = |row, score| ScoreError { layer: 1, level: Level::Group, row, score };
        for (row, score) in [(3, 1.0), (0, 2.0), (3, 3.0)] {
            routes.fail_row(error(row, score));
        }
        assert_eq!(routes.failures(), [error(0, 2.0), error(3, 1.0)]);
    }
}
