//! What the scheduler does changes times only: whatever it shares, takes away, computes again or
//! guesses, every answer has the tokens that it has alone.

mod serving;

use std::path::Path;

use lite_llm_kernels::kv::PAGE_TOKENS;
use lite_llm_runtime::{
    draft::Speculation,
    engine::{Event, Step},
    forward::FailedRoute,
    moe_layer::run_all,
    sampler::Sampling,
    sequence::Request,
};
use serving::{Answer, Model, answers, text};

fn demo() -> Model {
    Model::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/manpages-moe"))
}

/// What a request is answered alone, and without guesses.
fn alone(model: &Model, request: &Request) -> Answer {
    let request = Request { speculate: Speculation::Off, ..request.clone() };
    model.answers(64, &[request]).0.remove(0)
}

/// Greedy, or drawn by a seed.
fn sampling(seed: u32) -> Sampling {
    match seed % 2 {
        0 => Sampling::GREEDY,
        _ => Sampling { temperature: 0.8, seed: seed.into(), ..Sampling::GREEDY },
    }
}

fn request(seed: u32, prompt: Vec<u32>, answer: usize) -> Request {
    Request { sampling: sampling(seed), ..Request::greedy(prompt, answer) }
}

#[test]
fn every_answer_is_what_it_is_alone_also_if_its_pages_were_taken() {
    let model = demo();
    let requests: Vec<Request> =
        (0..12u32).map(|seed| request(seed, text(seed, 20 + 9 * seed as usize), 60)).collect();
    let alone: Vec<Answer> = requests.iter().map(|request| alone(&model, request)).collect();
    let (roomy, stats) = model.answers(64, &requests);
    assert_eq!((roomy, stats.preemptions), (alone.clone(), 0));
    let (narrow, stats) = model.answers(8, &requests);
    assert!(stats.preemptions > 0);
    assert_eq!(narrow, alone);
}

#[test]
fn an_answer_after_a_prefix_that_another_computed_is_what_it_is_alone() {
    let model = demo();
    let shared = text(1, 3 * PAGE_TOKENS + 5);
    let mut engine = model.engine(64);
    let mut found = 0;
    for seed in 0..6u32 {
        let prompt = [&shared[..], &text(seed, 1 + 40 * seed as usize)].concat();
        let request = request(seed, prompt, 20);
        engine.submit(0, request.clone()).unwrap();
        engine.run_local(&model.store);
        let answer = answers(&mut engine, 1).remove(0);
        assert_eq!(answer, alone(&model, &request));
        found += 3 * PAGE_TOKENS as u64 * u64::from(seed > 0);
        assert!(engine.stats().found >= found, "{:?}", engine.stats());
    }
}

#[test]
fn what_is_guessed_never_changes_an_answer() {
    let model = demo();
    // A text that comes again and again is often gone on with.
    let again: Vec<u32> = text(3, 12).repeat(5);
    let requests: Vec<Request> = (0..8u32)
        .map(|seed| {
            let prompt = [&again[..], &text(seed, seed as usize)].concat();
            Request { speculate: Speculation::Ngram, ..request(seed, prompt, 70) }
        })
        .collect();
    let alone: Vec<Answer> = requests.iter().map(|request| alone(&model, request)).collect();
    for pages in [64, 9] {
        let (answers, stats) = model.answers(pages, &requests);
        assert_eq!(answers, alone);
        assert!(stats.guessed > 0 && stats.guessed_right > 0, "{stats:?}");
        assert!(stats.guessed_right < stats.guessed, "wrong guesses are part of the test");
    }
}

#[test]
fn what_fails_one_leaves_the_prefix_that_it_shares_to_others() {
    let model = demo();
    let shared = text(1, 3 * PAGE_TOKENS + 5);
    let [first, second, third] = [3, 4, 5].map(|seed| {
        let prompt = [&shared[..], &text(seed, 9)].concat();
        request(seed, prompt, 40)
    });
    let mut engine = model.engine(64);
    engine.submit(0, first.clone()).unwrap();
    let (mut events, mut failed) = (Vec::new(), false);
    loop {
        events.extend(std::iter::from_fn(|| engine.poll_event()));
        let tokens = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        if tokens == 5 && !failed && engine.sequences() == 1 {
            engine.submit(1, second.clone()).unwrap();
        }
        let pass = match engine.step() {
            Step::Idle => break,
            Step::Advanced => continue,
            Step::Dispatch(pass) => pass,
        };
        let rows = engine.routes(pass).unwrap().rows();
        if tokens < 5 || rows < 2 || failed {
            engine.run_pass(pass, &model.store);
            continue;
        }
        // The last row is of the second's prompt.
        let dispatch = engine.dispatch(pass).unwrap();
        let device = &*model.backbone.device;
        let (outputs, _) = run_all(device, &model.store, &dispatch.hidden, dispatch.routes);
        let route = dispatch.routes.all().len() - 1;
        drop(dispatch);
        let parts: Vec<&[f32]> = outputs.chunks_exact(model.backbone.config.hidden).collect();
        engine.combine(pass, &parts, &[FailedRoute { route, reason: "its node is lost".into() }]);
        failed = true;
    }
    let ids = |events: &[Event], of: u64| -> Vec<u32> {
        let token = |event: &Event| match event {
            Event::Token { sequence, id, .. } if *sequence == of => Some(*id),
            _ => None,
        };
        events.iter().filter_map(token).collect()
    };
    assert!(events.iter().any(|event| matches!(event, Event::Failed { sequence: 1, .. })));
    let alone = |request: &Request| {
        alone(&model, request).into_iter().map(|(id, _)| id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&events, 0), alone(&first));
    engine.submit(2, third.clone()).unwrap();
    engine.run_local(&model.store);
    let events: Vec<Event> = std::iter::from_fn(|| engine.poll_event()).collect();
    assert_eq!(ids(&events, 2), alone(&third));
}
