//! Text to tokens and back, by the `tokenizers` library.
//!
//! Invariants: decoding never fails, whatever the ids; a panic of the library is an error here, and
//! silent; a [`DecodeStream`] never hands out half a character, and its pieces joined to the text
//! of the prompt are the text of all ids decoded at once (unless these are no UTF-8: what was
//! handed out cannot be taken back).

mod learn;

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Once},
};

use tokenizers::{DecoderWrapper, ModelWrapper};

pub use self::learn::{VOCAB_MAX, VOCAB_MIN, learn};

/// A tokenizer that could not be loaded or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tokenizer: {0}")]
pub struct TokenizerError(String);

impl TokenizerError {
    fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Turns text into tokens and back. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Tokens that end a text, sorted.
    ends: Arc<[u32]>,
    /// Most bytes of text that one token can stand for, if there is such a number.
    token_bytes_max: Option<usize>,
    /// Its vocabulary is spelled in characters that stand for bytes.
    of_bytes: bool,
}

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Calls the library. Its panics are told to nobody but the caller.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, TokenizerError> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !SILENT.get() {
                others(panic);
            }
        }));
    });
    let before = SILENT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    SILENT.set(before);
    result.map_err(|_| TokenizerError::of("the library gave up on this file"))
}

impl Tokenizer {
    /// Loads a tokenizer from the content of `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        // The library panics on some texts that are no JSON, and on some that are.
        serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(TokenizerError::of)?;
        let loaded = guarded(|| tokenizers::Tokenizer::from_bytes(json))?;
        let mut inner = loaded.map_err(TokenizerError::of)?;
        // Files may ask for cutting or filling to a length that suited somebody's training.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(TokenizerError::of)?;
        let token_bytes_max = guarded(|| token_bytes_max(&inner))?;
        let of_bytes = of_bytes(inner.get_decoder());
        Ok(Self { inner: Arc::new(inner), ends: Arc::default(), token_bytes_max, of_bytes })
    }

    /// The same, knowing which tokens end a text: a stream gives them no text, whether their file
    /// calls them special or not.
    pub fn with_ends(mut self, ids: &[u32]) -> Self {
        self.ends = ids.into();
        self
    }

    /// The tokens of a text; `add_special` puts those around it that the model was trained with.
    /// Special tokens that are spelled out in the text are recognised.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special))?;
        Ok(encoding.map_err(TokenizerError::of)?.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out. Ids that the tokenizer lacks have no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_with(ids, true)
    }

    /// The text of tokens, special ones included.
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.decode_with(ids, false)
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token that is spelled like this.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// How a token is spelled in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a token is none of the text: it begins or ends something, or marks a role.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The bytes that a token stands for within a text, if there is such a token.
    pub fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.inner.get_added_tokens_decoder().contains_key(&id) {
            return Some(token.into_bytes());
        }
        if self.of_bytes {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            return Some(bytes.unwrap_or_else(|| token.into_bytes()));
        }
        let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(Ok(byte)) = byte.map(|byte| u8::from_str_radix(byte, 16)) {
            return Some(vec![byte]);
        }
        Some(token.replace('\u{2581}', " ").into_bytes())
    }

    /// The tokens that are put before every text.
    pub fn prefix(&self) -> Result<Vec<u32>, TokenizerError> {
        const ANY: &str = "a";
        let (mut with, without) = (self.encode(ANY, true)?, self.encode(ANY, false)?);
        let at = with.windows(without.len().max(1)).position(|ids| ids == without);
        with.truncate(at.unwrap_or(0));
        Ok(with)
    }

    /// Most bytes of text that so many tokens can stand for.
    pub fn bytes_max(&self, tokens: usize) -> usize {
        self.token_bytes_max.map_or(usize::MAX, |bytes| bytes.saturating_mul(tokens))
    }

    /// Text that arrives token by token, from its beginning.
    pub fn stream(&self) -> DecodeStream {
        self.stream_after(&[])
    }

    /// Text that arrives token by token after a prompt: what some decoders do to the beginning of
    /// a text (SentencePiece's drop a blank) is not done to it.
    pub fn stream_after(&self, prompt: &[u32]) -> DecodeStream {
        const FEW: usize = 8;
        let mut context = FEW;
        let (ids, shown) = loop {
            let ids = &prompt[prompt.len().saturating_sub(context)..];
            let text = self.decode(ids);
            if !text.is_empty() || ids.len() == prompt.len() {
                break (ids.to_vec(), text);
            }
            context *= 4;
        };
        // A character that the prompt begins and the answer ends belongs to the answer.
        let shown = shown.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned();
        DecodeStream { tokenizer: self.clone(), settled: ids.len(), ids, shown }
    }

    fn decode_with(&self, ids: &[u32], skip_special: bool) -> String {
        // Decoders fail for no id; an empty text is the honest answer should a later one.
        let decoded = guarded(|| self.inner.decode(ids, skip_special));
        decoded.map(Result::unwrap_or_default).unwrap_or_default()
    }
}

