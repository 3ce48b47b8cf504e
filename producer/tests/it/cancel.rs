//! `producer cancel`: what waits of a run is taken off a real broker's queues, and nothing else.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use common::broker::{Broker, Event, Position, Settlement, Waiting};
use common::exit;
use common::ids::RunId;
use common::outcome::Outcome;
use futures::{StreamExt, TryStreamExt, stream};
use rustix::process::Signal;
use serde_json::{Value, json};
use testing::broker_contract::job;
use testing::git_server::{Fault, Kind};
use testing::rabbitmq::shared_url;
use testing::s3_server::S3Server;

use crate::distributed::Distributed;
use crate::fleet::{Ended, Fleet, Running, bare_producer, wait_until};
use crate::on_broker::proxy_to_broker;
use crate::status::{Queues, ended, next};

/// A fleet with this many names of one small repository, and a bucket in this process.
fn fleet_of(count: usize) -> (Distributed, S3Server, Vec<String>) {
    let fleet = Fleet::of(&["c/one"]);
    let names: Vec<_> = (0..count).map(|n| format!("c/r{n:04}")).collect();
    for name in &names {
        symlink("one.git", fleet.repositories().join(format!("{name}.git"))).unwrap();
    }
    write_feed(&fleet, &names);
    let bucket = S3Server::start();
    let fleet = Distributed::new(fleet, shared_url(), bucket.url());
    (fleet, bucket, names)
}

fn write_feed(fleet: &Fleet, names: &[String]) {
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    fleet.write_feed(&fleet.entries(&names));
}

fn command(fleet: &Distributed, arguments: &[&str]) -> Command {
    let mut command = bare_producer();
    fleet.tell(&mut command);
    command.args(arguments).args(["--store", "s3://digests"]);
    command
}

fn cancel(fleet: &Distributed, arguments: &[&str]) -> Ended {
    let arguments = [&["cancel"], arguments].concat();
    Running::start(&mut command(fleet, &arguments)).wait()
}

fn status(fleet: &Distributed, run: &str) -> Value {
    let mut command = command(fleet, &["status", run, "--json"]);
    let shown = Running::start(&mut command).wait().with(exit::OK);
    serde_json::from_str(&shown.stdout).unwrap()
}

fn document(bucket: &S3Server, key: &str) -> Value {
    let objects = bucket.objects();
    let object = objects.get(key).unwrap_or_else(|| panic!("{key}"));
    serde_json::from_slice(&object.content).unwrap()
}

/// The run begun last.
fn latest(bucket: &S3Server) -> String {
    let latest = document(bucket, "runs/latest.json");
    latest["run"].as_str().unwrap().to_owned()
}

