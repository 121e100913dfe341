//! Launches that serve measuring and checking alone.

use super::{
    Cuda, Grid,
    compile::Source,
    launch::Done,
    memory::{Args, Dev},
};

impl Cuda {
    /// Reads all of it and does nothing else, for measuring.
    pub fn read_all(&self, memory: &Dev<u8>, out: &Dev<u32>) -> Done {
        let args = Args::default().dev(memory).word(memory.len() as u64 / 16).dev(out);
        let grid = Grid::new(self.processors() * 16, 512);
        // SAFETY: whole pieces of 16 bytes inside the buffer.
        unsafe { self.launch(Source::Elementwise, "read_all", grid, args) }
    }

    /// Fills it with values that look like weights, for measuring.
    pub fn scramble(&self, memory: &Dev<u8>, seed: u32) -> Done {
        let args = Args::default().dev(memory).word(memory.len() as u64 / 4).u32(seed as usize);
        let grid = Grid::new(self.processors() * 16, 512);
        // SAFETY: whole words inside the buffer.
        unsafe { self.launch(Source::Elementwise, "scramble", grid, args) }
    }

    /// One of `exp_all`, `sigmoid_all` and `silu_all` of every value, for tests.
    pub fn function_of(&self, name: &'static str, x: &Dev<f32>) -> Done {
        assert!(["exp_all", "sigmoid_all", "silu_all"].contains(&name), "a function of these");
        let args = Args::default().dev(x).word(x.len() as u64);
        // SAFETY: the whole buffer.
        unsafe { self.launch(Source::Elementwise, name, self.each(x.len()), args) }
    }
}
