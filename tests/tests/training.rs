//! Steps that several workers compute have the bits of one process, also when workers are lost.

use std::{path::Path, sync::Arc, time::Duration};

use lite_llm_actors::training::{
    Hub,
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

const PATIENCE: Duration = Duration::from_secs(60);

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
type Bits = (Vec<u64>, Hash);

/// Trains to the end; `between` is called after each step.
fn finish(mut run: Run, mut between: impl FnMut(u64)) -> Result<Bits, String> {
    let mut losses = Vec::new();
    loop {
        let events = run.advance().map_err(|error| error.to_string())?;
        if events.is_empty() {
            break;
        }
        for event in events {
            if let Happened::Step(record) = event {
                losses.push(record.total.to_bits());
                between(record.step);
            }
        }
    }
    let model = Checkpoint::open(run.out().join(state::MODEL)).unwrap();
    Ok((losses, Hash(model.id())))
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

/// A worker that leaves when it has been given something to compute.
fn quits(hub: &Hub) -> JoinHandle<()> {
    let (address, token) = (hub.address(), hub.token().clone());
    tokio::spawn(async move {
        let hello = || Hello::new(DETERMINISM_VERSION);
        let identity = join(address, &token, Role::Worker, "quits", &hello()).await.unwrap();
        let endpoint = Endpoint::outgoing(address, &identity, Options::new(hello())).unwrap();
        let connection = endpoint.connect(address, &Expect::coordinator()).await.unwrap();
        let (_to, mut from) = connection.accept_stream().await.unwrap().into_frames();
        while let Ok(Some(frame)) = from.recv().await {
            if matches!(frame.decode::<TrainMessage>(), Ok(TrainMessage::Work { .. })) {
                break;
            }
        }
        connection.close("gone with its node");
    })
}

async fn shared(
    dir: &Path,
    out: &'static str,
    count: usize,
    patience: Duration,
    start: impl Fn(&Hub, usize) -> JoinHandle<()>,
    mut between: impl FnMut(u64, &mut Vec<JoinHandle<()>>) + Send + 'static,
) -> Result<Bits, String> {
    let loopback = "127.0.0.1:0".parse().unwrap();
    let hub = Hub::start(loopback, count, patience).await.unwrap();
    let mut workers: Vec<_> = (1..=count).map(|number| start(&hub, number)).collect();
    hub.ready().await.unwrap();
    let (dir, remote) = (dir.to_owned(), hub.workers(Handle::current()));
    let bits = tokio::task::spawn_blocking(move || {
        let mut run = Run::open(config(out), &dir, Arc::new(Cpu::best(1)), false).unwrap();
        run.share(remote);
        finish(run, |step| between(step, &mut workers))
    });
    let bits = bits.await.unwrap();
    hub.stop().await;
    bits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_workers_has_the_bits_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let run = Run::open(config("alone"), dir.path(), Arc::new(Cpu::best(2)), false).unwrap();
    let expected = finish(run, |_| {}).unwrap();
    assert_eq!(expected.0.len(), 6);
    for (out, count) in [("one", 1), ("two", 2), ("three", 3)] {
        let found = shared(dir.path(), out, count, PATIENCE, worker, |_, _| {}).await.unwrap();
        assert_eq!(found, expected, "{count} workers");
    }
    // One is lost after the second step, another after the fourth: the last computes alone.
    let found = shared(dir.path(), "lost", 3, PATIENCE, worker, |step, workers| {
        if step == 2 || step == 4 {
            workers.pop().unwrap().abort();
        }
    });
    assert_eq!(found.await.unwrap(), expected, "with two workers lost");
    // One leaves with the first node that it was given.
    let start = |hub: &Hub, number| if number == 3 { quits(hub) } else { worker(hub, number) };
    let found = shared(dir.path(), "left", 3, PATIENCE, start, |_, _| {});
    assert_eq!(found.await.unwrap(), expected, "with a worker that left with its node");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_without_workers_says_so_and_goes_on_from_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let run = Run::open(config("alone"), dir.path(), Arc::new(Cpu::best(2)), false).unwrap();
    let expected = finish(run, |_| {}).unwrap();
    let patience = Duration::from_secs(5);
    let found = shared(dir.path(), "broken", 1, patience, worker, |step, workers| {
        if step == 4 {
            workers.pop().unwrap().abort();
        }
    });
    let error = found.await.unwrap_err();
    assert!(error.contains("no worker is left") && error.contains("--resume"), "{error}");
    let run = Run::open(config("broken"), dir.path(), Arc::new(Cpu::best(1)), true).unwrap();
    assert_eq!(finish(run, |_| {}).unwrap().1, expected.1);
}
