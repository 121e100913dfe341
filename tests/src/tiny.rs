//! A model so small that thousands of clusters of it are simulated in seconds.

use std::sync::Arc;

use lite_llm_kernels::{cpu::Cpu, simd::Simd};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::{Checkpoint, layout::expert_bytes},
    engine::{Engine, Event},
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    sequence::Request,
    store::DramStore,
};

/// Bytes that an engine of it takes for keys and values.
pub const KV_BYTES: u64 = 1 << 22;

/// Two sparse layers of one tier, one group and 8 experts.
pub struct TinyModel {
    /// The dense part.
    pub backbone: Arc<Backbone<Cpu>>,
    /// All experts.
    pub store: Arc<DramStore>,
    /// Bytes of an expert, per tier.
    pub expert_bytes: Vec<u64>,
}

impl TinyModel {
    /// Random weights, the same each time.
    pub fn load() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (folder.path().join("hf"), folder.path().join("model"));
        let shape = RandomShape { layers: 2, ..RandomShape::tiny(RandomClass::Olmoe) };
        write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
        import(&ImportOptions::new(source, &*out), &mut |_, _, _| {}).unwrap();
        let checkpoint = Checkpoint::open(out).unwrap();
        let config = checkpoint.config().clone();
        let tiers = config.moe.as_ref().unwrap().tiers.len();
        let device = Arc::new(Cpu::new(1, Simd::best()));
        let backbone = Arc::new(Backbone::load(&checkpoint, device, |_, _| {}).unwrap());
        let store = Arc::new(DramStore::new(1 << 30));
        store.load_all(&checkpoint).unwrap();
        let bytes = |tier| expert_bytes(&config, checkpoint.dtype(), tier);
        Self { backbone, store, expert_bytes: (0..tiers).map(bytes).collect() }
    }

    /// An engine of it.
    pub fn engine(&self) -> Engine<Cpu> {
        Engine::new(self.backbone.clone(), KV_BYTES).unwrap()
    }

    /// What a request generates by itself.
    pub fn alone(&self, request: &Request) -> Vec<u32> {
        let mut engine = self.engine();
        engine.submit(0, request.clone()).unwrap();
        engine.run_local(&*self.store);
        let events = std::iter::from_fn(|| engine.poll_event());
        let token = |event| match event {
            Event::Token { id, .. } => Some(id),
            _ => None,
        };
        events.filter_map(token).collect()
    }
}
