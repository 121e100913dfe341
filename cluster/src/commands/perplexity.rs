//! `lite-llm perplexity`: how well a model predicts a text.

use anyhow::{Context, Result, anyhow};
use lite_llm_actors::node::jobs;
use lite_llm_runtime::tokenizer::Tokenizer;
use lite_llm_transport::messages::{JobEventBody, JobRequest, LogitsWanted, Prompt};
use serde_json::json;

use super::{bad_input, open_model, run::drain};
use crate::{
    cli::PerplexityArgs,
    progress::{Progress, Unit},
};

/// Windows computed at a time.
const CONCURRENT_MAX: usize = 4;

/// Sum of negative log-likelihoods in nats, and how many predictions it is of.
#[derive(Debug, Clone, Copy, Default)]
struct Score {
    nats: f64,
    predictions: usize,
}

pub(super) async fn perplexity(args: PerplexityArgs, json: bool) -> Result<()> {
    let path = args.text.display();
    let bytes = std::fs::read(&args.text)
        .with_context(|| format!("{path}: cannot read"))
        .map_err(bad_input)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        bad_input(anyhow!("{path}: not UTF-8: byte {at} begins no character"))
    })?;
    let checkpoint = open_model(args.model.as_ref())?;
    let config = args.local.served(&checkpoint)?;
    let context = config.context;
    if !(2..=context).contains(&args.window) {
        let window = args.window;
        return Err(bad_input(anyhow!(
            "--window {window}: 2 to {context} tokens, the model's context, are expected"
        )));
    }
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?)?;
    let ids = tokenizer.encode(&text, false)?;
    // Models that were trained with a token before every text predict badly without it.
    let prefix = tokenizer.prefix()?;
    let Some(chunk) = args.window.checked_sub(prefix.len()).filter(|chunk| *chunk > 0) else {
        let (window, prefix) = (args.window, prefix.len());
        return Err(bad_input(anyhow!(
            "--window {window}: more than {prefix} are expected, the tokens before every text"
        )));
    };
    let windows = ids.chunks(chunk).map(|chunk| [&prefix, chunk].concat());
    let windows: Vec<Vec<u32>> = windows.filter(|window| window.len() > 1).collect();
    if windows.is_empty() {
        return Err(bad_input(anyhow!("{path}: {} tokens; at least 2 are expected", ids.len())));
    }
    jobs::check(&request(&args, windows[0].clone()), &config)
        .map_err(|reason| bad_input(anyhow!(reason)))?;
    let cluster = args.local.cluster(checkpoint).await?;
    let mut progress = Progress::new("perplexity", Unit::Things("windows"), json);
    let result = async {
        let mut scores = vec![Score::default(); windows.len()];
        let mut running = tokio::task::JoinSet::new();
        let mut next = windows.iter().enumerate();
        let mut finished = 0;
        loop {
            while running.len() < CONCURRENT_MAX {
                let Some((index, window)) = next.next() else { break };
                let window = window.clone();
                let (_, events) =
                    cluster.coordinator().submit(request(&args, window.clone())).await?;
                running.spawn(async move {
                    let mut score = Score::default();
                    let drained = drain(events, |body| {
                        score.take(&window, body);
                        Ok(())
                    })
                    .await;
                    (index, drained.map(|()| score))
                });
            }
            let Some(ended) = running.join_next().await else { break };
            let (index, score) = ended?;
            scores[index] = score?;
            finished += 1;
            progress.update(finished, windows.len() as u64, "");
        }
        // Summed in the order of the text, so that the figure has the same bits every time.
        Ok::<_, anyhow::Error>(scores.iter().fold(Score::default(), |a, b| Score {
            nats: a.nats + b.nats,
            predictions: a.predictions + b.predictions,
        }))
    }
    .await;
    progress.finish();
    cluster.stop().await;
    let Score { nats, predictions } = result?;
    let mean = nats / predictions as f64;
    if json {
        let line = json!({
            "tokens": ids.len(),
            "predictions": predictions,
            "nats": mean,
            "perplexity": mean.exp(),
        });
        say!("{line}");
    } else {
        say!(
            "perplexity {:.5} ({mean:.6} nats over {predictions} predictions of {} tokens)",
            mean.exp(),
            ids.len()
        );
    }
    Ok(())
}

impl Score {
    fn take(&mut self, window: &[u32], body: JobEventBody) {
        let JobEventBody::Logits { first_row, width, values, .. } = body else { return };
        for (row, logits) in (first_row as usize..).zip(values.chunks_exact(width as usize)) {
            if let Some(&target) = window.get(row + 1) {
                let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = logits.iter().map(|&l| f64::from(l - best).exp()).sum();
                self.nats += sum.ln() - f64::from(logits[target as usize] - best);
                self.predictions += 1;
            }
        }
    }
}

fn request(args: &PerplexityArgs, prompt: Vec<u32>) -> JobRequest {
    JobRequest {
        tiers: args.tiers.clone(),
        want_logits: LogitsWanted::All,
        ..JobRequest::greedy(Prompt::Tokens(prompt), 0)
    }
}
