//! The JSON documents of runs, in the store below `runs/`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use strum::{AsRefStr, Display, VariantArray};
use time::OffsetDateTime;
use time::macros::format_description;

use crate::fault::FaultKind;
use crate::ids::{JobKey, PushedAt, RunId};
use crate::text::{percent, thousands};

/// Why a repository is, or is not, digested. Reports list reasons in this order.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    AsRefStr,
    Display,
    VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum CacheReason {
    /// The store holds the digest: nothing to do.
    Hit,
    /// The store holds a digest of a later `pushedAt`: nothing to do.
    Newer,
    /// The store holds no digest.
    Miss,
    /// The store's digest is of an earlier `pushedAt`.
    Stale,
    /// The store's digest was made from another URL.
    Url,
    /// The store's digest was made in another format.
    Format,
    /// The store's digest or its metadata could not be read.
    Unreadable,
    /// The cache was not asked (`--force`).
    Forced,
    /// An earlier run failed at this very push, for a reason that stays: it is not tried again.
    FailedBefore,
}

impl CacheReason {
    /// Whether there is nothing to do.
    pub fn is_cached(self) -> bool {
        matches!(self, Self::Hit | Self::Newer)
    }

    /// Whether a job is published.
    pub fn has_job(self) -> bool {
        !self.is_cached() && self != Self::FailedBefore
    }
}

/// What a run set out to do: `runs/{run}/manifest.json`, written before its first job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The run.
    pub run: RunId,
    /// When it began, RFC 3339.
    pub started_at: String,
    /// Where the feed came from.
    pub feed: String,
    /// SHA-256 of the feed's bytes, hexadecimal.
    pub feed_sha256: String,
    /// How many repositories the feed names, and unusable entries; 0 where that was not recorded.
    #[serde(default)]
    pub feed_entries: u64,
    /// The feed's newest push.
    #[serde(default)]
    pub feed_newest_push: Option<PushedAt>,
    /// The producer's version.
    pub version: String,
    /// Distinct repositories selected plus unusable entries.
    pub total: u64,
    /// Entries that repeated a repository of the feed.
    pub repeated: u64,
    /// Unusable entries.
    pub invalid: u64,
    /// Repositories by what the cache said.
    pub reasons: BTreeMap<CacheReason, u64>,
    /// Jobs of earlier runs that still waited: not published again, but counted.
    #[serde(default)]
    pub adopted: u64,
}

impl Manifest {
    /// Repositories with nothing to do.
    pub fn cached(&self) -> u64 {
        let cached = self.reasons.iter().filter(|(reason, _)| reason.is_cached());
        cached.map(|(_, count)| count).sum()
    }

    /// Repositories that failed before and are not tried again.
    pub fn failed_before(&self) -> u64 {
        let count = self.reasons.get(&CacheReason::FailedBefore);
        count.copied().unwrap_or(0)
    }
}

/// The jobs of a run: `runs/{run}/jobs.json`, written before its manifest. With it, any reader of
/// the ledger can tell how far the run has got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobList {
    /// [`JobList::VERSION`] of the program that wrote it; 0 before versions were written, when
    /// adopted jobs did not name the run that published them.
    #[serde(default)]
    pub version: u32,
    /// Entries of the feed that failed without a job: unusable ones, and
    /// [`CacheReason::FailedBefore`].
    pub invalid: Vec<Failure>,
    /// The jobs, adopted ones included.
    pub jobs: Vec<ExpectedJob>,
}

impl JobList {
    /// The version that this program writes.
    pub const VERSION: u32 = 1;
}

/// A job that a run waits for, and whose records settle it: those of the run itself, and those of
/// the runs that it was adopted from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExpectedJob {
    /// The job.
    #[serde(flatten)]
    pub key: JobKey,
    /// Earlier runs that published it; it was still queued when this run began, so it was not
    /// published again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopted_from: Vec<RunId>,
}

/// The latest run: `runs/latest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatestRun {
    /// Its id.
    pub run: RunId,
}

/// The two runs that closed last: `runs/last-closed.json`. Tells how fresh the digests are while
/// the latest run goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastClosed {
    /// The last.
    pub last: ClosedRun,
    /// The one before.
    pub before: Option<ClosedRun>,
}

