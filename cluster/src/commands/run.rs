//! `lite-llm run`: everything in one process.

use std::{
    io::Read,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail};
use lite_llm_actors::node::jobs;
use lite_llm_runtime::{
    chat::{Conversation, Message},
    checkpoint::{self, Checkpoint},
    config::ModelConfig,
    draft::{Speculation, drafted},
    prompt::{PromptError, Prompts},
    sampler::Sampling,
    stop::StopTexts,
    tier::TierSet,
};
use lite_llm_transport::messages::{
    Choosing, JobEvent, JobEventBody, JobRequest, LogitsWanted, Prompt, Serving,
};
use serde_json::json;
use tokio::sync::mpsc;

use super::{
    answer::{Answer, BROKEN_OFF},
    bad_input, budgets, interrupted, open_model,
};
use crate::{
    cli::{ChatArgs, RunArgs, SamplingArgs},
    demo,
};

pub(super) async fn run(args: RunArgs, json: bool) -> Result<()> {
    args.sampling.check()?;
    args.http.check(None)?;
    let checkpoint = open_model(args.model.as_ref())?;
    let config = args.local.served(&checkpoint)?;
    let text = Prompts::of(&checkpoint).map_err(bad_input)?.serving(config.context);
    if args.http.http.is_some() {
        return serve(args, checkpoint).await;
    }
    let prompts = match &args.prompt {
        Some(prompt) => vec![read_prompt(prompt, text.bytes_max()).await?],
        None => demo::PROMPTS.map(str::to_owned).to_vec(),
    };
    let requests = prompts
        .iter()
        .map(|prompt| args.sampling.local_request(&config, &text, prompt))
        .collect::<Result<Vec<_>>>()?;
    args.sampling.tell_seed();
    let started = Instant::now();
    let cluster = args.local.cluster(checkpoint.clone()).await?;
    if !json {
        let dram = cluster.stores().iter().map(|store| store.budget()).min().unwrap_or(0);
        describe(&checkpoint, &args, dram, started)?;
    }
    let result = async {
        for (prompt, request) in prompts.iter().zip(requests) {
            let (started, serving) = (Instant::now(), args.sampling.serving());
            let choosing = args.sampling.choosing()?;
            let (_, mut events) =
                cluster.coordinator().submit_order(request, choosing, serving).await?;
            let mut answer = Answer::begin(prompt, &args.sampling, json, started);
            while let Some(event) = events.recv().await {
                if answer.take(event)? {
                    break;
                }
            }
            answer.finish()?;
        }
        Ok(())
    }
    .await;
    cluster.stop().await;
    result
}

/// Serves the HTTP API until it is told to end.
async fn serve(args: RunArgs, checkpoint: Arc<Checkpoint>) -> Result<()> {
    let started = Instant::now();
    let cluster = args.local.cluster(checkpoint.clone()).await?;
    let dram = cluster.stores().iter().map(|store| store.budget()).min().unwrap_or(0);
    describe(&checkpoint, &args, dram, started)?;
    let served = (&*checkpoint, (args.local.kv_dtype, args.local.compute.math), args.local.context);
    let serving = async {
        let model = args.model.as_deref();
        let http = args.http.serve(model, served, cluster.coordinator(), None, None).await?;
        interrupted().await;
        say!("stopping");
        if let Some(http) = http {
            http.stop().await;
        }
        Ok(())
    };
    let result = serving.await;
    cluster.stop().await;
    result
}

/// A prompt as given, or standard input for `-`: no more of it than `bytes_max`.
pub(super) async fn read_prompt(prompt: &str, bytes_max: usize) -> Result<String> {
    let too_long = |found: &str| {
        bad_input(anyhow!(
            "the prompt has {found} bytes; at most {bytes_max} can fit: shorten the prompt"
        ))
    };
    if prompt != "-" {
        if prompt.len() > bytes_max {
            return Err(too_long(&prompt.len().to_string()));
        }
        return Ok(prompt.to_owned());
    }
    let bytes = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        let bound = (bytes_max as u64).saturating_add(1);
        std::io::stdin().take(bound).read_to_end(&mut bytes).map(|_| bytes)
    });
    let bytes = bytes.await?.context("standard input: cannot read")?;
    if bytes.len() > bytes_max {
        return Err(too_long(&format!("more than {bytes_max}")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        bad_input(anyhow!("standard input is not UTF-8: byte {at} begins no character"))
    })
}

fn describe(checkpoint: &Checkpoint, args: &RunArgs, dram: u64, started: Instant) -> Result<()> {
    let summary = checkpoint::inspect::inspect(checkpoint)?;
    let workers = args.local.workers;
    let threads = args.local.compute.threads(workers.into());
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    remark!(
        "{}: {:.1} M parameters, {:.1} M active per token · {} of {} on {} · ready in {:.2} s",
        match &args.model {
            Some(dir) => dir.display().to_string(),
            None => "built-in model (manual pages)".into(),
        },
        summary.parameters as f64 / 1e6,
        summary.active_parameters as f64 / 1e6,
        plural(workers.into(), "worker"),
        plural(threads, "thread"),
        args.local.compute.simd()?,
        started.elapsed().as_secs_f64(),
    );
    let kv = args.local.compute.kv_bytes(workers.into())?;
    let each = budgets(Some(checkpoint.all_expert_bytes().div_ceil(workers.into())), dram, kv);
    remark!("{each}{}", if workers == 1 { "" } else { " (each worker)" });
    Ok(())
}

