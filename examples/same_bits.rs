//! One prompt on clusters of one, two and three nodes: the logits are equal, bit for bit.
//!
//! `cargo run --release -p lite-llm-examples --example same_bits`

use std::{sync::Arc, time::Duration};

use lite_llm_actors::{
    local::{LocalCluster, LocalOptions},
    placement::PlacementPolicy,
};
use lite_llm_kernels::{kv::KvDType, simd::Simd};
use lite_llm_runtime::checkpoint::Checkpoint;
use lite_llm_transport::messages::{JobEventBody, JobRequest, LogitsWanted, Prompt};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let checkpoint = Arc::new(Checkpoint::open(model)?);
    let mut all = Vec::new();
    for workers in 1..=3 {
        let options = LocalOptions {
            workers,
            threads: 1,
            simd: Simd::best(),
            device: lite_llm_actors::node::DeviceChoice::Cpu,
            hbm_bytes: None,
            dram_bytes: 1 << 30,
            nvme: None,
            kv_bytes: 64 << 20,
            kv_dtype: KvDType::F32,
            math: lite_llm_kernels::math::Math::Exact,
            context: None,
            placement: PlacementPolicy::Balanced,
            replicas: 1,
            patience: Duration::from_secs(5),
        };
        let cluster = LocalCluster::start(checkpoint.clone(), &options).await?;
        let request = JobRequest {
            want_logits: LogitsWanted::All,
            ..JobRequest::greedy(Prompt::Text("To print the current".into()), 8)
        };
        let (_, mut events) = cluster.coordinator().submit(request).await?;
        let mut logits: Vec<u32> = Vec::new();
        while let Some(event) = events.recv().await {
            match event.body {
                JobEventBody::Logits { values, .. } => {
                    logits.extend(values.iter().map(|v| v.to_bits()))
                }
                JobEventBody::Failed { reason } => anyhow::bail!(reason),
                _ => {}
            }
        }
        cluster.stop().await;
        println!("{workers} nodes: {} logits", logits.len());
        all.push(logits);
    }
    anyhow::ensure!(all.windows(2).all(|pair| pair[0] == pair[1]), "the bits differ");
    println!("all equal, bit for bit");
    Ok(())
}
