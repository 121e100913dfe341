//! What the ledger decides: a pure machine.
//!
//! It holds no prompts and no results, only how far each job is, so its memory is some tens of bytes
//! per job. Times are milliseconds since 1970, for they are kept; a clock that is set back delays what
//! is due by time, and nothing else.
//!
//! Invariants: see [`super`]. At most one write is under way; a command that tells somebody of a change
//! comes after [`Event::Synced`] of the write that holds it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::RangeInclusive,
};

use lite_llm_transport::messages::{
    DetachedBatch, DetachedJob, DetachedState, DetachedStatus, JobEnding, JobRange, Prompt,
};

use super::events::{Command, Event, Record, Rules, Saved, SavedBatch, SavedJob};

/// How often tokens of running jobs are written, if nothing else is, in milliseconds. What was not
/// written is computed again after a crash.
const TOKENS_INTERVAL: u64 = 1000;
/// Bytes that a job takes beside its prompt and its answer.
const JOB_BYTES: u64 = 512;
/// Bytes that a token of an answer takes: its id and its text.
const TOKEN_BYTES: u64 = 12;

#[derive(Debug)]
struct Batch {
    owner: String,
    key: [u8; 16],
    model: [u8; 32],
    at: u64,
    /// It is on disk.
    synced: bool,
    /// Jobs that have not ended on disk.
    open: usize,
    jobs: Vec<Job>,
}

#[derive(Debug)]
struct Job {
    state: DetachedState,
    /// Its end is on disk, and may be seen.
    settled: bool,
    tokens: u32,
    ended: u64,
    /// What it is counted with.
    bytes: u64,
    /// What its answer is counted with: until it has one, the longest that it may have.
    answer: u64,
}

/// A job that runs.
#[derive(Debug)]
struct Running {
    owner: String,
    /// Tokens that are written, or being written.
    written: u32,
    /// Tokens after them.
    fresh: Vec<u32>,
}

/// What follows when a write is on disk.
#[derive(Debug)]
enum Then {
    Taken { first: u64 },
    Accepted { caller: u64, jobs: JobRange },
    Settled { job: u64 },
    Cancelled { caller: u64, jobs: u64 },
}

/// See the module's text.
#[derive(Debug)]
pub struct Ledger {
    rules: Rules,
    next: u64,
    batches: BTreeMap<u64, Batch>,
    keys: HashMap<(String, [u8; 16]), u64>,
    /// Jobs that may run, by their owners.
    waiting: BTreeMap<String, BTreeSet<u64>>,
    running: BTreeMap<u64, Running>,
    /// Batches of which all jobs have ended on disk, by the time of the last end.
    over: BTreeSet<(u64, u64)>,
    open: usize,
    ended: u64,
    bytes: u64,
    records: Vec<Record>,
    then: Vec<Then>,
    in_flight: Option<(u64, Vec<Then>)>,
    writes: u64,
    commands: VecDeque<Command>,
    tokens_due: u64,
}

/// Bytes that a job and its answer are counted with before it has ended, where a model has so many
/// positions.
pub fn job_bytes(job: &DetachedJob, context: u64) -> (u64, u64) {
    let prompt = match &job.request.prompt {
        Prompt::Tokens(ids) => ids.len() as u64 * 4,
        Prompt::Text(text) | Prompt::Chat(text) => text.len() as u64,
    };
    let stop: usize = job.stop.iter().map(String::len).sum();
    let answer = u64::from(job.request.max_new_tokens).min(context) * TOKEN_BYTES;
    let grammar = job.choosing.grammar.as_ref().map_or(0, |grammar| grammar.text().len());
    let beside = stop + job.label.len() + job.shape.len() + grammar + job.choosing.bias.len() * 8;
    (JOB_BYTES + prompt + beside as u64, answer)
}

/// Bytes that a result is counted with.
pub(super) fn result_bytes(ending: &JobEnding) -> u64 {
    (ending.ids.len() * 4 + ending.text.len() + ending.reason.len()) as u64
}

