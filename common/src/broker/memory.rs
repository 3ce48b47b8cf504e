//! The queue inside one process: the same promises, no server.

use std::collections::{BTreeMap, VecDeque};
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
    Backlog, Broker, DELIVERY_LIMIT, DeadJob, DeadLetter, DeathCause, Delivery, Enqueued, Entries,
    Event, LedgerEntry, Notice, Position, ProducerLock, Receipt, Settlement, Waiting,
};
use crate::fault::Fault;
use crate::job::Job;

/// A [`Broker`] in memory. Clones share one queue.
#[derive(Clone, Debug, Default)]
pub struct MemoryBroker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    queues: Mutex<Queues>,
    /// Counts the jobs that became ready, so that a consumer that found none can wait for more.
    ready: watch::Sender<u64>,
    /// The ledger's length.
    recorded: watch::Sender<usize>,
    producer: Arc<Semaphore>,
    announcements: broadcast::Sender<Notice>,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct Queues {
    ready: VecDeque<Message>,
    /// Messages that wait for their pause to end, and how long it is.
    retry: BTreeMap<u64, (Message, Duration)>,
    /// How many pauses there have been.
    pauses: u64,
    dead: VecDeque<Message>,
    /// How many streams of deliveries there are.
    consumers: u64,
    ledger: Vec<LedgerEntry>,
}

/// A stream of deliveries, counted while it is there.
#[derive(Debug)]
struct Consumer(Arc<Inner>);

