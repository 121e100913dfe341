//! Calls of tools in what a model writes: where they begin and end, and what they say.
//!
//! Invariant: every byte that the model wrote is handed out once: as text, or in a call. What looks
//! like a call and is none stays text.

use serde_json::{Map, Value, json};

use super::{chat::Tool, error::ApiError};

/// What models write around a call, if their template taught them: Hermes, Qwen and others.
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// How calls are told from text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum ToolUse {
    /// There are none.
    #[default]
    None,
    /// They stand between marks, in text.
    Auto,
    /// All that is written is one call, as JSON with a name and arguments.
    Required,
    /// All that is written is the arguments of this one.
    Named(String),
}

/// A call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    /// Of the tool.
    pub(super) name: String,
    /// JSON, most often of an object.
    pub(super) arguments: String,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// For people.
    Text(String),
    /// For the program that asked.
    Call(Call),
}

/// What `tool_choice` asks for, of these tools.
pub(super) fn tool_use(choice: Option<&Value>, tools: &[Tool]) -> Result<ToolUse, ApiError> {
    let wrong = |message: String| Err(ApiError::invalid("tool_choice", message));
    let needs_tools = |choice: &str| wrong(format!("tool_choice is {choice}, and tools is empty"));
    match choice {
        None | Some(Value::Null) if tools.is_empty() => Ok(ToolUse::None),
        None | Some(Value::Null) => Ok(ToolUse::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(ToolUse::None),
            "auto" if tools.is_empty() => Ok(ToolUse::None),
            "auto" => Ok(ToolUse::Auto),
            "required" if tools.is_empty() => needs_tools("required"),
            "required" => Ok(ToolUse::Required),
            _ => wrong("none, auto, required or a function is expected".to_owned()),
        },
        Some(choice) => {
            let name = choice.pointer("/function/name").and_then(Value::as_str);
            let Some(name) = name.filter(|_| choice["type"] == "function") else {
                let expected = r#"{"type": "function", "function": {"name": …}} is expected"#;
                return wrong(expected.to_owned());
            };
            if !tools.iter().any(|tool| tool.name() == name) {
                let name: String = name.chars().take(64).collect();
                return wrong(format!("no tool is named {name:?}"));
            }
            Ok(ToolUse::Named(name.to_owned()))
        }
    }
}

impl ToolUse {
    /// As it is kept with a detached job.
    pub(super) fn to_text(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Auto => "auto".into(),
            Self::Required => "required".into(),
            Self::Named(name) => format!("named:{name}"),
        }
    }

    /// What was kept.
    pub(super) fn from_text(text: &str) -> Self {
        match text {
            "auto" => Self::Auto,
            "required" => Self::Required,
            text => match text.strip_prefix("named:") {
                Some(name) => Self::Named(name.to_owned()),
                None => Self::None,
            },
        }
    }

    /// The JSON schema of all that is written, if the choice fixes it.
    pub(super) fn schema(&self, tools: &[Tool]) -> Option<Value> {
        match self {
            Self::None | Self::Auto => None,
            Self::Named(name) => {
                tools.iter().find(|tool| tool.name() == name).map(Tool::parameters)
            }
            Self::Required => {
                let one = |tool: &Tool| {
                    json!({
                        "type": "object",
                        "properties": {
                            "name": { "const": tool.name() },
                            "arguments": tool.parameters(),
                        },
                        "required": ["name", "arguments"],
                        "additionalProperties": false,
                    })
                };
                Some(json!({ "anyOf": tools.iter().map(one).collect::<Vec<_>>() }))
            }
        }
    }
}

/// Watches an answer that arrives in pieces.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    how: ToolUse,
    /// What may be, or belong to, a call.
    held: String,
    /// A call is open.
    open: bool,
    found: bool,
}

impl Calls {
    /// Of an answer in which calls are told like this.
    pub(super) fn new(how: ToolUse) -> Self {
        Self { how, held: String::new(), open: false, found: false }
    }

    /// Whether the model called something of its own will.
    pub(super) fn called(&self) -> bool {
        self.found && !matches!(self.how, ToolUse::Named(_))
    }

