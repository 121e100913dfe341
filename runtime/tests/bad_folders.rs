//! Folders that are damaged, incomplete or hostile are refused by the name of the file and tensor,
//! and nothing is left behind that could be mistaken for a checkpoint.

mod hf;

use std::{fs, path::Path};

use hf::{Raw, edit_json, rewrite, try_import};
use lite_llm_runtime::{
    checkpoint::{Checkpoint, CheckpointError},
    import::{
        ImportError, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
};
use serde_json::json;
use tempfile::{TempDir, tempdir};

/// A small folder in several files.
fn sharded() -> TempDir {
    let dir = tempdir().unwrap();
    let shape = RandomShape { file_bytes: 100_000, ..RandomShape::tiny(RandomClass::Olmoe) };
    write_random_hf(&dir.path().join("hf"), &shape, &mut |_, _| {}).unwrap();
    dir
}

/// The import fails, says `named`, and leaves no checkpoint.
fn refused(source: &Path, named: &str) -> String {
    let out = tempdir().unwrap();
    let error = try_import(source, out.path()).expect_err(named).to_string();
    assert!(error.contains(named), "{error:?} does not name {named:?}");
    assert!(fs::read_dir(out.path()).unwrap().next().is_none(), "nothing was written");
    error
}

#[test]
fn a_file_cut_anywhere_is_named() {
    let dir = sharded();
    let source = dir.path().join("hf");
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let whole = fs::read(&path).unwrap();
        let lengths = [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1];
        for length in lengths.into_iter().filter(|l| *l < whole.len()) {
            fs::write(&path, &whole[..length]).unwrap();
            refused(&source, &name);
        }
        fs::remove_file(&path).unwrap();
        refused(&source, if name.contains("index") { "model.safetensors" } else { &name });
        fs::write(&path, &whole).unwrap();
    }
    try_import(&source, &dir.path().join("out")).expect("the folder is whole again");
}

#[test]
fn a_file_with_bytes_after_its_end_is_named() {
    let dir = sharded();
    let path = dir.path().join("hf/model-00001-of-00004.safetensors");
    let path = if path.exists() { path } else { first_shard(&dir.path().join("hf")) };
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend([0; 4]);
    fs::write(&path, bytes).unwrap();
    refused(&dir.path().join("hf"), path.file_name().unwrap().to_str().unwrap());
}

fn first_shard(dir: &Path) -> std::path::PathBuf {
    let mut shards: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    shards[0].clone()
}

/// Any flipped bit of a header either is refused by the file's name, or changes only a name or a
/// blank that nothing depends on: it never panics and never asks for absurd memory.
#[test]
fn a_flipped_header_never_gets_through_as_another_shape() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("hf");
    let shape = RandomShape { layers: 1, experts: 2, ..RandomShape::tiny(RandomClass::Mixtral) };
    write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    let whole = try_import(&source, &dir.path().join("whole")).unwrap();
    let path = source.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&path, &flipped).unwrap();
        let out = tempdir().unwrap();
        match try_import(&source, out.path()) {
            Err(error) => assert!(error.to_string().contains("hf"), "{at}: {error}"),
            Ok(summary) => assert_eq!(summary.id, whole.id, "byte {at} changed the model"),
        }
    }
}

#[test]
fn a_header_that_lies_about_sizes_is_refused_before_memory_is_asked_for() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("hf");
    write_random_hf(&source, &RandomShape::tiny(RandomClass::Olmoe), &mut |_, _| {}).unwrap();
    let path = source.join("model.safetensors");
    for length in [u64::MAX, 1 << 40, 99_000_000] {
        fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        refused(&source, "model.safetensors");
    }
    let headers = [
        json!({ "a": { "dtype": "F32", "shape": [1u64 << 40, 1u64 << 40], "data_offsets": [0, 4] } }),
        json!({ "a": { "dtype": "F32", "shape": [1], "data_offsets": [4, 0] } }),
        json!({ "a": { "dtype": "F32", "shape": [1], "data_offsets": [0, u64::MAX] } }),
        json!({ "a": { "dtype": "F32", "shape": [-1], "data_offsets": [0, 4] } }),
        json!({ "a": { "dtype": "Q4", "shape": [1], "data_offsets": [0, 4] } }),
        json!({ "a": { "dtype": "F32", "shape": [1], "data_offsets": [4, 8] } }),
        json!({ "a": { "dtype": "F32", "shape": [1], "data_offsets": [0, 4] },
                "b": { "dtype": "F32", "shape": [1], "data_offsets": [0, 4] } }),
    ];
    for header in headers {
        let header = header.to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 8]);
        fs::write(&path, bytes).unwrap();
        refused(&source, "model.safetensors");
    }
    let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let mut bytes = (twice.len() as u64).to_le_bytes().to_vec();
    bytes.extend(twice.as_bytes());
    bytes.extend([0; 8]);
    fs::write(&path, bytes).unwrap();
    assert!(refused(&source, "model.safetensors").contains("twice"));
}

