//! `lite-llm bench random-model`: a Hugging Face folder with random weights, for measurements.

use anyhow::{Result, anyhow};
use lite_llm_runtime::import::random::{RandomClass, RandomShape, write_random_hf};

use crate::{
    cli::RandomModelArgs,
    commands::bad_input,
    progress::{Progress, Unit},
    size::Size,
};

pub(super) async fn write(args: RandomModelArgs, json: bool) -> Result<()> {
    let shape = match args.shape.as_str() {
        "olmoe-1b-7b" => RandomShape::olmoe_1b_7b(),
        // The shape of PEERS: 502 million parameters, 117 million active.
        "olmoe-mini" => RandomShape {
            layers: 8,
            hidden: 1024,
            experts: 32,
            k: 4,
            intermediate: 512,
            heads: 8,
            kv_heads: 8,
            vocab: 32_000,
            ..RandomShape::olmoe_1b_7b()
        },
        "tiny" => RandomShape::tiny(RandomClass::Olmoe),
        other => {
            let expected = "olmoe-mini, olmoe-1b-7b or tiny is expected";
            return Err(bad_input(anyhow!("--shape {other}: {expected}")));
        }
    };
    let shape = RandomShape { seed: args.seed, ..shape };
    let bytes = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::new("random-model", Unit::Bytes, json);
        let bytes = write_random_hf(&args.dir, &shape, &mut |done, total| {
            progress.update(done, total, "");
        });
        progress.finish();
        bytes
    })
    .await??;
    if json {
        say!("{}", serde_json::json!({ "bytes": bytes }));
    } else {
        say!("{} written", Size(bytes));
    }
    Ok(())
}
