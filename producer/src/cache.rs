//! The cache check: which of the selected repositories need a digest, and why.
//!
//! Whatever goes wrong here for one repository makes it a miss: better one digest too many than
//! one too few. Only a store that answers nothing at all ends the run.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::JobKey;
use common::ids::RepoRef;
use common::job::DIGEST_FORMAT;
use common::retry::{Attempt, Policy, retry};
use common::run::documents::CacheReason;
use common::store::freshness::{Facts, Freshness, Wanted};
use common::store::{DigestStore, DocumentKey, Found};
use common::text::{duration_within, thousands};
use futures::future::join;
use futures::stream::{self, StreamExt};
use serde::Serialize;
use serde_json::Value;
use strum::VariantArray;
use time::OffsetDateTime;
use tracing::{debug, warn};
use url::Url;

use crate::feed::entry::FeedRepo;
use crate::feed::fetch::{Plain, http_client, root_cause, shown};
use crate::index::{self, Entry, Index, Listing, Sight};

/// How many repositories the store is asked about at the same time.
const STORE_WIDTH: usize = 256;
/// How many repositories one request to the API names; its contract.
const API_BATCH: usize = 500;
/// How many requests to the API are under way at the same time.
const API_WIDTH: usize = 4;
/// An answer about [`API_BATCH`] repositories has 75 kB at most.
const API_ANSWER_BYTES: usize = 1 << 20;
/// How many failed reads are warned of one by one.
const WARNINGS: usize = 10;

/// Whom to ask what is cached.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Cache")]
pub struct CacheConfig {
    /// Who says what is cached: the store itself, an HTTP API, or nobody.
    #[arg(long, env = "CACHE", value_name = "SOURCE", default_value = "store")]
    pub cache: CacheSource,

    /// How the store is asked, where that is a bucket.
    #[arg(long, env = "CHECK", value_name = "HOW", default_value = "index")]
    pub check: Check,

    /// The API's address, for --cache api.
    #[arg(
        long,
        env = "CACHE_URL",
        value_name = "URL",
        required_if_eq("cache", "api")
    )]
    pub cache_url: Option<ApiUrl>,

    /// Longest time for one request to the API
    #[arg(
        long,
        env = "CACHE_TIMEOUT",
        value_name = "DURATION",
        default_value = "10s",
        value_parser = duration_within("0.1s", "1d")
    )]
    pub cache_timeout: Duration,

    /// Digest every selected repository, whatever is cached; the same as --cache none.
    #[arg(long, env = "FORCE")]
    pub force: bool,

    /// Log for each selected repository why it is, or is not, to be digested.
    #[arg(long, env = "EXPLAIN")]
    pub explain: bool,

    /// When a request to the API is followed by another.
    #[arg(skip = Policy::three_attempts())]
    pub retry: Policy,
}

/// Who says what is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheSource {
    /// The store: exact.
    Store,
    /// An HTTP API: `POST {"repos":[{"org","name","pushedAt","url"}]}`, answered by
    /// `{"org/name": needs processing}`. What it calls for is digested whatever is stored.
    Api,
    /// Nobody.
    None,
}

/// How a store in a bucket is asked. The answers are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Check {
    /// By listing it, and looking only at what the index of earlier runs does not know.
    Index,
    /// By looking at each digest.
    Head,
}

/// Address of a cache API. Shown without what may be secret: credentials and query.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiUrl(Url);

impl FromStr for ApiUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        match url.scheme() {
            "https" | "http" => Ok(Self(url)),
            _ => Err("expected an https or http URL".to_owned()),
        }
    }
}

impl fmt::Display for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.0))
    }
}

impl fmt::Debug for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiUrl({self})")
    }
}

/// A selected repository with what the cache says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The repository.
    pub entry: FeedRepo,
    /// Why it is, or is not, to be digested.
    pub reason: CacheReason,
    /// What the reason rests on, for a person; empty where the reason says it all.
    pub detail: String,
    /// Somebody called for it: to be digested although the store may hold this very push.
    pub force: bool,
}

impl Checked {
    /// What a run counts its job by.
    pub fn key(&self) -> JobKey {
        JobKey {
            repo: self.entry.repo.clone(),
            pushed_at: self.entry.pushed_at.clone(),
        }
    }

    /// Whether there is nothing to do.
    pub fn is_cached(&self) -> bool {
        self.reason.is_cached()
    }
}

