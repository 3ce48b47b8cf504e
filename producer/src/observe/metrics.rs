//! The state of a fleet and of its latest run as metrics.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::broker::Waiting;
use common::fault::FaultKind;
use common::run::documents::CacheReason;
use common::run::view::RunSnapshot;
use common::telemetry::registry::{self, Expose, new_registry, register};
use prometheus::{Gauge, GaugeVec, Opts, Registry};
use strum::VariantArray;

/// An unknown value: no comparison with it holds, so no alert fires; graphs show a gap.
pub const UNKNOWN: f64 = f64::NAN;

/// The metrics of a fleet and of its latest run, [`UNKNOWN`] until they are set.
#[derive(Clone, Debug)]
pub struct FleetMetrics {
    registry: Registry,
    /// Held while they are set, and while they are rendered.
    consistent: Arc<Mutex<()>>,
    reached: GaugeVec,
    queue_jobs: GaugeVec,
    dead_letters: Gauge,
    workers_connected: Gauge,
    /// Workers that recorded anything within the last minute.
    pub workers_seen: Gauge,
    workers_paused: Gauge,
    hosts_paused: Gauge,
    run_info: GaugeVec,
    /// When the latest run began.
    pub run_started: Gauge,
    run_closed: Gauge,
    /// Its total.
    pub run_total: Gauge,
    run_repositories: GaugeVec,
    run_failed: GaugeVec,
    run_cache: GaugeVec,
    run_hit_ratio: GaugeVec,
    run_residual: Gauge,
    /// When the newest push of the latest run's feed was.
    pub feed_newest_push: Gauge,
    /// Entries of the latest run's feed.
    pub feed_entries: Gauge,
    /// Of those that the run selected: pushed to since the store's digest, or without one.
    pub feed_entries_changed: Gauge,
    run_rate: Gauge,
    run_oldest_open: Gauge,
    /// When a run closed last.
    pub last_closed: Gauge,
    /// How long that run took.
    pub last_closed_took: Gauge,
}

impl Default for FleetMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl FleetMetrics {
    /// Registers all metrics, with unknown values.
    pub fn new() -> Self {
        let registry = new_registry();
        let one = |name: &str, help: &str| {
            let gauge = register(&registry, Gauge::new(name, help));
            gauge.set(UNKNOWN);
            gauge
        };
        let several = |name: &str, help: &str, label: &str| {
            register(&registry, GaugeVec::new(Opts::new(name, help), &[label]))
        };
        let metrics = Self {
            reached: several(
                "observer_reached",
                "Whether the last look at the `store`, or at the `broker`, was answered: 0 or 1",
                "what",
            ),
            queue_jobs: several(
                "queue_jobs",
                "Jobs of all runs that wait for a worker (`ready`) or for their pause to end (`retry`)",
                "state",
            ),
            dead_letters: one("dead_letters", "Jobs of all runs that were given up"),
            workers_connected: one("workers_connected", "Workers that take jobs now"),
            workers_seen: one(
                "workers_seen",
                "Workers that recorded anything within the last minute",
            ),
            workers_paused: one(
                "workers_paused",
                "Workers that start no jobs because machine or store are at fault",
            ),
            hosts_paused: one(
                "hosts_paused",
                "Hosts that rate-limited the fleet and are left alone for now",
            ),
            run_info: several("run_info", "1 for the run that was begun last", "run_id"),
            run_started: one(
                "run_started_timestamp_seconds",
                "When the latest run began: Unix time, 0 before the first",
            ),
            run_closed: one(
                "run_closed",
                "Whether every job of the latest run has its outcome: 0 or 1",
            ),
            run_total: one(
                "run_selected",
                "The latest run's total: repositories selected from the feed, and its unusable entries",
            ),
            run_repositories: several(
                "run_repositories",
                "The latest run's total by what became of it: `cached`, `processed`, `failed`, `open`",
                "state",
            ),
            run_failed: several(
                "run_failed",
                "Repositories of the latest run that failed, by class",
                "class",
            ),
            run_cache: several(
                "run_cache",
                "Repositories of the latest run by what the cache said",
                "reason",
            ),
            run_hit_ratio: several(
                "run_cache_hit_ratio",
                "Share of repositories that were cached, 0 to 1, of the `latest` run and of the closed one before it (`previous`)",
                "run",
            ),
            feed_newest_push: one(
                "feed_newest_push_timestamp_seconds",
                "The newest push in the feed of the latest run: Unix time",
            ),
            feed_entries: one(
                "feed_entries",
                "Repositories and unusable entries in the feed of the latest run",
            ),
            feed_entries_changed: one(
                "feed_entries_changed",
                "Repositories of the latest run that are new, or were pushed to since their digest",
            ),
            run_residual: one(
                "run_residual",
                "The latest run's total - cached - processed - failed: 0 once it has closed, and never below",
            ),
            run_rate: one(
                "run_outcomes_per_minute",
                "Outcomes of the latest run a minute, over the last five; 0 once it has closed",
            ),
            run_oldest_open: one(
                "run_oldest_open_seconds",
                "Age of the latest run's oldest open job; 0 where none is open",
            ),
            last_closed: one(
                "last_closed_run_timestamp_seconds",
                "When a run closed last: Unix time, 0 before the first",
            ),
            last_closed_took: one(
                "last_closed_run_seconds",
                "How long the run took that closed last",
            ),
            registry,
            consistent: Arc::default(),
        };
        for what in ["store", "broker"] {
            metrics.reached.with_label_values(&[what]).set(UNKNOWN);
        }
        metrics.set_waiting(None);
        metrics.set_snapshot(None);
        for &reason in CacheReason::VARIANTS {
            metrics.set_cache(reason, UNKNOWN);
        }
        metrics.set_hit_ratios(UNKNOWN, UNKNOWN);
        metrics.set_run("");
        metrics
    }

