//! `out = x · wᵀ (+ bias)`.
//!
//! Shapes: x `[m, k]`, w `[n, k]` packed in panels, bias `[n]`, out `[m, n]`.
//! The work is cut in tasks of some panels × some tiles of rows; who computes which is free,
//! because an output's sum is ordered by rule 1 alone (see `tile.rs`).

use crate::{
    cpu::Cpu,
    matrix::{PANEL, PackedMatrix},
    ops::tile::{Product, Sink, Tiles, stack_len},
    rows::{Rows, RowsMut, Tiling, pack_tile},
    scratch,
};

/// Fewer fused multiply-adds than this are not worth a second thread.
pub(crate) const INLINE_FMAS: usize = 1 << 15;
/// Rows that share one reading of a panel.
const BLOCK_ROWS: usize = 144;
/// Panels that one row is multiplied with at a time.
const PANELS_FEW_ROWS: usize = 4;

/// `out = x · wᵀ (+ bias)`, with `out` dense `[x.len(), w.n()]`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn matmul(cpu: &Cpu, x: Rows<'_>, w: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let m = x.len();
    assert_eq!(out.len(), m * w.n(), "out is [rows, n]");
    assert!(bias.is_none_or(|b| b.len() == w.n()), "bias is [n]");
    assert!((0..m).all(|i| x.row(i).len() == w.k()), "rows are [k]");
    if out.is_empty() {
        return;
    }
    let out = RowsMut::dense(out, w.n());
    let plan = Plan::new(cpu, m, w.n(), w.k());
    let mut packed = scratch::take(if m > 1 { m * w.k() } else { 0 });
    pack(cpu, x, plan.tiling, &mut packed);
    let values = if m > 1 { &packed[..] } else { x.row(0) };
    let tiles = Tiles { values, tiling: plan.tiling, k: w.k() };
    plan.run(cpu, &|task| {
        let (tile_range, panels) = plan.task(task);
        let rows = plan.tiling.first(tile_range.end) - plan.tiling.first(tile_range.start);
        let mut stack = scratch::take(stack_len(rows, w.k()));
        let sink = Sink::Rows { out, bias };
        cpu.simd().run(Product { x: tiles, tiles: tile_range, w, panels, stack: &mut stack, sink });
    });
}

/// Interleaves rows for a product; `packed` is empty where a single row is read in place.
fn pack(cpu: &Cpu, x: Rows<'_>, tiling: Tiling, packed: &mut [f32]) {
    if packed.is_empty() {
        return;
    }
    let k = packed.len() / x.len();
    let inline = packed.len() < INLINE_FMAS;
    let packed = RowsMut::dense(packed, x.len() * k);
    let one = |t: usize| {
        let (from, to) = (tiling.first(t), tiling.first(t + 1));
        // SAFETY: tiles do not overlap.
        let out = unsafe { packed.part(0, from * k, (to - from) * k) };
        pack_tile(x, tiling, t, out);
    };
    if inline {
        (0..tiling.count()).for_each(one);
    } else {
        cpu.pool().run(tiling.count(), &one);
    }
}

/// How one product is cut into tasks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) tiling: Tiling,
    tiles_per_task: usize,
    panels: usize,
    panels_per_task: usize,
    inline: bool,
}

impl Plan {
    pub(crate) fn new(cpu: &Cpu, m: usize, n: usize, k: usize) -> Self {
        let tile_rows = cpu.simd().tile_rows();
        let tiling = Tiling::new(m, tile_rows);
        let panels = n.div_ceil(PANEL);
        let panels_per_task = if tiling.count() > 1 {
            1
        } else {
            (panels / (4 * cpu.pool().threads())).clamp(1, PANELS_FEW_ROWS)
        };
        Self {
            tiling,
            tiles_per_task: (BLOCK_ROWS / tile_rows).min(tiling.count().max(1)),
            panels,
            panels_per_task,
            inline: m * n * k < INLINE_FMAS,
        }
    }

    pub(crate) fn tasks(&self) -> usize {
        self.blocks() * self.panels.div_ceil(self.panels_per_task)
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

    fn run(&self, cpu: &Cpu, task: &(dyn Fn(usize) + Sync)) {
        if self.inline {
            (0..self.tasks()).for_each(task);
        } else {
            cpu.pool().run(self.tasks(), task);
        }
    }
}
