//! `out = x · wᵀ (+ bias)`, for several w at once.
//!
//! Shapes: x `[m, k]`, each w `[n, k]` packed in panels, its bias `[n]`, its out `[m, n]`.
//! The rows are prepared once, as the format of the weights wants them (interleaved, or quantised
//! in blocks); then the work is cut in tasks of some panels × some tiles of rows. Who computes
//! which is free, because an output's sum is ordered by rules 1 and 2 alone (see `tile.rs` and
//! `blocked.rs`).

use crate::{
    blocks::{quantise_row, record_words},
    cpu::Cpu,
    matrix::{PANEL, PackedMatrix},
    ops::{
        blocked::{BlockedProduct, Next, Records},
        tile::{Product, Sink, Tiles, stack_len},
    },
    rows::{Rows, RowsMut, Tiling, pack_tile},
    scratch,
};

/// Fewer fused multiply-adds than this are not worth a second thread.
pub(crate) const INLINE_FMAS: usize = 1 << 15;
/// Rows that share one reading of a panel.
const BLOCK_ROWS: usize = 144;
/// Panels of a task of few rows.
const PANELS_FEW_ROWS: usize = 4;
/// The same of blocks of integers: panels are short then, and each of several streams is to go
/// through several.
const PANELS_FEW_ROWS_BLOCKS: usize = 16;

/// One of the products of [`matmul_many`].
pub struct Linear<'a> {
    /// Weights `[n, k]`.
    pub weight: &'a PackedMatrix,
    /// Added to every row, `[n]`.
    pub bias: Option<&'a [f32]>,
    /// Dense `[m, n]`.
    pub out: &'a mut [f32],
}

/// `out = x · wᵀ (+ bias)`, with `out` dense `[x.len(), w.n()]`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn matmul(cpu: &Cpu, x: Rows<'_>, w: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    matmul_many(cpu, x, &mut [Linear { weight: w, bias, out }]);
}

/// The same for several matrices over the same rows, as one piece of work.
///
/// # Panics
/// If the shapes do not fit each other, or some matrices are quantised and others are not.
pub fn matmul_many(cpu: &Cpu, x: Rows<'_>, linears: &mut [Linear<'_>]) {
    let m = x.len();
    let Some(first) = linears.first() else { return };
    let (k, quantised) = (first.weight.k(), first.weight.dtype().is_quantised());
    assert!((0..m).all(|i| x.row(i).len() == k), "rows are [k]");
    let mut outs = [None; MANY];
    assert!(linears.len() <= MANY, "at most {MANY} products at once");
    let (mut tasks, mut fmas, count) = (0, 0, linears.len());
    for (slot, linear) in outs.iter_mut().zip(linears.iter_mut()) {
        let Linear { weight: w, bias, out } = linear;
        assert_eq!(out.len(), m * w.n(), "out is [rows, n]");
        assert!(bias.is_none_or(|b| b.len() == w.n()), "bias is [n]");
        assert_eq!((w.k(), w.dtype().is_quantised()), (k, quantised), "one kind of rows for all");
        if out.is_empty() {
            continue;
        }
        let plan = Plan::new(cpu, m, w, count);
        *slot = Some((tasks, plan, *w, *bias, RowsMut::dense(out, w.n())));
        tasks += plan.tasks();
        fmas += m * w.n() * k;
    }
    if tasks == 0 {
        return;
    }
    let tiling = tiling(cpu, m, quantised);
    let mut packed = scratch::take(input_words(m, k, quantised));
    prepare(cpu, x, tiling, quantised, &mut packed);
    let x = input(x, &packed, tiling, quantised, k);
    let threads = cpu.pool().threads();
    let task = |task: usize| {
        let holds = |slot: &Option<(usize, _, _, _, _)>, task| slot.is_some_and(|s| s.0 <= task);
        let found = outs.iter().rfind(|slot| holds(slot, task)).copied().flatten();
        let (first, plan, w, bias, out) = found.expect("every task belongs to a product");
        let (tiles, panels) = plan.task(task - first);
        let rows = tiling.first(tiles.end) - tiling.first(tiles.start);
        let mut stack = scratch::take(stack_len(rows, k));
        let next = outs.iter().rfind(|slot| holds(slot, task + threads)).copied().flatten();
        let next = next.and_then(|(first, plan, w, ..)| plan.next(w, task + threads - first));
        product(cpu, x, (tiling, tiles), (w, panels), &mut stack, Sink::Rows { out, bias }, next);
    };
    if fmas < INLINE_FMAS {
        (0..tasks).for_each(task);
    } else {
        cpu.pool().run(tasks, &task);
    }
}

/// Most products of one [`matmul_many`].
const MANY: usize = 4;

/// Prepared rows.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    Tiles(Tiles<'a>),
    Records(Records<'a>),
}

/// Words that the prepared form of m rows takes: none where a single row is read in place.
pub(crate) fn input_words(m: usize, k: usize, quantised: bool) -> usize {
    match quantised {
        true => m * record_words(k),
        false if m > 1 => m * k,
        false => 0,
    }
}

