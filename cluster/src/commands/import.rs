//! `lite-llm import`.

use std::time::Instant;

use anyhow::{Result, anyhow};
use lite_llm_runtime::import::{self, ImportOptions};

use super::{bad_input, inspect};
use crate::{
    cli::ImportArgs,
    progress::{Progress, Unit},
};

pub(super) async fn import(args: ImportArgs, json: bool) -> Result<()> {
    let parse = |what: &str, error: &dyn std::fmt::Display| bad_input(anyhow!("{what}: {error}"));
    let tiers = args.tiers.as_deref().map(str::parse).transpose();
    let routes = args.routes.as_deref().map(str::parse).transpose();
    let options = ImportOptions {
        source: args.source,
        out: args.out_dir.clone(),
        dtype: args.dtype,
        tiers: tiers.map_err(|error| parse("--tiers", &error))?,
        routes: routes.map_err(|error| parse("--routes", &error))?,
    };
    let started = Instant::now();
    let summary = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::new("import", Unit::Bytes, json);
        let summary = import::import(&options, &mut |done, total, what| {
            progress.update(done, total, what);
        });
        progress.finish();
        summary
    })
    .await?
    .map_err(bad_input)?;
    inspect::print(&summary, json)?;
    if !json {
        let seconds = started.elapsed().as_secs_f64();
        say!("written to {} in {seconds:.1} s", args.out_dir.display());
    }
    Ok(())
}
