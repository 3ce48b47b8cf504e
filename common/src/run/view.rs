//! The fold of a run's records: the one place that turns ledger entries into numbers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::broker::{Event, LedgerEntry, WorkerState};
use crate::fault::FaultKind;
use crate::ids::{JobKey, RunId};
use crate::job::Job;
use crate::outcome::{Outcome, OutcomeRecord};
use crate::run::documents::{
    Failure, JobList, Manifest, PausedHost, PausedWorkers, Renamed, RunSummary, pauses,
};
use crate::text::{format_duration, percent, thousands};

/// The past that the current rate is measured over.
const RATE_WINDOW: Duration = Duration::from_secs(5 * 60);
/// After this long without an outcome the rate says nothing about the rest: what is open may wait
/// for a host or a store.
const SILENCE: Duration = Duration::from_secs(60);
/// A worker that has recorded nothing for longer does not count as seen.
const SEEN: Duration = Duration::from_secs(60);
/// A waiting worker records its reason each minute. One that has stopped doing so is gone.
const STATE_HOLDS: Duration = Duration::from_secs(5 * 60);

/// The state of one run, folded from its documents and the ledger's entries.
///
/// `total = cached + processed + failed + open`. The order of entries does not matter, and an entry
/// that is applied twice counts once. An outcome that a worker recorded wins over the broker giving
/// the job up; among several outcomes of one job the earliest counts.
#[derive(Debug)]
pub struct RunView {
    run: RunId,
    started: Option<OffsetDateTime>,
    cached: u64,
    adopted: u64,
    /// Failed without a job.
    invalid: Vec<Failure>,
    failed_before: u64,
    jobs: HashMap<JobKey, JobState>,
    open: u64,
    expects: Expects,
    caught_up: bool,
    /// Whether any entry belonged to this run.
    known: bool,
    /// When the run's first job was queued.
    first_queued: Option<OffsetDateTime>,
    workers: HashMap<String, WorkerSeen>,
}

/// Which records settle a run's jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    /// Those of the run, and those of the runs that the list names for an adopted job.
    Listed,
    /// A list of version 0 does not name these: those of any run since this one began.
    AnyRun,
    /// There is no list: the run's own entries say what its jobs are.
    Unlisted,
}

#[derive(Debug, Default)]
struct JobState {
    adopted_from: Vec<RunId>,
    queued: Option<OffsetDateTime>,
    settled: Option<Settled>,
}

impl JobState {
    fn adopted(adopted_from: Vec<RunId>) -> Self {
        Self {
            adopted_from,
            ..Self::default()
        }
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The outcome.
    pub outcome: Outcome,
    /// Why it failed, for a person.
    pub message: String,
    /// When that was recorded.
    at: OffsetDateTime,
    /// Whether the broker gave the job up, rather than a worker ending it.
    given_up: bool,
    stored_bytes: u64,
    fetched_bytes: u64,
    renamed_to: Option<String>,
}

impl Settled {
    /// Where the host says that the repository is now, if that is another path than was asked for.
    pub fn renamed_to(&self) -> Option<&str> {
        self.renamed_to.as_deref()
    }
}

impl Settled {
    /// Of several the least counts.
    fn rank(&self) -> impl Ord + '_ {
        let failed = matches!(self.outcome, Outcome::Failed(_));
        let name = self.outcome.to_string();
        let bytes = (self.stored_bytes, self.fetched_bytes);
        (self.given_up, self.at, failed, name, &self.message, bytes)
    }
}

/// What a worker's records say about it.
#[derive(Debug)]
struct WorkerSeen {
    last: OffsetDateTime,
    state: WorkerState,
    state_at: OffsetDateTime,
}

/// How far a run in one process had got: `runs/{run}/progress.json`, since it has no ledger that
/// others could read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunProgress {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Its numbers then.
    #[serde(flatten)]
    pub run: RunSnapshot,
}

/// A run at one moment. `None` is not known, or does not apply any more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSnapshot {
    /// The run.
    pub run_id: RunId,
    /// When it began.
    #[serde(with = "time::serde::rfc3339::option")]
    pub started_at: Option<OffsetDateTime>,
    /// Seconds from its start until now, or until it closed.
    pub elapsed_seconds: Option<u64>,
    /// Distinct repositories selected plus unusable entries.
    pub total_repos: u64,
    /// Digests that were there already.
    pub cached: u64,
    /// Percent, one decimal.
    pub cache_hit_rate: f64,
    /// Jobs that ended with a digest in the store.
    pub processed: u64,
    /// Of those: HEAD had not moved since the stored digest, whose record was renewed.
    pub unmoved: u64,
    /// Of those: somebody had stored this `pushedAt` meanwhile.
    pub unchanged: u64,
    /// Of those: somebody had stored a newer `pushedAt` meanwhile.
    pub superseded: u64,
    /// Jobs and entries that ended without a digest.
    pub failed: u64,
    /// Of those: failed in an earlier run and not tried again.
    pub failed_before: u64,
    /// How many failed of each class.
    pub failures_by_class: BTreeMap<FaultKind, u64>,
    /// Jobs that an earlier run had published.
    pub adopted: u64,
    /// Jobs without an outcome.
    pub open: u64,
    /// Over the last five minutes.
    pub outcomes_per_minute: Option<f64>,
    /// Seconds until the run closes at that rate; `None` while nothing is done or all workers wait.
    pub eta_seconds: Option<u64>,
    /// The open job that was queued first.
    pub oldest_open_repo: Option<String>,
    /// How long ago that was.
    pub oldest_open_seconds: Option<u64>,
    /// Workers that recorded anything within the last minute, for any run.
    pub workers_seen: Option<u64>,
    /// Why workers start no jobs.
    pub paused: Vec<PausedWorkers>,
    /// Hosts that rate-limited the fleet.
    pub hosts_paused: Vec<PausedHost>,
}

