//! A Jupyter notebook as gitingest shows it: a Python script.
//!
//! Errors are in the words of the Python exception that gitingest would have met and put into the
//! digest, for whatever shape the JSON has.

use std::collections::HashSet;

use super::json::{self, InvalidJson, PyType, Value};
use crate::digest::body::decode_error;

/// The script that a notebook holds, or what stands for it after `Error processing notebook: `.
/// `path` is from the repository's root; gitingest names its own temporary path there.
pub(in crate::digest) fn script(path: &str, bytes: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| decode_error(bytes, error))?;
    let notebook = json::parse(text).map_err(|invalid| match invalid {
        InvalidJson::Syntax => format!("InvalidJson JSON in notebook: {path}"),
        InvalidJson::Depth(kind) => {
            let kind = if kind == PyType::Dict { "object" } else { "array" };
            format!(
                "maximum recursion depth exceeded while decoding a JSON {kind} from a unicode string"
            )
        }
    })?;
    if notebook.kind() != PyType::Dict {
        let name = type_name(notebook);
        return Err(format!("'{name}' object has no attribute 'get'"));
    }

    let mut script = "# Jupyter notebook converted to Python script.".to_owned();
    match notebook.get("worksheets").filter(|value| value.is_truthy()) {
        Some(worksheets) => {
            if matches!(
                worksheets.kind(),
                PyType::Int | PyType::Float | PyType::Bool
            ) {
                let name = type_name(worksheets);
                return Err(format!("object of type '{name}' has no len()"));
            }
            each(worksheets, &mut |worksheet| {
                let cells = worksheet.index("cells")?;
                each(cells, &mut |cell| push_cell(cell, &mut script))
            })?;
        }
        None => {
            let cells = Element::Value(notebook).index("cells")?;
            each(cells, &mut |cell| push_cell(cell, &mut script))?;
        }
    }
    script.push('\n');
    Ok(script)
}

fn push_cell(cell: Element<'_>, script: &mut String) -> Result<(), String> {
    let cell_type = cell.index("cell_type")?;
    let name = shown(cell_type);
    let is_known = matches!(name.as_str(), "markdown" | "code" | "raw");
    if cell_type.kind() != PyType::Str || !is_known {
        return Err(format!("Unknown cell type: {name}"));
    }
    let source = joined(cell.index("source")?)?;
    if source.is_empty() {
        return Ok(());
    }
    script.push_str("\n\n");
    if name != "code" {
        script.push_str("\"\"\"\n");
        script.push_str(&source);
        script.push_str("\n\"\"\"");
        return Ok(());
    }
    script.push_str(&source);
    let outputs = cell.get("outputs").filter(|value| value.is_truthy());
    match outputs {
        Some(outputs) => push_outputs(outputs, script),
        None => Ok(()),
    }
}

fn push_outputs(outputs: Value<'_>, script: &mut String) -> Result<(), String> {
    script.push_str("\n# Output:\n#   ");
    let mut lines = 0;
    // Lines are joined when all outputs have been read, so this error comes last.
    let mut not_a_string = None;
    let mut push_line = |line: Element<'_>| {
        if lines > 0 {
            script.push_str("\n#   ");
        }
        match line.string() {
            Ok(text) => script.push_str(&text),
            Err(found) if not_a_string.is_none() => {
                not_a_string = Some(expected_string(lines, found));
            }
            Err(_) => {}
        }
        lines += 1;
        Ok(())
    };
    each(outputs, &mut |output| {
        let output_type = output.index("output_type")?;
        let name = shown(output_type);
        match name.as_str() {
            "stream" => each(output.index("text")?, &mut push_line),
            "execute_result" | "display_data" => {
                let data = Element::Value(output.index("data")?);
                each(data.index("text/plain")?, &mut push_line)
            }
            "error" => {
                let (ename, evalue) = (output.index("ename")?, output.index("evalue")?);
                let line = format!("Error: {}: {}", shown(ename), shown(evalue));
                push_line(Element::Text(&line))
            }
            _ => Err(format!("Unknown output type: {name}")),
        }
    })?;
    not_a_string.map_or(Ok(()), Err)
}

