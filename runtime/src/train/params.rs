//! The parameters that are trained: f32 masters, row-major, by name.
//!
//! Names are those of the checkpoint's layout with the place in front: `embed`, `layers.L.attention.q`,
//! `layers.L.router.tiers` `[tiers, hidden]`, `layers.L.tiers.T.router.groups`,
//! `layers.L.tiers.T.groups.G.router.experts`, `layers.L.tiers.T.groups.G.experts.E.{gate,up,down}`.
//! T and G are indices. The order of parameters, everywhere, is that of their sorted names.
//!
//! A rank of several ([`super::spread`]) has the values of the experts that it owns, and of all else.
//!
//! Invariant: a packed form, made when a product first asks for it, is that of the values: who
//! changes values drops it.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use lite_llm_kernels::{
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::elementwise::to_bf16,
};

use super::{idle::Behind, precision::Precision};
use crate::{
    checkpoint::{
        Checkpoint, CheckpointError,
        layout::{EXPERT_ROUTER, GROUP_ROUTER, Part, TIER_ROUTER},
    },
    config::{FeedForward, ModelConfig},
    expert::ExpertKey,
    random::{Purpose, hash_name, random_u64},
};

/// Index of a parameter in the order of sorted names.
pub type ParamId = usize;

/// One tensor.
#[derive(Debug)]
pub struct Param {
    /// Its name.
    pub name: String,
    /// `[n]` or `[outputs, inputs]`.
    pub shape: Vec<usize>,
    values: Vec<f32>,
    /// Steps that were put off.
    behind: Option<Box<Behind>>,
    packed: OnceLock<PackedMatrix>,
    /// The values in bf16, widened.
    rounded: OnceLock<Vec<f32>>,
}

impl Clone for Param {
    /// A copy of what it is now: steps that are put off later are not the copy's.
    fn clone(&self) -> Self {
        Self::new(self.name.clone(), self.shape.clone(), self.values().to_vec())
    }
}

impl Param {
    /// A parameter, whose values may be with somebody else.
    fn new(name: String, shape: Vec<usize>, values: Vec<f32>) -> Self {
        let (packed, rounded) = (OnceLock::new(), OnceLock::new());
        Self { name, shape, values, behind: None, packed, rounded }
    }

    /// Drops what was made of the values.
    fn changed(&mut self) {
        self.packed = OnceLock::new();
        self.rounded = OnceLock::new();
    }

    /// The values, row-major.
    pub fn values(&self) -> &[f32] {
        match &self.behind {
            Some(behind) => &behind.now(&self.shape, &self.values).0,
            None => &self.values,
        }
    }

    /// States of its optimizer, if steps were put off.
    pub(super) fn states_behind(&self) -> Option<&[Vec<f32>]> {
        let behind = self.behind.as_ref()?;
        Some(&behind.now(&self.shape, &self.values).1)
    }

    /// Whether steps were put off, and nobody has looked since.
    pub(super) fn is_behind(&self) -> bool {
        self.behind.as_ref().is_some_and(|behind| !behind.is_seen())
    }

    /// Puts steps off from now on.
    pub(super) fn put_off(&mut self, behind: Behind) {
        debug_assert!(self.behind.is_none(), "what is behind is caught up first");
        self.changed();
        self.behind = Some(Box::new(behind));
    }

    /// Catches up for good, and gives the states of its optimizer back, if steps were put off.
    pub(super) fn catch_up(&mut self) -> Option<Vec<Vec<f32>>> {
        let (values, states) = self.behind.take()?.settle(&self.shape, &self.values);
        self.values = values;
        Some(states)
    }

    /// Values of one row; of a vector each is a row.
    pub fn row_len(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Elements that it has by its shape.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements by its shape.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the values out: they are with somebody else.
    pub(super) fn take_values(&mut self) -> Vec<f32> {
        self.changed();
        self.behind = None;
        std::mem::take(&mut self.values)
    }

    /// Puts values in; says whether their number is that of the shape.
    pub(super) fn put_values(&mut self, values: Vec<f32>) -> bool {
        self.changed();
        let fits = values.len() == self.len();
        if fits {
            self.behind = None;
            self.values = values;
        }
        fits
    }

    /// The values, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        debug_assert!(self.behind.is_none(), "what is behind is caught up first");
        self.changed();
        &mut self.values
    }
}

/// Matrices of a gated network.
#[derive(Debug, Clone, Copy)]
pub struct MlpIds {
    /// `[inner, hidden]`.
    pub gate: ParamId,
    /// `[inner, hidden]`.
    pub up: ParamId,
    /// `[hidden, inner]`.
    pub down: ParamId,
}

