//! The experts in the memory of the host: what lanes compute with.
//!
//! Carries out what [`Residency`] decides: slots come from a pool under the same budget, bytes from
//! a [`Fetcher`]. A caller demands ([`ExpertStore::want`]), computes with what is here
//! ([`ExpertStore::fetch`]), says that it has ([`ExpertStore::used`]), and is woken when more has
//! come.
//!
//! Invariant: while all of a node's share has room and is here, none of that takes a lock but the
//! one that readers share.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{
        Arc, Weak,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use lite_llm_kernels::slots::{NoSlot, SlotPool};
use parking_lot::{Mutex, MutexGuard, RwLock};
use tracing::{Span, debug_span};

use super::{
    fetch::{Done, Fetched, Fetcher, ResidenceStats},
    machine::{Command, Counters, Event, Residency, ResidencyOptions, RoutedRow, Urgency},
    policy::Policy,
};
use crate::config::MoeConfig;
use crate::expert::{ExpertKey, ExpertStore, GatedMlp, Leaving, StoreError, Waker};

/// Told the bytes of an expert that was to be loaded; 0 if it had no room.
type Loaded = Box<dyn FnOnce(Result<u64, StoreError>) + Send>;

type Told = (Loaded, Result<u64, StoreError>);

/// What a cache is made of.
#[derive(Debug)]
pub struct CacheOptions {
    /// What there is of experts.
    pub moe: Arc<MoeConfig>,
    /// Bytes that it may hold.
    pub budget: u64,
    /// Bytes of an expert, by tier.
    pub expert_bytes: Vec<u64>,
    /// What experts are worth.
    pub policy: Box<dyn Policy>,
    /// Whether predicted experts are fetched before they are demanded.
    pub prefetch: bool,
    /// Where bytes come from.
    pub fetcher: Arc<dyn Fetcher>,
}

/// See the module's text.
pub struct ExpertCache {
    me: Weak<Self>,
    here: RwLock<HashMap<ExpertKey, Arc<GatedMlp>>>,
    inner: Mutex<Inner>,
    share: RwLock<Arc<BTreeSet<ExpertKey>>>,
    /// All of the share has room and is here.
    complete: AtomicBool,
    /// See [`ExpertStore::is_whole`].
    whole: AtomicBool,
    leaving: Mutex<Vec<Leaving>>,
    resident: AtomicU64,
    pool: Arc<SlotPool>,
    /// Bytes of an expert, by tier; the machine counts those of its slot.
    expert_bytes: Vec<u64>,
    fetcher: Arc<dyn Fetcher>,
    waker: RwLock<Option<Waker>>,
}

struct Inner {
    residency: Residency,
    loads: HashMap<ExpertKey, Vec<Loaded>>,
    refused: HashMap<ExpertKey, StoreError>,
    /// Fetches for which the pool has no slot yet: what was let go is still being computed with.
    deferred: Vec<(ExpertKey, Urgency)>,
}

impl fmt::Debug for ExpertCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExpertCache({} of {} bytes)", self.resident_bytes(), self.pool.budget())
    }
}

