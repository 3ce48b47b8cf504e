//! The queue boundary: who works on what, and what became of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::job::Job;
use crate::outcome::OutcomeRecord;

pub mod memory;

/// A broker as the programs hold it.
pub type SharedBroker = Arc<dyn Broker>;

/// Delivers each job at least once, to one worker at a time, and remembers what became of it.
///
/// What every implementation promises, and `testing::broker_contract` checks:
/// - a job that was enqueued is delivered until it is settled; a delivery that is dropped
///   unsettled goes back and is delivered again;
/// - a delivery is on loan to one consumer only;
/// - every job enqueued and every event recorded is in the ledger, in the order of the calls of
///   one caller, and a follower sees it exactly as it was recorded;
/// - one [`ProducerLock`] exists at a time.
#[async_trait]
pub trait Broker: fmt::Debug + Send + Sync {
    /// Takes jobs; returns once each is safely with the broker.
    async fn enqueue(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault>;

    /// Jobs on loan, at most `prefetch` of them unsettled at a time. Ends only with the broker.
    async fn deliveries(&self, prefetch: u16) -> Result<BoxStream<'static, Delivery>, Fault>;

    /// Appends to the ledger; returns once the event is safely there.
    async fn record(&self, event: &Event) -> Result<(), Fault>;

    /// The ledger from `from` on, and then as it grows. Ends only with the broker.
    async fn events(&self, from: Position) -> Result<BoxStream<'static, Event>, Fault>;

    /// Makes this process the one producer; `None` while another is.
    async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault>;
}

/// How many jobs a call of [`Broker::enqueue`] took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enqueued {
    /// Jobs that are safely with the broker.
    pub jobs: u64,
}

/// Where to begin to read the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// At its oldest event.
    Start,
    /// After its newest event.
    Now,
}

/// An entry of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A job was enqueued.
    Job(Job),
    /// A job ended.
    Outcome(OutcomeRecord),
    /// The broker itself gave a job up: delivered too often without being settled. Where there is
    /// an [`Event::Outcome`] too, that one counts.
    Dead(Job),
}

/// How often a job that is delivered again and again without being settled comes back before
/// the broker gives it up: the last line of defence against a job that kills its worker.
pub const DELIVERY_LIMIT: u32 = 8;

/// A job on loan. Settling consumes it; dropped unsettled, it goes back to the queue.
#[derive(Debug)]
pub struct Delivery {
    /// What to do.
    pub job: Job,
    /// Earlier attempts that count against the job.
    pub attempt: u32,
    /// How often it was sent to wait for a throttling host.
    pub waits: u32,
    receipt: Box<dyn Receipt>,
}

impl Delivery {
    /// For implementations of [`Broker`].
    pub fn new(job: Job, attempt: u32, waits: u32, receipt: Box<dyn Receipt>) -> Self {
        Self {
            job,
            attempt,
            waits,
            receipt,
        }
    }

    /// Says what is to become of the job. An error means that the broker does not know of it: the
    /// job may be delivered again.
    pub async fn settle(self, settlement: Settlement) -> Result<(), Fault> {
        self.receipt.settle(settlement).await
    }
}

/// What an implementation of [`Broker`] keeps to settle a delivery. Dropping it unused must return
/// the job.
#[async_trait]
pub trait Receipt: fmt::Debug + Send + Sync {
    /// See [`Delivery::settle`].
    async fn settle(self: Box<Self>, settlement: Settlement) -> Result<(), Fault>;
}

/// What becomes of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Its outcome is recorded; it is never seen again.
    Done,
    /// Deliver it again, not before this long from now, with these counts.
    Again {
        /// The pause.
        after: Duration,
        /// [`Delivery::attempt`] of the next delivery.
        attempt: u32,
        /// [`Delivery::waits`] of the next delivery.
        waits: u32,
    },
    /// To the dead letters.
    Dead,
}

/// Being the one producer, until dropped.
#[derive(Debug)]
pub struct ProducerLock {
    _release: Box<dyn Send + Sync + fmt::Debug>,
}

impl ProducerLock {
    /// For implementations of [`Broker`]: dropping `release` gives the lock back.
    pub fn new(release: impl Send + Sync + fmt::Debug + 'static) -> Self {
        Self {
            _release: Box::new(release),
        }
    }
}
