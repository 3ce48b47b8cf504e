//! JSON as Python's `json` module takes it, looked at in place.
//!
//! Python writes and reads `NaN` and `Infinity`, takes the last of equal keys, nests close to a
//! thousand levels deep and keeps lone surrogates; notebooks in the wild use the first of these. A
//! document is checked once, without recursion, and then looked at where it lies: nothing is
//! built, so a hostile one costs no more memory than its text.

/// How deep Python's decoder goes before it raises `RecursionError`. The exact figure depends on
/// how deep the caller is; this is what is left inside gitingest on Python 3.11 for a file in the root.
const MAX_DEPTH: usize = 974;

/// A value inside a checked document: its text from its first character on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value<'a> {
    text: &'a str,
}

/// What kind of value it is, by the name of Python's type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PyType {
    Dict,
    List,
    Str,
    Int,
    Float,
    Bool,
    None,
}

/// Why a text is not a document.
#[derive(Debug, PartialEq)]
pub(super) enum InvalidJson {
    /// It breaks JSON's grammar.
    Syntax,
    /// It nests too deeply; the innermost value is of this kind.
    Depth(PyType),
}

/// Checks a whole text.
pub(super) fn parse(text: &str) -> Result<Value<'_>, InvalidJson> {
    let start = skip_space(text);
    let end = skip_value(start)?;
    if skip_space(end).is_empty() {
        Ok(Value { text: start })
    } else {
        Err(InvalidJson::Syntax)
    }
}

impl<'a> Value<'a> {
    pub(super) fn kind(self) -> PyType {
        match self.text.as_bytes().first() {
            Some(b'{') => PyType::Dict,
            Some(b'[') => PyType::List,
            Some(b'"') => PyType::Str,
            Some(b't' | b'f') => PyType::Bool,
            Some(b'n') | None => PyType::None,
            Some(b'N' | b'I') => PyType::Float,
            Some(_) => {
                let number = self.raw();
                let float = number.contains(['.', 'e', 'E', 'I']);
                if float { PyType::Float } else { PyType::Int }
            }
        }
    }

    /// Its text as it stands in the document.
    pub(super) fn raw(self) -> &'a str {
        let rest = skip_value(self.text).unwrap_or_default();
        &self.text[..self.text.len() - rest.len()]
    }

    /// Python's truth: whether it is neither empty, zero, false nor null.
    pub(super) fn is_truthy(self) -> bool {
        match self.kind() {
            PyType::Dict | PyType::List => !skip_space(&self.text[1..]).starts_with(['}', ']']),
            PyType::Str => !self.text.starts_with("\"\""),
            PyType::Int | PyType::Float => {
                let mantissa = self.raw().split(['e', 'E']).next().unwrap_or_default();
                mantissa.contains(|c: char| ('1'..='9').contains(&c) || c == 'I' || c == 'N')
            }
            PyType::Bool => self.text.starts_with('t'),
            PyType::None => false,
        }
    }

    /// The text of a string.
    pub(super) fn string(self) -> Option<String> {
        (self.kind() == PyType::Str).then(|| unescaped(self.raw()))
    }

    /// The last member of an object with this key.
    pub(super) fn get(self, key: &str) -> Option<Self> {
        let members = self.members();
        members
            .filter(|(name, _)| unescaped(name) == key)
            .last()
            .map(|(_, value)| value)
    }

    /// The members of an object: key with its quotes, value.
    fn members(self) -> impl Iterator<Item = (&'a str, Self)> {
        let mut rest = self.inside('{');
        std::iter::from_fn(move || {
            if !rest.starts_with('"') {
                return None;
            }
            let after_key = skip_string(rest)?;
            let key = &rest[..rest.len() - after_key.len()];
            let colon = skip_space(after_key);
            let value = skip_space(colon.strip_prefix(':')?);
            rest = next_item(value)?;
            Some((key, Self { text: value }))
        })
    }

    /// The keys of an object.
    pub(super) fn keys(self) -> impl Iterator<Item = String> {
        self.members().map(|(key, _)| unescaped(key))
    }

    /// The items of an array.
    pub(super) fn items(self) -> impl Iterator<Item = Self> {
        let mut rest = self.inside('[');
        std::iter::from_fn(move || {
            if rest.is_empty() || rest.starts_with(']') {
                return None;
            }
            let value = rest;
            rest = next_item(value)?;
            Some(Self { text: value })
        })
    }

    fn inside(self, bracket: char) -> &'a str {
        skip_space(self.text.strip_prefix(bracket).unwrap_or_default())
    }
}

