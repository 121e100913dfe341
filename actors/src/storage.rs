//! The storage actor of one residence: today DRAM, filled from the checkpoint.
//!
//! It answers each fetch when the experts asked for are resident. Reading and verifying happen on
//! blocking threads, at most as many at a time as the node computes with, never on the actor's own
//! task.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use lite_llm_runtime::{
    checkpoint::Checkpoint,
    expert::{ExpertKey, StoreError},
    store::DramStore,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use tokio::sync::Semaphore;

/// How often, and how long in all, room is waited for that experts take which were let go.
const LEAVING_WAIT: Duration = Duration::from_millis(20);
const LEAVING_WAIT_MAX: Duration = Duration::from_secs(2);

/// What a storage actor is told.
#[derive(RactorMessage)]
pub enum StorageMessage {
    /// Makes an expert resident; answers its bytes when it is.
    Fetch {
        /// Which expert.
        key: ExpertKey,
        /// Answered once it is resident, or cannot be.
        reply: RpcReplyPort<Result<u64, StoreError>>,
    },
    /// Lets experts go; answered when that is done.
    Release(Vec<ExpertKey>, RpcReplyPort<()>),
}

/// The DRAM residence.
pub struct StorageActor;

/// What it works with.
pub struct StorageState {
    store: Arc<DramStore>,
    checkpoint: Arc<Checkpoint>,
    reads: Arc<Semaphore>,
}

/// What it is made of.
pub struct StorageArguments {
    /// Where experts are held.
    pub store: Arc<DramStore>,
    /// Where they come from.
    pub checkpoint: Arc<Checkpoint>,
    /// Experts that are read at a time.
    pub reads: usize,
}

impl Actor for StorageActor {
    type Msg = StorageMessage;
    type State = StorageState;
    type Arguments = StorageArguments;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        StorageArguments { store, checkpoint, reads }: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(StorageState { store, checkpoint, reads: Arc::new(Semaphore::new(reads.max(1))) })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            StorageMessage::Fetch { key, reply } => {
                let (store, checkpoint) = (state.store.clone(), state.checkpoint.clone());
                let reads = state.reads.clone();
                tokio::spawn(async move {
                    let Ok(_permit) = reads.acquire_owned().await else { return };
                    let began = Instant::now();
                    let result = loop {
                        let (store, checkpoint) = (store.clone(), checkpoint.clone());
                        let load = move || store.load(&checkpoint, key);
                        let loaded = tokio::task::spawn_blocking(load).await;
                        match loaded {
                            // What was let go is still computed with, for a moment.
                            Ok(Err(StoreError::OverBudget { .. }))
                                if began.elapsed() < LEAVING_WAIT_MAX =>
                            {
                                tokio::time::sleep(LEAVING_WAIT).await;
                            }
                            Ok(result) => break result,
                            Err(error) => {
                                let reason = error.to_string();
                                break Err(StoreError::Unreadable { key, reason });
                            }
                        }
                    };
                    // The asker may have stopped.
                    let _ = reply.send(result);
                });
            }
            StorageMessage::Release(keys, reply) => {
                keys.into_iter().for_each(|key| state.store.remove(key));
                // As above.
                let _ = reply.send(());
            }
        }
        Ok(())
    }
}
