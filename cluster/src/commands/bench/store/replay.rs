//! A recorded text through the residency machine itself, with a policy, a budget and a disk.
//!
//! Time is counted in layer-times: what a layer takes to be computed when its experts are here. A
//! layer waits for its experts, then takes one; the disk brings one expert after the other, demanded
//! ones first, and does not break off what it has begun.

use std::sync::Arc;

use lite_llm_runtime::{
    config::{MoeConfig, RoutingConfig, Scoring},
    residency::{
        Counters,
        policy::{self, Ageing, Lru, Policy, Row, Segmented, Shape},
        replay::{Compute, Device, Place, Replay, ReplayOptions, RowAt, Tally},
    },
    tier::{TIER_1B, TierConfig},
    trace::Trace,
};

/// Bytes of an expert: one of OLMoE-1B-7B in int8. They bound the state of our policy.
const EXPERT_BYTES: u64 = 3 * 2048 * 1024 * 34 / 32;

/// Who is to be let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Lru,
    Segmented,
    Ageing,
    Ours,
    /// Knows what comes.
    Belady,
}

impl Kind {
    pub(super) const ALL: [Self; 5] =
        [Self::Lru, Self::Segmented, Self::Ageing, Self::Ours, Self::Belady];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lru => "LRU",
            Self::Segmented => "segmented LRU",
            Self::Ageing => "LFU, ageing",
            Self::Ours => "foresight",
            Self::Belady => "Belady",
        }
    }
}

/// Texts in the order of their computation.
#[derive(Debug, Clone)]
pub(super) struct Script {
    pub(super) name: String,
    /// Each a sequence of its own: a trace, and tokens of it.
    parts: Vec<(Arc<Trace>, std::ops::Range<usize>)>,
}

impl Script {
    /// One text.
    pub(super) fn alone(trace: &Arc<Trace>) -> Self {
        Self { name: trace.name.clone(), parts: vec![(trace.clone(), 0..trace.tokens.len())] }
    }

    /// Several texts taking turns of so many tokens.
    pub(super) fn turns(traces: &[Arc<Trace>], turn: usize) -> Self {
        let longest = traces.iter().map(|trace| trace.tokens.len()).max().unwrap_or(0);
        let mut parts = Vec::new();
        for at in (0..longest).step_by(turn) {
            for trace in traces.iter().filter(|trace| at < trace.tokens.len()) {
                parts.push((trace.clone(), at..(at + turn).min(trace.tokens.len())));
            }
        }
        Self { name: format!("turns of {turn}"), parts }
    }

    fn tokens(&self) -> impl Iterator<Item = (u64, &Trace, usize)> {
        let parts = (0u64..).zip(&self.parts);
        parts.flat_map(|(n, (trace, range))| range.clone().map(move |at| (n, &**trace, at)))
    }

    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(|(_, range)| range.len()).sum()
    }

    /// Experts of a token in a layer, at most.
    pub(super) fn active(&self) -> usize {
        self.parts.iter().map(|(trace, _)| trace.active()).max().unwrap_or(1)
    }

    pub(super) fn layers(&self) -> usize {
        self.parts[0].0.layers()
    }

    pub(super) fn experts(&self) -> usize {
        self.parts[0].0.experts
    }
}

/// What is replayed.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub(super) script: Arc<Script>,
    pub(super) kind: Kind,
    /// Experts of each layer that the budget has room for.
    pub(super) slots: usize,
    /// Experts that the disk brings in a layer-time; without, they come at once.
    pub(super) disk: Option<f64>,
    /// Whether predictions are followed.
    pub(super) early: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    pub(super) tokens: u64,
    /// By layer: demands, and those of an expert that was here.
    pub(super) demands: Vec<u64>,
    pub(super) hits: Vec<u64>,
    /// Layer-times, in all.
    pub(super) time: f64,
    pub(super) counters: Counters,
}

impl Outcome {
    pub(super) fn hit_rate(&self) -> f64 {
        self.hits.iter().sum::<u64>() as f64 / self.demands.iter().sum::<u64>().max(1) as f64
    }

    pub(super) fn layer_hit_rates(&self) -> Vec<f64> {
        self.hits.iter().zip(&self.demands).map(|(&h, &d)| h as f64 / d.max(1) as f64).collect()
    }

    /// Experts that came from the disk for a token.
    pub(super) fn loads(&self) -> f64 {
        (self.counters.bytes_in / EXPERT_BYTES) as f64 / self.tokens.max(1) as f64
    }

    /// The same of those that nobody used.
    pub(super) fn vain_loads(&self) -> f64 {
        (self.counters.bytes_in_vain / EXPERT_BYTES) as f64 / self.tokens.max(1) as f64
    }

    pub(super) fn layer_times(&self) -> f64 {
        self.time / self.tokens.max(1) as f64
    }
}

impl Setting {
    pub(super) fn replay(&self) -> Outcome {
        let script = &*self.script;
        let (layers, experts) = (script.layers(), script.experts());
        let moe = moe(experts, script.active());
        let shape = Shape::new(layers, &moe);
        let budget = (self.slots * layers) as u64 * EXPERT_BYTES;
        let policy: Box<dyn Policy> = match self.kind {
            Kind::Lru => Box::new(Lru::new(shape)),
            Kind::Segmented => Box::new(Segmented::new(shape, self.slots)),
            Kind::Ageing => Box::new(Ageing::new(shape)),
            Kind::Ours => policy::best(shape, budget),
            Kind::Belady => Box::new(Belady::new(script, layers, experts)),
        };
        let disk = |experts| Device { latency: 0.0, rate: experts * EXPERT_BYTES as f64 };
        let mut replay = Replay::new(ReplayOptions {
            moe: Arc::new(moe),
            layers: (0..layers as u16).collect(),
            expert_bytes: vec![EXPERT_BYTES],
            workers: vec![Place {
                dram: (budget, policy),
                nvme: None,
                source: self.disk.map_or(Device::INSTANT, disk),
            }],
            compute: Compute { together: Some(1.0), ..Compute::default() },
            early: self.early,
        });
        let (mut before, mut tokens) = (0, 0);
        for (stream, trace, token) in script.tokens() {
            if stream != before {
                replay.ended(before);
                before = stream;
            }
            replay.pass(&[RowAt { stream, trace, token }], 1);
            tokens += 1;
        }
        let Tally { demands, hits, seconds: time, .. } = replay.tally().clone();
        Outcome { tokens, demands, hits, time, counters: replay.counters() }
    }
}

