//! The whole job in one process: the memory broker, and a worker beside the producer.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use common::broker::SharedBroker;
use common::broker::memory::MemoryBroker;
use common::fault::Fault;
use common::shutdown::Shutdown;
use common::store::SharedStore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use worker::consume::Worker;
use worker::digest::DigestLimits;
use worker::fetch::policy::{FetchConfig, FetchPolicy};
use worker::metrics::Metrics;
use worker::run::DrainConfig;
use worker::slot::SlotConfig;
use worker::slot::slots::Slots;

use crate::feed::LocalPaths;

/// How the worker in this process works.
#[derive(Args, Clone, Debug)]
pub struct EmbeddedConfig {
    #[command(flatten)]
    slot: SlotConfig,
    #[command(flatten)]
    fetch: FetchConfig,
    #[command(flatten)]
    drain: DrainConfig,
}

/// Where programs are told of a proxy.
const PROXY_VARIABLES: [&str; 6] = [
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
];

impl EmbeddedConfig {
    /// The policy for sources; `local_feed` allows local ones.
    fn policy(&self, local_feed: bool) -> FetchPolicy {
        let mut fetch = self.fetch.clone();
        fetch.allow_local |= local_feed;
        fetch.policy(std::env::var("GITHUB_TOKEN").ok())
    }

    /// Warns of a proxy that repositories are not fetched by: a slot checks the addresses that it
    /// connects to, which mean nothing behind one. The feed is fetched by it all the same.
    pub fn warn_of_proxy() {
        let set: Vec<_> = PROXY_VARIABLES
            .into_iter()
            .filter(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
            .collect();
        if !set.is_empty() {
            // Never the value, which may hold a password.
            let names = set.join(" and ");
            warn!(
                operation = "proxy",
                variables = names,
                "{names} in the environment: only the feed comes by a proxy, repositories are \
                 fetched directly"
            );
        }
    }

    /// Whether repositories may be read from this machine, by path.
    pub fn local_paths(&self) -> LocalPaths {
        if self.fetch.allow_local {
            LocalPaths::Allowed
        } else {
            LocalPaths::Refused
        }
    }

    /// Makes room for the worker's slots; `local_feed` allows local sources.
    ///
    /// # Errors
    /// Where there is none.
    pub fn slots(&self, local_feed: bool, metrics: &Metrics) -> Result<Arc<Slots>, Fault> {
        Slots::new(
            self.slot.clone(),
            self.policy(local_feed),
            DigestLimits::default(),
            metrics.clone(),
        )
    }

    /// Starts a worker in this process; it works in `slots` until `shutdown`.
    pub fn start(
        &self,
        slots: Arc<Slots>,
        store: SharedStore,
        metrics: Metrics,
        patience: Duration,
        shutdown: &Shutdown,
    ) -> Embedded {
        let broker: SharedBroker = Arc::new(MemoryBroker::default());
        let worker = Worker {
            name: worker::consume::own_name(),
            broker: Arc::clone(&broker),
            store,
            slots,
            metrics,
            drain: self.drain.duration(),
            patience: Some(patience),
        };
        let (count, shutdown) = (self.slot.slots(), shutdown.child());
        let stop = shutdown.soft.clone();
        let worker = tokio::spawn(async move { worker.run(count, &shutdown).await });
        Embedded {
            broker,
            worker,
            stop,
        }
    }
}

/// A broker and its one worker.
#[derive(Debug)]
pub struct Embedded {
    /// For the producer.
    pub broker: SharedBroker,
    /// Ends when the worker has stopped.
    pub worker: JoinHandle<Result<(), Fault>>,
    /// Tells the worker, and nobody else, to stop.
    pub stop: CancellationToken,
}
