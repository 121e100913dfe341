//! Who is in the cluster, what each member is to hold, and how that changes while jobs run: a pure
//! machine.
//!
//! A member has a *slot*, its index in assignments; the slot stays its own until it is gone and
//! somebody else takes it. There are two placements: the one that *serves*, which lanes use, and at
//! most one *target*, which is being loaded while the other serves on.
//!
//! ```text
//! lobby ──(enough members, or all experts held)──▶ target ──(all its holders loaded)──▶ serving
//!                                                    ▲                                     │
//!                 joined, lost, drained, unfit, cut ─┴─────────────────────────────────────┘
//! ```
//!
//! Invariants: epochs grow, also past those of an earlier coordinator; a target serves when every
//! holder has loaded it, and not before; it ends with the life of a holder; nobody is a home, and
//! nothing ready, before those who hold the experts have said that they compute; whatever is reported
//! about another epoch, or by an earlier incarnation of a member, changes nothing; what a member
//! serves and what it is to load fit in its budget together ([`plan`](crate::placement::plan)); no
//! state is final.
//!
//! What a node must do for that: at [`Command::Load`] it keeps what it was last told to serve
//! *since it joined* and what the assignment gives it, drops all else, and then loads; at
//! [`Command::Serve`] it uses that assignment, and drops all else. It takes them in order, and may
//! be told to serve an epoch that it was never told to load, if it holds its share: so a target is
//! given up for what serves.

mod cuts;
mod facts;
mod form;
mod leave;
mod room;

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use lite_llm_runtime::config::ModelConfig;
use lite_llm_transport::messages::{NodeAddress, NodeInfo, PlacementRule};

pub use self::facts::{Lost, Missing};
use self::{cuts::Cuts, form::Held};
use crate::placement::{DoesNotFit, Placement, PlacementPolicy};

/// How long a lost member may take to come back before others load its share, if all its experts
/// have other holders.
pub const REPAIR_DELAY: Duration = Duration::from_secs(2);
/// The same after a restart of the coordinator, when all members look for it anew.
pub const RETURN_DELAY: Duration = Duration::from_secs(5);
/// How long a member that could not load is left out.
pub const RETRY_DELAY: Duration = Duration::from_secs(10);
/// How long a link must be down before experts move because of it, and up before they move back.
pub const LINK_REPAIR: Duration = Duration::from_secs(1);
/// Most slots. More than any cluster of one coordinator has members.
pub const SLOTS_MAX: usize = 4096;

/// Plans, one from the outcome of the other, that an event may cause.
const PLANS_MAX: usize = 64;

/// What a worker has loaded, by its own account: the last assignment that it finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// Its number.
    pub epoch: u64,
    /// Names of the nodes, by slot.
    pub nodes: Vec<String>,
    /// The worker's own slot.
    pub you: u16,
    /// Who held what.
    pub rules: Vec<PlacementRule>,
}

/// What happens to the membership.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is there and can be given experts.
    Joined {
        /// Who it is.
        info: NodeInfo,
        /// Which life of this name: another for each time that it joins.
        incarnation: u64,
        /// What it has loaded, from this coordinator or an earlier one.
        holding: Option<Holding>,
    },
    /// A node is gone.
    Left {
        /// Its name.
        name: String,
        /// Which of its lives ended.
        incarnation: u64,
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
    /// A member has no link to another.
    Unreachable {
        /// Who is not reached.
        name: String,
        /// Who says so.
        by: String,
    },
    /// A member has a link to another again.
    Reachable {
        /// Who is reached.
        name: String,
        /// Who says so.
        by: String,
    },
    /// A member shows no sign of progress.
    Suspect {
        /// Its name.
        name: String,
        /// What was noticed.
        reason: String,
    },
    /// It does again.
    Recovered {
        /// Its name.
        name: String,
    },
    /// A node has room for so many bytes of experts. It knows that when it has opened the model, the rest
    /// of which takes memory, too: once, and never more than it said at first.
    Room {
        /// Its name.
        name: String,
        /// Bytes.
        budget: u64,
    },
    /// A node was told to serve an epoch and computes by it.
    Computes {
        /// Its name.
        name: String,
    },
    /// A node was told to serve an epoch and cannot compute by it.
    Unfit {
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// A member is to give its share away and go.
    Drain {
        /// Its name.
        name: String,
    },
    /// Time has passed.
    Tick,
}

/// An assignment, but for what is the same in all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Its number.
    pub epoch: u64,
    /// The receiver's slot.
    pub index: u16,
    /// All slots; one that is vacant has an empty name and an empty address.
    pub nodes: Vec<NodeAddress>,
    /// Who holds what.
    pub placement: Placement,
}

