//! Whole runs of producer and workers as processes, on RabbitMQ and an S3 server.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use common::broker::{DELIVERY_LIMIT, Event};
use common::exit;
use common::store::DigestStore;
use common::store::s3::S3Store;
use rustix::process::Signal;
use serde_json::Value;
use testing::rabbitmq::{frames, fresh_prefix, purge, shared_url};
use testing::s3_server::{Fate, S3Server};
use testing::seaweedfs::SeaweedFs;
use testing::tcp_proxy::TcpProxy;

use crate::distributed::Distributed;
use crate::fleet::{
    Fleet, PUSHED, PUSHED_LATER, Running, bare_producer, expected_text, wait_until,
};

/// A fleet of these repositories, with a bucket in this process.
fn fleet_of(repos: &[&str]) -> (Distributed, S3Server) {
    let bucket = S3Server::start();
    let fleet = Distributed::new(Fleet::of(repos), shared_url(), bucket.url());
    (fleet, bucket)
}

/// Puts a proxy between the fleet and its broker.
pub(crate) fn proxy_to_broker(fleet: &mut Distributed) -> TcpProxy {
    let target: SocketAddr = fleet
        .broker_url
        .rsplit('@')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let proxy = TcpProxy::start(target);
    let (target, address) = (target.to_string(), proxy.address().to_string());
    fleet.broker_url = fleet.broker_url.replace(&target, &address);
    proxy
}

#[test]
fn four_workers_digest_two_hundred_repositories_and_then_only_what_was_pushed() {
    const REPOS: usize = 200;
    let names: Vec<_> = (0..REPOS)
        .map(|i| format!("owner-{}/r{i:03}", i % 7))
        .collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    // On this thread, whose end is the server's.
    let bucket = runtime.block_on(SeaweedFs::start());
    let config = bucket.config();
    let store = S3Store::new(&config);
    let url = config.endpoint.clone().unwrap();
    let fleet = Distributed::new(Fleet::of(&names), shared_url(), url);
    let workers: Vec<_> = (0..4)
        .map(|_| fleet.start_worker(&["--concurrency", "2"]))
        .collect();

    let first = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert_eq!(
        first.sentence(),
        "Pipeline complete: 200 total, 0 cached (0.0%), 200 processed, 0 failed"
    );
    assert_eq!(fleet.fleet.server.total_fetches(), REPOS as u64);
    for repo in names.iter().step_by(17) {
        let path = fleet.fleet.repositories().join(format!("{repo}.git"));
        let digest = runtime
            .block_on(store.get(&repo.parse().unwrap()))
            .unwrap()
            .unwrap();
        assert_eq!(digest.text, expected_text(&path, repo));
        assert_eq!(digest.meta.pushed_at.as_str(), PUSHED);
    }
    let look = fleet.look(&fleet.broker_url);
    let ledger = look.ledger();
    let workers_seen: HashSet<_> = ledger
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::Outcome(record) => Some(record.worker.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(workers_seen.len(), 4, "each had its share");

    // What its outcomes say of the digests is what the server's listing says.
    let second = Running::start(fleet.producer(&[]).env("LOG_LEVEL", "debug"))
        .wait()
        .with(exit::OK);
    // More follows at this level.
    let complete = "Pipeline complete: 200 total, 200 cached (100.0%), 0 processed, 0 failed";
    assert!(second.stdout.contains(complete), "{}", second.stdout);
    let checked = second.messages("cache-check");
    let unknown = "read 0 digests that the index did not know";
    assert!(checked.iter().any(|line| line == unknown), "{checked:?}");
    assert_eq!(fleet.fleet.server.total_fetches(), REPOS as u64);

    let pushed = [3, 77, 199];
    let entries: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, repo)| {
            let pushed_at = if pushed.contains(&i) {
                PUSHED_LATER
            } else {
                PUSHED
            };
            fleet.fleet.entry(repo, pushed_at)
        })
        .collect();
    fleet.fleet.write_feed(&entries);
    let third = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert_eq!(
        third.sentence(),
        "Pipeline complete: 200 total, 197 cached (98.5%), 3 processed, 0 failed"
    );
    let jobs = look
        .ledger()
        .iter()
        .filter(|entry| matches!(entry.event, Event::Job(_)))
        .count();
    assert_eq!(jobs, REPOS + 3);
    for i in pushed {
        // HEAD is where it was, so the host was asked for no more than its refs.
        let stats = fleet.fleet.server.repo_stats(names[i]);
        assert_eq!((stats.info_refs, stats.packs), (2, 1));
    }

    for worker in &workers {
        worker.signal(Signal::TERM);
    }
    for worker in workers {
        worker.wait().with(exit::OK);
    }
    let waiting = look.waiting();
    assert_eq!((waiting.ready, waiting.retry, waiting.dead), (0, 0, 0));
    fleet.fleet.assert_nothing_left();
}

