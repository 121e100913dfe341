//! `--math fast`: bf16 weights by the tensor cores, with bits of their own.
//!
//! An output's bits depend on its row and its weights alone: every kernel uses one instruction, with
//! the same k in each of its slots, sixteen k after sixteen in leaves of 256 that meet in rule 1's
//! tree. So they are the same for one row and for thousands, in any batch and any chunk, on one
//! architecture. Other formats than bf16 are computed as ever. Gates stay exact: their matrices are
//! not made fast.
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use std::sync::atomic::Ordering;

use super::{
    Cuda, Grid,
    compile::Source,
    launch::{
        AttentionParts, DevKv, DevMatrix, DevQueries, Done, Experts, Grouped, Linear, THREADS,
        leaves, linears,
    },
    memory::{Args, Dev},
};
use crate::{
    dtype::DType,
    kv::{KvDType, KvShape, PAGE_TOKENS},
    matrix::PANEL,
    ops::tree::LEAF,
};

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Math {
    /// The bits of the CPU.
    #[default]
    Exact,
    /// bf16 weights by the tensor cores.
    Fast,
}

impl Math {
    /// Whether products with weights of a format have bits of their own.
    pub fn is_fast(self, dtype: DType) -> bool {
        self == Math::Fast && dtype == DType::Bf16
    }
}

impl DevMatrix {
    /// The same weights, whose products are computed so.
    pub fn by(self, math: Math) -> Self {
        Self { math, ..self }
    }
}

/// Words of a leaf of a row in shared memory.
pub(super) fn leaf_words(dtype: DType, math: Math) -> usize {
    match dtype {
        _ if dtype.is_quantised() => 96,
        _ if math.is_fast(dtype) => LEAF / 2 + 4,
        _ => LEAF,
    }
}

/// Panels of a block, rows of a warp.
const COLS: usize = 4;
const WARP_ROWS: usize = 32;
/// Rows of a tile of attention at most.
pub const TILE_ROWS: usize = 128;

/// Shared memory of a tile of `groups` times 64 rows, as in tensor.cu and tensor_wide.cu, which wants
/// it to begin at a whole 1024.
fn shared(leaves: usize, groups: usize) -> usize {
    const STAGE_K: usize = 64;
    let stage = (groups * 64 + COLS * PANEL) * STAGE_K * 2;
    let pairs = leaves.div_ceil(2);
    let levels = (usize::BITS - (pairs - 1).leading_zeros()) as usize;
    1024 + 3 * stage + levels * groups * 64 * COLS * PANEL * size_of::<f32>()
}

impl Cuda {
    /// Whether fast products with `k` inputs can be done in tiles.
    pub fn tensor_fits(&self, k: usize) -> bool {
        self.starts_early && k > 0 && k.is_multiple_of(32) && self.fits(k, 1)
    }

    fn fits(&self, k: usize, groups: usize) -> bool {
        shared(leaves(k), groups) <= self.shared_max as usize - 1024
    }

    /// Whether tiles of many rows take Hopper's instruction for four warps, as they do there unless
    /// this says otherwise. The bits are the same (`check fast` compares them).
    pub fn set_wide(&self, wide: bool) {
        self.wide.store(wide, Ordering::Relaxed);
    }

    /// Whether they do.
    pub fn is_wide(&self) -> bool {
        self.wide.load(Ordering::Relaxed)
    }

    /// Tiles, and threads of a block of `groups`.
    fn tensor(&self, groups: usize) -> (Source, u32) {
        if self.is_wide() {
            return (Source::TensorWide, THREADS);
        }
        (Source::Tensor, (groups * 64 / WARP_ROWS * 64) as u32)
    }

    /// Sixty-fours of rows of a block for `m` rows.
    fn tensor_groups(&self, k: usize, m: usize) -> usize {
        if m > 64 && self.fits(k, 2) { 2 } else { 1 }
    }

