//! Python's values in templates: the methods of strings and dictionaries, how values print, and
//! the two ways to format.
//!
//! Every function pays for the characters that it reads ([`charge`]); what it makes is charged by
//! the library.

use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    value::{Kwargs, Tuple, ValueKind, from_args},
};

use super::source::PERCENT;

/// Widths that a format may ask for.
const WIDTH_MAX: usize = 4096;
/// Bytes that one step pays for.
const BYTES_PER_STEP: u64 = 64;

/// Gives an environment what minijinja lacks or does otherwise.
pub(super) fn add_to(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("string", |value: &Value| match value.kind() {
        ValueKind::String => value.clone(),
        _ => Value::from(text(value)),
    });
    environment.add_filter(PERCENT, percent);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq
                | ValueKind::Map
                | ValueKind::String
                | ValueKind::Iterable
                | ValueKind::Undefined
        )
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Number => {
            let text = Value::from(text(value));
            charge(state, &text)?;
            minijinja::escape_formatter(out, state, &text)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
}

/// Pays for the reading of a text.
pub(super) fn charge(state: &State<'_, '_>, text: &Value) -> Result<(), Error> {
    let bytes = text.as_str().map_or(0, str::len) as u64;
    state.consume_fuel(bytes / BYTES_PER_STEP)
}

fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// `repr` of a float.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "nan" } else { "inf" };
        return if value < 0.0 { format!("-{name}") } else { name.into() };
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `str` of a value.
pub(super) fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        ValueKind::Undefined => String::new(),
        _ => repr(value, 0),
    }
}

fn repr(value: &Value, depth: usize) -> String {
    if depth > 64 {
        return "...".into();
    }
    let all = |values: &Value, item: &dyn Fn(Value) -> String| {
        let items: Vec<_> = values.try_iter().into_iter().flatten().map(item).collect();
        items.join(", ")
    };
    match value.kind() {
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Undefined => "Undefined".into(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
        }
        ValueKind::Seq => {
            let items = all(value, &|item| repr(&item, depth + 1));
            match value.is_tuple() {
                true if value.len() == Some(1) => format!("({items},)"),
                true => format!("({items})"),
                false => format!("[{items}]"),
            }
        }
        ValueKind::Map => {
            let entry = |key: Value| {
                let found = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key, depth + 1), repr(&found, depth + 1))
            };
            format!("{{{}}}", all(value, &entry))
        }
        _ => value.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `"…" % arguments`: several are a tuple, names a dictionary.
fn percent(state: &mut State<'_, '_>, format: &Value, arguments: &Value) -> Result<Value, Error> {
    let mut all = vec![format.clone()];
    match arguments.kind() {
        ValueKind::Seq if arguments.is_tuple() => all.extend(arguments.try_iter()?),
        ValueKind::Map => {
            let mut names = Vec::new();
            for key in arguments.try_iter()? {
                names.push((key.to_string(), arguments.get_item(&key)?));
            }
            all.push(Value::from(names.into_iter().collect::<Kwargs>()));
        }
        _ => all.push(arguments.clone()),
    }
    state.apply_filter("format", &all)
}

fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Map => map_method(state, value, method, args),
        ValueKind::Seq => list_method(state, value, method, args),
        ValueKind::String => {
            charge(state, value)?;
            text_method(state, value, method, args)
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn map_method(
    state: &mut State<'_, '_>,
    map: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let visited = map.len().unwrap_or(0) as u64;
    match method {
        "items" => {
            from_args::<()>(args)?;
            state.apply_filter("items", std::slice::from_ref(map))
        }
        "keys" | "values" => {
            from_args::<()>(args)?;
            state.consume_fuel(visited)?;
            let keys = map.try_iter()?;
            match method {
                "keys" => Ok(Value::from(keys.collect::<Vec<_>>())),
                _ => keys
                    .map(|key| map.get_item(&key))
                    .collect::<Result<Vec<_>, _>>()
                    .map(Value::from),
            }
        }
        "copy" => {
            from_args::<()>(args)?;
            Ok(map.clone())
        }
        "get" => {
            let (key, default): (&Value, Option<Value>) = from_args(args)?;
            let found = map.get_item(key)?;
            Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn list_method(
    state: &State<'_, '_>,
    list: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    state.consume_fuel(list.len().unwrap_or(0) as u64)?;
    match method {
        "count" => {
            let (wanted,): (&Value,) = from_args(args)?;
            Ok(list.try_iter()?.filter(|item| item == wanted).count().into())
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|item| item == *wanted);
            at.map(Value::from).ok_or_else(|| invalid("index: the list has no such item"))
        }
        "copy" => {
            from_args::<()>(args)?;
            Ok(list.clone())
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// What Python takes for white space.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// A text, or any of a tuple of texts.
fn any_of(wanted: &Value, found: impl Fn(&str) -> bool) -> Result<bool, Error> {
    if let Some(text) = wanted.as_str() {
        return Ok(found(text));
    }
    let texts: Vec<_> = wanted.try_iter()?.collect();
    Ok(texts.iter().any(|text| text.as_str().is_some_and(&found)))
}

fn text_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let text = value.as_str().unwrap_or_default();
    let list =
        |parts: Vec<&str>| Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>());
    let all = |test: &dyn Fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(test));
    let cased = |test: &dyn Fn(char) -> bool, other: &dyn Fn(char) -> bool| {
        Value::from(text.chars().any(test) && !text.chars().any(other))
    };
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<Option<&str>>,) = from_args(args)?;
            let chars: Option<Vec<char>> = chars.flatten().map(|chars| chars.chars().collect());
            let listed = |c: char| chars.as_ref().map_or(is_blank(c), |chars| chars.contains(&c));
            match method {
                "strip" => text.trim_matches(listed).into(),
                "lstrip" => text.trim_start_matches(listed).into(),
                _ => text.trim_end_matches(listed).into(),
            }
        }
        "startswith" => any_of(from_args::<(&Value,)>(args)?.0, |p| text.starts_with(p))?.into(),
        "endswith" => any_of(from_args::<(&Value,)>(args)?.0, |p| text.ends_with(p))?.into(),
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "upper" | "lower" | "title" | "capitalize" | "replace" => {
            let mut all = vec![value.clone()];
            all.extend_from_slice(args);
            state.apply_filter(method, &all)?
        }
        "casefold" => text.to_lowercase().into(),
        "swapcase" => {
            let swap = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "split" | "rsplit" => {
            let (separator, limit, named): (Option<Option<&str>>, Option<i64>, Kwargs) =
                from_args(args)?;
            let separator = match separator {
                Some(separator) => separator,
                None => named.get::<Option<&str>>("sep")?,
            };
            let limit = limit.or(named.get("maxsplit")?).unwrap_or(-1);
            named.assert_all_used()?;
            if separator == Some("") {
                return Err(invalid("split by an empty text"));
            }
            list(split(text, separator, usize::try_from(limit).ok(), method == "rsplit"))
        }
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(named.get("keepends")?).unwrap_or(false);
            let lines = text.split_inclusive('\n');
            list(
                lines
                    .map(|line| if keep { line } else { line.trim_end_matches(['\n', '\r']) })
                    .collect(),
            )
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let cut = match method {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match cut {
                Some((before, after)) => [before, separator, after],
                None if method == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from).to_vec()))
        }
        "join" => {
            let (parts,): (&Value,) = from_args(args)?;
            state.apply_filter("join", &[parts.clone(), value.clone()])?
        }
        "count" => {
            let (wanted,): (&str,) = from_args(args)?;
            text.matches(wanted).count().into()
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = if method.starts_with('r') { text.rfind(wanted) } else { text.find(wanted) };
            match at {
                Some(at) => text[..at].chars().count().into(),
                None if method.ends_with("find") => (-1).into(),
                None => return Err(invalid(format!("{method}: the text has no such part"))),
            }
        }
        "format" => format(state, text, args)?.into(),
        "zfill" | "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let sign = text.starts_with(['-', '+']);
            let align = match method {
                "ljust" => '<',
                "rjust" => '>',
                "center" => '^',
                _ if sign => '=',
                _ => '>',
            };
            let default = if method == "zfill" { '0' } else { ' ' };
            let fill = fill.and_then(|fill| fill.chars().next()).unwrap_or(default);
            pad(text, width, fill, align)?.into()
        }
        "isdigit" | "isdecimal" | "isnumeric" => all(&|c| c.is_numeric()),
        "isalpha" => all(&|c| c.is_alphabetic()),
        "isalnum" => all(&|c| c.is_alphanumeric()),
        "isspace" => all(&is_blank),
        "isascii" => text.is_ascii().into(),
        "isupper" => cased(&|c| c.is_uppercase(), &|c| c.is_lowercase()),
        "islower" => cased(&|c| c.is_lowercase(), &|c| c.is_uppercase()),
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

