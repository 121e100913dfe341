//! Attention beside this run's own ceilings: the rate of f32 products for prefill, the bandwidth
//! of reading memory for decode.
//!
//! `cargo bench -p lite-llm-kernels --bench attention`. Caches of several layers take turns, so
//! that no cache of the processor holds what a decode reads. `LITE_LLM_THREADS` sets the threads.

use std::time::Instant;

use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    device::Device,
    dtype::DType,
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS, Query},
    matrix::{PackedMatrix, Source},
    measure,
    ops::{arena::KvArena, matmul::matmul},
    rows::Rows,
    simd::Simd,
};

/// Bytes of cache that the layers take together.
const CACHE_BYTES: usize = 256 << 20;

fn tensor(rows: usize, cols: usize) -> Tensor {
    let mut t = Tensor::zeros(rows, cols);
    for (i, x) in t.as_mut_slice().iter_mut().enumerate() {
        *x = ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5;
    }
    t
}

/// Best time of several calls.
fn best(calls: usize, mut call: impl FnMut()) -> f64 {
    (0..calls)
        .map(|_| {
            let from = Instant::now();
            call();
            from.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// f32 products of 512 rows, in GFLOP/s.
fn product_rate(cpu: &Cpu) -> f64 {
    let (m, n, k) = (512, 2048, 2048);
    let (x, w) = (tensor(m, k), tensor(n, k));
    let packed = PackedMatrix::pack(DType::F32, n, k, Source::F32(w.as_slice()));
    let mut out = vec![0.0; m * n];
    let time = best(8, || matmul(cpu, Rows::dense(x.as_slice(), k), &packed, None, &mut out));
    2.0 * (m * n * k) as f64 / time / 1e9
}

/// A model's heads, its cache of one sequence, and how many layers that cache has.
struct Case<'a> {
    cpu: &'a Cpu,
    heads: usize,
    shape: KvShape,
    context: usize,
    pages: Vec<u32>,
    arena: KvArena,
    /// GB/s of keys and values that were appended in one chunk.
    append_rate: f64,
}

impl<'a> Case<'a> {
    fn new(cpu: &'a Cpu, dtype: KvDType, heads: usize, kv_heads: usize, context: usize) -> Self {
        let shape = KvShape { layers: 1, kv_heads, head_dim: 128, dtype };
        let layer_bytes = shape.page_bytes() * context / PAGE_TOKENS;
        let shape = KvShape { layers: (CACHE_BYTES / layer_bytes).max(1), ..shape };
        let pages: Vec<u32> = (0..context.div_ceil(PAGE_TOKENS) as u32).collect();
        let mut arena = cpu.kv_arena(shape, pages.len()).expect("memory for the cache");
        let slots: Vec<KvSlot> = (0..context)
            .map(|p| KvSlot { page: pages[p / PAGE_TOKENS], offset: (p % PAGE_TOKENS) as u32 })
            .collect();
        let cols = kv_heads * shape.head_dim;
        let (k, v) = (tensor(context, cols), tensor(context, cols));
        let mut append_all = || {
            let from = Instant::now();
            for layer in 0..shape.layers {
                cpu.kv_append(&mut arena, layer, &k, &v, &slots).expect("the slots are there");
            }
            from.elapsed().as_secs_f64()
        };
        append_all();
        let bytes = (shape.layers * context * cols * 2 * size_of::<f32>()) as f64;
        let append_rate = bytes / append_all() / 1e9;
        Self { cpu, heads, shape, context, pages, arena, append_rate }
    }

    /// Best seconds of attention of the rows at `positions` in one layer.
    fn time(&self, positions: std::ops::Range<usize>, calls: usize) -> f64 {
        let cols = self.heads * self.shape.head_dim;
        let (q, mut out) = (tensor(positions.len(), cols), Tensor::zeros(positions.len(), cols));
        let queries: Vec<Query<'_>> =
            positions.map(|p| Query { pages: &self.pages, position: p as u32 }).collect();
        let mut layer = 0;
        best(calls, || {
            layer = (layer + 1) % self.shape.layers;
            self.cpu
                .attention(&self.arena, layer, &q, &queries, 0.088, None, &mut out)
                .expect("the pages are written");
        })
    }

    fn decode(&self, bandwidth: f64) {
        let time = self.time(self.context - 1..self.context, 3 * self.shape.layers.max(20));
        let bytes = self.shape.page_bytes() * self.context / PAGE_TOKENS / self.shape.layers;
        let rate = bytes as f64 / time / 1e9;
        println!(
            "decode 1 row at {}: {} heads of {} x {}: {:.0} us, {rate:.1} GB/s, {:.3} of reading",
            self.context,
            self.heads,
            self.shape.kv_heads,
            self.shape.head_dim,
            time * 1e6,
            rate / bandwidth,
        );
    }

    fn prefill(&self, products: f64) {
        let rows = self.context - 512..self.context;
        let keys: usize = rows.clone().map(|p| p + 1).sum();
        let time = self.time(rows.clone(), 5);
        let rate = 4.0 * (keys * self.heads * self.shape.head_dim) as f64 / time / 1e9;
        println!(
            "prefill rows {rows:?}: {} heads of {} x {}: {:.2} ms, {rate:.0} GFLOP/s, {:.3} of \
             products; append {:.1} GB/s",
            self.heads,
            self.shape.kv_heads,
            self.shape.head_dim,
            time * 1e3,
            rate / products,
            self.append_rate,
        );
    }
}

fn main() {
    let threads = std::env::var("LITE_LLM_THREADS").map_or(2, |n| n.parse().expect("a number"));
    for simd in Simd::available().into_iter().filter(|s| *s != Simd::Scalar) {
        let cpu = Cpu::new(threads, simd);
        let products = product_rate(&cpu);
        let bandwidth = measure::read_bandwidth(&cpu, CACHE_BYTES) / 1e9;
        println!("{}: {products:.0} GFLOP/s, {bandwidth:.1} GB/s", cpu.describe());
        for dtype in KvDType::ALL {
            println!("{dtype} cache");
            for (heads, kv_heads) in [(16, 16), (32, 4)] {
                for context in [512, 4096] {
                    let case = Case::new(&cpu, dtype, heads, kv_heads, context);
                    case.decode(bandwidth);
                    case.prefill(products);
                }
            }
        }
    }
}
