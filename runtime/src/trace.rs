//! Recorded routing: which experts a model chose for a text, and what could be predicted of it.
//!
//! A safetensors file holds, for each text NAME, with L sparse layers and T tokens:
//! - `routes.NAME` u8 or u16 `[L, T, K]`: experts by flat index, best first; the largest number of the
//!   type where a token has fewer;
//! - `predicted.NAME` `[L − 1, T, P]`: what the gates of layer l + 1 say of layer l's router input;
//! - `tokens.NAME` i32 `[T]`;
//!
//! and, in its metadata, `experts`, their number in a layer.

use std::{collections::BTreeMap, path::Path};

use lite_llm_kernels::device::Device;
use safetensors::{
    SafeTensorError, SafeTensors,
    tensor::{Dtype, TensorView},
};

use crate::{
    config::MoeConfig,
    engine::{Engine, Event, Step},
    expert::{ExpertKey, ExpertStore},
    random::{Purpose, random_u64},
    routing::Routes,
    sequence::Request,
    tier::TierSet,
};

/// Where a token has no further expert.
const NONE: u16 = u16::MAX;

/// The routing of one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// What it is of.
    pub name: String,
    /// Experts of a layer.
    pub experts: usize,
    /// The text.
    pub tokens: Vec<u32>,
    /// K, and the experts of each layer `[T, K]`.
    k: usize,
    routes: Vec<Vec<u16>>,
    /// P, and what is predicted for each layer but the first `[T, P]`.
    predicted_k: usize,
    predicted: Vec<Vec<u16>>,
}

/// A file that is no trace.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct TraceError {
    path: String,
    reason: String,
}

fn check_experts(experts: usize) -> Result<(), String> {
    let most = usize::from(NONE) - 1;
    match experts <= most {
        true => Ok(()),
        false => Err(format!("{experts} experts in a layer; a trace has names for {most}")),
    }
}

/// A token uses an expert once: what counts its uses relies on it.
fn check_rows(name: &str, all: &[u16], k: usize) -> Result<(), String> {
    let mut seen = Vec::new();
    for token in 0..all.len() / k.max(1) {
        seen.clear();
        seen.extend_from_slice(row(all, k, token));
        seen.sort_unstable();
        if let Some(twice) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!(
                "{name} names expert {} twice in row {token}; each once is expected",
                twice[0]
            ));
        }
    }
    Ok(())
}

/// The experts of a row that are there.
fn row(all: &[u16], k: usize, token: usize) -> &[u16] {
    let row = &all[token * k..][..k];
    &row[..row.iter().position(|&expert| expert == NONE).unwrap_or(k)]
}

impl Trace {
    /// One of no tokens yet, of a model with so many sparse layers. Refused if a layer has more
    /// experts than a trace can name.
    pub fn new(name: &str, layers: usize, moe: &MoeConfig) -> Result<Self, String> {
        let k = moe.routes_max(|_| true);
        let experts = moe.experts();
        check_experts(experts)?;
        Ok(Self {
            name: name.into(),
            experts,
            tokens: Vec::new(),
            k,
            routes: vec![Vec::new(); layers],
            predicted_k: (k + k.div_ceil(2)).min(experts),
            predicted: vec![Vec::new(); layers.saturating_sub(1)],
        })
    }

    /// One of random routing: every choice among tiers, groups and experts is uniform, and nothing
    /// is predicted. The tokens are numbers of no meaning. Refused as [`Trace::new`] is.
    pub fn uniform(
        layers: usize,
        moe: &MoeConfig,
        tokens: usize,
        seed: u64,
    ) -> Result<Self, String> {
        let mut trace = Self::new("uniform", layers, moe)?;
        trace.predicted_k = 0;
        trace.tokens = (0..tokens as u32).collect();
        let here: Vec<u32> =
            (0u32..).zip(&moe.tiers).filter(|(_, tier)| !tier.absent).map(|(at, _)| at).collect();
        let mut draws = 0;
        let mut some_of = |count: u32, of: u32| {
            let mut all: Vec<u32> = (0..of).collect();
            let count = count.min(of) as usize;
            for at in 0..count {
                let left = u64::from(of) - at as u64;
                let other = at + (random_u64(seed, Purpose::Sampling, draws) % left) as usize;
                draws += 1;
                all.swap(at, other);
            }
            all.truncate(count);
            all
        };
        for routes in &mut trace.routes {
            for _ in 0..tokens {
                let end = routes.len() + trace.k;
                for at in some_of(moe.routing.k_tier, here.len() as u32) {
                    let tier = here[at as usize] as usize;
                    let config = &moe.tiers[tier];
                    for group in some_of(moe.k_group(tier), config.groups) {
                        for expert in some_of(moe.k_expert(tier), config.experts_per_group) {
                            let key = ExpertKey { layer: 0, tier: tier as u16, group, expert };
                            routes.push(key.flat(moe) as u16);
                        }
                    }
                }
                routes.resize(end, NONE);
            }
        }
        Ok(trace)
    }

