//! The machine as the engine drives it: by hand, and over random histories with a cache whose pages
//! remember what was written into them.

use std::{
    collections::VecDeque,
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    checkpoint::Checkpoint,
    draft::Speculation,
    random::{Purpose, random_u64},
    sequence::EndReason,
    tier::{TIER_1B, TIER_10B, TierConfig},
};

fn config() -> &'static ModelConfig {
    static CONFIG: OnceLock<ModelConfig> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let mut config = Checkpoint::open(demo).unwrap().config().clone();
        let moe = config.moe.as_mut().unwrap();
        moe.tiers.push(TierConfig::new(TIER_10B, 1, 16, 0));
        config
    })
}

/// A schedule whose passes are computed at once.
struct Driven(Schedule);

impl Driven {
    fn new(pages: usize) -> Self {
        Self(Schedule::new(pages))
    }

    fn submit(&mut self, id: u64, request: Request) {
        self.0.submit(id, request, config()).unwrap();
    }

    /// Computes a pass: every sequence at its end gets a token, or ends.
    fn finish(&mut self, plan: &Plan) {
        self.0.turn(&plan.sequences);
        for (&id, chunk) in plan.sequences.iter().zip(&plan.chunks) {
            self.0.computed(id, chunk.tokens.len());
            let sequence = self.0.get_mut(id).unwrap();
            if sequence.cached == sequence.tokens.len() {
                sequence.tokens.push(7);
            }
            self.0.verified(id, 0);
            let sequence = self.0.get_mut(id).unwrap();
            if sequence.end(config()).is_some() {
                self.0.release(id);
            }
        }
    }

    fn pass(&mut self) -> Vec<(u64, usize)> {
        let plan = self.0.plan(false, config()).expect("there is something to do");
        self.finish(&plan);
        plan.sequences.iter().copied().zip(plan.chunks.iter().map(|c| c.tokens.len())).collect()
    }
}

fn text(seed: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|at| (seed * 31 + at) % 97).collect()
}

#[test]
fn decodes_lead_prompts_and_share_one_pass() {
    let mut driven = Driven::new(64);
    driven.submit(0, Request::greedy(text(0, 30), 10));
    assert_eq!(driven.pass(), [(0, 30)]);
    driven.submit(1, Request::greedy(text(1, 600), 10));
    driven.submit(2, Request::greedy(text(2, 30), 10));
    let first = driven.0.plan(false, config()).unwrap();
    assert_eq!(first.sequences, [0, 1], "the older prompt fills the pass");
    assert_eq!(first.chunks[1].tokens.len(), PASS_TOKENS_MAX - 1);
    let second = driven.0.plan(false, config()).unwrap();
    assert_eq!(second.sequences, [2]);
    driven.finish(&second);
    assert!(driven.0.plan(false, config()).is_none(), "a decode waits for the pass that decodes");
    assert_eq!(
        driven.0.plan(true, config()).unwrap().sequences,
        [2],
        "unless that waits for weights"
    );
    driven.0.turn(&[2]);
    driven.finish(&first);
    assert_eq!(driven.pass(), [(2, 1), (0, 1), (1, 600 - (PASS_TOKENS_MAX - 1))]);
}

#[test]
fn who_needs_a_page_takes_it_from_the_youngest_and_that_one_begins_again() {
    let mut driven = Driven::new(3);
    driven.submit(0, Request::greedy(text(0, PAGE_TOKENS), 2 * PAGE_TOKENS));
    driven.submit(1, Request::greedy(text(1, PAGE_TOKENS - 1), PAGE_TOKENS));
    assert_eq!(driven.pass(), [(0, PAGE_TOKENS), (1, PAGE_TOKENS - 1)]);
    let mut seen = Vec::new();
    while driven.0.len() > 0 {
        seen.extend(driven.pass());
    }
    assert!(driven.0.stats().preemptions > 0);
    let again = seen.iter().filter(|(id, rows)| *id == 1 && *rows > 1).count();
    assert!(again > 0, "its prompt and answer are computed again: {seen:?}");
    let first = seen.iter().filter(|(id, _)| *id == 0);
    assert!(first.into_iter().all(|(_, rows)| *rows == 1), "the older one goes on");
}

