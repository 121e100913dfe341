//! The compute thread of a node: its sequences, its experts, and the batches between nodes.
//!
//! One OS thread carries out what a [`LaneMachine`] wants. It never waits for the network: batches
//! leave through bounded queues, replies arrive in its inbox.
//!
//! Invariants: all waits are in `Lane::wait`, for the inbox, until the machine's next deadline; a
//! queue that is full is told to the machine, never waited for.

mod actor;
mod flight;
mod jobs;
mod limits;
mod loads;
mod machine;
mod peers;
mod reply;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Relaxed},
        },
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use lite_llm_kernels::device::Device;
use lite_llm_runtime::{engine::ScheduleStats, sequence::Request};
use lite_llm_transport::{
    frame::OutgoingFrame,
    messages::{ExpertBatchView, ExpertReplyView, JobEvent},
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tracing::Span;

use self::jobs::{Job, Jobs};
pub use self::{
    actor::{LaneActor, LaneMessage, LaneStart},
    limits::LaneLimits,
    loads::ExpertLoads,
    machine::{Arrangement, BATCH_BYTES_MAX, Command, Event, LaneMachine, LaneParts},
    reply::ReplyQueue,
};

/// Where events for a node's present lane go; empty while there is none.
pub type LaneInbox = Arc<ArcSwapOption<Sender<LaneEvent>>>;

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
/// How long a lane may take to make room for being told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait of a lane that has nothing to do.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// Longest wait of a lane that holds a sequence back until its reader has caught up.
const HELD_WAIT: Duration = Duration::from_millis(5);

/// What a lane's thread is told.
pub enum LaneEvent {
    /// A job is at home here.
    Start(Box<JobStart>),
    /// The job with this ticket is no longer wanted.
    Cancel(Ticket),
    /// Another node wants experts run.
    Batch {
        /// What it wants.
        view: ExpertBatchView,
        /// Where the answer goes.
        reply: ReplyQueue,
    },
    /// Another node has run experts.
    Reply {
        /// Its index.
        peer: u16,
        /// What it says.
        reply: ExpertReplyView,
    },
    /// A stream to another node stands.
    PeerUp {
        /// Its index.
        peer: u16,
        /// Where batches go.
        outbox: mpsc::Sender<OutgoingFrame>,
    },
    /// The stream to another node is gone.
    PeerLost {
        /// Its index.
        peer: u16,
        /// How it was noticed.
        reason: String,
    },
    /// These nodes have shown no sign of progress lately; others have.
    Suspects(Vec<String>),
    /// Experts are held by others from now on.
    Rearrange(Arrangement),
    /// Experts have come: see [`Lane`]'s flag.
    Wake,
    /// End; what runs is given back without a last event.
    Stop,
}

/// Names one start of a job: a job that was at home here, went elsewhere and came back has another.
pub type Ticket = u64;

/// A job that begins.
pub struct JobStart {
    /// Its number in the cluster.
    pub job: u64,
    /// Its number in this process, never used before.
    pub ticket: Ticket,
    /// What is asked.
    pub request: Request,
    /// Where its events go.
    pub events: mpsc::Sender<JobEvent>,
    /// Why it ended, where its reader could not be told because it did not read.
    pub epitaph: Arc<std::sync::OnceLock<String>>,
    /// The span that all its work belongs to.
    pub span: Span,
}

/// What a lane tells others about itself.
#[derive(Debug, Default)]
pub struct LaneStats {
    /// Tokens generated since it began.
    pub tokens: AtomicU64,
    /// Sequences at home now.
    pub sequences: AtomicU32,
    /// It computes now.
    pub busy: AtomicBool,
    /// Times that it went around: it stands still where the thread is stuck.
    pub rounds: AtomicU64,
    /// How long it had nothing to compute because experts were on their way, in microseconds.
    pub waited_us: AtomicU64,
    /// What its scheduler has done, and holds.
    pub schedule: Mutex<ScheduleStats>,
    /// How often its sequences chose each expert; empty before the lane begins.
    pub loads: ArcSwapOption<ExpertLoads>,
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

    /// Ends the lane.
    pub fn stop(mut self) {
        // A lane empties its inbox between steps; a lane that is gone needs no telling.
        let _ = self.inbox.send_timeout(LaneEvent::Stop, STOP_TIMEOUT);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for LaneHandle {
    fn drop(&mut self) {
        // An owner that was killed has not called `stop`.
        let _ = self.inbox.try_send(LaneEvent::Stop);
    }
}

/// The thread around a machine.
pub struct Lane<D: Device> {
    machine: LaneMachine<D, ReplyQueue>,
    outboxes: HashMap<u16, mpsc::Sender<OutgoingFrame>>,
    jobs: Jobs,
    stats: Arc<LaneStats>,
    inbox: Receiver<LaneEvent>,
    /// Experts have come since this was last looked at.
    experts: Arc<AtomicBool>,
    /// Another node has sent a batch lately.
    served: bool,
    stopped: bool,
    /// Why the device computes nothing more.
    lost: Option<String>,
}

impl<D: Device> Lane<D> {
    /// Starts a lane's thread. `gone` is called when the thread ends, with what made it end too early.
    pub fn spawn(
        parts: LaneParts<D>,
        stats: Arc<LaneStats>,
        gone: impl FnOnce(Option<String>) + Send + 'static,
    ) -> std::io::Result<LaneHandle> {
        let (sender, inbox) = bounded(INBOX_MAX);
        let experts = Arc::new(AtomicBool::new(false));
        parts.store.on_arrival(Box::new({
            let (experts, lane) = (experts.clone(), sender.clone());
            move || {
                if !experts.swap(true, AcqRel) {
                    // A lane whose inbox is full is awake.
                    let _ = lane.try_send(LaneEvent::Wake);
                }
            }
        }));
        let mut lane = Lane {
            machine: LaneMachine::new(parts),
            outboxes: HashMap::new(),
            jobs: Jobs::default(),
            stats,
            inbox,
            experts,
            served: false,
            stopped: false,
            lost: None,
        };
        lane.stats.loads.store(Some(lane.machine.loads.clone()));
        let thread = std::thread::Builder::new().name("lite-llm-lane".into()).spawn(move || {
            let run = std::panic::AssertUnwindSafe(|| lane.run());
            let failure = std::panic::catch_unwind(run).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                let text = text.unwrap_or_else(|| "unknown panic".to_owned());
                Some(format!("the lane panicked: {text}"))
            });
            gone(failure);
        })?;
        Ok(LaneHandle { inbox: sender, thread: Some(thread) })
    }

    /// Runs until it is stopped, or gives a reason why it cannot go on.
    fn run(&mut self) -> Option<String> {
        while !self.stopped {
            self.stats.rounds.fetch_add(1, Relaxed);
            self.receive();
            let now = Instant::now();
            if self.machine.poll_timeout().is_some_and(|at| at <= now) {
                self.machine.handle(now, Event::Tick);
            }
            if self.experts.swap(false, AcqRel) {
                self.machine.handle(now, Event::Experts);
            }
            for (sequence, held) in self.jobs.backlogs() {
                self.machine.handle(now, Event::Hold { sequence, held });
            }
            let work = self.carry_out(now);
            let sequences = self.machine.engine().sequences() as u32;
            self.stats.sequences.store(sequences, Relaxed);
            *self.stats.schedule.lock() = self.machine.engine().stats();
            if work {
                self.stats.busy.store(true, Relaxed);
                self.machine.compute(Instant::now());
            } else if !self.stopped {
                self.stats.busy.store(false, Relaxed);
                let (starved, from) = (self.machine.is_starved(), Instant::now());
                self.wait();
                if starved {
                    self.stats.waited_us.fetch_add(from.elapsed().as_micros() as u64, Relaxed);
                }
            }
        }
        self.stats.busy.store(false, Relaxed);
        self.stats.sequences.store(0, Relaxed);
        *self.stats.schedule.lock() = ScheduleStats::default();
        self.lost.take()
    }

    fn receive(&mut self) {
        // Whoever sends without end is not to keep the lane from computing.
        for _ in 0..INBOX_MAX {
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
        let event = match event {
            LaneEvent::Start(start) => {
                let JobStart { job, ticket, request, events, epitaph, span } = *start;
                let vocab = self.machine.engine().backbone().config.vocab;
                let logits = request.logits;
                self.jobs.insert(ticket, Job::new(job, vocab, logits, events, epitaph, span));
                Event::Start { sequence: ticket, request }
            }
            LaneEvent::Cancel(ticket) => Event::Cancel(ticket),
            LaneEvent::Batch { view, reply } => {
                self.served = true;
                Event::Batch { view, reply }
            }
            LaneEvent::Reply { peer, reply } => Event::Reply { peer, reply },
            LaneEvent::PeerUp { peer, outbox } => {
                self.outboxes.insert(peer, outbox);
                Event::PeerUp { peer }
            }
            LaneEvent::PeerLost { peer, reason } => {
                self.outboxes.remove(&peer);
                Event::PeerLost { peer, reason }
            }
            LaneEvent::Suspects(names) => Event::Suspects(names),
            LaneEvent::Rearrange(arrangement) => Event::Rearrange(arrangement),
            LaneEvent::Wake => return,
            LaneEvent::Stop => {
                self.stopped = true;
                return;
            }
        };
        self.machine.handle(Instant::now(), event);
    }

    /// Carries commands out until there is something to compute, or nothing to do.
    fn carry_out(&mut self, now: Instant) -> bool {
        while let Some(command) = self.machine.poll_command() {
            match command {
                Command::Compute => return true,
                Command::Send { id, peer, frame } => {
                    if let Err(reason) = self.send(peer, frame) {
                        self.machine.handle(now, Event::Undelivered { id, peer, reason });
                    }
                }
                Command::Answer { reply, frame } => reply.send(frame),
                Command::Publish(event) => {
                    if matches!(event, lite_llm_runtime::engine::Event::Token { .. }) {
                        self.stats.tokens.fetch_add(1, Relaxed);
                    }
                    if let Some(abandoned) = self.jobs.publish(event) {
                        self.machine.handle(now, Event::Cancel(abandoned));
                    }
                }
                Command::NotTaken { sequence, reason } => self.jobs.not_taken(sequence, reason),
                Command::Lost(reason) => {
                    (self.lost, self.stopped) = (Some(reason), true);
                    return false;
                }
            }
        }
        false
    }

    fn send(&mut self, peer: u16, frame: OutgoingFrame) -> Result<(), String> {
        let Some(outbox) = self.outboxes.get(&peer) else {
            return Err("there is no connection to it".into());
        };
        outbox.try_send(frame).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => "it does not take its batches".into(),
            mpsc::error::TrySendError::Closed(_) => "its connection is closed".into(),
        })
    }

    /// Waits for the next event, until the machine wants the time.
    fn wait(&mut self) {
        if self.machine.is_waiting() || self.served {
            let device = self.machine.engine().backbone().device.clone();
            let (from, mut pieces) = (Instant::now(), 0);
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
        let (now, deadline) = (Instant::now(), self.machine.poll_timeout());
        let wait = deadline.map_or(IDLE_WAIT, |at| at.saturating_duration_since(now));
        let longest = if self.jobs.any_held() { HELD_WAIT } else { IDLE_WAIT };
        match self.inbox.recv_timeout(wait.min(longest)) {
            Ok(event) => self.handle(event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stopped = true,
        }
    }
}
