//! Deliveries: jobs on loan, and their settlement.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::message::Delivery as Incoming;
use lapin::options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions};
use lapin::types::ShortString;
use lapin::{Acker, Channel};
use time::OffsetDateTime;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::properties::{count_of, header, id_of, time_of};
use super::publish::Message;
use super::session::within;
use super::shared::Shared;
use super::subscription::{Queue, Subscription};
use super::topology::{key, kind, pause_for};
use crate::broker::{Delivery, Event, Receipt, Settlement};
use crate::failpoint;
use crate::fault::{Fault, FaultKind};
use crate::job::Job;
use crate::outcome::{Outcome, OutcomeRecord};

/// The pause of a delivery that nobody took before its consumer ended.
const HANDED_BACK: Duration = Duration::from_secs(1);

/// Jobs for one consumer, until the broker is closed, or has delivered what it had before `until`.
pub(super) async fn deliveries(
    shared: &Arc<Shared>,
    prefetch: u16,
    until: CancellationToken,
) -> Result<BoxStream<'static, Delivery>, Fault> {
    let jobs = Jobs {
        subscription: Subscription::start(shared, Queue::Jobs(prefetch)).await?,
        runtime: Handle::current(),
    };
    let stream = stream::unfold((jobs, until), async |(mut jobs, until)| {
        let delivery = jobs.next(&until).await?;
        Some((delivery, (jobs, until)))
    });
    Ok(stream.boxed())
}

struct Jobs {
    subscription: Subscription,
    runtime: Handle,
}

impl Jobs {
    async fn next(&mut self, until: &CancellationToken) -> Option<Delivery> {
        loop {
            let incoming = match until.run_until_cancelled(self.subscription.next()).await {
                Some(incoming) => incoming?,
                None => {
                    self.subscription.cancel().await;
                    self.subscription.next().await?
                }
            };
            let channel = self.subscription.attached.as_ref()?.channel.clone();
            let shared = &self.subscription.shared;
            let jobs = &shared.options.names.jobs;
            let read = shared.read(jobs, incoming, channel, &self.runtime);
            let delivery = read.await;
            if delivery.is_some() {
                return delivery;
            }
        }
    }
}

impl Drop for Jobs {
    /// Takes no more, and hands back what nobody took. Deliveries in hand can still be settled: the
    /// channel stays open until the last is.
    fn drop(&mut self) {
        let shared = Arc::clone(&self.subscription.shared);
        let Some(attached) = self.subscription.attached.take() else {
            return;
        };
        if shared.closed.is_cancelled() {
            return;
        }
        let runtime = self.runtime.clone();
        self.runtime.spawn(async move {
            if let Err(error) = attached.cancel(shared.options.call_limit).await {
                attached.session.fail(error);
                return;
            }
            let (channel, mut consumer) = (attached.channel, attached.consumer);
            // The end of the stream follows the last delivery.
            while let Some(Ok(incoming)) = consumer.next().await {
                let jobs = &shared.options.names.jobs;
                let read = shared.read(jobs, incoming, channel.clone(), &runtime);
                let Some(delivery) = read.await else {
                    continue;
                };
                // Not by a nack: every return counts towards the delivery limit, and a message
                // at the queue's head would meet every restart of every worker.
                let again = Settlement::Again {
                    after: HANDED_BACK,
                    attempt: delivery.attempt,
                    waits: delivery.waits,
                    returns: delivery.returns,
                };
                let id = delivery.job.id();
                if let Err(fault) = delivery.settle(again).await {
                    warn!(
                        operation = "settle",
                        job = id,
                        "{id} was not handed back: {fault}"
                    );
                }
            }
        });
    }
}

