//! The vocabulary of a file as a `tokenizer.json`.
//!
//! Two kinds are known, as in the classes that are imported: `gpt2`, byte-level BPE with merges, cut
//! before by the expression that `tokenizer.ggml.pre` names; and `llama`, SentencePiece's BPE, whose
//! merges are found again from the vocabulary, as transformers does: every cut of a piece in two
//! others, the best piece first.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};
use tracing::warn;

use super::{
    Metadata,
    pre::{PreTokenizer, byte_level},
};
use crate::{
    checkpoint::writer::Text,
    import::{ImportError, text::usable_template},
};

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// Types of tokens, by their numbers in `llama.h`.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Control tokens that end a text or a turn in the chats of the known classes; llama.cpp stops at
/// these and more.
const ENDS: [&str; 6] =
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>"];

/// Names of special tokens in templates, and in the keys of these files.
const ROLES: [(&str, &str); 7] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("sep", "seperator"),
    ("pad", "padding"),
    ("cls", "cls"),
    ("mask", "mask"),
];

/// Bytes of all pairs that may be merged; the largest vocabularies of SentencePiece take some 10 MB.
const MERGES_BYTES_MAX: usize = 64 << 20;

/// Ids of the tokens that are spelled like the end of a text or turn.
pub(super) fn ends(metadata: &Metadata<'_>) -> Result<Vec<usize>, ImportError> {
    let vocabulary = Vocabulary::read(metadata)?;
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.types).enumerate();
    let ends = tokens.filter(|(_, (token, kind))| {
        matches!(**kind, CONTROL | USER_DEFINED) && ENDS.contains(token)
    });
    Ok(ends.map(|(id, _)| id).collect())
}

/// What a file says about text, for a model that has rows for `rows` tokens.
pub(super) fn translate(metadata: &Metadata<'_>, rows: usize) -> Result<Text, ImportError> {
    let vocabulary = Vocabulary::read(metadata)?;
    if vocabulary.tokens.len() > rows {
        return Err(
            metadata.wrong(TOKENS, format!("no more than {rows} are expected, the model's"))
        );
    }
    let mut json = match metadata.optional_text(MODEL)? {
        Some("gpt2") => byte_level_bpe(metadata, &vocabulary)?,
        Some("llama") => sentence_piece(metadata, &vocabulary)?,
        _ => {
            return Err(metadata.wrong(
                MODEL,
                "only gpt2 and llama are known: import the model's Hugging Face folder instead",
            ));
        }
    };
    json["version"] = "1.0".into();
    json["added_tokens"] = vocabulary.added();
    let template = metadata.optional_text("tokenizer.chat_template")?.map(str::to_owned);
    let mut special_tokens = BTreeMap::new();
    for (role, key) in ROLES {
        if let Some((token, _)) = vocabulary.special(metadata, key) {
            special_tokens.insert(format!("{role}_token"), token.to_owned());
        }
    }
    // The checkpoint's id depends on these bytes.
    json.sort_all_objects();
    Ok(Text {
        tokenizer_json: serde_json::to_vec(&json).expect("JSON values have string keys"),
        chat_template: template.and_then(|template| usable_template(metadata.path, template)),
        special_tokens,
    })
}

/// Tokens and their types, by id.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata<'_>) -> Result<Self, ImportError> {
        let tokens = texts(metadata, TOKENS)?;
        let types = match metadata.get(TYPES) {
            None => vec![NORMAL; tokens.len()],
            Some(_) => metadata.list(TYPES)?.iter().map(|t| t.as_u64().unwrap_or(0)).collect(),
        };
        if types.len() != tokens.len() {
            return Err(metadata.wrong(TYPES, format!("{} are expected", tokens.len())));
        }
        Ok(Self { tokens, types })
    }

    /// The model's table; a token that occurs twice would lose one of its ids.
    fn table(&self, metadata: &Metadata<'_>) -> Result<Value, ImportError> {
        let mut table = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if table.insert((*token).into(), id.into()).is_some() {
                return Err(metadata.wrong(TOKENS, format!("{token:?} is expected once")));
            }
        }
        Ok(table.into())
    }

    /// Tokens that are found in a text before anything else.
    fn added(&self) -> Value {
        let added = self.tokens.iter().zip(&self.types).enumerate();
        let added =
            added.filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED));
        let entry = |(id, (token, kind)): (usize, (&&str, &u64))| {
            json!({
                "id": id, "content": token, "special": *kind != USER_DEFINED, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        };
        added.map(entry).collect()
    }

    /// The token of a role, and its id. One outside the vocabulary can never come.
    fn special(&self, metadata: &Metadata<'_>, role: &str) -> Option<(&'a str, u64)> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        let id = metadata.get(&key)?;
        let token =
            id.as_u64().and_then(|id| Some((*self.tokens.get(usize::try_from(id).ok()?)?, id)));
        if token.is_none() {
            let (path, tokens) = (metadata.path.display(), self.tokens.len());
            warn!("{path}: {key} {id} is ignored: the vocabulary has {tokens} tokens");
        }
        token
    }

    /// What puts the tokens around a text that the model was trained with.
    fn post_processor(
        &self,
        metadata: &Metadata<'_>,
        bos_by_default: bool,
    ) -> Result<Value, ImportError> {
        let mut around = [None, None];
        let roles = [("bos", bos_by_default), ("eos", false)];
        for ((role, default), token) in roles.into_iter().zip(&mut around) {
            if metadata.flag(&format!("tokenizer.ggml.add_{role}_token"), default)? {
                *token = self.special(metadata, role);
            }
        }
        let [bos, eos] = around;
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let template = |sequences: &[(&str, u32)]| {
            let mut parts = Vec::new();
            for (sequence, type_id) in sequences {
                let special = |(token, _): (&str, u64)| json!({ "SpecialToken": { "id": token, "type_id": type_id } });
                parts.extend(bos.map(special));
                parts.push(json!({ "Sequence": { "id": sequence, "type_id": type_id } }));
                parts.extend(eos.map(special));
            }
            parts
        };
        let mut tokens = Map::new();
        for (token, id) in bos.into_iter().chain(eos) {
            tokens.insert(token.into(), json!({ "id": token, "ids": [id], "tokens": [token] }));
        }
        Ok(json!({
            "type": "TemplateProcessing",
            "single": template(&[("A", 0)]),
            "pair": template(&[("A", 0), ("B", 1)]),
            "special_tokens": tokens,
        }))
    }
}

