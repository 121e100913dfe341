//! Rows in panels: what [`super::panel_sums`] multiplies with, column by column in whole vectors.
//!
//! A panel is `[term][columns of the panel]`; the last one may have fewer vectors, and zeros fill its last vector up.

use std::ops::Range;

use crate::{
    cpu::Cpu,
    rows::{Rows, RowsMut},
    scratch,
    simd::{Kernel, Simd, Vector},
};

/// Fewer values than this are not worth a second thread.
const INLINE_VALUES: usize = 1 << 16;
/// Widest vector, in values.
pub(crate) const LANES_MAX: usize = 16;

/// Vectors of a panel: as many as TILE_ROWS rows leave registers for.
#[inline(always)]
pub(super) const fn panel_vectors(lanes: usize) -> usize {
    if lanes == 8 { 2 } else { 4 }
}

/// Columns of a panel.
pub(super) fn panel_width(simd: Simd) -> usize {
    panel_vectors(simd.lanes()) * simd.lanes()
}

/// Panels `[panel][term][columns of the panel]`.
pub(super) struct Packed {
    pub(super) values: scratch::Scratch,
    pub(super) terms: usize,
    /// With what fills the last vector up.
    pub(super) columns: usize,
}

impl Packed {
    /// Of one row per term.
    pub(super) fn rows(simd: Simd, rows: Rows<'_>) -> Self {
        let (terms, columns) = (rows.len(), rows.row(0).len());
        let lanes = simd.lanes();
        let filled = columns.next_multiple_of(lanes);
        let mut values = scratch::take(terms * filled);
        simd.run(PackRows { rows, terms: 0..terms, columns: 0..columns, out: &mut values });
        Self { values, terms, columns: filled }
    }

    /// Of one row per column.
    pub(super) fn columns(cpu: &Cpu, rows: Rows<'_>) -> Self {
        let (columns, terms) = (rows.len(), rows.row(0).len());
        let (lanes, width) = (cpu.simd().lanes(), panel_width(cpu.simd()));
        let all = columns.next_multiple_of(lanes);
        let mut values = scratch::take(all * terms);
        let len = values.len();
        let into = RowsMut::dense(&mut values, len);
        let panel = |p: usize| {
            let tokens = p * width..((p + 1) * width).min(columns);
            let len = tokens.len().next_multiple_of(lanes) * terms;
            // SAFETY: panels do not overlap.
            let out = unsafe { into.part(0, p * width * terms, len) };
            cpu.simd().run(Turn { rows, tokens, out });
        };
        if len < INLINE_VALUES {
            (0..columns.div_ceil(width)).for_each(panel);
        } else {
            cpu.pool().run(columns.div_ceil(width), &panel);
        }
        Self { values, terms, columns: all }
    }
}

/// Copies as many values as `to` has; for short rows, which a call of `memcpy` would take longer for.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn copy<V: Vector>(from: &[f32], to: &mut [f32]) {
    let from = &from[..to.len()];
    let whole = to.len() / V::LANES * V::LANES;
    for i in (0..whole).step_by(V::LANES) {
        // SAFETY: both have a vector there.
        unsafe { V::load(from.as_ptr().add(i)).store(to.as_mut_ptr().add(i)) }
    }
    for (to, &from) in to[whole..].iter_mut().zip(&from[whole..]) {
        *to = from;
    }
}

/// Adds the sums of a leaf to as many subtrees as `merges` says and leaves them on the stack, whose levels are `level`
/// values; returns the stack's new height.
///
/// # Safety
/// The machine has V's instructions; the stack has room for one more level, of R · N vectors at least.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub(super) unsafe fn push_leaf<V: Vector, const R: usize, const N: usize>(
    mut acc: [[V; N]; R],
    merges: usize,
    mut height: usize,
    level: usize,
    stack: &mut [f32],
) -> usize {
    // SAFETY: promised by the caller.
    unsafe {
        for _ in 0..merges {
            height -= 1;
            let below = stack.as_ptr().add(height * level);
            for r in 0..R {
                for n in 0..N {
                    let earlier = V::load(below.add((r * N + n) * V::LANES));
                    acc[r][n] = earlier.add(acc[r][n]);
                }
            }
        }
        let top = stack.as_mut_ptr().add(height * level);
        for r in 0..R {
            for n in 0..N {
                acc[r][n].store(top.add((r * N + n) * V::LANES));
            }
        }
    }
    height + 1
}

/// Packs some columns of some rows in panels; what fills a vector up is zero.
pub(super) struct PackRows<'a> {
    pub(super) rows: Rows<'a>,
    pub(super) terms: Range<usize>,
    pub(super) columns: Range<usize>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self { rows, terms, columns, out } = self;
        let width = panel_vectors(V::LANES) * V::LANES;
        for s in 0..terms.len() {
            let row = &rows.row(terms.start + s)[columns.clone()];
            for (p, piece) in row.chunks(width).enumerate() {
                let padded = piece.len().next_multiple_of(V::LANES);
                let out = &mut out[p * width * terms.len() + s * padded..][..padded];
                let (out, fill) = out.split_at_mut(piece.len());
                // SAFETY: promised by the caller.
                unsafe { copy::<V>(piece, out) }
                for fill in fill {
                    *fill = 0.0;
                }
            }
        }
    }
}

/// Packs some tokens `[tokens, k]` as a panel `[k][tokens]`; what fills a vector up is zero.
struct Turn<'a> {
    rows: Rows<'a>,
    tokens: Range<usize>,
    out: &'a mut [f32],
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self { rows, tokens, out } = self;
        let padded = tokens.len().next_multiple_of(V::LANES);
        let k = out.len() / padded;
        for column in (0..padded).step_by(V::LANES) {
            let wide = V::LANES.min(tokens.len() - column);
            let row = |i: usize| rows.row(tokens.start + column + i.min(wide - 1));
            let mut s = 0;
            if wide == V::LANES {
                while s + V::LANES <= k {
                    // SAFETY: every row has k values, and the panel as many columns.
                    unsafe {
                        let from: [*const f32; LANES_MAX] =
                            std::array::from_fn(|i| row(i)[s..].as_ptr());
                        V::transpose(&from, out[s * padded + column..].as_mut_ptr(), padded);
                    }
                    s += V::LANES;
                }
            }
            for s in s..k {
                for i in 0..V::LANES {
                    out[s * padded + column + i] = if i < wide { row(i)[s] } else { 0.0 };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_values_are_turned_over() {
        struct Whole<'a>(&'a [f32], &'a mut [f32]);
        impl Kernel for Whole<'_> {
            type Output = usize;

            #[inline(always)]
            unsafe fn run<V: Vector>(self) -> usize {
                let from = std::array::from_fn(|i| self.0[i * LANES_MAX..].as_ptr());
                // SAFETY: rows and room for 16 × 16.
                unsafe { V::transpose(&from, self.1.as_mut_ptr(), 20) };
                V::LANES
            }
        }
        let from = (0u16..).take(LANES_MAX * LANES_MAX).map(f32::from).collect::<Vec<f32>>();
        for simd in Simd::available() {
            let mut to = vec![0.0; 20 * LANES_MAX];
            let lanes = simd.run(Whole(&from, &mut to));
            for (i, j) in (0..lanes).flat_map(|i| (0..lanes).map(move |j| (i, j))) {
                assert_eq!(to[j * 20 + i].to_bits(), from[i * LANES_MAX + j].to_bits(), "{simd}");
            }
        }
    }
}
