//! From the feed's bytes to its entries. Each entry is judged alone: an unusable one is listed with
//! its index and the reason, and does not affect the others.

use std::path::{Component, Path, PathBuf};

use common::fault::FaultKind;
use common::ids::{JobKey, PushedAt, RepoRef};
use common::run::documents::Failure;
use serde::Deserialize;
use serde_json::value::RawValue;
use url::Url;
use worker::fetch::address;

use super::details::Details;
use super::form::{self, Form, quoted};

/// An address travels in an object's metadata, of which S3 takes 2 KB in all.
const MAX_ADDRESS_BYTES: usize = 1024;

/// One repository of the feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedRepo {
    /// Its place in the feed, from 0.
    pub index: usize,
    /// Its owner and name.
    pub repo: RepoRef,
    /// Where to fetch it from: `https://…` or `http://…` without credentials, or an absolute path
    /// (in a local feed, or with `--allow-local`). At most 1,024 bytes of ASCII.
    pub url: String,
    /// Its last push.
    pub pushed_at: PushedAt,
    /// What else the feed tells of it.
    pub details: Details,
}

impl FeedRepo {
    /// Returns the key by which a run counts its job.
    pub fn key(&self) -> JobKey {
        JobKey {
            repo: self.repo.clone(),
            pushed_at: self.pushed_at.clone(),
        }
    }
}

/// An entry of the feed that cannot become a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidEntry {
    /// Its place in the feed, from 0.
    pub index: usize,
    /// Its repository, if the entry names one.
    pub repo: Option<RepoRef>,
    /// What is wrong with it; never its address, which may contain a password.
    pub reason: String,
}

/// The entries of a feed, in its order and not yet joined.
#[derive(Debug, Default)]
pub(super) struct Entries {
    /// How many the feed has.
    total: usize,
    /// Usable ones.
    pub(super) repositories: Vec<FeedRepo>,
    /// The others.
    pub(super) invalid: Vec<InvalidEntry>,
    /// What the feed looked like.
    pub(super) form: Form,
    /// Who writes entries like the first usable one.
    pub(super) source: Option<Source>,
}

/// Who writes entries with such fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::Display)]
pub(super) enum Source {
    /// The scraper of the UK's public bodies, and feeds made as the README says.
    #[strum(to_string = "")]
    Scraper,
    #[strum(to_string = "fields of GitHub's API")]
    GitHub,
    #[strum(to_string = "fields of `gh repo list`")]
    GitHubTool,
    #[strum(to_string = "fields of GitLab")]
    GitLab,
    #[strum(to_string = "fields of Gitea or Forgejo")]
    Gitea,
    #[strum(to_string = "fields of code.json")]
    CodeJson,
}

/// Parses a feed. Bytes that are not UTF-8 become U+FFFD, as in a browser: one in a description
/// does no harm, one in a name makes that entry invalid.
///
/// `folder` is the base of relative local addresses: empty if only absolute ones are allowed, `None`
/// if the feed must not name local paths, as one from a server.
///
/// # Errors
/// As [`form::entries`].
pub(super) fn parse(bytes: &[u8], folder: Option<&Path>) -> Result<Entries, String> {
    let text = String::from_utf8_lossy(bytes);
    let mut entries = Entries::default();
    entries.form = form::entries(&text, names_one, |entry| entries.take(entry, folder))?;
    Ok(entries)
}

/// Whether an object that stands alone is an entry: it says which repository it is about.
fn names_one(object: &str) -> bool {
    let entry: Result<FeedEntry<'_>, _> = serde_json::from_str(object);
    entry.is_ok_and(|entry| entry.repo().is_ok())
}

impl Entries {
    fn take(&mut self, json: &str, folder: Option<&Path>) {
        let index = self.total;
        self.total += 1;
        match read(index, json, folder) {
            Ok((repo, source)) => {
                self.source.get_or_insert(source);
                self.repositories.push(repo);
            }
            Err((reason, repo)) => self.invalid.push(InvalidEntry {
                index,
                repo,
                reason,
            }),
        }
    }
}

