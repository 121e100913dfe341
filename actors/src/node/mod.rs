//! The node actor: one machine's part of the cluster, and the only actor that other processes see.
//!
//! It owns what an epoch gave this node: a storage actor, one expert shard per layer, the lane,
//! the links to other nodes. It answers questions and takes assignments; the work
//! of an assignment is done beside its mailbox, so that it answers while it loads.
//!
//! A child that fails takes the node down: the coordinator notices, fails what it must with a
//! clear reason, and waits for a worker.

pub mod device;
pub mod grammars;
pub mod jobs;
mod loader;
mod view;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use lite_llm_kernels::kv::PAGE_TOKENS;
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    engine::ScheduleStats,
    expert::ExpertStore,
    residency::{ExpertCache, HbmStore, NvmeFolder, ResidenceStats},
};
use lite_llm_transport::{
    messages::{
        Assignment, NodeInfo, NodeReport, NodeResidences, NodeStatus, NodeView, NodeVitals,
        RESIDENCES_MAX, ResidenceStatus, RevokedNames, ScheduleStatus,
    },
    pool::BufferPool,
};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::RactorClusterMessage;
use rkyv::{Archive, Deserialize, Serialize};
use tracing::{error, info};

pub use self::device::{DeviceChoice, NodeDevice, check_math, kernel_cache};
use self::{
    grammars::GrammarDesk,
    loader::{Loader, LoaderMessage, LoaderState},
};
use crate::{
    lane::{LaneActor, LaneEvent, LaneInbox, LaneLimits, LaneMessage, LaneStats},
    links::Links,
    shard::LoadCounters,
    wire::Wire,
};

/// Process group of the nodes, in the scope that is named after the cluster.
pub const NODES: &str = "nodes";

/// What a node is told, from this process or another.
#[derive(RactorClusterMessage)]
pub enum NodeMessage {
    /// Who are you?
    #[rpc]
    Describe(RpcReplyPort<Wire<NodeReport>>),
    /// Load what this gives you, beside what you hold; answered when it is here, or cannot be.
    #[rpc]
    Load(Wire<Assignment>, RpcReplyPort<Wire<Loaded>>),
    /// Compute by this from now on; answered when that is so, or cannot be.
    #[rpc]
    Serve(Wire<Assignment>, RpcReplyPort<Wire<Loaded>>),
    /// How are you?
    #[rpc]
    Vitals(RpcReplyPort<Wire<NodeVitals>>),
    /// These nodes have shown no sign of progress lately; others have.
    Suspects(Wire<Vec<String>>),
    /// These names are revoked: no connection with them any more.
    Revoked(Wire<RevokedNames>),
    /// Leave, for this reason.
    Dismiss(String),
    /// Where are your experts?
    #[rpc]
    Residences(RpcReplyPort<Wire<NodeResidences>>),
    /// What do your experts and links do?
    #[rpc]
    View(RpcReplyPort<Wire<NodeView>>),
}

/// How an assignment ended.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Loaded {
    /// Why not, if not.
    pub error: Option<String>,
}

/// What a node works with.
#[derive(Clone)]
pub struct NodeOptions {
    /// Who it says it is.
    pub info: NodeInfo,
    /// What computes.
    pub device: NodeDevice,
    /// Whether the budget of its experts is for the rest of the model, too.
    pub dram_holds_rest: bool,
    /// A folder of a local disk for experts that memory does not hold.
    pub nvme: Option<NvmeFolder>,
    /// Bytes of caches of keys and values.
    pub kv_bytes: u64,
    /// Where the checkpoint is, if not where the coordinator says. In one process it is shared.
    pub model: Model,
    /// Connections to other nodes.
    pub links: Arc<Links>,
    /// Where the lane is found.
    pub inbox: LaneInbox,
    /// Where forms of answers are read.
    pub grammars: GrammarDesk,
    /// Buffers of frames.
    pub buffers: BufferPool,
    /// Where the store of its experts is found.
    pub store: StoreSlot,
    /// Where the store of a GPU's memory is found.
    pub hbm: Arc<Mutex<Option<Arc<HbmStore>>>>,
    /// Why the node stopped by itself, if it did.
    pub farewell: Arc<OnceLock<String>>,
    /// The assignment whose experts are here.
    pub holding: Arc<Mutex<Option<Assignment>>>,
    /// The assignment that is computed by, since the coordinator was last joined.
    pub serving: Arc<Mutex<Option<Assignment>>>,
    /// How often the coordinator was joined.
    pub session: Arc<AtomicU64>,
    /// How long the lane waits for others.
    pub limits: LaneLimits,
}

