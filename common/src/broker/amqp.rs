//! RabbitMQ, 3.10 and later. The only user of lapin.
//!
//! `topology` says what is declared, `session` keeps connections alive, `subscription` keeps
//! consumers attached to them, and `publish`, `consume`, `waiting`, `ledger`, `dead_letters`, `announce` and
//! `lock` each do one part of [`Broker`] on top of these. Publishing and consuming have a connection
//! each: a broker that runs out of memory blocks the publishing one, and acknowledgements must still
//! get through.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::BoxStream;
use tokio_util::sync::CancellationToken;

use self::options::Options;
use self::properties::json;
use self::publish::Message;
use self::session::Link;
use self::shared::Shared;
use self::topology::{PAUSES, key, kind};
use super::{
    Backlog, Broker, DeadLetter, Delivery, Enqueued, Entries, Event, Notice, Position,
    ProducerLock, Waiting,
};
use crate::fault::Fault;
use crate::job::Job;

pub mod options;

mod topology;

mod session;

mod shared;

mod properties;

mod subscription;

mod publish;

mod consume;

mod waiting;

mod ledger;

mod dead_letters;

mod announce;

mod lock;

/// A [`Broker`] on RabbitMQ.
#[derive(Debug)]
pub struct AmqpBroker {
    shared: Arc<Shared>,
}

impl AmqpBroker {
    /// [`Broker::loan_limit`] unless an option says otherwise; needs no connection.
    pub const LOAN_LIMIT: Duration = topology::CONSUMER_TIMEOUT;

    /// How long a job settled as [`Settlement::Again`](super::Settlement::Again) after `wish` really waits.
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

    async fn take_waiting(
        &self,
        until: CancellationToken,
    ) -> Result<BoxStream<'static, Result<Delivery, Fault>>, Fault> {
        Ok(waiting::jobs(Arc::clone(&self.shared), until))
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

    async fn backlog(&self) -> Result<Backlog, Fault> {
        let deadline = Instant::now() + self.shared.options.call_limit;
        let jobs = &self.shared.options.names.jobs;
        let depth = self.shared.depth(jobs, deadline).await?;
        Ok(Backlog {
            ready: depth.ready,
            workers: depth.consumers,
        })
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

    fn system(&self) -> &'static str {
        "rabbitmq"
    }

    fn loan_limit(&self) -> Option<Duration> {
        Some(self.shared.options.loan_limit)
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
