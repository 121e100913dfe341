//! Training's bits: the same over threads, instruction sets, micro-batches, recompute and restarts; forward
//! is inference's; what is frozen stays.

mod runs;

use std::{path::Path, sync::Arc};

use lite_llm_kernels::{cpu::Cpu, simd::Simd};
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::{Checkpoint, index::Hash, writer::Text},
    config::{
        AttentionConfig, FeedForward, LayerConfig, ModelConfig, MoeConfig, QkNorm, RopeScaling,
        RoutingConfig, Scoring, SharedExpertConfig,
    },
    engine::{Engine, Event},
    sequence::Request,
    store::DramStore,
    tier::{TIER_1B, TIER_10B, TierConfig, TierMask, TierSet},
    train::{
        Recompute,
        balance::BalanceWeights,
        batch::{Batch, Row},
        config::{NewTier, OptimizerConfig, TrainConfig},
        grow::{Init, add_tier, drop_tier, with_tier},
        optimizer::{Adafactor, AdamW, Optimizer, Sgd},
        params::Params,
        precision::Precision,
        run::{Happened, Run},
        state,
        step::{Objective, StepOptions, gradients, outputs},
        trained::{Selection, Trained},
        trainer::Trainer,
    },
};

/// A model with every part that has a gradient.
fn config() -> ModelConfig {
    let layer = |window, feed_forward| LayerConfig { window, feed_forward };
    ModelConfig {
        architecture: "hser".into(),
        vocab: 97,
        hidden: 40,
        context: 1024,
        norm_eps: 1e-5,
        tied_embeddings: true,
        attention: AttentionConfig {
            heads: 4,
            kv_heads: 2,
            head_dim: 10,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            qk_norm: QkNorm::PerHead,
            qkv_bias: true,
            output_bias: true,
            clip_qkv: Some(2.0),
        },
        layers: vec![
            layer(None, FeedForward::Sparse),
            layer(Some(50), FeedForward::Dense { intermediate: 24 }),
            layer(Some(300), FeedForward::Sparse),
        ],
        moe: Some(MoeConfig {
            intermediate: 12,
            tiers: vec![TierConfig::new(TIER_1B, 2, 3, 0), TierConfig::new(TIER_10B, 3, 2, 0)],
            routing: RoutingConfig {
                k_tier: 2,
                k_group: 1,
                k_expert: 2,
                scoring: Scoring::SoftmaxTopK,
                renormalize: true,
                seed: 3,
            },
            shared: Some(SharedExpertConfig { intermediate: 20, gated: true }),
        }),
        bos_token: None,
        eos_tokens: vec![],
    }
}

/// Random parameters, large enough that gradients of gates and norms count.
fn params() -> Params {
    let mut params = Params::random(config(), 7);
    for (i, param) in params.list_mut().iter_mut().enumerate() {
        let is_norm = param.name.ends_with("norm");
        for (j, x) in param.values_mut().iter_mut().enumerate() {
            let more = ((i * 31 + j) as f32 * 12.9898).sin();
            *x = if is_norm { 1.0 + 0.2 * more } else { *x * 5.0 + 0.02 * more };
        }
    }
    params
}

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i + 13 * i + seed * 7919) % 97) as u32).collect()
}

/// Five rows of different lengths, two of which hold several documents.
fn batch() -> Batch {
    let lengths = [300, 40, 520, 1, 270];
    let mut rows: Vec<Row> =
        lengths.iter().enumerate().map(|(i, n)| Row::whole(tokens(*n, i))).collect();
    rows[0].documents = vec![0, 17, 290];
    rows[4].documents = vec![0, 256];
    for (row, starts) in [(0, [17, 290]), (4, [256, 256])] {
        starts.iter().for_each(|start| rows[row].targets[start - 1] = None);
    }
    Batch { rows }
}

fn objective() -> Objective {
    let balance = BalanceWeights { tier: 0.3, group: 0.2, expert: 0.4, aux: 0.0, z: 0.01 };
    Objective { cross_entropy: 1.0, balance }
}

