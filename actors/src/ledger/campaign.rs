//! Random histories of a ledger whose process dies at any point, on a disk that keeps what was synced
//! and may or may not keep what was being written.
//!
//! What is held to, in every one of them: nothing that was acknowledged is lost; no job ends twice, nor
//! with anything but what it would have had without deaths; a batch that is submitted again and again
//! is taken once; what was seen never changes; in the end everything has ended; bounds hold.

use std::collections::{BTreeMap, BTreeSet};

use lite_llm_transport::messages::{
    DetachedBatch, DetachedJob, DetachedState, DetachedStatus, JobEnding, JobRange, JobRequest,
    Prompt,
};

use super::{
    Keep,
    events::{Command, Event, Record, Rules, Saved, SavedBatch, SavedJob},
    machine::{Ledger, job_bytes, result_bytes},
};
use crate::testing::Draws;

/// Histories of a run; more with `LITE_LLM_HISTORIES`.
const HISTORIES: u64 = 10_000;
const CONTEXT: u64 = 64;
const ALL: JobRange = JobRange { first: 0, last: u64::MAX };
const OWNERS: [&str; 3] = ["anna", "ben", "key:cleo"];

#[derive(Default)]
struct Disk {
    next: u64,
    batches: BTreeMap<u64, (String, [u8; 32], u64, DetachedBatch)>,
    tokens: BTreeMap<u64, Vec<u32>>,
    endings: BTreeMap<u64, JobEnding>,
    forgotten: BTreeSet<u64>,
}

/// The tokens that a job has, whatever happens: its seed and their place make them.
fn token(seed: u64, index: usize) -> u32 {
    (seed * 1000) as u32 + index as u32
}

impl Disk {
    fn job(&self, number: u64) -> &DetachedJob {
        let (first, (.., batch)) = self.batches.range(..=number).next_back().unwrap();
        &batch.jobs[(number - first) as usize]
    }

    fn put(&mut self, record: Record) {
        match record {
            Record::Batch { first, owner, model, at, batch } => {
                assert!(first >= self.next.max(1), "numbers are not given twice");
                let again =
                    self.batches.values().any(|(o, _, _, b)| *o == owner && b.key == batch.key);
                assert!(!again, "a batch is taken once");
                self.next = first + batch.jobs.len() as u64;
                self.batches.insert(first, (owner, model, at, batch));
            }
            Record::Tokens { job, from, tokens } => {
                assert!(!self.endings.contains_key(&job), "what has ended goes on");
                let seed = self.job(job).request.seed;
                let kept = self.tokens.entry(job).or_default();
                assert_eq!(from as usize, kept.len(), "tokens follow each other");
                for id in tokens {
                    assert_eq!(id, token(seed, kept.len()), "a token changed");
                    kept.push(id);
                }
            }
            Record::Ended { job, ending } => {
                let request = &self.job(job).request;
                if ending.state == DetachedState::Length {
                    let whole =
                        (0..request.max_new_tokens as usize).map(|i| token(request.seed, i));
                    assert!(whole.eq(ending.ids.iter().copied()), "a result changed");
                }
                self.tokens.remove(&job);
                assert!(self.endings.insert(job, ending).is_none(), "job {job} ended twice");
            }
            Record::Forgotten { first, jobs } => {
                self.batches.remove(&first).unwrap();
                for number in first..first + jobs {
                    assert!(self.endings.remove(&number).is_some(), "an open job is forgotten");
                    self.forgotten.insert(number);
                }
            }
        }
    }

    fn saved(&self) -> Saved {
        let batches = self.batches.iter().map(|(&first, (owner, model, at, batch))| {
            let jobs = (first..).zip(&batch.jobs).map(|(number, job)| SavedJob {
                bytes: job_bytes(job, CONTEXT),
                tokens: self.tokens.get(&number).map_or(0, Vec::len) as u32,
                ended: self.endings.get(&number).map(|end| (end.state, end.at, result_bytes(end))),
            });
            let (owner, key, model, at, jobs) =
                (owner.clone(), batch.key, *model, *at, jobs.collect());
            (first, SavedBatch { owner, key, model, at, jobs })
        });
        Saved { next: self.next, batches: batches.collect() }
    }
}

