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

use std::ops::Range;

use crate::{
    buffer::AlignedBytes,
    cpu::Cpu,
    kv::{KvShape, KvSlot, PAGE_TOKENS, Query},
    ops::{function::exp, softmax::largest, sum, tile::LEAF},
    rows::RowsMut,
    scratch,
    simd::vectorised,
};

/// Pages of keys and values for all layers and sequences. A page's memory is taken when it is
/// first written, and kept.
pub struct KvArena {
    shape: KvShape,
    pages: Vec<Option<AlignedBytes>>,
}

impl KvArena {
    /// An arena of `pages` pages, none of which takes memory yet.
    pub fn new(shape: KvShape, pages: usize) -> Self {
        Self { shape, pages: (0..pages).map(|_| None).collect() }
    }

    /// What a page holds.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Pages that there are.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that have taken memory.
    pub fn pages_written(&self) -> usize {
        self.pages.iter().flatten().count()
    }

    /// Values of one key/value head's keys, or values, in one page and layer.
    fn head_len(&self) -> usize {
        self.shape.head_dim * PAGE_TOKENS
    }

    /// Keys and values of one head: `[head_dim][PAGE_TOKENS]` and `[PAGE_TOKENS][head_dim]`.
    fn head(&self, page: u32, layer: usize, kv_head: usize) -> (&[f32], &[f32]) {
        let bytes = self.pages[page as usize].as_ref().expect("attention reads written pages");
        let at = self.head_at(layer, kv_head);
        bytemuck::cast_slice::<u8, f32>(bytes)[at..at + 2 * self.head_len()]
            .split_at(self.head_len())
    }

    fn head_at(&self, layer: usize, kv_head: usize) -> usize {
        assert!(layer < self.shape.layers && kv_head < self.shape.kv_heads, "head of the arena");
        (layer * self.shape.kv_heads + kv_head) * 2 * self.head_len()
    }

    /// Writes keys and values, dense `[slots.len(), kv_heads * head_dim]`, into their slots.
    ///
    /// # Panics
    /// If the shapes do not fit each other, or a slot is outside the arena.
    pub fn append(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[KvSlot]) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let cols = kv_heads * head_dim;
        assert_eq!((k.len(), v.len()), (slots.len() * cols, slots.len() * cols), "[rows, cols]");
        let (head_len, page_bytes) = (self.head_len(), self.shape.page_bytes());
        for (r, slot) in slots.iter().enumerate() {
            let offset = slot.offset as usize;
            assert!(offset < PAGE_TOKENS, "offset {offset} is inside a page");
            for head in 0..kv_heads {
                let at = self.head_at(layer, head);
                let page = self.pages[slot.page as usize]
                    .get_or_insert_with(|| AlignedBytes::zeroed(page_bytes));
                let page: &mut [f32] = bytemuck::cast_slice_mut(page);
                let (keys, values) = page[at..at + 2 * head_len].split_at_mut(head_len);
                let from = r * cols + head * head_dim;
                for (d, &x) in k[from..from + head_dim].iter().enumerate() {
                    keys[d * PAGE_TOKENS + offset] = x;
                }
                values[offset * head_dim..(offset + 1) * head_dim]
                    .copy_from_slice(&v[from..from + head_dim]);
            }
        }
    }
}

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
    let KvShape { kv_heads, head_dim, .. } = arena.shape;
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
        let (r, kv_head) = (task / kv_heads, task % kv_heads);
        let q = &q[r * cols + kv_head * group..][..group];
        // SAFETY: every task has its own row and group of heads.
        let out = unsafe { out.part(r, kv_head * group, group) };
        attend(cpu, arena, (layer, kv_head), q, &queries[r], (scale, window), out);
    };
    let keys: usize = queries.iter().map(|query| query.position as usize + 1).sum();
    if keys * cols < 1 << 14 {
        (0..queries.len() * kv_heads).for_each(one);
    } else {
        cpu.pool().run(queries.len() * kv_heads, &one);
    }
}

