//! The cluster that is measured: in this process, or with a process per worker.
//!
//! Invariant: workers that are processes end with this one: they are killed when it is dropped.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use lite_llm_actors::{
    archive,
    coordinator::{CoordinatorHandle, CoordinatorOptions},
    local::LocalCluster,
};
use lite_llm_kernels::math::Math;
use lite_llm_runtime::checkpoint::Checkpoint;
use lite_llm_transport::{
    identity::{ClusterCa, Role},
    token::JoinToken,
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::{
    cli::BenchModelArgs,
    commands::{LOCAL_PATIENCE, bad_input, placement},
};

/// How long workers may take to load and join.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// A running cluster.
pub(super) enum Cluster {
    /// Workers are actors of this process.
    Here(LocalCluster),
    /// Workers are processes of their own.
    Processes(Processes),
}

/// A coordinator here, and workers that it has started.
pub(super) struct Processes {
    coordinator: CoordinatorHandle,
    workers: Vec<Child>,
    /// Holds the join token.
    _folder: tempfile::TempDir,
}

impl Cluster {
    /// Starts a cluster and waits until it can serve.
    pub(super) async fn start(checkpoint: Arc<Checkpoint>, args: &BenchModelArgs) -> Result<Self> {
        match args.processes {
            false => Ok(Self::Here(args.local.cluster(checkpoint).await?)),
            true => Ok(Self::Processes(Processes::start(checkpoint, args).await?)),
        }
    }

    pub(super) fn coordinator(&self) -> &CoordinatorHandle {
        match self {
            Self::Here(cluster) => cluster.coordinator(),
            Self::Processes(cluster) => &cluster.coordinator,
        }
    }

    pub(super) async fn stop(self) {
        match self {
            Self::Here(cluster) => cluster.stop().await,
            Self::Processes(Processes { coordinator, mut workers, .. }) => {
                // Nothing runs any more: workers that miss their coordinator would only say so.
                for worker in &mut workers {
                    // One that has ended already needs no killing.
                    let _ = worker.kill().await;
                }
                coordinator.stop().await;
            }
        }
    }
}

impl Processes {
    async fn start(checkpoint: Arc<Checkpoint>, args: &BenchModelArgs) -> Result<Self> {
        let local = &args.local;
        let model = args.model.as_ref().ok_or_else(|| {
            bad_input(anyhow::anyhow!("--processes needs --model: workers open it by its path"))
        })?;
        let model = match archive::is_url(model) {
            true => model.clone(),
            false => std::path::absolute(model)?,
        };
        let count = usize::from(local.workers);
        let authority = Arc::new(ClusterCa::ephemeral()?);
        let coordinator = CoordinatorHandle::start(CoordinatorOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            authority: authority.clone(),
            checkpoint,
            workers: count,
            placement: placement(local.random_placement),
            kv_dtype: local.kv_dtype,
            math: local.compute.math,
            context: local.context,
            remote_workers: true,
            replicas: local.replicas,
            patience: LOCAL_PATIENCE,
            ledger: None,
            client_priority: 0,
        })
        .await?;
        let folder = tempfile::tempdir().context("a folder for the join token")?;
        let token = JoinToken::path_in(folder.path(), Role::Worker);
        authority.join_token(Role::Worker, coordinator.address().to_string())?.write(&token)?;
        if local.compute.device != lite_llm_actors::node::DeviceChoice::Cpu
            || local.compute.math != Math::Exact
            || local.compute.nvme.is_some()
        {
            return Err(bad_input(anyhow::anyhow!(
                "--processes: workers compute with cpu, without --nvme"
            )));
        }
        let program = std::env::current_exe().context("the path of this program")?;
        // Asked once: workers that load already would leave less for the next.
        let (dram, simd) = (local.compute.dram_bytes(count, 0).to_string(), local.compute.simd()?);
        let mut workers = Vec::with_capacity(count);
        for number in 1..=count {
            let mut command = Command::new(&program);
            command.arg("worker").arg("--token").arg(&token).arg("--model").arg(&model);
            command.arg("--name").arg(format!("w{number}"));
            command.arg("--threads").arg(local.compute.threads(count).to_string());
            command.arg("--simd").arg(simd.name());
            command.arg("--dram").arg(&dram);
            command.arg("--kv").arg(local.compute.kv_of(count).to_string());
            command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
            workers.push(command.spawn().context("start a worker process")?);
        }
        let ended = workers.iter_mut().map(|worker| Box::pin(worker.wait()));
        let ended = futures::future::select_all(ended);
        tokio::select! {
            ready = timeout(START_TIMEOUT, coordinator.ready()) => ready
                .with_context(|| format!("the workers were not ready within {START_TIMEOUT:?}"))??,
            (status, number, _) = ended => {
                let (name, status) = (number + 1, status.context("wait for a worker process")?);
                bail!("worker w{name} ended before the cluster was ready: {status}");
            }
        }
        Ok(Self { coordinator, workers, _folder: folder })
    }
}
