//! Weighted sums of rows: `out[i, :] = Σ_s factor(i, s) · rows[s, :]`, the product of every backward pass.
//!
//! - The gradient of what a linear map was given: `dx[t, :] = Σ_n dy[t, n] · w[n, :]`, w row-major
//!   `[n, k]`, with [`LeafPlan::of`] (rule 1 over outputs).
//! - The gradient of its weights: `dw[n, :] = Σ_t dy[t, n] · x[t, :]`, with [`LeafPlan::of_tokens`]
//!   (rule 8).
//! - Sums over keys and queries of attention's backward pass.
//!
//! Per output one accumulator from +0 runs the terms of a leaf upwards by fused multiply-add; leaves
//! meet as the plan says, earlier + later. Kernels vectorise over the columns and hold several rows of
//! the output in registers; neither changes an order. Sums of a few outputs read both factors where they lie;
//! the others are those of [`super::panel_sums`].

use crate::{
    cpu::Cpu,
    ops::{
        leaves::LeafPlan,
        panel_sums,
        panels::{LANES_MAX, push_leaf},
    },
    rows::{Rows, RowsMut},
    scratch,
    simd::{Kernel, Vector},
};

/// Fewer fused multiply-adds than this are not worth a second thread.
const INLINE_FMAS: usize = 1 << 16;
/// So many outputs are worth packing the rows.
const BLOCKED_OUTPUTS: usize = 4;

/// What rows are multiplied by.
#[derive(Debug, Clone, Copy)]
pub enum Factor<'a> {
    /// factor(i, s) = values\[i\]\[s\]: one row per output.
    PerOutput(Rows<'a>),
    /// factor(i, s) = values\[s\]\[i\]: one row per term.
    PerTerm(Rows<'a>),
    /// factor(0, s) = 1: the plain sum of the rows.
    One,
}

impl<'a> Factor<'a> {
    /// factor(i, s).
    #[inline(always)]
    fn get(&self, i: usize, s: usize) -> f32 {
        match self {
            Factor::PerOutput(rows) => rows.row(i)[s],
            Factor::PerTerm(rows) => rows.row(s)[i],
            Factor::One => 1.0,
        }
    }
}

/// See the module's text. `out` is dense `[outputs, columns]` and is overwritten; without terms it is
/// zero. `rows` has as many rows as the plan has terms, each of `columns` values.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn sum_rows(
    cpu: &Cpu,
    factor: Factor<'_>,
    rows: Rows<'_>,
    columns: usize,
    plan: &LeafPlan,
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    assert!(columns > 0 && out.len().is_multiple_of(columns), "out is [outputs, columns]");
    let (outputs, terms) = (out.len() / columns, plan.terms());
    if terms == 0 {
        out.fill(0.0);
        return;
    }
    assert_eq!(rows.len(), terms, "one row per term");
    assert!((0..terms).all(|s| rows.row(s).len() == columns), "rows are [columns]");
    match factor {
        Factor::PerOutput(f) => {
            assert_eq!(f.len(), outputs, "one row of factors per output");
            assert!((0..outputs).all(|i| f.row(i).len() == terms), "one factor per term");
        }
        Factor::PerTerm(f) => {
            assert_eq!(f.len(), terms, "one row of factors per term");
            assert!((0..terms).all(|s| f.row(s).len() == outputs), "one factor per output");
        }
        Factor::One => assert_eq!(outputs, 1, "the plain sum is one row"),
    }
    if outputs >= BLOCKED_OUTPUTS {
        return panel_sums::sum(cpu, factor, rows, columns, plan, out);
    }
    let strip = 4 * cpu.simd().lanes();
    let strips = columns.div_ceil(strip);
    let out = RowsMut::dense(out, columns);
    let task = |s: usize| {
        let columns = (s * strip, ((s + 1) * strip).min(columns));
        cpu.simd().run(Strip { factor, rows, plan, outputs, columns, out });
    };
    if outputs * columns * terms < INLINE_FMAS {
        (0..strips).for_each(task);
    } else {
        cpu.pool().run(strips, &task);
    }
}

/// Some columns of the output, which has less than [`BLOCKED_OUTPUTS`] rows.
struct Strip<'a> {
    factor: Factor<'a>,
    rows: Rows<'a>,
    plan: &'a LeafPlan,
    outputs: usize,
    columns: (usize, usize),
    out: RowsMut<'a>,
}

