//! One run, from the feed to its summary.

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use common::broker::{BrokerConfig, Entries, Position, SharedBroker};
use common::exit::{self, ExitError};
use common::failpoint;
use common::fault::Fault;
use common::ids::{DIGEST_PATTERN, JobKey, RunId};
use common::retry;
use common::run::documents::{
    ClosedRun, ExpectedJob, JobList, LastClosed, LatestRun, Manifest, RunSummary,
};
use common::run::view::RunView;
use common::shutdown::Shutdown;
use common::store::{Document, DocumentKey, SharedStore, StoreConfig};
use common::telemetry::http::{MetricsConfig, always_ready};
use common::text::{self, format_duration, thousands};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use worker::metrics::Metrics;
use worker::run::probe_at_start;

use crate::cache::{self, CacheConfig, Checked};
use crate::embedded::{Embedded, EmbeddedConfig};
use crate::feed::fetch::{FeedConfig, FeedSource};
use crate::feed::filter::FilterConfig;
use crate::feed::{self, Feed};
use crate::fleet::{Fleet, FleetConfig, FleetRun};
use crate::folder_lock::FolderLock;
use crate::follow::{Ended, follow};
use crate::index::Index;
use crate::publish::publish;
use crate::report::{self, Reporter};
use crate::terminal::bar::Bar;

/// How long the broker has to confirm what was published when a stop was asked for.
const LAST_CONFIRMS: Duration = Duration::from_secs(10);

/// How long the last writes to the store may take.
const LAST_WRITES: Duration = Duration::from_secs(10);
/// Pauses between attempts at a step of the start grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often a wait is mentioned.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Everything about a run.
#[derive(Args, Clone, Debug)]
pub struct RunConfig {
    #[command(flatten)]
    feed: FeedConfig,
    #[command(flatten)]
    filter: FilterConfig,
    #[command(flatten)]
    cache: CacheConfig,
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    broker: BrokerConfig,
    #[command(flatten)]
    fleet: FleetConfig,
    #[command(flatten)]
    embedded: EmbeddedConfig,
    #[command(flatten)]
    metrics: MetricsConfig,
    /// Fetch the feed and check the cache, say what would be done, and write nothing.
    #[arg(long, env = "DRY_RUN", help_heading = "Cache")]
    dry_run: bool,
    /// Most repositories that may fail: a number, or a percentage of what was attempted (jobs and
    /// unusable entries). A run that closes with more ends with exit code 3.
    #[arg(
        long,
        env = "MAX_FAILURES",
        value_name = "N|PERCENT%",
        default_value = "20%",
        help_heading = "Stopping"
    )]
    max_failures: MaxFailures,
    /// Seconds to wait for a store, a broker or a full disk, at the start and at any later time,
    /// before the run ends with exit code 69.
    #[arg(
        long,
        env = "PATIENCE",
        value_name = "SECONDS",
        default_value_t = 300,
        help_heading = "Stopping"
    )]
    patience: u64,
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

/// What is known before the first job.
#[derive(Debug)]
struct Plan {
    feed: Feed,
    checked: Vec<Checked>,
    /// What the cache check learned, if anything.
    index: Option<Index>,
}

impl Plan {
    /// What the run sets out to do, for the store.
    fn documents(&self, start: &Start, adopted: &Adopted) -> Result<(Manifest, JobList)> {
        let invalid: Vec<_> = self.feed.invalid.iter().map(|e| e.failure()).collect();
        let manifest = Manifest {
            run: start.run.clone(),
            started_at: start.at.format(&Rfc3339)?,
            feed: self.feed.origin.clone(),
            feed_sha256: self.feed.sha256.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            total: (invalid.len() + self.checked.len()) as u64,
            repeated: self.feed.repeated.len() as u64,
            invalid: invalid.len() as u64,
            reasons: cache::counts(&self.checked),
            adopted: adopted.len() as u64,
        };
        let jobs = self.checked.iter().filter(|checked| !checked.is_cached());
        let jobs = jobs.map(|checked| {
            let key = checked.key();
            let adopted_from = adopted.get(&key).cloned().unwrap_or_default();
            ExpectedJob { key, adopted_from }
        });
        let jobs = JobList {
            version: JobList::VERSION,
            invalid,
            jobs: jobs.collect(),
        };
        Ok((manifest, jobs))
    }
}

/// Jobs that wait already, each with the runs that published it.
pub type Adopted = HashMap<JobKey, Vec<RunId>>;