#[test]
fn higher_priorities_go_first_and_take_pages_from_lower_ones() {
    let mut driven = Driven::new(3);
    driven.submit(0, Request::greedy(text(0, 2 * PAGE_TOKENS), 40));
    driven.pass();
    let urgent = Request { priority: 1, ..Request::greedy(text(1, 2 * PAGE_TOKENS), 1) };
    driven.submit(1, urgent);
    let pass = driven.pass();
    assert!(pass.contains(&(1, 2 * PAGE_TOKENS)), "{pass:?}");
    assert_eq!(driven.0.stats().preemptions, 1);
    driven.pass();
}

#[test]
fn tenants_get_equal_shares_however_much_they_ask_for() {
    let mut driven = Driven::new(400);
    let of = |tenant: &str, seed| Request {
        tenant: tenant.into(),
        ..Request::greedy(text(seed, 500), 0)
    };
    for id in 0..20 {
        driven.submit(id, of("many", id as u32));
    }
    driven.pass();
    driven.submit(20, of("one", 20));
    driven.submit(21, of("one", 21));
    let mut order = Vec::new();
    while driven.0.len() > 0 {
        order.extend(driven.pass().into_iter().filter(|(_, rows)| *rows > 100).map(|(id, _)| id));
    }
    let place = |id| order.iter().position(|&other| other == id).unwrap();
    assert!(place(20) < 3 && place(21) < 6, "{order:?}");
}

#[test]
fn a_prefix_is_computed_once_but_never_for_another_tenant() {
    let mut driven = Driven::new(64);
    let shared = text(5, 5 * PAGE_TOKENS + 3);
    driven.submit(0, Request::greedy(shared.clone(), 1));
    driven.pass();
    let longer = [&shared[..], &text(6, 10)].concat();
    driven.submit(1, Request::greedy(longer.clone(), 1));
    assert_eq!(driven.pass(), [(1, 13)]);
    driven.submit(2, Request { tenant: "b".into(), ..Request::greedy(longer.clone(), 1) });
    assert_eq!(driven.pass(), [(2, longer.len())]);
    driven.submit(3, Request { logits: true, ..Request::greedy(longer.clone(), 1) });
    assert_eq!(driven.pass(), [(3, longer.len())], "its logits are wanted of every position");
    assert_eq!(driven.0.stats().found, 5 * PAGE_TOKENS as u64);
}

/// What was written at a position: the sequence's tokens up to there, whose they are, and whether they
/// are a draft's.
type Written = (String, bool, Vec<u32>);

/// What every sequence goes on with: mostly what was there before.
fn answer(at: usize) -> u32 {
    if at.is_multiple_of(11) { 96 } else { at as u32 % 7 }
}

/// What a tier drafts: mostly what is right.
fn drafted(at: usize) -> Vec<f32> {
    let guess = if at.is_multiple_of(5) { 95 } else { answer(at) };
    (0..97).map(|id| f32::from(u8::from(id == guess))).collect()
}

