//! `config.json` of the four known classes, in the style of transformers 4 and 5.
//!
//! The result is the model as published: one tier of one group. Defaults of a class stand in for
//! a key only where published files leave it out; sizes must be there. What cannot be computed
//! here (another activation, another kind of rope, quantised weights) is refused, never ignored.

use std::path::Path;

use serde_json::Value;
use tracing::warn;

pub(super) use super::keys::Keys;
use super::{ImportError, hf_rope, tiers::flat_tier};
use crate::config::{
    AttentionConfig, ConfigError, FeedForward, LAYERS_MAX, LayerConfig, ModelConfig, MoeConfig,
    QkNorm, RoutingConfig, Scoring, SharedExpertConfig,
};

/// Name of the file.
pub const CONFIG: &str = "config.json";
/// Classes that are known, for messages.
pub const KNOWN: &str = "mixtral, olmoe, qwen2_moe and qwen3_moe";
const GENERATION: &str = "generation_config.json";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Mixtral,
    Olmoe,
    Qwen2Moe,
    Qwen3Moe,
}

const CLASSES: [(Class, &str, &str); 4] = [
    (Class::Mixtral, "mixtral", "MixtralForCausalLM"),
    (Class::Olmoe, "olmoe", "OlmoeForCausalLM"),
    (Class::Qwen2Moe, "qwen2_moe", "Qwen2MoeForCausalLM"),
    (Class::Qwen3Moe, "qwen3_moe", "Qwen3MoeForCausalLM"),
];

/// Reads the configuration of a folder.
pub fn read(dir: &Path) -> Result<ModelConfig, ImportError> {
    let generation = dir.join(GENERATION);
    let generation = if generation.exists() { Some(Keys::read(&generation)?) } else { None };
    parse(&Keys::read(&dir.join(CONFIG))?, generation.as_ref())
}

/// Understands the keys of a configuration, and those that say how to generate.
pub(super) fn parse(file: &Keys, generation: Option<&Keys>) -> Result<ModelConfig, ImportError> {
    let (class, name) = class(file)?;
    refuse_unknown_computation(file)?;

    let hidden = file.size("hidden_size")?;
    let heads = file.size("num_attention_heads")?;
    let kv_heads = file.optional_size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = match file.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let name = file.name("hidden_size");
            let expected = format!("{heads} heads do not divide {name} {hidden} either");
            return Err(file.wrong("head_dim", &expected));
        }
    };
    let context = file.size("max_position_embeddings")?;
    let default_theta = if class == Class::Mixtral { 1e6 } else { 1e4 };
    let rope = hf_rope::read(file, default_theta, context)?;
    let bias = match class {
        Class::Mixtral => false,
        Class::Qwen2Moe => file.flag("qkv_bias", true)?,
        Class::Olmoe | Class::Qwen3Moe => file.flag("attention_bias", false)?,
    };
    let attention = AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        qk_norm: match class {
            Class::Mixtral | Class::Qwen2Moe => QkNorm::None,
            Class::Olmoe => QkNorm::Whole,
            Class::Qwen3Moe => QkNorm::PerHead,
        },
        qkv_bias: bias,
        output_bias: bias && class != Class::Qwen2Moe,
        clip_qkv: match class {
            Class::Olmoe => file.optional_number("clip_qkv")?.map(|v| v as f32),
            _ => None,
        },
    };
    let layers = layers(file, class)?;
    let sparse = layers.iter().filter(|l| l.feed_forward == FeedForward::Sparse).count();
    let moe = if sparse > 0 { Some(moe(file, class, hidden, sparse)?) } else { None };
    let vocab = file.size("vocab_size")?;
    let (bos_token, eos_tokens) = special_tokens(file, generation, vocab)?;
    let config = ModelConfig {
        architecture: name.into(),
        vocab,
        hidden,
        context,
        norm_eps: file.number("rms_norm_eps")? as f32,
        tied_embeddings: file.flag("tie_word_embeddings", false)?,
        attention,
        layers,
        moe,
        bos_token,
        eos_tokens,
    };
    let table = rope.table.as_ref().unwrap_or(file);
    config.check().map_err(|error| named(file, table, class, &config, error))?;
    Ok(config)
}

