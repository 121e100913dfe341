//! The coordinator actor: it owns membership, placement and the jobs of a cluster.
//!
//! It decides through pure machines ([`crate::cluster`], and one `JobProgress` per job) and acts
//! through messages. What takes time (a node that loads, a job that runs) is done beside its mailbox
//! and reported back.

mod detached;
mod handle;
mod job;
pub mod progress;
pub(crate) mod room;
mod tokens;
mod view;

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use lite_llm_kernels::kv::KvDType;
use lite_llm_runtime::{checkpoint::Checkpoint, config::ModelConfig, tokenizer::Tokenizer};
use lite_llm_transport::{
    connection::Connection,
    identity::Role,
    messages::{
        Assignment, ClusterStatus, NodeReport, NodeResidences, NodeStatus, NodeView, NodeVitals,
        Prompt, Revoked, RevokedNames,
    },
};
use ractor::{
    Actor, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent,
    pg::{self, GroupChangeMessage},
};
use ractor_cluster::RactorMessage;
use tokio::sync::watch;
use tracing::{info, warn};

pub(crate) use self::{handle::scope, job::CLIENT_EVENTS_MAX};
pub use self::{
    handle::{
        CoordinatorHandle, CoordinatorOptions, EncodeError, PROMPT_BYTES_MAX, PromptRoom,
        ServeError,
    },
    job::{JobHome, NotSubmitted, Submission},
};
use self::{job::Job, progress::JobProgress};
use crate::{
    cluster::{Cluster, Command, Event, Vitals},
    control::ControlPlane,
    liveness,
    membership::{Holding, MembershipOptions, Plan, State},
    node::{Loaded, NODES, NodeMessage, jobs},
    placement::PlacementPolicy,
    trace,
    wire::Wire,
    words,
};

/// How long a node may take to say who it is.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the clocks of the machines are looked at.
pub const TICK_INTERVAL: Duration = Duration::from_millis(50);
/// How long a worker whose node has stopped may take to close its connection by itself.
const LEAVES_WITHIN: Duration = Duration::from_secs(2);
/// As much of an address, and of what a node says that it is doing, as `status` shows.
const ADDRESS_BYTES_MAX: usize = 64;
const STATE_BYTES_MAX: usize = 1024;
/// Jobs that may run or wait at the nodes.
pub const JOBS_MAX: usize = 4096;

/// What a coordinator is told, within its process.
#[derive(RactorMessage)]
pub enum CoordinatorMessage {
    /// A worker's connection stands.
    Connected(Connection),
    /// A worker's connection has ended.
    Disconnected(Connection, String),
    /// A node answered who it is.
    Described(ActorRef<NodeMessage>, NodeReport),
    /// These names are revoked, and no others.
    Revoked(Vec<Revoked>),
    /// Something happened to the cluster.
    Cluster(Event),
    /// A node answered how it is.
    Status(String, NodeStatus),
    /// Run a job; its events go to the channel.
    Submit(Box<Submission>, RpcReplyPort<Result<u64, NotSubmitted>>),
    /// End a job, for whoever submitted it.
    Cancel {
        /// The job.
        job: u64,
        /// Who asks; nobody if it is this process.
        client: Option<String>,
    },
    /// A job wants a node to run at.
    Home {
        /// The job.
        job: u64,
        /// Nodes that did not take it lately.
        refused: Vec<String>,
        /// Answered as soon as there is one, or with why there will be none.
        reply: RpcReplyPort<Result<JobHome, String>>,
    },
    /// Why no node can take a job, for people.
    WhyNot(RpcReplyPort<String>),
    /// A job ended.
    Ended(u64),
    /// How is the cluster?
    Describe(RpcReplyPort<ClusterStatus>),
    /// Where are the nodes' experts?
    Residences(RpcReplyPort<Vec<NodeResidences>>),
    /// What do the nodes' experts and links do?
    View(RpcReplyPort<Vec<NodeView>>),
    /// Move a node's work and experts away, and let it go.
    Drain(String, RpcReplyPort<Result<(), String>>),
    /// Answered when the cluster is ready or has failed.
    WaitReady(RpcReplyPort<Result<(), String>>),
}

