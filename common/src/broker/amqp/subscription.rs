//! Consumers that outlive their connections: attach, read, and after a loss attach again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use lapin::message::Delivery as Incoming;
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer};
use tracing::debug;

use super::session::{CallError, Failure, Link, Session, within};
use super::shared::Shared;
use super::topology::Names;
use crate::fault::Fault;
use crate::retry;

/// Pauses before attaching again grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Notices that are in this process's memory at once: a sender may send them as fast, and as large, as
/// the broker accepts.
const NOTICES_AT_ONCE: u16 = 2;
/// Most notices, and most bytes of them, that the broker keeps for this process.
const NOTICES_WAITING: i32 = 1000;
const NOTICE_BYTES_WAITING: i32 = 16 << 20;

/// What a subscription reads.
#[derive(Clone, Debug)]
pub(super) enum Queue {
    /// Jobs, at most so many unsettled at a time.
    Jobs(u16),
    /// The ledger from an offset on, at most so many records unacknowledged at a time: a stream is
    /// not read without a bound.
    Ledger(AMQPValue, u16),
    /// Notices, by a queue of its own that goes with the connection.
    Notices,
    /// The lock: nothing ever comes; the consumer ends with the queue or the connection.
    Lock,
}

/// Why a subscription is not attached.
#[derive(Debug)]
pub(super) enum Unattached {
    /// The ledger does not exist.
    Missing,
    /// Another connection has the lock.
    Locked,
    /// The broker cannot be used, or was closed.
    Fault(Fault),
}

/// A consumer, over as many connections as it takes.
pub(super) struct Subscription {
    pub(super) shared: Arc<Shared>,
    link: Arc<Link>,
    pub(super) queue: Queue,
    pub(super) attached: Option<Attached>,
    /// It ends after what was delivered already.
    cancelled: bool,
    /// Before it attaches again; `None` while a message is the last thing that came.
    pauses: Option<Pauses>,
}

type Pauses = Box<dyn Iterator<Item = Duration> + Send>;

/// A consumer on a channel of its own, which stays open while deliveries hold a clone of it.
pub(super) struct Attached {
    pub(super) session: Arc<Session>,
    pub(super) channel: Channel,
    pub(super) consumer: Consumer,
}

impl Attached {
    /// Ends the consumer after what was delivered already.
    pub(super) async fn cancel(&self, limit: Duration) -> Result<(), CallError> {
        let tag = self.consumer.tag();
        let cancel = self
            .channel
            .basic_cancel(tag, BasicCancelOptions::default());
        within(limit, "cancelling a consumer", cancel).await
    }
}

impl Subscription {
    pub(super) fn new(shared: &Arc<Shared>, link: &Arc<Link>, queue: Queue) -> Self {
        Self {
            shared: Arc::clone(shared),
            link: Arc::clone(link),
            queue,
            attached: None,
            cancelled: false,
            pauses: None,
        }
    }

    /// Attaches within the broker's patience, by the consuming connection.
    pub(super) async fn start(shared: &Arc<Shared>, queue: Queue) -> Result<Self, Fault> {
        let mut this = Self::new(shared, &shared.consuming, queue);
        let deadline = Some(shared.deadline());
        loop {
            match this.attach(deadline).await {
                Ok(()) => return Ok(this),
                Err(Unattached::Fault(fault)) => return Err(fault),
                // Declared again with the next connection.
                Err(Unattached::Missing | Unattached::Locked) => {}
            }
        }
    }

