//! What failed for a reason that stays: remembered with its push, and not paid for again.
//!
//! Too large a repository, or one that kills its slot, is so until somebody pushes, and one that is
//! gone comes back seldom. Without this document every run would spend its whole time limit on them.
//! It is read at the cache check and written at a run's end, by what the run's outcomes said. Lost or
//! torn, it costs attempts, never a digest.

use std::collections::HashMap;
use std::time::Duration;

use common::fault::{Fault, FaultKind};
use common::ids::RepoRef;
use common::outcome::Outcome;
use common::run::documents::{Failure, KnownFailure, KnownFailures};
use common::run::view::Settled;
use common::store::freshness::canonical_url;
use common::store::{DigestStore, DocumentKey};
use time::OffsetDateTime;
use time::macros::format_description;
use tracing::warn;

use crate::feed::entry::FeedRepo;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Longest message that is kept, in characters.
const MAX_MESSAGE: usize = 500;

/// Returns for how long a failure is believed; `None` for one that may be over at any moment.
///
/// A time limit may have been reached because the network was slow, or because limits were other
/// ones. So nothing is believed for ever.
fn believed_for(class: FaultKind) -> Option<Duration> {
    match class {
        FaultKind::Gone => Some(7 * DAY),
        FaultKind::TooLarge | FaultKind::Killed => Some(30 * DAY),
        _ => None,
    }
}

/// The failures that the store remembers.
#[derive(Debug, Default)]
pub struct Failures {
    known: HashMap<RepoRef, KnownFailure>,
    changed: bool,
}

impl Failures {
    /// Reads the store's document. One that cannot be read is warned of, and counts as none.
    pub async fn load(store: &dyn DigestStore) -> Self {
        let document = match store.document(&DocumentKey::Failures).await {
            Ok(Some(document)) => decode(&document),
            Ok(None) => return Self::default(),
            Err(fault) => Err(fault.to_string()),
        };
        let failures = document.unwrap_or_else(|why| {
            let key = DocumentKey::Failures;
            warn!(
                operation = "cache-check",
                "cannot use {}/{key}, so what failed before is tried again: {why}",
                store.location()
            );
            Vec::new()
        });
        let known = failures.into_iter();
        Self {
            known: known.map(|known| (known.key.repo.clone(), known)).collect(),
            changed: false,
        }
    }

    /// Returns how `entry` failed before, if that still holds.
    pub fn of(&self, entry: &FeedRepo, now: OffsetDateTime) -> Option<Failure> {
        let known = self.known.get(&entry.repo)?;
        let holds = holds(known, now)
            && known.key.pushed_at == entry.pushed_at
            && canonical_url(&known.url) == canonical_url(&entry.url);
        let day = format_description!("[year]-[month]-[day]");
        let day = known.failed_at.format(&day).ok().filter(|_| holds)?;
        Some(Failure {
            repo: entry.repo.to_string(),
            class: known.class,
            message: format!(
                "{} (on {day}, at this push; --retry-failed tries again)",
                known.message
            ),
        })
    }

    /// Takes note of how an attempt at `entry` ended.
    pub fn note(&mut self, entry: &FeedRepo, ended: &Settled, now: OffsetDateTime) {
        // There was no attempt.
        if ended.outcome == Outcome::CANCELLED {
            return;
        }
        let before = self.known.remove(&entry.repo);
        self.changed |= before.is_some();
        if let Outcome::Failed(class) = ended.outcome
            && believed_for(class).is_some()
        {
            let failure = KnownFailure {
                key: entry.key(),
                url: entry.url.clone(),
                class,
                message: ended.message.chars().take(MAX_MESSAGE).collect(),
                failed_at: now,
            };
            self.known.insert(entry.repo.clone(), failure);
            self.changed = true;
        }
    }

    /// Writes the store's document, if there is anything new in it.
    ///
    /// # Errors
    /// If the store does not take it.
    pub async fn save(self, store: &dyn DigestStore, now: OffsetDateTime) -> Result<(), Fault> {
        if !self.changed {
            return Ok(());
        }
        let known = self.known.into_values().filter(|known| holds(known, now));
        let mut failures: Vec<_> = known.collect();
        failures.sort_by(|a, b| (b.failed_at, &a.key.repo).cmp(&(a.failed_at, &b.key.repo)));
        failures.truncate(KnownFailures::MOST);
        let document = KnownFailures {
            version: KnownFailures::VERSION,
            failures,
        };
        let document = serde_json::to_vec(&document).map_err(Fault::infra)?;
        store.put_document(&DocumentKey::Failures, &document).await
    }
}

/// Clocks differ, so one that is ahead is believed no less.
fn holds(known: &KnownFailure, now: OffsetDateTime) -> bool {
    let age = (now - known.failed_at).unsigned_abs();
    believed_for(known.class).is_some_and(|limit| age < limit)
}

fn decode(document: &[u8]) -> Result<Vec<KnownFailure>, String> {
    let known: KnownFailures =
        serde_json::from_slice(document).map_err(|error| error.to_string())?;
    match known.version {
        KnownFailures::VERSION => Ok(known.failures),
        other => Err(format!("version {other} is not known here")),
    }
}
