//! One file per operation: forward, and the rule that fixes its bits.

pub mod arena;
pub mod attention;
pub(crate) mod blocked;
pub mod elementwise;
pub mod embed;
pub mod function;
pub mod matmul;
pub mod norm;
pub mod rope;
pub mod softmax;
pub mod sum;
pub mod swiglu;
pub(crate) mod tile;
pub mod tree;

pub use tree::LEAF;
