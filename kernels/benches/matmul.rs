//! Packed products beside the `gemm` crate and the machine's read bandwidth.
//!
//! `cargo bench -p lite-llm-kernels` for criterion's figures of every shape;
//! with `LITE_LLM_RATIOS=1` only the two ratios of the goals, in seconds.

use std::{hint::black_box, time::Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use lite_llm_kernels::{
    cpu::Cpu,
    dtype::DType,
    matrix::{PackedMatrix, Source},
    measure,
    ops::matmul::matmul,
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

fn ratios() {
    for threads in [1, 2] {
        for (m, n, k) in [(512, 1024, 1024), (512, 2048, 2048)] {
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
        let (n, k) = (65_536, 2048);
        let packed = PackedMatrix::pack(DType::Bf16, n, k, Source::F32(&values(n * k)));
        for simd in Simd::available().into_iter().filter(|s| *s != Simd::Scalar) {
            let cpu = Cpu::new(threads, simd);
            let read = measure::read_bandwidth(&cpu, 1 << 29) / 1e9;
            for m in [1, 2, 4, 8] {
                let (x, mut out) = (values(m * k), vec![0.0; m * n]);
                let seconds = best(8, || matmul(&cpu, Rows::dense(&x, k), &packed, None, &mut out));
                let rate = packed.data().len() as f64 / seconds / 1e9;
                println!(
                    "{m} row bf16 {simd} {threads} threads: {rate:.1} GB/s, read {read:.1}, \
                     ratio {:.3}",
                    rate / read
                );
            }
        }
    }
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
