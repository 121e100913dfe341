//! Arithmetic on buffers, with the same bits on every CPU.
//!
//! Owns: storage ([`buffer`]), number formats ([`dtype`], [`blocks`]), packed weights ([`matrix`]), compute
//! threads ([`pool`]), the instruction sets ([`simd`]), and one file per operation ([`ops`]).
//! Knows no model: nothing here says "layer", "expert" or "token id".
//!
//! Invariant (determinism contract, version [`DETERMINISM_VERSION`]): every result is a function
//! of its mathematical inputs alone, never of threads, batch, vector width or memory layout.

pub mod blocks;
pub mod buffer;
pub mod cpu;
mod cpu_device;
pub mod cuda;
pub mod cuda_device;
pub mod device;
pub mod dtype;
pub mod heap;
pub mod kv;
pub mod math;
pub mod matrix;
pub mod measure;
pub mod ops;
pub mod pool;
pub mod rows;
mod scratch;
pub mod simd;
pub mod slots;

/// Whether this build adds leaves in the order in which they come instead of the contract's tree.
/// Such a build is for measuring what the contract costs, and for nothing else: see
/// [`DETERMINISM_VERSION`].
pub const RELAXED_ORDER: bool = cfg!(feature = "relaxed-order");

/// Version of the determinism contract that these kernels obey; it is written into every
/// checkpoint and every handshake. A build with relaxed order has 0: it reads no checkpoint
/// and joins no cluster of others, and what it writes is read by its like only.
pub const DETERMINISM_VERSION: u32 = if RELAXED_ORDER { 0 } else { 2 };
