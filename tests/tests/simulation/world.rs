//! A whole cluster in virtual time: the machines of coordinator, nodes and jobs, a network between
//! them, and faults.
//!
//! What is real: [`Cluster`] (membership, placement, liveness, homes), [`JobProgress`],
//! [`LaneMachine`] with the engine and a tiny model, and the frames between lanes. What stands in for
//! shells: starting and ending processes, dialling, loading (time passes), job streams.
//!
//! One seed gives one history: time is virtual, and every choice is drawn from the seed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    hash::Hasher,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use lite_llm_actors::{
    cluster::{Cluster, Command, Event, Vitals},
    coordinator::progress::{JobProgress, Next, Take},
    lane::{self, Arrangement, LaneLimits, LaneMachine, LaneParts},
    membership::{Holding, MembershipOptions, Plan, State},
    placement::PlacementPolicy,
};
use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    backbone::Backbone,
    engine::{self, Engine},
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
    sequence::Request,
    store::DramStore,
};
use lite_llm_transport::{
    frame::{Frame, OutgoingFrame},
    messages::{EndReason, ExpertBatchView, ExpertReplyView, JobEventBody, NodeInfo},
    pool::BufferPool,
};

use crate::network::{Conn, IDLE, Network, Process};

/// A model that all histories share.
pub(crate) struct Model {
    pub(crate) backbone: Arc<Backbone<Cpu>>,
    pub(crate) store: Arc<DramStore>,
    pub(crate) expert_bytes: Vec<u64>,
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
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
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
    computing: bool,
    progress: u64,
    /// Job streams: their sequences in the lane.
    streams: BTreeMap<u64, u64>,
    sequences: BTreeMap<u64, u64>,
    next_sequence: u64,
    slow: u32,
    stuck_until: Duration,
    ticks: Option<Duration>,
    dismissed: bool,
}

/// What runs in the coordinator's process.
struct Head {
    cluster: Cluster,
    workers: BTreeMap<String, Conn>,
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
    frozen: Vec<Option<Duration>>,
    /// What waits for a frozen process.
    nodes: Vec<Option<Node>>,
    head: Option<Head>,
    jobs: Vec<Job>,
    streams: u64,
    budget: u64,
    copies: u16,
    workers: usize,
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
        let workers = 2 + dice.below(3) as usize;
        let copies = 1 + dice.below(2) as u16;
        let config = &model.backbone.config;
        let all: u64 =
            config.expert_keys().map(|key| model.expert_bytes[usize::from(key.tier)]).sum();
        // Room for all at one worker, or just enough that nobody can be missed.
        let budget = match dice.chance(70) {
            true => all,
            false => (all * u64::from(copies)).div_ceil(workers as u64) * 5 / 4,
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
            defect,
            defects_left: 1,
            pool: BufferPool::default(),
            trace: std::hash::DefaultHasher::new(),
            events: 0,
            wrong: None,
            injected: BTreeMap::new(),
        };
        for process in 0..processes {
            world.after(Duration::ZERO, What::Start(process));
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
            let number = number as u64;
            self.jobs.push(Job { request, progress, place, read: Vec::new(), ends: 0, number });
            let at = self.dice.between(ms(0), s(5));
            self.after(at, What::Submit(number as usize));
        }
        let mut end = Duration::ZERO;
        for _ in 0..faults {
            let at = self.dice.between(ms(100), s(6));
            let lasts = self.dice.between(ms(50), s(4));
            let process = self.dice.below(self.workers as u64 + 1) as usize;
            let other = self.dice.below(self.workers as u64 + 1) as usize;
            let worker = self.dice.below(self.workers as u64) as usize;
            end = end.max(at + lasts);
            let name = match self.dice.below(6) {
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
            What::Submit(job) => self.submit(job),
        }
    }

    // ---- the network ----

    fn is_silent(&self, a: Process, b: Process) -> bool {
        let down = |process: Process| !self.alive[process] || self.frozen[process].is_some();
        down(a) || down(b) || self.network.is_cut(a, b) || self.network.is_cut(b, a)
    }