#[test]
fn a_cancelled_run_closes_and_the_next_one_does_the_rest() {
    const REPOS: usize = 300;
    let (fleet, bucket, names) = fleet_of(REPOS);
    let server = &fleet.fleet.server;
    // The worker is at the first one for as long as this lasts.
    server.fault(
        &names[0],
        Fault::Latency(Duration::from_secs(20))
            .on(Kind::UploadPack)
            .times(1),
    );
    let worker = fleet.start_worker(&["--concurrency", "1"]);
    let run = Running::start(&mut fleet.producer(&["--max-failures", "100%"]));
    run.wait_for_line("Jobs published: 300");
    server.wait_for_requests(&names[0], 2);
    let id = latest(&bucket);

    let dry = cancel(&fleet, &["latest", "--dry-run"]).with(exit::OK);
    assert_eq!(
        dry.stdout,
        format!(
            "299 jobs of run {id} would be cancelled, 1 left to the worker that has it in hand\n"
        )
    );
    let look = fleet.look(&fleet.broker_url);
    assert_eq!(look.waiting().ready, 299);
    let done = cancel(&fleet, &["latest"]).with(exit::OK);
    assert_eq!(
        done.stdout,
        format!("299 jobs of run {id} cancelled, 1 left to the worker that has it in hand\n")
    );
    let waiting = look.waiting();
    assert_eq!((waiting.ready, waiting.retry, waiting.dead), (0, 0, 0));

    let run = run.wait().with(exit::TOO_MANY_FAILED);
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 300 total, 0 cached (0.0%), 1 processed, 299 failed"
    );
    let said = [
        "299 failed: 299 cancelled",
        "299 jobs were cancelled; the next run does",
    ];
    for said in said {
        assert!(run.stdout.contains(said), "{}", run.stdout);
    }
    assert!(
        !run.stdout.contains("Failed: c/"),
        "not one by one: {}",
        run.stdout
    );
    let progress = run.messages("progress");
    assert!(
        progress
            .iter()
            .any(|line| line.ends_with("; 299 cancelled")),
        "{progress:?}"
    );
    let summary = document(&bucket, &format!("runs/{id}/summary.json"));
    assert_eq!(summary["failures_by_class"], json!({"cancelled": 299}));
    assert_eq!(
        status(&fleet, &id)["failures_by_class"],
        json!({"cancelled": 299})
    );
    // It tells nobody how fresh the digests are, nor that anything is wrong with a repository.
    for absent in ["runs/last-closed.json", "runs/failures.json"] {
        assert!(!bucket.objects().contains_key(absent), "{absent}");
    }
    let again = cancel(&fleet, &[&id]).with(exit::OK);
    let closed = format!("run {id} has closed, 299 jobs cancelled: nothing waits\n");
    assert_eq!(again.stdout, closed);

    let next = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert_eq!(
        next.sentence(),
        "Pipeline complete: 300 total, 1 cached (0.3%), 299 processed, 0 failed"
    );
    assert_eq!(server.total_fetches(), REPOS as u64);
    let whole = document(&bucket, "runs/last-closed.json");
    assert_eq!(whole["before"], Value::Null);
    let closed = cancel(&fleet, &["latest"]).with(exit::OK).stdout;
    assert!(closed.ends_with(" has closed: nothing waits\n"), "{closed}");
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

/// Jobs of two runs on one broker; `wrong` is the one to cancel.
struct TwoRuns {
    queues: Queues,
    wrong: RunId,
    right: RunId,
}

impl TwoRuns {
    const JOBS: usize = 150;

    /// Their jobs in turn, a few of each set aside for a minute, and a few after one attempt.
    async fn new() -> Self {
        let queues = Queues::new().await;
        let (wrong, right) = (RunId::new(), RunId::new());
        let jobs = (0..Self::JOBS).flat_map(|n| [job(&wrong, n), job(&right, n)]);
        let enqueued = queues.broker.enqueue(stream::iter(jobs).boxed()).await;
        assert_eq!(enqueued.unwrap().jobs, 2 * Self::JOBS as u64);
        let mut taken = Vec::new();
        let mut deliveries = queues.deliveries(20).await;
        for _ in 0..20 {
            taken.push(next(&mut deliveries).await);
        }
        drop(deliveries);
        for (n, delivery) in (0..).zip(taken) {
            let after = Duration::from_secs(if n < 10 { 60 } else { 1 });
            let settlement = Settlement::Again {
                after,
                attempt: 1,
                waits: 2,
                returns: 3,
            };
            delivery.settle(settlement).await.unwrap();
        }
        let two = Self {
            queues,
            wrong,
            right,
        };
        two.wait(|waiting| (waiting.ready, waiting.retry) == (290, 10))
            .await;
        two
    }

    async fn wait(&self, so: impl Fn(Waiting) -> bool) {
        self.queues.wait(so).await;
    }

    fn cancel(&self, failpoint: Option<&str>) -> Ended {
        let store = tempfile::tempdir().unwrap();
        let mut command = bare_producer();
        command
            .args(["cancel", self.wrong.as_str(), "--store"])
            .arg(store.path())
            .envs(failpoint.map(|failpoint| ("REPOFLEET_FAILPOINT", failpoint)));
        ended(self.queues.named_to(command))
    }

