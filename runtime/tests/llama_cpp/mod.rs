//! GGUF files as llama.cpp's converter and `llama-quantize` write them, written here from the
//! published layout, apart from the code under test.

use std::{fs, path::Path};

use half::{bf16, f16};
use serde_json::Value;

use crate::hf::{Raw, tensors};

/// A value of the metadata.
#[derive(Clone)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

/// A file to write.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) metadata: Vec<(String, Meta)>,
    /// Name, sizes from the outermost, number of the format, bytes.
    pub(crate) tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl File {
    pub(crate) fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
    }

    /// Bytes of the file, and how many of them come before the data.
    pub(crate) fn bytes(&self) -> (Vec<u8>, usize) {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            let list = |out: &mut Vec<u8>, kind: u32, items: usize| {
                out.extend(9u32.to_le_bytes());
                out.extend(kind.to_le_bytes());
                out.extend((items as u64).to_le_bytes());
            };
            match value {
                Meta::U32(n) => {
                    out.extend(4u32.to_le_bytes());
                    out.extend(n.to_le_bytes());
                }
                Meta::F32(n) => {
                    out.extend(6u32.to_le_bytes());
                    out.extend(n.to_le_bytes());
                }
                Meta::Bool(b) => {
                    out.extend(7u32.to_le_bytes());
                    out.push(u8::from(*b));
                }
                Meta::Text(s) => {
                    out.extend(8u32.to_le_bytes());
                    text(&mut out, s);
                }
                Meta::Texts(all) => {
                    list(&mut out, 8, all.len());
                    all.iter().for_each(|s| text(&mut out, s));
                }
                Meta::F32s(all) => {
                    list(&mut out, 6, all.len());
                    all.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
                Meta::I32s(all) => {
                    list(&mut out, 5, all.len());
                    all.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
            }
        }
        let mut at = 0;
        for (name, shape, dtype, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
            out.extend(dtype.to_le_bytes());
            out.extend((at as u64).to_le_bytes());
            at += bytes.len().next_multiple_of(32);
        }
        let head = out.len();
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        (out, head)
    }

    pub(crate) fn write(&self, path: &Path) {
        fs::write(path, self.bytes().0).unwrap();
    }
}

/// How values of a matrix are written.
pub(crate) type Encode = fn(&str, &[f32]) -> (u32, Vec<u8>);

