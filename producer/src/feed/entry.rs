//! From the feed's bytes to its entries. Every entry is judged alone: one that is odd is listed
//! with its index and reason, and the others stand.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use common::ids::PushedAt;
use common::ids::{InvalidRepo, RepoRef};
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use url::Url;

use super::{FeedRepo, InvalidEntry};

/// More entries than this are no feed but an accident or an attack; the real feed has 24,500.
/// Together with the cap on bytes this bounds the memory that a feed can cost.
pub(super) const MAX_ENTRIES: usize = 1_000_000;
/// An address travels as an object's metadata, of which S3 takes 2 KB in all.
const MAX_ADDRESS_BYTES: usize = 1024;
/// How much of a text that is not a feed is quoted.
const QUOTED_CHARS: usize = 60;

/// The entries of a feed, in its order and not yet joined.
#[derive(Debug, Default)]
pub(super) struct Entries {
    /// How many the feed has.
    pub(super) total: usize,
    /// Usable ones.
    pub(super) repositories: Vec<FeedRepo>,
    /// The others.
    pub(super) invalid: Vec<InvalidEntry>,
}

/// Reads a feed's bytes. Bytes that are not UTF-8 count as U+FFFD, as they do in a browser, so
/// that a stray one in a description harms nothing and one in a name makes that entry invalid.
///
/// `folder` is what relative local addresses are relative to. Where the feed came from a server,
/// which has no business to name local paths, it is `None`; or empty where the operator allows
/// absolute ones.
///
/// # Errors
/// What was found instead of a JSON array of at most [`MAX_ENTRIES`] entries.
pub(super) fn parse(bytes: &[u8], folder: Option<&Path>) -> Result<Entries, String> {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_start_matches('\u{feff}').trim();
    match text.chars().next() {
        Some('[') => {}
        Some('{') => return Err(format!("found a JSON object: {}", quoted(text))),
        Some(_) => return Err(format!("found something else: {}", quoted(text))),
        None => return Err("found nothing in it".to_owned()),
    }
    let mut entries = Entries::default();
    let mut json = serde_json::Deserializer::from_str(text);
    json.deserialize_seq(Elements {
        folder,
        entries: &mut entries,
    })
    .and_then(|()| json.end())
    .map_err(|error| {
        let what = if error.is_eof() {
            "it ends in the middle"
        } else {
            "it is not JSON"
        };
        format!("after {} entries {what}: {error}", entries.total)
    })?;
    Ok(entries)
}

/// Hands each element of the array on as text, so that only what breaks the array is fatal.
struct Elements<'a> {
    folder: Option<&'a Path>,
    entries: &'a mut Entries,
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        // Skipping over an element does not recurse, however deep it is nested.
        while let Some(element) = elements.next_element::<&RawValue>()? {
            let index = self.entries.total;
            if index == MAX_ENTRIES {
                return Err(serde::de::Error::custom(format_args!(
                    "more than {MAX_ENTRIES} entries"
                )));
            }
            self.entries.total += 1;
            match read(index, element.get(), self.folder) {
                Ok(repo) => self.entries.repositories.push(repo),
                Err((reason, repo)) => self.entries.invalid.push(InvalidEntry {
                    index,
                    repo,
                    reason,
                }),
            }
        }
        Ok(())
    }
}

/// The fields of an entry that matter, in both spellings: the scraper's and that of GitHub's API.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    owner: Text,
    org: Text,
    name: Text,
    full_name: Text,
    url: Text,
    html_url: Text,
    #[serde(rename = "pushedAt")]
    pushed_at: Text,
    #[serde(rename = "pushed_at")]
    pushed_at_of_api: Text,
    archived: Flag,
}

