//! One dispatch of a pass: where each of its calls is computed, what came back, and what must be
//! asked of somebody else.
//!
//! Invariants: every route of the dispatch is, at any time, to be run here (now, or when its expert
//! has come), owed by one batch, waiting for a holder, done, or failed for good; an output is taken
//! from one place only; a holder that could not answer is not asked again before something has
//! changed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use lite_llm_runtime::{
    expert::{ExpertKey, StoreError},
    forward::{Dispatch, FailedRoute},
    moe_layer::{ExpertCall, ExpertError, ExpertFailure},
    routing::Route,
};
use lite_llm_transport::{
    frame::OutgoingFrame,
    messages::{
        self, ExpertBatch, ExpertOutputsView, OutgoingExpertBatch, TraceContext, experts::calls_max,
    },
    pool::BufferPool,
};

use super::peers::Peers;

/// How often a holder that would not answer is asked again.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Where the output of a route is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Row of the outputs that are computed here.
    Here(u32),
    /// Row of the reply to a batch.
    There { batch: u64, row: u32 },
    /// Nobody can be asked at present: see its trouble.
    Waiting,
    /// It will not come: see its trouble.
    Failed,
}

/// A batch that was sent.
struct Sent {
    peer: u16,
    /// Route of each call.
    routes: Vec<u32>,
    outputs: Option<ExpertOutputsView>,
}

/// What went wrong with a route.
struct Trouble {
    /// Nodes that could not answer.
    tried: Vec<u16>,
    /// Why the last of them could not, naming it.
    reason: String,
    /// When the first could not.
    since: Instant,
    /// Until when others, or the same again, are asked.
    until: Instant,
    retry: Instant,
}

/// How a node failed to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failing {
    /// It is gone, cannot be reached, or does not have the experts yet, or no more: somebody will
    /// take its place, or this node will hear who has.
    Absent,
    /// It has the experts, and they cannot be run.
    Broken,
}

/// A call that is to be run here.
#[derive(Debug, Clone, Copy)]
struct Call {
    route: u32,
    /// Row of the dispatch's hidden states.
    row: u32,
    /// Row of the outputs that are computed here.
    here: u32,
}

/// What a pass waits for.
pub(super) struct Flight {
    width: usize,
    /// One entry per route of the dispatch.
    parts: Vec<Part>,
    /// Outputs computed here, `[calls, width]`.
    here: Vec<f32>,
    /// Calls to be run now, and those whose experts are on their way; each by `here`.
    pending: Vec<Call>,
    parked: Vec<Call>,
    /// Until when those are waited for, unless others come meanwhile.
    parked_until: Option<Instant>,
    sent: BTreeMap<u64, Sent>,
    /// Batches that have not been answered.
    owing: usize,
    troubles: BTreeMap<u32, Trouble>,
}

/// What placing a dispatch's calls takes beside the dispatch.
pub(super) struct Way<'a> {
    pub(super) peers: &'a Peers,
    pub(super) next_id: &'a mut u64,
    pub(super) trace: TraceContext,
    pub(super) buffers: &'a BufferPool,
    pub(super) now: Instant,
    /// How long a call may wait for a holder.
    pub(super) patience: Duration,
    /// How long for weights on their way here, while none come.
    pub(super) weights: Duration,
}

/// A frame for a peer, with the number of its batch.
pub(super) struct Outgoing {
    pub(super) id: u64,
    pub(super) peer: u16,
    pub(super) frame: OutgoingFrame,
}

/// A batch for one peer, as it grows.
#[derive(Default)]
struct Batch {
    /// Rows of the dispatch that are sent, each once.
    rows: Vec<u32>,
    calls: Vec<messages::ExpertCall>,
    /// Route of each call.
    routes: Vec<u32>,
}

impl Batch {
    fn push(&mut self, index: u32, row: u32, key: ExpertKey) {
        // Rows come in order, so a row that is sent already is the last one.
        if self.rows.last() != Some(&row) {
            self.rows.push(row);
        }
        self.calls.push(messages::ExpertCall {
            row: self.rows.len() as u32 - 1,
            tier: key.tier,
            group: key.group,
            expert: key.expert,
        });
        self.routes.push(index);
    }
}

