//! JSON as Python's `json` module reads it: with `NaN` and `Infinity`, and without recursion.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

/// Deepest nesting before Python's decoder raises `RecursionError`. The exact figure depends on how
/// deep the caller is; this is what gitingest has left on Python 3.11 for a file in the root.
const MAX_DEPTH: usize = 974;

/// A value, by the name of its type in Python.
#[derive(Debug, PartialEq)]
pub(super) enum JsonValue<'a> {
    /// All members in order; of equal keys the last one counts.
    Dict(Vec<(Cow<'a, str>, Self)>),
    List(Vec<Self>),
    /// A surrogate without its partner is U+FFFD.
    Str(Cow<'a, str>),
    /// Of any length, as written.
    Int(&'a str),
    Float(f64),
    Bool(bool),
    None,
}

/// Why a text is not JSON.
#[derive(Debug, PartialEq)]
pub(super) enum InvalidJson {
    Syntax,
    /// It nests too deeply; the innermost value is an "object" or an "array".
    Depth(&'static str),
}

/// Parses a whole text.
pub(super) fn parse(text: &str) -> Result<JsonValue<'_>, InvalidJson> {
    let mut parser = Parser { rest: text };
    let mut open = Vec::new();
    parser.skip_space();
    loop {
        let container = match parser.rest.as_bytes().first() {
            Some(b'{') => Some((JsonValue::Dict(Vec::new()), "object", "}")),
            Some(b'[') => Some((JsonValue::List(Vec::new()), "array", "]")),
            _ => None,
        };
        let mut value = if let Some((mut container, name, end)) = container {
            if open.len() == MAX_DEPTH {
                return Err(InvalidJson::Depth(name));
            }
            parser.rest = &parser.rest[1..];
            parser.skip_space();
            if !parser.eat(end) {
                parser.begin_item(&mut container)?;
                open.push((container, end));
                continue;
            }
            container
        } else {
            parser.scalar().ok_or(InvalidJson::Syntax)?
        };
        // A value has ended, and perhaps what it is in.
        loop {
            parser.skip_space();
            let Some((container, end)) = open.last_mut() else {
                let is_all = parser.rest.is_empty();
                return is_all.then_some(value).ok_or(InvalidJson::Syntax);
            };
            match container {
                JsonValue::Dict(members) => members.last_mut().expect("has a key").1 = value,
                JsonValue::List(items) => items.push(value),
                _ => unreachable!("only dicts and lists are open"),
            }
            if parser.eat(",") {
                parser.skip_space();
                parser.begin_item(container)?;
                break;
            }
            if !parser.eat(end) {
                return Err(InvalidJson::Syntax);
            }
            value = open.pop().expect("is open").0;
        }
    }
}

impl<'a> JsonValue<'a> {
    /// The name of its type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Dict(_) => "dict",
            Self::List(_) => "list",
            Self::Str(_) => "str",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Bool(_) => "bool",
            Self::None => "NoneType",
        }
    }

    /// Python's truth: whether it is neither empty, zero, false nor None.
    pub(super) fn is_truthy(&self) -> bool {
        match self {
            Self::Dict(members) => !members.is_empty(),
            Self::List(items) => !items.is_empty(),
            Self::Str(text) => !text.is_empty(),
            Self::Int(digits) => digits.contains(|c: char| ('1'..='9').contains(&c)),
            Self::Float(number) => *number != 0.0,
            Self::Bool(truth) => *truth,
            Self::None => false,
        }
    }

    /// The value of `key`, if this is a dict that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        let Self::Dict(members) = self else {
            return None;
        };
        let member = members.iter().rfind(|(name, _)| name == key);
        member.map(|(_, value)| value)
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn eat(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Reads up to the next item's value. A member gets its value when that has been read.
    fn begin_item(&mut self, container: &mut JsonValue<'a>) -> Result<(), InvalidJson> {
        let JsonValue::Dict(members) = container else {
            return Ok(());
        };
        let key = self.string().ok_or(InvalidJson::Syntax)?;
        self.skip_space();
        if !self.eat(":") {
            return Err(InvalidJson::Syntax);
        }
        self.skip_space();
        members.push((key, JsonValue::None));
        Ok(())
    }

    fn scalar(&mut self) -> Option<JsonValue<'a>> {
        // Python's own expression.
        static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r"^-?(?:0|[1-9][0-9]*)((?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")
                .expect("the expression is valid")
        });
        if self.rest.starts_with('"') {
            return self.string().map(JsonValue::Str);
        }
        for (word, value) in [
            ("null", JsonValue::None),
            ("true", JsonValue::Bool(true)),
            ("false", JsonValue::Bool(false)),
            ("NaN", JsonValue::Float(f64::NAN)),
            ("Infinity", JsonValue::Float(f64::INFINITY)),
            ("-Infinity", JsonValue::Float(f64::NEG_INFINITY)),
        ] {
            if self.eat(word) {
                return Some(value);
            }
        }
        let found = NUMBER.captures(self.rest)?;
        let (number, rest) = self.rest.split_at(found[0].len());
        self.rest = rest;
        if found[1].is_empty() {
            return Some(JsonValue::Int(number));
        }
        number.parse().ok().map(JsonValue::Float)
    }

    fn string(&mut self) -> Option<Cow<'a, str>> {
        let mut rest = self.rest.strip_prefix('"')?;
        let mut text = Cow::Borrowed("");
        loop {
            let is_special = |byte: u8| matches!(byte, b'"' | b'\\' | 0..=0x1f);
            let (plain, special) = rest.split_at(rest.bytes().position(is_special)?);
            text += plain;
            if let Some(rest) = special.strip_prefix('"') {
                self.rest = rest;
                return Some(text);
            }
            let mut escape = special.strip_prefix('\\')?.chars();
            let character = match escape.next()? {
                c @ ('"' | '\\' | '/') => c,
                'b' => '\x08',
                'f' => '\x0c',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'u' => {
                    let first = hex(escape.as_str())?;
                    escape = escape.as_str()[4..].chars();
                    let second = escape.as_str().strip_prefix("\\u").and_then(hex);
                    let decoded = char::decode_utf16([first].into_iter().chain(second)).next()?;
                    let decoded = decoded.unwrap_or(char::REPLACEMENT_CHARACTER);
                    if decoded.len_utf16() == 2 {
                        escape = escape.as_str()[6..].chars();
                    }
                    decoded
                }
                _ => return None,
            };
            text.to_mut().push(character);
            rest = escape.as_str();
        }
    }
}

