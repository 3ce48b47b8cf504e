//! What is known about a digest, as the metadata of its object.
//!
//! Values are visible ASCII: anything else is percent-encoded. The SDK would send raw UTF-8, which
//! servers treat differently. Names are lower-case, as HTTP returns them.
//!
//! The predecessor's objects have `pushedat`, `url` and `processedat` only. With a `pushedat`, such
//! an object is a digest in the format "", so it is replaced. Mostly the value is empty; then the
//! object counts as unreadable, which has the same effect.

use std::collections::HashMap;

use aws_sdk_s3::primitives::DateTime;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use crate::ids::{PushedAt, RunId};
use crate::store::{DigestMeta, Found, Version};

pub(super) type Map = HashMap<String, String>;

/// `%` too, so that decoding gives back what was encoded.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');
/// Amazon allows 2 KB of metadata in all; the rest is short.
const URL_MAX_BYTES: usize = 1024;
const ELLIPSIS: &str = "%E2%80%A6";
/// The run of a digest that says none.
const NO_RUN: &str = "unknown";

/// Metadata as read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Random value, unique to each PUT; empty if another program stored the object.
    pub(super) mark: String,
    /// The digest's metadata, or what is wrong with them.
    pub(super) meta: Result<DigestMeta, String>,
    /// Whether they are of a text of another length.
    torn: bool,
}

/// The metadata of a new object.
pub(super) fn of(meta: &DigestMeta, mark: &str) -> Map {
    let [tokens, files] = [meta.tokens, meta.files].map(|count| Some(count?.to_string()));
    let mut map: Map = [
        ("pushedat", meta.pushed_at.as_str()),
        ("processedat", &meta.processed_at),
        ("run", meta.run.as_str()),
        ("format", &meta.format),
        ("truncated", if meta.truncated { "true" } else { "false" }),
        ("bytes", &meta.bytes.to_string()),
        ("mark", mark),
    ]
    .into_iter()
    .chain(meta.commit.as_deref().map(|commit| ("commit", commit)))
    .chain(meta.sha256.as_deref().map(|sha256| ("sha256", sha256)))
    .chain(tokens.as_deref().map(|tokens| ("tokens", tokens)))
    .chain(files.as_deref().map(|files| ("files", files)))
    .map(|(name, value)| (name.to_owned(), encoded(value)))
    .collect();
    map.insert("url".to_owned(), encoded_url(&meta.url));
    map
}

impl Metadata {
    /// Parses object metadata. `bytes` is Content-Length, if the server sent one.
    pub(super) fn read(map: Option<&Map>, bytes: Option<u64>) -> Self {
        let empty = Map::new();
        let map = map.unwrap_or(&empty);
        Self {
            mark: map.get("mark").cloned().unwrap_or_default(),
            meta: read(map, bytes),
            torn: map
                .get("bytes")
                .and_then(|stated| stated.parse::<u64>().ok())
                .is_some_and(|stated| bytes.is_some_and(|bytes| bytes != stated)),
        }
    }
}

/// What a server says of an object.
pub(super) struct Seen {
    pub(super) metadata: Metadata,
    etag: String,
    /// Stands in for the mark of an object without one.
    modified_millis: i64,
    /// `None` if the server does not say, as HTTP allows.
    bytes: Option<u64>,
}

impl Seen {
    pub(super) fn new(
        metadata: Option<&Map>,
        etag: Option<&str>,
        modified: Option<&DateTime>,
        bytes: Option<i64>,
    ) -> Self {
        let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
        Self {
            metadata: Metadata::read(metadata, bytes),
            etag: unquoted(etag),
            modified_millis: modified.map_or(0, millis),
            bytes,
        }
    }

    pub(super) fn version(&self) -> Version {
        let mark = match self.metadata.mark.as_str() {
            "" => format!(
                "{}-{}",
                self.modified_millis,
                self.bytes.unwrap_or_default()
            ),
            mark => mark.to_owned(),
        };
        Version(format!("{} {mark}", self.etag))
    }

    /// Identifies the content, whatever its metadata.
    pub(super) fn content(&self) -> Version {
        Version(self.etag.clone())
    }

    pub(super) fn found(&self) -> Found {
        let version = self.version();
        match self.metadata.meta.clone() {
            Ok(meta) => Found::Stored { meta, version },
            Err(why) => Found::Unreadable {
                version,
                why,
                torn: self.metadata.torn,
            },
        }
    }
}

