//! Which experts a token goes to.
//!
//! [`Router`] is the interface, [`HierarchicalRouter`] its implementation on host memory.
//! Invariant (determinism contract, rule 5): a token's routes are a function of its hidden
//! state, the gates, the seed and the allowed tiers; of nothing else.

mod hierarchical;
mod select;

use lite_llm_kernels::device::{Device, DeviceError};

pub use self::hierarchical::{HierarchicalRouter, TierGates};
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
    }

    /// Adds the next row's routes, by priority.
    pub fn push_row(&mut self, routes: impl IntoIterator<Item = Route>) {
        self.routes.extend(routes);
        self.ends.push(self.routes.len() as u32);
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

/// Why tokens could not be routed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// A gate gave a score that is no number, so there is no order of candidates.
    #[error(
        "layer {layer}: the {level} gate gave {score} for row {row}; \
         the model's weights or the hidden state hold NaN or infinity"
    )]
    NotANumber {
        /// Layer of the model.
        layer: usize,
        /// `tier`, `group` or `expert`.
        level: Level,
        /// Row of the batch.
        row: usize,
        /// What the gate gave.
        score: f32,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
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
    /// the contents of `out`.
    fn route(
        &self,
        device: &D,
        hidden: &D::Tensor,
        tiers: &[&TierMask],
        out: &mut Routes,
    ) -> Result<(), RouteError>;
}
