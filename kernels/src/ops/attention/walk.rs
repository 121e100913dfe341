//! The walk of some rows' heads over the leaves of their sequence, on one thread.
//!
//! An item is a row's head; items `[row][head]` are cut in groups that fill registers.

use std::ops::Range;

use super::{
    Job, LEAF_PAGES,
    page::{
        Keys, Node, Prefetch, ROWS_MAX, Values, add_values, meet, products, stack_len, to_scores,
        to_weights,
    },
};
use crate::{
    kv::{KvDType, KvShape, PAGE_TOKENS},
    ops::{
        arena::Head,
        sum,
        tree::{self, LEAF},
    },
    rows::{RowsMut, Tiling},
    scratch,
    simd::Simd,
};

/// Attention of rows of one sequence, of the heads of one key/value head.
pub(super) fn walk(simd: Simd, job: &Job<'_>, rows: Range<usize>, kv_head: usize) {
    let items = Items::new(simd, job, rows, kv_head);
    let count = items.count();
    let leaves = job.leaves(items.rows.clone());
    let record = items.record_len();
    let levels = tree::level(leaves.end.next_power_of_two() - 1) + 1;
    let mut memory = scratch::take(items.memory_len() + (levels + 1) * record);
    let (memory, records) = memory.split_at_mut(items.memory_len());
    let (here, waiting) = records.split_at_mut(record);
    let mut memory = items.memory(memory);
    for leaf in leaves.clone() {
        let next = (leaf + 1 < leaves.end).then_some((leaf + 1) * LEAF_PAGES);
        items.leaf(leaf, next, &mut memory, here);
        for item in (0..count).filter(|&item| items.sees_leaf(item, leaf)) {
            let (first, all) = items.tree(item);
            for subtree in tree::earlier(leaf, all, first) {
                let earlier = &mut waiting[subtree.level * record..][..record];
                meet(simd, items.node(earlier, item), items.node(here, item));
            }
            if leaf + 1 == all {
                items.finish(item, items.node(here, item));
            } else {
                let to = &mut waiting[tree::level(leaf) * record..][..record];
                let (to, from) = (items.node(to, item), items.node(here, item));
                (*to.most, *to.total) = (*from.most, *from.total);
                to.acc.copy_from_slice(from.acc);
            }
        }
    }
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
    simd: Simd,
    job: &'a Job<'a>,
    rows: Range<usize>,
    kv_head: usize,
    groups: Tiling,
}

/// What computing a leaf needs beside its result.
pub(super) struct Memory<'a> {
    /// As [`Items::pack`] leaves it.
    q: &'a [f32],
    /// `[page of the leaf][items][PAGE_TOKENS]`: scores, then weights.
    scores: &'a mut [f32],
    /// Of products, and the largest score of each item in a page.
    stack: &'a mut [f32],
    largest: &'a mut [f32],
}

impl<'a> Items<'a> {
    pub(super) fn new(simd: Simd, job: &'a Job<'a>, rows: Range<usize>, kv_head: usize) -> Self {
        let groups = Tiling::new(rows.len() * job.heads(), ROWS_MAX);
        Self { simd, job, rows, kv_head, groups }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.rows.len() * self.job.heads()
    }

    /// Values of [`Items::memory`].
    pub(super) fn memory_len(&self) -> usize {
        let head_dim = self.job.arena.shape().head_dim;
        self.count() * (head_dim + LEAF + 1) + stack_len(head_dim)
    }

