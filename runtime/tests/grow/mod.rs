//! A checkpoint that can grow, the tier that it grows by, and its answers: for tests of both.

#![allow(dead_code, reason = "each test uses a part")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use lite_llm_kernels::{
    cpu::Cpu,
    dtype::DType,
    matrix::{PackedMatrix, Source},
};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::{
        Checkpoint, CheckpointError,
        layout::{Part, Shape, TensorSpec},
        writer::{TensorSink, Text, Writer},
    },
    engine::{Engine, Event},
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    sequence::Request,
    store::DramStore,
    tier::{TIER_10B, TierConfig, TierSet},
};
use tempfile::{TempDir, tempdir};

use crate::hf;

/// A checkpoint of one tier, whose routing can choose among two groups.
pub(crate) fn checkpoint() -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let (source, out) = (dir.path().join("hf"), dir.path().join("ckpt"));
    write_random_hf(&source, &RandomShape::tiny(RandomClass::Qwen2Moe), &mut |_, _| {}).unwrap();
    let options = ImportOptions {
        tiers: Some("tier_1b:2x4".parse().unwrap()),
        routes: Some("1x2x2".parse().unwrap()),
        ..hf::options(&source, &out)
    };
    import(&options, &mut |_, _, _| {}).unwrap();
    (dir, out)
}

/// Values that depend on a tensor's name alone.
pub(crate) fn fill(spec: &TensorSpec, sink: &mut TensorSink<'_>) -> Result<(), CheckpointError> {
    let salt = blake3::hash(spec.name.as_bytes()).as_bytes()[0] as f32;
    let value = |i: usize| ((i as f32 * 0.61 + salt).sin()) * 0.2;
    match spec.shape {
        Shape::Vector { n } => {
            let values: Vec<f32> = (0..n).map(value).collect();
            sink.write(bytemuck::cast_slice(&values))
        }
        Shape::Matrix { n, k } => {
            let values: Vec<f32> = (0..n * k).map(value).collect();
            sink.write(PackedMatrix::pack(spec.dtype, n, k, Source::F32(&values)).data())
        }
    }
}

pub(crate) fn extend(dir: &Path, tier: TierConfig) -> Result<(), CheckpointError> {
    let writer = Writer::extend(dir, &[tier])?;
    finish(writer)
}

pub(crate) fn finish(mut writer: Writer) -> Result<(), CheckpointError> {
    let config = writer.config().clone();
    let last = config.moe.as_ref().unwrap().tiers.len() - 1;
    for part in Part::of_tier(&config, last) {
        writer.write_part(part, fill)?;
    }
    writer.finish(&Text::default()).map(drop)
}

/// One that differs from the first in everything that a tier may have for itself.
pub(crate) fn tier_10b() -> TierConfig {
    TierConfig {
        intermediate: Some(96),
        dtype: Some(DType::Int4),
        k_group: Some(1),
        k_expert: Some(3),
        ..TierConfig::new(TIER_10B, 3, 5, 0)
    }
}

/// All files below a folder, by their paths within it.
pub(crate) fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_owned();
                found.insert(name, fs::read(path).unwrap());
            }
        }
    }
    found
}

/// The bits of all logits of a prompt.
pub(crate) fn logits(location: &str, tiers: &str) -> Result<Vec<u32>, String> {
    let mut bits = Vec::new();
    for event in events(location, tiers, |request| request.logits = true)? {
        if let Event::Logits { values, .. } = event {
            bits.extend(values.iter().map(|v| v.to_bits()));
        }
    }
    assert!(!bits.is_empty());
    Ok(bits)
}

/// The experts of all 40 tokens of a prompt, `[layers, tokens, K]`.
pub(crate) fn routes(location: &str) -> Vec<i32> {
    let ask = |request: &mut Request| {
        (request.routes, request.prefill_chunk, request.max_new_tokens) = (true, 40, 0);
    };
    let mut found = Vec::new();
    for event in events(location, "all", ask).unwrap() {
        if let Event::Routes { experts, .. } = event {
            found.extend(experts);
        }
    }
    found
}

/// What an engine says of a prompt of 40 tokens.
fn events(
    location: &str,
    tiers: &str,
    ask: impl FnOnce(&mut Request),
) -> Result<Vec<Event>, String> {
    let checkpoint = Checkpoint::open(location).map_err(|e| e.to_string())?;
    let device = Arc::new(Cpu::best(2));
    let backbone = Arc::new(Backbone::load(&checkpoint, device, |_, _| {}).unwrap());
    let experts = DramStore::new(u64::MAX);
    experts.load_all(&checkpoint).unwrap();
    let mut engine = Engine::new(backbone, 8 << 20).unwrap();
    let mut request = Request::greedy((0..40).map(|i| i * 7 % 64).collect(), 4);
    request.tiers = tiers.parse::<TierSet>().unwrap();
    ask(&mut request);
    engine.submit(1, request).map_err(|e| e.to_string())?;
    engine.run_local(&experts);
    let mut events = Vec::new();
    while let Some(event) = engine.poll_event() {
        match event {
            Event::Failed { reason, .. } => return Err(reason),
            event => events.push(event),
        }
    }
    Ok(events)
}
