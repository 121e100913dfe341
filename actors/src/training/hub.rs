//! The actor that knows the workers of a training: who they are, what each was told, and what it gives.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use lite_llm_runtime::train::TrainError;
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    messages::{TraceContext, TrainMessage},
    pool::BufferPool,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use tokio::{sync::mpsc, time::timeout};
use tracing::{info, warn};

use super::stream::TrainStream;

/// How long a worker may take for an order; one that takes longer is taken for lost.
pub const ORDER_TIMEOUT: Duration = Duration::from_secs(1800);
const TICK: Duration = Duration::from_millis(200);
/// Longest thing that is given: values of one parameter and its states.
const GIVEN_BYTES_MAX: u64 = 64 << 30;
/// Orders on their way to one worker.
const ORDERS_MAX: usize = 4;

/// What ranks gave, or why they did not.
type Told = Result<Vec<Vec<u8>>, TrainError>;

/// What the hub is told.
#[derive(RactorMessage)]
pub enum HubMessage {
    /// A worker has come.
    Joined(Connection),
    /// Gathers workers for a new beginning, as many as wanted if they come: their number.
    Gather {
        /// How many are wanted.
        wanted: usize,
        /// Says how many there are.
        reply: RpcReplyPort<Result<usize, TrainError>>,
    },
    /// Looks whether those who are waited for are there.
    Tick,
    /// Tells each rank something.
    Tell {
        /// By rank.
        orders: Vec<Arc<Vec<u8>>>,
        /// The span that it belongs to.
        trace: TraceContext,
        /// What they gave, by rank.
        reply: RpcReplyPort<Told>,
    },
    /// A worker gave something.
    Done {
        /// Which worker.
        worker: u64,
        /// For which order.
        order: u64,
        /// What.
        given: Result<Vec<u8>, TrainError>,
    },
    /// A worker is gone.
    Lost {
        /// Which.
        worker: u64,
        /// Why.
        reason: String,
    },
}

/// How long workers are waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// One, when none is there.
    pub alone: Duration,
    /// As many as are wanted, when some are there.
    pub regroup: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { alone: Duration::from_secs(60), regroup: Duration::from_secs(15) }
    }
}

/// See the module's text.
pub struct HubActor;

/// What the hub knows.
pub struct Hub {
    patience: Patience,
    workers: BTreeMap<u64, Member>,
    /// Workers so far.
    count: u64,
    last_came: Instant,
    gathering: Option<Gathering>,
    /// Beginnings so far.
    epoch: u64,
    /// Workers by their rank.
    ranks: Vec<u64>,
    /// Orders so far.
    orders: u64,
    current: Option<Current>,
}

struct Member {
    name: String,
    address: SocketAddr,
    orders: mpsc::Sender<Sent>,
}

struct Gathering {
    wanted: usize,
    since: Instant,
    reply: RpcReplyPort<Result<usize, TrainError>>,
}

struct Current {
    order: u64,
    given: HashMap<u64, Result<Vec<u8>, TrainError>>,
    reply: RpcReplyPort<Told>,
}

enum Sent {
    Ranks { rank: u32, epoch: u64, list: Arc<Vec<u8>> },
    Order { order: u64, trace: TraceContext, bytes: Arc<Vec<u8>> },
}

impl Hub {
    /// Begins anew with those that are there, if nobody else is waited for.
    fn look(&mut self) {
        let Some(Gathering { wanted, since, .. }) = &self.gathering else { return };
        let (here, waited) = (self.workers.len(), since.elapsed());
        let Patience { alone, regroup } = self.patience;
        // A newcomer is likely to have company.
        let few = waited >= regroup && self.last_came.elapsed() >= regroup / 4;
        let result = match here {
            0 if waited < alone => return,
            0 => Err(TrainError::Workers(format!("no worker is left, and none came in {alone:?}"))),
            _ if here >= *wanted || few => Ok(here),
            _ => return,
        };
        let Some(Gathering { wanted, reply, .. }) = self.gathering.take() else { return };
        if let Ok(here) = result {
            if here < wanted {
                warn!(here, wanted, "the training goes on with fewer workers");
            }
            self.epoch += 1;
            self.ranks = self.workers.keys().copied().collect();
            let line = |member: &Member| format!("{} {}\n", member.address, member.name);
            let list: String = self.workers.values().map(line).collect();
            let list = Arc::new(list.into_bytes());
            for (rank, member) in (0u32..).zip(self.workers.values()) {
                // One whose task has ended will be reported as lost.
                let sent = Sent::Ranks { rank, epoch: self.epoch, list: list.clone() };
                let _ = member.orders.try_send(sent);
            }
        }
        // A run that was given up is not told.
        let _ = reply.send(result);
    }