#[test]
fn there_is_one_producer_at_a_time_and_the_next_adopts_what_waits() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/c", "a/d"]);
    let first = Running::start(&mut fleet.producer(&[]));
    first.wait_for_line("Jobs published: 3");
    let second = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::BUSY);
    assert!(
        second.stderr.contains("another producer is at work"),
        "{}",
        second.stderr
    );
    assert!(second.stderr.contains(&fleet.prefix), "{}", second.stderr);

    // Nobody works yet, so it follows until it is told to stop; its jobs stay.
    first.signal(Signal::TERM);
    let first = first.wait().with(exit::TERMINATED);
    assert!(first.sentence().ends_with("3 open"), "{}", first.sentence());

    fleet.fleet.small_repository("a/e");
    let entries = fleet.fleet.entries(&["a/b", "a/c", "a/d", "a/e"]);
    fleet.fleet.write_feed(&entries);
    let third = Running::start(&mut fleet.producer(&[]));
    third.wait_for_line("Jobs published: 1; of earlier runs, still waiting: 3");
    let worker = fleet.start_worker(&[]);
    let third = third.wait().with(exit::OK);
    let summary = third.summary();
    assert_eq!(summary["processed"], 4);
    assert_eq!(summary["adopted"], 3);
    assert_eq!(fleet.fleet.server.total_fetches(), 4);
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

#[test]
fn a_detached_run_goes_on_without_its_producer() {
    let (fleet, bucket) = fleet_of(&["a/b", "a/c"]);
    let run = Running::start(&mut fleet.producer(&["--detach"]))
        .wait()
        .with(exit::OK);
    assert!(
        run.messages("detach")[0].contains("producer status"),
        "{}",
        run.stdout
    );
    assert!(!run.stdout.contains("Pipeline"), "{}", run.stdout);
    let _worker = fleet.start_worker(&[]);
    let digests = || {
        bucket
            .objects()
            .keys()
            .filter(|key| key.starts_with("gitingest/"))
            .count()
    };
    wait_until("the digests", || digests() == 2);
    let next = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert_eq!(next.summary()["cached"], 2);
}

#[test]
fn what_each_worker_has_in_hand_is_shown() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/c"]);
    let status = |arguments: &[&str]| {
        let mut command = bare_producer();
        command.args(["status", "--workers"]).args(arguments);
        fleet.tell(&mut command);
        Running::start(&mut command).wait().with(exit::OK).stdout
    };
    assert_eq!(status(&[]), "no worker is connected\n");
    fleet.fleet.server.set_held(true);
    let run = Running::start(&mut fleet.producer(&["--detach"]));
    let detached = run.wait().with(exit::OK).log().pop().unwrap();
    let run = &detached["context"]["metadata"]["run_id"];
    let busy = fleet.start_worker(&["--concurrency", "2"]);
    fleet.fleet.server.wait_for_requests("a/b", 1);
    fleet.fleet.server.wait_for_requests("a/c", 1);
    let idle = fleet.start_worker(&["--concurrency", "1"]);
    idle.wait_for_line("\"ready\"");

    let lines = status(&["--json"]);
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let mut found: Vec<Value> = lines.collect();
    assert_eq!(found.pop().unwrap()["repo"], Value::Null, "the idle one");
    let mut repos: Vec<_> = found
        .iter()
        .map(|job| job["repo"].as_str().unwrap())
        .collect();
    repos.sort_unstable();
    assert_eq!(repos, ["a/b", "a/c"]);
    for job in &found {
        assert_eq!(&job["run"], run);
        assert!(job["seconds"].as_u64().unwrap() < 120, "{job}");
    }
    let page = status(&[]);
    assert!(
        page.starts_with("WORKER ") && page.contains("nothing in hand"),
        "{page}"
    );

    fleet.fleet.server.set_held(false);
    let run = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert_eq!(run.summary()["failed"], 0);
    for worker in [busy, idle] {
        worker.signal(Signal::TERM);
        worker.wait().with(exit::OK);
    }
}

