//! Numbers, durations, sizes and untrusted text, as people read and write them.

use std::error::Error;
use std::time::Duration;

use sha2::{Digest, Sha256};
use time::OffsetDateTime;

/// No duration that anybody means is longer: 100 years. Any time plus this is still a time.
const LONGEST: u64 = 36_500 * 24 * 3600;

/// Returns `part` of `whole` in percent, and 0 of nothing.
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    // Counts are far below 2^52, so nothing is lost.
    part as f64 * 100.0 / whole as f64
}

/// Prints `21000` as `21,000`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Returns the SHA-256 of `bytes`, hexadecimal.
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let digest = Sha256::digest(bytes.as_ref());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Prints a number with its noun: `1 entry`, `21,000 entries`.
pub fn counted(number: u64, one: &str, many: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        number => format!("{} {many}", thousands(number)),
    }
}

/// Prints `45s`, `1m 15s`, `5h 47m`, `3d 4h`: the two largest units, without zero ones. Days begin
/// with the second.
pub fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (large, small) = match seconds {
        0..60 => return format!("{seconds}s"),
        60..3600 => ((seconds / 60, "m"), (seconds % 60, "s")),
        3600..172_800 => ((seconds / 3600, "h"), (seconds % 3600 / 60, "m")),
        _ => ((seconds / 86_400, "d"), (seconds % 86_400 / 3600, "h")),
    };
    match small {
        (0, _) => format!("{}{}", large.0, large.1),
        (n, unit) => format!("{}{} {n}{unit}", large.0, large.1),
    }
}

/// Parses `90s`, `15m`, `2h`, `3d`, what [`format_duration`] prints, or a bare number of seconds.
///
/// # Errors
/// Says how a duration is written.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let invalid = || "expected a number and s, m, h or d, such as 90s, 15m, 2h or 3d".to_owned();
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, unit) = rest.split_at(digits.unwrap_or(rest.len()));
        let mut after = unit.chars();
        let factor = match after.next() {
            None if rest == text => 1.0,
            Some('s') => 1.0,
            Some('m') => 60.0,
            Some('h') => 3600.0,
            Some('d') => 86_400.0,
            _ => return Err(invalid()),
        };
        seconds += number.parse::<f64>().map_err(|_| invalid())? * factor;
        rest = after.as_str().trim_start();
    }
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| duration.as_secs() <= LONGEST)
        .ok_or_else(invalid)
}

/// Returns a parser of durations from `least` to `most`, for an option.
///
/// # Panics
/// If the bounds are not durations themselves.
pub fn duration_within(
    least: &'static str,
    most: &'static str,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    let [shortest, longest] = [least, most].map(|text| parse_duration(text).expect("a duration"));
    move |text| {
        let duration = parse_duration(text)?;
        if !(shortest..=longest).contains(&duration) {
            return Err(format!("expected {least} to {most}"));
        }
        Ok(duration)
    }
}

/// As [`duration_within`], in whole seconds.
pub fn seconds_within(
    least: &'static str,
    most: &'static str,
) -> impl Fn(&str) -> Result<u64, String> + Clone + Send + Sync + 'static {
    let parse = duration_within(least, most);
    move |text| parse(text).map(|duration| duration.as_secs())
}

/// Returns a time in milliseconds of Unix time.
pub fn unix_millis(time: OffsetDateTime) -> i64 {
    let millis = time.unix_timestamp_nanos() / 1_000_000;
    i64::try_from(millis).expect("years have at most six digits")
}

/// Parses `512KiB`, `1GiB`, `500MB`, or a bare number of bytes. Letter case does not matter.
///
/// # Errors
/// Says how a size is written.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let invalid =
        || "expected bytes, or a number and a unit, such as 512KiB, 1GiB or 500MB".to_owned();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" | "bytes" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(invalid()),
    };
    let number: u64 = number.parse().map_err(|_| invalid())?;
    number.checked_mul(factor).ok_or_else(invalid)
}

/// Says why `value`, of the variable or option `name`, cannot be meant as it stands. Never repeats it.
pub fn unsubstituted(name: &str, value: &str) -> Option<String> {
    let (_, rest) = value.split_once("${")?;
    rest.contains('}').then(|| {
        format!(
            "{name} is a literal ${{…}}: Docker does not substitute variables in env files; write the \
             value itself there, or pass the variable on by its name alone"
        )
    })
}

/// Escapes control characters. Parts of messages come from strangers, and must neither break a line
/// nor control a terminal.
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
    }
    printable
}

/// Returns the innermost cause of an error, which says why, where those around it say what.
pub fn innermost(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_printed_in_two_units() {
        for (seconds, expected) in [
            (0, "0s"),
            (45, "45s"),
            (60, "1m"),
            (75, "1m 15s"),
            (3599, "59m 59s"),
            (3600, "1h"),
            (20_820, "5h 47m"),
            (90_061, "25h 1m"),
            (259_200, "3d"),
            (276_000, "3d 4h"),
        ] {
            assert_eq!(format_duration(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn durations_are_numbers_with_units_or_bare_seconds() {
        for (text, seconds) in [
            ("90s", 90.0),
            ("15m", 900.0),
            ("2h", 7200.0),
            ("3d", 259_200.0),
            ("0d", 0.0),
            ("0", 0.0),
            ("300", 300.0),
            ("0.5", 0.5),
            ("1.5h", 5400.0),
            ("1m 15s", 75.0),
            ("5h47m", 20_820.0),
        ] {
            let parsed = parse_duration(text).map(|d| d.as_secs_f64());
            assert_eq!(parsed, Ok(seconds), "{text}");
        }
        for text in [
            "",
            " ",
            "s",
            "-3d",
            "+3d",
            "-1",
            "3 d",
            "3w",
            "3ä",
            "ä",
            "h2",
            "1e3",
            "NaN",
            "inf",
            "9999999999d",
            "3dd",
            "3d4w",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
        let minute = duration_within("1s", "1m");
        assert_eq!(minute("1m"), Ok(Duration::from_secs(60)));
        for text in ["0.9", "61"] {
            assert_eq!(minute(text).unwrap_err(), "expected 1s to 1m");
        }
    }

    #[test]
    fn sizes_are_numbers_with_units_or_bare_bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("1023", 1023),
            ("512KiB", 512 << 10),
            ("1536 kib", 1536 << 10),
            ("1GiB", 1 << 30),
            ("1gb", 1_000_000_000),
            ("8192TiB", 8192 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "KiB",
            "-1",
            "1.5GiB",
            "1x",
            "1ä",
            "99999999TiB",
            "99999999999999999999",
        ] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn numbers_have_commas() {
        for (number, expected) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(thousands(number), expected);
        }
    }
}
