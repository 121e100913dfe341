//! One file per command, and what several of them need.

mod answer;
mod authority;
mod bench;
mod client;
mod coordinator;
mod detached;
mod doctor;
mod eval;
mod export;
mod http;
mod import;
mod inspect;
mod perplexity;
mod plan;
mod record;
mod run;
mod tokenize;
mod tools;
mod train;
mod worker;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use lite_llm_actors::{
    archive,
    local::{LocalCluster, LocalOptions},
    node::NodeDevice,
    placement::PlacementPolicy,
};
use lite_llm_kernels::{cpu::Cpu, heap, simd::Simd};
use lite_llm_runtime::{checkpoint::Checkpoint, config::ModelConfig};
use lite_llm_transport::{identity::Role, token::JoinToken};
use tokio::sync::oneshot;

pub(crate) use self::run::unix_time;
use crate::{
    cli::{self, BenchCommand, Cli, Command, ComputeArgs, HostPort, LocalArgs},
    demo, machine, output,
    size::Size,
    telemetry,
};

/// Exit code of bad usage or bad input.
const BAD_INPUT: u8 = 2;
/// Exit code of an interrupted command, as shells expect it.
const INTERRUPTED: u8 = 130;
/// Exit code of a command whose reader has left (`lite-llm status | head -1`), as shells expect it.
const READER_LEFT: u8 = 141;
/// How long an interrupted command may take to leave in good order.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the last spans of a command that ended may take to be sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the nodes of one process wait for each other's experts: none of them comes back.
const LOCAL_PATIENCE: Duration = Duration::from_secs(5);
/// Stack of the thread that performs the command: as the system gives a main thread.
const COMMAND_STACK_BYTES: usize = 8 << 20;

/// An error that is the caller's: it ends with exit code 2.
#[derive(Debug)]
struct BadInput(anyhow::Error);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&sentence(&self.0))
    }
}

impl std::error::Error for BadInput {}

/// An error and its causes. Many of ours name their cause in their own sentence: it is not said
/// twice.
fn sentence(error: &anyhow::Error) -> String {
    let mut said = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

/// Marks an error as the caller's.
fn bad_input(error: impl Into<anyhow::Error>) -> anyhow::Error {
    BadInput(error.into()).into()
}

/// Somebody pressed Ctrl-C.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// Standard output could not be written.
#[derive(Debug, thiserror::Error)]
#[error("standard output cannot be written: {0}")]
struct OutputLost(&'static std::io::Error);

/// Runs what the command line says, over the settings of file and environment.
pub fn run_words() -> ExitCode {
    match cli::parse() {
        Ok(cli) => run_command(cli),
        Err(error) => {
            remark!("error: {error}");
            ExitCode::from(BAD_INPUT)
        }
    }
}

/// Runs a command from beginning to end.
pub fn run_command(cli: Cli) -> ExitCode {
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            remark!("interrupted");
            ExitCode::from(INTERRUPTED)
        }
        Err(error)
            if error
                .downcast_ref::<OutputLost>()
                .is_some_and(|lost| lost.0.kind() == std::io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::from(READER_LEFT)
        }
        Err(error) => {
            remark!("error: {}", sentence(&error));
            ExitCode::from(if error.is::<BadInput>() { BAD_INPUT } else { 1 })
        }
    }
}

