//! How often each expert was chosen by the sequences at home on a lane, for people who watch.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use lite_llm_runtime::{
    config::{ModelConfig, MoeConfig},
    expert::ExpertKey,
    routing::Routes,
};
use lite_llm_transport::messages::EXPERTS_VIEWED_MAX;

/// A count per expert of the layers that are told of.
#[derive(Debug)]
pub struct ExpertLoads {
    /// By layer of the model: its number among the sparse layers that are told of.
    layers: Vec<Option<usize>>,
    moe: Option<MoeConfig>,
    experts: usize,
    counts: Vec<AtomicU64>,
}

impl ExpertLoads {
    /// All at 0, for as many layers as [`EXPERTS_VIEWED_MAX`] has room for.
    pub fn of(config: &ModelConfig) -> Arc<Self> {
        let experts = config.moe.as_ref().map_or(0, MoeConfig::experts);
        let most = EXPERTS_VIEWED_MAX.checked_div(experts).unwrap_or(0);
        let mut layers = vec![None; config.layers.len()];
        let mut told = 0;
        for (number, layer) in config.sparse_layers().take(most).enumerate() {
            layers[layer] = Some(number);
            told = number + 1;
        }
        let counts = (0..told * experts).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { layers, moe: config.moe.clone(), experts, counts })
    }

    /// Layers that are told of, and experts of each.
    pub fn shape(&self) -> (usize, usize) {
        (self.counts.len().checked_div(self.experts).unwrap_or(0), self.experts)
    }

    /// Place of an expert in what [`ExpertLoads::read`] gives.
    pub fn cell(&self, key: ExpertKey) -> Option<usize> {
        let layer = self.layers.get(usize::from(key.layer)).copied().flatten()?;
        Some(layer * self.experts + key.flat(self.moe.as_ref()?))
    }

    /// These were chosen.
    pub fn count(&self, routes: Option<&Routes>) {
        for route in routes.map_or(&[][..], Routes::all) {
            if let Some(count) = self.cell(route.key).and_then(|cell| self.counts.get(cell)) {
                count.fetch_add(1, Relaxed);
            }
        }
    }

    /// The counts, `[layers, experts]`.
    pub fn read(&self) -> Vec<u64> {
        self.counts.iter().map(|count| count.load(Relaxed)).collect()
    }
}
