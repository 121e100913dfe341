//! The inner loops of every product, and rule 1 of the determinism contract.
//!
//! Rule 1: K is cut in leaves of [`LEAF`]; inside a leaf one accumulator per output, starting at
//! +0.0, runs k upwards with fused multiply-add; leaf sums are added in the tree of [`super::tree`].
//!
//! A *tile* is R rows × N vectors of outputs held in registers for one leaf. Its rows are
//! interleaved, `[k][R]`; a single row is its own interleaving and is read in place.
//! A *strip* is the N · LANES outputs that a tile covers: a part of a panel, or several panels.
//!
//! Subtrees that wait for their later half lie in `stack`: `[level][row of the block][strip]`.

// Registers are arrays that are indexed alike; iterators would hide which lane meets which.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::{
    RELAXED_ORDER,
    dtype::DType,
    matrix::{PANEL, PackedMatrix},
    ops::tree::{self, LEAF},
    rows::{RowsMut, Tiling},
    simd::{Kernel, Vector, prefetch},
};

/// Most outputs of a strip.
pub(crate) const STRIP_MAX: usize = 4 * PANEL;

/// Where finished outputs go.
pub(crate) enum Sink<'a> {
    /// Into rows, with a bias added where there is one.
    Rows { out: RowsMut<'a>, bias: Option<&'a [f32]> },
    /// Into a block whose first value is that of (`first_row`, `first_col`).
    Block { out: RowsMut<'a>, first_row: usize, first_col: usize },
}

impl Sink<'_> {
    /// Outputs `col..col + values.len()` of a row.
    ///
    /// # Safety
    /// Nobody else writes this part at the same time.
    #[inline(always)]
    unsafe fn put(&self, row: usize, col: usize, values: &[f32]) {
        match self {
            Sink::Rows { out, bias } => {
                // SAFETY: promised by the caller.
                let out = unsafe { out.part(row, col, values.len()) };
                match bias {
                    Some(bias) => {
                        let bias = &bias[col..col + values.len()];
                        for ((out, &v), &b) in out.iter_mut().zip(values).zip(bias) {
                            *out = v + b;
                        }
                    }
                    None => out.copy_from_slice(values),
                }
            }
            Sink::Block { out, first_row, first_col } => {
                // SAFETY: promised by the caller.
                let out = unsafe { out.part(row - first_row, col - first_col, values.len()) };
                out.copy_from_slice(values);
            }
        }
    }
}

/// Rows `[rows, k]`, tile by tile interleaved.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) tiling: Tiling,
    pub(crate) k: usize,
}

/// Some tiles of rows times some panels of a matrix.
pub(crate) struct Product<'a> {
    pub(crate) x: Tiles<'a>,
    pub(crate) tiles: Range<usize>,
    pub(crate) w: &'a PackedMatrix,
    pub(crate) panels: Range<usize>,
    /// Of at least [`stack_len`] values.
    pub(crate) stack: &'a mut [f32],
    pub(crate) sink: Sink<'a>,
}

/// Values of stack that `rows` rows and inputs of `k` values need.
pub(crate) fn stack_len(rows: usize, k: usize) -> usize {
    levels(k) * rows * if rows < 7 { STRIP_MAX } else { PANEL }
}

/// Subtrees that wait at the same time, at most.
pub(crate) fn levels(k: usize) -> usize {
    (usize::BITS - k.div_ceil(LEAF).leading_zeros()) as usize
}

/// Reads weights of one format. Two k's make a pair, which lies in one piece.
trait Weights {
    /// Bytes from one pair to the next.
    const PAIR_BYTES: usize;

    /// Bytes of a panel.
    fn panel_bytes(k: usize) -> usize;

    /// The weights of one k of the pair at `at`.
    ///
    /// # Safety
    /// A vector of the pair is readable.
    unsafe fn load<V: Vector>(at: *const u8, odd: bool) -> V;
}

struct F32;
struct Bf16;

impl Weights for F32 {
    const PAIR_BYTES: usize = 2 * PANEL * 4;

    fn panel_bytes(k: usize) -> usize {
        k * PANEL * 4
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const u8, odd: bool) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load(at.add(if odd { PANEL * 4 } else { 0 }).cast()) }
    }
}

impl Weights for Bf16 {
    const PAIR_BYTES: usize = PANEL * 4;

    fn panel_bytes(k: usize) -> usize {
        k.div_ceil(2) * PANEL * 4
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const u8, odd: bool) -> V {
        // SAFETY: promised by the caller.
        unsafe { if odd { V::load_bf16_high(at.cast()) } else { V::load_bf16_low(at.cast()) } }
    }
}

