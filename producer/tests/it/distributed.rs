//! A fleet of real processes on a real broker: what [`Fleet`] has, and workers and a bucket.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::{LedgerEntry, Position, SharedBroker, Waiting};
use futures::TryStreamExt;
use testing::rabbitmq::fresh_prefix;
use testing::s3_server::{ACCESS_KEY, SECRET_KEY};

use crate::fleet::{Fleet, Running, in_clean_environment};

/// See the module.
pub(crate) struct Distributed {
    pub(crate) fleet: Fleet,
    /// Where producer and workers find the broker.
    pub(crate) broker_url: String,
    pub(crate) prefix: String,
    /// `http://…` of the server with the bucket.
    pub(crate) bucket_url: String,
}

impl Distributed {
    pub(crate) fn new(fleet: Fleet, broker_url: String, bucket_url: String) -> Self {
        Self {
            fleet,
            broker_url,
            prefix: fresh_prefix(),
            bucket_url,
        }
    }

    /// `producer run` on this fleet.
    pub(crate) fn producer(&self, arguments: &[&str]) -> Command {
        let mut command = self
            .fleet
            .producer(&[&["--store", "s3://digests"], arguments].concat());
        self.tell(&mut command);
        command
    }

    /// `worker run` on this fleet.
    pub(crate) fn worker(&self, arguments: &[&str]) -> Command {
        let mut command = in_clean_environment(Command::new(worker_program()));
        command
            .args(["run", "--store", "s3://digests", "--scratch"])
            .arg(self.fleet.scratch_folder())
            .args(["--allow-http", "--allow-host"])
            .arg(self.fleet.server.authority())
            .args(arguments);
        self.tell(&mut command);
        command
    }

    /// Starts a worker, and returns when it takes jobs.
    pub(crate) fn start_worker(&self, arguments: &[&str]) -> Running {
        let worker = Running::start(&mut self.worker(arguments));
        worker.wait_for_line("slots, digests to");
        worker
    }

    /// Where broker and bucket are, as an operator would say it.
    pub(crate) fn tell(&self, command: &mut Command) {
        command
            .env("BROKER_URL", &self.broker_url)
            .env("QUEUE_PREFIX", &self.prefix)
            .env("AWS_ENDPOINT_URL", &self.bucket_url)
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
    }

    /// Looks at the broker at `url`, past whatever stands between it and the fleet.
    pub(crate) fn look(&self, url: &str) -> Look {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let options = Options::new(url, &self.prefix).unwrap();
        let broker = runtime.block_on(AmqpBroker::connect(options)).unwrap();
        Look {
            runtime,
            broker: Arc::new(broker),
        }
    }
}

/// A connection of the test's own.
pub(crate) struct Look {
    runtime: tokio::runtime::Runtime,
    broker: SharedBroker,
}

impl Look {
    pub(crate) fn waiting(&self) -> Waiting {
        self.runtime.block_on(self.broker.waiting()).unwrap()
    }

    pub(crate) fn ledger(&self) -> Vec<LedgerEntry> {
        let history = async {
            self.broker
                .history(Position::Start)
                .await?
                .try_collect()
                .await
        };
        self.runtime.block_on(history).unwrap()
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        self.runtime.block_on(self.broker.close());
    }
}

/// The worker's binary, which lies beside the producer's.
fn worker_program() -> PathBuf {
    let worker = Path::new(env!("CARGO_BIN_EXE_producer")).with_file_name("worker");
    assert!(
        worker.exists(),
        "{} is missing: run `cargo test --workspace`, or `cargo build -p worker` first",
        worker.display()
    );
    worker
}
