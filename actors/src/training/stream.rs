//! Messages of training with the bytes behind them.

use std::time::Duration;

use lite_llm_runtime::train::TrainError;
use lite_llm_transport::{
    connection::Connection,
    frame::{FrameReceiver, FrameSender},
    messages::{OutgoingWeights, TrainMessage, WEIGHTS_CHUNK_BYTES, WeightsPart},
    pool::BufferPool,
};
use tokio::time::timeout;

/// How long a peer may take for a part.
const PART_TIMEOUT: Duration = Duration::from_secs(30);

/// Errors of the transport name the peer.
fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A stream of training.
pub(super) struct TrainStream {
    sender: FrameSender,
    receiver: FrameReceiver,
    pool: BufferPool,
    peer: String,
}

impl TrainStream {
    pub(super) fn new(
        (sender, receiver): (FrameSender, FrameReceiver),
        connection: &Connection,
        pool: BufferPool,
    ) -> Self {
        Self { sender, receiver, pool, peer: connection.peer().to_string() }
    }

    fn lost(&self, reason: impl std::fmt::Display) -> String {
        format!("{}: {reason}", self.peer)
    }

    /// Sends a message and the bytes that it announces.
    pub(super) async fn send(&mut self, head: TrainMessage, bytes: &[u8]) -> Result<(), String> {
        debug_assert_eq!(head.bytes(), bytes.len() as u64);
        let slow = || format!("it took nothing for {PART_TIMEOUT:?}");
        let sent = timeout(PART_TIMEOUT, self.sender.send_message(&head)).await;
        sent.map_err(|_| self.lost(slow()))?.map_err(said)?;
        for part in bytes.chunks(WEIGHTS_CHUNK_BYTES) {
            let out = OutgoingWeights::new(part.len(), &self.pool);
            let mut out = out.map_err(said)?;
            out.bytes_mut().copy_from_slice(part);
            let sent = timeout(PART_TIMEOUT, self.sender.send(out.finish())).await;
            sent.map_err(|_| self.lost(slow()))?.map_err(said)?;
        }
        Ok(())
    }

    /// What an order or a call gave, or why it gave nothing; an error if the peer is lost.
    pub(super) async fn given(
        &mut self,
        limit: u64,
    ) -> Result<Result<Vec<u8>, TrainError>, String> {
        let head = self.head().await?.ok_or_else(|| self.lost("it closed its stream"))?;
        let bytes = self.bytes(head, limit).await?;
        match head {
            TrainMessage::Given { .. } => Ok(Ok(bytes)),
            TrainMessage::Failed { .. } => {
                Ok(Err(TrainError::from_bytes(&bytes).map_err(|error| self.lost(error))?))
            }
            other => Err(self.lost(format!("it answers {other:?}"))),
        }
    }

    /// Sends what an order or a call gave.
    pub(super) async fn give(&mut self, given: Result<Vec<u8>, TrainError>) -> Result<(), String> {
        match given {
            Ok(given) => self.send(TrainMessage::Given { bytes: given.len() as u64 }, &given).await,
            Err(error) => {
                let error = TrainError::to_bytes(&error);
                self.send(TrainMessage::Failed { bytes: error.len() as u64 }, &error).await
            }
        }
    }

    /// The next message; `None` if there are no more.
    pub(super) async fn head(&mut self) -> Result<Option<TrainMessage>, String> {
        self.receiver.recv_message().await.map_err(said)
    }

    /// The bytes behind a message, of which at most `limit` are taken. Memory grows with what comes.
    pub(super) async fn bytes(
        &mut self,
        head: TrainMessage,
        limit: u64,
    ) -> Result<Vec<u8>, String> {
        let wanted = head.bytes();
        if wanted > limit {
            return Err(
                self.lost(format!("{wanted} bytes are announced; at most {limit} are taken"))
            );
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < wanted {
            let left = (wanted - bytes.len() as u64) as usize;
            let frame = timeout(PART_TIMEOUT, self.receiver.recv()).await;
            let frame =
                frame.map_err(|_| self.lost(format!("nothing came for {PART_TIMEOUT:?}")))?;
            let frame = frame.map_err(said)?;
            let frame = frame.ok_or_else(|| self.lost("it ended in the middle of a message"))?;
            match WeightsPart::check(frame, left).map_err(|error| self.lost(error))? {
                WeightsPart::Bytes(frame) => bytes.extend_from_slice(frame.bytes()),
                WeightsPart::Ended(_) => return Err(self.lost("another message came in between")),
            }
        }
        Ok(bytes)
    }
}