/// Runs a random history to its end; what was planned, for comparison.
fn history(seed: u64) -> Vec<(Vec<u64>, Vec<usize>)> {
    let mut draws = 0;
    let mut draw = |below: u64| {
        draws += 1;
        random_u64(random_u64(seed, Purpose::Weights, 1), Purpose::Weights, draws) % below
    };
    let pages = 4 + draw(20) as usize;
    let mut schedule = Schedule::new(pages);
    let mut written: HashMap<(u32, usize), Written> = HashMap::new();
    let mut flights: VecDeque<Plan> = VecDeque::new();
    let (mut next, mut plans, mut idle) = (0, Vec::new(), 0);
    let total = 5 + draw(30);
    let (mut now, timed) = (Instant::now(), draw(2) == 0);
    while next < total || schedule.len() > 0 {
        now += Duration::from_millis(draw(20));
        if timed {
            schedule.at(now);
        }
        match draw(10) {
            0..3 if next < total => {
                let most = pages * PAGE_TOKENS;
                let prompt = 1 + draw(most as u64 / 2) as usize;
                let answer = draw((most - prompt).min(100) as u64) as usize;
                let request = Request {
                    tenant: ["a", "b"][draw(2) as usize].into(),
                    priority: draw(3) as i8,
                    prefill_chunk: [0, 7, 64][draw(3) as usize],
                    logits: draw(8) == 0,
                    speculate: match draw(3) {
                        0 => Speculation::Off,
                        1 => Speculation::Ngram,
                        _ => Speculation::Tier(TIER_1B),
                    },
                    ..Request::greedy(text(draw(3) as u32, prompt), answer)
                };
                schedule.submit(next, request, config()).unwrap();
                next += 1;
            }
            3 => {
                let id = draw(total);
                if let Some(sequence) = schedule.get_mut(id) {
                    sequence.cancelled = true;
                    if !sequence.in_pass {
                        schedule.release(id);
                    }
                }
            }
            4 => {
                let id = draw(total);
                let held = draw(3) == 0;
                if let Some(sequence) = schedule.get_mut(id) {
                    sequence.held = held;
                }
            }
            5..8 if flights.len() < 2 => {
                let apart = draw(4) == 0;
                let Some(plan) = schedule.plan(apart, config()) else {
                    idle += u32::from(flights.is_empty() && next == total);
                    assert!(idle < 10_000, "seed {seed}: nothing goes forward");
                    if idle > 100 {
                        // Readers that have fallen behind catch up in the end.
                        (0..total).for_each(|id| {
                            if let Some(sequence) = schedule.get_mut(id) {
                                sequence.held = false;
                            }
                        });
                    }
                    continue;
                };
                for (&id, chunk) in plan.sequences.iter().zip(&plan.chunks) {
                    let sequence = schedule.get(id).unwrap();
                    let place = |at: usize| (chunk.pages[at / PAGE_TOKENS], at % PAGE_TOKENS);
                    let (tenant, drafts) = (&sequence.request.tenant, sequence.drafts());
                    let after = match drafts {
                        true => sequence.drafted(usize::MAX),
                        false => sequence.guessed.clone(),
                    };
                    let own = [&sequence.tokens[..], &after].concat();
                    for at in 0..chunk.start {
                        let (whose, draft, tokens) = &written[&place(at)];
                        assert_eq!((whose, *draft), (tenant, drafts));
                        assert_eq!(tokens[..], own[..=at], "seed {seed}");
                    }
                    for at in chunk.start..chunk.start + chunk.tokens.len() {
                        assert_eq!(own[at], chunk.tokens[at - chunk.start]);
                        let text = own[..=at].to_vec();
                        written.insert(place(at), (tenant.clone(), drafts, text));
                    }
                }
                plans.push((
                    plan.sequences.clone(),
                    plan.chunks.iter().map(|chunk| chunk.tokens.len()).collect(),
                ));
                flights.push_back(plan);
            }
            _ => {
                let Some(plan) = flights.pop_front() else { continue };
                // What was written is still there: nobody else was given these pages.
                schedule.turn(&plan.sequences);
                for (&id, chunk) in plan.sequences.iter().zip(&plan.chunks) {
                    let place = |at| (chunk.pages[at / PAGE_TOKENS], at % PAGE_TOKENS);
                    if schedule.was_draft(id) {
                        let sequence = schedule.get(id).unwrap();
                        let own = [&sequence.tokens[..], &sequence.drafted(usize::MAX)].concat();
                        let end = chunk.start + chunk.tokens.len();
                        for at in 0..end {
                            assert_eq!(written[&place(at)].2, own[..=at], "seed {seed}");
                        }
                        let cancelled = sequence.cancelled;
                        let logits = match chunk.logits {
                            WantedLogits::Last => drafted(end),
                            _ => Vec::new(),
                        };
                        match draw(50) {
                            0 => schedule.draft_failed(id),
                            _ => schedule.drafted(id, chunk.tokens.len(), &logits),
                        }
                        if cancelled {
                            schedule.release(id);
                        }
                        continue;
                    }
                    let sequence = schedule.get(id).unwrap();
                    let own = chunk.tokens.len() - sequence.guessed.len();
                    for at in 0..chunk.start + own {
                        assert_eq!(written[&place(at)].2, sequence.tokens[..=at], "seed {seed}");
                    }
                    schedule.computed(id, chunk.tokens.len());
                    let sequence = schedule.get_mut(id).unwrap();
                    let mut right = 0;
                    while sequence.cached + right == sequence.tokens.len()
                        && sequence.end(config()).is_none()
                    {
                        let token = answer(sequence.tokens.len());
                        right += usize::from(sequence.guessed.get(right) == Some(&token));
                        sequence.tokens.push(token);
                    }
                    let right =
                        right.min(sequence.tokens.len().saturating_sub(1 + sequence.cached));
                    schedule.verified(id, right);
                    let sequence = schedule.get_mut(id).unwrap();
                    if let Some(reason) = sequence.end(config()) {
                        assert_ne!(reason, EndReason::EndOfText);
                        schedule.release(id);
                    }
                }
            }
        }
    }
    assert_eq!(schedule.pool.free(), pages, "seed {seed}: all pages come back");
    assert!(schedule.running.is_empty() && schedule.waiting.is_empty());
    assert!(schedule.tenants.is_empty());
    plans
}

