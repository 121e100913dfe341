//! What attention does with one page, for a few rows at a time: products with its keys, weights,
//! and the sum of its values. See the text of [`super`] for the rule.
//!
//! Registers hold R rows times N vectors of keys or columns; every format widens what it loads
//! to f32, so that all formats share these loops.

// Registers are arrays that are indexed alike; iterators would hide which lane meets which.
#![allow(clippy::needless_range_loop)]

use crate::{
    kv::{KvDType, PAGE_TOKENS},
    ops::{
        function::exp,
        sum::LANES,
        tree::{LEAF, merges},
    },
    simd::{Kernel, Simd, Vector, prefetch, vectorised},
};

/// Most rows that registers hold.
pub(super) const ROWS_MAX: usize = 6;

/// Reads cached numbers: rows of one length, of all positions of a key's element or all columns
/// of a position's value.
trait Format {
    /// Bytes of one number.
    const BYTES: usize;
    /// Whether two rows share words, the first in the low halves.
    const PAIRS: bool;

    /// LANES numbers of the first or second of a pair of rows, or of a row by itself.
    ///
    /// # Safety
    /// The numbers are readable, and the machine has V's instructions.
    unsafe fn load<V: Vector, const SECOND: bool>(from: *const u8) -> V;
}

struct F32;
struct Bf16;
struct Int8;

impl Format for F32 {
    const BYTES: usize = 4;
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn load<V: Vector, const SECOND: bool>(from: *const u8) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load(from.cast()) }
    }
}

impl Format for Bf16 {
    const BYTES: usize = 2;
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn load<V: Vector, const SECOND: bool>(from: *const u8) -> V {
        // SAFETY: promised by the caller.
        unsafe {
            if SECOND { V::load_bf16_high(from.cast()) } else { V::load_bf16_low(from.cast()) }
        }
    }
}

impl Format for Int8 {
    const BYTES: usize = 1;
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn load<V: Vector, const SECOND: bool>(from: *const u8) -> V {
        // SAFETY: promised by the caller.
        unsafe {
            let from = from.cast::<i8>();
            let mut wide = [0.0f32; 16];
            for lane in 0..V::LANES {
                wide[lane] = f32::from(*from.add(lane));
            }
            V::load(wide.as_ptr())
        }
    }
}

/// Whether V is plain Rust. It is there to compare with, so one shape of registers will do.
const fn is_plain<V: Vector>() -> bool {
    align_of::<V>() == align_of::<f32>()
}

/// Prefetches, row by row, what will be read later.
#[derive(Clone, Copy)]
pub(super) struct Prefetch {
    at: *const u8,
    step: usize,
}

impl Prefetch {
    /// Prefetches nothing.
    pub(super) const NOTHING: Self = Self { at: std::ptr::null(), step: 0 };

    /// Prefetches `bytes` bytes from `at` on, while `rows` rows are read.
    pub(super) fn over(at: *const u8, bytes: usize, rows: usize) -> Self {
        Self { at, step: bytes / rows.max(1) }
    }

    /// The share of reader i of n that read the same `rows` rows one after another: memory is
    /// then busy all the time, not only while the first reads.
    #[inline(always)]
    pub(super) fn share(self, i: usize, n: usize, rows: usize) -> Self {
        let step = self.step / n;
        Self { at: self.at.wrapping_add(i * rows * step), step }
    }

    #[inline(always)]
    fn row(&mut self) {
        for line in (0..self.step).step_by(64) {
            prefetch(self.at.wrapping_add(line));
        }
        self.at = self.at.wrapping_add(self.step);
    }
}