pub(super) fn millis(time: &DateTime) -> i64 {
    time.to_millis().unwrap_or(0)
}

/// Listings of some servers have ETags without quotes.
pub(super) fn unquoted(etag: Option<&str>) -> String {
    etag.unwrap_or_default().trim_matches('"').to_owned()
}

pub(super) fn quoted(etag: &str) -> String {
    format!("\"{etag}\"")
}

fn read(map: &Map, bytes: Option<u64>) -> Result<DigestMeta, String> {
    let raw = |name: &str| map.get(name).map(String::as_str);
    let pushed_at = raw("pushedat").ok_or("its metadata have no pushedat")?;
    if pushed_at.is_empty() {
        return Err("its pushedat is empty, as the predecessor left it".to_owned());
    }
    let Some(format) = raw("format") else {
        return Ok(DigestMeta {
            pushed_at: PushedAt::new(pushed_at).map_err(|error| error.to_string())?,
            url: raw("url").unwrap_or_default().to_owned(),
            processed_at: raw("processedat").unwrap_or_default().to_owned(),
            commit: None,
            format: String::new(),
            bytes: bytes.unwrap_or_default(),
            truncated: false,
            run: run(NO_RUN)?,
            sha256: None,
            tokens: None,
            files: None,
        });
    };

    let text = |name: &str| {
        let value = raw(name).ok_or_else(|| format!("its metadata have no {name}"))?;
        decoded(value).ok_or_else(|| format!("its {name} is not UTF-8"))
    };
    let number = |name: &str| -> Result<u64, String> {
        let text = text(name)?;
        text.parse()
            .map_err(|_| format!("its {name} are not a number"))
    };
    let count = |name: &str| raw(name).map(|_| number(name)).transpose();
    let stated = number("bytes")?;
    if let Some(bytes) = bytes.filter(|bytes| *bytes != stated) {
        return Err(format!(
            "it has {bytes} bytes, and its metadata say {stated}"
        ));
    }
    Ok(DigestMeta {
        pushed_at: PushedAt::new(&text("pushedat")?).map_err(|error| error.to_string())?,
        url: text("url")?,
        processed_at: text("processedat")?,
        commit: raw("commit").map(|_| text("commit")).transpose()?,
        format: decoded(format).ok_or("its format is not UTF-8")?,
        bytes: stated,
        truncated: match raw("truncated") {
            Some("true") => true,
            Some("false") => false,
            _ => return Err("its truncated is neither true nor false".to_owned()),
        },
        run: run(&text("run")?)?,
        sha256: raw("sha256").map(|_| text("sha256")).transpose()?,
        tokens: count("tokens")?,
        files: count("files")?,
    })
}

