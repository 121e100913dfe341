//! The actor that gives nodes to workers, and takes what they give.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use lite_llm_runtime::{checkpoint::index::Hash, train::shared::values_to_bytes};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    messages::TrainMessage,
    pool::BufferPool,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use tokio::{sync::mpsc, time::timeout};
use tracing::{info, warn};

use super::stream::TrainStream;

/// How long a worker may take for a node; one that takes longer is taken for lost.
pub const NODE_TIMEOUT: Duration = Duration::from_secs(1800);
/// Bytes of parameters in one message, unless one parameter has more.
const VALUES_BYTES: usize = 64 << 20;
/// What a node may give beside a gradient of every parameter: what its gates say.
const SUMS_BYTES_MAX: u64 = 1 << 30;

/// The parameters at one step.
#[derive(Debug)]
pub struct Snapshot {
    /// Configuration of the model.
    pub(super) model: Arc<Vec<u8>>,
    /// Of each parameter.
    pub(super) values: Vec<(Hash, Arc<Vec<f32>>)>,
}

/// Why a step has no result.
#[derive(Debug)]
pub enum Refused {
    /// A worker's reason, as bytes of a `TrainError`: any other would have it, too.
    Work(Vec<u8>),
    /// There is no worker.
    Nobody(String),
}

/// What a node gave: bytes, or those of the reason why not.
type Found = Result<Vec<u8>, Vec<u8>>;

/// What the hub is told.
#[derive(RactorMessage)]
pub enum HubMessage {
    /// A worker has come.
    Joined(Connection),
    /// Says when so many workers are there.
    Ready(usize, RpcReplyPort<()>),
    /// Gives nodes to workers.
    Compute {
        /// Parameters.
        snapshot: Arc<Snapshot>,
        /// Nodes.
        work: Vec<Arc<Vec<u8>>>,
        /// What they give, in their order.
        reply: RpcReplyPort<Result<Vec<Vec<u8>>, Refused>>,
    },
    /// A worker gave something.
    Done {
        /// Which worker.
        worker: u64,
        /// Of which step.
        step: u64,
        /// Which node.
        number: usize,
        /// What.
        found: Found,
    },
    /// A worker is gone.
    Lost {
        /// Which.
        worker: u64,
        /// Why.
        reason: String,
    },
    /// The time to wait for a worker is over.
    Waited {
        /// In which step.
        step: u64,
        /// How many had joined when it began.
        joined: u64,
    },
}

/// See the module's text.
pub struct HubActor;

/// What the hub knows.
pub struct Hub {
    patience: Duration,
    workers: BTreeMap<u64, Member>,
    /// Workers so far.
    count: u64,
    /// Steps so far.
    steps: u64,
    ready: Vec<(usize, RpcReplyPort<()>)>,
    current: Option<Current>,
}

struct Member {
    name: String,
    orders: mpsc::Sender<Order>,
    /// The node that it computes.
    busy: Option<usize>,
}

struct Current {
    step: u64,
    snapshot: Arc<Snapshot>,
    work: Vec<Arc<Vec<u8>>>,
    waiting: VecDeque<usize>,
    found: Vec<Option<Vec<u8>>>,
    reply: RpcReplyPort<Result<Vec<Vec<u8>>, Refused>>,
}

struct Order {
    step: u64,
    number: usize,
    snapshot: Arc<Snapshot>,
    work: Arc<Vec<u8>>,
}

impl Hub {
    /// Gives what waits to who is idle.
    fn give(&mut self, myself: &ActorRef<HubMessage>) {
        let Some(current) = &mut self.current else { return };
        let idle = self.workers.values_mut().filter(|member| member.busy.is_none());
        for member in idle {
            let Some(number) = current.waiting.pop_front() else { break };
            let (step, snapshot) = (current.step, current.snapshot.clone());
            let order = Order { step, number, snapshot, work: current.work[number].clone() };
            // One whose task has ended will be reported as lost, and the node waits again.
            let _ = member.orders.try_send(order);
            member.busy = Some(number);
        }
        if self.workers.is_empty() {
            let (step, joined) = (current.step, self.count);
            myself.send_after(self.patience, move || HubMessage::Waited { step, joined });
        }
    }

    fn tell_ready(&mut self) {
        let here = self.workers.len();
        for (wanted, reply) in std::mem::take(&mut self.ready) {
            if here < wanted {
                self.ready.push((wanted, reply));
            } else {
                // Who has given up waiting is not told.
                let _ = reply.send(());
            }
        }
    }

    fn end(&mut self, result: impl FnOnce(Vec<Option<Vec<u8>>>) -> Result<Vec<Vec<u8>>, Refused>) {
        if let Some(Current { reply, found, .. }) = self.current.take() {
            // A run that was given up is not told.
            let _ = reply.send(result(found));
        }
    }
}

