//! A tier more: in memory between two phases, or in a checkpoint by files alone.
//!
//! What exists keeps its values, and a TierSet without the new tier its bits: its gate's row over tiers is not
//! looked at.

use std::{path::Path, str::FromStr};

use lite_llm_kernels::{
    dtype::DType,
    matrix::{PackedMatrix, Source},
};

use super::params::{ParamError, Params, param_of, random_values};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, index::Hash, layout::Part, writer::Writer},
    config::{ConfigError, ModelConfig},
    tier::{TierConfig, TierId},
};

/// What a new tier begins with. Written `random:SEED`, `copy:TIER` or `means`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Init {
    /// Random values.
    Random(u64),
    /// Expert i is expert i of a tier, counted around; gates alike.
    Copy(TierId),
    /// The experts of all tiers of equal width, cut in as many runs as there are new experts: each is the
    /// mean of its run; gates alike. The gates of groups and of the tier are the means of their experts'.
    Means,
}

impl FromStr for Init {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("{text:?} is no way to begin; random:SEED, copy:TIER or means is expected");
        match text.split_once(':') {
            Some(("random", seed)) => seed.parse().map(Self::Random).map_err(|_| error()),
            Some(("copy", tier)) => tier.parse().map(Self::Copy).map_err(|e| format!("{e}")),
            None if text == "means" => Ok(Self::Means),
            _ => Err(error()),
        }
    }
}

/// Why a tier was not added.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The model cannot have such a tier.
    #[error("the model with the new tier: {0}")]
    Config(#[from] ConfigError),
    /// What it is to begin with is not there.
    #[error("{0}")]
    Init(String),
    /// The checkpoint could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A defect: a tensor does not have its shape.
    #[error(transparent)]
    Param(#[from] ParamError),
}

/// The model with a tier behind the others, and `k_tier` tiers per token if that is to change.
pub fn with_tier(
    params: &Params,
    tier: &TierConfig,
    init: &Init,
    k_tier: Option<u32>,
) -> Result<Params, GrowError> {
    let mut config = (**params.config()).clone();
    let layers = config.layers.len();
    let hidden = config.hidden;
    let Some(moe) = &mut config.moe else {
        return Err(GrowError::Init("the model has no sparse layers; a tier needs some".into()));
    };
    let new = moe.tiers.len();
    moe.tiers.push(tier.clone());
    moe.routing.k_tier = k_tier.unwrap_or(moe.routing.k_tier);
    config.check()?;
    let source = Sources { params, init, new, config: &config };
    source.check()?;
    let old = |name: &str| params.find(name).map(|id| params.values(id).to_vec());
    let grown = Params::new(config.clone(), |name, shape| {
        let here = name.contains(&format!(".tiers.{new}."));
        if name.ends_with(".router.tiers") {
            let mut values = old(name)?;
            values.extend(source.tier_row(name, hidden, layers));
            return Some(values);
        }
        if here { source.values(name, shape, layers) } else { old(name) }
    })?;
    Ok(grown)
}

/// Where a new tier's values come from.
struct Sources<'a> {
    params: &'a Params,
    init: &'a Init,
    new: usize,
    config: &'a ModelConfig,
}

