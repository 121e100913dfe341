//! What weights in blocks of integers cost: how well the demo model still predicts, and how many
//! experts are still the ones that transformers chose with full weights.

use lite_llm_kernels::dtype::DType;
use lite_llm_runtime::tokenizer::Tokenizer;
use lite_llm_tests::{Setup, demo, imported, job, reference_as, root, run, shared};

/// Windows of the held-out text that are read, and their tokens.
const WINDOWS: usize = 12;
const WINDOW: usize = 512;

/// Perplexity of the demo model in a format, on the first windows of its held-out text.
async fn perplexity(dtype: Option<DType>, text: &str) -> f64 {
    let converted = dtype.map(|dtype| imported(root().join("models/manpages-moe"), Some(dtype)));
    let checkpoint = converted.as_ref().map_or_else(demo, |(_, checkpoint)| checkpoint.clone());
    let json = checkpoint.tokenizer_json().expect("the demo model has a tokenizer");
    let tokenizer = Tokenizer::from_json(&json).expect("which can be read");
    let ids = tokenizer.encode(text, false).expect("the text has tokens");
    let cluster = Setup { threads: 2, ..Setup::default() }.start(&checkpoint).await;
    let (mut nats, mut count) = (0.0, 0);
    for window in ids.chunks_exact(WINDOW).take(WINDOWS) {
        let outcome = run(&cluster, job(window, 0, 0)).await.expect("the job ends well");
        let vocab = checkpoint.config().vocab;
        for (logits, &next) in outcome.logits().chunks_exact(vocab).zip(&window[1..]) {
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|&l| f64::from(l - best).exp()).sum();
            nats += sum.ln() - f64::from(logits[next as usize] - best);
            count += 1;
        }
    }
    cluster.stop().await;
    (nats / f64::from(count)).exp()
}

#[tokio::test]
async fn the_demo_model_predicts_nearly_as_well_in_blocks() {
    let Some(path) = shared("models/manpages-moe/heldout.txt") else { return };
    let text = std::fs::read_to_string(path).expect("the held-out text can be read");
    let full = perplexity(None, &text).await;
    for (dtype, limit) in [(DType::Int8, 0.003), (DType::Int6, 0.006), (DType::Int4, 0.03)] {
        let found = perplexity(Some(dtype), &text).await;
        let cost = found / full - 1.0;
        println!("{dtype}: {found:.4}, {:+.3} % of {full:.4}", 100.0 * cost);
        assert!(cost <= limit, "{dtype} costs {:.2} % of perplexity", 100.0 * cost);
        assert!(cost.abs() > 1e-6, "{dtype} changed nothing: were the weights converted?");
    }
}

#[tokio::test]
async fn int8_keeps_the_chosen_experts() {
    let (mut kept, mut all) = (0u32, 0u32);
    for name in ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_moe_bf16_sharded"] {
        let (_folder, checkpoint, reference) = reference_as(name, Some(DType::Int8));
        assert_eq!(checkpoint.dtype(), DType::Int8);
        let layers = checkpoint.config().sparse_layers().count();
        let cluster = Setup::default().start(&checkpoint).await;
        let (mut kept_here, mut all_here) = (0, 0);
        for prompt in &reference.prompts {
            // As many rows as the reference has: its prompt and its own continuation.
            let rows = prompt.experts.len() / layers / prompt.k;
            let ids: Vec<u32> =
                prompt.ids.iter().chain(&prompt.greedy).copied().take(rows).collect();
            let outcome = run(&cluster, job(&ids, 0, 0)).await.expect("the job ends well");
            let found = outcome.expert_sets(layers, prompt.k);
            for (found, expected) in found.iter().zip(prompt.expert_sets(layers)) {
                for (found, expected) in found.iter().zip(&expected) {
                    kept_here += expected.iter().filter(|e| found.contains(e)).count() as u32;
                    all_here += expected.len() as u32;
                }
            }
        }
        cluster.stop().await;
        println!("{name}: {kept_here} of {all_here} chosen experts are kept");
        kept += kept_here;
        all += all_here;
    }
    // Models of random weights and a width of 64, where the gates' scores lie close together: with
    // the same weights but exact activations 98.9 % are kept.
    let share = f64::from(kept) / f64::from(all);
    assert!(share >= 0.98, "{kept} of {all} chosen experts are kept");
    assert!(kept < all, "every expert is kept: were the weights converted?");
}
