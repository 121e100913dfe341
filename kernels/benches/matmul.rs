//! Packed products beside the `gemm` crate and the machine's read bandwidth.
//!
//! `cargo bench -p lite-llm-kernels` for criterion's figures of every shape;
//! with `LITE_LLM_RATIOS=all` (or `rows`) only the ratios of the goals, in seconds.

use std::{hint::black_box, time::Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use lite_llm_kernels::{
    cpu::Cpu,
    device::{Swiglu, SwigluGroup},
    dtype::DType,
    matrix::{PackedMatrix, Source},
    measure,
    ops::{matmul::matmul, swiglu::swiglu_groups},
    rows::Rows,
    simd::Simd,
};

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5).collect()
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

fn gemm(threads: usize, m: usize, n: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32]) {
    let parallelism =
        if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    // SAFETY: x is [m, k], w is [n, k] read as its transpose, out is [m, n], all row-major.
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
            w.as_ptr(),
            k as isize,
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Whether `LITE_LLM_RATIOS` asks for this half only.
fn only(half: &str) -> bool {
    std::env::var("LITE_LLM_RATIOS").is_ok_and(|wanted| wanted == half)
}

fn ratios() {
    for threads in [1, 2] {
        for (m, n, k) in [(512, 1024, 1024), (512, 2048, 2048)] {
            if only("rows") {
                continue;
            }
            let (x, w) = (values(m * k), values(n * k));
            let mut out = vec![0.0; m * n];
            let flops = 2.0 * (m * n * k) as f64 / 1e9;
            let theirs = flops / best(12, || gemm(threads, m, n, k, &x, &w, &mut out));
            for simd in Simd::available().into_iter().filter(|s| *s != Simd::Scalar) {
                let cpu = Cpu::new(threads, simd);
                for dtype in [DType::F32, DType::Bf16] {
                    let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&w));
                    let ours = flops
                        / best(12, || matmul(&cpu, Rows::dense(&x, k), &packed, None, &mut out));
                    println!(
                        "{m}x{n}x{k} {dtype} {simd} {threads} threads: {ours:.0} GFLOP/s, gemm \
                         {theirs:.0}, ratio {:.3}",
                        ours / theirs
                    );
                }
            }
        }
        for simd in Simd::available().into_iter().filter(|s| *s != Simd::Scalar) {
            let cpu = Cpu::new(threads, simd);
            few_rows(&cpu);
            experts(&cpu);
        }
    }
}

/// Products of few rows with a matrix that no cache holds, against reading memory.
fn few_rows(cpu: &Cpu) {
    let (n, k) = (65_536, 2048);
    let packed = PackedMatrix::pack(DType::Bf16, n, k, Source::F32(&values(n * k)));
    let bytes = packed.data().len() as f64 / 1e9;
    for m in [1, 2, 3, 4, 6, 8, 12, 16, 32] {
        let (x, mut out) = (values(m * k), vec![0.0; m * n]);
        let (mut read, mut seconds) = (0.0f64, f64::INFINITY);
        // By turns, so that whatever else the machine does meets both.
        for _ in 0..if m == 1 { 4 } else { 1 } {
            read = read.max(measure::read_bandwidth(cpu, 1 << 29) / 1e9);
            let call = || matmul(cpu, Rows::dense(&x, k), &packed, None, &mut out);
            seconds = seconds.min(best(6, call));
        }
        println!(
            "{m} rows bf16 {} {} threads: {:.1} GB/s, read {read:.1}, ratio {:.3}; {:.0} GFLOP/s",
            cpu.simd(),
            cpu.pool().threads(),
            bytes / seconds,
            bytes / seconds / read,
            bytes / seconds * m as f64
        );
    }
}

/// One token through 8 experts of 2048 x 1024 at a time, of 32 that no cache holds.
fn experts(cpu: &Cpu) {
    let (hidden, intermediate) = (2048, 1024);
    let w = values(hidden * intermediate);
    let pack = |n, k| PackedMatrix::pack(DType::Bf16, n, k, Source::F32(&w));
    let experts: Vec<_> = (0..32)
        .map(|_| {
            [pack(intermediate, hidden), pack(intermediate, hidden), pack(hidden, intermediate)]
        })
        .collect();
    let x = values(hidden);
    let mut out = vec![0.0; 8 * hidden];
    let mut first = 0;
    let seconds = best(12, || {
        let mut groups: Vec<_> = experts[first..first + 8]
            .iter()
            .zip(out.chunks_mut(hidden))
            .map(|([gate, up, down], out)| SwigluGroup {
                weights: Swiglu { gate, up, down },
                rows: vec![&x[..]],
                outputs: vec![out],
            })
            .collect();
        swiglu_groups(cpu, &mut groups);
        first = (first + 8) % 32;
    });
    let bytes = (8 * 3 * hidden * intermediate * 2) as f64 / 1e9;
    println!(
        "8 experts, 1 row, bf16 {} {} threads: {:.1} GB/s",
        cpu.simd(),
        cpu.pool().threads(),
        bytes / seconds
    );
}

fn shapes(criterion: &mut Criterion) {
    let (n, k) = (2048, 2048);
    let cpu = Cpu::best(2);
    for dtype in [DType::F32, DType::Bf16] {
        let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&values(n * k)));
        let mut group = criterion.benchmark_group(format!("matmul {dtype} 2048x2048"));
        for m in [1, 2, 4, 8, 16, 32, 64, 256, 512] {
            let (x, mut out) = (values(m * k), vec![0.0; m * n]);
            group.throughput(Throughput::Elements((2 * m * n * k) as u64));
            group.bench_with_input(BenchmarkId::from_parameter(m), &m, |bencher, _| {
                bencher.iter(|| {
                    matmul(&cpu, Rows::dense(black_box(&x), k), &packed, None, &mut out);
                });
            });
        }
    }
}

fn main() {
    if std::env::var_os("LITE_LLM_RATIOS").is_some() {
        ratios();
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    shapes(&mut criterion);
    criterion.final_summary();
}
