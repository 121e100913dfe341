//! What a model is: sizes, attention, feed-forward layers, tiers and routing.
//!
//! [`ModelConfig`] is plain data as it stands in a manifest; [`ModelConfig::check`] is the one
//! place that decides whether it describes a model that can run. Code past that point relies on
//! a checked configuration.

use serde::{Deserialize, Serialize};

use crate::{expert::ExpertKey, tier::TierConfig};

/// Most layers. Bounds like this one keep a hostile manifest from making anybody allocate before its
/// files were seen to be as large.
pub const LAYERS_MAX: usize = 4096;
/// Most tiers.
pub const TIERS_MAX: usize = 256;
/// Experts of one tier in one layer are fewer than this.
pub const TIER_EXPERTS_MAX: u64 = 1 << 32;
/// Widest hidden state: rows of batches between nodes are no wider.
pub const HIDDEN_MAX: usize = 1 << 16;
/// Widest row otherwise: queries, and the inner widths of feed-forward networks.
pub const WIDTH_MAX: usize = 1 << 20;
/// Most positions of a context: up to here f32, in which angles are computed, holds each exactly.
pub const CONTEXT_MAX: usize = 1 << 24;

/// A transformer whose feed-forward layers are dense or mixtures of experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Class that the model was imported from, for people: `qwen3_moe`, …
    pub architecture: String,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Positions that the model was made for.
    pub context: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    /// The output projection is the embedding table.
    pub tied_embeddings: bool,
    /// Self-attention, alike in every layer but for its window.
    pub attention: AttentionConfig,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
    /// Experts of the sparse layers; `None` if every layer is dense.
    pub moe: Option<MoeConfig>,
    /// Token that begins a text, if the model has one.
    pub bos_token: Option<u32>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Self-attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How positions are stretched beyond the trained context.
    pub rope_scaling: RopeScaling,
    /// RMSNorm on queries and keys.
    pub qk_norm: QkNorm,
    /// q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// Limit of the absolute value of every element of q, k and v.
    pub clip_qkv: Option<f32>,
}

/// Where queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Nowhere.
    None,
    /// Over the whole projection, before it is cut into heads (OLMoE).
    Whole,
    /// Over each head (Qwen3).
    PerHead,
}

/// How rotary positions are stretched; [`crate::rope`] has the formulas. `original` is the context
/// of the training before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// A greater base, by how far the served context goes beyond the original one (NTK-aware).
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// Positions up to which nothing changes.
        original: usize,
    },
    /// Low frequencies divided by a factor, high ones kept, a ramp between (YaRN).
    Yarn {
        /// The factor.
        factor: f64,
        /// Positions in which turns are counted.
        original: usize,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
        /// Frequencies with more turns than this are kept.
        beta_fast: f64,
        /// Those with fewer turns are divided.
        beta_slow: f64,
        /// The ramp begins and ends at whole pairs.
        truncate: bool,
    },
    /// Low frequencies divided by a factor, high ones kept, a blend between (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Frequencies with fewer turns than this are divided.
        low_freq_factor: f64,
        /// Those with more turns are kept.
        high_freq_factor: f64,
        /// Positions in which turns are counted.
        original: usize,
    },
    /// Each frequency divided by a factor of its own, of one list or another (LongRoPE).
    LongRope {
        /// Factors for served contexts up to the original one.
        short: Vec<f64>,
        /// Factors for longer ones.
        long: Vec<f64>,
        /// Which contexts are long.
        original: usize,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
    },
}

/// What differs from layer to layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Attention sees this many positions, its own included; `None`: all before it.
    pub window: Option<u32>,
    /// What follows attention.
    pub feed_forward: FeedForward,
}

/// The second half of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum FeedForward {
    /// One gated network for every token.
    Dense {
        /// Its inner width.
        intermediate: usize,
    },
    /// Experts chosen per token, as [`ModelConfig::moe`] says.
    Sparse,
}

