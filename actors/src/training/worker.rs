//! A worker of a training: a rank, the hub's orders to it, and calls of other workers.

use std::{net::SocketAddr, sync::Arc};

use lite_llm_kernels::{DETERMINISM_VERSION, cpu::Cpu};
use lite_llm_runtime::train::{TrainError, orders::Order, rank::Rank};
use lite_llm_transport::{
    connection::{AcceptedStream, Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    identity::Role,
    join::join,
    messages::{TraceContext, TrainMessage},
    pool::BufferPool,
    session::Hello,
    token::JoinToken,
};
use tokio::{runtime::Handle, task::JoinSet};
use tracing::{debug_span, warn};

use super::{TrainingError, failed, peers::Peers, stream::TrainStream};
use crate::trace::adopt;

/// Longest order or call: a configuration, rows of tokens with what all gates say, or values of one parameter.
const BYTES_MAX: u64 = 64 << 30;

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

/// What streams are served with.
#[derive(Clone)]
struct Desk {
    rank: Arc<Rank>,
    peers: Arc<Peers>,
    buffers: BufferPool,
}

/// Serves until the hub sends it away or is lost; which of the two is said.
pub async fn serve(options: TrainWorkerOptions) -> Result<String, TrainingError> {
    let TrainWorkerOptions { hub, token, name, cpu } = options;
    let hello = Hello::new(DETERMINISM_VERSION);
    let identity = join(hub, &token, Role::Worker, &name, &hello).await.map_err(failed)?;
    // On the interface that leads to the hub, other workers reach it, too.
    let endpoint = Endpoint::outgoing(hub, &identity, Options::new(hello)).map_err(failed)?;
    let connection = endpoint.connect(hub, &Expect::coordinator()).await.map_err(failed)?;
    let peers = Arc::new(Peers::new(endpoint.clone(), Handle::current()));
    let rank = Arc::new(Rank::new(cpu, peers.clone()));
    let desk = Desk { rank, peers, buffers: endpoint.pool().clone() };
    // Ends with this function.
    let mut serving = JoinSet::new();
    let ended = loop {
        tokio::select! {
            stream = connection.accept_stream() => match stream {
                Some(stream) => drop(serving.spawn(obey(desk.clone(), stream, connection.clone()))),
                None => break connection.closed().await,
            },
            Some(peer) = endpoint.accept() => drop(serving.spawn(help(desk.clone(), peer))),
            _ = serving.join_next(), if !serving.is_empty() => {}
        }
    };
    Ok(ended.to_string())
}

/// The hub's orders, one after another.
async fn obey(desk: Desk, stream: AcceptedStream, connection: Connection) {
    if let Err(error) = orders(desk, stream, &connection).await
        && connection.close_reason().is_none()
    {
        warn!(error, "the hub's stream ended");
        connection.close(&error);
    }
}

async fn orders(desk: Desk, stream: AcceptedStream, hub: &Connection) -> Result<(), String> {
    if stream.kind != StreamKind::Train {
        return Err(format!("a stream of kind {} has no use here", stream.kind));
    }
    let mut stream = TrainStream::new(stream.into_frames(), hub, desk.buffers.clone());
    while let Some(head) = stream.head().await? {
        let bytes = stream.bytes(head, BYTES_MAX).await?;
        match head {
            TrainMessage::Ranks { rank, epoch, .. } => desk.peers.begin((rank, epoch), &bytes)?,
            TrainMessage::Order { trace, .. } => {
                let order = Order::from_bytes(&bytes).map_err(|error| error.to_string())?;
                drop(bytes);
                let rank = desk.rank.clone();
                let given = compute(order.name(), trace, move || {
                    rank.perform(order).map(|given| given.to_bytes())
                });
                stream.give(given.await).await?;
            }
            other => return Err(format!("{other:?} is nothing that a hub says")),
        }
    }
    Ok(())
}

/// Another worker's calls.
async fn help(desk: Desk, peer: Connection) {
    while let Some(stream) = peer.accept_stream().await {
        // Who is lost, the hub says; with each beginning all ways are made anew.
        if let Err(error) = calls(&desk, stream, &peer).await
            && peer.close_reason().is_none()
        {
            warn!(error, "another worker's stream ended");
        }
    }
}

async fn calls(desk: &Desk, stream: AcceptedStream, peer: &Connection) -> Result<(), String> {
    if stream.kind != StreamKind::Train {
        return Err(format!("a stream of kind {} has no use here", stream.kind));
    }
    let mut stream = TrainStream::new(stream.into_frames(), peer, desk.buffers.clone());
    let from = match stream.head().await? {
        Some(TrainMessage::Rank { rank, epoch })
            if desk.peers.knows(rank, epoch, &peer.peer().name) =>
        {
            rank as usize
        }
        Some(other) => return Err(format!("{}: {other:?} is no rank of ours", peer.peer())),
        None => return Ok(()),
    };
    while let Some(head) = stream.head().await? {
        let TrainMessage::Call { trace, .. } = head else {
            return Err(format!("{}: {head:?} is no call", peer.peer()));
        };
        let call = stream.bytes(head, BYTES_MAX).await?;
        let rank = desk.rank.clone();
        let given = compute("serve", trace, move || rank.serve(from, &call));
        stream.give(given.await).await?;
    }
    Ok(())
}

/// Runs what blocks, within a span of another process.
async fn compute(
    name: &'static str,
    trace: TraceContext,
    run: impl FnOnce() -> Result<Vec<u8>, TrainError> + Send + 'static,
) -> Result<Vec<u8>, TrainError> {
    let span = debug_span!("training", otel.name = name);
    adopt(&span, trace);
    let ended = tokio::task::spawn_blocking(move || span.in_scope(run)).await;
    // A panic of the rank is not to be the end of its connection without a word.
    ended.unwrap_or_else(|error| Err(TrainError::Workers(format!("computing ended: {error}"))))
}