/// `acc[r][v] += x[r] · numbers[v]`: x is `stride` apart from row to row.
///
/// # Safety
/// R values of x and N vectors are readable.
#[inline(always)]
unsafe fn step<V: Vector, F: Format, const SECOND: bool, const R: usize, const N: usize>(
    acc: &mut [[V; N]; R],
    x: *const f32,
    stride: usize,
    from: *const u8,
) {
    // A word of a pair holds a number of this row.
    let bytes = if F::PAIRS { 2 * F::BYTES } else { F::BYTES } * V::LANES;
    // SAFETY: promised by the caller.
    unsafe {
        // Keep the fewer in registers, and stream the others past them.
        if R < N {
            let mut xs = [V::zero(); R];
            for r in 0..R {
                xs[r] = V::splat(*x.add(r * stride));
            }
            for v in 0..N {
                let n = F::load::<V, SECOND>(from.add(v * bytes));
                for r in 0..R {
                    acc[r][v] = acc[r][v].fma(xs[r], n);
                }
            }
        } else {
            let mut ns = [V::zero(); N];
            for v in 0..N {
                ns[v] = F::load::<V, SECOND>(from.add(v * bytes));
            }
            for r in 0..R {
                let x = V::splat(*x.add(r * stride));
                for v in 0..N {
                    acc[r][v] = acc[r][v].fma(x, ns[v]);
                }
            }
        }
    }
}

/// Rows of numbers, and what each is to be multiplied with.
#[derive(Clone, Copy)]
struct Stream {
    /// Row 0's first number that is wanted.
    rows: *const u8,
    /// Numbers of a row.
    len: usize,
    /// The rows that are wanted.
    from: usize,
    to: usize,
    /// Row 0's values of x: `stride` apart, and `next` from row to row.
    x: *const f32,
    stride: usize,
    next: usize,
    ahead: Prefetch,
}

/// `acc += x · row` for all rows upwards.
///
/// # Safety
/// R values of x and N vectors of every row are readable.
#[inline(always)]
unsafe fn accumulate<V: Vector, F: Format, const R: usize, const N: usize>(
    acc: &mut [[V; N]; R],
    stream: Stream,
) {
    let Stream { rows, len, from, to, x, stride, next, mut ahead } = stream;
    let row_bytes = len * F::BYTES;
    // SAFETY: promised by the caller.
    unsafe {
        if !F::PAIRS {
            for i in from..to {
                ahead.row();
                let row = rows.add(i * row_bytes);
                step::<V, F, false, R, N>(acc, x.add(i * next), stride, row);
            }
            return;
        }
        let pair = |i: usize| rows.add(i / 2 * 2 * row_bytes);
        let mut i = from;
        if i < to && i % 2 == 1 {
            step::<V, F, true, R, N>(acc, x.add(i * next), stride, pair(i));
            i += 1;
        }
        while i + 2 <= to {
            ahead.row();
            ahead.row();
            step::<V, F, false, R, N>(acc, x.add(i * next), stride, pair(i));
            step::<V, F, true, R, N>(acc, x.add((i + 1) * next), stride, pair(i));
            i += 2;
        }
        if i < to {
            step::<V, F, false, R, N>(acc, x.add(i * next), stride, pair(i));
        }
    }
}

/// How many of `rows` rows go into registers at once.
#[inline(always)]
fn together<V: Vector>(rows: usize) -> usize {
    match rows {
        _ if is_plain::<V>() => 1,
        6.. => 6,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Rows of q and the keys of a page that they meet.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    /// How the keys are kept.
    pub(super) dtype: KvDType,
    /// `[head_dim][rows]`.
    pub(super) q: *const f32,
    pub(super) rows: usize,
    pub(super) head_dim: usize,
    pub(super) keys: *const u8,
    /// Keys `from..to` are wanted; others may be computed.
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) ahead: Prefetch,
}

/// Values of stack that [`products`] needs.
pub(super) fn stack_len(head_dim: usize) -> usize {
    match head_dim.div_ceil(LEAF) {
        0 | 1 => 0,
        leaves => (leaves.ilog2() as usize + 1) * ROWS_MAX * PAGE_TOKENS,
    }
}

/// Products of the rows with the keys by rule 1, into `out`, `[rows][PAGE_TOKENS]`.
///
/// # Safety
/// At most [`ROWS_MAX`] rows; q and the keys are whole, and kept as they say; `stack` has
/// [`stack_len`] values; `out` has room.
pub(super) unsafe fn products(simd: Simd, keys: Keys, stack: *mut f32, out: *mut f32) {
    simd.run(Products { keys, stack, out });
}

/// See [`products`], whose promises its maker gives.
struct Products {
    keys: Keys,
    stack: *mut f32,
    out: *mut f32,
}

