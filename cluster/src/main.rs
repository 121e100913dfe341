//! The `lite-llm` command.

use std::process::ExitCode;

use clap::Parser;
use lite_llm_cluster::cli::Cli;

fn main() -> ExitCode {
    lite_llm_cluster::run_command(Cli::parse())
}
