//! Whole runs of the real binary on a store in a bucket.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::exit;
use serde_json::Value;
use testing::http_server::{HttpServer, Response};
use testing::s3_server::{ACCESS_KEY, Fate, S3Server, SECRET_KEY};

use crate::fleet::{Ended, Fleet, PUSHED, PUSHED_LATER, Running, bare_producer};

/// `producer run` with the usual variables.
fn producer(fleet: &Fleet, server: &S3Server, arguments: &[&str]) -> Command {
    let mut command = fleet.producer(&[&["--store", "s3://digests"], arguments].concat());
    command
        .env("AWS_ENDPOINT_URL", server.url())
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
    command
}

fn run(command: &mut Command) -> Ended {
    let run = Running::start(command).wait();
    assert!(!run.stdout.contains(SECRET_KEY) && !run.stderr.contains(SECRET_KEY));
    run
}

fn counts(run: &Ended) -> [u64; 3] {
    let log = run.log();
    let last = &log.last().expect("a log")["context"]["metadata"];
    ["cached", "processed", "failed"].map(|name| last[name].as_u64().unwrap())
}

#[test]
fn a_run_fills_the_bucket_and_the_next_finds_it_full() {
    let fleet = Fleet::of(&["a/b", "a/c", "d/e"]);
    let server = S3Server::start();
    let dry = run(&mut producer(&fleet, &server, &["--dry-run"])).with(exit::OK);
    assert!(server.objects().is_empty(), "{}", dry.stdout);

    let first = run(&mut producer(&fleet, &server, &[])).with(exit::OK);
    assert_eq!(counts(&first), [0, 3, 0]);
    let objects = server.objects();
    let digest = &objects["gitingest/a/b/summary.txt"];
    assert!(String::from_utf8_lossy(&digest.content).contains("# a/b\n"));
    assert_eq!(digest.metadata["pushedat"], PUSHED);
    let documents: Vec<_> = objects
        .keys()
        .filter(|key| key.starts_with("runs/"))
        .collect();
    // Jobs, manifest, summary, which run was begun last, which closed last and before, feed and index.
    assert_eq!(documents.len(), 9, "{documents:?}");
    for document in documents.into_iter().filter(|key| key.ends_with(".json")) {
        let content: Value = serde_json::from_slice(&objects[document].content).unwrap();
        assert!(content.is_object(), "{document}");
    }

    // The run itself learned what it stored.
    server.forget_calls();
    let second = run(&mut producer(&fleet, &server, &[])).with(exit::OK);
    assert_eq!(counts(&second), [3, 0, 0]);
    assert_eq!(server.calls("HEAD"), 0);

    fleet.write_feed(&[
        fleet.entry("a/b", PUSHED),
        fleet.entry("a/c", PUSHED_LATER),
        fleet.entry("d/e", PUSHED),
    ]);
    let third = run(&mut producer(&fleet, &server, &[])).with(exit::OK);
    assert_eq!(counts(&third), [2, 1, 0]);
    let metadata = &server.objects()["gitingest/a/c/summary.txt"].metadata;
    assert_eq!(metadata["pushedat"], PUSHED_LATER);
    let by_looking = run(&mut producer(&fleet, &server, &["--check", "head"])).with(exit::OK);
    assert_eq!(counts(&by_looking), [3, 0, 0]);
}

#[test]
fn the_predecessors_variables_are_enough() {
    let fleet = Fleet::of(&["a/b"]);
    let server = S3Server::start();
    let mut arguments = fleet.arguments(&[]);
    let store = arguments.iter().position(|a| a == "--store").unwrap();
    arguments.drain(store..store + 2);
    let variables = [
        ("STORE_URL", ""),
        // Of some other program on this machine.
        ("AWS_REGION", "eu-west-2"),
        ("R2_BUCKET", "digests"),
        ("R2_ENDPOINT", &server.url()),
        ("R2_ACCESS_KEY", ACCESS_KEY),
        ("R2_SECRET_KEY", SECRET_KEY),
    ];
    let mut command = bare_producer();
    command.arg("run").args(&arguments).envs(variables);
    run(&mut command).with(exit::OK);
    assert!(server.objects().contains_key("gitingest/a/b/summary.txt"));
    assert!(!server.objects().keys().any(|key| key.contains("probe")));

    let missing = run(command.env("R2_BUCKET", "").env_remove("R2_SECRET_KEY")).with(exit::USAGE);
    assert!(
        missing.stderr.contains("R2_BUCKET, R2_SECRET_KEY"),
        "{}",
        missing.stderr
    );
}

#[test]
fn secrets_come_from_files_too() {
    let fleet = Fleet::of(&["a/b"]);
    let server = S3Server::start();
    let file = fleet.scratch_folder().join("secret");
    fs::write(&file, format!("{SECRET_KEY}\n")).unwrap();
    let mut command = producer(&fleet, &server, &[]);
    command.env("AWS_SECRET_ACCESS_KEY_FILE", &file);
    let both = run(&mut command).with(exit::USAGE);
    let why = "error: AWS_SECRET_ACCESS_KEY and AWS_SECRET_ACCESS_KEY_FILE are both set";
    assert!(both.stderr.starts_with(why), "{}", both.stderr);
    let of_file = run(command.env("AWS_SECRET_ACCESS_KEY", "")).with(exit::OK);
    assert_eq!(counts(&of_file), [0, 1, 0]);
    fs::remove_file(&file).unwrap();
    let missing = run(&mut command).with(exit::USAGE);
    let why = format!(
        "error: AWS_SECRET_ACCESS_KEY_FILE={}: cannot read",
        file.display()
    );
    assert!(missing.stderr.starts_with(&why), "{}", missing.stderr);
}

