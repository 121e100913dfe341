//! A new tokenizer: byte-level BPE, learned from texts by the `tokenizers` library.

use tokenizers::{
    AddedToken,
    models::{TrainerWrapper, bpe::BpeTrainer},
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{TokenizerError, guarded};

/// Fewest entries: every byte, and the end of a text.
pub const VOCAB_MIN: usize = 257;
/// Most entries.
pub const VOCAB_MAX: usize = 1 << 20;
/// How often a pair must be there to become an entry.
const LEAST: u64 = 2;

/// Learns `vocab` entries from texts, fewer if they have no more pairs: the content of `tokenizer.json`. Entry 0
/// is `end`, which ends a text. The order of texts changes nothing.
pub fn learn(texts: &[String], vocab: usize, end: &str) -> Result<Vec<u8>, TokenizerError> {
    if !(VOCAB_MIN..=VOCAB_MAX).contains(&vocab) {
        let expected = format!("{VOCAB_MIN} to {VOCAB_MAX} entries are expected");
        return Err(TokenizerError(format!("the vocabulary is {vocab}; {expected}")));
    }
    if end.is_empty() {
        return Err(TokenizerError("the end token is empty; a word for it is expected".into()));
    }
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let empty = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": {}, "merges": [] },
    });
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .min_frequency(LEAST)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(end, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let learned = guarded(move || {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(empty.to_string())?;
        tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts.iter())?;
        tokenizer.to_string(true)
    })?;
    learned.map(String::into_bytes).map_err(TokenizerError::of)
}

#[cfg(test)]
mod tests {
    use super::{super::Tokenizer, *};

    #[test]
    fn what_was_learned_spells_any_text_and_is_the_same_in_any_order() {
        let mut texts: Vec<String> =
            (0..40).map(|i| format!("the licence {i} of the text\n")).collect();
        let json = learn(&texts, 270, "<|endoftext|>").unwrap();
        texts.reverse();
        assert_eq!(learn(&texts, 270, "<|endoftext|>").unwrap(), json);
        let tokenizer = Tokenizer::from_json(&json).unwrap();
        assert_eq!(tokenizer.vocab_size(), 270);
        assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
        assert!(tokenizer.is_special(0));
        for text in ["the licence of the text\n", "Ünïcode → \u{1f980}\0", " "] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids), text);
        }
        let ids = tokenizer.encode("the licence of the text", false).unwrap();
        assert!(ids.len() < 8, "nothing was learned: {ids:?}");
    }

    #[test]
    fn what_cannot_be_learned_is_said() {
        let texts = ["a".to_owned()];
        let error = learn(&texts, 256, "<|endoftext|>").unwrap_err().to_string();
        assert!(error.contains("the vocabulary is 256; 257 to"), "{error}");
        assert!(learn(&texts, 300, "").is_err());
        // Too little text for so many entries: as many as there are.
        let json = learn(&texts, 270, "<|endoftext|>").unwrap();
        assert_eq!(Tokenizer::from_json(&json).unwrap().vocab_size(), 257);
    }
}
