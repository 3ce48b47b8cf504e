//! Whole runs of the real binary on real repositories: what is stored, what is cached, what is
//! said of it.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;

use common::job::DIGEST_FORMAT;
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use testing::http_server::{HttpServer, Response};
use testing::packs::Mode;
use testing::repositories::{self, BombLeaf, Builder, Raw};

use crate::fleet::{
    Fleet, PUSHED, PUSHED_LATER, bare_producer, expected_text, failures, files_below,
    in_clean_environment, names_in,
};

/// Repositories with all kinds of oddities; gives their names.
fn odd_repositories(fleet: &Fleet) -> Vec<String> {
    let root = fleet.repositories();
    let build = |name: &str, builder: Builder| {
        builder.build(&root, "odd", name);
    };
    let new = Builder::new;
    build("plain", new().file("README.md", "# Plain\n"));
    build("no-files", new());
    build(
        "submodule",
        new().submodule("vendored").file(
            ".gitmodules",
            "[submodule \"vendored\"]\n\tpath = vendored\n\turl = https://example.org/x\n",
        ),
    );
    build(
        "symlink",
        new()
            .symlink("passwd", "/etc/passwd")
            .symlink("up", "../../..")
            .file("real", "x"),
    );
    build(
        "notebook",
        new().file(
            "a.ipynb",
            r##"{"cells":[{"cell_type":"markdown","source":["# Title"]},{"cell_type":"code","source":"print(1)","outputs":[]}],"metadata":{},"nbformat":4,"nbformat_minor":5}"##,
        ),
    );
    build("garbage-notebook", new().file("a.ipynb", "{not json"));
    build(
        "binary",
        new()
            .file("blob.bin", [0, 159, 146, 150, 0, 1, 2])
            .file("text", "t"),
    );
    build(
        "gitignore",
        new()
            .file(".gitignore", "*.log\n!keep.log\n")
            .file("keep.log", "kept\n")
            .file("noise.log", "do not show\n"),
    );
    build(
        "gitingestignore",
        new()
            .file(".gitingestignore", "secret/\n")
            .file("secret/key", "do not show\n")
            .file("open", "shown\n"),
    );
    build(
        "garbage-ignore",
        new()
            .file(".gitignore", [b'[', 0xff, b'\n', b'*', b'*', b'a'])
            .file("a", "a"),
    );
    build(
        "non-ascii",
        new()
            .file("naïve/日本語.md", "こんにちは\n")
            .file([b'l', 0xe9], "latin-1 name\n"),
    );
    build("latin-1", new().file("a.txt", [b'c', b'a', b'f', 0xe9]));
    build(
        "utf-16",
        new().file("a.txt", [0xff, 0xfe, b'h', 0, b'i', 0]),
    );
    build(
        "one-large-file",
        new().file("big.txt", "x".repeat((512 << 10) + 1)),
    );
    build(
        "cut",
        (0..8).fold(new(), |b, i| {
            b.file(format!("{i}.txt"), "line of text\n".repeat(10_000))
        }),
    );
    build(
        "executable",
        new().executable("run.sh", "#!/bin/sh\ntouch /tmp/never\n"),
    );
    build(
        "attributes",
        new()
            .file(".gitattributes", "* filter=lfs ident\n")
            .file("a", "$Id$\n"),
    );
    build("Mixed.Case_Name", new().file("README", "Mixed\n"));
    repositories::empty(&root, "odd", "empty");
    repositories::nested_directories(&root, "odd", "deep", 40);
    repositories::many_files(&root, "odd", "many", 300);
    // As far as git itself agrees to serve them.
    let raw = Raw::new(&root, "odd", "hostile-names");
    let blob = raw.blob(b"do not show\n");
    let link = raw.blob(b"/etc/passwd");
    let below = raw.tree(&[(Mode::File, "inside", &blob)]);
    let tree = raw.tree(&[
        (Mode::File, &b"."[..], &*blob),
        (Mode::File, b"..", &blob),
        (Mode::File, b"a\nb", &raw.blob(b"shown\n")),
        (Mode::File, b"bell\x07\x1b[31m", &raw.blob(b"shown\n")),
        (Mode::Symlink, b"passwd", &link),
        (Mode::Directory, b".git", &below),
    ]);
    raw.commit(&tree);
    repositories::git_bomb(&root, "odd", "bomb", BombLeaf::File("f", b"boom\n"));
    let names = names_in(&root.join("odd"));
    names
        .iter()
        .map(|name| format!("odd/{}", name.strip_suffix(".git").unwrap()))
        .collect()
}

