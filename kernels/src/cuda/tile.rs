//! Launches for passes of many rows: products in tiles (`tile.cu`), attention of rows that follow
//! each other (`attention.cu`).
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use super::{
    Cuda, Grid,
    compile::Source,
    launch::{
        AttentionParts, DevKv, DevMatrix, DevQueries, Done, Experts, Grouped, Linear, THREADS,
        format, kv_source, leaves, linears, row_words,
    },
    memory::{Args, Dev},
};
use crate::{
    blocks::BLOCK,
    device::DeviceError,
    dtype::DType,
    kv::{KvDType, KvShape, PAGE_TOKENS},
    matrix::PANEL,
    ops::tree::LEAF,
};

/// Rows of a group of warps, and panels of a block.
const ROWS: usize = 64;
const COLS: usize = 4;

/// Where blocks that share the leaves of a tile leave their sums.
pub struct Spread {
    parts: Dev<f32>,
    counters: Dev<u32>,
}

/// k of a stage.
fn stage_k(dtype: DType) -> usize {
    if dtype.is_quantised() { 2 * BLOCK } else { BLOCK }
}

/// Shared memory of a tile with so many groups of rows and leaves.
fn shared(dtype: DType, leaves: usize, groups: usize) -> usize {
    // As in tile.cu: bytes of a row, of a panel, and stages.
    let blocks = |words: usize| (80, 2 * (64 + words * 128), if groups == 1 { 3 } else { 4 });
    let (row, panel, stages) = match dtype {
        DType::F32 => (144, 4096, 2),
        DType::Bf16 => (144, 2048, 3),
        DType::Int8 => blocks(8),
        DType::Int6 => blocks(6),
        DType::Int4 => blocks(4),
    };
    let pairs = leaves.div_ceil(2);
    let levels = (usize::BITS - (pairs - 1).leading_zeros()) as usize;
    let sums = groups * COLS * ROWS * PANEL * size_of::<f32>();
    stages * (groups * ROWS * row + COLS * panel) + levels * sums
}

impl Cuda {
    /// Whether products with `k` inputs can be done in tiles.
    pub fn tiles_fit(&self, dtype: DType, k: usize) -> bool {
        let room = self.shared_max as usize - 1024;
        k > 0 && k.is_multiple_of(stage_k(dtype)) && shared(dtype, leaves(k), 1) <= room
    }

    /// Groups of rows of a block for `m` rows.
    fn tile_groups(&self, dtype: DType, k: usize, m: usize) -> usize {
        let room = self.shared_max as usize - 1024;
        if m > ROWS && shared(dtype, leaves(k), 2) <= room { 2 } else { 1 }
    }

    /// Room for [`Cuda::linear_tiles`] to spread the leaves of up to `tiles` tiles.
    pub fn spread(&self, tiles: usize) -> Result<Spread, DeviceError> {
        let parts = self.filled(tiles * 8 * ROWS * COLS * PANEL, 0xff)?;
        Ok(Spread { parts, counters: self.filled(tiles, 0)? })
    }

