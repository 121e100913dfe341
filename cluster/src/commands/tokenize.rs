//! `lite-llm tokenize`: what a text becomes before a model sees it.
//!
//! A text may be longer than the model's context: this is where one looks how much longer.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use lite_llm_actors::coordinator::PROMPT_BYTES_MAX;
use lite_llm_runtime::{
    chat::{ChatTemplate, Conversation},
    prompt::Prompts,
};
use serde_json::json;

use super::{
    bad_input, open_model,
    run::{prompt_error, read_prompt, unix_time},
};
use crate::cli::TokenizeArgs;

pub(super) async fn tokenize(args: TokenizeArgs, json: bool) -> Result<()> {
    let checkpoint = open_model(args.model.as_ref())?;
    let mut prompts = Prompts::of(&checkpoint).map_err(bad_input)?;
    if let Some(path) = &args.template {
        let shown = path.display();
        let tokens = &checkpoint.manifest().text.special_tokens;
        let template = ChatTemplate::new(&read_text(path)?, tokens);
        let template = template.map_err(|error| bad_input(anyhow!("{shown}: {error}")))?;
        prompts = prompts.with_template(template);
    }
    let conversation = match (&args.conversation, &args.text) {
        (Some(path), _) => {
            let shown = path.display();
            let read = Conversation::from_json(&read_text(path)?);
            let read = read.map_err(|error| bad_input(anyhow!("{shown}: {error}")))?;
            Some(read.at(unix_time()))
        }
        (None, Some(text)) if args.chat.chat || args.template.is_some() => {
            let text = read_prompt(text, PROMPT_BYTES_MAX).await?;
            Some(args.chat.conversation(&text))
        }
        _ => None,
    };
    let (rendered, ids) = match (&conversation, &args.text) {
        (Some(conversation), _) => {
            let rendered = prompts.render(conversation).map_err(prompt_error)?;
            let ids = prompts.tokenizer().encode(&rendered, false)?;
            (Some(rendered), ids)
        }
        (None, text) => {
            let text = text.as_deref().unwrap_or_default();
            let text = read_prompt(text, PROMPT_BYTES_MAX).await?;
            (None, prompts.tokenizer().encode(&text, true)?)
        }
    };
    let piece = |id: &u32| prompts.tokenizer().token(*id).unwrap_or_default();
    if json {
        let pieces: Vec<_> = ids.iter().map(piece).collect();
        let mut line = json!({ "ids": ids, "pieces": pieces });
        if let Some(rendered) = rendered {
            line["prompt"] = rendered.into();
        }
        say!("{line}");
        return Ok(());
    }
    if let Some(rendered) = rendered {
        say!("{rendered}");
        say!();
    }
    for id in &ids {
        say!("{id:>7}  {:?}", piece(id));
    }
    remark!("[{} tokens of {} that fit]", ids.len(), checkpoint.config().context);
    Ok(())
}

fn read_text(path: &Path) -> Result<String> {
    const BYTES_MAX: u64 = 64 << 20;
    let shown = path.display();
    let size = std::fs::metadata(path).map(|about| about.len());
    let size = size.with_context(|| format!("{shown}: cannot open")).map_err(bad_input)?;
    if size > BYTES_MAX {
        return Err(bad_input(anyhow!("{shown}: {size} bytes; at most {BYTES_MAX} are read")));
    }
    let text = std::fs::read_to_string(path);
    text.with_context(|| format!("{shown}: cannot read")).map_err(bad_input)
}
