//! Names of tensors, as llama.cpp's converter writes them and as Hugging Face folders have them.

use crate::{config::ModelConfig, import::tensors::RowOrder};

const MODEL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Below `blk.N.` and below `model.layers.N.`; the ends `.weight` and `.bias` are the same.
const LAYER: [(&str, &str); 16] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Stacks of all experts, which have no end.
const EXPERTS: [(&str, &str); 3] = [
    ("ffn_gate_exps.weight", "mlp.experts.gate_proj"),
    ("ffn_up_exps.weight", "mlp.experts.up_proj"),
    ("ffn_down_exps.weight", "mlp.experts.down_proj"),
];

/// Parts of an expert in a tensor of its own, `blk.N.ffn_gate.E.weight`.
const EXPERT: [(&str, &str); 3] =
    [("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")];

/// What Mixtral's folders call these parts.
const MIXTRAL: [(&str, &str); 3] = [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")];

/// The name in a folder, and the order of rows here: the converter interleaves the rows of q and k
/// of Mixtral, as llama.cpp rotates neighbours there. A name that is not known stays what it is.
pub(super) fn translate(name: &str, config: &ModelConfig) -> (String, RowOrder) {
    let found = |list: &[(&str, &str)], name: &str| {
        list.iter().find(|(from, _)| *from == name).map(|(_, to)| (*to).to_owned())
    };
    let plain = |name: String| (name, RowOrder::Plain);
    if let Some(name) = found(&MODEL, name) {
        return plain(name);
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, rest)) = layer else { return plain(name.into()) };
    if let Some(to) = found(&EXPERTS, rest) {
        return plain(format!("model.layers.{layer}.{to}"));
    }
    let Some((stem, end)) = rest.rsplit_once('.') else { return plain(name.into()) };
    if let Some((part, expert)) = stem.split_once('.')
        && let Some(part) = found(&EXPERT, part)
        && expert.parse::<u32>().is_ok()
    {
        return plain(format!("model.layers.{layer}.mlp.experts.{expert}.{part}.{end}"));
    }
    let Some(to) = found(&LAYER, stem) else {
        return plain(name.into());
    };
    let order = match config.architecture == "mixtral" && matches!(stem, "attn_q" | "attn_k") {
        true => RowOrder::Interleaved { head: config.attention.head_dim },
        false => RowOrder::Plain,
    };
    (format!("model.layers.{layer}.{to}.{end}"), order)
}

/// What a folder's tensor is called in a file with stacks of experts; for messages.
pub(super) fn of_stacked(name: &str) -> String {
    original(name, true).unwrap_or_else(|| name.into())
}

/// What a folder's tensor is called in a file with a tensor for each expert; for messages.
pub(super) fn of_single(name: &str) -> String {
    original(name, false).unwrap_or_else(|| name.into())
}

fn original(name: &str, stacked: bool) -> Option<String> {
    let back = |list: &[(&'static str, &str)], name: &str| {
        list.iter().find(|(_, to)| *to == name).map(|(from, _)| *from)
    };
    if let Some(name) = back(&MODEL, name) {
        return Some(name.into());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let rest = rest.replace("block_sparse_moe", "mlp");
    if let Some(stack) = back(&EXPERTS, &rest) {
        return Some(format!("blk.{layer}.{stack}"));
    }
    let (stem, end) = rest.rsplit_once('.')?;
    let Some(expert) = stem.strip_prefix("mlp.experts.") else {
        return Some(format!("blk.{layer}.{}.{end}", back(&LAYER, stem)?));
    };
    let (expert, part) = expert.split_once('.')?;
    let part = MIXTRAL.iter().find(|(hf, _)| *hf == part).map_or(part, |(_, part)| part);
    let part = back(&EXPERT, part)?;
    Some(match stacked {
        true => format!("blk.{layer}.{part}_exps.{end}"),
        false => format!("blk.{layer}.{part}.{expert}.{end}"),
    })
}