/// Without keys in the environment, the sources of AWS's SDKs are asked in their order.
#[test]
fn credentials_come_from_where_the_sdk_finds_them() {
    let fleet = Fleet::of(&["a/b"]);
    let server = S3Server::start();
    let without_keys = || {
        let mut command = producer(&fleet, &server, &["--force"]);
        command
            .env_remove("AWS_ACCESS_KEY_ID")
            .env_remove("AWS_SECRET_ACCESS_KEY")
            .env("HOME", fleet.scratch_folder())
            .env("AWS_EC2_METADATA_DISABLED", "true");
        command
    };
    let none = run(&mut without_keys()).with(exit::UNAVAILABLE);
    for part in ["no credentials", "set AWS_ACCESS_KEY_ID"] {
        assert!(none.stderr.contains(part), "{}", none.stderr);
    }

    let profile = fleet.scratch_folder().join("credentials");
    let keys = format!("aws_access_key_id={ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n");
    fs::write(&profile, format!("[default]\n{keys}")).unwrap();
    let by_profile = run(without_keys().env("AWS_SHARED_CREDENTIALS_FILE", &profile));
    assert_eq!(counts(&by_profile.with(exit::OK)), [0, 1, 0]);

    // As ECS and EKS serve them.
    let body = format!(
        r#"{{"AccessKeyId":"{ACCESS_KEY}","SecretAccessKey":"{SECRET_KEY}","Token":"t","Expiration":"2100-01-01T00:00:00Z"}}"#
    );
    let container = HttpServer::start(move |_| Response::new(200, body.clone()));
    let uri = format!("{}/credentials", container.url());
    let by_container = run(without_keys().env("AWS_CONTAINER_CREDENTIALS_FULL_URI", uri));
    assert_eq!(counts(&by_container.with(exit::OK)), [0, 1, 0]);
}

#[test]
fn a_bucket_that_does_not_let_us_in_ends_the_run_before_its_first_job() {
    let fleet = Fleet::of(&["a/b"]);
    let server = S3Server::start();
    let mut command = producer(&fleet, &server, &[]);
    let run = run(command.env("AWS_SECRET_ACCESS_KEY", "wrong")).with(exit::UNAVAILABLE);
    for part in ["s3://digests", &server.url(), "AWS_SECRET_ACCESS_KEY"] {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    assert_eq!(fleet.server.connections(), 0, "nothing was fetched");
}

/// The fault of a store is nobody else's: work goes on by itself when it is over.
#[test]
fn a_bucket_that_is_ill_for_a_while_costs_no_repository() {
    let fleet = Fleet::of(&["a/b", "a/c", "d/e"]);
    let server = S3Server::start();
    // The first eight: that is more than the SDK tries on its own.
    let mut left = 8;
    server.decide(move |call| {
        if left > 0 && call.method == "PUT" && call.key.starts_with("gitingest/") {
            left -= 1;
            return Fate::Denied(503, "SlowDown");
        }
        Fate::Answered
    });
    let run = run(&mut producer(&fleet, &server, &[])).with(exit::OK);
    assert_eq!(counts(&run), [0, 3, 0]);
}

/// A run on a bucket whose server refuses to write digests, and nothing else, as long as `refuses`.
fn run_refused(fleet: &Fleet, server: &S3Server, refuses: &Arc<AtomicBool>) -> Running {
    let refuses = Arc::clone(refuses);
    server.decide(move |call| {
        let of_digest = call.method == "PUT" && call.key.starts_with("gitingest/");
        match of_digest && refuses.load(Ordering::SeqCst) {
            true => Fate::Denied(403, "AccessDenied"),
            false => Fate::Answered,
        }
    });
    let mut command = producer(fleet, server, &["--patience", "12s", "--concurrency", "2"]);
    Running::start(&mut command)
}

/// How often each repository was asked for its refs and for its pack.
fn fetches(fleet: &Fleet) -> Vec<(u64, u64)> {
    let stats = fleet.server.stats();
    stats
        .values()
        .map(|s| (s.info_refs, s.upload_packs))
        .collect()
}

/// Health is judged by what failed: a probe elsewhere in the bucket would find all well.
#[test]
fn a_store_that_takes_everything_but_digests_is_not_well() {
    let fleet = Fleet::of(&["a/b", "a/c", "a/d", "a/e"]);
    let (server, refuses) = (S3Server::start(), Arc::new(AtomicBool::new(true)));
    let ended = run_refused(&fleet, &server, &refuses).wait().with(69);
    assert!(ended.stdout.contains("AccessDenied") || ended.stdout.contains("access denied"));
    // The two in hand, and none of them again.
    assert_eq!(fetches(&fleet), [(1, 2), (1, 2)]);
}

#[test]
fn a_finished_digest_is_offered_again_and_not_made_again() {
    let fleet = Fleet::of(&["a/b", "a/c", "a/d", "a/e"]);
    let (server, refuses) = (S3Server::start(), Arc::new(AtomicBool::new(true)));
    let run = run_refused(&fleet, &server, &refuses);
    run.wait_for_line("not a repository's fault");
    refuses.store(false, Ordering::SeqCst);
    let ended = run.wait().with(0);
    assert_eq!(ended.summary()["processed"], 4);
    assert_eq!(fetches(&fleet), [(1, 2); 4]);
}
