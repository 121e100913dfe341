//! The classes of transformers: which of them computes what a model does, its `config.json`, and the names of
//! its tensors.

use lite_llm_kernels::dtype::DType;
use serde_json::{Value, json};

use crate::config::{FeedForward, ModelConfig, MoeConfig, QkNorm, RopeScaling};

/// A class that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// MixtralForCausalLM.
    Mixtral,
    /// OlmoeForCausalLM.
    Olmoe,
    /// Qwen2MoeForCausalLM.
    Qwen2Moe,
    /// Qwen3MoeForCausalLM.
    Qwen3Moe,
}

use Class::{Mixtral, Olmoe, Qwen2Moe, Qwen3Moe};

/// A reason against a class unless a condition holds.
fn require(holds: bool, reason: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(reason.into()) }
}

impl Class {
    const ALL: [Self; 4] = [Mixtral, Olmoe, Qwen2Moe, Qwen3Moe];

    /// The class of a model: the one that it was imported from, else the first that fits. Or what of each
    /// does not fit.
    pub fn of(config: &ModelConfig) -> Result<Self, String> {
        let moe = one_tier(config)?;
        let mut classes = Self::ALL;
        classes.sort_by_key(|class| class.model_type() != config.architecture);
        let mut reasons = Vec::new();
        for class in classes {
            match class.fits(config, moe) {
                Ok(()) => return Ok(class),
                Err(reason) => reasons.push(format!("{} {reason}", class.architecture())),
            }
        }
        Err(reasons.join("; "))
    }

    /// Its name in `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Mixtral => "mixtral",
            Olmoe => "olmoe",
            Qwen2Moe => "qwen2_moe",
            Qwen3Moe => "qwen3_moe",
        }
    }

    /// Its name in `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Mixtral => "MixtralForCausalLM",
            Olmoe => "OlmoeForCausalLM",
            Qwen2Moe => "Qwen2MoeForCausalLM",
            Qwen3Moe => "Qwen3MoeForCausalLM",
        }
    }

    fn is_qwen(self) -> bool {
        matches!(self, Qwen2Moe | Qwen3Moe)
    }

    /// Says what of a model the class cannot compute.
    fn fits(self, config: &ModelConfig, moe: &MoeConfig) -> Result<(), String> {
        let a = &config.attention;
        let norm = match self {
            Mixtral | Qwen2Moe => QkNorm::None,
            Olmoe => QkNorm::Whole,
            Qwen3Moe => QkNorm::PerHead,
        };
        require(a.qk_norm == norm, format!("has qk_norm {norm:?}, the model {:?}", a.qk_norm))?;
        require(self == Olmoe || a.clip_qkv.is_none(), "has no clip_qkv")?;
        let biases = match self {
            Mixtral => !a.qkv_bias && !a.output_bias,
            Qwen2Moe => !a.output_bias,
            Olmoe | Qwen3Moe => a.qkv_bias == a.output_bias,
        };
        require(biases, "has other biases in attention")?;
        let free = matches!(self, Mixtral | Qwen3Moe);
        let divides = a.heads * a.head_dim == config.hidden;
        require(free || divides, "needs heads × head_dim to be the hidden size")?;
        let shared = match moe.shared {
            None => self != Qwen2Moe,
            Some(shared) => self == Qwen2Moe && shared.gated,
        };
        require(shared, "has another shared expert")?;
        require(self != Mixtral || moe.routing.renormalize, "renormalises the weights of routes")?;
        let dense: Vec<usize> = dense_widths(config);
        require(self.is_qwen() || dense.is_empty(), "has no dense layers")?;
        require(dense.windows(2).all(|pair| pair[0] == pair[1]), "has dense layers of one width")?;
        let mut windows: Vec<Option<u32>> = config.layers.iter().map(|l| l.window).collect();
        windows.dedup();
        let windows = match self {
            Olmoe => windows == [None],
            Mixtral | Qwen3Moe => windows.len() == 1,
            Qwen2Moe => {
                let mut some: Vec<u32> = windows.into_iter().flatten().collect();
                some.dedup();
                some.len() <= 1
            }
        };
        require(windows, "has no such windows of attention")?;
        match a.rope_scaling {
            RopeScaling::Dynamic { original, .. } => {
                require(original == config.context, "counts dynamic rope from the model's context")
            }
            _ => Ok(()),
        }
    }

    /// Names of its tensors, in the order of its modules.
    pub fn tensors(self, config: &ModelConfig) -> Vec<String> {
        let mut names = vec!["model.embed_tokens.weight".to_owned()];
        let experts = config.moe.as_ref().map_or(0, MoeConfig::experts);
        let (block, matrices) = match self {
            Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
            _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        for (layer, of) in config.layers.iter().enumerate() {
            let mut add = |rest: String| names.push(format!("model.layers.{layer}.{rest}"));
            add("input_layernorm.weight".into());
            for projection in ["q", "k", "v", "o"] {
                add(format!("self_attn.{projection}_proj.weight"));
                let attention = &config.attention;
                if if projection == "o" { attention.output_bias } else { attention.qkv_bias } {
                    add(format!("self_attn.{projection}_proj.bias"));
                }
            }
            if config.attention.qk_norm != QkNorm::None {
                add("self_attn.q_norm.weight".into());
                add("self_attn.k_norm.weight".into());
            }
            add("post_attention_layernorm.weight".into());
            if let FeedForward::Dense { .. } = of.feed_forward {
                matrices.iter().for_each(|matrix| add(format!("mlp.{matrix}.weight")));
                continue;
            }
            add(format!("{block}.gate.weight"));
            for expert in 0..experts {
                for matrix in matrices {
                    add(format!("{block}.experts.{expert}.{matrix}.weight"));
                }
            }
            if self == Qwen2Moe {
                matrices.iter().for_each(|m| add(format!("mlp.shared_expert.{m}.weight")));
                add("mlp.shared_expert_gate.weight".into());
            }
        }
        names.push("model.norm.weight".into());
        if !config.tied_embeddings {
            names.push("lm_head.weight".into());
        }
        names
    }

    /// Its configuration, in the style of published folders, which transformers 4 and 5 read.
    pub fn config(self, config: &ModelConfig, dtype: DType) -> Value {
        let a = &config.attention;
        let default = MoeConfig::without_experts();
        let moe = config.moe.as_ref().unwrap_or(&default);
        let mut file = json!({
            "architectures": [self.architecture()],
            "model_type": self.model_type(),
            "bos_token_id": config.bos_token,
            "eos_token_id": config.eos_tokens.first(),
            "hidden_act": "silu",
            "hidden_size": config.hidden,
            "intermediate_size": moe.intermediate(0),
            "max_position_embeddings": config.context,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.kv_heads,
            "num_hidden_layers": config.layers.len(),
            "num_experts_per_tok": moe.routing.k_expert,
            "rms_norm_eps": shortest(config.norm_eps),
            "rope_theta": a.rope_theta,
            "rope_scaling": scaling(&a.rope_scaling),
            "tie_word_embeddings": config.tied_embeddings,
            "torch_dtype": if dtype == DType::Bf16 { "bfloat16" } else { "float32" },
            "use_cache": true,
            "vocab_size": config.vocab,
        });
        let mut set = |key: &str, value: Value| file[key] = value;
        let experts = if self == Mixtral { "num_local_experts" } else { "num_experts" };
        set(experts, json!(moe.experts()));
        if matches!(self, Mixtral | Qwen3Moe) {
            set("head_dim", json!(a.head_dim));
        }
        if self != Mixtral {
            set("norm_topk_prob", json!(moe.routing.renormalize));
        }
        match self {
            Olmoe => set("clip_qkv", a.clip_qkv.map_or(Value::Null, |clip| json!(shortest(clip)))),
            Mixtral => set("sliding_window", json!(config.layers.iter().find_map(|l| l.window))),
            _ => {}
        }
        match self {
            Olmoe | Qwen3Moe => set("attention_bias", json!(a.qkv_bias)),
            Qwen2Moe => set("qkv_bias", json!(a.qkv_bias)),
            Mixtral => {}
        }
        if self.is_qwen() {
            let is_dense =
                |layer: &usize| config.layers[*layer].feed_forward != FeedForward::Sparse;
            let dense: Vec<usize> = (0..config.layers.len()).filter(is_dense).collect();
            let window = config.layers.iter().find_map(|layer| layer.window);
            set("moe_intermediate_size", json!(moe.intermediate(0)));
            let width = dense_widths(config).first().copied();
            set("intermediate_size", json!(width.unwrap_or(moe.intermediate(0))));
            set("decoder_sparse_step", json!(1));
            set("mlp_only_layers", json!(dense));
            set("use_sliding_window", json!(window.is_some()));
            set("sliding_window", json!(window));
            if self == Qwen2Moe {
                let width = moe.shared.map_or(0, |shared| shared.intermediate);
                set("shared_expert_intermediate_size", json!(width));
                let kind = |window: Option<u32>| match window {
                    Some(_) => "sliding_attention",
                    None => "full_attention",
                };
                let kinds = config.layers.iter().map(|layer| json!(kind(layer.window)));
                set("layer_types", kinds.collect());
            }
        }
        file
    }
}

