//! Agreement with software that is not ours: transformers' logits, greedy tokens and chosen
//! experts for a model of each class, through import and a cluster of two nodes.

use lite_llm_tests::{Setup, job, reference, run};

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
            outcome.expert_sets(layers, prompt.k),
            prompt.expert_sets(layers),
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
