//! What a Hugging Face folder calls our parameters: the way back from a checkpoint's names.
//!
//! A tensor of the folder is the values of some of our parameters ([`crate::train::params`]), one behind
//! the other. All spellings that `names` reads are known here.

use crate::{config::ModelConfig, expert::ExpertKey};

/// The parameters whose values, one behind the other, are the tensor of this name; `None` if the classes
/// that are known have no such tensor.
pub fn parameters_of(config: &ModelConfig, tensor: &str) -> Option<Vec<String>> {
    let one = |name: &str| Some(vec![name.to_owned()]);
    match tensor {
        "model.embed_tokens.weight" => return one("embed"),
        "lm_head.weight" if config.tied_embeddings => return one("embed"),
        "lm_head.weight" => return one("head"),
        "model.norm.weight" => return one("norm"),
        _ => {}
    }
    let (layer, rest) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    config.layers.get(layer)?;
    let at = |name: &str| one(&format!("layers.{layer}.{name}"));
    if let Some(what) = rest.strip_prefix("self_attn.") {
        let (name, kind) = what.rsplit_once('.')?;
        return match (name.strip_suffix("_proj"), kind) {
            (Some(projection), "weight") => at(&format!("attention.{projection}")),
            (Some(projection), "bias") => at(&format!("attention.{projection}_bias")),
            (None, "weight") => at(&format!("attention.{name}")),
            _ => None,
        };
    }
    match rest {
        "input_layernorm.weight" => return at("attention_norm"),
        "post_attention_layernorm.weight" => return at("ffn_norm"),
        _ => {}
    }
    let block = ["mlp.", "block_sparse_moe."].iter().find_map(|block| rest.strip_prefix(block))?;
    let block = block.strip_suffix(".weight").unwrap_or(block);
    if block == "shared_expert_gate" {
        return at("shared.router");
    }
    if let Some(matrix) = block.strip_prefix("shared_expert.") {
        return at(&format!("shared.{}", matrix_of(matrix)?));
    }
    if block == "gate" {
        let moe = config.moe.as_ref()?;
        let groups = moe.tiers.iter().enumerate().flat_map(|(tier, config)| {
            (0..config.groups).map(move |group| {
                format!("layers.{layer}.tiers.{tier}.groups.{group}.router.experts")
            })
        });
        return Some(groups.collect());
    }
    let Some(of_experts) = block.strip_prefix("experts.") else {
        return at(&format!("ffn.{}", matrix_of(block)?));
    };
    let moe = config.moe.as_ref()?;
    let expert = |flat: usize, matrix: &str| {
        let ExpertKey { tier, group, expert, .. } = ExpertKey::from_flat(moe, layer, flat)?;
        Some(format!("layers.{layer}.tiers.{tier}.groups.{group}.experts.{expert}.{matrix}"))
    };
    match of_experts.split_once('.') {
        Some((flat, matrix)) => Some(vec![expert(flat.parse().ok()?, matrix_of(matrix)?)?]),
        None => {
            let matrices: &[&str] = match of_experts {
                "gate_up_proj" => &["gate", "up"],
                other => &[matrix_of(other)?],
            };
            let all = (0..moe.experts()).flat_map(|e| matrices.iter().map(move |m| (e, *m)));
            all.map(|(e, matrix)| expert(e, matrix)).collect()
        }
    }
}

/// Our name of a matrix of a gated network.
fn matrix_of(name: &str) -> Option<&'static str> {
    match name {
        "gate_proj" | "w1" => Some("gate"),
        "up_proj" | "w3" => Some("up"),
        "down_proj" | "w2" => Some("down"),
        _ => None,
    }
}
