//! A GPU has the CPU's bits: logits and tokens of whole requests, whatever part of the experts its
//! memory holds, whatever meets in a pass. Skipped, with a line that says so, where there is none.
//!
//! `kernels/cuda/host/run.sh cargo test --workspace --test gpu` runs it without one, under the libraries of
//! `kernels/cuda/host`, which run the kernels on the CPU.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use lite_llm_kernels::{
    buffer::Buffer,
    cpu::Cpu,
    cuda::{Cuda, compile::Folders, driver_present, find},
    cuda_device::Gpu,
    device::Device,
    dtype::DType,
    kv::KvDType,
    math::Math,
    matrix::PackedMatrix,
    simd::Simd,
    slots::{SLOT_ALIGN, Slot},
};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::{Engine, Event},
    expert::{ExpertKey, ExpertStore, GatedMlp},
    forward::Carrier,
    gpu::GpuCarrier,
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    residency::{
        CacheOptions, Done, ExpertCache, Fetched, Fetcher, HbmStore, Urgency,
        policy::{Lru, Shape},
    },
    routing::{RecordedRouter, RecordedRoutes},
    sampler::Sampling,
    sequence::Request,
    store::DramStore,
    tier::TierSet,
};

const KV_BYTES: u64 = 64 << 20;

/// A GPU and, where there are several, two that share the experts; nothing where there is none.
fn gpus() -> Vec<Arc<Gpu>> {
    gpus_by(Math::Exact)
}