    /// Sparse layers.
    pub fn layers(&self) -> usize {
        self.routes.len()
    }

    /// Experts of a token, at most.
    pub fn active(&self) -> usize {
        self.k
    }

    /// The experts of a token in a layer, best first.
    pub fn routes(&self, layer: usize, token: usize) -> &[u16] {
        row(&self.routes[layer], self.k, token)
    }

    /// What the layer before it predicts for a layer; nothing for the first.
    pub fn predicted(&self, layer: usize, token: usize) -> &[u16] {
        match layer.checked_sub(1).and_then(|before| self.predicted.get(before)) {
            Some(predicted) => row(predicted, self.predicted_k, token),
            None => &[],
        }
    }

    /// Only the first so many tokens.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens < self.tokens.len() {
            self.tokens.truncate(tokens);
            self.routes.iter_mut().for_each(|layer| layer.truncate(tokens * self.k));
            self.predicted.iter_mut().for_each(|l| l.truncate(tokens * self.predicted_k));
        }
    }

    /// Runs a text alone, all experts in one store, and adds its routing.
    pub fn record<D: Device>(
        &mut self,
        engine: &mut Engine<D>,
        store: &dyn ExpertStore<D::Matrix>,
        tiers: &TierSet,
        text: &[u32],
    ) -> Result<(), String> {
        let backbone = engine.backbone().clone();
        let Some(moe) = &backbone.config.moe else { return Err("the model has no experts".into()) };
        let request = Request { tiers: tiers.clone(), ..Request::greedy(text.to_vec(), 0) };
        let submitted = engine.submit(0, request);
        submitted.map_err(|error| error.to_string())?;
        let mut layer = 0;
        loop {
            match engine.step() {
                Step::Dispatch(pass) => {
                    if let Some(routes) = engine.routes(pass) {
                        push(&mut self.routes[layer], self.k, routes, moe);
                    }
                    layer += 1;
                    if layer < self.routes.len() {
                        let routes = engine.predicted(pass).map_err(|error| error.to_string())?;
                        push(&mut self.predicted[layer - 1], self.predicted_k, &routes, moe);
                    }
                    engine.run_pass(pass, store);
                }
                Step::Advanced => layer = 0,
                Step::Idle => break,
            }
        }
        while let Some(event) = engine.poll_event() {
            if let Event::Failed { reason, .. } = event {
                return Err(reason);
            }
        }
        self.tokens.extend(text);
        Ok(())
    }
}

fn push(to: &mut Vec<u16>, k: usize, routes: &Routes, moe: &MoeConfig) {
    for row in 0..routes.rows() {
        let end = to.len() + k;
        to.extend(routes.flat_row(row, moe).map(|expert| expert as u16));
        to.resize(end, NONE);
    }
}

/// Writes traces of one model.
pub fn write(path: &Path, traces: &[Trace]) -> Result<(), TraceError> {
    let experts = traces.iter().map(|trace| trace.experts).max().unwrap_or(0);
    let narrow = experts < usize::from(u8::MAX);
    let pack = |all: &[Vec<u16>]| -> Vec<u8> {
        let all = all.iter().flatten();
        match narrow {
            true => all.map(|&expert| expert.min(u16::from(u8::MAX)) as u8).collect(),
            false => all.flat_map(|expert| expert.to_le_bytes()).collect(),
        }
    };
    let dtype = if narrow { Dtype::U8 } else { Dtype::U16 };
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for trace in traces {
        let Trace { name, tokens, k, routes, predicted_k, predicted, .. } = trace;
        let length = tokens.len();
        let shape = vec![routes.len(), length, *k];
        tensors.push((format!("routes.{name}"), dtype, shape, pack(routes)));
        let shape = vec![predicted.len(), length, *predicted_k];
        tensors.push((format!("predicted.{name}"), dtype, shape, pack(predicted)));
        let ids = tokens.iter().flat_map(|&id| (id as i32).to_le_bytes()).collect();
        tensors.push((format!("tokens.{name}"), Dtype::I32, vec![length], ids));
    }
    let failed = |reason: &dyn std::fmt::Display| TraceError {
        path: path.display().to_string(),
        reason: format!("cannot write: {reason}"),
    };
    let mut views = BTreeMap::new();
    for (name, dtype, shape, bytes) in &tensors {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| failed(&error))?;
        views.insert(name.clone(), view);
    }
    let metadata = [("experts".to_owned(), experts.to_string())].into();
    safetensors::serialize_to_file(&views, Some(metadata), path).map_err(|error| failed(&error))
}

