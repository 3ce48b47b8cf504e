//! The ledger: a stream, read by offset and read again where a connection left off.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use lapin::message::Delivery as Incoming;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer};
use time::OffsetDateTime;
use tracing::debug;

use super::publish::Message;
use super::session::{Session, is_soft, within};
use super::topology::{Names, key, kind};
use super::{Shared, id_of, integer, time_of};
use crate::broker::{DeadJob, DeathCause, Entries, Event, LedgerEntry, Position, WorkerState};
use crate::fault::Fault;
use crate::job::Job;
use crate::outcome::OutcomeRecord;

/// Records that may be on their way. A stream is not read without a bound …
const PREFETCH: u16 = 1000;
/// … and acknowledging each of them alone takes twice as long.
const ACKNOWLEDGE_EVERY: u64 = 200;
/// Offsets by time are those of chunks, and clocks differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(600);

/// From `from` on; with [`Position::Now`], attached when this returns.
pub(super) async fn events(shared: Arc<Shared>, from: Position) -> Result<Entries, Fault> {
    let mut reading = Reading::start(Arc::clone(&shared), from).await?;
    if from == Position::Now {
        reading.find_place().await?;
    }
    let stream = stream::unfold(Some(reading), |reading| async move {
        let mut reading = reading?;
        match reading.next().await {
            Ok(Some(Read::Entry(entry))) => Some((Some(Ok(entry)), Some(reading))),
            Ok(Some(Read::Mark(_))) => Some((None, Some(reading))),
            Ok(None) => None,
            Err(fault) => Some((Some(Err(fault)), None)),
        }
    });
    Ok(stream.filter_map(std::future::ready).boxed())
}

/// From `from` to a mark that is written now: a stream has no end that could be asked for.
pub(super) async fn history(shared: Arc<Shared>, from: Position) -> Result<Entries, Fault> {
    if from == Position::Now {
        return Ok(stream::empty().boxed());
    }
    let mark = new_mark();
    shared.mark(&mark).await?;
    let reading = Reading::start(shared, from).await?;
    let stream = stream::unfold(Some(reading), move |reading| {
        let mark = mark.clone();
        async move {
            let mut reading = reading?;
            match reading.next().await {
                Ok(Some(Read::Entry(entry))) => Some((Some(Ok(entry)), Some(reading))),
                Ok(Some(Read::Mark(id))) if id == mark => None,
                Ok(Some(Read::Mark(_))) => Some((None, Some(reading))),
                Ok(None) => {
                    let fault = reading.shared.server.unreachable("it was closed");
                    Some((Some(Err(fault)), None))
                }
                Err(fault) => Some((Some(Err(fault)), None)),
            }
        }
    });
    Ok(stream.filter_map(std::future::ready).boxed())
}

/// What a record of the ledger is.
#[derive(Debug)]
enum Read {
    Entry(LedgerEntry),
    Mark(String),
}

/// A record that was read, to be recognised when it is read again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    offset: i64,
    id: String,
}

#[derive(Debug)]
struct Reading {
    shared: Arc<Shared>,
    from: Position,
    /// The last record that was read; reading goes on after it.
    last: Option<Place>,
    live: Option<Live>,
    /// The last record did not come once more when it should have.
    missed: bool,
    /// Read on the way to a mark, to be given out first.
    before: VecDeque<Read>,
}

#[derive(Debug)]
struct Live {
    session: Arc<Session>,
    /// Closes itself when it is dropped.
    _channel: Channel,
    consumer: Consumer,
    unacknowledged: u64,
    /// The first record must be this one, or the ledger is another.
    expected: Option<Place>,
}

/// Why the stream could not be read.
#[derive(Debug)]
enum Unread {
    /// There is no such stream.
    Missing,
    /// Something passing.
    Broken(String),
}

impl Reading {
    async fn start(shared: Arc<Shared>, from: Position) -> Result<Self, Fault> {
        let session = shared.consuming.session(Some(shared.deadline())).await?;
        let mut reading = Self {
            shared,
            from,
            last: None,
            live: None,
            missed: false,
            before: VecDeque::new(),
        };
        match reading.attach(session).await {
            Ok(()) => Ok(reading),
            Err(Unread::Missing) => Err(reading.lost()),
            Err(Unread::Broken(why)) => Err(reading.shared.server.unreachable(&why)),
        }
    }

    fn lost(&self) -> Fault {
        let ledger = self.shared.names.ledger();
        self.shared.server.unreachable(&format!(
            "the ledger ({ledger}) is not the one it was: it was deleted or emptied, and what it knew of earlier jobs is lost"
        ))
    }

