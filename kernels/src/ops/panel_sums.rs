//! Sums of [`super::row_sums`] over many outputs, and products with row-major weights: block by block, with
//! the rows packed.
//!
//! `out[i, c] = Σ_s factor(i, s) · b(s, c)`. A task is a block of outputs × columns. Its terms come in chunks of whole
//! leaves. Of a chunk the task packs b in panels `[term][columns of the panel]`, unless the caller has packed all of
//! it, and factors that lie term by term in tiles `[term][TILE_ROWS]`; then each tile × panel runs the chunk's leaves
//! in registers. Subtrees that wait lie on a stack, one per tile and panel.
//!
//! [`products`] turns the other way round: rows of weights are the factors, read where they lie, the tokens are the
//! columns, packed once for all weights, and a block is turned over when it is finished. So weights that change
//! with every step are never packed.
//!
//! An output's own order of operations is the plan's, whoever computes it.

// Registers are arrays that are indexed alike; iterators would hide which lane meets which.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::{
    cpu::Cpu,
    ops::{
        leaves::{Leaf, LeafPlan},
        panels::{LANES_MAX, PackRows, Packed, copy, panel_vectors, panel_width, push_leaf},
        row_sums::Factor,
    },
    rows::{Rows, RowsMut},
    scratch,
    simd::{Kernel, Vector},
};

/// Fewer fused multiply-adds than this are not worth a second thread.
const INLINE_FMAS: usize = 1 << 16;
/// Rows of the output that one tile holds in registers.
const TILE_ROWS: usize = 6;
/// Outputs of a task at most: a multiple of the tile's.
const BLOCK_ROWS: usize = 192;
/// Outputs of a task at least, where there are as many.
const BLOCK_ROWS_MIN: usize = 48;
/// Columns of a task at most: whole panels.
const BLOCK_COLUMNS: usize = 256;
/// Terms of a chunk, unless one leaf has more.
const CHUNK: usize = 256;

/// What factors are multiplied with.
#[derive(Clone, Copy)]
pub(super) enum Panels<'a> {
    /// One row per term, to be packed by the task.
    Rows(Rows<'a>),
    /// Panels that the caller has packed; terms begin with `first`.
    Packed { panels: &'a Packed, first: usize },
}

/// Where finished blocks go.
#[derive(Clone, Copy)]
pub(super) enum Sink<'a> {
    /// To rows of outputs.
    Rows(RowsMut<'a>),
    /// To rows of columns, which are so many outputs long, with a bias per output.
    Turned { out: RowsMut<'a>, stride: usize, bias: Option<&'a [f32]> },
}

/// All of a sum.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) factor: Factor<'a>,
    pub(super) panels: Panels<'a>,
    /// The outputs from this one on are computed.
    pub(super) first_output: usize,
    pub(super) outputs: usize,
    /// Columns from this one on, the first of a panel, are computed, up to `columns`.
    pub(super) first_column: usize,
    pub(super) columns: usize,
    pub(super) plan: &'a LeafPlan,
    pub(super) sink: Sink<'a>,
}

/// [`super::row_sums::sum_rows`] of shapes that were checked.
pub(super) fn sum(
    cpu: &Cpu,
    factor: Factor<'_>,
    rows: Rows<'_>,
    columns: usize,
    plan: &LeafPlan,
    out: &mut [f32],
) {
    let outputs = out.len() / columns;
    let sink = Sink::Rows(RowsMut::dense(out, columns));
    let panels = Panels::Rows(rows);
    Job { factor, panels, first_output: 0, outputs, first_column: 0, columns, plan, sink }.run(cpu);
}

/// One of the products of [`products`].
#[derive(Debug)]
pub struct RowMajor<'a> {
    /// Weights `[n, k]`, row by row.
    pub weight: &'a [f32],
    /// Added to every row, `[n]`.
    pub bias: Option<&'a [f32]>,
    /// Dense `[m, n]`.
    pub out: &'a mut [f32],
}

