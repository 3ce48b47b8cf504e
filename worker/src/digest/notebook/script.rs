//! A notebook as gitingest shows it: a Python script.
//!
//! Errors carry the message of the Python exception that gitingest meets and shows, whatever the
//! JSON holds.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::json::{self, InvalidJson, JsonValue};

type Visit<'a> = &'a mut dyn FnMut(&JsonValue<'_>) -> Result<(), String>;

/// Returns the script that a notebook holds, or what gitingest shows after
/// `Error processing notebook: `. `path` is relative to the repository's root; gitingest names its
/// own temporary path instead.
pub(in crate::digest) fn script(path: &str, text: &str) -> Result<String, String> {
    let notebook = json::parse(text).map_err(|invalid| match invalid {
        InvalidJson::Syntax => format!("Invalid JSON in notebook: {path}"),
        InvalidJson::Depth(kind) => format!(
            "maximum recursion depth exceeded while decoding a JSON {kind} from a unicode string"
        ),
    })?;
    if !matches!(notebook, JsonValue::Dict(_)) {
        let name = notebook.type_name();
        return Err(format!("'{name}' object has no attribute 'get'"));
    }

    let mut script = "# Jupyter notebook converted to Python script.".to_owned();
    let mut push_cells = |sheet: &JsonValue<'_>| {
        each(index(sheet, "cells")?, &mut |cell| {
            push_cell(cell, &mut script)
        })
    };
    match notebook.get("worksheets").filter(|value| value.is_truthy()) {
        Some(number @ (JsonValue::Int(_) | JsonValue::Float(_) | JsonValue::Bool(_))) => {
            let name = number.type_name();
            return Err(format!("object of type '{name}' has no len()"));
        }
        Some(worksheets) => {
            // gitingest collects the cells of all worksheets before it reads one.
            each(worksheets, &mut |sheet| {
                each(index(sheet, "cells")?, &mut |_| Ok(()))
            })?;
            each(worksheets, &mut push_cells)?;
        }
        None => push_cells(&notebook)?,
    }
    script.push('\n');
    Ok(script)
}

fn push_cell(cell: &JsonValue<'_>, script: &mut String) -> Result<(), String> {
    let cell_type = match index(cell, "cell_type")? {
        JsonValue::Str(name) if matches!(&**name, "markdown" | "code" | "raw") => name,
        other => return Err(format!("Unknown cell type: {}", shown(other))),
    };
    let source = joined(index(cell, "source")?)?;
    if source.is_empty() {
        return Ok(());
    }
    script.push_str("\n\n");
    if cell_type != "code" {
        script.push_str(&format!("\"\"\"\n{source}\n\"\"\""));
        return Ok(());
    }
    script.push_str(&source);
    match cell.get("outputs").filter(|value| value.is_truthy()) {
        Some(outputs) => push_outputs(outputs, script),
        None => Ok(()),
    }
}

fn push_outputs(outputs: &JsonValue<'_>, script: &mut String) -> Result<(), String> {
    script.push_str("\n# Output:\n#   ");
    let mut lines = 0;
    // Lines are joined when all outputs have been read: this error comes last.
    let mut not_a_string = None;
    let mut push_line = |line: &JsonValue<'_>| {
        if lines > 0 {
            script.push_str("\n#   ");
        }
        match line {
            JsonValue::Str(text) => script.push_str(text),
            other => {
                not_a_string.get_or_insert_with(|| expected_string(lines, other));
            }
        }
        lines += 1;
        Ok(())
    };
    each(outputs, &mut |output| {
        let output_type = shown(index(output, "output_type")?);
        match &*output_type {
            "stream" => each(index(output, "text")?, &mut push_line),
            "execute_result" | "display_data" => {
                let data = index(output, "data")?;
                each(index(data, "text/plain")?, &mut push_line)
            }
            "error" => {
                let name = shown(index(output, "ename")?);
                let value = shown(index(output, "evalue")?);
                push_line(&JsonValue::Str(format!("Error: {name}: {value}").into()))
            }
            unknown => Err(format!("Unknown output type: {unknown}")),
        }
    })?;
    not_a_string.map_or(Ok(()), Err)
}

/// `value[key]`
fn index<'v, 'a>(value: &'v JsonValue<'a>, key: &str) -> Result<&'v JsonValue<'a>, String> {
    match value {
        JsonValue::Dict(_) => value.get(key).ok_or_else(|| format!("'{key}'")),
        JsonValue::List(_) => Err("list indices must be integers or slices, not str".to_owned()),
        JsonValue::Str(_) => Err("string indices must be integers, not 'str'".to_owned()),
        other => Err(format!(
            "'{}' object is not subscriptable",
            other.type_name()
        )),
    }
}

