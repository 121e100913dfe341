//! Steps of optimizers, element by element, and their reductions.
//!
//! Formulas: AdamW (Loshchilov and Hutter 2019, algorithm 2, as torch has it: decay first), Adafactor
//! (Shazeer and Stern 2018, as `transformers.optimization.Adafactor` with its learning rate given),
//! SGD with momentum (as torch: no dampening, the first moment is the first gradient). Reductions are
//! rule 3 over the row-major list; means of rows and columns likewise, columns by rule 1 over rows.
//! A gradient that is absent is a gradient of zeros.

use crate::{
    cpu::Cpu,
    ops::{
        leaves::LeafPlan,
        row_sums::{Factor, sum_rows},
        sum,
    },
    rows::{Rows, RowsMut},
    simd::{Simd, vectorised},
};

/// One step of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// 1 − beta1^t.
    pub correction1: f32,
    /// 1 − beta2^t.
    pub correction2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Weight decay.
    pub decay: f32,
    /// Gradients are multiplied by this first (clipping).
    pub clip: f32,
}

/// `g ← clip·g`, `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `p ← p(1 − lr·decay)`,
/// `p ← p − lr · (m / correction₁) / (√(v / correction₂) + eps)`.
pub fn adamw(
    simd: Simd,
    step: AdamWStep,
    p: &mut [f32],
    g: Option<&[f32]>,
    m: &mut [f32],
    v: &mut [f32],
) {
    match g {
        Some(g) => adamw_with(simd, step, p, g, m, v),
        None => adamw_without(simd, step, p, m, v),
    }
}

/// One element.
#[inline(always)]
fn adamw_one(s: AdamWStep, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
    let g = g * s.clip;
    *m = s.beta1 * *m + (1.0 - s.beta1) * g;
    *v = s.beta2 * *v + (1.0 - s.beta2) * (g * g);
    let decayed = *p * (1.0 - s.lr * s.decay);
    *p = decayed - s.lr * ((*m / s.correction1) / ((*v / s.correction2).sqrt() + s.eps));
}

vectorised! {
    fn adamw_with(step: AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            adamw_one(step, p, g, m, v);
        }
    }
}

vectorised! {
    fn adamw_without(step: AdamWStep, p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for ((p, m), v) in p.iter_mut().zip(m).zip(v) {
            adamw_one(step, p, 0.0, m, v);
        }
    }
}

/// `b ← momentum·b + clip·g` (b ← clip·g where it is the first), `p ← p(1 − lr·decay) − lr·b`.
#[allow(clippy::too_many_arguments)]
pub fn sgd(
    simd: Simd,
    [lr, momentum, decay, clip]: [f32; 4],
    first: bool,
    p: &mut [f32],
    g: Option<&[f32]>,
    b: &mut [f32],
) {
    let momentum = if first { 0.0 } else { momentum };
    match g {
        Some(g) => sgd_with(simd, [lr, momentum, decay, clip], p, g, b),
        None => sgd_without(simd, [lr, momentum, decay], p, b),
    }
}

vectorised! {
    fn sgd_with(of: [f32; 4], p: &mut [f32], g: &[f32], b: &mut [f32]) {
        let [lr, momentum, decay, clip] = of;
        for ((p, &g), b) in p.iter_mut().zip(g).zip(b) {
            *b = momentum * *b + g * clip;
            *p = *p * (1.0 - lr * decay) - lr * *b;
        }
    }
}

vectorised! {
    fn sgd_without(of: [f32; 3], p: &mut [f32], b: &mut [f32]) {
        let [lr, momentum, decay] = of;
        for (p, b) in p.iter_mut().zip(b) {
            *b *= momentum;
            *p = *p * (1.0 - lr * decay) - lr * *b;
        }
    }
}

/// One step of Adafactor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdafactorStep {
    /// Learning rate, to be scaled by the parameter's root mean square.
    pub lr: f32,
    /// Decay of second moments at this step: 1 − t^decay_rate.
    pub beta: f32,
    /// Added to squares of gradients.
    pub eps: f32,
    /// Smallest scale of a parameter.
    pub scale_min: f32,
    /// Largest root mean square of an update.
    pub threshold: f32,
    /// Weight decay.
    pub decay: f32,
    /// Gradients are multiplied by this first (clipping).
    pub clip: f32,
}

/// Second moments of Adafactor: `[rows]` and `[columns]` of a matrix, or all of a vector.
#[derive(Debug)]
pub enum Factored<'a> {
    /// Means over columns and over rows.
    Matrix {
        /// `[rows]`.
        rows: &'a mut [f32],
        /// `[columns]`.
        columns: &'a mut [f32],
    },
    /// One per element.
    Vector(&'a mut [f32]),
}

