//! W3C trace context, carried by every message so that one job is one trace.

use std::{fmt, str::FromStr};

use rkyv::{Archive, Deserialize, Serialize};

/// Which span a message belongs to. All zero means that nothing is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The parent span.
    pub span_id: [u8; 8],
    /// W3C flags; bit 0 is "sampled".
    pub flags: u8,
}

/// A `traceparent` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} is no traceparent: 00-<32 hex digits>-<16 hex digits>-<2 hex digits> is expected"
)]
pub struct BadTraceparent {
    found: String,
}

impl TraceContext {
    /// Whether a trace and a span are named.
    pub fn is_valid(&self) -> bool {
        self.trace_id != [0; 16] && self.span_id != [0; 8]
    }

    /// Whether the trace is recorded.
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }
}

impl ArchivedTraceContext {
    /// The context, by value.
    pub fn to_native(&self) -> TraceContext {
        TraceContext { trace_id: self.trace_id, span_id: self.span_id, flags: self.flags }
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        };
        f.write_str("00-")?;
        hex(f, &self.trace_id)?;
        f.write_str("-")?;
        hex(f, &self.span_id)?;
        write!(f, "-{:02x}", self.flags)
    }
}

impl FromStr for TraceContext {
    type Err = BadTraceparent;

    fn from_str(text: &str) -> Result<Self, BadTraceparent> {
        let bad = || BadTraceparent { found: text.chars().take(80).collect() };
        let parts: Vec<&str> = text.split('-').collect();
        // A later version may append fields; version ff is forbidden by the standard.
        let [version, trace, span, flags, rest @ ..] = parts.as_slice() else { return Err(bad()) };
        let mut first = [0; 1];
        hex_into(version, &mut first).ok_or_else(bad)?;
        if first[0] == 0xff || (first[0] == 0 && !rest.is_empty()) {
            return Err(bad());
        }
        let mut context = TraceContext::default();
        hex_into(trace, &mut context.trace_id).ok_or_else(bad)?;
        hex_into(span, &mut context.span_id).ok_or_else(bad)?;
        let mut last = [0; 1];
        hex_into(flags, &mut last).ok_or_else(bad)?;
        context.flags = last[0];
        if context.is_valid() { Ok(context) } else { Err(bad()) }
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads exactly `out.len()` bytes written as lower-case hexadecimal digits.
pub(crate) fn hex_into(text: &str, out: &mut [u8]) -> Option<()> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * out.len() {
        return None;
    }
    for (pair, byte) in text.as_bytes().chunks_exact(2).zip(out) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_reads_back_what_it_prints_and_nothing_else() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context: TraceContext = text.parse().unwrap();
        assert_eq!(context.to_string(), text);
        assert!(context.is_sampled());
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-é-00f067aa0ba902b7-01",
        ] {
            assert!(bad.parse::<TraceContext>().is_err(), "{bad}");
        }
    }
}