fn bare_path(fleet: &Fleet, repo: &str) -> PathBuf {
    fleet.repositories().join(format!("{repo}.git"))
}

/// The commit at HEAD; `None` if there is none.
fn head_of(fleet: &Fleet, repo: &str) -> Option<String> {
    let mut git = in_clean_environment(Command::new("git"));
    let output = git
        .args(["-c", "safe.directory=*", "rev-parse", "--verify", "HEAD"])
        .current_dir(bare_path(fleet, repo))
        .output()
        .unwrap();
    let commit = String::from_utf8(output.stdout).unwrap();
    (!commit.is_empty()).then(|| commit.trim().to_owned())
}

/// The main promise, from feed to digests; then the same feed again, and again with three pushes.
#[test]
fn odd_repositories_are_digested_once_and_then_cached() {
    let fleet = Fleet::new();
    let odd = odd_repositories(&fleet);
    assert!(odd.len() >= 20, "{odd:?}");
    let feed = |pushed_at: &dyn Fn(usize) -> &'static str| {
        let entry = |(i, repo): (usize, &String)| fleet.entry(repo, pushed_at(i));
        let mut entries: Vec<_> = odd.iter().enumerate().map(entry).collect();
        entries.extend([
            fleet.entry("odd/gone", PUSHED),
            // The same once more, older: gives way.
            fleet.entry(&odd[0], "2020-01-01T00:00:00Z"),
            json!({"owner": "odd", "name": "no-url", "pushedAt": PUSHED}),
            json!({"owner": "..", "name": "x", "url": "https://github.com/a/b", "pushedAt": PUSHED}),
            json!("not an object"),
        ]);
        fleet.write_feed(&entries);
    };
    feed(&|_| PUSHED);
    let total = odd.len() + 4;

    let first = fleet.run(&[]).with(0);
    assert_eq!(
        first.sentence(),
        format!(
            "Pipeline complete: {total} total, 0 cached (0.0%), {} processed, 4 failed",
            odd.len()
        ),
        "{:#?}",
        first.messages("failed-repository")
    );
    let run = first.run_id();
    assert_eq!(fleet.stored(), odd);
    for repo in &odd {
        let digest = fleet.digest(repo).unwrap();
        let path = bare_path(&fleet, repo);
        assert_eq!(digest.text, expected_text(&path, repo), "{repo}");
        let meta = digest.meta;
        assert_eq!(meta.pushed_at.as_str(), PUSHED);
        assert_eq!(meta.url, format!("{}/{repo}", fleet.server.url()));
        assert_eq!(meta.commit, head_of(&fleet, repo), "{repo}");
        assert_eq!(meta.format, DIGEST_FORMAT);
        assert_eq!(meta.bytes, digest.text.len() as u64);
        let long = ["odd/cut", "odd/bomb"].contains(&repo.as_str());
        assert_eq!(meta.truncated, long, "{repo}");
        assert_eq!(meta.run.as_str(), run);
        assert!(!digest.text.contains("do not show"), "{repo}");
        assert!(!digest.text.contains("root:"), "{repo}");
    }
    let empty = fleet.digest("odd/empty").unwrap().text;
    assert!(empty.contains("Files analyzed: 0"), "{empty}");

    // What the run left word of.
    let manifest = fleet.document(&run, "manifest.json");
    let feed_bytes = fs::read(fleet.feed_file()).unwrap();
    assert_eq!(manifest["run"], run.as_str());
    assert_eq!(manifest["feed"], fleet.feed_file().to_str().unwrap());
    assert_eq!(manifest["feedSha256"].as_str().unwrap().len(), 64);
    assert!(!feed_bytes.is_empty());
    assert_eq!(manifest["total"], total);
    assert_eq!(
        (&manifest["repeated"], &manifest["invalid"]),
        (&json!(1), &json!(3))
    );
    assert_eq!(
        manifest["reasons"],
        json!({"hit": 0, "newer": 0, "miss": odd.len() + 1, "stale": 0, "url": 0, "format": 0, "unreadable": 0, "forced": 0, "failed_before": 0})
    );
    let summary = fleet.document(&run, "summary.json");
    let failed = failures(&summary);
    let classes: Vec<_> = failed
        .iter()
        .map(|(repo, class, _)| (*repo, *class))
        .collect();
    let at = odd.len();
    assert_eq!(
        classes,
        [
            ("odd/gone", "gone"),
            (&*format!("entry {}", at + 3), "invalid_entry"),
            (&*format!("entry {}", at + 4), "invalid_entry"),
            ("odd/no-url", "invalid_entry"),
        ]
    );
    assert!(failed[0].2.contains("404"), "{failed:?}");
    assert_eq!(
        summary["failures_by_class"],
        json!({"gone": 1, "invalid_entry": 3})
    );
    assert_eq!(summary["open"], json!([]));
    let logged = first.summary();
    for (key, value) in logged.as_object().unwrap() {
        if key != "open" {
            assert_eq!(&summary[key], value, "{key} in the log and in summary.json");
        }
    }
    let sizes = odd.iter().map(|repo| fleet.meta(repo).bytes);
    assert_eq!(logged["bytes_stored"], sizes.sum::<u64>());
    assert!(logged["bytes_fetched"].as_u64().unwrap() > 0);
    // Each failed one is listed once: by the worker that tried it, and at the end if none did.
    let listed = first.messages("failed-repository");
    assert_eq!(listed.len(), 3, "{listed:?}");
    let tried = first.messages("job");
    let tried: Vec<_> = tried
        .iter()
        .filter(|line| line.contains("failed"))
        .collect();
    assert_eq!(tried.len(), 1, "{tried:?}");
    assert!(tried[0].starts_with("odd/gone failed: gone: "), "{tried:?}");
    fleet.assert_nothing_left();

    // Once more: everything that can be cached is, and the server is left alone.
    let requests = fleet.requests();
    let lenient = ["--max-failures", "100%"];
    let again = fleet.run(&[&["--exclude", "odd/gone"], &lenient[..]].concat());
    let again = again.with(0);
    assert_eq!(
        again.messages("cache-check")[1],
        format!("Cache hit rate: 100.0% ({0}/{0})", odd.len())
    );
    assert_eq!(again.summary()["cache_hit_rate"], 100.0);
    assert_eq!(again.summary()["cached"], odd.len());
    assert_eq!(again.summary()["processed"], 0);
    assert_eq!(fleet.requests(), requests);

    // Three pushes: three fetches.
    let pushed = |i: usize| i % 7 == 1 && i < 21;
    feed(&|i| if pushed(i) { PUSHED_LATER } else { PUSHED });
    let before: Vec<_> = odd
        .iter()
        .map(|repo| fleet.server.repo_stats(repo).info_refs)
        .collect();
    let third = fleet.run(&[&["--exclude", "odd/gone", "--explain"], &lenient[..]].concat());
    let third = third.with(0);
    assert_eq!(third.summary()["processed"], 3);
    for (i, repo) in odd.iter().enumerate() {
        let asked = fleet.server.repo_stats(repo).info_refs - before[i];
        assert_eq!(asked, u64::from(pushed(i)), "{repo}");
        let expected = if pushed(i) { PUSHED_LATER } else { PUSHED };
        assert_eq!(fleet.meta(repo).pushed_at.as_str(), expected, "{repo}");
    }
    let explained = third.messages("explain");
    assert_eq!(explained.len(), odd.len());
    let stale = format!(": stale (stored {PUSHED}, the feed says {PUSHED_LATER})");
    let stale = explained.iter().filter(|line| line.ends_with(&stale));
    assert_eq!(stale.count(), 3, "{explained:?}");
}

