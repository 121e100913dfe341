//! Calls of tools in what a model writes: where they begin and end, and what they say.
//!
//! Invariant: every byte that the model wrote is handed out once: as text, or in a call. What looks
//! like a call and is none stays text.

use serde_json::{Map, Value};

use super::error::ApiError;

/// What models write around a call, if their template taught them: Hermes, Qwen and others.
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// How calls are told from text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum ToolUse {
    /// There are none.
    #[default]
    None,
    /// They stand between marks, in text.
    Auto,
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

/// What `tool_choice` asks for, of so many tools.
pub(super) fn tool_use(choice: Option<&Value>, tools: usize) -> Result<ToolUse, ApiError> {
    let by_itself = if tools == 0 { ToolUse::None } else { ToolUse::Auto };
    match choice {
        None | Some(Value::Null) => Ok(by_itself),
        Some(Value::String(word)) if word == "none" => Ok(ToolUse::None),
        Some(Value::String(word)) if word == "auto" => Ok(by_itself),
        Some(Value::String(word)) if word != "required" => {
            let message = "tool_choice: none or auto is expected";
            Err(ApiError::invalid("tool_choice", message))
        }
        Some(_) => {
            // Only a grammar could make a model call what it does not want to.
            let message = "tool_choice: a call cannot be forced yet; use auto";
            Err(ApiError::unsupported("tool_choice", message))
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

    /// Whether something was called.
    pub(super) fn called(&self) -> bool {
        self.found
    }

    /// Takes a piece and gives what is settled by it.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Said> {
        if self.how == ToolUse::None {
            return said(piece.to_owned());
        }
        self.held.push_str(piece);
        let mut settled = Vec::new();
        loop {
            let mark = if self.open { CLOSE } else { OPEN };
            let Some(at) = self.held.find(mark) else { break };
            let rest = self.held.split_off(at + mark.len());
            let before = std::mem::replace(&mut self.held, rest);
            let before = &before[..at];
            if !self.open {
                settled.extend(said(before.to_owned()));
            } else if let Some(call) = parse(before) {
                self.found = true;
                settled.push(Said::Call(call));
            } else {
                settled.extend(said(format!("{OPEN}{before}{CLOSE}")));
            }
            self.open = !self.open;
        }
        if !self.open {
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
        let call = match self.how {
            ToolUse::None => return Vec::new(),
            ToolUse::Auto if self.open => {
                // Some models end after the call without its mark.
                parse(&held).ok_or_else(|| format!("{OPEN}{held}"))
            }
            ToolUse::Auto => Err(held),
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
}
