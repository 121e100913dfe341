//! Computes every case of a folder of training references with this project's own code, for
//! `check.py --all OUT_DIR` to compare: gradients, optimizers, and the curriculum's phases.
//!
//! `train_refs REFS_DIR HF_REFS_DIR OUT_DIR [--threads N] [--micro ROWS] [--recompute] [--only TEXT]`
//!
//! Shapes, TierSets, steps, phases and batches are read from the folder (`refs.json`, `ids`, `lr`); what
//! the folder's README settles in words (betas, momentum, clipping) is written down in [`optimizer`].

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail};
use lite_llm_kernels::{cpu::Cpu, dtype::DType};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    import::{ImportOptions, hf_names::parameters_of, import},
    routing::Routes,
    tier::{TierId, TierMask, TierSet},
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
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
use serde_json::Value;

/// A tensor to be written.
enum Out {
    F32(Vec<usize>, Vec<f32>),
    F64(Vec<usize>, Vec<f64>),
    I32(Vec<usize>, Vec<i32>),
}

type Outs = BTreeMap<String, Out>;

struct Story {
    cpu: Arc<Cpu>,
    refs: PathBuf,
    hf_refs: PathBuf,
    info: Value,
    micro_rows: usize,
    recompute: Recompute,
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut paths = Vec::new();
    let (mut threads, mut micro_rows, mut recompute, mut only) =
        (2, usize::MAX, Recompute::None, String::new());
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--threads" => threads = value()?.parse().context("--threads takes a number")?,
            "--micro" => micro_rows = value()?.parse().context("--micro takes a number")?,
            "--recompute" => recompute = Recompute::Layer,
            "--only" => only = value()?,
            _ => paths.push(PathBuf::from(arg)),
        }
    }
    let [refs, hf_refs, out] = <[PathBuf; 3]>::try_from(paths).map_err(|_| {
        anyhow!("usage: train_refs REFS_DIR HF_REFS_DIR OUT_DIR [--threads N] [--micro ROWS] [--recompute] [--only TEXT]")
    })?;
    let info = read_json(&refs.join("refs.json"))?;
    let story =
        Story { cpu: Arc::new(Cpu::best(threads)), refs, hf_refs, info, micro_rows, recompute };
    let cases = story.info["cases"].as_object().context("refs.json has no cases")?.clone();
    for (case, of) in cases.iter().filter(|(case, _)| case.contains(&only)) {
        let outs = story.case(case, of).with_context(|| case.clone())?;
        write(&out.join(format!("{case}.safetensors")), &outs)?;
        println!("{case}: {} tensors", outs.len());
    }
    Ok(())
}

impl Story {
    fn case(&self, case: &str, of: &Value) -> Result<Outs> {
        let path = self.refs.join(format!("{case}.safetensors"));
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        let reference = SafeTensors::deserialize(&bytes)?;
        let (folder, name) = case.split_once('/').context("a case is FOLDER/NAME")?;
        if let Some(model) = folder.strip_prefix("hf_") {
            return self.hugging_face(model, name == "aux", &reference);
        }
        if of["phases"].is_array() {
            return self.phases(of, &reference);
        }
        if !of["deltas"].is_null() {
            return self.optimize(name, of, &reference);
        }
        self.hierarchical(name.starts_with("lb"), of, &reference)
    }

