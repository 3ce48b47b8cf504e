//! What readers find beside the digests, and what leaves.

use std::fs;
use std::io::Read;
use std::process::Command;

use flate2::read::GzDecoder;
use serde_json::Value;

use crate::fleet::{Ended, Fleet, PUSHED, PUSHED_LATER, Running, bare_producer};

const SOON: [&str; 2] = ["--withdraw-after", "0s"];

/// The catalogue's lines, by id.
fn lines(fleet: &Fleet) -> Vec<Value> {
    let file = fs::File::open(fleet.store_folder().join("catalog.jsonl.gz")).unwrap();
    let mut text = String::new();
    GzDecoder::new(file).read_to_string(&mut text).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// `id state`, a line each.
fn states(fleet: &Fleet) -> Vec<String> {
    let states = lines(fleet).into_iter().map(|line| {
        let text = |name: &str| line[name].as_str().unwrap().to_owned();
        format!("{} {}", text("id"), text("state"))
    });
    states.collect()
}

/// `id what`, newest first.
fn changes(fleet: &Fleet) -> Vec<String> {
    let file = fs::read_to_string(fleet.store_folder().join("changes.csv")).unwrap();
    let rows = file.lines().skip(1).map(|row| {
        let (_, change) = row.split_once(',').unwrap();
        change.replace(',', " ")
    });
    rows.collect()
}

fn page(fleet: &Fleet, name: &str) -> String {
    fs::read_to_string(fleet.store_folder().join(name)).unwrap()
}

/// Another of the producer's commands on the fleet's store.
fn command(fleet: &Fleet, arguments: &[&str]) -> Command {
    let mut command = bare_producer();
    command
        .args(arguments)
        .arg("--store")
        .arg(fleet.store_folder());
    command
}

fn done(fleet: &Fleet, arguments: &[&str], code: u8) -> Ended {
    Running::start(&mut command(fleet, arguments))
        .wait()
        .with(code)
}

#[test]
fn a_run_that_closes_leaves_a_catalogue() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    let mut entries = fleet.entries(&["a/b", "a/c", "a/gone"]);
    entries.push(serde_json::json!({"owner": "a", "name": "invalid"}));
    fleet.write_feed(&entries);
    let run = fleet.run(&["--max-failures", "100%"]).with(0);
    assert_eq!(
        states(&fleet),
        ["a/b current", "a/c current", "a/gone failed: gone"]
    );
    let first = &lines(&fleet)[0];
    let meta = fleet.meta("a/b");
    for (member, expected) in [
        ("key", "gitingest/a/b/summary.txt"),
        ("pushedAt", PUSHED),
        ("feedPushedAt", PUSHED),
        ("processedAt", &meta.processed_at),
        ("commit", meta.commit.as_deref().unwrap()),
        ("sha256", meta.sha256.as_deref().unwrap()),
        ("description", "An example"),
        ("licence", "MIT"),
        ("url", fleet.server.repo_url("a", "b").as_str()),
    ] {
        assert_eq!(first[member], expected, "{member}");
    }
    assert_eq!(first["bytes"], meta.bytes);
    assert_eq!(first["tokens"], meta.tokens.unwrap());
    assert_eq!(first["files"], 2);
    assert_eq!(first["stars"], 3);
    assert_eq!(first["feed"]["openIssuesCount"], 1);
    assert_eq!(
        changes(&fleet),
        ["a/b stored", "a/c stored", "a/gone failed"]
    );
    let digests = page(&fleet, "index.html");
    assert!(
        digests.contains("<a href=\"gitingest/a/b/summary.txt\">a/<wbr>b</a>"),
        "{digests}"
    );
    assert!(page(&fleet, "runs/index.html").contains(&run.run_id()));

    // All is cached: nothing changes.
    let before = fs::read(fleet.store_folder().join("catalog.jsonl.gz")).unwrap();
    fleet.run(&["--max-failures", "100%"]).with(0);
    let after = fs::read(fleet.store_folder().join("catalog.jsonl.gz")).unwrap();
    assert_eq!(before, after);
    assert_eq!(changes(&fleet).len(), 3);

    // One is pushed to, and renewed: HEAD has not moved.
    entries[0]["pushedAt"] = PUSHED_LATER.into();
    fleet.write_feed(&entries);
    fleet.run(&["--max-failures", "100%"]).with(0);
    assert_eq!(changes(&fleet)[0], "a/b renewed");
    assert_eq!(lines(&fleet)[0]["pushedAt"], PUSHED_LATER);

    let get = done(&fleet, &["get", "A/B"], 0);
    assert_eq!(get.stdout, fleet.digest("a/b").unwrap().text);
    let failures = done(&fleet, &["failures", "--class", "gone"], 0);
    assert!(failures.stdout.contains("a/gone"), "{}", failures.stdout);
    assert!(!failures.stdout.contains("invalid"), "{}", failures.stdout);
    let documents = done(
        &fleet,
        &["catalog", "--form", "vertex", "--base", "gs://digests/"],
        0,
    );
    let documents: Vec<Value> = documents
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(documents.len(), 2);
    assert_eq!(
        documents[0]["content"]["uri"],
        "gs://digests/gitingest/a/b/summary.txt"
    );
    assert_eq!(documents[0]["structData"]["id"], "a/b");
    let none = done(&fleet, &["get", "a/gone"], 2);
    assert!(
        none.stderr.contains("no digest of a/gone"),
        "{}",
        none.stderr
    );
    assert!(none.stderr.contains("failed: gone: "), "{}", none.stderr);
}

