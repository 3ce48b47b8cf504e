//! Nothing lost, nothing doubled: whatever dies, breaks or lies, and whenever.
//!
//! Each test breaks one thing while real processes work, and then looks at everything: the run
//! closes, each repository's object is whole and of the newest push, nothing is left in a queue, and
//! no more was fetched twice than what was broken explains. `deploy/test.sh faults ROUNDS SEED`
//! repeats each of them with other choices; a round that fails names its seed.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use common::exit;
use fastrand::Rng;
use rustix::process::Signal;
use serde_json::Value;
use testing::git_server::Fault;
use testing::rabbitmq::{Node, publish_raw, shared_url};
use testing::repositories::Builder;
use testing::s3_server::{Fate, S3Server};
use testing::tcp_proxy::TcpProxy;

use crate::distributed::Distributed;
use crate::fleet::{Ended, Fleet, Running, wait_until};

const REPOS: usize = 24;
/// Slots of each worker.
const SLOTS: usize = 2;

/// Runs `round` as often as was asked for, with a seed of its own each time.
fn rounds(round: impl Fn(&mut Rng)) {
    let number = |name: &str, default: u64| {
        let given = std::env::var(name).ok();
        given.map_or(default, |text| text.parse().expect("a number"))
    };
    let first = number("REPOFLEET_FAULT_SEED", 1);
    for seed in first..first + number("REPOFLEET_FAULT_ROUNDS", 1) {
        report(&format!("seed {seed}"));
        round(&mut Rng::with_seed(seed));
    }
}

#[expect(
    clippy::print_stderr,
    reason = "captured by the test harness, and shown with --nocapture or when a test fails"
)]
fn report(line: &str) {
    eprintln!("{line}");
}

/// A fleet whose repositories are pushed to, all of them, again and again.
struct Pushed {
    fleet: Distributed,
    bucket: S3Server,
    /// Past what stands between the fleet and its broker.
    broker: String,
    repos: Vec<String>,
    pushes: u32,
    /// How often each had been fetched before the last push.
    fetched: BTreeMap<String, u64>,
    /// Dead letters that there are to be.
    dead: u64,
}

impl Pushed {
    fn new() -> Self {
        Self::on(&shared_url())
    }

    fn on(broker: &str) -> Self {
        let fleet = Fleet::new();
        fs::create_dir(fleet.repositories().join("faults")).unwrap();
        let repos: Vec<_> = (0..REPOS).map(|i| format!("faults/r{i:02}")).collect();
        for repo in &repos {
            let link = fleet.repositories().join(format!("{repo}.git"));
            symlink("../now", link).unwrap();
        }
        let bucket = S3Server::start();
        let fleet = Distributed::new(fleet, broker.to_owned(), bucket.url());
        let mut this = Self {
            fleet,
            bucket,
            broker: broker.to_owned(),
            repos,
            pushes: 0,
            fetched: BTreeMap::new(),
            dead: 0,
        };
        this.push();
        this
    }

    /// Everybody pushes.
    fn push(&mut self) {
        self.pushes += 1;
        let root = self.fleet.fleet.repositories();
        let name = format!("push-{}", self.pushes);
        Builder::new()
            .file("text", self.text())
            .build(&root, "pushes", &name);
        let (now, next) = (root.join("now"), root.join("next"));
        symlink(format!("pushes/{name}.git"), &next).unwrap();
        fs::rename(next, now).unwrap();
        let entry = |repo: &String| self.fleet.fleet.entry(repo, &self.pushed_at());
        let entries: Vec<_> = self.repos.iter().map(entry).collect();
        self.fleet.fleet.write_feed(&entries);
        self.fetched = self.fetches();
    }

    fn pushed_at(&self) -> String {
        format!("2026-01-01T00:00:{:02}Z", self.pushes)
    }

    fn text(&self) -> String {
        format!("push {}\n", self.pushes).repeat(500)
    }

    fn fetches(&self) -> BTreeMap<String, u64> {
        let fetches = |repo: &String| (repo.clone(), self.fleet.fleet.server.fetches(repo));
        self.repos.iter().map(fetches).collect()
    }

    /// How many of the repositories have been fetched since the last push.
    fn fetched_now(&self) -> usize {
        let fetches = self.fetches();
        let before = |repo| self.fetched.get(repo).copied().unwrap_or(0);
        fetches
            .iter()
            .filter(|(repo, n)| **n > before(*repo))
            .count()
    }

    fn start_producer(&self) -> Running {
        Running::start(&mut self.fleet.producer(&[]))
    }

    fn start_worker(&self) -> Running {
        self.fleet
            .start_worker(&["--concurrency", &SLOTS.to_string(), "--drain", "5"])
    }