/// The positions that a query sees.
fn visible(query: &Query<'_>, window: Option<u32>) -> Range<usize> {
    let end = query.position as usize + 1;
    let start = window.map_or(0, |w| end.saturating_sub((w as usize).max(1)));
    start..end
}

/// One row's heads of one key/value head: q and out are `[heads of the group][head_dim]`.
fn attend(
    cpu: &Cpu,
    arena: &KvArena,
    (layer, kv_head): (usize, usize),
    q: &[f32],
    query: &Query<'_>,
    (scale, window): (f32, Option<u32>),
    out: &mut [f32],
) {
    let head_dim = arena.shape.head_dim;
    let heads = q.len() / head_dim;
    let seen = visible(query, window);
    let mut state = scratch::take(heads * 2);
    let (largest, total) = state.split_at_mut(heads);
    largest.fill(f32::NEG_INFINITY);
    total.fill(0.0);
    out.fill(0.0);
    for page in seen.start / PAGE_TOKENS..seen.end.div_ceil(PAGE_TOKENS) {
        let (keys, values) = arena.head(query.pages[page], layer, kv_head);
        let base = page * PAGE_TOKENS;
        let from = seen.start.saturating_sub(base);
        let to = (seen.end - base).min(PAGE_TOKENS);
        for h in 0..heads {
            let part = h * head_dim..(h + 1) * head_dim;
            let (max, sum) = (&mut largest[h], &mut total[h]);
            let (q, out) = (&q[part.clone()], &mut out[part]);
            add_page(cpu.simd(), q, keys, values, (from, to), scale, max, sum, out);
        }
    }
    for (out, &total) in out.chunks_exact_mut(head_dim).zip(&*total) {
        for x in out {
            *x /= total;
        }
    }
}

vectorised! {
    /// One head and one page, of which keys `from..to` are visible.
    #[allow(clippy::too_many_arguments)]
    fn add_page(
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        visible: (usize, usize),
        scale: f32,
        max: &mut f32,
        total: &mut f32,
        out: &mut [f32],
    ) {
        let (from, to) = visible;
        let mut weights = scores(q, keys);
        for w in &mut weights {
            *w *= scale;
        }
        let new = largest(&weights[from..to]);
        let new = if new > *max { new } else { *max };
        let keep = exp(*max - new);
        *max = new;
        for (i, w) in weights.iter_mut().enumerate() {
            let e = exp(*w - new);
            *w = if i >= from && i < to { e } else { 0.0 };
        }
        *total = total.mul_add(keep, sum::sum(&weights));
        for x in out.iter_mut() {
            *x *= keep;
        }
        let head_dim = out.len();
        for (i, &w) in weights.iter().enumerate().take(to).skip(from) {
            for (x, &v) in out.iter_mut().zip(&values[i * head_dim..][..head_dim]) {
                *x = w.mul_add(v, *x);
            }
        }
    }
}

/// Products of q with the keys of a page by rule 1, vectorised over keys.
#[inline(always)]
fn scores(q: &[f32], keys: &[f32]) -> [f32; PAGE_TOKENS] {
    let leaf = |q: &[f32], keys: &[f32]| {
        let mut acc = [0.0f32; PAGE_TOKENS];
        for (&q, keys) in q.iter().zip(keys.as_chunks::<PAGE_TOKENS>().0) {
            for i in 0..PAGE_TOKENS {
                acc[i] = q.mul_add(keys[i], acc[i]);
            }
        }
        acc
    };
    let mut waiting: Vec<[f32; PAGE_TOKENS]> = Vec::new();
    let mut acc = [0.0; PAGE_TOKENS];
    let count = q.len().div_ceil(LEAF);
    for (index, q) in q.chunks(LEAF).enumerate() {
        acc = leaf(q, &keys[index * LEAF * PAGE_TOKENS..]);
        let last = index + 1 == count;
        let merges = if last { waiting.len() } else { index.trailing_ones() as usize };
        for _ in 0..merges {
            let earlier = waiting.pop().expect("a counter of leaves has as many subtrees");
            for i in 0..PAGE_TOKENS {
                acc[i] += earlier[i];
            }
        }
        if !last {
            waiting.push(acc);
        }
    }
    acc
}