/// What the membership wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Have this node load what it lacks of an assignment; what it serves, it goes on serving.
    Load {
        /// Its name.
        name: String,
        /// What it is to hold.
        assignment: Plan,
    },
    /// All holders have loaded the epoch: this node is to use it now, and to drop all else.
    Serve {
        /// Its name.
        name: String,
        /// What it holds.
        assignment: Plan,
    },
    /// A node is sent away: it is drained, or there is a newer one of its name.
    Dismiss {
        /// Its name.
        name: String,
        /// Which of its lives.
        incarnation: u64,
        /// Why.
        reason: String,
    },
    /// The state or the homes are others than before.
    Changed,
}

/// What the membership is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// For nodes.
    Waiting,
    /// Nodes load their experts, or begin to compute; before that, nothing can be served.
    Loading,
    /// Requests are served, with all copies.
    Ready,
    /// Something is missing.
    Degraded {
        /// Whether every expert has a living holder, so that requests are served all the same.
        complete: bool,
    },
    /// What these nodes have is not enough. The next to join, or a later attempt, may end this.
    Failed(String),
}

#[derive(Debug)]
struct Member {
    /// With the budget that it told last.
    info: NodeInfo,
    /// It has told another budget than that with which it joined.
    told_room: bool,
    incarnation: u64,
    /// What it brought; of no interest once it serves.
    held: Option<Held>,
    /// It was told the serving epoch, and holds its share of it.
    serves: bool,
    /// It has said since it joined that it computes: from one epoch to the next it goes on.
    computes: bool,
    /// The target that it was told last.
    told: u64,
    /// The target that it has loaded.
    loaded: u64,
    suspect: bool,
    draining: bool,
    /// It is to hold nothing while its links are down.
    cut_off: bool,
    /// Why it could not load or compute, and until when it is left out.
    unfit: Option<(String, Instant)>,
    /// False while it is left out because it cannot compute: it is told nothing until then, and
    /// holds nothing.
    able: bool,
}

#[derive(Debug, Default)]
struct Slot {
    member: Option<Member>,
    /// Who had it before, and is welcome back.
    last: Option<Lost>,
}

#[derive(Debug, Clone)]
struct Epoch {
    number: u64,
    nodes: Vec<NodeAddress>,
    placement: Placement,
}

/// How a cluster is to be.
#[derive(Debug, Clone)]
pub struct MembershipOptions {
    /// The model.
    pub config: ModelConfig,
    /// Bytes of an expert, per tier.
    pub expert_bytes: Vec<u64>,
    /// Members that make the cluster whole.
    pub workers: usize,
    /// Holders of each expert.
    pub copies: u16,
    /// How experts are spread.
    pub policy: PlacementPolicy,
    /// Whether members may be given more experts than their memory holds, if all do not fit: the
    /// rest is read when it is needed.
    pub overcommit: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Membership {
    options: MembershipOptions,
    /// Members without slots: the cluster is not formed yet.
    lobby: Vec<Member>,
    formed: bool,
    slots: Vec<Slot>,
    /// What members hold of an earlier coordinator's epoch that cannot serve.
    base: Option<Placement>,
    serving: Option<Epoch>,
    target: Option<Epoch>,
    epoch: u64,
    /// Processes that are being drained, by name: one that only lost its connection still is.
    drains: BTreeMap<String, NodeInfo>,
    cuts: Cuts,
    repair_at: Option<Instant>,
    refused: Option<DoesNotFit>,
    state: State,
    homes: Vec<String>,
    commands: VecDeque<Command>,
}

impl Membership {
    /// A cluster without members.
    pub fn new(options: MembershipOptions) -> Self {
        Self {
            options,
            lobby: Vec::new(),
            formed: false,
            slots: Vec::new(),
            base: None,
            serving: None,
            target: None,
            epoch: 0,
            drains: BTreeMap::new(),
            cuts: Cuts::default(),
            repair_at: None,
            refused: None,
            state: State::Waiting,
            homes: Vec::new(),
            commands: VecDeque::new(),
        }
    }