/// A run of which every job has its outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClosedRun {
    /// Its id.
    pub run: RunId,
    /// When it closed.
    #[serde(with = "time::serde::rfc3339")]
    pub closed_at: OffsetDateTime,
    /// How long it took.
    pub elapsed_seconds: f64,
    /// Percent, one decimal.
    pub cache_hit_rate: f64,
}

/// The runs that closed last, newest first: `runs/history.json`, from which `runs/index.html` is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunHistory {
    /// At most [`RunHistory::MOST`].
    pub runs: Vec<HistoricRun>,
}

impl RunHistory {
    /// How many are kept.
    pub const MOST: usize = 100;
}

/// A run that closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoricRun {
    /// Its id.
    pub run: RunId,
    /// When it closed.
    #[serde(with = "time::serde::rfc3339")]
    pub closed_at: OffsetDateTime,
    /// How long it took, for a person.
    pub elapsed: String,
    /// As in [`RunSummary::total_repos`].
    pub total: u64,
    /// As in [`RunSummary::cached`].
    pub cached: u64,
    /// As in [`RunSummary::processed`].
    pub processed: u64,
    /// As in [`RunSummary::failed`].
    pub failed: u64,
}

/// Failures that are facts of a push: `runs/failures.json`. The cache check believes them for a
/// while, so that no run pays for them again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownFailures {
    /// [`KnownFailures::VERSION`] of the program that wrote it; no other is read.
    pub version: u32,
    /// At most [`KnownFailures::MOST`], one for each repository.
    pub failures: Vec<KnownFailure>,
}

impl KnownFailures {
    /// The version that this program reads and writes.
    pub const VERSION: u32 = 1;
    /// How many are kept: the latest.
    pub const MOST: usize = 50_000;
}

/// A repository that failed at a push.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KnownFailure {
    /// Repository and push.
    #[serde(flatten)]
    pub key: JobKey,
    /// Where it was tried.
    pub url: String,
    /// The class.
    pub class: FaultKind,
    /// What happened, for a person.
    pub message: String,
    /// When the run ended that tried it.
    #[serde(with = "time::serde::rfc3339")]
    pub failed_at: OffsetDateTime,
}

/// One repository without a digest, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `owner/name`, or the entry's place in the feed where it names no repository.
    pub repo: String,
    /// The class.
    pub class: FaultKind,
    /// What happened, for a person.
    pub message: String,
}

/// How a run ended: `runs/{run}/summary.json`, and the metadata of its last log line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// The run.
    pub run_id: RunId,
    /// Whether `total = cached + processed + failed`.
    pub closed: bool,
    /// Distinct repositories selected plus unusable entries.
    pub total_repos: u64,
    /// Digests that were there already.
    pub cached: u64,
    /// Jobs that ended with a digest in the store; the next three are included.
    pub processed: u64,
    /// Of those: HEAD had not moved since the stored digest, whose record was renewed.
    #[serde(default)]
    pub unmoved: u64,
    /// Of those: somebody had stored this `pushedAt` meanwhile.
    pub unchanged: u64,
    /// Of those: somebody had stored a newer `pushedAt` meanwhile.
    pub superseded: u64,
    /// Jobs that an earlier run had published and this one did not publish again.
    #[serde(default)]
    pub adopted: u64,
    /// Jobs and entries that ended without a digest.
    pub failed: u64,
    /// Of those: failed in an earlier run and not tried again.
    #[serde(default)]
    pub failed_before: u64,
    /// Percent, one decimal.
    pub cache_hit_rate: f64,
    /// Seconds from the start of the run.
    pub elapsed_seconds: f64,
    /// The same for a person.
    pub elapsed_formatted: String,
    /// How many failed of each class.
    pub failures_by_class: BTreeMap<FaultKind, u64>,
    /// Bytes of the digests that were stored.
    pub bytes_stored: u64,
    /// Bytes that came over the network.
    pub bytes_fetched: u64,
    /// Each repository without a digest, and why.
    pub failures: Vec<Failure>,
    /// Repositories that their host has under another path now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub renamed: Vec<Renamed>,
    /// Jobs without an outcome. Empty in a closed run.
    pub open: Vec<String>,
    /// Why workers started no jobs when the run ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paused: Vec<PausedWorkers>,
    /// Hosts that were rate-limiting the fleet then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts_paused: Vec<PausedHost>,
}