    /// As [`Cuda::matmul`], for many rows. Where tiles are few and there is room, several blocks
    /// share the leaves of each.
    pub fn linear_tiles(
        &self,
        x: &Dev<f32>,
        m: usize,
        products: &[Linear<'_>],
        adds: bool,
        spread: Option<&Spread>,
    ) -> Done {
        let Some(first) = products.first() else { return Ok(()) };
        let DevMatrix { dtype, math, k, .. } = *first.weight;
        assert!(products.len() <= 4, "at most four products at once");
        assert_eq!(x.len(), m * row_words(dtype, math, k), "x is [m, k]");
        if math.is_fast(dtype) {
            return self.linear_tensor(x, m, products, adds);
        }
        assert!(self.tiles_fit(dtype, k), "whole stages");
        let (words, blocks) = linears(m, products, COLS);
        // Two blocks of 64 rows on a processor get further than one of 128 (blocks; measured).
        let groups = if dtype.is_quantised() { 1 } else { self.tile_groups(dtype, k, m) };
        let rows = m.div_ceil(groups * ROWS);
        let room = spread.map_or(0, |s| s.counters.len);
        // Each part has 2^i leaves: a node of the tree.
        let parts = [8, 4, 2].into_iter().find(|&z| {
            groups == 1
                && rows * blocks <= room
                && rows * blocks * z <= 3 * self.processors()
                && leaves(k).is_multiple_of(z)
                && (leaves(k) / z).is_power_of_two()
        });
        let z = parts.unwrap_or(1);
        let name = if groups == 2 { "linear_tile_2" } else { "linear_tile_1" };
        let grid = Grid {
            blocks: [rows, blocks, z],
            threads: (groups * 128) as u32,
            shared: shared(dtype, leaves(k) / z, groups),
        };
        let args = Args::default().dev(x).u32(m).u32(k).structure(&words).u32(usize::from(adds));
        let at = spread.map_or((0, 0), |s| (s.parts.at, s.counters.at));
        let args = args.word(at.0).word(at.1);
        // SAFETY: shapes as asserted; panels past n are not read, nor rows past m.
        unsafe { self.launch(Source::Tile(format(dtype, math)), name, grid, args) }
    }

    /// As [`Cuda::swiglu_routes`], in items of at most 64 or 128 rows.
    #[allow(clippy::too_many_arguments)]
    pub fn swiglu_tiles(
        &self,
        experts: &Experts,
        grouped: &Grouped,
        per_row: usize,
        x: &Dev<f32>,
        between: &Dev<f32>,
        parts: &Dev<f32>,
    ) -> Done {
        let Experts { dtype, math, hidden, intermediate, ref table } = *experts;
        let (source, routes) = (Source::Tile(format(dtype, math)), grouped.routes);
        let words = |k: usize| row_words(dtype, math, k);
        assert_eq!(x.len() * per_row, routes * words(hidden), "x is [rows, hidden]");
        assert_eq!(between.len(), routes * words(intermediate), "[routes, between]");
        assert_eq!(parts.len(), routes * hidden, "parts are [routes, hidden]");
        if math.is_fast(dtype) {
            return self.swiglu_tensor(experts, grouped, per_row, x, between, parts);
        }
        assert!(
            self.tiles_fit(dtype, hidden) && self.tiles_fit(dtype, intermediate),
            "whole stages"
        );
        let rows = grouped.item_rows;
        let groups = |k: usize| {
            let groups = self.tile_groups(dtype, k, rows);
            assert!(groups * ROWS >= rows, "items of a block's rows");
            groups
        };
        let (up, down) = (groups(hidden), groups(intermediate));
        let grid = |n: usize, k: usize, panels: usize, groups: usize| Grid {
            blocks: [n.div_ceil(PANEL).div_ceil(panels), grouped.items.len(), 1],
            threads: (groups * 128) as u32,
            // Gate and up meet in what was the tree.
            shared: shared(dtype, leaves(k), groups)
                .max(groups * 2 * ROWS * PANEL * size_of::<f32>()),
        };
        let common = |args: Args| {
            args.dev(table).dev(&grouped.items).dev(&grouped.count).dev(&grouped.order)
        };
        let args = common(Args::default()).u32(per_row).dev(x).u32(intermediate).u32(hidden);
        let args = args.dev(between);
        let name = if up == 2 { "gate_up_tile_2" } else { "gate_up_tile_1" };
        // SAFETY: items name experts of the table and places of `order`, as `group_routes` makes
        // them; an expert's matrices have the shape that `experts` says.
        unsafe { self.launch(source, name, grid(intermediate, hidden, COLS / 2, up), args)? };
        let args = common(Args::default()).dev(between).u32(hidden).u32(intermediate).dev(parts);
        let name = if down == 2 { "down_tile_2" } else { "down_tile_1" };
        // SAFETY: as above.
        unsafe { self.launch(source, name, grid(hidden, intermediate, COLS, down), args) }
    }

    /// Whether [`Cuda::attention_rows`] can be used.
    pub fn attention_rows_fits(&self, kv: &DevKv) -> bool {
        let KvShape { head_dim, dtype, .. } = kv.shape;
        self.starts_early && dtype == KvDType::Bf16 && matches!(head_dim, 64 | 128)
    }

    /// As [`Cuda::attention`], for rows that follow each other: each tile is a first row and how
    /// many, at most 64, of one sequence and consecutive positions.
    #[allow(clippy::too_many_arguments)]
    pub fn attention_rows(
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
        let KvShape { kv_heads, head_dim, dtype, .. } = kv.shape;
        let rows = queries.positions.len();
        if rows == 0 {
            return Ok(());
        }
        assert!(self.attention_rows_fits(kv), "bf16, heads of 64 or 128");
        let heads = q.len() / rows / head_dim;
        let leaves_max = queries.longest / LEAF + 1;
        assert_eq!((q.len(), out.len()), (rows * heads * head_dim, q.len()), "[rows, cols]");
        assert!(heads > 0 && heads.is_multiple_of(kv_heads), "whole groups of heads");
        assert_eq!(queries.tables.len(), rows * queries.stride, "a row of pages per query");
        assert!(queries.longest / PAGE_TOKENS < queries.stride, "a page for every position");
        assert!(parts.sums.len() >= rows * heads * leaves_max, "room for the leaves");
        assert!(parts.values.len() >= rows * heads * leaves_max * head_dim, "room for the leaves");
        let args = Args::default().dev(q).structure(&Self::cache(kv, layer));
        let args = args.dev(&queries.tables).u32(queries.stride).dev(&queries.positions);
        let args = args.dev(tiles).u32(heads).f32(scale);
        let args = args.u32(window.map_or(0, |w| w.max(1) as usize)).u32(leaves_max);
        let args = args.dev(&parts.sums).dev(&parts.values).dev(out);
        let weights = ROWS * (LEAF + 8) * size_of::<f32>();
        let name = if head_dim == 64 { "attention_rows_64" } else { "attention_rows_128" };
        let grid = Grid {
            blocks: [heads, tiles.len(), 1],
            threads: THREADS,
            shared: ROWS * head_dim * 4 + 2 * LEAF * head_dim * 2 + weights,
        };
        // SAFETY: shapes as asserted; tiles, pages and positions are inside by the caller's promise.
        unsafe { self.launch(kv_source(dtype), name, grid, args) }
    }
}