/// `u = g² + eps`; of a matrix `R ← βR + (1−β) mean over columns`, `C` likewise over rows,
/// `U = g · (R / mean R)^(−½) ⊗ C^(−½)`; of a vector `V ← βV + (1−β)u`, `U = g · V^(−½)`;
/// `U ← U / max(1, rms U / threshold)`, `p ← p(1 − lr'·decay) − lr'·U`, `lr' = lr · max(scale_min, rms p)`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn adafactor(
    cpu: &Cpu,
    step: AdafactorStep,
    p: &mut [f32],
    g: Option<&[f32]>,
    state: Factored<'_>,
) {
    let simd = cpu.simd();
    let mut update = g.map_or_else(|| vec![0.0; p.len()], <[f32]>::to_vec);
    if step.clip != 1.0 {
        super::elementwise::scale(cpu, &mut update, step.clip);
    }
    let mut squares = update.clone();
    square(simd, &mut squares, step.eps);
    match state {
        Factored::Vector(v) => {
            blend(simd, v, &squares, step.beta);
            for (u, &v) in update.iter_mut().zip(v.iter()) {
                *u *= 1.0 / v.sqrt();
            }
        }
        Factored::Matrix { rows, columns } => {
            let (n, k) = (rows.len(), columns.len());
            assert_eq!(n * k, p.len(), "the factors are the matrix's");
            let means: Vec<f32> =
                squares.chunks_exact(k).map(|row| sum::sum(row) / k as f32).collect();
            blend(simd, rows, &means, step.beta);
            let mut means = vec![0.0; k];
            let over_rows = LeafPlan::of(n);
            sum_rows(cpu, Factor::One, Rows::dense(&squares, k), k, &over_rows, &mut means);
            means.iter_mut().for_each(|mean| *mean /= n as f32);
            blend(simd, columns, &means, step.beta);
            let mean = sum::sum(rows) / n as f32;
            let by_column: Vec<f32> = columns.iter().map(|c| 1.0 / c.sqrt()).collect();
            for (row, &r) in update.chunks_exact_mut(k).zip(rows.iter()) {
                scale_row(simd, row, 1.0 / (r / mean).sqrt(), &by_column);
            }
        }
    }
    let size = rms(&update);
    let shrink = (size / step.threshold).max(1.0);
    let lr = step.lr * rms(p).max(step.scale_min);
    apply(simd, p, &update, lr, shrink, step.decay);
}

/// The root of the mean square, by rule 3.
pub fn rms(values: &[f32]) -> f32 {
    (sum_of_squares(values) / values.len().max(1) as f32).sqrt()
}

/// The sum of all squares, by rule 3.
pub fn sum_of_squares(values: &[f32]) -> f32 {
    squares_of(Simd::best(), values)
}

/// [`sum_of_squares`] of each of some tensors, on all threads.
pub fn sums_of_squares(cpu: &Cpu, tensors: &[&[f32]]) -> Vec<f32> {
    let mut sums = vec![0.0; tensors.len()];
    let out = RowsMut::dense(&mut sums, 1);
    cpu.pool().run(tensors.len(), &|i| {
        // SAFETY: each task has its own place.
        let sum = unsafe { out.part(i, 0, 1) };
        sum[0] = squares_of(cpu.simd(), tensors[i]);
    });
    sums
}

vectorised! {
    fn squares_of(values: &[f32]) -> f32 {
        sum::sum_of_squares(values)
    }
}

vectorised! {
    fn square(values: &mut [f32], eps: f32) {
        for x in values {
            *x = *x * *x + eps;
        }
    }
}

vectorised! {
    fn blend(old: &mut [f32], new: &[f32], beta: f32) {
        for (old, &new) in old.iter_mut().zip(new) {
            *old = beta * *old + (1.0 - beta) * new;
        }
    }
}

vectorised! {
    fn scale_row(row: &mut [f32], factor: f32, by_column: &[f32]) {
        for (x, &c) in row.iter_mut().zip(by_column) {
            *x *= factor * c;
        }
    }
}

vectorised! {
    fn apply(p: &mut [f32], update: &[f32], lr: f32, shrink: f32, decay: f32) {
        for (p, &u) in p.iter_mut().zip(update) {
            *p = *p * (1.0 - lr * decay) - lr * (u / shrink);
        }
    }
}
