//! Where a run stands: counted from the documents in the store and the ledger's entries.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use common::broker::{Event, LedgerEntry, Waiting};
use common::fault::FaultKind;
use common::ids::{JobKey, RunId};
use common::job::Job;
use common::outcome::OutcomeRecord;
use common::run::documents::{CacheReason, JobList, Manifest, RunSummary};
use common::run::view::Tally;
use common::text::thousands;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// By how much the clocks of a run's producer and of who records its outcomes may differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(60);
/// The past that tells how fast a run is now.
const RATE_WINDOW: Duration = Duration::from_secs(5 * 60);
/// A worker that has recorded nothing for longer is not counted as seen.
const SEEN: Duration = Duration::from_secs(60);

/// What the store knows of a run. Nothing, of one that only the ledger knows, such as a replay of
/// dead letters.
#[derive(Clone, Debug)]
pub struct Documents {
    /// The run.
    pub run: RunId,
    /// What it set out to do.
    pub manifest: Option<Manifest>,
    /// What it waits for.
    pub jobs: Option<JobList>,
    /// How its producer ended.
    pub summary: Option<RunSummary>,
}

impl Documents {
    /// When the run began.
    pub fn started(&self) -> Option<OffsetDateTime> {
        let manifest = self.manifest.as_ref()?;
        OffsetDateTime::parse(&manifest.started_at, &Rfc3339).ok()
    }

    /// Jobs of earlier runs that count in this one.
    pub fn adopted(&self) -> u64 {
        self.manifest.as_ref().map_or(0, |m| m.adopted)
    }

    /// The summary, where nothing can come after it.
    pub fn closed(&self) -> Option<&RunSummary> {
        self.summary.as_ref().filter(|summary| summary.closed)
    }
}

/// How far a run has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Jobs are open. Whether a producer follows them cannot be told from here.
    Running,
    /// Every job has its outcome.
    Closed,
    /// Jobs are open, and the producer has ended. Workers may go on all the same.
    Stopped,
}

/// What the numbers were taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The broker's ledger, as it is now.
    Ledger,
    /// The run's `summary.json`, as it was when the producer ended.
    Summary,
}

/// A run at one moment: what `producer status --json` prints. `None` is not known, or not to the
/// point any more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// The run.
    pub run_id: RunId,
    /// How far it has got.
    pub state: State,
    /// What the numbers were taken from.
    pub source: Source,
    /// When it began, RFC 3339.
    pub started_at: Option<String>,
    /// Where its feed came from.
    pub feed: Option<String>,
    /// Seconds from its start until now, or until it ended.
    pub elapsed_seconds: Option<u64>,
    /// Distinct repositories selected plus unusable entries.
    pub total_repos: u64,
    /// Digests that were there already.
    pub cached: u64,
    /// Percent, one decimal.
    pub cache_hit_rate: f64,
    /// Jobs that ended with a digest in the store.
    pub processed: u64,
    /// Of those: somebody had stored this `pushedAt` meanwhile.
    pub unchanged: u64,
    /// Of those: somebody had stored a newer `pushedAt` meanwhile.
    pub superseded: u64,
    /// Jobs and entries that ended without a digest.
    pub failed: u64,
    /// How many failed of each class.
    pub failures_by_class: BTreeMap<FaultKind, u64>,
    /// Jobs that an earlier run had published.
    pub adopted: u64,
    /// Jobs without an outcome.
    pub open: u64,
    /// Over the last five minutes.
    pub outcomes_per_minute: Option<f64>,
    /// Seconds until the run closes at that rate.
    pub eta_seconds: Option<u64>,
    /// The open job that was enqueued first.
    pub oldest_open_repo: Option<String>,
    /// How long ago that was.
    pub oldest_open_seconds: Option<u64>,
    /// Jobs of whatever run that wait for a worker.
    pub waiting: Option<u64>,
    /// Jobs of whatever run that wait for their next attempt.
    pub waiting_retry: Option<u64>,
    /// Open jobs of this run beyond those that wait: on loan to a worker, or lost.
    pub in_work_or_lost: Option<u64>,
    /// Jobs of whatever run that were given up.
    pub dead_letters: Option<u64>,
    /// Workers that take jobs now.
    pub workers_connected: Option<u64>,
    /// Workers that recorded an outcome within the last minute, of whatever run.
    pub workers_seen: Option<u64>,
    /// What a person should know about these numbers.
    pub notes: Vec<String>,
}