    fn options<'a>(&self, mask: &'a TierMask, objective: Objective) -> StepOptions<'a> {
        StepOptions { mask, objective, recompute: self.recompute, micro_rows: self.micro_rows }
    }

    /// The balance losses' weights.
    fn alphas(&self) -> Result<BalanceWeights> {
        let alpha =
            |key: &str| self.info[key].as_f64().with_context(|| format!("refs.json: {key}"));
        let (tier, group, expert) = (alpha("alpha_t")?, alpha("alpha_g")?, alpha("alpha_e")?);
        Ok(BalanceWeights { tier, group, expert, ..Default::default() })
    }

    /// The small hierarchical model of a variant, with its initial weights.
    fn params(&self, of: &Value) -> Result<Params> {
        let variant = of["variant"].as_str().context("the case names no variant")?;
        let path = self.refs.join(format!("hser_small/config.{variant}.json"));
        let config: ModelConfig = serde_json::from_value(read_json(&path)?)
            .with_context(|| path.display().to_string())?;
        config.check().with_context(|| path.display().to_string())?;
        let path = self.refs.join("hser_small/weights.safetensors");
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        let weights = SafeTensors::deserialize(&bytes)?;
        Ok(Params::new(config, |name, _| f32s(&weights, name).ok())?)
    }

    fn hugging_face(&self, model: &str, aux: bool, reference: &SafeTensors<'_>) -> Result<Outs> {
        let folder = tempfile::tempdir()?;
        let native = folder.path().join("native");
        let options = ImportOptions {
            dtype: Some(DType::F32),
            ..ImportOptions::new(self.hf_refs.join(model), native.as_path())
        };
        import(&options, &mut |_, _, _| {})?;
        let params = Params::load(&Checkpoint::open(&native)?)?;
        let balance = BalanceWeights { aux: if aux { 1.0 } else { 0.0 }, ..Default::default() };
        let objective = Objective { cross_entropy: if aux { 0.0 } else { 1.0 }, balance };
        let mask = mask(&params, &Value::Null)?;
        let batch = batch(&i32s(reference, "ids")?)?;
        let wanted = vec![true; params.list().len()];
        let options = self.options(&mask, objective);
        let (losses, found) = gradients(&self.cpu, &params, &batch, &options, &wanted)?;
        let mut outs = Outs::new();
        let (name, loss) =
            if aux { ("loss.aux", losses.balance.aux) } else { ("loss.ce", losses.ce) };
        outs.insert(name.into(), Out::F64(vec![], vec![loss]));
        for name in reference.names() {
            let name = name.split('@').next().unwrap_or(name);
            if ["ids", "fingerprints"].contains(&name) || name.starts_with("loss.") {
                continue;
            }
            let parts = parameters_of(params.config(), name)
                .with_context(|| format!("{name}: no tensor of a known class"))?;
            let (mut values, mut shape) = (Vec::new(), vec![0, 0]);
            for part in &parts {
                let id =
                    params.find(part).with_context(|| format!("{name}: no parameter {part}"))?;
                let of = &params.list()[id].shape;
                shape = [&[if of.len() > 1 { shape[0] + of[0] } else { of[0] }], &of[1..]].concat();
                let size = of.iter().product();
                values.extend(found.get(id).map_or_else(|| vec![0.0; size], <[f32]>::to_vec));
            }
            // Experts that are stacked in one tensor have a dimension of their own.
            if let Ok(stored) = reference.tensor(name)
                && stored.shape().iter().product::<usize>() == values.len()
            {
                shape = stored.shape().to_vec();
            }
            outs.insert(name.into(), Out::F32(shape, values));
        }
        Ok(outs)
    }

    fn hierarchical(
        &self,
        only_balance: bool,
        of: &Value,
        reference: &SafeTensors<'_>,
    ) -> Result<Outs> {
        let params = self.params(of)?;
        let mask = mask(&params, &of["tierset"])?;
        let ids = i32s(reference, "ids")?;
        let batch = batch(&ids)?;
        let cross_entropy = if only_balance { 0.0 } else { 1.0 };
        let objective = Objective { cross_entropy, balance: self.alphas()? };
        let options = self.options(&mask, objective);
        let wanted = vec![true; params.list().len()];
        let (losses, found) = gradients(&self.cpu, &params, &batch, &options, &wanted)?;
        let mut outs = Outs::new();
        for (name, values) in loss_values(std::slice::from_ref(&losses)) {
            outs.insert(name, Out::F64(vec![], values));
        }
        for (id, param) in params.list().iter().enumerate() {
            let zeros = || vec![0.0; param.values().len()];
            let gradient = found.get(id).map_or_else(zeros, <[f32]>::to_vec);
            outs.insert(param.name.clone(), Out::F32(param.shape.clone(), gradient));
        }
        let outputs = outputs(&self.cpu, &params, &batch, &options)?;
        let vocab = params.config().vocab;
        outs.insert("logits".into(), Out::F32([&ids.0[..], &[vocab]].concat(), outputs.logits));
        let (shape, routes, weights) = route_tables(&params, &outputs.routes)?;
        outs.insert("routes".into(), Out::I32(shape.clone(), routes));
        outs.insert("route_weights".into(), Out::F32(shape, weights));
        Ok(outs)
    }

    fn optimize(&self, name: &str, of: &Value, reference: &SafeTensors<'_>) -> Result<Outs> {
        let params = self.params(of)?;
        let mask = mask(&params, &of["tierset"])?;
        let batches = batches(&i32s(reference, "ids")?)?;
        let lrs = f64s(reference, "lr", batches.len())?;
        let (optimizer, clip) = optimizer(name)?;
        let trained = vec![Trained::All; params.list().len()];
        let decays = vec![true; params.list().len()];
        let mut trainer = Trainer::new(self.cpu.clone(), params, optimizer, trained, decays, clip);
        let options =
            self.options(&mask, Objective { cross_entropy: 1.0, balance: self.alphas()? });
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for (batch, lr) in batches.iter().zip(&lrs) {
            let report = trainer.step(batch, &options, *lr)?;
            losses.push(report.losses);
            norms.push(report.grad_norm);
        }
        let mut outs = Outs::new();
        for (name, values) in loss_values(&losses) {
            outs.insert(name, Out::F64(vec![values.len()], values));
        }
        outs.insert("grad_norm".into(), Out::F64(vec![norms.len()], norms));
        outs.insert("lr".into(), Out::F64(vec![lrs.len()], lrs));
        add_params(&mut outs, "", trainer.params());
        Ok(outs)
    }

    fn phases(&self, of: &Value, reference: &SafeTensors<'_>) -> Result<Outs> {
        let mut params = self.params(of)?;
        let all = batches(&i32s(reference, "ids")?)?;
        let eval_ids = i32s(reference, "eval_ids")?;
        let eval = batch(&eval_ids)?;
        let (mut losses, mut norms, mut lrs) = (Vec::new(), Vec::new(), Vec::new());
        let mut outs = Outs::new();
        let mut next = all.iter();
        for phase in of["phases"].as_array().into_iter().flatten() {
            let name = phase["name"].as_str().context("a phase has a name")?;
            let mask_of_phase = mask(&params, &phase["tierset"])?;
            let rows = |rows: &Value| -> Vec<usize> {
                rows.as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_u64)
                    .map(|r| r as usize)
                    .collect()
            };
            let frozen_rows: Vec<(String, Vec<usize>)> = phase["frozen_rows"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, of)| (name.clone(), rows(of)))
                .collect();
            let trained = all_but(&params, &strings(&phase["frozen"]), &frozen_rows);
            let decays = vec![true; params.list().len()];
            let (optimizer, clip) = optimizer("adamw")?;
            let balance = match phase["load_balancing"].as_bool() {
                Some(true) => self.alphas()?,
                _ => BalanceWeights::default(),
            };
            let lr = phase["lr"].as_f64().context("a phase has lr")?;
            let options = self.options(&mask_of_phase, Objective { cross_entropy: 1.0, balance });
            let mut trainer =
                Trainer::new(self.cpu.clone(), params, optimizer, trained, decays, clip);
            for batch in next.by_ref().take(phase["steps"].as_u64().unwrap_or(0) as usize) {
                let mut report = trainer.step(batch, &options, lr)?;
                // What was minimised is reported whether it has balance losses or not.
                report.losses.total = report.losses.ce + report.losses.balance.weighted(&balance);
                losses.push(report.losses);
                norms.push(report.grad_norm);
                lrs.push(lr);
            }
            params = trainer.into_params();
            add_params(&mut outs, &format!("{name}."), &params);
            for (set, tiers) in self.tier_sets(of, reference)? {
                let mask = mask(&params, &tiers)?;
                let options = self.options(&mask, options.objective);
                let logits = outputs(&self.cpu, &params, &eval, &options)?.logits;
                let shape = [&eval_ids.0[..], &[params.config().vocab]].concat();
                outs.insert(format!("{name}.logits.{set}"), Out::F32(shape, logits));
            }
        }
        for (name, values) in loss_values(&losses) {
            outs.insert(name, Out::F64(vec![values.len()], values));
        }
        outs.insert("grad_norm".into(), Out::F64(vec![norms.len()], norms));
        Ok(outs)
    }

    /// The TierSets whose logits the reference holds, by the names that it has for them: those of the
    /// cases that are called after them, or all tiers, or the first phase's.
    fn tier_sets(&self, of: &Value, reference: &SafeTensors<'_>) -> Result<Vec<(String, Value)>> {
        let mut sets: Vec<(String, Value)> = Vec::new();
        for name in reference.names() {
            let Some((_, set)) = name.split('@').next().and_then(|n| n.split_once(".logits."))
            else {
                continue;
            };
            if sets.iter().any(|(known, _)| known == set) {
                continue;
            }
            let cases = self.info["cases"].as_object().into_iter().flatten();
            let mut named = cases.filter(|(case, _)| case.ends_with(&format!(".{set}")));
            let tiers = match (set, named.find_map(|(_, of)| of.get("tierset"))) {
                (_, Some(tiers)) => tiers.clone(),
                ("all", None) => Value::Null,
                ("first", None) => of["phases"][0]["tierset"].clone(),
                (other, None) => bail!("no case tells what TierSet {other:?} is"),
            };
            sets.push((set.to_owned(), tiers));
        }
        Ok(sets)
    }
}

