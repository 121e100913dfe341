//! The mixture-of-experts layer for training: forward with a tape, and backward.
//!
//! Shapes: `N` rows, `H` hidden, `C` routes of all rows in route order. Forward has the bits of
//! [`crate::moe_layer`]. Backward of `out = Σ w_c y_c (+ shared)`, with dout `[N, H]`:
//! - route c: `dy_c = w_c · dout`, `dw_c = dout · y_c` by rule 3; with renormalised weights w = v / Σv
//!   `dv_c = (dw_c − Σ_j dw_j w_j) / Σv`, sums in route order;
//! - probabilities: v = p(tier) · p(group) · p(expert); a probability begins with what the balance losses say and
//!   its routes are added in route order; scores by the backward of the softmax over all candidates;
//! - the input's gradient: the routes' in route order from the first, then the gates' (tiers; groups by
//!   tier; experts by tier and group), then the shared expert's and its gate's.

use std::collections::BTreeMap;

use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    ops::{
        elementwise,
        gated::{self, GatedTape, GatedWeights},
        leaves::LeafPlan,
        matmul::matmul,
        row_sums::{Factor, sum_rows},
        softmax::softmax_backward,
        sum::dot,
    },
    rows::Rows,
};
use parking_lot::Mutex;

use super::{
    TrainError,
    balance::{BalanceWeights, Sums, log_sum_exp},
    batch::Flat,
    exchange::Others,
    gradients::Gradients,
    params::{FeedForwardIds, MlpIds, ParamId, Params, TierIds},
    precision::Precision,
};
use crate::{
    expert::ExpertKey,
    routing::{Gate, GateTrace, HierarchicalRouter, Routes, TierGates, trace_of},
    tier::TierMask,
};

/// One expert's part of a layer.
pub(super) struct ExpertTape {
    pub(super) key: ExpertKey,
    ids: MlpIds,
    /// The rank that has it, if it is another one: what its backward pass needs is there, but for the output.
    pub(super) owner: Option<usize>,
    /// Rows of the pass that came, upwards.
    pub(super) rows: Vec<u32>,
    /// Which routes they are.
    pub(super) routes: Vec<u32>,
    tape: GatedTape,
}

/// What a layer keeps for its backward pass.
pub(super) struct MoeTape {
    pub(super) routes: Routes,
    pub(super) traces: Vec<GateTrace>,
    experts: Vec<ExpertTape>,
    /// The shared expert's, and its gate's logits.
    shared: Option<(GatedTape, Option<Vec<f32>>)>,
}

/// Runs `f` for every item, on all threads.
pub(super) fn each<T: Send>(cpu: &Cpu, items: Vec<T>, f: impl Fn(&mut T) + Sync) -> Vec<T> {
    let cells: Vec<Mutex<T>> = items.into_iter().map(Mutex::new).collect();
    cpu.pool().run(cells.len(), &|i| f(&mut cells[i].lock()));
    cells.into_iter().map(Mutex::into_inner).collect()
}

pub(super) fn weights_of(params: &Params, ids: MlpIds) -> GatedWeights<'_> {
    GatedWeights {
        gate: params.weight(ids.gate),
        up: params.weight(ids.up),
        down: params.weight(ids.down),
        bf16: params.precision() == Precision::Bf16,
    }
}

/// The router of a layer with the parameters as they are.
fn router(params: &Params, layer: usize, gate: ParamId, tiers: &[TierIds]) -> HierarchicalRouter {
    let moe = params.config().moe.clone().unwrap_or_else(crate::config::MoeConfig::without_experts);
    let gates = tiers.iter().map(|tier| TierGates {
        groups: tier.groups.map(|id| params.gate(id).clone()),
        experts: tier.each.iter().map(|group| params.gate(group.gate).clone()).collect(),
    });
    let tier_gate = (tiers.len() > 1).then(|| params.gate(gate).clone());
    HierarchicalRouter::new(layer, moe.into(), tier_gate, gates.collect())
}

/// Ranks that have some of the experts, and what they are told of this pass.
pub(super) struct Elsewhere<'a> {
    pub(super) others: &'a Others<'a>,
    pub(super) pass: u64,
    pub(super) flat: &'a Flat,
    /// Whether a backward pass is to come.
    pub(super) keep: bool,
}

