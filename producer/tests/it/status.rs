//! `producer status`: a run on a real broker, looked at from outside.

use std::fs::{self, File};
use std::io::Read;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::{Broker, Delivery, Event, Settlement, Waiting, WorkerState};
use common::fault::FaultKind;
use common::outcome::Outcome;
use futures::StreamExt;
use futures::stream::BoxStream;
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};
use testing::broker_contract::outcome;
use testing::rabbitmq::{fresh_prefix, shared_url};
use testing::tcp_proxy::TcpProxy;
use time::format_description::well_known::Rfc3339;
use tokio::task::block_in_place;

use crate::fleet::{Ended, Fleet, Running, bare_producer, wait_until};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A broker of one's own.
pub(crate) struct Queues {
    pub(crate) url: String,
    pub(crate) prefix: String,
    pub(crate) broker: AmqpBroker,
}

impl Queues {
    pub(crate) async fn new() -> Self {
        let url = block_in_place(shared_url);
        let prefix = fresh_prefix();
        let broker = AmqpBroker::connect(Options::new(&url, &prefix).unwrap());
        Self {
            broker: broker.await.unwrap(),
            url,
            prefix,
        }
    }

    /// With this broker in its environment.
    pub(crate) fn named_to(&self, mut command: Command) -> Command {
        command
            .env("BROKER_URL", &self.url)
            .env("QUEUE_PREFIX", &self.prefix);
        command
    }

    /// The same, by way of a proxy.
    pub(crate) fn named_through_a_proxy_to(&self, command: Command) -> (TcpProxy, Command) {
        let (before, target) = self.url.rsplit_once('@').unwrap();
        let target: SocketAddr = target.parse().unwrap();
        let proxy = TcpProxy::start(target);
        let mut command = self.named_to(command);
        command.env("BROKER_URL", format!("{before}@{}", proxy.address()));
        (proxy, command)
    }