fn start(cli: Cli) -> Result<()> {
    if trains(&cli.command) {
        heap::keep_freed();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the system gives no threads")?;
    let _guard = runtime.enter();
    let Cli { command, json, settings, otlp, trace_sample, log, log_format } = cli;
    let traces = (otlp.as_deref(), trace_sample);
    let telemetry = telemetry::start(&log, log_format, traces, &role(&command));
    let telemetry = telemetry.map_err(bad_input)?;
    // These serve others than their terminal, and leave their cluster in good order.
    let serves = match &command {
        Command::Coordinator(_) | Command::Worker(_) => true,
        Command::Run(args) => args.http.http.is_some(),
        _ => false,
    };
    // The work has a thread of its own: whatever blocks it, this one hears the signals.
    let (stop, stopped) = oneshot::channel::<()>();
    let (done, mut ended) = oneshot::channel();
    let handle = runtime.handle().clone();
    let thread = std::thread::Builder::new()
        .name("lite-llm-command".into())
        .stack_size(COMMAND_STACK_BYTES)
        .spawn(move || {
            let result = handle.block_on(async {
                tokio::select! {
                    result = perform(command, settings, json) => result,
                    Ok(()) = stopped => Err(Interrupted.into()),
                }
            });
            // The other end waits, or has given up.
            let _ = done.send(result);
        })
        .context("the system gives no threads")?;
    let told_to_end = async {
        tokio::select! {
            () = interrupted() => {}
            () = output::failed(), if !serves => {}
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            result = &mut ended => result.ok(),
            () = told_to_end => {
                if !serves {
                    // Work that has just ended needs no telling.
                    let _ = stop.send(());
                }
                let ended = tokio::time::timeout(STOP_TIMEOUT, ended).await;
                Some(ended.map_or_else(|_| Err(Interrupted.into()), |result| {
                    result.unwrap_or_else(|_| Err(Interrupted.into()))
                }))
            }
        }
    });
    let result = result.unwrap_or_else(|| match thread.join() {
        Err(panic) => std::panic::resume_unwind(panic),
        Ok(()) => Err(anyhow::anyhow!("the command ended without a result")),
    });
    let interrupted = result.as_ref().is_err_and(|error| error.is::<Interrupted>());
    let result = match output::failure() {
        Some(error) if !serves && (result.is_ok() || interrupted) => Err(OutputLost(error).into()),
        _ => result,
    };
    telemetry.finish(if interrupted { STOP_TIMEOUT } else { FLUSH_TIMEOUT });
    // Blocking work that was interrupted is not waited for: checkpoints are committed last.
    runtime.shutdown_background();
    result
}

/// Whether a command's work is steps of a training.
fn trains(command: &Command) -> bool {
    match command {
        Command::Train(_) => true,
        Command::Bench(args) => matches!(args.what, BenchCommand::Train(_)),
        _ => false,
    }
}

async fn perform(command: Command, settings: Option<PathBuf>, json: bool) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args, json).await,
        Command::Import(args) => import::import(args, json).await,
        Command::Export(args) => export::export(args, json).await,
        Command::Inspect(args) => inspect::inspect(args, json),
        Command::Verify(args) => inspect::verify(args, json).await,
        Command::Eval(args) => eval::eval(args, json).await,
        Command::Perplexity(args) => perplexity::perplexity(args, json).await,
        Command::Coordinator(args) => coordinator::coordinator(args).await,
        Command::Worker(args) => worker::worker(args).await,
        Command::Tokenize(args) => tokenize::tokenize(args, json).await,
        Command::Submit(args) => client::submit(args, json).await,
        Command::Jobs(args) => detached::jobs(args, json).await,
        Command::Job(args) => detached::job(args, json).await,
        Command::Cancel(args) => detached::cancel(args, json).await,
        Command::Status(args) => client::status(args, json).await,
        Command::Drain(args) => client::drain(args).await,
        Command::Token(args) => authority::token(args, json),
        Command::Revoke(args) => authority::revoke(args, json),
        Command::Key(args) => http::key(args, json),
        Command::Plan(args) => plan::plan(args, json).await,
        Command::Train(args) => train::train(args, json).await,
        Command::Grad(args) => train::grad(args, json),
        Command::Tier(command) => train::tier(command, json),
        Command::Tokenizer(command) => train::tokenizer(command, json),
        Command::Bench(args) => bench::bench(args, json).await,
        Command::Doctor => doctor::doctor(json),
        Command::Config(args) => tools::config(args, settings, json),
        Command::Completions(args) => tools::completions(args),
        Command::Man(args) => tools::man(args),
    }
}

