//! A worker of a training: it holds parameters as it is told them, and computes nodes.

use std::{net::SocketAddr, sync::Arc};

use lite_llm_kernels::{DETERMINISM_VERSION, cpu::Cpu};
use lite_llm_runtime::train::{
    TrainError,
    params::Params,
    shared::{Work, empty_model, set_values},
};
use lite_llm_transport::{
    connection::StreamKind,
    endpoint::{Endpoint, Expect, Options},
    identity::Role,
    join::join,
    messages::TrainMessage,
    session::Hello,
    token::JoinToken,
};
use tracing::warn;

use super::{TrainingError, failed, stream::TrainStream};

/// Longest configuration of a model.
const MODEL_BYTES_MAX: u64 = 16 << 20;
/// Longest work: rows of tokens, and what all gates say.
const WORK_BYTES_MAX: u64 = 1 << 30;

/// What a worker is started with.
pub struct TrainWorkerOptions {
    /// Where the hub listens.
    pub hub: SocketAddr,
    /// What lets the worker in.
    pub token: JoinToken,
    /// Its name.
    pub name: String,
    /// What computes.
    pub cpu: Arc<Cpu>,
}

/// Serves until the hub sends it away or is lost; which of the two is said.
pub async fn serve(options: TrainWorkerOptions) -> Result<String, TrainingError> {
    let TrainWorkerOptions { hub, token, name, cpu } = options;
    let hello = Hello::new(DETERMINISM_VERSION);
    let identity = join(hub, &token, Role::Worker, &name, &hello).await.map_err(failed)?;
    let endpoint = Endpoint::outgoing(hub, &identity, Options::new(hello)).map_err(failed)?;
    let connection = endpoint.connect(hub, &Expect::coordinator()).await.map_err(failed)?;
    while let Some(stream) = connection.accept_stream().await {
        if stream.kind != StreamKind::Train {
            warn!(kind = %stream.kind, "a stream that a worker of a training has no use for");
            continue;
        }
        let frames = stream.into_frames();
        let stream = TrainStream::new(frames, &connection, endpoint.pool().clone());
        if let Err(error) = serve_stream(stream, cpu.clone()).await {
            warn!(error, "the hub's stream ended");
        }
    }
    Ok(connection.closed().await.to_string())
}

async fn serve_stream(mut stream: TrainStream, cpu: Arc<Cpu>) -> Result<(), String> {
    let mut model: Option<Params> = None;
    while let Some(head) = stream.head().await? {
        match head {
            TrainMessage::Model { .. } => {
                let bytes = stream.bytes(head, MODEL_BYTES_MAX).await?;
                model = Some(empty_model(&bytes).map_err(|error| error.to_string())?);
            }
            TrainMessage::Values { .. } => {
                let params = model.as_mut().ok_or("values came before their model")?;
                let of = |p: &lite_llm_runtime::train::params::Param| 4 * p.values().len() + 16;
                let most: usize = params.list().iter().map(of).sum();
                let bytes = stream.bytes(head, most as u64 + 8).await?;
                set_values(params, &bytes).map_err(|error| error.to_string())?;
            }
            TrainMessage::Work { number, .. } => {
                let bytes = stream.bytes(head, WORK_BYTES_MAX).await?;
                let work = Work::from_bytes(&bytes).map_err(|error| error.to_string())?;
                let params = model.take().ok_or("work came before its model")?;
                let cpu = cpu.clone();
                let computing = tokio::task::spawn_blocking(move || {
                    let found = work.compute(&cpu, &params).map(|found| found.to_bytes());
                    (params, found)
                });
                let (params, found) =
                    computing.await.map_err(|error| format!("computing ended: {error}"))?;
                model = Some(params);
                match found {
                    Ok(found) => {
                        let bytes = found.len() as u64;
                        stream.send(TrainMessage::Computed { number, bytes }, &found).await?;
                    }
                    Err(error) => {
                        let error = TrainError::to_bytes(&error);
                        let bytes = error.len() as u64;
                        stream.send(TrainMessage::Failed { number, bytes }, &error).await?;
                    }
                }
            }
            TrainMessage::Computed { .. } | TrainMessage::Failed { .. } => {
                return Err("the hub answers where it should ask".into());
            }
        }
    }
    Ok(())
}
