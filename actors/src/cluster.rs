//! What a coordinator decides: who is alive, who holds what, where jobs run. A pure machine around
//! [`Membership`] and [`Liveness`].
//!
//! Nodes are told apart by name and, one after the other under a name, by incarnation.
//!
//! Invariants: a job that wants a home gets exactly one, when there is one, in the order of asking;
//! a node that is suspected, that cannot reach an expert's only holder, or that is being drained gets
//! no jobs, and those that it has are to go elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Instant,
};

use lite_llm_transport::messages::NodeInfo;

use crate::{
    liveness::{self, Liveness},
    membership::{self, Holding, Membership, MembershipOptions, Missing, Plan, State},
    words,
};

/// What happens to a cluster.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is here and said who it is. One of the same name is replaced: the newer one proves the
    /// name just as well, and the older may be dead without anybody having noticed.
    Here {
        /// Who it is.
        info: NodeInfo,
        /// The assignment whose experts it holds.
        holding: Option<Holding>,
    },
    /// A node is gone.
    Gone {
        /// Its name.
        name: String,
        /// How it was noticed.
        reason: String,
    },
    /// A node answered how it is, or did not.
    Vitals {
        /// Its name.
        name: String,
        /// Which of those of this name was asked.
        incarnation: u64,
        /// What it said.
        vitals: Option<Vitals>,
    },
    /// A node finished an assignment.
    Assigned {
        /// Its name.
        name: String,
        /// Which of those of this name was asked.
        incarnation: u64,
        /// The assignment's epoch.
        epoch: u64,
        /// Whether it computes by it, or has only loaded it.
        serves: bool,
        /// How it went.
        result: Result<(), String>,
    },
    /// A job wants a node to run at.
    Wants {
        /// The job.
        job: u64,
        /// Nodes that did not take it lately, or lost it, the last one last: asked again only if
        /// there is no other, the last one last.
        refused: Vec<String>,
    },
    /// A job is no longer at its node, or wants none any more.
    Left {
        /// The job.
        job: u64,
    },
    /// A node's work and experts are to go elsewhere, and then the node.
    Drain {
        /// Its name.
        name: String,
    },
    /// Time went by.
    Tick,
}

/// How a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vitals {
    /// Its lane has something to compute.
    pub busy: bool,
    /// Moves while it computes.
    pub progress: u64,
    /// Nodes that it cannot reach.
    pub unreachable: Vec<String>,
    /// Bytes that its experts may take, as far as it knows by now.
    pub budget: u64,
}

