//! Workers as processes: what becomes of their jobs, and of them, when something hangs, dies or
//! cannot be reached.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::broker::{Event, WorkerState};
use common::exit;
use rustix::process::Signal;
use serde_json::{Value, json};
use testing::git_server::{Fault, GITHUB_LIMIT};
use testing::rabbitmq::{send, shared_url};
use testing::root::as_root;
use testing::s3_server::{Fate, S3Server};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::distributed::Distributed;
use crate::fleet::{Fleet, PUSHED, Running, in_clean_environment, wait_until};

/// A fleet of these repositories, with a bucket in this process.
fn fleet_of(repos: &[&str]) -> (Distributed, S3Server) {
    let bucket = S3Server::start();
    let fleet = Distributed::new(Fleet::of(repos), shared_url(), bucket.url());
    (fleet, bucket)
}

/// What workers recorded about why they wait, oldest first.
fn states(fleet: &Distributed) -> Vec<WorkerState> {
    let ledger = fleet.look(&fleet.broker_url).ledger();
    let states = ledger.into_iter().filter_map(|entry| match entry.event {
        Event::Worker(state) => Some(state),
        _ => None,
    });
    states.collect()
}

/// Long enough for a second signal to count as one.
fn pause_between_signals() {
    std::thread::sleep(Duration::from_millis(1100));
}

#[test]
fn a_second_signal_ends_a_worker_whose_store_hangs() {
    let (fleet, bucket) = fleet_of(&["h/a", "h/b"]);
    let worker = fleet.start_worker(&["--drain", "500"]);
    worker.wait_for_line("\"message\":\"ready\"");
    bucket.decide(|call| match call.key.starts_with("gitingest/") {
        true => Fate::Silence,
        false => Fate::Answered,
    });
    let run = Running::start(&mut fleet.producer(&["--detach", "--force"]));
    run.wait_for_line("Jobs published: 2");
    let look = fleet.look(&fleet.broker_url);
    wait_until("both jobs to be in hand", || look.waiting().ready == 0);
    worker.signal(Signal::TERM);
    worker.wait_for_line("a second signal stops at once");
    pause_between_signals();
    let start = Instant::now();
    worker.signal(Signal::TERM);
    let ended = worker.wait().with(exit::OK);
    assert!(start.elapsed() < Duration::from_secs(2), "{ended:?}");
    // Neither is lost.
    wait_until("both jobs to be back", || {
        let waiting = look.waiting();
        waiting.ready + waiting.retry == 2
    });
}

#[test]
fn a_signal_ends_a_worker_that_starts_against_a_store_that_hangs() {
    let (fleet, bucket) = fleet_of(&[]);
    bucket.decide(|_| Fate::Silence);
    let worker = fleet.start_worker(&[]);
    worker.signal(Signal::TERM);
    let start = Instant::now();
    let ended = worker.wait().with(exit::OK);
    assert!(start.elapsed() < Duration::from_secs(8), "{ended:?}");
}

/// Whatever else its workers had in hand when it killed them.
#[test]
fn a_job_that_kills_its_workers_is_the_only_dead_letter() {
    const SLOTS: u64 = 4;
    let repos: Vec<_> = (1..8).map(|i| format!("k/healthy-{i}")).collect();
    let repos: Vec<_> = ["k/killer"]
        .into_iter()
        .chain(repos.iter().map(String::as_str))
        .collect();
    let (fleet, _bucket) = fleet_of(&repos);
    let server = &fleet.fleet.server;
    server.fault("k/killer", Fault::Hang);
    for repo in &repos[1..] {
        let slow = Fault::Latency(Duration::from_millis(500));
        server.fault(repo, slow);
    }
    let run = Running::start(&mut fleet.producer(&[]));
    run.wait_for_line("Jobs published: 8");
    let look = fleet.look(&fleet.broker_url);
    let mut kills = 0;
    while look.waiting().dead == 0 {
        let worker = fleet.start_worker(&["--concurrency", &SLOTS.to_string()]);
        let asked = || server.repo_stats("k/killer").info_refs > kills;
        wait_until("the killer, or its end", || {
            asked() || look.waiting().dead > 0
        });
        if asked() {
            kills = server.repo_stats("k/killer").info_refs;
            worker.signal(Signal::KILL);
        }
    }
    let _worker = fleet.start_worker(&[]);
    let run = run.wait().with(exit::OK);
    let summary = run.summary();
    assert_eq!(
        (&summary["processed"], &summary["failed"]),
        (&json!(7), &json!(1)),
        "after {kills} kills"
    );
    let waiting = look.waiting();
    assert_eq!((waiting.ready, waiting.dead), (0, 1));
    // At most once in company, if it was not the one to be worked on alone at once.
    assert!(kills <= 12, "{kills} kills");
}

