//! Protocol v2 and libgit2: the same digests, whatever the server speaks.

use std::path::Path;
use std::time::Duration;

use common::fault::FaultKind;
use common::telemetry::registry::Expose;
use testing::git_server::{Dialect, Fault as Trouble, GITHUB_LIMIT, Kind};
use testing::http_server::{HttpServer, Response};
use testing::repositories::{
    BombLeaf, Builder, Mode, Raw, empty, git_bomb, many_files, nested_directories,
};
use worker::digest::DigestLimits;
use worker::fetch::policy::FetchMode;
use worker::metrics::Metrics;
use worker::slot::SlotOutput;

use crate::fixture::{Fixture, TEXT, git, noise, work};
use crate::parity::fixtures::{OWNER, fixtures};

/// What a digest is made of.
fn parts(made: &SlotOutput) -> (&worker::digest::Facts, &str, &str) {
    (&made.facts, &made.tree, &made.content)
}

/// Returns how often `metrics` counted a way.
fn counted(metrics: &Metrics, way: &str) -> u64 {
    let text = String::from_utf8(metrics.render()).unwrap();
    let name = format!("repofleet_fetch_ways_total{{way=\"{way}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("{name} in\n{text}"))
        .parse()
        .unwrap()
}

/// Builds repositories with all that is odd, and returns their names as `owner/name`.
fn odd_repositories(root: &Path) -> Vec<String> {
    let mut names: Vec<String> = fixtures()
        .iter()
        .map(|fixture| {
            fixture.build(root);
            format!("{OWNER}/{}", fixture.name)
        })
        .collect();
    // git serves no tree with an empty name.
    let raw = Raw::new(root, "odd", "names");
    let (text, link) = (raw.blob(b"text\n"), raw.blob(b"/etc/passwd"));
    let tree = raw.tree(&[
        (Mode::File, &b"../escape"[..], &text),
        (Mode::File, b".GIT", &text),
        (Mode::File, b"bell\x07\x1b[31m", &text),
        (Mode::File, b"latin-\xe9", &text),
        (Mode::File, b"twice", &text),
        (Mode::File, b"twice", &link),
        (Mode::Symlink, b"passwd", &link),
    ]);
    raw.commit(&tree);
    git_bomb(root, "odd", "bomb", BombLeaf::File("f", b"boom\n"));
    git_bomb(root, "odd", "nothing", BombLeaf::Nothing);
    many_files(root, "odd", "many", 12_000);
    nested_directories(root, "odd", "deep", 30);
    empty(root, "odd", "empty");
    let at_the_limit = |bytes| vec![b'x'; bytes];
    Builder::new()
        .file("at", at_the_limit(512 << 10))
        .file("over", at_the_limit((512 << 10) + 1))
        .file("a/.gitignore", at_the_limit((512 << 10) + 1))
        .file("b/.gitignore", "*.o\n")
        .file("b/x.o", "x")
        .file("empty", "")
        .executable("run", noise(3000))
        .symlink("link", "b")
        .submodule("module")
        .build(root, "odd", "sizes");
    // Alike, so that they are deltas.
    let lines = |i: usize| format!("line {i} of many\n").repeat(200);
    let alike = (0..200).fold(Builder::new(), |builder, i| {
        let text: String = (0..40)
            .map(|j| lines(if j == 20 { i } else { j }))
            .collect();
        builder.file(format!("d{}/f{i}", i % 7), text)
    });
    let path = alike.build(root, "odd", "alike");
    git(&path, ["repack", "-adfq", "--depth=50", "--window=50"]);
    names.extend(
        [
            "names", "bomb", "nothing", "many", "deep", "empty", "sizes", "alike",
        ]
        .map(|name| format!("odd/{name}")),
    );
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn digests_are_the_same_on_both_ways() {
    let mut fixture = Fixture::new();
    let names = odd_repositories(fixture.root.path());
    let small = DigestLimits {
        max_file_bytes: 3,
        ..DigestLimits::default()
    };
    for limits in [DigestLimits::default(), DigestLimits::gitingest(), small] {
        fixture.limits = limits;
        let metrics = Metrics::new();
        fixture.policy.mode = FetchMode::Git2;
        let git2 = fixture.slots_counted(&metrics);
        fixture.policy.mode = FetchMode::V2;
        let v2 = fixture.slots_counted(&metrics);
        for name in &names {
            let url = format!("{}/{name}", fixture.server.url());
            let by_git2 = work(&git2, &url).await.expect(name);
            let by_v2 = work(&v2, &url).await.expect(name);
            assert_eq!(parts(&by_git2), parts(&by_v2), "{name}");
        }
        assert_eq!(counted(&metrics, "v2"), names.len() as u64);
        assert_eq!(counted(&metrics, "git2"), names.len() as u64);
        assert_eq!(counted(&metrics, "fallback"), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_surprises_on_the_fast_way_is_left_to_libgit2() {
    let mut fixture = Fixture::new();
    let names = odd_repositories(fixture.root.path());
    let config = |config: &[(&'static str, &'static str)]| Dialect {
        config: config.to_vec(),
        ..Dialect::default()
    };
    let filter = |filter| Dialect {
        filter: Some(filter),
        ..Dialect::default()
    };
    let only_v0 = Dialect {
        only_v0: true,
        ..Dialect::default()
    };
    for (dialect, expected) in [
        (config(&[("uploadpack.allowAnySHA1InWant", "false")]), None),
        (config(&[("uploadpack.advertiseSidebandAll", "true")]), None),
        // It promises to filter, and does not.
        (filter(""), None),
        (
            config(&[("uploadpack.allowFilter", "false")]),
            Some("without filter"),
        ),
        (
            config(&[
                ("uploadpackfilter.allow", "false"),
                ("uploadpackfilter.blob:none.allow", "true"),
            ]),
            Some("the host says"),
        ),
        (only_v0, Some("older version")),
        // It filters something else.
        (filter("blob:none"), Some("lacks blob")),
        (filter("tree:1"), Some("lacks")),
    ] {
        fixture.server.set_dialect(dialect.clone());
        let metrics = Metrics::new();
        let mut with = |mode| {
            fixture.policy.mode = mode;
            fixture.slots_counted(&metrics)
        };
        let (auto, git2, v2) = (
            with(FetchMode::Auto),
            with(FetchMode::Git2),
            with(FetchMode::V2),
        );
        for name in names.iter().filter(|name| name.starts_with("odd/")) {
            let url = format!("{}/{name}", fixture.server.url());
            let by_git2 = work(&git2, &url).await.expect(name);
            let by_auto = work(&auto, &url).await.expect(name);
            assert_eq!(parts(&by_git2), parts(&by_auto), "{name} of {dialect:?}");
        }
        let url = format!("{}/odd/sizes", fixture.server.url());
        let made = work(&v2, &url).await;
        match expected {
            None => {
                assert!(made.is_ok(), "{dialect:?}: {made:?}");
                assert_eq!(counted(&metrics, "fallback"), 0, "{dialect:?}");
            }
            Some(why) => {
                let fault = made.unwrap_err();
                assert_eq!(fault.kind, FaultKind::Refused, "{dialect:?}: {fault}");
                assert!(fault.message.contains(why), "{dialect:?}: {fault}");
                assert!(fault.message.contains("--fetch auto"), "{fault}");
                assert!(counted(&metrics, "fallback") > 0, "{dialect:?}");
            }
        }
    }
}

#[tokio::test]
async fn what_a_host_refuses_is_not_tried_on_the_other_way() {
    let fixture = Fixture::new();
    let slots = fixture.slots();
    for code in [401, 403, 404, 429, 500] {
        for at in [Kind::InfoRefs, Kind::UploadPack] {
            fixture.server.clear_faults();
            fixture
                .server
                .fault("owner/bad", Trouble::status(code).on(at));
            let before = fixture.server.repo_stats("owner/bad");
            work(&slots, &fixture.url("bad")).await.unwrap_err();
            let after = fixture.server.repo_stats("owner/bad");
            assert_eq!(after.info_refs - before.info_refs, 1, "{code} at {at:?}");
            let posts = u64::from(at == Kind::UploadPack);
            assert_eq!(after.upload_packs - before.upload_packs, posts);
        }
    }
}

/// But not one that is overloaded, or whose git is away.
#[tokio::test]
async fn a_server_that_breaks_over_the_filter_is_asked_again_without() {
    let fixture = Fixture::new();
    let metrics = Metrics::new();
    let slots = fixture.slots_counted(&metrics);
    for (code, fallbacks) in [(500, 1), (502, 0), (503, 0), (504, 0)] {
        fixture.server.clear_faults();
        let breaks = Trouble::status(code).on(Kind::UploadPack);
        fixture.server.fault("owner/bad", breaks.asking("filter "));
        let before = fixture.server.repo_stats("owner/bad").info_refs;
        let made = work(&slots, &fixture.url("bad")).await;
        let asked = fixture.server.repo_stats("owner/bad").info_refs - before;
        assert_eq!(
            (made.is_ok(), asked),
            (fallbacks == 1, 1 + fallbacks),
            "{code}"
        );
        assert_eq!(counted(&metrics, "fallback"), 1);
    }
    // Broken altogether: each way once.
    fixture.server.clear_faults();
    let breaks = Trouble::status(500).on(Kind::UploadPack).asking("want ");
    fixture.server.fault("owner/bad", breaks);
    let before = fixture.server.repo_stats("owner/bad").upload_packs;
    let fault = work(&slots, &fixture.url("bad")).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Transient, "{fault}");
    let asked = fixture.server.repo_stats("owner/bad").upload_packs - before;
    assert_eq!(asked, 3, "for HEAD, and for a pack on either way");
}

#[tokio::test]
async fn a_damaged_pack_is_fetched_again_by_libgit2() {
    let fixture = Fixture::new();
    let metrics = Metrics::new();
    let slots = fixture.slots_counted(&metrics);
    // The first POST asks for refs, in which there is no pack; the second brings one.
    let corrupt = Trouble::Corrupt { at: 40 }.on(Kind::UploadPack).times(2);
    fixture.server.fault("owner/bad", corrupt);
    let made = work(&slots, &fixture.url("bad")).await.unwrap();
    assert!(made.content.contains(TEXT));
    assert_eq!(counted(&metrics, "fallback"), 1);
    assert_eq!(fixture.server.repo_stats("owner/bad").info_refs, 2);
}

/// Returns packets of these texts, and a flush.
fn packets(texts: &[&[u8]]) -> Vec<u8> {
    let mut all = Vec::new();
    for text in texts {
        all.extend(format!("{:04x}", text.len() + 4).as_bytes());
        all.extend_from_slice(text);
    }
    all.extend_from_slice(b"0000");
    all
}

/// A server of one repository that answers requests for its pack with `answer`.
fn server_of(answer: impl Fn() -> Response + Send + Sync + 'static) -> HttpServer {
    HttpServer::start(move |request| {
        let asks_for = |what: &str| String::from_utf8_lossy(&request.body).contains(what);
        if request.method == "GET" {
            let lines = [&b"version 2\n"[..], b"ls-refs\n", b"fetch=shallow filter\n"];
            gits("advertisement", packets(&lines))
        } else if asks_for("command=ls-refs") {
            let head = format!("{} HEAD\n", "1".repeat(40));
            gits("result", packets(&[head.as_bytes()]))
        } else {
            answer()
        }
    })
}

/// A response to git.
fn gits(kind: &str, body: Vec<u8>) -> Response {
    let kind = format!("application/x-git-upload-pack-{kind}");
    Response::new(200, body).header("content-type", kind)
}

/// A response with this pack.
fn with_pack(pack: &[u8]) -> Response {
    let pieces = pack
        .chunks(60_000)
        .map(|piece| [&b"\x01"[..], piece].concat());
    let pieces: Vec<Vec<u8>> = pieces.collect();
    let mut lines = vec![&b"packfile\n"[..]];
    lines.extend(pieces.iter().map(Vec::as_slice));
    gits("result", packets(&lines))
}

/// Its third request is the first that asks for much.
#[tokio::test]
async fn a_limit_in_place_of_the_pack_is_the_hosts() {
    let in_band = |start: &str| format!("{start}{GITHUB_LIMIT}\n").into_bytes();
    let (error, after_pack) = (in_band("ERR "), in_band("\x03"));
    let sections = [&b"packfile\n"[..], b"\x01PACK", &after_pack];
    let answers: [Box<dyn Fn() -> Response + Send + Sync>; 3] = [
        Box::new(|| Response::new(401, "").header("x-github-edge-message", GITHUB_LIMIT)),
        Box::new({
            let body = packets(&[&error]);
            move || gits("result", body.clone())
        }),
        Box::new({
            let body = packets(&sections);
            move || gits("result", body.clone())
        }),
    ];
    for answer in answers {
        let mut fixture = Fixture::new();
        let server = server_of(answer);
        let host = server.authority().parse().unwrap();
        fixture.policy.hosts.push(host);
        let url = format!("{}/owner/bad", server.url());
        let fault = fixture.make_url(&url).await.unwrap_err();
        assert_eq!(fault.kind, FaultKind::Throttled, "{fault}");
        assert_eq!(fault.retry_after, Some(Duration::from_secs(30)));
        for part in [GITHUB_LIMIT, "--token-for"] {
            assert!(fault.message.contains(part), "{fault}");
        }
        assert_eq!(server.request_count(), 3, "nobody tries the other way");
    }
}

#[tokio::test]
async fn a_pack_that_would_cost_too_much_is_given_up_before_it_does() {
    // A blob of 4 GiB and one byte, of which only the header is there.
    let blob = [0xb1, 0x80, 0x80, 0x80, 0x80, 0x01];
    let too_many = [&b"PACK\0\0\0\x02"[..], &[0xff; 4]].concat();
    let too_long = [&b"PACK\0\0\0\x02\0\0\0\x01"[..], &blob].concat();
    for (pack, part) in [
        (too_many, "4294967295 objects"),
        (too_long, "bytes or more"),
    ] {
        let mut fixture = Fixture::new();
        // Without room for a part of it.
        fixture.config.child.address_space = 100 << 20;
        fixture.policy.max_bytes = 1 << 20;
        let server = server_of(move || with_pack(&pack));
        fixture
            .policy
            .hosts
            .push(server.authority().parse().unwrap());
        let url = format!("{}/owner/bad", server.url());
        let fault = fixture.make_url(&url).await.unwrap_err();
        assert_eq!(fault.kind, FaultKind::TooLarge, "{fault}");
        assert!(fault.message.contains(part), "{fault}");
        assert_eq!(server.request_count(), 3, "nobody tries the other way");
    }
}
