//! The node actor: one machine's part of the cluster, and the only actor that other processes see.
//!
//! It owns what an epoch gave this node: a storage actor, one expert shard per layer, the router
//! with its lane, the links to other nodes. It answers questions and takes assignments; the work
//! of an assignment is done beside its mailbox, so that it answers while it loads.
//!
//! A child that fails takes the node down: the coordinator notices, fails what it must with a
//! clear reason, and waits for a worker.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
    time::Instant,
};

use lite_llm_kernels::{cpu::Cpu, kv::KvDType};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::Engine,
    expert::{ExpertKey, ExpertStore},
    store::DramStore,
};
use lite_llm_transport::{
    messages::{Assignment, NodeInfo, NodeStatus},
    pool::BufferPool,
};
use parking_lot::Mutex;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::{RactorClusterMessage, RactorMessage};
use rkyv::{Archive, Deserialize, Serialize};
use tracing::{error, info};

use crate::{
    lane::{LaneParts, LaneStats},
    links::Links,
    placement::Owners,
    router::{LaneInbox, RouterActor, RouterMessage},
    shard::{ExpertShard, LoadCounters, ShardArguments, ShardMessage},
    storage::{StorageActor, StorageArguments, StorageMessage},
    wire::Wire,
};

/// Process group of the nodes, in the scope that is named after the cluster.
pub const NODES: &str = "nodes";

/// What a node is told, from this process or another.
#[derive(RactorClusterMessage)]
pub enum NodeMessage {
    /// Who are you?
    #[rpc]
    Describe(RpcReplyPort<Wire<NodeInfo>>),
    /// Become ready for an epoch; answered when it is, or cannot be.
    #[rpc]
    Load(Wire<Assignment>, RpcReplyPort<Wire<Loaded>>),
    /// How are you?
    #[rpc]
    Status(RpcReplyPort<Wire<NodeStatus>>),
    /// The cluster can no longer serve: fail what runs, with this reason.
    Suspend(String),
    /// Leave, for this reason.
    Dismiss(String),
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
    pub device: Arc<Cpu>,
    /// Bytes of caches of keys and values.
    pub kv_bytes: u64,
    /// Where the checkpoint is, if not where the coordinator says. In one process it is shared.
    pub model: Model,
    /// Connections to other nodes.
    pub links: Arc<Links>,
    /// Where the lane is found.
    pub inbox: LaneInbox,
    /// Buffers of frames.
    pub buffers: BufferPool,
    /// Where the store of its experts is found.
    pub store: StoreSlot,
    /// Why the node stopped by itself, if it did.
    pub farewell: Arc<OnceLock<String>>,
}

/// Where a node's store is found; empty before its first assignment.
pub type StoreSlot = Arc<Mutex<Option<Arc<DramStore>>>>;

/// Where a node finds its model.
#[derive(Clone)]
pub enum Model {
    /// Where the coordinator says.
    AsAssigned,
    /// In this folder.
    Folder(std::path::PathBuf),
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
    router: ActorRef<RouterMessage>,
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
        let (router, _) = Actor::spawn_linked(None, RouterActor, inbox, cell.clone()).await?;
        let (counters, stats) = (Arc::default(), Arc::default());
        let doing = Arc::new(Mutex::new("waiting for its experts".to_owned()));
        let loader = LoaderState {
            options: options.clone(),
            counters: Arc::clone(&counters),
            stats: Arc::clone(&stats),
            router: router.clone(),
            doing: Arc::clone(&doing),
            node: cell.clone(),
            model: None,
            shards: BTreeMap::new(),
        };
        let (loader, _) = Actor::spawn_linked(None, Loader, loader, cell).await?;
        let rate = Rate { at: Instant::now(), tokens: 0, last: 0.0 };
        Ok(NodeState { options, counters, stats, router, loader, doing, rate })
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
                let _ = reply.send(Wire::new(state.options.info.clone()));
            }
            NodeMessage::Load(assignment, reply) => match assignment.into_inner() {
                Ok(assignment) => {
                    state.loader.cast(LoaderMessage::Load(Box::new(assignment), reply))?;
                }
                Err(damaged) => {
                    let _ = reply.send(Wire::new(Loaded { error: Some(damaged.to_string()) }));
                }
            },
            NodeMessage::Status(reply) => {
                let _ = reply.send(Wire::new(state.status()));
            }
            NodeMessage::Suspend(reason) => {
                *state.doing.lock() = "waiting for the cluster".into();
                state.router.cast(RouterMessage::Stop(reason))?;
            }
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
        // Children are killed with their parent; the router must end its lane first.
        let _ = state.router.stop_and_wait(Some("the node stops".into()), None).await;
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
    fn status(&mut self) -> NodeStatus {
        let NodeInfo { name, address, budget_bytes, .. } = self.options.info.clone();
        let store = self.options.store.lock().clone();
        NodeStatus {
            name,
            address,
            state: self.doing.lock().clone(),
            experts: self.counters.total.load(Relaxed),
            expert_bytes: store.map_or(0, |store| store.resident_bytes()),
            budget: budget_bytes,
            sequences: self.stats.sequences.load(Relaxed),
            tokens_per_second: self.rate.update(self.stats.tokens.load(Relaxed)),
            loaded: self.counters.loaded.load(Relaxed),
            total: self.counters.total.load(Relaxed),
        }
    }
}