impl Kernel for Products {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self { keys, stack, out } = self;
        // SAFETY: promised by the caller and by the maker.
        unsafe {
            match keys.dtype {
                KvDType::F32 => leaves::<V, F32>(keys, stack, out),
                KvDType::Bf16 => leaves::<V, Bf16>(keys, stack, out),
                KvDType::Int8 => leaves::<V, Int8>(keys, stack, out),
            }
        }
    }
}

/// All leaves and their tree.
///
/// # Safety
/// As [`products`], of format F, and the machine has V's instructions.
#[inline(always)]
unsafe fn leaves<V: Vector, F: Format>(keys: Keys, stack: *mut f32, out: *mut f32) {
    let count = keys.head_dim.div_ceil(LEAF);
    let level = keys.rows * PAGE_TOKENS;
    let mut waiting = 0;
    for index in 0..count {
        let from = index * LEAF;
        // SAFETY: LEAF is even, so a leaf starts at a pair; levels are inside the stack.
        unsafe {
            let q = keys.q.add(from * keys.rows);
            let leaf_keys = keys.keys.add(from * PAGE_TOKENS * F::BYTES);
            let part =
                Keys { q, keys: leaf_keys, head_dim: LEAF.min(keys.head_dim - from), ..keys };
            // The only leaf goes straight to where it is wanted.
            let to = if count == 1 { out } else { stack.add(waiting * level) };
            leaf_rows::<V, F>(part, to);
            waiting += 1;
            let merges = merges(index, count);
            for merge in 1..=merges {
                waiting -= 1;
                let last = merge == merges && index + 1 == count;
                let later = stack.add(waiting * level);
                let earlier = stack.add((waiting - 1) * level);
                let to = if last { out } else { earlier };
                for i in (0..level).step_by(V::LANES) {
                    V::load(earlier.add(i)).add(V::load(later.add(i))).store(to.add(i));
                }
            }
        }
    }
}

/// One leaf of the products of all rows.
///
/// # Safety
/// As [`leaves`]; `out` has room for `[rows][PAGE_TOKENS]`.
#[inline(always)]
unsafe fn leaf_rows<V: Vector, F: Format>(mut keys: Keys, out: *mut f32) {
    let mut done = 0;
    while done < keys.rows {
        let r = together::<V>(keys.rows - done);
        // SAFETY: promised by the caller.
        unsafe {
            let q = keys.q.add(done);
            let out = out.add(done * PAGE_TOKENS);
            match (V::LANES, r) {
                _ if is_plain::<V>() => leaf::<V, F, 1, 1>(keys, q, out),
                // A page that is only begun is read as far as it is wanted.
                (16, 1) if keys.to <= 16 => leaf::<V, F, 1, 1>(keys, q, out),
                (16, 1) if keys.to <= 32 => leaf::<V, F, 1, 2>(keys, q, out),
                (16, 1) => leaf::<V, F, 1, 4>(keys, q, out),
                (8, 2) => leaf::<V, F, 2, 4>(keys, q, out),
                (_, 1) => leaf::<V, F, 1, 8>(keys, q, out),
                (_, 2) => leaf::<V, F, 2, 4>(keys, q, out),
                (8, 4) => leaf::<V, F, 4, 2>(keys, q, out),
                (_, 4) => leaf::<V, F, 4, 4>(keys, q, out),
                (8, _) => leaf::<V, F, 6, 2>(keys, q, out),
                (_, _) => leaf::<V, F, 6, 4>(keys, q, out),
            }
        }
        done += r;
        keys.ahead = Prefetch::NOTHING;
    }
}

