//! Import of Hugging Face folders: values arrive bit for bit, in every spelling.

mod hf;

use std::{collections::BTreeMap, path::Path};

use hf::{IMPORTED, Raw, edit_json, imported, reference, rewrite, tensors};
use lite_llm_kernels::{dtype::DType, matrix::PackedMatrix};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    config::{FeedForward, QkNorm, RopeScaling},
    expert::ExpertKey,
    import::{
        ImportOptions, hf_config, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
};
use serde_json::json;
use tempfile::tempdir;

fn values(matrix: &PackedMatrix) -> Vec<f32> {
    let mut all = vec![0.0; matrix.n() * matrix.k()];
    for (j, row) in all.chunks_mut(matrix.k()).enumerate() {
        matrix.row(j, row);
    }
    all
}

fn same(name: &str, found: &[f32], expected: &[f32]) {
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(found) == bits(expected), "{name} differs from its source");
}

fn check_matrix(name: &str, matrix: &PackedMatrix, source: &Raw) {
    assert_eq!([matrix.n(), matrix.k()], source.shape[..], "{name}");
    same(name, &values(matrix), &source.values());
}

/// Source names of the parts that every class has, spelled out apart from the importer.
const DENSE: [(&str, &str); 4] =
    [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")];

fn check_values(checkpoint: &Checkpoint, source: &BTreeMap<String, Raw>) {
    let config = checkpoint.config();
    let matrix = |name: &str, from: &str| {
        check_matrix(name, &checkpoint.dense_matrix(name).unwrap(), &source[from]);
    };
    let vector = |name: &str, from: &str| {
        same(name, &checkpoint.dense_vector(name).unwrap(), &source[from].values());
    };
    matrix("embed", "model.embed_tokens.weight");
    vector("norm", "model.norm.weight");
    if !config.tied_embeddings {
        matrix("head", "lm_head.weight");
    }
    let mut checked = 3;
    for (i, layer) in config.layers.iter().enumerate() {
        let from = |rest: &str| format!("model.layers.{i}.{rest}");
        let to = |rest: &str| format!("layers.{i}.{rest}");
        vector(&to("attention_norm"), &from("input_layernorm.weight"));
        vector(&to("ffn_norm"), &from("post_attention_layernorm.weight"));
        checked += 2;
        for (name, hf) in DENSE {
            matrix(&to(&format!("attention.{name}")), &from(&format!("self_attn.{hf}.weight")));
            checked += 1;
            if checkpoint.has_dense(&to(&format!("attention.{name}_bias"))) {
                let bias = from(&format!("self_attn.{hf}.bias"));
                vector(&to(&format!("attention.{name}_bias")), &bias);
                checked += 1;
            }
        }
        if config.attention.qk_norm != QkNorm::None {
            vector(&to("attention.q_norm"), &from("self_attn.q_norm.weight"));
            vector(&to("attention.k_norm"), &from("self_attn.k_norm.weight"));
            checked += 2;
        }
        if layer.feed_forward != FeedForward::Sparse {
            for part in ["gate", "up", "down"] {
                matrix(&to(&format!("ffn.{part}")), &from(&format!("mlp.{part}_proj.weight")));
                checked += 1;
            }
            continue;
        }
        let moe = config.moe.as_ref().unwrap();
        let (block, names) = match config.architecture.as_str() {
            "mixtral" => ("block_sparse_moe", ["w1", "w3", "w2"]),
            _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        if moe.shared.is_some() {
            for (to_name, hf) in ["gate", "up", "down"].iter().zip(names) {
                let hf = from(&format!("mlp.shared_expert.{hf}.weight"));
                matrix(&to(&format!("shared.{to_name}")), &hf);
                checked += 1;
            }
            matrix(&to("shared.router"), &from("mlp.shared_expert_gate.weight"));
            checked += 1;
        }
        let gate = source[&from(&format!("{block}.gate.weight"))].values();
        checked += 1;
        for flat in 0..moe.experts() {
            let key = ExpertKey::from_flat(moe, i, flat).unwrap();
            let router = checkpoint.expert_router(i, key.tier as usize, key.group).unwrap();
            assert_eq!(router.dtype(), DType::F32);
            let mut row = vec![0.0; config.hidden];
            router.row(key.expert as usize, &mut row);
            same("gate row", &row, &gate[flat * config.hidden..][..config.hidden]);

            let expert = checkpoint.expert(key).unwrap();
            for (matrix, hf) in [&expert.gate, &expert.up, &expert.down].into_iter().zip(names) {
                let hf = from(&format!("{block}.experts.{flat}.{hf}.weight"));
                check_matrix(&hf, matrix, &source[&hf]);
                checked += 1;
            }
            assert_eq!(expert.bytes(), checkpoint.expert_bytes(key).unwrap());
        }
    }
    assert_eq!(checked, source.len(), "every source tensor was compared");
}

#[test]
fn values_of_every_class_arrive_bit_for_bit() {
    for name in IMPORTED {
        let Some(dir) = reference(name) else { return };
        let out = tempdir().unwrap();
        let checkpoint = imported(&dir, out.path());
        let bf16 = name.contains("bf16");
        assert_eq!(checkpoint.dtype(), if bf16 { DType::Bf16 } else { DType::F32 }, "{name}");
        check_values(&checkpoint, &tensors(&dir));
        let original = std::fs::read(dir.join("tokenizer.json")).unwrap();
        assert_eq!(checkpoint.tokenizer_json().unwrap(), original);
        assert!(checkpoint.chat_template().unwrap().is_some());
    }
}

#[test]
fn random_folders_of_every_class_import_from_one_file_or_many() {
    use RandomClass::*;
    for class in [Mixtral, Olmoe, Qwen2Moe, Qwen3Moe] {
        let dir = tempdir().unwrap();
        let (one, many) = (dir.path().join("one"), dir.path().join("many"));
        let mut shape = RandomShape::tiny(class);
        write_random_hf(&one, &shape, &mut |_, _| {}).unwrap();
        shape.file_bytes = 100_000;
        write_random_hf(&many, &shape, &mut |_, _| {}).unwrap();
        assert!(many.join("model.safetensors.index.json").exists(), "several files");
        assert_eq!(tensors(&one), tensors(&many), "values do not depend on files");
        let a = imported(&one, &dir.path().join("a"));
        let b = imported(&many, &dir.path().join("b"));
        check_values(&a, &tensors(&one));
        assert_eq!(a.id(), b.id(), "{class:?}");
    }
}

/// Sharded, fused or under another block's name: the checkpoint is the same to the last byte.
#[test]
fn spelling_and_sharding_of_the_source_do_not_matter() {
    for name in IMPORTED {
        let Some(dir) = reference(name) else { return };
        let out = tempdir().unwrap();
        let at = |name: &str| out.path().join(name);
        let plain = imported(&dir, &at("plain.ckpt"));

        rewrite(&dir, &at("single"), |_| {});
        assert_eq!(
            imported(&at("single"), &at("single.ckpt")).id(),
            plain.id(),
            "{name}: one file"
        );

        rewrite(&dir, &at("fused"), |all| fuse(all, "mlp"));
        assert_eq!(imported(&at("fused"), &at("fused.ckpt")).id(), plain.id(), "{name}: fused");

        if name == "mixtral" {
            rewrite(&dir, &at("mlp"), |all| rename(all, "block_sparse_moe", "mlp"));
            assert_eq!(imported(&at("mlp"), &at("mlp.ckpt")).id(), plain.id(), "mlp names");
            rewrite(&dir, &at("f"), |all| fuse(all, "block_sparse_moe"));
            assert_eq!(imported(&at("f"), &at("f.ckpt")).id(), plain.id(), "fused in its block");
        }
    }
}

fn rename(all: &mut BTreeMap<String, Raw>, from: &str, to: &str) {
    *all = std::mem::take(all).into_iter().map(|(n, r)| (n.replace(from, to), r)).collect();
}

/// Joins experts as transformers 5 does in memory: [E, 2I, H] with gates first, and [E, H, I].
fn fuse(all: &mut BTreeMap<String, Raw>, block: &str) {
    rename(all, "block_sparse_moe", block);
    for (old, new) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
        rename(all, &format!(".{old}.weight"), &format!(".{new}.weight"));
    }
    for layer in 0.. {
        let at = format!("model.layers.{layer}.{block}.experts");
        if !all.contains_key(&format!("{at}.0.gate_proj.weight")) {
            return;
        }
        let mut gate_up: Option<Raw> = None;
        let mut down: Option<Raw> = None;
        for expert in 0.. {
            let mut take = |part: &str| all.remove(&format!("{at}.{expert}.{part}_proj.weight"));
            let Some(gate) = take("gate") else { break };
            let (up, own_down) = (take("up").unwrap(), take("down").unwrap());
            let join = |fused: &mut Option<Raw>, pieces: &[&Raw]| {
                let rows: usize = pieces.iter().map(|p| p.shape[0]).sum();
                let shape = vec![0, rows, pieces[0].shape[1]];
                let fused =
                    fused.get_or_insert(Raw { dtype: pieces[0].dtype, shape, bytes: vec![] });
                fused.shape[0] += 1;
                pieces.iter().for_each(|p| fused.bytes.extend(&p.bytes));
            };
            join(&mut gate_up, &[&gate, &up]);
            join(&mut down, &[&own_down]);
        }
        all.insert(format!("{at}.gate_up_proj"), gate_up.unwrap());
        all.insert(format!("{at}.down_proj"), down.unwrap());
    }
}

#[test]
fn f16_widens_exactly_and_formats_convert_as_asked() {
    let Some(dir) = reference("olmoe") else { return };
    let out = tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    rewrite(&dir, &at("f16"), |all| {
        for raw in all.values_mut() {
            let halves = raw.values().into_iter().map(half::f16::from_f32);
            raw.bytes = halves.flat_map(|v| v.to_le_bytes()).collect();
            raw.dtype = safetensors::Dtype::F16;
        }
    });
    let checkpoint = imported(&at("f16"), &at("f16.ckpt"));
    assert_eq!(checkpoint.dtype(), DType::F32);
    check_values(&checkpoint, &tensors(&at("f16")));

    let options = ImportOptions { dtype: Some(DType::Bf16), ..hf::options(&dir, &at("bf16.ckpt")) };
    import(&options, &mut |_, _, _| {}).unwrap();
    let checkpoint = Checkpoint::open(at("bf16.ckpt")).unwrap();
    let rounded: Vec<f32> = tensors(&dir)["model.embed_tokens.weight"]
        .values()
        .iter()
        .map(|v| half::bf16::from_f32(*v).to_f32())
        .collect();
    same("embed", &values(&checkpoint.dense_matrix("embed").unwrap()), &rounded);
    // Gates and norms decide routes and scale: they are never rounded.
    let gate = tensors(&dir)["model.layers.0.mlp.gate.weight"].values();
    same("gate", &values(&checkpoint.expert_router(0, 0, 0).unwrap()), &gate);
}

#[test]
fn a_cut_keeps_the_experts_and_averages_their_gates() {
    let Some(dir) = reference("olmoe") else { return };
    let out = tempdir().unwrap();
    let options = ImportOptions {
        tiers: Some("tier_1b:2x4,tier_10b:1x8".parse().unwrap()),
        routes: Some("2x1x2".parse().unwrap()),
        ..hf::options(&dir, out.path())
    };
    let summary = import(&options, &mut |_, _, _| {}).unwrap();
    assert_eq!(summary.tiers.len(), 2);
    let checkpoint = Checkpoint::open(out.path()).unwrap();
    let source = tensors(&dir);
    check_values(&checkpoint, &source);

    let gate = source["model.layers.1.mlp.gate.weight"].values();
    let hidden = checkpoint.config().hidden;
    let mean = |experts: std::ops::Range<usize>| -> Vec<f32> {
        let column = |c: usize| {
            let sum: f64 = experts.clone().map(|e| f64::from(gate[e * hidden + c])).sum();
            (sum / experts.len() as f64) as f32
        };
        (0..hidden).map(column).collect()
    };
    let groups = values(&checkpoint.group_router(1, 0).unwrap().unwrap());
    same("groups", &groups, &[mean(0..4), mean(4..8)].concat());
    assert!(checkpoint.group_router(1, 1).unwrap().is_none(), "one group needs no gate");
    for (tier, experts) in [0..8, 8..16].into_iter().enumerate() {
        same("tier", &checkpoint.tier_router(1, tier).unwrap(), &mean(experts));
    }

    for (tiers, routes) in [("tier_1b:2x4", "1x1x1"), ("tier_1b:2x8", "1x3x1"), ("a:16x1", "1x1x2")]
    {
        let next = tempdir().unwrap();
        let options = ImportOptions {
            tiers: Some(tiers.parse().unwrap()),
            routes: Some(routes.parse().unwrap()),
            ..hf::options(&dir, next.path())
        };
        let error = import(&options, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(error.contains("--tiers") || error.contains("--routes"), "{error}");
    }
}

/// Reads `config.json` of a class after a change.
fn config_with(
    class: &str,
    change: serde_json::Value,
) -> Result<lite_llm_runtime::config::ModelConfig, String> {
    let dir = reference(class).ok_or("skipped")?;
    let out = tempdir().unwrap();
    hf::copy(&dir, out.path());
    edit_json(&out.path().join("config.json"), |config| {
        for (key, value) in change.as_object().unwrap() {
            match value {
                serde_json::Value::String(s) if s == "REMOVED" => {
                    config.as_object_mut().unwrap().remove(key);
                }
                value => config[key] = value.clone(),
            }
        }
    });
    hf_config::read(out.path()).map_err(|e| e.to_string())
}

#[test]
fn every_trap_of_the_configuration_is_read_as_transformers_does() {
    if reference("olmoe").is_none() {
        return;
    }
    let window = |class, change| -> Vec<Option<u32>> {
        config_with(class, change).unwrap().layers.iter().map(|l| l.window).collect()
    };
    assert_eq!(window("mixtral", json!({})), [None; 3]);
    assert_eq!(window("mixtral", json!({ "sliding_window": 8 })), [Some(8); 3]);
    assert_eq!(window("qwen3_moe", json!({ "sliding_window": 8 })), [None; 3]);
    let used = json!({ "sliding_window": 8, "use_sliding_window": true });
    assert_eq!(window("qwen3_moe", used), [Some(8); 3]);
    let types = json!(["full_attention", "sliding_attention", "attention"]);
    let used = json!({ "sliding_window": 8, "use_sliding_window": true, "layer_types": types });
    assert_eq!(window("qwen2_moe", used), [None, Some(8), None]);
    let used = json!({ "sliding_window": 8, "use_sliding_window": true, "layer_types": null });
    assert_eq!(window("qwen2_moe", used), [Some(8), None, Some(8)]);
    let used = json!({ "sliding_window": 8, "use_sliding_window": true, "layer_types": null,
                       "max_window_layers": 1 });
    assert_eq!(window("qwen2_moe", used), [Some(8), None, None]);

    let dense = |class, change| -> Vec<bool> {
        let config = config_with(class, change).unwrap();
        config.layers.iter().map(|l| l.feed_forward != FeedForward::Sparse).collect()
    };
    assert_eq!(dense("qwen3_moe", json!({ "decoder_sparse_step": 2 })), [true, false, true]);
    assert_eq!(dense("qwen2_moe", json!({ "mlp_only_layers": [2] })), [false, false, true]);

    let attention = |class, change| config_with(class, change).unwrap().attention;
    let olmoe = attention("olmoe", json!({ "clip_qkv": 8.0, "attention_bias": true }));
    assert_eq!((olmoe.clip_qkv, olmoe.qk_norm), (Some(8.0), QkNorm::Whole));
    assert!(olmoe.qkv_bias && olmoe.output_bias);
    let qwen2 = attention("qwen2_moe", json!({ "qkv_bias": "REMOVED" }));
    assert!(qwen2.qkv_bias && !qwen2.output_bias);
    assert_eq!(attention("qwen3_moe", json!({})).head_dim, 24);
    assert_eq!(attention("qwen3_moe", json!({})).rope_theta, 1e6);
    let v5 = json!({ "rope_theta": "REMOVED",
                     "rope_parameters": { "rope_theta": 5e5, "type": "linear", "factor": 4.0 } });
    let v5 = attention("olmoe", v5);
    assert_eq!((v5.rope_theta, v5.rope_scaling), (5e5, RopeScaling::Linear { factor: 4.0 }));
    let v4 = json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } });
    let v4 = attention("mixtral", v4);
    assert_eq!((v4.rope_theta, v4.rope_scaling), (1e6, RopeScaling::Linear { factor: 2.0 }));
    let both = json!({ "rope_scaling": { "type": "linear", "factor": 2.0, "rope_theta": 7e3 },
                       "rope_parameters": { "rope_type": "default", "rope_theta": 1e4 } });
    let both = attention("qwen3_moe", both);
    assert_eq!((both.rope_theta, both.rope_scaling), (7e3, RopeScaling::Linear { factor: 2.0 }));
    let empty = json!({ "rope_scaling": {}, "rope_parameters": { "rope_theta": 5e3 } });
    assert_eq!(attention("qwen3_moe", empty).rope_theta, 5e3);

    let routing = |class, change| config_with(class, change).unwrap().moe.unwrap().routing;
    assert!(routing("mixtral", json!({})).renormalize);
    assert!(!routing("olmoe", json!({})).renormalize);
    assert!(routing("qwen3_moe", json!({})).renormalize);
    let eos = config_with("olmoe", json!({ "eos_token_id": [5, 7] })).unwrap().eos_tokens;
    assert_eq!(eos, [5, 7, 2], "generation_config.json adds its own");
    let eos = config_with("olmoe", json!({ "eos_token_id": [5, -1, 100_000] })).unwrap();
    assert_eq!(eos.eos_tokens, [5, 2], "ids of no token can never come");
    let bos = config_with("olmoe", json!({ "bos_token_id": -1 })).unwrap();
    assert_eq!(bos.bos_token, None);
    config_with("olmoe", json!({ "hidden_act": "swish" })).expect("another name of silu");
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    if reference("olmoe").is_none() {
        return;
    }
    let cases = [
        ("olmoe", json!({ "model_type": "gpt_oss" }), "gpt_oss"),
        ("olmoe", json!({ "architectures": ["OlmoeModel"] }), "OlmoeModel"),
        ("olmoe", json!({ "model_type": "mixtral" }), "architectures"),
        ("olmoe", json!({ "hidden_act": "gelu" }), "hidden_act"),
        ("olmoe", json!({ "hidden_size": "REMOVED" }), "hidden_size"),
        ("olmoe", json!({ "hidden_size": "64" }), "hidden_size"),
        ("olmoe", json!({ "hidden_size": -64 }), "hidden_size"),
        ("olmoe", json!({ "num_attention_heads": 0 }), "head"),
        ("olmoe", json!({ "num_hidden_layers": 1_000_000_000 }), "num_hidden_layers"),
        ("olmoe", json!({ "num_experts": u64::MAX }), "num_experts"),
        (
            "olmoe",
            json!({ "num_experts": 0, "num_experts_per_tok": 0 }),
            "config.json: num_experts is 0",
        ),
        ("olmoe", json!({ "intermediate_size": 1 << 30 }), "config.json: intermediate_size is"),
        (
            "qwen3_moe",
            json!({ "moe_intermediate_size": 0 }),
            "config.json: moe_intermediate_size is 0; 1 to 1048576",
        ),
        (
            "qwen2_moe",
            json!({ "shared_expert_intermediate_size": 0 }),
            "config.json: shared_expert_intermediate_size is 0;",
        ),
        (
            "olmoe",
            json!({ "num_experts_per_tok": 17 }),
            "config.json: num_experts_per_tok is 17; at most num_experts (16) is expected",
        ),
        (
            "mixtral",
            json!({ "num_experts_per_tok": 9 }),
            "num_experts_per_tok is 9; at most num_local_experts (8) is expected",
        ),
        ("olmoe", json!({ "num_experts_per_tok": 0 }), "num_experts_per_tok is 0; at least 1"),
        ("olmoe", json!({ "vocab_size": 0 }), "config.json: vocab_size is 0;"),
        ("olmoe", json!({ "hidden_size": 1 << 30 }), "config.json: hidden_size is"),
        ("olmoe", json!({ "max_position_embeddings": 0 }), "config.json: max_position_embeddings"),
        ("olmoe", json!({ "num_hidden_layers": 0 }), "config.json: num_hidden_layers is 0;"),
        ("olmoe", json!({ "rms_norm_eps": -1 }), "config.json: rms_norm_eps is -1;"),
        ("olmoe", json!({ "num_key_value_heads": 3 }), "config.json: num_key_value_heads is 3;"),
        ("qwen3_moe", json!({ "head_dim": 7 }), "config.json: head_dim is 7;"),
        (
            "mixtral",
            json!({ "hidden_size": 36, "head_dim": null, "num_attention_heads": 12,
                            "num_key_value_heads": 12 }),
            "hidden_size / num_attention_heads is 3;",
        ),
        ("olmoe", json!({ "clip_qkv": -8.0 }), "config.json: clip_qkv is -8;"),
        (
            "qwen3_moe",
            json!({ "mlp_only_layers": [0], "intermediate_size": 0 }),
            "config.json: intermediate_size is 0;",
        ),
        ("olmoe", json!({ "rms_norm_eps": "REMOVED" }), "rms_norm_eps"),
        ("olmoe", json!({ "rope_scaling": { "type": "mrope" } }), "rope_scaling.type"),
        ("olmoe", json!({ "rope_scaling": { "factor": 2.0 } }), "rope_scaling.rope_type"),
        ("olmoe", json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (
            "olmoe",
            json!({ "quantization_config": { "quant_method": "fp8" } }),
            "quantization_config",
        ),
        ("olmoe", json!({ "eos_token_id": "</s>" }), "eos_token_id"),
        ("mixtral", json!({ "sliding_window": 0 }), "sliding_window"),
        ("qwen3_moe", json!({ "decoder_sparse_step": 0 }), "decoder_sparse_step"),
        ("qwen3_moe", json!({ "num_experts": 9 }), "num_experts"),
        ("qwen3_moe", json!({ "num_local_experts": "REMOVED" }), "num_experts"),
    ];
    for (class, change, named) in cases {
        let error = config_with(class, change.clone()).expect_err(&change.to_string());
        assert!(error.contains(named), "{change}: {error}");
    }
}

