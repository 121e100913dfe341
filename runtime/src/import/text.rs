//! Tokenizer and chat template of a Hugging Face folder.
//!
//! What a template cannot do without is the tokenizer's own: the texts of special tokens come from
//! tokenizer_config.json and special_tokens_map.json, never from ids of config.json. Nothing about
//! a chat template stops an import: a model without one still continues texts.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use tracing::warn;

use super::{ImportError, hf_tensors::read_small, keys::Keys};
use crate::{
    chat::ChatTemplate, checkpoint::writer::Text, config::ModelConfig, tokenizer::Tokenizer,
};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens_decoder";
const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Special tokens that every tokenizer can have.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Reads what a folder says about text.
pub fn read(dir: &Path) -> Result<Text, ImportError> {
    let path = dir.join(TOKENIZER);
    if !path.exists() {
        return Err(no_tokenizer(dir, &path));
    }
    let tokenizer_json = read_small(&path, TOKENIZER_BYTES_MAX)?;
    let tokenizer = check_tokenizer(&path, &tokenizer_json)?;
    let mut text = Text { tokenizer_json, ..Text::default() };

    let config_path = dir.join(TOKENIZER_CONFIG);
    let config = config_path.exists().then(|| Keys::read(&config_path)).transpose()?;
    if let Some(keys) = &config {
        collect_special(keys, &mut text.special_tokens)?;
    }
    // As transformers: the older file counts where the newer one does not know all tokens.
    let map_path = dir.join(SPECIAL_TOKENS);
    let knows_all = config.as_ref().is_some_and(|keys| keys.value(ADDED_TOKENS).is_some());
    if map_path.exists() && !knows_all {
        collect_special(&Keys::read(&map_path)?, &mut text.special_tokens)?;
    }
    if let Some(keys) = &config {
        add_tokens(keys, &config_path, &tokenizer, &mut text.tokenizer_json)?;
    }

    let template_path = dir.join(TEMPLATE);
    let found = match template_path.exists() {
        true => {
            let read = read_small(&template_path, TEMPLATE_BYTES_MAX);
            let read = read.map_err(|error| error.to_string());
            let template = read.and_then(|bytes| {
                String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
            });
            Some((template_path, template))
        }
        false => {
            let template = config.as_ref().and_then(template);
            template.map(|template| (config_path, template))
        }
    };
    text.chat_template = match found {
        None => None,
        Some((path, Ok(template))) => usable_template(&path, template),
        Some((path, Err(reason))) => {
            warn_of_template(&path, &reason);
            None
        }
    };
    Ok(text)
}

/// Says what to do about a folder without tokenizer.json.
fn no_tokenizer(dir: &Path, path: &Path) -> ImportError {
    let older: &[&[&str]] =
        &[&["vocab.json", "merges.txt"], &["tokenizer.model"], &["spiece.model"]];
    let found = older.iter().find(|files| files.iter().all(|file| dir.join(file).exists()));
    match found {
        Some(files) => ImportError::file(
            path,
            format!("it is missing; the folder has its tokenizer as {} only", files.join(" and ")),
            "write it with Python: transformers.AutoTokenizer.from_pretrained(FOLDER)\
             .save_pretrained(FOLDER)",
        ),
        None => ImportError::file(
            path,
            "it is missing",
            "a tokenizer.json is expected beside config.json: download it with the model",
        ),
    }
}

/// Sees that a tokenizer loads.
pub(super) fn check_tokenizer(path: &Path, json: &[u8]) -> Result<Tokenizer, ImportError> {
    Tokenizer::from_json(json).map_err(|e| {
        ImportError::file(path, e.to_string(), "expected a file of the `tokenizers` library")
    })
}

/// A template as it is kept. One that does not compile is kept too: `--chat` says why it cannot be
/// used.
pub(super) fn usable_template(path: &Path, template: String) -> Option<String> {
    if template.len() as u64 > TEMPLATE_BYTES_MAX {
        let reason =
            format!("it has {} bytes, at most {TEMPLATE_BYTES_MAX} are kept", template.len());
        warn_of_template(path, &reason);
        return None;
    }
    if let Err(error) = ChatTemplate::new(&template, &BTreeMap::new()) {
        warn_of_template(path, &error.to_string());
    }
    Some(template)
}

fn warn_of_template(path: &Path, reason: &str) {
    let path = path.display();
    warn!("{path}: the chat template cannot be used, so --chat will not work: {reason}");
}

/// Adds what a file says of special tokens: names that end in `_token` and their texts, and those
/// that `extra_special_tokens` names.
fn collect_special(keys: &Keys, special: &mut BTreeMap<String, String>) -> Result<(), ImportError> {
    let named = keys.entries().filter(|(name, _)| name.ends_with("_token"));
    let more = ["extra_special_tokens", "model_specific_special_tokens"];
    let more = more.iter().filter_map(|key| keys.value(key)?.as_object()).flatten();
    for (name, value) in named.chain(more) {
        if value.is_null() {
            continue;
        }
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        match text {
            Some(text) => drop(special.insert(name.clone(), text.into())),
            None if ROLES.contains(&name.as_str()) => {
                return Err(keys.wrong(name, "expected a token's text"));
            }
            // Flags of this spelling come and go.
            None => {}
        }
    }
    Ok(())
}

