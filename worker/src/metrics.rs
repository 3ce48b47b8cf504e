//! What a worker counts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use common::fault::FaultKind;
use common::outcome::Outcome;
use common::run::documents::CacheReason;
use common::telemetry::registry::{self, Expose, new_registry, register};
use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};
use strum::{AsRefStr, VariantArray};
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::fetch::policy::FetchWay;
use crate::fetch::token::GITHUB;
use crate::host_throttle::HostThrottle;
use crate::infra_gate::InfraGate;
use crate::slot::confine::Wall;
use crate::slot::token::{TokenPool, TokenState};

/// What decides whether this process works: its hosts and its machine.
type Paused = (Arc<HostThrottle>, Arc<InfraGate>);

/// Everything that this process counts. Clones count together.
///
/// Never a label per repository: there are tens of thousands.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    jobs: IntCounterVec,
    failures: IntCounterVec,
    retries: IntCounterVec,
    handed_back: IntCounterVec,
    cache_checks: IntCounterVec,
    slots_killed: IntCounterVec,
    fetch_ways: IntCounterVec,
    slot_walls: IntGaugeVec,
    /// Slots that this process has.
    pub slots: IntGauge,
    /// Slots at work.
    pub slots_busy: IntGauge,
    /// Bytes that came over the network.
    pub fetched_bytes: IntCounter,
    /// Bytes of stored digests.
    pub stored_bytes: IntCounter,
    /// Spans that no collector took.
    pub spans_dropped: IntCounter,
    fetch_seconds: Histogram,
    digest_seconds: Histogram,
    store_seconds: Histogram,
    queue_to_stored_seconds: Histogram,
    throttled_hosts: IntGauge,
    infra_paused: IntGauge,
    /// What is shown as paused.
    paused: Arc<Mutex<Option<Paused>>>,
    slots_cpu: Counter,
    scratch_free: Gauge,
    scratch_size: Gauge,
    scratch: Arc<OnceLock<PathBuf>>,
    token_states: IntGaugeVec,
    tokens: Arc<OnceLock<Arc<TokenPool>>>,
}

/// Why a slot is ended before its time: the values of a metric's label.
const KILLED_FOR: [&str; 4] = ["crash", "stall", "stopped", "timeout"];

