//! One job at the coordinator, through as many attempts as it takes: a pure machine.
//!
//! An attempt begins with the prompt and all tokens so far ([`JobProgress::generated`]); its events
//! count tokens and rows from the beginning of the job, whatever it was given to begin with.
//!
//! Invariants: the reader gets every token and every row once and in order, through however many
//! attempts, and one last event; a token that was given is never changed: an attempt that says
//! otherwise, or leaves something out, is not to be believed in anything.

use lite_llm_runtime::config::ModelConfig;
use lite_llm_transport::messages::{EndReason, JobEventBody, JobRequest, LogitsWanted};

use crate::words;

/// Attempts in a row that may be lost without anything new for the reader.
pub const ATTEMPTS_MAX: u32 = 16;

/// What becomes of an event.
#[derive(Debug, Clone, PartialEq)]
pub enum Take {
    /// It goes to the reader.
    Pass(JobEventBody),
    /// It goes to the reader as its last.
    Last(JobEventBody),
    /// It is nothing new.
    Drop,
    /// It cannot be true: the attempt that sent it is to be abandoned, and counts as lost.
    Violation(String),
}

/// What follows the loss of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// The next attempt, with this number, from the tokens so far.
    Again(u32),
    /// No more: this is the reader's last event.
    GiveUp(JobEventBody),
    /// The reader had its last event already.
    Ended,
}

/// What a job's events can be, by what was asked of which model.
#[derive(Debug, Clone)]
struct Bounds {
    vocab: u32,
    context: u32,
    layers: u32,
    logits: bool,
    routes: bool,
    /// How many candidates each token brings, if its tokens are scored.
    logprobs: Option<u32>,
    /// Tokens that end it.
    ends: Vec<u32>,
}

/// See the module's text.
#[derive(Debug)]
pub struct JobProgress {
    prompt: u32,
    tokens: Vec<u32>,
    tokens_max: u32,
    bounds: Option<Bounds>,
    /// Rows that the reader has.
    logits: u32,
    routes: u32,
    prefilled: u32,
    attempt: u32,
    /// Whether this attempt brought something.
    fruitful: bool,
    /// Attempts before it, in a row, that did not.
    barren: u32,
    ended: bool,
}

impl JobProgress {
    /// A job with a prompt of so many tokens, before its first attempt, which has number 0.
    pub fn new(prompt_len: usize) -> Self {
        Self {
            prompt: u32::try_from(prompt_len).unwrap_or(u32::MAX),
            tokens: Vec::new(),
            tokens_max: u32::MAX,
            bounds: None,
            logits: 0,
            routes: 0,
            prefilled: 0,
            attempt: 0,
            fruitful: false,
            barren: 0,
            ended: false,
        }
    }

    /// The same, whose reader has these tokens from an earlier connection.
    pub fn after(self, tokens: Vec<u32>) -> Self {
        Self { tokens, ..self }
    }

    /// The same, which may generate so many tokens: an attempt that generates more lies.
    pub fn with_tokens_max(self, tokens_max: u32) -> Self {
        Self { tokens_max, ..self }
    }

    /// The same, of which is known what was asked of which model: an attempt that reports something
    /// else lies.
    pub fn of(self, request: &JobRequest, config: &ModelConfig) -> Self {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let bounds = Bounds {
            vocab: number(config.vocab),
            context: number(config.context),
            layers: number(config.sparse_layers().count()),
            logits: request.want_logits == LogitsWanted::All,
            routes: request.want_routes,
            logprobs: None,
            ends: if request.stop_at_eos { config.eos_tokens.clone() } else { Vec::new() },
        };
        Self { bounds: Some(bounds), tokens_max: request.max_new_tokens, ..self }
    }

    /// The same, of which is known whether its tokens are scored, and with how many candidates.
    pub fn with_logprobs(mut self, logprobs: Option<u32>) -> Self {
        if let Some(bounds) = &mut self.bounds {
            bounds.logprobs = logprobs;
        }
        self
    }

