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

/// The pauses there is a queue for. One queue for each: a quorum queue expires messages at its head
/// only, so a long pause in front would hold up a short one behind it.
pub(super) const PAUSES: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(60),
];

/// How long a delivery may stay unacknowledged, as RabbitMQ is set by default (`consumer_timeout`).
pub(super) const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// The shortest of the [`PAUSES`] that is at least `wish`; the longest if none is.
pub(super) fn pause_for(wish: Duration) -> Duration {
    let pause = PAUSES.into_iter().find(|pause| *pause >= wish);
    pause.unwrap_or(PAUSES[PAUSES.len() - 1])
}

/// Routing keys of the one exchange.
pub(super) mod key {
    /// To the jobs queue and the ledger.
    pub(in super::super) const JOB: &str = "job";
    /// To the ledger.
    pub(in super::super) const OUTCOME: &str = "outcome";
    /// To the ledger.
    pub(in super::super) const RUN: &str = "run";
    /// What a message that died comes with, through the exchange of the dead letters.
    pub(in super::super) const DEAD: &str = "dead";
}

/// Values of a message's property `type`.
pub(super) mod kind {
    /// A job.
    pub(in super::super) const JOB: &str = "job";
    /// An outcome.
    pub(in super::super) const OUTCOME: &str = "outcome";
    /// A job that was recorded as given up by other means than the broker's own.
    pub(in super::super) const DEAD: &str = "dead";
    /// An announcement about a host.
    pub(in super::super) const HOST: &str = "host";
    /// A worker's state.
    pub(in super::super) const WORKER: &str = "worker";
    /// A place in the ledger that its writer wants to find again.
    pub(in super::super) const MARK: &str = "mark";
}

/// The names under one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    prefix: String,
}

impl Names {
    /// Takes a prefix that is safe in a name and a log.
    pub(super) fn new(prefix: &str) -> Result<Self, Fault> {
        let ok = (1..=100).contains(&prefix.len())
            && prefix
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            // RabbitMQ keeps such names for itself.
            && !prefix.starts_with("amq.");
        if !ok {
            return Err(Fault::infra(
                "a queue prefix is 1 to 100 letters, digits, dots, dashes and underscores, and does not begin with \"amq.\"",
            ));
        }
        Ok(Self {
            prefix: prefix.to_owned(),
        })
    }

    pub(super) fn exchange(&self) -> ShortString {
        self.prefix.as_str().into()
    }

    pub(super) fn jobs(&self) -> ShortString {
        self.with("jobs")
    }

    pub(super) fn ledger(&self) -> ShortString {
        self.with("ledger")
    }

    /// Of the dead letters: an exchange and a queue of one name.
    pub(super) fn dead(&self) -> ShortString {
        self.with("dead")
    }

    /// The exchange of announcements about hosts.
    pub(super) fn hosts(&self) -> ShortString {
        self.with("hosts")
    }

    /// Exists while somebody is the producer.
    pub(super) fn producer(&self) -> ShortString {
        self.with("producer")
    }

    /// The queue of one of the [`PAUSES`].
    pub(super) fn retry(&self, pause: Duration) -> ShortString {
        self.with(&format!("retry.{}s", pause.as_secs()))
    }

    /// The queue in which a message waits at least `after`; the longest where none is long enough.
    pub(super) fn retry_after(&self, after: Duration) -> ShortString {
        self.retry(pause_for(after))
    }

    fn with(&self, name: &str) -> ShortString {
        format!("{}.{name}", self.prefix).into()
    }
}