impl ExpertCache {
    /// An empty cache that serves nothing yet.
    pub fn new(options: CacheOptions) -> Arc<Self> {
        let CacheOptions { moe, budget, expert_bytes, policy, prefetch, fetcher } = options;
        let slot = |bytes: u64| bytes.next_multiple_of(lite_llm_kernels::slots::SLOT_ALIGN as u64);
        let slots = expert_bytes.iter().copied().map(slot).collect();
        let residency =
            Residency::new(ResidencyOptions { moe, budget, expert_bytes: slots, policy, prefetch });
        let (loads, refused, deferred) = (HashMap::new(), HashMap::new(), Vec::new());
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            here: RwLock::default(),
            inner: Mutex::new(Inner { residency, loads, refused, deferred }),
            share: RwLock::default(),
            complete: AtomicBool::new(false),
            whole: AtomicBool::new(false),
            leaving: Mutex::default(),
            resident: AtomicU64::new(0),
            pool: SlotPool::new(budget),
            expert_bytes,
            fetcher,
            waker: RwLock::new(None),
        })
    }

    /// Bytes that it may hold.
    pub fn budget(&self) -> u64 {
        self.pool.budget()
    }

    /// Number of experts that are here.
    pub fn len(&self) -> usize {
        self.here.read().len()
    }

    /// Whether nothing is here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        self.inner.lock().residency.counters()
    }

    /// What it holds and has done so far, and then each place that its experts come from.
    pub fn residences(&self) -> Vec<ResidenceStats> {
        let counters = self.counters();
        let memory = ResidenceStats {
            name: "memory".into(),
            held: self.resident_bytes(),
            budget: Some(self.budget()),
            hits: counters.hits,
            misses: counters.misses,
            prefetches: counters.prefetches,
            prefetches_used: counters.prefetches_used,
            evictions: counters.evictions,
            bytes_read: counters.bytes_in,
            bytes_in_vain: counters.bytes_in_vain,
            ..ResidenceStats::default()
        };
        [vec![memory], self.fetcher.residences()].concat()
    }

    /// How it reads, for people.
    pub fn describe(&self) -> String {
        self.fetcher.describe()
    }

    /// Serves these experts from now on, and no others.
    pub fn keep(&self, keys: BTreeSet<ExpertKey>) {
        let mut inner = self.inner.lock();
        *self.share.write() = Arc::new(keys.clone());
        self.complete.store(false, Relaxed);
        inner.residency.handle(Event::Keep(keys));
        self.carry_out(inner);
    }

    /// Another cache takes its place: see [`Fetcher::retire`].
    pub fn retire(&self) {
        self.fetcher.retire();
    }

    /// Gives memory that no expert uses back to the system.
    pub fn trim(&self) {
        self.pool.trim();
    }

    /// Serves an expert no more.
    pub fn remove(&self, key: ExpertKey) {
        let mut share = BTreeSet::clone(&self.share.read());
        if share.remove(&key) {
            self.keep(share);
        }
    }

    /// Bytes of an expert that is here at this moment. Asking is no demand.
    pub fn resident(&self, key: ExpertKey) -> Option<u64> {
        self.here.read().get(&key).map(|expert| expert.bytes())
    }

    /// The experts of its share, and whether each is here at this moment. Asking is no demand.
    pub fn places(&self) -> Vec<(ExpertKey, bool)> {
        let share = self.share.read().clone();
        let here = self.here.read();
        share.iter().map(|key| (*key, here.contains_key(key))).collect()
    }

    /// Copies an expert's bytes from a position on, as they lie in memory, if it is here at this
    /// moment and has as many there. Says whether `out` is filled. It is no demand either.
    pub fn copy_resident(&self, key: ExpertKey, from: u64, out: &mut [u8]) -> bool {
        let Some(expert) = self.here.read().get(&key).cloned() else { return false };
        let copied = copy_part(&expert, from, out);
        // Let go meanwhile, it kept the room that a fetch waits for.
        if let Some(gone) = Arc::into_inner(expert) {
            drop(gone);
            self.happened(Event::Used(Vec::new()));
        }
        copied
    }

    /// Has an expert of its share here, if there is room for it: `loaded` is told when it is, or
    /// that there is none.
    pub fn load(
        &self,
        key: ExpertKey,
        loaded: impl FnOnce(Result<u64, StoreError>) + Send + 'static,
    ) {
        let mut inner = self.inner.lock();
        inner.loads.entry(key).or_default().push(Box::new(loaded));
        inner.residency.handle(Event::Load(key));
        self.carry_out(inner);
    }

    /// Takes note of an event, and wakes who waits if something came of it.
    fn happened(&self, event: Event) {
        let mut inner = self.inner.lock();
        inner.residency.handle(event);
        self.carry_out(inner);
    }

    fn carry_out(&self, mut guard: MutexGuard<'_, Inner>) {
        let inner = &mut *guard;
        let (mut told, mut came) = (Vec::new(), false);
        for (key, urgency) in std::mem::take(&mut inner.deferred) {
            self.begin(inner, key, urgency, &mut told);
        }
        while let Some(command) = inner.residency.poll_command() {
            match command {
                Command::Fetch(key, urgency) => self.begin(inner, key, urgency, &mut told),
                Command::Promote(key) => {
                    match inner.deferred.iter_mut().find(|(deferred, _)| *deferred == key) {
                        Some((_, urgency)) => *urgency = Urgency::Demand,
                        None => self.fetcher.promote(key),
                    }
                }
                Command::Cancel(key) => {
                    match inner.deferred.iter().position(|(deferred, _)| *deferred == key) {
                        Some(at) => {
                            inner.deferred.remove(at);
                            inner.residency.handle(Event::Cancelled(key));
                        }
                        None => self.fetcher.cancel(key),
                    }
                }
                Command::Evict(key) => {
                    if self.whole.swap(false, SeqCst) {
                        self.leaving.lock().retain(|tell| tell());
                    }
                    if let Some(expert) = self.here.write().remove(&key) {
                        self.resident.fetch_sub(expert.bytes(), Relaxed);
                    }
                }
                Command::Ready(_) => came = true,
                Command::Refuse(key, reason) => {
                    let error = match self.share.read().contains(&key) {
                        true => StoreError::Unreadable { key, reason },
                        false => StoreError::NotHere { key },
                    };
                    inner.refused.entry(key).or_insert(error);
                    came = true;
                }
                Command::Loaded(key) => {
                    let bytes = self.here.read().get(&key).map_or(0, |expert| expert.bytes());
                    let loads = inner.loads.remove(&key).unwrap_or_default();
                    told.extend(loads.into_iter().map(|load| (load, Ok(bytes))));
                }
            }
        }
        let all = self.here.read().len() == self.share.read().len();
        self.complete.store(all && inner.residency.is_settled(), Relaxed);
        self.whole.store(all && inner.residency.is_whole(), SeqCst);
        drop(guard);
        for (load, result) in told {
            load(result);
        }
        if came && let Some(waker) = &*self.waker.read() {
            waker();
        }
    }

    /// Has the fetcher begin, if there is a slot.
    fn begin(&self, inner: &mut Inner, key: ExpertKey, urgency: Urgency, told: &mut Vec<Told>) {
        let bytes = self.expert_bytes.get(usize::from(key.tier)).copied().unwrap_or(0);
        match self.pool.take(bytes as usize) {
            Ok(slot) => {
                let span = match inner.loads.contains_key(&key) {
                    // Loading is no request's doing, and has as many as there are experts.
                    true => Span::none(),
                    false => {
                        let why = match urgency {
                            Urgency::Demand => "demanded",
                            Urgency::Prefetch => "predicted",
                        };
                        // Described only if somebody traces.
                        debug_span!(
                            "fetch", %key, from = self.fetcher.describe(), to = "memory", bytes, why
                        )
                    }
                };
                self.fetcher.fetch(key, slot, urgency, self.done(key, span));
            }
            // The machine knows of room: it is there when who computes with an expert that was let
            // go has done so, and says so.
            Err(NoSlot::OverBudget { .. }) => inner.deferred.push((key, urgency)),
            Err(error) => {
                let reason = error.to_string();
                let error = StoreError::Unreadable { key, reason: reason.clone() };
                let loads = inner.loads.remove(&key).unwrap_or_default();
                told.extend(loads.into_iter().map(|load| (load, Err(error.clone()))));
                inner.residency.handle(Event::Failed(key, reason));
            }
        }
    }

    /// The span ends when the fetch does.
    fn done(&self, key: ExpertKey, span: Span) -> Done {
        let me = self.me.clone();
        Box::new(move |fetched| {
            drop(span);
            if let Some(me) = me.upgrade() {
                me.fetched(key, fetched);
            }
        })
    }

    fn fetched(&self, key: ExpertKey, fetched: Fetched) {
        let mut inner = self.inner.lock();
        let event = match fetched {
            Fetched::Here(expert) => {
                self.resident.fetch_add(expert.bytes(), Relaxed);
                self.here.write().insert(key, Arc::new(expert));
                Event::Arrived(key)
            }
            Fetched::Cancelled => Event::Cancelled(key),
            Fetched::Failed(error) => {
                let loads = inner.loads.remove(&key).unwrap_or_default();
                let reason = match &error {
                    StoreError::Unreadable { reason, .. } => reason.clone(),
                    other => other.to_string(),
                };
                inner.residency.handle(Event::Failed(key, reason));
                self.carry_out(inner);
                return loads.into_iter().for_each(|load| load(Err(error.clone())));
            }
        };
        inner.residency.handle(event);
        self.carry_out(inner);
    }
}

