//! The fold of a run's records.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::ids::{JobKey, RunId};
use crate::outcome::{Outcome, OutcomeRecord};
use crate::run::documents::{Failure, JobList, RunSummary};
use crate::text::{format_duration, percent, thousands};

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
            tally.add_job(key.key.clone());
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
            format_duration(elapsed),
            eta.map_or_else(|| "unknown".to_owned(), format_duration)
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
            elapsed_formatted: format_duration(elapsed),
            failures_by_class,
            bytes_stored: self.stored_bytes,
            bytes_fetched: self.fetched_bytes,
            failures,
            open: self.open_repos(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::FaultKind;
    use crate::ids::{PushedAt, RepoRef};

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
                pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
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
            elapsed_formatted: format_duration(Duration::from_secs(5 * 3600 + 47 * 60 + 12)),
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
                    let pushed_at = PushedAt::new("2026-01-01T00:00:00Z").unwrap();
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
    fn only_the_first_outcome_of_a_job_of_this_run_counts() {
        let mut tally = tally(2, &["a/b", "a/b", "a/c"]);
        tally.add_failure(Failure {
            repo: "entry 7".to_owned(),
            class: FaultKind::InvalidEntry,
            message: "no url".to_owned(),
        });
        assert_eq!((tally.total(), tally.open(), tally.closes()), (5, 2, false));

        assert!(tally.apply(&record("a/b", "2026-01-01T00:00:00Z", Outcome::Unchanged)));
        assert!(!tally.apply(&record(
            "a/b",
            "2026-01-01T00:00:00Z",
            Outcome::Failed(FaultKind::Gone)
        )));
        assert!(
            !tally.apply(&record("a/c", "2026-01-02T00:00:00Z", Outcome::Processed)),
            "another pushedAt"
        );
        assert!(
            !tally.apply(&record("x/y", "2026-01-01T00:00:00Z", Outcome::Processed)),
            "another repository"
        );
        assert_eq!(tally.open_repos(), ["a/c"]);
        let open = tally.summary(&RunId::new(), Duration::from_secs(300));
        assert_eq!(
            open.sentence(),
            "Pipeline incomplete: 5 total, 2 cached (40.0%), 1 processed, 1 failed, 1 open, stopped after 5m"
        );

        assert!(tally.apply(&record(
            "a/c",
            "2026-01-01T00:00:00Z",
            Outcome::Failed(FaultKind::Gone)
        )));
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
}
