//! Launches for passes of few rows, each a sequence of its own: products of a single row
//! (`one.cu`), and what lies between products as few kernels (`attention.cu`).
//!
//! Such kernels read weights and older positions before the kernel before them has ended: nothing
//! that they read so may be written in the same pass.
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use super::{
    Cuda, Grid,
    compile::Source,
    fast::{Math, leaf_words},
    launch::{
        AttentionParts, Choose, DevKv, DevMatrix, DevQueries, Done, Experts, Linear, THREADS,
        WARPS, format, groups, kv_source, leaves, linears, row_words,
    },
    memory::{Args, Dev, pair},
};
use crate::{
    device::DeviceError,
    dtype::DType,
    kv::{KvDType, KvShape, PAGE_TOKENS},
    matrix::{PANEL, PackedMatrix},
    ops::tree::LEAF,
};

/// A norm that is done where its values are read.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// `[k]`.
    pub weight: &'a Dev<f32>,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// The routes of a single row, on the device.
pub struct Routes {
    /// `[k]`.
    pub index: Dev<u32>,
    /// `[k]`.
    pub weight: Dev<f32>,
    /// Whether a score is no finite number.
    pub bad: Dev<u32>,
    /// Gate, up and down of each route's expert.
    chosen: Dev<[u64; 3]>,
    sums: Dev<f32>,
    counter: Dev<u32>,
}

/// Queries, keys and values as products give them, and what is done to them before attention.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// `[rows, heads * head_dim]`.
    pub q: &'a Dev<f32>,
    /// `[rows, kv_heads * head_dim]`.
    pub k: &'a Dev<f32>,
    /// As k.
    pub v: &'a Dev<f32>,
    /// Weights of the norms of q and k, over whole rows or over heads.
    pub norms: Option<(&'a Dev<f32>, &'a Dev<f32>, f32)>,
    /// `[rows, head_dim]`.
    pub rotary: Option<&'a Dev<f32>>,
}

impl Heads<'_> {
    fn words(&self, rows: usize, shape: KvShape) -> ([u64; 8], usize) {
        let KvShape { kv_heads, head_dim, .. } = shape;
        let heads = self.q.len() / rows / head_dim;
        let kv = rows * kv_heads * head_dim;
        assert_eq!((self.k.len(), self.v.len()), (kv, kv), "[rows, kv_heads * head_dim]");
        assert!(heads > 0 && heads.is_multiple_of(kv_heads), "whole groups of heads");
        assert_eq!(self.q.len(), rows * heads * head_dim, "[rows, heads * head_dim]");
        assert!(self.rotary.is_none_or(|r| r.len() == rows * head_dim), "[rows, head_dim]");
        assert!(head_dim.is_multiple_of(2), "heads of pairs");
        if let Some((q, k, _)) = self.norms {
            let whole = (q.len(), k.len()) == (heads * head_dim, kv_heads * head_dim);
            assert!(whole || (q.len(), k.len()) == (head_dim, head_dim), "norms of rows or heads");
            assert!(!whole || heads > 1, "rows of several heads");
        }
        let norms = self.norms.map_or((0, 0, 0, 0.0), |(q, k, e)| (q.at, k.at, q.len(), e));
        let (norm_q, norm_k, width, eps) = norms;
        let rotary = self.rotary.map_or(0, |r| r.at);
        let sizes = pair(heads, width);
        let eps = u64::from(eps.to_bits());
        ([self.q.at, self.k.at, self.v.at, norm_q, norm_k, rotary, sizes, eps], heads)
    }
}

fn fits(k: usize) -> bool {
    k > 0 && k.is_multiple_of(LEAF) && leaves(k) <= WARPS
}

/// Bytes of a chunk, and chunks of a leaf.
fn chunks(dtype: DType) -> (usize, usize) {
    let k = match dtype {
        DType::F32 | DType::Bf16 => 32,
        DType::Int8 | DType::Int6 => 64,
        DType::Int4 => 128,
    };
    (PackedMatrix::panel_bytes(dtype, k).expect("a size"), LEAF / k)
}

