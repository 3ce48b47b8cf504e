//! RabbitMQ, 3.10 and later. The only user of lapin.
//!
//! `topology` says what is declared, `session` keeps connections alive, `subscription` keeps
//! consumers attached to them, and `publish`, `consume`, `ledger`, `dead_letters`, `announce` and
//! `lock` each do one part of [`Broker`] on top of these. Publishing and consuming have a connection
//! each: a broker that runs out of memory blocks the publishing one, and acknowledgements must still
//! get through.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::BoxStream;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use self::publish::Message;
use self::session::{Link, Outage, Server};
use self::topology::{Names, PAUSES, QueueDepth, key, kind};
use super::{
    Broker, DeadLetter, Delivery, Enqueued, Entries, Event, Notice, Position, ProducerLock, Waiting,
};
use crate::fault::Fault;
use crate::job::Job;

mod topology;

mod session;

mod subscription;

mod publish;

mod consume;

mod ledger;

mod dead_letters;

mod announce;

mod lock;

/// Names of headers.
mod header {
    pub(super) const ATTEMPT: &str = "attempt";
    pub(super) const WAITS: &str = "waits";
    /// How often the job had come back before it was last set aside.
    pub(super) const RETURNS: &str = "returns";
    /// Set by quorum queues: how often the message came back since then.
    pub(super) const DELIVERY_COUNT: &str = "x-delivery-count";
}

/// How to use a RabbitMQ.
#[derive(Clone, Debug)]
pub struct Options {
    server: Server,
    names: Names,
    /// How long to wait for a broker that is away, or full, before a call fails. Streams wait for
    /// ever.
    pub patience: Duration,
    /// How long the broker may take to answer one call. An answer can be lost for ever.
    pub call_limit: Duration,
    /// How long a producer that lost its connection asks for its lock again when it is refused:
    /// until the broker has noticed the loss, it is the lost connection that holds the lock.
    pub lock_grace: Duration,
    /// The broker's `consumer_timeout`, RabbitMQ's default of 30 minutes unless set. It cannot be
    /// read over AMQP: a server with a lower one takes jobs back while they are worked on.
    pub loan_limit: Duration,
}

impl Options {
    /// For the broker at `url`, with names that begin with `prefix`.
    ///
    /// # Errors
    /// If either is malformed. No error repeats the URL.
    pub fn new(url: &str, prefix: &str) -> Result<Self, Fault> {
        let server = Server::parse(url)?;
        Ok(Self {
            names: Names::new(prefix)?,
            patience: Duration::from_secs(300),
            call_limit: Duration::from_secs(10),
            lock_grace: server.notices_within(),
            loan_limit: AmqpBroker::LOAN_LIMIT,
            server,
        })
    }
}

/// A [`Broker`] on RabbitMQ.
#[derive(Debug)]
pub struct AmqpBroker {
    shared: Arc<Shared>,
}

/// What streams, deliveries and the broker itself share.
#[derive(Debug)]
struct Shared {
    options: Options,
    publishing: Link,
    consuming: Arc<Link>,
    outage: Arc<Outage>,
    /// Cancelled by [`Broker::close`], and when the broker is dropped.
    closed: CancellationToken,
}

impl AmqpBroker {
    /// [`Broker::loan_limit`] unless an option says otherwise; needs no connection.
    pub const LOAN_LIMIT: Duration = topology::CONSUMER_TIMEOUT;

    /// [`Broker::retry_after`], which needs no connection.
    pub fn pause_for(wish: Duration) -> Duration {
        topology::pause_for(wish)
    }

    /// Connects, and declares exchanges and queues.
    ///
    /// # Errors
    /// If the broker refuses, or cannot be reached within [`Options::patience`].
    pub async fn connect(options: Options) -> Result<Self, Fault> {
        let closed = CancellationToken::new();
        let outage = Arc::default();
        let link = |purpose| Link::new(purpose, &options, &outage, closed.clone());
        let shared = Arc::new(Shared {
            publishing: link("publishing"),
            consuming: Arc::new(link("consuming")),
            options,
            outage,
            closed,
        });
        // Dropped if this fails, which ends the attempts.
        let this = Self { shared };
        let deadline = this.shared.deadline();
        this.shared.publishing.session(Some(deadline)).await?;
        Ok(this)
    }
}

impl Drop for AmqpBroker {
    fn drop(&mut self) {
        // Streams hold what they need of it, and would otherwise go on for ever.
        self.shared.closed.cancel();
    }
}

#[async_trait]
impl Broker for AmqpBroker {
    async fn enqueue(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault> {
        self.shared.publish_all(jobs).await
    }

    async fn deliveries_until(
        &self,
        prefetch: u16,
        until: CancellationToken,
    ) -> Result<BoxStream<'static, Delivery>, Fault> {
        consume::deliveries(&self.shared, prefetch, until).await
    }

    async fn record(&self, event: &Event) -> Result<(), Fault> {
        let message = self.shared.event_message(event)?;
        self.shared.publish(&message).await
    }