/// The first four characters as a hexadecimal number.
fn hex(text: &str) -> Option<u16> {
    let digits = text.get(..4)?;
    let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u16::from_str_radix(digits, 16).ok())?
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
        let depth = |text: &str| parse(text).unwrap_err();
        assert_eq!(depth(&nested(MAX_DEPTH + 1)), InvalidJson::Depth("array"));
        assert_eq!(depth(&"[".repeat(10 << 20)), InvalidJson::Depth("array"));
        assert_eq!(depth(&"{\"a\":".repeat(5000)), InvalidJson::Depth("object"));
    }

    #[test]
    fn values_have_pythons_types() {
        let text = "{\"a\" : 1, \"b\": [ 1.5 , \"x\\\"\\u00e9\" ], \"\\u0061\": -2 }";
        let value = parse(text).unwrap();
        assert_eq!(value.get("a"), Some(&JsonValue::Int("-2")));
        let items = vec![JsonValue::Float(1.5), JsonValue::Str("x\"é".into())];
        assert_eq!(value.get("b"), Some(&JsonValue::List(items)));
        assert!(matches!(&value, JsonValue::Dict(members) if members.len() == 3));
        assert_eq!(parse("[]"), Ok(JsonValue::List(Vec::new())));
        assert_eq!(parse("3").unwrap().get("c"), None);
        assert_eq!(value.get("c"), None);
    }

    #[test]
    fn long_strings_end_where_they_end() {
        for n in 0..70 {
            let text = "é".repeat(n / 2) + &"x".repeat(n);
            let list = format!("[\"{text}\",\"{text}\\\"\"]");
            let items = [text.clone(), text.clone() + "\""];
            let items = items.map(|item| JsonValue::Str(item.into()));
            assert_eq!(parse(&list), Ok(JsonValue::List(items.into())));
            assert!(parse(&format!("\"{text}\n{text}\"")).is_err());
        }
    }

    #[test]
    fn escapes_are_undone() {
        let string = |text: &str| match parse(text).unwrap() {
            JsonValue::Str(text) => text.into_owned(),
            other => panic!("{other:?}"),
        };
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
