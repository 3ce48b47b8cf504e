//! `producer observe`: a fleet on a real broker, as the exporter shows it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use common::exit;
use common::fault::FaultKind;
use common::outcome::Outcome;
use rustix::process::Signal;
use serde_json::Value;
use testing::root::assert_private;
use tokio::task::block_in_place;

use crate::fleet::{Fleet, PUSHED, PUSHED_LATER, Running, bare_producer, wait_until};
use crate::metrics::{address, get};
use crate::status::{Queues, ended, next};

fn observer(fleet: &Fleet) -> Command {
    let mut command = bare_producer();
    command
        .args(["observe", "--metrics-addr", "127.0.0.1:0", "--store"])
        .arg(fleet.store_folder());
    command
}

#[test]
fn it_lets_nobody_look_into_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = bare_producer();
    command.args(["observe", "--metrics-addr", "127.0.0.1:0", "--store"]);
    assert_private(command.arg(folder.path()));
    // It goes on as another program then.
    let secret = folder.path().join("secret");
    fs::write(&secret, "sesame").unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    assert_private(command.env("GITHUB_TOKEN_FILE", secret));
}

/// What an exporter shows.
struct Shown {
    observer: Running,
    address: String,
}

impl Shown {
    fn by(mut command: Command) -> Self {
        let observer = block_in_place(|| Running::start(&mut command));
        let address = block_in_place(|| address(&observer));
        Self { observer, address }
    }

    fn text(&self) -> String {
        block_in_place(|| get(&self.address, "/metrics"))
    }

    /// Waits until it shows all of these lines.
    fn wait_for(&self, lines: &[&str]) {
        block_in_place(|| {
            wait_until(&format!("the exporter shows {lines:?}"), || {
                let text = get(&self.address, "/metrics");
                lines.iter().all(|line| text.lines().any(|l| l == *line))
            });
        });
    }

    fn value(&self, name: &str) -> f64 {
        let text = self.text();
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        let value = found.unwrap_or_else(|| panic!("{name} in {text}"));
        value.trim().parse().unwrap()
    }

    fn stop(self) {
        self.observer.signal(Signal::TERM);
        block_in_place(|| self.observer.wait()).with(0);
    }
}

fn last_closed(fleet: &Fleet) -> Value {
    let path = fleet.store_folder().join("runs/last-closed.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_is_shown_from_before_its_first_run_to_its_end() {
    let repos = ["o/a", "o/b", "o/c", "o/d"];
    let (fleet, queues) = (Fleet::of(&repos), Queues::new().await);
    let shown = Shown::by(queues.named_to(observer(&fleet)));
    shown.wait_for(&[
        r#"repofleet_observer_reached{what="store"} 1"#,
        r#"repofleet_observer_reached{what="broker"} 1"#,
        "repofleet_last_closed_run_timestamp_seconds 0",
        "repofleet_run_started_timestamp_seconds 0",
        "repofleet_run_selected NaN",
        "repofleet_workers_connected 0",
        "repofleet_dead_letters 0",
    ]);
    let ready = block_in_place(|| get(&shown.address, "/ready"));
    assert!(ready.starts_with("HTTP/1.1 200 "), "{ready}");

    let mut run = queues.named_to(fleet.producer(&[]));
    let run = block_in_place(|| Running::start(&mut run));
    block_in_place(|| run.wait_for_line("Jobs published: 4"));
    shown.wait_for(&[
        r#"repofleet_queue_jobs{state="ready"} 4"#,
        r#"repofleet_run_repositories{state="open"} 4"#,
        r#"repofleet_run_cache{reason="miss"} 4"#,
        "repofleet_run_selected 4",
        "repofleet_run_closed 0",
        "repofleet_run_residual 4",
        r#"repofleet_run_cache_hit_ratio{run="latest"} 0"#,
        r#"repofleet_run_cache_hit_ratio{run="previous"} NaN"#,
        "repofleet_last_closed_run_timestamp_seconds 0",
    ]);

    let mut deliveries = queues.deliveries(4).await;
    let gone = Outcome::Failed(FaultKind::Gone);
    for outcome in [Outcome::Processed, gone] {
        let delivery = next(&mut deliveries).await;
        queues.settle(delivery, outcome).await;
    }
    shown.wait_for(&[
        r#"repofleet_run_repositories{state="processed"} 1"#,
        r#"repofleet_run_failed{class="gone"} 1"#,
        "repofleet_run_residual 2",
        "repofleet_workers_seen 1",
        "repofleet_workers_connected 1",
    ]);
    assert!(shown.value("repofleet_run_oldest_open_seconds") > 0.0);
    assert!(shown.value("repofleet_run_outcomes_per_minute") > 0.0);
    for _ in 0..2 {
        let delivery = next(&mut deliveries).await;
        queues.settle(delivery, Outcome::Processed).await;
    }
    // One of three failed.
    block_in_place(|| run.wait()).with(exit::TOO_MANY_FAILED);
    shown.wait_for(&[
        "repofleet_run_closed 1",
        "repofleet_run_residual 0",
        "repofleet_run_oldest_open_seconds 0",
        "repofleet_run_outcomes_per_minute 0",
        r#"repofleet_run_repositories{state="processed"} 3"#,
    ]);
    let closed_at = shown.value("repofleet_last_closed_run_timestamp_seconds");
    assert!(closed_at > 1_700_000_000.0, "{closed_at}");
    shown.stop();
}

/// It is started anew in the middle of a run, and knows all that its predecessor did.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_run_that_closed_last_is_known_while_the_next_goes_on() {
    let (fleet, queues) = (Fleet::of(&["o/a", "o/b"]), Queues::new().await);
    block_in_place(|| fleet.run(&[])).with(0);
    let first = last_closed(&fleet);
    fleet.write_feed(&[fleet.entry("o/a", PUSHED_LATER), fleet.entry("o/b", PUSHED)]);
    // Their ids sort by the second.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    ended(queues.named_to(fleet.producer(&["--detach"]))).with(0);
    let shown = Shown::by(queues.named_to(observer(&fleet)));
    shown.wait_for(&[
        "repofleet_run_closed 0",
        "repofleet_run_selected 2",
        r#"repofleet_run_cache{reason="stale"} 1"#,
        r#"repofleet_run_cache_hit_ratio{run="latest"} 0.5"#,
        r#"repofleet_run_cache_hit_ratio{run="previous"} 0"#,
    ]);
    let closed_at = shown.value("repofleet_last_closed_run_timestamp_seconds");
    assert!(closed_at > 1_700_000_000.0, "{closed_at} of {first}");

    // Nobody writes a summary of this one: that it has closed is in the ledger.
    let mut deliveries = queues.deliveries(1).await;
    let delivery = next(&mut deliveries).await;
    assert!(delivery.enqueued.unix_timestamp() as f64 >= closed_at - 1.0);
    queues.settle(delivery, Outcome::Processed).await;
    shown.wait_for(&["repofleet_run_closed 1"]);
    assert!(shown.value("repofleet_last_closed_run_timestamp_seconds") > closed_at);
    shown.stop();
    assert_eq!(last_closed(&fleet), first, "it writes nothing");
}

