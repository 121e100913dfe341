//! `lite-llm tier`.

use std::path::Path;

use anyhow::{Result, anyhow};
use lite_llm_actors::archive;
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    tier::TierConfig,
    train::grow::{add_tier, drop_tier, tier_parameters},
};
use serde_json::json;

use crate::{
    cli::{TierAddArgs, TierCommand, TierDropArgs},
    commands::bad_input,
    size::Size,
};

pub(in crate::commands) fn tier(command: TierCommand, json: bool) -> Result<()> {
    match command {
        TierCommand::Add(args) => add(args, json),
        TierCommand::List(args) => list(&args.dir, json),
        TierCommand::Drop(args) => drop_last(&args, json),
    }
}

fn list(dir: &Path, json: bool) -> Result<()> {
    let checkpoint = archive::open_checkpoint(dir).map_err(bad_input)?;
    let config = checkpoint.config();
    let bytes = checkpoint.tier_expert_bytes();
    let tiers = config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let number = checkpoint.manifest().number;
    if json {
        let of = |(tier, bytes): (&TierConfig, &u64)| {
            json!({
                "tier": tier.id.as_str(), "groups": tier.groups,
                "experts_per_group": tier.experts_per_group, "parameters": tier.parameters,
                "bytes": bytes, "here": !tier.absent,
            })
        };
        let tiers: Vec<_> = tiers.iter().zip(&bytes).map(of).collect();
        say!("{}", json!({ "manifest": number, "tiers": tiers }));
        return Ok(());
    }
    say!("manifest {number}");
    for (tier, bytes) in tiers.iter().zip(&bytes) {
        say!(
            "{:16} {} groups of {} experts, {:.1} M parameters, {}{}",
            tier.id.to_string(),
            tier.groups,
            tier.experts_per_group,
            tier.parameters as f64 / 1e6,
            Size(*bytes),
            if tier.absent { ", its files are not here" } else { "" }
        );
    }
    Ok(())
}

/// Removes the highest manifest and the folder of its files.
fn drop_last(args: &TierDropArgs, json: bool) -> Result<()> {
    let dropped = drop_tier(&args.dir, args.name.as_str()).map_err(bad_input)?;
    if json {
        say!("{}", json!({ "dropped": args.name.as_str(), "manifest": dropped }));
    } else {
        say!("{} dropped: manifest {dropped} is the highest again", args.name);
    }
    Ok(())
}

fn add(args: TierAddArgs, json: bool) -> Result<()> {
    let init = args.init.parse().map_err(|error| bad_input(anyhow!("--init: {error}")))?;
    let checkpoint = Checkpoint::open(&args.dir).map_err(bad_input)?;
    let mut tier = TierConfig::new(args.name, args.groups, args.experts, 0);
    (tier.intermediate, tier.dtype, tier.placement) =
        (args.intermediate, args.dtype, args.placement);
    tier.parameters = tier_parameters(checkpoint.config(), &tier);
    let name = tier.id.clone();
    let root = add_tier(&args.dir, tier, &init).map_err(bad_input)?;
    let number = Checkpoint::open(&args.dir)?.manifest().number;
    if json {
        say!("{}", json!({ "tier": name.as_str(), "manifest": number, "root": root.to_string() }));
    } else {
        say!("{name} added: manifest.{number}.json, root {root}; earlier manifests still open");
    }
    Ok(())
}
