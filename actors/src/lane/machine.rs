//! What a lane does and when: a pure machine around the engine.
//!
//! Events come in, commands go out, time is an argument, and computing is a command:
//! [`Command::Compute`] says that there is something to compute, and whoever carries it out calls
//! [`LaneMachine::compute`]. So a thread can drive it, and a simulation in virtual time.
//!
//! Invariants:
//! - A dispatch ends exactly once: combined, or failed as a whole by the device. Outputs that do not
//!   come, each with a reason that names its expert or node, fail the rows that they were for.
//! - A call whose holder is lost, refuses or is suspected goes to another holder; if there is none it
//!   waits for one, [`LaneLimits::patience`] at most. What was computed is kept.
//! - Who computes an expert never changes a result: all holders have the same weights.
//! - An expert that cannot be run here is named in the answers to the batches that call it; all their
//!   other calls are answered.
//! - What is here of a node's own experts is computed with first, the rest as it comes; who waits
//!   for none of it goes on meanwhile.
//! - Hidden states are gathered once, into the frame that leaves; outputs are combined where they
//!   arrived.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use lite_llm_kernels::device::Device;
use lite_llm_runtime::{
    engine::{self, Engine, PASSES_MAX, PassId, Step},
    expert::{ExpertKey, ExpertStore},
    moe_layer::{ExpertCall, run_experts},
    routing::{Route, Routes},
    sequence::{Request, RequestError},
};
use lite_llm_transport::{
    exchange::{self, Exchange, IN_FLIGHT_DISPATCHES_MAX},
    frame::OutgoingFrame,
    messages::{ExpertBatchView, ExpertFailure, ExpertReplyView, NodeAddress},
    pool::BufferPool,
};
use tracing::debug_span;

use super::{
    flight::{Failing, Flight, Outgoing, Way},
    limits::LaneLimits,
    peers::Peers,
    reply::Reply,
};
use crate::{placement::Placement, trace};

/// Bytes of batches of other nodes that may wait to be computed, and of the answers to them.
pub const BATCH_BYTES_MAX: usize = 256 << 20;

/// What a lane is told. `R` is where the answer to a batch goes.
#[allow(clippy::large_enum_variant, reason = "one at a time, on the lane's own thread")]
pub enum Event<R> {
    /// A request is at home here, under a number that was not used before.
    Start {
        /// The number.
        sequence: u64,
        /// What is asked.
        request: Request,
    },
    /// A request is no longer wanted.
    Cancel(u64),
    /// The reader of a request has fallen behind, or has caught up.
    Hold {
        /// The request.
        sequence: u64,
        /// Whether it is to generate no more for now.
        held: bool,
    },
    /// Another node wants experts run.
    Batch {
        /// What it wants.
        view: ExpertBatchView,
        /// Where the answer goes.
        reply: R,
    },
    /// Another node has run experts.
    Reply {
        /// Its index.
        peer: u16,
        /// What it says.
        reply: ExpertReplyView,
    },
    /// Batches can be sent to another node.
    PeerUp {
        /// Its index.
        peer: u16,
    },
    /// Batches can no longer be sent to another node, and what it owes will not come.
    PeerLost {
        /// Its index.
        peer: u16,
        /// How it was noticed.
        reason: String,
    },
    /// A batch was not sent.
    Undelivered {
        /// Its number.
        id: u64,
        /// Whom it was for.
        peer: u16,
        /// Why.
        reason: String,
    },
    /// These nodes have shown no sign of progress lately; others have.
    Suspects(Vec<String>),
    /// Experts are held by others from now on.
    Rearrange(Arrangement),
    /// Experts that were on their way to this node's memory have come.
    Experts,
    /// Time went by.
    Tick,
}

/// Who holds what.
#[derive(Clone)]
pub struct Arrangement {
    /// Holders of every expert.
    pub placement: Arc<Placement>,
    /// This node's index.
    pub me: u16,
    /// All nodes by index; empty where nobody is.
    pub nodes: Vec<NodeAddress>,
}