/// The fields of an entry that matter, in all spellings that are known, as JSON.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FeedEntry<'a> {
    #[serde(borrow)]
    owner: Option<&'a RawValue>,
    org: Option<&'a RawValue>,
    name: Option<&'a RawValue>,
    full_name: Option<&'a RawValue>,
    #[serde(rename = "nameWithOwner")]
    name_with_owner: Option<&'a RawValue>,
    path_with_namespace: Option<&'a RawValue>,
    url: Option<&'a RawValue>,
    html_url: Option<&'a RawValue>,
    http_url_to_repo: Option<&'a RawValue>,
    web_url: Option<&'a RawValue>,
    #[serde(rename = "repositoryURL")]
    repository_url: Option<&'a RawValue>,
    #[serde(rename = "pushedAt")]
    pushed_at: Option<&'a RawValue>,
    #[serde(rename = "pushed_at")]
    pushed_at_of_api: Option<&'a RawValue>,
    last_activity_at: Option<&'a RawValue>,
    updated_at: Option<&'a RawValue>,
    date: Option<&'a RawValue>,
}

/// The account, where it is an object.
#[derive(Debug, Deserialize)]
struct Owner<'a> {
    #[serde(borrow)]
    login: Option<&'a RawValue>,
}

/// The dates of an entry of a code.json: often no more than a day.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Dates<'a> {
    #[serde(borrow)]
    last_modified: Option<&'a RawValue>,
    metadata_last_updated: Option<&'a RawValue>,
}

/// Parses one entry. An error comes with the repository if the entry names one.
fn read(
    index: usize,
    json: &str,
    folder: Option<&Path>,
) -> Result<(FeedRepo, Source), (String, Option<RepoRef>)> {
    if !json.starts_with('{') {
        return Err((format!("not an object: {}", quoted(json)), None));
    }
    let entry: FeedEntry<'_> =
        serde_json::from_str(json).map_err(|error| (error.to_string(), None))?;
    let repo = entry.repo().map_err(|reason| (reason, None))?;
    let rest = || -> Result<(String, PushedAt), String> {
        let url = address(&entry.address()?, folder)?;
        let pushed_at = PushedAt::new(&entry.pushed()?).map_err(|error| error.to_string())?;
        Ok((url, pushed_at))
    };
    match rest() {
        Ok((url, pushed_at)) => {
            let repo = FeedRepo {
                index,
                repo,
                url,
                pushed_at,
                details: Details::of(json),
            };
            Ok((repo, entry.source()))
        }
        Err(reason) => Err((reason, Some(repo))),
    }
}

impl<'a> FeedEntry<'a> {
    /// Returns GitLab's path; else `owner` or `org` with `name`; else `owner/name` in one field; else
    /// the path of a code.json's address.
    fn repo(&self) -> Result<RepoRef, String> {
        // Its `name` is for people, and may be anything.
        if let Ok(path) = first_text(&[("path_with_namespace", self.path_with_namespace)]) {
            return of_path(&path);
        }
        let owner = first_text(&[("owner", self.owner), ("org", self.org)]);
        let name = first_text(&[("name", self.name)]);
        let both = first_text(&[
            ("full_name", self.full_name),
            ("nameWithOwner", self.name_with_owner),
        ]);
        let repo = match (owner, name, both, self.repository_url) {
            (Ok(owner), Ok(name), ..) => RepoRef::new(&owner, &name),
            (_, _, Ok(both), _) => both.parse(),
            (_, _, _, Some(_)) => return self.repo_of_address(),
            (Err(reason), Ok(name), ..) => match self.login() {
                Some(owner) => RepoRef::new(&owner, &name),
                None => return Err(reason),
            },
            (Err(reason), ..) | (_, Err(reason), ..) => return Err(reason),
        };
        repo.map_err(|error| error.to_string())
    }

