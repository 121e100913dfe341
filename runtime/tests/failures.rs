//! A device that fails ends the requests that it computed for, with its reason, and no other; what
//! comes after them is computed.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicPtr, Ordering::Relaxed},
    },
};

use lite_llm_kernels::{
    cpu::Cpu,
    device::{Device, DeviceError, Projection, Swiglu, SwigluGroup},
    kv::{KvShape, KvSlot, Query},
    matrix::PackedMatrix,
    simd::Simd,
};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::{Engine, Event, Step},
    expert::{ExpertKey, ExpertStore},
    sequence::Request,
    store::DramStore,
};

type Tensor = <Cpu as Device>::Tensor;
type Matrix = <Cpu as Device>::Matrix;
type Vector = <Cpu as Device>::Vector;
type Arena = <Cpu as Device>::KvArena;

/// A CPU that fails where it is told to.
struct Faulty {
    cpu: Cpu,
    /// The next pass cannot begin.
    embed: AtomicBool,
    /// The next attention fails.
    attention: AtomicBool,
    /// Experts cannot be run where one of them has these weights.
    expert: AtomicPtr<u8>,
}

impl Faulty {
    fn broken(&self) -> DeviceError {
        DeviceError::Failed { device: "faulty".into(), reason: "on purpose".into() }
    }
}

/// What is passed on unchanged.
macro_rules! same {
    ($(fn $name:ident($($arg:ident: $ty:ty),*);)*) => {
        $(fn $name(&self, $($arg: $ty),*) -> Result<(), DeviceError> {
            self.cpu.$name($($arg),*)
        })*
    };
}

impl Device for Faulty {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Vector;
    type KvArena = Arena;