/// What a lane wants done.
pub enum Command<R> {
    /// Send this batch to a node; [`Event::Undelivered`] if that is not possible.
    Send {
        /// The batch's number.
        id: u64,
        /// The node's index.
        peer: u16,
        /// The batch.
        frame: OutgoingFrame,
    },
    /// Send this answer where its batch came from.
    Answer {
        /// Where that is.
        reply: R,
        /// The answer.
        frame: OutgoingFrame,
    },
    /// Tell the request's reader.
    Publish(engine::Event),
    /// A request cannot be at home here at present; another node may take it.
    NotTaken {
        /// The request.
        sequence: u64,
        /// Why.
        reason: String,
    },
    /// There is something to compute: call [`LaneMachine::compute`].
    Compute,
    /// The device computes nothing more, for this reason, and neither does this machine: its requests
    /// and the calls of others are for other nodes.
    Lost(String),
}

/// What a lane machine is made of.
pub struct LaneParts<D: Device> {
    /// The sequences' engine.
    pub engine: Engine<D>,
    /// The experts of this node.
    pub store: Arc<dyn ExpertStore<D::Matrix>>,
    /// Who holds what.
    pub arrangement: Arrangement,
    /// Buffers of frames.
    pub buffers: BufferPool,
    /// How long it waits.
    pub limits: LaneLimits,
}

/// A batch of another node.
pub(super) struct RemoteBatch<R> {
    pub(super) view: ExpertBatchView,
    pub(super) reply: R,
    /// What is computed of it; nothing before it was first looked at.
    answer: Option<Reply>,
    bytes: usize,
    /// Until when its experts are waited for, unless some of them come meanwhile.
    until: Option<Instant>,
}

/// See the module's text.
pub struct LaneMachine<D: Device, R> {
    pub(super) loads: Arc<super::loads::ExpertLoads>,
    engine: Engine<D>,
    store: Arc<dyn ExpertStore<D::Matrix>>,
    peers: Peers,
    buffers: BufferPool,
    limits: LaneLimits,
    exchange: Exchange,
    flights: BTreeMap<PassId, Flight>,
    /// What was predicted of passes' next layers.
    early: BTreeMap<PassId, Routes>,
    /// Memory of flights that have ended: a layer of a long prompt fills many pages, and getting
    /// them from the system each time would cost more than it seems.
    spare: Vec<Vec<f32>>,
    /// Which pass an exchange's dispatch belongs to.
    dispatches: HashMap<u64, PassId>,
    next_dispatch: u64,
    batches: Vec<RemoteBatch<R>>,
    /// Batches some of whose experts are on their way.
    parked: Vec<RemoteBatch<R>>,
    batch_bytes: usize,
    commands: VecDeque<Command<R>>,
    /// The engine can go no further until something happens.
    idle: bool,
    /// [`Command::Compute`] was given out and not carried out yet.
    computing: bool,
}

impl<D: Device, R> LaneMachine<D, R> {
    /// A lane without sequences, none of whose peers can be reached yet.
    pub fn new(parts: LaneParts<D>) -> Self {
        let LaneParts { engine, store, arrangement, buffers, limits } = parts;
        Self {
            loads: super::loads::ExpertLoads::of(&engine.backbone().config),
            engine,
            store,
            peers: Peers::new(arrangement),
            buffers,
            limits,
            exchange: Exchange::new(limits.answer, IN_FLIGHT_DISPATCHES_MAX),
            flights: BTreeMap::new(),
            early: BTreeMap::new(),
            spare: Vec::new(),
            dispatches: HashMap::new(),
            next_dispatch: 0,
            batches: Vec::new(),
            parked: Vec::new(),
            batch_bytes: 0,
            commands: VecDeque::new(),
            idle: true,
            computing: false,
        }
    }

    /// The model's engine.
    pub fn engine(&self) -> &Engine<D> {
        &self.engine
    }

    /// Whether some pass waits for its experts.
    pub fn is_waiting(&self) -> bool {
        !self.flights.is_empty()
    }

