//! Where forms of answers are read: by whoever has the model's tokenizer, once for each form, beside
//! everything that others wait for.
//!
//! Invariant: readers and those that wait for them are bounded; reading has a deadline.

use std::{sync::Arc, time::Duration};

use lite_llm_runtime::{
    checkpoint::Checkpoint,
    grammar::{self, GrammarError, Grammars, Guide},
    tokenizer::Tokenizer,
};
use lite_llm_transport::messages::Grammar;
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::timeout};

/// Grammars that are read at a time.
const READ_MAX: usize = 2;
/// How long a grammar may take, its wait for others among it.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// Why an answer has no form.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Not now: too many wait, or no model is served here. Later it may be read.
    #[error("{0}")]
    Busy(String),
    /// It cannot be used.
    #[error("{0}")]
    Form(String),
}

/// Where grammars are read with the tokenizer of the model that is served. Cloning shares it.
#[derive(Clone)]
pub struct GrammarDesk {
    model: Arc<Mutex<Option<Model>>>,
    places: Arc<Semaphore>,
}

struct Model {
    checkpoint: Arc<Checkpoint>,
    /// Made when a grammar is first asked for.
    grammars: Option<Result<Arc<Grammars>, String>>,
}

impl Default for GrammarDesk {
    fn default() -> Self {
        Self { model: Arc::default(), places: Arc::new(Semaphore::new(READ_MAX)) }
    }
}

impl GrammarDesk {
    /// Grammars are for this model from now on.
    pub fn show(&self, checkpoint: &Arc<Checkpoint>) {
        let mut model = self.model.lock();
        if model.as_ref().is_none_or(|model| model.checkpoint.id() != checkpoint.id()) {
            *model = Some(Model { checkpoint: checkpoint.clone(), grammars: None });
        }
    }

    /// Reads a grammar: where an answer of its form begins, or why there is none.
    pub async fn read(&self, grammar: &Grammar) -> Result<Guide, FormError> {
        self.with(grammar, Grammars::read).await
    }

    /// The same for whoever only wants to know whether it can be used.
    pub async fn check(&self, grammar: &Grammar) -> Result<(), FormError> {
        self.with(grammar, Grammars::check).await
    }

    async fn with<T: Send + 'static>(
        &self,
        grammar: &Grammar,
        of: fn(&Grammars, &grammar::Grammar) -> Result<T, GrammarError>,
    ) -> Result<T, FormError> {
        let slow = |_| {
            let reason = format!("a grammar was not read within {READ_TIMEOUT:?}; try again later");
            FormError::Busy(reason)
        };
        let ended = |error: &dyn std::fmt::Display| FormError::Busy(error.to_string());
        let (desk, grammar) = (self.clone(), grammar.clone());
        let place = timeout(READ_TIMEOUT, self.places.clone().acquire_owned()).await;
        let place = place.map_err(slow)?.map_err(|error| ended(&error))?;
        let read = tokio::task::spawn_blocking(move || {
            // Until it is read, also if nobody waits for it any more.
            let _place = place;
            let grammar = match grammar {
                Grammar::JsonSchema(text) => grammar::Grammar::JsonSchema(text),
                Grammar::Regex(text) => grammar::Grammar::Regex(text),
                Grammar::Lark(text) => grammar::Grammar::Lark(text),
            };
            let grammars = desk.grammars()?;
            of(&grammars, &grammar).map_err(|error| FormError::Form(error.to_string()))
        });
        timeout(READ_TIMEOUT, read).await.map_err(slow)?.map_err(|error| ended(&error))?
    }

    fn grammars(&self) -> Result<Arc<Grammars>, FormError> {
        let mut model = self.model.lock();
        let none = || FormError::Busy("no model is served here at present".into());
        let model = model.as_mut().ok_or_else(none)?;
        let checkpoint = &model.checkpoint;
        let made = model.grammars.get_or_insert_with(|| {
            let config = checkpoint.config();
            let json = checkpoint.tokenizer_json().map_err(|error| error.to_string())?;
            let tokenizer = Tokenizer::from_json(&json).map_err(|error| error.to_string())?;
            let made = Grammars::new(&tokenizer, config.vocab, &config.eos_tokens);
            Ok(Arc::new(made.map_err(|error| error.to_string())?))
        });
        made.clone().map_err(FormError::Form)
    }
}
