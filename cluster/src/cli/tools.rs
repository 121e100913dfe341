//! Flags of the commands that describe this program itself.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use clap_complete::Shell;

/// Commands that have settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConfigRole {
    /// `lite-llm coordinator`.
    Coordinator,
    /// `lite-llm worker`.
    Worker,
}

/// `config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Whose settings [default: both].
    pub role: Option<ConfigRole>,
    /// Flags that the command would be given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
    pub flags: Vec<String>,
}

/// `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: Shell,
}

/// `man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write the pages of all commands into this folder, instead of the first to standard output.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}