impl Status {
    /// As the producer left it when it ended.
    pub fn of_summary(documents: &Documents, summary: &RunSummary) -> Self {
        let manifest = documents.manifest.as_ref();
        Self {
            run_id: summary.run_id.clone(),
            state: match summary.closed {
                true => State::Closed,
                false => State::Stopped,
            },
            source: Source::Summary,
            started_at: manifest.map(|m| m.started_at.clone()),
            feed: manifest.map(|m| m.feed.clone()),
            // Whole seconds are exact enough for a person, and no run lasts 2^64 of them.
            elapsed_seconds: Some(summary.elapsed_seconds.max(0.0) as u64),
            total_repos: summary.total_repos,
            cached: summary.cached,
            cache_hit_rate: summary.cache_hit_rate,
            processed: summary.processed,
            unchanged: summary.unchanged,
            superseded: summary.superseded,
            failed: summary.failed,
            failures_by_class: summary.failures_by_class.clone(),
            adopted: summary.adopted,
            open: summary.open.len() as u64,
            outcomes_per_minute: None,
            eta_seconds: None,
            oldest_open_repo: None,
            oldest_open_seconds: None,
            waiting: None,
            waiting_retry: None,
            in_work_or_lost: None,
            dead_letters: None,
            workers_connected: None,
            workers_seen: None,
            notes: Vec::new(),
        }
    }

    /// Adds what the broker says of its queues.
    pub fn set_waiting(&mut self, waiting: Waiting) {
        self.dead_letters = Some(waiting.dead);
        self.workers_connected = Some(waiting.workers);
        self.waiting = Some(waiting.ready);
        self.waiting_retry = Some(waiting.retry);
        let waits = waiting.ready + waiting.retry;
        self.in_work_or_lost = Some(self.open.saturating_sub(waits));
    }

    /// What has its outcome: everything but the open jobs.
    pub fn done(&self) -> u64 {
        self.total_repos.saturating_sub(self.open)
    }
}

/// A run's numbers, kept up to date by the ledger's entries.
///
/// An outcome counts whatever run its job was published for, if it was recorded while this run was
/// going on. Entries that come twice do no harm.
#[derive(Debug)]
pub struct Standing {
    documents: Documents,
    tally: Tally,
    /// Every job that is open, and when it was enqueued as far as that is known.
    open: HashMap<JobKey, Option<OffsetDateTime>>,
    /// Outcomes of about the time when the run began. They count for jobs that it adopted: of a
    /// job that it published itself such a one is an earlier run's.
    early: HashMap<JobKey, (OutcomeRecord, OffsetDateTime)>,
    /// Jobs that this run published.
    published: HashSet<JobKey>,
    /// When outcomes were counted, by the clocks of those who recorded them. Those too old to
    /// tell the rate are dropped.
    outcomes: VecDeque<OffsetDateTime>,
    /// When each worker recorded an outcome last.
    workers: HashMap<String, OffsetDateTime>,
    /// The time of the ledger's newest entry so far: an [`Event::Dead`] does not tell its own.
    clock: OffsetDateTime,
    /// When the first job was enqueued.
    first_job: Option<OffsetDateTime>,
    /// When the last outcome was recorded that counted.
    last_outcome: Option<OffsetDateTime>,
    /// Whether all was taken that the ledger held at first.
    caught_up: bool,
}

impl Standing {
    /// Of a run of which no entry was seen yet.
    pub fn new(documents: Documents) -> Self {
        let reasons = documents.manifest.as_ref().map(|m| &m.reasons);
        let cached = reasons.and_then(|reasons| reasons.get(&CacheReason::Hit));
        let nothing = JobList::default();
        let list = documents.jobs.as_ref().unwrap_or(&nothing);
        let mut tally = Tally::begin(cached.copied().unwrap_or(0), list);
        tally.set_adopted(documents.adopted());
        let open = list.jobs.iter().map(|job| (job.key.clone(), None));
        Self {
            open: open.collect(),
            tally,
            documents,
            early: HashMap::new(),
            published: HashSet::new(),
            outcomes: VecDeque::new(),
            workers: HashMap::new(),
            clock: OffsetDateTime::UNIX_EPOCH,
            first_job: None,
            last_outcome: None,
            caught_up: false,
        }
    }

