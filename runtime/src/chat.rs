//! Chat templates: a conversation becomes the text that a model was trained on.
//!
//! Templates come with models, so they are strangers' programs. They run in a sandbox: no files,
//! no other templates, no clock, a bounded number of steps, bounded nesting, bounded output.
//!
//! The dialect is that of transformers' `apply_chat_template`: jinja2 with `trim_blocks`,
//! `lstrip_blocks` and loop controls, `tools` and `documents` that are none where there are none,
//! the tokenizer's special tokens by their names, `raise_exception`, `strftime_now`, `tojson` with
//! the arguments of `json.dumps`, `{% generation %}`, and the methods and formats of Python's
//! strings and dictionaries. What minijinja spells otherwise is rewritten first (`source.rs`) or
//! added (`python.rs`, `json.rs`).

mod clock;
mod json;
mod python;
mod source;

use std::collections::BTreeMap;

use minijinja::{
    Environment, Error, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::ValueKind,
};
use serde::{Deserialize, Serialize};

/// Steps that a template may take, and characters that it may handle, besides those of the
/// messages.
pub const FUEL: u64 = 1_000_000;
/// Steps for every byte of the messages: templates trim, compare and join them.
pub const FUEL_PER_BYTE: u64 = 16;
/// Bytes that a template may produce beyond those of the messages.
pub const TEMPLATE_OUTPUT_BYTES_MAX: usize = 1 << 20;
const NESTING_MAX: usize = 64;
const NAME: &str = "chat_template";

/// A template that cannot be used, or that refused a conversation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("chat template: {0}")]
pub struct ChatError(String);

impl From<Error> for ChatError {
    fn from(error: Error) -> Self {
        // The library's debug form would quote the template; one line is enough.
        Self(error.to_string())
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What a template is rendered with.
///
/// As JSON: an object with `messages`, and what else the template reads: `tools`, `documents`,
/// `add_generation_prompt` (true by default: the text ends where the model is to go on),
/// `enable_thinking`, … . `unix_time`, in seconds, is what `strftime_now` shows, as UTC.
#[derive(Debug, Clone)]
pub struct Conversation {
    variables: BTreeMap<String, Value>,
    unix_time: Option<i64>,
    /// Size as JSON: bounds what a template may do.
    bytes: usize,
}

impl Conversation {
    /// Plain turns, and no time.
    pub fn new(messages: &[Message]) -> Self {
        let turn = |message: &Message| {
            Value::from_pairs([
                ("role", Value::from(message.role.as_str())),
                ("content", Value::from(message.content.as_str())),
            ])
        };
        let turns: Vec<_> = messages.iter().map(turn).collect();
        let bytes = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let variables = BTreeMap::from([("messages".to_owned(), Value::from(turns))]);
        Self { variables, unix_time: None, bytes }
    }

    /// Reads one.
    pub fn from_json(json: &str) -> Result<Self, ChatError> {
        let wrong = |reason: &dyn std::fmt::Display| ChatError(format!("conversation: {reason}"));
        let variables: Result<BTreeMap<String, Value>, _> = serde_json::from_str(json);
        let mut variables = variables.map_err(|error| wrong(&error))?;
        let unix_time = variables.remove("unix_time").map(i64::try_from).transpose();
        let unix_time = unix_time.map_err(|_| wrong(&"unix_time: whole seconds are expected"))?;
        let turns = variables.get("messages").filter(|turns| turns.kind() == ValueKind::Seq);
        let turns = turns.ok_or_else(|| wrong(&"a list called messages is expected"))?;
        let turns: Option<Vec<_>> = turns.try_iter()?.map(|turn| normalised(&turn)).collect();
        let turns = turns.ok_or_else(|| wrong(&"messages: every one is expected as an object"))?;
        variables.insert("messages".into(), turns.into());
        Ok(Self { variables, unix_time, bytes: json.len() })
    }

    /// Sets whether the text ends where the model is to go on.
    pub fn with_generation_prompt(mut self, add: bool) -> Self {
        self.variables.insert("add_generation_prompt".into(), add.into());
        self
    }

    /// Sets the time that templates may show, unless it has one.
    pub fn at(mut self, unix_time: i64) -> Self {
        self.unix_time.get_or_insert(unix_time);
        self
    }
}

/// A message as transformers gives it to templates: keys without a value are left out, and
/// reasoning stands under the names that templates read.
fn normalised(message: &Value) -> Option<Value> {
    if message.kind() != ValueKind::Map {
        return None;
    }
    let mut entries: Vec<(Value, Value)> = Vec::new();
    for key in message.try_iter().ok()? {
        let value = message.get_item(&key).ok()?;
        if !value.is_none() {
            entries.push((key, value));
        }
    }
    let names = ["reasoning_content", "thinking", "reasoning"];
    let find = |name: &&str| entries.iter().find(|(key, _)| key.as_str() == Some(name));
    if let Some((_, said)) = names.iter().find_map(find).cloned() {
        let thinks = find(&"thinking").is_some();
        entries.retain(|(key, _)| key.as_str() != Some("reasoning_content"));
        if !thinks {
            entries.insert(0, (Value::from("thinking"), said.clone()));
        }
        entries.push((Value::from("reasoning_content"), said));
    }
    Some(Value::from_pairs(entries))
}

/// A template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    names_tools: bool,
}

impl ChatTemplate {
    /// Compiles a template. The tokens are the tokenizer's special ones: `bos_token` and its text,
    /// and so on.
    pub fn new(
        template: &str,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_recursion_limit(NESTING_MAX);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        // The library's own would show a template everything that it was rendered with.
        environment.remove_global("debug");
        environment.add_filter("tojson", json::tojson);
        python::add_to(&mut environment);
        environment.add_template_owned(NAME, source::rewritten(template))?;
        let (names_tools, special_tokens) = (template.contains("tools"), special_tokens.clone());
        Ok(Self { environment, special_tokens, names_tools })
    }

    /// Whether tools that a conversation brings can come into its text: the template names them.
    pub fn names_tools(&self) -> bool {
        self.names_tools
    }

    /// The text of a conversation.
    pub fn render(&self, conversation: &Conversation) -> Result<String, ChatError> {
        let mut variables = BTreeMap::from([
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(true)),
        ]);
        let tokens = self.special_tokens.iter();
        variables.extend(tokens.map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        let given = conversation.variables.iter();
        variables.extend(given.map(|(name, value)| (name.as_str(), value.clone())));

        let said = conversation.bytes;
        let mut out = Bounded { bytes: Vec::new(), room: said * 2 + TEMPLATE_OUTPUT_BYTES_MAX };
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_BYTE * said as u64));
        let now = conversation.unix_time;
        environment.add_function("strftime_now", move |format: &str| match now {
            Some(now) => clock::strftime(now, format).map_err(|specifier| {
                let reason = format!("strftime_now: %{specifier} is not known");
                Error::new(ErrorKind::InvalidOperation, reason)
            }),
            None => Err(Error::new(ErrorKind::InvalidOperation, "strftime_now: no time was given")),
        });
        let template = environment.get_template(NAME)?;
        template.render_captured_to(variables, &mut out)?;
        String::from_utf8(out.bytes).map_err(|e| ChatError(e.to_string()))
    }
}

/// Writes until there is no room, so that a template cannot fill the memory with its output.
struct Bounded {
    bytes: Vec<u8>,
    room: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        match self.room.checked_sub(piece.len()) {
            Some(left) => {
                self.room = left;
                self.bytes.extend_from_slice(piece);
                Ok(piece.len())
            }
            None => Err(std::io::Error::other("it writes more than any conversation needs")),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
