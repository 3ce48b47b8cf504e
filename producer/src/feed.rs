//! The feed: where it comes from, what it says, and which of its repositories a run is about.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use common::exit::{self, ExitError};
use common::fault::FaultKind;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::retry::{Attempt, Policy, retry};
use common::run::documents::Failure;
use common::text::thousands;
use globset::{GlobBuilder, GlobMatcher};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tracing::{debug, info, warn};
use url::{Host, Url};

mod entry;

/// Where the feed of UK government repositories is published every night.
pub const DEFAULT_FEED: &str =
    "https://uk-x-gov-software-community.github.io/xgov-opensource-repo-scraper/repos.json";

/// How many reasons are named where no entry is usable.
const REASONS_LISTED: usize = 3;

/// Where the feed is and how much patience it deserves.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Feed")]
pub struct FeedConfig {
    /// The feed: a URL, or a file.
    #[arg(long, env = "FEED", value_name = "URL|FILE", default_value = DEFAULT_FEED)]
    pub feed: Source,

    /// Largest feed that is read, in bytes.
    #[arg(long, env = "MAX_FEED_BYTES", value_name = "BYTES", default_value_t = 256 << 20)]
    pub max_feed_bytes: u64,

    /// Longest time that one attempt to fetch the feed may take, in seconds.
    #[arg(long, env = "FEED_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub feed_timeout: Duration,

    /// Fetch the feed over plain http too. (From this machine itself that is always allowed.)
    #[arg(long, env = "ALLOW_HTTP_FEED")]
    pub allow_http_feed: bool,

    /// Accept a feed that is empty or has no usable entry, instead of ending with exit code 65.
    #[arg(long, env = "ALLOW_EMPTY_FEED")]
    pub allow_empty_feed: bool,

    /// Address of whoever runs this, for the User-Agent: what a server's operator can turn to.
    #[arg(long, env = "CONTACT", value_name = "URL|MAIL", value_parser = contact)]
    pub contact: Option<String>,

    /// When an attempt to fetch is followed by another.
    #[arg(skip = Policy::three_attempts())]
    pub retry: Policy,
}

/// Where a feed comes from. Shown without what may be secret: credentials and query.
#[derive(Clone, PartialEq, Eq)]
pub enum Source {
    /// A server.
    Url(Url),
    /// A file of this machine.
    File(PathBuf),
}

/// The feed as read: its repositories once each, and what else stood in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Where it came from, fit to be shown.
    pub origin: String,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
    /// Each repository once, at the place of its first entry.
    pub repositories: Vec<FeedRepo>,
    /// Entries that name no usable repository.
    pub invalid: Vec<InvalidEntry>,
    /// Entries that gave way to another of the same repository.
    pub repeated: Vec<Repetition>,
}

/// One repository of the feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedRepo {
    /// Its place in the feed, from 0.
    pub index: usize,
    /// Which.
    pub repo: RepoRef,
    /// Where to fetch it from: `https://…` or `http://…` without credentials, or an absolute path
    /// (of a local feed, or by `--allow-local`). At most 1,024 bytes of ASCII.
    pub url: String,
    /// Its last push.
    pub pushed_at: PushedAt,
    /// Whether the feed calls it archived.
    pub archived: bool,
}

/// An entry of the feed that cannot become a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidEntry {
    /// Its place in the feed, from 0.
    pub index: usize,
    /// Its repository, where that much is in order.
    pub repo: Option<RepoRef>,
    /// What is wrong with it; never its address, which may hold a password.
    pub reason: String,
}

/// An entry that gave way to another of the same repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repetition {
    /// Which repository.
    pub repo: RepoRef,
    /// The push that counts.
    pub kept: PushedAt,
    /// The push of the entry that gave way.
    pub dropped: PushedAt,
}

/// Which of the feed's repositories a run is about.
///
/// Globs and `--skip-archived` apply first, then `--limit` to what is left, in the feed's order.
/// What they leave out is not counted, unusable entries included.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Filters")]
pub struct FilterConfig {
    /// Take at most this many repositories.
    #[arg(long, env = "LIMIT", value_name = "N")]
    pub limit: Option<usize>,

