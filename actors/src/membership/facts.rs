//! What can be asked of the membership. Sentences are made of it in [`crate::words`].

use lite_llm_transport::messages::NodeInfo;

use super::{Command, Epoch, Member, Membership, State};
use crate::{placement::Placement, words};

/// A member that is gone and may come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Its name.
    pub name: String,
    /// How it was noticed; nothing, if it was here before the coordinator was.
    pub how: Option<String>,
}

/// What keeps the cluster from being whole, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Missing {
    /// Members that are still to join before there is a cluster, or before it is whole again.
    pub to_join: usize,
    /// How many it is to have.
    pub workers: usize,
    /// Names of those that load.
    pub loading: Vec<String>,
    /// Names of those that were told to compute and have not said yet that they do.
    pub beginning: Vec<String>,
    /// Experts that nobody holds.
    pub experts: u64,
    /// Who is gone, of those that held something.
    pub lost: Vec<Lost>,
    /// Who could not load, and why.
    pub unfit: Vec<(String, String)>,
    /// Who has no link to whom.
    pub cut: Vec<(String, String)>,
    /// Who shows no sign of progress.
    pub suspect: Vec<String>,
    /// Who is to go, once others hold its share.
    pub draining: Vec<String>,
    /// What does not fit, if that is so.
    pub room: Option<String>,
    /// Fewest living holders of an expert and how many there are to be, if these are fewer.
    pub copies: Option<(u16, u16)>,
}

impl Membership {
    /// What it is doing.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Number of the epoch that serves; before that, of the last that was given out.
    pub fn epoch(&self) -> u64 {
        self.serving.as_ref().map_or(self.epoch, |epoch| epoch.number)
    }

    /// The placement that serves.
    pub fn serving(&self) -> Option<&Placement> {
        self.serving.as_ref().map(|epoch| &epoch.placement)
    }

    /// The members, in order of their slots, those without one last.
    pub fn members(&self) -> impl Iterator<Item = &NodeInfo> {
        self.present().map(|(_, member)| member).chain(&self.lobby).map(|member| &member.info)
    }

    /// A member's slot.
    pub fn slot(&self, name: &str) -> Option<u16> {
        self.present().find(|(_, member)| member.info.name == name).map(|(index, _)| index)
    }

    /// Members that may be given jobs.
    pub fn homes(&self) -> impl Iterator<Item = &str> {
        self.homes.iter().map(String::as_str)
    }

    /// What keeps the cluster from being whole.
    pub fn missing(&self) -> Missing {
        let workers = self.options.workers;
        let names = |of: &dyn Fn(&Member) -> bool| {
            let named = self.present().filter(|(_, member)| of(member));
            named.map(|(_, member)| member.info.name.clone()).collect::<Vec<_>>()
        };
        let target = self.target.as_ref();
        let loads = |member: &Member| target.is_some_and(|t| member.loaded != t.number);
        let in_target = |index: u16| target.is_some_and(|t| t.placement.names(index));
        let loading = self.present().filter(|(index, m)| in_target(*index) && loads(m));
        let held = |index: usize| {
            let epochs = [self.serving.as_ref(), target];
            epochs.into_iter().flatten().any(|epoch| epoch.placement.names(index as u16))
        };
        let vacant = self.slots.iter().enumerate().filter(|(_, slot)| slot.member.is_none());
        let lost = vacant.filter(|(index, _)| held(*index)).filter_map(|(_, s)| s.last.clone());
        let unfit = self.present().filter_map(|(_, member)| {
            let (reason, _) = member.unfit.as_ref()?;
            Some((member.info.name.clone(), reason.clone()))
        });
        let serving = self.serving.as_ref().map(|epoch| &epoch.placement);
        let living = serving.map(|serving| serving.copies(|index| self.serves(index)));
        let few = living.filter(|living| *living < usize::from(self.options.copies));
        let whole = self.formed && self.is_complete();
        Missing {
            to_join: if whole { 0 } else { workers.saturating_sub(self.members().count()) },
            workers,
            loading: loading.map(|(_, member)| member.info.name.clone()).collect(),
            beginning: names(&|member| member.serves && !member.computes),
            experts: serving.map_or(0, |s| s.without_holder(|index| self.serves(index))),
            lost: lost.collect(),
            unfit: unfit.collect(),
            cut: self.cuts.down().cloned().collect(),
            suspect: names(&|member| member.suspect),
            draining: names(&|member| member.draining),
            room: self.refused.as_ref().map(ToString::to_string),
            copies: few.map(|living| (living as u16, self.options.copies)),
        }
    }

