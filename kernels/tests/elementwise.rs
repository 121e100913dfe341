//! Norms, rotary positions, sums, gates, embeddings and softmax: close to f64 arithmetic, and
//! the same bits on every instruction set and thread count.

use half::bf16;
use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    device::Device,
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::{
        elementwise::{round_to_bf16, weighted_add},
        softmax::softmax,
    },
    simd::Simd,
};

mod numbers;
use numbers::{Numbers, assert_same, cpus};

/// Ragged rows: inside one piece of work, and enough of them for several threads.
const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 7), (2, 64), (5, 1000), (67, 1030)];

fn tensor(cpu: &Cpu, values: &[f32], cols: usize) -> Tensor {
    let mut t = cpu.tensor(values.len() / cols, cols).unwrap();
    cpu.write(&mut t, values).unwrap();
    t
}

/// Runs an operation on all CPUs, checks that all agree, and returns the result.
fn everywhere(what: &str, run: impl Fn(&Cpu) -> Vec<f32>) -> Vec<f32> {
    let expected = run(&Cpu::new(1, Simd::Scalar));
    for cpu in cpus() {
        assert_same(&run(&cpu), &expected, &format!("{what} on {cpu:?}"));
    }
    expected
}

fn assert_close(found: &[f32], exact: &[f64], what: &str) {
    assert_eq!(found.len(), exact.len());
    for (f, e) in found.iter().zip(exact) {
        assert!((f64::from(*f) - e).abs() <= 2e-6 * e.abs() + 1e-7, "{what}: {f} against {e}");
    }
}

#[test]
fn rms_norm_over_rows_and_over_heads() {
    let mut numbers = Numbers(1);
    for (rows, cols) in SHAPES {
        let (x, weight) = (numbers.fill(rows * cols), numbers.fill(cols));
        let found = everywhere("rms_norm", |cpu| {
            let mut out = cpu.tensor(rows, cols).unwrap();
            cpu.rms_norm(&tensor(cpu, &x, cols), &weight, 1e-5, &mut out).unwrap();
            out.as_slice().to_vec()
        });
        let in_place = everywhere("rms_norm_in_place", |cpu| {
            let mut t = tensor(cpu, &x, cols);
            cpu.rms_norm_in_place(&mut t, &weight, 1e-5).unwrap();
            t.as_slice().to_vec()
        });
        assert_same(&in_place, &found, "in place and not");
        let exact: Vec<f64> = x
            .chunks(cols)
            .flat_map(|row| {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / cols as f64;
                let scale = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
                row.iter().zip(&weight).map(move |(x, w)| f64::from(*x) * scale * f64::from(*w))
            })
            .collect();
        assert_close(&found, &exact, "rms_norm");
        // Each head by itself is each head as a row.
        if cols % 2 == 0 {
            let half = &weight[..cols / 2];
            let heads = everywhere("heads", |cpu| {
                let mut t = tensor(cpu, &x, cols);
                cpu.rms_norm_in_place(&mut t, &half.to_vec(), 1e-5).unwrap();
                t.as_slice().to_vec()
            });
            let cpu = Cpu::best(1);
            let mut rows_of_heads = tensor(&cpu, &x, cols / 2);
            cpu.rms_norm_in_place(&mut rows_of_heads, &half.to_vec(), 1e-5).unwrap();
            assert_same(&heads, rows_of_heads.as_slice(), "heads as rows");
        }
    }
}

/// x `[positions, …]` with every head turned by its row's position.
fn roped(cpu: &Cpu, x: &[f32], positions: &[u32], inv_freq: &[f32], scale: f32) -> Vec<f32> {
    let mut t = tensor(cpu, x, x.len() / positions.len());
    let mut table = cpu.tensor(positions.len(), 2 * inv_freq.len()).unwrap();
    cpu.rotary_table(positions, inv_freq, scale, &mut table).unwrap();
    cpu.rope(&mut t, &table).unwrap();
    t.as_slice().to_vec()
}

