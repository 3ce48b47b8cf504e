//! The whole job in one process: the memory broker, and a worker beside the producer.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use common::broker::SharedBroker;
use common::broker::memory::MemoryBroker;
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::telemetry::Metrics;
use tokio::task::JoinHandle;
use worker::consume::Worker;
use worker::digest::Limits;
use worker::fetch::policy::{FetchConfig, FetchPolicy};
use worker::slot::{SlotConfig, Slots};

/// How the worker in this process works.
#[derive(Args, Clone, Debug)]
pub struct EmbeddedConfig {
    #[command(flatten)]
    slot: SlotConfig,
    #[command(flatten)]
    fetch: FetchConfig,
    /// Seconds that jobs in hand may go on after SIGTERM or SIGINT.
    #[arg(
        long,
        env = "DRAIN",
        value_name = "SECONDS",
        default_value_t = 30,
        help_heading = "Stopping"
    )]
    drain: u64,
    /// Seconds to wait for a full disk or a store that is away before the run is given up.
    #[arg(
        long,
        env = "PATIENCE",
        value_name = "SECONDS",
        default_value_t = 300,
        help_heading = "Stopping"
    )]
    patience: u64,
}

impl EmbeddedConfig {
    /// The policy for sources; `local_feed` allows local ones.
    fn policy(&self, local_feed: bool) -> FetchPolicy {
        let mut fetch = self.fetch.clone();
        fetch.allow_local |= local_feed;
        fetch.policy(std::env::var("GITHUB_TOKEN").ok())
    }

    /// Starts a worker in this process; it works until `shutdown`.
    ///
    /// # Errors
    /// Where there is no room for slots.
    pub fn start(
        &self,
        local_feed: bool,
        store: SharedStore,
        metrics: Metrics,
        shutdown: &Shutdown,
    ) -> Result<Embedded, Fault> {
        let broker: SharedBroker = Arc::new(MemoryBroker::default());
        let slots = Slots::new(
            self.slot.clone(),
            self.policy(local_feed),
            Limits::default(),
            metrics.clone(),
        )?;
        let worker = Worker {
            broker: Arc::clone(&broker),
            store,
            slots,
            metrics,
            drain: Duration::from_secs(self.drain),
            patience: Some(Duration::from_secs(self.patience)),
        };
        let (count, shutdown) = (self.slot.slots(), shutdown.clone());
        let worker = tokio::spawn(async move { worker.run(count, &shutdown).await });
        Ok(Embedded { broker, worker })
    }
}

/// A broker and its one worker.
#[derive(Debug)]
pub struct Embedded {
    /// For the producer.
    pub broker: SharedBroker,
    /// Ends when the worker has stopped.
    pub worker: JoinHandle<Result<(), Fault>>,
}

/// Makes this the only process that runs on the store in `folder`; released when dropped.
///
/// # Errors
/// [`exit::BUSY`] where another runs; [`exit::UNAVAILABLE`] where the folder cannot be written.
pub fn only_one(folder: &Path) -> Result<File, ExitError> {
    let path = folder.join(".producer.lock");
    let unavailable = |e: &std::io::Error| {
        ExitError::new(
            exit::UNAVAILABLE,
            format!(
                "cannot write {}: {e}; give this user the right to, or choose another folder with --store",
                path.display()
            ),
        )
    };
    fs::create_dir_all(folder).map_err(|e| unavailable(&e))?;
    let file = File::create(&path).map_err(|e| unavailable(&e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ExitError::new(
            exit::BUSY,
            format!(
                "another run is at work on {}; wait for its end, or choose another folder with --store",
                folder.display()
            ),
        )),
        Err(TryLockError::Error(e)) => Err(unavailable(&e)),
    }
}