    fn offset(&self) -> AMQPValue {
        if let Some(last) = &self.last {
            // The last one once more, to see that it is still there.
            return AMQPValue::LongLongInt(last.offset);
        }
        match self.from {
            Position::Start => AMQPValue::LongString("first".into()),
            Position::Since(since) => {
                // From a time in the future on, nothing would ever come.
                let since = since.min(OffsetDateTime::now_utc()) - CLOCKS_DIFFER;
                let seconds = u64::try_from(since.unix_timestamp()).unwrap_or_default();
                AMQPValue::Timestamp(seconds)
            }
            Position::Now => AMQPValue::LongString("next".into()),
        }
    }

    async fn attach(&mut self, session: Arc<Session>) -> Result<(), Unread> {
        let limit = self.shared.options.call_limit;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), self.offset());
        let attached = async {
            let channel = session.channel().await.map_err(Unread::Broken)?;
            let qos = channel.basic_qos(PREFETCH, BasicQosOptions::default());
            within(limit, "setting the prefetch", qos)
                .await
                .map_err(Unread::Broken)?;
            let options = BasicConsumeOptions::default();
            let ledger = self.shared.names.ledger();
            let consume = channel.basic_consume(ledger, "".into(), options, arguments);
            match tokio::time::timeout(limit, consume).await {
                Ok(Ok(consumer)) => Ok((channel, consumer)),
                Ok(Err(error)) if is_soft(&error, &AMQPSoftError::NOTFOUND) => Err(Unread::Missing),
                Ok(Err(error)) => Err(Unread::Broken(format!("reading the ledger: {error}"))),
                Err(_) => Err(Unread::Broken("reading the ledger: no answer".to_owned())),
            }
        };
        match attached.await {
            Ok((channel, consumer)) => {
                self.live = Some(Live {
                    session,
                    _channel: channel,
                    consumer,
                    unacknowledged: 0,
                    expected: self.last.clone(),
                });
                Ok(())
            }
            Err(unread) => {
                // A new connection declares anew what is missing.
                session.fail(match &unread {
                    Unread::Missing => "the ledger is missing",
                    Unread::Broken(why) => why,
                });
                Err(unread)
            }
        }
    }

    /// Reads once, so that there is a place to go on from before the first event.
    ///
    /// The mark is written anew until it is seen: where the connection is replaced before the first
    /// record was read, reading goes on after what was written until then.
    async fn find_place(&mut self) -> Result<(), Fault> {
        let (shared, mark) = (Arc::clone(&self.shared), new_mark());
        let marking = async {
            loop {
                shared.mark(&mark).await?;
                tokio::time::sleep(shared.options.call_limit).await;
            }
        };
        tokio::select! {
            read = self.until(&mark) => read,
            failed = marking => failed,
        }
    }

    /// Reads up to a mark, and keeps what comes before it.
    async fn until(&mut self, mark: &str) -> Result<(), Fault> {
        let mut before = VecDeque::new();
        let limit = self.shared.options.patience;
        let reading = async {
            loop {
                match self.next().await? {
                    Some(Read::Mark(id)) if id == mark => return Ok(()),
                    Some(read) => before.push_back(read),
                    None => return Err(self.shared.server.unreachable("it was closed")),
                }
            }
        };
        match tokio::time::timeout(limit, reading).await {
            Ok(read) => read?,
            Err(_) => {
                let why = "the ledger does not show what was written to it";
                return Err(self.shared.server.unreachable(why));
            }
        }
        self.before = before;
        Ok(())
    }

    /// The next record; `None` when the broker was closed.
    async fn next(&mut self) -> Result<Option<Read>, Fault> {
        if let Some(read) = self.before.pop_front() {
            return Ok(Some(read));
        }
        loop {
            let Some(live) = &mut self.live else {
                let Ok(session) = self.shared.consuming.session(None).await else {
                    return Ok(None);
                };
                match self.attach(session).await {
                    Ok(()) | Err(Unread::Broken(_)) => continue,
                    Err(Unread::Missing) => return Err(self.lost()),
                }
            };
            let incoming = async {
                let next = live.consumer.next();
                if live.expected.is_none() {
                    return Ok(next.await);
                }
                // It is there already, or it never comes.
                tokio::time::timeout(self.shared.options.call_limit, next).await
            };
            let incoming = tokio::select! {
                incoming = incoming => incoming,
                () = live.session.failed.cancelled() => Ok(None),
                () = self.shared.closed.cancelled() => return Ok(None),
            };
            let Ok(incoming) = incoming else {
                self.is_there().await?;
                continue;
            };
            match incoming {
                Some(Ok(incoming)) => {
                    if let Some(read) = self.take(&incoming).await? {
                        return Ok(Some(read));
                    }
                }
                Some(Err(error)) => self.detach(&error.to_string()),
                None => self.ended().await?,
            }
        }
    }

    /// Takes note of a record and says what it is; `None` for one that is nothing to a reader.
    async fn take(&mut self, incoming: &Incoming) -> Result<Option<Read>, Fault> {
        let place = Place {
            offset: offset_of(incoming),
            id: id_of(&incoming.properties).to_owned(),
        };
        let Some(live) = &mut self.live else {
            return Ok(None);
        };
        live.unacknowledged += 1;
        if live.unacknowledged >= ACKNOWLEDGE_EVERY {
            live.unacknowledged = 0;
            let all = BasicAckOptions { multiple: true };
            // Where it fails the consumer ends, and that is seen to.
            let limit = self.shared.options.call_limit;
            if let Err(why) = within(limit, "acknowledging records", incoming.acker.ack(all)).await
            {
                debug!(operation = "ledger", "{why}");
            }
        }
        if let Some(expected) = live.expected.take() {
            if place != expected {
                return Err(self.lost());
            }
            self.missed = false;
            return Ok(None);
        }
        self.last = Some(place);
        Ok(read(incoming, &self.shared))
    }

    fn detach(&mut self, why: &str) {
        if let Some(live) = self.live.take() {
            live.session
                .fail(&format!("the ledger is no longer read: {why}"));
        }
    }

    /// The consumer ended without an error: with the connection, or because the stream was deleted
    /// (lapin says the same of both).
    async fn ended(&mut self) -> Result<(), Fault> {
        self.attach_again().await?;
        Ok(())
    }

    /// The last record does not come once more. A broker may be slow to open a stream, so that is
    /// believed only the second time, and if it answers otherwise.
    async fn is_there(&mut self) -> Result<(), Fault> {
        if self.attach_again().await? {
            if self.missed {
                return Err(self.lost());
            }
            self.missed = true;
        }
        Ok(())
    }

    /// Attaches by the same connection, as long as it is well; whether that worked.
    async fn attach_again(&mut self) -> Result<bool, Fault> {
        let Some(live) = self.live.take() else {
            return Ok(false);
        };
        if live.session.failed.is_cancelled() {
            return Ok(false);
        }
        let session = Arc::clone(&live.session);
        drop(live);
        match self.attach(session).await {
            Ok(()) => Ok(true),
            Err(Unread::Missing) => Err(self.lost()),
            Err(Unread::Broken(_)) => Ok(false),
        }
    }
}