fn gpus_by(math: Math) -> Vec<Arc<Gpu>> {
    if !driver_present() {
        eprintln!("skipped: there is no NVIDIA driver here");
        return Vec::new();
    }
    let cache = std::env::var_os("LITE_LLM_CACHE").map(PathBuf::from);
    let sources = std::env::var_os("LITE_LLM_CUDA_SOURCES").map(PathBuf::from);
    let open = |number| {
        let (cache, sources) = (cache.clone(), sources.clone());
        Cuda::open(number, Folders { cache, sources }).unwrap()
    };
    let first = || Gpu::new(open(0), Arc::new(Cpu::new(2, Simd::best()))).by(math);
    let mut all = vec![Arc::new(first())];
    match find().unwrap().1.len() {
        0 | 1 => eprintln!("two GPUs are skipped: there is one here"),
        _ => all.push(Arc::new(first().beside(open(1)).unwrap())),
    }
    all
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
fn compare(gpus: &[Arc<Gpu>], model: &Model, kv: KvDType, what: &str) {
    for gpu in gpus {
        compare_on(gpu, model, kv, what);
    }
}

fn compare_on(gpu: &Arc<Gpu>, model: &Model, kv: KvDType, what: &str) {
    let several = gpu.cudas().len() > 1;
    let cpu = Arc::new(Cpu::new(2, Simd::best()));
    let on_cpu = Arc::new(Backbone::load(&model.checkpoint, cpu, |_, _| {}).unwrap());
    let on_gpu = Arc::new(Backbone::load(&model.checkpoint, gpu.clone(), |_, _| {}).unwrap());
    let with_tiers = |mut requests: Vec<Request>| {
        let tiers = &model.checkpoint.config().moe.as_ref().unwrap().tiers;
        for (at, request) in requests.iter_mut().enumerate().filter(|_| tiers.len() > 1) {
            request.tiers = match at % 3 {
                0 => TierSet::All,
                1 => TierSet::UpTo(tiers[0].id.clone()),
                _ => TierSet::Only(vec![tiers[1].id.clone()]),
            };
        }
        requests
    };
    let (of_logits, of_tokens) = (with_tiers(requests()), with_tiers(requests_of_tokens()));
    let bytes = model.checkpoint.tier_expert_bytes();
    let largest = bytes.iter().max().unwrap() + 1024;
    let experts = model.checkpoint.config().expert_keys().count() as u64;
    for alone in [true, false].into_iter().filter(|alone| !(several && *alone)) {
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
                assert!(carrier.is_some(), "{what}: passes are carried");
                let carrier = carrier.filter(|_| carried);
                let carrier = carrier.map(|carrier| Arc::new(carrier) as Arc<dyn Carrier<Gpu>>);
                let engine = Engine::with_cache(on_gpu.clone(), KV_BYTES, kv).unwrap();
                let found = events(engine.carried_by(carrier), &*store, requests);
                let place = format!("{what}, set {set}, {budget} bytes, carried {carried}");
                assert_eq!(found.len(), expected.len(), "{place}");
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(same(found, expected), "{place}: {}", difference(found, expected));
                }
                assert!(store.residence().held <= store.budget(), "{place}");
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
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    use RandomClass::*;
    for class in [Olmoe, Mixtral, Qwen2Moe, Qwen3Moe] {
        for shape in [RandomShape::tiny(class), whole_leaves(class)] {
            let model = model(&shape, DType::F32, None);
            compare(&gpus, &model, KvDType::F32, &format!("{class:?}, hidden {}", shape.hidden));
        }
    }
}

#[test]
fn every_format_of_weights_and_of_the_cache() {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    for dtype in DType::ALL {
        for kv in KvDType::ALL {
            let model = model(&whole_leaves(RandomClass::Olmoe), dtype, None);
            compare(&gpus, &model, kv, &format!("{dtype}, cache in {kv}"));
        }
    }
}

#[test]
fn tiers_and_groups() {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    for (class, dtype) in [(RandomClass::Olmoe, DType::F32), (RandomClass::Qwen2Moe, DType::Int8)] {
        let model = model(&whole_leaves(class), dtype, Some("tier_1b:2x2,tier_10b:1x4"));
        compare(&gpus, &model, KvDType::Bf16, &format!("two tiers of {class:?}"));
    }
}

/// What compute-sanitizer can follow in a minute: passes in one piece and from layer to layer, prompts and steps,
/// one tier and two, whole memory and too little.
#[test]
fn a_short_run() {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    let shape = RandomShape { layers: 1, ..whole_leaves(RandomClass::Olmoe) };
    let prompt = |tokens: u32| (0..tokens).map(|at| at * 37 % 256).collect();
    let sampling = Sampling { temperature: 0.9, top_k: 20, seed: 7, ..Sampling::GREEDY };
    let requests = [
        Request { sampling, ..Request::greedy(prompt(3), 3) },
        Request { logits: true, ..Request::greedy(prompt(70), 2) },
    ];
    for (dtype, tiers) in [(DType::Bf16, None), (DType::Int8, Some("tier_1b:2x2,tier_10b:1x4"))] {
        let model = model(&shape, dtype, tiers);
        let cpu = Arc::new(Cpu::new(2, Simd::best()));
        let on_cpu = Arc::new(Backbone::load(&model.checkpoint, cpu, |_, _| {}).unwrap());
        let bytes = model.checkpoint.tier_expert_bytes();
        for gpu in &gpus {
            let on_gpu = Backbone::load(&model.checkpoint, gpu.clone(), |_, _| {}).unwrap();
            let on_gpu = Arc::new(on_gpu);
            for budget in [1 << 30, 2 * (bytes.iter().max().unwrap() + 1024)] {
                let below = model.store.clone();
                let store = HbmStore::new(gpu.clone(), below, budget, bytes.clone());
                let store = Arc::new(store);
                let carrier = GpuCarrier::new(&on_gpu, store.clone()).unwrap();
                let carrier = carrier.map(|carrier| Arc::new(carrier) as Arc<dyn Carrier<Gpu>>);
                // The first by itself, so that its steps are passes of one row; then both.
                for requests in [&requests[..1], &requests[..]] {
                    let kv = KvDType::Bf16;
                    let engine = Engine::with_cache(on_cpu.clone(), KV_BYTES, kv).unwrap();
                    let expected = events(engine, &*model.store, requests);
                    let engine = Engine::with_cache(on_gpu.clone(), KV_BYTES, kv).unwrap();
                    let found = events(engine.carried_by(carrier.clone()), &*store, requests);
                    let equal = |(found, expected)| same(found, expected);
                    assert!(
                        found.len() == expected.len() && found.iter().zip(&expected).all(equal),
                        "{dtype}, {budget} bytes"
                    );
                }
            }
        }
    }
}

#[test]
fn a_long_prompt_leaves_what_decoding_uses() {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    let model = model(&RandomShape::tiny(RandomClass::Olmoe), DType::F32, None);
    let keys: Vec<_> = model.checkpoint.config().expert_keys().collect();
    let bytes = model.checkpoint.tier_expert_bytes();
    let budget = (bytes[0] + 1024) * (keys.len() / 2) as u64;
    let store = HbmStore::new(gpus[0].clone(), model.store.clone(), budget, bytes);
    let (hot, cold) = keys.split_at(keys.len() / 4);
    let decode = || hot.iter().for_each(|key| drop(store.fetch(*key).unwrap()));
    decode();
    cold.iter().for_each(|key| drop(store.scan(*key).unwrap()));
    assert!(store.residence().evictions > 0, "not all of them fit");
    let misses = store.residence().misses;
    decode();
    assert_eq!(store.residence().misses, misses, "what tokens need is still there");
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
    for gpu in gpus_by(Math::Fast) {
        fast_on(&gpu);
    }
}

/// The same bits alone and together, in any chunks, carried or layer by layer, and nearly the CPU's.
fn fast_on(gpu: &Arc<Gpu>) {
    let model = model(&whole_leaves(RandomClass::Olmoe), DType::Bf16, None);
    let backbone = Arc::new(Backbone::load(&model.checkpoint, gpu.clone(), |_, _| {}).unwrap());
    let bytes = model.checkpoint.tier_expert_bytes();
    for kv in [KvDType::Bf16, KvDType::F32] {
        let run_by = |requests: &[Request], carried: bool| {
            let store = HbmStore::new(gpu.clone(), model.store.clone(), 1 << 30, bytes.clone());
            let store = Arc::new(store);
            let carrier = GpuCarrier::new(&backbone, store.clone()).unwrap();
            let carrier = carrier.filter(|_| carried);
            let carrier = carrier.map(|carrier| Arc::new(carrier) as Arc<dyn Carrier<Gpu>>);
            let engine = Engine::with_cache(backbone.clone(), KV_BYTES, kv).unwrap();
            events(engine.carried_by(carrier), &*store, requests)
        };
        let run =
            |requests: &[Request], carried| logits_of(&run_by(requests, carried), requests.len());
        let tokens = requests_of_tokens();
        assert_eq!(run_by(&tokens, true), run_by(&tokens, false), "tokens, cache in {kv}");
        let requests = requests();
        let together = run(&requests, true);
        for (request, together) in requests.iter().zip(&together) {
            for (chunk, carried) in [(request.prefill_chunk, true), (7, true), (7, false)] {
                let alone = Request { prefill_chunk: chunk, ..request.clone() };
                let alone = run(&[alone], carried);
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
        let error = error_of(&together[0][..row], &exact[0][..row]);
        assert!(error > 0.0 && error < 2e-2, "the error is {error} of the logits");
    }
}

/// The root mean square of what differs, of that of what is right.
fn error_of(found: &[f32], right: &[f32]) -> f64 {
    assert_eq!(found.len(), right.len());
    let square = |value: f32| f64::from(value) * f64::from(value);
    let off: f64 = found.iter().zip(right).map(|(a, b)| square(a - b)).sum();
    (off / right.iter().map(|&value| square(value)).sum::<f64>()).sqrt()
}

#[test]
fn fast_errs_little_where_tokens_go_where_exact_sends_them() {
    for gpu in gpus_by(Math::Fast) {
        fast_by_exacts_routes(&gpu, &whole_leaves(RandomClass::Olmoe));
        fast_by_exacts_routes(&gpu, &whole_leaves(RandomClass::Qwen3Moe));
        if !gpu.cuda().describe().contains("not a GPU") {
            let (hidden, heads, kv_heads) = (1024, 8, 4);
            let (layers, experts, k) = (12, 32, 4);
            let small = whole_leaves(RandomClass::Olmoe);
            let large = RandomShape { layers, hidden, heads, kv_heads, experts, k, ..small };
            fast_by_exacts_routes(&gpu, &large);
        }
    }
}

/// A prompt's logits by fast arithmetic and by the CPU's. A token near the border between two experts may go to
/// another one, which says nothing of the arithmetic: so the CPU's routes are imposed.
fn fast_by_exacts_routes(gpu: &Arc<Gpu>, shape: &RandomShape) {
    let model = model(shape, DType::Bf16, None);
    let config = model.checkpoint.config();
    let moe = Arc::new(config.moe.clone().unwrap());
    let tokens = 300;
    let prompt = (0..tokens as u32).map(|at| (at * 31 + 5) % 256).collect();
    let request =
        Request { logits: true, routes: true, prefill_chunk: tokens, ..Request::greedy(prompt, 1) };
    for kv in [KvDType::Bf16, KvDType::F32] {
        let cpu = Arc::new(Cpu::new(2, Simd::best()));
        let on_cpu = Arc::new(Backbone::load(&model.checkpoint, cpu, |_, _| {}).unwrap());
        let engine = Engine::with_cache(on_cpu, KV_BYTES, kv).unwrap();
        let exact = events(engine, &*model.store, std::slice::from_ref(&request));
        let (routes, layers) = routes_of(&exact);
        let per_token = routes.len() / (layers * tokens);
        let recorded = RecordedRoutes::new(&routes, [layers, tokens, per_token], moe.experts());

        let mut backbone = Backbone::load(&model.checkpoint, gpu.clone(), |_, _| {}).unwrap();
        RecordedRouter::install(&mut backbone, &Arc::new(recorded.unwrap()), &moe);
        let backbone = Arc::new(backbone);
        let bytes = model.checkpoint.tier_expert_bytes();
        let store = Arc::new(HbmStore::new(gpu.clone(), model.store.clone(), 2 << 30, bytes));
        let carrier = GpuCarrier::new(&backbone, store.clone()).unwrap();
        let carrier = carrier.map(|carrier| Arc::new(carrier) as Arc<dyn Carrier<Gpu>>);
        assert!(carrier.is_some());
        let engine = Engine::with_cache(backbone, KV_BYTES, kv).unwrap();
        let request = Request { routes: false, ..request.clone() };
        let fast = logits_of(&events(engine.carried_by(carrier), &*store, &[request]), 1);
        let error = error_of(&fast[0], &logits_of(&exact, 1)[0]);
        let what = format!("{:?}, {layers} layers, cache in {kv}", shape.class);
        eprintln!("{what}: the error of {tokens} rows of fast logits is {error:.2e} of them");
        assert!(error > 0.0 && error < 1e-2, "{what}: {error} of the logits");
    }
}

/// The routes of a request whose prompt was one pass, `[layers, tokens, k]`, and the layers.
fn routes_of(events: &[Event]) -> (Vec<u8>, usize) {
    let routes = events.iter().find_map(|event| match event {
        Event::Routes { first: 0, layers, experts, .. } => Some((experts, *layers)),
        _ => None,
    });
    let (experts, layers) = routes.expect("routes were asked for");
    (experts.iter().map(|&expert| u8::try_from(expert).unwrap()).collect(), layers)
}

#[test]
fn what_comes_into_the_gpus_memory_counts_as_progress() {
    let Some(gpu) = gpus().into_iter().next() else { return };
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

/// Brings experts from a store that has all of them, on a thread of its own.
struct FromStore(Arc<DramStore>);

impl std::fmt::Debug for FromStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FromStore")
    }
}

impl Fetcher for FromStore {
    fn fetch(&self, key: ExpertKey, mut slot: Slot, _: Urgency, done: Done) {
        let from = self.0.fetch(key).unwrap();
        std::thread::spawn(move || {
            let matrices = [&from.gate, &from.up, &from.down];
            let bytes: Vec<u8> = matrices.iter().flat_map(|m| m.data().to_vec()).collect();
            slot[..bytes.len()].copy_from_slice(&bytes);
            let (all, mut end) = (Buffer::from_owner(slot).unwrap(), 0);
            let [gate, up, down] = matrices.map(|m| {
                let begin = end;
                end += m.data().len();
                PackedMatrix::new(m.dtype(), m.n(), m.k(), all.slice(begin..end).unwrap()).unwrap()
            });
            done(Fetched::Here(GatedMlp { gate, up, down }));
        });
    }

    fn promote(&self, _: ExpertKey) {}
    fn cancel(&self, _: ExpertKey) {}
    fn describe(&self) -> String {
        "a test".into()
    }
}

#[test]
fn memory_that_is_locked_for_copies_is_given_to_the_experts_of_the_next_placement() {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    let model = model(&whole_leaves(RandomClass::Olmoe), DType::F32, None);
    let (config, bytes) = (model.checkpoint.config(), model.checkpoint.tier_expert_bytes());
    let moe = config.moe.clone().unwrap();
    let layers: Vec<usize> = config.sparse_layers().collect();
    let share = |layer: usize| -> BTreeSet<ExpertKey> {
        config.expert_keys().filter(|key| usize::from(key.layer) == layer).collect()
    };
    let cache = ExpertCache::new(CacheOptions {
        policy: Box::new(Lru::new(Shape::new(config.layers.len(), &moe))),
        budget: share(layers[0]).len() as u64 * bytes[0].next_multiple_of(SLOT_ALIGN as u64),
        expert_bytes: bytes.clone(),
        moe: Arc::new(moe),
        prefetch: true,
        fetcher: Arc::new(FromStore(model.store.clone())),
    });
    let store = HbmStore::new(gpus[0].clone(), cache.clone(), 2 * (bytes[0] + 1024), bytes);
    // There is room for one share at a time, and none for what is kept locked.
    for layer in [layers[0], layers[1], layers[0]] {
        cache.keep(share(layer));
        for key in share(layer) {
            let (told, loaded) = std::sync::mpsc::channel();
            cache.load(key, move |result| told.send(result.map(drop)).unwrap());
            let result = loaded.recv_timeout(Duration::from_secs(20));
            result.expect("memory is kept from it").expect("it can be read");
        }
        assert!(cache.is_whole());
        for key in share(layer).into_iter().chain(share(layer)) {
            store.fetch(key).unwrap();
        }
        assert!(store.residence().evictions > 0, "what is copied twice is locked");
    }
}
