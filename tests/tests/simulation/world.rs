//! A whole cluster in virtual time: the machines of coordinator, nodes and jobs, a network between
//! them, and faults.
//!
//! What is real: [`Cluster`] (membership, placement, liveness, homes), [`JobProgress`],
//! [`LaneMachine`] with the engine and a tiny model, and the frames between lanes. What stands in for
//! shells: starting and ending processes, dialling, loading (time passes), job streams.
//!
//! One seed gives one history: time is virtual, and every choice is drawn from the seed.

mod head;
mod jobs;
mod node;
mod processes;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    hash::Hasher,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use lite_llm_actors::{
    cluster::{Cluster, Vitals},
    coordinator::progress::JobProgress,
    lane::LaneMachine,
    membership::{Holding, Plan, RETRY_DELAY, State},
};
use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
    random::{Purpose, random_u64},
    sequence::Request,
    store::DramStore,
};
use lite_llm_transport::{
    frame::Frame,
    messages::{JobEventBody, NodeInfo},
    pool::BufferPool,
};

use lite_llm_tests::tiny::TinyModel;

use crate::network::{Conn, Network, Process};

/// Far more than happens in any history: about 2,000.
const EVENTS_MAX: u64 = 1_000_000;

/// A model that all histories share.
pub(crate) struct Model {
    pub(crate) tiny: TinyModel,
    /// Requests, and what each of them generates by itself.
    pub(crate) jobs: Vec<(Request, Vec<u32>)>,
}

/// A defect put in on purpose, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Defect {
    /// A lane does not hear that a peer is lost, and sends nothing again.
    LostResend,
    /// A home repeats a token under the next number.
    TokenTwice,
    /// A node that was told to serve an epoch goes back to the one before.
    StaleEpoch,
    /// A replica computes something else.
    ReplicaDiffers,
    /// A reader is told the end twice.
    EndTwice,
}

/// Draws numbers from a seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = random_u64(self.0, Purpose::Placement, 0);
        self.0
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn between(&mut self, from: Duration, to: Duration) -> Duration {
        from + Duration::from_micros(self.below((to - from).as_micros() as u64 + 1))
    }
}

/// The experts that a node has loaded, of those that all share.
struct Held {
    all: Arc<DramStore>,
    here: Mutex<BTreeSet<ExpertKey>>,
    /// It computes with another expert's weights.
    wrong: bool,
}

impl ExpertStore for Held {
    fn fetch(&self, key: ExpertKey) -> Result<Arc<GatedMlp>, StoreError> {
        if !self.here.lock().unwrap().contains(&key) {
            return Err(StoreError::NotHere { key });
        }
        let other = ExpertKey { expert: key.expert ^ 1, ..key };
        self.all.fetch(if self.wrong { other } else { key })
    }

    fn resident_bytes(&self) -> u64 {
        0
    }
}

/// What goes over a connection.
enum Message {
    /// A worker is there.
    Hello {
        info: NodeInfo,
        holding: Option<Holding>,
    },
    Ask {
        incarnation: u64,
    },
    Vitals {
        incarnation: u64,
        vitals: Vitals,
    },
    Assign {
        incarnation: u64,
        plan: Plan,
        serves: bool,
    },
    Assigned {
        incarnation: u64,
        epoch: u64,
        serves: bool,
        result: Result<(), String>,
    },
    Suspects(Vec<String>),
    Dismiss,
    Job {
        stream: u64,
        job: usize,
        generated: Vec<u32>,
    },
    /// The stream of a job is closed.
    EndJob {
        stream: u64,
    },
    JobEvent {
        stream: u64,
        body: JobEventBody,
    },
    Batch(Frame),
    Reply(Frame),
}

/// What happens at a time.
enum What {
    Arrives {
        conn: Conn,
        to: Process,
        life: u64,
        message: Message,
    },
    /// A connection may have been silent for too long.
    Idle {
        conn: Conn,
        since: Duration,
    },
    /// A process is told that its connection is gone.
    Lost {
        conn: Conn,
        to: Process,
        life: u64,
    },
    /// A lane's computation ends.
    Computed {
        node: Process,
        life: u64,
    },
    /// A machine's deadline.
    Tick {
        process: Process,
        life: u64,
    },
    /// A worker tries to reach the coordinator.
    Reconnect {
        node: Process,
        life: u64,
    },
    /// A worker tries to reach another.
    Dial {
        node: Process,
        life: u64,
        peer: u16,
    },
    /// A node's loader goes on.
    Load {
        node: Process,
        life: u64,
    },
    /// A job is offered again.
    Offer {
        job: usize,
        attempt: u32,
    },
    Start(Process),
    Kill(Process),
    Freeze(Process, Duration),
    Thaw(Process),
    Cut(Process, Process),
    Mend(Process, Process),
    Slow(Process, u32),
    Stick(Process, Duration),
    FailLoads(Process, Duration),
    Drain(Process),
    Submit(usize),
}

