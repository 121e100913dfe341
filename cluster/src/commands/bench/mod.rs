//! `lite-llm bench`: measurements, each beside something measured in the same run.

mod hbm;
mod kernels;
mod model;
mod processes;
mod profile;
mod random_model;
pub(super) mod samples;
mod store;
mod train;
mod transport;

use anyhow::Result;

use self::model::Phase;
use crate::cli::{BenchArgs, BenchCommand};

pub(super) async fn bench(args: BenchArgs, json: bool) -> Result<()> {
    match args.what {
        BenchCommand::Kernels(args) => kernels::measure(args, json).await,
        BenchCommand::Decode(args) => model::measure(Phase::Decode, args, json).await,
        BenchCommand::Prefill(args) => model::measure(Phase::Prefill, args, json).await,
        BenchCommand::Transport(args) => transport::measure(args, json).await,
        BenchCommand::TransportPeer(args) => transport::peer(args).await,
        BenchCommand::Store(args) => store::measure(args, json).await,
        BenchCommand::Hbm(args) => hbm::measure(args, json).await,
        BenchCommand::Train(args) => train::measure(args, json).await,
        BenchCommand::RandomModel(args) => random_model::write(args, json).await,
    }
}