/// One leaf of the products of R rows, N vectors of keys at a time.
///
/// # Safety
/// As [`leaf_rows`].
#[inline(always)]
unsafe fn leaf<V: Vector, F: Format, const R: usize, const N: usize>(
    keys: Keys,
    q: *const f32,
    out: *mut f32,
) {
    let parts = PAGE_TOKENS / (N * V::LANES);
    let number = if F::PAIRS { 2 * F::BYTES } else { F::BYTES };
    for p in 0..parts {
        let part = p * N * V::LANES;
        if part >= keys.to || part + N * V::LANES <= keys.from {
            continue;
        }
        // SAFETY: promised by the caller.
        unsafe {
            let mut acc = [[V::zero(); N]; R];
            let rows = keys.keys.add(part * number);
            let (from, to, len) = (0, keys.head_dim, PAGE_TOKENS);
            let (x, stride, next) = (q, 1, keys.rows);
            let ahead = keys.ahead.share(p, parts, keys.head_dim);
            let stream = Stream { rows, len, from, to, x, stride, next, ahead };
            accumulate::<V, F, R, N>(&mut acc, stream);
            for r in 0..R {
                for v in 0..N {
                    acc[r][v].store(out.add(r * PAGE_TOKENS + part + v * V::LANES));
                }
            }
        }
    }
}

vectorised! {
    /// Products become scores: times the keys' scales where there are some, times `scale`, and
    /// −infinity where the key is not visible, which weighs exactly 0. Returns the largest.
    pub(super) fn to_scores(
        products: &mut [f32; PAGE_TOKENS],
        key_scales: Option<&[f32; PAGE_TOKENS]>,
        scale: f32,
        seen: (usize, usize),
    ) -> f32 {
        if let Some(scales) = key_scales {
            for i in 0..PAGE_TOKENS {
                products[i] *= scales[i];
            }
        }
        for product in products.iter_mut() {
            *product *= scale;
        }
        products[..seen.0].fill(f32::NEG_INFINITY);
        products[seen.1..].fill(f32::NEG_INFINITY);
        let mut lanes = [f32::NEG_INFINITY; 16];
        for chunk in products.as_chunks::<16>().0 {
            for i in 0..16 {
                lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            }
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
            }
        }
        lanes[0]
    }
}

vectorised! {
    /// Scores of a page become weights and are added to the leaf's lanes; then weights take the
    /// values' scales where there are some.
    pub(super) fn to_weights(
        scores: &mut [f32; PAGE_TOKENS],
        value_scales: Option<&[f32; PAGE_TOKENS]>,
        largest: f32,
        lanes: &mut [f32; LANES],
    ) {
        for score in scores.iter_mut() {
            *score = exp(*score - largest);
        }
        // A page begins at a whole number of lanes.
        let mut sums = *lanes;
        for chunk in scores.as_chunks::<LANES>().0 {
            for i in 0..LANES {
                sums[i] += chunk[i];
            }
        }
        *lanes = sums;
        if let Some(scales) = value_scales {
            for i in 0..PAGE_TOKENS {
                scores[i] *= scales[i];
            }
        }
    }
}

/// What a leaf or a subtree of leaves gives one item.
pub(super) struct Node<'a> {
    /// The largest score.
    pub(super) most: &'a mut f32,
    /// The sum of weights.
    pub(super) total: &'a mut f32,
    /// Sums of values.
    pub(super) acc: &'a mut [f32],
}

vectorised! {
    /// Makes of the later of two nodes that which is above both.
    pub(super) fn meet(earlier: Node<'_>, later: Node<'_>) {
        let most = if *later.most > *earlier.most { *later.most } else { *earlier.most };
        let (e, f) = (exp(*earlier.most - most), exp(*later.most - most));
        *later.most = most;
        *later.total = *earlier.total * e + *later.total * f;
        for (later, &mut earlier) in later.acc.iter_mut().zip(earlier.acc) {
            *later = earlier * e + *later * f;
        }
    }
}

/// Rows of weights and the values of a page that they meet.
#[derive(Clone, Copy)]
pub(super) struct Values {
    /// How the values are kept.
    pub(super) dtype: KvDType,
    /// `[rows][PAGE_TOKENS]`.
    pub(super) weights: *const f32,
    pub(super) rows: usize,
    pub(super) values: *const u8,
    /// Values of one position: whole vectors of any width.
    pub(super) cols: usize,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) ahead: Prefetch,
}

/// `acc += weight · value` for values `from..to` upwards; acc is `[rows][cols]`.
///
/// # Safety
/// At most [`ROWS_MAX`] rows; everything is inside what it points to, and kept as it says.
pub(super) unsafe fn add_values(simd: Simd, values: Values, acc: *mut f32) {
    simd.run(AddValues { values, acc });
}