    /// Takes a piece and gives what is settled by it.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Said> {
        if self.how == ToolUse::None {
            return said(piece.to_owned());
        }
        self.held.push_str(piece);
        let mut settled = Vec::new();
        while self.how == ToolUse::Auto {
            let mark = if self.open { CLOSE } else { OPEN };
            let Some(at) = self.held.find(mark) else { break };
            let rest = self.held.split_off(at + mark.len());
            let before = std::mem::replace(&mut self.held, rest);
            let before = &before[..at];
            match self.open.then(|| parse(before)) {
                None => settled.extend(said(before.to_owned())),
                Some(Some(call)) => {
                    self.found = true;
                    settled.push(Said::Call(call));
                }
                Some(None) => settled.extend(said(format!("{OPEN}{before}{CLOSE}"))),
            }
            self.open = !self.open;
        }
        if self.how == ToolUse::Auto && !self.open {
            let held = &self.held;
            let from = held.len().saturating_sub(OPEN.len());
            let begins = |at: &usize| held.is_char_boundary(*at) && OPEN.starts_with(&held[*at..]);
            let at = (from..held.len()).find(begins).unwrap_or(held.len());
            let rest = self.held.split_off(at);
            settled.extend(said(std::mem::replace(&mut self.held, rest)));
        }
        settled
    }

    /// What was held back. Call it after the last piece.
    pub(super) fn finish(&mut self) -> Vec<Said> {
        let held = std::mem::take(&mut self.held);
        let call = match &self.how {
            ToolUse::None => return Vec::new(),
            ToolUse::Auto if self.open => {
                // Some models end after the call without its mark.
                parse(&held).ok_or_else(|| format!("{OPEN}{held}"))
            }
            ToolUse::Auto => Err(held),
            ToolUse::Required => parse(&held).ok_or(held),
            // Cut by max_tokens it is no JSON; it is what there is of the arguments all the same.
            ToolUse::Named(name) => Ok(Call { name: name.clone(), arguments: held }),
        };
        match call {
            Ok(call) => {
                self.found = true;
                vec![Said::Call(call)]
            }
            Err(text) => said(text),
        }
    }
}

fn said(text: String) -> Vec<Said> {
    if text.is_empty() { Vec::new() } else { vec![Said::Text(text)] }
}

/// What a call says, if it is one.
fn parse(text: &str) -> Option<Call> {
    let mut call: Map<String, Value> = serde_json::from_str(text.trim()).ok()?;
    let name = call.remove("name")?.as_str()?.to_owned();
    let arguments = call.remove("arguments").or_else(|| call.remove("parameters"));
    let arguments = match arguments {
        None => "{}".to_owned(),
        // Some models write JSON in a text.
        Some(Value::String(text)) => text,
        Some(arguments) => arguments.to_string(),
    };
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(how: ToolUse, pieces: &[&str]) -> (String, Vec<Call>, bool) {
        let mut calls = Calls::new(how);
        let mut settled: Vec<Said> = pieces.iter().flat_map(|piece| calls.push(piece)).collect();
        settled.extend(calls.finish());
        let (mut text, mut found) = (String::new(), Vec::new());
        for said in settled {
            match said {
                Said::Text(piece) => text.push_str(&piece),
                Said::Call(call) => found.push(call),
            }
        }
        (text, found, calls.called())
    }

    fn call(name: &str, arguments: &str) -> Call {
        Call { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn a_call_between_marks_is_found_however_it_is_cut() {
        let whole = "I look. <tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call> é<tool";
        for cut in (0..=whole.len()).filter(|at| whole.is_char_boundary(*at)) {
            let (text, calls, called) = all(ToolUse::Auto, &[&whole[..cut], &whole[cut..]]);
            assert_eq!(text, "I look.  é<tool", "{cut}");
            assert_eq!((calls, called), (vec![call("add", "{\"a\":1}")], true), "{cut}");
        }
        let letters: Vec<String> = whole.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(all(ToolUse::Auto, &letters).1.len(), 1);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in
            ["<tool_call>hm</tool_call>", "<tool_call>{\"name\": 1}</tool_call>", "<tool_call>"]
        {
            assert_eq!(all(ToolUse::Auto, &[text]), (text.to_owned(), vec![], false));
        }
        let text = "<tool_call>{\"name\":\"a\"}</tool_call>";
        assert_eq!(all(ToolUse::None, &[text]), (text.to_owned(), vec![], false));
        // One that was not closed, and one whose arguments are a text.
        let open = all(ToolUse::Auto, &["<tool_call>{\"name\":\"a\",\"parameters\":\"{}\"}"]);
        assert_eq!(open.1, [call("a", "{}")]);
    }

    #[test]
    fn how_calls_are_told_is_kept_with_a_job() {
        for how in
            [ToolUse::None, ToolUse::Auto, ToolUse::Required, ToolUse::Named("named:auto".into())]
        {
            assert_eq!(ToolUse::from_text(&how.to_text()), how);
        }
    }

    #[test]
    fn a_forced_call_is_all_that_is_written() {
        let named = ToolUse::Named("add".into());
        let found = all(named, &["{\"a\":", "1}"]);
        assert_eq!(found, (String::new(), vec![call("add", "{\"a\":1}")], false));
        let found = all(ToolUse::Required, &["{\"name\":\"b\",", "\"arguments\":{}}"]);
        assert_eq!(found, (String::new(), vec![call("b", "{}")], true));
        assert_eq!(all(ToolUse::Required, &["{\"na"]).0, "{\"na");
    }
}