impl Flight {
    /// A flight of a dispatch with calls of this width. `here` is memory for the outputs that are
    /// computed here: see [`Flight::into_memory`].
    pub(super) fn new(width: usize, mut here: Vec<f32>) -> Self {
        here.clear();
        Self {
            width,
            parts: Vec::new(),
            here,
            pending: Vec::new(),
            parked: Vec::new(),
            parked_until: None,
            sent: BTreeMap::new(),
            owing: 0,
            troubles: BTreeMap::new(),
        }
    }

    /// Says for every call of a dispatch where it is computed, and writes the frames that leave.
    pub(super) fn place(&mut self, dispatch: &Dispatch<'_>, way: &mut Way<'_>) -> Vec<Outgoing> {
        self.parts = vec![Part::Waiting; dispatch.routes.all().len()];
        let all = (0u32..).zip(dispatch.routes.with_rows());
        self.place_some(all.map(|(index, (row, route))| (index, row as u32, *route)), dispatch, way)
    }

    /// The same for these routes, in ascending order, after others could not answer.
    pub(super) fn place_again(
        &mut self,
        routes: &[u32],
        dispatch: &Dispatch<'_>,
        way: &mut Way<'_>,
    ) -> Vec<Outgoing> {
        let ends = dispatch.routes.ends();
        let row = |route: u32| ends.partition_point(|&end| end <= route) as u32;
        let all = dispatch.routes.all();
        let some = routes.iter().map(|&route| (route, row(route), all[route as usize]));
        self.place_some(some, dispatch, way)
    }

    fn place_some(
        &mut self,
        routes: impl Iterator<Item = (u32, u32, Route)>,
        dispatch: &Dispatch<'_>,
        way: &mut Way<'_>,
    ) -> Vec<Outgoing> {
        let mut outgoing = Vec::new();
        let mut batches: BTreeMap<u16, Batch> = BTreeMap::new();
        let mut rows_here = (self.here.len() / self.width) as u32;
        for (index, row, route) in routes {
            let tried = self.troubles.get(&index).map_or(&[][..], |trouble| &trouble.tried);
            let Some(holder) = way.peers.holder(route.key, tried) else {
                self.wait(index, route.key, way);
                continue;
            };
            if holder == way.peers.me() {
                self.parts[index as usize] = Part::Here(rows_here);
                self.pending.push(Call { route: index, row, here: rows_here });
                rows_here += 1;
                continue;
            }
            let batch = batches.entry(holder).or_default();
            batch.push(index, row, route.key);
            if batch.calls.len() as u32 == calls_max(self.width as u32) {
                let batch = batches.remove(&holder).unwrap_or_default();
                outgoing.extend(self.send(batch, holder, dispatch, way));
            }
        }
        for (holder, batch) in batches {
            outgoing.extend(self.send(batch, holder, dispatch, way));
        }
        self.here.resize(rows_here as usize * self.width, 0.0);
        outgoing
    }

    /// Notes that nobody can be asked for a route at present.
    fn wait(&mut self, index: u32, key: ExpertKey, way: &Way<'_>) {
        self.parts[index as usize] = Part::Waiting;
        let retry = way.now + RETRY_INTERVAL;
        let trouble = self.troubles.entry(index).or_insert_with(|| Trouble {
            tried: Vec::new(),
            reason: way.peers.nobody(key),
            since: way.now,
            until: way.now + way.patience,
            retry,
        });
        trouble.retry = retry;
    }