#[test]
fn a_worker_hands_back_what_it_cannot_finish() {
    let (fleet, _bucket) = fleet_of(&["a/slow", "a/b"]);
    let hang = testing::git_server::Fault::Hang;
    let stops = u64::from(DELIVERY_LIMIT) + 1;
    fleet.fleet.server.fault("a/slow", hang.times(stops));
    let run = Running::start(&mut fleet.producer(&[]));
    // Once more than the broker would put up with, if this counted.
    for stop in 1..=stops {
        let first = fleet.start_worker(&["--drain", "0", "--concurrency", "2"]);
        fleet.fleet.server.wait_for_requests("a/slow", stop);
        first.signal(Signal::TERM);
        first.wait().with(exit::OK);
        fleet.fleet.assert_nothing_left();
    }
    let _second = fleet.start_worker(&[]);
    let run = run.wait().with(exit::OK);
    assert_eq!(run.summary()["processed"], 2);
    // Neither an attempt nor a delivery was charged.
    let look = fleet.look(&fleet.broker_url);
    for entry in look.ledger() {
        if let Event::Outcome(record) = entry.event {
            assert_eq!(record.attempt, 0, "{record:?}");
        }
    }
}

#[test]
fn a_worker_says_what_it_lacks() {
    let (fleet, _bucket) = fleet_of(&[]);
    let without = Running::start(fleet.worker(&[]).env_remove("BROKER_URL")).wait();
    let without = without.with(exit::USAGE);
    assert!(
        without.stderr.contains("--broker-url"),
        "{}",
        without.stderr
    );

    let long = Running::start(&mut fleet.worker(&["--timeout", "3600"])).wait();
    let long = long.with(exit::USAGE);
    assert!(long.stderr.contains("30 minutes"), "{}", long.stderr);

    let wrong = fleet.broker_url.replace("guest:guest", "guest:s3cret-word");
    let wrong = Running::start(fleet.worker(&[]).env("BROKER_URL", wrong)).wait();
    let wrong = wrong.with(exit::UNAVAILABLE);
    assert!(wrong.stderr.contains("ACCESS_REFUSED"), "{}", wrong.stderr);
    // Whoever collects logs sees no more than these.
    let logged = wrong.stdout.lines().last().unwrap_or_default();
    assert!(
        logged.contains(r#""operation":"exit""#) && logged.contains("ACCESS_REFUSED"),
        "{logged}"
    );
    for text in [&wrong.stderr, &wrong.stdout] {
        assert!(!text.contains("s3cret-word"), "{text}");
    }
}

/// Workers keep the settings that they started with: what a run was given later does not reach
/// them, and each repository that fails for it says so.
#[test]
fn a_host_that_workers_were_not_started_with_is_named_with_when_they_read_it() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/c"]);
    let port = fleet.fleet.server.authority();
    let other_name = format!("localhost:{}", port.rsplit(':').next().unwrap());
    let mut entries = fleet.fleet.entries(&["a/b", "a/c"]);
    for entry in &mut entries {
        let url = entry["url"].as_str().unwrap().replace(&port, &other_name);
        entry["url"] = url.into();
    }
    fleet.fleet.write_feed(&entries);
    let old = fleet.start_worker(&[]);
    let allowed = ["--allow-host", &other_name, "--max-failures", "2"];
    let run = Running::start(&mut fleet.producer(&allowed)).wait();
    let run = run.with(exit::OK);
    assert_eq!(run.summary()["failed"], 2);
    let remedy = format!("(--allow-host {other_name}, read when a worker starts)");
    assert!(run.stdout.contains(&remedy), "{}", run.stdout);
    old.signal(Signal::TERM);
    old.wait().with(exit::OK);

    let new = fleet.start_worker(&["--allow-host", &other_name]);
    let run = Running::start(&mut fleet.producer(&allowed)).wait();
    assert_eq!(run.with(exit::OK).summary()["processed"], 2);
    new.signal(Signal::TERM);
    new.wait().with(exit::OK);
}

