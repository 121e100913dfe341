//! Value by value: add, weighted sums, clamp, the sigmoid gate; and how rows are shared out.

use crate::{
    cpu::Cpu,
    ops::{function::sigmoid, sum},
    rows::{Rows, RowsMut},
    simd::{Simd, vectorised},
};

/// Fewer values than this are not worth a second thread.
const INLINE_VALUES: usize = 1 << 15;

/// Calls `body(first row, rows)` for pieces of `values`, rows of `cols`, on all threads.
///
/// # Panics
/// If `values` is no whole number of rows.
pub(crate) fn for_rows(
    cpu: &Cpu,
    values: &mut [f32],
    cols: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    let work = values.len();
    for_rows_of(cpu, values, cols, work, body);
}

/// The same where a row is worth more than its own values: `work` are the values that all rows are made
/// of.
pub(crate) fn for_rows_of(
    cpu: &Cpu,
    values: &mut [f32],
    cols: usize,
    work: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert!(cols > 0 && values.len().is_multiple_of(cols), "values are whole rows");
    let rows = values.len() / cols;
    if work < INLINE_VALUES {
        body(0, values);
        return;
    }
    let pieces = rows.min(4 * cpu.pool().threads());
    let len = values.len();
    let values = RowsMut::dense(values, len);
    cpu.pool().run(pieces, &|i| {
        let (from, to) = (rows * i / pieces, rows * (i + 1) / pieces);
        // SAFETY: pieces do not overlap.
        body(from, unsafe { values.part(0, from * cols, (to - from) * cols) });
    });
}

/// `x += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(cpu: &Cpu, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "x and y are of one shape");
    for_rows(cpu, x, 1, |first, x| add_all(cpu.simd(), x, &y[first..][..x.len()]));
}

/// `out = x + y`.
///
/// # Panics
/// If the lengths differ.
pub fn sum(cpu: &Cpu, x: &[f32], y: &[f32], out: &mut [f32]) {
    assert!(x.len() == out.len() && y.len() == out.len(), "x, y and out are of one shape");
    for_rows(cpu, out, 1, |first, out| {
        let here = first..first + out.len();
        sum_all(cpu.simd(), &x[here.clone()], &y[here], out);
    });
}

/// `acc = weight · row + acc`, rounded once: one term of an expert combination.
///
/// # Panics
/// If the lengths differ.
pub fn weighted_add(acc: &mut [f32], weight: f32, row: &[f32]) {
    assert_eq!(acc.len(), row.len(), "acc and row are of one length");
    weighted_add_all(Simd::best(), acc, weight, row);
}

/// `out[r, :] = Σ weights[i] · parts[i]` for i in `ends[r - 1]..ends[r]`, in that order, each term
/// by a fused multiply-add, from +0.0.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn weighted_sum(cpu: &Cpu, parts: &[&[f32]], weights: &[f32], ends: &[u32], out: &mut [f32]) {
    assert_eq!(parts.len(), weights.len(), "one weight per part");
    assert_eq!(ends.last().map_or(0, |&end| end as usize), parts.len(), "ends cover the parts");
    if out.is_empty() {
        return;
    }
    assert!(out.len().is_multiple_of(ends.len()), "one end per row");
    let cols = out.len() / ends.len();
    assert!(parts.iter().all(|part| part.len() == cols), "parts are rows of out");
    for_rows(cpu, out, cols, |first, out| {
        let mut from = if first == 0 { 0 } else { ends[first - 1] as usize };
        for (out, &end) in out.chunks_exact_mut(cols).zip(&ends[first..]) {
            out.fill(0.0);
            for (part, &weight) in parts[from..end as usize].iter().zip(&weights[from..]) {
                weighted_add_all(cpu.simd(), out, weight, part);
            }
            from = end as usize;
        }
    });
}

/// `out[i, :] = x[rows[i], :]`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn select_rows(x: Rows<'_>, rows: &[u32], out: &mut [f32]) {
    if rows.is_empty() {
        assert!(out.is_empty(), "one output row per index");
        return;
    }
    let cols = out.len() / rows.len();
    assert_eq!(out.len(), rows.len() * cols, "one output row per index");
    if cols > 0 {
        for (out, &row) in out.chunks_exact_mut(cols).zip(rows) {
            out.copy_from_slice(x.row(row as usize));
        }
    }
}

/// Limits every value to `[-limit, limit]`; NaN stays NaN.
pub fn clamp(cpu: &Cpu, x: &mut [f32], limit: f32) {
    for_rows(cpu, x, 1, |_, x| clamp_all(cpu.simd(), x, limit));
}

