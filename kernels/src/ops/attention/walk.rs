//! The walk of some rows' heads over the pages of their sequence, on one thread.
//!
//! An item is a row's head; items `[row][head]` are cut in groups that fill registers.

use std::ops::Range;

use super::{
    Job,
    page::{Ahead, Keys, ROWS_MAX, Values, add_values, products, stack_len, to_scores, to_weights},
};
use crate::{
    kv::{KvDType, KvShape, PAGE_TOKENS},
    ops::arena::Head,
    rows::Tiling,
    scratch,
    simd::Simd,
};

/// Attention of rows of one sequence, of the heads of one key/value head.
pub(super) fn walk(simd: Simd, job: &Job<'_>, rows: Range<usize>, kv_head: usize) {
    let shape = job.arena.shape();
    let (head_dim, cols) = (shape.head_dim, shape.value_cols());
    let count = rows.len() * job.heads();
    let groups = Tiling::new(count, ROWS_MAX);
    let mut memory =
        scratch::take(count * (head_dim + cols + PAGE_TOKENS + 3) + stack_len(head_dim));
    let (q, rest) = memory.split_at_mut(count * head_dim);
    let (acc, rest) = rest.split_at_mut(count * cols);
    let (scores, rest) = rest.split_at_mut(count * PAGE_TOKENS);
    let (state, stack) = rest.split_at_mut(3 * count);
    let (most, state) = state.split_at_mut(count);
    let (total, keep) = state.split_at_mut(count);
    let pages = job.pages(rows.clone());
    let table = job.queries[rows.start].pages;
    let items = Items { simd, job, rows, kv_head, groups };
    items.pack(q);
    most.fill(f32::NEG_INFINITY);
    total.fill(0.0);
    acc.fill(0.0);

    let head = |page: usize| job.arena.head(table[page], job.layer, kv_head);
    for page in pages.clone() {
        let here = head(page);
        let [_, value_scales] = scales(here, shape.dtype);
        // What comes next in the walk is asked for while this is read for the first time.
        let (_, seen) = job.seen(items.rows.end - 1, page);
        let value_bytes = shape.value_bytes() / PAGE_TOKENS * seen;
        let keys_ahead = Ahead::over(here.values(), value_bytes, head_dim);
        let values_ahead = match page + 1 < pages.end {
            true => Ahead::over(head(page + 1).keys(), shape.key_bytes(), PAGE_TOKENS),
            false => Ahead::NOTHING,
        };
        for g in 0..groups.count() {
            let group = groups.first(g)..groups.first(g + 1);
            let scores = &mut scores[group.start * PAGE_TOKENS..group.end * PAGE_TOKENS];
            let new = &mut keep[group.clone()];
            let ahead = keys_ahead.share(g, groups.count(), head_dim);
            if !items.score(q, g, page, here, ahead, stack, scores, new) {
                continue;
            }
            for (item, scores) in group.zip(scores.as_chunks_mut().0) {
                if items.sees(item, page) {
                    let (old, new) = (most[item], keep[item]);
                    most[item] = if new > old { new } else { old };
                    let sum;
                    (keep[item], sum) = to_weights(simd, scores, value_scales, old, most[item]);
                    total[item] = total[item].mul_add(keep[item], sum);
                }
            }
        }
        for g in 0..groups.count() {
            let first = groups.first(g);
            let weights = &scores[first * PAGE_TOKENS..];
            let added = &mut acc[first * cols..];
            let ahead = values_ahead.share(g, groups.count(), PAGE_TOKENS);
            items.add(g, page, here, (0, cols), weights, &keep[first..], ahead, added);
        }
    }
    items.finish(acc, total, 0, cols);
}

/// The scales of keys and values, where there are some.
pub(super) fn scales(head: Head<'_>, dtype: KvDType) -> [Option<&[f32; PAGE_TOKENS]>; 2] {
    match dtype {
        KvDType::Int8 => head.scales().map(Some),
        _ => [None; 2],
    }
}

/// The items of a walk.
pub(super) struct Items<'a> {
    pub(super) simd: Simd,
    pub(super) job: &'a Job<'a>,
    pub(super) rows: Range<usize>,
    pub(super) kv_head: usize,
    pub(super) groups: Tiling,
}

