//! The metadata of a file as the keys of a `config.json`.
//!
//! Whether chosen experts' weights are renormalised is no key of these files: llama.cpp knows it by
//! the class, and so does this.

use serde_json::{Map, Value, json};

use super::{Metadata, file::Info};
use crate::import::ImportError;

const ARCHITECTURE: &str = "general.architecture";

/// The keys that [`crate::import::hf_config`] reads.
pub(super) fn translate(
    metadata: &Metadata<'_>,
    tensors: &[Info],
) -> Result<Map<String, Value>, ImportError> {
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
    if metadata.get("split.count").and_then(Value::as_u64).is_some_and(|parts| parts > 1) {
        return Err(metadata.wrong(
            "split.count",
            "a file in one part is expected: join them with llama.cpp's llama-gguf-split --merge",
        ));
    }

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
    let scaling = key("rope.scaling.type");
    match metadata.optional_text(&scaling)? {
        None | Some("none") => {}
        Some("linear") => {
            let factor = metadata.need(&key("rope.scaling.factor"))?;
            keys.insert("rope_scaling".into(), json!({ "type": "linear", "factor": factor }));
        }
        Some(_) => return Err(metadata.wrong(&scaling, "only none and linear are known")),
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

    let mut special = |from: &[&str], to: &str| {
        let ids = from.iter().filter_map(|key| metadata.get(&format!("tokenizer.ggml.{key}")));
        let mut ids: Vec<_> = ids.cloned().collect();
        ids.dedup();
        if !ids.is_empty() {
            keys.insert(to.into(), if ids.len() == 1 { ids.remove(0) } else { ids.into() });
        }
    };
    special(&["bos_token_id"], "bos_token_id");
    special(&["eos_token_id", "eot_token_id"], "eos_token_id");
    Ok(keys)
}