    /// Notes which connections nothing gets through.
    fn look_at_silence(&mut self) {
        let conns: Vec<(Conn, [Process; 2], Option<Duration>)> = self
            .network
            .connections
            .iter()
            .map(|(&conn, connection)| (conn, connection.ends, connection.silent))
            .collect();
        for (conn, [a, b], before) in conns {
            let silent = self.network.connections[&conn].dead || self.is_silent(a, b);
            if silent && before.is_none() {
                let since = self.now;
                self.network.connections.get_mut(&conn).unwrap().silent = Some(since);
                self.after(since + IDLE, What::Idle { conn, since });
            } else if !silent {
                self.network.connections.get_mut(&conn).unwrap().silent = None;
            }
        }
    }

    /// Ends a connection; both ends are told.
    fn close(&mut self, conn: Conn) {
        let Some(connection) = self.network.connections.remove(&conn) else { return };
        self.held.retain(|(held, _), _| *held != conn);
        for to in connection.ends {
            let life = self.lives[to];
            self.after(self.now, What::Lost { conn, to, life });
        }
    }

    fn send(&mut self, conn: Conn, from: Process, message: Message) {
        let micros = Duration::from_micros;
        let delay = self.dice.between(micros(50), micros(2000));
        let Some(to) = self.network.other(conn, from) else { return };
        if let Some(at) = self.network.arrival(conn, from, self.now, delay) {
            let life = self.lives[to];
            self.after(at, What::Arrives { conn, to, life, message });
        }
    }

    fn arrives(&mut self, conn: Conn, to: Process, life: u64, message: Message) {
        let Some(from) = self.network.other(conn, to) else { return };
        let held = self.held.entry((conn, to)).or_default();
        if self.network.is_cut(from, to) || !held.is_empty() {
            // It is sent again until it gets through, in order, or the connection is lost.
            return held.push_back((life, message));
        }
        self.hears(conn, to, message);
    }

    /// What was held back on a link that is mended arrives.
    fn release(&mut self, from: Process, to: Process) {
        if self.network.is_cut(from, to) {
            return;
        }
        let conns: Vec<Conn> = self
            .held
            .keys()
            .filter(|(conn, end)| *end == to && self.network.other(*conn, to) == Some(from))
            .map(|(conn, _)| *conn)
            .collect();
        for conn in conns {
            for (life, message) in self.held.remove(&(conn, to)).into_iter().flatten() {
                self.after(self.now, What::Arrives { conn, to, life, message });
            }
        }
    }

    fn hears(&mut self, conn: Conn, to: Process, message: Message) {
        match to == self.head_process() {
            true => self.head_hears(conn, message),
            false => self.node_hears(to, conn, message),
        }
    }

    fn lost(&mut self, conn: Conn, to: Process) {
        if to == self.head_process() {
            let Some(head) = &mut self.head else { return };
            let name = head.workers.iter().find(|(_, kept)| **kept == conn);
            let Some(name) = name.map(|(name, _)| name.clone()) else { return };
            head.workers.remove(&name);
            let reason = "it did not answer".to_owned();
            let now = self.base + self.now;
            head.cluster.handle(now, Event::Gone { name, reason });
            self.leave_conn(conn);
            self.head_does();
            return;
        }
        let now = self.instant();
        let Some(node) = &mut self.nodes[to] else { return };
        if node.head == Some(conn) {
            node.head = None;
            node.serving = None;
            let ended: Vec<u64> = node.streams.keys().copied().collect();
            for stream in ended {
                self.end_stream(to, stream);
            }
            let life = self.lives[to];
            let at = self.now + Duration::from_millis(100);
            self.after(at, What::Reconnect { node: to, life });
        } else {
            node.links.retain(|_, kept| *kept != conn);
            let down: Vec<u16> =
                node.up.iter().filter(|(_, c)| **c == conn).map(|(&peer, _)| peer).collect();
            for &peer in &down {
                node.up.remove(&peer);
                let reason = "the link is gone".to_owned();
                if let Some(lane) = &mut node.lane
                    && self.defect != Some(Defect::LostResend)
                {
                    lane.handle(now, lane::Event::PeerLost { peer, reason });
                }
            }
            for peer in down {
                let life = self.lives[to];
                let at = self.now + Duration::from_millis(50);
                self.after(at, What::Dial { node: to, life, peer });
            }
        }
        self.node_does(to);
    }

    // ---- processes ----

