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
    tool_calls: Option<Vec<IgnoredAny>>,

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
}

/// What a template is to be rendered with.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
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
                role @ ("system" | "user" | "assistant") => role,
                other => {
                    let other: String = other.chars().take(40).collect();
                    let message = format!(
                        "messages[{number}]: role {other:?}; system, developer, user or assistant \
                         is expected"
                    );
                    return Err(ApiError::invalid("messages", message));
                }
            };
            if message.tool_calls.is_some_and(|calls| !calls.is_empty()) {
                let message = format!("messages[{number}]: tool_calls are not supported");
                return Err(ApiError::unsupported("messages", message));
            }
            let content = message.content.map(Content::text).transpose()?;
            let content = content.ok_or_else(|| {
                ApiError::invalid("messages", format!("messages[{number}] has no content"))
            })?;
            turns.push(Turn {
                role: role.to_owned(),
                content,
                name: message.name,
                reasoning_content: message.reasoning_content,
            });
        }
        let mut variables = self.variables;
        for name in ["messages", "tools", "unix_time"] {
            if variables.contains_key(name) {
                let message = format!("chat_template_kwargs: {name} is a field of its own");
                return Err(ApiError::invalid("chat_template_kwargs", message));
            }
        }
        variables.insert("messages".into(), json!(turns));
        variables.insert("unix_time".into(), json!(unix_time));
        Ok(Value::Object(variables).to_string())
    }
}

/// Whether an answer may have any form.
pub(super) fn check_format(format: Option<&Value>) -> Result<(), ApiError> {
    match format.and_then(|format| format.get("type")).and_then(Value::as_str) {
        None if format.is_none_or(Value::is_null) => Ok(()),
        Some("text") => Ok(()),
        _ => {
            let message = "response_format: only {\"type\": \"text\"} is supported";
            Err(ApiError::unsupported("response_format", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(messages: Value) -> Result<Value, ApiError> {
        let messages = serde_json::from_value(messages).unwrap();
        let asked = Conversation { messages, variables: Map::new() };
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
        assert!(check_format(Some(&json!({ "type": "json_object" }))).is_err());
        assert!(check_format(Some(&json!({ "type": "text" }))).is_ok());
        assert!(check_format(None).is_ok());
    }
}
