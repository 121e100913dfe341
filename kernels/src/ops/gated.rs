//! A gated network for training: `down( silu(gate·x) ∘ (up·x) )` with what its backward pass needs.
//!
//! Shapes: x `[rows, hidden]`, g = gate·x and u = up·x `[rows, inner]`, a = silu(g) ∘ u, y `[rows, hidden]`.
//! Forward has the bits of [`super::swiglu`]. Backward, with σ = sigmoid(g):
//! `da = dy · down` (rule 1 over hidden), `du = da · silu(g)`, `dg = da · u · σ (1 + g (1 − σ))`,
//! `dx = dg · gate + du · up`, each product by rule 1 over inner, then one sum; gradients of weights by
//! rule 8 over the rows' tokens.

use crate::{
    cpu::Cpu,
    ops::{
        elementwise::round_to_bf16,
        function::{sigmoid, silu},
        leaves::LeafPlan,
        panel_sums::{RowMajor, products},
        row_sums::{Factor, sum_rows},
    },
    rows::Rows,
    simd::vectorised,
};

/// What a forward pass keeps.
#[derive(Debug, Default)]
pub struct GatedTape {
    /// gate·x `[rows, inner]`.
    pub g: Vec<f32>,
    /// up·x `[rows, inner]`.
    pub u: Vec<f32>,
    /// silu(g) ∘ u `[rows, inner]`.
    pub a: Vec<f32>,
    /// The output `[rows, hidden]`.
    pub y: Vec<f32>,
}

/// The weights, row by row.
#[derive(Debug, Clone, Copy)]
pub struct GatedWeights<'a> {
    /// `[inner, hidden]`.
    pub gate: &'a [f32],
    /// `[inner, hidden]`.
    pub up: &'a [f32],
    /// `[hidden, inner]`.
    pub down: &'a [f32],
    /// Whether weights and x are rounded to bf16, and all else is that is multiplied with them.
    pub bf16: bool,
}

/// Gradients of one network.
#[derive(Debug)]
pub struct GatedGradients {
    /// `[rows, hidden]`.
    pub x: Vec<f32>,
    /// Of gate, up and down, in their shapes, where they are wanted.
    pub weights: Option<[Vec<f32>; 3]>,
}

/// The network over rows, and its tape.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn forward(cpu: &Cpu, x: Rows<'_>, weights: GatedWeights<'_>) -> GatedTape {
    let rows = x.len();
    if rows == 0 {
        return GatedTape::default();
    }
    let hidden = x.row(0).len();
    let inner = weights.gate.len() / hidden.max(1);
    let (mut g, mut u) = (vec![0.0; rows * inner], vec![0.0; rows * inner]);
    let mut both = [
        RowMajor { weight: weights.gate, bias: None, out: &mut g },
        RowMajor { weight: weights.up, bias: None, out: &mut u },
    ];
    products(cpu, x, &mut both);
    let mut a = u.clone();
    activate(cpu.simd(), &g, &mut a);
    if weights.bf16 {
        round_to_bf16(cpu, &mut a);
    }
    let mut y = vec![0.0; rows * hidden];
    let mut down = [RowMajor { weight: weights.down, bias: None, out: &mut y }];
    products(cpu, Rows::Dense { values: &a, cols: inner }, &mut down);
    GatedTape { g, u, a, y }
}

/// The gradients of the network for `dy` `[rows, hidden]`; `tokens` orders the rows.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn backward(
    cpu: &Cpu,
    x: Rows<'_>,
    tape: &GatedTape,
    weights: GatedWeights<'_>,
    dy: &[f32],
    tokens: &LeafPlan,
    wanted: bool,
) -> GatedGradients {
    let rows = x.len();
    if rows == 0 {
        return GatedGradients { x: Vec::new(), weights: None };
    }
    let (inner, hidden) = (tape.g.len() / rows, dy.len() / rows);
    let mut rounded = Vec::new();
    let dy = if weights.bf16 {
        rounded.extend_from_slice(dy);
        round_to_bf16(cpu, &mut rounded);
        &rounded[..]
    } else {
        dy
    };
    let dense = |values, cols| Rows::Dense { values, cols };
    let mut da = vec![0.0; rows * inner];
    let (of_dy, down) = (Factor::PerOutput(dense(dy, hidden)), dense(weights.down, inner));
    sum_rows(cpu, of_dy, down, inner, &LeafPlan::of(hidden), &mut da);
    let mut du = vec![0.0; rows * inner];
    activate_backward(cpu.simd(), &tape.g, &tape.u, &mut da, &mut du);
    let mut dg = da;
    if weights.bf16 {
        round_to_bf16(cpu, &mut dg);
        round_to_bf16(cpu, &mut du);
    }
    let (mut dx, mut more) = (vec![0.0; rows * hidden], vec![0.0; rows * hidden]);
    let over_inner = LeafPlan::of(inner);
    for (d, w, out) in [(&dg, weights.gate, &mut dx), (&du, weights.up, &mut more)] {
        let factor = Factor::PerOutput(dense(d, inner));
        sum_rows(cpu, factor, dense(w, hidden), hidden, &over_inner, out);
    }
    super::elementwise::add(cpu, &mut dx, &more);
    let weights = wanted.then(|| {
        let mut of: [Vec<f32>; 3] = std::array::from_fn(|_| cpu.take(inner * hidden));
        let [gate, up, down] = &mut of;
        sum_rows(cpu, Factor::PerTerm(dense(&dg, inner)), x, hidden, tokens, gate);
        sum_rows(cpu, Factor::PerTerm(dense(&du, inner)), x, hidden, tokens, up);
        let of_dy = Factor::PerTerm(dense(dy, hidden));
        sum_rows(cpu, of_dy, dense(&tape.a, inner), inner, tokens, down);
        of
    });
    GatedGradients { x: dx, weights }
}

vectorised! {
    /// `ups = silu(gates) * ups`.
    fn activate(gates: &[f32], ups: &mut [f32]) {
        for (u, &g) in ups.iter_mut().zip(gates) {
            *u *= silu(g);
        }
    }
}

vectorised! {
    /// da becomes dg.
    fn activate_backward(g: &[f32], u: &[f32], da: &mut [f32], du: &mut [f32]) {
        for (((&g, &u), da), du) in g.iter().zip(u).zip(da).zip(du) {
            let s = sigmoid(g);
            *du = *da * silu(g);
            *da = *da * u * (s * g.mul_add(1.0 - s, 1.0));
        }
    }
}