    fn start(&mut self, process: Process) {
        if self.alive[process] {
            return;
        }
        self.alive[process] = true;
        self.frozen[process] = None;
        self.lives[process] += 1;
        let life = self.lives[process];
        if process == self.head_process() {
            let config = self.model.backbone.config.clone();
            let cluster = Cluster::new(MembershipOptions {
                config,
                expert_bytes: self.model.expert_bytes.clone(),
                workers: self.workers,
                copies: self.copies,
                policy: PlacementPolicy::Balanced,
            });
            self.head = Some(Head { cluster, workers: BTreeMap::new(), ticks: None });
            self.after(self.now, What::Tick { process, life });
            // Clients that lost the coordinator submit again, from what they have read.
            let open: Vec<usize> =
                (0..self.jobs.len()).filter(|&job| self.jobs[job].place != Place::Ended).collect();
            for job in open {
                if self.jobs[job].place != Place::Nowhere || !self.jobs[job].read.is_empty() {
                    let at = self.now + Duration::from_millis(300);
                    self.jobs[job].place = Place::Nowhere;
                    self.after(at, What::Submit(job));
                }
            }
        } else {
            let wrong = self.defect == Some(Defect::ReplicaDiffers) && process == 0;
            let held = Held { all: self.model.store.clone(), here: Mutex::default(), wrong };
            self.nodes[process] = Some(Node {
                lane: None,
                held: Arc::new(held),
                holding: None,
                serving: None,
                assignments: VecDeque::new(),
                loading: false,
                head: None,
                links: BTreeMap::new(),
                up: BTreeMap::new(),
                computing: false,
                progress: 0,
                streams: BTreeMap::new(),
                sequences: BTreeMap::new(),
                next_sequence: 0,
                slow: 1,
                stuck_until: Duration::ZERO,
                ticks: None,
                dismissed: false,
            });
            self.after(self.now, What::Reconnect { node: process, life });
        }
        self.look_at_silence();
    }

    fn kill(&mut self, process: Process) {
        if !self.alive[process] {
            return;
        }
        self.alive[process] = false;
        self.frozen[process] = None;
        for connection in self.network.connections.values_mut() {
            connection.dead |= connection.ends.contains(&process);
        }
        match process == self.head_process() {
            true => self.head = None,
            false => self.nodes[process] = None,
        }
        self.look_at_silence();
    }

    fn tick(&mut self, process: Process) {
        let now = self.instant();
        if process == self.head_process() {
            let Some(head) = &mut self.head else { return };
            head.ticks = None;
            head.cluster.handle(now, Event::Tick);
            self.head_does();
        } else if let Some(node) = &mut self.nodes[process] {
            node.ticks = None;
            if let Some(lane) = &mut node.lane
                && lane.poll_timeout().is_some_and(|at| at <= now)
            {
                lane.handle(now, lane::Event::Tick);
            }
            self.node_does(process);
        }
    }

    // ---- the coordinator's shell ----

    fn name(process: Process) -> String {
        format!("w{process}")
    }

    fn process(name: &str) -> Process {
        name[1..].parse().unwrap()
    }

    fn head_hears(&mut self, conn: Conn, message: Message) {
        let now = self.instant();
        let Some(head) = &mut self.head else { return };
        let name = head.workers.iter().find(|(_, c)| **c == conn).map(|(name, _)| name.clone());
        let event =
            match message {
                Message::Hello { info, holding } => {
                    let before = head.workers.insert(info.name.clone(), conn);
                    let event = Event::Here { info, holding };
                    if let Some(before) = before.filter(|before| *before != conn) {
                        self.leave_conn(before);
                        self.close(before);
                    }
                    Some(event)
                }
                Message::Vitals { incarnation, vitals } => {
                    name.map(|name| Event::Vitals { name, incarnation, vitals: Some(vitals) })
                }
                Message::Assigned { incarnation, epoch, serves } => name.map(|name| {
                    Event::Assigned { name, incarnation, epoch, serves, result: Ok(()) }
                }),
                Message::JobEvent { stream, body } => {
                    self.job_event(conn, stream, body);
                    None
                }
                _ => None,
            };
        if let (Some(event), Some(head)) = (event, &mut self.head) {
            head.cluster.handle(now, event);
        }
        self.head_does();
    }

