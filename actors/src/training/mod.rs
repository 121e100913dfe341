//! Training by several: a hub, where the run is, and workers, the ranks of the training.
//!
//! ```text
//! the run's thread ── Tell ──▶ HubActor ── orders ──▶ a task per worker ══ QUIC ══▶ Worker ══ QUIC ══ other workers
//!                 ◀── given ──         ◀── Done, Lost ──
//! ```
//!
//! What ranks compute, and what they say to each other, is the runtime's (`train::spread`, `train::rank`): here are
//! the ways. A worker that is lost takes what it owned with it: all begin anew from the run's last
//! checkpoint, with those that are there when nobody else comes.
//!
//! Every wait has a deadline: an order's result ([`hub::ORDER_TIMEOUT`]), a call between workers
//! ([`peers::CALL_TIMEOUT`]), workers that are to come ([`Patience`]).

pub mod hub;
pub mod peers;
mod stream;
pub mod worker;

use std::{net::SocketAddr, sync::Arc};

use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_runtime::train::{TrainError, spread::Ranks};
use lite_llm_transport::{
    endpoint::{Endpoint, Options},
    identity::{ClusterCa, Role},
    session::Hello,
    token::JoinToken,
};
use ractor::{Actor, ActorRef, rpc::CallResult};
use tokio::runtime::Handle;
use tracing::Span;

pub use self::hub::Patience;
use self::hub::{HubActor, HubMessage};
use crate::trace::context_of;

/// Why training by several did not begin.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TrainingError(pub(crate) String);

fn failed(error: impl std::fmt::Display) -> TrainingError {
    TrainingError(error.to_string())
}

/// Where workers come to.
pub struct Hub {
    actor: ActorRef<HubMessage>,
    endpoint: Endpoint,
    token: JoinToken,
    address: SocketAddr,
    workers: usize,
}

impl Hub {
    /// Listens for workers, of which so many are waited for.
    pub async fn start(
        listen: SocketAddr,
        workers: usize,
        patience: Patience,
    ) -> Result<Self, TrainingError> {
        let authority = Arc::new(ClusterCa::ephemeral().map_err(failed)?);
        let identity = authority.identity(Role::Coordinator, "trainer").map_err(failed)?;
        let options = Options::new(Hello::new(DETERMINISM_VERSION));
        let endpoint = Endpoint::bind_coordinator(listen, &identity, authority.clone(), options)
            .map_err(failed)?;
        let address = endpoint.local_addr().map_err(failed)?;
        let token = authority.join_token(Role::Worker, address.to_string()).map_err(failed)?;
        let (actor, _) = Actor::spawn(None, HubActor, patience).await.map_err(failed)?;
        let (accepting, to) = (endpoint.clone(), actor.clone());
        tokio::spawn(async move {
            while let Some(connection) = accepting.accept().await {
                if to.cast(HubMessage::Joined(connection)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { actor, endpoint, token, address, workers })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What lets workers in.
    pub fn token(&self) -> &JoinToken {
        &self.token
    }

    /// For a run, which calls it from a thread that may block; `runtime` is where the hub lives.
    pub fn ranks(&self, runtime: Handle) -> Arc<dyn Ranks> {
        let (actor, wanted) = (self.actor.clone(), self.workers);
        Arc::new(Remote { actor, wanted, runtime })
    }

    /// Sends the workers away.
    pub async fn stop(self) {
        self.actor.stop(None);
        self.endpoint.close("the training is over").await;
    }
}

struct Remote {
    actor: ActorRef<HubMessage>,
    wanted: usize,
    runtime: Handle,
}

fn ended() -> TrainError {
    TrainError::Workers("the hub of the workers has ended".into())
}

impl Ranks for Remote {
    fn gather(&self) -> Result<usize, TrainError> {
        let wanted = self.wanted;
        let ask = self.actor.call(|reply| HubMessage::Gather { wanted, reply }, None);
        match self.runtime.block_on(ask) {
            Ok(CallResult::Success(found)) => found,
            _ => Err(ended()),
        }
    }

    fn tell(&self, orders: Vec<Arc<Vec<u8>>>) -> Result<Vec<Vec<u8>>, TrainError> {
        let trace = context_of(&Span::current());
        let ask = self.actor.call(|reply| HubMessage::Tell { orders, trace, reply }, None);
        match self.runtime.block_on(ask) {
            Ok(CallResult::Success(given)) => given,
            _ => Err(ended()),
        }
    }
}