/// The experts of a model that any class could have.
fn one_tier(config: &ModelConfig) -> Result<&MoeConfig, String> {
    let moe = config.moe.as_ref().ok_or("it has no experts")?;
    let names: Vec<&str> = moe.tiers.iter().map(|tier| tier.id.as_str()).collect();
    require(
        names.len() == 1,
        format!(
            "they route over experts alone, and it has the tiers {}; export a model of one tier",
            names.join(", ")
        ),
    )?;
    let groups = moe.tiers[0].groups;
    require(groups == 1, format!("they route over experts alone, and it has {groups} groups"))?;
    Ok(moe)
}

/// Inner widths of the dense layers.
fn dense_widths(config: &ModelConfig) -> Vec<usize> {
    let width = |layer: &crate::config::LayerConfig| match layer.feed_forward {
        FeedForward::Dense { intermediate } => Some(intermediate),
        FeedForward::Sparse => None,
    };
    config.layers.iter().filter_map(width).collect()
}

/// A number as it would be written by hand: 1e-5, not 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn scaling(scaling: &RopeScaling) -> Value {
    const ORIGINAL: &str = "original_max_position_embeddings";
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Dynamic { factor, .. } => json!({ "rope_type": "dynamic", "factor": factor }),
        RopeScaling::Yarn {
            factor,
            original,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
        } => json!({
            "rope_type": "yarn", "factor": factor, ORIGINAL: original, "truncate": truncate,
            "attention_factor": attention_factor, "beta_fast": beta_fast, "beta_slow": beta_slow,
        }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3", "factor": factor, ORIGINAL: original,
            "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor,
        }),
        RopeScaling::LongRope { short, long, original, attention_factor } => json!({
            "rope_type": "longrope", "short_factor": short, "long_factor": long,
            ORIGINAL: original, "attention_factor": attention_factor,
        }),
    }
}
