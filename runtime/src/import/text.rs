//! Tokenizer and chat template of a Hugging Face folder.

use std::path::Path;

use serde_json::Value;

use super::{ImportError, hf_config::Keys, hf_tensors::read_small};
use crate::{chat::ChatTemplate, checkpoint::writer::Text, tokenizer::Tokenizer};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Reads what a folder says about text.
pub fn read(dir: &Path) -> Result<Text, ImportError> {
    let path = dir.join(TOKENIZER);
    let tokenizer_json = read_small(&path, TOKENIZER_BYTES_MAX)?;
    check_tokenizer(&path, &tokenizer_json)?;
    let mut text = Text { tokenizer_json, ..Text::default() };
    let mut template_path = dir.join(TEMPLATE);
    if template_path.exists() {
        let bytes = read_small(&template_path, TEMPLATE_BYTES_MAX)?;
        let template = String::from_utf8(bytes)
            .map_err(|e| ImportError::file(&template_path, e.to_string(), "expected UTF-8"))?;
        text.chat_template = Some(template);
    }
    let path = dir.join(TOKENIZER_CONFIG);
    if path.exists() {
        let keys = Keys::read(&path)?;
        text.bos_token = special(&keys, "bos_token")?;
        text.eos_token = special(&keys, "eos_token")?;
        if text.chat_template.is_none() {
            text.chat_template = template(&keys)?;
            template_path = path;
        }
    }
    check_template(&template_path, text.chat_template.as_deref())?;
    Ok(text)
}

/// Sees that a tokenizer loads.
pub(super) fn check_tokenizer(path: &Path, json: &[u8]) -> Result<(), ImportError> {
    let loaded = Tokenizer::from_json(json).map_err(|e| {
        ImportError::file(path, e.to_string(), "expected a file of the `tokenizers` library")
    });
    loaded.map(drop)
}

/// Sees that a chat template compiles.
pub(super) fn check_template(path: &Path, template: Option<&str>) -> Result<(), ImportError> {
    let Some(template) = template else { return Ok(()) };
    if template.len() as u64 > TEMPLATE_BYTES_MAX {
        let found = format!("a chat template of {} bytes", template.len());
        let expected = format!("expected at most {TEMPLATE_BYTES_MAX}");
        return Err(ImportError::file(path, found, expected));
    }
    let compiled = ChatTemplate::new(template, None, None)
        .map_err(|e| ImportError::file(path, e.to_string(), "expected a Jinja template of a chat"));
    compiled.map(drop)
}

/// A token's text: a string, or an object that has it as `content`.
fn special(keys: &Keys, key: &str) -> Result<Option<String>, ImportError> {
    match keys.value(key) {
        None => Ok(None),
        Some(value) => match value.as_str().or_else(|| value.get("content")?.as_str()) {
            Some(text) => Ok(Some(text.into())),
            None => Err(keys.wrong(key, "expected a token's text")),
        },
    }
}

/// One template, or the one called `default` in a list.
fn template(keys: &Keys) -> Result<Option<String>, ImportError> {
    const KEY: &str = "chat_template";
    match keys.value(KEY) {
        None => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|entry| entry["name"] == "default");
            Ok(default.and_then(|entry| entry["template"].as_str()).map(str::to_owned))
        }
        Some(_) => Err(keys.wrong(KEY, "expected a template or a list of named ones")),
    }
}