/// The optimizers of the references, and the largest norm of the gradient.
fn optimizer(name: &str) -> Result<(Box<dyn Optimizer>, Option<f64>)> {
    Ok(match name.split('_').next() {
        Some("adamw") => (Box::new(AdamW::default()), Some(1.0)),
        Some("sgd") => (Box::new(Sgd::default()), None),
        Some("adafactor") => (Box::new(Adafactor::default()), None),
        _ => bail!("{name}: adamw, sgd or adafactor is expected"),
    })
}

fn add_params(outs: &mut Outs, prefix: &str, params: &Params) {
    for param in params.list() {
        let out = Out::F32(param.shape.clone(), param.values().to_vec());
        outs.insert(format!("{prefix}{}", param.name), out);
    }
}

/// The losses of some steps by their names.
fn loss_values(losses: &[StepLosses]) -> Vec<(String, Vec<f64>)> {
    let of = |name: &str, f: fn(&StepLosses) -> f64| {
        (format!("loss.{name}"), losses.iter().map(f).collect())
    };
    vec![
        of("ce", |l| l.ce),
        of("lb_tier", |l| l.balance.tier),
        of("lb_group", |l| l.balance.group),
        of("lb_expert", |l| l.balance.expert),
        of("total", |l| l.total),
    ]
}