/// What a cluster wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Ask a node how it is; [`Event::Vitals`] in any case.
    Ask {
        /// Its name.
        name: String,
        /// Which of those of this name.
        incarnation: u64,
    },
    /// Have a node load what an assignment gives it, or compute by it; [`Event::Assigned`] when it
    /// does.
    Assign {
        /// Its name.
        name: String,
        /// Which of those of this name.
        incarnation: u64,
        /// The assignment.
        plan: Plan,
        /// Whether it is to compute by it.
        serves: bool,
    },
    /// Tell a node who shows no progress.
    Suspects {
        /// Its name.
        name: String,
        /// Who.
        suspects: Vec<String>,
    },
    /// Jobs that are at a node now are to go elsewhere.
    Leave {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A job is to run at this node.
    Home {
        /// The job.
        job: u64,
        /// The node's name.
        name: String,
    },
    /// End the connection to a node: it is lost.
    Close {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// Send a node away.
    Dismiss {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
}

#[derive(Debug)]
struct Node {
    incarnation: u64,
    jobs: usize,
    suspect: bool,
    unreachable: Vec<String>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Cluster {
    membership: Membership,
    liveness: Liveness,
    nodes: BTreeMap<String, Node>,
    incarnations: u64,
    /// Jobs that wait for a node.
    homeless: VecDeque<(u64, Vec<String>)>,
    /// Where jobs are.
    homes: HashMap<u64, String>,
    commands: VecDeque<Command>,
}

impl Cluster {
    /// A cluster without nodes.
    pub fn new(options: MembershipOptions) -> Self {
        Self {
            membership: Membership::new(options),
            liveness: Liveness::default(),
            nodes: BTreeMap::new(),
            incarnations: 0,
            homeless: VecDeque::new(),
            homes: HashMap::new(),
            commands: VecDeque::new(),
        }
    }

    /// What it is doing.
    pub fn state(&self) -> &State {
        self.membership.state()
    }

    /// Number of the placement.
    pub fn epoch(&self) -> u64 {
        self.membership.epoch()
    }

    /// What it lacks.
    pub fn missing(&self) -> Missing {
        self.membership.missing()
    }

    /// Names of the nodes that are here.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// What is wrong with a node, for people.
    pub fn trouble(&self, name: &str) -> Option<String> {
        let node = self.nodes.get(name)?;
        if node.suspect {
            return Some("shows no progress".to_owned());
        }
        let unreachable = node.unreachable.join(", ");
        (!unreachable.is_empty()).then(|| format!("cannot reach {unreachable}"))
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Here { info, holding } => self.here(now, info, holding),
            Event::Gone { name, reason } => self.gone(now, &name, &reason),
            Event::Vitals { name, incarnation, vitals } => {
                self.vitals(now, name, incarnation, vitals);
            }
            Event::Assigned { name, incarnation, epoch, serves, result } => {
                if self.nodes.get(&name).is_some_and(|node| node.incarnation == incarnation) {
                    match (serves, result) {
                        (false, result) => {
                            let loaded = membership::Event::Loaded { name, epoch, result };
                            self.membership.handle(now, loaded);
                        }
                        (true, Ok(())) => {
                            self.membership.handle(now, membership::Event::Computes { name });
                        }
                        // Others do its work until it is tried again.
                        (true, Err(reason)) => {
                            self.membership.handle(now, membership::Event::Unfit { name, reason });
                        }
                    }
                }
            }
            Event::Wants { job, refused } => {
                self.leave(job);
                self.homeless.push_back((job, refused));
            }
            Event::Left { job } => {
                self.leave(job);
                self.homeless.retain(|(other, _)| *other != job);
            }
            Event::Drain { name } => {
                let reason = format!("worker {name} is being drained");
                self.commands.push_back(Command::Leave { name: name.clone(), reason });
                self.membership.handle(now, membership::Event::Drain { name });
            }
            Event::Tick => {
                self.liveness.handle(now, liveness::Event::Tick);
                self.membership.handle(now, membership::Event::Tick);
            }
        }
        self.settle(now);
    }

    /// What is to be done next, if anything.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.membership.poll_timeout(), self.liveness.poll_timeout()].into_iter().flatten().min()
    }

    fn here(&mut self, now: Instant, info: NodeInfo, holding: Option<Holding>) {
        let name = info.name.clone();
        self.gone(now, &name, "it has connected again");
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let node = Node { incarnation, jobs: 0, suspect: false, unreachable: Vec::new() };
        self.nodes.insert(name.clone(), node);
        self.liveness.handle(now, liveness::Event::Joined { name, incarnation });
        self.membership.handle(now, membership::Event::Joined { info, incarnation, holding });
        self.tell_suspects();
    }

    /// A node is gone, if it was here.
    fn gone(&mut self, now: Instant, name: &str, reason: &str) {
        let Some(Node { incarnation, suspect, .. }) = self.nodes.remove(name) else { return };
        let leave = Command::Leave { name: name.to_owned(), reason: words::gone(name, reason) };
        self.commands.push_back(leave);
        // What others said of it was about this life.
        self.nodes.values_mut().for_each(|other| other.unreachable.retain(|it| it != name));
        let (name, reason) = (name.to_owned(), reason.to_owned());
        let left = liveness::Event::Left { name: name.clone(), incarnation };
        self.liveness.handle(now, left);
        self.membership.handle(now, membership::Event::Left { name, incarnation, reason });
        if suspect {
            self.tell_suspects();
        }
    }

    fn vitals(&mut self, now: Instant, name: String, incarnation: u64, vitals: Option<Vitals>) {
        let others = self.nodes.keys().filter(|other| **other != name);
        let here: BTreeSet<String> = others.cloned().collect();
        let Some(node) = self.nodes.get_mut(&name) else { return };
        if node.incarnation != incarnation {
            return;
        }
        let Some(Vitals { busy, progress, unreachable, budget }) = vitals else {
            return self.liveness.handle(now, liveness::Event::Unanswered { name, incarnation });
        };
        let said: BTreeSet<String> = unreachable.into_iter().collect();
        let unreachable: Vec<String> = here.intersection(&said).cloned().collect();
        let before = std::mem::replace(&mut node.unreachable, unreachable.clone());
        for other in unreachable.iter().filter(|other| !before.contains(other)) {
            let (other, by) = (other.clone(), name.clone());
            self.membership.handle(now, membership::Event::Unreachable { name: other, by });
        }
        for other in before.iter().filter(|other| !unreachable.contains(other)) {
            let (other, by) = (other.clone(), name.clone());
            self.membership.handle(now, membership::Event::Reachable { name: other, by });
        }
        let room = membership::Event::Room { name: name.clone(), budget };
        self.membership.handle(now, room);
        self.liveness.handle(now, liveness::Event::Answered { name, incarnation, busy, progress });
    }

    /// Carries out what the machines inside decided.
    fn settle(&mut self, now: Instant) {
        loop {
            if let Some(command) = self.liveness.poll_command() {
                self.attend(now, command);
            } else if let Some(command) = self.membership.poll_command() {
                self.arrange(command);
            } else {
                break;
            }
        }
        self.find_homes();
    }

    fn attend(&mut self, now: Instant, command: liveness::Command) {
        match command {
            liveness::Command::Ask { name, incarnation } => {
                self.commands.push_back(Command::Ask { name, incarnation });
            }
            liveness::Command::Suspect { name, reason } => {
                if let Some(node) = self.nodes.get_mut(&name) {
                    node.suspect = true;
                }
                self.tell_suspects();
                self.membership.handle(now, membership::Event::Suspect { name, reason });
            }
            liveness::Command::Recovered { name } => {
                if let Some(node) = self.nodes.get_mut(&name) {
                    node.suspect = false;
                }
                self.tell_suspects();
                self.membership.handle(now, membership::Event::Recovered { name });
            }
            liveness::Command::Lost { name, reason, .. } => {
                self.gone(now, &name, &reason);
                self.commands.push_back(Command::Close { name, reason });
            }
        }
    }

    fn arrange(&mut self, command: membership::Command) {
        let (name, plan, serves) = match command {
            membership::Command::Load { name, assignment } => (name, assignment, false),
            membership::Command::Serve { name, assignment } => (name, assignment, true),
            membership::Command::Dismiss { name, incarnation, reason } => {
                // One that was replaced is gone already.
                if self.nodes.get(&name).is_some_and(|node| node.incarnation == incarnation) {
                    self.commands.push_back(Command::Dismiss { name, reason });
                }
                return;
            }
            membership::Command::Changed => return self.leave_bad_homes(),
        };
        if let Some(node) = self.nodes.get(&name) {
            let incarnation = node.incarnation;
            self.commands.push_back(Command::Assign { name, incarnation, plan, serves });
        }
    }

    /// Jobs at nodes that are no home any more go elsewhere, if there is somebody who can take them:
    /// their node is suspected, or cannot reach the only holder of an expert. If not, they are best
    /// off where they are.
    fn leave_bad_homes(&mut self) {
        let homes: BTreeSet<&str> = self.membership.homes().collect();
        if homes.is_empty() {
            return;
        }
        let left =
            |(name, node): &(&String, &Node)| node.jobs > 0 && !homes.contains(name.as_str());
        let left: Vec<String> =
            self.nodes.iter().filter(left).map(|(name, _)| name.clone()).collect();
        for name in left {
            let trouble = self.trouble(&name).unwrap_or_else(|| "gives its share away".to_owned());
            let reason = format!("worker {name} {trouble}");
            self.commands.push_back(Command::Leave { name, reason });
        }
    }

    fn tell_suspects(&mut self) {
        let suspects: Vec<&String> =
            self.nodes.iter().filter(|(_, node)| node.suspect).map(|(name, _)| name).collect();
        for name in self.nodes.keys() {
            let others = suspects.iter().filter(|other| **other != name);
            let suspects = others.map(|other| (*other).clone()).collect();
            self.commands.push_back(Command::Suspects { name: name.clone(), suspects });
        }
    }

    /// Gives the jobs that wait to nodes that can take them: each to the one with the fewest, of
    /// equals to the first by name.
    fn find_homes(&mut self) {
        while let Some((job, refused)) = self.homeless.front() {
            let job = *job;
            let jobs = |name: &&str| self.nodes.get(*name).map(|node| node.jobs);
            let homes = self.membership.homes().filter(|name| jobs(name).is_some());
            let refused = |name: &str| refused.iter().position(|it| it == name);
            let Some(name) = homes.min_by_key(|name| (refused(name), jobs(name), *name)) else {
                return;
            };
            let name = name.to_owned();
            self.homeless.pop_front();
            if let Some(node) = self.nodes.get_mut(&name) {
                node.jobs += 1;
            }
            self.homes.insert(job, name.clone());
            self.commands.push_back(Command::Home { job, name });
        }
    }

    /// A job is no longer at its node.
    fn leave(&mut self, job: u64) {
        if let Some(home) = self.homes.remove(&job)
            && let Some(node) = self.nodes.get_mut(&home)
        {
            node.jobs = node.jobs.saturating_sub(1);
        }
    }
}
