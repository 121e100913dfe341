//! Causal attention over a paged cache of keys and values.
//!
//! Shapes: q and out `[rows, heads * head_dim]`; a page holds, per layer, keys
//! `[kv_head][head_dim][PAGE_TOKENS]` and values `[kv_head][PAGE_TOKENS][head_dim]`.
//!
//! A row walks the pages of its sequence upwards; pages begin at fixed positions, so neither
//! chunks of the prompt nor the batch change anything. Per page: scores by rule 1 over head_dim,
//! times `scale`; the largest of the visible ones raises the running maximum; what was summed so
//! far is scaled by exp(old − new); weights are exp(score − maximum), exactly 0 for keys that
//! are not visible; they are summed by 8 virtual lanes; values are added i upwards by fused
//! multiply-add. At the end one division per output. Keys that are not visible are never added,
//! and pages without a visible key are not touched.

// Registers are arrays that are indexed alike; iterators would hide which lane meets which.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::{
    cpu::Cpu,
    kv::{KvShape, PAGE_TOKENS, Query},
    ops::{arena::KvArena, function::exp, softmax::largest, sum, tile::LEAF},
    rows::RowsMut,
    scratch,
    simd::{Kernel, Vector},
};

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
    let group = cols / kv_heads;
    let out = RowsMut::dense(out, cols);
    let one = |task: usize| {
        // Rows of one head follow each other: they read the same pages.
        let (kv_head, r) = (task / queries.len(), task % queries.len());
        let levels = head_dim.div_ceil(LEAF).ilog2() as usize + 1;
        let heads = group / head_dim;
        let mut scores = scratch::take(levels * heads * PAGE_TOKENS);
        let mut state = scratch::take(3 * heads);
        cpu.simd().run(Attend {
            arena,
            layer,
            kv_head,
            q: &q[r * cols + kv_head * group..][..group],
            pages: queries[r].pages,
            visible: visible(&queries[r], window),
            scale,
            // SAFETY: every task has its own row and group of heads.
            out: unsafe { out.part(r, kv_head * group, group) },
            scores: &mut scores,
            state: &mut state,
        });
    };
    let keys: usize = queries.iter().map(|query| visible(query, window).len()).sum();
    if keys * cols < 1 << 14 {
        (0..queries.len() * kv_heads).for_each(one);
    } else {
        cpu.pool().run(queries.len() * kv_heads, &one);
    }
}

/// The positions that a query sees; at least its own.
fn visible(query: &Query<'_>, window: Option<u32>) -> Range<usize> {
    let end = query.position as usize + 1;
    let start = window.map_or(0, |w| end.saturating_sub((w as usize).max(1)));
    start..end
}

/// One row's heads of one key/value head, which share the reading of its pages.
struct Attend<'a> {
    arena: &'a KvArena,
    layer: usize,
    kv_head: usize,
    /// `[heads][head_dim]`, as is `out`.
    q: &'a [f32],
    pages: &'a [u32],
    visible: Range<usize>,
    scale: f32,
    out: &'a mut [f32],
    /// `[levels of the tree][heads][PAGE_TOKENS]`; level 0 becomes the weights.
    scores: &'a mut [f32],
    /// `[3][heads]`: largest score so far, sum of weights so far, what scales them.
    state: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Attend { arena, layer, kv_head, q, pages, visible, scale, out, scores, state } = self;
        let head_dim = arena.shape().head_dim;
        let heads = q.len() / head_dim;
        let (largest, rest) = state.split_at_mut(heads);
        let (total, keep) = rest.split_at_mut(heads);
        largest.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        out.fill(0.0);
        for page in visible.start / PAGE_TOKENS..visible.end.div_ceil(PAGE_TOKENS) {
            let (keys, values) = arena.head(pages[page], layer, kv_head);
            let base = page * PAGE_TOKENS;
            let from = visible.start.saturating_sub(base);
            let to = (visible.end - base).min(PAGE_TOKENS);
            // SAFETY: promised by the caller.
            unsafe { score::<V>(q, keys, head_dim, scores) };
            for h in 0..heads {
                let weights = &mut scores[h * PAGE_TOKENS..(h + 1) * PAGE_TOKENS];
                (largest[h], keep[h], total[h]) =
                    weigh(weights, from, to, scale, largest[h], total[h]);
            }
            // SAFETY: promised by the caller.
            unsafe { add_values::<V>(scores, keep, values, (from, to), head_dim, out) };
        }
        for (out, &total) in out.chunks_exact_mut(head_dim).zip(&*total) {
            for x in out {
                *x /= total;
            }
        }
    }
}

