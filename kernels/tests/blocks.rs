//! Rule 2 of the determinism contract, through the public product: weights in blocks of integers
//! give the bits of the rule as written down here a second time, on every instruction set, thread
//! count and path, whatever the values.

use lite_llm_kernels::{
    blocks::{BLOCK, dequantise_row, quantise, record_words},
    cpu::Cpu,
    device::{Device, Swiglu, SwigluGroup},
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::{
        function::silu,
        matmul::{Linear, matmul, matmul_many},
    },
    rows::Rows,
    simd::Simd,
};
use proptest::prelude::*;

mod numbers;
use numbers::{Numbers, assert_same, cpus, tree};

const FORMATS: [DType; 3] = [DType::Int8, DType::Int6, DType::Int4];

/// The activations of a block: scale and integers, from the rule alone.
fn activations(x: &[f32]) -> (f32, Vec<i32>) {
    if x.iter().any(|v| !v.is_finite()) {
        return (f32::NAN, vec![0; x.len()]);
    }
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if largest < 2.0f32.powi(-100) {
        return (0.0, vec![0; x.len()]);
    }
    let inverse = 127.0 / largest;
    (largest / 127.0, x.iter().map(|v| (v * inverse).round_ties_even() as i32).collect())
}

/// What a row of weights is stored as.
struct Stored {
    scales: Vec<f32>,
    q: Vec<i32>,
}

/// Scales and integers as the documented layout has them.
fn stored(w: &PackedMatrix, j: usize) -> Stored {
    let (dtype, k) = (w.dtype(), w.k());
    let bytes = match dtype {
        DType::Int8 => 64 + 1024,
        DType::Int6 => 64 + 768,
        _ => 64 + 512,
    };
    let (panel, lane) = (j / 32, j % 32);
    let mut all = Stored { scales: vec![], q: vec![] };
    for b in 0..k.div_ceil(BLOCK) {
        let block = &w.data()[(panel * k.div_ceil(BLOCK) + b) * bytes..][..bytes];
        let at = lane % 16 * 4 + lane / 16 * 2;
        let bits = u32::from(block[at]) | u32::from(block[at + 1]) << 8;
        all.scales.push(f32::from_bits(bits << 16));
        for i in 0..BLOCK.min(k - b * BLOCK) {
            let byte = |row: usize| i32::from(block[64 + (row * 32 + lane) * 4 + i % 4]);
            let nibble = if i % 8 < 4 { byte(i / 8) & 15 } else { byte(i / 8) >> 4 };
            all.q.push(match dtype {
                DType::Int8 => byte(i / 4) - 128,
                DType::Int6 if i % 16 < 12 => byte(i / 16 * 3 + i % 16 / 4) % 64 - 32,
                DType::Int6 => {
                    let row = |r: usize| byte(i / 16 * 3 + r) / 64;
                    row(0) + 4 * row(1) + 16 * row(2) - 32
                }
                _ => nibble - 8,
            });
        }
    }
    all
}

/// Rule 2 for one output.
fn rule_2(x: &[f32], w: &Stored) -> f32 {
    let mut leaves = Vec::new();
    for (i, (x, q)) in x.chunks(BLOCK).zip(w.q.chunks(BLOCK)).enumerate() {
        if i % 8 == 0 {
            leaves.push(0.0f32);
        }
        let (scale, a) = activations(x);
        let dot: i32 = a.iter().zip(q).map(|(a, q)| a * q).sum();
        let leaf = leaves.last_mut().unwrap();
        *leaf = (dot as f32).mul_add(w.scales[i] * scale, *leaf);
    }
    tree(&leaves)
}

fn expected(x: &[f32], w: &PackedMatrix) -> Vec<f32> {
    let rows: Vec<Stored> = (0..w.n()).map(|j| stored(w, j)).collect();
    x.chunks(w.k()).flat_map(|x| rows.iter().map(|w| rule_2(x, w)).collect::<Vec<_>>()).collect()
}