/// Chunks of a warp's ring for `total` of them in a grid of `blocks`: where blocks are few, each
/// has more on its way.
fn depth(cuda: &Cuda, dtype: DType, total: usize, blocks: usize) -> usize {
    let bytes = if blocks <= cuda.processors() { 144 << 10 } else { 76 << 10 };
    let most = bytes / (WARPS * chunks(dtype).0);
    total.min(1 << most.ilog2())
}

/// Words of a leaf of x for each warp, and of what products read, where it is not the row itself.
fn rows(dtype: DType, math: Math) -> usize {
    let own = dtype.is_quantised() || math.is_fast(dtype);
    WARPS * (LEAF + if own { leaf_words(dtype, math) } else { 0 })
}

fn shared(dtype: DType, math: Math, rings: usize, depth: usize) -> usize {
    let words = rows(dtype, math) + WARPS * 2 * PANEL + WARPS;
    rings * depth * (chunks(dtype).0 + 8) + words * size_of::<f32>()
}

fn norm_words(norm: Option<Norm<'_>>, k: usize) -> [u64; 2] {
    assert!(norm.is_none_or(|n| n.weight.len() == k), "a weight per value");
    norm.map_or([0, 0], |n| [n.weight.at, u64::from(n.eps.to_bits())])
}

impl Cuda {
    /// Whether products of a single row with `k` inputs have kernels of their own here: bulk copies
    /// came with Hopper, and a block reads whole leaves, at most eight.
    pub fn one_fits(&self, k: usize) -> bool {
        self.starts_early && fits(k)
    }

    /// The same of products without a norm: twice as many leaves.
    pub fn one_linear_fits(&self, k: usize) -> bool {
        self.one_fits(k) || self.is_long(k)
    }

    fn is_long(&self, k: usize) -> bool {
        let twice = (WARPS + 1..=2 * WARPS).contains(&leaves(k));
        self.starts_early && k.is_multiple_of(LEAF) && twice
    }