/// Whoever may announce can take neither a worker's memory nor its work.
#[test]
fn hostile_announcements_cost_a_worker_nothing() {
    let (fleet, _bucket) = fleet_of(&["a/b", "a/c"]);
    let worker = fleet.start_worker(&[]);
    let exchange = format!("{}.hosts", fleet.prefix);
    let pause = |host: String, until: i64| {
        json!({"host": host, "untilMillis": until, "worker": "evil\nworker"})
            .to_string()
            .into_bytes()
    };
    let large = |n: u8| pause((n + b'a').to_string().repeat(30 << 20), i64::MAX);
    let many =
        |n: i64| json!({"host": format!("host-{n}"), "untilMillis": i64::MAX - n, "worker": "w"});
    let calls = |n: i64| json!({"rollCall": format!("call-{n}")});
    let small = (0..20_000).flat_map(|n| [many(n), calls(n)]);
    let small = small.map(|notice| notice.to_string().into_bytes());
    let own = pause(fleet.fleet.server.authority(), i64::MIN);
    let garbage = [b"{".to_vec(), vec![0; 1000], own];
    let all = (0..8).map(large).chain(small).chain(garbage);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(send(&fleet.broker_url, &exchange, all));

    let ended = Running::start(&mut fleet.producer(&[]))
        .wait()
        .with(exit::OK);
    assert_eq!(ended.summary()["processed"], 2);
    let status =
        fs::read_to_string(format!("/proc/{}/status", worker.pid().as_raw_nonzero())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    // Two large ones, each as it came and put together.
    assert!(peak < 300 << 10, "{peak} kB");
    worker.signal(Signal::TERM);
    let ended = worker.wait().with(exit::OK);
    let paused = ended.messages("throttled").len();
    assert!((1..600).contains(&paused), "{paused} pauses heeded");
}

/// The run that waits for them says so.
#[test]
fn why_workers_wait_is_in_the_ledger() {
    let (fleet, bucket) = fleet_of(&["w/a", "w/b"]);
    fleet
        .fleet
        .server
        .fault("w/a", Fault::retry_after(429, 8).times(1));
    let denied = |call: &testing::s3_server::Call| match call.key.starts_with("runs/") {
        true => Fate::Answered,
        false => Fate::Denied(403, "AccessDenied"),
    };
    // Looks at the workers each second.
    let mut run = fleet.producer(&["--force", "--republish-after", "1"]);
    let run = Running::start(&mut run);
    run.wait_for_line("Jobs published: 2");
    bucket.decide(denied);
    let worker = fleet.start_worker(&[]);
    let says = |wanted: &dyn Fn(&WorkerState) -> bool| states(&fleet).iter().any(wanted);
    wait_until("the reason", || {
        says(&|state| {
            state
                .infra
                .as_deref()
                .is_some_and(|why| why.contains("AccessDenied"))
        })
    });
    let said = run.wait_for_line("1 worker paused: ");
    assert!(said.contains("AccessDenied"), "{said}");
    bucket.decide(|_| Fate::Answered);
    let host = fleet.fleet.server.authority();
    run.wait_for_line(&format!("{host} rate-limited until "));
    let run = run.wait().with(exit::OK);
    assert_eq!(run.summary()["processed"], 2);
    assert!(
        says(&|state| state.hosts.contains_key(&host)),
        "{:?}",
        states(&fleet)
    );
    wait_until("nothing to wait for", || {
        let last = states(&fleet).pop().unwrap();
        last.infra.is_none() && last.hosts.is_empty()
    });
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
    let names: Vec<_> = states(&fleet)
        .into_iter()
        .map(|state| state.worker)
        .collect();
    assert!(
        names
            .iter()
            .all(|name| *name == names[0] && !name.is_empty()),
        "{names:?}"
    );
}

/// A machine on which no name resolves, but for those in `hosts`.
struct NoNames {
    folder: tempfile::TempDir,
}

impl NoNames {
    fn new() -> Self {
        let this = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        // Nobody listens there.
        let servers = "nameserver 127.255.255.254\noptions timeout:1 attempts:1\n";
        fs::write(this.file("resolv.conf"), servers).unwrap();
        fs::write(this.file("nsswitch.conf"), "hosts: files dns\n").unwrap();
        this.hosts("");
        this
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Has this name resolve from now on, to this machine.
    fn hosts(&self, name: &str) {
        let hosts = format!("127.0.0.1 localhost {name}\n");
        fs::write(self.file("hosts"), hosts).unwrap();
    }

    /// The same command, to be run there.
    fn there(&self, command: &Command) -> Command {
        let script = r#"
            for file in resolv.conf nsswitch.conf hosts; do
                mount --bind "$0/$file" "$(realpath "/etc/$file")" || exit 99
            done
            exec "$@"
        "#;
        let mut there = in_clean_environment(Command::new("unshare"));
        there
            .args(["--mount", "--", "sh", "-c", script])
            .arg(self.folder.path())
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                there.env(name, value);
            }
        }
        there
    }
}

