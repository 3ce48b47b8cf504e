//! The exit codes that a scheduler acts on, and what is said with each.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use common::exit::{BAD_FEED, BUSY, OK, TERMINATED, TOO_MANY_FAILED, UNAVAILABLE, USAGE};
use rustix::process::{Signal, geteuid};
use serde_json::json;
use testing::git_server::Fault;
use testing::http_server::{HttpServer, Response};

use crate::fleet::{
    Ended, Fleet, Running, bare_producer, files_below, in_clean_environment, names_in,
};

/// What a run says that cannot go on: once for people, once in the log.
#[track_caller]
fn assert_says(run: &Ended, parts: &[&str]) {
    for part in parts {
        assert!(run.stderr.contains(part), "{part:?} in {}", run.stderr);
    }
    let last = run.log().pop().expect("a log");
    assert_eq!(last["level"], "error", "{last}");
    assert_eq!(last["context"]["operation"], "exit", "{last}");
    assert_eq!(last["context"]["metadata"]["exit_code"], run.code());
    let message = last["message"].as_str().unwrap();
    assert_eq!(run.stderr, format!("error: {message}\n"));
}

#[test]
fn a_wrong_command_line_is_2_and_says_what_is_wrong() {
    for (arguments, part) in [
        (&["run", "--no-such-flag"][..], "--no-such-flag"),
        (&["run", "--only", "alphagov"], "alphagov/*"),
        (&["run", "--only", "a/["], "a/["),
        (&["run", "--limit=-1"], "--limit"),
        (&["run", "--concurrency", "0"], "--concurrency"),
        (&["run", "--max-failures", "120%"], "such as 20%"),
        (&["run", "--max-failures=-1"], "a number of repositories"),
        (&["run", "--cache", "api"], "--cache-url"),
        (&["run", "--feed", "ftp://example.org/x"], "https"),
        (&["run", "--allow-host", "https://x"], "HOST"),
        (&["run", "--metrics-addr", "here"], "--metrics-addr"),
        (&["run", "--log-level", "=,="], "--log-level"),
        (&["run", "--log-level", "inof"], "no such level"),
        (&["run", "--allow-host", "*.example.org"], "wildcards"),
        (&["run", "--store", "s3:bucket"], "s3://bucket"),
        (
            &["run", "--store", "s3://key:hunter2@bucket"],
            "s3://BUCKET[/PREFIX]",
        ),
        (&["run", "--store", "gs://key:hunter2@bucket"], "gs://…"),
        (&["run", "--store", "s3://bucket"], "AWS_ENDPOINT_URL"),
        (&["run", "--store", "${STORE}"], "Docker"),
        (
            &["run", "--feed", "http://example.org/repos.json"],
            "--allow-http-feed",
        ),
        (&[], "Usage"),
        (&["walk"], "walk"),
    ] {
        let run = Running::start(bare_producer().args(arguments)).wait();
        let run = run.with(USAGE);
        assert!(run.stderr.contains(part), "{part:?} in {}", run.stderr);
        assert!(!run.stderr.contains("hunter2"));
    }
}

#[test]
fn a_wrong_value_is_said_to_be_a_variables_where_it_is() {
    for (name, arguments, named) in [
        ("LIMIT", &["run"][..], true),
        ("TIMEOUT", &["run"], true),
        ("LIMIT", &["run", "--limit", "x"], false),
        ("LIMIT", &["run", "--limit=x"], false),
        ("LOG_FORMAT", &["status"], true),
    ] {
        let mut command = bare_producer();
        let run = Running::start(command.args(arguments).env(name, "abc")).wait();
        let run = run.with(USAGE);
        let said = format!("comes from the environment variable {name}.");
        assert_eq!(run.stderr.contains(&said), named, "{name}: {}", run.stderr);
    }
}

