//! `lite-llm bench kernels`: packed products beside the `gemm` crate, and products with weights
//! of every format that no cache holds beside what memory and multipliers allow.
//!
//! Shapes: `[rows, K] · [N, K]ᵀ`. Operations are counted as 2 · rows · N · K, bytes as those of
//! the packed weights. The ceiling of a product is the lesser of what the multipliers do at best
//! and of the rate at which weights can be read, both measured in the same run.

use anyhow::Result;
use lite_llm_actors::node::DeviceChoice;
use lite_llm_kernels::{
    RELAXED_ORDER,
    buffer::AlignedBytes,
    cpu::Cpu,
    dtype::DType,
    math::Math,
    matrix::{PackedMatrix, Source},
    measure::{peak_operations, read_bandwidth},
    ops::matmul::matmul,
    rows::Rows,
};
use serde_json::{Value, json};

use super::samples::{Goal, Samples, print_table, take_turns};
use crate::{
    cli::{BenchKernelsArgs, ComputeArgs},
    progress::{Progress, Unit},
    size::Size,
};

/// Rows of the tables.
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 256, 512];
/// `(N, K)` of the products that are compared with `gemm`.
const SQUARES: [(usize, usize); 2] = [(2048, 2048), (1024, 1024)];
/// K of the matrices that no cache holds, and their bytes.
const LARGE_K: usize = 2048;
const LARGE_BYTES: usize = 128 << 20;
/// What is asked of 512 rows against `gemm`.
const GEMM_RATIO: f64 = 0.9;
/// What is asked of one row in bf16 against reading memory.
const READ_RATIO: f64 = 0.8;

pub(super) async fn measure(args: BenchKernelsArgs, json: bool) -> Result<()> {
    let BenchKernelsArgs { threads, simd, runs } = args;
    let cpu = ComputeArgs {
        threads,
        simd,
        dram: None,
        nvme: None,
        kv: Some(Size(0)),
        device: DeviceChoice::Cpu,
        hbm: None,
        math: Math::Exact,
    }
    .cpu(1)?;
    let runs = usize::from(runs);
    let report = tokio::task::spawn_blocking(move || {
        let steps = ((SQUARES.len() + DType::ALL.len()) * ROWS.len()) as u64;
        let mut progress = Progress::new("bench kernels", Unit::Things("shapes"), json);
        let mut done = 0;
        let mut step = |now: &str| {
            progress.update(done, steps, now);
            done += 1;
        };
        let (threads, simd) = (cpu.pool().threads(), cpu.simd().to_string());
        let mut report = Report { threads, simd, ..Report::default() };
        for (n, k) in SQUARES {
            compare_with_gemm(&cpu, n, k, runs, &mut report, &mut step);
        }
        compare_with_ceilings(&cpu, runs, &mut report, &mut step);
        progress.finish();
        report
    })
    .await?;
    match json {
        true => say!("{}", report.json()),
        false => report.print(),
    }
    Ok(())
}

/// A product that was measured beside `gemm`.
struct Against {
    rows: usize,
    n: usize,
    k: usize,
    /// GFLOP/s of ours in f32 and of `gemm`.
    ours: Samples,
    gemm: Samples,
}

/// A product that was measured beside reading memory and the peak of the multipliers.
struct Streamed {
    dtype: DType,
    rows: usize,
    /// GB/s of weights.
    rate: Samples,
    /// GFLOP per GB of weights.
    intensity: f64,
    /// GB/s that the machine read meanwhile.
    read: Samples,
    /// GFLOP/s that its multipliers do at best.
    peak: f64,
}

#[derive(Default)]
struct Report {
    threads: usize,
    simd: String,
    against: Vec<Against>,
    streamed: Vec<Streamed>,
}

impl Against {
    fn ratio(&self) -> f64 {
        self.ours.median() / self.gemm.median()
    }

    fn goal(&self) -> Option<Goal> {
        (self.rows == 512).then(|| Goal { ratio: self.ratio(), asked: GEMM_RATIO })
    }
}

impl Streamed {
    /// GFLOP/s.
    fn speed(&self) -> f64 {
        self.rate.median() * self.intensity
    }

