//! The actor that carries a node's assignments out, one after the other, beside the node's mailbox.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use lite_llm_kernels::{cpu::Cpu, cuda_device::Gpu, device::DeviceError, kv::KvDType};
use lite_llm_runtime::{
    backbone::Backbone,
    blocks::{BlockOptions, BlockReader},
    checkpoint::Checkpoint,
    config::MoeConfig,
    engine::Engine,
    expert::ExpertKey,
    residency::{
        CacheOptions, ExpertCache, FetchOptions, REQUESTS, WRITES_MAX, fetcher_for,
        policy::{self, Shape},
    },
};
use lite_llm_transport::messages::Assignment;
use parking_lot::Mutex;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;

use crate::{
    archive,
    lane::{Arrangement, LaneEvent, LaneMessage, LaneParts, LaneStart, LaneStats},
    links::deliver,
    node::{
        Loaded, Model, NodeDevice, NodeOptions,
        device::{gpu_engine, load_kernels},
    },
    peers::{Epoch, PeerFetcher, PeerOptions},
    placement::Placement,
    shard::{ExpertShard, LoadCounters, ShardArguments, ShardMessage},
    storage::{StorageActor, StorageMessage},
    wire::Wire,
};

/// Part of the memory that the rest of the model leaves to experts at least: a quarter.
const EXPERTS_SHARE_MIN: u64 = 4;
/// Threads that verify what was read, at most: one hashes faster than most disks read.
const VERIFY_THREADS_MAX: usize = 2;

/// See the module's text.
pub(super) struct Loader;

/// What it is told: to carry an assignment out.
#[derive(RactorMessage)]
pub(super) struct LoaderMessage {
    pub(super) assignment: Box<Assignment>,
    /// Whether it is to be computed by from now on, or only to be loaded.
    pub(super) serves: bool,
    /// In which connection with the coordinator it came.
    pub(super) session: u64,
    /// Answered when it is done, or cannot be.
    pub(super) reply: RpcReplyPort<Wire<Loaded>>,
}

/// An open model on this node.
#[derive(Clone)]
pub(super) struct OpenModel {
    checkpoint: Arc<Checkpoint>,
    backbone: OpenBackbone,
    store: Arc<ExpertCache>,
    storage: ActorRef<StorageMessage>,
    /// Knows who else may have experts.
    peers: Arc<PeerFetcher>,
}

/// The dense part of a model, where it is computed with.
#[derive(Clone)]
enum OpenBackbone {
    Cpu(Arc<Backbone<Cpu>>),
    Cuda(Arc<Backbone<Gpu>>),
}

impl OpenBackbone {
    fn context(&self) -> usize {
        match self {
            Self::Cpu(backbone) => backbone.config.context,
            Self::Cuda(backbone) => backbone.config.context,
        }
    }
}

/// An assignment whose experts are here.
struct Assigned {
    model: OpenModel,
    placement: Placement,
    /// This node's experts, by layer.
    wanted: BTreeMap<u16, BTreeSet<ExpertKey>>,
}

/// A lane that has its memory and begins with an arrangement.
type Prepared = Box<dyn FnOnce(Arrangement) -> LaneStart + Send>;

/// What fixes a lane's bits, beside its requests: a coordinator that is started anew may want another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LaneOf {
    checkpoint: [u8; 32],
    kv_dtype: String,
    context: u64,
}