struct Queued {
    at: Duration,
    number: u64,
    what: What,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// Where a lane's answer to a batch goes.
type ReplyTo = Conn;

/// What runs in a worker's process.
struct Node {
    lane: Option<LaneMachine<Cpu, ReplyTo>>,
    held: Arc<Held>,
    holding: Option<Plan>,
    /// Since the coordinator was joined.
    serving: Option<Plan>,
    assignments: VecDeque<(Conn, u64, Plan, bool)>,
    loading: bool,
    head: Option<Conn>,
    /// Connections to other workers, by their process.
    links: BTreeMap<Process, Conn>,
    /// Indices whose link the lane knows to be up, and the connection.
    up: BTreeMap<u16, Conn>,
    /// This node's index where they were made.
    me: Option<u16>,
    /// And to whom.
    addresses: BTreeMap<u16, String>,
    computing: bool,
    progress: u64,
    /// Job streams: their sequences in the lane.
    streams: BTreeMap<u64, u64>,
    sequences: BTreeMap<u64, u64>,
    next_sequence: u64,
    slow: u32,
    stuck_until: Duration,
    loads_fail_until: Duration,
    ticks: Option<Duration>,
}

/// What runs in the coordinator's process.
struct Head {
    cluster: Cluster,
    workers: BTreeMap<String, Conn>,
    /// The process that each of them last was, by its number.
    lives: BTreeMap<String, u64>,
    ticks: Option<Duration>,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Wanting,
    At { conn: Conn, stream: u64, node: Process },
    Ended,
}

/// A job, and its reader.
struct Job {
    request: usize,
    progress: JobProgress,
    place: Place,
    /// Its reader has asked for it.
    submitted: bool,
    /// Who did not take it lately.
    refused: Vec<String>,
    read: Vec<u32>,
    ends: u32,
    number: u64,
}

/// See the module's text.
pub(crate) struct World {
    model: Arc<Model>,
    pub(crate) dice: Dice,
    base: Instant,
    pub(crate) now: Duration,
    queue: BinaryHeap<Reverse<Queued>>,
    numbers: u64,
    network: Network,
    /// What cannot get through, by connection and receiver.
    held: BTreeMap<(Conn, Process), VecDeque<(u64, Message)>>,
    /// Lives of processes; the last is the coordinator.
    lives: Vec<u64>,
    alive: Vec<bool>,
    /// Until when processes are paused: what happens to them waits so long.
    frozen: Vec<Option<Duration>>,
    nodes: Vec<Option<Node>>,
    head: Option<Head>,
    jobs: Vec<Job>,
    streams: u64,
    budget: u64,
    copies: u16,
    /// All workers, and how many of them are there from the beginning.
    workers: usize,
    first: usize,
    /// Lives of workers that are being drained.
    drained: BTreeSet<(Process, u64)>,
    defect: Option<Defect>,
    defects_left: u32,
    pool: BufferPool,
    /// A digest of everything that happened.
    trace: std::hash::DefaultHasher,
    pub(crate) events: u64,
    /// What went wrong, if something did.
    pub(crate) wrong: Option<String>,
    pub(crate) injected: BTreeMap<&'static str, u64>,
}

impl World {
    pub(crate) fn new(model: Arc<Model>, seed: u64, defect: Option<Defect>) -> Self {
        let mut dice = Dice::new(seed);
        let first = 2 + dice.below(3) as usize;
        let workers = first + usize::from(dice.chance(25));
        let copies = 1 + dice.below(2) as u16;
        let config = &model.tiny.backbone.config;
        let all: u64 =
            config.expert_keys().map(|key| model.tiny.expert_bytes[usize::from(key.tier)]).sum();
        // Room for all at one worker, or just enough that nobody can be missed.
        let budget = match dice.chance(70) {
            true => all,
            false => (all * u64::from(copies)).div_ceil(first as u64) * 5 / 4,
        };
        let processes = workers + 1;
        let mut world = Self {
            model,
            dice,
            base: Instant::now(),
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            numbers: 0,
            network: Network::default(),
            held: BTreeMap::new(),
            lives: vec![0; processes],
            alive: vec![false; processes],
            frozen: vec![None; processes],
            nodes: (0..workers).map(|_| None).collect(),
            head: None,
            jobs: Vec::new(),
            streams: 0,
            budget: budget.min(all),
            copies,
            workers,
            first,
            drained: BTreeSet::new(),
            defect,
            defects_left: 1,
            pool: BufferPool::default(),
            trace: std::hash::DefaultHasher::new(),
            events: 0,
            wrong: None,
            injected: BTreeMap::new(),
        };
        for process in (0..first).chain([workers]) {
            world.after(Duration::ZERO, What::Start(process));
        }
        for newcomer in first..workers {
            let at = world.dice.between(Duration::from_millis(100), Duration::from_secs(5));
            world.after(at, What::Start(newcomer));
            *world.injected.entry("newcomer").or_default() += 1;
        }
        world
    }

