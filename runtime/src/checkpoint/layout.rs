//! Names, shapes and order of every tensor of a checkpoint, as a function of its configuration.
//!
//! Writer, reader and import all ask here, so a name is spelled once, and so is the format of each
//! tensor in a checkpoint of each format (`Role::stored`).
//!
//! A shard is a row of sections, each read and verified as one. Every section starts at a multiple
//! of [`MATRIX_ALIGN`]; an expert, whose three matrices are one section, at a multiple of
//! [`DATA_ALIGN`], so that it can be read with O_DIRECT by itself. What lies between is tensors of
//! zeros, for safetensors allows no gaps ([`padding`]).
//!
//! Matrices are stored as [`lite_llm_kernels::matrix`] packs them: values of f32 and bf16 by
//! panels, and for int8, int6 and int4 bytes (`U8` to safetensors) of shape [panels, blocks along
//! K, bytes of a block of a panel], described in [`lite_llm_kernels::blocks`].

use lite_llm_kernels::{
    blocks::BLOCK,
    dtype::DType,
    matrix::{PANEL, PackedMatrix},
};

use super::DATA_ALIGN;
use crate::config::{FeedForward, ModelConfig, QkNorm};

/// Alignment of every section: a line of the cache, and what kernels ask for.
pub const MATRIX_ALIGN: u64 = 64;

/// Logical shape of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Packed weights of n outputs and k inputs.
    Matrix {
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
    /// Plain f32 values.
    Vector {
        /// How many.
        n: usize,
    },
}

/// What a tensor of a checkpoint has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name within the shard.
    pub name: String,
    /// Stored format.
    pub dtype: DType,
    /// Logical shape.
    pub shape: Shape,
}

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The embedding table; the output projection, too, where the two are one.
    Embed,
    /// The output projection.
    Head,
    /// A router, or the gate of a shared expert.
    Gate,
    /// Everything else.
    Weights,
}

impl Role {
    /// How a matrix is stored in a checkpoint of a format. Gates decide who computes, and keep
    /// f32. Tables of tokens are read by rows and hold rare outliers: blocks of 4 bits would cost
    /// them much for few bytes.
    fn stored(self, format: DType) -> DType {
        match (self, format) {
            (Role::Gate, _) => DType::F32,
            (Role::Embed, DType::Int8 | DType::Int6 | DType::Int4) => DType::Bf16,
            (Role::Head, DType::Int4) => DType::Int6,
            (Role::Embed | Role::Head | Role::Weights, format) => format,
        }
    }
}

impl TensorSpec {
    fn matrix(name: impl Into<String>, role: Role, format: DType, n: usize, k: usize) -> Self {
        Self { name: name.into(), dtype: role.stored(format), shape: Shape::Matrix { n, k } }
    }

    fn vector(name: impl Into<String>, n: usize) -> Self {
        Self { name: name.into(), dtype: DType::F32, shape: Shape::Vector { n } }
    }

    /// Bytes on disk; `None` if they overflow.
    pub fn bytes(&self) -> Option<u64> {
        match self.shape {
            Shape::Matrix { n, k } => PackedMatrix::packed_bytes(self.dtype, n, k),
            Shape::Vector { n } => n.checked_mul(4),
        }
        .map(|bytes| bytes as u64)
    }

    /// Values that the model has here, padding left out.
    pub fn parameters(&self) -> u64 {
        match self.shape {
            Shape::Matrix { n, k } => n as u64 * k as u64,
            Shape::Vector { n } => n as u64,
        }
    }

    /// Whether it is packed weights.
    pub fn is_matrix(&self) -> bool {
        matches!(self.shape, Shape::Matrix { .. })
    }

    /// Logical shape as a list.
    pub fn dims(&self) -> Vec<usize> {
        match self.shape {
            Shape::Matrix { n, k } => vec![n, k],
            Shape::Vector { n } => vec![n],
        }
    }

    /// Shape of what is stored: panels of values, or of bytes in blocks, for a matrix.
    pub fn stored_dims(&self) -> Vec<usize> {
        match (self.shape, self.dtype) {
            (Shape::Vector { n }, _) => vec![n],
            (Shape::Matrix { n, k }, DType::F32) => vec![n.div_ceil(PANEL), k, PANEL],
            (Shape::Matrix { n, k }, DType::Bf16) => {
                vec![n.div_ceil(PANEL), k.div_ceil(2), PANEL, 2]
            }
            (Shape::Matrix { n, k }, DType::Int8 | DType::Int6 | DType::Int4) => {
                // Bytes of one panel of one block.
                let block = PackedMatrix::packed_bytes(self.dtype, PANEL, BLOCK);
                vec![n.div_ceil(PANEL), k.div_ceil(BLOCK), block.expect("a block has a size")]
            }
        }
    }
}

/// What is read and verified as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionSpec {
    /// Its name within the shard.
    pub name: String,
    /// Its start is a multiple of this.
    pub align: u64,
    /// Its tensors, one after the other without gaps.
    pub tensors: Vec<TensorSpec>,
}

