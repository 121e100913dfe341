//! A checkpoint goes back to a Hugging Face folder: what comes in again has the same bits.

mod hf;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lite_llm_kernels::dtype::DType;
use lite_llm_runtime::{
    checkpoint::{Checkpoint, writer::Text},
    export::{FILE_BYTES, export},
    import::{ImportOptions, import},
    tier::{TIER_10B, TierConfig},
    train::{params::Params, state},
};
use serde_json::Value;
use tempfile::tempdir;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/hf-refs").join(name)
}

fn imported(source: &Path, out: &Path) -> Checkpoint {
    import(&ImportOptions::new(source, out), &mut |_, _, _| {}).unwrap();
    Checkpoint::open(out).unwrap()
}

/// Bytes of every tensor of a folder, by name.
fn weights(dir: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let is_weights = path.file_name().unwrap().to_str().unwrap().starts_with("model");
        if !is_weights || path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.tensors() {
            all.insert(name, (view.shape().to_vec(), view.data().to_vec()));
        }
    }
    all
}

#[test]
fn what_was_imported_goes_back_with_the_same_bytes_and_comes_in_again_the_same() {
    for name in hf::IMPORTED {
        let dir = tempdir().unwrap();
        let (source, at) = (folder(name), |name: &str| dir.path().join(name));
        let first = imported(&source, &at("first"));
        // One file, then many.
        for (out, file_bytes) in [("one", FILE_BYTES), ("many", 40_000)] {
            let found = export(&first, &at(out), file_bytes, &mut |_, _| {}).unwrap();
            assert_eq!(found.files > 1, out == "many", "{name}: {found:?}");
            assert_eq!(at(out).join("model.safetensors.index.json").exists(), out == "many");
            assert!(weights(&at(out)) == weights(&source), "{name}: tensors differ");
            let again = imported(&at(out), &at(&format!("{out}.again")));
            assert_eq!(again.id(), first.id(), "{name} by {out}");
        }
        // A name with a slash at its end is the same name, there or not.
        export(&first, &at("slash").join(""), FILE_BYTES, &mut |_, _| {}).unwrap();
        let error = export(&first, &at("one"), FILE_BYTES, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("is there already"), "{error}");
    }
}

/// Keys of both configurations say the same, where the source's says anything that we write.
#[test]
fn the_configuration_is_the_published_one() {
    for name in ["mixtral", "olmoe", "qwen2_moe"] {
        let dir = tempdir().unwrap();
        let checkpoint = imported(&folder(name), &dir.path().join("first"));
        export(&checkpoint, &dir.path().join("out"), FILE_BYTES, &mut |_, _| {}).unwrap();
        let read = |path: PathBuf| -> Value {
            serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap()
        };
        let (theirs, ours) = (read(folder(name)), read(dir.path().join("out")));
        // Without a say in what is computed: no dense layers, and windows that are off.
        let idle: &[&str] = match name {
            "qwen2_moe" => &["intermediate_size", "sliding_window"],
            "mixtral" => &["head_dim"],
            _ => &[],
        };
        for (key, value) in ours.as_object().unwrap() {
            let same = theirs.get(key).is_none_or(|theirs| theirs == value);
            assert!(same || idle.contains(&key.as_str()), "{name}: {key} is {value}");
        }
    }
}

#[test]
fn a_trained_model_of_one_tier_finds_its_class_and_of_two_hears_why_not() {
    let dir = tempdir().unwrap();
    let demo = Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe"));
    let demo = demo.unwrap();
    let tier = serde_json::json!({ "name": "tier_1b", "groups": 1, "experts": 3 });
    let new = serde_json::json!({
        "tokenizer": "", "hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 10,
        "context": 64, "intermediate": 12, "routes": [1, 1, 2], "renormalize": true,
        "qk_norm": "per_head", "tied_embeddings": true, "tiers": [tier],
    });
    let new: lite_llm_runtime::train::config::NewModel = serde_json::from_value(new).unwrap();
    let mut config = new.config(demo.config()).unwrap();
    let text = Text { tokenizer_json: demo.tokenizer_json().unwrap(), ..Default::default() };
    let write = |config: &lite_llm_runtime::config::ModelConfig, name: &str| {
        let params = Params::random(config.clone(), 9);
        state::write_model(&dir.path().join(name), &params, &text).unwrap();
        (Checkpoint::open(dir.path().join(name)).unwrap(), params)
    };
    let (checkpoint, params) = write(&config, "one");
    let out = dir.path().join("hf");
    let found = export(&checkpoint, &out, FILE_BYTES, &mut |_, _| {}).unwrap();
    assert_eq!((found.architecture, found.dtype), ("Qwen3MoeForCausalLM", DType::F32));
    let again = Params::load(&imported(&out, &dir.path().join("again"))).unwrap();
    // The row of the gate over tiers, which a flat class lacks, is not looked at.
    for (a, b) in params.list().iter().zip(again.list()) {
        assert_eq!(a.name, b.name);
        assert!(a.values() == b.values() || a.name.ends_with("router.tiers"), "{}", a.name);
    }
    let moe = config.moe.as_mut().unwrap();
    moe.tiers.push(TierConfig::new(TIER_10B, 1, 2, 0));
    let (checkpoint, _) = write(&config, "two");
    let error =
        export(&checkpoint, &dir.path().join("no"), FILE_BYTES, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("tier_1b, tier_10b"), "{error}");
    assert!(!dir.path().join("no").exists());
}
