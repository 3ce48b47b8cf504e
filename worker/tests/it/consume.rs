//! The whole of a worker: from a job in the queue to a digest in the store and an outcome in the
//! ledger, whatever goes wrong in between.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use common::broker::memory::MemoryBroker;
use common::broker::{Broker, Delivery, Event, InHand, Notice, Position, RollCall};
use common::fault::{Fault, FaultKind};
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::{Job, WIRE_VERSION};
use common::outcome::{Outcome, OutcomeRecord};
use common::shutdown::Shutdown;
use common::store::fs::FsStore;
use common::store::s3::S3Store;
use common::store::{
    Digest, DigestMeta, DigestStore, DocumentKey, Expected, Found, Listed, Put, Renewal,
    SharedStore, Version,
};
use common::telemetry::registry::Expose;
use common::telemetry::traces::Traces;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;
use testing::git_server::{Fault as Trouble, GitServer, Kind, Place};
use testing::s3_server::{Fate, S3Server};
use testing::small_disk::SmallDisk;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use worker::consume::Worker;
use worker::fetch::policy::FetchMode;
use worker::metrics::Metrics;
use worker::run::probe_at_start;

use crate::fixture::{Fixture, TEXT, as_root, build_over_memory, good, until};

use FaultKind::{Gone, Infra, Killed, TooLarge, Transient};

/// A worker at work, and both ends of its queue.
struct Work {
    broker: Arc<MemoryBroker>,
    store: SharedStore,
    _folder: TempDir,
    shutdown: Shutdown,
    worker: JoinHandle<Result<(), Fault>>,
    metrics: Metrics,
    start: Instant,
}

/// What tests choose of a worker.
struct Choice {
    drain: Duration,
    patience: Duration,
    host_rate: Option<f64>,
    /// What stands before the store of each test's own.
    store: fn(SharedStore) -> SharedStore,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            drain: Duration::from_secs(30),
            patience: Duration::from_secs(300),
            host_rate: None,
            store: |store| store,
        }
    }
}

impl Work {
    fn start(fixture: &Fixture, choice: &Choice) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker = Arc::new(MemoryBroker::default());
        let store = (choice.store)(Arc::new(FsStore::new(folder.path())));
        let metrics = Metrics::new();
        let slots = fixture.slots_counted(&metrics);
        let worker = Worker {
            name: "tested".to_owned(),
            broker: Arc::<MemoryBroker>::clone(&broker),
            store: Arc::clone(&store),
            slots,
            metrics: metrics.clone(),
            traces: Traces::default(),
            drain: choice.drain,
            host_rate: choice.host_rate,
            patience: Some(choice.patience),
        };
        let shutdown = Shutdown::default();
        let count = fixture.config.slots();
        let worker = {
            let shutdown = shutdown.clone();
            tokio::spawn(async move { worker.run(count, &shutdown).await })
        };
        Self {
            broker,
            store,
            _folder: folder,
            shutdown,
            worker,
            metrics,
            start: Instant::now(),
        }
    }

    /// Puts a job for each URL in the queue; the last part of it is the repository's name.
    async fn enqueue(&self, urls: impl IntoIterator<Item = String>) {
        let jobs: Vec<Job> = urls.into_iter().map(job).collect();
        let jobs = stream::iter(jobs).boxed();
        self.broker.enqueue(jobs).await.unwrap();
    }

    /// The first `count` outcomes.
    async fn outcomes(&self, count: usize) -> Vec<OutcomeRecord> {
        let events = self.broker.events(Position::Start).await.unwrap();
        let outcomes = events.filter_map(async |entry| match entry.unwrap().event {
            Event::Outcome(record) => Some(record),
            Event::Dead(dead) => panic!("{} is dead", dead.job.repo),
            _ => None,
        });
        let outcomes = outcomes.take(count).collect();
        let patience = Duration::from_secs(120);
        let outcomes: Vec<_> = tokio::time::timeout(patience, outcomes).await.unwrap();
        for outcome in &outcomes {
            let stored = self.store.get(&outcome.repo).await.unwrap();
            let processed = outcome.outcome == Outcome::Processed;
            assert_eq!(stored.is_some(), processed, "{outcome:?}");
            if let Some(digest) = stored {
                assert!(digest.text.contains(TEXT), "{}", digest.text);
            }
        }
        outcomes
    }

    /// Outcomes as [`Work::outcomes`], by name: outcome, attempts before, message.
    async fn named_outcomes(&self, count: usize) -> Vec<(String, Outcome, u32, String)> {
        let named = |record: OutcomeRecord| {
            let name = record.repo.name().to_owned();
            (name, record.outcome, record.attempt, record.message)
        };
        let outcomes = self.outcomes(count).await;
        let mut outcomes: Vec<_> = outcomes.into_iter().map(named).collect();
        outcomes.sort_by(|a, b| a.0.cmp(&b.0));
        outcomes
    }

    /// Whether the metrics show `line`.
    fn shows(&self, line: &str) -> bool {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.lines().any(|shown| shown == line)
    }

    /// Stops the worker, which ends well and leaves nothing.
    async fn stop(self, fixture: &Fixture) {
        self.shutdown.soft.cancel();
        self.worker.await.unwrap().unwrap();
        fixture.assert_nothing_left();
    }
}

