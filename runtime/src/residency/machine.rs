//! Which experts a level of memory holds, what it fetches and what it lets go: a pure machine.
//!
//! Routes, demands, loads and predictions come in; fetches, cancellations and evictions go out. Every
//! residence that is smaller than what it serves has one. The source of a fetch is the business of
//! whoever carries commands out: it keeps its copy until [`Event::Arrived`].
//!
//! Of a layer's pass it hears [`Event::Routed`], which feeds the policy, then [`Event::Demand`], then
//! [`Event::Predicted`] for the next layer, then [`Event::Used`]. Room is made when it is needed: by
//! then what was just used may go too, if it is worth less than what is there. What predictions are
//! worth is in `early.rs`, who goes in `room.rs`.
//!
//! ```text
//! absent ──demand──▶ waiting ──room──▶ fetching ──arrived──▶ here (pinned) ──used──▶ here
//!   ▲                                     ▲                                           │
//!   │◀─────────── cancelled, failed ──────┤◀── predicted, load (only where room is) ──┤
//!   └──────────────────────────────── evict ◀─────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! - The bytes of what is here and of what is being fetched never exceed the budget.
//! - What is pinned (demanded, and not used since it was there) is never evicted.
//! - Nothing is fetched twice at a time; every demand ends with [`Command::Ready`] or
//!   [`Command::Refuse`], if fetches end and what is ready is used.
//! - What a layer cannot hold goes around it: a demand of more than a layer's share of the budget
//!   passes through the slots that others of it have left. One that is worth more than an expert of
//!   its layer which stays takes that one's place; no other layer loses more than the slots.
//! - Equal events give equal commands.

mod early;
mod room;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use self::{
    early::Trial,
    room::{ALLOWANCE_SHARE, Weakest, wish},
};
use super::policy::{Gate, Policy, Row};
use crate::{config::MoeConfig, expert::ExpertKey};

/// Rows of one [`Event::Routed`] that are looked at: the last of each sequence.
pub const ROUTED_ROWS_MAX: usize = 64;

/// What a token is routed to in a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutedRow {
    /// The sequence.
    pub stream: u64,
    /// Ids of this token and the two before it; anything constant where there are none.
    pub last: [u32; 3],
    /// Its experts, best first.
    pub experts: Vec<ExpertKey>,
    /// What was predicted for it, best first; or nothing.
    pub near: Vec<ExpertKey>,
}

/// What happens to a level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A pass routes its rows in a layer. It comes before the demand, and may leave rows out: see
    /// [`ROUTED_ROWS_MAX`].
    Routed {
        /// Layer of the model.
        layer: u16,
        /// In the order of each sequence.
        rows: Vec<RoutedRow>,
    },
    /// A sequence is over.
    Ended(u64),
    /// These experts, with so many rows for each, are to be computed with now. They are pinned
    /// until [`Event::Used`].
    Demand(Vec<(ExpertKey, u32)>),
    /// They were computed with, or are no longer wanted.
    Used(Vec<ExpertKey>),
    /// Whoever demanded anything is no more.
    Abandoned,
    /// These, all of one layer, will probably be demanded next there, the likeliest first: the early
    /// gate's choice.
    Predicted(Vec<ExpertKey>),
    /// It is to be here if there is room that nothing else takes.
    Load(ExpertKey),
    /// A fetch has ended well.
    Arrived(ExpertKey),
    /// A fetch was cancelled before it began.
    Cancelled(ExpertKey),
    /// A fetch has failed.
    Failed(ExpertKey, String),
    /// What was here is gone: its place has lost it.
    Lost(ExpertKey),
    /// These are served from now on, and no others; in the beginning, none.
    Keep(BTreeSet<ExpertKey>),
}

