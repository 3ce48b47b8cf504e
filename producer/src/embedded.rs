//! The whole job in one process: the memory broker, and a worker beside the producer.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use common::broker::SharedBroker;
use common::broker::memory::MemoryBroker;
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::store::fs::make_folder;
use common::telemetry::metrics::Metrics;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use worker::consume::Worker;
use worker::digest::DigestLimits;
use worker::fetch::policy::{FetchConfig, FetchPolicy};
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
            patience: Some(Duration::from_secs(self.patience)),
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

/// Being the only process that runs on a store in a folder, until dropped. Whatever was made for
/// that goes away then, unless a run has put something into the folder.
#[derive(Debug)]
pub struct OnlyOne {
    path: PathBuf,
    /// The folders that were made, the deepest first.
    made: Vec<PathBuf>,
    _lock: File,
}

impl OnlyOne {
    /// Takes the lock of the store in `folder`, which is made where it is not there.
    ///
    /// # Errors
    /// [`exit::BUSY`] where another holds it; [`exit::UNAVAILABLE`] where the folder cannot be
    /// written.
    pub fn on(folder: &Path) -> Result<Self, ExitError> {
        let path = folder.join(".producer.lock");
        let unavailable = |e: &io::Error| {
            ExitError::new(
                exit::UNAVAILABLE,
                format!(
                    "cannot write {}: {e}; give this user the right to, or choose another folder with --store",
                    path.display()
                ),
            )
        };
        let mut made = Vec::new();
        loop {
            let absent = folder
                .ancestors()
                .take_while(|folder| !folder.as_os_str().is_empty() && !folder.is_dir());
            made.extend(absent.map(Path::to_owned));
            make_folder(folder).map_err(|fault| ExitError::new(exit::UNAVAILABLE, fault))?;
            let lock = match File::create(&path) {
                Ok(lock) => lock,
                // Whoever made the folder has just taken it away.
                Err(e) if e.kind() == ErrorKind::NotFound && !folder.is_dir() => continue,
                Err(e) => return Err(unavailable(&e)),
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(busy(folder)),
                Err(TryLockError::Error(e)) => return Err(unavailable(&e)),
            }
            // Nor is a file a lock that whoever held it has just removed.
            let held = lock.metadata().map_err(|e| unavailable(&e))?;
            if fs::metadata(&path).is_ok_and(|there| there.ino() == held.ino()) {
                return Ok(Self {
                    path,
                    made,
                    _lock: lock,
                });
            }
        }
    }
}

impl Drop for OnlyOne {
    fn drop(&mut self) {
        // Still held: nobody else takes a file of this name for theirs.
        fs::remove_file(&self.path).ok();
        for folder in &self.made {
            // Only an empty one goes.
            fs::remove_dir(folder).ok();
        }
    }
}

fn busy(folder: &Path) -> ExitError {
    ExitError::new(
        exit::BUSY,
        format!(
            "another run is at work on {}; wait for its end, or choose another folder with --store",
            folder.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    /// Also where some take the lock's file away while others open it.
    #[test]
    fn there_is_only_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (holders, turns) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while turns.load(Ordering::SeqCst) < 500 {
                        let only_one = match OnlyOne::on(folder.path()) {
                            Ok(only_one) => only_one,
                            Err(error) => {
                                assert_eq!(error.code, exit::BUSY, "{error}");
                                continue;
                            }
                        };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        turns.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(only_one);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