    async fn events(&self, from: Position) -> Result<Entries, Fault> {
        ledger::events(&self.shared, from).await
    }

    async fn history(&self, from: Position) -> Result<Entries, Fault> {
        ledger::history(&self.shared, from).await
    }

    async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault> {
        lock::take(&self.shared).await
    }

    async fn waiting(&self) -> Result<Waiting, Fault> {
        self.shared.waiting().await
    }

    async fn dead_letters(&self) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault> {
        dead_letters::letters(Arc::clone(&self.shared)).await
    }

    async fn announce(&self, notice: &Notice) -> Result<(), Fault> {
        let message = self.shared.notice_message(notice)?;
        self.shared.publish(&message).await
    }

    async fn announcements(&self) -> Result<BoxStream<'static, Notice>, Fault> {
        announce::announcements(&self.shared).await
    }

    fn loan_limit(&self) -> Option<Duration> {
        Some(self.shared.options.loan_limit)
    }

    fn retry_after(&self, wish: Duration) -> Duration {
        Self::pause_for(wish)
    }

    async fn probe(&self) -> Result<(), Fault> {
        let deadline = Instant::now() + self.shared.options.call_limit;
        // A round trip.
        let publishing = self.shared.depth(&self.shared.options.names.jobs, deadline);
        let consuming = self.shared.consuming.session(Some(deadline));
        tokio::try_join!(publishing, consuming)?;
        Ok(())
    }

    async fn close(&self) {
        self.shared.closed.cancel();
        self.shared.consuming.close().await;
        self.shared.publishing.close().await;
    }
}

impl Shared {
    /// When a call that begins now must have ended.
    fn deadline(&self) -> Instant {
        Instant::now() + self.options.patience
    }

    /// Counts in the order in which a job moves on: one that moves meanwhile is counted twice rather
    /// than not at all.
    async fn waiting(&self) -> Result<Waiting, Fault> {
        let (deadline, names) = (self.deadline(), &self.options.names);
        let mut retry = 0;
        for pause in PAUSES {
            retry += self.depth(&names.retry(pause), deadline).await?.ready;
        }
        let jobs = self.depth(&names.jobs, deadline).await?;
        let dead = self.depth(&names.dead, deadline).await?;
        Ok(Waiting {
            ready: jobs.ready,
            retry,
            dead: dead.ready,
            workers: jobs.consumers,
        })
    }

    /// The depth of `queue`, asked by the publishing connection: if the question breaks the
    /// connection, the loans of the other one stay.
    async fn depth(&self, queue: &ShortString, deadline: Instant) -> Result<QueueDepth, Fault> {
        let asking = async |session: Arc<session::Session>| session.depth(deadline, queue).await;
        self.publishing.call(deadline, asking).await
    }

    fn event_message(&self, event: &Event) -> Result<Message, Fault> {
        let names = &self.options.names;
        let by_exchange =
            |key, kind, id: &str, body| Message::new(names.exchange.clone(), key, kind, id, body);
        // By the default exchange.
        let to_ledger = |kind, job: &Job, body| {
            Message::new("".into(), names.ledger.clone(), kind, &job.id(), body)
        };
        Ok(match event {
            Event::Job(job) => to_ledger(kind::JOB, job, job.encode()),
            Event::Dead(dead) => to_ledger(kind::DEAD, &dead.job, json(dead)?),
            Event::Worker(state) => by_exchange(key::RUN, kind::WORKER, "", json(state)?),
            Event::Outcome(record) => {
                let id = format!("{}/{}@{}", record.run, record.repo, record.pushed_at);
                by_exchange(key::OUTCOME, kind::OUTCOME, &id, json(record)?)
            }
        })
    }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value).map_err(Fault::infra)
}

/// A header that is a count; absent or odd ones count as 0.
fn count_of(headers: Option<&FieldTable>, name: &str) -> u32 {
    let value = headers.and_then(|headers| headers.inner().get(name));
    value
        .and_then(integer)
        .map_or(0, |count| u32::try_from(count.max(0)).unwrap_or(u32::MAX))
}

/// An integer of whatever width the broker sent it in.
fn integer(value: &AMQPValue) -> Option<i64> {
    Some(match value {
        AMQPValue::ShortShortInt(n) => i64::from(*n),
        AMQPValue::ShortShortUInt(n) => i64::from(*n),
        AMQPValue::ShortInt(n) => i64::from(*n),
        AMQPValue::ShortUInt(n) => i64::from(*n),
        AMQPValue::LongInt(n) => i64::from(*n),
        AMQPValue::LongUInt(n) => i64::from(*n),
        AMQPValue::LongLongInt(n) => *n,
        _ => return None,
    })
}

/// The property `timestamp`.
fn time_of(properties: &lapin::BasicProperties) -> Option<OffsetDateTime> {
    let seconds = (*properties.timestamp())?;
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()
}

fn id_of(properties: &lapin::BasicProperties) -> &str {
    properties
        .message_id()
        .as_ref()
        .map_or("", |id| id.as_str())
}
