//! Training's bits: the same over threads, instruction sets, micro-batches, recompute and restarts; forward
//! is inference's; what is frozen stays.

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
    assert_eq!(bits(&found.logits), bits(&logits.concat()));
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
            let params = params();
            let count = params.list().len();
            let (trained, decays) = (vec![Trained::All; count], vec![true; count]);
            let cpu = Arc::new(Cpu::best(2));
            let mask = mask(&params);
            let mut trainer =
                Trainer::new(cpu, params, optimizer.build(), trained, decays, Some(1.0));
            let options = StepOptions {
                mask: &mask,
                objective: objective(),
                recompute: Recompute::None,
                micro_rows: usize::MAX,
            };
            let (mut behind, mut losses) = (Vec::new(), Vec::new());
            for step in 0..8 {
                // A few tokens: most experts get none.
                let rows = vec![Row::whole(tokens(3, step * 7))];
                let report = trainer.step(&Batch { rows }, &options, 0.02).unwrap();
                losses.push(report.losses.total.to_bits());
                behind.push(trainer.behind());
                if looks {
                    trainer.states().for_each(drop);
                }
            }
            let values: Vec<_> = trainer.params().list().iter().map(|p| bits(p.values())).collect();
            let states: Vec<_> = trainer.states().map(|(_, values)| bits(values)).collect();
            assert_eq!(trainer.behind(), 0, "all were looked at");
            (behind, (losses, values, states))
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

/// A run of three phases over some text, as its users write it.
fn run_config(out: &str, steps: u64) -> TrainConfig {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let tier = |name: &str| serde_json::json!({ "name": name, "groups": 1, "experts": 4 });
    let phase = |name: &str, tiers: &str, train: serde_json::Value| {
        serde_json::json!({
            "name": name, "tiers": tiers, "steps": steps, "lr": 3e-3, "warmup": 2, "train": train,
            "balance": { "tier": 0.01, "group": 0.01, "expert": 0.01 },
        })
    };
    let only = serde_json::json!({ "tiers": ["tier_10b"], "gates": true });
    let all = serde_json::json!({ "backbone": true, "tiers": ["all"], "gates": true });
    let base = serde_json::json!({ "backbone": true, "tiers": ["tier_1b"] });
    let mut second = phase("1", "all", only);
    second["add"] = serde_json::json!({ "name": "tier_10b", "groups": 2, "experts": 3, "init": "copy:tier_1b" });
    let mut third = phase("2", "all", all);
    third["pull"] = 0.1.into();
    third["optimizer"] = serde_json::json!({ "kind": "adafactor" });
    let value = serde_json::json!({
        "out": out, "seed": 5,
        "model": { "new": {
            "tokenizer": demo, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8,
            "context": 64, "intermediate": 8, "tied_embeddings": true, "routes": [1, 1, 2],
            "tiers": [tier("tier_1b")],
        } },
        "data": { "files": ["text.txt", "lines.jsonl"], "sequence": 16, "batch": 4, "held_out": 0.1 },
        "checkpoint": { "every": 2, "keep": 2 },
        "phase": [phase("0", "..tier_1b", base), second, third],
    });
    serde_json::from_value(value).unwrap()
}

fn write_text(dir: &Path) {
    let text: String =
        (0..400).map(|i| format!("The {}th line of a text about {}. ", i, i * i % 17)).collect();
    std::fs::write(dir.join("text.txt"), text).unwrap();
    let lines = (0..40).map(|i| format!("{{\"text\": \"line {i} has its own document\"}}\n"));
    std::fs::write(dir.join("lines.jsonl"), lines.collect::<String>()).unwrap();
}

/// Everything that a run said, and the hash of the model that it made.
fn finish(mut run: Run) -> (Vec<Happened>, Hash) {
    let mut all = Vec::new();
    loop {
        let events = run.advance().unwrap();
        if events.is_empty() {
            break;
        }
        all.extend(events);
    }
    let model = Checkpoint::open(run.out().join(state::MODEL)).unwrap();
    (all, Hash(model.id()))
}

