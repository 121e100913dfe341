//! The expert shard actor: the experts of one layer that this node was given.
//!
//! It owns their lifetime: it has them fetched when it starts, says when all are resident, and
//! lets them go when it stops. Their arithmetic runs on the node's lane.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use lite_llm_runtime::expert::ExpertKey;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;

use crate::storage::StorageMessage;

/// How far a node is with loading; read by `status` while shards count.
#[derive(Debug, Default)]
pub struct LoadCounters {
    /// Experts that are resident.
    pub loaded: AtomicU32,
    /// Experts that were assigned.
    pub total: AtomicU32,
}

/// What a shard is told.
#[derive(RactorMessage)]
pub enum ShardMessage {
    /// Answers when all experts are resident, or why they cannot be.
    Load(RpcReplyPort<Result<(), String>>),
}

/// What a shard is made of.
pub struct ShardArguments {
    /// Its experts.
    pub keys: Vec<ExpertKey>,
    /// Where they come from.
    pub storage: ActorRef<StorageMessage>,
    /// Where it counts.
    pub counters: Arc<LoadCounters>,
}

/// The experts of one layer on one node.
pub struct ExpertShard;

impl Actor for ExpertShard {
    type Msg = ShardMessage;
    type State = ShardArguments;
    type Arguments = ShardArguments;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        ShardMessage::Load(reply): Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let fetches = state.keys.iter().map(|&key| {
            let (storage, counters) = (state.storage.clone(), state.counters.clone());
            async move {
                let fetched = ractor::call!(storage, |reply| StorageMessage::Fetch { key, reply });
                fetched
                    .map_err(|error| format!("the storage actor is gone: {error}"))?
                    .map_err(|error| error.to_string())?;
                counters.loaded.fetch_add(1, Relaxed);
                Ok::<(), String>(())
            }
        });
        // All are waited for, so that what is let go afterwards is all that there is.
        let fetched: Vec<Result<(), String>> = futures::future::join_all(fetches).await;
        let result = fetched.into_iter().collect();
        // The asker may have given up.
        let _ = reply.send(result);
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        // A storage actor that is gone has let everything go.
        let _ = state.storage.cast(StorageMessage::Release(std::mem::take(&mut state.keys)));
        Ok(())
    }
}
