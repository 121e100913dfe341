//! Whole runs: their checkpoints, what they refuse, and tiers of the models that they make.

use super::*;

/// A run of three phases over some text, as its users write it.
fn run_config(out: &str, steps: u64) -> TrainConfig {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let tier = |name: &str| serde_json::json!({ "name": name, "groups": 1, "experts": 4 });
    let phase = |name: &str, tiers: &str, train: serde_json::Value| {
        serde_json::json!({
            "name": name, "tiers": tiers, "steps": steps, "lr": 3e-3, "warmup": 2, "train": train,
            "balance": { "tier": 0.01, "group": 0.01, "expert": 0.01 },
        })
    };
    let only = serde_json::json!({ "tiers": ["tier_10b"], "gates": true });
    let all = serde_json::json!({ "backbone": true, "tiers": ["all"], "gates": true });
    let base = serde_json::json!({ "backbone": true, "tiers": ["tier_1b"] });
    let mut second = phase("1", "all", only);
    second["add"] = serde_json::json!({ "name": "tier_10b", "groups": 2, "experts": 3, "init": "copy:tier_1b" });
    let mut third = phase("2", "all", all);
    third["pull"] = 0.1.into();
    third["optimizer"] = serde_json::json!({ "kind": "adafactor" });
    let value = serde_json::json!({
        "out": out, "seed": 5,
        "model": { "new": {
            "tokenizer": demo, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8,
            "context": 64, "intermediate": 8, "tied_embeddings": true, "routes": [1, 1, 2],
            "tiers": [tier("tier_1b")],
        } },
        "data": { "files": ["text.txt", "lines.jsonl"], "sequence": 16, "batch": 4, "held_out": 0.1 },
        "checkpoint": { "every": 2, "keep": 2 },
        "phase": [phase("0", "..tier_1b", base), second, third],
    });
    serde_json::from_value(value).unwrap()
}

fn write_text(dir: &Path) {
    let text: String =
        (0..400).map(|i| format!("The {}th line of a text about {}. ", i, i * i % 17)).collect();
    std::fs::write(dir.join("text.txt"), text).unwrap();
    let lines = (0..40).map(|i| format!("{{\"text\": \"line {i} has its own document\"}}\n"));
    std::fs::write(dir.join("lines.jsonl"), lines.collect::<String>()).unwrap();
}

/// Everything that a run said, and the hash of the model that it made.
fn finish(mut run: Run) -> (Vec<Happened>, Hash) {
    let mut all = Vec::new();
    loop {
        let events = run.advance().unwrap();
        if events.is_empty() {
            break;
        }
        all.extend(events);
    }
    let model = Checkpoint::open(run.out().join(state::MODEL)).unwrap();
    (all, Hash(model.id()))
}

fn steps_of(all: &[Happened]) -> Vec<(u64, u64)> {
    let step = |event: &Happened| match event {
        Happened::Step(record) => Some((record.step, record.total.to_bits())),
        _ => None,
    };
    all.iter().filter_map(step).collect()
}

#[test]
fn a_run_that_was_interrupted_anywhere_makes_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |out: &str, threads, resume| {
        Run::open(run_config(out, 5), dir.path(), Arc::new(Cpu::best(threads)), resume).unwrap()
    };
    let (all, expected) = finish(open("whole", 2, false));
    let expected_steps = steps_of(&all);
    assert_eq!(expected_steps.len(), 15);
    assert!(expected_steps.windows(2).all(|pair| pair[0].1 != pair[1].1));
    // Interrupted after each of these calls, each time by forgetting all that is not on disk.
    let mut seen = Vec::new();
    for calls in [1, 3, 2, 5, 4] {
        let mut run = open("broken", 1, true);
        for _ in 0..calls {
            seen.extend(run.advance().unwrap());
        }
    }
    let (rest, found) = finish(open("broken", 3, true));
    assert_eq!(found, expected, "the model's hash");
    seen.extend(rest);
    for step in steps_of(&seen) {
        assert!(expected_steps.contains(&step), "step {} has other bits", step.0);
    }
    // What is there is not overwritten unless it is to be gone on with.
    let again = Run::open(run_config("whole", 5), dir.path(), Arc::new(Cpu::best(1)), false);
    assert!(again.err().unwrap().to_string().contains("--resume"));
    // Another configuration does not go on.
    let other = Run::open(run_config("whole", 6), dir.path(), Arc::new(Cpu::best(1)), true);
    assert!(other.err().unwrap().to_string().contains("another configuration"));
}

