//! What form an answer must have: OpenAI's `response_format` and forced `tool_choice`, and our own
//! `regex` and `grammar`.

use lite_llm_transport::messages::{GRAMMAR_BYTES_MAX, Grammar};
use serde_json::{Value, json};

use super::error::ApiError;

/// The form that a body asks for, if it asks for one. `forced` is the schema of what a forced call of a
/// tool must be.
pub(super) fn form(
    format: Option<&Value>,
    regex: Option<String>,
    grammar: Option<String>,
    forced: Option<Value>,
) -> Result<Option<Grammar>, ApiError> {
    let by_format = by_format(format)?;
    let mut asked: Vec<(&'static str, Grammar)> = Vec::new();
    asked.extend(by_format.map(|schema| ("response_format", json_of(schema))));
    asked.extend(regex.map(|regex| ("regex", Grammar::Regex(regex))));
    asked.extend(grammar.map(|grammar| ("grammar", Grammar::Lark(grammar))));
    asked.extend(forced.map(|schema| ("tool_choice", json_of(schema))));
    if let [(one, _), (other, _), ..] = &asked[..] {
        let message = format!("{one} and {other} both say what form the answer has: give one");
        return Err(ApiError::invalid(other, message));
    }
    let Some((name, form)) = asked.pop() else { return Ok(None) };
    let bytes = form.text().len();
    if bytes > GRAMMAR_BYTES_MAX {
        let message = format!("{name} has {bytes} bytes; at most {GRAMMAR_BYTES_MAX} are taken");
        return Err(ApiError::invalid(name, message));
    }
    Ok(Some(form))
}

/// The schema of `response_format`, if it has one.
fn by_format(format: Option<&Value>) -> Result<Option<Value>, ApiError> {
    let wrong = |message: &str| Err(ApiError::invalid("response_format", message));
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({ "type": "object" }))),
        Some("json_schema") => match format.pointer("/json_schema/schema") {
            Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Some(schema.clone())),
            _ => wrong("response_format: json_schema.schema is missing, which is a JSON schema"),
        },
        _ => wrong("response_format: type text, json_object or json_schema is expected"),
    }
}

/// JSON of a schema, without blanks that no schema bounds: a model may write them for ever.
fn json_of(mut schema: Value) -> Grammar {
    if let Value::Object(schema) = &mut schema {
        schema.entry("x-guidance").or_insert_with(|| json!({ "whitespace_flexible": false }));
    }
    Grammar::JsonSchema(schema.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(format: Value, regex: Option<&str>) -> Result<Option<Grammar>, ApiError> {
        form(Some(&format), regex.map(str::to_owned), None, None)
    }

    #[test]
    fn a_form_is_asked_for_in_one_way() {
        let schema = json!({ "type": "integer" });
        let asked = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema, "strict": true } });
        let Some(Grammar::JsonSchema(text)) = of(asked.clone(), None).unwrap() else { panic!() };
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["type"], "integer");
        assert!(matches!(
            of(json!({ "type": "json_object" }), None).unwrap(),
            Some(Grammar::JsonSchema(_))
        ));
        assert_eq!(of(json!({ "type": "text" }), None).unwrap(), None);
        assert_eq!(of(Value::Null, Some("a")).unwrap(), Some(Grammar::Regex("a".into())));
        let twice = of(asked, Some("a")).unwrap_err();
        assert!(twice.message.contains("response_format and regex"), "{twice:?}");
        for (bad, words) in [
            (json!({ "type": "json_schema", "json_schema": { "name": "n" } }), "schema is missing"),
            (json!({ "type": "poem" }), "json_object"),
            (json!("json"), "is expected"),
        ] {
            assert!(of(bad, None).unwrap_err().message.contains(words));
        }
        let long = of(Value::Null, Some(&"a".repeat(GRAMMAR_BYTES_MAX + 1))).unwrap_err();
        assert!(long.message.contains("bytes"), "{long:?}");
    }
}
