//! Causal attention over a paged cache of keys and values.
//!
//! Shapes: q and out `[rows, heads * head_dim]`; a page holds, per layer, keys
//! `[kv_head][head_dim][PAGE_TOKENS]` and values `[kv_head][PAGE_TOKENS][head_dim]`.
//!
//! The rule, for one row at position p and one of its heads. It sees the keys `first..=p`, where
//! `first` is 0, or `max(0, p + 1 − window)`. Positions are cut in leaves of [`LEAF`] by absolute
//! position: leaf l holds `256·l .. 256·l + 256`, of which the row sees what is in `first..=p`.
//! 1. *Score* of a key: q · k by rule 1 over head_dim, then times `scale`.
//! 2. *A leaf* of which something is seen gives three things, of its visible keys alone.
//!    Its maximum m: the largest score, from −infinity; `m = score > m ? score : m`.
//!    Weights `w = exp(score − m)`, and their sum s by rule 3: the weight of position i is added to
//!    lane i mod 8, i upwards, lanes from +0, then the fixed tree of [`super::sum`].
//!    Per column c the sum of values a: from +0, `a = fma(w, v[c], a)`, positions upwards.
//! 3. *The tree* is that of [`super::tree`] over leaf indices `0 ..= p / 256`, counted from position
//!    0 whatever the window, `p / 256 + 1` leaves. A node of an earlier and a later side is
//!    `m = later.m > earlier.m ? later.m : earlier.m`, `e = exp(earlier.m − m)`,
//!    `f = exp(later.m − m)`, `s = earlier.s · e + later.s · f` and per column
//!    `a = earlier.a · e + later.a · f`: two rounded products and a rounded sum, not fused. (One of
//!    e and f is exp(0), exactly 1.) A side of which nothing is seen, which a window makes at the
//!    left, is left out: the node is then the other side, untouched, and not seen either if neither
//!    is. The last leaf is always seen.
//! 4. *Output*: `a / s`, one division per column.
//!
//! So the shape of the tree is a function of p alone, and what a leaf or a node gives is a function
//! of its positions and `first` alone: leaves may be computed anywhere, in any order.
//!
//! What is kept as bf16 is widened exactly. What is kept as int8 enters products as the integer
//! n: a score is (Σ q · n) · s · `scale` with the key's s, and a value is added as
//! (weight · s) times n with the value's s, in this order of operations; s sums plain weights.
//!
//! Rows of one sequence that follow each other, and the heads that share a key/value head, walk
//! together, so that what one reads of a page serves all. Where there are too few such walks to
//! occupy the threads, the leaves of a walk are `spread` over them. Neither changes a row's own
//! order of operations. Pages begin at fixed positions and a leaf is a whole number of them.
//!
//! A NaN or infinity in a visible key or value, or in q, makes NaN or infinity of what it
//! reaches; the logits are refused then.

mod page;
mod spread;
mod walk;

use std::ops::Range;

use crate::{
    cpu::Cpu,
    kv::{KvShape, PAGE_TOKENS, Query},
    ops::{arena::KvArena, tree::LEAF},
    rows::RowsMut,
    scratch,
};

/// Rows times heads that walk together at most, if a row has no more heads than this.
const TOGETHER: usize = 48;
/// Pages of a leaf of positions.
const LEAF_PAGES: usize = LEAF / PAGE_TOKENS;

/// Values that a spread walk may keep for its leaves; beyond that rows walk, one thread each.
const SPREAD_VALUES_MAX: usize = 1 << 24;

/// Fewer products than this are not worth a second thread.
const INLINE_PRODUCTS: usize = 1 << 14;

/// Fewer products than this are not worth two rounds of all threads.
const SPREAD_PRODUCTS: usize = 1 << 18;

