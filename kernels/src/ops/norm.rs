//! RMS norm: `out = (x * (1 / sqrt(mean(x²) + eps))) * weight`.
//!
//! Backward, with r = 1 / sqrt(mean(x²) + eps) and n values in a run:
//! `dx_i = r · (w_i dy_i) − x_i · (r³/n · Σ_j x_j w_j dy_j)`, the sum by rule 3; a token gives the weight's
//! gradient `Σ dy_i · (x_i r)` over its runs, upwards from +0; tokens are added by rule 8.
//!
//! Shapes: x `[rows, cols]`, weight `[width]` with cols a multiple of width: every consecutive
//! run of `width` values is normed by itself (a whole row, or each head of it).

use crate::{cpu::Cpu, ops::elementwise::for_rows, ops::sum, simd::vectorised};

/// Norms every run of `weight.len()` values of `x` into `out`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "out is as large as x");
    for_rows(cpu, out, weight.len(), |first, out| {
        let x = &x[first * weight.len()..][..out.len()];
        norm_runs(cpu.simd(), x, weight, eps, out);
    });
}

/// Norms every run of `weight.len()` values of `x` in place.
///
/// # Panics
/// If x is no whole number of runs.
pub fn rms_norm_in_place(cpu: &Cpu, x: &mut [f32], weight: &[f32], eps: f32) {
    for_rows(cpu, x, weight.len(), |_, x| norm_runs_in_place(cpu.simd(), x, weight, eps));
}

#[inline(always)]
fn scale(run: &[f32], eps: f32) -> f32 {
    1.0 / (sum::sum_of_squares(run) / run.len() as f32 + eps).sqrt()
}

vectorised! {
    fn norm_runs(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let scale = scale(x, eps);
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        }
    }
}

vectorised! {
    fn norm_runs_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        for x in x.chunks_exact_mut(weight.len()) {
            let scale = scale(x, eps);
            for (x, &w) in x.iter_mut().zip(weight) {
                *x = *x * scale * w;
            }
        }
    }
}

/// Backward: `dx` of every run, and what each row of `cols` values gives to the gradient of the
/// weight, `[rows, weight.len()]`, where that is wanted.
///
/// # Panics
/// If the shapes do not fit each other.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward(
    cpu: &Cpu,
    x: &[f32],
    cols: usize,
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    of_weight: Option<&mut [f32]>,
) {
    assert!(x.len() == dy.len() && x.len() == dx.len(), "x, dy and dx are of one shape");
    assert!(cols.is_multiple_of(weight.len()), "a row is whole runs");
    for_rows(cpu, dx, weight.len(), |first, dx| {
        let at = first * weight.len();
        let (x, dy) = (&x[at..][..dx.len()], &dy[at..][..dx.len()]);
        backward_runs(cpu.simd(), x, weight, eps, dy, dx);
    });
    if let Some(out) = of_weight {
        let width = weight.len();
        assert_eq!(out.len() / width, x.len() / cols.max(1), "one row of gradients per row");
        for_rows(cpu, out, width, |first, out| {
            for (row, out) in (first..).zip(out.chunks_exact_mut(width)) {
                let at = row * cols;
                out.fill(0.0);
                weight_runs(cpu.simd(), &x[at..][..cols], eps, &dy[at..][..cols], out);
            }
        });
    }
}

vectorised! {
    fn backward_runs(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let width = weight.len();
        for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let scale = scale(x, eps);
            for ((dx, &dy), &w) in dx.iter_mut().zip(dy).zip(weight) {
                *dx = w * dy;
            }
            let along = sum::sum_products(x, dx) * (scale * scale * scale / width as f32);
            for (dx, &x) in dx.iter_mut().zip(x) {
                *dx = scale * *dx - x * along;
            }
        }
    }
}

vectorised! {
    fn weight_runs(x: &[f32], eps: f32, dy: &[f32], out: &mut [f32]) {
        let width = out.len();
        for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
            let scale = scale(x, eps);
            for ((out, &x), &dy) in out.iter_mut().zip(x).zip(dy) {
                *out = dy.mul_add(x * scale, *out);
            }
        }
    }
}