    /// Whether something waits for experts on their way to this node's memory.
    pub fn is_starved(&self) -> bool {
        !self.parked.is_empty() || self.flights.values().any(Flight::is_parked)
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, event: Event<R>) {
        match event {
            Event::Start { sequence, request } => self.start(sequence, request),
            Event::Cancel(sequence) => {
                self.engine.cancel(sequence);
                self.idle = false;
            }
            Event::Hold { sequence, held } => {
                self.engine.hold(sequence, held);
                self.idle &= held;
            }
            Event::Batch { view, reply } => self.batch(view, reply),
            Event::Reply { peer, reply } => self.reply(now, peer, reply),
            Event::PeerUp { peer } => {
                self.peers.up(peer);
                self.retry(now);
            }
            Event::PeerLost { peer, reason } => self.peer_lost(now, peer, reason),
            Event::Undelivered { id, peer, reason } => {
                self.exchange.handle(now, exchange::Event::Refused { id, peer, reason });
            }
            Event::Suspects(names) => self.suspects(now, &names),
            Event::Rearrange(arrangement) => self.rearrange(now, arrangement),
            Event::Experts => self.look_again(),
            Event::Tick => self.tick(now),
        }
        self.settle(now);
        self.publish();
    }

    /// What is to be done next, if anything.
    pub fn poll_command(&mut self) -> Option<Command<R>> {
        if let Some(command) = self.commands.pop_front() {
            return Some(command);
        }
        let work = !self.idle
            || !self.batches.is_empty()
            || self.flights.values().any(Flight::has_pending);
        if !work || self.computing {
            return None;
        }
        self.computing = true;
        Some(Command::Compute)
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let flights = self.flights.values().filter_map(Flight::wakes_at);
        let batches = self.parked.iter().chain(&self.batches).filter_map(|batch| batch.until);
        flights.chain(batches).chain(self.exchange.poll_timeout()).min()
    }

    /// Computes one piece of work: all expert calls that are here, of this node's passes and of
    /// other nodes together; or one step of the engine.
    pub fn compute(&mut self, now: Instant) {
        self.computing = false;
        if !self.batches.is_empty() || self.flights.values().any(Flight::has_pending) {
            self.run_calls(now);
        } else {
            self.engine.at(now);
            self.engine.allow_apart(self.flights.values().any(|f| f.wakes_at().is_some()));
            match self.engine.step() {
                Step::Idle => self.idle = true,
                Step::Advanced => {}
                Step::Dispatch(pass) => self.dispatch(now, pass),
            }
        }
        self.settle(now);
        self.publish();
    }

    fn start(&mut self, sequence: u64, request: Request) {
        match self.engine.submit(sequence, request) {
            Ok(()) => self.idle = false,
            // Another node may have room, for more requests or for longer ones.
            Err(error @ (RequestError::QueueFull { .. } | RequestError::CacheTooSmall { .. })) => {
                let reason = error.to_string();
                self.commands.push_back(Command::NotTaken { sequence, reason });
            }
            Err(error) => {
                let reason = error.to_string();
                let failed = engine::Event::Failed { sequence, reason };
                self.commands.push_back(Command::Publish(failed));
            }
        }
    }

    fn batch(&mut self, view: ExpertBatchView, reply: R) {
        let answer = view.calls().len() * view.head().width as usize * size_of::<f32>();
        let bytes = size_of_val(view.hidden()) + size_of_val(view.calls()) + answer;
        if self.batch_bytes + bytes > BATCH_BYTES_MAX && self.batch_bytes > 0 {
            let waiting = self.batch_bytes;
            let reason = format!("batches of {waiting} bytes wait for it already");
            let failure = ExpertFailure::new(view.head().id, reason);
            if let Ok(frame) = OutgoingFrame::message(&failure) {
                self.commands.push_back(Command::Answer { reply, frame });
            }
            return;
        }
        self.batch_bytes += bytes;
        // One of another width will be refused.
        let fits = view.head().width as usize == self.engine.backbone().config.hidden;
        if fits && !self.store.is_complete() {
            self.store.routed(view.head().layer, Reply::routed(&view));
            self.store.want(&Reply::wanted(&view));
        }
        self.batches.push(RemoteBatch { view, reply, answer: None, bytes, until: None });
    }

    fn peer_lost(&mut self, now: Instant, peer: u16, reason: String) {
        self.peers.lost(peer, reason.clone());
        self.exchange.handle(now, exchange::Event::PeerLost { peer, reason });
    }