#[test]
fn rope_turns_pairs_by_the_angle_of_their_position() {
    let mut numbers = Numbers(2);
    for (rows, heads, head_dim) in [(1, 1, 2), (3, 2, 10), (70, 8, 64)] {
        let x = numbers.fill(rows * heads * head_dim);
        let positions: Vec<u32> = (0..rows as u32).map(|r| r * 1013).collect();
        let inv_freq: Vec<f32> = (0..head_dim / 2)
            .map(|i| 1.0 / 10_000f32.powf(2.0 * i as f32 / head_dim as f32))
            .collect();
        let found = everywhere("rope", |cpu| roped(cpu, &x, &positions, &inv_freq, 1.25));
        for (i, (&f, &before)) in found.iter().zip(&x).enumerate() {
            let (d, half) = (i % head_dim, head_dim / 2);
            let angle = f64::from(positions[i / (heads * head_dim)] as f32 * inv_freq[d % half]);
            let exact = if d < half {
                f64::from(before) * angle.cos() - f64::from(x[i + half]) * angle.sin()
            } else {
                f64::from(before) * angle.cos() + f64::from(x[i - half]) * angle.sin()
            };
            assert!((f64::from(f) - 1.25 * exact).abs() < 1e-6);
        }
    }
}

#[test]
fn rope_has_the_bits_of_version_1() {
    // Part of the determinism contract: another value here is another contract version.
    let inv_freq: Vec<f32> = (0..64).map(|i| 1.0 / (1.0 + i as f32 * i as f32)).collect();
    let positions: Vec<u32> = (0..50).map(|p| p * p * 37).collect();
    let found = roped(&Cpu::best(1), &Numbers(9).fill(50 * 128), &positions, &inv_freq, 1.0);
    let hash = found.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, y| {
        (hash ^ u64::from(y.to_bits())).wrapping_mul(0x0100_0000_01b3)
    });
    assert_eq!(hash, 14_149_987_760_235_852_518);
}

#[test]
fn add_clamp_gate_and_selection() {
    let mut numbers = Numbers(3);
    for (rows, cols) in SHAPES {
        let (x, y) = (numbers.wild(rows * cols), numbers.wild(rows * cols));
        let logits = numbers.fill(rows);
        let sum = everywhere("add", |cpu| {
            let mut t = tensor(cpu, &x, cols);
            cpu.add(&mut t, &tensor(cpu, &y, cols)).unwrap();
            t.as_slice().to_vec()
        });
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_same(&sum, &expected, "add");
        let clamped = everywhere("clamp", |cpu| {
            let mut t = tensor(cpu, &x, cols);
            cpu.clamp(&mut t, 0.25).unwrap();
            t.as_slice().to_vec()
        });
        let expected: Vec<f32> = x.iter().map(|x| x.clamp(-0.25, 0.25)).collect();
        assert_same(&clamped, &expected, "clamp");
        let gated = everywhere("sigmoid_gate", |cpu| {
            let mut t = tensor(cpu, &x, cols);
            cpu.sigmoid_gate(&mut t, &tensor(cpu, &logits, 1)).unwrap();
            t.as_slice().to_vec()
        });
        for (i, (g, x)) in gated.iter().zip(&x).enumerate() {
            let exact = f64::from(*x) / (1.0 + (-f64::from(logits[i / cols])).exp());
            assert!((f64::from(*g) - exact).abs() <= 1e-6 * exact.abs() + 1e-45);
        }
        let picks: Vec<u32> = (0..rows as u32).rev().chain([0]).collect();
        let picked = everywhere("select_rows", |cpu| {
            let mut out = cpu.tensor(picks.len(), cols).unwrap();
            cpu.select_rows(&tensor(cpu, &x, cols), &picks, &mut out).unwrap();
            out.as_slice().to_vec()
        });
        let expected: Vec<f32> =
            picks.iter().flat_map(|&r| x[r as usize * cols..][..cols].to_vec()).collect();
        assert_same(&picked, &expected, "select_rows");
    }
}