fn mask(params: &Params) -> TierMask {
    TierSet::All.mask(&params.config().moe.as_ref().unwrap().tiers).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn gradients_have_the_same_bits_in_every_layout() {
    let (params, batch) = (params(), batch());
    let mask = mask(&params);
    let wanted = vec![true; params.list().len()];
    let run = |cpu: &Cpu, micro_rows, recompute| {
        let options = StepOptions { mask: &mask, objective: objective(), recompute, micro_rows };
        gradients(cpu, &params, &batch, &options, &wanted).unwrap()
    };
    let (losses, expected) = run(&Cpu::new(1, Simd::Scalar), usize::MAX, Recompute::None);
    for (id, param) in params.list().iter().enumerate() {
        let gradient = expected.get(id).unwrap_or_else(|| panic!("{} has none", param.name));
        assert!(gradient.iter().all(|g| g.is_finite()), "{}", param.name);
        assert!(gradient.iter().any(|g| *g != 0.0), "{} is all zero", param.name);
    }
    for (threads, simd, micro_rows, recompute) in [
        (2, Simd::best(), usize::MAX, Recompute::None),
        (3, Simd::best(), 1, Recompute::None),
        (1, Simd::best(), 2, Recompute::Layer),
        (2, Simd::available()[Simd::available().len() / 2], 4, Recompute::Layer),
    ] {
        let (found_losses, found) = run(&Cpu::new(threads, simd), micro_rows, recompute);
        let layout =
            format!("{threads} threads, {simd}, micro-batches of {micro_rows}, {recompute:?}");
        assert_eq!(found_losses.total.to_bits(), losses.total.to_bits(), "{layout}");
        for (id, param) in params.list().iter().enumerate() {
            let (f, e) = (found.get(id).unwrap(), expected.get(id).unwrap());
            assert!(bits(f) == bits(e), "{}: {layout}", param.name);
        }
    }
}

/// Directional derivatives: (loss(p + εd) − loss(p − εd)) / 2ε against gradient · d, parameter by
/// parameter. An independent check of parts that the references lack (biases, clipping, windows, shared
/// experts, dense layers, tied tables, z-loss).
#[test]
fn gradients_are_those_of_the_loss() {
    let base = params();
    let cpu = Cpu::best(2);
    let rows = vec![Row::whole(tokens(70, 1)), Row::whole(tokens(33, 2))];
    let batch = Batch { rows };
    let mask = mask(&base);
    let options = StepOptions {
        mask: &mask,
        objective: objective(),
        recompute: Recompute::None,
        micro_rows: usize::MAX,
    };
    let wanted = vec![true; base.list().len()];
    let (_, found) = gradients(&cpu, &base, &batch, &options, &wanted).unwrap();
    let routes = |params: &Params| outputs(&cpu, params, &batch, &options).unwrap().routes;
    let keys = |params: &Params| -> Vec<_> {
        routes(params)
            .iter()
            .flat_map(|r| r.all().iter().map(|route| route.key).collect::<Vec<_>>())
            .collect()
    };
    let expected_routes = keys(&base);
    let (mut checked, mut worst) = (0, 0.0f64);
    for (id, param) in base.list().iter().enumerate() {
        // Along the gradient itself, so that the difference stands out of f32's noise.
        let Some(gradient) = found.get(id) else { continue };
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        if norm < 3e-3 {
            continue;
        }
        let epsilon = 0.01 / norm.max(0.1);
        let moved = |sign: f64| {
            let mut params = base.clone();
            let values = params.list_mut()[id].values_mut();
            for (x, g) in values.iter_mut().zip(gradient) {
                *x += (sign * epsilon * f64::from(*g) / norm) as f32;
            }
            params
        };
        let (up, down) = (moved(1.0), moved(-1.0));
        // A choice that flips is a step of the loss, which has no gradient.
        if keys(&up) != expected_routes || keys(&down) != expected_routes {
            continue;
        }
        let loss = |params: &Params| {
            lite_llm_runtime::train::step::evaluate(&cpu, params, &batch, &options).unwrap().total
        };
        let slope = (loss(&up) - loss(&down)) / (2.0 * epsilon);
        let error = (slope - norm).abs() / norm;
        worst = worst.max(error);
        checked += 1;
        assert!(error < 0.05, "{}: slope {slope}, gradient {norm}", param.name);
    }
    assert!(checked > 40, "{checked} parameters were checked, worst {worst}");
}

#[test]
fn forward_is_inferences_bit_for_bit() {
    let params = params();
    let cpu = Arc::new(Cpu::best(2));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let tokenizer_json = Checkpoint::open(demo).unwrap().tokenizer_json().unwrap();
    let text = Text { tokenizer_json, ..Default::default() };
    state::write_model(&path, &params, &text).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let again = Params::load(&checkpoint).unwrap();
    for (a, b) in params.list().iter().zip(again.list()) {
        assert_eq!((&a.name, bits(a.values())), (&b.name, bits(b.values())));
    }
    let mut prompts = vec![tokens(300, 5), tokens(11, 6)];
    let backbone = Arc::new(Backbone::load(&checkpoint, cpu.clone(), |_, _| {}).unwrap());
    let store = DramStore::new(u64::MAX);
    store.load_all(&checkpoint).unwrap();
    let mut engine = Engine::new(backbone, 1 << 24).unwrap();
    for (id, prompt) in prompts.iter().enumerate() {
        let request = Request { logits: true, ..Request::greedy(prompt.clone(), 0) };
        engine.submit(id as u64, request).unwrap();
    }
    engine.run_local(&store);
    let mut logits = [Vec::new(), Vec::new()];
    while let Some(event) = engine.poll_event() {
        if let Event::Logits { sequence, values, .. } = event {
            logits[sequence as usize].extend(values);
        }
    }
    let mask = mask(&params);
    let options = StepOptions {
        mask: &mask,
        objective: objective(),
        recompute: Recompute::None,
        micro_rows: usize::MAX,
    };
    // Both documents in one row of a batch.
    let starts = vec![0, prompts[0].len()];
    let second = prompts.pop().unwrap();
    let ids = [prompts.pop().unwrap(), second].concat();
    let row = Row { targets: vec![None; ids.len()], tokens: ids, documents: starts };
    let found = outputs(&cpu, &params, &Batch { rows: vec![row] }, &options).unwrap();
    assert!(bits(&found.logits) == bits(&logits.concat()), "training's logits are inference's");
}

#[test]
fn what_a_phase_freezes_keeps_its_bits_and_an_unused_tier_its_logits() {
    let cpu = Arc::new(Cpu::best(2));
    let params = params();
    let tiers = params.config().moe.as_ref().unwrap().tiers.clone();
    let first = TierSet::Only(vec![TIER_1B]).mask(&tiers).unwrap();
    let options = StepOptions {
        mask: &first,
        objective: objective(),
        recompute: Recompute::None,
        micro_rows: usize::MAX,
    };
    let logits = |params: &Params| bits(&outputs(&cpu, params, &batch(), &options).unwrap().logits);
    let before = (params.clone(), logits(&params));
    let selection = Selection { backbone: false, tiers: vec![1], gates: true };
    let optimizers: [Box<dyn Optimizer>; 3] = [
        Box::new(AdamW::default()),
        Box::new(Sgd { weight_decay: 0.1, ..Sgd::default() }),
        Box::new(Adafactor { weight_decay: 0.1, ..Adafactor::default() }),
    ];
    for optimizer in optimizers {
        let name = optimizer.name();
        let trained = selection.resolve(&params);
        let decays = vec![true; trained.len()];
        let mut trainer = Trainer::new(
            cpu.clone(),
            params.clone(),
            optimizer,
            trained.clone(),
            decays,
            Some(1.0),
        );
        let all = mask(&params);
        for _ in 0..3 {
            trainer.step(&batch(), &StepOptions { mask: &all, ..options }, 1e-2).unwrap();
        }
        for ((old, new), trained) in
            before.0.list().iter().zip(trainer.params().list()).zip(&trained)
        {
            let (old_bits, new_bits) = (bits(old.values()), bits(new.values()));
            match trained {
                Trained::Nothing => assert_eq!(old_bits, new_bits, "{name}: {}", old.name),
                Trained::All => assert_ne!(old_bits, new_bits, "{name}: {}", old.name),
                Trained::Rows(rows) => {
                    assert_eq!(rows, &[1]);
                    assert_eq!(old_bits[..40], new_bits[..40], "{name}: {}", old.name);
                    assert_ne!(old_bits[40..], new_bits[40..], "{name}: {}", old.name);
                }
            }
        }
        assert_eq!(logits(trainer.params()), before.1, "{name}: the TierSet without the new tier");
    }
}

/// In bf16 products see rounded weights: what a master has beyond them changes no loss. Gradients are those of f32,
/// nearly; masters stay as they are.
#[test]
fn products_in_bf16_are_those_of_rounded_weights() {
    let cpu = Cpu::best(2);
    let params = params();
    let (mask, batch) = (mask(&params), batch());
    let options = StepOptions {
        mask: &mask,
        objective: objective(),
        recompute: Recompute::None,
        micro_rows: usize::MAX,
    };
    let run = |params: &Params| {
        let wanted = vec![true; params.list().len()];
        let (losses, of) = gradients(&cpu, params, &batch, &options, &wanted).unwrap();
        (losses.total, of)
    };
    let (loss, exact) = run(&params);
    let mut half = params.clone();
    half.set_precision(Precision::Bf16);
    let (near, rounded) = run(&half);
    assert!(near != loss && (near - loss).abs() < 5e-3 * loss, "{near} instead of {loss}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let (mut off, mut all) = (0.0f64, 0.0f64);
    for id in 0..params.list().len() {
        let (Some(exact), Some(rounded)) = (exact.get(id), rounded.get(id)) else { continue };
        let pairs = || exact.iter().zip(rounded).map(|(e, r)| (f64::from(*e), f64::from(*r)));
        off = off.hypot(norm(&mut pairs().map(|(e, r)| e - r)));
        all = all.hypot(norm(&mut pairs().map(|(e, _)| e)));
    }
    assert!(off > 0.0 && off < 3e-2 * all, "{off} of {all}");
    // A third of the last place of bf16, away from all ties.
    let matrices = |name: &str| name.contains("experts.") && !name.contains("router");
    for param in half.list_mut().iter_mut().filter(|p| matrices(&p.name)) {
        for x in param.values_mut() {
            *x = f32::from_bits(x.to_bits() & 0xffff_0000 | 0x5000);
        }
    }
    let (with, _) = run(&half);
    for param in half.list_mut().iter_mut().filter(|p| matrices(&p.name)) {
        for x in param.values_mut() {
            *x = f32::from_bits(x.to_bits() & 0xffff_0000);
        }
    }
    assert_eq!(run(&half).0.to_bits(), with.to_bits());
    half.set_precision(Precision::F32);
    assert_ne!(run(&half).0.to_bits(), with.to_bits());
}

fn trainer_of_all(optimizer: OptimizerConfig) -> Trainer {
    let params = params();
    let count = params.list().len();
    let (trained, decays) = (vec![Trained::All; count], vec![true; count]);
    Trainer::new(Arc::new(Cpu::best(2)), params, optimizer.build(), trained, decays, Some(1.0))
}

/// A step on so few tokens that most experts get none; its loss.
fn small_step(trainer: &mut Trainer, step: usize) -> u64 {
    let mask = mask(trainer.params());
    let options = StepOptions {
        mask: &mask,
        objective: objective(),
        recompute: Recompute::None,
        micro_rows: usize::MAX,
    };
    let rows = vec![Row::whole(tokens(3, step * 7))];
    trainer.step(&Batch { rows }, &options, 0.02).unwrap().losses.total.to_bits()
}

/// Values and states.
fn bits_of(trainer: &Trainer) -> [Vec<Vec<u32>>; 2] {
    let values = trainer.params().list().iter().map(|param| bits(param.values())).collect();
    [values, trainer.states().map(|(_, values)| bits(values)).collect()]
}

/// What the original does later is none of a copy's, and each goes on from there.
#[test]
fn copies_stay_what_they_were_when_they_were_made() {
    let optimizer = OptimizerConfig::Adamw(AdamW::default());
    let expected = |steps| {
        let mut trainer = trainer_of_all(optimizer);
        for step in 0..steps {
            small_step(&mut trainer, step);
        }
        bits_of(&trainer)
    };
    let mut original = trainer_of_all(optimizer);
    for step in 0..3 {
        small_step(&mut original, step);
    }
    assert!(original.behind() > 0, "nothing was put off");
    let params = original.params().clone();
    let mut copy = original.clone();
    for step in 3..6 {
        small_step(&mut original, step);
    }
    let then = expected(3);
    let values: Vec<_> = params.list().iter().map(|param| bits(param.values())).collect();
    assert!(values == then[0], "a copy of parameters");
    assert!(bits_of(&copy) == then, "a copy of a trainer");
    for step in 3..6 {
        small_step(&mut copy, step);
    }
    let later = expected(6);
    assert!(bits_of(&copy) == later && bits_of(&original) == later, "both go on");
}

/// A parameter without gradients is left alone until it is looked at, and then is what it would have been.
#[test]
fn steps_that_are_put_off_have_the_bits_of_steps_at_once() {
    let optimizers: [OptimizerConfig; 3] = [
        OptimizerConfig::Adamw(AdamW::default()),
        OptimizerConfig::Adafactor(Adafactor { weight_decay: 0.1, ..Adafactor::default() }),
        OptimizerConfig::Sgd(Sgd { weight_decay: 0.1, ..Sgd::default() }),
    ];
    for optimizer in optimizers {
        let run = |looks: bool| {
            let mut trainer = trainer_of_all(optimizer);
            let (mut behind, mut losses) = (Vec::new(), Vec::new());
            for step in 0..8 {
                losses.push(small_step(&mut trainer, step));
                behind.push(trainer.behind());
                if looks {
                    trainer.states().for_each(drop);
                }
            }
            let all = bits_of(&trainer);
            assert_eq!(trainer.behind(), 0, "all were looked at");
            (behind, (losses, all))
        };
        let (behind, found) = run(false);
        let (seen, expected) = run(true);
        assert!(found == expected, "{optimizer:?}");
        assert!(
            behind.iter().all(|n| *n > 0) && seen.iter().all(|n| *n > 0),
            "{behind:?} {seen:?}"
        );
    }
}

#[test]
fn a_tier_begins_as_asked_and_leaves_the_others_alone() {
    let params = params();
    let tier = TierConfig::new("tier_100b".parse().unwrap(), 2, 6, 0);
    let old = params.find("layers.0.tiers.1.groups.2.experts.1.up").unwrap();
    for (init, name, same) in [
        ("copy:tier_10b", "layers.0.tiers.2.groups.0.experts.5.up", true),
        ("random:4", "layers.0.tiers.2.groups.0.experts.5.up", false),
        ("means", "layers.0.tiers.2.groups.1.experts.5.up", true),
    ] {
        let init: Init = init.parse().unwrap();
        let grown = with_tier(&params, &tier, &init, None).unwrap();
        for param in params.list().iter().filter(|p| !p.name.ends_with("router.tiers")) {
            let id = grown.find(&param.name).unwrap();
            assert_eq!(bits(grown.values(id)), bits(param.values()), "{}", param.name);
        }
        let new = grown.values(grown.find(name).unwrap());
        assert_eq!(bits(new) == bits(params.values(old)), same, "{init:?}");
    }
    let error = with_tier(&params, &tier, &"copy:tier_1t".parse().unwrap(), None).unwrap_err();
    assert!(error.to_string().contains("tier_1b, tier_10b"), "{error}");
}