    /// One that dies at the `time`-th `moment`.
    fn start_doomed(&self, moment: &str, time: u64) -> Running {
        let concurrency = SLOTS.to_string();
        let mut command = self.fleet.worker(&["--concurrency", &concurrency]);
        command.env("REPOFLEET_FAILPOINT", format!("{moment}:{time}"));
        Running::start(&mut command)
    }

    /// All is as if nothing had happened. At most `twice` repositories were fetched more than once,
    /// which is what was broken explains.
    #[track_caller]
    fn check(&self, what: &str, run: &Ended, twice: usize) {
        let summary = run.summary();
        let count = |name: &str| summary[name].as_u64().unwrap();
        assert_eq!(summary["closed"], true, "{what}: {summary}");
        assert_eq!(
            count("total_repos"),
            count("cached") + count("processed") + count("failed"),
            "{what}: {summary}"
        );
        assert_eq!(
            (count("total_repos"), count("failed")),
            (REPOS as u64, 0),
            "{what}: {summary}"
        );

        let objects = self.bucket.objects();
        for repo in &self.repos {
            let key = format!("gitingest/{repo}/summary.txt");
            let object = objects
                .get(&key)
                .unwrap_or_else(|| panic!("{what}: no digest of {repo}"));
            assert_eq!(
                object.metadata["pushedat"],
                self.pushed_at(),
                "{what}: {repo}"
            );
            assert_eq!(
                object.metadata["bytes"],
                object.content.len().to_string(),
                "{what}: {repo}"
            );
            let text = String::from_utf8_lossy(&object.content);
            assert!(text.contains(&self.text()), "{what}: {repo} is torn");
            let writes = self.bucket.writes(&key);
            let pushes: Vec<_> = writes.iter().map(|write| &write["pushedat"]).collect();
            assert!(
                pushes.is_sorted(),
                "{what}: {repo} went back in time: {pushes:?}"
            );
        }

        // Second copies that are still on their way find nothing to do.
        let look = self.fleet.look(&self.broker);
        wait_until("the queues to be empty", || {
            let waiting = look.waiting();
            (waiting.ready, waiting.retry) == (0, 0)
        });
        assert_eq!(look.waiting().dead, self.dead, "{what}");

        let fetches = self.fetches();
        let again: Vec<_> = fetches
            .iter()
            .filter_map(|(repo, n)| {
                let times = n - self.fetched.get(repo).copied().unwrap_or(0);
                (times > 1).then_some((repo, times))
            })
            .collect();
        report(&format!(
            "{what}: {} of {REPOS} fetched more than once, {twice} explained: {again:?}",
            again.len()
        ));
        assert!(again.len() <= twice, "{what}: {again:?}");
        // Nobody tries again without end: three retries, and four looks at a machine that is well.
        assert!(
            again.iter().all(|(_, times)| *times <= 8),
            "{what}: {again:?}"
        );
    }

    fn end(&self, workers: Vec<Running>) {
        for worker in &workers {
            worker.signal(Signal::TERM);
        }
        for worker in workers {
            worker.wait().with(exit::OK);
        }
        self.fleet.fleet.assert_nothing_left();
    }
}

#[track_caller]
fn assert_killed(ended: &Ended) {
    assert_eq!(
        ended.status.signal(),
        Some(9),
        "{}\n{}",
        ended.stdout,
        ended.stderr
    );
}

#[test]
fn a_worker_killed_at_any_moment() {
    rounds(|random| {
        let mut pushed = Pushed::new();
        for (moment, twice) in [
            ("before-fetch", 1),
            // Its other slot may have fetched as well.
            ("during-fetch", SLOTS),
            ("before-put", SLOTS),
            ("after-put", SLOTS - 1),
            ("after-outcome", SLOTS - 1),
            ("after-retry-publish", SLOTS),
        ] {
            pushed.push();
            let mut explained = twice;
            if moment == "after-retry-publish" {
                let refused = 6;
                for repo in &pushed.repos[..refused] {
                    let fault = Fault::status(503);
                    pushed.fleet.fleet.server.fault(repo, fault.times(1));
                }
                // Each of them has its second attempt besides.
                explained += refused;
            }
            let doomed = pushed.start_doomed(moment, random.u64(1..=4));
            let run = pushed.start_producer();
            assert_killed(&doomed.wait());
            // Its slots die with it, without anyone's help.
            wait_until("the slots to die", || pushed.fleet.fleet.slots().is_empty());
            let worker = pushed.start_worker();
            pushed.check(moment, &run.wait().with(exit::OK), explained);
            pushed.end(vec![worker]);
        }
    });
}