/// The experts of every sparse layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Inner width of an expert, in tiers that do not say theirs.
    pub intermediate: usize,
    /// Tiers in order of capacity.
    pub tiers: Vec<TierConfig>,
    /// How experts are chosen and weighted.
    pub routing: RoutingConfig,
    /// An expert that sees every token.
    pub shared: Option<SharedExpertConfig>,
}

/// An expert that sees every token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpertConfig {
    /// Its inner width.
    pub intermediate: usize,
    /// Its output is multiplied by the sigmoid of a gate of its own.
    pub gated: bool,
}

/// How many are chosen at each level of hierarchical routing, and what weighs them. A tier may
/// have its own `k_group` and `k_expert`: ask [`MoeConfig::k_group`] and [`MoeConfig::k_expert`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingConfig {
    /// Tiers per token.
    pub k_tier: u32,
    /// Groups per chosen tier.
    pub k_group: u32,
    /// Experts per chosen group.
    pub k_expert: u32,
    /// How scores become choices and weights.
    pub scoring: Scoring,
    /// Divide the weights of a token's routes by their sum.
    pub renormalize: bool,
    /// Orders candidates of equal score, by hash.
    pub seed: u64,
}

/// How scores become choices and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Softmax over all candidates of a level, then its top k.
    SoftmaxTopK,
}

impl MoeConfig {
    /// That of a model without sparse layers.
    pub fn without_experts() -> Self {
        let scoring = Scoring::SoftmaxTopK;
        let (k_tier, k_group, k_expert) = (0, 0, 0);
        let routing =
            RoutingConfig { k_tier, k_group, k_expert, scoring, renormalize: false, seed: 0 };
        Self { intermediate: 0, tiers: Vec::new(), routing, shared: None }
    }

    /// Inner width of a tier's experts.
    pub fn intermediate(&self, tier: usize) -> usize {
        self.tiers[tier].intermediate.unwrap_or(self.intermediate)
    }

    /// Groups that a token which chose the tier goes to.
    pub fn k_group(&self, tier: usize) -> u32 {
        self.tiers[tier].k_group.unwrap_or(self.routing.k_group)
    }

    /// Experts that a token goes to in each chosen group of the tier.
    pub fn k_expert(&self, tier: usize) -> u32 {
        self.tiers[tier].k_expert.unwrap_or(self.routing.k_expert)
    }

    /// Upper bound over a token's choice of `k_tier` tiers: the sum of the `k_tier` largest values of
    /// `of(tier)`.
    pub fn largest_choice(&self, of: impl Fn(usize) -> u64) -> u64 {
        let mut each: Vec<u64> = (0..self.tiers.len()).map(of).collect();
        each.sort_unstable_by(|a, b| b.cmp(a));
        each.iter().take(self.routing.k_tier as usize).fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Routes of a token within a tier that it chose.
    pub fn routes_of(&self, tier: usize) -> u64 {
        u64::from(self.k_group(tier)) * u64::from(self.k_expert(tier))
    }

    /// The most routes that a token can have in one layer, with tiers for which `allows` holds.
    pub fn routes_max(&self, allows: impl Fn(usize) -> bool) -> usize {
        let routes = |tier| if allows(tier) { self.routes_of(tier) } else { 0 };
        usize::try_from(self.largest_choice(routes)).unwrap_or(usize::MAX)
    }

    /// Experts in one layer, over all tiers.
    pub fn experts(&self) -> usize {
        self.tiers.iter().map(|t| t.experts() as usize).sum()
    }
}

/// A configuration that describes no model that can run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {found}; {expected}")]
pub struct ConfigError {
    /// Dotted path of the value.
    pub field: String,
    /// The value.
    pub found: String,
    /// What would be right.
    pub expected: String,
}

fn require(ok: bool, field: &str, found: impl ToString, expected: &str) -> Result<(), ConfigError> {
    if ok {
        return Ok(());
    }
    Err(ConfigError { field: field.into(), found: found.to_string(), expected: expected.into() })
}

impl ModelConfig {
    /// Indices of the sparse layers, upwards.
    pub fn sparse_layers(&self) -> impl Iterator<Item = usize> + '_ {
        let sparse = |l: &LayerConfig| l.feed_forward == FeedForward::Sparse;
        self.layers.iter().enumerate().filter(move |(_, l)| sparse(l)).map(|(i, _)| i)
    }