/// What a Python expression of the notebook's code yields.
#[derive(Clone, Copy)]
enum Element<'a> {
    Value(Value<'a>),
    /// A character of a string, or a key of a dict.
    Text(&'a str),
}

impl<'a> Element<'a> {
    /// `element[key]`
    fn index(self, key: &str) -> Result<Value<'a>, String> {
        match self {
            Self::Value(value) if value.kind() == PyType::Dict => {
                value.get(key).ok_or_else(|| format!("'{key}'"))
            }
            Self::Value(value) if value.kind() == PyType::List => {
                Err("list indices must be integers or slices, not str".to_owned())
            }
            Self::Value(value) if value.kind() != PyType::Str => {
                let name = type_name(value);
                Err(format!("'{name}' object is not subscriptable"))
            }
            Self::Value(_) | Self::Text(_) => {
                Err("string indices must be integers, not 'str'".to_owned())
            }
        }
    }

    /// `element.get(key)`, of what is known to be a dict.
    fn get(self, key: &str) -> Option<Value<'a>> {
        match self {
            Self::Value(value) => value.get(key),
            Self::Text(_) => None,
        }
    }

    /// The text of a string; the type's name of anything else.
    fn string(self) -> Result<String, &'static str> {
        match self {
            Self::Value(value) => value.string().ok_or_else(|| type_name(value)),
            Self::Text(text) => Ok(text.to_owned()),
        }
    }
}

/// `for element in value`
fn each(
    value: Value<'_>,
    visit: &mut dyn FnMut(Element<'_>) -> Result<(), String>,
) -> Result<(), String> {
    match value.kind() {
        PyType::List => value
            .items()
            .try_for_each(|item| visit(Element::Value(item))),
        PyType::Dict => {
            let mut seen = HashSet::new();
            for key in value.keys() {
                if seen.insert(key.clone()) {
                    visit(Element::Text(&key))?;
                }
            }
            Ok(())
        }
        PyType::Str => {
            let text = value.string().unwrap_or_default();
            let mut buffer = [0; 4];
            text.chars()
                .try_for_each(|c| visit(Element::Text(c.encode_utf8(&mut buffer))))
        }
        PyType::Int | PyType::Float | PyType::Bool | PyType::None => {
            let name = type_name(value);
            Err(format!("'{name}' object is not iterable"))
        }
    }
}

/// `"".join(value)`
fn joined(value: Value<'_>) -> Result<String, String> {
    if let Some(text) = value.string() {
        return Ok(text);
    }
    let mut text = String::new();
    let mut count = 0;
    let all = each(value, &mut |item| {
        let part = item.string();
        text.push_str(&part.map_err(|found| expected_string(count, found))?);
        count += 1;
        Ok(())
    });
    match value.kind() {
        PyType::List | PyType::Dict | PyType::Str => all.map(|()| text),
        PyType::Int | PyType::Float | PyType::Bool | PyType::None => {
            Err("can only join an iterable".to_owned())
        }
    }
}

fn expected_string(item: usize, found: &str) -> String {
    format!("sequence item {item}: expected str instance, {found} found")
}

/// `str(value)`, but for numbers, lists and dicts in the notebook's spelling, not Python's.
fn shown(value: Value<'_>) -> String {
    match value.kind() {
        PyType::Str => value.string().unwrap_or_default(),
        PyType::None => "None".to_owned(),
        PyType::Bool if value.is_truthy() => "True".to_owned(),
        PyType::Bool => "False".to_owned(),
        PyType::Dict | PyType::List | PyType::Int | PyType::Float => value.raw().to_owned(),
    }
}

fn type_name(value: Value<'_>) -> &'static str {
    match value.kind() {
        PyType::Dict => "dict",
        PyType::List => "list",
        PyType::Str => "str",
        PyType::Int => "int",
        PyType::Float => "float",
        PyType::Bool => "bool",
        PyType::None => "NoneType",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> String {
        script("d/n.ipynb", text.as_bytes()).unwrap_or_else(|error| format!("! {error}"))
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
            ("", "InvalidJson JSON in notebook: d/n.ipynb"),
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
        assert_eq!(
            script("n.ipynb", b"\xff").unwrap_err(),
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
        );
        assert!(
            of(&"[".repeat(5000)).contains("recursion depth exceeded while decoding a JSON array")
        );
    }
}
