//! Deliveries: jobs on loan, and what becomes of them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::message::Delivery as Incoming;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    BasicRejectOptions,
};
use lapin::types::FieldTable;
use lapin::{Acker, Channel, Consumer};
use time::OffsetDateTime;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::publish::Message;
use super::session::{Session, within};
use super::topology::kind;
use super::{Shared, count_of, header, id_of, time_of};
use crate::broker::{Delivery, Event, Receipt, Settlement};
use crate::failpoint;
use crate::fault::{Fault, FaultKind};
use crate::job::Job;
use crate::outcome::{Outcome, OutcomeRecord};

/// The pause of a delivery that nobody took before its consumer ended.
const HANDED_BACK: Duration = Duration::from_secs(1);

/// Jobs for one consumer, over as many connections as it takes.
pub(super) async fn deliveries(
    shared: Arc<Shared>,
    prefetch: u16,
    until: CancellationToken,
) -> Result<BoxStream<'static, Delivery>, Fault> {
    let session = shared.consuming.session(Some(shared.deadline())).await?;
    let mut consuming = Consuming {
        live: None,
        shared,
        prefetch,
        until,
        cancelled: false,
        runtime: Handle::current(),
    };
    let attached = consuming.attach(session).await;
    attached.map_err(|why| consuming.shared.server.unreachable(&why))?;
    let stream = stream::unfold(consuming, |mut consuming| async move {
        let delivery = consuming.next().await?;
        Some((delivery, consuming))
    });
    Ok(stream.boxed())
}

#[derive(Debug)]
struct Consuming {
    shared: Arc<Shared>,
    prefetch: u16,
    live: Option<Live>,
    /// Cancelled when the broker is to deliver no more.
    until: CancellationToken,
    /// The broker has been asked to deliver no more.
    cancelled: bool,
    runtime: Handle,
}

/// A consumer on a channel of its own. The channel stays while there are deliveries of it.
#[derive(Debug)]
struct Live {
    session: Arc<Session>,
    channel: Channel,
    consumer: Consumer,
}

impl Live {
    /// Ends the stream after what was delivered already.
    async fn cancel(&self, limit: Duration) -> Result<(), String> {
        let cancel = self
            .channel
            .basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
        within(limit, "cancelling a consumer", cancel).await
    }
}

