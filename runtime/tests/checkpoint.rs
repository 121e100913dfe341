//! The native checkpoint: every damaged byte is noticed, every part loads alone, no path escapes.

mod hf;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use lite_llm_kernels::{cpu::Cpu, dtype::DType};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::{Checkpoint, CheckpointError, index::Hash, inspect::inspect, verify::verify},
    expert::ExpertKey,
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    store::DramStore,
};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

/// A small checkpoint with two tiers, one of two groups, and a chat template.
fn checkpoint() -> (TempDir, PathBuf) {
    checkpoint_in(DType::F32)
}

fn checkpoint_in(dtype: DType) -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let (source, out) = (dir.path().join("hf"), dir.path().join("ckpt"));
    write_random_hf(&source, &RandomShape::tiny(RandomClass::Qwen2Moe), &mut |_, _| {}).unwrap();
    fs::write(source.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let options = ImportOptions {
        tiers: Some("tier_1b:2x2,tier_10b:1x4".parse().unwrap()),
        routes: Some("2x1x1".parse().unwrap()),
        dtype: Some(dtype),
        ..hf::options(&source, &out)
    };
    import(&options, &mut |_, _, _| {}).unwrap();
    (dir, out)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

/// Everything that is wrong, as `open` and `verify` say it.
fn complaints(dir: &Path) -> Vec<String> {
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return vec![error.to_string()],
    };
    match verify(&checkpoint, &mut |_, _, _| {}) {
        Ok(_) => vec![],
        Err(damage) => damage.errors.iter().map(|e| e.to_string()).collect(),
    }
}

/// Reads every tensor of the model, as a server would.
fn load_all(checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    let config = checkpoint.config().clone();
    let moe = config.moe.as_ref().unwrap();
    checkpoint.dense_matrix("embed")?;
    checkpoint.dense_matrix("head")?;
    checkpoint.dense_vector("norm")?;
    for layer in 0..config.layers.len() {
        for name in [
            "attention.q",
            "attention.k",
            "attention.v",
            "attention.o",
            "shared.gate",
            "shared.up",
            "shared.down",
            "shared.router",
        ] {
            checkpoint.dense_matrix(&format!("layers.{layer}.{name}"))?;
        }
        for name in [
            "attention_norm",
            "ffn_norm",
            "attention.q_bias",
            "attention.k_bias",
            "attention.v_bias",
        ] {
            checkpoint.dense_vector(&format!("layers.{layer}.{name}"))?;
        }
        for (tier, t) in moe.tiers.iter().enumerate() {
            checkpoint.tier_router(layer, tier)?;
            checkpoint.group_router(layer, tier)?;
            (0..t.groups).try_for_each(|g| checkpoint.expert_router(layer, tier, g).map(drop))?;
        }
        for flat in 0..moe.experts() {
            checkpoint.expert(ExpertKey::from_flat(moe, layer, flat).unwrap())?;
        }
    }
    Ok(())
}

#[test]
fn a_whole_checkpoint_verifies_and_summarises() {
    let (_dir, out) = checkpoint();
    let checkpoint = Checkpoint::open(&out).unwrap();
    load_all(&checkpoint).unwrap();
    let mut last = (0, 0);
    let report = verify(&checkpoint, &mut |done, total, _| last = (done, total)).unwrap();
    assert_eq!(report.files as usize, files(&out).len(), "every file was read");
    assert_eq!(last, (report.bytes, report.bytes));
    let summary = inspect(&checkpoint).unwrap();
    assert_eq!(summary.bytes, report.bytes);
    assert_eq!(summary.id, Hash(checkpoint.id()).to_string());
    // 8 experts of 3 · 32 · 64 in 2 layers; all but 2 per layer are idle for a token.
    let idle = 6 * 2 * 3 * 32 * 64;
    assert!(summary.parameters - summary.active_parameters >= idle);
    assert_eq!(summary.tiers[0].parameters, 4 * 2 * 3 * 32 * 64);
    // In f32 a token reads four bytes per active parameter, of the embeddings nothing worth
    // counting; gates and odd shapes are filled up to whole panels.
    let config = checkpoint.config();
    let least = 4 * (summary.active_parameters - (config.vocab * config.hidden) as u64);
    let read = summary.bytes_per_token;
    assert!((least..least + least / 4).contains(&read), "{read} bytes, at least {least}");
    assert!(serde_json::to_string(&summary).unwrap().contains("\"active_parameters\""));
}

