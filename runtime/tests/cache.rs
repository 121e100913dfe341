//! The cache of experts as lanes use it: several at a time, who want, park, are woken, compute and
//! say so, while fetches end in any order, fail or are cancelled, and shares change.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use lite_llm_kernels::{
    buffer::Buffer,
    dtype::DType,
    matrix::PackedMatrix,
    slots::{SLOT_ALIGN, Slot},
};
use lite_llm_runtime::{
    config::{MoeConfig, RoutingConfig, Scoring},
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
    random::{Purpose, random_u64},
    residency::{
        CacheOptions, Done, ExpertCache, Fetched, Fetcher, Urgency,
        policy::{Lru, Shape},
    },
    tier::{TIER_1B, TierConfig},
};
use parking_lot::Mutex;

const LAYERS: u16 = 2;
const EXPERTS: u32 = 8;
const SIDE: usize = 16;

fn key(layer: u16, expert: u32) -> ExpertKey {
    ExpertKey { layer, tier: 0, group: 0, expert }
}

fn all() -> BTreeSet<ExpertKey> {
    (0..LAYERS).flat_map(|layer| (0..EXPERTS).map(move |expert| key(layer, expert))).collect()
}

fn matrix_bytes() -> usize {
    PackedMatrix::packed_bytes(DType::F32, SIDE, SIDE).unwrap()
}

/// Bytes of an expert's slot.
fn slot_bytes() -> u64 {
    (3 * matrix_bytes()).next_multiple_of(SLOT_ALIGN) as u64
}

fn moe() -> MoeConfig {
    MoeConfig {
        tiers: vec![TierConfig::new(TIER_1B, 1, EXPERTS, 0)],
        routing: RoutingConfig {
            k_tier: 1,
            k_group: 1,
            k_expert: 2,
            scoring: Scoring::SoftmaxTopK,
            renormalize: true,
            seed: 0,
        },
        ..MoeConfig::without_experts()
    }
}

/// Fetches that end when the test says so.
#[derive(Debug, Default)]
struct Held(Mutex<Vec<HeldFetch>>);

struct HeldFetch {
    key: ExpertKey,
    slot: Slot,
    done: Done,
    cancelled: bool,
}

impl std::fmt::Debug for HeldFetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeldFetch({})", self.key)
    }
}

impl Fetcher for Held {
    fn fetch(&self, key: ExpertKey, slot: Slot, _: Urgency, done: Done) {
        let mut all = self.0.lock();
        assert!(all.iter().all(|other| other.key != key), "{key} is fetched twice at a time");
        all.push(HeldFetch { key, slot, done, cancelled: false });
    }

    fn promote(&self, _: ExpertKey) {}

    fn cancel(&self, key: ExpertKey) {
        self.0.lock().iter_mut().filter(|held| held.key == key).for_each(|h| h.cancelled = true);
    }

    fn describe(&self) -> String {
        "a test".into()
    }
}

impl Held {
    /// Ends one of the fetches that are held, if there are any.
    fn end(&self, which: u64, fails: bool) {
        let held = {
            let mut all = self.0.lock();
            if all.is_empty() {
                return;
            }
            let which = (which % all.len() as u64) as usize;
            all.remove(which)
        };
        let HeldFetch { key, slot, done, cancelled } = held;
        let slot = (!cancelled && !fails).then_some(slot);
        done(match slot {
            Some(slot) => Fetched::Here(expert(slot)),
            None if cancelled => Fetched::Cancelled,
            None => {
                Fetched::Failed(StoreError::Unreadable { key, reason: "as the test wants".into() })
            }
        });
    }
}

fn expert(mut slot: Slot) -> GatedMlp {
    slot.fill(0);
    let (bytes, one) = (Buffer::from_owner(slot).unwrap(), matrix_bytes());
    let matrix = |at: usize| {
        let data = bytes.slice(at * one..(at + 1) * one).unwrap();
        PackedMatrix::new(DType::F32, SIDE, SIDE, data).unwrap()
    };
    GatedMlp { gate: matrix(0), up: matrix(1), down: matrix(2) }
}