impl Consuming {
    async fn attach(&mut self, session: Arc<Session>) -> Result<(), String> {
        let limit = self.shared.options.call_limit;
        let attached = async {
            let channel = session.channel().await?;
            let qos = channel.basic_qos(self.prefetch, BasicQosOptions::default());
            within(limit, "setting the prefetch", qos).await?;
            let consume = channel.basic_consume(
                self.shared.names.jobs(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            );
            let consumer = within(limit, "consuming jobs", consume).await?;
            Ok::<_, String>((channel, consumer))
        };
        match attached.await {
            Ok((channel, consumer)) => {
                self.live = Some(Live {
                    session,
                    channel,
                    consumer,
                });
                Ok(())
            }
            Err(why) => {
                // A new connection declares anew what may be missing.
                session.fail(&why);
                Err(why)
            }
        }
    }

    /// `None` when the broker was closed, or has delivered what it had before `until`.
    async fn next(&mut self) -> Option<Delivery> {
        loop {
            let Some(live) = &mut self.live else {
                let session = self.shared.consuming.session(None);
                let session = self.until.run_until_cancelled(session).await?.ok()?;
                // It was logged, and the next connection waits longer.
                _ = self.attach(session).await;
                continue;
            };
            let incoming = tokio::select! {
                incoming = live.consumer.next() => incoming,
                () = live.session.failed.cancelled() => None,
                () = self.shared.closed.cancelled() => return None,
                () = self.until.cancelled(), if !self.cancelled => {
                    self.cancelled = true;
                    let limit = self.shared.options.call_limit;
                    if let Err(why) = live.cancel(limit).await {
                        self.lost(&why);
                    }
                    continue;
                }
            };
            match incoming {
                Some(Ok(incoming)) => {
                    let channel = live.channel.clone();
                    if let Some(delivery) = self.shared.read(incoming, channel, &self.runtime).await
                    {
                        return Some(delivery);
                    }
                }
                Some(Err(error)) => self.lost(&error.to_string()),
                None if self.cancelled => {
                    self.live = None;
                    return None;
                }
                // Outside of a shutdown this is always a loss: of the connection, or of the queue.
                None => self.lost("the broker ended the consumer"),
            }
        }
    }

    fn lost(&mut self, why: &str) {
        if let Some(live) = self.live.take() {
            let why = format!("jobs are no longer delivered: {why}");
            live.session.fail(&why);
        }
    }
}

impl Drop for Consuming {
    /// Takes no more, and hands back what nobody took. Deliveries in hand can still be settled: the
    /// channel stays open until the last is.
    fn drop(&mut self) {
        let Some(live) = self.live.take() else {
            return;
        };
        if self.shared.closed.is_cancelled() {
            return;
        }
        let (shared, runtime) = (Arc::clone(&self.shared), self.runtime.clone());
        self.runtime.spawn(async move {
            if let Err(why) = live.cancel(shared.options.call_limit).await {
                live.session.fail(&why);
                return;
            }
            let Live {
                channel,
                mut consumer,
                ..
            } = live;
            // The end of the stream follows the last delivery.
            while let Some(Ok(incoming)) = consumer.next().await {
                let Some(delivery) = shared.read(incoming, channel.clone(), &runtime).await else {
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
    /// The job in a message. One that holds none is recorded and buried here.
    async fn read(
        self: &Arc<Self>,
        incoming: Incoming,
        channel: Channel,
        runtime: &Handle,
    ) -> Option<Delivery> {
        let headers = incoming.properties.headers().as_ref();
        let attempt = count_of(headers, header::ATTEMPT);
        let waits = count_of(headers, header::WAITS);
        let returns = count_of(headers, header::RETURNS)
            .saturating_add(count_of(headers, header::DELIVERY_COUNT));
        match Job::decode(&incoming.data) {
            Ok(job) => {
                let receipt = AmqpReceipt {
                    shared: Arc::clone(self),
                    acker: Some(incoming.acker),
                    job: job.clone(),
                    at: time_of(&incoming.properties).unwrap_or_else(OffsetDateTime::now_utc),
                    _channel: channel,
                    runtime: runtime.clone(),
                };
                let enqueued = receipt.at;
                Some(Delivery::new(
                    job,
                    attempt,
                    waits,
                    returns,
                    enqueued,
                    Box::new(receipt),
                ))
            }
            Err(fault) => {
                self.bury(&incoming, attempt, &fault).await;
                None
            }
        }
    }

    /// The outcome first, so that the dead record finds it there and does not count as a job that
    /// the broker killed.
    async fn bury(&self, incoming: &Incoming, attempt: u32, fault: &Fault) {
        let id = id_of(&incoming.properties);
        error!(
            operation = "poison",
            job = id,
            "a message that is no job goes to the dead letters ({id:?}, {} bytes): {fault}",
            incoming.data.len()
        );
        let recorded = self.record_poison(id, attempt, fault).await;
        if let Err(fault) = &recorded {
            warn!(
                operation = "record",
                job = id,
                "the outcome of {id} could not be recorded, so it comes again: {fault}"
            );
        }
        // Handed back where it was not recorded: kept, it would take another's place.
        let requeue = recorded.is_err();
        let reject = incoming.acker.reject(BasicRejectOptions { requeue });
        if let Err(why) = within(self.options.call_limit, "rejecting", reject).await {
            warn!(
                operation = "settle",
                job = id,
                "{id} was not rejected: {why}"
            );
        }
    }

    /// The outcome of a message that holds no job, as far as its id says which job it was.
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
}

struct AmqpReceipt {
    shared: Arc<Shared>,
    /// `None` once settled.
    acker: Option<Acker>,
    job: Job,
    /// When the job was enqueued: its later messages say so too.
    at: OffsetDateTime,
    /// Kept open until all of its deliveries are settled.
    _channel: Channel,
    runtime: Handle,
}

impl fmt::Debug for AmqpReceipt {
    /// Without the channel, which shows the user's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpReceipt").finish_non_exhaustive()
    }
}

#[async_trait]
impl Receipt for AmqpReceipt {
    async fn settle(mut self: Box<Self>, settlement: Settlement) -> Result<(), Fault> {
        let gone = "the delivery's connection was lost; the job is delivered again";
        let Some(acker) = self.acker.clone().filter(Acker::usable) else {
            return Err(self.shared.server.unreachable(gone));
        };
        if let Settlement::Again {
            after,
            attempt,
            waits,
            returns,
        } = settlement
        {
            // Confirmed, and only then acknowledged: a crash in between makes a second copy, which
            // the store's look at what it has makes harmless.
            let message = Message::new(
                "".into(),
                self.shared.names.retry_after(after),
                kind::JOB,
                &self.job.id(),
                self.at,
                self.job.encode(),
            )
            .counted(attempt, waits, returns);
            self.shared.publish(&message).await?;
            failpoint::hit("after-retry-publish");
        }
        let limit = self.shared.options.call_limit;
        let settled = match settlement {
            Settlement::Done | Settlement::Again { .. } => {
                within(
                    limit,
                    "acknowledging",
                    acker.ack(BasicAckOptions::default()),
                )
                .await
            }
            Settlement::Dead => {
                let reject = acker.reject(BasicRejectOptions { requeue: false });
                within(limit, "rejecting", reject).await
            }
        };
        match settled {
            Ok(true) => {
                self.acker = None;
                Ok(())
            }
            // So says lapin of a channel that is gone: it is not an error to it.
            Ok(false) => Err(self.shared.server.unreachable(gone)),
            Err(why) => Err(self.shared.server.unreachable(&why)),
        }
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
        let channel = self._channel.clone();
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
