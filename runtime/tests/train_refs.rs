//! Gradients, optimizers and the phases of the curriculum against references of an independent oracle
//! (`data/train-refs/README.md`).

use std::{fs, path::PathBuf, sync::Arc};

use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    tier::{TierMask, TierSet},
    train::{
        Recompute,
        balance::BalanceWeights,
        batch::{Batch, Row},
        optimizer::{Adafactor, AdamW, Optimizer, Sgd},
        params::Params,
        step::{Objective, StepLosses, StepOptions, gradients, outputs},
        trained::{Trained, all_but},
        trainer::Trainer,
    },
};
use safetensors::SafeTensors;
use serde_json::Value;

/// Every n-th element is stored of a thinned tensor.
const STRIDE: usize = 7;

struct Reference {
    bytes: Vec<u8>,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/train-refs")
}

fn read(case: &str) -> Reference {
    let path = folder().join(format!("{case}.safetensors"));
    Reference { bytes: fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) }
}

fn info() -> Value {
    serde_json::from_slice(&fs::read(folder().join("refs.json")).unwrap()).unwrap()
}

impl Reference {
    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    fn values<const N: usize, T>(&self, name: &str, of: fn([u8; N]) -> T) -> Vec<T> {
        let file = self.file();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        view.data().as_chunks::<N>().0.iter().map(|bytes| of(*bytes)).collect()
    }

    fn scalars(&self, name: &str) -> Vec<f64> {
        self.values(name, f64::from_le_bytes)
    }

    /// Batches of `[steps, B, T]`, or the one of `[B, T]`.
    fn batches(&self, name: &str) -> Vec<Batch> {
        let shape = self.file().tensor(name).unwrap().shape().to_vec();
        let length = *shape.last().unwrap();
        let rows = shape[shape.len() - 2];
        let ids: Vec<u32> = self.values(name, u32::from_le_bytes);
        let batch = |ids: &[u32]| Batch {
            rows: ids.chunks(length).map(|ids| Row::whole(ids.to_vec())).collect(),
        };
        ids.chunks(rows * length).map(batch).collect()
    }

    /// |c − r| / |r| over what is stored of a parameter, both minus `start`; and |r|².
    fn error(&self, name: &str, found: &[f32], start: Option<&[f32]>) -> (f64, f64) {
        let file = self.file();
        let thinned = format!("{name}@{STRIDE}");
        let (stored, step) = match file.tensor(name) {
            Ok(_) => (name, 1),
            Err(_) => (thinned.as_str(), STRIDE),
        };
        let expected = self.values(stored, f32::from_le_bytes);
        let mut sums = (0.0, 0.0);
        for (i, r) in expected.iter().enumerate() {
            let (at, from) = (i * step, start.map_or(0.0, |s| f64::from(s[i * step])));
            sums.0 += (f64::from(found[at]) - f64::from(*r)).powi(2);
            sums.1 += (f64::from(*r) - from).powi(2);
        }
        sums
    }
}

fn params(variant: &str) -> Params {
    let path = folder().join(format!("hser_small/config.{variant}.json"));
    let config = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let weights = read("hser_small/weights");
    Params::new(config, |name, _| Some(weights.values(name, f32::from_le_bytes))).unwrap()
}

fn mask(params: &Params, tiers: &Value) -> TierMask {
    let names: Vec<&str> =
        tiers.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let set: TierSet =
        if names.is_empty() { TierSet::All } else { names.join(",").parse().unwrap() };
    set.mask(&params.config().moe.as_ref().unwrap().tiers).unwrap()
}

fn balance(info: &Value) -> BalanceWeights {
    let alpha = |key: &str| info[key].as_f64().unwrap();
    let (tier, group, expert) = (alpha("alpha_t"), alpha("alpha_g"), alpha("alpha_e"));
    BalanceWeights { tier, group, expert, ..Default::default() }
}

fn options(mask: &TierMask, cross_entropy: f64, balance: BalanceWeights) -> StepOptions<'_> {
    let objective = Objective { cross_entropy, balance };
    StepOptions { mask, objective, recompute: Recompute::Layer, micro_rows: 2 }
}

fn same_losses(reference: &Reference, losses: &[StepLosses], limit: f64) {
    let close = |name: &str, of: fn(&StepLosses) -> f64| {
        if reference.file().tensor(name).is_err() {
            return;
        }
        for (expected, found) in reference.scalars(name).iter().zip(losses.iter().map(of)) {
            let error = (found - expected).abs() / expected.abs().max(0.1);
            assert!(error < limit, "{name}: {found}, expected {expected}");
        }
    };
    close("loss.ce", |l| l.ce);
    close("loss.lb_tier", |l| l.balance.tier);
    close("loss.lb_group", |l| l.balance.group);
    close("loss.lb_expert", |l| l.balance.expert);
    close("loss.total", |l| l.total);
}

