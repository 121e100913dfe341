//! The same request gives the same bits: on any number of nodes, in any company, at any placement,
//! in any chunks, with any threads and vector instructions.
//!
//! Each test compares every logit, every chosen expert and a greedy continuation with those of
//! one node of one thread that computes the prompt at once, alone.

use std::sync::Arc;

use lite_llm_actors::{local::LocalCluster, placement::PlacementPolicy};
use lite_llm_kernels::{dtype::DType, kv::KvDType, simd::Simd};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    import::{ImportOptions, import},
};
use lite_llm_tests::{Outcome, Setup, demo, imported, job, reference, root, run, run_alone};
use lite_llm_transport::messages::{Choosing, JobEventBody, JobRequest, Prompt, Serving};

/// Tokens generated after the prompt.
const GREEDY: u32 = 8;

/// A prompt longer than two pages of the cache and than a chunk of 64.
fn prompt(checkpoint: &Checkpoint) -> Vec<u32> {
    let vocab = checkpoint.config().vocab as u32;
    (0..150).map(|i| (i * 7919 + 13) % vocab).collect()
}

/// The two models that the claim is checked on.
fn models() -> (tempfile::TempDir, [Arc<Checkpoint>; 2]) {
    let (folder, olmoe, _) = reference("olmoe");
    assert!(olmoe.config().moe.as_ref().is_some_and(|moe| moe.experts() >= 8));
    (folder, [demo(), olmoe])
}

async fn truth(checkpoint: &Arc<Checkpoint>) -> Outcome {
    run_alone(checkpoint, Setup::default(), job(&prompt(checkpoint), GREEDY, 0)).await
}

/// Logits and tokens; routes are compared where the chunks are the same.
fn assert_same(found: &Outcome, truth: &Outcome, what: &str) {
    assert_eq!(found.tokens, truth.tokens, "tokens: {what}");
    assert_eq!(found.logits.len(), truth.logits.len(), "rows: {what}");
    let differing = found.logits.iter().zip(&truth.logits).filter(|(a, b)| a != b).count();
    assert_eq!(differing, 0, "logits that differ: {what}");
    if found.chunks == truth.chunks {
        assert_eq!(found.experts, truth.experts, "routes: {what}");
    }
}

/// Hash of the demo model's logits, seen on an AMD Zen 4 and an Intel Xeon, scalar to AVX-512.
/// It changes only with the version of the determinism contract.
const DEMO_LOGITS: &str = "8634a6fbd83f4046ec7437f9eac428fe1bf3e4494787270b0e87d14f3725a319";

#[tokio::test]
async fn on_this_machine_as_on_others() {
    let truth = truth(&demo()).await;
    let hash = blake3::hash(bytemuck::cast_slice(&truth.logits));
    assert_eq!(hash.to_hex().as_str(), DEMO_LOGITS);
}

#[tokio::test]
async fn on_any_number_of_nodes() {
    let (_folder, models) = models();
    for checkpoint in &models {
        let truth = truth(checkpoint).await;
        for workers in [2, 3, 5] {
            let setup = Setup { workers, ..Setup::default() };
            let found = run_alone(checkpoint, setup, job(&prompt(checkpoint), GREEDY, 0)).await;
            assert_same(&found, &truth, &format!("{workers} workers"));
        }
    }
}

#[tokio::test]
async fn at_any_placement() {
    let (_folder, models) = models();
    for checkpoint in &models {
        let truth = truth(checkpoint).await;
        for seed in 1..=4 {
            let placement = PlacementPolicy::Random(seed);
            let setup = Setup { workers: 3, placement, ..Setup::default() };
            let found = run_alone(checkpoint, setup, job(&prompt(checkpoint), GREEDY, 0)).await;
            assert_same(&found, &truth, &format!("placement {seed}"));
        }
    }
}