    fn head_does(&mut self) {
        let head_process = self.head_process();
        loop {
            let Some(head) = &mut self.head else { return };
            let Some(command) = head.cluster.poll_command() else { break };
            let conn = |name: &str| head.workers.get(name).copied();
            match command {
                Command::Ask { name, incarnation } => {
                    if let Some(conn) = conn(&name) {
                        self.send(conn, head_process, Message::Ask { incarnation });
                    }
                }
                Command::Assign { name, incarnation, plan, serves } => {
                    if let Some(conn) = conn(&name) {
                        let message = Message::Assign { incarnation, plan, serves };
                        self.send(conn, head_process, message);
                    }
                }
                Command::Suspects { name, suspects } => {
                    if let Some(conn) = conn(&name) {
                        self.send(conn, head_process, Message::Suspects(suspects));
                    }
                }
                Command::Leave { name, .. } => {
                    let node = Self::process(&name);
                    for job in 0..self.jobs.len() {
                        if let Place::At { conn, stream, node: at } = self.jobs[job].place
                            && at == node
                        {
                            self.send(conn, head_process, Message::EndJob { stream });
                            self.job_lost(job);
                        }
                    }
                }
                Command::Home { job, name } => {
                    let conn = conn(&name);
                    self.go_home(job as usize, conn, &name);
                }
                Command::Close { name, .. } => {
                    if let Some(conn) = head.workers.remove(&name) {
                        self.leave_conn(conn);
                        self.close(conn);
                    }
                }
                Command::Dismiss { name, reason } => {
                    if let Some(conn) = conn(&name) {
                        self.send(conn, head_process, Message::Dismiss);
                    }
                    self.fail(format!("{name} is sent away: {reason}"));
                }
            }
        }
        self.arm_head();
    }

    fn arm_head(&mut self) {
        let (base, now) = (self.base, self.now);
        let process = self.head_process();
        let life = self.lives[process];
        let Some(head) = &mut self.head else { return };
        let due = head.cluster.poll_timeout().map(|at| at.saturating_duration_since(base));
        if let Some(due) = due.map(|due| due.max(now + Duration::from_millis(1)))
            && head.ticks.is_none_or(|at| due < at)
        {
            head.ticks = Some(due);
            self.after(due, What::Tick { process, life });
        }
    }

    // ---- jobs ----

    fn submit(&mut self, job: usize) {
        if self.jobs[job].place == Place::Ended {
            return;
        }
        if self.head.is_none() {
            // The client tries again; a coordinator that starts finds it.
            self.jobs[job].place = Place::Nowhere;
            let again = self.now + Duration::from_millis(250);
            return self.after(again, What::Submit(job));
        }
        if self.jobs[job].place != Place::Nowhere {
            return;
        }
        let (request, read) = (self.jobs[job].request, self.jobs[job].read.clone());
        self.jobs[job].progress = self.fresh(request, read);
        self.wants(job);
    }

    fn wants(&mut self, job: usize) {
        let now = self.instant();
        self.jobs[job].place = Place::Wanting;
        if let Some(head) = &mut self.head {
            head.cluster.handle(now, Event::Wants { job: job as u64 });
        }
        self.head_does();
    }

    fn go_home(&mut self, job: usize, conn: Option<Conn>, name: &str) {
        if self.jobs[job].place != Place::Wanting {
            return;
        }
        let Some(conn) = conn else { return self.wants(job) };
        self.streams += 1;
        let (stream, node) = (self.streams, Self::process(name));
        self.jobs[job].place = Place::At { conn, stream, node };
        let generated = self.jobs[job].progress.generated().to_vec();
        self.send(conn, self.head_process(), Message::Job { stream, job, generated });
    }

    /// All jobs of a connection that is gone go elsewhere.
    fn leave_conn(&mut self, gone: Conn) {
        for job in 0..self.jobs.len() {
            if matches!(self.jobs[job].place, Place::At { conn, .. } if conn == gone) {
                self.job_lost(job);
            }
        }
    }

    fn job_lost(&mut self, job: usize) {
        self.jobs[job].place = Place::Nowhere;
        match self.jobs[job].progress.lost() {
            Next::Again(attempt) => {
                self.after(self.now, What::Offer { job, attempt });
            }
            Next::GiveUp(body) => self.fail(format!("job {job} was given up: {body:?}")),
            Next::Ended => {}
        }
    }

