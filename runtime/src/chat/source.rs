//! What a template spells otherwise than minijinja reads it: line ends, `{% generation %}`, and `%`
//! between a text and its arguments.

/// Name of the filter that `"text" % arguments` becomes.
pub(super) const PERCENT: &str = "__percent";

/// The template for minijinja.
pub(super) fn rewritten(template: &str) -> String {
    // As jinja2: every line end is one, wherever it stands.
    let source = template.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while let Some(found) = source[at..].find('{') {
        let begin = at + found;
        out.push_str(&source[at..begin]);
        let rest = &source[begin..];
        at = match rest.as_bytes().get(1) {
            Some(b'#') => begin + rest.find("#}").map_or(rest.len(), |end| end + 2),
            Some(b'{' | b'%') if tag_word(rest) == "raw" => begin + raw_end(rest),
            Some(b'{' | b'%') => {
                at = begin + tag(rest, &mut out);
                continue;
            }
            _ => begin + 1,
        };
        out.push_str(&source[begin..at]);
    }
    out.push_str(&source[at..]);
    out
}

/// The first word of a block tag.
fn tag_word(tag: &str) -> &str {
    let Some(body) = tag.strip_prefix("{%") else { return "" };
    let body = body.trim_start_matches(['-', '+']).trim_start();
    let end = body.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(body.len());
    &body[..end]
}

/// Where a raw block and its end tag end.
fn raw_end(block: &str) -> usize {
    let mut at = 2;
    while let Some(found) = block[at..].find("{%") {
        at += found;
        if tag_word(&block[at..]) == "endraw" {
            return block[at..].find("%}").map_or(block.len(), |end| at + end + 2);
        }
        at += 2;
    }
    block.len()
}

/// Copies a tag, rewritten, and returns its length.
fn tag(tag: &str, out: &mut String) -> usize {
    let close = if tag.starts_with("{{") { "}}" } else { "%}" };
    // The marked part of an answer matters to training only. It is a scope of its own.
    let (word, instead) = match tag_word(tag) {
        "generation" => ("generation", "with"),
        "endgeneration" => ("endgeneration", "endwith"),
        _ => ("", ""),
    };
    let mut at = 2;
    out.push_str(&tag[..2]);
    if !word.is_empty() {
        let begin = tag.find(word).unwrap_or(at);
        out.push_str(&tag[at..begin]);
        out.push_str(instead);
        at = begin + word.len();
    }
    let mut braces = 0usize;
    while at < tag.len() {
        let rest = &tag[at..];
        if braces == 0 && rest.starts_with(close) {
            out.push_str(close);
            return at + close.len();
        }
        let mut chars = rest.chars();
        match chars.next() {
            Some(quote @ ('"' | '\'')) => {
                let end = at + text_len(rest, quote);
                out.push_str(&tag[at..end]);
                at = end;
                let operator = at + blanks(&tag[at..]);
                let after = &tag[operator..];
                if after.starts_with('%') && !after.starts_with("%}") {
                    let begin = operator + 1;
                    let operand = &tag[begin..begin + operand_len(&tag[begin..])];
                    at = begin + operand.len();
                    out.push_str(&format!("|{PERCENT}({operand})"));
                }
                continue;
            }
            Some('{') => braces += 1,
            Some('}') => braces = braces.saturating_sub(1),
            _ => {}
        }
        let next = tag.len() - chars.as_str().len();
        out.push_str(&tag[at..next]);
        at = next;
    }
    tag.len()
}

fn blanks(text: &str) -> usize {
    text.len() - text.trim_start().len()
}

/// Length of a quoted text, quotes included.
fn text_len(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Length of the expression that an operator which binds like `*` has to its right: a value with
/// what is done to it by `.name`, `[…]`, `(…)` and `|filter`.
fn operand_len(text: &str) -> usize {
    let word = |at: usize| {
        let rest = &text[at..];
        rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
    };
    let mut at = blanks(text);
    if text[at..].starts_with(['-', '+']) {
        at += 1;
    }
    at += blanks(&text[at..]);
    at += match text[at..].chars().next() {
        Some(quote @ ('"' | '\'')) => text_len(&text[at..], quote),
        Some('(' | '[' | '{') => bracket_len(&text[at..]),
        _ => word(at),
    };
    loop {
        let next = at + blanks(&text[at..]);
        at = match text[next..].chars().next() {
            Some('(' | '[') => next + bracket_len(&text[next..]),
            Some('.' | '|') => {
                let name = next + 1 + blanks(&text[next + 1..]);
                name + word(name)
            }
            _ => return at,
        };
    }
}

/// Length of a bracket and what it holds.
fn bracket_len(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '"' | '\'' => {
                at += text_len(&text[at..], c);
                continue;
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += c.len_utf8();
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_spelled_otherwise_is_rewritten() {
        for (source, expected) in [
            ("a\r\nb\rc", "a\nb\nc"),
            ("{%- generation -%}x{%endgeneration%}", "{%- with -%}x{%endwith%}"),
            (
                "generation {{ generation }}{% if generation %}",
                "generation {{ generation }}{% if generation %}",
            ),
            ("{{ '%s' % x }}", "{{ '%s'|__percent( x) }}"),
            ("{{ \"%s\" % (a, ')') ~ 'b' }}", "{{ \"%s\"|__percent( (a, ')')) ~ 'b' }}"),
            ("{{ '%s'%x.y[0]|upper + 1 }}", "{{ '%s'|__percent(x.y[0]|upper) + 1 }}"),
            ("{% if x == '%}' % 2 %}", "{% if x == '%}'|__percent( 2) %}"),
            ("{% if x == 'y' %}'a' % b", "{% if x == 'y' %}'a' % b"),
            ("{# '%s' % x #}{{ 4 % 2 }}", "{# '%s' % x #}{{ 4 % 2 }}"),
            ("{% raw %}{{ '%s' % x }}{% endraw %}", "{% raw %}{{ '%s' % x }}{% endraw %}"),
            ("{{ {'a': {'b': 1}} }}{", "{{ {'a': {'b': 1}} }}{"),
            ("{{ 'never closed", "{{ 'never closed"),
            ("{{ 'é' % ('", "{{ 'é'|__percent( (')"),
            ("{% raw %} {% x", "{% raw %} {% x"),
            ("{# open", "{# open"),
        ] {
            assert_eq!(rewritten(source), expected, "{source}");
        }
    }
}
