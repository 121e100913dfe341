//! Who is in the cluster and what each member is to hold: a pure machine.
//!
//! ```text
//! Waiting ─(enough joined)─▶ Loading ─(all loaded)─▶ Ready
//!    ▲                          │                      │
//!    └───────(a member left)────┴──────────────────────┘
//! ```
//!
//! Invariants: a slot keeps its experts when its member is replaced, so survivors reload
//! nothing; an epoch's assignment goes to each member once; results of older epochs are ignored.

use std::collections::VecDeque;

use lite_llm_runtime::config::ModelConfig;
use lite_llm_transport::messages::{NodeAddress, NodeInfo};

use crate::placement::{Owners, PlacementPolicy, place};

/// What happens to the membership.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is there and can be given experts.
    Joined(NodeInfo),
    /// A node is gone.
    Left {
        /// Its name.
        name: String,
        /// How it was noticed.
        reason: String,
    },
    /// A node has loaded what an epoch gave it, or could not.
    Loaded {
        /// Its name.
        name: String,
        /// The epoch that it was told.
        epoch: u64,
        /// Why not, if not.
        result: Result<(), String>,
    },
}

/// What the membership wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Give this node its part.
    Load {
        /// Its name.
        name: String,
        /// The epoch.
        epoch: u64,
        /// Its index among the nodes.
        index: u16,
        /// All nodes of the epoch.
        nodes: Vec<NodeAddress>,
        /// Owner of every expert.
        owners: Owners,
    },
    /// A node that is not needed, or not wanted, is sent away.
    Dismiss {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// All nodes of the epoch have loaded.
    Ready {
        /// The epoch.
        epoch: u64,
    },
    /// The cluster can no longer serve; what runs must fail with this reason.
    Suspend {
        /// Why.
        reason: String,
    },
}

/// What the membership is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// For nodes.
    Waiting,
    /// Nodes load their experts.
    Loading,
    /// Requests can be served.
    Ready,
    /// It cannot be served by these nodes.
    Failed(String),
}

#[derive(Debug)]
struct Member {
    info: NodeInfo,
    loaded: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Membership {
    config: ModelConfig,
    /// Per tier.
    expert_bytes: Vec<u64>,
    policy: PlacementPolicy,
    slots: Vec<Option<Member>>,
    owners: Option<Owners>,
    epoch: u64,
    state: State,
    commands: VecDeque<Command>,
}

impl Membership {
    /// A cluster of `nodes` nodes for a model whose experts take `expert_bytes[tier]` each.
    pub fn new(
        config: ModelConfig,
        expert_bytes: Vec<u64>,
        nodes: usize,
        policy: PlacementPolicy,
    ) -> Self {
        Self {
            config,
            expert_bytes,
            policy,
            slots: (0..nodes).map(|_| None).collect(),
            owners: None,
            epoch: 0,
            state: State::Waiting,
            commands: VecDeque::new(),
        }
    }

    /// What it is doing.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Number of the placement.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The members, in order of their indices.
    pub fn members(&self) -> impl Iterator<Item = &NodeInfo> {
        self.slots.iter().flatten().map(|member| &member.info)
    }

    /// Whom it waits for, for people.
    pub fn waiting_for(&self) -> Vec<String> {
        match self.state {
            State::Waiting => {
                let missing = self.slots.iter().filter(|slot| slot.is_none()).count();
                vec![format!("{missing} of {} workers to join", self.slots.len())]
            }
            State::Loading => {
                let loading = self.slots.iter().flatten().filter(|member| !member.loaded);
                loading.map(|member| format!("{} to load", member.info.name)).collect()
            }
            State::Ready | State::Failed(_) => Vec::new(),
        }
    }

