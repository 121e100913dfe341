//! Lengths of time as people write them: `30s`, `12h`, `30d`.

use std::{fmt, str::FromStr, time::Duration};

/// A length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period(pub Duration);

/// Units, the largest first, in milliseconds.
const UNITS: [(&str, u64); 6] = [
    ("w", 604_800_000),
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1000),
    ("ms", 1),
];

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no length of time; 30s, 15m, 12h, 30d or 0 is expected");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim());
        let number: u64 = number.parse().map_err(|_| wrong())?;
        if number == 0 && unit.is_empty() {
            return Ok(Self(Duration::ZERO));
        }
        let (_, millis) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        number.checked_mul(*millis).map(Duration::from_millis).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        let whole = |unit: u64| millis >= u128::from(unit) && millis.is_multiple_of(unit.into());
        match UNITS.iter().find(|(_, unit)| whole(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", millis / u128::from(*unit)),
            None => f.write_str("0"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_read_and_shown_as_people_write_them() {
        for (text, seconds) in
            [("0", 0), ("30s", 30), ("15m", 900), ("12h", 43_200), ("2w", 1_209_600)]
        {
            let period: Period = text.parse().unwrap();
            assert_eq!(period, Period(Duration::from_secs(seconds)));
            assert_eq!(period.to_string(), text);
        }
        assert_eq!("90s".parse::<Period>().unwrap().to_string(), "90s");
        assert_eq!("1500ms".parse::<Period>().unwrap().0, Duration::from_millis(1500));
        for text in [
            "",
            "s",
            "30",
            "1.5h",
            "-1s",
            "3 parsecs",
            "99999999999999999999s",
            "9999999999999999d",
        ] {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
    }
}
