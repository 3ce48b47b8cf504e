//! The body of a file in a digest.

use super::notebook::script::script;

/// Bytes at the start of a file that decide whether it is text.
const CHUNK: usize = 1024;

/// Appends the body of the file at `path`, relative to the root, that holds `bytes`.
pub(super) fn push(path: &str, bytes: &[u8], out: &mut String) {
    if is_notebook(path) {
        let text = std::str::from_utf8(bytes).map_err(|error| decode_error(bytes, error));
        match text.and_then(|text| script(path, text)) {
            Ok(text) => out.push_str(&text),
            Err(error) => *out += &format!("Error processing notebook: {error}"),
        }
        return;
    }
    if bytes.is_empty() {
        out.push_str("[Empty file]");
        return;
    }
    // As in gitingest, a file is binary if the end of the chunk splits a character.
    if std::str::from_utf8(&bytes[..bytes.len().min(CHUNK)]).is_err() {
        out.push_str("[Binary file]");
        return;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => push_with_newlines(text, out),
        Err(error) => {
            let error = decode_error(bytes, error);
            *out += &format!("Error reading file with 'UTF-8': {error}");
        }
    }
}

/// Python's `Path.suffix == ".ipynb"`: a leading dot begins no suffix.
fn is_notebook(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.len() > ".ipynb".len() && name.ends_with(".ipynb")
}

/// Appends `text` with Python's universal newlines: `\r\n` and a lone `\r` become `\n`.
fn push_with_newlines(text: &str, out: &mut String) {
    for (i, line) in text.split('\r').enumerate() {
        let line = match i {
            0 => line,
            _ => {
                out.push('\n');
                line.strip_prefix('\n').unwrap_or(line)
            }
        };
        out.push_str(line);
    }
}

/// Returns the message of Python's `UnicodeDecodeError` for `bytes`.
fn decode_error(bytes: &[u8], error: std::str::Utf8Error) -> String {
    let start = error.valid_up_to();
    let len = error.error_len().unwrap_or(bytes.len() - start);
    let first = bytes[start];
    let why = match (error.error_len(), first) {
        (None, _) => "unexpected end of data",
        (Some(_), 0xc2..=0xf4) => "invalid continuation byte",
        (Some(_), _) => "invalid start byte",
    };
    if len == 1 {
        format!("'utf-8' codec can't decode byte 0x{first:02x} in position {start}: {why}")
    } else {
        let end = start + len - 1;
        format!("'utf-8' codec can't decode bytes in position {start}-{end}: {why}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(path: &str, bytes: &[u8]) -> String {
        let mut out = String::new();
        push(path, bytes, &mut out);
        out
    }

    #[test]
    fn the_first_kibibyte_decides_what_is_text() {
        assert_eq!(body("a", b""), "[Empty file]");
        assert_eq!(body("a", b"\xff"), "[Binary file]");
        assert_eq!(body("a.png", b"\0\x01text"), "\0\x01text");
        let cut = ["x".repeat(1023), "é".to_owned()].concat();
        assert_eq!(body("a", cut.as_bytes()), "[Binary file]");
        let whole = ["x".repeat(1022), "é".to_owned()].concat();
        assert_eq!(body("a", whole.as_bytes()), whole);
    }

    #[test]
    fn newlines_become_one_kind_and_nothing_else_changes() {
        let text = "\u{feff}a\r\nb\rc\n\r\r\nd\u{2028}e\x0c\0";
        assert_eq!(
            body("a", text.as_bytes()),
            "\u{feff}a\nb\nc\n\n\nd\u{2028}e\x0c\0"
        );
    }

    #[test]
    fn later_bytes_that_are_not_utf_8_are_reported_in_pythons_words() {
        let with = |tail: &[u8]| body("a", &[&[b'x'; 1024], tail].concat());
        let start = "Error reading file with 'UTF-8': 'utf-8' codec can't decode ";
        for (tail, expected) in [
            (
                &b"\xff"[..],
                "byte 0xff in position 1024: invalid start byte",
            ),
            (b"\x80", "byte 0x80 in position 1024: invalid start byte"),
            (
                b"\xc3(",
                "byte 0xc3 in position 1024: invalid continuation byte",
            ),
            (
                b"\xe2\x82(",
                "bytes in position 1024-1025: invalid continuation byte",
            ),
            (
                b"\xe2",
                "byte 0xe2 in position 1024: unexpected end of data",
            ),
            (
                b"\xf0\x9f\x98",
                "bytes in position 1024-1026: unexpected end of data",
            ),
            (
                b"ab\xed\xa0\x80",
                "byte 0xed in position 1026: invalid continuation byte",
            ),
        ] {
            assert_eq!(with(tail), format!("{start}{expected}"));
        }
    }

    #[test]
    fn a_notebook_is_utf_8() {
        assert_eq!(
            body("n.ipynb", b"\xff"),
            "Error processing notebook: \
             'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
        );
    }

    #[test]
    fn only_a_real_suffix_makes_a_notebook() {
        assert!(is_notebook("d/a.ipynb") && is_notebook("..ipynb"));
        assert!(!is_notebook("d/.ipynb") && !is_notebook("a.IPYNB") && !is_notebook("a.ipynb/b"));
    }
}
