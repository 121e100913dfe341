//! What can be asked of `lite-llm`: commands and flags, as people type them.

mod bench;
mod choosing;
mod http;
mod import;
mod jobs;
mod plan;
mod settings;
mod tools;
mod train;

use std::{
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    path::PathBuf,
    str::FromStr,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use lite_llm_actors::node::DeviceChoice;
use lite_llm_kernels::{kv::KvDType, math::Math, simd::Simd};
use lite_llm_runtime::draft::Speculation;

pub use bench::{
    BenchArgs, BenchCommand, BenchHbmArgs, BenchKernelsArgs, BenchLoadArgs, BenchModelArgs,
    BenchStoreArgs, BenchTrainArgs, BenchTransportArgs, BenchTransportPeerArgs, RandomModelArgs,
};
pub use choosing::ChoosingArgs;
pub use http::{HttpArgs, KeyArgs, KeyCommand};
pub use import::{ExportArgs, ImportArgs, ModelPath};
pub use jobs::{
    CancelArgs, ClientArgs, JobArgs, JobsArgs, KeepJobs, Numbers, OwnerArgs, SubmitArgs,
};
pub use plan::{GpuName, PlanArgs, PlanGpuArgs};
pub use settings::{Setting, Settings, SettingsError, parse};
pub use tools::{CompletionsArgs, ConfigArgs, ConfigRole, ManArgs};
pub use train::{
    GradArgs, RunTrainArgs, TierAddArgs, TierCommand, TierDropArgs, TokenizerCommand,
    TokenizerTrainArgs, TrainArgs, TrainCommand, TrainComputeArgs, TrainPlotArgs, TrainWorkerArgs,
};

use crate::{
    size::{NvmeArg, Size},
    telemetry::{LogFormat, Share},
    time::Time,
};

/// Serve sparse mixture-of-experts models from many machines, with the same bits on any of them.
#[derive(Debug, Parser)]
#[command(name = "lite-llm", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print results as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// Settings of coordinators and workers [default: lite-llm.toml in this folder, else in
    /// /etc/lite-llm].
    #[arg(long = "config", global = true, env = "LITE_LLM_CONFIG", value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// Send traces to this OTLP gRPC endpoint, for example http://127.0.0.1:4317.
    #[arg(long, global = true, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp: Option<String>,
    /// Keep so much of all traces, from 0 to 1: chosen where a trace begins, for all processes that it
    /// goes through [default: all, unless OTEL_TRACES_SAMPLER says otherwise].
    #[arg(long, global = true, env = "LITE_LLM_TRACE_SAMPLE", value_name = "SHARE")]
    pub trace_sample: Option<Share>,
    /// What is logged to standard error: error, warn, info, debug, or a tracing filter.
    #[arg(
        long,
        global = true,
        env = "LITE_LLM_LOG",
        default_value = "warn",
        value_name = "FILTER"
    )]
    pub log: String,
    /// How it is logged.
    #[arg(
        long,
        global = true,
        env = "LITE_LLM_LOG_FORMAT",
        value_enum,
        default_value = "text",
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text, everything in one process: a coordinator and workers over loopback QUIC.
    Run(RunArgs),
    /// Turn a Hugging Face folder or a GGUF file of an MoE model into a native checkpoint.
    Import(ImportArgs),
    /// Turn a checkpoint into a Hugging Face folder that transformers loads with equal logits.
    Export(ExportArgs),
    /// Show what is in a checkpoint.
    Inspect(ModelPath),
    /// Check every hash of a checkpoint.
    Verify(ModelPath),
    /// Compute logits, routes and greedy continuations of token prompts, for comparison.
    Eval(EvalArgs),
    /// Compute the perplexity of a text.
    Perplexity(PerplexityArgs),
    /// Start a coordinator that other machines' workers join.
    Coordinator(CoordinatorArgs),
    /// Join a cluster as a worker.
    Worker(WorkerArgs),
    /// Show what a text becomes: its tokens and, with --chat, the prompt that a model sees.
    Tokenize(TokenizeArgs),
    /// Make tokenizers.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Send a prompt, or a file of prompts, to a coordinator.
    Submit(SubmitArgs),
    /// List the jobs that were left with a coordinator.
    Jobs(JobsArgs),
    /// Show a job that was left with a coordinator, and its result.
    Job(JobArgs),
    /// End jobs that were left with a coordinator.
    Cancel(CancelArgs),
    /// Show a cluster's nodes and load.
    Status(ClientArgs),
    /// Move a worker's work and experts to others, and let it go.
    Drain(DrainArgs),
    /// Write the token that makes clients or workers, or replace it by a new one.
    Token(TokenArgs),
    /// Send a worker or a client away for good: its certificates are refused from now on.
    Revoke(RevokeArgs),
    /// Make, list and end keys of the HTTP API.
    Key(KeyArgs),
    /// Say how fast a model will be here, what bounds it, and what to buy next.
    Plan(PlanArgs),
    /// Train a model by the phases of a configuration, on this machine.
    Train(TrainArgs),
    /// Compute the loss of token rows and its gradients, for comparison.
    Grad(GradArgs),
    /// Grow the checkpoint in a folder by a tier.
    #[command(subcommand)]
    Tier(TierCommand),
    /// Measure this machine and this program.
    Bench(BenchArgs),
    /// Show what this machine has, and what is missing.
    Doctor,
    /// Show the settings of a coordinator or worker that are in force, and where each comes from.
    Config(ConfigArgs),
    /// Write the script that completes commands and flags in a shell.
    Completions(CompletionsArgs),
    /// Write manual pages.
    Man(ManArgs),
}