/// What a coordinator is made of.
pub struct CoordinatorArguments {
    /// Name of the cluster: the scope of its process groups.
    pub cluster: String,
    /// The model that it serves.
    pub checkpoint: Arc<Checkpoint>,
    /// Its tokenizer.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Bytes of an expert, per tier.
    pub expert_bytes: Vec<u64>,
    /// Workers that make the cluster whole.
    pub workers: usize,
    /// Workers that hold each expert.
    pub replicas: u16,
    /// How experts are spread.
    pub placement: PlacementPolicy,
    /// How all nodes keep keys and values.
    pub kv_dtype: KvDType,
    /// What the model is, with the context that all nodes serve it with.
    pub config: ModelConfig,
    /// How long jobs wait for a node.
    pub patience: Duration,
    /// Positions that the largest cache of a node holds, for others to read; 0 before one is known.
    pub kv_tokens: room::Largest,
    /// The control plane, if nodes are other processes.
    pub control: Option<ControlPlane>,
}

/// See the module's text.
pub struct Coordinator;

struct Node {
    actor: ActorRef<NodeMessage>,
    status: NodeStatus,
    /// Turns to a reason when its jobs are to go elsewhere.
    leave: watch::Sender<Option<String>>,
}

struct RunningJob {
    client: Option<String>,
    cancel: watch::Sender<bool>,
    /// It waits for a node.
    wants: Option<RpcReplyPort<Result<JobHome, String>>>,
    /// Positions that it may come to.
    positions: u64,
    /// The job's own span.
    _span: tracing::Span,
}

/// A coordinator between messages.
pub struct CoordinatorState {
    arguments: CoordinatorArguments,
    cluster: Cluster,
    connections: HashMap<String, Connection>,
    early: HashMap<String, (ActorRef<NodeMessage>, NodeReport)>,
    /// Nodes that described themselves and whose connection stands, by name.
    nodes: BTreeMap<String, Node>,
    names: HashMap<ActorId, String>,
    revoked: Vec<Revoked>,
    jobs: HashMap<u64, RunningJob>,
    /// Makes the numbers of jobs, which nobody can guess.
    numbers: RandomState,
    jobs_begun: u64,
    jobs_done: u64,
    was_ready: bool,
    waiting: Vec<RpcReplyPort<Result<(), String>>>,
}