    /// Takes note of an event.
    pub fn handle(&mut self, now: Instant, event: Event) {
        let mut anew = self.due(now);
        anew |= match event {
            Event::Joined { info, incarnation, holding } => self.join(info, incarnation, holding),
            Event::Left { name, incarnation, reason } => {
                self.leave(now, &name, incarnation, reason)
            }
            Event::Loaded { name, epoch, result } => self.loaded(now, &name, epoch, result),
            Event::Unreachable { name, by } => self.link(now, &name, &by, false),
            Event::Reachable { name, by } => self.link(now, &name, &by, true),
            Event::Suspect { name, .. } => self.mark(&name, |member| member.suspect = true, false),
            Event::Recovered { name } => self.mark(&name, |member| member.suspect = false, false),
            Event::Computes { name } => self.mark(&name, |member| member.computes = true, false),
            Event::Unfit { name, reason } => {
                let until = now + RETRY_DELAY;
                let unfit = |member: &mut Member| {
                    (member.serves, member.able, member.held) = (false, false, None);
                    member.computes = false;
                    member.unfit = Some((reason.clone(), until));
                };
                self.mark(&name, unfit, true)
            }
            Event::Room { name, budget } => self.has_room_for(&name, budget),
            Event::Drain { name } => self.drain(&name),
            Event::Tick => false,
        };
        anew |= self.work_around(now);
        // Plans come to rest; should they not, the coordinator must.
        for _ in 0..PLANS_MAX {
            if !anew {
                break;
            }
            anew = if self.awaits(now) { self.refresh() } else { self.replan(now) };
        }
        debug_assert!(!anew, "plans follow plans without end");
        self.send_away();
        self.assess();
    }

    /// The next thing to be done.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When a tick is due, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let retries = self.present().filter_map(|(_, m)| m.unfit.as_ref().map(|unfit| unfit.1));
        retries.chain(self.repair_at).chain(self.cuts.timeout()).min()
    }

    /// Notes what time has brought. Returns whether to plan anew.
    fn due(&mut self, now: Instant) -> bool {
        let mut anew = self.repair_at.is_some_and(|at| at <= now);
        for member in self.slots.iter_mut().filter_map(|slot| slot.member.as_mut()) {
            anew |= member.unfit.take_if(|(_, until)| *until <= now).is_some();
            member.able |= member.unfit.is_none();
        }
        self.cuts.settle(now);
        anew
    }

    fn mark(&mut self, name: &str, mark: impl Fn(&mut Member), anew: bool) -> bool {
        let slots = self.slots.iter_mut().filter_map(|slot| slot.member.as_mut());
        let found = slots.chain(&mut self.lobby).find(|member| member.info.name == name);
        let known = found.is_some();
        found.into_iter().for_each(mark);
        known && anew
    }

    fn loaded(&mut self, now: Instant, name: &str, epoch: u64, result: Result<(), String>) -> bool {
        if self.target.as_ref().is_none_or(|target| target.number != epoch) {
            return false;
        }
        let members = self.slots.iter_mut().filter_map(|slot| slot.member.as_mut());
        let mut told = members.filter(|m| m.info.name == name && m.told == epoch);
        let Some(member) = told.next() else { return false };
        match result {
            Ok(()) => {
                member.loaded = epoch;
                self.serve_if_loaded()
            }
            Err(reason) => {
                member.unfit = Some((reason, now + RETRY_DELAY));
                true
            }
        }
    }

    fn link(&mut self, now: Instant, name: &str, by: &str, up: bool) -> bool {
        let is_member = |name: &str| self.present().any(|(_, member)| member.info.name == name);
        if name != by && is_member(name) && is_member(by) {
            self.cuts.report(now, name, by, up);
        }
        false
    }

