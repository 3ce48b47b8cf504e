//! `producer cancel`: ends a run whose jobs still wait.
//!
//! A waiting job is taken on loan, so that no worker has it; its outcome is recorded, and then it is
//! acknowledged. Jobs of other runs go back as they were. What workers have in hand they finish.

use std::collections::HashSet;
use std::pin::pin;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use common::broker::config::BrokerConfig;
use common::broker::{Delivery, Event, LedgerEntry, Position, Settlement, SharedBroker};
use common::exit::{self, ExitError};
use common::failpoint;
use common::fault::Fault;
use common::ids::{InvalidRunId, JobKey, RunId};
use common::outcome::{Outcome, OutcomeRecord};
use common::run::documents::RunSummary;
use common::run::view::RunView;
use common::shutdown::Shutdown;
use common::store::config::StoreConfig;
use common::store::{Document, SharedStore};
use common::text::{counted, thousands};
use futures::{StreamExt, TryStreamExt, stream};
use serde::de::IgnoredAny;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::roll_call::{in_hand, roll_call};
use crate::status::observed::{ObservedRun, of_run};
use crate::status::{history, latest, no_run, unanswered, unless_closed};
use crate::terminal::print;

/// How long to wait for the broker: a person waits too.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many jobs are settled at a time.
const WIDTH: usize = 64;
/// From one look at the queues to the next.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a producer may take to publish the next of its jobs.
const PUBLISHES_WITHIN: Duration = Duration::from_secs(30);
/// Of a cancelled job, for a person.
const WHY: &str = "its run was cancelled";

/// Which run to cancel.
#[derive(Args, Clone, Debug)]
pub struct CancelConfig {
    /// The run's id, as in its log and the store's folder runs/, or `latest`.
    run: NamedRun,
    /// Print how many jobs would be cancelled, without doing it.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    broker: BrokerConfig,
}

#[derive(Clone, Debug)]
enum NamedRun {
    Latest,
    Id(RunId),
}

impl FromStr for NamedRun {
    type Err = InvalidRunId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "latest" => Ok(Self::Latest),
            id => RunId::try_from(id.to_owned()).map(Self::Id),
        }
    }
}

impl CancelConfig {
    /// Cancels the run; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if the run does not exist, or no broker is given; [`exit::UNAVAILABLE`] if store
    /// or broker cannot be reached.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        let opened = tokio::select! {
            opened = self.open() => opened?,
            () = shutdown.soft.cancelled() => return Ok(unanswered(shutdown)),
        };
        let Some(mut cancelling) = opened else {
            return Ok(exit::OK);
        };
        let stop = &shutdown.soft;
        let done = match self.dry_run {
            true => match stop.run_until_cancelled(cancelling.count()).await {
                Some(counted) => counted,
                None => return Ok(unanswered(shutdown)),
            },
            false => cancelling.cancel(stop).await,
        };
        cancelling.broker.close().await;
        let said = done.and_then(|(sentence, ended)| {
            print(&(sentence + "\n"))?;
            Ok(match ended {
                Ended::Done => exit::OK,
                Ended::Stopped => unanswered(shutdown),
            })
        });
        unless_closed(said)
    }

    /// Finds run and broker; `None` if the run has closed, which is said.
    async fn open(&self) -> Result<Option<Cancelling>> {
        let store = self.store.open()?;
        let run = match &self.run {
            NamedRun::Latest => latest(&store).await?,
            NamedRun::Id(run) => run.clone(),
        };
        let observed = ObservedRun::read(&store, &run).await?;
        let cancelled = observed.closed().map(RunSummary::cancelled);
        // Where jobs were cancelled, one that had its outcome may not have been acknowledged.
        if let Some(count) = cancelled
            && (count == 0 || self.broker.broker_url.is_none())
        {
            print(&(closed(&run, count) + "\n"))?;
            return Ok(None);
        }
        // Only a run in one process stores its progress.
        let progress = of_run::<IgnoredAny>(&store, &run, Document::Progress).await?;
        if progress.is_some() {
            let why = format!(
                "run {run} is one without a broker: it is stopped where it runs, by Ctrl-C or SIGTERM"
            );
            return Err(ExitError::new(exit::USAGE, why).into());
        }
        let Some(broker) = self.broker.connect(PATIENCE).await? else {
            if observed.manifest.is_none() {
                return Err(no_run(&store, &run).into());
            }
            let why = "the jobs of a run wait with its broker: set BROKER_URL or --broker-url; a run without a broker is stopped where it runs, by Ctrl-C or SIGTERM";
            return Err(ExitError::new(exit::USAGE, why).into());
        };
        let from = observed.position(OffsetDateTime::now_utc());
        Ok(Some(Cancelling {
            store,
            broker,
            observed,
            from,
            cancelled: 0,
        }))
    }
}

