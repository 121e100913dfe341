//! The CPU: its compute threads, its instructions and its tensors. `cpu_device.rs` makes it a
//! [`Device`](crate::device::Device).
//!
//! Neither the number of threads nor the instructions change a result.

use std::{collections::BTreeMap, fmt, sync::Mutex, time::Duration};

use crate::{
    buffer::AlignedBytes,
    pool::{Pool, SPIN},
    rows::Rows,
    simd::Simd,
};

/// Compute threads and the instructions that they use.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    simd: Simd,
    kept: Kept<Vec<f32>>,
    kept_tensors: Kept<Tensor>,
}

/// Memory that was given back, by its length in values.
struct Kept<T>(Mutex<BTreeMap<usize, OfLength<T>>>);

struct OfLength<T> {
    free: Vec<T>,
    /// Taken and never given back.
    taken: usize,
    /// Whether some was taken since the last sweep.
    used: bool,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> fmt::Debug for Kept<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

impl<T> Kept<T> {
    fn take(&self, len: usize) -> Option<T> {
        let mut kept = self.0.lock().ok()?;
        let of =
            kept.entry(len).or_insert_with(|| OfLength { free: Vec::new(), taken: 0, used: false });
        (of.taken, of.used) = (of.taken + 1, true);
        of.free.pop()
    }

    /// Drops lengths that nobody has taken since the last sweep.
    fn sweep(&self) {
        if let Ok(mut kept) = self.0.lock() {
            kept.retain(|_, of| std::mem::take(&mut of.used));
        }
    }

    /// Keeps no more than was taken.
    fn give(&self, len: usize, values: T) {
        if let Ok(mut kept) = self.0.lock()
            && let Some(of) = kept.get_mut(&len).filter(|of| of.taken > 0)
        {
            of.taken -= 1;
            of.free.push(values);
        }
    }
}

impl Cpu {
    /// A CPU of `threads` threads, the caller's among them.
    ///
    /// # Panics
    /// If `threads` is zero, or this machine lacks the instructions.
    pub fn new(threads: usize, simd: Simd) -> Self {
        Self::spinning(threads, simd, SPIN)
    }

    /// [`Cpu::new`], whose idle threads spin for so long before they sleep: for work that follows itself with pauses
    /// that are shorter than waking up.
    ///
    /// # Panics
    /// As [`Cpu::new`].
    pub fn spinning(threads: usize, simd: Simd, spin: Duration) -> Self {
        assert!(simd.is_available(), "this machine has no {simd}");
        let pool = Pool::spinning(threads, spin);
        Self { pool, simd, kept: Kept::default(), kept_tensors: Kept::default() }
    }

    /// A CPU of `threads` threads with the fastest instructions of this machine.
    ///
    /// # Panics
    /// If `threads` is zero.
    pub fn best(threads: usize) -> Self {
        Self::new(threads, Simd::best())
    }

    /// The instructions in use.
    pub fn simd(&self) -> Simd {
        self.simd
    }

    /// `len` values of no meaning: memory that was given back, or zeros. For large results that are made again
    /// and again, because memory that is new to the process costs far more than writing it.
    pub fn take(&self, len: usize) -> Vec<f32> {
        self.kept.take(len).unwrap_or_else(|| vec![0.0; len])
    }

    /// Gives memory back, to be taken by who needs as much of it. No more is kept than was taken.
    pub fn give(&self, values: Vec<f32>) {
        self.kept.give(values.len(), values);
    }

    /// Forgets memory of lengths that nobody has taken since this was last called: to be called where work begins
    /// again, so that lengths that come once are not kept.
    pub fn forget_unused(&self) {
        self.kept.sweep();
        self.kept_tensors.sweep();
    }

    /// [`Cpu::take`] for a tensor.
    pub fn take_tensor(&self, rows: usize, cols: usize) -> Tensor {
        let kept = self.kept_tensors.take(rows * cols);
        let mut tensor = kept.unwrap_or_else(|| Tensor::zeros(rows, cols));
        tensor.reshape(rows, cols);
        tensor
    }

    /// [`Cpu::give`] for a tensor.
    pub fn give_tensor(&self, tensor: Tensor) {
        self.kept_tensors.give(tensor.rows * tensor.cols, tensor);
    }

    /// The compute threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// Activations `[rows, cols]` in aligned memory.
pub struct Tensor {
    rows: usize,
    cols: usize,
    bytes: AlignedBytes,
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, bytes: AlignedBytes::zeroed(rows * cols * size_of::<f32>()) }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    pub fn as_slice(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.bytes[..self.rows * self.cols * size_of::<f32>()])
            [..self.rows * self.cols]
    }

    /// All values, row by row.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        &mut bytemuck::cast_slice_mut(&mut self.bytes[..len * size_of::<f32>()])[..len]
    }

    /// Row i.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.as_slice()[i * self.cols..(i + 1) * self.cols]
    }

    /// The rows as kernels take them.
    pub fn as_rows(&self) -> Rows<'_> {
        Rows::Dense { values: self.as_slice(), cols: self.cols.max(1) }
    }

    /// Changes the shape; contents are lost. Memory is kept where it is large enough.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        if self.bytes.len() < rows * cols * size_of::<f32>() {
            *self = Self::zeros(rows, cols);
        }
        (self.rows, self.cols) = (rows, cols);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_no_more_is_kept_than_was_taken() {
        let cpu = Cpu::best(1);
        let mut taken = cpu.take(7);
        taken.fill(5.0);
        cpu.give(taken);
        // Nobody took these.
        cpu.give(vec![6.0; 7]);
        cpu.give(vec![6.0; 8]);
        assert_eq!(
            [cpu.take(7), cpu.take(7), cpu.take(8)],
            [vec![5.0; 7], vec![0.0; 7], vec![0.0; 8]]
        );
        cpu.give(vec![5.0; 7]);
        cpu.forget_unused();
        assert_eq!(cpu.take(7), [5.0; 7], "taken since");
        cpu.give(vec![5.0; 7]);
        cpu.forget_unused();
        cpu.forget_unused();
        assert_eq!(cpu.take(7), [0.0; 7], "not taken since");
        let mut tensor = cpu.take_tensor(2, 3);
        tensor.as_mut_slice().fill(5.0);
        cpu.give_tensor(tensor);
        let again = cpu.take_tensor(3, 2);
        assert_eq!((again.rows(), again.as_slice()), (3, &[5.0; 6][..]));
        assert_eq!(cpu.take_tensor(3, 2).as_slice(), [0.0; 6]);
    }
}