/// `out = x · wᵀ (+ bias)` for x `[m, k]` and one or several w, with the bits of [`super::matmul`].
///
/// # Panics
/// If the shapes do not fit each other.
pub fn products(cpu: &Cpu, x: Rows<'_>, of: &mut [RowMajor<'_>]) {
    let m = x.len();
    if m == 0 {
        assert!(of.iter().all(|of| of.out.is_empty()), "out is [rows, n]");
        return;
    }
    let k = x.row(0).len();
    assert!(k > 0 && (0..m).all(|i| x.row(i).len() == k), "rows are [k]");
    let packed = Packed::columns(cpu, x);
    let plan = LeafPlan::of(k);
    for RowMajor { weight, bias, out } in of {
        let n = out.len() / m;
        assert!(out.len() == m * n && weight.len() == n * k, "w is [n, k] and out [rows, n]");
        assert!(bias.is_none_or(|bias| bias.len() == n), "bias is [n]");
        if n == 0 {
            continue;
        }
        Job {
            factor: Factor::PerOutput(Rows::dense(weight, k)),
            panels: Panels::Packed { panels: &packed, first: 0 },
            first_output: 0,
            outputs: n,
            first_column: 0,
            columns: m,
            plan: &plan,
            sink: Sink::Turned { out: RowsMut::dense(out, n), stride: n, bias: *bias },
        }
        .run(cpu);
    }
}

impl Job<'_> {
    /// Computes it.
    pub(super) fn run(&self, cpu: &Cpu) {
        let width = panel_width(cpu.simd());
        let columns = self.columns - self.first_column;
        let panels = columns.div_ceil(width);
        let across = columns.div_ceil(BLOCK_COLUMNS);
        let block_columns = panels.div_ceil(across) * width;
        // Enough tasks for all threads, as long as packing is worth it.
        let wished = (4 * cpu.pool().threads()).div_ceil(across);
        let down = wished.min(self.outputs / BLOCK_ROWS_MIN).max(self.outputs.div_ceil(BLOCK_ROWS));
        let block_rows = self.outputs.div_ceil(down.max(1)).next_multiple_of(TILE_ROWS);
        let down = self.outputs.div_ceil(block_rows);
        let task = |task: usize| {
            // Tasks of the same columns follow each other.
            let row = task % down * block_rows;
            let column = self.first_column + task / down * block_columns;
            cpu.simd().run(Block {
                job: self,
                outputs: self.first_output + row
                    ..self.first_output + (row + block_rows).min(self.outputs),
                columns: column..(column + block_columns).min(self.columns),
            });
        };
        if self.outputs * columns * self.plan.terms() < INLINE_FMAS {
            (0..down * across).for_each(task);
        } else {
            cpu.pool().run(down * across, &task);
        }
    }
}

/// One task.
struct Block<'a> {
    job: &'a Job<'a>,
    outputs: Range<usize>,
    columns: Range<usize>,
}

/// Leaves of a chunk, and where their terms begin.
struct Chunk<'a> {
    leaves: &'a [Leaf],
    first: usize,
    terms: usize,
    /// It is the last.
    last: bool,
}