/// Fills `out` with the bytes of three matrices, which follow each other, from a position on.
fn copy_part(expert: &GatedMlp, from: u64, mut out: &mut [u8]) -> bool {
    let Ok(mut from) = usize::try_from(from) else { return false };
    for matrix in [&expert.gate, &expert.up, &expert.down] {
        let data = matrix.data();
        if let Some(there) = data.get(from..) {
            let (part, rest) = out.split_at_mut(there.len().min(out.len()));
            part.copy_from_slice(&there[..part.len()]);
            out = rest;
        }
        from = from.saturating_sub(data.len());
    }
    out.is_empty()
}

impl ExpertStore for ExpertCache {
    fn want(&self, experts: &[(ExpertKey, u32)]) {
        if self.complete.load(Relaxed) {
            return;
        }
        let share = self.share.read().clone();
        let mut wanted: Vec<(ExpertKey, u32)> =
            experts.iter().filter(|(key, _)| share.contains(key)).copied().collect();
        let mut inner = self.inner.lock();
        // What failed is told before it is tried again.
        wanted.retain(|(key, _)| !inner.refused.contains_key(key));
        inner.residency.handle(Event::Demand(wanted));
        self.carry_out(inner);
    }

    fn fetch(&self, key: ExpertKey) -> Result<Arc<GatedMlp>, StoreError> {
        if let Some(expert) = self.here.read().get(&key) {
            return Ok(expert.clone());
        }
        let mut inner = self.inner.lock();
        if let Some(error) = inner.refused.remove(&key) {
            return Err(error);
        }
        if let Some(expert) = self.here.read().get(&key) {
            return Ok(expert.clone());
        }
        if !self.share.read().contains(&key) {
            // It may be on its way for somebody, who is to look again: it may be served again soon.
            inner.residency.handle(Event::Used(vec![key]));
            self.carry_out(inner);
            return Err(StoreError::NotHere { key });
        }
        // Several may want it, and the first to have used it lets it go, or is told why it cannot be
        // had: the others want it anew.
        if !inner.residency.awaits(key) {
            inner.residency.handle(Event::Demand(vec![(key, 1)]));
            self.carry_out(inner);
        }
        Err(StoreError::Coming { key })
    }