/// What this process is called in traces.
fn role(command: &Command) -> String {
    match command {
        Command::Run(_) => format!("run {}", std::process::id()),
        Command::Coordinator(_) => "coordinator".into(),
        Command::Worker(args) => format!("worker {}", worker::name(args)),
        Command::Submit(_) => format!("submit {}", std::process::id()),
        Command::Train(args) => train::role(args),
        _ => format!("command {}", std::process::id()),
    }
}

/// Returns when somebody pressed Ctrl-C or the system asked this process to end.
async fn interrupted() {
    #[cfg(unix)]
    if let Ok(mut terminate) =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
    {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        return;
    }
    // Without a handler the system ends the process by itself.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Opens a checkpoint in a folder or at a URL, or the built-in model.
fn open_model(location: Option<&PathBuf>) -> Result<Arc<Checkpoint>> {
    let checkpoint = match location {
        Some(location) => archive::open_checkpoint(location).map_err(bad_input)?,
        None => demo::open()?,
    };
    Ok(Arc::new(checkpoint))
}

fn placement(seed: Option<u64>) -> PlacementPolicy {
    seed.map_or(PlacementPolicy::Balanced, PlacementPolicy::Random)
}

/// How much of the free memory workers may take when nobody says.
const MEMORY_SHARE: f64 = 0.9;
/// Of that, what experts may have at least, however much is asked for caches.
const EXPERTS_SHARE_MIN: f64 = 0.25;
/// Bytes of caches when nobody says, if they are not more than a part of what is free: an eighth.
const KV_BYTES: u64 = 2 << 30;
/// See [`KV_BYTES`].
const KV_SHARE: u64 = 8;

impl ComputeArgs {
    /// Threads of one of `workers` workers on this machine.
    fn threads(&self, workers: usize) -> usize {
        self.threads.map_or_else(|| (machine::cores() / workers).max(1), usize::from)
    }

    fn simd(&self) -> Result<Simd> {
        match self.simd {
            None => Ok(Simd::best()),
            Some(simd) if simd.is_available() => Ok(simd),
            Some(simd) => {
                let here: Vec<_> = Simd::available().iter().map(|s| s.to_string()).collect();
                let here = here.join(", ");
                Err(bad_input(anyhow::anyhow!("--simd {simd}: this processor has {here}")))
            }
        }
    }

    fn cpu(&self, workers: usize) -> Result<Arc<Cpu>> {
        Ok(Arc::new(Cpu::new(self.threads(workers), self.simd()?)))
    }

    /// The device of the only worker of this process.
    fn device(&self) -> Result<NodeDevice> {
        let hbm = self.hbm.map(|size| size.0);
        self.device.open((0, 1), self.cpu(1)?, hbm, self.math).map_err(bad_input)
    }

    /// Bytes of caches of keys and values of one of `workers` workers on this machine. They are taken
    /// as they are used; more than the machine has is a slip.
    fn kv_bytes(&self, workers: usize) -> Result<u64> {
        let kv = Size(self.kv_of(workers));
        match machine::total_memory() {
            Some(total) if kv.0 > total => Err(bad_input(anyhow::anyhow!(
                "--kv {kv}: this machine has {} of memory",
                Size(total)
            ))),
            _ => Ok(kv.0),
        }
    }

    fn kv_of(&self, workers: usize) -> u64 {
        let here = || {
            let free = machine::free_memory().unwrap_or(u64::MAX);
            KV_BYTES.min(free / KV_SHARE / workers as u64)
        };
        self.kv.map_or_else(here, |size| size.0)
    }

    /// Bytes of experts of one of `workers` workers on this machine, each of which holds so many bytes
    /// of the rest of the model.
    fn dram_bytes(&self, workers: usize, dense: u64) -> u64 {
        let here = || {
            let Some(free) = machine::free_memory() else { return u64::MAX };
            let each = free as f64 * MEMORY_SHARE / workers as f64;
            let rest = dense.saturating_add(self.kv_of(workers)) as f64;
            (each - rest).max(each * EXPERTS_SHARE_MIN) as u64
        };
        self.dram.map_or_else(here, |size| size.0)
    }
}

/// Where the experts of a worker will be, in a line for people.
fn budgets(experts: Option<u64>, dram: u64, kv: u64) -> String {
    let caches = format!("up to {} for key/value caches", Size(kv));
    match experts {
        Some(experts) if experts <= dram => {
            format!("memory: {} for all experts, {caches}", Size(experts))
        }
        Some(experts) => format!(
            "memory: {} for experts, of which there are {}: the rest is read when it is needed; \
             {caches}",
            Size(dram),
            Size(experts)
        ),
        None => format!("memory: up to {} for experts, {caches}", Size(dram)),
    }
}

impl LocalArgs {
    /// What a model is, with the context that it is served with.
    fn served(&self, checkpoint: &Checkpoint) -> Result<ModelConfig> {
        checkpoint.config().served(self.context).map_err(bad_input)
    }

    async fn cluster(&self, checkpoint: Arc<Checkpoint>) -> Result<LocalCluster> {
        let workers = usize::from(self.workers);
        let options = LocalOptions {
            workers,
            threads: self.compute.threads(workers),
            simd: self.compute.simd()?,
            device: self.compute.device.clone(),
            hbm_bytes: self.compute.hbm.map(|size| size.0),
            dram_bytes: self.compute.dram_bytes(workers, checkpoint.dense_bytes()),
            nvme: self.compute.nvme.clone().map(Into::into),
            kv_bytes: self.compute.kv_bytes(workers)?,
            kv_dtype: self.kv_dtype,
            math: self.compute.math,
            context: self.context,
            placement: placement(self.random_placement),
            replicas: self.replicas,
            patience: LOCAL_PATIENCE,
        };
        // What fails here is what was given: a damaged model, too little memory for it.
        LocalCluster::start(checkpoint, &options).await.map_err(bad_input)
    }
}

/// Where this machine's coordinator keeps its state, unless told otherwise.
fn default_state() -> Result<PathBuf> {
    if let Some(state) = std::env::var_os("LITE_LLM_STATE") {
        return Ok(state.into());
    }
    let home = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".local/state")));
    let home = home.context("no home folder is known; give --state, or --token to join")?;
    Ok(home.join("lite-llm"))
}