    pub(crate) async fn deliveries(&self, prefetch: u16) -> BoxStream<'static, Delivery> {
        self.broker.deliveries(prefetch).await.unwrap()
    }

    /// Returns when the queues are `so`.
    pub(crate) async fn wait(&self, so: impl Fn(Waiting) -> bool) {
        let start = Instant::now();
        loop {
            let waiting = self.broker.waiting().await.unwrap();
            if so(waiting) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{waiting:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What a worker does when it is done.
    pub(crate) async fn settle(&self, delivery: Delivery, ended: Outcome) {
        let event = outcome(&delivery.job, ended);
        self.broker.record(&event).await.unwrap();
        delivery.settle(Settlement::Done).await.unwrap();
    }
}

pub(crate) async fn next(deliveries: &mut BoxStream<'static, Delivery>) -> Delivery {
    let next = tokio::time::timeout(PATIENCE, deliveries.next());
    next.await.expect("promptly").expect("not the end")
}

/// Runs it to its end.
pub(crate) fn ended(mut command: Command) -> Ended {
    block_in_place(|| Running::start(&mut command).wait())
}

fn status(fleet: &Fleet, arguments: &[&str]) -> Command {
    let mut command = bare_producer();
    command
        .arg("status")
        .args(arguments)
        .arg("--store")
        .arg(fleet.store_folder());
    command
}

/// Has the real producer publish the fleet's jobs, and gives the run's id.
fn detached(fleet: &Fleet, queues: &Queues) -> String {
    let arguments = [
        "--detach",
        "--broker-url",
        &queues.url,
        "--queue-prefix",
        &queues.prefix,
    ];
    ended(fleet.producer(&arguments)).with(0);
    let latest = fs::read(fleet.store_folder().join("runs/latest.json")).unwrap();
    let latest: Value = serde_json::from_slice(&latest).unwrap();
    latest["run"].as_str().unwrap().to_owned()
}

/// What `producer status --json` says of the latest run.
fn seen(fleet: &Fleet, queues: &Queues) -> Value {
    let ended = ended(queues.named_to(status(fleet, &["--json"]))).with(0);
    serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {}", ended.stdout))
}

/// The same, once it is so: the broker counts its queues a little later.
fn seen_so(fleet: &Fleet, queues: &Queues, part: &Value) -> Value {
    let mut last = Value::Null;
    wait_until("the status", || {
        last = seen(fleet, queues);
        let so = |(name, value): (&String, &Value)| last[name] == *value;
        part.as_object().unwrap().iter().all(so)
    });
    last
}

fn page(fleet: &Fleet, queues: &Queues) -> String {
    ended(queues.named_to(status(fleet, &[]))).with(0).stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_seen_while_its_jobs_wait_are_worked_on_and_when_it_has_closed() {
    let (fleet, queues) = (Fleet::of(&["s/a", "s/b", "s/c"]), Queues::new().await);
    let run = detached(&fleet, &queues);
    let waiting = seen_so(&fleet, &queues, &json!({"waiting": 3}));
    for (name, value) in [
        ("run_id", json!(run)),
        ("state", json!("running")),
        ("source", json!("ledger")),
        ("total_repos", json!(3)),
        ("cached", json!(0)),
        ("processed", json!(0)),
        ("open", json!(3)),
        ("adopted", json!(0)),
        ("waiting_retry", json!(0)),
        ("in_work_or_lost", json!(0)),
        ("dead_letters", json!(0)),
        ("outcomes_per_minute", json!(0.0)),
        ("eta_seconds", Value::Null),
        ("workers_connected", json!(0)),
        ("workers_seen", json!(0)),
        ("notes", json!([])),
    ] {
        assert_eq!(waiting[name], value, "{name} of {waiting}");
    }
    assert!(waiting["oldest_open_seconds"].is_u64(), "{waiting}");
    let text = page(&fleet, &queues);
    assert!(
        text.starts_with(&format!("Run {run}: running for ")),
        "{text}"
    );
    assert!(text.contains("wait for a worker           3\n"), "{text}");
    assert!(text.contains("No worker is connected"), "{text}");

    // One is done, one in work.
    let mut deliveries = queues.deliveries(1).await;
    let first = next(&mut deliveries).await;
    queues.settle(first, Outcome::Superseded).await;
    let second = next(&mut deliveries).await;
    let part = json!({"waiting": 1, "in_work_or_lost": 1, "workers_connected": 1});
    let working = seen_so(&fleet, &queues, &part);
    for (name, value) in [
        ("processed", json!(1)),
        ("superseded", json!(1)),
        ("open", json!(2)),
        ("workers_seen", json!(1)),
    ] {
        assert_eq!(working[name], value, "{name} of {working}");
    }
    assert!(working["eta_seconds"].is_u64(), "{working}");

    // One fails; the broker gives up the last.
    let gone = Outcome::Failed(FaultKind::Gone);
    queues.settle(second, gone).await;
    let third = next(&mut deliveries).await;
    third.settle(Settlement::Dead).await.unwrap();
    let closed = seen_so(
        &fleet,
        &queues,
        &json!({"state": "closed", "dead_letters": 1}),
    );
    assert_eq!(closed["open"], 0);
    assert_eq!(closed["failed"], 2);
    assert_eq!(closed["failures_by_class"], json!({"gone": 1, "killed": 1}));
    let text = page(&fleet, &queues);
    assert!(text.contains("3/3 (100.0%)"), "{text}");
    assert!(
        text.contains("failed                        2  1 gone, 1 killed"),
        "{text}"
    );
    assert!(text.contains("1, see `producer dead list`"), "{text}");
}

/// A run of one process leaves a summary, and that is enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_has_ended_is_told_from_its_summary() {
    let fleet = Fleet::of(&["s/a", "s/b"]);
    let run = block_in_place(|| fleet.run(&[])).with(0).run_id();
    for arguments in [&["--json"][..], &["--json", "--watch"], &["--json", &run]] {
        let told = ended(status(&fleet, arguments)).with(0);
        let told: Value = serde_json::from_str(&told.stdout).unwrap();
        assert_eq!(told["run_id"], json!(run));
        assert_eq!(told["state"], "closed");
        assert_eq!(told["source"], "summary");
        assert_eq!(told["processed"], 2);
        assert_eq!(told["dead_letters"], Value::Null);
        assert_eq!(told["notes"], json!([]));
    }
    // With a broker that is away, that is said too.
    let mut command = status(&fleet, &["--json"]);
    command.env("BROKER_URL", "amqp://127.0.0.1:1");
    let told = ended(command).with(0);
    let told: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(told["state"], "closed");
    let note = told["notes"][0].as_str().unwrap();
    assert!(
        note.starts_with("nothing is known of the queues: "),
        "{note}"
    );
}

/// Its ledger is in its memory: what it stores of its progress is shown, until there is a summary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_in_one_process_is_shown_while_it_goes_on() {
    let fleet = Fleet::of(&["s/a", "s/b"]);
    let seen_as = |arguments: &[&str], state: &str| {
        let told = ended(status(&fleet, arguments)).with(0);
        let told: Value = serde_json::from_str(told.stdout.lines().last().unwrap()).unwrap();
        assert_eq!(told["state"], state, "{told}");
        told
    };
    fleet.server.set_held(true);
    let run = fleet.start(&[]);
    let folder = fleet.store_folder();
    block_in_place(|| {
        wait_until("its progress is stored", || {
            fleet.server.asked_at().len() == 2
                && ended(status(&fleet, &["--json"])).stdout.contains("run_id")
        });
    });
    let told = seen_as(&["--json"], "running");
    let numbers = (&told["source"], &told["open"], &told["notes"]);
    assert_eq!(numbers, (&json!("progress"), &json!(2), &json!([])));

    let watch = Running::start(&mut status(&fleet, &["--watch", "--json"]));
    block_in_place(|| watch.wait_for_line("running"));
    fleet.server.set_held(false);
    let run_id = block_in_place(|| run.wait()).with(0).run_id();
    let watched = block_in_place(|| watch.wait()).with(0).stdout;
    let last: Value = serde_json::from_str(watched.lines().last().unwrap()).unwrap();
    let numbers = (&last["state"], &last["processed"]);
    assert_eq!(numbers, (&json!("closed"), &json!(2)));

    // As if it had been killed an hour ago.
    let run_folder = folder.join("runs").join(&run_id);
    fs::remove_file(run_folder.join("summary.json")).unwrap();
    let path = run_folder.join("progress.json");
    let mut progress: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let hour_ago = time::OffsetDateTime::now_utc() - Duration::from_secs(3600);
    progress["at"] = json!(hour_ago.format(&Rfc3339).unwrap());
    fs::write(&path, progress.to_string()).unwrap();
    let told = seen_as(&["--json", "--watch"], "stopped");
    let note = told["notes"][0].as_str().unwrap();
    assert!(
        note.starts_with("its process has stored nothing since "),
        "{note}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_knows_nothing_is_not_believed() {
    let (fleet, queues) = (Fleet::of(&["s/a", "s/b"]), Queues::new().await);
    let run = detached(&fleet, &queues);
    let empty = Queues::new().await;
    let told = seen(&fleet, &empty);
    assert_eq!(told["open"], 2);
    let notes = told["notes"].to_string();
    assert!(
        notes.contains("the ledger knows nothing of this run"),
        "{notes}"
    );

    // Its producer saw one outcome before it was stopped.
    let summary = json!({
        "run_id": run, "closed": false, "total_repos": 2, "cached": 0, "processed": 1,
        "unchanged": 0, "superseded": 0, "adopted": 0, "failed": 0, "cache_hit_rate": 0.0,
        "elapsed_seconds": 3.5, "elapsed_formatted": "3s", "failures_by_class": {},
        "bytes_stored": 1, "bytes_fetched": 1, "failures": [], "open": ["s/b"],
    });
    let path = fleet.store_folder().join("runs").join(&run);
    fs::write(path.join("summary.json"), summary.to_string()).unwrap();
    let told = seen(&fleet, &empty);
    assert_eq!(
        (&told["source"], &told["processed"]),
        (&json!("summary"), &json!(1))
    );
    let notes = told["notes"].to_string();
    assert!(notes.contains("the ledger knows less"), "{notes}");
    // Without a broker likewise, but for what there is to know.
    let told = ended(status(&fleet, &[])).with(0).stdout;
    assert!(
        told.starts_with(&format!("Run {run}: stopped after 3s\n")),
        "{told}"
    );
    assert!(told.contains("with BROKER_URL set"), "{told}");

    // Where the ledger knows more, it is what counts.
    let mut deliveries = queues.deliveries(2).await;
    for _ in 0..2 {
        let delivery = next(&mut deliveries).await;
        queues.settle(delivery, Outcome::Processed).await;
    }
    let told = seen(&fleet, &queues);
    assert_eq!(
        (&told["source"], &told["state"]),
        (&json!("ledger"), &json!("closed"))
    );
    assert_eq!(told["processed"], 2);
}

/// The ledger holds all that such a run waits for, under the name of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_nothing_but_adopted_jobs_is_known() {
    let (fleet, queues) = (Fleet::of(&["s/a", "s/b"]), Queues::new().await);
    let first = detached(&fleet, &queues);
    seen_so(&fleet, &queues, &json!({"waiting": 2}));
    assert_ne!(detached(&fleet, &queues), first);
    let told = seen(&fleet, &queues);
    assert_eq!((&told["adopted"], &told["open"]), (&json!(2), &json!(2)));
    assert_eq!(told["notes"], json!([]));
}

/// As while its disk is full: nothing can be written to find the ledger's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_cannot_be_read_proves_nothing() {
    let (fleet, queues) = (Fleet::of(&["s/a"]), Queues::new().await);
    let run = detached(&fleet, &queues);
    let replay = common::ids::RunId::new();
    let job = testing::broker_contract::job(&replay, 1);
    queues.broker.record(&Event::Job(job)).await.unwrap();

    let through = |arguments: &[&str]| {
        let (proxy, mut command) = queues.named_through_a_proxy_to(status(&fleet, arguments));
        proxy.stall_at(b"mark-");
        (proxy, Running::start(&mut command))
    };
    let once = through(&[&run, "--json"]);
    let listed = through(&[&run, "--json", "--watch"]);
    let unlisted = through(&[replay.as_str(), "--json", "--watch"]);
    let (proxy, once) = once;
    let told = block_in_place(|| once.wait()).with(0).stdout;
    drop(proxy);
    let told: Value = serde_json::from_str(&told).unwrap();
    let notes = told["notes"].to_string();
    assert!(notes.contains("there may be more outcomes"), "{notes}");
    assert!(!notes.contains("in the ledger"), "{notes}");

    for (proxy, watch) in [listed, unlisted] {
        let page = block_in_place(|| watch.wait_for_line("cannot be used"));
        assert!(page.contains("\"state\":\"running\""), "{page}");
        assert!(!page.contains("in the ledger"), "{page}");
        proxy.flow();
        let page = block_in_place(|| watch.wait_for_line("\"open\":1,\"outcomes"));
        assert!(page.contains("\"state\":\"running\""), "{page}");
        watch.signal(Signal::TERM);
        block_in_place(|| watch.wait()).with(143);
    }
}

