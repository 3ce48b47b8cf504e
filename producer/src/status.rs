//! How far a run has got, seen from any machine that reaches the store and the broker's ledger.
//!
//! [`observed`] reads, [`mod@page`] shows it to people, [`screen`] again and again.

use std::io::{self, Write};
use std::pin::pin;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::broker::{BrokerConfig, LedgerEntry, Position, SharedBroker, Waiting};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::{InvalidRunId, RunId};
use common::run::documents::{LatestRun, RunSummary};
use common::shutdown::Shutdown;
use common::store::{Document, DocumentKey, SharedStore, StoreConfig};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use self::observed::{ObservedRun, Status};
use self::page::page;
use self::screen::Screen;

pub mod observed;

pub mod page;

pub mod screen;

/// How long to wait for a broker that is away: a person waits too.
const PATIENCE: Duration = Duration::from_secs(10);
/// From one picture on a terminal to the next.
const REDRAW: Duration = Duration::from_secs(1);
/// From one page to the next elsewhere.
const REPRINT: Duration = Duration::from_secs(30);
/// From one look at the queues to the next.
const LOOK: Duration = Duration::from_secs(2);
/// Looks at the queues for one look into the store.
const LOOKS_FOR_ONE_AT_THE_STORE: u64 = 5;

/// Which run to show, and how.
#[derive(Args, Clone, Debug)]
pub struct StatusConfig {
    /// The run's id, as its log and the store's folder runs/ name it [default: the run begun last].
    #[arg(value_parser = parse_run)]
    run: Option<RunId>,
    /// Print one JSON object a line; see below for its members.
    #[arg(long)]
    json: bool,
    /// Go on until the run closes: on a terminal a page that is drawn every second, elsewhere (and
    /// with --json) one every 30 s.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    broker: BrokerConfig,
}

pub(crate) fn parse_run(text: &str) -> Result<RunId, InvalidRunId> {
    RunId::try_from(text.to_owned())
}

impl StatusConfig {
    /// Shows the run, and gives the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] where there is no such run, or a broker is needed and not named;
    /// [`exit::UNAVAILABLE`] where store or broker cannot be reached and nothing else can tell.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        tokio::select! {
            shown = self.show() => unless_closed(shown),
            () = shutdown.soft.cancelled() => Ok(unanswered(shutdown)),
        }
    }

    async fn show(&self) -> Result<u8> {
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
            let run = observed.view.run();
            let why = ExitError::new(
                exit::USAGE,
                format!(
                    "run {run} has not closed, and how far it has got is in the broker's ledger: set BROKER_URL or --broker-url (a run without a broker shows its progress itself)"
                ),
            );
            if observed.manifest.is_none() {
                return Err(no_run(&store, run).into());
            }
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
            None => match document::<LatestRun>(store, &DocumentKey::Latest).await? {
                Some(latest) => latest.run,
                None => return Err(no_run_yet(store)),
            },
        };
        ObservedRun::read(store, &run).await
    }

    /// What the summary says, or `why` there is nothing else to say.
    fn without_broker(&self, observed: &ObservedRun, why: ExitError) -> Result<()> {
        let closed = observed.closed().is_some();
        // What watches a run that goes on would never see that.
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
        let screen = match screen::size() {
            Some(_) if !self.json => Some(Screen::open()?),
            _ => None,
        };
        let mut watching = Watching {
            view: self,
            screen,
            looks: look_again_and_again(store, broker, observed.view.run()),
            observed,
            note: Some("reading the ledger …".to_owned()),
        };
        watching.follow(store, broker).await
    }

    fn print(&self, status: &Status) -> io::Result<()> {
        let text = match self.json {
            true => serde_json::to_string(status)? + "\n",
            false => page::text(&page(status, screen::width())),
        };
        print(&text)
    }
}

/// Writes to standard output.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Whoever reads an answer by a pipe may have seen enough: nothing is wrong then.
pub(crate) fn unless_closed(ended: Result<u8>) -> Result<u8> {
    let closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    match ended {
        Err(error) if error.downcast_ref().is_some_and(closed) => Ok(exit::OK),
        ended => ended,
    }
}

/// The exit code where a signal came before there was an answer: nobody is to take that for one.
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
    let mut history = broker.history(from).await?;
    while let Some(entry) = history.next().await {
        observed.view.apply(&entry?);
    }
    observed.view.set_caught_up();
    Ok(())
}

/// Of a ledger that does not reach back far enough.
const TOO_SHORT: &str =
    "the ledger knows less than the run's summary, since it was emptied or has grown too long;";

/// A run that is watched.
#[derive(Debug)]
struct Watching<'a> {
    view: &'a StatusConfig,
    /// `None` where lines are printed one after the other.
    screen: Option<Screen>,
    looks: watch::Receiver<Looks>,
    observed: ObservedRun,
    /// What is wrong with the ledger, or being done about it.
    note: Option<String>,
}

/// What is seen beside the ledger.
#[derive(Clone, Debug, Default)]
struct Looks {
    waiting: Option<Waiting>,
    summary: Option<RunSummary>,
    note: Option<String>,
}