    /// Number of the attempt that runs, or is to run.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Attempts that were lost in a row without anything new for the reader.
    pub fn barren(&self) -> u32 {
        self.barren
    }

    /// The tokens so far: what the next attempt begins with.
    pub fn generated(&self) -> &[u32] {
        &self.tokens
    }

    /// Takes what an attempt sent. What an earlier one still sends is as good as any, but how it
    /// ended is of no interest.
    pub fn take(&mut self, attempt: u32, body: JobEventBody) -> Take {
        if self.ended || attempt > self.attempt {
            return Take::Drop;
        }
        if let Some(reason) = self.bounds.as_ref().and_then(|bounds| self.beyond(bounds, &body)) {
            // It is abandoned already, if it is an earlier one.
            return if attempt < self.attempt { Take::Drop } else { Take::Violation(reason) };
        }
        let taken = match body {
            JobEventBody::Token { index, id, .. } => self.token(index, id, body),
            JobEventBody::Scored(ref token) => self.token(token.index, token.id, body),
            JobEventBody::Logits { first_row, rows, width, values } => {
                self.logits(first_row, rows, width, values)
            }
            JobEventBody::Routes { first_row, layers, rows, k, ids } => {
                self.routes(first_row, layers, rows, k, ids)
            }
            JobEventBody::Progress { prefilled, .. } => self.prefilled(prefilled),
            body if attempt < self.attempt => {
                debug_assert!(body.is_last() || matches!(body, JobEventBody::Text(_)));
                Take::Drop
            }
            JobEventBody::Done { generated, .. } if generated as usize != self.tokens.len() => {
                let tokens = self.tokens.len();
                Take::Violation(format!("it ended with {generated} tokens, and sent {tokens}"))
            }
            body @ (JobEventBody::Done { .. } | JobEventBody::Failed { .. }) => {
                self.ended = true;
                Take::Last(body)
            }
            body @ JobEventBody::Text(_) => Take::Pass(body),
            // It did not begin: for whoever offered it.
            JobEventBody::NotTaken { .. } => Take::Drop,
        };
        match taken {
            // It is abandoned already.
            Take::Violation(_) if attempt < self.attempt => Take::Drop,
            taken => taken,
        }
    }

    /// Why an event cannot be one of this job, if it cannot.
    fn beyond(&self, bounds: &Bounds, body: &JobEventBody) -> Option<String> {
        let tokens = self.tokens.len() as u64;
        let positions = u64::from(self.prompt) + tokens;
        let fits = |first: u32, rows: u32| u64::from(first) + u64::from(rows) <= positions;
        let possible = match body {
            JobEventBody::Token { index, id, .. } => {
                bounds.logprobs.is_none()
                    && *id < bounds.vocab
                    && u64::from(self.prompt) + u64::from(*index) < u64::from(bounds.context)
            }
            JobEventBody::Scored(token) => {
                // A NaN is neither.
                let is_one = |id: u32, logprob: f32| id < bounds.vocab && logprob <= 0.0;
                let most = bounds.vocab.min(bounds.logprobs.unwrap_or(0));
                bounds.logprobs.is_some()
                    && is_one(token.id, token.logprob)
                    && token.top.len() as u64 == u64::from(most)
                    && token.top.iter().all(|token| is_one(token.id, token.logprob))
                    && u64::from(self.prompt) + u64::from(token.index) < u64::from(bounds.context)
            }
            JobEventBody::Logits { first_row, rows, width, .. } => {
                bounds.logits && *width == bounds.vocab && *rows > 0 && fits(*first_row, *rows)
            }
            JobEventBody::Routes { first_row, layers, rows, .. } => {
                bounds.routes && *layers == bounds.layers && *rows > 0 && fits(*first_row, *rows)
            }
            JobEventBody::Done { reason: EndReason::Length, .. } => {
                tokens == u64::from(self.tokens_max)
            }
            JobEventBody::Done { reason: EndReason::EndOfText, .. } => {
                self.tokens.last().is_some_and(|id| bounds.ends.contains(id))
            }
            JobEventBody::Done { reason: EndReason::Context, .. } => {
                positions >= u64::from(bounds.context)
            }
            // Nobody told it to; and what a job's text is, its reader hears from here.
            JobEventBody::Done { reason: EndReason::Cancelled, .. } | JobEventBody::Text(_) => {
                false
            }
            JobEventBody::Progress { .. }
            | JobEventBody::Failed { .. }
            | JobEventBody::NotTaken { .. } => true,
        };
        let what = match body {
            JobEventBody::Token { index, id, .. } => format!("token {index}, which is {id}"),
            JobEventBody::Scored(token) => format!(
                "token {}, which is {}, of {} and with {} candidates",
                token.index,
                token.id,
                token.logprob,
                token.top.len()
            ),
            JobEventBody::Logits { first_row, rows, width, .. } => {
                format!("{rows} rows of {width} logits from {first_row}")
            }
            JobEventBody::Routes { first_row, rows, layers, .. } => {
                format!("{rows} rows of routes in {layers} layers from {first_row}")
            }
            JobEventBody::Done { reason, .. } => format!("its end ({reason:?})"),
            _ => "text".to_owned(),
        };
        (!possible).then(|| format!("it reports {what}, after {tokens} tokens of the job"))
    }

