//! Rotary positions.
//!
//! Shapes: x `[rows, heads * head_dim]`, positions `[rows]`, inv_freq `[head_dim / 2]`, table
//! `[rows, head_dim]`: the cosines of a row's angles, then their sines.
//! Pairs are (i, i + head_dim / 2). The angle is the f32 product position · inv_freq; its sine
//! and cosine are computed in f64 by the pinned `libm` crate and rounded to f32.

use crate::{cpu::Cpu, ops::elementwise::for_rows, simd::vectorised};

/// Cosines and sines of the angles of all positions, times `scale`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn rotary_table(cpu: &Cpu, positions: &[u32], inv_freq: &[f32], scale: f32, out: &mut [f32]) {
    let half = inv_freq.len();
    assert_eq!(out.len(), positions.len() * 2 * half, "a cosine and a sine per frequency");
    if out.is_empty() {
        return;
    }
    for_rows(cpu, out, 2 * half, |first, out| {
        for (row, &position) in out.chunks_exact_mut(2 * half).zip(&positions[first..]) {
            let (cos, sin) = row.split_at_mut(half);
            for (i, &frequency) in inv_freq.iter().enumerate() {
                let (s, c) = libm::sincos(f64::from(position as f32 * frequency));
                cos[i] = c as f32 * scale;
                sin[i] = s as f32 * scale;
            }
        }
    });
}

/// Turns every head of every row by its row of a [`rotary_table`], in place.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn rope(cpu: &Cpu, x: &mut [f32], head_dim: usize, table: &[f32]) {
    if x.is_empty() {
        return;
    }
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "heads are pairs");
    let rows = table.len() / head_dim;
    assert!(rows > 0 && table.len() == rows * head_dim, "one row of the table per row");
    assert!(x.len().is_multiple_of(rows * head_dim), "rows are whole heads");
    let cols = x.len() / rows;
    for_rows(cpu, x, cols, |first, x| {
        for (row, angles) in x.chunks_exact_mut(cols).zip(table.chunks_exact(head_dim).skip(first))
        {
            let (cos, sin) = angles.split_at(head_dim / 2);
            turn_heads(cpu.simd(), row, cos, sin);
        }
    });
}

/// Backward of [`rope`], in place on the gradient: the transposed turn.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn rope_backward(cpu: &Cpu, dx: &mut [f32], head_dim: usize, table: &[f32]) {
    let turned: Vec<f32> = table
        .chunks_exact(head_dim.max(1))
        .flat_map(|row| {
            let (cos, sin) = row.split_at(head_dim / 2);
            cos.iter().copied().chain(sin.iter().map(|s| -s))
        })
        .collect();
    rope(cpu, dx, head_dim, &turned);
}

vectorised! {
    /// `(a, b) → (a·cos − b·sin, b·cos + a·sin)`, each as one product and one fused multiply-add.
    fn turn_heads(row: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        let sin = &sin[..half];
        for head in row.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (a[i], b[i]);
                a[i] = x.mul_add(cos[i], -(y * sin[i]));
                b[i] = y.mul_add(cos[i], x * sin[i]);
            }
        }
    }
}