    fn job_event(&mut self, conn: Conn, stream: u64, body: JobEventBody) {
        let at = |job: &Job| matches!(job.place, Place::At { conn: c, stream: s, .. } if (c, s) == (conn, stream));
        let Some(job) = self.jobs.iter().position(at) else { return };
        if let JobEventBody::NotTaken { .. } = body {
            self.jobs[job].place = Place::Nowhere;
            let attempt = self.jobs[job].progress.attempt();
            let now = self.instant();
            if let Some(head) = &mut self.head {
                head.cluster.handle(now, Event::Left { job: job as u64 });
            }
            let again = self.now + Duration::from_millis(100);
            return self.after(again, What::Offer { job, attempt });
        }
        let attempt = self.jobs[job].progress.attempt();
        match self.jobs[job].progress.take(attempt, body) {
            Take::Drop => {}
            Take::Pass(body) => self.read(job, body),
            Take::Last(body) => {
                self.read(job, body.clone());
                if self.defect == Some(Defect::EndTwice) && self.defects_left > 0 {
                    self.defects_left -= 1;
                    self.read(job, body);
                }
                self.jobs[job].place = Place::Ended;
                let now = self.instant();
                if let Some(head) = &mut self.head {
                    head.cluster.handle(now, Event::Left { job: job as u64 });
                }
            }
            Take::Violation(reason) => self.fail(format!("job {job}: {reason}")),
        }
    }

    /// What the reader of a job gets.
    fn read(&mut self, job: usize, body: JobEventBody) {
        let expected = &self.model.jobs[self.jobs[job].request].1;
        let reader = &mut self.jobs[job];
        if reader.ends > 0 {
            return self.fail(format!("job {job} was told {body:?} after its end"));
        }
        match body {
            JobEventBody::Token { index, id, .. } => {
                self.trace.write_u32(id);
                reader.read.push(id);
                let at = reader.read.len() - 1;
                if index as usize != at || expected.get(at) != Some(&id) {
                    let right = expected.get(at).copied();
                    self.fail(format!("job {job}: token {index} is {id}, not {right:?} of {at}"));
                }
            }
            JobEventBody::Done { .. } => {
                reader.ends += 1;
                if reader.read != *expected {
                    let (found, right) = (reader.read.len(), expected.len());
                    self.fail(format!("job {job} ended with {found} of {right} tokens"));
                }
            }
            JobEventBody::Failed { reason } => self.fail(format!("job {job} failed: {reason}")),
            _ => {}
        }
    }

    // ---- a node's shell ----

    fn reconnect(&mut self, process: Process) {
        let head = self.head_process();
        let life = self.lives[process];
        let Some(node) = &self.nodes[process] else { return };
        if node.head.is_some() || node.dismissed {
            return;
        }
        if self.is_silent(process, head) {
            let again = self.now + Duration::from_millis(200);
            return self.after(again, What::Reconnect { node: process, life });
        }
        let conn = self.network.open(process, head, self.now);
        let holding = node.holding.as_ref().map(|plan| Holding {
            epoch: plan.epoch,
            nodes: plan.nodes.iter().map(|node| node.name.clone()).collect(),
            you: plan.index,
            rules: plan.placement.rules().to_vec(),
        });
        let info = NodeInfo {
            name: Self::name(process),
            address: format!("w{process}:{life}"),
            release: String::new(),
            protocol: 1,
            determinism: 1,
            budget_bytes: self.budget,
            threads: 1,
            pid: life as u32,
        };
        let node = self.nodes[process].as_mut().unwrap();
        node.head = Some(conn);
        node.serving = None;
        self.send(conn, process, Message::Hello { info, holding });
    }

