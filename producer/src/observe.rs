//! `producer observe`: a long-running exporter of fleet and run as metrics.
//!
//! It reads what [`status`](crate::status) reads, and goes on following.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::broker::SharedBroker;
use common::broker::config::BrokerConfig;
use common::exit::{self, ExitError};
use common::fault::{Fault, FaultKind};
use common::ids::RunId;
use common::run::documents::{CacheReason, ClosedRun, LastClosed, LatestRun};
use common::run::view::RunSnapshot;
use common::shutdown::Shutdown;
use common::store::config::StoreConfig;
use common::store::{Document, DocumentKey, SharedStore};
use common::telemetry::http::MetricsConfig;
use common::text::format_duration;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use strum::VariantArray;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use self::metrics::{FleetMetrics, UNKNOWN, residual};
use crate::status::observed::{ObservedRun, document, of_run};
use crate::status::{Followed, following};

pub mod metrics;

/// From one poll of store and queues to the next.
const POLL_EVERY: Duration = Duration::from_secs(15);
/// How long a poll may take.
const POLL_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for a broker: practically for ever, like workers.
const PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Closed runs that are remembered: the latest, and the one before it.
const CLOSED_RUNS: usize = 2;

/// What to observe, and where to serve it.
#[derive(Args, Clone, Debug)]
pub struct ObserveConfig {
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    broker: BrokerConfig,
    #[command(flatten)]
    metrics: MetricsConfig,
}

impl ObserveConfig {
    /// Observes until `shutdown`; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if no address is given, [`exit::UNAVAILABLE`] if it is taken or the broker
    /// refuses.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        if self.metrics.metrics_addr.is_none() {
            let message = "no address for the metrics: set --metrics-addr or METRICS_ADDR, for example to 0.0.0.0:9100";
            return Err(ExitError::new(exit::USAGE, message).into());
        }
        let store = self.store.open()?;
        let metrics = FleetMetrics::new();
        let (ready, readiness) = watch::channel(Err("nothing was looked at yet".to_owned()));
        let _server = self.metrics.serve(&metrics, &readiness).await?;
        let mut observer = Observer {
            location: store.location(),
            store,
            metrics,
            ready,
            broker: None,
            latest: None,
            closed: BTreeMap::new(),
            complaints: Complaints::default(),
            pauses: Vec::new(),
        };
        tokio::select! {
            ended = observer.observe(&self.broker) => match ended? {},
            () = shutdown.soft.cancelled() => {}
        }
        if let Some(broker) = observer.broker {
            broker.close().await;
        }
        info!(operation = "shutdown", "stopped");
        Ok(shutdown.code())
    }
}

#[derive(Debug)]
struct Observer {
    store: SharedStore,
    location: String,
    /// `None` until it is connected, and if none is named.
    broker: Option<SharedBroker>,
    metrics: FleetMetrics,
    ready: watch::Sender<Result<(), String>>,
    /// The run begun last.
    latest: Option<ObservedRun>,
    /// Runs that closed lately: their ids sort by when they began.
    closed: BTreeMap<RunId, ClosedRun>,
    complaints: Complaints,
    /// Why workers waited at the last poll.
    pauses: Vec<String>,
}

/// What is away, logged once rather than at each poll.
#[derive(Debug, Default)]
struct Complaints {
    store: Option<String>,
    broker: Option<String>,
}

impl Observer {
    async fn observe(&mut self, config: &BrokerConfig) -> Result<Infallible, ExitError> {
        let alone = config.broker_url.is_none();
        let mut connecting = pin!(async {
            match config.connect(PATIENCE).await? {
                Some(broker) => Ok::<_, ExitError>(broker),
                None => pending().await,
            }
        });
        let mut ticks = tokio::time::interval(POLL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let nothing = || stream::pending().boxed();
        let mut entries: BoxStream<'static, Result<Followed, Fault>> = nothing();
        let mut following_run = None;
        info!(
            operation = "observe",
            "Looking at {} every {}",
            self.location,
            format_duration(POLL_EVERY)
        );
        loop {
            tokio::select! {
                connected = &mut connecting, if !alone && self.broker.is_none() => {
                    self.broker = Some(connected?);
                    ticks.reset_immediately();
                }
                _ = ticks.tick() => {
                    self.poll_store().await;
                    self.poll_broker(alone).await;
                    let run = self.run();
                    if let Some(broker) = self.broker.as_ref().filter(|_| run != following_run) {
                        entries = match &self.latest {
                            Some(latest) => {
                                following(broker, latest.position(OffsetDateTime::now_utc())).boxed()
                            }
                            None => nothing(),
                        };
                        following_run = run;
                    }
                    self.show(alone);
                }
                read = entries.next() => match (read, &mut self.latest) {
                    (Some(Ok(Followed::Entry(entry))), Some(latest)) => {
                        latest.view.apply(&entry);
                    }
                    (Some(Ok(Followed::CaughtUp)), Some(latest)) => {
                        latest.view.set_caught_up();
                        self.show(alone);
                    }
                    (Some(Ok(_)), None) => {}
                    (lost, _) => {
                        if let Some(Err(fault)) = lost {
                            self.complaints.of_broker(Err(fault.to_string()));
                        }
                        // Read again after the next poll; entries that come twice do no harm.
                        (entries, following_run) = (nothing(), None);
                    }
                },
            }
        }
    }

    fn run(&self) -> Option<RunId> {
        let latest = self.latest.as_ref()?;
        Some(latest.view.run().clone())
    }

    async fn poll_store(&mut self) {
        let answer = match tokio::time::timeout(POLL_LIMIT, self.read_documents()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!(
                "{} did not answer within {}",
                self.location,
                format_duration(POLL_LIMIT)
            )),
        };
        self.metrics.set_store_reached(answer.is_ok());
        self.complaints.of_store(answer);
    }