fn check(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], cpus: &[Cpu]) {
    for dtype in FORMATS {
        let w = PackedMatrix::pack(dtype, n, k, Source::F32(w));
        let expected = expected(x, &w);
        // Rows that lie apart, at 4-byte alignment only.
        let apart: Vec<Vec<f32>> = x.chunks(k).map(|row| [&[f32::NAN], row].concat()).collect();
        let list: Vec<&[f32]> = apart.iter().map(|row| &row[1..]).collect();
        for cpu in cpus {
            let what = format!("{dtype} [{m}, {k}] x [{n}, {k}] on {cpu:?}");
            let mut out = vec![f32::NAN; m * n];
            matmul(cpu, Rows::dense(x, k), &w, None, &mut out);
            assert_same(&out, &expected, &what);
            out.fill(f32::NAN);
            matmul(cpu, Rows::List(&list), &w, None, &mut out);
            assert_same(&out, &expected, &what);
        }
    }
}

#[test]
fn ragged_shapes_have_the_bits_of_rule_2_everywhere() {
    let cpus = cpus();
    let mut numbers = Numbers(11);
    for (n, k) in [(1, 1), (31, 31), (32, 32), (33, 257), (70, 511), (129, 769), (96, 2305)] {
        for m in [1, 2, 3, 4, 5, 6, 7, 13, 40] {
            let (x, w) = (numbers.fill(m * k), numbers.fill(n * k));
            check(m, n, k, &x, &w, &cpus);
        }
    }
    let (m, n, k) = (300, 64, 512);
    let (x, w) = (numbers.fill(m * k), numbers.fill(n * k));
    check(m, n, k, &x, &w, &cpus);
}

/// Few rows walk through many panels side by side, each stream through several that follow each
/// other, and what does not fill all streams comes last.
#[test]
fn few_rows_and_many_outputs_have_the_bits_of_rule_2_everywhere() {
    let cpus = cpus();
    let mut numbers = Numbers(12);
    // 24, 35 and 66 panels, of which one thread takes 6, 8 and 16 at a time; 1 to 5 leaves, most
    // with a ragged end.
    for (n, k) in [(768, 300), (1090, 64), (1090, 700), (1120, 1000), (2081, 1100)] {
        for m in [1, 2, 3] {
            let (x, w) = (numbers.fill(m * k), numbers.fill(n * k));
            check(m, n, k, &x, &w, &cpus);
        }
    }
}

/// Values of every kind: ordinary, zero, denormal, huge, tiny, not finite.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -4.0f32..4.0,
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => (-126i32..127).prop_map(|e| 1.37 * 2.0f32.powi(e)),
        1 => any::<u32>().prop_map(|bits| f32::from_bits(bits & 0x807f_ffff)),
        1 => Just(f32::MAX / 3.0),
    ]
}

/// The largest value of each block reaches ±127, so that saturation would show.
fn extremes() -> impl Strategy<Value = f32> {
    prop_oneof![Just(1.0f32), Just(-1.0f32), -1.0f32..1.0]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn values_of_every_kind_have_the_bits_of_rule_2_everywhere(
        (m, n, k, x, w) in (1usize..18, 1usize..40, 1usize..100).prop_flat_map(|(m, n, k)| {
            let x = prop::collection::vec(value(), m * k);
            (Just(m), Just(n), Just(k), x, prop::collection::vec(value(), n * k))
        })
    ) {
        check(m, n, k, &x, &w, &cpus());
    }

    #[test]
    fn the_largest_integers_do_not_saturate(
        (x, w) in (prop::collection::vec(extremes(), 3 * 96), prop::collection::vec(extremes(), 33 * 96))
    ) {
        // All at their limits at once, too.
        let signs = |values: &[f32]| values.iter().map(|v| v.signum()).collect::<Vec<_>>();
        for (x, w) in [(&x, &w), (&signs(&x), &signs(&w))] {
            check(3, 33, 96, x, w, &cpus());
            // So many rows that blocks are opened for them.
            check(15, 33, 96, &x.repeat(5), w, &cpus());
        }
    }

    #[test]
    fn a_block_keeps_its_weights_to_half_a_step(w in prop::collection::vec(-9.0f32..9.0, BLOCK)) {
        let largest = w.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // int6 and int4 may cut their largest weight off: at 31 or 32 of up to 32.5 steps, at 7 or 8
        // of up to 9.
        for (dtype, limit) in [
            (DType::Int8, 0.505 / 127.0),
            (DType::Int6, 1.51 / 32.5),
            (DType::Int4, 2.1 / 9.0),
        ] {
            let packed = PackedMatrix::pack(dtype, 1, BLOCK, Source::F32(&w));
            for (i, &v) in w.iter().enumerate() {
                let off = (packed.get(0, i) - v).abs();
                prop_assert!(off <= limit * largest, "{dtype}: {v} became {} of {largest}", packed.get(0, i));
            }
        }
    }
}

