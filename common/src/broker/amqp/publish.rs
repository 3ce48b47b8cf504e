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

use super::session::{Session, Unanswered};
use super::topology::{key, kind};
use super::{Shared, header};
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

/// A message as it is published, once or more often.
#[derive(Clone, Debug)]
pub(super) struct Message {
    exchange: ShortString,
    routing_key: ShortString,
    /// To come back when no queue takes it.
    mandatory: bool,
    body: Vec<u8>,
    properties: BasicProperties,
}

impl Message {
    /// `kind` is the property `type`; `at` is what the message says of its age.
    pub(super) fn new(
        exchange: ShortString,
        routing_key: ShortString,
        kind: &str,
        id: &str,
        at: OffsetDateTime,
        body: Vec<u8>,
    ) -> Self {
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_type(kind.into())
            .with_timestamp(u64::try_from(at.unix_timestamp()).unwrap_or_default())
            .with_app_id("repofleet".into());
        // An id that is too long to be one is left out: it only helps people.
        let properties = match ShortString::try_new(id) {
            Ok(id) => properties.with_message_id(id),
            Err(_) => properties,
        };
        Self {
            exchange,
            routing_key,
            mandatory: true,
            body,
            properties,
        }
    }

    /// Not an error where there is nobody, and not kept on a disk.
    pub(super) fn for_whoever_listens(mut self) -> Self {
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
}

/// Why a message is not safely with the broker. It may be there all the same.
#[derive(Debug)]
enum Unconfirmed {
    /// The broker would not take it: a queue is full.
    Full,
    /// The broker did not say.
    Unanswered(Unanswered),
}

impl From<Unanswered> for Unconfirmed {
    fn from(why: Unanswered) -> Self {
        Self::Unanswered(why)
    }
}

impl Unconfirmed {
    fn broken(why: String) -> Self {
        Self::Unanswered(Unanswered::Broken(why))
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
    ) -> Result<PublisherConfirm, Unanswered> {
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

    /// `Ack(None)` is the only success: an unroutable message comes back as `Ack(Some(…))`.
    async fn confirmed(
        &self,
        confirm: PublisherConfirm,
        deadline: Instant,
    ) -> Result<(), Unconfirmed> {
        let confirmed = self.session.answered(deadline, "a confirm", confirm);
        match confirmed.await? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(returned)) => Err(Unconfirmed::broken(format!(
                "a message found no queue: {} {}",
                returned.reply_code, returned.reply_text
            ))),
            Confirmation::Nack(_) => Err(Unconfirmed::Full),
            Confirmation::NotRequested => Err(Unconfirmed::broken(
                "the channel does not confirm".to_owned(),
            )),
        }
    }

    /// Publishes one message, once.
    async fn publish(&self, message: &Message, deadline: Instant) -> Result<(), Unconfirmed> {
        let confirm = self.send(message, deadline).await?;
        self.confirmed(confirm, deadline).await
    }

    /// Leaves the channel to the next one. What has not been sent yet, as while the broker takes
    /// nothing, is still sent by it.
    fn give_back(self) -> Arc<Session> {
        self.session.give_back(self.channel);
        self.session
    }
}

/// A message, what it went by, and its confirm.
type Sent = (Message, Publisher, Result<(), Unconfirmed>);

impl Shared {
    /// What to publish with, until `deadline`.
    async fn publisher(&self, deadline: Instant) -> Result<Publisher, Fault> {
        loop {
            let session = self.publishing.session(Some(deadline)).await?;
            match session.confirming(deadline).await {
                Ok(channel) => return Ok(Publisher { session, channel }),
                Err(Unanswered::Broken(why)) => session.fail(&why),
                Err(blocked) => return Err(self.unanswered(&session, blocked)),
            }
        }
    }

