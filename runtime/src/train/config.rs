//! What a training run is told: model, data, phases. Plain data for TOML; an unknown key is an error.

use lite_llm_kernels::dtype::DType;
use serde::{Deserialize, Serialize};

use super::{
    Recompute,
    balance::BalanceWeights,
    optimizer::{Adafactor, AdamW, Optimizer, Sgd},
    precision::Precision,
    schedule::{Decay, Schedule},
};
use crate::{
    config::{
        AttentionConfig, ConfigError, FeedForward, LAYERS_MAX, LayerConfig, ModelConfig, MoeConfig,
        QkNorm, RopeScaling, RoutingConfig, Scoring,
    },
    tier::{Residence, TierConfig, TierId, TierSet},
};

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the run: checkpoints, metrics, and at the end the model.
    pub out: String,
    /// Seed of initial values and of the order of rows.
    #[serde(default)]
    pub seed: u64,
    /// The model to begin with.
    pub model: ModelSource,
    /// Text.
    pub data: DataConfig,
    /// How steps are computed.
    #[serde(default)]
    pub compute: ComputeConfig,
    /// When checkpoints are written.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Experts that learn nothing.
    #[serde(default)]
    pub starvation: StarvationConfig,
    /// The curriculum, in order.
    pub phase: Vec<PhaseConfig>,
}

/// The model to begin with: exactly one of the two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSource {
    /// A checkpoint to go on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// A shape, with random values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<NewModel>,
}

/// The shape of a model that begins with random values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewModel {
    /// A checkpoint whose tokenizer, vocabulary and end tokens it has, or a `tokenizer.json`.
    pub tokenizer: String,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Layers, all of them sparse.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions.
    pub context: usize,
    /// Inner width of an expert.
    pub intermediate: usize,
    /// The embedding is the output projection, too.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Norms of queries and keys.
    #[serde(default = "no_norm")]
    pub qk_norm: QkNorm,
    /// Base of rotary frequencies.
    #[serde(default = "theta")]
    pub rope_theta: f64,
    /// Tiers, groups and experts per token.
    pub routes: [u32; 3],
    /// Divide the weights of a token's routes by their sum.
    #[serde(default)]
    pub renormalize: bool,
    /// The first tiers.
    pub tiers: Vec<NewTier>,
}

fn no_norm() -> QkNorm {
    QkNorm::None
}

fn theta() -> f64 {
    10_000.0
}

/// A tier of a new model, or one that a phase adds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewTier {
    /// Its name.
    pub name: TierId,
    /// Groups in a layer.
    pub groups: u32,
    /// Experts in a group.
    pub experts: u32,
    /// Inner width of its experts; absent: the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate: Option<usize>,
    /// What it begins with: `random:SEED`, `copy:TIER` or `means`. Absent: random, by the run's seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Tiers per token from here on; absent: as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k_tier: Option<u32>,
}

/// Text, and how it becomes batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Files of text or JSONL; the last part of a name may have a `*`. Relative to the configuration.
    pub files: Vec<String>,
    /// Tokens of a row.
    pub sequence: usize,
    /// Rows of a step.
    pub batch: usize,
    /// Share of rows that are never trained on.
    #[serde(default = "held_out")]
    pub held_out: f64,
    /// Steps between two looks at the rows held out; 0: at the end of a phase only.
    #[serde(default)]
    pub evaluate_every: u64,
}

fn held_out() -> f64 {
    0.02
}

/// How steps are computed; nothing but the precision changes a bit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ComputeConfig {
    /// Number format of products. Masters are f32.
    pub precision: Precision,
    /// Rows of a micro-batch; 0: all rows of a step at once.
    pub micro_rows: usize,
    /// What is kept for the backward pass.
    pub recompute: Recompute,
}

impl Default for ComputeConfig {
    fn default() -> Self {
        Self { precision: Precision::F32, micro_rows: 0, recompute: Recompute::None }
    }
}

/// When checkpoints are written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between two; 0: at the end of a phase only.
    pub every: u64,
    /// Minutes between two, beside `every`; 0: however long it takes.
    pub minutes: u64,
    /// How many are kept.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 100, minutes: 0, keep: 2 }
    }
}