    fn rearrange(&mut self, now: Instant, arrangement: Arrangement) {
        for peer in self.peers.rearrange(arrangement) {
            let reason = "it left the cluster".to_owned();
            self.exchange.handle(now, exchange::Event::PeerLost { peer, reason });
        }
        self.retry(now);
    }

    /// Sends on what suspects owe, where somebody else can compute it.
    fn suspects(&mut self, now: Instant, names: &[String]) {
        let new = self.peers.suspect(names);
        for (&pass, flight) in &self.flights {
            let Some(routes) = self.engine.routes(pass) else { continue };
            for &peer in &new {
                for id in flight.avoidable(peer, routes.all(), &self.peers) {
                    let reason = "it shows no sign of progress".to_owned();
                    self.exchange.handle(now, exchange::Event::Refused { id, peer, reason });
                }
            }
        }
        self.retry(now);
    }

    fn tick(&mut self, now: Instant) {
        if self.exchange.poll_timeout().is_some_and(|at| at <= now) {
            self.exchange.handle(now, exchange::Event::Tick);
        }
        let passes: Vec<PassId> = self.flights.keys().copied().collect();
        // Whether others than those that gave up may want the same.
        let mut others = false;
        for pass in passes {
            let mut again = self.flights.get_mut(&pass).map_or_else(Vec::new, |f| f.expire(now));
            let (store, mut gave_up) = (self.store.clone(), false);
            again.extend(self.with_flight(now, pass, |flight, routes, way| {
                let late = flight.give_up(way);
                let keys: Vec<_> = late.iter().map(|&route| routes[route as usize].key).collect();
                store.used(&keys);
                gave_up = !late.is_empty();
                late
            }));
            others |= gave_up;
            again.sort_unstable();
            self.place_again(now, pass, &again);
            self.combine_if_complete(pass);
        }
        if others {
            self.look_again();
        }
        let late = |batch: &mut RemoteBatch<R>| batch.until.is_some_and(|until| until <= now);
        let late: Vec<_> = self.parked.extract_if(.., late).collect();
        for mut batch in late {
            if let Some(answer) = &mut batch.answer {
                answer.give_up(&batch.view, self.limits.weights);
            }
            self.unused(Reply::wanted(&batch.view));
            self.answer(batch);
        }
    }

    /// Places what waits for a holder, because somebody new can be asked.
    fn retry(&mut self, now: Instant) {
        let passes: Vec<PassId> = self.flights.keys().copied().collect();
        for pass in passes {
            let again = self.flights.get_mut(&pass).map_or_else(Vec::new, Flight::waiting);
            self.place_again(now, pass, &again);
        }
    }

    /// Sends a pass's expert calls where they belong.
    fn dispatch(&mut self, now: Instant, pass: PassId) {
        let width = self.engine.backbone().config.hidden;
        let flight = Flight::new(width, self.spare.pop().unwrap_or_default());
        self.flights.insert(pass, flight);
        self.loads.count(self.engine.routes(pass));
        let early = self.early.remove(&pass).unwrap_or_default();
        if !self.store.is_complete()
            && let Some((layer, rows)) = self.engine.routed(pass, &early)
        {
            self.store.routed(layer, rows);
        }
        self.place(now, pass, None);
        if self.store.wants_predictions() {
            let early = self.engine.predict(pass);
            if early.rows() > 0 {
                self.store.predict(&early.likeliest());
                self.early.insert(pass, early);
            }
            while self.early.len() > PASSES_MAX {
                self.early.pop_first();
            }
        }
        self.combine_if_complete(pass);
        if self.flights.get(&pass).is_some_and(|flight| !flight.has_pending()) {
            self.engine.prefetch_next(pass);
        }
    }

    fn place_again(&mut self, now: Instant, pass: PassId, routes: &[u32]) {
        if !routes.is_empty() {
            self.place(now, pass, Some(routes));
        }
    }

