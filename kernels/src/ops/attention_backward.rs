//! Backward of causal attention over whole sequences that begin at position 0.
//!
//! Shapes: q, out and dout `[rows, heads * head_dim]`, k and v `[rows, kv_heads * head_dim]`, the
//! sequences' rows one behind the other. Query head h reads key/value head h / (heads / kv_heads).
//!
//! The rule, for query i and key j of one sequence and one head, j in `first..=i` as forward has it:
//! 1. The score `s_ij = (q_i · k_j by rule 1) · scale`; over the visible keys m = their maximum,
//!    `w_ij = exp(s_ij − m)`, their sum by rule 3 over positions `0..=i` (0 for keys out of the window),
//!    `p_ij = w_ij / sum`.
//! 2. `dp_ij = dout_i · v_j` by rule 1, `along_i = Σ_c out_ic dout_ic` by rule 3,
//!    `ds_ij = p_ij (dp_ij − along_i) · scale`.
//! 3. `dq_i = Σ_j ds_ij k_j`: rule 1 over positions of keys.
//! 4. `dk_j = Σ_i ds_ij q_i` and `dv_j = Σ_i p_ij dout_i`: leaves of [`LEAF`] positions of queries,
//!    upwards, in the tree (rule 8; leaves before the key's own are left out); then over the heads that
//!    share the key/value head, upwards from the first.
//!
//! Memory: per thread two blocks of 256 queries × the keys that they see, and two of keys × head_dim for each level of the
//! tree over blocks and two more.

use std::ops::Range;

use crate::{
    cpu::Cpu,
    ops::{
        function::exp,
        leaves::LeafPlan,
        panel_sums::{Job, Panels, Sink},
        panels::{Packed, panel_width},
        row_sums::Factor,
        softmax::largest,
        sum,
        tree::{LEAF, merges},
    },
    rows::{Rows, RowsMut},
    scratch,
    simd::vectorised,
};

/// The model's attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Keys that a query sees, its own included.
    pub window: Option<u32>,
}

/// What attention was given and gave, and the gradient of what it gave.
#[derive(Debug, Clone, Copy)]
pub struct Attended<'a> {
    /// Queries, after rope.
    pub q: &'a [f32],
    /// Keys, after rope.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// The output.
    pub out: &'a [f32],
    /// Its gradient.
    pub dout: &'a [f32],
}

/// Gradients of q, k and v; each as large as they are.
#[derive(Debug)]
pub struct AttentionGradients<'a> {
    /// Of q.
    pub dq: &'a mut [f32],
    /// Of k.
    pub dk: &'a mut [f32],
    /// Of v.
    pub dv: &'a mut [f32],
}

/// See the module's text. `sequences` are ranges of rows that cover all of them, in order.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn attention_backward(
    cpu: &Cpu,
    shape: AttentionShape,
    sequences: &[Range<usize>],
    given: Attended<'_>,
    gradients: AttentionGradients<'_>,
) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let rows = sequences.last().map_or(0, |s| s.end);
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "heads share key/value heads");
    for (part, cols) in [
        (given.q.len(), wide),
        (given.out.len(), wide),
        (given.dout.len(), wide),
        (gradients.dq.len(), wide),
        (given.k.len(), narrow),
        (given.v.len(), narrow),
        (gradients.dk.len(), narrow),
        (gradients.dv.len(), narrow),
    ] {
        assert_eq!(part, rows * cols, "one row of every part per row of the sequences");
    }
    let AttentionGradients { dq, dk, dv } = gradients;
    let out = Out {
        dq: RowsMut::dense(dq, wide),
        dk: RowsMut::dense(dk, narrow),
        dv: RowsMut::dense(dv, narrow),
    };
    let tasks = sequences.len() * kv_heads;
    cpu.pool().run(tasks, &|task| {
        // Longer sequences are no later than others: they come in the caller's order.
        let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
        one_head(cpu, shape, sequences[sequence].clone(), kv_head, given, &out);
    });
}

struct Out<'a> {
    dq: RowsMut<'a>,
    dk: RowsMut<'a>,
    dv: RowsMut<'a>,
}

/// Rows of `values`, `cols` wide, cut to `width` columns from `at`.
fn cut(values: &[f32], cols: usize, rows: Range<usize>, at: usize, width: usize) -> Vec<&[f32]> {
    rows.map(|row| &values[row * cols + at..][..width]).collect()
}