#[test]
fn what_left_the_feed_is_withdrawn_and_deleted() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    fleet.run(&[]).with(0);
    fleet.write_feed(&fleet.entries(&["a/b"]));
    fleet.run(&[]).with(0);
    assert_eq!(states(&fleet), ["a/b current", "a/c left"]);
    // Not a run that does not look at all, and not before its time.
    fleet
        .run(&["--only", "a/b", "--withdraw-after", "0s"])
        .with(0);
    fleet.run(&[]).with(0);
    assert_eq!(fleet.stored(), ["a/b", "a/c"]);

    fleet.run(&SOON).with(0);
    assert_eq!(fleet.stored(), ["a/b"]);
    assert_eq!(states(&fleet), ["a/b current", "a/c withdrawn"]);
    assert_eq!(changes(&fleet)[0], "a/c withdrawn");
    let kept = fleet.store_folder().join("withdrawn/a/c/summary.txt");
    assert!(kept.exists());
    assert!(!page(&fleet, "index.html").contains("gitingest/a/c"));

    fleet.run(&["--withdrawn-keep", "0s"]).with(0);
    assert!(!kept.exists());
    assert_eq!(states(&fleet), ["a/b current"]);

    // Back, as if it were new.
    fleet.write_feed(&fleet.entries(&["a/b", "a/c"]));
    fleet.run(&[]).with(0);
    assert_eq!(states(&fleet), ["a/b current", "a/c current"]);
    assert_eq!(changes(&fleet)[0], "a/c stored");
}

#[test]
fn what_is_gone_from_its_host_is_withdrawn_at_the_second_answer() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    fleet.run(&[]).with(0);
    fs::remove_dir_all(fleet.repositories().join("a/c.git")).unwrap();
    fleet.write_feed(&[fleet.entry("a/b", PUSHED), fleet.entry("a/c", PUSHED_LATER)]);
    let arguments = [SOON[0], SOON[1], "--max-failures", "100%"];
    fleet.run(&arguments).with(0);
    assert_eq!(states(&fleet), ["a/b current", "a/c failed: gone"]);
    assert_eq!(fleet.stored(), ["a/b", "a/c"]);
    fleet.run(&arguments).with(0);
    assert_eq!(states(&fleet), ["a/b current", "a/c withdrawn"]);
    assert_eq!(fleet.stored(), ["a/b"]);
}

#[test]
fn a_feed_cut_short_withdraws_nothing() {
    let fleet = Fleet::of(&["a/b", "a/c", "a/d"]);
    fleet.run(&[]).with(0);
    fleet.write_feed(&fleet.entries(&["a/b"]));
    fleet.run(&SOON).with(0);
    let stopped = fleet.run(&SOON).with(65);
    let said = stopped.messages("withdraw").concat();
    assert!(
        said.starts_with("2 digests would be withdrawn at once, more than --withdraw-limit 10 %"),
        "{said}"
    );
    assert_eq!(fleet.stored(), ["a/b", "a/c", "a/d"]);
    fleet
        .run(&["--withdraw-after", "0s", "--withdraw-limit", "70"])
        .with(0);
    assert_eq!(fleet.stored(), ["a/b"]);
}