impl RunView {
    /// A run of which no entry was seen yet. Without a list, its jobs are those that the ledger
    /// names.
    pub fn new(run: RunId, manifest: Option<&Manifest>, list: Option<JobList>) -> Self {
        let started = manifest.and_then(|m| OffsetDateTime::parse(&m.started_at, &Rfc3339).ok());
        let expects = match &list {
            None => Expects::Unlisted,
            Some(list) if list.version == 0 => Expects::AnyRun,
            Some(_) => Expects::Listed,
        };
        let list = list.unwrap_or_default();
        let jobs: HashMap<_, _> = list
            .jobs
            .into_iter()
            .map(|job| (job.key, JobState::adopted(job.adopted_from)))
            .collect();
        Self {
            run,
            started,
            cached: manifest.map_or(0, Manifest::cached),
            adopted: manifest.map_or(0, |m| m.adopted),
            invalid: list.invalid,
            failed_before: manifest.map_or(0, Manifest::failed_before),
            open: jobs.len() as u64,
            jobs,
            expects,
            caught_up: false,
            known: false,
            first_queued: None,
            workers: HashMap::new(),
        }
    }

    /// Takes an entry into account, of this run or not. Returns whether a job of this run got its
    /// outcome by it, or a better one than it had.
    pub fn apply(&mut self, entry: &LedgerEntry) -> bool {
        match &entry.event {
            Event::Job(job) => self.queue(job, entry.at),
            Event::Worker(state) => self.hear(state.clone(), entry.at),
            Event::Outcome(_) | Event::Dead(_) => {
                let given_up = matches!(entry.event, Event::Dead(_));
                let record = entry.event.clone().into_outcome();
                return record.is_some_and(|record| self.settle(record, entry.at, given_up));
            }
        }
        false
    }

    fn queue(&mut self, job: &Job, at: OffsetDateTime) {
        let ours = job.run == self.run;
        if ours {
            self.known = true;
            self.first_queued = Some(self.first_queued.map_or(at, |first| first.min(at)));
        }
        let any = self.expects == Expects::AnyRun;
        let Some(expected) = self.expected(job.key(), ours) else {
            return;
        };
        if ours || any || expected.adopted_from.contains(&job.run) {
            expected.queued = Some(expected.queued.map_or(at, |queued| queued.min(at)));
        }
    }

    /// The job's state, if the run waits or waited for it.
    fn expected(&mut self, key: JobKey, ours: bool) -> Option<&mut JobState> {
        if ours && self.expects == Expects::Unlisted && !self.jobs.contains_key(&key) {
            self.open += 1;
            return Some(self.jobs.entry(key).or_default());
        }
        self.jobs.get_mut(&key)
    }

    fn settle(&mut self, record: OutcomeRecord, at: OffsetDateTime, given_up: bool) -> bool {
        if !record.worker.is_empty() {
            self.worker(&record.worker, at);
        }
        let ours = record.run == self.run;
        // The ledger tells the time to the second.
        let started = self
            .started
            .map(|at| at.replace_nanosecond(0).unwrap_or(at));
        let any = self.expects == Expects::AnyRun
            && (given_up || started.is_some_and(|started| at >= started));
        let Some(job) = self.expected(record.key(), ours) else {
            return false;
        };
        // Another run was cancelled, not this one: its job is lost to this one, which publishes it again.
        let cancelled = record.outcome == Outcome::CANCELLED;
        if !(ours || !cancelled && (any || job.adopted_from.contains(&record.run))) {
            return false;
        }
        let settled = Settled {
            outcome: record.outcome,
            message: record.message,
            at,
            given_up,
            stored_bytes: record.stored_bytes,
            fetched_bytes: record.fetched_bytes,
            renamed_to: record.renamed_to,
        };
        let first = match &job.settled {
            Some(known) if known.rank() <= settled.rank() => return false,
            known => known.is_none(),
        };
        job.settled = Some(settled);
        self.open -= u64::from(first);
        self.known = true;
        true
    }

    fn hear(&mut self, state: WorkerState, at: OffsetDateTime) {
        let worker = self.worker(&state.worker, at);
        if at >= worker.state_at {
            (worker.state, worker.state_at) = (state, at);
        }
    }

    fn worker(&mut self, name: &str, at: OffsetDateTime) -> &mut WorkerSeen {
        let worker = self.workers.entry(name.to_owned());
        let worker = worker.or_insert_with(|| WorkerSeen {
            last: at,
            state: WorkerState::default(),
            state_at: OffsetDateTime::UNIX_EPOCH,
        });
        worker.last = worker.last.max(at);
        worker
    }

    /// Notes that everything was applied that the ledger held at first.
    pub fn set_caught_up(&mut self) {
        self.caught_up = true;
    }

    /// Whether it was; until then the numbers are of the past.
    pub fn caught_up(&self) -> bool {
        self.caught_up
    }

    /// Whether any entry belonged to this run.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// The run.
    pub fn run(&self) -> &RunId {
        &self.run
    }

    /// When it began by its manifest.
    pub fn started(&self) -> Option<OffsetDateTime> {
        self.started
    }

    /// Distinct repositories selected plus unusable entries.
    pub fn total(&self) -> u64 {
        self.cached + (self.invalid.len() + self.jobs.len()) as u64
    }

    /// Those of them that the cache check was made for.
    fn checked(&self) -> u64 {
        self.cached + self.failed_before + self.jobs.len() as u64
    }

    /// Everything but the open jobs.
    pub fn done(&self) -> u64 {
        self.total() - self.open
    }

    /// Jobs without an outcome.
    pub fn open(&self) -> u64 {
        self.open
    }