    /// GFLOP/s that memory and multipliers allow.
    fn ceiling(&self) -> f64 {
        self.peak.min(self.read.median() * self.intensity)
    }

    fn ratio(&self) -> f64 {
        self.speed() / self.ceiling()
    }

    fn goal(&self) -> Option<Goal> {
        let asked = self.rows == 1 && self.dtype == DType::Bf16;
        asked.then(|| Goal { ratio: self.ratio(), asked: READ_RATIO })
    }
}

fn compare_with_gemm(
    cpu: &Cpu,
    n: usize,
    k: usize,
    runs: usize,
    report: &mut Report,
    step: &mut dyn FnMut(&str),
) {
    let w = values(n * k);
    let packed = PackedMatrix::pack(DType::F32, n, k, Source::F32(&w));
    // Which layout suits `gemm` best depends on the machine: it has both, and the better counts.
    let transposed: Vec<f32> = (0..k).flat_map(|i| w.iter().skip(i).step_by(k).copied()).collect();
    let by_output = GemmWeights { values: &w, n, k, strides: [1, k as isize] };
    let by_input = GemmWeights { values: &transposed, n, k, strides: [n as isize, 1] };
    let threads = report.threads;
    for rows in ROWS {
        step(&format!("{rows} x {n} x {k}"));
        let x = values(rows * k);
        let mut outs = [(); 3].map(|()| vec![0.0; rows * n]);
        let [out, out_a, out_b] = &mut outs;
        let samples = take_turns(
            runs,
            &mut [
                &mut || matmul(cpu, Rows::dense(&x, k), &packed, None, out),
                &mut || gemm_product(threads, &x, by_output, out_a),
                &mut || gemm_product(threads, &x, by_input, out_b),
            ],
        );
        let gflop = 2.0 * (rows * n * k) as f64 / 1e9;
        let mut rates = samples.iter().map(|seconds| seconds.rates(gflop));
        let ours = rates.next().unwrap_or_default();
        let gemm = rates.max_by(|a, b| a.median().total_cmp(&b.median())).unwrap_or_default();
        report.against.push(Against { rows, n, k, ours, gemm });
    }
}

fn compare_with_ceilings(cpu: &Cpu, runs: usize, report: &mut Report, step: &mut dyn FnMut(&str)) {
    let peaks = peak_operations(cpu);
    for dtype in DType::ALL {
        let (k, panel_values) = (LARGE_K, 32 * LARGE_K);
        let panels = (LARGE_BYTES as f64 / (panel_values as f64 * dtype.bits() / 8.0)) as usize;
        let n = 32 * panels;
        let packed = repeated(dtype, n, k);
        for rows in ROWS {
            step(&format!("{rows} rows, {dtype}"));
            let x = values(rows * k);
            let mut out = vec![0.0; rows * n];
            let (mut rate, mut read) = (Samples::default(), Samples::default());
            for _ in 0..runs {
                read.push(read_bandwidth(cpu, LARGE_BYTES) / 1e9);
                let product = &mut || matmul(cpu, Rows::dense(&x, k), &packed, None, &mut out);
                let seconds = &take_turns(5, &mut [product])[0];
                // Reading counts with a median, so the product does, too.
                rate.push(packed.data().len() as f64 / 1e9 / seconds.median());
            }
            let intensity = 16.0 * rows as f64 / dtype.bits();
            let peak = if dtype.is_quantised() { peaks.1 } else { peaks.0 } / 1e9;
            report.streamed.push(Streamed { dtype, rows, rate, intensity, read, peak });
        }
    }
}

/// Packed weights whose panels repeat: what is measured is reading them, not making them.
fn repeated(dtype: DType, n: usize, k: usize) -> PackedMatrix {
    let some = PackedMatrix::pack(dtype, 1024, k, Source::F32(&values(1024 * k)));
    let bytes = PackedMatrix::packed_bytes(dtype, n, k).expect("a matrix in memory has a size");
    let mut all = AlignedBytes::zeroed(bytes);
    for part in all.chunks_mut(some.data().len()) {
        part.copy_from_slice(&some.data()[..part.len()]);
    }
    PackedMatrix::new(dtype, n, k, all.into()).expect("the size is that of the shape")
}