/// Entries for `count` repositories of github.com.
fn on_github(fleet: &Fleet, count: usize) {
    let entry = |i| {
        let mut entry = fleet.entry(&format!("n/r{i:02}"), PUSHED);
        entry["url"] = json!(format!("https://github.com/n/r{i:02}"));
        entry
    };
    fleet.write_feed(&(0..count).map(entry).collect::<Vec<_>>());
}

#[test]
fn a_machine_that_resolves_no_name_is_no_repositorys_fault() {
    let name = "workers::a_machine_that_resolves_no_name_is_no_repositorys_fault";
    as_root(name, || {
        let (fleet, machine) = (Fleet::new(), NoNames::new());
        on_github(&fleet, 40);
        let command = fleet.producer(&["--patience", "4", "--concurrency", "8"]);
        let run = Running::start(&mut machine.there(&command)).wait();
        let run = run.with(exit::UNAVAILABLE);
        let summary = run.summary();
        assert_eq!(
            (&summary["failed"], &summary["closed"]),
            (&json!(0), &json!(false))
        );
        let said = |text: &str| {
            run.stdout
                .lines()
                .filter(|line| line.contains(text))
                .count()
        };
        assert_eq!(
            said("no job is started until it is mended"),
            1,
            "{}",
            run.stdout
        );
        assert!(
            run.stdout.contains("cannot resolve any name"),
            "{}",
            run.stdout
        );
        assert!(run.stdout.lines().count() < 30, "{}", run.stdout);
    });
}

#[test]
fn one_host_that_does_not_resolve_is_its_own_fault() {
    let name = "workers::one_host_that_does_not_resolve_is_its_own_fault";
    as_root(name, || {
        let (fleet, machine) = (Fleet::new(), NoNames::new());
        machine.hosts("codeberg.org");
        on_github(&fleet, 2);
        let command = fleet.producer(&["--patience", "4", "--max-failures", "100%"]);
        let run = Running::start(&mut machine.there(&command))
            .wait()
            .with(exit::OK);
        let summary = fleet.document(&run.run_id(), "summary.json");
        for failure in summary["failures"].as_array().unwrap() {
            assert_eq!(failure["class"], "transient", "{failure}");
            let message = failure["message"].as_str().unwrap();
            assert!(message.contains("cannot resolve github.com"), "{failure}");
        }
        assert_eq!(run.summary()["failed"], 2);
    });
}

