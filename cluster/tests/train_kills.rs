//! A training that is killed and resumed ends with the bytes of one that was not. `tests/campaigns/train_kills.py`
//! kills at more moments, and workers too.

mod process;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use process::{Process, demo_model, run};
use serde_json::Value;

const STEPS: usize = 24;

fn config(folder: &Path, name: &str) -> PathBuf {
    let text = folder.join("text.txt");
    fs::write(&text, "The licence applies to every file of this text. ".repeat(60)).unwrap();
    let (text, tokenizer) = (text.display(), demo_model());
    let tokenizer = tokenizer.display();
    let half = STEPS / 2;
    let path = folder.join(format!("{name}.toml"));
    let config = format!(
        r#"
        out = "{name}"
        [model.new]
        tokenizer = "{tokenizer}"
        hidden = 16
        layers = 1
        heads = 2
        kv_heads = 1
        head_dim = 8
        context = 16
        intermediate = 8
        routes = [1, 1, 1]
        tiers = [{{ name = "tier_1b", groups = 1, experts = 2 }}]
        [data]
        files = ["{text}"]
        sequence = 16
        batch = 2
        evaluate_every = 4
        [checkpoint]
        every = 3
        [starvation]
        rho = 0.0
        [[phase]]
        name = "0"
        train = {{ backbone = true, tiers = ["all"] }}
        steps = {half}
        lr = 1e-2
        [[phase]]
        name = "1"
        add = {{ name = "tier_10b", groups = 1, experts = 2, k_tier = 2 }}
        train = {{ backbone = true, tiers = ["all"], gates = true }}
        balance = {{ tier = 0.01, expert = 0.01 }}
        steps = {half}
        lr = 1e-2
        "#
    );
    fs::write(&path, config).unwrap();
    path
}

/// Every file of a model.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => drop(all.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    let below = |(path, bytes): (PathBuf, Vec<u8>)| {
        (path.strip_prefix(folder).map(Path::to_owned).unwrap_or(path), bytes)
    };
    all.into_iter().map(below).collect()
}

/// What metrics say of each step that counts, but for time.
fn losses(run: &Path) -> BTreeMap<u64, Value> {
    let mut steps = BTreeMap::new();
    for line in fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines() {
        let Ok(mut value) = serde_json::from_str::<Value>(line) else { continue };
        let Some(step) = value["step"].as_u64() else { continue };
        match value["event"].as_str() {
            Some("step") => {
                value["seconds"] = Value::Null;
                steps.insert(step, value);
            }
            Some("resumed") => drop(steps.split_off(&(step + 1))),
            _ => {}
        }
    }
    steps
}

#[test]
fn a_training_that_is_killed_ends_as_one_that_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let whole = config(folder.path(), "whole");
    run(&["train", whole.to_str().unwrap()]).expect(0, &[]);
    let expected =
        (files(&folder.path().join("whole/model")), losses(&folder.path().join("whole")));
    assert_eq!(expected.1.len(), STEPS);

    let killed = config(folder.path(), "killed");
    let args = ["train", killed.to_str().unwrap(), "--resume"];
    // Each time soon after its first checkpoint.
    for _ in 0..5 {
        let mut process = Process::start(&args);
        process.wait_until("a checkpoint", |process| {
            ["saved", "done:"].iter().any(|words| process.out().contains(words))
        });
        process.kill();
    }
    run(&args).expect(0, &[]);
    let out = folder.path().join("killed");
    assert!(files(&out.join("model")) == expected.0, "the models differ");
    assert_eq!(losses(&out), expected.1);
    assert!(fs::read_to_string(out.join("metrics.jsonl")).unwrap().contains("resumed"));
}
