//! The storage actor of a residence: it owns a node's experts in the memory of the host.
//!
//! Lanes demand experts of the cache themselves, for a message would cost more than the answer; what
//! takes long is done on the cache's own threads. This actor says what the cache serves, has it
//! filled, and ends it.

use std::{collections::BTreeSet, sync::Arc};

use lite_llm_runtime::{
    expert::{ExpertKey, StoreError},
    residency::ExpertCache,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;

/// What a storage actor is told.
#[derive(RactorMessage)]
pub enum StorageMessage {
    /// Serves these experts, too; answered when that is so.
    Serve(Vec<ExpertKey>, RpcReplyPort<()>),
    /// Brings a served expert here, if there is room for it that nothing else takes.
    Load {
        /// Which expert.
        key: ExpertKey,
        /// Answered its bytes when it is here, 0 if it will be when it is needed.
        reply: RpcReplyPort<Result<u64, StoreError>>,
    },
    /// Lets experts go; answered when that is done.
    Release(Vec<ExpertKey>, RpcReplyPort<()>),
}

/// The DRAM residence.
pub struct StorageActor;

/// What it works with.
pub struct StorageState {
    cache: Arc<ExpertCache>,
    served: BTreeSet<ExpertKey>,
}

impl Actor for StorageActor {
    type Msg = StorageMessage;
    type State = StorageState;
    type Arguments = Arc<ExpertCache>;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        cache: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(StorageState { cache, served: BTreeSet::new() })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            StorageMessage::Serve(keys, reply) => {
                state.served.extend(keys);
                state.cache.keep(state.served.clone());
                // The asker may have stopped, here and below.
                let _ = reply.send(());
            }
            StorageMessage::Load { key, reply } => {
                state.cache.load(key, move |loaded| drop(reply.send(loaded)));
            }
            StorageMessage::Release(keys, reply) => {
                state.served = &state.served - &keys.into_iter().collect();
                state.cache.keep(state.served.clone());
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
        state.cache.keep(BTreeSet::new());
        state.cache.trim();
        Ok(())
    }
}
