//! Hosts that limit a fleet, or that the fleet is to be gentle with.
//!
//! `deploy/test.sh limits` has GitHub's limit last for five minutes, with 1,000 repositories.

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use common::broker::Event;
use common::exit;
use rustix::process::Signal;
use serde_json::json;
use testing::git_server::{Fault, Rule};
use testing::rabbitmq::shared_url;
use testing::s3_server::S3Server;

use crate::distributed::Distributed;
use crate::fleet::{Fleet, Running, wait_until};

/// How long a fleet may take once a limit has ended.
const TWO_MINUTES: Duration = Duration::from_secs(120);

/// A fleet of `count` repositories that are one, with a bucket in this process.
fn fleet_of(count: usize) -> (Distributed, S3Server) {
    let fleet = Fleet::new();
    fleet.small_repository("l/all");
    let names: Vec<_> = (0..count).map(|i| format!("l/r{i:04}")).collect();
    for name in &names {
        let link = fleet.repositories().join(format!("{name}.git"));
        symlink("all.git", link).unwrap();
    }
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    fleet.write_feed(&fleet.entries(&names));
    let bucket = S3Server::start();
    let fleet = Distributed::new(fleet, shared_url(), bucket.url());
    (fleet, bucket)
}

fn start_workers(fleet: &Distributed, count: usize, arguments: &[&str]) -> Vec<Running> {
    let workers: Vec<_> = (0..count).map(|_| fleet.start_worker(arguments)).collect();
    for worker in &workers {
        worker.wait_for_line("\"message\":\"ready\"");
    }
    workers
}

fn stop(workers: Vec<Running>) {
    for worker in &workers {
        worker.signal(Signal::TERM);
    }
    for worker in workers {
        worker.wait().with(exit::OK);
    }
}

fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| text.parse().expect("a number"))
}

#[expect(
    clippy::print_stderr,
    reason = "captured by the test harness, and shown with --nocapture or when a test fails"
)]
fn report(line: &str) {
    eprintln!("{line}");
}

/// Has a fleet work while its host limits everybody: without words about for how long if that lasts.
fn wait_out(what: &str, limit: fn(Option<u64>) -> Rule) {
    const WORKERS: usize = 4;
    let repositories = number("REPOFLEET_LIMIT_REPOSITORIES", 30);
    let lasts = Duration::from_secs(number("REPOFLEET_LIMIT_SECONDS", 7));
    // It is told only where there is no time to find out.
    let (wish, pause) = match lasts.as_secs() {
        0..60 => (Some(2), 2),
        _ => (None, 30),
    };
    let (fleet, _bucket) = fleet_of(usize::try_from(repositories).unwrap());
    let server = &fleet.fleet.server;
    server.fault_all(limit(wish).lasting(lasts));
    let workers = start_workers(&fleet, WORKERS, &["--concurrency", "4"]);
    let run = Running::start(&mut fleet.producer(&[]));
    let run = run.wait_within(lasts + 3 * TWO_MINUTES).with(exit::OK);
    let done = Instant::now();

    let mut refused: Vec<_> = server
        .stats()
        .into_values()
        .flat_map(|s| s.faulted_at)
        .collect();
    refused.sort();
    let (began, ended) = (refused[0], refused[0] + lasts);
    let silence = began + Duration::from_secs(1)..ended;
    let asked = server.asked_at().into_iter();
    let probes = asked.filter(|at| silence.contains(at)).count();
    let took = done.saturating_duration_since(ended);
    report(&format!(
        "{what}: {repositories} repositories, a limit of {lasts:?}: {} refused, {probes} asked later than 1 s after \
         the first refusal, all done {took:?} after its end",
        refused.len()
    ));

    let summary = run.summary();
    assert_eq!(
        (&summary["processed"], &summary["failed"]),
        (&json!(repositories), &json!(0))
    );
    let ledger = fleet.look(&fleet.broker_url).ledger();
    let outcomes = ledger.into_iter().filter_map(|entry| match entry.event {
        Event::Outcome(record) => Some(record),
        _ => None,
    });
    assert!(outcomes.into_iter().all(|record| record.attempt == 0));
    // Of each worker one after each pause, if none hears of the others' in time.
    let most = (lasts.as_secs() / pause + 1) * WORKERS as u64;
    assert!(probes as u64 <= most, "{probes} of {most}");
    assert!(took < TWO_MINUTES, "{took:?}");
    stop(workers);
}

#[test]
fn githubs_limit_by_status_is_waited_out_by_a_silent_fleet() {
    wait_out("status", Fault::github_limit);
}

#[test]
fn githubs_limit_in_band_is_waited_out_by_a_silent_fleet() {
    wait_out("in band", Fault::github_limit_in_band);
}

/// While some come and one goes.
#[test]
fn a_hosts_rate_is_shared_by_the_workers_that_there_are() {
    const RATE: f64 = 8.0;
    const REPOSITORIES: usize = 96;
    let rate = RATE.to_string();
    let arguments = ["--concurrency", "2", "--host-rate", &rate];
    for count in [1_usize, 4] {
        let (fleet, _bucket) = fleet_of(REPOSITORIES);
        let server = &fleet.fleet.server;
        let mut workers = start_workers(&fleet, count.div_ceil(2), &arguments);
        let run = Running::start(&mut fleet.producer(&[]));
        wait_until("a third", || server.asked_at().len() >= REPOSITORIES / 3);
        workers.extend(start_workers(&fleet, count / 2, &arguments));
        wait_until("two thirds", || {
            server.asked_at().len() >= REPOSITORIES * 2 / 3
        });
        stop(workers.drain(..count / 2).collect());
        run.wait().with(exit::OK);
        // Each may begin one at once; what begins a little late comes closer to the next.
        server.assert_rate(RATE, count + 4);
        let begun = server.asked_at();
        let took = (begun[begun.len() - 1] - begun[0]).as_secs_f64();
        let fair = REPOSITORIES as f64 / RATE;
        report(&format!(
            "{count} workers: {} fetches in {took:.1} s, {fair} at best",
            begun.len()
        ));
        assert_eq!(begun.len(), REPOSITORIES);
        assert!(took < fair * 1.5, "{took} instead of {fair}");
        stop(workers);
    }
}