#[test]
fn a_checkpoint_may_be_asked_for_at_any_step() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |out: &str, resume| {
        let mut config = run_config(out, 5);
        config.checkpoint.every = 0;
        Run::open(config, dir.path(), Arc::new(Cpu::best(1)), resume).unwrap()
    };
    let (_, expected) = finish(open("whole", false));
    let mut run = open("asked", false);
    (0..3).for_each(|_| drop(run.advance().unwrap()));
    run.checkpoint().unwrap();
    // The next step is done while it is written.
    run.advance().unwrap();
    drop(run);
    let run = open("asked", true);
    assert_eq!(run.steps().0, 3);
    assert_eq!(finish(run).1, expected);
}

#[test]
fn a_damaged_state_is_named_and_the_checkpoint_before_it_serves() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |out: &str, resume| {
        Run::open(run_config(out, 5), dir.path(), Arc::new(Cpu::best(1)), resume)
    };
    let (_, expected) = finish(open("whole", false).unwrap());
    let mut run = open("damaged", false).unwrap();
    // Checkpoints of steps 2 and 4.
    (0..5).for_each(|_| drop(run.advance().unwrap()));
    drop(run);
    let saved = state::list(&dir.path().join("damaged")).unwrap();
    let [(2, _), (4, last)] = &saved[..] else { panic!("{saved:?}") };
    let path = last.join("state.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let cut = |bytes: usize| whole[..bytes].to_vec();
    let changed = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] ^= byte;
        bytes
    };
    let longer = [&whole[..], &[0]].concat();
    let end = whole.len();
    let damaged =
        [cut(0), cut(7), cut(8), cut(100), cut(end - 1), cut(end - 4), longer].into_iter().chain(
            [(0, 1), (7, 0xff), (8, 1), (30, 1), (60, 1), (end / 2, 1), (end - 1, 0x80)]
                .map(|(at, byte)| changed(at, byte)),
        );
    for (n, bytes) in damaged.enumerate() {
        std::fs::write(&path, bytes).unwrap();
        let error = open("damaged", true).err().map(|error| error.to_string());
        let error = error.unwrap_or_else(|| panic!("damage {n} was not seen"));
        let says = |words: &str| assert!(error.contains(words), "damage {n}: {error}");
        says("step-00000004/state.safetensors: ");
        says("remove the checkpoint's folder to go on from the one before");
    }
    std::fs::remove_dir_all(last).unwrap();
    let run = open("damaged", true).unwrap();
    assert_eq!(run.steps().0, 2);
    assert_eq!(finish(run).1, expected);
}