/// How to compute.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// Compute threads per worker [default: the machine's cores, shared by its workers].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Vector instructions: scalar, avx2, avx512, neon [default: the best here]. Never changes a result.
    #[arg(long)]
    pub simd: Option<Simd>,
    /// Memory for experts, per worker; what has no room is read when it is needed [default: most of
    /// what is free, shared by the workers].
    #[arg(long, value_name = "SIZE")]
    pub dram: Option<Size>,
    /// A folder on a local disk, and bytes of it, for experts that memory does not hold and that would
    /// be read from farther away again.
    #[arg(long, value_name = "DIR:SIZE")]
    pub nvme: Option<NvmeArg>,
    /// Memory for key/value caches, per worker; taken as it is used [default: 2GiB, or an eighth of
    /// what is free if that is less].
    #[arg(long, value_name = "SIZE", value_parser = some_bytes)]
    pub kv: Option<Size>,
    /// What to compute with: cpu, cuda:0 or, for several workers of this process, cuda:0,1. Never
    /// changes a result.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceChoice,
    /// A GPU's memory for experts, per worker [default: what is free, shared by its workers].
    #[arg(long, value_name = "SIZE", value_parser = some_bytes)]
    pub hbm: Option<Size>,
    /// How products are computed: exact (the bits of every CPU and GPU), or fast (bf16 models on GPUs
    /// alone, by the tensor cores: bits of their own, equal on one kind of card). All of a cluster
    /// compute alike.
    #[arg(long, value_name = "MATH", default_value_t)]
    pub math: Math,
}

/// How many workers, and what goes where.
#[derive(Debug, Clone, Args)]
pub struct LocalArgs {
    /// Workers in this process.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: u16,
    /// Workers that hold each expert. Never changes a result.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub replicas: u16,
    /// Spread experts at random, by this seed. Never changes a result.
    #[arg(long, value_name = "SEED")]
    pub random_placement: Option<u64>,
    /// How keys and values are kept: f32, bf16 (half the memory), int8 (a quarter).
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub kv_dtype: KvDType,
    /// Positions with which the model is served, prompt and answer together [default: the model's
    /// own]. Where the model's rope scaling depends on a length, it is this one.
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// How tokens are chosen.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// Tokens to generate at most; -1 is no limit but the model's context.
    #[arg(long, default_value = "128", allow_negative_numbers = true, value_parser = max_tokens)]
    pub max_tokens: u32,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.7, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Choose among this many likeliest tokens; 0 or -1 is no limit.
    #[arg(long, default_value = "40", allow_negative_numbers = true, value_parser = top_k)]
    pub top_k: u32,
    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Seed of the choice: the same seed gives the same text. -1 takes any, and says which.
    #[arg(long, default_value = "0", allow_negative_numbers = true)]
    pub seed: Seed,
    /// Tiers that may be used: all, tier_1b,tier_10b (just these) or ..tier_10b (up to it).
    #[arg(long, default_value = "all")]
    pub tiers: String,
    /// Go on after the token that ends a text.
    #[arg(long)]
    pub ignore_eos: bool,
    /// End the answer where this text appears, which is left out; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// What shifts the choice.
    #[command(flatten)]
    pub choosing: ChoosingArgs,
    /// Guess tokens, and verify several in one pass: ngram looks the text up for what came after the
    /// last tokens before; tier:NAME runs the model with that tier only, in a cache of its own. It ends
    /// by itself where it does not pay. Never changes a result.
    #[arg(long, value_name = "ngram|tier:NAME")]
    pub speculate: Option<Speculation>,
    /// Go before answers of a lower priority, from -128 to 127; a coordinator may allow its clients less.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i8,
    /// Chat.
    #[command(flatten)]
    pub chat: ChatArgs,
}