    fn head_process(&self) -> Process {
        self.workers
    }

    /// Plans jobs and faults. Returns when the last fault is over.
    pub(crate) fn plan(&mut self, jobs: usize, faults: usize) -> Duration {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        for number in 0..jobs {
            let request = self.dice.below(self.model.jobs.len() as u64) as usize;
            let progress = self.fresh(request, Vec::new());
            let place = Place::Nowhere;
            let (read, refused) = (Vec::new(), Vec::new());
            let (ends, id) = (0, number as u64);
            let submitted = false;
            self.jobs.push(Job {
                request,
                progress,
                place,
                submitted,
                refused,
                read,
                ends,
                number: id,
            });
            let at = self.dice.between(ms(0), s(5));
            self.after(at, What::Submit(number));
        }
        let mut end = Duration::ZERO;
        for _ in 0..faults {
            let at = self.dice.between(ms(100), s(6));
            let lasts = self.dice.between(ms(50), s(4));
            let process = self.dice.below(self.workers as u64 + 1) as usize;
            let other = self.dice.below(self.workers as u64 + 1) as usize;
            let worker = self.dice.below(self.workers as u64) as usize;
            end = end.max(at + lasts);
            let name = match self.dice.below(8) {
                0 => {
                    self.after(at, What::Kill(process));
                    self.after(at + lasts, What::Start(process));
                    if process == self.head_process() {
                        "coordinator killed"
                    } else {
                        "worker killed"
                    }
                }
                1 => {
                    self.after(at, What::Freeze(process, at + lasts));
                    self.after(at + lasts, What::Thaw(process));
                    "paused"
                }
                2 if process != other => {
                    for (from, to) in [(process, other), (other, process)] {
                        self.after(at, What::Cut(from, to));
                        self.after(at + lasts, What::Mend(from, to));
                    }
                    "link cut"
                }
                3 if process != other => {
                    self.after(at, What::Cut(process, other));
                    self.after(at + lasts, What::Mend(process, other));
                    "link cut one way"
                }
                4 => {
                    self.after(at, What::Slow(worker, 50));
                    self.after(at + lasts, What::Slow(worker, 1));
                    "slowed"
                }
                5 => {
                    self.after(at, What::FailLoads(worker, at + lasts));
                    // Whoever could not load is left out for a while.
                    end = end.max(at + lasts + RETRY_DELAY);
                    "loads fail"
                }
                6 => {
                    self.after(at, What::Drain(worker));
                    self.after(at + lasts, What::Kill(worker));
                    self.after(at + lasts + ms(1), What::Start(worker));
                    "drained"
                }
                _ => {
                    self.after(at, What::Stick(worker, at + 3 * lasts));
                    end = end.max(at + 3 * lasts);
                    "compute thread stuck"
                }
            };
            *self.injected.entry(name).or_default() += 1;
        }
        end
    }

    fn fresh(&self, request: usize, read: Vec<u32>) -> JobProgress {
        let request = &self.model.jobs[request].0;
        JobProgress::new(request.prompt.len())
            .with_tokens_max(request.max_new_tokens as u32)
            .after(read)
    }

    fn instant(&self) -> Instant {
        self.base + self.now
    }

    fn after(&mut self, at: Duration, what: What) {
        self.numbers += 1;
        let at = at.max(self.now);
        self.queue.push(Reverse(Queued { at, number: self.numbers, what }));
    }

    fn fail(&mut self, what: String) {
        if self.wrong.is_none() {
            self.wrong = Some(format!("at {:?}: {what}", self.now));
        }
    }

    /// Whether all is well: every job ended, and the cluster serves with all that it has.
    pub(crate) fn is_whole(&self) -> bool {
        self.jobs.iter().all(|job| job.place == Place::Ended)
            && self.head.as_ref().is_some_and(|head| *head.cluster.state() == State::Ready)
            && self.alive.iter().all(|alive| *alive)
    }