impl Ledger {
    /// A ledger that goes on from what was written.
    pub fn new(rules: Rules, saved: Saved) -> Self {
        let mut ledger = Self {
            rules,
            next: saved.next.max(1),
            batches: BTreeMap::new(),
            keys: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            over: BTreeSet::new(),
            open: 0,
            ended: 0,
            bytes: 0,
            records: Vec::new(),
            then: Vec::new(),
            in_flight: None,
            writes: 0,
            commands: VecDeque::new(),
            tokens_due: 0,
        };
        for (first, batch) in saved.batches {
            let SavedBatch { owner, key, model, at, jobs } = batch;
            let jobs: Vec<Job> = jobs.into_iter().map(|job| ledger.found(job, &model)).collect();
            let open = jobs.iter().filter(|job| !job.settled).count();
            ledger.next = ledger.next.max(first + jobs.len() as u64);
            ledger.keys.insert((owner.clone(), key), first);
            ledger.open += open;
            ledger.ended += (jobs.len() - open) as u64;
            if open == 0 {
                ledger.over.insert((last_end(&jobs), first));
            }
            let batch = Batch { owner, key, model, at, synced: true, open, jobs };
            ledger.batches.insert(first, batch);
            ledger.queue(first);
        }
        ledger.start();
        ledger
    }

    fn found(&mut self, job: SavedJob, model: &[u8; 32]) -> Job {
        let (bytes, answer) = job.bytes;
        let (state, ended, answer) = match job.ended {
            Some((state, at, result)) => (state, at, result),
            None if *model != self.rules.model => (DetachedState::OtherModel, 0, answer),
            None => (DetachedState::Waiting, 0, answer),
        };
        self.bytes += bytes + answer;
        Job { state, settled: job.ended.is_some(), tokens: job.tokens, ended, bytes, answer }
    }

    /// Tells it what happened.
    pub fn handle(&mut self, now: u64, event: Event) {
        match event {
            Event::Accept { caller, owner, batch } => self.accept(now, caller, owner, batch),
            Event::Known { caller, owner, key } => {
                if !self.taken_before(caller, &owner, key) {
                    self.commands.push_back(Command::NotKnown { caller });
                }
            }
            Event::Progress { job, from, tokens } => self.progress(job, from, tokens),
            Event::Ended { job, ending } => {
                if self.running.contains_key(&job) {
                    self.end(job, ending);
                }
            }
            Event::Cancel { caller, owner, jobs } => self.cancel(now, caller, owner, jobs),
            Event::Synced { write } => self.synced(write),
            Event::Flush => self.write_tokens(),
            Event::Tick => {
                self.forget(now);
                if now >= self.tokens_due || now + TOKENS_INTERVAL < self.tokens_due {
                    self.tokens_due = now + TOKENS_INTERVAL;
                    self.write_tokens();
                }
            }
        }
        self.start();
    }

    /// What it wants done next. Asked when all that has happened was told, it puts all of that into
    /// one write.
    pub fn poll_command(&mut self) -> Option<Command> {
        if let Some(command) = self.commands.pop_front() {
            return Some(command);
        }
        if self.in_flight.is_some() || self.records.is_empty() {
            return None;
        }
        // Tokens travel with whatever is written.
        self.write_tokens();
        self.writes += 1;
        self.in_flight = Some((self.writes, std::mem::take(&mut self.then)));
        Some(Command::Write { write: self.writes, records: std::mem::take(&mut self.records) })
    }

    /// How far jobs of an owner are, or of everybody: the newest `most` of a range, the oldest first.
    pub fn list(&self, owner: Option<&str>, jobs: JobRange, most: usize) -> Vec<DetachedStatus> {
        let mut found: Vec<_> = self.seen(owner, jobs).rev().take(most).collect();
        found.reverse();
        found
    }

