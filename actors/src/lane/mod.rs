//! The compute thread of a node: its sequences, its experts, and the batches between nodes.
//!
//! One OS thread owns the [`Engine`] and repeats: take what arrived, run every expert call that
//! is here (its own and those of other nodes, together), bring one pass one layer forward, hand
//! out what was generated. It never waits for the network: batches leave through bounded queues,
//! replies arrive in its inbox.
//!
//! Invariants:
//! - All waits are in `Lane::wait`, for the inbox, until the exchange's next deadline.
//! - A dispatch ends exactly once: combined, or failed as a whole by the device. Outputs that do not
//!   come, each with a reason that names its expert or node, fail the rows that they were for.
//! - An expert that cannot be run is named in the answers to the batches that call it; all their
//!   other calls are answered.
//! - Hidden states are gathered once, into the frame that leaves; outputs are combined where
//!   they arrived.

mod actor;
mod flight;
mod jobs;
mod reply;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use lite_llm_kernels::{cpu::Cpu, device::Device};
use lite_llm_runtime::{
    engine::{Engine, PassId, Step},
    expert::ExpertStore,
    moe_layer::{ExpertCall, run_experts},
    sequence::Request,
};
use lite_llm_transport::{
    exchange::{self, Exchange, ExchangeError, IN_FLIGHT_DISPATCHES_MAX},
    frame::OutgoingFrame,
    messages::{ExpertBatchView, ExpertReplyView, JobEvent},
    pool::BufferPool,
};
use tokio::sync::mpsc;
use tracing::{Span, debug_span};

pub use self::actor::{LaneActor, LaneMessage};
use self::{
    flight::{Flight, Split},
    jobs::{Job, Jobs},
    reply::Reply,
};
use crate::{membership::gone, placement::Owners, trace};

/// Events that may wait for a lane.
pub const INBOX_MAX: usize = 1024;
/// Frames that may wait for a peer's stream.
pub const OUTBOX_MAX: usize = 256;
/// Events of one job that may wait for its reader; a job whose reader falls further behind ends.
pub const JOB_EVENTS_MAX: usize = 1024;
/// How long a lane spins for the next event before it parks. Waking a core that has gone to sleep
/// takes longer than many an expert; the lane yields its core each time around.
const SPIN: Duration = Duration::from_millis(1);
/// Pieces of the next weights that a lane prefetches while it spins: no more than its own core's
/// cache holds.
const PIECES_MAX: usize = 128;
/// Longest wait of a lane that has nothing to do.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// Longest wait of a lane that holds a sequence back until its reader has caught up.
const HELD_WAIT: Duration = Duration::from_millis(5);

/// Where events for a node's present lane go; empty while there is none.
pub type LaneInbox = Arc<ArcSwapOption<Sender<LaneEvent>>>;

/// What a lane is told.
pub enum LaneEvent {
    /// A job is at home here.
    Start(Box<JobStart>),
    /// A job is no longer wanted.
    Cancel(u64),
    /// Another node wants experts run.
    Batch {
        /// What it wants.
        view: ExpertBatchView,
        /// Where the answer goes.
        reply: mpsc::Sender<OutgoingFrame>,
    },
    /// Another node has run experts.
    Reply {
        /// Its index.
        peer: u16,
        /// What it says.
        reply: ExpertReplyView,
    },
    /// Another node is gone.
    PeerLost {
        /// Its index.
        peer: u16,
        /// How it was noticed.
        reason: String,
    },
    /// Fail what runs, with this reason, and end.
    Stop(String),
}

/// A job that begins.
pub struct JobStart {
    /// Its number.
    pub job: u64,
    /// What is asked.
    pub request: Request,
    /// Where its events go.
    pub events: mpsc::Sender<JobEvent>,
    /// The span that all its work belongs to.
    pub span: Span,
}

/// The other nodes, as a lane sees them.
pub struct Peer {
    /// Name, for errors.
    pub name: String,
    /// Where batches go.
    pub outbox: mpsc::Sender<OutgoingFrame>,
}

/// What a lane counts.
#[derive(Debug, Default)]
pub struct LaneStats {
    /// Tokens generated since it began.
    pub tokens: AtomicU64,
    /// Sequences at home now.
    pub sequences: AtomicU32,
}

