//! `lite-llm run`: everything in one process.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use lite_llm_actors::job;
use lite_llm_runtime::{
    chat::{ChatTemplate, Message},
    checkpoint::{self, Checkpoint},
    sampler::Sampling,
    tier::TierSet,
    tokenizer::Tokenizer,
};
use lite_llm_transport::messages::{JobEvent, JobEventBody, JobRequest, LogitsWanted, Prompt};
use serde_json::json;
use tokio::sync::mpsc;

use super::{bad_input, open_model};
use crate::{
    cli::{RunArgs, SamplingArgs},
    demo, output,
};

/// What is said of an answer without an end.
const BROKEN_OFF: &str = "the answer broke off: the coordinator ended the job without a word";

pub(super) async fn run(args: RunArgs, json: bool) -> Result<()> {
    let prompts = match &args.prompt {
        Some(prompt) => vec![read_prompt(prompt).await?],
        None => demo::PROMPTS.map(str::to_owned).to_vec(),
    };
    let checkpoint = open_model(args.model.as_ref())?;
    let requests = prompts
        .iter()
        .map(|prompt| args.sampling.local_request(&checkpoint, prompt))
        .collect::<Result<Vec<_>>>()?;
    let started = Instant::now();
    let cluster = args.local.cluster(checkpoint.clone()).await?;
    if !json {
        describe(&checkpoint, &args, started)?;
    }
    let result = async {
        for (prompt, request) in prompts.iter().zip(requests) {
            let started = Instant::now();
            let (_, mut events) = cluster.coordinator().submit(request).await?;
            let mut answer = Answer::begin(prompt, json, started);
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

/// A prompt as given, or standard input for `-`.
pub(super) async fn read_prompt(prompt: &str) -> Result<String> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let bytes = tokio::task::spawn_blocking(|| {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    });
    let bytes = bytes.await?.context("standard input: cannot read")?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        bad_input(anyhow!("standard input is not UTF-8: byte {at} begins no character"))
    })
}

fn describe(checkpoint: &Checkpoint, args: &RunArgs, started: Instant) -> Result<()> {
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
    Ok(())
}

impl SamplingArgs {
    /// The job that these flags and a prompt describe.
    pub(super) fn request(&self, prompt: Prompt) -> JobRequest {
        JobRequest {
            prompt,
            max_new_tokens: self.max_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            tiers: self.tiers.clone(),
            stop_at_eos: !self.ignore_eos,
            want_logits: LogitsWanted::None,
            want_routes: false,
            prefill_chunk: 0,
            trace: Default::default(),
        }
    }

    /// Checks what can be checked without a model.
    pub(super) fn check(&self) -> Result<()> {
        let Self { temperature, top_k, top_p, seed, .. } = *self;
        Sampling { temperature, top_k, top_p, seed, ..Sampling::GREEDY }
            .check()
            .map_err(bad_input)?;
        let tiers = self.tiers.parse::<TierSet>();
        tiers.map(drop).map_err(|error| bad_input(anyhow!("tiers: {error}")))
    }

    /// The job of a prompt for a model that is here: checked before anything is loaded.
    fn local_request(&self, checkpoint: &Checkpoint, prompt: &str) -> Result<JobRequest> {
        let request = self.request(Prompt::Tokens(self.encode(checkpoint, prompt)?));
        let checked = job::check(&request, checkpoint.config());
        checked.map_err(|reason| bad_input(anyhow!(reason)))?;
        Ok(request)
    }

    /// The prompt's tokens, in the model's chat template if that was asked for.
    fn encode(&self, checkpoint: &Checkpoint, prompt: &str) -> Result<Vec<u32>> {
        let json = checkpoint.tokenizer_json().map_err(bad_input)?;
        let tokenizer = Tokenizer::from_json(&json).map_err(bad_input)?;
        if !self.chat {
            return Ok(tokenizer.encode(prompt, true)?);
        }
        let Some(template) = checkpoint.chat_template().map_err(bad_input)? else {
            return Err(bad_input(anyhow!("--chat: the model has no chat template")));
        };
        let text = |id: Option<&u32>| id.map(|&id| tokenizer.decode_with_special(&[id]));
        let config = checkpoint.config();
        let (bos, eos) = (text(config.bos_token.as_ref()), text(config.eos_tokens.first()));
        let template = ChatTemplate::new(&template, bos.as_deref(), eos.as_deref())?;
        let text = template.render(&[Message::new("user", prompt)], true)?;
        // The template writes the special tokens itself.
        Ok(tokenizer.encode(&text, false)?)
    }
}

