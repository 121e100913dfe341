//! `lite-llm worker`.

use anyhow::{Result, anyhow};
use lite_llm_actors::{
    node::Model,
    worker::{Worker, WorkerOptions, local_address},
};
use lite_llm_kernels::device::Device;

use super::{bad_input, coordinator_address, interrupted, read_token};
use crate::{cli::WorkerArgs, size::Size};

/// The worker's name in the cluster.
pub(super) fn name(args: &WorkerArgs) -> String {
    args.name.clone().unwrap_or_else(|| format!("w{}", std::process::id()))
}

pub(super) async fn worker(args: WorkerArgs) -> Result<()> {
    if args.device != "cpu" {
        let found = &args.device;
        return Err(bad_input(anyhow!("--device {found}: this release computes on cpu only")));
    }
    let token = read_token(args.token.as_ref())?;
    let coordinator = coordinator_address(args.join, &token)?;
    let device = args.compute.device(1)?;
    let dram_bytes = args.compute.dram_bytes(1);
    let name = name(&args);
    let toward = || local_address(coordinator);
    let listen = args.listen.map_or_else(toward, Ok)?;
    say!("worker {name}: {}, {} for experts", device.describe(), Size(dram_bytes));
    let options = WorkerOptions {
        coordinator,
        token,
        name,
        listen,
        device,
        dram_bytes,
        kv_bytes: args.compute.kv.0,
        model: args.model.map_or(Model::AsAssigned, Model::Folder),
        remote: true,
    };
    let mut worker = Worker::start(options).await?;
    say!("joined {coordinator}");
    let result = tokio::select! {
        ended = worker.run() => Err(ended.into()),
        () = interrupted() => {
            say!("stopping");
            Ok(())
        }
    };
    worker.stop().await;
    result
}
