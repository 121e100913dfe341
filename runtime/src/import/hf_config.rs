//! `config.json` of the four known classes, in the style of transformers 4 and 5.
//!
//! The result is the model as published: one tier of one group. Defaults of a class stand in for
//! a key only where published files leave it out; sizes must be there. What cannot be computed
//! here (another activation, another kind of rope, quantised weights) is refused, never ignored.

use std::path::Path;

use serde_json::{Map, Value};

use super::{ImportError, hf_tensors::read_small, tiers::flat_tier};
use crate::config::{
    AttentionConfig, FeedForward, LAYERS_MAX, LayerConfig, ModelConfig, MoeConfig, QkNorm,
    RopeScaling, RoutingConfig, Scoring, SharedExpertConfig,
};

/// Name of the file.
pub const CONFIG: &str = "config.json";
/// Classes that are known, for messages.
pub const KNOWN: &str = "mixtral, olmoe, qwen2_moe and qwen3_moe";
const GENERATION: &str = "generation_config.json";
const JSON_BYTES_MAX: u64 = 16 << 20;

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
            let expected = format!("{heads} heads do not divide hidden_size {hidden} either");
            return Err(file.wrong("head_dim", &expected));
        }
    };
    let (rope_theta, rope_scaling) = rope(file, class)?;
    let bias = match class {
        Class::Mixtral => false,
        Class::Qwen2Moe => file.flag("qkv_bias", true)?,
        Class::Olmoe | Class::Qwen3Moe => file.flag("attention_bias", false)?,
    };
    let attention = AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        rope_theta,
        rope_scaling,
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
    let (bos_token, eos_tokens) = special_tokens(file, generation)?;
    Ok(ModelConfig {
        architecture: name.into(),
        vocab: file.size("vocab_size")?,
        hidden,
        context: file.size("max_position_embeddings")?,
        norm_eps: file.number("rms_norm_eps")? as f32,
        tied_embeddings: file.flag("tie_word_embeddings", false)?,
        attention,
        layers,
        moe,
        bos_token,
        eos_tokens,
    })
}