/// The nearest value that bf16 can hold, ties to even; NaN stays NaN.
#[inline(always)]
pub fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    // Half of the last place that stays, less where a tie goes down.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let kept = if x.is_nan() { bits | 0x40_0000 } else { rounded };
    f32::from_bits(kept & 0xffff_0000)
}

/// Rounds every value to the nearest that bf16 can hold, ties to even; NaN stays NaN.
pub fn round_to_bf16(cpu: &Cpu, x: &mut [f32]) {
    for_rows(cpu, x, 1, |_, x| round_all(cpu.simd(), x));
}

/// Multiplies row r of x `[rows, cols]` by `sigmoid(logits[r])`.
///
/// # Panics
/// If there is not one logit per row.
pub fn sigmoid_gate(cpu: &Cpu, x: &mut [f32], logits: &[f32]) {
    if logits.is_empty() {
        assert!(x.is_empty(), "one logit per row");
        return;
    }
    assert!(x.len().is_multiple_of(logits.len()), "one logit per row");
    let cols = x.len() / logits.len();
    if cols > 0 {
        for_rows(cpu, x, cols, |first, x| gate_rows(cpu.simd(), x, cols, &logits[first..]));
    }
}

/// Backward of [`clamp`], in place on the gradient: it passes where the value was not limited, its
/// limits included.
///
/// # Panics
/// If the lengths differ.
pub fn clamp_backward(cpu: &Cpu, x: &[f32], limit: f32, dx: &mut [f32]) {
    assert_eq!(x.len(), dx.len(), "x and dx are of one shape");
    for_rows(cpu, dx, 1, |first, dx| {
        let len = dx.len();
        clamp_backward_all(cpu.simd(), &x[first..][..len], limit, dx);
    });
}

/// Backward of [`sigmoid_gate`] for y `[rows, cols]`, what came in: `dx = dy · σ`, and
/// `dlogit = σ (1 − σ) · Σ y dy`, the sum by rule 3.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn sigmoid_gate_backward(
    cpu: &Cpu,
    y: &[f32],
    logits: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dlogits: &mut [f32],
) {
    assert!(y.len() == dy.len() && y.len() == dx.len(), "y, dy and dx are of one shape");
    assert_eq!(logits.len(), dlogits.len(), "one gradient per logit");
    if y.is_empty() {
        return;
    }
    let cols = y.len() / logits.len();
    for (row, (&logit, dlogit)) in logits.iter().zip(dlogits).enumerate() {
        let gate = sigmoid(logit);
        let of = row * cols..(row + 1) * cols;
        let along = sum::dot(cpu.simd(), &y[of.clone()], &dy[of]);
        *dlogit = gate * (1.0 - gate) * along;
    }
    for_rows(cpu, dx, cols, |first, dx| {
        dx.copy_from_slice(&dy[first * cols..][..dx.len()]);
        gate_rows(cpu.simd(), dx, cols, &logits[first..]);
    });
}

/// `x *= factor`.
pub fn scale(cpu: &Cpu, x: &mut [f32], factor: f32) {
    for_rows(cpu, x, 1, |_, x| scale_all(cpu.simd(), x, factor));
}

vectorised! {
    fn scale_all(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

vectorised! {
    fn clamp_backward_all(x: &[f32], limit: f32, dx: &mut [f32]) {
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = if x > limit || x < -limit { 0.0 } else { *dx };
        }
    }
}

vectorised! {
    fn add_all(x: &mut [f32], y: &[f32]) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

vectorised! {
    fn sum_all(x: &[f32], y: &[f32], out: &mut [f32]) {
        for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
            *out = x + y;
        }
    }
}

vectorised! {
    pub(crate) fn weighted_add_all(acc: &mut [f32], weight: f32, row: &[f32]) {
        for (acc, &x) in acc.iter_mut().zip(row) {
            *acc = weight.mul_add(x, *acc);
        }
    }
}

vectorised! {
    fn clamp_all(x: &mut [f32], limit: f32) {
        for x in x {
            *x = if *x > limit { limit } else { *x };
            *x = if *x < -limit { -limit } else { *x };
        }
    }
}

vectorised! {
    fn round_all(x: &mut [f32]) {
        for x in x {
            *x = to_bf16(*x);
        }
    }
}

vectorised! {
    fn gate_rows(x: &mut [f32], cols: usize, logits: &[f32]) {
        for (row, &logit) in x.chunks_exact_mut(cols).zip(logits) {
            let gate = sigmoid(logit);
            for x in row {
                *x *= gate;
            }
        }
    }
}