#[test]
fn forced_runs_ask_nobody_and_digest_everything() {
    let fleet = Fleet::of(&["a/one", "a/two"]);
    fleet.run(&[]).with(0);
    for arguments in [&["--force"][..], &["--cache", "none"]] {
        let run = fleet.run(arguments).with(0);
        assert_eq!(run.summary()["processed"], 2);
        assert_eq!(run.summary()["cache_hit_rate"], 0.0);
        assert_eq!(fleet.meta("a/one").run.as_str(), run.run_id());
    }
    assert_eq!(fleet.server.total_fetches(), 6);
}

/// `--cache api` asks a server instead of the store, in its own words.
#[test]
fn an_api_may_say_what_is_cached() {
    let fleet = Fleet::of(&["a/cached", "a/new", "a/unheard-of"]);
    let api = HttpServer::start(|request| {
        let asked: Value = serde_json::from_slice(&request.body).unwrap();
        assert_eq!(asked["repos"][0]["org"], "a");
        Response::json(&json!({"a/cached": false, "a/new": true}))
    });
    let run = fleet.run(&["--cache", "api", "--cache-url", &api.url()]);
    let run = run.with(0);
    assert_eq!(
        run.messages("cache-check")[1],
        "Cache hit rate: 33.3% (1/3)"
    );
    assert_eq!(api.request_count(), 1);
    assert_eq!(fleet.stored(), ["a/new", "a/unheard-of"]);
}

