//! What is in a checkpoint, as data that can be printed.

use serde::Serialize;

use super::{
    Checkpoint, CheckpointError,
    layout::Part,
    verify::{Report, shards},
};
use crate::config::{FeedForward, ModelConfig, RoutingConfig};

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

/// Parameters in all, and those that one token is computed with: everything dense, the gates that
/// it passes, and its experts. The embedding table counts in full in both.
pub fn count_parameters(config: &ModelConfig) -> (u64, u64) {
    let dtype = lite_llm_kernels::dtype::DType::F32;
    let dense: u64 = std::iter::once(Part::Model)
        .chain((0..config.layers.len()).map(Part::Layer))
        .flat_map(|part| part.tensors(config, dtype))
        .map(|t| t.parameters())
        .sum();
    let Some(moe) = &config.moe else { return (dense, dense) };
    let sparse = config.layers.iter().filter(|l| l.feed_forward == FeedForward::Sparse).count();
    let (sparse, hidden) = (sparse as u64, config.hidden as u64);
    let group_gates = |groups: u32| if groups > 1 { u64::from(groups) } else { 0 };
    let total: u64 = moe
        .tiers
        .iter()
        .map(|t| {
            let experts = u64::from(t.groups) * u64::from(t.experts_per_group);
            sparse
                * (experts * (config.expert_parameters() + hidden) + group_gates(t.groups) * hidden)
        })
        .sum();
    let routing = &moe.routing;
    let mut gates: Vec<u64> = moe
        .tiers
        .iter()
        .map(|t| {
            group_gates(t.groups) + u64::from(routing.k_group) * u64::from(t.experts_per_group)
        })
        .collect();
    // A token may choose the tiers with the most gates.
    gates.sort_unstable_by(|a, b| b.cmp(a));
    let gates: u64 = gates.iter().take(routing.k_tier as usize).sum();
    let active = sparse * (routing.k() as u64 * config.expert_parameters() + gates * hidden);
    (dense + total, dense + active)
}
