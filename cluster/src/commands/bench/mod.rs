//! `lite-llm bench`: measurements, each beside something measured in the same run.

mod random_model;

use anyhow::Result;

use crate::cli::{BenchArgs, BenchCommand};

pub(super) async fn bench(args: BenchArgs, json: bool) -> Result<()> {
    match args.what {
        BenchCommand::RandomModel(args) => random_model::write(args, json).await,
        _ => unimplemented!(),
    }
}