    /// What is not well, for people.
    pub(crate) fn complaints(&self) -> String {
        let jobs = self.jobs.iter().filter(|job| job.place != Place::Ended);
        let jobs: Vec<_> = jobs.map(|job| (job.number, job.place, job.read.len())).collect();
        let head = self.head.as_ref();
        let state = head.map(|head| (head.cluster.state().clone(), head.cluster.missing()));
        let lanes: Vec<_> = self
            .nodes
            .iter()
            .map(|node| node.as_ref().map(|node| (node.up.clone(), node.computing, node.loading)))
            .collect();
        format!("jobs {jobs:?}; alive {:?}; {state:?}; lanes {lanes:?}", self.alive)
    }

    /// A digest of the history.
    pub(crate) fn digest(&self) -> u64 {
        self.trace.finish()
    }

    /// Goes on until a time, until all is whole after it, or until something is wrong.
    pub(crate) fn run(&mut self, quiet_after: Duration, limit: Duration) {
        while self.wrong.is_none() {
            if self.now > quiet_after && self.is_whole() {
                return;
            }
            let Some(Reverse(Queued { at, what, .. })) = self.queue.pop() else {
                let complaints = self.complaints();
                return self.fail(format!("nothing will ever happen: {complaints}"));
            };
            if at > limit {
                let complaints = self.complaints();
                return self.fail(format!("not whole by then: {complaints}"));
            }
            self.now = at;
            self.events += 1;
            if self.events > EVENTS_MAX {
                let complaints = self.complaints();
                return self.fail(format!("so much happens that something spins: {complaints}"));
            }
            self.trace.write_u64(at.as_nanos() as u64);
            self.happen(what);
        }
    }

    /// Whether a process can do something now; if it is frozen, what happens waits until it is not.
    fn is_here(&mut self, process: Process, life: u64) -> bool {
        self.alive[process] && self.lives[process] == life
    }

    fn happen(&mut self, what: What) {
        // What happens to a process that is frozen happens when it goes on.
        let of = match &what {
            What::Arrives { to, life, .. } | What::Lost { to, life, .. } => Some((*to, *life)),
            What::Computed { node, life }
            | What::Reconnect { node, life }
            | What::Dial { node, life, .. }
            | What::Load { node, life } => Some((*node, *life)),
            What::Tick { process, life } => Some((*process, *life)),
            What::Offer { .. } => Some((self.head_process(), self.lives[self.head_process()])),
            _ => None,
        };
        if let Some((process, life)) = of {
            if !self.is_here(process, life) {
                return;
            }
            if let Some(until) = self.frozen[process] {
                return self.after(until, what);
            }
        }
        match what {
            What::Arrives { conn, to, life, message } => self.arrives(conn, to, life, message),
            What::Idle { conn, since } => {
                let idle = self.network.connections.get(&conn);
                if idle.is_some_and(|connection| connection.silent == Some(since)) {
                    self.close(conn);
                }
            }
            What::Lost { conn, to, .. } => self.lost(conn, to),
            What::Computed { node, .. } => self.computed(node),
            What::Tick { process, .. } => self.tick(process),
            What::Reconnect { node, .. } => self.reconnect(node),
            What::Dial { node, peer, .. } => self.dial(node, peer),
            What::Load { node, .. } => self.loaded(node),
            What::Offer { job, attempt } => {
                let waits = self.jobs[job].place == Place::Nowhere;
                if waits && self.jobs[job].progress.attempt() == attempt {
                    self.wants(job);
                }
            }
            What::Start(process) => self.start(process),
            What::Kill(process) => self.kill(process),
            What::Freeze(process, until) => {
                if self.alive[process] && self.frozen[process].is_none() {
                    self.frozen[process] = Some(until);
                    self.look_at_silence();
                }
            }
            What::Thaw(process) => {
                if self.frozen[process].is_some_and(|until| until <= self.now) {
                    self.frozen[process] = None;
                    self.look_at_silence();
                }
            }
            What::Cut(from, to) => {
                self.network.cut(from, to);
                self.look_at_silence();
            }
            What::Mend(from, to) => {
                self.network.mend(from, to);
                self.look_at_silence();
                self.release(from, to);
            }
            What::Slow(node, factor) => {
                if let Some(node) = &mut self.nodes[node] {
                    node.slow = factor;
                }
            }
            What::Stick(node, until) => {
                if let Some(node) = &mut self.nodes[node] {
                    node.stuck_until = until;
                }
            }
            What::FailLoads(node, until) => {
                if let Some(node) = &mut self.nodes[node] {
                    node.loads_fail_until = until;
                }
            }
            What::Drain(process) => self.drain(process),
            What::Submit(job) => self.submit(job),
        }
    }
}