#[test]
fn dense_layers_and_tied_embeddings_import() {
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_random_hf(&at("sparse"), &RandomShape::tiny(RandomClass::Qwen3Moe), &mut |_, _| {})
        .unwrap();
    rewrite(&at("sparse"), &at("dense"), |all| {
        all.retain(|name, _| !name.starts_with("model.layers.0.mlp") && name != "lm_head.weight");
        for (name, shape) in [("gate", [48, 64]), ("up", [48, 64]), ("down", [64, 48])] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| i as f32).collect();
            all.insert(format!("model.layers.0.mlp.{name}_proj.weight"), Raw::f32(&shape, &values));
        }
    });
    edit_json(&at("dense/config.json"), |config| {
        config["mlp_only_layers"] = json!([0]);
        config["intermediate_size"] = json!(48);
        config["tie_word_embeddings"] = json!(true);
    });
    let checkpoint = imported(&at("dense"), &at("ckpt"));
    assert!(!checkpoint.has_dense("head"));
    let source = tensors(&at("dense"));
    check_matrix(
        "ffn.down",
        &checkpoint.dense_matrix("layers.0.ffn.down").unwrap(),
        &source["model.layers.0.mlp.down_proj.weight"],
    );
    let first = ExpertKey { layer: 0, tier: 0, group: 0, expert: 0 };
    assert!(checkpoint.expert(first).is_err(), "layer 0 has no experts");
    assert!(checkpoint.expert(ExpertKey { layer: 1, ..first }).is_ok());
}

