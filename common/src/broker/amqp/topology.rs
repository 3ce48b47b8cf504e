//! The exchanges and queues, under a prefix, and what travels through them.
//!
//! Every line here was tried on RabbitMQ 3.10 and 4.0 before it was written (the project's
//! `tried-topology.md`); the reasons are beside the arguments.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use crate::broker::DELIVERY_LIMIT;
use crate::fault::Fault;

/// The pauses that have a queue. One queue each: a quorum queue expires messages at its head only,
/// so a long pause would hold up the shorter ones behind it.
pub(super) const PAUSES: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(60),
];

/// RabbitMQ's default `consumer_timeout`: how long a delivery may stay unacknowledged.
pub(super) const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// How long dead letters are kept.
const FORTNIGHT: Duration = Duration::from_secs(14 * 24 * 3600);

/// The shortest of the [`PAUSES`] that is at least `wish`; the longest if none is.
pub(super) fn pause_for(wish: Duration) -> Duration {
    let pause = PAUSES.into_iter().find(|pause| *pause >= wish);
    pause.unwrap_or(PAUSES[PAUSES.len() - 1])
}

/// Routing keys.
pub(super) mod key {
    /// To the jobs queue and the ledger.
    pub(in super::super) const JOB: &str = "job";
    /// To the ledger.
    pub(in super::super) const OUTCOME: &str = "outcome";
    /// To the ledger.
    pub(in super::super) const RUN: &str = "run";
    /// Of dead-lettered messages.
    pub(in super::super) const DEAD: &str = "dead";
}

/// Values of a message's property `type`.
pub(super) mod kind {
    /// A job.
    pub(in super::super) const JOB: &str = "job";
    /// An outcome.
    pub(in super::super) const OUTCOME: &str = "outcome";
    /// A job recorded as dead by somebody other than the broker.
    pub(in super::super) const DEAD: &str = "dead";
    /// A notice; the name dates from when all of them were about hosts.
    pub(in super::super) const NOTICE: &str = "host";
    /// A worker's state.
    pub(in super::super) const WORKER: &str = "worker";
    /// A place in the ledger that its writer wants to find again.
    pub(in super::super) const MARK: &str = "mark";
}

/// The names under one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// The exchange of jobs, outcomes and runs; also the prefix itself.
    pub(super) exchange: ShortString,
    pub(super) jobs: ShortString,
    pub(super) ledger: ShortString,
    /// Exchange and queue of dead letters.
    pub(super) dead: ShortString,
    /// The exchange of notices.
    pub(super) notices: ShortString,
    /// The lock: exists while there is a producer.
    pub(super) producer: ShortString,
}

impl Names {
    /// Takes a prefix that is safe in a name and a log.
    pub(super) fn new(prefix: &str) -> Result<Self, Fault> {
        let ok = (1..=100).contains(&prefix.len())
            && prefix
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            // Reserved by RabbitMQ.
            && !prefix.starts_with("amq.");
        if !ok {
            return Err(Fault::infra(
                "a queue prefix is 1 to 100 letters, digits, dots, dashes and underscores, and does not begin with \"amq.\"",
            ));
        }
        let with = |name| format!("{prefix}.{name}").into();
        Ok(Self {
            exchange: prefix.into(),
            jobs: with("jobs"),
            ledger: with("ledger"),
            dead: with("dead"),
            notices: with("hosts"),
            producer: with("producer"),
        })
    }

    /// The queue of one of the [`PAUSES`].
    pub(super) fn retry(&self, pause: Duration) -> ShortString {
        format!("{}.retry.{}s", self.exchange, pause.as_secs()).into()
    }
}