    /// Holds up rendering, so that values which belong together are seen together.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.consistent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets whether the store answers.
    pub fn set_store_reached(&self, reached: bool) {
        let gauge = self.reached.with_label_values(&["store"]);
        gauge.set(reached.into());
    }

    /// Sets whether the broker answers.
    pub fn set_broker_reached(&self, reached: bool) {
        let gauge = self.reached.with_label_values(&["broker"]);
        gauge.set(reached.into());
    }

    /// Sets the lengths of the queues.
    pub fn set_waiting(&self, waiting: Option<Waiting>) {
        // Counts are far below 2^52, so nothing is lost.
        let number = |of: fn(Waiting) -> u64| waiting.map_or(UNKNOWN, |w| of(w) as f64);
        let jobs = |state: &str| self.queue_jobs.with_label_values(&[state]);
        jobs("ready").set(number(|w| w.ready));
        jobs("retry").set(number(|w| w.retry));
        self.dead_letters.set(number(|w| w.dead));
        self.workers_connected.set(number(|w| w.workers));
    }

    /// Names the latest run; an empty `run_id` is none.
    pub fn set_run(&self, run_id: &str) {
        self.run_info.reset();
        let there = !run_id.is_empty();
        self.run_info.with_label_values(&[run_id]).set(there.into());
    }

    /// Sets the latest run's numbers; `None` if they are not known.
    pub fn set_snapshot(&self, run: Option<&RunSnapshot>) {
        // Counts are far below 2^52, so nothing is lost.
        let number = |of: fn(&RunSnapshot) -> u64| run.map_or(UNKNOWN, |run| of(run) as f64);
        let repositories = |state: &str| self.run_repositories.with_label_values(&[state]);
        repositories("cached").set(number(|run| run.cached));
        repositories("processed").set(number(|run| run.processed));
        repositories("failed").set(number(|run| run.failed));
        repositories("open").set(number(|run| run.open));
        for class in FaultKind::VARIANTS {
            let count = |run: &RunSnapshot| run.failures_by_class.get(class).copied();
            let count = run.map_or(UNKNOWN, |run| count(run).unwrap_or(0) as f64);
            self.run_failed.with_label_values(&[class]).set(count);
        }
        self.run_closed
            .set(number(|run| (residual(run) == 0.0).into()));
        self.run_residual.set(run.map_or(UNKNOWN, residual));
        let rate = |run: &RunSnapshot| run.outcomes_per_minute.unwrap_or(0.0);
        self.run_rate.set(run.map_or(UNKNOWN, rate));
        let oldest = number(|run| run.oldest_open_seconds.unwrap_or(0));
        self.run_oldest_open.set(oldest);
        let paused = number(|run| run.paused.iter().map(|paused| paused.workers).sum());
        self.workers_paused.set(paused);
        self.hosts_paused
            .set(number(|run| run.hosts_paused.len() as u64));
        if let Some(run) = run {
            self.run_total.set(run.total_repos as f64);
        }
    }

    /// Sets how many repositories the cache gave this reason for.
    pub fn set_cache(&self, reason: CacheReason, count: f64) {
        self.run_cache.with_label_values(&[reason]).set(count);
    }

    /// Sets the cached share, 0 to 1, of the latest run and the closed one before it.
    pub fn set_hit_ratios(&self, latest: f64, previous: f64) {
        let ratio = |run: &str| self.run_hit_ratio.with_label_values(&[run]);
        ratio("latest").set(latest);
        ratio("previous").set(previous);
    }
}

/// What is missing for the run's identity to hold.
pub fn residual(run: &RunSnapshot) -> f64 {
    run.total_repos as f64 - (run.cached + run.processed + run.failed) as f64
}

impl Expose for FleetMetrics {
    fn render(&self) -> Vec<u8> {
        let _consistent = self.hold();
        registry::render(&self.registry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_known_until_somebody_looks() {
        let metrics = FleetMetrics::new();
        metrics.set_waiting(Some(Waiting {
            ready: 3,
            retry: 0,
            dead: 1,
            workers: 40,
        }));
        metrics.set_run("run-1");
        metrics.set_run("run-2");
        let text = String::from_utf8(metrics.render()).unwrap();
        for line in [
            r#"repofleet_queue_jobs{state="ready"} 3"#,
            "repofleet_dead_letters 1",
            "repofleet_workers_connected 40",
            "repofleet_workers_seen NaN",
            r#"repofleet_run_repositories{state="open"} NaN"#,
            r#"repofleet_run_info{run_id="run-2"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(!text.contains("run-1"), "{text}");
    }
}