/// Its producer knows of an outcome that the ledger lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_believes_a_summary_that_closes() {
    let (fleet, queues) = (Fleet::of(&["s/a"]), Queues::new().await);
    let run = detached(&fleet, &queues);
    let mut command = queues.named_to(status(&fleet, &["--watch", "--json"]));
    let watch = Running::start(&mut command);
    block_in_place(|| watch.wait_for_line("\"open\":1"));
    let summary = json!({
        "run_id": run, "closed": true, "total_repos": 1, "cached": 0, "processed": 1,
        "unchanged": 1, "superseded": 0, "adopted": 0, "failed": 0, "cache_hit_rate": 0.0,
        "elapsed_seconds": 3.5, "elapsed_formatted": "3s", "failures_by_class": {},
        "bytes_stored": 0, "bytes_fetched": 0, "failures": [], "open": [],
    });
    let path = fleet.store_folder().join("runs").join(&run);
    fs::write(path.join("summary.json"), summary.to_string()).unwrap();
    let watch = block_in_place(|| watch.wait()).with(0);
    let last: Value = serde_json::from_str(watch.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["state"], &last["source"]),
        (&json!("closed"), &json!("summary"))
    );
    assert_eq!(last["notes"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_told_says_how_it_could() {
    let (fleet, queues) = (Fleet::of(&["s/a"]), Queues::new().await);
    let none_yet = ended(status(&fleet, &[])).with(2);
    assert!(
        none_yet.stderr.contains("has seen no run yet"),
        "{}",
        none_yet.stderr
    );
    assert_eq!(none_yet.stdout, "");

    for command in [
        status(&fleet, &["no-such-run"]),
        queues.named_to(status(&fleet, &["no-such-run"])),
        queues.named_to(status(&fleet, &["no-such-run", "--watch"])),
    ] {
        let unknown = ended(command).with(2);
        let runs = fleet.store_folder().join("runs");
        let expected = format!(
            "there is no run no-such-run: the runs of this store are the folders of {}/",
            runs.display()
        );
        assert!(unknown.stderr.contains(&expected), "{}", unknown.stderr);
    }
    ended(status(&fleet, &["../../etc"])).with(2);

    detached(&fleet, &queues);
    let unnamed = ended(status(&fleet, &[])).with(2);
    assert!(
        unnamed.stderr.contains("set BROKER_URL"),
        "{}",
        unnamed.stderr
    );
    let mut away = status(&fleet, &[]);
    away.env("BROKER_URL", "amqp://127.0.0.1:1");
    let away = ended(away).with(69);
    assert!(away.stderr.contains("127.0.0.1:1"), "{}", away.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_follows_to_the_end_without_a_terminal() {
    let (fleet, queues) = (Fleet::of(&["s/a", "s/b"]), Queues::new().await);
    detached(&fleet, &queues);
    let mut command = queues.named_to(status(&fleet, &["--watch", "--json"]));
    let watch = Running::start(&mut command);
    let first = block_in_place(|| watch.wait_for_line("\"open\":2"));
    assert!(first.contains("\"state\":\"running\""), "{first}");
    let mut interrupted = queues.named_to(status(&fleet, &["--watch"]));
    let interrupted = Running::start(&mut interrupted);
    block_in_place(|| interrupted.wait_for_line("running for"));
    interrupted.signal(Signal::INT);
    block_in_place(|| interrupted.wait()).with(130);

    let mut deliveries = queues.deliveries(2).await;
    for _ in 0..2 {
        let delivery = next(&mut deliveries).await;
        queues.settle(delivery, Outcome::Processed).await;
    }
    let watch = block_in_place(|| watch.wait()).with(0);
    let last: Value = serde_json::from_str(watch.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["state"], &last["processed"]),
        (&json!("closed"), &json!(2))
    );
}

/// The terminal is given back as it was, with the last page on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_on_a_terminal_draws_and_leaves_it_tidy() {
    let (fleet, queues) = (Fleet::of(&["s/a"]), Queues::new().await);
    detached(&fleet, &queues);
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let terminal = ioctl_tiocgptpeer(&controller, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let size = Winsize {
        ws_row: 8,
        ws_col: 50,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&terminal, size).unwrap();
    let mut command = queues.named_to(status(&fleet, &["--watch"]));
    command.stdout(Stdio::from(terminal));
    let mut child = command.spawn().unwrap();
    // It holds the terminal's other end, and reading would never end.
    drop(command);
    let mut controller = File::from(controller);
    let mut output = String::new();
    let mut bytes = [0; 4096];
    // There are rows for that much.
    while !output.contains("0/1 (0.0%)") {
        let read = block_in_place(|| controller.read(&mut bytes)).unwrap();
        output += &String::from_utf8_lossy(&bytes[..read]);
    }
    let mut deliveries = queues.deliveries(1).await;
    let delivery = next(&mut deliveries).await;
    queues.settle(delivery, Outcome::Processed).await;
    // Ends with an error when the last writer is gone.
    let mut rest = Vec::new();
    block_in_place(|| controller.read_to_end(&mut rest).ok());
    output += &String::from_utf8_lossy(&rest);
    assert!(child.wait().unwrap().success(), "{output:?}");

    let (before, pages) = output.split_once("\u{1b}[?1049h").unwrap();
    assert_eq!(before, "");
    let (pages, after) = pages.split_once("\u{1b}[?1049l").unwrap();
    assert!(pages.ends_with("\u{1b}[?7h\u{1b}[?25h"), "{pages:?}");
    // Never more rows than there are, whatever there is to say.
    for page in pages.split("\u{1b}[H").skip(1) {
        assert!(page.matches("\r\n").count() < 8, "{page:?}");
    }
    // Nothing of a line is erased after it was written: a full one would lose its last character.
    for row in pages
        .split("\u{1b}[H")
        .skip(1)
        .flat_map(|p| p.split("\r\n"))
    {
        let text = row.strip_prefix("\u{1b}[K");
        let text = text.or(row.strip_prefix("\u{1b}[J")).expect(row);
        assert!(!text.contains("\u{1b}[K") && !text.contains("\u{1b}[J"));
    }
    assert!(pages.contains(": running for"), "{pages:?}");
    assert!(after.starts_with("Run "), "{after:?}");
    assert!(after.contains("closed after"), "{after:?}");
    assert!(after.contains("workers"), "all of the last page: {after:?}");
    assert!(!after.contains('\u{1b}'), "{after:?}");
    for line in after.lines() {
        assert!(line.chars().count() <= 50, "{line:?}");
    }
}

/// Of a run that no document is about, such as a replay, the ledger knows all there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_only_the_ledger_knows_is_shown() {
    let (fleet, queues) = (Fleet::of(&["s/a"]), Queues::new().await);
    let run = common::ids::RunId::new();
    let job = testing::broker_contract::job(&run, 1);
    queues.broker.record(&Event::Job(job)).await.unwrap();
    let told = ended(queues.named_to(status(&fleet, &[run.as_str(), "--json"]))).with(0);
    let told: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(
        (&told["total_repos"], &told["open"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(told["in_work_or_lost"], 1);
}

/// As a worker does whose bucket is closed to it, and one that a host rate-limited.
async fn pause(queues: &Queues, worker: &str, infra: Option<&str>, host: Option<i64>) {
    let state = WorkerState {
        worker: worker.to_owned(),
        infra: infra.map(str::to_owned),
        hosts: host
            .map(|until| ("github.com".to_owned(), until))
            .into_iter()
            .collect(),
    };
    queues.broker.record(&Event::Worker(state)).await.unwrap();
}

/// The reason that workers wait for reaches the run itself, its summary, and every onlooker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_workers_wait_reaches_run_status_and_observer() {
    let (fleet, queues) = (Fleet::of(&["s/a", "s/b"]), Queues::new().await);
    let mut run = queues.named_to(fleet.producer(&[]));
    let run = block_in_place(|| Running::start(&mut run));
    block_in_place(|| run.wait_for_line("Jobs published: 2"));
    let mut deliveries = queues.deliveries(1).await;
    let first = next(&mut deliveries).await;
    queues.settle(first, Outcome::Processed).await;

    let denied = Some("access denied to bucket x");
    let noon_2100 = 4_102_488_000_000;
    for worker in ["one", "two", "three"] {
        pause(&queues, worker, denied, None).await;
    }
    pause(&queues, "four", None, Some(noon_2100)).await;
    let sentences =
        "3 workers paused: access denied to bucket x; github.com rate-limited until 12:00 UTC";
    let line = block_in_place(|| run.wait_for_line("\"operation\":\"progress\""));
    assert!(line.contains(sentences), "{line}");

    let told = seen(&fleet, &queues);
    assert_eq!(
        told["paused"],
        json!([{"reason": "access denied to bucket x", "workers": 3}])
    );
    assert_eq!(
        told["hosts_paused"],
        json!([{"host": "github.com", "until": "2100-01-01T12:00:00Z"}])
    );
    let text = page(&fleet, &queues);
    for sentence in sentences.split("; ") {
        assert!(text.contains(&format!("\n{sentence}\n")), "{text}");
    }
    let mut observer = bare_producer();
    observer
        .args(["observe", "--metrics-addr", "127.0.0.1:0", "--store"])
        .arg(fleet.store_folder());
    let mut observer = queues.named_to(observer);
    let observer = block_in_place(|| Running::start(&mut observer));
    let address = block_in_place(|| crate::metrics::address(&observer));
    block_in_place(|| {
        observer.wait_for_line("3 workers paused: access denied");
        wait_until("the exporter shows the pauses", || {
            let metrics = crate::metrics::get(&address, "/metrics");
            let lines = ["repofleet_workers_paused 3", "repofleet_hosts_paused 1"];
            lines.iter().all(|line| metrics.lines().any(|l| l == *line))
        });
        observer.signal(Signal::TERM);
        observer.wait();
    });

    for worker in ["one", "two", "three", "four"] {
        pause(&queues, worker, None, None).await;
    }
    assert_eq!(seen(&fleet, &queues)["paused"], json!([]));
    pause(&queues, "one", denied, None).await;
    block_in_place(|| run.wait_for_line("1 worker paused: access denied to bucket x"));
    run.signal(Signal::TERM);
    let ended = block_in_place(|| run.wait());
    assert!(
        ended
            .stdout
            .contains("1 worker paused: access denied to bucket x"),
        "{}",
        ended.stdout
    );
}

/// Its producer's clock is ahead of the broker's. Whatever it says, there is an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_began_in_the_future_is_answered_about() {
    let (fleet, queues) = (Fleet::of(&["s/a", "s/b"]), Queues::new().await);
    let run = detached(&fleet, &queues);
    let path = fleet
        .store_folder()
        .join("runs")
        .join(&run)
        .join("manifest.json");
    let manifest = fs::read(&path).unwrap();
    let mut manifest: Value = serde_json::from_slice(&manifest).unwrap();
    for (ahead, adopted) in [(600, 0), (7_700, 0), (7_900, 2), (400_000, 2)] {
        let start = time::OffsetDateTime::now_utc() + Duration::from_secs(ahead);
        manifest["startedAt"] = json!(start.format(&Rfc3339).unwrap());
        manifest["adopted"] = json!(adopted);
        fs::write(&path, manifest.to_string()).unwrap();
        let begun = Instant::now();
        let told = seen(&fleet, &queues);
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(
            (&told["open"], &told["elapsed_seconds"]),
            (&json!(2), &json!(0))
        );
        let notes = told["notes"].to_string();
        assert!(
            notes.contains("in the future by this machine's clock"),
            "{notes}"
        );
        assert!(!notes.contains("ledger"), "all of it is read: {notes}");
    }
}
