//! How fast jobs get into the queue, and the ledger out of it.
//!
//! `cargo run --release -p common --features testing --example queue-speed [JOBS]` starts a private
//! RabbitMQ, or uses the one that `REPOFLEET_TEST_AMQP_URL` names, and prints the times.

use std::time::Instant;

use anyhow::{Context, Result};
use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::{Broker, Position, Settlement};
use common::ids::RunId;
use common::outcome::Outcome;
use futures::stream;
use futures::{StreamExt, TryStreamExt};
use testing::broker_contract::{job, outcome};
use testing::rabbitmq;

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the figures are what it is for")]
async fn main() -> Result<()> {
    let jobs = match std::env::args().nth(1) {
        Some(jobs) => jobs.parse().context("the number of jobs")?,
        None => 24_500,
    };
    let options = Options::new(&rabbitmq::shared_url(), &rabbitmq::fresh_prefix())?;
    let broker = AmqpBroker::connect(options).await?;
    let run = RunId::new();

    let report = |what: &str, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        let rate = f64::from(jobs) / seconds;
        println!("{what}: {jobs} in {seconds:.2} s, {rate:.0}/s");
    };
    let start = Instant::now();
    let all = stream::iter((0..jobs).map(|n| job(&run, n as usize)));
    broker.enqueue(all.boxed()).await?;
    report("enqueued and confirmed", start);

    let start = Instant::now();
    let history = broker.history(Position::Start).await?;
    let read = history
        .try_fold(0_u32, async |count, _| Ok(count + 1))
        .await?;
    anyhow::ensure!(read == jobs, "{read} of {jobs} are in the ledger");
    report("ledger read", start);

    let start = Instant::now();
    let slots = 64;
    let deliveries = broker.deliveries(slots).await?;
    let done = deliveries.take(jobs as usize).map(|delivery| async {
        let ended = outcome(&delivery.job, Outcome::Processed);
        broker.record(&ended).await?;
        delivery.settle(Settlement::Done).await
    });
    done.buffer_unordered(slots.into())
        .try_for_each(async |()| Ok(()))
        .await?;
    report(
        "delivered, outcome recorded, acknowledged, 64 at a time",
        start,
    );

    let start = Instant::now();
    let history = broker.history(Position::Start).await?;
    let read = history
        .try_fold(0_u32, async |count, _| Ok(count + 1))
        .await?;
    anyhow::ensure!(read == 2 * jobs, "{read} of {} are in the ledger", 2 * jobs);
    report("ledger of jobs and outcomes read", start);
    broker.close().await;
    Ok(())
}