/// Where a node's store is found; empty before its first assignment.
pub type StoreSlot = Arc<Mutex<Option<Arc<ExpertCache>>>>;

/// Where a node finds its model.
#[derive(Clone)]
pub enum Model {
    /// Where the coordinator says.
    AsAssigned,
    /// In this folder.
    Folder(PathBuf),
    /// Here: it was opened already.
    Open(Arc<Checkpoint>),
}

/// See the module's text.
pub struct NodeActor;

/// A node between messages.
pub struct NodeState {
    options: NodeOptions,
    counters: Arc<LoadCounters>,
    stats: Arc<LaneStats>,
    lane: ActorRef<LaneMessage>,
    loader: ActorRef<LoaderMessage>,
    doing: Arc<Mutex<String>>,
    rate: Rate,
}

/// Tokens per second between two questions.
struct Rate {
    at: Instant,
    tokens: u64,
    last: f32,
}

impl Rate {
    fn update(&mut self, tokens: u64) -> f32 {
        let seconds = self.at.elapsed().as_secs_f32();
        // Questions that come in a quick row get the same answer.
        if seconds >= 0.5 {
            self.last = (tokens - self.tokens) as f32 / seconds;
            (self.at, self.tokens) = (Instant::now(), tokens);
        }
        self.last
    }
}

impl Actor for NodeActor {
    type Msg = NodeMessage;
    type State = NodeState;
    type Arguments = NodeOptions;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        options: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let cell = myself.get_cell();
        let inbox = options.inbox.clone();
        let (lane, _) = Actor::spawn_linked(None, LaneActor, inbox, cell.clone()).await?;
        let (counters, stats) = (Arc::default(), Arc::default());
        let doing = Arc::new(Mutex::new("waiting for its experts".to_owned()));
        let loader = LoaderState {
            options: options.clone(),
            counters: Arc::clone(&counters),
            stats: Arc::clone(&stats),
            lane: lane.clone(),
            doing: Arc::clone(&doing),
            node: cell.clone(),
            model: None,
            lane_of: None,
            prepared: Mutex::default(),
            shards: BTreeMap::new(),
        };
        let (loader, _) = Actor::spawn_linked(None, Loader, loader, cell).await?;
        let rate = Rate { at: Instant::now(), tokens: 0, last: 0.0 };
        Ok(NodeState { options, counters, stats, lane, loader, doing, rate })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMessage::Describe(reply) => {
                // Whoever asked may be gone, here and below.
                let info = NodeInfo { budget_bytes: state.budget(), ..state.options.info.clone() };
                let holding = state.options.holding.lock();
                let _ = reply.send(Wire::new(NodeReport { info, holding: holding.clone() }));
            }
            NodeMessage::Load(assignment, reply) => {
                state.assigned(assignment, reply, false)?;
            }
            NodeMessage::Serve(assignment, reply) => {
                state.assigned(assignment, reply, true)?;
            }
            NodeMessage::Vitals(reply) => {
                let _ = reply.send(Wire::new(state.vitals()));
            }
            NodeMessage::Residences(reply) => {
                let _ = reply.send(Wire::new(state.residences()));
            }
            NodeMessage::View(reply) => {
                let _ = reply.send(Wire::new(state.view()));
            }
            NodeMessage::Suspects(names) => {
                if let (Ok(names), Some(lane)) =
                    (names.into_inner(), state.options.inbox.load_full())
                {
                    // A lane that is full makes no progress, and hears of it with the next change.
                    let _ = lane.try_send(LaneEvent::Suspects(names));
                }
            }
            NodeMessage::Revoked(names) => match names.into_inner() {
                Ok(names) if names.check().is_ok() => state.options.links.revoke(names.names),
                Ok(_) | Err(_) => error!("the coordinator sent a damaged list of revoked names"),
            },
            NodeMessage::Dismiss(reason) => {
                info!(%reason, "sent away by the coordinator");
                let _ =
                    state.options.farewell.set(format!("sent away by the coordinator: {reason}"));
                myself.stop(Some(reason));
            }
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        // Children are killed with their parent; the lane must end first.
        let _ = state.lane.stop_and_wait(Some("the node stops".into()), None).await;
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(child, reason) = event {
            // Only the first of several reasons is kept, here and above.
            let _ = state.options.farewell.set(format!("a part of this node failed: {reason}"));
            error!(child = %child.get_id(), %reason, "an actor of this node failed; the node stops");
            myself.stop(Some(reason.to_string()));
        }
        Ok(())
    }
}