/// What follows the value that `text` begins with and the comma after it.
fn next_item(text: &str) -> Option<&str> {
    let rest = skip_space(skip_value(text).ok()?);
    Some(match rest.strip_prefix(',') {
        Some(rest) => skip_space(rest),
        None => rest,
    })
}

fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\r'])
}

/// What follows the value that `text` begins with.
fn skip_value(text: &str) -> Result<&str, InvalidJson> {
    // The kinds of the open objects and arrays.
    let mut open: Vec<PyType> = Vec::new();
    let mut rest = text;
    loop {
        // Here a value begins.
        let container = match rest.as_bytes().first() {
            Some(b'{') => Some((PyType::Dict, '}')),
            Some(b'[') => Some((PyType::List, ']')),
            _ => None,
        };
        if let Some((kind, end)) = container {
            if open.len() == MAX_DEPTH {
                return Err(InvalidJson::Depth(kind));
            }
            rest = skip_space(&rest[1..]);
            if let Some(after) = rest.strip_prefix(end) {
                rest = after;
            } else {
                open.push(kind);
                if kind == PyType::Dict {
                    rest = skip_key(rest)?;
                }
                continue;
            }
        } else {
            rest = skip_scalar(rest).ok_or(InvalidJson::Syntax)?;
        }
        // Here one has ended.
        loop {
            let Some(kind) = open.last().copied() else {
                return Ok(rest);
            };
            rest = skip_space(rest);
            if let Some(after) = rest.strip_prefix(',') {
                rest = skip_space(after);
                if kind == PyType::Dict {
                    rest = skip_key(rest)?;
                }
                break;
            }
            let end = if kind == PyType::Dict { '}' } else { ']' };
            rest = rest.strip_prefix(end).ok_or(InvalidJson::Syntax)?;
            open.pop();
        }
    }
}

fn skip_key(text: &str) -> Result<&str, InvalidJson> {
    let after = skip_string(text).map(skip_space);
    let value = after.and_then(|rest| rest.strip_prefix(':'));
    value.map(skip_space).ok_or(InvalidJson::Syntax)
}

fn skip_scalar(text: &str) -> Option<&str> {
    if text.starts_with('"') {
        return skip_string(text);
    }
    let constants = ["null", "true", "false", "NaN", "Infinity", "-Infinity"];
    if let Some(rest) = constants.iter().find_map(|word| text.strip_prefix(word)) {
        return Some(rest);
    }
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let mut rest = text.strip_prefix('-').unwrap_or(text);
    match digits(rest) {
        0 => return None,
        // Nothing follows a leading zero.
        _ if rest.starts_with('0') => rest = &rest[1..],
        n => rest = &rest[n..],
    }
    if let Some(fraction) = rest.strip_prefix('.')
        && digits(fraction) > 0
    {
        rest = &fraction[digits(fraction)..];
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        if digits(exponent) > 0 {
            rest = &exponent[digits(exponent)..];
        }
    }
    Some(rest)
}

fn skip_string(text: &str) -> Option<&str> {
    let bytes = text.strip_prefix('"')?.as_bytes();
    let mut i = 0;
    loop {
        // Images make up most of a notebook: sixteen characters at a time, without a branch.
        while let Some(chunk) = bytes.get(i..i + 16)
            && !chunk
                .iter()
                .fold(false, |found, byte| found | is_special(*byte))
        {
            i += 16;
        }
        match *bytes.get(i)? {
            b'"' => return Some(&text[i + 2..]),
            b'\\' => match *bytes.get(i + 1)? {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => i += 2,
                b'u' => {
                    let hex = bytes.get(i + 2..i + 6)?;
                    if !hex.iter().all(u8::is_ascii_hexdigit) {
                        return None;
                    }
                    i += 6;
                }
                _ => return None,
            },
            0..=0x1f => return None,
            _ => i += 1,
        }
    }
}

/// What ends a string, or a stretch of it that stands for itself.
fn is_special(byte: u8) -> bool {
    (byte == b'"') | (byte == b'\\') | (byte < 0x20)
}

/// What a checked string says; a surrogate without its partner becomes U+FFFD.
fn unescaped(quoted: &str) -> String {
    let mut text = String::with_capacity(quoted.len());
    let mut rest = quoted.get(1..quoted.len() - 1).unwrap_or_default();
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let escape = rest.as_bytes().get(at + 1).copied().unwrap_or_default();
        rest = rest.get(at + 2..).unwrap_or_default();
        match escape {
            b'b' => text.push('\x08'),
            b'f' => text.push('\x0c'),
            b'n' => text.push('\n'),
            b'r' => text.push('\r'),
            b't' => text.push('\t'),
            b'u' => {
                let high = hex(rest);
                rest = rest.get(4..).unwrap_or_default();
                let low = rest.strip_prefix("\\u").map_or(0, hex);
                let is_pair = (0xd800..0xdc00).contains(&high) && (0xdc00..0xe000).contains(&low);
                let code = if is_pair {
                    rest = &rest[6..];
                    0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00)
                } else {
                    high
                };
                text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            other => text.push(char::from(other)),
        }
    }
    text.push_str(rest);
    text
}