/// How rows are cut for weights of a kind.
pub(crate) fn tiling(cpu: &Cpu, m: usize, quantised: bool) -> Tiling {
    let rows = if quantised { cpu.simd().block_tile_rows() } else { cpu.simd().tile_rows() };
    Tiling::new(m, rows)
}

/// Prepares rows into `packed`, which is of [`input_words`].
fn prepare(cpu: &Cpu, x: Rows<'_>, tiling: Tiling, quantised: bool, packed: &mut [f32]) {
    if packed.is_empty() {
        return;
    }
    let words = packed.len() / x.len();
    let inline = packed.len() < INLINE_FMAS;
    let packed = RowsMut::dense(packed, x.len() * words);
    let tile = |t: usize| {
        let (from, to) = (tiling.first(t), tiling.first(t + 1));
        // SAFETY: tiles do not overlap.
        let out = unsafe { packed.part(0, from * words, (to - from) * words) };
        if quantised {
            for (row, out) in (from..to).zip(out.chunks_exact_mut(words)) {
                quantise_row(cpu.simd(), x.row(row), out);
            }
        } else {
            pack_tile(x, tiling, t, out);
        }
    };
    if inline {
        (0..tiling.count()).for_each(tile);
    } else {
        cpu.pool().run(tiling.count(), &tile);
    }
}

/// Rows as products read them, once they are prepared.
pub(crate) fn input<'a>(
    x: Rows<'a>,
    packed: &'a [f32],
    tiling: Tiling,
    quantised: bool,
    k: usize,
) -> Input<'a> {
    if quantised {
        Input::Records(Records { words: packed, starts: None, row_words: record_words(k) })
    } else {
        let values = if x.len() > 1 { packed } else { x.row(0) };
        Input::Tiles(Tiles { values, tiling, k })
    }
}

/// Some tiles of rows times some panels of a matrix.
#[inline]
pub(crate) fn product(
    cpu: &Cpu,
    x: Input<'_>,
    (tiling, tiles): (Tiling, std::ops::Range<usize>),
    (w, panels): (&PackedMatrix, std::ops::Range<usize>),
    stack: &mut [f32],
    sink: Sink<'_>,
    next: Option<Next<'_>>,
) {
    match x {
        Input::Tiles(x) => cpu.simd().run(Product { x, tiles, w, panels, stack, sink }),
        Input::Records(x) => {
            cpu.simd().run_blocks(BlockedProduct {
                x,
                tiling,
                tiles,
                w,
                panels,
                stack,
                sink,
                next,
            });
        }
    }
}

/// How one product is cut into tasks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) tiling: Tiling,
    tiles_per_task: usize,
    panels: usize,
    panels_per_task: usize,
}

impl Plan {
    /// How `m` rows times `w` are cut, which is one of `together` such products at a time.
    pub(crate) fn new(cpu: &Cpu, m: usize, w: &PackedMatrix, together: usize) -> Self {
        let tiling = tiling(cpu, m, w.dtype().is_quantised());
        let panels = w.n().div_ceil(PANEL);
        let panels_per_task = if tiling.count() > 1 {
            1
        } else {
            let most = match w.dtype().is_quantised() {
                true => PANELS_FEW_ROWS_BLOCKS,
                false => PANELS_FEW_ROWS,
            };
            let threads = cpu.pool().threads();
            let wished = (panels * together / (4 * threads)).clamp(1, most);
            // As many tasks for each thread, so that none waits for the last.
            let mut tasks = panels.div_ceil(wished).max(1);
            while !(tasks * together).is_multiple_of(threads) {
                tasks += 1;
            }
            panels.div_ceil(tasks).max(1)
        };
        let tile_rows = m.div_ceil(tiling.count().max(1)).max(1);
        Self {
            tiling,
            tiles_per_task: (BLOCK_ROWS / tile_rows).min(tiling.count().max(1)),
            panels,
            panels_per_task,
        }
    }

    pub(crate) fn tasks(&self) -> usize {
        self.blocks() * self.panels.div_ceil(self.panels_per_task)
    }

    /// What a task reads first, if there is such a task.
    pub(crate) fn next<'a>(&self, w: &'a PackedMatrix, task: usize) -> Option<Next<'a>> {
        (task < self.tasks()).then(|| Next::new(w, self.task(task).1))
    }

    fn blocks(&self) -> usize {
        self.tiling.count().div_ceil(self.tiles_per_task)
    }

    /// Tiles and panels of a task. Tasks of the same panels follow each other.
    pub(crate) fn task(&self, task: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let (strip, block) = (task / self.blocks(), task % self.blocks());
        let tile = block * self.tiles_per_task;
        let panel = strip * self.panels_per_task;
        (
            tile..(tile + self.tiles_per_task).min(self.tiling.count()),
            panel..(panel + self.panels_per_task).min(self.panels),
        )
    }
}