/// The line of `--explain`: `alphagov/whitehall: stale (stored …, the feed says …)`.
impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.entry.repo, self.reason)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

/// Asks about every repository; the answers come in the same order. Beside them, where it has
/// changed: what to remember for the next time, by [`Index::save`].
///
/// # Errors
/// [`exit::UNAVAILABLE`] where the store answers nothing: as many reads as are under way at once,
/// or all there are, failed in a row. An API that does not answer is only warned of.
pub async fn check(
    config: &CacheConfig,
    store: &dyn DigestStore,
    repositories: Vec<FeedRepo>,
) -> Result<(Vec<Checked>, Option<Index>), ExitError> {
    let source = if config.force {
        CacheSource::None
    } else {
        config.cache
    };
    let mut index = None;
    let answers = match source {
        CacheSource::Store if config.check == Check::Index && store.is_remote() => {
            let (answers, learned) = ask_index(store, &repositories).await?;
            index = learned;
            answers
        }
        CacheSource::Store => ask_store(store, &repositories).await?,
        CacheSource::Api => ask_api(config, &repositories).await?,
        CacheSource::None => vec![Answer::called_for(CacheReason::Forced); repositories.len()],
    };
    let checked = repositories
        .into_iter()
        .zip(answers)
        .map(|(entry, answer)| Checked {
            entry,
            reason: answer.reason,
            detail: answer.detail,
            force: answer.force,
        })
        .collect();
    Ok((checked, index))
}

/// How many repositories there are for each reason; every reason is there.
pub fn counts(checked: &[Checked]) -> BTreeMap<CacheReason, u64> {
    let mut counts: BTreeMap<_, _> = CacheReason::VARIANTS
        .iter()
        .map(|&reason| (reason, 0))
        .collect();
    for checked in checked {
        *counts.entry(checked.reason).or_default() += 1;
    }
    counts
}

/// Maps a stored digest's freshness to the reason that reports give.
fn reason(freshness: Freshness) -> CacheReason {
    match freshness {
        Freshness::Absent => CacheReason::Miss,
        Freshness::Unreadable => CacheReason::Unreadable,
        Freshness::Older => CacheReason::Stale,
        Freshness::OtherUrl => CacheReason::Url,
        Freshness::OtherFormat => CacheReason::Format,
        Freshness::Current => CacheReason::Hit,
        Freshness::Newer => CacheReason::Newer,
    }
}

/// A [`CacheReason`] and what it rests on.
#[derive(Clone, Debug)]
struct Answer {
    reason: CacheReason,
    detail: String,
    force: bool,
}

impl From<CacheReason> for Answer {
    fn from(reason: CacheReason) -> Self {
        Self {
            reason,
            detail: String::new(),
            force: false,
        }
    }
}

impl Answer {
    fn called_for(reason: CacheReason) -> Self {
        Self {
            force: true,
            ..reason.into()
        }
    }

    /// Reads the reason off what the store holds.
    fn of_store(found: &Found, entry: &FeedRepo) -> Self {
        match found {
            Found::Absent => CacheReason::Miss.into(),
            Found::Unreadable { why, .. } => Self {
                detail: why.clone(),
                ..CacheReason::Unreadable.into()
            },
            Found::Stored { meta, .. } => Self::of_facts(meta.into(), entry),
        }
    }

    /// Reads the reason off what a stored digest says about itself.
    fn of_facts(stored: Facts<'_>, entry: &FeedRepo) -> Self {
        let freshness = stored.freshness(&Wanted::new(&entry.pushed_at, &entry.url));
        let detail = match freshness {
            Freshness::Older | Freshness::Newer => {
                format!("stored {}, the feed says {}", stored.push, entry.pushed_at)
            }
            Freshness::OtherUrl => format!("stored from {}, now {}", stored.url, entry.url),
            Freshness::OtherFormat => {
                format!("stored as {:?}, now {DIGEST_FORMAT:?}", stored.format)
            }
            Freshness::Unreadable => "it is empty".to_owned(),
            Freshness::Absent | Freshness::Current => String::new(),
        };
        Self {
            detail,
            ..reason(freshness).into()
        }
    }

    /// A miss that nobody called for: if the store holds this push, the worker leaves it there.
    fn unknown(why: impl fmt::Display) -> Self {
        Self {
            detail: format!("not known: {why}"),
            ..CacheReason::Miss.into()
        }
    }
}