/// What a level wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Bring it here; [`Event::Arrived`], [`Event::Cancelled`] or [`Event::Failed`].
    Fetch(ExpertKey, Urgency),
    /// A fetch that was predicted is demanded now.
    Promote(ExpertKey),
    /// A fetch is not wanted any more; if it has begun, it may go on.
    Cancel(ExpertKey),
    /// Let it go.
    Evict(ExpertKey),
    /// A demanded expert is here, and stays until it was used.
    Ready(ExpertKey),
    /// A demanded expert cannot be had.
    Refuse(ExpertKey, String),
    /// An expert that was to be loaded is here, or has no room.
    Loaded(ExpertKey),
}

/// How soon a fetch is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Somebody waits for it.
    Demand,
    /// Somebody will probably want it.
    Prefetch,
}

/// What a level has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Demands of an expert that was here.
    pub hits: u64,
    /// Demands of one that was not, those for which a fetch was under way included.
    pub misses: u64,
    /// Fetches begun because of a demand.
    pub fetches: u64,
    /// Fetches begun because of a prediction.
    pub prefetches: u64,
    /// Of those, the ones that were demanded, before or after they arrived.
    pub prefetches_used: u64,
    /// Of those, the ones that were let go or cancelled without a demand.
    pub prefetches_in_vain: u64,
    /// Demands that missed what had been let go for a prediction.
    pub prefetch_regrets: u64,
    /// Experts that were let go.
    pub evictions: u64,
    /// Bytes that arrived.
    pub bytes_in: u64,
    /// Of those, the ones of prefetches that were let go without a demand.
    pub bytes_in_vain: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Demanded; there is no room yet.
    Waiting,
    Fetching {
        urgency: Urgency,
        cancelling: bool,
    },
    Here,
}

/// Whether it was fetched because of a prediction, and not demanded since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Early {
    No,
    /// Its layer's next demand will show.
    Awaited,
    /// It was not demanded when it was to be.
    Missed,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    state: State,
    /// Index in the layer's flat list.
    flat: u32,
    /// Somebody waits for it, or computes with it.
    pinned: bool,
    early: Early,
    /// It goes as soon as it can: the layer cannot hold what was demanded together with it.
    passing: bool,
    /// Somebody wants to hear that it is loaded.
    load: bool,
}

impl Entry {
    fn waiting(flat: u32) -> Self {
        let state = State::Waiting;
        Self { state, flat, pinned: false, early: Early::No, passing: false, load: false }
    }

    /// It may be let go.
    fn may_go(&self) -> bool {
        self.state == State::Here && !self.pinned
    }
}

/// A layer with experts.
#[derive(Debug)]
struct Layer {
    number: u16,
    /// Bytes of what is here or on its way, and of those that pass.
    held: u64,
    passing: u64,
    /// What the early gate named, and how right it was so far.
    named: Vec<u32>,
    gate: Gate,
    /// Prefetches that the next demand will show to be right or wrong.
    awaited: Vec<ExpertKey>,
    /// What was let go for predictions since the last demand.
    given: Vec<ExpertKey>,
}

impl Layer {
    fn new(number: u16) -> Self {
        let (named, gate, awaited, given) = (Vec::new(), Gate::default(), Vec::new(), Vec::new());
        Self { number, held: 0, passing: 0, named, gate, awaited, given }
    }
}