    /// The attempt is lost: its home, its stream, or its credit.
    pub fn lost(&mut self) -> Next {
        if self.ended {
            return Next::Ended;
        }
        self.barren = if self.fruitful { 0 } else { self.barren + 1 };
        self.fruitful = false;
        if self.barren >= ATTEMPTS_MAX {
            self.ended = true;
            return Next::GiveUp(JobEventBody::Failed { reason: words::gave_up(self.barren) });
        }
        self.attempt += 1;
        Next::Again(self.attempt)
    }

    /// Ends the job because somebody wants that. Returns the reader's last event, if it had none.
    pub fn cancel(&mut self) -> Option<JobEventBody> {
        let generated = self.tokens.len() as u32;
        self.end(JobEventBody::Done { reason: EndReason::Cancelled, generated })
    }

    /// Ends the job with a reason. Returns the reader's last event, if it had none.
    pub fn fail(&mut self, reason: String) -> Option<JobEventBody> {
        self.end(JobEventBody::Failed { reason })
    }

    fn end(&mut self, last: JobEventBody) -> Option<JobEventBody> {
        let ended = std::mem::replace(&mut self.ended, true);
        (!ended).then_some(last)
    }

    fn token(&mut self, index: u32, id: u32, body: JobEventBody) -> Take {
        match self.tokens.get(index as usize) {
            Some(known) if *known == id => Take::Drop,
            Some(known) => Take::Violation(format!(
                "its token {index} is {id}, which was {known}: its weights or its contract differ"
            )),
            None if index as usize == self.tokens.len() && index < self.tokens_max => {
                self.tokens.push(id);
                self.fruitful = true;
                Take::Pass(body)
            }
            None => {
                let (had, most) = (self.tokens.len(), self.tokens_max);
                Take::Violation(format!("its token {index} follows {had} of {most} at most"))
            }
        }
    }

    fn logits(&mut self, first_row: u32, rows: u32, width: u32, mut values: Vec<f32>) -> Take {
        let known = match known_rows(self.logits, first_row, rows) {
            Ok(known) => known,
            Err(taken) => return taken,
        };
        if u64::from(rows) * u64::from(width) != values.len() as u64 {
            return Take::Violation(format!("{rows} rows of logits are {} numbers", values.len()));
        }
        values.drain(..known as usize * width as usize);
        self.logits = first_row + rows;
        self.fruitful = true;
        let (first_row, rows) = (first_row + known, rows - known);
        Take::Pass(JobEventBody::Logits { first_row, rows, width, values })
    }