/// The layer's output `[N, H]` for normalised states `hidden`, and its tape.
pub(super) fn forward(
    cpu: &Cpu,
    params: &Params,
    layer: usize,
    mask: &TierMask,
    hidden: &Tensor,
    elsewhere: Option<Elsewhere<'_>>,
) -> Result<(Vec<f32>, MoeTape), TrainError> {
    let FeedForwardIds::Sparse { tiers_gate, tiers, shared } =
        &params.ids().layers[layer].feed_forward
    else {
        unreachable!("the caller has seen that the layer is sparse");
    };
    let width = hidden.cols();
    let masks = vec![mask; hidden.rows()];
    let mut routes = Routes::default();
    let router = router(params, layer, *tiers_gate, tiers);
    let traces = router.route_traced(cpu, hidden, &masks, &mut routes);
    if let Some(error) = routes.failures().first() {
        let tensor = format!("layer {layer}: a score of the {} gate", error.level);
        return Err(TrainError::NotFinite { tensor, row: error.row, value: error.score });
    }
    let mut by_expert: BTreeMap<ExpertKey, ExpertTape> = BTreeMap::new();
    for (c, (row, route)) in (0u32..).zip(routes.with_rows()) {
        let key = route.key;
        let ids = || tiers[key.tier as usize].each[key.group as usize].experts[key.expert as usize];
        let expert = by_expert.entry(key).or_insert_with(|| {
            let ids = ids();
            ExpertTape {
                key,
                ids,
                owner: elsewhere.as_ref().and_then(|elsewhere| elsewhere.others.owner(ids.gate)),
                rows: Vec::new(),
                routes: Vec::new(),
                tape: GatedTape::default(),
            }
        });
        expert.rows.push(row as u32);
        expert.routes.push(c);
    }
    let experts: Vec<ExpertTape> = by_expert.into_values().collect();
    // Others compute beside this rank.
    let waiting = elsewhere.and_then(|Elsewhere { others, pass, flat, keep }| {
        others.forward((pass, layer, keep), flat, hidden, &experts)
    });
    let mut experts = each(cpu, experts, |expert| {
        if expert.owner.is_some() {
            return;
        }
        let rows: Vec<&[f32]> = expert.rows.iter().map(|&row| hidden.row(row as usize)).collect();
        expert.tape = gated::forward(cpu, Rows::List(&rows), weights_of(params, expert.ids));
    });
    for (place, y) in waiting.map_or_else(|| Ok(Vec::new()), |w| w.outputs(&experts, width))? {
        experts[place].tape.y = y;
    }
    let mut parts: Vec<&[f32]> = vec![&[]; routes.all().len()];
    for expert in &experts {
        for (&c, y) in expert.routes.iter().zip(expert.tape.y.chunks_exact(width)) {
            parts[c as usize] = y;
        }
    }
    let weights: Vec<f32> = routes.all().iter().map(|route| route.weight).collect();
    let mut out = cpu.take(hidden.rows() * width);
    elementwise::weighted_sum(cpu, &parts, &weights, routes.ends(), &mut out);
    let shared = shared.map(|(ids, gate)| {
        let tape = gated::forward(cpu, hidden.as_rows(), weights_of(params, ids));
        let mut extra = tape.y.clone();
        let logits = gate.map(|gate| {
            let mut logits = vec![0.0; hidden.rows()];
            matmul(cpu, hidden.as_rows(), params.gate(gate), None, &mut logits);
            elementwise::sigmoid_gate(cpu, &mut extra, &logits);
            logits
        });
        elementwise::add(cpu, &mut out, &extra);
        (tape, logits)
    });
    Ok((out, MoeTape { routes, traces, experts, shared }))
}

/// What a backward pass is told beside its tape.
pub(super) struct Context<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) params: &'a Params,
    pub(super) flat: &'a Flat,
    /// Which parameters' gradients are wanted.
    pub(super) wanted: &'a [bool],
    /// All tokens of the node.
    pub(super) tokens: &'a LeafPlan,
    /// Sums over the whole global batch.
    pub(super) sums: &'a Sums,
    pub(super) balance: &'a BalanceWeights,
    /// Ranks that have some of the experts, and the number of the pass.
    pub(super) others: Option<(&'a Others<'a>, u64)>,
}