    /// Whether the ledger holds, or held, anything of this run.
    pub fn is_known(&self) -> bool {
        !self.published.is_empty() || self.last_outcome.is_some()
    }

    /// How the producer ended, as found in the store meanwhile.
    pub fn set_summary(&mut self, summary: RunSummary) {
        self.documents.summary = Some(summary);
    }

    /// What the store knows.
    pub fn documents(&self) -> &Documents {
        &self.documents
    }

    /// Takes note that all was taken that the ledger held at first.
    pub fn set_caught_up(&mut self) {
        self.caught_up = true;
    }

    /// Whether that is so: until then, the numbers are of the past.
    pub fn caught_up(&self) -> bool {
        self.caught_up
    }

    /// Whether every job has its outcome.
    pub fn closes(&self) -> bool {
        // Where no list names the jobs, those to be read yet are open.
        (self.caught_up || self.documents.jobs.is_some()) && self.tally.closes()
    }

    /// The producer's own summary, where it knows of more outcomes than the ledger.
    pub fn better_summary(&self) -> Option<&RunSummary> {
        let summary = self.documents.summary.as_ref();
        summary.filter(|summary| (summary.open.len() as u64) < self.tally.open())
    }

    /// Takes note of an entry of the ledger.
    pub fn take(&mut self, entry: LedgerEntry) {
        let at = match &entry.event {
            Event::Dead(_) => entry.at.max(self.clock),
            Event::Job(_) | Event::Outcome(_) | Event::Worker(_) => entry.at,
        };
        self.clock = self.clock.max(at);
        match entry.event {
            Event::Job(job) => self.take_job(&job, at),
            ended => {
                if let Some(record) = ended.into_outcome() {
                    self.take_outcome(record, at);
                }
            }
        }
        self.count_early();
    }

    fn take_job(&mut self, job: &Job, at: OffsetDateTime) {
        let (key, ours) = (job.key(), job.run == self.documents.run);
        if ours && self.published.insert(key.clone()) {
            self.first_job.get_or_insert(at);
            // Where no list says what the run waits for, the ledger does.
            if self.documents.jobs.is_none() {
                self.tally.add_job(key.clone());
                self.open.insert(key.clone(), None);
            }
            // Whatever the ledger's first chunk says of an earlier run's job for the same push.
            if let Some(since) = self.open.get_mut(&key) {
                *since = Some(at);
            }
        }
        if ours {
            self.early.remove(&key);
        }
        if let Some(since) = self.open.get_mut(&key) {
            since.get_or_insert(at);
        }
    }

    fn take_outcome(&mut self, record: OutcomeRecord, at: OffsetDateTime) {
        if !record.worker.is_empty() {
            let seen = self.workers.entry(record.worker.clone()).or_insert(at);
            *seen = at.max(*seen);
        }
        let key = record.key();
        let Some(since) = self.open.get_mut(&key) else {
            return;
        };
        // Entries tell the time to the second.
        let started = self.documents.started().or(self.first_job);
        let started = started.map(|at| at.replace_nanosecond(0).unwrap_or(at));
        if record.run == self.documents.run || started.is_some_and(|started| at >= started) {
            self.count(&record, at);
        } else if started.is_some_and(|started| at >= started - CLOCKS_DIFFER) {
            if !self.published.contains(&key) {
                self.early.entry(key).or_insert((record, at));
            }
        } else {
            // Of an earlier job for the same push, which is not the one that is open.
            *since = None;
        }
    }

    /// Once all that this run publishes is published, what else is open was adopted.
    fn count_early(&mut self) {
        if self.early.is_empty() {
            return;
        }
        let jobs = self
            .documents
            .jobs
            .as_ref()
            .map_or(0, |list| list.jobs.len());
        let to_publish = (jobs as u64).saturating_sub(self.documents.adopted());
        if (self.published.len() as u64) < to_publish {
            return;
        }
        for (_, (record, at)) in std::mem::take(&mut self.early) {
            self.count(&record, at);
        }
    }

