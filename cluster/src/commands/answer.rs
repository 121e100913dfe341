//! An answer on its way to standard output, as text or as one line of JSON.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lite_llm_runtime::stop::StopTexts;
use lite_llm_transport::messages::{JobEvent, JobEventBody};
use serde_json::json;

use crate::{cli::SamplingArgs, output};

/// What is said of an answer without an end.
pub(super) const BROKEN_OFF: &str =
    "the answer broke off: the coordinator ended the job without a word";

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
    stop: StopTexts,
}

impl Answer {
    /// Begins: shows the prompt, unless the answer is to be one line of JSON. An answer that goes
    /// on where the prompt ends follows it at once, one to a question after a line.
    pub(super) fn begin(
        prompt: &str,
        sampling: &SamplingArgs,
        json: bool,
        started: Instant,
    ) -> Self {
        if !json {
            let between = if sampling.chat.chat { "\n\n" } else { "" };
            output::show(format_args!("\n{prompt}{between}"));
        }
        let mut answer = Self::silent(prompt, sampling.stop_texts(), started);
        answer.stream = !json;
        answer
    }

    /// Begins without showing anything.
    pub(super) fn silent(prompt: &str, stop: StopTexts, started: Instant) -> Self {
        Self {
            stop,
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

    /// The tokens so far.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn show(&mut self, text: &str) {
        if self.stream {
            output::show(format_args!("{text}"));
        }
        self.text.push_str(text);
    }

    /// Shows what a piece settles. True if it completed a stop text, which ends the answer.
    fn piece(&mut self, piece: &str) -> bool {
        let text = self.stop.push(piece);
        self.show(&text);
        if self.stop.stopped() {
            self.end = Some("Stop".into());
        }
        self.stop.stopped()
    }

    /// Shows an event. True if nothing is to follow it: it was the last, or a stop text came, and
    /// whoever reads the events drops them, which cancels the job.
    pub(super) fn take(&mut self, event: JobEvent) -> Result<bool> {
        match event.body {
            JobEventBody::Token { id, text, .. } => {
                let now = Instant::now();
                self.first.get_or_insert(now);
                self.last = Some(now);
                self.ids.push(id);
                Ok(self.piece(&text.unwrap_or_default()))
            }
            JobEventBody::Done { reason, .. } => {
                let rest = self.stop.finish();
                self.show(&rest);
                self.end = Some(format!("{reason:?}"));
                Ok(true)
            }
            JobEventBody::Failed { reason } | JobEventBody::NotTaken { reason } => {
                bail!("{reason}")
            }
            JobEventBody::Text(text) => Ok(self.piece(&text)),
            JobEventBody::Logits { .. }
            | JobEventBody::Routes { .. }
            | JobEventBody::Progress { .. } => Ok(false),
            // Nobody asks here how likely tokens are.
            JobEventBody::Scored(_) => Ok(false),
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
