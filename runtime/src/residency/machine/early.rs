//! What predictions are worth: which experts are fetched before they are demanded, and when none is.
//!
//! An expert that the early gate names is worth `p + (1 − p) · γ · value`, `p` being how often the
//! gate was right with that place of its list. It is fetched if that is more by a margin than the
//! worth of what must go for it. The margin is half as large while nothing is on its way, and it
//! adapts: what came in vain, and what was missed because it had gone for a prediction, must not
//! outnumber what was used. Where they do all the same, predictions are not followed for a while.

use super::{Command, Early, Entry, Residency, State, Urgency};
use crate::{expert::ExpertKey, residency::policy::DISCOUNT};

/// Predicted experts that may be on their way at a time, as a part of the budget: one eighth.
const PREFETCH_SHARE: u64 = 8;
/// Prefetches that came to be used or not, between two adaptations.
const TRIAL: u32 = 128;
/// Demands that miss until predictions are tried again.
pub(super) const TRIAL_AGAIN: u64 = 2048;
const MARGIN: f32 = 0.3;
const MARGIN_MIN: f32 = 0.2;
const MARGIN_MAX: f32 = 0.6;
/// Experts of a layer that were let go for predictions and are remembered.
const GIVEN_MAX: usize = 64;

/// Whether prefetches are worth their costs, by counting.
#[derive(Debug)]
pub(super) struct Trial {
    pub(super) margin: f32,
    pub(super) used: u32,
    pub(super) vain: u32,
    pub(super) regrets: u32,
    /// Not followed until so many misses.
    off_until: Option<u64>,
}

impl Default for Trial {
    fn default() -> Self {
        Self { margin: MARGIN, used: 0, vain: 0, regrets: 0, off_until: None }
    }
}

impl Trial {
    pub(super) fn is_off(&self, misses: u64) -> bool {
        self.off_until.is_some_and(|until| misses < until)
    }
}

impl Residency {
    /// The early gate names these for a layer, the likeliest first.
    pub(super) fn predict(&mut self, keys: &[ExpertKey]) {
        let Some(&first) = keys.first() else { return };
        let Some(&number) = self.numbers.get(&first.layer) else { return };
        let mut named: Vec<(ExpertKey, u32)> = Vec::with_capacity(keys.len());
        for &key in keys.iter().filter(|key| key.layer == first.layer) {
            if let Some(flat) = self.flat(key).filter(|flat| named.iter().all(|n| n.1 != *flat)) {
                named.push((key, flat));
            }
        }
        let flats: Vec<u32> = named.iter().map(|(_, flat)| *flat).collect();
        self.layers[number].named.clone_from(&flats);
        if !self.follows_predictions() {
            return;
        }
        if self.trial.off_until.is_some() {
            self.trial = Trial::default();
        }
        let mut wanted: Vec<(f32, ExpertKey, u32)> = named
            .into_iter()
            .filter(|(key, _)| !self.entries.contains_key(key) && self.serves(*key))
            .map(|(key, flat)| (self.worth(number, key, flat, &flats), key, flat))
            .collect();
        wanted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (worth, key, flat) in wanted {
            let bytes = self.bytes(key);
            let most = worth - self.margin();
            let full = (self.predicted + bytes) * PREFETCH_SHARE > self.options.budget;
            if full || most <= 0.0 || !self.waiting.is_empty() {
                break;
            }
            if !self.make_early_room(key, most, &flats) {
                break;
            }
            self.entries.insert(key, Entry { early: Early::Awaited, ..Entry::waiting(flat) });
            self.layers[number].awaited.push(key);
            self.predicted += bytes;
            self.counters.prefetches += 1;
            self.fetch(key, Urgency::Prefetch);
        }
    }

    fn margin(&self) -> f32 {
        match self.fetching {
            0 => self.trial.margin / 2.0,
            _ => self.trial.margin,
        }
    }

    /// What an expert of a layer is worth whose gate has named some.
    fn worth(&self, number: usize, key: ExpertKey, flat: u32, named: &[u32]) -> f32 {
        let gate = &self.layers[number].gate;
        let chance = match named.iter().position(|&other| other == flat) {
            Some(index) => gate.chance(index, named.len()),
            None => gate.chance_of_others(),
        };
        chance + (1.0 - chance) * DISCOUNT * self.plain_value(number, key, flat)
    }

    /// Evicts what is worth less than so much until a predicted expert has room.
    fn make_early_room(&mut self, key: ExpertKey, most: f32, named: &[u32]) -> bool {
        let (needed, number) = (self.bytes(key), self.number(key));
        while self.held + needed > self.options.budget {
            let worth = |at: usize, key, entry: &Entry| match at == number {
                true => self.worth(at, key, entry.flat, named),
                false => self.value(at, key, entry),
            };
            let decided = |entry: &Entry| entry.early != Early::Awaited;
            let victim = self
                .fullest(number, needed)
                .find_map(|at| self.weakest(at, decided, |key, entry| worth(at, key, entry)));
            match victim {
                Some((least, victim)) if least < most => {
                    let given = &mut self.layers[self.numbers[&victim.layer]].given;
                    if given.len() < GIVEN_MAX {
                        given.push(victim);
                    }
                    self.evict(victim);
                }
                _ => return false,
            }
        }
        true
    }

    /// A layer's gate has spoken.
    pub(super) fn judge_gate(&mut self, number: usize, used: &[u32]) {
        let experts = self.options.moe.experts();
        let layer = &mut self.layers[number];
        let named = std::mem::take(&mut layer.named);
        if !named.is_empty() {
            layer.gate.judge(&named, used, experts);
        }
    }

    /// A layer's demand shows which predictions were right; the wrong ones are not fetched any more.
    pub(super) fn judge_predictions(&mut self, layer: u16, wanted: &[(ExpertKey, u32)]) {
        let Some(&number) = self.numbers.get(&layer) else { return };
        let wants = |key: &ExpertKey| wanted.iter().any(|(other, _)| other == key);
        for key in std::mem::take(&mut self.layers[number].given) {
            if wants(&key) && !self.entries.contains_key(&key) {
                self.trial.regrets += 1;
                self.counters.prefetch_regrets += 1;
            }
        }
        for key in std::mem::take(&mut self.layers[number].awaited) {
            let entry = self.entries.get_mut(&key).filter(|entry| entry.early == Early::Awaited);
            let Some(entry) = entry.filter(|_| !wants(&key)) else { continue };
            entry.early = Early::Missed;
            if let State::Fetching { cancelling: cancelling @ false, .. } = &mut entry.state {
                *cancelling = true;
                self.commands.push_back(Command::Cancel(key));
            }
        }
    }

    /// Adapts the margin; stops following predictions that cost more than they bring.
    pub(super) fn judge(&mut self) {
        let Trial { margin, used, vain, regrets, off_until } = &mut self.trial;
        if *used + *vain < TRIAL {
            return;
        }
        let cost = *vain + *regrets;
        if cost > *used {
            *margin += 0.05;
        } else if cost < *used / 2 {
            *margin = (*margin - 0.05).max(MARGIN_MIN);
        }
        if *margin > MARGIN_MAX || cost > 3 * *used {
            *off_until = Some(self.counters.misses + TRIAL_AGAIN);
        }
        (*used, *vain, *regrets) = (0, 0, 0);
    }
}
