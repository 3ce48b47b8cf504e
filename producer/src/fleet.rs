//! A run on RabbitMQ: workers elsewhere, jobs that may wait there already, and a ledger that tells
//! what became of them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use clap::Args;
use common::broker::{
    BrokerConfig, Entries, Event, LedgerEntry, Position, ProducerLock, SharedBroker,
};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::{JobKey, RunId};
use common::job::Job;
use common::outcome::OutcomeRecord;
use common::run::view::RunView;
use common::store::SharedStore;
use common::text::{format_duration, thousands};
use futures::{StreamExt, stream};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use worker::job::settled_by;

use crate::cache::Checked;
use crate::follow::{Ended, follow};
use crate::publish::{self, publish};
use crate::report::Reporter;
use crate::run::Adopted;

/// A job that was published longer ago than this is published again: a broker that was killed may
/// have kept the ledger's copy only, and nobody would ever work on it.
pub const BELIEVED: Duration = Duration::from_secs(2 * 3600);
/// How far the clocks of a fleet may be apart.
const CLOCKS_DIFFER: Duration = Duration::from_secs(60);
/// How long nothing is heard before it is looked whether anybody works.
const LOOK_AFTER: Duration = Duration::from_secs(60);
/// How many digests are looked at together.
const LOOKS: usize = 64;

/// How a run on RabbitMQ goes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Broker")]
pub struct FleetConfig {
    /// With a broker: end once all jobs are with it, and leave the following to `producer status`.
    #[arg(long, env = "DETACH", requires = "broker_url")]
    detach: bool,
    /// With a broker: seconds without any outcome after which jobs are published again that
    /// neither wait there nor have a digest. Longer than any job takes.
    #[arg(
        long,
        env = "REPUBLISH_AFTER",
        value_name = "SECONDS",
        default_value_t = 1800,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    republish_after: u64,
}

/// Being the one producer of a fleet.
#[derive(Debug)]
pub struct Fleet {
    broker: SharedBroker,
    lock: ProducerLock,
    config: FleetConfig,
}

impl Fleet {
    /// Connects and takes the producer's lock; `None` where there is to be no broker.
    ///
    /// # Errors
    /// [`exit::UNAVAILABLE`] where the broker cannot be reached or refuses, [`exit::BUSY`] where
    /// another producer is at work.
    pub async fn connect(
        broker: &BrokerConfig,
        config: &FleetConfig,
        patience: Duration,
    ) -> Result<Option<Self>, ExitError> {
        let prefix = &broker.queue_prefix;
        let Some(broker) = broker.connect(patience).await? else {
            return Ok(None);
        };
        let lock = broker.producer_lock().await?;
        let Some(lock) = lock else {
            broker.close().await;
            let message = format!(
                "another producer is at work on the queues \"{prefix}\" of this broker; wait for its end (`producer status --watch`), or choose another --queue-prefix"
            );
            return Err(ExitError::new(exit::BUSY, message));
        };
        Ok(Some(Self {
            broker,
            lock,
            config: config.clone(),
        }))
    }

    /// Which of the jobs to come wait already, for whatever run: they are not published again.
    ///
    /// The ledger may hold a job that the queue does not, never the other way round. So a job counts
    /// as waiting only where something waits at all, and its record is not old. In doubt it is
    /// published: a job too many costs one look at the store.
    pub async fn waiting_already(&self, checked: &[Checked]) -> Adopted {
        match self.open_jobs(checked).await {
            Ok(open) => open,
            Err(fault) => {
                warn!(
                    operation = "adopt",
                    "what waits from earlier runs is not known, so all jobs are published: {fault}"
                );
                Adopted::new()
            }
        }
    }

