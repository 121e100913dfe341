//! Plans: what members have room for, and what is given up where they have none.
//!
//! Invariant: members are given more than their memory holds only where all of them together do not
//! hold what is served.

use super::{Epoch, Member, Membership, MembershipOptions, Slot};
use crate::placement::{DoesNotFit, Placement, plan};

/// Experts that a member's memory must hold at least for it to be given more than it holds.
const OVERCOMMIT_EXPERTS_MIN: u64 = 4;

impl Membership {
    /// A member has less room than it said. Returns whether to plan anew. One that says so again and
    /// again is not believed: it would have experts move without end.
    pub(super) fn has_room_for(&mut self, name: &str, budget: u64) -> bool {
        let slots = self.slots.iter_mut().filter_map(|slot| slot.member.as_mut());
        let mut members = slots.chain(&mut self.lobby);
        let less = |member: &&mut Member| {
            member.info.name == name && !member.told_room && budget < member.info.budget_bytes
        };
        let Some(member) = members.find(less) else { return false };
        (member.info.budget_bytes, member.told_room) = (budget, true);
        true
    }

    /// A plan without those who are to hold nothing, or, if that does not fit, with them.
    pub(super) fn planned(&self, old: Option<&Placement>) -> Result<Placement, DoesNotFit> {
        let MembershipOptions { config, expert_bytes, copies, policy, .. } = &self.options;
        let with = |cut_off: bool, draining: bool| {
            let budget = |slot: &Slot| {
                let member = slot.member.as_ref().filter(|member| {
                    member.unfit.is_none()
                        && (cut_off || !member.cut_off)
                        && (draining || !member.draining)
                });
                member.map(|member| member.info.budget_bytes)
            };
            let budgets: Vec<Option<u64>> = self.slots.iter().map(budget).collect();
            plan(config, expert_bytes, old, &budgets, *copies, *policy)
        };
        let planned =
            with(false, false).or_else(|_| with(true, false)).or_else(|_| with(true, true));
        match planned {
            Err(refused) if self.options.overcommit && self.thinner(old).is_none() => {
                self.overcommitted(old, &refused)
            }
            planned => planned,
        }
    }

    /// A plan that gives members more than their memory holds, each as much more as the others.
    fn overcommitted(
        &self,
        old: Option<&Placement>,
        refused: &DoesNotFit,
    ) -> Result<Placement, DoesNotFit> {
        let MembershipOptions { config, expert_bytes, copies, policy, .. } = &self.options;
        let largest = expert_bytes.iter().copied().max().unwrap_or(0);
        let with = |draining: bool| {
            let budget = |slot: &Slot| {
                let member = slot.member.as_ref().filter(|member| {
                    member.unfit.is_none() && (draining || !member.draining) && !member.cut_off
                })?;
                // So much that a member holds what it serves and what it is to load together.
                let enough = member.info.budget_bytes >= largest * OVERCOMMIT_EXPERTS_MIN;
                enough.then(|| member.info.budget_bytes.saturating_mul(refused.times()))
            };
            let budgets: Vec<Option<u64>> = self.slots.iter().map(budget).collect();
            plan(config, expert_bytes, old, &budgets, *copies, *policy)
        };
        with(false).or_else(|_| with(true)).map_err(|_| refused.clone())
    }

    /// What serves with fewer copies, if some expert has no holder and copies of others take the
    /// room that it needs.
    fn thinner(&self, old: Option<&Placement>) -> Option<Placement> {
        let here = |index: u16| {
            let slot = self.slots.get(usize::from(index));
            slot.and_then(|slot| slot.member.as_ref())
                .is_some_and(|m| m.unfit.is_none() && (self.serving.is_none() || m.serves))
        };
        let thin = old.filter(|old| old.missing(here)).map(|old| old.thinned(here));
        thin.filter(|thin| Some(thin) != old)
    }

    /// Some expert has no living holder, and the others have no room, for they hold what others
    /// hold, too: gives up copies. Returns whether that made room.
    pub(super) fn make_room(&mut self) -> bool {
        let old = self.serving.as_ref().map(|epoch| &epoch.placement).or(self.base.as_ref());
        let Some(thin) = self.thinner(old) else { return false };
        if self.planned(Some(&thin)).is_err() {
            return false;
        }
        if self.serving.is_none() {
            self.base = Some(thin);
            return true;
        }
        self.epoch += 1;
        self.target = Some(Epoch { number: self.epoch, nodes: self.nodes(), placement: thin });
        self.serve();
        true
    }
}