impl Context<'_> {
    /// The order of some rows of the node.
    fn plan(&self, rows: &[u32]) -> LeafPlan {
        let places: Vec<_> = rows.iter().map(|&row| self.flat.places[row as usize]).collect();
        LeafPlan::of_tokens(&places, self.flat.rows.clone())
    }
}

/// What an expert's backward pass begins with: of each row that came, in the order of their places.
pub(super) struct ExpertPart<'a> {
    /// What came `[rows, H]`.
    pub(super) x: Vec<&'a [f32]>,
    pub(super) tape: &'a GatedTape,
    /// By which outputs were multiplied.
    pub(super) weights: Vec<f32>,
    /// Of the layer's output `[rows, H]`.
    pub(super) dout: Vec<&'a [f32]>,
    pub(super) plan: LeafPlan,
}

impl ExpertPart<'_> {
    /// Gradients of the routes' weights, and of the network.
    pub(super) fn backward(
        &self,
        cpu: &Cpu,
        params: &Params,
        ids: MlpIds,
        wanted: &[bool],
    ) -> (Vec<f32>, gated::GatedGradients) {
        let Self { x, tape, weights, dout, plan } = self;
        let width = tape.y.len() / x.len().max(1);
        let (mut dy, mut dw) = (Vec::with_capacity(tape.y.len()), Vec::with_capacity(x.len()));
        for ((dout, weight), y) in dout.iter().zip(weights).zip(tape.y.chunks_exact(width)) {
            dw.push(dot(cpu.simd(), dout, y));
            dy.extend(dout.iter().map(|d| d * weight));
        }
        let (of, wanted) = (weights_of(params, ids), any_wanted(wanted, ids));
        (dw, gated::backward(cpu, Rows::List(x), tape, of, &dy, plan, wanted))
    }
}