/// A linear map.
#[derive(Debug, Clone, Copy)]
pub struct LinearIds {
    /// `[outputs, inputs]`.
    pub weight: ParamId,
    /// `[outputs]`.
    pub bias: Option<ParamId>,
}

/// A group of experts.
#[derive(Debug, Clone)]
pub struct GroupIds {
    /// `[experts, hidden]`.
    pub gate: ParamId,
    /// In their order.
    pub experts: Vec<MlpIds>,
}

/// A tier in one layer.
#[derive(Debug, Clone)]
pub struct TierIds {
    /// `[groups, hidden]`, where there is a choice.
    pub groups: Option<ParamId>,
    /// In their order.
    pub each: Vec<GroupIds>,
}

/// The second half of a layer.
#[derive(Debug, Clone)]
pub enum FeedForwardIds {
    /// One network.
    Dense(MlpIds),
    /// Experts.
    Sparse {
        /// `[tiers, hidden]`.
        tiers_gate: ParamId,
        /// In their order.
        tiers: Vec<TierIds>,
        /// The shared expert and its gate `[1, hidden]`.
        shared: Option<(MlpIds, Option<ParamId>)>,
    },
}

/// One layer.
#[derive(Debug, Clone)]
pub struct LayerIds {
    /// Norm before attention.
    pub attention_norm: ParamId,
    /// Projections to queries, keys and values.
    pub qkv: [LinearIds; 3],
    /// Norms of queries and keys.
    pub qk_norm: Option<[ParamId; 2]>,
    /// Output of attention.
    pub o: LinearIds,
    /// Norm before the feed-forward part.
    pub ffn_norm: ParamId,
    /// The feed-forward part.
    pub feed_forward: FeedForwardIds,
}

/// Where everything is.
#[derive(Debug, Clone)]
pub struct ModelIds {
    /// `[vocab, hidden]`.
    pub embed: ParamId,
    /// `[vocab, hidden]`; `None` if the embedding serves.
    pub head: Option<ParamId>,
    /// Final norm.
    pub norm: ParamId,
    /// In their order.
    pub layers: Vec<LayerIds>,
}

/// All parameters of a model.
#[derive(Debug, Clone)]
pub struct Params {
    config: Arc<ModelConfig>,
    list: Vec<Param>,
    ids: Arc<ModelIds>,
    precision: Precision,
}

/// A set of tensors that is not the model's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parameter {name}: {found}; {expected} by the model's configuration")]
pub struct ParamError {
    /// Which parameter.
    pub name: String,
    /// What was found.
    pub found: String,
    /// What was expected.
    pub expected: String,
}

/// The parameter that a tensor of a part of a checkpoint belongs to, and its row there if it is one
/// row of it.
pub(crate) fn param_of(part: Part, tensor: &str) -> (String, Option<usize>) {
    match part {
        Part::Model | Part::Layer(_) => (tensor.into(), None),
        Part::TierRouter { tier, layer } if tensor == TIER_ROUTER => {
            (format!("layers.{layer}.router.tiers"), Some(tier))
        }
        Part::TierRouter { tier, layer } => (format!("layers.{layer}.tiers.{tier}.{tensor}"), None),
        Part::Group { tier, layer, group } => {
            (format!("layers.{layer}.tiers.{tier}.groups.{group}.{tensor}"), None)
        }
    }
}

/// Names and shapes of a model's parameters.
pub fn shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    for part in Part::all(config) {
        for spec in part.tensors(config, DType::F32) {
            let (name, row) = param_of(part, &spec.name);
            let tiers = config.moe.as_ref().map_or(0, |moe| moe.tiers.len());
            let shape = if row.is_some() { vec![tiers, config.hidden] } else { spec.dims() };
            shapes.insert(name, shape);
        }
    }
    shapes
}

impl Params {
    /// The parameters of a checked configuration, with values by name.
    pub fn new(
        config: ModelConfig,
        mut value: impl FnMut(&str, &[usize]) -> Option<Vec<f32>>,
    ) -> Result<Self, ParamError> {
        let mut list = Vec::new();
        for (name, shape) in shapes(&config) {
            let size: usize = shape.iter().product();
            let values = value(&name, &shape);
            let error = |found: String| ParamError {
                name: name.clone(),
                found,
                expected: format!("shape {shape:?} is expected"),
            };
            let values = values.ok_or_else(|| error("it is missing".into()))?;
            if values.len() != size {
                return Err(error(format!("{} values", values.len())));
            }
            list.push(Param::new(name, shape, values));
        }
        let ids = Arc::new(find_ids(&config, &list));
        Ok(Self { config: Arc::new(config), list, ids, precision: Precision::F32 })
    }