/// A compose file that passes on what is not set sets it to nothing; and everybody writes `1`.
#[test]
fn the_environment_is_read_as_schedulers_set_it() {
    let fleet = Fleet::of(&["a/b"]);
    fleet.run(&[]).with(OK);
    let mut command = fleet.producer(&[]);
    for name in [
        "LIMIT",
        "ONLY",
        "EXCLUDE",
        "CONCURRENCY",
        "METRICS_ADDR",
        "CACHE_URL",
        "CONTACT",
        "LOG_LEVEL",
        "LOG_FORMAT",
        "FORCE",
        "GITHUB_TOKEN",
    ] {
        command.env(name, "");
    }
    let run = Running::start(&mut command).wait().with(OK);
    assert_eq!(run.summary()["cached"], 1);

    let mut command = fleet.producer(&[]);
    command.env("FORCE", "1").env("SKIP_ARCHIVED", "no");
    command.env("ONLY", "a/* b/*").env("LOG_FORMAT", "json");
    let run = Running::start(&mut command).wait().with(OK);
    assert_eq!(run.summary()["processed"], 1);

    let mut command = fleet.producer(&[]);
    command.env("FORCE", "perhaps");
    let run = Running::start(&mut command).wait().with(USAGE);
    assert!(run.stderr.contains("--force"), "{}", run.stderr);
}

#[test]
fn help_says_what_a_newcomer_needs() {
    for (arguments, parts) in [
        (
            &["--help"][..],
            &[
                "Exit codes:",
                "\n  0 ",
                "\n  3 ",
                "\n  65 ",
                "\n  69 ",
                "\n  75 ",
                "\n  130 ",
                "GITHUB_TOKEN",
            ][..],
        ),
        (
            &["run", "--help"],
            &[
                "Examples:",
                "--limit 20",
                "[env: LIMIT=]",
                "--dry-run",
                "Feed:",
                "Stopping:",
            ],
        ),
        (&["--version"], &[env!("CARGO_PKG_VERSION")]),
    ] {
        let help = Running::start(bare_producer().args(arguments)).wait();
        let help = help.with(OK);
        for part in parts {
            assert!(help.stdout.contains(part), "{part:?} in {}", help.stdout);
        }
    }
}