/// One group of experts, so many for each token.
fn moe(experts: usize, active: usize) -> MoeConfig {
    let routing = RoutingConfig {
        k_tier: 1,
        k_group: 1,
        k_expert: active as u32,
        scoring: Scoring::SoftmaxTopK,
        renormalize: true,
        seed: 0,
    };
    let tiers = vec![TierConfig::new(TIER_1B, 1, experts as u32, 0)];
    MoeConfig { routing, tiers, ..MoeConfig::without_experts() }
}

/// Keeps what is used soonest.
#[derive(Debug)]
struct Belady {
    experts: usize,
    /// Tokens that each layer has seen.
    now: Vec<u32>,
    /// By layer and expert: when it is used, and how many of that have passed.
    uses: Vec<Vec<u32>>,
    passed: Vec<usize>,
}

impl Belady {
    fn new(script: &Script, layers: usize, experts: usize) -> Self {
        let mut uses = vec![Vec::new(); layers * experts];
        for ((_, trace, token), now) in script.tokens().zip(1u32..) {
            for layer in 0..layers {
                for &expert in trace.routes(layer, token) {
                    uses[layer * experts + usize::from(expert)].push(now);
                }
            }
        }
        Self { experts, now: vec![0; layers], passed: vec![0; uses.len()], uses }
    }
}

impl Policy for Belady {
    fn used(&mut self, layer: usize, row: &Row<'_>) {
        self.now[layer] += 1;
        for &expert in row.experts {
            self.passed[layer * self.experts + expert as usize] += 1;
        }
    }

    fn value(&self, layer: usize, expert: u32) -> f32 {
        let at = layer * self.experts + expert as usize;
        let next = self.uses[at].get(self.passed[at]);
        next.map_or(0.0, |next| 1.0 / (next - self.now[layer]) as f32)
    }

    fn bytes(&self) -> usize {
        self.uses.iter().map(|uses| size_of_val(&uses[..])).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text whose experts are random, but for two that every token uses.
    fn text(layers: usize, tokens: usize) -> Arc<Script> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let mut draws = 1u64;
        let mut below = |n: u64| {
            draws = draws.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (draws >> 33) % n
        };
        let mut routes: Vec<u8> = Vec::new();
        for _ in 0..layers * tokens {
            let third = 2 + below(14);
            routes.extend([0, 1, third as u8, 2 + ((third - 1 + below(13)) % 14) as u8]);
        }
        // The layer before knows all.
        let predicted = routes[tokens * 4..].to_vec();
        let ids = vec![0u8; tokens * 4];
        use safetensors::tensor::{Dtype, TensorView};
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes);
        let tensors = [
            ("routes.x", view(Dtype::U8, &[layers, tokens, 4], &routes).unwrap()),
            ("predicted.x", view(Dtype::U8, &[layers - 1, tokens, 4], &predicted).unwrap()),
            ("tokens.x", view(Dtype::I32, &[tokens], &ids).unwrap()),
        ];
        safetensors::serialize_to_file(tensors, None, &path).unwrap();
        let trace = lite_llm_runtime::trace::read(&path).unwrap().remove(0);
        Arc::new(Script::alone(&Arc::new(trace)))
    }

    #[test]
    fn a_layer_that_has_no_room_for_a_tokens_experts_passes_through_in_parts() {
        let script = text(3, 100);
        for kind in Kind::ALL {
            for (disk, early) in [(None, false), (Some(2.0), false), (Some(2.0), true)] {
                let script = script.clone();
                let outcome = Setting { script, kind, slots: 1, disk, early }.replay();
                assert_eq!(outcome.demands, [400; 3], "{kind:?}");
                assert!(outcome.counters.misses >= 300, "{kind:?}: {:?}", outcome.counters);
            }
        }
    }

    #[test]
    fn nobody_does_better_than_who_knows_what_comes_and_time_adds_up() {
        let script = text(3, 300);
        let replay = |kind, disk, early| {
            let setting = Setting { script: script.clone(), kind, slots: 6, disk, early };
            setting.replay()
        };
        let best = replay(Kind::Belady, None, false);
        for kind in Kind::ALL {
            let outcome = replay(kind, None, false);
            assert!(outcome.hit_rate() <= best.hit_rate(), "{kind:?}");
            assert!(outcome.hit_rate() > 0.4, "{kind:?}: {}", outcome.hit_rate());
            assert_eq!(outcome.time, 3.0 * 300.0);
        }
        // Without early fetches nothing overlaps: each miss takes its time.
        let slow = replay(Kind::Lru, Some(2.0), false);
        let misses = slow.counters.misses as f64;
        assert!((slow.time - 900.0 - misses / 2.0).abs() < 1e-6, "{} {misses}", slow.time);
        let early = replay(Kind::Ours, Some(4.0), true);
        let late = replay(Kind::Ours, Some(4.0), false);
        assert!(early.time < late.time - 100.0, "{} {}", early.time, late.time);
        assert!(early.counters.prefetches_used > 100, "{:?}", early.counters);
    }
}
