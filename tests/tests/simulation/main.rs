//! Whole clusters in virtual time, with faults: every job ends once with the tokens of the lone run,
//! and the cluster is whole again after the last fault.
//!
//! `LITE_LLM_HISTORIES=100000 cargo test --release -p lite-llm-tests --test simulation` runs a
//! campaign (`.ci/long` does); `LITE_LLM_SEED=n` replays one history.

mod network;
mod world;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use lite_llm_runtime::{sampler::Sampling, sequence::Request};
use lite_llm_tests::tiny::TinyModel;
use world::{Defect, Model, World};

/// Histories of a run that nobody asked to be longer.
const HISTORIES: u64 = 300;
/// Histories within which a defect that was put in on purpose is to be found.
const DEFECTS_WITHIN: u64 = 2000;
/// Virtual time after the last fault in which the cluster is to be whole again.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);

fn model() -> Arc<Model> {
    let tiny = TinyModel::load();
    let jobs = (0..8u32).map(|n| {
        let prompt: Vec<u32> = (0..2 + 5 * n % 17).map(|i| (i * 31 + n * 7) % 256).collect();
        let mut request = Request::greedy(prompt, 3 + (n as usize * 5) % 14);
        if n % 2 == 1 {
            let (temperature, top_p, seed) = (0.9, 0.9, n.into());
            let sampling = Sampling { temperature, top_p, seed, ..Sampling::GREEDY };
            request = Request { sampling, prefill_chunk: 3, ..request };
        }
        let tokens = tiny.alone(&request);
        (request, tokens)
    });
    let jobs = jobs.collect();
    Arc::new(Model { tiny, jobs })
}

/// What some histories came to: events, injected faults by name, and what went wrong by seed.
type Found = (u64, BTreeMap<&'static str, u64>, Vec<(u64, String)>);

/// One history. Returns it at its end.
fn history(model: &Arc<Model>, seed: u64, defect: Option<Defect>) -> World {
    let mut world = World::new(model.clone(), seed, defect);
    let jobs = 2 + world.dice.below(6) as usize;
    let faults = world.dice.below(6) as usize;
    let last = world.plan(jobs, faults).max(Duration::from_secs(5));
    world.run(last, last + SETTLES_WITHIN);
    world
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

#[test]
fn every_job_ends_once_with_its_own_tokens_and_the_cluster_is_whole_again() {
    let model = model();
    if let Some(seed) = number("LITE_LLM_SEED") {
        let world = history(&model, seed, None);
        println!("{} events, {:?}, {:?}", world.events, world.injected, world.wrong);
        assert_eq!(world.wrong, None);
        return;
    }
    let histories = number("LITE_LLM_HISTORIES").unwrap_or(HISTORIES);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let (next, begun) = (AtomicU64::new(0), Instant::now());
    let results: Vec<Found> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let (mut events, mut injected, mut wrong) = (0, BTreeMap::new(), Vec::new());
                    loop {
                        let seed = next.fetch_add(1, Relaxed);
                        if seed >= histories || wrong.len() > 3 {
                            return (events, injected, wrong);
                        }
                        let world = history(&model, seed, None);
                        events += world.events;
                        for (name, count) in &world.injected {
                            *injected.entry(*name).or_default() += count;
                        }
                        wrong.extend(world.wrong.map(|what| (seed, what)));
                    }
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let mut injected: BTreeMap<&str, u64> = BTreeMap::new();
    let events: u64 = results.iter().map(|(events, ..)| events).sum();
    for (name, count) in results.iter().flat_map(|(_, injected, _)| injected) {
        *injected.entry(name).or_default() += count;
    }
    let took = begun.elapsed();
    println!(
        "{histories} histories (seeds 0..{histories}), {events} events, {took:?}: {injected:?}"
    );
    let mut wrong: Vec<_> = results.into_iter().flat_map(|(.., wrong)| wrong).collect();
    wrong.sort();
    assert!(
        wrong.is_empty(),
        "{} wrong, first of them: {:#?}",
        wrong.len(),
        &wrong[..wrong.len().min(3)]
    );
}

#[test]
fn one_seed_is_one_history() {
    let model = model();
    for seed in [3, 17, 58] {
        let (a, b) = (history(&model, seed, None), history(&model, seed, None));
        assert_eq!((a.events, a.digest()), (b.events, b.digest()), "seed {seed}");
    }
}

#[test]
fn defects_put_in_on_purpose_are_found() {
    let model = model();
    for defect in [
        Defect::LostResend,
        Defect::TokenTwice,
        Defect::StaleEpoch,
        Defect::ReplicaDiffers,
        Defect::EndTwice,
    ] {
        let found = (0..DEFECTS_WITHIN).find_map(|seed| {
            history(&model, seed, Some(defect)).wrong.map(|what| (seed + 1, what))
        });
        let Some((histories, what)) = found else { panic!("{defect:?} was not found") };
        println!("{defect:?}: found after {histories} histories: {what}");
    }
}