/// `for element in value`
fn each(value: &JsonValue<'_>, visit: Visit<'_>) -> Result<(), String> {
    match value {
        JsonValue::List(items) => items.iter().try_for_each(visit),
        JsonValue::Dict(members) => {
            let mut seen = HashSet::new();
            let mut keys = members.iter().map(|(key, _)| &**key);
            keys.try_for_each(|key| match seen.insert(key) {
                true => visit(&JsonValue::Str(key.into())),
                false => Ok(()),
            })
        }
        JsonValue::Str(text) => text
            .chars()
            .try_for_each(|c| visit(&JsonValue::Str(String::from(c).into()))),
        other => Err(format!("'{}' object is not iterable", other.type_name())),
    }
}

/// `"".join(value)`
fn joined<'v>(value: &'v JsonValue<'_>) -> Result<Cow<'v, str>, String> {
    match value {
        JsonValue::Str(text) => return Ok(text.as_ref().into()),
        JsonValue::List(_) | JsonValue::Dict(_) => {}
        _ => return Err("can only join an iterable".to_owned()),
    }
    let mut text = String::new();
    let mut count = 0;
    each(value, &mut |item| {
        let JsonValue::Str(part) = item else {
            return Err(expected_string(count, item));
        };
        text.push_str(part);
        count += 1;
        Ok(())
    })?;
    Ok(text.into())
}

fn expected_string(item: usize, found: &JsonValue<'_>) -> String {
    let found = found.type_name();
    format!("sequence item {item}: expected str instance, {found} found")
}

/// `str(value)`
fn shown<'v>(value: &'v JsonValue<'_>) -> Cow<'v, str> {
    if let JsonValue::Str(text) = value {
        return text.as_ref().into();
    }
    let mut text = String::new();
    push_repr(value, &mut text);
    text.into()
}

/// Appends `repr(value)`.
fn push_repr(value: &JsonValue<'_>, out: &mut String) {
    match value {
        JsonValue::Dict(members) => {
            let last: HashMap<_, _> = members.iter().map(|(key, value)| (key, value)).collect();
            let mut seen = HashSet::new();
            out.push('{');
            for (key, _) in members.iter().filter(|(key, _)| seen.insert(key)) {
                out.push_str(if out.ends_with('{') { "" } else { ", " });
                push_str_repr(key, out);
                out.push_str(": ");
                push_repr(last[key], out);
            }
            out.push('}');
        }
        JsonValue::List(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                push_repr(item, out);
            }
            out.push(']');
        }
        JsonValue::Str(text) => push_str_repr(text, out),
        JsonValue::Int("-0") => out.push('0'),
        JsonValue::Int(digits) => out.push_str(digits),
        JsonValue::Float(number) => out.push_str(&float_repr(*number)),
        JsonValue::Bool(true) => out.push_str("True"),
        JsonValue::Bool(false) => out.push_str("False"),
        JsonValue::None => out.push_str("None"),
    }
}

fn push_str_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        let code = u32::from(c);
        // Unicode's printable characters are those that Rust does not escape, inside of a text.
        let is_printable = !format!("a{c}").escape_debug().any(|c| c == '{');
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            '{' | ' ' => out.push(c),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable && c != '\0' => out.push(c),
            _ if code < 0x100 => out.push_str(&format!("\\x{code:02x}")),
            _ if code < 0x10000 => out.push_str(&format!("\\u{code:04x}")),
            _ => out.push_str(&format!("\\U{code:08x}")),
        }
    }
    out.push(quote);
}