/// A run of one process, too, is known by what it leaves in the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_broker_the_documents_are_shown() {
    let fleet = Fleet::of(&["o/a", "o/b"]);
    block_in_place(|| fleet.run(&[])).with(0);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    block_in_place(|| fleet.run(&[])).with(0);
    let closed = last_closed(&fleet);
    assert_eq!(closed["last"]["cacheHitRate"], 100.0);
    assert_eq!(closed["before"]["cacheHitRate"], 0.0);
    let shown = Shown::by(observer(&fleet));
    shown.wait_for(&[
        "repofleet_run_closed 1",
        r#"repofleet_run_repositories{state="cached"} 2"#,
        r#"repofleet_run_cache_hit_ratio{run="latest"} 1"#,
        r#"repofleet_run_cache_hit_ratio{run="previous"} 0"#,
        r#"repofleet_observer_reached{what="broker"} NaN"#,
        "repofleet_dead_letters NaN",
    ]);
    shown.stop();

    // One that is damaged does no harm.
    let run = closed["last"]["run"].as_str().unwrap();
    let path = fleet
        .store_folder()
        .join(format!("runs/{run}/summary.json"));
    let mut summary: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(summary["elapsed_seconds"].is_number(), "{summary}");
    summary["elapsed_seconds"] = 1e300.into();
    fs::write(&path, summary.to_string()).unwrap();
    fs::remove_file(fleet.store_folder().join("runs/last-closed.json")).unwrap();
    let shown = Shown::by(observer(&fleet));
    shown.wait_for(&["repofleet_run_closed 1"]);
    shown.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_away_is_waited_for_and_said() {
    let fleet = Fleet::of(&["o/a"]);
    let mut command = observer(&fleet);
    command.env("BROKER_URL", "amqp://127.0.0.1:1");
    let shown = Shown::by(command);
    shown.wait_for(&[
        r#"repofleet_observer_reached{what="store"} 1"#,
        r#"repofleet_observer_reached{what="broker"} 0"#,
    ]);
    let ready = block_in_place(|| get(&shown.address, "/ready"));
    assert!(ready.starts_with("HTTP/1.1 503 "), "{ready}");
    block_in_place(|| shown.observer.wait_for_line("the broker is away"));
    shown.stop();

    let mut nowhere = bare_producer();
    nowhere
        .arg("observe")
        .arg("--store")
        .arg(fleet.store_folder());
    let nowhere = ended(nowhere).with(2);
    assert!(
        nowhere.stderr.contains("--metrics-addr"),
        "{}",
        nowhere.stderr
    );
}