/// The actor that carries assignments out, one after the other.
struct Loader;

#[derive(RactorMessage)]
enum LoaderMessage {
    Load(Box<Assignment>, RpcReplyPort<Wire<Loaded>>),
}

/// An open model on this node.
#[derive(Clone)]
struct OpenModel {
    checkpoint: Arc<Checkpoint>,
    backbone: Arc<Backbone<Cpu>>,
    store: Arc<DramStore>,
    storage: ActorRef<StorageMessage>,
}

struct LoaderState {
    options: NodeOptions,
    counters: Arc<LoadCounters>,
    stats: Arc<LaneStats>,
    router: ActorRef<RouterMessage>,
    doing: Arc<Mutex<String>>,
    node: ActorCell,
    model: Option<OpenModel>,
    /// Per layer: the keys and the shard that holds them.
    shards: BTreeMap<u16, (Vec<ExpertKey>, ActorRef<ShardMessage>)>,
}

impl Actor for Loader {
    type Msg = LoaderMessage;
    type State = LoaderState;
    type Arguments = LoaderState;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        state: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        LoaderMessage::Load(assignment, reply): Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let result = state.load(*assignment).await;
        *state.doing.lock() = match &result {
            Ok(()) => "ready".into(),
            Err(reason) => format!("failed: {reason}"),
        };
        // The coordinator may be gone; it will ask again when it is back.
        let _ = reply.send(Wire::new(Loaded { error: result.err() }));
        Ok(())
    }
}

impl LoaderState {
    async fn load(&mut self, assignment: Assignment) -> Result<(), String> {
        // Links first: whoever waits for this node sees it while it loads.
        let links = self.options.links.connect(&assignment.nodes, assignment.you);
        let (peers, readers) = links.await?.into_peers();
        *self.doing.lock() = "opening the model".into();
        let model = self.open(&assignment).await?;
        *self.doing.lock() = "loading experts".into();
        assignment.check().map_err(|error| error.to_string())?;
        let config = model.checkpoint.config();
        let owners = Owners::new(config, assignment.placement).map_err(|e| e.to_string())?;
        self.load_experts(&model, &owners, assignment.you).await?;
        let engine = {
            let (backbone, kv_bytes) = (model.backbone.clone(), self.options.kv_bytes);
            let kv_dtype: KvDType = assignment.kv_dtype.parse().map_err(|error| {
                format!("the coordinator assigned a cache that this release lacks: {error}")
            })?;
            Engine::with_cache(backbone, kv_bytes, kv_dtype).map_err(|error| error.to_string())?
        };
        let parts = LaneParts {
            engine,
            store: model.store.clone(),
            owners: Arc::new(owners),
            index: assignment.you,
            peers,
            buffers: self.options.buffers.clone(),
            stats: self.stats.clone(),
        };
        ractor::call!(self.router, |reply| RouterMessage::Begin(Box::new(parts), reply))
            .map_err(|error| format!("the router is gone: {error}"))??;
        match self.options.inbox.load_full() {
            Some(lane) => readers.start(&lane),
            None => return Err("the lane ended as soon as it began".into()),
        }
        Ok(())
    }

