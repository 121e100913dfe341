//! Which sequences exist, and which of their tokens the next pass takes.
//!
//! A pure machine: no arithmetic, no device, no clock. [`crate::engine`] carries out what it plans.
//!
//! Invariants: a sequence is in at most one pass; its pages are reserved for its whole life when it
//! begins to run, so a running sequence never waits for memory; sequences that decode go before
//! prompts, and among equals those that waited longest lead.

use std::collections::{BTreeMap, VecDeque};

use lite_llm_kernels::kv::PAGE_TOKENS;
use tracing::{Span, debug_span};

use crate::{
    config::ModelConfig,
    forward::{Chunk, WantedLogits},
    kv::PagePool,
    sequence::{Request, RequestError, Sequence},
};

/// Tokens of one pass at most.
pub const PASS_TOKENS_MAX: usize = 512;
/// Requests that may wait for pages.
pub const WAITING_MAX: usize = 1024;

/// What the next pass computes.
pub(crate) struct Plan {
    /// One chunk per sequence.
    pub(crate) chunks: Vec<Chunk>,
    /// Whose they are.
    pub(crate) sequences: Vec<u64>,
    /// Whether some sequence wants its routes.
    pub(crate) record: bool,
    /// The pass's span.
    pub(crate) span: Span,
}

/// See the module's text.
pub(crate) struct Schedule {
    pool: PagePool,
    sequences: BTreeMap<u64, Sequence>,
    waiting: VecDeque<u64>,
    running: Vec<u64>,
}

impl Schedule {
    pub(crate) fn new(pages: usize) -> Self {
        let (sequences, waiting, running) = (BTreeMap::new(), VecDeque::new(), Vec::new());
        Self { pool: PagePool::new(pages), sequences, waiting, running }
    }

    /// Sequences that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.sequences.len()
    }

    /// A sequence that has not ended.
    pub(crate) fn get(&self, id: u64) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id)
    }

    /// Takes a request under a number of the caller's.
    pub(crate) fn submit(
        &mut self,
        id: u64,
        request: Request,
        config: &ModelConfig,
    ) -> Result<(), RequestError> {
        let sequence = Sequence::new(request, config)?;
        let tokens = sequence.tokens_max(config);
        let (needed, pages) = (tokens.div_ceil(PAGE_TOKENS), self.pool.capacity());
        if needed > pages {
            return Err(RequestError::CacheTooSmall { needed, tokens, pages });
        }
        if self.sequences.contains_key(&id) {
            return Err(RequestError::Duplicate(id));
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(RequestError::QueueFull { waiting: self.waiting.len() });
        }
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
        Ok(())
    }

    /// Moves waiting sequences to the running ones while there are pages for their whole life.
    fn admit(&mut self, config: &ModelConfig) {
        while let Some(&id) = self.waiting.front() {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                self.waiting.pop_front();
                continue;
            };
            let tokens = sequence.tokens_max(config);
            if sequence.table.reserve(&mut self.pool, tokens).is_err() {
                return;
            }
            self.waiting.pop_front();
            self.running.push(id);
        }
    }

    /// The next pass over the running sequences that are in none, if there are any. Its sequences
    /// are in a pass until [`Schedule::turn`] or [`Schedule::release`].
    pub(crate) fn plan(&mut self, config: &ModelConfig) -> Option<Plan> {
        self.admit(config);
        let mut free: Vec<u64> =
            self.running.iter().copied().filter(|id| self.sequences[id].is_free()).collect();
        // Decoding sequences (one token to go) first; the sort is stable, so those that waited
        // longest lead.
        free.sort_by_key(|id| {
            let sequence = &self.sequences[id];
            sequence.tokens.len() - sequence.cached > 1
        });
        let (mut chunks, mut sequences, mut room) = (Vec::new(), Vec::new(), PASS_TOKENS_MAX);
        let mut record = false;
        for id in free {
            if room == 0 {
                break;
            }
            let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
            let limit = match sequence.request.prefill_chunk {
                0 => PASS_TOKENS_MAX,
                chunk => chunk,
            };
            let left = sequence.tokens.len() - sequence.cached;
            let count = left.min(limit).min(room);
            let logits = match (sequence.request.logits, count == left) {
                (true, _) => WantedLogits::All,
                (false, true) if sequence.request.max_new_tokens > 0 => WantedLogits::Last,
                _ => WantedLogits::None,
            };
            chunks.push(Chunk {
                tokens: sequence.tokens[sequence.cached..][..count].to_vec(),
                start: sequence.cached,
                pages: sequence.table.pages().to_vec(),
                tiers: sequence.tiers.clone(),
                logits,
            });
            record |= sequence.request.routes;
            sequence.in_pass = true;
            sequences.push(id);
            room -= count;
        }
        if chunks.is_empty() {
            return None;
        }
        let rows = PASS_TOKENS_MAX - room;
        // A pass belongs to its oldest request's trace; the others are linked to it.
        let mut spans = sequences.iter().map(|id| &self.sequences[id].request.span);
        let first = spans.next().cloned().unwrap_or_else(Span::none);
        let span = debug_span!(parent: &first, "pass", rows, sequences = sequences.len());
        spans.for_each(|other| {
            span.follows_from(other);
        });
        Some(Plan { chunks, sequences, record, span })
    }

    /// Ends the turn of these sequences: they go behind those that had none.
    pub(crate) fn turn(&mut self, sequences: &[u64]) {
        self.running.retain(|id| !sequences.contains(id));
        self.running.extend(sequences);
        for id in sequences {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.in_pass = false;
            }
        }
    }

    /// Forgets a sequence and frees its pages.
    pub(crate) fn release(&mut self, id: u64) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        sequence.table.release(&mut self.pool);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        Some(sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_lead_prompts_turns_rotate_and_pages_come_back() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let config = crate::checkpoint::Checkpoint::open(demo).unwrap().config().clone();
        // Two sequences of 40 tokens take all pages; the third waits.
        let mut schedule = Schedule::new(2 * 40usize.div_ceil(PAGE_TOKENS));
        for id in 0..3 {
            let request = Request::greedy(vec![1; 30], 10);
            schedule.submit(id, request, &config).unwrap();
        }
        let plan = schedule.plan(&config).unwrap();
        assert_eq!(plan.sequences, [0, 1]);
        assert!(schedule.plan(&config).is_none(), "all that run are in a pass");
        let first = schedule.get_mut(1).unwrap();
        (first.cached, first.tokens) = (30, vec![1; 31]);
        schedule.turn(&plan.sequences);
        let plan = schedule.plan(&config).unwrap();
        assert_eq!(plan.sequences, [1, 0], "who decodes leads");
        assert_eq!(plan.chunks[0].tokens.len(), 1);
        assert_eq!(plan.chunks[0].start, 30);
        assert!(schedule.release(0).is_some());
        let plan = schedule.plan(&config).unwrap();
        assert_eq!(plan.sequences, [2], "freed pages are given to who waits");
        assert_eq!(schedule.len(), 2);
    }
}
