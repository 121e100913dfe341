//! The model without actors or network: open a checkpoint, submit a prompt, run to the end.
//!
//! `cargo run --release -p lite-llm-examples --example forward_pass`

use std::sync::Arc;

use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{
    backbone::Backbone,
    checkpoint::Checkpoint,
    engine::{Engine, Event},
    sequence::Request,
    store::DramStore,
    tokenizer::Tokenizer,
};

fn main() -> anyhow::Result<()> {
    let checkpoint =
        Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe"))?;
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?)?;

    // The dense part of the model goes to the device; experts wait in a store.
    let device = Arc::new(Cpu::best(2));
    let backbone = Arc::new(Backbone::load(&checkpoint, device, |_, _| {})?);
    let experts = DramStore::new(1 << 30);
    experts.load_all(&checkpoint)?;

    let mut engine = Engine::new(backbone, 64 << 20)?;
    let prompt = "The sort command";
    engine.submit(1, Request::greedy(tokenizer.encode(prompt, true)?, 24))?;
    engine.run_local(&experts);

    print!("{prompt}");
    let mut text = tokenizer.stream();
    while let Some(event) = engine.poll_event() {
        match event {
            Event::Token { id, .. } => print!("{}", text.push(id)),
            Event::Failed { reason, .. } => anyhow::bail!(reason),
            _ => {}
        }
    }
    println!();
    Ok(())
}
