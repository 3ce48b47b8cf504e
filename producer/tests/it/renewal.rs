//! Runs in which `pushedAt` moved: the stored digest is renewed if HEAD did not move, and made anew
//! otherwise.

use std::fs;

use common::store::DigestMeta;
use serde_json::json;
use testing::git_server::{Fault, RepoStats};
use testing::repositories::Builder;
use testing::s3_server::{ACCESS_KEY, S3Server, SECRET_KEY};

use crate::fleet::{Ended, Fleet, PUSHED, PUSHED_LATER, Running, expected_text};

const REPO: &str = "a/b";

/// A fleet whose store has the digest of [`REPO`] at [`PUSHED`], and whose feed has it at
/// [`PUSHED_LATER`].
fn pushed_since() -> Fleet {
    let fleet = Fleet::of(&[REPO]);
    fleet.run(&[]).with(0);
    fleet.write_feed(&[fleet.entry(REPO, PUSHED_LATER)]);
    fleet
}

/// Requests for refs, and for objects.
fn requests(stats: &RepoStats) -> (u64, u64) {
    (stats.info_refs, stats.upload_packs)
}

/// What a run asked the host for.
fn asked(fleet: &Fleet, run: impl FnOnce() -> Ended) -> (Ended, (u64, u64)) {
    let before = requests(&fleet.server.repo_stats(REPO));
    let ended = run();
    let after = requests(&fleet.server.repo_stats(REPO));
    (ended, (after.0 - before.0, after.1 - before.1))
}

fn moves_head(fleet: &Fleet) {
    fs::remove_dir_all(fleet.repositories().join("a/b.git")).unwrap();
    Builder::new()
        .file("README.md", "# Another commit\n")
        .build(&fleet.repositories(), "a", "b");
}

#[test]
fn a_digest_is_renewed_if_head_has_not_moved() {
    let fleet = pushed_since();
    let before = fleet.digest(REPO).unwrap();
    let (run, asked_for) = asked(&fleet, || fleet.run(&[]).with(0));
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 1 total, 0 cached (0.0%), 1 processed, 0 failed"
    );
    let summary = run.summary();
    for (member, expected) in [
        ("processed", json!(1)),
        ("unmoved", json!(1)),
        ("unchanged", json!(0)),
        ("bytes_stored", json!(0)),
    ] {
        assert_eq!(summary[member], expected, "{member}");
    }
    assert_eq!(fleet.document(&run.run_id(), "summary.json")["unmoved"], 1);
    // The capabilities, and HEAD.
    assert_eq!(asked_for, (1, 1));
    let sent = fleet.server.repo_stats(REPO).bytes_sent;
    let fetched = summary["bytes_fetched"].as_u64().unwrap();
    assert!(fetched > 0 && fetched < sent, "{fetched} of {sent}");

    let after = fleet.digest(REPO).unwrap();
    assert_eq!(after.text, before.text);
    assert_ne!(after.meta.processed_at, before.meta.processed_at);
    assert_eq!(
        after.meta,
        DigestMeta {
            pushed_at: after.meta.pushed_at.clone(),
            processed_at: after.meta.processed_at.clone(),
            run: after.meta.run.clone(),
            ..before.meta
        }
    );
    assert_eq!(after.meta.pushed_at.as_str(), PUSHED_LATER);
    assert_eq!(after.meta.run.as_str(), run.run_id());

    let (third, asked_for) = asked(&fleet, || fleet.run(&[]).with(0));
    assert_eq!(third.summary()["cached"], 1);
    assert_eq!(asked_for, (0, 0));
}

#[test]
fn a_renamed_repository_is_reported_though_its_head_has_not_moved() {
    let fleet = pushed_since();
    let to = fleet.server.repo_url("a", "new-name");
    let git = fleet.repositories().join("a");
    fs::rename(git.join("b.git"), git.join("new-name.git")).unwrap();
    fleet.server.fault(REPO, Fault::Moved { to: to.clone() });
    let run = fleet.run(&[]).with(0);
    assert_eq!(run.summary()["unmoved"], 1);
    let summary = fleet.document(&run.run_id(), "summary.json");
    assert_eq!(summary["renamed"], json!([{"repo": REPO, "to": to}]));
}