/// A run that is being cancelled.
#[derive(Debug)]
struct Cancelling {
    store: SharedStore,
    broker: SharedBroker,
    observed: ObservedRun,
    /// Where to read on in the ledger.
    from: Position,
    /// Outcomes recorded by this process.
    cancelled: u64,
}

/// Where the open jobs of the run are.
#[derive(Debug, Default)]
struct Whereabouts {
    /// In workers' hands.
    held: u64,
    /// Perhaps in workers' hands: not all of them answered.
    unknown: u64,
    /// Published, and not in workers' hands.
    elsewhere: HashSet<JobKey>,
    /// Not in the ledger, so not published yet.
    unpublished: HashSet<JobKey>,
}

impl Whereabouts {
    /// Says how many jobs are not cancelled since somebody works on them.
    fn left(&self) -> String {
        let mut left = match self.held {
            0 => String::new(),
            1 => ", 1 left to the worker that has it in hand".to_owned(),
            held => format!(
                ", {} left to the workers that have them in hand",
                thousands(held)
            ),
        };
        if self.unknown > 0 {
            left += &format!(
                ", {} left that may be in hand: not every worker answers",
                thousands(self.unknown)
            );
        }
        left
    }
}

/// Why nothing more is done.
#[derive(Clone, Copy, Debug)]
enum Ended {
    Done,
    /// By a signal.
    Stopped,
}

/// What to do with a job on loan.
#[derive(Debug)]
enum Act {
    /// It is another run's.
    PutBack,
    /// It has its outcome.
    Acknowledge,
    Cancel(Box<Event>),
}

impl Cancelling {
    fn view(&self) -> &RunView {
        &self.observed.view
    }

    /// Reads the ledger as far as it goes.
    async fn read(&mut self) -> Result<(), ExitError> {
        let now = OffsetDateTime::now_utc();
        let mut entries = pin!(history(&self.broker, self.from).await?);
        while let Some(entry) = entries.next().await {
            self.observed.view.apply(&entry?);
        }
        self.observed.view.set_caught_up();
        self.from = Position::Since(now);
        match self.observed.exists() {
            true => Ok(()),
            false => Err(no_run(&self.store, self.view().run())),
        }
    }

    /// Says what would be cancelled.
    async fn count(&mut self) -> Result<(String, Ended)> {
        self.read().await?;
        if !self.is_on_this_broker() {
            return Err(self.not_on_this_broker().into());
        }
        let there = self.whereabouts().await?;
        let waits = (there.elsewhere.len() + there.unpublished.len()) as u64;
        let run = self.view().run();
        let jobs = counted(waits, "job", "jobs");
        let left = there.left();
        let sentence = format!("{jobs} of run {run} would be cancelled{left}");
        Ok((sentence, Ended::Done))
    }

    /// Cancels what waits, until nothing does; says what was done.
    async fn cancel(&mut self, stop: &CancellationToken) -> Result<(String, Ended)> {
        match stop.run_until_cancelled(self.read()).await {
            Some(read) => read?,
            None => return Ok(self.stopped()),
        }
        let has_closed = self.observed.closed().is_some() || self.view().closes();
        let (mut before, mut changed) = (Whereabouts::default(), Instant::now());
        loop {
            // Until it is sure that the run is this broker's, the jobs of others are left alone.
            if self.is_on_this_broker() {
                self.sweep(stop).await?;
            }
            if stop.is_cancelled() {
                return Ok(self.stopped());
            }
            if has_closed {
                let summary = self.view().summary(OffsetDateTime::now_utc());
                let sentence = closed(&summary.run_id, summary.cancelled());
                return Ok((sentence, Ended::Done));
            }
            self.read().await?;
            let mut there = self.whereabouts().await?;
            if there.unpublished != before.unpublished {
                changed = Instant::now();
            }
            // One look may come while a job is on its way.
            let mut nowhere = &there.elsewhere & &before.elsewhere;
            // One that wrote its summary publishes no more.
            let has_ended = self.observed.summary.is_some();
            if has_ended || changed.elapsed() >= PUBLISHES_WITHIN {
                if !self.is_on_this_broker() {
                    return Err(self.not_on_this_broker().into());
                }
                nowhere.extend(there.unpublished.drain());
            }
            self.record(&nowhere).await?;
            there.elsewhere = &there.elsewhere - &nowhere;
            let open = (there.elsewhere.len() + there.unpublished.len()) as u64;
            if open == 0 {
                return Ok((self.done() + &there.left(), Ended::Done));
            }
            info!(
                operation = "cancel",
                "{}; {} not found yet, so looking again",
                self.so_far(),
                counted(open, "job is", "jobs are")
            );
            before = there;
            _ = tokio::time::timeout(LOOK_EVERY, stop.cancelled()).await;
        }
    }