/// One k of a tile.
///
/// # Safety
/// R values of x are readable, and N vectors at `offsets` from `at`.
#[inline(always)]
unsafe fn step<V: Vector, W: Weights, const R: usize, const N: usize>(
    acc: &mut [[V; N]; R],
    x: *const f32,
    at: *const u8,
    offsets: &[usize; N],
    odd: bool,
) {
    // SAFETY: promised by the caller.
    unsafe {
        // Keep the fewer in registers, and stream the others past them.
        if R < N {
            let mut xs = [V::zero(); R];
            for r in 0..R {
                xs[r] = V::splat(*x.add(r));
            }
            for v in 0..N {
                let w = W::load::<V>(at.add(offsets[v]), odd);
                for r in 0..R {
                    acc[r][v] = acc[r][v].fma(xs[r], w);
                }
            }
        } else {
            let mut ws = [V::zero(); N];
            for v in 0..N {
                ws[v] = W::load::<V>(at.add(offsets[v]), odd);
            }
            for r in 0..R {
                let x = V::splat(*x.add(r));
                for v in 0..N {
                    acc[r][v] = acc[r][v].fma(x, ws[v]);
                }
            }
        }
    }
}

/// Prefetches, pair by pair, weights that are to be read later.
#[derive(Clone, Copy)]
struct Prefetch {
    at: *const u8,
    /// Cache lines per pair.
    lines: usize,
}

impl Prefetch {
    /// What item i of `items` that read the same leaf prefetches: its share of what follows the
    /// leaf in memory, which is the next leaf or the next panel. Memory is then busy all the
    /// time, not only while the first item reads.
    #[inline(always)]
    fn share<W: Weights>(leaf_end: *const u8, item: usize, items: usize) -> Self {
        let lines = W::PAIR_BYTES / 64;
        let sharers = items.min(lines);
        let sharers = if sharers == 3 { 2 } else { sharers };
        if item >= sharers {
            return Self { at: leaf_end, lines: 0 };
        }
        let lines = lines / sharers;
        Self { at: leaf_end.wrapping_add(item * lines * 64), lines }
    }

    #[inline(always)]
    fn pair<W: Weights>(&mut self) {
        if self.lines > 0 {
            prefetch(self.at);
            if self.lines > 1 {
                prefetch(self.at.wrapping_add(64));
                if self.lines > 2 {
                    prefetch(self.at.wrapping_add(128));
                    prefetch(self.at.wrapping_add(192));
                }
            }
            self.at = self.at.wrapping_add(W::PAIR_BYTES);
        }
    }
}

/// The sums of one leaf.
///
/// # Safety
/// `x` holds `[k][R]`; `w` points to the leaf's first k and its vectors are readable.
#[inline(always)]
unsafe fn leaf<V: Vector, W: Weights, const R: usize, const N: usize>(
    mut x: *const f32,
    mut w: *const u8,
    offsets: &[usize; N],
    mut ahead: Prefetch,
    k: usize,
) -> [[V; N]; R] {
    // SAFETY: promised by the caller; pointers move inside the leaf.
    unsafe {
        let mut acc = [[V::zero(); N]; R];
        for _ in 0..k / 2 {
            ahead.pair::<W>();
            step::<V, W, R, N>(&mut acc, x, w, offsets, false);
            step::<V, W, R, N>(&mut acc, x.add(R), w, offsets, true);
            x = x.add(2 * R);
            w = w.add(W::PAIR_BYTES);
        }
        if !k.is_multiple_of(2) {
            step::<V, W, R, N>(&mut acc, x, w, offsets, false);
        }
        acc
    }
}

/// Which leaf of how many; or which pair of leaves that have been added, which are the leaves of
/// the tree above them.
#[derive(Clone, Copy)]
pub(crate) struct LeafAt {
    pub(crate) index: usize,
    pub(crate) count: usize,
}

/// Adds one leaf of one tile to the tree; outputs go to the sink after the last leaf.
///
/// # Safety
/// `stack` points to the tile's place in level 0; levels are `level_len` apart.
#[inline(always)]
pub(crate) unsafe fn finish<V: Vector, const R: usize, const N: usize>(
    mut acc: [[V; N]; R],
    at: LeafAt,
    stack: *mut f32,
    level_len: usize,
    sink: &Sink<'_>,
    (row, col, n): (usize, usize, usize),
) {
    // SAFETY: promised by the caller.
    unsafe {
        let last = at.index + 1 == at.count;
        // Subtrees that wait on the stack before this leaf, and how many it is added to.
        let (mut waiting, merges) = if RELAXED_ORDER {
            (at.index.min(1), at.index.min(1))
        } else {
            (tree::waiting(at.index), tree::merges(at.index, at.count))
        };
        for _ in 0..merges {
            waiting -= 1;
            let level = stack.add(waiting * level_len);
            for r in 0..R {
                for v in 0..N {
                    let earlier = V::load(level.add((r * N + v) * V::LANES));
                    acc[r][v] = earlier.add(acc[r][v]);
                }
            }
        }
        if !last {
            let level = stack.add(waiting * level_len);
            for r in 0..R {
                for v in 0..N {
                    acc[r][v].store(level.add((r * N + v) * V::LANES));
                }
            }
            return;
        }
        let mut values = [0.0f32; STRIP_MAX];
        for r in 0..R {
            for v in 0..N {
                acc[r][v].store(values.as_mut_ptr().add(v * V::LANES));
            }
            sink.put(row + r, col, &values[..(N * V::LANES).min(n - col)]);
        }
    }
}

