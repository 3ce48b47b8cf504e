//! Publishing: nothing counts before its confirm.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered};
use futures::{FutureExt, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use time::OffsetDateTime;
use tracing::warn;

use super::properties::{REJECTED, header};
use super::session::{CallError, Failure, Session};
use super::shared::Shared;
use super::topology::{key, kind};
use crate::broker::Enqueued;
use crate::failpoint;
use crate::fault::Fault;
use crate::job::Job;
use crate::retry;

/// How many messages may be without their confirm: 390 a second one by one, 11,000 to 16,000 so.
const WINDOW: usize = 512;
/// Pauses before a message is published again grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The programs give their queues no length.
const FULL: &str = "a queue is full: a policy sets max-length on it, or the broker is short of room; see `rabbitmqctl list_policies`";

fn pauses() -> impl Iterator<Item = Duration> + Send {
    retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE)
}

/// A message, published as often as it takes.
#[derive(Clone, Debug)]
pub(super) struct Message {
    exchange: ShortString,
    routing_key: ShortString,
    /// Whether it comes back when no queue takes it.
    mandatory: bool,
    body: Vec<u8>,
    properties: BasicProperties,
}

impl Message {
    /// `kind` is the property `type`. Its time is now.
    pub(super) fn new(
        exchange: ShortString,
        routing_key: impl Into<ShortString>,
        kind: &str,
        id: &str,
        body: Vec<u8>,
    ) -> Self {
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_type(kind.into())
            .with_app_id("repofleet".into());
        // An id that is too long to be one is left out: it only helps people.
        let properties = match ShortString::try_new(id) {
            Ok(id) => properties.with_message_id(id),
            Err(_) => properties,
        };
        let message = Self {
            exchange,
            routing_key: routing_key.into(),
            mandatory: true,
            body,
            properties,
        };
        message.at(OffsetDateTime::now_utc())
    }

    /// With the time of an earlier message.
    pub(super) fn at(mut self, at: OffsetDateTime) -> Self {
        let seconds = u64::try_from(at.unix_timestamp()).unwrap_or_default();
        self.properties = self.properties.with_timestamp(seconds);
        self
    }

    /// For those who listen now: no error where nobody does, and not kept on a disk.
    pub(super) fn transient(mut self) -> Self {
        self.mandatory = false;
        self.properties = self.properties.with_delivery_mode(1);
        self
    }

    /// With the counts of a delivery. Their names do not begin with `x-`: RabbitMQ 4 drops what
    /// clients say under such names.
    pub(super) fn counted(mut self, attempt: u32, waits: u32, returns: u32) -> Self {
        let mut headers = FieldTable::default();
        for (name, count) in [
            (header::ATTEMPT, attempt),
            (header::WAITS, waits),
            (header::RETURNS, returns),
        ] {
            headers.insert(name.into(), AMQPValue::LongLongInt(count.into()));
        }
        self.properties = self.properties.with_headers(headers);
        self
    }

    /// As a dead letter: what the broker would say of one that was rejected.
    pub(super) fn rejected(mut self) -> Self {
        let mut headers = self.properties.headers().clone().unwrap_or_default();
        let cause = AMQPValue::LongString(REJECTED.into());
        headers.insert(header::CAUSE.into(), cause);
        self.properties = self.properties.with_headers(headers);
        self
    }
}

/// A connection, and a channel of it that nobody else publishes on.
#[derive(Clone)]
struct Publisher {
    session: Arc<Session>,
    channel: Arc<Channel>,
}

impl Publisher {
    /// Sends a message off; its confirm is still to come.
    async fn send(
        &self,
        message: &Message,
        deadline: Instant,
    ) -> Result<PublisherConfirm, CallError> {
        let options = BasicPublishOptions {
            mandatory: message.mandatory,
            ..Default::default()
        };
        let sending = self.channel.basic_publish(
            message.exchange.clone(),
            message.routing_key.clone(),
            options,
            &message.body,
            message.properties.clone(),
        );
        self.session.answered(deadline, "publishing", sending).await
    }