    /// The parameters of a checked configuration, without their values.
    pub(super) fn hollow(config: ModelConfig) -> Self {
        let param = |(name, shape)| Param::new(name, shape, Vec::new());
        let list: Vec<Param> = shapes(&config).into_iter().map(param).collect();
        let ids = Arc::new(find_ids(&config, &list));
        Self { config: Arc::new(config), list, ids, precision: Precision::F32 }
    }

    /// Random parameters: norms are 1, biases 0, all else is nearly normal with a standard deviation of
    /// 0.02 (of what is added to the residual stream 0.02 / √(2 · layers), as GPT-2 has it); each value a
    /// function of (seed, name, index).
    ///
    /// # Panics
    /// Never: shapes are made and asked for by the same list.
    pub fn random(config: ModelConfig, seed: u64) -> Self {
        let layers = config.layers.len();
        Self::new(config, |name, shape| Some(random_values(name, shape, layers, seed)))
            .expect("values are made by the shapes asked for")
    }

    /// All parameters of a checkpoint, widened exactly.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let mut config = checkpoint.config().clone();
        // Masters are f32, also of a tier that was packed in a format of its own.
        let tiers = config.moe.as_mut().map_or(&mut [][..], |moe| &mut moe.tiers);
        tiers.iter_mut().for_each(|tier| tier.dtype = None);
        let tiers = config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        if let Some(tier) = tiers.iter().find(|tier| tier.absent) {
            let location = checkpoint.location();
            let what = format!("files of tier {}: training needs every tier", tier.id);
            return Err(CheckpointError::Absent { location, what });
        }
        let mut values: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for part in Part::all(&config) {
            load_part(checkpoint, part, &mut values)?;
        }
        let location = checkpoint.location();
        Self::new(config, |name, _| values.remove(name))
            .map_err(|error| CheckpointError::Absent { location, what: error.to_string() })
    }

    /// The model.
    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.config
    }

    /// Where everything is.
    pub fn ids(&self) -> &Arc<ModelIds> {
        &self.ids
    }

    /// All parameters, by sorted names.
    pub fn list(&self) -> &[Param] {
        &self.list
    }

    /// All parameters, to be changed.
    pub fn list_mut(&mut self) -> &mut [Param] {
        &mut self.list
    }

    /// A parameter by its name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.list.binary_search_by(|param| param.name.as_str().cmp(name)).ok()
    }

    /// The values of a parameter.
    pub fn values(&self, id: ParamId) -> &[f32] {
        self.list[id].values()
    }

    /// The number format of products from now on.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// The number format of products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// A matrix as products read it, row-major; gates are read as they are.
    pub fn weight(&self, id: ParamId) -> &[f32] {
        let param = &self.list[id];
        match self.precision {
            Precision::F32 => param.values(),
            Precision::Bf16 => {
                param.rounded.get_or_init(|| param.values().iter().map(|x| to_bf16(*x)).collect())
            }
        }
    }

    /// The matrix of a gate as forward products read it.
    pub fn gate(&self, id: ParamId) -> &PackedMatrix {
        let Param { shape, packed, .. } = &self.list[id];
        packed.get_or_init(|| {
            let (n, k) = (shape[0], shape.get(1).copied().unwrap_or(1));
            PackedMatrix::pack(DType::F32, n, k, Source::F32(self.values(id)))
        })
    }
}

fn load_part(
    checkpoint: &Checkpoint,
    part: Part,
    values: &mut BTreeMap<String, Vec<f32>>,
) -> Result<(), CheckpointError> {
    let config = checkpoint.config();
    if let Part::Group { tier, layer, group } = part {
        let name = |tensor: &str| param_of(part, tensor).0;
        let gate = checkpoint.expert_router(layer, tier, group)?;
        values.insert(name(EXPERT_ROUTER), row_major(&gate));
        let experts = config.moe.as_ref().map_or(0, |moe| moe.tiers[tier].experts_per_group);
        for expert in 0..experts {
            let key = ExpertKey { layer: layer as u16, tier: tier as u16, group, expert };
            let mlp = checkpoint.expert(key)?;
            for (what, matrix) in [("gate", &mlp.gate), ("up", &mlp.up), ("down", &mlp.down)] {
                values.insert(name(&format!("experts.{expert}.{what}")), row_major(matrix));
            }
        }
        return Ok(());
    }
    for spec in part.tensors(config, checkpoint.dtype()) {
        let (name, row) = param_of(part, &spec.name);
        let found = match part {
            Part::TierRouter { tier, layer } if spec.name == GROUP_ROUTER => {
                checkpoint.group_router(layer, tier)?.map_or_else(Vec::new, |m| row_major(&m))
            }
            Part::TierRouter { tier, layer } => checkpoint.tier_router(layer, tier)?,
            _ if spec.is_matrix() => row_major(&checkpoint.dense_matrix(&spec.name)?),
            _ => checkpoint.dense_vector(&spec.name)?,
        };
        match row {
            None => drop(values.insert(name, found)),
            // Tiers come in their order, each with its row.
            Some(_) => values.entry(name).or_default().extend(found),
        }
    }
    Ok(())
}

