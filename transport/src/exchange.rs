//! Dispatches in flight: which peers still owe an answer, and what becomes of each dispatch.
//!
//! A pure machine. A dispatch goes to several peers; it completes when all have answered, and
//! fails when one refuses, is lost, or the deadline passes.
//!
//! Invariants: every dispatch ends exactly once, at its deadline at the latest; what comes for a
//! dispatch that ended is ignored; at most `in_flight_max` are in flight, and one more is refused
//! at once instead of waiting; nothing is remembered about a dispatch that ended.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// How long the peers of one dispatch may take.
pub const DISPATCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Most dispatches of one node in flight.
pub const IN_FLIGHT_DISPATCHES_MAX: usize = 4096;

/// A node, by its index in the placement's list.
pub type Peer = u16;

/// Why a dispatch failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// A peer would not or could not compute it.
    #[error("node {peer} refused dispatch {id}: {reason}")]
    Refused {
        /// The dispatch.
        id: u64,
        /// Who.
        peer: Peer,
        /// Why.
        reason: String,
    },
    /// A peer that owed an answer is gone.
    #[error("node {peer} was lost while it worked on dispatch {id}: {reason}")]
    Lost {
        /// The dispatch.
        id: u64,
        /// Who.
        peer: Peer,
        /// How.
        reason: String,
    },
    /// The deadline passed.
    #[error("dispatch {id} had no answer from nodes {peers:?} within {waited:?}")]
    TimedOut {
        /// The dispatch.
        id: u64,
        /// Who owed an answer.
        peers: Vec<Peer>,
        /// How long they had.
        waited: Duration,
    },
    /// Too many others are in flight.
    #[error("dispatch {id} was refused: {max} are in flight already; admit fewer sequences")]
    Overloaded {
        /// The dispatch.
        id: u64,
        /// The limit.
        max: usize,
    },
}

impl ExchangeError {
    /// The peer at fault, if it is one.
    pub fn peer(&self) -> Option<Peer> {
        match self {
            Self::Refused { peer, .. } | Self::Lost { peer, .. } => Some(*peer),
            Self::TimedOut { peers, .. } => peers.first().copied(),
            Self::Overloaded { .. } => None,
        }
    }
}

/// What happens to dispatches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A batch goes to each of these peers. Its number was not used before.
    Dispatched {
        /// The dispatch.
        id: u64,
        /// Who is to answer.
        peers: Vec<Peer>,
    },
    /// A peer answered.
    Replied {
        /// The dispatch.
        id: u64,
        /// Who.
        peer: Peer,
    },
    /// A peer said no.
    Refused {
        /// The dispatch.
        id: u64,
        /// Who.
        peer: Peer,
        /// Why.
        reason: String,
    },
    /// A connection is gone.
    PeerLost {
        /// Whose.
        peer: Peer,
        /// How.
        reason: String,
    },
    /// Time went by.
    Tick,
}

/// What becomes of a dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Every peer answered.
    Complete {
        /// The dispatch.
        id: u64,
    },
    /// It will not be completed.
    Fail {
        /// The dispatch.
        id: u64,
        /// Why.
        error: ExchangeError,
    },
}

/// The machine.
#[derive(Debug)]
pub struct Exchange {
    timeout: Duration,
    in_flight_max: usize,
    in_flight: BTreeMap<u64, Dispatch>,
    deadlines: BTreeSet<(Instant, u64)>,
    commands: VecDeque<Command>,
}

#[derive(Debug)]
struct Dispatch {
    owing: BTreeSet<Peer>,
    deadline: Instant,
}

impl Default for Exchange {
    fn default() -> Self {
        Self::new(DISPATCH_TIMEOUT, IN_FLIGHT_DISPATCHES_MAX)
    }
}

impl Exchange {
    /// A machine whose dispatches have this long, and of which this many may be in flight.
    pub fn new(timeout: Duration, in_flight_max: usize) -> Self {
        Self {
            timeout,
            in_flight_max,
            in_flight: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            commands: VecDeque::new(),
        }
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Dispatched { id, peers } => self.dispatch(now, id, peers),
            Event::Replied { id, peer } => {
                let Some(dispatch) = self.in_flight.get_mut(&id) else { return };
                if dispatch.owing.remove(&peer) && dispatch.owing.is_empty() {
                    self.end(id, Command::Complete { id });
                }
            }
            Event::Refused { id, peer, reason } => {
                if self.owes(id, peer) {
                    let error = ExchangeError::Refused { id, peer, reason };
                    self.end(id, Command::Fail { id, error });
                }
            }
            Event::PeerLost { peer, reason } => {
                let owed: Vec<u64> =
                    self.in_flight.keys().copied().filter(|&id| self.owes(id, peer)).collect();
                for id in owed {
                    let error = ExchangeError::Lost { id, peer, reason: reason.clone() };
                    self.end(id, Command::Fail { id, error });
                }
            }
            Event::Tick => self.expire(now),
        }
    }

    /// What is to be done next, if anything.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Dispatches that have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn dispatch(&mut self, now: Instant, id: u64, peers: Vec<Peer>) {
        if self.in_flight.contains_key(&id) {
            debug_assert!(false, "dispatch {id} is in flight already: its number was used twice");
            return;
        }
        if peers.is_empty() {
            return self.commands.push_back(Command::Complete { id });
        }
        if self.in_flight.len() >= self.in_flight_max {
            let error = ExchangeError::Overloaded { id, max: self.in_flight_max };
            return self.commands.push_back(Command::Fail { id, error });
        }
        let deadline = now + self.timeout;
        self.deadlines.insert((deadline, id));
        self.in_flight.insert(id, Dispatch { owing: peers.into_iter().collect(), deadline });
    }

    fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            let owing = self.in_flight.get(&id).map(|dispatch| &dispatch.owing);
            let peers = owing.into_iter().flatten().copied().collect();
            let error = ExchangeError::TimedOut { id, peers, waited: self.timeout };
            self.end(id, Command::Fail { id, error });
        }
    }

    fn owes(&self, id: u64, peer: Peer) -> bool {
        self.in_flight.get(&id).is_some_and(|dispatch| dispatch.owing.contains(&peer))
    }

    fn end(&mut self, id: u64, command: Command) {
        if let Some(dispatch) = self.in_flight.remove(&id) {
            self.deadlines.remove(&(dispatch.deadline, id));
            self.commands.push_back(command);
        }
    }
}