/// The chunks of a plan.
fn chunks(leaves: &[Leaf]) -> impl Iterator<Item = Chunk<'_>> {
    let (mut at, mut first) = (0, 0);
    std::iter::from_fn(move || {
        let from = at;
        let mut terms = 0;
        while at < leaves.len() {
            let more = leaves[at].terms as usize;
            if at > from && terms + more > CHUNK {
                break;
            }
            terms += more;
            at += 1;
        }
        let chunk = Chunk { leaves: &leaves[from..at], first, terms, last: at == leaves.len() };
        first += terms;
        (at > from).then_some(chunk)
    })
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Job { factor, panels, plan, .. } = *self.job;
        let width = panel_vectors(V::LANES) * V::LANES;
        let (rows, columns) = (self.outputs.len(), self.columns.len());
        let tiles = rows.div_ceil(TILE_ROWS);
        let padded = columns.next_multiple_of(V::LANES);
        let count = columns.div_ceil(width);
        let (mut longest, mut several) = (0, false);
        for chunk in chunks(plan.leaves()) {
            longest = longest.max(chunk.terms);
            several |= !chunk.last;
        }
        let packs = matches!(panels, Panels::Rows(_));
        let per_term = !matches!(factor, Factor::PerOutput(_));
        let mut b = scratch::take(if packs { longest * padded } else { 0 });
        let mut a = scratch::take(if per_term { longest * tiles * TILE_ROWS } else { 0 });
        let level = TILE_ROWS * width;
        let of_tile = plan.depth() * level;
        let mut stack = scratch::take(if several { tiles * count * of_tile } else { of_tile });
        let turned = matches!(self.job.sink, Sink::Turned { .. });
        let mut block = scratch::take(if turned { tiles * TILE_ROWS * padded } else { 0 });
        let mut height = 0;
        for chunk in chunks(plan.leaves()) {
            if let Panels::Rows(rows) = panels {
                let columns = self.columns.clone();
                let pack = PackRows {
                    rows,
                    terms: chunk.first..chunk.first + chunk.terms,
                    columns,
                    out: &mut b,
                };
                // SAFETY: promised by the caller.
                unsafe { pack.run::<V>() }
            }
            if per_term {
                pack_factors(factor, &chunk, &self.outputs, &mut a);
            }
            for p in 0..count {
                let column = p * width;
                let filled = (columns - column).min(width).next_multiple_of(V::LANES);
                // Who packed may have had more columns.
                let stride = match panels {
                    Panels::Rows(_) => filled,
                    Panels::Packed { panels, .. } => {
                        width.min(panels.columns - self.columns.start - column)
                    }
                };
                for t in 0..tiles {
                    let at = Tile {
                        output: t * TILE_ROWS,
                        column,
                        padded,
                        stride,
                        height,
                        level,
                        stack: &mut stack[if several { (p * tiles + t) * of_tile } else { 0 }..],
                        block: &mut block,
                    };
                    // SAFETY: promised by the caller; panels are of 1 to 4 vectors.
                    unsafe {
                        let b = match panels {
                            Panels::Rows(_) => b.as_ptr().add(column * chunk.terms),
                            Panels::Packed { panels, first } => {
                                let at = (self.columns.start + column) * panels.terms;
                                let at = at + (first + chunk.first) * stride;
                                let len = chunk.terms * stride;
                                panels.values[at..at + len].as_ptr()
                            }
                        };
                        let a = a.as_ptr().wrapping_add(t * chunk.terms * TILE_ROWS);
                        match filled / V::LANES {
                            1 => self.tile::<V, 1>(&chunk, a, b, at),
                            2 => self.tile::<V, 2>(&chunk, a, b, at),
                            3 => self.tile::<V, 3>(&chunk, a, b, at),
                            _ => self.tile::<V, 4>(&chunk, a, b, at),
                        }
                    }
                }
            }
            for leaf in chunk.leaves {
                height = height + 1 - leaf.merges as usize;
            }
        }
        if let Sink::Turned { out, stride, bias } = self.job.sink {
            // SAFETY: promised by the caller.
            unsafe { self.turn::<V>(&block, padded, out, stride, bias) }
        }
    }
}

/// A tile's place in its block, and its memory.
struct Tile<'a> {
    output: usize,
    column: usize,
    /// Columns of a row of the block.
    padded: usize,
    /// Columns of the panel.
    stride: usize,
    /// Subtrees that wait before the chunk.
    height: usize,
    /// Values of a level of the stack.
    level: usize,
    stack: &'a mut [f32],
    block: &'a mut [f32],
}