/// Reads the traces of a file, by name.
pub fn read(path: &Path) -> Result<Vec<Trace>, TraceError> {
    let failed = |reason: String| TraceError { path: path.display().to_string(), reason };
    let bytes = std::fs::read(path).map_err(|error| failed(format!("cannot read: {error}")))?;
    parse(&bytes).map_err(failed)
}

fn parse(bytes: &[u8]) -> Result<Vec<Trace>, String> {
    let no_trace = |error: SafeTensorError| {
        format!("no file of routing ({error}); `lite-llm eval --trace FILE` records one")
    };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(no_trace)?;
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let stated = header.metadata().as_ref().and_then(|all| all.get("experts")?.parse().ok());
    let mut names: Vec<&str> = file.names().into_iter().collect();
    names.sort_unstable();
    let mut traces = Vec::new();
    for name in names.iter().filter_map(|name| name.strip_prefix("routes.")) {
        let ([layers, length, k], routes) = numbers(&file, &format!("routes.{name}"))?;
        let ([before, predicted_length, predicted_k], predicted) =
            numbers(&file, &format!("predicted.{name}"))?;
        let tensor = file.tensor(&format!("tokens.{name}")).map_err(|error| error.to_string())?;
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        if dtype != Dtype::I32 || shape != [length] {
            return Err(format!(
                "tokens.{name} is {dtype:?} {shape:?}; I32 [{length}] is expected"
            ));
        }
        if layers == 0 || length == 0 || k == 0 {
            return Err(format!("routes.{name} is [{layers}, {length}, {k}]; nothing is in it"));
        }
        if before + 1 != layers || predicted_length != length {
            return Err(format!(
                "predicted.{name} has {before} layers and {predicted_length} tokens; {} and {length} \
                 are expected",
                layers - 1
            ));
        }
        let tokens = tensor.data().chunks_exact(4);
        let tokens = tokens.map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect();
        check_rows(&format!("routes.{name}"), &routes, k)?;
        check_rows(&format!("predicted.{name}"), &predicted, predicted_k)?;
        let named = routes.iter().chain(&predicted).filter(|&&expert| expert != NONE);
        let seen = named.map(|&expert| usize::from(expert) + 1).max().unwrap_or(0);
        let cut = |all: Vec<u16>, k: usize| all.chunks(length * k).map(<[u16]>::to_vec).collect();
        traces.push(Trace {
            name: name.into(),
            experts: seen.max(stated.unwrap_or(0)),
            tokens,
            k,
            routes: cut(routes, k),
            predicted_k,
            predicted: cut(predicted, predicted_k.max(1)),
        });
    }
    let experts = traces.iter().map(|trace| trace.experts).max().unwrap_or(0);
    check_experts(experts)?;
    traces.iter_mut().for_each(|trace| trace.experts = experts);
    match traces.is_empty() {
        true => {
            Err("no tensor is named routes.…; `lite-llm eval --trace` writes such files".into())
        }
        false => Ok(traces),
    }
}

