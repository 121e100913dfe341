//! A GPU as a [`Device`], operation by operation: what a pass uses where it has to come back to the
//! host in every layer. Each operation has the CPU's bits.
//!
//! What only the host has (rotary tables, parts of experts that came from other nodes) is computed
//! there and taken to the device.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crate::{
    cpu::Cpu,
    cuda::{
        Cuda, Dev,
        fast::Math,
        launch::{DevKv, DevMatrix, DevQueries, Experts, Linear, row_words},
    },
    device::{Device, DeviceError, Projection, Swiglu, SwigluGroup},
    dtype::DType,
    kv::{KvShape, KvSlot, Query},
    matrix::PackedMatrix,
    ops::{elementwise, rope},
};

type Done = Result<(), DeviceError>;

/// Rows from which products are done in tiles.
const TILE_ROWS_MIN: usize = 32;

/// A GPU and the CPU that feeds it.
pub struct Gpu {
    cuda: Cuda,
    cpu: Arc<Cpu>,
    operations: AtomicU64,
}

/// Activations `[rows, cols]` in the GPU's memory.
pub struct GpuTensor {
    rows: usize,
    cols: usize,
    data: Dev<f32>,
}

impl GpuTensor {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values `[rows * cols]`.
    pub fn data(&self) -> &Dev<f32> {
        &self.data
    }
}

/// Routes of one call, whose networks have one shape and format.
struct Kind {
    dtype: DType,
    intermediate: usize,
}

impl Gpu {
    /// A GPU whose host's share is computed by `cpu`.
    pub fn new(cuda: Cuda, cpu: Arc<Cpu>) -> Self {
        Self { cuda, cpu, operations: AtomicU64::new(0) }
    }

    /// The GPU.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// The CPU.
    pub fn cpu(&self) -> &Arc<Cpu> {
        &self.cpu
    }

    fn ended(&self) {
        self.operations.fetch_add(1, Relaxed);
    }

    /// Rows as products with weights of a format read them.
    fn rows_for(
        &self,
        x: &GpuTensor,
        dtype: DType,
        records: &mut Option<Dev<f32>>,
    ) -> Result<Dev<f32>, DeviceError> {
        if !dtype.is_quantised() {
            return Ok(x.data.part(0, x.data.len()));
        }
        if records.is_none() {
            let words = x.rows * row_words(dtype, Math::Exact, x.cols);
            let made = self.cuda.scratch(words)?;
            self.cuda.quantise(&x.data, x.cols, x.rows, &made)?;
            *records = Some(made);
        }
        Ok(records.as_ref().map_or_else(|| x.data.part(0, 0), |made| made.part(0, made.len())))
    }

    /// Products of the same rows, of one format after the other.
    fn products(&self, x: &GpuTensor, products: &[Linear<'_>]) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        let mut records = None;
        let mut rest = products;
        while let Some(first) = rest.first() {
            let (dtype, k) = (first.weight.dtype(), first.weight.k());
            assert_eq!(k, x.cols, "x is [rows, k]");
            let same = rest.iter().take_while(|p| p.weight.dtype() == dtype).count();
            let (now, later) = rest.split_at(same);
            rest = later;
            if x.rows == 1 && self.cuda.one_fits(k) {
                self.cuda.linear_one(&x.data, None, now, false)?;
                continue;
            }
            let rows = self.rows_for(x, dtype, &mut records)?;
            if x.rows >= TILE_ROWS_MIN && self.cuda.tiles_fit(dtype, k) {
                self.cuda.linear_tiles(&rows, x.rows, now, false, None)?;
            } else {
                self.cuda.matmul(&rows, x.rows, now, false)?;
            }
        }
        self.ended();
        Ok(())
    }

    /// Networks of one kind over rows: row r of x is for network `of[r]` of `table`.
    fn networks(
        &self,
        kind: &Kind,
        table: &[[u64; 3]],
        of: &[u32],
        x: &GpuTensor,
    ) -> Result<Dev<f32>, DeviceError> {
        let (cuda, hidden, routes) = (&self.cuda, x.cols, of.len());
        let Kind { dtype, intermediate } = *kind;
        let math = Math::Exact;
        let table_len = table.len();
        let experts = Experts { dtype, math, hidden, intermediate, table: cuda.lend(table)? };
        let tiles = cuda.tiles_fit(dtype, hidden) && cuda.tiles_fit(dtype, intermediate);
        let item_rows = match routes.div_ceil(table_len.max(1)) {
            0 | 1 => 1,
            2..=4 => 4,
            5..=8 => 8,
            9..TILE_ROWS_MIN => 16,
            _ if tiles => 64,
            _ => 16,
        };
        let grouped = cuda.grouped(routes, table_len, item_rows)?;
        cuda.group_routes(&cuda.lend(of)?, table_len, &grouped)?;
        let rows = self.rows_for(x, dtype, &mut None)?;
        let between = cuda.scratch(routes * row_words(dtype, math, intermediate))?;
        let parts = cuda.scratch(routes * hidden)?;
        match item_rows {
            64 => cuda.swiglu_tiles(&experts, &grouped, 1, &rows, &between, &parts)?,
            _ => cuda.swiglu_routes(&experts, &grouped, 1, &rows, &between, &parts)?,
        }
        self.ended();
        Ok(parts)
    }
}

fn addresses(weights: Swiglu<'_, DevMatrix>) -> [u64; 3] {
    [weights.gate, weights.up, weights.down].map(|matrix| matrix.data().address())
}

fn slots_of(slots: &[KvSlot]) -> Vec<[u32; 2]> {
    slots.iter().map(|slot| [slot.page, slot.offset]).collect()
}

impl Device for Gpu {
    type Tensor = GpuTensor;
    type Matrix = DevMatrix;
    type Vector = Dev<f32>;
    type KvArena = DevKv;

