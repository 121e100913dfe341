//! A whole cluster in one process: the same actors, connected over loopback QUIC.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use lite_llm_kernels::{cpu::Cpu, kv::KvDType, math::Math, simd::Simd};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    residency::{ExpertCache, NvmeFolder},
};
use lite_llm_transport::identity::ClusterCa;

use crate::{
    coordinator::{CoordinatorHandle, CoordinatorOptions, ServeError},
    node::{DeviceChoice, Model},
    placement::PlacementPolicy,
    worker::{Worker, WorkerOptions},
};

/// What a local cluster is started with.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Nodes, at least one.
    pub workers: usize,
    /// Compute threads of each node.
    pub threads: usize,
    /// Vector instructions.
    pub simd: Simd,
    /// What they compute with.
    pub device: DeviceChoice,
    /// How products are computed.
    pub math: Math,
    /// Bytes of a GPU's memory for experts, per node; by default what is free.
    pub hbm_bytes: Option<u64>,
    /// Bytes of experts in memory per node.
    pub dram_bytes: u64,
    /// A folder of a local disk that all nodes share, and its bytes: each has a part of its own.
    pub nvme: Option<NvmeFolder>,
    /// Bytes of caches of keys and values per node.
    pub kv_bytes: u64,
    /// How they are kept.
    pub kv_dtype: KvDType,
    /// Positions with which the model is served; by default its own.
    pub context: Option<usize>,
    /// How experts are spread.
    pub placement: PlacementPolicy,
    /// Nodes that hold each expert.
    pub replicas: u16,
    /// How long jobs and their parts wait for a node that takes the place of one that is gone.
    pub patience: Duration,
}

/// A running local cluster.
pub struct LocalCluster {
    coordinator: CoordinatorHandle,
    workers: Vec<Worker>,
}

impl LocalCluster {
    /// Starts a cluster for a model and waits until it can serve.
    pub async fn start(
        checkpoint: Arc<Checkpoint>,
        options: &LocalOptions,
    ) -> Result<Self, ServeError> {
        if options.workers == 0 {
            return Err(ServeError("a cluster needs at least one worker".into()));
        }
        let failed = |error: &dyn std::fmt::Display| ServeError(error.to_string());
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let authority = Arc::new(ClusterCa::ephemeral().map_err(|error| failed(&error))?);
        let coordinator = CoordinatorHandle::start(CoordinatorOptions {
            listen: loopback,
            authority,
            checkpoint: checkpoint.clone(),
            workers: options.workers,
            placement: options.placement,
            kv_dtype: options.kv_dtype,
            math: options.math,
            context: options.context,
            remote_workers: false,
            replicas: options.replicas,
            patience: options.patience,
            ledger: None,
            client_priority: 0,
        })
        .await?;
        // Opening a GPU blocks.
        let open = {
            let LocalOptions { device, workers, threads, simd, hbm_bytes, math, .. } =
                options.clone();
            move || {
                let cpu = || Arc::new(Cpu::new(threads, simd));
                let open = |number| device.open((number, workers), cpu(), hbm_bytes, math);
                (0..workers).map(open).collect::<Result<Vec<_>, _>>()
            }
        };
        let devices = tokio::task::spawn_blocking(open).await.map_err(|error| failed(&error))?;
        let devices = devices.map_err(|error| failed(&error))?;
        let starts = (1..=options.workers).zip(devices).map(|(number, device)| {
            Worker::start(WorkerOptions {
                coordinator: coordinator.address(),
                token: coordinator.token().clone(),
                name: format!("w{number}"),
                listen: loopback,
                device,
                dram_bytes: options.dram_bytes,
                dram_holds_rest: false,
                nvme: options.nvme.as_ref().map(|nvme| NvmeFolder {
                    folder: nvme.folder.join(format!("w{number}")),
                    budget: nvme.budget / options.workers as u64,
                }),
                kv_bytes: options.kv_bytes,
                model: Model::Open(checkpoint.clone()),
                remote: false,
                patience: options.patience,
            })
        });
        let workers =
            futures::future::try_join_all(starts).await.map_err(|error| failed(&error))?;
        let cluster = Self { coordinator, workers };
        cluster.coordinator.ready().await?;
        Ok(cluster)
    }

    /// The coordinator, to submit jobs to.
    pub fn coordinator(&self) -> &CoordinatorHandle {
        &self.coordinator
    }

    /// The stores of its nodes' experts: for what they may hold, and for tests of what their loss does.
    pub fn stores(&self) -> Vec<Arc<ExpertCache>> {
        self.workers.iter().filter_map(Worker::store).collect()
    }

    /// Ends the cluster. The coordinator goes first, so that it misses no worker.
    pub async fn stop(self) {
        self.coordinator.stop().await;
        futures::future::join_all(self.workers.into_iter().map(Worker::stop)).await;
    }
}
