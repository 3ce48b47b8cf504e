//! Following the ledger until a run closes.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use common::broker::{Entries, Event, LedgerEntry, Position, SharedBroker};
use common::fault::{Fault, FaultKind};
use common::ids::{JobKey, RepoRef};
use common::outcome::{Outcome, OutcomeRecord};
use common::run::view::RunView;
use common::store::SharedStore;
use common::telemetry::traces::Traces;
use common::text::{counted, thousands};
use futures::{FutureExt, StreamExt, stream};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use worker::job::settled_by;

use crate::cache::Checked;
use crate::cache::index::Learned;
use crate::progress::Progress;
use crate::publish::{self, Adopted, publish};
use crate::report::Reporter;
use crate::watchdog::{Finding, Watchdog};

/// How long the broker may take to confirm what was published before a stop.
const LAST_CONFIRMS: Duration = Duration::from_secs(10);
/// How many digests are looked at together.
const LOOKS: usize = 64;
/// How far clocks may be apart: only where to begin to read depends on it.
const CLOCKS_DIFFER: time::Duration = time::Duration::minutes(1);

/// Why following ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// `total = cached + processed + failed`.
    Closed,
    /// There are no more outcomes to wait for, or it was stopped.
    Stopped,
    /// It was to be left alone.
    Detached,
}

/// A run whose manifest is stored.
#[derive(Debug)]
pub struct Following {
    /// Queues and ledger.
    pub broker: SharedBroker,
    /// Where traces begin.
    pub traces: Traces,
    /// Where digests appear.
    pub store: SharedStore,
    /// What the cache said of each repository.
    pub checked: Vec<Checked>,
    /// The feed's repositories, if the run is about all of them.
    pub whole: Option<HashSet<RepoRef>>,
    /// Jobs that earlier runs published.
    pub adopted: Adopted,
    /// The run's numbers.
    pub view: RunView,
    /// What its outcomes tell of the store.
    pub learned: Learned,
    /// Its progress.
    pub reporter: Reporter,
    /// The same in the store, for a run whose ledger nobody else can read.
    pub progress: Option<Progress>,
    /// What keeps watch meanwhile.
    pub watchdog: Watchdog,
}

impl Following {
    /// Publishes what no earlier run published, unless the run is `over` before.
    ///
    /// # Errors
    /// If the broker does not take it.
    pub async fn publish(&self, over: &CancellationToken) -> Result<(), Fault> {
        let to_publish = self
            .checked
            .iter()
            .filter(|checked| checked.has_job() && !self.adopted.contains_key(&checked.key()));
        // What is on its way gets its confirm, but not from a broker that is away.
        let too_late = async {
            over.cancelled().await;
            tokio::time::sleep(LAST_CONFIRMS).await;
        };
        let run = self.view.run();
        let waiting = match self.adopted.len() as u64 {
            0 => String::new(),
            adopted => format!("; of earlier runs, still waiting: {}", thousands(adopted)),
        };
        let published = tokio::select! {
            published = publish(&self.broker, run, to_publish, &self.traces, over) => published?,
            () = too_late => return Ok(()),
        };
        info!(
            operation = "publish",
            run_id = run.as_str(),
            published = published.jobs,
            adopted = self.adopted.len(),
            "Jobs published: {}{waiting}",
            thousands(published.jobs)
        );
        Ok(())
    }

    /// Returns the repositories that are gone from their hosts, and those whose digests were stored or
    /// renewed.
    pub fn gone_and_made(&self) -> (HashSet<RepoRef>, HashSet<RepoRef>) {
        let (mut gone, mut made) = (HashSet::new(), HashSet::new());
        for checked in &self.checked {
            let key = checked.key();
            match self.view.settled(&key).map(|settled| settled.outcome) {
                Some(Outcome::Failed(FaultKind::Gone)) => _ = gone.insert(key.repo),
                Some(Outcome::Failed(_)) | None => {}
                Some(_) => _ = made.insert(key.repo),
            }
        }
        (gone, made)
    }

