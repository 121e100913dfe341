//! The lane actor: it starts and stops the thread on which a node's sequences are computed.
//!
//! Control arrives here (begin, stop); batches and jobs go straight to the lane's bounded inbox.

use std::{io, sync::Arc};

use lite_llm_kernels::device::Device;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;

use super::{Lane, LaneHandle, LaneInbox, LaneParts, LaneStats};

/// Called when a lane's thread ends, with what made it end too early.
type Gone = Box<dyn FnOnce(Option<String>) + Send>;

/// A lane that is to be started, whatever it computes with.
pub struct LaneStart(Box<dyn FnOnce(Arc<LaneStats>, Gone) -> io::Result<LaneHandle> + Send>);

impl LaneStart {
    /// The lane of these parts.
    pub fn new<D: Device>(parts: LaneParts<D>) -> Self {
        Self(Box::new(move |stats, gone| Lane::spawn(parts, stats, gone)))
    }
}

/// What a lane actor is told.
#[derive(RactorMessage)]
pub enum LaneMessage {
    /// Start a lane in the place of the present one.
    Begin(LaneStart, Arc<LaneStats>, RpcReplyPort<Result<(), String>>),
    /// The lane's thread ended.
    LaneEnded {
        /// Which lane.
        lane: u64,
        /// What made it end too early.
        failure: Option<String>,
    },
}

/// Owner of a node's lane.
pub struct LaneActor;

/// The present lane.
pub struct LaneActorState {
    inbox: LaneInbox,
    lane: Option<LaneHandle>,
    count: u64,
}

impl LaneActorState {
    async fn stop(&mut self) {
        self.inbox.store(None);
        if let Some(lane) = self.lane.take() {
            // Joining a thread blocks, so it is not done here. A lane that cannot be joined has
            // panicked, which its own report tells.
            let _ = tokio::task::spawn_blocking(move || lane.stop()).await;
        }
    }
}

impl Actor for LaneActor {
    type Msg = LaneMessage;
    type State = LaneActorState;
    type Arguments = LaneInbox;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        inbox: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(LaneActorState { inbox, lane: None, count: 0 })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            LaneMessage::Begin(LaneStart(start), stats, reply) => {
                state.stop().await;
                state.count += 1;
                let lane = state.count;
                let gone = move |failure| {
                    // An actor that is gone needs no report.
                    let _ = myself.cast(LaneMessage::LaneEnded { lane, failure });
                };
                let result = start(stats, Box::new(gone))
                    .map_err(|error| format!("the system gives no thread for computing: {error}"));
                let result = result.map(|lane| {
                    state.inbox.store(Some(Arc::new(lane.inbox().clone())));
                    state.lane = Some(lane);
                });
                // The asker may have stopped.
                let _ = reply.send(result);
            }
            LaneMessage::LaneEnded { lane, failure } if lane == state.count => {
                if let Some(failure) = failure {
                    // The node supervises this actor and decides what becomes of it.
                    return Err(failure.into());
                }
            }
            LaneMessage::LaneEnded { .. } => {}
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        state.stop().await;
        Ok(())
    }
}