    fn node_hears(&mut self, process: Process, conn: Conn, message: Message) {
        let now = self.instant();
        let life = self.lives[process];
        let Some(node) = &mut self.nodes[process] else { return };
        match message {
            Message::Ask { incarnation } => {
                let serving = node.serving.as_ref();
                let wanted = serving.iter().flat_map(|plan| (0u16..).zip(&plan.nodes));
                let others = wanted.filter(|(i, peer)| {
                    !peer.name.is_empty()
                        && Some(*i) != serving.map(|plan| plan.index)
                        && !node.up.contains_key(i)
                });
                let unreachable = others.map(|(_, peer)| peer.name.clone()).collect();
                let busy = node.computing;
                let vitals = Vitals { busy, progress: node.progress, unreachable };
                self.send(conn, process, Message::Vitals { incarnation, vitals });
            }
            Message::Assign { incarnation, plan, serves } => {
                node.assignments.push_back((conn, incarnation, plan, serves));
                self.load(process);
            }
            Message::Suspects(names) => {
                if let Some(lane) = &mut node.lane {
                    lane.handle(now, lane::Event::Suspects(names));
                }
            }
            Message::Dismiss => node.dismissed = true,
            Message::Job { stream, job, generated } => {
                let request = &self.model.jobs[self.jobs[job].request].0;
                let request = Request { generated, ..request.clone() };
                match &mut node.lane {
                    None => {
                        let body = JobEventBody::NotTaken { reason: "no lane".into() };
                        self.send(conn, process, Message::JobEvent { stream, body });
                    }
                    Some(lane) => {
                        let sequence = node.next_sequence;
                        node.next_sequence += 1;
                        node.streams.insert(stream, sequence);
                        node.sequences.insert(sequence, stream);
                        lane.handle(now, lane::Event::Start { sequence, request });
                    }
                }
            }
            Message::EndJob { stream } => self.end_stream(process, stream),
            Message::Batch(frame) => {
                let view = ExpertBatchView::check(&frame).unwrap();
                match &mut node.lane {
                    Some(lane) => lane.handle(now, lane::Event::Batch { view, reply: conn }),
                    None => {
                        let id = view.head().id;
                        let failure =
                            lite_llm_transport::messages::ExpertFailure::new(id, "no lane");
                        let frame = OutgoingFrame::message(&failure).unwrap();
                        let frame = self.copied(&frame);
                        self.send(conn, process, Message::Reply(frame));
                    }
                }
            }
            Message::Reply(frame) => {
                let reply = ExpertReplyView::check(&frame).unwrap();
                let peer = node.up.iter().find(|(_, kept)| **kept == conn).map(|(&peer, _)| peer);
                if let (Some(peer), Some(lane)) = (peer, &mut node.lane) {
                    lane.handle(now, lane::Event::Reply { peer, reply });
                }
            }
            _ => {}
        }
        let _ = life;
        self.node_does(process);
    }

    fn copied(&self, frame: &OutgoingFrame) -> Frame {
        Frame::copied(frame.kind(), frame.bytes(), &self.pool).unwrap()
    }

    fn end_stream(&mut self, process: Process, stream: u64) {
        let now = self.instant();
        let Some(node) = &mut self.nodes[process] else { return };
        if let Some(sequence) = node.streams.remove(&stream) {
            node.sequences.remove(&sequence);
            if let Some(lane) = &mut node.lane {
                lane.handle(now, lane::Event::Cancel(sequence));
            }
        }
    }

    /// Begins the next assignment.
    fn load(&mut self, process: Process) {
        let life = self.lives[process];
        let ms = Duration::from_millis;
        let Some(node) = &mut self.nodes[process] else { return };
        if node.loading || node.assignments.is_empty() {
            return;
        }
        node.loading = true;
        let (_, _, plan, _) = &node.assignments[0];
        let config = &self.model.backbone.config;
        let mut here = node.held.here.lock().unwrap();
        let keep = |key: &ExpertKey| {
            let serving = node.serving.as_ref();
            serving.is_some_and(|plan| plan.placement.holds(plan.index, *key))
                || plan.placement.holds(plan.index, *key)
        };
        here.retain(keep);
        let wanted = config.expert_keys().filter(|key| plan.placement.holds(plan.index, *key));
        let missing = wanted.filter(|key| !here.contains(key)).count();
        let bytes = self.model.expert_bytes[0];
        let total = (here.len() + missing) as u64 * bytes;
        drop(here);
        if total > self.budget {
            let (name, budget) = (Self::name(process), self.budget);
            return self.fail(format!("{name} is to hold {total} bytes of {budget}"));
        }
        let time = match missing {
            0 => Duration::ZERO,
            _ => self.dice.between(ms(5), ms(400)),
        };
        self.after(self.now + time, What::Load { node: process, life });
    }

