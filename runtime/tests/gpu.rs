//! A GPU has the CPU's bits: logits and tokens of whole requests, whatever part of the experts its
//! memory holds, whatever meets in a pass. Skipped, with a line that says so, where there is none.
//!
//! `kernels/cuda/check.sh --host` says how to run it without one: under the libraries of
//! `kernels/cuda/host`, which run the kernels on the CPU.

use std::{path::PathBuf, sync::Arc};

use lite_llm_kernels::{
    cpu::Cpu,
    cuda::{Cuda, compile::Folders, driver_present},
    cuda_device::Gpu,
    device::Device,
    dtype::DType,
    kv::KvDType,
    math::Math,
    simd::Simd,
};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::{Engine, Event},
    expert::ExpertStore,
    forward::Carrier,
    gpu::GpuCarrier,
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    residency::HbmStore,
    sampler::Sampling,
    sequence::Request,
    store::DramStore,
};

const KV_BYTES: u64 = 64 << 20;

fn gpu() -> Option<Arc<Gpu>> {
    gpu_by(Math::Exact)
}

fn gpu_by(math: Math) -> Option<Arc<Gpu>> {
    if !driver_present() {
        eprintln!("skipped: there is no NVIDIA driver here");
        return None;
    }
    let cache = std::env::var_os("LITE_LLM_CACHE").map(PathBuf::from);
    let sources = std::env::var_os("LITE_LLM_CUDA_SOURCES").map(PathBuf::from);
    let cuda = Cuda::open(0, Folders { cache, sources }).unwrap();
    Some(Arc::new(Gpu::new(cuda, Arc::new(Cpu::new(2, Simd::best()))).by(math)))
}

struct Model {
    checkpoint: Checkpoint,
    store: Arc<DramStore>,
    _folder: tempfile::TempDir,
}

fn model(shape: &RandomShape, dtype: DType, tiers: Option<&str>) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("hf"), folder.path().join("model"));
    write_random_hf(&source, shape, &mut |_, _| {}).unwrap();
    let options = ImportOptions {
        dtype: Some(dtype),
        tiers: tiers.map(|tiers| tiers.parse().unwrap()),
        ..ImportOptions::new(source, &*out)
    };
    import(&options, &mut |_, _, _| {}).unwrap();
    let checkpoint = Checkpoint::open(out).unwrap();
    let store = Arc::new(DramStore::new(1 << 30));
    store.load_all(&checkpoint).unwrap();
    Model { checkpoint, store, _folder: folder }
}

fn requests() -> Vec<Request> {
    let text = |seed: u32, tokens: u32| -> Vec<u32> {
        (0..tokens).map(|at| (seed * 7919 + at * 31) % 256).collect()
    };
    let logits = |prompt| Request { logits: true, ..Request::greedy(prompt, 4) };
    let sampling = Sampling { temperature: 0.9, top_k: 20, seed: 7, ..Sampling::GREEDY };
    vec![
        logits(text(1, 1)),
        logits(text(2, 7)),
        Request { sampling, ..logits(text(3, 70)) },
        logits(text(4, 300)),
        Request { prefill_chunk: 33, ..logits(text(5, 100)) },
    ]
}

/// Requests that only want tokens, which a GPU chooses by itself.
fn requests_of_tokens() -> Vec<Request> {
    let base = Sampling { temperature: 0.9, seed: 11, ..Sampling::GREEDY };
    let settings = [
        Sampling::GREEDY,
        base,
        Sampling { top_k: 20, ..base },
        Sampling { top_p: 0.8, min_p: 0.001, ..base },
    ];
    let plain = |(at, request): (usize, Request)| Request {
        logits: false,
        max_new_tokens: 6,
        sampling: settings[at % settings.len()],
        ..request
    };
    requests().into_iter().enumerate().map(plain).collect()
}

/// What a model says to requests that are submitted together.
fn events<D: Device>(
    mut engine: Engine<D>,
    store: &dyn ExpertStore<D::Matrix>,
    requests: &[Request],
) -> Vec<Event> {
    for (id, request) in (0..).zip(requests) {
        engine.submit(id, request.clone()).unwrap();
    }
    engine.run_local(store);
    std::iter::from_fn(|| engine.poll_event()).collect()
}