impl Sources<'_> {
    fn tiers(&self) -> &[TierConfig] {
        self.config.moe.as_ref().map_or(&[], |moe| &moe.tiers)
    }

    fn width(&self, tier: usize) -> usize {
        self.config.moe.as_ref().map_or(0, |moe| moe.intermediate(tier))
    }

    /// Old tiers that the init takes from.
    fn from(&self) -> Vec<usize> {
        let old = 0..self.new;
        match self.init {
            Init::Random(_) => Vec::new(),
            Init::Copy(id) => old.filter(|&t| self.tiers()[t].id == *id).collect(),
            Init::Means => old.filter(|&t| self.width(t) == self.width(self.new)).collect(),
        }
    }

    fn check(&self) -> Result<(), GrowError> {
        let known = || {
            let names: Vec<&str> =
                self.tiers()[..self.new].iter().map(|tier| tier.id.as_str()).collect();
            names.join(", ")
        };
        let from = self.from();
        match self.init {
            Init::Copy(id) if from.is_empty() => Err(GrowError::Init(format!(
                "copy:{id}: the model has no such tier; it has {}",
                known()
            ))),
            Init::Copy(id) if self.width(from[0]) != self.width(self.new) => {
                let (there, here) = (self.width(from[0]), self.width(self.new));
                Err(GrowError::Init(format!(
                    "copy:{id}: its experts are {there} wide and the new ones {here}; give both the same \
                     --intermediate, or begin with random:SEED"
                )))
            }
            Init::Means if from.is_empty() => Err(GrowError::Init(
                "means: no tier's experts are as wide as the new ones; begin with random:SEED"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    /// The experts that become new expert `i` of `count`: (tier, flat index in it).
    fn run(&self, i: usize, count: usize) -> Vec<(usize, usize)> {
        let all: Vec<(usize, usize)> = self
            .from()
            .into_iter()
            .flat_map(|t| (0..self.tiers()[t].experts() as usize).map(move |e| (t, e)))
            .collect();
        match self.init {
            Init::Means if all.len() > count => {
                all[i * all.len() / count..(i + 1) * all.len() / count].to_vec()
            }
            _ => vec![all[i % all.len()]],
        }
    }

    /// The mean of some rows or matrices, upwards.
    fn mean(parts: &[&[f32]]) -> Vec<f32> {
        let mut sum = parts[0].to_vec();
        for part in &parts[1..] {
            sum.iter_mut().zip(*part).for_each(|(sum, x)| *sum += x);
        }
        if parts.len() > 1 {
            sum.iter_mut().for_each(|x| *x /= parts.len() as f32);
        }
        sum
    }

    /// The gate row of an old expert.
    fn gate_row(&self, layer: &str, (tier, flat): (usize, usize)) -> Option<&[f32]> {
        let per_group = self.tiers()[tier].experts_per_group as usize;
        let (group, expert) = (flat / per_group, flat % per_group);
        let name = format!("layers.{layer}.tiers.{tier}.groups.{group}.router.experts");
        let hidden = self.config.hidden;
        let gate = self.params.values(self.params.find(&name)?);
        gate.get(expert * hidden..(expert + 1) * hidden)
    }

    /// The mean of the gate rows of new experts `from..to`.
    fn gate_of(&self, layer: &str, from: usize, to: usize) -> Option<Vec<f32>> {
        let count = self.tiers()[self.new].experts() as usize;
        let rows: Option<Vec<&[f32]>> = (from..to)
            .flat_map(|i| self.run(i, count))
            .map(|expert| self.gate_row(layer, expert))
            .collect();
        Some(Self::mean(&rows?))
    }

    fn tier_row(&self, name: &str, hidden: usize, layers: usize) -> Vec<f32> {
        let layer = name.split('.').nth(1).unwrap_or_default();
        let count = self.tiers()[self.new].experts() as usize;
        match self.init {
            Init::Random(seed) => {
                random_values(&format!("{name}.{}", self.new), &[hidden], layers, *seed)
            }
            _ => self.gate_of(layer, 0, count).unwrap_or_else(|| vec![0.0; hidden]),
        }
    }

    fn values(&self, name: &str, shape: &[usize], layers: usize) -> Option<Vec<f32>> {
        if let Init::Random(seed) = self.init {
            return Some(random_values(name, shape, layers, *seed));
        }
        let parts: Vec<&str> = name.split('.').collect();
        let layer = *parts.get(1)?;
        let tier = &self.tiers()[self.new];
        let (per_group, count) = (tier.experts_per_group as usize, tier.experts() as usize);
        // layers.L.tiers.T.router.groups, or layers.L.tiers.T.groups.G.…
        if parts.get(4) == Some(&"router") {
            let groups = 0..tier.groups as usize;
            let rows: Option<Vec<Vec<f32>>> =
                groups.map(|g| self.gate_of(layer, g * per_group, (g + 1) * per_group)).collect();
            return rows.map(|rows| rows.concat());
        }
        let group: usize = parts.get(5)?.parse().ok()?;
        if parts.get(6) == Some(&"router") {
            let experts = group * per_group..(group + 1) * per_group;
            let rows: Option<Vec<Vec<f32>>> =
                experts.map(|e| self.gate_of(layer, e, e + 1)).collect();
            return rows.map(|rows| rows.concat());
        }
        let expert: usize = parts.get(7)?.parse().ok()?;
        let matrix = parts.get(8)?;
        let of = |(tier, flat): (usize, usize)| {
            let per_group = self.tiers()[tier].experts_per_group as usize;
            let (group, expert) = (flat / per_group, flat % per_group);
            let name =
                format!("layers.{layer}.tiers.{tier}.groups.{group}.experts.{expert}.{matrix}");
            Some(self.params.values(self.params.find(&name)?))
        };
        let from: Option<Vec<&[f32]>> =
            self.run(group * per_group + expert, count).into_iter().map(of).collect();
        Some(Self::mean(&from?))
    }
}

/// The bytes of one tensor of a part, as a checkpoint of its format stores them.
pub(super) fn tensor_bytes(
    params: &Params,
    part: Part,
    spec: &crate::checkpoint::layout::TensorSpec,
) -> Vec<u8> {
    let (name, row) = param_of(part, &spec.name);
    let values = params.find(&name).map_or(&[][..], |id| params.values(id));
    let values = match row {
        Some(row) => &values[row * params.config().hidden..][..params.config().hidden],
        None => values,
    };
    match spec.dims()[..] {
        [n, k] if spec.is_matrix() => {
            PackedMatrix::pack(spec.dtype, n, k, Source::F32(values)).data().to_vec()
        }
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// Adds a tier to the checkpoint in a folder, by adding files: every earlier manifest still opens. Returns
/// the root hash of the new one.
pub fn add_tier(dir: &Path, tier: TierConfig, init: &Init) -> Result<Hash, GrowError> {
    let checkpoint = Checkpoint::open(dir)?;
    let text = Default::default();
    let params = with_tier(&Params::load(&checkpoint)?, &tier, init, None)?;
    let index = params.config().moe.as_ref().map_or(0, |moe| moe.tiers.len() - 1);
    let mut writer = Writer::extend(dir, &[tier])?;
    let parts: Vec<Part> = Part::of_tier(params.config(), index).collect();
    for part in parts {
        writer.write_part(part, |spec, sink| sink.write(&tensor_bytes(&params, part, spec)))?;
    }
    Ok(writer.finish(&text)?)
}

/// Parameters of all experts of a tier.
pub fn tier_parameters(config: &ModelConfig, tier: &TierConfig) -> u64 {
    let default = config.moe.as_ref().map_or(0, |moe| moe.intermediate);
    let inner = tier.intermediate.unwrap_or(default);
    let experts = u64::from(tier.groups) * u64::from(tier.experts_per_group);
    // A size that no model can have is refused when the configuration is checked.
    [3, config.hidden as u64, inner as u64, config.sparse_layers().count() as u64]
        .into_iter()
        .fold(experts, u64::saturating_mul)
}

/// The stored format of what is trained: masters are f32.
pub const TRAINED_DTYPE: DType = DType::F32;