/// What a lane is made of.
pub struct LaneParts {
    /// The sequences' engine.
    pub engine: Engine<Cpu>,
    /// The experts of this node.
    pub store: Arc<dyn ExpertStore>,
    /// Owner of every expert.
    pub owners: Arc<Owners>,
    /// This node's index.
    pub index: u16,
    /// All nodes by index; this node's own entry is `None`.
    pub peers: Vec<Option<Peer>>,
    /// Buffers of frames.
    pub buffers: BufferPool,
    /// Counters that others read.
    pub stats: Arc<LaneStats>,
}

/// A handle to a running lane.
pub struct LaneHandle {
    inbox: Sender<LaneEvent>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl LaneHandle {
    /// Where events go.
    pub fn inbox(&self) -> &Sender<LaneEvent> {
        &self.inbox
    }

    /// Ends the lane; what runs fails with this reason.
    pub fn stop(mut self, reason: &str) {
        // A lane empties its inbox between steps; a lane that is gone needs no telling.
        let _ = self.inbox.send(LaneEvent::Stop(reason.to_owned()));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for LaneHandle {
    fn drop(&mut self) {
        // An owner that was killed has not called `stop`.
        let _ = self.inbox.try_send(LaneEvent::Stop("the node stops".into()));
    }
}

struct RemoteBatch {
    view: ExpertBatchView,
    reply: mpsc::Sender<OutgoingFrame>,
}

/// See the module's text.
pub struct Lane {
    engine: Engine<Cpu>,
    store: Arc<dyn ExpertStore>,
    owners: Arc<Owners>,
    index: u16,
    peers: Vec<Option<Peer>>,
    buffers: BufferPool,
    stats: Arc<LaneStats>,
    inbox: Receiver<LaneEvent>,
    exchange: Exchange,
    jobs: Jobs,
    flights: HashMap<PassId, Flight>,
    /// Memory of flights that have ended: a layer of a long prompt fills many pages, and getting
    /// them from the system each time would cost more than it seems.
    spare: Vec<Vec<f32>>,
    /// Which pass an exchange's dispatch belongs to.
    dispatches: HashMap<u64, PassId>,
    /// How nodes were lost that are gone.
    lost: HashMap<u16, String>,
    next_dispatch: u64,
    batches: Vec<RemoteBatch>,
    /// Another node has sent a batch lately.
    served: bool,
    stopped: bool,
}

impl Lane {
    /// Starts a lane's thread. `gone` is called when the thread ends, with its panic if any.
    pub fn spawn(
        parts: LaneParts,
        gone: impl FnOnce(Option<String>) + Send + 'static,
    ) -> std::io::Result<LaneHandle> {
        let (sender, inbox) = bounded(INBOX_MAX);
        let LaneParts { engine, store, owners, index, peers, buffers, stats } = parts;
        let mut lane = Lane {
            engine,
            store,
            owners,
            index,
            peers,
            buffers,
            stats,
            inbox,
            exchange: Exchange::new(exchange::DISPATCH_TIMEOUT, IN_FLIGHT_DISPATCHES_MAX),
            jobs: Jobs::default(),
            flights: HashMap::new(),
            spare: Vec::new(),
            dispatches: HashMap::new(),
            lost: HashMap::new(),
            next_dispatch: 0,
            batches: Vec::new(),
            served: false,
            stopped: false,
        };
        let thread = std::thread::Builder::new().name("lite-llm-lane".into()).spawn(move || {
            let run = std::panic::AssertUnwindSafe(|| lane.run());
            let panic = std::panic::catch_unwind(run).err().map(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                    .unwrap_or_else(|| "unknown panic".to_owned())
            });
            gone(panic);
        })?;
        Ok(LaneHandle { inbox: sender, thread: Some(thread) })
    }

    fn run(&mut self) {
        while !self.stopped {
            self.receive();
            if !self.batches.is_empty() {
                self.run_calls(None);
            }
            self.settle();
            for (sequence, held) in self.jobs.backlogs() {
                self.engine.hold(sequence, held);
            }
            let step = self.engine.step();
            if let Step::Dispatch(pass) = step {
                self.dispatch(pass);
            }
            self.publish();
            if step == Step::Idle && self.batches.is_empty() && !self.stopped {
                self.wait();
            }
        }
        self.stats.sequences.store(0, Relaxed);
    }

    /// Waits for the next event, until the exchange wants the time.
    fn wait(&mut self) {
        if !self.flights.is_empty() || self.served {
            let (from, device) = (Instant::now(), self.engine.backbone().device.clone());
            let mut pieces = 0;
            while from.elapsed() < SPIN {
                if let Ok(event) = self.inbox.try_recv() {
                    return self.handle(event);
                }
                if pieces < PIECES_MAX && device.prefetch_piece() {
                    pieces += 1;
                }
                std::thread::yield_now();
            }
            self.served = false;
        }
        let (now, deadline) = (Instant::now(), self.exchange.poll_timeout());
        let wait = deadline.map_or(IDLE_WAIT, |at| at.saturating_duration_since(now));
        let longest = if self.jobs.any_held() { HELD_WAIT } else { IDLE_WAIT };
        match self.inbox.recv_timeout(wait.min(longest)) {
            Ok(event) => self.handle(event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stopped = true,
        }
    }

    fn receive(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(event) => self.handle(event),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stopped = true;
                    return;
                }
            }
        }
    }