impl Shared {
    /// The job in a message. A message that holds none is recorded and dead-lettered here.
    pub(super) async fn read(
        self: &Arc<Self>,
        queue: &ShortString,
        incoming: Incoming,
        channel: Channel,
        runtime: &Handle,
    ) -> Option<Delivery> {
        let headers = incoming.properties.headers().as_ref();
        let attempt = count_of(headers, header::ATTEMPT);
        let waits = count_of(headers, header::WAITS);
        let returns = count_of(headers, header::RETURNS)
            .saturating_add(count_of(headers, header::DELIVERY_COUNT));
        let job = match Job::decode(&incoming.data) {
            Ok(job) => job,
            Err(fault) => {
                self.dead_letter(&incoming, attempt, &fault).await;
                return None;
            }
        };
        let at = time_of(&incoming.properties).unwrap_or_else(OffsetDateTime::now_utc);
        let receipt = AmqpReceipt {
            shared: Arc::clone(self),
            queue: queue.clone(),
            acker: Some(incoming.acker),
            job: job.clone(),
            at,
            counts: (attempt, waits, returns),
            channel,
            runtime: runtime.clone(),
        };
        Some(Delivery {
            job,
            attempt,
            waits,
            returns,
            enqueued: at,
            receipt: Box::new(receipt),
        })
    }

    /// Dead-letters an undecodable message. Its outcome is recorded first: a dead record without
    /// one counts as a job that the broker gave up.
    async fn dead_letter(&self, incoming: &Incoming, attempt: u32, fault: &Fault) {
        let id = id_of(&incoming.properties);
        error!(
            operation = "poison",
            job = id,
            "undecodable message {id:?} ({} bytes) dead-lettered: {fault}",
            incoming.data.len()
        );
        let recorded = self.record_poison(id, attempt, fault).await;
        if let Err(fault) = &recorded {
            warn!(
                operation = "record",
                job = id,
                "the outcome of {id} could not be recorded, so it is requeued: {fault}"
            );
        }
        let headers = incoming.properties.headers().as_ref();
        let waits = count_of(headers, header::WAITS);
        let returns = count_of(headers, header::RETURNS);
        let buried = match recorded {
            Ok(()) => {
                let dead = self
                    .dead_letter_of(id, incoming.data.clone())
                    .counted(attempt, waits, returns)
                    .at(time_of(&incoming.properties).unwrap_or_else(OffsetDateTime::now_utc));
                self.bury(&dead, &incoming.acker).await
            }
            Err(fault) => Err(fault),
        };
        let Err(fault) = buried else {
            return;
        };
        warn!(
            operation = "settle",
            job = id,
            "{id} was not dead-lettered, so it is requeued: {fault}"
        );
        // Kept, it would take another's place.
        let reject = incoming.acker.reject(BasicRejectOptions { requeue: true });
        if let Err(error) = within(self.options.call_limit, "rejecting", reject).await {
            warn!(
                operation = "settle",
                job = id,
                "{id} was not requeued: {error}"
            );
        }
    }

    fn dead_letter_of(&self, id: &str, body: Vec<u8>) -> Message {
        Message::new(
            self.options.names.dead.clone(),
            key::DEAD,
            kind::JOB,
            id,
            body,
        )
    }

    /// Puts a copy of a message among the dead letters and acknowledges the message. Rejected, it would
    /// go there with all that its sender wrote into it: headers of the broker's own that are not what it
    /// expects crash RabbitMQ 3.10's dead-lettering, for every queue of the node.
    async fn bury(&self, dead: &Message, acker: &Acker) -> Result<(), Fault> {
        self.publish(&dead.clone().rejected()).await?;
        let ack = acker.ack(BasicAckOptions::default());
        self.settled("acknowledging", ack).await
    }

    /// Records the outcome of a message that holds no job, if its id says which job it was.
    async fn record_poison(&self, id: &str, attempt: u32, fault: &Fault) -> Result<(), Fault> {
        let Some((run, key)) = Job::parse_id(id) else {
            return Ok(());
        };
        let outcome = Outcome::Failed(FaultKind::Poison);
        let mut record = OutcomeRecord::without_work(key, run, outcome, &fault.message);
        record.attempt = attempt;
        let message = self.event_message(&Event::Outcome(record))?;
        self.publish(&message).await
    }