    /// Attaches, unless it is attached; tries again for ever, or until `deadline`.
    pub(super) async fn attach(&mut self, deadline: Option<Instant>) -> Result<(), Unattached> {
        while self.attached.is_none() {
            if let Some(pauses) = &mut self.pauses {
                let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.link.closed().cancelled() => {}
                }
            } else {
                self.pauses = Some(Box::new(retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE)));
            }
            let session = self.link.session(deadline).await;
            let session = session.map_err(Unattached::Fault)?;
            let limit = self.shared.options.call_limit;
            let consuming = self
                .queue
                .consume(&session, &self.shared.options.names, limit);
            let error = match consuming.await {
                Ok((channel, consumer)) => {
                    self.attached = Some(Attached {
                        session,
                        channel,
                        consumer,
                    });
                    return Ok(());
                }
                Err(error) => error,
            };
            debug!(operation = "broker", "{error}");
            match (&self.queue, error.failure) {
                (Queue::Lock, Failure::Locked) => return Err(Unattached::Locked),
                // Jobs are on loan through the same connection, and they matter more.
                (Queue::Notices, _) => session.fail_if_lost(&error),
                // What is missing is declared again with the next connection.
                _ => session.fail(&error),
            }
            if matches!(self.queue, Queue::Ledger(..)) && error.failure == Failure::Missing {
                return Err(Unattached::Missing);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let fault = self.shared.options.server.unreachable(error);
                return Err(Unattached::Fault(fault));
            }
        }
        Ok(())
    }

    /// The next message of the consumer that is attached; `None` when that is lost.
    pub(super) async fn receive(&mut self) -> Option<Incoming> {
        let attached = self.attached.as_mut()?;
        let incoming = tokio::select! {
            incoming = attached.consumer.next() => incoming,
            () = attached.session.failed.cancelled() => None,
            () = self.link.closed().cancelled() => None,
        };
        match incoming {
            Some(Ok(incoming)) => {
                self.pauses = None;
                return Some(incoming);
            }
            Some(Err(error)) => attached.session.fail_if_lost(error),
            None => attached
                .session
                .fail_if_lost("the broker ended the consumer"),
        }
        self.attached = None;
        None
    }

    /// Ends the subscription after what was delivered already.
    pub(super) async fn cancel(&mut self) {
        if std::mem::replace(&mut self.cancelled, true) {
            return;
        }
        if let Some(attached) = &self.attached
            && let Err(error) = attached.cancel(self.shared.options.call_limit).await
        {
            attached.session.fail(error);
        }
    }

    /// The next message; `None` once the broker is closed, or after the last one of a subscription
    /// that was cancelled.
    pub(super) async fn next(&mut self) -> Option<Incoming> {
        loop {
            if self.cancelled && self.attached.is_none() {
                return None;
            }
            if let Err(Unattached::Fault(_)) = self.attach(None).await {
                return None;
            }
            if let Some(incoming) = self.receive().await {
                return Some(incoming);
            }
        }
    }

    /// Gives up a consumer that is silent; whether its connection still answers. One that does not
    /// is given up too.
    pub(super) async fn give_up(&mut self) -> bool {
        let Some(attached) = self.attached.take() else {
            return false;
        };
        let opened = attached.session.channel().await;
        opened.map_err(|error| attached.session.fail(error)).is_ok()
    }
}

impl Queue {
    async fn consume(
        &self,
        session: &Session,
        names: &Names,
        limit: Duration,
    ) -> Result<(Channel, Consumer), CallError> {
        let channel = session.channel().await?;
        let options = BasicConsumeOptions::default();
        let mut arguments = FieldTable::default();
        // Of this connection alone. Such queues must be classic and transient, which 4.x allows.
        let mut exclusive = QueueDeclareOptions {
            exclusive: true,
            ..Default::default()
        };
        let consuming = async {
            let none = FieldTable::default;
            let queue = match self {
                Self::Jobs(prefetch) => {
                    prefetched(&channel, *prefetch).await?;
                    names.jobs.clone()
                }
                Self::Ledger(offset, prefetch) => {
                    prefetched(&channel, *prefetch).await?;
                    arguments.insert("x-stream-offset".into(), offset.clone());
                    names.ledger.clone()
                }
                Self::Notices => {
                    prefetched(&channel, NOTICES_AT_ONCE).await?;
                    exclusive.auto_delete = true;
                    // The oldest are dropped.
                    let mut bounds = none();
                    bounds.insert("x-max-length".into(), NOTICES_WAITING.into());
                    bounds.insert("x-max-length-bytes".into(), NOTICE_BYTES_WAITING.into());
                    // The broker chooses its name.
                    let queue = channel.queue_declare("".into(), exclusive, bounds).await?;
                    let (queue, notices) = (queue.name().clone(), names.notices.clone());
                    let bind = QueueBindOptions::default();
                    channel
                        .queue_bind(queue.clone(), notices, "".into(), bind, none())
                        .await?;
                    queue
                }
                Self::Lock => {
                    let lock = names.producer.clone();
                    channel
                        .queue_declare(lock.clone(), exclusive, none())
                        .await?;
                    lock
                }
            };
            channel
                .basic_consume(queue, "".into(), options, arguments)
                .await
        };
        let what = match self {
            Self::Jobs(_) => "consuming jobs",
            Self::Ledger(..) => "reading the ledger",
            Self::Notices => "listening to notices",
            Self::Lock => "taking the producer's lock",
        };
        let consumer = within(limit, what, consuming).await?;
        Ok((channel, consumer))
    }
}

async fn prefetched(channel: &Channel, count: u16) -> lapin::Result<()> {
    channel.basic_qos(count, BasicQosOptions::default()).await
}