fn split<'a>(
    text: &'a str,
    separator: Option<&str>,
    limit: Option<usize>,
    from_right: bool,
) -> Vec<&'a str> {
    let pieces = limit.map_or(usize::MAX, |limit| limit.saturating_add(1));
    let mut parts = Vec::new();
    match (separator, from_right) {
        (Some(separator), false) => parts.extend(text.splitn(pieces, separator)),
        (Some(separator), true) => {
            parts.extend(text.rsplitn(pieces, separator));
            parts.reverse();
        }
        (None, false) => {
            let mut rest = text.trim_start_matches(is_blank);
            while !rest.is_empty() {
                let end = rest.find(is_blank).filter(|_| parts.len() + 1 < pieces);
                let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
                parts.push(part);
                rest = after.trim_start_matches(is_blank);
            }
        }
        (None, true) => {
            let mut rest = text.trim_end_matches(is_blank);
            while !rest.is_empty() {
                let cut = rest.char_indices().rfind(|(_, c)| is_blank(*c));
                let cut = cut.filter(|_| parts.len() + 1 < pieces);
                let begin = cut.map_or(0, |(at, c)| at + c.len_utf8());
                parts.push(&rest[begin..]);
                rest = rest[..begin].trim_end_matches(is_blank);
            }
            parts.reverse();
        }
    }
    parts
}