#[test]
fn a_digest_is_made_anew_if_head_has_moved() {
    let fleet = pushed_since();
    moves_head(&fleet);
    let (run, (_, posts)) = asked(&fleet, || fleet.run(&[]).with(0));
    assert_eq!(run.summary()["unmoved"], 0);
    assert_eq!(run.summary()["processed"], 1);
    assert!(posts > 0);
    let path = fleet.repositories().join("a/b.git");
    let digest = fleet.digest(REPO).unwrap();
    assert_eq!(digest.text, expected_text(&path, REPO));
    assert!(digest.text.contains("# Another commit"));
    assert_eq!(digest.meta.pushed_at.as_str(), PUSHED_LATER);
}

#[test]
fn a_forced_run_fetches_whatever_head_is() {
    let fleet = pushed_since();
    let (run, (_, posts)) = asked(&fleet, || fleet.run(&["--force"]).with(0));
    assert_eq!(run.summary()["unmoved"], 0);
    assert!(posts > 0);
}

/// Cut short; and with another end, which only the whole text's hash can tell.
#[test]
fn a_text_that_is_not_what_its_record_says_is_made_anew() {
    let fleet = Fleet::new();
    Builder::new()
        .file("long", "line of text\n".repeat(1000))
        .build(&fleet.repositories(), "a", "b");
    fleet.write_feed(&[fleet.entry(REPO, PUSHED)]);
    fleet.run(&[]).with(0);
    let whole = fleet.digest(REPO).unwrap().text;
    let file = fleet.store_folder().join("gitingest/a/b/summary.txt");
    let other_end = format!("{}x", &whole[..whole.len() - 1]);
    for (day, torn) in [(4, &whole[..5000]), (5, &other_end)] {
        fs::write(&file, torn).unwrap();
        fleet.write_feed(&[fleet.entry(REPO, &format!("2026-01-0{day}T00:00:00Z"))]);
        let (run, (_, posts)) = asked(&fleet, || fleet.run(&[]).with(0));
        assert_eq!(run.summary()["unmoved"], 0);
        assert_eq!(run.summary()["processed"], 1);
        assert!(posts > 0);
        assert_eq!(fleet.digest(REPO).unwrap().text, whole);
    }
}

/// The same on a bucket, of which the next run's index knows.
#[test]
fn an_object_is_renewed_and_known_to_the_index() {
    let fleet = Fleet::of(&[REPO]);
    let server = S3Server::start();
    let run = || {
        let mut command = fleet.producer(&["--store", "s3://digests"]);
        command
            .env("AWS_ENDPOINT_URL", server.url())
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        Running::start(&mut command).wait().with(0)
    };
    const KEY: &str = "gitingest/a/b/summary.txt";
    run();
    let before = server.objects()[KEY].clone();
    fleet.write_feed(&[fleet.entry(REPO, PUSHED_LATER)]);
    let (renewing, asked_for) = asked(&fleet, run);
    assert_eq!(renewing.summary()["unmoved"], 1);
    // The capabilities, and HEAD.
    assert_eq!(asked_for, (1, 1));
    let after = server.objects()[KEY].clone();
    assert_eq!(after.content, before.content);
    assert_eq!(after.content_type, before.content_type);
    assert_eq!(after.metadata["pushedat"], PUSHED_LATER);
    assert_eq!(after.metadata["run"], renewing.run_id());
    for name in ["url", "commit", "format", "truncated", "bytes"] {
        assert_eq!(after.metadata[name], before.metadata[name], "{name}");
    }

    server.forget_calls();
    assert_eq!(run().summary()["cached"], 1);
    assert_eq!(server.calls("HEAD"), 0);
}
