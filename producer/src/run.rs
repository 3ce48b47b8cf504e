//! One run, from the feed to its summary.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Arg, Args};
use common::broker::{Entries, Position, SharedBroker};
use common::exit::{self, ExitError};
use common::failpoint;
use common::fault::Fault;
use common::ids::{DIGEST_PATTERN, RepoRef, RunId};
use common::retry;
use common::run::documents::{
    ClosedRun, ExpectedJob, JobList, LastClosed, LatestRun, Manifest, RunSummary,
};
use common::run::view::RunView;
use common::shutdown::Shutdown;
use common::store::config::StoreConfig;
use common::store::{Document, DocumentKey, SharedStore, readable};
use common::telemetry::http::{MetricsConfig, always_ready};
use common::telemetry::traces::Traces;
use common::text::{self, counted, format_duration, thousands};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::{error, info, warn};
use worker::metrics::Metrics;

use crate::cache::failures::Failures;
use crate::cache::index::{Index, Learned};
use crate::cache::{self, CacheConfig, CacheSource, Check, Checked};
use crate::closing;
use crate::engine::{Engine, EngineConfig};
use crate::feed::fetch::{FeedConfig, FeedSource};
use crate::feed::filter::FilterConfig;
use crate::feed::health::FeedRecord;
use crate::feed::{self, Feed};
use crate::folder_lock::FolderLock;
use crate::follow::{Ended, Following};
use crate::progress::Progress;
use crate::publish::{self, Adopted};
use crate::report::{self, Reporter};
use crate::terminal::bar::Bar;
use crate::unchanged::{self, Before};
use crate::watchdog::{Watchdog, WatchdogConfig};
use crate::withdrawals::{self, WithdrawConfig};

/// What the producer is called in traces.
pub const SERVICE: &str = "repofleet-producer";
/// How long the last writes to the store may take.
const LAST_WRITES: Duration = Duration::from_secs(10);
/// Pauses between attempts at a step of the start grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often a wait at the start is mentioned.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// The options that most runs need: `-h` shows no others.
const BRIEF: [&str; 13] = [
    "feed",
    "limit",
    "only",
    "exclude",
    "force",
    "dry-run",
    "explain",
    "store",
    "broker-url",
    "concurrency",
    "allow-host",
    "token-for",
    "max-failures",
];

/// The options of a run.
#[derive(Args, Clone, Debug)]
#[command(mut_args(brief))]
pub struct RunConfig {
    #[command(flatten)]
    pub(crate) feed: FeedConfig,
    #[command(flatten)]
    pub(crate) filter: FilterConfig,
    #[command(flatten)]
    cache: CacheConfig,
    #[command(flatten)]
    pub(crate) store: StoreConfig,
    #[command(flatten)]
    pub(crate) engine: EngineConfig,
    #[command(flatten)]
    watchdog: WatchdogConfig,
    #[command(flatten)]
    withdraw: WithdrawConfig,
    #[command(flatten)]
    pub(crate) metrics: MetricsConfig,
    /// Fetch the feed and check the cache, say what would be done, and write nothing.
    #[arg(long, env = "DRY_RUN", help_heading = "Cache")]
    dry_run: bool,
    /// With a broker: exit after queueing; follow with `producer status`.
    #[arg(long, env = "DETACH", requires = "broker_url", help_heading = "Broker")]
    detach: bool,
    /// Most repositories that may fail: a number, or a percentage of what was attempted (jobs and
    /// unusable entries). What failed before and is not tried again does not count. A run that closes with more ends with exit code 3.
    #[arg(
        long,
        env = "MAX_FAILURES",
        value_name = "N|PERCENT%",
        default_value = "20%",
        help_heading = "Stopping"
    )]
    max_failures: MaxFailures,
}

fn brief(arg: Arg) -> Arg {
    let is_brief = arg.get_long().is_some_and(|long| BRIEF.contains(&long));
    match is_brief {
        true => arg,
        false => arg.hide_short_help(true),
    }
}

/// How many repositories may fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaxFailures {
    /// So many.
    Count(u64),
    /// So many percent of what was attempted.
    Percent(f64),
}

