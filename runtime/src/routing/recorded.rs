//! Routes that were recorded, instead of those that gates would choose: for measuring what moves experts
//! on a model whose own gates were never trained.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use lite_llm_kernels::{
    device::{Device, DeviceError},
    matrix::PackedMatrix,
};

use super::{Router, Routes};
use crate::{
    backbone::{Backbone, BackboneLayer, FeedForwardLayer},
    config::MoeConfig,
    expert::ExpertKey,
    moe_layer::MoELayer,
    tier::TierMask,
};

/// Rows of a pass that are sequences of their own, at most: more are a prompt.
const STEP_ROWS_MAX: usize = 64;

/// How far apart in the recording the sequences of a step are.
const APART: usize = 997;

/// The experts that tokens of a text went to, layer by layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedRoutes {
    /// By layer, `[tokens, k]`.
    layers: Vec<Vec<u8>>,
    k: usize,
}

/// A recording that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("recorded routes: {0}")]
pub struct BadRecording(String);

impl RecordedRoutes {
    /// Routes `[layers, tokens, k]`, each the number of an expert below `experts`.
    pub fn new(
        routes: &[u8],
        [layers, tokens, k]: [usize; 3],
        experts: usize,
    ) -> Result<Self, BadRecording> {
        if layers == 0 || tokens == 0 || k == 0 || routes.len() != layers * tokens * k {
            let found = routes.len();
            return Err(BadRecording(format!("[{layers}, {tokens}, {k}] does not fit {found}")));
        }
        if let Some(expert) = routes.iter().find(|&&expert| usize::from(expert) >= experts) {
            return Err(BadRecording(format!("expert {expert}: the model has {experts} a layer")));
        }
        Ok(Self { layers: routes.chunks_exact(tokens * k).map(<[u8]>::to_vec).collect(), k })
    }

    /// Routes of a token.
    pub fn k(&self) -> usize {
        self.k
    }

    fn token(&self, layer: usize, token: usize) -> &[u8] {
        let layer = &self.layers[layer % self.layers.len()];
        let tokens = layer.len() / self.k;
        &layer[token % tokens * self.k..][..self.k]
    }
}

/// A flat mixture's router, with the experts of a recording. Layers repeat those of the recording; a prompt's
/// rows follow each other in it, and the sequences of a step are somewhere else each.
pub struct RecordedRouter<D: Device> {
    inner: Box<dyn Router<D>>,
    routes: Arc<RecordedRoutes>,
    moe: Arc<MoeConfig>,
    layer: usize,
    /// Tokens of the recording that were used.
    used: AtomicUsize,
}

impl<D: Device> RecordedRouter<D> {
    /// Has every sparse layer of a model routed so. Weights, and what is not finite, are still what the
    /// model's own routers say.
    pub fn install(backbone: &mut Backbone<D>, routes: &Arc<RecordedRoutes>, moe: &Arc<MoeConfig>) {
        let router = |inner, layer| -> Box<dyn Router<D>> {
            let (routes, moe) = (routes.clone(), moe.clone());
            Box::new(Self { inner, routes, moe, layer, used: AtomicUsize::new(0) })
        };
        let layers = std::mem::take(&mut backbone.layers).into_iter().enumerate();
        let layers = layers.map(|(index, layer)| {
            let feed_forward = match layer.feed_forward {
                FeedForwardLayer::Sparse(MoELayer { router: inner, shared }) => {
                    FeedForwardLayer::Sparse(MoELayer { router: router(inner, index), shared })
                }
                dense => dense,
            };
            BackboneLayer { feed_forward, ..layer }
        });
        backbone.layers = layers.collect();
    }
}

impl<D: Device> Router<D> for RecordedRouter<D> {
    fn route(
        &self,
        device: &D,
        hidden: &D::Tensor,
        tiers: &[&TierMask],
        out: &mut Routes,
    ) -> Result<(), DeviceError> {
        self.inner.route(device, hidden, tiers, out)?;
        let recorded = self.recorded(out.rows()).unwrap_or_default();
        for (route, expert) in out.routes.iter_mut().zip(recorded) {
            let key = ExpertKey::from_flat(&self.moe, self.layer, expert as usize);
            route.key = key.unwrap_or(route.key);
        }
        Ok(())
    }

    fn gates(&self) -> Option<PackedMatrix> {
        self.inner.gates()
    }

    fn recorded(&self, rows: usize) -> Option<Vec<u32>> {
        let (steps, apart) = if rows <= STEP_ROWS_MAX { (1, APART) } else { (rows, 1) };
        let first = self.used.fetch_add(if rows == 0 { 0 } else { steps }, Ordering::Relaxed);
        let token = |row| self.routes.token(self.layer, first + row * apart);
        Some((0..rows).flat_map(token).map(|&expert| expert.into()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_tokens_repeat() {
        let routes: Vec<u8> = (0..2 * 3 * 2).collect();
        let recorded = RecordedRoutes::new(&routes, [2, 3, 2], 12).unwrap();
        assert_eq!(recorded.token(0, 1), [2, 3]);
        assert_eq!(recorded.token(3, 5), [10, 11]);
        assert!(RecordedRoutes::new(&routes, [2, 3, 2], 11).is_err());
        assert!(RecordedRoutes::new(&routes, [2, 4, 2], 12).is_err());
    }
}
