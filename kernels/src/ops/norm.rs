//! RMS norm: `out = (x * (1 / sqrt(mean(x²) + eps))) * weight`.
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