/// How a level is to be.
#[derive(Debug)]
pub struct ResidencyOptions {
    /// What there is of experts.
    pub moe: Arc<MoeConfig>,
    /// Bytes that it may hold.
    pub budget: u64,
    /// Bytes of an expert, by tier.
    pub expert_bytes: Vec<u64>,
    /// What experts are worth.
    pub policy: Box<dyn Policy>,
    /// Whether predictions are followed.
    pub prefetch: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Residency {
    options: ResidencyOptions,
    entries: BTreeMap<ExpertKey, Entry>,
    /// What is served.
    keep: BTreeSet<ExpertKey>,
    /// All that is served has room.
    whole: bool,
    /// Layers of what is served: each has an equal share of the budget.
    served_layers: u64,
    /// All layers that ever were served, in the policy's numbers, and those numbers.
    layers: Vec<Layer>,
    numbers: BTreeMap<u16, usize>,
    /// What a layer may have above its share while it is computed: the experts of one token.
    allowance: u64,
    /// Bytes of the experts of one token in a layer.
    token: u64,
    /// What a tier's placement hint adds to the value of its experts.
    wishes: Vec<f32>,
    /// Demands without room, in order.
    waiting: VecDeque<ExpertKey>,
    /// Bytes of what is here or on its way: in all, of those that pass, of predictions on their way.
    held: u64,
    passing: u64,
    predicted: u64,
    /// Fetches on their way.
    fetching: usize,
    trial: Trial,
    counters: Counters,
    commands: VecDeque<Command>,
}

impl Residency {
    /// A level that holds nothing.
    pub fn new(options: ResidencyOptions) -> Self {
        let largest = options.expert_bytes.iter().copied().max().unwrap_or(0);
        let token = largest.saturating_mul(options.moe.routes_max(|_| true) as u64);
        Self {
            allowance: token.min(options.budget / ALLOWANCE_SHARE),
            token,
            wishes: options.moe.tiers.iter().map(|tier| wish(tier.placement)).collect(),
            options,
            entries: BTreeMap::new(),
            keep: BTreeSet::new(),
            whole: true,
            served_layers: 0,
            layers: Vec::new(),
            numbers: BTreeMap::new(),
            waiting: VecDeque::new(),
            held: 0,
            passing: 0,
            predicted: 0,
            fetching: 0,
            trial: Trial::default(),
            counters: Counters::default(),
            commands: VecDeque::new(),
        }
    }