    /// Returns the account of an `owner` that is an object.
    fn login(&self) -> Option<String> {
        let owner: Owner<'_> = serde_json::from_str(self.owner?.get()).ok()?;
        first_text(&[("login", owner.login)]).ok()
    }

    fn repo_of_address(&self) -> Result<RepoRef, String> {
        let url = first_text(&[("repositoryURL", self.repository_url)])?;
        let path = Url::parse(&url).map_err(|error| format!("repositoryURL: {error}"))?;
        let path = path.path().trim_matches('/');
        of_path(path.strip_suffix(".git").unwrap_or(path))
    }

    fn address(&self) -> Result<String, String> {
        // In GitHub's API, `url` is the address of the API, and `html_url` the repository's.
        first_text(&[
            ("html_url", self.html_url),
            ("url", self.url),
            ("http_url_to_repo", self.http_url_to_repo),
            ("web_url", self.web_url),
            ("repositoryURL", self.repository_url),
        ])
    }

    fn pushed(&self) -> Result<String, String> {
        let dates = self.date.map(RawValue::get).unwrap_or_default();
        let dates: Dates<'_> = serde_json::from_str(dates).unwrap_or_default();
        let mut pushed = first_text(&[
            ("pushedAt", self.pushed_at),
            ("pushed_at", self.pushed_at_of_api),
            ("last_activity_at", self.last_activity_at),
            // Gitea tells no more.
            ("updated_at", self.updated_at),
            ("date.lastModified", dates.last_modified),
            ("date.metadataLastUpdated", dates.metadata_last_updated),
        ])?;
        if self.date.is_some() && pushed.len() == "2026-01-02".len() {
            pushed.push_str("T00:00:00Z");
        }
        Ok(pushed)
    }

    fn source(&self) -> Source {
        let is_object = |field: Option<&RawValue>| field.is_some_and(|f| f.get().starts_with('{'));
        match self {
            _ if self.path_with_namespace.is_some() => Source::GitLab,
            _ if self.repository_url.is_some() => Source::CodeJson,
            _ if self.name_with_owner.is_some() => Source::GitHubTool,
            _ if is_object(self.owner) && self.pushed_at.is_some() => Source::GitHubTool,
            _ if self.pushed_at_of_api.is_some() && self.html_url.is_some() => Source::GitHub,
            _ if self.full_name.is_some() && self.updated_at.is_some() => Source::Gitea,
            _ => Source::Scraper,
        }
    }
}

/// Returns the repository of a path in which groups may be nested, as GitLab's are: `a/b/c` is `c` of
/// the owner `a.b`. No part has a dot of its own, so no two groups share an owner.
fn of_path(path: &str) -> Result<RepoRef, String> {
    let (owner, name) = path
        .rsplit_once('/')
        .ok_or_else(|| format!("expected owner/name, got {}", quoted(path)))?;
    if owner.contains('.') {
        let owner = quoted(owner);
        return Err(format!(
            "owner {owner} has a dot, which here separates nested groups"
        ));
    }
    RepoRef::new(&owner.replace('/', "."), name).map_err(|error| error.to_string())
}

/// Returns the first non-empty text; else says what is wrong with the first field that is there.
fn first_text(fields: &[(&str, Option<&RawValue>)]) -> Result<String, String> {
    let mut wrong = None;
    for (name, field) in fields {
        let Some(json) = field.map(RawValue::get) else {
            continue;
        };
        let reason = match json.as_bytes().first() {
            Some(b'"') => match serde_json::from_str::<String>(json) {
                Ok(text) if !text.is_empty() => return Ok(text),
                Ok(_) => format!("{name} is empty"),
                Err(error) => format!("{name}: {error}"),
            },
            Some(b'[') => format!("{name} is a list, not a text"),
            Some(b'{') => format!("{name} is an object, not a text"),
            Some(b't' | b'f') => format!("{name} is true or false, not a text"),
            _ => format!("{name} is a number, not a text"),
        };
        wrong.get_or_insert(reason);
    }
    Err(wrong.unwrap_or_else(|| {
        let names: Vec<_> = fields.iter().take(2).map(|(name, _)| *name).collect();
        format!("{} is missing", names.join(" or "))
    }))
}