impl Actor for HubActor {
    type Msg = HubMessage;
    type State = Hub;
    type Arguments = Duration;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        patience: Duration,
    ) -> Result<Hub, ActorProcessingErr> {
        let (workers, ready) = (BTreeMap::new(), Vec::new());
        Ok(Hub { patience, workers, count: 0, steps: 0, ready, current: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: HubMessage,
        hub: &mut Hub,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            HubMessage::Joined(connection) => {
                hub.count += 1;
                let (id, name) = (hub.count, connection.peer().to_string());
                info!(worker = name, "joined the training");
                let (orders, taken) = mpsc::channel(1);
                tokio::spawn(attend(id, connection, taken, myself.clone()));
                hub.workers.insert(id, Member { name, orders, busy: None });
                hub.tell_ready();
                hub.give(&myself);
            }
            HubMessage::Ready(wanted, reply) => {
                hub.ready.push((wanted, reply));
                hub.tell_ready();
            }
            HubMessage::Compute { snapshot, work, reply } => {
                hub.end(|_| Err(Refused::Nobody("another step was begun".into())));
                hub.steps += 1;
                let (waiting, found) = ((0..work.len()).collect(), vec![None; work.len()]);
                let step = hub.steps;
                hub.current = Some(Current { step, snapshot, work, waiting, found, reply });
                hub.give(&myself);
            }
            HubMessage::Done { worker, step, number, found } => {
                if let Some(member) = hub.workers.get_mut(&worker) {
                    member.busy = None;
                }
                if let Some(current) = hub.current.as_mut().filter(|current| current.step == step) {
                    match found {
                        Ok(bytes) => {
                            current.found[number] = Some(bytes);
                            if current.found.iter().all(Option::is_some) {
                                hub.end(|found| Ok(found.into_iter().flatten().collect()));
                            }
                        }
                        Err(error) => hub.end(|_| Err(Refused::Work(error))),
                    }
                }
                hub.give(&myself);
            }
            HubMessage::Lost { worker, reason } => {
                let Some(member) = hub.workers.remove(&worker) else { return Ok(()) };
                warn!(worker = member.name, reason, "lost; others compute what it had");
                if let (Some(number), Some(current)) = (member.busy, &mut hub.current)
                    && current.found.get(number).is_some_and(Option::is_none)
                    && !current.waiting.contains(&number)
                {
                    current.waiting.push_front(number);
                }
                hub.give(&myself);
            }
            HubMessage::Waited { step, joined } => {
                let here = hub.current.as_ref().is_some_and(|current| current.step == step);
                if here && hub.count == joined && hub.workers.is_empty() {
                    let patience = hub.patience;
                    hub.end(|_| {
                        Err(Refused::Nobody(format!(
                            "no worker is left, and none came in {patience:?}"
                        )))
                    });
                }
            }
        }
        Ok(())
    }
}

/// What a worker was told so far.
#[derive(Default)]
struct Told {
    model: Option<Arc<Vec<u8>>>,
    values: Vec<Option<Hash>>,
}

/// Carries orders to one worker, until it is lost.
async fn attend(
    worker: u64,
    connection: Connection,
    mut orders: mpsc::Receiver<Order>,
    hub: ActorRef<HubMessage>,
) {
    let lost = async {
        let frames = connection.open_stream(StreamKind::Train).await.map_err(|e| e.to_string())?;
        let mut stream = TrainStream::new(frames, &connection, BufferPool::default());
        let mut told = Told::default();
        while let Some(order) = orders.recv().await {
            let (step, number) = (order.step, order.number);
            let carried = timeout(NODE_TIMEOUT, carry(&mut stream, &mut told, order)).await;
            let found = carried.map_err(|_| format!("it gave nothing for {NODE_TIMEOUT:?}"))??;
            if hub.cast(HubMessage::Done { worker, step, number, found }).is_err() {
                break;
            }
        }
        Ok::<(), String>(())
    };
    let reason = tokio::select! {
        ended = lost => match ended {
            Ok(()) => return,
            Err(reason) => reason,
        },
        ended = connection.closed() => ended.to_string(),
    };
    connection.close(&reason);
    // The hub that has ended needs no word.
    let _ = hub.cast(HubMessage::Lost { worker, reason });
}

/// Tells a worker what has changed, gives it a node, and waits for what that gives.
async fn carry(stream: &mut TrainStream, told: &mut Told, order: Order) -> Result<Found, String> {
    let Order { number, snapshot, work, .. } = order;
    if told.model.as_ref() != Some(&snapshot.model) {
        let bytes = snapshot.model.len() as u64;
        stream.send(TrainMessage::Model { bytes }, &snapshot.model).await?;
        told.model = Some(snapshot.model.clone());
        told.values = vec![None; snapshot.values.len()];
    }
    let news: Vec<usize> = (0..snapshot.values.len())
        .filter(|id| told.values[*id] != Some(snapshot.values[*id].0))
        .collect();
    let mut news = &news[..];
    while !news.is_empty() {
        let (mut bytes, mut count) = (0, 0);
        while count < news.len() && (count == 0 || bytes < VALUES_BYTES) {
            bytes += 4 * snapshot.values[news[count]].1.len();
            count += 1;
        }
        let (now, later) = news.split_at(count);
        let values = values_to_bytes(now.iter().map(|id| (*id, &snapshot.values[*id].1[..])));
        let bytes = values.len() as u64;
        stream.send(TrainMessage::Values { bytes }, &values).await?;
        now.iter().for_each(|id| told.values[*id] = Some(snapshot.values[*id].0));
        news = later;
    }
    let bytes = work.len() as u64;
    stream.send(TrainMessage::Work { number: number as u64, bytes }, &work).await?;
    let gradients: u64 =
        snapshot.values.iter().map(|(_, values)| 4 * values.len() as u64 + 32).sum();
    // The embedding has two where it is the output projection, too.
    let limit = 2 * gradients + SUMS_BYTES_MAX;
    let head = stream.head().await?.ok_or("it closed its stream")?;
    match head {
        TrainMessage::Computed { number: of, .. } if of == number as u64 => {
            Ok(Ok(stream.bytes(head, limit).await?))
        }
        TrainMessage::Failed { number: of, .. } if of == number as u64 => {
            Ok(Err(stream.bytes(head, limit).await?))
        }
        other => Err(format!("it answers {other:?} to work {number}")),
    }
}
