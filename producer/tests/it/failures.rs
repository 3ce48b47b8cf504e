//! Failures that are facts of a push are not paid for again.

use std::fs;
use std::path::PathBuf;

use common::exit::{OK, TOO_MANY_FAILED};
use serde_json::{Value, json};
use testing::git_server::Fault;
use testing::repositories::Builder;
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};

use crate::fleet::{Ended, Fleet, PUSHED, PUSHED_LATER, failures};

const LARGE: &str = "a/large";
/// Too little for [`LARGE`].
const LIMIT: [&str; 2] = ["--max-fetch-bytes", "100KiB"];

/// A fleet with a repository that is over [`LIMIT`], and one that is not.
fn with_large() -> Fleet {
    let fleet = Fleet::of(&["a/small"]);
    let mut random = fastrand::Rng::with_seed(7);
    let noise: Vec<u8> = (0..400_000).map(|_| random.u8(..)).collect();
    Builder::new()
        .file("noise", noise)
        .build(&fleet.repositories(), "a", "large");
    fleet.write_feed(&fleet.entries(&["a/small", LARGE]));
    fleet
}

fn document(fleet: &Fleet) -> PathBuf {
    fleet.store_folder().join("runs/failures.json")
}

/// A run with [`LIMIT`], and how often it asked for `repo`.
fn run(fleet: &Fleet, repo: &str, arguments: &[&str]) -> (Ended, u64) {
    let before = fleet.server.repo_stats(repo).info_refs;
    let run = fleet.run(&[&LIMIT[..], arguments].concat());
    (run, fleet.server.repo_stats(repo).info_refs - before)
}

#[test]
fn what_is_too_large_is_not_tried_again_at_the_same_push() {
    let fleet = with_large();
    let (first, asked) = run(&fleet, LARGE, &[]);
    let first = first.with(TOO_MANY_FAILED);
    assert_eq!(asked, 1);
    let of_run = fleet.document(&first.run_id(), "summary.json");
    let [("a/large", "too_large", why)] = failures(&of_run)[..] else {
        panic!("{of_run}");
    };

    let (second, asked) = run(&fleet, LARGE, &["--max-failures", "0", "--explain"]);
    let second = second.with(OK);
    assert_eq!(asked, 0);
    assert_eq!(
        second.sentence(),
        "Pipeline complete: 2 total, 1 cached (50.0%), 0 processed, 1 failed"
    );
    assert_eq!(
        second.messages("cache-check")[0],
        "Cache check: 1 hit, 1 failed_before"
    );
    let summary = second.summary();
    assert_eq!(
        (&summary["failed"], &summary["failed_before"]),
        (&json!(1), &json!(1))
    );
    let explained = second.messages("explain");
    assert!(
        explained[1].starts_with("a/large: failed_before (too_large: "),
        "{explained:?}"
    );
    // No worker has named it in this run.
    let listed = second.messages("failed-repository");
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(
        listed[0].starts_with("Failed: a/large (too_large): "),
        "{listed:?}"
    );
    let of_run = fleet.document(&second.run_id(), "summary.json");
    let [("a/large", "too_large", remembered)] = failures(&of_run)[..] else {
        panic!("{of_run}");
    };
    assert!(
        remembered.starts_with(why) && remembered.contains("--retry-failed"),
        "{remembered}"
    );
    let manifest = fleet.document(&second.run_id(), "manifest.json");
    assert_eq!(manifest["reasons"]["failed_before"], 1);

    // Another push is another fact.
    fleet.write_feed(&[
        fleet.entry("a/small", PUSHED),
        fleet.entry(LARGE, PUSHED_LATER),
    ]);
    let (third, asked) = run(&fleet, LARGE, &[]);
    third.with(TOO_MANY_FAILED);
    assert_eq!(asked, 1);
    let (fourth, asked) = run(&fleet, LARGE, &[]);
    fourth.with(OK);
    assert_eq!(asked, 0);
}

#[test]
fn it_is_tried_again_if_somebody_says_so() {
    for option in ["--retry-failed", "--force"] {
        let fleet = with_large();
        run(&fleet, LARGE, &[]).0.with(TOO_MANY_FAILED);
        let (again, asked) = run(&fleet, LARGE, &[option, "--max-failures", "100%"]);
        assert_eq!(again.with(OK).summary()["failed_before"], 0);
        assert_eq!(asked, 1, "{option}");

        // With more room it is made, and forgotten.
        let done = fleet.run(&[option]).with(OK);
        assert_eq!(done.summary()["failed"], 0);
        let known: Value = serde_json::from_slice(&fs::read(document(&fleet)).unwrap()).unwrap();
        assert_eq!(known, json!({"version": 1, "failures": []}));
        fs::remove_dir_all(fleet.store_folder().join("gitingest/a/large")).unwrap();
        let (again, asked) = run(&fleet, LARGE, &[]);
        again.with(TOO_MANY_FAILED);
        assert_eq!(asked, 1);
    }
}

/// What is gone comes back seldom, what is refused or torn may do so at any time.
#[test]
fn what_is_gone_is_believed_for_a_week() {
    let fleet = Fleet::of(&["a/gone", "a/refused"]);
    let elsewhere = json!({
        "owner": "a", "name": "refused", "url": "https://git.invalid/a/refused", "pushedAt": PUSHED,
    });
    fleet.write_feed(&[fleet.entry("a/gone", PUSHED), elsewhere]);
    fleet.server.fault("a/gone", Fault::status(404));
    let lenient = ["--max-failures", "100%"];
    run(&fleet, "a/gone", &lenient).0.with(OK);
    let (second, asked) = run(&fleet, "a/gone", &lenient);
    let reasons = &second.with(OK).messages("cache-check")[0];
    assert_eq!(reasons, "Cache check: 1 miss, 1 failed_before");
    assert_eq!(asked, 0);

    let known = fs::read_to_string(document(&fleet)).unwrap();
    let mut aged: Value = serde_json::from_str(&known).unwrap();
    for (days, expected) in [(6, 0), (8, 1)] {
        let failed_at = OffsetDateTime::now_utc() - Duration::days(days);
        aged["failures"][0]["failedAt"] = json!(failed_at.format(&Rfc3339).unwrap());
        fs::write(document(&fleet), aged.to_string()).unwrap();
        let (_, asked) = run(&fleet, "a/gone", &lenient);
        assert_eq!(asked, expected, "{days} days");
    }
    for torn in [
        &known[..known.len() / 2],
        r#"{"version":2,"failures":[]}"#,
        "",
    ] {
        fs::write(document(&fleet), torn).unwrap();
        let (again, asked) = run(&fleet, "a/gone", &lenient);
        assert_eq!(asked, 1, "{torn}");
        let again = again.with(OK);
        let said = again.messages("cache-check");
        assert!(
            said.iter().any(|line| line.contains("runs/failures.json")),
            "{said:?}"
        );
    }
    // That run remembered it anew.
    assert_eq!(run(&fleet, "a/gone", &lenient).1, 0);
}