/// What it works with, and what is here.
pub(super) struct LoaderState {
    pub(super) options: NodeOptions,
    pub(super) counters: Arc<LoadCounters>,
    pub(super) stats: Arc<LaneStats>,
    pub(super) lane: ActorRef<LaneMessage>,
    /// What the node is doing, in words.
    pub(super) doing: Arc<Mutex<String>>,
    /// The node, which supervises what is started here.
    pub(super) node: ActorCell,
    pub(super) model: Option<OpenModel>,
    /// What the lane computes with, if there is one.
    pub(super) lane_of: Option<LaneOf>,
    /// A lane that has its memory already, and what it will compute with.
    pub(super) prepared: Mutex<Option<(LaneOf, Prepared)>>,
    /// By layer.
    pub(super) shards: BTreeMap<u16, ActorRef<ShardMessage>>,
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
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let LoaderMessage { assignment, serves, session, reply } = message;
        if session != state.options.session.load(Relaxed) {
            // It came before the coordinator was lost, which has other plans by now.
            let error = Some("the coordinator has connected anew since".to_owned());
            let _ = reply.send(Wire::new(Loaded { error }));
            return Ok(());
        }
        let result = match serves {
            false => match state.load(&assignment).await {
                Ok(Assigned { model, .. }) => state.prepare_lane(&model, &assignment).await,
                Err(reason) => Err(reason),
            },
            true => state.serve(*assignment).await,
        };
        if let Err(reason) = &result {
            if serves {
                // The coordinator takes it that this node holds nothing.
                *state.options.serving.lock() = None;
                *state.options.holding.lock() = None;
            }
            *state.doing.lock() = format!("failed: {reason}");
        }
        // The coordinator may be gone; it will ask again when it is back.
        let _ = reply.send(Wire::new(Loaded { error: result.err() }));
        Ok(())
    }
}

impl LoaderState {
    /// Has what an assignment gives this node, beside what it serves.
    async fn load(&mut self, assignment: &Assignment) -> Result<Assigned, String> {
        let (model, placement) = self.prepare(assignment).await?;
        let wanted = wanted(&model, &placement, assignment.you);
        let mut keep = wanted.clone();
        let serving = self.options.serving.lock().clone();
        // Who joins a cluster that serves does not know who has its share.
        let joins = serving.is_none() && assignment.epoch > 1;
        let mut epochs = vec![epoch(assignment, &placement, joins)];
        if let Some(serving) = serving {
            let (model, placement) = self.prepare(&serving).await?;
            if serving.checkpoint == assignment.checkpoint {
                epochs.insert(0, epoch(&serving, &placement, false));
            }
            for (layer, keys) in self::wanted(&model, &placement, serving.you) {
                keep.entry(layer).or_default().extend(keys);
            }
        }
        model.peers.arrange(epochs);
        // What is let go here is no longer held, whatever becomes of the rest.
        *self.options.holding.lock() = self.options.serving.lock().clone();
        self.keep(&keep).await?;
        let total = wanted.values().map(BTreeSet::len).sum::<usize>() as u32;
        self.counters.total.store(total, Relaxed);
        let mut loads = Vec::new();
        for (&layer, keys) in &wanted {
            let (shard, keys) = (self.shard(&model, layer).await?, keys.clone());
            loads.push(async move {
                ractor::call!(shard, |reply| ShardMessage::Load(keys, reply))
                    .map_err(|error| format!("the shard of layer {layer} is gone: {error}"))?
            });
        }
        let loaded = futures::future::join_all(loads).await;
        loaded.into_iter().collect::<Result<(), String>>()?;
        *self.options.holding.lock() = Some(assignment.clone());
        if self.options.inbox.load().is_none() {
            *self.doing.lock() = "waiting for the cluster".into();
        }
        Ok(Assigned { model, placement, wanted })
    }

    /// Computes by an assignment from now on, and lets go what it does not give this node.
    async fn serve(&mut self, assignment: Assignment) -> Result<(), String> {
        let Assigned { model, placement, wanted } = self.load(&assignment).await?;
        let (me, nodes) = (assignment.you, assignment.nodes.clone());
        let arrangement = Arrangement { placement: Arc::new(placement), me, nodes };
        let lane_of = LaneOf::of(&assignment);
        let lane = self.options.inbox.load_full();
        match lane.filter(|_| self.lane_of.as_ref() == Some(&lane_of)) {
            Some(lane) => {
                if !deliver(&lane, LaneEvent::Rearrange(arrangement)).await {
                    return Err("this worker's lane takes no events".into());
                }
            }
            None => {
                // Links to an earlier lane end with it.
                self.options.links.stop();
                self.begin(&model, &assignment, arrangement).await?;
                self.lane_of = Some(lane_of);
            }
        }
        self.options.links.keep_to(&assignment.nodes, assignment.you);
        *self.options.serving.lock() = Some(assignment);
        self.keep(&wanted).await?;
        *self.doing.lock() = "ready".into();
        Ok(())
    }