    fn describe(&self) -> String {
        self.cuda.describe().to_owned()
    }

    fn host_threads(&self) -> usize {
        self.cpu.pool().threads()
    }

    fn matrix(&self, packed: PackedMatrix) -> Result<DevMatrix, DeviceError> {
        self.cuda.matrix(&packed)
    }

    fn vector(&self, values: &[f32]) -> Result<Dev<f32>, DeviceError> {
        self.cuda.upload(values)
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<GpuTensor, DeviceError> {
        Ok(GpuTensor { rows, cols, data: self.cuda.scratch(rows * cols)? })
    }

    fn reshape(&self, t: &mut GpuTensor, rows: usize, cols: usize) -> Done {
        if rows * cols <= t.data.len() {
            *t = GpuTensor { rows, cols, data: t.data.part(0, rows * cols) };
        } else {
            *t = self.tensor(rows, cols)?;
        }
        Ok(())
    }

    fn read<'a>(&self, t: &'a GpuTensor) -> Result<Cow<'a, [f32]>, DeviceError> {
        let values = self.cuda.download(&t.data)?;
        self.ended();
        Ok(values.into())
    }

    fn write(&self, t: &mut GpuTensor, values: &[f32]) -> Done {
        assert_eq!(values.len(), t.data.len(), "[rows * cols]");
        self.cuda.write(&t.data, 0, values)
    }

    fn progress(&self) -> u64 {
        self.operations.load(Relaxed)
    }

    fn embed(&self, table: &DevMatrix, ids: &[u32], out: &mut GpuTensor) -> Done {
        self.cuda.embed(table, &self.cuda.lend(ids)?, &out.data)
    }

