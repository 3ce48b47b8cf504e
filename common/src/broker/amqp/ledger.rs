//! The ledger: a stream, read by offset and read again where a connection left off.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use lapin::Acker;
use lapin::message::Delivery as Incoming;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable};
use time::OffsetDateTime;
use tracing::{debug, warn};

use super::properties::{REJECTED, header, id_of, integer, time_of};
use super::publish::Message;
use super::session::within;
use super::shared::Shared;
use super::subscription::{Queue, Subscription, Unattached};
use super::topology::{Names, key, kind};
use crate::broker::{DeadJob, DeathCause, Entries, Event, LedgerEntry, Position, WorkerState};
use crate::fault::Fault;
use crate::job::Job;
use crate::outcome::OutcomeRecord;

/// Records that may be on their way.
const PREFETCH: u16 = 1000;
/// Records are acknowledged together, which is twice as fast as each alone …
const ACKNOWLEDGE_EVERY: u64 = 200;
/// … but soon: the broker closes the channel of a record that waits longer than its
/// `consumer_timeout`, also while nothing else comes.
const ACKNOWLEDGE_WITHIN: Duration = Duration::from_secs(1);
/// Offsets by time are those of chunks, and clocks differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(600);

/// From `from` on; with [`Position::Now`], attached when this returns.
pub(super) async fn events(shared: &Arc<Shared>, from: Position) -> Result<Entries, Fault> {
    // Something is there to be read.
    if let Position::Since(_) = from {
        shared.mark(&new_mark()).await?;
    }
    let mut reader = LedgerReader::start(shared, from).await?;
    if from == Position::Now {
        reader.find_position().await?;
    }
    let stream = stream::unfold(Some(reader), async |reader| {
        let mut reader = reader?;
        loop {
            match reader.next().await {
                Ok(Some(Record::Entry(entry))) => return Some((Ok(entry), Some(reader))),
                Ok(Some(Record::Mark(_))) => {}
                Ok(None) => return None,
                Err(fault) => return Some((Err(fault), None)),
            }
        }
    });
    Ok(stream.boxed())
}

/// From `from` to a mark that is written now: a stream has no end that could be asked for.
pub(super) async fn history(shared: &Arc<Shared>, from: Position) -> Result<Entries, Fault> {
    if from == Position::Now {
        return Ok(stream::empty().boxed());
    }
    let mark = new_mark();
    shared.mark(&mark).await?;
    let reader = LedgerReader::start(shared, from).await?;
    let stream = stream::unfold(Some((reader, mark)), async |state| {
        let (mut reader, mark) = state?;
        loop {
            match reader.next_within_patience().await {
                Ok(Record::Entry(entry)) => return Some((Ok(entry), Some((reader, mark)))),
                Ok(Record::Mark(id)) if id == mark => return None,
                Ok(Record::Mark(_)) => {}
                Err(fault) => return Some((Err(fault), None)),
            }
        }
    });
    Ok(stream.boxed())
}

/// A record of the ledger.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "each lives for one loop, on the stack"
)]
enum Record {
    Entry(LedgerEntry),
    Mark(String),
}

/// A record that was read, to be recognised when it is read again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RecordId {
    offset: i64,
    id: String,
}

/// The record that must come next, or something is wrong.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    /// Any: one was written before.
    Any,
    /// This one again, or the ledger is another.
    Again(RecordId),
}

/// Records that were read and not acknowledged.
struct Unacknowledged {
    count: u64,
    since: Instant,
    last: Acker,
}

struct LedgerReader {
    subscription: Subscription,
    from: Position,
    /// The last record that was read; reading goes on after it.
    last: Option<RecordId>,
    expected: Option<Expected>,
    /// The expected record did not come once.
    missed: bool,
    unacknowledged: Option<Unacknowledged>,
    /// Read on the way to a mark, to be given out first.
    before: VecDeque<Record>,
}

impl LedgerReader {
    async fn start(shared: &Arc<Shared>, from: Position) -> Result<Self, Fault> {
        let queue = Queue::Ledger(offset(from), PREFETCH);
        Ok(Self {
            subscription: Subscription::start(shared, queue).await?,
            from,
            last: None,
            // A mark was written first; without one, an empty ledger shows nothing.
            expected: matches!(from, Position::Since(_)).then_some(Expected::Any),
            missed: false,
            unacknowledged: None,
            before: VecDeque::new(),
        })
    }

    fn unusable(&self, why: &str) -> Fault {
        self.subscription.shared.options.server.unreachable(why)
    }

    fn lost(&self) -> Fault {
        let ledger = &self.subscription.shared.options.names.ledger;
        self.unusable(&format!(
            "the ledger ({ledger}) is not the one it was: it was deleted or emptied, and what it knew of earlier jobs is lost"
        ))
    }