#[test]
fn progress_counts_up_to_all_bytes() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("hf");
    let shape = RandomShape::tiny(RandomClass::Olmoe);
    let written = write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    let mut seen = vec![];
    let out: &Path = &dir.path().join("out");
    let options = hf::options(&source, out);
    import(&options, &mut |done, total, what| seen.push((done, total, what.to_owned()))).unwrap();
    assert!(seen.windows(2).all(|w| w[0].0 <= w[1].0), "never backwards");
    let last = seen.last().unwrap();
    assert_eq!((last.0, last.1), (written, written), "{}", last.2);
}

/// As transformers 5 does: a flag that contradicts the weights does not drop them.
#[test]
fn embeddings_are_tied_unless_the_folder_holds_two_tables() {
    const EMBED: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_random_hf(&at("two"), &RandomShape::tiny(RandomClass::Mixtral), &mut |_, _| {}).unwrap();
    edit_json(&at("two/config.json"), |config| config["tie_word_embeddings"] = json!(true));
    rewrite(&at("two"), &at("same"), |all| {
        all.insert(HEAD.into(), all[EMBED].clone());
    });
    rewrite(&at("two"), &at("only-head"), |all| {
        all.remove(EMBED);
    });
    for (folder, tied, embed) in
        [("two", false, EMBED), ("same", true, EMBED), ("only-head", true, HEAD)]
    {
        let checkpoint = imported(&at(folder), &at(&format!("{folder}.ckpt")));
        let source = tensors(&at(folder));
        assert_eq!(checkpoint.config().tied_embeddings, tied, "{folder}");
        assert_eq!(checkpoint.has_dense("head"), !tied, "{folder}");
        check_matrix("embed", &checkpoint.dense_matrix("embed").unwrap(), &source[embed]);
        if !tied {
            check_matrix("head", &checkpoint.dense_matrix("head").unwrap(), &source[HEAD]);
        }
    }
}
