//! Servers and repositories that mean harm, in one run with others that must not notice.

use serde_json::json;
use testing::git_server::{Fault, GitServer, Kind};
use testing::http_server::{HttpServer, Response};
use testing::repositories::{self, BombLeaf, Builder};

use crate::fleet::{Fleet, failures};

const GOOD: [&str; 4] = ["good/a", "good/b", "good/c", "good/d"];

#[test]
fn hostile_repositories_cost_nobody_else_anything() {
    let fleet = Fleet::of(&GOOD);
    // Somebody else's host, so that what it asks for is not asked of the others.
    let busy = GitServer::start(fleet.repositories());
    let elsewhere = HttpServer::start(|_| Response::new(200, "secret of another host"));
    let bad = |name: &str, fault: Fault| {
        let repo = format!("bad/{name}");
        fleet.small_repository(&repo);
        fleet.server.fault(&repo, fault);
    };
    bad("silent", Fault::Hang);
    bad(
        "slow",
        Fault::Drip {
            bytes_per_second: 1,
        },
    );
    bad("cut", Fault::Truncate { after_bytes: 100 });
    fleet.small_repository("bad/corrupt");
    let corrupt = Fault::Corrupt { at: 40 }.on(Kind::UploadPack);
    fleet.server.fault("bad/corrupt", corrupt);
    bad(
        "redirect",
        Fault::Redirect {
            code: 302,
            location: elsewhere.url(),
        },
    );
    bad("unauthorized", Fault::status(401));
    bad("gone", Fault::status(410));
    bad("page", Fault::WrongContentType);
    bad("endless", Fault::Flood);
    bad("broken", Fault::status(500));
    fleet.small_repository("busy/now");
    busy.fault("busy/now", Fault::retry_after(429, 1).times(2));
    fleet.small_repository("busy/moved");
    busy.fault(
        "busy/moved",
        Fault::Moved {
            to: busy.repo_url("good", "a"),
        },
    );
    repositories::git_bomb(
        &fleet.repositories(),
        "bomb",
        "files",
        BombLeaf::File("f", b"x"),
    );
    let big = Builder::new().file("zeros", vec![0; 64 << 20]);
    big.build(&fleet.repositories(), "bomb", "zeros");
    let noise: Vec<u8> = {
        let mut random = fastrand::Rng::with_seed(3);
        (0..3 << 20).map(|_| random.u8(..)).collect()
    };
    Builder::new()
        .file("noise", noise)
        .build(&fleet.repositories(), "bad", "large");

    let bads = [
        "silent",
        "slow",
        "cut",
        "corrupt",
        "redirect",
        "unauthorized",
        "gone",
        "page",
        "endless",
        "broken",
        "large",
    ];
    let mut entries: Vec<_> = bads
        .iter()
        .map(|name| fleet.entry(&format!("bad/{name}"), crate::fleet::PUSHED))
        .collect();
    entries.extend(fleet.entries(&["bomb/files", "bomb/zeros"]));
    for name in ["now", "moved"] {
        let mut entry = fleet.entry(&format!("busy/{name}"), crate::fleet::PUSHED);
        entry["url"] = json!(busy.repo_url("busy", name));
        entries.push(entry);
    }
    for (name, url) in [
        ("host", "https://evil.example/a/b"),
        ("metadata", "https://169.254.169.254/a/b"),
        ("ssh", "ssh://git@github.com/a/b"),
        ("loopback", &*format!("{}/a/b", elsewhere.url())),
    ] {
        let mut entry = fleet.entry(&format!("refused/{name}"), crate::fleet::PUSHED);
        entry["url"] = json!(url);
        entries.push(entry);
    }
    // The good ones last, behind all the others.
    entries.extend(fleet.entries(&GOOD));
    fleet.write_feed(&entries);

    let run = fleet.run(&[
        // Long enough for a bomb on a busy machine; those that hang do so side by side.
        "--stall",
        "5",
        "--concurrency",
        "12",
        "--max-fetch-bytes",
        "2000000",
        "--max-failures",
        "100%",
        "--allow-host",
        &busy.authority(),
    ]);
    let run = run.with(0);
    let summary = fleet.document(&run.run_id(), "summary.json");
    let failed = failures(&summary);
    let class = |repo: &str| {
        let mut failed = failed.iter();
        failed
            .find(|failure| failure.0 == repo)
            .map_or("processed", |failure| failure.1)
    };
    for (repo, expected) in [
        ("bad/silent", "transient"),
        ("bad/slow", "transient"),
        ("bad/cut", "transient"),
        ("bad/corrupt", "transient"),
        ("bad/broken", "transient"),
        ("bad/redirect", "refused"),
        ("bad/unauthorized", "gone"),
        ("bad/gone", "gone"),
        ("bad/large", "too_large"),
        ("refused/host", "refused"),
        ("refused/metadata", "refused"),
        ("refused/loopback", "refused"),
        ("bomb/files", "processed"),
        ("bomb/zeros", "processed"),
        ("busy/now", "processed"),
        ("busy/moved", "processed"),
    ] {
        assert_eq!(class(repo), expected, "{repo} of {failed:#?}");
    }
    for repo in ["bad/page", "bad/endless", "refused/ssh"] {
        assert_ne!(class(repo), "processed", "{repo} of {failed:#?}");
    }
    for good in GOOD {
        assert!(fleet.digest(good).is_some(), "{good}");
        assert_eq!(fleet.server.fetches(good), 1);
    }
    assert_eq!(elsewhere.request_count(), 0);
    assert_eq!(fleet.server.repo_stats("bad/silent").info_refs, 4);
    assert_eq!(fleet.server.repo_stats("bad/gone").info_refs, 1);
    assert_eq!(busy.repo_stats("busy/now").faulted_at.len(), 2);
    assert_eq!(summary["closed"], true);
    fleet.assert_nothing_left();
}