/// Gives a tokenizer the tokens that only `added_tokens_decoder` knows.
fn add_tokens(
    keys: &Keys,
    path: &Path,
    tokenizer: &Tokenizer,
    json: &mut Vec<u8>,
) -> Result<(), ImportError> {
    let Some(Value::Object(decoder)) = keys.value(ADDED_TOKENS) else { return Ok(()) };
    let mut missing = Vec::new();
    for (id, token) in decoder {
        let content = token.get("content").and_then(Value::as_str);
        let (Ok(id), Some(content)) = (id.parse::<u32>(), content) else {
            return Err(keys.wrong(ADDED_TOKENS, "expected ids and tokens with their content"));
        };
        match tokenizer.token_id(content) {
            Some(known) if known == id => {}
            Some(known) => {
                let path = path.display();
                warn!(
                    "{path}: {content:?} is token {id} there and {known} in {TOKENIZER}, which counts"
                );
            }
            None if content.is_empty() => {}
            None => missing.push((id, content, token)),
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    missing.sort_by_key(|(id, ..)| *id);
    let wrong = |expected: &str| keys.wrong(ADDED_TOKENS, expected);
    let mut whole: Map<String, Value> = serde_json::from_slice(json)
        .map_err(|_| wrong("a tokenizer.json that is an object is expected beside it"))?;
    for (id, content, token) in &missing {
        // In the model's own table a token keeps its id, whatever others there are.
        if let Some(table) =
            whole.get_mut("model").and_then(|m| m.get_mut("vocab")?.as_object_mut())
        {
            if table.values().any(|other| other.as_u64() == Some(u64::from(*id))) {
                let path = path.display();
                warn!(
                    "{path}: token {id} is {content:?} there and another in {TOKENIZER}, which counts"
                );
                continue;
            }
            table.insert((*content).into(), (*id).into());
        }
        let flag =
            |name: &str, default: bool| token.get(name).and_then(Value::as_bool).unwrap_or(default);
        let special = flag("special", false);
        let entry = serde_json::json!({
            "id": id, "content": content, "special": special,
            "single_word": flag("single_word", false), "lstrip": flag("lstrip", false),
            "rstrip": flag("rstrip", false), "normalized": flag("normalized", !special),
        });
        let added = whole.entry("added_tokens").or_insert_with(|| Value::Array(Vec::new()));
        added
            .as_array_mut()
            .ok_or_else(|| wrong("a list of added_tokens is expected"))?
            .push(entry);
    }
    // The checkpoint's id depends on these bytes: names are in order, whatever serde_json keeps.
    whole.sort_keys();
    whole.values_mut().for_each(Value::sort_all_objects);
    *json = serde_json::to_vec(&whole).map_err(|_| wrong("a JSON object is expected"))?;
    let with = check_tokenizer(path, json)?;
    if let Some((id, content, _)) = missing
        .iter()
        .find(|(id, content, _)| with.token_id(content).is_some_and(|found| found != *id))
    {
        let expected = format!("{content:?} cannot have the id {id} beside {TOKENIZER}");
        return Err(wrong(&expected));
    }
    Ok(())
}

/// One template, or the one called `default` in a list; or why there is none.
fn template(keys: &Keys) -> Option<Result<String, String>> {
    match keys.value("chat_template")? {
        Value::String(template) => Some(Ok(template.clone())),
        Value::Array(list) => {
            let default = list.iter().find(|entry| entry["name"] == "default");
            default.and_then(|entry| entry["template"].as_str()).map(|text| Ok(text.to_owned()))
        }
        _ => Some(Err("chat_template is neither a template nor a list of named ones".into())),
    }
}

/// Completes the tokens that end a text by the tokenizer's own, and leaves out ids that can never
/// come.
pub(super) fn settle_ends(source: &Path, config: &mut ModelConfig, text: &Text) {
    let vocab = config.vocab;
    let known = |what: &str, id: u32| {
        if (id as usize) < vocab {
            return true;
        }
        let path = file_with(source, what, id);
        let path = path.display();
        warn!("{path}: {what} {id} is ignored: the model's vocabulary has {vocab} tokens");
        false
    };
    config.bos_token = config.bos_token.filter(|id| known("bos_token_id", *id));
    config.eos_tokens.retain(|id| known("eos_token_id", *id));
    let own = text.special_tokens.get("eos_token");
    let own = own.and_then(|end| Tokenizer::from_json(&text.tokenizer_json).ok()?.token_id(end));
    if let Some(id) = own.filter(|id| known("the tokenizer's eos_token", *id))
        && !config.eos_tokens.contains(&id)
    {
        config.eos_tokens.push(id);
    }
}

/// The file of a folder that says this of a key, or what is imported.
fn file_with(source: &Path, key: &str, id: u32) -> PathBuf {
    let says = |path: &PathBuf| {
        let keys = Keys::read(path).ok();
        keys.as_ref().and_then(|keys| keys.value(key)).is_some_and(|value| match value {
            Value::Array(list) => list.iter().any(|item| *item == id),
            value => *value == id,
        })
    };
    let files = ["generation_config.json", "config.json"].map(|name| source.join(name));
    files.into_iter().find(|path| path.exists() && says(path)).unwrap_or(source.into())
}