    /// Take only repositories whose owner/name matches. Repeatable; * stays within one part,
    /// upper and lower case are the same. In the environment: several, with spaces between.
    #[arg(long, env = "ONLY", value_name = "GLOB", value_delimiter = ' ')]
    pub only: Vec<RepoGlob>,

    /// Leave out repositories whose owner/name matches. Repeatable; wins over --only.
    #[arg(long, env = "EXCLUDE", value_name = "GLOB", value_delimiter = ' ')]
    pub exclude: Vec<RepoGlob>,

    /// Leave out repositories that the feed calls archived.
    #[arg(long, env = "SKIP_ARCHIVED")]
    pub skip_archived: bool,
}

/// A pattern for `owner/name`: `alphagov/*`, `*/*-frontend`, `{hmrc,dwp}/*`.
///
/// `*` does not cross the slash, and case does not matter, as for GitHub.
#[derive(Clone, Debug)]
pub struct RepoGlob(GlobMatcher);

/// Why a text is not a [`RepoGlob`].
#[derive(Debug, thiserror::Error)]
pub enum InvalidGlob {
    /// Not a glob at all. The message holds the text.
    #[error("{0}")]
    Glob(#[from] globset::Error),
    /// It could match nothing.
    #[error("a glob is for owner/name and needs a slash: {0}/* or */{0}")]
    NoSlash(String),
}

/// Whether a feed from a server may name repositories of this machine, by absolute paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalPaths {
    /// It may.
    Allowed,
    /// It may not.
    Refused,
}

/// Reads the feed. One from a file may name local paths whatever `local_paths` says.
///
/// What is wrong with single entries is in the result and in the log.
///
/// # Errors
/// [`exit::UNAVAILABLE`] where the feed cannot be had (three attempts; a status of 4xx other than
/// 408 and 429 is final), [`exit::BAD_FEED`] where what was had is too large, no JSON array, or
/// without one usable entry, [`exit::USAGE`] for plain http that is not allowed.
pub async fn load(config: &FeedConfig, local_paths: LocalPaths) -> Result<Feed, ExitError> {
    let started = Instant::now();
    let origin = config.feed.to_string();
    let (bytes, folder) = match &config.feed {
        Source::Url(url) => {
            let folder = (local_paths == LocalPaths::Allowed).then(PathBuf::new);
            (fetch(config, url).await?, folder)
        }
        Source::File(path) => {
            let (bytes, folder) = read(path, config.max_feed_bytes).await?;
            (bytes, Some(folder))
        }
    };
    let length = bytes.len();
    let name = origin.clone();
    let feed = tokio::task::spawn_blocking(move || parse(name, &bytes, folder.as_deref()))
        .await
        .map_err(|error| ExitError::new(exit::INTERNAL, format!("reading the feed: {error}")))??;
    report(&feed, length, started.elapsed());
    match feed.why_unusable() {
        None => Ok(feed),
        Some(why) if config.allow_empty_feed => {
            warn!(operation = "feed", "{why}");
            Ok(feed)
        }
        Some(why) => Err(ExitError::new(
            exit::BAD_FEED,
            format!("{why}; check --feed, or accept it with --allow-empty-feed"),
        )),
    }
}

/// Makes a feed of its bytes. `folder` is what its relative local addresses are relative to; in an
/// empty one these are invalid, without one all local addresses are.
///
/// # Errors
/// [`exit::BAD_FEED`], saying what was found instead of a feed.
pub fn parse(origin: String, bytes: &[u8], folder: Option<&Path>) -> Result<Feed, ExitError> {
    let entries = entry::parse(bytes, folder).map_err(|found| {
        ExitError::new(
            exit::BAD_FEED,
            format!("{origin} is not a feed, which is a JSON array of repositories: {found}"),
        )
    })?;
    let (repositories, repeated) = once_each(entries.repositories);
    Ok(Feed {
        origin,
        sha256: Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        repositories,
        invalid: entries.invalid,
        repeated,
    })
}

impl Feed {
    /// Why no repository can come of it, if none can.
    fn why_unusable(&self) -> Option<String> {
        if !self.repositories.is_empty() {
            return None;
        }
        let reasons: Vec<_> = self
            .invalid
            .iter()
            .take(REASONS_LISTED)
            .map(|entry| format!("entry {}: {}", entry.index, entry.reason))
            .collect();
        Some(match self.invalid.len() {
            0 => format!("the feed {} is empty", self.origin),
            all => format!(
                "the feed {} has no usable entry: {}{}",
                self.origin,
                reasons.join("; "),
                match all - reasons.len() {
                    0 => String::new(),
                    more => format!("; and {} more", thousands(more as u64)),
                }
            ),
        })
    }
}

