//! Phases of a run: whether each can be begun, by the shapes alone, and the beginning of one.

use std::sync::Arc;

use lite_llm_kernels::cpu::Cpu;

use super::{
    config::{NewTier, PhaseConfig, TrainConfig},
    grow::{Init, tier_parameters, with_tier, with_tier_config},
    params::{Param, Params, shapes},
    run::{Happened, RunError},
    starvation::{self, Expected},
    trained::{Selection, Trained},
    trainer::{Pull, Trainer},
};
use crate::{
    config::{ConfigError, ModelConfig},
    tier::{TierConfig, TierMask},
};

/// A phase that begins.
pub(super) struct Begun {
    pub(super) trainer: Trainer,
    pub(super) mask: TierMask,
    pub(super) event: Happened,
}

/// What a phase would do with a model of which nothing but the shapes is known.
struct Plan {
    /// The model with the phase's tier.
    model: ModelConfig,
    mask: TierMask,
    /// Of each parameter, by sorted names.
    trained: Vec<Trained>,
    event: Happened,
}

/// Says whether every phase from one on can be begun, before hours are spent on the first. `fresh`: the tier of
/// the first is still to be added.
pub(super) fn check_all(
    config: &TrainConfig,
    from: usize,
    model: &ModelConfig,
    fresh: bool,
) -> Result<(), RunError> {
    let mut model = model.clone();
    for index in from..config.phase.len() {
        model = plan(config, index, &model, fresh || index > from)?.model;
    }
    Ok(())
}

/// A tier as it is added to a model, and what it begins with.
fn new_tier(
    config: &TrainConfig,
    phase: &PhaseConfig,
    model: &ModelConfig,
    add: &NewTier,
) -> Result<(TierConfig, Init), RunError> {
    let wrong = |reason: String| RunError::Phase { phase: phase.name.clone(), reason };
    let init = match &add.init {
        Some(text) => text.parse().map_err(|e| wrong(format!("add.init: {e}")))?,
        None => Init::Random(config.seed),
    };
    let mut tier = add.config();
    tier.parameters = tier_parameters(model, &tier);
    Ok((tier, init))
}

/// A weight that would have no effect on such a model.
fn check_balance(
    index: usize,
    phase: &PhaseConfig,
    model: &ModelConfig,
) -> Result<(), ConfigError> {
    let balance = phase.balance;
    let weights = [
        ("tier", balance.tier),
        ("group", balance.group),
        ("expert", balance.expert),
        ("aux", balance.aux),
        ("z", balance.z),
    ];
    let flat = |moe: &crate::config::MoeConfig| moe.tiers.len() == 1 && moe.tiers[0].groups == 1;
    for (key, weight) in weights.into_iter().filter(|(_, weight)| *weight > 0.0) {
        let expected = match &model.moe {
            None => "0 is expected: the model has no experts to balance",
            Some(moe) if key == "aux" && !flat(moe) => {
                "0 is expected: the flat classes' loss needs a model of one tier with one group; of tiers and groups \
                 balance.tier, balance.group and balance.expert take care"
            }
            Some(_) => continue,
        };
        let field = format!("phase[{index}].balance.{key}");
        let (found, expected) = (weight.to_string(), expected.into());
        return Err(ConfigError { field, found, expected });
    }
    Ok(())
}