    /// Waits for a confirm; without it the message may be with the broker all the same.
    ///
    /// `Ack(None)` is the only success: an unroutable message comes back as `Ack(Some(…))`.
    async fn confirmed(
        &self,
        confirm: PublisherConfirm,
        deadline: Instant,
    ) -> Result<(), CallError> {
        let confirmed = self.session.answered(deadline, "a confirm", confirm);
        let broken = |why: String| Err(CallError::new(Failure::Broken, why));
        match confirmed.await? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(returned)) => broken(format!(
                "a message found no queue: {} {}",
                returned.reply_code, returned.reply_text
            )),
            Confirmation::Nack(_) => Err(CallError::new(Failure::Full, FULL)),
            Confirmation::NotRequested => broken("the channel does not confirm".to_owned()),
        }
    }

    /// Leaves the channel to the next one. What has not been sent yet, as while the broker takes
    /// nothing, is still sent by it.
    fn give_back(self) {
        self.session.give_back(self.channel);
    }
}

impl Shared {
    /// What to publish with, until `deadline`.
    async fn publisher(&self, deadline: Instant) -> Result<Publisher, Fault> {
        let opening = self.publishing.call(deadline, async |session| {
            let channel = session.confirming(deadline).await?;
            Ok(Publisher { session, channel })
        });
        opening.await
    }

