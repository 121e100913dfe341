//! Calls from one worker of a training to another.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lite_llm_runtime::train::{
    TrainError,
    exchange::{Answers, Exchange},
};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect},
    messages::{TraceContext, TrainMessage},
};
use parking_lot::Mutex as Lock;
use tokio::{runtime::Handle, sync::Mutex, time::timeout};
use tracing::Span;

use super::stream::TrainStream;
use crate::trace::context_of;

/// How long another worker may take for a call; one that takes longer is taken for lost.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(600);
/// Longest answer: outputs of all rows that were sent.
const ANSWER_BYTES_MAX: u64 = 64 << 30;

/// The ways to the other ranks, made when they are first needed.
pub(super) struct Peers {
    endpoint: Endpoint,
    runtime: Handle,
    /// Those of the last beginning.
    now: Lock<Arc<Links>>,
}

#[derive(Default)]
struct Links {
    epoch: u64,
    rank: u32,
    /// By rank.
    list: Vec<Link>,
}

struct Link {
    name: String,
    address: SocketAddr,
    /// One call at a time.
    stream: Mutex<Option<(Connection, TrainStream)>>,
}

impl Peers {
    pub(super) fn new(endpoint: Endpoint, runtime: Handle) -> Self {
        Self { endpoint, runtime, now: Lock::default() }
    }

    /// Begins anew with these ranks, as the hub lists them.
    pub(super) fn begin(&self, (rank, epoch): (u32, u64), list: &[u8]) -> Result<(), String> {
        let link = |line: &str| {
            let (address, name) = line.split_once(' ')?;
            let (name, address) = (name.to_owned(), address.parse().ok()?);
            Some(Link { name, address, stream: Mutex::default() })
        };
        let list = str::from_utf8(list).unwrap_or_default().lines().map(link);
        let list = list.collect::<Option<_>>().ok_or("a list of ranks that cannot be read")?;
        *self.now.lock() = Arc::new(Links { epoch, rank, list });
        Ok(())
    }

    /// Whether a call is of the last beginning, by a rank of it.
    pub(super) fn knows(&self, rank: u32, epoch: u64, name: &str) -> bool {
        let now = self.now.lock();
        let named = now.list.get(rank as usize).is_some_and(|link| link.name == name);
        now.epoch == epoch && named
    }
}

impl Link {
    async fn call(
        &self,
        endpoint: &Endpoint,
        (rank, epoch): (u32, u64),
        trace: TraceContext,
        bytes: Vec<u8>,
    ) -> Result<Vec<u8>, TrainError> {
        let mut stream = self.stream.lock().await;
        // What fails is not used again.
        let taken = stream.take();
        let call = async {
            let (connection, mut frames) = match taken {
                Some(open) => open,
                None => {
                    let expected = Expect::worker(&*self.name);
                    let connection = endpoint.connect(self.address, &expected).await;
                    let connection = connection.map_err(|error| error.to_string())?;
                    let frames = connection.open_stream(StreamKind::Train).await;
                    let frames = frames.map_err(|error| error.to_string())?;
                    let pool = endpoint.pool().clone();
                    let mut frames = TrainStream::new(frames, &connection, pool);
                    frames.send(TrainMessage::Rank { rank, epoch }, &[]).await?;
                    (connection, frames)
                }
            };
            frames.send(TrainMessage::Call { trace, bytes: bytes.len() as u64 }, &bytes).await?;
            drop(bytes);
            let given = frames.given(ANSWER_BYTES_MAX).await?;
            Ok::<_, String>(((connection, frames), given))
        };
        let slow = |_| format!("{} gave nothing for {CALL_TIMEOUT:?}", self.name);
        let (open, given) =
            timeout(CALL_TIMEOUT, call).await.map_err(slow).flatten().map_err(TrainError::Lost)?;
        *stream = Some(open);
        given
    }
}

impl Exchange for Peers {
    fn ask(&self, calls: Vec<(usize, Vec<u8>)>) -> Answers {
        let links = self.now.lock().clone();
        let trace = context_of(&Span::current());
        let call = |(to, bytes): (usize, Vec<u8>)| {
            let (links, endpoint) = (links.clone(), self.endpoint.clone());
            self.runtime.spawn(async move {
                let who = (links.rank, links.epoch);
                match links.list.get(to) {
                    Some(link) => link.call(&endpoint, who, trace, bytes).await,
                    None => Err(TrainError::Lost(format!("there is no rank {to}"))),
                }
            })
        };
        let asked: Vec<_> = calls.into_iter().map(call).collect();
        let runtime = self.runtime.clone();
        Box::new(move || {
            // All are waited for: a stream on which something is still to come cannot be used again.
            let all = asked.into_iter().map(|asked| match runtime.block_on(asked) {
                Ok(given) => given,
                Err(error) => Err(TrainError::Lost(format!("a call ended: {error}"))),
            });
            all.collect::<Vec<_>>().into_iter().collect()
        })
    }
}