    fn routes(&mut self, first_row: u32, layers: u32, rows: u32, k: u32, ids: Vec<i32>) -> Take {
        let known = match known_rows(self.routes, first_row, rows) {
            Ok(known) => known,
            Err(taken) => return taken,
        };
        let of_layer = u64::from(rows) * u64::from(k);
        if of_layer.checked_mul(u64::from(layers)) != Some(ids.len() as u64) {
            return Take::Violation(format!("{rows} rows of routes are {} numbers", ids.len()));
        }
        let ids = match ids.is_empty() {
            true => ids,
            false => ids
                .chunks(of_layer as usize)
                .flat_map(|layer| &layer[known as usize * k as usize..])
                .copied()
                .collect(),
        };
        self.routes = first_row + rows;
        self.fruitful = true;
        let (first_row, rows) = (first_row + known, rows - known);
        Take::Pass(JobEventBody::Routes { first_row, layers, rows, k, ids })
    }

    /// Later attempts read the tokens so far, too; to the reader that is no prompt.
    fn prefilled(&mut self, prefilled: u32) -> Take {
        let prefilled = prefilled.min(self.prompt);
        if prefilled <= self.prefilled {
            return Take::Drop;
        }
        self.prefilled = prefilled;
        Take::Pass(JobEventBody::Progress { prefilled, total: self.prompt })
    }
}

/// How many of some rows the reader has, if not all.
fn known_rows(have: u32, first_row: u32, rows: u32) -> Result<u32, Take> {
    let Some(end) = first_row.checked_add(rows) else {
        return Err(Take::Violation(format!("{rows} rows from {first_row} are too many")));
    };
    if first_row > have {
        return Err(Take::Violation(format!("its row {first_row} follows {have} rows")));
    }
    if end <= have { Err(Take::Drop) } else { Ok(have - first_row) }
}

#[cfg(test)]
mod tests {
    use lite_llm_transport::messages::{ScoredToken, TokenLogprob};

    use super::*;
    use crate::testing::Draws;

    fn token(index: u32, id: u32) -> JobEventBody {
        JobEventBody::Token { index, id, text: None }
    }

    fn done(generated: u32) -> JobEventBody {
        JobEventBody::Done { reason: EndReason::Length, generated }
    }

    #[test]
    fn a_second_attempt_repeats_nothing_and_goes_on_where_the_first_was() {
        let mut job = JobProgress::new(3);
        assert_eq!(job.take(0, token(0, 7)), Take::Pass(token(0, 7)));
        assert_eq!(job.lost(), Next::Again(1));
        assert_eq!(job.generated(), [7]);
        assert_eq!(job.take(1, token(0, 7)), Take::Drop);
        assert_eq!(job.take(1, token(1, 8)), Take::Pass(token(1, 8)));
        assert_eq!(job.take(1, token(1, 8)), Take::Drop, "no token twice");
        assert_eq!(job.take(1, done(2)), Take::Last(done(2)));
        assert_eq!(job.take(1, done(2)), Take::Drop, "one last event");
        assert_eq!((job.lost(), job.cancel()), (Next::Ended, None));
    }

    #[test]
    fn an_attempt_that_leaves_out_or_changes_something_is_abandoned() {
        let mut job = JobProgress::new(3).with_tokens_max(2);
        job.take(0, token(0, 7));
        assert!(matches!(job.take(0, token(2, 9)), Take::Violation(_)), "a token is missing");
        assert!(matches!(job.take(0, token(0, 8)), Take::Violation(_)), "other bits");
        assert!(matches!(job.take(0, done(2)), Take::Violation(_)), "a token is missing");
        job.take(0, token(1, 7));
        assert!(matches!(job.take(0, token(2, 7)), Take::Violation(_)), "more than was asked for");
        assert_eq!(job.generated(), [7, 7]);
        assert!(job.cancel().is_some(), "it has not ended");
    }

