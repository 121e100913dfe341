//! What a run begins with: a checkpoint, or a tokenizer file for a model that begins with random values.

use std::{collections::BTreeMap, fs, path::Path};

use super::{config::ModelSource, params::Params, run::text_of};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, index::Hash, writer::Text},
    config::{AttentionConfig, ModelConfig, QkNorm, RopeScaling},
    tokenizer::{Tokenizer, TokenizerError},
};

/// How the token is spelled that ends a text, where a tokenizer file has such a one; the first that is there counts.
const ENDS: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"];

/// Why there is nothing to begin with.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer file.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// What is wrong, and what is expected.
        reason: String,
    },
}

/// See the module's text.
#[derive(Debug)]
pub struct Source {
    config: ModelConfig,
    text: Text,
    root: Hash,
    checkpoint: Option<Checkpoint>,
}

impl Source {
    /// Opens what the configuration names, relative to `base`.
    pub fn open(model: &ModelSource, base: &Path) -> Result<Self, SourceError> {
        let named = model.from.as_ref().or(model.new.as_ref().map(|new| &new.tokenizer));
        let path = base.join(named.map_or("", String::as_str));
        if model.from.is_none() && path.is_file() {
            return Self::of_tokenizer(&path);
        }
        let checkpoint = Checkpoint::open(&path)?;
        Ok(Self {
            config: checkpoint.config().clone(),
            text: text_of(&checkpoint)?,
            root: checkpoint.manifest().root,
            checkpoint: Some(checkpoint),
        })
    }

    fn of_tokenizer(path: &Path) -> Result<Self, SourceError> {
        let file = |reason| SourceError::File { path: path.display().to_string(), reason };
        let json = fs::read(path).map_err(|error| file(format!("cannot read: {error}")))?;
        let tokenizer =
            Tokenizer::from_json(&json).map_err(|error: TokenizerError| file(error.to_string()))?;
        let end = ENDS.iter().find_map(|end| Some((*end, tokenizer.token_id(end)?)));
        let (end, id) = end.ok_or_else(|| {
            let known = ENDS.join(", ");
            file(format!("it has no token that ends a text; one of {known} is expected"))
        })?;
        Ok(Self {
            config: bare(tokenizer.vocab_size(), id),
            root: Hash::of(&json),
            text: Text {
                tokenizer_json: json,
                chat_template: None,
                special_tokens: BTreeMap::from([("eos_token".to_owned(), end.to_owned())]),
            },
            checkpoint: None,
        })
    }

    /// The configuration; of a tokenizer file no more than the vocabulary and its end.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The text files.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// Names the bytes that it is.
    pub fn root(&self) -> Hash {
        self.root
    }

    /// Reads its parameters. An error if it is a tokenizer file, which has none.
    pub fn params(&self) -> Result<Params, SourceError> {
        let Some(checkpoint) = &self.checkpoint else {
            let (path, reason) = ("model.from".into(), "a checkpoint is expected".into());
            return Err(SourceError::File { path, reason });
        };
        Ok(Params::load(checkpoint)?)
    }
}

/// A configuration that says nothing but what the vocabulary is.
fn bare(vocab: usize, end: u32) -> ModelConfig {
    ModelConfig {
        architecture: "hser".into(),
        vocab,
        hidden: 1,
        context: 1,
        norm_eps: 1e-5,
        tied_embeddings: true,
        attention: AttentionConfig {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            output_bias: false,
            clip_qkv: None,
        },
        layers: Vec::new(),
        moe: None,
        bos_token: None,
        eos_tokens: vec![end],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::learn;

    fn named(tokenizer: &str) -> ModelSource {
        let new = serde_json::json!({
            "tokenizer": tokenizer, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16,
            "context": 8, "intermediate": 16, "routes": [1, 1, 1],
            "tiers": [{ "name": "tier_1b", "groups": 1, "experts": 2 }],
        });
        serde_json::from_value(serde_json::json!({ "new": new })).unwrap()
    }

    #[test]
    fn a_model_begins_with_a_tokenizer_file() {
        let dir = tempfile::tempdir().unwrap();
        let texts = ["a text, a text".to_owned()];
        fs::write(dir.path().join("t.json"), learn(&texts, 260, "</s>").unwrap()).unwrap();
        let source = Source::open(&named("t.json"), dir.path()).unwrap();
        let model = named("t.json").new.unwrap().config(source.config()).unwrap();
        assert_eq!((model.vocab, &model.eos_tokens[..]), (260, &[0][..]));
        assert_eq!(source.text().special_tokens["eos_token"], "</s>");
        assert!(source.params().is_err());
    }

    #[test]
    fn a_file_that_is_no_tokenizer_or_has_no_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let said = |name: &str| Source::open(&named(name), dir.path()).unwrap_err().to_string();
        fs::write(dir.path().join("none.json"), "{}").unwrap();
        assert!(said("none.json").contains("none.json: tokenizer"), "{}", said("none.json"));
        let texts = ["a text".to_owned()];
        fs::write(dir.path().join("end.json"), learn(&texts, 260, "<stop>").unwrap()).unwrap();
        assert!(said("end.json").contains("one of <|endoftext|>"), "{}", said("end.json"));
        assert!(said("missing").contains("missing"), "{}", said("missing"));
    }
}