    fn count(&mut self, record: &OutcomeRecord, at: OffsetDateTime) {
        if self.tally.apply(record) {
            self.open.remove(&record.key());
            self.outcomes.push_back(at);
            self.last_outcome = self.last_outcome.max(Some(at));
        }
    }

    /// The numbers at the time `now`.
    pub fn status(&mut self, now: OffsetDateTime) -> Status {
        let summary = self.tally.summary(&self.documents.run, Duration::ZERO);
        let mut status = Status::of_summary(&self.documents, &summary);
        status.source = Source::Ledger;
        status.state = match (self.closes(), &self.documents.summary) {
            (true, _) => State::Closed,
            (false, None) => State::Running,
            (false, Some(_)) => State::Stopped,
        };
        let started = self.documents.started().or(self.first_job);
        status.started_at = started.and_then(|at| at.format(&Rfc3339).ok());
        let end = self.closed_at().unwrap_or(now);
        status.elapsed_seconds = started.map(|at| seconds(end - at));
        status.workers_seen = Some(self.workers_seen(now));
        if !self.closes() {
            let rate = self.outcomes_per_minute(now);
            status.outcomes_per_minute = rate;
            status.eta_seconds = rate.and_then(|rate| eta(status.open, rate));
            if let Some((repo, since)) = self.oldest_open() {
                status.oldest_open_repo = Some(repo);
                status.oldest_open_seconds = Some(seconds(now - since));
            }
            status.notes.extend(self.gap());
        }
        status
    }

    /// What a person should know of open jobs that the ledger does not hold.
    fn gap(&self) -> Option<String> {
        if !self.caught_up {
            return None;
        }
        let unknown = self.open.values().filter(|since| since.is_none()).count();
        match unknown {
            0 => None,
            all if all == self.open.len() && !self.is_known() => Some(
                "the ledger knows nothing of this run: nothing is published yet, or the ledger was emptied since"
                    .to_owned(),
            ),
            some => Some(format!(
                "{} of the open jobs are not in the ledger: not published yet, or it was emptied since",
                thousands(some as u64)
            )),
        }
    }

    /// Workers that recorded an outcome within the last minute, of whatever run.
    pub fn workers_seen(&mut self, now: OffsetDateTime) -> u64 {
        // Who watches for months would remember every worker that ever was.
        self.workers.retain(|_, at| *at >= now - SEEN);
        self.workers.len() as u64
    }

    /// When the last of its jobs got its outcome; `None` while some are open.
    pub fn closed_at(&self) -> Option<OffsetDateTime> {
        // A run that found everything in the cache closed as it began.
        let at = self.last_outcome.or(self.documents.started());
        at.filter(|_| self.closes())
    }

    fn outcomes_per_minute(&mut self, now: OffsetDateTime) -> Option<f64> {
        let begun = self.first_job.or(self.documents.started())?;
        let from = begun.max(now - RATE_WINDOW);
        self.outcomes.retain(|at| *at >= now - RATE_WINDOW);
        // Less than a second would make a flood of the first outcome.
        let span = (now - from).as_seconds_f64().max(1.0);
        let rate = self.outcomes.len() as f64 * 60.0 / span;
        Some((rate * 10.0).round() / 10.0)
    }

    fn oldest_open(&self) -> Option<(String, OffsetDateTime)> {
        let known = self
            .open
            .iter()
            .filter_map(|(key, since)| Some(((*since)?, key)));
        let (since, key) = known.min_by_key(|(since, key)| (*since, &key.repo))?;
        Some((key.repo.to_string(), since))
    }
}

/// Whole seconds, none where clocks differ the other way.
fn seconds(duration: time::Duration) -> u64 {
    duration.whole_seconds().try_into().unwrap_or(0)
}

/// Seconds for `open` more outcomes at `rate` a minute; `None` where there is no end to see.
fn eta(open: u64, rate: f64) -> Option<u64> {
    let seconds = open as f64 * 60.0 / rate;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .map(|eta| eta.as_secs())
}

#[cfg(test)]
mod tests {
    use common::ids::PushedAt;
    use common::job::WIRE_VERSION;
    use common::outcome::Outcome;
    use time::macros::datetime;

