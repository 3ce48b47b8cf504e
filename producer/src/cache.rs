//! The cache check: which of the selected repositories need a digest, and why.
//!
//! Whatever goes wrong here for one repository makes it a miss: better one digest too many than
//! one too few. Only a store that answers nothing at all ends the run.
//!
//! A repository has one identity, whatever its letter case. If the store holds it in another spelling
//! than the feed's, its job carries the store's spelling; only new objects get the feed's.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use common::exit::{self, ExitError};
use common::fault::FaultKind;
use common::ids::JobKey;
use common::retry::Policy;
use common::run::documents::{CacheReason, Failure};
use common::store::{DigestMeta, DigestStore};
use common::text::duration_within;
use strum::VariantArray;
use time::OffsetDateTime;

use self::answer::Answer;
use self::api::{ApiUrl, by_api};
use self::failures::Failures;
use self::index::Index;
use crate::feed::entry::FeedRepo;

pub mod api;
pub mod failures;
pub mod index;
pub mod listing;

pub(crate) mod answer;
mod store;

/// Where to look up cached digests.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Cache")]
pub struct CacheConfig {
    /// Where to look up cached digests.
    #[arg(long, env = "CACHE", value_name = "SOURCE", default_value = "store")]
    pub cache: CacheSource,

    /// How to look up digests in a bucket.
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

    /// Try repositories again that an earlier run found too large, killing or gone at the same push.
    #[arg(long, env = "RETRY_FAILED")]
    pub retry_failed: bool,

    /// Log for each selected repository why it is, or is not, digested.
    #[arg(long, env = "EXPLAIN")]
    pub explain: bool,

    /// When a request to the API is repeated.
    #[arg(skip = Policy::three_attempts())]
    pub retry: Policy,
}

/// Where to look up cached digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheSource {
    /// In the store: exact.
    Store,
    /// With an HTTP API: `POST {"repos":[{"org","name","pushedAt","url"}]}`, answered by
    /// `{"org/name": needs processing}`. What needs processing is digested whatever is stored.
    Api,
    /// Nowhere: everything is digested.
    None,
}

/// How to look up digests in a bucket. The answers are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Check {
    /// List it, and read only what the index of earlier runs does not know.
    Index,
    /// Read the metadata of each digest.
    Head,
}

/// A selected repository with what the cache says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The repository.
    pub entry: FeedRepo,
    /// Why it is, or is not, digested.
    pub reason: CacheReason,
    /// What the reason rests on, for a person; empty where the reason says it all.
    pub detail: String,
    /// It is digested although the store may hold this very push.
    pub force: bool,
    /// How it failed, for [`CacheReason::FailedBefore`].
    pub failure: Option<Failure>,
    /// The record of its digest in the store, as far as the cache check saw it.
    pub stored: Option<DigestMeta>,
}

impl Checked {
    /// Returns the key by which a run counts its job.
    pub fn key(&self) -> JobKey {
        self.entry.key()
    }

    /// Whether the store has the digest.
    pub fn is_cached(&self) -> bool {
        self.reason.is_cached()
    }

    /// Whether it is digested.
    pub fn has_job(&self) -> bool {
        self.reason.has_job()
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

impl CacheConfig {
    /// Whether the producer keeps an index of the digests in `store`.
    pub fn keeps_index(&self, store: &dyn DigestStore) -> bool {
        self.cache == CacheSource::Store && self.check == Check::Index && store.is_remote()
    }
}

/// Asks about every repository; the answers come in the same order. Also returns what to remember
/// for the next time, by [`Index::save`], if that has changed.
///
/// # Errors
/// [`exit::UNAVAILABLE`] if the store answers nothing: as many reads as are under way at once, or
/// all there are, failed in a row. An API that does not answer is only warned of.
pub async fn check(
    config: &CacheConfig,
    store: &dyn DigestStore,
    mut repositories: Vec<FeedRepo>,
) -> Result<(Vec<Checked>, Option<Index>), ExitError> {
    let source = if config.force {
        CacheSource::None
    } else {
        config.cache
    };
    let mut index = None;
    let answers = match source {
        CacheSource::Store if config.keeps_index(store) => {
            let (answers, learned) = store::by_index(store, &mut repositories).await?;
            index = learned;
            answers
        }
        CacheSource::Store => store::by_reading(store, &mut repositories).await?,
        CacheSource::Api | CacheSource::None => {
            let answers = match source {
                CacheSource::Api => ask_api(config, &repositories).await?,
                _ => vec![Answer::called_for(CacheReason::Forced); repositories.len()],
            };
            let has_job = |place: usize| answers[place].reason.has_job();
            store::respell(store, &mut repositories, has_job).await;
            answers
        }
    };
    let checked = repositories
        .into_iter()
        .zip(answers)
        .map(|(entry, answer)| Checked {
            entry,
            reason: answer.reason,
            detail: answer.detail,
            force: answer.force,
            failure: None,
            stored: answer.stored,
        });
    let mut checked: Vec<_> = checked.collect();
    if !config.retry_failed {
        leave_out_failed(store, &mut checked).await;
    }
    Ok((checked, index))
}

/// Takes the job from what failed before, unless somebody asked for it by name.
async fn leave_out_failed(store: &dyn DigestStore, checked: &mut [Checked]) {
    fn may_be_left_out(checked: &Checked) -> bool {
        checked.has_job() && !checked.force
    }
    if !checked.iter().any(may_be_left_out) {
        return;
    }
    let (failures, now) = (Failures::load(store).await, OffsetDateTime::now_utc());
    for checked in checked
        .iter_mut()
        .filter(|checked| may_be_left_out(checked))
    {
        let failure = failures.of(&checked.entry, now);
        // Whether readers keep a digest depends on it, and asking costs one request.
        let asked_again =
            |failure: &Failure| failure.class == FaultKind::Gone && checked.stored.is_some();
        if let Some(failure) = failure.filter(|failure| !asked_again(failure)) {
            checked.reason = CacheReason::FailedBefore;
            checked.detail = format!("{}: {}", failure.class, failure.message);
            checked.failure = Some(failure);
        }
    }
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
    by_api(url, config.cache_timeout, &config.retry, repositories).await
}

/// Counts the repositories for each reason; every reason is there.
pub fn counts(checked: &[Checked]) -> BTreeMap<CacheReason, u64> {
    let reasons = CacheReason::VARIANTS.iter();
    let mut counts: BTreeMap<_, _> = reasons.map(|&reason| (reason, 0)).collect();
    for checked in checked {
        *counts.entry(checked.reason).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use common::ids::{PushedAt, RunId};
    use common::job::DIGEST_FORMAT;
    use common::store::{Found, Version};

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
                sha256: None,
                tokens: None,
                files: None,
            },
            version: Version("1".to_owned()),
        }
    }

    #[test]
    fn what_is_stored_decides() {
        const NOW: &str = "2026-01-02T03:04:05Z";
        let unreadable = Found::Unreadable {
            torn: false,
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
                details: Default::default(),
            };
            let answer = Answer::of_store(&found, &entry);
            assert_eq!(answer.reason, expected, "{found:?}");
            let checked = Checked {
                entry,
                reason: answer.reason,
                detail: answer.detail,
                force: answer.force,
                failure: None,
                stored: answer.stored,
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
