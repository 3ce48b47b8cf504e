//! The feed's bytes, over HTTP or from a file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use common::exit::{self, ExitError};
use common::retry::{Attempt, Policy, retry};
use common::text::{duration_within, parse_size, unsubstituted};
use common::tls;
use reqwest::StatusCode;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ETAG, HeaderMap, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tracing::debug;
use url::{Host, Url};
use worker::resolver::lookup;

/// Where the feed of UK government repositories is published every night.
pub const DEFAULT_FEED: &str =
    "https://uk-x-gov-software-community.github.io/xgov-opensource-repo-scraper/repos.json";

/// Longest ETag, or time, that is remembered.
const MAX_VALIDATOR: usize = 1024;

/// Where the feed is, and the limits for fetching it.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Feed")]
pub struct FeedConfig {
    /// The feed: a URL or a file; - is standard input
    #[arg(long, env = "FEED", value_name = "URL|FILE", default_value = DEFAULT_FEED, hide_env_values = true)]
    pub feed: FeedSource,

    /// Largest feed to read
    #[arg(long, env = "MAX_FEED_BYTES", value_name = "SIZE", default_value = "256MiB", value_parser = parse_size)]
    pub max_feed_bytes: u64,

    /// Longest time for one attempt to fetch the feed
    #[arg(long, env = "FEED_TIMEOUT", value_name = "DURATION", default_value = "30s", value_parser = duration_within("0.1s", "1d"))]
    pub feed_timeout: Duration,

    /// Fetch the feed over plain http too; from localhost that is always allowed
    #[arg(long, env = "ALLOW_HTTP_FEED")]
    pub allow_http_feed: bool,

    /// Accept a feed that is empty or has no usable entry, instead of exiting with code 65
    #[arg(long, env = "ALLOW_EMPTY_FEED")]
    pub allow_empty_feed: bool,

    /// Exit with code 65 if the feed has lost more than this percentage of its entries, and more than
    /// 20, since the run before
    #[arg(
        long,
        env = "FEED_DROP_LIMIT",
        value_name = "PERCENT",
        default_value = "20",
        value_parser = clap::value_parser!(u8).range(0..=100)
    )]
    pub feed_drop_limit: u8,

    /// Your address, for the User-Agent, so that a server's operator can reach you
    #[arg(long, env = "CONTACT", value_name = "URL|MAIL", value_parser = contact)]
    pub contact: Option<String>,

    /// The pauses between attempts.
    #[arg(skip = Policy::three_attempts())]
    pub retry: Policy,
}

/// Where a feed comes from. Printed without what may be secret: credentials and query.
#[derive(Clone, PartialEq, Eq)]
pub enum FeedSource {
    /// A server.
    Url(Url),
    /// A file on this machine.
    File(PathBuf),
}

/// What a server calls a copy of the feed, to be asked whether it still is that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Validators {
    /// Its ETag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// Its Last-Modified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
}

impl Validators {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| {
            let value = headers.get(name)?.to_str().ok()?;
            (value.len() <= MAX_VALIDATOR).then(|| value.to_owned())
        };
        let (etag, last_modified) = (text(ETAG), text(LAST_MODIFIED));
        (etag.is_some() || last_modified.is_some()).then_some(Self {
            etag,
            last_modified,
        })
    }
}

/// A feed's bytes.
pub(super) struct Fetched {
    pub(super) bytes: Vec<u8>,
    /// What its server calls it.
    pub(super) seen: Option<Validators>,
    /// The folder of the file, if it was one.
    pub(super) folder: Option<PathBuf>,
}

/// Whether plain http to other machines is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plain {
    Allowed,
    Refused,
}

/// Why an attempt to fetch failed.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{0}")]
    Unreachable(String),
    #[error("{0}")]
    Refused(String),
    #[error("it is larger than {0} bytes (see --max-feed-bytes)")]
    TooLarge(u64),
}

impl FeedConfig {
    /// Fetches the feed, in up to three attempts; `None` if it is still the one that was `seen`.
    pub(super) async fn fetch(
        &self,
        seen: Option<&Validators>,
    ) -> Result<Option<Fetched>, ExitError> {
        match &self.feed {
            FeedSource::Url(url) => self.download(url, seen).await,
            FeedSource::File(path) => self.read(path).await.map(Some),
        }
    }