/// Looks at each digest.
async fn ask_store(
    store: &dyn DigestStore,
    repositories: &[FeedRepo],
) -> Result<Vec<Answer>, ExitError> {
    let mut answers = vec![Answer::from(CacheReason::Miss); repositories.len()];
    let all: Vec<_> = (0..repositories.len()).collect();
    look(store, repositories, all, &mut answers, |_, _| {}).await?;
    Ok(answers)
}

/// Lists the digests, believes the index where the listing confirms it, and looks at the rest.
///
/// The index with what was learned, if anything was.
async fn ask_index(
    store: &dyn DigestStore,
    repositories: &[FeedRepo],
) -> Result<(Vec<Answer>, Option<Index>), ExitError> {
    let now = OffsetDateTime::now_utc();
    let lanes = index::lanes(repositories.iter().map(|entry| &entry.repo));
    let (index, listing) = join(Index::load(store), Listing::of_lanes(store, lanes)).await;
    let index = index.unwrap_or_else(|why| {
        let key = DocumentKey::Index;
        warn!(
            operation = "cache-check",
            "the index {}/{key} cannot be used, so every digest is looked at: {why}",
            store.location()
        );
        Index::default()
    });
    if let Some(fault) = listing.faults().first() {
        let failed = listing.faults().len();
        warn!(
            operation = "cache-check",
            failed, "digests that could not be listed are looked at one by one: {fault}"
        );
    }

    let mut answers = Vec::with_capacity(repositories.len());
    let mut unconfirmed = Vec::new();
    for (place, entry) in repositories.iter().enumerate() {
        let listed = match listing.of(&entry.repo) {
            Sight::Listed(listed) => index.of(listed),
            Sight::Absent => {
                answers.push(CacheReason::Miss.into());
                continue;
            }
            Sight::Unknown => None,
        };
        answers.push(match listed {
            Some(known) => Answer::of_facts(known.facts(), entry),
            None => {
                unconfirmed.push(place);
                CacheReason::Miss.into()
            }
        });
    }

    let mut learned = index.clone();
    learned.retain(&listing);
    let looked_at = unconfirmed.len();
    let settled = (now - index::SETTLED).unix_timestamp_nanos() / 1_000_000;
    look(
        store,
        repositories,
        unconfirmed,
        &mut answers,
        |repo, found| {
            if let (Found::Stored { meta, version }, Sight::Listed(listed)) =
                (found, listing.of(repo))
                // The very object that was listed, and nobody can replace it unseen.
                && version.etag() == listed.etag
                && meta.bytes == listed.bytes
                && i128::from(listed.modified_millis) < settled
            {
                let entry = Entry {
                    etag: listed.etag.clone(),
                    modified_millis: listed.modified_millis,
                    bytes: listed.bytes,
                    pushed_at: meta.pushed_at.clone(),
                    url: meta.url.clone(),
                    format: meta.format.clone(),
                };
                learned.insert(repo.clone(), entry);
            }
        },
    )
    .await?;
    debug!(
        operation = "cache-check",
        indexed = learned.len(),
        looked_at,
        "looked at {} digests that the index did not know",
        thousands(looked_at as u64)
    );
    let changed = learned != index;
    Ok((answers, changed.then_some(learned)))
}

/// Looks at the digests in `places`, and tells `learn` what it sees.
async fn look(
    store: &dyn DigestStore,
    repositories: &[FeedRepo],
    places: Vec<usize>,
    answers: &mut [Answer],
    mut learn: impl FnMut(&RepoRef, &Found),
) -> Result<(), ExitError> {
    let (mut failed, mut in_a_row) = (0, 0);
    let width = places.len().min(STORE_WIDTH);
    let mut heads = stream::iter(places)
        .map(|place| head(store, place, &repositories[place]))
        .buffer_unordered(STORE_WIDTH);
    while let Some((place, found)) = heads.next().await {
        let entry = &repositories[place];
        let repo = &entry.repo;
        answers[place] = match found {
            Ok(found) => {
                in_a_row = 0;
                learn(repo, &found);
                Answer::of_store(&found, entry)
            }
            Err(fault) => {
                failed += 1;
                in_a_row += 1;
                if in_a_row == width {
                    return Err(ExitError::new(
                        exit::UNAVAILABLE,
                        format!("the store {} cannot be read: {fault}", store.location()),
                    ));
                }
                let repo = repo.to_string();
                if failed <= WARNINGS {
                    warn!(
                        operation = "cache-check",
                        repo, "{repo} counts as a miss: {fault}"
                    );
                } else {
                    debug!(
                        operation = "cache-check",
                        repo, "{repo} counts as a miss: {fault}"
                    );
                }
                Answer::unknown(fault)
            }
        };
    }
    if failed > WARNINGS {
        warn!(
            operation = "cache-check",
            failed,
            "{} repositories in all count as misses because the store did not answer",
            thousands(failed as u64)
        );
    }
    Ok(())
}