#[test]
fn every_flipped_byte_is_noticed_and_its_file_named() {
    let (_dir, out) = checkpoint();
    flip_bytes(&out);
    let (_dir, out) = checkpoint_in(DType::Int8);
    flip_bytes(&out);
}

fn flip_bytes(out: &Path) {
    assert_eq!(complaints(out), [""; 0]);
    for path in files(out) {
        let whole = fs::read(&path).unwrap();
        let name = path.strip_prefix(out).unwrap().to_str().unwrap();
        // Every file at many places; the bit changes with the place.
        let small = whole.len() < 3000;
        let places = (0..whole.len()).step_by(if small { 7 } else { 797 });
        for at in places.chain([8, whole.len() - 1]) {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(&path, &flipped).unwrap();
            let complaints = complaints(out);
            assert_eq!(complaints.len(), 1, "{name} byte {at}: {complaints:?}");
            assert!(complaints[0].contains(name), "{name} byte {at}: {complaints:?}");
        }
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(complaints(out), [""; 0]);
}

#[test]
fn damaged_weights_are_never_handed_out() {
    for dtype in [DType::F32, DType::Int8, DType::Int6, DType::Int4] {
        let (_dir, out) = checkpoint_in(dtype);
        damage_weights(&out);
    }
}

fn damage_weights(out: &Path) {
    for path in files(out).into_iter().filter(|p| p.extension().unwrap() == "safetensors") {
        let whole = fs::read(&path).unwrap();
        // What fills gaps is verified, but not read with the weights.
        let padding = padding(&whole);
        for at in (0..whole.len()).step_by(1999).chain([whole.len() - 1]) {
            if padding.iter().any(|range| range.contains(&at)) {
                continue;
            }
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            fs::write(&path, &flipped).unwrap();
            let opened = Checkpoint::open(out).unwrap();
            let error = load_all(&opened).unwrap_err();
            assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
            // As a server loads it: several threads over all that it needs.
            let store = DramStore::new(u64::MAX);
            let device = Arc::new(Cpu::best(2));
            let backbone = Backbone::load(&opened, device, |_, _| {}).map(drop);
            let refused = [store.load_all(&opened).err().map(|error| error.to_string())]
                .into_iter()
                .chain([backbone.err().map(|error| error.to_string())]);
            let refused: Vec<String> = refused.flatten().collect();
            let name = path.strip_prefix(out).unwrap().to_str().unwrap();
            assert!(!refused.is_empty() && refused.iter().all(|e| e.contains(name)), "{refused:?}");
        }
        fs::write(&path, &whole).unwrap();
    }
}

/// Ranges of a shard that hold nothing.
fn padding(shard: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (header, metadata) = safetensors::SafeTensors::read_metadata(shard).unwrap();
    let tensors = metadata.tensors();
    let fills = tensors.iter().filter(|(name, _)| name.starts_with("padding"));
    fills
        .map(|(_, info)| 8 + header + info.data_offsets.0..8 + header + info.data_offsets.1)
        .collect()
}

#[test]
fn a_file_of_another_length_or_none_is_named() {
    let (_dir, out) = checkpoint();
    for path in files(&out) {
        let whole = fs::read(&path).unwrap();
        let name = path.strip_prefix(&out).unwrap().to_str().unwrap();
        let mut lengths = vec![0, 1, whole.len() / 2, whole.len() - 1];
        lengths.extend([4095, 4096].into_iter().filter(|l| *l < whole.len()));
        for length in lengths {
            fs::write(&path, &whole[..length]).unwrap();
            let complaints = complaints(&out);
            assert!(complaints.iter().any(|c| c.contains(name)), "{name} {length}: {complaints:?}");
        }
        fs::write(&path, [&whole[..], b" "].concat()).unwrap();
        assert!(complaints(&out).iter().any(|c| c.contains(name)), "{name} longer");
        fs::remove_file(&path).unwrap();
        let tier = name.strip_prefix("tiers/").and_then(|rest| rest.strip_suffix("/index.json"));
        if let Some(tier) = tier {
            let opened = Checkpoint::open(&out).unwrap();
            let report = verify(&opened, &mut |_, _, _| {}).unwrap();
            assert_eq!(report.absent_tiers, [tier], "a tier without its index is left out");
        } else {
            let name = name.replace("manifest.1.json", "manifest.N.json");
            assert!(complaints(&out).iter().any(|c| c.contains(&name)), "{name} missing");
        }
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn verify_names_all_damaged_files_at_once() {
    let (_dir, out) = checkpoint();
    let shards = ["dense/l000.safetensors", "tiers/tier_10b/l001-g00000.safetensors"];
    for shard in shards {
        let path = out.join(shard);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let complaints = complaints(&out);
    assert_eq!(complaints.len(), 2);
    assert!(shards.iter().all(|s| complaints.iter().any(|c| c.contains(s))), "{complaints:?}");
}

#[test]
fn any_part_loads_without_the_rest() {
    let (_dir, out) = checkpoint();
    let key = |tier, group| ExpertKey { layer: 1, tier, group, expert: 1 };
    for path in files(&out) {
        let name = path.strip_prefix(&out).unwrap().to_str().unwrap().to_owned();
        let kept = [
            "manifest.1.json",
            "dense/index.json",
            "tiers/tier_1b/index.json",
            "tiers/tier_1b/g00001.json",
            "tiers/tier_1b/l001-g00001.safetensors",
        ];
        if !kept.contains(&name.as_str()) {
            fs::remove_file(path).unwrap();
        }
    }
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert!(checkpoint.expert(key(0, 1)).is_ok());
    assert!(checkpoint.expert_router(1, 0, 1).is_ok());
    let error = checkpoint.expert(key(0, 0)).unwrap_err().to_string();
    assert!(error.contains("g00000.json"), "{error}");
    assert!(checkpoint.config().moe.as_ref().unwrap().tiers[1].absent);
    let error = checkpoint.expert(key(1, 0)).unwrap_err().to_string();
    assert!(error.contains("tier_10b/index.json"), "{error}");
    assert!(checkpoint.dense_matrix("embed").is_err());
}

#[test]
fn questions_about_parts_that_do_not_exist_are_answered_with_errors() {
    let (_dir, out) = checkpoint();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let key = ExpertKey { layer: 0, tier: 0, group: 0, expert: 0 };
    for wrong in [
        ExpertKey { layer: 2, ..key },
        ExpertKey { tier: 2, ..key },
        ExpertKey { group: 2, ..key },
        ExpertKey { expert: 2, ..key },
        ExpertKey { expert: u32::MAX, ..key },
    ] {
        assert!(checkpoint.expert(wrong).is_err(), "{wrong}");
        assert!(checkpoint.expert_bytes(wrong).is_err(), "{wrong}");
    }
    assert!(checkpoint.group_router(0, 9).is_err());
    assert!(checkpoint.group_router(9, 0).is_err());
    assert!(checkpoint.expert_router(9, 0, 0).is_err());
    for name in ["", "layers", "layers.9.attention.q", "layers.x", "../embed", "router.experts"] {
        assert!(checkpoint.dense_matrix(name).is_err() && !checkpoint.has_dense(name), "{name}");
    }
    assert!(checkpoint.dense_matrix("norm").is_err(), "a vector is no matrix");
    assert!(checkpoint.dense_vector("embed").is_err(), "a matrix is no vector");
}

/// Other programs read the shards, and data lies where O_DIRECT and vector loads want it.
#[test]
fn shards_are_aligned_safetensors() {
    for dtype in DType::ALL {
        let (_dir, out) = checkpoint_in(dtype);
        check_alignment(&out);
    }
}

fn check_alignment(out: &Path) {
    for path in files(out).into_iter().filter(|p| p.extension().unwrap() == "safetensors") {
        let bytes = fs::read(&path).unwrap();
        let (header, _) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((8 + header) % 4096, 0, "{}", path.display());
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.tensors() {
            let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            if view.shape().len() > 1 {
                assert_eq!(offset % 64, 0, "{} {name}", path.display());
            }
            if name.starts_with("experts.") && name.ends_with(".gate") {
                assert_eq!(offset % 4096, 0, "{} {name}: an expert begins a page", path.display());
            }
        }
    }
}

/// Changes the manifest and gives it the right root, as a hostile author would.
fn forge(out: &Path, change: impl FnOnce(&mut Value)) {
    let path = out.join("manifest.1.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    manifest["root"] = json!("0".repeat(64));
    let text = serde_json::to_string(&manifest).unwrap();
    let root = blake3::hash(text.as_bytes()).to_string();
    fs::write(&path, text.replacen(&"0".repeat(64), &root, 1)).unwrap();
}

/// Replaces an index by another one that the manifest names with the right hash.
fn forge_index(out: &Path, at: &str, change: impl FnOnce(&mut Value)) {
    let path = out.join("dense/index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(index.pointer_mut(at).unwrap());
    let text = serde_json::to_vec(&index).unwrap();
    fs::write(&path, &text).unwrap();
    forge(out, |manifest| {
        manifest["dense"]["bytes"] = json!(text.len());
        manifest["dense"]["blake3"] = json!(blake3::hash(&text).to_string());
    });
}

#[test]
fn a_forged_manifest_cannot_leave_its_folder_or_lie_about_shapes() {
    let (dir, out) = checkpoint();
    let manifest = fs::read(out.join("manifest.1.json")).unwrap();
    let index = fs::read(out.join("dense/index.json")).unwrap();
    let secret = dir.path().join("secret.json");
    fs::write(&secret, &index).unwrap();
    forge(&out, |_| {});
    assert_eq!(complaints(&out), [""; 0], "forging itself works");

    for path in ["../secret.json", secret.to_str().unwrap(), "dense/../../secret.json", "a\\b", ""]
    {
        forge(&out, |manifest| manifest["dense"]["path"] = json!(path));
        let error = Checkpoint::open(&out).unwrap_err();
        assert!(matches!(error, CheckpointError::UnsafePath { .. }), "{path}: {error}");
    }
    std::os::unix::fs::symlink(&secret, out.join("link.json")).unwrap();
    forge(&out, |manifest| manifest["dense"]["path"] = json!("link.json"));
    let error = Checkpoint::open(&out).unwrap_err();
    assert!(matches!(error, CheckpointError::UnsafePath { .. }), "{error}");
    fs::remove_file(out.join("link.json")).unwrap();

    fs::write(out.join("manifest.1.json"), &manifest).unwrap();
    type Change = fn(&mut Value);
    let lies: [(&str, Change); 8] = [
        ("/model/sections/0/bytes", |v| *v = json!(64)),
        ("/model/sections/0/bytes", |v| *v = json!(u64::MAX)),
        ("/model/sections/0/offset", |v| *v = json!(0)),
        ("/model/sections/0/offset", |v| *v = json!(u64::MAX)),
        ("/model/sections/0/name", |v| *v = json!("other")),
        ("/model/header_bytes", |v| *v = json!(64)),
        ("/model/path", |v| *v = json!("../x")),
        ("/layers", |v| drop(v.as_array_mut().unwrap().pop())),
    ];
    for (at, lie) in lies {
        forge_index(&out, at, lie);
        let error = Checkpoint::open(&out).unwrap_err().to_string();
        assert!(error.contains("dense/index.json"), "{at}: {error}");
        fs::write(out.join("manifest.1.json"), &manifest).unwrap();
        fs::write(out.join("dense/index.json"), &index).unwrap();
    }
    let configs: [(&str, Change); 8] = [
        ("/dtype", |v| *v = json!("int8")),
        ("/dtype", |v| *v = json!("int2")),
        ("/format", |v| *v = json!(3)),
        ("/determinism", |v| *v = json!(99)),
        ("/model/hidden", |v| *v = json!(0)),
        ("/model/hidden", |v| *v = json!(1 << 20)),
        ("/model/moe/tiers/0/experts_per_group", |v| *v = json!(u32::MAX)),
        ("/tiers/0/id", |v| *v = json!("../up")),
    ];
    for (at, lie) in configs {
        forge(&out, |manifest| lie(manifest.pointer_mut(at).unwrap()));
        assert!(!complaints(&out).is_empty(), "{at}");
        fs::write(out.join("manifest.1.json"), &manifest).unwrap();
    }
}

#[test]
fn a_folder_that_is_no_checkpoint_says_so() {
    let dir = tempdir().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::NoManifest { .. }), "{error}");
    let error = Checkpoint::open(dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
    let nested = format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000));
    fs::write(dir.path().join("manifest.1.json"), nested).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
}

#[test]
fn an_embedded_checkpoint_is_the_same_checkpoint() {
    let (_dir, out) = checkpoint();
    let list: Vec<(&'static str, &'static [u8])> = files(&out)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&out).unwrap().to_str().unwrap().to_owned();
            let bytes: &'static [u8] = fs::read(&path).unwrap().leak();
            (&*name.leak(), bytes)
        })
        .collect();
    let embedded = Checkpoint::embedded(list.leak()).unwrap();
    let on_disk = Checkpoint::open(&out).unwrap();
    assert_eq!(embedded.id(), on_disk.id());
    load_all(&embedded).unwrap();
    let key = ExpertKey { layer: 1, tier: 1, group: 0, expert: 3 };
    let (a, b) = (embedded.expert(key).unwrap(), on_disk.expert(key).unwrap());
    assert_eq!(a.down.data()[..], b.down.data()[..]);
    assert_eq!(embedded.chat_template().unwrap().unwrap(), "{{ messages[0].content }}");
    verify(&embedded, &mut |_, _, _| {}).unwrap();
}

