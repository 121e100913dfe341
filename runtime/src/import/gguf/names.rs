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
    let Some(to) = found(&LAYER, stem) else {
        return plain(name.into());
    };
    let order = match config.architecture == "mixtral" && matches!(stem, "attn_q" | "attn_k") {
        true => RowOrder::Interleaved { head: config.attention.head_dim },
        false => RowOrder::Plain,
    };
    (format!("model.layers.{layer}.{to}.{end}"), order)
}