impl SectionSpec {
    fn one(tensor: TensorSpec) -> Self {
        Self { name: tensor.name.clone(), align: MATRIX_ALIGN, tensors: vec![tensor] }
    }

    /// Bytes of its tensors; `None` if they overflow.
    pub fn bytes(&self) -> Option<u64> {
        self.tensors.iter().try_fold(0u64, |sum, tensor| sum.checked_add(tensor.bytes()?))
    }
}

/// One shard of a checkpoint: what is written and missing together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Embedding, last norm, output projection.
    Model,
    /// A layer without its experts.
    Layer(usize),
    /// What a tier brings to the choice of tiers and groups in a layer: its own row of the tier
    /// gate, so that a tier is added without touching the others, and the gate over its groups.
    TierRouter {
        /// Index of the tier.
        tier: usize,
        /// Sparse layer.
        layer: usize,
    },
    /// The gate of one group in a layer, and its experts.
    Group {
        /// Index of the tier.
        tier: usize,
        /// Sparse layer.
        layer: usize,
        /// Group within the tier.
        group: u32,
    },
}

impl Part {
    /// Every part of a model, in the order in which they are written.
    pub fn all(config: &ModelConfig) -> impl Iterator<Item = Part> + '_ {
        let dense = std::iter::once(Part::Model).chain((0..config.layers.len()).map(Part::Layer));
        let tiers = config.moe.iter().flat_map(|moe| 0..moe.tiers.len());
        dense.chain(tiers.flat_map(move |tier| Part::of_tier(config, tier)))
    }

    /// The parts of one tier, in the order in which they are written.
    pub fn of_tier(config: &ModelConfig, tier: usize) -> impl Iterator<Item = Part> + '_ {
        let groups = config.moe.as_ref().map_or(0, |moe| moe.tiers[tier].groups);
        let routers = config.sparse_layers().map(move |layer| Part::TierRouter { tier, layer });
        let groups = (0..groups).flat_map(move |group| {
            config.sparse_layers().map(move |layer| Part::Group { tier, layer, group })
        });
        routers.chain(groups)
    }

    /// Path of the shard within the checkpoint, or within the folder of a later manifest.
    pub fn path(self, config: &ModelConfig) -> String {
        let tier_name = |tier: usize| match &config.moe {
            Some(moe) => moe.tiers[tier].id.as_str().to_owned(),
            None => String::new(),
        };
        match self {
            Part::Model => "dense/model.safetensors".into(),
            Part::Layer(layer) => format!("dense/l{layer:03}.safetensors"),
            Part::TierRouter { tier, layer } => {
                format!("tiers/{}/l{layer:03}.safetensors", tier_name(tier))
            }
            Part::Group { tier, layer, group } => {
                format!("tiers/{}/l{layer:03}-g{group:05}.safetensors", tier_name(tier))
            }
        }
    }

    /// How many sections the shard holds, without listing them.
    pub fn section_count(self, config: &ModelConfig) -> u64 {
        match (self, &config.moe) {
            (Part::Group { tier, .. }, Some(moe)) => {
                1 + u64::from(moe.tiers[tier].experts_per_group)
            }
            _ => self.sections(config, DType::F32).count() as u64,
        }
    }

    /// The shard's sections in their order. `dtype` is the checkpoint's format; tiers may have
    /// their own.
    pub fn sections(
        self,
        config: &ModelConfig,
        dtype: DType,
    ) -> Box<dyn Iterator<Item = SectionSpec> + '_> {
        let each = |tensors: Vec<TensorSpec>| Box::new(tensors.into_iter().map(SectionSpec::one));
        match self {
            Part::Model => each(model_tensors(config, dtype)),
            Part::Layer(layer) => each(layer_tensors(config, dtype, layer)),
            Part::TierRouter { tier, .. } => each(tier_router_tensors(config, tier)),
            Part::Group { tier, .. } => {
                let experts =
                    config.moe.as_ref().map_or(0, |moe| moe.tiers[tier].experts_per_group);
                let gate = TensorSpec::matrix(
                    EXPERT_ROUTER,
                    Role::Gate,
                    dtype,
                    experts as usize,
                    config.hidden,
                );
                let expert = move |e: u32| {
                    let name = format!("experts.{e}");
                    let tensors = expert_tensors(config, dtype, tier, &name);
                    SectionSpec { name, align: DATA_ALIGN, tensors: tensors.into() }
                };
                Box::new(std::iter::once(SectionSpec::one(gate)).chain((0..experts).map(expert)))
            }
        }
    }

    /// The tensors of all sections, in their order.
    pub fn tensors(
        self,
        config: &ModelConfig,
        dtype: DType,
    ) -> impl Iterator<Item = TensorSpec> + '_ {
        self.sections(config, dtype).flat_map(|section| section.tensors)
    }
}

/// Gate over the groups of a tier.
pub const GROUP_ROUTER: &str = "router.groups";
/// A tier's row of the gate over tiers.
pub const TIER_ROUTER: &str = "router.tier";
/// Gate over the experts of a group.
pub const EXPERT_ROUTER: &str = "router.experts";