/// Whether a byte stands for itself in vocabularies of bytes.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// The byte that a character of such a vocabulary stands for: GPT-2's table.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ 0..=255 => u8::try_from(code).ok().filter(|byte| is_plain(*byte)),
        code => (0..=255).filter(|byte| !is_plain(*byte)).nth(code as usize - 256),
    }
}

/// The character of a byte.
#[cfg(test)]
pub(crate) fn byte_char(byte: u8) -> char {
    let others = (0..byte).filter(|byte| !is_plain(*byte)).count() as u32;
    let code = if is_plain(byte) { u32::from(byte) } else { 256 + others };
    char::from_u32(code).expect("a character of the table")
}

/// Whether tokens are spelled in characters that stand for bytes.
fn of_bytes(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(all)) => {
            all.get_decoders().iter().any(|one| matches!(one, DecoderWrapper::ByteLevel(_)))
        }
        _ => false,
    }
}

/// Most bytes of text that a token of this tokenizer can stand for.
fn token_bytes_max(tokenizer: &tokenizers::Tokenizer) -> Option<usize> {
    // Where unknown characters have a token, it may stand for many; only tokens of bytes know none.
    let falls_back = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.byte_fallback);
    let of_bytes = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
    // Added tokens may swallow the blanks around them.
    let added = tokenizer.get_added_tokens_decoder();
    let swallows = added.values().any(|token| token.lstrip || token.rstrip);
    if !(falls_back || of_bytes) || swallows {
        return None;
    }
    let longest = tokenizer.get_vocab(true).keys().map(String::len).max()?;
    // Composing (NFC) makes at most three bytes one.
    let shrinks = if tokenizer.get_normalizer().is_some() { 3 } else { 1 };
    Some(longest * shrinks)
}

/// Tokens whose text is not settled yet: some decoders look back, and a character may need
/// several tokens.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    /// Tokens of the last piece, for decoders that look back, then the open ones.
    ids: Vec<u32>,
    /// How many of them belong to the last piece.
    settled: usize,
    /// The text of the last piece's tokens alone, as far as it was handed out.
    shown: String,
}

/// After so many open tokens, broken characters are handed out as they are.
pub const OPEN_TOKENS_MAX: usize = 16;

impl DecodeStream {
    /// Takes a token and gives the text that is settled by it, which may be none.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.ends.contains(&id) {
            return String::new();
        }
        self.ids.push(id);
        self.settle(self.ids.len() - self.settled >= OPEN_TOKENS_MAX)
    }

    /// The text that was held back, broken characters included. Call it after the last token.
    pub fn finish(&mut self) -> String {
        let text = self.settle(true);
        self.ids.truncate(self.settled);
        text
    }

    fn settle(&mut self, even_if_broken: bool) -> String {
        let now = self.tokenizer.decode(&self.ids);
        let broken = now.ends_with(char::REPLACEMENT_CHARACTER);
        let piece = match (now.strip_prefix(&self.shown), even_if_broken) {
            (Some(piece), true) => piece.to_owned(),
            (Some(piece), false) if !broken => piece.to_owned(),
            // An open character makes some decoders change their mind about settled text.
            (_, false) => return String::new(),
            (None, true) => self.tokenizer.decode(&self.ids[self.settled..]),
        };
        if piece.is_empty() {
            // Tokens without text: what was handed out before stays what decoders look back at.
            if even_if_broken {
                self.ids.truncate(self.settled);
            }
            return piece;
        }
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.shown = self.tokenizer.decode(&self.ids);
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_and_back() {
        let all: Vec<char> = (0..=255).map(byte_char).collect();
        assert_eq!((all[32], all[0], all[10], all[0xad]), ('Ġ', 'Ā', 'Ċ', 'Ń'));
        assert!((0..=255).all(|byte| byte_of(all[byte as usize]) == Some(byte)));
        assert_eq!(byte_of('▁'), None);
    }
}
