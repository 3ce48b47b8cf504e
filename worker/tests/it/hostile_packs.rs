//! Packs made to waste time or memory, on either way.
//!
//! Memory is bounded by the limit on a slot's address space, which is more than what it uses. What was
//! measured of a release build is beside each.

use std::sync::Arc;

use common::fault::{Fault, FaultKind};
use testing::http_server::{HttpServer, Response};
use testing::packs::Mode::{Directory, File};
use testing::packs::{Id, Kind, PackWriter, appending, hex, object_name, repeating, tree, varint};
use worker::fetch::policy::FetchMode;
use worker::slot::SlotOutput;

use crate::fixture::{Fixture, work};

/// Returns packets of these texts, and a flush.
pub(crate) fn packets(texts: &[&[u8]]) -> Vec<u8> {
    let mut all = Vec::new();
    for text in texts {
        all.extend(format!("{:04x}", text.len() + 4).as_bytes());
        all.extend_from_slice(text);
    }
    all.extend_from_slice(b"0000");
    all
}

/// A server of one repository that answers requests for its pack with `answer`.
pub(crate) fn server_of(answer: impl Fn() -> Response + Send + Sync + 'static) -> HttpServer {
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
pub(crate) fn gits(kind: &str, body: Vec<u8>) -> Response {
    let kind = format!("application/x-git-upload-pack-{kind}");
    Response::new(200, body).header("content-type", kind)
}

/// A response with this pack.
pub(crate) fn with_pack(pack: &[u8]) -> Response {
    gits("result", packets_of_pack(b"packfile\n", pack))
}

/// Returns a line, and a pack in its side band.
fn packets_of_pack(first: &[u8], pack: &[u8]) -> Vec<u8> {
    let pieces = pack
        .chunks(60_000)
        .map(|piece| [&b"\x01"[..], piece].concat());
    let pieces: Vec<Vec<u8>> = pieces.collect();
    let mut lines = vec![first];
    lines.extend(pieces.iter().map(Vec::as_slice));
    packets(&lines)
}

/// A server of this pack, by protocol v0 and v2.
fn server_of_pack(pack: Vec<u8>, commit: Id) -> HttpServer {
    let commit = hex(commit);
    let pack = Arc::new(pack);
    HttpServer::start(move |request| {
        let body = String::from_utf8_lossy(&request.body);
        if request.method == "GET" {
            let v2 = [&b"version 2\n"[..], b"ls-refs\n", b"fetch=shallow filter\n"];
            let features = "multi_ack shallow side-band-64k ofs-delta";
            let v0 = format!("{commit} HEAD\0{features}\n");
            let body = match request.header("git-protocol") {
                Some(_) => packets(&v2),
                None => [
                    packets(&[b"# service=git-upload-pack\n"]),
                    packets(&[v0.as_bytes()]),
                ]
                .concat(),
            };
            gits("advertisement", body)
        } else if body.contains("command=ls-refs") {
            gits("result", packets(&[format!("{commit} HEAD\n").as_bytes()]))
        } else if body.contains("command=fetch") {
            with_pack(&pack)
        } else {
            let mut answer = packets(&[format!("shallow {commit}").as_bytes()]);
            if body.contains("done") {
                answer.extend(packets_of_pack(b"NAK\n", &pack));
            }
            gits("result", answer)
        }
    })
}

/// Makes a digest of a pack in a slot of 200 MiB, and what its program takes.
async fn digest(mode: FetchMode, pack: &PackWriter, commit: Id) -> Result<SlotOutput, Fault> {
    let mut fixture = Fixture::new();
    let pack = pack.finish();
    fixture.policy.max_bytes = pack.len() as u64 + (1 << 20);
    // Program, libraries and stacks take 30 MiB or so.
    fixture.config.child.address_space = (240 << 20) - fixture.policy.max_bytes;
    // Seconds of CPU, but tests run beside it.
    fixture.config.timeout = 300;
    let server = server_of_pack(pack, commit);
    let host = server.authority().parse().unwrap();
    fixture.policy.hosts.push(host);
    fixture.policy.mode = mode;
    let url = format!("{}/owner/bad", server.url());
    work(&fixture.slots(), &url).await
}

/// A pack, its commit, and what is said of it.
type Case = (PackWriter, Id, &'static str);

/// Writes a commit whose one tree is `root`.
fn with_root(mut pack: PackWriter, root: Id, said: &'static str) -> Case {
    let commit = pack.commit(root);
    (pack, commit, said)
}

/// Writes a pack of a small file, and `more`.
fn with(more: impl FnOnce(&mut PackWriter), said: &'static str) -> Case {
    let mut pack = PackWriter::default();
    let blob = pack.blob(b"text\n");
    more(&mut pack);
    let root = pack.tree(&[(File, "a", blob)]);
    with_root(pack, root, said)
}

/// Returns a tree of this many bytes at most, all one file.
fn large_tree(blob: Id, bytes: usize, name: impl Fn(usize) -> String) -> Vec<u8> {
    let size = 28 + name(0).len();
    let names: Vec<String> = (0..bytes / size).map(name).collect();
    let entries: Vec<_> = names
        .iter()
        .map(|name| (File, name.as_str(), blob))
        .collect();
    tree(&entries)
}

/// Folders that share one tree.
fn shared_tree(folders: usize, bytes: usize, said: &'static str) -> Case {
    let mut pack = PackWriter::default();
    let blob = pack.blob(b"text\n");
    let shared = large_tree(blob, bytes, |i| format!("{i:07}"));
    let shared = pack.object(Kind::Tree, &shared).1;
    let names: Vec<String> = (0..folders).map(|i| format!("d{i:04}")).collect();
    let entries: Vec<_> = names
        .iter()
        .map(|name| (Directory, name.as_str(), shared))
        .collect();
    let root = pack.tree(&entries);
    with_root(pack, root, said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_costs_too_much_is_given_up_before_it_does() {
    // Each 0.02 s, 14 MB.
    for (pack, commit, said) in [
        shared_tree(
            3000,
            64 << 20,
            "a tree has 67108860 bytes, more than 16777216",
        ),
        with(
            |pack| {
                let base = pack.object(Kind::Blob, &[0; 1 << 16]).0;
                for i in 0..2000 {
                    pack.delta(base, &repeating(64 << 20, i));
                }
            },
            "bytes or more, which is over 4294967296",
        ),
        with(|pack| pack.zeros(4096), "4294967301 bytes or more"),
        with(
            |pack| _ = pack.raw(1, 300 << 20, &[b"x"]),
            "a commit has 314572800 bytes, more than 1048576",
        ),
        with(
            |pack| _ = pack.raw(4, 300 << 20, &[b"x"]),
            "a tag has 314572800 bytes, more than 1048576",
        ),
    ] {
        for mode in [FetchMode::V2, FetchMode::Git2] {
            let fault = digest(mode, &pack, commit).await.unwrap_err();
            assert_eq!(
                fault.kind,
                FaultKind::TooLarge,
                "{said} by {mode:?}: {fault}"
            );
            assert!(fault.message.contains(said), "{said} by {mode:?}: {fault}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_that_is_there_thousands_of_times_is_read_a_few_times() {
    // 0.2 s, 43 MB; by libgit2 0.3 s, 50 MB.
    let (pack, commit, _) = shared_tree(3000, 15 << 20, "");
    for mode in [FetchMode::V2, FetchMode::Git2] {
        let made = digest(mode, &pack, commit).await.unwrap();
        assert_eq!(made.facts.files, 10_000);
        assert!(made.facts.notices[0].contains("10,000 files"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nested_directories_of_long_names_end_at_a_budget() {
    let mut pack = PackWriter::default();
    let blob = pack.blob(b"text\n");
    let mut inner = pack.tree(&[(File, "f", blob)]);
    for _ in 0..19 {
        let mut large = large_tree(blob, 15 << 20, |i| format!("X{i:0254}"));
        large.extend(tree(&[(Directory, "z", inner)]));
        inner = pack.object(Kind::Tree, &large).1;
    }
    let (pack, commit, _) = with_root(pack, inner, "");
    for mode in [FetchMode::V2, FetchMode::Git2] {
        let made = digest(mode, &pack, commit).await.unwrap();
        assert_eq!(made.facts.files, 10_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_nested_trees_are_no_recursion() {
    // 0.2 s, 32 MB.
    let mut pack = PackWriter::default();
    let blob = pack.blob(b"text\n");
    let mut tree = pack.tree(&[(File, "f", blob)]);
    for _ in 0..100_000 {
        tree = pack.tree(&[(Directory, "d", tree)]);
    }
    let (pack, commit, _) = with_root(pack, tree, "");
    for mode in [FetchMode::V2, FetchMode::Git2] {
        assert_eq!(digest(mode, &pack, commit).await.unwrap().facts.files, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_objects_as_are_allowed_have_room() {
    for (mode, objects) in [(FetchMode::V2, 2_000_000_u32), (FetchMode::Git2, 800_000)] {
        let mut pack = PackWriter::default();
        let base = pack.blob(b"text\n");
        // All but this, a tree and a commit.
        for i in 3..objects {
            pack.named_delta(base, &appending(5, &i.to_be_bytes()));
        }
        let root = pack.tree(&[(File, "a", base)]);
        let (pack, commit, _) = with_root(pack, root, "");
        let made = digest(mode, &pack, commit).await.unwrap();
        assert_eq!(made.facts.files, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_chain_of_deltas_is_read() {
    // Of 100,000: 0.7 s, 35 MB.
    const LENGTH: usize = 20_000;
    let mut pack = PackWriter::default();
    let base = [7; 1000];
    let mut at = pack.object(Kind::Blob, &base).0;
    for i in 0..LENGTH {
        at = pack.delta(at, &appending(1000 + i, b"x"));
    }
    let text = [&base[..], &[b'x'; LENGTH]].concat();
    let root = pack.tree(&[(File, "a", object_name(Kind::Blob, &text))]);
    let (pack, commit, _) = with_root(pack, root, "");
    // libgit2 gives up at such a length.
    let made = digest(FetchMode::V2, &pack, commit).await.unwrap();
    assert!(made.content.contains(&"x".repeat(LENGTH)));
}

/// libgit2 makes each object from its first base on, unless that is among the small ones that it keeps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chains_that_libgit2_would_resolve_for_minutes_are_given_up() {
    let mut pack = PackWriter::default();
    let base = vec![0; 15 << 20];
    let mut at = pack.object(Kind::Blob, &base).0;
    for i in 0..120 {
        at = pack.delta(at, &appending(base.len() + i, b"x"));
    }
    let blob = pack.blob(b"text\n");
    let root = pack.tree(&[(File, "a", blob)]);
    let (placed, commit, _) = with_root(pack, root, "");
    let fault = digest(FetchMode::Git2, &placed, commit).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::TooLarge, "{fault}");
    let said = "bytes or more, which is over 34359738368";
    assert!(fault.message.contains(said), "{fault}");

    // In the worst order: each look at all deltas finds one whose base is there.
    let mut pack = PackWriter::default();
    let blob = pack.blob(b"text\n");
    let base = [7; 100];
    let texts: Vec<_> = (0..200_000_u32)
        .map(|i| [&base[..], &i.to_be_bytes()].concat())
        .collect();
    for texts in texts.windows(2).rev() {
        let number = &texts[1][base.len()..];
        let size = varint(texts[1].len() as u64);
        // The base's first bytes, and four others.
        let delta = [&size[..], &size, &[0x90, 100, 4], number].concat();
        pack.named_delta(object_name(Kind::Blob, &texts[0]), &delta);
    }
    pack.object(Kind::Blob, &texts[0]);
    let root = pack.tree(&[(File, "a", blob)]);
    let (named, commit, _) = with_root(pack, root, "");
    let fault = digest(FetchMode::Git2, &named, commit).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::TooLarge, "{fault}");
    assert!(fault.message.contains("s of CPU"), "{fault}");
    let made = digest(FetchMode::V2, &named, commit).await.unwrap();
    assert_eq!(made.facts.files, 1);
}

#[tokio::test]
async fn a_pack_that_claims_too_much_is_given_up_at_its_header() {
    // A blob of 4 GiB and one byte, of which only the header is there.
    let blob = [0xb1, 0x80, 0x80, 0x80, 0x80, 0x01];
    let too_many = [&b"PACK\0\0\0\x02"[..], &[0xff; 4]].concat();
    let too_long = [&b"PACK\0\0\0\x02\0\0\0\x01"[..], &blob].concat();
    for (pack, part) in [
        (too_many, "4294967295 objects"),
        (too_long, "bytes or more"),
    ] {
        for (mode, requests) in [(FetchMode::Auto, 3), (FetchMode::Git2, 3)] {
            let mut fixture = Fixture::new();
            // Without room for a part of it.
            fixture.config.child.address_space = 100 << 20;
            fixture.policy.max_bytes = 1 << 20;
            fixture.policy.mode = mode;
            let server = server_of_pack(pack.clone(), [1; 20]);
            let host = server.authority().parse().unwrap();
            fixture.policy.hosts.push(host);
            let url = format!("{}/owner/bad", server.url());
            let fault = work(&fixture.slots(), &url).await.unwrap_err();
            assert_eq!(fault.kind, FaultKind::TooLarge, "{fault}");
            assert!(fault.message.contains(part), "{fault}");
            assert_eq!(
                server.request_count(),
                requests,
                "nobody tries the other way"
            );
        }
    }
}