    use super::*;
    use common::run::documents::ExpectedJob;

    const START: OffsetDateTime = datetime!(2026-11-23 13:00:00.7 UTC);

    fn run(id: &str) -> RunId {
        RunId::try_from(id.to_owned()).unwrap()
    }

    fn key(repo: &str) -> JobKey {
        JobKey {
            repo: repo.parse().unwrap(),
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
        }
    }

    /// The run `this`, which waits for these jobs.
    fn documents(adopted: u64, jobs: &[&str]) -> Documents {
        let jobs = JobList {
            version: JobList::VERSION,
            invalid: Vec::new(),
            jobs: jobs
                .iter()
                .map(|repo| ExpectedJob {
                    key: key(repo),
                    adopted_from: Vec::new(),
                })
                .collect(),
        };
        Documents {
            run: run("this"),
            manifest: Some(Manifest {
                run: run("this"),
                started_at: START.format(&Rfc3339).unwrap(),
                feed: "feed.json".to_owned(),
                feed_sha256: String::new(),
                version: String::new(),
                total: 2 + jobs.jobs.len() as u64,
                repeated: 0,
                invalid: 0,
                reasons: [(CacheReason::Hit, 2)].into(),
                adopted,
            }),
            jobs: Some(jobs),
            summary: None,
        }
    }

