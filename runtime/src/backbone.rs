//! The dense part of a model on a device: all weights that every token uses.
//!
//! Every node holds a whole backbone for its own sequences; experts are elsewhere
//! ([`crate::expert::ExpertStore`]).

use std::{collections::HashMap, sync::Arc};

use lite_llm_kernels::{
    device::{Device, DeviceError},
    dtype::DType,
    matrix::{PackedMatrix, Source},
};

use crate::{
    checkpoint::{Checkpoint, CheckpointError},
    config::{ConfigError, FeedForward, ModelConfig, QkNorm},
    expert::GatedMlp,
    moe_layer::{MoELayer, SharedExpert},
    rope::Rotary,
    routing::{HierarchicalRouter, TierGates},
};

/// Weights that every token uses, on device `D`.
pub struct Backbone<D: Device> {
    /// What the model is, with the context that it is served with.
    pub config: ModelConfig,
    /// Where the weights are and what computes with them.
    pub device: Arc<D>,
    /// `[vocab, hidden]`.
    pub embed: D::Matrix,
    /// `[vocab, hidden]`; `None` if the embedding table serves.
    pub head: Option<D::Matrix>,
    /// Final norm, `[hidden]`.
    pub norm: D::Vector,
    /// One entry per layer.
    pub layers: Vec<BackboneLayer<D>>,
    /// Rotary frequencies, `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Rotary cosines and sines are multiplied by this.
    pub rotary_scale: f32,
}

/// A linear map with an optional bias.
pub struct Linear<D: Device> {
    /// `[out, in]`.
    pub weight: D::Matrix,
    /// `[out]`.
    pub bias: Option<D::Vector>,
}

/// One layer's dense weights.
pub struct BackboneLayer<D: Device> {
    /// Norm before attention.
    pub attention_norm: D::Vector,
    /// Queries.
    pub q: Linear<D>,
    /// Keys.
    pub k: Linear<D>,
    /// Values.
    pub v: Linear<D>,
    /// Output of attention.
    pub o: Linear<D>,
    /// Norm of queries.
    pub q_norm: Option<D::Vector>,
    /// Norm of keys.
    pub k_norm: Option<D::Vector>,
    /// Norm before the feed-forward part.
    pub ffn_norm: D::Vector,
    /// The feed-forward part.
    pub feed_forward: FeedForwardLayer<D>,
}

/// The second half of a layer.
pub enum FeedForwardLayer<D: Device> {
    /// One network for every token.
    Dense(GatedMlp<D::Matrix>),
    /// Experts.
    Sparse(MoELayer<D>),
}

/// Why a backbone could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint is damaged or lacks something.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device took no more.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model cannot be served with such a context.
    #[error(transparent)]
    Context(#[from] ConfigError),
}

impl<D: Device> Backbone<D> {
    /// [`Backbone::load_served`] with the model's own context.
    pub fn load(
        checkpoint: &Checkpoint,
        device: Arc<D>,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        Self::load_served(checkpoint, None, device, progress)
    }

