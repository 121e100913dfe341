//! Agreement with software that is not ours: transformers' logits, greedy tokens and chosen
//! experts for a model of each class, through import and a cluster of two nodes.

use lite_llm_tests::{Outcome, ReferencePrompt, Setup, job, reference, run};

/// The chosen experts of one prompt as `[layers][rows]` sorted sets.
fn sets(outcome: &Outcome, layers: usize, k: usize) -> Vec<Vec<Vec<i32>>> {
    let mut sets = vec![Vec::new(); layers];
    let mut rest = outcome.experts.as_slice();
    for &rows in &outcome.chunks {
        for set in &mut sets {
            let (mine, others) = rest.split_at(rows * k);
            rest = others;
            set.extend(mine.chunks_exact(k).map(sorted));
        }
    }
    sets
}

fn sorted(experts: &[i32]) -> Vec<i32> {
    let mut experts = experts.to_vec();
    experts.sort_unstable();
    experts
}

fn expected_sets(prompt: &ReferencePrompt, layers: usize) -> Vec<Vec<Vec<i32>>> {
    let per_layer = prompt.experts.len() / layers;
    prompt
        .experts
        .chunks_exact(per_layer)
        .map(|layer| layer.chunks_exact(prompt.k).map(sorted).collect())
        .collect()
}

async fn agrees(name: &str) {
    let (_folder, checkpoint, reference) = reference(name);
    let layers = checkpoint.config().sparse_layers().count();
    let cluster = Setup { workers: 2, ..Setup::default() }.start(&checkpoint).await;
    for (n, prompt) in reference.prompts.iter().enumerate() {
        let outcome = run(&cluster, job(&prompt.ids, 32, 0)).await.expect("the job ends well");
        assert_eq!(outcome.tokens, prompt.greedy, "{name}, prompt {n}: greedy tokens");
        let logits = outcome.logits();
        assert_eq!(logits.len(), prompt.logits.len(), "{name}, prompt {n}: rows of logits");
        let worst =
            logits.iter().zip(&prompt.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= reference.tolerance, "{name}, prompt {n}: a logit differs by {worst}");
        assert_eq!(
            sets(&outcome, layers, prompt.k),
            expected_sets(prompt, layers),
            "{name}, prompt {n}: chosen experts"
        );
    }
    cluster.stop().await;
}

#[tokio::test]
async fn mixtral() {
    agrees("mixtral").await;
}

#[tokio::test]
async fn olmoe() {
    agrees("olmoe").await;
}

#[tokio::test]
async fn qwen2_moe() {
    agrees("qwen2_moe").await;
}

#[tokio::test]
async fn qwen3_moe() {
    agrees("qwen3_moe").await;
}

#[tokio::test]
async fn qwen3_moe_in_bf16_and_several_files() {
    agrees("qwen3_moe_bf16_sharded").await;
}