/// What the API calls for is made although the store holds that push; what it does not speak of is
/// the store's to decide.
#[test]
fn an_api_may_call_for_a_digest_that_is_stored() {
    let fleet = Fleet::of(&["a/called-for", "a/unheard-of"]);
    let first = fleet.run(&[]).with(0);
    let api = HttpServer::start(|_| Response::json(&json!({"a/called-for": true})));
    let run = fleet.run(&["--cache", "api", "--cache-url", &api.url()]);
    let run = run.with(0);
    assert_eq!(run.summary()["processed"], 2);
    assert_eq!(run.summary()["unchanged"], 1);
    let made_by = |repo: &str| fleet.meta(repo).run.as_str().to_owned();
    assert_eq!(made_by("a/called-for"), run.run_id());
    assert_eq!(made_by("a/unheard-of"), first.run_id());
}

/// Another program's digest, a damaged one, an empty one: each is made anew, and said why.
#[test]
fn what_is_not_ours_or_damaged_is_made_anew() {
    let repos = ["a/format", "a/no-record", "a/torn", "a/emptied", "a/whole"];
    let fleet = Fleet::of(&repos);
    fleet.run(&[]).with(0);
    let texts: Vec<_> = repos.map(|repo| fleet.digest(repo).unwrap().text).into();
    let file = |repo: &str, name: &str| {
        let folder = fleet.store_folder().join("gitingest").join(repo);
        folder.join(name)
    };
    let record = fs::read_to_string(file("a/format", "summary.meta.json")).unwrap();
    let other = record.replace(&json!(DIGEST_FORMAT).to_string(), "\"gitingest-0.1\"");
    assert_ne!(record, other);
    fs::write(file("a/format", "summary.meta.json"), other).unwrap();
    fs::write(file("a/no-record", "summary.meta.json"), "{\"pushedAt\":").unwrap();
    fs::write(file("a/torn", "summary.txt"), &texts[2][..20]).unwrap();
    fs::write(file("a/emptied", "summary.txt"), "").unwrap();

    let run = fleet.run(&["--explain"]).with(0);
    assert_eq!(
        run.messages("cache-check")[0],
        "Cache check: 1 hit, 1 format, 3 unreadable"
    );
    let explained = run.messages("explain");
    assert!(explained[0].starts_with("a/format: format (stored as \"gitingest-0.1\", now "));
    for line in &explained[1..4] {
        assert!(line.contains(": unreadable ("), "{line}");
    }
    assert_eq!(explained[4], "a/whole: hit");
    assert_eq!(run.summary()["processed"], 4);
    for (repo, text) in repos.iter().zip(texts) {
        assert_eq!(fleet.digest(repo).unwrap().text, text, "{repo}");
    }
}

/// A feed that went back in time does not take newer digests with it.
#[test]
fn a_newer_digest_stays_when_the_feed_goes_back() {
    let fleet = Fleet::of(&["a/b"]);
    fleet.write_feed(&[fleet.entry("a/b", PUSHED_LATER)]);
    fleet.run(&[]).with(0);
    let before = fleet.meta("a/b");
    let requests = fleet.requests();

    fleet.write_feed(&[fleet.entry("a/b", PUSHED)]);
    let run = fleet.run(&[]).with(0);
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 1 total, 1 cached (100.0%), 0 processed, 0 failed"
    );
    assert_eq!(run.messages("cache-check")[0], "Cache check: 1 newer");
    assert_eq!(fleet.meta("a/b"), before);
    assert_eq!(fleet.requests(), requests);
}