/// No feed, no run: nothing is touched, and what was found instead is said.
#[test]
fn what_is_no_feed_is_65_and_nothing_is_touched() {
    let fleet = Fleet::new();
    let whole = r#"[{"owner":"a","name":"b"}]"#;
    let huge = format!("[{}]", "null,".repeat(3000));
    let whole_length = whole.len().to_string();
    let cases = [
        ("<!DOCTYPE html><title>Moved</title>", "JSON array", "9999"),
        (r#"{"repos":[]}"#, "JSON array", "9999"),
        ("", "JSON array", "9999"),
        (&whole[..20], "JSON array", "9999"),
        (&huge, "--max-feed-bytes", "9999"),
        (&format!("{whole} "), "--max-feed-bytes", &whole_length),
    ];
    for (content, part, most) in cases {
        fs::write(fleet.feed_file(), content).unwrap();
        let body = content.to_owned();
        let server = HttpServer::start(move |_| Response::new(200, body.clone()));
        let feeds = [fleet.feed_file().display().to_string(), server.url()];
        for feed in feeds {
            let run = fleet.run(&["--feed", &feed, "--max-feed-bytes", most]);
            let run = run.with(BAD_FEED);
            assert_says(&run, &[part, &feed]);
        }
    }
    assert_eq!(names_in(fleet.path()), ["git", "repos.json", "scratch"]);
    assert_eq!(names_in(&fleet.scratch_folder()), [""; 0]);

    // What was there before stays: a folder, and a folder with something in it.
    let store = fleet.store_folder();
    let deep = store.join("a/b/c");
    fs::write(fleet.feed_file(), "no feed").unwrap();
    for made in [store.join("a/b"), store.clone(), deep.join("runs")] {
        fs::create_dir_all(&made).unwrap();
        let run = fleet.run(&["--store", deep.to_str().unwrap()]);
        run.with(BAD_FEED);
        assert!(made.is_dir());
        assert_eq!(names_in(&made), [""; 0]);
        assert_eq!(files_below(&store).len(), 0);
        fs::remove_dir_all(&store).unwrap();
    }
}

#[test]
fn a_feed_that_cannot_be_had_is_69() {
    let fleet = Fleet::new();
    let run = fleet
        .run(&["--feed", "no/such/file.json"])
        .with(UNAVAILABLE);
    assert_says(&run, &["no/such/file.json", "--feed"]);

    // Where nobody ever listens.
    let address = "127.0.0.1:1";
    let other = Fleet::new();
    let refused = other.start(&["--feed", &format!("http://{address}/repos.json")]);
    let broken = HttpServer::start(|_| Response::new(500, "down for maintenance"));
    let run = fleet.run(&["--feed", &broken.url()]).with(UNAVAILABLE);
    assert_says(
        &run,
        &["Failed to fetch repos.json after 3 attempts", "500"],
    );
    assert_eq!(broken.request_count(), 3);
    let retries = run.messages("retry");
    assert!(retries[0].contains("attempt 1 of 3") && retries[0].contains("again in 1 s"));
    assert!(retries[1].contains("attempt 2 of 3") && retries[1].contains("again in 2 s"));
    assert_eq!(retries.len(), 2);
    let refused = refused.wait().with(UNAVAILABLE);
    assert_says(&refused, &[address, "refused"]);

    let gone = HttpServer::start(|_| Response::new(404, "no"));
    let run = fleet.run(&["--feed", &gone.url()]).with(UNAVAILABLE);
    assert_says(&run, &["404", "--feed"]);
    assert_eq!(gone.request_count(), 1);
    assert_eq!(names_in(fleet.path()), ["git", "repos.json", "scratch"]);
}

/// `command` as a user for whom permissions hold, which for root they do not.
fn obeying_permissions(command: &Command) -> Command {
    let mut obeying = if geteuid().is_root() {
        let mut setpriv = Command::new("setpriv");
        let less = "-dac_override,-dac_read_search";
        setpriv
            .args(["--inh-caps", less, "--bounding-set", less])
            .arg(command.get_program());
        setpriv
    } else {
        Command::new(command.get_program())
    };
    obeying.args(command.get_args());
    in_clean_environment(obeying)
}

#[test]
fn a_store_that_cannot_be_written_is_69() {
    let fleet = Fleet::of(&["a/b"]);
    let store = fleet.store_folder();
    fs::create_dir(&store).unwrap();
    fs::set_permissions(&store, fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = obeying_permissions(&fleet.producer(&[]));
    let run = Running::start(&mut command).wait().with(UNAVAILABLE);
    let path = store.display().to_string();
    assert_says(&run, &[&path, "Permission denied", "--store"]);
    assert_eq!(files_below(&store).len(), 0);
    // A dry run writes nothing, so it needs no right to.
    let mut command = obeying_permissions(&fleet.producer(&["--dry-run"]));
    Running::start(&mut command).wait().with(OK);

    // Not to be read either: then the cache cannot be asked.
    let set_mode = |mode| fs::set_permissions(&store, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o755);
    fs::create_dir(store.join("gitingest")).unwrap();
    set_mode(0o000);
    let mut command = obeying_permissions(&fleet.producer(&[]));
    let run = Running::start(&mut command).wait().with(UNAVAILABLE);
    assert_says(&run, &[&path, "Permission denied", "--store"]);
    set_mode(0o755);
    fs::remove_dir_all(&store).unwrap();

    fs::write(&store, "a file").unwrap();
    let run = fleet.run(&[]).with(UNAVAILABLE);
    assert_says(&run, &[&path, "--store"]);
    // The store's own words, as it is the store that makes its folder.
    let below = store.join("folder").display().to_string();
    let below = fleet.run(&["--store", &below]).with(UNAVAILABLE);
    assert_says(&below, &["store: cannot create", &path, "--store"]);
    assert_eq!(fs::read_to_string(&store).unwrap(), "a file");
    assert_eq!(fleet.requests(), 0);
}

#[test]
fn a_scratch_folder_that_cannot_be_written_is_69() {
    let fleet = Fleet::of(&["a/b"]);
    let scratch = fleet.path().join("repos.json");
    let path = scratch.to_str().unwrap();
    let run = fleet.run(&["--scratch", path]).with(UNAVAILABLE);
    assert_says(&run, &[path, "--scratch"]);
    // A run that could not begin leaves no word of itself.
    assert_eq!(names_in(fleet.path()), ["git", "repos.json", "scratch"]);
}

/// Two runs on one store would do everything twice.
#[test]
fn a_second_run_on_a_store_is_75() {
    let fleet = Fleet::of(&["a/b"]);
    fleet.server.fault("a/b", Fault::Hang);
    let first = fleet.start(&["--drain", "0"]);
    fleet.server.wait_for_requests("a/b", 1);
    let requests = fleet.requests();
    // Told at once: it need not wait for a feed, nor find its metrics' address taken.
    let feed = HttpServer::start(|_| Response::hang());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let second = fleet.run(&["--feed", &feed.url(), "--metrics-addr", &address]);
    let second = second.with(BUSY);
    let store = fleet.store_folder().display().to_string();
    assert_says(&second, &["another run", &store]);
    assert_eq!(feed.request_count(), 0);
    assert_eq!(fleet.requests(), requests);
    // To look on is allowed.
    fleet.run(&["--dry-run"]).with(OK);
    // The first goes on undisturbed.
    first.signal(Signal::TERM);
    let first = first.wait().with(TERMINATED);
    assert_eq!(first.summary()["closed"], false);
    let runs = names_in(&fleet.store_folder().join("runs"));
    let documents = ["feed.json".to_owned(), "latest.json".to_owned()];
    assert_eq!(runs[0], first.run_id());
    assert_eq!(runs[1..], documents);
}

/// An empty feed, or one without a usable entry, is a mistake until the operator says otherwise.
#[test]
fn a_feed_without_a_usable_entry_is_65_and_names_the_first_reasons() {
    let fleet = Fleet::new();
    let run = fleet.run(&[]).with(BAD_FEED);
    assert_says(&run, &["is empty", "--feed", "--allow-empty-feed"]);
    let run = fleet.run(&["--allow-empty-feed"]).with(OK);
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 0 total, 0 cached (0.0%), 0 processed, 0 failed"
    );
    fs::remove_dir_all(fleet.store_folder()).unwrap();

    let unusable = json!({"owner": "a", "name": "b", "pushedAt": "yesterday"});
    fleet.write_feed(&[json!("x"), unusable.clone(), json!(1), json!({})]);
    let run = fleet.run(&[]).with(BAD_FEED);
    let parts = [
        "entry 0: not an object",
        "entry 1: ",
        "entry 2: ",
        "and 1 more",
    ];
    assert_says(&run, &parts);
    assert!(!run.stderr.contains("entry 3"), "{}", run.stderr);
    assert!(!fleet.store_folder().exists());
    fleet.run(&["--allow-empty-feed"]).with(TOO_MANY_FAILED);

    // What the filters leave out is not counted.
    fleet.small_repository("octocat/here");
    let mut entries = fleet.entries(&["octocat/here"]);
    entries.extend([unusable, json!({})]);
    fleet.write_feed(&entries);
    for (arguments, total, failed) in [
        (&["--limit", "0"][..], 0, 0),
        (&["--limit", "1"], 1, 0),
        (&["--only", "octocat/*"], 1, 0),
        (&["--exclude", "a/b"], 2, 1),
        (&["--only", "a/*"], 1, 1),
        (&["--exclude", "octocat/*"], 2, 2),
        (&[], 3, 2),
    ] {
        let run = fleet.run(&[&["--force", "--max-failures", "100%"], arguments].concat());
        let summary = run.with(OK).summary();
        assert_eq!(
            (&summary["total_repos"], &summary["failed"]),
            (&json!(total), &json!(failed)),
            "{arguments:?}"
        );
    }
}

/// A run that closes says by its exit code whether much failed.
#[test]
fn more_failed_than_allowed_is_3() {
    let fleet = Fleet::of(&["is/here"]);
    fleet.write_feed(&fleet.entries(&["is/here", "no/where", "no/how"]));
    for (limit, code) in [
        (None, TOO_MANY_FAILED),
        (Some("66%"), TOO_MANY_FAILED),
        (Some("1"), TOO_MANY_FAILED),
        (Some("67%"), OK),
        (Some("2"), OK),
        (Some("100%"), OK),
    ] {
        let mut command = fleet.producer(&["--force"]);
        command.envs(limit.map(|limit| ("MAX_FAILURES", limit)));
        let run = Running::start(&mut command).wait().with(code);
        assert_eq!(
            run.sentence(),
            "Pipeline complete: 3 total, 0 cached (0.0%), 1 processed, 2 failed"
        );
        let said = run.messages("max-failures");
        assert_eq!(said.len(), usize::from(code != OK), "{said:?}");
        if limit.is_none() {
            let expected =
                "2 of 3 attempted repositories failed, more than --max-failures 20% allows";
            assert_eq!(said[0], expected);
        }
    }
    // Cached repositories were not attempted, nor were those that are known to fail.
    let again = ["--max-failures", "67%", "--retry-failed"];
    fleet.run(&again).with(TOO_MANY_FAILED);
    fleet.run(&["--max-failures", "0"]).with(OK);
}
