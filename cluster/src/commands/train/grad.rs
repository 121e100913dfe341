//! `lite-llm grad`.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, anyhow};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    train::{
        Recompute,
        balance::BalanceWeights,
        batch::{Batch, Row},
        params::Params,
        step::{Objective, StepOptions, gradients},
    },
};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::json;

use crate::{cli::GradArgs, commands::bad_input};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    prompts: Vec<Vec<u32>>,
}

pub(in crate::commands) fn grad(args: GradArgs, json: bool) -> Result<()> {
    let shown = args.tokens.display();
    let text = fs::read(&args.tokens)
        .with_context(|| format!("{shown}: cannot read"))
        .map_err(bad_input)?;
    let tokens: Tokens = serde_json::from_slice(&text)
        .with_context(|| format!("{shown}: {{\"prompts\": [[ids…], …]}} is expected"))
        .map_err(bad_input)?;
    let checkpoint = Checkpoint::open(&args.model).map_err(bad_input)?;
    let params = Params::load(&checkpoint).map_err(bad_input)?;
    let tiers = params.config().moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let mask = args.tiers.mask(tiers).map_err(bad_input)?;
    let [tier, group, expert] = match args.balance.as_deref() {
        Some(&[tier, group, expert]) => [tier, group, expert],
        _ => [0.0; 3],
    };
    let balance = BalanceWeights { tier, group, expert, ..Default::default() };
    let batch = Batch { rows: tokens.prompts.into_iter().map(Row::whole).collect() };
    let options = StepOptions {
        mask: &mask,
        objective: Objective { cross_entropy: 1.0, balance },
        recompute: if args.recompute { Recompute::Layer } else { Recompute::None },
        micro_rows: args.micro_rows.map_or(usize::MAX, |rows| rows as usize),
    };
    let wanted = vec![true; params.list().len()];
    let (losses, found) = gradients(&*args.compute.cpu()?, &params, &batch, &options, &wanted)
        .map_err(|error| bad_input(anyhow!("{shown}: {error}")))?;
    let scalars = [
        ("loss.ce", losses.ce),
        ("loss.lb_tier", losses.balance.tier),
        ("loss.lb_group", losses.balance.group),
        ("loss.lb_expert", losses.balance.expert),
        ("loss.total", losses.total),
    ];
    let scalars = scalars.map(|(name, value)| (name, value.to_le_bytes()));
    let mut views = BTreeMap::new();
    for (name, bytes) in &scalars {
        views.insert((*name).to_owned(), TensorView::new(Dtype::F64, vec![], bytes)?);
    }
    let zeros: Vec<Vec<f32>> = params
        .list()
        .iter()
        .enumerate()
        .map(|(id, p)| if found.get(id).is_some() { vec![] } else { vec![0.0; p.values().len()] })
        .collect();
    for (id, param) in params.list().iter().enumerate() {
        let values = found.get(id).unwrap_or(&zeros[id]);
        let bytes = bytemuck::cast_slice(values);
        views.insert(param.name.clone(), TensorView::new(Dtype::F32, param.shape.clone(), bytes)?);
    }
    safetensors::serialize_to_file(&views, None, &args.out)
        .with_context(|| format!("{}: cannot write", args.out.display()))?;
    if json {
        say!("{}", json!({ "out": args.out, "ce": losses.ce, "total": losses.total }));
    } else {
        say!("loss {:.6} nats; gradients written to {}", losses.ce, args.out.display());
    }
    Ok(())
}