#[test]
fn what_cannot_be_trained_on_is_said_clearly() {
    let dir = tempfile::tempdir().unwrap();
    let open = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = run_config("bad", 3);
        change(&mut config);
        let opened = Run::open(config, dir.path(), Arc::new(Cpu::best(1)), false);
        opened.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let error = open(&|_| {});
    assert!(error.contains("text.txt: cannot read"), "{error}");
    write_text(dir.path());
    assert_eq!(open(&|_| {}), "");
    let error = open(&|config| config.phase[0].train.tiers = vec!["tier_9".into()]);
    assert!(error.contains("tier_9") && error.contains("tier_1b"), "{error}");
    let error = open(&|config| config.phase[0].train = serde_json::from_str("{}").unwrap());
    assert!(error.contains("trains nothing"), "{error}");
    let error = open(&|config| config.starvation.rho = 1e6);
    assert!(error.contains("tokens a step") && error.contains("experts"), "{error}");
    // Phases that come later are looked at before the first begins.
    let error = open(&|config| config.phase[2].train.tiers = vec!["tier_9".into()]);
    assert!(error.contains("phase 2") && error.contains("tier_9"), "{error}");
    let later =
        |change: fn(&mut NewTier)| open(&|config| change(config.phase[1].add.as_mut().unwrap()));
    let error = later(|add| add.init = Some("copy:tier_7".into()));
    assert!(error.contains("phase 1") && error.contains("tier_7"), "{error}");
    let error = later(|add| add.name = "tier_1b".parse().unwrap());
    assert!(error.contains("phase 1") && error.contains("tier_1b"), "{error}");
    let error = later(|add| add.k_tier = Some(9));
    assert!(error.contains("phase 1") && error.contains("k_tier"), "{error}");
    // A weight that would do nothing.
    assert_eq!(open(&|config| config.phase[0].balance.aux = 0.5), "");
    let error = open(&|config| config.phase[2].balance.aux = 0.5);
    assert!(error.contains("phase[2].balance.aux") && error.contains("one tier"), "{error}");
    assert_eq!(open(&|config| config.phase[0].no_decay = vec!["embed".into()]), "");
    let error = open(&|config| config.phase[0].no_decay = vec!["emded".into()]);
    assert!(error.contains("phase[0].no_decay[0]") && error.contains("emded"), "{error}");
    let error = open(&|config| config.data.sequence = 65);
    assert!(error.contains("context"), "{error}");
    std::fs::write(dir.path().join("text.txt"), [b'a', 0xff]).unwrap();
    let error = open(&|_| {});
    assert!(error.contains("not UTF-8: byte 1"), "{error}");
    std::fs::write(dir.path().join("text.txt"), "").unwrap();
    std::fs::write(dir.path().join("lines.jsonl"), "{\"txet\": 1}").unwrap();
    let error = open(&|_| {});
    assert!(error.contains("line 1") && error.contains("\"text\""), "{error}");
    std::fs::write(dir.path().join("lines.jsonl"), "").unwrap();
    let error = open(&|_| {});
    assert!(error.contains("0 tokens"), "{error}");
}

#[test]
fn two_do_not_train_in_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |resume| {
        let cpu = Arc::new(Cpu::best(1));
        Run::open(run_config("shared", 2), dir.path(), cpu, resume).map_err(|e| e.to_string())
    };
    let mut first = open(false).unwrap();
    first.advance().unwrap();
    let error = open(true).err().unwrap();
    assert!(error.contains("shared") && error.contains("another process"), "{error}");
    drop(first);
    open(true).unwrap();
}

#[test]
fn a_step_that_leaves_what_is_not_finite_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let mut config = run_config("wild", 50);
    config.checkpoint.every = 1;
    config.phase[0].optimizer = serde_json::from_str(r#"{ "kind": "sgd" }"#).unwrap();
    (config.phase[0].lr, config.phase[0].warmup, config.phase[0].clip) = (1e-3, 0, 0.0);
    // Two good steps, then one whose learning rate overflows.
    config.phase[0].steps = 2;
    let mut wild = config.phase[0].clone();
    (wild.name, wild.lr, wild.steps) = ("wild".into(), 3e38, 5);
    wild.optimizer = serde_json::from_str(r#"{ "kind": "sgd", "weight_decay": 1e30 }"#).unwrap();
    config.phase.insert(1, wild);
    let mut run = Run::open(config, dir.path(), Arc::new(Cpu::best(2)), false).unwrap();
    let error = loop {
        if let Err(error) = run.advance() {
            break error.to_string();
        }
    };
    assert!(error.starts_with("step 3 (phase wild)") && error.contains("not saved"), "{error}");
    let last = state::list(run.out()).unwrap().pop().unwrap();
    assert_eq!(last.0, 2);
    let params = Params::load(&Checkpoint::open(last.1.join(state::MODEL)).unwrap()).unwrap();
    assert!(params.list().iter().all(|p| p.values().iter().all(|x| x.is_finite())));
}

#[test]
fn a_tier_that_was_left_out_is_not_starved_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let mut config = run_config("back", 6);
    config.starvation.window = 4;
    // Both tiers exist from the beginning; only the first is used for longer than the window.
    let add = config.phase[1].add.take().unwrap();
    config.model.new.as_mut().unwrap().tiers.push(NewTier { init: None, ..add });
    let (all, _) = finish(Run::open(config, dir.path(), Arc::new(Cpu::best(2)), false).unwrap());
    let records = all.iter().filter_map(|event| match event {
        Happened::Step(record) if record.phase == "1" => Some(record),
        _ => None,
    });
    let record = records.min_by_key(|record| record.step).unwrap();
    let tier = record.tiers.iter().find(|tier| tier.tier == "tier_10b").unwrap();
    assert_eq!((record.step, tier.starved), (7, 0));
}

