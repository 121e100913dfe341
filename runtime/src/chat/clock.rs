//! A point in time as text, by the specifiers of C's `strftime` in the C locale. All of it is UTC.

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAY_SECONDS: i64 = 86_400;

/// Year, month from 1, day from 1 of a day that is counted from 1970-01-01 (Gregorian, for ever).
fn civil(days: i64) -> (i64, i64, i64) {
    // Years begin in March here, so that the leap day comes last.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

/// Formats a time. Fails with the first specifier that is not known.
pub(super) fn strftime(unix_time: i64, format: &str) -> Result<String, String> {
    let (days, second) = (unix_time.div_euclid(DAY_SECONDS), unix_time.rem_euclid(DAY_SECONDS));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
    let day_of_year = before + day + i64::from(leap && month > 2);
    let weekday = (days + 4).rem_euclid(7);
    let (day_name, month_name) = (DAYS[weekday as usize], MONTHS[month as usize - 1]);
    let hour_of_12 = (hour + 11) % 12 + 1;
    let half = if hour < 12 { "AM" } else { "PM" };

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut specifier = chars.next().ok_or_else(String::new)?;
        // GNU's flag: no padding.
        let bare = specifier == '-';
        if bare {
            specifier = chars.next().ok_or_else(|| "-".to_owned())?;
        }
        let number = |value: i64, width: usize| match bare {
            true => value.to_string(),
            false => format!("{value:0width$}"),
        };
        let blank = |value: i64| if bare { value.to_string() } else { format!("{value:2}") };
        let nested = |format| strftime(unix_time, format);
        out.push_str(&match specifier {
            'Y' => year.to_string(),
            'C' => number(year.div_euclid(100), 2),
            'y' => number(year.rem_euclid(100), 2),
            'm' => number(month, 2),
            'd' => number(day, 2),
            'e' => blank(day),
            'j' => number(day_of_year, 3),
            'H' => number(hour, 2),
            'I' => number(hour_of_12, 2),
            'k' => blank(hour),
            'l' => blank(hour_of_12),
            'M' => number(minute, 2),
            'S' => number(second, 2),
            // Python's; there are no parts of a second here.
            'f' => "000000".into(),
            's' => unix_time.to_string(),
            'u' => (if weekday == 0 { 7 } else { weekday }).to_string(),
            'w' => weekday.to_string(),
            'U' => number((day_of_year + 6 - weekday) / 7, 2),
            'W' => number((day_of_year + 6 - (weekday + 6) % 7) / 7, 2),
            'A' => day_name.into(),
            'a' => day_name[..3].into(),
            'B' => month_name.into(),
            'b' | 'h' => month_name[..3].into(),
            'p' => half.into(),
            'P' => half.to_lowercase(),
            'F' => nested("%Y-%m-%d")?,
            'T' | 'X' => nested("%H:%M:%S")?,
            'R' => nested("%H:%M")?,
            'r' => nested("%I:%M:%S %p")?,
            'D' | 'x' => nested("%m/%d/%y")?,
            'c' => nested("%a %b %e %H:%M:%S %Y")?,
            // The clock of Python's templates knows no zone.
            'z' | 'Z' => String::new(),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            unknown => return Err(unknown.to_string()),
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected texts are those of Python's `datetime.strftime`.
    #[test]
    fn times_are_those_of_python() {
        for (time, text) in [
            (0, "1970-01-01 00:00:00 Thu Thursday Jan January 001 12 AM 70 4 00 00"),
            (951_782_399, "2000-02-28 23:59:59 Mon Monday Feb February 059 11 PM 00 1 09 09"),
            (951_868_800, "2000-03-01 00:00:00 Wed Wednesday Mar March 061 12 AM 00 3 09 09"),
            (1_764_072_000, "2025-11-25 12:00:00 Tue Tuesday Nov November 329 12 PM 25 2 47 47"),
            (4_107_542_399, "2100-02-28 23:59:59 Sun Sunday Feb February 059 11 PM 00 0 09 08"),
            (-1, "1969-12-31 23:59:59 Wed Wednesday Dec December 365 11 PM 69 3 52 52"),
        ] {
            let found = strftime(time, "%Y-%m-%d %H:%M:%S %a %A %b %B %j %I %p %y %w %U %W");
            assert_eq!(found.as_deref(), Ok(text));
        }
        assert_eq!(
            strftime(950_000_000, "%-d/%-m, %e|%F %T%%").unwrap(),
            "8/2,  8|2000-02-08 08:53:20%"
        );
        assert_eq!(strftime(0, "%Q"), Err("Q".into()));
        assert_eq!(strftime(0, "%"), Err(String::new()));
    }
}
