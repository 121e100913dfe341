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
        copy::Lane,
        fast::Math,
        launch::{DevKv, DevMatrix, DevQueries, Experts, Linear, row_words},
        sample::NONE,
    },
    device::{Device, DeviceError, Draw, Projection, Swiglu, SwigluGroup},
    dtype::DType,
    kv::{KvShape, KvSlot, Query},
    matrix::PackedMatrix,
    ops::{elementwise, rope},
};

type Done = Result<(), DeviceError>;

/// Rows of an expert's item in tiles of fast math (measured on an H100: 64 are slower).
const FAST_ITEM_ROWS: usize = 128;

/// Rows from which products are done in tiles.
const TILE_ROWS_MIN: usize = 32;

/// A GPU and the CPU that feeds it, and further GPUs whose memory holds experts, too.
pub struct Gpu {
    /// At least one: the first computes everything but experts of the others.
    cudas: Vec<Cuda>,
    cpu: Arc<Cpu>,
    math: Math,
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

impl Gpu {
    /// A GPU whose host's share is computed by `cpu`.
    pub fn new(cuda: Cuda, cpu: Arc<Cpu>) -> Self {
        Self { cudas: vec![cuda], cpu, math: Math::Exact, operations: AtomicU64::new(0) }
    }

    /// The same with another GPU of this host that takes a share of the experts.
    ///
    /// # Errors
    /// The two cannot reach each other's memory.
    pub fn beside(mut self, other: Cuda) -> Result<Self, DeviceError> {
        for cuda in &self.cudas {
            cuda.reach(&other)?;
            other.reach(cuda)?;
        }
        self.cudas.push(other);
        Ok(self)
    }

    /// The same, whose products are computed so.
    pub fn by(self, math: Math) -> Self {
        Self { math, ..self }
    }

    /// How products are computed: with [`Math::Fast`] all that bf16 weights take part in.
    pub fn math(&self) -> Math {
        self.math
    }

    /// Whether products with weights of a format read records, or pairs of bf16, and not f32 rows.
    pub fn reads_records(&self, dtype: DType) -> bool {
        dtype.is_quantised() || self.math.is_fast(dtype)
    }

    /// Words of a record of `k` values: of integers, or of pairs.
    pub fn record_words(&self, k: usize) -> usize {
        match self.math {
            Math::Exact => row_words(DType::Int8, Math::Exact, k),
            Math::Fast => row_words(DType::Bf16, Math::Fast, k),
        }
    }

    /// Records of `rows` rows of `k` values.
    pub fn record(&self, x: &Dev<f32>, k: usize, rows: usize, records: &Dev<f32>) -> Done {
        match self.math {
            Math::Exact => self.cuda().quantise(x, k, rows, records),
            Math::Fast => self.cuda().pair_rows(x, k, rows, records),
        }
    }

    /// Rows normed as `weight` says, and their records where these are wanted.
    pub fn norm_rows(
        &self,
        x: &Dev<f32>,
        weight: &Dev<f32>,
        eps: f32,
        out: &Dev<f32>,
        records: Option<&Dev<f32>>,
    ) -> Done {
        match (records, self.math) {
            (Some(pairs), Math::Fast) => self.cuda().norm_pairs(x, weight, eps, Some(out), pairs),
            _ => self.cuda().norm_rows(x, weight, eps, Some(out), records),
        }
    }

    /// Whether products with `k` inputs can be done in tiles.
    fn tiles_fit(&self, dtype: DType, k: usize) -> bool {
        match self.math.is_fast(dtype) {
            true => self.cuda().tensor_fits(k),
            false => self.cuda().tiles_fit(dtype, k),
        }
    }

    /// The GPU.
    pub fn cuda(&self) -> &Cuda {
        &self.cudas[0]
    }

    /// All GPUs, the first of which is [`Gpu::cuda`].
    pub fn cudas(&self) -> &[Cuda] {
        &self.cudas
    }

    /// The CPU.
    pub fn cpu(&self) -> &Arc<Cpu> {
        &self.cpu
    }

    /// Counts an operation that has ended: see [`Device::progress`].
    pub fn ended(&self) {
        self.operations.fetch_add(1, Relaxed);
    }

