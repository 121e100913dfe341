//! Which sequences exist, and which of their tokens the next pass takes: continuous batching.
//!
//! A pure machine: no arithmetic, no device, no clock. [`crate::engine`] carries out what it plans.
//!
//! ```text
//! submit ─▶ waiting ──admit──▶ running ──plan──▶ in a pass ──turn──▶ running ─▶ … ─▶ release
//!              ▲                  │
//!              └──── preempt ─────┘  (its pages go; prompt and answer are computed again)
//! ```
//!
//! - A pass takes one token of every sequence that decodes, and fills up with prompts, in chunks, to
//!   [`PASS_TOKENS_MAX`].
//! - Decodes share one pass: those that are out of phase would read the dense weights twice. So they
//!   wait for the end of a pass that decodes, unless that one waits for something slow (`apart`).
//! - Pages are taken as they are needed. Who needs one that is not there takes those of who comes last:
//!   of the lowest priority, the youngest.
//! - A sequence for which a tier drafts has passes for that draft between its own, in pages that nobody
//!   else wants.
//! - All goes by priority; within one, decodes go before prompts, and prompts to the tenant that was
//!   given the fewest tokens, then by age.
//!
//! Invariants: a sequence is in at most one pass, and keeps its pages while it is; who has precedence
//! over all others gets what it needs as soon as passes in flight have ended, so every sequence ends;
//! equal calls give equal plans.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use lite_llm_kernels::kv::PAGE_TOKENS;
use tracing::{Span, debug_span};

use crate::{
    config::ModelConfig,
    draft::Drafter,
    forward::{Chunk, WantedLogits},
    kv::{PagePool, PageTable},
    sequence::{Guess, Request, RequestError, Sequence},
};

/// Tokens of one pass at most, where nobody says otherwise ([`crate::engine::Engine::pass_tokens`]).
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

/// What was scheduled so far, and what there is now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScheduleStats {
    /// Sequences that wait for pages.
    pub waiting: usize,
    /// Sequences that run.
    pub running: usize,
    /// Pages of the cache.
    pub pages: usize,
    /// Pages that sequences have.
    pub pages_used: usize,
    /// Pages that nobody has, kept for their prefix.
    pub pages_idle: usize,
    /// Positions that were computed.
    pub computed: u64,
    /// Positions that were found in the cache.
    pub found: u64,
    /// Times that a sequence lost its pages to another.
    pub preemptions: u64,
    /// Tokens that were guessed.
    pub guessed: u64,
    /// Of those, the ones that were right.
    pub guessed_right: u64,
}

/// See the module's text.
pub(crate) struct Schedule {
    pool: PagePool,
    /// Tokens of one pass at most.
    pub(crate) pass_tokens: usize,
    sequences: BTreeMap<u64, Sequence>,
    waiting: Vec<u64>,
    running: Vec<u64>,
    tenants: HashMap<String, Tenant>,
    arrivals: u64,
    computed: u64,
    found: u64,
    preemptions: u64,
    guessed: u64,
    guessed_right: u64,
    /// How long drafts of each tier were paused when they last did not pay; 0 if they did.
    pauses: Vec<u32>,
    /// What time it is, if anybody says so.
    now: Option<Instant>,
}

/// Whoever is to have an equal share.
#[derive(Debug, Default)]
struct Tenant {
    sequences: usize,
    /// Tokens that it was given, and what others had when it came.
    given: u64,
}