/// What is at `path` of a program's `--metrics-addr`.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_worker_that_resolves_no_name_is_not_ready_until_it_does() {
    let name = "workers::a_worker_that_resolves_no_name_is_not_ready_until_it_does";
    as_root(name, || {
        let (fleet, _bucket) = fleet_of(&[]);
        on_github(&fleet.fleet, 3);
        let run = Running::start(&mut fleet.producer(&["--max-failures", "100%"]));
        run.wait_for_line("Jobs published: 3");
        let machine = NoNames::new();
        let command = fleet.worker(&["--metrics-addr", "127.0.0.1:0"]);
        let worker = Running::start(&mut machine.there(&command));
        let line: Value = serde_json::from_str(&worker.wait_for_line("/metrics;")).unwrap();
        let address = line["context"]["metadata"]["address"].as_str().unwrap();
        let not_ready = |answer: &str| {
            answer.starts_with("HTTP/1.1 503") && answer.contains("cannot resolve any name")
        };
        wait_until("a worker that is not ready", || {
            not_ready(&get(address, "/ready"))
        });
        assert!(get(address, "/metrics").contains("\nrepofleet_infra_paused 1"));
        assert_eq!(fleet.look(&fleet.broker_url).waiting().dead, 0);
        // The others resolve again.
        machine.hosts("gitlab.com");
        wait_until("a worker that is ready", || {
            get(address, "/ready").starts_with("HTTP/1.1 200")
        });
        let run = run.wait().with(exit::OK);
        assert_eq!(run.summary()["failed"], 3);
        worker.signal(Signal::TERM);
        worker.wait().with(exit::OK);
    });
}

