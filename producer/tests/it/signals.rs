//! Being told to stop in the middle: what is in hand is finished or left, and nothing stays behind.

use std::process::Command;
use std::thread;
use std::time::Duration;

use common::exit::{INTERRUPTED, OK, TERMINATED};
use rustix::process::Signal;
use serde_json::{Value, json};
use testing::git_server::{Fault, Kind};

use crate::fleet::{Ended, Fleet, Running};

const REPOS: [&str; 6] = ["s/a", "s/b", "s/c", "s/d", "s/e", "s/f"];

/// The summary that a run left in the store, which says the same as its log.
fn left_word(fleet: &Fleet, run: &Ended) -> Value {
    let summary = fleet.document(&run.run_id(), "summary.json");
    assert_eq!(summary["closed"], run.summary()["closed"]);
    summary
}

/// With two slots, `s/c` and `s/d` hang while the last two wait.
fn hanging() -> (Fleet, Running) {
    let fleet = Fleet::of(&REPOS);
    fleet.server.fault("s/c", Fault::Hang);
    fleet.server.fault("s/d", Fault::Hang.on(Kind::UploadPack));
    let run = fleet.start(&["--concurrency", "2", "--drain", "1"]);
    fleet.server.wait_for_requests("s/c", 1);
    fleet.server.wait_for_requests("s/d", 2);
    (fleet, run)
}

/// SIGTERM from a scheduler: no new jobs, the drain, a summary of how far it got, and an exit code
/// that says that jobs are open; the next run goes on there.
#[test]
fn sigterm_ends_in_order_and_the_next_run_goes_on() {
    let (fleet, run) = hanging();
    assert_eq!(fleet.slots().len(), 2);
    run.signal(Signal::TERM);
    let run = run.wait().with(TERMINATED);
    fleet.assert_nothing_left();
    assert_eq!(
        run.sentence(),
        "Pipeline incomplete: 6 total, 0 cached (0.0%), 2 processed, 0 failed, 4 open"
    );
    let summary = left_word(&fleet, &run);
    assert_eq!(summary["open"], json!(["s/c", "s/d", "s/e", "s/f"]));
    assert_eq!(
        run.messages("run-not-closed"),
        ["The run did not close; open: s/c, s/d, s/e, s/f"]
    );
    assert_eq!(fleet.stored(), ["s/a", "s/b"]);
    assert_eq!(fleet.asked_for(), ["s/a", "s/b", "s/c", "s/d"]);

    fleet.server.clear_faults();
    let requests = |repo: &str| fleet.server.repo_stats(repo).info_refs;
    let before = ["s/a", "s/b"].map(requests);
    let next = fleet.run(&[]).with(OK);
    assert_eq!(
        next.sentence(),
        "Pipeline complete: 6 total, 2 cached (33.3%), 4 processed, 0 failed"
    );
    assert_eq!(["s/a", "s/b"].map(requests), before);
    assert_eq!(fleet.stored(), REPOS);
    fleet.assert_nothing_left();
}

/// Ctrl-C is the same but for the exit code.
#[test]
fn sigint_is_told_apart_by_the_exit_code() {
    let (fleet, run) = hanging();
    run.signal(Signal::INT);
    let run = run.wait().with(INTERRUPTED);
    assert_eq!(left_word(&fleet, &run)["processed"], 2);
    fleet.assert_nothing_left();
}

/// What ends within the drain is finished, stored and counted.
#[test]
fn a_job_in_hand_is_finished_within_the_drain() {
    let fleet = Fleet::of(&REPOS[..3]);
    fleet
        .server
        .fault("s/b", Fault::Latency(Duration::from_secs(1)));
    let run = fleet.start(&["--concurrency", "1", "--drain", "100"]);
    fleet.server.wait_for_requests("s/b", 1);
    run.signal(Signal::TERM);
    let run = run.wait().with(TERMINATED);
    assert_eq!(left_word(&fleet, &run)["open"], json!(["s/c"]));
    assert_eq!(fleet.stored(), ["s/a", "s/b"]);
    fleet.assert_nothing_left();
}

/// A job that waits for its next attempt is not waited for.
#[test]
fn a_retry_does_not_hold_up_the_end() {
    let fleet = Fleet::of(&["s/a"]);
    fleet.server.fault("s/a", Fault::retry_after(429, 3000));
    let run = fleet.start(&["--drain", "3000"]);
    run.wait_for_line("rate-limited s/a");
    run.signal(Signal::TERM);
    let run = run.wait().with(TERMINATED);
    assert_eq!(left_word(&fleet, &run)["open"], json!(["s/a"]));
    fleet.assert_nothing_left();
}

#[test]
fn a_second_signal_ends_at_once() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, TERMINATED),
        (Signal::INT, Signal::TERM, INTERRUPTED),
    ] {
        let fleet = Fleet::of(&["s/a"]);
        fleet.server.fault("s/a", Fault::Hang);
        let run = fleet.start(&["--drain", "3000"]);
        fleet.server.wait_for_requests("s/a", 1);
        run.signal(first);
        run.wait_for_line("a second signal stops at once");
        assert_eq!(fleet.slots().len(), 1);
        // A repeat within a second would be the same signal.
        thread::sleep(Duration::from_millis(1100));
        run.signal(second);
        let run = run.wait().with(code);
        assert_eq!(left_word(&fleet, &run)["open"], json!(["s/a"]));
        fleet.assert_nothing_left();
    }
}

/// GNU `timeout` signals the process and its group within microseconds: the drain goes on.
#[test]
fn a_signal_that_repeats_at_once_is_one_signal() {
    let fleet = Fleet::of(&["s/a"]);
    fleet
        .server
        .fault("s/a", Fault::Latency(Duration::from_secs(1)));
    let run = fleet.start(&["--drain", "100"]);
    fleet.server.wait_for_requests("s/a", 1);
    run.signal(Signal::TERM);
    run.wait_for_line("a second signal stops at once");
    run.signal(Signal::TERM);
    // The job in hand is finished, and no other is open.
    let run = run.wait().with(OK);
    assert_eq!(left_word(&fleet, &run)["closed"], true);
    assert!(!run.stdout.contains("second signal:"), "{}", run.stdout);
}

/// Before the first job there is nothing to drain, whatever hangs: here the store, on which a
/// pipe in a digest's place makes every read wait for ever.
#[test]
fn a_signal_before_the_first_job_writes_nothing() {
    let fleet = Fleet::of(&["s/a"]);
    let folder = fleet.store_folder().join("gitingest/s/a");
    std::fs::create_dir_all(&folder).unwrap();
    let pipe = Command::new("mkfifo")
        .arg(folder.join("summary.txt"))
        .status();
    assert!(pipe.unwrap().success());
    let run = fleet.start(&[]);
    // The last line before the cache is asked.
    run.wait_for_line("\"operation\":\"feed\"");
    run.signal(Signal::TERM);
    let run = run.wait().with(TERMINATED);
    let last = run.log().pop().unwrap();
    assert_eq!(
        last["message"],
        "stopped before the first job; nothing was published"
    );
    assert!(!fleet.store_folder().join("runs").exists());
    fleet.assert_nothing_left();
}