#[test]
fn a_producer_killed_while_it_publishes_and_right_before() {
    rounds(|random| {
        let mut pushed = Pushed::new();
        for moment in [
            "after-manifest".to_owned(),
            format!("mid-publish:{}", random.u64(1..REPOS as u64)),
        ] {
            pushed.push();
            let mut command = pushed.fleet.producer(&[]);
            command.env("REPOFLEET_FAILPOINT", &moment);
            assert_killed(&Running::start(&mut command).wait());
            let workers = vec![pushed.start_worker(), pushed.start_worker()];
            let run = pushed.start_producer().wait().with(exit::OK);
            pushed.check(&moment, &run, 0);
            pushed.end(workers);
        }
        // Where workers come only after the second producer, it finds the jobs of the first waiting.
        pushed.push();
        let mut command = pushed.fleet.producer(&[]);
        command.env("REPOFLEET_FAILPOINT", "mid-publish:10");
        assert_killed(&Running::start(&mut command).wait());
        let run = pushed.start_producer();
        let line = run.wait_for_line("of earlier runs, still waiting: ");
        let line: Value = serde_json::from_str(&line).unwrap();
        let counts = &line["context"]["metadata"];
        let adopted = counts["adopted"].as_u64().unwrap();
        assert!(adopted >= 10, "{line}");
        assert_eq!(
            counts["published"].as_u64().unwrap() + adopted,
            REPOS as u64
        );
        let worker = pushed.start_worker();
        pushed.check("adopted", &run.wait().with(exit::OK), 0);
        pushed.end(vec![worker]);
    });
}

#[test]
fn a_broker_killed_and_restarted_and_its_queues_deleted() {
    let mut node = Node::start();
    let node = std::cell::RefCell::new(&mut node);
    rounds(|random| {
        let mut pushed = Pushed::on(&node.borrow().url());
        let workers = vec![pushed.start_worker(), pushed.start_worker()];
        // Not in the second after its queues were first declared: 3.10 then forgets that it has a
        // stream.
        let first = pushed.start_producer().wait().with(exit::OK);
        pushed.check("before", &first, 0);
        for clean in [false, true] {
            pushed.push();
            for repo in &pushed.repos {
                let late = Fault::Latency(Duration::from_millis(100));
                pushed.fleet.fleet.server.fault(repo, late);
            }
            let run = pushed.start_producer();
            let some = random.usize(1..REPOS / 2);
            wait_until("some fetches", || pushed.fetched_now() >= some);
            if clean {
                node.borrow_mut().shut_down();
            } else {
                node.borrow_mut().kill();
            }
            node.borrow_mut().start_again();
            pushed.fleet.fleet.server.clear_faults();
            let what = if clean {
                "broker restarted"
            } else {
                "broker killed"
            };
            // What was in the workers' hands came back to them.
            pushed.check(what, &run.wait().with(exit::OK), 2 * SLOTS);
        }
        for (queue, said) in [
            ("ledger", "outcomes may be lost"),
            ("jobs", "neither waiting nor digested: publishing again"),
        ] {
            pushed.push();
            for repo in &pushed.repos {
                let late = Fault::Latency(Duration::from_millis(200));
                pushed.fleet.fleet.server.fault(repo, late);
            }
            // Longer than a job takes here.
            let run = Running::start(&mut pushed.fleet.producer(&["--republish-after", "5"]));
            let some = random.usize(1..REPOS / 2);
            wait_until("some fetches", || pushed.fetched_now() >= some);
            // Else all might be done before the queue is gone: the command takes seconds.
            pushed.fleet.fleet.server.set_held(true);
            let name = format!("{}.{queue}", pushed.fleet.prefix);
            node.borrow().control(&["delete_queue", &name]);
            pushed.fleet.fleet.server.clear_faults();
            pushed.fleet.fleet.server.set_held(false);
            let run = run.wait().with(exit::OK);
            assert!(run.stdout.contains(said), "{}", run.stdout);
            pushed.check(&format!("{queue} deleted"), &run, 2 * SLOTS);
        }
        pushed.end(workers);
    });
}

#[test]
fn a_connection_cut_again_and_again() {
    rounds(|random| {
        let url = shared_url();
        let target: SocketAddr = url.rsplit('@').next().unwrap().parse().unwrap();
        let proxy = TcpProxy::start(target);
        let mut pushed = Pushed::on(&url);
        pushed.fleet.broker_url = url.replace(&target.to_string(), &proxy.address().to_string());
        pushed.push();
        for repo in &pushed.repos {
            let late = Fault::Latency(Duration::from_millis(100));
            pushed.fleet.fleet.server.fault(repo, late);
        }
        let workers = vec![pushed.start_worker(), pushed.start_worker()];
        let run = pushed.start_producer();
        let mut cuts = 0;
        for some in [2, REPOS / 3, 2 * REPOS / 3] {
            wait_until("some fetches", || pushed.fetched_now() >= some);
            if random.bool() {
                proxy.cut();
            } else {
                proxy.refuse();
                std::thread::sleep(Duration::from_millis(random.u64(10..800)));
                proxy.flow();
            }
            cuts += 1;
        }
        let run = run.wait().with(exit::OK);
        pushed.check("connection cut", &run, cuts * 2 * SLOTS);
        pushed.end(workers);
    });
}