/// Why a job goes back to the broker although nothing is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum HandedBack {
    /// Its worker stops.
    Stopping,
    /// Its host is paused.
    Host,
    /// The fleet begins as many fetches from its host as it may.
    Rate,
    /// Machine or store were at fault for as long as a job may be held.
    Infra,
    /// Another job, which may have killed its worker, is worked on alone.
    Suspect,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let registry = new_registry();
        let seconds = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            register(&registry, Histogram::with_opts(opts))
        };
        let fetch_seconds = seconds("fetch_seconds", "Time to fetch a repository", &OF_WORK);
        let digest_seconds = seconds(
            "digest_seconds",
            "Time to make a digest of what was fetched",
            &OF_WORK,
        );
        let store_seconds = seconds("store_seconds", "Time to store a digest", &OF_WORK);
        let queue_to_stored_seconds = seconds(
            "queue_to_stored_seconds",
            "Time from when a job was put on the queue until its digest was stored or renewed, retries and pauses included",
            &OF_WAITING,
        );
        let gauge = |name: &str, help: &str| register(&registry, Gauge::new(name, help));
        let family = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let metrics = Self {
            jobs: family(
                "jobs_total",
                "Jobs that ended, by outcome",
                &["outcome", "class"],
            ),
            failures: family(
                "failures_total",
                "Jobs that failed, by host and class; `other` are all hosts that are not allowed, `local` are paths",
                &["host", "class"],
            ),
            retries: family(
                "retries_total",
                "Attempts that will be repeated",
                &["class"],
            ),
            handed_back: family(
                "handed_back_total",
                "Jobs that went back to the queue although nothing is wrong with them: their worker stops (`stopping`), their host is paused (`host`) or at --host-rate (`rate`), and others need their place, machine or store were at fault for long (`infra`), another job is worked on alone (`suspect`)",
                &["reason"],
            ),
            throttled_hosts: register(
                &registry,
                IntGauge::new("throttled_hosts", "Hosts that are paused"),
            ),
            infra_paused: register(
                &registry,
                IntGauge::new(
                    "infra_paused",
                    "1 while no job is started because machine or store are at fault",
                ),
            ),
            paused: Arc::default(),
            cache_checks: family(
                "cache_checks_total",
                "Repositories by what the cache said",
                &["reason"],
            ),
            slots_killed: family(
                "slots_killed_total",
                "Slots that were ended before their time: `crash`, `stall`, `stopped`, `timeout`",
                &["reason"],
            ),
            fetch_ways: family(
                "fetch_ways_total",
                "Repositories of hosts by how they were fetched: `v2` in one pack without what no digest shows, `object_info` trees first and then only the files that show, `object_info_fallback` in one pack since the host did not answer that as it should, `git2` by libgit2 since --fetch says so, `fallback` by libgit2 since the host or its answer was not as v2 needs it",
                &["way"],
            ),
            slot_walls: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new(
                        "slot_walls",
                        "1 where the kernel confines slots: to their files (`landlock_files`), to their hosts' ports (`landlock_network`), from signalling others (`landlock_signals`), to the system calls of their work (`seccomp`); 0 where it cannot",
                    ),
                    &["wall"],
                ),
            ),
            slots: register(&registry, IntGauge::new("slots", "Slots of this process")),
            slots_busy: register(&registry, IntGauge::new("slots_busy", "Slots at work")),
            fetched_bytes: register(
                &registry,
                IntCounter::new("fetched_bytes_total", "Bytes that came over the network"),
            ),
            stored_bytes: register(
                &registry,
                IntCounter::new("stored_bytes_total", "Bytes of stored digests"),
            ),
            spans_dropped: register(
                &registry,
                IntCounter::new(
                    "trace_spans_dropped_total",
                    "Spans of traces that no collector took",
                ),
            ),
            fetch_seconds,
            digest_seconds,
            store_seconds,
            queue_to_stored_seconds,
            slots_cpu: register(
                &registry,
                Counter::new(
                    "slots_cpu_seconds_total",
                    "CPU time of slots that have ended",
                ),
            ),
            scratch_free: gauge(
                "scratch_free_bytes",
                "Free space on the scratch folder's disk",
            ),
            scratch_size: gauge("scratch_size_bytes", "Size of the scratch folder's disk"),
            scratch: Arc::default(),
            token_states: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new(
                        "tokens",
                        "Tokens of a host by state: `usable`, `resting` until the host's limit on it begins anew, `refused` by the host",
                    ),
                    &["host", "state"],
                ),
            ),
            tokens: Arc::default(),
            registry,
        };
        // An absent series reads as "no data" in an alert; a zero reads as zero.
        for outcome in [
            Outcome::Processed,
            Outcome::Unmoved,
            Outcome::Unchanged,
            Outcome::Superseded,
        ] {
            metrics.job_counter(outcome);
        }
        for &class in FaultKind::VARIANTS {
            metrics.job_counter(Outcome::Failed(class));
        }
        metrics.show_failures_of(GITHUB);
        for class in [
            FaultKind::Transient,
            FaultKind::Throttled,
            FaultKind::Killed,
        ] {
            metrics.retries.with_label_values(&[class]);
        }
        for &reason in CacheReason::VARIANTS {
            metrics.cache_checks.with_label_values(&[reason]);
        }
        for reason in KILLED_FOR {
            metrics.slots_killed.with_label_values(&[reason]);
        }
        for &way in FetchWay::VARIANTS {
            metrics.fetch_ways.with_label_values(&[way]);
        }
        metrics.set_walls(&[]);
        for &reason in HandedBack::VARIANTS {
            metrics.handed_back.with_label_values(&[reason]);
        }
        for state in TokenState::VARIANTS {
            metrics
                .token_states
                .with_label_values(&[GITHUB, state.as_ref()]);
        }
        metrics
    }

    /// Counts a job that ended.
    pub fn job_ended(&self, outcome: Outcome) {
        self.job_counter(outcome).inc();
    }

    fn job_counter(&self, outcome: Outcome) -> IntCounter {
        let class = match &outcome {
            Outcome::Failed(class) => class.as_ref(),
            _ => "",
        };
        self.jobs.with_label_values(&[outcome.as_ref(), class])
    }

    /// Counts a job that failed; `host` is a [`FetchPolicy::label`](crate::fetch::policy::FetchPolicy::label).
    pub fn failed_at(&self, host: &str, class: FaultKind) {
        self.failures
            .with_label_values(&[host, class.as_ref()])
            .inc();
    }

    /// Shows a host's failures from the first one on.
    pub fn show_failures_of(&self, host: &str) {
        for class in FaultKind::VARIANTS {
            self.failures.with_label_values(&[host, class.as_ref()]);
        }
    }

    /// Counts an attempt that will be repeated.
    pub fn retried(&self, class: FaultKind) {
        self.retries.with_label_values(&[class]).inc();
    }

    /// Counts `count` repositories of which the cache said `reason`.
    pub fn cache_checked(&self, reason: CacheReason, count: u64) {
        self.cache_checks.with_label_values(&[reason]).inc_by(count);
    }

    /// Counts a slot that was ended; `reason` is one of a few fixed words.
    pub fn slot_killed(&self, reason: &'static str) {
        self.slots_killed.with_label_values(&[reason]).inc();
    }

    /// Counts a repository that was fetched this way.
    pub fn fetched_by(&self, way: FetchWay) {
        self.fetch_ways.with_label_values(&[way]).inc();
    }

    /// Shows which walls stand around slots.
    pub fn set_walls(&self, standing: &[Wall]) {
        for wall in Wall::VARIANTS {
            let shown = self.slot_walls.with_label_values(&[wall]);
            shown.set(standing.contains(wall).into());
        }
    }

    /// Notes how long a fetch took.
    pub fn fetched_in(&self, duration: Duration) {
        self.fetch_seconds.observe(duration.as_secs_f64());
    }

    /// Notes how long a digest took.
    pub fn digested_in(&self, duration: Duration) {
        self.digest_seconds.observe(duration.as_secs_f64());
    }

    /// Notes how long storing took.
    pub fn stored_in(&self, duration: Duration) {
        self.store_seconds.observe(duration.as_secs_f64());
    }

    /// Notes how long ago the job of a digest that is stored now was put on the queue.
    pub fn stored_after(&self, enqueued: OffsetDateTime) {
        // By two machines' clocks.
        let waited = (OffsetDateTime::now_utc() - enqueued).as_seconds_f64();
        self.queue_to_stored_seconds.observe(waited.max(0.0));
    }

    /// Counts a job that goes back.
    pub fn handed_back(&self, why: HandedBack) {
        self.handed_back.with_label_values(&[why]).inc();
    }

    /// Shows from now on what `throttle` and `gate` pause.
    pub fn show(&self, throttle: &Arc<HostThrottle>, gate: &Arc<InfraGate>) {
        *self.paused() = Some((Arc::clone(throttle), Arc::clone(gate)));
    }

    fn paused(&self) -> MutexGuard<'_, Option<Paused>> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which disk work is done on.
    pub fn set_scratch(&self, folder: &Path) {
        // The first one counts: the programs have no other.
        _ = self.scratch.set(folder.to_owned());
    }

    /// Says which tokens there are.
    pub fn set_tokens(&self, tokens: &Arc<TokenPool>) {
        // As above.
        _ = self.tokens.set(Arc::clone(tokens));
    }

    fn show_tokens(&self) {
        let Some(tokens) = self.tokens.get() else {
            return;
        };
        let counts = tokens.count(std::time::Instant::now());
        for host in counts.keys().map(|(host, _)| host) {
            for state in TokenState::VARIANTS {
                let count = counts.get(&(host.clone(), *state));
                let gauge = self
                    .token_states
                    .with_label_values(&[host.as_str(), state.as_ref()]);
                gauge.set(count.copied().unwrap_or_default());
            }
        }
    }
}