/// The guarantee against starvation (specification, 5.4).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StarvationConfig {
    /// Least expected assignments per expert and step.
    pub rho: f64,
    /// Refuse a phase that falls below; else warn.
    pub refuse: bool,
    /// An expert is starved if it got no token in so many steps.
    pub window: u64,
}

impl Default for StarvationConfig {
    fn default() -> Self {
        Self { rho: 1.0, refuse: true, window: 50 }
    }
}

/// One phase of the curriculum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseConfig {
    /// Its name, for people.
    pub name: String,
    /// A tier to add before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add: Option<NewTier>,
    /// Tiers that are used.
    #[serde(default)]
    pub tiers: TierSet,
    /// What is trained.
    pub train: TrainSelection,
    /// Steps at most.
    pub steps: u64,
    /// Learning rate.
    pub lr: f64,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// What follows.
    #[serde(default)]
    pub decay: Decay,
    /// What moves parameters.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Largest norm of the gradient; 0: any.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Weight decay leaves norms, biases and gates alone.
    #[serde(default = "yes")]
    pub decay_matrices_only: bool,
    /// It leaves parameters alone whose names hold one of these, such as `embed` or `.tiers.0.`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub no_decay: Vec<String>,
    /// Weights of the losses beside cross-entropy.
    #[serde(default)]
    pub balance: Balance,
    /// How strongly tiers are pulled toward what they were at the beginning of the phase: λ in
    /// λ/2 · |p − p₀|², of the tiers that existed before the last `add`.
    #[serde(default)]
    pub pull: f64,
    /// Stop when the loss held out has not fallen for so many looks; 0: never.
    #[serde(default)]
    pub patience: u64,
}

fn clip() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// What a phase trains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSelection {
    /// Everything but tiers and gates over them.
    #[serde(default)]
    pub backbone: bool,
    /// Names of tiers, whose experts and gates within are trained; `["all"]` is all of them.
    #[serde(default)]
    pub tiers: Vec<String>,
    /// Of the gates over tiers the rows of these tiers.
    #[serde(default)]
    pub gates: bool,
}

/// Weights of balance losses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Balance {
    /// Of the KL over tiers.
    pub tier: f64,
    /// Of the KL over groups.
    pub group: f64,
    /// Of the KL over experts.
    pub expert: f64,
    /// Of the flat classes' own loss.
    pub aux: f64,
    /// Of the router z-loss.
    pub z: f64,
}

impl From<Balance> for BalanceWeights {
    fn from(Balance { tier, group, expert, aux, z }: Balance) -> Self {
        Self { tier, group, expert, aux, z }
    }
}

/// What moves parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum OptimizerConfig {
    /// AdamW.
    Adamw(AdamW),
    /// Adafactor.
    Adafactor(Adafactor),
    /// SGD with momentum.
    Sgd(Sgd),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::Adamw(AdamW::default())
    }
}

impl OptimizerConfig {
    /// Numbers with which a step is a number.
    fn check(&self, at: &str) -> Result<(), ConfigError> {
        let below_one = |x: f64| (0.0..1.0).contains(&x);
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        let numbers = match *self {
            Self::Adamw(AdamW { beta1, beta2, eps, weight_decay }) => vec![
                ("beta1", beta1, below_one(beta1), "0 to below 1 is expected"),
                ("beta2", beta2, below_one(beta2), "0 to below 1 is expected"),
                ("eps", eps, positive(eps), "more than 0 is expected"),
                ("weight_decay", weight_decay, not_negative(weight_decay), "0 or more is expected"),
            ],
            Self::Adafactor(Adafactor {
                eps,
                scale_min,
                clip_threshold,
                decay_rate,
                weight_decay,
            }) => {
                vec![
                    ("eps", eps, positive(eps), "more than 0 is expected"),
                    ("scale_min", scale_min, not_negative(scale_min), "0 or more is expected"),
                    (
                        "clip_threshold",
                        clip_threshold,
                        positive(clip_threshold),
                        "more than 0 is expected",
                    ),
                    (
                        "decay_rate",
                        decay_rate,
                        decay_rate.is_finite() && decay_rate < 0.0,
                        "less than 0 is expected",
                    ),
                    (
                        "weight_decay",
                        weight_decay,
                        not_negative(weight_decay),
                        "0 or more is expected",
                    ),
                ]
            }
            Self::Sgd(Sgd { momentum, weight_decay }) => vec![
                ("momentum", momentum, below_one(momentum), "0 to below 1 is expected"),
                ("weight_decay", weight_decay, not_negative(weight_decay), "0 or more is expected"),
            ],
        };
        for (key, found, fits, expected) in numbers {
            require(fits, &format!("{at}.{key}"), found, expected)?;
        }
        Ok(())
    }

