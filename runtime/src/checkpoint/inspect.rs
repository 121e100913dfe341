//! What is in a checkpoint, as data that can be printed.

use lite_llm_kernels::dtype::DType;
use serde::Serialize;

use super::{
    Checkpoint, CheckpointError,
    layout::{Part, TensorSpec, expert_bytes},
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
    /// N of its `manifest.N.json`.
    pub manifest: u64,
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
    /// Experts that are stored compressed, if any are.
    pub compressed: Option<Compressed>,
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
    /// How experts are chosen.
    pub routing: Option<RoutingConfig>,
    /// The tiers.
    pub tiers: Vec<TierSummary>,
    /// Whether it has a template of conversations.
    pub chat_template: bool,
}

/// What is stored compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Compressed {
    /// Sections.
    pub sections: u64,
    /// Bytes as kernels use them.
    pub bytes: u64,
    /// Bytes as they are stored.
    pub stored: u64,
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
    /// Format of its experts.
    pub dtype: &'static str,
    /// Inner width of its experts.
    pub intermediate: usize,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Groups per token that chose it, and experts per chosen group.
    pub routes: [u32; 2],
    /// Whether its files are here.
    pub here: bool,
}

/// Summarises a checkpoint from its indexes; reads no weights.
pub fn inspect(checkpoint: &Checkpoint) -> Result<Summary, CheckpointError> {
    let config = checkpoint.config();
    let mut errors = Vec::new();
    let shards = shards(checkpoint, &mut Report::default(), &mut errors);
    if let Some(error) = errors.into_iter().next() {
        return Err(error);
    }
    let (parameters, active_parameters) = count_parameters(config);
    let bytes = shards.iter().map(|s| s.bytes).sum();
    let mut compressed = Compressed::default();
    for section in shards.iter().flat_map(|shard| &shard.sections) {
        if let Some(stored) = &section.stored {
            compressed.sections += 1;
            compressed.bytes += section.bytes;
            compressed.stored += stored.bytes;
        }
    }
    let summary = |moe: &MoeConfig, tier: usize| {
        let config = &moe.tiers[tier];
        TierSummary {
            id: config.id.to_string(),
            groups: config.groups,
            experts_per_group: config.experts_per_group,
            parameters: config.parameters,
            dtype: config.dtype.unwrap_or(checkpoint.dtype()).name(),
            intermediate: moe.intermediate(tier),
            expert_bytes: expert_bytes(checkpoint.config(), checkpoint.dtype(), tier),
            routes: [moe.k_group(tier), moe.k_expert(tier)],
            here: !config.absent,
        }
    };
    let tiers = config.moe.iter().flat_map(|moe| (0..moe.tiers.len()).map(move |t| (moe, t)));
    Ok(Summary {
        id: checkpoint.manifest().root.to_string(),
        manifest: checkpoint.manifest().number,
        architecture: config.architecture.clone(),
        dtype: checkpoint.dtype().name(),
        parameters,
        active_parameters,
        bytes_per_token: bytes_per_token(config, checkpoint.dtype()),
        bytes,
        bits_per_parameter: bytes as f64 * 8.0 / parameters.max(1) as f64,
        shards: shards.len(),
        compressed: (compressed.sections > 0).then_some(compressed),
        layers: config.layers.len(),
        sparse_layers: config.sparse_layers().count(),
        hidden: config.hidden,
        vocab: config.vocab,
        context: config.context,
        routing: config.moe.as_ref().map(|moe| moe.routing.clone()),
        tiers: tiers.map(|(moe, tier)| summary(moe, tier)).collect(),
        chat_template: checkpoint.manifest().text.chat_template.is_some(),
    })
}

/// Tensors that every token is computed with, gates of experts left out.
fn dense_tensors(config: &ModelConfig, dtype: DType) -> impl Iterator<Item = TensorSpec> + '_ {
    std::iter::once(Part::Model)
        .chain((0..config.layers.len()).map(Part::Layer))
        .flat_map(move |part| part.tensors(config, dtype))
}

/// Gates of groups and experts, `[hidden]` each, that a token passes in a sparse layer, by the
/// tier that it chose.
fn gates_of(moe: &MoeConfig, tier: usize) -> u64 {
    let config = &moe.tiers[tier];
    group_gates(config) + u64::from(moe.k_group(tier)) * u64::from(config.experts_per_group)
}

fn group_gates(tier: &TierConfig) -> u64 {
    if tier.groups > 1 { tier.groups.into() } else { 0 }
}

/// Rows of the gate over tiers that decide something.
fn tier_gates(moe: &MoeConfig) -> u64 {
    if moe.tiers.len() > 1 { moe.tiers.len() as u64 } else { 0 }
}

/// What a token takes in a sparse layer at most, where an expert of a tier takes so much and a
/// gate of one row so much.
fn per_token(moe: &MoeConfig, expert: impl Fn(usize) -> u64, gate: u64) -> u64 {
    let tier = |tier| moe.routes_of(tier) * expert(tier) + gates_of(moe, tier) * gate;
    tier_gates(moe) * gate + moe.largest_choice(tier)
}

/// Bytes of weights that are read when one token is decoded alone, at most: what
/// [`count_parameters`] calls active, as it is stored. Of a table of embeddings that is not the
/// output projection, too, one row is read, which does not count.
pub fn bytes_per_token(config: &ModelConfig, dtype: DType) -> u64 {
    let dense: u64 = dense_tensors(config, dtype)
        .filter(|t| config.tied_embeddings || t.name != "embed")
        .filter_map(|t| t.bytes())
        .sum();
    let Some(moe) = &config.moe else { return dense };
    let gate = config.hidden as u64 * size_of::<f32>() as u64;
    let sparse = config.sparse_layers().count() as u64;
    dense + sparse * per_token(moe, |tier| expert_bytes(config, dtype, tier), gate)
}

/// Parameters in all, and those that one token is computed with at most: everything dense, the
/// gates that it passes, and its experts. The embedding table counts in full in both.
pub fn count_parameters(config: &ModelConfig) -> (u64, u64) {
    let dense: u64 = dense_tensors(config, DType::F32).map(|t| t.parameters()).sum();
    let Some(moe) = &config.moe else { return (dense, dense) };
    let sparse = config.layers.iter().filter(|l| l.feed_forward == FeedForward::Sparse).count();
    let (sparse, hidden) = (sparse as u64, config.hidden as u64);
    let tier = |(tier, config_of): (usize, &TierConfig)| {
        let experts = u64::from(config_of.groups) * u64::from(config_of.experts_per_group);
        experts * (config.expert_parameters(tier) + hidden) + group_gates(config_of) * hidden
    };
    let tiers: u64 = moe.tiers.iter().enumerate().map(tier).sum();
    let total = sparse * (tiers + tier_gates(moe) * hidden);
    let active = sparse * per_token(moe, |tier| config.expert_parameters(tier), hidden);
    (dense + total, dense + active)
}
