//! The place of a request that was let in: what it takes, and what is measured of it.
//!
//! Invariant: what it takes is given back when it is dropped, however it ends.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use lite_llm_actors::trace;
use serde_json::{Value, json};
use tracing::Span;

use super::{Api, Caller, admission::Load, choice::Finish, error::ApiError};

/// How far a job of the request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waits,
    /// Its last token came then.
    Runs(Instant),
    Over,
}

/// What others see of a request: nothing that it says.
pub(super) struct Visible {
    number: u64,
    key: Option<String>,
    jobs: usize,
    /// Tokens of its prompts, when they are known.
    prompt: AtomicU64,
    arrived: Instant,
    tokens: AtomicU64,
}

impl Visible {
    /// For the page, as whoever asks with a key may see it: whose it is, only if it is its own.
    pub(super) fn json(&self, asker: Option<&str>) -> Value {
        json!({
            "number": self.number,
            "key": self.key.as_deref().filter(|name| Some(*name) == asker),
            "jobs": self.jobs,
            "prompt": self.prompt.load(Relaxed),
            "tokens": self.tokens.load(Relaxed),
            "seconds": self.arrived.elapsed().as_secs_f64(),
        })
    }
}

/// All requests that were let in and have not left.
#[derive(Default)]
pub(super) struct Requests {
    begun: u64,
    open: BTreeMap<u64, Arc<Visible>>,
}

impl Requests {
    /// Those that came last first.
    pub(super) fn newest(&self) -> impl Iterator<Item = &Arc<Visible>> {
        self.open.values().rev()
    }

    fn begin(&mut self, caller: &Caller, load: Load, arrived: Instant) -> Arc<Visible> {
        self.begun += 1;
        let visible = Arc::new(Visible {
            number: self.begun,
            key: caller.key.as_ref().map(|(name, _)| name.clone()),
            jobs: load.jobs,
            prompt: AtomicU64::new(0),
            arrived,
            tokens: AtomicU64::new(0),
        });
        self.open.insert(self.begun, visible.clone());
        visible
    }
}

/// See the module's text.
pub(super) struct Place {
    api: Arc<Api>,
    visible: Arc<Visible>,
    caller: Caller,
    load: Load,
    arrived: Instant,
    stages: Vec<Stage>,
    generated: u64,
    /// The request's span, and the tokens of its prompts, if it says in traces what it used.
    described: Option<(Span, u64)>,
    finishes: Vec<&'static str>,
    /// Its prompts were tokenised, and are paid for.
    settled: bool,
}

impl Api {
    /// Lets a request in, or says when it may come again.
    pub(super) fn enter(
        self: &Arc<Self>,
        caller: &Caller,
        arrived: Instant,
        load: Load,
    ) -> Result<Place, ApiError> {
        let key = caller.key.as_ref().map(|(name, limits)| (name.as_str(), *limits));
        let entered = self.admission.lock().enter(Instant::now(), key, load);
        entered.map_err(|refusal| ApiError::busy(refusal.reason, refusal.retry_after))?;
        self.metrics.waiting.add(load.jobs as i64);
        let stages = vec![Stage::Waits; load.jobs];
        let visible = self.requests.lock().begin(caller, load, arrived);
        Ok(Place {
            api: self.clone(),
            visible,
            caller: caller.clone(),
            load,
            arrived,
            stages,
            generated: 0,
            described: None,
            finishes: Vec::new(),
            settled: false,
        })
    }
}

impl Place {
    /// The tokens of its prompts are known.
    pub(super) fn settle(&mut self, load: Load) -> Result<(), ApiError> {
        let key = self.caller.key.as_ref().map(|(name, _)| name.as_str());
        let settled = self.api.admission.lock().settle(key, self.load, load);
        settled.map_err(|refusal| ApiError::busy(refusal.reason, refusal.retry_after))?;
        (self.load, self.settled) = (load, true);
        self.api.metrics.prompt_tokens.inc_by(load.prompt);
        self.visible.prompt.store(load.prompt, Relaxed);
        Ok(())
    }

    /// What it used will stand in the span that this is called in; `input` are the tokens of its prompts.
    pub(super) fn describe(&mut self, input: u64) {
        self.described = Some((Span::current(), input));
    }

    /// Tokens of one of its jobs came: one, or none where only text did.
    pub(super) fn tokens(&mut self, job: u32, tokens: u32) {
        if tokens == 0 {
            return;
        }
        self.generated += u64::from(tokens);
        self.visible.tokens.store(self.generated, Relaxed);
        let (now, metrics) = (Instant::now(), &self.api.metrics);
        metrics.generation_tokens.inc_by(tokens.into());
        self.api.readiness.token(now);
        let Some(stage) = self.stages.get_mut(job as usize) else { return };
        match *stage {
            Stage::Waits => {
                metrics.waiting.dec();
                metrics.running.inc();
                metrics.first_token(now - self.arrived);
            }
            Stage::Runs(last) => metrics.next_token(now - last),
            Stage::Over => return,
        }
        *stage = Stage::Runs(now);
    }

    /// One of its jobs ended well.
    pub(super) fn ended(&mut self, job: u32, finish: Finish) {
        self.api.metrics.ended(finish, self.arrived.elapsed());
        self.finishes.push(finish.as_str());
        self.over(job as usize);
    }

    /// All tokens that came.
    pub(super) fn generated(&self) -> u64 {
        self.generated
    }

    fn over(&mut self, job: usize) {
        let Some(stage) = self.stages.get_mut(job) else { return };
        match std::mem::replace(stage, Stage::Over) {
            Stage::Waits => self.api.metrics.waiting.dec(),
            Stage::Runs(_) => self.api.metrics.running.dec(),
            Stage::Over => {}
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        (0..self.stages.len()).for_each(|job| self.over(job));
        if let Some((span, input)) = &self.described {
            trace::describe_end(span, *input, self.generated, &self.finishes);
        }
        let key = self.caller.key.as_ref().map(|(name, _)| name.as_str());
        self.api.requests.lock().open.remove(&self.visible.number);
        let mut admission = self.api.admission.lock();
        if !self.settled {
            let nothing = Load { prompt: 0, answer: 0, ..self.load };
            // Less always has room.
            if admission.settle(key, self.load, nothing).is_ok() {
                self.load = nothing;
            }
        }
        admission.leave(Instant::now(), key, self.load, self.generated);
    }
}
