//! The expert shard actor: which experts of one layer this node holds.
//!
//! It owns their lifetime: it has them served when they are assigned, and loaded as far as the node's
//! memory holds them, says when that is done, and lets them go when they are assigned no more, or
//! when it stops. Their arithmetic runs on the node's lane.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use lite_llm_runtime::expert::ExpertKey;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;

use crate::storage::StorageMessage;

/// How far a node is with loading; read by `status` while shards count.
#[derive(Debug, Default)]
pub struct LoadCounters {
    /// Experts that are served: what has room is in memory.
    pub loaded: AtomicU32,
    /// Experts that were assigned.
    pub total: AtomicU32,
}

/// What a shard is told.
#[derive(RactorMessage)]
pub enum ShardMessage {
    /// Serve this, too; answered when all that has room is in memory, or why it cannot be.
    Load(BTreeSet<ExpertKey>, RpcReplyPort<Result<(), String>>),
    /// Let everything go but this; answered when that is done.
    Keep(BTreeSet<ExpertKey>, RpcReplyPort<()>),
}

/// What a shard is made of.
pub struct ShardArguments {
    /// Where its experts come from.
    pub storage: ActorRef<StorageMessage>,
    /// Where it counts.
    pub counters: Arc<LoadCounters>,
}

/// The experts of one layer on one node.
pub struct ExpertShard;

/// A shard between messages.
pub struct ShardState {
    arguments: ShardArguments,
    /// Experts that are served.
    held: BTreeSet<ExpertKey>,
}

impl ShardState {
    async fn load(&mut self, keys: BTreeSet<ExpertKey>) -> Result<(), String> {
        let missing: Vec<ExpertKey> =
            keys.into_iter().filter(|key| !self.held.contains(key)).collect();
        let storage = &self.arguments.storage;
        let served = missing.clone();
        ractor::call!(storage, |reply| StorageMessage::Serve(served, reply))
            .map_err(|error| format!("the storage actor is gone: {error}"))?;
        let fetches = missing.iter().map(|&key| {
            let storage = self.arguments.storage.clone();
            let counters = self.arguments.counters.clone();
            async move {
                let fetched = ractor::call!(storage, |reply| StorageMessage::Load { key, reply });
                fetched
                    .map_err(|error| format!("the storage actor is gone: {error}"))?
                    .map_err(|error| error.to_string())?;
                counters.loaded.fetch_add(1, Relaxed);
                Ok::<(), String>(())
            }
        });
        // All are waited for, so that it is known what is here.
        let fetched = futures::future::join_all(fetches).await;
        let (mut result, mut failed) = (Ok(()), Vec::new());
        for (key, fetched) in missing.into_iter().zip(fetched) {
            match fetched {
                Ok(()) => drop(self.held.insert(key)),
                Err(error) => {
                    failed.push(key);
                    result = Err(error);
                }
            }
        }
        if !failed.is_empty() {
            // A storage actor that is gone has let everything go.
            let _ = ractor::call!(storage, |reply| StorageMessage::Release(failed, reply));
        }
        result
    }

    async fn keep(&mut self, keys: &BTreeSet<ExpertKey>) {
        let gone: Vec<ExpertKey> = self.held.difference(keys).copied().collect();
        self.held.retain(|key| keys.contains(key));
        self.arguments.counters.loaded.fetch_sub(gone.len() as u32, Relaxed);
        if !gone.is_empty() {
            // A storage actor that is gone has let everything go.
            let storage = &self.arguments.storage;
            let _ = ractor::call!(storage, |reply| StorageMessage::Release(gone, reply));
        }
    }
}

impl Actor for ExpertShard {
    type Msg = ShardMessage;
    type State = ShardState;
    type Arguments = ShardArguments;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(ShardState { arguments, held: BTreeSet::new() })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMessage::Load(keys, reply) => {
                let result = state.load(keys).await;
                // The asker may have given up.
                let _ = reply.send(result);
            }
            ShardMessage::Keep(keys, reply) => {
                state.keep(&keys).await;
                // As above.
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        state.keep(&BTreeSet::new()).await;
        Ok(())
    }
}
