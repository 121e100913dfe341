//! The experts of a sparse layer on a GPU, and what chooses among them.
//!
//! Invariant: an expert whose address is in a layer's table is held until the work that may
//! read it was given to the device.

use std::sync::Arc;

use lite_llm_kernels::{
    cuda::{
        Cuda, Dev,
        descend::{Descended, Gates, TierShape},
        launch::{Choose, DevMatrix, Experts},
        one::Routes,
    },
    cuda_device::Gpu,
    device::DeviceError,
    dtype::DType,
    matrix::PackedMatrix,
};

use crate::{
    config::{ModelConfig, MoeConfig},
    expert::{ExpertKey, ExpertStore, GatedMlp},
    random::{Purpose, hash_name, random_u64},
    residency::HbmStore,
    routing::Level,
};

/// How the rows of every layer are routed.
pub(super) struct Routing {
    moe: MoeConfig,
    names: Dev<u64>,
    /// Of a flat mixture nothing: one choice among experts is all there is.
    tree: Option<Gates>,
    /// Routes of a row at most.
    pub(super) routes: usize,
    scores: usize,
}

impl Routing {
    /// `None` if a layer's experts or gates are too many for a processor of the GPU.
    pub(super) fn new(cuda: &Cuda, moe: &MoeConfig) -> Result<Option<Self>, DeviceError> {
        let names: Vec<u64> = moe.tiers.iter().map(|tier| hash_name(tier.id.as_str())).collect();
        let flat = moe.tiers.len() == 1 && moe.tiers[0].groups == 1;
        let shape = |(index, tier): (usize, &crate::tier::TierConfig)| TierShape {
            name: names[index],
            groups: tier.groups as usize,
            experts: tier.experts_per_group as usize,
            k_group: moe.k_group(index) as usize,
            k_expert: moe.k_expert(index) as usize,
        };
        let shapes: Vec<TierShape> = moe.tiers.iter().enumerate().map(shape).collect();
        let routing = &moe.routing;
        let tree =
            cuda.gates(&shapes, routing.k_tier as usize, routing.seed, routing.renormalize)?;
        if !cuda.groups_fit(moe.experts()) || !(flat || cuda.descend_fits(&tree)) {
            return Ok(None);
        }
        Ok(Some(Self {
            names: cuda.upload(&names)?,
            routes: tree.routes(),
            scores: tree.cols(),
            tree: (!flat).then_some(tree),
            moe: moe.clone(),
        }))
    }

    pub(super) fn tiers(&self) -> usize {
        self.moe.tiers.len()
    }

    /// Scores of a row.
    pub(super) fn scores(&self) -> usize {
        self.scores
    }

    pub(super) fn is_flat(&self) -> bool {
        self.tree.is_none()
    }

    /// What a flat layer chooses by.
    pub(super) fn choice<'a>(&'a self, sparse: &Sparse) -> Choose<'a> {
        Choose {
            n: sparse.gates.n(),
            k: self.routes,
            seed: sparse.seed,
            masks: None,
            tier_names: &self.names,
            level: Level::Expert as usize,
            tiers: None,
            groups: None,
            parents: None,
            renormalise: self.moe.routing.renormalize,
        }
    }

    /// Routes rows by their scores, `[rows, gates]`. `bad`: two words per row.
    pub(super) fn choose(
        &self,
        cuda: &Cuda,
        layer: usize,
        sparse: &Sparse,
        (scores, masks): (&Dev<f32>, Option<&Dev<u32>>),
        (chosen, bad): (&Chosen, &Dev<u32>),
    ) -> Result<(), DeviceError> {
        let Chosen { index, weight, count } = chosen;
        let rows = count.len();
        let Some(tree) = &self.tree else {
            return cuda.choose(scores, self.choice(sparse), index, weight, &bad.part(0, rows));
        };
        let to = Descended {
            index: index.part(0, index.len()),
            weight: weight.part(0, weight.len()),
            count: count.part(0, rows),
            bad: bad.part(0, rows),
        };
        cuda.descend(tree, layer, scores, masks, &to)
    }
}

/// Routes of rows.
pub(super) struct Chosen {
    /// `[rows, routes]`, in the layer's table.
    pub(super) index: Dev<u32>,
    /// `[rows, routes]`.
    pub(super) weight: Dev<f32>,
    /// `[rows]`: how many; not written for flat mixtures, where all have as many.
    pub(super) count: Dev<u32>,
}