/// A run that has just begun.
#[derive(Debug)]
struct Start {
    run: RunId,
    at: OffsetDateTime,
}

impl Start {
    fn now() -> Self {
        Self {
            run: RunId::new(),
            at: OffsetDateTime::now_utc(),
        }
    }
}

impl RunConfig {
    /// Runs, and gives the exit code.
    ///
    /// # Errors
    /// With an [`ExitError`] where there is a code for what went wrong.
    pub async fn run(&self, bar: Bar, shutdown: &Shutdown) -> Result<u8> {
        let start = Start::now();
        let metrics = Metrics::new();
        let store = self.store.open()?;
        // First of all: a second run ends at once, and has touched nothing.
        let _lock = match self.store.folder() {
            Some(folder) if !self.dry_run => Some(FolderLock::on(folder)?),
            _ => None,
        };
        let _server = self.metrics.serve(&metrics, &always_ready()).await?;
        if self.dry_run {
            return self.dry_run(&start, &store, &metrics, shutdown).await;
        }
        let fleet = tokio::select! {
            fleet = Fleet::connect(&self.broker, &self.fleet, self.patience()) => fleet?,
            () = shutdown.soft.cancelled() => return Ok(stopped(shutdown)),
        };
        let Some(fleet) = fleet else {
            return self.run_here(start, &store, metrics, bar, shutdown).await;
        };
        let ended = self
            .run_on(&fleet, start, &store, &metrics, bar, shutdown)
            .await;
        fleet.close().await;
        ended
    }

    async fn dry_run(
        &self,
        start: &Start,
        store: &SharedStore,
        metrics: &Metrics,
        shutdown: &Shutdown,
    ) -> Result<u8> {
        let Some(plan) = self.plan_unless(store, metrics, shutdown).await? else {
            return Ok(shutdown.unfinished());
        };
        let (manifest, jobs) = plan.documents(&start, &Adopted::new())?;
        let mut view = RunView::new(start.run.clone(), Some(&manifest), Some(jobs));
        report::dry_run(&mut view, &plan.checked, OffsetDateTime::now_utc());
        Ok(exit::OK)
    }

    /// The whole job in this process.
    async fn run_here(
        &self,
        start: Start,
        store: &SharedStore,
        metrics: Metrics,
        bar: Bar,
        shutdown: &Shutdown,
    ) -> Result<u8> {
        EmbeddedConfig::warn_of_proxy();
        let Some(plan) = self.plan_unless(store, &metrics, shutdown).await? else {
            return Ok(shutdown.unfinished());
        };
        let local_feed = matches!(self.feed.feed, FeedSource::File(_));
        let slots = self.embedded.slots(local_feed, &metrics)?;
        let nothing = Adopted::new();
        let begun = self.begin(start, store, &plan, &nothing, bar).await?;
        let has_jobs = plan.checked.iter().any(|checked| !checked.is_cached());
        let probing = has_jobs.then(|| {
            let (store, stop) = (SharedStore::clone(store), shutdown.hard.clone());
            tokio::spawn(probe_at_start(store, stop))
        });
        let embedded = self.embedded.start(
            slots,
            SharedStore::clone(store),
            metrics,
            self.patience(),
            shutdown,
        );
        let finished = begun.finish_here(&plan.checked, embedded, shutdown).await;
        if let Some(probing) = probing {
            // Not broken off, so that it leaves nothing behind.
            probing.await.ok();
        }
        finished
    }

    /// Jobs for workers elsewhere.
    async fn run_on(
        &self,
        fleet: &Fleet,
        start: Start,
        store: &SharedStore,
        metrics: &Metrics,
        bar: Bar,
        shutdown: &Shutdown,
    ) -> Result<u8> {
        let Some(plan) = self.plan_unless(store, metrics, shutdown).await? else {
            return Ok(shutdown.unfinished());
        };
        // In this order: what ends after the look at what waits is heard of.
        let since = OffsetDateTime::now_utc();
        let asked = async {
            let events = fleet.attach().await?;
            Ok::<_, ExitError>((events, fleet.waiting_already(&plan.checked).await))
        };
        let (events, adopted) = tokio::select! {
            asked = asked => asked?,
            () = shutdown.soft.cancelled() => return Ok(stopped(shutdown)),
        };
        let begun = self.begin(start, store, &plan, &adopted, bar).await?;
        failpoint::hit("after-manifest");
        begun
            .finish_on(fleet, &plan.checked, &adopted, (events, since), shutdown)
            .await
    }

