//! The catalogue: `catalog.jsonl.gz` at the store's root, one line a repository, for those who read
//! the digests. Beside it `changes.csv`, what changed when, and pages for a browser.
//!
//! A run that closes brings it up to date with what it knows anyway: the feed, the cache check, the
//! outcomes. A line that the run did not look at stays as it is, so a run over a part of the feed does
//! no harm. The catalogue is replaced by compare-and-put; what changed is the difference to the one
//! replaced, so nothing is missing from `changes.csv` that a crash kept out of the catalogue.
//!
//! JSON lines, because everything reads them: `zcat`, Python, DuckDB, Spark, ClickHouse. A Parquet file
//! would be a third smaller for 24,500 lines of 2 MB, and cost a writer of fifty crates.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::str::FromStr;

use common::fault::FaultKind;
use common::ids::{PushedAt, RepoRef};
use common::store::DigestMeta;
use flate2::Compression;
use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use crate::feed::details::Details;

pub mod changes;
pub mod page;
pub mod update;

/// Most lines that are read.
const MAX_LINES: usize = 1_000_000;
/// Longest line that is read, in bytes; the longest that is written has a tenth of it.
const MAX_LINE: u64 = 64 << 10;
/// Most bytes that are read, uncompressed.
const MAX_BYTES: u64 = 1 << 30;

/// A repository's digest, or why there is none: a line of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// `owner/name`, as in the digest's key.
    pub id: RepoRef,
    /// The digest's key in the store; absent if readers have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What readers can count on.
    pub state: State,
    /// Why there is no current digest, for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Where the repository is.
    pub url: String,
    /// Its last push, as the feed has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feed_pushed_at: Option<PushedAt>,
    /// What the digest is; absent if readers have none.
    #[serde(flatten)]
    pub digest: Option<LineDigest>,
    /// Where its host says that it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renamed_to: Option<String>,
    /// What the feed tells of it.
    #[serde(flatten)]
    pub details: Details,
}

/// What a digest is: its record in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LineDigest {
    /// The push that it covers.
    pub pushed_at: PushedAt,
    /// When it was made, or last found unmoved.
    pub processed_at: String,
    /// HEAD's commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// SHA-256 of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Length of the text in bytes.
    pub bytes: u64,
    /// Estimated tokens of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Files and symbolic links that it is made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
    /// Whether the text was cut at its limit.
    pub truncated: bool,
    /// Version of the text's form.
    pub format: String,
}

impl From<&DigestMeta> for LineDigest {
    fn from(meta: &DigestMeta) -> Self {
        Self {
            pushed_at: meta.pushed_at.clone(),
            processed_at: meta.processed_at.clone(),
            commit: meta.commit.clone(),
            sha256: meta.sha256.clone(),
            bytes: meta.bytes,
            tokens: meta.tokens,
            files: meta.files,
            truncated: meta.truncated,
            format: meta.format.clone(),
        }
    }
}

impl Line {
    /// Returns the line of a repository in this state, without a digest.
    pub fn new(id: RepoRef, url: &str, state: State) -> Self {
        Self {
            id,
            key: None,
            state,
            message: None,
            url: url.to_owned(),
            feed_pushed_at: None,
            digest: None,
            renamed_to: None,
            details: Details::default(),
        }
    }

    /// Adds what readers have, if they have anything.
    #[must_use]
    pub fn with_digest(self, meta: Option<&DigestMeta>) -> Self {
        Self {
            key: meta.map(|_| self.id.digest_key()),
            digest: meta.map(LineDigest::from),
            ..self
        }
    }
}

/// What readers can count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum State {
    /// The digest is of the last push that the feed has.
    Current,
    /// The digest is of an earlier push; a later run makes it anew.
    Stale,
    /// There is no digest yet; a later run makes one.
    Missing,
    /// No digest of the last push could be made. There may be an older one.
    Failed(FaultKind),
    /// The repository is not in the feed any more; its digest is there for a while.
    Left,
    /// The digest was taken down.
    Withdrawn,
}

const STATES: [(State, &str); 5] = [
    (State::Current, "current"),
    (State::Stale, "stale"),
    (State::Missing, "missing"),
    (State::Left, "left"),
    (State::Withdrawn, "withdrawn"),
];

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, STATES.iter().find(|(state, _)| state == self)) {
            (Self::Failed(class), _) => write!(f, "failed: {class}"),
            (_, Some((_, word))) => f.write_str(word),
            (_, None) => unreachable!("the table has every other state"),
        }
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let state = match text.strip_prefix("failed: ") {
            Some(class) => class.parse().ok().map(Self::Failed),
            None => {
                let known = STATES.iter().find(|(_, word)| *word == text);
                known.map(|(state, _)| *state)
            }
        };
        state.ok_or_else(|| format!("{text:?} is not a state"))
    }
}

impl From<State> for String {
    fn from(state: State) -> Self {
        state.to_string()
    }
}

impl TryFrom<String> for State {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// The lines, one for each repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    /// By repository, in the order of the file.
    pub lines: BTreeMap<RepoRef, Line>,
}