impl Schedule {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            pool: PagePool::new(pages),
            pass_tokens: PASS_TOKENS_MAX,
            sequences: BTreeMap::new(),
            waiting: Vec::new(),
            running: Vec::new(),
            tenants: HashMap::new(),
            arrivals: 0,
            computed: 0,
            found: 0,
            preemptions: 0,
            guessed: 0,
            guessed_right: 0,
            pauses: Vec::new(),
            now: None,
        }
    }

    /// Says what time it is.
    pub(crate) fn at(&mut self, now: Instant) {
        self.now = Some(now);
    }

    /// Sequences that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.sequences.len()
    }

    pub(crate) fn stats(&self) -> ScheduleStats {
        ScheduleStats {
            waiting: self.waiting.len(),
            running: self.running.len(),
            pages: self.pool.capacity(),
            pages_used: self.pool.capacity() - self.pool.free(),
            pages_idle: self.pool.idle(),
            computed: self.computed,
            found: self.found,
            preemptions: self.preemptions,
            guessed: self.guessed,
            guessed_right: self.guessed_right,
        }
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
        let mut sequence = Sequence::new(request, self.arrivals, config)?;
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
        self.arrivals += 1;
        // Who comes is owed nothing for the time before.
        let least = self.tenants.values().map(|tenant| tenant.given).min().unwrap_or(0);
        let new = || Tenant { sequences: 0, given: least };
        self.tenants.entry(sequence.request.tenant.clone()).or_insert_with(new).sequences += 1;
        if let Some(draft) = &sequence.draft {
            // What others have learned of this tier is not learned again by each.
            sequence.drafter = Drafter::paused(self.pauses.get(draft.tier).copied().unwrap_or(0));
        }
        self.sequences.insert(id, sequence);
        self.waiting.push(id);
        Ok(())
    }

    /// Who goes before others when prompts are computed: the least first.
    fn turn_of(&self, id: u64) -> (Reverse<i8>, u64, u64) {
        let sequence = &self.sequences[&id];
        let given = self.tenants.get(&sequence.request.tenant).map_or(0, |tenant| tenant.given);
        (Reverse(sequence.request.priority), given, sequence.arrived)
    }

    /// Who keeps its pages when others need them: the greatest first.
    fn precedence(&self, id: u64) -> (bool, i8, Reverse<u64>) {
        let sequence = &self.sequences[&id];
        (!sequence.held, sequence.request.priority, Reverse(sequence.arrived))
    }

    /// Moves waiting sequences to the running ones, while what they have to compute has room beside
    /// what those that run are about to take.
    fn admit(&mut self) {
        while let Some(at) =
            (0..self.waiting.len()).min_by_key(|&at| self.turn_of(self.waiting[at]))
        {
            let id = self.waiting[at];
            let sequence = &self.sequences[&id];
            let mut needed = sequence.pages_soon();
            if sequence.shares() {
                needed -= PageTable::shared(&self.pool, sequence.root, &sequence.tokens);
            }
            let spare = self.running.iter().map(|other| self.sequences[other].spare_pages());
            let free = self.pool.free() + spare.sum::<usize>();
            if !self.running.is_empty() && needed + self.claimed(id) > free + self.pages_after(id) {
                return;
            }
            self.waiting.swap_remove(at);
            self.running.push(id);
        }
    }

    /// Running sequences from which another may take pages when it needs them.
    fn after(&self, id: u64) -> impl Iterator<Item = &Sequence> {
        let mine = self.sequences[&id].request.priority;
        let running = self.running.iter().map(|other| &self.sequences[other]);
        running.filter(move |other| other.held || other.request.priority < mine)
    }

    /// Pages that a sequence can take from others now.
    fn pages_after(&self, id: u64) -> usize {
        let others = self.after(id).filter(|other| !other.in_pass);
        others.map(|other| other.table.pages().len()).sum()
    }

    /// Pages that the running sequences which go before another are about to take.
    fn claimed(&self, id: u64) -> usize {
        let claims = |sequence: &Sequence| {
            sequence.pages_soon().saturating_sub(sequence.table.pages().len()).max(1)
        };
        let all: usize = self.running.iter().map(|other| claims(&self.sequences[other])).sum();
        all - self.after(id).map(claims).sum::<usize>()
    }

    /// The running sequences that may be in the next pass, by priority: decodes first, in turns.
    fn order(&self, apart: bool) -> Vec<u64> {
        let decoding = self.running.iter().map(|id| &self.sequences[id]);
        let decoding = !apart && decoding.into_iter().any(|s| s.in_pass && s.decodes());
        let (mut decodes, mut prompts) = (Vec::new(), Vec::new());
        for &id in self.running.iter().filter(|id| self.sequences[id].is_free()) {
            match self.sequences[&id].decodes() {
                true if decoding => {}
                true => decodes.push(id),
                false => prompts.push(id),
            }
        }
        prompts.sort_by_key(|&id| self.turn_of(id));
        let mut order = [decodes, prompts].concat();
        // Stable: within a priority decodes lead, those first that waited longest.
        order.sort_by_key(|id| Reverse(self.sequences[id].request.priority));
        order
    }

    /// The next pass over the running sequences that are in none, if there are any. Its sequences
    /// are in a pass until [`Schedule::turn`] or [`Schedule::release`]. `apart` allows decodes beside
    /// a pass that decodes.
    pub(crate) fn plan(&mut self, apart: bool, config: &ModelConfig) -> Option<Plan> {
        self.admit();
        let (mut chunks, mut sequences, mut room) = (Vec::new(), Vec::new(), self.pass_tokens);
        let mut record = false;
        for id in self.order(apart) {
            if room == 0 {
                break;
            }
            // It may have lost its pages to one before it.
            if !self.running.contains(&id) {
                continue;
            }
            self.adopt(id);
            let sequence = &self.sequences[&id];
            let limit = match sequence.request.prefill_chunk {
                0 => self.pass_tokens,
                chunk => chunk,
            };
            let left = sequence.tokens.len() - sequence.cached;
            // Guesses leave half of a pass to others.
            let for_guesses = room.saturating_sub(self.pass_tokens / 2);
            let mut guessed = match sequence.guess(limit.min(for_guesses), config) {
                Guess::Verify(guessed) => guessed,
                Guess::Draft => match self.draft(id, limit.min(room)) {
                    Some(chunk) => {
                        room -= chunk.tokens.len();
                        chunks.push(chunk);
                        sequences.push(id);
                        continue;
                    }
                    // No page is free, so what is drafted is all.
                    None => self.sequences[&id].drafted(for_guesses),
                },
            };
            let mut count = self.grow(id, left.min(limit).min(room));
            if count == 0 {
                continue;
            }
            // Guesses take pages from nobody.
            let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
            let end = sequence.cached + count;
            guessed.truncate(sequence.chooser.possible(&guessed));
            if sequence.table.reserve(&mut self.pool, end + guessed.len()).is_err() {
                guessed.clear();
            }
            let every = sequence.request.logits && end > sequence.reported || !guessed.is_empty();
            let logits = match (every, count == left) {
                (true, _) => WantedLogits::All,
                (false, true) if sequence.request.max_new_tokens > 0 => WantedLogits::Last,
                _ => WantedLogits::None,
            };
            count += guessed.len();
            let own = &sequence.tokens[sequence.cached..end];
            let tokens = [own, &guessed[..]].concat();
            sequence.guessed = guessed;
            chunks.push(Chunk {
                tokens,
                start: sequence.cached,
                pages: sequence.table.pages().to_vec(),
                tiers: sequence.tiers.clone(),
                logits,
            });
            record |= sequence.request.routes;
            sequence.in_pass = true;
            self.give(id, count);
            sequences.push(id);
            room -= count;
        }
        if chunks.is_empty() {
            return None;
        }
        let rows = self.pass_tokens - room;
        // A pass belongs to its oldest request's trace; the others are linked to it.
        let mut spans = sequences.iter().map(|id| &self.sequences[id].request.span);
        let first = spans.next().cloned().unwrap_or_else(Span::none);
        let span = debug_span!(parent: &first, "pass", rows, sequences = sequences.len());
        spans.for_each(|other| {
            span.follows_from(other);
        });
        Some(Plan { chunks, sequences, record, span })
    }

    /// The next chunk of what a tier drafts for a sequence, if there are pages for it that nobody has.
    fn draft(&mut self, id: u64, most: usize) -> Option<Chunk> {
        let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
        let draft = sequence.draft.as_mut()?;
        let (tokens, start, ends) = draft.next(&mut self.pool, &sequence.tokens, most)?;
        (sequence.in_pass, draft.in_pass) = (true, true);
        let (pages, tiers) = (draft.table.pages().to_vec(), draft.tiers.clone());
        let logits = if ends { WantedLogits::Last } else { WantedLogits::None };
        self.give(id, tokens.len());
        Some(Chunk { tokens, start, pages, tiers, logits })
    }

    /// Counts what a sequence was given as its tenant's.
    fn give(&mut self, id: u64, tokens: usize) {
        let tenant = &self.sequences[&id].request.tenant;
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.given += tokens as u64;
        }
    }

    /// Takes what is in the cache of a sequence that is to begin.
    fn adopt(&mut self, id: u64) {
        let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
        if sequence.table.pages().is_empty() && sequence.shares() {
            let found = sequence.table.adopt(&mut self.pool, sequence.root, &sequence.tokens);
            sequence.cached = found;
            self.found += found as u64;
        }
    }

    /// Gives a sequence pages for so many positions more, or for as many as there is room for.
    fn grow(&mut self, id: u64, count: usize) -> usize {
        loop {
            let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
            let end = sequence.cached + count;
            if sequence.table.reserve(&mut self.pool, end).is_ok() {
                return count;
            }
            if self.take_from_drafts() {
                continue;
            }
            let Some(victim) = self.victim(id) else { break };
            self.preempt(victim);
        }
        let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
        let pages = sequence.table.pages().len() + self.pool.free();
        let end = (pages * PAGE_TOKENS).min(sequence.cached + count);
        // There is room for so many, as was just counted.
        let fits = sequence.table.reserve(&mut self.pool, end).is_ok();
        if fits { end.saturating_sub(sequence.cached) } else { 0 }
    }

    /// Takes the pages of a draft, the last one's first. Says whether there were any.
    fn take_from_drafts(&mut self) -> bool {
        let with = self.running.iter().copied().filter(|id| self.sequences[id].spare_pages() > 0);
        let Some(last) = with.min_by_key(|&id| self.precedence(id)) else { return false };
        let draft = self.sequences.get_mut(&last).and_then(|sequence| sequence.draft.as_mut());
        draft.into_iter().for_each(|draft| draft.release(&mut self.pool));
        true
    }

    /// Who loses its pages to a sequence: the last of those after it that are in no pass.
    fn victim(&self, id: u64) -> Option<u64> {
        let mine = self.precedence(id);
        let others = self.running.iter().copied().filter(|&other| {
            let sequence = &self.sequences[&other];
            !sequence.in_pass && !sequence.table.pages().is_empty() && self.precedence(other) < mine
        });
        others.min_by_key(|&other| self.precedence(other))
    }

    fn preempt(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.table.release(&mut self.pool);
        sequence.draft.iter_mut().for_each(|draft| draft.release(&mut self.pool));
        sequence.cached = 0;
        self.preemptions += 1;
        self.running.retain(|&other| other != id);
        self.waiting.push(id);
    }

    /// So many rows of a sequence were computed: its own tokens are in the cache now.
    pub(crate) fn computed(&mut self, id: u64, rows: usize) {
        self.computed += rows as u64;
        if let Some(sequence) = self.sequences.get(&id) {
            let own = rows - sequence.guessed.len();
            self.cache(id, own);
        }
    }

    /// Whether the pass that a sequence was in computed for its draft. Asked once.
    pub(crate) fn was_draft(&mut self, id: u64) -> bool {
        let draft = self.sequences.get_mut(&id).and_then(|sequence| sequence.draft.as_mut());
        draft.is_some_and(|draft| std::mem::take(&mut draft.in_pass))
    }

    /// So many rows of a sequence's draft were computed, the last one with these logits, if it was the
    /// last of all.
    pub(crate) fn drafted(&mut self, id: u64, rows: usize, logits: &[f32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let Some(draft) = &mut sequence.draft else { return };
        if logits.is_empty() {
            return draft.computed(rows, None);
        }
        let position = (sequence.tokens.len() + draft.ahead.len()) as u64;
        match sequence.chooser.guess(logits, position) {
            Some(next) => draft.computed(rows, Some(next)),
            None => draft.fail(&mut self.pool),
        }
    }

    /// A sequence's draft could not be computed: it goes on without.
    pub(crate) fn draft_failed(&mut self, id: u64) {
        let draft = self.sequences.get_mut(&id).and_then(|sequence| sequence.draft.as_mut());
        draft.into_iter().for_each(|draft| draft.fail(&mut self.pool));
    }

    /// So many of the tokens that were guessed have become a sequence's own. What was computed for the
    /// others is forgotten.
    pub(crate) fn verified(&mut self, id: u64, right: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let guessed = std::mem::take(&mut sequence.guessed).len();
        let Sequence { draft, tokens, drafter, verified, .. } = sequence;
        let before = std::mem::replace(verified, tokens.len());
        match draft {
            None => drafter.verified(guessed, right, None),
            Some(draft) => {
                // Those that were drafted in vain have taken time, too.
                let drafted = draft.settle(&mut self.pool, tokens, before);
                let cost = draft.came(self.now, tokens.len().saturating_sub(before), drafted);
                drafter.verified(drafted, right, cost);
                if drafted > 0 {
                    self.pauses.resize(self.pauses.len().max(draft.tier + 1), 0);
                    let pause = &mut self.pauses[draft.tier];
                    match drafter.is_paused() {
                        true => *pause = drafter.last_pause(),
                        false if Drafter::pays_well(cost) => *pause = 0,
                        false => {}
                    }
                }
            }
        }
        self.guessed += guessed as u64;
        self.guessed_right += right as u64;
        if right > 0 {
            self.cache(id, right);
        }
    }

    /// So many positions more are in the cache, for whoever has the same tokens.
    fn cache(&mut self, id: u64, positions: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let Sequence { table, root, tokens, cached, .. } = sequence;
        *cached += positions;
        table.show(&mut self.pool, *root, tokens, *cached);
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
        sequence.draft.iter_mut().for_each(|draft| draft.release(&mut self.pool));
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        if let Some(tenant) = self.tenants.get_mut(&sequence.request.tenant) {
            tenant.sequences -= 1;
            if tenant.sequences == 0 {
                self.tenants.remove(&sequence.request.tenant);
            }
        }
        Some(sequence)
    }
}

#[cfg(test)]
mod tests;