    fn handle(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Start(start) => self.start(*start),
            LaneEvent::Cancel(job) => self.engine.cancel(job),
            LaneEvent::Batch { view, reply } => {
                self.served = true;
                self.batches.push(RemoteBatch { view, reply });
            }
            LaneEvent::Reply { peer, reply } => self.reply(peer, reply),
            LaneEvent::PeerLost { peer, reason } => {
                self.lost.insert(peer, reason.clone());
                self.exchange.handle(Instant::now(), exchange::Event::PeerLost { peer, reason });
            }
            LaneEvent::Stop(reason) => {
                self.jobs.fail_all(&reason);
                self.stopped = true;
            }
        }
    }

    fn start(&mut self, start: JobStart) {
        let JobStart { job, request, events, span } = start;
        let vocab = self.engine.backbone().config.vocab;
        let logits = request.logits;
        let job = Job::new(job, vocab, logits, events, span);
        match self.engine.submit(job.id(), request) {
            Ok(()) => self.jobs.insert(job),
            Err(error) => job.fail(&error.to_string()),
        }
    }

    /// Sends a pass's expert calls where they belong and runs those that are here.
    fn dispatch(&mut self, pass: PassId) {
        let layer = self.engine.span(pass);
        let span = debug_span!(parent: &layer, "dispatch", remote = tracing::field::Empty);
        let memory = self.spare.pop().unwrap_or_default();
        let split = self.engine.dispatch(pass).map_err(|error| error.to_string()).and_then(|d| {
            let config = &self.engine.backbone().config;
            let split = Split { config, owners: &self.owners, here: self.index };
            let context = trace::context_of(&span);
            split.split(&d, &mut self.next_dispatch, context, &self.buffers, memory)
        });
        let (flight, frames) = match split {
            Ok(split) => split,
            Err(reason) => return self.engine.fail(pass, &reason),
        };
        span.record("remote", frames.len());
        let has_local = flight.has_local();
        self.flights.insert(pass, flight);
        for (id, peer, frame) in frames {
            let now = Instant::now();
            self.dispatches.insert(id, pass);
            self.exchange.handle(now, exchange::Event::Dispatched { id, peers: vec![peer] });
            if let Err(reason) = self.send(peer, frame) {
                self.exchange.handle(now, exchange::Event::Refused { id, peer, reason });
            }
        }
        drop(span);
        // What other nodes asked for meanwhile is computed together with our own calls.
        self.receive();
        if has_local {
            let _span = debug_span!(parent: &layer, "experts").entered();
            self.run_calls(Some(pass));
        }
        self.combine_if_complete(pass);
        if self.flights.contains_key(&pass) {
            self.engine.prefetch_next(pass);
        }
    }

    /// Runs the expert calls of a pass that belong here, and all that other nodes sent.
    fn run_calls(&mut self, pass: Option<PassId>) {
        let batches = std::mem::take(&mut self.batches);
        let store = &*self.store;
        let backbone = self.engine.backbone().clone();
        let width = backbone.config.hidden;
        let mut replies: Vec<Reply> = Vec::with_capacity(batches.len());
        for batch in &batches {
            replies.push(Reply::reserve(batch, width, &self.buffers));
        }
        let dispatch = pass.map(|pass| (pass, self.engine.dispatch(pass)));
        let mut calls: Vec<ExpertCall<'_>> = Vec::new();
        let mut unreadable = None;
        match &dispatch {
            None => {}
            Some((pass, Err(error))) => unreadable = Some((*pass, error.to_string())),
            Some((pass, Ok(dispatch))) => {
                if let Some(flight) = self.flights.get_mut(pass) {
                    calls.extend(flight.local_calls(dispatch));
                }
            }
        }
        for (batch, reply) in batches.iter().zip(&mut replies) {
            calls.extend(reply.calls(&batch.view, width));
        }
        let failures = match calls.is_empty() {
            true => Vec::new(),
            false => run_experts(&*backbone.device, store, calls),
        };
        for (batch, reply) in batches.into_iter().zip(replies) {
            // A peer that takes no replies is noticed by its connection, not here.
            if let Some(frame) = reply.finish(&batch.view, &failures, &self.buffers) {
                let _ = batch.reply.try_send(frame);
            }
        }
        if let Some(flight) = pass.and_then(|pass| self.flights.get_mut(&pass)) {
            flight.fail_here(&failures);
        }
        if let Some((pass, reason)) = unreadable {
            self.fail(pass, &reason);
        }
    }

    fn reply(&mut self, peer: u16, reply: ExpertReplyView) {
        let (id, now) = (reply.id(), Instant::now());
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
    fn settle(&mut self) {
        let now = Instant::now();
        if self.exchange.poll_timeout().is_some_and(|at| at <= now) {
            self.exchange.handle(now, exchange::Event::Tick);
        }
        while let Some(command) = self.exchange.poll_command() {
            match command {
                exchange::Command::Complete { id } => {
                    let Some(pass) = self.dispatches.remove(&id) else { continue };
                    if let Some(flight) = self.flights.get_mut(&pass) {
                        flight.complete(id);
                    }
                    self.combine_if_complete(pass);
                }
                exchange::Command::Fail { id, error } => {
                    let Some(pass) = self.dispatches.remove(&id) else { continue };
                    let reason = self.describe(&error);
                    if let Some(flight) = self.flights.get_mut(&pass) {
                        flight.fail(id, reason);
                    }
                    self.combine_if_complete(pass);
                }
            }
        }
    }

    /// Why a dispatch failed, with names instead of numbers.
    fn describe(&self, error: &ExchangeError) -> String {
        let peer = error.peer().and_then(|peer| self.peers.get(usize::from(peer))?.as_ref());
        let Some(Peer { name, .. }) = peer else { return error.to_string() };
        if let Some(how) = error.peer().and_then(|peer| self.lost.get(&peer)) {
            return gone(name, how);
        }
        match error {
            ExchangeError::Lost { reason, .. } => gone(name, reason),
            ExchangeError::Refused { peer, reason, .. } => self.refused(*peer, reason),
            ExchangeError::TimedOut { waited, .. } => {
                format!("worker {name} did not compute its experts within {waited:?}")
            }
            ExchangeError::Overloaded { .. } => error.to_string(),
        }
    }

    /// Why a node's experts did not come.
    fn refused(&self, peer: u16, reason: &str) -> String {
        let name = self.peers.get(usize::from(peer)).and_then(Option::as_ref).map(|p| &*p.name);
        let name = name.unwrap_or("without a name");
        format!("worker {name} did not compute its experts: {reason}")
    }

    fn combine_if_complete(&mut self, pass: PassId) {
        if self.flights.get(&pass).is_some_and(Flight::is_complete) {
            let flight = self.flights.remove(&pass).expect("looked up just now");
            let failed = match self.engine.routes(pass) {
                Some(routes) if flight.has_failures() => {
                    flight.failed_routes(routes, |peer, reason| self.refused(peer, reason))
                }
                _ => Vec::new(),
            };
            self.engine.combine(pass, &flight.parts(), &failed);
            // At most as many as there are passes at the same time.
            self.spare.push(flight.into_memory());
        }
    }

    fn fail(&mut self, pass: PassId, reason: &str) {
        self.flights.remove(&pass);
        self.engine.fail(pass, reason);
    }

    /// Hands out what the engine generated.
    fn publish(&mut self) {
        while let Some(event) = self.engine.poll_event() {
            if matches!(event, lite_llm_runtime::engine::Event::Token { .. }) {
                self.stats.tokens.fetch_add(1, Relaxed);
            }
            if let Some(abandoned) = self.jobs.publish(event) {
                self.engine.cancel(abandoned);
            }
        }
        self.stats.sequences.store(self.engine.sequences() as u32, Relaxed);
    }

    fn send(&mut self, peer: u16, frame: OutgoingFrame) -> Result<(), String> {
        if self.lost.contains_key(&peer) {
            return Err("it is gone".into());
        }
        let Some(Some(peer)) = self.peers.get(usize::from(peer)) else {
            return Err("it is no peer of this node".into());
        };
        peer.outbox.try_send(frame).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => "it does not take its batches".into(),
            mpsc::error::TrySendError::Closed(_) => "its connection is closed".into(),
        })
    }
}