impl InvalidEntry {
    /// Returns the failure that a run counts.
    pub fn failure(&self) -> Failure {
        let place = format!("entry {}", self.index);
        let (repo, message) = match &self.repo {
            Some(repo) => (repo.to_string(), format!("{place}: {}", self.reason)),
            None => (place, self.reason.clone()),
        };
        Failure {
            repo,
            class: FaultKind::InvalidEntry,
            message,
        }
    }
}

/// Checks an address to fetch from. Reasons never repeat it: it may contain a password.
fn address(text: &str, folder: Option<&Path>) -> Result<String, String> {
    let text = short_enough(text)?;
    if text.chars().any(char::is_control) {
        return Err("url contains a control character".to_owned());
    }
    // Mirrors are often in folders that are called like their hosts.
    let path = folder.map(|folder| folder.join(text));
    if !text.contains("://") && path.is_some_and(|path| path.is_absolute() && path.exists()) {
        return local_address(text, folder);
    }
    match address::parse(text).map_err(|why| format!("url {why}"))? {
        // Each letter beyond ASCII is three to twelve bytes in it.
        Some(address) => short_enough(web_address(&address.url)?),
        None => local_address(text, folder),
    }
}

/// Returns an address unless it is too long for metadata.
fn short_enough<T: AsRef<str>>(address: T) -> Result<T, String> {
    match address.as_ref().len() {
        0..=MAX_ADDRESS_BYTES => Ok(address),
        bytes => Err(format!(
            "url has {bytes} bytes, more than {MAX_ADDRESS_BYTES}"
        )),
    }
}