async fn head(
    store: &dyn DigestStore,
    place: usize,
    entry: &FeedRepo,
) -> (usize, Result<Found, Fault>) {
    (place, store.head(&entry.repo).await)
}

async fn ask_api(
    config: &CacheConfig,
    repositories: &[FeedRepo],
) -> Result<Vec<Answer>, ExitError> {
    let Some(url) = &config.cache_url else {
        return Err(ExitError::new(
            exit::USAGE,
            "--cache api needs the API's address in --cache-url",
        ));
    };
    let api = Api {
        client: http_client(None, config.cache_timeout, Plain::Allowed, &url.0)?,
        url: url.clone(),
        retry: config.retry.clone(),
        away: AtomicBool::new(false),
    };
    let requests: Vec<_> = repositories
        .chunks(API_BATCH)
        .map(|batch| api.ask(batch))
        .collect();
    let answers: Vec<Vec<Answer>> = stream::iter(requests).buffered(API_WIDTH).collect().await;
    Ok(answers.into_iter().flatten().collect())
}

/// The cache API: says of each repository whether it needs processing.
struct Api {
    client: reqwest::Client,
    url: ApiUrl,
    retry: Policy,
    /// It did not answer, for all the attempts: the batches that are left are not asked.
    away: AtomicBool,
}

#[derive(Serialize)]
struct Question<'a> {
    repos: Vec<QuestionRepo<'a>>,
}

#[derive(Serialize)]
struct QuestionRepo<'a> {
    org: &'a str,
    name: &'a str,
    #[serde(rename = "pushedAt")]
    pushed_at: &'a str,
    url: &'a str,
}

impl Api {
    async fn ask(&self, batch: &[FeedRepo]) -> Vec<Answer> {
        match self.request(batch).await {
            Ok(needed) => batch
                .iter()
                .map(|entry| match needed.get(&entry.repo.to_string()) {
                    Some(Value::Bool(false)) => CacheReason::Hit.into(),
                    Some(Value::Bool(true)) => Answer::called_for(CacheReason::Miss),
                    Some(_) => Answer::unknown("the API said neither true nor false"),
                    None => Answer::unknown("the API did not speak of it"),
                })
                .collect(),
            Err(why) => {
                warn!(
                    operation = "cache-check",
                    repositories = batch.len(),
                    "{} repositories count as misses: cache API {}: {why}",
                    batch.len(),
                    self.url
                );
                vec![Answer::unknown(why); batch.len()]
            }
        }
    }

    async fn request(&self, batch: &[FeedRepo]) -> Result<HashMap<String, Value>, String> {
        let question = Question {
            repos: batch
                .iter()
                .map(|entry| QuestionRepo {
                    org: entry.repo.owner(),
                    name: entry.repo.name(),
                    pushed_at: entry.pushed_at.as_str(),
                    url: &entry.url,
                })
                .collect(),
        };
        let what = format!("asking the cache API {}", self.url);
        retry(&self.retry, &what, || self.request_once(&question))
            .await
            .inspect_err(|error| {
                if let ApiError::Away(_) = error {
                    self.away.store(true, Ordering::Relaxed);
                }
            })
            .map_err(|error| error.to_string())
    }

    async fn request_once(
        &self,
        question: &Question<'_>,
    ) -> Result<HashMap<String, Value>, Attempt<ApiError>> {
        if self.away.load(Ordering::Relaxed) {
            return Err(Attempt::Final(ApiError::NotAsked));
        }
        let away = |error: reqwest::Error| Attempt::Again(ApiError::Away(root_cause(error)));
        let request = self.client.post(self.url.0.clone()).json(question);
        let mut response = request.send().await.map_err(away)?;
        let status = response.status();
        if !status.is_success() {
            let why = format!("it answered {status}");
            return Err(
                if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
                    Attempt::Again(ApiError::Away(why))
                } else {
                    Attempt::Final(ApiError::Odd(why))
                },
            );
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > API_ANSWER_BYTES {
                let why = format!("it answered more than {API_ANSWER_BYTES} bytes");
                return Err(Attempt::Final(ApiError::Odd(why)));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body)
            .map_err(|error| Attempt::Final(ApiError::Odd(format!("no JSON object: {error}"))))
    }
}