    async fn download(
        &self,
        url: &Url,
        seen: Option<&Validators>,
    ) -> Result<Option<Fetched>, ExitError> {
        let plain = if self.allow_http_feed {
            Plain::Allowed
        } else {
            Plain::Refused
        };
        let shown = shown(url);
        if !allowed(url, plain) {
            let message = format!(
                "{shown}: anyone on the way can change what comes over plain http; use https, or allow it with --allow-http-feed"
            );
            return Err(ExitError::new(exit::USAGE, message));
        }
        let client = http_client(self.contact.as_deref(), self.feed_timeout, plain, url)?;
        let what = format!("fetching {shown}");
        let limit = self.max_feed_bytes;
        let fetched = retry(&self.retry, &what, || {
            download_once(&client, url, seen, limit)
        })
        .await;
        fetched.map_err(|error| match error {
            FetchError::Unreachable(why) => {
                let attempts = self.retry.pauses.len() + 1;
                let message =
                    format!("Failed to fetch repos.json after {attempts} attempts: {shown}: {why}");
                ExitError::new(exit::UNAVAILABLE, message)
            }
            FetchError::Refused(why) => {
                let message = format!("Failed to fetch repos.json: {shown}: {why}; check --feed");
                ExitError::new(exit::UNAVAILABLE, message)
            }
            FetchError::TooLarge(_) => too_large(&shown, limit),
        })
    }

    async fn read(&self, path: &Path) -> Result<Fetched, ExitError> {
        let limit = self.max_feed_bytes;
        let read = async {
            let file = tokio::fs::File::open(path).await?;
            let mut bytes = Vec::new();
            file.take(limit.saturating_add(1))
                .read_to_end(&mut bytes)
                .await?;
            // A pipe is in no folder: relative paths are taken from this process's.
            let folder = match tokio::fs::canonicalize(path).await {
                Ok(file) if file.is_file() => file.parent().unwrap_or(Path::new("/")).to_owned(),
                _ => std::env::current_dir()?,
            };
            io::Result::Ok(Fetched {
                bytes,
                seen: None,
                folder: Some(folder),
            })
        };
        let shown = path.display();
        let fetched = read.await.map_err(|error| {
            let message = format!("cannot read the feed {shown}: {error}; check --feed");
            ExitError::new(exit::UNAVAILABLE, message)
        })?;
        if fetched.bytes.len() as u64 > limit {
            return Err(too_large(&shown.to_string(), limit));
        }
        Ok(fetched)
    }
}

pub(super) fn too_large(feed: &str, limit: u64) -> ExitError {
    let why = FetchError::TooLarge(limit);
    ExitError::new(exit::BAD_FEED, format!("{feed} is not a feed: {why}"))
}

async fn download_once(
    client: &reqwest::Client,
    url: &Url,
    seen: Option<&Validators>,
    limit: u64,
) -> Result<Option<Fetched>, Attempt<FetchError>> {
    let failed = |error: reqwest::Error| {
        if error.is_redirect() || error.is_builder() {
            Attempt::Final(FetchError::Refused(root_cause(error)))
        } else {
            Attempt::Again(FetchError::Unreachable(root_cause(error)))
        }
    };
    let mut request = client.get(url.clone()).header("Accept", "application/json");
    if let Some(etag) = seen.and_then(|seen| seen.etag.as_deref()) {
        request = request.header(IF_NONE_MATCH, etag);
    } else if let Some(time) = seen.and_then(|seen| seen.last_modified.as_deref()) {
        request = request.header(IF_MODIFIED_SINCE, time);
    }
    let mut response = request.send().await.map_err(failed)?;

    let status = response.status();
    if seen.is_some() && status == StatusCode::NOT_MODIFIED {
        return Ok(None);
    }
    if !status.is_success() {
        let why = format!("the server answered {status}");
        let may_pass = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
        return Err(if may_pass {
            Attempt::Again(FetchError::Unreachable(why))
        } else {
            Attempt::Final(FetchError::Refused(why))
        });
    }

    // The header spares the download; the bytes received decide, whatever it says.
    let seen = Validators::of(response.headers());
    let mut bytes = Vec::new();
    let mut coming = response.content_length().unwrap_or(0);
    loop {
        if bytes.len() as u64 + coming > limit {
            return Err(Attempt::Final(FetchError::TooLarge(limit)));
        }
        let Some(chunk) = response.chunk().await.map_err(failed)? else {
            return Ok(Some(Fetched {
                bytes,
                seen,
                folder: None,
            }));
        };
        bytes.extend_from_slice(&chunk);
        coming = 0;
    }
}