    fn done(&self) -> String {
        match self.cancelled {
            0 => format!("no job of run {} waits", self.view().run()),
            _ => self.so_far(),
        }
    }

    fn stopped(&self) -> (String, Ended) {
        let sentence = format!("{}, stopped before the end", self.so_far());
        (sentence, Ended::Stopped)
    }

    fn so_far(&self) -> String {
        let jobs = counted(self.cancelled, "job", "jobs");
        format!("{jobs} of run {} cancelled", self.view().run())
    }

    /// Whether the ledger holds any job of the run.
    fn is_on_this_broker(&self) -> bool {
        let view = self.view();
        view.is_known() || view.open_jobs().any(|key| view.is_queued(key))
    }

    fn not_on_this_broker(&self) -> ExitError {
        let run = self.view().run();
        ExitError::new(
            exit::USAGE,
            format!(
                "this broker knows no job of run {run}: look at BROKER_URL and --queue-prefix; a run without a broker is stopped where it runs, by Ctrl-C or SIGTERM"
            ),
        )
    }

    /// Goes through all that waits once.
    async fn sweep(&mut self, stop: &CancellationToken) -> Result<(), Fault> {
        let taken = self.broker.take_waiting(stop.clone()).await?;
        let (broker, view) = (&self.broker, &mut self.observed.view);
        let settled = taken.map(|taken| {
            // Decided at once: another copy of the same job may come next.
            let taken = taken.map(|delivery| (decide(view, &delivery), delivery));
            async move {
                let (act, delivery) = taken?;
                settle(broker, act, delivery).await
            }
        });
        let mut settled = settled.buffer_unordered(WIDTH);
        while let Some(cancelled) = settled.try_next().await? {
            self.cancelled += u64::from(cancelled);
        }
        Ok(())
    }

    /// Records the outcome of jobs of which there is no message, or only another run's.
    async fn record(&mut self, jobs: &HashSet<JobKey>) -> Result<(), Fault> {
        let (broker, view) = (&self.broker, &mut self.observed.view);
        let recorded = stream::iter(jobs).map(|key| {
            let event = cancel(view, key);
            async move { broker.record(&event).await }
        });
        let mut recorded = recorded.buffer_unordered(WIDTH);
        while recorded.try_next().await?.is_some() {
            self.cancelled += 1;
        }
        Ok(())
    }

    /// Asks the workers.
    async fn whereabouts(&self) -> Result<Whereabouts, Fault> {
        let (view, mut there) = (self.view(), Whereabouts::default());
        if view.closes() {
            return Ok(there);
        }
        let workers = self.broker.waiting().await?.workers;
        let answers = roll_call(&self.broker, workers).await?;
        let all_answered = answers.len() as u64 >= workers;
        let held = in_hand(&answers);
        for key in view.open_jobs() {
            let mut runs = view.adopted_from(key).iter().chain([view.run()]);
            if runs.any(|run| held.contains(&(run.clone(), key.clone()))) {
                there.held += 1;
            } else if !view.is_queued(key) {
                there.unpublished.insert(key.clone());
            } else if all_answered {
                there.elsewhere.insert(key.clone());
            } else {
                there.unknown += 1;
            }
        }
        Ok(there)
    }
}

fn closed(run: &RunId, cancelled: u64) -> String {
    let cancelled = match cancelled {
        0 => String::new(),
        count => format!(", {} cancelled", counted(count, "job", "jobs")),
    };
    format!("run {run} has closed{cancelled}: nothing waits")
}

fn decide(view: &mut RunView, delivery: &Delivery) -> Act {
    let key = delivery.job.key();
    match view.settled(&key) {
        _ if delivery.job.run != *view.run() => Act::PutBack,
        Some(_) => Act::Acknowledge,
        None => Act::Cancel(Box::new(cancel(view, &key))),
    }
}

/// Notes that a job is cancelled; returns what to record.
fn cancel(view: &mut RunView, key: &JobKey) -> Event {
    let run = view.run().clone();
    let record = OutcomeRecord::without_work(key.clone(), run, Outcome::CANCELLED, WHY);
    let entry = LedgerEntry {
        at: OffsetDateTime::now_utc(),
        event: Event::Outcome(record),
    };
    view.apply(&entry);
    entry.event
}

/// Returns whether the job was cancelled by this.
async fn settle(broker: &SharedBroker, act: Act, delivery: Delivery) -> Result<bool, Fault> {
    match act {
        Act::PutBack => delivery.settle(Settlement::Back).await?,
        Act::Acknowledge => delivery.settle(Settlement::Done).await?,
        Act::Cancel(event) => {
            broker.record(&event).await?;
            failpoint::hit("after-cancel");
            delivery.settle(Settlement::Done).await?;
            return Ok(true);
        }
    }
    Ok(false)
}