impl Actor for Coordinator {
    type Msg = CoordinatorMessage;
    type State = CoordinatorState;
    type Arguments = CoordinatorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let cluster = Cluster::new(MembershipOptions {
            config: arguments.config.clone(),
            expert_bytes: arguments.expert_bytes.clone(),
            workers: arguments.workers,
            copies: arguments.replicas,
            policy: arguments.placement,
            overcommit: true,
        });
        pg::monitor_scope(arguments.cluster.clone(), myself.get_cell());
        myself.send_interval(TICK_INTERVAL, || CoordinatorMessage::Cluster(Event::Tick));
        Ok(CoordinatorState {
            cluster,
            arguments,
            connections: HashMap::new(),
            early: HashMap::new(),
            nodes: BTreeMap::new(),
            names: HashMap::new(),
            revoked: Vec::new(),
            jobs: HashMap::new(),
            numbers: RandomState::new(),
            jobs_begun: 0,
            jobs_done: 0,
            was_ready: false,
            waiting: Vec::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        match message {
            CoordinatorMessage::Connected(connection) => state.connected(now, connection),
            CoordinatorMessage::Disconnected(connection, reason) => {
                state.disconnected(now, &connection, &reason);
            }
            CoordinatorMessage::Revoked(names) => {
                state.revoked = names;
                state.nodes.values().for_each(|node| state.tell_revoked(node));
            }
            CoordinatorMessage::Described(actor, report) => state.described(now, actor, report),
            CoordinatorMessage::Cluster(event) => state.cluster.handle(now, event),
            CoordinatorMessage::Status(name, status) => {
                if let Some(node) = state.nodes.get_mut(&name) {
                    let speed = status.tokens_per_second;
                    node.status = NodeStatus {
                        name,
                        address: cut(status.address, ADDRESS_BYTES_MAX),
                        state: cut(status.state, STATE_BYTES_MAX),
                        tokens_per_second: if speed.is_finite() { speed.max(0.0) } else { 0.0 },
                        ..status
                    };
                    state.note_largest_cache();
                }
            }
            CoordinatorMessage::Submit(submission, reply) => {
                // Whoever asked may be gone, here and below.
                let _ = reply.send(state.submit(&myself, *submission));
            }
            CoordinatorMessage::Cancel { job, client } => {
                if let Some(job) = state.jobs.get(&job)
                    && (client.is_none() || job.client == client)
                {
                    job.cancel.send_replace(true);
                }
            }
            CoordinatorMessage::Home { job, refused, reply } => {
                if let Some(reason) = state.fits_nowhere(job) {
                    let _ = reply.send(Err(reason));
                } else if let Some(running) = state.jobs.get_mut(&job) {
                    running.wants = Some(reply);
                    state.cluster.handle(now, Event::Wants { job, refused });
                }
            }
            CoordinatorMessage::WhyNot(reply) => {
                let _ = reply.send(words::waiting_for(&state.cluster.missing()).join(", "));
            }
            CoordinatorMessage::Ended(job) => {
                state.cluster.handle(now, Event::Left { job });
                if state.jobs.remove(&job).is_some() {
                    state.jobs_done += 1;
                }
            }
            CoordinatorMessage::Describe(reply) => {
                let _ = reply.send(state.status());
            }
            CoordinatorMessage::Residences(reply) => {
                state.gather(NodeMessage::Residences, reply);
            }
            CoordinatorMessage::View(reply) => state.gather(NodeMessage::View, reply),
            CoordinatorMessage::Drain(name, reply) => {
                let _ = reply.send(state.drain(now, name));
            }
            CoordinatorMessage::WaitReady(reply) => state.waiting.push(reply),
        }
        state.carry_out(&myself, now);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        match event {
            SupervisionEvent::ProcessGroupChanged(GroupChangeMessage::Join(_, group, cells))
                if group == NODES =>
            {
                for cell in cells {
                    describe(&myself, state.arguments.control.clone(), cell.into());
                }
            }
            SupervisionEvent::ProcessGroupChanged(GroupChangeMessage::Leave(_, group, cells))
                if group == NODES =>
            {
                for cell in cells {
                    if let Some(name) = state.names.remove(&cell.get_id()) {
                        // If only its control stream ended, it is to notice and to come again.
                        if let Some(connection) = state.connections.remove(&name) {
                            tokio::spawn(async move {
                                tokio::time::sleep(LEAVES_WITHIN).await;
                                connection.close("its control stream has ended");
                            });
                        }
                        state.gone(now, &name, "it stopped");
                    }
                }
            }
            _ => {}
        }
        state.carry_out(&myself, now);
        Ok(())
    }
}

/// As much of a text as is kept.
fn cut(mut text: String, bytes: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes));
    text.shrink_to_fit();
    text
}

/// Asks a node who it is, and sees that its certificate says the same.
fn describe(
    myself: &ActorRef<CoordinatorMessage>,
    control: Option<ControlPlane>,
    actor: ActorRef<NodeMessage>,
) {
    let myself = myself.clone();
    tokio::spawn(async move {
        let timeout = ANSWER_TIMEOUT.as_millis() as u64;
        let answer = ractor::call_t!(actor, NodeMessage::Describe, timeout);
        match answer.map(Wire::into_inner) {
            // A coordinator that is gone needs no answer, here and below.
            Ok(Ok(report)) => {
                let said = format!("{} {}", Role::Worker, report.info.name);
                let is = match &control {
                    Some(control) => control.peer_of(actor.get_id().node()).await,
                    // In one process there is nobody else.
                    None => Some(said.clone()),
                };
                if is.as_ref() == Some(&said) {
                    let _ = myself.cast(CoordinatorMessage::Described(actor, report));
                } else {
                    warn!(says = %said, is = ?is, "a node says that it is another; it is ignored");
                }
            }
            Ok(Err(error)) => warn!(%error, "a node introduced itself with damaged data"),
            Err(error) => warn!(%error, "a node did not say who it is"),
        }
    });
}

