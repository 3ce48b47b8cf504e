//! How far a run has got, seen from any machine that reaches the store and the broker's ledger.
//!
//! [`observed`] is what is known of a run, [`mod@page`] its page for people.

use std::io;
use std::pin::pin;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::broker::config::BrokerConfig;
use common::broker::{Entries, LedgerEntry, Position, SharedBroker, Waiting};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::{InvalidRunId, RunId};
use common::run::documents::{LatestRun, RunSummary};
use common::shutdown::Shutdown;
use common::store::config::StoreConfig;
use common::store::{Document, DocumentKey, SharedStore};
use common::text::format_duration;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use self::observed::{ObservedRun, RunState, Status, document, of_run};
use self::page::page;
use crate::progress;
use crate::terminal::page::{Screen, text};
use crate::terminal::{self, is_closed, print};

pub mod observed;

pub mod page;

mod workers;

/// How long to wait for the broker: a person waits too.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest wait for the ledger's next entry.
const LEDGER_SILENCE: Duration = Duration::from_secs(30);
/// From one page to the next on a terminal.
const REDRAW: Duration = Duration::from_secs(1);
/// From one page to the next elsewhere.
const REPRINT: Duration = Duration::from_secs(30);
/// From one poll of the queues to the next.
const POLL: Duration = Duration::from_secs(2);
/// Polls of the queues for each poll of the store.
const POLLS_PER_STORE_POLL: u64 = 5;

/// Which run to show, and how.
#[derive(Args, Clone, Debug)]
pub struct StatusConfig {
    /// The run's id, as in its log and the store's folder runs/ [default: the latest run].
    #[arg(value_parser = parse_run)]
    run: Option<RunId>,
    /// Print one JSON object per line; see below for its members.
    #[arg(long)]
    json: bool,
    /// Follow until the run closes: a page redrawn every second on a terminal, elsewhere (and with
    /// --json) one every 30 s. Of a run in one process: one every 10 s.
    #[arg(long)]
    watch: bool,
    /// Show what each worker has in hand, and for how long, instead of a run.
    #[arg(long, conflicts_with_all = ["run", "watch"])]
    workers: bool,
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    broker: BrokerConfig,
}

pub(crate) fn parse_run(text: &str) -> Result<RunId, InvalidRunId> {
    RunId::try_from(text.to_owned())
}