    /// Loads the backbone from a checkpoint, verifying every tensor on as many threads as the
    /// host computes with; `progress` is told (layers done, layers in all). It is served with
    /// `context` ([`ModelConfig::served`]).
    pub fn load_served(
        checkpoint: &Checkpoint,
        context: Option<usize>,
        device: Arc<D>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config().served(context)?;
        let rotary = Rotary::new(&config.attention, config.context);
        let matrices = checkpoint.dense_matrices(device.host().pool().threads())?;
        let loader = Loader { checkpoint, matrices, device: &*device };
        let moe = config.moe.clone().map(Arc::new);
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, layer) in config.layers.iter().enumerate() {
            progress(i, config.layers.len());
            let name = |what: &str| format!("layers.{i}.{what}");
            let linear = |what: &str, bias: bool| -> Result<_, LoadError> {
                let weight = loader.matrix(&name(&format!("attention.{what}")))?;
                let bias = bias.then(|| loader.vector(&name(&format!("attention.{what}_bias"))));
                Ok(Linear { weight, bias: bias.transpose()? })
            };
            let attention = &config.attention;
            let norm = |what: &str| {
                let wanted = attention.qk_norm != QkNorm::None;
                wanted.then(|| loader.vector(&name(&format!("attention.{what}")))).transpose()
            };
            let feed_forward = match (layer.feed_forward, &moe) {
                (FeedForward::Sparse, Some(moe)) => {
                    let router = loader.router(i, moe)?;
                    let shared = match moe.shared {
                        None => None,
                        Some(shared) => Some(SharedExpert {
                            mlp: loader.mlp(&name("shared"))?,
                            gate: shared
                                .gated
                                .then(|| loader.matrix(&name("shared.router")))
                                .transpose()?,
                        }),
                    };
                    FeedForwardLayer::Sparse(MoELayer { router: Box::new(router), shared })
                }
                _ => FeedForwardLayer::Dense(loader.mlp(&name("ffn"))?),
            };
            layers.push(BackboneLayer {
                attention_norm: loader.vector(&name("attention_norm"))?,
                q: linear("q", attention.qkv_bias)?,
                k: linear("k", attention.qkv_bias)?,
                v: linear("v", attention.qkv_bias)?,
                o: linear("o", attention.output_bias)?,
                q_norm: norm("q_norm")?,
                k_norm: norm("k_norm")?,
                ffn_norm: loader.vector(&name("ffn_norm"))?,
                feed_forward,
            });
        }
        progress(config.layers.len(), config.layers.len());
        Ok(Self {
            embed: loader.matrix("embed")?,
            head: (!config.tied_embeddings).then(|| loader.matrix("head")).transpose()?,
            norm: loader.vector("norm")?,
            inv_freq: rotary.inv_freq,
            rotary_scale: rotary.scale,
            layers,
            config,
            device,
        })
    }
}

struct Loader<'a, D> {
    checkpoint: &'a Checkpoint,
    matrices: HashMap<String, PackedMatrix>,
    device: &'a D,
}

impl<D: Device> Loader<'_, D> {
    fn matrix(&self, name: &str) -> Result<D::Matrix, LoadError> {
        Ok(self.device.matrix(self.dense_matrix(name)?)?)
    }

    fn dense_matrix(&self, name: &str) -> Result<PackedMatrix, CheckpointError> {
        match self.matrices.get(name) {
            Some(matrix) => Ok(matrix.clone()),
            // The checkpoint says what is wrong.
            None => self.checkpoint.dense_matrix(name),
        }
    }

    fn vector(&self, name: &str) -> Result<D::Vector, LoadError> {
        Ok(self.device.vector(&self.checkpoint.dense_vector(name)?)?)
    }

    fn mlp(&self, prefix: &str) -> Result<GatedMlp<D::Matrix>, LoadError> {
        Ok(GatedMlp {
            gate: self.matrix(&format!("{prefix}.gate"))?,
            up: self.matrix(&format!("{prefix}.up"))?,
            down: self.matrix(&format!("{prefix}.down"))?,
        })
    }

    fn router(
        &self,
        layer: usize,
        moe: &Arc<crate::config::MoeConfig>,
    ) -> Result<HierarchicalRouter, LoadError> {
        let tier_gate = match moe.tiers.len() {
            0 | 1 => None,
            tiers => {
                // The row of a tier without files is never looked at.
                let mut rows = vec![0.0; tiers * self.checkpoint.config().hidden];
                let hidden = rows.len() / tiers;
                for (t, row) in rows.chunks_exact_mut(hidden).enumerate() {
                    if !moe.tiers[t].absent {
                        row.copy_from_slice(&self.checkpoint.tier_router(layer, t)?);
                    }
                }
                Some(PackedMatrix::pack(DType::F32, tiers, hidden, Source::F32(&rows)))
            }
        };
        let mut tiers = Vec::with_capacity(moe.tiers.len());
        for (t, tier) in moe.tiers.iter().enumerate() {
            let groups = if tier.absent { 0 } else { tier.groups };
            tiers.push(TierGates {
                groups: match tier.absent {
                    true => None,
                    false => self.checkpoint.group_router(layer, t)?,
                },
                experts: (0..groups)
                    .map(|group| self.checkpoint.expert_router(layer, t, group))
                    .collect::<Result<_, _>>()?,
            });
        }
        Ok(HierarchicalRouter::new(layer, moe.clone(), tier_gate, tiers))
    }
}