/// Turns a head's products of one page into weights; returns the new maximum, what scales
/// earlier sums, and the new sum.
#[inline(always)]
fn weigh(
    weights: &mut [f32],
    from: usize,
    to: usize,
    scale: f32,
    old: f32,
    total: f32,
) -> (f32, f32, f32) {
    for w in weights.iter_mut() {
        *w *= scale;
    }
    let new = largest(&weights[from..to]);
    let new = if new > old { new } else { old };
    for (i, w) in weights.iter_mut().enumerate() {
        let e = exp(*w - new);
        *w = if i >= from && i < to { e } else { 0.0 };
    }
    let keep = exp(old - new);
    (new, keep, total.mul_add(keep, sum::sum(weights)))
}

/// Products of every head of q with the keys of a page, by rule 1, into level 0 of `scores`.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
unsafe fn score<V: Vector>(q: &[f32], keys: &[f32], head_dim: usize, scores: &mut [f32]) {
    let heads = q.len() / head_dim;
    assert!(keys.len() == head_dim * PAGE_TOKENS, "keys are [head_dim][PAGE_TOKENS]");
    let level = heads * PAGE_TOKENS;
    let count = head_dim.div_ceil(LEAF);
    let mut waiting = 0;
    for index in 0..count {
        let from = index * LEAF;
        let len = LEAF.min(head_dim - from);
        let out = &mut scores[waiting * level..(waiting + 1) * level];
        let mut h = 0;
        while h < heads {
            let group = if heads - h >= 4 {
                4
            } else if heads - h >= 2 {
                2
            } else {
                1
            };
            // SAFETY: heads h..h + group are in q and out; a leaf of d's is in q and keys.
            unsafe {
                let q = q.as_ptr().add(h * head_dim + from);
                let keys = keys.as_ptr().add(from * PAGE_TOKENS);
                let out = out.as_mut_ptr().add(h * PAGE_TOKENS);
                match (group, V::LANES) {
                    (4, 16) => leaf::<V, 4, 4>(q, head_dim, keys, len, out),
                    (4, _) => leaf::<V, 4, 2>(q, head_dim, keys, len, out),
                    (2, _) => leaf::<V, 2, 4>(q, head_dim, keys, len, out),
                    (_, 16) => leaf::<V, 1, 4>(q, head_dim, keys, len, out),
                    _ => leaf::<V, 1, 8>(q, head_dim, keys, len, out),
                }
            }
            h += group;
        }
        waiting += 1;
        let merges =
            if index + 1 == count { waiting - 1 } else { (index + 1).trailing_zeros() as usize };
        for _ in 0..merges {
            waiting -= 1;
            let (earlier, later) = scores.split_at_mut(waiting * level);
            for (a, &b) in earlier[(waiting - 1) * level..].iter_mut().zip(&later[..level]) {
                *a += b;
            }
        }
    }
}

/// One leaf of the products of H heads with all keys of a page.
///
/// # Safety
/// q holds H rows of `len` values `q_stride` apart, keys `[len][PAGE_TOKENS]`, and out has room
/// for `[H][PAGE_TOKENS]`.
#[inline(always)]
unsafe fn leaf<V: Vector, const H: usize, const N: usize>(
    q: *const f32,
    q_stride: usize,
    keys: *const f32,
    len: usize,
    out: *mut f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        for part in (0..PAGE_TOKENS).step_by(N * V::LANES) {
            let mut acc = [[V::zero(); N]; H];
            for d in 0..len {
                let mut k = [V::zero(); N];
                for v in 0..N {
                    k[v] = V::load(keys.add(d * PAGE_TOKENS + part + v * V::LANES));
                }
                for h in 0..H {
                    let q = V::splat(*q.add(h * q_stride + d));
                    for v in 0..N {
                        acc[h][v] = acc[h][v].fma(q, k[v]);
                    }
                }
            }
            for h in 0..H {
                for v in 0..N {
                    acc[h][v].store(out.add(h * PAGE_TOKENS + part + v * V::LANES));
                }
            }
        }
    }
}