fn steps_of(all: &[Happened]) -> Vec<(u64, u64)> {
    let step = |event: &Happened| match event {
        Happened::Step(record) => Some((record.step, record.total.to_bits())),
        _ => None,
    };
    all.iter().filter_map(step).collect()
}

#[test]
fn a_run_that_was_interrupted_anywhere_makes_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |out: &str, threads, resume| {
        Run::open(run_config(out, 5), dir.path(), Arc::new(Cpu::best(threads)), resume).unwrap()
    };
    let (all, expected) = finish(open("whole", 2, false));
    let expected_steps = steps_of(&all);
    assert_eq!(expected_steps.len(), 15);
    assert!(expected_steps.windows(2).all(|pair| pair[0].1 != pair[1].1));
    // Interrupted after each of these calls, each time by forgetting all that is not on disk.
    let mut seen = Vec::new();
    for calls in [1, 3, 2, 5, 4] {
        let mut run = open("broken", 1, true);
        for _ in 0..calls {
            seen.extend(run.advance().unwrap());
        }
    }
    let (rest, found) = finish(open("broken", 3, true));
    assert_eq!(found, expected, "the model's hash");
    seen.extend(rest);
    for step in steps_of(&seen) {
        assert!(expected_steps.contains(&step), "step {} has other bits", step.0);
    }
    // What is there is not overwritten unless it is to be gone on with.
    let again = Run::open(run_config("whole", 5), dir.path(), Arc::new(Cpu::best(1)), false);
    assert!(again.err().unwrap().to_string().contains("--resume"));
    // Another configuration does not go on.
    let other = Run::open(run_config("whole", 6), dir.path(), Arc::new(Cpu::best(1)), true);
    assert!(other.err().unwrap().to_string().contains("another configuration"));
}

#[test]
fn a_checkpoint_may_be_asked_for_at_any_step() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |out: &str, resume| {
        let mut config = run_config(out, 5);
        config.checkpoint.every = 0;
        Run::open(config, dir.path(), Arc::new(Cpu::best(1)), resume).unwrap()
    };
    let (_, expected) = finish(open("whole", false));
    let mut run = open("asked", false);
    (0..3).for_each(|_| drop(run.advance().unwrap()));
    run.checkpoint().unwrap();
    // The next step is done while it is written.
    run.advance().unwrap();
    drop(run);
    let run = open("asked", true);
    assert_eq!(run.steps().0, 3);
    assert_eq!(finish(run).1, expected);
}