/// An answer on its way to standard output. One that breaks off ends its line.
pub(super) struct Answer {
    /// Show the text as it comes.
    stream: bool,
    prompt: String,
    text: String,
    ids: Vec<u32>,
    started: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    end: Option<String>,
}

impl Answer {
    /// Begins: shows the prompt, unless the answer is to be one line of JSON.
    pub(super) fn begin(prompt: &str, json: bool, started: Instant) -> Self {
        if !json {
            output::show(format_args!("\n{prompt}"));
        }
        let mut answer = Self::silent(prompt, started);
        answer.stream = !json;
        answer
    }

    /// Begins without showing anything.
    pub(super) fn silent(prompt: &str, started: Instant) -> Self {
        Self {
            stream: false,
            prompt: prompt.to_owned(),
            text: String::new(),
            ids: Vec::new(),
            started,
            first: None,
            last: None,
            end: None,
        }
    }

    fn show(&mut self, text: &str) {
        if self.stream {
            output::show(format_args!("{text}"));
        }
        self.text.push_str(text);
    }

    /// Shows an event. True if it was the last.
    pub(super) fn take(&mut self, event: JobEvent) -> Result<bool> {
        match event.body {
            JobEventBody::Token { id, text, .. } => {
                let now = Instant::now();
                self.first.get_or_insert(now);
                self.last = Some(now);
                self.ids.push(id);
                self.show(&text.unwrap_or_default());
                Ok(false)
            }
            JobEventBody::Done { reason, .. } => {
                self.end = Some(format!("{reason:?}"));
                Ok(true)
            }
            JobEventBody::Failed { reason } => bail!("{reason}"),
            JobEventBody::Text(text) => {
                self.show(&text);
                Ok(false)
            }
            JobEventBody::Logits { .. }
            | JobEventBody::Routes { .. }
            | JobEventBody::Progress { .. } => Ok(false),
        }
    }

    /// Ends: shows the speed, or everything as one line of JSON.
    pub(super) fn finish(mut self) -> Result<()> {
        if !self.stream {
            say!("{}", self.line(0)?);
            return Ok(());
        }
        let (wait, rate) = self.speed();
        self.end_line();
        if self.end.is_none() {
            bail!(BROKEN_OFF);
        }
        remark!(
            "[{} tokens, {rate:.0} per second, the first after {:.0} ms]",
            self.ids.len(),
            wait * 1e3
        );
        Ok(())
    }

    /// Everything as one line of JSON, under a job's number.
    pub(super) fn line(&self, job: usize) -> Result<serde_json::Value> {
        let Some(end) = &self.end else {
            bail!(BROKEN_OFF);
        };
        let (wait, rate) = self.speed();
        Ok(json!({
            "job": job,
            "prompt": self.prompt,
            "text": self.text,
            "ids": self.ids,
            "end": end,
            "first_token_seconds": wait,
            "tokens_per_second": rate,
        }))
    }

    fn end_line(&mut self) {
        if std::mem::take(&mut self.stream) {
            say!();
        }
    }

    /// Seconds until the first token, and tokens per second after it; of an answer so short that
    /// its tokens arrive in a burst, tokens per second of the whole.
    fn speed(&self) -> (f64, f64) {
        const BURST: Duration = Duration::from_millis(20);
        let first = self.first.unwrap_or(self.started);
        let last = self.last.unwrap_or(first);
        let (tokens, time) = match last - first {
            rest if rest < BURST => (self.ids.len(), last - self.started),
            rest => (self.ids.len() - 1, rest),
        };
        let wait = first.duration_since(self.started).as_secs_f64();
        (wait, tokens as f64 / time.as_secs_f64().max(1e-9))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.end_line();
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
            JobEventBody::Failed { reason } => bail!("{reason}"),
            other => each(other)?,
        }
    }
    bail!(BROKEN_OFF)
}