impl StatusConfig {
    /// Shows the run; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if there is no such run, or a broker is needed and not named;
    /// [`exit::UNAVAILABLE`] if store or broker cannot be reached and nothing else can tell.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        tokio::select! {
            shown = self.show() => unless_closed(shown),
            () = shutdown.soft.cancelled() => Ok(unanswered(shutdown)),
        }
    }

    async fn show(&self) -> Result<u8> {
        if self.workers {
            let Some(broker) = self.broker.connect(PATIENCE).await? else {
                let why = "workers are asked through the broker: set BROKER_URL or --broker-url";
                return Err(ExitError::new(exit::USAGE, why).into());
            };
            let shown = workers::show(&broker, self.json).await;
            broker.close().await;
            shown?;
            return Ok(exit::OK);
        }
        let store = self.store.open()?;
        let observed = self.observed(&store).await?;
        let broker = match self.broker.connect(PATIENCE).await {
            Ok(broker) => broker,
            Err(why) => {
                self.without_broker(&observed, why)?;
                return Ok(exit::OK);
            }
        };
        let Some(broker) = broker else {
            let run = observed.view.run().clone();
            if observed.manifest.is_none() {
                return Err(no_run(&store, &run).into());
            }
            if observed.summary.is_none() && self.in_one_process(&store, &observed).await? {
                return Ok(exit::OK);
            }
            let why = ExitError::new(
                exit::USAGE,
                format!(
                    "run {run} has not closed, and how far it has got is in the broker's ledger: set BROKER_URL or --broker-url; a run in one process first stores its progress after 10 s: try again"
                ),
            );
            self.without_broker(&observed, why)?;
            return Ok(exit::OK);
        };
        let shown = match self.watch && observed.closed().is_none() {
            true => self.watch(&store, &broker, observed).await,
            false => self.once(&store, &broker, observed).await,
        };
        broker.close().await;
        shown?;
        Ok(exit::OK)
    }

    async fn observed(&self, store: &SharedStore) -> Result<ObservedRun, ExitError> {
        let run = match &self.run {
            Some(run) => run.clone(),
            None => latest(store).await?,
        };
        ObservedRun::read(store, &run).await
    }

    /// Shows what a run in one process stores of its progress, with `--watch` until it ends. Returns
    /// `false` if it stored nothing.
    async fn in_one_process(&self, store: &SharedStore, observed: &ObservedRun) -> Result<bool> {
        let run = observed.view.run();
        let (mut screen, mut last) = (None, None::<Status>);
        loop {
            let stored = async {
                if let Some(summary) = of_run(store, run, Document::Summary).await? {
                    return Ok(Some(observed.of_summary(&summary)));
                }
                let progress = of_run(store, run, Document::Progress).await?;
                let now = OffsetDateTime::now_utc();
                Ok::<_, ExitError>(progress.map(|progress| observed.of_progress(progress, now)))
            };
            let status = match (stored.await, &last) {
                (Ok(Some(status)), _) => status,
                (Ok(None), _) => return Ok(false),
                // A store that is away for a while does not end a watch.
                (Err(why), Some(last)) => Status {
                    notes: vec![why.to_string()],
                    ..last.clone()
                },
                (Err(why), None) => return Err(why.into()),
            };
            let goes_on = self.watch && status.state == RunState::Running;
            if goes_on && screen.is_none() {
                screen = self.screen()?;
            }
            self.draw(&mut screen, &status)?;
            if !goes_on {
                return Ok(true);
            }
            last = Some(status);
            tokio::time::sleep(progress::EVERY).await;
        }
    }

    fn screen(&self) -> io::Result<Option<Screen>> {
        match terminal::size() {
            Some(_) if self.watch && !self.json => Screen::open().map(Some),
            _ => Ok(None),
        }
    }

    fn draw(&self, screen: &mut Option<Screen>, status: &Status) -> io::Result<()> {
        match (screen, terminal::size()) {
            (Some(screen), Some((columns, rows))) => screen.draw(page(status, columns), rows),
            _ => self.print(status),
        }
    }

    /// Shows the summary, or fails with `why` the ledger cannot be read.
    fn without_broker(&self, observed: &ObservedRun, why: ExitError) -> Result<()> {
        let closed = observed.closed().is_some();
        // A watcher of an open run would never see it go on.
        let enough = closed || !self.watch;
        let Some(summary) = observed.summary.as_ref().filter(|_| enough) else {
            return Err(why.into());
        };
        let mut status = observed.of_summary(summary);
        match (closed, self.broker.broker_url.is_none()) {
            // Nothing is missing.
            (true, true) => {}
            (true, false) => status.notes.push(format!("nothing is known of the queues: {why}")),
            (false, true) => status.notes.push(
                "this is what the producer saw last; with BROKER_URL set, what came after it is shown too".to_owned(),
            ),
            (false, false) => status.notes.push(format!(
                "this is what the producer saw last; what came after it is not known: {why}"
            )),
        }
        self.print(&status)?;
        Ok(())
    }

    async fn once(
        &self,
        store: &SharedStore,
        broker: &SharedBroker,
        observed: ObservedRun,
    ) -> Result<()> {
        let mut status = match observed.closed() {
            Some(summary) => observed.of_summary(summary),
            None => from_ledger(store, broker, observed).await?,
        };
        match broker.waiting().await {
            Ok(waiting) => status.set_waiting(waiting),
            Err(fault) => status
                .notes
                .push(format!("nothing is known of the queues: {fault}")),
        }
        self.print(&status)?;
        Ok(())
    }

    async fn watch(
        &self,
        store: &SharedStore,
        broker: &SharedBroker,
        observed: ObservedRun,
    ) -> Result<()> {
        let mut watching = Watching {
            view: self,
            screen: self.screen()?,
            polled: poll(store, broker, observed.view.run()),
            observed,
            note: Some("reading the ledger …".to_owned()),
        };
        watching.follow(store, broker).await
    }

    fn print(&self, status: &Status) -> io::Result<()> {
        let text = match self.json {
            true => serde_json::to_string(status)? + "\n",
            false => text(&page(status, terminal::width())),
        };
        print(&text)
    }
}

/// Makes it a success if the reader of a pipe has seen enough.
pub(crate) fn unless_closed(ended: Result<u8>) -> Result<u8> {
    match ended {
        Err(error) if error.downcast_ref().is_some_and(is_closed) => Ok(exit::OK),
        ended => ended,
    }
}

/// The exit code after a signal before there was an answer; never 0, so that callers don't mistake
/// silence for an answer.
pub(crate) fn unanswered(shutdown: &Shutdown) -> u8 {
    match shutdown.code() {
        exit::OK => exit::TERMINATED,
        code => code,
    }
}

