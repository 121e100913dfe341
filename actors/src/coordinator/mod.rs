//! The coordinator actor: it owns membership, placement and the jobs of a cluster.
//!
//! It decides through a pure machine ([`crate::membership`]) and acts through messages. What
//! takes time (a node that loads, a job that runs) is done beside its mailbox and reported back.

mod handle;
mod job;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use lite_llm_kernels::kv::KvDType;
use lite_llm_runtime::{checkpoint::Checkpoint, config::ModelConfig, tokenizer::Tokenizer};
use lite_llm_transport::{
    connection::Connection,
    messages::{Assignment, ClusterStatus, JobEvent, JobRequest, JobStart, NodeInfo, NodeStatus},
};
use ractor::{
    Actor, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent,
    pg::{self, GroupChangeMessage},
};
use ractor_cluster::RactorMessage;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

pub(crate) use self::handle::scope;
pub use self::handle::{CoordinatorHandle, CoordinatorOptions, PROMPT_BYTES_MAX, ServeError};
use self::job::Job;
use crate::{
    membership::{Command, Event, Membership, State},
    node::{NODES, NodeMessage, jobs},
    placement::PlacementPolicy,
    trace,
    wire::Wire,
};

/// How long a node may take to answer a question.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often nodes are asked how they are.
pub const POLL_INTERVAL: Duration = Duration::from_millis(500);
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
    Described(ActorRef<NodeMessage>, NodeInfo),
    /// A node finished an assignment.
    Loaded {
        /// Its name.
        name: String,
        /// The epoch.
        epoch: u64,
        /// How it went.
        result: Result<(), String>,
    },
    /// Run a job; its events go to the channel.
    Submit(Box<JobRequest>, mpsc::Sender<JobEvent>, RpcReplyPort<Result<u64, String>>),
    /// End a job.
    Cancel(u64),
    /// A job ended.
    Ended(u64),
    /// How is the cluster?
    Status(RpcReplyPort<ClusterStatus>),
    /// Ask the nodes how they are.
    Poll,
    /// A node answered how it is.
    Polled(NodeStatus),
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
    /// How experts are spread.
    pub placement: PlacementPolicy,
    /// How all nodes keep keys and values.
    pub kv_dtype: KvDType,
    /// What the model is, with the context that all nodes serve it with.
    pub config: ModelConfig,
}

/// See the module's text.
pub struct Coordinator;

struct Node {
    actor: ActorRef<NodeMessage>,
    jobs: usize,
    status: Option<NodeStatus>,
}

struct RunningJob {
    home: String,
    cancel: watch::Sender<bool>,
}

/// A coordinator between messages.
pub struct CoordinatorState {
    arguments: CoordinatorArguments,
    membership: Membership,
    connections: HashMap<String, Connection>,
    /// Nodes that described themselves, by name.
    nodes: BTreeMap<String, Node>,
    names: HashMap<ActorId, String>,
    /// Nodes whose actor is here and whose connection is not yet.
    infos: HashMap<String, NodeInfo>,
    jobs: HashMap<u64, RunningJob>,
    next_job: u64,
    jobs_done: u64,
    suspend: watch::Sender<Option<String>>,
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
        let config = arguments.config.clone();
        let (expert_bytes, workers) = (arguments.expert_bytes.clone(), arguments.workers);
        let policy = arguments.placement;
        pg::monitor_scope(arguments.cluster.clone(), myself.get_cell());
        myself.send_interval(POLL_INTERVAL, || CoordinatorMessage::Poll);
        Ok(CoordinatorState {
            membership: Membership::new(config, expert_bytes, workers, policy),
            arguments,
            connections: HashMap::new(),
            nodes: BTreeMap::new(),
            names: HashMap::new(),
            infos: HashMap::new(),
            jobs: HashMap::new(),
            next_job: 1,
            jobs_done: 0,
            suspend: watch::Sender::new(None),
            waiting: Vec::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CoordinatorMessage::Connected(connection) => state.connected(connection),
            CoordinatorMessage::Disconnected(connection, reason) => {
                state.disconnected(&connection, reason);
            }
            CoordinatorMessage::Described(actor, info) => state.described(actor, info),
            CoordinatorMessage::Loaded { name, epoch, result } => {
                state.membership.handle(Event::Loaded { name, epoch, result });
            }
            CoordinatorMessage::Submit(request, events, reply) => {
                // Whoever asked may be gone, here and below.
                let _ = reply.send(state.submit(&myself, *request, events));
            }
            CoordinatorMessage::Cancel(job) => {
                if let Some(job) = state.jobs.get(&job) {
                    job.cancel.send_replace(true);
                }
            }
            CoordinatorMessage::Ended(job) => state.ended(job),
            CoordinatorMessage::Status(reply) => {
                let _ = reply.send(state.status());
            }
            CoordinatorMessage::Poll => state.poll(&myself),
            CoordinatorMessage::Polled(status) => {
                if let Some(node) = state.nodes.get_mut(&status.name) {
                    node.status = Some(status);
                }
            }
            CoordinatorMessage::WaitReady(reply) => state.waiting.push(reply),
        }
        state.carry_out(&myself);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ProcessGroupChanged(GroupChangeMessage::Join(_, group, cells))
                if group == NODES =>
            {
                for cell in cells {
                    describe(&myself, cell.into());
                }
            }
            SupervisionEvent::ProcessGroupChanged(GroupChangeMessage::Leave(_, group, cells))
                if group == NODES =>
            {
                for cell in cells {
                    if let Some(name) = state.names.remove(&cell.get_id()) {
                        state.left(&name, "it stopped");
                    }
                }
            }
            _ => {}
        }
        state.carry_out(&myself);
        Ok(())
    }
}

