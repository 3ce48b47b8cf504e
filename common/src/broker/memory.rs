//! The queue inside one process: the same promises, no server.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{
    Broker, DELIVERY_LIMIT, Delivery, Enqueued, Event, Position, ProducerLock, Receipt, Settlement,
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
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Message>,
    ledger: Vec<Event>,
}

#[derive(Clone, Debug)]
struct Message {
    job: Job,
    attempt: u32,
    waits: u32,
    /// How often it came back unsettled.
    returns: u32,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            ready: watch::Sender::new(0),
            recorded: watch::Sender::new(0),
            producer: Arc::new(Semaphore::new(1)),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing that holds this lock can panic")
    }

    fn record(&self, event: Event) {
        let length = {
            let mut state = self.state();
            state.ledger.push(event);
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

    /// Takes back what its consumer dropped, as RabbitMQ does: to the front, counted, and dead
    /// when it comes back too often.
    fn take_back(&self, mut message: Message) {
        message.returns += 1;
        if message.returns > DELIVERY_LIMIT {
            self.record(Event::Dead(message.job));
            return;
        }
        self.state().ready.push_front(message);
        self.ready.send_modify(|count| *count += 1);
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn enqueue(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault> {
        let mut enqueued = Enqueued::default();
        let mut jobs = pin!(jobs);
        while let Some(job) = jobs.next().await {
            // Ledger first: no outcome may come before its job.
            self.shared.record(Event::Job(job.clone()));
            self.shared.push(Message {
                job,
                attempt: 0,
                waits: 0,
                returns: 0,
            });
            enqueued.jobs += 1;
        }
        Ok(enqueued)
    }

    async fn deliveries(&self, prefetch: u16) -> Result<BoxStream<'static, Delivery>, Fault> {
        let loans = Arc::new(Semaphore::new(prefetch.into()));
        let ready = self.shared.ready.subscribe();
        let stream = stream::unfold(
            (Arc::clone(&self.shared), loans, ready),
            |(shared, loans, mut ready)| async move {
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
                    shared: Arc::downgrade(&shared),
                    message: Some(message.clone()),
                    _permit: permit,
                };
                let delivery = Delivery::new(
                    message.job,
                    message.attempt,
                    message.waits,
                    Box::new(receipt),
                );
                Some((delivery, (shared, loans, ready)))
            },
        );
        Ok(stream.boxed())
    }

    async fn record(&self, event: &Event) -> Result<(), Fault> {
        self.shared.record(event.clone());
        Ok(())
    }

    async fn events(&self, from: Position) -> Result<BoxStream<'static, Event>, Fault> {
        let next = match from {
            Position::Start => 0,
            Position::Now => self.shared.state().ledger.len(),
        };
        let recorded = self.shared.recorded.subscribe();
        let stream = stream::unfold(
            (Arc::clone(&self.shared), recorded, next),
            |(shared, mut recorded, next)| async move {
                recorded.wait_for(|length| *length > next).await.ok()?;
                let event = shared.state().ledger[next].clone();
                Some((event, (shared, recorded, next + 1)))
            },
        );
        Ok(stream.boxed())
    }

    async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault> {
        let permit = Arc::clone(&self.shared.producer).try_acquire_owned();
        Ok(permit.ok().map(ProducerLock::new))
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
            Settlement::Done | Settlement::Dead => {}
            Settlement::Again {
                after,
                attempt,
                waits,
            } => {
                let message = Message {
                    job: message.job,
                    attempt,
                    waits,
                    returns: 0,
                };
                let shared = Arc::downgrade(&shared);
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    if let Some(shared) = shared.upgrade() {
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