/// The same requests on the CPU and on a GPU whose memory holds all experts, some, one, and, where
/// every layer comes back to the host, all.
fn compare(gpu: &Arc<Gpu>, model: &Model, kv: KvDType, what: &str) {
    let cpu = Arc::new(Cpu::new(2, Simd::best()));
    let on_cpu = Arc::new(Backbone::load(&model.checkpoint, cpu, |_, _| {}).unwrap());
    let on_gpu = Arc::new(Backbone::load(&model.checkpoint, gpu.clone(), |_, _| {}).unwrap());
    let (of_logits, of_tokens) = (requests(), requests_of_tokens());
    let bytes = model.checkpoint.tier_expert_bytes();
    let largest = bytes.iter().max().unwrap() + 1024;
    let experts = model.checkpoint.config().expert_keys().count() as u64;
    for alone in [true, false] {
        let each = of_logits.chunks(1).chain(of_tokens.chunks(1));
        let sets: Vec<&[Request]> =
            if alone { each.collect() } else { vec![&of_logits, &of_tokens] };
        for (set, requests) in sets.into_iter().enumerate() {
            let engine = Engine::with_cache(on_cpu.clone(), KV_BYTES, kv).unwrap();
            let expected = events(engine, &*model.store, requests);
            assert!(!expected.iter().any(|event| matches!(event, Event::Failed { .. })));
            for (budget, carried) in [
                (largest * experts, true),
                (largest * experts / 4, true),
                (largest, true),
                (largest * experts, false),
            ] {
                let bytes = bytes.clone();
                let store = HbmStore::new(gpu.clone(), model.store.clone(), budget, bytes);
                let store = Arc::new(store);
                let carrier = GpuCarrier::new(&on_gpu, store.clone()).unwrap();
                let carrier = carrier.filter(|_| carried);
                let carrier = carrier.map(|carrier| Arc::new(carrier) as Arc<dyn Carrier<Gpu>>);
                let engine = Engine::with_cache(on_gpu.clone(), KV_BYTES, kv).unwrap();
                let found = events(engine.carried_by(carrier), &*store, requests);
                let place = format!("{what}, set {set}, {budget} bytes, carried {carried}");
                assert_eq!(found.len(), expected.len(), "{place}");
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(same(found, expected), "{place}: {}", difference(found, expected));
                }
                assert!(store.residence().held <= budget, "{place}");
            }
        }
    }
}

/// Equal, and logits in their bits.
fn same(found: &Event, expected: &Event) -> bool {
    if let (Event::Logits { values, .. }, Event::Logits { values: right, .. }) = (found, expected) {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        return bits(values) == bits(right);
    }
    found == expected
}

fn difference(found: &Event, expected: &Event) -> String {
    let (Event::Logits { values, first, .. }, Event::Logits { values: right, .. }) =
        (found, expected)
    else {
        return format!("{found:?} instead of {expected:?}");
    };
    let wrong = values.iter().zip(right).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    let at = values.iter().zip(right).position(|(a, b)| a.to_bits() != b.to_bits());
    format!("{wrong} of {} logits from position {first} differ, the first at {at:?}", right.len())
}

/// Rows of one leaf, so that kernels of a single row are used.
fn whole_leaves(class: RandomClass) -> RandomShape {
    RandomShape { hidden: 256, intermediate: 256, heads: 4, ..RandomShape::tiny(class) }
}

#[test]
fn every_class_in_f32() {
    let Some(gpu) = gpu() else { return };
    use RandomClass::*;
    for class in [Olmoe, Mixtral, Qwen2Moe, Qwen3Moe] {
        for shape in [RandomShape::tiny(class), whole_leaves(class)] {
            let model = model(&shape, DType::F32, None);
            compare(&gpu, &model, KvDType::F32, &format!("{class:?}, hidden {}", shape.hidden));
        }
    }
}

