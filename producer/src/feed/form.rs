//! The outer form of a feed, as people have them: compressed or not; a JSON array, several one after the
//! other (pages), an object with the array in it, or an object a line.
//!
//! Entries are found by their brackets alone, so that one that is not JSON, such as with a `NaN` in it,
//! costs itself and not the feed.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Read};

use common::text::counted;
use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

/// Most entries of a feed; the real one has 24,500. Together with the limit on bytes this bounds
/// the memory that a feed can cost.
pub(super) const MAX_ENTRIES: usize = 1_000_000;
/// How much of a text that is not a feed is quoted.
const QUOTED_CHARS: usize = 60;
/// Members of an object that are the list: of GitHub's search, of Gitea's, of a code.json, and of others.
const LISTS: [&str; 4] = ["items", "data", "releases", "repositories"];

/// How a feed is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

/// Decompresses a feed that begins like a compressed one.
///
/// # Errors
/// If it is damaged; `None` if there is more in it than `limit` bytes.
pub(super) fn decompress(
    bytes: Vec<u8>,
    limit: u64,
) -> io::Result<Option<(Vec<u8>, Option<Compression>)>> {
    let mut plain = Vec::new();
    let all = limit.saturating_add(1);
    let compression = match bytes.as_slice() {
        compressed @ [0x1f, 0x8b, ..] => {
            let decoder = MultiGzDecoder::new(compressed);
            decoder.take(all).read_to_end(&mut plain)?;
            Compression::Gzip
        }
        compressed @ [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut rest = compressed;
            // A frame for each file that was put behind another.
            while !rest.is_empty() && plain.len() as u64 <= limit {
                let frame = StreamingDecoder::new(&mut rest).map_err(io::Error::other)?;
                frame
                    .take(all - plain.len() as u64)
                    .read_to_end(&mut plain)?;
            }
            Compression::Zstd
        }
        _ => return Ok(Some((bytes, None))),
    };
    let fits = plain.len() as u64 <= limit;
    Ok(fits.then_some((plain, Some(compression))))
}

/// What a feed looked like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) compression: Option<Compression>,
    arrays: usize,
    objects: usize,
    list: Option<&'static str>,
}

impl fmt::Display for Form {
    /// Nothing for one array as it is, the usual form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let container: Cow<'_, str> = match (self.list, self.arrays, self.objects) {
            (Some(list), 1, _) => format!("the list `{list}` of an object").into(),
            (Some(list), n, _) => format!("the lists `{list}` of {n} objects").into(),
            (None, 0 | 1, 0) => "".into(),
            (None, n, 0) => format!("{n} arrays").into(),
            (None, ..) => "an entry a line".into(),
        };
        let compression = self.compression.map(|c| c.to_string()).unwrap_or_default();
        let between = match container.is_empty() || compression.is_empty() {
            true => "",
            false => ", ",
        };
        write!(f, "{compression}{between}{container}")
    }
}

/// Hands over each entry of a feed, as text that may or may not be JSON.
///
/// `is_entry` tells whether an object that stands alone is an entry, rather than an error message.
///
/// # Errors
/// Says what was found instead of a feed of at most [`MAX_ENTRIES`] entries.
pub(super) fn entries<'a>(
    text: &'a str,
    is_entry: impl Fn(&str) -> bool,
    mut hand_over: impl FnMut(&'a str),
) -> Result<Form, String> {
    let text = text.trim_start_matches('\u{feff}');
    let mut scanner = Scanner { text, at: 0 };
    let mut form = Form::default();
    let mut total = 0;
    let (mut first_object, mut found_entry) = (None, false);
    let mut take = |entry: &'a str| {
        if total == MAX_ENTRIES {
            return Err(Broken::TooMany);
        }
        total += 1;
        hand_over(entry);
        Ok(())
    };
    let mut read = || -> Result<(), Broken> {
        while let Some(first) = scanner.next() {
            let begun = scanner.at;
            match first {
                b'[' => {
                    form.arrays += 1;
                    scanner.array(&mut take)?;
                }
                b'{' => {
                    let object = scanner.element()?;
                    match list_of(object)? {
                        Some((name, list)) => {
                            form.arrays += 1;
                            form.list = Some(name);
                            let mut list = Scanner { text: list, at: 0 };
                            list.array(&mut take)?;
                        }
                        None => {
                            form.objects += 1;
                            first_object.get_or_insert(begun);
                            found_entry = found_entry || is_entry(object);
                            take(object)?;
                        }
                    }
                }
                _ => return Err(Broken::NotJson),
            }
        }
        match first_object {
            // A message about an error looks like an entry that is odd.
            Some(at) if !found_entry => Err(Broken::Object(at)),
            _ => Ok(()),
        }
    };
    let outcome = read();
    let found = text.trim();
    let why = match outcome {
        Ok(()) if found.is_empty() => "found nothing in it".to_owned(),
        Ok(()) => return Ok(form),
        Err(Broken::Object(at)) => format!("found a JSON object: {}", quoted(&text[at..])),
        Err(Broken::NotJson) if form.arrays + form.objects == 0 => {
            format!("found something else: {}", quoted(found))
        }
        Err(Broken::NotJson) => format!("after {} it is not JSON", shown(total)),
        Err(Broken::Ends) => format!("after {} it ends in the middle", shown(total)),
        Err(Broken::TooMany) => format!("it has more than {}", shown(MAX_ENTRIES)),
    };
    Err(why)
}