/// The record as an entry, if it is one that this program knows.
fn read(incoming: &Incoming, shared: &Shared) -> Option<Read> {
    let properties = &incoming.properties;
    let said = properties.kind().as_ref().map_or("", |kind| kind.as_str());
    // What died has the type that it lived with.
    let died =
        incoming.exchange == shared.names.dead() || incoming.routing_key.as_str() == key::DEAD;
    let event = match said {
        kind::MARK => return Some(Read::Mark(id_of(properties).to_owned())),
        kind::DEAD | kind::JOB if died || said == kind::DEAD => {
            Job::decode(&incoming.data).map(|job| {
                let cause = cause_of(properties.headers().as_ref(), &shared.names);
                Event::Dead(DeadJob { job, cause })
            })
        }
        kind::JOB => Job::decode(&incoming.data).map(Event::Job),
        kind::OUTCOME => serde_json::from_slice::<OutcomeRecord>(&incoming.data)
            .map(Event::Outcome)
            .map_err(Fault::poison),
        kind::WORKER => serde_json::from_slice::<WorkerState>(&incoming.data)
            .map(Event::Worker)
            .map_err(Fault::poison),
        _ => Err(Fault::poison(format!("unknown type {said:?}"))),
    };
    match event {
        Ok(event) => {
            let at = time_of(properties).unwrap_or(OffsetDateTime::UNIX_EPOCH);
            Some(Read::Entry(LedgerEntry { at, event }))
        }
        // A later version's, or a message that was never a job: who buried it recorded that.
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

/// Why the broker dead-lettered a job, as far as the headers in the stream say: it drops tables and
/// arrays, so not `x-death` itself but what the broker sums up of it.
fn cause_of(headers: Option<&FieldTable>, names: &Names) -> DeathCause {
    let text = |name: &str| {
        let value = headers.and_then(|headers| headers.inner().get(name));
        value
            .and_then(AMQPValue::as_long_string)
            .map(ToString::to_string)
    };
    let jobs = names.jobs().to_string();
    // Of several deaths the last one matters, of which only later versions tell. The first may be the
    // end of a pause in a retry queue.
    let reason = match text("x-last-death-reason") {
        Some(reason) => Some(reason),
        None if text("x-first-death-queue").as_deref() == Some(&*jobs) => {
            text("x-first-death-reason")
        }
        None => None,
    };
    match reason.as_deref() {
        Some("delivery_limit") => DeathCause::DeliveryLimit,
        Some("rejected") => DeathCause::Rejected,
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
        let message = Message::new(
            self.names.exchange(),
            key::RUN.into(),
            kind::MARK,
            id,
            OffsetDateTime::now_utc(),
            Vec::new(),
        );
        self.publish(&message).await
    }
}