/// An error of a configuration, by the key of the file that says the value. `rope` are the keys of
/// rope scaling.
fn named(
    file: &Keys,
    rope: &Keys,
    class: Class,
    config: &ModelConfig,
    error: ConfigError,
) -> ImportError {
    const ROPE: &str = "attention.rope_scaling.";
    let field = error.field.as_str();
    let last = field.rsplit('.').next().unwrap_or(field);
    let key = match field {
        "hidden" => file.name("hidden_size"),
        "vocab" => file.name("vocab_size"),
        "context" => file.name("max_position_embeddings"),
        "layers" => file.name("num_hidden_layers"),
        "norm_eps" => file.name("rms_norm_eps"),
        "attention.heads" => file.name("num_attention_heads"),
        "attention.kv_heads" => file.name("num_key_value_heads"),
        "attention.head_dim" if file.value("head_dim").is_some() => file.name("head_dim"),
        "attention.head_dim" => {
            format!("{} / {}", file.name("hidden_size"), file.name("num_attention_heads"))
        }
        "attention.rope_theta" if rope.has("rope_theta") => rope.name("rope_theta"),
        "attention.rope_theta" => file.name("rope_theta"),
        "attention.clip_qkv" => file.name("clip_qkv"),
        "moe.routing (routes of a token)" => file.name("num_experts_per_tok"),
        "moe.shared.intermediate" => file.name("shared_expert_intermediate_size"),
        _ if field.starts_with(ROPE) => match last {
            // It may stand beside the others' table.
            "original" if file.has(hf_rope::ORIGINAL) => file.name(hf_rope::ORIGINAL),
            "original" => rope.name(hf_rope::ORIGINAL),
            "short" | "long" => rope.name(&format!("{last}_factor")),
            last => rope.name(last),
        },
        _ if field.starts_with("layers.") => match last {
            "window" => file.name("sliding_window"),
            _ => file.name("intermediate_size"),
        },
        _ if field.starts_with("moe.tiers.") => match last {
            "intermediate" => file.name(expert_width(class)),
            _ => file.name(experts_key(file, class)),
        },
        // A field of ours that no file says.
        other => format!("{} ({} model)", other, config.architecture),
    };
    let ConfigError { found, expected, .. } = error;
    ImportError::Key { path: file.path().into(), key, found, expected }
}

/// The key that says the inner width of an expert.
fn expert_width(class: Class) -> &'static str {
    match class {
        Class::Mixtral | Class::Olmoe => "intermediate_size",
        Class::Qwen2Moe | Class::Qwen3Moe => "moe_intermediate_size",
    }
}

/// The key that says how many experts a layer has: it has two names, and both may be there.
fn experts_key(file: &Keys, class: Class) -> &'static str {
    const KEYS: [&str; 2] = ["num_experts", "num_local_experts"];
    let own = KEYS[usize::from(class == Class::Mixtral)];
    KEYS.into_iter().find(|key| file.value(key).is_some()).unwrap_or(own)
}

fn experts(file: &Keys, class: Class) -> Result<usize, ImportError> {
    match (file.optional_size("num_experts")?, file.optional_size("num_local_experts")?) {
        (Some(a), Some(b)) if a != b => {
            let other = file.name("num_local_experts");
            Err(file.wrong("num_experts", &format!("{b} is expected by {other}")))
        }
        (Some(experts), _) | (None, Some(experts)) => Ok(experts),
        (None, None) => Err(file.wrong(experts_key(file, class), "a whole number is expected")),
    }
}