#[test]
fn what_cannot_be_trained_on_is_said_clearly() {
    let dir = tempfile::tempdir().unwrap();
    let open = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = run_config("bad", 3);
        change(&mut config);
        let opened = Run::open(config, dir.path(), Arc::new(Cpu::best(1)), false);
        opened.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let error = open(&|_| {});
    assert!(error.contains("text.txt: cannot read"), "{error}");
    write_text(dir.path());
    assert_eq!(open(&|_| {}), "");
    let error = open(&|config| config.phase[0].train.tiers = vec!["tier_9".into()]);
    assert!(error.contains("tier_9") && error.contains("tier_1b"), "{error}");
    let error = open(&|config| config.phase[0].train = serde_json::from_str("{}").unwrap());
    assert!(error.contains("trains nothing"), "{error}");
    let error = open(&|config| config.starvation.rho = 1e6);
    assert!(error.contains("tokens a step") && error.contains("experts"), "{error}");
    // Phases that come later are looked at before the first begins.
    let error = open(&|config| config.phase[2].train.tiers = vec!["tier_9".into()]);
    assert!(error.contains("phase 2") && error.contains("tier_9"), "{error}");
    let later =
        |change: fn(&mut NewTier)| open(&|config| change(config.phase[1].add.as_mut().unwrap()));
    let error = later(|add| add.init = Some("copy:tier_7".into()));
    assert!(error.contains("phase 1") && error.contains("tier_7"), "{error}");
    let error = later(|add| add.name = "tier_1b".parse().unwrap());
    assert!(error.contains("phase 1") && error.contains("tier_1b"), "{error}");
    let error = later(|add| add.k_tier = Some(9));
    assert!(error.contains("phase 1") && error.contains("k_tier"), "{error}");
    // A weight that would do nothing.
    assert_eq!(open(&|config| config.phase[0].balance.aux = 0.5), "");
    let error = open(&|config| config.phase[2].balance.aux = 0.5);
    assert!(error.contains("phase[2].balance.aux") && error.contains("one tier"), "{error}");
    assert_eq!(open(&|config| config.phase[0].no_decay = vec!["embed".into()]), "");
    let error = open(&|config| config.phase[0].no_decay = vec!["emded".into()]);
    assert!(error.contains("phase[0].no_decay[0]") && error.contains("emded"), "{error}");
    let error = open(&|config| config.data.sequence = 65);
    assert!(error.contains("context"), "{error}");
    std::fs::write(dir.path().join("text.txt"), [b'a', 0xff]).unwrap();
    let error = open(&|_| {});
    assert!(error.contains("not UTF-8: byte 1"), "{error}");
    std::fs::write(dir.path().join("text.txt"), "").unwrap();
    std::fs::write(dir.path().join("lines.jsonl"), "{\"txet\": 1}").unwrap();
    let error = open(&|_| {});
    assert!(error.contains("line 1") && error.contains("\"text\""), "{error}");
    std::fs::write(dir.path().join("lines.jsonl"), "").unwrap();
    let error = open(&|_| {});
    assert!(error.contains("0 tokens"), "{error}");
}

#[test]
fn two_do_not_train_in_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let open = |resume| {
        let cpu = Arc::new(Cpu::best(1));
        Run::open(run_config("shared", 2), dir.path(), cpu, resume).map_err(|e| e.to_string())
    };
    let mut first = open(false).unwrap();
    first.advance().unwrap();
    let error = open(true).err().unwrap();
    assert!(error.contains("shared") && error.contains("another process"), "{error}");
    drop(first);
    open(true).unwrap();
}

#[test]
fn a_step_that_leaves_what_is_not_finite_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let mut config = run_config("wild", 50);
    config.checkpoint.every = 1;
    config.phase[0].optimizer = serde_json::from_str(r#"{ "kind": "sgd" }"#).unwrap();
    (config.phase[0].lr, config.phase[0].warmup, config.phase[0].clip) = (1e-3, 0, 0.0);
    // Two good steps, then one whose learning rate overflows.
    config.phase[0].steps = 2;
    let mut wild = config.phase[0].clone();
    (wild.name, wild.lr, wild.steps) = ("wild".into(), 3e38, 5);
    wild.optimizer = serde_json::from_str(r#"{ "kind": "sgd", "weight_decay": 1e30 }"#).unwrap();
    config.phase.insert(1, wild);
    let mut run = Run::open(config, dir.path(), Arc::new(Cpu::best(2)), false).unwrap();
    let error = loop {
        if let Err(error) = run.advance() {
            break error.to_string();
        }
    };
    assert!(error.starts_with("step 3 (phase wild)") && error.contains("not saved"), "{error}");
    let last = state::list(run.out()).unwrap().pop().unwrap();
    assert_eq!(last.0, 2);
    let params = Params::load(&Checkpoint::open(last.1.join(state::MODEL)).unwrap()).unwrap();
    assert!(params.list().iter().all(|p| p.values().iter().all(|x| x.is_finite())));
}

#[test]
fn a_tier_that_was_left_out_is_not_starved_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let mut config = run_config("back", 6);
    config.starvation.window = 4;
    // Both tiers exist from the beginning; only the first is used for longer than the window.
    let add = config.phase[1].add.take().unwrap();
    config.model.new.as_mut().unwrap().tiers.push(NewTier { init: None, ..add });
    let (all, _) = finish(Run::open(config, dir.path(), Arc::new(Cpu::best(2)), false).unwrap());
    let records = all.iter().filter_map(|event| match event {
        Happened::Step(record) if record.phase == "1" => Some(record),
        _ => None,
    });
    let record = records.min_by_key(|record| record.step).unwrap();
    let tier = record.tiers.iter().find(|tier| tier.tier == "tier_10b").unwrap();
    assert_eq!((record.step, tier.starved), (7, 0));
}