async fn from_ledger(
    store: &SharedStore,
    broker: &SharedBroker,
    mut observed: ObservedRun,
) -> Result<Status> {
    let read = read(broker, &mut observed).await;
    if !observed.exists() {
        return Err(match read {
            Ok(()) => no_run(store, observed.view.run()),
            Err(fault) => ExitError::new(exit::UNAVAILABLE, fault),
        }
        .into());
    }
    if let Some(summary) = observed.better_summary() {
        let mut status = observed.of_summary(summary);
        status.notes.push(match read {
            Ok(()) => format!("{TOO_SHORT} this is the summary"),
            Err(fault) => {
                format!("this is the run's summary, since the ledger cannot be read: {fault}")
            }
        });
        return Ok(status);
    }
    let mut status = observed.status(OffsetDateTime::now_utc());
    if let Err(fault) = read {
        status
            .notes
            .push(format!("there may be more outcomes than these: {fault}"));
    }
    Ok(status)
}

async fn read(broker: &SharedBroker, observed: &mut ObservedRun) -> Result<(), Fault> {
    let from = observed.position(OffsetDateTime::now_utc());
    let mut history = pin!(history(broker, from).await?);
    while let Some(entry) = history.next().await {
        observed.view.apply(&entry?);
    }
    observed.view.set_caught_up();
    Ok(())
}

/// Begins the note about a ledger that does not reach back far enough.
const TOO_SHORT: &str =
    "the ledger knows less than the run's summary, since it was emptied or has grown too long;";

/// The state of `--watch`.
#[derive(Debug)]
struct Watching<'a> {
    view: &'a StatusConfig,
    /// `None` if pages are printed one after the other.
    screen: Option<Screen>,
    polled: watch::Receiver<Polled>,
    observed: ObservedRun,
    /// What is wrong with the ledger, or in progress.
    note: Option<String>,
}

/// What was polled beside the ledger.
#[derive(Clone, Debug, Default)]
struct Polled {
    waiting: Option<Waiting>,
    summary: Option<RunSummary>,
    note: Option<String>,
}

/// What [`following`] gives.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "each lives for one loop, on the stack"
)]
pub(crate) enum Followed {
    Entry(LedgerEntry),
    /// Everything was read that was there at first.
    CaughtUp,
}

impl Watching<'_> {
    async fn follow(&mut self, store: &SharedStore, broker: &SharedBroker) -> Result<()> {
        let mut ticks = tokio::time::interval(match self.screen {
            Some(_) => REDRAW,
            None => REPRINT,
        });
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut from = self.observed.position(OffsetDateTime::now_utc());
        loop {
            let mut entries = pin!(following(broker, from));
            loop {
                tokio::select! {
                    read = entries.next() => match read {
                        Some(Ok(Followed::Entry(entry))) => {
                            self.observed.view.apply(&entry);
                        }
                        Some(Ok(Followed::CaughtUp)) => {
                            self.observed.view.set_caught_up();
                            self.note = None;
                            self.known_at_all(store)?;
                            // The first page is a complete one.
                            if self.polled.borrow().waiting.is_none() {
                                _ = tokio::time::timeout(POLL, self.polled.changed()).await;
                                self.take_summary();
                            }
                            self.show()?;
                        }
                        Some(Err(fault)) => {
                            self.note = Some(fault.to_string());
                            break;
                        }
                        None => break,
                    },
                    _ = ticks.tick() => self.show()?,
                    changed = self.polled.changed() => {
                        changed?;
                        self.take_summary();
                    }
                }
                if self.has_ended() {
                    return self.show();
                }
            }
            // A lost ledger begins anew: all of it is recent.
            from = Position::Start;
            self.show()?;
            tokio::time::sleep(POLL).await;
        }
    }

    /// Fails if neither store nor ledger know the run.
    fn known_at_all(&self, store: &SharedStore) -> Result<()> {
        if !self.observed.exists() {
            return Err(no_run(store, self.observed.view.run()).into());
        }
        Ok(())
    }

    /// Takes over the summary that was polled last. Not with each entry: both may be long.
    fn take_summary(&mut self) {
        if let Some(summary) = &self.polled.borrow().summary {
            self.observed.summary = Some(summary.clone());
        }
    }

    /// Whether there is nothing more to see.
    fn has_ended(&self) -> bool {
        self.observed.closed().is_some() || self.observed.view.closes()
    }

    fn show(&mut self) -> Result<()> {
        let observed = &self.observed;
        let mut status = match observed.closed() {
            Some(summary) => observed.of_summary(summary),
            None => {
                let mut status = observed.status(OffsetDateTime::now_utc());
                if self.note.is_none() && observed.better_summary().is_some() {
                    status.notes.push(format!(
                        "{TOO_SHORT} `producer status` without --watch shows the summary"
                    ));
                }
                status
            }
        };
        let polled = self.polled.borrow().clone();
        if let Some(waiting) = polled.waiting {
            status.set_waiting(waiting);
        }
        status
            .notes
            .extend(self.note.clone().into_iter().chain(polled.note));
        self.view.draw(&mut self.screen, &status)?;
        Ok(())
    }
}

