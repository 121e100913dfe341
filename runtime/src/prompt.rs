//! Prompts of a model: what people write becomes tokens, plain or in the model's chat template.
//!
//! Invariant: a text that cannot fit the model's context is refused before it is tokenised, so
//! that its cost is bounded by the context.

use std::sync::Arc;

use crate::{
    chat::{ChatError, ChatTemplate, Conversation},
    checkpoint::{Checkpoint, CheckpointError},
    tokenizer::{Tokenizer, TokenizerError},
};

/// Most bytes of a prompt where a token may stand for any number of them.
const BYTES_MAX: usize = 64 << 20;

/// A prompt that cannot be used, or a model that knows no text.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template, or the conversation in it.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A conversation for a model that has no template.
    #[error("--chat: the model has no chat template; leave --chat out, or import a chat model")]
    NoTemplate,
    /// More text than tokens could stand for.
    #[error(
        "the prompt has {found} bytes; at most {max} can fit this model's {context} tokens: shorten \
         the prompt"
    )]
    TooLong {
        /// Bytes of the text.
        found: usize,
        /// Most bytes.
        max: usize,
        /// Positions of the model.
        context: usize,
    },
}

/// A model's tokenizer and chat template. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Prompts {
    tokenizer: Tokenizer,
    /// The template, or why it cannot be used.
    template: Option<Arc<Result<ChatTemplate, ChatError>>>,
    context: usize,
}

impl Prompts {
    /// Reads them from a checkpoint. A template that cannot be used is no error before it is.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, PromptError> {
        let config = checkpoint.config();
        let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?)?;
        let tokenizer = tokenizer.with_ends(&config.eos_tokens);
        let template = checkpoint.chat_template()?;
        let tokens = &checkpoint.manifest().text.special_tokens;
        let template = template.map(|template| Arc::new(ChatTemplate::new(&template, tokens)));
        Ok(Self { tokenizer, template, context: config.context })
    }

    /// The same for a model that is served with another context than its own.
    pub fn serving(self, context: usize) -> Self {
        Self { context, ..self }
    }

    /// The same with another template.
    pub fn with_template(self, template: ChatTemplate) -> Self {
        Self { template: Some(Arc::new(Ok(template))), ..self }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Most bytes that a prompt can have.
    pub fn bytes_max(&self) -> usize {
        self.tokenizer.bytes_max(self.context).min(BYTES_MAX)
    }

    /// The tokens of a text that the model is to continue.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        self.check(text)?;
        Ok(self.tokenizer.encode(text, true)?)
    }

    /// Whether the model has a chat template that tells it of tools.
    pub fn names_tools(&self) -> bool {
        let template = self.template.as_deref().and_then(|template| template.as_ref().ok());
        template.is_some_and(ChatTemplate::names_tools)
    }

    /// A conversation as text: what the model is to continue.
    pub fn render(&self, conversation: &Conversation) -> Result<String, PromptError> {
        match self.template.as_deref() {
            None => Err(PromptError::NoTemplate),
            Some(Err(error)) => Err(error.clone().into()),
            Some(Ok(template)) => Ok(template.render(conversation)?),
        }
    }

    /// The tokens of a conversation. The template wrote the special ones itself.
    pub fn encode_chat(&self, conversation: &Conversation) -> Result<Vec<u32>, PromptError> {
        let text = self.render(conversation)?;
        self.check(&text)?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    fn check(&self, text: &str) -> Result<(), PromptError> {
        let (found, max, context) = (text.len(), self.bytes_max(), self.context);
        if found > max {
            return Err(PromptError::TooLong { found, max, context });
        }
        Ok(())
    }
}