pub(crate) fn as_f32(_: &str, values: &[f32]) -> (u32, Vec<u8>) {
    (0, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

pub(crate) fn as_bf16(_: &str, values: &[f32]) -> (u32, Vec<u8>) {
    (30, values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect())
}

/// Q8_0 as llama.cpp makes it.
pub(crate) fn as_q8_0(_: &str, values: &[f32]) -> (u32, Vec<u8>) {
    let mut out = Vec::new();
    for block in values.chunks(32) {
        let scale = block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
        out.extend(f16::from_f32(scale).to_le_bytes());
        out.extend(block.iter().map(|v| (v / scale).round() as i8 as u8));
    }
    (8, out)
}

/// Q4_0 as llama.cpp makes it, and Q6_K, with scales of one value, for the head.
pub(crate) fn as_q4_0(name: &str, values: &[f32]) -> (u32, Vec<u8>) {
    let mut out = Vec::new();
    if name == "output.weight" {
        for block in values.chunks(256) {
            let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let d = f16::from_f32(largest / 32.0 / 3.0);
            let q =
                |i: usize| (block[i] / (d.to_f32() * 3.0)).round().clamp(-32.0, 31.0) as i32 + 32;
            let at = |h: usize, g: usize, l: usize| q(128 * h + 32 * g + l) as u8;
            for (h, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                out.extend((0..32).map(|l| at(h, half, l) & 15 | (at(h, half + 2, l) & 15) << 4));
            }
            for h in 0..2 {
                let high = |g, l| (at(h, g, l) >> 4) << (2 * g);
                out.extend((0..32).map(|l| high(0, l) | high(1, l) | high(2, l) | high(3, l)));
            }
            out.extend([3; 16]);
            out.extend(d.to_le_bytes());
        }
        return (14, out);
    }
    for block in values.chunks(32) {
        let largest = block.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        let scale = largest / -8.0;
        out.extend(f16::from_f32(scale).to_le_bytes());
        let q = |i: usize| ((block[i] / scale + 8.5) as i32).clamp(0, 15) as u8;
        out.extend((0..16).map(|i| q(i) | q(i + 16) << 4));
    }
    (2, out)
}

/// What llama.cpp's converter makes of a Hugging Face folder.
pub(crate) fn converted(dir: &Path, encode: Encode) -> File {
    let config: Value =
        serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().map(|n| n as u32);
    let class = config["model_type"].as_str().unwrap();
    let architecture = match class {
        "mixtral" => "llama",
        "qwen2_moe" => "qwen2moe",
        "qwen3_moe" => "qwen3moe",
        other => other,
    };
    let mut file = File { metadata: vec![], tensors: vec![] };
    file.set("general.architecture", Meta::Text(architecture.into()));
    let heads = size("num_attention_heads").unwrap();
    let hidden = size("hidden_size").unwrap();
    let head_dim = size("head_dim").unwrap_or(hidden / heads);
    let theta = [&config["rope_theta"], &config["rope_parameters"]["rope_theta"]];
    let theta = theta.into_iter().find_map(Value::as_f64).unwrap();
    let experts = size("num_local_experts").or(size("num_experts"));
    for (key, value) in [
        ("embedding_length", Some(hidden)),
        ("block_count", size("num_hidden_layers")),
        ("context_length", size("max_position_embeddings")),
        ("feed_forward_length", size("intermediate_size")),
        ("attention.head_count", Some(heads)),
        ("attention.head_count_kv", size("num_key_value_heads")),
        ("attention.key_length", Some(head_dim)),
        ("rope.dimension_count", Some(head_dim)),
        ("expert_count", experts),
        ("expert_used_count", size("num_experts_per_tok")),
        ("expert_feed_forward_length", size("moe_intermediate_size")),
        ("expert_shared_feed_forward_length", size("shared_expert_intermediate_size")),
    ] {
        if let Some(value) = value {
            file.set(&format!("{architecture}.{key}"), Meta::U32(value));
        }
    }
    let eps = config["rms_norm_eps"].as_f64().unwrap() as f32;
    file.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Meta::F32(eps));
    file.set(&format!("{architecture}.rope.freq_base"), Meta::F32(theta as f32));
    vocabulary(&mut file, dir, &config);

    let permuted = |name: &str, raw: &Raw, heads: u32| -> Vec<f32> {
        let values = raw.values();
        if class != "mixtral" {
            return values;
        }
        // [heads, 2, half, k] becomes [heads, half, 2, k].
        let (k, half) = (raw.shape[1], head_dim as usize / 2);
        let mut out = Vec::new();
        for head in 0..heads as usize {
            for i in 0..half {
                for part in 0..2 {
                    let row = (head * 2 + part) * half + i;
                    out.extend(&values[row * k..][..k]);
                }
            }
        }
        assert_eq!(out.len(), values.len(), "{name}");
        out
    };
    let all = tensors(dir);
    let mut add = |name: &str, shape: &[usize], values: &[f32], matrix: bool| {
        let (dtype, bytes) = if matrix { encode(name, values) } else { as_f32(name, values) };
        file.tensors.push((name.into(), shape.to_vec(), dtype, bytes));
    };
    let mut used = 0;
    let mut dense = |from: &str, to: &str, heads: Option<u32>| {
        let Some(raw) = all.get(from) else { return };
        let values = heads.map_or_else(|| raw.values(), |heads| permuted(from, raw, heads));
        let matrix = raw.shape.len() == 2 && !to.contains("gate_inp");
        // The converter drops a first size of 1.
        let shape = if raw.shape[0] == 1 { &raw.shape[1..] } else { &raw.shape[..] };
        add(to, shape, &values, matrix);
        used += 1;
    };
    dense("model.embed_tokens.weight", "token_embd.weight", None);
    dense("model.norm.weight", "output_norm.weight", None);
    dense("lm_head.weight", "output.weight", None);
    for layer in 0..size("num_hidden_layers").unwrap() {
        let from = |rest: &str| format!("model.layers.{layer}.{rest}");
        let to = |rest: &str| format!("blk.{layer}.{rest}");
        for (hf, gguf) in [
            ("input_layernorm.weight", "attn_norm.weight"),
            ("post_attention_layernorm.weight", "ffn_norm.weight"),
            ("self_attn.v_proj.weight", "attn_v.weight"),
            ("self_attn.o_proj.weight", "attn_output.weight"),
            ("self_attn.q_norm.weight", "attn_q_norm.weight"),
            ("self_attn.k_norm.weight", "attn_k_norm.weight"),
            ("self_attn.q_proj.bias", "attn_q.bias"),
            ("self_attn.k_proj.bias", "attn_k.bias"),
            ("self_attn.v_proj.bias", "attn_v.bias"),
            ("mlp.gate.weight", "ffn_gate_inp.weight"),
            ("block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),
            ("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
            ("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight"),
            ("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"),
            ("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight"),
        ] {
            dense(&from(hf), &to(gguf), None);
        }
        dense(&from("self_attn.q_proj.weight"), &to("attn_q.weight"), Some(heads));
        let kv_heads = size("num_key_value_heads").unwrap();
        dense(&from("self_attn.k_proj.weight"), &to("attn_k.weight"), Some(kv_heads));
    }
    for layer in 0..size("num_hidden_layers").unwrap() {
        for (part, names) in [
            ("gate", ["gate_proj", "w1"]),
            ("up", ["up_proj", "w3"]),
            ("down", ["down_proj", "w2"]),
        ] {
            let (mut values, mut shape) = (Vec::new(), vec![experts.unwrap() as usize]);
            for expert in 0..experts.unwrap() {
                let spelled =
                    ["mlp", "block_sparse_moe"].into_iter().zip(names).find_map(|(b, n)| {
                        all.get(&format!("model.layers.{layer}.{b}.experts.{expert}.{n}.weight"))
                    });
                let raw = spelled.expect("every class spells its experts so");
                shape.truncate(1);
                shape.extend(&raw.shape);
                values.extend(raw.values());
                used += 1;
            }
            let name = format!("blk.{layer}.ffn_{part}_exps.weight");
            let (dtype, bytes) = encode(&name, &values);
            file.tensors.push((name, shape, dtype, bytes));
        }
    }
    assert_eq!(used, all.len(), "every tensor of the folder is in the file");
    file
}

/// The vocabulary of a `tokenizer.json`. SentencePiece scores go down from token to token.
fn vocabulary(file: &mut File, dir: &Path, config: &Value) {
    let json: Value =
        serde_json::from_slice(&fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
    let table = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); table.len()];
    for (token, id) in table {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let mut types = vec![1; tokens.len()];
    for added in json["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        types[id] = if added["content"] == "<unk>" { 2 } else { 3 };
    }
    let sentence_piece = json["model"]["byte_fallback"] == true;
    file.set(
        "tokenizer.ggml.model",
        Meta::Text(if sentence_piece { "llama" } else { "gpt2" }.into()),
    );
    if sentence_piece {
        let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
        file.set("tokenizer.ggml.scores", Meta::F32s(scores));
    } else {
        let split = json["pre_tokenizer"]["pretokenizers"].is_array();
        file.set("tokenizer.ggml.pre", Meta::Text(if split { "qwen2" } else { "gpt-2" }.into()));
        let merges = json["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
            Value::String(merge) => merge.clone(),
            pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        });
        file.set("tokenizer.ggml.merges", Meta::Texts(merges.collect()));
    }
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::I32s(types));
    for role in ["bos", "eos"] {
        if let Some(id) = config[format!("{role}_token_id")].as_u64() {
            file.set(&format!("tokenizer.ggml.{role}_token_id"), Meta::U32(id as u32));
        }
    }
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    file.set("tokenizer.chat_template", Meta::Text(template.into()));
    file.set("tokenizer.ggml.add_bos_token", Meta::Bool(sentence_piece));
}