impl Catalog {
    /// Adds a line, in place of the repository's earlier one.
    pub fn insert(&mut self, line: Line) {
        // Or else the key would keep its old spelling.
        self.lines.remove(&line.id);
        self.lines.insert(line.id.clone(), line);
    }

    /// Writes the file.
    ///
    /// # Panics
    /// Never: it is written to memory.
    pub fn encode(&self) -> Vec<u8> {
        let mut file = GzEncoder::new(Vec::new(), Compression::default());
        for line in self.lines.values() {
            serde_json::to_writer(&mut file, line).expect("only strings and numbers");
            file.write_all(b"\n").expect("memory");
        }
        file.finish().expect("memory")
    }

    /// Reads a file. Lines that are not what they should be are left out: a later program may have
    /// written them.
    ///
    /// # Errors
    /// If it is no gzip file of lines, or too large.
    pub fn decode(file: &[u8]) -> io::Result<Self> {
        let mut catalog = Self::default();
        let mut text = BufReader::new(GzDecoder::new(file).take(MAX_BYTES));
        let mut line = Vec::new();
        for _ in 0..MAX_LINES {
            line.clear();
            let read = text.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
            if read == 0 {
                return Ok(catalog);
            }
            if line.last() != Some(&b'\n') {
                break;
            }
            if let Ok(line) = serde_json::from_slice(&line) {
                catalog.insert(line);
            }
        }
        Err(io::Error::other(
            "it has more or longer lines than a catalogue",
        ))
    }
}

#[cfg(test)]
mod tests {
    use common::ids::RunId;

    use super::*;

    fn meta() -> DigestMeta {
        DigestMeta {
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            url: "https://github.com/a/b".to_owned(),
            processed_at: "2026-01-02T00:00:00Z".to_owned(),
            commit: Some("c0".to_owned()),
            format: "f/1".to_owned(),
            bytes: 7,
            truncated: false,
            run: RunId::new(),
            sha256: Some("5a".to_owned()),
            tokens: Some(2),
            files: Some(1),
        }
    }

    fn catalog() -> Catalog {
        let mut catalog = Catalog::default();
        let url = "https://github.com/a/b";
        let current = Line {
            feed_pushed_at: Some(meta().pushed_at),
            details: Details::of(r#"{"description":"What it is","forks":3}"#),
            ..Line::new("a/b".parse().unwrap(), url, State::Current)
        };
        catalog.insert(current.with_digest(Some(&meta())));
        catalog.insert(Line {
            message: Some("HTTP 404".to_owned()),
            ..Line::new("b/b".parse().unwrap(), url, State::Failed(FaultKind::Gone))
        });
        catalog
    }

    fn text_of(file: &[u8]) -> String {
        let mut text = String::new();
        GzDecoder::new(file).read_to_string(&mut text).unwrap();
        text
    }

    /// The catalogue is a contract with those who read the bucket.
    #[test]
    fn lines_are_as_published() {
        let file = catalog().encode();
        let expected = concat!(
            r#"{"id":"a/b","key":"gitingest/a/b/summary.txt","state":"current","url":"https://github.com/a/b","feedPushedAt":"2026-01-01T00:00:00Z","pushedAt":"2026-01-01T00:00:00Z","processedAt":"2026-01-02T00:00:00Z","commit":"c0","sha256":"5a","bytes":7,"tokens":2,"files":1,"truncated":false,"format":"f/1","description":"What it is","feed":{"forks":3}}"#,
            "\n",
            r#"{"id":"b/b","state":"failed: gone","message":"HTTP 404","url":"https://github.com/a/b"}"#,
            "\n"
        );
        assert_eq!(text_of(&file), expected);
        assert_eq!(Catalog::decode(&file).unwrap(), catalog());
    }

    #[test]
    fn what_is_no_catalogue_is_refused_and_what_is_no_line_is_left_out() {
        let compressed = |text: &str| {
            let mut file = GzEncoder::new(Vec::new(), Compression::fast());
            file.write_all(text.as_bytes()).unwrap();
            file.finish().unwrap()
        };
        let whole = catalog().encode();
        let long = "x".repeat(MAX_LINE as usize) + "\n";
        let too_many = "\n".repeat(MAX_LINES + 1);
        for bad in [
            b"".to_vec(),
            b"{}".to_vec(),
            whole[..whole.len() - 9].to_vec(),
            compressed("{}"),
            compressed(&long),
            compressed(&too_many),
        ] {
            assert!(Catalog::decode(&bad).is_err(), "{} bytes", bad.len());
        }
        let odd = format!("{{}}\n7\n{}", text_of(&whole).replace("current", "odd"));
        let read = Catalog::decode(&compressed(&odd)).unwrap();
        let ids: Vec<_> = read.lines.keys().map(RepoRef::to_string).collect();
        assert_eq!(ids, ["b/b"]);
    }

    #[test]
    fn every_state_is_read_as_it_is_written() {
        let failed = [FaultKind::Gone, FaultKind::TooLarge].map(State::Failed);
        for state in STATES.into_iter().map(|(state, _)| state).chain(failed) {
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        for text in ["", "failed", "failed: ", "failed: x", "Current"] {
            assert!(text.parse::<State>().is_err(), "{text}");
        }
    }
}