struct World {
    cache: Arc<ExpertCache>,
    held: Arc<Held>,
    woken: Arc<AtomicBool>,
}

impl World {
    fn new(budget: u64) -> Self {
        let held = Arc::new(Held::default());
        let cache = ExpertCache::new(CacheOptions {
            moe: Arc::new(moe()),
            budget,
            expert_bytes: vec![3 * matrix_bytes() as u64],
            policy: Box::new(Lru::new(Shape::new(LAYERS.into(), &moe()))),
            prefetch: true,
            fetcher: held.clone(),
        });
        let world = Self { cache, held, woken: Arc::default() };
        world.attach();
        world.cache.keep(all());
        world
    }

    /// A lane begins.
    fn attach(&self) {
        let woken = self.woken.clone();
        self.cache.on_arrival(Box::new(move || woken.store(true, Relaxed)));
    }
}

/// What a lane computes with in one layer: what it still needs, and those that it will not get.
#[derive(Default)]
struct Flight {
    needs: BTreeSet<ExpertKey>,
    failed: BTreeMap<ExpertKey, StoreError>,
}

impl Flight {
    fn begin(world: &World, keys: impl IntoIterator<Item = ExpertKey>) -> Self {
        let needs: BTreeSet<ExpertKey> = keys.into_iter().collect();
        let wanted: Vec<_> = needs.iter().map(|&key| (key, 1)).collect();
        world.cache.want(&wanted);
        Self { needs, ..Self::default() }
    }

    /// Computes with what is here.
    fn run(&mut self, world: &World) {
        let mut used = Vec::new();
        for key in self.needs.clone() {
            match world.cache.fetch(key) {
                Ok(expert) => used.push((key, expert)),
                Err(StoreError::Coming { .. }) => continue,
                Err(error) => drop(self.failed.insert(key, error)),
            }
            self.needs.remove(&key);
        }
        let keys: Vec<ExpertKey> = used.into_iter().map(|(key, _)| key).collect();
        world.cache.used(&keys);
    }
}

