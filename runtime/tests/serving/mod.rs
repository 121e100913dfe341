//! What tests of the engine share: a model whose experts are all here, engines of so many pages, and what
//! they answer.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use lite_llm_kernels::{cpu::Cpu, kv::PAGE_TOKENS, simd::Simd};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::{Engine, Event, ScheduleStats},
    sampler::Score,
    sequence::Request,
    store::DramStore,
};

pub(crate) struct Model {
    pub(crate) backbone: Arc<Backbone<Cpu>>,
    pub(crate) store: DramStore,
}

/// Tokens, each with its score's bits, if scores were asked for.
pub(crate) type Answer = Vec<(u32, Vec<(u32, u32)>)>;

impl Model {
    pub(crate) fn open(folder: impl AsRef<Path>) -> Self {
        let checkpoint = Checkpoint::open(folder.as_ref()).unwrap();
        let store = DramStore::new(1 << 30);
        store.load_all(&checkpoint).unwrap();
        let device = Arc::new(Cpu::new(1, Simd::best()));
        let backbone = Arc::new(Backbone::load(&checkpoint, device, |_, _| {}).unwrap());
        Self { backbone, store }
    }

    pub(crate) fn engine(&self, pages: usize) -> Engine<Cpu> {
        let config = &self.backbone.config;
        let floats =
            2 * config.layers.len() * config.attention.kv_heads * config.attention.head_dim;
        let page = (floats * PAGE_TOKENS * size_of::<f32>()) as u64;
        let engine = Engine::new(self.backbone.clone(), pages as u64 * page).unwrap();
        assert_eq!(engine.stats().pages, pages);
        engine
    }

    /// Answers by request, and what was scheduled.
    pub(crate) fn answers(
        &self,
        pages: usize,
        requests: &[Request],
    ) -> (Vec<Answer>, ScheduleStats) {
        let mut engine = self.engine(pages);
        for (id, request) in requests.iter().enumerate() {
            engine.submit(id as u64, request.clone()).unwrap();
        }
        engine.run_local(&self.store);
        (answers(&mut engine, requests.len()), engine.stats())
    }
}

fn bits(score: Score) -> Vec<(u32, u32)> {
    let own = std::iter::once((u32::MAX, score.logprob));
    own.chain(score.top).map(|(id, logprob)| (id, logprob.to_bits())).collect()
}

/// What an engine has answered to so many requests, all of which have ended well.
pub(crate) fn answers(engine: &mut Engine<Cpu>, requests: usize) -> Vec<Answer> {
    let mut all: BTreeMap<u64, Answer> = BTreeMap::new();
    let mut ended = 0;
    while let Some(event) = engine.poll_event() {
        match event {
            Event::Token { sequence, index, id, score } => {
                let answer = all.entry(sequence).or_default();
                assert_eq!(answer.len(), index, "no token twice, none missing");
                answer.push((id, score.map_or_else(Vec::new, bits)));
            }
            Event::Ended { .. } => ended += 1,
            Event::Failed { reason, .. } => panic!("{reason}"),
            _ => {}
        }
    }
    assert_eq!(ended, requests);
    (0..requests as u64).map(|id| all.remove(&id).unwrap_or_default()).collect()
}

/// Some prompt.
pub(crate) fn text(seed: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|at| (seed * 7919 + at * 31) % 997).collect()
}