#[tokio::test]
async fn in_any_chunks() {
    let (_folder, models) = models();
    for checkpoint in &models {
        let truth = truth(checkpoint).await;
        let cluster = Setup { workers: 2, ..Setup::default() }.start(checkpoint).await;
        for chunk in [1, 7, 64] {
            let found = run(&cluster, job(&prompt(checkpoint), GREEDY, chunk)).await.unwrap();
            assert_same(&found, &truth, &format!("chunks of {chunk}"));
        }
        cluster.stop().await;
    }
}

#[tokio::test]
async fn with_any_threads_and_vector_instructions() {
    let (_folder, models) = models();
    for checkpoint in &models {
        let truth = truth(checkpoint).await;
        for simd in Simd::available() {
            for threads in [1, 2, 3] {
                let setup = Setup { threads, simd, ..Setup::default() };
                let found = run_alone(checkpoint, setup, job(&prompt(checkpoint), GREEDY, 0)).await;
                assert_same(&found, &truth, &format!("{simd}, {threads} threads"));
            }
        }
    }
}

#[tokio::test]
async fn with_any_format_of_the_cache_which_alone_changes_them() {
    let (_folder, models) = models();
    for checkpoint in &models {
        let mut truths: Vec<Outcome> = Vec::new();
        for kv_dtype in KvDType::ALL {
            let alone = Setup { kv_dtype, ..Setup::default() };
            let truth = run_alone(checkpoint, alone, job(&prompt(checkpoint), GREEDY, 0)).await;
            let simd = Simd::Scalar;
            for setup in [
                Setup { workers: 3, placement: PlacementPolicy::Random(5), ..alone },
                Setup { threads: 3, ..alone },
                Setup { workers: 2, simd, ..alone },
            ] {
                let cluster = setup.start(checkpoint).await;
                for chunk in [0, 13, 64] {
                    let job = job(&prompt(checkpoint), GREEDY, chunk);
                    let found = run(&cluster, job).await.unwrap();
                    let what = format!("{kv_dtype} cache, {setup:?}, chunks of {chunk}");
                    assert_same(&found, &truth, &what);
                }
                cluster.stop().await;
            }
            let differs = truths.iter().all(|other| other.logits != truth.logits);
            assert!(differs, "{kv_dtype} reaches the arithmetic");
            truths.push(truth);
        }
    }
}

/// Hashes of the demo model's logits with weights in blocks.
const DEMO_LOGITS_IN_BLOCKS: [(DType, &str); 3] = [
    (DType::Int8, "d8847d259ec22db9f40beecb8a4f712932d13945230db9240c7d1465bd6ef884"),
    (DType::Int6, "89ebea451b57b643c1d9646feb5576aba981cc0059497386b21a0165427eadeb"),
    (DType::Int4, "f57a3c97b17f9fc699a9f5ce76d0446353d4b90712acc932f909e409ae04baee"),
];

#[tokio::test]
async fn with_weights_in_blocks() {
    for (dtype, pinned) in DEMO_LOGITS_IN_BLOCKS {
        let (_folder, checkpoint) = imported(root().join("models/manpages-moe"), Some(dtype));
        let truth = truth(&checkpoint).await;
        let hash = blake3::hash(bytemuck::cast_slice(&truth.logits));
        assert_eq!(hash.to_hex().as_str(), pinned, "{dtype}");
        let placement = PlacementPolicy::Random(3);
        let mut setups = vec![Setup { workers: 3, placement, ..Setup::default() }];
        for simd in Simd::available() {
            setups.push(Setup { simd, threads: 2, ..Setup::default() });
        }
        for setup in setups {
            let cluster = setup.start(&checkpoint).await;
            for chunk in [0, 5, 64] {
                let job = job(&prompt(&checkpoint), GREEDY, chunk);
                let found = run(&cluster, job).await.unwrap();
                assert_same(&found, &truth, &format!("{dtype}, {setup:?}, chunks of {chunk}"));
            }
            cluster.stop().await;
        }
    }
}