    /// Every expert whose tier is there: layers, tiers, groups, experts upwards.
    pub fn expert_keys(&self) -> impl Iterator<Item = ExpertKey> + '_ {
        // What an absent tier claims to hold is bounded by no file.
        let tiers = self.moe.iter().flat_map(|moe| (0u16..).zip(&moe.tiers));
        let here: Vec<_> = tiers.filter(|(_, tier)| !tier.absent).collect();
        self.sparse_layers().flat_map(move |layer| {
            let of_tier = move |(tier, config): (u16, &TierConfig)| {
                let (groups, experts) = (config.groups, config.experts_per_group);
                let of_group = move |group| {
                    (0..experts).map(move |expert| ExpertKey {
                        layer: layer as u16,
                        tier,
                        group,
                        expert,
                    })
                };
                (0..groups).flat_map(of_group)
            };
            here.clone().into_iter().flat_map(of_tier)
        })
    }

    /// Whether the model has this tier, and its files are there.
    pub fn has_tier(&self, tier: usize) -> bool {
        let tiers = self.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        tiers.get(tier).is_some_and(|tier| !tier.absent)
    }

    /// Parameters of one expert of a tier.
    pub fn expert_parameters(&self, tier: usize) -> u64 {
        self.moe.as_ref().map_or(0, |moe| 3 * (self.hidden * moe.intermediate(tier)) as u64)
    }

    /// The model as it is served with a context of its users' choice; by default its own.
    ///
    /// From there on `context` is the served one: it bounds prompt and answer, and it fixes the
    /// rotary table (rule 4 of the determinism contract), so all nodes of a cluster must use
    /// the same.
    pub fn served(&self, context: Option<usize>) -> Result<Self, ConfigError> {
        let context = context.unwrap_or(self.context);
        let most = self.context_max();
        let expected = match &self.attention.rope_scaling {
            RopeScaling::Dynamic { .. } => format!("1 to {most} is expected"),
            RopeScaling::None => format!(
                "1 to {most} is expected, the model's own; beyond that it needs rope scaling: \
                 import it with rope_scaling (yarn, dynamic, ...) in its config.json"
            ),
            _ => format!("1 to {most} is expected, what the model's rope scaling is made for"),
        };
        require((1..=most).contains(&context), "--context", context, &expected)?;
        Ok(Self { context, ..self.clone() })
    }

    /// The longest context that the model's rotary positions are made for. What a published
    /// context counts in differs: of YaRN's it may be that before stretching.
    fn context_max(&self) -> usize {
        let stretched = |context: usize, factor: f64| (context as f64 * factor) as usize;
        let most = match self.attention.rope_scaling {
            RopeScaling::Linear { factor } => stretched(self.context, factor),
            RopeScaling::Yarn { factor, original, .. } => stretched(original, factor),
            RopeScaling::Dynamic { .. } => CONTEXT_MAX,
            RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::LongRope { .. } => 0,
        };
        most.clamp(self.context, CONTEXT_MAX)
    }

    /// Says whether this describes a model that can run, and if not, why.
    pub fn check(&self) -> Result<(), ConfigError> {
        let hidden = (1..=HIDDEN_MAX).contains(&self.hidden);
        require(hidden, "hidden", self.hidden, "1 to 65536 is expected")?;
        let width = |n: usize| (1..=WIDTH_MAX).contains(&n);
        const WIDTH: &str = "1 to 1048576 is expected";
        require((1..=1 << 24).contains(&self.vocab), "vocab", self.vocab, "1 to 2^24 is expected")?;
        require(
            (1..=CONTEXT_MAX).contains(&self.context),
            "context",
            self.context,
            "1 to 2^24 is expected",
        )?;
        require(
            (1..=LAYERS_MAX).contains(&self.layers.len()),
            "layers",
            self.layers.len(),
            "1 to 4096 layers are expected",
        )?;
        // A row of zeros has no norm without it.
        let eps_ok = self.norm_eps.is_finite() && self.norm_eps > 0.0;
        require(eps_ok, "norm_eps", self.norm_eps, "a positive number is expected")?;
        self.attention.check()?;
        for (i, layer) in self.layers.iter().enumerate() {
            require(
                layer.window != Some(0),
                &format!("layers.{i}.window"),
                0,
                "at least 1 is expected, or null for none",
            )?;
            match layer.feed_forward {
                FeedForward::Dense { intermediate } => require(
                    width(intermediate),
                    &format!("layers.{i}.feed_forward.intermediate"),
                    intermediate,
                    WIDTH,
                )?,
                FeedForward::Sparse => require(
                    self.moe.is_some(),
                    "moe",
                    "null",
                    "a configuration of experts is expected, for there are sparse layers",
                )?,
            }
        }
        if let Some(moe) = &self.moe {
            moe.check()?;
        }
        for (name, id) in self
            .bos_token
            .iter()
            .map(|t| ("bos_token", *t))
            .chain(self.eos_tokens.iter().map(|t| ("eos_tokens", *t)))
        {
            require((id as usize) < self.vocab, name, id, "a token of the vocabulary is expected")?;
        }
        Ok(())
    }
}