    /// Products of `m` rows by matrices of any formats, by the kernels that suit so many rows: weights
    /// of integers and fast ones read `records`, others the f32 `rows`. With `adds` they are added to the outputs.
    pub fn linears(
        &self,
        rows: &Dev<f32>,
        records: &Dev<f32>,
        m: usize,
        products: &[Linear<'_>],
        adds: bool,
    ) -> Done {
        let mut rest = products;
        while let Some(first) = rest.first() {
            let (dtype, k) = (first.weight.dtype(), first.weight.k());
            let same = rest.iter().take_while(|p| p.weight.dtype() == dtype).count();
            let (now, later) = rest.split_at(same);
            rest = later;
            let quantised = dtype.is_quantised();
            let x = if self.reads_records(dtype) { records } else { rows };
            // Of bf16, tiles for 64 rows took half as long again (H100).
            let many = m >= TILE_ROWS_MIN && (quantised || m > 64);
            if m == 1 && self.cuda().one_linear_fits(k) {
                self.cuda().linear_one(rows, None, now, adds)?;
            } else if many && self.tiles_fit(dtype, k) {
                self.cuda().linear_tiles(x, m, now, adds, None)?;
            } else {
                self.cuda().matmul(x, m, now, adds)?;
            }
        }
        self.ended();
        Ok(())
    }

    /// The networks of experts over rows, by the kernels that suit so many: route r, whose expert is
    /// `index[r]`, reads row `r / per_row` of the f32 rows, or of their records where weights are
    /// integers or fast. Returns `[routes, hidden]`.
    ///
    /// `kinds` is a list for each GPU that holds some of the experts, the first one's first; an entry is a table
    /// of all experts, in which those of another shape or format, and those elsewhere, are absent. Each GPU
    /// computes what its experts are asked for and writes it into the first one's memory.
    pub fn networks(
        &self,
        kinds: &[Vec<&Experts>],
        index: &Dev<u32>,
        per_row: usize,
        (rows, records): (&Dev<f32>, &Dev<f32>),
    ) -> Result<Dev<f32>, DeviceError> {
        let cuda = self.cuda();
        let hidden = kinds.iter().flatten().map(|kind| kind.hidden).max().unwrap_or(0);
        let parts = cuda.scratch(index.len() * hidden)?;
        let mut ends = Vec::new();
        if kinds.len() > 1 {
            let ready = cuda.record(Lane::Compute)?;
            for (other, kinds) in self.cudas.iter().zip(kinds).skip(1) {
                other.stream_wait(Lane::Compute, &ready)?;
                let here = |from: &Dev<f32>, wanted: bool| {
                    let to = other.scratch(if wanted { from.len() } else { 0 })?;
                    let from = from.part(0, to.len());
                    other.copy_from(cuda, &from, &to).map(|()| to)
                };
                let integers = |kind: &&Experts| self.reads_records(kind.dtype);
                let rows = here(rows, !kinds.iter().all(integers))?;
                let records = here(records, kinds.iter().any(integers))?;
                let own = other.scratch(index.len())?;
                other.copy_from(cuda, index, &own)?;
                self.networks_on(other, kinds, &own, per_row, (&rows, &records), &parts)?;
                ends.push(other.record(Lane::Compute)?);
            }
        }
        if let Some(kinds) = kinds.first() {
            self.networks_on(cuda, kinds, index, per_row, (rows, records), &parts)?;
        }
        ends.iter().try_for_each(|end| cuda.stream_wait(Lane::Compute, end))?;
        self.ended();
        Ok(parts)
    }

    /// Networks by one of the GPUs, to `parts`, which may be another's memory.
    fn networks_on(
        &self,
        cuda: &Cuda,
        kinds: &[&Experts],
        index: &Dev<u32>,
        per_row: usize,
        (rows, records): (&Dev<f32>, &Dev<f32>),
        parts: &Dev<f32>,
    ) -> Done {
        let Some(first) = kinds.first() else { return Ok(()) };
        let (routes, experts) = (index.len(), first.table.len());
        let fits = |kind: &Experts| {
            self.tiles_fit(kind.dtype, kind.hidden) && self.tiles_fit(kind.dtype, kind.intermediate)
        };
        let tiles = kinds.iter().all(|kind| fits(kind));
        let item_rows = match routes.div_ceil(experts.max(1)) {
            _ if routes == per_row => 1,
            0 | 1 => 4,
            2..16 => 8,
            16..TILE_ROWS_MIN => 16,
            _ if tiles && self.math == Math::Fast => FAST_ITEM_ROWS,
            _ if tiles => 64,
            _ => 16,
        };
        let grouped = cuda.grouped(routes, experts, item_rows)?;
        cuda.group_routes(index, experts, &grouped)?;
        for kind in kinds {
            let Experts { dtype, math, intermediate, .. } = **kind;
            let between = cuda.scratch(routes * row_words(dtype, math, intermediate))?;
            let x = if self.reads_records(dtype) { records } else { rows };
            match item_rows {
                64 | FAST_ITEM_ROWS => {
                    cuda.swiglu_tiles(kind, &grouped, per_row, x, &between, parts)?
                }
                _ => cuda.swiglu_routes(kind, &grouped, per_row, x, &between, parts)?,
            }
        }
        Ok(())
    }

    /// Records of all rows, or pairs, if weights of some of these formats read them, else nothing. A
    /// model that is computed fast has no integers.
    fn records(
        &self,
        x: &GpuTensor,
        mut formats: impl Iterator<Item = DType>,
    ) -> Result<Dev<f32>, DeviceError> {
        let Some(format) = formats.find(|&format| self.reads_records(format)) else {
            return self.cuda().scratch(0);
        };
        if self.math.is_fast(format) {
            let pairs = self.cuda().scratch(x.rows * row_words(format, self.math, x.cols))?;
            self.cuda().pair_rows(&x.data, x.cols, x.rows, &pairs)?;
            return Ok(pairs);
        }
        let records = self.cuda().scratch(x.rows * row_words(DType::Int8, Math::Exact, x.cols))?;
        self.cuda().quantise(&x.data, x.cols, x.rows, &records)?;
        Ok(records)
    }

    fn products(&self, x: &GpuTensor, products: &[Linear<'_>]) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        let records = self.records(x, products.iter().map(|p| p.weight.dtype()))?;
        self.linears(&x.data, &records, x.rows, products, false)
    }

    /// Networks of the shape and format of `like`: row r of x is for network `of[r]` of `table`.
    fn run_networks(
        &self,
        like: Swiglu<'_, DevMatrix>,
        table: &[[u64; 3]],
        of: &[u32],
        x: &GpuTensor,
    ) -> Result<Dev<f32>, DeviceError> {
        let (dtype, intermediate) = (like.gate.dtype(), like.gate.n());
        let (math, table) = (self.math, self.cuda().lend(table)?);
        let experts = Experts { dtype, math, hidden: x.cols, intermediate, table };
        let records = self.records(x, std::iter::once(dtype))?;
        self.networks(&[vec![&experts]], &self.cuda().lend(of)?, 1, (&x.data, &records))
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
        self.cudas.iter().map(Cuda::describe).collect::<Vec<_>>().join(" and ")
    }

    fn host(&self) -> &Cpu {
        &self.cpu
    }

    fn matrix(&self, packed: PackedMatrix) -> Result<DevMatrix, DeviceError> {
        let matrix = self.cuda().matrix(&packed)?.by(self.math);
        self.ended();
        Ok(matrix)
    }

    fn vector(&self, values: &[f32]) -> Result<Dev<f32>, DeviceError> {
        self.cuda().upload(values)
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<GpuTensor, DeviceError> {
        Ok(GpuTensor { rows, cols, data: self.cuda().scratch(rows * cols)? })
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
        let values = self.cuda().download(&t.data)?;
        self.ended();
        Ok(values.into())
    }

    fn is_finite(&self, t: &GpuTensor) -> Result<bool, DeviceError> {
        let first = self.cuda().scratch(t.rows)?;
        self.cuda().finite(&t.data, &first)?;
        let first: Vec<u32> = self.cuda().download(&first)?;
        self.ended();
        Ok(first.iter().all(|&column| column == NONE))
    }

    fn chooses(&self, vocabulary: usize) -> bool {
        self.cuda().samples(vocabulary)
    }

    fn choose(&self, logits: &GpuTensor, draws: &[Draw]) -> Result<Option<Vec<u32>>, DeviceError> {
        if !self.cuda().samples(logits.cols) {
            return Ok(None);
        }
        let (weights, out) =
            (self.cuda().scratch(logits.data.len())?, self.cuda().scratch(draws.len())?);
        self.cuda().sample(&logits.data, &self.cuda().lend(draws)?, &weights, &out)?;
        let chosen: Vec<[u32; 2]> = self.cuda().download(&out)?;
        self.ended();
        // Where a row has none, the host says why.
        Ok(chosen.into_iter().map(|[token, _]| (token != NONE).then_some(token)).collect())
    }

    fn write(&self, t: &mut GpuTensor, values: &[f32]) -> Done {
        assert_eq!(values.len(), t.data.len(), "[rows * cols]");
        self.cuda().write(&t.data, 0, values)
    }

    fn progress(&self) -> u64 {
        self.operations.load(Relaxed)
    }

    fn lost(&self) -> Option<String> {
        self.cudas.iter().find_map(Cuda::lost).map(str::to_owned)
    }

    fn embed(&self, table: &DevMatrix, ids: &[u32], out: &mut GpuTensor) -> Done {
        self.cuda().embed(table, &self.cuda().lend(ids)?, &out.data)
    }

    fn rms_norm(&self, x: &GpuTensor, weight: &Dev<f32>, eps: f32, out: &mut GpuTensor) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        self.cuda().rms_norm(&x.data, weight, eps, &out.data)
    }

    fn rms_norm_in_place(&self, x: &mut GpuTensor, weight: &Dev<f32>, eps: f32) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        self.cuda().rms_norm(&x.data, weight, eps, &x.data)
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
        self.cuda().clamp(&x.data, limit)
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
        self.cuda().rope(&x.data, &table.data, table.cols)
    }

    fn kv_arena(&self, shape: KvShape, pages: usize) -> Result<DevKv, DeviceError> {
        self.cuda().kv(shape, pages, 0)
    }

    fn kv_append(
        &self,
        arena: &mut DevKv,
        layer: usize,
        k: &GpuTensor,
        v: &GpuTensor,
        slots: &[KvSlot],
    ) -> Done {
        let slots = self.cuda().lend(&slots_of(slots))?;
        self.cuda().kv_append(arena, layer, &k.data, &v.data, &slots)
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
            tables: self.cuda().lend(&tables)?,
            stride,
            positions: self.cuda().lend(&positions)?,
            longest,
        };
        let (cuda, fast) = (self.cuda(), self.math == Math::Fast);
        let parts = cuda.attention_parts(q.rows, q.cols / head_dim, head_dim, longest)?;
        let (heads, q, out) = (q.cols / head_dim, &q.data, &out.data);
        if fast && cuda.attention_fast_fits(arena, heads) {
            cuda.attention_fast(arena, layer, q, &queries, scale, window, &parts, out)?;
        } else {
            cuda.attention(arena, layer, q, &queries, scale, window, &parts, out)?;
        }
        self.ended();
        Ok(())
    }