impl MaxFailures {
    fn allows(self, failed: u64, attempted: u64) -> bool {
        match self {
            Self::Count(count) => failed <= count,
            Self::Percent(percent) => text::percent(failed, attempted) <= percent,
        }
    }

    /// Returns the exit code of a run that closed.
    fn exit_code(self, summary: &RunSummary) -> u8 {
        let cancelled = summary.cancelled();
        if cancelled > 0 {
            error!(
                operation = "cancelled",
                cancelled,
                "{} cancelled; the next run does what they would have done",
                counted(cancelled, "job was", "jobs were")
            );
            return exit::TOO_MANY_FAILED;
        }
        let attempted = summary.total_repos - summary.cached - summary.failed_before;
        let failed = summary.failed - summary.failed_before;
        if self.allows(failed, attempted) {
            return exit::OK;
        }
        error!(
            operation = "max-failures",
            failed,
            attempted,
            "{} of {} attempted repositories failed, more than --max-failures {self} allows",
            thousands(failed),
            thousands(attempted)
        );
        exit::TOO_MANY_FAILED
    }
}

impl FromStr for MaxFailures {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let limit = match text.strip_suffix('%') {
            Some(percent) => percent
                .parse()
                .ok()
                .filter(|percent| (0.0..=100.0).contains(percent))
                .map(Self::Percent),
            None => text.parse().ok().map(Self::Count),
        };
        limit.ok_or("expected a number of repositories, such as 100, or a percentage, such as 20%")
    }
}

impl fmt::Display for MaxFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A run that has just begun.
#[derive(Debug)]
struct Start {
    run: RunId,
    at: OffsetDateTime,
}

/// What is known before the first job.
#[derive(Debug)]
struct Plan {
    basis: Basis,
    checked: Vec<Checked>,
    /// What the next run is to know of the feed.
    record: FeedRecord,
    /// What the cache check learned, if anything.
    index: Option<Index>,
    /// The feed's repositories, if the run is about all of them.
    whole: Option<HashSet<RepoRef>>,
}

/// What a run sets out from.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in a run")]
enum Basis {
    /// The feed, as it was read.
    Feed(Feed),
    /// A run that left nothing to do; the feed is still the same.
    Unchanged(Before),
}

impl Plan {
    /// The plan of a run for which an earlier one has done everything.
    fn unchanged(before: Before) -> Self {
        info!(
            operation = "feed",
            "Feed {}: unchanged since run {}, which left nothing to do",
            before.record.origin,
            before.run()
        );
        Self {
            checked: Vec::new(),
            record: before.record.clone(),
            index: None,
            whole: None,
            basis: Basis::Unchanged(before),
        }
    }

    /// Returns what the run sets out to do, for the store.
    fn documents(&self, start: &Start, adopted: &Adopted) -> Result<(Manifest, JobList)> {
        let started_at = start.at.format(&Rfc3339)?;
        let feed = match &self.basis {
            Basis::Unchanged(before) => return Ok(before.documents(&start.run, started_at)),
            Basis::Feed(feed) => feed,
        };
        let invalid: Vec<_> = feed.invalid.iter().map(|e| e.failure()).collect();
        let manifest = Manifest {
            run: start.run.clone(),
            started_at,
            feed: feed.origin.clone(),
            feed_sha256: feed.sha256.clone(),
            feed_entries: self.record.entries,
            feed_newest_push: self.record.newest_push.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            total: (invalid.len() + self.checked.len()) as u64,
            repeated: feed.repeated.len() as u64,
            invalid: invalid.len() as u64,
            reasons: cache::counts(&self.checked),
            adopted: adopted.len() as u64,
        };
        let jobs = self.checked.iter().filter(|checked| checked.has_job());
        let jobs = jobs.map(|checked| {
            let key = checked.key();
            let adopted_from = adopted.get(&key).cloned().unwrap_or_default();
            ExpectedJob { key, adopted_from }
        });
        let failed_before = self.checked.iter().filter_map(|c| c.failure.clone());
        let jobs = JobList {
            version: JobList::VERSION,
            invalid: invalid.into_iter().chain(failed_before).collect(),
            jobs: jobs.collect(),
        };
        Ok((manifest, jobs))
    }
}