    /// How often each job of the run that stays is there, all with the counts that they had but
    /// for `returns`.
    async fn rest(&self, returns: u32) -> BTreeMap<String, usize> {
        let until = Default::default();
        let taken = self.queues.broker.take_waiting(until).await.unwrap();
        let taken: Vec<_> = taken.try_collect().await.unwrap();
        let mut seen = BTreeMap::new();
        for delivery in &taken {
            assert_eq!(delivery.job.run, self.right);
            let number: usize = delivery.job.repo.name()[5..].parse().unwrap();
            let before = if number < 10 { (1, 2, 3) } else { (0, 0, 0) };
            let extra = delivery.returns - before.2;
            assert_eq!((delivery.attempt, delivery.waits), (before.0, before.1));
            assert!(extra <= returns, "{extra} returns of {}", delivery.job.id());
            *seen.entry(delivery.job.id()).or_default() += 1;
        }
        seen
    }

    /// How often the ledger says of a job that it was cancelled.
    async fn cancelled(&self) -> BTreeMap<String, usize> {
        let history = self.queues.broker.history(Position::Start).await.unwrap();
        let entries: Vec<_> = history.try_collect().await.unwrap();
        let mut outcomes = BTreeMap::new();
        let mut jobs = 0;
        for entry in entries {
            match entry.event {
                Event::Job(_) => jobs += 1,
                Event::Outcome(record) => {
                    assert_eq!(
                        (&record.run, record.outcome),
                        (&self.wrong, Outcome::CANCELLED)
                    );
                    *outcomes.entry(record.repo.to_string()).or_default() += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(jobs, 2 * Self::JOBS);
        outcomes
    }
}

/// Every one of these, once.
fn once(jobs: &BTreeMap<String, usize>) -> bool {
    jobs.len() == TwoRuns::JOBS && jobs.values().all(|count| *count == 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_other_runs_stay_as_they_are() {
    let two = TwoRuns::new().await;
    let run = &two.wrong;
    let done = two.cancel(None).with(exit::OK);
    assert_eq!(done.stdout, format!("150 jobs of run {run} cancelled\n"));
    // Those that were set aside are there again.
    two.wait(|waiting| (waiting.ready, waiting.retry) == (145, 5))
        .await;
    assert!(once(&two.cancelled().await));
    assert!(once(&two.rest(0).await));
    let again = two.cancel(None).with(exit::OK);
    let closed = format!("run {run} has closed, 150 jobs cancelled: nothing waits\n");
    assert_eq!(again.stdout, closed);
    assert!(once(&two.cancelled().await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_in_the_middle_loses_nothing_and_counts_nothing_twice() {
    for failpoint in ["after-cancel:40", "after-put-back:40"] {
        let two = TwoRuns::new().await;
        let crashed = two.cancel(Some(failpoint));
        assert_eq!(crashed.status.code(), None, "{}", crashed.stderr);
        let before = two.cancelled().await.len();
        assert!(
            (1..TwoRuns::JOBS).contains(&before),
            "{failpoint}: {before}"
        );
        // What it had on loan comes back.
        let done = two.cancel(None).with(exit::OK).stdout;
        let end = format!(" jobs of run {} cancelled\n", two.wrong);
        let rest = done.strip_suffix(&end).expect(&done);
        let rest: usize = rest.parse().unwrap();
        assert!(
            (1..=TwoRuns::JOBS - before).contains(&rest),
            "{failpoint}: {done}"
        );
        assert!(once(&two.cancelled().await), "{failpoint}");
        let there = two.rest(1).await;
        assert_eq!(there.len(), TwoRuns::JOBS, "{failpoint}");
        // A copy whose original was not acknowledged costs a look at the store.
        let copies = there.values().sum::<usize>() - TwoRuns::JOBS;
        assert!(copies <= 64, "{failpoint}: {copies} copies");
    }
}

/// As one from before workers said which jobs they have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_silent_worker_has_in_hand_is_left_to_it() {
    let two = TwoRuns::new().await;
    let mut deliveries = two.queues.deliveries(1).await;
    let held = next(&mut deliveries).await;
    assert_eq!(held.job.run, two.wrong);
    let done = two.cancel(None).with(exit::OK).stdout;
    let run = &two.wrong;
    assert_eq!(
        done,
        format!(
            "149 jobs of run {run} cancelled, 1 left that may be in hand: not every worker answers\n"
        )
    );
    held.settle(Settlement::Done).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_stops_it_between_two_jobs() {
    let two = TwoRuns::new().await;
    let mut command = bare_producer();
    command.args(["cancel", two.wrong.as_str()]);
    let (proxy, mut command) = two.queues.named_through_a_proxy_to(command);
    let store = tempfile::tempdir().unwrap();
    command.arg("--store").arg(store.path());
    proxy.stall_at(b"its run was cancelled");
    let stopped = Running::start(&mut command);
    // It has taken a job, and no outcome passes.
    two.wait(|waiting| waiting.retry < 10).await;
    stopped.signal(Signal::TERM);
    tokio::task::block_in_place(|| stopped.wait_for_error("stopping as soon as"));
    proxy.flow();
    let stopped = tokio::task::block_in_place(|| stopped.wait()).with(exit::TERMINATED);
    let end = "cancelled, stopped before the end\n";
    assert!(stopped.stdout.ends_with(end), "{}", stopped.stdout);
    let before = two.cancelled().await.len();
    assert!((1..TwoRuns::JOBS).contains(&before), "{before}");
    two.cancel(None).with(exit::OK);
    assert!(once(&two.cancelled().await));
    assert!(once(&two.rest(0).await));
}

/// The broker gets no more than three quarters of its jobs until it is being cancelled.
#[test]
fn a_run_that_still_publishes_is_cancelled_to_its_end() {
    const REPOS: usize = 2000;
    let (mut fleet, bucket, _) = fleet_of(REPOS);
    let direct = fleet.broker_url.clone();
    let proxy = proxy_to_broker(&mut fleet);
    proxy.stall_at(b"c/r1500");
    let run = Running::start(&mut fleet.producer(&[]));
    fleet.broker_url = direct;
    let look = fleet.look(&fleet.broker_url);
    wait_until("half of the jobs", || look.waiting().ready > 500);
    let mut command = command(&fleet, &["cancel", "latest"]);
    let cancelling = Running::start(&mut command);
    // It has taken what there was, and a quarter is not published yet.
    wait_until("it to take them", || look.waiting().ready == 0);
    proxy.flow();
    let id = latest(&bucket);
    let done = cancelling.wait().with(exit::OK);
    assert_eq!(done.stdout, format!("2,000 jobs of run {id} cancelled\n"));
    let run = run.wait().with(exit::TOO_MANY_FAILED);
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 2,000 total, 0 cached (0.0%), 0 processed, 2,000 failed"
    );
    let waiting = look.waiting();
    // A connection that was given up meanwhile brings its jobs a second time, and perhaps late.
    let twice = run.stdout.contains("connecting again");
    assert!(waiting.ready == 0 || twice, "{waiting:?}");
    let mut counts = BTreeMap::new();
    for entry in look.ledger() {
        if let Event::Outcome(record) = entry.event {
            *counts.entry(record.repo).or_insert(0) += 1;
        }
    }
    assert_eq!(counts.len(), REPOS);
    assert!(counts.values().all(|count| *count == 1));
}

/// Most of its jobs were never published, and never will be.
#[test]
fn a_run_whose_producer_was_killed_is_cancelled_all_the_same() {
    let (fleet, bucket, _) = fleet_of(200);
    let mut producer = fleet.producer(&[]);
    producer.env("REPOFLEET_FAILPOINT", "mid-publish:20");
    assert_eq!(Running::start(&mut producer).wait().status.code(), None);
    let id = latest(&bucket);
    let done = cancel(&fleet, &[&id]).with(exit::OK);
    assert_eq!(done.stdout, format!("200 jobs of run {id} cancelled\n"));
    let status = status(&fleet, &id);
    assert_eq!(status["state"], "closed", "{status}");
    assert_eq!(status["failures_by_class"], json!({"cancelled": 200}));
}

#[test]
fn what_runs_adopted_from_each_other_is_cancelled_for_one_alone() {
    let (fleet, bucket, names) = fleet_of(4);
    write_feed(&fleet.fleet, &names[..3]);
    let detached = Running::start(&mut fleet.producer(&["--detach"]));
    detached.wait().with(exit::OK);
    let first = latest(&bucket);

    // One that adopted jobs no longer waits for them; they stay what they are to their own run.
    write_feed(&fleet.fleet, &names);
    let run = Running::start(&mut fleet.producer(&[]));
    run.wait_for_line("Jobs published: 1; of earlier runs, still waiting: 3");
    let second = latest(&bucket);
    let done = cancel(&fleet, &["latest"]).with(exit::OK);
    assert_eq!(done.stdout, format!("4 jobs of run {second} cancelled\n"));
    run.wait().with(exit::TOO_MANY_FAILED);
    let look = fleet.look(&fleet.broker_url);
    assert_eq!(look.waiting().ready, 3);
    assert_eq!(status(&fleet, &first)["open"], 3);

    // What it adopted from a run that is cancelled, it publishes itself.
    let run = Running::start(&mut fleet.producer(&["--republish-after", "1s"]));
    run.wait_for_line("Jobs published: 1; of earlier runs, still waiting: 3");
    let done = cancel(&fleet, &[&first]).with(exit::OK);
    assert_eq!(done.stdout, format!("3 jobs of run {first} cancelled\n"));
    let worker = fleet.start_worker(&[]);
    let run = run.wait().with(exit::OK);
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 4 total, 0 cached (0.0%), 4 processed, 0 failed"
    );
    assert!(run.stdout.contains("publishing again"), "{}", run.stdout);
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

#[test]
fn what_cannot_be_cancelled_is_said() {
    let (fleet, _bucket, names) = fleet_of(1);
    let none = cancel(&fleet, &["latest"]).with(exit::USAGE);
    assert!(
        none.stderr.contains("has seen no run yet"),
        "{}",
        none.stderr
    );
    let none = cancel(&fleet, &["20261123T130000Z-0a1b2c"]).with(exit::USAGE);
    let said = "there is no run 20261123T130000Z-0a1b2c";
    assert!(none.stderr.contains(said), "{}", none.stderr);

    // One in this process alone.
    let server = &fleet.fleet.server;
    server.fault(&names[0], Fault::Hang.on(Kind::InfoRefs));
    let mut command = fleet.producer(&[]);
    command.env_remove("BROKER_URL").args(["--drain", "0s"]);
    let run = Running::start(&mut command);
    server.wait_for_requests(&names[0], 1);
    run.signal(Signal::TERM);
    run.wait().with(exit::TERMINATED);
    let unknown = cancel(&fleet, &["latest"]).with(exit::USAGE);
    let said = "a run without a broker is stopped where it runs, by Ctrl-C or SIGTERM";
    assert!(unknown.stderr.contains(said), "{}", unknown.stderr);
    let mut alone = self::command(&fleet, &["cancel", "latest"]);
    let alone = Running::start(alone.env_remove("BROKER_URL")).wait();
    let alone = alone.with(exit::USAGE);
    assert!(alone.stderr.contains(said), "{}", alone.stderr);
}