impl Expose for Metrics {
    fn render(&self) -> Vec<u8> {
        // Held to the end: of two clients at a time, only one may add the new CPU time.
        let paused = self.paused();
        if let Some((throttle, gate)) = &*paused {
            let hosts = throttle.paused(Instant::now()).len();
            self.throttled_hosts
                .set(i64::try_from(hosts).unwrap_or(i64::MAX));
            self.infra_paused.set(gate.is_closed().into());
        }
        self.show_tokens();
        if let Some(seconds) = children_cpu_seconds() {
            self.slots_cpu
                .inc_by((seconds - self.slots_cpu.get()).max(0.0));
        }
        if let Some(disk) = self
            .scratch
            .get()
            .and_then(|folder| rustix::fs::statvfs(folder).ok())
        {
            self.scratch_free
                .set((disk.f_bavail * disk.f_frsize) as f64);
            self.scratch_size
                .set((disk.f_blocks * disk.f_frsize) as f64);
        }
        registry::render(&self.registry)
    }
}

/// Clock ticks per second, in which Linux reports CPU time on every platform.
const TICKS: f64 = 100.0;

/// CPU time of ended child processes, from `/proc/self/stat` (`man 5 proc`: cutime and cstime).
fn children_cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name is in parentheses, and may contain some.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(13);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / TICKS)
}