impl RunConfig {
    /// Opens the store.
    ///
    /// # Errors
    /// As [`StoreConfig::open`].
    pub fn open_store(&self) -> Result<SharedStore, ExitError> {
        self.store.open()
    }

    /// Reads the feed, and tells whether the run is about all of it.
    ///
    /// # Errors
    /// As [`feed::load`].
    pub async fn load_feed(&self) -> Result<(Feed, bool), ExitError> {
        let feed = feed::load(&self.feed, self.engine.local_paths()).await?;
        Ok((feed, self.filter.takes_all()))
    }

    /// Returns the same run over these repositories alone.
    #[must_use]
    pub fn over(mut self, repositories: HashSet<RepoRef>) -> Self {
        self.filter.names = Some(repositories);
        self
    }

    /// Does the run and returns the exit code.
    ///
    /// # Errors
    /// With an [`ExitError`] if there is an exit code for what went wrong.
    pub async fn run(&self, bar: Bar, shutdown: &Shutdown) -> Result<u8> {
        let start = Start {
            run: RunId::new(),
            at: OffsetDateTime::now_utc(),
        };
        let metrics = Metrics::new();
        let store = self.store.open()?;
        // First of all: a second run ends at once, and has touched nothing.
        let _lock = match self.store.folder() {
            Some(folder) if !self.dry_run => Some(FolderLock::on(folder)?),
            _ => None,
        };
        let _server = self.metrics.serve(&metrics, &always_ready()).await?;
        if self.dry_run {
            let Some(plan) = unless_stopped(self.plan(&store, &metrics), shutdown).await? else {
                return Ok(shutdown.unfinished());
            };
            let (manifest, jobs) = plan.documents(&start, &Adopted::new())?;
            let mut view = RunView::new(start.run, Some(&manifest), Some(jobs));
            report::dry_run(&mut view, &plan.checked, OffsetDateTime::now_utc());
            return Ok(exit::OK);
        }
        let local_feed = matches!(self.feed.feed, FeedSource::File(_));
        let patience = self.watchdog.patience;
        let traces = Traces::start(SERVICE, &metrics.spans_dropped)?;
        let engine = self
            .engine
            .connect(&store, &metrics, &traces, patience, local_feed);
        let Some(engine) = unless_stopped(async { Ok(engine.await?) }, shutdown).await? else {
            return Ok(shutdown.unfinished());
        };
        let ended = self
            .run_on(&engine, start, &store, &metrics, bar, shutdown)
            .await;
        engine.broker.close().await;
        ended
    }

    async fn run_on(
        &self,
        engine: &Engine,
        start: Start,
        store: &SharedStore,
        metrics: &Metrics,
        bar: Bar,
        shutdown: &Shutdown,
    ) -> Result<u8> {
        let preparing = async {
            let plan = self.plan(store, metrics).await?;
            // In this order, so that no outcome of a job that waits is missed.
            let events = self.patiently("the broker", async || {
                engine.broker.events(Position::Now).await
            });
            let events = events.await?;
            Ok((events, self.adopt(engine, &plan.checked).await, plan))
        };
        let Some((events, adopted, plan)) = unless_stopped(preparing, shutdown).await? else {
            return Ok(shutdown.unfinished());
        };
        let urls = plan.checked.iter().filter(|checked| checked.has_job());
        let _asking = engine.warn_without_token(urls.map(|checked| checked.entry.url.as_str()));
        let begun = self.begin(engine, start, store, plan, adopted, bar);
        let Some(mut begun) = unless_stopped(begun, shutdown).await? else {
            return Ok(shutdown.unfinished());
        };
        failpoint::hit("after-manifest");
        let ended = self.work(&mut begun, engine, events, shutdown).await;
        // Before the summary, which has the last word.
        let told = engine.traces.close();
        shutdown.hard.run_until_cancelled(told).await;
        let ended = ended?;
        if let Ok(Ended::Detached) = ended {
            let run = begun.view.run();
            info!(
                operation = "detach",
                run_id = run.as_str(),
                "Run {run} goes on without this process: see `producer status {run}`"
            );
            return Ok(exit::OK);
        }
        let code = exit_code(ended, engine, shutdown);
        let closed = self.conclude(begun).await;
        Ok(closed.unwrap_or(code))
    }