/// The experts of a sparse layer, and what chooses among them.
pub(super) struct Sparse {
    /// `[scores, hidden]`: all gates, one after the other.
    pub(super) gates: DevMatrix,
    /// Of equal scores: see [`random_u64`].
    seed: u64,
    /// By GPU and by tier, each a table of all experts of the layer where others' are absent.
    pub(super) places: Vec<Vec<Experts>>,
    keys: Vec<ExpertKey>,
    /// What the tables hold.
    addresses: Vec<[u64; 3]>,
    held: Vec<Option<Arc<GatedMlp<DevMatrix>>>>,
    /// The routes of a single row of a flat mixture.
    pub(super) one: Routes,
}

impl Sparse {
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        routing: &Routing,
        layer: usize,
        gates: &PackedMatrix,
    ) -> Result<Self, DeviceError> {
        let (cuda, moe) = (gpu.cuda(), &routing.moe);
        let experts = moe.experts();
        let tier = |cuda: &Cuda, tier| {
            Ok(Experts {
                // Known when the first has come.
                dtype: DType::F32,
                math: gpu.math(),
                hidden: config.hidden,
                intermediate: moe.intermediate(tier),
                table: cuda.filled(experts, 0)?,
            })
        };
        let place = (layer as u64) << 8 | Level::Expert as u64;
        Ok(Self {
            one: cuda.routes(experts, routing.routes)?,
            seed: random_u64(moe.routing.seed, Purpose::TieBreak, place),
            gates: cuda.matrix(gates)?,
            places: gpu
                .cudas()
                .iter()
                .map(|cuda| (0..moe.tiers.len()).map(|index| tier(cuda, index)).collect())
                .collect::<Result<_, DeviceError>>()?,
            keys: (0..experts).filter_map(|flat| ExpertKey::from_flat(moe, layer, flat)).collect(),
            addresses: vec![[0; 3]; experts],
            held: vec![None; experts],
        })
    }

    /// Numbers of all experts whose tier has files.
    pub(super) fn present(&self, routing: &Routing) -> Vec<u32> {
        let here = |key: &ExpertKey| !routing.moe.tiers[key.tier as usize].absent;
        (0u32..).zip(&self.keys).filter(|(_, key)| here(key)).map(|(flat, _)| flat).collect()
    }

    /// Has these experts in the tables, for a pass that `scans` most of them or for the next tokens; false
    /// if one cannot be had now.
    pub(super) fn have(
        &mut self,
        store: &HbmStore,
        experts: impl Iterator<Item = u32>,
        scans: bool,
    ) -> Result<bool, DeviceError> {
        let tiers = self.places.first().map_or(0, Vec::len);
        let mut changed = vec![false; self.places.len() * tiers];
        let mut all = true;
        for expert in experts {
            let flat = expert as usize;
            // No route, or one that is here.
            if flat >= self.held.len() || self.held[flat].is_some() {
                continue;
            }
            let key = self.keys[flat];
            // Whoever runs it by itself says why it cannot be had.
            let weights = if scans { store.scan(key) } else { store.fetch(key) };
            let Ok(weights) = weights else {
                all = false;
                break;
            };
            let (place, tier) = (store.place_of(key), usize::from(key.tier));
            let dtype = weights.gate.dtype();
            let mut others = self.keys.iter().zip(&self.held);
            if !others.any(|(other, held)| other.tier == key.tier && held.is_some()) {
                self.places.iter_mut().for_each(|tiers| tiers[tier].dtype = dtype);
            }
            let expected = self.places[place][tier].dtype;
            if [dtype, weights.up.dtype(), weights.down.dtype()] != [expected; 3] {
                all = false;
                break;
            }
            let addresses = HbmStore::addresses(&weights);
            changed[place * tiers + tier] |= self.addresses[flat] != addresses;
            self.addresses[flat] = addresses;
            self.held[flat] = Some(weights);
        }
        for (at, _) in changed.iter().enumerate().filter(|(_, changed)| **changed) {
            let (place, tier) = (at / tiers, at % tiers);
            let is_own = |key| store.place_of(key) == place && usize::from(key.tier) == tier;
            let own = self.keys.iter().zip(&self.addresses);
            let own: Vec<_> =
                own.map(|(key, at)| if is_own(*key) { *at } else { [0; 3] }).collect();
            store.gpu().cudas()[place].put(&self.places[place][tier].table, 0, &own)?;
        }
        Ok(all)
    }

    /// Lets go of all experts, which the device has been told to compute with.
    pub(super) fn release(&mut self) {
        self.held.iter_mut().for_each(|held| *held = None);
    }

    /// Formats of the experts, as far as they are known.
    pub(super) fn formats(&self) -> impl Iterator<Item = DType> + '_ {
        self.places.iter().flatten().map(|tier| tier.dtype)
    }
}