    /// Whether every job has its outcome. Without a list, jobs not read yet are open.
    pub fn closes(&self) -> bool {
        self.open == 0 && (self.caught_up || self.expects != Expects::Unlisted)
    }

    /// The open jobs, in no particular order.
    pub fn open_jobs(&self) -> impl Iterator<Item = &JobKey> {
        let open = self.jobs.iter().filter(|(_, job)| job.settled.is_none());
        open.map(|(key, _)| key)
    }

    /// Whether the ledger holds the job, as published by this run or a run that it was adopted from.
    pub fn is_queued(&self, key: &JobKey) -> bool {
        self.jobs.get(key).is_some_and(|job| job.queued.is_some())
    }

    /// The earlier runs that published a job of this one.
    pub fn adopted_from(&self, key: &JobKey) -> &[RunId] {
        self.jobs.get(key).map_or(&[], |job| &job.adopted_from)
    }

    /// How a job ended, if it did.
    pub fn settled(&self, key: &JobKey) -> Option<&Settled> {
        self.jobs.get(key)?.settled.as_ref()
    }

    /// When the last job got its outcome; `None` while some are open. A run that found everything
    /// cached closed as it began.
    pub fn closed_at(&self) -> Option<OffsetDateTime> {
        let settled = self.jobs.values().filter_map(|job| job.settled.as_ref());
        let last = settled.map(|settled| settled.at).max().or(self.started);
        last.filter(|_| self.closes())
    }

    /// The numbers at `now`.
    pub fn snapshot(&self, now: OffsetDateTime) -> RunSnapshot {
        let started_at = self.started.or(self.first_queued);
        let end = self.closed_at().unwrap_or(now);
        let mut snapshot = RunSnapshot {
            run_id: self.run.clone(),
            started_at,
            elapsed_seconds: started_at.map(|at| seconds(end - at)),
            total_repos: self.total(),
            cached: self.cached,
            cache_hit_rate: tenths(percent(self.cached, self.checked())),
            processed: 0,
            unmoved: 0,
            unchanged: 0,
            superseded: 0,
            failed: 0,
            failed_before: self.failed_before,
            failures_by_class: BTreeMap::new(),
            adopted: self.adopted,
            open: self.open,
            outcomes_per_minute: None,
            eta_seconds: None,
            oldest_open_repo: None,
            oldest_open_seconds: None,
            workers_seen: Some(self.workers_seen(now).count() as u64),
            paused: self.paused(now),
            hosts_paused: self.hosts_paused(now),
        };
        let settled = self.jobs.values().filter_map(|job| job.settled.as_ref());
        let failed = self.invalid.iter().map(|failure| failure.class);
        let mut failed: Vec<_> = failed.collect();
        for settled in settled {
            match settled.outcome {
                Outcome::Processed => snapshot.processed += 1,
                Outcome::Unmoved => snapshot.unmoved += 1,
                Outcome::Unchanged => snapshot.unchanged += 1,
                Outcome::Superseded => snapshot.superseded += 1,
                Outcome::Failed(class) => failed.push(class),
            }
        }
        snapshot.processed += snapshot.unmoved + snapshot.unchanged + snapshot.superseded;
        snapshot.failed = failed.len() as u64;
        for class in failed {
            *snapshot.failures_by_class.entry(class).or_insert(0) += 1;
        }
        if !self.closes() {
            self.forecast(&mut snapshot, now);
            let queued = self.jobs.iter().filter(|(_, job)| job.settled.is_none());
            let queued = queued.filter_map(|(key, job)| Some((job.queued?, &key.repo)));
            if let Some((at, repo)) = queued.min() {
                snapshot.oldest_open_repo = Some(repo.to_string());
                snapshot.oldest_open_seconds = Some(seconds(now - at));
            }
        }
        snapshot
    }

    /// Rate and time left.
    fn forecast(&self, snapshot: &mut RunSnapshot, now: OffsetDateTime) {
        let settled = self.jobs.values().filter_map(|job| job.settled.as_ref());
        let times = settled.map(|settled| settled.at);
        let times: Vec<_> = times.filter(|at| *at >= now - RATE_WINDOW).collect();
        let Some(begun) = self.first_queued.or(self.started) else {
            return;
        };
        let begun = times.iter().min().map_or(begun, |first| begun.min(*first));
        // Less than a second would make a flood of the first outcome.
        let span = (now - begun.max(now - RATE_WINDOW))
            .as_seconds_f64()
            .max(1.0);
        let rate = times.len() as f64 * 60.0 / span;
        snapshot.outcomes_per_minute = Some(tenths(rate));

        let silent = times.iter().all(|at| *at < now - SILENCE);
        let works = |worker: &WorkerSeen| worker.state.infra.is_none();
        let all_wait = !snapshot.paused.is_empty() && !self.workers_seen(now).any(works);
        let eta = Duration::try_from_secs_f64(self.open as f64 * 60.0 / rate);
        if let Some(eta) = eta.ok().filter(|_| !silent && !all_wait) {
            let pauses = snapshot.hosts_paused.iter();
            let pauses = pauses.map(|host| seconds(host.until - now));
            snapshot.eta_seconds = pauses.chain([eta.as_secs()]).max();
        }
    }

    fn workers_seen(&self, now: OffsetDateTime) -> impl Iterator<Item = &WorkerSeen> {
        let workers = self.workers.values();
        workers.filter(move |worker| worker.last >= now - SEEN)
    }

    /// The states that still hold.
    fn states(&self, now: OffsetDateTime) -> impl Iterator<Item = &WorkerState> {
        let holds = move |worker: &&WorkerSeen| worker.state_at >= now - STATE_HOLDS;
        self.workers
            .values()
            .filter(holds)
            .map(|worker| &worker.state)
    }