    fn job(of: &str, repo: &str) -> Event {
        Event::Job(bare_job(of, repo))
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
        }
    }

    fn ended(of: &str, repo: &str, outcome: Outcome, worker: &str) -> Event {
        let mut record = OutcomeRecord::without_work(key(repo), run(of), outcome, "why");
        record.worker = worker.to_owned();
        Event::Outcome(record)
    }

    fn done(of: &str, repo: &str) -> Event {
        ended(of, repo, Outcome::Processed, "w")
    }

    /// After these entries, each with its seconds from the run's start, `now` seconds after it.
    fn status(documents: &Documents, entries: &[(i64, Event)], now: i64) -> Status {
        let mut standing = standing(documents, entries);
        standing.set_caught_up();
        standing.status(START + time::Duration::seconds(now))
    }

    /// After these entries, each with its seconds from the run's start, and before others.
    fn standing(documents: &Documents, entries: &[(i64, Event)]) -> Standing {
        let mut standing = Standing::new(documents.clone());
        for (second, event) in entries {
            let at = START.replace_nanosecond(0).unwrap() + time::Duration::seconds(*second);
            let event = event.clone();
            standing.take(LedgerEntry { at, event });
        }
        standing
    }

    /// A repository that fails in each run is as old as this run's job, not the one before's.
    #[test]
    fn an_open_job_is_as_old_as_its_own_run_made_it() {
        let documents = documents(0, &["a/a", "a/b"]);
        let gone = Outcome::Failed(FaultKind::Gone);
        let mut entries = vec![
            (-50, job("before", "a/a")),
            (-20, ended("before", "a/a", gone, "w1")),
            (10, job("this", "a/a")),
            (11, job("this", "a/b")),
        ];
        assert_eq!(
            status(&documents, &entries, 70).oldest_open_seconds,
            Some(60)
        );
        // A second copy changes nothing.
        entries.push((30, job("this", "a/a")));
        assert_eq!(
            status(&documents, &entries, 70).oldest_open_seconds,
            Some(60)
        );
    }

    #[test]
    fn a_run_is_counted_from_its_documents_and_the_ledger() {
        let documents = documents(0, &["a/a", "a/b", "a/c", "a/d", "a/e"]);
        let gone = Outcome::Failed(FaultKind::Gone);
        let mut entries = vec![
            (10, job("this", "a/a")),
            (11, job("this", "a/b")),
            (12, job("this", "a/c")),
            (13, job("this", "a/d")),
            (70, ended("this", "a/a", Outcome::Processed, "w1")),
            (100, ended("this", "a/b", gone, "w2")),
            (110, ended("this", "a/c", Outcome::Unchanged, "w1")),
        ];
        let now = status(&documents, &entries, 130);
        assert_eq!(now.state, State::Running);
        let counts = (now.total_repos, now.cached, now.processed, now.unchanged);
        assert_eq!(counts, (7, 2, 2, 1));
        assert_eq!((now.failed, now.open, now.done()), (1, 2, 5));
        assert_eq!(now.failures_by_class, [(FaultKind::Gone, 1)].into());
        assert_eq!(now.elapsed_seconds, Some(130));
        // Three in the two minutes since the first job, so two take 80 s.
        assert_eq!(now.outcomes_per_minute, Some(1.5));
        assert_eq!(now.eta_seconds, Some(80));
        assert_eq!(now.oldest_open_repo.as_deref(), Some("a/d"));
        assert_eq!(now.oldest_open_seconds, Some(117));
        assert_eq!(now.workers_seen, Some(2));
        assert_eq!(now.notes.len(), 1);
        assert!(
            now.notes[0].starts_with("1 of the open jobs"),
            "{:?}",
            now.notes
        );

        let later = status(&documents, &entries, 1000);
        assert_eq!(later.outcomes_per_minute, Some(0.0));
        assert_eq!((later.eta_seconds, later.workers_seen), (None, Some(0)));

        // Everything once more, as after a broken connection, changes nothing.
        let twice: Vec<_> = entries.iter().chain(&entries).cloned().collect();
        assert_eq!(status(&documents, &twice, 130), now);

        entries.extend([
            (140, job("this", "a/e")),
            (150, Event::Dead(bare_job("this", "a/d").into())),
            (160, done("this", "a/e")),
        ]);
        let closed = status(&documents, &entries, 9000);
        assert_eq!((closed.state, closed.open), (State::Closed, 0));
        let failures = [(FaultKind::Gone, 1), (FaultKind::Killed, 1)];
        assert_eq!(closed.failures_by_class, failures.into());
        assert_eq!(closed.elapsed_seconds, Some(159));
        assert_eq!(closed.outcomes_per_minute, None);
        assert_eq!(closed.notes, [""; 0]);
    }

    /// Nobody writes a summary of a run with `--detach`.
    #[test]
    fn a_run_without_jobs_closed_as_it_began() {
        let documents = documents(0, &[]);
        let now = status(&documents, &[(50, done("other", "a/a"))], 9000);
        assert_eq!((now.state, now.cached), (State::Closed, 2));
        assert_eq!(now.elapsed_seconds, Some(0));
        assert_eq!(standing(&documents, &[]).closed_at(), Some(START));
    }

    #[test]
    fn a_ledger_that_holds_every_open_job_has_no_gap() {
        let documents = documents(2, &["a/a", "a/b"]);
        let notes = |entries: &[_]| status(&documents, entries, 60).notes;
        let unknown = notes(&[]);
        assert_eq!(unknown.len(), 1, "{unknown:?}");
        assert!(unknown[0].contains("knows nothing of this run"));
        let mut entries = vec![(-1000, job("other", "a/a"))];
        assert!(notes(&entries)[0].starts_with("1 of the open jobs"));
        // All of them adopted, and none done yet.
        entries.push((-1000, job("other", "a/b")));
        assert_eq!(notes(&entries), [""; 0]);
    }

    /// What is not read yet is neither missing nor at its end.
    #[test]
    fn a_ledger_that_is_being_read_proves_nothing() {
        let mut listed = standing(&documents(0, &["a/a"]), &[]);
        assert_eq!(listed.status(START).notes, [""; 0]);
        // But a list that is done is done.
        let at = START + Duration::from_secs(1);
        let event = done("this", "a/a");
        listed.take(LedgerEntry { at, event });
        assert_eq!(listed.status(START).state, State::Closed);

        let mut documents = documents(0, &[]);
        (documents.manifest, documents.jobs) = (None, None);
        let entries = [(0, job("this", "a/a")), (1, done("this", "a/a"))];
        let mut unlisted = standing(&documents, &entries);
        assert_eq!(unlisted.status(START).state, State::Running);
        unlisted.set_caught_up();
        assert_eq!(unlisted.status(START).state, State::Closed);
    }

    #[test]
    fn outcomes_of_other_runs_count_if_they_can_be_meant() {
        let open = |adopted, entries: &[(i64, Event)]| {
            status(&documents(adopted, &["a/a", "a/b"]), entries, 60).open
        };
        let of_b = (5, job("this", "a/b"));
        // Recorded since this run began.
        assert_eq!(open(0, &[(0, done("other", "a/a"))]), 1);
        // Of another push, or another repository.
        assert_eq!(open(0, &[(0, done("other", "a/z"))]), 2);
        // An earlier run's, right before this one published the job itself.
        let early = (-20, done("other", "a/a"));
        assert_eq!(
            open(0, &[early.clone(), (5, job("this", "a/a")), of_b.clone()]),
            2
        );
        // Of an adopted job, by a clock that is slow; not before it is clear that it is adopted.
        assert_eq!(open(1, std::slice::from_ref(&early)), 2);
        assert_eq!(open(1, &[early, of_b.clone()]), 1);
        // Too long ago for any clock.
        assert_eq!(open(1, &[(-61, done("other", "a/a")), of_b.clone()]), 2);
        // A job that was given up tells when it was enqueued, not when it died.
        let died = (-3000, Event::Dead(bare_job("other", "a/a").into()));
        assert_eq!(open(1, &[died.clone(), of_b.clone()]), 2);
        assert_eq!(open(1, &[of_b, died]), 1);
    }

    #[test]
    fn an_adopted_job_is_as_old_as_its_own_entry_says() {
        let entries = [
            (-7000, job("older", "a/a")),
            (-6000, done("older", "a/a")),
            (-1000, job("other", "a/a")),
            (5, job("this", "a/b")),
        ];
        let now = status(&documents(1, &["a/a", "a/b"]), &entries, 60);
        assert_eq!(now.oldest_open_repo.as_deref(), Some("a/a"));
        assert_eq!(now.oldest_open_seconds, Some(1060));
        assert_eq!((now.open, now.adopted), (2, 1));
    }

    #[test]
    fn a_run_that_only_the_ledger_knows_is_counted_from_it() {
        let mut documents = documents(0, &[]);
        (documents.manifest, documents.jobs) = (None, None);
        let entries = [
            (0, job("this", "a/a")),
            (1, job("other", "a/z")),
            (1, done("other", "a/b")),
            (2, done("this", "a/a")),
            (3, job("this", "a/b")),
            (3, job("this", "a/c")),
            (4, done("other", "a/c")),
            // Read twice: it is not open again.
            (0, job("this", "a/a")),
        ];
        let now = status(&documents, &entries, 60);
        assert_eq!((now.total_repos, now.processed, now.open), (3, 2, 1));
        assert_eq!(now.state, State::Running);
        assert_eq!(now.oldest_open_repo.as_deref(), Some("a/b"));
    }

    #[test]
    fn a_stopped_run_goes_on_and_a_poorer_ledger_is_noticed() {
        let mut documents = documents(0, &["a/a", "a/b"]);
        let mut tally = Tally::begin(2, documents.jobs.as_ref().unwrap());
        let record = OutcomeRecord::without_work(key("a/a"), run("this"), Outcome::Processed, "");
        tally.apply(&record);
        documents.summary = Some(tally.summary(&run("this"), Duration::ZERO));

        let standing = Standing::new(documents.clone());
        assert!(standing.better_summary().is_some(), "an empty ledger");
        let one = status(&documents, &[(1, done("this", "a/b"))], 60);
        assert_eq!((one.state, one.open), (State::Stopped, 1));
        let both = [(1, done("this", "a/a")), (2, done("this", "a/b"))];
        assert_eq!(status(&documents, &both, 60).state, State::Closed);
    }

    #[test]
    fn what_does_not_wait_is_in_work_or_lost() {
        let mut now = status(&documents(0, &["a/a", "a/b", "a/c"]), &[], 60);
        let mut waiting = Waiting {
            ready: 1,
            retry: 1,
            dead: 4,
            workers: 5,
        };
        now.set_waiting(waiting);
        assert_eq!(now.in_work_or_lost, Some(1));
        assert_eq!(
            (now.dead_letters, now.workers_connected),
            (Some(4), Some(5))
        );
        // Those of other runs wait there too.
        waiting.ready = 100;
        now.set_waiting(waiting);
        assert_eq!(now.in_work_or_lost, Some(0));
    }
}