    /// Publishes one message until it is confirmed, or patience ends.
    pub(super) async fn publish(&self, message: &Message) -> Result<(), Fault> {
        let deadline = self.deadline();
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            let publisher = self.publisher(deadline).await?;
            let published = publisher.publish(message, deadline).await;
            let session = publisher.give_back();
            let fault = match published {
                Ok(()) => return Ok(()),
                Err(Unconfirmed::Full) => self.server.unreachable("a queue is full"),
                Err(Unconfirmed::Unanswered(why)) => self.unanswered(&session, why),
            };
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            if Instant::now() + pause >= deadline {
                return Err(fault);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Publishes all jobs until each is confirmed, or there was no progress for too long.
    pub(super) async fn publish_all(
        &self,
        mut jobs: BoxStream<'_, Job>,
    ) -> Result<Enqueued, Fault> {
        let mut enqueued = Enqueued::default();
        let mut again = VecDeque::new();
        let mut waiting = FuturesUnordered::<BoxFuture<'_, Sent>>::new();
        let mut exhausted = false;
        // One at a time while the queue is full, since the ledger keeps a copy of each that is
        // refused; more again as soon as it takes them.
        let mut window = WINDOW;
        let mut progress = Instant::now();
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        let mut publisher = self.publisher(self.deadline()).await?;
        loop {
            // From the last progress on.
            let deadline = progress + self.options.patience;
            if publisher.session.failed.is_cancelled() {
                publisher = self.publisher(deadline).await?;
                if publisher.session.jobs_were_missing {
                    return Err(self.jobs_lost());
                }
            }
            let room = waiting.len() < window;
            let message = tokio::select! {
                biased;
                Some((message, by, confirmed)) = waiting.next(), if !waiting.is_empty() => {
                    match confirmed {
                        Ok(()) => {
                            enqueued.jobs += 1;
                            failpoint::hit("mid-publish");
                            progress = Instant::now();
                            window = (window * 2).min(WINDOW);
                            pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
                            continue;
                        }
                        Err(why) => {
                            again.push_back(message);
                            let full = matches!(why, Unconfirmed::Full);
                            // Of the connection that it went by, which may have been replaced.
                            self.after_refusal(&by.session, why, deadline, &mut window)?;
                            // Once for all that were on their way.
                            if full && waiting.is_empty() {
                                tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
                            }
                            continue;
                        }
                    }
                }
                message = async { again.pop_front() }, if room && !again.is_empty() => message,
                job = jobs.next(), if room && again.is_empty() && !exhausted => {
                    exhausted = job.is_none();
                    job.map(|job| self.job_message(&job))
                }
                else => None,
            };
            let Some(message) = message else {
                if exhausted && again.is_empty() && waiting.is_empty() {
                    break;
                }
                continue;
            };
            match publisher.send(&message, deadline).await {
                Ok(confirm) => {
                    let by = publisher.clone();
                    let confirmed = async move {
                        let confirmed = by.confirmed(confirm, deadline).await;
                        (message, by, confirmed)
                    };
                    waiting.push(confirmed.boxed());
                }
                Err(why) => {
                    again.push_front(message);
                    self.after_refusal(&publisher.session, why.into(), deadline, &mut window)?;
                }
            }
        }
        self.jobs_exist(&publisher.session).await?;
        publisher.give_back();
        Ok(enqueued)
    }

    /// What is to be done before a message that was not confirmed is published again.
    fn after_refusal(
        &self,
        session: &Session,
        why: Unconfirmed,
        deadline: Instant,
        window: &mut usize,
    ) -> Result<(), Fault> {
        let idle = Instant::now() >= deadline;
        match why {
            Unconfirmed::Unanswered(Unanswered::Broken(why)) if !idle => {
                session.fail(&why);
                Ok(())
            }
            Unconfirmed::Unanswered(why) => Err(self.unanswered(session, why)),
            Unconfirmed::Full if idle => Err(self.server.unreachable(
                "the jobs queue is full, and has been for too long: are workers at work?",
            )),
            Unconfirmed::Full => {
                if *window > 1 {
                    warn!(
                        operation = "enqueue",
                        "the jobs queue is full: waiting for workers"
                    );
                }
                *window = 1;
                Ok(())
            }
        }
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
            match session.look(deadline, self.names.jobs()).await {
                Ok(_) => return Ok(()),
                // Missing, or only a connection that broke: the next one says which.
                Err(Unanswered::Broken(why)) => session.fail(&why),
                Err(blocked) => return Err(self.unanswered(&session, blocked)),
            }
        }
    }

    fn jobs_lost(&self) -> Fault {
        self.server.unreachable(
            "the jobs queue was deleted while jobs were published; run the producer again: it finds what is missing",
        )
    }

    /// To the jobs queue and the ledger, with one confirm for both.
    fn job_message(&self, job: &Job) -> Message {
        Message::new(
            self.names.exchange(),
            key::JOB.into(),
            kind::JOB,
            &job.id(),
            OffsetDateTime::now_utc(),
            job.encode(),
        )
        .counted(0, 0, 0)
    }
}