/// The gradient of the layer's input for `dout` `[N, H]`. `nth` is the layer's place among the sparse ones.
pub(super) fn backward(
    of: &Context<'_>,
    layer: usize,
    nth: usize,
    mut tape: MoeTape,
    hidden: &Tensor,
    dout: &[f32],
    gradients: &mut Gradients,
) -> Result<Vec<f32>, TrainError> {
    let Context { cpu, params, wanted, .. } = *of;
    let FeedForwardIds::Sparse { tiers_gate, tiers, shared } =
        &params.ids().layers[layer].feed_forward
    else {
        unreachable!("the caller has seen that the layer is sparse");
    };
    let width = hidden.cols();
    let mut dx = cpu.take(dout.len());
    let routes = &tape.routes;
    // Gradients of the routes' weights, and of what went into the experts.
    type OfExpert = Option<(Vec<f32>, gated::GatedGradients)>;
    let experts = std::mem::take(&mut tape.experts);
    let waiting = of.others.and_then(|(others, pass)| {
        let weight = |route: u32| routes.all()[route as usize].weight;
        others.backward((pass, layer), dout, width, &experts, weight)
    });
    let experts: Vec<(ExpertTape, OfExpert)> =
        experts.into_iter().map(|expert| (expert, None)).collect();
    let experts = each(cpu, experts, |(expert, done)| {
        if expert.owner.is_some() {
            return;
        }
        let part = ExpertPart {
            x: expert.rows.iter().map(|&row| hidden.row(row as usize)).collect(),
            tape: &expert.tape,
            weights: expert.routes.iter().map(|&c| routes.all()[c as usize].weight).collect(),
            dout: expert.rows.iter().map(|&row| &dout[row as usize * width..][..width]).collect(),
            plan: of.plan(&expert.rows),
        };
        *done = Some(part.backward(cpu, params, expert.ids, wanted));
    });
    let (experts, mut done): (Vec<ExpertTape>, Vec<OfExpert>) = experts.into_iter().unzip();
    for (place, (dw, x)) in
        waiting.map_or_else(|| Ok(Vec::new()), |w| w.gradients(&experts, width))?
    {
        done[place] = Some((dw, gated::GatedGradients { x, weights: None }));
    }
    let experts = experts.into_iter().zip(done);
    let experts: Vec<_> = experts.filter_map(|(e, done)| done.map(|(dw, g)| (e, dw, g))).collect();
    let mut dw = vec![0.0; routes.all().len()];
    let mut parts: Vec<&[f32]> = vec![&[]; routes.all().len()];
    for (expert, of_weights, of_input) in &experts {
        let each = expert.routes.iter().zip(of_weights).zip(of_input.x.chunks_exact(width));
        for ((&c, &d), x) in each {
            dw[c as usize] = d;
            parts[c as usize] = x;
        }
    }
    let ones = vec![1.0; parts.len()];
    elementwise::weighted_sum(cpu, &parts, &ones, routes.ends(), &mut dx);
    drop(parts);
    for (expert, _, of_weights) in experts {
        let MlpIds { gate, up, down } = expert.ids;
        debug_assert_eq!(expert.key.layer as usize, layer);
        for (id, gradient) in
            [gate, up, down].into_iter().zip(of_weights.weights.into_iter().flatten())
        {
            gradients.set(id, gradient);
        }
    }

    let of_scores = score_gradients(of, nth, &tape, &dw);
    for (trace, ds) in tape.traces.iter().zip(&of_scores) {
        let id = match trace.gate {
            Gate::Tiers => *tiers_gate,
            Gate::Groups { tier } => match tiers[tier].groups {
                Some(id) => id,
                None => continue,
            },
            Gate::Experts { tier, group } => tiers[tier].each[group].gate,
        };
        let n = trace.candidates;
        let rows: Vec<&[f32]> = trace.rows.iter().map(|&row| hidden.row(row as usize)).collect();
        // As long for every gate, so that the memory is used again.
        let mut all = cpu.take(dx.len());
        let more = &mut all[..rows.len() * width];
        let gate = Rows::dense(params.values(id), width);
        let factor = Factor::PerOutput(Rows::Dense { values: ds, cols: n });
        sum_rows(cpu, factor, gate, width, &LeafPlan::of(n), more);
        if more.len() == dx.len() {
            elementwise::add(cpu, &mut dx, more);
        } else {
            for (&row, more) in trace.rows.iter().zip(more.chunks_exact(width)) {
                elementwise::weighted_add(&mut dx[row as usize * width..][..width], 1.0, more);
            }
        }
        cpu.give(all);
        if wanted[id] {
            let mut gradient = vec![0.0; n * width];
            let factor = Factor::PerTerm(Rows::Dense { values: ds, cols: n });
            let plan = of.plan(&trace.rows);
            sum_rows(cpu, factor, Rows::List(&rows), width, &plan, &mut gradient);
            gradients.set(id, gradient);
        }
    }

    if let (Some((ids, gate)), Some((tape, logits))) = (shared, &tape.shared) {
        let mut dy = dout.to_vec();
        if let (Some(gate), Some(logits)) = (gate, logits) {
            let mut dlogits = vec![0.0; logits.len()];
            elementwise::sigmoid_gate_backward(cpu, &tape.y, logits, dout, &mut dy, &mut dlogits);
            let mut more = vec![0.0; dx.len()];
            let factor = Factor::PerOutput(Rows::dense(&dlogits, 1));
            let row = Rows::dense(params.values(*gate), width);
            sum_rows(cpu, factor, row, width, &LeafPlan::of(1), &mut more);
            elementwise::add(cpu, &mut dx, &more);
            if wanted[*gate] {
                let mut gradient = vec![0.0; width];
                let factor = Factor::PerTerm(Rows::dense(&dlogits, 1));
                sum_rows(cpu, factor, hidden.as_rows(), width, of.tokens, &mut gradient);
                gradients.set(*gate, gradient);
            }
        }
        mlp_backward(of, *ids, tape, hidden, &dy, &mut dx, gradients);
    }
    Ok(dx)
}

/// Whether the gradient of one of a network's matrices is wanted.
fn any_wanted(wanted: &[bool], ids: MlpIds) -> bool {
    [ids.gate, ids.up, ids.down].iter().any(|id| wanted[*id])
}

