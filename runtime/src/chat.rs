//! Chat templates: a conversation becomes the text that a model was trained on.
//!
//! Templates come with models, so they are strangers' programs. They run in a sandbox: no files,
//! no other templates, a bounded number of steps, bounded nesting, bounded output.
//!
//! The dialect is that of transformers: `trim_blocks`, `lstrip_blocks`, `raise_exception`,
//! `bos_token`, `eos_token`, and the string and mapping methods of Python that templates use.

use minijinja::{
    Environment, Error, ErrorKind, State, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{ValueKind, from_args},
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

/// A template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Value,
    eos_token: Value,
}

impl ChatTemplate {
    /// Compiles a template. The tokens are the texts of those that begin and end a text.
    pub fn new(
        template: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
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
        environment.set_unknown_method_callback(python_method);
        environment.add_template_owned(NAME, template.to_owned())?;
        let token = |text: Option<&str>| text.map_or(Value::UNDEFINED, Value::from);
        Ok(Self { environment, bos_token: token(bos_token), eos_token: token(eos_token) })
    }

    /// The text of a conversation. `add_generation_prompt` ends it where the model is to go on.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let turns = messages.iter().map(|message| {
            Value::from_pairs([
                ("role", Value::from(message.role.as_str())),
                ("content", Value::from(message.content.as_str())),
            ])
        });
        let turns: Vec<Value> = turns.collect();
        let context = Value::from_pairs([
            ("messages", Value::from(turns)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", self.bos_token.clone()),
            ("eos_token", self.eos_token.clone()),
        ]);
        let said: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let mut out = Bounded { bytes: Vec::new(), room: said * 2 + TEMPLATE_OUTPUT_BYTES_MAX };
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_BYTE * said as u64));
        let template = environment.get_template(NAME)?;
        template.render_captured_to(context, &mut out)?;
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

/// Methods that Python's strings and dictionaries have, and Jinja's values do not.
fn python_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map {
        return match method {
            "items" => {
                from_args::<()>(args)?;
                state.apply_filter("items", std::slice::from_ref(value))
            }
            "keys" => {
                from_args::<()>(args)?;
                Ok(Value::from(value.try_iter()?.collect::<Vec<_>>()))
            }
            "get" => {
                let (key, default): (&Value, Option<Value>) = from_args(args)?;
                let found = value.get_item(key)?;
                Ok(if found.is_undefined() { default.unwrap_or_default() } else { found })
            }
            _ => Err(ErrorKind::UnknownMethod.into()),
        };
    }
    let Some(text) = value.as_str() else { return Err(ErrorKind::UnknownMethod.into()) };
    let chars = |args| from_args::<(Option<&str>,)>(args).map(|(chars,)| chars);
    let listed = |chars: Option<&str>| {
        let chars: Option<Vec<char>> = chars.map(|c| c.chars().collect());
        move |c: char| chars.as_ref().map_or(c.is_whitespace(), |chars| chars.contains(&c))
    };
    Ok(match method {
        "strip" => text.trim_matches(listed(chars(args)?)).into(),
        "lstrip" => text.trim_start_matches(listed(chars(args)?)).into(),
        "rstrip" => text.trim_end_matches(listed(chars(args)?)).into(),
        "startswith" => text.starts_with(from_args::<(&str,)>(args)?.0).into(),
        "endswith" => text.ends_with(from_args::<(&str,)>(args)?.0).into(),
        // The library's filters count their work as steps; methods of our own would not.
        "upper" | "lower" | "title" | "capitalize" | "replace" => {
            let mut all = vec![value.clone()];
            all.extend_from_slice(args);
            state.apply_filter(method, &all)?
        }
        "split" => match chars(args)? {
            None => text.split_whitespace().map(Value::from).collect::<Vec<_>>().into(),
            Some("") => {
                return Err(Error::new(ErrorKind::InvalidOperation, "split by an empty text"));
            }
            Some(separator) => text.split(separator).map(Value::from).collect::<Vec<_>>().into(),
        },
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}
