//! A tier more: in memory between two phases, or in a checkpoint by files alone.
//!
//! What exists keeps its values, and a TierSet without the new tier its bits: its gate's row over tiers is not
//! looked at.

use std::{borrow::Cow, path::Path, str::FromStr};

use lite_llm_kernels::{
    dtype::DType,
    matrix::{PackedMatrix, Source},
};

use super::{
    params::{ParamError, Params, param_of, random_values},
    stored::Stored,
};
use crate::{
    checkpoint::{
        Checkpoint, CheckpointError,
        index::Hash,
        layout::{Part, TensorSpec},
        writer::{Writer, drop_highest},
    },
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

/// The configuration of a model with a tier behind the others, and `k_tier` tiers per token if that is to
/// change; checked, and the tier's beginning with it.
pub fn with_tier_config(
    config: &ModelConfig,
    tier: &TierConfig,
    init: &Init,
    k_tier: Option<u32>,
) -> Result<ModelConfig, GrowError> {
    let mut config = config.clone();
    let Some(moe) = &mut config.moe else {
        return Err(GrowError::Init("the model has no sparse layers; a tier needs some".into()));
    };
    moe.tiers.push(tier.clone());
    moe.routing.k_tier = k_tier.unwrap_or(moe.routing.k_tier);
    config.check()?;
    Sources { old: &Nothing, init, config: &config }.check()?;
    Ok(config)
}

/// The model with a tier behind the others, and `k_tier` tiers per token if that is to change.
pub fn with_tier(
    params: &Params,
    tier: &TierConfig,
    init: &Init,
    k_tier: Option<u32>,
) -> Result<Params, GrowError> {
    let config = with_tier_config(params.config(), tier, init, k_tier)?;
    let source = Sources { old: params, init, config: &config };
    let new = source.newest();
    let mut failed = None;
    let grown = Params::new(config.clone(), |name, shape| {
        let old = || params.find(name).map(|id| params.values(id).to_vec());
        let made = if name.ends_with(".router.tiers") {
            source.tier_row(name).map(|row| [old().unwrap_or_default(), row].concat())
        } else if name.contains(&format!(".tiers.{new}.")) {
            source.values(name, shape)
        } else {
            return old();
        };
        made.map_err(|error| failed = Some(error)).ok()
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(grown?),
    }
}

/// A model that a tier is added to: its values by name.
trait Old {
    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>, GrowError>;
}

/// A model of which no value is asked.
struct Nothing;

fn missing(name: &str) -> GrowError {
    GrowError::Init(format!("the model has no parameter {name}"))
}

impl Old for Nothing {
    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>, GrowError> {
        Err(missing(name))
    }
}

impl Old for Params {
    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>, GrowError> {
        let id = self.find(name).ok_or_else(|| missing(name))?;
        Ok(Params::values(self, id).into())
    }
}

impl Old for Stored<'_> {
    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>, GrowError> {
        Ok(Stored::values(self, name)?.into())
    }
}

/// Where a new tier's values come from: the last tier of a configuration.
struct Sources<'a> {
    old: &'a dyn Old,
    init: &'a Init,
    config: &'a ModelConfig,
}

