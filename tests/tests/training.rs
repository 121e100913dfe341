//! Steps that several workers compute have the bits of one process, also when workers are lost.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use lite_llm_actors::training::{
    Hub, Patience,
    worker::{TrainWorkerOptions, serve},
};
use lite_llm_kernels::{DETERMINISM_VERSION, cpu::Cpu};
use lite_llm_runtime::{
    checkpoint::{Checkpoint, index::Hash},
    train::{
        config::TrainConfig,
        run::{Happened, Run},
        state,
    },
};
use lite_llm_transport::{
    endpoint::{Endpoint, Expect, Options},
    identity::Role,
    join::join,
    messages::TrainMessage,
    session::Hello,
};
use tokio::{runtime::Handle, task::JoinHandle};

const PATIENCE: Patience =
    Patience { alone: Duration::from_secs(60), regroup: Duration::from_millis(800) };

fn config(out: &str) -> TrainConfig {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
    let phase = |name: &str, tiers: &str, train: serde_json::Value| {
        serde_json::json!({
            "name": name, "tiers": tiers, "steps": 3, "lr": 3e-3, "warmup": 1, "train": train,
            "balance": { "tier": 0.01, "group": 0.01, "expert": 0.01, "z": 0.001 },
        })
    };
    let base = serde_json::json!({ "backbone": true, "tiers": ["tier_1b"] });
    let only = serde_json::json!({ "tiers": ["tier_10b"], "gates": true });
    let mut second = phase("1", "all", only);
    second["add"] =
        serde_json::json!({ "name": "tier_10b", "groups": 2, "experts": 3, "k_tier": 2 });
    let value = serde_json::json!({
        "out": out, "seed": 5,
        "model": { "new": {
            "tokenizer": demo, "hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8,
            "context": 64, "intermediate": 8, "tied_embeddings": true, "routes": [1, 1, 2],
            "renormalize": true, "tiers": [{ "name": "tier_1b", "groups": 1, "experts": 4 }],
        } },
        "data": { "files": ["text.txt"], "sequence": 16, "batch": 7, "held_out": 0.1 },
        "phase": [phase("0", "..tier_1b", base), second],
    });
    serde_json::from_value(value).unwrap()
}

fn write_text(dir: &Path) {
    let text: String =
        (0..400).map(|i| format!("The {}th line of a text about {}. ", i, i * i % 17)).collect();
    std::fs::write(dir.join("text.txt"), text).unwrap();
}

/// Losses of all steps, and the model's hash.
type Bits = (BTreeMap<u64, u64>, Hash);

/// Trains to the end; `between` is called after each step. Says how often it went on from a checkpoint, too.
fn finish(mut run: Run, mut between: impl FnMut(u64)) -> Result<(Bits, usize), String> {
    let (mut losses, mut resumed) = (BTreeMap::new(), 0);
    loop {
        let events = run.advance().map_err(|error| error.to_string())?;
        if events.is_empty() {
            break;
        }
        for event in events {
            match event {
                Happened::Step(record) => {
                    let bits = record.total.to_bits();
                    let before = losses.insert(record.step, bits);
                    assert!(before.is_none_or(|before| before == bits), "step {}", record.step);
                    between(record.step);
                }
                Happened::Resumed { .. } => resumed += 1,
                _ => {}
            }
        }
    }
    let model = Checkpoint::open(run.out().join(state::MODEL)).unwrap();
    Ok(((losses, Hash(model.id())), resumed))
}

fn worker(hub: &Hub, number: usize) -> JoinHandle<()> {
    let options = TrainWorkerOptions {
        hub: hub.address(),
        token: hub.token().clone(),
        name: format!("w{number}"),
        cpu: Arc::new(Cpu::best(1)),
    };
    tokio::spawn(async move {
        serve(options).await.unwrap();
    })
}

