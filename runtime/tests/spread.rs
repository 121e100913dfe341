//! Steps of several ranks have the bits of one process, whoever owns what and computes which rows; without a
//! network between them.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, OnceLock, Weak},
    thread,
};

use lite_llm_kernels::{cpu::Cpu, simd::Simd};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    tier::TierMask,
    train::{
        Recompute, TrainError,
        balance::BalanceWeights,
        batch::{Batch, Row},
        config::{NewModel, OptimizerConfig},
        exchange::{Answers, Exchange},
        optimizer::{Adafactor, AdamW, Sgd},
        orders::Order,
        params::Params,
        precision::Precision,
        rank::Rank,
        spread::{Ranks, Spread},
        step::{Objective, StepOptions},
        trained::Selection,
        trainer::{Pull, StepReport, Trainer},
    },
};

/// Ranks of this process: what they say to each other goes by bytes, and each call by a thread of its own.
#[derive(Default)]
struct Group {
    ranks: OnceLock<Vec<Arc<Rank>>>,
    /// Calls so far, by (from, to).
    calls: Mutex<BTreeSet<(usize, usize)>>,
}

struct Way {
    group: Weak<Group>,
    from: usize,
}

impl Exchange for Way {
    fn ask(&self, calls: Vec<(usize, Vec<u8>)>) -> Answers {
        let group = self.group.upgrade().unwrap();
        let from = self.from;
        let call = |(to, bytes): (usize, Vec<u8>)| {
            group.calls.lock().unwrap().insert((from, to));
            let rank = group.ranks.get().unwrap()[to].clone();
            thread::spawn(move || rank.serve(from, &bytes))
        };
        let asked: Vec<_> = calls.into_iter().map(call).collect();
        Box::new(move || asked.into_iter().map(|asked| asked.join().unwrap()).collect())
    }
}

impl Group {
    fn new(cpus: Vec<Cpu>) -> Arc<Self> {
        let group = Arc::new(Self::default());
        let rank = |(from, cpu): (usize, Cpu)| {
            let way = Way { group: Arc::downgrade(&group), from };
            Arc::new(Rank::new(Arc::new(cpu), Arc::new(way)))
        };
        let ranks = cpus.into_iter().enumerate().map(rank).collect();
        assert!(group.ranks.set(ranks).is_ok());
        group
    }
}

impl Ranks for Group {
    fn gather(&self) -> Result<usize, TrainError> {
        Ok(self.ranks.get().unwrap().len())
    }

    fn tell(&self, orders: Vec<Arc<Vec<u8>>>) -> Result<Vec<Vec<u8>>, TrainError> {
        thread::scope(|scope| {
            let tell = |(rank, bytes): (&Arc<Rank>, Arc<Vec<u8>>)| {
                let rank = rank.clone();
                scope.spawn(move || {
                    rank.perform(Order::from_bytes(&bytes)?).map(|given| given.to_bytes())
                })
            };
            let told: Vec<_> = self.ranks.get().unwrap().iter().zip(orders).map(tell).collect();
            told.into_iter().map(|told| told.join().unwrap()).collect()
        })
    }
}

fn model() -> ModelConfig {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let tier = |name: &str, groups: u32, experts: u32| serde_json::json!({ "name": name, "groups": groups, "experts": experts });
    let new = serde_json::json!({
        "tokenizer": "", "hidden": 20, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 10,
        "context": 64, "intermediate": 12, "tied_embeddings": true, "routes": [2, 1, 2],
        "renormalize": true, "tiers": [tier("tier_1b", 1, 5), tier("tier_10b", 2, 3)],
    });
    let new: NewModel = serde_json::from_value(new).unwrap();
    let mut model = new.config(Checkpoint::open(demo).unwrap().config()).unwrap();
    model.vocab = 211;
    model
}

fn batch(step: u32) -> Batch {
    let row = |r: u32| {
        let len = 5 + (r * 7 + step) % 20;
        let mut row = Row::whole((0..len).map(|i| (i * i + r * 31 + step * 17) % 211).collect());
        if len > 9 {
            row.documents.push(4);
        }
        row
    };
    Batch { rows: (0..7).map(row).collect() }
}

struct Case {
    optimizer: OptimizerConfig,
    precision: Precision,
    recompute: Recompute,
    micro_rows: usize,
    balanced: bool,
    /// Trained tiers; the backbone and gates, too, if all are.
    tiers: Vec<usize>,
    pull: Option<f64>,
}

fn trainer(case: &Case) -> Trainer {
    let mut params = Params::random(model(), 3);
    params.set_precision(case.precision);
    let all = case.tiers.len() == 2;
    let selection = Selection { backbone: all, tiers: case.tiers.clone(), gates: true };
    let trained = selection.resolve(&params);
    let decays = params.list().iter().map(|p| p.shape.len() > 1).collect();
    let pull = case.pull.map(|s| Pull::toward(&params, s, |name| name.contains(".tiers.0.")));
    let (cpu, optimizer) = (Arc::new(Cpu::best(2)), case.optimizer.build());
    let mut trainer = Trainer::new(cpu, params, optimizer, trained, decays, Some(0.5));
    trainer.pull(pull);
    trainer
}

const STEPS: u32 = 4;

fn options<'a>(case: &Case, mask: &'a TierMask) -> StepOptions<'a> {
    let balance = match case.balanced {
        true => BalanceWeights { tier: 0.02, group: 0.01, expert: 0.03, aux: 0.0, z: 0.001 },
        false => BalanceWeights::default(),
    };
    let objective = Objective { cross_entropy: 1.0, balance };
    StepOptions { mask, objective, recompute: case.recompute, micro_rows: case.micro_rows }
}