impl CoordinatorState {
    fn connected(&mut self, now: Instant, connection: Connection) {
        let name = connection.peer().name.clone();
        if let Some(before) = self.connections.insert(name.clone(), connection) {
            before.dismiss(&words::replaced(&name));
            self.gone(now, &name, "it has connected again");
        }
        if let Some((actor, report)) = self.early.remove(&name) {
            self.described(now, actor, report);
        }
    }

    fn disconnected(&mut self, now: Instant, connection: &Connection, reason: &str) {
        let name = &connection.peer().name;
        if self.connections.get(name).is_some_and(|kept| kept.is_same(connection)) {
            self.connections.remove(name);
            self.gone(now, &name.clone(), reason);
        }
    }

    fn described(&mut self, now: Instant, actor: ActorRef<NodeMessage>, report: NodeReport) {
        let name = report.info.name.clone();
        if !self.connections.contains_key(&name) {
            // In one process it may be found before its connection is; others come through theirs.
            if self.arguments.control.is_none() {
                self.early.insert(name, (actor, report));
            }
            return;
        }
        let NodeReport { info, holding } = report;
        // It is told to all others.
        if info.address.parse::<SocketAddr>().is_err() {
            let address = cut(info.address, ADDRESS_BYTES_MAX);
            warn!(worker = %name, %address, "a node is nowhere; it is ignored");
            return;
        }
        self.gone(now, &name, "it has connected again");
        info!(worker = %name, address = %info.address, "worker is here");
        self.names.insert(actor.get_id(), name.clone());
        let status = NodeStatus {
            name: name.clone(),
            address: info.address.clone(),
            state: "joined".into(),
            experts: 0,
            expert_bytes: 0,
            budget: info.budget_bytes,
            sequences: 0,
            tokens_per_second: 0.0,
            loaded: 0,
            total: 0,
            kv_tokens: 0,
        };
        let node = Node { actor, status, leave: watch::Sender::new(None) };
        self.tell_revoked(&node);
        self.nodes.insert(name, node);
        let same = holding.filter(|held| {
            held.checkpoint == self.arguments.checkpoint.id() && held.check().is_ok()
        });
        let holding = same.map(|held| Holding {
            epoch: held.epoch,
            nodes: held.nodes.into_iter().map(|node| node.name).collect(),
            you: held.you,
            rules: held.placement,
        });
        self.cluster.handle(now, Event::Here { info, holding });
    }

    /// Tells a node whom it is to have no connection with.
    fn tell_revoked(&self, node: &Node) {
        let names = RevokedNames { names: self.revoked.clone() };
        // A node that is gone needs no telling.
        let _ = node.actor.cast(NodeMessage::Revoked(Wire::new(names)));
    }

    /// A node is gone, if it was here.
    fn gone(&mut self, now: Instant, name: &str, reason: &str) {
        self.forget(name, reason);
        self.cluster.handle(now, Event::Gone { name: name.to_owned(), reason: reason.to_owned() });
    }

    /// Does what the cluster wants done.
    fn carry_out(&mut self, myself: &ActorRef<CoordinatorMessage>, now: Instant) {
        while let Some(command) = self.cluster.poll_command() {
            match command {
                Command::Ask { name, incarnation } => self.ask(myself, name, incarnation),
                Command::Assign { name, incarnation, plan, serves } => {
                    self.assign(myself, name, incarnation, plan, serves);
                }
                Command::Suspects { name, suspects } => {
                    if let Some(node) = self.nodes.get(&name) {
                        // A node that is gone needs no telling, here and below.
                        let _ = node.actor.cast(NodeMessage::Suspects(Wire::new(suspects)));
                    }
                }
                Command::Leave { name, reason } => {
                    if let Some(node) = self.nodes.get_mut(&name) {
                        info!(worker = %name, %reason, "its jobs go elsewhere");
                        // Who comes later gets a watch of its own.
                        let left = std::mem::replace(&mut node.leave, watch::Sender::new(None));
                        left.send_replace(Some(reason));
                    }
                }
                Command::Home { job, name } => self.home(now, job, &name),
                Command::Close { name, reason } => {
                    if let Some(connection) = self.connections.remove(&name) {
                        connection.close(&reason);
                    }
                    self.forget(&name, &reason);
                }
                Command::Dismiss { name, reason } => {
                    info!(worker = %name, %reason, "sending a worker away");
                    if let Some(node) = self.nodes.get(&name) {
                        let _ = node.actor.cast(NodeMessage::Dismiss(reason));
                    }
                }
            }
        }
        let ready = *self.cluster.state() == State::Ready;
        if ready && !self.was_ready {
            info!(epoch = self.cluster.epoch(), "the cluster is ready");
        }
        self.was_ready = ready;
        let outcome = match self.cluster.state() {
            State::Ready | State::Degraded { complete: true } => Ok(()),
            State::Failed(reason) => Err(reason.clone()),
            State::Waiting | State::Loading | State::Degraded { .. } => return,
        };
        self.waiting.drain(..).for_each(|reply| drop(reply.send(outcome.clone())));
    }