    /// An assignment is done.
    fn loaded(&mut self, process: Process) {
        let (now, defect) = (self.instant(), self.defect);
        let Some(node) = &mut self.nodes[process] else { return };
        node.loading = false;
        let Some((conn, incarnation, plan, serves)) = node.assignments.pop_front() else { return };
        let config = &self.model.backbone.config;
        {
            let mut here = node.held.here.lock().unwrap();
            let keys = config.expert_keys().filter(|key| plan.placement.holds(plan.index, *key));
            here.extend(keys);
        }
        node.holding = Some(plan.clone());
        let epoch = plan.epoch;
        if defect == Some(Defect::StaleEpoch)
            && serves
            && self.defects_left > 0
            && let Some(before) = node.serving.clone().filter(|before| before.epoch < epoch)
        {
            self.defects_left -= 1;
            node.assignments.push_back((conn, incarnation, before, true));
        }
        if serves && node.head == Some(conn) {
            let arrangement = Arrangement {
                placement: Arc::new(plan.placement.clone()),
                me: plan.index,
                nodes: plan.nodes.clone(),
            };
            match &mut node.lane {
                Some(lane) => lane.handle(now, lane::Event::Rearrange(arrangement)),
                None => {
                    let engine = Engine::new(self.model.backbone.clone(), 1 << 22).unwrap();
                    node.lane = Some(LaneMachine::new(LaneParts {
                        engine,
                        store: node.held.clone(),
                        arrangement,
                        buffers: self.pool.clone(),
                        limits: LaneLimits {
                            patience: Duration::from_secs(600),
                            ..LaneLimits::default()
                        },
                    }));
                }
            }
            node.held.here.lock().unwrap().retain(|key| plan.placement.holds(plan.index, *key));
            self.relink(process, plan);
        }
        if self.nodes[process].as_ref().is_some_and(|node| node.head == Some(conn)) {
            self.send(conn, process, Message::Assigned { incarnation, epoch, serves });
        }
        self.load(process);
        self.node_does(process);
    }

    /// Keeps links to the nodes of a plan.
    fn relink(&mut self, process: Process, plan: Plan) {
        let life = self.lives[process];
        let node = self.nodes[process].as_mut().unwrap();
        let before = node.serving.replace(plan.clone());
        // The links of indices that mean the same process as before stay.
        let same = |index: &u16| {
            let i = usize::from(*index);
            let address = |plan: &Plan| plan.nodes.get(i).map(|node| node.address.clone());
            before.as_ref().is_some_and(|before| address(before) == address(&plan))
        };
        let links = node.links.clone();
        node.up.retain(|index, conn| {
            let other = plan.nodes.get(usize::from(*index)).filter(|node| !node.name.is_empty());
            let to = other.map(|node| Self::process(&node.name));
            same(index) && to.is_some_and(|to| links.get(&to) == Some(conn))
        });
        for (peer, other) in (0u16..).zip(&plan.nodes) {
            if peer != plan.index && !other.name.is_empty() {
                self.after(self.now, What::Dial { node: process, life, peer });
            }
        }
    }

    /// Tries to have a link to another node.
    fn dial(&mut self, process: Process, peer: u16) {
        let (now, life) = (self.instant(), self.lives[process]);
        let Some(node) = &self.nodes[process] else { return };
        let Some(plan) = &node.serving else { return };
        let Some(other) = plan.nodes.get(usize::from(peer)) else { return };
        if node.up.contains_key(&peer) || other.name.is_empty() || peer == plan.index {
            return;
        }
        let (to, dials) = (Self::process(&other.name), peer < plan.index);
        let same_life = other.address == format!("w{to}:{}", self.lives[to]);
        let linked = node.links.get(&to).copied();
        let linked = linked.filter(|conn| self.network.connections.contains_key(conn));
        let conn = match linked {
            Some(conn) => Some(conn),
            None if dials && same_life && !self.is_silent(process, to) => {
                let conn = self.network.open(process, to, self.now);
                if let Some(other) = &mut self.nodes[to] {
                    other.links.insert(process, conn);
                }
                self.nodes[process].as_mut().unwrap().links.insert(to, conn);
                Some(conn)
            }
            None => None,
        };
        match conn {
            Some(conn) => {
                let node = self.nodes[process].as_mut().unwrap();
                node.up.insert(peer, conn);
                if let Some(lane) = &mut node.lane {
                    lane.handle(now, lane::Event::PeerUp { peer });
                }
                self.node_does(process);
            }
            None => {
                let pause =
                    self.dice.between(Duration::from_millis(50), Duration::from_millis(500));
                self.after(self.now + pause, What::Dial { node: process, life, peer });
            }
        }
    }