/// Asks a node who it is.
fn describe(myself: &ActorRef<CoordinatorMessage>, actor: ActorRef<NodeMessage>) {
    let myself = myself.clone();
    tokio::spawn(async move {
        let timeout = ANSWER_TIMEOUT.as_millis() as u64;
        let answer = ractor::call_t!(actor, NodeMessage::Describe, timeout);
        match answer.map(Wire::into_inner) {
            // A coordinator that is gone needs no answer, here and below.
            Ok(Ok(info)) => drop(myself.cast(CoordinatorMessage::Described(actor, info))),
            Ok(Err(error)) => warn!(%error, "a node introduced itself with damaged data"),
            Err(error) => warn!(%error, "a node did not say who it is"),
        }
    });
}

impl CoordinatorState {
    fn connected(&mut self, connection: Connection) {
        let name = connection.peer().name.clone();
        match self.connections.get(&name).map(Connection::close_reason) {
            None => {}
            Some(None) => {
                connection.close(&format!("a worker named {name} is here already; give --name"));
                return;
            }
            // Its end was not reported yet.
            Some(Some(lost)) => self.left(&name, &lost.reason),
        }
        self.connections.insert(name.clone(), connection);
        self.join_if_complete(&name);
    }

    fn disconnected(&mut self, connection: &Connection, reason: String) {
        let name = &connection.peer().name;
        if self.connections.get(name).is_some_and(|kept| kept.is_same(connection)) {
            self.connections.remove(name);
            self.left(&name.clone(), &reason);
        }
    }