fn numbers(file: &SafeTensors<'_>, name: &str) -> Result<([usize; 3], Vec<u16>), String> {
    let tensor = file.tensor(name).map_err(|error| error.to_string())?;
    let data = tensor.data();
    let numbers = match tensor.dtype() {
        Dtype::U8 => data.iter().map(|&n| if n == u8::MAX { NONE } else { n.into() }).collect(),
        Dtype::U16 => data.chunks_exact(2).map(|n| u16::from_le_bytes([n[0], n[1]])).collect(),
        other => return Err(format!("{name} is {other:?}; U8 or U16 is expected")),
    };
    match *tensor.shape() {
        [a, b, c] => Ok(([a, b, c], numbers)),
        ref other => Err(format!("{name} has the shape {other:?}; three dimensions are expected")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lite_llm_kernels::{cpu::Cpu, simd::Simd};

    use super::*;
    use crate::{backbone::Backbone, checkpoint::Checkpoint, store::DramStore};

    const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");

    fn trace(name: &str, experts: usize) -> Trace {
        Trace {
            name: name.into(),
            experts,
            tokens: vec![5, 70_000, 5],
            k: 2,
            routes: vec![vec![0, 3, 1, NONE, 2, 1], vec![1, 0, NONE, NONE, 3, 2]],
            predicted_k: 3,
            predicted: vec![vec![1, 2, 0, 3, 1, NONE, 0, 1, 2]],
        }
    }

    #[test]
    fn a_trace_reads_back_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        for experts in [4, 254, 255, 300] {
            let written = vec![trace("a", experts), trace("b.c", experts)];
            write(&path, &written).unwrap();
            assert_eq!(read(&path).unwrap(), written, "{experts}");
        }
        let read = &read(&path).unwrap()[0];
        assert_eq!((read.routes(0, 1), read.routes(1, 1)), (&[1][..], &[][..]));
        assert_eq!((read.predicted(0, 1), read.predicted(1, 1)), (&[][..], &[3, 1][..]));
    }

    #[test]
    fn what_is_recorded_is_what_the_engine_chose_and_the_early_gate_is_often_right() {
        let checkpoint = Checkpoint::open(DEMO).unwrap();
        let store = DramStore::new(u64::MAX);
        store.load_all(&checkpoint).unwrap();
        let backbone = Backbone::load(&checkpoint, Arc::new(Cpu::new(1, Simd::best())), |_, _| {});
        let mut engine = Engine::new(Arc::new(backbone.unwrap()), 64 << 20).unwrap();
        let config = checkpoint.config().clone();
        let (moe, layers) = (config.moe.as_ref().unwrap(), config.sparse_layers().count());
        let mut trace = Trace::new("demo", layers, moe).unwrap();
        let texts = [(1..60u32).map(|i| i * 31 % 200).collect::<Vec<_>>(), vec![7, 8]];
        for text in &texts {
            trace.record(&mut engine, &store, &TierSet::All, text).unwrap();
        }
        assert_eq!(trace.tokens, texts.concat());
        let mut first = 0;
        for text in &texts {
            engine.submit(1, Request { routes: true, ..Request::greedy(text.clone(), 0) }).unwrap();
            engine.run_local(&store);
            while let Some(event) = engine.poll_event() {
                let Event::Routes { rows, experts, .. } = event else { continue };
                let k = trace.active();
                for (at, chosen) in experts.chunks(k).enumerate() {
                    let chosen = chosen.iter().filter(|&&expert| expert >= 0);
                    let recorded = trace.routes(at / rows, first + at % rows);
                    assert!(
                        chosen.eq(recorded
                            .iter()
                            .map(|&e| i32::from(e))
                            .collect::<Vec<_>>()
                            .iter())
                    );
                }
            }
            first += text.len();
        }
        let (mut right, mut named) = (0, 0);
        for layer in 1..layers {
            for token in 0..trace.tokens.len() {
                let predicted = trace.predicted(layer, token);
                let routes = trace.routes(layer, token);
                assert!(predicted.len() > routes.len());
                named += routes.len();
                right += routes.iter().filter(|e| predicted[..routes.len()].contains(e)).count();
            }
        }
        assert!(trace.predicted(0, 0).is_empty());
        assert!(right * 10 > named * 4, "{right} of {named}");
    }

    #[test]
    fn uniform_routing_names_each_expert_equally_often_and_none_twice_for_a_token() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let config = Checkpoint::open(demo).unwrap().config().clone();
        let moe = config.moe.as_ref().unwrap();
        let trace = Trace::uniform(2, moe, 4000, 1).unwrap();
        assert_eq!(trace, Trace::uniform(2, moe, 4000, 1).unwrap());
        assert_ne!(trace, Trace::uniform(2, moe, 4000, 2).unwrap());
        let mut counts = vec![0; moe.experts()];
        for token in 0..4000 {
            let mut row = trace.routes(1, token).to_vec();
            assert_eq!(row.len(), trace.active());
            assert!(trace.predicted(1, token).is_empty());
            row.iter().for_each(|&expert| counts[usize::from(expert)] += 1);
            row.sort_unstable();
            row.dedup();
            assert_eq!(row.len(), trace.active(), "token {token}");
        }
        let mean = 4000.0 * trace.active() as f64 / moe.experts() as f64;
        for (expert, &count) in counts.iter().enumerate() {
            // Five standard deviations of a binomial count.
            assert!((f64::from(count) - mean).abs() < 5.0 * mean.sqrt(), "{expert}: {count}");
        }
    }

    #[test]
    fn a_file_that_is_no_trace_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        std::fs::write(&path, b"nonsense").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("trace.safetensors") && error.contains("eval --trace"), "{error}");
        let mut bad = trace("a", 4);
        bad.predicted.push(bad.predicted[0].clone());
        write(&path, &[bad]).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("predicted.a has 2 layers"), "{error}");
        let mut bad = trace("a", 4);
        bad.routes[1][5] = 3;
        write(&path, &[bad]).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("routes.a names expert 3 twice in row 5"), "{error}");
        write(&path, &[trace("a", 65_535)]).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("65535 experts in a layer"), "{error}");
        let config = Checkpoint::open(DEMO).unwrap().config().clone();
        let mut moe = config.moe.unwrap();
        moe.tiers[0].experts_per_group = 70_000;
        assert!(Trace::new("a", 2, &moe).unwrap_err().contains("a layer"));
    }
}