    fn send(
        &mut self,
        batch: Batch,
        peer: u16,
        dispatch: &Dispatch<'_>,
        way: &mut Way<'_>,
    ) -> Option<Outgoing> {
        let id = *way.next_id;
        *way.next_id += 1;
        let Batch { rows, calls, routes } = batch;
        let head = ExpertBatch {
            id,
            trace: way.trace,
            layer: dispatch.layer as u16,
            width: self.width as u32,
            rows: rows.len() as u32,
            calls,
        };
        let mut frame = match OutgoingExpertBatch::new(head, way.buffers) {
            Ok(frame) => frame,
            Err(error) => {
                for route in routes {
                    self.trouble(route, peer, &error.to_string(), Failing::Broken, way);
                    self.parts[route as usize] = Part::Failed;
                }
                return None;
            }
        };
        for (out, &row) in frame.rows_mut().chunks_exact_mut(self.width).zip(&rows) {
            out.copy_from_slice(&dispatch.hidden[row as usize * self.width..][..self.width]);
        }
        for (row, &route) in (0u32..).zip(&routes) {
            self.parts[route as usize] = Part::There { batch: id, row };
        }
        self.sent.insert(id, Sent { peer, routes, outputs: None });
        self.owing += 1;
        Some(Outgoing { id, peer, frame: frame.finish() })
    }

    /// The memory of the outputs that were computed here, for the next flight.
    pub(super) fn into_memory(self) -> Vec<f32> {
        self.here
    }

    /// Whether some calls are to be run here.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether calls wait for experts on their way here.
    pub(super) fn is_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Calls that are to be run here now: their number grows with [`Flight::place`].
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Experts of the pending calls from the `first` on, with their rows.
    pub(super) fn wanted(&self, first: usize, routes: &[Route]) -> Vec<(ExpertKey, u32)> {
        count(self.pending[first..].iter().map(|call| routes[call.route as usize].key))
    }

    /// Experts of all calls that were not run.
    pub(super) fn unused(&self, routes: &[Route]) -> Vec<ExpertKey> {
        let calls = self.pending.iter().chain(&self.parked);
        calls.map(|call| routes[call.route as usize].key).collect()
    }

    /// Experts have come: what waited for some is to be tried again.
    pub(super) fn unpark(&mut self) {
        if !self.parked.is_empty() {
            self.pending.append(&mut self.parked);
            self.pending.sort_unstable_by_key(|call| call.here);
        }
    }