    #[test]
    fn tokens_are_scored_if_and_only_if_that_was_asked_for() {
        let scored = |index: u32, logprob: f32, top: u32| {
            let top = (0..top).map(|id| TokenLogprob { id, logprob: -1.0 }).collect();
            JobEventBody::Scored(ScoredToken { index, id: 7, text: None, logprob, top }.into())
        };
        let job = |logprobs| {
            let mut job = JobProgress::new(3);
            job.bounds = Some(Bounds {
                vocab: 10,
                context: 100,
                layers: 1,
                logits: false,
                routes: false,
                logprobs,
                ends: Vec::new(),
            });
            job
        };
        assert!(matches!(job(None).take(0, scored(0, -1.0, 0)), Take::Violation(_)));
        assert!(matches!(job(Some(2)).take(0, token(0, 7)), Take::Violation(_)));
        for (logprob, top) in [(0.5, 2), (f32::NAN, 2), (-1.0, 1), (-1.0, 3)] {
            assert!(matches!(job(Some(2)).take(0, scored(0, logprob, top)), Take::Violation(_)));
        }
        let mut job = job(Some(2));
        assert_eq!(job.take(0, scored(0, -1.0, 2)), Take::Pass(scored(0, -1.0, 2)));
        job.lost();
        assert_eq!(job.take(1, scored(0, -1.0, 2)), Take::Drop, "no token twice");
        assert_eq!(job.take(1, scored(1, 0.0, 2)), Take::Pass(scored(1, 0.0, 2)));
    }

    #[test]
    fn a_stale_attempt_may_bring_tokens_but_not_the_end() {
        let mut job = JobProgress::new(1);
        job.lost();
        assert_eq!(job.take(0, token(0, 7)), Take::Pass(token(0, 7)));
        assert_eq!(job.take(0, token(5, 7)), Take::Drop);
        assert_eq!(job.take(0, done(1)), Take::Drop);
        assert_eq!(job.take(0, JobEventBody::Failed { reason: String::new() }), Take::Drop);
        assert_eq!(job.take(2, token(1, 7)), Take::Drop, "there is no such attempt yet");
        assert_eq!(job.take(1, done(1)), Take::Last(done(1)));
    }

    #[test]
    fn rows_are_cut_so_that_each_arrives_once() {
        let mut job = JobProgress::new(4);
        let logits = |first_row: u32, rows: u32| {
            let values = (first_row * 2..(first_row + rows) * 2).map(|n| n as f32).collect();
            JobEventBody::Logits { first_row, rows, width: 2, values }
        };
        assert_eq!(job.take(0, logits(0, 2)), Take::Pass(logits(0, 2)));
        job.lost();
        assert_eq!(job.take(1, logits(0, 1)), Take::Drop);
        assert_eq!(job.take(1, logits(1, 3)), Take::Pass(logits(2, 2)));
        assert!(matches!(job.take(1, logits(5, 1)), Take::Violation(_)));
        assert!(matches!(
            job.take(
                1,
                JobEventBody::Logits { first_row: 3, rows: u32::MAX, width: 2, values: vec![] }
            ),
            Take::Violation(_)
        ));
        // Two layers of rows with two experts each.
        let routes = |first_row: u32, rows: u32| {
            let of_layer = |layer: u32| {
                (first_row * 2..(first_row + rows) * 2).map(move |n| (layer * 100 + n) as i32)
            };
            JobEventBody::Routes {
                first_row,
                layers: 2,
                rows,
                k: 2,
                ids: (0..2).flat_map(of_layer).collect(),
            }
        };
        assert_eq!(job.take(1, routes(0, 2)), Take::Pass(routes(0, 2)));
        assert_eq!(job.take(1, routes(1, 3)), Take::Pass(routes(2, 2)));
        assert_eq!(job.take(1, routes(0, 4)), Take::Drop);
    }