/// Whether the prompt is a turn of a conversation.
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    /// Wrap the prompt in the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// With --chat: what the model is told before the conversation.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
}

/// A seed, given or taken at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed {
    /// The seed.
    pub value: u64,
    /// Whether any would have done.
    pub any: bool,
}

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-1" {
            // The standard library's keys are the system's random numbers. Half the range stays
            // short enough for every reader of JSON.
            let value = RandomState::new().hash_one(0) >> 32;
            return Ok(Self { value, any: true });
        }
        let value =
            text.parse().map_err(|_| format!("0 to {} is expected, or -1 for any", u64::MAX))?;
        Ok(Self { value, any: false })
    }
}

fn count_or_minus_one(text: &str, minus_one: u32, meaning: &str) -> Result<u32, String> {
    if text == "-1" {
        return Ok(minus_one);
    }
    text.parse().map_err(|_| format!("0 to {} is expected, or -1 for {meaning}", u32::MAX))
}

fn top_k(text: &str) -> Result<u32, String> {
    count_or_minus_one(text, 0, "no limit")
}

fn max_tokens(text: &str) -> Result<u32, String> {
    count_or_minus_one(text, u32::MAX, "as many as the model's context has room for")
}

fn some_bytes(text: &str) -> Result<Size, String> {
    match text.parse::<Size>()? {
        Size(0) => Err("caches need memory: a size such as 2GiB is expected".into()),
        size => Ok(size),
    }
}

/// Where a coordinator is: an address, or a host's name with a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort(pub String);

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        match port.map(|(_, port)| port.parse::<u16>()) {
            Some(Ok(port)) if port > 0 => Ok(Self(text.to_owned())),
            _ => Err("HOST:PORT is expected, such as 192.168.0.2:7450 or node1:7450".into()),
        }
    }
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// What to continue; `-` reads standard input [default: a few prompts that show the model].
    #[arg(conflicts_with = "http")]
    pub prompt: Option<String>,
    /// Checkpoint folder or URL [default: the small model inside this program].
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// The HTTP API: with --http it serves until Ctrl-C, instead of answering a prompt.
    #[command(flatten)]
    pub http: HttpArgs,
    /// Sampling.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Workers.
    #[command(flatten)]
    pub local: LocalArgs,
}

/// `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Checkpoint folder or URL.
    #[arg(long, value_name = "DIR|URL")]
    pub model: PathBuf,
    /// JSON: {"prompts": [[ids…], …]}.
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Safetensors file to write: p0.logits, p1.logits, …, and what is asked for below.
    #[arg(long, value_name = "FILE", required_unless_present = "trace")]
    pub out: Option<PathBuf>,
    /// Safetensors file to write the routing of all prompts into, one after the other, for `bench
    /// store`: routes.NAME, what could be predicted of them, predicted.NAME, and tokens.NAME, NAME
    /// being that of the file of tokens. For this, all of the model is loaded into this process, in
    /// addition to what workers hold.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Also write p0.router_ids, …
    #[arg(long)]
    pub routes: bool,
    /// Also generate so many tokens greedily and write p0.greedy_ids, …
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub greedy: u32,
    /// Tokens of a prompt computed at once [default: up to 512]. Never changes a result.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub prefill_chunk: u32,
    /// Tiers that may be used.
    #[arg(long, default_value = "all")]
    pub tiers: String,
    /// Workers.
    #[command(flatten)]
    pub local: LocalArgs,
}

/// `perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// Checkpoint folder or URL [default: the small model inside this program].
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// UTF-8 text.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens per window; each window is read afresh.
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    /// Tiers that may be used.
    #[arg(long, default_value = "all")]
    pub tiers: String,
    /// Workers.
    #[command(flatten)]
    pub local: LocalArgs,
}

/// `tokenize`.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// What to look at; `-` reads standard input.
    #[arg(required_unless_present = "conversation", conflicts_with = "conversation")]
    pub text: Option<String>,
    /// Checkpoint folder or URL [default: the small model inside this program].
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// Chat.
    #[command(flatten)]
    pub chat: ChatArgs,
    /// JSON: {"messages": [{"role": "user", "content": "…"}, …]} and, for templates that read
    /// them, tools, documents, add_generation_prompt, unix_time, …. Implies --chat.
    #[arg(long, value_name = "FILE")]
    pub conversation: Option<PathBuf>,
    /// Use this Jinja template instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
}