/// Seconds of what a worker does itself.
const OF_WORK: [f64; 14] = [
    0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];
/// Seconds of what may wait for others, a whole run long: closest where most runs are, minutes to some hours, since
/// a quantile is guessed between two bounds.
const OF_WAITING: [f64; 20] = [
    1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 180.0, 300.0, 450.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0,
    3600.0, 5400.0, 7200.0, 10_800.0, 21_600.0, 43_200.0,
];

#[cfg(test)]
mod tests {
    use common::fault::Fault;

    use super::*;

    #[test]
    fn what_was_never_counted_shows_as_zero() {
        let metrics = Metrics::new();
        metrics.job_ended(Outcome::Failed(FaultKind::Gone));
        metrics.cache_checked(CacheReason::Hit, 5);
        let text = String::from_utf8(metrics.render()).unwrap();
        for line in [
            r#"repofleet_jobs_total{class="gone",outcome="failed"} 1"#,
            r#"repofleet_jobs_total{class="",outcome="processed"} 0"#,
            r#"repofleet_failures_total{class="gone",host="github.com"} 0"#,
            r#"repofleet_cache_checks_total{reason="hit"} 5"#,
            r#"repofleet_cache_checks_total{reason="stale"} 0"#,
            "repofleet_slots_busy 0",
            r#"repofleet_slots_killed_total{reason="stall"} 0"#,
            r#"repofleet_handed_back_total{reason="host"} 0"#,
            r#"repofleet_tokens{host="github.com",state="usable"} 0"#,
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_shows_until_it_is_over() {
        let metrics = Metrics::new();
        let shows = |line: &str| {
            let text = String::from_utf8(metrics.render()).unwrap();
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        };
        shows("repofleet_throttled_hosts 0");
        let (throttle, gate) = (Arc::default(), Arc::default());
        metrics.show(&throttle, &gate);
        let now = Instant::now();
        throttle.heard("a", Duration::from_secs(3600), now);
        throttle.heard("a", Duration::from_millis(1), now);
        throttle.heard("b", Duration::from_millis(1), now);
        tokio::time::advance(Duration::from_millis(2)).await;
        shows("repofleet_throttled_hosts 1");
        gate.close(&Fault::infra("the disk is full"), now, 0);
        shows("repofleet_infra_paused 1");
        let looking = Arc::clone(&gate);
        tokio::spawn(async move {
            looking
                .look_after(None, || std::future::ready(Ok(())))
                .await;
        });
        assert!(gate.opened().await);
        shows("repofleet_infra_paused 0");
    }

    #[test]
    fn a_clock_that_is_behind_makes_no_negative_wait() {
        let metrics = Metrics::new();
        metrics.stored_after(OffsetDateTime::now_utc() + Duration::from_secs(60));
        metrics.stored_after(OffsetDateTime::now_utc() - Duration::from_secs(60));
        let text = String::from_utf8(metrics.render()).unwrap();
        for line in [
            r#"repofleet_queue_to_stored_seconds_bucket{le="1"} 1"#,
            "repofleet_queue_to_stored_seconds_count 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