    fn used(&self, experts: &[ExpertKey]) {
        if !self.complete.load(Relaxed) {
            self.happened(Event::Used(experts.to_vec()));
        }
    }

    fn on_arrival(&self, wake: Waker) {
        *self.waker.write() = Some(wake);
        // Who was called before is no more, and what it wanted is wanted no more.
        let mut inner = self.inner.lock();
        inner.refused.clear();
        inner.residency.handle(Event::Abandoned);
        self.carry_out(inner);
    }

    fn routed(&self, layer: u16, rows: Vec<RoutedRow>) {
        self.happened(Event::Routed { layer, rows });
    }

    fn ended(&self, stream: u64) {
        if !self.complete.load(Relaxed) {
            self.happened(Event::Ended(stream));
        }
    }

    fn is_complete(&self) -> bool {
        self.complete.load(Relaxed)
    }

    fn is_whole(&self) -> bool {
        self.whole.load(SeqCst)
    }

    fn on_leaving(&self, tell: Leaving) {
        self.leaving.lock().push(tell);
    }

    fn predict(&self, experts: &[ExpertKey]) {
        if !self.complete.load(Relaxed) {
            self.happened(Event::Predicted(experts.to_vec()));
        }
    }

    fn wants_predictions(&self) -> bool {
        !self.complete.load(Relaxed) && self.inner.lock().residency.follows_predictions()
    }

    fn resident_bytes(&self) -> u64 {
        self.resident.load(Relaxed)
    }
}