fn plan(
    config: &TrainConfig,
    index: usize,
    model: &ModelConfig,
    fresh: bool,
) -> Result<Plan, RunError> {
    let phase = &config.phase[index];
    let wrong = |reason: String| RunError::Phase { phase: phase.name.clone(), reason };
    let model = match &phase.add {
        Some(add) if fresh => {
            let (tier, init) = new_tier(config, phase, model, add)?;
            with_tier_config(model, &tier, &init, add.k_tier)
                .map_err(|e| RunError::Grow { phase: phase.name.clone(), source: e.into() })?
        }
        _ => model.clone(),
    };
    check_balance(index, phase, &model)?;
    let tiers = model.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    let mask = phase
        .tiers
        .mask(tiers)
        .map_err(|source| RunError::Tiers { phase: phase.name.clone(), source })?;
    let mut trained_tiers = Vec::new();
    for name in &phase.train.tiers {
        if name == "all" {
            trained_tiers = (0..tiers.len()).collect();
            continue;
        }
        let known = || tiers.iter().map(|t| t.id.as_str()).collect::<Vec<_>>().join(", ");
        let tier = tiers.iter().position(|tier| tier.id.as_str() == name);
        let tier = tier.ok_or_else(|| {
            wrong(format!("train.tiers names {name:?}; the model has {}, or say \"all\"", known()))
        })?;
        trained_tiers.push(tier);
    }
    trained_tiers.sort_unstable();
    trained_tiers.dedup();
    if let Some(&tier) = trained_tiers.iter().find(|tier| !mask.allows(**tier)) {
        let (tier, set) = (&tiers[tier].id, &phase.tiers);
        return Err(wrong(format!(
            "it trains {tier}, which its tiers, {set}, leave out; name it in both"
        )));
    }
    let shapes = shapes(&model);
    for (n, part) in phase.no_decay.iter().enumerate() {
        if part.is_empty() || !shapes.keys().any(|name| name.contains(part)) {
            return Err(RunError::Config(ConfigError {
                field: format!("phase[{index}].no_decay[{n}]"),
                found: format!("{part:?}"),
                expected:
                    "a part of a parameter's name, such as embed, .norm or .tiers.0., is expected"
                        .into(),
            }));
        }
    }
    let (backbone, gates) = (phase.train.backbone, phase.train.gates);
    let selection = Selection { backbone, tiers: trained_tiers.clone(), gates };
    let trained = selection.of_names(shapes.keys(), tiers.len());
    let size = |shape: &Vec<usize>| shape.iter().product::<usize>() as u64;
    let count: u64 = shapes
        .values()
        .zip(&trained)
        .map(|(shape, trained)| match trained {
            Trained::Nothing => 0,
            Trained::All => size(shape),
            Trained::Rows(rows) => (rows.len() * shape.iter().skip(1).product::<usize>()) as u64,
        })
        .sum();
    if count == 0 {
        return Err(wrong(
            "it trains nothing; give train.backbone, train.tiers or train.gates".into(),
        ));
    }
    let tokens = config.data.batch * config.data.sequence;
    let expected = starvation::expected(&model, &mask, &trained_tiers, tokens);
    let below = |tier: &Expected| tier.below(config.starvation.rho, tokens);
    let warnings: Vec<String> = expected.iter().filter_map(below).collect();
    if config.starvation.refuse && !warnings.is_empty() {
        let reason = format!("{}; or set starvation.refuse = false", warnings.join("; "));
        return Err(wrong(reason));
    }
    let event = Happened::Phase {
        name: phase.name.clone(),
        steps: phase.steps,
        trained: count,
        parameters: shapes.values().map(size).sum(),
        warnings,
    };
    Ok(Plan { model, mask, trained, event })
}

/// Begins a phase with an empty optimizer. `fresh`: its tier is still to be added.
pub(super) fn begin(
    config: &TrainConfig,
    index: usize,
    mut params: Params,
    cpu: &Arc<Cpu>,
    fresh: bool,
) -> Result<Begun, RunError> {
    let phase = &config.phase[index];
    let Plan { mask, trained, event, .. } = plan(config, index, params.config(), fresh)?;
    if let (Some(add), true) = (&phase.add, fresh) {
        let (tier, init) = new_tier(config, phase, params.config(), add)?;
        params = with_tier(&params, &tier, &init, add.k_tier)
            .map_err(|e| RunError::Grow { phase: phase.name.clone(), source: e.into() })?;
    }
    params.set_precision(config.compute.precision);
    let tiers = params.config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
    let decays = |param: &Param| {
        let matrix = param.shape.len() > 1 && !param.name.contains("router");
        let named = phase.no_decay.iter().any(|part| param.name.contains(part));
        (matrix || !phase.decay_matrices_only) && !named
    };
    let decays = params.list().iter().map(decays).collect();
    let clip = (phase.clip > 0.0).then_some(phase.clip);
    let pull = (phase.pull > 0.0).then(|| {
        let added = config.phase[..=index].iter().any(|phase| phase.add.is_some());
        let old = tiers - usize::from(added);
        Pull::toward(&params, phase.pull, |name| {
            (0..old).any(|tier| name.contains(&format!(".tiers.{tier}.")))
        })
    });
    let optimizer = phase.optimizer.build();
    let mut trainer = Trainer::new(cpu.clone(), params, optimizer, trained, decays, clip);
    trainer.pull(pull);
    Ok(Begun { trainer, mask, event })
}