/// Position of an expert's section in its shard: the gate of its group comes first.
pub fn expert_position(expert: u32) -> usize {
    1 + expert as usize
}

/// The matrices of an expert of a tier: gate, up, down, below `name`.
pub fn expert_tensors(
    config: &ModelConfig,
    dtype: DType,
    tier: usize,
    name: &str,
) -> [TensorSpec; 3] {
    let (mut inner, mut dtype) = (0, dtype);
    if let Some(moe) = &config.moe {
        inner = moe.intermediate(tier);
        dtype = moe.tiers[tier].dtype.unwrap_or(dtype);
    }
    let matrix =
        |what, n, k| TensorSpec::matrix(format!("{name}.{what}"), Role::Weights, dtype, n, k);
    [
        matrix("gate", inner, config.hidden),
        matrix("up", inner, config.hidden),
        matrix("down", config.hidden, inner),
    ]
}

/// Bytes of one expert of a tier, as kernels use them.
pub fn expert_bytes(config: &ModelConfig, dtype: DType, tier: usize) -> u64 {
    let tensors = expert_tensors(config, dtype, tier, "");
    tensors.iter().filter_map(TensorSpec::bytes).fold(0, u64::saturating_add)
}

/// Name and size of the tensor of zeros between what ends at one position of the data and what
/// begins at another, if they differ.
pub fn padding(end: u64, begin: u64) -> Option<(String, u64)> {
    (begin > end).then(|| (format!("padding.{end}"), begin - end))
}

fn tier_router_tensors(config: &ModelConfig, tier: usize) -> Vec<TensorSpec> {
    let groups = config.moe.as_ref().map_or(0, |moe| moe.tiers[tier].groups) as usize;
    let mut list = Vec::with_capacity(2);
    if groups > 1 {
        list.push(TensorSpec::matrix(GROUP_ROUTER, Role::Gate, DType::F32, groups, config.hidden));
    }
    list.push(TensorSpec::vector(TIER_ROUTER, config.hidden));
    list
}

fn model_tensors(config: &ModelConfig, dtype: DType) -> Vec<TensorSpec> {
    let table = |name, role| TensorSpec::matrix(name, role, dtype, config.vocab, config.hidden);
    let mut list = vec![table("embed", Role::Embed)];
    if !config.tied_embeddings {
        list.push(table("head", Role::Head));
    }
    list.push(TensorSpec::vector("norm", config.hidden));
    list
}

fn layer_tensors(config: &ModelConfig, dtype: DType, layer: usize) -> Vec<TensorSpec> {
    let attention = &config.attention;
    let hidden = config.hidden;
    let q = attention.heads * attention.head_dim;
    let kv = attention.kv_heads * attention.head_dim;
    let name = |rest: &str| format!("layers.{layer}.{rest}");
    let matrix = |rest: &str, n, k| TensorSpec::matrix(name(rest), Role::Weights, dtype, n, k);
    let gate = |rest: &str, n| TensorSpec::matrix(name(rest), Role::Gate, dtype, n, hidden);
    let vector = |rest: &str, n| TensorSpec::vector(name(rest), n);
    let mlp = |at: &str, inner| {
        [
            matrix(&format!("{at}.gate"), inner, hidden),
            matrix(&format!("{at}.up"), inner, hidden),
            matrix(&format!("{at}.down"), hidden, inner),
        ]
    };

    let mut list = vec![
        matrix("attention.q", q, hidden),
        matrix("attention.k", kv, hidden),
        matrix("attention.v", kv, hidden),
        matrix("attention.o", hidden, q),
    ];
    match (config.layers[layer].feed_forward, &config.moe) {
        (FeedForward::Dense { intermediate }, _) => list.extend(mlp("ffn", intermediate)),
        (FeedForward::Sparse, Some(moe)) => {
            if let Some(shared) = &moe.shared {
                list.extend(mlp("shared", shared.intermediate));
                if shared.gated {
                    list.push(gate("shared.router", 1));
                }
            }
        }
        // `ModelConfig::check` refuses sparse layers without a configuration of experts.
        (FeedForward::Sparse, None) => {}
    }
    list.push(vector("attention_norm", hidden));
    list.push(vector("ffn_norm", hidden));
    if attention.qkv_bias {
        list.push(vector("attention.q_bias", q));
        list.push(vector("attention.k_bias", kv));
        list.push(vector("attention.v_bias", kv));
    }
    if attention.output_bias {
        list.push(vector("attention.o_bias", hidden));
    }
    match attention.qk_norm {
        QkNorm::None => {}
        QkNorm::Whole => {
            list.push(vector("attention.q_norm", q));
            list.push(vector("attention.k_norm", kv));
        }
        QkNorm::PerHead => {
            list.push(vector("attention.q_norm", attention.head_dim));
            list.push(vector("attention.k_norm", attention.head_dim));
        }
    }
    list
}
