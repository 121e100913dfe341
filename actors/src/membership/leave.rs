//! How members leave: lost, or drained and then sent away.
//!
//! Invariant: whoever is drained goes only when nobody needs what it holds; a process that only lost
//! its connection meanwhile is still being drained.

use std::time::Instant;

use super::{Command, Epoch, Lost, Member, Membership, REPAIR_DELAY};
use crate::words;

impl Membership {
    pub(super) fn drain(&mut self, name: &str) -> bool {
        let mut drained = None;
        let members = self.slots.iter_mut().filter_map(|slot| slot.member.as_mut());
        for member in members.chain(&mut self.lobby).filter(|m| m.info.name == name) {
            member.draining = true;
            drained = Some(member.info.clone());
        }
        let known = drained.is_some();
        self.drains.extend(drained.map(|info| (name.to_owned(), info)));
        known
    }

    pub(super) fn leave(
        &mut self,
        now: Instant,
        name: &str,
        incarnation: u64,
        reason: String,
    ) -> bool {
        let gone = |m: &Member| m.info.name == name && m.incarnation == incarnation;
        if let Some(at) = self.lobby.iter().position(gone) {
            self.lobby.remove(at);
            return false;
        }
        let Some((index, _)) = self.present().find(|(_, member)| gone(member)) else {
            return false;
        };
        self.vacate(index, Some(reason));
        let names =
            |epoch: &Option<Epoch>| epoch.as_ref().is_some_and(|e| e.placement.names(index));
        if names(&self.target) || !self.is_complete() {
            return true;
        }
        if names(&self.serving) {
            self.repair_at.get_or_insert(now + REPAIR_DELAY);
        }
        false
    }

    /// Takes a member out of its slot.
    pub(super) fn vacate(&mut self, index: u16, reason: Option<String>) {
        let slot = &mut self.slots[usize::from(index)];
        if let Some(member) = slot.member.take() {
            self.cuts.forget(&member.info.name);
            slot.last = Some(Lost { name: member.info.name, how: reason });
        }
    }

    /// Dismisses who is drained and holds nothing that others need.
    pub(super) fn send_away(&mut self) {
        let mut drained: Vec<Member> = self.lobby.extract_if(.., |m| m.draining).collect();
        let free = |index: u16| {
            let epochs = [&self.serving, &self.target];
            !epochs.into_iter().flatten().any(|epoch| epoch.placement.names(index))
        };
        let gone: Vec<u16> = self
            .present()
            .filter(|(index, member)| member.draining && self.is_complete() && free(*index))
            .map(|(index, _)| index)
            .collect();
        for index in gone {
            let slot = &mut self.slots[usize::from(index)];
            drained.extend(slot.member.take());
            slot.last = None;
        }
        for Member { info, incarnation, .. } in drained {
            self.cuts.forget(&info.name);
            self.drains.remove(&info.name);
            let (reason, name) = (words::drained(&info.name), info.name);
            self.commands.push_back(Command::Dismiss { name, incarnation, reason });
        }
    }
}