/// Declares everything, in an order that matters.
pub(super) async fn declare(channel: &Channel, names: &Names) -> lapin::Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    for (name, kind) in [
        (&names.exchange, ExchangeKind::Topic),
        (&names.dead, ExchangeKind::Fanout),
        (&names.notices, ExchangeKind::Fanout),
    ] {
        channel
            .exchange_declare(name.clone(), kind, durable, FieldTable::default())
            .await?;
    }

    // Ledger and dead letters before what dead-letters into them: at-least-once keeps a message
    // that has no target, but takes minutes to notice that there is one.
    let ledger = [
        ("x-queue-type", text("stream")),
        ("x-max-age", text("30D")),
        ("x-max-length-bytes", number(1_000_000_000)),
        ("x-stream-max-segment-size-bytes", number(20_000_000)),
    ];
    queue(channel, &names.ledger, &ledger).await?;
    for key in [key::JOB, key::OUTCOME, key::RUN] {
        bind(channel, &names.ledger, &names.exchange, key).await?;
    }
    bind(channel, &names.ledger, &names.dead, key::DEAD).await?;

    let dead = [
        ("x-queue-type", text("quorum")),
        ("x-message-ttl", millis(FORTNIGHT)),
        // Reading a dead letter counts as a delivery, and 4.x deletes it at the 21st where no limit
        // is given. -1, which is none on 4.x, deletes at the first on 3.10.
        ("x-delivery-limit", number(1_000_000)),
    ];
    queue(channel, &names.dead, &dead).await?;
    bind(channel, &names.dead, &names.dead, key::DEAD).await?;

    // Not last: a broker killed right after its first declarations lost the confirmed messages of
    // the quorum queue that was declared last.
    let jobs = [
        ("x-queue-type", text("quorum")),
        ("x-delivery-limit", number(DELIVERY_LIMIT.into())),
        ("x-dead-letter-exchange", text(names.dead.as_str())),
        // Else the dead job's record in the ledger looks like a new job's.
        ("x-dead-letter-routing-key", text(key::DEAD)),
        ("x-dead-letter-strategy", text("at-least-once")),
        // Without it, at-least-once is silently at-most-once.
        ("x-overflow", text("reject-publish")),
    ];
    queue(channel, &names.jobs, &jobs).await?;
    bind(channel, &names.jobs, &names.exchange, key::JOB).await?;

    for pause in PAUSES {
        let retry = [
            ("x-queue-type", text("quorum")),
            ("x-message-ttl", millis(pause)),
            // By the default exchange to the jobs queue alone: the ledger has the job already.
            ("x-dead-letter-exchange", text("")),
            ("x-dead-letter-routing-key", text(names.jobs.as_str())),
            ("x-dead-letter-strategy", text("at-least-once")),
            ("x-overflow", text("reject-publish")),
        ];
        queue(channel, &names.retry(pause), &retry).await?;
    }
    Ok(())
}

/// Fails as the broker does if something is missing: for a user who may not declare.
pub(super) async fn look(channel: &Channel, names: &Names) -> lapin::Result<()> {
    let passive = ExchangeDeclareOptions {
        passive: true,
        ..Default::default()
    };
    for name in [&names.exchange, &names.dead, &names.notices] {
        // The kind is not looked at.
        channel
            .exchange_declare(
                name.clone(),
                ExchangeKind::Fanout,
                passive,
                FieldTable::default(),
            )
            .await?;
    }
    let retries = PAUSES.map(|pause| names.retry(pause));
    for name in [&names.ledger, &names.dead, &names.jobs]
        .into_iter()
        .chain(&retries)
    {
        depth(channel, name).await?;
    }
    Ok(())
}

/// What the broker says of a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueDepth {
    /// Messages that wait for a consumer, without those on loan.
    pub(super) ready: u64,
    pub(super) consumers: u64,
}

/// Asks for the depth of a queue that must exist; if it does not, the broker closes the channel.
pub(super) async fn depth(channel: &Channel, queue: &ShortString) -> lapin::Result<QueueDepth> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let queue = channel
        .queue_declare(queue.clone(), passive, FieldTable::default())
        .await?;
    Ok(QueueDepth {
        ready: queue.message_count().into(),
        consumers: queue.consumer_count().into(),
    })
}

async fn queue(
    channel: &Channel,
    name: &ShortString,
    arguments: &[(&str, AMQPValue)],
) -> lapin::Result<()> {
    let options = QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    channel.queue_declare(name.clone(), options, table).await?;
    Ok(())
}

async fn bind(
    channel: &Channel,
    queue: &ShortString,
    exchange: &ShortString,
    key: &str,
) -> lapin::Result<()> {
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel
        .queue_bind(queue.clone(), exchange.clone(), key.into(), options, none)
        .await
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn number(value: i64) -> AMQPValue {
    AMQPValue::LongLongInt(value)
}

fn millis(value: Duration) -> AMQPValue {
    number(i64::try_from(value.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_checked() {
        for prefix in ["repofleet", "a", "Test-1.b_c"] {
            assert!(Names::new(prefix).is_ok(), "{prefix}");
        }
        for prefix in ["", "a b", "a#", "a/b", "amq.x", "ä", &"x".repeat(101)] {
            assert!(Names::new(prefix).is_err(), "{prefix}");
        }
    }

    #[test]
    fn a_pause_is_never_shorter_than_asked_for_while_a_queue_is_long_enough() {
        let names = Names::new("p").unwrap();
        for (millis, queue) in [
            (0, "p.retry.1s"),
            (1_000, "p.retry.1s"),
            (1_001, "p.retry.2s"),
            (4_000, "p.retry.4s"),
            (4_001, "p.retry.60s"),
            (60_000, "p.retry.60s"),
            (3_600_000, "p.retry.60s"),
        ] {
            let pause = pause_for(Duration::from_millis(millis));
            assert_eq!(names.retry(pause).as_str(), queue, "{millis}");
        }
    }
}