impl Kernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let mut column = self.columns.0;
        // SAFETY: promised by the caller; every piece lies inside the rows by the loop's bounds.
        unsafe {
            while column < self.columns.1 {
                let left = self.columns.1 - column;
                if left >= 4 * V::LANES {
                    self.columns_of::<V, 4>(column);
                    column += 4 * V::LANES;
                } else if left >= 2 * V::LANES {
                    self.columns_of::<V, 2>(column);
                    column += 2 * V::LANES;
                } else if left >= V::LANES {
                    self.columns_of::<V, 1>(column);
                    column += V::LANES;
                } else {
                    self.few_columns(column, left);
                    column += left;
                }
            }
        }
    }
}

impl Strip<'_> {
    /// N vectors of columns.
    ///
    /// # Safety
    /// The machine has V's instructions, and N vectors of columns are inside the rows.
    #[inline(always)]
    unsafe fn columns_of<V: Vector, const N: usize>(&self, column: usize) {
        let mut stack = scratch::take(self.plan.depth() * self.outputs * N * LANES_MAX);
        // SAFETY: promised by the caller; there are so many outputs.
        unsafe {
            match self.outputs {
                1 => self.tile::<V, 1, N>(column, &mut stack),
                2 => self.tile::<V, 2, N>(column, &mut stack),
                _ => self.tile::<V, 3, N>(column, &mut stack),
            }
        }
    }

    /// # Safety
    /// As of [`Strip::columns_of`]; there are R outputs.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn tile<V: Vector, const R: usize, const N: usize>(
        &self,
        column: usize,
        stack: &mut [f32],
    ) {
        let level = R * N * V::LANES;
        let (mut height, mut s) = (0, 0);
        // SAFETY: the stack has room for the plan's depth; columns and outputs are inside.
        unsafe {
            for leaf in self.plan.leaves() {
                let terms = leaf.terms as usize;
                let acc = match self.factor {
                    Factor::PerOutput(f) => {
                        let at: [*const f32; R] = std::array::from_fn(|r| f.row(r).as_ptr());
                        self.leaf::<V, R, N>(column, s, terms, |s, r| *at[r].add(s))
                    }
                    Factor::PerTerm(Rows::Dense { values, cols }) => {
                        self.leaf::<V, R, N>(column, s, terms, |s, r| {
                            *values.as_ptr().add(s * cols + r)
                        })
                    }
                    _ => self.leaf::<V, R, N>(column, s, terms, |s, r| self.factor.get(r, s)),
                };
                s += terms;
                height = push_leaf(acc, leaf.merges as usize, height, level, stack);
            }
            for r in 0..R {
                let out = self.out.part(r, column, N * V::LANES);
                out.copy_from_slice(&stack[r * N * V::LANES..(r + 1) * N * V::LANES]);
            }
        }
    }

    /// The sums of one leaf.
    ///
    /// # Safety
    /// As of [`Strip::tile`].
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn leaf<V: Vector, const R: usize, const N: usize>(
        &self,
        column: usize,
        from: usize,
        terms: usize,
        factor: impl Fn(usize, usize) -> f32,
    ) -> [[V; N]; R] {
        // SAFETY: promised by the caller.
        unsafe {
            let mut acc = [[V::zero(); N]; R];
            match self.rows {
                Rows::Dense { values, cols } => {
                    let base = values.as_ptr().add(column);
                    for s in from..from + terms {
                        step(&mut acc, base.add(s * cols), s, &factor);
                    }
                }
                Rows::List(rows) => {
                    for s in from..from + terms {
                        step(&mut acc, rows[s].as_ptr().add(column), s, &factor);
                    }
                }
            }
            acc
        }
    }

    /// Columns that fill no vector.
    ///
    /// # Safety
    /// `count` columns from `column` are this task's.
    #[inline(always)]
    unsafe fn few_columns(&self, column: usize, count: usize) {
        let mut stack = scratch::take(self.plan.depth() * LANES_MAX);
        for i in 0..self.outputs {
            let (mut height, mut s) = (0, 0);
            for leaf in self.plan.leaves() {
                let mut acc = [0.0f32; LANES_MAX];
                for s in s..s + leaf.terms as usize {
                    let f = self.factor.get(i, s);
                    let row = &self.rows.row(s)[column..column + count];
                    for (acc, &x) in acc.iter_mut().zip(row) {
                        *acc = f.mul_add(x, *acc);
                    }
                }
                s += leaf.terms as usize;
                for _ in 0..leaf.merges {
                    height -= 1;
                    for (acc, &earlier) in acc.iter_mut().zip(&stack[height * LANES_MAX..]) {
                        *acc += earlier;
                    }
                }
                stack[height * LANES_MAX..][..LANES_MAX].copy_from_slice(&acc);
                height += 1;
            }
            // SAFETY: tasks have their own rows and columns.
            unsafe { self.out.part(i, column, count) }.copy_from_slice(&stack[..count]);
        }
    }
}

