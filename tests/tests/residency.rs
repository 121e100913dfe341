//! A cluster that serves more than its memory holds: the same bits, within the budget.

use std::sync::Arc;

use lite_llm_runtime::{checkpoint::Checkpoint, expert::ExpertStore};
use lite_llm_tests::{Outcome, Setup, job, reference, run, run_together};
use lite_llm_transport::messages::JobRequest;

/// Bytes of all experts of a model.
fn all_bytes(checkpoint: &Checkpoint) -> u64 {
    let tiers = checkpoint.tier_expert_bytes();
    checkpoint
        .config()
        .expert_keys()
        .map(|key| tiers[usize::from(key.tier)].next_multiple_of(4096))
        .sum()
}

/// Requests of different lengths and chunks.
fn requests(checkpoint: &Checkpoint) -> Vec<JobRequest> {
    let vocab = checkpoint.config().vocab;
    (0..6usize)
        .map(|n| {
            let prompt: Vec<u32> =
                (0..2 + 5 * n).map(|i| ((n * 7919 + i * 104_729 + 13) % vocab) as u32).collect();
            job(&prompt, 6, [0, 1, 3][n % 3])
        })
        .collect()
}

#[tokio::test]
async fn less_memory_changes_no_bit_and_is_never_exceeded() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let all = all_bytes(&checkpoint);
    let requests = requests(&checkpoint);
    let resident = Setup::default().start(&checkpoint).await;
    let mut expected: Vec<Outcome> = Vec::new();
    for request in &requests {
        expected.push(run(&resident, request.clone()).await.unwrap());
    }
    assert!(resident.stores().iter().all(|store| store.counters().evictions == 0));
    resident.stop().await;
    for workers in [1, 3] {
        for percent in [100, 50, 25, 10] {
            // A worker holds a few experts at least.
            let share = (all * percent / 100).div_ceil(workers as u64);
            let dram_bytes =
                share.max(4 * checkpoint.tier_expert_bytes()[0].next_multiple_of(4096));
            let cluster =
                Setup { workers, dram_bytes, ..Setup::default() }.start(&checkpoint).await;
            let answers = run_together(&cluster, requests.clone()).await;
            for (n, (answer, alone)) in answers.iter().zip(&expected).enumerate() {
                let same = answer.as_ref().is_ok_and(|answer| answer == alone);
                assert!(same, "request {n}, {percent} %, {workers} workers: {answer:?}");
            }
            for store in cluster.stores() {
                let (held, budget) = (store.resident_bytes(), store.budget());
                assert!(held <= budget && budget <= dram_bytes, "{held} of {budget}");
                assert_eq!(store.counters().evictions > 0, percent < 100, "{percent} %");
            }
            cluster.stop().await;
        }
    }
}

#[tokio::test]
async fn an_expert_that_cannot_be_read_fails_who_needs_it_and_nobody_else() {
    let (folder, checkpoint, _) = reference("olmoe");
    let all = all_bytes(&checkpoint);
    let requests = requests(&checkpoint);
    let cluster = Setup { dram_bytes: all / 4, ..Setup::default() }.start(&checkpoint).await;
    for request in &requests {
        run(&cluster, request.clone()).await.unwrap();
    }
    // One shard's experts are overwritten while they are served: what was read before is right,
    // what is read now is noticed.
    let mut shards = Vec::new();
    collect(folder.path(), &mut shards);
    assert!(!shards.is_empty());
    for shard in &shards {
        let mut bytes = std::fs::read(shard).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..].fill(0x55);
        std::fs::write(shard, bytes).unwrap();
    }
    let (mut failed, mut right) = (0, 0);
    for request in &requests {
        match run(&cluster, request.clone()).await {
            Ok(_) => right += 1,
            Err(reason) => {
                failed += 1;
                assert!(reason.contains("expert") && reason.contains("safetensors"), "{reason}");
            }
        }
    }
    assert!(failed > 0, "{right} right");
    cluster.stop().await;
}

/// All shards of experts below a folder.
fn collect(folder: &std::path::Path, into: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.to_string_lossy().contains("tiers")
            && path.extension().is_some_and(|extension| extension == "safetensors")
        {
            into.push(path);
        }
    }
}

#[tokio::test]
async fn a_budget_without_room_for_a_few_experts_is_refused_with_a_sentence() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let setup = Setup { dram_bytes: 100, ..Setup::default() };
    let error = setup.try_start(&checkpoint).await.err().expect("it cannot start").to_string();
    assert!(error.contains("--dram"), "{error}");
    drop(Arc::clone(&checkpoint));
}