/// Judges one entry. An error comes with the repository where the entry names one.
fn read(
    index: usize,
    json: &str,
    folder: Option<&Path>,
) -> Result<FeedRepo, (String, Option<RepoRef>)> {
    if !json.starts_with('{') {
        return Err((format!("not an object: {}", quoted(json)), None));
    }
    let entry: Entry = serde_json::from_str(json).map_err(|error| (error.to_string(), None))?;
    let repo = entry.repo().map_err(|reason| (reason, None))?;
    let rest = || -> Result<(String, PushedAt), String> {
        // Where GitHub's API gives both, its `url` is the address of the API, not of a repository.
        let url = first_text(&[("html_url", &entry.html_url), ("url", &entry.url)])?;
        let url = address(url, folder)?;
        let pushed_at = first_text(&[
            ("pushedAt", &entry.pushed_at),
            ("pushed_at", &entry.pushed_at_of_api),
        ])?;
        let pushed_at = PushedAt::new(pushed_at).map_err(|error| error.to_string())?;
        Ok((url, pushed_at))
    };
    match rest() {
        Ok((url, pushed_at)) => Ok(FeedRepo {
            index,
            repo,
            url,
            pushed_at,
            archived: entry.archived.0,
        }),
        Err(reason) => Err((reason, Some(repo))),
    }
}

impl Entry {
    /// `owner` or `org` with `name`; else `full_name`. (In GitHub's API `owner` is an object.)
    fn repo(&self) -> Result<RepoRef, String> {
        let owner = first_text(&[("owner", &self.owner), ("org", &self.org)]);
        let name = first_text(&[("name", &self.name)]);
        let repo: Result<RepoRef, InvalidRepo> = match (owner, name, &self.full_name) {
            (Ok(owner), Ok(name), _) => RepoRef::new(owner, name),
            (_, _, Text::Is(full_name)) if !full_name.is_empty() => full_name.parse(),
            (Err(reason), _, _) | (_, Err(reason), _) => return Err(reason),
        };
        repo.map_err(|error| error.to_string())
    }
}

/// The first of the fields that is a non-empty text; else what is wrong with the first that is
/// there at all.
fn first_text<'a>(fields: &[(&str, &'a Text)]) -> Result<&'a str, String> {
    let mut wrong = None;
    for (name, field) in fields {
        match field {
            Text::Is(text) if !text.is_empty() => return Ok(text),
            Text::Is(_) => _ = wrong.get_or_insert_with(|| format!("{name} is empty")),
            Text::Other(kind) => {
                _ = wrong.get_or_insert_with(|| format!("{name} is {kind}, not a text"));
            }
            Text::Absent => {}
        }
    }
    Err(wrong.unwrap_or_else(|| {
        let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
        format!("{} is missing", names.join(" or "))
    }))
}

/// Checks where a repository is to be fetched from. Reasons never repeat the address: it may hold
/// a password.
fn address(text: &str, folder: Option<&Path>) -> Result<String, String> {
    if text.len() > MAX_ADDRESS_BYTES {
        return Err(format!(
            "url has {} bytes, more than {MAX_ADDRESS_BYTES}",
            text.len()
        ));
    }
    if text.chars().any(char::is_control) {
        return Err("url holds a control character".to_owned());
    }
    match text.split_once("://") {
        Some(_) => web_address(text),
        None => local_address(text, folder),
    }
}