/// Declares everything, in an order that matters.
pub(super) async fn declare(channel: &Channel, names: &Names) -> lapin::Result<()> {
    let (exchange, dead) = (names.exchange(), names.dead());
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    channel
        .exchange_declare(
            exchange.clone(),
            ExchangeKind::Topic,
            durable,
            FieldTable::default(),
        )
        .await?;
    channel
        .exchange_declare(
            dead.clone(),
            ExchangeKind::Fanout,
            durable,
            FieldTable::default(),
        )
        .await?;

    channel
        .exchange_declare(
            names.hosts(),
            ExchangeKind::Fanout,
            durable,
            FieldTable::default(),
        )
        .await?;

    // Ledger and dead letters before what dead-letters into them: at-least-once keeps a message
    // that has no target, but takes minutes to notice that there is one.
    let ledger = names.ledger();
    queue(
        channel,
        ledger.clone(),
        &[
            ("x-queue-type", text("stream")),
            ("x-max-age", text("30D")),
            ("x-max-length-bytes", number(1_000_000_000)),
            ("x-stream-max-segment-size-bytes", number(20_000_000)),
        ],
    )
    .await?;
    for key in [key::JOB, key::OUTCOME, key::RUN] {
        bind(channel, ledger.clone(), exchange.clone(), key).await?;
    }
    bind(channel, ledger, dead.clone(), key::DEAD).await?;

    let fortnight = Duration::from_secs(14 * 24 * 3600);
    queue(
        channel,
        dead.clone(),
        &[
            ("x-queue-type", text("quorum")),
            ("x-message-ttl", millis(fortnight)),
            // Looking at a dead letter counts as a delivery, and 4.x deletes it at the 21st where
            // no limit is given. -1, which is none on 4.x, deletes at the first on 3.10.
            ("x-delivery-limit", number(1_000_000)),
        ],
    )
    .await?;
    bind(channel, dead.clone(), dead.clone(), key::DEAD).await?;

    // Not last: a broker killed right after its first declarations lost the confirmed messages of
    // the quorum queue that was declared last.
    queue(
        channel,
        names.jobs(),
        &[
            ("x-queue-type", text("quorum")),
            ("x-delivery-limit", number(DELIVERY_LIMIT.into())),
            ("x-dead-letter-exchange", text(dead.as_str())),
            // Else the dead job's record in the ledger looks like a new job's.
            ("x-dead-letter-routing-key", text(key::DEAD)),
            ("x-dead-letter-strategy", text("at-least-once")),
            // Without it, at-least-once is silently at-most-once.
            ("x-overflow", text("reject-publish")),
        ],
    )
    .await?;
    bind(channel, names.jobs(), exchange, key::JOB).await?;

    for pause in PAUSES {
        queue(
            channel,
            names.retry(pause),
            &[
                ("x-queue-type", text("quorum")),
                ("x-message-ttl", millis(pause)),
                // By the default exchange to the jobs queue alone: the ledger has the job already.
                ("x-dead-letter-exchange", text("")),
                ("x-dead-letter-routing-key", text(names.jobs().as_str())),
                ("x-dead-letter-strategy", text("at-least-once")),
                ("x-overflow", text("reject-publish")),
            ],
        )
        .await?;
    }
    Ok(())
}

/// What the broker says of a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Messages that wait for somebody; those on loan do not count.
    pub(super) ready: u64,
    pub(super) consumers: u64,
}

/// Looks at a queue that must exist; its absence closes the channel.
pub(super) async fn look(channel: &Channel, queue: ShortString) -> lapin::Result<Look> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let queue = channel
        .queue_declare(queue, passive, FieldTable::default())
        .await?;
    Ok(Look {
        ready: queue.message_count().into(),
        consumers: queue.consumer_count().into(),
    })
}

async fn queue(
    channel: &Channel,
    name: ShortString,
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
    channel.queue_declare(name, options, table).await?;
    Ok(())
}

async fn bind(
    channel: &Channel,
    queue: ShortString,
    exchange: ShortString,
    key: &str,
) -> lapin::Result<()> {
    channel
        .queue_bind(
            queue,
            exchange,
            key.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
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
            let after = Duration::from_millis(millis);
            assert_eq!(names.retry_after(after).as_str(), queue, "{millis}");
        }
    }
}