impl Block<'_> {
    /// The leaves of a chunk for the outputs of a tile and N vectors of columns. A tile of fewer outputs computes
    /// others in place of those that it lacks, which go nowhere.
    ///
    /// # Safety
    /// The machine has V's instructions; a and b are packed for the chunk.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize>(
        &self,
        chunk: &Chunk<'_>,
        a: *const f32,
        b: *const f32,
        at: Tile<'_>,
    ) {
        // SAFETY: promised by the caller; rows of factors have all terms.
        unsafe {
            match self.job.factor {
                Factor::PerOutput(f) => {
                    let from = self.outputs.start + at.output;
                    let last = self.outputs.end - 1;
                    let rows: [*const f32; TILE_ROWS] = std::array::from_fn(|r| {
                        f.row((from + r).min(last))[chunk.first..].as_ptr()
                    });
                    self.leaves::<V, N>(chunk, b, at, |s, r| *rows[r].add(s));
                }
                _ => self.leaves::<V, N>(chunk, b, at, |s, r| *a.add(s * TILE_ROWS + r)),
            }
        }
    }

    /// # Safety
    /// As of [`Block::tile`].
    #[inline(always)]
    unsafe fn leaves<V: Vector, const N: usize>(
        &self,
        chunk: &Chunk<'_>,
        b: *const f32,
        at: Tile<'_>,
        factor: impl Fn(usize, usize) -> f32,
    ) {
        let Tile { output, column, padded, stride, mut height, level, stack, block } = at;
        assert!(stack.len() >= self.job.plan.depth() * level, "the stack holds every level");
        let mut s = 0;
        // SAFETY: promised by the caller; the stack has room for the plan's depth.
        unsafe {
            for leaf in chunk.leaves {
                let terms = leaf.terms as usize;
                let acc = run_leaf::<V, N>(b.add(s * stride), stride, s, terms, &factor);
                s += terms;
                height = push_leaf(acc, leaf.merges as usize, height, level, stack);
            }
        }
        if !chunk.last {
            return;
        }
        let wide = (N * V::LANES).min(self.columns.len() - column);
        let rows = TILE_ROWS.min(self.outputs.len() - output);
        for (r, from) in stack.chunks_exact(N * V::LANES).enumerate().take(rows) {
            let to = match self.job.sink {
                Sink::Rows(out) => {
                    let (row, first) =
                        (self.outputs.start + output + r, self.columns.start + column);
                    // SAFETY: tasks have their own rows and columns.
                    unsafe { out.part(row, first, wide) }
                }
                Sink::Turned { .. } => &mut block[(output + r) * padded + column..][..N * V::LANES],
            };
            // SAFETY: promised by the caller.
            unsafe { copy::<V>(from, to) }
        }
    }

    /// Writes a finished block to rows of columns.
    ///
    /// # Safety
    /// The machine has V's instructions; nobody else writes these parts.
    #[inline(always)]
    unsafe fn turn<V: Vector>(
        &self,
        block: &[f32],
        padded: usize,
        out: RowsMut<'_>,
        stride: usize,
        bias: Option<&[f32]>,
    ) {
        let (rows, columns) = (self.outputs.len(), self.columns.len());
        for column in (0..columns).step_by(V::LANES) {
            let wide = V::LANES.min(columns - column);
            for row in (0..rows).step_by(V::LANES) {
                let high = V::LANES.min(rows - row);
                let (to, at) = (self.columns.start + column, self.outputs.start + row);
                if wide == V::LANES && high == V::LANES {
                    // SAFETY: rows and columns of the block and, as `address` has seen, of the output exist.
                    unsafe {
                        let from: [*const f32; LANES_MAX] = std::array::from_fn(|i| {
                            block[(row + i.min(high - 1)) * padded + column..].as_ptr()
                        });
                        let _exists = out.address(to + wide - 1, at, high);
                        V::transpose(&from, out.address(to, at, high), stride);
                    }
                } else {
                    for c in 0..wide {
                        // SAFETY: nobody else writes it.
                        let out = unsafe { out.part(to + c, at, high) };
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = block[(row + i) * padded + column + c];
                        }
                    }
                }
            }
        }
        if let Some(bias) = bias {
            let bias = &bias[self.outputs.clone()];
            for column in self.columns.clone() {
                // SAFETY: nobody else writes it.
                let out = unsafe { out.part(column, self.outputs.start, rows) };
                for (out, &bias) in out.iter_mut().zip(bias) {
                    *out += bias;
                }
            }
        }
    }
}

