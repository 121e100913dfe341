//! The metadata of a file as the keys of a `config.json`.
//!
//! Whether chosen experts' weights are renormalised is no key of these files: llama.cpp knows it by
//! the class, and so does this. As there, tokens that are spelled like the end of a turn end a text,
//! beside those that the file names.

use serde_json::{Map, Value, json};

use super::{Metadata, file::Info, tokenizer};
use crate::import::ImportError;

const ARCHITECTURE: &str = "general.architecture";

/// The keys that [`crate::import::hf_config`] reads.
pub(super) fn translate(
    metadata: &Metadata<'_>,
    tensors: &[Info],
) -> Result<Map<String, Value>, ImportError> {
    if metadata.get("split.count").and_then(Value::as_u64).is_some_and(|parts| parts > 1) {
        return Err(metadata.wrong(
            "split.count",
            "a file in one part is expected: join them with llama.cpp's llama-gguf-split --merge",
        ));
    }
    let architecture = metadata.optional_text(ARCHITECTURE)?.unwrap_or("missing");
    let key = |rest: &str| format!("{architecture}.{rest}");
    let has_experts = metadata.get(&key("expert_count")).and_then(Value::as_u64).unwrap_or(0) > 0;
    let class = match architecture {
        "llama" if has_experts => "mixtral",
        "olmoe" => "olmoe",
        "qwen2moe" => "qwen2_moe",
        "qwen3moe" => "qwen3_moe",
        other => {
            let path = metadata.path.display().to_string();
            return Err(ImportError::Architecture { path, found: format!("{other:?}") });
        }
    };
    let mut keys = Map::new();
    keys.insert("model_type".into(), class.into());
    for (from, to) in [
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
    ] {
        keys.insert(to.into(), metadata.need(&key(from))?.clone());
    }
    for (from, to) in [
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.clamp_kqv", "clip_qkv"),
        ("attention.sliding_window", "sliding_window"),
        ("feed_forward_length", "intermediate_size"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ] {
        if let Some(value) = metadata.get(&key(from)) {
            keys.insert(to.into(), value.clone());
        }
    }
    let theta = metadata.get(&key("rope.freq_base")).cloned().unwrap_or_else(|| json!(10000.0));
    keys.insert("rope_theta".into(), theta);
    // As llama.cpp: linear where no type stands, and a factor of 0 is none.
    let scaling = key("rope.scaling.type");
    match metadata.optional_text(&scaling)? {
        Some("none") => {}
        None | Some("linear") => {
            let factors = ["rope.scaling.factor", "rope.scale_linear"].map(key);
            let factor = factors.iter().find_map(|key| metadata.get(key));
            if let Some(factor) = factor.filter(|f| !matches!(f.as_f64(), Some(0.0 | 1.0))) {
                keys.insert("rope_scaling".into(), json!({ "type": "linear", "factor": factor }));
            }
        }
        Some(_) => return Err(metadata.wrong(&scaling, "only none and linear are known")),
    }
    let attention_factor = key("rope.scaling.attn_factor");
    if metadata.get(&attention_factor).is_some_and(|f| f.as_f64() != Some(1.0)) {
        return Err(metadata.wrong(&attention_factor, "only 1 is known"));
    }
    // Older files of Qwen's classes leave these widths to the tensors.
    for (to, suffix) in [
        ("moe_intermediate_size", ".ffn_gate_exps.weight"),
        ("shared_expert_intermediate_size", ".ffn_gate_shexp.weight"),
    ] {
        let tensor = tensors.iter().find(|info| info.name.ends_with(suffix));
        if let Some([.., width, _]) = tensor.map(|info| &info.shape[..])
            && !keys.contains_key(to)
        {
            keys.insert(to.into(), json!(width));
        }
    }

    let find = |name: &str| tensors.iter().find(|info| info.name == name);
    let vocab = find("token_embd.weight").and_then(|info| info.shape.first());
    let vocab =
        vocab.copied().or_else(|| Some(metadata.get("tokenizer.ggml.tokens")?.as_array()?.len()));
    keys.insert("vocab_size".into(), json!(vocab));
    keys.insert("tie_word_embeddings".into(), find("output.weight").is_none().into());
    keys.insert("norm_topk_prob".into(), (class == "qwen3_moe").into());
    let bias = find("blk.0.attn_q.bias").is_some();
    keys.insert(
        if class == "qwen2_moe" { "qkv_bias" } else { "attention_bias" }.into(),
        bias.into(),
    );
    let dense = tensors.iter().filter_map(|info| {
        info.name.strip_prefix("blk.")?.strip_suffix(".ffn_gate.weight")?.parse::<u64>().ok()
    });
    keys.insert("mlp_only_layers".into(), dense.collect());

    if let Some(id) = metadata.get("tokenizer.ggml.bos_token_id") {
        keys.insert("bos_token_id".into(), id.clone());
    }
    let ends = ["eos", "eot", "eom"].map(|role| format!("tokenizer.ggml.{role}_token_id"));
    let mut ends: Vec<_> = ends.iter().filter_map(|key| metadata.get(key)).cloned().collect();
    ends.extend(tokenizer::ends(metadata)?.into_iter().map(Value::from));
    keys.insert("eos_token_id".into(), ends.into());
    Ok(keys)
}
