//! Conversations as OpenAI's clients write them, and as chat templates read them.

use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::{Map, Value, json};

use super::error::ApiError;

/// One turn.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Message {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    name: Option<String>,
    /// What some clients call the thoughts before an answer; templates read it.
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
    #[serde(default)]
    tool_call_id: Option<String>,

    // What clients send back of an answer, and templates do not read.
    #[serde(default, rename = "refusal")]
    _refusal: Option<IgnoredAny>,
    #[serde(default, rename = "annotations")]
    _annotations: Option<IgnoredAny>,
    #[serde(default, rename = "audio")]
    _audio: Option<IgnoredAny>,
    #[serde(default, rename = "function_call")]
    _function_call: Option<IgnoredAny>,
}

/// A call that the model made earlier.
#[derive(Debug, Deserialize)]
struct ToolCall {
    id: String,
    function: CalledFunction,
}

#[derive(Debug, Deserialize)]
struct CalledFunction {
    name: String,
    arguments: String,
}

impl ToolCall {
    /// As templates read it: arguments are an object, as transformers gives them.
    fn json(self) -> Value {
        let CalledFunction { name, arguments } = self.function;
        let arguments = match serde_json::from_str::<Map<String, Value>>(&arguments) {
            Ok(object) => Value::Object(object),
            Err(_) => Value::String(arguments),
        };
        let function = json!({ "name": name, "arguments": arguments });
        json!({ "id": self.id, "type": "function", "function": function })
    }
}

/// Something that the model may call.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Tool {
    #[serde(rename = "type")]
    kind: String,
    function: Function,
}

#[derive(Debug, Deserialize, Serialize)]
struct Function {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    /// A JSON schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parameters: Option<Value>,
    /// Asks that arguments follow the schema, which only those of a forced call do.
    #[serde(default, skip_serializing)]
    strict: Option<bool>,
}

impl Tool {
    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.function.name
    }

    /// The schema of its arguments.
    pub(super) fn parameters(&self) -> Value {
        self.function.parameters.clone().unwrap_or_else(|| json!({ "type": "object" }))
    }
}

/// Longest name of a tool, in bytes.
const TOOL_NAME_BYTES_MAX: usize = 64;
/// Most tools of a conversation.
const TOOLS_MAX: usize = 128;

fn check_tools(tools: &[Tool], forced: bool) -> Result<(), ApiError> {
    if tools.len() > TOOLS_MAX {
        let message = format!("tools has {} entries; at most {TOOLS_MAX} are taken", tools.len());
        return Err(ApiError::invalid("tools", message));
    }
    for (number, Tool { kind, function }) in tools.iter().enumerate() {
        let name = &function.name;
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        if !plain || name.is_empty() || name.len() > TOOL_NAME_BYTES_MAX {
            let message = format!(
                "tools[{number}]: a name of 1 to {TOOL_NAME_BYTES_MAX} letters, digits, _ and - is \
                 expected"
            );
            return Err(ApiError::invalid("tools", message));
        }
        if kind != "function" {
            let message = format!("tools[{number}]: type function is expected");
            return Err(ApiError::unsupported("tools", message));
        }
        if function.strict == Some(true) && !forced {
            let message = format!(
                "tools[{number}]: strict holds only for a call that is forced: leave it out, or set \
                 tool_choice"
            );
            return Err(ApiError::unsupported("tools", message));
        }
    }
    Ok(())
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "content: a text or a list of parts of type text is expected")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

impl Content {
    fn text(self) -> Result<String, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let mut text = String::new();
        for part in parts {
            match (part.kind.as_str(), part.text) {
                ("text", Some(piece)) => text.push_str(&piece),
                (kind, _) => {
                    let kind: String = kind.chars().take(40).collect();
                    let message = format!("messages: a part of type {kind:?}; only text is served");
                    return Err(ApiError::unsupported("messages", message));
                }
            }
        }
        Ok(text)
    }
}

/// A turn as templates read it.
#[derive(Debug, Serialize)]
struct Turn {
    role: String,
    content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<String>,
}

/// What a template is to be rendered with.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    /// What the model may call; none where it may not.
    pub(super) tools: Vec<Tool>,
    /// A call of one of them is all that is written.
    pub(super) forced: bool,
    /// What else the template reads: `enable_thinking`, ….
    pub(super) variables: Map<String, Value>,
}