/// Integers that have a scale already stay, in every format that holds all of their block; their
/// scale is rounded to bf16. Where it cannot hold them, their values are packed as others are.
#[test]
fn integers_stay_where_a_format_holds_them() {
    let (n, k) = (37, 96);
    let mut numbers = Numbers(13);
    let scales: Vec<f32> = numbers.fill(n * k / BLOCK);
    // Of three blocks of a row, one fits int4, one int6 and one int8 only.
    let limits = [8.0, 32.0, 128.0];
    let draw = |(i, v): (usize, f32)| {
        let limit: f32 = limits[i / BLOCK % 3];
        (v.fract() * 2.0 * limit).clamp(-limit.min(127.0), limit - 1.0) as i8
    };
    let mut q: Vec<i8> = numbers.fill(n * k).into_iter().enumerate().map(draw).collect();
    for (q, limit) in q.chunks_mut(BLOCK).zip(limits.iter().cycle()) {
        q[0] = -limit.min(127.0) as i8;
        q[1] = (limit - 1.0) as i8;
    }
    let source = Source::Blocks { scales: &scales, q: &q };
    let values: Vec<f32> = (0..n * k).map(|i| scales[i / BLOCK] * f32::from(q[i])).collect();
    assert_same(&source.to_f32(), &values, "values");
    for dtype in DType::ALL {
        let found = PackedMatrix::pack(dtype, n, k, source);
        let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&values));
        let fits = match dtype {
            DType::Int8 => 3,
            DType::Int6 => 2,
            DType::Int4 => 1,
            _ => 0,
        };
        for j in 0..n {
            for i in 0..k {
                let expected = match i / BLOCK < fits {
                    true => {
                        let scale = half::bf16::from_f32(scales[(j * k + i) / BLOCK]).to_f32();
                        scale * f32::from(q[j * k + i])
                    }
                    false => packed.get(j, i),
                };
                assert_eq!(found.get(j, i).to_bits(), expected.to_bits(), "{dtype} {j} {i}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_poisons_its_block_and_nothing_else() {
    let (n, k) = (33, 96);
    let mut numbers = Numbers(5);
    let (mut x, mut w) = (numbers.fill(2 * k), numbers.fill(n * k));
    let clean = x[k..].to_vec();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x[40] = bad;
        for dtype in FORMATS {
            let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&w));
            for cpu in cpus() {
                let mut out = vec![0.0; 2 * n];
                matmul(&cpu, Rows::dense(&x, k), &packed, None, &mut out);
                assert!(out[..n].iter().all(|v| v.is_nan()), "{dtype} {bad} on {cpu:?}");
                assert_same(&out[n..], &expected(&clean, &packed), "the other row");
            }
        }
    }
    w[3 * k + 95] = f32::INFINITY;
    assert_eq!(Source::F32(&w).first_not_finite(), Some(3 * k + 95));
    for dtype in FORMATS {
        let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&w));
        let mut out = vec![0.0; n];
        matmul(&Cpu::best(1), Rows::dense(&clean, k), &packed, None, &mut out);
        let bad: Vec<usize> = (0..n).filter(|&j| out[j].is_nan()).collect();
        assert_eq!(bad, [3], "{dtype}: only the output whose weights are not finite");
    }
}