/// Where a coordinator listens unless told otherwise.
pub const DEFAULT_LISTEN: ([u8; 4], u16) = ([127, 0, 0, 1], 7450);

/// `coordinator`.
#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// Checkpoint folder, at a path that the workers see too, or URL; each worker needs credentials
    /// of its own for it.
    #[arg(long, value_name = "DIR|URL")]
    pub model: PathBuf,
    /// Where workers and clients connect (QUIC, UDP).
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7450")]
    pub listen: SocketAddr,
    /// Workers that make the cluster whole.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=65535))]
    pub workers: u16,
    /// Workers that hold each expert: with 2 or more, one can be lost without a pause.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub replicas: u16,
    /// How long jobs wait for a worker when none can serve them.
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub patience: Time,
    /// Where the cluster's authority and the ledger of detached jobs are kept, and client.token and
    /// worker.token are written.
    #[arg(long, value_name = "DIR", env = "LITE_LLM_STATE")]
    pub state: Option<PathBuf>,
    /// How long results of detached jobs are kept, such as 7d, or how many jobs' [default: 7d, and at
    /// most 100000 jobs'].
    #[arg(long, value_name = "TIME|COUNT")]
    pub keep_jobs: Option<KeepJobs>,
    /// The highest --priority that holders of client.token may ask for; those of HTTP keys have their own
    /// limits.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub client_priority: i8,
    /// Address in the tokens, if workers see another than --listen.
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<SocketAddr>,
    /// Spread experts at random, by this seed. Never changes a result.
    #[arg(long, value_name = "SEED")]
    pub random_placement: Option<u64>,
    /// How all workers keep keys and values: f32, bf16 (half the memory), int8 (a quarter).
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub kv_dtype: KvDType,
    /// How all workers compute: exact, or fast (`worker --device cuda --math fast`).
    #[arg(long, value_name = "MATH", default_value_t)]
    pub math: Math,
    /// Positions with which all workers serve the model, prompt and answer together [default: the
    /// model's own]. Where the model's rope scaling depends on a length, it is this one.
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// The HTTP API.
    #[command(flatten)]
    pub http: HttpArgs,
}

/// `worker`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// The coordinator's address or host name, with its port [default: the address in the token].
    #[arg(long, value_name = "HOST:PORT")]
    pub join: Option<HostPort>,
    /// The worker.token that the coordinator wrote [default: the one of this machine's coordinator].
    #[arg(long, value_name = "FILE")]
    pub token: Option<PathBuf>,
    /// Name in the cluster [default: made from the process].
    #[arg(long)]
    pub name: Option<String>,
    /// How long to wait for a coordinator that is gone, and for experts whose worker is.
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub patience: Time,
    /// Where other workers connect (QUIC, UDP); port 0 takes any [default: any port of the address
    /// from which the coordinator is reached].
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Checkpoint folder on this machine, or URL, if it is not where the coordinator has it.
    #[arg(long, value_name = "DIR|URL")]
    pub model: Option<PathBuf>,
    /// Compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `drain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Name of the worker.
    pub name: String,
    /// The coordinator's address or host name, with its port [default: the address in the token].
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<HostPort>,
    /// Where the coordinator keeps the cluster's authority.
    #[arg(long, value_name = "DIR", env = "LITE_LLM_STATE")]
    pub state: Option<PathBuf>,
}

/// What a token makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokenRole {
    /// Submits jobs, sees them and the cluster's state.
    Client,
    /// Holds experts and computes.
    Worker,
}

/// `token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// What it makes.
    pub role: TokenRole,
    /// Make a new secret; the old token ends.
    #[arg(long)]
    pub rotate: bool,
    /// With --rotate: how long the new token lets others join [default: 365d].
    #[arg(long, value_name = "TIME", requires = "rotate")]
    pub expires: Option<Time>,
    /// With --rotate: how long the old token still lets others join [default: not at all].
    #[arg(long, value_name = "TIME", requires = "rotate")]
    pub grace: Option<Time>,
    /// Where the coordinator keeps the cluster's authority.
    #[arg(long, value_name = "DIR", env = "LITE_LLM_STATE")]
    pub state: Option<PathBuf>,
    /// The coordinator's address in the token [default: as in the token that is there].
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<SocketAddr>,
}

/// `revoke`.
#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// The name that `status` shows, or under which a client joined.
    pub name: String,
    /// Let it join again, with a new certificate.
    #[arg(long)]
    pub undo: bool,
    /// Where the coordinator keeps the cluster's authority.
    #[arg(long, value_name = "DIR", env = "LITE_LLM_STATE")]
    pub state: Option<PathBuf>,
}