/// Somebody who submits a batch until it is told that it was taken.
struct Client {
    owner: &'static str,
    batch: DetachedBatch,
    waits: Option<u64>,
    taken: Option<JobRange>,
    refused: bool,
}

struct World {
    random: Draws,
    now: u64,
    rules: Rules,
    disk: Disk,
    ledger: Ledger,
    /// Tokens of the jobs that run.
    runners: BTreeMap<u64, Vec<u32>>,
    writing: Option<(u64, Vec<Record>)>,
    clients: Vec<Client>,
    callers: u64,
    /// Cancellations that wait, by caller: jobs that were open.
    cancels: BTreeMap<u64, Vec<u64>>,
    seen: BTreeMap<u64, DetachedState>,
}

fn batch(random: &mut Draws, key: u64) -> DetachedBatch {
    let job = |random: &mut Draws| {
        let request = JobRequest::greedy(Prompt::Tokens(vec![1; 3]), random.below(6) as u32);
        let request = JobRequest { seed: random.below(1000), ..request };
        DetachedJob::plain(request)
    };
    let jobs = (0..=random.below(5)).map(|_| job(random)).collect();
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    DetachedBatch { key: bytes, note: String::new(), jobs }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Draws(seed);
        let rules = Rules {
            model: [1; 32],
            context: CONTEXT,
            running_max: 1 + random.below(4) as usize,
            open_max: 4 + random.below(20) as usize,
            bytes_max: 4000 + random.below(20_000),
            keep: Keep {
                time: std::time::Duration::from_millis(500 + random.below(20_000)),
                jobs: random.below(12),
            },
        };
        let clients = (0..1 + random.below(6)).map(|key| Client {
            owner: OWNERS[random.below(3) as usize],
            batch: batch(&mut random, key),
            waits: None,
            taken: None,
            refused: false,
        });
        let clients = clients.collect();
        let disk = Disk::default();
        let ledger = Ledger::new(rules.clone(), disk.saved());
        Self {
            random,
            now: 1_000_000,
            rules,
            disk,
            ledger,
            runners: BTreeMap::new(),
            writing: None,
            clients,
            callers: 0,
            cancels: BTreeMap::new(),
            seen: BTreeMap::new(),
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random.below(end)
    }

    fn tell(&mut self, event: Event) {
        self.ledger.handle(self.now, event);
        // Sometimes more happens before it is asked what it wants.
        if self.below(3) > 0 {
            self.carry_out();
        }
    }

    fn carry_out(&mut self) {
        while let Some(command) = self.ledger.poll_command() {
            match command {
                Command::Write { write, records } => {
                    assert!(self.writing.is_none(), "one write at a time");
                    assert!(!records.is_empty());
                    self.writing = Some((write, records));
                }
                Command::Accepted { caller, jobs } => self.accepted(caller, jobs),
                Command::Refused { caller, reason } => {
                    assert!(!reason.is_empty());
                    let waits = self.clients.iter_mut().find(|c| c.waits == Some(caller)).unwrap();
                    waits.waits = None;
                    waits.refused = true;
                }
                Command::NotKnown { caller } => {
                    let waits = self.clients.iter_mut().find(|c| c.waits == Some(caller)).unwrap();
                    waits.waits = None;
                    let (key, owner) = (waits.batch.key, waits.owner);
                    let mut batches = self.disk.batches.iter();
                    // One that is let go just now, for it is over, is let go here first.
                    let over = batches.all(|(first, (o, _, _, b))| {
                        let numbers = *first..first + b.jobs.len() as u64;
                        let mut numbers = numbers.map(|job| self.disk.endings.contains_key(&job));
                        o != owner || b.key != key || numbers.all(|ended| ended)
                    });
                    assert!(over, "what was taken is not known");
                }
                Command::Cancelled { caller, .. } => {
                    for number in self.cancels.remove(&caller).unwrap() {
                        let told = self.ledger.list(None, one(number), 1);
                        // What has just ended by itself may be on its way to the disk.
                        let over = |job: &DetachedStatus| {
                            job.state.has_ended() || job.state == DetachedState::Running
                        };
                        assert!(told.iter().all(over), "{number} waits after it was cancelled");
                    }
                }
                Command::Run { job, .. } => {
                    let known = self.disk.tokens.get(&job).cloned().unwrap_or_default();
                    assert!(self.disk.batches.range(..=job).next_back().is_some(), "it is on disk");
                    assert!(self.runners.insert(job, known).is_none(), "it runs once");
                    assert!(self.runners.len() <= self.rules.running_max);
                }
                Command::Stop { job } => {
                    // It may have ended by itself just now.
                    self.runners.remove(&job);
                }
                Command::Changed => {}
            }
        }
    }

    fn accepted(&mut self, caller: u64, jobs: JobRange) {
        let client = self.clients.iter_mut().find(|client| client.waits == Some(caller)).unwrap();
        client.waits = None;
        let kept = &self.disk.batches.get(&jobs.first).expect("what is accepted is on disk").3;
        assert_eq!(kept, &client.batch);
        assert_eq!(jobs.last - jobs.first + 1, kept.jobs.len() as u64);
        if let Some(before) = client.taken {
            assert!(before == jobs || self.disk.forgotten.contains(&before.first));
        }
        client.taken = Some(jobs);
    }

    fn sync(&mut self) {
        if let Some((write, records)) = self.writing.take() {
            records.into_iter().for_each(|record| self.disk.put(record));
            self.tell(Event::Synced { write });
        }
    }

    /// The process dies, and another begins, which may serve another model.
    fn die(&mut self, model: u8) {
        if let Some((_, records)) = self.writing.take()
            && self.below(2) == 0
        {
            records.into_iter().for_each(|record| self.disk.put(record));
        }
        self.runners.clear();
        self.cancels.clear();
        self.clients.iter_mut().for_each(|client| client.waits = None);
        self.rules.model = [model; 32];
        self.ledger = Ledger::new(self.rules.clone(), self.disk.saved());
        self.look();
        self.carry_out();
    }

    fn submit(&mut self) {
        let index = self.below(self.clients.len() as u64) as usize;
        // Most are content when they were told once; some ask again all the same.
        if self.clients[index].taken.is_some() && self.below(8) > 0 {
            return;
        }
        self.submit_of(index);
    }

    fn submit_of(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.waits.is_some() {
            return;
        }
        self.callers += 1;
        client.waits = Some(self.callers);
        let (owner, batch) = (client.owner.to_owned(), client.batch.clone());
        self.tell(Event::Accept { caller: self.callers, owner, batch });
    }

    /// Somebody asks whether what it submitted was taken.
    fn ask(&mut self) {
        let index = self.below(self.clients.len() as u64) as usize;
        let client = &mut self.clients[index];
        if client.waits.is_some() {
            return;
        }
        self.callers += 1;
        client.waits = Some(self.callers);
        let (owner, key) = (client.owner.to_owned(), client.batch.key);
        self.tell(Event::Known { caller: self.callers, owner, key });
    }

    fn run_one(&mut self) {
        let Some(at) = (!self.runners.is_empty()).then(|| self.below(self.runners.len() as u64))
        else {
            return;
        };
        let (&job, tokens) = self.runners.iter().nth(at as usize).unwrap();
        let (request, mut tokens) = (self.disk.job(job).request.clone(), tokens.clone());
        if tokens.len() as u32 >= request.max_new_tokens {
            self.runners.remove(&job);
            let state = DetachedState::Length;
            let (text, reason) = (String::new(), String::new());
            let ending = JobEnding { state, at: self.now, ids: tokens, text, reason };
            // An end that is told twice counts once.
            if self.below(4) == 0 {
                self.tell(Event::Ended { job, ending: ending.clone() });
            }
            return self.tell(Event::Ended { job, ending });
        }
        tokens.push(token(request.seed, tokens.len()));
        self.runners.insert(job, tokens.clone());
        if self.below(2) == 0 {
            // From anywhere before: what is known is told again.
            let from = self.below(tokens.len() as u64) as usize;
            let tokens = tokens[from..].to_vec();
            self.tell(Event::Progress { job, from: from as u32, tokens });
        }
    }

    fn cancel(&mut self) {
        self.callers += 1;
        let first = 1 + self.below(self.disk.next.max(1) + 2);
        let jobs = JobRange { first, last: first + self.below(3) };
        let owner = match self.below(4) {
            0 => None,
            n => Some(OWNERS[n as usize - 1].to_owned()),
        };
        let seen = self.ledger.list(owner.as_deref(), jobs, usize::MAX);
        let open = seen.iter().filter(|job| !job.state.has_ended()).map(|job| job.job);
        self.cancels.insert(self.callers, open.collect());
        self.tell(Event::Cancel { caller: self.callers, owner, jobs });
    }

    /// What everybody sees.
    fn look(&mut self) {
        let all = self.ledger.list(None, ALL, usize::MAX);
        for DetachedStatus { job, state, batch, .. } in &all {
            let (owner, ..) = &self.disk.batches[batch];
            if state.has_ended() {
                assert_eq!(
                    self.disk.endings[job].state, *state,
                    "an end is shown before it is kept"
                );
                let before = self.seen.insert(*job, *state);
                assert!(before.is_none_or(|before| before == *state), "an end changed");
            } else {
                assert!(!self.seen.contains_key(job), "job {job} ended and is open again");
            }
            for other in OWNERS {
                let seen = !self.ledger.list(Some(other), one(*job), 1).is_empty();
                assert_eq!(seen, other == owner, "an owner sees its own jobs");
            }
        }
        let gone = |job: &u64| all.binary_search_by_key(job, |status| status.job).is_err();
        let lost = self.seen.keys().filter(|job| gone(job) && !self.disk.forgotten.contains(job));
        // A batch that is forgotten is gone here before it is gone on disk.
        for job in lost {
            assert!(self.writing.is_some() || self.disk.endings.contains_key(job));
        }
        let (running, open) = self.ledger.load();
        assert!(running <= self.rules.running_max && open <= self.rules.open_max);
    }

    fn step(&mut self) {
        self.now += self.random.below(200);
        match self.below(21) {
            0..=3 => self.submit(),
            4..=10 => self.run_one(),
            11..=14 => self.sync(),
            15 => self.cancel(),
            16 => self.tell(Event::Tick),
            17 if self.below(3) == 0 => {
                let model = 1 + self.below(8) as u8 / 7;
                self.die(model);
            }
            18 => self.tell(Event::Flush),
            20 => self.ask(),
            _ => {
                self.carry_out();
                self.look();
            }
        }
    }

    /// Nobody dies any more.
    fn finish(&mut self) {
        for model in [1, 2, 1, 2] {
            for round in 0.. {
                assert!(round < 20_000, "it does not come to an end");
                for index in 0..self.clients.len() {
                    if self.clients[index].taken.is_none() {
                        self.submit_of(index);
                    }
                }
                self.run_one();
                self.carry_out();
                self.sync();
                self.carry_out();
                self.look();
                self.now += 100;
                self.tell(Event::Tick);
                self.carry_out();
                let told = self.clients.iter().all(|c| c.taken.is_some() || c.refused);
                if told && self.runners.is_empty() && self.writing.is_none() {
                    break;
                }
            }
            self.die(model % 2 + 1);
        }
        for client in &self.clients {
            let Some(jobs) = client.taken else { continue };
            for job in jobs.first..=jobs.last {
                let kept = self.disk.endings.contains_key(&job);
                assert!(kept || self.disk.forgotten.contains(&job), "job {job} never ended");
            }
        }
        let open = self.ledger.list(None, ALL, usize::MAX);
        assert!(open.iter().all(|job| job.state.has_ended()), "{open:?}");
    }
}

fn one(job: u64) -> JobRange {
    JobRange { first: job, last: job }
}

#[test]
fn random_histories_with_deaths_at_any_point() {
    let histories = std::env::var("LITE_LLM_HISTORIES");
    let histories = histories.ok().and_then(|n| n.parse().ok()).unwrap_or(HISTORIES);
    let (mut ended, mut taken) = (0, 0);
    for seed in 0..histories {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..200 {
                world.step();
            }
            world.finish();
            let done = world.seen.values().filter(|state| **state == DetachedState::Length);
            (done.count(), world.clients.iter().filter(|c| c.taken.is_some()).count())
        });
        let (jobs, batches) = outcome.unwrap_or_else(|_| panic!("seed {seed}"));
        ended += jobs;
        taken += batches;
    }
    // Histories in which nothing happens show nothing.
    assert!(ended as u64 > histories && taken as u64 > histories, "{ended} jobs, {taken} batches");
}