    /// Fetches the feed and asks the cache.
    async fn plan(&self, store: &SharedStore, metrics: &Metrics) -> Result<Plan> {
        self.patiently("the store", async || {
            in_place(store, store.reachable().await)
        })
        .await?;
        let before = match self.is_ordinary() {
            true => Before::load(store.as_ref(), &self.feed.feed.to_string()).await?,
            false => None,
        };
        let seen = before
            .as_ref()
            .and_then(|before| before.record.seen.as_ref());
        let local_paths = self.engine.local_paths();
        let loaded = feed::load_unless_seen(&self.feed, local_paths, seen).await?;
        let mut feed = match (loaded, before) {
            (Some(feed), _) => feed,
            (None, Some(before)) => {
                for (reason, count) in before.reasons() {
                    metrics.cache_checked(reason, count);
                }
                return Ok(Plan::unchanged(before));
            }
            (None, None) => bail!("the feed is said to be unchanged, and nobody asked"),
        };
        let record = FeedRecord::of(&feed);
        record
            .check(store.as_ref(), self.feed.feed_drop_limit)
            .await?;
        let whole = self.filter.takes_all().then(|| feed.names());
        let mut selected = self.filter.select(std::mem::take(&mut feed.repositories));
        withdrawals::leave_out(store.as_ref(), &mut selected).await?;
        feed.invalid
            .retain(|entry| self.filter.takes_unusable(entry, &selected));
        let (checked, index) = cache::check(&self.cache, store.as_ref(), selected).await?;
        for (reason, count) in cache::counts(&checked) {
            metrics.cache_checked(reason, count);
        }
        if self.cache.explain {
            report::explain(&checked);
        }
        report::cache_checked(&checked);
        Ok(Plan {
            basis: Basis::Feed(feed),
            checked,
            record,
            index,
            whole,
        })
    }

    /// Whether the run is one like every night's, to which an earlier one's answer may apply.
    fn is_ordinary(&self) -> bool {
        let cache = &self.cache;
        let asks = cache.force || cache.retry_failed || cache.explain || self.dry_run;
        let looks = cache.cache == CacheSource::Store && cache.check == Check::Index;
        // What an answer to a query was about is remembered nowhere: it may hold a secret.
        let is_named = matches!(&self.feed.feed, FeedSource::Url(url) if url.query().is_none());
        let is_whole = self.filter.takes_all() && !self.filter.skip_archived;
        is_named && is_whole && looks && !asks
    }

    /// Finds out which jobs still wait from earlier runs; if that cannot be known, all are
    /// published, which does no harm.
    async fn adopt(&self, engine: &Engine, checked: &[Checked]) -> Adopted {
        let adopting = self.patiently("the broker", async || {
            publish::adopt(&engine.broker, checked).await
        });
        adopting.await.unwrap_or_else(|fault| {
            warn!(
                operation = "adopt",
                "what waits from earlier runs is not known, so all jobs are published: {fault}"
            );
            Adopted::new()
        })
    }

    /// Writes to the store what is going to be done.
    async fn begin(
        &self,
        engine: &Engine,
        start: Start,
        store: &SharedStore,
        plan: Plan,
        adopted: Adopted,
        bar: Bar,
    ) -> Result<Following> {
        let (manifest, jobs) = plan.documents(&start, &adopted)?;
        let run = start.run;
        let latest = LatestRun { run: run.clone() };
        self.patiently("the store", async || {
            let written = async {
                write(store, &of_run(&run, Document::Jobs), &jobs).await?;
                write(store, &of_run(&run, Document::Manifest), &manifest).await?;
                write(store, &DocumentKey::Latest, &latest).await?;
                plan.record.save(store.as_ref()).await
            };
            in_place(store, written.await)
        })
        .await?;
        if let Some(index) = &plan.index
            && let Err(fault) = index.save(store.as_ref()).await
        {
            warn_of_index(&fault);
        }
        let view = RunView::new(run.clone(), Some(&manifest), Some(jobs));
        info!(
            operation = "run",
            run_id = run.as_str(),
            total_repos = view.total(),
            to_digest = view.open(),
            "Run {run}: {}, {} to digest",
            counted(view.total(), "repository", "repositories"),
            thousands(view.open())
        );
        Ok(Following {
            broker: SharedBroker::clone(&engine.broker),
            traces: engine.traces.clone(),
            store: SharedStore::clone(store),
            checked: plan.checked,
            whole: plan.whole,
            adopted,
            reporter: Reporter::start(&view, OffsetDateTime::now_utc(), bar),
            progress: (!engine.is_fleet())
                .then(|| Progress::new(SharedStore::clone(store), OffsetDateTime::now_utc())),
            watchdog: Watchdog::new(self.watchdog.clone(), Instant::now()),
            view,
            learned: Learned::default(),
        })
    }