/// Flat experts and weights of all routes, `[layers, N, K]`.
fn route_tables(params: &Params, layers: &[Routes]) -> Result<(Vec<usize>, Vec<i32>, Vec<f32>)> {
    let moe = params.config().moe.as_ref().context("the model has no experts")?;
    let rows = layers.first().map_or(0, Routes::rows);
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for routes in layers {
        ids.extend(routes.all().iter().map(|route| route.key.flat(moe) as i32));
        weights.extend(routes.all().iter().map(|route| route.weight));
    }
    let k = ids.len() / (layers.len() * rows).max(1);
    Ok((vec![layers.len(), rows, k], ids, weights))
}

fn mask(params: &Params, tiers: &Value) -> Result<TierMask> {
    let names = strings(tiers);
    let set = match names.is_empty() {
        true => TierSet::All,
        false => {
            TierSet::Only(names.iter().map(|n| n.parse()).collect::<Result<Vec<TierId>, _>>()?)
        }
    };
    let tiers = params.config().moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
    Ok(set.mask(tiers)?)
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|s| s.as_str().map(str::to_owned)).collect()
}

/// `[B, T]` as one batch.
fn batch((shape, ids): &(Vec<usize>, Vec<i32>)) -> Result<Batch> {
    let [_, length] = shape[..] else { bail!("ids are [B, T], found {shape:?}") };
    let row = |ids: &[i32]| Row::whole(ids.iter().map(|&id| id as u32).collect());
    Ok(Batch { rows: ids.chunks(length.max(1)).map(row).collect() })
}

/// `[steps, B, T]` as batches.
fn batches((shape, ids): &(Vec<usize>, Vec<i32>)) -> Result<Vec<Batch>> {
    let [_, rows, length] = shape[..] else { bail!("ids are [steps, B, T], found {shape:?}") };
    let one = |ids: &[i32]| batch(&(vec![rows, length], ids.to_vec()));
    ids.chunks((rows * length).max(1)).map(one).collect()
}

fn values<const N: usize, T>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    of: fn([u8; N]) -> T,
) -> Result<(Vec<usize>, Vec<T>)> {
    let tensor = file.tensor(name).with_context(|| name.to_owned())?;
    if tensor.dtype() != dtype {
        bail!("{name} is {:?}; {dtype:?} is expected", tensor.dtype());
    }
    let values = tensor.data().as_chunks::<N>().0.iter().map(|bytes| of(*bytes)).collect();
    Ok((tensor.shape().to_vec(), values))
}

fn i32s(file: &SafeTensors<'_>, name: &str) -> Result<(Vec<usize>, Vec<i32>)> {
    values(file, name, Dtype::I32, i32::from_le_bytes)
}

fn f32s(file: &SafeTensors<'_>, name: &str) -> Result<Vec<f32>> {
    values(file, name, Dtype::F32, f32::from_le_bytes).map(|(_, values)| values)
}

/// One value per step; a scalar is every step's.
fn f64s(file: &SafeTensors<'_>, name: &str, steps: usize) -> Result<Vec<f64>> {
    let (_, values) = values(file, name, Dtype::F64, f64::from_le_bytes)?;
    Ok(if values.len() == 1 { vec![values[0]; steps] } else { values })
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

fn write(path: &Path, outs: &Outs) -> Result<()> {
    let bytes: Vec<(&String, Dtype, &Vec<usize>, Vec<u8>)> = outs
        .iter()
        .map(|(name, out)| match out {
            Out::F32(shape, v) => {
                (name, Dtype::F32, shape, v.iter().flat_map(|x| x.to_le_bytes()).collect())
            }
            Out::F64(shape, v) => {
                (name, Dtype::F64, shape, v.iter().flat_map(|x| x.to_le_bytes()).collect())
            }
            Out::I32(shape, v) => {
                (name, Dtype::I32, shape, v.iter().flat_map(|x| x.to_le_bytes()).collect())
            }
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(*dtype, shape.to_vec(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    safetensors::serialize_to_file(views, None, path).with_context(|| path.display().to_string())
}