impl Items<'_> {
    /// q of all items, each group `[head_dim][items of the group]`.
    pub(super) fn pack(&self, q: &mut [f32]) {
        let head_dim = self.job.arena.shape().head_dim;
        for g in 0..self.groups.count() {
            let (first, end) = (self.groups.first(g), self.groups.first(g + 1));
            let to = &mut q[first * head_dim..end * head_dim];
            for item in first..end {
                let (row, col) = self.job.place(&self.rows, self.kv_head, item);
                let from = &self.job.q[row * self.job.cols + col..][..head_dim];
                for (to, &x) in to.chunks_exact_mut(end - first).zip(from) {
                    to[item - first] = x;
                }
            }
        }
    }

    /// The offsets of a page that an item sees.
    #[inline(always)]
    fn seen(&self, item: usize, page: usize) -> (usize, usize) {
        self.job.seen(self.rows.start + item / self.job.heads(), page)
    }

    /// Whether an item sees anything of a page.
    pub(super) fn sees(&self, item: usize, page: usize) -> bool {
        let (from, to) = self.seen(item, page);
        from < to
    }

    /// Scores of group g with a page, `[items of the group][PAGE_TOKENS]`, and the largest of
    /// each item; whether any item sees anything of the page. What belongs to items that see
    /// nothing of it is of no meaning.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn score(
        &self,
        q: &[f32],
        g: usize,
        page: usize,
        head: Head<'_>,
        ahead: Ahead,
        stack: &mut [f32],
        scores: &mut [f32],
        largest: &mut [f32],
    ) -> bool {
        let KvShape { dtype, head_dim, .. } = self.job.arena.shape();
        let group = self.groups.first(g)..self.groups.first(g + 1);
        let (mut from, mut to) = (PAGE_TOKENS, 0);
        for item in group.clone().filter(|&item| self.sees(item, page)) {
            let seen = self.seen(item, page);
            (from, to) = (from.min(seen.0), to.max(seen.1));
        }
        if from >= to {
            return false;
        }
        assert!(scores.len() == group.len() * PAGE_TOKENS && stack.len() >= stack_len(head_dim));
        let keys = Keys {
            dtype,
            q: q[group.start * head_dim..group.end * head_dim].as_ptr(),
            rows: group.len(),
            head_dim,
            keys: head.keys(),
            from,
            to,
            ahead,
        };
        // SAFETY: the lengths were just checked, a head of the arena has whole keys, and groups
        // have at most ROWS_MAX items.
        unsafe { products(self.simd, keys, stack.as_mut_ptr(), scores.as_mut_ptr()) };
        let [key_scales, _] = scales(head, dtype);
        let scale = self.job.scale;
        for ((item, scores), most) in group.zip(scores.as_chunks_mut().0).zip(largest) {
            if self.sees(item, page) {
                *most = to_scores(self.simd, scores, key_scales, scale, self.seen(item, page));
            }
        }
        true
    }

    /// Adds `len` columns of a page's values, from `col` on, to the sums of group g, `[items of
    /// the group][len]`. Items that see nothing of the page keep theirs.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn add(
        &self,
        g: usize,
        page: usize,
        head: Head<'_>,
        (col, len): (usize, usize),
        weights: &[f32],
        keep: &[f32],
        ahead: Ahead,
        acc: &mut [f32],
    ) {
        let shape = self.job.arena.shape();
        let first = self.groups.first(g);
        let rows = self.groups.first(g + 1) - first;
        assert!(weights.len() >= rows * PAGE_TOKENS && keep.len() >= rows, "of the whole group");
        assert!(acc.len() >= rows * len && col + len <= shape.value_cols(), "columns");
        // What all items see, and whether none sees more.
        let (mut from, mut to) = (0, PAGE_TOKENS);
        let (mut even, mut any) = (true, false);
        for item in first..first + rows {
            let seen = self.seen(item, page);
            even &= seen == self.seen(first, page);
            any |= seen.0 < seen.1;
            (from, to) = (from.max(seen.0), to.min(seen.1));
        }
        if !any {
            return;
        }
        let all = Values {
            dtype: shape.dtype,
            weights: weights.as_ptr(),
            keep: keep.as_ptr(),
            rows,
            values: head.values(),
            cols: shape.value_cols(),
            col,
            len,
            from,
            to,
            ahead,
        };
        if even {
            // SAFETY: the lengths were checked above, a head of the arena has whole values, and
            // groups have at most ROWS_MAX items.
            unsafe { add_values(self.simd, all, acc.as_mut_ptr()) };
            return;
        }
        let ones = [1.0f32; ROWS_MAX];
        let alone = |r: usize, (from, to): (usize, usize), keep: &[f32], acc: &mut [f32]| {
            let weights = weights[r * PAGE_TOKENS..].as_ptr();
            let keep = keep.as_ptr();
            let one = Values { weights, keep, rows: 1, from, to, ahead: Ahead::NOTHING, ..all };
            // SAFETY: as above, for one item of the group.
            unsafe { add_values(self.simd, one, acc[r * len..(r + 1) * len].as_mut_ptr()) };
        };
        // Each item begins and ends where it sees to; what all see they add together.
        if from >= to {
            (from, to) = (PAGE_TOKENS, PAGE_TOKENS);
        }
        for r in (0..rows).filter(|r| self.sees(first + r, page)) {
            let seen = self.seen(first + r, page);
            alone(r, (seen.0, seen.1.min(from)), &keep[r..], acc);
        }
        if from < to {
            let together = Values { keep: ones.as_ptr(), from, to, ..all };
            // SAFETY: as above.
            unsafe { add_values(self.simd, together, acc.as_mut_ptr()) };
            for r in 0..rows {
                let seen = self.seen(first + r, page);
                if to < seen.1 {
                    alone(r, (to, seen.1), &ones, acc);
                }
            }
        }
    }

    /// Divides all sums, `[items][len]`, of columns from `col` on, and writes the outputs.
    pub(super) fn finish(&self, acc: &[f32], total: &[f32], col: usize, len: usize) {
        let head_dim = self.job.arena.shape().head_dim;
        let outputs = len.min(head_dim.saturating_sub(col));
        for (item, (acc, &total)) in acc.chunks_exact(len).zip(total).enumerate() {
            let (row, first) = self.job.place(&self.rows, self.kv_head, item);
            // SAFETY: every walk has its own rows, heads and columns.
            let out = unsafe { self.job.out.part(row, first + col, outputs) };
            for (out, &sum) in out.iter_mut().zip(acc) {
                *out = sum / total;
            }
        }
    }
}
