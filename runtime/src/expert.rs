//! Experts: their names, their weights, and where they are fetched from.

use std::{fmt, sync::Arc};

use lite_llm_kernels::{device::Swiglu, matrix::PackedMatrix};
use serde::{Deserialize, Serialize};

use crate::{config::MoeConfig, residency::RoutedRow};

/// Which expert of which layer. Tiers and layers are indices into the model's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertKey {
    /// Layer of the model.
    pub layer: u16,
    /// Index of the tier in the model's order.
    pub tier: u16,
    /// Group within the tier.
    pub group: u32,
    /// Expert within the group.
    pub expert: u32,
}

impl ExpertKey {
    /// Index in the layer's flat list: tiers, then groups, then experts.
    pub fn flat(&self, moe: &MoeConfig) -> usize {
        let before: usize =
            moe.tiers[..self.tier as usize].iter().map(|t| t.experts() as usize).sum();
        let per_group = moe.tiers[self.tier as usize].experts_per_group as usize;
        before + self.group as usize * per_group + self.expert as usize
    }

    /// The expert at an index of the layer's flat list.
    pub fn from_flat(moe: &MoeConfig, layer: usize, mut flat: usize) -> Option<Self> {
        for (tier, config) in moe.tiers.iter().enumerate() {
            let experts = config.experts() as usize;
            if flat < experts {
                let per_group = config.experts_per_group as usize;
                return Some(Self {
                    layer: layer as u16,
                    tier: tier as u16,
                    group: (flat / per_group) as u32,
                    expert: (flat % per_group) as u32,
                });
            }
            flat -= experts;
        }
        None
    }
}

impl fmt::Display for ExpertKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, tier, group, expert } = self;
        write!(f, "layer {layer} tier {tier} group {group} expert {expert}")
    }
}

/// Weights of one gated network: `down( silu(gate·x) * (up·x) )`.
#[derive(Debug, Clone)]
pub struct GatedMlp<M = PackedMatrix> {
    /// `[intermediate, hidden]`.
    pub gate: M,
    /// `[intermediate, hidden]`.
    pub up: M,
    /// `[hidden, intermediate]`.
    pub down: M,
}

impl<M> GatedMlp<M> {
    /// The weights as kernels take them.
    pub fn swiglu(&self) -> Swiglu<'_, M> {
        Swiglu { gate: &self.gate, up: &self.up, down: &self.down }
    }
}

impl GatedMlp<PackedMatrix> {
    /// Bytes of the three matrices.
    pub fn bytes(&self) -> u64 {
        [&self.gate, &self.up, &self.down].iter().map(|m| m.data().len() as u64).sum()
    }
}

/// Why an expert could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The expert was not given to this store.
    #[error("{key} is not in the store of this node; its placement is out of date")]
    NotHere {
        /// Which expert.
        key: ExpertKey,
    },
    /// It is not here yet; whoever has asked for it will be woken.
    #[error("{key} is on its way to this node's memory")]
    Coming {
        /// Which expert.
        key: ExpertKey,
    },
    /// The budget has no room.
    #[error(
        "{key} takes {needed} bytes, {free} of {budget} are free; raise the budget or add nodes"
    )]
    OverBudget {
        /// Which expert.
        key: ExpertKey,
        /// Bytes that it takes.
        needed: u64,
        /// Bytes left.
        free: u64,
        /// Bytes in all.
        budget: u64,
    },
    /// Its bytes could not be read or are not what they should be.
    #[error("{key}: {reason}")]
    Unreadable {
        /// Which expert.
        key: ExpertKey,
        /// What went wrong, naming the file.
        reason: String,
    },
}

/// Called when experts have come.
pub type Waker = Box<dyn Fn() + Send + Sync>;

/// Called before experts go; false once nobody listens any more.
pub type Leaving = Box<dyn Fn() -> bool + Send + Sync>;

/// Where experts come from. While a caller holds the [`Arc`], the expert stays where it is.
///
/// A store that holds less than it serves is asked in this order: [`ExpertStore::want`] once for
/// what is to be computed; [`ExpertStore::fetch`], then and whenever it says that more has come;
/// [`ExpertStore::used`] for what was computed with. Other stores have everything, and do nothing
/// at all but fetch.
pub trait ExpertStore<M = PackedMatrix>: Send + Sync {
    /// The expert's weights, ready to be computed with; [`StoreError::Coming`] if they are wanted
    /// and not here yet.
    fn fetch(&self, key: ExpertKey) -> Result<Arc<GatedMlp<M>>, StoreError>;
    /// These experts are to be computed with, so many rows each. They stay until they were used.
    fn want(&self, _experts: &[(ExpertKey, u32)]) {}
    /// These were computed with, or are wanted no more.
    fn used(&self, _experts: &[ExpertKey]) {}
    /// These will probably be wanted next, the likeliest first.
    fn predict(&self, _experts: &[ExpertKey]) {}
    /// Calls this, from any thread, whenever something that was wanted has come, or cannot. Whoever
    /// was to be called before is not any more.
    fn on_arrival(&self, _wake: Waker) {}
    /// Calls this whenever [`ExpertStore::is_whole`] has ended, before anything goes: for whoever keeps
    /// the memory of experts, which nobody else gets meanwhile. It must not ask the store for anything else.
    fn on_leaving(&self, _tell: Leaving) {}
    /// A pass routes these rows in a layer; said before [`ExpertStore::want`], unless
    /// [`ExpertStore::is_complete`].
    fn routed(&self, _layer: u16, _rows: Vec<RoutedRow>) {}
    /// A sequence is over.
    fn ended(&self, _stream: u64) {}
    /// Whether all that it serves is here and stays: then it need not be told anything.
    fn is_complete(&self) -> bool {
        true
    }
    /// Whether all that it serves is here and stays, though it may still want to be told what is
    /// computed with: who only fetches may do so.
    fn is_whole(&self) -> bool {
        self.is_complete()
    }
    /// Whether predictions are of use.
    fn wants_predictions(&self) -> bool {
        false
    }
    /// Bytes held now.
    fn resident_bytes(&self) -> u64;
}