/// The token that makes this role: the given one, or that of this machine's coordinator.
fn read_token(path: Option<&PathBuf>, role: Role) -> Result<JoinToken> {
    let path = match path {
        Some(path) => path.clone(),
        None => JoinToken::path_in(&default_state()?, role),
    };
    let token = JoinToken::read(&path).map_err(bad_input)?;
    let made = token.role();
    if made != role {
        let shown = path.display();
        return Err(bad_input(anyhow::anyhow!(
            "{shown}: this token makes {made}s; a {role} needs the coordinator's {role}.token"
        )));
    }
    Ok(token)
}

/// The addresses of the coordinator: of the host that was given, or of the one in the token.
async fn coordinator_addresses(
    given: Option<&HostPort>,
    token: &JoinToken,
) -> Result<Vec<SocketAddr>> {
    let (host, from) = match given {
        Some(HostPort(host)) => (host.as_str(), ""),
        None => (token.address(), ", which the token names as the coordinator"),
    };
    let found = tokio::net::lookup_host(host).await;
    let mut found: Vec<_> = found.map_or_else(|_| Vec::new(), Iterator::collect);
    if found.is_empty() {
        return Err(bad_input(anyhow::anyhow!(
            "{host:?}{from}: no host of this name is known here; give the coordinator's address"
        )));
    }
    // Coordinators listen on IPv4 unless told otherwise.
    found.sort_by_key(SocketAddr::is_ipv6);
    found.dedup();
    Ok(found)
}

/// Tries the addresses of a host, one after the other. Fails as the last one did.
async fn first_that_answers<T>(
    addresses: &[SocketAddr],
    connect: impl AsyncFn(SocketAddr) -> Result<T>,
) -> Result<T> {
    let mut last = anyhow::anyhow!("the coordinator has no address");
    for address in addresses {
        match connect(*address).await {
            Ok(connected) => return Ok(connected),
            Err(error) => last = error,
        }
    }
    Err(last)
}
