//! Times as people write them: `30s`, `500ms`, `2m`, `1.5h`, `30d`.

use std::{fmt, str::FromStr, time::Duration};

/// Nanoseconds since 1970.
pub(crate) fn nanos() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(pub Duration);

const UNITS: [(&str, f64); 5] =
    [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)];
/// Longer than anybody waits, and short of what clocks can add.
const SECONDS_MAX: f64 = 100.0 * 365.0 * 86_400.0;

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no time; 30s, 500ms, 2m, 1h or 7d is expected");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim());
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let factor = match UNITS.iter().find(|(name, _)| *name == unit) {
            Some((_, factor)) => *factor,
            None if number == 0.0 && unit.is_empty() => 1.0,
            None => return Err(wrong()),
        };
        let seconds = number * factor;
        if seconds > SECONDS_MAX {
            return Err(wrong());
        }
        Ok(Self(Duration::from_secs_f64(seconds)))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        let units = UNITS.iter().rev().find(|(_, unit)| seconds >= *unit);
        let (name, unit) = units.unwrap_or(&UNITS[1]);
        write!(f, "{}{name}", seconds / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_shown_as_people_write_them() {
        for (text, millis, shown) in [
            ("0", 0, "0s"),
            ("500ms", 500, "500ms"),
            ("30s", 30_000, "30s"),
            ("1.5 m", 90_000, "1.5m"),
            ("2h", 7_200_000, "2h"),
            ("7d", 604_800_000, "7d"),
        ] {
            let time: Time = text.parse().unwrap();
            assert_eq!(time.0, Duration::from_millis(millis), "{text}");
            assert_eq!(time.to_string(), shown, "{text}");
        }
        for text in ["", "s", "12", "3 weeks", "-1s", "1e3s", "1.2.3s", "99999999d"] {
            assert!(text.parse::<Time>().is_err(), "{text}");
        }
    }
}