    async fn read_documents(&mut self) -> Result<(), ExitError> {
        let store = &self.store;
        if let Some(known) = document::<LastClosed>(store, &DocumentKey::LastClosed).await? {
            let runs = known.before.into_iter().chain([known.last]);
            self.closed.extend(runs.map(|run| (run.run.clone(), run)));
        }
        let Some(LatestRun { run }) = document(store, &DocumentKey::Latest).await? else {
            return Ok(());
        };
        match &mut self.latest {
            Some(latest) if *latest.view.run() == run => {
                if latest.closed().is_none()
                    && let Some(summary) = of_run(store, &run, Document::Summary).await?
                {
                    latest.summary = Some(summary);
                }
            }
            _ => self.latest = Some(ObservedRun::read(store, &run).await?),
        }
        Ok(())
    }

    async fn poll_broker(&mut self, alone: bool) {
        if alone {
            return;
        }
        let answer = match &self.broker {
            None => Err("not connected yet".to_owned()),
            Some(broker) => match tokio::time::timeout(POLL_LIMIT, broker.waiting()).await {
                Ok(Ok(waiting)) => Ok(waiting),
                Ok(Err(fault)) => Err(fault.to_string()),
                Err(_) => Err(format!("no answer within {}", format_duration(POLL_LIMIT))),
            },
        };
        self.metrics.set_waiting(answer.as_ref().ok().copied());
        self.metrics.set_broker_reached(answer.is_ok());
        self.complaints.of_broker(answer.map(drop));
    }

    /// Updates the metrics.
    fn show(&mut self, alone: bool) {
        let now = OffsetDateTime::now_utc();
        let metrics = self.metrics.clone();
        let _consistent = metrics.hold();
        if let Some(latest) = &self.latest {
            let pauses = match latest.view.caught_up() {
                true => latest.view.snapshot(now).pauses(),
                false => Vec::new(),
            };
            for pause in pauses.iter().filter(|pause| !self.pauses.contains(pause)) {
                warn!(operation = "observe", "{pause}");
            }
            self.pauses = pauses;
            if let Some(run) = show_latest(&self.metrics, latest, alone, now) {
                // What its producer noted is exact.
                self.closed.entry(run.run.clone()).or_insert(run);
            }
        } else if self.complaints.store.is_none() {
            self.metrics.run_started.set(0.0);
        }
        while self.closed.len() > CLOSED_RUNS {
            self.closed.pop_first();
        }
        self.show_closed();
        _ = self.ready.send_replace(self.complaints.readiness());
    }

    fn show_closed(&self) {
        match self.closed.last_key_value() {
            Some((_, run)) => {
                let at = run.closed_at.unix_timestamp_nanos() as f64 / 1e9;
                self.metrics.last_closed.set(at);
                self.metrics.last_closed_took.set(run.elapsed_seconds);
            }
            None if self.complaints.store.is_none() => self.metrics.last_closed.set(0.0),
            None => {}
        }
        let Some(latest) = &self.latest else {
            return;
        };
        let previous = self.closed.range(..latest.view.run()).next_back();
        let previous = previous.map_or(UNKNOWN, |(_, run)| run.cache_hit_rate / 100.0);
        let ratio = latest.manifest.as_ref().map_or(UNKNOWN, |manifest| {
            let asked: u64 = manifest.reasons.values().sum();
            // NaN if nothing was asked.
            manifest.cached() as f64 / asked as f64
        });
        self.metrics.set_hit_ratios(ratio, previous);
    }
}

