//! Writes Hugging Face folders of random weights, of any size, for tests and measurements.
//!
//! Every value is a function of (seed, tensor's name, index): the same shape gives the same bytes
//! on every machine, however many files they are cut into. Memory stays at a few megabytes.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use half::bf16;
use lite_llm_kernels::dtype::DType;
use serde_json::{Map, Value, json};

use super::{ImportError, hf_tensors::INDEX, hf_tensors::SINGLE};
use crate::random::{Purpose, random_u64};

const PIECE_VALUES: usize = 1 << 20;
const STD: f32 = 0.02;

/// Class of the folder, which decides names and the parts that a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RandomClass {
    /// `w1`, `w2`, `w3` below `block_sparse_moe`.
    Mixtral,
    /// Norms over whole q and k.
    Olmoe,
    /// A gated shared expert, biases on q, k and v.
    Qwen2Moe,
    /// Norms over the heads of q and k.
    Qwen3Moe,
}

/// What to write.
#[derive(Debug, Clone)]
pub struct RandomShape {
    /// Class of the model.
    pub class: RandomClass,
    /// Layers, all of them sparse.
    pub layers: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Experts in a layer.
    pub experts: usize,
    /// Experts per token.
    pub k: usize,
    /// Inner width of an expert, and of the shared one.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Entries of the vocabulary, at least 256: the tokenizer has a token for every byte.
    pub vocab: usize,
    /// Positions.
    pub context: usize,
    /// Format of the values.
    pub dtype: DType,
    /// Seed of the values.
    pub seed: u64,
    /// A file is closed when the next tensor would make it larger.
    pub file_bytes: u64,
}

impl RandomShape {
    /// The shape of OLMoE-1B-7B: 6.9 billion parameters, 13.8 GB in bf16.
    pub fn olmoe_1b_7b() -> Self {
        Self {
            class: RandomClass::Olmoe,
            layers: 16,
            hidden: 2048,
            experts: 64,
            k: 8,
            intermediate: 1024,
            heads: 16,
            kv_heads: 16,
            vocab: 50_304,
            context: 4096,
            dtype: DType::Bf16,
            seed: 0,
            file_bytes: 2 << 30,
        }
    }

    /// A model of a few hundred kilobytes.
    pub fn tiny(class: RandomClass) -> Self {
        Self {
            class,
            layers: 2,
            hidden: 64,
            experts: 8,
            k: 2,
            intermediate: 32,
            heads: 4,
            kv_heads: 2,
            vocab: 320,
            context: 512,
            dtype: DType::F32,
            seed: 0,
            file_bytes: 2 << 30,
        }
    }

    fn tensors(&self) -> Vec<Tensor> {
        use RandomClass::*;
        let mut list = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            list.push(Tensor { name, shape: shape.to_vec() });
        };
        let (hidden, inner, head_dim) = (self.hidden, self.intermediate, self.hidden / self.heads);
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        add("model.embed_tokens.weight".into(), &[self.vocab, hidden]);
        for layer in 0..self.layers {
            let at = |rest: &str| format!("model.layers.{layer}.{rest}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(at(&format!("{norm}.weight")), &[hidden]);
            }
            for (name, n, k) in
                [("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)]
            {
                add(at(&format!("self_attn.{name}_proj.weight")), &[n, k]);
                if self.class == Qwen2Moe && name != "o" {
                    add(at(&format!("self_attn.{name}_proj.bias")), &[n]);
                }
            }
            let norms = match self.class {
                Olmoe => Some((q, kv)),
                Qwen3Moe => Some((head_dim, head_dim)),
                Mixtral | Qwen2Moe => None,
            };
            if let Some((q, k)) = norms {
                add(at("self_attn.q_norm.weight"), &[q]);
                add(at("self_attn.k_norm.weight"), &[k]);
            }
            let (block, names) = match self.class {
                Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
                _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
            };
            add(at(&format!("{block}.gate.weight")), &[self.experts, hidden]);
            let shapes = [[inner, hidden], [inner, hidden], [hidden, inner]];
            for expert in 0..self.experts {
                for (name, shape) in names.iter().zip(&shapes) {
                    add(at(&format!("{block}.experts.{expert}.{name}.weight")), shape);
                }
            }
            if self.class == Qwen2Moe {
                for (name, shape) in names.iter().zip(&shapes) {
                    add(at(&format!("mlp.shared_expert.{name}.weight")), shape);
                }
                add(at("mlp.shared_expert_gate.weight"), &[1, hidden]);
            }
        }
        add("model.norm.weight".into(), &[hidden]);
        add("lm_head.weight".into(), &[self.vocab, hidden]);
        list
    }

    fn config(&self) -> Value {
        let (model_type, architecture) = match self.class {
            RandomClass::Mixtral => ("mixtral", "MixtralForCausalLM"),
            RandomClass::Olmoe => ("olmoe", "OlmoeForCausalLM"),
            RandomClass::Qwen2Moe => ("qwen2_moe", "Qwen2MoeForCausalLM"),
            RandomClass::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
        };
        let mut config = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "num_experts_per_tok": self.k,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
            "vocab_size": self.vocab,
        });
        let (key, extra) = match self.class {
            RandomClass::Mixtral => ("num_local_experts", json!({})),
            RandomClass::Olmoe => ("num_experts", json!({ "norm_topk_prob": false })),
            RandomClass::Qwen2Moe => (
                "num_experts",
                json!({
                    "moe_intermediate_size": self.intermediate,
                    "shared_expert_intermediate_size": self.intermediate,
                    "norm_topk_prob": false,
                    "qkv_bias": true,
                }),
            ),
            RandomClass::Qwen3Moe => (
                "num_experts",
                json!({
                    "moe_intermediate_size": self.intermediate,
                    "head_dim": self.hidden / self.heads,
                    "norm_topk_prob": true,
                }),
            ),
        };
        config[key] = json!(self.experts);
        for (key, value) in extra.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
}

