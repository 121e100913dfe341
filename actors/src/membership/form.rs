//! How members come in: who gets which slot, and when they make a cluster.
//!
//! A cluster is formed when as many members are there as were asked for. After a restart of the
//! coordinator it is formed as soon as what they still hold covers every expert: then it serves at
//! once, and nothing is loaded again. What they hold names others who hold the rest: these are
//! waited for, but not for long.

use lite_llm_transport::messages::{NodeAddress, NodeInfo};

use super::{Command, Epoch, Holding, Lost, Member, Membership, SLOTS_MAX, Slot, address};
use crate::{placement::Placement, words};

/// Epochs beyond this are not believed: no coordinator ever counted so far.
const EPOCH_MAX: u64 = 1 << 62;

/// Whether two introductions under one name came from one process.
fn same_process(one: &NodeInfo, other: &NodeInfo) -> bool {
    (one.pid, &one.address) == (other.pid, &other.address)
}

/// What a member brought, checked.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) epoch: u64,
    nodes: Vec<String>,
    you: u16,
    placement: Placement,
}

impl Held {
    /// Whether all that a placement gives to a slot is among it.
    pub(super) fn covers(&self, placement: &Placement, index: u16) -> bool {
        self.placement.covers(self.you, placement, index)
    }
}

impl Membership {
    /// Takes a member in. Returns whether to plan anew.
    pub(super) fn join(
        &mut self,
        info: NodeInfo,
        incarnation: u64,
        holding: Option<Holding>,
    ) -> bool {
        if !self.replace(&info, incarnation) {
            return false;
        }
        let draining =
            self.drains.get(&info.name).is_some_and(|drained| same_process(drained, &info));
        if !draining {
            // One that was started anew is as welcome as any.
            self.drains.remove(&info.name);
        }
        let held = holding.and_then(|holding| self.held(&info.name, holding));
        self.epoch = self.epoch.max(held.as_ref().map_or(0, |held| held.epoch));
        let member = Member {
            info,
            told_room: false,
            incarnation,
            held,
            serves: false,
            computes: false,
            told: 0,
            loaded: 0,
            suspect: false,
            draining,
            cut_off: false,
            unfit: None,
            able: true,
        };
        if !self.formed {
            self.lobby.push(member);
            return true;
        }
        // A target that ends an outage is not given up for a newcomer: that gets its share next.
        let waits = self.target_lives() && !self.is_complete();
        let Some(index) = self.seat(member) else { return false };
        self.resume(index);
        !waits || self.is_complete()
    }

    /// Makes way for a new life of a member. Returns whether it is one.
    fn replace(&mut self, info: &NodeInfo, incarnation: u64) -> bool {
        let waiting = self.lobby.iter().position(|member| member.info.name == info.name);
        let index = self.slot(&info.name);
        let seated = index.and_then(|index| self.slots[usize::from(index)].member.as_ref());
        let before = seated.or(waiting.map(|at| &self.lobby[at]));
        let Some(before) = before else { return true };
        if before.incarnation == incarnation {
            return false;
        }
        // A process that only lost its connection is not to hear that it is not wanted.
        if !same_process(&before.info, info) {
            let (name, reason) = (info.name.clone(), words::replaced(&info.name));
            let incarnation = before.incarnation;
            self.commands.push_back(Command::Dismiss { name, incarnation, reason });
        }
        match (index, waiting) {
            (Some(index), _) => self.vacate(index, None),
            (None, Some(at)) => drop(self.lobby.remove(at)),
            (None, None) => {}
        }
        true
    }

    /// Checks what a member says it holds. What makes no sense is nothing.
    fn held(&self, name: &str, holding: Holding) -> Option<Held> {
        let Holding { epoch, nodes, you, rules } = holding;
        let placement = Placement::new(&self.options.config, rules).ok()?;
        let sane = epoch <= EPOCH_MAX
            && nodes.len() <= SLOTS_MAX
            && nodes.get(usize::from(you)).is_some_and(|own| own == name)
            && placement.nodes() <= nodes.len();
        sane.then_some(Held { epoch, nodes, you, placement })
    }

