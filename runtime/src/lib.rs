//! The model: what it is, how it is stored, and one forward pass through it.
//!
//! Newcomers read [`tier`], then [`config`], [`routing`], [`forward`].
//! No sockets, no async, no clock: time, randomness and I/O arrive as arguments.

pub mod backbone;
pub mod blocks;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod draft;
pub mod engine;
pub mod expert;
pub mod export;
pub mod forward;
pub mod gpu;
pub mod grammar;
pub mod import;
pub mod kv;
pub mod moe_layer;
pub mod plan;
pub mod prompt;
pub mod random;
pub mod residency;
pub mod rope;
pub mod routing;
pub mod sampler;
mod schedule;
pub mod sequence;
pub mod stop;
pub mod store;
pub mod tier;
pub mod tokenizer;
pub mod trace;
pub mod train;