fn hex(text: &str) -> u32 {
    let digits = text.get(..4).unwrap_or_default();
    u32::from_str_radix(digits, 16).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_takes_is_taken() {
        for text in [
            "1",
            "-0",
            "0.5e-3",
            "NaN",
            "-Infinity",
            " [ 1 , {} , [ ] ] ",
            "{\"a\":1,\"a\":2}",
            "\"\\ud800\"",
            "\"\u{7f}é\"",
            "{ \"a\" : [ null , true , false ] }",
            "\r\n\t1",
        ] {
            assert!(parse(text).is_ok(), "{text}");
        }
        for text in [
            "",
            " ",
            "01",
            "+1",
            ".5",
            "1.",
            "1e",
            "nan",
            "[1,]",
            "[,1]",
            "{\"a\"}",
            "{a:1}",
            "{\"a\":1,}",
            "\"\n\"",
            "\"\\x\"",
            "\"\\u12g4\"",
            "[1",
            "1 2",
            "[1}",
            "\u{feff}1",
            "\u{a0}1",
            "'a'",
            "tru",
        ] {
            assert_eq!(parse(text).err(), Some(InvalidJson::Syntax), "{text}");
        }
    }

    #[test]
    fn depth_is_bounded_without_recursion() {
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(parse(&nested(MAX_DEPTH)).is_ok());
        assert_eq!(
            parse(&nested(MAX_DEPTH + 1)).err(),
            Some(InvalidJson::Depth(PyType::List))
        );
        let open = "[".repeat(10 << 20);
        assert_eq!(parse(&open).err(), Some(InvalidJson::Depth(PyType::List)));
        let objects = "{\"a\":".repeat(5000);
        assert_eq!(
            parse(&objects).err(),
            Some(InvalidJson::Depth(PyType::Dict))
        );
    }

    #[test]
    fn values_are_found_where_they_lie() {
        let value =
            parse("{\"a\" : 1, \"b\": [ 1.5 , \"x\\\"\\u00e9\" ], \"\\u0061\": -2 }").unwrap();
        assert_eq!(value.get("a").unwrap().raw(), "-2");
        let items: Vec<Value<'_>> = value.get("b").unwrap().items().collect();
        assert_eq!(items[0].kind(), PyType::Float);
        assert_eq!(items[1].string().unwrap(), "x\"é");
        assert_eq!(value.members().count(), 3);
        assert_eq!(parse("[]").unwrap().items().count(), 0);
        assert_eq!(parse("3").unwrap().items().count(), 0);
        assert!(value.get("c").is_none());
    }

    #[test]
    fn long_strings_end_where_they_end() {
        for n in 0..70 {
            let text = "é".repeat(n / 2) + &"x".repeat(n);
            let list = format!("[\"{text}\",\"{text}\\\"\"]");
            let items: Vec<_> = parse(&list).unwrap().items().map(Value::string).collect();
            assert_eq!(items, [Some(text.clone()), Some(text.clone() + "\"")]);
            assert!(parse(&format!("\"{text}\n{text}\"")).is_err());
        }
    }

    #[test]
    fn escapes_are_undone() {
        let string = |text: &str| parse(text).unwrap().string().unwrap();
        assert_eq!(string(r#""\b\f\n\r\t\/\\\"""#), "\x08\x0c\n\r\t/\\\"");
        assert_eq!(string(r#""\ud83d\ude00""#), "😀");
        assert_eq!(
            string(r#""\ud83dx\ude00\ud83d\ud83d\ude00""#),
            "\u{fffd}x\u{fffd}\u{fffd}😀"
        );
        assert_eq!(string(r#""""#), "");
        assert_eq!(string(r#""\"""#), "\"");
    }

    #[test]
    fn truth_is_pythons() {
        for (text, expected) in [
            ("[]", false),
            ("[ ]", false),
            ("[0]", true),
            ("{}", false),
            ("{\"\":0}", true),
            ("\"\"", false),
            ("\"0\"", true),
            ("0", false),
            ("-0.0e5", false),
            ("0.01", true),
            ("NaN", true),
            ("-Infinity", true),
            ("null", false),
            ("true", true),
            ("false", false),
        ] {
            assert_eq!(parse(text).unwrap().is_truthy(), expected, "{text}");
        }
    }
}