impl Sources<'_> {
    fn tiers(&self) -> &[TierConfig] {
        self.config.moe.as_ref().map_or(&[], |moe| &moe.tiers)
    }

    /// Index of the new tier.
    fn newest(&self) -> usize {
        self.tiers().len().saturating_sub(1)
    }

    fn width(&self, tier: usize) -> usize {
        self.config.moe.as_ref().map_or(0, |moe| moe.intermediate(tier))
    }

    /// Old tiers that the init takes from.
    fn from(&self) -> Vec<usize> {
        let old = 0..self.newest();
        match self.init {
            Init::Random(_) => Vec::new(),
            Init::Copy(id) => old.filter(|&t| self.tiers()[t].id == *id).collect(),
            Init::Means => old.filter(|&t| self.width(t) == self.width(self.newest())).collect(),
        }
    }

    fn check(&self) -> Result<(), GrowError> {
        let known = || {
            let names: Vec<&str> =
                self.tiers()[..self.newest()].iter().map(|tier| tier.id.as_str()).collect();
            names.join(", ")
        };
        let from = self.from();
        match self.init {
            Init::Copy(id) if from.is_empty() => Err(GrowError::Init(format!(
                "copy:{id}: the model has no such tier; it has {}",
                known()
            ))),
            Init::Copy(id) if self.width(from[0]) != self.width(self.newest()) => {
                let (there, here) = (self.width(from[0]), self.width(self.newest()));
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

    /// The mean of some rows or matrices, which come upwards, one at a time.
    fn mean<'v>(
        mut parts: impl ExactSizeIterator<Item = Result<Cow<'v, [f32]>, GrowError>>,
    ) -> Result<Vec<f32>, GrowError> {
        let count = parts.len();
        let mut sum = parts.next().transpose()?.unwrap_or_default().into_owned();
        for part in parts {
            sum.iter_mut().zip(part?.iter()).for_each(|(sum, x)| *sum += x);
        }
        if count > 1 {
            sum.iter_mut().for_each(|x| *x /= count as f32);
        }
        Ok(sum)
    }

    /// The gate row of an old expert.
    fn gate_row(
        &self,
        layer: &str,
        (tier, flat): (usize, usize),
    ) -> Result<Cow<'_, [f32]>, GrowError> {
        let per_group = self.tiers()[tier].experts_per_group as usize;
        let (group, expert) = (flat / per_group, flat % per_group);
        let name = format!("layers.{layer}.tiers.{tier}.groups.{group}.router.experts");
        let hidden = self.config.hidden;
        let gate = self.old.values(&name)?;
        let row = gate.get(expert * hidden..(expert + 1) * hidden);
        Ok(row.ok_or_else(|| missing(&name))?.to_vec().into())
    }

    /// The mean of the gate rows of new experts `from..to`.
    fn gate_of(&self, layer: &str, from: usize, to: usize) -> Result<Vec<f32>, GrowError> {
        let count = self.tiers()[self.newest()].experts() as usize;
        let of: Vec<_> = (from..to).flat_map(|i| self.run(i, count)).collect();
        Self::mean(of.into_iter().map(|expert| self.gate_row(layer, expert)))
    }

    /// The new tier's row of a gate over tiers.
    fn tier_row(&self, name: &str) -> Result<Vec<f32>, GrowError> {
        let layer = name.split('.').nth(1).unwrap_or_default();
        let count = self.tiers()[self.newest()].experts() as usize;
        match self.init {
            Init::Random(seed) => {
                let (layers, shape) = (self.config.layers.len(), [self.config.hidden]);
                Ok(random_values(&format!("{name}.{}", self.newest()), &shape, layers, *seed))
            }
            _ => self.gate_of(layer, 0, count),
        }
    }

    /// A parameter of the new tier.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, GrowError> {
        if let Init::Random(seed) = self.init {
            return Ok(random_values(name, shape, self.config.layers.len(), *seed));
        }
        let parts: Vec<&str> = name.split('.').collect();
        let part = |at: usize| parts.get(at).copied().unwrap_or_default();
        let number = |at: usize| part(at).parse::<usize>().map_err(|_| missing(name));
        let layer = part(1);
        let tier = &self.tiers()[self.newest()];
        let (per_group, count) = (tier.experts_per_group as usize, tier.experts() as usize);
        // layers.L.tiers.T.router.groups, or layers.L.tiers.T.groups.G.…
        if part(4) == "router" {
            let groups = 0..tier.groups as usize;
            let rows: Result<Vec<Vec<f32>>, _> =
                groups.map(|g| self.gate_of(layer, g * per_group, (g + 1) * per_group)).collect();
            return Ok(rows?.concat());
        }
        let group = number(5)?;
        if part(6) == "router" {
            let experts = group * per_group..(group + 1) * per_group;
            let rows: Result<Vec<Vec<f32>>, _> =
                experts.map(|e| self.gate_of(layer, e, e + 1)).collect();
            return Ok(rows?.concat());
        }
        let (expert, matrix) = (number(7)?, part(8));
        let of = |(tier, flat): (usize, usize)| {
            let per_group = self.tiers()[tier].experts_per_group as usize;
            let (group, expert) = (flat / per_group, flat % per_group);
            self.old.values(&format!(
                "layers.{layer}.tiers.{tier}.groups.{group}.experts.{expert}.{matrix}"
            ))
        };
        Self::mean(self.run(group * per_group + expert, count).into_iter().map(of))
    }
}