    /// Steps 2 and 3: what the feed asks for and what the cache makes of it. `None` where a signal
    /// came first.
    async fn plan_unless(
        &self,
        store: &SharedStore,
        metrics: &Metrics,
        shutdown: &Shutdown,
    ) -> Result<Option<Plan>> {
        tokio::select! {
            plan = self.plan(store, metrics) => plan.map(Some),
            () = shutdown.soft.cancelled() => {
                stopped(shutdown);
                Ok(None)
            }
        }
    }

    async fn plan(&self, store: &SharedStore, metrics: &Metrics) -> Result<Plan> {
        self.patiently("the store", async || {
            let reachable = store.reachable().await;
            // A folder does not come back by itself.
            reachable.map_err(|fault| fault.lasting(!store.is_remote()))
        })
        .await?;
        let mut feed = feed::load(&self.feed, self.embedded.local_paths()).await?;
        let selected = self.filter.select(std::mem::take(&mut feed.repositories));
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
            feed,
            checked,
            index,
        })
    }

    /// Step 4: says in the store what is going to be done.
    async fn begin(
        &self,
        start: Start,
        store: &SharedStore,
        plan: &Plan,
        adopted: &Adopted,
        bar: Bar,
    ) -> Result<Begun> {
        let run = start.run.clone();
        let (manifest, jobs) = plan.documents(&start, adopted)?;
        let latest = LatestRun { run: run.clone() };
        self.patiently("the store", async || {
            let written = async {
                write(store, &of_run(&run, Document::Jobs), &jobs).await?;
                write(store, &of_run(&run, Document::Manifest), &manifest).await?;
                write(store, &DocumentKey::Latest, &latest).await
            };
            written
                .await
                .map_err(|fault| fault.lasting(!store.is_remote()))
        })
        .await?;
        if let Some(index) = &plan.index
            && let Err(fault) = index.save(store.as_ref()).await
        {
            // The next run has to look at more digests, that is all.
            warn!(operation = "run", "the index could not be stored: {fault}");
        }
        let view = RunView::new(run.clone(), Some(&manifest), Some(jobs));
        info!(
            operation = "run",
            run_id = run.as_str(),
            total_repos = view.total(),
            to_digest = view.open(),
            "Run {run}: {} repositories, {} to digest",
            thousands(view.total()),
            thousands(view.open())
        );
        Ok(Begun {
            reporter: Reporter::start(&view, OffsetDateTime::now_utc(), bar),
            run,
            store: SharedStore::clone(store),
            max_failures: self.max_failures,
            view,
        })
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.patience)
    }

    /// Does a step of the start, again and again until it succeeds, waiting will not help, or
    /// patience ends. Says so at once, and then each minute.
    async fn patiently<T>(
        &self,
        what: &str,
        mut step: impl AsyncFnMut() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let begun = Instant::now();
        let mut said = None::<Instant>;
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            let fault = match step().await {
                Ok(done) => return Ok(done),
                Err(fault) => fault,
            };
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            let rest = self.patience().saturating_sub(begun.elapsed());
            if fault.lasting || rest < pause {
                return Err(fault);
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

fn stopped(shutdown: &Shutdown) -> u8 {
    info!(
        operation = "shutdown",
        "stopped before the first job; nothing was written"
    );
    shutdown.unfinished()
}

/// A run whose manifest is stored: whatever comes now, it says how it ended.
#[derive(Debug)]
struct Begun {
    run: RunId,
    store: SharedStore,
    max_failures: MaxFailures,
    view: RunView,
    reporter: Reporter,
}

impl Begun {
    /// Has the jobs done in this process, leaves word, and gives the exit code of how that ended.
    async fn finish_here(
        mut self,
        checked: &[Checked],
        embedded: Embedded,
        shutdown: &Shutdown,
    ) -> Result<u8> {
        let worked = self.work_here(checked, embedded, shutdown).await;
        let closed = self.conclude().await;
        worked.map(|code| closed.unwrap_or(code))
    }

    async fn work_here(
        &mut self,
        checked: &[Checked],
        embedded: Embedded,
        shutdown: &Shutdown,
    ) -> Result<u8> {
        let Embedded {
            broker,
            worker,
            stop,
        } = embedded;
        // The worker ends before the run closes when it is told to stop, or gives up.
        let gone = CancellationToken::new();
        let worker = {
            let gone = gone.clone().drop_guard();
            tokio::spawn(async move {
                let _gone = gone;
                worker.await
            })
        };
        let ended = self.publish_and_follow(&broker, checked, &gone).await;
        stop.cancel();
        let worker = worker.await?.context("the worker's task")?;
        Ok(match (ended?, worker) {
            (Ended::Closed, _) => exit::OK,
            (_, Err(fault)) => {
                error!(operation = "run", "gave up: {fault}");
                exit::UNAVAILABLE
            }
            (Ended::Stopped, Ok(())) if shutdown.soft.is_cancelled() => shutdown.unfinished(),
            (_, Ok(())) => exit::NOT_CLOSED,
        })
    }

    async fn publish_and_follow(
        &mut self,
        broker: &SharedBroker,
        checked: &[Checked],
        gone: &CancellationToken,
    ) -> Result<Ended, Fault> {
        let mut events = broker.events(Position::Now).await?;
        let jobs = checked.iter().filter(|checked| !checked.is_cached());
        publish(broker, &self.run, jobs, gone).await?;
        Ok(follow(&mut events, &mut self.view, &mut self.reporter, gone, None).await)
    }

    /// Has the jobs done by a fleet, leaves word, and gives the exit code of how that ended.
    async fn finish_on(
        mut self,
        fleet: &Fleet,
        checked: &[Checked],
        adopted: &Adopted,
        (events, since): (Entries, OffsetDateTime),
        shutdown: &Shutdown,
    ) -> Result<u8> {
        let stop = shutdown.soft.child_token();
        let work = FleetRun {
            fleet,
            run: &self.run,
            store: &self.store,
            checked,
            since,
            adopted,
            stop: &stop,
        };
        let ended = {
            let mut work = pin!(work.work(events, &mut self.view, &mut self.reporter));
            // What is on its way gets its confirm, but not from a broker that is away.
            let stopped = async {
                tokio::select! {
                    () = fleet.lost().cancelled() => stop.cancel(),
                    () = stop.cancelled() => {}
                }
                tokio::time::sleep(LAST_CONFIRMS).await;
            };
            tokio::select! {
                ended = &mut work => ended,
                () = stopped => Ok(Ended::Stopped),
            }
        };
        let run = &self.run;
        let code = match ended {
            Ok(Ended::Closed) => Ok(exit::OK),
            Ok(Ended::Detached) => {
                info!(
                    operation = "detach",
                    run_id = run.as_str(),
                    "Run {run} goes on without this process: see `producer status {run}`"
                );
                return Ok(exit::OK);
            }
            Ok(_) if shutdown.soft.is_cancelled() => {
                info!(
                    operation = "shutdown",
                    "Workers go on with what is published; the next run counts it, and `producer status {run}` shows it"
                );
                Ok(shutdown.unfinished())
            }
            Ok(_) if fleet.lost().is_cancelled() => Err(ExitError::new(
                exit::BUSY,
                "another producer took over while the broker was away: its run counts the jobs of this one",
            )
            .into()),
            Ok(_) => Ok(exit::NOT_CLOSED),
            Err(fault) if shutdown.soft.is_cancelled() => {
                warn!(operation = "shutdown", "{fault}");
                Ok(shutdown.unfinished())
            }
            Err(fault) => Err(ExitError::from(fault).into()),
        };
        let closed = self.conclude().await;
        code.map(|code| closed.unwrap_or(code))
    }

    /// Writes the summary to store and log; returns the exit code of a run that closed.
    async fn conclude(self) -> Option<u8> {
        drop(self.reporter);
        let summary = self.view.summary(OffsetDateTime::now_utc());
        let attempted = summary.total_repos - summary.cached;
        let allowed = self.max_failures.allows(summary.failed, attempted);
        if summary.closed && !allowed {
            error!(
                operation = "max-failures",
                failed = summary.failed,
                attempted,
                "{} of {} attempted repositories failed, more than --max-failures {}",
                thousands(summary.failed),
                thousands(attempted),
                self.max_failures
            );
        }
        conclude(&self.store, &self.run, &summary).await;
        summary.closed.then_some(match allowed {
            true => exit::OK,
            false => exit::TOO_MANY_FAILED,
        })
    }
}

/// Leaves word in the store and in the log.
async fn conclude(store: &SharedStore, run: &RunId, summary: &RunSummary) {
    let store_location = store.location();
    let key = of_run(run, Document::Summary);
    let last_writes = Instant::now() + LAST_WRITES;
    let this_run = match until(last_writes, write(store, &key, summary)).await {
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
    if summary.closed
        && let Err(fault) = until(last_writes, write_last_closed(store, summary)).await
    {
        // Who watches finds the summary, unless the next run begins before that.
        warn!(
            operation = "run",
            "that this run closed could not be noted: {fault}"
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
    report::completed(summary);
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

/// Remembers this run beside the one that closed before it.
async fn write_last_closed(store: &SharedStore, summary: &RunSummary) -> Result<(), Fault> {
    let known = store.document(&DocumentKey::LastClosed).await?;
    // One that cannot be read is none.
    let known = known.and_then(|known| serde_json::from_slice::<LastClosed>(&known).ok());
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

    use async_trait::async_trait;
    use common::broker::{
        Broker, DeadLetter, Delivery, Enqueued, Entries, Event, Notice, ProducerLock, Waiting,
    };
    use common::ids::PushedAt;
    use common::job::Job;
    use common::run::documents::CacheReason;
    use common::store::fs::FsStore;
    use futures::stream::BoxStream;

    use super::*;
    use crate::feed::entry::FeedRepo;

    /// A broker that goes away before it takes a job.
    #[derive(Debug)]
    struct Away;

    #[async_trait]
    impl Broker for Away {
        async fn enqueue(&self, _: BoxStream<'_, Job>) -> Result<Enqueued, Fault> {
            Err(Fault::infra("the broker is away"))
        }

        async fn deliveries_until(
            &self,
            _: u16,
            _: CancellationToken,
        ) -> Result<BoxStream<'static, Delivery>, Fault> {
            unreachable!()
        }

        async fn record(&self, _: &Event) -> Result<(), Fault> {
            unreachable!()
        }

        async fn events(&self, _: Position) -> Result<Entries, Fault> {
            Ok(Box::pin(futures::stream::pending()))
        }

        async fn history(&self, _: Position) -> Result<Entries, Fault> {
            unreachable!()
        }

        async fn waiting(&self) -> Result<Waiting, Fault> {
            unreachable!()
        }

        async fn dead_letters(
            &self,
        ) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault> {
            unreachable!()
        }

        async fn announce(&self, _: &Notice) -> Result<(), Fault> {
            unreachable!()
        }

        async fn announcements(&self) -> Result<BoxStream<'static, Notice>, Fault> {
            unreachable!()
        }

        fn loan_limit(&self) -> Option<Duration> {
            None
        }

        fn retry_after(&self, wish: Duration) -> Duration {
            wish
        }

        async fn probe(&self) -> Result<(), Fault> {
            unreachable!()
        }

        async fn close(&self) {}

        async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault> {
            unreachable!()
        }
    }

    #[tokio::test]
    async fn a_run_that_breaks_off_says_how_far_it_got() {
        let folder = tempfile::tempdir().unwrap();
        let store: SharedStore = Arc::new(FsStore::new(folder.path()));
        let checked = [Checked {
            entry: FeedRepo {
                index: 0,
                repo: "a/b".parse().unwrap(),
                url: "https://github.com/a/b".to_owned(),
                pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
                archived: false,
            },
            reason: CacheReason::Miss,
            detail: String::new(),
            force: false,
        }];
        let run = RunId::new();
        let list = JobList {
            version: JobList::VERSION,
            invalid: Vec::new(),
            jobs: vec![ExpectedJob {
                key: checked[0].key(),
                adopted_from: Vec::new(),
            }],
        };
        let view = RunView::new(run.clone(), None, Some(list));
        let begun = Begun {
            run: run.clone(),
            store: SharedStore::clone(&store),
            max_failures: MaxFailures::Percent(20.0),
            reporter: Reporter::start(&view, OffsetDateTime::now_utc(), Bar::hidden()),
            view,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let embedded = Embedded {
            broker: Arc::new(Away),
            worker: tokio::spawn(async move {
                stopped.cancelled().await;
                Ok(())
            }),
            stop,
        };
        let shutdown = Shutdown::default();
        let error = begun.finish_here(&checked, embedded, &shutdown).await;
        let error = error.unwrap_err();
        assert_eq!(exit::code_of(&error), exit::UNAVAILABLE);
        assert!(error.to_string().contains("the broker is away"), "{error}");

        let key = DocumentKey::OfRun {
            run,
            document: Document::Summary,
        };
        let summary = store.document(&key).await.unwrap().unwrap();
        let summary: RunSummary = serde_json::from_slice(&summary).unwrap();
        assert!(!summary.closed);
        assert_eq!(summary.open, ["a/b"]);
    }
}