#[test]
fn what_a_tier_does_not_begin_with_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let tiers = || [TierConfig::new(TIER_1B, 2, 3, 0), TierConfig::new(TIER_10B, 3, 2, 0)];
    let write = |name: &str| {
        let mut params = config();
        params.moe.as_mut().unwrap().tiers = tiers().to_vec();
        let out = dir.path().join(name);
        let text = Text {
            tokenizer_json: Checkpoint::open(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../models/manpages-moe"
            ))
            .unwrap()
            .tokenizer_json()
            .unwrap(),
            ..Default::default()
        };
        state::write_model(&out, &Params::random(params, 4), &text).unwrap();
        out
    };
    let (whole, broken) = (write("whole"), write("broken"));
    // The second tier's and the dense part's weights are gone.
    for folder in ["dense", "tiers/tier_10b"] {
        for entry in std::fs::read_dir(broken.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                std::fs::write(&path, "gone").unwrap();
            }
        }
    }
    let add = |dir: &Path, init: &str| {
        let tier = TierConfig::new("tier_100b".parse().unwrap(), 2, 2, 0);
        add_tier(dir, tier, &init.parse().unwrap())
    };
    let error = add(&broken, "means").unwrap_err();
    assert!(error.to_string().contains("tier_10b"), "{error}");
    assert_eq!(add(&broken, "copy:tier_1b").unwrap(), add(&whole, "copy:tier_1b").unwrap());
}

#[test]
fn the_tier_that_was_added_last_can_be_dropped_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let tokenizer_json = Checkpoint::open(demo).unwrap().tokenizer_json().unwrap();
    let text = Text { tokenizer_json, ..Default::default() };
    state::write_model(&out, &Params::random(config(), 4), &text).unwrap();
    let first = Checkpoint::open(&out).unwrap().id();
    let error = drop_tier(&out, "tier_10b").unwrap_err().to_string();
    assert!(error.contains("tier_1b, tier_10b"), "{error}");
    let tier = TierConfig::new("tier_100b".parse().unwrap(), 1, 2, 0);
    add_tier(&out, tier, &Init::Random(1)).unwrap();
    assert_ne!(Checkpoint::open(&out).unwrap().id(), first);
    let error = drop_tier(&out, "tier_10b").unwrap_err().to_string();
    assert!(error.contains("not the tier that was added last"), "{error}");
    assert_eq!(drop_tier(&out, "tier_100b").unwrap(), 1);
    assert_eq!(Checkpoint::open(&out).unwrap().id(), first);
    assert!(!out.join("v2").exists() && !out.join("import.staging").exists());
}

#[test]
fn a_run_that_diverges_stops_with_its_step_and_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let mut config = run_config("wild", 50);
    (config.phase[0].lr, config.phase[0].warmup, config.phase[0].clip) = (1e38, 0, 0.0);
    let mut run = Run::open(config, dir.path(), Arc::new(Cpu::best(2)), false).unwrap();
    let error = loop {
        match run.advance() {
            Ok(events) => assert!(!events.iter().any(|e| matches!(e, Happened::Done { .. }))),
            Err(error) => break error.to_string(),
        }
        assert!(run.steps().0 < 50, "it never diverged");
    };
    assert!(error.starts_with("step ") && error.contains("learning rate"), "{error}");
    for (_, dir) in state::list(run.out()).unwrap() {
        Checkpoint::open(dir.join(state::MODEL)).unwrap();
    }
}
