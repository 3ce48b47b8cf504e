//! Numbers and durations for people.

use std::time::Duration;

/// `part` of `whole` in percent; 0 of nothing.
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    // Counts are far below 2^52, so nothing is lost.
    part as f64 * 100.0 / whole as f64
}

/// `21000` as `21,000`.
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

/// `45s`, `1m 15s`, `15m`, `5h 47m`: the two largest units, zero ones left out.
pub fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (large, small) = match seconds {
        0..60 => return format!("{seconds}s"),
        60..3600 => ((seconds / 60, "m"), (seconds % 60, "s")),
        _ => ((seconds / 3600, "h"), (seconds % 3600 / 60, "m")),
    };
    match small {
        (0, _) => format!("{}{}", large.0, large.1),
        (n, unit) => format!("{}{} {n}{unit}", large.0, large.1),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_durations() {
        for (seconds, expected) in [
            (0, "0s"),
            (45, "45s"),
            (60, "1m"),
            (75, "1m 15s"),
            (3599, "59m 59s"),
            (3600, "1h"),
            (20_820, "5h 47m"),
            (90_061, "25h 1m"),
        ] {
            assert_eq!(format_duration(Duration::from_secs(seconds)), expected);
        }
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