fn shown(entries: usize) -> String {
    counted(entries as u64, "entry", "entries")
}

/// Returns the member of an object that is its list of entries, if one is.
fn list_of(object: &str) -> Result<Option<(&'static str, &str)>, Broken> {
    let mut scanner = Scanner {
        text: object,
        at: 1,
    };
    let mut found = None;
    while let Some(next) = scanner.next() {
        match next {
            b'}' => break,
            b',' => scanner.at += 1,
            _ => {
                let key = scanner.element()?.trim_end_matches(BLANKS);
                if scanner.next() != Some(b':') {
                    // No object of JSON: as an entry it will say so.
                    return Ok(None);
                }
                scanner.at += 1;
                scanner.next();
                let value = scanner.element()?;
                let list = LISTS.iter().find(|list| key == format!("\"{list}\""));
                match list {
                    Some(list) if value.starts_with('[') => found = Some((*list, value)),
                    // An entry may well have such a list beside its name.
                    _ if key == "\"name\"" => return Ok(None),
                    _ => {}
                }
            }
        }
    }
    Ok(found)
}

/// Why a text is no feed.
enum Broken {
    /// An object that is no entry, and where it begins.
    Object(usize),
    NotJson,
    Ends,
    TooMany,
}

/// White space in JSON, which is less than a text's.
const BLANKS: [char; 4] = [' ', '\t', '\r', '\n'];

/// Walks over JSON by its brackets and strings, without judging what is between them.
struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    /// Returns the next byte that is not white space, and stops before it.
    fn next(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let is_blank = |byte: &&u8| BLANKS.contains(&char::from(**byte));
        let skipped = rest.iter().take_while(is_blank).count();
        self.at += skipped;
        rest.get(skipped).copied()
    }

    /// Hands over the elements of the array that begins here, and stops behind it.
    fn array(
        &mut self,
        take: &mut impl FnMut(&'a str) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        self.at += 1;
        if self.next() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            if matches!(self.next(), Some(b',' | b']' | b'}' | b':')) {
                return Err(Broken::NotJson);
            }
            take(self.element()?.trim_end_matches(BLANKS))?;
            let end = self.next().ok_or(Broken::Ends)?;
            self.at += 1;
            match end {
                b',' => {}
                b']' => return Ok(()),
                _ => return Err(Broken::NotJson),
            }
        }
    }

    /// Returns the value that begins here, up to where it closes, or to the comma, colon or bracket
    /// behind it; stops there.
    fn element(&mut self) -> Result<&'a str, Broken> {
        let begun = self.at;
        let bytes = self.text.as_bytes();
        let mut depth = 0_usize;
        while let Some(byte) = bytes.get(self.at) {
            match byte {
                b'"' => {
                    self.string()?;
                    if depth == 0 {
                        break;
                    }
                    continue;
                }
                b'[' | b'{' => depth += 1,
                b',' | b':' | b']' | b'}' if depth == 0 => break,
                b']' | b'}' => {
                    depth -= 1;
                    if depth == 0 {
                        self.at += 1;
                        break;
                    }
                }
                _ => {}
            }
            self.at += 1;
        }
        match self.at == bytes.len() && (depth > 0 || !closes(&bytes[begun..])) {
            true => Err(Broken::Ends),
            false => Ok(&self.text[begun..self.at]),
        }
    }

    /// Stops behind the string that begins here.
    fn string(&mut self) -> Result<(), Broken> {
        let bytes = self.text.as_bytes();
        self.at += 1;
        while let Some(byte) = bytes.get(self.at) {
            self.at += match byte {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => 2,
                _ => 1,
            };
        }
        self.at = bytes.len();
        Err(Broken::Ends)
    }
}