    /// Members with slots.
    pub(super) fn present(&self) -> impl Iterator<Item = (u16, &Member)> {
        let slots = (0u16..).zip(&self.slots);
        slots.filter_map(|(index, slot)| Some((index, slot.member.as_ref()?)))
    }

    /// Those of them who can be told something.
    pub(super) fn able(&self) -> impl Iterator<Item = (u16, &Member)> {
        self.present().filter(|(_, member)| member.able)
    }

    /// Whether somebody is there in this slot who serves the epoch.
    pub(super) fn serves(&self, index: u16) -> bool {
        let slot = self.slots.get(usize::from(index));
        slot.and_then(|slot| slot.member.as_ref()).is_some_and(|member| member.serves)
    }

    /// Whether somebody is there in this slot who computes by the epoch.
    fn computes(&self, index: u16) -> bool {
        let slot = self.slots.get(usize::from(index));
        let member = slot.and_then(|slot| slot.member.as_ref());
        member.is_some_and(|member| member.serves && member.computes)
    }

    /// Whether those who serve have not all begun to compute, so that some expert is not computed.
    fn begins(&self) -> bool {
        let Some(serving) = self.serving.as_ref().filter(|_| self.is_complete()) else {
            return false;
        };
        let some = |of: &dyn Fn(u16) -> bool| (0..self.slots.len() as u16).any(of);
        // A model without experts is computed by whoever is there.
        let nobody = some(&|index| self.serves(index)) && !some(&|index| self.computes(index));
        nobody || serving.placement.missing(|index| self.computes(index))
    }

    /// Whether every expert has a living holder.
    pub(super) fn is_complete(&self) -> bool {
        let whole = |epoch: &Epoch| !epoch.placement.missing(|index| self.serves(index));
        self.serving.as_ref().is_some_and(whole)
    }

    /// Says so if state or homes are others than before.
    pub(super) fn assess(&mut self) {
        let homes = self.find_homes();
        let state = self.find_state(&homes);
        if (&state, &homes) != (&self.state, &self.homes) {
            (self.state, self.homes) = (state, homes);
            self.commands.push_back(Command::Changed);
        }
    }

    fn find_homes(&self) -> Vec<String> {
        let serves = self.is_complete() && !self.begins();
        let Some(serving) = self.serving.as_ref().filter(|_| serves) else {
            return Vec::new();
        };
        let reaches_all = |index: u16, member: &Member| {
            !self.cuts.concern(&member.info.name)
                || !serving.placement.missing(|holder| {
                    let slot = &self.slots[usize::from(holder)].member;
                    let cut =
                        |other: &Member| self.cuts.is_down(&member.info.name, &other.info.name);
                    self.serves(holder) && (holder == index || !slot.as_ref().is_some_and(cut))
                })
        };
        let fit = |(index, member): &(u16, &Member)| {
            let Member { serves, computes, suspect, draining, unfit, .. } = member;
            let sound = *serves && *computes && !suspect && unfit.is_none();
            sound && !draining && reaches_all(*index, member)
        };
        self.present().filter(fit).map(|(_, member)| member.info.name.clone()).collect()
    }

    fn find_state(&self, homes: &[String]) -> State {
        if let Some(serving) = self.serving.as_ref().filter(|_| self.is_complete()) {
            if self.begins() {
                return State::Loading;
            }
            let copies = serving.placement.copies(|index| self.computes(index));
            // A holder that shows no progress counts, but what only it holds is in doubt.
            let sound = |index: u16| {
                let member = self.slots.get(usize::from(index)).and_then(|s| s.member.as_ref());
                member.is_some_and(|member| member.serves && !member.suspect)
            };
            let whole = copies >= usize::from(self.options.copies)
                && !homes.is_empty()
                && !serving.placement.missing(sound);
            return if whole { State::Ready } else { State::Degraded { complete: true } };
        }
        let members = self.members().count();
        if self.target.is_some() {
            return State::Loading;
        }
        if members == 0 || members < self.options.workers && self.serving.is_none() {
            return State::Waiting;
        }
        match &self.refused {
            Some(refused) if members >= self.options.workers => {
                let mut unfit = self.present().filter_map(|(_, m)| Some((m, m.unfit.as_ref()?)));
                State::Failed(unfit.next().map_or_else(
                    || refused.to_string(),
                    |(member, (reason, _))| words::could_not_load(&member.info.name, reason),
                ))
            }
            _ => State::Degraded { complete: false },
        }
    }
}
