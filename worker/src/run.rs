//! A worker of a fleet: takes jobs from RabbitMQ until it is stopped.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::broker::amqp::AmqpBroker;
use common::broker::config::BrokerConfig;
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::store::config::StoreConfig;
use common::telemetry::http::MetricsConfig;
use common::telemetry::traces::Traces;
use common::text::{format_duration, seconds_within};
use futures::future;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::consume::{LAST_WORDS, Loan, Worker, own_name};
use crate::digest::DigestLimits;
use crate::fetch::policy::FetchConfig;
use crate::fetch::token::{GITHUB, remedy};
use crate::host_rate::HostRateConfig;
use crate::infra_gate::InfraGate;
use crate::metrics::Metrics;
use crate::slot::slots::{INDEX_BYTES, Slots};
use crate::slot::{ChildConfig, SlotConfig};

/// How long to wait for a broker at the start: practically for ever, since one that is still
/// starting is the ordinary case.
const PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Pause between looks at whether this worker can work.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// How long such a look may take.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// How long a store in a bucket may take to show what it can do …
const PROBE_LIMIT: Duration = Duration::from_secs(60);
/// … and once the worker has stopped.
const PROBE_GRACE: Duration = Duration::from_secs(2);
/// Memory that a slot usually takes, and a worker without any, as measured.
const USUAL_SLOT_BYTES: u64 = 128 << 20;
const WORKER_BYTES: u64 = 256 << 20;

/// How a worker of a fleet works.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
Examples:
  BROKER_URL=amqp://guest:guest@localhost worker run --store ./digests
  BROKER_URL=amqp://rabbit STORE_URL=s3://digests worker run --concurrency 2 --metrics-addr 0.0.0.0:9090
  worker run --token-for gitlab.com=GITLAB_TOKEN --token-for github.com=/run/secrets/github --host-rate 5")]
pub struct RunConfig {
    /// Print the limits that memory, disk and time settings must respect, as JSON, and exit.
    #[arg(long)]
    print_limits: bool,
    #[command(flatten)]
    broker: BrokerConfig,
    #[command(flatten)]
    store: StoreConfig,
    #[command(flatten)]
    slot: SlotConfig,
    #[command(flatten)]
    fetch: FetchConfig,
    #[command(flatten)]
    rate: HostRateConfig,
    #[command(flatten)]
    drain: DrainConfig,
    #[command(flatten)]
    metrics: MetricsConfig,
}

/// How a worker stops.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Stopping")]
pub struct DrainConfig {
    /// Time that jobs in hand may go on after SIGTERM or SIGINT.
    #[arg(
        long,
        env = "DRAIN",
        value_name = "DURATION",
        default_value = "30s",
        value_parser = seconds_within("0s", "1d")
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
    /// Works until `shutdown`, and returns the exit code.
    ///
    /// # Errors
    /// With an [`ExitError`]: [`exit::USAGE`] for options that contradict each other,
    /// [`exit::UNAVAILABLE`] if the broker refuses, or the address for metrics is taken.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        if self.print_limits {
            writeln!(io::stdout(), "{:#}", limits())?;
            return Ok(exit::OK);
        }
        self.check_times()?;
        let store = self.store.open()?;
        let metrics = Metrics::new();
        let (ready, readiness) = watch::channel(Err("not connected to the broker yet".to_owned()));
        let _server = self.metrics.serve(&metrics, &readiness).await?;
        let slots = Slots::new(
            self.slot.clone(),
            self.fetch.policy(|name| std::env::var_os(name))?,
            DigestLimits::default(),
            metrics.clone(),
        )
        .map_err(unavailable)?;
        let traces = Traces::start("repofleet-worker", &metrics.spans_dropped)?;
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
            broker,
            store,
            slots,
            metrics,
            traces,
            drain: self.drain.duration(),
            host_rate: self.rate.host_rate,
            patience: None,
        };
        self.work(&worker, ready, shutdown).await?;
        info!(operation = "shutdown", "stopped; nothing is left in hand");
        Ok(shutdown.code())
    }

    async fn work(
        &self,
        worker: &Worker,
        ready: watch::Sender<Result<(), String>>,
        shutdown: &Shutdown,
    ) -> Result<()> {
        let slots = self.slot.slots();
        info!(
            operation = "worker",
            worker = worker.name,
            slots,
            "Worker {}: {slots} slots, digests to {}",
            worker.name,
            worker.store.location()
        );
        if worker.slots.policy().tokens.is_empty() {
            info!(
                operation = "token",
                "no token for any host; {GITHUB} limits anonymous downloads: large runs need {}",
                remedy(GITHUB)
            );
        }
        let gate = Arc::new(InfraGate::default());
        let store = Arc::clone(&worker.store);
        let mut probing = tokio::spawn(probe_at_start(store, shutdown.hard.clone()));
        let looking = tokio::spawn(look(ready, Arc::clone(&gate), worker.clone()));
        let worked = worker.run_behind(gate, slots, shutdown).await;
        looking.abort();
        // Not broken off at once, so that it leaves nothing behind.
        if timeout(PROBE_GRACE, &mut probing).await.is_err() {
            probing.abort();
        }
        let closing = future::join(worker.broker.close(), worker.traces.close());
        shutdown.hard.run_until_cancelled(closing).await;
        Ok(worked.map_err(unavailable)?)
    }

    /// A job that takes its whole time must fit into the broker's loan, and so must a drain.
    fn check_times(&self) -> Result<(), ExitError> {
        let limit = AmqpBroker::LOAN_LIMIT;
        let longest = Loan::of(Some(limit)).work.unwrap_or(limit).as_secs();
        let (timeout, drain) = (self.slot.timeout, self.drain.drain);
        if timeout + drain <= longest {
            return Ok(());
        }
        let message = format!(
            "--timeout {timeout} and --drain {drain} are more than {longest} s together: the broker takes a job back after {} minutes, of which it may have to wait some for machine and store",
            limit.as_secs() / 60
        );
        Err(ExitError::new(exit::USAGE, message))
    }
}