    /// The optimizer.
    pub fn build(&self) -> Box<dyn Optimizer> {
        match *self {
            Self::Adamw(of) => Box::new(of),
            Self::Adafactor(of) => Box::new(of),
            Self::Sgd(of) => Box::new(of),
        }
    }
}

impl PhaseConfig {
    /// Its learning rates.
    pub fn schedule(&self) -> Schedule {
        Schedule { lr: self.lr, warmup: self.warmup, steps: self.steps, decay: self.decay }
    }
}

/// A value that no run can have.
fn require(ok: bool, field: &str, found: impl ToString, expected: &str) -> Result<(), ConfigError> {
    if ok {
        return Ok(());
    }
    Err(ConfigError { field: field.into(), found: found.to_string(), expected: expected.into() })
}

impl TrainConfig {
    /// Says whether this describes a run, and if not, why.
    pub fn check(&self) -> Result<(), ConfigError> {
        const COUNT: &str = "1 to 1048576 is expected";
        let count = |n: usize| (1..=1 << 20).contains(&n);
        let one = self.model.from.is_some() != self.model.new.is_some();
        let expected = "either model.from, a checkpoint, or [model.new], a shape, is expected";
        require(one, "model", "both or neither", expected)?;
        require(!self.out.is_empty(), "out", "empty", "a folder is expected")?;
        require(!self.data.files.is_empty(), "data.files", "empty", "files of text are expected")?;
        let named = self.data.files.iter().all(|file| !file.is_empty());
        require(named, "data.files", "an empty name", "files of text are expected")?;
        require(count(self.data.sequence), "data.sequence", self.data.sequence, COUNT)?;
        require(count(self.data.batch), "data.batch", self.data.batch, COUNT)?;
        let share = (0.0..1.0).contains(&self.data.held_out);
        require(
            share,
            "data.held_out",
            self.data.held_out,
            "a share from 0 to below 1 is expected",
        )?;
        require(self.checkpoint.keep > 0, "checkpoint.keep", 0, "at least 1 is expected")?;
        let rho = self.starvation.rho.is_finite() && self.starvation.rho >= 0.0;
        require(rho, "starvation.rho", self.starvation.rho, "0 or more is expected")?;
        let window = self.starvation.window;
        require(window > 0, "starvation.window", window, "at least 1 step is expected")?;
        require(!self.phase.is_empty(), "phase", "missing", "at least one [[phase]] is expected")?;
        for (i, phase) in self.phase.iter().enumerate() {
            let at = |key: &str| format!("phase[{i}].{key}");
            require(phase.steps > 0, &at("steps"), 0, "at least 1 is expected")?;
            let numbers = [
                ("lr", phase.lr),
                ("clip", phase.clip),
                ("pull", phase.pull),
                ("balance.tier", phase.balance.tier),
                ("balance.group", phase.balance.group),
                ("balance.expert", phase.balance.expert),
                ("balance.aux", phase.balance.aux),
                ("balance.z", phase.balance.z),
            ];
            for (key, n) in numbers {
                require(n.is_finite() && n >= 0.0, &at(key), n, "0 or more is expected")?;
            }
            phase.optimizer.check(&at("optimizer"))?;
            if let Decay::Cosine { floor } | Decay::Linear { floor } | Decay::Wsd { floor, .. } =
                phase.decay
            {
                let part = (0.0..=1.0).contains(&floor);
                let expected = "a part of the learning rate, 0 to 1, is expected";
                require(part, &at("decay.floor"), floor, expected)?;
            }
            let warmup = phase.warmup <= phase.steps;
            require(warmup, &at("warmup"), phase.warmup, "no more than steps is expected")?;
            if let Decay::Wsd { steps, .. } = phase.decay {
                let fits = steps <= phase.steps - phase.warmup;
                let expected = "no more than the phase's steps behind warm-up is expected";
                require(fits, &at("decay.steps"), steps, expected)?;
            }
            let evaluated = phase.patience == 0 || self.data.evaluate_every > 0;
            let expected = "data.evaluate_every is expected with it";
            require(evaluated, &at("patience"), phase.patience, expected)?;
        }
        Ok(())
    }
}

