//! `train --workers N` and `train worker`: steps that several processes compute.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use lite_llm_actors::training::{
    Hub, Patience,
    worker::{TrainWorkerOptions, serve},
};
use lite_llm_runtime::train::spread::Ranks;
use lite_llm_transport::{identity::Role, token::JoinToken};
use tokio::{
    process::Command,
    runtime::Handle,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    cli::{RunTrainArgs, TrainWorkerArgs},
    commands::bad_input,
    machine, telemetry,
};

/// How often a worker that ends is started again.
const RESTARTS_MAX: usize = 20;
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How long workers may take to end with the run.
const ENDING_MAX: Duration = Duration::from_secs(3);

/// The hub and its worker processes.
pub(super) struct Shared {
    hub: Hub,
    /// Ends them with itself.
    children: JoinSet<()>,
    /// They are not started again.
    ending: Arc<AtomicBool>,
    /// Folder of the token, gone with the run.
    _folder: tempfile::TempDir,
}

/// What a worker process is started with.
#[derive(Clone)]
struct Child {
    program: PathBuf,
    hub: String,
    token: PathBuf,
    threads: usize,
    simd: Option<String>,
    /// Where its spans go.
    otlp: Option<String>,
}

impl Shared {
    /// Starts worker processes.
    pub(super) async fn start(args: &RunTrainArgs, count: u16) -> Result<Self> {
        let hub =
            Hub::start(args.listen, count.into(), Patience::default()).await.map_err(bad_input)?;
        let folder = tempfile::tempdir().context("a folder for the workers' token")?;
        let token = folder.path().join("worker.token");
        hub.token().write(&token)?;
        let threads = args.compute.threads.map(usize::from);
        let child = Child {
            program: std::env::current_exe().context("this program's own path")?,
            hub: hub.address().to_string(),
            token,
            threads: threads.unwrap_or((machine::cores() / usize::from(count)).max(1)),
            simd: args.compute.simd.map(|simd| simd.to_string()),
            otlp: telemetry::receiver().map(|receiver| receiver.url),
        };
        let (mut children, ending) = (JoinSet::new(), Arc::<AtomicBool>::default());
        for number in 1..=count {
            children.spawn(keep(child.clone(), format!("w{number}"), ending.clone()));
        }
        let Child { threads, hub: at, token, .. } = &child;
        let token = token.display();
        remark!(
            "{count} workers of {threads} threads; more may help: `lite-llm train worker --hub {at} --token {token}`"
        );
        Ok(Self { hub, children, ending, _folder: folder })
    }

    pub(super) fn ranks(&self) -> Arc<dyn Ranks> {
        self.hub.ranks(Handle::current())
    }

    /// Sends the workers away, and waits a while for them to send the last of their spans.
    pub(super) async fn stop(mut self) {
        self.ending.store(true, Ordering::Relaxed);
        self.hub.stop().await;
        let all = async { while self.children.join_next().await.is_some() {} };
        // Those that stay are ended with this.
        let _ = timeout(ENDING_MAX, all).await;
    }
}

/// Runs one worker, and starts it again when it ends.
async fn keep(child: Child, name: String, ending: Arc<AtomicBool>) {
    for _ in 0..RESTARTS_MAX {
        let mut command = Command::new(&child.program);
        command.args(["train", "worker", "--quiet", "--hub", &child.hub, "--name", &name]);
        command.arg("--token").arg(&child.token).arg("--threads").arg(child.threads.to_string());
        if let Some(simd) = &child.simd {
            command.arg("--simd").arg(simd);
        }
        if let Some(otlp) = &child.otlp {
            command.arg("--otlp").arg(otlp);
        }
        // Its end is ours: nothing of it is left behind.
        let ended = match command.stdin(std::process::Stdio::null()).kill_on_drop(true).spawn() {
            Ok(mut running) => running.wait().await.map(|status| status.to_string()),
            Err(error) => Err(error),
        };
        if ending.load(Ordering::Relaxed) {
            return;
        }
        let ended = ended.unwrap_or_else(|error| error.to_string());
        remark!(
            "warning: worker {name} ended ({ended}); it is started again, and the run goes on from its last checkpoint"
        );
        sleep(RESTART_PAUSE).await;
    }
    remark!("warning: worker {name} ended {RESTARTS_MAX} times and is not started again");
}

/// The name of a worker.
pub(super) fn name(args: &TrainWorkerArgs) -> String {
    args.name.clone().unwrap_or_else(|| format!("w{}", std::process::id()))
}

/// `train worker`.
pub(super) async fn worker(args: TrainWorkerArgs) -> Result<()> {
    let token = JoinToken::read(&args.token).map_err(bad_input)?;
    if token.role() != Role::Worker {
        return Err(bad_input(anyhow!("{}: not a worker's token", args.token.display())));
    }
    let cpu = Arc::clone(&args.compute.cpu()?);
    let name = name(&args);
    let (hub, quiet) = (args.hub, args.quiet);
    let ended = serve(TrainWorkerOptions { hub, token, name, cpu }).await?;
    if !quiet {
        remark!("{ended}");
    }
    Ok(())
}