/// The sums of one leaf.
///
/// # Safety
/// The machine has V's instructions; N vectors are readable at each of the terms' rows of `b`.
#[inline(always)]
unsafe fn run_leaf<V: Vector, const N: usize>(
    b: *const f32,
    stride: usize,
    from: usize,
    terms: usize,
    factor: &impl Fn(usize, usize) -> f32,
) -> [[V; N]; TILE_ROWS] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut acc = [[V::zero(); N]; TILE_ROWS];
        for s in 0..terms {
            let row = b.add(s * stride);
            let mut x = [V::zero(); N];
            for n in 0..N {
                x[n] = V::load(row.add(n * V::LANES));
            }
            for r in 0..TILE_ROWS {
                let f = V::splat(factor(from + s, r));
                for n in 0..N {
                    acc[r][n] = acc[r][n].fma(f, x[n]);
                }
            }
        }
        acc
    }
}

/// Packs a chunk's factors for some outputs in tiles; what fills a tile up is zero.
#[inline(always)]
fn pack_factors(factor: Factor<'_>, chunk: &Chunk<'_>, outputs: &Range<usize>, out: &mut [f32]) {
    /// Terms whose factors are near while all tiles take them.
    const TERMS: usize = 16;
    let Factor::PerTerm(f) = factor else {
        unreachable!("the plain sum has one output, and is not computed by panels");
    };
    for from in (0..chunk.terms).step_by(TERMS) {
        let to = (from + TERMS).min(chunk.terms);
        for s in from..to {
            let row = &f.row(chunk.first + s)[outputs.clone()];
            let (whole, rest) = row.as_chunks::<TILE_ROWS>();
            for (t, values) in whole.iter().enumerate() {
                out[(t * chunk.terms + s) * TILE_ROWS..][..TILE_ROWS].copy_from_slice(values);
            }
            if !rest.is_empty() {
                let at = (whole.len() * chunk.terms + s) * TILE_ROWS;
                let (values, fill) = out[at..at + TILE_ROWS].split_at_mut(rest.len());
                values.copy_from_slice(rest);
                fill.fill(0.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        matrix::{PackedMatrix, Source},
        ops::matmul::matmul,
        simd::Simd,
    };

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 12.9898).sin() * 3.5).collect()
    }

    #[test]
    fn row_major_weights_give_the_bits_of_packed_ones() {
        for (m, n, k) in
            [(1, 1, 1), (3, 70, 17), (67, 50, 300), (130, 203, 520), (16, 16, 16), (300, 50, 600)]
        {
            let (x, w, bias) = (values(m * k, 0.5), values(n * k, 7.0), values(n, 3.0));
            let packed = PackedMatrix::pack(DType::F32, n, k, Source::F32(&w));
            let list: Vec<&[f32]> = x.chunks(k).collect();
            for simd in Simd::available() {
                for threads in [1, 3] {
                    let cpu = Cpu::new(threads, simd);
                    for rows in [Rows::dense(&x, k), Rows::List(&list)] {
                        for bias in [None, Some(&bias[..])] {
                            let mut expected = vec![f32::NAN; m * n];
                            matmul(&cpu, rows, &packed, bias, &mut expected);
                            let mut out = vec![f32::NAN; m * n];
                            products(
                                &cpu,
                                rows,
                                &mut [RowMajor { weight: &w, bias, out: &mut out }],
                            );
                            let same =
                                out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{m} {n} {k} {simd}");
                        }
                    }
                }
            }
        }
    }
}