fn web_address(text: &str) -> Result<String, String> {
    // Programs disagree about what these mean inside an address.
    if text.contains(|c: char| c.is_whitespace() || c == '\\') {
        return Err("url holds a space or backslash".to_owned());
    }
    let url = Url::parse(text).map_err(|error| format!("url does not parse: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("url is not of https or http".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("url holds credentials, which a feed must not give away".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("url has a ? or # part, which no repository needs".to_owned());
    }
    // Only what metadata cannot hold is spelled anew.
    Ok(if text.is_ascii() {
        text.to_owned()
    } else {
        url.into()
    })
}

fn local_address(text: &str, folder: Option<&Path>) -> Result<String, String> {
    let before_slash = text.split('/').next().unwrap_or_default();
    if before_slash.contains(':') {
        return Err("url is not of https or http".to_owned());
    }
    let Some(folder) = folder else {
        return Err(
            "url is a local path, which only a local feed may name, or any with --allow-local"
                .to_owned(),
        );
    };
    let path = folder.join(text);
    if path.is_relative() {
        return Err("url is a relative path, which only a local feed may name".to_owned());
    }
    // Where it does not exist the fetch will say so, with the path.
    let path = path.canonicalize().unwrap_or_else(|_| tidied(&path));
    match path.into_os_string().into_string() {
        Ok(path) if path.is_ascii() && path.len() <= MAX_ADDRESS_BYTES => Ok(path),
        _ => Err(format!(
            "url is a path of more than {MAX_ADDRESS_BYTES} bytes or with other than ASCII \
             characters, which metadata cannot hold"
        )),
    }
}

/// Takes `.` and `..` out of an absolute path as written.
fn tidied(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => _ = tidy.pop(),
            other => tidy.push(other),
        }
    }
    tidy
}

/// The beginning of a text from outside, safe to print.
fn quoted(text: &str) -> String {
    let beginning: String = text.chars().take(QUOTED_CHARS).collect();
    let dots = if beginning.len() < text.len() {
        "…"
    } else {
        ""
    };
    format!("{beginning:?}{dots}")
}

