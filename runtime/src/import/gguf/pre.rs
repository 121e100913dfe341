//! How byte-level tokenizers cut a text before they merge: what `tokenizer.ggml.pre` names.
//!
//! The expressions are data of the models: those of their own `tokenizer.json`.

use serde_json::{Value, json};

use super::Metadata;
use crate::import::ImportError;

pub(super) const PRE: &str = "tokenizer.ggml.pre";

/// Every name that is known, for messages.
const KNOWN: &str = "gpt-2, olmo, qwen2, qwen35, llama-bpe, tekken, gpt-4o, deepseek-llm, \
                     deepseek-coder and deepseek-v3";

/// A way to cut.
pub(super) struct PreTokenizer {
    /// Compose characters first.
    nfc: bool,
    /// Expressions, each of which cuts what the ones before it left whole; none is GPT-2's own.
    cuts: &'static [&'static str],
    /// Pieces that are tokens as they stand are not put together by merges.
    pub(super) ignore_merges: bool,
    /// Texts begin with the token that begins a text, unless the file says otherwise.
    pub(super) adds_bos: bool,
}

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Chinese, and what its makers put with it.
const HAN: &str = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+";
const DEEPSEEK_LLM: &[&str] = &[
    r"[\r\n]",
    // Letters that have a case.
    r"\s?[A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
    r"\s+$",
    HAN,
    r"\p{N}",
];
const DEEPSEEK_CODER: &[&str] = &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"];
const DEEPSEEK_V3: &[&str] = &[
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

impl PreTokenizer {
    /// The way of a name.
    fn named(name: &str) -> Option<Self> {
        let new = |nfc, cuts, ignore_merges| Self { nfc, cuts, ignore_merges, adds_bos: false };
        let found = match name {
            "gpt-2" | "phi-2" => new(false, &[], false),
            "olmo" => new(true, &[], false),
            "qwen2" | "deepseek-r1-qwen" => new(true, &[QWEN2], false),
            "qwen35" => new(true, &[QWEN35], false),
            "llama-bpe" | "llama3" | "llama-v3" | "pixtral" | "lfm2" => {
                Self { adds_bos: true, ..new(false, &[LLAMA3], true) }
            }
            "tekken" => Self { adds_bos: true, ..new(false, &[TEKKEN], true) },
            "gpt-4o" | "llama4" => new(false, &[GPT_4O], false),
            "deepseek-llm" => new(false, DEEPSEEK_LLM, false),
            "deepseek-coder" => new(false, DEEPSEEK_CODER, false),
            "deepseek-v3" => new(false, DEEPSEEK_V3, false),
            _ => return None,
        };
        Some(found)
    }

    /// The way that a file names; where it names none, that of its class.
    pub(super) fn of(metadata: &Metadata<'_>) -> Result<Self, ImportError> {
        let unknown = || {
            let expected =
                format!("only {KNOWN} are known: import the model's Hugging Face folder instead");
            metadata.wrong(PRE, expected)
        };
        let named = metadata.optional_text(PRE)?;
        if let Some(name) = named.filter(|name| *name != "default") {
            return Self::named(name).ok_or_else(unknown);
        }
        let class = metadata.optional_text("general.architecture")?.unwrap_or_default();
        let own = match class {
            "olmoe" => "olmo",
            "qwen2moe" | "qwen3moe" => "qwen2",
            _ => return Err(unknown()),
        };
        let found = if named.is_some() { "is \"default\"" } else { "is missing" };
        let path = metadata.path.display();
        tracing::warn!(
            "{path}: {PRE} {found}; {own} is assumed, as models of class {class} have it"
        );
        Self::named(own).ok_or_else(unknown)
    }

    /// Normalizer and pre-tokenizer of a `tokenizer.json`.
    pub(super) fn json(&self) -> (Value, Value) {
        let normalizer = if self.nfc { json!({ "type": "NFC" }) } else { Value::Null };
        let split = |expression: &&str| {
            json!({
                "type": "Split", "pattern": { "Regex": expression }, "behavior": "Isolated",
                "invert": false,
            })
        };
        let mut steps: Vec<_> = self.cuts.iter().map(split).collect();
        steps.push(byte_level(self.cuts.is_empty()));
        (normalizer, json!({ "type": "Sequence", "pretokenizers": steps }))
    }
}

/// Bytes as characters, cut as GPT-2 does if nothing else cuts.
pub(super) fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": use_regex,
    })
}