#[test]
fn a_store_that_refuses_is_slow_and_loses_answers() {
    rounds(|random| {
        let mut pushed = Pushed::new();
        let workers = vec![pushed.start_worker(), pushed.start_worker()];
        pushed.push();
        for repo in &pushed.repos {
            let late = Fault::Latency(Duration::from_millis(100));
            pushed.fleet.fleet.server.fault(repo, late);
        }
        let run = pushed.start_producer();
        run.wait_for_line("Jobs published: ");
        let mut dice = random.fork();
        pushed
            .bucket
            .decide(move |call| match (call.method.as_str(), dice.u32(0..8)) {
                ("PUT", 0) => Fate::AnswerLost,
                ("PUT", 1) => Fate::Denied(503, "SlowDown"),
                ("PUT", 2) => Fate::Lost,
                (_, 3) => Fate::Late(Duration::from_millis(50)),
                _ => Fate::Answered,
            });
        let some = random.usize(1..REPOS / 2);
        wait_until("some fetches", || pushed.fetched_now() >= some);
        // Away altogether: the workers stop until it is back.
        pushed
            .bucket
            .decide(|_| Fate::Denied(503, "ServiceUnavailable"));
        workers[0].wait_for_line("no job is started until it is mended");
        pushed.bucket.decide(|_| Fate::Answered);
        let run = run.wait().with(exit::OK);
        // A job that could not be stored is fetched once more.
        pushed.check("store away", &run, REPOS);
        pushed.end(workers);
    });
}

#[test]
fn a_host_that_throttles() {
    rounds(|random| {
        let mut pushed = Pushed::new();
        pushed.push();
        let times = random.u64(2..8);
        let throttled = Fault::retry_after(429, 1);
        pushed.fleet.fleet.server.fault_all(throttled.times(times));
        let workers = vec![pushed.start_worker(), pushed.start_worker()];
        let run = pushed.start_producer().wait().with(exit::OK);
        // What is turned away is not a fetch; it comes again when its host is asked again.
        pushed.check("throttled", &run, 0);
        let told = workers
            .iter()
            .any(|worker| worker.has_said("pausing it here too for"));
        assert!(told, "no worker heard of it from another");
        pushed.end(workers);
    });
}

#[test]
fn messages_that_are_no_jobs() {
    rounds(|random| {
        let mut pushed = Pushed::new();
        pushed.push();
        let worker = pushed.start_worker();
        let junk: Vec<u8> = (0..random.usize(0..2000)).map(|_| random.u8(..)).collect();
        let tokio = tokio::runtime::Runtime::new().unwrap();
        for (id, body) in [
            ("", &junk[..]),
            ("a/b/c@d", b"{}"),
            ("x", b"{\"version\":99}"),
        ] {
            tokio.block_on(publish_raw(&pushed.broker, &pushed.fleet.prefix, id, body));
        }
        let run = pushed.start_producer().wait().with(exit::OK);
        let look = pushed.fleet.look(&pushed.broker);
        wait_until("dead letters", || look.waiting().dead == 3);
        pushed.dead = 3;
        pushed.check("poison", &run, 0);
        pushed.end(vec![worker]);
    });
}

#[test]
fn a_worker_that_wakes_up_when_its_jobs_are_done_by_others() {
    rounds(|random| {
        let mut pushed = Pushed::new();
        // The broker gives up who is silent for two of these.
        pushed.fleet.broker_url = format!("{}?heartbeat=1", pushed.broker);
        pushed.push();
        let late = Fault::Latency(Duration::from_millis(500));
        pushed.fleet.fleet.server.fault_all(late);
        let zombie = pushed.start_worker();
        let run = pushed.start_producer();
        let some = random.usize(1..4);
        wait_until("some requests", || {
            pushed.fleet.fleet.asked_for().len() >= some
        });
        zombie.signal(Signal::STOP);
        pushed.fleet.fleet.server.clear_faults();
        let worker = pushed.start_worker();
        run.wait().with(exit::OK);
        // And another push, which it is not to undo.
        pushed.push();
        let next = pushed.start_producer().wait().with(exit::OK);
        zombie.signal(Signal::CONT);
        zombie.wait_for_line("could not be settled");
        pushed.check("zombie", &next, 0);
        pushed.end(vec![zombie, worker]);
    });
}