    /// Lets go of all experts but these.
    async fn keep(&self, keep: &BTreeMap<u16, BTreeSet<ExpertKey>>) -> Result<(), String> {
        for (layer, shard) in &self.shards {
            let keys = keep.get(layer).cloned().unwrap_or_default();
            ractor::call!(shard, |reply| ShardMessage::Keep(keys, reply))
                .map_err(|error| format!("the shard of layer {layer} is gone: {error}"))?;
        }
        Ok(())
    }

    /// Takes memory for the lane, unless there is one: others would wait for it once this node serves.
    async fn prepare_lane(
        &mut self,
        model: &OpenModel,
        assignment: &Assignment,
    ) -> Result<(), String> {
        let lane_of = LaneOf::of(assignment);
        let here = self.prepared.get_mut().as_ref().is_some_and(|(of, _)| *of == lane_of);
        if !here && self.options.inbox.load().is_none() {
            let prepared = self.prepared_lane(model, assignment).await?;
            *self.prepared.get_mut() = Some((lane_of, prepared));
        }
        Ok(())
    }

    /// A lane that has its memory.
    async fn prepared_lane(
        &mut self,
        model: &OpenModel,
        assignment: &Assignment,
    ) -> Result<Prepared, String> {
        // The memory of another is to be free again.
        *self.prepared.get_mut() = None;
        let before = self.doing.lock().clone();
        *self.doing.lock() = "taking memory for keys and values".into();
        let kv_dtype = kv_dtype_of(assignment)?;
        let (model, options) = (model.clone(), self.options.clone());
        // Taking memory from a GPU blocks.
        let prepare = move || prepare(&model, &options, kv_dtype);
        let prepared = tokio::task::spawn_blocking(prepare).await;
        let prepared = prepared.map_err(|error| error.to_string())?;
        *self.doing.lock() = before;
        prepared.map_err(|error| error.to_string())
    }

    /// Starts the lane.
    async fn begin(
        &mut self,
        model: &OpenModel,
        assignment: &Assignment,
        arrangement: Arrangement,
    ) -> Result<(), String> {
        let lane_of = LaneOf::of(assignment);
        let prepared = self.prepared.get_mut().take().filter(|(of, _)| *of == lane_of);
        let prepared = match prepared {
            Some((_, prepared)) => prepared,
            None => self.prepared_lane(model, assignment).await?,
        };
        let start = prepared(arrangement);
        let begin = |reply| LaneMessage::Begin(start, self.stats.clone(), reply);
        ractor::call!(self.lane, begin)
            .map_err(|error| format!("the lane actor is gone: {error}"))?
    }

    /// The model of an assignment, open, and who holds which of its experts.
    async fn prepare(&mut self, assignment: &Assignment) -> Result<(OpenModel, Placement), String> {
        let model = self.open(assignment).await?;
        assignment.check().map_err(|error| error.to_string())?;
        let rules = assignment.placement.clone();
        let placement =
            Placement::new(model.checkpoint.config(), rules).map_err(|error| error.to_string())?;
        Ok((model, placement))
    }

    /// The shard of a layer.
    async fn shard(
        &mut self,
        model: &OpenModel,
        layer: u16,
    ) -> Result<ActorRef<ShardMessage>, String> {
        if let Some(shard) = self.shards.get(&layer) {
            return Ok(shard.clone());
        }
        let arguments =
            ShardArguments { storage: model.storage.clone(), counters: self.counters.clone() };
        let (shard, _) = Actor::spawn_linked(None, ExpertShard, arguments, self.node.clone())
            .await
            .map_err(|error| error.to_string())?;
        self.shards.insert(layer, shard.clone());
        Ok(shard)
    }