fn byte_level_bpe(
    metadata: &Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
) -> Result<Value, ImportError> {
    let pre = PreTokenizer::of(metadata)?;
    let (normalizer, pre_tokenizer) = pre.json();
    let merges = texts(metadata, MERGES)?;
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": vocabulary.post_processor(metadata, pre.adds_bos)?,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "vocab": vocabulary.table(metadata)?, "merges": merges,
            "ignore_merges": pre.ignore_merges,
        },
    }))
}

fn sentence_piece(
    metadata: &Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
) -> Result<Value, ImportError> {
    const SPACE: &str = "\u{2581}";
    let scores = metadata.list(SCORES)?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(metadata.wrong(SCORES, format!("{} are expected", vocabulary.tokens.len())));
    }
    let scores: Vec<_> = scores.iter().map(|s| s.as_f64().unwrap_or(f64::MIN)).collect();
    // A converter that has no scores writes the same one for all.
    let normal = vocabulary.types.iter().zip(&scores).filter(|(kind, _)| **kind == NORMAL);
    let mut normal = normal.map(|(_, score)| *score);
    let first = normal.next();
    if normal.next().is_some_and(|second| Some(second) == first && normal.all(|s| s == second)) {
        return Err(metadata.wrong(
            SCORES,
            "scores that differ are expected: import the model's Hugging Face folder instead",
        ));
    }
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix", true)?;
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let normalizers = match prefix {
        true => vec![json!({ "type": "Prepend", "prepend": SPACE }), replace],
        false => vec![replace],
    };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = vocabulary.types.iter().position(|kind| *kind == UNKNOWN);
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": vocabulary.post_processor(metadata, true)?,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "vocab": vocabulary.table(metadata)?,
            "merges": merges(metadata, &vocabulary.tokens, &scores)?,
            "unk_token": unknown.map(|id| vocabulary.tokens[id]),
            "fuse_unk": true, "byte_fallback": true,
        },
    }))
}

/// Every way to make a token of two others: tokens of a higher score first, then longer left parts.
fn merges<'a>(
    metadata: &Metadata<'_>,
    tokens: &[&'a str],
    scores: &[f64],
) -> Result<Vec<[&'a str; 2]>, ImportError> {
    let ids: HashMap<_, _> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let (mut merges, mut bytes) = (Vec::new(), 0);
    for (token, score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((*score, [left, right]));
                bytes += token.len() + 64;
                if bytes > MERGES_BYTES_MAX {
                    return Err(metadata.wrong(TOKENS, "tokens of each other's parts without end"));
                }
            }
        }
    }
    let length = |part: &str| part.chars().count();
    merges.sort_by(|(a, [a_left, a_right]), (b, [b_left, b_right])| {
        b.total_cmp(a)
            .then_with(|| length(b_left).cmp(&length(a_left)))
            .then_with(|| length(b_right).cmp(&length(a_right)))
    });
    Ok(merges.into_iter().map(|(_, parts)| parts).collect())
}

fn texts<'a>(metadata: &'a Metadata<'_>, key: &str) -> Result<Vec<&'a str>, ImportError> {
    let list: Option<Vec<_>> = metadata.list(key)?.iter().map(Value::as_str).collect();
    list.ok_or_else(|| metadata.wrong(key, "a list of texts is expected"))
}
