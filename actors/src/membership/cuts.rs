//! Links between members that are down, by the accounts of either end.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::LINK_REPAIR;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// By the names of both ends, the lesser first.
    pairs: BTreeMap<(String, String), Cut>,
    /// What is due until then was done.
    settled: Option<Instant>,
}

#[derive(Debug)]
struct Cut {
    /// Who says that it is down. Nobody: it is up again.
    by: BTreeSet<String>,
    since: Instant,
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.min(b).to_owned(), a.max(b).to_owned())
}

impl Cuts {
    pub(super) fn report(&mut self, now: Instant, name: &str, by: &str, up: bool) {
        let pair = pair(name, by);
        if up {
            if let Some(cut) = self.pairs.get_mut(&pair)
                && cut.by.remove(by)
                && cut.by.is_empty()
            {
                cut.since = now;
            }
            return;
        }
        let cut = self.pairs.entry(pair).or_insert(Cut { by: BTreeSet::new(), since: now });
        if cut.by.is_empty() {
            cut.since = now;
        }
        cut.by.insert(by.to_owned());
    }

    /// A member is gone, and its links with it.
    pub(super) fn forget(&mut self, name: &str) {
        self.pairs.retain(|(a, b), _| a != name && b != name);
    }

    /// Forgets links that have been up for long enough.
    pub(super) fn settle(&mut self, now: Instant) {
        self.settled = Some(now);
        self.pairs.retain(|_, cut| !cut.by.is_empty() || now < cut.since + LINK_REPAIR);
    }

    pub(super) fn is_down(&self, a: &str, b: &str) -> bool {
        !self.pairs.is_empty() && self.pairs.get(&pair(a, b)).is_some_and(|cut| !cut.by.is_empty())
    }

    pub(super) fn is_down_since(&self, a: &str, b: &str, now: Instant, time: Duration) -> bool {
        !self.pairs.is_empty()
            && self
                .pairs
                .get(&pair(a, b))
                .is_some_and(|cut| !cut.by.is_empty() && cut.since + time <= now)
    }

    /// Whether some link of a member is down, or was a moment ago.
    pub(super) fn concern(&self, name: &str) -> bool {
        self.pairs.keys().any(|(a, b)| a == name || b == name)
    }

    /// Pairs without a link.
    pub(super) fn down(&self) -> impl Iterator<Item = &(String, String)> {
        self.pairs.iter().filter(|(_, cut)| !cut.by.is_empty()).map(|(pair, _)| pair)
    }

    /// When something changes by the passing of time. A cut that is older has had its effect.
    pub(super) fn timeout(&self) -> Option<Instant> {
        let due = self.pairs.values().map(|cut| cut.since + LINK_REPAIR);
        due.filter(|at| Some(*at) > self.settled).min()
    }
}