    /// Opens the checkpoint and loads the backbone, unless that was done for an earlier epoch.
    async fn open(&mut self, assignment: &Assignment) -> Result<OpenModel, String> {
        let context = usize::try_from(assignment.context)
            .map_err(|_| format!("the coordinator assigned a context of {}", assignment.context))?;
        if let Some(model) = &self.model
            && model.checkpoint.id() == assignment.checkpoint
        {
            let here = model.backbone.context();
            if here != context {
                // A coordinator keeps its context for life, and a worker its coordinator.
                return Err(format!(
                    "this worker serves a context of {here} and was assigned {context}: restart it"
                ));
            }
            return Ok(model.clone());
        }
        if self.options.inbox.load().is_none() {
            *self.doing.lock() = "opening the model".into();
        }
        let (source, device) = (self.options.model.clone(), self.options.device.clone());
        let kv_dtype = kv_dtype_of(assignment)?;
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
            let backbone = match device {
                NodeDevice::Cpu(cpu) => {
                    Backbone::load_served(&checkpoint, Some(context), cpu, |_, _| {})
                        .map(|backbone| OpenBackbone::Cpu(Arc::new(backbone)))
                }
                NodeDevice::Cuda { gpu, .. } => {
                    // Before it says that it is ready: at their first use, jobs would wait for them.
                    let loaded = load_kernels(&gpu, &checkpoint, kv_dtype);
                    loaded.map_err(|error| error.to_string())?;
                    Backbone::load_served(&checkpoint, Some(context), gpu, |_, _| {})
                        .map(|backbone| OpenBackbone::Cuda(Arc::new(backbone)))
                }
            };
            Ok((checkpoint, backbone.map_err(|error| error.to_string())?))
        };
        let (checkpoint, backbone) =
            tokio::task::spawn_blocking(open).await.map_err(|error| error.to_string())??;
        *self.prepared.get_mut() = None;
        if let Some(old) = &self.model {
            // Of another checkpoint: it is not to keep the disk cache from the next.
            let store = old.store.clone();
            let retired = tokio::task::spawn_blocking(move || store.retire());
            retired.await.map_err(|error| error.to_string())?;
        }
        let (options, of) = (self.options.clone(), checkpoint.clone());
        let made = tokio::task::spawn_blocking(move || cache(&options, &of)).await;
        let (store, peers) = made.map_err(|error| error.to_string())??;
        self.options.links.served().show(checkpoint.id(), &store);
        let (storage, _) =
            Actor::spawn_linked(None, StorageActor, store.clone(), self.node.clone())
                .await
                .map_err(|error| error.to_string())?;
        *self.options.store.lock() = Some(store.clone());
        self.options.grammars.show(&checkpoint);
        let model = OpenModel { checkpoint, backbone, store, storage, peers };
        // Shards of another checkpoint hold other experts, though under equal keys.
        for shard in std::mem::take(&mut self.shards).into_values() {
            let _ = shard.stop_and_wait(None, None).await;
        }
        if let Some(old) = self.model.replace(model.clone()) {
            let _ = old.storage.stop_and_wait(None, None).await;
        }
        Ok(model)
    }
}

/// How an assignment has keys and values kept.
fn kv_dtype_of(assignment: &Assignment) -> Result<KvDType, String> {
    assignment.kv_dtype.parse().map_err(|error| {
        format!("the coordinator assigned a cache that this release lacks: {error}")
    })
}

impl LaneOf {
    fn of(assignment: &Assignment) -> Self {
        let Assignment { checkpoint, context, .. } = *assignment;
        Self { checkpoint, kv_dtype: assignment.kv_dtype.clone(), context }
    }
}

/// Takes memory for a lane that computes with a model on a node's device.
fn prepare(
    model: &OpenModel,
    options: &NodeOptions,
    kv_dtype: KvDType,
) -> Result<Prepared, DeviceError> {
    let (buffers, limits, kv_bytes) = (options.buffers.clone(), options.limits, options.kv_bytes);
    match (&model.backbone, &options.device) {
        (OpenBackbone::Cpu(backbone), _) => {
            let engine = Engine::with_cache(backbone.clone(), kv_bytes, kv_dtype)?;
            let store = model.store.clone();
            Ok(Box::new(move |arrangement| {
                LaneStart::new(LaneParts { engine, store, arrangement, buffers, limits })
            }))
        }
        (OpenBackbone::Cuda(backbone), device) => {
            let hbm = match device {
                NodeDevice::Cuda { hbm_bytes, sharers, .. } => (*hbm_bytes, *sharers),
                NodeDevice::Cpu(_) => (None, 1),
            };
            // An earlier lane's memory is to be free again.
            *options.hbm.lock() = None;
            let (below, cache) = (model.store.clone(), (kv_bytes, kv_dtype));
            let (engine, store) = gpu_engine(backbone, below, &model.checkpoint, cache, hbm)?;
            *options.hbm.lock() = Some(store.clone());
            Ok(Box::new(move |arrangement| {
                LaneStart::new(LaneParts { engine, store, arrangement, buffers, limits })
            }))
        }
    }
}

