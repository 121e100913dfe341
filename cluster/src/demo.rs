//! The model that is built into the program, so that `lite-llm run` answers on a bare machine.

use lite_llm_runtime::checkpoint::{Checkpoint, CheckpointError};

/// The checkpoint's files, by their paths within it.
const FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/demo_files.rs"));

/// Prompts that show the model.
pub(crate) const PROMPTS: [&str; 4] =
    ["ls - list", "This function returns", "To print the current", "The sort command"];

/// Opens the built-in model.
pub(crate) fn open() -> Result<Checkpoint, CheckpointError> {
    Checkpoint::embedded(FILES)
}