/// One sequence, one key/value head and the heads that share it.
fn one_head(
    cpu: &Cpu,
    shape: AttentionShape,
    rows: Range<usize>,
    kv_head: usize,
    given: Attended<'_>,
    out: &Out<'_>,
) {
    if rows.is_empty() {
        return;
    }
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let (wide, narrow, len) = (heads * head_dim, kv_heads * head_dim, rows.len());
    let kv_at = kv_head * head_dim;
    let keys = cut(given.k, narrow, rows.clone(), kv_at, head_dim);
    let values = cut(given.v, narrow, rows.clone(), kv_at, head_dim);
    let of = Head {
        cpu,
        shape,
        over_head: LeafPlan::of(head_dim),
        keys: Packed::rows(cpu.simd(), Rows::List(&keys)),
        turned: [&keys, &values].map(|rows| Packed::columns(cpu, Rows::List(rows))),
    };
    let blocks = len.div_ceil(LEAF);
    let group = heads / kv_heads;
    let size = len.min(LEAF) * len;
    let (mut p, mut dp) = (scratch::take(size), scratch::take(size));
    let mut dq = scratch::take(STEP * head_dim);
    // Sums of the heads so far, of this head, and of its blocks that wait.
    let sums_len = len * head_dim;
    let mut memory = scratch::take(2 * sums_len * (levels(blocks) + 1));
    let (sums, stack) = memory.split_at_mut(2 * sums_len);
    for head in kv_head * group..(kv_head + 1) * group {
        let at = head * head_dim;
        let queries = cut(given.q, wide, rows.clone(), at, head_dim);
        let outs = cut(given.out, wide, rows.clone(), at, head_dim);
        let douts = cut(given.dout, wide, rows.clone(), at, head_dim);
        // Keys that each waiting sum has.
        let mut waiting: Vec<usize> = Vec::new();
        for b in 0..blocks {
            let here = b * LEAF..((b + 1) * LEAF).min(len);
            let seen = here.end;
            for step in here.clone().step_by(STEP) {
                let step = step..(step + STEP).min(here.end);
                let [p, dp] =
                    [&mut p, &mut dp].map(|all| &mut all[(step.start - here.start) * seen..]);
                of.scores(&step, [&queries, &douts], [&mut *p, &mut *dp], seen);
                for (r, i) in step.clone().enumerate() {
                    let along = sum::dot(cpu.simd(), outs[i], douts[i]);
                    let [p, dp] = [&mut *p, &mut *dp].map(|all| &mut all[r * seen..][..step.end]);
                    let from = shape.window.map_or(0, |w| (i + 1).saturating_sub(w as usize));
                    score_gradient(cpu.simd(), p, dp, from, i + 1, shape.scale, along);
                }
                of.query_gradients(&step, dp, seen, &mut dq);
                for (row, dq) in step.zip(dq.chunks_exact(head_dim)) {
                    // SAFETY: every task has its own rows and heads.
                    unsafe { out.dq.part(rows.start + row, at, head_dim) }.copy_from_slice(dq);
                }
            }
            let top = waiting.len() * 2 * sums_len;
            let (below, sum) = stack.split_at_mut(top);
            for (side, (factors, rows)) in [(&dp, &queries), (&p, &douts)].into_iter().enumerate() {
                let sum = &mut sum[side * sums_len..][..seen * head_dim];
                of.key_sums(&here, &factors[..here.len() * seen], &rows[here.clone()], sum);
                for (level, &earlier) in waiting.iter().enumerate().rev().take(merges(b, blocks)) {
                    // An earlier block has seen no later key.
                    let below = &below[(2 * level + side) * sums_len..][..earlier * head_dim];
                    super::elementwise::add(cpu, &mut sum[..below.len()], below);
                }
            }
            let keep = waiting.len() - merges(b, blocks);
            if keep < waiting.len() {
                stack.copy_within(top..top + 2 * sums_len, keep * 2 * sums_len);
            }
            waiting.truncate(keep);
            waiting.push(seen);
        }
        let of_head = &stack[..2 * sums_len];
        if head == kv_head * group {
            sums.copy_from_slice(of_head);
        } else {
            super::elementwise::add(cpu, sums, of_head);
        }
    }
    for (sum, to) in sums.chunks_exact(sums_len).zip([out.dk, out.dv]) {
        for (row, sum) in rows.clone().zip(sum.chunks_exact(head_dim)) {
            // SAFETY: every task has its own rows and key/value head.
            unsafe { to.part(row, kv_at, head_dim) }.copy_from_slice(sum);
        }
    }
}