/// Vectors of the widest strip that R rows leave registers for.
#[inline(always)]
fn widest<V: Vector>(rows: usize) -> usize {
    match (V::LANES, rows) {
        (_, 1) | (4 | 16, 2..=3) => 8,
        (8, 2) | (4, _) => 4,
        _ => 2,
    }
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: promised by the caller.
        unsafe {
            match self.w.dtype() {
                DType::F32 => self.run_format::<V, F32>(),
                DType::Bf16 => self.run_format::<V, Bf16>(),
                other => unreachable!("{other} is stored in blocks: see blocked.rs"),
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn run_format<V: Vector, W: Weights>(mut self) {
        let tiling = self.x.tiling;
        let first = tiling.first(self.tiles.start);
        let rows = tiling.first(self.tiles.end) - first;
        if rows == 0 {
            return;
        }
        // Tiles differ by at most one row, and the first is the longest.
        let longest = tiling.first(self.tiles.start + 1) - first;
        let widest = widest::<V>(longest);
        let end = self.panels.end.min(self.w.n().div_ceil(PANEL)) * PANEL;
        let mut col = self.panels.start * PANEL;
        while col < end {
            let mut n = widest;
            while n * V::LANES > end - col {
                n /= 2;
            }
            let parts = PANEL.div_ceil(n * V::LANES);
            // SAFETY: promised by the caller; n is what `widest` allows for these rows.
            unsafe {
                match n {
                    8 => self.run_strip::<V, W, 8>(col, parts),
                    4 => self.run_strip::<V, W, 4>(col, parts),
                    _ => self.run_strip::<V, W, 2>(col, parts),
                }
            }
            col += n * V::LANES * parts;
        }
    }

    /// All leaves of all tiles for `parts` strips from `col` on. Several parts make one panel,
    /// and each leaf is done for all of them while it is near.
    #[inline(always)]
    unsafe fn run_strip<V: Vector, W: Weights, const N: usize>(
        &mut self,
        col: usize,
        parts: usize,
    ) {
        let Tiles { values, tiling, k } = self.x;
        let n = self.w.n();
        let first = tiling.first(self.tiles.start);
        let rows = tiling.first(self.tiles.end) - first;
        let strip = N * V::LANES;
        let level_len = rows * strip * parts;
        assert!(levels(k) * level_len <= self.stack.len(), "the stack holds every level");
        assert!(tiling.first(self.tiles.end) * k <= values.len(), "x holds every tile");
        let stack = self.stack.as_mut_ptr();
        let bytes = self.w.data();
        let panel_bytes = W::panel_bytes(k);
        let panels_end = (col + strip * parts).div_ceil(PANEL);
        assert!(panels_end * panel_bytes <= bytes.len(), "the panels are in the matrix");
        let base = &raw const bytes[col / PANEL * panel_bytes..] as *const u8;
        let offsets: [usize; N] = std::array::from_fn(|v| {
            let lane = v * V::LANES;
            lane / PANEL * panel_bytes + lane % PANEL * 4
        });
        let count = k.div_ceil(LEAF).max(1);
        let items = self.tiles.len() * parts;
        for index in 0..count {
            let from = index * LEAF;
            let len = LEAF.min(k - from);
            let at = LeafAt { index, count };
            // SAFETY: LEAF is even, so a leaf starts at a whole pair; inside by the assertions.
            let w = unsafe { base.add(from / 2 * W::PAIR_BYTES) };
            let leaf_end = w.wrapping_add(len / 2 * W::PAIR_BYTES);
            for item in 0..items {
                let (part, t) = (item / self.tiles.len(), item % self.tiles.len());
                let col = col + part * strip;
                if col >= n {
                    break;
                }
                let row = tiling.first(self.tiles.start + t);
                let r = tiling.first(self.tiles.start + t + 1) - row;
                let ahead = if strip <= PANEL {
                    Prefetch::share::<W>(leaf_end, item, items)
                } else {
                    // Several panels at once: the hardware follows their streams by itself.
                    Prefetch { at: leaf_end, lines: 0 }
                };
                // SAFETY: x and the stack hold the tile by the assertions above; every r that
                // can come with this N is listed.
                unsafe {
                    let w = w.add(part * strip * 4);
                    let x = values.as_ptr().add(row * k + from * r);
                    let stack = stack.add(((row - first) + part * rows) * strip);
                    macro_rules! sizes {
                        ($($size:literal)*) => {
                            match r {
                                $($size => finish(
                                    leaf::<V, W, $size, N>(x, w, &offsets, ahead, len),
                                    at, stack, level_len, &self.sink, (row, col, n),
                                ),)*
                                _ => unreachable!("tile of {r} rows and {N} vectors"),
                            }
                        };
                    }
                    match (V::LANES, N) {
                        (4 | 16, 8) => sizes!(1 2 3),
                        (4, _) => sizes!(1 2 3 4 5 6),
                        (_, 8) => sizes!(1),
                        (8, 4) => sizes!(1 2),
                        (_, 4) => sizes!(1 2 3),
                        (8, _) => sizes!(1 2 3 4 5 6),
                        _ => sizes!(1 2 3 4 5 6 7 8 9 10 11 12),
                    }
                }
            }
        }
    }
}