#[test]
fn what_a_tier_drafts_is_verified_at_once_and_its_pages_are_given_up() {
    let mut driven = Driven::new(4);
    let speculate = Speculation::Tier(TIER_1B);
    let request = Request { speculate, ..Request::greedy(text(0, PAGE_TOKENS), 40) };
    driven.submit(0, request);
    assert_eq!(driven.pass(), [(0, PAGE_TOKENS)]);
    let pass = |driven: &mut Driven| {
        let plan = driven.0.plan(false, config()).unwrap();
        let first = (plan.chunks[0].tokens.len(), plan.chunks[0].tiers.count());
        driven.0.turn(&plan.sequences);
        match driven.0.was_draft(0) {
            true => driven.0.drafted(0, first.0, &[0.0, 1.0]),
            false => driven.finish(&plan),
        }
        (first, plan.sequences)
    };
    let rows: Vec<_> = (0..4).map(|_| pass(&mut driven).0).collect();
    assert_eq!(rows, [(PAGE_TOKENS + 1, 1), (1, 1), (1, 1), (4, 2)], "three drafts, one check");
    assert_eq!(driven.0.stats().guessed, 3);
    let used = driven.0.stats().pages_used;
    assert_eq!(used, 4, "two for the answer, two for the draft");
    // Another's prompt takes the draft's pages, and nobody begins again.
    driven.submit(1, Request::greedy(text(1, 20), 1));
    let passes = (1..9).find(|_| pass(&mut driven).1.contains(&1));
    assert!(passes.is_some_and(|passes| passes <= 2), "after one draft at most: {passes:?}");
    assert_eq!(driven.0.stats().preemptions, 0);
}

#[test]
fn random_histories_keep_pages_apart_and_end() {
    let histories = std::env::var("LITE_LLM_SCHEDULES").ok().and_then(|n| n.parse().ok());
    for seed in 0..histories.unwrap_or(300) {
        let plans = history(seed);
        if seed % 50 == 0 {
            assert_eq!(plans, history(seed), "equal calls give equal plans");
        }
    }
}
