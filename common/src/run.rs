//! A run: its id, its manifest, its tally, and the sentences in which it reports.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::macros::format_description;

use crate::fault::FaultKind;
use crate::job::PushedAt;
use crate::outcome::{Outcome, OutcomeRecord};
use crate::repo::RepoRef;

/// One producer run: `20261123T130000Z-0a1b2c`. Sorts by time; safe in keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

/// Why a text is not a run's id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a run id is 1 to 40 letters, digits and dashes")]
pub struct InvalidRunId;

impl RunId {
    /// A new id from the clock and six random hexadecimal digits.
    pub fn new() -> Self {
        let format = format_description!("[year][month][day]T[hour][minute][second]Z");
        let time = OffsetDateTime::now_utc()
            .format(&format)
            .expect("the format has only numbers of a valid time");
        Self(format!("{time}-{:06x}", fastrand::u32(..0x100_0000)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for RunId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for RunId {
    type Error = InvalidRunId;

    fn try_from(text: String) -> Result<Self, InvalidRunId> {
        let ok = (1..=40).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        ok.then_some(Self(text)).ok_or(InvalidRunId)
    }
}

impl From<RunId> for String {
    fn from(run: RunId) -> Self {
        run.0
    }
}

/// Why a repository is, or is not, to be digested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheReason {
    /// The store holds a digest of this very `pushedAt`: nothing to do.
    Hit,
    /// The store holds no digest.
    Miss,
    /// The store's digest is of another `pushedAt`.
    Stale,
    /// The store's digest was made in another format.
    Format,
    /// The store's digest or its metadata could not be read.
    Unreadable,
    /// The cache was not asked (`--force`).
    Forced,
}

impl CacheReason {
    /// Every reason, in the order in which reports list them.
    pub const ALL: [Self; 6] = [
        Self::Hit,
        Self::Miss,
        Self::Stale,
        Self::Format,
        Self::Unreadable,
        Self::Forced,
    ];

    /// The name in logs, metrics and documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Stale => "stale",
            Self::Format => "format",
            Self::Unreadable => "unreadable",
            Self::Forced => "forced",
        }
    }
}

impl fmt::Display for CacheReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
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

/// What a run waits for: `runs/{run}/jobs.json`, written before its manifest. With it and the
/// ledger, everybody can tell how far the run has got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobList {
    /// Entries of the feed that failed before they were jobs.
    pub invalid: Vec<Failure>,
    /// The jobs, adopted ones included.
    pub jobs: Vec<JobKey>,
}

/// What tells the jobs of a run apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobKey {
    /// The repository.
    pub repo: RepoRef,
    /// The push to digest.
    pub pushed_at: PushedAt,
}

/// Which run was begun last: `runs/latest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatestRun {
    /// Its id.
    pub run: RunId,
}

/// Which run closed last, and which before it: `runs/last-closed.json`. It says how fresh the
/// digests are while the latest run goes on.
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

/// Adds up a run: `total = cached + processed + failed`.
///
/// Keyed by repository and `pushedAt`, and only the first outcome of each counts, so records that
/// come twice, or that another run's copy of the job caused, do no harm.
#[derive(Debug, Default)]
pub struct Tally {
    total: u64,
    cached: u64,
    processed: u64,
    unchanged: u64,
    superseded: u64,
    stored_bytes: u64,
    fetched_bytes: u64,
    failures: Vec<Failure>,
    /// Every job of the run; `true` while it is open.
    jobs: HashMap<JobKey, bool>,
    open: u64,
    adopted: u64,
}

impl Tally {
    /// Of a run that begins, or began, with this: nothing has an outcome yet.
    pub fn begin(cached: u64, list: &JobList) -> Self {
        let mut tally = Self::default();
        for _ in 0..cached {
            tally.add_cached();
        }
        for failure in &list.invalid {
            tally.add_failure(failure.clone());
        }
        for key in &list.jobs {
            tally.add_job(key.clone());
        }
        tally
    }

    /// Takes note of how many of its jobs an earlier run had published.
    pub fn set_adopted(&mut self, adopted: u64) {
        self.adopted = adopted;
    }