impl Drop for Consumer {
    fn drop(&mut self) {
        self.0.queues().consumers -= 1;
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

impl Default for Inner {
    fn default() -> Self {
        Self {
            queues: Mutex::default(),
            ready: watch::Sender::new(0),
            recorded: watch::Sender::new(0),
            producer: Arc::new(Semaphore::new(1)),
            announcements: broadcast::Sender::new(64),
            closed: CancellationToken::new(),
        }
    }
}

impl Inner {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues
            .lock()
            .expect("nothing that holds this lock can panic")
    }

    fn record(&self, at: OffsetDateTime, event: Event) {
        let length = {
            let mut queues = self.queues();
            queues.ledger.push(LedgerEntry { at, event });
            queues.ledger.len()
        };
        // Two recorders may arrive here in the wrong order; the length must not shrink.
        self.recorded
            .send_modify(|known| *known = length.max(*known));
    }

    fn push(&self, message: Message) {
        self.queues().ready.push_back(message);
        self.ready.send_modify(|count| *count += 1);
    }

    fn dead_letter(&self, message: Message, cause: DeathCause) {
        let job = message.job.clone();
        let event = Event::Dead(DeadJob { job, cause });
        let enqueued = message.enqueued;
        self.queues().dead.push_back(message);
        self.record(enqueued, event);
    }

    fn take_letter(self: &Arc<Self>) -> Option<DeadLetter> {
        let message = self.queues().dead.pop_front()?;
        let job = message.job.clone();
        let (payload, at) = (job.encode(), Some(message.enqueued));
        let attempt = message.attempt;
        let receipt = MemoryReceipt {
            inner: Arc::downgrade(self),
            message: Some(message),
            loan: Loan::Letter,
        };
        let receipt = Box::new(receipt);
        Some(DeadLetter::new(
            job.id(),
            Ok(job),
            payload,
            attempt,
            at,
            receipt,
        ))
    }

    /// Takes the job in this pause, or without one the first that is ready.
    fn take_waiting(self: &Arc<Self>, pause: Option<u64>) -> Option<Delivery> {
        let mut queues = self.queues();
        let (message, loan) = match pause {
            Some(number) => {
                let (message, pause) = queues.retry.remove(&number)?;
                (message, Loan::Paused(pause))
            }
            None => (queues.ready.pop_front()?, Loan::Ready(None)),
        };
        drop(queues);
        Some(self.delivery(message, loan))
    }

    fn delivery(self: &Arc<Self>, message: Message, loan: Loan) -> Delivery {
        let receipt = MemoryReceipt {
            inner: Arc::downgrade(self),
            message: Some(message.clone()),
            loan,
        };
        Delivery {
            job: message.job,
            attempt: message.attempt,
            waits: message.waits,
            returns: message.returns,
            enqueued: message.enqueued,
            receipt: Box::new(receipt),
        }
    }

    /// Makes a message ready after a pause, unless somebody takes it meanwhile.
    fn pause(self: &Arc<Self>, message: Message, pause: Duration) {
        let number = {
            let mut queues = self.queues();
            queues.pauses += 1;
            let number = queues.pauses;
            queues.retry.insert(number, (message, pause));
            number
        };
        let inner = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let Some(inner) = inner.upgrade() else {
                return;
            };
            let paused = inner.queues().retry.remove(&number);
            if let Some((message, _)) = paused {
                inner.push(message);
            }
        });
    }

    fn open(&self) -> Result<(), Fault> {
        if self.closed.is_cancelled() {
            return Err(Fault::infra("the memory broker is closed"));
        }
        Ok(())
    }

    /// The index in the ledger that `from` means.
    fn index(&self, from: Position) -> usize {
        let queues = self.queues();
        match from {
            Position::Start => 0,
            Position::Since(since) => queues.ledger.partition_point(|entry| entry.at < since),
            Position::Now => queues.ledger.len(),
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
        self.queues().ready.push_front(message);
        self.ready.send_modify(|count| *count += 1);
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn enqueue(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault> {
        self.inner.open()?;
        let mut enqueued = Enqueued::default();
        let mut jobs = pin!(jobs);
        while let Some(job) = jobs.next().await {
            let now = OffsetDateTime::now_utc();
            // Ledger first: no outcome may come before its job.
            self.inner.record(now, Event::Job(job.clone()));
            self.inner.push(Message {
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
        self.inner.open()?;
        let loans = Arc::new(Semaphore::new(prefetch.into()));
        let ready = self.inner.ready.subscribe();
        self.inner.queues().consumers += 1;
        let consumer = Consumer(Arc::clone(&self.inner));
        let stream = stream::unfold(
            (consumer, loans, ready),
            |(consumer, loans, mut ready)| async move {
                let inner = &consumer.0;
                let permit = Arc::clone(&loans).acquire_owned().await.ok()?;
                let message = loop {
                    // Marked as seen before looking, so that what comes in between wakes us.
                    ready.borrow_and_update();
                    let message = inner.queues().ready.pop_front();
                    match message {
                        Some(message) => break message,
                        None => ready.changed().await.ok()?,
                    }
                };
                let delivery = inner.delivery(message, Loan::Ready(Some(permit)));
                Some((delivery, (consumer, loans, ready)))
            },
        );
        let closed = self.inner.closed.clone();
        Ok(stream
            .take_until(until.cancelled_owned())
            .take_until(closed.cancelled_owned())
            .boxed())
    }

    async fn take_waiting(
        &self,
        until: CancellationToken,
    ) -> Result<BoxStream<'static, Result<Delivery, Fault>>, Fault> {
        self.inner.open()?;
        let waiting: Vec<_> = {
            let queues = self.inner.queues();
            let paused = queues.retry.keys().copied().map(Some);
            paused.chain(queues.ready.iter().map(|_| None)).collect()
        };
        let inner = Arc::clone(&self.inner);
        let taken = waiting.into_iter();
        let taken = taken.filter_map(move |pause| inner.take_waiting(pause));
        let taken = stream::iter(taken.map(Ok));
        Ok(taken.take_until(until.cancelled_owned()).boxed())
    }

    async fn record(&self, event: &Event) -> Result<(), Fault> {
        self.inner.open()?;
        self.inner.record(OffsetDateTime::now_utc(), event.clone());
        Ok(())
    }

    async fn events(&self, from: Position) -> Result<Entries, Fault> {
        self.inner.open()?;
        let next = self.inner.index(from);
        let recorded = self.inner.recorded.subscribe();
        let stream = stream::unfold(
            (Arc::clone(&self.inner), recorded, next),
            |(inner, mut recorded, next)| async move {
                recorded.wait_for(|length| *length > next).await.ok()?;
                let entry = inner.queues().ledger[next].clone();
                Some((Ok(entry), (inner, recorded, next + 1)))
            },
        );
        let closed = self.inner.closed.clone();
        Ok(stream.take_until(closed.cancelled_owned()).boxed())
    }

    async fn history(&self, from: Position) -> Result<Entries, Fault> {
        let (next, end) = (self.inner.index(from), self.inner.index(Position::Now));
        let events = self.events(from).await?;
        Ok(events.take(end - next).boxed())
    }

    async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault> {
        self.inner.open()?;
        let permit = Arc::clone(&self.inner.producer).try_acquire_owned();
        // It cannot be lost: there is no server to be cut off from.
        let lost = CancellationToken::new();
        Ok(permit.ok().map(|permit| ProducerLock::new(lost, permit)))
    }

    async fn waiting(&self) -> Result<Waiting, Fault> {
        self.inner.open()?;
        let queues = self.inner.queues();
        Ok(Waiting {
            ready: queues.ready.len() as u64,
            retry: queues.retry.len() as u64,
            dead: queues.dead.len() as u64,
            workers: queues.consumers,
        })
    }

    async fn backlog(&self) -> Result<Backlog, Fault> {
        self.inner.open()?;
        let queues = self.inner.queues();
        Ok(Backlog {
            ready: queues.ready.len() as u64,
            workers: queues.consumers,
        })
    }

    async fn dead_letters(&self) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault> {
        self.inner.open()?;
        let count = self.inner.queues().dead.len();
        let inner = Arc::clone(&self.inner);
        // Each is taken when it is asked for; those that are dropped go behind these.
        let letters = (0..count).map_while(move |_| inner.take_letter());
        Ok(stream::iter(letters.map(Ok)).boxed())
    }

    async fn announce(&self, notice: &Notice) -> Result<(), Fault> {
        self.inner.open()?;
        // An error means that nobody listens.
        _ = self.inner.announcements.send(notice.clone());
        Ok(())
    }

    async fn announcements(&self) -> Result<BoxStream<'static, Notice>, Fault> {
        self.inner.open()?;
        let announced = self.inner.announcements.subscribe();
        let stream = stream::unfold(announced, |mut announced| async move {
            loop {
                match announced.recv().await {
                    Ok(notice) => return Some((notice, announced)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        });
        let closed = self.inner.closed.clone();
        Ok(stream.take_until(closed.cancelled_owned()).boxed())
    }

    fn system(&self) -> &'static str {
        "memory"
    }

    fn loan_limit(&self) -> Option<Duration> {
        None
    }

    async fn probe(&self) -> Result<(), Fault> {
        self.inner.open()
    }

    async fn close(&self) {
        self.inner.closed.cancel();
    }
}

#[derive(Debug)]
struct MemoryReceipt {
    /// Weak, so that deliveries in hand do not keep a broker alive that nobody holds any more.
    inner: Weak<Inner>,
    /// `None` once settled.
    message: Option<Message>,
    loan: Loan,
}

/// Where a message on loan was.
#[derive(Debug)]
enum Loan {
    /// Ready; the permit counts against a consumer's prefetch.
    Ready(#[expect(dead_code, reason = "dropped with the loan")] Option<OwnedSemaphorePermit>),
    /// In a pause of this length.
    Paused(Duration),
    /// Among the dead letters.
    Letter,
}

#[async_trait]
impl Receipt for MemoryReceipt {
    async fn settle(mut self: Box<Self>, settlement: Settlement) -> Result<(), Fault> {
        let (Some(message), Some(inner)) = (self.message.take(), self.inner.upgrade()) else {
            return Err(Fault::infra("the memory broker is gone"));
        };
        match settlement {
            Settlement::Done => {}
            Settlement::Dead => inner.dead_letter(message, DeathCause::Rejected),
            Settlement::Back => match self.loan {
                Loan::Ready(_) => inner.push(message),
                Loan::Paused(pause) => inner.pause(message, pause),
                Loan::Letter => inner.queues().dead.push_back(message),
            },
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
                inner.pause(message, after);
            }
        }
        Ok(())
    }
}

impl Drop for MemoryReceipt {
    fn drop(&mut self) {
        if let (Some(message), Some(inner)) = (self.message.take(), self.inner.upgrade()) {
            match self.loan {
                Loan::Ready(_) | Loan::Paused(_) => inner.take_back(message),
                Loan::Letter => inner.queues().dead.push_back(message),
            }
        }
    }
}