#[test]
fn filters_choose_what_is_digested() {
    let repos = ["hmrc/one", "hmrc/two", "hmrc/old", "dwp/one", "dwp/two"];
    let fleet = Fleet::of(&repos);
    let mut entries = fleet.entries(&repos);
    entries[2]["archived"] = json!(true);
    fleet.write_feed(&entries);
    let asked = |arguments: &[&str]| -> Vec<String> {
        let run = fleet.run(&[arguments, &["--dry-run"]].concat()).with(0);
        let lines = run.messages("dry-run");
        let names = lines.iter().filter_map(|line| {
            let line = line.strip_prefix("[DRY RUN] Would process ")?;
            line.strip_suffix(": miss").map(str::to_owned)
        });
        names.collect()
    };
    assert_eq!(asked(&[]), repos);
    assert_eq!(asked(&["--limit", "2"]), ["hmrc/one", "hmrc/two"]);
    assert_eq!(asked(&["--only", "dwp/*"]), ["dwp/one", "dwp/two"]);
    assert_eq!(
        asked(&[
            "--only",
            "*/one",
            "--only",
            "HMRC/two",
            "--exclude",
            "dwp/*"
        ]),
        ["hmrc/one", "hmrc/two"]
    );
    assert_eq!(
        asked(&["--skip-archived", "--only", "hmrc/*", "--limit", "9"]),
        ["hmrc/one", "hmrc/two"]
    );
    assert_eq!(fleet.requests(), 0);

    // And for real.
    let run = fleet.run(&["--limit", "1", "--only", "dwp/*"]).with(0);
    assert_eq!(run.summary()["total_repos"], 1);
    assert_eq!(fleet.stored(), ["dwp/one"]);
}

/// `--dry-run` reads feed and store, and says what would be; nothing is written, nothing fetched.
#[test]
fn a_dry_run_writes_nothing() {
    let repos = ["a/cached", "a/new", "a/pushed"];
    let fleet = Fleet::of(&repos);
    let dry = fleet.run(&["--dry-run"]).with(0);
    assert!(!fleet.store_folder().exists());
    assert_eq!(
        dry.messages("dry-run").last().unwrap(),
        "[DRY RUN] Pipeline complete: 3 total, 0 cached (0.0%), 3 processed, 0 failed, completed in 0s"
    );

    fleet.run(&["--exclude", "a/new"]).with(0);
    let mut entries = fleet.entries(&repos);
    entries[2] = fleet.entry("a/pushed", PUSHED_LATER);
    entries.push(json!({"owner": "a"}));
    fleet.write_feed(&entries);
    let files = files_below(&fleet.path().join("."));
    let requests = fleet.requests();
    let dry = fleet.run(&["--dry-run", "--explain"]).with(0);
    let said = dry.messages("dry-run");
    assert_eq!(
        said[..2],
        [
            "[DRY RUN] Would process a/new: miss",
            "[DRY RUN] Would process a/pushed: stale"
        ]
    );
    assert!(
        said[2].starts_with(
            "[DRY RUN] Pipeline complete: 4 total, 1 cached (25.0%), 2 processed, 1 failed, "
        ),
        "{said:?}"
    );
    assert_eq!(dry.messages("explain").len(), 3);
    let unusable = dry.messages("failed-repository");
    assert_eq!(unusable.len(), 1, "{unusable:?}");
    assert!(unusable[0].contains("entry 3"), "{unusable:?}");
    assert_eq!(files_below(&fleet.path().join(".")), files);
    assert_eq!(fleet.requests(), requests);
}

