//! `tojson` as transformers defines it: Python's `json.dumps`, without HTML's escapes.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind},
};

use super::python;

/// Nesting of values that are written; Python stops somewhere above.
const DEPTH_MAX: usize = 128;

/// The filter. `ensure_ascii` is the first argument by position, as in transformers.
pub(super) fn tojson(
    state: &mut State<'_, '_>,
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named = |name: &str, given: Option<Value>| match given {
        Some(given) => Ok(given),
        None => kwargs.get::<Option<Value>>(name).map(Option::unwrap_or_default),
    };
    let ascii = named("ensure_ascii", ensure_ascii)?.is_true();
    let indent = named("indent", indent)?;
    let indent = match indent.kind() {
        ValueKind::Undefined | ValueKind::None => None,
        ValueKind::String => Some(indent.to_string()),
        // Python's True is 1.
        _ if indent.kind() == ValueKind::Bool => Some(" ".repeat(usize::from(indent.is_true()))),
        _ => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 256) as usize)),
    };
    let separators = named("separators", None)?;
    let separators = match separators.kind() {
        ValueKind::Undefined | ValueKind::None => {
            (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
        }
        _ => {
            let both: Vec<_> = separators.try_iter()?.collect();
            let [item, key] = &both[..] else {
                return Err(wrong("separators: two texts are expected"));
            };
            (item.to_string(), key.to_string())
        }
    };
    let sort_keys = named("sort_keys", None)?.is_true();
    kwargs.assert_all_used()?;
    let mut dump = Dump { out: String::new(), ascii, indent, separators, sort_keys };
    dump.value(value, 0)?;
    // Charges for the walk over the value, which is dearer than the bytes that are made.
    let text = Value::from(dump.out);
    for _ in 0..4 {
        python::charge(state, &text)?;
    }
    Ok(text)
}

fn wrong(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {}", reason.into()))
}

struct Dump {
    out: String,
    ascii: bool,
    indent: Option<String>,
    separators: (String, String),
    sort_keys: bool,
}

impl Dump {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(wrong("the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(wrong(format!("a value of kind {kind} is no JSON"))),
        }
        Ok(())
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut any = false;
        for item in list.try_iter()? {
            self.begin_item(any, depth + 1);
            any = true;
            self.value(&item, depth + 1)?;
        }
        self.end(any, depth, ']');
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('{');
        let mut keys: Vec<_> = map.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        let mut any = false;
        for key in keys {
            self.begin_item(any, depth + 1);
            any = true;
            match key.kind() {
                ValueKind::String => self.text(key.as_str().unwrap_or_default()),
                ValueKind::None => self.text("null"),
                ValueKind::Bool => self.text(if key.is_true() { "true" } else { "false" }),
                ValueKind::Number => self.text(&number(&key)),
                kind => return Err(wrong(format!("a key of kind {kind} is no JSON"))),
            }
            self.out.push_str(&self.separators.1);
            self.value(&map.get_item(&key)?, depth + 1)?;
        }
        self.end(any, depth, '}');
        Ok(())
    }

    fn begin_item(&mut self, any: bool, depth: usize) {
        if any {
            self.out.push_str(&self.separators.0);
        }
        self.line(depth);
    }

    fn end(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c >= '\u{7f}') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => match float {
            f if f.is_nan() => "NaN".into(),
            f if f.is_infinite() => if f > 0.0 { "Infinity" } else { "-Infinity" }.into(),
            f => python::float(f),
        },
        _ => value.to_string(),
    }
}