/// What comes from the ledger.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "each lives for one loop, on the stack"
)]
pub(crate) enum Read {
    Entry(LedgerEntry),
    /// What was there at first is read.
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
                        Some(Ok(Read::Entry(entry))) => {
                            self.observed.view.apply(&entry);
                        }
                        Some(Ok(Read::CaughtUp)) => {
                            self.observed.view.set_caught_up();
                            self.note = None;
                            self.known_at_all(store)?;
                            // The first page is to be a whole one.
                            if self.looks.borrow().waiting.is_none() {
                                _ = tokio::time::timeout(LOOK, self.looks.changed()).await;
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
                    changed = self.looks.changed() => {
                        changed?;
                        self.take_summary();
                    }
                }
                if self.has_ended() {
                    return self.show();
                }
            }
            // A ledger that was lost is made anew, and has nothing in it that is not to the point.
            from = Position::Start;
            self.show()?;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A run that neither store nor ledger knows is not waited for.
    fn known_at_all(&self, store: &SharedStore) -> Result<()> {
        if !self.observed.exists() {
            return Err(no_run(store, self.observed.view.run()).into());
        }
        Ok(())
    }

    /// Takes over what the last look into the store has found. Not with each entry: it may be long,
    /// and so may the ledger.
    fn take_summary(&mut self) {
        if let Some(summary) = &self.looks.borrow().summary {
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
        let looks = self.looks.borrow().clone();
        if let Some(waiting) = looks.waiting {
            status.set_waiting(waiting);
        }
        status
            .notes
            .extend(self.note.clone().into_iter().chain(looks.note));
        match (&mut self.screen, screen::size()) {
            (Some(screen), Some((columns, rows))) => screen.draw(page(&status, columns), rows)?,
            _ => self.view.print(&status)?,
        }
        Ok(())
    }
}

/// The ledger from `from` on, with a sign where that is read which is there now.
pub(crate) fn following(
    broker: &SharedBroker,
    from: Position,
) -> impl Stream<Item = Result<Read, Fault>> + use<> {
    let broker = SharedBroker::clone(broker);
    let attached = async move {
        // In this order, so that nothing comes between the two; what comes twice does no harm.
        let after = broker.events(Position::Now).await?;
        let before = broker.history(from).await?;
        let entries = before
            .map(|entry| entry.map(Read::Entry))
            .chain(stream::iter([Ok(Read::CaughtUp)]))
            .chain(after.map(|entry| entry.map(Read::Entry)));
        Ok::<BoxStream<'static, _>, Fault>(entries.boxed())
    };
    stream::once(attached).flat_map(|attached| match attached {
        Ok(entries) => entries,
        Err(fault) => stream::iter([Err(fault)]).boxed(),
    })
}

/// Looks at queues and store in the background, so that no page waits for them. Ends when nobody
/// looks at what it sees.
fn look_again_and_again(
    store: &SharedStore,
    broker: &SharedBroker,
    run: &RunId,
) -> watch::Receiver<Looks> {
    let (sender, receiver) = watch::channel(Looks::default());
    let (store, broker) = (SharedStore::clone(store), SharedBroker::clone(broker));
    let run = run.clone();
    tokio::spawn(async move {
        let looking = async {
            for n in 0u64.. {
                let mut looks = sender.borrow().clone();
                looks.note = None;
                match broker.waiting().await {
                    Ok(waiting) => looks.waiting = Some(waiting),
                    Err(fault) => {
                        looks.waiting = None;
                        looks.note = Some(format!("nothing is known of the queues: {fault}"));
                    }
                }
                if n.is_multiple_of(LOOKS_FOR_ONE_AT_THE_STORE) {
                    // A store that is away does not hide what the ledger says.
                    let summary = of_run(&store, &run, Document::Summary).await;
                    looks.summary = summary.ok().flatten();
                }
                sender.send_replace(looks);
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = looking => {}
            () = sender.closed() => {}
        }
    });
    receiver
}

pub(crate) async fn of_run<T: DeserializeOwned>(
    store: &SharedStore,
    run: &RunId,
    document: Document,
) -> Result<Option<T>, ExitError> {
    let run = run.clone();
    self::document(store, &DocumentKey::OfRun { run, document }).await
}

pub(crate) async fn document<T: DeserializeOwned>(
    store: &SharedStore,
    key: &DocumentKey,
) -> Result<Option<T>, ExitError> {
    let bytes = store.document(key).await;
    let bytes = bytes.map_err(|fault| ExitError::new(exit::UNAVAILABLE, fault))?;
    let Some(bytes) = bytes else {
        return Ok(None);
    };
    let document = serde_json::from_slice(&bytes).map_err(|error| {
        let location = store.location();
        ExitError::new(
            exit::UNAVAILABLE,
            format!("{location}/{key} cannot be read as what it should be: {error}"),
        )
    })?;
    Ok(Some(document))
}

fn no_run(store: &SharedStore, run: &RunId) -> ExitError {
    let location = store.location();
    ExitError::new(
        exit::USAGE,
        format!(
            "there is no run {run}: the runs of this store are the folders of {location}/runs/, and without RUN the one begun last is shown"
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