    /// An owner's batches with numbers below `below`: the newest `most`, newest first.
    pub fn batches(&self, owner: &str, below: u64, most: usize) -> Vec<u64> {
        let before = self.batches.range(..below).rev();
        let own = before.filter(|(_, batch)| batch.synced && batch.owner == owner);
        own.map(|(first, _)| *first).take(most).collect()
    }

    /// How many jobs of a range an owner has, and how many of those have ended.
    pub fn count(&self, owner: Option<&str>, jobs: JobRange) -> (u64, u64) {
        let count =
            |(all, ended), job: DetachedStatus| (all + 1, ended + u64::from(job.state.has_ended()));
        self.seen(owner, jobs).fold((0, 0), count)
    }

    /// Jobs that run, and jobs that have not ended.
    pub fn load(&self) -> (usize, usize) {
        (self.running.len(), self.open)
    }

    fn seen<'a>(
        &'a self,
        owner: Option<&'a str>,
        jobs: JobRange,
    ) -> impl DoubleEndedIterator<Item = DetachedStatus> + 'a {
        let batches = self.batches_of(jobs);
        let own = batches.filter(move |(_, batch)| {
            batch.synced && owner.is_none_or(|owner| owner == batch.owner)
        });
        own.flat_map(move |(first, batch)| {
            within(first, batch.jobs.len(), jobs).map(move |number| {
                let job = &batch.jobs[(number - first) as usize];
                let shown = job.settled || !job.state.has_ended();
                DetachedStatus {
                    job: number,
                    batch: first,
                    state: if shown { job.state } else { DetachedState::Running },
                    tokens: job.tokens,
                    accepted: batch.at,
                    ended: if job.settled { job.ended } else { 0 },
                }
            })
        })
    }

    /// Batches that have jobs of a range.
    fn batches_of(&self, jobs: JobRange) -> impl DoubleEndedIterator<Item = (u64, &Batch)> {
        let JobRange { first, last } = jobs;
        let begin = self.batches.range(..=first).next_back().map_or(first, |(begin, _)| *begin);
        let range = begin..=last.max(begin);
        self.batches.range(range).map(|(first, batch)| (*first, batch))
    }

    fn job(&mut self, number: u64) -> Option<&mut Job> {
        let (first, batch) = self.batches.range_mut(..=number).next_back()?;
        batch.jobs.get_mut(usize::try_from(number - first).ok()?)
    }

    fn accept(&mut self, now: u64, caller: u64, owner: String, batch: DetachedBatch) {
        let count = batch.jobs.len();
        if self.taken_before(caller, &owner, batch.key) {
            return;
        }
        let bytes: Vec<(u64, u64)> =
            batch.jobs.iter().map(|job| job_bytes(job, self.rules.context)).collect();
        let all: u64 = bytes.iter().map(|(job, answer)| job + answer).sum();
        if let Some(reason) = self.no_room(count, all) {
            self.commands.push_back(Command::Refused { caller, reason });
            return;
        }
        let first = self.next;
        self.next += count as u64;
        self.open += count;
        self.bytes += all;
        let fresh = |(bytes, answer)| Job {
            state: DetachedState::Waiting,
            settled: false,
            tokens: 0,
            ended: 0,
            bytes,
            answer,
        };
        let kept = Batch {
            owner: owner.clone(),
            key: batch.key,
            model: self.rules.model,
            at: now,
            synced: false,
            open: count,
            jobs: bytes.into_iter().map(fresh).collect(),
        };
        self.batches.insert(first, kept);
        self.keys.insert((owner.clone(), batch.key), first);
        let jobs = JobRange { first, last: self.next - 1 };
        self.records.push(Record::Batch { first, owner, model: self.rules.model, at: now, batch });
        self.then.extend([Then::Taken { first }, Then::Accepted { caller, jobs }]);
    }

    /// Answers whoever asks for a batch that was taken, as soon as it is on disk. Whether it was.
    fn taken_before(&mut self, caller: u64, owner: &str, key: [u8; 16]) -> bool {
        let Some(&first) = self.keys.get(&(owner.to_owned(), key)) else { return false };
        let taken = &self.batches[&first];
        let jobs = JobRange { first, last: first + taken.jobs.len() as u64 - 1 };
        if taken.synced {
            self.commands.push_back(Command::Accepted { caller, jobs });
        } else if let Some((_, then)) = self.in_flight.as_mut().filter(|(_, then)| {
            then.iter().any(|then| matches!(then, Then::Taken { first: f } if *f == first))
        }) {
            then.push(Then::Accepted { caller, jobs });
        } else {
            self.then.push(Then::Accepted { caller, jobs });
        }
        true
    }

    fn no_room(&self, jobs: usize, bytes: u64) -> Option<String> {
        let (open, most) = (self.open, self.rules.open_max);
        if jobs > most.saturating_sub(open) {
            return Some(format!(
                "{open} detached jobs have not ended, and {most} at most are taken: try again when \
                 {jobs} more have room"
            ));
        }
        let (held, most) = (self.bytes, self.rules.bytes_max);
        (bytes > most.saturating_sub(held)).then(|| {
            format!(
                "detached jobs and their results hold {held} bytes of {most}, and these need \
                 {bytes}: try again when others have ended, or keep results for less long \
                 (coordinator --keep-jobs)"
            )
        })
    }

    fn progress(&mut self, job: u64, from: u32, tokens: Vec<u32>) {
        let Some(running) = self.running.get_mut(&job) else { return };
        let known = running.written + running.fresh.len() as u32;
        let end = u64::from(from) + tokens.len() as u64;
        // What was told before is told again by a runner that began anew.
        if from > known || end <= u64::from(known) {
            return;
        }
        running.fresh.extend(&tokens[(known - from) as usize..]);
        let known = running.written + running.fresh.len() as u32;
        if let Some(job) = self.job(job) {
            job.tokens = known;
        }
    }

    fn write_tokens(&mut self) {
        for (&job, running) in &mut self.running {
            if !running.fresh.is_empty() {
                let (from, tokens) = (running.written, std::mem::take(&mut running.fresh));
                running.written += tokens.len() as u32;
                self.records.push(Record::Tokens { job, from, tokens });
            }
        }
    }

    /// A job that has not ended ends.
    fn end(&mut self, number: u64, ending: JobEnding) {
        let result = result_bytes(&ending);
        let Some(job) = self.job(number) else { return };
        let reserved = std::mem::replace(&mut job.answer, result);
        job.state = ending.state;
        job.ended = ending.at;
        job.tokens = job.tokens.max(ending.ids.len() as u32);
        self.bytes = self.bytes - reserved + result;
        self.running.remove(&number);
        self.records.push(Record::Ended { job: number, ending });
        self.then.push(Then::Settled { job: number });
    }

    fn cancel(&mut self, now: u64, caller: u64, owner: Option<String>, jobs: JobRange) {
        let seen = self.seen(owner.as_deref(), jobs);
        let open: Vec<u64> = seen.filter(|job| !job.state.has_ended()).map(|job| job.job).collect();
        let mut cancelled = 0;
        for number in open {
            let Some(job) = self.job(number).filter(|job| !job.state.has_ended()) else {
                // Its end is being written.
                continue;
            };
            let state = job.state;
            match state {
                DetachedState::Running => self.commands.push_back(Command::Stop { job: number }),
                _ => self.unqueue(number),
            }
            let ending = JobEnding {
                state: DetachedState::Cancelled,
                at: now,
                ids: Vec::new(),
                text: String::new(),
                reason: String::new(),
            };
            self.end(number, ending);
            cancelled += 1;
        }
        match cancelled {
            0 => self.commands.push_back(Command::Cancelled { caller, jobs: 0 }),
            jobs => self.then.push(Then::Cancelled { caller, jobs }),
        }
    }

    fn synced(&mut self, write: u64) {
        let Some((_, then)) = self.in_flight.take_if(|(number, _)| *number == write) else {
            return;
        };
        for then in then {
            match then {
                Then::Taken { first } => {
                    if let Some(batch) = self.batches.get_mut(&first) {
                        batch.synced = true;
                        self.queue(first);
                    }
                }
                Then::Accepted { caller, jobs } => {
                    self.commands.push_back(Command::Accepted { caller, jobs });
                }
                Then::Settled { job } => self.settled(job),
                Then::Cancelled { caller, jobs } => {
                    self.commands.push_back(Command::Cancelled { caller, jobs });
                }
            }
        }
        self.commands.push_back(Command::Changed);
    }

    fn settled(&mut self, number: u64) {
        let Some((&first, batch)) = self.batches.range_mut(..=number).next_back() else { return };
        batch.jobs[(number - first) as usize].settled = true;
        batch.open -= 1;
        self.open -= 1;
        self.ended += 1;
        if batch.open == 0 {
            self.over.insert((last_end(&batch.jobs), first));
        }
    }

    /// Lets go of batches that have been over for long enough, or are too many.
    fn forget(&mut self, now: u64) {
        let keep = u64::try_from(self.rules.keep.time.as_millis()).unwrap_or(u64::MAX);
        while let Some(&(at, first)) = self.over.first() {
            let late = now.saturating_sub(at) >= keep;
            let many = self.ended > self.rules.keep.jobs && self.over.len() > 1;
            if !late && !many {
                return;
            }
            self.over.pop_first();
            let Some(batch) = self.batches.remove(&first) else { continue };
            self.keys.remove(&(batch.owner, batch.key));
            self.bytes -= batch.jobs.iter().map(|job| job.bytes + job.answer).sum::<u64>();
            self.ended -= batch.jobs.len() as u64;
            self.records.push(Record::Forgotten { first, jobs: batch.jobs.len() as u64 });
        }
    }

    /// Puts a batch's jobs that may run among those that wait.
    fn queue(&mut self, first: u64) {
        let Some(batch) = self.batches.get(&first) else { return };
        let numbers = (first..).zip(&batch.jobs);
        let waiting = numbers.filter(|(_, job)| job.state == DetachedState::Waiting);
        let numbers: Vec<u64> = waiting.map(|(number, _)| number).collect();
        if !numbers.is_empty() && batch.model == self.rules.model {
            self.waiting.entry(batch.owner.clone()).or_default().extend(numbers);
        }
    }

    fn unqueue(&mut self, number: u64) {
        self.waiting.retain(|_, numbers| {
            numbers.remove(&number);
            !numbers.is_empty()
        });
    }

    /// Runs what has room: the oldest job of the owner who has the fewest running.
    fn start(&mut self) {
        while self.running.len() < self.rules.running_max && !self.waiting.is_empty() {
            let mut running: HashMap<&str, usize> = HashMap::new();
            for job in self.running.values() {
                *running.entry(&job.owner).or_default() += 1;
            }
            let has = |owner: &str| running.get(owner).copied().unwrap_or(0);
            let turn = self
                .waiting
                .iter()
                .min_by_key(|(owner, numbers)| (has(owner), numbers.first().copied()));
            let Some((owner, number)) =
                turn.and_then(|(owner, numbers)| Some((owner.clone(), *numbers.first()?)))
            else {
                return;
            };
            self.unqueue(number);
            let Some(job) = self.job(number) else { continue };
            job.state = DetachedState::Running;
            let written = job.tokens;
            let running = Running { owner: owner.clone(), written, fresh: Vec::new() };
            self.running.insert(number, running);
            self.commands.push_back(Command::Run { job: number, owner });
        }
    }
}

fn last_end(jobs: &[Job]) -> u64 {
    jobs.iter().map(|job| job.ended).max().unwrap_or(0)
}

/// Numbers of a batch's jobs that are in a range.
fn within(first: u64, jobs: usize, range: JobRange) -> RangeInclusive<u64> {
    let last = first + jobs as u64 - 1;
    range.first.max(first)..=range.last.min(last)
}
