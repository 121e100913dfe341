//! The fetcher that asks peers, and the next one where that is faster or the only way.
//!
//! A fetch waits for its turn with one peer, or is handed on; few tasks per peer take what waits, the
//! urgent first. What waits is bounded in bytes by the pool that the slots are of. Answers come from
//! threads that may block, never from within a call.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use lite_llm_kernels::slots::Slot;
use lite_llm_runtime::{
    checkpoint::{Checkpoint, CheckpointError},
    expert::{ExpertKey, GatedMlp, StoreError},
    residency::{Done, Fetched, Fetcher, ResidenceStats, Urgency},
};
use lite_llm_transport::messages::{NodeAddress, TraceContext, WeightsRequest};
use parking_lot::Mutex;
use tokio::{runtime::Handle, task::spawn_blocking};
use tracing::{debug, warn};

use super::{
    ask::{Asked, NotAsked, WeightStream},
    ways::{Odds, Pace, choose},
};
use crate::{links::Links, placement::Placement};

/// Peers that are asked for one expert before the next way is taken.
pub const PEERS_ASKED_MAX: usize = 3;
/// Experts that one peer is asked for at a time.
const ASKED_MAX: usize = 4;
/// How long a peer whose bytes are wrong is not asked.
const WRONG_PAUSE: Duration = Duration::from_secs(300);
/// How long a peer that is busy is not asked.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// What it is made of.
pub struct PeerOptions {
    /// Whose experts.
    pub checkpoint: Arc<Checkpoint>,
    /// Where they come from if not from peers.
    pub next: Arc<dyn Fetcher>,
    /// Connections to peers.
    pub links: Arc<Links>,
}

/// Who may have experts: the nodes of one epoch.
#[derive(Debug, Clone)]
pub struct Epoch {
    /// Who holds which expert.
    pub placement: Arc<Placement>,
    /// The nodes that it names.
    pub nodes: Vec<NodeAddress>,
    /// This node's index.
    pub me: u16,
    /// Whether any node may have any expert, whatever the placement says: what was before it is not
    /// known here.
    pub any: bool,
}

/// See the module's text.
pub struct PeerFetcher {
    shared: Arc<Shared>,
}

struct Shared {
    checkpoint: Arc<Checkpoint>,
    next: Arc<dyn Fetcher>,
    links: Arc<Links>,
    runtime: Handle,
    /// Locked while a fetch is handed on, so that who promotes or cancels it finds it somewhere.
    state: Mutex<State>,
    tally: Tally,
}

#[derive(Default)]
struct State {
    epochs: Vec<Epoch>,
    peers: HashMap<String, Peer>,
    next: Pace,
    /// Fetches that were not answered yet.
    under_way: HashMap<ExpertKey, UnderWay>,
    closed: bool,
}

struct Peer {
    address: NodeAddress,
    odds: Odds,
    /// The urgent first.
    waiting: [VecDeque<Fetch>; 2],
    /// Tasks that take what waits.
    tasks: usize,
    /// Streams that no task uses.
    idle: Vec<WeightStream>,
    /// Held by who connects, so that one does.
    connecting: Arc<tokio::sync::Mutex<()>>,
}

/// Why a peer is left alone for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Busy,
    Failed,
    Wrong,
}

struct UnderWay {
    urgency: Urgency,
    cancelled: bool,
}

/// A fetch. The slot comes first: it is given back before the answer is told, also in a panic.
struct Fetch {
    slot: Slot,
    key: ExpertKey,
    /// Peers that were asked in vain.
    asked: Vec<String>,
    /// Why the next way failed, if it did.
    failed: Option<StoreError>,
    promise: Promise,
}

/// The promise that a fetch is answered.
struct Promise(Option<(ExpertKey, Done)>);

#[derive(Default)]
struct Tally {
    hits: AtomicU64,
    misses: AtomicU64,
    bytes: AtomicU64,
    damaged: AtomicU64,
    failures: AtomicU64,
}

impl Promise {
    fn tell(mut self, fetched: Fetched) {
        if let Some((_, done)) = self.0.take() {
            done(fetched);
        }
    }
}

impl Drop for Promise {
    /// A task was dropped with it: the program ends, or something panicked. Who drops may be within a
    /// call of who waits, so another thread tells.
    fn drop(&mut self) {
        if let Some((key, done)) = self.0.take() {
            let reason = "fetching it from a peer was given up; the log says why".to_owned();
            let tell = move || done(Fetched::Failed(StoreError::Unreadable { key, reason }));
            // Without threads nobody computes any more either.
            let _ = thread::Builder::new().name("peer-fetch".into()).spawn(tell);
        }
    }
}

