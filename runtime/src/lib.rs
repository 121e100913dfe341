//! The model: what it is, how it is stored, and one forward pass through it.
//!
//! Newcomers read [`tier`], then [`config`], [`routing`], [`forward`].
//! No sockets, no async, no clock: time, randomness and I/O arrive as arguments.

pub mod checkpoint;
pub mod config;
pub mod expert;
pub mod kv;
pub mod random;
pub mod tier;