/// Weights are read into memory of the process's own, and verified there: files that change or go
/// afterwards change nothing that is computed with.
#[test]
fn files_that_change_after_they_were_read_change_nothing() {
    for dtype in [DType::Bf16, DType::Int8] {
        let (_dir, out) = checkpoint_in(dtype);
        let checkpoint = Checkpoint::open(&out).unwrap();
        let key = ExpertKey { layer: 1, tier: 1, group: 0, expert: 0 };
        let read = checkpoint.expert(key).unwrap();
        let before = read.down.data().to_vec();
        let shard = checkpoint.expert_place(key).unwrap().file.unwrap();
        let bytes = fs::metadata(&shard).unwrap().len() as usize;
        // In place, as a copy over it does: the file keeps its inode.
        fs::write(&shard, vec![0x5a; bytes]).unwrap();
        assert_eq!(read.down.data()[..], before[..]);
        let damaged = checkpoint.expert(key).unwrap_err().to_string();
        assert!(damaged.contains("damaged"), "{damaged}");
        fs::remove_dir_all(&out).unwrap();
        assert_eq!(read.down.data()[..], before[..]);
    }
}

/// Experts are loaded by many threads at once; an expert's three matrices lie side by side.
#[test]
fn experts_load_in_parallel() {
    let (_dir, out) = checkpoint();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let moe = checkpoint.config().moe.clone().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for flat in 0..moe.experts() {
                    let key = ExpertKey::from_flat(&moe, flat % 2, flat).unwrap();
                    let expert = checkpoint.expert(key).unwrap();
                    let gate = expert.gate.data();
                    let end = gate.as_ptr() as usize + gate.len();
                    assert_eq!(end, expert.up.data().as_ptr() as usize);
                }
            });
        }
    });
}