    /// Follows until the run closes or is `over`. Once `stopping`, jobs in hand end, and nothing
    /// more is looked after.
    ///
    /// # Errors
    /// If broker or store are away for too long.
    pub async fn follow(
        &mut self,
        mut events: Entries,
        over: &CancellationToken,
        stopping: &CancellationToken,
    ) -> Result<Ended, Fault> {
        let mut look = self.watchdog.look(&self.broker, &self.store);
        while !self.view.closes() {
            let due = self.next_report_due();
            let sight = tokio::select! {
                biased;
                entry = events.next() => {
                    match entry {
                        Some(Ok(entry)) => self.apply(&entry),
                        Some(Err(fault)) => events = self.ledger_lost(&fault.message).await?,
                        None => events = self.ledger_lost("the ledger ended").await?,
                    }
                    continue;
                }
                () = over.cancelled() => {
                    // What the ledger holds already still counts.
                    while let Some(Some(Ok(entry))) = events.next().now_or_never() {
                        self.count(&entry);
                    }
                    let closes = self.view.closes();
                    return Ok(if closes { Ended::Closed } else { Ended::Stopped });
                }
                () = tokio::time::sleep(due) => {
                    self.report();
                    continue;
                }
                sight = &mut look, if !stopping.is_cancelled() => sight,
            };
            let now = Instant::now();
            match self.watchdog.judge(sight, &self.view, &self.adopted, now) {
                Finding::Well => {}
                Finding::Lost(jobs) => self.publish_again(jobs, over).await,
                Finding::GaveUp(fault) => return Err(fault),
            }
            look = self.watchdog.look(&self.broker, &self.store);
        }
        Ok(Ended::Closed)
    }

    fn apply(&mut self, entry: &LedgerEntry) {
        if self.count(entry) {
            self.watchdog.hear(Instant::now());
            self.report();
        }
    }

    /// How long to wait for an outcome before there is something to report all the same.
    fn next_report_due(&self) -> Duration {
        let now = OffsetDateTime::now_utc();
        let due = self.reporter.next_due(now);
        match &self.progress {
            Some(progress) => due.min(progress.next_due(now)),
            None => due,
        }
    }

    fn report(&mut self) {
        let now = OffsetDateTime::now_utc();
        self.reporter.update(now, &self.view);
        if let Some(progress) = &mut self.progress {
            progress.update(now, &self.view);
        }
    }

    /// Returns whether the entry is news of this run.
    fn count(&mut self, entry: &LedgerEntry) -> bool {
        let counts = self.view.apply(entry);
        if counts && let Event::Outcome(record) = &entry.event {
            self.learned.record(record);
        }
        counts
    }

    /// Reads the ledger again from the start of the run: it is another, or lost its end.
    async fn ledger_lost(&mut self, why: &str) -> Result<Entries, Fault> {
        error!(
            operation = "follow",
            "outcomes may be lost ({why}): what has a digest counts as unchanged, what is nowhere is published again"
        );
        let now = OffsetDateTime::now_utc();
        let started = self.view.snapshot(now).started_at.unwrap_or(now);
        let from = Position::Since(started - CLOCKS_DIFFER);
        let events = self.broker.events(from).await?;
        let open = self.view.open_jobs().cloned().collect();
        self.count_stored(&open).await;
        Ok(events)
    }

    /// Publishes jobs again that have no digest.
    async fn publish_again(&mut self, jobs: HashSet<JobKey>, stop: &CancellationToken) {
        self.count_stored(&jobs).await;
        let open: HashSet<_> = self.view.open_jobs().collect();
        let again = |checked: &&Checked| {
            let key = checked.key();
            jobs.contains(&key) && open.contains(&key)
        };
        let again: Vec<_> = self.checked.iter().filter(again).collect();
        if again.is_empty() {
            return;
        }
        let jobs = again.len() as u64;
        warn!(
            operation = "lost-jobs",
            jobs,
            "{} neither waiting nor digested: publishing again",
            counted(jobs, "open job is", "open jobs are")
        );
        let run = self.view.run();
        if let Err(fault) = publish(&self.broker, run, again.into_iter(), &self.traces, stop).await
        {
            warn!(operation = "lost-jobs", "not published again: {fault}");
        }
    }

    /// Counts those of `jobs` whose digest is in the store: their outcome was lost.
    async fn count_stored(&mut self, jobs: &HashSet<JobKey>) {
        let run = self.view.run().clone();
        let looks = self
            .checked
            .iter()
            .filter(|checked| jobs.contains(&checked.key()))
            .map(async |checked| {
                let job = publish::job(&run, checked);
                // What cannot be read is not counted.
                let found = self.store.head(&job.repo).await.ok()?;
                let outcome = settled_by(&job, &found)?;
                let run = run.clone();
                Some(OutcomeRecord::without_work(checked.key(), run, outcome, ""))
            });
        let records = stream::iter(looks)
            .buffer_unordered(LOOKS)
            .filter_map(std::future::ready)
            .collect::<Vec<_>>()
            .await;
        for record in records {
            self.apply(&LedgerEntry {
                at: OffsetDateTime::now_utc(),
                event: Event::Outcome(record),
            });
        }
    }
}