impl Fetch {
    fn bytes(&self) -> u64 {
        self.slot.len() as u64
    }
}

impl Peer {
    fn new(address: NodeAddress) -> Self {
        let (odds, waiting, idle) = (Odds::default(), Default::default(), Vec::new());
        Self { address, odds, waiting, tasks: 0, idle, connecting: Arc::default() }
    }

    fn take_waiting(&mut self) -> Option<Fetch> {
        self.waiting.iter_mut().find_map(VecDeque::pop_front)
    }
}

impl State {
    /// Those that may have an expert, each once, without this node.
    fn holders(&self, key: ExpertKey) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for Epoch { placement, nodes, me, any } in &self.epochs {
            let named = placement.holders(key).iter().map(|node| usize::from(*node));
            // Each expert begins with another, so that all are asked alike.
            let first = key.expert as usize + usize::from(key.layer);
            let all = (0..if *any { nodes.len() } else { 0 }).map(|i| (first + i) % nodes.len());
            for index in named.chain(all).filter(|index| *index != usize::from(*me)) {
                let Some(name) = nodes.get(index).map(|node| node.name.as_str()) else { continue };
                if self.peers.contains_key(name) && !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        names
    }

    /// Whom to ask, if a peer is to be asked.
    fn choose(&self, fetch: &Fetch, now: Instant) -> Option<String> {
        if self.closed || fetch.asked.len() >= PEERS_ASKED_MAX {
            return None;
        }
        let holders = self.holders(fetch.key);
        let left = holders.into_iter().filter(|name| !fetch.asked.iter().any(|a| a == name));
        let known = left.filter_map(|name| Some((name, &self.peers.get(name)?.odds)));
        let what = (fetch.key, fetch.bytes());
        choose(&self.next, known, what, fetch.failed.is_some(), now).map(str::to_owned)
    }

    fn is_cancelled(&self, key: ExpertKey) -> bool {
        self.under_way.get(&key).is_some_and(|fetch| fetch.cancelled)
    }

    fn odds(&mut self, name: &str) -> Option<&mut Odds> {
        self.peers.get_mut(name).map(|peer| &mut peer.odds)
    }
}

impl fmt::Debug for PeerFetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerFetcher({:?})", self.shared.next)
    }
}

impl PeerFetcher {
    /// Asks nobody before [`PeerFetcher::arrange`]. To be called within a tokio runtime, which does the
    /// work.
    pub fn new(options: PeerOptions) -> Self {
        let PeerOptions { checkpoint, next, links } = options;
        let (runtime, state, tally) = (Handle::current(), Mutex::default(), Tally::default());
        Self { shared: Arc::new(Shared { checkpoint, next, links, runtime, state, tally }) }
    }

    /// Asks the holders of these epochs from now on, which are of this checkpoint.
    pub fn arrange(&self, epochs: Vec<Epoch>) {
        let mut state = self.shared.state.lock();
        let mut known: HashMap<String, NodeAddress> = HashMap::new();
        for Epoch { nodes, me, .. } in &epochs {
            let own = nodes.get(usize::from(*me)).map(|node| &node.name);
            let others = nodes.iter().filter(|n| !n.name.is_empty() && Some(&n.name) != own);
            known.extend(others.map(|node| (node.name.clone(), node.clone())));
        }
        // One that has moved is another. What waits for one that is gone is taken on by its tasks.
        state.peers.retain(|name, peer| {
            peer.tasks > 0 || known.get(name).is_some_and(|address| *address == peer.address)
        });
        for (name, address) in known {
            let peer = state.peers.entry(name).or_insert_with(|| Peer::new(address.clone()));
            if peer.address != address {
                (peer.address, peer.odds.pace, peer.idle) = (address, Pace::default(), Vec::new());
            }
        }
        state.epochs = epochs;
    }
}

impl Drop for PeerFetcher {
    fn drop(&mut self) {
        let waiting: Vec<Fetch> = {
            let mut state = self.shared.state.lock();
            state.closed = true;
            let peers = state.peers.values_mut();
            peers.flat_map(|peer| peer.waiting.iter_mut().flat_map(|q| q.drain(..))).collect()
        };
        if !waiting.is_empty() {
            let tell = move || {
                for Fetch { slot, promise, .. } in waiting {
                    drop(slot);
                    promise.tell(Fetched::Cancelled);
                }
            };
            // Without threads, each is told by its promise, or nobody is left to be told.
            let _ = thread::Builder::new().name("peer-fetch".into()).spawn(tell);
        }
    }
}