    /// The reason of most workers first.
    fn paused(&self, now: OffsetDateTime) -> Vec<PausedWorkers> {
        let mut reasons = BTreeMap::new();
        for reason in self.states(now).filter_map(|state| state.infra.as_ref()) {
            *reasons.entry(reason).or_insert(0) += 1;
        }
        let paused = reasons.into_iter().map(|(reason, workers)| PausedWorkers {
            reason: reason.clone(),
            workers,
        });
        let mut paused: Vec<_> = paused.collect();
        paused.sort_by_key(|paused| Reverse(paused.workers));
        paused
    }

    fn hosts_paused(&self, now: OffsetDateTime) -> Vec<PausedHost> {
        let mut hosts = BTreeMap::new();
        for (host, millis) in self.states(now).flat_map(|state| &state.hosts) {
            let until = hosts.entry(host).or_insert(*millis);
            *until = *millis.max(until);
        }
        let hosts = hosts.into_iter().filter_map(|(host, millis)| {
            let until = OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000);
            let host = host.clone();
            let until = until.ok().filter(|until| *until > now)?;
            Some(PausedHost { host, until })
        });
        hosts.collect()
    }

    /// What limits these numbers, as sentences for a person.
    pub fn notes(&self, now: OffsetDateTime) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(ahead) = self
            .started
            .map(|at| at - now)
            .filter(|ahead| ahead.is_positive())
        {
            notes.push(format!(
                "this run began {} in the future by this machine's clock: the clocks differ",
                format_duration(ahead.unsigned_abs())
            ));
        }
        let open = self.jobs.values().filter(|job| job.settled.is_none());
        let unknown = open.filter(|job| job.queued.is_none()).count() as u64;
        if !self.caught_up || unknown == 0 {
        } else if unknown == self.open && !self.known {
            notes.push("the ledger knows nothing of this run: nothing is published yet, or the ledger was emptied since".to_owned());
        } else {
            notes.push(format!(
                "{} of the open jobs are not in the ledger: not published yet, or it was emptied since",
                thousands(unknown)
            ));
        }
        notes
    }

    /// The run's summary at `now`.
    pub fn summary(&self, now: OffsetDateTime) -> RunSummary {
        let snapshot = self.snapshot(now);
        let elapsed = snapshot.started_at.map(|at| now - at);
        let elapsed = elapsed.and_then(|elapsed| Duration::try_from(elapsed).ok());
        let elapsed = elapsed.unwrap_or_default();
        let (mut failures, mut open) = (self.invalid.clone(), Vec::new());
        let (mut bytes_stored, mut bytes_fetched) = (0, 0);
        let mut renamed = Vec::new();
        for (key, job) in &self.jobs {
            let Some(settled) = &job.settled else {
                open.push(key.repo.to_string());
                continue;
            };
            bytes_stored += settled.stored_bytes;
            bytes_fetched += settled.fetched_bytes;
            renamed.extend(settled.renamed_to.clone().map(|to| Renamed {
                repo: key.repo.to_string(),
                to,
            }));
            if let Outcome::Failed(class) = settled.outcome {
                failures.push(Failure {
                    repo: key.repo.to_string(),
                    class,
                    message: settled.message.clone(),
                });
            }
        }
        failures.sort_by(|a, b| (a.class, &a.repo).cmp(&(b.class, &b.repo)));
        renamed.sort_by(|a, b| a.repo.cmp(&b.repo));
        open.sort();
        RunSummary {
            run_id: self.run.clone(),
            closed: self.closes(),
            total_repos: snapshot.total_repos,
            cached: snapshot.cached,
            processed: snapshot.processed,
            unmoved: snapshot.unmoved,
            unchanged: snapshot.unchanged,
            superseded: snapshot.superseded,
            adopted: snapshot.adopted,
            failed: snapshot.failed,
            failed_before: snapshot.failed_before,
            cache_hit_rate: snapshot.cache_hit_rate,
            elapsed_seconds: (elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
            elapsed_formatted: format_duration(elapsed),
            failures_by_class: snapshot.failures_by_class,
            bytes_stored,
            bytes_fetched,
            failures,
            renamed,
            open,
            paused: snapshot.paused,
            hosts_paused: snapshot.hosts_paused,
        }
    }
}

impl RunSnapshot {
    /// Everything but the open jobs.
    pub fn done(&self) -> u64 {
        self.total_repos.saturating_sub(self.open)
    }

    /// `Processed 500/21,000 (2.4%), cache hit: 91.2%, elapsed: 15m, ETA: 5h 30m`, and then how many
    /// were cancelled and why workers wait, if any were or do.
    pub fn progress_sentence(&self) -> String {
        let duration = |seconds: Option<u64>| {
            let duration = seconds.map(|seconds| format_duration(Duration::from_secs(seconds)));
            duration.unwrap_or_else(|| "unknown".to_owned())
        };
        let counts = format!(
            "Processed {}/{} ({:.1}%), cache hit: {:.1}%, elapsed: {}, ETA: {}",
            thousands(self.done()),
            thousands(self.total_repos),
            percent(self.done(), self.total_repos),
            self.cache_hit_rate,
            duration(self.elapsed_seconds),
            duration(self.eta_seconds.or((self.open == 0).then_some(0)))
        );
        let cancelled = self.failures_by_class.get(&FaultKind::Cancelled);
        let cancelled = cancelled.map(|count| format!("{} cancelled", thousands(*count)));
        let parts = [counts].into_iter().chain(cancelled);
        parts.chain(self.pauses()).collect::<Vec<_>>().join("; ")
    }

    /// Why workers wait: `3 workers paused: disk full`, `github.com rate-limited until 14:05 UTC`.
    pub fn pauses(&self) -> Vec<String> {
        pauses(&self.paused, &self.hosts_paused)
    }
}

