//! Training by several: a hub that has the parameters, and workers that compute nodes of each step.
//!
//! ```text
//! the run's thread ── Compute ──▶ HubActor ── orders ──▶ a task per worker ══ QUIC ══▶ TrainWorker
//!                 ◀── results ──           ◀── Done, Lost ──
//! ```
//!
//! The run cuts a batch into nodes of the contract's tree and adds what they give in that tree
//! (`runtime::train::step`), so no bit depends on how many workers there are, on which of them computes what, or
//! on who is lost: the node of a worker that is lost is given to another. Parameters travel by what changed:
//! each worker is sent those whose hashes differ from what it has.
//!
//! Every wait has a deadline: a node's result ([`hub::NODE_TIMEOUT`]), a worker when none is left (`patience`).

pub mod hub;
mod stream;
pub mod worker;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_runtime::{
    checkpoint::index::Hash,
    train::{
        TrainError,
        params::Params,
        shared::{Computed, Work, Workers, model_to_bytes},
    },
};
use lite_llm_transport::{
    endpoint::{Endpoint, Options},
    identity::{ClusterCa, Role},
    session::Hello,
    token::JoinToken,
};
use ractor::{Actor, ActorRef, rpc::CallResult};
use tokio::runtime::Handle;

use self::hub::{HubActor, HubMessage, Refused, Snapshot};

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
    patience: Duration,
}

impl Hub {
    /// Listens for workers. A batch is cut for `workers` of them; `patience` is how long a step waits for one when
    /// none is there.
    pub async fn start(
        listen: SocketAddr,
        workers: usize,
        patience: Duration,
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
        Ok(Self { actor, endpoint, token, address, workers, patience })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What lets workers in.
    pub fn token(&self) -> &JoinToken {
        &self.token
    }

    /// Waits until as many workers as wanted are there.
    pub async fn ready(&self) -> Result<(), TrainingError> {
        let wanted = self.workers;
        let asked = self.actor.call(|reply| HubMessage::Ready(wanted, reply), Some(self.patience));
        match asked.await.map_err(failed)? {
            CallResult::Success(()) => Ok(()),
            _ => Err(TrainingError(format!(
                "{wanted} workers did not come within {:?}; look at what they say",
                self.patience
            ))),
        }
    }

    /// For a run, which calls it from a thread that may block; `runtime` is where the hub lives.
    pub fn workers(&self, runtime: Handle) -> Box<dyn Workers> {
        let (actor, count) = (self.actor.clone(), self.workers);
        Box::new(Remote { actor, count, runtime, last: None })
    }

    /// Sends the workers away.
    pub async fn stop(self) {
        self.actor.stop(None);
        self.endpoint.close("the training is over").await;
    }
}

struct Remote {
    actor: ActorRef<HubMessage>,
    count: usize,
    runtime: Handle,
    last: Option<Arc<Snapshot>>,
}

impl Remote {
    /// The parameters as they are; what has not changed is shared with the step before.
    fn snapshot(&mut self, params: &Params) -> Result<Arc<Snapshot>, TrainError> {
        let model = model_to_bytes(params.config())?;
        let last = self.last.take().filter(|last| *last.model == model);
        let values = params.list().iter().enumerate().map(|(id, param)| {
            let same = |old: &[f32]| {
                let bits = old.iter().zip(param.values()).all(|(a, b)| a.to_bits() == b.to_bits());
                bits && old.len() == param.values().len()
            };
            match last.as_ref().and_then(|last| last.values.get(id)) {
                Some((hash, values)) if same(values) => (*hash, values.clone()),
                _ => (Hash::of_f32s(param.values()), Arc::new(param.values().to_vec())),
            }
        });
        let values = values.collect();
        let model = last.as_ref().map_or_else(|| Arc::new(model), |last| last.model.clone());
        let snapshot = Arc::new(Snapshot { model, values });
        self.last = Some(snapshot.clone());
        Ok(snapshot)
    }
}

impl Workers for Remote {
    fn count(&self) -> usize {
        self.count
    }

    fn compute(&mut self, params: &Params, work: Vec<Work>) -> Result<Vec<Computed>, TrainError> {
        let snapshot = self.snapshot(params)?;
        let work: Vec<Arc<Vec<u8>>> = work.iter().map(|work| Arc::new(work.to_bytes())).collect();
        let ask = self.actor.call(|reply| HubMessage::Compute { snapshot, work, reply }, None);
        let found = match self.runtime.block_on(ask) {
            Ok(CallResult::Success(found)) => found,
            _ => return Err(TrainError::Workers("the hub of the workers has ended".into())),
        };
        let damaged =
            |error: lite_llm_runtime::train::Damaged| TrainError::Workers(error.to_string());
        match found {
            Ok(found) => found
                .iter()
                .map(|bytes| Computed::from_bytes(bytes, params).map_err(damaged))
                .collect(),
            Err(Refused::Work(bytes)) => {
                Err(TrainError::from_bytes(&bytes).unwrap_or_else(damaged))
            }
            Err(Refused::Nobody(reason)) => Err(TrainError::Workers(reason)),
        }
    }
}
