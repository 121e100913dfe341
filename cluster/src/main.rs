//! The `lite-llm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    lite_llm_cluster::run_words()
}