/// Attention of each row of `q` over the keys that it sees; `out` has the shape of `q`.
///
/// # Panics
/// If the shapes do not fit each other, or a visible page was never written.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    cpu: &Cpu,
    arena: &KvArena,
    layer: usize,
    q: &[f32],
    queries: &[Query<'_>],
    scale: f32,
    window: Option<u32>,
    out: &mut [f32],
) {
    let KvShape { kv_heads, head_dim, .. } = arena.shape();
    if queries.is_empty() {
        assert!(q.is_empty() && out.is_empty(), "one query per row");
        return;
    }
    let cols = q.len() / queries.len();
    assert_eq!((q.len(), out.len()), (queries.len() * cols, q.len()), "q and out are [rows, cols]");
    assert!(cols > 0 && cols.is_multiple_of(kv_heads * head_dim), "whole groups of heads");
    let out = RowsMut::dense(out, cols);
    let job = Job { arena, layer, q, cols, queries, scale, window, out };
    let threads = cpu.pool().threads();
    let keys: usize = (0..queries.len()).map(|row| job.visible(row).len()).sum();
    let inline = keys * cols < INLINE_PRODUCTS;

    let mut ends = scratch::take(queries.len());
    let ends: &mut [u32] = bytemuck::cast_slice_mut(&mut ends);
    let most = match inline {
        true => queries.len(),
        // Enough tiles for all threads, as long as they fill registers.
        false => queries.len() * kv_heads / (3 * threads),
    };
    let ends = job.cut(most.max(page::ROWS_MAX.div_ceil(job.heads())), ends);
    let tile = |t: usize| (if t == 0 { 0 } else { ends[t - 1] as usize })..ends[t] as usize;

    let tasks = ends.len() * kv_heads;
    let idle = !tasks.is_multiple_of(threads) && tasks < 4 * threads;
    let longest = (0..queries.len()).map(|row| job.visible(row).len()).max().unwrap_or(0);
    let node = arena.shape().value_cols() + 2;
    let values = (longest / LEAF + 2) * kv_heads * TOGETHER.max(job.heads()) * node;
    let spreads = longest > LEAF && values <= SPREAD_VALUES_MAX;
    if idle && spreads && keys * cols >= SPREAD_PRODUCTS {
        (0..ends.len()).for_each(|t| spread::spread(cpu, &job, tile(t)));
        return;
    }
    let one = |task: usize| {
        // Tiles of one head follow each other: they read the same pages. Later rows see more and
        // go first, so that no thread begins with the longest when others have ended.
        let (kv_head, t) = (task / ends.len(), ends.len() - 1 - task % ends.len());
        walk::walk(cpu.simd(), &job, tile(t), kv_head);
    };
    if inline {
        (0..tasks).for_each(one);
    } else {
        cpu.pool().run(tasks, &one);
    }
}

/// One call, and where its parts are.
struct Job<'a> {
    arena: &'a KvArena,
    layer: usize,
    q: &'a [f32],
    cols: usize,
    queries: &'a [Query<'a>],
    scale: f32,
    window: Option<u32>,
    out: RowsMut<'a>,
}

impl Job<'_> {
    /// Heads that share a key/value head.
    fn heads(&self) -> usize {
        let KvShape { kv_heads, head_dim, .. } = self.arena.shape();
        self.cols / (kv_heads * head_dim)
    }

    /// Cuts the rows in tiles of one sequence and at most `most` rows; returns where each ends.
    fn cut<'e>(&self, most: usize, ends: &'e mut [u32]) -> &'e [u32] {
        let most = most.min((TOGETHER / self.heads()).max(1));
        let (mut count, mut first) = (0, 0);
        for row in 1..=self.queries.len() {
            let goes_on = row < self.queries.len()
                && row - first < most
                && std::ptr::eq(self.queries[row].pages, self.queries[first].pages);
            if !goes_on {
                ends[count] = row as u32;
                count += 1;
                first = row;
            }
        }
        &ends[..count]
    }

    /// The positions that a row sees; at least its own.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let end = self.queries[row].position as usize + 1;
        let start = self.window.map_or(0, |w| end.saturating_sub((w as usize).max(1)));
        start..end
    }

    /// The offsets in a page that a row sees, from and to; none unless from < to.
    #[inline(always)]
    fn seen(&self, row: usize, page: usize) -> (usize, usize) {
        let (visible, base) = (self.visible(row), page * PAGE_TOKENS);
        let inside = |position: usize| position.saturating_sub(base).min(PAGE_TOKENS);
        (inside(visible.start), inside(visible.end))
    }

    /// The pages that one of these rows sees.
    fn pages(&self, rows: Range<usize>) -> Range<usize> {
        let visible = rows.map(|row| self.visible(row));
        let all = visible.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
        let all = all.expect("a tile has rows");
        all.start / PAGE_TOKENS..all.end.div_ceil(PAGE_TOKENS)
    }

    /// The leaves of which one of these rows sees something.
    fn leaves(&self, rows: Range<usize>) -> Range<usize> {
        let pages = self.pages(rows);
        pages.start / LEAF_PAGES..pages.end.div_ceil(LEAF_PAGES)
    }

    /// Where item i of these rows and a key/value head's heads is: its row and first column.
    #[inline(always)]
    fn place(&self, rows: &Range<usize>, kv_head: usize, item: usize) -> (usize, usize) {
        let (heads, head_dim) = (self.heads(), self.arena.shape().head_dim);
        (rows.start + item / heads, (kv_head * heads + item % heads) * head_dim)
    }
}