    fn rms_norm(&self, x: &GpuTensor, weight: &Dev<f32>, eps: f32, out: &mut GpuTensor) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        self.cuda.rms_norm(&x.data, weight, eps, &out.data)
    }

    fn rms_norm_in_place(&self, x: &mut GpuTensor, weight: &Dev<f32>, eps: f32) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        self.cuda.rms_norm(&x.data, weight, eps, &x.data)
    }

    fn matmul(
        &self,
        x: &GpuTensor,
        weight: &DevMatrix,
        bias: Option<&Dev<f32>>,
        out: &mut GpuTensor,
    ) -> Done {
        self.products(x, &[Linear { weight, bias, out: &out.data }])
    }

    fn project(&self, x: &GpuTensor, projections: [Projection<'_, Self>; 3]) -> Done {
        let products = projections.map(|p| (p.weight, p.bias, &*p.out));
        let products = products.map(|(weight, bias, out)| Linear { weight, bias, out: &out.data });
        self.products(x, &products)
    }

    fn clamp(&self, x: &mut GpuTensor, limit: f32) -> Done {
        self.cuda.clamp(&x.data, limit)
    }

    fn rotary_table(
        &self,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        out: &mut GpuTensor,
    ) -> Done {
        let mut values = vec![0.0; out.data.len()];
        rope::rotary_table(&self.cpu, positions, inv_freq, scale, &mut values);
        self.write(out, &values)
    }

    fn rope(&self, x: &mut GpuTensor, table: &GpuTensor) -> Done {
        self.cuda.rope(&x.data, &table.data, table.cols)
    }

    fn kv_arena(&self, shape: KvShape, pages: usize) -> Result<DevKv, DeviceError> {
        self.cuda.kv(shape, pages, 0)
    }

    fn kv_append(
        &self,
        arena: &mut DevKv,
        layer: usize,
        k: &GpuTensor,
        v: &GpuTensor,
        slots: &[KvSlot],
    ) -> Done {
        let slots = self.cuda.lend(&slots_of(slots))?;
        self.cuda.kv_append(arena, layer, &k.data, &v.data, &slots)
    }

    fn attention(
        &self,
        arena: &DevKv,
        layer: usize,
        q: &GpuTensor,
        queries: &[Query<'_>],
        scale: f32,
        window: Option<u32>,
        out: &mut GpuTensor,
    ) -> Done {
        let head_dim = arena.shape().head_dim;
        let stride = queries.iter().map(|query| query.pages.len()).max().unwrap_or(0);
        let mut tables = Vec::with_capacity(queries.len() * stride);
        for query in queries {
            tables.extend_from_slice(query.pages);
            tables.resize(tables.len() + stride - query.pages.len(), 0);
        }
        let positions: Vec<u32> = queries.iter().map(|query| query.position).collect();
        let longest = positions.iter().copied().max().unwrap_or(0) as usize;
        let queries = DevQueries {
            tables: self.cuda.lend(&tables)?,
            stride,
            positions: self.cuda.lend(&positions)?,
            longest,
        };
        let parts = self.cuda.attention_parts(q.rows, q.cols / head_dim, head_dim, longest)?;
        self.cuda.attention(arena, layer, &q.data, &queries, scale, window, &parts, &out.data)?;
        self.ended();
        Ok(())
    }

    fn select_rows(&self, x: &GpuTensor, rows: &[u32], out: &mut GpuTensor) -> Done {
        self.cuda.select_rows(&x.data, &self.cuda.lend(rows)?, x.cols, &out.data)
    }

    fn weighted_sum(
        &self,
        parts: &[&[f32]],
        weights: &[f32],
        ends: &[u32],
        out: &mut GpuTensor,
    ) -> Done {
        // The parts are in the host's memory: one row for each of out is less to copy.
        let mut sums = vec![0.0; out.data.len()];
        elementwise::weighted_sum(&self.cpu, parts, weights, ends, &mut sums);
        self.write(out, &sums)
    }

    fn add(&self, x: &mut GpuTensor, y: &GpuTensor) -> Done {
        self.cuda.add(&x.data, &y.data)
    }

    fn swiglu(&self, x: &GpuTensor, weights: Swiglu<'_, DevMatrix>, out: &mut GpuTensor) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        let kind = Kind { dtype: weights.gate.dtype(), intermediate: weights.gate.n() };
        let parts = self.networks(&kind, &[addresses(weights)], &vec![0; x.rows], x)?;
        *out = GpuTensor { rows: x.rows, cols: x.cols, data: parts };
        Ok(())
    }

    fn sigmoid_gate(&self, x: &mut GpuTensor, logits: &GpuTensor) -> Done {
        self.cuda.sigmoid_gate(&x.data, &logits.data)
    }

    fn swiglu_groups(&self, groups: &mut [SwigluGroup<'_, DevMatrix>]) -> Done {
        // Networks of one shape and format go together.
        let mut kinds: BTreeMap<(&str, usize, usize), Vec<usize>> = BTreeMap::new();
        for (index, group) in groups.iter().enumerate().filter(|(_, g)| !g.rows.is_empty()) {
            let gate = group.weights.gate;
            kinds.entry((gate.dtype().name(), gate.n(), gate.k())).or_default().push(index);
        }
        for ((_, intermediate, hidden), members) in kinds {
            let dtype = groups[members[0]].weights.gate.dtype();
            let (mut table, mut of, mut rows) = (Vec::new(), Vec::new(), Vec::new());
            for (place, &member) in (0u32..).zip(&members) {
                let group = &groups[member];
                table.push(addresses(group.weights));
                of.extend(std::iter::repeat_n(place, group.rows.len()));
                group.rows.iter().for_each(|row| rows.extend_from_slice(row));
            }
            let x = GpuTensor { rows: of.len(), cols: hidden, data: self.cuda.lend(&rows)? };
            let parts = self.networks(&Kind { dtype, intermediate }, &table, &of, &x)?;
            let parts = self.cuda.download(&parts)?;
            let mut parts = parts.chunks_exact(hidden);
            for member in members {
                for (out, part) in groups[member].outputs.iter_mut().zip(&mut parts) {
                    out.copy_from_slice(part);
                }
            }
        }
        Ok(())
    }
}
