//! The actor that carries a node's assignments out, one after the other, beside the node's mailbox.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use lite_llm_kernels::{cpu::Cpu, kv::KvDType};
use lite_llm_runtime::{
    backbone::Backbone, checkpoint::Checkpoint, engine::Engine, expert::ExpertKey, store::DramStore,
};
use lite_llm_transport::messages::Assignment;
use parking_lot::Mutex;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;

use crate::{
    lane::{LaneMessage, LaneParts, LaneStats},
    node::{Loaded, Model, NodeOptions},
    placement::Owners,
    shard::{ExpertShard, LoadCounters, ShardArguments, ShardMessage},
    storage::{StorageActor, StorageArguments, StorageMessage},
    wire::Wire,
};

/// See the module's text.
pub(super) struct Loader;

/// What it is told.
#[derive(RactorMessage)]
pub(super) enum LoaderMessage {
    /// Carry this out; answered when it is done.
    Load(Box<Assignment>, RpcReplyPort<Wire<Loaded>>),
}

/// An open model on this node.
#[derive(Clone)]
pub(super) struct OpenModel {
    checkpoint: Arc<Checkpoint>,
    backbone: Arc<Backbone<Cpu>>,
    store: Arc<DramStore>,
    storage: ActorRef<StorageMessage>,
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
    /// Per layer: the keys and the shard that holds them.
    pub(super) shards: BTreeMap<u16, (Vec<ExpertKey>, ActorRef<ShardMessage>)>,
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
        ractor::call!(self.lane, |reply| LaneMessage::Begin(Box::new(parts), reply))
            .map_err(|error| format!("the lane actor is gone: {error}"))??;
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
fn same_manifest(folder: PathBuf, assigned: &str) -> PathBuf {
    match assigned.rsplit_once('@') {
        Some((_, number)) if folder.exists() => {
            let mut numbered = folder.into_os_string();
            numbered.push(format!("@{number}"));
            numbered.into()
        }
        _ => folder,
    }
}

fn open_checkpoint(folder: PathBuf) -> Result<Checkpoint, String> {
    Checkpoint::open(folder).map_err(|error| error.to_string())
}
