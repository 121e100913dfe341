//! A checkpoint grows by adding files: earlier manifests, files and answers stay as they were.

mod grow;
mod hf;

use std::{fs, path::PathBuf};

use grow::{checkpoint, contents, extend, fill, finish, logits, routes, tier_10b};
use lite_llm_kernels::dtype::DType;
use lite_llm_runtime::{
    checkpoint::{
        Checkpoint, CheckpointError, inspect::inspect, layout::Part, verify::verify, writer::Writer,
    },
    store::DramStore,
    tier::{TIER_10B, TIER_100B, TierConfig},
};
use tempfile::{TempDir, tempdir};

#[test]
fn a_tier_is_added_by_adding_files_and_nothing_earlier_changes() {
    let (_dir, out) = checkpoint();
    let at = |suffix: &str| format!("{}{suffix}", out.display());
    let (files, id) = (contents(&out), Checkpoint::open(&out).unwrap().id());
    let before = logits(&at(""), "all").unwrap();

    extend(&out, tier_10b()).unwrap();
    let after = contents(&out);
    for (path, bytes) in &files {
        assert!(after.get(path) == Some(bytes), "{}", path.display());
    }
    let first = Checkpoint::open(at("@1")).unwrap();
    assert_eq!(first.id(), id);
    assert_eq!(first.address(), at("@1"));
    let extended = Checkpoint::open(&out).unwrap();
    assert_eq!(extended.manifest().number, 2);
    assert_eq!(extended.manifest().parent, Some(first.manifest().root));
    verify(&extended, &mut |_, _, _| {}).unwrap();

    let same = [(at("@1"), "all"), (at("@2"), "tier_1b"), (at(""), "..tier_1b")];
    for (location, tiers) in same {
        assert_eq!(logits(&location, tiers).unwrap(), before, "{location} {tiers}");
    }
    let others = [logits(&at(""), "all").unwrap(), logits(&at(""), "tier_10b").unwrap()];
    assert!(others[0] != before && others[1] != before && others[0] != others[1]);

    extend(&out, TierConfig::new(TIER_100B, 2, 2, 0)).unwrap();
    assert_eq!(logits(&at(""), "tier_1b").unwrap(), before);
    assert_eq!(logits(&at(""), "..tier_10b").unwrap(), others[0]);
    let error = Checkpoint::open(at("@9")).unwrap_err();
    assert!(matches!(error, CheckpointError::NoNumber { .. }), "{error}");
    assert!(error.to_string().contains("manifest.3.json"), "{error}");
}