    /// Cuts memory in its parts, q packed.
    pub(super) fn memory<'m>(&self, memory: &'m mut [f32]) -> Memory<'m> {
        let (count, head_dim) = (self.count(), self.job.arena.shape().head_dim);
        let (q, rest) = memory.split_at_mut(count * head_dim);
        let (scores, rest) = rest.split_at_mut(count * LEAF);
        let (largest, stack) = rest.split_at_mut(count);
        self.pack(q);
        Memory { q, scores, stack, largest }
    }

    /// Values of the nodes of all items: `[items]` largest scores, `[items]` sums of weights,
    /// `[items][cols]` sums of values.
    pub(super) fn record_len(&self) -> usize {
        self.count() * (self.job.arena.shape().value_cols() + 2)
    }

    /// One item's node of a record.
    #[inline(always)]
    pub(super) fn node<'r>(&self, record: &'r mut [f32], item: usize) -> Node<'r> {
        let (count, cols) = (self.count(), self.job.arena.shape().value_cols());
        let (most, rest) = record.split_at_mut(count);
        let (total, acc) = rest.split_at_mut(count);
        let acc = &mut acc[item * cols..(item + 1) * cols];
        Node { most: &mut most[item], total: &mut total[item], acc }
    }

    /// The same, of a record that other threads use, too.
    ///
    /// # Safety
    /// Nobody else uses this item's node of the record at the same time.
    pub(super) unsafe fn node_of<'r>(
        &self,
        records: &RowsMut<'r>,
        record: usize,
        item: usize,
    ) -> Node<'r> {
        let (count, cols) = (self.count(), self.job.arena.shape().value_cols());
        // SAFETY: promised by the caller.
        unsafe {
            Node {
                most: &mut records.part(record, item, 1)[0],
                total: &mut records.part(record, count + item, 1)[0],
                acc: records.part(record, 2 * count + item * cols, cols),
            }
        }
    }

    /// The tree over an item's leaves: the first of them, and where they end.
    #[inline(always)]
    pub(super) fn tree(&self, item: usize) -> (usize, usize) {
        let visible = self.job.visible(self.rows.start + item / self.job.heads());
        (visible.start / LEAF, visible.end.div_ceil(LEAF))
    }

    /// Whether an item sees anything of a leaf.
    #[inline(always)]
    pub(super) fn sees_leaf(&self, item: usize, leaf: usize) -> bool {
        let (first, end) = self.tree(item);
        first <= leaf && leaf < end
    }

    /// What one leaf gives all items, into a record. What belongs to items that see nothing of it
    /// is of no meaning. `next` is the page that is read after it.
    pub(super) fn leaf(
        &self,
        leaf: usize,
        next: Option<usize>,
        memory: &mut Memory<'_>,
        record: &mut [f32],
    ) {
        let Memory { q, scores, stack, largest } = memory;
        let (shape, count) = (self.job.arena.shape(), self.count());
        let (head_dim, cols) = (shape.head_dim, shape.value_cols());
        let (most, rest) = record.split_at_mut(count);
        let (total, acc) = rest.split_at_mut(count);
        most.fill(f32::NEG_INFINITY);
        acc.fill(0.0);
        let all = self.job.pages(self.rows.clone());
        let pages = all.start.max(leaf * LEAF_PAGES)..all.end.min((leaf + 1) * LEAF_PAGES);
        let table = self.job.queries[self.rows.start].pages;
        let head = |page: usize| self.job.arena.head(table[page], self.job.layer, self.kv_head);
        let of_page = |page: usize| (page - pages.start) * count * PAGE_TOKENS;

        for page in pages.clone() {
            // What comes next is prefetched while this is read for the first time.
            let ahead = if page + 1 < pages.end {
                Prefetch::over(head(page + 1).keys(), shape.key_bytes(), head_dim)
            } else {
                Prefetch::over(head(pages.start).values(), shape.value_bytes(), head_dim)
            };
            let scores = &mut scores[of_page(page)..][..count * PAGE_TOKENS];
            for g in 0..self.groups.count() {
                let group = self.groups.first(g)..self.groups.first(g + 1);
                let scores = &mut scores[group.start * PAGE_TOKENS..group.end * PAGE_TOKENS];
                let ahead = ahead.share(g, self.groups.count(), head_dim);
                let largest = &mut largest[group.clone()];
                largest.fill(f32::NEG_INFINITY);
                self.score(q, g, page, head(page), ahead, stack, scores, largest);
                for (most, &new) in most[group].iter_mut().zip(&*largest) {
                    *most = if new > *most { new } else { *most };
                }
            }
        }
        for item in 0..count {
            let mut lanes = [0.0; sum::LANES];
            for page in pages.clone().filter(|&page| self.sees(item, page)) {
                let [_, value_scales] = scales(head(page), shape.dtype);
                let scores = scores[of_page(page) + item * PAGE_TOKENS..].first_chunk_mut();
                let scores = scores.expect("a page of scores");
                to_weights(self.simd, scores, value_scales, most[item], &mut lanes);
            }
            total[item] = sum::tree(lanes);
        }
        for page in pages.clone() {
            let ahead = match next {
                _ if page + 1 < pages.end => {
                    Prefetch::over(head(page + 1).values(), shape.value_bytes(), PAGE_TOKENS)
                }
                Some(next) => Prefetch::over(head(next).keys(), shape.key_bytes(), PAGE_TOKENS),
                None => Prefetch::NOTHING,
            };
            for g in 0..self.groups.count() {
                let first = self.groups.first(g);
                let weights = &scores[of_page(page) + first * PAGE_TOKENS..];
                let ahead = ahead.share(g, self.groups.count(), PAGE_TOKENS);
                self.add(g, page, head(page), weights, ahead, &mut acc[first * cols..]);
            }
        }
    }

    /// q of all items, each group `[head_dim][items of the group]`.
    fn pack(&self, q: &mut [f32]) {
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
    fn sees(&self, item: usize, page: usize) -> bool {
        let (from, to) = self.seen(item, page);
        from < to
    }

    /// Scores of group g with a page, `[items of the group][PAGE_TOKENS]`, and the largest of
    /// each item that sees something of the page; nothing of meaning for others.
    #[allow(clippy::too_many_arguments)]
    fn score(
        &self,
        q: &[f32],
        g: usize,
        page: usize,
        head: Head<'_>,
        ahead: Prefetch,
        stack: &mut [f32],
        scores: &mut [f32],
        largest: &mut [f32],
    ) {
        let KvShape { dtype, head_dim, .. } = self.job.arena.shape();
        let group = self.groups.first(g)..self.groups.first(g + 1);
        let (mut from, mut to) = (PAGE_TOKENS, 0);
        for item in group.clone().filter(|&item| self.sees(item, page)) {
            let seen = self.seen(item, page);
            (from, to) = (from.min(seen.0), to.max(seen.1));
        }
        if from >= to {
            return;
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
    }

    /// Adds a page's values to the sums of group g, `[items of the group][cols]`. Items that see
    /// nothing of the page keep theirs.
    fn add(
        &self,
        g: usize,
        page: usize,
        head: Head<'_>,
        weights: &[f32],
        ahead: Prefetch,
        acc: &mut [f32],
    ) {
        let shape = self.job.arena.shape();
        let cols = shape.value_cols();
        let first = self.groups.first(g);
        let rows = self.groups.first(g + 1) - first;
        assert!(weights.len() >= rows * PAGE_TOKENS && acc.len() >= rows * cols, "of the group");
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
            rows,
            values: head.values(),
            cols,
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
        let alone = |r: usize, (from, to): (usize, usize), acc: &mut [f32]| {
            let weights = weights[r * PAGE_TOKENS..].as_ptr();
            let one = Values { weights, rows: 1, from, to, ahead: Prefetch::NOTHING, ..all };
            // SAFETY: as above, for one item of the group.
            unsafe { add_values(self.simd, one, acc[r * cols..(r + 1) * cols].as_mut_ptr()) };
        };
        // Each item begins and ends where it sees to; what all see they add together.
        if from >= to {
            (from, to) = (PAGE_TOKENS, PAGE_TOKENS);
        }
        for r in (0..rows).filter(|r| self.sees(first + r, page)) {
            let seen = self.seen(first + r, page);
            alone(r, (seen.0, seen.1.min(from)), acc);
        }
        if from < to {
            // SAFETY: as above.
            unsafe { add_values(self.simd, Values { from, to, ..all }, acc.as_mut_ptr()) };
            for r in 0..rows {
                let seen = self.seen(first + r, page);
                if to < seen.1 {
                    alone(r, (to, seen.1), acc);
                }
            }
        }
    }

    /// Divides the sums of the tree's root and writes the outputs.
    pub(super) fn finish(&self, item: usize, root: Node<'_>) {
        let (row, first) = self.job.place(&self.rows, self.kv_head, item);
        let head_dim = self.job.arena.shape().head_dim;
        // SAFETY: every item has its own row and columns, and is finished once.
        let out = unsafe { self.job.out.part(row, first, head_dim) };
        for (out, &mut sum) in out.iter_mut().zip(root.acc) {
            *out = sum / *root.total;
        }
    }
}
