//! The walk of some rows, its steps spread over all threads: for a few rows with many keys.
//!
//! Three rounds: scores of all pages; then, each page knowing the largest score of those before
//! it, weights of all pages; then the values of all pages in their order, columns side by side.
//! Every number is computed from the same numbers by the same operations as in [`super::walk`].

use std::ops::Range;

use super::{
    Job,
    page::{Ahead, ROWS_MAX, stack_len, to_weights},
    walk::{Items, scales},
};
use crate::{
    cpu::Cpu,
    kv::PAGE_TOKENS,
    rows::{RowsMut, Tiling},
    scratch,
};

/// Columns of a task are a multiple of this: whole vectors of every width.
const COLUMNS: usize = 16;

/// Attention of rows of one sequence.
pub(super) fn spread(cpu: &Cpu, job: &Job<'_>, rows: Range<usize>) {
    let shape = job.arena.shape();
    let items = rows.len() * job.heads();
    let pages = job.pages(rows.clone());
    let tasks = 4 * cpu.pool().threads();
    let chunks = tasks.div_ceil(shape.kv_heads).min(pages.len());
    let strips = tasks.div_ceil(shape.kv_heads).min(shape.value_cols() / COLUMNS);
    let all = shape.kv_heads * pages.len();
    // Per key/value head and page, of all items.
    let mut scores = scratch::take(all * items * PAGE_TOKENS);
    let mut most = scratch::take(all * items);
    let mut state = scratch::take(all * items * 2);
    let run = |round: Round<'_>, parts: usize| {
        cpu.pool().run(shape.kv_heads * parts, &|task| {
            let (kv_head, part) = (task / parts, task % parts);
            let groups = Tiling::new(items, ROWS_MAX);
            let items = Items { simd: cpu.simd(), job, rows: rows.clone(), kv_head, groups };
            Part { items, pages: pages.clone(), part, parts }.compute(round);
        });
    };
    let to = RowsMut::dense(&mut scores, items * PAGE_TOKENS);
    run(Round::Scores { scores: to, most: RowsMut::dense(&mut most, items) }, chunks);
    let to = RowsMut::dense(&mut scores, items * PAGE_TOKENS);
    let changed = RowsMut::dense(&mut state, items * 2);
    run(Round::Weights { most: &most, scores: to, state: changed }, chunks);
    run(Round::Values { weights: &scores, state: &state }, strips);
}

/// What a round reads and writes. All have rows `[kv_head][page]`: scores, later weights,
/// `[items][PAGE_TOKENS]`; the largest score of the page, `[items]`; state `[2][items]`, what
/// scales earlier sums and the sum of the page's weights.
#[derive(Clone, Copy)]
enum Round<'a> {
    Scores { scores: RowsMut<'a>, most: RowsMut<'a> },
    Weights { most: &'a [f32], scores: RowsMut<'a>, state: RowsMut<'a> },
    Values { weights: &'a [f32], state: &'a [f32] },
}

/// A task of a round: some pages of the first two, some columns of the last.
struct Part<'a> {
    items: Items<'a>,
    pages: Range<usize>,
    part: usize,
    parts: usize,
}