fn class(file: &Keys) -> Result<(Class, &'static str), ImportError> {
    let unknown = |found: &Value| ImportError::Architecture {
        path: file.path().into(),
        found: found.to_string(),
    };
    let architecture = file.value("architectures").map(|list| list.get(0).unwrap_or(list));
    let model_type = file.value("model_type");
    let by_type = CLASSES.iter().find(|c| model_type.is_some_and(|t| t == c.1));
    let by_name = CLASSES.iter().find(|c| architecture.is_some_and(|a| a == c.2));
    match (model_type, architecture, by_type, by_name) {
        (None, None, ..) => Err(file.wrong("model_type", "expected the name of a class")),
        (Some(found), _, None, _) | (_, Some(found), _, None) => Err(unknown(found)),
        (_, _, Some(a), Some(b)) if a.0 != b.0 => {
            Err(file.wrong("architectures", &format!("expected {:?} by model_type", a.2)))
        }
        (_, _, Some(class), _) | (_, _, None, Some(class)) => Ok((class.0, class.1)),
    }
}

fn refuse_unknown_computation(file: &Keys) -> Result<(), ImportError> {
    // Two names of one function.
    if file.value("hidden_act").is_some_and(|act| act != "silu" && act != "swish") {
        return Err(file.wrong("hidden_act", "only \"silu\" is known"));
    }
    if file.value("quantization_config").is_some() {
        return Err(file.wrong(
            "quantization_config",
            "quantised folders are not read; use the original weights",
        ));
    }
    Ok(())
}

fn layers(file: &Keys, class: Class) -> Result<Vec<LayerConfig>, ImportError> {
    let count = file.size("num_hidden_layers")?;
    if count > LAYERS_MAX {
        return Err(file.wrong("num_hidden_layers", &format!("at most {LAYERS_MAX} is expected")));
    }
    let qwen = matches!(class, Class::Qwen2Moe | Class::Qwen3Moe);
    let (step, dense_layers) = match qwen {
        true => (
            file.optional_size("decoder_sparse_step")?.unwrap_or(1),
            file.sizes("mlp_only_layers")?.unwrap_or_default(),
        ),
        false => (1, vec![]),
    };
    if step == 0 {
        return Err(file.wrong("decoder_sparse_step", "at least 1 is expected"));
    }
    // `num_experts` of 0 is how a Qwen configuration says that every layer is dense.
    let no_experts = qwen && experts(file, class)? == 0;
    let windows = windows(file, class, count)?;
    let mut layers = Vec::with_capacity(count);
    for (i, window) in windows.into_iter().enumerate() {
        let dense = no_experts || dense_layers.contains(&i) || !(i + 1).is_multiple_of(step);
        let feed_forward = match dense {
            true => FeedForward::Dense { intermediate: file.size("intermediate_size")? },
            false => FeedForward::Sparse,
        };
        layers.push(LayerConfig { window, feed_forward });
    }
    Ok(layers)
}

/// Windows as transformers 5 applies them. Mixtral: in every layer. Qwen3-MoE: in every layer
/// if `use_sliding_window`. Qwen2-MoE: if `use_sliding_window`, in the layers that `layer_types`
/// names or, without it, in every second of the first `max_window_layers`.
fn windows(file: &Keys, class: Class, count: usize) -> Result<Vec<Option<u32>>, ImportError> {
    let used = match class {
        Class::Olmoe => false,
        Class::Mixtral => true,
        Class::Qwen2Moe | Class::Qwen3Moe => file.flag("use_sliding_window", false)?,
    };
    // A Qwen file that only switches windows on means the classes' own default.
    let default = if class == Class::Mixtral { None } else { Some(4096) };
    let window = match (used, file.has("sliding_window")) {
        (false, _) => None,
        (true, true) => match file.optional_size("sliding_window")? {
            // Transformers masks everything then: nobody's model.
            Some(0) => return Err(file.wrong("sliding_window", "1 or more, or null for none")),
            window => window,
        },
        (true, false) => default,
    };
    let window = match window.map(u32::try_from) {
        None => None,
        Some(Ok(window)) => Some(window),
        Some(Err(_)) => return Err(file.wrong("sliding_window", "less than 2^32 is expected")),
    };
    if class != Class::Qwen2Moe || window.is_none() {
        return Ok(vec![window; count]);
    }
    let Some(types) = file.value("layer_types") else {
        let limit = file.optional_size("max_window_layers")?.unwrap_or(28);
        return Ok((0..count).map(|i| window.filter(|_| i % 2 == 0 && i < limit)).collect());
    };
    let kinds = types.as_array().filter(|list| list.len() == count);
    let expected = || file.wrong("layer_types", &format!("a list of {count} names is expected"));
    let mut windows = Vec::with_capacity(count);
    for kind in kinds.ok_or_else(expected)? {
        windows.push(match kind.as_str() {
            Some("sliding_attention") => window,
            // The second is an old name.
            Some("full_attention" | "attention") => None,
            _ => {
                return Err(file.wrong(
                    "layer_types",
                    "only \"full_attention\" and \"sliding_attention\" are known",
                ));
            }
        });
    }
    Ok(windows)
}