    async fn open_jobs(&self, checked: &[Checked]) -> Result<Adopted, Fault> {
        let waiting = self.broker.waiting().await?;
        if waiting.ready + waiting.retry == 0 {
            return Ok(Adopted::new());
        }
        let wanted: HashMap<_, _> = checked
            .iter()
            .filter(|checked| !checked.is_cached())
            .map(|checked| (checked.key(), checked))
            .collect();
        let since = OffsetDateTime::now_utc() - BELIEVED;
        let mut history = self.broker.history(Position::Since(since)).await?;
        let mut open = Adopted::new();
        while let Some(entry) = history.next().await {
            let entry = entry?;
            match entry.event {
                Event::Job(job) if entry.at >= since && is_same(&job, &wanted) => {
                    open.entry(job.key()).or_default().push(job.run);
                }
                Event::Job(_) | Event::Worker(_) => {}
                ended => {
                    // One run's copy ended; another's may still wait.
                    if let Some(record) = ended.into_outcome()
                        && let Some(runs) = open.get_mut(&record.key())
                    {
                        runs.retain(|run| *run != record.run);
                    }
                }
            }
        }
        open.retain(|_, runs| !runs.is_empty());
        Ok(open)
    }

    /// What becomes of jobs from now on.
    ///
    /// # Errors
    /// Where the ledger cannot be read.
    pub async fn attach(&self) -> Result<Entries, Fault> {
        self.broker.events(Position::Now).await
    }

    /// Cancelled when this is no longer the one producer.
    pub fn lost(&self) -> &CancellationToken {
        &self.lock.lost
    }

    /// Ends the connection. To be called before the program ends.
    pub async fn close(&self) {
        self.broker.close().await;
    }
}

/// Whether a job that waits does what is asked for now.
fn is_same(job: &Job, wanted: &HashMap<JobKey, &Checked>) -> bool {
    wanted
        .get(&job.key())
        .is_some_and(|checked| job.url == checked.entry.url && (job.force || !checked.force))
}

/// A run whose jobs are done by a fleet.
#[derive(Debug)]
pub struct FleetRun<'a> {
    /// Who does them.
    pub fleet: &'a Fleet,
    /// The run.
    pub run: &'a RunId,
    /// Where digests appear.
    pub store: &'a SharedStore,
    /// What the cache said of each repository.
    pub checked: &'a [Checked],
    /// Since when `events` are this run's.
    pub since: OffsetDateTime,
    /// Jobs that wait already.
    pub adopted: &'a Adopted,
    /// To stop when this is cancelled.
    pub stop: &'a CancellationToken,
}

