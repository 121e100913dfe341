//! The coordinator's part in detached jobs: what comes in is made token ids and checked against the
//! model, then the ledger has it.
//!
//! Invariant: a batch that is accepted can run: whatever the model cannot serve is refused before,
//! with the number of the job.

use std::sync::Arc;

use lite_llm_kernels::{DETERMINISM_VERSION, math::Math};
use lite_llm_transport::{
    identity::OPERATOR,
    messages::{DetachedBatch, DetachedReply, DetachedRequest, JobRange, LogitsWanted, Prompt},
};

use super::handle::{CoordinatorHandle, CoordinatorOptions, EncodeError, ServeError};
use crate::{
    ledger::{Jobs, LedgerError, LedgerOptions, RunsOn},
    node::{grammars::FormError, jobs},
};

/// What is said where no ledger is kept.
const NO_LEDGER: &str = "this process keeps no ledger, so it takes no detached jobs: only a \
                         coordinator with a state folder does";

/// A hash of what fixes a job's bits beside the job itself.
pub(super) fn model_hash(options: &CoordinatorOptions, context: usize) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"lite-llm ledger 1");
    hasher.update(&u64::from(DETERMINISM_VERSION).to_le_bytes());
    hasher.update(&options.checkpoint.id());
    hasher.update(&(context as u64).to_le_bytes());
    hasher.update(options.kv_dtype.name().as_bytes());
    if options.math == Math::Fast {
        hasher.update(b" fast");
    }
    hasher.finalize().into()
}

impl CoordinatorHandle {
    /// Opens the ledger and goes on with its jobs.
    pub(super) async fn open_ledger(
        &mut self,
        options: LedgerOptions,
        model: [u8; 32],
    ) -> Result<(), ServeError> {
        let tokenizer = self.prompts.as_ref().map(|prompts| Arc::new(prompts.tokenizer().clone()));
        let runs_on = RunsOn { coordinator: self.actor.clone(), tokenizer };
        let context = self.config.context as u64;
        let jobs = Jobs::open(options, model, context, runs_on).await;
        self.jobs = Some(jobs.map_err(|error| ServeError(error.to_string()))?);
        Ok(())
    }

    /// The ledger, if this coordinator keeps one.
    pub fn jobs(&self) -> Option<&Jobs> {
        self.jobs.as_ref()
    }

    /// Takes jobs into the ledger, together or not at all. Returns their numbers, which follow each
    /// other, when they are on disk: they will be finished, whatever happens to this process. A batch
    /// whose key this owner has used is not taken again; its numbers are returned.
    ///
    /// # Errors
    /// Refused: sizes are out of bounds; the model cannot serve one of the jobs, which is named; the
    /// ledger is full. Unknown or stopping: the batch may have been taken; ask again with the same
    /// key.
    pub async fn detach(&self, owner: &str, batch: DetachedBatch) -> Result<JobRange, LedgerError> {
        self.detach_for(owner, None, batch).await
    }

    /// The same for a client, if it is one.
    async fn detach_for(
        &self,
        owner: &str,
        client: Option<&str>,
        mut batch: DetachedBatch,
    ) -> Result<JobRange, LedgerError> {
        let refused = |reason: String| LedgerError::Refused(reason);
        let ledger = self.jobs().ok_or_else(|| refused(NO_LEDGER.into()))?;
        batch.check().map_err(|error| refused(error.to_string()))?;
        if let Some(jobs) = ledger.known(owner, batch.key).await? {
            return Ok(jobs);
        }
        let count = batch.jobs.len();
        for (index, job) in batch.jobs.iter_mut().enumerate() {
            let named = |reason: String| match count {
                1 => refused(reason),
                _ => refused(format!("job {} of {count}: {reason}", index + 1)),
            };
            if let Some(client) = client {
                self.check_priority(client, job.serving.priority).map_err(named)?;
            }
            let request = &mut job.request;
            if request.want_logits != LogitsWanted::None || request.want_routes {
                return Err(named("logits and routes are not kept; submit it attached".into()));
            }
            if job.choosing.logprobs.is_some() {
                return Err(named("log-probabilities are not kept; submit it attached".into()));
            }
            let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
            let ids = self.encode(prompt).await.map_err(|error| match error {
                // Later it has its tokens.
                EncodeError::Busy(reason) => LedgerError::Unknown(reason),
                EncodeError::Prompt(reason) => named(reason),
            })?;
            request.prompt = Prompt::Tokens(ids);
            jobs::check_order(request, &job.choosing, &[], &self.config).map_err(named)?;
            let most = self.positions_max();
            if let Prompt::Tokens(ids) = &request.prompt {
                let may = ids.len().saturating_add(request.max_new_tokens as usize);
                let needed = may.min(self.config.context);
                if needed > most {
                    return Err(named(format!(
                        "it may come to {needed} tokens, and the largest cache of a worker holds \
                         {most}: ask for fewer tokens, or give a worker a larger --kv"
                    )));
                }
            }
            if let Some(grammar) = &job.choosing.grammar {
                self.check_grammar(grammar).await.map_err(|error| match error {
                    FormError::Busy(reason) => LedgerError::Unknown(reason),
                    FormError::Form(reason) => named(reason),
                })?;
            }
        }
        ledger.accept(owner, batch).await
    }

    /// Answers a client. The operator sees everybody's jobs.
    pub(super) async fn answer_detached(
        &self,
        client: &str,
        request: DetachedRequest,
    ) -> Result<DetachedReply, LedgerError> {
        let ledger = self.jobs().ok_or_else(|| LedgerError::Refused(NO_LEDGER.into()))?;
        let owner = (client != OPERATOR).then_some(client);
        match request {
            DetachedRequest::Submit(batch) => {
                let taken = self.detach_for(client, Some(client), batch).await;
                taken.map(DetachedReply::Accepted)
            }
            DetachedRequest::List(query) => {
                ledger.list(owner, query).await.map(DetachedReply::List)
            }
            DetachedRequest::Report(jobs) => {
                ledger.report(owner, jobs).await.map(DetachedReply::Report)
            }
            DetachedRequest::Cancel(jobs) => {
                ledger.cancel(owner, jobs).await.map(DetachedReply::Cancelled)
            }
        }
    }
}