/// A run as its producer left it.
impl From<&RunSummary> for RunSnapshot {
    fn from(summary: &RunSummary) -> Self {
        Self {
            run_id: summary.run_id.clone(),
            started_at: None,
            // Whole seconds suffice for a person, and no run lasts 2^64 of them.
            elapsed_seconds: Some(summary.elapsed_seconds.max(0.0) as u64),
            total_repos: summary.total_repos,
            cached: summary.cached,
            cache_hit_rate: summary.cache_hit_rate,
            processed: summary.processed,
            unmoved: summary.unmoved,
            unchanged: summary.unchanged,
            superseded: summary.superseded,
            failed: summary.failed,
            failed_before: summary.failed_before,
            failures_by_class: summary.failures_by_class.clone(),
            adopted: summary.adopted,
            open: summary.open.len() as u64,
            outcomes_per_minute: None,
            eta_seconds: None,
            oldest_open_repo: None,
            oldest_open_seconds: None,
            workers_seen: None,
            paused: summary.paused.clone(),
            hosts_paused: summary.hosts_paused.clone(),
        }
    }
}

/// Whole seconds, 0 where clocks differ the other way.
fn seconds(duration: time::Duration) -> u64 {
    duration.whole_seconds().try_into().unwrap_or(0)
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::ids::PushedAt;
    use crate::job::WIRE_VERSION;
    use crate::run::documents::{CacheReason, ExpectedJob};

    const START: OffsetDateTime = datetime!(2026-11-23 13:00:00.7 UTC);
    const GONE: Outcome = Outcome::Failed(FaultKind::Gone);

    fn run(id: &str) -> RunId {
        RunId::try_from(id.to_owned()).unwrap()
    }

    fn key(repo: &str) -> JobKey {
        JobKey {
            repo: repo.parse().unwrap(),
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
        }
    }

    /// The run `this` of two cached repositories and these jobs, each with the run that it was
    /// adopted from, if any.
    fn documents(jobs: &[(&str, Option<&str>)]) -> (Manifest, JobList) {
        let list = JobList {
            version: JobList::VERSION,
            invalid: Vec::new(),
            jobs: jobs
                .iter()
                .map(|(repo, adopted_from)| ExpectedJob {
                    key: key(repo),
                    adopted_from: adopted_from.iter().map(|from| run(from)).collect(),
                })
                .collect(),
        };
        let manifest = Manifest {
            run: run("this"),
            started_at: START.format(&Rfc3339).unwrap(),
            feed: "feed.json".to_owned(),
            feed_sha256: String::new(),
            feed_entries: 0,
            feed_newest_push: None,
            version: String::new(),
            total: 2 + jobs.len() as u64,
            repeated: 0,
            invalid: 0,
            reasons: [(CacheReason::Hit, 2)].into(),
            adopted: jobs.iter().filter(|(_, from)| from.is_some()).count() as u64,
        };
        (manifest, list)
    }

    fn listed(jobs: &[(&str, Option<&str>)]) -> RunView {
        let (manifest, list) = documents(jobs);
        RunView::new(run("this"), Some(&manifest), Some(list))
    }

    fn own(repos: &[&'static str]) -> RunView {
        let jobs: Vec<_> = repos.iter().map(|repo| (*repo, None)).collect();
        listed(&jobs)
    }

    fn unlisted() -> RunView {
        RunView::new(run("this"), None, None)
    }

    /// Seconds after the start, as the ledger tells the time.
    fn at(second: i64) -> OffsetDateTime {
        START.replace_nanosecond(0).unwrap() + time::Duration::seconds(second)
    }

    fn bare_job(of: &str, repo: &str) -> Job {
        Job {
            version: WIRE_VERSION,
            run: run(of),
            repo: repo.parse().unwrap(),
            url: format!("https://github.com/{repo}"),
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            force: false,
            replay_of: None,
            traceparent: None,
        }
    }

    fn entry(second: i64, event: Event) -> LedgerEntry {
        let at = at(second);
        LedgerEntry { at, event }
    }

    fn job(second: i64, of: &str, repo: &str) -> LedgerEntry {
        entry(second, Event::Job(bare_job(of, repo)))
    }

    fn dead(second: i64, of: &str, repo: &str) -> LedgerEntry {
        entry(second, Event::Dead(bare_job(of, repo).into()))
    }

    fn ended(second: i64, of: &str, repo: &str, outcome: Outcome, worker: &str) -> LedgerEntry {
        let mut record = OutcomeRecord::without_work(key(repo), run(of), outcome, "why");
        record.worker = worker.to_owned();
        (record.stored_bytes, record.fetched_bytes) = (7, 5);
        entry(second, Event::Outcome(record))
    }

    fn done(second: i64, of: &str, repo: &str) -> LedgerEntry {
        ended(second, of, repo, Outcome::Processed, "w")
    }

    fn waits(second: i64, worker: &str, infra: Option<&str>, host: Option<i64>) -> LedgerEntry {
        let hosts = host.map(|until| {
            let until = at(until).unix_timestamp() * 1000;
            ("github.com".to_owned(), until)
        });
        let state = WorkerState {
            worker: worker.to_owned(),
            infra: infra.map(str::to_owned),
            hosts: hosts.into_iter().collect(),
        };
        entry(second, Event::Worker(state))
    }

    fn after(mut view: RunView, entries: &[LedgerEntry]) -> RunView {
        for entry in entries {
            view.apply(entry);
        }
        view.set_caught_up();
        view
    }

    fn permutations(entries: &[LedgerEntry]) -> Vec<Vec<LedgerEntry>> {
        if entries.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for first in 0..entries.len() {
            let mut rest = entries.to_vec();
            let first = rest.remove(first);
            for mut permutation in permutations(&rest) {
                permutation.push(first.clone());
                all.push(permutation);
            }
        }
        all
    }

    /// Including twice, as after a broken connection.
    fn assert_order_is_irrelevant(view: impl Fn() -> RunView, entries: &[LedgerEntry]) {
        let expected = after(view(), entries);
        for order in permutations(entries) {
            for order in [order.clone(), [&order[..], &order[1..]].concat()] {
                let view = after(view(), &order);
                let now = at(130);
                assert_eq!(view.snapshot(now), expected.snapshot(now), "{order:#?}");
                assert_eq!(view.summary(now), expected.summary(now), "{order:#?}");
                assert_eq!(view.notes(now), expected.notes(now), "{order:#?}");
            }
        }
    }

    #[test]
    fn any_order_of_entries_gives_the_same_numbers() {
        let entries = [
            job(10, "this", "a/a"),
            dead(10, "this", "a/a"),
            done(20, "this", "a/a"),
            ended(21, "this", "a/b", GONE, "w1"),
            ended(22, "this", "a/b", Outcome::Unchanged, "w2"),
            waits(30, "w1", Some("disk full"), None),
            waits(31, "w1", None, Some(3600)),
        ];
        assert_order_is_irrelevant(|| own(&["a/a", "a/b", "a/c"]), &entries);
        assert_order_is_irrelevant(unlisted, &entries);
        assert_order_is_irrelevant(
            || listed(&[("a/a", None), ("a/b", Some("other"))]),
            &[
                job(-900, "other", "a/b"),
                job(9, "other", "a/a"),
                done(30, "other", "a/a"),
                done(31, "other", "a/b"),
                dead(0, "this", "a/a"),
            ],
        );
    }

    #[test]
    fn an_outcome_wins_over_a_dead_letter_whatever_comes_first() {
        let died = dead(10, "this", "a/a");
        let finished = done(20, "this", "a/a");
        let mut view = own(&["a/a"]);
        assert!(view.apply(&died));
        assert_eq!(
            view.summary(at(30)).failures_by_class,
            [(FaultKind::Killed, 1)].into()
        );
        assert!(view.apply(&finished), "the death is corrected");
        let summary = view.summary(at(30));
        assert_eq!(
            (summary.processed, summary.failed, summary.bytes_stored),
            (1, 0, 7)
        );
        assert!(!view.apply(&died));
        assert_eq!(view.summary(at(30)), summary);
        assert_eq!(view.open(), 0);
    }

    #[test]
    fn records_count_by_the_run_that_they_are_of() {
        let view = || listed(&[("a/own", None), ("a/adopted", Some("first"))]);
        for (entry, counts) in [
            (done(5, "this", "a/own"), true),
            // Another run's job for the same push: other work, perhaps from another URL.
            (done(5, "first", "a/own"), false),
            (dead(5, "first", "a/own"), false),
            (done(5, "first", "a/adopted"), true),
            (dead(-3000, "first", "a/adopted"), true),
            // Published again by this run.
            (done(5, "this", "a/adopted"), true),
            (done(5, "second", "a/adopted"), false),
            // By a clock that is slow, or far ahead.
            (done(-7000, "this", "a/own"), true),
            (done(90_000, "first", "a/adopted"), true),
            (done(5, "this", "a/unexpected"), false),
        ] {
            assert_eq!(view().apply(&entry), counts, "{entry:?}");
        }
        // What an adopted job's run was cancelled for, this run still wants.
        for (run, repo, counts) in [
            ("first", "a/adopted", false),
            ("this", "a/adopted", true),
            ("this", "a/own", true),
        ] {
            let mut view = view();
            let cancelled = ended(5, run, repo, Outcome::CANCELLED, "");
            assert_eq!(view.apply(&cancelled), counts, "{run} {repo}");
            // Digested all the same, it stays what it was counted as.
            assert_eq!(view.apply(&done(9, run, repo)), !counts, "{run} {repo}");
        }
        let mut other_push = bare_job("this", "a/own");
        other_push.pushed_at = PushedAt::new("2026-01-02T00:00:00Z").unwrap();
        assert!(!view().apply(&entry(5, Event::Dead(other_push.into()))));
    }

    #[test]
    fn a_list_of_version_0_counts_any_run_since_the_start() {
        let (mut manifest, mut list) = documents(&[("a/a", None), ("a/b", None)]);
        list.version = 0;
        manifest.adopted = 1;
        let view = || RunView::new(run("this"), Some(&manifest), Some(list.clone()));
        for (entry, counts) in [
            (done(0, "other", "a/a"), true),
            (done(-1, "other", "a/a"), false),
            (done(-1, "this", "a/a"), true),
            // It tells when its job was queued, not when that died.
            (dead(-3000, "other", "a/a"), true),
            (done(0, "other", "a/z"), false),
        ] {
            assert_eq!(view().apply(&entry), counts, "{entry:?}");
        }
        assert_eq!(view().snapshot(at(1)).adopted, 1);
    }

    #[test]
    fn a_run_is_counted_from_its_documents_and_the_ledger() {
        let view = || own(&["a/a", "a/b", "a/c", "a/d", "a/e"]);
        let mut entries = vec![
            job(10, "this", "a/a"),
            job(11, "this", "a/b"),
            job(12, "this", "a/c"),
            job(13, "this", "a/d"),
            ended(70, "this", "a/a", Outcome::Processed, "w1"),
            ended(100, "this", "a/b", GONE, "w2"),
            ended(110, "this", "a/c", Outcome::Unchanged, "w1"),
        ];
        let running = after(view(), &entries);
        let now = running.snapshot(at(130));
        let counts = (now.total_repos, now.cached, now.processed, now.unchanged);
        assert_eq!(counts, (7, 2, 2, 1));
        assert_eq!((now.failed, now.open, now.done()), (1, 2, 5));
        assert_eq!((running.total(), running.open(), running.done()), (7, 2, 5));
        assert_eq!(now.failures_by_class, [(FaultKind::Gone, 1)].into());
        assert_eq!(now.elapsed_seconds, Some(129));
        // Three in the two minutes since the first job, so two take 80 s.
        assert_eq!(now.outcomes_per_minute, Some(1.5));
        assert_eq!(now.eta_seconds, Some(80));
        assert_eq!(now.oldest_open_repo.as_deref(), Some("a/d"));
        assert_eq!(now.oldest_open_seconds, Some(117));
        assert_eq!(now.workers_seen, Some(2));
        let notes = running.notes(at(130));
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("1 of the open jobs"), "{notes:?}");
        assert_eq!(running.open_jobs().count(), 2);

        let later = running.snapshot(at(1000));
        assert_eq!(later.outcomes_per_minute, Some(0.0));
        assert_eq!((later.eta_seconds, later.workers_seen), (None, Some(0)));

        entries.extend([
            job(140, "this", "a/e"),
            dead(150, "this", "a/d"),
            done(160, "this", "a/e"),
        ]);
        let closed = after(view(), &entries);
        let now = closed.snapshot(at(9000));
        assert!(closed.closes());
        assert_eq!((now.open, now.elapsed_seconds), (0, Some(159)));
        let failures = [(FaultKind::Gone, 1), (FaultKind::Killed, 1)];
        assert_eq!(now.failures_by_class, failures.into());
        assert_eq!((now.outcomes_per_minute, now.eta_seconds), (None, None));
        assert_eq!(closed.notes(at(9000)), [""; 0]);
        let summary = closed.summary(at(9000));
        assert_eq!((summary.bytes_stored, summary.bytes_fetched), (28, 20));
        assert_eq!(summary.failures[0].repo, "a/b", "sorted by class");
    }

    /// A repository that fails in each run is as old as this run's job, not the one before's.
    #[test]
    fn an_open_job_is_as_old_as_its_own_entry_says() {
        let oldest = |view, entries: &[_]| {
            let now = after(view, entries).snapshot(at(70));
            (now.oldest_open_repo, now.oldest_open_seconds)
        };
        let entries = [
            job(-50, "before", "a/a"),
            ended(-20, "before", "a/a", GONE, "w1"),
            job(10, "this", "a/a"),
            job(11, "this", "a/b"),
            // A second copy changes nothing.
            job(30, "this", "a/a"),
        ];
        let expected = (Some("a/a".to_owned()), Some(60));
        assert_eq!(oldest(own(&["a/a", "a/b"]), &entries), expected);
        let entries = [
            job(-7000, "older", "a/a"),
            done(-6000, "older", "a/a"),
            job(-1000, "other", "a/a"),
            job(5, "this", "a/b"),
        ];
        let view = listed(&[("a/a", Some("other")), ("a/b", None)]);
        assert_eq!(oldest(view, &entries), (Some("a/a".to_owned()), Some(1070)));
    }

    #[test]
    fn the_rate_is_that_of_the_last_minutes() {
        let repos: Vec<_> = (0..1000).map(|i| format!("a/r{i:04}")).collect();
        let jobs: Vec<_> = repos.iter().map(|repo| (&**repo, None)).collect();
        let mut view = listed(&jobs);
        view.apply(&job(0, "this", "a/r0000"));
        assert_eq!(
            view.snapshot(at(1)).eta_seconds,
            None,
            "nothing is done yet"
        );
        // One in ten seconds, then one a second.
        for (i, repo) in (0..100).zip(&repos) {
            view.apply(&done(i * 10, "this", repo));
        }
        assert_eq!(view.snapshot(at(1000)).outcomes_per_minute, Some(6.0));
        for (i, repo) in (0..300).zip(&repos[100..]) {
            view.apply(&done(1000 + i, "this", repo));
        }
        let now = view.snapshot(at(1300));
        assert_eq!(
            now.outcomes_per_minute,
            Some(60.0),
            "the slow start is gone"
        );
        assert_eq!(now.eta_seconds, Some(600));
        // Then nothing more: the estimate grows, until what is open seems to wait for something.
        let eta = view.snapshot(at(1350)).eta_seconds.unwrap();
        assert!((700..740).contains(&eta), "{eta}");
        assert_eq!(view.snapshot(at(1360)).eta_seconds, None);
    }

    #[test]
    fn why_workers_wait_is_known_and_no_time_is_promised_meanwhile() {
        let working = [
            job(0, "this", "a/a"),
            done(100, "this", "a/a"),
            ended(101, "this", "a/b", Outcome::Processed, "w2"),
        ];
        let after = |entries: &[LedgerEntry]| {
            let view = own(&["a/a", "a/b", "a/c", "a/d"]);
            let view = super::tests::after(view, &[&working, entries].concat());
            move |second| view.snapshot(at(second))
        };
        let none = after(&[])(110);
        assert_eq!((none.eta_seconds, none.pauses().len()), (Some(110), 0));

        let denied = Some("access denied to bucket x");
        let all = after(&[
            waits(105, "w", denied, None),
            waits(106, "w2", denied, None),
        ]);
        assert_eq!(
            all(110).pauses(),
            ["2 workers paused: access denied to bucket x"]
        );
        assert_eq!(all(110).eta_seconds, None);
        assert!(all(110).progress_sentence().ends_with(
            "(66.7%), cache hit: 33.3%, elapsed: 1m 49s, ETA: unknown; 2 workers paused: access denied to bucket x"
        ), "{}", all(110).progress_sentence());
        assert_eq!(all(500).pauses(), [""; 0], "who no longer says so is gone");

        // One of them works, so it goes on.
        let one = after(&[
            waits(105, "w", denied, None),
            waits(106, "w2", denied, None),
            waits(107, "w2", None, None),
        ]);
        assert_eq!(
            one(110).pauses(),
            ["1 worker paused: access denied to bucket x"]
        );
        assert_eq!(one(110).eta_seconds, Some(110));

        // A host's pause is the least that it takes.
        let host = after(&[
            waits(105, "w", None, Some(3900)),
            waits(106, "w2", None, Some(3600)),
        ]);
        assert_eq!(
            host(110).pauses(),
            ["github.com rate-limited until 14:05 UTC"]
        );
        assert_eq!(host(110).eta_seconds, Some(3790));
        assert_eq!(host(4000).pauses(), [""; 0]);
    }

    /// Nobody writes a summary of a run with `--detach`.
    #[test]
    fn a_run_without_jobs_closed_as_it_began() {
        let view = after(own(&[]), &[done(50, "other", "a/a")]);
        let now = view.snapshot(at(9000));
        assert_eq!((now.cached, now.elapsed_seconds), (2, Some(0)));
        assert_eq!(view.closed_at(), Some(START));
        let nothing = RunView::new(run("this"), None, Some(JobList::default()));
        assert!(nothing.closes());
        assert_eq!(
            nothing.summary(at(0)).sentence(),
            "Pipeline complete: 0 total, 0 cached (0.0%), 0 processed, 0 failed, completed in 0s"
        );
    }

    #[test]
    fn what_limits_the_numbers_is_said() {
        let adopted = || listed(&[("a/a", Some("other")), ("a/b", Some("other"))]);
        let notes = |entries: &[_]| after(adopted(), entries).notes(at(60));
        let unknown = notes(&[]);
        assert_eq!(unknown.len(), 1, "{unknown:?}");
        assert!(unknown[0].contains("knows nothing of this run"));
        let mut entries = vec![job(-1000, "other", "a/a")];
        assert!(notes(&entries)[0].starts_with("1 of the open jobs"));
        // All of them adopted, and none done yet.
        entries.push(job(-1000, "other", "a/b"));
        assert_eq!(notes(&entries), [""; 0]);
        // What is not read yet is not missing.
        assert_eq!(adopted().notes(at(60)), [""; 0]);

        let ahead = after(adopted(), &entries);
        let notes = ahead.notes(START - Duration::from_secs(600));
        assert_eq!(
            notes,
            ["this run began 10m in the future by this machine's clock: the clocks differ"]
        );
        assert_eq!(ahead.snapshot(at(-600)).elapsed_seconds, Some(0));
    }

    #[test]
    fn a_run_that_only_the_ledger_knows_is_counted_from_it() {
        let entries = [
            job(0, "this", "a/a"),
            job(1, "other", "a/z"),
            done(1, "other", "a/b"),
            done(2, "this", "a/a"),
            job(3, "this", "a/b"),
            job(3, "this", "a/c"),
            done(4, "other", "a/c"),
            // Read twice: it is not open again.
            job(0, "this", "a/a"),
        ];
        let now = after(unlisted(), &entries).snapshot(at(60));
        assert_eq!((now.total_repos, now.processed, now.open), (3, 1, 2));
        assert_eq!(now.oldest_open_repo.as_deref(), Some("a/b"));
        // What is not read yet may be open.
        let mut view = unlisted();
        view.apply(&entries[0]);
        view.apply(&entries[3]);
        assert!(!view.closes());
        view.set_caught_up();
        assert!(view.closes());
        // A list that is done is done.
        let mut view = own(&["a/a"]);
        assert!(view.apply(&entries[3]));
        assert!(view.closes());
    }

    #[test]
    fn sentences_are_the_prescribed_ones() {
        let mut view = own(&["a/a", "a/b"]);
        view.invalid.push(Failure {
            repo: "entry 7".to_owned(),
            class: FaultKind::InvalidEntry,
            message: "no url".to_owned(),
        });
        let mut summary = view.summary(START + Duration::from_secs(300));
        assert_eq!(
            summary.sentence(),
            "Pipeline incomplete: 5 total, 2 cached (40.0%), 0 processed, 1 failed, 2 open, stopped after 5m"
        );
        assert_eq!(summary.open, ["a/a", "a/b"]);
        assert_eq!(
            summary.failures_sentence().as_deref(),
            Some("1 failed: 1 invalid_entry")
        );
        summary = RunSummary {
            total_repos: 21_000,
            cached: 19_000,
            processed: 1_800,
            failed: 200,
            closed: true,
            elapsed_formatted: format_duration(Duration::from_secs(5 * 3600 + 47 * 60 + 12)),
            ..summary
        };
        assert_eq!(
            summary.sentence(),
            "Pipeline complete: 21,000 total, 19,000 cached (90.5%), 1,800 processed, 200 failed, completed in 5h 47m"
        );
        summary.failed = 3000;
        summary.failures_by_class = [(FaultKind::Refused, 3000)].into();
        assert_eq!(
            summary.failures_sentence().as_deref(),
            Some("3,000 failed: 3,000 refused")
        );
        summary.failed = 0;
        assert_eq!(summary.failures_sentence(), None);

        let snapshot = RunSnapshot {
            total_repos: 21_000,
            open: 20_500,
            cache_hit_rate: 91.2,
            elapsed_seconds: Some(15 * 60),
            eta_seconds: Some(5 * 3600 + 30 * 60),
            ..view.snapshot(START)
        };
        assert_eq!(
            snapshot.progress_sentence(),
            "Processed 500/21,000 (2.4%), cache hit: 91.2%, elapsed: 15m, ETA: 5h 30m"
        );
    }
}
