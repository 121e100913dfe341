//! A sparse layer by itself (specification, 3.5): routes, packs, runs and combines.

mod grow;
mod hf;

use std::sync::Arc;

use lite_llm_kernels::{cpu::Cpu, device::Device};
use lite_llm_runtime::{
    backbone::{Backbone, FeedForwardLayer},
    checkpoint::Checkpoint,
    store::DramStore,
    tier::TierSet,
};

const ROWS: usize = 9;

#[test]
fn rows_together_are_rows_alone_and_a_row_without_its_experts_fails_by_name() {
    let (_dir, out) = grow::checkpoint();
    let checkpoint = Checkpoint::open(out).unwrap();
    let device = Arc::new(Cpu::best(2));
    let backbone = Backbone::load(&checkpoint, device.clone(), |_, _| {}).unwrap();
    let FeedForwardLayer::Sparse(layer) = &backbone.layers[1].feed_forward else {
        panic!("layer 1 is sparse");
    };
    let config = checkpoint.config();
    let mask = TierSet::All.mask(&config.moe.as_ref().unwrap().tiers).unwrap();
    let forward = |states: &[f32], store: &DramStore| {
        let rows = states.len() / config.hidden;
        let mut hidden = device.tensor(rows, config.hidden).unwrap();
        device.write(&mut hidden, states).unwrap();
        let mut out = device.tensor(rows, config.hidden).unwrap();
        let tiers = vec![&mask; rows];
        let failed = layer.forward(&device, store, &hidden, &tiers, &mut out).unwrap();
        let bits: Vec<u32> = device.read(&out).unwrap().iter().map(|v| v.to_bits()).collect();
        (bits, failed)
    };
    let states: Vec<f32> =
        (0..ROWS * config.hidden).map(|i| (i as f32 * 0.37).sin() * 2.0).collect();
    let store = DramStore::new(u64::MAX);
    store.load_all(&checkpoint).unwrap();
    let (together, failed) = forward(&states, &store);
    assert_eq!(failed, []);
    let rows = states.chunks(config.hidden).zip(together.chunks(config.hidden));
    for (row, (alone, expected)) in rows.clone().enumerate() {
        assert!(forward(alone, &store) == (expected.to_vec(), vec![]), "row {row}");
    }
    // One expert is gone: the rows that need it fail, the others keep their bits.
    let some = config.expert_keys().find(|key| {
        store.remove(*key);
        let failed = forward(&states, &store).1;
        let part = !failed.is_empty() && failed.len() < ROWS;
        if !part {
            store.load(&checkpoint, *key).unwrap();
        }
        part
    });
    let key = some.expect("an expert that some rows need, and not all");
    let (bits, failed) = forward(&states, &store);
    assert!(failed.iter().all(|(_, reason)| reason.contains(&key.to_string())), "{failed:?}");
    for (row, (_, expected)) in rows.enumerate() {
        if !failed.iter().any(|(failed, _)| *failed == row) {
            assert!(bits[row * config.hidden..][..config.hidden] == *expected, "row {row}");
        }
    }
}