    /// Takes note of an event.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Joined(info) => self.join(info),
            Event::Left { name, reason } => self.leave(&name, &reason),
            Event::Loaded { name, epoch, result } => self.loaded(&name, epoch, result),
        }
    }

    /// The next thing to be done.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    fn join(&mut self, info: NodeInfo) {
        let dismiss = |reason: String| Command::Dismiss { name: info.name.clone(), reason };
        if self.members().any(|member| member.name == info.name) {
            let reason = format!("a worker named {} is here already; give --name", info.name);
            self.commands.push_back(dismiss(reason));
            return;
        }
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) else {
            let reason = format!(
                "this cluster has its {} workers; start the coordinator with a larger --workers",
                self.slots.len()
            );
            self.commands.push_back(dismiss(reason));
            return;
        };
        *slot = Some(Member { info, loaded: false });
        if self.slots.iter().all(Option::is_some) {
            self.assign();
        }
    }

    fn assign(&mut self) {
        let budgets: Vec<u64> = self.members().map(|member| member.budget_bytes).collect();
        let fits = |owners: &Owners| {
            let held = owners.held(&self.config, &self.expert_bytes, budgets.len());
            held.iter().zip(&budgets).all(|(held, budget)| held <= budget)
        };
        let owners = match self.owners.take().filter(fits) {
            Some(owners) => Ok(owners),
            None => place(&self.config, &self.expert_bytes, &budgets, self.policy),
        };
        match owners {
            Ok(owners) => {
                self.epoch += 1;
                self.state = State::Loading;
                let nodes: Vec<NodeAddress> = self
                    .members()
                    .map(|m| NodeAddress { name: m.name.clone(), address: m.address.clone() })
                    .collect();
                for (index, member) in self.slots.iter_mut().flatten().enumerate() {
                    member.loaded = false;
                    self.commands.push_back(Command::Load {
                        name: member.info.name.clone(),
                        epoch: self.epoch,
                        index: index as u16,
                        nodes: nodes.clone(),
                        owners: owners.clone(),
                    });
                }
                self.owners = Some(owners);
            }
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn leave(&mut self, name: &str, reason: &str) {
        let named = |slot: &&mut Option<Member>| {
            slot.as_ref().is_some_and(|member| member.info.name == name)
        };
        let Some(slot) = self.slots.iter_mut().find(named) else { return };
        *slot = None;
        // Also after a failure: the next to join may bring what was missing.
        self.state = State::Waiting;
        self.commands.push_back(Command::Suspend { reason: gone(name, reason) });
    }

    fn loaded(&mut self, name: &str, epoch: u64, result: Result<(), String>) {
        if epoch != self.epoch || self.state != State::Loading {
            return;
        }
        if let Err(reason) = result {
            self.fail(format!("worker {name} could not load its experts: {reason}"));
            return;
        }
        for member in self.slots.iter_mut().flatten() {
            member.loaded |= member.info.name == name;
        }
        if self.slots.iter().flatten().all(|member| member.loaded) {
            self.state = State::Ready;
            self.commands.push_back(Command::Ready { epoch });
        }
    }

    fn fail(&mut self, reason: String) {
        self.state = State::Failed(reason.clone());
        self.commands.push_back(Command::Suspend { reason });
    }
}

/// What a loss means for a job, for people.
pub fn gone(worker: &str, how: &str) -> String {
    format!(
        "worker {worker} is gone ({how}); its experts are missing: submit again when a worker has \
         taken its place"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_model;

    fn info(name: &str, budget: u64) -> NodeInfo {
        NodeInfo {
            name: name.into(),
            address: format!("{name}:1"),
            release: String::new(),
            protocol: 1,
            determinism: 1,
            budget_bytes: budget,
            threads: 1,
            pid: 1,
        }
    }

    fn drain(m: &mut Membership) -> Vec<Command> {
        std::iter::from_fn(|| m.poll_command()).collect()
    }

    fn loads(commands: &[Command]) -> Vec<(String, u64, Owners)> {
        commands
            .iter()
            .filter_map(|c| match c {
                Command::Load { name, epoch, owners, .. } => {
                    Some((name.clone(), *epoch, owners.clone()))
                }
                _ => None,
            })
            .collect()
    }

    fn loaded(name: &str, epoch: u64) -> Event {
        Event::Loaded { name: name.into(), epoch, result: Ok(()) }
    }

    fn ready() -> Membership {
        let mut m = Membership::new(tiny_model(2, 8), vec![10], 2, PlacementPolicy::Balanced);
        m.handle(Event::Joined(info("a", 1000)));
        m.handle(Event::Joined(info("b", 1000)));
        m.handle(loaded("a", 1));
        m.handle(loaded("b", 1));
        m
    }

    #[test]
    fn it_waits_then_loads_then_is_ready() {
        let mut m = Membership::new(tiny_model(2, 8), vec![10], 2, PlacementPolicy::Balanced);
        assert_eq!(m.waiting_for(), ["2 of 2 workers to join"]);
        m.handle(Event::Joined(info("a", 1000)));
        assert!(drain(&mut m).is_empty());
        m.handle(Event::Joined(info("b", 1000)));
        assert_eq!(loads(&drain(&mut m)).len(), 2);
        m.handle(loaded("a", 1));
        m.handle(loaded("b", 0));
        assert_eq!(m.waiting_for(), ["b to load"], "a report of another epoch counts for nothing");
        m.handle(loaded("b", 1));
        assert_eq!(drain(&mut m), [Command::Ready { epoch: 1 }]);
    }

    #[test]
    fn a_replacement_gets_the_experts_of_the_lost_and_survivors_keep_theirs() {
        let mut m = ready();
        let before = loads(&drain(&mut m));
        m.handle(Event::Left { name: "a".into(), reason: "idle".into() });
        assert!(
            matches!(&drain(&mut m)[..], [Command::Suspend { reason }] if reason.contains("a is gone"))
        );
        assert_eq!(*m.state(), State::Waiting);
        m.handle(Event::Joined(info("c", 1000)));
        let after = loads(&drain(&mut m));
        assert_eq!(after[0].0, "c");
        assert_eq!(after[0].1, 2);
        assert_eq!(after[0].2, before[0].2);
    }

    #[test]
    fn one_too_many_and_one_twice_are_sent_away() {
        let mut m = ready();
        drain(&mut m);
        m.handle(Event::Joined(info("c", 1)));
        m.handle(Event::Joined(info("a", 1)));
        let commands = drain(&mut m);
        assert!(commands.iter().all(|c| matches!(c, Command::Dismiss { .. })), "{commands:?}");
        assert_eq!(*m.state(), State::Ready);
    }

    #[test]
    fn a_model_that_does_not_fit_says_so() {
        let mut m = Membership::new(tiny_model(2, 8), vec![10], 1, PlacementPolicy::Balanced);
        m.handle(Event::Joined(info("a", 100)));
        assert!(matches!(m.state(), State::Failed(reason) if reason.contains("160 bytes")));
    }
}
