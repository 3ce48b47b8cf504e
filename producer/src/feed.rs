//! The feed: which repositories it lists.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::exit::{self, ExitError};
use common::ids::{PushedAt, RepoRef};
use common::text::{counted, sha256, thousands};
use tracing::{debug, info, warn};

use self::entry::{FeedRepo, InvalidEntry, Source};
use self::fetch::{FeedConfig, FeedSource, Validators};
use self::form::Form;

pub mod entry;

mod form;

pub mod details;

pub mod health;

pub mod fetch;

pub mod filter;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

/// How many reasons an error lists if no entry is usable.
const REASONS_LISTED: usize = 3;

/// A feed: its repositories, once each, and its other entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Where it came from, without secrets.
    pub origin: String,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
    /// What its server calls it, if anything.
    pub seen: Option<Validators>,
    /// What it looked like.
    form: Form,
    /// Who writes such entries.
    source: Option<Source>,
    /// Each repository once, at the place of its first entry.
    pub repositories: Vec<FeedRepo>,
    /// Entries that name no usable repository.
    pub invalid: Vec<InvalidEntry>,
    /// Entries superseded by another of the same repository.
    pub repeated: Vec<Repetition>,
}

/// An entry superseded by another of the same repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repetition {
    /// Which repository.
    pub repo: RepoRef,
    /// The push that counts.
    pub kept: PushedAt,
    /// The push of this entry.
    pub dropped: PushedAt,
}

/// Whether a feed from a server may name repositories on this machine, by absolute paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalPaths {
    /// It may.
    Allowed,
    /// It may not.
    Refused,
}

/// Reads the feed. One from a file may name local paths whatever `local_paths` says.
///
/// Unusable entries are in the result and, at debug level, in the log.
///
/// # Errors
/// [`exit::UNAVAILABLE`] if the feed cannot be fetched (three attempts; a status of 4xx other than
/// 408 and 429 is final), [`exit::BAD_FEED`] if it is too large, no feed, or without a
/// usable entry, [`exit::USAGE`] for plain http that is not allowed.
pub async fn load(config: &FeedConfig, local_paths: LocalPaths) -> Result<Feed, ExitError> {
    let feed = load_unless_seen(config, local_paths, None).await?;
    feed.ok_or_else(|| ExitError::new(exit::INTERNAL, "a feed that nobody has seen is unchanged"))
}

/// [`load`]; `None` if the feed is still the one that was `seen`.
///
/// # Errors
/// As [`load`].
pub async fn load_unless_seen(
    config: &FeedConfig,
    local_paths: LocalPaths,
    seen: Option<&Validators>,
) -> Result<Option<Feed>, ExitError> {
    let started = Instant::now();
    let Some(fetched) = config.fetch(seen).await? else {
        return Ok(None);
    };
    let seen = fetched.seen;
    let folder = match (&config.feed, local_paths) {
        (FeedSource::Url(_), LocalPaths::Allowed) => Some(PathBuf::new()),
        _ => fetched.folder,
    };
    let length = fetched.bytes.len();
    let origin = config.feed.to_string();
    let limit = config.max_feed_bytes;
    let parse = move || unpack_and_parse(origin, fetched.bytes, limit, folder.as_deref());
    let mut feed = tokio::task::spawn_blocking(parse)
        .await
        .map_err(|error| ExitError::new(exit::INTERNAL, format!("reading the feed: {error}")))??;
    feed.seen = seen;
    feed.log(length, started.elapsed());
    match feed.why_unusable() {
        None => Ok(Some(feed)),
        Some(why) if config.allow_empty_feed => {
            warn!(operation = "feed", "{why}");
            Ok(Some(feed))
        }
        Some(why) => Err(ExitError::new(
            exit::BAD_FEED,
            format!("{why}; check --feed, or accept it with --allow-empty-feed"),
        )),
    }
}

/// As [`parse`], of bytes as they came.
fn unpack_and_parse(
    origin: String,
    bytes: Vec<u8>,
    limit: u64,
    folder: Option<&Path>,
) -> Result<Feed, ExitError> {
    let sha256 = sha256(&bytes);
    let (plain, compression) = match form::decompress(bytes, limit) {
        Ok(Some(plain)) => plain,
        Ok(None) => return Err(fetch::too_large(&origin, limit)),
        Err(error) => {
            let message = format!("{origin} is not a feed: it cannot be decompressed: {error}");
            return Err(ExitError::new(exit::BAD_FEED, message));
        }
    };
    let mut feed = parse_as(origin, sha256, &plain, folder)?;
    feed.form.compression = compression;
    Ok(feed)
}

/// Parses a feed. `folder` is the base of relative local addresses; with an empty one only absolute
/// ones are valid, without one none.
///
/// # Errors
/// [`exit::BAD_FEED`], saying what was found instead of a feed.
pub fn parse(origin: String, bytes: &[u8], folder: Option<&Path>) -> Result<Feed, ExitError> {
    parse_as(origin, sha256(bytes), bytes, folder)
}