/// The README's main command: a feed file whose entry is a path relative to it.
#[test]
fn a_feed_file_may_list_repositories_on_this_machine() {
    let fleet = Fleet::new();
    let entry =
        |url: &str| json!({"owner": "sample", "name": "here", "url": url, "pushedAt": PUSHED});
    let checkout = fleet.path().join("checkout");
    let git = |arguments: &[&str]| {
        let output = in_clean_environment(Command::new("git"))
            .args(["-c", "user.name=T", "-c", "user.email=t@example.org"])
            .args(arguments)
            .current_dir(&checkout)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    fs::create_dir_all(checkout.join("deploy/sample")).unwrap();
    git(&["init", "--quiet", "--initial-branch=main"]);
    fs::write(checkout.join("committed.txt"), "as committed\n").unwrap();
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "one"]);
    fs::write(checkout.join("committed.txt"), "changed since\n").unwrap();
    let feed = checkout.join("deploy/sample/repos.json");
    fs::write(&feed, json!([entry("../..")]).to_string()).unwrap();

    // From wherever it is started: what is relative is relative to the feed.
    let mut command = bare_producer();
    command
        .current_dir(fleet.path())
        .args(["run", "--feed", "checkout/deploy/sample/repos.json"]);
    let run = crate::fleet::Running::start(&mut command).wait().with(0);
    let digest = fs::read_to_string(
        fleet
            .path()
            .join("digests/gitingest/sample/here/summary.txt"),
    );
    let digest = digest.unwrap();
    assert!(digest.starts_with("Repository: sample/here\n"), "{digest}");
    assert!(digest.contains("as committed\n") && !digest.contains("changed since"));
    let id = run.run_id();
    assert_eq!(
        run.messages("run").last().unwrap(),
        &format!(
            "Digests: ./digests/gitingest/{{owner}}/{{name}}/summary.txt; \
             this run: ./digests/runs/{id}/summary.json"
        )
    );

    // The same from a server may reach into this machine only by whole paths, and only where that
    // is allowed.
    let absolute = checkout.to_str().unwrap();
    for (url, more, reason) in [
        ("../..", &[][..], Some("--allow-local")),
        (absolute, &[], Some("--allow-local")),
        ("../..", &["--allow-local"], Some("relative path")),
        (absolute, &["--allow-local"], None),
    ] {
        let body: Value = json!([entry(url)]);
        let server = HttpServer::start(move |_| Response::json(&body));
        let feed = format!("{}/repos.json", server.url());
        let lenient = ["--allow-empty-feed", "--max-failures", "1"];
        let run = fleet.run(&[&["--force", "--feed", &feed][..], &lenient, more].concat());
        let run = run.with(0);
        let summary = fleet.document(&run.run_id(), "summary.json");
        let failed = failures(&summary);
        let Some(reason) = reason else {
            assert_eq!(failed, []);
            assert_eq!(summary["processed"], 1);
            assert_eq!(fleet.meta("sample/here").run.as_str(), run.run_id());
            assert_eq!(fleet.digest("sample/here").unwrap().text, digest);
            continue;
        };
        assert_eq!(failed[0].1, "invalid_entry", "{summary}");
        assert!(failed[0].2.contains(reason), "{summary}");
    }
}

/// The feed may come by a proxy, but repositories do not, which an operator should know.
#[test]
fn a_proxy_for_the_feed_only_is_warned_of() {
    let fleet = Fleet::of(&["a/b"]);
    assert_eq!(fleet.run(&[]).with(0).messages("proxy"), [""; 0]);
    let mut command = fleet.producer(&["--force", "--log-level", "trace"]);
    command.env("https_proxy", "http://me:pa55word@127.0.0.1:1");
    command.env("ALL_PROXY", "http://me:pa55word@127.0.0.1:1");
    command.env("HTTPS_PROXY", "");
    let run = crate::fleet::Running::start(&mut command).wait().with(0);
    assert_eq!(run.summary()["processed"], 1);
    let warned = run.messages("proxy");
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(
        warned[0].starts_with("https_proxy and ALL_PROXY"),
        "{warned:?}"
    );
    assert!(warned[0].contains("fetched directly"), "{warned:?}");
    assert!(!(run.stdout + &run.stderr).contains("pa55word"));
}

/// The token is for github.com; no other host, no log and no slot's environment gets it, and
/// neither do the credentials of an address.
#[test]
fn secrets_are_not_told() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    let mut entries = fleet.entries(&["a/b", "a/c"]);
    let with_password = format!("http://user:hunter2@{}/a/c", fleet.server.authority());
    entries[1]["url"] = json!(with_password);
    let feed = HttpServer::start(move |_| Response::json(&json!(entries)));
    let url = format!("http://me:pa55word@{}/repos.json?key=k3y", feed.authority());
    let mut command = fleet.producer(&["--feed", &url, "--log-level", "trace"]);
    command.env("GITHUB_TOKEN", "sesame");
    command.env("MAX_FAILURES", "1");
    let run = crate::fleet::Running::start(&mut command).wait().with(0);
    let summary = fleet.document(&run.run_id(), "summary.json");
    assert_eq!(failures(&summary)[0].1, "invalid_entry");
    assert_eq!(summary["processed"], 1);
    assert!(fleet.server.repo_stats("a/b").authorizations.is_empty());

    let mut told = run.stdout + &run.stderr;
    for file in files_below(&fleet.store_folder()) {
        let bytes = fs::read(fleet.store_folder().join(&file)).unwrap();
        if file.extension().is_some_and(|extension| extension == "gz") {
            GzDecoder::new(&bytes[..])
                .read_to_string(&mut told)
                .unwrap();
        } else {
            told += &String::from_utf8(bytes).unwrap();
        }
    }
    for secret in ["sesame", "hunter2", "pa55word", "k3y"] {
        assert!(!told.contains(secret), "{secret} in {told}");
    }
}