/// Fills a text up to a width. `=` fills between sign and digits.
fn pad(text: &str, width: usize, fill: char, align: char) -> Result<String, Error> {
    if width > WIDTH_MAX {
        return Err(invalid(format!("a width of {width}; at most {WIDTH_MAX} is taken")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let fill = |n: usize| std::iter::repeat_n(fill, n).collect::<String>();
    Ok(match align {
        '<' => format!("{text}{}", fill(missing)),
        // Python puts the odd one to the right in formats.
        '^' => format!("{}{text}{}", fill(missing / 2), fill(missing - missing / 2)),
        '=' if text.starts_with(['-', '+']) => {
            format!("{}{}{}", &text[..1], fill(missing), &text[1..])
        }
        _ => format!("{}{text}", fill(missing)),
    })
}

/// `str.format`.
fn format(state: &mut State<'_, '_>, template: &str, args: &[Value]) -> Result<String, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(args)?;
    let mut out = String::new();
    let mut rest = template;
    let mut next = 0;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        let end = rest.find('}').filter(|_| brace == "{");
        let end = end.ok_or_else(|| invalid(format!("format: a single {brace}")))?;
        let field = &rest[..end];
        rest = &rest[end + 1..];
        if field.contains('{') {
            return Err(invalid("format: a field within a field is not known"));
        }
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (field, conversion) = field.split_once('!').unwrap_or((field, ""));
        let name_end = field.find(['.', '[']).unwrap_or(field.len());
        let (name, path) = field.split_at(name_end);
        let root = match name {
            "" => {
                next += 1;
                positional.get(next - 1).cloned()
            }
            name => match name.parse::<usize>() {
                Ok(index) => positional.get(index).cloned(),
                Err(_) => named.get::<Option<Value>>(name)?,
            },
        };
        let root =
            root.ok_or_else(|| invalid(format!("format: nothing is given for {{{name}}}")))?;
        let value = follow(root, path)?;
        let value = match conversion {
            "" => value,
            "s" => Value::from(text(&value)),
            "r" => Value::from(repr(&value, 0)),
            other => return Err(invalid(format!("format: !{other} is not known"))),
        };
        charge(state, &value)?;
        out.push_str(&formatted(&value, spec)?);
    }
    Ok(out + rest)
}

/// `.name` and `[key]` of a format's field.
fn follow(mut value: Value, mut path: &str) -> Result<Value, Error> {
    while !path.is_empty() {
        let (key, rest) = match path.strip_prefix('[') {
            Some(inner) => inner.split_once(']').ok_or_else(|| invalid("format: a single ["))?,
            None => {
                let name = &path[1..];
                name.split_at(name.find(['.', '[']).unwrap_or(name.len()))
            }
        };
        value = match key.parse::<usize>() {
            Ok(index) if value.kind() == ValueKind::Seq => value.get_item_by_index(index)?,
            _ => value.get_attr(key)?,
        };
        path = rest;
    }
    Ok(value)
}

/// A value by a format's specification: `[[fill]align][sign][#][0][width][,][.precision][type]`.
fn formatted(value: &Value, spec: &str) -> Result<String, Error> {
    let unknown = || invalid(format!("format: {spec:?} is not known"));
    let mut chars: Vec<char> = spec.chars().collect();
    chars.reverse();
    let is_align = |c: &char| matches!(c, '<' | '>' | '^' | '=');
    let (mut fill, mut align) = (' ', None);
    if chars.len() > 1 && is_align(&chars[chars.len() - 2]) {
        fill = chars.pop().ok_or_else(unknown)?;
        align = chars.pop();
    } else if chars.last().is_some_and(is_align) {
        align = chars.pop();
    }
    let mut take = |wanted: &[char]| match chars.last() {
        Some(c) if wanted.contains(c) => chars.pop(),
        _ => None,
    };
    let sign = take(&['+', '-', ' ']);
    let alternate = take(&['#']).is_some();
    if take(&['0']).is_some() {
        fill = '0';
        align = align.or(Some('='));
    }
    let digits = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'];
    let mut number = String::new();
    while let Some(digit) = take(&digits) {
        number.push(digit);
    }
    let width: usize = if number.is_empty() { 0 } else { number.parse().map_err(|_| unknown())? };
    let grouped = take(&[',', '_']);
    let mut precision = None;
    if take(&['.']).is_some() {
        let mut number = String::new();
        while let Some(digit) = take(&digits) {
            number.push(digit);
        }
        let places: usize = number.parse().map_err(|_| unknown())?;
        precision = Some(places).filter(|p| *p <= WIDTH_MAX);
        precision.ok_or_else(unknown)?;
    }
    let kind = chars.pop();
    if !chars.is_empty() {
        return Err(unknown());
    }
    let is_number = matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    let body = match (kind, is_number) {
        (None, false) | (Some('s'), false) => {
            let text = text(value);
            let text = precision.map_or(text.clone(), |p| text.chars().take(p).collect());
            return pad(&text, width, fill, align.unwrap_or('<'));
        }
        // With nothing asked for, as it prints.
        (None, true) if spec.is_empty() => return Ok(text(value)),
        (None, true) if value.kind() == ValueKind::Bool || value.is_integer() => {
            i128::try_from(value.clone())?.to_string()
        }
        (None, true) if precision.is_none() => float(f64::try_from(value.clone())?),
        (Some('d'), true) if value.kind() == ValueKind::Bool || value.is_integer() => {
            i128::try_from(value.clone())?.to_string()
        }
        (Some(base @ ('x' | 'X' | 'o' | 'b')), true) => {
            let n = i128::try_from(value.clone())?;
            let (minus, n) = (if n < 0 { "-" } else { "" }, n.unsigned_abs());
            let prefix = if alternate { format!("0{base}") } else { String::new() };
            let digits = match base {
                'x' => format!("{n:x}"),
                'X' => format!("{n:X}"),
                'o' => format!("{n:o}"),
                _ => format!("{n:b}"),
            };
            format!("{minus}{prefix}{digits}")
        }
        (Some('f' | 'F'), true) => {
            format!("{:.*}", precision.unwrap_or(6), f64::try_from(value.clone())?)
        }
        (Some('%'), true) => {
            format!("{:.*}%", precision.unwrap_or(6), f64::try_from(value.clone())? * 100.0)
        }
        (Some('e' | 'E'), true) => {
            let text = format!("{:.*e}", precision.unwrap_or(6), f64::try_from(value.clone())?);
            let (mantissa, exponent) = text.split_once('e').ok_or_else(unknown)?;
            let exponent: i32 = exponent.parse().map_err(|_| unknown())?;
            let minus = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{minus}{:02}", exponent.abs())
        }
        _ => return Err(unknown()),
    };
    let body = match grouped {
        Some(mark) => with_thousands(&body, mark),
        None => body,
    };
    let body = match sign {
        Some(mark @ ('+' | ' ')) if !body.starts_with('-') => format!("{mark}{body}"),
        _ => body,
    };
    pad(&body, width, fill, align.unwrap_or('>'))
}

fn with_thousands(number: &str, mark: char) -> String {
    let digits_end = number.find(['.', 'e', '%']).unwrap_or(number.len());
    let (whole, rest) = number.split_at(digits_end);
    let (minus, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut out = String::from(minus);
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at) % 3 == 0 {
            out.push(mark);
        }
        out.push(digit);
    }
    out + rest
}