    /// Carries out what a node's lane wants.
    fn node_does(&mut self, process: Process) {
        loop {
            let now = self.instant();
            let life = self.lives[process];
            let Some(node) = &mut self.nodes[process] else { return };
            let Some(lane) = &mut node.lane else { return };
            let Some(command) = lane.poll_command() else { break };
            match command {
                lane::Command::Send { id, peer, frame } => match node.up.get(&peer).copied() {
                    Some(conn) => {
                        let frame = self.copied(&frame);
                        self.send(conn, process, Message::Batch(frame));
                    }
                    None => {
                        let reason = "there is no link".to_owned();
                        lane.handle(now, lane::Event::Undelivered { id, peer, reason });
                    }
                },
                lane::Command::Answer { reply, frame } => {
                    let frame = self.copied(&frame);
                    self.send(reply, process, Message::Reply(frame));
                }
                lane::Command::Publish(event) => self.publish(process, event),
                lane::Command::NotTaken { sequence, reason } => {
                    let body = JobEventBody::NotTaken { reason };
                    self.tell_head(process, sequence, body);
                }
                lane::Command::Compute => {
                    node.computing = true;
                    let micros = Duration::from_micros;
                    let time = self.dice.between(micros(100), micros(1500));
                    let node = self.nodes[process].as_ref().unwrap();
                    let done = (self.now + time * node.slow).max(node.stuck_until);
                    self.after(done, What::Computed { node: process, life });
                    break;
                }
            }
        }
        self.arm_node(process);
    }

    fn arm_node(&mut self, process: Process) {
        let (base, now, life) = (self.base, self.now, self.lives[process]);
        let Some(node) = &mut self.nodes[process] else { return };
        let due = node.lane.as_ref().and_then(LaneMachine::poll_timeout);
        let due = due.map(|at| at.saturating_duration_since(base).max(now));
        if let Some(due) = due
            && node.ticks.is_none_or(|at| due < at)
        {
            node.ticks = Some(due);
            self.after(due, What::Tick { process, life });
        }
    }

    fn computed(&mut self, process: Process) {
        let now = self.instant();
        let Some(node) = &mut self.nodes[process] else { return };
        node.computing = false;
        node.progress += 1;
        if let Some(lane) = &mut node.lane {
            lane.compute(now);
        }
        self.node_does(process);
    }

    fn publish(&mut self, process: Process, event: engine::Event) {
        let (sequence, body) = match event {
            engine::Event::Token { sequence, index, id } => {
                let mut index = index as u32;
                if self.defect == Some(Defect::TokenTwice) && self.defects_left > 0 && index > 0 {
                    self.defects_left -= 1;
                    index += 1;
                }
                (sequence, JobEventBody::Token { index, id, text: None })
            }
            engine::Event::Prefilled { sequence, done, total } => {
                let (prefilled, total) = (done as u32, total as u32);
                (sequence, JobEventBody::Progress { prefilled, total })
            }
            engine::Event::Ended { sequence, reason, generated } => {
                let generated = generated as u32;
                let reason = match reason {
                    lite_llm_runtime::sequence::EndReason::Cancelled => return,
                    _ => EndReason::Length,
                };
                (sequence, JobEventBody::Done { reason, generated })
            }
            engine::Event::Failed { sequence, reason } => {
                (sequence, JobEventBody::Failed { reason })
            }
            engine::Event::Logits { .. } | engine::Event::Routes { .. } => return,
        };
        self.tell_head(process, sequence, body);
    }

    fn tell_head(&mut self, process: Process, sequence: u64, body: JobEventBody) {
        let Some(node) = &mut self.nodes[process] else { return };
        let Some(stream) = node.sequences.get(&sequence).copied() else { return };
        if body.is_last() {
            node.sequences.remove(&sequence);
            node.streams.remove(&stream);
        }
        if let Some(conn) = node.head {
            self.send(conn, process, Message::JobEvent { stream, body });
        }
    }
}