/// Weights of N outputs and K inputs in memory, with the strides of K and N.
#[derive(Clone, Copy)]
struct GemmWeights<'a> {
    values: &'a [f32],
    n: usize,
    k: usize,
    strides: [isize; 2],
}

/// The same product by the `gemm` crate.
fn gemm_product(threads: usize, x: &[f32], w: GemmWeights<'_>, out: &mut [f32]) {
    let GemmWeights { values, n, k, strides: [stride_k, stride_n] } = w;
    let m = x.len() / k;
    assert!(x.len() == m * k && values.len() == n * k && out.len() == m * n, "shapes agree");
    let last = (k as isize - 1) * stride_k + (n as isize - 1) * stride_n;
    assert!(stride_k > 0 && stride_n > 0 && (last as usize) < values.len(), "strides stay inside");
    let parallelism = match threads {
        1 => gemm::Parallelism::None,
        _ => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: x is [m, k] and out [m, n], row-major; w is [k, n] by its strides; that all of them
    // lie within their slices was checked above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            x.as_ptr(),
            1,
            k as isize,
            values.as_ptr(),
            stride_n,
            stride_k,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Numbers of no particular kind in [-0.5, 0.5).
fn values(len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| (i.wrapping_mul(2_654_435_761) % 1000) as f32 / 1000.0 - 0.5).collect()
}

impl Report {
    fn print(&self) {
        let order = if RELAXED_ORDER { " · relaxed order: not our bits" } else { "" };
        say!("{} · {} threads{order} · medians, ± half the spread\n", self.simd, self.threads);
        say!("Products in f32, GFLOP/s, beside the gemm crate");
        let rows: Vec<_> = self
            .against
            .iter()
            .map(|a| {
                vec![
                    format!("{} x {} x {}", a.rows, a.n, a.k),
                    a.ours.show(1),
                    a.gemm.show(1),
                    a.goal().map_or_else(|| format!("{:.2}", a.ratio()), |goal| goal.show()),
                ]
            })
            .collect();
        print_table(&["rows x N x K", "ours", "gemm", "ratio"], &rows);
        say!("\nProducts with 128 MiB of weights, beside what memory and multipliers allow");
        let rows: Vec<_> = self
            .streamed
            .iter()
            .map(|s| {
                vec![
                    format!("{} row{}, {}", s.rows, if s.rows == 1 { "" } else { "s" }, s.dtype),
                    format!("{:.1}", s.speed()),
                    s.rate.show(2),
                    s.read.show(2),
                    format!("{:.1}", s.ceiling()),
                    s.goal().map_or_else(|| format!("{:.2}", s.ratio()), |goal| goal.show()),
                ]
            })
            .collect();
        print_table(&["", "GFLOP/s", "weights GB/s", "read GB/s", "ceiling", "ratio"], &rows);
    }

    fn json(&self) -> Value {
        let goal = |goal: Option<Goal>| goal.map(|goal| goal.asked);
        let against = self.against.iter().map(|a| {
            json!({
                "rows": a.rows, "n": a.n, "k": a.k, "dtype": "f32",
                "gflops": a.ours.json(), "gemm_gflops": a.gemm.json(),
                "ratio": a.ratio(), "asked": goal(a.goal()),
            })
        });
        let streamed = self.streamed.iter().map(|s| {
            json!({
                "rows": s.rows, "dtype": s.dtype.to_string(), "weight_bytes": LARGE_BYTES,
                "gigabytes_per_second": s.rate.json(),
                "read_gigabytes_per_second": s.read.json(),
                "gflops": s.speed(), "peak_gflops": s.peak, "ceiling_gflops": s.ceiling(),
                "ratio": s.ratio(), "asked": goal(s.goal()),
            })
        });
        json!({
            "bench": "kernels",
            "threads": self.threads,
            "simd": self.simd,
            "relaxed_order": RELAXED_ORDER,
            "against_gemm": against.collect::<Vec<_>>(),
            "against_ceilings": streamed.collect::<Vec<_>>(),
        })
    }
}