#[test]
fn records_are_the_same_on_every_instruction_set() {
    let mut numbers = Numbers(6);
    for k in [1, 31, 32, 100, 1024] {
        let mut x = numbers.fill(k);
        x[0] = 1e-39;
        let records: Vec<Vec<u32>> = Simd::available()
            .into_iter()
            .map(|simd| {
                let mut out = vec![f32::NAN; record_words(k)];
                quantise(simd, &x, &mut out);
                out.iter().map(|v| v.to_bits()).collect()
            })
            .collect();
        assert!(records.windows(2).all(|two| two[0] == two[1]), "k = {k}");
        let (words, mut back) = (&records[0], vec![0.0; k]);
        dequantise_row(bytemuck::cast_slice(words), &mut back);
        let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (a, b) in x.iter().zip(&back) {
            assert!((a - b).abs() <= largest * 0.501 / 127.0 + 1e-30, "{a} became {b}");
        }
    }
}

#[test]
fn several_products_at_once_are_what_they_are_alone() {
    let (m, k) = (5, 320);
    let mut numbers = Numbers(7);
    let x = numbers.fill(m * k);
    let bias = numbers.fill(70);
    for (a, b) in
        [(DType::Int6, DType::Int4), (DType::Int4, DType::Int8), (DType::F32, DType::Bf16)]
    {
        let big = PackedMatrix::pack(a, 70, k, Source::F32(&numbers.fill(70 * k)));
        let small = PackedMatrix::pack(b, 3, k, Source::F32(&numbers.fill(3 * k)));
        for cpu in cpus() {
            let (mut one, mut two) = (vec![0.0; m * 70], vec![0.0; m * 3]);
            matmul_many(
                &cpu,
                Rows::dense(&x, k),
                &mut [
                    Linear { weight: &big, bias: Some(&bias), out: &mut one },
                    Linear { weight: &small, bias: None, out: &mut two },
                ],
            );
            let (mut one_alone, mut two_alone) = (vec![0.0; m * 70], vec![0.0; m * 3]);
            matmul(&cpu, Rows::dense(&x, k), &big, Some(&bias), &mut one_alone);
            matmul(&cpu, Rows::dense(&x, k), &small, None, &mut two_alone);
            assert_same(&one, &one_alone, "the first");
            assert_same(&two, &two_alone, "the second");
        }
    }
}

#[test]
fn networks_in_blocks_are_three_products_and_share_rows() {
    let (hidden, inner, m) = (160, 72, 7);
    let mut numbers = Numbers(8);
    for dtype in FORMATS {
        let networks: Vec<[PackedMatrix; 3]> = (0..3)
            .map(|_| {
                [(inner, hidden), (inner, hidden), (hidden, inner)].map(|(n, k)| {
                    PackedMatrix::pack(dtype, n, k, Source::F32(&numbers.fill(n * k)))
                })
            })
            .collect();
        let x = numbers.fill(m * hidden);
        let expected: Vec<Vec<f32>> = networks
            .iter()
            .map(|[gate, up, down]| {
                let (g, u) = (expected(&x, gate), expected(&x, up));
                let between: Vec<f32> = g.iter().zip(&u).map(|(&g, &u)| u * silu(g)).collect();
                self::expected(&between, down)
            })
            .collect();
        for cpu in cpus() {
            let mut outs = vec![vec![f32::NAN; m * hidden]; 3];
            let mut groups: Vec<SwigluGroup<'_, PackedMatrix>> = networks
                .iter()
                .zip(&mut outs)
                .map(|([gate, up, down], out)| SwigluGroup {
                    weights: Swiglu { gate, up, down },
                    rows: x.chunks(hidden).collect(),
                    outputs: out.chunks_mut(hidden).collect(),
                })
                .collect();
            cpu.swiglu_groups(&mut groups).unwrap();
            for (out, expected) in outs.iter().zip(&expected) {
                assert_same(out, expected, &format!("{dtype} on {cpu:?}"));
            }
        }
    }
}
