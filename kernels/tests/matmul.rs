//! Rule 1 of the determinism contract, through the public product: the bits are those of the
//! rule as written down here a second time, on every instruction set, thread count and path.

use half::bf16;
use lite_llm_kernels::{
    cpu::Cpu,
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::matmul::matmul,
    rows::Rows,
    simd::Simd,
};
use proptest::prelude::*;

mod numbers;
use numbers::{Numbers, assert_same, cpus, tree};

/// Rule 1 for one output.
fn rule_1(x: &[f32], w: &[f32]) -> f32 {
    let leaves: Vec<f32> = x
        .chunks(256)
        .zip(w.chunks(256))
        .map(|(x, w)| x.iter().zip(w).fold(0.0f32, |acc, (x, w)| x.mul_add(*w, acc)))
        .collect();
    tree(&leaves)
}

/// Checks a product on all CPUs against rule 1, with rows in one piece and scattered.
fn check(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], bias: Option<&[f32]>, cpus: &[Cpu]) {
    for dtype in [DType::F32, DType::Bf16] {
        let packed = PackedMatrix::pack(dtype, n, k, Source::F32(w));
        let stored: Vec<f32> = match dtype {
            DType::F32 => w.to_vec(),
            _ => w.iter().map(|w| bf16::from_f32(*w).to_f32()).collect(),
        };
        let expected: Vec<f32> = (0..m * n)
            .map(|i| {
                let y = rule_1(&x[i / n * k..][..k], &stored[i % n * k..][..k]);
                bias.map_or(y, |b| y + b[i % n])
            })
            .collect();
        // Rows that lie apart, at 4-byte alignment only.
        let apart: Vec<Vec<f32>> =
            x.chunks(k.max(1)).map(|row| [&[f32::NAN], row].concat()).collect();
        let list: Vec<&[f32]> = apart.iter().map(|row| &row[1..]).collect();
        for cpu in cpus {
            let what = format!("{dtype} [{m}, {k}] x [{n}, {k}] on {cpu:?}");
            let mut out = vec![f32::NAN; m * n];
            matmul(cpu, Rows::dense(x, k), &packed, bias, &mut out);
            assert_same(&out, &expected, &what);
            out.fill(f32::NAN);
            matmul(cpu, Rows::List(&list), &packed, bias, &mut out);
            assert_same(&out, &expected, &what);
        }
    }
}

#[test]
fn ragged_shapes_have_the_bits_of_rule_1_everywhere() {
    let cpus = cpus();
    let mut numbers = Numbers(1);
    let shapes = [(1, 1), (31, 255), (32, 256), (33, 257), (70, 511), (129, 769), (160, 2305)];
    for (n, k) in shapes {
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 25, 40] {
            let (x, w) = (numbers.fill(m * k), numbers.fill(n * k));
            let bias = numbers.fill(n);
            check(m, n, k, &x, &w, (m % 2 == 0).then_some(&bias), &cpus);
        }
    }
}

#[test]
fn deep_sums_follow_the_tree_for_every_count_of_leaves() {
    let cpus = [Cpu::best(1)];
    let mut numbers = Numbers(2);
    for leaves in 1..=19 {
        for k in [leaves * 256 - 255, leaves * 256] {
            let (x, w) = (numbers.fill(2 * k), numbers.fill(33 * k));
            check(2, 33, k, &x, &w, None, &cpus);
            check(1, 33, k, &x[..k], &w, None, &cpus);
        }
    }
}

#[test]
fn extreme_values_give_the_same_bits() {
    let cpus = cpus();
    let mut numbers = Numbers(3);
    for (m, n, k) in [(1, 65, 515), (3, 40, 300), (14, 33, 700)] {
        let (x, w) = (numbers.wild(m * k), numbers.wild(n * k));
        check(m, n, k, &x, &w, None, &cpus);
    }
}