    /// Gives a member a slot: its own; else that of a lost member, whose share it takes over; else
    /// another.
    fn seat(&mut self, member: Member) -> Option<u16> {
        let name = &member.info.name;
        let vacant = |slot: &Slot| slot.member.is_none();
        let own = |slot: &Slot| slot.last.as_ref().is_some_and(|last| last.name == *name);
        let before = self.serving.as_ref().map(|epoch| &epoch.placement).or(self.base.as_ref());
        let lost = |index: usize| before.is_some_and(|before| before.names(index as u16));
        let slots = || self.slots.iter().enumerate().filter(|(_, slot)| vacant(slot));
        let index = slots()
            .find(|(_, slot)| own(slot))
            .or_else(|| slots().find(|(index, _)| lost(*index)))
            .or_else(|| slots().next())
            .map_or(self.slots.len(), |(index, _)| index);
        if index >= SLOTS_MAX {
            let (name, incarnation) = (member.info.name, member.incarnation);
            let reason = words::full(SLOTS_MAX);
            self.commands.push_back(Command::Dismiss { name, incarnation, reason });
            return None;
        }
        if index == self.slots.len() {
            self.slots.push(Slot::default());
        }
        self.slots[index] = Slot { member: Some(member), last: None };
        Some(index as u16)
    }

    /// A member that came back with all that it is to serve goes on at once.
    fn resume(&mut self, index: u16) {
        let Some(serving) = &self.serving else { return };
        let Some(member) = &mut self.slots[usize::from(index)].member else { return };
        let listed = serving.nodes.get(usize::from(index)) == Some(&address(member));
        let has = member.held.as_ref().is_some_and(|held| {
            held.epoch <= serving.number && held.covers(&serving.placement, index)
        });
        if listed && has {
            member.serves = true;
            member.held = None;
            let (name, assignment) = (member.info.name.clone(), serving.plan(index));
            self.commands.push_back(Command::Serve { name, assignment });
        }
    }

    /// Makes a cluster of who is in the lobby, if that is possible, and if nobody is to be waited
    /// for or that was done. Returns whether it is.
    pub(super) fn form(&mut self, waited: bool) -> bool {
        let mut known: Vec<Held> = self.lobby.iter().filter_map(|m| m.held.clone()).collect();
        known.sort_by_key(|held| std::cmp::Reverse(held.epoch));
        let holds = |held: &Held, index: u16| {
            let named = |m: &&Member| Some(&m.info.name) == held.nodes.get(usize::from(index));
            let holder = self.lobby.iter().find(named).and_then(|member| member.held.as_ref());
            holder.is_some_and(|own| own.covers(&held.placement, index))
        };
        let whole = known.iter().position(|held| !held.placement.missing(|i| holds(held, i)));
        let here = |name: &String| self.lobby.iter().any(|member| member.info.name == *name);
        let away = |held: &Held| {
            let names = (0..).zip(&held.nodes);
            names.into_iter().any(|(i, name)| held.placement.names(i) && !here(name))
        };
        let awaits = !waited && known.first().is_some_and(away);
        if whole.is_none() && (self.lobby.len() < self.options.workers || awaits) {
            return false;
        }
        self.formed = true;
        let before = (!known.is_empty()).then(|| known.swap_remove(whole.unwrap_or(0)));
        if let Some(before) = &before {
            let slot = |name: &String| {
                let last = Lost { name: name.clone(), how: None };
                Slot { member: None, last: Some(last).filter(|last| !last.name.is_empty()) }
            };
            self.slots = before.nodes.iter().map(slot).collect();
            self.base = Some(before.placement.clone());
        }
        // Who was there before has its slot before others take what is left.
        let (back, new): (Vec<Member>, Vec<Member>) =
            std::mem::take(&mut self.lobby).into_iter().partition(|member| {
                before.as_ref().is_some_and(|held| held.nodes.contains(&member.info.name))
            });
        for member in back.into_iter().chain(new) {
            self.seat(member);
        }
        if let Some(before) = before.filter(|_| whole.is_some()) {
            self.epoch += 1;
            let (nodes, placement) = (self.nodes(), before.placement);
            self.target = Some(Epoch { number: self.epoch, nodes, placement });
            self.serve();
        }
        true
    }

    /// All slots, as assignments list them.
    pub(super) fn nodes(&self) -> Vec<NodeAddress> {
        let vacant = NodeAddress { name: String::new(), address: String::new() };
        let listed = |slot: &Slot| slot.member.as_ref().map_or(vacant.clone(), address);
        self.slots.iter().map(listed).collect()
    }
}