/// See [`add_values`], whose promises its maker gives.
struct AddValues {
    values: Values,
    acc: *mut f32,
}

impl Kernel for AddValues {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: promised by the caller and by the maker.
        unsafe {
            match self.values.dtype {
                KvDType::F32 => all_columns::<V, F32>(self.values, self.acc),
                KvDType::Bf16 => all_columns::<V, Bf16>(self.values, self.acc),
                KvDType::Int8 => all_columns::<V, Int8>(self.values, self.acc),
            }
        }
    }
}

/// All columns, as many at a time as registers hold.
///
/// # Safety
/// As [`add_values`], of format F, and the machine has V's instructions.
#[inline(always)]
unsafe fn all_columns<V: Vector, F: Format>(mut values: Values, acc: *mut f32) {
    let ahead = values.ahead;
    let mut done = 0;
    while done < values.rows {
        let r = together::<V>(values.rows - done);
        let mut col = 0;
        while col < values.cols {
            let left = (values.cols - col) / V::LANES;
            let at = (done, col);
            let strips = (values.cols / (4 * V::LANES)).max(1);
            let strip = col / (4 * V::LANES);
            values.ahead = match done == 0 && strip < strips {
                true => ahead.share(strip, strips, PAGE_TOKENS),
                false => Prefetch::NOTHING,
            };
            // SAFETY: promised by the caller; columns are inside by `left`.
            col += unsafe {
                match (V::LANES, r, left) {
                    _ if is_plain::<V>() => columns::<V, F, 1, 1>(values, at, acc),
                    (_, 1, 8..) => columns::<V, F, 1, 8>(values, at, acc),
                    (16, 2, 8..) => columns::<V, F, 2, 8>(values, at, acc),
                    (_, 1, 4..) => columns::<V, F, 1, 4>(values, at, acc),
                    (_, 2, 4..) => columns::<V, F, 2, 4>(values, at, acc),
                    (4 | 16, 4, 4..) => columns::<V, F, 4, 4>(values, at, acc),
                    (4 | 16, _, 4..) => columns::<V, F, 6, 4>(values, at, acc),
                    (8, 1, _) => columns::<V, F, 1, 2>(values, at, acc),
                    (8, 2, _) => columns::<V, F, 2, 2>(values, at, acc),
                    (8, 4, _) => columns::<V, F, 4, 2>(values, at, acc),
                    (8, _, _) => columns::<V, F, 6, 2>(values, at, acc),
                    (_, 1, _) => columns::<V, F, 1, 1>(values, at, acc),
                    (_, 2, _) => columns::<V, F, 2, 1>(values, at, acc),
                    (_, 4, _) => columns::<V, F, 4, 1>(values, at, acc),
                    (_, _, _) => columns::<V, F, 6, 1>(values, at, acc),
                }
            };
        }
        done += r;
    }
}

/// N vectors of columns for R rows; returns how many columns that is.
///
/// # Safety
/// As [`all_columns`].
#[inline(always)]
unsafe fn columns<V: Vector, F: Format, const R: usize, const N: usize>(
    values: Values,
    (row, col): (usize, usize),
    acc: *mut f32,
) -> usize {
    let number = if F::PAIRS { 2 * F::BYTES } else { F::BYTES };
    // SAFETY: promised by the caller.
    unsafe {
        let acc = acc.add(row * values.cols + col);
        let mut sums = [[V::zero(); N]; R];
        for r in 0..R {
            for v in 0..N {
                sums[r][v] = V::load(acc.add(r * values.cols + v * V::LANES));
            }
        }
        let stream = Stream {
            rows: values.values.add(col * number),
            len: values.cols,
            from: values.from,
            to: values.to,
            x: values.weights.add(row * PAGE_TOKENS),
            stride: PAGE_TOKENS,
            next: 1,
            ahead: values.ahead,
        };
        accumulate::<V, F, R, N>(&mut sums, stream);
        for r in 0..R {
            for v in 0..N {
                sums[r][v].store(acc.add(r * values.cols + v * V::LANES));
            }
        }
    }
    N * V::LANES
}
