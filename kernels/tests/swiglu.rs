//! Gated networks: the bits are those of their three products and silu, one row at a time,
//! however rows are grouped, wherever they lie, on every CPU.

use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    device::{Device, Swiglu, SwigluGroup},
    dtype::DType,
    matrix::{PackedMatrix, Source},
    ops::{function::silu, matmul::matmul},
    rows::Rows,
    simd::Simd,
};

mod numbers;
use numbers::{Numbers, assert_same, cpus};

struct Network {
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
}

impl Network {
    fn new(numbers: &mut Numbers, dtype: DType, hidden: usize, intermediate: usize) -> Self {
        let mut pack = |n, k| {
            let values = numbers.fill(n * k);
            PackedMatrix::pack(dtype, n, k, Source::F32(&values))
        };
        Self {
            gate: pack(intermediate, hidden),
            up: pack(intermediate, hidden),
            down: pack(hidden, intermediate),
        }
    }

    fn weights(&self) -> Swiglu<'_, PackedMatrix> {
        Swiglu { gate: &self.gate, up: &self.up, down: &self.down }
    }

    /// The same by single-row products on one scalar thread.
    fn truth(&self, x: &[f32]) -> Vec<f32> {
        let cpu = Cpu::new(1, Simd::Scalar);
        let product = |w: &PackedMatrix, x: &[f32]| {
            let mut out = vec![0.0; w.n()];
            matmul(&cpu, Rows::dense(x, w.k()), w, None, &mut out);
            out
        };
        let (gate, up) = (product(&self.gate, x), product(&self.up, x));
        let between: Vec<f32> = gate.iter().zip(up).map(|(g, u)| u * silu(*g)).collect();
        product(&self.down, &between)
    }
}

#[test]
fn groups_of_all_sizes_equal_single_rows() {
    let mut numbers = Numbers(1);
    for (dtype, hidden, intermediate) in
        [(DType::F32, 33, 65), (DType::Bf16, 300, 97), (DType::Bf16, 64, 515)]
    {
        let sizes = [1, 0, 2, 1, 3, 7, 1, 13, 0, 27];
        let networks: Vec<Network> =
            sizes.iter().map(|_| Network::new(&mut numbers, dtype, hidden, intermediate)).collect();
        // All rows lie apart, aligned for f32 only; the same row may go to several networks.
        let memory: Vec<Vec<f32>> = (0..30).map(|_| numbers.fill(hidden + 1)).collect();
        let rows = |group: usize| -> Vec<&[f32]> {
            (0..sizes[group]).map(|r| &memory[(group * 7 + r) % 30][1..]).collect()
        };
        let expected: Vec<Vec<f32>> = networks
            .iter()
            .enumerate()
            .flat_map(|(g, network)| rows(g).into_iter().map(|x| network.truth(x)))
            .collect();
        for cpu in cpus() {
            let mut out = vec![vec![f32::NAN; hidden + 1]; expected.len()];
            let mut outputs = out.iter_mut().map(|row| &mut row[1..]);
            let mut groups: Vec<SwigluGroup<'_, PackedMatrix>> = networks
                .iter()
                .enumerate()
                .map(|(g, network)| SwigluGroup {
                    weights: network.weights(),
                    rows: rows(g),
                    outputs: outputs.by_ref().take(sizes[g]).collect(),
                })
                .collect();
            cpu.swiglu_groups(&mut groups).unwrap();
            for (row, expected) in out.iter().zip(&expected) {
                assert!(row[0].is_nan(), "nothing is written before a row");
                assert_same(&row[1..], expected, &format!("{dtype} {hidden} on {cpu:?}"));
            }
        }
    }
}

#[test]
fn one_network_over_a_tensor_equals_single_rows() {
    let mut numbers = Numbers(2);
    let (hidden, intermediate) = (130, 270);
    let network = Network::new(&mut numbers, DType::F32, hidden, intermediate);
    for m in [1, 2, 5, 40, 300] {
        let x = numbers.fill(m * hidden);
        let picked: Vec<usize> = [0, m / 2, m - 1].into();
        let truths: Vec<Vec<f32>> =
            picked.iter().map(|r| network.truth(&x[r * hidden..][..hidden])).collect();
        for cpu in cpus() {
            let (mut input, mut out) = (Tensor::zeros(m, hidden), Tensor::zeros(m, hidden));
            cpu.write(&mut input, &x).unwrap();
            cpu.swiglu(&input, network.weights(), &mut out).unwrap();
            for (r, truth) in picked.iter().zip(&truths) {
                assert_same(out.row(*r), truth, &format!("row {r} of {m} on {cpu:?}"));
            }
        }
    }
}

#[test]
fn no_groups_and_groups_without_rows_do_nothing() {
    let cpu = Cpu::best(2);
    cpu.swiglu_groups(&mut []).unwrap();
    let network = Network::new(&mut Numbers(3), DType::F32, 8, 8);
    let mut groups =
        [SwigluGroup { weights: network.weights(), rows: Vec::new(), outputs: Vec::new() }];
    cpu.swiglu_groups(&mut groups).unwrap();
    let mut out = Tensor::zeros(0, 8);
    cpu.swiglu(&Tensor::zeros(0, 8), network.weights(), &mut out).unwrap();
}