fn run(text: &str) -> Result<RunId, String> {
    RunId::try_from(text.to_owned()).map_err(|error| error.to_string())
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

fn decoded(text: &str) -> Option<String> {
    Some(percent_decode_str(text).decode_utf8().ok()?.into_owned())
}

/// Encodes a URL. One that is too long for any server is cut between characters and ends with an
/// ellipsis, which [`freshness`](crate::store::freshness) understands.
fn encoded_url(url: &str) -> String {
    let whole = encoded(url);
    if whole.len() <= URL_MAX_BYTES {
        return whole;
    }
    let mut cut = String::new();
    for char in url.chars() {
        let char = encoded(char.encode_utf8(&mut [0; 4]));
        if cut.len() + char.len() + ELLIPSIS.len() > URL_MAX_BYTES {
            break;
        }
        cut += &char;
    }
    cut + ELLIPSIS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> DigestMeta {
        DigestMeta {
            pushed_at: PushedAt::new("2026-01-02T03:04:05+01:00").unwrap(),
            url: "https://git.example/ö/a b%41\n".to_owned(),
            processed_at: "2026-01-03T00:00:00.123456789Z".to_owned(),
            commit: Some("0123456789012345678901234567890123456789".to_owned()),
            format: "gitingest-0.3.1/1".to_owned(),
            bytes: 7,
            truncated: true,
            run: RunId::try_from("20260103T000000Z-0a1b2c".to_owned()).unwrap(),
            sha256: Some("e3b0".repeat(16)),
            tokens: Some(1234),
            files: Some(5),
        }
    }

    fn map(pairs: &[(&str, &str)]) -> Map {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn what_is_written_is_read_and_is_visible_ascii() {
        for meta in [
            meta(),
            DigestMeta {
                commit: None,
                truncated: false,
                sha256: None,
                tokens: None,
                files: None,
                ..meta()
            },
        ] {
            let map = of(&meta, "0123456789abcdef");
            for (name, value) in &map {
                assert!(
                    value.bytes().all(|b| b.is_ascii_graphic()),
                    "{name}: {value}"
                );
                let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
                assert!(name.bytes().all(is_plain), "{name}");
            }
            let read = Metadata::read(Some(&map), Some(7));
            assert_eq!(read.meta, Ok(meta.clone()));
            let of_unsaid_length = Metadata::read(Some(&map), None);
            assert_eq!(of_unsaid_length.meta, Ok(meta));
            assert_eq!(read.mark, "0123456789abcdef");
        }
    }

    /// Metadata are a contract with those who read the bucket.
    #[test]
    fn metadata_are_as_published() {
        let map = of(&meta(), "m");
        let mut lines: Vec<_> = map.iter().map(|(k, v)| format!("{k}={v}")).collect();
        lines.sort();
        assert_eq!(
            lines,
            [
                "bytes=7",
                "commit=0123456789012345678901234567890123456789",
                "files=5",
                "format=gitingest-0.3.1/1",
                "mark=m",
                "processedat=2026-01-03T00:00:00.123456789Z",
                "pushedat=2026-01-02T03:04:05+01:00",
                "run=20260103T000000Z-0a1b2c",
                "sha256=e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0e3b0",
                "tokens=1234",
                "truncated=true",
                "url=https://git.example/%C3%B6/a%20b%2541%0A",
            ]
        );
    }

    #[test]
    fn an_endless_url_is_cut_between_characters() {
        for letters in 0..12 {
            let url = format!("{}{}", "x".repeat(letters), "😀".repeat(500));
            let map = of(&DigestMeta { url, ..meta() }, "");
            let total: usize = map.iter().map(|(k, v)| k.len() + v.len()).sum();
            assert!(total < 2000, "{total}");
            let read = Metadata::read(Some(&map), Some(7)).meta.unwrap().url;
            assert!(read.ends_with("😀…"), "{read}");
        }
    }

    #[test]
    fn the_predecessors_objects_are_of_no_format_or_unreadable() {
        let old = map(&[
            ("pushedat", "2026-01-02T03:04:05Z"),
            ("url", "https://github.com/a/b%20"),
            ("processedat", "2026-01-03T00:00:00Z"),
        ]);
        let read = Metadata::read(Some(&old), Some(9)).meta.unwrap();
        assert_eq!((read.format.as_str(), read.bytes), ("", 9));
        assert_eq!(read.url, "https://github.com/a/b%20");
        let unpushed = map(&[("pushedat", ""), ("url", ""), ("processedat", "")]);
        let why = Metadata::read(Some(&unpushed), Some(9)).meta.unwrap_err();
        assert!(why.contains("predecessor"), "{why}");
    }

    #[test]
    fn metadata_that_lack_something_are_refused() {
        assert!(Metadata::read(None, Some(7)).meta.is_err());
        let whole = of(&meta(), "");
        assert!(
            Metadata::read(Some(&whole), Some(8)).meta.is_err(),
            "another size"
        );
        for name in [
            "pushedat",
            "url",
            "processedat",
            "run",
            "truncated",
            "bytes",
        ] {
            let mut map = whole.clone();
            map.remove(name);
            let why = Metadata::read(Some(&map), Some(7)).meta.unwrap_err();
            assert!(why.contains(name), "{why}");
        }
        for (name, value) in [
            ("pushedat", "a b"),
            ("pushedat", "%FF"),
            ("run", "../x"),
            ("bytes", "seven"),
            ("tokens", "many"),
            ("files", "-1"),
            ("sha256", "%FF"),
            ("truncated", "perhaps"),
            ("url", "%FF"),
        ] {
            let mut map = whole.clone();
            map.insert(name.to_owned(), value.to_owned());
            assert!(
                Metadata::read(Some(&map), Some(7)).meta.is_err(),
                "{name}={value}"
            );
        }
    }
}