impl NewTier {
    /// As a model's configuration has it, with its parameters still to be counted.
    pub fn config(&self) -> TierConfig {
        let mut config = TierConfig::new(self.name.clone(), self.groups, self.experts, 0);
        config.intermediate = self.intermediate;
        config.placement = Residence::Dram;
        config
    }
}

impl NewModel {
    /// The model's configuration, for a vocabulary and its end tokens.
    pub fn config(&self, like: &ModelConfig) -> Result<ModelConfig, ConfigError> {
        let [k_tier, k_group, k_expert] = self.routes;
        let layer = LayerConfig { window: None, feed_forward: FeedForward::Sparse };
        let mut config = ModelConfig {
            architecture: "hser".into(),
            vocab: like.vocab,
            hidden: self.hidden,
            context: self.context,
            norm_eps: 1e-5,
            tied_embeddings: self.tied_embeddings,
            attention: AttentionConfig {
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                rope_theta: self.rope_theta,
                rope_scaling: RopeScaling::None,
                qk_norm: self.qk_norm,
                qkv_bias: false,
                output_bias: false,
                clip_qkv: None,
            },
            // More than any model may have is refused by the check of the whole.
            layers: vec![layer; self.layers.min(LAYERS_MAX + 1)],
            moe: Some(MoeConfig {
                intermediate: self.intermediate,
                tiers: self.tiers.iter().map(NewTier::config).collect(),
                routing: RoutingConfig {
                    k_tier,
                    k_group,
                    k_expert,
                    scoring: Scoring::SoftmaxTopK,
                    renormalize: self.renormalize,
                    seed: 0,
                },
                shared: None,
            }),
            bos_token: like.bos_token,
            eos_tokens: like.eos_tokens.clone(),
        };
        config.check()?;
        let counted: Vec<u64> = config
            .moe
            .iter()
            .flat_map(|moe| &moe.tiers)
            .map(|tier| super::grow::tier_parameters(&config, tier))
            .collect();
        for (tier, parameters) in config.moe.iter_mut().flat_map(|moe| &mut moe.tiers).zip(counted)
        {
            tier.parameters = parameters;
        }
        Ok(config)
    }

    /// Format that it is stored in.
    pub fn dtype(&self) -> DType {
        super::grow::TRAINED_DTYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_that_would_not_reach_its_learning_rate_is_refused() {
        let said = |decay: &str| {
            let config: TrainConfig = serde_json::from_str(&format!(
                r#"{{
                    "out": "run", "model": {{ "from": "model" }},
                    "data": {{ "files": ["text"], "sequence": 8, "batch": 1 }},
                    "phase": [{{
                        "name": "0", "train": {{ "backbone": true }}, "steps": 10, "warmup": 4, "lr": 0.1,
                        "decay": {decay}
                    }}]
                }}"#
            ))
            .unwrap();
            config.check().err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(said(r#"{ "kind": "wsd", "steps": 6, "floor": 0.1 }"#), "");
        let error = said(r#"{ "kind": "wsd", "steps": 7 }"#);
        assert!(
            error.contains("phase[0].decay.steps is 7") && error.contains("warm-up"),
            "{error}"
        );
        for kind in ["cosine", "linear"] {
            let error = said(&format!(r#"{{ "kind": "{kind}", "floor": 7.0 }}"#));
            assert!(error.contains("phase[0].decay.floor is 7; a part"), "{error}");
        }
    }
}