impl Shared {
    /// Gives a fetch to a peer or hands it on. Answers nothing itself, unless nothing is left to try.
    fn route(self: &Arc<Self>, fetch: Fetch) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let now = Instant::now();
        let chosen = state.choose(&fetch, now);
        let Some(peer) = chosen.as_ref().and_then(|name| state.peers.get_mut(name)) else {
            return match &fetch.failed {
                None => self.to_next(state, fetch, now),
                Some(_) => {
                    drop(guard);
                    self.fail(fetch);
                }
            };
        };
        peer.odds.pace.began(fetch.bytes(), now);
        let urgency = state.under_way.get(&fetch.key).map_or(Urgency::Demand, |f| f.urgency);
        peer.waiting[queue(urgency)].push_back(fetch);
        if peer.tasks < ASKED_MAX {
            peer.tasks += 1;
            drop(guard);
            let (shared, name) = (self.clone(), chosen.unwrap_or_default());
            self.runtime.spawn(async move { shared.work(&name).await });
        }
    }

    /// The next way has failed before, and no peer is left.
    fn fail(&self, fetch: Fetch) {
        let Fetch { slot, key, failed, promise, .. } = fetch;
        drop(slot);
        self.state.lock().under_way.remove(&key);
        self.tally.misses.fetch_add(1, Relaxed);
        let nobody = || StoreError::Unreadable { key, reason: "no peer has it".into() };
        let error = failed.unwrap_or_else(nobody);
        // Peers answer to tasks, which must not run what waits for it.
        self.runtime.spawn_blocking(move || promise.tell(Fetched::Failed(error)));
    }

    fn to_next(self: &Arc<Self>, state: &mut State, fetch: Fetch, now: Instant) {
        let Fetch { slot, key, asked, promise, .. } = fetch;
        let bytes = slot.len() as u64;
        if !asked.is_empty() {
            self.tally.misses.fetch_add(1, Relaxed);
        }
        state.next.began(bytes, now);
        let urgency = state.under_way.get(&key).map_or(Urgency::Demand, |fetch| fetch.urgency);
        let pool = slot.pool().clone();
        // The next fetcher ends when this does.
        let shared = Arc::downgrade(self);
        let done: Done = Box::new(move |fetched| {
            let Some(shared) = shared.upgrade() else { return promise.tell(fetched) };
            let mut state = shared.state.lock();
            match &fetched {
                Fetched::Here(_) => state.next.brought(bytes, now, Instant::now()),
                Fetched::Cancelled => state.next.gave_up(bytes),
                Fetched::Failed(_) => {
                    state.next.gave_up(bytes);
                    state.next.failed(Instant::now());
                }
            }
            let again = match &fetched {
                Fetched::Failed(_) if !state.is_cancelled(key) => {
                    !state.holders(key).is_empty() && asked.len() < PEERS_ASKED_MAX
                }
                _ => false,
            };
            // Its slot is back in the pool; if another has it by now, there is no room to try.
            if again
                && let Ok(slot) = pool.take(bytes as usize)
                && let Fetched::Failed(error) = fetched
            {
                drop(state);
                return shared.route(Fetch { slot, key, asked, failed: Some(error), promise });
            }
            state.under_way.remove(&key);
            drop(state);
            promise.tell(fetched);
        });
        self.next.fetch(key, slot, urgency, done);
    }

    /// Asks a peer for what waits for it, until nothing does.
    async fn work(self: &Arc<Self>, name: &str) {
        loop {
            let (fetch, cancelled) = {
                let mut state = self.state.lock();
                let Some(peer) = state.peers.get_mut(name) else { return };
                let Some(fetch) = peer.take_waiting() else {
                    peer.tasks -= 1;
                    return;
                };
                let cancelled = state.is_cancelled(fetch.key);
                if cancelled {
                    state.under_way.remove(&fetch.key);
                    if let Some(odds) = state.odds(name) {
                        odds.pace.gave_up(fetch.bytes());
                    }
                }
                (fetch, cancelled)
            };
            if !cancelled {
                self.ask(name, fetch).await;
                continue;
            }
            let Fetch { slot, promise, .. } = fetch;
            drop(slot);
            let _ = spawn_blocking(move || promise.tell(Fetched::Cancelled)).await;
        }
    }

    /// Asks a peer for one expert, and ends or routes the fetch.
    async fn ask(self: &Arc<Self>, name: &str, mut fetch: Fetch) {
        let (key, bytes, began) = (fetch.key, fetch.bytes(), Instant::now());
        let request = WeightsRequest {
            checkpoint: self.checkpoint.id(),
            trace: TraceContext::default(),
            layer: key.layer,
            tier: key.tier,
            group: key.group,
            expert: key.expert,
        };
        let asked = match self.stream(name).await {
            Ok(mut stream) => {
                let asked = stream.ask(&request, &mut fetch.slot).await;
                if asked.is_ok()
                    && let Some(peer) = self.state.lock().peers.get_mut(name)
                {
                    peer.idle.push(stream);
                }
                asked
            }
            Err(error) => Err(error),
        };
        let now = Instant::now();
        let left = match asked {
            Ok(Asked::Here) => return self.verify(name, fetch, began, now).await,
            Ok(Asked::NotHere) => {
                if let Some(odds) = self.state.lock().odds(name) {
                    odds.had_not(key, bytes, began, now);
                }
                None
            }
            Ok(Asked::Busy) => Some(Left::Busy),
            Err(NotAsked::Lost(reason)) => {
                debug!(peer = name, %key, reason, "a peer did not send an expert");
                self.tally.failures.fetch_add(1, Relaxed);
                Some(Left::Failed)
            }
            Err(NotAsked::Wrong(reason)) => {
                warn!(peer = name, %key, reason, "a peer is not asked for experts for a while");
                self.tally.damaged.fetch_add(1, Relaxed);
                Some(Left::Wrong)
            }
        };
        match left {
            Some(why) => self.gave_up(name, fetch, why),
            None => self.elsewhere(name, fetch),
        }
    }

    /// A peer is not asked for a while, and what waits for it goes elsewhere.
    fn gave_up(self: &Arc<Self>, name: &str, fetch: Fetch, why: Left) {
        let mut all = vec![fetch];
        if let Some(peer) = self.state.lock().peers.get_mut(name) {
            let (pace, now) = (&mut peer.odds.pace, Instant::now());
            match why {
                Left::Busy => {
                    pace.works();
                    pace.bar(now, BUSY_PAUSE);
                }
                Left::Failed => pace.failed(now),
                Left::Wrong => pace.bar(now, WRONG_PAUSE),
            }
            all.extend(peer.waiting.iter_mut().flat_map(|queue| queue.drain(..)));
            all.iter().for_each(|fetch| pace.gave_up(fetch.bytes()));
            if why != Left::Busy {
                peer.idle.clear();
            }
        }
        all.into_iter().for_each(|fetch| self.elsewhere(name, fetch));
    }

    fn elsewhere(self: &Arc<Self>, name: &str, mut fetch: Fetch) {
        fetch.asked.push(name.to_owned());
        self.route(fetch);
    }

    /// Makes an expert of what a peer has sent.
    async fn verify(self: &Arc<Self>, name: &str, fetch: Fetch, began: Instant, came: Instant) {
        let (shared, name) = (self.clone(), name.to_owned());
        let verify = move || {
            let Fetch { slot, key, asked, failed, promise } = fetch;
            let bytes = slot.len() as u64;
            match shared.checkpoint.expert_from(key, slot) {
                Ok(expert) => shared.came(&name, (expert, promise), key, began, came),
                Err((error, slot)) => {
                    let damaged = matches!(error, CheckpointError::Damaged { .. });
                    if damaged {
                        warn!(
                            peer = name, %key, %error,
                            "a peer sent other bytes than the checkpoint's, and is not asked for \
                             {WRONG_PAUSE:?}"
                        );
                        shared.tally.damaged.fetch_add(1, Relaxed);
                    }
                    let Some(slot) = slot else {
                        let mut state = shared.state.lock();
                        state.under_way.remove(&key);
                        if let Some(odds) = state.odds(&name) {
                            odds.pace.gave_up(bytes);
                        }
                        drop(state);
                        let reason = error.to_string();
                        let error = StoreError::Unreadable { key, reason };
                        return promise.tell(Fetched::Failed(error));
                    };
                    let fetch = Fetch { slot, key, asked, failed, promise };
                    match damaged {
                        true => shared.gave_up(&name, fetch, Left::Wrong),
                        false => {
                            if let Some(odds) = shared.state.lock().odds(&name) {
                                odds.pace.gave_up(bytes);
                            }
                            shared.elsewhere(&name, fetch);
                        }
                    }
                }
            }
        };
        // If it panics, the promise tells.
        let _ = spawn_blocking(verify).await;
    }

    fn came(
        &self,
        name: &str,
        (expert, promise): (GatedMlp, Promise),
        key: ExpertKey,
        began: Instant,
        came: Instant,
    ) {
        let bytes = expert.bytes();
        self.tally.hits.fetch_add(1, Relaxed);
        self.tally.bytes.fetch_add(bytes, Relaxed);
        self.next.keep(key, &expert);
        {
            let mut state = self.state.lock();
            state.under_way.remove(&key);
            if let Some(odds) = state.odds(name) {
                odds.had(bytes, began, came);
            }
        }
        promise.tell(Fetched::Here(expert));
    }

    /// A stream to a peer: one that is idle, or a new one.
    async fn stream(&self, name: &str) -> Result<WeightStream, NotAsked> {
        let (address, connecting) = {
            let mut state = self.state.lock();
            let gone = || NotAsked::Lost("it is no node of this epoch".into());
            let peer = state.peers.get_mut(name).ok_or_else(gone)?;
            if let Some(stream) = peer.idle.pop() {
                return Ok(stream);
            }
            (peer.address.clone(), peer.connecting.clone())
        };
        let connection = {
            let _one = connecting.lock().await;
            // Who waited for another's attempt does not make the same one.
            let given_up = |odds: &mut Odds| odds.pace.barred(Instant::now());
            let given_up = self.state.lock().odds(name).is_some_and(given_up);
            if given_up {
                return Err(NotAsked::Lost("it was given up just now".into()));
            }
            self.links.reach(&address).await.map_err(NotAsked::Lost)?
        };
        WeightStream::open(&connection).await
    }
}