impl FilterConfig {
    /// Whether an unusable entry is one that a run is about which `selected` these repositories.
    pub fn takes_unusable(&self, entry: &InvalidEntry, selected: &[FeedRepo]) -> bool {
        if self.limit == Some(selected.len())
            && selected.last().is_none_or(|l| l.index < entry.index)
        {
            return false;
        }
        // `--only` names what is wanted: what has no name is not.
        entry
            .repo
            .as_ref()
            .map_or(self.only.is_empty(), |repo| self.matches(repo))
    }

    /// The repositories that a run is about, in the feed's order.
    pub fn select(&self, repositories: Vec<FeedRepo>) -> Vec<FeedRepo> {
        let all = repositories.len();
        let selected: Vec<_> = repositories
            .into_iter()
            .filter(|entry| self.takes(entry))
            .take(self.limit.unwrap_or(usize::MAX))
            .collect();
        if selected.is_empty() && all > 0 {
            warn!(
                operation = "feed",
                repositories = all,
                "none of the feed's {} repositories is selected; see --only, --exclude, \
                 --skip-archived and --limit",
                thousands(all as u64)
            );
        }
        selected
    }

    fn takes(&self, entry: &FeedRepo) -> bool {
        !(self.skip_archived && entry.archived) && self.matches(&entry.repo)
    }

    fn matches(&self, repo: &RepoRef) -> bool {
        if self.only.is_empty() && self.exclude.is_empty() {
            return true;
        }
        let name = repo.to_string();
        let any = |globs: &[RepoGlob]| globs.iter().any(|glob| glob.0.is_match(&name));
        (self.only.is_empty() || any(&self.only)) && !any(&self.exclude)
    }
}

impl InvalidEntry {
    /// The entry as a run counts it.
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

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("expected a URL or a file".to_owned());
        }
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        match url.scheme() {
            "https" | "http" => Ok(Self::Url(url)),
            other => Err(format!(
                "{other} is not supported: give an https URL, or a file's plain path"
            )),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => f.write_str(&shown(url)),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({self})")
    }
}

impl FromStr for RepoGlob {
    type Err = InvalidGlob;

    fn from_str(text: &str) -> Result<Self, InvalidGlob> {
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .case_insensitive(true)
            .build()?;
        if !text.contains('/') && !text.contains("**") {
            return Err(InvalidGlob::NoSlash(text.to_owned()));
        }
        Ok(Self(glob.compile_matcher()))
    }
}

/// The one HTTP client of the producer: says who is asking, and takes no longer than `timeout`
/// for a whole exchange.
///
/// Redirects are followed, ten at most; to plain http only where `plain` or on this machine.
pub(crate) fn http_client(
    contact: Option<&str>,
    timeout: Duration,
    plain: Plain,
    url: &Url,
) -> Result<reqwest::Client, ExitError> {
    let mut agent = concat!("repofleet/", env!("CARGO_PKG_VERSION")).to_owned();
    if let Some(contact) = contact {
        agent.push_str(&format!(" (+{contact})"));
    }
    let redirects = reqwest::redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > 10 {
            attempt.error("more than 10 redirects")
        } else if !allowed(attempt.url(), plain) {
            attempt.error("redirected to plain http, which is not allowed")
        } else {
            attempt.follow()
        }
    });
    let mut client = reqwest::Client::builder()
        .user_agent(agent)
        .timeout(timeout)
        .redirect(redirects);
    if is_loopback(url) {
        // A proxy would look for it on its own machine.
        client = client.no_proxy();
    }
    client.build().map_err(|error| {
        ExitError::new(
            exit::INTERNAL,
            format!(
                "no HTTP client (are CA certificates installed?): {:#}",
                anyhow::Error::new(error)
            ),
        )
    })
}

/// Whether plain http is allowed to other machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plain {
    Allowed,
    Refused,
}