/// `out = out * keep + Σ weight · value` over the visible keys upwards, for every head.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
unsafe fn add_values<V: Vector>(
    weights: &[f32],
    keep: &[f32],
    values: &[f32],
    (from, to): (usize, usize),
    head_dim: usize,
    out: &mut [f32],
) {
    let heads = keep.len();
    assert!(out.len() == heads * head_dim && weights.len() >= heads * PAGE_TOKENS);
    assert!(to <= PAGE_TOKENS && values.len() == PAGE_TOKENS * head_dim);
    let mut h = 0;
    while h < heads {
        let group = if heads - h >= 4 { 4 } else { 1 };
        let mut d = 0;
        while d < head_dim {
            let vectors = (head_dim - d) / V::LANES;
            let at = ValuesAt { h, d, from, to, head_dim };
            // SAFETY: the heads and columns are inside by the assertions above.
            d += unsafe {
                match (group, vectors) {
                    (_, 0) => 0,
                    (4, 1) => columns::<V, 4, 1>(weights, keep, values, at, out),
                    (4, _) => columns::<V, 4, 2>(weights, keep, values, at, out),
                    (_, 8..) => columns::<V, 1, 8>(weights, keep, values, at, out),
                    (_, 4..) => columns::<V, 1, 4>(weights, keep, values, at, out),
                    (_, 2..) => columns::<V, 1, 2>(weights, keep, values, at, out),
                    _ => columns::<V, 1, 1>(weights, keep, values, at, out),
                }
            };
            if vectors == 0 {
                break;
            }
        }
        for h in h..h + group {
            let out = &mut out[h * head_dim + d..(h + 1) * head_dim];
            for x in out.iter_mut() {
                *x *= keep[h];
            }
            for i in from..to {
                let w = weights[h * PAGE_TOKENS + i];
                let values = &values[i * head_dim + d..(i + 1) * head_dim];
                for (x, &v) in out.iter_mut().zip(values) {
                    *x = w.mul_add(v, *x);
                }
            }
        }
        h += group;
    }
}

#[derive(Clone, Copy)]
struct ValuesAt {
    h: usize,
    d: usize,
    from: usize,
    to: usize,
    head_dim: usize,
}

/// N vectors of columns for H heads; returns how many columns that is.
///
/// # Safety
/// Heads `h..h + H`, columns `d..d + N * LANES` and keys `from..to` are inside the slices.
#[inline(always)]
unsafe fn columns<V: Vector, const H: usize, const N: usize>(
    weights: &[f32],
    keep: &[f32],
    values: &[f32],
    ValuesAt { h, d, from, to, head_dim }: ValuesAt,
    out: &mut [f32],
) -> usize {
    // SAFETY: promised by the caller.
    unsafe {
        let out = out.as_mut_ptr().add(h * head_dim + d);
        let weights = weights.as_ptr().add(h * PAGE_TOKENS);
        let values = values.as_ptr().add(d);
        let mut acc = [[V::zero(); N]; H];
        for r in 0..H {
            let keep = V::splat(keep[h + r]);
            for v in 0..N {
                acc[r][v] = V::load(out.add(r * head_dim + v * V::LANES)).mul(keep);
            }
        }
        for i in from..to {
            let mut row = [V::zero(); N];
            for v in 0..N {
                row[v] = V::load(values.add(i * head_dim + v * V::LANES));
            }
            for r in 0..H {
                let w = V::splat(*weights.add(r * PAGE_TOKENS + i));
                for v in 0..N {
                    acc[r][v] = acc[r][v].fma(w, row[v]);
                }
            }
        }
        for r in 0..H {
            for v in 0..N {
                acc[r][v].store(out.add(r * head_dim + v * V::LANES));
            }
        }
        N * V::LANES
    }
}
