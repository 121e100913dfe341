//! `lite-llm inspect` and `lite-llm verify`.

use anyhow::Result;
use lite_llm_runtime::checkpoint::{
    inspect::{self as checkpoint_inspect, Summary},
    verify as checkpoint_verify,
};

use super::{bad_input, open_model};
use crate::{
    cli::ModelPath,
    progress::{Progress, Unit},
    size::Size,
};

pub(super) fn inspect(args: ModelPath, json: bool) -> Result<()> {
    let checkpoint = open_model(Some(&args.dir))?;
    print(&checkpoint_inspect::inspect(&checkpoint)?, json)
}

/// Prints what is in a checkpoint.
pub(super) fn print(summary: &Summary, json: bool) -> Result<()> {
    if json {
        say!("{}", serde_json::to_string(summary)?);
        return Ok(());
    }
    let s = summary;
    say!("checkpoint   {} (manifest {})", s.id, s.manifest);
    say!("architecture {} ({})", s.architecture, s.dtype);
    say!(
        "parameters   {} in all, {} active per token",
        count(s.parameters),
        count(s.active_parameters)
    );
    say!(
        "size         {} in {} shards, {:.2} bits per parameter",
        Size(s.bytes),
        s.shards,
        s.bits_per_parameter
    );
    if let Some(c) = s.compressed {
        let share = c.stored as f64 / c.bytes.max(1) as f64;
        say!(
            "compressed   {} experts (zstd): {} stored in {}, {share:.3} of it",
            c.sections,
            Size(c.bytes),
            Size(c.stored)
        );
    }
    say!("per token    {} of weights are read", Size(s.bytes_per_token));
    say!("layers       {} ({} sparse), hidden {}", s.layers, s.sparse_layers, s.hidden);
    say!("vocabulary   {}, context {}", s.vocab, s.context);
    for tier in &s.tiers {
        let [k_group, k_expert] = tier.routes;
        say!(
            "{:<12} {} groups × {} experts per layer, {} parameters in {}; {k_group} × {k_expert} per \
             token{}",
            tier.id,
            tier.groups,
            tier.experts_per_group,
            count(tier.parameters),
            tier.dtype,
            if tier.here { "" } else { "; its files are not here" }
        );
    }
    if let Some(r) = &s.routing {
        say!(
            "routing      {} of {} tiers per token{}",
            r.k_tier,
            s.tiers.len(),
            if r.renormalize { ", renormalised" } else { "" }
        );
    }
    Ok(())
}

/// A number of parameters as people say it.
fn count(n: u64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(unit, _)| n as f64 >= *unit) {
        Some((unit, name)) => format!("{:.2} {name}", n as f64 / unit),
        None => n.to_string(),
    }
}

pub(super) async fn verify(args: ModelPath, json: bool) -> Result<()> {
    let checkpoint = open_model(Some(&args.dir))?;
    let report = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::new("verify", Unit::Bytes, json);
        let report = checkpoint_verify::verify(&checkpoint, &mut |done, total, what| {
            progress.update(done, total, what);
        });
        progress.finish();
        report
    })
    .await?
    .map_err(bad_input)?;
    if json {
        say!("{}", serde_json::to_string(&report)?);
    } else {
        say!(
            "all is well: {} files, {} sections, {}",
            report.files,
            report.sections,
            Size(report.bytes)
        );
        if report.compressed > 0 {
            say!("{} sections are compressed and were unpacked", report.compressed);
        }
        for tier in &report.absent_tiers {
            say!("the files of {tier} are not here and were not verified");
        }
    }
    Ok(())
}