    /// Places all calls of a pass's dispatch, or those of these routes.
    fn place(&mut self, now: Instant, pass: PassId, routes: Option<&[u32]>) {
        let span = debug_span!(
            parent: &self.engine.span(pass), "dispatch", remote = tracing::field::Empty
        );
        let dispatch = match self.engine.dispatch(pass) {
            Ok(dispatch) => dispatch,
            Err(error) => {
                let reason = error.to_string();
                return self.fail(pass, &reason);
            }
        };
        let Some(flight) = self.flights.get_mut(&pass) else { return };
        let mut way = Way {
            peers: &self.peers,
            next_id: &mut self.next_dispatch,
            trace: trace::context_of(&span),
            buffers: &self.buffers,
            now,
            patience: self.limits.patience,
            weights: self.limits.weights,
        };
        let before = flight.pending();
        let outgoing = match routes {
            None => flight.place(&dispatch, &mut way),
            Some(routes) => flight.place_again(routes, &dispatch, &mut way),
        };
        if flight.pending() > before && !self.store.is_complete() {
            let wanted = flight.wanted(before, dispatch.routes.all());
            span.in_scope(|| self.store.want(&wanted));
        }
        span.record("remote", outgoing.len());
        for Outgoing { id, peer, frame } in outgoing {
            self.dispatches.insert(id, pass);
            self.exchange.handle(now, exchange::Event::Dispatched { id, peers: vec![peer] });
            self.commands.push_back(Command::Send { id, peer, frame });
        }
    }

    /// Runs the expert calls of passes that belong here, and all that other nodes sent.
    fn run_calls(&mut self, now: Instant) {
        let mut batches = std::mem::take(&mut self.batches);
        let backbone = self.engine.backbone().clone();
        let width = backbone.config.hidden;
        let with_calls: Vec<PassId> = self
            .flights
            .iter()
            .filter_map(|(&pass, flight)| flight.has_pending().then_some(pass))
            .collect();
        let dispatches: Vec<_> =
            with_calls.iter().map(|&pass| (pass, self.engine.dispatch(pass))).collect();
        let mut calls: Vec<ExpertCall<'_>> = Vec::new();
        let (mut unreadable, mut layer) = (Vec::new(), None);
        let flights = self.flights.values_mut().filter(|flight| flight.has_pending());
        for (flight, (pass, dispatch)) in flights.zip(&dispatches) {
            match dispatch {
                Ok(dispatch) => calls.extend(flight.pending_calls(dispatch)),
                Err(error) => unreadable.push((*pass, error.to_string())),
            }
            layer = layer.or(Some(*pass));
        }
        for RemoteBatch { view, answer, .. } in &mut batches {
            let reserve = || Reply::reserve(view, width, &self.buffers);
            calls.extend(answer.get_or_insert_with(reserve).calls(view, width));
        }
        let failures = {
            let _span =
                layer.map(|pass| debug_span!(parent: &self.engine.span(pass), "experts").entered());
            match calls.is_empty() {
                true => Vec::new(),
                false => run_experts(&*backbone.device, &*self.store, calls),
            }
        };
        drop(dispatches);
        for mut batch in batches {
            let Some(answer) = &mut batch.answer else { continue };
            let before = answer.done();
            if answer.ran(&batch.view, &failures) {
                self.answer(batch);
                continue;
            }
            if batch.until.is_none() || answer.done() > before {
                batch.until = Some(now + self.limits.weights);
            }
            self.parked.push(batch);
        }
        for (pass, reason) in unreadable {
            self.fail(pass, &reason);
        }
        for pass in with_calls {
            let again = self
                .with_flight(now, pass, |flight, routes, way| flight.ran(&failures, routes, way));
            self.place_again(now, pass, &again);
            self.combine_if_complete(pass);
            if self.flights.contains_key(&pass) {
                self.engine.prefetch_next(pass);
            }
        }
    }

    /// Sends the answer to a batch.
    fn answer(&mut self, batch: RemoteBatch<R>) {
        let RemoteBatch { view, reply, answer, bytes, .. } = batch;
        self.batch_bytes -= bytes;
        let Some(answer) = answer else { return };
        if answer.is_refusal() {
            // It was wanted before it was looked at.
            self.unused(Reply::wanted(&view));
        }
        if let Some(frame) = answer.finish(&view, &self.buffers) {
            self.commands.push_back(Command::Answer { reply, frame });
        }
    }