impl AttentionConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let heads_ok = (1..=65_536).contains(&self.heads);
        require(heads_ok, "attention.heads", self.heads, "1 to 65536 is expected")?;
        require(
            self.kv_heads >= 1 && self.heads.is_multiple_of(self.kv_heads.max(1)),
            "attention.kv_heads",
            self.kv_heads,
            "a divisor of the number of heads is expected",
        )?;
        require(
            (2..=1024).contains(&self.head_dim) && self.head_dim.is_multiple_of(2),
            "attention.head_dim",
            self.head_dim,
            "an even number from 2 to 1024 is expected",
        )?;
        let queries = self.heads * self.head_dim;
        let expected = "heads × head_dim of at most 1048576 is expected";
        require(queries <= WIDTH_MAX, "attention.heads", self.heads, expected)?;
        // Angles are computed in f32.
        let theta_ok = (1e-9..=1e30).contains(&self.rope_theta);
        require(
            theta_ok,
            "attention.rope_theta",
            self.rope_theta,
            "a positive number is expected",
        )?;
        if matches!(self.rope_scaling, RopeScaling::Yarn { .. }) {
            // It divides by the logarithm.
            let (theta, expected) = (self.rope_theta, "more than 1 is expected by yarn");
            require(theta > 1.0, "attention.rope_theta", theta, expected)?;
        }
        self.rope_scaling.check(self.head_dim)?;
        if let Some(limit) = self.clip_qkv {
            let ok = limit.is_finite() && limit > 0.0;
            require(ok, "attention.clip_qkv", limit, "a positive number is expected")?;
        }
        Ok(())
    }
}