#[test]
fn a_tier_may_have_sizes_formats_and_routes_of_its_own() {
    let (_dir, out) = checkpoint();
    extend(&out, tier_10b()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let summary = inspect(&checkpoint).unwrap();
    let [first, second] = &summary.tiers[..] else { panic!("two tiers") };
    assert_eq!((first.dtype, first.routes), ("f32", [2, 2]));
    assert_eq!((second.dtype, second.intermediate, second.routes), ("int4", 96, [1, 3]));
    let key = |tier| lite_llm_runtime::expert::ExpertKey { layer: 1, tier, group: 1, expert: 2 };
    let expert = checkpoint.expert(key(1)).unwrap();
    assert_eq!((expert.gate.n(), expert.down.k()), (96, 96));
    assert_eq!(expert.gate.dtype(), DType::Int4);
    assert_eq!(expert.bytes(), checkpoint.expert_bytes(key(1)).unwrap());
    assert_eq!(expert.bytes(), second.expert_bytes);
    assert_ne!(checkpoint.expert(key(0)).unwrap().bytes(), second.expert_bytes);
    let moe = checkpoint.config().moe.as_ref().unwrap();
    assert_eq!((moe.routes_max(|_| true), moe.routes_max(|tier| tier == 1)), (4, 3));
    // A token has 4 routes in the first tier or 3 in the second: rows are as long as the longest.
    let routes = routes(&out.display().to_string());
    let long = routes.chunks(4).filter(|row| row.iter().all(|e| (0..8).contains(e))).count();
    let short = routes.chunks(4).filter(|row| row[3] == -1 && row[..3].iter().all(|e| *e >= 8));
    assert!(long > 0 && long + short.count() == 2 * 40, "{routes:?}");
}

#[test]
fn a_folder_without_a_tiers_files_runs_without_that_tier() {
    let (_dir, out) = checkpoint();
    let at = out.display().to_string();
    let before = logits(&at, "all").unwrap();
    extend(&out, tier_10b()).unwrap();
    fs::remove_dir_all(out.join("v2")).unwrap();
    assert_eq!(logits(&at, "all").unwrap(), before);
    let error = logits(&at, "tier_10b").unwrap_err();
    assert!(error.contains("tier_10b") && error.contains("tier_1b"), "{error}");
    let checkpoint = Checkpoint::open(&out).unwrap();
    let report = verify(&checkpoint, &mut |_, _, _| {}).unwrap();
    assert_eq!(report.absent_tiers, ["tier_10b"]);
    assert!(!inspect(&checkpoint).unwrap().tiers[1].here);
    // What is left of the files is no tier: it is refused, not passed over.
    let (_dir, out) = checkpoint_of_two();
    fs::remove_file(out.join("v2/tiers/tier_10b/l001-g00002.safetensors")).unwrap();
    let error = DramStore::new(u64::MAX).load_all(&Checkpoint::open(&out).unwrap()).unwrap_err();
    assert!(error.to_string().contains("l001-g00002.safetensors"), "{error}");
}

fn checkpoint_of_two() -> (TempDir, PathBuf) {
    let (dir, out) = checkpoint();
    extend(&out, tier_10b()).unwrap();
    (dir, out)
}

#[test]
fn two_do_not_write_to_one_folder_at_once() {
    let (dir, out) = checkpoint();
    let writer = Writer::extend(&out, &[tier_10b()]).unwrap();
    let error = Writer::extend(&out, &[tier_10b()]).unwrap_err();
    assert!(matches!(error, CheckpointError::Occupied { .. }), "{error}");
    // Where locks do not reach, the manifest is still created only if there is none.
    fs::write(out.join("manifest.2.json"), "somebody else's").unwrap();
    let error = finish(writer).unwrap_err();
    assert!(matches!(error, CheckpointError::Raced { .. }), "{error}");
    assert_eq!(fs::read(out.join("manifest.2.json")).unwrap(), b"somebody else's");

    let (new, config) = (dir.path().join("new"), Checkpoint::open(format!("{}@1", out.display())));
    let config = config.unwrap().config().clone();
    let _first = Writer::create(&new, &config, DType::F32).unwrap();
    let error = Writer::create(&new, &config, DType::F32).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
}

#[test]
fn an_extension_that_was_interrupted_leaves_the_old_state_and_can_be_repeated() {
    let (_dir, out) = checkpoint();
    let id = Checkpoint::open(&out).unwrap().id();
    let mut writer = Writer::extend(&out, &[tier_10b()]).unwrap();
    let config = writer.config().clone();
    for part in Part::of_tier(&config, 1).take(3) {
        writer.write_part(part, fill).unwrap();
    }
    drop(writer);
    assert_eq!(Checkpoint::open(&out).unwrap().id(), id);
    extend(&out, tier_10b()).unwrap();
    verify(&Checkpoint::open(&out).unwrap(), &mut |_, _, _| {}).unwrap();
}

#[test]
fn a_tier_that_does_not_fit_the_model_is_refused_before_anything_is_written() {
    let (_dir, out) = checkpoint();
    let files = contents(&out);
    for (bad, word) in [
        (TierConfig::new("tier_1b".parse().unwrap(), 2, 4, 0), "different names"),
        (TierConfig::new(TIER_10B, 1, 4, 0), "k_group"),
        (TierConfig { intermediate: Some(0), ..tier_10b() }, "intermediate"),
        (TierConfig { k_expert: Some(6), ..tier_10b() }, "k_expert"),
    ] {
        let error = Writer::extend(&out, &[bad]).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(contents(&out) == files, "no file came or changed");
}

#[test]
fn what_is_packed_and_what_trains_is_known_though_not_read() {
    let (_dir, out) = checkpoint();
    // Training state: an index of shards whose sections only training knows.
    let shard = fs::read(out.join("tiers/tier_1b/l000-g00000.safetensors")).unwrap();
    let page: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("tiers/tier_1b/g00000.json")).unwrap()).unwrap();
    let mut entry = page["layers"][0]["shard"].clone();
    entry["path"] = "state/moments.safetensors".into();
    fs::create_dir(out.join("state")).unwrap();
    fs::write(out.join("state/moments.safetensors"), &shard).unwrap();
    let index = serde_json::to_vec(&serde_json::json!({ "shards": [entry] })).unwrap();
    fs::write(out.join("state.json"), &index).unwrap();
    let path = out.join("manifest.1.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["state"] = serde_json::json!({
        "path": "state.json", "bytes": index.len(), "blake3": blake3::hash(&index).to_string()
    });
    manifest["root"] = "0".repeat(64).into();
    let text = serde_json::to_string(&manifest).unwrap();
    let root = blake3::hash(text.as_bytes()).to_string();
    fs::write(&path, text.replacen(&"0".repeat(64), &root, 1)).unwrap();

    let whole = verify(&Checkpoint::open(&out).unwrap(), &mut |_, _, _| {}).unwrap();
    let mut damaged = shard.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(out.join("state/moments.safetensors"), damaged).unwrap();
    let damage = verify(&Checkpoint::open(&out).unwrap(), &mut |_, _, _| {}).unwrap_err();
    assert!(damage.to_string().contains("state/moments.safetensors"), "{damage}");
    assert!(whole.files > 0);
}

#[test]
fn format_1_is_refused_with_advice() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("manifest.json"), r#"{ "format": 1, "determinism": 1 }"#).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("format version 1, expected 2; import the model again"), "{error}");
}
