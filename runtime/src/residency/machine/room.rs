//! Who goes when room is needed.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{Early, Entry, Residency, State};
use crate::{expert::ExpertKey, tier::Residence};

/// Part of the budget that experts which only pass through may take from others: one eighth.
const PASSING_SHARE: u64 = 8;
/// The same where no layer can hold the experts of one token, half at most: there is little to keep, and
/// with fewer on their way the disk idles while they are verified and computed with.
const PASSING_SHARE_MAX: u64 = 2;
/// Part of the budget that a layer may have above its share while it is computed: one eighth.
pub(super) const ALLOWANCE_SHARE: u64 = 8;

/// Experts of a layer that are looked for at a time, the least valuable.
const AT_A_TIME: usize = 16;

/// By layer, its least valuable experts that may go, the least valuable last. Good as long as nothing
/// happens but that experts go and are fetched.
#[derive(Debug, Default)]
pub(super) struct Weakest(BTreeMap<usize, Vec<(f32, ExpertKey)>>);

/// A tier would rather be here, or somewhere slower: what that is worth beside an estimate of
/// [`DISCOUNT`](super::policy::DISCOUNT)^(tokens until its next use).
pub(super) fn wish(placement: Residence) -> f32 {
    match placement {
        Residence::Hbm | Residence::Dram => 0.05,
        Residence::Nvme => -0.05,
        Residence::Archive => -0.1,
    }
}

impl Residency {
    pub(super) fn value(&self, number: usize, key: ExpertKey, entry: &Entry) -> f32 {
        match entry.early {
            // It has just been let in.
            Early::Awaited => 1.0,
            _ => self.plain_value(number, key, entry.flat),
        }
    }

    pub(super) fn plain_value(&self, number: usize, key: ExpertKey, flat: u32) -> f32 {
        self.options.policy.value(number, flat) + self.wishes[usize::from(key.tier)]
    }

    /// The least valuable of a layer's experts that may go and pass a test; the first among equals.
    pub(super) fn weakest(
        &self,
        number: usize,
        test: impl Fn(&Entry) -> bool,
        value: impl Fn(ExpertKey, &Entry) -> f32,
    ) -> Option<(f32, ExpertKey)> {
        let mut weakest = None;
        for (key, entry) in self.of_layer(self.layers[number].number) {
            if entry.may_go() && test(entry) {
                let value = value(key, entry);
                if weakest.is_none_or(|(least, _)| value < least) {
                    weakest = Some((value, key));
                }
            }
        }
        weakest
    }

    /// One that was to pass does not go as soon as it can any more.
    pub(super) fn stays(&mut self, key: ExpertKey) {
        let (bytes, number) = (self.bytes(key), self.number(key));
        if let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.passing) {
            entry.passing = false;
            if entry.state != State::Waiting {
                self.passing -= bytes;
                self.layers[number].passing -= bytes;
            }
        }
    }

    /// Evicts until a demanded expert has room.
    pub(super) fn make_room(&mut self, key: ExpertKey, weakest: &mut Weakest) -> bool {
        let (needed, number) = (self.bytes(key), self.number(key));
        let passing = self.entries.get(&key).is_some_and(|entry| entry.passing);
        loop {
            let allowed = !passing || self.passing == 0 || self.may_pass(needed);
            if allowed && self.held + needed <= self.options.budget {
                return true;
            }
            // Those that only passed go first.
            let victim = match self.passed() {
                Some(passed) => Some(self.in_its_stead(passed)),
                None if allowed => {
                    self.fullest(number, needed).find_map(|at| self.next_weakest(at, weakest))
                }
                None => None,
            };
            match victim {
                Some(victim) => self.evict(victim),
                None => return false,
            }
        }
    }

    /// The least valuable of a layer's experts that may go, the first among equals.
    fn next_weakest(&self, number: usize, weakest: &mut Weakest) -> Option<ExpertKey> {
        let list = weakest.0.entry(number).or_default();
        loop {
            while let Some((_, key)) = list.pop() {
                if self.entries.get(&key).is_some_and(Entry::may_go) {
                    return Some(key);
                }
            }
            let all = self.of_layer(self.layers[number].number);
            let all = all.filter(|(_, entry)| entry.may_go());
            list.extend(all.map(|(key, entry)| (self.value(number, key, entry), key)));
            let order = |a: &(f32, ExpertKey), b: &(f32, ExpertKey)| {
                b.0.total_cmp(&a.0).then(b.1.cmp(&a.1))
            };
            if let Some(more) = list.len().checked_sub(AT_A_TIME).filter(|more| *more > 0) {
                list.select_nth_unstable_by(more, order);
                list.drain(..more);
            }
            list.sort_unstable_by(order);
            if list.is_empty() {
                return None;
            }
        }
    }

    /// The least valuable of what passed and may go now, in the lowest layer that has any.
    fn passed(&self) -> Option<(f32, ExpertKey)> {
        let mut layers = (0..self.layers.len()).filter(|&at| self.layers[at].passing > 0);
        layers.find_map(|at| {
            self.weakest(at, |entry| entry.passing, |key, entry| self.value(at, key, entry))
        })
    }

    /// What goes for one that passed: itself, or what is worth less in its layer, whose place it takes.
    fn in_its_stead(&mut self, (value, passed): (f32, ExpertKey)) -> ExpertKey {
        let at = self.number(passed);
        let other = self.weakest(at, |entry| !entry.passing, |k, entry| self.value(at, k, entry));
        match other {
            Some((least, other)) if least < value => {
                self.stays(passed);
                other
            }
            _ => passed,
        }
    }

    /// All layers, that which is the furthest above its share first, if a layer gets so many bytes.
    /// What one token needs there is not counted: the next layer will take it from it, and what was
    /// fetched for this token alone can go then.
    pub(super) fn fullest(&self, gets: usize, bytes: u64) -> impl Iterator<Item = usize> + use<> {
        let held = self.layers.iter().enumerate().map(|(number, layer)| {
            let held = match number == gets {
                true => (layer.held + bytes).saturating_sub(self.allowance),
                false => layer.held,
            };
            (Reverse(held), number)
        });
        let mut layers: Vec<(Reverse<u64>, usize)> = held.collect();
        layers.sort_unstable();
        layers.into_iter().map(|(_, number)| number)
    }

    /// Whether so many bytes more may pass through.
    fn may_pass(&self, needed: u64) -> bool {
        let budget = self.options.budget;
        let most = match self.layer_share() < self.token {
            true => self.token.clamp(budget / PASSING_SHARE, budget / PASSING_SHARE_MAX),
            false => budget / PASSING_SHARE,
        };
        self.passing + needed <= most
    }
}
