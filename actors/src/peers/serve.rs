//! Giving experts of this node's memory to peers that ask for them.
//!
//! What that takes is bounded: [`SERVED_MAX`] answers at a time, of which one peer gets
//! [`SERVED_PER_PEER_MAX`], each with one part of [`WEIGHTS_CHUNK_BYTES`] copied out of the cache and
//! what QUIC's window takes. An expert that is let go meanwhile is not held for a peer: its answer ends.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use lite_llm_runtime::{expert::ExpertKey, residency::ExpertCache};
use lite_llm_transport::{
    connection::Connection,
    frame::{FrameReceiver, FrameSender, OutgoingFrame, RecvError},
    messages::{OutgoingWeights, WEIGHTS_CHUNK_BYTES, WeightsReply, WeightsRequest},
    pool::BufferPool,
};
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::timeout};
use tracing::{debug, warn};

/// Experts that a node sends at a time; who asks for more is told that it is busy.
pub const SERVED_MAX: usize = 8;
/// Of those, the ones that one peer gets.
pub const SERVED_PER_PEER_MAX: usize = 4;
/// Streams for weights that one peer may have open; further ones are dropped.
pub const STREAMS_PER_PEER_MAX: usize = 16;
/// How long a peer may take to make room for a frame. One that does not read gives its turn back.
const TAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node gives to others, and how much of it at a time.
pub struct Served {
    held: Mutex<Option<Held>>,
    turns: Semaphore,
}

struct Held {
    checkpoint: [u8; 32],
    /// The node's, which ends without asking.
    store: Weak<ExpertCache>,
}

/// What one connection may have.
pub(crate) struct OfPeer {
    /// A stream holds one of these.
    pub(crate) streams: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

impl Default for OfPeer {
    fn default() -> Self {
        let streams = Arc::new(Semaphore::new(STREAMS_PER_PEER_MAX));
        Self { streams, turns: Arc::new(Semaphore::new(SERVED_PER_PEER_MAX)) }
    }
}

impl Default for Served {
    fn default() -> Self {
        Self { held: Mutex::default(), turns: Semaphore::new(SERVED_MAX) }
    }
}

impl Served {
    /// Gives experts of this store from now on, which are those of a checkpoint of this root hash.
    pub fn show(&self, checkpoint: [u8; 32], store: &Arc<ExpertCache>) {
        *self.held.lock() = Some(Held { checkpoint, store: Arc::downgrade(store) });
    }

    fn store_of(&self, checkpoint: &[u8; 32]) -> Option<Arc<ExpertCache>> {
        let held = self.held.lock();
        held.as_ref().filter(|held| held.checkpoint == *checkpoint)?.store.upgrade()
    }

    /// Answers the requests of a stream until it ends.
    pub(crate) async fn serve(
        &self,
        (mut sender, mut receiver): (FrameSender, FrameReceiver),
        connection: &Connection,
        peer: &OfPeer,
        pool: &BufferPool,
    ) {
        loop {
            let request = match receiver.recv_message::<WeightsRequest>().await {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(RecvError::Message(error)) => {
                    warn!(peer = %connection.peer(), %error, "closing a connection");
                    return connection.close(&error.to_string());
                }
                Err(error) => return debug!(peer = %connection.peer(), %error, "no more requests"),
            };
            if let Err(error) = self.answer(&request, &mut sender, peer, pool).await {
                return debug!(peer = %connection.peer(), error, "weights were not sent");
            }
        }
    }

    async fn answer(
        &self,
        request: &WeightsRequest,
        sender: &mut FrameSender,
        peer: &OfPeer,
        pool: &BufferPool,
    ) -> Result<(), String> {
        let (Ok(_turn), Ok(_of_peer)) = (self.turns.try_acquire(), peer.turns.try_acquire()) else {
            return reply(sender, &WeightsReply::Busy).await;
        };
        let &WeightsRequest { layer, tier, group, expert, .. } = request;
        let key = ExpertKey { layer, tier, group, expert };
        let store = self.store_of(&request.checkpoint);
        let Some((store, bytes)) = store.and_then(|store| store.resident(key).map(|n| (store, n)))
        else {
            return reply(sender, &WeightsReply::NotHere).await;
        };
        reply(sender, &WeightsReply::Here { bytes }).await?;
        let mut from = 0;
        while from < bytes {
            let part = (bytes - from).min(WEIGHTS_CHUNK_BYTES as u64);
            let mut out =
                OutgoingWeights::new(part as usize, pool).map_err(|error| error.to_string())?;
            if !store.copy_resident(key, from, out.bytes_mut()) {
                return reply(sender, &WeightsReply::NotHere).await;
            }
            send(sender, out.finish()).await?;
            from += part;
        }
        Ok(())
    }
}

async fn reply(sender: &mut FrameSender, reply: &WeightsReply) -> Result<(), String> {
    send(sender, OutgoingFrame::message(reply).map_err(|error| error.to_string())?).await
}

async fn send(sender: &mut FrameSender, frame: OutgoingFrame) -> Result<(), String> {
    match timeout(TAKE_TIMEOUT, sender.send(frame)).await {
        Ok(sent) => sent.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it took nothing for {TAKE_TIMEOUT:?}")),
    }
}
