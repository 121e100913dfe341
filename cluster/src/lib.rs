//! The process: the `lite-llm` command, its configuration, telemetry and wiring.
//!
//! [`cli`] says what can be asked, `commands` does it, one file each. Nothing here decides
//! anything about models or clusters: that is in the crates to the left.

#![warn(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod output;

mod bias;
pub mod cli;
mod commands;
mod demo;
mod http;
mod machine;
mod otlp;
mod progress;
mod size;
pub mod telemetry;
mod time;

pub use commands::{run_command, run_words};