#[test]
fn a_weighted_sum_adds_parts_in_order_by_fused_multiply_add() {
    let mut numbers = Numbers(4);
    for (rows, cols) in SHAPES {
        let counts: Vec<usize> = (0..rows).map(|r| r % 4).collect();
        let ends: Vec<u32> = counts
            .iter()
            .scan(0, |end, n| {
                *end += *n as u32;
                Some(*end)
            })
            .collect();
        let total = counts.iter().sum::<usize>();
        let (values, weights) = (numbers.fill(total * cols), numbers.fill(total));
        let parts: Vec<&[f32]> = values.chunks(cols).collect();
        let found = everywhere("weighted_sum", |cpu| {
            let mut out = cpu.tensor(rows, cols).unwrap();
            out.as_mut_slice().fill(f32::NAN);
            cpu.weighted_sum(&parts, &weights, &ends, &mut out).unwrap();
            out.as_slice().to_vec()
        });
        let mut expected = vec![0.0f32; rows * cols];
        let mut from = 0;
        for (row, &end) in expected.chunks_mut(cols).zip(&ends) {
            for i in from..end as usize {
                let mut by_hand = row.to_vec();
                for (acc, part) in by_hand.iter_mut().zip(parts[i]) {
                    *acc = weights[i].mul_add(*part, *acc);
                }
                weighted_add(row, weights[i], parts[i]);
                assert_same(row, &by_hand, "weighted_add");
            }
            from = end as usize;
        }
        assert_same(&found, &expected, "weighted_sum");
    }
}

#[test]
fn embeddings_are_the_stored_rows() {
    let mut numbers = Numbers(5);
    let (n, k) = (75, 131);
    let table = numbers.fill(n * k);
    for dtype in [DType::F32, DType::Bf16] {
        let packed = PackedMatrix::pack(dtype, n, k, Source::F32(&table));
        let ids: Vec<u32> = (0..300).map(|i| i * 31 % n as u32).collect();
        let found = everywhere("embed", |cpu| {
            let mut out = cpu.tensor(ids.len(), k).unwrap();
            cpu.embed(&packed, &ids, &mut out).unwrap();
            out.as_slice().to_vec()
        });
        let expected: Vec<f32> = ids
            .iter()
            .flat_map(|&id| &table[id as usize * k..][..k])
            .map(|&x| if dtype == DType::F32 { x } else { bf16::from_f32(x).to_f32() })
            .collect();
        assert_same(&found, &expected, "embed");
    }
}

#[test]
fn softmax_sums_to_one_and_survives_extremes() {
    let mut numbers = Numbers(6);
    for len in [1, 2, 7, 8, 9, 64, 513] {
        let x: Vec<f32> = numbers.fill(len).iter().map(|x| x * 20.0).collect();
        let mut found = x.clone();
        softmax(&mut found);
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = x.iter().map(|x| (f64::from(*x) - f64::from(largest)).exp()).collect();
        let total: f64 = e.iter().sum();
        // The difference to the largest is rounded: up to 40 with 24 bits.
        for (f, e) in found.iter().zip(&e) {
            assert!((f64::from(*f) - e / total).abs() <= 5e-6 * e / total + 1e-44);
        }
    }
    let mut masked = [f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY];
    softmax(&mut masked);
    assert_eq!(masked, [0.0, 1.0, 0.0]);
    let mut large = [3e38, -3e38];
    softmax(&mut large);
    assert_eq!(large, [1.0, 0.0]);
    for at in 0..20 {
        let mut nan = [1.0; 20];
        nan[at] = f32::NAN;
        softmax(&mut nan);
        assert!(nan.iter().all(|x| x.is_nan()), "a NaN at {at} poisons the row");
    }
}

/// To the nearest that bf16 can hold, ties to even, on every instruction set; the library `half` agrees.
#[test]
fn values_are_rounded_to_bf16() {
    let bits = [
        0u32,
        0x8000_0000,
        0x3f80_7fff,
        0x3f80_8000,
        0x3f80_8001,
        0x3f81_8000,
        0xbf81_7fff,
        0x7f7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0001,
        0x7f80_0001,
        0xff80_0001,
        1,
        0x8000,
        0x0001_8000,
    ];
    let more = (0..4000u32).map(|i| i.wrapping_mul(0x9e37_79b9));
    let values: Vec<f32> = bits.into_iter().chain(more).map(f32::from_bits).collect();
    let expected: Vec<u32> = values.iter().map(|x| bf16::from_f32(*x).to_f32().to_bits()).collect();
    for simd in Simd::available() {
        let mut found = values.clone();
        round_to_bf16(&Cpu::new(2, simd), &mut found);
        let found: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
        assert_eq!(found, expected, "{simd}");
    }
}