/// The values of packed weights, row by row.
pub fn row_major(matrix: &PackedMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.n() * matrix.k()];
    for (j, row) in values.chunks_exact_mut(matrix.k().max(1)).enumerate() {
        matrix.row(j, row);
    }
    values
}

/// Initial values of one parameter: see [`Params::random`].
pub fn random_values(name: &str, shape: &[usize], layers: usize, seed: u64) -> Vec<f32> {
    let size: usize = shape.iter().product();
    let last = name.rsplit('.').next().unwrap_or(name);
    if last.ends_with("norm") {
        return vec![1.0; size];
    }
    if last.ends_with("_bias") {
        return vec![0.0; size];
    }
    let into_residual = last == "down" || name.ends_with("attention.o");
    let deviation = match into_residual {
        true => 0.02 / ((2 * layers.max(1)) as f32).sqrt(),
        false => 0.02,
    };
    let stream = seed ^ hash_name(name);
    // The sum of four uniform 16-bit numbers has mean 2 · 65535 and variance 4 · (2^32 − 1) / 12.
    let value = |index: u64| {
        let bits = random_u64(stream, Purpose::Weights, index);
        let sum = [0, 16, 32, 48].iter().map(|shift| (bits >> shift & 0xffff) as i32).sum::<i32>();
        (sum - 131_070) as f32 * (deviation / 37_837.227)
    };
    (0..size as u64).map(value).collect()
}

fn find_ids(config: &ModelConfig, list: &[Param]) -> ModelIds {
    let find = |name: &str| list.binary_search_by(|param| param.name.as_str().cmp(name)).ok();
    let id = |name: String| find(&name).expect("the layout has the parameters of its own model");
    let mlp = |at: &str| MlpIds {
        gate: id(format!("{at}.gate")),
        up: id(format!("{at}.up")),
        down: id(format!("{at}.down")),
    };
    let layer = |l: usize| {
        let at = |rest: &str| format!("layers.{l}.{rest}");
        let linear = |what: &str| LinearIds {
            weight: id(at(&format!("attention.{what}"))),
            bias: find(&at(&format!("attention.{what}_bias"))),
        };
        let norm = |what: &str| find(&at(&format!("attention.{what}_norm")));
        let feed_forward = match (config.layers[l].feed_forward, &config.moe) {
            (FeedForward::Sparse, Some(moe)) => {
                let group = |t: usize, g: u32| {
                    let at = at(&format!("tiers.{t}.groups.{g}"));
                    let experts = 0..moe.tiers[t].experts_per_group;
                    GroupIds {
                        gate: id(format!("{at}.{EXPERT_ROUTER}")),
                        experts: experts.map(|e| mlp(&format!("{at}.experts.{e}"))).collect(),
                    }
                };
                let tier = |t: usize| TierIds {
                    groups: find(&at(&format!("tiers.{t}.{GROUP_ROUTER}"))),
                    each: (0..moe.tiers[t].groups).map(|g| group(t, g)).collect(),
                };
                FeedForwardIds::Sparse {
                    tiers_gate: id(at("router.tiers")),
                    tiers: (0..moe.tiers.len()).map(tier).collect(),
                    shared: moe.shared.map(|_| (mlp(&at("shared")), find(&at("shared.router")))),
                }
            }
            _ => FeedForwardIds::Dense(mlp(&at("ffn"))),
        };
        LayerIds {
            attention_norm: id(at("attention_norm")),
            qkv: ["q", "k", "v"].map(linear),
            qk_norm: norm("q").zip(norm("k")).map(|(q, k)| [q, k]),
            o: linear("o"),
            ffn_norm: id(at("ffn_norm")),
            feed_forward,
        }
    };
    ModelIds {
        embed: id("embed".into()),
        head: find("head"),
        norm: id("norm".into()),
        layers: (0..config.layers.len()).map(layer).collect(),
    }
}