    /// Lets go of what belonged to a node that is gone.
    fn forget(&mut self, name: &str, reason: &str) {
        if let Some(node) = self.nodes.remove(name) {
            warn!(worker = %name, %reason, "worker is gone");
            node.leave.send_replace(Some(words::gone(name, reason)));
            self.names.retain(|_, other| other != name);
        }
    }

    fn ask(&self, myself: &ActorRef<CoordinatorMessage>, name: String, incarnation: u64) {
        let Some(node) = self.nodes.get(&name) else { return };
        let (myself, actor) = (myself.clone(), node.actor.clone());
        tokio::spawn(async move {
            let timeout = liveness::LOST_AFTER.as_millis() as u64;
            let answer = ractor::call_t!(actor, NodeMessage::Vitals, timeout);
            let vitals = answer.ok().and_then(|answer| answer.into_inner().ok());
            let vitals = vitals.map(|NodeVitals { status, busy, progress, unreachable }| {
                let budget = status.budget;
                let _ = myself.cast(CoordinatorMessage::Status(name.clone(), status));
                Vitals { busy, progress, unreachable, budget }
            });
            let event = Event::Vitals { name, incarnation, vitals };
            let _ = myself.cast(CoordinatorMessage::Cluster(event));
        });
    }

    /// Gives a node an assignment and reports how it went.
    fn assign(
        &self,
        myself: &ActorRef<CoordinatorMessage>,
        name: String,
        incarnation: u64,
        plan: Plan,
        serves: bool,
    ) {
        let Some(node) = self.nodes.get(&name) else { return };
        let checkpoint = &self.arguments.checkpoint;
        let epoch = plan.epoch;
        let assignment = Assignment {
            epoch,
            checkpoint: checkpoint.id(),
            model_path: checkpoint.address(),
            placement: plan.placement.rules().to_vec(),
            nodes: plan.nodes,
            you: plan.index,
            kv_dtype: self.arguments.kv_dtype.name().into(),
            context: self.arguments.config.context as u64,
        };
        // Sent here and now, so that a node gets its assignments in order.
        let (sender, answer) = tokio::sync::oneshot::channel();
        let message = if serves { NodeMessage::Serve } else { NodeMessage::Load };
        let sent = node.actor.cast(message(Wire::new(assignment), sender.into()));
        let myself = myself.clone();
        tokio::spawn(async move {
            // Loading takes as long as it takes; a node that dies meanwhile drops the sender.
            let result = match (sent, answer.await.map(Wire::into_inner)) {
                (Ok(()), Ok(Ok(Loaded { error }))) => {
                    error.map_or(Ok(()), |error| Err(cut(error, STATE_BYTES_MAX)))
                }
                (Ok(()), Ok(Err(error))) => Err(error.to_string()),
                (Ok(()), Err(_)) => Err("it ended before it answered".to_owned()),
                (Err(error), _) => Err(error.to_string()),
            };
            let event = Event::Assigned { name, incarnation, epoch, serves, result };
            let _ = myself.cast(CoordinatorMessage::Cluster(event));
        });
    }