fn moe(file: &Keys, class: Class, hidden: usize, sparse: usize) -> Result<MoeConfig, ImportError> {
    let key = experts_key(file, class);
    let experts = experts(file, class)?;
    let intermediate = file.size(expert_width(class))?;
    let k = file.size("num_experts_per_tok")?;
    for (key, n) in [(key, experts), ("num_experts_per_tok", k)] {
        if n == 0 {
            return Err(file.wrong(key, "at least 1 is expected"));
        }
    }
    if k > experts {
        let expected = format!("at most {} ({experts}) is expected", file.name(key));
        return Err(file.wrong("num_experts_per_tok", &expected));
    }
    let too_many = |key| file.wrong(key, "less than 2^32 is expected");
    let experts = u32::try_from(experts).map_err(|_| too_many(key))?;
    let k = u32::try_from(k).map_err(|_| too_many("num_experts_per_tok"))?;
    let shared = match class {
        Class::Qwen2Moe => {
            let intermediate = file.size("shared_expert_intermediate_size")?;
            Some(SharedExpertConfig { intermediate, gated: true })
        }
        _ => None,
    };
    let expert_parameters = (hidden as u64).saturating_mul(3).saturating_mul(intermediate as u64);
    Ok(MoeConfig {
        intermediate,
        tiers: vec![flat_tier(experts, expert_parameters, sparse)],
        routing: RoutingConfig {
            k_tier: 1,
            k_group: 1,
            k_expert: k,
            scoring: Scoring::SoftmaxTopK,
            renormalize: match class {
                Class::Mixtral => true,
                _ => file.flag("norm_topk_prob", false)?,
            },
            seed: 0,
        },
        shared,
    })
}

/// The token that begins a text, and all that end one: generation_config.json may name more. Ids
/// that are none of the vocabulary's can never come; published files have them (transformers
/// loads those, too), so they are left out with a word.
fn special_tokens(
    file: &Keys,
    generation: Option<&Keys>,
    vocab: usize,
) -> Result<(Option<u32>, Vec<u32>), ImportError> {
    let ids = |keys: &Keys, key: &str| -> Result<Vec<u32>, ImportError> {
        let all = match keys.value(key) {
            None => &[],
            Some(Value::Array(list)) => &list[..],
            Some(one) => std::slice::from_ref(one),
        };
        let mut ids = Vec::new();
        for value in all {
            let Some(id) = value.as_i64() else {
                return Err(keys.wrong(key, "token ids are expected"));
            };
            match u32::try_from(id) {
                Ok(id) if (id as usize) < vocab => ids.push(id),
                _ => warn!(
                    "{}: {} {id} is left out: the model's vocabulary has {vocab} tokens",
                    keys.path(),
                    keys.name(key)
                ),
            }
        }
        Ok(ids)
    };
    let bos = match file.value("bos_token_id") {
        Some(Value::Array(_)) => return Err(file.wrong("bos_token_id", "one token id is expected")),
        _ => ids(file, "bos_token_id")?.first().copied(),
    };
    let mut eos = Vec::new();
    for keys in [Some(file), generation].into_iter().flatten() {
        for id in ids(keys, "eos_token_id")? {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
    }
    Ok((bos, eos))
}
