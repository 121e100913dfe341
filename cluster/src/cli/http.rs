//! What can be asked of the HTTP API from the command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};

/// The HTTP API of a coordinator.
#[derive(Debug, Clone, Args)]
pub struct HttpArgs {
    /// Serve OpenAI's HTTP API here, for example on 127.0.0.1:8080; port 0 takes any.
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// What HTTP clients call the model [default: the name of its folder].
    #[arg(long, value_name = "NAME", requires = "http", value_parser = model_name)]
    pub http_model: Option<String>,
    /// Serve HTTP over TLS with this certificate, its issuers after it (PEM).
    #[arg(long, value_name = "FILE", requires = "http", requires = "http_key")]
    pub http_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "http", requires = "http_cert")]
    pub http_key: Option<PathBuf>,
}

/// Most bytes of a model's name.
const NAME_BYTES_MAX: usize = 200;

fn model_name(text: &str) -> Result<String, String> {
    let plain = text.chars().all(|c| c.is_ascii_graphic());
    match plain && (1..=NAME_BYTES_MAX).contains(&text.len()) {
        true => Ok(text.to_owned()),
        false => Err(format!("1 to {NAME_BYTES_MAX} printable ASCII characters are expected")),
    }
}

/// `key`.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: KeyCommand,
    /// Where the coordinator keeps the keys.
    #[arg(long, global = true, value_name = "DIR", env = "LITE_LLM_STATE")]
    pub state: Option<PathBuf>,
}

/// What is done with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and show it, once. As soon as there is one, the HTTP API asks for keys.
    Add {
        /// Whose it is.
        name: String,
        /// Jobs that it may have at a time [default: no limit of its own].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        jobs: Option<u32>,
        /// Tokens of prompts and answers per minute [default: no limit].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000))]
        tokens_per_minute: Option<u64>,
        /// Highest priority that its requests may ask for.
        #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
        priority: i8,
    },
    /// Show whose keys there are, and their limits.
    List,
    /// End a key, at once.
    Revoke {
        /// Whose it is.
        name: String,
    },
}
