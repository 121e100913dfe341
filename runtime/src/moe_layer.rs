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
//! whoever holds the expert fills its output. An expert that cannot be run fails the rows that
//! were routed to it and no other.

use std::{collections::BTreeMap, iter::Peekable, sync::Arc};

use lite_llm_kernels::device::{Device, DeviceError, SwigluGroup};

use crate::{
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
    routing::{Router, Routes},
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

/// Why an expert could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExpertError {
    /// It could not be had; the reason names it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The device failed.
    #[error("{key}: {error}")]
    Device {
        /// What it computed.
        key: ExpertKey,
        /// How it failed.
        error: DeviceError,
    },
}

/// An expert that could not be run; the outputs of its calls are unspecified.
#[derive(Debug)]
pub struct ExpertFailure {
    /// Which expert.
    pub key: ExpertKey,
    /// Why.
    pub error: ExpertError,
}

/// Runs calls of any number of requests together: rows of one expert are one piece of work.
/// Returns the experts that could not be run, by key; all other calls have their outputs.
///
/// Each output is a function of its row and its expert alone, so it does not matter which calls
/// meet here, nor which of them fail. Where the device fails with all, each expert is tried once by
/// itself.
pub fn run_experts<'a, D: Device>(
    device: &D,
    store: &dyn ExpertStore<D::Matrix>,
    mut calls: Vec<ExpertCall<'a>>,
) -> Vec<ExpertFailure> {
    calls.sort_by_key(|call| call.key);
    let mut failures = Vec::new();
    let mut calls = calls.into_iter().peekable();
    while calls.peek().is_some() {
        run_some(device, store, &mut calls, &mut failures);
    }
    failures.sort_by_key(|failure| failure.key);
    failures
}

/// The rows and outputs of one expert's calls.
type RowsOf<'a> = (Vec<&'a [f32]>, Vec<&'a mut [f32]>);

/// Runs the next calls, by key, of as many experts as the store has room for at the same time.
fn run_some<'a, D: Device>(
    device: &D,
    store: &dyn ExpertStore<D::Matrix>,
    calls: &mut Peekable<impl Iterator<Item = ExpertCall<'a>>>,
    failures: &mut Vec<ExpertFailure>,
) {
    let mut experts: Vec<(ExpertKey, Arc<GatedMlp<D::Matrix>>)> = Vec::new();
    let mut rows: Vec<RowsOf<'a>> = Vec::new();
    while let Some(key) = calls.peek().map(|call| call.key) {
        let expert = match store.fetch(key) {
            // There is room once these have been computed with.
            Err(StoreError::OverBudget { .. }) if !experts.is_empty() => break,
            expert => expert,
        };
        let same = std::iter::from_fn(|| calls.next_if(|call| call.key == key));
        match expert {
            Ok(expert) => {
                rows.push(same.map(|call| (call.row, call.output)).unzip());
                experts.push((key, expert));
            }
            Err(error) => {
                same.for_each(drop);
                failures.push(ExpertFailure { key, error: error.into() });
            }
        }
    }
    let mut groups: Vec<SwigluGroup<'_, D::Matrix>> = experts
        .iter()
        .zip(rows)
        .map(|((_, expert), (rows, outputs))| SwigluGroup {
            weights: expert.swiglu(),
            rows,
            outputs,
        })
        .collect();
    if !groups.is_empty() && device.swiglu_groups(&mut groups).is_err() {
        for (&(key, _), group) in experts.iter().zip(&mut groups) {
            if let Err(error) = device.swiglu_groups(std::slice::from_mut(group)) {
                failures.push(ExpertFailure { key, error: ExpertError::Device { key, error } });
            }
        }
    }
    drop(groups);
    let used: Vec<ExpertKey> = experts.iter().map(|(key, _)| *key).collect();
    drop(experts);
    store.used(&used);
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
    /// The whole layer with all experts in one store: routes, packs the rows of each expert, runs
    /// them, and combines their outputs. What a distributed forward pass must equal, bit for bit.
    ///
    /// Returns the rows that could not be computed, each once, with the reason; they hold nothing
    /// of any expert.
    pub fn forward(
        &self,
        device: &D,
        store: &dyn ExpertStore<D::Matrix>,
        hidden: &D::Tensor,
        tiers: &[&TierMask],
        out: &mut D::Tensor,
    ) -> Result<Vec<(usize, String)>, DeviceError> {
        let mut routes = Routes::default();
        self.router.route(device, hidden, tiers, &mut routes)?;
        let states = device.read(hidden)?;
        let (outputs, failures) = run_all(device, store, &states, &routes);
        let mut failed: BTreeMap<usize, String> =
            routes.failures().iter().map(|error| (error.row, error.to_string())).collect();
        for (row, route) in routes.with_rows() {
            if let Some(failure) = failures.iter().find(|failure| failure.key == route.key) {
                failed.entry(row).or_insert_with(|| failure.error.to_string());
            }
        }
        let width = if routes.rows() == 0 { 0 } else { states.len() / routes.rows() };
        let mut parts: Vec<&[f32]> = outputs.chunks_exact(width.max(1)).collect();
        if !failed.is_empty() {
            let rows: Vec<usize> = routes.with_rows().map(|(row, _)| row).collect();
            let mut rows = rows.into_iter();
            parts.retain(|_| rows.next().is_some_and(|row| !failed.contains_key(&row)));
            routes.keep_rows(|row| !failed.contains_key(&row));
        }
        self.combine(device, hidden, &routes, &parts, out)?;
        Ok(failed.into_iter().collect())
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
    ) -> Result<(), DeviceError> {
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
/// holds the output of route c of [`Routes::all`] in row c, but for experts that could not be run.
pub fn run_all<D: Device>(
    device: &D,
    store: &dyn ExpertStore<D::Matrix>,
    hidden: &[f32],
    routes: &Routes,
) -> (Vec<f32>, Vec<ExpertFailure>) {
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
    let failures = run_experts(device, store, calls);
    (outputs, failures)
}