    /// These are not wanted any more. Others may want them, which must say so again.
    fn unused(&mut self, wanted: Vec<(ExpertKey, u32)>) {
        let keys: Vec<ExpertKey> = wanted.into_iter().map(|(key, _)| key).collect();
        self.store.used(&keys);
        self.look_again();
    }

    /// What waits for experts is tried again.
    fn look_again(&mut self) {
        self.flights.values_mut().for_each(Flight::unpark);
        self.batches.append(&mut self.parked);
    }

    /// Does something with a pass's flight, if both exist.
    fn with_flight<T: Default>(
        &mut self,
        now: Instant,
        pass: PassId,
        act: impl FnOnce(&mut Flight, &[Route], &Way<'_>) -> T,
    ) -> T {
        let (Some(flight), Some(routes)) = (self.flights.get_mut(&pass), self.engine.routes(pass))
        else {
            return T::default();
        };
        let way = Way {
            peers: &self.peers,
            next_id: &mut self.next_dispatch,
            trace: Default::default(),
            buffers: &self.buffers,
            now,
            patience: self.limits.patience,
            weights: self.limits.weights,
        };
        act(flight, routes.all(), &way)
    }

    fn reply(&mut self, now: Instant, peer: u16, reply: ExpertReplyView) {
        let id = reply.id();
        let Some(pass) = self.dispatches.get(&id) else { return };
        let event = match (reply, self.flights.get_mut(pass)) {
            (ExpertReplyView::Failure(failure), _) => {
                exchange::Event::Refused { id, peer, reason: failure.reason }
            }
            // The pass failed meanwhile; the exchange is still to know that this is over.
            (ExpertReplyView::Outputs(_), None) => exchange::Event::Replied { id, peer },
            (ExpertReplyView::Outputs(view), Some(flight)) => match flight.take(id, peer, view) {
                Ok(()) => exchange::Event::Replied { id, peer },
                Err(reason) => exchange::Event::Refused { id, peer, reason },
            },
        };
        self.exchange.handle(now, event);
    }

    /// Carries out what the exchange decided.
    fn settle(&mut self, now: Instant) {
        while let Some(command) = self.exchange.poll_command() {
            let (id, failed) = match command {
                exchange::Command::Complete { id } => (id, None),
                exchange::Command::Fail { id, error } => (id, Some(error)),
            };
            let Some(pass) = self.dispatches.remove(&id) else { continue };
            let again = self.with_flight(now, pass, |flight, routes, way| match &failed {
                None => flight.complete(id, routes, way),
                Some(error) => {
                    let reason = way.peers.describe(error);
                    flight.fail(id, &reason, Failing::Absent, way)
                }
            });
            self.place_again(now, pass, &again);
            self.combine_if_complete(pass);
        }
    }

    fn combine_if_complete(&mut self, pass: PassId) {
        if self.flights.get(&pass).is_some_and(Flight::is_complete)
            && let Some(flight) = self.flights.remove(&pass)
        {
            self.engine.combine(pass, &flight.parts(), &flight.failed_routes());
            self.idle = false;
            // At most as many as there are passes at the same time.
            self.spare.push(flight.into_memory());
        }
    }

    fn fail(&mut self, pass: PassId, reason: &str) {
        if let (Some(flight), Some(routes)) = (self.flights.remove(&pass), self.engine.routes(pass))
        {
            self.store.used(&flight.unused(routes.all()));
            self.look_again();
        }
        self.engine.fail(pass, reason);
        self.idle = false;
    }

    fn publish(&mut self) {
        if let Some(reason) = self.engine.backbone().device.lost() {
            // Nobody is told what came of it: others do the same again, from what was told before.
            self.commands.clear();
            self.commands.push_back(Command::Lost(reason));
            return;
        }
        while let Some(event) = self.engine.poll_event() {
            use engine::Event::{Ended, Failed};
            if let Ended { sequence, .. } | Failed { sequence, .. } = event {
                self.store.ended(sequence);
            }
            self.commands.push_back(Command::Publish(event));
        }
    }
}