    /// Reads once, so that there is a record to go on from before the first event.
    ///
    /// The mark is written anew until it is seen: where the connection is replaced before the first
    /// record was read, reading goes on after what was written until then.
    async fn find_position(&mut self) -> Result<(), Fault> {
        let (shared, mark) = (Arc::clone(&self.subscription.shared), new_mark());
        let marking = async {
            loop {
                shared.mark(&mark).await?;
                tokio::time::sleep(shared.options.call_limit).await;
            }
        };
        let reading = async {
            let mut before = VecDeque::new();
            loop {
                match self.next_within_patience().await? {
                    Record::Mark(id) if id == mark => {
                        self.before = before;
                        return Ok(());
                    }
                    record => before.push_back(record),
                }
            }
        };
        tokio::select! {
            read = reading => read,
            failed = marking => failed,
        }
    }

    /// The next record of those that are there already.
    async fn next_within_patience(&mut self) -> Result<Record, Fault> {
        let patience = self.subscription.shared.options.patience;
        match tokio::time::timeout(patience, self.next()).await {
            Ok(Ok(Some(record))) => Ok(record),
            Ok(Ok(None)) => Err(self.unusable("it was closed")),
            Ok(Err(fault)) => Err(fault),
            Err(_) => Err(self.unusable("the ledger does not show what was written to it")),
        }
    }

    /// The next record; `None` when the broker was closed.
    async fn next(&mut self) -> Result<Option<Record>, Fault> {
        if let Some(record) = self.before.pop_front() {
            return Ok(Some(record));
        }
        loop {
            if self.subscription.attached.is_none() && !self.attach().await? {
                return Ok(None);
            }
            let limit = self.subscription.shared.options.call_limit;
            let wait = match (&self.expected, &self.unacknowledged) {
                // It is there already, or it never comes.
                (Some(_), _) => limit,
                (None, Some(waiting)) => ACKNOWLEDGE_WITHIN.saturating_sub(waiting.since.elapsed()),
                (None, None) => Duration::MAX,
            };
            match tokio::time::timeout(wait, self.subscription.receive()).await {
                Ok(Some(incoming)) => {
                    if let Some(record) = self.take(&incoming).await? {
                        return Ok(Some(record));
                    }
                }
                Ok(None) => {}
                Err(_) if self.expected.is_some() => self.miss().await?,
                Err(_) => self.acknowledge().await,
            }
        }
    }

    /// Attaches after the last record; `false` when the broker was closed.
    async fn attach(&mut self) -> Result<bool, Fault> {
        self.unacknowledged = None;
        if let Some(last) = &self.last {
            // The last one once more, to see that it is still there.
            let offset = AMQPValue::LongLongInt(last.offset);
            self.expected = Some(Expected::Again(last.clone()));
            self.subscription.queue = Queue::Ledger(offset, PREFETCH);
        }
        match self.subscription.attach(None).await {
            Ok(()) => Ok(true),
            Err(Unattached::Missing | Unattached::Locked) => Err(self.lost()),
            Err(Unattached::Fault(_)) => Ok(false),
        }
    }

    /// The expected record does not come. A broker may be slow to open a stream, so that is believed
    /// only the second time, and if it answers otherwise.
    async fn miss(&mut self) -> Result<(), Fault> {
        if !self.subscription.give_up().await {
            return Ok(());
        }
        match (self.expected.as_ref(), self.from) {
            // RabbitMQ takes a time after its own last record for the stream's end.
            (Some(Expected::Any), Position::Since(since)) => {
                warn!(
                    operation = "ledger",
                    "the ledger shows nothing since {since}: the clock of this machine, or of the one that began the run, is ahead of the broker's; reading the ledger from its start"
                );
                self.from = Position::Start;
                self.subscription.queue = Queue::Ledger(offset(self.from), PREFETCH);
            }
            (Some(Expected::Any), _) if self.missed => {
                return Err(self.unusable("the ledger does not show what was written to it"));
            }
            _ if self.missed => return Err(self.lost()),
            _ => self.missed = true,
        }
        Ok(())
    }

    /// Takes note of a record and says what it is; `None` for one that is nothing to a reader.
    async fn take(&mut self, incoming: &Incoming) -> Result<Option<Record>, Fault> {
        let id = RecordId {
            offset: offset_of(incoming),
            id: id_of(&incoming.properties).to_owned(),
        };
        let (count, since) = match &self.unacknowledged {
            Some(waiting) => (waiting.count + 1, waiting.since),
            None => (1, Instant::now()),
        };
        self.unacknowledged = Some(Unacknowledged {
            count,
            since,
            last: incoming.acker.clone(),
        });
        if count >= ACKNOWLEDGE_EVERY || since.elapsed() >= ACKNOWLEDGE_WITHIN {
            self.acknowledge().await;
        }
        self.missed = false;
        if let Some(Expected::Again(expected)) = self.expected.take() {
            return match id == expected {
                true => Ok(None),
                false => Err(self.lost()),
            };
        }
        self.last = Some(id);
        let names = &self.subscription.shared.options.names;
        Ok(record(incoming, names))
    }

