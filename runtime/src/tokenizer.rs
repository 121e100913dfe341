//! Text to tokens and back, by the `tokenizers` library.
//!
//! Invariants: decoding never fails, whatever the ids; a [`DecodeStream`] never hands out half
//! a character, and its pieces joined are the text of all its ids decoded at once (unless these
//! are no UTF-8: what was handed out cannot be taken back).

use std::sync::Arc;

/// A tokenizer that could not be loaded or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tokenizer: {0}")]
pub struct TokenizerError(String);

/// Turns text into tokens and back. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// Loads a tokenizer from the content of `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let error = |e: &dyn std::fmt::Display| TokenizerError(e.to_string());
        // The library panics on some texts that are no JSON, and on some that are.
        serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|e| error(&e))?;
        let loaded = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json));
        let mut inner = loaded
            .map_err(|_| error(&"the library gave up on this file"))?
            .map_err(|e| error(&e))?;
        // Files may ask for cutting or filling to a length that suited somebody's training.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| error(&e))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The tokens of a text; `add_special` puts those around it that the model was trained with.
    /// Special tokens that are spelled out in the text are recognised.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special);
        Ok(encoding.map_err(|e| TokenizerError(e.to_string()))?.get_ids().to_vec())
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

    /// Text that arrives token by token.
    pub fn stream(&self) -> DecodeStream {
        DecodeStream { tokenizer: self.clone(), ids: vec![], settled: 0 }
    }

    fn decode_with(&self, ids: &[u32], skip_special: bool) -> String {
        // Decoders fail for no id; an empty text is the honest answer should a later one.
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }
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
}

/// After so many open tokens, broken characters are handed out as they are.
pub const OPEN_TOKENS_MAX: usize = 16;

impl DecodeStream {
    /// Takes a token and gives the text that is settled by it, which may be none.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        self.settle(self.ids.len() - self.settled >= OPEN_TOKENS_MAX)
    }

    /// The text that was held back, broken characters included. Call it after the last token.
    pub fn finish(&mut self) -> String {
        let text = self.settle(true);
        self.ids.clear();
        self.settled = 0;
        text
    }

    fn settle(&mut self, even_if_broken: bool) -> String {
        let before = self.tokenizer.decode(&self.ids[..self.settled]);
        let now = self.tokenizer.decode(&self.ids);
        let broken = now.ends_with(char::REPLACEMENT_CHARACTER);
        let piece = match (now.strip_prefix(&before), even_if_broken) {
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
        piece
    }
}