    /// Jobs of the run that an earlier one had published.
    pub fn adopted(&self) -> u64 {
        self.adopted
    }

    /// The open jobs, in no particular order.
    pub fn open_jobs(&self) -> impl Iterator<Item = JobKey> {
        let open = self.jobs.iter().filter(|(_, open)| **open);
        open.map(|(key, _)| key.clone())
    }

    /// Counts a repository that needs nothing.
    pub fn add_cached(&mut self) {
        self.total += 1;
        self.cached += 1;
    }

    /// Counts something that fails before it becomes a job: an unusable entry of the feed.
    pub fn add_failure(&mut self, failure: Failure) {
        self.total += 1;
        self.failures.push(failure);
    }

    /// Counts a job, open until its outcome comes. The same job twice counts once.
    pub fn add_job(&mut self, key: JobKey) {
        if self.jobs.insert(key, true).is_none() {
            self.total += 1;
            self.open += 1;
        }
    }

    /// Counts an outcome; `true` if it closed an open job of this run.
    pub fn apply(&mut self, record: &OutcomeRecord) -> bool {
        match self.jobs.get_mut(&record.key()) {
            Some(open) if *open => *open = false,
            _ => return false,
        }
        self.open -= 1;
        self.stored_bytes += record.stored_bytes;
        self.fetched_bytes += record.fetched_bytes;
        match record.outcome {
            Outcome::Processed => self.processed += 1,
            Outcome::Unchanged => self.unchanged += 1,
            Outcome::Superseded => self.superseded += 1,
            Outcome::Failed(class) => self.failures.push(Failure {
                repo: record.repo.to_string(),
                class,
                message: record.message.clone(),
            }),
        }
        true
    }

    /// Distinct repositories selected plus unusable entries.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Repositories whose digest was there already.
    pub fn cached(&self) -> u64 {
        self.cached
    }

    /// Jobs that ended with a digest in the store: made now, or by someone else meanwhile.
    pub fn processed(&self) -> u64 {
        self.processed + self.unchanged + self.superseded
    }

    /// Jobs and entries that ended without a digest.
    pub fn failed(&self) -> u64 {
        self.failures.len() as u64
    }

    /// Jobs without an outcome.
    pub fn open(&self) -> u64 {
        self.open
    }