/// Rust and Python take the same digits and turn to exponents at the same sizes.
fn float_repr(number: f64) -> String {
    let text = format!("{number:?}").to_lowercase();
    match text.split_once('e') {
        Some((digits, exponent)) if exponent.starts_with('-') => {
            format!("{digits}e-{:0>2}", &exponent[1..])
        }
        Some((digits, exponent)) => format!("{digits}e+{exponent:0>2}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> String {
        script("d/n.ipynb", text).unwrap_or_else(|error| format!("! {error}"))
    }

    #[test]
    fn cells_become_a_script() {
        let text = r##"{"cells":[
            {"cell_type":"markdown","source":["# T\n","x"]},
            {"cell_type":"code","source":"","outputs":[1]},
            {"cell_type":"raw","source":"r"},
            {"cell_type":"code","source":"a = 1","outputs":[
                {"output_type":"stream","text":["one\n","two"]},
                {"output_type":"display_data","data":{"text/plain":"ab"}},
                {"output_type":"error","ename":"E","evalue":"v","traceback":[NaN]}]}]}"##;
        assert_eq!(
            of(text),
            "# Jupyter notebook converted to Python script.\n\n\"\"\"\n# T\nx\n\"\"\"\n\n\"\"\"\nr\n\
             \"\"\"\n\na = 1\n# Output:\n#   one\n\n#   two\n#   a\n#   b\n#   Error: E: v\n"
        );
        assert_eq!(
            of("{\"cells\":[]}"),
            "# Jupyter notebook converted to Python script.\n"
        );
    }

    #[test]
    fn worksheets_win_over_cells_unless_empty() {
        let sheet = r#"{"worksheets":[{"cells":[{"cell_type":"raw","source":"w"}]}],"cells":[]}"#;
        assert!(of(sheet).contains("\nw\n"));
        let none = r#"{"worksheets":[],"cells":[{"cell_type":"raw","source":"c"}]}"#;
        assert!(of(none).contains("\nc\n"));
    }

    /// Each expectation is what gitingest 0.3.1 printed on Python 3.11.
    #[test]
    fn errors_are_pythons() {
        for (text, expected) in [
            ("", "Invalid JSON in notebook: d/n.ipynb"),
            ("[]", "'list' object has no attribute 'get'"),
            ("null", "'NoneType' object has no attribute 'get'"),
            ("1.5", "'float' object has no attribute 'get'"),
            ("{}", "'cells'"),
            (r#"{"cells":3}"#, "'int' object is not iterable"),
            (
                r#"{"cells":[[]]}"#,
                "list indices must be integers or slices, not str",
            ),
            (
                r#"{"cells":"a"}"#,
                "string indices must be integers, not 'str'",
            ),
            (
                r#"{"cells":[null]}"#,
                "'NoneType' object is not subscriptable",
            ),
            (r#"{"cells":[{}]}"#, "'cell_type'"),
            (r#"{"cells":[{"cell_type":"x"}]}"#, "Unknown cell type: x"),
            (
                r#"{"cells":[{"cell_type":null}]}"#,
                "Unknown cell type: None",
            ),
            (r#"{"cells":[{"cell_type":"raw"}]}"#, "'source'"),
            (
                r#"{"cells":[{"cell_type":"raw","source":["a",1]}]}"#,
                "sequence item 1: expected str instance, int found",
            ),
            (
                r#"{"cells":[{"cell_type":"raw","source":1}]}"#,
                "can only join an iterable",
            ),
            (r#"{"worksheets":1}"#, "object of type 'int' has no len()"),
            (r#"{"worksheets":[{}]}"#, "'cells'"),
            (
                r#"{"worksheets":[{"cells":[{}]},{"cells":1}]}"#,
                "'int' object is not iterable",
            ),
            (
                r#"{"cells":[{"cell_type":"code","source":"a","outputs":[{"output_type":"q"}]}]}"#,
                "Unknown output type: q",
            ),
            (
                r#"{"cells":[{"cell_type":"code","source":"a","outputs":[
                    {"output_type":"execute_result","data":{}}]}]}"#,
                "'text/plain'",
            ),
            (
                r#"{"cells":[{"cell_type":"code","source":"a","outputs":[
                    {"output_type":"stream","text":["a",null]}]}]}"#,
                "sequence item 1: expected str instance, NoneType found",
            ),
        ] {
            assert_eq!(of(text), format!("! {expected}"), "{text}");
        }
        assert!(
            of(&"[".repeat(5000)).contains("recursion depth exceeded while decoding a JSON array")
        );
    }

    /// Each expectation is what Python 3.11 prints.
    #[test]
    fn what_is_no_string_is_shown_as_python_shows_it() {
        for (value, expected) in [
            (
                r#"{"a": [1, -0, 1.50, 1e16, 1e-7, -1E+100, NaN, -Infinity]}"#,
                "{'a': [1, 0, 1.5, 1e+16, 1e-07, -1e+100, nan, -inf]}",
            ),
            (
                r#"{"a": 1, "b": {}, "a": [null, true, false, []]}"#,
                "{'a': [None, True, False, []], 'b': {}}",
            ),
            (
                r#"["it's", "\"", "'\"", "{\\\n\u0001é\u0301日\u00a0\u200b\ud83d\ude00\udbff\udfff"]"#,
                "[\"it's\", '\"', '\\'\"', '{\\\\\\n\\x01é\u{301}日\\xa0\\u200b😀\\U0010ffff']",
            ),
            (
                "123456789012345678901234567890",
                "123456789012345678901234567890",
            ),
        ] {
            let text = format!(
                r#"{{"cells":[{{"cell_type":"code","source":"a","outputs":[
                    {{"output_type":"error","ename":{value},"evalue":0.1}}]}}]}}"#
            );
            let line = format!("#   Error: {expected}: 0.1\n");
            assert!(of(&text).ends_with(&line), "{}", of(&text));
        }
    }
}