    fn select_rows(&self, x: &GpuTensor, rows: &[u32], out: &mut GpuTensor) -> Done {
        self.cuda().select_rows(&x.data, &self.cuda().lend(rows)?, x.cols, &out.data)
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
        self.cuda().add(&x.data, &y.data)
    }

    fn swiglu(&self, x: &GpuTensor, weights: Swiglu<'_, DevMatrix>, out: &mut GpuTensor) -> Done {
        if x.rows == 0 {
            return Ok(());
        }
        let parts = self.run_networks(weights, &[addresses(weights)], &vec![0; x.rows], x)?;
        *out = GpuTensor { rows: x.rows, cols: x.cols, data: parts };
        Ok(())
    }

    fn sigmoid_gate(&self, x: &mut GpuTensor, logits: &GpuTensor) -> Done {
        self.cuda().sigmoid_gate(&x.data, &logits.data)
    }

    fn swiglu_groups(&self, groups: &mut [SwigluGroup<'_, DevMatrix>]) -> Done {
        // Networks of one shape and format go together.
        let mut kinds: BTreeMap<(&str, usize, usize), Vec<usize>> = BTreeMap::new();
        for (index, group) in groups.iter().enumerate().filter(|(_, g)| !g.rows.is_empty()) {
            let gate = group.weights.gate;
            kinds.entry((gate.dtype().name(), gate.n(), gate.k())).or_default().push(index);
        }
        for ((_, _, hidden), members) in kinds {
            let like = groups[members[0]].weights;
            let (mut table, mut of, mut rows) = (Vec::new(), Vec::new(), Vec::new());
            for (place, &member) in (0u32..).zip(&members) {
                let group = &groups[member];
                table.push(addresses(group.weights));
                of.extend(std::iter::repeat_n(place, group.rows.len()));
                group.rows.iter().for_each(|row| rows.extend_from_slice(row));
            }
            let x = GpuTensor { rows: of.len(), cols: hidden, data: self.cuda().lend(&rows)? };
            let parts = self.run_networks(like, &table, &of, &x)?;
            let parts = self.cuda().download(&parts)?;
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