/// Whether a text that goes on to the end is whole: an object, or an array.
fn closes(text: &[u8]) -> bool {
    matches!(text, [b'{', .., b'}'] | [b'[', .., b']'])
}

/// Quotes the beginning of an untrusted text.
pub(super) fn quoted(text: &str) -> String {
    let beginning: String = text.chars().take(QUOTED_CHARS).collect();
    let dots = if beginning.len() < text.len() {
        "…"
    } else {
        ""
    };
    format!("{beginning:?}{dots}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(Vec<&str>, String), String> {
        let mut found = Vec::new();
        let names_one = |object: &str| object.contains("\"name\"");
        let form = entries(text, names_one, |entry| found.push(entry))?;
        Ok((found, form.to_string()))
    }

    #[test]
    fn every_form_gives_its_entries() {
        let one = r#"{"name":"a,]}\"["}"#;
        for (text, entries, form) in [
            ("[]", vec![], ""),
            (
                " [ 1 , [2,{}] ,\n\"x\" ] ",
                vec!["1", "[2,{}]", "\"x\""],
                "",
            ),
            ("[NaN, {\"a\":NaN}]", vec!["NaN", "{\"a\":NaN}"], ""),
            ("[1][2]\n[]", vec!["1", "2"], "3 arrays"),
            (one, vec![one], "an entry a line"),
            (
                "{\"x\":NaN}\n{\"name\":1}\n",
                vec!["{\"x\":NaN}", "{\"name\":1}"],
                "an entry a line",
            ),
            (
                r#"{"total_count":2,"x":[3],"items":[1,2]}"#,
                vec!["1", "2"],
                "the list `items` of an object",
            ),
            (
                r#"{"items" : [ 1 ]}{"items":[2]}"#,
                vec!["1", "2"],
                "the lists `items` of 2 objects",
            ),
            (
                r#"{"name":"a","data":[1]}"#,
                vec![r#"{"name":"a","data":[1]}"#],
                "an entry a line",
            ),
        ] {
            let expected = (entries, form.to_owned());
            assert_eq!(read(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_feed_is_said() {
        for (text, why) in [
            ("", "found nothing in it"),
            ("\u{feff} \n", "found nothing in it"),
            ("<html>", "found something else: \"<html>\""),
            (
                "{\"message\":1}",
                "found a JSON object: \"{\\\"message\\\":1}\"",
            ),
            ("[1] oops", "after 1 entry it is not JSON"),
            ("[1,]", "after 1 entry it is not JSON"),
            ("[,1]", "after 0 entries it is not JSON"),
            ("[1}", "after 1 entry it is not JSON"),
            ("[1 2", "after 0 entries it ends in the middle"),
            ("[1,{\"a\":[", "after 1 entry it ends in the middle"),
            (
                "{\"name\":\"a\\\"}",
                "after 0 entries it ends in the middle",
            ),
            ("[\"a\\", "after 0 entries it ends in the middle"),
        ] {
            assert_eq!(read(text), Err(why.to_owned()), "{text}");
        }
    }

    #[test]
    fn compressed_feeds_are_read_up_to_the_limit() {
        use flate2::Compression as Level;
        use flate2::write::GzEncoder;
        use io::Write;

        let mut gzip = Vec::new();
        for page in ["[1]", "[2]"] {
            let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
            encoder.write_all(page.as_bytes()).unwrap();
            gzip.extend(encoder.finish().unwrap());
        }
        let zstd = ruzstd::encoding::compress_to_vec(
            &b"[1]"[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        let zstd = [zstd.clone(), zstd].concat();
        for (bytes, compression, expected) in [
            (&gzip, Compression::Gzip, &b"[1][2]"[..]),
            (&zstd, Compression::Zstd, b"[1][1]"),
        ] {
            let (plain, found) = decompress(bytes.clone(), 6).unwrap().unwrap();
            assert_eq!((plain.as_slice(), found), (expected, Some(compression)));
            let junk = [&bytes[..], b"junk"].concat();
            assert!(decompress(junk, 60).is_err(), "{compression}");
            assert_eq!(decompress(bytes.clone(), 5).unwrap(), None);
            assert!(decompress(bytes[..bytes.len() - 3].to_vec(), 6).is_err());
        }
        let (plain, found) = decompress(b"[1]".to_vec(), 0).unwrap().unwrap();
        assert_eq!((plain.as_slice(), found), (&b"[1]"[..], None));
    }
}