#[test]
fn what_is_withdrawn_by_hand_stays_down_until_it_is_restored() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    fleet.run(&[]).with(0);
    let text = fleet.digest("a/c").unwrap().text;
    let withdrawn = done(&fleet, &["withdraw", "A/C"], 0);
    assert!(
        withdrawn.stdout.starts_with("a/c: withdrawn"),
        "{}",
        withdrawn.stdout
    );
    assert_eq!(fleet.stored(), ["a/b"]);
    assert_eq!(states(&fleet), ["a/b current", "a/c withdrawn"]);
    let run = fleet.run(&["--force"]).with(0);
    let said = run.messages("withdraw").concat();
    assert!(
        said.starts_with("1 repository is left out, as withdrawn by hand"),
        "{said}"
    );
    assert_eq!(fleet.stored(), ["a/b"]);
    assert_eq!(states(&fleet), ["a/b current", "a/c withdrawn"]);

    done(&fleet, &["restore", "a/c"], 0);
    assert_eq!(fleet.digest("a/c").unwrap().text, text);
    done(&fleet, &["restore", "a/c"], 2);
    let run = fleet.run(&[]).with(0);
    assert_eq!(run.summary()["cached"], 2);
    assert_eq!(states(&fleet), ["a/b current", "a/c current"]);

    done(&fleet, &["withdraw", "a/c", "--now"], 0);
    assert!(
        !fleet
            .store_folder()
            .join("withdrawn/a/c/summary.txt")
            .exists()
    );
    done(&fleet, &["restore", "a/c"], 0);
    let run = fleet.run(&[]).with(0);
    assert_eq!(run.summary()["processed"], 1);
}

#[test]
fn a_feed_that_lost_much_ends_the_run_before_anything_is_done() {
    let fleet = Fleet::of(&["a/b", "a/c", "a/d", "a/e", "a/f"]);
    let feed = |repos: &[&str], unusable: usize| {
        let mut entries = fleet.entries(repos);
        entries.resize(repos.len() + unusable, serde_json::json!({}));
        fleet.write_feed(&entries);
    };
    let run = |options: &[&str]| fleet.run(&[&["--max-failures", "100%"], options].concat());
    feed(&["a/b", "a/c", "a/d", "a/e", "a/f"], 30);
    run(&[]).with(0);
    feed(&["a/b", "a/c", "a/d"], 5);
    let asked = fleet.requests();
    let refused = run(&["--force"]).with(65);
    let said = "has 8 entries, and had 35 at the run before: a fall of 77 %, more than --feed-drop-limit 20 %";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    assert_eq!(fleet.requests(), asked);
    run(&["--feed-drop-limit", "80"]).with(0);
    assert_eq!(states(&fleet)[3], "a/e left");
    // What was accepted is what the next is held against. A few may always go.
    run(&[]).with(0);
    feed(&["a/b", "a/c"], 0);
    run(&[]).with(0);
}

#[test]
fn the_catalogue_is_written_from_what_is_stored() {
    let fleet = Fleet::of(&["a/b", "a/c", "a/d"]);
    fleet.write_feed(&fleet.entries(&["a/b", "a/c", "a/d", "a/gone"]));
    fleet.run(&["--max-failures", "100%"]).with(0);
    let whole = lines(&fleet);
    let same = done(&fleet, &["catalog", "--write"], 0);
    assert!(
        same.stdout.ends_with("catalog.jsonl.gz: 4 lines\n"),
        "{}",
        same.stdout
    );
    assert_eq!(lines(&fleet), whole);

    let digests = fleet.store_folder().join("gitingest/a");
    fs::remove_dir_all(digests.join("b")).unwrap();
    done(&fleet, &["catalog", "--write"], 0);
    let now = [
        "a/b missing",
        "a/c current",
        "a/d current",
        "a/gone failed: gone",
    ];
    assert_eq!(states(&fleet), now);
    assert_eq!(lines(&fleet)[0]["description"], "An example");
    assert_eq!(lines(&fleet)[0].get("key"), None);
    assert_eq!(lines(&fleet)[1], whole[1]);

    // Nothing is left of it: what the store knows is there again.
    fs::remove_file(fleet.store_folder().join("catalog.jsonl.gz")).unwrap();
    done(&fleet, &["catalog", "--write"], 0);
    assert_eq!(states(&fleet), ["a/c current", "a/d current"]);
    assert_eq!(lines(&fleet)[0]["sha256"], whole[1]["sha256"]);
}