    async fn acknowledge(&mut self) {
        let Some(waiting) = self.unacknowledged.take() else {
            return;
        };
        let all = waiting.last.ack(BasicAckOptions { multiple: true });
        let limit = self.subscription.shared.options.call_limit;
        // Where it fails the consumer ends, and is attached again.
        if let Err(error) = within(limit, "acknowledging records", all).await {
            debug!(operation = "ledger", "{error}");
        }
    }
}

/// Where the stream is read from.
fn offset(from: Position) -> AMQPValue {
    match from {
        Position::Start => AMQPValue::LongString("first".into()),
        Position::Since(since) => {
            let seconds = (since - CLOCKS_DIFFER).unix_timestamp();
            AMQPValue::Timestamp(u64::try_from(seconds).unwrap_or_default())
        }
        Position::Now => AMQPValue::LongString("next".into()),
    }
}

/// What a message of the stream says, if this program knows its type.
fn record(incoming: &Incoming, names: &Names) -> Option<Record> {
    let properties = &incoming.properties;
    let said = properties.kind().as_ref().map_or("", |kind| kind.as_str());
    // What died has the type that it lived with.
    let died = incoming.exchange == names.dead || incoming.routing_key.as_str() == key::DEAD;
    let event = match said {
        kind::MARK => return Some(Record::Mark(id_of(properties).to_owned())),
        _ if died => Job::decode(&incoming.data).map(|job| {
            let cause = cause_of(properties.headers().as_ref(), names);
            Event::Dead(DeadJob { job, cause })
        }),
        kind::DEAD => parse::<DeadJob>(incoming).map(Event::Dead),
        kind::JOB => Job::decode(&incoming.data).map(Event::Job),
        kind::OUTCOME => parse::<OutcomeRecord>(incoming).map(Event::Outcome),
        kind::WORKER => parse::<WorkerState>(incoming).map(Event::Worker),
        _ => Err(Fault::poison(format!("unknown type {said:?}"))),
    };
    match event {
        Ok(event) => {
            let at = time_of(properties).unwrap_or(OffsetDateTime::UNIX_EPOCH);
            Some(Record::Entry(LedgerEntry { at, event }))
        }
        // A later version's, or undecodable: its dead-lettering recorded that.
        Err(fault) => {
            let id = id_of(properties);
            debug!(
                operation = "ledger",
                job = id,
                "a record is skipped ({id:?}): {fault}"
            );
            None
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(incoming: &Incoming) -> Result<T, Fault> {
    serde_json::from_slice(&incoming.data).map_err(Fault::poison)
}

/// Why the broker dead-lettered a job, as far as the headers in the stream say: it drops tables and
/// arrays, so not `x-death` itself but the strings that sum it up.
fn cause_of(headers: Option<&FieldTable>, names: &Names) -> DeathCause {
    let text = |name: &str| {
        let value = headers.and_then(|headers| headers.inner().get(name));
        let text = value.and_then(AMQPValue::as_long_string);
        text.map(ToString::to_string)
    };
    let jobs = names.jobs.to_string();
    // The last death matters, of which only later versions tell. The first may be the end of a
    // pause in a retry queue.
    let by_worker = text(header::CAUSE);
    let reason = by_worker
        .or_else(|| text("x-last-death-reason"))
        .or_else(|| {
            let queue = text("x-first-death-queue")?;
            (queue == jobs).then(|| text("x-first-death-reason"))?
        });
    match reason.as_deref() {
        Some("delivery_limit") => DeathCause::DeliveryLimit,
        Some(REJECTED) => DeathCause::Rejected,
        Some("expired") => DeathCause::Expired(jobs),
        Some("maxlen") => DeathCause::Overflow(jobs),
        _ => DeathCause::Unknown,
    }
}

fn offset_of(incoming: &Incoming) -> i64 {
    let headers = incoming.properties.headers().as_ref();
    headers
        .and_then(|headers| headers.inner().get("x-stream-offset"))
        .and_then(integer)
        .unwrap_or_default()
}

/// The id of a mark that is nobody else's.
fn new_mark() -> String {
    format!("mark-{:016x}", fastrand::u64(..))
}

impl Shared {
    /// Writes a mark to the ledger.
    async fn mark(&self, id: &str) -> Result<(), Fault> {
        let exchange = self.options.names.exchange.clone();
        let message = Message::new(exchange, key::RUN, kind::MARK, id, Vec::new());
        self.publish(&message).await
    }
}