    /// Leaves out members whose links are down, so that every other member reaches every expert;
    /// takes them in again when their links are up. Returns whether to plan anew.
    fn work_around(&mut self, now: Instant) -> bool {
        let Some(serving) = &self.serving else { return false };
        let mut anew = false;
        for member in self.slots.iter_mut().filter_map(|slot| slot.member.as_mut()) {
            if member.cut_off && !self.cuts.concern(&member.info.name) {
                member.cut_off = false;
                anew = true;
            }
        }
        loop {
            let whole: Vec<(u16, &Member)> =
                self.present().filter(|(_, member)| !member.cut_off).collect();
            let cut = |a: &Member, b: &Member| {
                self.cuts.is_down_since(&a.info.name, &b.info.name, now, LINK_REPAIR)
            };
            let cuts_of = |member: &Member| whole.iter().filter(|(_, b)| cut(member, b)).count();
            let lacks = |&(_, member): &(u16, &Member)| {
                let unreached = |index: u16| {
                    whole.iter().any(|(at, holder)| *at == index && cut(member, holder))
                };
                cuts_of(member) > 0
                    && serving.placement.missing(|index| !unreached(index) && self.serves(index))
                    && !serving.placement.missing(|index| self.serves(index))
            };
            if !whole.iter().any(lacks) {
                return anew;
            }
            let worst = whole.iter().max_by_key(|(index, member)| (cuts_of(member), *index));
            let Some(index) = worst.map(|(index, _)| usize::from(*index)) else { return anew };
            let worst = self.slots[index].member.as_mut().expect("it is present");
            worst.cut_off = true;
            anew = true;
        }
    }

    /// Whether a lost member is still to be waited for: nothing moves meanwhile.
    fn awaits(&self, now: Instant) -> bool {
        let Some(serving) = &self.serving else { return false };
        let vacant = |index: u16| self.slots[usize::from(index)].member.is_none();
        self.repair_at.is_some_and(|at| now < at)
            && self.is_complete()
            && (0..self.slots.len() as u16).any(|i| vacant(i) && serving.placement.names(i))
    }

    /// Lets those serve who came back with what they are to serve, and gives up a target that
    /// cannot be loaded any more. Nothing is left to be planned.
    fn refresh(&mut self) -> bool {
        if !self.target_lives() {
            self.abandon();
        }
        let Some(serving) = &self.serving else { return false };
        let back = |(index, member): (u16, &Member)| {
            !member.serves && self.has(index, member, &serving.placement)
        };
        if self.target.is_none() && self.present().any(back) {
            self.serve_again();
        }
        false
    }

    /// Gives the target up for what serves, under a new number: who was told of it drops what it
    /// has loaded of it.
    fn abandon(&mut self) {
        if self.target.take().is_some() {
            self.serve_again();
        }
    }

    /// Has what serves served by who is there now and holds its share of it.
    fn serve_again(&mut self) {
        let Some(serving) = &self.serving else { return };
        self.epoch += 1;
        let placement = serving.placement.clone();
        self.target = Some(Epoch { number: self.epoch, nodes: self.nodes(), placement });
        self.serve();
    }

    /// Whether all holders of the target are there, were told of it, and may still load it.
    fn target_lives(&self) -> bool {
        let Some(target) = &self.target else { return false };
        let lives = |index: u16| {
            let slot = self.slots.get(usize::from(index));
            let member = slot.and_then(|slot| slot.member.as_ref());
            member.is_some_and(|m| m.told == target.number && m.unfit.is_none())
        };
        (0..target.nodes.len() as u16).all(|i| lives(i) || !target.placement.names(i))
    }

    /// Makes a target of what there is. Returns whether it serves already, so that the next one
    /// can be made.
    fn replan(&mut self, now: Instant) -> bool {
        let waited = self.repair_at.take_if(|at| *at <= now).is_some();
        if !self.formed {
            if !self.form(waited) {
                // Who held something comes back one after the other.
                let enough = self.lobby.len() >= self.options.workers;
                let until = self.repair_at.unwrap_or(now + RETURN_DELAY);
                self.repair_at = Some(until).filter(|_| enough);
                return false;
            }
            if self.serving.is_some() {
                self.repair_at = Some(now + RETURN_DELAY);
                return true;
            }
        }
        self.repair_at = None;
        let old = self.serving.as_ref().map(|epoch| &epoch.placement).or(self.base.as_ref());
        match self.planned(old) {
            Ok(placement) => {
                self.refused = None;
                self.aim(placement)
            }
            Err(refused) => {
                self.abandon();
                self.refused = Some(refused);
                self.make_room()
            }
        }
    }

