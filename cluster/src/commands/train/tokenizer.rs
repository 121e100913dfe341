//! `lite-llm tokenizer`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use lite_llm_runtime::{
    tokenizer::{Tokenizer, learn},
    train::data::texts,
};
use serde_json::json;

use crate::{
    cli::{TokenizerCommand, TokenizerTrainArgs},
    commands::bad_input,
    size::Size,
};

pub(in crate::commands) fn tokenizer(command: TokenizerCommand, json: bool) -> Result<()> {
    let TokenizerCommand::Train(args) = command;
    let TokenizerTrainArgs { files, vocab, end, out } = args;
    let texts = texts(Path::new(""), &files).map_err(bad_input)?;
    let learned = learn(&texts, vocab, &end).map_err(bad_input)?;
    let tokenizer = Tokenizer::from_json(&learned)?;
    fs::write(&out, &learned).with_context(|| format!("{}: cannot write", out.display()))?;
    let bytes: usize = texts.iter().map(String::len).sum();
    let mut tokens = 0;
    for text in &texts {
        tokens += tokenizer.encode(text, false)?.len();
    }
    let entries = tokenizer.vocab_size();
    if entries < vocab {
        remark!("warning: the text has no more than {entries} entries; give more text for {vocab}");
    }
    let each = bytes as f64 / tokens.max(1) as f64;
    if json {
        say!("{}", json!({ "out": out, "entries": entries, "bytes": bytes, "tokens": tokens }));
    } else {
        say!(
            "{entries} entries learned from {} of text, of which a token holds {each:.2} bytes: {}",
            Size(bytes as u64),
            out.display()
        );
    }
    Ok(())
}