/// A URL without credentials and query, either of which may be a secret.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Both fail only for URLs that cannot hold credentials.
    _ = url.set_username("");
    _ = url.set_password(None);
    url.set_fragment(None);
    if url.query().is_some() {
        url.set_query(Some("…"));
    }
    url.to_string().replace("%E2%80%A6", "…")
}

/// A non-negative number of seconds, fractions allowed.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a number of seconds greater than 0".to_owned())
}

/// What went wrong with one attempt to fetch.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// No answer, or none that means anything.
    #[error("{0}")]
    Unreachable(String),
    /// The server's final word.
    #[error("{0}")]
    Refused(String),
    /// Larger than this many bytes.
    #[error("it is larger than {0} bytes (see --max-feed-bytes)")]
    TooLarge(u64),
}

async fn fetch(config: &FeedConfig, url: &Url) -> Result<Vec<u8>, ExitError> {
    let plain = if config.allow_http_feed {
        Plain::Allowed
    } else {
        Plain::Refused
    };
    if !allowed(url, plain) {
        return Err(ExitError::new(
            exit::USAGE,
            format!(
                "{} would come over plain http, where anyone on the way can change it: use https, \
                 or allow it by --allow-http-feed",
                shown(url)
            ),
        ));
    }
    let client = http_client(config.contact.as_deref(), config.feed_timeout, plain, url)?;
    let what = format!("fetching {}", shown(url));
    let limit = config.max_feed_bytes;
    let fetched = retry(&config.retry, &what, || fetch_once(&client, url, limit)).await;
    fetched.map_err(|error| match error {
        FetchError::Unreachable(why) => ExitError::new(
            exit::UNAVAILABLE,
            format!(
                "Failed to fetch repos.json after {} attempts: {}: {why}",
                config.retry.pauses.len() + 1,
                shown(url)
            ),
        ),
        FetchError::Refused(why) => ExitError::new(
            exit::UNAVAILABLE,
            format!(
                "Failed to fetch repos.json: {}: {why}; check --feed",
                shown(url)
            ),
        ),
        error @ FetchError::TooLarge(_) => ExitError::new(
            exit::BAD_FEED,
            format!("{} is no feed: {error}", shown(url)),
        ),
    })
}

