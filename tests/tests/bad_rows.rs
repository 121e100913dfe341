//! One bad thing hurts nobody else: a row that is not finite, or an expert that cannot be had,
//! fails the requests concerned, each with its reason, and the others answer bit for bit as alone.

use std::{path::PathBuf, sync::Arc};

use lite_llm_kernels::matrix::{PackedMatrix, Source};
use lite_llm_runtime::{
    checkpoint::{
        Checkpoint, CheckpointError,
        layout::Part,
        writer::{Text, Writer},
    },
    expert::ExpertKey,
};
use lite_llm_tests::{Outcome, Setup, job, reference, run, run_alone, run_together};
use lite_llm_transport::messages::JobRequest;
use safetensors::SafeTensors;

/// Healthy requests in each test.
const OTHERS: usize = 16;

/// A checkpoint like another, but that the embedding of one token is NaN. No import writes such a
/// one, so this copies tensor by tensor.
fn poisoned(checkpoint: &Checkpoint, token: usize) -> (tempfile::TempDir, Arc<Checkpoint>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("poisoned");
    let config = checkpoint.config();
    let mut writer = Writer::create(&out, config, checkpoint.dtype()).unwrap();
    for part in Part::all(config) {
        let path = PathBuf::from(checkpoint.location()).join(part.path(config));
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let copied = writer.write_part(part, |spec, sink| {
            if spec.name != "embed" {
                return sink.write(tensors.tensor(&spec.name).unwrap().data());
            }
            let table = checkpoint.dense_matrix("embed")?;
            let (n, k) = (table.n(), table.k());
            let mut values = vec![0.0; n * k];
            values.chunks_mut(k).enumerate().for_each(|(row, values)| table.row(row, values));
            values[token * k + k / 2] = f32::NAN;
            sink.write(PackedMatrix::pack(spec.dtype, n, k, Source::F32(&values)).data())
        });
        copied.unwrap_or_else(|error: CheckpointError| panic!("{error}"));
    }
    let tokenizer_json = checkpoint.tokenizer_json().unwrap();
    writer.finish(&Text { tokenizer_json, ..Text::default() }).unwrap();
    let poisoned = Arc::new(Checkpoint::open(&out).unwrap());
    (folder, poisoned)
}

/// Requests of different lengths, and what each answers alone.
async fn healthy(
    checkpoint: &Arc<Checkpoint>,
    tokens: impl Fn(usize) -> usize,
    greedy: u32,
) -> Vec<(JobRequest, Vec<u32>, Outcome)> {
    let vocab = checkpoint.config().vocab;
    let cluster = Setup::default().start(checkpoint).await;
    let mut all = Vec::new();
    for n in 0..OTHERS {
        let prompt: Vec<u32> =
            (0..tokens(n)).map(|i| ((n * 7919 + i * 104_729 + 13) % vocab) as u32).collect();
        let request = job(&prompt, greedy, 0);
        let alone = run(&cluster, request.clone()).await.unwrap();
        all.push((request, prompt, alone));
    }
    cluster.stop().await;
    all
}

#[tokio::test]
async fn a_row_that_is_not_finite_fails_its_request_alone() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let healthy = healthy(&checkpoint, |n| 3 + 2 * n, 4).await;
    let unused = (0..checkpoint.config().vocab as u32).rev().find(|token| {
        healthy
            .iter()
            .all(|(_, prompt, alone)| !prompt.contains(token) && !alone.tokens.contains(token))
    });
    let token = unused.expect("some token occurs nowhere");
    let (_folder, poisoned) = poisoned(&checkpoint, token as usize);
    let bad: Vec<u32> = healthy[4].1.iter().copied().chain([token, 1, 2]).collect();
    for workers in [1, 2] {
        let cluster = Setup { workers, threads: 2, ..Setup::default() }.start(&poisoned).await;
        for at in [0, OTHERS / 2, OTHERS] {
            let mut requests: Vec<JobRequest> =
                healthy.iter().map(|(request, ..)| request.clone()).collect();
            requests.insert(at, job(&bad, 4, 0));
            let mut answers = run_together(&cluster, requests).await;
            let reason = answers.remove(at).expect_err("its embedding is no number");
            for part in ["`embed`", "layer 0", "NaN", &format!("token {token}:")] {
                assert!(reason.contains(part), "{part}: {reason}");
            }
            let position = format!("position {}", bad.len() - 3);
            assert!(reason.contains(&position), "{position}: {reason}");
            for (n, (answer, (.., alone))) in answers.into_iter().zip(&healthy).enumerate() {
                assert_eq!(answer.as_ref(), Ok(alone), "request {n} of {workers} workers");
            }
        }
        // The pages that it wrote to serve others afterwards.
        for (n, (request, _, alone)) in healthy.iter().enumerate() {
            let answer = run(&cluster, request.clone()).await;
            assert_eq!(answer.as_ref(), Ok(alone), "request {n} after it");
        }
        cluster.stop().await;
    }
}

#[tokio::test]
async fn a_missing_expert_fails_the_requests_that_route_to_it_alone() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let healthy = healthy(&checkpoint, |n| 1 + n % 3, 1).await;
    let config = checkpoint.config();
    let moe = config.moe.as_ref().unwrap();
    let layers: Vec<usize> = config.sparse_layers().collect();
    let uses = |outcome: &Outcome, layer: usize, flat: usize| {
        let rows: usize = outcome.chunks.iter().sum();
        let k = outcome.experts.len() / (rows * layers.len());
        let sets = outcome.expert_sets(layers.len(), k);
        sets[layer].iter().flatten().any(|&expert| expert as usize == flat)
    };
    // Of all experts the one that about half of the requests use.
    let users = |&(layer, flat): &(usize, usize)| {
        healthy.iter().filter(|(.., alone)| uses(alone, layer, flat)).count()
    };
    let all = (0..layers.len()).flat_map(|layer| (0..moe.experts()).map(move |e| (layer, e)));
    let (layer, flat) = all.min_by_key(|at| users(at).abs_diff(OTHERS / 2)).unwrap();
    let users = users(&(layer, flat));
    assert!((1..OTHERS).contains(&users), "{users} requests use it");
    let key = ExpertKey::from_flat(moe, layers[layer], flat).unwrap();
    for workers in [1, 2] {
        // So long is waited for somebody who has it.
        let patience = std::time::Duration::from_secs(1);
        let cluster = Setup { workers, patience, ..Setup::default() }.start(&checkpoint).await;
        cluster.stores().iter().for_each(|store| store.remove(key));
        for round in 0..2 {
            let requests = healthy.iter().map(|(request, ..)| request.clone()).collect();
            let answers = run_together(&cluster, requests).await;
            for (n, (answer, (.., alone))) in answers.iter().zip(&healthy).enumerate() {
                let what = format!("request {n} of {workers} workers, round {round}");
                match (uses(alone, layer, flat), answer) {
                    (false, answer) => assert_eq!(answer.as_ref(), Ok(alone), "{what}"),
                    (true, Ok(_)) => panic!("{what} used {key}, which is nowhere"),
                    (true, Err(reason)) => {
                        let (key, what) = (key.to_string(), format!("{what}: {reason}"));
                        assert!(reason.contains(&key), "{what}");
                        assert!(reason.contains("not in the store"), "{what}");
                    }
                }
            }
        }
        cluster.stop().await;
    }
    // With the expert in its place again all is well.
    let (request, _, alone) = &healthy[0];
    assert_eq!(&run_alone(&checkpoint, Setup::default(), request.clone()).await, alone);
}