/// Reads the ledger from `from` to where it ends now. Gives up after [`LEDGER_SILENCE`] without an
/// entry.
///
/// # Errors
/// If it cannot be read.
pub(crate) async fn history(
    broker: &SharedBroker,
    from: Position,
) -> Result<impl Stream<Item = Result<LedgerEntry, Fault>> + Send + use<>, Fault> {
    Ok(bounded(answered(broker.history(from)).await?))
}

fn bounded(entries: Entries) -> impl Stream<Item = Result<LedgerEntry, Fault>> + Send {
    stream::unfold(Some(entries), async |entries| {
        let mut entries = entries?;
        match answered(async { Ok(entries.next().await) }).await {
            Ok(None) => None,
            Ok(Some(entry)) => Some((entry, Some(entries))),
            Err(fault) => Some((Err(fault), None)),
        }
    })
}

async fn answered<T>(asked: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let answer = tokio::time::timeout(LEDGER_SILENCE, asked).await;
    answer.unwrap_or_else(|_| {
        let silence = format_duration(LEDGER_SILENCE);
        Err(Fault::infra(format!(
            "the ledger gave no answer for {silence}"
        )))
    })
}

/// Reads the ledger from `from` to where it ends now, says so, and follows it.
pub(crate) fn following(
    broker: &SharedBroker,
    from: Position,
) -> impl Stream<Item = Result<Followed, Fault>> + use<> {
    let broker = SharedBroker::clone(broker);
    let attached = async move {
        // In this order nothing is missed between the two; entries that come twice do no harm.
        let after = answered(broker.events(Position::Now)).await?;
        let before = history(&broker, from).await?;
        let entries = before
            .map(|entry| entry.map(Followed::Entry))
            .chain(stream::iter([Ok(Followed::CaughtUp)]))
            .chain(after.map(|entry| entry.map(Followed::Entry)));
        Ok::<BoxStream<'static, _>, Fault>(entries.boxed())
    };
    stream::once(attached).flat_map(|attached| match attached {
        Ok(entries) => entries,
        Err(fault) => stream::iter([Err(fault)]).boxed(),
    })
}

/// Polls queues and store in the background, so that no page waits for them. Ends with its receiver.
fn poll(store: &SharedStore, broker: &SharedBroker, run: &RunId) -> watch::Receiver<Polled> {
    let (sender, receiver) = watch::channel(Polled::default());
    let (store, broker) = (SharedStore::clone(store), SharedBroker::clone(broker));
    let run = run.clone();
    tokio::spawn(async move {
        let polling = async {
            for n in 0u64.. {
                let mut polled = sender.borrow().clone();
                polled.note = None;
                match broker.waiting().await {
                    Ok(waiting) => polled.waiting = Some(waiting),
                    Err(fault) => {
                        polled.waiting = None;
                        polled.note = Some(format!("nothing is known of the queues: {fault}"));
                    }
                }
                if n.is_multiple_of(POLLS_PER_STORE_POLL) {
                    // Without the store there still is the ledger.
                    let summary = of_run(&store, &run, Document::Summary).await;
                    polled.summary = summary.ok().flatten();
                }
                sender.send_replace(polled);
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::select! {
            () = polling => {}
            () = sender.closed() => {}
        }
    });
    receiver
}

/// The run begun last.
pub(crate) async fn latest(store: &SharedStore) -> Result<RunId, ExitError> {
    let latest = document::<LatestRun>(store, &DocumentKey::Latest).await?;
    latest
        .map(|latest| latest.run)
        .ok_or_else(|| no_run_yet(store))
}

pub(crate) fn no_run(store: &SharedStore, run: &RunId) -> ExitError {
    let location = store.location();
    ExitError::new(
        exit::USAGE,
        format!(
            "there is no run {run}: the runs of this store are the folders of {location}/runs/, and `producer status` shows the one begun last"
        ),
    )
}

fn no_run_yet(store: &SharedStore) -> ExitError {
    let location = store.location();
    ExitError::new(
        exit::USAGE,
        format!(
            "{location} has seen no run yet; is this the --store (STORE_URL) that `producer run` was given?"
        ),
    )
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// Such as from a broker that never delivers the end of its ledger.
    #[tokio::test(start_paused = true)]
    async fn a_ledger_that_gives_nothing_ends_with_a_sentence() {
        let mut entries = pin!(bounded(stream::pending().boxed()));
        let fault = entries.next().await.unwrap().unwrap_err();
        assert_eq!(fault.to_string(), "the ledger gave no answer for 30s");
        assert!(entries.next().now_or_never().unwrap().is_none());
    }
}