    fn describe(&self) -> String {
        "faulty".into()
    }
    fn host(&self) -> &Cpu {
        &self.cpu
    }
    fn matrix(&self, packed: PackedMatrix) -> Result<Matrix, DeviceError> {
        self.cpu.matrix(packed)
    }
    fn vector(&self, values: &[f32]) -> Result<Vector, DeviceError> {
        self.cpu.vector(values)
    }
    fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor, DeviceError> {
        self.cpu.tensor(rows, cols)
    }
    fn read<'a>(&self, t: &'a Tensor) -> Result<Cow<'a, [f32]>, DeviceError> {
        self.cpu.read(t)
    }
    fn kv_arena(&self, shape: KvShape, pages: usize) -> Result<Arena, DeviceError> {
        self.cpu.kv_arena(shape, pages)
    }
    fn embed(&self, table: &Matrix, ids: &[u32], out: &mut Tensor) -> Result<(), DeviceError> {
        match self.embed.swap(false, Relaxed) {
            true => Err(self.broken()),
            false => self.cpu.embed(table, ids, out),
        }
    }
    fn project(&self, x: &Tensor, all: [Projection<'_, Self>; 3]) -> Result<(), DeviceError> {
        let all = all.map(|p| Projection { weight: p.weight, bias: p.bias, out: p.out });
        self.cpu.project(x, all)
    }
    fn attention(
        &self,
        arena: &Arena,
        layer: usize,
        q: &Tensor,
        queries: &[Query<'_>],
        scale: f32,
        window: Option<u32>,
        out: &mut Tensor,
    ) -> Result<(), DeviceError> {
        match self.attention.swap(false, Relaxed) {
            true => Err(self.broken()),
            false => self.cpu.attention(arena, layer, q, queries, scale, window, out),
        }
    }
    fn swiglu_groups(&self, groups: &mut [SwigluGroup<'_, Matrix>]) -> Result<(), DeviceError> {
        let bad = self.expert.load(Relaxed).cast_const();
        match groups.iter().any(|group| group.weights.gate.data().as_ptr() == bad) {
            true => Err(self.broken()),
            false => self.cpu.swiglu_groups(groups),
        }
    }

    same! {
        fn reshape(t: &mut Tensor, rows: usize, cols: usize);
        fn write(t: &mut Tensor, values: &[f32]);
        fn rms_norm(x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor);
        fn rms_norm_in_place(x: &mut Tensor, weight: &Vector, eps: f32);
        fn matmul(x: &Tensor, w: &Matrix, bias: Option<&Vector>, out: &mut Tensor);
        fn clamp(x: &mut Tensor, limit: f32);
        fn rotary_table(positions: &[u32], inv_freq: &[f32], scale: f32, out: &mut Tensor);
        fn rope(x: &mut Tensor, table: &Tensor);
        fn kv_append(arena: &mut Arena, layer: usize, k: &Tensor, v: &Tensor, slots: &[KvSlot]);
        fn select_rows(x: &Tensor, rows: &[u32], out: &mut Tensor);
        fn weighted_sum(parts: &[&[f32]], weights: &[f32], ends: &[u32], out: &mut Tensor);
        fn add(x: &mut Tensor, y: &Tensor);
        fn swiglu(x: &Tensor, weights: Swiglu<'_, Matrix>, out: &mut Tensor);
        fn sigmoid_gate(x: &mut Tensor, logits: &Tensor);
    }
}

/// The demo model on a device that can fail, and its experts.
fn demo() -> (Arc<Faulty>, Engine<Faulty>, DramStore) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/manpages-moe");
    let checkpoint = Checkpoint::open(folder).unwrap();
    let store = DramStore::new(1 << 30);
    store.load_all(&checkpoint).unwrap();
    let device = Arc::new(Faulty {
        cpu: Cpu::new(1, Simd::best()),
        embed: AtomicBool::default(),
        attention: AtomicBool::default(),
        expert: AtomicPtr::default(),
    });
    let backbone = Backbone::load(&checkpoint, device.clone(), |_, _| {}).unwrap();
    let engine = Engine::new(Arc::new(backbone), 64 << 20).unwrap();
    (device, engine, store)
}

fn request(seed: u32, tokens: u32) -> Request {
    let prompt = (0..tokens).map(|i| (seed * 7919 + i * 31) % 200).collect();
    Request { routes: true, ..Request::greedy(prompt, 1) }
}

/// Per sequence: its tokens and the flat experts of each layer, or why it failed.
type Outcomes = BTreeMap<u64, Result<(Vec<u32>, Vec<Vec<i32>>), String>>;

fn outcomes(engine: &mut Engine<Faulty>) -> Outcomes {
    let mut all = Outcomes::new();
    while let Some(event) = engine.poll_event() {
        match event {
            Event::Token { sequence, id, .. } => {
                let entry = all.entry(sequence).or_insert_with(|| Ok(Default::default()));
                entry.as_mut().unwrap().0.push(id);
            }
            Event::Routes { sequence, layers, experts, .. } => {
                let layers = experts.chunks(experts.len() / layers).map(<[i32]>::to_vec).collect();
                let entry = all.entry(sequence).or_insert_with(|| Ok(Default::default()));
                entry.as_mut().unwrap().1 = layers;
            }
            Event::Failed { sequence, reason } => {
                assert!(all.insert(sequence, Err(reason)).is_none_or(|before| before.is_ok()));
            }
            _ => {}
        }
    }
    all
}

fn run(engine: &mut Engine<Faulty>, store: &DramStore, ids: std::ops::Range<u64>) -> Outcomes {
    for id in ids {
        engine.submit(id, request(id as u32 % 100, 1 + id as u32 % 3)).unwrap();
    }
    engine.run_local(store);
    outcomes(engine)
}

#[test]
fn a_pass_that_cannot_begin_idles_no_other() {
    let (device, mut engine, store) = demo();
    let alone = run(&mut engine, &store, 1..2);
    engine.submit(100, request(0, 5)).unwrap();
    engine.submit(101, request(1, 2)).unwrap();
    engine.hold(101, true);
    device.embed.store(true, Relaxed);
    assert_eq!(engine.step(), Step::Advanced, "there may be others");
    engine.hold(101, false);
    engine.run_local(&store);
    let found = outcomes(&mut engine);
    assert_eq!(found[&100], Err("faulty: on purpose".into()));
    assert_eq!(found[&101], alone[&1]);
    assert_eq!(engine.sequences(), 0);
}

#[test]
fn an_operation_that_fails_ends_the_requests_in_it() {
    let (device, mut engine, store) = demo();
    let alone = run(&mut engine, &store, 0..3);
    device.attention.store(true, Relaxed);
    for outcome in run(&mut engine, &store, 100..103).values() {
        assert_eq!(outcome, &Err("faulty: on purpose".into()));
    }
    assert_eq!(run(&mut engine, &store, 0..3), alone, "those that come next are served");
}

#[test]
fn an_expert_that_the_device_cannot_run_fails_those_who_need_it() {
    let (device, mut engine, store) = demo();
    let alone = run(&mut engine, &store, 0..16);
    let config = engine.backbone().config.clone();
    let moe = config.moe.as_ref().unwrap();
    let sparse: Vec<usize> = config.sparse_layers().collect();
    let uses = |id: u64, layer: usize, flat: usize| {
        alone[&id].as_ref().unwrap().1[layer].contains(&(flat as i32))
    };
    let users = |layer, flat| (0..16).filter(|&id| uses(id, layer, flat)).count();
    let all = (0..sparse.len()).flat_map(|layer| (0..moe.experts()).map(move |e| (layer, e)));
    let (layer, flat) = all.min_by_key(|&(layer, flat)| users(layer, flat).abs_diff(8)).unwrap();
    assert!((1..16).contains(&users(layer, flat)));
    let key = ExpertKey::from_flat(moe, sparse[layer], flat).unwrap();
    let weights = store.fetch(key).unwrap();
    device.expert.store(weights.gate.data().as_ptr().cast_mut(), Relaxed);
    for (id, outcome) in run(&mut engine, &store, 0..16) {
        match uses(id, layer, flat) {
            false => assert_eq!(outcome, alone[&id], "{id}"),
            true => {
                let reason = outcome.expect_err("its expert cannot be run");
                assert!(reason.contains(&format!("{key}: faulty: on purpose")), "{reason}");
            }
        }
    }
}
