//! Comparing bits, and numbers to compute with.

use lite_llm_kernels::{
    cpu::Cpu,
    cuda::{Cuda, Dev},
    device::DeviceError,
};

/// What was compared, and what differed.
pub(crate) struct Check<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) cuda: &'a Cuda,
    pub(crate) done: usize,
    pub(crate) wrong: Vec<String>,
    /// The largest error of [`Check::near`], of its limit.
    pub(crate) worst: f64,
    /// Without the tiles by `wgmma`.
    pub(crate) narrow: bool,
    /// Nine times as many rows of routes: over a million in all.
    pub(crate) many: bool,
    state: u64,
}

impl<'a> Check<'a> {
    pub(crate) fn new(cpu: Cpu, cuda: &'a Cuda) -> Self {
        Self {
            cpu,
            cuda,
            done: 0,
            wrong: Vec::new(),
            worst: 0.0,
            narrow: false,
            many: false,
            state: 1,
        }
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.state >> 33) as u32
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() as usize) % n.max(1)
    }

    /// In ±size, with a few of very different magnitude.
    pub(crate) fn values(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len)
            .map(|_| {
                let x = (self.bits() as f32 / (1u32 << 30) as f32 - 1.0) * size;
                if self.bits().is_multiple_of(61) { x * 300.0 } else { x }
            })
            .collect()
    }

    /// Room for results that would show where nothing is written.
    pub(crate) fn poisoned(&self, len: usize) -> Result<Dev<f32>, DeviceError> {
        self.cuda.filled(len, 0xA5)
    }

    pub(crate) fn same(
        &mut self,
        name: &str,
        found: &Dev<f32>,
        expected: &[f32],
    ) -> Result<(), DeviceError> {
        let found = self.cuda.download(found)?;
        self.compare(name, &found, expected, |a, b| {
            a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
        });
        Ok(())
    }

    pub(crate) fn same_words(
        &mut self,
        name: &str,
        found: &Dev<u32>,
        expected: &[u32],
    ) -> Result<(), DeviceError> {
        let found = self.cuda.download(found)?;
        self.compare(name, &found, expected, |a, b| a == b);
        Ok(())
    }

    /// Pairs, one after the other.
    pub(crate) fn same_pairs(
        &mut self,
        name: &str,
        found: &Dev<[u32; 2]>,
        expected: &[u32],
    ) -> Result<(), DeviceError> {
        let found = self.cuda.download(found)?;
        self.compare(name, found.as_flattened(), expected, |a, b| a == b);
        Ok(())
    }

    /// As many rows, fewer where a CPU stands for the GPU.
    pub(crate) fn rows(&self, rows: usize) -> usize {
        let rows = if self.many { 9 * rows } else { rows };
        if self.cuda.describe().contains("not a GPU") { rows.div_ceil(40) } else { rows }
    }

    /// Whether what differs is small beside what is expected: root mean squares.
    pub(crate) fn near(&mut self, name: &str, found: &[f32], expected: &[f32], limit: f64) {
        self.done += 1;
        let square = |x: f64| x * x;
        let off: f64 =
            found.iter().zip(expected).map(|(&f, &e)| square(f64::from(f) - f64::from(e))).sum();
        let all: f64 = expected.iter().map(|&e| square(f64::from(e))).sum();
        let error = (off / all).sqrt();
        self.worst = self.worst.max(error / limit);
        if found.len() != expected.len() || error.is_nan() || error > limit {
            self.wrong.push(format!("{name}: {error:.2e} of the expected values, limit {limit:e}"));
        }
    }

    fn compare<T: Copy + std::fmt::Debug>(
        &mut self,
        name: &str,
        found: &[T],
        expected: &[T],
        same: impl Fn(T, T) -> bool,
    ) {
        self.done += 1;
        if found.len() != expected.len() {
            self.wrong.push(format!("{name}: {} values, expected {}", found.len(), expected.len()));
            return;
        }
        let pairs = || found.iter().zip(expected).enumerate();
        let count = pairs().filter(|(_, (f, e))| !same(**f, **e)).count();
        if let Some((i, (f, e))) = pairs().find(|(_, (f, e))| !same(**f, **e)) {
            self.wrong.push(format!(
                "{name}: {count} of {} differ; at {i} {f:?}, expected {e:?}",
                found.len()
            ));
        }
    }
}