/// What settings of a deployment must respect; `deploy/kubernetes/check.py` reads it.
fn limits() -> serde_json::Value {
    let loan = Loan::of(Some(AmqpBroker::LOAN_LIMIT));
    let seconds = |duration: Option<Duration>| duration.map(|duration| duration.as_secs());
    json!({
        "scratch_overhead_bytes": INDEX_BYTES,
        "slot_overhead_bytes": ChildConfig::default().address_space,
        "usual_slot_bytes": USUAL_SLOT_BYTES,
        "worker_bytes": WORKER_BYTES,
        "loan_seconds": AmqpBroker::LOAN_LIMIT.as_secs(),
        "longest_hold_seconds": seconds(loan.hold),
        "longest_job_seconds": seconds(loan.work),
        "longest_retry_seconds": AmqpBroker::pause_for(Duration::MAX).as_secs(),
        // The broker's connections have as long again.
        "hand_back_seconds": 3 * LAST_WORDS.as_secs(),
    })
}

fn unavailable(fault: Fault) -> ExitError {
    ExitError::new(exit::UNAVAILABLE, fault)
}

/// Has a store in a bucket find out what its server can do before a job needs to know. A failure
/// is only a warning: the first job that needs the store finds it out too, and waits until it is
/// mended. `stop` breaks it off.
pub async fn probe_at_start(store: SharedStore, stop: CancellationToken) {
    if !store.is_remote() {
        return;
    }
    let probing = stop.run_until_cancelled(store.probe());
    let why = match timeout(PROBE_LIMIT, probing).await {
        Ok(None | Some(Ok(()))) => return,
        Ok(Some(Err(fault))) => fault.message,
        Err(_) => format!(
            "the store {} did not answer within {}",
            store.location(),
            format_duration(PROBE_LIMIT)
        ),
    };
    warn!(operation = "store", "the store is not well yet: {why}");
}

/// Keeps finding out whether this worker can work.
async fn look(ready: watch::Sender<Result<(), String>>, gate: Arc<InfraGate>, worker: Worker) {
    let mut state = gate.watch();
    loop {
        let closed = state.borrow_and_update().reason().map(str::to_owned);
        let now = match closed {
            Some(why) => Err(format!("no job is started: {why}")),
            None => look_once(&worker).await,
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
        // An error means that time is up.
        _ = timeout(LOOK_EVERY, state.changed()).await;
    }
}

/// Costs the store one small read, since forty workers look day and night.
async fn look_once(worker: &Worker) -> Result<(), String> {
    let looking = async {
        worker.broker.probe().await?;
        worker.store.reachable().await?;
        worker.slots.probe().await
    };
    match timeout(LOOK_LIMIT, looking).await {
        Ok(looked) => looked.map_err(|fault| fault.message),
        Err(_) => Err(format!(
            "broker or store did not answer within {}",
            format_duration(LOOK_LIMIT)
        )),
    }
}