    /// The names of the open jobs, sorted.
    pub fn open_repos(&self) -> Vec<String> {
        let mut repos: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, open)| **open)
            .map(|(key, _)| key.repo.to_string())
            .collect();
        repos.sort();
        repos
    }

    /// Whether `total = cached + processed + failed`, which is: nothing is open.
    pub fn closes(&self) -> bool {
        self.total == self.cached + self.processed() + self.failed()
    }

    /// What is settled: everything but the open jobs.
    pub fn done(&self) -> u64 {
        self.total - self.open
    }

    /// Cached repositories among those that the cache was asked about, in percent; 0 for none.
    pub fn hit_rate(&self) -> f64 {
        percent(self.cached, self.cached + self.jobs.len() as u64)
    }

    /// `Cache hit rate: 92.3% (18,450/20,000)`.
    pub fn hit_rate_sentence(&self) -> String {
        let asked = self.cached + self.jobs.len() as u64;
        format!(
            "Cache hit rate: {:.1}% ({}/{})",
            self.hit_rate(),
            thousands(self.cached),
            thousands(asked)
        )
    }

    /// `Processed 500/21,000 (2.4%), cache hit: 91.2%, elapsed: 15m, ETA: 5h 30m`.
    ///
    /// `eta` is `None` as long as no rate is known.
    pub fn progress_sentence(&self, elapsed: Duration, eta: Option<Duration>) -> String {
        format!(
            "Processed {}/{} ({:.1}%), cache hit: {:.1}%, elapsed: {}, ETA: {}",
            thousands(self.done()),
            thousands(self.total),
            percent(self.done(), self.total),
            self.hit_rate(),
            words(elapsed),
            eta.map_or_else(|| "unknown".to_owned(), words)
        )
    }

    /// The run's summary as it stands.
    pub fn summary(&self, run: &RunId, elapsed: Duration) -> RunSummary {
        let mut failures_by_class = BTreeMap::new();
        for failure in &self.failures {
            *failures_by_class.entry(failure.class).or_insert(0) += 1;
        }
        let mut failures = self.failures.clone();
        failures.sort_by(|a, b| (a.class, &a.repo).cmp(&(b.class, &b.repo)));
        RunSummary {
            run_id: run.clone(),
            closed: self.closes(),
            total_repos: self.total,
            cached: self.cached,
            processed: self.processed(),
            unchanged: self.unchanged,
            superseded: self.superseded,
            adopted: self.adopted,
            failed: self.failed(),
            cache_hit_rate: (self.hit_rate() * 10.0).round() / 10.0,
            elapsed_seconds: (elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
            elapsed_formatted: words(elapsed),
            failures_by_class,
            bytes_stored: self.stored_bytes,
            bytes_fetched: self.fetched_bytes,
            failures,
            open: self.open_repos(),
        }
    }
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
    /// Jobs that ended with a digest in the store, `unchanged` and `superseded` included.
    pub processed: u64,
    /// Of those: somebody had stored this `pushedAt` meanwhile.
    pub unchanged: u64,
    /// Of those: somebody had stored a newer `pushedAt` meanwhile.
    pub superseded: u64,
    /// Jobs that an earlier run had published and this one did not publish again.
    #[serde(default)]
    pub adopted: u64,
    /// Jobs and entries that ended without a digest.
    pub failed: u64,
    /// Percent, one decimal.
    pub cache_hit_rate: f64,
    /// Seconds from the start of the run.
    pub elapsed_seconds: f64,
    /// The same in words.
    pub elapsed_formatted: String,
    /// How many failed of each class.
    pub failures_by_class: BTreeMap<FaultKind, u64>,
    /// Bytes of the digests that were stored.
    pub bytes_stored: u64,
    /// Bytes that came over the network.
    pub bytes_fetched: u64,
    /// Each repository without a digest, and why.
    pub failures: Vec<Failure>,
    /// Jobs without an outcome. Empty in a closed run.
    pub open: Vec<String>,
}

impl RunSummary {
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

/// `part` of `whole` in percent; 0 of nothing.
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    // Counts are far below 2^52, so nothing is lost.
    part as f64 * 100.0 / whole as f64
}