impl SamplingArgs {
    /// How that job's tokens are chosen, beyond what its request says.
    pub(super) fn choosing(&self) -> Result<Choosing> {
        self.choosing.choosing().map_err(|error| bad_input(anyhow!(error)))
    }

    /// What that job is to those that schedule it.
    pub(super) fn serving(&self) -> Serving {
        let speculate = self.speculate == Some(Speculation::Ngram);
        let tenant = String::new();
        Serving { tenant, priority: self.priority, speculate }
    }

    /// The job that these flags and a prompt describe.
    pub(super) fn request(&self, prompt: Prompt) -> JobRequest {
        JobRequest {
            prompt,
            max_new_tokens: self.max_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed.value,
            tiers: match &self.speculate {
                Some(Speculation::Tier(tier)) => drafted(&self.tiers, tier),
                _ => self.tiers.clone(),
            },
            stop_at_eos: !self.ignore_eos,
            want_logits: LogitsWanted::None,
            want_routes: false,
            prefill_chunk: 0,
            trace: Default::default(),
        }
    }

    /// Checks what can be checked without a model.
    pub(super) fn check(&self) -> Result<()> {
        let Self { temperature, top_k, top_p, .. } = *self;
        let seed = self.seed.value;
        Sampling { temperature, top_k, top_p, seed, ..Sampling::GREEDY }
            .check()
            .map_err(bad_input)?;
        self.choosing()?;
        let tiers = self.tiers.parse::<TierSet>();
        tiers.map(drop).map_err(|error| bad_input(anyhow!("tiers: {error}")))
    }

    /// What ends an answer.
    pub(super) fn stop_texts(&self) -> StopTexts {
        StopTexts::new(self.stop.iter().cloned())
    }

    /// Says which seed was taken where any would do.
    pub(super) fn tell_seed(&self) {
        if self.seed.any && self.temperature > 0.0 {
            remark!("seed {}", self.seed.value);
        }
    }

    /// A prompt for a coordinator, which has the model.
    pub(super) fn remote_prompt(&self, prompt: &str) -> Prompt {
        match self.chat.chat {
            true => Prompt::Chat(self.chat.json(prompt)),
            false => Prompt::Text(prompt.to_owned()),
        }
    }

    /// The job of a prompt for a model that is here: checked before anything is loaded.
    fn local_request(
        &self,
        config: &ModelConfig,
        text: &Prompts,
        prompt: &str,
    ) -> Result<JobRequest> {
        let ids = match self.chat.chat {
            true => text.encode_chat(&self.chat.conversation(prompt)),
            false => text.encode(prompt),
        };
        let request = self.request(Prompt::Tokens(ids.map_err(prompt_error)?));
        let checked = jobs::check_order(&request, &self.choosing()?, &[], config);
        checked.map_err(|reason| bad_input(anyhow!(reason)))?;
        Ok(request)
    }
}

/// A prompt that cannot be used is the caller's, or the model's.
pub(super) fn prompt_error(error: PromptError) -> anyhow::Error {
    match error {
        PromptError::Chat(error) => anyhow!("--chat: {error}"),
        error => bad_input(error),
    }
}

/// Seconds since 1970, for templates that show the date.
pub(crate) fn unix_time() -> i64 {
    // A clock before 1970 is none.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

impl ChatArgs {
    fn messages(&self, prompt: &str) -> Vec<Message> {
        let system = self.system.as_ref().map(|system| Message::new("system", system));
        system.into_iter().chain([Message::new("user", prompt)]).collect()
    }

    /// The conversation that a prompt begins.
    pub(super) fn conversation(&self, prompt: &str) -> Conversation {
        Conversation::new(&self.messages(prompt)).at(unix_time())
    }

    /// The same for a coordinator: it shows the client's time, not its own.
    fn json(&self, prompt: &str) -> String {
        json!({ "messages": self.messages(prompt), "unix_time": unix_time() }).to_string()
    }
}

/// Reads all events of a job; `each` sees them.
pub(super) async fn drain(
    mut events: mpsc::Receiver<JobEvent>,
    mut each: impl FnMut(JobEventBody) -> Result<()>,
) -> Result<()> {
    while let Some(event) = events.recv().await {
        match event.body {
            JobEventBody::Done { .. } => return Ok(()),
            JobEventBody::Failed { reason } | JobEventBody::NotTaken { reason } => {
                bail!("{reason}")
            }
            other => each(other)?,
        }
    }
    bail!(BROKEN_OFF)
}