impl Tensor {
    fn values(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// Writes a folder: configuration, weights, and a tokenizer of bytes. Returns bytes of weights.
/// `progress` hears bytes done and bytes in all.
pub fn write_random_hf(
    dir: &Path,
    shape: &RandomShape,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, ImportError> {
    fs::create_dir_all(dir).map_err(ImportError::io(dir, "create"))?;
    let write = |name: &str, value: &Value| {
        let path = dir.join(name);
        let mut value = value.clone();
        value.sort_all_objects();
        let text = serde_json::to_vec_pretty(&value).expect("JSON values have string keys");
        fs::write(&path, text).map_err(ImportError::io(&path, "write"))
    };
    write("config.json", &shape.config())?;
    write("tokenizer.json", &byte_tokenizer(shape.vocab))?;

    let value_bytes = value_bytes(shape.dtype);
    let mut files: Vec<Vec<Tensor>> = vec![vec![]];
    let (mut total, mut filled) = (0, 0);
    for tensor in shape.tensors() {
        let bytes = tensor.values() * value_bytes;
        if filled > 0 && filled + bytes > shape.file_bytes {
            files.push(vec![]);
            filled = 0;
        }
        filled += bytes;
        total += bytes;
        files.last_mut().expect("there is always a file").push(tensor);
    }
    let count = files.len();
    let mut weight_map = Map::new();
    let mut done = 0;
    for (i, tensors) in files.iter().enumerate() {
        let name = match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        for tensor in tensors {
            weight_map.insert(tensor.name.clone(), json!(name));
        }
        write_file(&dir.join(name), tensors, shape, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?;
    }
    if count > 1 {
        write(INDEX, &json!({ "metadata": { "total_size": total }, "weight_map": weight_map }))?;
    }
    Ok(total)
}

fn write_file(
    path: &Path,
    tensors: &[Tensor],
    shape: &RandomShape,
    wrote: &mut dyn FnMut(u64),
) -> Result<(), ImportError> {
    let mut header = Map::new();
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.values() * value_bytes(shape.dtype);
        let dtype = match shape.dtype {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            other => unreachable!("{other} is not written to Hugging Face folders"),
        };
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end] });
        header.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path).map_err(ImportError::io(path, "create"))?;
    let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(ImportError::io(path, "write"));
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;

    let mut f32s = vec![0f32; PIECE_VALUES];
    let mut bf16s = vec![bf16::ZERO; PIECE_VALUES];
    for tensor in tensors {
        let stream = shape.seed ^ name_seed(&tensor.name);
        let around = if tensor.name.contains("norm") { 1.0 } else { 0.0 };
        let values = tensor.values();
        let mut from = 0;
        while from < values {
            let piece = (values - from).min(PIECE_VALUES as u64) as usize;
            let bytes: &[u8] = match shape.dtype {
                DType::F32 => {
                    for (i, value) in f32s[..piece].iter_mut().enumerate() {
                        *value = around + normal(stream, from + i as u64);
                    }
                    bytemuck::cast_slice(&f32s[..piece])
                }
                DType::Bf16 => {
                    for (i, value) in bf16s[..piece].iter_mut().enumerate() {
                        *value = bf16::from_f32(around + normal(stream, from + i as u64));
                    }
                    bytemuck::cast_slice(&bf16s[..piece])
                }
                other => unreachable!("{other} is not written to Hugging Face folders"),
            };
            write(bytes)?;
            wrote(bytes.len() as u64);
            from += piece as u64;
        }
    }
    Ok(())
}

/// Bytes of one value in a Hugging Face folder.
fn value_bytes(dtype: DType) -> u64 {
    dtype.bytes().expect("Hugging Face folders hold no blocks of ours") as u64
}

fn name_seed(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    let (word, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*word)
}

/// Nearly normal: the sum of four uniform numbers, scaled to [`STD`].
fn normal(stream: u64, index: u64) -> f32 {
    let bits = random_u64(stream, Purpose::Weights, index);
    let sum = [0, 16, 32, 48].iter().map(|shift| (bits >> shift & 0xffff) as i32).sum::<i32>();
    // Four uniform 16-bit numbers: mean 2 · 65535, variance 4 · (2^32 - 1) / 12.
    (sum - 131_070) as f32 * (STD / 37_837.227)
}

/// A byte-level tokenizer without merges: token b is byte b, further ones are never produced.
fn byte_tokenizer(vocab: usize) -> Value {
    const ENTRIES_MAX: usize = 1024;
    let mut next = 256;
    let mut entries = Map::new();
    for byte in 0..=255u8 {
        // Byte-level tokenizers show printable bytes as themselves and the others from U+0100 on.
        let shown = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as u32,
            _ => {
                next += 1;
                next - 1
            }
        };
        let shown = char::from_u32(shown).expect("below U+0200 every number is a character");
        entries.insert(shown.to_string(), json!(byte));
    }
    for i in 256..vocab.min(ENTRIES_MAX) {
        entries.insert(format!("<extra_{i}>"), json!(i));
    }
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": entries, "merges": []
        }
    })
}