/// A repository that its host has under another path than the feed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renamed {
    /// `owner/name` in the feed.
    pub repo: String,
    /// Its URL now.
    pub to: String,
}

/// Workers that start no jobs, because machine or store are at fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausedWorkers {
    /// The fault, in one clause.
    pub reason: String,
    /// How many.
    pub workers: u64,
}

/// A host that rate-limited the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausedHost {
    /// The host, with its port unless it is the scheme's.
    pub host: String,
    /// When the fleet asks it again.
    #[serde(with = "time::serde::rfc3339")]
    pub until: OffsetDateTime,
}

/// Why workers wait: `3 workers paused: disk full`, `github.com rate-limited until 14:05 UTC`.
pub fn pauses(workers: &[PausedWorkers], hosts: &[PausedHost]) -> Vec<String> {
    let workers = workers.iter().map(|paused| {
        let many = if paused.workers == 1 { "" } else { "s" };
        let count = thousands(paused.workers);
        format!("{count} worker{many} paused: {}", paused.reason)
    });
    let hosts = hosts.iter().map(|paused| {
        let format = format_description!("[hour]:[minute] UTC");
        let until = paused.until.to_offset(time::UtcOffset::UTC).format(&format);
        let until = until.expect("every time has hours and minutes");
        format!("{} rate-limited until {until}", paused.host)
    });
    workers.chain(hosts).collect()
}

/// `10 transient, 30 gone`.
pub fn by_class(failures: &BTreeMap<FaultKind, u64>) -> String {
    let classes = failures.iter();
    let classes = classes.map(|(class, count)| format!("{} {class}", thousands(*count)));
    classes.collect::<Vec<_>>().join(", ")
}

impl RunSummary {
    /// How many jobs were cancelled.
    pub fn cancelled(&self) -> u64 {
        let cancelled = self.failures_by_class.get(&FaultKind::Cancelled);
        cancelled.copied().unwrap_or(0)
    }

    /// `3,000 failed: 2,999 refused, 1 gone`; `None` if none did.
    pub fn failures_sentence(&self) -> Option<String> {
        let classes = by_class(&self.failures_by_class);
        (self.failed > 0).then(|| format!("{} failed: {classes}", thousands(self.failed)))
    }

    /// `3 repositories were renamed; see summary.json`; `None` if none was.
    pub fn renamed_sentence(&self) -> Option<String> {
        let count = self.renamed.len() as u64;
        let what = match count {
            0 => return None,
            1 => "repository was",
            _ => "repositories were",
        };
        Some(format!(
            "{} {what} renamed; see summary.json",
            thousands(count)
        ))
    }

    /// `Pipeline complete: 21,000 total, 19,000 cached (90.5%), 1,800 processed, 200 failed,
    /// completed in 5h 47m`; `Pipeline incomplete: … 3 open, stopped after 5m` if it did not close.
    pub fn sentence(&self) -> String {
        let counts = format!(
            "{} total, {} cached ({:.1}%), {} processed, {} failed",
            thousands(self.total_repos),
            thousands(self.cached),
            percent(self.cached, self.total_repos),
            thousands(self.processed),
            thousands(self.failed),
        );
        if self.closed {
            format!(
                "Pipeline complete: {counts}, completed in {}",
                self.elapsed_formatted
            )
        } else {
            format!(
                "Pipeline incomplete: {counts}, {} open, stopped after {}",
                thousands(self.open.len() as u64),
                self.elapsed_formatted
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The document is a contract between versions of the producer: version 1 as first published.
    #[test]
    fn known_failures_are_as_published() {
        let golden = r#"{"version":1,"failures":[{"repo":"a/b","pushedAt":"2026-11-22T10:00:00Z","url":"https://github.com/a/b","class":"too_large","message":"why","failedAt":"2026-11-23T03:00:00Z"}]}"#;
        let known: KnownFailures = serde_json::from_str(golden).unwrap();
        assert_eq!(known.version, KnownFailures::VERSION);
        assert_eq!(known.failures[0].class, FaultKind::TooLarge);
        assert_eq!(serde_json::to_string(&known).unwrap(), golden);
    }
}