#[test]
fn gradients_agree() {
    let (cpu, info) = (Cpu::best(2), info());
    for case in ["hser_small/grads.b.first", "hser_small/grads.c.all", "hser_small/lb.c.all"] {
        let (of, reference) = (&info["cases"][case], read(case));
        let params = params(of["variant"].as_str().unwrap());
        let mask = mask(&params, &of["tierset"]);
        let only_balance = case.contains("lb.");
        let options = options(&mask, if only_balance { 0.0 } else { 1.0 }, balance(&info));
        let batch = reference.batches("ids").remove(0);
        let wanted = vec![true; params.list().len()];
        let (losses, found) = gradients(&cpu, &params, &batch, &options, &wanted).unwrap();
        same_losses(&reference, &[losses], 1e-5);
        let (mut errors, mut sizes) = (0.0, 0.0);
        for (id, param) in params.list().iter().enumerate() {
            let zeros = vec![0.0; param.values().len()];
            let sums = reference.error(&param.name, found.get(id).unwrap_or(&zeros), None);
            errors += sums.0;
            sizes += sums.1;
        }
        let error = (errors / sizes).sqrt();
        assert!(error < 3e-5, "{case}: {error:e}");
        if only_balance {
            continue;
        }
        let outputs = outputs(&cpu, &params, &batch, &options).unwrap();
        let moe = params.config().moe.as_ref().unwrap();
        let routes: Vec<i32> = outputs
            .routes
            .iter()
            .flat_map(|routes| routes.all().iter().map(|route| route.key.flat(moe) as i32))
            .collect();
        assert_eq!(routes, reference.values("routes", i32::from_le_bytes), "{case}");
    }
}

fn changes_agree(reference: &Reference, prefix: &str, start: &Params, found: &Params, limit: f64) {
    let (mut errors, mut sizes) = (0.0, 0.0);
    for (id, param) in found.list().iter().enumerate() {
        let name = format!("{prefix}{}", param.name);
        let sums = reference.error(&name, param.values(), Some(start.values(id)));
        errors += sums.0;
        sizes += sums.1;
    }
    let error = (errors / sizes).sqrt();
    assert!(error < limit, "{prefix}*: {error:e}");
}

#[test]
fn optimizers_agree() {
    let (cpu, info) = (Arc::new(Cpu::best(2)), info());
    type Case = (&'static str, Box<dyn Optimizer>, Option<f64>, f64);
    let cases: [Case; 3] = [
        ("optim/adamw_idle", Box::new(AdamW::default()), Some(1.0), 5e-4),
        ("optim/adafactor", Box::new(Adafactor::default()), None, 1e-4),
        ("optim/sgd", Box::new(Sgd::default()), None, 1e-4),
    ];
    for (case, optimizer, clip, limit) in cases {
        let (of, reference) = (&info["cases"][case], read(case));
        let start = params(of["variant"].as_str().unwrap());
        let mask = mask(&start, &Value::Null);
        let options = options(&mask, 1.0, balance(&info));
        let count = start.list().len();
        let (trained, decays) = (vec![Trained::All; count], vec![true; count]);
        let mut trainer =
            Trainer::new(cpu.clone(), start.clone(), optimizer, trained, decays, clip);
        let lrs = reference.scalars("lr");
        let mut losses = Vec::new();
        for (batch, lr) in reference.batches("ids").iter().zip(&lrs) {
            losses.push(trainer.step(batch, &options, *lr).unwrap().losses);
        }
        same_losses(&reference, &losses, if clip.is_some() { 2e-4 } else { 5e-5 });
        changes_agree(&reference, "", &start, trainer.params(), limit);
    }
}

#[test]
fn phases_agree() {
    let (cpu, info) = (Arc::new(Cpu::best(2)), info());
    let (of, reference) = (&info["cases"]["phases/phases"], read("phases/phases"));
    let start = params(of["variant"].as_str().unwrap());
    let mut params = start.clone();
    let mut batches = reference.batches("ids").into_iter();
    let (mut losses, mut logits) = (Vec::new(), Vec::new());
    let first = mask(&params, &of["phases"][0]["tierset"]);
    let eval = reference.batches("eval_ids").remove(0);
    for phase in of["phases"].as_array().unwrap() {
        let mask = mask(&params, &phase["tierset"]);
        let strings =
            |list: &Value| -> Vec<String> { serde_json::from_value(list.clone()).unwrap() };
        let rows = phase["frozen_rows"].as_object().unwrap();
        let rows: Vec<(String, Vec<usize>)> = rows
            .iter()
            .map(|(name, rows)| (name.clone(), serde_json::from_value(rows.clone()).unwrap()))
            .collect();
        let trained = all_but(&params, &strings(&phase["frozen"]), &rows);
        let decays = vec![true; trained.len()];
        let weights = match phase["load_balancing"].as_bool() {
            Some(true) => balance(&info),
            _ => BalanceWeights::default(),
        };
        let options = options(&mask, 1.0, weights);
        let optimizer = Box::new(AdamW::default());
        let mut trainer = Trainer::new(cpu.clone(), params, optimizer, trained, decays, Some(1.0));
        for batch in batches.by_ref().take(phase["steps"].as_u64().unwrap() as usize) {
            let lr = phase["lr"].as_f64().unwrap();
            losses.push(trainer.step(&batch, &options, lr).unwrap().losses);
        }
        params = trainer.into_params();
        let name = format!("{}.", phase["name"].as_str().unwrap());
        changes_agree(&reference, &name, &start, &params, 5e-4);
        let options = StepOptions { mask: &first, ..options };
        logits.push(outputs(&cpu, &params, &eval, &options).unwrap().logits);
    }
    same_losses(&reference, &losses, 2e-4);
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(
        bits(&logits[0]),
        bits(&logits[1]),
        "the first tier alone, before and after the second was trained"
    );
    assert_ne!(bits(&logits[1]), bits(&logits[2]));
}
