//! A worker of a fleet: takes jobs from RabbitMQ until it is stopped.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::broker::{BrokerConfig, SharedBroker};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::shutdown::Shutdown;
use common::store::{SharedStore, StoreConfig};
use common::telemetry::http::MetricsConfig;
use common::telemetry::metrics::Metrics;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::consume::{LONGEST_HOLD, Worker, own_name};
use crate::digest::DigestLimits;
use crate::fetch::policy::FetchConfig;
use crate::slot::SlotConfig;
use crate::slot::slots::Slots;

/// How long to wait for a broker at the start: as good as for ever, since one that is still
/// starting is the ordinary case.
const PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long RabbitMQ lends a job at most is thirty minutes. `--timeout` and `--drain` have to fit in
/// there, after a job has waited for machine and store, and storing the digest too.
const LONGEST_JOB: u64 = 25 * 60 - LONGEST_HOLD.as_secs();
/// Seconds between looks at whether this worker can work.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// How long such a look may take.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// How long a store in a bucket may take to show what it can do.
const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// How a worker of a fleet works.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
Examples:
  BROKER_URL=amqp://guest:guest@localhost worker run --store ./digests
  BROKER_URL=amqp://rabbit STORE_URL=s3://digests worker run --concurrency 2 --metrics-addr 0.0.0.0:9090")]
pub struct RunConfig {
    #[command(flatten)]
    broker: BrokerConfig,
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    slot: SlotConfig,
    #[command(flatten)]
    fetch: FetchConfig,
    #[command(flatten)]
    drain: DrainConfig,
    #[command(flatten)]
    metrics: MetricsConfig,
}

/// How a worker stops.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Stopping")]
pub struct DrainConfig {
    /// Seconds that jobs in hand may go on after SIGTERM or SIGINT.
    #[arg(
        long,
        env = "DRAIN",
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(..=86_400)
    )]
    drain: u64,
}

impl DrainConfig {
    /// As a duration.
    pub fn duration(&self) -> Duration {
        Duration::from_secs(self.drain)
    }
}

impl RunConfig {
    /// Works until `shutdown`, and gives the exit code.
    ///
    /// # Errors
    /// With an [`ExitError`]: [`exit::USAGE`] for options that do not make sense,
    /// [`exit::UNAVAILABLE`] where the broker refuses, or the address for metrics is taken.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        if self.slot.timeout + self.drain.drain > LONGEST_JOB {
            let message = format!(
                "--timeout {} and --drain {} are more than {LONGEST_JOB} s together: RabbitMQ takes a job back after 30 minutes, of which it may have to wait some for machine and store",
                self.slot.timeout, self.drain.drain
            );
            return Err(ExitError::new(exit::USAGE, message).into());
        }
        let store = self.store.open()?;
        let metrics = Metrics::new();
        let (ready, readiness) = watch::channel(Err("not connected to the broker yet".to_owned()));
        let _server = self.metrics.serve(&metrics, &readiness).await?;
        let slots = Slots::new(
            self.slot.clone(),
            self.fetch.policy(std::env::var("GITHUB_TOKEN").ok()),
            DigestLimits::default(),
            metrics.clone(),
        )
        .map_err(unavailable)?;
        let broker = tokio::select! {
            broker = self.broker.connect(PATIENCE) => broker?,
            () = shutdown.soft.cancelled() => return Ok(shutdown.code()),
        };
        let Some(broker) = broker else {
            let message = "there is no broker to take jobs from: say where it is with --broker-url or BROKER_URL (for one machine without a broker there is `producer run`)";
            return Err(ExitError::new(exit::USAGE, message).into());
        };
        let worker = Worker {
            name: own_name(),
            broker: Arc::clone(&broker),
            store: Arc::clone(&store),
            slots: Arc::clone(&slots),
            metrics,
            drain: self.drain.duration(),
            patience: None,
        };
        info!(
            operation = "worker",
            worker = worker.name,
            slots = self.slot.slots(),
            "Worker {}: {} slots, digests to {}",
            worker.name,
            self.slot.slots(),
            store.location()
        );
        let probing = tokio::spawn(probe_at_start(Arc::clone(&store), shutdown.hard.clone()));
        let looking = tokio::spawn(look(ready, Arc::clone(&broker), store, slots));
        let worked = worker.run(self.slot.slots(), shutdown).await;
        looking.abort();
        // Not broken off, so that it leaves nothing behind.
        probing.await.ok();
        broker.close().await;
        worked.map_err(unavailable)?;
        info!(operation = "shutdown", "stopped; nothing is left in hand");
        Ok(shutdown.code())
    }
}

fn unavailable(fault: Fault) -> ExitError {
    ExitError::new(exit::UNAVAILABLE, fault)
}

/// Has a store in a bucket find out what its server can do before a job needs to know. What fails
/// is only warned of: the first job that needs the store finds it out too, and waits until it is
/// mended. `stop` breaks it off.
pub async fn probe_at_start(store: SharedStore, stop: CancellationToken) {
    if !store.is_remote() {
        return;
    }
    let probing = stop.run_until_cancelled(store.probe());
    let why = match tokio::time::timeout(PROBE_LIMIT, probing).await {
        Ok(None | Some(Ok(()))) => return,
        Ok(Some(Err(fault))) => fault.message,
        Err(_) => format!(
            "the store {} did not answer within {} s",
            store.location(),
            PROBE_LIMIT.as_secs()
        ),
    };
    warn!(operation = "store", "the store is not well yet: {why}");
}

/// Keeps finding out whether this worker can work. A look costs the store one small read, since
/// forty workers look day and night.
async fn look(
    ready: watch::Sender<Result<(), String>>,
    broker: SharedBroker,
    store: SharedStore,
    slots: Arc<Slots>,
) {
    loop {
        let looking = async {
            broker.probe().await?;
            store.reachable().await?;
            slots.probe().await
        };
        let now = match tokio::time::timeout(LOOK_LIMIT, looking).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(fault)) => Err(fault.message),
            Err(_) => Err(format!(
                "broker or store did not answer within {} s",
                LOOK_LIMIT.as_secs()
            )),
        };
        ready.send_if_modified(|known| {
            let changed = *known != now;
            match &now {
                Ok(()) if changed => info!(operation = "ready", "ready"),
                Err(why) if changed => warn!(operation = "ready", "not ready: {why}"),
                _ => {}
            }
            *known = now;
            changed
        });
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
