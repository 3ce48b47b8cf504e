//! Protocol v2 and libgit2: the same digests, whatever the server speaks.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::fault::FaultKind;
use common::telemetry::registry::Expose;
use testing::git_server::{Dialect, Fault as Trouble, GITHUB_LIMIT, Kind};
use testing::http_server::Response;
use testing::packs::{self, Mode, PackWriter, hex, tree};
use testing::repositories::{
    BombLeaf, Builder, Raw, empty, git_bomb, many_files, nested_directories,
};
use worker::digest::DigestLimits;
use worker::fetch::policy::FetchMode;
use worker::metrics::Metrics;
use worker::slot::SlotOutput;

use crate::fixture::{Fixture, TEXT, git, noise, work};
use crate::hostile_packs::{gits, packets, server_of};
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

/// Adds a folder of `count` files to HEAD of the repository at `path`, whatever its names.
fn add_files(path: &Path, count: usize) {
    let files = (0..count).map(|i| (Mode::File, format!("f{i}"), format!("file {i}\n")));
    let mut packed = PackWriter::default();
    let files: Vec<_> = files
        .map(|(mode, name, text)| (mode, name, packed.blob(text.as_bytes())))
        .collect();
    let entries: Vec<_> = files
        .iter()
        .map(|(m, n, id)| (*m, n.as_str(), *id))
        .collect();
    let folder = packed.tree(&entries);
    let root = git_bytes(path, &["cat-file", "tree", "HEAD^{tree}"], b"");
    let root = [root, tree(&[(Mode::Directory, "zzz", folder)])].concat();
    let root = packed.object(packs::Kind::Tree, &root).1;
    let commit = packed.commit(root);
    git_bytes(path, &["index-pack", "--stdin"], &packed.finish());
    git(path, ["update-ref", "HEAD", &hex(commit)]);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&from, &to),
            false => drop(fs::copy(from, to).unwrap()),
        }
    }
}

fn git_bytes(path: &Path, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut git = Command::new("git")
        .current_dir(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    git.stdin.take().unwrap().write_all(input).unwrap();
    let output = git.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?} at {}",
        path.display()
    );
    output.stdout
}

/// A server that tells sizes.
fn telling_sizes() -> Dialect {
    Dialect {
        config: vec![("transfer.advertiseObjectInfo", "true")],
        ..Dialect::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn digests_are_the_same_on_all_ways() {
    let mut fixture = Fixture::new();
    let root = fixture.root.path();
    let mut names = odd_repositories(root);
    let mut empty = 0;
    // So many files that only those are fetched that show.
    for name in names.clone() {
        let (from, to) = (root.join(format!("{name}.git")), format!("many-{name}"));
        let path = root.join(format!("{to}.git"));
        copy_folder(&from, &path);
        match git(&path, ["rev-list", "--all"]).is_empty() {
            true => empty += 1,
            false => add_files(&path, 301),
        }
        names.push(to);
    }
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
            fixture.server.set_dialect(Dialect::default());
            let by_v2 = work(&v2, &url).await.expect(name);
            assert_eq!(parts(&by_git2), parts(&by_v2), "{name}");
            fixture.server.set_dialect(telling_sizes());
            let by_sizes = work(&v2, &url).await.expect(name);
            assert_eq!(parts(&by_git2), parts(&by_sizes), "{name}");
        }
        let count = names.len() as u64;
        let (one_pack, on_demand) = (counted(&metrics, "v2"), counted(&metrics, "object_info"));
        assert_eq!(one_pack + on_demand, 2 * count);
        // All copies that are not empty.
        assert_eq!(on_demand, count / 2 - empty);
        assert_eq!(counted(&metrics, "git2"), count);
        assert_eq!(counted(&metrics, "fallback"), 0);
        assert_eq!(counted(&metrics, "object_info_fallback"), 0);
    }
}