    /// Has the open jobs done. The inner error says why that was given up.
    async fn work(
        &self,
        begun: &mut Following,
        engine: &Engine,
        events: Entries,
        shutdown: &Shutdown,
    ) -> Result<Result<Ended, Fault>> {
        if begun.view.closes() {
            return Ok(Ok(Ended::Closed));
        }
        let work = engine.start(shutdown);
        let ended = match begun.publish(&work.over).await {
            Err(fault) => Err(fault),
            Ok(()) if work.over.is_cancelled() => Ok(Ended::Stopped),
            Ok(()) if self.detach => Ok(Ended::Detached),
            Ok(()) => begun.follow(events, &work.over, &shutdown.soft).await,
        };
        Ok(match (ended, work.end().await?) {
            (Ok(Ended::Stopped) | Err(_), Err(gave_up)) => Err(gave_up),
            (ended, _) => ended,
        })
    }

    /// Writes the summary to store and log; returns the exit code of a run that closed.
    async fn conclude(&self, begun: Following) -> Option<u8> {
        begun.reporter.clear();
        let (store, run) = (&begun.store, begun.view.run());
        let summary = begun.view.summary(OffsetDateTime::now_utc());
        let last_writes = Instant::now() + LAST_WRITES;
        let store_location = store.location();
        let key = of_run(run, Document::Summary);
        let this_run = match until(last_writes, write(store, &key, &summary)).await {
            Ok(()) => format!("{store_location}/{key}"),
            // The log has it all; what was digested is stored, and that is what counts.
            Err(fault) => {
                warn!(
                    operation = "run",
                    "the run's summary could not be stored: {fault}"
                );
                "in this log only".to_owned()
            }
        };
        // A cancelled run says nothing about how fresh the digests are.
        if summary.closed
            && summary.cancelled() == 0
            && let Err(fault) = until(last_writes, write_last_closed(store, &summary)).await
        {
            // An observer finds the summary, unless the next run begins before that.
            warn!(
                operation = "run",
                "that this run closed could not be noted: {fault}"
            );
        }
        if self.cache.keeps_index(store.as_ref())
            && let Err(fault) = until(last_writes, begun.learned.save(store.as_ref())).await
        {
            warn_of_index(&fault);
        }
        let published = match summary.closed {
            true => closing::publish(&begun, &summary, &self.withdraw).await,
            false => exit::OK,
        };
        if begun.whole.is_some()
            && !self.filter.skip_archived
            && let Err(fault) =
                until(last_writes, unchanged::settle(store.as_ref(), &summary)).await
        {
            warn!(
                operation = "run",
                "the next run looks at each repository, whether or not the feed has changed: {fault}"
            );
        }
        if let Err(fault) = until(
            last_writes,
            remember_failures(store, &begun.checked, &begun.view),
        )
        .await
        {
            warn!(
                operation = "run",
                "what failed could not be remembered, so the next run tries it again: {fault}"
            );
        }
        let digests = format!("{store_location}/{DIGEST_PATTERN}");
        info!(
            operation = "run",
            run_id = run.as_str(),
            digests,
            summary = this_run,
            "Digests: {digests}; this run: {this_run}"
        );
        let code = summary
            .closed
            .then(|| match self.max_failures.exit_code(&summary) {
                exit::OK => published,
                code => code,
            });
        report::completed(&summary, &self.told(&begun.checked, &summary));
        code
    }

