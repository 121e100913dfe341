//! Rotary positions.
//!
//! Shapes: x `[rows, heads * head_dim]`, positions `[rows]`, inv_freq `[head_dim / 2]`.
//! Pairs are (i, i + head_dim / 2). The angle is the f32 product position · inv_freq; its sine
//! and cosine are computed in f64 by the pinned `libm` crate and rounded to f32.

use crate::{cpu::Cpu, ops::elementwise::for_rows, scratch, simd::vectorised};

/// Turns every head of every row by its position, in place.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn rope(
    cpu: &Cpu,
    x: &mut [f32],
    head_dim: usize,
    positions: &[u32],
    inv_freq: &[f32],
    scale: f32,
) {
    if positions.is_empty() {
        assert!(x.is_empty(), "one position per row");
        return;
    }
    assert!(x.len().is_multiple_of(positions.len()), "one position per row");
    let cols = x.len() / positions.len();
    assert!(cols > 0 && cols.is_multiple_of(head_dim), "rows are whole heads");
    assert_eq!(inv_freq.len() * 2, head_dim, "one frequency per pair");
    for_rows(cpu, x, cols, |first, x| {
        let mut turns = scratch::take(head_dim);
        let (cos, sin) = turns.split_at_mut(head_dim / 2);
        for (row, &position) in x.chunks_exact_mut(cols).zip(&positions[first..]) {
            for (i, &frequency) in inv_freq.iter().enumerate() {
                let (s, c) = libm::sincos(f64::from(position as f32 * frequency));
                cos[i] = c as f32 * scale;
                sin[i] = s as f32 * scale;
            }
            turn_heads(cpu.simd(), row, cos, sin);
        }
    });
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