    fn described(&mut self, actor: ActorRef<NodeMessage>, info: NodeInfo) {
        let name = info.name.clone();
        if self.nodes.contains_key(&name) {
            let reason = format!("a worker named {name} is here already; give --name");
            let _ = actor.cast(NodeMessage::Dismiss(reason));
            return;
        }
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
        };
        self.nodes.insert(name.clone(), Node { actor, jobs: 0, status: Some(status) });
        self.infos.insert(name.clone(), info);
        self.join_if_complete(&name);
    }

    /// A node is a member when both its actor and its connection are here.
    fn join_if_complete(&mut self, name: &str) {
        if !self.connections.contains_key(name) || !self.nodes.contains_key(name) {
            return;
        }
        if let Some(info) = self.infos.remove(name) {
            self.membership.handle(Event::Joined(info));
        }
    }

    fn left(&mut self, name: &str, reason: &str) {
        self.infos.remove(name);
        if self.nodes.remove(name).is_some() {
            warn!(worker = %name, %reason, "worker is gone");
        }
        self.names.retain(|_, other| other != name);
        self.membership.handle(Event::Left { name: name.to_owned(), reason: reason.to_owned() });
    }

    /// Does what the membership wants done.
    fn carry_out(&mut self, myself: &ActorRef<CoordinatorMessage>) {
        while let Some(command) = self.membership.poll_command() {
            match command {
                Command::Load { name, epoch, index, nodes, owners } => {
                    let assignment = self.assignment(epoch, index, nodes, owners);
                    if let Some(node) = self.nodes.get(&name) {
                        load(myself, node.actor.clone(), name, assignment);
                    }
                }
                Command::Dismiss { name, reason } => {
                    warn!(worker = %name, %reason, "sending a worker away");
                    if let Some(node) = self.nodes.remove(&name) {
                        self.names.retain(|_, other| *other != name);
                        let _ = node.actor.cast(NodeMessage::Dismiss(reason));
                    }
                }
                Command::Ready { epoch } => {
                    info!(epoch, "the cluster is ready");
                    self.suspend = watch::Sender::new(None);
                }
                Command::Suspend { reason } => {
                    info!(%reason, "the cluster cannot serve");
                    self.suspend.send_replace(Some(reason.clone()));
                    for node in self.nodes.values() {
                        let _ = node.actor.cast(NodeMessage::Suspend(reason.clone()));
                    }
                }
            }
        }
        let outcome = match self.membership.state() {
            State::Ready => Ok(()),
            State::Failed(reason) => Err(reason.clone()),
            State::Waiting | State::Loading => return,
        };
        self.waiting.drain(..).for_each(|reply| drop(reply.send(outcome.clone())));
    }

    fn assignment(
        &self,
        epoch: u64,
        index: u16,
        nodes: Vec<lite_llm_transport::messages::NodeAddress>,
        owners: crate::placement::Owners,
    ) -> Assignment {
        let checkpoint = &self.arguments.checkpoint;
        Assignment {
            epoch,
            checkpoint: checkpoint.id(),
            model_path: checkpoint.address(),
            placement: owners.rules().to_vec(),
            nodes,
            you: index,
            kv_dtype: self.arguments.kv_dtype.name().into(),
            context: self.arguments.config.context as u64,
        }
    }

    fn submit(
        &mut self,
        myself: &ActorRef<CoordinatorMessage>,
        mut request: JobRequest,
        events: mpsc::Sender<JobEvent>,
    ) -> Result<u64, String> {
        match self.membership.state() {
            State::Ready => {}
            State::Failed(reason) => return Err(reason.clone()),
            State::Waiting | State::Loading => {
                let waiting = self.membership.waiting_for().join(", ");
                return Err(format!("the cluster is not ready: it waits for {waiting}"));
            }
        }
        if self.jobs.len() >= JOBS_MAX {
            return Err(format!("{JOBS_MAX} jobs are running or waiting; try again later"));
        }
        jobs::check(&request, &self.arguments.config)?;
        // The node with the fewest jobs is home; of equals, the first.
        let home = self
            .nodes
            .iter()
            .filter(|(name, _)| self.connections.contains_key(*name))
            .min_by_key(|(_, node)| node.jobs)
            .map(|(name, _)| name.clone())
            .ok_or("no worker is here")?;
        let job = self.next_job;
        self.next_job += 1;
        let span = tracing::debug_span!("job", job, home = %home);
        trace::adopt(&span, request.trace);
        let context = trace::context_of(&span);
        if context.is_valid() {
            request.trace = context;
        }
        if let Some(node) = self.nodes.get_mut(&home) {
            node.jobs += 1;
        }
        let (cancel, cancelled) = watch::channel(false);
        let running = Job {
            start: JobStart { job, request },
            home: self.connections[&home].clone(),
            events,
            suspended: self.suspend.subscribe(),
            cancelled,
            tokenizer: self.arguments.tokenizer.clone(),
        };
        self.jobs.insert(job, RunningJob { home, cancel });
        let myself = myself.clone();
        tokio::spawn(async move {
            running.run().await;
            drop(span);
            let _ = myself.cast(CoordinatorMessage::Ended(job));
        });
        Ok(job)
    }

    fn ended(&mut self, job: u64) {
        if let Some(job) = self.jobs.remove(&job) {
            self.jobs_done += 1;
            if let Some(node) = self.nodes.get_mut(&job.home) {
                node.jobs = node.jobs.saturating_sub(1);
            }
        }
    }

    fn poll(&self, myself: &ActorRef<CoordinatorMessage>) {
        for node in self.nodes.values() {
            let (myself, actor) = (myself.clone(), node.actor.clone());
            tokio::spawn(async move {
                let timeout = ANSWER_TIMEOUT.as_millis() as u64;
                // A node that does not answer is noticed by its connection.
                let answer = ractor::call_t!(actor, NodeMessage::Status, timeout);
                if let Ok(Ok(status)) = answer.map(Wire::into_inner) {
                    let _ = myself.cast(CoordinatorMessage::Polled(status));
                }
            });
        }
    }

    fn status(&self) -> ClusterStatus {
        let checkpoint = &self.arguments.checkpoint;
        let nodes: Vec<NodeStatus> =
            self.nodes.values().filter_map(|node| node.status.clone()).collect();
        ClusterStatus {
            model: checkpoint.location(),
            checkpoint: checkpoint.id().iter().map(|byte| format!("{byte:02x}")).collect(),
            epoch: self.membership.epoch(),
            state: match self.membership.state() {
                State::Waiting => "waiting for workers".into(),
                State::Loading => "loading".into(),
                State::Ready => "ready".into(),
                State::Failed(reason) => format!("failed: {reason}"),
            },
            waiting_for: self.membership.waiting_for(),
            jobs_running: self.jobs.len() as u32,
            jobs_done: self.jobs_done,
            tokens_per_second: nodes.iter().map(|node| node.tokens_per_second).sum(),
            nodes,
        }
    }
}

/// Gives a node its part and reports how it went.
fn load(
    myself: &ActorRef<CoordinatorMessage>,
    actor: ActorRef<NodeMessage>,
    name: String,
    assignment: Assignment,
) {
    let (myself, epoch) = (myself.clone(), assignment.epoch);
    tokio::spawn(async move {
        // Loading takes as long as it takes; a node that dies meanwhile ends the call.
        let answer = ractor::call!(actor, |reply| NodeMessage::Load(Wire::new(assignment), reply));
        let result = match answer.map(Wire::into_inner) {
            Ok(Ok(loaded)) => loaded.error.map_or(Ok(()), Err),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let _ = myself.cast(CoordinatorMessage::Loaded { name, epoch, result });
    });
}