/// Makes `owner/large`: 400 files of 2 kB that do not compress, 300 of which a digest does not show, and
/// one over the limit.
fn build_large(root: &Path) {
    let mut builder = Builder::new()
        .file(".gitignore", "*.hidden\n")
        .file("huge", noise(600 << 10))
        .symlink("link", "f7")
        .file("binary", noise(100 << 10));
    // All different, so that none is a delta of another.
    for (i, bytes) in noise(400 << 10).chunks(1 << 10).enumerate() {
        let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let hidden = if i % 4 == 0 { "" } else { ".hidden" };
        builder = builder.file(format!("d{}/f{i}{hidden}", i % 9), text);
    }
    builder.build(root, "owner", "large");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_sizes_are_told_only_what_shows_is_fetched() {
    let fixture = Fixture::new();
    build_large(fixture.root.path());
    let metrics = Metrics::new();
    let slots = fixture.slots_counted(&metrics);
    let fetch = async || {
        let before = fixture.server.repo_stats("owner/large");
        let made = work(&slots, &fixture.url("large")).await.unwrap();
        let after = fixture.server.repo_stats("owner/large");
        assert_eq!(made.fetched_bytes, after.bytes_sent - before.bytes_sent);
        let posts = after.upload_packs - before.upload_packs;
        (
            parts(&made).1.to_owned(),
            made.content,
            made.fetched_bytes,
            posts,
        )
    };
    let (tree, content, all, posts) = fetch().await;
    assert_eq!(posts, 2);
    fixture.server.set_dialect(telling_sizes());
    let (tree_again, content_again, some, posts) = fetch().await;
    assert_eq!((tree, content), (tree_again, content_again));
    assert_eq!(counted(&metrics, "object_info"), 1);
    // HEAD, trees, sizes and text of ignore files, sizes of the rest, links, files.
    assert_eq!(posts, 7);
    assert!(2 * some < all, "{some} of {all}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_tells_sizes_badly_is_asked_for_one_pack() {
    let mut fixture = Fixture::new();
    build_large(fixture.root.path());
    let url = fixture.url("large");
    fixture.policy.mode = FetchMode::Git2;
    let by_git2 = work(&fixture.slots(), &url).await.unwrap();
    fixture.policy.mode = FetchMode::V2;
    let telling = |size| Dialect {
        sizes: Some(size),
        ..telling_sizes()
    };
    let refusing = |key| {
        let mut dialect = telling_sizes();
        dialect
            .config
            .extend([("uploadpackfilter.allow", "false"), (key, "true")]);
        dialect
    };
    for dialect in [
        telling(""),
        telling("-1"),
        telling("many"),
        refusing("uploadpackfilter.blob:limit.allow"),
        Dialect {
            refuses_blobs: true,
            ..telling_sizes()
        },
    ] {
        let metrics = Metrics::new();
        fixture.server.set_dialect(dialect.clone());
        let before = fixture.server.repo_stats("owner/large").upload_packs;
        let made = work(&fixture.slots_counted(&metrics), &url).await;
        let posts = fixture.server.repo_stats("owner/large").upload_packs - before;
        assert_eq!(parts(&by_git2), parts(&made.unwrap()), "{dialect:?}");
        assert_eq!(counted(&metrics, "object_info_fallback"), 1, "{dialect:?}");
        assert_eq!(counted(&metrics, "object_info"), 0);
        // HEAD, trees, up to two questions in vain, one pack.
        assert!(posts <= 6, "{posts}: {dialect:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_a_server_keeps_back_is_missed_where_it_tells_sizes() {
    let fixture = Fixture::new();
    let files = (0..9).fold(Builder::new(), |b, i| b.file(format!("{i}"), noise(9 + i)));
    files.build(fixture.root.path(), "owner", "few");
    for (dialect, way) in [
        (telling_sizes(), "v2"),
        (
            Dialect {
                filter: Some("blob:limit=15"),
                ..telling_sizes()
            },
            "fallback",
        ),
    ] {
        fixture.server.set_dialect(dialect);
        let metrics = Metrics::new();
        let slots = fixture.slots_counted(&metrics);
        let made = work(&slots, &fixture.url("few")).await.unwrap();
        assert_eq!((made.facts.files, counted(&metrics, way)), (9, 1), "{way}");
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
