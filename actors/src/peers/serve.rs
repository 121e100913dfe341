//! Giving experts of this node's memory to peers that ask for them.
//!
//! What that takes is bounded: [`SERVED_MAX`] answers at a time, of which one peer gets
//! [`SERVED_PER_PEER_MAX`], each with one part of [`WEIGHTS_CHUNK_BYTES`] copied out of the cache and
//! what QUIC's window takes. An expert that is let go meanwhile is not held for a peer: its answer ends.
//!
//! Invariant: who does not take what it asked for keeps nobody else from being answered. Where all turns
//! are taken, the one whose peer has not taken a part for longest ends, if that is longer than
//! [`TAKES_WITHIN`]; and an answer ends when who asked has given it up at the latest.

use std::{
    pin::pin,
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
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, timeout, timeout_at},
};
use tracing::{debug, warn};

use super::ask::deadline;

/// Experts that a node sends at a time; who asks for more is told that it is busy.
pub const SERVED_MAX: usize = 8;
/// Of those, the ones that one peer gets.
pub const SERVED_PER_PEER_MAX: usize = 4;
/// Streams for weights that one peer may have open; further ones are dropped.
pub const STREAMS_PER_PEER_MAX: usize = 16;
/// How long a peer may take to make room for a frame. One that does not read gives its turn back.
const TAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take where another waits for its turn.
pub const TAKES_WITHIN: Duration = Duration::from_millis(250);

/// What a node gives to others, and how much of it at a time.
#[derive(Default)]
pub struct Served {
    held: Mutex<Option<Held>>,
    turns: Turns,
}

struct Held {
    checkpoint: [u8; 32],
    /// The node's, which ends without asking.
    store: Weak<ExpertCache>,
}

/// Streams of one connection: each holds one of these.
pub(crate) fn streams() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(STREAMS_PER_PEER_MAX))
}

/// Who is being answered.
#[derive(Default)]
struct Turns {
    state: Mutex<(u64, Vec<TurnOf>)>,
}

struct TurnOf {
    number: u64,
    peer: String,
    /// Since when its peer is to take a part; nothing while none is ready.
    offered: Option<Instant>,
    ends: Arc<Notify>,
}

/// Held while an answer is sent.
struct Turn<'a> {
    turns: &'a Turns,
    number: u64,
    /// Told when another gets it.
    ends: Arc<Notify>,
}

impl Turns {
    /// A turn for a peer, unless it has enough, or all are taken by others who take what they get.
    fn take(&self, peer: &str) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        let (last, all) = &mut *state;
        if all.iter().filter(|turn| turn.peer == peer).count() >= SERVED_PER_PEER_MAX {
            return None;
        }
        if all.len() >= SERVED_MAX {
            let slow = |turn: &TurnOf| turn.offered.filter(|since| since.elapsed() > TAKES_WITHIN);
            let slowest = (0..all.len()).filter_map(|at| Some((slow(&all[at])?, at))).min()?.1;
            all.swap_remove(slowest).ends.notify_one();
        }
        *last += 1;
        let (number, ends) = (*last, Arc::new(Notify::new()));
        all.push(TurnOf { number, peer: peer.to_owned(), offered: None, ends: ends.clone() });
        Some(Turn { turns: self, number, ends })
    }
}

impl Turn<'_> {
    fn offer(&self, since: Option<Instant>) {
        let mut state = self.turns.state.lock();
        if let Some(turn) = state.1.iter_mut().find(|turn| turn.number == self.number) {
            turn.offered = since;
        }
    }

    /// Sends a part, unless its peer is too slow, by itself or with others waiting.
    async fn send(&self, sender: &mut FrameSender, frame: OutgoingFrame) -> Result<(), String> {
        self.offer(Some(Instant::now()));
        let mut ends = pin!(self.ends.notified());
        let sent = tokio::select! {
            biased;
            () = &mut ends => Err("others wait, and it takes nothing".to_owned()),
            sent = send(sender, frame) => sent,
        };
        self.offer(None);
        sent
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.state.lock().1.retain(|turn| turn.number != self.number);
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
        pool: &BufferPool,
    ) {
        let peer = &connection.peer().name;
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
        peer: &str,
        pool: &BufferPool,
    ) -> Result<(), String> {
        let Some(turn) = self.turns.take(peer) else {
            return reply(sender, &WeightsReply::Busy).await;
        };
        let &WeightsRequest { layer, tier, group, expert, .. } = request;
        let key = ExpertKey { layer, tier, group, expert };
        let store = self.store_of(&request.checkpoint);
        let Some((store, bytes)) = store.and_then(|store| store.resident(key).map(|n| (store, n)))
        else {
            return reply(sender, &WeightsReply::NotHere).await;
        };
        let deadline = deadline(bytes);
        let parts = Self::give(&store, (key, bytes), &turn, sender, pool);
        match timeout_at(deadline, parts).await {
            Ok(given) => given,
            Err(_) => Err(format!("it did not take {bytes} bytes in time")),
        }
    }

    /// Sends an expert, part by part.
    async fn give(
        store: &ExpertCache,
        (key, bytes): (ExpertKey, u64),
        turn: &Turn<'_>,
        sender: &mut FrameSender,
        pool: &BufferPool,
    ) -> Result<(), String> {
        turn.send(sender, framed(&WeightsReply::Here { bytes })?).await?;
        let mut from = 0;
        while from < bytes {
            let part = (bytes - from).min(WEIGHTS_CHUNK_BYTES as u64);
            let mut out =
                OutgoingWeights::new(part as usize, pool).map_err(|error| error.to_string())?;
            if !store.copy_resident(key, from, out.bytes_mut()) {
                return reply(sender, &WeightsReply::NotHere).await;
            }
            turn.send(sender, out.finish()).await?;
            from += part;
        }
        Ok(())
    }
}

async fn reply(sender: &mut FrameSender, reply: &WeightsReply) -> Result<(), String> {
    send(sender, framed(reply)?).await
}

fn framed(reply: &WeightsReply) -> Result<OutgoingFrame, String> {
    OutgoingFrame::message(reply).map_err(|error| error.to_string())
}

async fn send(sender: &mut FrameSender, frame: OutgoingFrame) -> Result<(), String> {
    match timeout(TAKE_TIMEOUT, sender.send(frame)).await {
        Ok(sent) => sent.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it took nothing for {TAKE_TIMEOUT:?}")),
    }
}