impl Conversation {
    /// The conversation as JSON for the template.
    pub(super) fn check(self, unix_time: i64) -> Result<String, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::invalid(
                "messages",
                "messages is empty; one at least is expected",
            ));
        }
        let mut turns = Vec::with_capacity(self.messages.len());
        for (number, message) in self.messages.into_iter().enumerate() {
            let role = match message.role.as_str() {
                // The same, by its newer name; templates know the older.
                "developer" => "system",
                role @ ("system" | "user" | "assistant" | "tool") => role,
                other => {
                    let other: String = other.chars().take(40).collect();
                    let message = format!(
                        "messages[{number}]: role {other:?}; system, developer, user, assistant or \
                         tool is expected"
                    );
                    return Err(ApiError::invalid("messages", message));
                }
            };
            let calls = message.tool_calls.unwrap_or_default();
            let calls: Vec<Value> = calls.into_iter().map(ToolCall::json).collect();
            let content = message.content.map(Content::text).transpose()?;
            let content = match content {
                Some(content) => content,
                // Whoever calls may say nothing beside it.
                None if !calls.is_empty() => String::new(),
                None => {
                    let message = format!("messages[{number}] has no content");
                    return Err(ApiError::invalid("messages", message));
                }
            };
            turns.push(Turn {
                role: role.to_owned(),
                content,
                name: message.name,
                reasoning_content: message.reasoning_content,
                tool_calls: calls,
                tool_call_id: message.tool_call_id,
            });
        }
        let mut variables = self.variables;
        for name in ["messages", "tools", "unix_time"] {
            if variables.contains_key(name) {
                let message = format!("chat_template_kwargs: {name} is a field of its own");
                return Err(ApiError::invalid("chat_template_kwargs", message));
            }
        }
        check_tools(&self.tools, self.forced)?;
        if !self.tools.is_empty() {
            variables.insert("tools".into(), json!(self.tools));
        }
        variables.insert("messages".into(), json!(turns));
        variables.insert("unix_time".into(), json!(unix_time));
        Ok(Value::Object(variables).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(messages: Value) -> Result<Value, ApiError> {
        let messages = serde_json::from_value(messages).unwrap();
        let asked =
            Conversation { messages, tools: Vec::new(), forced: false, variables: Map::new() };
        asked.check(7).map(|json| serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn turns_become_what_templates_read() {
        let found = rendered(json!([
            { "role": "developer", "content": "be brief" },
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": "c", "refusal": null, "annotations": [], "tool_calls": null },
        ]));
        let expected = json!({ "unix_time": 7, "messages": [
            { "role": "system", "content": "be brief" },
            { "role": "user", "content": "ab" },
            { "role": "assistant", "content": "c" },
        ]});
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn tools_and_their_calls_become_what_templates_read() {
        let messages = json!([
            { "role": "user", "content": "1 + 2?" },
            { "role": "assistant", "content": null, "tool_calls": [{
                "id": "call_0", "type": "function",
                "function": { "name": "add", "arguments": "{\"a\":1,\"b\":2}" },
            }]},
            { "role": "tool", "content": "3", "tool_call_id": "call_0" },
        ]);
        let tool = json!({ "type": "function", "function": { "name": "add", "parameters": {} } });
        let asked = |tools: Value| Conversation {
            messages: serde_json::from_value(messages.clone()).unwrap(),
            tools: serde_json::from_value(tools).unwrap(),
            forced: false,
            variables: Map::new(),
        };
        let found = asked(json!([tool])).check(0).unwrap();
        let found: Value = serde_json::from_str(&found).unwrap();
        assert_eq!(found["tools"], json!([tool]));
        let call = &found["messages"][1]["tool_calls"][0]["function"];
        assert_eq!(call["arguments"], json!({ "a": 1, "b": 2 }));
        assert_eq!(found["messages"][1]["content"], "");
        assert_eq!(found["messages"][2]["tool_call_id"], "call_0");
        for (name, kind, strict) in
            [("a b", "function", false), ("a", "x", false), ("a", "function", true)]
        {
            let bad = json!([{ "type": kind, "function": { "name": name, "strict": strict } }]);
            assert!(asked(bad).check(0).is_err());
        }
    }

    #[test]
    fn what_nobody_can_answer_is_refused_by_name() {
        for (messages, words) in [
            (json!([]), "messages is empty"),
            (json!([{ "role": "user" }]), "messages[0] has no content"),
            (json!([{ "role": "wizard", "content": "a" }]), "role \"wizard\""),
            (
                json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }]),
                "only text is served",
            ),
        ] {
            let error = rendered(messages).unwrap_err();
            assert!(error.message.contains(words), "{error:?}");
        }
    }
}