impl RopeScaling {
    fn check(&self, head_dim: usize) -> Result<(), ConfigError> {
        const AT: &str = "attention.rope_scaling";
        let positive = |key: &str, n: f64| {
            // Both it and its inverse are to be numbers in f32, in which angles are computed.
            let ok = (1e-9..=1e9).contains(&n);
            require(ok, &format!("{AT}.{key}"), n, "a positive number up to 1e9 is expected")
        };
        let context = |n: usize| {
            let ok = (1..=CONTEXT_MAX).contains(&n);
            require(ok, &format!("{AT}.original"), n, "1 to 2^24 is expected")
        };
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("factor", *factor),
            Self::Dynamic { factor, original } => {
                // The base grows with a power of head_dim / (head_dim - 2).
                let ok = factor.is_finite() && *factor >= 1.0;
                require(ok, &format!("{AT}.factor"), factor, "at least 1 is expected")?;
                let expected = "at least 4 is expected by dynamic rope scaling";
                require(head_dim >= 4, "attention.head_dim", head_dim, expected)?;
                context(*original)
            }
            Self::Yarn { factor, original, attention_factor, beta_fast, beta_slow, .. } => {
                for (key, n) in [
                    ("factor", factor),
                    ("attention_factor", attention_factor),
                    ("beta_fast", beta_fast),
                    ("beta_slow", beta_slow),
                ] {
                    positive(key, *n)?;
                }
                let expected = format!("at least beta_slow, {beta_slow}, is expected");
                let ok = beta_fast >= beta_slow;
                require(ok, &format!("{AT}.beta_fast"), beta_fast, &expected)?;
                context(*original)
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                let expected = format!("more than low_freq_factor, {low_freq_factor}, is expected");
                let ok = high_freq_factor > low_freq_factor;
                require(ok, &format!("{AT}.high_freq_factor"), high_freq_factor, &expected)?;
                context(*original)
            }
            Self::LongRope { short, long, original, attention_factor } => {
                for (key, factors) in [("short", short), ("long", long)] {
                    let (found, pairs) = (factors.len(), head_dim / 2);
                    let expected = format!("{pairs} are expected, half of a head's elements");
                    let found = format!("a list of {found}");
                    require(factors.len() == pairs, &format!("{AT}.{key}"), found, &expected)?;
                    factors.iter().try_for_each(|factor| positive(key, *factor))?;
                }
                positive("attention_factor", *attention_factor)?;
                context(*original)
            }
        }
    }
}

impl MoeConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let tiers = self.tiers.len();
        require((1..=TIERS_MAX).contains(&tiers), "moe.tiers", tiers, "1 to 256 are expected")?;
        let routing = &self.routing;
        require(
            (1..=tiers).contains(&(routing.k_tier as usize)),
            "moe.routing.k_tier",
            routing.k_tier,
            "1 to the number of tiers is expected",
        )?;
        for (i, tier) in self.tiers.iter().enumerate() {
            let name = |what: &str| format!("moe.tiers.{}.{what}", tier.id);
            let twice = self.tiers[..i].iter().any(|t| t.id == tier.id);
            require(!twice, &name("id"), &tier.id, "tiers must have different names")?;
            let experts = u64::from(tier.groups) * u64::from(tier.experts_per_group);
            require(
                (1..TIER_EXPERTS_MAX).contains(&experts),
                &name("experts"),
                experts,
                "1 to 2^32 - 1 experts in a layer are expected",
            )?;
            let (k_group, k_expert) = (self.k_group(i), self.k_expert(i));
            require(
                k_group <= tier.groups && k_expert <= tier.experts_per_group,
                &name("groups × experts_per_group"),
                format!("{} × {}", tier.groups, tier.experts_per_group),
                "at least k_group × k_expert is expected",
            )?;
            require(
                k_group > 0 && k_expert > 0,
                &name("k_group × k_expert"),
                format!("{k_group} × {k_expert}"),
                "at least 1 × 1 is expected",
            )?;
            require(
                (1..=WIDTH_MAX).contains(&self.intermediate(i)),
                &name("intermediate"),
                self.intermediate(i),
                "1 to 1048576 is expected",
            )?;
        }
        let k = self.routes_max(|_| true);
        require(
            (1..=1024).contains(&k),
            "moe.routing (routes of a token)",
            k,
            "1 to 1024 are expected",
        )?;
        if let Some(shared) = &self.shared {
            let ok = (1..=WIDTH_MAX).contains(&shared.intermediate);
            require(
                ok,
                "moe.shared.intermediate",
                shared.intermediate,
                "1 to 1048576 is expected",
            )?;
        }
        Ok(())
    }
}