fn web_address(text: &str) -> Result<String, String> {
    // Programs disagree about their meaning inside an address.
    if text.contains(|c: char| c.is_whitespace() || c == '\\') {
        return Err("url contains a space or backslash".to_owned());
    }
    let url = Url::parse(text).map_err(|error| format!("url does not parse: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("url is neither https nor http".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("url contains credentials, which a feed must not publish".to_owned());
    }
    // Metadata is ASCII: only other addresses are rewritten.
    Ok(if text.is_ascii() {
        text.to_owned()
    } else {
        url.into()
    })
}

fn local_address(text: &str, folder: Option<&Path>) -> Result<String, String> {
    let before_slash = text.split('/').next().unwrap_or_default();
    if before_slash.contains(':') {
        return Err("url is neither https nor http".to_owned());
    }
    let Some(folder) = folder else {
        return Err(
            "url is a local path, which only a local feed may contain, or any with --allow-local"
                .to_owned(),
        );
    };
    let path = folder.join(text);
    if path.is_relative() {
        return Err("url is a relative path, which only a local feed may contain".to_owned());
    }
    // If it does not exist, the fetch will fail with this path.
    let path = path.canonicalize().unwrap_or_else(|_| tidied(&path));
    match path.into_os_string().into_string() {
        Ok(path) if path.is_ascii() && path.len() <= MAX_ADDRESS_BYTES => Ok(path),
        _ => Err(format!(
            "url is a path that is not ASCII or over {MAX_ADDRESS_BYTES} bytes"
        )),
    }
}

/// Removes `.` and `..` from an absolute path, without looking at the disk.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn one(json: &str) -> Result<FeedRepo, String> {
        read(0, json, None)
            .map(|(repo, _)| repo)
            .map_err(|(reason, _)| reason)
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
        assert_eq!(scraper.details.archived, Some(true));

        let api = one(
            r#"{"full_name":"alphagov/whitehall","name":"whitehall","owner":{"login":"alphagov"},
                "url":"https://api.github.com/repos/alphagov/whitehall",
                "html_url":"https://github.com/alphagov/whitehall","archived":true,
                "pushed_at":"2026-11-22T10:00:00Z"}"#,
        )
        .unwrap();
        let api = FeedRepo {
            details: scraper.details.clone(),
            ..api
        };
        assert_eq!(api, scraper);

        let org = one(
            r#"{"org":"alphagov","name":"whitehall","url":"https://github.com/alphagov/whitehall",
                "pushedAt":"2026-11-22T10:00:00Z","archived":"yes"}"#,
        )
        .unwrap();
        assert_eq!(org.repo, scraper.repo);
        assert_eq!(org.details.archived, None, "only true is true");
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
            (
                r#"{"owner":{"id":1},"name":"b"}"#,
                "owner is an object, not a text",
            ),
            (r#"{"path_with_namespace":"b"}"#, "expected owner/name"),
            (
                r#"{"path_with_namespace":"a.b/c/d"}"#,
                "owner \"a.b/c\" has a dot",
            ),
            (r#"{"path_with_namespace":"a//d"}"#, "owner \"a.\" is not"),
            (r#"{"full_name":"a/b/c"}"#, "name \"b/c\" is not"),
            (r#"{"owner":"a","owner":"c","name":"b"}"#, "duplicate field"),
            (r#"{"owner":"\ud800","name":"b"}"#, "hex escape"),
            (
                &format!(r#"{{"owner":"a","name":"b","url":"{U}"}}"#),
                "pushedAt or pushed_at is missing",
            ),
            (
                &format!(r#"{{"owner":"a","name":"b","url":"{U}","pushedAt":" "}}"#),
                "pushedAt \" \" is not an RFC 3339 time",
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
            "ssh://git@git.example.org/a/s3cret",
            "someone@github.example:a/s3cret.git",
            "https://github.com/s3cret",
            "https://github.com/a/b/s3cret",
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
        for (text, expected) in [
            ("https://github.com/a/b/tree/main", "https://github.com/a/b"),
            ("https://github.com/a/b/issues/5", "https://github.com/a/b"),
            ("github.com/a/b", "https://github.com/a/b"),
            ("git@github.com:a/b.git", "https://github.com/a/b.git"),
        ] {
            assert_eq!(address(text, None).unwrap(), expected);
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
        // A folder that is there is meant.
        let mirror = folder.join("github.com/a/b");
        assert_eq!(local("github.com/a/b"), "https://github.com/a/b");
        std::fs::create_dir_all(&mirror).unwrap();
        assert_eq!(local("github.com/a/b"), shown(mirror));

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
            ("[{}] oops", "after 1 entry it is not JSON"),
            ("[{},]", "after 1 entry it is not JSON"),
        ] {
            let error = parse(text.as_bytes(), None).unwrap_err();
            assert!(error.contains(found), "{text:.40}: {error}");
            assert!(error.len() < 200, "{error}");
        }
    }

    #[test]
    fn no_depth_and_no_byte_of_one_entry_costs_the_others() {
        let depth = 200_000;
        let rest: &[u8] = br#""url":"https://h/a","pushedAt":"2026-01-01T00:00:00Z"}"#;
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
        let feed = format!("[{}0]", "0,".repeat(form::MAX_ENTRIES));
        let error = parse(feed.as_bytes(), None).unwrap_err();
        assert!(error.contains("more than 1,000,000 entries"), "{error}");
    }

    #[test]
    fn an_unusable_entry_is_a_failure_that_says_where() {
        let mut entry = InvalidEntry {
            index: 7,
            repo: None,
            reason: "owner or org is missing".to_owned(),
        };
        let failure = entry.failure();
        assert_eq!(
            (failure.repo.as_str(), failure.message.as_str()),
            ("entry 7", "owner or org is missing")
        );
        entry.repo = Some("a/b".parse().unwrap());
        let failure = entry.failure();
        assert_eq!(
            (failure.repo.as_str(), failure.message.as_str()),
            ("a/b", "entry 7: owner or org is missing")
        );
        assert_eq!(failure.class, FaultKind::InvalidEntry);
    }
}
