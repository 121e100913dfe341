//! One file per operation: forward, backward, and the rules that fix their bits.

pub mod arena;
pub mod attention;
pub mod attention_backward;
pub(crate) mod blocked;
pub mod cross_entropy;
pub mod elementwise;
pub mod embed;
pub mod function;
pub mod gated;
pub mod leaves;
pub mod matmul;
pub mod norm;
pub mod optimize;
pub mod panel_sums;
pub(crate) mod panels;
pub mod rope;
pub mod row_sums;
pub mod softmax;
pub mod sum;
pub mod swiglu;
pub(crate) mod tile;
pub mod tree;

pub use tree::LEAF;