fn class(file: &Keys) -> Result<(Class, &'static str), ImportError> {
    let unknown = |found: &Value| ImportError::Architecture {
        path: file.path.clone(),
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

fn rope(file: &Keys, class: Class) -> Result<(f64, RopeScaling), ImportError> {
    // Version 5 moves everything into `rope_parameters`; version 4 has theta beside the scaling.
    // Where a file has both, transformers 5 heeds `rope_scaling`, and theta inside before outside.
    let v5 = file.object("rope_parameters")?;
    let v4 = file.object("rope_scaling")?.filter(|keys| !keys.map.is_empty());
    let table = v4.or(v5);
    let top = file.optional_number("rope_theta")?;
    let inner = match &table {
        Some(keys) => keys.optional_number("rope_theta")?,
        None => None,
    };
    let default = if class == Class::Mixtral { 1e6 } else { 1e4 };
    let theta = inner.or(top).unwrap_or(default);
    for keys in [Some(file), table.as_ref()].into_iter().flatten() {
        if keys.optional_number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(keys.wrong("partial_rotary_factor", "only 1 is known"));
        }
    }
    let Some(keys) = table else { return Ok((theta, RopeScaling::None)) };
    let kind = ["rope_type", "type"].into_iter().find(|key| keys.value(key).is_some());
    let Some(key) = kind else {
        // A table without a type says nothing but theta, or is of a form that is not known here.
        return match keys
            .map
            .keys()
            .find(|key| !matches!(key.as_str(), "rope_theta" | "partial_rotary_factor" | "factor"))
        {
            Some(key) => Err(keys.wrong(key, "no such key of rope parameters is known")),
            None if keys.value("factor").is_some() => {
                Err(keys.wrong("rope_type", "a type is expected beside `factor`"))
            }
            None => Ok((theta, RopeScaling::None)),
        };
    };
    match keys.value(key).and_then(Value::as_str) {
        Some("default") => Ok((theta, RopeScaling::None)),
        Some("linear") => Ok((theta, RopeScaling::Linear { factor: keys.number("factor")? })),
        _ => Err(keys.wrong(key, "only \"default\" and \"linear\" are known")),
    }
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
    let no_experts = qwen && file.experts()? == 0;
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
    let window = match (used, file.map.contains_key("sliding_window")) {
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
    let experts = file.experts()?;
    let intermediate = match class {
        Class::Mixtral | Class::Olmoe => file.size("intermediate_size")?,
        Class::Qwen2Moe | Class::Qwen3Moe => file.size("moe_intermediate_size")?,
    };
    let too_many = |key| file.wrong(key, "less than 2^32 is expected");
    let experts = u32::try_from(experts).map_err(|_| too_many("num_experts"))?;
    let k = file.size("num_experts_per_tok")?;
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

/// The token that begins a text, and all that end one: generation_config.json may name more.
fn special_tokens(
    file: &Keys,
    generation: Option<&Keys>,
) -> Result<(Option<u32>, Vec<u32>), ImportError> {
    let token = |keys: &Keys, id: usize, key: &str| {
        u32::try_from(id).map_err(|_| keys.wrong(key, "token ids are expected"))
    };
    let bos = match file.optional_size("bos_token_id")? {
        Some(id) => Some(token(file, id, "bos_token_id")?),
        None => None,
    };
    let mut eos = Vec::new();
    for keys in [Some(file), generation].into_iter().flatten() {
        for id in keys.sizes("eos_token_id")?.unwrap_or_default() {
            let id = token(keys, id, "eos_token_id")?;
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
    }
    Ok((bos, eos))
}

/// An object of a JSON file, with errors that name file and key.
pub(super) struct Keys {
    path: String,
    prefix: String,
    map: Map<String, Value>,
}

impl Keys {
    pub(super) fn read(path: &Path) -> Result<Self, ImportError> {
        let bytes = read_small(path, JSON_BYTES_MAX)?;
        let map = serde_json::from_slice(&bytes).map_err(|e| {
            ImportError::file(path, e.to_string(), "expected a JSON object; download it again")
        })?;
        Ok(Self::of(path, map))
    }

    /// Keys that `path` says in a form of its own.
    pub(super) fn of(path: &Path, map: Map<String, Value>) -> Self {
        Self { path: path.display().to_string(), prefix: String::new(), map }
    }

    /// The value of a key; `None` if it is absent or null.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// All keys and values, nulls too.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    pub(super) fn wrong(&self, key: &str, expected: &str) -> ImportError {
        let found = self.map.get(key).map_or("missing".into(), Value::to_string);
        ImportError::Key {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            found: found.chars().take(200).collect(),
            expected: expected.into(),
        }
    }

    fn object(&self, key: &str) -> Result<Option<Keys>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, "an object is expected"))?;
        let prefix = format!("{}{key}.", self.prefix);
        Ok(Some(Keys { path: self.path.clone(), prefix, map: map.clone() }))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        size.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 0 is expected"))
    }

    fn size(&self, key: &str) -> Result<usize, ImportError> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| self.wrong(key, "a whole number is expected"))
    }

    /// One number or a list of them.
    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, ImportError> {
        match self.value(key) {
            Some(Value::Array(list)) => {
                let sizes = list.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok()));
                let sizes: Option<Vec<_>> = sizes.collect();
                sizes.map(Some).ok_or_else(|| self.wrong(key, "whole numbers are expected"))
            }
            _ => Ok(self.optional_size(key)?.map(|size| vec![size])),
        }
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(key, "a number is expected"))
    }

    fn number(&self, key: &str) -> Result<f64, ImportError> {
        let number = self.optional_number(key)?;
        number.ok_or_else(|| self.wrong(key, "a number is expected"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ImportError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false is expected"))
    }

    /// Experts in a layer: the key has two names, and both may be there.
    fn experts(&self) -> Result<usize, ImportError> {
        match (self.optional_size("num_experts")?, self.optional_size("num_local_experts")?) {
            (Some(a), Some(b)) if a != b => {
                Err(self.wrong("num_experts", &format!("{b} is expected by num_local_experts")))
            }
            (Some(experts), _) | (None, Some(experts)) => Ok(experts),
            (None, None) => Err(self.wrong("num_experts", "a whole number is expected")),
        }
    }
}
