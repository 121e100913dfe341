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
//! Memory: per thread two blocks of 256 queries × the keys that they see.

use std::ops::Range;

use crate::{
    cpu::Cpu,
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::{
        function::exp,
        leaves::LeafPlan,
        matmul::matmul,
        row_sums::{Factor, sum_rows},
        softmax::largest,
        sum,
        tree::{LEAF, merges},
    },
    rows::{Rows, RowsMut},
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

fn packed(rows: &[&[f32]], width: usize) -> PackedMatrix {
    let values = rows.concat();
    PackedMatrix::pack(DType::F32, rows.len(), width, Source::F32(&values))
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
    let AttentionShape { heads, kv_heads, head_dim, scale, window } = shape;
    let (wide, narrow, len) = (heads * head_dim, kv_heads * head_dim, rows.len());
    let kv_at = kv_head * head_dim;
    let keys = cut(given.k, narrow, rows.clone(), kv_at, head_dim);
    let values = cut(given.v, narrow, rows.clone(), kv_at, head_dim);
    let blocks = len.div_ceil(LEAF);
    let block = |b: usize| b * LEAF..((b + 1) * LEAF).min(len);
    let packs: Vec<[PackedMatrix; 2]> = (0..blocks)
        .map(|b| [&keys, &values].map(|rows| packed(&rows[block(b)], head_dim)))
        .collect();
    let group = heads / kv_heads;
    let mut sums: Option<[Vec<f32>; 2]> = None;
    for head in kv_head * group..(kv_head + 1) * group {
        let at = head * head_dim;
        let queries = cut(given.q, wide, rows.clone(), at, head_dim);
        let outs = cut(given.out, wide, rows.clone(), at, head_dim);
        let douts = cut(given.dout, wide, rows.clone(), at, head_dim);
        let mut trees: [Vec<Vec<f32>>; 2] = [Vec::new(), Vec::new()];
        for b in 0..blocks {
            let here = block(b);
            let seen = here.end;
            // Keys before this are seen by none of the block.
            let first = window.map_or(0, |w| (here.start + 1).saturating_sub(w as usize));
            let (mut p, mut dp) = (vec![0.0; here.len() * seen], vec![0.0; here.len() * seen]);
            for (kb, pack) in packs.iter().enumerate().take(b + 1).skip(first / LEAF) {
                let to = block(kb);
                let mut part = vec![0.0; here.len() * to.len()];
                for (side, from, all) in [(0, &queries, &mut p), (1, &douts, &mut dp)] {
                    let from = Rows::List(&from[here.clone()]);
                    matmul(cpu, from, &pack[side], None, &mut part);
                    for (row, part) in part.chunks_exact(to.len()).enumerate() {
                        all[row * seen..][to.clone()].copy_from_slice(part);
                    }
                }
            }
            for (r, i) in here.clone().enumerate() {
                let from = window.map_or(0, |w| (i + 1).saturating_sub(w as usize));
                let along = sum::dot(cpu.simd(), outs[i], douts[i]);
                let (p, dp) = (&mut p[r * seen..][..seen], &mut dp[r * seen..][..seen]);
                score_gradient(cpu.simd(), p, dp, from, i + 1, scale, along);
            }
            let mut dq = vec![0.0; here.len() * head_dim];
            let over_keys = LeafPlan::of(seen);
            let factor = Factor::PerOutput(Rows::dense(&dp, seen));
            let keys = Rows::List(&keys[..seen]);
            sum_rows(cpu, factor, keys, head_dim, &over_keys, &mut dq);
            for (row, dq) in here.clone().zip(dq.chunks_exact(head_dim)) {
                // SAFETY: every task has its own rows and heads.
                unsafe { out.dq.part(rows.start + row, at, head_dim) }.copy_from_slice(dq);
            }
            let leaf = LeafPlan::one_leaf(here.len());
            for (tree, (factors, of)) in trees.iter_mut().zip([(&dp, &queries), (&p, &douts)]) {
                let mut sum = vec![0.0; seen * head_dim];
                let factor = Factor::PerTerm(Rows::dense(factors, seen));
                let of = Rows::List(&of[here.clone()]);
                sum_rows(cpu, factor, of, head_dim, &leaf, &mut sum);
                for _ in 0..merges(b, blocks) {
                    // An earlier block has seen no later key.
                    let earlier = tree.pop().unwrap_or_default();
                    for (sum, earlier) in sum.iter_mut().zip(earlier) {
                        *sum += earlier;
                    }
                }
                tree.push(sum);
            }
        }
        let of_head = trees.map(|mut tree| tree.pop().unwrap_or_default());
        match &mut sums {
            None => sums = Some(of_head),
            Some(sums) => {
                for (sum, more) in sums.iter_mut().zip(of_head) {
                    super::elementwise::add(cpu, sum, &more);
                }
            }
        }
    }
    for (sum, to) in sums.iter().flatten().zip([out.dk, out.dv]) {
        for (row, sum) in rows.clone().zip(sum.chunks_exact(head_dim)) {
            // SAFETY: every task has its own rows and key/value head.
            unsafe { to.part(row, kv_at, head_dim) }.copy_from_slice(sum);
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