/// `21000` as `21,000`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `45s`, `1m 15s`, `15m`, `5h 47m`: the two largest units, zero ones left out.
pub fn words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (large, small) = match seconds {
        0..60 => return format!("{seconds}s"),
        60..3600 => ((seconds / 60, "m"), (seconds % 60, "s")),
        _ => ((seconds / 3600, "h"), (seconds % 3600 / 60, "m")),
    };
    match small {
        (0, _) => format!("{}{}", large.0, large.1),
        (n, unit) => format!("{}{} {n}{unit}", large.0, large.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(repo: &str, pushed_at: &str, outcome: Outcome) -> OutcomeRecord {
        OutcomeRecord {
            run: RunId::new(),
            repo: repo.parse().unwrap(),
            pushed_at: PushedAt::new(pushed_at).unwrap(),
            outcome,
            message: "why".to_owned(),
            attempt: 0,
            millis: 1,
            fetched_bytes: 5,
            stored_bytes: 7,
            worker: String::new(),
        }
    }

    fn tally(cached: u64, jobs: &[&str]) -> Tally {
        let mut tally = Tally::default();
        for _ in 0..cached {
            tally.add_cached();
        }
        for repo in jobs {
            tally.add_job(JobKey {
                repo: repo.parse().unwrap(),
                pushed_at: PushedAt::new("1").unwrap(),
            });
        }
        tally
    }

    #[test]
    fn sentences_are_the_prescribed_ones() {
        let summary = RunSummary {
            total_repos: 21_000,
            cached: 19_000,
            processed: 1_800,
            failed: 200,
            closed: true,
            elapsed_formatted: words(Duration::from_secs(5 * 3600 + 47 * 60 + 12)),
            ..Tally::default().summary(&RunId::new(), Duration::ZERO)
        };
        assert_eq!(
            summary.sentence(),
            "Pipeline complete: 21,000 total, 19,000 cached (90.5%), 1,800 processed, 200 failed, completed in 5h 47m"
        );

        let tally = Tally {
            total: 21_000,
            cached: 456,
            open: 20_500,
            jobs: (0..44)
                .map(|i| {
                    let repo = RepoRef::new("a", &i.to_string()).unwrap();
                    let pushed_at = PushedAt::new("1").unwrap();
                    (JobKey { repo, pushed_at }, true)
                })
                .collect(),
            ..Tally::default()
        };
        assert_eq!(
            tally.progress_sentence(
                Duration::from_secs(15 * 60),
                Some(Duration::from_secs(5 * 3600 + 30 * 60))
            ),
            "Processed 500/21,000 (2.4%), cache hit: 91.2%, elapsed: 15m, ETA: 5h 30m"
        );
        assert_eq!(tally.hit_rate_sentence(), "Cache hit rate: 91.2% (456/500)");
    }

    #[test]
    fn words_of_durations() {
        for (seconds, expected) in [
            (0, "0s"),
            (45, "45s"),
            (60, "1m"),
            (75, "1m 15s"),
            (3599, "59m 59s"),
            (3600, "1h"),
            (20_820, "5h 47m"),
            (90_061, "25h 1m"),
        ] {
            assert_eq!(words(Duration::from_secs(seconds)), expected);
        }
        for (number, expected) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(thousands(number), expected);
        }
    }

    #[test]
    fn only_the_first_outcome_of_a_job_of_this_run_counts() {
        let mut tally = tally(2, &["a/b", "a/b", "a/c"]);
        tally.add_failure(Failure {
            repo: "entry 7".to_owned(),
            class: FaultKind::InvalidEntry,
            message: "no url".to_owned(),
        });
        assert_eq!((tally.total(), tally.open(), tally.closes()), (5, 2, false));

        assert!(tally.apply(&record("a/b", "1", Outcome::Unchanged)));
        assert!(!tally.apply(&record("a/b", "1", Outcome::Failed(FaultKind::Gone))));
        assert!(
            !tally.apply(&record("a/c", "2", Outcome::Processed)),
            "another pushedAt"
        );
        assert!(
            !tally.apply(&record("x/y", "1", Outcome::Processed)),
            "another repository"
        );
        assert_eq!(tally.open_repos(), ["a/c"]);
        let open = tally.summary(&RunId::new(), Duration::from_secs(300));
        assert_eq!(
            open.sentence(),
            "Pipeline incomplete: 5 total, 2 cached (40.0%), 1 processed, 1 failed, 1 open, stopped after 5m"
        );

        assert!(tally.apply(&record("a/c", "1", Outcome::Failed(FaultKind::Gone))));
        assert!(tally.closes());
        let summary = tally.summary(&RunId::new(), Duration::from_secs(1));
        assert_eq!(
            (summary.processed, summary.failed, summary.bytes_stored),
            (1, 2, 14)
        );
        assert_eq!(
            summary.failures_by_class,
            BTreeMap::from([(FaultKind::Gone, 1), (FaultKind::InvalidEntry, 1)])
        );
        assert_eq!(summary.failures[0].repo, "a/c", "sorted by class");
    }

    #[test]
    fn nothing_to_do_is_a_closed_run() {
        let tally = Tally::default();
        assert!(tally.closes());
        assert_eq!(
            tally.summary(&RunId::new(), Duration::ZERO).sentence(),
            "Pipeline complete: 0 total, 0 cached (0.0%), 0 processed, 0 failed, completed in 0s"
        );
    }

    #[test]
    fn run_ids_are_checked() {
        assert!(RunId::try_from(RunId::new().to_string()).is_ok());
        for text in ["", "a/b", "..", "a b", &"x".repeat(41)] {
            assert!(RunId::try_from(text.to_owned()).is_err(), "{text:?}");
        }
    }
}