/// Backward of a network that sees every token: adds to `dx`.
pub(super) fn mlp_backward(
    of: &Context<'_>,
    ids: MlpIds,
    tape: &GatedTape,
    hidden: &Tensor,
    dy: &[f32],
    dx: &mut [f32],
    gradients: &mut Gradients,
) {
    let weights = weights_of(of.params, ids);
    let rows = hidden.as_rows();
    let wanted = any_wanted(of.wanted, ids);
    let of_mlp = gated::backward(of.cpu, rows, tape, weights, dy, of.tokens, wanted);
    elementwise::add(of.cpu, dx, &of_mlp.x);
    let ids = [ids.gate, ids.up, ids.down];
    for (id, gradient) in ids.into_iter().zip(of_mlp.weights.into_iter().flatten()) {
        gradients.set(id, gradient);
    }
}

/// The gradients of all gates' scores `[rows, candidates]`, for those of the routes' weights.
fn score_gradients(of: &Context<'_>, nth: usize, tape: &MoeTape, dw: &[f32]) -> Vec<Vec<f32>> {
    let MoeTape { routes, traces, .. } = tape;
    let renormalize = of.params.config().moe.as_ref().is_some_and(|moe| moe.routing.renormalize);
    // Where each gate holds a row.
    let places: Vec<Vec<Option<u32>>> = traces
        .iter()
        .map(|t| {
            let mut places = vec![None; routes.rows()];
            (0..).zip(&t.rows).for_each(|(i, &row)| places[row as usize] = Some(i));
            places
        })
        .collect();
    let mut dp: Vec<Vec<f32>> = traces
        .iter()
        .map(|t| {
            let balance = of.sums.gradient(nth, t.gate, of.balance);
            match balance.is_empty() {
                true => vec![0.0; t.probabilities.len()],
                false => balance.repeat(t.rows.len()),
            }
        })
        .collect();
    for (row, range) in (0..routes.rows()).map(|row| (row, routes.range(row))) {
        // The place of each of a route's three probabilities; none where there was no choice.
        let spots: Vec<[Option<(usize, usize)>; 3]> = routes
            .row(row)
            .iter()
            .map(|route| {
                let (tier, group) = (route.key.tier as usize, route.key.group as usize);
                let spot = |gate: Gate, candidate: usize| {
                    let gate = trace_of(traces, gate)?;
                    let place = places[gate][row]?;
                    Some((gate, place as usize * traces[gate].candidates + candidate))
                };
                [
                    spot(Gate::Tiers, tier),
                    spot(Gate::Groups { tier }, group),
                    spot(Gate::Experts { tier, group }, route.key.expert as usize),
                ]
            })
            .collect();
        let probability = |spot: Option<(usize, usize)>| {
            spot.map_or(1.0, |(gate, at)| traces[gate].probabilities[at])
        };
        let dw = &dw[range];
        let (mut total, mut mean) = (1.0, 0.0);
        if renormalize {
            let plain = |s: &[Option<(usize, usize)>; 3]| {
                probability(s[0]) * probability(s[1]) * probability(s[2])
            };
            let sum: f32 = spots.iter().map(plain).sum();
            if sum > 0.0 {
                total = sum;
                let weighted = routes.row(row).iter().zip(dw);
                mean = weighted.fold(0.0, |sum: f32, (route, d)| d.mul_add(route.weight, sum));
            }
        }
        for (spots, d) in spots.iter().zip(dw) {
            let dv = (d - mean) / total;
            let [tier, group, expert] = spots.map(probability);
            let others = [group * expert, tier * expert, tier * group];
            for (spot, others) in spots.iter().zip(others) {
                if let Some((gate, at)) = *spot {
                    dp[gate][at] = dv.mul_add(others, dp[gate][at]);
                }
            }
        }
    }
    for (trace, dp) in traces.iter().zip(&mut dp) {
        let n = trace.candidates;
        let z = of.sums.z_scale(nth, trace.gate, of.balance);
        for (i, ds) in dp.chunks_exact_mut(n).enumerate() {
            softmax_backward(trace.row(i), ds);
            if z != 0.0 {
                let scale = (z * log_sum_exp(&trace.scores[i * n..][..n], &trace.open)) as f32;
                for (ds, &p) in ds.iter_mut().zip(trace.row(i)) {
                    *ds = scale.mul_add(p, *ds);
                }
            }
        }
    }
    dp
}