fn job(url: String) -> Job {
    let (_, name) = url.rsplit_once('/').unwrap();
    let name = name.strip_suffix(".git").unwrap_or(name);
    Job {
        version: WIRE_VERSION,
        run: RunId::try_from("run".to_owned()).unwrap(),
        repo: RepoRef::new("owner", name).unwrap(),
        url,
        pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
        force: false,
        replay_of: None,
        traceparent: None,
    }
}

/// The names of the two jobs that a worker handed back, as if nobody had seen them.
async fn handed_back(broker: &MemoryBroker) -> [String; 2] {
    let deliveries = broker.deliveries(2).await.unwrap();
    let deliveries: Vec<Delivery> = deliveries.take(2).collect().await;
    let mut names = [0, 1].map(|i| {
        let delivery = &deliveries[i];
        assert_eq!((delivery.attempt, delivery.waits), (0, 0));
        delivery.job.repo.name().to_owned()
    });
    names.sort();
    names
}

fn done(name: &str, attempt: u32) -> (String, Outcome, u32, String) {
    (name.to_owned(), Outcome::Processed, attempt, String::new())
}

#[tokio::test]
async fn transient_faults_are_tried_again_and_others_go_on_meanwhile() {
    let fixture = Fixture::new();
    for name in ["twice", "ever", "gone"] {
        good(fixture.root.path(), name);
    }
    let server = &fixture.server;
    server.fault("owner/twice", Trouble::status(500).times(1));
    let cut = Trouble::Truncate { after_bytes: 10 };
    server.fault("owner/twice", cut.on(Kind::UploadPack).times(1));
    server.fault("owner/ever", Trouble::Reset);
    server.fault("owner/gone", Trouble::status(404));

    let work = Work::start(&fixture, &Choice::default());
    let names = ["twice", "ever", "gone", "good"];
    work.enqueue(names.map(|name| fixture.url(name))).await;
    let outcomes = work.named_outcomes(4).await;
    let [ever, gone, good, twice] = &outcomes[..] else {
        panic!("{outcomes:?}")
    };
    assert_eq!((ever.1, ever.2), (Outcome::Failed(Transient), 3));
    assert_eq!((gone.1, gone.2), (Outcome::Failed(Gone), 0));
    assert_eq!(
        gone.3,
        "HTTP status 404 Not Found: the host says \"404 on purpose\""
    );
    assert_eq!((good, twice), (&done("good", 0), &done("twice", 2)));
    assert_eq!(server.repo_stats("owner/ever").info_refs, 4);
    assert_eq!(server.repo_stats("owner/gone").info_refs, 1);
    // After 1, 2 and 4 seconds.
    assert!(work.start.elapsed() >= Duration::from_secs(7));
    assert!(work.shows(r#"repofleet_retries_total{class="transient"} 5"#));
    assert!(work.shows("repofleet_slots_busy 0"));
    work.stop(&fixture).await;
}

#[tokio::test]
async fn a_host_that_asks_for_patience_gets_it_for_all_of_its_repositories() {
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(1);
    let names = ["a", "b", "c"];
    for name in names {
        good(fixture.root.path(), name);
    }
    let elsewhere = tempfile::tempdir().unwrap();
    good(elsewhere.path(), "other");
    let other = GitServer::start(elsewhere.path());
    fixture
        .policy
        .hosts
        .push(other.authority().parse().unwrap());
    fixture
        .server
        .fault("owner/a", Trouble::retry_after(429, 3).times(1));

    let work = Work::start(&fixture, &Choice::default());
    let mut urls = names.map(|name| fixture.url(name)).to_vec();
    urls.push(other.repo_url("owner", "other"));
    work.enqueue(urls).await;
    let first = &work.outcomes(1).await[0];
    assert_eq!(first.repo.name(), "other", "its host asked for nothing");
    assert_eq!(fixture.server.repo_stats("owner/b").info_refs, 0);
    until("one host shows as throttled", || {
        work.shows("repofleet_throttled_hosts 1")
    })
    .await;
    let outcomes = work.named_outcomes(4).await;
    let expected = ["a", "b", "c", "other"].map(|name| done(name, 0));
    assert_eq!(outcomes, expected);
    assert!(work.start.elapsed() >= Duration::from_secs(3));
    assert!(!work.shows(r#"repofleet_handed_back_total{reason="host"} 0"#));
    assert!(work.shows("repofleet_queue_to_stored_seconds_count 4"));
    assert!(!work.shows(r#"repofleet_queue_to_stored_seconds_bucket{le="1"} 4"#));
    work.stop(&fixture).await;
}

/// While it has more jobs in hand than slots.
#[tokio::test]
async fn a_hosts_rate_is_kept_and_holds_up_no_other_host() {
    const RATE: f64 = 4.0;
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(2);
    let names: Vec<String> = (0..24).map(|i| format!("repo-{i:02}")).collect();
    for name in &names {
        good(fixture.root.path(), name);
    }
    let elsewhere = tempfile::tempdir().unwrap();
    good(elsewhere.path(), "other");
    let other = GitServer::start(elsewhere.path());
    let host = other.authority().parse().unwrap();
    fixture.policy.hosts.push(host);
    let choice = Choice {
        host_rate: Some(RATE),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    let urls = names.iter().map(|name| fixture.url(name));
    work.enqueue(urls.chain([other.repo_url("owner", "other")]))
        .await;
    let outcomes = work.outcomes(25).await;
    let took = work.start.elapsed();
    assert!(
        outcomes
            .iter()
            .all(|o| (o.outcome, o.attempt) == (Outcome::Processed, 0))
    );
    fixture.server.assert_rate(RATE, 3);
    let fair = Duration::from_secs_f64(names.len() as f64 / RATE);
    assert!(took < fair * 3 / 2, "{took:?} instead of {fair:?}");
    // Of 25 jobs before it, some were fetched meanwhile.
    let place = outcomes
        .iter()
        .position(|o| o.repo.name() == "other")
        .unwrap();
    assert!(place < 12, "at {place}");
    work.stop(&fixture).await;
}

/// As GitHub turns away whoever asks for a repository that its staff disabled.
#[tokio::test]
async fn one_repository_turned_away_without_a_word_keeps_nobody_waiting() {
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(1);
    good(fixture.root.path(), "later");
    fixture.server.fault("owner/bad", Trouble::status(403));
    let work = Work::start(&fixture, &Choice::default());
    work.enqueue(["bad", "good", "later"].map(|name| fixture.url(name)))
        .await;
    assert_eq!(
        work.named_outcomes(2).await,
        [done("good", 0), done("later", 0)]
    );
    assert!(
        work.start.elapsed() < Duration::from_secs(50),
        "they did not wait with it"
    );
    assert_eq!(fixture.server.repo_stats("owner/bad").info_refs, 1);
    assert!(work.shows(r#"repofleet_retries_total{class="throttled"} 1"#));
    work.stop(&fixture).await;
}

/// As GitHub turns away whoever asks for one of many that its staff disabled.
#[tokio::test]
async fn repositories_that_are_disabled_keep_nobody_waiting() {
    let fixture = Fixture::new();
    let barred: Vec<String> = (0..10).map(|i| format!("barred-{i}")).collect();
    let others: Vec<String> = (0..100).map(|i| format!("other-{i:02}")).collect();
    for name in &others {
        good(fixture.root.path(), name);
    }
    let why = "Access to this repository has been disabled by GitHub staff.";
    for name in &barred {
        let trouble = Trouble::with_body(403, why);
        fixture.server.fault(&format!("owner/{name}"), trouble);
    }
    let work = Work::start(&fixture, &Choice::default());
    let names = barred.iter().chain(&others);
    work.enqueue(names.map(|name| fixture.url(name))).await;
    let outcomes = work.named_outcomes(110).await;
    for (name, outcome, attempt, message) in &outcomes[..10] {
        assert_eq!((*outcome, *attempt), (Outcome::Failed(Gone), 0), "{name}");
        assert!(message.contains(&format!("\"{why}\"")), "{message}");
    }
    let expected: Vec<_> = others.iter().map(|name| done(name, 0)).collect();
    assert_eq!(outcomes[10..], expected);
    assert!(work.shows(r#"repofleet_handed_back_total{reason="host"} 0"#));
    assert!(work.shows(r#"repofleet_retries_total{class="throttled"} 0"#));
    work.stop(&fixture).await;
}

/// First by status, then in band.
#[tokio::test]
async fn githubs_limit_on_anonymous_downloads_costs_no_repository_anything() {
    let fixture = Fixture::new();
    let names: Vec<String> = (0..60).map(|i| format!("repo-{i:02}")).collect();
    for name in &names {
        good(fixture.root.path(), name);
    }
    for limit in [
        Trouble::github_limit(Some(1)),
        Trouble::github_limit_in_band(Some(1)),
    ] {
        fixture
            .server
            .fault_all(limit.lasting(Duration::from_secs(2)));
    }
    let work = Work::start(&fixture, &Choice::default());
    work.enqueue(names.iter().map(|name| fixture.url(name)))
        .await;
    let outcomes = work.named_outcomes(60).await;
    let expected: Vec<_> = names.iter().map(|name| done(name, 0)).collect();
    assert_eq!(outcomes, expected);
    // Both forms were met, and nobody asked while the host was paused.
    assert!(work.start.elapsed() >= Duration::from_secs(4));
    assert!(!work.shows(r#"repofleet_retries_total{class="throttled"} 0"#));
    assert!(work.shows(r#"repofleet_retries_total{class="transient"} 0"#));
    let faulted = fixture
        .server
        .stats()
        .values()
        .map(|s| s.faulted_at.len())
        .sum::<usize>();
    assert!(faulted < 60, "{faulted} requests met the limit");
    work.stop(&fixture).await;
}

/// As a git server does whose own disk is full, and memory too.
#[tokio::test]
async fn a_hosts_words_are_never_about_this_machine() {
    let fixture = Fixture::new();
    let words = [
        "No space left on device",
        "File too large",
        "Cannot allocate memory",
        "Disk quota exceeded",
        "Too many open files",
    ];
    let mut names = Vec::new();
    for (i, words) in words.into_iter().enumerate() {
        for place in [Place::Err, Place::SideBand3] {
            let name = format!("{i}-{place:?}");
            good(fixture.root.path(), &name);
            let trouble = Trouble::says(place, words).on(Kind::UploadPack);
            fixture.server.fault(&format!("owner/{name}"), trouble);
            names.push(name);
        }
    }
    let work = Work::start(&fixture, &Choice::default());
    work.enqueue(names.iter().map(|name| fixture.url(name)))
        .await;
    let outcomes = work.named_outcomes(names.len()).await;
    for (name, outcome, attempt, message) in outcomes {
        assert_eq!(
            (outcome, attempt),
            (Outcome::Failed(Transient), 3),
            "{name}"
        );
        let index: usize = name[..1].parse().unwrap();
        assert!(message.contains(words[index]), "{message}");
    }
    assert!(work.shows("repofleet_infra_paused 0"));
    work.stop(&fixture).await;
}

#[tokio::test]
async fn a_renamed_repository_is_recorded_with_its_new_address() {
    let fixture = Fixture::new();
    good(fixture.root.path(), "new-name");
    let to = fixture.url("new-name");
    let moved = Trouble::Moved { to: to.clone() };
    fixture.server.fault("owner/bad", moved);
    let work = Work::start(&fixture, &Choice::default());
    work.enqueue(["bad", "good"].map(|name| fixture.url(name)))
        .await;
    for outcome in work.outcomes(2).await {
        let expected = Some(&to).filter(|_| outcome.repo.name() == "bad");
        assert_eq!(outcome.renamed_to.as_ref(), expected);
    }
    work.stop(&fixture).await;
}

/// Not one job after another is charged with it, however long it lasts.
#[tokio::test]
async fn a_machine_that_starts_no_slots_is_no_repositorys_fault() {
    let mut fixture = Fixture::new();
    fixture.config.child.program = "/nowhere/worker".into();
    let choice = Choice {
        patience: Duration::from_secs(1),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    work.enqueue(["bad", "good"].map(|name| fixture.url(name)))
        .await;
    let fault = work.worker.await.unwrap().unwrap_err();
    assert_eq!(fault.kind, Infra);
    assert!(fault.message.contains("/nowhere/worker"), "{fault}");
    assert_eq!(handed_back(&work.broker).await, ["bad", "good"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_slot_gets_one_retry() {
    let fixture = Fixture::new();
    good(fixture.root.path(), "later");
    fixture.server.fault("owner/bad", Trouble::Hang);
    let work = Work::start(&fixture, &Choice::default());
    work.enqueue(["bad", "good"].map(|name| fixture.url(name)))
        .await;
    for attempt in 1..=2 {
        fixture.server.wait_for_requests("owner/bad", attempt);
        let mut children = Vec::new();
        until("only the hanging slot is left", || {
            children = fixture.children();
            children.len() == 1
        })
        .await;
        kill_process(children[0], Signal::KILL).unwrap();
    }
    work.enqueue([fixture.url("later")]).await;
    let outcomes = work.named_outcomes(3).await;
    let (_, outcome, attempt, message) = &outcomes[0];
    assert_eq!((*outcome, *attempt), (Outcome::Failed(Killed), 1));
    assert!(message.contains("signal 9"), "{message}");
    assert_eq!(outcomes[1..], [done("good", 0), done("later", 0)]);
    assert_eq!(fixture.server.repo_stats("owner/bad").info_refs, 2);
    assert!(work.shows(r#"repofleet_slots_killed_total{reason="crash"} 2"#));
    work.stop(&fixture).await;
}

#[test]
fn a_full_disk_is_waited_out() {
    as_root("consume::a_full_disk_is_waited_out", async {
        let mut fixture = Fixture::new();
        // However small the repository, it goes to the disk.
        fixture.policy.mode = FetchMode::Git2;
        let _disk = SmallDisk::mount(fixture.scratch.path(), "2m");
        let work = Work::start(&fixture, &Choice::default());
        let other = fixture.scratch.path().join("other");
        fs::write(&other, vec![0; 4 << 20]).unwrap_err();
        let names: Vec<String> = (0..8).map(|i| format!("repo-{i}")).collect();
        for name in &names {
            good(fixture.root.path(), name);
        }
        work.enqueue(names.iter().map(|name| fixture.url(name)))
            .await;
        // Nobody can be seen to wait; a little time gives a worker that does not the time to fail.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!work.worker.is_finished());
        assert!(work.shows("repofleet_infra_paused 1"));
        assert!(work.shows("repofleet_scratch_free_bytes 0"));
        assert!(work.shows("repofleet_scratch_size_bytes 2097152"));
        fs::remove_file(&other).unwrap();
        let outcomes = work.named_outcomes(8).await;
        assert!(work.shows("repofleet_infra_paused 0"));
        let expected: Vec<_> = names.iter().map(|name| done(name, 0)).collect();
        assert_eq!(outcomes, expected);
        work.stop(&fixture).await;
    });
}

#[test]
fn a_full_disk_under_a_large_pack_is_waited_out() {
    let name = "consume::a_full_disk_under_a_large_pack_is_waited_out";
    as_root(name, async {
        let mut fixture = Fixture::new();
        fixture.policy.mode = FetchMode::V2;
        build_over_memory(fixture.root.path());
        let _disk = SmallDisk::mount(fixture.scratch.path(), "64m");
        let work = Work::start(&fixture, &Choice::default());
        let other = fixture.scratch.path().join("other");
        fs::write(&other, vec![0; 80 << 20]).unwrap_err();
        work.enqueue([fixture.url("over-memory")]).await;
        until("no job starts", || work.shows("repofleet_infra_paused 1")).await;
        fs::remove_file(&other).unwrap();
        let outcomes = work.named_outcomes(1).await;
        assert_eq!(outcomes, [done("over-memory", 0)]);
        work.stop(&fixture).await;
    });
}

#[test]
fn patience_with_a_full_disk_has_an_end_and_no_job_is_lost() {
    as_root(
        "consume::patience_with_a_full_disk_has_an_end_and_no_job_is_lost",
        async {
            let mut fixture = Fixture::new();
            fixture.policy.mode = FetchMode::Git2;
            let _disk = SmallDisk::mount(fixture.scratch.path(), "2m");
            let choice = Choice {
                patience: Duration::from_secs(1),
                ..Choice::default()
            };
            let work = Work::start(&fixture, &choice);
            let other = fixture.scratch.path().join("other");
            fs::write(&other, vec![0; 4 << 20]).unwrap_err();
            work.enqueue(["bad", "good"].map(|name| fixture.url(name)))
                .await;
            let fault = work.worker.await.unwrap().unwrap_err();
            assert_eq!(fault.kind, Infra);
            assert!(fault.message.contains("--scratch"), "{fault}");
            assert_eq!(handed_back(&work.broker).await, ["bad", "good"]);
        },
    );
}

#[tokio::test]
async fn a_byte_budget_and_a_time_limit_fail_at_once() {
    let mut fixture = Fixture::new();
    fixture.policy.max_bytes = 100_000;
    fixture.config.timeout = 3;
    for name in ["flood", "slow"] {
        good(fixture.root.path(), name);
    }
    fixture.server.fault("owner/flood", Trouble::Flood);
    let slow = Trouble::Drip {
        bytes_per_second: 1,
    };
    fixture.server.fault("owner/slow", slow);
    let work = Work::start(&fixture, &Choice::default());
    work.enqueue(["flood", "slow", "good"].map(|name| fixture.url(name)))
        .await;
    let outcomes = work.named_outcomes(3).await;
    for ((_, outcome, attempt, message), part) in outcomes
        .iter()
        .step_by(2)
        .zip(["100000 bytes", "after 3 s"])
    {
        assert_eq!((*outcome, *attempt), (Outcome::Failed(TooLarge), 0));
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(outcomes[1], done("good", 0));
    work.stop(&fixture).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_hands_back_what_does_not_get_done_in_time() {
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(1);
    fixture.server.fault("owner/bad", Trouble::Hang);
    let choice = Choice {
        drain: Duration::from_secs(1),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    work.enqueue(["bad", "good"].map(|name| fixture.url(name)))
        .await;
    let child = fixture.child_at_work();
    work.shutdown.soft.cancel();
    let metrics = work.metrics.clone();
    work.worker.await.unwrap().unwrap();
    let text = String::from_utf8(metrics.render()).unwrap();
    assert!(
        text.contains(r#"repofleet_handed_back_total{reason="stopping"} "#),
        "{text}"
    );
    assert!(
        !text.contains(r#"repofleet_handed_back_total{reason="stopping"} 0"#),
        "{text}"
    );
    assert!(!crate::fixture::exists(child));
    fixture.assert_nothing_left();
    assert_eq!(handed_back(&work.broker).await, ["bad", "good"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_lets_what_is_in_hand_be_finished_and_a_second_one_does_not() {
    for hard in [false, true] {
        let fixture = Fixture::new();
        let late = Trouble::Latency(Duration::from_secs(2)).on(Kind::InfoRefs);
        fixture.server.fault("owner/bad", late);
        let work = Work::start(&fixture, &Choice::default());
        work.enqueue([fixture.url("bad")]).await;
        fixture.child_at_work();
        work.shutdown.soft.cancel();
        if hard {
            work.shutdown.hard.cancel();
        }
        let Work { worker, store, .. } = work;
        worker.await.unwrap().unwrap();
        let repo: RepoRef = "owner/bad".parse().unwrap();
        assert_eq!(store.get(&repo).await.unwrap().is_none(), hard);
        fixture.assert_nothing_left();
    }
}

/// A store that panics over `owner/panic`, and has something against `owner/ill` alone.
#[derive(Debug)]
struct Touchy(SharedStore);

#[async_trait]
impl DigestStore for Touchy {
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault> {
        match repo.name() {
            "panic" => panic!("on purpose"),
            "ill" => Err(Fault::infra("cannot look; mend it")),
            _ => self.0.head(repo).await,
        }
    }

    async fn get(&self, repo: &RepoRef) -> Result<Option<Digest>, Fault> {
        self.0.get(repo).await
    }

    async fn put(
        &self,
        repo: &RepoRef,
        digest: &Digest,
        expected: &Expected,
    ) -> Result<Put, Fault> {
        self.0.put(repo, digest, expected).await
    }

    async fn renew(
        &self,
        repo: &RepoRef,
        meta: &DigestMeta,
        version: &Version,
    ) -> Result<Renewal, Fault> {
        self.0.renew(repo, meta, version).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'_, Result<Listed, Fault>> {
        self.0.list(prefix)
    }

    async fn strays(&self) -> Result<Vec<String>, Fault> {
        self.0.strays().await
    }

    async fn remove(&self, repo: &RepoRef, version: &Version) -> Result<bool, Fault> {
        self.0.remove(repo, version).await
    }

    fn withdrawn(&self) -> SharedStore {
        self.0.withdrawn()
    }

    async fn write_document(
        &self,
        key: &DocumentKey,
        content: &[u8],
        expected: Option<&Expected>,
    ) -> Result<Put, Fault> {
        self.0.write_document(key, content, expected).await
    }

    async fn read_document(&self, key: &DocumentKey) -> Result<Option<(Vec<u8>, Version)>, Fault> {
        self.0.read_document(key).await
    }

    async fn reachable(&self) -> Result<(), Fault> {
        self.0.reachable().await
    }

    async fn probe(&self) -> Result<(), Fault> {
        self.0.probe().await
    }

    fn is_remote(&self) -> bool {
        self.0.is_remote()
    }

    fn location(&self) -> String {
        self.0.location()
    }
}

#[tokio::test]
async fn a_panic_costs_one_job() {
    let fixture = Fixture::new();
    let choice = Choice {
        store: |store| Arc::new(Touchy(store)),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    let panicking = fixture.url("panic");
    work.enqueue([panicking, fixture.url("good"), fixture.url("bad")])
        .await;
    let mut events = work.broker.events(Position::Start).await.unwrap();
    let (mut processed, mut dead) = (0, 0);
    while processed + dead < 3 {
        match events.next().await.unwrap().unwrap().event {
            Event::Outcome(record) => {
                assert_eq!(record.outcome, Outcome::Processed);
                processed += 1;
            }
            // Delivered again and again, until the broker has had enough.
            Event::Dead(lost) => {
                assert_eq!(lost.job.repo.name(), "panic");
                dead += 1;
            }
            _ => {}
        }
    }
    assert_eq!((processed, dead), (2, 1));
    work.stop(&fixture).await;
}

#[tokio::test]
async fn a_job_that_alone_finds_the_store_ill_fails_for_good() {
    let fixture = Fixture::new();
    let choice = Choice {
        store: |store| Arc::new(Touchy(store)),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    work.enqueue([fixture.url("ill")]).await;
    let outcomes = work.named_outcomes(1).await;
    let (_, outcome, attempt, message) = &outcomes[0];
    assert_eq!((*outcome, *attempt), (Outcome::Failed(Infra), 0));
    assert_eq!(message, "cannot look; mend it");
    work.stop(&fixture).await;
}

#[tokio::test]
async fn a_bucket_shows_at_the_start_what_it_can_do_and_nothing_fails_for_it() {
    let server = S3Server::start();
    let store = Arc::new(server.store());
    probe_at_start(Arc::<S3Store>::clone(&store), CancellationToken::new()).await;
    assert!(format!("{store:?}").contains("Kept"));
    assert!(server.objects().is_empty());

    server.decide(|_| Fate::Denied(403, "AccessDenied"));
    let away: SharedStore = Arc::new(server.store());
    probe_at_start(Arc::clone(&away), CancellationToken::new()).await;
    server.decide(|_| Fate::Silence);
    let stopped = CancellationToken::new();
    stopped.cancel();
    probe_at_start(away, stopped).await;

    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("store");
    let store: SharedStore = Arc::new(FsStore::new(&folder));
    probe_at_start(store, CancellationToken::new()).await;
    assert!(
        !folder.exists(),
        "there is nothing to find out about a folder"
    );
}

/// Of a machine's fault, whatever the pauses between looks at it add up to.
#[tokio::test(start_paused = true)]
async fn patience_beyond_any_loan_means_what_it_says() {
    let fixture = Fixture::new();
    let patience = Duration::from_secs(3600);
    let choice = Choice {
        patience,
        store: |_| Arc::new(Touchy(Arc::new(FsStore::new("/proc/nowhere")))),
        ..Choice::default()
    };
    let start = tokio::time::Instant::now();
    let work = Work::start(&fixture, &choice);
    work.enqueue([fixture.url("ill")]).await;
    let fault = work.worker.await.unwrap().unwrap_err();
    assert_eq!(fault.kind, Infra);
    assert_eq!(start.elapsed().as_secs(), patience.as_secs());
    let deliveries = work.broker.deliveries(1).await.unwrap();
    let handed_back = deliveries.take(1).collect::<Vec<_>>().await;
    assert_eq!((handed_back[0].attempt, handed_back[0].waits), (0, 0));
}

#[tokio::test]
async fn why_a_worker_waits_is_recorded_when_it_changes() {
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(1);
    fixture
        .server
        .fault("owner/bad", Trouble::retry_after(429, 2).times(1));
    let choice = Choice {
        store: |store| Arc::new(Touchy(store)),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    let events = work.broker.events(Position::Start).await.unwrap();
    let mut states = Box::pin(events.filter_map(async |entry| match entry.unwrap().event {
        Event::Worker(state) => Some(state),
        _ => None,
    }));
    work.enqueue([fixture.url("bad")]).await;
    let state = states.next().await.unwrap();
    assert_eq!((&*state.worker, state.infra), ("tested", None));
    assert!(state.hosts.contains_key(&fixture.server.authority()));
    let state = states.next().await.unwrap();
    assert_eq!((state.infra, state.hosts.len()), (None, 0));

    work.enqueue([fixture.url("ill")]).await;
    let state = states.next().await.unwrap();
    assert_eq!(state.infra.as_deref(), Some("cannot look; mend it"));
    assert_eq!(states.next().await.unwrap().infra, None);
    work.stop(&fixture).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roll_call_is_answered_with_every_job_in_hand_also_while_the_worker_stops() {
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(2);
    fixture.add_token("sesame");
    fixture.server.fault("owner/bad", Trouble::Hang);
    let choice = Choice {
        drain: Duration::from_secs(60),
        ..Choice::default()
    };
    let work = Work::start(&fixture, &choice);
    work.enqueue([fixture.url("bad")]).await;
    fixture.child_at_work();
    let mut notices = work.broker.announcements().await.unwrap();
    for stopping in [false, true] {
        if stopping {
            work.shutdown.soft.cancel();
        }
        let roll_call = format!("call {stopping}");
        let call = Notice::RollCall(RollCall {
            roll_call: roll_call.clone(),
        });
        work.broker.announce(&call).await.unwrap();
        assert_eq!(notices.next().await, Some(call));
        let Some(Notice::InHand(answer)) = notices.next().await else {
            panic!("no answer")
        };
        let [since] = answer.since_millis[..] else {
            panic!("{answer:?}")
        };
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        assert!(
            (now - 120..=now).contains(&(since / 1000)),
            "{since}, {now}"
        );
        let expected = InHand {
            answers: roll_call,
            worker: "tested".to_owned(),
            jobs: vec![job(fixture.url("bad")).id()],
            since_millis: vec![since],
            tokens: Some(vec![fixture.server.authority()]),
        };
        assert_eq!(answer, expected);
    }
    work.shutdown.hard.cancel();
    work.worker.await.unwrap().unwrap();
}
