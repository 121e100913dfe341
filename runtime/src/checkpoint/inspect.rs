//! What is in a checkpoint, as data that can be printed.

use lite_llm_kernels::dtype::DType;
use serde::Serialize;

use super::{
    Checkpoint, CheckpointError,
    layout::{Part, TensorSpec},
    verify::{Report, shards},
};
use crate::{
    config::{FeedForward, ModelConfig, MoeConfig, RoutingConfig},
    tier::TierConfig,
};

/// A summary of a checkpoint. Field names are part of `inspect --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Root hash, in hexadecimal digits.
    pub id: String,
    /// Class of the model.
    pub architecture: String,
    /// Format of its weights.
    pub dtype: &'static str,
    /// Parameters in all.
    pub parameters: u64,
    /// Parameters that one token is computed with.
    pub active_parameters: u64,
    /// Bytes of weights that are read for one token when it is decoded alone.
    pub bytes_per_token: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Bits that a parameter takes in them on average, scales and padding included.
    pub bits_per_parameter: f64,
    /// Shards.
    pub shards: usize,
    /// Layers.
    pub layers: usize,
    /// Layers with experts.
    pub sparse_layers: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Positions that the model was made for.
    pub context: usize,
    /// Bytes of one expert, if there are experts.
    pub expert_bytes: Option<u64>,
    /// How experts are chosen.
    pub routing: Option<RoutingConfig>,
    /// The tiers.
    pub tiers: Vec<TierSummary>,
    /// Whether it has a template of conversations.
    pub chat_template: bool,
}

/// One tier of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierSummary {
    /// Its name.
    pub id: String,
    /// Groups in a layer.
    pub groups: u32,
    /// Experts in a group.
    pub experts_per_group: u32,
    /// Parameters of its experts, over all layers.
    pub parameters: u64,
}

/// Summarises a checkpoint from its indexes; reads no weights.
pub fn inspect(checkpoint: &Checkpoint) -> Result<Summary, CheckpointError> {
    let config = checkpoint.config();
    let mut errors = Vec::new();
    let shards = shards(checkpoint, &mut Report::default(), &mut errors);
    if let Some(error) = errors.into_iter().next() {
        return Err(error);
    }
    let expert_bytes = config.sparse_layers().next().map(|layer| {
        let first = Part::Group { tier: 0, layer, group: 0 };
        let matrices = first.tensors(config, checkpoint.dtype()).skip(1).take(3);
        matrices.filter_map(|t| t.bytes()).sum()
    });
    let (parameters, active_parameters) = count_parameters(config);
    let bytes = shards.iter().map(|s| s.bytes).sum();
    let tiers = config.moe.iter().flat_map(|moe| &moe.tiers);
    Ok(Summary {
        id: checkpoint.manifest().root.to_string(),
        architecture: config.architecture.clone(),
        dtype: checkpoint.dtype().name(),
        parameters,
        active_parameters,
        bytes_per_token: bytes_per_token(config, checkpoint.dtype()),
        bytes,
        bits_per_parameter: bytes as f64 * 8.0 / parameters.max(1) as f64,
        shards: shards.len(),
        layers: config.layers.len(),
        sparse_layers: config.sparse_layers().count(),
        hidden: config.hidden,
        vocab: config.vocab,
        context: config.context,
        expert_bytes,
        routing: config.moe.as_ref().map(|moe| moe.routing.clone()),
        tiers: tiers
            .map(|t| TierSummary {
                id: t.id.to_string(),
                groups: t.groups,
                experts_per_group: t.experts_per_group,
                parameters: t.parameters,
            })
            .collect(),
        chat_template: checkpoint.manifest().text.chat_template.is_some(),
    })
}

/// Tensors that every token is computed with, gates of experts left out.
fn dense_tensors(config: &ModelConfig, dtype: DType) -> impl Iterator<Item = TensorSpec> + '_ {
    std::iter::once(Part::Model)
        .chain((0..config.layers.len()).map(Part::Layer))
        .flat_map(move |part| part.tensors(config, dtype))
}

/// Gates of groups and experts, `[hidden]` each, that a token passes in a sparse layer.
fn gates_per_token(moe: &MoeConfig) -> u64 {
    let mut gates: Vec<u64> = moe
        .tiers
        .iter()
        .map(|t| group_gates(t) + u64::from(moe.routing.k_group) * u64::from(t.experts_per_group))
        .collect();
    // A token may choose the tiers with the most gates.
    gates.sort_unstable_by(|a, b| b.cmp(a));
    gates.iter().take(moe.routing.k_tier as usize).sum()
}

fn group_gates(tier: &TierConfig) -> u64 {
    if tier.groups > 1 { tier.groups.into() } else { 0 }
}

/// Bytes of weights that are read when one token is decoded alone: what
/// [`count_parameters`] calls active, as it is stored. Of a table of embeddings that is not the
/// output projection, too, one row is read, which does not count.
pub fn bytes_per_token(config: &ModelConfig, dtype: DType) -> u64 {
    let dense: u64 = dense_tensors(config, dtype)
        .filter(|t| config.tied_embeddings || t.name != "embed")
        .filter_map(|t| t.bytes())
        .sum();
    let Some(moe) = &config.moe else { return dense };
    let expert: u64 = config.sparse_layers().next().map_or(0, |layer| {
        let first = Part::Group { tier: 0, layer, group: 0 };
        first.tensors(config, dtype).skip(1).take(3).filter_map(|t| t.bytes()).sum()
    });
    let gates = gates_per_token(moe) * config.hidden as u64 * size_of::<f32>() as u64;
    dense + config.sparse_layers().count() as u64 * (moe.routing.k() as u64 * expert + gates)
}

/// Parameters in all, and those that one token is computed with: everything dense, the gates that
/// it passes, and its experts. The embedding table counts in full in both.
pub fn count_parameters(config: &ModelConfig) -> (u64, u64) {
    let dense: u64 = dense_tensors(config, DType::F32).map(|t| t.parameters()).sum();
    let Some(moe) = &config.moe else { return (dense, dense) };
    let sparse = config.layers.iter().filter(|l| l.feed_forward == FeedForward::Sparse).count();
    let (sparse, hidden) = (sparse as u64, config.hidden as u64);
    let total: u64 = moe
        .tiers
        .iter()
        .map(|t| {
            let experts = u64::from(t.groups) * u64::from(t.experts_per_group);
            sparse * (experts * (config.expert_parameters() + hidden) + group_gates(t) * hidden)
        })
        .sum();
    let active = sparse
        * (moe.routing.k() as u64 * config.expert_parameters() + gates_per_token(moe) * hidden);
    (dense + total, dense + active)
}