    /// Makes a call that settles a delivery.
    pub(super) async fn settled(
        &self,
        what: &str,
        call: impl Future<Output = lapin::Result<bool>>,
    ) -> Result<(), Fault> {
        match within(self.options.call_limit, what, call).await {
            Ok(true) => Ok(()),
            // lapin does not take a channel that is gone for an error.
            Ok(false) => Err(self.options.server.unreachable(GONE)),
            Err(error) => Err(self.options.server.unreachable(error)),
        }
    }
}

/// Why a delivery cannot be settled.
const GONE: &str = "the connection of this delivery was lost; the broker delivers it again";

struct AmqpReceipt {
    shared: Arc<Shared>,
    /// The queue that it came from.
    queue: ShortString,
    /// `None` once settled.
    acker: Option<Acker>,
    job: Job,
    /// When the job was enqueued: its later messages say so too.
    at: OffsetDateTime,
    /// Its attempts, waits and returns.
    counts: (u32, u32, u32),
    /// Kept open until all of its deliveries are settled.
    channel: Channel,
    runtime: Handle,
}

impl fmt::Debug for AmqpReceipt {
    /// Without the channel, which shows the user's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpReceipt").finish_non_exhaustive()
    }
}

impl AmqpReceipt {
    /// Publishes the job to a queue, by the default exchange: the ledger has it already.
    async fn copy_to(
        &self,
        queue: ShortString,
        (attempt, waits, returns): (u32, u32, u32),
    ) -> Result<(), Fault> {
        let (id, body) = (self.job.id(), self.job.encode());
        let message = Message::new("".into(), queue, kind::JOB, &id, body)
            .at(self.at)
            .counted(attempt, waits, returns);
        self.shared.publish(&message).await
    }
}

#[async_trait]
impl Receipt for AmqpReceipt {
    async fn settle(mut self: Box<Self>, settlement: Settlement) -> Result<(), Fault> {
        let Some(acker) = self.acker.clone().filter(Acker::usable) else {
            return Err(self.shared.options.server.unreachable(GONE));
        };
        // A copy is confirmed, and only then the message acknowledged: a crash in between makes a second
        // copy, which costs one look at the store.
        match settlement {
            Settlement::Again {
                after,
                attempt,
                waits,
                returns,
            } => {
                let retry = self.shared.options.names.retry(pause_for(after));
                self.copy_to(retry, (attempt, waits, returns)).await?;
                failpoint::hit("after-retry-publish");
            }
            Settlement::Back => {
                self.copy_to(self.queue.clone(), self.counts).await?;
                failpoint::hit("after-put-back");
            }
            Settlement::Done | Settlement::Dead => {}
        }
        match settlement {
            Settlement::Done | Settlement::Again { .. } | Settlement::Back => {
                let ack = acker.ack(BasicAckOptions::default());
                self.shared.settled("acknowledging", ack).await?;
            }
            Settlement::Dead => {
                let (attempt, waits, returns) = self.counts;
                let dead = self
                    .shared
                    .dead_letter_of(&self.job.id(), self.job.encode())
                    .counted(attempt, waits, returns)
                    .at(self.at);
                self.shared.bury(&dead, &acker).await?;
            }
        }
        self.acker = None;
        Ok(())
    }
}

impl Drop for AmqpReceipt {
    fn drop(&mut self) {
        let Some(acker) = self.acker.take() else {
            return;
        };
        if !acker.usable() {
            return;
        }
        let limit = self.shared.options.call_limit;
        let channel = self.channel.clone();
        self.runtime.spawn(async move {
            let requeue = BasicNackOptions {
                requeue: true,
                ..Default::default()
            };
            // Where this fails the connection is gone, and the job goes back with it.
            _ = within(limit, "handing back", acker.nack(requeue)).await;
            drop(channel);
        });
    }
}
