//! A mixture-of-experts layer: route, pack by expert, run, combine.
//!
//! Shapes: `N` rows of a batch, `H` hidden, `C` calls = routes of all rows, in route order.
//!
//! ```text
//! hidden [N, H] ──route──▶ Routes (C) ──run (here or on other nodes)──▶ outputs C × [H]
//!        └──────shared expert [N, H]──────────────────┐
//! out [N, H] = Σ weight · output, in route order  +   ┘
//! ```
//!
//! Local and remote experts share this one path: an [`ExpertCall`] says what is to run, and
//! whoever holds the expert fills its output.

use std::sync::Arc;

use lite_llm_kernels::device::{Device, DeviceError, SwigluGroup};

use crate::{
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
    routing::{RouteError, Router, Routes},
    tier::TierMask,
};

/// One layer's router and shared expert. Experts are fetched from a store when they are called.
pub struct MoELayer<D: Device> {
    /// Chooses experts.
    pub router: Box<dyn Router<D>>,
    /// An expert that sees every token.
    pub shared: Option<SharedExpert<D>>,
}

/// An expert that sees every token.
pub struct SharedExpert<D: Device> {
    /// The network.
    pub mlp: GatedMlp<D::Matrix>,
    /// `[1, hidden]`: the sigmoid of its product multiplies the output.
    pub gate: Option<D::Matrix>,
}

/// One expert to be run on one row.
pub struct ExpertCall<'a> {
    /// Which expert.
    pub key: ExpertKey,
    /// Input, `[hidden]`, read in place.
    pub row: &'a [f32],
    /// Output, `[hidden]`.
    pub output: &'a mut [f32],
}

/// Why experts could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExpertError {
    /// An expert could not be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Routing failed.
    #[error(transparent)]
    Route(#[from] RouteError),
}

/// Runs calls of any number of requests together: rows of one expert are one piece of work.
///
/// Each output is a function of its row and its expert alone, so it does not matter which calls
/// meet here.
pub fn run_experts<'a, D: Device>(
    device: &D,
    store: &dyn ExpertStore<D::Matrix>,
    mut calls: Vec<ExpertCall<'a>>,
) -> Result<(), ExpertError> {
    calls.sort_by_key(|call| call.key);
    let mut experts: Vec<Arc<GatedMlp<D::Matrix>>> = Vec::new();
    let mut counts: Vec<usize> = Vec::new();
    for same in calls.chunk_by(|a, b| a.key == b.key) {
        experts.push(store.fetch(same[0].key)?);
        counts.push(same.len());
    }
    let mut calls = calls.into_iter();
    let mut groups: Vec<SwigluGroup<'_, D::Matrix>> = experts
        .iter()
        .zip(counts)
        .map(|(expert, count)| {
            let (rows, outputs) =
                calls.by_ref().take(count).map(|call| (call.row, call.output)).unzip();
            SwigluGroup { weights: expert.swiglu(), rows, outputs }
        })
        .collect();
    Ok(device.swiglu_groups(&mut groups)?)
}

impl<D: Device> SharedExpert<D> {
    /// `out = mlp(hidden)` `[rows, hidden]`, times the sigmoid of the gate where there is one.
    pub fn forward(
        &self,
        device: &D,
        hidden: &D::Tensor,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), DeviceError> {
        device.swiglu(hidden, self.mlp.swiglu(), out)?;
        if let Some(gate) = &self.gate {
            let mut logits = device.tensor(rows, 1)?;
            device.matmul(hidden, gate, None, &mut logits)?;
            device.sigmoid_gate(out, &logits)?;
        }
        Ok(())
    }
}

impl<D: Device> MoELayer<D> {
    /// The layer's output with all experts in one store: what a distributed forward pass must
    /// equal, bit for bit.
    pub fn forward(
        &self,
        device: &D,
        store: &dyn ExpertStore<D::Matrix>,
        hidden: &D::Tensor,
        tiers: &[&TierMask],
        out: &mut D::Tensor,
    ) -> Result<(), ExpertError> {
        let mut routes = Routes::default();
        self.router.route(device, hidden, tiers, &mut routes)?;
        let states = device.read(hidden)?;
        let outputs = run_all(device, store, &states, &routes)?;
        let width = if routes.rows() == 0 { 0 } else { states.len() / routes.rows() };
        let parts: Vec<&[f32]> = outputs.chunks_exact(width.max(1)).collect();
        self.combine(device, hidden, &routes, &parts, out)
    }

    /// `out = Σ weight · output` in route order, then the shared expert.
    ///
    /// `parts[c]` is the output of route c of [`Routes::all`].
    pub fn combine(
        &self,
        device: &D,
        hidden: &D::Tensor,
        routes: &Routes,
        parts: &[&[f32]],
        out: &mut D::Tensor,
    ) -> Result<(), ExpertError> {
        let weights: Vec<f32> = routes.all().iter().map(|route| route.weight).collect();
        device.weighted_sum(parts, &weights, routes.ends(), out)?;
        if let Some(shared) = &self.shared {
            let (rows, width) = (routes.rows(), device.read(hidden)?.len() / routes.rows().max(1));
            let mut extra = device.tensor(rows, width)?;
            shared.forward(device, hidden, rows, &mut extra)?;
            device.add(out, &extra)?;
        }
        Ok(())
    }
}

/// Runs every route of a batch in one store. `hidden` is `[rows, width]`; the result `[C, width]`
/// holds the output of route c of [`Routes::all`] in row c.
pub fn run_all<D: Device>(
    device: &D,
    store: &dyn ExpertStore<D::Matrix>,
    hidden: &[f32],
    routes: &Routes,
) -> Result<Vec<f32>, ExpertError> {
    let width = hidden.len() / routes.rows().max(1);
    let mut outputs = vec![0.0; routes.all().len() * width];
    let calls = routes
        .with_rows()
        .zip(outputs.chunks_exact_mut(width.max(1)))
        .map(|((row, route), output)| ExpertCall {
            key: route.key,
            row: &hidden[row * width..][..width],
            output,
        })
        .collect();
    run_experts(device, store, calls)?;
    Ok(outputs)
}