/// Tokens with the bits of their log-probabilities.
async fn scored(
    cluster: &LocalCluster,
    tiers: &str,
    prompt: &[u32],
    temperature: f32,
) -> Result<Vec<(u32, u32)>, String> {
    let request = JobRequest {
        tiers: tiers.into(),
        temperature,
        seed: 3,
        ..JobRequest::greedy(Prompt::Tokens(prompt.to_vec()), 60)
    };
    let choosing = Choosing { logprobs: Some(0), ..Choosing::default() };
    let submitted = cluster.coordinator().submit_order(request, choosing, Serving::default()).await;
    let (_, mut events) = submitted.map_err(|error| error.to_string())?;
    let mut tokens = Vec::new();
    while let Some(event) = events.recv().await {
        match event.body {
            JobEventBody::Scored(token) => tokens.push((token.id, token.logprob.to_bits())),
            JobEventBody::Done { .. } => return Ok(tokens),
            JobEventBody::Failed { reason } => return Err(reason),
            _ => {}
        }
    }
    Err("no last event".into())
}

#[tokio::test]
async fn with_drafts_of_a_tier_wherever_experts_are() {
    let folder = tempfile::tempdir().unwrap();
    let options = ImportOptions {
        tiers: Some("tier_1b:1x8,tier_10b:1x8".parse().unwrap()),
        routes: Some("2x1x2".parse().unwrap()),
        ..ImportOptions::new(root().join("tests/data/hf-refs/olmoe"), &*folder.path().join("cut"))
    };
    import(&options, &mut |_, _, _| {}).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(folder.path().join("cut")).unwrap());
    let prompt = prompt(&checkpoint);
    let mut truths: Vec<Vec<(u32, u32)>> = Vec::new();
    for workers in [1, 3] {
        let cluster = Setup { workers, ..Setup::default() }.start(&checkpoint).await;
        for (at, temperature) in [0.0, 0.9].into_iter().enumerate() {
            if workers == 1 {
                truths.push(scored(&cluster, "all", &prompt, temperature).await.unwrap());
            }
            for _ in 0..2 {
                let drafted = "all drafted by tier_1b";
                let found = scored(&cluster, drafted, &prompt, temperature).await.unwrap();
                assert_eq!(found, truths[at], "{workers} workers, temperature {temperature}");
            }
        }
        let nodes = cluster.coordinator().residences().await.unwrap();
        let guessed: u64 = nodes.iter().map(|node| node.schedule.guessed).sum();
        assert!(guessed > 0, "{workers} workers");
        for (tiers, words) in [
            ("all drafted by tier_1t", "the model has no tier tier_1t"),
            ("tier_10b drafted by tier_1b", "the request's tiers are tier_10b"),
        ] {
            let error = scored(&cluster, tiers, &prompt, 0.0).await.unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        cluster.stop().await;
    }
}

#[tokio::test]
async fn alone_and_among_sixteen_others() {
    let (_folder, models) = models();
    for checkpoint in &models {
        let truth = truth(checkpoint).await;
        let vocab = checkpoint.config().vocab as u32;
        for workers in [1, 3] {
            let cluster = Setup { workers, threads: 2, ..Setup::default() }.start(checkpoint).await;
            let cluster = Arc::new(cluster);
            let mut jobs = tokio::task::JoinSet::new();
            for other in 0..16u32 {
                let length = 5 + (other * 11) % 90;
                let tokens: Vec<u32> =
                    (0..length).map(|i| (i * 31 + other * 977) % vocab).collect();
                let (cluster, chunk) = (cluster.clone(), other % 5 * 13);
                jobs.spawn(async move { run(&cluster, job(&tokens, 24, chunk)).await.map(|_| ()) });
            }
            // It arrives while the others are under way, twice, so that it meets prompts and
            // decoding sequences.
            for _ in 0..2 {
                let found = run(&cluster, job(&prompt(checkpoint), GREEDY, 0)).await.unwrap();
                assert_same(&found, &truth, &format!("among 16 others on {workers} workers"));
            }
            while let Some(ended) = jobs.join_next().await {
                ended.expect("no panic").expect("the others end well too");
            }
            let cluster = Arc::into_inner(cluster).expect("all jobs have ended");
            cluster.stop().await;
        }
    }
}
