//! `lite-llm eval --trace`: the routing of prompts, with what could be predicted of it.
//!
//! One engine computes them, without a cluster: routing does not depend on where a model runs
//! (determinism contract), and predictions are recorded beside it.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, anyhow};
use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::Engine,
    store::DramStore,
    trace::{self, Trace},
};
use serde_json::json;

use super::bad_input;
use crate::{
    cli::EvalArgs,
    progress::{Progress, Unit},
};

pub(super) async fn record(
    args: &EvalArgs,
    checkpoint: &Arc<Checkpoint>,
    prompts: &[Vec<u32>],
    path: &Path,
    quiet: bool,
) -> Result<()> {
    let name = args.tokens.file_stem().map_or("text".into(), |name| name.to_string_lossy());
    let config = checkpoint.config();
    let Some(moe) = &config.moe else {
        let model = args.model.display();
        return Err(bad_input(anyhow!(
            "{model}: the model has no experts, so there is no routing"
        )));
    };
    let tiers = args.tiers.parse().map_err(|error| bad_input(anyhow!("--tiers: {error}")))?;
    let trace = Trace::new(&name, config.sparse_layers().count(), moe);
    let mut trace =
        trace.map_err(|reason| bad_input(anyhow!("{}: {reason}", args.model.display())))?;
    let compute = &args.local.compute;
    let device = Arc::new(Cpu::new(compute.threads(1), compute.simd()?));
    let (kv_bytes, kv_dtype) = (compute.kv_bytes(1)?, args.local.kv_dtype);
    let (context, checkpoint) = (args.local.context, checkpoint.clone());
    let (count, prompts, file) = (prompts.len(), prompts.to_vec(), path.to_owned());
    let work = move || -> Result<()> {
        let store = DramStore::new(u64::MAX);
        store.load_all(&checkpoint)?;
        let backbone = Backbone::load_served(&checkpoint, context, device, |_, _| {})?;
        let mut engine = Engine::with_cache(Arc::new(backbone), kv_bytes, kv_dtype)?;
        let mut progress = Progress::new("trace", Unit::Things("prompts"), quiet);
        for (at, prompt) in prompts.iter().enumerate() {
            let recorded = trace.record(&mut engine, &store, &tiers, prompt);
            recorded.map_err(|reason| bad_input(anyhow!("prompt {at}: {reason}")))?;
            progress.update(at as u64 + 1, prompts.len() as u64, "");
        }
        progress.finish();
        Ok(trace::write(&file, &[trace])?)
    };
    tokio::task::spawn_blocking(work).await.context("the recording engine's thread ended")??;
    match (quiet, &args.out) {
        (false, _) => say!("the routing of {count} prompts written to {}", path.display()),
        (true, None) => say!("{}", json!({ "trace": path })),
        // Told with the rest.
        (true, Some(_)) => {}
    }
    Ok(())
}