/// A run counts its own records, and those of jobs that it adopted, and no others: here two runs
/// that want other work for the same pushes.
#[test]
fn a_run_does_not_count_what_another_run_asked_for() {
    let (fleet, bucket) = fleet_of(&["a/b", "a/c", "a/wrong"]);
    let right = fleet.fleet.entries(&["a/b", "a/c"]);
    let mut wrong = right.clone();
    wrong[0]["url"] = fleet.fleet.entries(&["a/wrong"])[0]["url"].clone();
    fleet.fleet.write_feed(&wrong);
    let first = Running::start(&mut fleet.producer(&["--detach"])).wait();
    first.with(exit::OK);

    // One address is corrected, and the other job still waits.
    fleet.fleet.write_feed(&right);
    let second = Running::start(&mut fleet.producer(&[]));
    second.wait_for_line("Jobs published: 1; of earlier runs, still waiting: 1");
    second.signal(Signal::TERM);
    let second = second.wait().with(exit::TERMINATED);
    assert_eq!(second.summary()["open"], 2);

    // A forced run adopts nothing.
    let third = Running::start(&mut fleet.producer(&["--force"]));
    third.wait_for_line(r#""adopted":0,"published":2"#);
    let worker = fleet.start_worker(&["--concurrency", "1"]);
    let third = third.wait().with(exit::OK);
    assert_eq!(third.summary()["processed"], 2);
    let run = third.run_id();
    for repo in ["a/b", "a/c"] {
        let object = &bucket.objects()[&format!("gitingest/{repo}/summary.txt")];
        assert_eq!(object.metadata["run"], run, "{repo}");
        let text = String::from_utf8_lossy(&object.content);
        assert!(text.contains(&format!("# {repo}")), "{text}");
    }
    let jobs = bucket.objects()[&format!("runs/{}/jobs.json", second.run_id())].clone();
    let jobs: Value = serde_json::from_slice(&jobs.content).unwrap();
    let adopted = |job: &Value| job["adoptedFrom"].as_array().map_or(0, Vec::len);
    let adopted: Vec<_> = jobs["jobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(adopted)
        .collect();
    assert_eq!(adopted.iter().sum::<usize>(), 1, "{jobs}");
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

/// Jobs that an operator purged neither wait nor are in anybody's hands: that is said and mended
/// within two looks, long before `--republish-after`.
#[test]
fn purged_jobs_are_published_again() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/c", "a/d"]);
    let run = Running::start(&mut fleet.producer(&["--republish-after", "2"]));
    run.wait_for_line("Jobs published: 3");
    let jobs = format!("{}.jobs", fleet.prefix);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(purge(&fleet.broker_url, &jobs));
    run.wait_for_line("3 open jobs are neither waiting nor in a worker's hands");
    run.wait_for_line("3 open jobs are neither waiting nor digested: publishing again");
    let worker = fleet.start_worker(&[]);
    let run = run.wait().with(exit::OK);
    assert_eq!(run.summary()["processed"], 3);
    // Under the run's own id, or nothing would have counted.
    let look = fleet.look(&fleet.broker_url);
    for entry in look.ledger() {
        if let Event::Job(job) = entry.event {
            assert_eq!(job.run.as_str(), run.run_id());
        }
    }
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

/// What a worker has in hand when the rest is purged is not worked on twice.
#[test]
fn purged_jobs_are_published_again_beside_what_is_in_hand() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/c", "a/d"]);
    fleet.fleet.server.set_held(true);
    let worker = fleet.start_worker(&["--concurrency", "1"]);
    let run = Running::start(&mut fleet.producer(&["--republish-after", "2"]));
    run.wait_for_line("Jobs published: 3");
    let look = fleet.look(&fleet.broker_url);
    wait_until("one job to be in hand", || look.waiting().ready == 2);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(purge(&fleet.broker_url, &format!("{}.jobs", fleet.prefix)));
    run.wait_for_line("2 open jobs are neither waiting nor digested: publishing again");
    fleet.fleet.server.set_held(false);
    let run = run.wait().with(exit::OK);
    assert_eq!(run.summary()["processed"], 3);
    assert_eq!(fleet.fleet.server.total_fetches(), 3);
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

/// Jobs in workers' hands are not lost, however long nothing is heard of them.
#[test]
fn jobs_in_hand_are_left_alone() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/slow"]);
    fleet.fleet.server.set_held(true);
    let worker = fleet.start_worker(&["--concurrency", "2"]);
    let run = Running::start(&mut fleet.producer(&["--republish-after", "1"]));
    fleet.fleet.server.wait_for_requests("a/slow", 1);
    // Several looks.
    thread::sleep(Duration::from_secs(6));
    fleet.fleet.server.set_held(false);
    let run = run.wait().with(exit::OK);
    assert_eq!(run.messages("lost-jobs"), [""; 0]);
    assert_eq!(fleet.fleet.server.total_fetches(), 2);
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

/// A broker that does not come back ends the run, once patience has ended.
#[test]
fn a_broker_gone_for_good_is_69() {
    let (mut fleet, _bucket) = fleet_of(&["a/b"]);
    let proxy = proxy_to_broker(&mut fleet);
    let arguments = ["--republish-after", "1", "--patience", "3"];
    let run = Running::start(&mut fleet.producer(&arguments));
    run.wait_for_line("Jobs published: 1");
    proxy.refuse();
    let run = run.wait().with(exit::UNAVAILABLE);
    assert_eq!(run.summary()["open"], 1);
    let said = run.messages("run");
    let gave_up = said.iter().find(|line| line.starts_with("gave up: "));
    assert!(
        gave_up.unwrap().contains("longer than --patience"),
        "{said:?}"
    );
}

/// A connection that is reset in a start costs nothing but another one, at whatever step it was.
#[test]
fn a_connection_that_is_reset_in_a_start_is_made_again() {
    let (mut fleet, _bucket) = fleet_of(&["a/b"]);
    let worker = fleet.start_worker(&[]);
    let proxy = proxy_to_broker(&mut fleet);
    for frame in frames::START {
        proxy.cut_once_at(frame);
        let connections = proxy.connections();
        let run = Running::start(&mut fleet.producer(&["--force"])).wait();
        assert_eq!(run.code(), i32::from(exit::OK), "{frame:?}: {run:?}");
        assert_eq!(run.summary()["processed"], 1, "{frame:?}");
        let made = proxy.connections() - connections;
        assert!(made > 1, "{frame:?}: nothing was reset");
    }
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
}

/// A store, or its name, that comes back within patience costs the night's run nothing.
#[test]
fn a_store_away_at_the_start_is_waited_for() {
    let (mut fleet, bucket) = fleet_of(&["a/b"]);
    let proxy = TcpProxy::start(bucket.url().rsplit('/').next().unwrap().parse().unwrap());
    fleet.bucket_url = format!("http://{}", proxy.address());
    proxy.refuse();
    let mut alone = fleet.producer(&["--patience", "1"]);
    let given_up = Running::start(alone.env_remove("BROKER_URL"));
    let run = Running::start(
        fleet
            .producer(&["--detach"])
            .env("QUEUE_PREFIX", fresh_prefix()),
    );
    let given_up = given_up.wait().with(exit::UNAVAILABLE);
    assert!(
        given_up.stderr.contains("s3://digests"),
        "{}",
        given_up.stderr
    );
    run.wait_for_line("waiting for the store, for ");
    proxy.flow();
    run.wait().with(exit::OK);
}

/// A store that hangs when the run has closed holds its exit code up for seconds, not minutes.
#[test]
fn last_writes_that_hang_are_bounded_and_said() {
    let (fleet, bucket) = fleet_of(&["a/b"]);
    bucket.decide(|call| match call.key.ends_with("summary.json") {
        true => Fate::Silence,
        false => Fate::Answered,
    });
    let _worker = fleet.start_worker(&[]);
    let start = Instant::now();
    let run = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "{:?}",
        start.elapsed()
    );
    let said = run.messages("run");
    let bounded = "the run's summary could not be stored: the store did not answer within 10s";
    assert!(said.iter().any(|line| line == bounded), "{said:?}");
}