    /// Answers when all ranks have.
    fn answer(&mut self) {
        let all = |current: &&mut Current| {
            self.ranks.iter().all(|worker| current.given.contains_key(worker))
        };
        if self.current.as_mut().filter(all).is_none() {
            return;
        }
        let Some(Current { mut given, reply, .. }) = self.current.take() else { return };
        let mut all = Vec::with_capacity(self.ranks.len());
        let mut error = None;
        for worker in &self.ranks {
            match given.remove(worker) {
                Some(Ok(bytes)) => all.push(bytes),
                // What is wrong with the training itself goes before who was lost with it.
                Some(Err(TrainError::Lost(reason))) => {
                    error.get_or_insert(TrainError::Lost(reason));
                }
                Some(Err(other)) => error = Some(other),
                None => {}
            }
        }
        // A run that was given up is not told.
        let _ = reply.send(error.map_or(Ok(all), Err));
    }

    fn give(&mut self, worker: u64, given: Result<Vec<u8>, TrainError>) {
        if let Some(current) = &mut self.current {
            current.given.entry(worker).or_insert(given);
        }
        self.answer();
    }
}

impl Actor for HubActor {
    type Msg = HubMessage;
    type State = Hub;
    type Arguments = Patience;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        patience: Patience,
    ) -> Result<Hub, ActorProcessingErr> {
        Ok(Hub {
            patience,
            workers: BTreeMap::new(),
            count: 0,
            last_came: Instant::now(),
            gathering: None,
            epoch: 0,
            ranks: Vec::new(),
            orders: 0,
            current: None,
        })
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
                hub.last_came = Instant::now();
                let (id, name) = (hub.count, connection.peer().name.clone());
                info!(worker = name, "joined the training");
                let address = connection.address();
                let (orders, taken) = mpsc::channel(ORDERS_MAX);
                tokio::spawn(attend(id, connection, taken, myself.clone()));
                hub.workers.insert(id, Member { name, address, orders });
                hub.look();
            }
            HubMessage::Gather { wanted, reply } => {
                hub.gathering = Some(Gathering { wanted, since: Instant::now(), reply });
                hub.look();
                if hub.gathering.is_some() {
                    myself.send_after(TICK, || HubMessage::Tick);
                }
            }
            HubMessage::Tick => {
                hub.look();
                if hub.gathering.is_some() {
                    myself.send_after(TICK, || HubMessage::Tick);
                }
            }
            HubMessage::Tell { orders, trace, reply } => {
                if orders.len() != hub.ranks.len() {
                    let error = TrainError::Workers("orders for other ranks".into());
                    let _ = reply.send(Err(error));
                    return Ok(());
                }
                hub.orders += 1;
                let order = hub.orders;
                hub.current = Some(Current { order, given: HashMap::new(), reply });
                for (worker, bytes) in hub.ranks.clone().into_iter().zip(orders) {
                    let sent = hub
                        .workers
                        .get(&worker)
                        .map(|member| member.orders.try_send(Sent::Order { order, trace, bytes }));
                    if !matches!(sent, Some(Ok(()))) {
                        hub.give(worker, Err(TrainError::Lost("a worker is gone".into())));
                    }
                }
            }
            HubMessage::Done { worker, order, given } => {
                if hub.current.as_ref().is_some_and(|current| current.order == order) {
                    hub.give(worker, given);
                }
            }
            HubMessage::Lost { worker, reason } => {
                let Some(member) = hub.workers.remove(&worker) else { return Ok(()) };
                warn!(worker = member.name, reason, "lost");
                let reason = format!("worker {} is lost: {reason}", member.name);
                if hub.ranks.contains(&worker) {
                    hub.give(worker, Err(TrainError::Lost(reason)));
                }
            }
        }
        Ok(())
    }
}

/// Carries orders to one worker, until it is lost.
async fn attend(
    worker: u64,
    connection: Connection,
    mut orders: mpsc::Receiver<Sent>,
    hub: ActorRef<HubMessage>,
) {
    let lost = async {
        let frames = connection.open_stream(StreamKind::Train).await.map_err(|e| e.to_string())?;
        let mut stream = TrainStream::new(frames, &connection, BufferPool::default());
        while let Some(sent) = orders.recv().await {
            match sent {
                Sent::Ranks { rank, epoch, list } => {
                    let bytes = list.len() as u64;
                    stream.send(TrainMessage::Ranks { rank, epoch, bytes }, &list).await?;
                }
                Sent::Order { order, trace, bytes } => {
                    let head = TrainMessage::Order { trace, bytes: bytes.len() as u64 };
                    stream.send(head, &bytes).await?;
                    drop(bytes);
                    let given = timeout(ORDER_TIMEOUT, stream.given(GIVEN_BYTES_MAX)).await;
                    let given =
                        given.map_err(|_| format!("it gave nothing for {ORDER_TIMEOUT:?}"))??;
                    if hub.cast(HubMessage::Done { worker, order, given }).is_err() {
                        break;
                    }
                }
            }
        }
        Ok::<(), String>(())
    };
    let reason = tokio::select! {
        ended = lost => match ended {
            Ok(()) => return,
            Err(reason) => reason,
        },
        ended = connection.closed() => ended.reason,
    };
    // What the stream says of a lost connection, that says better.
    let reason = connection.close_reason().map_or(reason, |lost| lost.reason);
    connection.close(&reason);
    // The hub that has ended needs no word.
    let _ = hub.cast(HubMessage::Lost { worker, reason });
}
