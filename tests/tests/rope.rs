//! Rope scaling from a folder to logits, and a served context that all nodes share.
//!
//! `data/rope-logits.json` was computed in float64 by a numpy model that agrees with transformers'
//! references of the same folder within 2e-5, with the tables of transformers 5.24's
//! `ROPE_INIT_FUNCTIONS` for the rope scaling beside.

use std::{fs, path::Path, sync::Arc};

use lite_llm_runtime::checkpoint::Checkpoint;
use lite_llm_tests::{Outcome, Setup, imported, job, reference, root, run, run_alone};
use serde_json::Value;

/// The reference model with another rope scaling, what it is to give, and a prompt.
fn scaled(kind: &str) -> (tempfile::TempDir, Arc<Checkpoint>, Value, Vec<u32>) {
    let text = fs::read(root().join("tests/data/rope-logits.json")).unwrap();
    let expected = serde_json::from_slice::<Value>(&text).unwrap()[kind].take();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("mixtral");
    copy(&root().join("tests/data/hf-refs/mixtral"), &source);
    let path = source.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["rope_scaling"] = expected["rope_scaling"].clone();
    config["max_position_embeddings"] = expected["context"].clone();
    fs::write(&path, config.to_string()).unwrap();
    let (folder, checkpoint) = imported(source, None);
    let (_folder, _, reference) = reference("mixtral");
    (folder, checkpoint, expected, reference.prompts[0].ids.clone())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        // By content: the originals may be read-only.
        fs::write(to.join(path.file_name().unwrap()), fs::read(&path).unwrap()).unwrap();
    }
}

fn check(found: &Outcome, expected: &Value, rows: usize, what: &str) {
    let logits = found.logits();
    let vocab = logits.len() / rows;
    let best = logits.chunks_exact(vocab).map(|row| {
        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map(|(id, _)| id as u64).unwrap()
    });
    let numbers = |key: &str| expected[key].as_array().unwrap().iter();
    let argmax: Vec<u64> = numbers("argmax").map(|n| n.as_u64().unwrap()).collect();
    assert_eq!(best.collect::<Vec<_>>(), argmax, "{what}");
    let last = &logits[(rows - 1) * vocab..];
    for (id, (found, expected)) in last.iter().zip(numbers("last_row")).enumerate() {
        let expected = expected.as_f64().unwrap() as f32;
        assert!((found - expected).abs() < 2e-4, "{what}: logit {id}: {found}, not {expected}");
    }
}

#[tokio::test]
async fn yarn_gives_the_logits_of_transformers() {
    let (_folder, checkpoint, expected, prompt) = scaled("yarn");
    let found = run_alone(&checkpoint, Setup::default(), job(&prompt, 0, 0)).await;
    check(&found, &expected, prompt.len(), "yarn");
}

/// Every worker rotates by the context that the coordinator serves, in whatever chunks.
#[tokio::test]
async fn a_served_context_reaches_every_worker_and_no_current_length_matters() {
    let (_folder, checkpoint, expected, prompt) = scaled("dynamic");
    let context = expected["served"].as_u64().map(|n| n as usize);
    let alone = Setup { context, ..Setup::default() };
    let truth = run_alone(&checkpoint, alone, job(&prompt, 4, 0)).await;
    let rows = truth.logits.len() / checkpoint.config().vocab;
    let first = Outcome {
        logits: truth.logits[..truth.logits.len() / rows * prompt.len()].to_vec(),
        ..Outcome::default()
    };
    check(&first, &expected, prompt.len(), "dynamic");
    let cluster = Setup { workers: 3, ..alone }.start(&checkpoint).await;
    for chunk in [1, 5, 0] {
        let found = run(&cluster, job(&prompt, 4, chunk)).await.unwrap();
        assert_eq!((found.logits, found.tokens), (truth.logits.clone(), truth.tokens.clone()));
    }
    cluster.stop().await;
    let other = Setup { context: Some(128), ..Setup::default() };
    let other = run_alone(&checkpoint, other, job(&prompt, 4, 0)).await;
    assert_ne!(other.logits, truth.logits, "the context reaches the rotary table");
}

#[tokio::test]
async fn a_served_context_bounds_prompt_and_answer() {
    let (_folder, checkpoint, _, prompt) = scaled("yarn");
    let served = |context| Setup { context: Some(context), ..Setup::default() };
    let cluster = served(prompt.len() + 2).start(&checkpoint).await;
    let found = run(&cluster, job(&prompt, 100, 0)).await.unwrap();
    assert_eq!(found.tokens.len(), 2);
    cluster.stop().await;
    let cluster = served(prompt.len() - 1).start(&checkpoint).await;
    let error = run(&cluster, job(&prompt, 0, 0)).await.unwrap_err();
    assert!(error.contains(&format!("this model sees {}", prompt.len() - 1)), "{error}");
    cluster.stop().await;
}