    /// The calls that are to be run here.
    pub(super) fn pending_calls<'a>(
        &'a mut self,
        dispatch: &'a Dispatch<'_>,
    ) -> impl Iterator<Item = ExpertCall<'a>> {
        let (width, mut next) = (self.width, 0);
        let mut outputs = self.here.chunks_exact_mut(width);
        self.pending.iter().filter_map(move |call| {
            let skip = call.here as usize - std::mem::replace(&mut next, call.here as usize + 1);
            Some(ExpertCall {
                key: dispatch.routes.all()[call.route as usize].key,
                row: &dispatch.hidden[call.row as usize * width..][..width],
                output: outputs.nth(skip)?,
            })
        })
    }

    /// Notes that they were run, but for these experts. Returns the routes to be placed again.
    pub(super) fn ran(
        &mut self,
        failures: &[ExpertFailure],
        routes: &[Route],
        way: &Way<'_>,
    ) -> Vec<u32> {
        let pending = std::mem::take(&mut self.pending);
        if failures.is_empty() {
            self.parked_until = None;
            return Vec::new();
        }
        let failed: BTreeMap<ExpertKey, &ExpertFailure> =
            failures.iter().map(|failure| (failure.key, failure)).collect();
        let rows = self.here.len() / self.width;
        let first = pending.first().map_or(rows, |call| call.here as usize);
        let (mut again, all) = (Vec::new(), pending.len());
        for call in pending {
            let Some(failure) = failed.get(&routes[call.route as usize].key) else { continue };
            if is_coming(&failure.error) {
                self.parked.push(call);
                continue;
            }
            let how = failing(&failure.error);
            self.trouble(call.route, way.peers.me(), &failure.error.to_string(), how, way);
            again.push(call.route);
        }
        match self.parked.len() {
            0 => self.parked_until = None,
            parked if self.parked_until.is_none() || parked < all => {
                self.parked_until = Some(way.now + way.weights);
            }
            _ => {}
        }
        if again.len() == all && first + all == rows {
            // They are tried again and again: their place is not taken anew each time.
            self.here.truncate(first * self.width);
        }
        again
    }

    /// Takes the outputs of a batch, or says what is wrong with them.
    pub(super) fn take(
        &mut self,
        id: u64,
        peer: u16,
        view: ExpertOutputsView,
    ) -> Result<(), String> {
        let Some(sent) = self.sent.get_mut(&id) else { return Ok(()) };
        let (rows, width) = (view.head().rows, view.head().width as usize);
        let calls = sent.routes.len();
        if sent.peer != peer || rows as usize != calls || width != self.width {
            return Err(format!(
                "it sent {rows} outputs of width {width}; {calls} of width {} are expected",
                self.width
            ));
        }
        sent.outputs = Some(view);
        Ok(())
    }

    /// Notes that a batch was answered. Returns the routes whose experts the answer names as
    /// failed: they are to be placed again.
    pub(super) fn complete(&mut self, id: u64, routes: &[Route], way: &Way<'_>) -> Vec<u32> {
        self.owing -= 1;
        let mut again = Vec::new();
        let Some(sent) = self.sent.get(&id) else { return again };
        let failed = sent.outputs.as_ref().map_or(&[][..], ExpertOutputsView::failed).to_vec();
        if failed.is_empty() {
            return again;
        }
        let (peer, called) = (sent.peer, sent.routes.clone());
        let named = |f: &messages::FailedExpert| (f.tier, f.group, f.expert);
        let failed: BTreeMap<_, _> = failed.iter().map(|failed| (named(failed), failed)).collect();
        let all = called.len();
        for route in called {
            let ExpertKey { tier, group, expert, .. } = routes[route as usize].key;
            if let Some(failed) = failed.get(&(tier, group, expert)) {
                let how = if failed.is_absent() { Failing::Absent } else { Failing::Broken };
                self.trouble(route, peer, &way.peers.refused(peer, failed.why()), how, way);
                again.push(route);
            }
        }
        if again.len() == all {
            // Nothing of the answer is of use, and there may be many like it.
            self.sent.remove(&id);
        }
        again
    }

    /// Notes that nothing of a batch will come, for a reason that names its node. Returns its
    /// routes: they are to be placed again.
    pub(super) fn fail(&mut self, id: u64, reason: &str, how: Failing, way: &Way<'_>) -> Vec<u32> {
        let Some(sent) = self.sent.remove(&id) else { return Vec::new() };
        self.owing -= 1;
        for &route in &sent.routes {
            self.trouble(route, sent.peer, reason, how, way);
        }
        sent.routes
    }

    fn trouble(&mut self, route: u32, node: u16, reason: &str, how: Failing, way: &Way<'_>) {
        let now = way.now;
        self.parts[route as usize] = Part::Waiting;
        let trouble = self.troubles.entry(route).or_insert_with(|| Trouble {
            tried: Vec::new(),
            reason: String::new(),
            since: now,
            until: now,
            retry: now,
        });
        trouble.tried.push(node);
        trouble.reason = reason.to_owned();
        trouble.retry = now + RETRY_INTERVAL;
        trouble.until = match how {
            Failing::Absent => trouble.since + way.patience,
            Failing::Broken => now,
        };
    }

    /// Routes that wait, to be placed again because something has changed.
    pub(super) fn waiting(&mut self) -> Vec<u32> {
        let parts = &self.parts;
        let waiting = |route: &u32| parts[*route as usize] == Part::Waiting;
        let mut again = Vec::new();
        for (route, trouble) in self.troubles.iter_mut().filter(|(route, _)| waiting(route)) {
            trouble.tried.clear();
            again.push(*route);
        }
        again
    }

    /// Gives up what has waited long enough; returns routes whose holders are to be asked again.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<u32> {
        let mut again = Vec::new();
        for (&route, trouble) in &mut self.troubles {
            let part = &mut self.parts[route as usize];
            if *part != Part::Waiting {
                continue;
            }
            if trouble.until <= now {
                *part = Part::Failed;
            } else if trouble.retry <= now {
                trouble.tried.clear();
                again.push(route);
            }
        }
        again
    }

    /// Gives up waiting for experts that have not come in time. Returns their routes, to be placed
    /// again: others may hold them.
    pub(super) fn give_up(&mut self, way: &Way<'_>) -> Vec<u32> {
        // What has just been unparked is looked at first.
        if self.parked.is_empty() || self.parked_until.is_none_or(|until| until > way.now) {
            return Vec::new();
        }
        self.parked_until = None;
        let parked = std::mem::take(&mut self.parked);
        for call in &parked {
            let reason = not_come(way.weights);
            self.trouble(call.route, way.peers.me(), &reason, Failing::Absent, way);
        }
        parked.into_iter().map(|call| call.route).collect()
    }

    /// When [`Flight::expire`] and [`Flight::give_up`] are to be called at the latest.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        let waiting = |(route, _): &(&u32, &Trouble)| self.parts[**route as usize] == Part::Waiting;
        let troubles = self.troubles.iter().filter(waiting).map(|(_, t)| t.until.min(t.retry));
        troubles.chain(self.parked_until).min()
    }

    /// Batches that a node owes although every one of their calls could be had from somebody else.
    pub(super) fn avoidable(&self, peer: u16, routes: &[Route], peers: &Peers) -> Vec<u64> {
        let elsewhere = |&route: &u32| {
            let mut tried = vec![peer];
            tried.extend(self.troubles.get(&route).iter().flat_map(|trouble| &trouble.tried));
            peers.has_sound_holder(routes[route as usize].key, &tried)
        };
        let owed = self.sent.iter().filter(|(_, s)| s.peer == peer && s.outputs.is_none());
        owed.filter(|(_, sent)| sent.routes.iter().all(elsewhere)).map(|(&id, _)| id).collect()
    }

    /// Whether every output is there, or known not to come.
    pub(super) fn is_complete(&self) -> bool {
        let waiting = |route: &u32| self.parts[*route as usize] == Part::Waiting;
        self.owing == 0
            && self.pending.is_empty()
            && self.parked.is_empty()
            && !self.troubles.keys().any(waiting)
    }

    /// The routes of the dispatch whose outputs will not come.
    pub(super) fn failed_routes(&self) -> Vec<FailedRoute> {
        let failed = self.troubles.iter();
        let failed = failed.filter(|(route, _)| self.parts[**route as usize] == Part::Failed);
        failed
            .map(|(&route, trouble)| FailedRoute {
                route: route as usize,
                reason: trouble.reason.clone(),
            })
            .collect()
    }

    /// The output of every route, in order, where it lies; nothing where it did not come.
    pub(super) fn parts(&self) -> Vec<&[f32]> {
        let part = |part: &Part| match *part {
            Part::Here(row) => &self.here[row as usize * self.width..][..self.width],
            Part::There { batch, row } => {
                let sent = self.sent.get(&batch).and_then(|sent| sent.outputs.as_ref());
                sent.map_or(&[][..], |outputs| outputs.row(row as usize))
            }
            Part::Waiting | Part::Failed => &[],
        };
        self.parts.iter().map(part).collect()
    }
}

/// Why an expert is not waited for any longer.
pub(super) fn not_come(waited: Duration) -> String {
    format!("its weights did not come into this node's memory for {waited:?}")
}

/// Experts, each once, with how often they occur.
pub(super) fn count(keys: impl Iterator<Item = ExpertKey>) -> Vec<(ExpertKey, u32)> {
    let mut keys: Vec<ExpertKey> = keys.collect();
    keys.sort_unstable();
    keys.chunk_by(|a, b| a == b).map(|same| (same[0], same.len() as u32)).collect()
}

/// Whether an expert was only not here yet.
pub(super) fn is_coming(error: &ExpertError) -> bool {
    matches!(error, ExpertError::Store(StoreError::Coming { .. }))
}

/// What it means that an expert could not be run here.
pub(super) fn failing(error: &ExpertError) -> Failing {
    match error {
        ExpertError::Store(StoreError::NotHere { .. }) => Failing::Absent,
        ExpertError::Store(_) | ExpertError::Device { .. } => Failing::Broken,
    }
}