    /// Returns the repositories whose failure is in this log: the worker of this process has named what it
    /// tried.
    fn told(&self, checked: &[Checked], summary: &RunSummary) -> HashSet<String> {
        let in_one_process = self.engine.broker.broker_url.is_none();
        let jobs = checked.iter().filter(|checked| checked.has_job());
        match in_one_process && summary.failed > 0 {
            true => jobs.map(|checked| checked.entry.repo.to_string()).collect(),
            false => HashSet::new(),
        }
    }

    /// Does a step of the start, again and again until it succeeds, waiting will not help, or
    /// patience ends. Says so at once, and then each minute.
    async fn patiently<T>(
        &self,
        what: &str,
        mut step: impl AsyncFnMut() -> Result<T, Fault>,
    ) -> Result<T, ExitError> {
        let begun = Instant::now();
        let mut said = None::<Instant>;
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            let fault = match step().await {
                Ok(done) => return Ok(done),
                Err(fault) => fault,
            };
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            let rest = self.watchdog.patience.saturating_sub(begun.elapsed());
            if fault.lasting || rest < pause {
                return Err(fault.into());
            }
            if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
                said = Some(Instant::now());
                warn!(
                    operation = "start",
                    "waiting for {what}, for {} at most (--patience): {fault}",
                    format_duration(rest)
                );
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Returns what `step` gives; `None` if a signal came first.
async fn unless_stopped<T>(
    step: impl Future<Output = Result<T>>,
    shutdown: &Shutdown,
) -> Result<Option<T>> {
    tokio::select! {
        done = step => done.map(Some),
        () = shutdown.soft.cancelled() => {
            info!(
                operation = "shutdown",
                "stopped before the first job; nothing was published"
            );
            Ok(None)
        }
    }
}

/// Marks the fault of a store in a folder as lasting: a folder does not come back by itself.
fn in_place<T>(store: &SharedStore, answer: Result<T, Fault>) -> Result<T, Fault> {
    answer.map_err(|fault| match store.is_remote() {
        true => fault,
        false => fault.lasting(true),
    })
}

/// Returns the exit code of a run that did not close, and says why it did not.
fn exit_code(ended: Result<Ended, Fault>, engine: &Engine, shutdown: &Shutdown) -> u8 {
    match ended {
        Ok(Ended::Closed | Ended::Detached) => exit::OK,
        ended if shutdown.soft.is_cancelled() => {
            if let Err(fault) = ended {
                warn!(operation = "shutdown", "{fault}");
            }
            if engine.is_fleet() {
                info!(
                    operation = "shutdown",
                    "Workers go on with what is published; the next run counts it, and `producer status` shows it"
                );
            }
            shutdown.unfinished()
        }
        Err(fault) => {
            error!(operation = "run", "gave up: {fault}");
            exit::UNAVAILABLE
        }
        Ok(Ended::Stopped) if engine.is_taken_over() => {
            error!(
                operation = "run",
                "another producer took over while the broker was away: its run counts the jobs of this one"
            );
            exit::BUSY
        }
        Ok(Ended::Stopped) => exit::NOT_CLOSED,
    }
}

/// Bounds a write: the run has ended, and a store that hangs must not hold up its exit code.
async fn until(
    deadline: Instant,
    write: impl Future<Output = Result<(), Fault>>,
) -> Result<(), Fault> {
    let written = tokio::time::timeout_at(deadline.into(), write).await;
    written.unwrap_or_else(|_| {
        let limit = format_duration(LAST_WRITES);
        Err(Fault::infra(format!(
            "the store did not answer within {limit}"
        )))
    })
}

/// The next run has to look at more digests, that is all.
fn warn_of_index(fault: &Fault) {
    warn!(operation = "run", "the index could not be stored: {fault}");
}

/// Remembers what failed for a reason that stays, and forgets what did not.
async fn remember_failures(
    store: &SharedStore,
    checked: &[Checked],
    view: &RunView,
) -> Result<(), Fault> {
    let (store, now) = (store.as_ref(), OffsetDateTime::now_utc());
    let jobs = checked.iter().filter(|checked| checked.has_job());
    let settled = jobs.filter_map(|checked| Some((checked, view.settled(&checked.key())?)));
    let settled: Vec<_> = settled.collect();
    // Mostly, all is cached.
    if settled.is_empty() {
        return Ok(());
    }
    let mut failures = Failures::load(store).await;
    for (checked, settled) in settled {
        failures.note(&checked.entry, settled, now);
    }
    failures.save(store, now).await
}

/// Remembers this run beside the one that closed before it.
async fn write_last_closed(store: &SharedStore, summary: &RunSummary) -> Result<(), Fault> {
    let known = readable::<LastClosed>(store.as_ref(), &DocumentKey::LastClosed).await?;
    let last = ClosedRun {
        run: summary.run_id.clone(),
        closed_at: OffsetDateTime::now_utc(),
        elapsed_seconds: summary.elapsed_seconds,
        cache_hit_rate: summary.cache_hit_rate,
    };
    let before = known.map(|known| known.last);
    write(
        store,
        &DocumentKey::LastClosed,
        &LastClosed { last, before },
    )
    .await
}

fn of_run(run: &RunId, document: Document) -> DocumentKey {
    DocumentKey::OfRun {
        run: run.clone(),
        document,
    }
}

async fn write<T: Serialize>(
    store: &SharedStore,
    key: &DocumentKey,
    content: &T,
) -> Result<(), Fault> {
    let content = serde_json::to_vec_pretty(content).map_err(Fault::infra)?;
    store.put_document(key, &content).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser;
    use common::ids::PushedAt;
    use common::run::documents::CacheReason;
    use common::store::fs::FsStore;

    use super::*;
    use crate::feed::entry::FeedRepo;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: RunConfig,
    }

    #[tokio::test]
    async fn a_run_that_breaks_off_says_how_far_it_got() {
        let folder = tempfile::tempdir().unwrap();
        let store: SharedStore = Arc::new(FsStore::new(folder.path()));
        let checked = Checked {
            entry: FeedRepo {
                index: 0,
                repo: "a/b".parse().unwrap(),
                url: "https://github.com/a/b".to_owned(),
                pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
                details: Default::default(),
            },
            reason: CacheReason::Miss,
            detail: String::new(),
            force: false,
            failure: None,
            stored: None,
        };
        let run = RunId::new();
        let list = JobList {
            version: JobList::VERSION,
            invalid: Vec::new(),
            jobs: vec![ExpectedJob {
                key: checked.key(),
                adopted_from: Vec::new(),
            }],
        };
        let view = RunView::new(run.clone(), None, Some(list));
        let config = Line::parse_from(["run"]).run;
        let (metrics, shutdown) = (Metrics::new(), Shutdown::default());
        let traces = Traces::default();
        let engine = config
            .engine
            .connect(&store, &metrics, &traces, Duration::ZERO, false);
        let engine = engine.await.unwrap();
        let mut begun = Following {
            broker: SharedBroker::clone(&engine.broker),
            traces: engine.traces.clone(),
            store: SharedStore::clone(&store),
            checked: vec![checked],
            adopted: Adopted::new(),
            learned: Learned::default(),
            whole: None,
            progress: None,
            reporter: Reporter::start(&view, OffsetDateTime::now_utc(), Bar::hidden()),
            watchdog: Watchdog::new(config.watchdog.clone(), Instant::now()),
            view,
        };
        let events = engine.broker.events(Position::Now).await.unwrap();
        // It goes away before it takes a job.
        engine.broker.close().await;
        let ended = config.work(&mut begun, &engine, events, &shutdown);
        let ended = ended.await.unwrap();
        assert_eq!(exit_code(ended, &engine, &shutdown), exit::UNAVAILABLE);
        assert_eq!(config.conclude(begun).await, None);

        let key = of_run(&run, Document::Summary);
        let summary = store.document(&key).await.unwrap().unwrap();
        let summary: RunSummary = serde_json::from_slice(&summary).unwrap();
        assert!(!summary.closed);
        assert_eq!(summary.open, ["a/b"]);
    }
}
