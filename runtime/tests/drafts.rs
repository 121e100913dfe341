//! Drafts of a tier never change an answer: not its tokens, nor how likely each was; whatever is drafted,
//! taken away or fails. They end where they take longer than they save.

mod serving;

use std::{
    path::Path,
    sync::OnceLock,
    time::{Duration, Instant},
};

use lite_llm_runtime::{
    checkpoint::Checkpoint,
    draft::Speculation,
    engine::Step,
    export::{FILE_BYTES, export},
    forward::FailedRoute,
    import::{ImportOptions, import},
    sampler::Sampling,
    sequence::Request,
    tier::{TIER_1B, TIER_10B, TIER_100B, TierSet},
};
use serving::{Answer, Model, answers, text};

/// The demo model with its experts cut into two tiers, of which every token uses both.
fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/manpages-moe");
        let folder = tempfile::tempdir().unwrap();
        let (hf, cut) = (folder.path().join("hf"), folder.path().join("cut"));
        export(&Checkpoint::open(demo).unwrap(), &hf, FILE_BYTES, &mut |_, _| {}).unwrap();
        let options = ImportOptions {
            tiers: Some("tier_1b:1x8,tier_10b:1x8".parse().unwrap()),
            routes: Some("2x1x2".parse().unwrap()),
            ..ImportOptions::new(hf, &*cut)
        };
        import(&options, &mut |_, _, _| {}).unwrap();
        Model::open(cut)
    })
}

fn drafted(request: Request) -> Request {
    Request { speculate: Speculation::Tier(TIER_1B), ..request }
}

fn requests() -> Vec<Request> {
    let request = |seed: u32| {
        let sampling = match seed % 3 {
            0 => Sampling::GREEDY,
            1 => Sampling { temperature: 0.6, seed: seed.into(), ..Sampling::GREEDY },
            _ => Sampling { temperature: 0.3, frequency: 0.2, min_p: 0.05, ..Sampling::GREEDY },
        };
        let prompt = text(seed, 12 + 9 * seed as usize);
        Request { sampling, logprobs: Some(3), ..Request::greedy(prompt, 60) }
    };
    (0..7).map(request).collect()
}

#[test]
fn what_a_tier_drafts_never_changes_an_answer() {
    let plain = requests();
    let one = |request: &Request| model().answers(64, std::slice::from_ref(request)).0.remove(0);
    let alone: Vec<Answer> = plain.iter().map(one).collect();
    let requests: Vec<Request> = plain.into_iter().map(drafted).collect();
    assert_eq!(requests.iter().map(one).collect::<Vec<_>>(), alone);
    for pages in [64, 12, 7] {
        let (answers, stats) = model().answers(pages, &requests);
        assert_eq!(answers, alone, "{pages} pages");
        assert!(stats.guessed > 0, "{pages} pages: {stats:?}");
        // Where pages are few, drafts are few.
        assert!(stats.guessed_right > 0 || pages < 64, "{stats:?}");
        assert!(stats.guessed_right < stats.guessed, "wrong drafts are part of the test");
        assert_eq!(stats.pages_used, 0, "{stats:?}");
    }
}

#[test]
fn a_draft_that_fails_ends_and_the_answer_goes_on() {
    let request = drafted(requests().remove(0));
    let plain = Request { speculate: Speculation::Off, ..request.clone() };
    let truth = model().answers(64, &[plain]).0;
    for fails_at in 0..3 {
        let mut engine = model().engine(64);
        engine.submit(0, request.clone()).unwrap();
        let mut drafts = 0;
        loop {
            let pass = match engine.step() {
                Step::Idle => break,
                Step::Advanced => continue,
                Step::Dispatch(pass) => pass,
            };
            let routes = engine.routes(pass).unwrap().all();
            let is_draft = routes.iter().all(|route| route.key.tier == 0);
            drafts += u32::from(is_draft);
            if is_draft && drafts > 5 * fails_at {
                let hidden = vec![0.0; model().backbone.config.hidden];
                let parts = vec![&hidden[..]; routes.len()];
                let failed = FailedRoute { route: 0, reason: "its node is lost".into() };
                engine.combine(pass, &parts, &[failed]);
            } else {
                engine.run_pass(pass, &model().store);
            }
        }
        assert!(drafts > 0, "there was something to fail");
        assert_eq!(answers(&mut engine, 1), truth);
        assert_eq!(engine.stats().pages_used, 0);
    }
}

/// Guesses in a long answer, where a layer of a draft takes so long and one of all tiers 10 ms.
fn guesses(draft_ms: u64) -> (u64, Vec<Answer>) {
    let (mut engine, mut now) = (model().engine(64), Instant::now());
    let request = Request { logprobs: Some(0), ..Request::greedy(text(3, 20), 300) };
    engine.submit(0, drafted(request)).unwrap();
    loop {
        engine.at(now);
        match engine.step() {
            Step::Idle => break,
            Step::Advanced => {}
            Step::Dispatch(pass) => {
                let mut routes = engine.routes(pass).unwrap().all().iter();
                let is_draft = routes.all(|route| route.key.tier == 0);
                now += Duration::from_millis(if is_draft { draft_ms } else { 10 });
                engine.run_pass(pass, &model().store);
            }
        }
    }
    (engine.stats().guessed, answers(&mut engine, 1))
}

#[test]
fn drafts_go_on_where_they_save_time_and_end_where_they_do_not() {
    let ((quick, of_quick), (slow, of_slow)) = (guesses(0), guesses(15));
    assert!(quick > 150, "{quick} guesses in 300 tokens");
    assert!(slow < 60, "{slow} guesses in 300 tokens");
    assert_eq!(of_quick, of_slow);
}

#[test]
fn a_tier_that_cannot_draft_is_refused_before_the_request_begins() {
    let mut engine = model().engine(64);
    let request = |tiers, by| Request {
        speculate: Speculation::Tier(by),
        tiers,
        ..Request::greedy(vec![1, 2, 3], 5)
    };
    for (tiers, by, words) in [
        (
            TierSet::All,
            TIER_100B,
            "speculate: the model has no tier tier_100b; it has tier_1b, tier_10b",
        ),
        (TierSet::Only(vec![TIER_10B]), TIER_1B, "the request's tiers are tier_10b"),
        (TierSet::UpTo(TIER_1B), TIER_1B, "the request uses no other"),
    ] {
        let error = engine.submit(0, request(tiers, by)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    engine.submit(0, request(TierSet::All, TIER_10B)).unwrap();
}
