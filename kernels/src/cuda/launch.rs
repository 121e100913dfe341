//! How each operation is launched: shapes are checked here, sizes and variants are chosen here.
//!
//! Everything is row-major f32 in the device's memory unless it says otherwise. Which variant of a
//! product runs is free: an output's order of sums does not depend on it.
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use super::{
    Cuda, Grid,
    compile::Source,
    fast::{Math, leaf_words},
    memory::{Args, Dev, pair},
};
use crate::{
    blocks::record_words,
    device::DeviceError,
    dtype::DType,
    kv::{KvDType, KvShape, PAGE_TOKENS},
    matrix::{PANEL, PackedMatrix},
    ops::tree::LEAF,
};

pub(super) type Done = Result<(), DeviceError>;

pub(super) const THREADS: u32 = 256;
pub(super) const WARPS: usize = 8;

/// A packed matrix in the device's memory.
pub struct DevMatrix {
    pub(super) dtype: DType,
    pub(super) math: Math,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) data: Dev<u8>,
}

impl DevMatrix {
    /// Stored format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Where its panels are.
    pub fn data(&self) -> &Dev<u8> {
        &self.data
    }
}

/// One product of [`Cuda::matmul`].
pub struct Linear<'a> {
    /// `[n, k]`.
    pub weight: &'a DevMatrix,
    /// `[n]`.
    pub bias: Option<&'a Dev<f32>>,
    /// `[m, n]`.
    pub out: &'a Dev<f32>,
}

/// A variant of a product: panels side by side, and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    name: &'static str,
    panels: usize,
    rows: usize,
}

/// All variants of [`Cuda::matmul`].
pub const VARIANTS: [Variant; 6] = [
    Variant { name: "linear_1x1", panels: 1, rows: 1 },
    Variant { name: "linear_4x1", panels: 4, rows: 1 },
    Variant { name: "linear_1x4", panels: 1, rows: 4 },
    Variant { name: "linear_4x4", panels: 4, rows: 4 },
    Variant { name: "linear_2x8", panels: 2, rows: 8 },
    Variant { name: "linear_4x8", panels: 4, rows: 8 },
];

impl Variant {
    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }
}

/// Experts of one shape and format: a table of addresses in the device's memory.
pub struct Experts {
    /// Format of all three matrices.
    pub dtype: DType,
    /// How products with them are computed.
    pub math: Math,
    /// Width of x and of the output.
    pub hidden: usize,
    /// Width between gate and down.
    pub intermediate: usize,
    /// Gate, up and down of each expert; zeros for one that is absent.
    pub table: Dev<[u64; 3]>,
}

/// Routes in order of their experts, on the device: what [`Cuda::group_routes`] makes.
pub struct Grouped {
    /// Route of each place.
    pub order: Dev<u32>,
    /// Expert, first place and count of each item.
    pub items: Dev<[u32; 3]>,
    /// How many items there are.
    pub count: Dev<u32>,
    /// Rows of an item at most: 1, 4, 8 or 16; 64 or 128 for [`Cuda::swiglu_tiles`].
    pub item_rows: usize,
    pub(super) routes: usize,
}

impl Grouped {
    /// Items of so many routes over so many experts at most.
    fn items_max(routes: usize, experts: usize, item_rows: usize) -> usize {
        routes.min(experts) + routes / item_rows
    }
}

/// What a selection needs beside scores.
#[derive(Clone, Copy)]
pub struct Choose<'a> {
    /// Candidates of a branch.
    pub n: usize,
    /// How many are chosen.
    pub k: usize,
    /// The seed of (seed, layer, level).
    pub seed: u64,
    /// A bit per candidate that is open: whole words per branch.
    pub masks: Option<&'a Dev<u32>>,
    /// What names each tier.
    pub tier_names: &'a Dev<u64>,
    /// 0 to choose among tiers, 1 among groups, 2 among experts.
    pub level: usize,
    /// The tier of each branch; of none, the first.
    pub tiers: Option<&'a Dev<u32>>,
    /// The group of each branch; of none, the first.
    pub groups: Option<&'a Dev<u32>>,
    /// The weight that each branch has so far.
    pub parents: Option<&'a Dev<f32>>,
    /// Whether a branch's weights are to add up to 1.
    pub renormalise: bool,
}

