//! GGUF files, as llama.cpp and its friends write them, of the classes that are known here.
//!
//! A file is translated: its metadata into the keys of a `config.json` (`config.rs`), its tensors'
//! names into those of a Hugging Face folder (`names.rs`), its vocabulary into a `tokenizer.json`
//! (`tokenizer.rs`). From there on it is imported as a folder is.
//!
//! **Values.** F32, BF16 and F16 are as everywhere. The integers of Q8_0 and Q4_0 stay what they are
//! when they are imported as int8 and int4 (the format's own is the default), and their f16 scales
//! become bf16, which moves a weight by at most 2⁻⁸ of itself. The format of most weights is that of the
//! checkpoint; what is in another one, such as the head of a Q4_0 file in Q6_K or k and v in Q8_0, is
//! rounded anew.
//!
//! **Not read:** other formats of blocks (Q4_1, which llama-quantize puts into Q4_0 files that it
//! makes with an importance matrix, too), files in several parts, vocabularies whose way of cutting text
//! is not known here. Experts are read from stacks and, in files of Mixtral from before April 2024, from
//! a tensor for each.

pub(super) mod blocks;
mod config;
mod file;
mod names;
mod pre;
mod rope;
mod tokenizer;

use std::{collections::HashMap, fs::File, path::Path};

use serde_json::Value;

use super::{
    ImportError, hf_config,
    tensors::{Entry, Tensors},
    text::check_tokenizer,
};
use crate::{checkpoint::writer::Text, config::ModelConfig};

/// Opens a file and understands what it says of the model and of text; no weights are read.
pub(super) fn open(path: &Path) -> Result<(ModelConfig, Tensors, Text), ImportError> {
    let about = std::fs::metadata(path).map_err(ImportError::io(path, "open"))?;
    if !about.is_file() {
        return Err(ImportError::file(
            path,
            "neither a folder nor a regular file",
            "expected a Hugging Face folder, a checkpoint or a GGUF file",
        ));
    }
    let file = File::open(path).map_err(ImportError::io(path, "open"))?;
    let mut head = file::read(path, &file, about.len())?;
    let metadata = Metadata { path, values: head.metadata };
    let factors = rope::Factors::take(path, &file, &mut head.tensors)?;
    let keys = config::translate(&metadata, &head.tensors, factors)?;
    let config = hf_config::parse(&keys, None)?;
    metadata.check_head_dim(config.attention.head_dim)?;

    let stacked = head.tensors.iter().any(|info| info.name.ends_with("_exps.weight"));
    let mut tensors = Tensors::new(path);
    tensors.name_missing(if stacked { names::of_stacked } else { names::of_single });
    let index = tensors.add_file(path, file);
    for info in head.tensors {
        let (name, order) = names::translate(&info.name, &config);
        if tensors.contains(&name) {
            return Err(ImportError::Tensor {
                path: path.display().to_string(),
                tensor: info.name,
                found: "it occurs twice".into(),
                expected: "expected once: the file is damaged, download it again".into(),
            });
        }
        let mut shape = info.shape;
        if name.ends_with("shared_expert_gate.weight") && shape.len() == 1 {
            shape.insert(0, 1);
        }
        let (dtype, offset, alias) = (info.dtype, info.offset, Some(info.name));
        tensors.add(name, Entry { file: index, offset, dtype, shape, order, alias });
    }
    let text = tokenizer::translate(&metadata, config.vocab)?;
    check_tokenizer(path, &text.tokenizer_json)?;
    Ok((config, tensors, text))
}

/// The keys of a file, with errors that name file and key.
struct Metadata<'a> {
    path: &'a Path,
    values: HashMap<String, Value>,
}

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    fn wrong(&self, key: &str, expected: impl Into<String>) -> ImportError {
        let found = match self.get(key) {
            None => "missing".into(),
            Some(Value::Array(list)) => format!("a list of {}", list.len()),
            Some(value) => value.to_string().chars().take(200).collect(),
        };
        let (path, expected) = (self.path.display().to_string(), expected.into());
        ImportError::Key { path, key: key.into(), found, expected }
    }

    /// Values and the rotated part must be as wide as keys, and where rows of a head are
    /// interleaved, heads must not make pieces of rows large.
    fn check_head_dim(&self, head_dim: usize) -> Result<(), ImportError> {
        let architecture = self.optional_text("general.architecture")?.unwrap_or_default();
        for rest in ["attention.value_length", "rope.dimension_count"] {
            let key = format!("{architecture}.{rest}");
            if self.get(&key).is_some_and(|found| *found != head_dim) {
                return Err(self.wrong(&key, format!("{head_dim}, the length of a head's keys")));
            }
        }
        if architecture == "llama" && !head_dim.is_multiple_of(16) {
            let expected = format!("heads of a multiple of 16 are expected, not of {head_dim}");
            return Err(self.wrong("llama.attention.head_count", expected));
        }
        Ok(())
    }

    /// A value that must be there.
    fn need(&self, key: &str) -> Result<&Value, ImportError> {
        self.get(key).ok_or_else(|| self.wrong(key, "it is needed: convert the model again"))
    }

    fn optional_text(&self, key: &str) -> Result<Option<&str>, ImportError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text is expected"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ImportError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false is expected"))
    }

    fn list(&self, key: &str) -> Result<&[Value], ImportError> {
        let list = self.need(key)?.as_array();
        list.map(Vec::as_slice).ok_or_else(|| self.wrong(key, "a list is expected"))
    }
}