    /// Publishes one message until it is confirmed, or patience ends.
    pub(super) async fn publish(&self, message: &Message) -> Result<(), Fault> {
        let deadline = self.deadline();
        let mut pauses = pauses();
        loop {
            let publisher = self.publisher(deadline).await?;
            let published = match publisher.send(message, deadline).await {
                Ok(confirm) => publisher.confirmed(confirm, deadline).await,
                Err(error) => Err(error),
            };
            let fault =
                published.map_err(|error| self.publishing.given_up(&publisher.session, &error));
            publisher.give_back();
            let Err(fault) = fault else {
                return Ok(());
            };
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            if Instant::now() + pause >= deadline {
                return Err(fault);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Publishes all jobs until each is confirmed, or there was no progress for too long.
    pub(super) async fn publish_all(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault> {
        let mut batch = Batch {
            shared: self,
            publisher: self.publisher(self.deadline()).await?,
            again: VecDeque::new(),
            unconfirmed: FuturesUnordered::new(),
            window: WINDOW,
            progress: Instant::now(),
            enqueued: Enqueued::default(),
            pauses: Box::new(pauses()),
        };
        let mut messages = jobs.map(|job| self.job_message(&job)).fuse();
        loop {
            batch.renew_publisher().await?;
            let room = batch.unconfirmed.len() < batch.window;
            if room && let Some(message) = batch.again.pop_front() {
                batch.send(message).await?;
                continue;
            }
            tokio::select! {
                biased;
                Some(sent) = batch.unconfirmed.next() => batch.take_confirm(sent).await?,
                Some(message) = messages.next(), if room => batch.send(message).await?,
                else => break,
            }
        }
        self.jobs_exist(&batch.publisher.session).await?;
        let enqueued = batch.enqueued;
        drop(batch.unconfirmed);
        batch.publisher.give_back();
        Ok(enqueued)
    }

    /// Confirms say nothing of the jobs queue, even with `mandatory`: the ledger is a route too. So
    /// it is looked at after the last one.
    async fn jobs_exist(&self, last: &Arc<Session>) -> Result<(), Fault> {
        let deadline = self.deadline();
        loop {
            let session = self.publishing.session(Some(deadline)).await?;
            if !Arc::ptr_eq(&session, last) && session.jobs_were_missing {
                return Err(self.jobs_lost());
            }
            match session.depth(deadline, &self.options.names.jobs).await {
                Ok(_) => return Ok(()),
                Err(error) if error.failure == Failure::Blocked => {
                    return Err(self.publishing.given_up(&session, &error));
                }
                // Missing, or only a connection that broke: the next one says which.
                Err(error) => session.fail(error),
            }
        }
    }

    fn jobs_lost(&self) -> Fault {
        self.options.server.unreachable(
            "the jobs queue was deleted while jobs were published; run the producer again: it finds what is missing",
        )
    }

    /// To the jobs queue and the ledger, with one confirm for both.
    fn job_message(&self, job: &Job) -> Message {
        let exchange = self.options.names.exchange.clone();
        Message::new(exchange, key::JOB, kind::JOB, &job.id(), job.encode()).counted(0, 0, 0)
    }
}

/// A message, what it went by, and its confirm.
type Sent = (Message, Publisher, Result<(), CallError>);

/// Jobs on their way to the broker.
struct Batch<'a> {
    shared: &'a Shared,
    publisher: Publisher,
    /// Refused or lost, to be sent again.
    again: VecDeque<Message>,
    unconfirmed: FuturesUnordered<BoxFuture<'a, Sent>>,
    /// How many may be unconfirmed. One while the queue is full, since the ledger keeps a copy of
    /// each that is refused; more again as soon as the queue takes them.
    window: usize,
    /// When a message was last confirmed.
    progress: Instant,
    enqueued: Enqueued,
    pauses: Box<dyn Iterator<Item = Duration> + Send>,
}

impl Batch<'_> {
    fn deadline(&self) -> Instant {
        self.progress + self.shared.options.patience
    }

    async fn renew_publisher(&mut self) -> Result<(), Fault> {
        if self.publisher.session.failed.is_cancelled() {
            self.publisher = self.shared.publisher(self.deadline()).await?;
            if self.publisher.session.jobs_were_missing {
                return Err(self.shared.jobs_lost());
            }
        }
        Ok(())
    }

    async fn send(&mut self, message: Message) -> Result<(), Fault> {
        let (by, deadline) = (self.publisher.clone(), self.deadline());
        match by.send(&message, deadline).await {
            Ok(confirm) => {
                let confirmed = async move {
                    let confirmed = by.confirmed(confirm, deadline).await;
                    (message, by, confirmed)
                };
                self.unconfirmed.push(confirmed.boxed());
                Ok(())
            }
            Err(error) => {
                self.again.push_front(message);
                self.take_failure(&by.session, &error)
            }
        }
    }

    async fn take_confirm(&mut self, (message, by, confirmed): Sent) -> Result<(), Fault> {
        let Err(error) = confirmed else {
            self.enqueued.jobs += 1;
            failpoint::hit("mid-publish");
            self.progress = Instant::now();
            self.window = (self.window * 2).min(WINDOW);
            self.pauses = Box::new(pauses());
            return Ok(());
        };
        self.again.push_back(message);
        // Of the connection that it went by, which may have been replaced.
        self.take_failure(&by.session, &error)?;
        // Once for all that were on their way.
        if error.failure == Failure::Full && self.unconfirmed.is_empty() {
            tokio::time::sleep(self.pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
        Ok(())
    }

    /// What happens before a message that was not confirmed is sent again.
    fn take_failure(&mut self, session: &Session, error: &CallError) -> Result<(), Fault> {
        let idle = Instant::now() >= self.deadline();
        match error.failure {
            Failure::Full if idle => Err(self.shared.options.server.unreachable(
                "the jobs queue is full, and has been for too long: are workers at work?",
            )),
            Failure::Full => {
                if self.window > 1 {
                    warn!(
                        operation = "enqueue",
                        "the jobs queue is full: waiting for workers"
                    );
                }
                self.window = 1;
                Ok(())
            }
            Failure::Blocked => Err(self.shared.publishing.given_up(session, error)),
            _ if idle => Err(self.shared.publishing.given_up(session, error)),
            _ => {
                session.fail(error);
                Ok(())
            }
        }
    }
}
