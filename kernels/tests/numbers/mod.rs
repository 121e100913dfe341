//! Test data from a seed, the tree of rule 1, the CPUs that must agree, and what agreement is.

// Not every test file needs every helper.
#![allow(dead_code)]

use lite_llm_kernels::{cpu::Cpu, simd::Simd};

/// Numbers that come from a seed alone.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn fill(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }

    /// Every kind of finite number: of all exponents, subnormal, zeros of both signs.
    pub(crate) fn wild(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| match self.bits() % 8 {
                0 => 0.0,
                1 => -0.0,
                2 => f32::from_bits((self.bits() as u32) & 0x807f_ffff),
                3 => self.unit() * 1e30,
                4 => self.unit() * 1e-30,
                _ => self.unit(),
            })
            .collect()
    }
}

/// The sum of n leaves: rule 1's tree, which splits at the largest power of two below n.
pub(crate) fn tree(leaves: &[f32]) -> f32 {
    match leaves {
        [] => 0.0,
        [only] => *only,
        _ => {
            let split = leaves.len().next_power_of_two() / 2;
            tree(&leaves[..split]) + tree(&leaves[split..])
        }
    }
}

/// Every instruction set of this machine with 1, 2 and 3 threads.
pub(crate) fn cpus() -> Vec<Cpu> {
    let mut cpus = Vec::new();
    for simd in Simd::available() {
        cpus.extend([1, 2, 3].map(|threads| Cpu::new(threads, simd)));
    }
    cpus
}

/// Bitwise equal; of a NaN only that it is one.
pub(crate) fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan());
        assert!(same, "{what}: value {i} is {f:e}, expected {e:e}");
    }
}
