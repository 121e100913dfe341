//! The metadata of a file as the keys of a `config.json`.
//!
//! Whether chosen experts' weights are renormalised is no key of these files: llama.cpp knows it by
//! the class, and so does this. As there, tokens that are spelled like the end of a turn end a text,
//! beside those that the file names.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{Metadata, file::Info, rope, tokenizer};
use crate::import::{ImportError, keys::Keys};

const ARCHITECTURE: &str = "general.architecture";

/// Keys of a `config.json` in the making, and the names of each in the file.
pub(super) struct Translated<'a> {
    metadata: &'a Metadata<'a>,
    architecture: &'a str,
    keys: Map<String, Value>,
    names: HashMap<String, String>,
}

impl Translated<'_> {
    /// A key of the class in the file.
    pub(super) fn of_class(&self, rest: &str) -> String {
        format!("{}.{rest}", self.architecture)
    }

    /// Takes a value that the file says under another name, or in another way.
    pub(super) fn set(&mut self, to: &str, name: impl Into<String>, value: Value) {
        self.keys.insert(to.into(), value);
        self.name(to, name);
    }

    /// Names a key, and those within it as `table.key`.
    pub(super) fn name(&mut self, key: &str, name: impl Into<String>) {
        self.names.insert(key.into(), name.into());
    }

    /// Takes one number. Converters write a list where layers might differ.
    fn number(&mut self, to: &str, rest: &str) -> Result<(), ImportError> {
        let name = self.of_class(rest);
        let value = match self.metadata.get(&name) {
            None => None,
            Some(Value::Array(list)) => {
                let first = list.first().filter(|first| list.iter().all(|n| n == *first));
                let expected = "a number, or as many equal ones, is expected: layers that differ \
                                in it are not known here";
                Some(first.ok_or_else(|| self.metadata.wrong(&name, expected))?)
            }
            value => value,
        };
        if let Some(value) = value {
            self.keys.insert(to.into(), value.clone());
        }
        self.name(to, name);
        Ok(())
    }
}

/// The keys that [`crate::import::hf_config`] reads. `factors` are those of rotary frequencies.
pub(super) fn translate(
    metadata: &Metadata<'_>,
    tensors: &[Info],
    factors: rope::Factors,
) -> Result<Keys, ImportError> {
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
    let (keys, names) = (Map::new(), HashMap::new());
    let mut found = Translated { metadata, architecture, keys, names };
    found.set("model_type", ARCHITECTURE, class.into());
    for (from, to) in [
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
    ] {
        metadata.need(&key(from))?;
        found.number(to, from)?;
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
        found.number(to, from)?;
    }
    rope::translate(metadata, &mut found, factors)?;
    // Older files of Qwen's classes leave these widths to the tensors.
    for (to, suffix) in [
        ("moe_intermediate_size", ".ffn_gate_exps.weight"),
        ("shared_expert_intermediate_size", ".ffn_gate_shexp.weight"),
    ] {
        let tensor = tensors.iter().find(|info| info.name.ends_with(suffix));
        if let Some([.., width, _]) = tensor.map(|info| &info.shape[..])
            && !found.keys.contains_key(to)
        {
            found.set(to, format!("rows of *{suffix}"), json!(width));
        }
    }

    let find = |name: &str| tensors.iter().find(|info| info.name == name);
    let vocab = find("token_embd.weight").and_then(|info| info.shape.first());
    let vocab =
        vocab.copied().or_else(|| Some(metadata.get("tokenizer.ggml.tokens")?.as_array()?.len()));
    found.set("vocab_size", "rows of token_embd.weight", json!(vocab));
    let keys = &mut found.keys;
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

    let bos = "tokenizer.ggml.bos_token_id";
    if let Some(id) = metadata.get(bos) {
        found.set("bos_token_id", bos, id.clone());
    }
    let ends = ["eos", "eot", "eom"].map(|role| format!("tokenizer.ggml.{role}_token_id"));
    let mut ends: Vec<_> = ends.iter().filter_map(|key| metadata.get(key)).cloned().collect();
    ends.extend(tokenizer::ends(metadata)?.into_iter().map(Value::from));
    found.set("eos_token_id", "tokenizer.ggml.eos_token_id (or eot, eom)", ends.into());
    Ok(Keys::spelled(metadata.path, found.keys, found.names))
}