    /// Tells a job where it is to run.
    fn home(&mut self, now: Instant, job: u64, name: &str) {
        let Some((node, connection)) = self.nodes.get(name).zip(self.connections.get(name)) else {
            // It left just now.
            return self.cluster.handle(now, Event::Wants { job, refused: Vec::new() });
        };
        let Some(reply) = self.jobs.get_mut(&job).and_then(|job| job.wants.take()) else {
            return self.cluster.handle(now, Event::Left { job });
        };
        let (name, leave) = (name.to_owned(), node.leave.subscribe());
        // A job that was cancelled meanwhile has ended, which it reports.
        let _ = reply.send(Ok(JobHome { name, connection: connection.clone(), leave }));
    }

    fn submit(
        &mut self,
        myself: &ActorRef<CoordinatorMessage>,
        submission: Submission,
    ) -> Result<u64, NotSubmitted> {
        let Submission {
            mut request,
            choosing,
            serving,
            generated,
            client,
            operation,
            patience,
            events,
        } = submission;
        if let State::Failed(reason) = self.cluster.state() {
            return Err(NotSubmitted::Refused(reason.clone()));
        }
        let config = &self.arguments.config;
        let checked = jobs::check_order(&request, &choosing, &generated, config);
        checked.map_err(NotSubmitted::Refused)?;
        let positions = self.check_room(&request)?;
        self.jobs_begun += 1;
        let id = self.numbers.hash_one(self.jobs_begun);
        let span = tracing::debug_span!("job", job = id);
        trace::adopt(&span, request.trace);
        let context = trace::context_of(&span);
        if context.is_valid() {
            request.trace = context;
        }
        if let Some(operation) = operation {
            trace::describe(&span, operation, &self.arguments.checkpoint.location(), &request);
        }
        let prompt = match &request.prompt {
            Prompt::Tokens(prompt) => prompt.len(),
            Prompt::Text(_) | Prompt::Chat(_) => 0,
        };
        let (cancel, cancelled) = watch::channel(false);
        let job = Job {
            id,
            described: operation.map(|_| (span.clone(), prompt as u64)),
            progress: JobProgress::new(prompt)
                .of(&request, &self.arguments.config)
                .with_logprobs(choosing.logprobs)
                .after(generated),
            request,
            choosing,
            serving,
            coordinator: myself.clone(),
            events,
            cancelled,
            finish: Vec::new(),
            tokenizer: self.arguments.tokenizer.clone(),
            patience: patience.unwrap_or(self.arguments.patience),
        };
        let running = RunningJob { client, cancel, wants: None, positions, _span: span };
        self.jobs.insert(id, running);
        let myself = myself.clone();
        tokio::spawn(async move {
            job.run().await;
            let _ = myself.cast(CoordinatorMessage::Ended(id));
        });
        Ok(id)
    }

    fn drain(&mut self, now: Instant, name: String) -> Result<(), String> {
        if !self.nodes.contains_key(&name) {
            let here: Vec<&str> = self.nodes.keys().map(String::as_str).collect();
            let here = if here.is_empty() { "nobody".to_owned() } else { here.join(", ") };
            return Err(format!("no worker is named {name}; here: {here}"));
        }
        if self.nodes.len() == 1 {
            return Err(format!("{name} is the only worker: start another first"));
        }
        self.cluster.handle(now, Event::Drain { name });
        Ok(())
    }

    fn status(&self) -> ClusterStatus {
        let checkpoint = &self.arguments.checkpoint;
        let status = |(name, node): (&String, &Node)| {
            let mut status = node.status.clone();
            if let Some(trouble) = self.cluster.trouble(name) {
                status.state = trouble;
            }
            status
        };
        let nodes: Vec<NodeStatus> = self.nodes.iter().map(status).collect();
        ClusterStatus {
            model: checkpoint.location(),
            checkpoint: checkpoint.id().iter().map(|byte| format!("{byte:02x}")).collect(),
            epoch: self.cluster.epoch(),
            state: words::state(self.cluster.state()),
            waiting_for: words::waiting_for(&self.cluster.missing()),
            jobs_running: self.jobs.len() as u32,
            jobs_done: self.jobs_done,
            // A sum of nothing is −0.
            tokens_per_second: nodes.iter().fold(0.0, |sum, node| sum + node.tokens_per_second),
            nodes,
        }
    }
}