/// Where the fetches of an urgency wait.
fn queue(urgency: Urgency) -> usize {
    match urgency {
        Urgency::Demand => 0,
        Urgency::Prefetch => 1,
    }
}

impl Fetcher for PeerFetcher {
    fn fetch(&self, key: ExpertKey, slot: Slot, urgency: Urgency, done: Done) {
        self.shared.state.lock().under_way.insert(key, UnderWay { urgency, cancelled: false });
        let promise = Promise(Some((key, done)));
        self.shared.route(Fetch { slot, key, asked: Vec::new(), failed: None, promise });
    }

    fn promote(&self, key: ExpertKey) {
        let mut guard = self.shared.state.lock();
        let state = &mut *guard;
        let Some(fetch) = state.under_way.get_mut(&key) else { return };
        fetch.urgency = Urgency::Demand;
        for Peer { waiting: [demands, prefetches], .. } in state.peers.values_mut() {
            if let Some(at) = prefetches.iter().position(|fetch| fetch.key == key) {
                demands.extend(prefetches.remove(at));
                return;
            }
        }
        self.shared.next.promote(key);
    }

    fn cancel(&self, key: ExpertKey) {
        let mut guard = self.shared.state.lock();
        let state = &mut *guard;
        let Some(fetch) = state.under_way.get_mut(&key) else { return };
        fetch.cancelled = true;
        // What waits for a peer is told so by its task, which comes to it next.
        for Peer { waiting, .. } in state.peers.values_mut() {
            for urgency in 0..waiting.len() {
                let of_urgency = &mut waiting[urgency];
                let at = of_urgency.iter().position(|fetch| fetch.key == key);
                if let Some(fetch) = at.and_then(|at| of_urgency.remove(at)) {
                    waiting[queue(Urgency::Demand)].push_front(fetch);
                    return;
                }
            }
        }
        self.shared.next.cancel(key);
    }

    fn retire(&self) {
        self.shared.next.retire();
    }

    fn describe(&self) -> String {
        let peers = self.shared.state.lock().peers.len();
        let next = self.shared.next.describe();
        match peers {
            0 => next,
            _ => format!("the memory of {peers} peers or {next}"),
        }
    }

    fn residences(&self) -> Vec<ResidenceStats> {
        let Tally { hits, misses, bytes, damaged, failures } = &self.shared.tally;
        let peers = ResidenceStats {
            name: "peers".into(),
            hits: hits.load(Relaxed),
            misses: misses.load(Relaxed),
            bytes_read: bytes.load(Relaxed),
            damaged: damaged.load(Relaxed),
            failures: failures.load(Relaxed),
            ..ResidenceStats::default()
        };
        let asks = !self.shared.state.lock().peers.is_empty() || peers != named(&peers.name);
        let mut all: Vec<ResidenceStats> = asks.then_some(peers).into_iter().collect();
        all.extend(self.shared.next.residences());
        all
    }
}

/// A residence that has done nothing.
fn named(name: &str) -> ResidenceStats {
    ResidenceStats { name: name.into(), ..ResidenceStats::default() }
}