impl Part<'_> {
    fn compute(self, round: Round<'_>) {
        match round {
            Round::Scores { scores, most } => self.scores(scores, most),
            Round::Weights { most, scores, state } => self.weights(most, scores, state),
            Round::Values { weights, state } => self.values(weights, state),
        }
    }

    /// The part's share of `count` things.
    fn share(&self, count: usize) -> Range<usize> {
        self.part * count / self.parts..(self.part + 1) * count / self.parts
    }

    fn share_of_pages(&self) -> Range<usize> {
        let share = self.share(self.pages.len());
        self.pages.start + share.start..self.pages.start + share.end
    }

    fn count(&self) -> usize {
        self.items.groups.first(self.items.groups.count())
    }

    /// The row of a page.
    fn row(&self, page: usize) -> usize {
        self.items.kv_head * self.pages.len() + page - self.pages.start
    }

    fn scores(self, scores: RowsMut<'_>, most: RowsMut<'_>) {
        let count = self.count();
        let (items, job) = (&self.items, self.items.job);
        let shape = job.arena.shape();
        let head_dim = shape.head_dim;
        let mut memory = scratch::take(count * head_dim + stack_len(head_dim));
        let (q, stack) = memory.split_at_mut(count * head_dim);
        items.pack(q);
        let table = job.queries[items.rows.start].pages;
        let head = |page: usize| job.arena.head(table[page], job.layer, items.kv_head);
        let pages = self.share_of_pages();
        for page in pages.clone() {
            let mut ahead = match page + 1 < pages.end {
                true => Ahead::over(head(page + 1).keys(), shape.key_bytes(), head_dim),
                false => Ahead::NOTHING,
            };
            // SAFETY: this task alone has the page in this round.
            let (scores, most) = unsafe {
                let row = self.row(page);
                (scores.part(row, 0, count * PAGE_TOKENS), most.part(row, 0, count))
            };
            for g in 0..items.groups.count() {
                let group = items.groups.first(g)..items.groups.first(g + 1);
                let scores = &mut scores[group.start * PAGE_TOKENS..group.end * PAGE_TOKENS];
                let most = &mut most[group];
                // Pages that an item does not see raise nothing.
                most.fill(f32::NEG_INFINITY);
                items.score(q, g, page, head(page), ahead, stack, scores, most);
                ahead = Ahead::NOTHING;
            }
        }
    }

    fn weights(self, most: &[f32], scores: RowsMut<'_>, state: RowsMut<'_>) {
        let count = self.count();
        let (items, job) = (&self.items, self.items.job);
        let table = job.queries[items.rows.start].pages;
        let mut before = scratch::take(count);
        before.fill(f32::NEG_INFINITY);
        let pages = self.share_of_pages();
        let table = table.iter().enumerate().take(pages.end).skip(self.pages.start);
        for (page, &number) in table {
            let row = self.row(page);
            let most = &most[row * count..(row + 1) * count];
            let raise = |old: f32, most: f32| if most > old { most } else { old };
            if page < pages.start {
                before.iter_mut().zip(most).for_each(|(old, &most)| *old = raise(*old, most));
                continue;
            }
            // SAFETY: this task alone has the page in this round.
            let (scores, state) = unsafe {
                (scores.part(row, 0, count * PAGE_TOKENS), state.part(row, 0, 2 * count))
            };
            let (keep, sum) = state.split_at_mut(count);
            let head = job.arena.head(number, job.layer, items.kv_head);
            let [_, value_scales] = scales(head, job.arena.shape().dtype);
            for (item, weights) in scores.as_chunks_mut().0.iter_mut().enumerate() {
                if items.sees(item, page) {
                    let old = before[item];
                    before[item] = raise(old, most[item]);
                    (keep[item], sum[item]) =
                        to_weights(items.simd, weights, value_scales, old, before[item]);
                }
            }
        }
    }

    fn values(self, weights: &[f32], state: &[f32]) {
        let count = self.count();
        let (items, job) = (&self.items, self.items.job);
        let shape = job.arena.shape();
        let cols = shape.value_cols();
        let share = self.share(cols / COLUMNS);
        let (col, len) = (share.start * COLUMNS, share.len() * COLUMNS);
        let mut memory = scratch::take(count * (len + 1));
        let (acc, total) = memory.split_at_mut(count * len);
        acc.fill(0.0);
        total.fill(0.0);
        let table = job.queries[items.rows.start].pages;
        for page in self.pages.clone() {
            let head = job.arena.head(table[page], job.layer, items.kv_head);
            let row = self.row(page);
            let weights = &weights[row * count * PAGE_TOKENS..(row + 1) * count * PAGE_TOKENS];
            let (keep, sum) = state[row * 2 * count..(row + 1) * 2 * count].split_at(count);
            for g in 0..items.groups.count() {
                let (first, end) = (items.groups.first(g), items.groups.first(g + 1));
                let weights = &weights[first * PAGE_TOKENS..];
                let added = &mut acc[first * len..];
                items.add(
                    g,
                    page,
                    head,
                    (col, len),
                    weights,
                    &keep[first..],
                    Ahead::NOTHING,
                    added,
                );
                for item in (first..end).filter(|&item| items.sees(item, page)) {
                    total[item] = total[item].mul_add(keep[item], sum[item]);
                }
            }
        }
        items.finish(acc, total, col, len);
    }
}