impl NodeState {
    /// Hands an assignment to the loader.
    fn assigned(
        &self,
        assignment: Wire<Assignment>,
        reply: RpcReplyPort<Wire<Loaded>>,
        serves: bool,
    ) -> Result<(), ActorProcessingErr> {
        match assignment.into_inner() {
            Ok(assignment) => {
                let session = self.options.session.load(Relaxed);
                let assignment = Box::new(assignment);
                self.loader.cast(LoaderMessage { assignment, serves, session, reply })?;
            }
            Err(damaged) => {
                // Whoever asked may be gone.
                let _ = reply.send(Wire::new(Loaded { error: Some(damaged.to_string()) }));
            }
        }
        Ok(())
    }

    fn vitals(&mut self) -> NodeVitals {
        let device = self.options.device.progress();
        // A lane that is stuck does not even take what is for it.
        let waits = self.options.inbox.load().as_ref().is_some_and(|inbox| !inbox.is_empty());
        NodeVitals {
            status: self.status(),
            busy: waits || self.stats.busy.load(Relaxed),
            progress: device.wrapping_add(self.stats.rounds.load(Relaxed)),
            unreachable: self.options.links.unreachable(),
        }
    }

    fn residences(&self) -> NodeResidences {
        let store = self.options.store.lock().clone();
        let mut places = store.map_or_else(Vec::new, |store| store.residences());
        if let Some(hbm) = &*self.options.hbm.lock() {
            places.insert(0, hbm.residence());
        }
        let status = |place: ResidenceStats| ResidenceStatus {
            name: place.name,
            held: place.held,
            budget: place.budget,
            hits: place.hits,
            misses: place.misses,
            prefetches: place.prefetches,
            prefetches_used: place.prefetches_used,
            evictions: place.evictions,
            bytes: place.bytes_read,
            bytes_in_vain: place.bytes_in_vain,
            damaged: place.damaged,
            failures: place.failures,
        };
        NodeResidences {
            name: self.options.info.name.clone(),
            tokens: self.stats.tokens.load(Relaxed),
            waited_us: self.stats.waited_us.load(Relaxed),
            residences: places.into_iter().map(status).take(RESIDENCES_MAX).collect(),
            schedule: schedule(&self.stats.schedule.lock()),
        }
    }

    /// Bytes that its experts may take: known when it has opened the model, whose rest may have to fit
    /// in what it was started with, too.
    fn budget(&self) -> u64 {
        let store = self.options.store.lock();
        store.as_ref().map_or(self.options.info.budget_bytes, |store| store.budget())
    }

    fn status(&mut self) -> NodeStatus {
        let NodeInfo { name, address, .. } = self.options.info.clone();
        let budget = self.budget();
        let store = self.options.store.lock().clone();
        NodeStatus {
            name,
            address,
            state: self.doing.lock().clone(),
            experts: self.counters.total.load(Relaxed),
            expert_bytes: store.map_or(0, |store| store.resident_bytes()),
            budget,
            sequences: self.stats.sequences.load(Relaxed),
            tokens_per_second: self.rate.update(self.stats.tokens.load(Relaxed)),
            loaded: self.counters.loaded.load(Relaxed),
            total: self.counters.total.load(Relaxed),
            kv_tokens: (self.stats.schedule.lock().pages * PAGE_TOKENS) as u64,
        }
    }
}

/// What a lane's scheduler has done, as it travels.
fn schedule(stats: &ScheduleStats) -> ScheduleStatus {
    ScheduleStatus {
        waiting: stats.waiting as u64,
        running: stats.running as u64,
        pages: stats.pages as u64,
        pages_used: stats.pages_used as u64,
        pages_idle: stats.pages_idle as u64,
        computed: stats.computed,
        found: stats.found,
        preemptions: stats.preemptions,
        guessed: stats.guessed,
        guessed_right: stats.guessed_right,
    }
}