/// As GitHub has limited anonymous downloads since September 2026: by status, and in band.
#[test]
fn a_host_that_limits_anonymous_downloads_is_waited_for() {
    let repos: Vec<_> = (0..60).map(|i| format!("l/r{i:02}")).collect();
    let repos: Vec<_> = repos.iter().map(String::as_str).collect();
    let fleet = Fleet::of(&repos);
    for limit in [
        Fault::github_limit(Some(1)),
        Fault::github_limit_in_band(Some(1)),
    ] {
        fleet
            .server
            .fault_all(limit.lasting(Duration::from_secs(2)));
    }
    let run = fleet.run(&["--concurrency", "8"]).with(exit::OK);
    let summary = fleet.document(&run.run_id(), "summary.json");
    assert_eq!(
        (&summary["processed"], &summary["failed"]),
        (&json!(60), &json!(0))
    );
    assert!(!run.stdout.contains("retrying"), "{}", run.stdout);
    let said = run.messages("throttled");
    let host = fleet.server.authority();
    assert!(!said.is_empty());
    for message in said {
        for part in [&format!("pausing {host} for"), GITHUB_LIMIT, "--token-for"] {
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn renamed_repositories_are_counted_and_listed() {
    let fleet = Fleet::of(&["r/old", "r/other"]);
    fleet.small_repository("r/new");
    let to = fleet.server.repo_url("r", "new");
    fleet.server.fault("r/old", Fault::Moved { to: to.clone() });
    let run = fleet.run(&[]).with(exit::OK);
    let summary = fleet.document(&run.run_id(), "summary.json");
    assert_eq!(summary["renamed"], json!([{"repo": "r/old", "to": to}]));
    assert_eq!(
        run.messages("renamed"),
        ["1 repository was renamed; see summary.json"]
    );
}

/// Nobody is at that address: no repository is asked for.
const NO_PROXY: [&str; 2] = ["--fetch-proxy", "http://127.0.0.1:1"];

/// What a run of `fleet` in one process says about tokens at its start, with this GITHUB_TOKEN.
fn said_of_tokens(fleet: &Fleet, token: &str, jobs: usize) -> Vec<String> {
    let mut command = fleet.producer(&NO_PROXY);
    command.env("GITHUB_TOKEN", token);
    let run = Running::start(&mut command);
    run.wait_for_line(&format!("Jobs published: {jobs}"));
    run.signal(Signal::TERM);
    run.wait().with(exit::TERMINATED).messages("token")
}

#[test]
fn many_repositories_of_github_without_a_token_are_warned_of_at_the_start() {
    let fleet = Fleet::new();
    on_github(&fleet, 501);
    let warned = said_of_tokens(&fleet, "", 501);
    assert!(
        warned[0].starts_with("501 repositories to fetch from github.com"),
        "{warned:?}"
    );
    assert!(
        warned[0].ends_with("give a token in GITHUB_TOKEN"),
        "{warned:?}"
    );
    assert_eq!(warned.len(), 1);
    assert_eq!(said_of_tokens(&fleet, "sesame", 501), [""; 0]);
}

#[test]
fn repositories_that_are_not_fetched_need_no_token() {
    let fleet = Fleet::new();
    on_github(&fleet, 501);
    let known = json!({"version": 1, "failures": [{
        "repo": "n/r00", "pushedAt": PUSHED, "url": "https://github.com/n/r00",
        "class": "gone", "message": "gone",
        "failedAt": OffsetDateTime::now_utc().format(&Rfc3339).unwrap(),
    }]});
    let runs = fleet.store_folder().join("runs");
    fs::create_dir_all(&runs).unwrap();
    fs::write(runs.join("failures.json"), known.to_string()).unwrap();
    assert_eq!(said_of_tokens(&fleet, "", 500), [""; 0]);
}

#[test]
fn a_fleet_is_asked_which_hosts_it_has_tokens_for() {
    let (fleet, _bucket) = fleet_of(&[]);
    on_github(&fleet.fleet, 501);
    let start = |token: &str| {
        let mut command = fleet.worker(&NO_PROXY);
        command.env("GITHUB_TOKEN", token);
        let worker = Running::start(&mut command);
        worker.wait_for_line("\"message\":\"ready\"");
        worker
    };
    let with = start("sesame");
    let mut command = fleet.producer(&["--log-level", "producer=debug"]);
    let run = Running::start(&mut command);
    run.wait_for_line("no worker lacks a token for github.com");
    run.signal(Signal::TERM);
    let run = run.wait().with(exit::TERMINATED);
    assert!(!run.stdout.contains("without a token"), "{}", run.stdout);

    let without = start("");
    let run = Running::start(&mut fleet.producer(&["--force"]));
    let said = run.wait_for_line("without a token for it on 1 of 2 workers");
    assert!(
        said.contains("501 repositories") && said.contains("GITHUB_TOKEN"),
        "{said}"
    );
    drop((with, without, run));
}

#[test]
fn what_cannot_be_a_token_ends_a_run_before_it_begins() {
    let fleet = Fleet::of(&["t/a"]);
    for token in [
        "ghp_sesame\n",
        "'ghp_sesame'",
        "ghp sesame",
        "${ghp_sesame}",
    ] {
        let mut command = fleet.producer(&[]);
        command.env("GITHUB_TOKEN", token);
        let run = Running::start(&mut command).wait().with(exit::USAGE);
        let told = run.stdout + &run.stderr;
        assert!(told.contains("GITHUB_TOKEN is"), "{told}");
        assert!(!told.contains("sesame"), "{told}");
    }
    for value in ["gitlab.com=glpat-sesame", "gitlab.com=NOT_SET"] {
        let run = fleet.run(&["--token-for", value]).with(exit::USAGE);
        let told = run.stdout + &run.stderr;
        assert!(told.contains("--token-for"), "{told}");
        assert!(!told.contains("sesame"), "{told}");
    }
    assert_eq!(fleet.requests(), 0);
}