/// A worker that leaves with the first thing that it is told.
fn quits(hub: &Hub) -> JoinHandle<()> {
    let (address, token) = (hub.address(), hub.token().clone());
    tokio::spawn(async move {
        let hello = || Hello::new(DETERMINISM_VERSION);
        let identity = join(address, &token, Role::Worker, "quits", &hello()).await.unwrap();
        let endpoint = Endpoint::outgoing(address, &identity, Options::new(hello())).unwrap();
        let connection = endpoint.connect(address, &Expect::coordinator()).await.unwrap();
        let (_to, mut from) = connection.accept_stream().await.unwrap().into_frames();
        while let Ok(Some(frame)) = from.recv().await {
            if matches!(frame.decode::<TrainMessage>(), Ok(TrainMessage::Order { .. })) {
                break;
            }
        }
        connection.close("gone with its order");
    })
}

async fn shared(
    dir: &Path,
    out: &'static str,
    count: usize,
    patience: Patience,
    start: impl Fn(&Hub, usize) -> JoinHandle<()>,
    mut between: impl FnMut(u64, &mut Vec<JoinHandle<()>>) + Send + 'static,
) -> Result<(Bits, usize), String> {
    let loopback = "127.0.0.1:0".parse().unwrap();
    let hub = Hub::start(loopback, count, patience).await.unwrap();
    let mut workers: Vec<_> = (1..=count).map(|number| start(&hub, number)).collect();
    let (dir, ranks) = (dir.to_owned(), hub.ranks(Handle::current()));
    let bits = tokio::task::spawn_blocking(move || {
        let mut run = Run::open(config(out), &dir, Arc::new(Cpu::best(1)), false).unwrap();
        run.share(ranks).map_err(|error| error.to_string())?;
        finish(run, |step| between(step, &mut workers))
    });
    let bits = bits.await.unwrap();
    hub.stop().await;
    bits
}

fn alone(dir: &Path) -> Bits {
    let run = Run::open(config("alone"), dir, Arc::new(Cpu::best(2)), false).unwrap();
    let (expected, resumed) = finish(run, |_| {}).unwrap();
    assert_eq!((expected.0.len(), resumed), (6, 0));
    expected
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_workers_has_the_bits_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let expected = alone(dir.path());
    for (out, count) in [("one", 1), ("two", 2), ("three", 3)] {
        let found = shared(dir.path(), out, count, PATIENCE, worker, |_, _| {}).await.unwrap();
        assert_eq!(found, (expected.clone(), 0), "{count} workers");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_loses_workers_goes_on_from_its_checkpoint_with_equal_bits() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let expected = alone(dir.path());
    // One is lost after the second step, another after the fifth: the last computes alone. Each time once: the steps
    // behind the checkpoint are done again.
    let mut lost = [2, 5].into_iter().peekable();
    let found = shared(dir.path(), "lost", 3, PATIENCE, worker, move |step, workers| {
        if lost.next_if_eq(&step).is_some() {
            workers.pop().unwrap().abort();
        }
    });
    assert_eq!(found.await.unwrap(), (expected.clone(), 2), "with two workers lost");
    // One leaves with the first thing that it is told.
    let start = |hub: &Hub, number| if number == 3 { quits(hub) } else { worker(hub, number) };
    let found = shared(dir.path(), "left", 3, PATIENCE, start, |_, _| {});
    assert_eq!(found.await.unwrap().0, expected, "with a worker that left at once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_without_workers_says_so_and_goes_on_from_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let expected = alone(dir.path());
    let patience = Patience { alone: Duration::from_secs(4), ..PATIENCE };
    let found = shared(dir.path(), "broken", 1, patience, worker, |step, workers| {
        if step == 4 {
            workers.pop().unwrap().abort();
        }
    });
    let error = found.await.unwrap_err();
    assert!(error.contains("no worker is left") && error.contains("--resume"), "{error}");
    let run = Run::open(config("broken"), dir.path(), Arc::new(Cpu::best(1)), true).unwrap();
    assert_eq!(finish(run, |_| {}).unwrap().0.1, expected.1);
}
