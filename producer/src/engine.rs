//! What a run works with: a broker, the lock of its queues and, in one process, a worker. Nothing
//! else tells one process from a fleet.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use common::broker::config::BrokerConfig;
use common::broker::memory::MemoryBroker;
use common::broker::{ProducerLock, SharedBroker};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::telemetry::traces::Traces;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;
use worker::consume::{Worker, own_name};
use worker::digest::DigestLimits;
use worker::fetch::policy::FetchConfig;
use worker::host_rate::HostRateConfig;
use worker::metrics::Metrics;
use worker::run::{DrainConfig, probe_at_start};
use worker::slot::SlotConfig;
use worker::slot::slots::Slots;

use crate::feed::LocalPaths;
use crate::token_warning::BusyHosts;

/// How long the store's probe may still take once all jobs have ended.
const LAST_PROBE: Duration = Duration::from_secs(5);
/// Variables that name a proxy.
const PROXY_VARIABLES: [&str; 6] = [
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Where the work is done: by a fleet, or by a worker in this process.
#[derive(Args, Clone, Debug)]
pub struct EngineConfig {
    #[command(flatten)]
    pub(crate) broker: BrokerConfig,
    #[command(flatten)]
    pub(crate) slot: SlotConfig,
    #[command(flatten)]
    pub(crate) fetch: FetchConfig,
    #[command(flatten)]
    rate: HostRateConfig,
    #[command(flatten)]
    drain: DrainConfig,
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    /// Queues and ledger.
    pub broker: SharedBroker,
    /// Where traces begin.
    pub traces: Traces,
    lock: ProducerLock,
    worker: Option<(Worker, u16)>,
}

/// Work that goes on until it is [ended](Work::end).
#[derive(Debug)]
pub struct Work {
    /// Cancelled when there are no more outcomes to wait for: the worker of this process has
    /// ended; in a fleet, a signal came or another producer took over.
    pub over: CancellationToken,
    here: Option<Here>,
}

/// The worker of this process.
#[derive(Debug)]
struct Here {
    task: JoinHandle<Result<(), Fault>>,
    /// Stops it, and nothing else.
    stop: CancellationToken,
    /// The look at what the store can do.
    probe: JoinHandle<()>,
}

impl EngineConfig {
    /// Whether repositories may be read from this machine, by path.
    pub fn local_paths(&self) -> LocalPaths {
        match self.fetch.allow_local {
            true => LocalPaths::Allowed,
            false => LocalPaths::Refused,
        }
    }

    /// Connects to the fleet's broker, or prepares a worker in this process if none is named.
    /// `local_feed` lets that worker read local repositories.
    ///
    /// # Errors
    /// [`exit::BUSY`] if another producer uses the queues; [`exit::UNAVAILABLE`] if the broker
    /// refuses or is away for longer than `patience`, or the scratch folder cannot be written.
    pub async fn connect(
        &self,
        store: &SharedStore,
        metrics: &Metrics,
        traces: &Traces,
        patience: Duration,
        local_feed: bool,
    ) -> Result<Engine, ExitError> {
        let (broker, worker) = match self.broker.connect(patience).await? {
            Some(broker) => (broker, None),
            None => {
                if self.fetch.fetch_proxy.is_none()
                    && let Some(why) = unused_proxy()
                {
                    warn!(operation = "proxy", "{why}");
                }
                let broker: SharedBroker = Arc::new(MemoryBroker::default());
                let mut fetch = self.fetch.clone();
                fetch.allow_local |= local_feed;
                let worker = Worker {
                    name: own_name(),
                    broker: Arc::clone(&broker),
                    store: Arc::clone(store),
                    slots: Slots::new(
                        self.slot.clone(),
                        fetch.policy(|name| std::env::var_os(name))?,
                        DigestLimits::default(),
                        metrics.clone(),
                    )?,
                    metrics: metrics.clone(),
                    traces: traces.clone(),
                    drain: self.drain.duration(),
                    host_rate: self.rate.host_rate,
                    patience: Some(patience),
                };
                (broker, Some((worker, self.slot.slots())))
            }
        };
        let Some(lock) = broker.producer_lock().await? else {
            broker.close().await;
            return Err(ExitError::new(
                exit::BUSY,
                format!(
                    "another producer is at work on the queues \"{}\" of this broker; wait for its end (`producer status --watch`), or choose another --queue-prefix",
                    self.broker.queue_prefix
                ),
            ));
        };
        Ok(Engine {
            broker,
            traces: traces.clone(),
            lock,
            worker,
        })
    }
}

impl Engine {
    /// Whether workers elsewhere do the jobs, and go on without this process.
    pub fn is_fleet(&self) -> bool {
        self.worker.is_none()
    }

    /// Whether another producer has taken the lock, which this one lost with its connection.
    pub fn is_taken_over(&self) -> bool {
        self.lock.lost.is_cancelled()
    }

    /// Warns if many repositories are about to be fetched from a host without a token for it. Workers
    /// elsewhere are asked which tokens they have, until the result is dropped.
    pub fn warn_without_token<'a>(
        &self,
        urls: impl Iterator<Item = &'a str>,
    ) -> Option<AbortOnDropHandle<()>> {
        let hosts = BusyHosts::of(urls);
        match &self.worker {
            _ if hosts.is_empty() => None,
            Some((worker, _)) => {
                hosts.warn(worker.slots.policy());
                None
            }
            None => {
                let asking = hosts.warn_for_fleet(SharedBroker::clone(&self.broker));
                Some(AbortOnDropHandle::new(tokio::spawn(asking)))
            }
        }
    }

    /// Puts the worker of this process to work, if there is one.
    pub fn start(&self, shutdown: &Shutdown) -> Work {
        let Some((worker, slots)) = self.worker.clone() else {
            let over = shutdown.soft.child_token();
            let (lost, cancelled) = (self.lock.lost.clone(), over.clone());
            tokio::spawn(async move {
                lost.cancelled().await;
                cancelled.cancel();
            });
            return Work { over, here: None };
        };
        let store = Arc::clone(&worker.store);
        let probe = tokio::spawn(probe_at_start(store, shutdown.hard.clone()));
        let (over, shutdown) = (CancellationToken::new(), shutdown.child());
        let (ended, stop) = (over.clone().drop_guard(), shutdown.soft.clone());
        let task = tokio::spawn(async move {
            let _ended = ended;
            worker.run(slots, &shutdown).await
        });
        let here = Some(Here { task, stop, probe });
        Work { over, here }
    }
}

impl Work {
    /// Stops the worker of this process. The inner error says why it gave up, if it did.
    ///
    /// # Errors
    /// If the worker panicked.
    pub async fn end(self) -> Result<Result<(), Fault>> {
        let Some(here) = self.here else {
            return Ok(Ok(()));
        };
        here.stop.cancel();
        let ended = here.task.await.context("the worker's task")?;
        // It removes its object from the store, so it is not broken off without need.
        let abort = here.probe.abort_handle();
        if tokio::time::timeout(LAST_PROBE, here.probe).await.is_err() {
            abort.abort();
        }
        Ok(ended)
    }
}

/// Says that a proxy is not used for repositories, where one is set: a slot checks the addresses that
/// it connects to, which mean nothing behind one.
pub(crate) fn unused_proxy() -> Option<String> {
    let set: Vec<_> = PROXY_VARIABLES
        .into_iter()
        .filter(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
        .collect();
    // Never the value, which may hold a password.
    let names = set.join(" and ");
    (!set.is_empty()).then(|| {
        format!(
            "{names} in the environment: only the feed is fetched through a proxy, repositories \
             are fetched directly; name a trusted proxy for them with --fetch-proxy"
        )
    })
}