/// Reports but for how often forward ran, the loss held out, and bits of all values and states.
type Bits = (Vec<StepReport>, u64, Vec<(String, Vec<u32>)>);

fn bits(mut reports: Vec<StepReport>, held_out: f64, trainer: &Trainer) -> Bits {
    reports.iter_mut().for_each(|report| report.losses.forward_passes = 0);
    let of = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let params = trainer.params().list().iter().map(|p| (p.name.clone(), of(p.values())));
    let states = trainer.states().map(|(name, values)| (name, of(values)));
    (reports, held_out.to_bits(), params.chain(states).collect())
}

fn alone(case: &Case) -> Bits {
    let mut trainer = trainer(case);
    let mask = TierMask::new(vec![true, true]);
    let options = options(case, &mask);
    let step = |s| trainer.step(&batch(s), &options, 0.01).unwrap();
    let reports = (0..STEPS).map(step).collect();
    let cpu = Cpu::best(1);
    let held_out =
        lite_llm_runtime::train::step::evaluate(&cpu, trainer.params(), &batch(99), &options);
    bits(reports, held_out.unwrap().total, &trainer)
}

fn spread(case: &Case, group: Arc<Group>) -> Bits {
    let mut spread = Spread::begin(group.clone(), trainer(case), case.optimizer).unwrap();
    let mask = TierMask::new(vec![true, true]);
    let options = options(case, &mask);
    let mut reports = Vec::new();
    for s in 0..STEPS {
        reports.push(spread.step(&batch(s), &options, 0.01).unwrap());
        if s == 1 {
            // Others take over from what was collected.
            let trainer = spread.collect().unwrap();
            assert_eq!(trainer.steps(), 2);
            spread = Spread::begin(group.clone(), trainer, case.optimizer).unwrap();
        }
    }
    let held_out = spread.evaluate(&batch(99), &options).unwrap().total;
    bits(reports, held_out, &spread.collect().unwrap())
}

fn cases() -> Vec<Case> {
    let case = |optimizer, recompute, micro_rows, balanced, tiers: &[usize], pull| Case {
        optimizer,
        precision: Precision::F32,
        recompute,
        micro_rows,
        balanced,
        tiers: tiers.to_vec(),
        pull,
    };
    let adamw = OptimizerConfig::Adamw(AdamW::default());
    vec![
        case(adamw, Recompute::None, usize::MAX, true, &[0, 1], None),
        case(adamw, Recompute::Layer, 1, true, &[1], None),
        case(
            OptimizerConfig::Adafactor(Adafactor::default()),
            Recompute::None,
            2,
            false,
            &[0, 1],
            Some(0.1),
        ),
        case(OptimizerConfig::Sgd(Sgd::default()), Recompute::Layer, 3, true, &[0, 1], Some(0.1)),
        Case {
            precision: Precision::Bf16,
            ..case(adamw, Recompute::Layer, 2, true, &[0, 1], None)
        },
    ]
}

#[test]
fn ranks_have_the_bits_of_one_process() {
    for (i, case) in cases().iter().enumerate() {
        let expected = alone(case);
        for ranks in [1, 2, 3, 5, 9] {
            let simd = Simd::available();
            let cpus = (0..ranks).map(|r| Cpu::new(1 + r % 2, simd[r % simd.len()])).collect();
            let group = Group::new(cpus);
            let found = spread(case, group.clone());
            assert_eq!(found.0, expected.0, "reports of case {i}, {ranks} ranks");
            assert_eq!(found.1, expected.1, "loss held out of case {i}, {ranks} ranks");
            for (found, expected) in found.2.iter().zip(&expected.2) {
                assert!(found == expected, "{} of case {i}, {ranks} ranks", expected.0);
            }
            assert_eq!(found.2.len(), expected.2.len());
            // Each had something to say to each.
            let calls = group.calls.lock().unwrap().len();
            assert_eq!(calls, ranks * (ranks - 1), "calls between {ranks} ranks");
        }
    }
}

/// No rank has experts of another: what a rank holds is bounded.
#[test]
fn what_diverges_is_said_as_one_process_says_it_and_leaves_parameters_alone() {
    let case = &cases()[0];
    let group = Group::new((0..3).map(|_| Cpu::best(1)).collect());
    let mut whole = trainer(case);
    let id = whole.params().find("layers.1.ffn_norm").unwrap();
    let mut params = whole.params().clone();
    params.list_mut()[id].values_mut()[3] = f32::INFINITY;
    let (cpu, count) = (Arc::new(Cpu::best(1)), params.list().len());
    let trained = Selection { backbone: true, tiers: vec![0, 1], gates: true }.resolve(&params);
    whole = Trainer::new(cpu, params, case.optimizer.build(), trained, vec![true; count], None);
    let mask = TierMask::new(vec![true, true]);
    let options = options(case, &mask);
    let expected = whole.clone().step(&batch(0), &options, 0.01).unwrap_err();
    let before = bits(Vec::new(), 0.0, &whole);
    let mut spread = Spread::begin(group, whole, case.optimizer).unwrap();
    let found = spread.step(&batch(0), &options, 0.01).unwrap_err();
    assert!(matches!(found, TrainError::NotFinite { .. }), "{found}");
    assert_eq!(found.to_string().split(':').nth(1), expected.to_string().split(':').nth(1));
    assert_eq!(bits(Vec::new(), 0.0, &spread.collect().unwrap()), before);
}