    /// `out = norm(x) · wᵀ (+ bias)`, or `out += …`, of one f32 row x; see [`Cuda::one_fits`] and, without a
    /// norm, [`Cuda::one_linear_fits`].
    pub fn linear_one(
        &self,
        x: &Dev<f32>,
        norm: Option<Norm<'_>>,
        products: &[Linear<'_>],
        adds: bool,
    ) -> Done {
        let DevMatrix { dtype, math, k, .. } = *products[0].weight;
        let long = norm.is_none() && self.is_long(k);
        assert!((long || self.one_fits(k)) && x.len() == k && products.len() <= 4, "x is [k]");
        let (words, blocks) = linears(1, products, groups(k));
        if long {
            let depth = depth(self, dtype, 2 * chunks(dtype).1, blocks);
            let args = Args::default().dev(x).u32(k).structure(&words).u32(usize::from(adds));
            let shared = shared(dtype, math, WARPS, depth) + rows(dtype, math) * size_of::<f32>();
            let grid = Grid { shared, ..Grid::new(blocks, THREADS) };
            let source = Source::One(format(dtype, math));
            // SAFETY: shapes as asserted; panels past n are not read.
            return unsafe { self.launch(source, "one_linear_long", grid, args.u32(depth)) };
        }
        let depth = depth(self, dtype, chunks(dtype).1, blocks);
        let args = Args::default().dev(x).structure(&norm_words(norm, k)).u32(k);
        let args = args.structure(&words).u32(usize::from(adds)).u32(depth);
        let grid = Grid { shared: shared(dtype, math, WARPS, depth), ..Grid::new(blocks, THREADS) };
        // SAFETY: shapes as asserted; panels past n are not read.
        unsafe { self.launch(Source::One(format(dtype, math)), "one_linear", grid, args) }
    }

    /// Room for the routes of a single row: k of n.
    pub fn routes(&self, n: usize, k: usize) -> Result<Routes, DeviceError> {
        Ok(Routes {
            index: self.filled(k, 0xff)?,
            weight: self.filled(k, 0)?,
            bad: self.filled(1, 0)?,
            chosen: self.filled(k, 0)?,
            sums: self.filled(n * WARPS, 0)?,
            counter: self.filled(1, 0)?,
        })
    }

    /// Scores of one row by `gate`, and its routes among the experts of `table`.
    pub fn route_one(
        &self,
        x: &Dev<f32>,
        norm: Option<Norm<'_>>,
        gate: &DevMatrix,
        how: Choose<'_>,
        experts: &Experts,
        to: &Routes,
    ) -> Done {
        let DevMatrix { dtype, math, n, k, .. } = *gate;
        assert!(self.one_fits(k) && x.len() == k, "x is [k]");
        assert!(how.n == n && experts.table.len() == n, "n candidates");
        assert!(to.sums.len() >= n * leaves(k), "room for the leaves");
        how.check(1, &to.index, &to.weight);
        let depth = chunks(dtype).1;
        let args = Args::default().dev(x).structure(&norm_words(norm, k)).dev(&gate.data);
        let args = args.u32(n).u32(k).u32(depth).structure(&how.words());
        let args = args.dev(&experts.table).dev(&to.sums).dev(&to.counter);
        let args = args.dev(&to.index).dev(&to.weight).dev(&to.bad).dev(&to.chosen);
        let choice = (4 * n + n.div_ceil(LEAF) + 4) * size_of::<f32>();
        let grid = Grid::new(n.div_ceil(PANEL) * leaves(k), THREADS);
        let grid = Grid { shared: shared(dtype, math, 1, depth) + choice, ..grid };
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::One(format(dtype, math)), "one_route", grid, args) }
    }

    /// `out += Σ weight · down(silu(gate · x) · (up · x))` over the routes of one row, where no
    /// expert is absent; x, which was ready before the routes were, is normed first. `between` is
    /// `[routes, row_words(intermediate)]`, `parts` `[routes, hidden]`, `counters` zeros.
    #[allow(clippy::too_many_arguments)]
    pub fn swiglu_one(
        &self,
        x: &Dev<f32>,
        norm: Option<Norm<'_>>,
        experts: &Experts,
        routes: &Routes,
        between: &Dev<f32>,
        parts: &Dev<f32>,
        counters: &Dev<u32>,
        out: &Dev<f32>,
    ) -> Done {
        let Experts { dtype, math, hidden, intermediate, .. } = *experts;
        let (source, count) = (Source::One(format(dtype, math)), routes.index.len());
        assert!(self.one_fits(hidden) && self.one_fits(intermediate), "whole leaves");
        assert_eq!((x.len(), out.len()), (hidden, hidden), "[hidden]");
        assert_eq!(
            between.len(),
            count * row_words(dtype, math, intermediate),
            "[routes, between]"
        );
        assert_eq!(parts.len(), count * hidden, "[routes, hidden]");
        let blocks = |n: usize, k: usize| n.div_ceil(PANEL).div_ceil(groups(k));
        assert!(counters.len() >= blocks(hidden, intermediate), "a counter per block");
        let grid = |n: usize, k: usize, depth: usize| Grid {
            blocks: [blocks(n, k), count, 1],
            threads: THREADS,
            shared: shared(dtype, math, WARPS, depth),
        };
        let (_, leaf) = chunks(dtype);
        let (up, down) =
            (depth(self, dtype, 2 * leaf, usize::MAX), depth(self, dtype, leaf, usize::MAX));
        let args = Args::default().dev(x).structure(&norm_words(norm, hidden));
        let args = args.u32(intermediate).u32(hidden).dev(&routes.chosen).dev(between).u32(up);
        // SAFETY: shapes as asserted; an expert's matrices have the shape that `experts` says.
        unsafe { self.launch(source, "one_gate_up", grid(intermediate, hidden, up), args)? };
        let args = Args::default().dev(between).u32(hidden).u32(intermediate).dev(&routes.chosen);
        let args = args.dev(&routes.weight).dev(parts).dev(counters).dev(out).u32(down);
        // SAFETY: as above.
        unsafe { self.launch(source, "one_down", grid(hidden, intermediate, down), args) }
    }

    /// Norms and turns q (in place) and k, and writes keys and values into their slots.
    pub fn heads_keep(
        &self,
        kv: &DevKv,
        layer: usize,
        heads: Heads<'_>,
        slots: &Dev<[u32; 2]>,
    ) -> Done {
        let rows = slots.len();
        if rows == 0 {
            return Ok(());
        }
        let (words, count) = heads.words(rows, kv.shape);
        let KvShape { kv_heads, head_dim, .. } = kv.shape;
        let sums = (count + kv_heads) * (leaves(head_dim) + 1);
        let shared = (kv_heads * head_dim + sums + 8) * size_of::<f32>();
        let args = Args::default().structure(&words).dev(heads.q);
        let args = args.structure(&Self::cache(kv, layer)).dev(slots);
        let grid = Grid { blocks: [rows, 1, 1], threads: 512, shared };
        // SAFETY: shapes as asserted; slots are inside the arena by the caller's promise.
        unsafe { self.launch(kv_source(kv.shape.dtype), "heads_keep", grid, args) }
    }

    /// Whether [`Cuda::attention_step`] can be used: a leaf's pages fit a processor.
    pub fn attention_step_fits(&self, kv: &DevKv) -> bool {
        let KvShape { head_dim, dtype, .. } = kv.shape;
        self.starts_early
            && dtype != KvDType::F32
            && head_dim.is_multiple_of(4)
            && head_dim <= LEAF
            && kv.shape.head_bytes() * 4 <= 160 << 10
    }

    /// Norms, rotary, the new position's key and value, and attention, for rows that each are the
    /// newest position of a sequence of their own. `counters`: zeros, one per row and head.
    #[allow(clippy::too_many_arguments)]
    pub fn attention_step(
        &self,
        kv: &DevKv,
        layer: usize,
        heads: Heads<'_>,
        queries: &DevQueries,
        scale: f32,
        window: Option<u32>,
        parts: &AttentionParts,
        counters: &Dev<u32>,
        out: &Dev<f32>,
    ) -> Done {
        let KvShape { kv_heads, head_dim, dtype, .. } = kv.shape;
        let rows = queries.positions.len();
        if rows == 0 {
            return Ok(());
        }
        let (words, count) = heads.words(rows, kv.shape);
        assert!(self.attention_step_fits(kv), "heads that fit");
        let leaves_max = queries.longest / LEAF + 1;
        assert_eq!(out.len(), heads.q.len(), "[rows, heads * head_dim]");
        assert_eq!(queries.tables.len(), rows * queries.stride, "a row of pages per query");
        assert!(queries.longest / PAGE_TOKENS < queries.stride, "a page for every position");
        assert!(parts.sums.len() >= rows * count * leaves_max, "room for the leaves");
        assert!(parts.values.len() >= rows * count * leaves_max * head_dim, "room for the leaves");
        assert!(counters.len() >= rows * count, "a counter per row and head");
        // Few blocks leave most processors idle: then the heads of a group have some each.
        let (group, blocks) = (count / kv_heads, leaves_max * kv_heads * rows);
        let even =
            |splits: &usize| group.is_multiple_of(*splits) && blocks * splits <= self.processors;
        let splits = (1..=group).rev().find(even).unwrap_or(1);
        let group = group / splits;
        let sums = (count + kv_heads) * (leaves(head_dim) + 1);
        let floats = group * (2 * LEAF + 3 * head_dim + 8 + 2) + 5 * head_dim + sums + 8;
        let args = Args::default().structure(&words).structure(&Self::cache(kv, layer));
        let args = args.dev(&queries.tables).u32(queries.stride).dev(&queries.positions);
        let args = args.f32(scale).u32(window.map_or(0, |w| w.max(1) as usize)).u32(leaves_max);
        let args = args.u32(splits).u32(group);
        let args = args.dev(&parts.sums).dev(&parts.values).dev(counters).dev(out);
        let grid = Grid {
            blocks: [leaves_max, kv_heads * splits, rows],
            threads: THREADS,
            shared: 4 * kv.shape.head_bytes() + floats * size_of::<f32>(),
        };
        // SAFETY: shapes as asserted; pages are inside the arena and positions at most `longest`
        // by the caller's promise.
        unsafe { self.launch(kv_source(dtype), "attention_step", grid, args) }
    }
}