impl FromStr for FeedSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("expected a URL or a file".to_owned());
        }
        if let Some(why) = unsubstituted("--feed", text) {
            return Err(why);
        }
        if text == "-" {
            return Ok(Self::File("/dev/stdin".into()));
        }
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        match url.scheme() {
            "https" | "http" => Ok(Self::Url(url)),
            other => Err(format!(
                "{other} is not supported: give an https URL, or a path"
            )),
        }
    }
}

impl fmt::Display for FeedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => f.write_str(&shown(url)),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for FeedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FeedSource({self})")
    }
}

/// Returns an HTTP client that names `contact` in its User-Agent and takes at most `timeout` for a
/// whole exchange.
///
/// It follows up to ten redirects; to plain http only if that is allowed or on localhost, and to this
/// machine only from this machine. It sends no Referer, which would tell one server the other's query.
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
    let from_here = is_loopback(url);
    let redirects = reqwest::redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > 10 {
            return attempt.error("more than 10 redirects");
        }
        match refusal(attempt.url(), plain, from_here) {
            Some(why) => attempt.error(why),
            None => attempt.follow(),
        }
    });
    tls::install_provider();
    let mut client = reqwest::Client::builder()
        .user_agent(agent)
        .timeout(timeout)
        .referer(false)
        .dns_resolver(Arc::new(Names))
        .redirect(redirects);
    if from_here {
        // A proxy would look for it on the proxy's machine.
        client = client.no_proxy();
    }
    client.build().map_err(|error| {
        let why = root_cause(error);
        let message = format!("cannot set up HTTP: {why}; are CA certificates installed?");
        ExitError::new(exit::INTERNAL, message)
    })
}

/// Resolves names as workers do, with errors that say which name.
struct Names;

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let addresses = lookup(name.as_str()).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// Returns the innermost cause, which says why; at debug level the log has the whole chain. Neither
/// has the URL, which may hold credentials.
pub(crate) fn root_cause(error: reqwest::Error) -> String {
    let error = anyhow::Error::new(error.without_url());
    debug!(operation = "http", "{error:#}");
    error.root_cause().to_string()
}

/// Returns a URL without credentials and query, either of which may be a secret.
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

/// Returns why a redirect to `url` is not followed, if it is not. `from_here` if the feed itself is on
/// this machine; any other server would learn from the error what answers here.
fn refusal(url: &Url, plain: Plain, from_here: bool) -> Option<&'static str> {
    match () {
        () if is_loopback(url) && !from_here => Some("redirected to this machine"),
        () if !allowed(url, plain) => Some("redirected to plain http, which is not allowed"),
        () => None,
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

/// Parses a contact, which becomes part of a header.
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

    #[test]
    fn only_a_feed_on_this_machine_leads_to_it() {
        for (url, from_here, refused) in [
            ("https://feed.example/", false, false),
            ("http://feed.example/", true, true),
            ("http://127.0.0.1:9200/", false, true),
            ("https://[::1]/", false, true),
            ("https://localhost/", false, true),
            ("http://127.0.0.1:9200/", true, false),
        ] {
            let url = Url::parse(url).unwrap();
            for plain in [Plain::Refused, Plain::Allowed] {
                let by_scheme = plain == Plain::Refused || is_loopback(&url);
                let found = refusal(&url, plain, from_here).is_some();
                assert_eq!(found, refused && by_scheme, "{url} {from_here} {plain:?}");
            }
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
            let source: FeedSource = text.parse().unwrap();
            assert_eq!(source.to_string(), expected);
            assert_eq!(format!("{source:?}"), format!("FeedSource({expected})"));
        }
        for text in ["", "ftp://h/x", "file:///x", "https://"] {
            assert!(text.parse::<FeedSource>().is_err(), "{text}");
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
    fn a_contact_fits_into_a_header() {
        assert!(contact("mailto:us@example.org").is_ok());
        for text in ["", "a b", "a\nb", "a)b"] {
            assert!(contact(text).is_err(), "{text:?}");
        }
    }
}
