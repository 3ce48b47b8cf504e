//! A notebook's JSON is what serde_json takes for JSON, and written again it makes the same script.

use serde::de::IgnoredAny;

use super::json::{InvalidJson, JsonValue, parse};
use super::script::script;

pub(in crate::digest) fn notebook(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let made = script("n.ipynb", &text);
    let (Ok(shown) | Err(shown)) = &made;
    // The longest escape is ten characters for one of four bytes.
    assert!(shown.len() <= 200 + 16 * text.len());
    // It checks the syntax alone: neither sizes of numbers, nor surrogates, nor depth.
    let is_json = serde_json::from_str::<IgnoredAny>(&text).is_ok();
    match parse(&text) {
        Ok(value) => {
            assert!(is_json || text.contains("NaN") || text.contains("Infinity"));
            let mut again = String::new();
            write(&value, &mut again);
            let value = parse(&again).expect("what was written is JSON");
            let mut same = String::new();
            write(&value, &mut same);
            assert_eq!(again, same);
            assert_eq!(script("n.ipynb", &again), made);
            compare(&text, &value);
        }
        Err(InvalidJson::Syntax) => assert!(!is_json),
        Err(InvalidJson::Depth(_)) => {}
    }
}

/// Writes a value as JSON.
fn write(value: &JsonValue<'_>, out: &mut String) {
    match value {
        JsonValue::Dict(members) => {
            out.push('{');
            for (at, (key, value)) in members.iter().enumerate() {
                out.push_str(if at == 0 { "" } else { "," });
                out.push_str(&serde_json::Value::from(&**key).to_string());
                out.push(':');
                write(value, out);
            }
            out.push('}');
        }
        JsonValue::List(items) => {
            out.push('[');
            for (at, value) in items.iter().enumerate() {
                out.push_str(if at == 0 { "" } else { "," });
                write(value, out);
            }
            out.push(']');
        }
        JsonValue::Str(text) => out.push_str(&serde_json::Value::from(&**text).to_string()),
        JsonValue::Int(digits) => out.push_str(digits),
        JsonValue::Float(number) if number.is_nan() => out.push_str("NaN"),
        JsonValue::Float(number) if number.is_infinite() => {
            out.push_str(if *number > 0.0 {
                "Infinity"
            } else {
                "-Infinity"
            });
        }
        JsonValue::Float(number) => out.push_str(&format!("{number:?}")),
        JsonValue::Bool(truth) => out.push_str(if *truth { "true" } else { "false" }),
        JsonValue::None => out.push_str("null"),
    }
}

/// Fails if serde_json reads another value.
fn compare(text: &str, value: &JsonValue<'_>) {
    if let Ok(other) = serde_json::from_str::<serde_json::Value>(text) {
        assert!(is_same(value, &other), "{value:?} is {other}");
    }
}

fn is_same(value: &JsonValue<'_>, other: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (value, other) {
        (JsonValue::Dict(members), Value::Object(others)) => {
            members.iter().all(|(key, _)| others.contains_key(&**key))
                && others
                    .iter()
                    .all(|(key, other)| value.get(key).is_some_and(|value| is_same(value, other)))
        }
        (JsonValue::List(items), Value::Array(others)) => {
            items.len() == others.len()
                && items
                    .iter()
                    .zip(others)
                    .all(|(item, other)| is_same(item, other))
        }
        (JsonValue::Str(text), Value::String(other)) => text == other,
        (JsonValue::Int(digits), Value::Number(other)) => {
            // Beyond 64 bits it is a float.
            *digits == other.to_string()
                || digits.parse().is_ok_and(|number| is_near(number, other))
        }
        (JsonValue::Float(number), Value::Number(other)) => is_near(*number, other),
        (JsonValue::Bool(truth), Value::Bool(other)) => truth == other,
        (JsonValue::None, Value::Null) => true,
        _ => false,
    }
}

/// Whether it is the same number, as far as serde_json reads it.
fn is_near(number: f64, other: &serde_json::Number) -> bool {
    let difference = other.as_f64().map(|other| (other - number).abs());
    difference.is_some_and(|difference| difference <= number.abs() * 1e-15)
}