/// Shows the latest run; returns it if it has closed.
fn show_latest(
    metrics: &FleetMetrics,
    latest: &ObservedRun,
    alone: bool,
    now: OffsetDateTime,
) -> Option<ClosedRun> {
    let run = latest.view.run().clone();
    metrics.set_run(run.as_str());
    let started = latest.view.started();
    let started_at = started.map_or(UNKNOWN, |at| at.unix_timestamp() as f64);
    metrics.run_started.set(started_at);
    if let Some(manifest) = &latest.manifest {
        metrics.run_total.set(manifest.total as f64);
        for &reason in CacheReason::VARIANTS {
            let count = manifest.reasons.get(&reason).unwrap_or(&0);
            metrics.set_cache(reason, *count as f64);
        }
        let newest = manifest.feed_newest_push.as_ref();
        let newest = newest.map_or(UNKNOWN, |push| push.time().unix_timestamp() as f64);
        metrics.feed_newest_push.set(newest);
        metrics.feed_entries.set(match manifest.feed_entries {
            0 => UNKNOWN,
            entries => entries as f64,
        });
        let changed = [CacheReason::Stale, CacheReason::Miss];
        let changed = changed
            .iter()
            .filter_map(|reason| manifest.reasons.get(reason));
        metrics
            .feed_entries_changed
            .set(changed.sum::<u64>() as f64);
    }
    let snapshot = latest.view.snapshot(now);
    if let Some(seen) = snapshot.workers_seen.filter(|_| latest.view.caught_up()) {
        metrics.workers_seen.set(seen as f64);
    }
    let snapshot = match latest.closed().or(latest.better_summary()) {
        Some(summary) => Some(latest.of_summary(summary).run),
        None if latest.view.caught_up() || alone => Some(snapshot),
        // What became of its jobs is in the part of the ledger that is not read yet.
        None => None,
    };
    metrics.set_snapshot(snapshot.as_ref());
    let is_whole = |run: &RunSnapshot| {
        residual(run) == 0.0 && !run.failures_by_class.contains_key(&FaultKind::Cancelled)
    };
    let snapshot = snapshot.filter(is_whole)?;
    let elapsed = Duration::from_secs(snapshot.elapsed_seconds.unwrap_or(0));
    // A damaged summary may hold any number.
    let by_summary = started.and_then(|at| at.checked_add(elapsed.try_into().ok()?));
    Some(ClosedRun {
        run,
        closed_at: latest.view.closed_at().or(by_summary)?,
        elapsed_seconds: elapsed.as_secs_f64(),
        cache_hit_rate: snapshot.cache_hit_rate,
    })
}

impl Complaints {
    fn of_store(&mut self, answer: Result<(), String>) {
        complain(&mut self.store, "store", answer);
    }

    fn of_broker(&mut self, answer: Result<(), String>) {
        complain(&mut self.broker, "broker", answer);
    }

    fn readiness(&self) -> Result<(), String> {
        match self.store.as_ref().or(self.broker.as_ref()) {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        }
    }
}

fn complain(known: &mut Option<String>, what: &str, answer: Result<(), String>) {
    let now = answer.err();
    match (&*known, &now) {
        (None, Some(why)) => warn!(operation = "observe", "the {what} is away: {why}"),
        (Some(_), None) => info!(operation = "observe", "the {what} answers again"),
        _ => {}
    }
    *known = now;
}

#[cfg(test)]
mod tests {
    use common::broker::{Event, LedgerEntry};
    use common::ids::{JobKey, PushedAt};
    use common::outcome::{Outcome, OutcomeRecord};
    use common::run::documents::{ExpectedJob, JobList};
    use common::run::view::RunView;

    use super::*;

    #[test]
    fn a_run_that_was_cancelled_does_not_tell_how_fresh_digests_are() {
        let (run, now) = (RunId::new(), OffsetDateTime::now_utc());
        for (outcome, tells) in [(Outcome::Processed, true), (Outcome::CANCELLED, false)] {
            let key = JobKey {
                repo: "a/b".parse().unwrap(),
                pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            };
            let list = JobList {
                version: JobList::VERSION,
                invalid: Vec::new(),
                jobs: vec![ExpectedJob {
                    key: key.clone(),
                    adopted_from: Vec::new(),
                }],
            };
            let mut view = RunView::new(run.clone(), None, Some(list));
            let record = OutcomeRecord::without_work(key, run.clone(), outcome, "");
            view.apply(&LedgerEntry {
                at: now,
                event: Event::Outcome(record),
            });
            let latest = ObservedRun {
                manifest: None,
                summary: None,
                view,
            };
            let closed = show_latest(&FleetMetrics::new(), &latest, true, now);
            assert_eq!(closed.is_some(), tells, "{outcome}");
        }
    }

    #[test]
    fn what_is_wrong_makes_it_unready_until_it_is_mended() {
        let mut complaints = Complaints::default();
        assert_eq!(complaints.readiness(), Ok(()));
        complaints.of_broker(Err("away".to_owned()));
        complaints.of_store(Ok(()));
        assert_eq!(complaints.readiness(), Err("away".to_owned()));
        complaints.of_broker(Ok(()));
        assert_eq!(complaints.readiness(), Ok(()));
    }
}