#[test]
fn infinities_and_nans_reach_exactly_the_outputs_that_they_should() {
    let cpus = cpus();
    let mut numbers = Numbers(4);
    let (m, n, k) = (5, 70, 520);
    let (mut x, mut w) = (numbers.fill(m * k), numbers.fill(n * k));
    x[k + 7] = f32::NAN;
    x[2 * k + 300] = f32::INFINITY;
    w[40 * k + 519] = f32::NEG_INFINITY;
    check(m, n, k, &x, &w, None, &cpus);
}

#[test]
fn negative_zero_products_sum_to_positive_zero() {
    // A leaf starts at +0.0, so a sum of −0 products is +0; a bias is added to that.
    let w = PackedMatrix::pack(DType::F32, 2, 3, Source::F32(&[0.0; 6]));
    for cpu in cpus() {
        let mut out = [1.0; 2];
        matmul(&cpu, Rows::dense(&[-1.0; 3], 3), &w, None, &mut out);
        assert_eq!(out.map(f32::to_bits), [0, 0]);
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_many() {
    let mut numbers = Numbers(5);
    let (m, n, k) = (530, 96, 777);
    let (x, w) = (numbers.fill(m * k), numbers.fill(n * k));
    for dtype in [DType::F32, DType::Bf16] {
        let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&w));
        for cpu in cpus().iter().filter(|cpu| cpu.simd() != Simd::Scalar) {
            let mut together = vec![0.0; m * n];
            matmul(cpu, Rows::dense(&x, k), &packed, None, &mut together);
            for r in (0..m).step_by(37) {
                let mut alone = vec![0.0; n];
                matmul(cpu, Rows::dense(&x[r * k..][..k], k), &packed, None, &mut alone);
                assert_same(&together[r * n..][..n], &alone, &format!("row {r}"));
            }
        }
    }
}

#[test]
fn results_are_close_to_exact_arithmetic() {
    let mut numbers = Numbers(6);
    let (m, n, k) = (4, 40, 4000);
    let (x, w) = (numbers.fill(m * k), numbers.fill(n * k));
    let packed = PackedMatrix::pack(DType::F32, n, k, Source::F32(&w));
    let mut out = vec![0.0; m * n];
    matmul(&Cpu::best(2), Rows::dense(&x, k), &packed, None, &mut out);
    for (i, &found) in out.iter().enumerate() {
        let terms = x[i / n * k..][..k].iter().zip(&w[i % n * k..][..k]);
        let (mut exact, mut size) = (0.0f64, 0.0f64);
        for (&x, &w) in terms {
            exact += f64::from(x) * f64::from(w);
            size += (f64::from(x) * f64::from(w)).abs();
        }
        // 256 roundings in a leaf and one per level, each of half an ulp of a partial sum.
        let bound = (256.0 + 5.0) * f64::from(f32::EPSILON) / 2.0 * size;
        assert!((f64::from(found) - exact).abs() <= bound, "{found} against {exact}");
    }
}

#[test]
fn matrices_without_inputs_or_rows_are_allowed() {
    let cpu = Cpu::best(2);
    let w = PackedMatrix::pack(DType::Bf16, 3, 0, Source::F32(&[]));
    let mut out = [7.0; 6];
    let bias = [1.0, 2.0, 3.0];
    matmul(&cpu, Rows::List(&[&[], &[]]), &w, Some(&bias), &mut out);
    assert_eq!(out, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    let w = PackedMatrix::pack(DType::F32, 3, 2, Source::F32(&[1.0; 6]));
    matmul(&cpu, Rows::List(&[]), &w, None, &mut []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_shape_has_the_bits_of_rule_1(
        m in 1usize..=40, n in 1usize..200, k in 1usize..1200, seed: u64, wild: bool,
    ) {
        let mut numbers = Numbers(seed);
        let (x, w) = if wild {
            (numbers.wild(m * k), numbers.wild(n * k))
        } else {
            (numbers.fill(m * k), numbers.fill(n * k))
        };
        let cpus: Vec<Cpu> = Simd::available()
            .into_iter()
            .filter(|s| *s != Simd::Scalar)
            .map(|simd| Cpu::new(1 + (seed % 3) as usize, simd))
            .collect();
        check(m, n, k, &x, &w, None, &cpus);
    }
}