    /// Takes note of an event.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Routed { layer, rows } => return self.routed(layer, &rows),
            Event::Ended(stream) => return self.options.policy.ended(stream),
            Event::Demand(wanted) => self.demand(&wanted),
            Event::Used(keys) => keys.into_iter().for_each(|key| self.used(key)),
            Event::Abandoned => self.pinned().into_iter().for_each(|key| self.used(key)),
            Event::Predicted(keys) => self.predict(&keys),
            Event::Load(key) => self.load(key),
            Event::Arrived(key) => self.arrived(key),
            Event::Cancelled(key) => self.ended(key, None),
            Event::Failed(key, reason) => self.ended(key, Some(reason)),
            Event::Lost(key) => self.lost(key),
            Event::Keep(keys) => self.keep(keys),
        }
        self.serve_waiting();
    }

    /// The next thing to be done.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// Whether it is here.
    pub fn is_here(&self, key: ExpertKey) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.state == State::Here)
    }

    /// Bytes of what is here and of what is on its way.
    pub fn held_bytes(&self) -> u64 {
        self.held
    }

    /// Bytes that it may hold.
    pub fn budget(&self) -> u64 {
        self.options.budget
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether all that is served has room: then nothing that is here is ever let go.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Whether all that is served has room and nobody computes with what is here, as far as was said:
    /// whether, when all of it has come, nothing of it can go before [`Event::Keep`].
    pub fn is_settled(&self) -> bool {
        self.whole && !self.entries.values().any(|entry| entry.pinned)
    }

    /// Whether somebody is told when it comes, or that it cannot.
    pub fn awaits(&self, key: ExpertKey) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.pinned)
    }

    fn pinned(&self) -> Vec<ExpertKey> {
        let pinned = self.entries.iter().filter(|(_, entry)| entry.pinned);
        pinned.map(|(&key, _)| key).collect()
    }

    /// Whether predictions are followed at present.
    pub fn follows_predictions(&self) -> bool {
        self.options.prefetch && !self.trial.is_off(self.counters.misses)
    }

    /// Bytes that an expert takes here.
    pub fn bytes(&self, key: ExpertKey) -> u64 {
        self.options.expert_bytes.get(usize::from(key.tier)).copied().unwrap_or(0)
    }

    fn layer_share(&self) -> u64 {
        match self.whole {
            true => self.options.budget,
            false => self.options.budget / self.served_layers.max(1),
        }
    }

    fn serves(&self, key: ExpertKey) -> bool {
        self.keep.contains(&key)
    }

    /// The policy's number of a layer that is or was served.
    fn number(&self, key: ExpertKey) -> usize {
        self.numbers[&key.layer]
    }

    /// An expert's index in its layer's flat list; none if the model has no such expert.
    fn flat(&self, key: ExpertKey) -> Option<u32> {
        let tier = self.options.moe.tiers.get(usize::from(key.tier))?;
        let exists = key.group < tier.groups && key.expert < tier.experts_per_group;
        exists.then(|| key.flat(&self.options.moe) as u32)
    }

    fn routed(&mut self, layer: u16, rows: &[RoutedRow]) {
        let Some(&number) = self.numbers.get(&layer) else { return };
        let mut rows_of: BTreeMap<u64, usize> = BTreeMap::new();
        rows.iter().for_each(|row| *rows_of.entry(row.stream).or_default() += 1);
        let most = (ROUTED_ROWS_MAX / rows_of.len().max(1)).max(1);
        let (mut experts, mut near, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            let left = rows_of.entry(row.stream).or_default();
            *left -= 1;
            experts.clear();
            experts.extend(row.experts.iter().filter_map(|&key| self.flat(key)));
            all.extend_from_slice(&experts);
            if *left >= most {
                continue;
            }
            near.clear();
            near.extend(row.near.iter().filter_map(|&key| self.flat(key)));
            let (stream, last) = (row.stream, row.last);
            let row = Row { stream, last, experts: &experts, near: &near };
            self.options.policy.used(number, &row);
        }
        self.options.policy.passed(number);
        all.sort_unstable();
        all.dedup();
        self.judge_gate(number, &all);
    }

    fn demand(&mut self, wanted: &[(ExpertKey, u32)]) {
        let mut by_layer: BTreeMap<u16, u64> = BTreeMap::new();
        for &(key, _) in wanted {
            *by_layer.entry(key.layer).or_default() += self.bytes(key);
        }
        by_layer.keys().for_each(|&layer| self.judge_predictions(layer, wanted));
        let share = self.layer_share();
        by_layer.retain(|_, bytes| *bytes > share);
        let around = by_layer;
        // What is here first: it is not to make room for the others.
        let mut missing = Vec::new();
        for &(key, _) in wanted {
            let Some(entry) = self.entries.get_mut(&key).filter(|e| e.state == State::Here) else {
                missing.push(key);
                continue;
            };
            self.counters.hits += 1;
            entry.pinned = true;
            if std::mem::replace(&mut entry.early, Early::No) != Early::No {
                self.trial.used += 1;
                self.counters.prefetches_used += 1;
            }
            if entry.passing && !around.contains_key(&key.layer) {
                self.stays(key);
            }
            self.commands.push_back(Command::Ready(key));
        }
        for key in missing {
            let bytes = self.bytes(key);
            if let Some(entry) = self.entries.get_mut(&key) {
                self.counters.misses += 1;
                entry.pinned = true;
                if let State::Fetching { urgency, .. } = &mut entry.state
                    && *urgency == Urgency::Prefetch
                {
                    *urgency = Urgency::Demand;
                    self.commands.push_back(Command::Promote(key));
                }
                if std::mem::replace(&mut entry.early, Early::No) != Early::No {
                    self.trial.used += 1;
                    self.counters.prefetches_used += 1;
                    self.predicted -= bytes;
                }
                continue;
            }
            let flat = self.flat(key).filter(|_| self.serves(key));
            let Some(flat) = flat else {
                let reason = format!("{key} is not of this node's share");
                self.commands.push_back(Command::Refuse(key, reason));
                continue;
            };
            if bytes > self.options.budget {
                let budget = self.options.budget;
                let reason = format!("{key} takes {bytes} bytes of a budget of {budget}");
                self.commands.push_back(Command::Refuse(key, reason));
                continue;
            }
            self.counters.misses += 1;
            let passing = around.contains_key(&key.layer);
            let entry = Entry { pinned: true, passing, ..Entry::waiting(flat) };
            self.entries.insert(key, entry);
            self.waiting.push_back(key);
        }
        self.judge();
    }

    fn of_layer(&self, layer: u16) -> impl Iterator<Item = (ExpertKey, &Entry)> {
        let key = |tier, group, expert| ExpertKey { layer, tier, group, expert };
        let all = key(0, 0, 0)..=key(u16::MAX, u32::MAX, u32::MAX);
        self.entries.range(all).map(|(&key, entry)| (key, entry))
    }

    fn used(&mut self, key: ExpertKey) {
        let serves = self.serves(key);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.pinned = false;
        match entry.state {
            State::Waiting => {
                // Nobody waits for it any more.
                self.forget_waiting(key);
            }
            State::Here if !serves => self.evict(key),
            State::Here | State::Fetching { .. } => {}
        }
    }

    fn forget_waiting(&mut self, key: ExpertKey) {
        self.waiting.retain(|other| *other != key);
        if self.entries.remove(&key).is_some_and(|entry| entry.load) {
            self.commands.push_back(Command::Loaded(key));
        }
    }

    fn load(&mut self, key: ExpertKey) {
        if let Some(entry) = self.entries.get_mut(&key) {
            match entry.state {
                State::Here => self.commands.push_back(Command::Loaded(key)),
                State::Waiting | State::Fetching { .. } => entry.load = true,
            }
            return;
        }
        let bytes = self.bytes(key);
        let number = self.numbers.get(&key.layer).filter(|_| self.serves(key));
        let flat = self.flat(key).filter(|_| self.held + bytes <= self.options.budget);
        let flat = flat.zip(number).filter(|&(_, &number)| {
            self.layers[number].held + bytes <= self.layer_share().max(bytes)
        });
        let Some((flat, _)) = flat else {
            return self.commands.push_back(Command::Loaded(key));
        };
        self.entries.insert(key, Entry { load: true, ..Entry::waiting(flat) });
        self.counters.fetches += 1;
        // Whoever waits for another goes first.
        self.fetch(key, Urgency::Prefetch);
    }

    fn fetch(&mut self, key: ExpertKey, urgency: Urgency) {
        let (bytes, number) = (self.bytes(key), self.number(key));
        self.held += bytes;
        self.fetching += 1;
        let layer = &mut self.layers[number];
        layer.held += bytes;
        let entry = self.entries.get_mut(&key).expect("the caller has it");
        entry.state = State::Fetching { urgency, cancelling: false };
        if entry.passing {
            self.passing += bytes;
            layer.passing += bytes;
        }
        self.commands.push_back(Command::Fetch(key, urgency));
    }

    fn arrived(&mut self, key: ExpertKey) {
        let bytes = self.bytes(key);
        let serves = self.serves(key);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let State::Fetching { urgency, .. } = entry.state else { return };
        entry.state = State::Here;
        self.fetching -= 1;
        self.counters.bytes_in += bytes;
        let (pinned, load) = (entry.pinned, std::mem::take(&mut entry.load));
        if entry.early != Early::No {
            self.predicted -= bytes;
        }
        if load {
            self.commands.push_back(Command::Loaded(key));
        }
        if pinned || urgency == Urgency::Demand {
            // One of several who demanded it may have taken that back for all.
            self.commands.push_back(Command::Ready(key));
        }
        if !pinned && !serves {
            self.evict(key);
        }
    }

    /// A fetch brought nothing.
    fn ended(&mut self, key: ExpertKey, failed: Option<String>) {
        let bytes = self.bytes(key);
        let Some(entry) = self.entries.get(&key).copied() else { return };
        if !matches!(entry.state, State::Fetching { .. }) {
            return;
        }
        self.free(key, &entry);
        self.fetching -= 1;
        if entry.early != Early::No {
            self.predicted -= bytes;
            self.counters.prefetches_in_vain += 1;
        }
        match (entry.pinned, failed) {
            // It was demanded when it was being cancelled.
            (true, None) => {
                let state = State::Waiting;
                self.entries.insert(key, Entry { state, ..entry });
                self.waiting.push_front(key);
                return;
            }
            (true, Some(reason)) => self.commands.push_back(Command::Refuse(key, reason)),
            (false, _) => {}
        }
        self.entries.remove(&key);
        if entry.load {
            self.commands.push_back(Command::Loaded(key));
        }
    }

    /// Gives back the bytes of what was here or on its way.
    fn free(&mut self, key: ExpertKey, entry: &Entry) {
        let (bytes, number) = (self.bytes(key), self.number(key));
        self.held -= bytes;
        let layer = &mut self.layers[number];
        layer.held -= bytes;
        if entry.passing {
            self.passing -= bytes;
            layer.passing -= bytes;
        }
    }

    fn evict(&mut self, key: ExpertKey) {
        let Some(entry) = self.entries.remove(&key) else { return };
        self.free(key, &entry);
        if entry.early != Early::No {
            self.trial.vain += 1;
            self.counters.prefetches_in_vain += 1;
            self.counters.bytes_in_vain += self.bytes(key);
        }
        self.counters.evictions += 1;
        self.commands.push_back(Command::Evict(key));
    }

    fn lost(&mut self, key: ExpertKey) {
        let Some(entry) = self.entries.get(&key).copied().filter(|e| e.state == State::Here) else {
            return;
        };
        self.free(key, &entry);
        self.entries.remove(&key);
    }

    fn keep(&mut self, keys: BTreeSet<ExpertKey>) {
        let gone: Vec<(ExpertKey, Entry)> = self
            .entries
            .iter()
            .filter(|(key, _)| !keys.contains(key))
            .map(|(&key, &entry)| (key, entry))
            .collect();
        self.whole = keys.iter().map(|&key| self.bytes(key)).sum::<u64>() <= self.options.budget;
        let layers: BTreeSet<u16> = keys.iter().map(|key| key.layer).collect();
        self.served_layers = layers.len() as u64;
        for number in layers {
            let next = self.layers.len();
            if *self.numbers.entry(number).or_insert(next) == next {
                self.layers.push(Layer::new(number));
            }
        }
        self.keep = keys;
        for (key, entry) in gone {
            match entry.state {
                State::Here if !entry.pinned => self.evict(key),
                // When it was used.
                State::Here => {}
                State::Waiting => {
                    self.forget_waiting(key);
                    let reason = format!("{key} is not of this node's share any more");
                    self.commands.push_back(Command::Refuse(key, reason));
                }
                State::Fetching { cancelling, .. } => {
                    if !cancelling && !entry.pinned {
                        let fetching = self.entries.get_mut(&key).map(|entry| &mut entry.state);
                        if let Some(State::Fetching { cancelling, .. }) = fetching {
                            *cancelling = true;
                        }
                        self.commands.push_back(Command::Cancel(key));
                    }
                }
            }
        }
    }

    /// Fetches what is demanded, in order, as far as there is room.
    fn serve_waiting(&mut self) {
        let mut weakest = Weakest::default();
        while let Some(&key) = self.waiting.front() {
            if !self.make_room(key, &mut weakest) {
                return;
            }
            self.waiting.pop_front();
            self.counters.fetches += 1;
            self.fetch(key, Urgency::Demand);
        }
    }
}

#[cfg(test)]
mod tests;