async fn fetch_once(
    client: &reqwest::Client,
    url: &Url,
    limit: u64,
) -> Result<Vec<u8>, Attempt<FetchError>> {
    let failed = |error: reqwest::Error| {
        let final_ = error.is_redirect() || error.is_builder();
        // Without the URL, which may hold credentials; with the chain, which says why.
        let why = format!("{:#}", anyhow::Error::new(error.without_url()));
        if final_ {
            Attempt::Final(FetchError::Refused(why))
        } else {
            Attempt::Again(FetchError::Unreachable(why))
        }
    };
    let mut response = client
        .get(url.clone())
        .header("Accept", "application/json")
        .send()
        .await
        .map_err(failed)?;

    let status = response.status();
    if !status.is_success() {
        let why = format!("the server answered {status}");
        let passing = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
        return Err(if passing {
            Attempt::Again(FetchError::Unreachable(why))
        } else {
            Attempt::Final(FetchError::Refused(why))
        });
    }

    // The header spares the download; what counts is what comes, whatever the header says.
    let too_large = || Attempt::Final(FetchError::TooLarge(limit));
    if response
        .content_length()
        .is_some_and(|length| length > limit)
    {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Reads a feed's file; also gives the folder that it is in.
async fn read(path: &Path, limit: u64) -> Result<(Vec<u8>, PathBuf), ExitError> {
    let read = async {
        let file = tokio::fs::File::open(path).await?;
        let mut bytes = Vec::new();
        file.take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .await?;
        let mut folder = tokio::fs::canonicalize(path).await?;
        folder.pop();
        io::Result::Ok((bytes, folder))
    };
    let (bytes, folder) = read.await.map_err(|error| {
        ExitError::new(
            exit::UNAVAILABLE,
            format!(
                "cannot read the feed {}: {error}; check --feed",
                path.display()
            ),
        )
    })?;
    if bytes.len() as u64 > limit {
        return Err(ExitError::new(
            exit::BAD_FEED,
            format!(
                "{} is no feed: {}",
                path.display(),
                FetchError::TooLarge(limit)
            ),
        ));
    }
    Ok((bytes, folder))
}

/// Joins the entries of the same repository, which upper and lower case do not tell apart: the
/// newest push counts, as its entry spells it. Of two at the same time,
/// the later entry does.
fn once_each(entries: Vec<FeedRepo>) -> (Vec<FeedRepo>, Vec<Repetition>) {
    let mut once: Vec<FeedRepo> = Vec::with_capacity(entries.len());
    let mut repeated = Vec::new();
    let mut places = HashMap::with_capacity(entries.len());
    for mut entry in entries {
        let place = *places.entry(entry.repo.clone()).or_insert(once.len());
        let Some(kept) = once.get_mut(place) else {
            once.push(entry);
            continue;
        };
        if entry.pushed_at >= kept.pushed_at {
            std::mem::swap(kept, &mut entry);
            std::mem::swap(&mut kept.index, &mut entry.index);
        }
        repeated.push(Repetition {
            repo: entry.repo,
            kept: kept.pushed_at.clone(),
            dropped: entry.pushed_at,
        });
    }
    (once, repeated)
}

/// Says what was read. Single entries are for those who ask for details.
fn report(feed: &Feed, bytes: usize, elapsed: Duration) {
    info!(
        operation = "feed",
        origin = feed.origin,
        sha256 = feed.sha256,
        bytes,
        repositories = feed.repositories.len(),
        invalid = feed.invalid.len(),
        repeated = feed.repeated.len(),
        elapsed_seconds = elapsed.as_secs_f64(),
        "Feed {}: {} repositories, {} unusable entries, {} repeated",
        feed.origin,
        thousands(feed.repositories.len() as u64),
        thousands(feed.invalid.len() as u64),
        thousands(feed.repeated.len() as u64),
    );
    for InvalidEntry {
        index,
        repo,
        reason,
    } in &feed.invalid
    {
        let repo = repo.as_ref().map(RepoRef::to_string);
        debug!(
            operation = "feed",
            index, repo, "entry {index} is unusable: {reason}"
        );
    }
    for Repetition {
        repo,
        kept,
        dropped,
    } in &feed.repeated
    {
        debug!(
            operation = "feed",
            repo = %repo,
            "{repo} is in the feed again: pushed {kept} counts, {dropped} does not"
        );
    }
}

fn allowed(url: &Url, plain: Plain) -> bool {
    url.scheme() == "https" || plain == Plain::Allowed || is_loopback(url)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// A contact becomes part of a header.
fn contact(text: &str) -> Result<String, String> {
    let ok = !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'(' | b')' | b'\\'));
    ok.then(|| text.to_owned())
        .ok_or_else(|| "expected a URL or mail address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, pushed_at: &str, archived: bool) -> FeedRepo {
        FeedRepo {
            index: 0,
            repo: name.parse().unwrap(),
            url: format!("https://github.com/{name}"),
            pushed_at: PushedAt::new(pushed_at).unwrap(),
            archived,
        }
    }

    fn names(entries: &[FeedRepo]) -> Vec<String> {
        entries.iter().map(|entry| entry.repo.to_string()).collect()
    }

    fn globs(texts: &[&str]) -> Vec<RepoGlob> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_newest_push_counts_at_the_first_place() {
        let (once, repeated) = once_each(vec![
            entry("a/b", "2026-01-02T00:00:00Z", false),
            entry("c/d", "2026-01-01T00:00:00Z", false),
            entry("a/b", "2026-01-01T00:00:00Z", true),
            entry("a/b", "2026-01-03T00:00:00Z", true),
            // Upper and lower case are the same to GitHub.
            entry("A/B", "2026-01-02T00:00:00Z", false),
            entry("c/d", "yesterday", false),
            entry("C/d", "2025-01-01T00:00:00Z", false),
        ]);
        let kept: Vec<_> = once
            .iter()
            .map(|entry| (entry.repo.to_string(), entry.pushed_at.to_string()))
            .collect();
        let expected = [
            ("a/b", "2026-01-03T00:00:00Z"),
            ("C/d", "2025-01-01T00:00:00Z"),
        ];
        assert_eq!(
            kept,
            expected.map(|(repo, at)| (repo.to_owned(), at.to_owned()))
        );
        assert!(once[0].archived, "the newest entry counts as a whole");
        let dropped: Vec<_> = repeated.iter().map(|r| r.dropped.as_str()).collect();
        assert_eq!(
            dropped,
            [
                "2026-01-01T00:00:00Z",
                "2026-01-02T00:00:00Z",
                "2026-01-02T00:00:00Z",
                "2026-01-01T00:00:00Z",
                "yesterday"
            ]
        );
        assert_eq!(repeated[0].kept.as_str(), "2026-01-02T00:00:00Z");
        assert_eq!(repeated[2].repo.to_string(), "A/B", "as that entry had it");
    }

    #[test]
    fn filters_apply_before_the_limit() {
        let all = vec![
            entry("alphagov/whitehall", "1", false),
            entry("alphagov/old", "1", true),
            entry("hmrc/tax-frontend", "1", false),
            entry("alphagov/pay-frontend", "1", false),
            entry("dwp/x", "1", false),
        ];
        for (filter, expected) in [
            (FilterConfig::default(), vec![0, 1, 2, 3, 4]),
            (
                FilterConfig {
                    only: globs(&["AlphaGov/*"]),
                    ..Default::default()
                },
                vec![0, 1, 3],
            ),
            (
                FilterConfig {
                    only: globs(&["*/*-frontend", "dwp/?"]),
                    exclude: globs(&["hmrc/*"]),
                    ..Default::default()
                },
                vec![3, 4],
            ),
            (
                FilterConfig {
                    only: globs(&["{alphagov,dwp}/*"]),
                    skip_archived: true,
                    limit: Some(2),
                    ..Default::default()
                },
                vec![0, 3],
            ),
            (
                FilterConfig {
                    exclude: globs(&["**"]),
                    ..Default::default()
                },
                vec![],
            ),
            (
                FilterConfig {
                    limit: Some(0),
                    ..Default::default()
                },
                vec![],
            ),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|i| all[i].clone()).collect();
            assert_eq!(
                names(&filter.select(all.clone())),
                names(&expected),
                "{filter:?}"
            );
        }
    }

    #[test]
    fn a_star_stays_within_its_part() {
        let takes = |glob: &str, name: &str| {
            let filter = FilterConfig {
                only: globs(&[glob]),
                ..Default::default()
            };
            filter.takes(&entry(name, "1", false))
        };
        assert!(takes("a*/b", "ab/b"));
        assert!(!takes("a*/b", "b/b"));
        assert!(!takes("a/*/", "a/b"));
        assert!(takes("a/.*", "a/.github"), "a dot is a letter like others");
        for glob in ["alphagov", "*", "a[", "{a/b", ""] {
            let error = glob.parse::<RepoGlob>().unwrap_err().to_string();
            assert!(error.contains(glob), "{error}");
        }
    }

    #[test]
    fn sources_are_shown_without_secrets() {
        for (text, expected) in [
            (
                "https://user:s3cret@h:8443/x.json?token=s3cret#s3cret",
                "https://h:8443/x.json?…",
            ),
            (DEFAULT_FEED, DEFAULT_FEED),
            ("./deploy/repos.json", "./deploy/repos.json"),
        ] {
            let source: Source = text.parse().unwrap();
            assert_eq!(source.to_string(), expected);
            assert_eq!(format!("{source:?}"), format!("Source({expected})"));
        }
        for text in ["", "ftp://h/x", "file:///x", "https://"] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

    #[test]
    fn plain_http_is_for_this_machine_only() {
        for (url, expected) in [
            ("https://h/", true),
            ("http://h/", false),
            ("http://127.0.0.1:1/", true),
            ("http://[::1]/", true),
            ("http://localhost/", true),
            ("http://localhost.example/", false),
            ("http://127.0.0.1.example/", false),
        ] {
            let url = Url::parse(url).unwrap();
            assert_eq!(allowed(&url, Plain::Refused), expected, "{url}");
            assert!(allowed(&url, Plain::Allowed));
        }
    }

    #[test]
    fn options_are_checked() {
        assert_eq!(seconds("0.5").unwrap(), Duration::from_millis(500));
        for text in ["", "0", "-1", "nan", "inf", "30s", "1e300"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert!(contact("mailto:us@example.org").is_ok());
        for text in ["", "a b", "a\nb", "a)b"] {
            assert!(contact(text).is_err(), "{text:?}");
        }
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