/// A field that should be a text, whatever it is.
#[derive(Debug, Default)]
enum Text {
    #[default]
    Absent,
    Is(String),
    Other(&'static str),
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text::Is(text.to_owned()))
            }

            fn visit_unit<E>(self) -> Result<Text, E> {
                Ok(Text::Absent)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Text, E> {
                Ok(Text::Other("true or false"))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Text, E> {
                Ok(Text::Other("a number"))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Text, E> {
                Ok(Text::Other("a number"))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Text, E> {
                Ok(Text::Other("a number"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<Text, A::Error> {
                IgnoredAny.visit_seq(elements)?;
                Ok(Text::Other("a list"))
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Text, A::Error> {
                IgnoredAny.visit_map(fields)?;
                Ok(Text::Other("an object"))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// `true` where the field is just that.
#[derive(Debug, Default)]
struct Flag(bool);

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = <&RawValue>::deserialize(deserializer)?;
        Ok(Self(json.get() == "true"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(json: &str) -> Result<FeedRepo, String> {
        read(0, json, None).map_err(|(reason, _)| reason)
    }

    #[test]
    fn both_spellings_are_read() {
        let scraper = one(
            r#"{"owner":"alphagov","name":"whitehall","description":"Government \u00e9 publishing",
                "url":"https://github.com/alphagov/whitehall","archived":true,
                "license":{"key":"mit","name":"MIT License","spdxId":"MIT"},"stargazersCount":712,
                "language":"Ruby","forksCount":191,"openIssuesCount":7,
                "createdAt":"2011-08-22T15:38:14Z","updatedAt":"2026-11-21T08:00:00Z",
                "pushedAt":"2026-11-22T10:00:00Z"}"#,
        )
        .unwrap();
        assert_eq!(scraper.repo.to_string(), "alphagov/whitehall");
        assert_eq!(scraper.url, "https://github.com/alphagov/whitehall");
        assert_eq!(scraper.pushed_at.as_str(), "2026-11-22T10:00:00Z");
        assert!(scraper.archived);

        let api = one(
            r#"{"full_name":"alphagov/whitehall","name":"whitehall","owner":{"login":"alphagov"},
                "url":"https://api.github.com/repos/alphagov/whitehall",
                "html_url":"https://github.com/alphagov/whitehall","archived":true,
                "pushed_at":"2026-11-22T10:00:00Z"}"#,
        )
        .unwrap();
        assert_eq!(api, scraper);

        let org = one(
            r#"{"org":"alphagov","name":"whitehall","url":"https://github.com/alphagov/whitehall",
                "pushedAt":"2026-11-22T10:00:00Z","archived":"yes"}"#,
        )
        .unwrap();
        assert_eq!(org.repo, scraper.repo);
        assert!(!org.archived, "only true is true");
    }

    #[test]
    fn what_an_entry_lacks_is_said() {
        const U: &str = "https://github.com/a/b";
        for (json, reason) in [
            ("7", "not an object: \"7\""),
            ("null", "not an object"),
            ("[{}]", "not an object"),
            ("{}", "owner or org is missing"),
            (r#"{"owner":"a"}"#, "name is missing"),
            (r#"{"owner":null,"org":"","name":"b"}"#, "org is empty"),
            (r#"{"owner":7,"name":"b"}"#, "owner is a number, not a text"),
            (r#"{"owner":"a","name":["b"]}"#, "name is a list"),
            (r#"{"owner":"a","name":"b"}"#, "html_url or url is missing"),
            (r#"{"owner":"..","name":"b"}"#, "owner \"..\" is not"),
            (r#"{"owner":"a","name":".."}"#, "name \"..\" is not"),
            (r#"{"owner":"a","name":"b\u0000"}"#, "name \"b\\0\" is not"),
            (r#"{"full_name":"a"}"#, "expected owner/name"),
            (r#"{"full_name":"a/b/c"}"#, "name \"b/c\" is not"),
            (r#"{"owner":"a","owner":"c","name":"b"}"#, "duplicate field"),
            (r#"{"owner":"\ud800","name":"b"}"#, "hex escape"),
            (
                &format!(r#"{{"owner":"a","name":"b","url":"{U}"}}"#),
                "pushedAt or pushed_at is missing",
            ),
            (
                &format!(r#"{{"owner":"a","name":"b","url":"{U}","pushedAt":" "}}"#),
                "pushedAt is empty, longer",
            ),
            (
                &format!(r#"{{"owner":"a","name":"b","url":"{U}","pushedAt":true}}"#),
                "pushedAt is true or false, not a text",
            ),
        ] {
            let found = one(json).unwrap_err();
            assert!(found.contains(reason), "{json}: {found}");
        }
    }

    #[test]
    fn an_invalid_entry_names_its_repository_where_it_has_one() {
        let (_, repo) = read(0, r#"{"owner":"a","name":"b"}"#, None).unwrap_err();
        assert_eq!(repo.unwrap().to_string(), "a/b");
        let (_, repo) = read(0, r#"{"owner":"a","name":"../b"}"#, None).unwrap_err();
        assert_eq!(repo, None);
    }

    #[test]
    fn addresses_with_secrets_or_tricks_are_refused_without_repeating_them() {
        let long = format!("https://h/{}", "s3cret".repeat(1000));
        for text in [
            "https://user:s3cret@github.com/a/b",
            "https://s3cret@github.com/a/b",
            "https://github.com/a/b?token=s3cret",
            "https://github.com/a/b#s3cret",
            "https://github.com/a/s3cret\nb",
            "https://github.com\\@evil.example/s3cret",
            "https://github.com/a b/s3cret",
            " https://github.com/a/s3cret",
            "https://",
            "https://[s3cret/",
            "https://host:s3cret/",
            "ssh://git@github.com/a/s3cret",
            "git@github.com:a/s3cret.git",
            "file:///etc/s3cret",
            "javascript:s3cret",
            "s3cret/../..",
            "/etc/s3cret",
            &long,
        ] {
            let reason = address(text, None).unwrap_err();
            assert!(!reason.contains("s3cret"), "{reason}");
        }
    }

    #[test]
    fn addresses_are_kept_as_written() {
        for text in [
            "https://github.com/a/b.git",
            "HTTPS://GitHub.com:443/A/B/",
            "http://127.0.0.1:8080/a",
        ] {
            assert_eq!(address(text, None).unwrap(), text);
        }
        assert_eq!(
            address("https://exämple.org/ä", None).unwrap(),
            "https://xn--exmple-cua.org/%C3%A4"
        );
    }

    #[test]
    fn local_addresses_are_relative_to_the_feed() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        std::fs::create_dir(folder.join("repo")).unwrap();
        let shown = |path: PathBuf| path.into_os_string().into_string().unwrap();
        let local = |text: &str| address(text, Some(&folder)).unwrap();
        assert_eq!(local("repo"), shown(folder.join("repo")));
        assert_eq!(local("./repo/../repo"), shown(folder.join("repo")));
        assert_eq!(local(".."), shown(folder.parent().unwrap().to_owned()));
        assert_eq!(local("absent/x/../y"), shown(folder.join("absent/y")));
        assert_eq!(local("/srv/absent/git"), "/srv/absent/git");
        assert!(address("file:///srv/git", Some(&folder)).is_err());
        assert!(address("git@github.com:a/b", Some(&folder)).is_err());

        // Allowed, but relative to nothing.
        let allowed = |text: &str| address(text, Some(Path::new("")));
        assert_eq!(allowed("/srv/x/../absent").unwrap(), "/srv/absent");
        for text in ["repo", "./repo", "..", "~/repo", "file:///srv/git"] {
            assert!(allowed(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_not_an_array_is_quoted_briefly() {
        let html = format!("<!DOCTYPE html>\u{1b}{}", "x".repeat(10_000));
        for (text, found) in [
            ("", "found nothing in it"),
            (" \n", "found nothing in it"),
            (
                r#"{"message":"rate limit"}"#,
                r#"found a JSON object: "{\"message\":\"rate limit\"}""#,
            ),
            ("null", "found something else: \"null\""),
            (&html, "found something else: \"<!DOCTYPE html>\\u{1b}xxx"),
            ("[{}, {}", "after 2 entries it ends in the middle"),
            ("[{\"owner\":\"a", "after 0 entries it ends in the middle"),
            ("[{}, oops]", "after 1 entries it is not JSON"),
            ("[{}] []", "after 1 entries it is not JSON"),
            ("[{},]", "after 1 entries it is not JSON"),
        ] {
            let error = parse(text.as_bytes(), None).unwrap_err();
            assert!(error.contains(found), "{text:.40}: {error}");
            assert!(error.len() < 200, "{error}");
        }
    }

    #[test]
    fn no_depth_and_no_byte_of_one_entry_costs_the_others() {
        let depth = 200_000;
        let rest: &[u8] = br#""url":"https://h/a","pushedAt":"1"}"#;
        let mut feed = b"\xef\xbb\xbf[{\"owner\":\"a\",\"name\":\"b\",".to_vec();
        feed.extend(rest);
        feed.extend(format!(",{}{}", "[".repeat(depth), "]".repeat(depth)).bytes());
        for field in ["description", "owner"] {
            feed.extend(format!(",{{\"{field}\":{}1", "{\"x\":".repeat(depth)).bytes());
            feed.extend("}".repeat(depth + 1).bytes());
        }
        feed.extend(b",{\"owner\":\"a\xff\",\"name\":\"b\",");
        feed.extend(rest);
        feed.extend(b",{\"owner\":\"a\",\"name\":\"c\",\"description\":\"\xff\\ud800\",");
        feed.extend(rest);
        feed.extend(b"]");
        let entries = parse(&feed, None).unwrap();
        assert_eq!(entries.total, 6);
        let names: Vec<_> = entries
            .repositories
            .iter()
            .map(|entry| entry.repo.to_string())
            .collect();
        assert_eq!(names, ["a/b", "a/c"]);
        let invalid: Vec<_> = entries.invalid.iter().map(|entry| entry.index).collect();
        assert_eq!(invalid, [1, 2, 3, 4]);
    }

    #[test]
    fn a_feed_of_too_many_entries_is_refused() {
        let feed = format!("[{}0]", "0,".repeat(MAX_ENTRIES));
        let error = parse(feed.as_bytes(), None).unwrap_err();
        assert!(error.contains("more than 1000000 entries"), "{error}");
    }
}