    #[test]
    fn the_reader_sees_the_prompt_read_once() {
        let mut job = JobProgress::new(4);
        let progress = |prefilled, total| JobEventBody::Progress { prefilled, total };
        assert_eq!(job.take(0, progress(2, 4)), Take::Pass(progress(2, 4)));
        job.take(0, token(0, 1));
        job.lost();
        assert_eq!(job.take(1, progress(2, 5)), Take::Drop);
        assert_eq!(job.take(1, progress(5, 5)), Take::Pass(progress(4, 4)));
    }

    #[test]
    fn it_gives_up_after_many_attempts_without_anything_new() {
        let mut job = JobProgress::new(1);
        for _ in 0..ATTEMPTS_MAX - 1 {
            assert!(matches!(job.lost(), Next::Again(_)));
        }
        job.take(job.attempt(), token(0, 1));
        for _ in 0..ATTEMPTS_MAX {
            assert!(matches!(job.lost(), Next::Again(_)), "a token begins the count anew");
        }
        assert!(matches!(job.lost(), Next::GiveUp(JobEventBody::Failed { .. })));
        assert_eq!(job.fail("late".into()), None);
    }

    /// Attempts that are lost anywhere, overlap, and come late: the reader has the tokens and rows
    /// of a run without losses, and one last event.
    #[test]
    fn random_histories() {
        for seed in 0..2000u64 {
            let mut random = Draws(seed);
            let (prompt, tokens) = (1 + random.below(5) as u32, random.below(12) as u32);
            let mut job = JobProgress::new(prompt as usize).with_tokens_max(tokens);
            // Per attempt: its number, how many tokens it has sent, how many rows.
            let mut attempts = vec![(0u32, 0u32, 0u32)];
            let (mut read, mut rows, mut last) = (Vec::new(), Vec::new(), 0);
            while last == 0 {
                let at = random.below(attempts.len() as u64) as usize;
                let (number, sent, sent_rows) = &mut attempts[at];
                let all_rows = prompt + tokens.saturating_sub(1);
                let body = if *sent_rows < all_rows && random.below(2) == 0 {
                    let some = 1 + random.below(u64::from(all_rows - *sent_rows)) as u32;
                    let first_row = std::mem::replace(sent_rows, *sent_rows + some);
                    let values = (first_row..first_row + some).map(|row| row as f32).collect();
                    JobEventBody::Logits { first_row, rows: some, width: 1, values }
                } else if *sent < tokens {
                    *sent += 1;
                    token(*sent - 1, 1000 + *sent)
                } else if *sent_rows == all_rows {
                    done(tokens)
                } else {
                    continue;
                };
                match job.take(*number, body) {
                    Take::Pass(JobEventBody::Token { index, id, .. }) => {
                        assert_eq!(index as usize, read.len(), "seed {seed}");
                        read.push(id);
                    }
                    Take::Pass(JobEventBody::Logits { values, .. }) => rows.extend(values),
                    Take::Last(_) => last += 1,
                    Take::Drop => {}
                    other => panic!("seed {seed}: {other:?}"),
                }
                if last == 0 && random.below(8) == 0 {
                    match job.lost() {
                        Next::Again(number) => {
                            // It may be told the tokens so far and begin after them.
                            let known =
                                if random.below(2) == 0 { job.generated().len() } else { 0 };
                            attempts.push((number, known as u32, 0));
                        }
                        Next::GiveUp(_) => last += 2,
                        Next::Ended => panic!("seed {seed}: it has not ended"),
                    }
                }
            }
            let whole = (1..=read.len() as u32).map(|n| 1000 + n);
            assert!(whole.eq(read.iter().copied()), "seed {seed}: {read:?}");
            assert!((0..rows.len()).all(|i| rows[i] == i as f32), "seed {seed}: {rows:?}");
            if last == 1 {
                let all_rows = prompt + tokens.saturating_sub(1);
                assert_eq!(
                    (read.len(), rows.len()),
                    (tokens as usize, all_rows as usize),
                    "{seed}"
                );
            }
            assert_eq!(job.cancel(), None);
        }
    }
}