#[test]
fn every_format_of_weights_and_of_the_cache() {
    let Some(gpu) = gpu() else { return };
    for dtype in DType::ALL {
        for kv in KvDType::ALL {
            let model = model(&whole_leaves(RandomClass::Olmoe), dtype, None);
            compare(&gpu, &model, kv, &format!("{dtype}, cache in {kv}"));
        }
    }
}

#[test]
fn tiers_are_routed_on_the_host() {
    let Some(gpu) = gpu() else { return };
    let shape = RandomShape::tiny(RandomClass::Olmoe);
    let model = model(&shape, DType::F32, Some("tier_1b:2x2,tier_10b:1x4"));
    compare(&gpu, &model, KvDType::F32, "two tiers");
}

/// Logits of each request, in order of position.
fn logits_of(events: &[Event], requests: usize) -> Vec<Vec<f32>> {
    let mut all = vec![Vec::new(); requests];
    for event in events {
        match event {
            Event::Logits { sequence, values, .. } => all[*sequence as usize].extend(values),
            Event::Failed { reason, .. } => panic!("{reason}"),
            _ => {}
        }
    }
    all
}

#[test]
fn fast_has_bits_of_its_own_that_no_batch_and_no_chunk_changes() {
    let Some(gpu) = gpu_by(Math::Fast) else { return };
    let model = model(&whole_leaves(RandomClass::Olmoe), DType::Bf16, None);
    let backbone = Arc::new(Backbone::load(&model.checkpoint, gpu.clone(), |_, _| {}).unwrap());
    let bytes = model.checkpoint.tier_expert_bytes();
    for kv in [KvDType::Bf16, KvDType::F32] {
        let run = |requests: &[Request]| {
            let store = HbmStore::new(gpu.clone(), model.store.clone(), 1 << 30, bytes.clone());
            let engine = Engine::with_cache(backbone.clone(), KV_BYTES, kv).unwrap();
            logits_of(&events(engine, &store, requests), requests.len())
        };
        let requests = requests();
        let together = run(&requests);
        for (request, together) in requests.iter().zip(&together) {
            for chunk in [request.prefill_chunk, 7] {
                let alone = Request { prefill_chunk: chunk, ..request.clone() };
                let alone = run(&[alone]);
                let bits = |all: &[f32]| all.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone[0]), bits(together), "chunks of {chunk}, cache in {kv}");
            }
        }
        // Near the CPU's where no route can have changed much: a prompt of one token.
        let cpu = Arc::new(Cpu::new(2, Simd::best()));
        let on_cpu = Arc::new(Backbone::load(&model.checkpoint, cpu, |_, _| {}).unwrap());
        let engine = Engine::with_cache(on_cpu, KV_BYTES, kv).unwrap();
        let exact = logits_of(&events(engine, &*model.store, &requests[..1]), 1);
        let row = model.checkpoint.config().vocab;
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
        let near = exact[0][..row].iter().zip(&together[0][..row]).map(|(a, b)| a - b);
        let error =
            (square(&mut near.into_iter()) / square(&mut exact[0][..row].iter().copied())).sqrt();
        assert!(error > 0.0 && error < 2e-2, "the error is {error} of the logits");
    }
}

#[test]
fn what_comes_into_the_gpus_memory_counts_as_progress() {
    let Some(gpu) = gpu() else { return };
    let model = model(&RandomShape::tiny(RandomClass::Olmoe), DType::F32, None);
    let bytes = model.checkpoint.tier_expert_bytes();
    let store = HbmStore::new(gpu.clone(), model.store.clone(), 1 << 30, bytes);
    let key = model.checkpoint.config().expert_keys().next().unwrap();
    let mut before = gpu.progress();
    let mut moves = |what: &str, expected: bool| {
        let now = gpu.progress();
        assert_eq!(std::mem::replace(&mut before, now) != now, expected, "{what}");
    };
    store.fetch(key).unwrap();
    moves("an expert that is copied", true);
    store.fetch(key).unwrap();
    moves("an expert that is here", false);
    let weights = model.store.fetch(key).unwrap();
    gpu.matrix(weights.gate.clone()).unwrap();
    moves("weights that stay", true);
    assert_eq!((store.residence().hits, store.residence().misses), (1, 1));
}
