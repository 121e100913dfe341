//! `lite-llm eval`: logits, routes and greedy continuations, for comparison with other programs.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, anyhow};
use lite_llm_actors::node::jobs;
use lite_llm_transport::messages::{JobEventBody, JobRequest, LogitsWanted, Prompt};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::json;

use super::{bad_input, open_model, record, run::drain};
use crate::{
    cli::EvalArgs,
    progress::{Progress, Unit},
};

/// Prompts computed at a time.
const CONCURRENT_MAX: usize = 8;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    prompts: Vec<Vec<u32>>,
}

/// What came of one prompt.
#[derive(Default)]
struct Evaluated {
    vocab: usize,
    logits: Vec<f32>,
    /// Chunks of `[layers, rows, k]`.
    routes: Vec<(usize, usize, usize, Vec<i32>)>,
    greedy: Vec<i32>,
}

impl Evaluated {
    fn take(&mut self, body: JobEventBody) {
        match body {
            JobEventBody::Logits { width, values, .. } => {
                self.vocab = width as usize;
                self.logits.extend(values);
            }
            JobEventBody::Routes { layers, rows, k, ids, .. } => {
                self.routes.push((layers as usize, rows as usize, k as usize, ids));
            }
            JobEventBody::Token { id, .. } => self.greedy.push(id as i32),
            _ => {}
        }
    }

    /// The chunks of routes as one `[layers, rows, k]`.
    fn merged_routes(&self) -> (Vec<usize>, Vec<i32>) {
        let Some(&(layers, _, k, _)) = self.routes.first() else { return (vec![0, 0, 0], vec![]) };
        let rows = self.routes.iter().map(|(_, rows, _, _)| rows).sum();
        let mut all = Vec::with_capacity(layers * rows * k);
        for layer in 0..layers {
            for (_, rows, k, ids) in &self.routes {
                all.extend(&ids[layer * rows * k..][..rows * k]);
            }
        }
        (vec![layers, rows, k], all)
    }
}

pub(super) async fn eval(args: EvalArgs, json: bool) -> Result<()> {
    let tokens = read_tokens(&args.tokens)?;
    let checkpoint = open_model(Some(&args.model))?;
    let config = args.local.served(&checkpoint)?;
    for (index, prompt) in tokens.prompts.iter().enumerate() {
        let checked = jobs::check(&request(&args, prompt.clone()), &config);
        checked.map_err(|reason| {
            bad_input(anyhow!("{}: prompt {index}: {reason}", args.tokens.display()))
        })?;
    }
    if let Some(path) = &args.trace {
        record::record(&args, &checkpoint, &tokens.prompts, path, json).await?;
    }
    let Some(out) = &args.out else { return Ok(()) };
    let cluster = args.local.cluster(checkpoint).await?;
    let mut progress = Progress::new("eval", Unit::Things("prompts"), json);
    let mut done: Vec<Option<Evaluated>> = tokens.prompts.iter().map(|_| None).collect();
    let result = async {
        let mut running = tokio::task::JoinSet::new();
        let mut next = tokens.prompts.iter().enumerate();
        let mut finished = 0;
        loop {
            while running.len() < CONCURRENT_MAX {
                let Some((index, prompt)) = next.next() else { break };
                let (_, events) = cluster
                    .coordinator()
                    .submit(request(&args, prompt.clone()))
                    .await
                    .with_context(|| format!("prompt {index}"))?;
                running.spawn(async move {
                    let mut evaluated = Evaluated::default();
                    let drained = drain(events, |body| {
                        evaluated.take(body);
                        Ok(())
                    })
                    .await;
                    (index, drained.map(|()| evaluated))
                });
            }
            let Some(ended) = running.join_next().await else { return Ok(()) };
            let (index, evaluated) = ended?;
            let evaluated = evaluated.with_context(|| format!("prompt {index}"));
            done[index] = Some(evaluated.map_err(bad_input)?);
            finished += 1;
            progress.update(finished, tokens.prompts.len() as u64, "");
        }
    }
    .await;
    progress.finish();
    cluster.stop().await;
    result.and_then(|()| {
        let done: Vec<Evaluated> = done.into_iter().flatten().collect();
        write(&args, out, &done)?;
        if json {
            say!("{}", json!({ "out": out, "prompts": done.len() }));
        } else {
            say!("{} prompts written to {}", done.len(), out.display());
        }
        Ok(())
    })
}

fn read_tokens(path: &Path) -> Result<Tokens> {
    let text = std::fs::read(path)
        .with_context(|| format!("{}: cannot read", path.display()))
        .map_err(bad_input)?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{}: {{\"prompts\": [[ids…], …]}} is expected", path.display()))
        .map_err(bad_input)
}

fn request(args: &EvalArgs, prompt: Vec<u32>) -> JobRequest {
    JobRequest {
        tiers: args.tiers.clone(),
        want_logits: LogitsWanted::All,
        want_routes: args.routes,
        prefill_chunk: args.prefill_chunk,
        ..JobRequest::greedy(Prompt::Tokens(prompt), args.greedy)
    }
}

fn write(args: &EvalArgs, out: &Path, done: &[Evaluated]) -> Result<()> {
    let routes: Vec<_> = done.iter().map(Evaluated::merged_routes).collect();
    let mut tensors = BTreeMap::new();
    for (i, evaluated) in done.iter().enumerate() {
        let vocab = evaluated.vocab.max(1);
        let mut add = |name: &str, dtype, shape: Vec<usize>, bytes| -> Result<()> {
            tensors.insert(format!("p{i}.{name}"), TensorView::new(dtype, shape, bytes)?);
            Ok(())
        };
        let rows = evaluated.logits.len() / vocab;
        let logits = bytemuck::cast_slice(&evaluated.logits);
        add("logits", Dtype::F32, vec![rows, vocab], logits)?;
        if args.routes {
            let (shape, ids) = &routes[i];
            add("router_ids", Dtype::I32, shape.clone(), bytemuck::cast_slice(ids))?;
        }
        if args.greedy > 0 {
            let ids = &evaluated.greedy;
            add("greedy_ids", Dtype::I32, vec![ids.len()], bytemuck::cast_slice(ids))?;
        }
    }
    safetensors::serialize_to_file(&tensors, None, out)
        .with_context(|| format!("{}: cannot write", out.display()))
}