    pub(super) fn linear_tensor(
        &self,
        x: &Dev<f32>,
        m: usize,
        products: &[Linear<'_>],
        adds: bool,
    ) -> Done {
        let k = products[0].weight.k;
        assert!(self.tensor_fits(k), "whole stages");
        let (words, blocks) = linears(m, products, COLS);
        let groups = self.tensor_groups(k, m);
        let name = if groups == 2 { "linear_tile_2" } else { "linear_tile_1" };
        let (source, threads) = self.tensor(groups);
        let grid = Grid {
            blocks: [m.div_ceil(groups * 64), blocks, 1],
            threads,
            shared: shared(leaves(k), groups),
        };
        let args = Args::default().dev(x).u32(m).u32(k).structure(&words).u32(usize::from(adds));
        // SAFETY: shapes as asserted; panels past n are not read, nor rows past m.
        unsafe { self.launch(source, name, grid, args) }
    }

    pub(super) fn swiglu_tensor(
        &self,
        experts: &Experts,
        grouped: &Grouped,
        per_row: usize,
        x: &Dev<f32>,
        between: &Dev<f32>,
        parts: &Dev<f32>,
    ) -> Done {
        let Experts { hidden, intermediate, ref table, .. } = *experts;
        assert!(self.tensor_fits(hidden) && self.tensor_fits(intermediate), "whole stages");
        let rows = grouped.item_rows;
        let groups = |k: usize| {
            let groups = self.tensor_groups(k, rows);
            assert!(groups * 64 >= rows, "items of a block's rows");
            groups
        };
        let (up, down) = (groups(hidden), groups(intermediate));
        let grid = |n: usize, k: usize, panels: usize, groups: usize| Grid {
            blocks: [n.div_ceil(PANEL).div_ceil(panels), grouped.items.len(), 1],
            threads: self.tensor(groups).1,
            shared: shared(leaves(k), groups),
        };
        let common = |args: Args| {
            args.dev(table).dev(&grouped.items).dev(&grouped.count).dev(&grouped.order)
        };
        let args = common(Args::default()).u32(per_row).dev(x).u32(intermediate).u32(hidden);
        let args = args.dev(between);
        let (source, _) = self.tensor(1);
        let name = if up == 2 { "gate_up_tile_2" } else { "gate_up_tile_1" };
        let up = grid(intermediate, hidden, COLS / 2, up);
        // SAFETY: items name experts of the table and places of `order`, as `group_routes` makes
        // them; an expert's matrices have the shape that `experts` says.
        unsafe { self.launch(source, name, up, args)? };
        let args = common(Args::default()).dev(between).u32(hidden).u32(intermediate).dev(parts);
        let name = if down == 2 { "down_tile_2" } else { "down_tile_1" };
        let down = grid(hidden, intermediate, COLS, down);
        // SAFETY: as above.
        unsafe { self.launch(source, name, down, args) }
    }

    /// Rows `[rows, k]` as pairs of bf16, which fast products read.
    pub fn pair_rows(&self, x: &Dev<f32>, k: usize, rows: usize, out: &Dev<f32>) -> Done {
        assert_eq!((x.len(), out.len()), (rows * k, rows * k.div_ceil(2)), "[rows, k]");
        let args = Args::default().dev(x).u32(k).dev(out).word(out.len() as u64);
        let blocks = out.len().div_ceil(THREADS as usize).min(self.processors() * 16);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Elementwise, "pair_rows", Grid::new(blocks, THREADS), args) }
    }

    /// As [`Cuda::norm_rows`], to f32, to pairs of bf16, or to both.
    pub fn norm_pairs(
        &self,
        x: &Dev<f32>,
        weight: &Dev<f32>,
        eps: f32,
        out: Option<&Dev<f32>>,
        pairs: &Dev<f32>,
    ) -> Done {
        let width = weight.len();
        assert!(width > 0 && x.len().is_multiple_of(width), "whole rows");
        let rows = x.len() / width;
        assert!(out.is_none_or(|o| o.len() == x.len()), "out is as large as x");
        assert_eq!(pairs.len(), rows * width.div_ceil(2), "pairs of all rows");
        let args = Args::default().dev(x).dev(weight).u32(width).f32(eps);
        let args = args.word(out.map_or(0, |m| m.at)).dev(pairs).u32(1);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Norm, "rms_norm", Grid::new(rows, THREADS), args) }
    }

    /// Whether [`Cuda::attention_fast`] and [`Cuda::attention_rows_fast`] can be used.
    pub fn attention_fast_fits(&self, kv: &DevKv, heads: usize) -> bool {
        let KvShape { kv_heads, head_dim, dtype, .. } = kv.shape;
        let shape = dtype == KvDType::Bf16 && matches!(head_dim, 64 | 128);
        self.starts_early && shape && heads <= 16 * kv_heads
    }

    /// As [`Cuda::attention`].
    #[allow(clippy::too_many_arguments)]
    pub fn attention_fast(
        &self,
        kv: &DevKv,
        layer: usize,
        q: &Dev<f32>,
        queries: &DevQueries,
        scale: f32,
        window: Option<u32>,
        parts: &AttentionParts,
        out: &Dev<f32>,
    ) -> Done {
        let rows = queries.positions.len();
        if rows == 0 {
            return Ok(());
        }
        let (heads, leaves) = self.check_attention(kv, q, queries, parts, out);
        let KvShape { kv_heads, head_dim, .. } = kv.shape;
        let window = window.map_or(0, |w| w.max(1) as usize);
        let args = Args::default().dev(q).structure(&Self::cache(kv, layer));
        let args = args.dev(&queries.tables).u32(queries.stride).dev(&queries.positions);
        let args = args.u32(heads).f32(scale).u32(window).u32(leaves);
        let args = args.dev(&parts.sums).dev(&parts.values).dev(out);
        let grid = Grid { blocks: [leaves, kv_heads, rows], threads: 128, shared: 0 };
        let name = if head_dim == 64 { "fast_leaf_64" } else { "fast_leaf_128" };
        // SAFETY: shapes as asserted; pages are inside the arena and positions at most `longest`
        // by the caller's promise.
        unsafe { self.launch(Source::AttentionFast, name, grid, args)? };
        if leaves == 1 {
            return Ok(());
        }
        let args = Args::default().dev(&queries.positions).u32(heads).u32(head_dim).u32(window);
        let args = args.u32(leaves).dev(&parts.sums).dev(&parts.values).dev(out);
        let grid = Grid { blocks: [heads, rows, 1], threads: head_dim as u32, shared: 0 };
        // SAFETY: as above.
        unsafe { self.launch(Source::AttentionFast, "fast_tree", grid, args) }
    }

    /// As [`Cuda::attention_rows`], in tiles of at most [`TILE_ROWS`] rows.
    #[allow(clippy::too_many_arguments)]
    pub fn attention_rows_fast(
        &self,
        kv: &DevKv,
        layer: usize,
        q: &Dev<f32>,
        queries: &DevQueries,
        tiles: &Dev<[u32; 2]>,
        scale: f32,
        window: Option<u32>,
        parts: &AttentionParts,
        out: &Dev<f32>,
    ) -> Done {
        if queries.positions.is_empty() {
            return Ok(());
        }
        let (heads, leaves) = self.check_attention(kv, q, queries, parts, out);
        let head_dim = kv.shape.head_dim;
        let args = Args::default().dev(q).structure(&Self::cache(kv, layer));
        let args = args.dev(&queries.tables).u32(queries.stride).dev(&queries.positions);
        let args = args.dev(tiles).u32(heads).f32(scale);
        let args = args.u32(window.map_or(0, |w| w.max(1) as usize)).u32(leaves);
        let args = args.dev(&parts.sums).dev(&parts.values).dev(out);
        let name = if head_dim == 64 { "fast_rows_64" } else { "fast_rows_128" };
        let shared = (TILE_ROWS + 2 * LEAF) * head_dim * 2;
        let grid = Grid { blocks: [heads, tiles.len(), 1], threads: THREADS, shared };
        // SAFETY: shapes as asserted; tiles, pages and positions are inside by the caller's promise.
        unsafe { self.launch(Source::AttentionFast, name, grid, args) }
    }

    /// Heads, and leaves of the longest.
    fn check_attention(
        &self,
        kv: &DevKv,
        q: &Dev<f32>,
        queries: &DevQueries,
        parts: &AttentionParts,
        out: &Dev<f32>,
    ) -> (usize, usize) {
        let KvShape { kv_heads, head_dim, .. } = kv.shape;
        let rows = queries.positions.len();
        let heads = q.len() / rows / head_dim;
        let leaves = queries.longest / LEAF + 1;
        assert!(self.attention_fast_fits(kv, heads), "bf16, heads of 64 or 128");
        assert_eq!((q.len(), out.len()), (rows * heads * head_dim, q.len()), "[rows, cols]");
        assert!(heads > 0 && heads.is_multiple_of(kv_heads), "whole groups of heads");
        assert_eq!(queries.tables.len(), rows * queries.stride, "a row of pages per query");
        assert!(queries.longest / PAGE_TOKENS < queries.stride, "a page for every position");
        assert!(parts.sums.len() >= rows * heads * leaves, "room for the leaves");
        assert!(parts.values.len() >= rows * heads * leaves * head_dim, "room for the leaves");
        (heads, leaves)
    }
}