    /// Opens the checkpoint and loads the backbone, unless that was done for an earlier epoch.
    async fn open(&mut self, assignment: &Assignment) -> Result<OpenModel, String> {
        let context = usize::try_from(assignment.context)
            .map_err(|_| format!("the coordinator assigned a context of {}", assignment.context))?;
        if let Some(model) = &self.model
            && model.checkpoint.id() == assignment.checkpoint
        {
            let here = model.backbone.config.context;
            if here != context {
                // A coordinator keeps its context for life, and a worker its coordinator.
                return Err(format!(
                    "this worker serves a context of {here} and was assigned {context}: restart it"
                ));
            }
            return Ok(model.clone());
        }
        let (source, device) = (self.options.model.clone(), self.options.device.clone());
        let (id, path) = (assignment.checkpoint, assignment.model_path.clone());
        let open = move || -> Result<_, String> {
            let checkpoint = match source {
                Model::Open(checkpoint) => checkpoint,
                Model::Folder(folder) => Arc::new(open_checkpoint(same_manifest(folder, &path))?),
                Model::AsAssigned => Arc::new(open_checkpoint(path.into())?),
            };
            if checkpoint.id() != id {
                return Err(format!(
                    "{} is another checkpoint than the coordinator's; use the same files",
                    checkpoint.location()
                ));
            }
            let backbone = Backbone::load_served(&checkpoint, Some(context), device, |_, _| {});
            Ok((checkpoint, Arc::new(backbone.map_err(|error| error.to_string())?)))
        };
        let (checkpoint, backbone) =
            tokio::task::spawn_blocking(open).await.map_err(|error| error.to_string())??;
        let store = Arc::new(DramStore::new(self.options.info.budget_bytes));
        let arguments = StorageArguments {
            store: store.clone(),
            checkpoint: checkpoint.clone(),
            reads: self.options.device.pool().threads(),
        };
        let (storage, _) = Actor::spawn_linked(None, StorageActor, arguments, self.node.clone())
            .await
            .map_err(|error| error.to_string())?;
        *self.options.store.lock() = Some(store.clone());
        let model = OpenModel { checkpoint, backbone, store, storage };
        // Shards of another checkpoint hold other experts, though under equal keys.
        for (_, shard) in std::mem::take(&mut self.shards).into_values() {
            let _ = shard.stop_and_wait(None, None).await;
        }
        if let Some(old) = self.model.replace(model.clone()) {
            let _ = old.storage.stop_and_wait(None, None).await;
        }
        Ok(model)
    }

    /// Brings the shards in line with an assignment: those whose experts stay are left alone.
    async fn load_experts(
        &mut self,
        model: &OpenModel,
        owners: &Owners,
        you: u16,
    ) -> Result<(), String> {
        let mut wanted: BTreeMap<u16, Vec<ExpertKey>> = BTreeMap::new();
        for key in model.checkpoint.config().expert_keys().filter(|&key| owners.owner(key) == you) {
            wanted.entry(key.layer).or_default().push(key);
        }
        let total = wanted.values().map(Vec::len).sum::<usize>() as u32;
        let stale: Vec<u16> = self
            .shards
            .iter()
            .filter(|(layer, (keys, _))| wanted.get(layer) != Some(keys))
            .map(|(layer, _)| *layer)
            .collect();
        for layer in stale {
            if let Some((_, shard)) = self.shards.remove(&layer) {
                // It stops in its own time; its storage lets go what it held before it fetches.
                let _ = shard.stop_and_wait(None, None).await;
            }
        }
        self.counters.total.store(total, Relaxed);
        let kept: usize = self.shards.values().map(|(keys, _)| keys.len()).sum();
        self.counters.loaded.store(kept as u32, Relaxed);
        let mut loads = Vec::new();
        for (layer, keys) in wanted {
            if self.shards.contains_key(&layer) {
                continue;
            }
            let arguments = ShardArguments {
                keys: keys.clone(),
                storage: model.storage.clone(),
                counters: self.counters.clone(),
            };
            let (shard, _) = Actor::spawn_linked(None, ExpertShard, arguments, self.node.clone())
                .await
                .map_err(|error| error.to_string())?;
            self.shards.insert(layer, (keys, shard.clone()));
            loads.push(async move {
                ractor::call!(shard, ShardMessage::Load)
                    .map_err(|error| format!("the shard of layer {layer} is gone: {error}"))?
            });
        }
        let result = futures::future::try_join_all(loads).await.map(|_| ());
        if result.is_err() {
            // What was fetched is let go, so that the next assignment begins afresh.
            for (_, shard) in std::mem::take(&mut self.shards).into_values() {
                shard.stop(None);
            }
        }
        result
    }
}

/// A folder with the number of the manifest that the coordinator's `DIR@N` ends with: the folder may
/// have been extended since, here or there. A folder that names a number itself keeps it.
fn same_manifest(folder: std::path::PathBuf, assigned: &str) -> std::path::PathBuf {
    match assigned.rsplit_once('@') {
        Some((_, number)) if folder.exists() => {
            let mut numbered = folder.into_os_string();
            numbered.push(format!("@{number}"));
            numbered.into()
        }
        _ => folder,
    }
}

fn open_checkpoint(folder: std::path::PathBuf) -> Result<Checkpoint, String> {
    Checkpoint::open(folder).map_err(|error| error.to_string())
}