/// One term of a tile.
///
/// # Safety
/// The machine has V's instructions; N vectors are readable at `row`.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn step<V: Vector, const R: usize, const N: usize>(
    acc: &mut [[V; N]; R],
    row: *const f32,
    s: usize,
    factor: &impl Fn(usize, usize) -> f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut x = [V::zero(); N];
        for n in 0..N {
            x[n] = V::load(row.add(n * V::LANES));
        }
        for r in 0..R {
            let f = V::splat(factor(s, r));
            for n in 0..N {
                acc[r][n] = acc[r][n].fma(f, x[n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ops::leaves::Place, simd::Simd};

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 12.9898).sin() * 3.5).collect()
    }

    /// One output by the plan, in plain Rust.
    fn by_plan(plan: &LeafPlan, term: impl Fn(usize) -> (f32, f32)) -> f32 {
        let (mut stack, mut s) = (Vec::new(), 0);
        for leaf in plan.leaves() {
            let mut acc = 0.0f32;
            for _ in 0..leaf.terms {
                let (f, x) = term(s);
                acc = f.mul_add(x, acc);
                s += 1;
            }
            for _ in 0..leaf.merges {
                acc += stack.pop().unwrap_or(0.0);
            }
            stack.push(acc);
        }
        stack.pop().unwrap_or(0.0)
    }

    #[test]
    fn every_set_and_number_of_threads_gives_the_plans_bits() {
        let tokens: Vec<Place> = [(0, 300), (1, 40), (4, 700)]
            .into_iter()
            .flat_map(|(row, to)| (0..to).map(move |position| Place { row, position }))
            .filter(|place| place.position % 3 != 1)
            .collect();
        let plans = [LeafPlan::of_tokens(&tokens, 0..6), LeafPlan::of(600), LeafPlan::of(7)];
        for plan in &plans {
            for (outputs, columns) in
                [(1, 1), (3, 67), (7, 67), (53, 100), (12, 15), (6, 64), (7, 523)]
            {
                let terms = plan.terms();
                let (f, x) = (values(outputs * terms, 0.5), values(terms * columns, 9.0));
                let list: Vec<&[f32]> = x.chunks(columns).collect();
                for per_output in [true, false] {
                    let factor = |i: usize, s: usize| {
                        f[if per_output { i * terms + s } else { s * outputs + i }]
                    };
                    let mut differs = 0;
                    for simd in Simd::available() {
                        for threads in [1, 3] {
                            let cpu = Cpu::new(threads, simd);
                            for rows in [Rows::dense(&x, columns), Rows::List(&list)] {
                                let mut out = vec![f32::NAN; outputs * columns];
                                let factors = match per_output {
                                    true => Factor::PerOutput(Rows::dense(&f, terms)),
                                    false => Factor::PerTerm(Rows::dense(&f, outputs)),
                                };
                                sum_rows(&cpu, factors, rows, columns, plan, &mut out);
                                for (at, found) in out.iter().enumerate() {
                                    let (i, c) = (at / columns, at % columns);
                                    let term = |s: usize| (factor(i, s), x[s * columns + c]);
                                    let expected = by_plan(plan, term);
                                    assert_eq!(found.to_bits(), expected.to_bits(), "{simd}");
                                    let chain = (0..terms).fold(0.0f32, |acc, s| {
                                        let (f, x) = term(s);
                                        f.mul_add(x, acc)
                                    });
                                    differs += usize::from(chain.to_bits() != found.to_bits());
                                }
                            }
                        }
                    }
                    let few = terms < 256 || outputs * columns < 100;
                    assert!(few || differs > 0, "the data can tell orders apart");
                }
            }
        }
    }

    #[test]
    fn the_plain_sum_and_the_empty_one() {
        let cpu = Cpu::best(1);
        let x = values(30, 1.0);
        let mut out = [7.0; 10];
        sum_rows(&cpu, Factor::One, Rows::dense(&x, 10), 10, &LeafPlan::of(3), &mut out);
        assert_eq!(out[4], x[4] + x[14] + x[24]);
        let none: [&[f32]; 0] = [];
        let empty = LeafPlan::of(0);
        sum_rows(&cpu, Factor::PerTerm(Rows::List(&none)), Rows::List(&none), 10, &empty, &mut out);
        assert_eq!(out, [0.0; 10]);
    }
}