/// Queries whose scores are computed together. They see about as many keys, and keys that none of them sees are
/// left out. What some of them do not see is a term of zero, which changes a finite sum in nothing but the sign of a zero.
const STEP: usize = 32;

/// Sums that wait at the same time, at most, and the one that comes.
fn levels(blocks: usize) -> usize {
    (usize::BITS - blocks.leading_zeros()) as usize
}

/// What the heads of one key/value head have in common.
struct Head<'a> {
    cpu: &'a Cpu,
    shape: AttentionShape,
    over_head: LeafPlan,
    /// Keys `[key][head_dim]`.
    keys: Packed,
    /// Keys and values `[head_dim][key]`.
    turned: [Packed; 2],
}

impl Head<'_> {
    /// q · k and dout · v of some queries and all keys up to the last that they see; rows are `stride` long.
    fn scores(
        &self,
        queries: &Range<usize>,
        sides: [&[&[f32]]; 2],
        out: [&mut [f32]; 2],
        stride: usize,
    ) {
        // Keys before this are seen by none.
        let first = self.shape.window.map_or(0, |w| (queries.start + 1).saturating_sub(w as usize));
        let width = panel_width(self.cpu.simd());
        for ((rows, panels), out) in sides.into_iter().zip(&self.turned).zip(out) {
            Job {
                factor: Factor::PerOutput(Rows::List(&rows[queries.clone()])),
                panels: Panels::Packed { panels, first: 0 },
                first_output: 0,
                outputs: queries.len(),
                first_column: first / width * width,
                columns: queries.end,
                plan: &self.over_head,
                sink: Sink::Rows(RowsMut::dense(&mut out[..queries.len() * stride], stride)),
            }
            .run(self.cpu);
        }
    }

    /// Σ_j ds_ij k_j of some queries.
    fn query_gradients(&self, queries: &Range<usize>, ds: &[f32], stride: usize, out: &mut [f32]) {
        let head_dim = self.shape.head_dim;
        let ds = Rows::dense(&ds[..queries.len() * stride], stride);
        Job {
            factor: Factor::PerOutput(ds),
            panels: Panels::Packed { panels: &self.keys, first: 0 },
            first_output: 0,
            outputs: queries.len(),
            first_column: 0,
            columns: head_dim,
            plan: &LeafPlan::of(queries.end),
            sink: Sink::Rows(RowsMut::dense(&mut out[..queries.len() * head_dim], head_dim)),
        }
        .run(self.cpu);
    }

    /// Σ_i factor_ij row_i over the queries of one leaf, for each key that one of them sees.
    fn key_sums(&self, leaf: &Range<usize>, factors: &[f32], rows: &[&[f32]], out: &mut [f32]) {
        let (head_dim, seen) = (self.shape.head_dim, leaf.end);
        let panels = Packed::rows(self.cpu.simd(), Rows::List(rows));
        for key in (0..seen).step_by(STEP) {
            // Queries before the key do not see it.
            let first = key.saturating_sub(leaf.start) / STEP * STEP;
            Job {
                factor: Factor::PerTerm(Rows::dense(&factors[first * seen..], seen)),
                panels: Panels::Packed { panels: &panels, first },
                first_output: key,
                outputs: STEP.min(seen - key),
                first_column: 0,
                columns: head_dim,
                plan: &LeafPlan::one_leaf(leaf.len() - first),
                sink: Sink::Rows(RowsMut::dense(out, head_dim)),
            }
            .run(self.cpu);
        }
    }
}

vectorised! {
    /// Scores become probabilities, and gradients of probabilities those of scores. Keys `from..to`
    /// are visible; the others have 0 in both.
    fn score_gradient(p: &mut [f32], dp: &mut [f32], from: usize, to: usize, scale: f32, along: f32) {
        p[..from].fill(0.0);
        p[to..].fill(0.0);
        dp[..from].fill(0.0);
        dp[to..].fill(0.0);
        for s in &mut p[from..to] {
            *s *= scale;
        }
        let largest = largest(&p[from..to]);
        for s in &mut p[from..to] {
            *s = exp(*s - largest);
        }
        let total = sum::sum(&p[..to]);
        for (p, dp) in p[from..to].iter_mut().zip(&mut dp[from..to]) {
            *p /= total;
            *dp = *p * (*dp - along) * scale;
        }
    }
}