/// An empty cache for the experts of a checkpoint, and who fetches them. Takes as long as it does to look
/// through a disk cache's folder.
fn cache(
    options: &NodeOptions,
    checkpoint: &Arc<Checkpoint>,
) -> Result<(Arc<ExpertCache>, Arc<PeerFetcher>), String> {
    let threads = options.device.cpu().pool().threads().min(VERIFY_THREADS_MAX);
    let failed = |error: std::io::Error| format!("experts cannot be read: {error}");
    let reader = BlockReader::new(BlockOptions::default()).map_err(failed)?;
    let nvme = options.nvme.clone();
    let ways = FetchOptions { reader, nvme, threads, requests: REQUESTS };
    let next = fetcher_for(checkpoint, ways).map_err(failed)?;
    let (checkpoint_of, links) = (checkpoint.clone(), options.links.clone());
    let peers = PeerOptions { checkpoint: checkpoint_of, next, links };
    let peers = Arc::new(PeerFetcher::new(peers));
    let config = checkpoint.config();
    let all = options.info.budget_bytes;
    let budget = match options.dram_holds_rest {
        true => {
            let largest = checkpoint.tier_expert_bytes().into_iter().max().unwrap_or(0);
            // What waits to be written to a disk cache, and what arrives packed.
            let staged = WRITES_MAX as u64 * u64::from(options.nvme.is_some());
            let packed = REQUESTS as u64 * u64::from(checkpoint.is_stored());
            let beside = checkpoint.dense_bytes() + largest * (staged + packed);
            all.saturating_sub(beside).max(all / EXPERTS_SHARE_MIN)
        }
        false => all,
    };
    let moe = config.moe.clone().unwrap_or_else(MoeConfig::without_experts);
    let shape = Shape::new(config.sparse_layers().count(), &moe);
    let cache = ExpertCache::new(CacheOptions {
        moe: Arc::new(moe),
        budget,
        expert_bytes: checkpoint.tier_expert_bytes(),
        policy: policy::best(shape, budget),
        prefetch: true,
        fetcher: peers.clone(),
    });
    Ok((cache, peers))
}

/// The experts that a placement gives a node, by layer.
fn wanted(
    model: &OpenModel,
    placement: &Placement,
    you: u16,
) -> BTreeMap<u16, BTreeSet<ExpertKey>> {
    let mut wanted: BTreeMap<u16, BTreeSet<ExpertKey>> = BTreeMap::new();
    let keys = model.checkpoint.config().expert_keys();
    for key in keys.filter(|&key| placement.holds(you, key)) {
        wanted.entry(key.layer).or_default().insert(key);
    }
    wanted
}

/// Whom a placement names.
fn epoch(assignment: &Assignment, placement: &Placement, any: bool) -> Epoch {
    let (placement, nodes) = (Arc::new(placement.clone()), assignment.nodes.clone());
    Epoch { placement, nodes, me: assignment.you, any }
}

/// A folder with the number of the manifest that the coordinator's `DIR@N` ends with: the folder may
/// have been extended since, here or there. A folder that names a number itself keeps it.
fn same_manifest(folder: PathBuf, assigned: &str) -> PathBuf {
    let numbered =
        |text: &str| text.rsplit_once('@').is_some_and(|(_, n)| n.parse::<u64>().is_ok());
    let store = archive::is_url(&folder) && !folder.to_str().is_some_and(numbered);
    match assigned.rsplit_once('@') {
        Some((_, number)) if folder.exists() || store => {
            let mut numbered = folder.into_os_string();
            numbered.push(format!("@{number}"));
            numbered.into()
        }
        _ => folder,
    }
}

fn open_checkpoint(location: PathBuf) -> Result<Checkpoint, String> {
    archive::open_checkpoint(&location).map_err(|error| error.to_string())
}