/// As [`parse`], of a feed whose SHA-256 is known.
fn parse_as(
    origin: String,
    sha256: String,
    bytes: &[u8],
    folder: Option<&Path>,
) -> Result<Feed, ExitError> {
    let entries = entry::parse(bytes, folder).map_err(|found| {
        let message =
            format!("{origin} is not a feed, such as a JSON array of repositories: {found}");
        ExitError::new(exit::BAD_FEED, message)
    })?;
    let (repositories, repeated) = once_each(entries.repositories);
    Ok(Feed {
        origin,
        sha256,
        seen: None,
        form: entries.form,
        source: entries.source,
        repositories,
        invalid: entries.invalid,
        repeated,
    })
}

impl Feed {
    /// Returns the repositories that it names, usable or not.
    pub fn names(&self) -> HashSet<RepoRef> {
        let usable = self.repositories.iter().map(|entry| &entry.repo);
        let others = self.invalid.iter().filter_map(|entry| entry.repo.as_ref());
        usable.chain(others).cloned().collect()
    }

    /// Returns what it looked like and who writes such entries: nothing for the usual feed.
    pub fn recognised(&self) -> String {
        let source = self.source.map(|source| source.to_string());
        let recognised = [self.form.to_string(), source.unwrap_or_default()];
        let recognised: Vec<_> = recognised.into_iter().filter(|r| !r.is_empty()).collect();
        recognised.join(", ")
    }

    /// Returns why no repository can come of it, if none can.
    fn why_unusable(&self) -> Option<String> {
        if !self.repositories.is_empty() {
            return None;
        }
        let origin = &self.origin;
        if self.invalid.is_empty() {
            return Some(format!("the feed {origin} is empty"));
        }
        let mut reasons: Vec<_> = self
            .invalid
            .iter()
            .take(REASONS_LISTED)
            .map(|entry| format!("entry {}: {}", entry.index, entry.reason))
            .collect();
        if let more @ 1.. = self.invalid.len() - reasons.len() {
            reasons.push(format!("and {} more", thousands(more as u64)));
        }
        let reasons = reasons.join("; ");
        Some(format!("the feed {origin} has no usable entry: {reasons}"))
    }

    fn log(&self, bytes: usize, elapsed: Duration) {
        let [repositories, invalid, repeated] = [
            self.repositories.len(),
            self.invalid.len(),
            self.repeated.len(),
        ]
        .map(|count| count as u64);
        let mut counts = counted(repositories, "repository", "repositories");
        if invalid > 0 {
            counts += ", ";
            counts += &counted(invalid, "unusable entry", "unusable entries");
        }
        if repeated > 0 {
            counts += &format!(", {} repeated", thousands(repeated));
        }
        let recognised = self.recognised();
        if !recognised.is_empty() {
            counts += &format!(" ({recognised})");
        }
        info!(
            operation = "feed",
            origin = self.origin,
            sha256 = self.sha256,
            bytes,
            repositories,
            invalid,
            repeated,
            recognised,
            elapsed_seconds = elapsed.as_secs_f64(),
            "Feed {}: {counts}",
            self.origin
        );
        for entry in &self.invalid {
            let InvalidEntry { index, reason, .. } = entry;
            let repo = entry.repo.as_ref().map(RepoRef::to_string);
            debug!(
                operation = "feed",
                index, repo, "entry {index} is unusable: {reason}"
            );
        }
        for repetition in &self.repeated {
            let Repetition {
                repo,
                kept,
                dropped,
            } = repetition;
            debug!(
                operation = "feed",
                repo = %repo,
                "{repo} is in the feed again: the push at {kept} counts, not the one at {dropped}"
            );
        }
    }
}

/// Joins entries of the same repository, whatever their letter case: the newest push counts, as its
/// entry spells it; of two equal ones, the later entry. The first entry's place is kept.
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

#[cfg(test)]
mod tests {
    use super::details::Details;
    use super::*;

    fn entry(name: &str, pushed_at: &str, archived: bool) -> FeedRepo {
        FeedRepo {
            index: 0,
            repo: name.parse().unwrap(),
            url: format!("https://github.com/{name}"),
            pushed_at: PushedAt::new(pushed_at).unwrap(),
            details: Details {
                archived: Some(archived),
                ..Details::default()
            },
        }
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
            entry("c/d", "2025-01-01T00:00:00Z", false),
            entry("C/d", "2026-01-01T01:00:00+01:00", false),
        ]);
        let kept: Vec<_> = once
            .iter()
            .map(|entry| (entry.repo.to_string(), entry.pushed_at.to_string()))
            .collect();
        let expected = [
            ("a/b", "2026-01-03T00:00:00Z"),
            ("C/d", "2026-01-01T01:00:00+01:00"),
        ];
        assert_eq!(
            kept,
            expected.map(|(repo, at)| (repo.to_owned(), at.to_owned()))
        );
        assert_eq!(
            once[0].details.archived,
            Some(true),
            "the newest entry counts as a whole"
        );
        let dropped: Vec<_> = repeated.iter().map(|r| r.dropped.as_str()).collect();
        assert_eq!(
            dropped,
            [
                "2026-01-01T00:00:00Z",
                "2026-01-02T00:00:00Z",
                "2026-01-02T00:00:00Z",
                "2025-01-01T00:00:00Z",
                "2026-01-01T00:00:00Z"
            ]
        );
        assert_eq!(repeated[0].kept.as_str(), "2026-01-02T00:00:00Z");
        assert_eq!(repeated[2].repo.to_string(), "A/B", "as that entry had it");
    }
}
