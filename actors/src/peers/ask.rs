//! One stream on which a peer is asked for experts, one after the other.

use std::time::Duration;

use lite_llm_transport::{
    connection::{Connection, StreamKind},
    frame::{Frame, FrameReceiver, FrameSender},
    messages::{WeightsPart, WeightsReply, WeightsRequest},
};
use tokio::time::{Instant, timeout, timeout_at};

/// How long a peer may take to answer, and between two parts of an expert.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes per second below which a peer is given up, beyond the time for its answer.
const SLOWEST_BYTES_PER_S: f64 = 2.0 * 1024.0 * 1024.0;

/// When who asks for so many bytes now gives them up.
pub(super) fn deadline(bytes: u64) -> Instant {
    let slowest = Duration::from_secs_f64(bytes as f64 / SLOWEST_BYTES_PER_S);
    Instant::now() + ANSWER_TIMEOUT + slowest
}

/// What a peer answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// The bytes are there, not yet verified.
    Here,
    NotHere,
    Busy,
}

/// Why there is no answer. The stream is of no use afterwards.
#[derive(Debug)]
pub(super) enum NotAsked {
    /// It is gone, or too slow.
    Lost(String),
    /// It says what no honest peer says.
    Wrong(String),
}

/// See the module's text.
pub(super) struct WeightStream {
    sender: FrameSender,
    receiver: FrameReceiver,
}

impl WeightStream {
    pub(super) async fn open(connection: &Connection) -> Result<Self, NotAsked> {
        let opened = timeout(ANSWER_TIMEOUT, connection.open_stream(StreamKind::Weights)).await;
        let (sender, receiver) = opened.map_err(|_| silent())?.map_err(lost)?;
        Ok(Self { sender, receiver })
    }

    /// Fills `out` with an expert of just as many bytes, if the peer has it. Ends by a deadline that
    /// grows with them.
    pub(super) async fn ask(
        &mut self,
        request: &WeightsRequest,
        out: &mut [u8],
    ) -> Result<Asked, NotAsked> {
        let (began, bytes) = (Instant::now(), out.len());
        let deadline = deadline(bytes as u64);
        match timeout_at(deadline, self.exchange(request, out)).await {
            Ok(asked) => asked,
            Err(_) => {
                let allowed = deadline - began;
                Err(NotAsked::Lost(format!("it did not send {bytes} bytes within {allowed:?}")))
            }
        }
    }

    async fn exchange(
        &mut self,
        request: &WeightsRequest,
        out: &mut [u8],
    ) -> Result<Asked, NotAsked> {
        let sending = timeout(ANSWER_TIMEOUT, self.sender.send_message(request));
        sending.await.map_err(|_| silent())?.map_err(lost)?;
        match self.next().await?.decode::<WeightsReply>().map_err(wrong)? {
            WeightsReply::NotHere => return Ok(Asked::NotHere),
            WeightsReply::Busy => return Ok(Asked::Busy),
            WeightsReply::Here { bytes } if bytes == out.len() as u64 => {}
            WeightsReply::Here { bytes } => {
                let expected = out.len();
                return Err(wrong(format!("it has {bytes} bytes of an expert of {expected}")));
            }
        }
        let mut filled = 0;
        while filled < out.len() {
            let wanted = out.len() - filled;
            match WeightsPart::check(self.next().await?, wanted).map_err(wrong)? {
                WeightsPart::Bytes(frame) => {
                    let part = frame.bytes();
                    out[filled..filled + part.len()].copy_from_slice(part);
                    filled += part.len();
                }
                WeightsPart::Ended(_) => return Ok(Asked::NotHere),
            }
        }
        Ok(Asked::Here)
    }

    async fn next(&mut self) -> Result<Frame, NotAsked> {
        let frame = timeout(ANSWER_TIMEOUT, self.receiver.recv()).await.map_err(|_| silent())?;
        frame.map_err(lost)?.ok_or_else(|| lost("it closed its stream"))
    }
}

fn silent() -> NotAsked {
    NotAsked::Lost(format!("it did not answer within {ANSWER_TIMEOUT:?}"))
}

fn lost(reason: impl ToString) -> NotAsked {
    NotAsked::Lost(reason.to_string())
}

fn wrong(reason: impl ToString) -> NotAsked {
    NotAsked::Wrong(reason.to_string())
}