impl Choose<'_> {
    /// As `Choice` of choose.cuh.
    pub(super) fn words(&self) -> [u64; 9] {
        fn at<T>(memory: Option<&Dev<T>>) -> u64 {
            memory.map_or(0, |memory| memory.at)
        }
        let names = self.tier_names.at;
        let (masks, tiers, groups) = (at(self.masks), at(self.tiers), at(self.groups));
        let (sizes, level) = (pair(self.n, self.k), pair(self.n.div_ceil(32), self.level));
        let parents = at(self.parents);
        [self.seed, names, masks, tiers, groups, parents, sizes, level, u64::from(self.renormalise)]
    }

    pub(super) fn check(&self, branches: usize, index: &Dev<u32>, weight: &Dev<f32>) {
        let Choose { n, k, level, tier_names, .. } = *self;
        let words = n.div_ceil(32);
        assert_eq!((index.len(), weight.len()), (branches * k, branches * k), "[branches, k]");
        assert!(self.masks.is_none_or(|m| m.len() == branches * words), "a bit per candidate");
        assert!(self.tiers.is_none_or(|t| t.len() == branches), "one per branch");
        assert!(self.groups.is_none_or(|g| g.len() == branches), "one per branch");
        assert!(level <= 2 && (level > 0 || tier_names.len() >= n), "a name for every tier");
        assert!(self.parents.is_none_or(|p| p.len() == branches), "one per branch");
    }
}

/// Pages of keys and values in the device's memory.
pub struct DevKv {
    pub(super) shape: KvShape,
    pages: Dev<u8>,
}

impl DevKv {
    /// What it holds.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Where its pages are.
    pub fn address(&self) -> u64 {
        self.pages.at
    }
}

/// Queries of one call: a row of pages for each.
pub struct DevQueries {
    /// `[rows, stride]`.
    pub tables: Dev<u32>,
    /// Pages per row of the table.
    pub stride: usize,
    /// `[rows]`.
    pub positions: Dev<u32>,
    /// The largest position.
    pub longest: usize,
}

/// Room for what attention's leaves give: made once, for the longest that is asked for.
pub struct AttentionParts {
    pub(super) sums: Dev<[f32; 2]>,
    pub(super) values: Dev<f32>,
}

pub(super) fn format(dtype: DType, math: Math) -> u8 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 if math == Math::Fast => 5,
        DType::Bf16 => 1,
        DType::Int8 => 2,
        DType::Int6 => 3,
        DType::Int4 => 4,
    }
}

pub(super) fn leaves(k: usize) -> usize {
    k.div_ceil(LEAF).max(1)
}

/// Groups of warps in a block, each with panels of its own.
pub(super) fn groups(k: usize) -> usize {
    WARPS / leaves(k).next_power_of_two().min(WARPS)
}

/// Dynamic shared memory of the product's core.
fn product_shared(dtype: DType, math: Math, k: usize, panels: usize, rows: usize) -> usize {
    let x = rows * leaf_words(dtype, math);
    let sums = rows * panels * PANEL;
    let rounds = leaves(k).div_ceil(WARPS);
    let levels = if rounds > 1 { rounds.ilog2() as usize + 1 } else { 0 };
    (WARPS * x.max(sums) + levels * sums) * size_of::<f32>()
}

/// Words of a row as products of a format read it: f32, records of blocks, or pairs of bf16.
pub fn row_words(dtype: DType, math: Math, k: usize) -> usize {
    match dtype {
        _ if dtype.is_quantised() => record_words(k),
        _ if math.is_fast(dtype) => k.div_ceil(2),
        _ => k,
    }
}

