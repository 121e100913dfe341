//! Tokens from logits on the device (`sample.cu`), and what is no finite number.
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use super::{
    Cuda, Grid,
    compile::Source,
    launch::Done,
    memory::{Args, Dev},
};
use crate::{device::Draw, ops::tree::LEAF};

/// No token, no column.
pub const NONE: u32 = u32::MAX;

/// Words of shared memory for the leaves of a vocabulary: their keys, their sums, and the nodes above.
fn words(vocab: usize) -> usize {
    let leaves = vocab.div_ceil(LEAF);
    let (mut nodes, mut level) = (0, leaves);
    while {
        level = level.div_ceil(32);
        nodes += level;
        level > 1
    } {}
    2 * leaves + nodes
}

impl Cuda {
    /// Whether [`Cuda::sample`] can choose from so many tokens.
    pub fn samples(&self, vocab: usize) -> bool {
        vocab > 0 && words(vocab) * 4 + 8192 <= self.shared_max as usize
    }

    /// Chooses a token of each row of `logits`, `[rows, vocabulary]`: `out[row]` is the token and
    /// [`NONE`], or, where a logit is no finite number, [`NONE`] and the first such token. `weights`
    /// is room like `logits`.
    pub fn sample(
        &self,
        logits: &Dev<f32>,
        draws: &Dev<Draw>,
        weights: &Dev<f32>,
        out: &Dev<[u32; 2]>,
    ) -> Done {
        let rows = draws.len();
        assert_eq!(out.len(), rows, "a token per row");
        if rows == 0 {
            return Ok(());
        }
        assert!(!logits.is_empty() && logits.len().is_multiple_of(rows), "[rows, vocabulary]");
        assert!(weights.len() >= logits.len(), "room for the weights");
        let vocab = logits.len() / rows;
        assert!(self.samples(vocab), "a vocabulary that fits a processor");
        let grid = Grid { shared: words(vocab) * 4, ..Grid::new(rows, 1024) };
        let args = Args::default().dev(logits).u32(vocab).dev(draws).dev(weights).dev(out);
        // SAFETY: shapes as asserted.
        unsafe { self.launch(Source::Sample, "sample", grid, args) }
    }

    /// The first column of each row of x that holds no finite number, or [`NONE`].
    pub fn finite(&self, x: &Dev<f32>, out: &Dev<u32>) -> Done {
        let rows = out.len();
        if rows == 0 {
            return Ok(());
        }
        assert!(x.len().is_multiple_of(rows), "[rows, cols]");
        let args = Args::default().dev(x).u32(x.len() / rows).dev(out);
        // SAFETY: whole rows.
        unsafe { self.launch(Source::Sample, "finite_rows", Grid::new(rows, 256), args) }
    }
}