#[test]
fn tensors_that_are_missing_misshapen_misformatted_or_unknown_are_named() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("hf");
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    for class in [RandomClass::Olmoe, RandomClass::Qwen2Moe] {
        write_random_hf(&source, &RandomShape::tiny(class), &mut |_, _| {}).unwrap();
        for lost in hf::tensors(&source).into_keys() {
            let out = tempdir().unwrap();
            rewrite(&source, out.path(), |all| drop(all.remove(&lost)));
            refused(out.path(), &lost);
        }
        let changed = |change: &dyn Fn(&mut Raw)| {
            let out = tempdir().unwrap();
            rewrite(&source, out.path(), |all| change(all.get_mut(name).unwrap()));
            refused(out.path(), name)
        };
        let error = changed(&|raw| raw.shape.reverse());
        assert!(error.contains("[64, 32]") && error.contains("[32, 64]"), "{error}");
        let error = changed(&|raw| raw.dtype = safetensors::Dtype::I32);
        assert!(error.contains("I32"), "{error}");

        let out = tempdir().unwrap();
        rewrite(&source, out.path(), |all| {
            all.insert("model.layers.0.mlp.new_part.weight".into(), Raw::f32(&[1], &[0.0]));
            let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
            all.insert(buffer, Raw::f32(&[1], &[0.0]));
        });
        refused(out.path(), "model.layers.0.mlp.new_part.weight");
    }
}

#[test]
fn an_index_cannot_reach_other_folders_or_promise_what_is_not_there() {
    let dir = sharded();
    let source = dir.path().join("hf");
    let index = source.join("model.safetensors.index.json");
    let whole = fs::read(&index).unwrap();
    let secret = dir.path().join("secret.safetensors");
    fs::copy(first_shard(&source), &secret).unwrap();
    for path in
        ["../secret.safetensors", secret.to_str().unwrap(), "", "x/../../secret.safetensors"]
    {
        edit_json(&index, |index| index["weight_map"]["lm_head.weight"] = json!(path));
        let error = refused(&source, "index.json");
        assert!(error.contains("inside the folder"), "{error}");
        fs::write(&index, &whole).unwrap();
    }
    let first = first_shard(&source).file_name().unwrap().to_str().unwrap().to_owned();
    edit_json(&index, |index| index["weight_map"]["lm_head.weight"] = json!(first));
    refused(&source, "lm_head.weight");
    fs::write(&index, &whole).unwrap();
    edit_json(&index, |index| index["weight_map"]["ghost"] = json!(first));
    refused(&source, "ghost");
}

#[test]
fn tokenizers_and_templates_are_tried_before_they_are_taken() {
    let dir = sharded();
    let source = dir.path().join("hf");
    let tokenizer = source.join("tokenizer.json");
    let whole = fs::read(&tokenizer).unwrap();
    fs::write(&tokenizer, "{}").unwrap();
    refused(&source, "tokenizer.json");
    fs::write(&tokenizer, whole).unwrap();
    fs::write(source.join("chat_template.jinja"), "{% for %}").unwrap();
    refused(&source, "chat_template.jinja");
    fs::remove_file(source.join("chat_template.jinja")).unwrap();
    let config = json!({ "chat_template": 3 });
    fs::write(source.join("tokenizer_config.json"), config.to_string()).unwrap();
    refused(&source, "chat_template");
}

/// A writer that dies leaves a folder that says so, and the next import succeeds in it.
#[test]
fn an_interrupted_import_is_no_checkpoint_and_can_be_repeated() {
    let dir = sharded();
    let (source, out) = (dir.path().join("hf"), dir.path().join("out"));
    for stop in [0, 100_000, 400_000, 600_000] {
        let attempt = std::panic::catch_unwind(|| {
            let mut killer = |done: u64, _: u64, _: &str| {
                if done >= stop {
                    panic!("killed");
                }
            };
            import(&hf::options(&source, &out), &mut killer)
        });
        assert!(attempt.is_err(), "killed at {stop}");
        let error = Checkpoint::open(&out).unwrap_err();
        assert!(matches!(error, CheckpointError::Unfinished { .. }), "{error}");
    }
    let summary = try_import(&source, &out).unwrap();
    let fresh = try_import(&source, &dir.path().join("fresh")).unwrap();
    assert_eq!(summary.id, fresh.id);
    let names = |dir: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&out), ["dense", "manifest.1.json", "tiers", "tokenizer.json"]);
}

#[test]
fn folders_in_use_are_never_written_to() {
    let dir = sharded();
    let (source, out) = (dir.path().join("hf"), dir.path().join("out"));
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.tex"), "years of work").unwrap();
    let occupied = |error: ImportError| {
        matches!(error, ImportError::Checkpoint(CheckpointError::Occupied { .. }))
    };
    assert!(occupied(try_import(&source, &out).unwrap_err()));
    assert!(occupied(try_import(&source, &out.join("thesis.tex")).unwrap_err()));
    fs::remove_file(out.join("thesis.tex")).unwrap();
    try_import(&source, &out).unwrap();
    assert!(occupied(try_import(&source, &out).unwrap_err()), "a finished checkpoint stays");
    assert!(occupied(try_import(&source, &source).unwrap_err()));
}