    /// Makes a placement the target, unless it is, or serves. Returns whether it serves now.
    fn aim(&mut self, placement: Placement) -> bool {
        let nodes = self.nodes();
        let same = |epoch: &Epoch| {
            let listed = |(index, _): (u16, &Member)| {
                epoch.nodes.get(usize::from(index)) == nodes.get(usize::from(index))
            };
            epoch.placement == placement && self.able().all(listed)
        };
        if self.serving.as_ref().is_some_and(same) && self.able().all(|(_, m)| m.serves) {
            self.abandon();
            return false;
        }
        if let Some(target) = self.target.as_ref().filter(|target| same(target))
            && self.able().all(|(_, member)| member.told == target.number)
        {
            return false;
        }
        self.epoch += 1;
        let target = Epoch { number: self.epoch, nodes, placement };
        if self.able().all(|(index, member)| self.has(index, member, &target.placement)) {
            self.target = Some(target);
            self.serve();
            return true;
        }
        for (index, slot) in (0u16..).zip(&mut self.slots) {
            let Some(member) = slot.member.as_mut().filter(|m| m.able) else { continue };
            member.told = target.number;
            // It drops what it brought and is not to hold.
            member.held = None;
            let (name, assignment) = (member.info.name.clone(), target.plan(index));
            self.commands.push_back(Command::Load { name, assignment });
        }
        self.target = Some(target);
        false
    }

    /// Whether a member is known to hold all that a placement gives it.
    fn has(&self, index: u16, member: &Member, placement: &Placement) -> bool {
        let serving = self.serving.as_ref().filter(|_| member.serves).map(|epoch| &epoch.placement);
        serving.is_some_and(|serving| serving.covers(index, placement, index))
            || member.held.as_ref().is_some_and(|held| held.covers(placement, index))
            || !placement.names(index)
    }

    /// The target serves if all its holders have loaded it. Returns whether it does.
    fn serve_if_loaded(&mut self) -> bool {
        let Some(target) = &self.target else { return false };
        let loaded = |index: u16| {
            let slot = self.slots.get(usize::from(index));
            slot.and_then(|slot| slot.member.as_ref()).is_some_and(|m| m.loaded == target.number)
        };
        let ready = (0..target.nodes.len() as u16)
            .all(|index| loaded(index) || !target.placement.names(index));
        if ready {
            self.serve();
        }
        ready
    }

    /// Makes the target serve, for those who have their share of it: also for those who came since
    /// it was made, who have none, so that they drop what they served before.
    fn serve(&mut self) {
        let Some(mut target) = self.target.take() else { return };
        target.nodes = self.nodes();
        let has = |(index, slot): (u16, &Slot)| {
            slot.member.as_ref().is_some_and(|member| {
                member.loaded == target.number || self.has(index, member, &target.placement)
            })
        };
        let has: Vec<bool> = (0u16..).zip(&self.slots).map(has).collect();
        if target.number < self.epoch {
            // Who came since knows of greater numbers.
            self.epoch += 1;
            target.number = self.epoch;
        }
        for ((index, slot), has) in (0u16..).zip(&mut self.slots).zip(has) {
            let Some(member) = &mut slot.member else { continue };
            member.serves = has && member.able;
            if member.serves {
                member.held = None;
                let (name, assignment) = (member.info.name.clone(), target.plan(index));
                self.commands.push_back(Command::Serve { name, assignment });
            }
        }
        self.base = None;
        self.serving = Some(target);
    }
}

impl Epoch {
    fn plan(&self, index: u16) -> Plan {
        let (nodes, placement) = (self.nodes.clone(), self.placement.clone());
        Plan { epoch: self.number, index, nodes, placement }
    }
}

fn address(member: &Member) -> NodeAddress {
    NodeAddress { name: member.info.name.clone(), address: member.info.address.clone() }
}

#[cfg(test)]
mod campaign;
#[cfg(test)]
mod tests;