/// As `Linears` of product.cuh, and the blocks of so many panels that they take together.
pub(super) fn linears(m: usize, products: &[Linear<'_>], panels: usize) -> ([u64; 17], usize) {
    let first = products[0].weight;
    let (mut words, mut blocks) = ([0; 17], 0);
    for (i, p) in products.iter().enumerate() {
        let kind = |w: &DevMatrix| (w.dtype, w.math, w.k);
        assert_eq!(kind(p.weight), kind(first), "one kind of weights");
        assert_eq!(p.out.len(), m * p.weight.n, "out is [m, n]");
        assert!(p.bias.is_none_or(|b| b.len() == p.weight.n), "bias is [n]");
        let bias = p.bias.map_or(0, |b| b.at);
        let at = [p.weight.data.at, bias, p.out.at, pair(p.weight.n, blocks)];
        words[i * 4..][..4].copy_from_slice(&at);
        blocks += p.weight.n.div_ceil(PANEL).div_ceil(panels);
    }
    words[16] = pair(products.len(), 0);
    (words, blocks)
}

impl Cuda {
    /// Takes a packed matrix to the device.
    pub fn matrix(&self, packed: &PackedMatrix) -> Result<DevMatrix, DeviceError> {
        let data = self.upload(&packed.data()[..])?;
        let (dtype, n, k) = (packed.dtype(), packed.n(), packed.k());
        Ok(DevMatrix { dtype, math: Math::Exact, n, k, data })
    }

    /// A matrix `[n, k]` whose panels are to lie at `data`, which may still hold anything.
    ///
    /// # Panics
    /// If it does not have the bytes of such a matrix.
    pub fn matrix_at(&self, dtype: DType, n: usize, k: usize, data: Dev<u8>) -> DevMatrix {
        assert_eq!(PackedMatrix::packed_bytes(dtype, n, k), Some(data.len()), "its packed bytes");
        DevMatrix { dtype, math: Math::Exact, n, k, data }
    }

    /// A matrix of which every byte is `byte`, for measuring.
    pub fn matrix_of(
        &self,
        dtype: DType,
        n: usize,
        k: usize,
        byte: u8,
    ) -> Result<DevMatrix, DeviceError> {
        let bytes = PackedMatrix::packed_bytes(dtype, n, k).expect("a size");
        Ok(DevMatrix { dtype, math: Math::Exact, n, k, data: self.filled(bytes, byte)? })
    }

    pub(super) fn each(&self, len: usize) -> Grid {
        Grid::new(len.div_ceil(THREADS as usize).min(self.processors() * 16), THREADS)
    }

    /// The variant that is taken for `m` rows and panels of all products together.
    pub fn variant(&self, m: usize, panels: usize) -> Variant {
        let blocks = |v: Variant| panels.div_ceil(v.panels) * m.div_ceil(v.rows);
        let [one, _, four, _, eight, eight_wide] = VARIANTS;
        let enough = self.processors();
        // Measured on an H100: narrow ones where rows are few, wide ones where blocks suffice.
        match m {
            0 | 1 => one,
            2..=4 => four,
            5..=8 if blocks(eight) < enough => four,
            _ if blocks(eight) < enough / 4 => four,
            9.. if blocks(eight_wide) >= 2 * enough => eight_wide,
            _ => eight,
        }
    }

    /// `out = x · wᵀ (+ bias)`, or `out += …`, for up to four matrices of one format over the same
    /// `m` rows (see [`row_words`]).
    pub fn matmul(&self, x: &Dev<f32>, m: usize, products: &[Linear<'_>], adds: bool) -> Done {
        let panels = products.iter().map(|p| p.weight.n.div_ceil(PANEL)).sum();
        self.matmul_by(self.variant(m, panels), x, m, products, adds)
    }

    /// The same by a given variant.
    pub fn matmul_by(
        &self,
        variant: Variant,
        x: &Dev<f32>,
        m: usize,
        products: &[Linear<'_>],
        adds: bool,
    ) -> Done {
        let Some(first) = products.first() else { return Ok(()) };
        let DevMatrix { dtype, math, k, .. } = *first.weight;
        assert!(products.len() <= 4, "at most four products at once");
        assert_eq!(x.len(), m * row_words(dtype, math, k), "x is [m, k]");
        let (words, blocks) = linears(m, products, groups(k) * variant.panels);
        let grid = Grid {
            blocks: [m.div_ceil(variant.rows), blocks, 1],
            threads: THREADS,
            shared: product_shared(dtype, math, k, variant.panels, variant.rows),
        };
        let args = Args::default().dev(x).word(0).u32(m).u32(k).structure(&words);
        let args = args.u32(usize::from(adds));
        // SAFETY: shapes as asserted; panels past n are not read, nor rows past m.
        unsafe { self.launch(Source::Matmul(format(dtype, math)), variant.name, grid, args) }
    }

    /// Records of all rows `[rows, k]`.
    pub fn quantise(&self, x: &Dev<f32>, k: usize, rows: usize, out: &Dev<f32>) -> Done {
        assert_eq!((x.len(), out.len()), (rows * k, rows * record_words(k)), "[rows, k]");
        let warps = rows * k.div_ceil(32);
        let args = Args::default().dev(x).u32(k).u32(rows).dev(out);
        let grid = Grid::new(warps.div_ceil(WARPS), THREADS);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Elementwise, "quantise", grid, args) }
    }

    /// Room for `routes` routes over `experts` experts, in items of at most 1, 4, 8, 16, 64 or
    /// 128 rows.
    pub fn grouped(
        &self,
        routes: usize,
        experts: usize,
        item_rows: usize,
    ) -> Result<Grouped, DeviceError> {
        assert!(matches!(item_rows, 1 | 4 | 8 | 16 | 64 | 128), "1, 4, 8, 16, 64 or 128 rows");
        Ok(Grouped {
            order: self.scratch(routes)?,
            items: self.scratch(Grouped::items_max(routes, experts, item_rows))?,
            count: self.scratch(1)?,
            item_rows,
            routes,
        })
    }

    /// Counts of experts that fit a processor.
    fn counts_room(&self) -> usize {
        (self.shared_max as usize - (16 << 10)) / size_of::<u32>()
    }

    /// Whether [`Cuda::group_routes`] can order the routes of so many experts.
    pub fn groups_fit(&self, experts: usize) -> bool {
        2 * experts <= self.counts_room()
    }

    /// Puts routes, each the number of its expert, in order of experts.
    pub fn group_routes(&self, routes: &Dev<u32>, experts: usize, to: &Grouped) -> Done {
        assert_eq!(routes.len(), to.routes, "room for the routes");
        let most = Grouped::items_max(to.routes, experts, to.item_rows);
        assert!(to.items.len() >= most, "room for the items");
        let args = Args::default().dev(routes).u32(to.routes).u32(experts).u32(to.item_rows);
        let args = args.dev(&to.order).dev(&to.items).dev(&to.count);
        let room = self.counts_room();
        assert!(self.groups_fit(experts), "experts whose counts fit a processor");
        let warps = to.routes.div_ceil(32).clamp(1, 32).min(room / experts.max(1) - 1);
        let shared = (warps + 1) * experts * size_of::<u32>();
        let grid = Grid { shared, ..Grid::new(1, warps as u32 * 32) };
        // SAFETY: an expert outside the table is in no item; there is room for all others.
        unsafe { self.launch(Source::Route, "group_routes", grid, args) }
    }

    /// All experts' networks over their rows: route r reads row `r / per_row` of x and writes row
    /// r of `parts`. Routes of absent experts are left as they were. `between` is
    /// `[routes, row_words(intermediate)]`.
    #[allow(clippy::too_many_arguments)]
    pub fn swiglu_routes(
        &self,
        experts: &Experts,
        grouped: &Grouped,
        per_row: usize,
        x: &Dev<f32>,
        between: &Dev<f32>,
        parts: &Dev<f32>,
    ) -> Done {
        let Experts { dtype, math, hidden, intermediate, ref table } = *experts;
        let (source, routes) = (Source::Swiglu(format(dtype, math)), grouped.routes);
        let words = |k: usize| row_words(dtype, math, k);
        assert_eq!(x.len() * per_row, routes * words(hidden), "x is [rows, hidden]");
        assert_eq!(between.len(), routes * words(intermediate), "[routes, between]");
        assert_eq!(parts.len(), routes * hidden, "parts are [routes, hidden]");
        assert!(grouped.item_rows <= 16, "items of few rows");
        let (up, down, wide) = match grouped.item_rows {
            1 => ("gate_up_1", "down_1", 1),
            4 => ("gate_up_4", "down_4", 1),
            16 => ("gate_up_16", "down_16", 2),
            _ => ("gate_up_8", "down_8", 2),
        };
        let items = grouped.items.len();
        let grid = |n: usize, k: usize, panels: usize| Grid {
            blocks: [n.div_ceil(PANEL).div_ceil(groups(k) * panels), items, 1],
            threads: THREADS,
            shared: product_shared(dtype, math, k, 2 * wide, grouped.item_rows),
        };
        let common = |args: Args| {
            args.dev(table).dev(&grouped.items).dev(&grouped.count).dev(&grouped.order)
        };
        let args = common(Args::default()).u32(per_row).dev(x).u32(intermediate).u32(hidden);
        let args = args.dev(between);
        // SAFETY: items name experts of the table and places of `order`, as `group_routes` makes
        // them; an expert's matrices have the shape that `experts` says.
        unsafe { self.launch(source, up, grid(intermediate, hidden, wide), args)? };
        let args = common(Args::default()).dev(between).u32(hidden).u32(intermediate).dev(parts);
        // SAFETY: as above.
        unsafe { self.launch(source, down, grid(hidden, intermediate, 2 * wide), args) }
    }

    /// `out[r] = Σ weights · parts` over a row's routes in order; with `adds`, `out[r] += …`.
    pub fn weighted_sum(
        &self,
        parts: &Dev<f32>,
        weights: &Dev<f32>,
        per_row: usize,
        adds: bool,
        out: &Dev<f32>,
    ) -> Done {
        self.weighted_sum_of(parts, weights, None, per_row, adds, out)
    }

    /// The same over the first `counts[r]` routes of row r; the others' parts are not read.
    pub fn weighted_sum_of(
        &self,
        parts: &Dev<f32>,
        weights: &Dev<f32>,
        counts: Option<&Dev<u32>>,
        per_row: usize,
        adds: bool,
        out: &Dev<f32>,
    ) -> Done {
        assert_eq!(parts.len(), out.len() * per_row, "a part per route");
        if out.is_empty() {
            return Ok(());
        }
        let cols = out.len() * per_row / weights.len().max(1);
        assert_eq!(weights.len() * cols, out.len() * per_row, "a weight per route");
        assert!(counts.is_none_or(|c| c.len() * cols == out.len()), "a count per row");
        let args = Args::default().dev(parts).dev(weights).word(counts.map_or(0, |c| c.at));
        let args = args.u32(per_row).u32(cols).u32(usize::from(adds));
        let args = args.dev(out).word(out.len() as u64);
        // SAFETY: shapes as asserted; a count is at most `per_row` in the kernel.
        unsafe { self.launch(Source::Elementwise, "weighted_sum", self.each(out.len()), args) }
    }

    /// `out[i, :] = table[ids[i], :]`; NaN for an id that the table lacks.
    pub fn embed(&self, table: &DevMatrix, ids: &Dev<u32>, out: &Dev<f32>) -> Done {
        assert_eq!(out.len(), ids.len() * table.k, "out is [ids, k]");
        let args = Args::default().dev(&table.data).u32(format(table.dtype, Math::Exact).into());
        let args = args.u32(table.n).u32(table.k).dev(ids).dev(out).word(out.len() as u64);
        // SAFETY: shapes as asserted, and ids are checked by the kernel.
        unsafe { self.launch(Source::Elementwise, "embed", self.each(out.len()), args) }
    }

    /// Norms every run of `weight.len()` values; `out` may be `x`.
    pub fn rms_norm(&self, x: &Dev<f32>, weight: &Dev<f32>, eps: f32, out: &Dev<f32>) -> Done {
        let width = weight.len();
        assert_eq!(x.len(), out.len(), "out is as large as x");
        assert!(width > 0 && x.len().is_multiple_of(width), "whole runs");
        let runs = x.len() / width;
        let args = Args::default().dev(x).dev(weight).u32(width).f32(eps).dev(out);
        // SAFETY: shapes as asserted.
        unsafe {
            if width <= LEAF {
                let grid = Grid::new(runs.div_ceil(WARPS), THREADS);
                self.launch(Source::Norm, "rms_norm_short", grid, args.u32(runs))
            } else {
                self.launch(Source::Norm, "rms_norm", Grid::new(runs, THREADS), args.word(0).u32(0))
            }
        }
    }

    /// Norms every row of `weight.len()` values to f32, to records of blocks, or to both.
    pub fn norm_rows(
        &self,
        x: &Dev<f32>,
        weight: &Dev<f32>,
        eps: f32,
        out: Option<&Dev<f32>>,
        records: Option<&Dev<f32>>,
    ) -> Done {
        let width = weight.len();
        assert!(width > 0 && x.len().is_multiple_of(width), "whole rows");
        let rows = x.len() / width;
        assert!(out.is_none_or(|o| o.len() == x.len()), "out is as large as x");
        let words = rows * record_words(width);
        assert!(records.is_none_or(|r| r.len() == words), "records of all rows");
        let at = |memory: Option<&Dev<f32>>| memory.map_or(0, |m| m.at);
        let args = Args::default().dev(x).dev(weight).u32(width).f32(eps);
        let args = args.word(at(out)).word(at(records)).u32(0);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Norm, "rms_norm", Grid::new(rows, THREADS), args) }
    }

    /// Turns every head by its row of the table `[rows, head_dim]` (cosines, then sines).
    pub fn rope(&self, x: &Dev<f32>, table: &Dev<f32>, head_dim: usize) -> Done {
        if x.is_empty() {
            return Ok(());
        }
        let rows = table.len() / head_dim;
        assert!(head_dim.is_multiple_of(2) && table.len() == rows * head_dim, "pairs");
        assert!(x.len().is_multiple_of(rows * head_dim), "whole heads");
        let pairs = x.len() / 2;
        let args = Args::default().dev(x).dev(table).u32(x.len() / rows).u32(head_dim);
        // SAFETY: shapes as asserted.
        unsafe {
            self.launch(Source::Elementwise, "rope", self.each(pairs), args.word(pairs as u64))
        }
    }

    /// `x += y`.
    pub fn add(&self, x: &Dev<f32>, y: &Dev<f32>) -> Done {
        assert_eq!(x.len(), y.len(), "x and y are of one shape");
        let args = Args::default().dev(x).dev(y).word(x.len() as u64);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Elementwise, "add_to", self.each(x.len()), args) }
    }

    /// Limits every value to `[-limit, limit]`.
    pub fn clamp(&self, x: &Dev<f32>, limit: f32) -> Done {
        let args = Args::default().dev(x).f32(limit).word(x.len() as u64);
        // SAFETY: the whole buffer.
        unsafe { self.launch(Source::Elementwise, "clamp", self.each(x.len()), args) }
    }

    /// `x[r, :] *= sigmoid(logits[r])`.
    pub fn sigmoid_gate(&self, x: &Dev<f32>, logits: &Dev<f32>) -> Done {
        if x.is_empty() {
            return Ok(());
        }
        assert!(x.len().is_multiple_of(logits.len()), "one logit per row");
        let cols = x.len() / logits.len();
        let args = Args::default().dev(x).dev(logits).u32(cols).word(x.len() as u64);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Elementwise, "sigmoid_gate", self.each(x.len()), args) }
    }

    /// `out[i, :] = x[rows[i], :]`; the rows are rows of x.
    pub fn select_rows(&self, x: &Dev<f32>, rows: &Dev<u32>, cols: usize, out: &Dev<f32>) -> Done {
        assert!(out.len() == rows.len() * cols && x.len().is_multiple_of(cols), "[rows, cols]");
        let args = Args::default().dev(x).dev(rows).u32(cols).dev(out).word(out.len() as u64);
        // SAFETY: shapes as asserted; the rows are the caller's promise.
        unsafe { self.launch(Source::Elementwise, "select_rows", self.each(out.len()), args) }
    }

    /// `x[rows[i], :] = from[i, :]`; the rows are rows of x, each at most once.
    pub fn put_rows(&self, from: &Dev<f32>, rows: &Dev<u32>, cols: usize, x: &Dev<f32>) -> Done {
        assert!(from.len() == rows.len() * cols && x.len().is_multiple_of(cols), "[rows, cols]");
        let args = Args::default().dev(from).dev(rows).u32(cols).dev(x).word(from.len() as u64);
        // SAFETY: shapes as asserted; the rows are the caller's promise.
        unsafe { self.launch(Source::Elementwise, "put_rows", self.each(from.len()), args) }
    }

    /// Pages of keys and values, every byte of which is `fill`.
    pub fn kv(&self, shape: KvShape, pages: usize, fill: u8) -> Result<DevKv, DeviceError> {
        Ok(DevKv { shape, pages: self.filled(pages * shape.page_bytes(), fill)? })
    }

    pub(super) fn cache(kv: &DevKv, layer: usize) -> [u64; 5] {
        let KvShape { layers, kv_heads, head_dim, .. } = kv.shape;
        assert!(layer < layers, "a layer of the arena");
        let head = kv.shape.head_bytes();
        let layer_at = (layer * kv_heads * head) as u64;
        let (heads, rest) = (pair(head, kv_heads), pair(head_dim, kv.shape.value_cols()));
        [kv.pages.at, kv.shape.page_bytes() as u64, layer_at, heads, rest]
    }

    /// Writes keys and values `[slots, kv_heads * head_dim]` into their slots (page, offset).
    pub fn kv_append(
        &self,
        kv: &DevKv,
        layer: usize,
        k: &Dev<f32>,
        v: &Dev<f32>,
        slots: &Dev<[u32; 2]>,
    ) -> Done {
        let (rows, heads) = (slots.len(), kv.shape.kv_heads);
        let len = rows * heads * kv.shape.head_dim;
        assert_eq!((k.len(), v.len()), (len, len), "k and v are [slots, kv_heads * head_dim]");
        let args = Args::default().dev(k).dev(v).structure(&Self::cache(kv, layer));
        let args = args.dev(slots).u32(rows);
        let grid = Grid::new((rows * heads * 2).div_ceil(WARPS), THREADS);
        // SAFETY: shapes as asserted; slots are inside the arena by the caller's promise.
        unsafe { self.launch(kv_source(kv.shape.dtype), "kv_append", grid, args) }
    }

    /// Room for the leaves of `rows` rows of `heads` heads up to a position.
    pub fn attention_parts(
        &self,
        rows: usize,
        heads: usize,
        head_dim: usize,
        longest: usize,
    ) -> Result<AttentionParts, DeviceError> {
        let parts = rows * heads * (longest / LEAF + 1);
        Ok(AttentionParts { sums: self.scratch(parts)?, values: self.scratch(parts * head_dim)? })
    }

    /// Causal attention of every row of q `[rows, heads * head_dim]` over its sequence.
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
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
        let KvShape { kv_heads, head_dim, dtype, .. } = kv.shape;
        let rows = queries.positions.len();
        if rows == 0 {
            return Ok(());
        }
        let heads = q.len() / rows / head_dim;
        let leaves = queries.longest / LEAF + 1;
        assert_eq!((q.len(), out.len()), (rows * heads * head_dim, q.len()), "[rows, cols]");
        assert!(heads > 0 && heads.is_multiple_of(kv_heads), "whole groups of heads");
        assert!(head_dim <= 4 * LEAF, "heads of at most {} elements", 4 * LEAF);
        assert_eq!(queries.tables.len(), rows * queries.stride, "a row of pages per query");
        assert!(queries.longest / PAGE_TOKENS < queries.stride, "a page for every position");
        assert!(parts.sums.len() >= rows * heads * leaves, "room for the leaves");
        assert!(parts.values.len() >= rows * heads * leaves * head_dim, "room for the leaves");
        let window = window.map_or(0, |w| w.max(1) as usize);
        let group = heads / kv_heads;
        let args = Args::default().dev(q).structure(&Self::cache(kv, layer));
        let args = args.dev(&queries.tables).u32(queries.stride).dev(&queries.positions);
        let args = args.u32(heads).f32(scale).u32(window).u32(leaves);
        let args = args.dev(&parts.sums).dev(&parts.values).dev(out);
        let grid = Grid {
            blocks: [leaves, kv_heads, rows],
            threads: THREADS,
            shared: group * (head_dim + LEAF + 8 + 2) * size_of::<f32>(),
        };
        let source = kv_source(dtype);
        // SAFETY: shapes as asserted; pages are inside the arena and positions at most `longest`
        // by the caller's promise.
        unsafe { self.launch(source, "attention_leaf", grid, args)? };
        if leaves == 1 {
            return Ok(());
        }
        let args = Args::default().dev(&queries.positions).u32(heads).u32(head_dim).u32(window);
        let args = args.u32(leaves).dev(&parts.sums).dev(&parts.values).dev(out);
        let threads = head_dim.next_multiple_of(32).min(256) as u32;
        let grid = Grid { blocks: [heads, rows, 1], threads, shared: 0 };
        // SAFETY: as above.
        unsafe { self.launch(source, "attention_tree", grid, args) }
    }
}

pub(super) fn kv_source(dtype: KvDType) -> Source {
    Source::Attention(match dtype {
        KvDType::F32 => 0,
        KvDType::Bf16 => 1,
        KvDType::Int8 => 2,
    })
}
