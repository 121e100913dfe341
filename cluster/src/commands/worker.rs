//! `lite-llm worker`.

use anyhow::Result;
use lite_llm_actors::{
    node::Model,
    worker::{Worker, WorkerOptions, local_address},
};
use lite_llm_transport::identity::Role;

use super::{budgets, coordinator_addresses, first_that_answers, interrupted, read_token};
use crate::cli::WorkerArgs;

/// The worker's name in the cluster.
pub(super) fn name(args: &WorkerArgs) -> String {
    args.name.clone().unwrap_or_else(|| format!("w{}", std::process::id()))
}

pub(super) async fn worker(args: WorkerArgs) -> Result<()> {
    let token = read_token(args.token.as_ref(), Role::Worker)?;
    let addresses = coordinator_addresses(args.join.as_ref(), &token).await?;
    let device = args.compute.device()?;
    let dram_bytes = args.compute.dram_bytes(1, 0);
    let kv_bytes = args.compute.kv_bytes(1)?;
    let name = name(&args);
    let rest = match args.compute.dram {
        None => " (of the first, what the rest of the model takes is taken off)",
        Some(_) => "",
    };
    let memory = budgets(None, dram_bytes, kv_bytes);
    say!("worker {name}: {} · {memory}{rest}", device.describe());
    let join = async |coordinator| {
        let options = WorkerOptions {
            coordinator,
            token: token.clone(),
            name: name.clone(),
            listen: args.listen.map_or_else(|| local_address(coordinator), Ok)?,
            device: device.clone(),
            dram_bytes,
            dram_holds_rest: args.compute.dram.is_none(),
            nvme: args.compute.nvme.clone().map(Into::into),
            kv_bytes,
            model: args.model.clone().map_or(Model::AsAssigned, Model::Folder),
            remote: true,
            patience: args.patience.0,
        };
        let worker = Worker::start(options).await?;
        Ok((worker, coordinator))
    };
    let (mut worker, coordinator) = first_that_answers(&addresses, join).await?;
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
