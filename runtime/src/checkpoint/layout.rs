//! Names, shapes and order of every tensor of a checkpoint, as a function of its configuration.
//!
//! Writer, reader and import all ask here, so a name is spelled once, and so is the format of each
//! tensor in a checkpoint of each format (`Role::stored`). Within a shard packed matrices come
//! first and vectors last: packed bytes are multiples of 64, so every matrix starts at one without
//! a gap, which safetensors would not allow.
//!
//! Matrices are stored as [`lite_llm_kernels::matrix`] packs them: values of f32 and bf16 by
//! panels, and for int8, int6 and int4 bytes (`U8` to safetensors) of shape [panels, blocks along
//! K, bytes of a block of a panel], described in [`lite_llm_kernels::blocks`].

use lite_llm_kernels::{
    blocks::BLOCK,
    dtype::DType,
    matrix::{PANEL, PackedMatrix},
};

use crate::config::{FeedForward, ModelConfig, QkNorm};

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

/// One shard of a checkpoint: what is written, read and missing together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Embedding, last norm, output projection.
    Model,
    /// A layer without its experts.
    Layer(usize),
    /// The group gate of a tier in a layer.
    GroupRouter {
        /// Index of the tier.
        tier: usize,
        /// Sparse layer.
        layer: usize,
    },
    /// The experts of one group in a layer, and their gate.
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
        let tiers = config.moe.iter().flat_map(|moe| moe.tiers.iter().enumerate());
        let sparse = tiers.flat_map(move |(tier, t)| {
            let routers = config
                .sparse_layers()
                .filter(move |_| t.groups > 1)
                .map(move |layer| Part::GroupRouter { tier, layer });
            let groups = (0..t.groups).flat_map(move |group| {
                config.sparse_layers().map(move |layer| Part::Group { tier, layer, group })
            });
            routers.chain(groups)
        });
        dense.chain(sparse)
    }

    /// Path of the shard within the checkpoint.
    pub fn path(self, config: &ModelConfig) -> String {
        let tier_name = |tier: usize| match &config.moe {
            Some(moe) => moe.tiers[tier].id.as_str().to_owned(),
            None => String::new(),
        };
        match self {
            Part::Model => "dense/model.safetensors".into(),
            Part::Layer(layer) => format!("dense/l{layer:03}.safetensors"),
            Part::GroupRouter { tier, layer } => {
                format!("tiers/{}/l{layer:03}.safetensors", tier_name(tier))
            }
            Part::Group { tier, layer, group } => {
                format!("tiers/{}/l{layer:03}-g{group:05}.safetensors", tier_name(tier))
            }
        }
    }

    /// How many tensors the shard holds, without listing them.
    pub fn tensor_count(self, config: &ModelConfig) -> u64 {
        match (self, &config.moe) {
            (Part::Group { tier, .. }, Some(moe)) => {
                1 + 3 * u64::from(moe.tiers[tier].experts_per_group)
            }
            _ => self.tensors(config, DType::F32).count() as u64,
        }
    }

    /// The shard's tensors in their order.
    pub fn tensors(
        self,
        config: &ModelConfig,
        dtype: DType,
    ) -> Box<dyn Iterator<Item = TensorSpec> + '_> {
        match self {
            Part::Model => Box::new(model_tensors(config, dtype).into_iter()),
            Part::Layer(layer) => Box::new(layer_tensors(config, dtype, layer).into_iter()),
            Part::GroupRouter { tier, .. } => Box::new(config.moe.iter().map(move |moe| {
                let groups = moe.tiers[tier].groups as usize;
                TensorSpec::matrix(GROUP_ROUTER, Role::Gate, dtype, groups, config.hidden)
            })),
            Part::Group { tier, .. } => Box::new(config.moe.iter().flat_map(move |moe| {
                let (inner, hidden) = (moe.intermediate, config.hidden);
                let experts = moe.tiers[tier].experts_per_group;
                let gate =
                    TensorSpec::matrix(EXPERT_ROUTER, Role::Gate, dtype, experts as usize, hidden);
                let weights = move |e, name, n, k| {
                    TensorSpec::matrix(format!("experts.{e}.{name}"), Role::Weights, dtype, n, k)
                };
                let each = move |e| {
                    [
                        weights(e, "gate", inner, hidden),
                        weights(e, "up", inner, hidden),
                        weights(e, "down", hidden, inner),
                    ]
                };
                std::iter::once(gate).chain((0..experts).flat_map(each))
            })),
        }
    }
}

/// Gate over the groups of a tier.
pub const GROUP_ROUTER: &str = "router.groups";
/// Gate over the experts of a group.
pub const EXPERT_ROUTER: &str = "router.experts";

/// Position of an expert's first matrix in its shard; `up` and `down` follow.
pub fn expert_position(expert: u32) -> usize {
    1 + 3 * expert as usize
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
            if moe.tiers.len() > 1 {
                list.push(gate("router.tiers", moe.tiers.len()));
            }
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
