//! Tokens from logits on the device (`sample.cu`), and what is no finite number.
//!
//! # Panics
//! All functions, if the shapes do not fit each other.

use bytemuck::{Pod, Zeroable};

use super::{
    Cuda, Grid,
    compile::Source,
    launch::Done,
    memory::{Args, Dev},
};
use crate::ops::tree::LEAF;

/// How a row's token is chosen: the determinism contract's rule 9 without bias and penalties.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// 0 is greedy.
    pub temperature: f32,
    /// Above 0, at most 1, which is no limit.
    pub top_p: f32,
    /// 0 is no limit.
    pub min_p: f32,
    /// 0 is no limit.
    pub top_k: u32,
    /// The row's random number, from 0, below 1.
    pub unit: f64,
}

/// No token, no column.
pub const NONE: u32 = u32::MAX;

impl Cuda {
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
        let leaves = vocab.div_ceil(LEAF);
        let (mut nodes, mut level) = (0, leaves);
        while {
            level = level.div_ceil(32);
            nodes += level;
            level > 1
        } {}
        let grid = Grid { shared: (2 * leaves + nodes) * 4, ..Grid::new(rows, 1024) };
        assert!(
            grid.shared <= self.shared_max as usize - 8192,
            "a vocabulary that fits a processor"
        );
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