#[test]
fn what_a_tier_does_not_begin_with_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let tiers = || [TierConfig::new(TIER_1B, 2, 3, 0), TierConfig::new(TIER_10B, 3, 2, 0)];
    let write = |name: &str| {
        let mut params = config();
        params.moe.as_mut().unwrap().tiers = tiers().to_vec();
        let out = dir.path().join(name);
        let text = Text {
            tokenizer_json: Checkpoint::open(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../models/manpages-moe"
            ))
            .unwrap()
            .tokenizer_json()
            .unwrap(),
            ..Default::default()
        };
        state::write_model(&out, &Params::random(params, 4), &text).unwrap();
        out
    };
    let (whole, broken) = (write("whole"), write("broken"));
    // The second tier's and the dense part's weights are gone.
    for folder in ["dense", "tiers/tier_10b"] {
        for entry in std::fs::read_dir(broken.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                std::fs::write(&path, "gone").unwrap();
            }
        }
    }
    let add = |dir: &Path, init: &str| {
        let tier = TierConfig::new("tier_100b".parse().unwrap(), 2, 2, 0);
        add_tier(dir, tier, &init.parse().unwrap())
    };
    let error = add(&broken, "means").unwrap_err();
    assert!(error.to_string().contains("tier_10b"), "{error}");
    assert_eq!(add(&broken, "copy:tier_1b").unwrap(), add(&whole, "copy:tier_1b").unwrap());
}

#[test]
fn the_tier_that_was_added_last_can_be_dropped_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let tokenizer_json = Checkpoint::open(demo).unwrap().tokenizer_json().unwrap();
    let text = Text { tokenizer_json, ..Default::default() };
    state::write_model(&out, &Params::random(config(), 4), &text).unwrap();
    let first = Checkpoint::open(&out).unwrap().id();
    let error = drop_tier(&out, "tier_10b").unwrap_err().to_string();
    assert!(error.contains("tier_1b, tier_10b"), "{error}");
    let tier = TierConfig::new("tier_100b".parse().unwrap(), 1, 2, 0);
    add_tier(&out, tier, &Init::Random(1)).unwrap();
    assert_ne!(Checkpoint::open(&out).unwrap().id(), first);
    let error = drop_tier(&out, "tier_10b").unwrap_err().to_string();
    assert!(error.contains("not the tier that was added last"), "{error}");
    assert_eq!(drop_tier(&out, "tier_100b").unwrap(), 1);
    assert_eq!(Checkpoint::open(&out).unwrap().id(), first);
    assert!(!out.join("v2").exists() && !out.join("import.staging").exists());
}

#[test]
fn a_run_that_diverges_stops_with_its_step_and_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let mut config = run_config("wild", 50);
    (config.phase[0].lr, config.phase[0].warmup, config.phase[0].clip) = (1e38, 0, 0.0);
    let mut run = Run::open(config, dir.path(), Arc::new(Cpu::best(2)), false).unwrap();
    let error = loop {
        match run.advance() {
            Ok(events) => assert!(!events.iter().any(|e| matches!(e, Happened::Done { .. }))),
            Err(error) => break error.to_string(),
        }
        assert!(run.steps().0 < 50, "it never diverged");
    };
    assert!(error.starts_with("step ") && error.contains("learning rate"), "{error}");
    for (_, dir) in state::list(run.out()).unwrap() {
        Checkpoint::open(dir.join(state::MODEL)).unwrap();
    }
}
