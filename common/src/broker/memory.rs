//! The queue inside one process: the same promises, no server.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Broker, DELIVERY_LIMIT, DeadJob, DeadLetter, DeathCause, Delivery, Enqueued, Entries, Event,
    LedgerEntry, Notice, Position, ProducerLock, Receipt, Settlement, Waiting,
};
use crate::fault::Fault;
use crate::job::Job;

/// A [`Broker`] in memory. Clones share one queue.
#[derive(Clone, Debug, Default)]
pub struct MemoryBroker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts the jobs that became ready, so that a consumer that found none can wait for more.
    ready: watch::Sender<u64>,
    /// The ledger's length.
    recorded: watch::Sender<usize>,
    producer: Arc<Semaphore>,
    announcements: broadcast::Sender<Notice>,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Message>,
    /// How many messages wait for their pause to end.
    retry: u64,
    dead: VecDeque<Message>,
    /// How many streams of deliveries there are.
    consumers: u64,
    ledger: Vec<LedgerEntry>,
}

/// A stream of deliveries, counted while it is there.
#[derive(Debug)]
struct Consumer(Arc<Shared>);

impl Drop for Consumer {
    fn drop(&mut self) {
        self.0.state().consumers -= 1;
    }
}

#[derive(Clone, Debug)]
struct Message {
    job: Job,
    attempt: u32,
    waits: u32,
    /// How often it came back unsettled.
    returns: u32,
    enqueued: OffsetDateTime,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            ready: watch::Sender::new(0),
            recorded: watch::Sender::new(0),
            producer: Arc::new(Semaphore::new(1)),
            announcements: broadcast::Sender::new(64),
            closed: CancellationToken::new(),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing that holds this lock can panic")
    }

    fn record(&self, at: OffsetDateTime, event: Event) {
        let length = {
            let mut state = self.state();
            state.ledger.push(LedgerEntry { at, event });
            state.ledger.len()
        };
        // Two recorders may arrive here in the wrong order; the length must not shrink.
        self.recorded
            .send_modify(|known| *known = length.max(*known));
    }

    fn push(&self, message: Message) {
        self.state().ready.push_back(message);
        self.ready.send_modify(|count| *count += 1);
    }

    fn dead_letter(&self, message: Message, cause: DeathCause) {
        let job = message.job.clone();
        let event = Event::Dead(DeadJob { job, cause });
        let enqueued = message.enqueued;
        self.state().dead.push_back(message);
        self.record(enqueued, event);
    }

    fn open(&self) -> Result<(), Fault> {
        if self.closed.is_cancelled() {
            return Err(Fault::infra("the memory broker is closed"));
        }
        Ok(())
    }

    /// The place in the ledger that `from` means.
    fn place(&self, from: Position) -> usize {
        let state = self.state();
        match from {
            Position::Start => 0,
            Position::Since(since) => state.ledger.partition_point(|entry| entry.at < since),
            Position::Now => state.ledger.len(),
        }
    }

    /// Takes back what its consumer dropped, as RabbitMQ does: to the front, counted, and dead
    /// when it comes back too often.
    fn take_back(&self, mut message: Message) {
        message.returns += 1;
        if message.returns > DELIVERY_LIMIT {
            self.dead_letter(message, DeathCause::DeliveryLimit);
            return;
        }
        self.state().ready.push_front(message);
        self.ready.send_modify(|count| *count += 1);
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn enqueue(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault> {
        self.shared.open()?;
        let mut enqueued = Enqueued::default();
        let mut jobs = pin!(jobs);
        while let Some(job) = jobs.next().await {
            let now = OffsetDateTime::now_utc();
            // Ledger first: no outcome may come before its job.
            self.shared.record(now, Event::Job(job.clone()));
            self.shared.push(Message {
                job,
                attempt: 0,
                waits: 0,
                returns: 0,
                enqueued: now,
            });
            enqueued.jobs += 1;
        }
        Ok(enqueued)
    }

    async fn deliveries_until(
        &self,
        prefetch: u16,
        until: CancellationToken,
    ) -> Result<BoxStream<'static, Delivery>, Fault> {
        self.shared.open()?;
        let loans = Arc::new(Semaphore::new(prefetch.into()));
        let ready = self.shared.ready.subscribe();
        self.shared.state().consumers += 1;
        let consumer = Consumer(Arc::clone(&self.shared));
        let stream = stream::unfold(
            (consumer, loans, ready),
            |(consumer, loans, mut ready)| async move {
                let shared = &consumer.0;
                let permit = Arc::clone(&loans).acquire_owned().await.ok()?;
                let message = loop {
                    // Marked as seen before looking, so that what comes in between wakes us.
                    ready.borrow_and_update();
                    let message = shared.state().ready.pop_front();
                    match message {
                        Some(message) => break message,
                        None => ready.changed().await.ok()?,
                    }
                };
                let receipt = MemoryReceipt {
                    shared: Arc::downgrade(shared),
                    message: Some(message.clone()),
                    _permit: permit,
                };
                let delivery = Delivery::new(
                    message.job,
                    message.attempt,
                    message.waits,
                    message.returns,
                    message.enqueued,
                    Box::new(receipt),
                );
                Some((delivery, (consumer, loans, ready)))
            },
        );
        let closed = self.shared.closed.clone();
        Ok(stream
            .take_until(until.cancelled_owned())
            .take_until(closed.cancelled_owned())
            .boxed())
    }

    async fn record(&self, event: &Event) -> Result<(), Fault> {
        self.shared.open()?;
        self.shared.record(OffsetDateTime::now_utc(), event.clone());
        Ok(())
    }

    async fn events(&self, from: Position) -> Result<Entries, Fault> {
        self.shared.open()?;
        let next = self.shared.place(from);
        let recorded = self.shared.recorded.subscribe();
        let stream = stream::unfold(
            (Arc::clone(&self.shared), recorded, next),
            |(shared, mut recorded, next)| async move {
                recorded.wait_for(|length| *length > next).await.ok()?;
                let entry = shared.state().ledger[next].clone();
                Some((Ok(entry), (shared, recorded, next + 1)))
            },
        );
        let closed = self.shared.closed.clone();
        Ok(stream.take_until(closed.cancelled_owned()).boxed())
    }

    async fn history(&self, from: Position) -> Result<Entries, Fault> {
        let (next, end) = (self.shared.place(from), self.shared.place(Position::Now));
        let events = self.events(from).await?;
        Ok(events.take(end - next).boxed())
    }

    async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault> {
        self.shared.open()?;
        let permit = Arc::clone(&self.shared.producer).try_acquire_owned();
        // It cannot be lost: there is no server to be cut off from.
        let lost = CancellationToken::new();
        Ok(permit.ok().map(|permit| ProducerLock::new(lost, permit)))
    }

    async fn waiting(&self) -> Result<Waiting, Fault> {
        self.shared.open()?;
        let state = self.shared.state();
        Ok(Waiting {
            ready: state.ready.len() as u64,
            retry: state.retry,
            dead: state.dead.len() as u64,
            workers: state.consumers,
        })
    }

    async fn dead_letters(&self) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault> {
        self.shared.open()?;
        let letters: Vec<_> = self.shared.state().dead.drain(..).collect();
        let letters = letters.into_iter().map(|message| {
            let receipt = DeadReceipt {
                shared: Arc::downgrade(&self.shared),
                message: Some(message.clone()),
            };
            Ok(DeadLetter::new(
                message.job.id(),
                Ok(message.job.clone()),
                message.job.encode(),
                message.attempt,
                Some(message.enqueued),
                Box::new(receipt),
            ))
        });
        // All are made now, so that those that are never looked at go back too.
        Ok(stream::iter(letters.collect::<Vec<_>>()).boxed())
    }

    async fn announce(&self, notice: &Notice) -> Result<(), Fault> {
        self.shared.open()?;
        // An error means that nobody listens.
        _ = self.shared.announcements.send(notice.clone());
        Ok(())
    }

    async fn announcements(&self) -> Result<BoxStream<'static, Notice>, Fault> {
        self.shared.open()?;
        let announced = self.shared.announcements.subscribe();
        let stream = stream::unfold(announced, |mut announced| async move {
            loop {
                match announced.recv().await {
                    Ok(notice) => return Some((notice, announced)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        });
        let closed = self.shared.closed.clone();
        Ok(stream.take_until(closed.cancelled_owned()).boxed())
    }

    fn loan_limit(&self) -> Option<Duration> {
        None
    }

    fn retry_after(&self, wish: Duration) -> Duration {
        wish
    }

    async fn probe(&self) -> Result<(), Fault> {
        self.shared.open()
    }

    async fn close(&self) {
        self.shared.closed.cancel();
    }
}

#[derive(Debug)]
struct MemoryReceipt {
    /// Weak, so that deliveries in hand do not keep a broker alive that nobody holds any more.
    shared: Weak<Shared>,
    /// `None` once settled.
    message: Option<Message>,
    _permit: OwnedSemaphorePermit,
}

#[async_trait]
impl Receipt for MemoryReceipt {
    async fn settle(mut self: Box<Self>, settlement: Settlement) -> Result<(), Fault> {
        let (Some(message), Some(shared)) = (self.message.take(), self.shared.upgrade()) else {
            return Err(Fault::infra("the memory broker is gone"));
        };
        match settlement {
            Settlement::Done => {}
            Settlement::Dead => shared.dead_letter(message, DeathCause::Rejected),
            Settlement::Again {
                after,
                attempt,
                waits,
                returns,
            } => {
                let message = Message {
                    job: message.job,
                    attempt,
                    waits,
                    returns,
                    enqueued: message.enqueued,
                };
                shared.state().retry += 1;
                let shared = Arc::downgrade(&shared);
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    if let Some(shared) = shared.upgrade() {
                        shared.state().retry -= 1;
                        shared.push(message);
                    }
                });
            }
        }
        Ok(())
    }
}

impl Drop for MemoryReceipt {
    fn drop(&mut self) {
        if let (Some(message), Some(shared)) = (self.message.take(), self.shared.upgrade()) {
            shared.take_back(message);
        }
    }
}

#[derive(Debug)]
struct DeadReceipt {
    shared: Weak<Shared>,
    /// `None` once removed.
    message: Option<Message>,
}

#[async_trait]
impl Receipt for DeadReceipt {
    async fn settle(mut self: Box<Self>, _: Settlement) -> Result<(), Fault> {
        self.message = None;
        Ok(())
    }
}

impl Drop for DeadReceipt {
    fn drop(&mut self) {
        if let (Some(message), Some(shared)) = (self.message.take(), self.shared.upgrade()) {
            shared.state().dead.push_back(message);
        }
    }
}