impl FleetRun<'_> {
    /// Publishes what does not wait already, and follows until the run closes, unless it is to be
    /// left alone. `events` were attached before it was known what waits.
    ///
    /// # Errors
    /// Where the broker stays away.
    pub async fn work(
        &self,
        mut events: Entries,
        view: &mut RunView,
        reporter: &mut Reporter,
    ) -> Result<Ended, Fault> {
        let to_publish = self
            .checked
            .iter()
            .filter(|checked| !checked.is_cached() && !self.adopted.contains_key(&checked.key()));
        let broker = &self.fleet.broker;
        let published = publish(broker, self.run, to_publish, self.stop).await?;
        info!(
            operation = "publish",
            run_id = self.run.as_str(),
            published = published.jobs,
            adopted = self.adopted.len(),
            "{} jobs published, {} of earlier runs waited already",
            thousands(published.jobs),
            thousands(self.adopted.len() as u64)
        );
        if self.stop.is_cancelled() {
            return Ok(Ended::Stopped);
        }
        if self.fleet.config.detach {
            return Ok(Ended::Detached);
        }
        let republish_after = Duration::from_secs(self.fleet.config.republish_after);
        let look_after = LOOK_AFTER.min(republish_after);
        // Of outcomes; and that with nothing waiting, so that something ought to be heard.
        let (mut silence, mut nothing_waits) = (Duration::ZERO, Duration::ZERO);
        loop {
            let before = view.open();
            match follow(&mut events, view, reporter, self.stop, Some(look_after)).await {
                Ended::Quiet => {
                    let silent = view.open() == before;
                    if !silent {
                        (silence, nothing_waits) = (Duration::ZERO, Duration::ZERO);
                    }
                    silence += look_after;
                    if self.somebody_works(silence).await {
                        nothing_waits += look_after;
                    } else {
                        nothing_waits = Duration::ZERO;
                    }
                    if nothing_waits >= republish_after {
                        self.republish(silence, view).await;
                        nothing_waits = Duration::ZERO;
                    }
                }
                Ended::Lost => {
                    // The reason is logged.
                    error!(
                        operation = "follow",
                        "outcomes that nobody saw are lost: what has a digest counts as unchanged, and what neither has one nor waits is published again"
                    );
                    events = self.events_again().await?;
                    self.count_stored(view).await;
                }
                ended => return Ok(ended),
            }
        }
    }

    /// What the ledger has of this run. It may be another ledger, or the old one that lost its end.
    async fn events_again(&self) -> Result<Entries, Fault> {
        let since = self.since - CLOCKS_DIFFER;
        self.fleet.broker.events(Position::Since(since)).await
    }

    /// Nothing was heard for so long: looks whether anybody works. `false` where jobs wait, so that
    /// there is nothing to do but to wait with them.
    async fn somebody_works(&self, silence: Duration) -> bool {
        let silence = format_duration(silence);
        let waiting = match self.fleet.broker.waiting().await {
            Ok(waiting) => waiting,
            Err(fault) => {
                warn!(operation = "silence", "no outcome for {silence}: {fault}");
                return false;
            }
        };
        let waits = waiting.ready + waiting.retry;
        if waits == 0 {
            return true;
        }
        let workers = match waiting.workers {
            0 => "no worker is connected: start some".to_owned(),
            workers => format!("{workers} workers are connected"),
        };
        warn!(
            operation = "silence",
            ready = waiting.ready,
            retry = waiting.retry,
            workers = waiting.workers,
            "no outcome for {silence}, {} jobs wait, {workers}",
            thousands(waits)
        );
        false
    }

    /// Nothing waits, and nothing was heard for longer than any job takes: what has no digest was
    /// lost, and is published again.
    async fn republish(&self, silence: Duration, view: &mut RunView) {
        self.count_stored(view).await;
        let open: HashSet<_> = view.open_jobs().cloned().collect();
        if open.is_empty() {
            return;
        }
        warn!(
            operation = "silence",
            open = open.len(),
            "no outcome for {}, and {} jobs neither wait nor have a digest: publishing them again",
            format_duration(silence),
            thousands(open.len() as u64)
        );
        let again = self
            .checked
            .iter()
            .filter(|checked| open.contains(&checked.key()));
        if let Err(fault) = publish(&self.fleet.broker, self.run, again, self.stop).await {
            warn!(operation = "silence", "not published again: {fault}");
        }
    }

    /// Counts open jobs whose digest is in the store: their outcome was lost.
    async fn count_stored(&self, view: &mut RunView) {
        let open: HashSet<_> = view.open_jobs().cloned().collect();
        let looks = self
            .checked
            .iter()
            .filter(|checked| open.contains(&checked.key()))
            .map(async |checked| {
                let job = publish::job(self.run, checked);
                // What cannot be read is not counted, that is all.
                let found = self.store.head(&job.repo).await.ok()?;
                let outcome = settled_by(&job, &found)?;
                let run = self.run.clone();
                Some(OutcomeRecord::without_work(checked.key(), run, outcome, ""))
            });
        let mut looks = stream::iter(looks).buffer_unordered(LOOKS);
        while let Some(record) = looks.next().await {
            if let Some(record) = record {
                view.apply(&LedgerEntry {
                    at: OffsetDateTime::now_utc(),
                    event: Event::Outcome(record),
                });
            }
        }
    }
}