/// What went wrong with a request to the API.
#[derive(Debug, thiserror::Error)]
enum ApiError {
    /// It is not there, or not now.
    #[error("{0}")]
    Away(String),
    /// It is there and makes no sense.
    #[error("{0}")]
    Odd(String),
    /// It was away for another batch.
    #[error("not asked again, since it did not answer before")]
    NotAsked,
}

#[cfg(test)]
mod tests {
    use common::ids::{PushedAt, RunId};
    use common::store::{DigestMeta, Version};

    use super::*;

    fn pushed(text: &str) -> PushedAt {
        PushedAt::new(text).unwrap()
    }

    fn stored(pushed_at: &str, format: &str, bytes: u64) -> Found {
        stored_from("https://github.com/a/b", pushed_at, format, bytes)
    }

    fn stored_from(url: &str, pushed_at: &str, format: &str, bytes: u64) -> Found {
        Found::Stored {
            meta: DigestMeta {
                pushed_at: pushed(pushed_at),
                url: url.to_owned(),
                processed_at: "2026-11-23T12:00:00Z".to_owned(),
                commit: None,
                format: format.to_owned(),
                bytes,
                truncated: false,
                run: RunId::new(),
            },
            version: Version("1".to_owned()),
        }
    }

    #[test]
    fn what_is_stored_decides() {
        const NOW: &str = "2026-01-02T03:04:05Z";
        let unreadable = Found::Unreadable {
            version: Version("1".to_owned()),
            why: "no metadata".to_owned(),
        };
        for (found, expected, line) in [
            (Found::Absent, CacheReason::Miss, "a/b: miss"),
            (
                unreadable,
                CacheReason::Unreadable,
                "a/b: unreadable (no metadata)",
            ),
            (stored(NOW, DIGEST_FORMAT, 9), CacheReason::Hit, "a/b: hit"),
            (
                stored(NOW, DIGEST_FORMAT, 0),
                CacheReason::Unreadable,
                "a/b: unreadable (it is empty)",
            ),
            (
                stored(NOW, "old", 9),
                CacheReason::Format,
                &format!("a/b: format (stored as \"old\", now {DIGEST_FORMAT:?})"),
            ),
            (
                stored("2026-01-01T00:00:00Z", "old", 9),
                CacheReason::Stale,
                "a/b: stale (stored 2026-01-01T00:00:00Z, the feed says 2026-01-02T03:04:05Z)",
            ),
            (
                stored("2027-01-01T00:00:00Z", DIGEST_FORMAT, 9),
                CacheReason::Newer,
                "a/b: newer (stored 2027-01-01T00:00:00Z, the feed says 2026-01-02T03:04:05Z)",
            ),
            (
                stored("2026-01-02T03:04:05+00:00", DIGEST_FORMAT, 9),
                CacheReason::Hit,
                "a/b: hit",
            ),
            (
                stored_from("https://github.com/a/c", NOW, DIGEST_FORMAT, 9),
                CacheReason::Url,
                "a/b: url (stored from https://github.com/a/c, now https://github.com/a/b)",
            ),
        ] {
            let entry = FeedRepo {
                index: 0,
                repo: "a/b".parse().unwrap(),
                url: "https://github.com/a/b".to_owned(),
                pushed_at: pushed(NOW),
                archived: false,
            };
            let answer = Answer::of_store(&found, &entry);
            assert_eq!(answer.reason, expected, "{found:?}");
            let checked = Checked {
                entry,
                reason: answer.reason,
                detail: answer.detail,
                force: answer.force,
            };
            assert!(!checked.force, "the worker may look again");
            assert_eq!(checked.to_string(), line);
            let cached = [CacheReason::Hit, CacheReason::Newer].contains(&expected);
            assert_eq!(checked.is_cached(), cached);
        }
    }

    #[test]
    fn every_reason_is_counted() {
        let counts = counts(&[]);
        assert_eq!(counts.len(), CacheReason::VARIANTS.len());
        assert!(counts.values().all(|count| *count == 0));
    }
}