/// Packs a tensor of a part as a checkpoint of its format stores it.
fn pack(spec: &TensorSpec, values: &[f32]) -> Vec<u8> {
    match spec.dims()[..] {
        [n, k] if spec.is_matrix() => {
            PackedMatrix::pack(spec.dtype, n, k, Source::F32(values)).data().to_vec()
        }
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// The bytes of one tensor of a part, as a checkpoint of its format stores them.
pub(super) fn tensor_bytes(params: &Params, part: Part, spec: &TensorSpec) -> Vec<u8> {
    let (name, row) = param_of(part, &spec.name);
    let values = params.find(&name).map_or(&[][..], |id| params.values(id));
    let values = match row {
        Some(row) => &values[row * params.config().hidden..][..params.config().hidden],
        None => values,
    };
    pack(spec, values)
}

/// Adds a tier to the checkpoint in a folder, by adding files: every earlier manifest still opens. Of the model
/// only what the tier begins with is read, an expert at a time. Returns the root hash of the new manifest.
pub fn add_tier(dir: &Path, tier: TierConfig, init: &Init) -> Result<Hash, GrowError> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = with_tier_config(checkpoint.config(), &tier, init, None)?;
    let old = Stored::new(&checkpoint);
    let source = Sources { old: &old, init, config: &config };
    let mut writer = Writer::extend(dir, &[tier])?;
    let parts: Vec<Part> = Part::of_tier(&config, source.newest()).collect();
    for part in parts {
        writer.write_part(part, |spec, sink| {
            let (name, row) = param_of(part, &spec.name);
            let values = match row {
                Some(_) => source.tier_row(&name)?,
                None => source.values(&name, &spec.dims())?,
            };
            sink.write(&pack(spec, &values)).map_err(GrowError::from)
        })?;
    }
    Ok(writer.finish(&Default::default())?)
}

/// Drops the tier that was added last to the checkpoint in a folder, with its manifest and files. Returns the
/// number of the manifest that is the highest now.
pub fn drop_tier(dir: &Path, name: &str) -> Result<u64, GrowError> {
    let checkpoint = Checkpoint::open(dir)?;
    let number = checkpoint.manifest().number;
    let tiers = checkpoint.config().moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let names = |tiers: &[TierConfig]| {
        tiers.iter().map(|tier| tier.id.to_string()).collect::<Vec<_>>().join(", ")
    };
    if tiers.last().is_none_or(|tier| tier.id.as_str() != name) {
        return Err(GrowError::Init(format!(
            "{name} is not the tier that was added last; the model has {}, and only the last can be dropped",
            names(tiers)
        )));
    }
    let before = match number {
        0 | 1 => 0,
        _ => {
            let before = Checkpoint::open(format!("{}@{}", dir.display(), number - 1))?;
            before.config().moe.as_ref().map_or(0, |moe| moe.tiers.len())
        }
    };
    if before == 0 || before + 1 != tiers.len() {
        return Err(GrowError::Init(format!(
            "manifest {number} brought {}, not {name} alone; only a tier that `tier add` has added can be dropped",
            names(tiers.get(before..).unwrap_or(tiers))
        )));
    }
    drop_highest(dir, number)?;
    Ok(number - 1)
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