/// Whatever happens, and in whatever order: everybody gets what it wants or hears why not; and when
/// nobody wants anything, nothing is kept from going.
#[test]
fn everybody_who_wants_an_expert_gets_it_or_hears_why_not() {
    let schedules =
        std::env::var("LITE_LLM_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(2_000);
    for seed in 0..schedules {
        let mut draws = 0;
        let mut below = |n: u64| {
            draws += 1;
            random_u64(seed, Purpose::Weights, draws) % n
        };
        let budget = (3 + below(14)) * slot_bytes();
        let world = World::new(budget);
        let mut flights: Vec<Flight> = Vec::new();
        for step in 0..120 {
            match below(10) {
                0..3 if flights.len() < 3 => {
                    let (layer, count) = (below(LAYERS.into()) as u16, 1 + below(4));
                    let keys = (0..count).map(|_| key(layer, below(EXPERTS.into()) as u32));
                    let keys: Vec<ExpertKey> = keys.collect();
                    flights.push(Flight::begin(&world, keys));
                }
                3 => {
                    let some = all().into_iter().filter(|_| below(4) > 0);
                    let share: BTreeSet<ExpertKey> = some.collect();
                    world.cache.keep(share.clone());
                    share.iter().for_each(|&key| world.cache.load(key, drop));
                }
                4 if below(6) == 0 => {
                    // The lane ends with all that it waits for, and another begins.
                    flights.clear();
                    world.attach();
                }
                5 => {
                    let layer = below(LAYERS.into()) as u16;
                    let keys = (0..3).map(|_| key(layer, below(EXPERTS.into()) as u32));
                    world.cache.predict(&keys.collect::<Vec<_>>());
                }
                _ => world.held.end(below(64), below(8) == 0),
            }
            // Each runs what it has not looked at yet, and all do when they are woken.
            if world.woken.swap(false, Relaxed) {
                flights.iter_mut().for_each(|flight| flight.run(&world));
            } else if let Some(newest) = flights.last_mut().filter(|_| step % 2 == 0) {
                newest.run(&world);
            }
            flights.retain(|flight| !flight.needs.is_empty());
            assert!(world.cache.resident_bytes() <= budget, "seed {seed}");
        }
        // From now on every fetch succeeds, and lanes look only when they are woken.
        flights.iter_mut().for_each(|flight| flight.run(&world));
        for _ in 0..10_000 {
            if world.woken.swap(false, Relaxed) {
                flights.iter_mut().for_each(|flight| flight.run(&world));
            } else {
                world.held.end(0, false);
            }
        }
        for flight in &flights {
            assert!(flight.needs.is_empty(), "seed {seed}: {:?} never came", flight.needs);
        }
        // Nothing is pinned: all of a layer can be had, one after the other.
        world.cache.keep(all());
        for expert in 0..EXPERTS {
            let mut flight = Flight::begin(&world, [key(0, expert)]);
            flight.run(&world);
            for _ in 0..100 {
                world.held.end(0, false);
                if world.woken.swap(false, Relaxed) {
                    flight.run(&world);
                }
            }
            assert!(flight.needs.is_empty() && flight.failed.is_empty(), "seed {seed}");
        }
    }
}

/// What is moved elsewhere while it is waited for is not an error of this node's: others have it.
#[test]
fn what_moved_away_is_not_here_rather_than_unreadable() {
    let world = World::new(4 * slot_bytes());
    let mut flights: Vec<Flight> =
        (0..EXPERTS).map(|expert| Flight::begin(&world, [key(0, expert)])).collect();
    world.cache.keep(BTreeSet::from([key(1, 0)]));
    for _ in 0..100 {
        world.held.end(0, false);
        flights.iter_mut().for_each(|flight| flight.run(&world));
    }
    for (expert, flight) in (0..).zip(&flights) {
        let error = flight.failed.get(&key(0, expert));
        let fine = error.is_none_or(|error| matches!(error, StoreError::NotHere { .. }));
        assert!(flight.needs.is_empty() && fine, "{error:?}");
    }
}

/// Room is made for an expert by letting one go that somebody still computes with: its memory is
/// waited for.
#[test]
fn what_was_let_go_may_still_be_computed_with() {
    let world = World::new(slot_bytes());
    world.cache.load(key(0, 0), drop);
    world.held.end(0, false);
    let held = world.cache.fetch(key(0, 0)).unwrap();
    let mut next = Flight::begin(&world, [key(0, 1)]);
    next.run(&world);
    world.held.end(0, false);
    assert_eq!(next.needs.len(), 1, "its memory is in use");
    drop(held);
    world.cache.used(&[key(0, 0)]);
    world.held.end(0, false);
    next.run(&world);
    assert!(next.needs.is_empty() && next.failed.is_empty());
}

/// When all is here and nobody computes, the cache says so, and it does after shares have come and
/// gone, too.
#[test]
fn a_cache_that_holds_all_of_its_share_is_complete_again_after_each_change() {
    let world = World::new(4 * slot_bytes());
    for share in [0..4, 2..6, 1..3, 0..4] {
        let share: BTreeSet<ExpertKey> = share.map(|expert| key(0, expert)).collect();
        world.cache.keep(share.clone());
        let mut flight = Flight::begin(&world, share.iter().copied().take(2));
        share.iter().for_each(|&key| world.cache.load(key, drop));
        for _ in 0..20 {
            world.held.end(0, false);
        }
        flight.run(&world);
        assert!(flight.needs.is_empty() && world.cache.is_complete(), "{share:?}");
    }
}
