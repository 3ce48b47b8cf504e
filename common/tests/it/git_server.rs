//! The git server that other tests rely on.

use std::fs;
use std::io::{self, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use testing::git_server::{Fault, GitServer, Kind};

use crate::raw_http::{Reply, exchange, finish, get, head, send};

const REPO: &str = "octo/hello";
const INFO_REFS: &str = "/octo/hello/info/refs?service=git-upload-pack";

#[test]
fn git_clones_from_it() {
    let served = Served::new();
    for protocol in ["0", "2"] {
        for suffix in ["", ".git"] {
            let protocol = format!("protocol.version={protocol}");
            let url = served.url() + suffix;
            let target = TempDir::new().unwrap();
            succeed(
                target.path(),
                &[
                    "-c", &protocol, "clone", "--bare", "--depth", "1", &url, ".",
                ],
            );
            let shown = git(target.path(), &["show", "HEAD:README.md"]);
            assert_eq!(shown.stdout, b"hello\n");
            let count = git(target.path(), &["rev-list", "--count", "HEAD"]);
            assert_eq!(count.stdout, b"1\n");
        }
    }
    let stats = served.server.repo_stats(REPO);
    assert_eq!((stats.info_refs, stats.upload_packs), (4, 8));
    assert_eq!((stats.packs, stats.faulted_at.len()), (4, 0));
    assert_eq!(served.server.total_fetches(), 4);
    assert!(stats.bytes_sent > 4 * 300_000, "{stats:?}");
    assert_eq!(stats.user_agents.len(), 12);
    assert!(
        stats
            .user_agents
            .iter()
            .all(|agent| agent.starts_with("git/"))
    );
    assert_eq!(stats.authorizations.len(), 0);
    assert_eq!(served.server.stats().len(), 1);
    // One client with one request at a time.
    assert_eq!(served.server.max_concurrent(), 1);
}

#[test]
fn partial_clones_are_allowed_as_on_github() {
    let served = Served::new();
    let target = TempDir::new().unwrap();
    let url = served.url();
    succeed(
        target.path(),
        &["clone", "--bare", "--filter=blob:none", &url, "."],
    );
    assert!(served.server.repo_stats(REPO).bytes_sent < 100_000);
    assert_eq!(served.server.fetches(REPO), 1);
}

#[test]
fn long_negotiations_come_compressed_or_in_chunks() {
    for (buffer, how) in [
        ("1000000", "content-encoding: gzip"),
        // As git sends bodies larger than its buffer.
        ("1", "transfer-encoding: chunked"),
    ] {
        let served = Served::new();
        let target = TempDir::new().unwrap();
        succeed(target.path(), &["init", "--bare", "--quiet", "."]);
        strange_history(target.path());
        let url = served.url();
        let buffer = format!("http.postBuffer={buffer}");
        let arguments = ["-c", "protocol.version=0", "-c", &buffer, "fetch", &url];
        let fetch = git_command(target.path(), &arguments)
            .env("GIT_TRACE_CURL", "1")
            .env("GIT_TRACE_CURL_NO_DATA", "1")
            .output()
            .unwrap();
        let trace = String::from_utf8_lossy(&fetch.stderr).to_lowercase();
        assert!(fetch.status.success(), "{trace}");
        assert!(trace.contains(how), "{trace}");
        assert_eq!(served.server.fetches(REPO), 1);
    }
}

#[test]
fn what_is_not_a_fetch_of_a_repository_is_not_found() {
    let served = Served::new();
    for path in [
        "/octo/missing/info/refs?service=git-upload-pack",
        "/octo/hello/info/refs?service=git-receive-pack",
        "/octo/hello/info/refs",
        "/octo/hello/HEAD",
        "/octo/../octo/hello/info/refs?service=git-upload-pack",
        "/octo/%2e%2e/info/refs?service=git-upload-pack",
        "/",
    ] {
        assert_eq!(get(&served.authority(), path).status, 404, "{path}");
    }
    assert_eq!(served.server.repo_stats("octo/missing").info_refs, 1);
}

#[test]
fn a_status_may_befall_the_post_alone() {
    let served = Served::new();
    served
        .server
        .fault(REPO, Fault::retry_after(429, 7).on(Kind::UploadPack));
    assert_eq!(served.info_refs().status, 200);
    let throttled = served.fetch_v2();
    assert_eq!(throttled.status, 429);
    assert!(throttled.has_header("retry-after: 7"));
    let stats = served.server.repo_stats(REPO);
    assert_eq!((stats.info_refs, stats.upload_packs), (1, 1));
    assert_eq!((stats.packs, stats.faulted_at.len()), (0, 1));
}

#[test]
fn faults_come_in_their_order_and_pass() {
    let served = Served::new();
    served.server.fault(REPO, Fault::status(500).times(2));
    served.server.fault(REPO, Fault::status(503).times(1));
    let statuses: Vec<u16> = (0..4).map(|_| served.info_refs().status).collect();
    assert_eq!(statuses, [500, 500, 503, 200]);

    served.server.fault_all(Fault::status(502));
    served.server.fault(REPO, Fault::status(503));
    assert_eq!(served.info_refs().status, 502);
    served.server.clear_faults();
    assert_eq!(served.info_refs().status, 200);
}

#[test]
fn faults_of_one_repository_are_not_another_ones() {
    let served = Served::new();
    served.server.fault("octo/other", Fault::Hang);
    assert_eq!(served.clone_it().status.code(), Some(0));
}

#[test]
fn redirects() {
    let served = Served::new();
    let location = "http://127.0.0.1:1/else/where".to_owned();
    served.server.fault(
        REPO,
        Fault::Redirect {
            code: 302,
            location,
        },
    );
    let redirect = served.info_refs();
    assert_eq!(redirect.status, 302);
    assert!(redirect.has_header("location: http://127.0.0.1:1/else/where"));

    served.server.clear_faults();
    let to = served.url();
    served.server.fault("octo/old-name", Fault::Moved { to });
    let target = TempDir::new().unwrap();
    let old = served.server.repo_url("octo", "old-name");
    succeed(target.path(), &["clone", "--bare", &old, "."]);
    assert_eq!(served.server.fetches(REPO), 1);
    assert_eq!(served.server.repo_stats("octo/old-name").info_refs, 1);
}

#[test]
fn a_reset_is_a_reset() {
    let served = Served::new();
    served.server.fault(REPO, Fault::Reset);
    let error = exchange(&served.authority(), &head("GET", INFO_REFS, "")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn slow_answers_are_slow_and_right() {
    let served = Served::new();
    let right = served.info_refs().body;

    served.server.set_latency(Duration::from_millis(40));
    let latency = Fault::Latency(Duration::from_millis(30));
    served.server.fault(REPO, latency);
    let started = Instant::now();
    assert_eq!(served.info_refs().body, right);
    assert!(started.elapsed() >= Duration::from_millis(70));

    served.server.set_latency(Duration::ZERO);
    served.server.clear_faults();
    let bytes_per_second = 10 * right.len() as u64;
    served.server.fault(REPO, Fault::Drip { bytes_per_second });
    let started = Instant::now();
    assert_eq!(served.info_refs().body, right);
    assert!(started.elapsed() >= Duration::from_millis(100));
}

#[test]
fn held_requests_are_answered_once_they_are_let_go() {
    let served = Served::new();
    let right = served.info_refs().body;
    served.server.set_held(true);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| served.info_refs().body);
        served.server.wait_for_requests(REPO, 2);
        assert!(!waiting.is_finished());
        served.server.set_held(false);
        assert_eq!(waiting.join().unwrap(), right);
    });
}

#[test]
fn truncated_answers_end_where_they_should_and_are_not_packs() {
    let served = Served::new();
    for after_bytes in [0, 1, 100_000] {
        served.server.clear_faults();
        let cut = Fault::Truncate { after_bytes };
        served.server.fault(REPO, cut.on(Kind::UploadPack));
        let reply = served.fetch_v2();
        assert_eq!((reply.body.len() as u64, reply.whole), (after_bytes, false));
        assert!(!served.clone_it().status.success());
    }
    served.server.clear_faults();
    let after_bytes = u64::MAX;
    served.server.fault(REPO, Fault::Truncate { after_bytes });
    assert!(!served.fetch_v2().whole);
    assert_eq!(served.server.fetches(REPO), 0);
}

#[test]
fn stalled_answers_stop_and_stay() {
    let served = Served::new();
    let stall = Fault::Stall { after_bytes: 1000 };
    served.server.fault(REPO, stall.on(Kind::UploadPack));
    let mut connection = send(&served.authority(), &served.fetch_v2_request()).unwrap();
    // The response's head, the chunk's length and the chunk.
    let mut first = Vec::new();
    while !first.windows(4).any(|four| four == b"PACK") {
        let mut byte = [0];
        connection.read_exact(&mut byte).unwrap();
        first.extend(byte);
    }
    connection.set_nonblocking(true).unwrap();
    let rest = io::copy(&mut connection, &mut io::sink()).unwrap_err();
    assert_eq!(rest.kind(), io::ErrorKind::WouldBlock);
    assert_eq!(served.server.fetches(REPO), 0);
    assert!(served.server.repo_stats(REPO).bytes_sent <= 1000);
}

#[test]
fn one_byte_of_a_corrupted_pack_is_wrong() {
    let served = Served::new();
    let right = served.fetch_pack();
    for at in [0, 12, 100_000, right.len() - 1] {
        served.server.clear_faults();
        let corrupt = Fault::Corrupt { at: at as u64 };
        served.server.fault(REPO, corrupt);
        let mut wrong = served.fetch_pack();
        assert_ne!(wrong, right);
        wrong[at] = !wrong[at];
        assert_eq!(wrong, right);
        assert!(!served.clone_it().status.success());
    }
    served.server.clear_faults();
    let beyond = Fault::Corrupt {
        at: right.len() as u64,
    };
    served.server.fault(REPO, beyond);
    assert_eq!(served.fetch_pack(), right);
}

#[test]
fn a_web_page_is_no_git_server() {
    let served = Served::new();
    served.server.fault(REPO, Fault::WrongContentType);
    let page = served.info_refs();
    assert_eq!(page.status, 200);
    assert!(page.has_header("content-type: text/html; charset=utf-8"));
    assert!(!served.clone_it().status.success());
}

#[test]
fn a_huge_advertisement_is_one_that_git_understands() {
    let served = Served::new();
    let huge = Fault::HugeAdvertisement { bytes: 1_000_000 };
    served.server.fault(REPO, huge);
    let reply = served.info_refs();
    assert!(reply.whole);
    assert!((960_000..1_010_000).contains(&reply.body.len()));
    let listed = git(served.root.path(), &["ls-remote", &served.url()]);
    assert!(listed.status.success(), "{listed:?}");
    let count = listed.stdout.iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(count, 13_001);
}

#[test]
fn floods_last_until_the_client_has_enough() {
    let served = Served::new();
    served.server.fault(REPO, Fault::Flood);
    let mut v0_post = head(
        "POST",
        "/octo/hello/git-upload-pack",
        "content-length: 4\r\n",
    );
    v0_post.extend(b"0000");
    for request in [
        head("GET", INFO_REFS, ""),
        v0_post,
        served.fetch_v2_request(),
    ] {
        let mut connection = send(&served.authority(), &request).unwrap();
        let mut enough = vec![0; 4 << 20];
        connection.read_exact(&mut enough).unwrap();
    }
    assert_eq!(served.server.fetches(REPO), 0);
}

#[test]
fn a_private_repository_wants_its_token() {
    let served = Served::new();
    let token = Fault::RequireToken("s3cret".to_owned());
    served.server.fault(REPO, token);
    let refused = served.info_refs();
    assert_eq!(refused.status, 401);
    assert!(refused.has_header("www-authenticate: basic realm=\"github\""));
    assert!(!served.clone_it().status.success());
    assert_eq!(served.server.repo_stats(REPO).authorizations.len(), 0);

    let authority = served.authority();
    let target = TempDir::new().unwrap();
    for (token, accepted) in [("wrong", false), ("s3cret", true)] {
        let url = format!("http://x-access-token:{token}@{authority}/{REPO}");
        let clone = git(target.path(), &["clone", "--bare", &url, "."]);
        assert_eq!(clone.status.success(), accepted, "{clone:?}");
    }
    let authorizations = served.server.repo_stats(REPO).authorizations;
    assert_eq!(
        authorizations.last().map(String::as_str),
        Some("Basic eC1hY2Nlc3MtdG9rZW46czNjcmV0")
    );
}

#[test]
fn dropping_it_ends_what_hangs_and_frees_the_port() {
    let served = Served::new();
    served.server.fault(REPO, Fault::Hang);
    let authority = served.authority();
    let hanging = send(&authority, &head("GET", INFO_REFS, "")).unwrap();
    served.server.wait_for_requests(REPO, 1);
    drop(served);
    assert!(finish(hanging).is_err());
    TcpListener::bind(authority).unwrap();
}

#[test]
fn no_process_outlives_the_server() {
    let served = Served::new();
    let connection = served.slow_pack();
    assert_ne!(processes_about(served.root.path()), 0);
    let Served { server, root } = served;
    drop(server);
    wait_until_none_is_about(root.path());
    drop(connection);
}

#[test]
fn no_process_outlives_a_client_that_left() {
    let served = Served::new();
    let connection = served.slow_pack();
    assert_ne!(processes_about(served.root.path()), 0);
    drop(connection);
    wait_until_none_is_about(served.root.path());
    assert_eq!(served.server.fetches(REPO), 0);
}

#[test]
fn only_loopback_is_listened_on() {
    let root = TempDir::new().unwrap();
    let everywhere = "0.0.0.0:0".parse().unwrap();
    assert!(GitServer::start_at(root.path(), everywhere).is_err());
}

/// A server with one repository.
struct Served {
    server: GitServer,
    root: TempDir,
}

impl Served {
    /// [`REPO`] has two commits, a small file and one of 300 kB that does not compress.
    fn new() -> Self {
        let work = TempDir::new().unwrap();
        let noise = {
            let mut random = fastrand::Rng::with_seed(1);
            std::iter::repeat_with(move || random.u8(..))
        };
        succeed(work.path(), &["init", "--quiet", "--initial-branch=main"]);
        fs::write(work.path().join("README.md"), "hi\n").unwrap();
        succeed(work.path(), &["add", "."]);
        succeed(work.path(), &["commit", "--quiet", "-m", "first"]);
        fs::write(work.path().join("README.md"), "hello\n").unwrap();
        let noise: Vec<u8> = noise.take(300_000).collect();
        fs::write(work.path().join("noise.bin"), noise).unwrap();
        succeed(work.path(), &["add", "."]);
        succeed(work.path(), &["commit", "--quiet", "-m", "second"]);

        let root = TempDir::new().unwrap();
        let directory = root.path().join(format!("{REPO}.git"));
        fs::create_dir_all(&directory).unwrap();
        let from = work.path().to_str().unwrap();
        succeed(&directory, &["clone", "--quiet", "--bare", from, "."]);
        let server = GitServer::start(root.path());
        Self { server, root }
    }

    fn authority(&self) -> String {
        self.server.authority()
    }

    fn url(&self) -> String {
        self.server.repo_url("octo", "hello")
    }

    fn info_refs(&self) -> Reply {
        get(&self.authority(), INFO_REFS)
    }

    fn fetch_v2(&self) -> Reply {
        exchange(&self.authority(), &self.fetch_v2_request()).unwrap()
    }

    /// Requests the last commit and its history, in protocol v2, in one request.
    fn fetch_v2_request(&self) -> Vec<u8> {
        let line = |text: &str| format!("{:04x}{text}", text.len() + 4);
        let want = git(
            &self.root.path().join(format!("{REPO}.git")),
            &["rev-parse", "main"],
        );
        let want = String::from_utf8(want.stdout).unwrap();
        let body = [
            &line("command=fetch"),
            "0001",
            &line("no-progress"),
            &line(&format!("want {want}")),
            &line("done"),
            "0000",
        ]
        .concat();
        let headers = format!(
            "git-protocol: version=2\r\ncontent-type: application/x-git-upload-pack-request\r\n\
             content-length: {}\r\n",
            body.len()
        );
        let mut request = head("POST", "/octo/hello/git-upload-pack", &headers);
        request.extend(body.into_bytes());
        request
    }

    /// Returns the pack without git's framing, which differs each time.
    fn fetch_pack(&self) -> Vec<u8> {
        let body = self.fetch_v2().body;
        let mut rest = &body[..];
        let mut pack = Vec::new();
        while let Some((length, _)) = rest.split_at_checked(4) {
            let length = std::str::from_utf8(length).unwrap();
            let length = usize::from_str_radix(length, 16).unwrap().max(4);
            if let [1, data @ ..] = &rest[4..length] {
                pack.extend_from_slice(data);
            }
            rest = &rest[length..];
        }
        assert_ne!(pack.len(), 0);
        pack
    }

    fn clone_it(&self) -> Output {
        let target = TempDir::new().unwrap();
        git(target.path(), &["clone", "--bare", &self.url(), "."])
    }

    /// Starts a pack that takes hours: git waits to send it.
    fn slow_pack(&self) -> std::net::TcpStream {
        let drip = Fault::Drip {
            bytes_per_second: 20,
        };
        self.server.fault(REPO, drip);
        let mut connection = send(&self.authority(), &self.fetch_v2_request()).unwrap();
        connection.read_exact(&mut [0]).unwrap();
        connection
    }
}

/// Returns commits that the server does not have.
fn strange_history(directory: &Path) {
    let stream: String = (1..=200)
        .map(|number| {
            format!(
                "commit refs/heads/mine\ncommitter x <x@example.org> {number} +0000\ndata 0\n\n"
            )
        })
        .collect();
    let file = directory.join("stream");
    fs::write(&file, stream).unwrap();
    let import = git_command(directory, &["fast-import", "--quiet"])
        .stdin(fs::File::open(file).unwrap())
        .output()
        .unwrap();
    assert!(import.status.success(), "{import:?}");
}

/// Counts the processes with `root` in their environment.
fn processes_about(root: &Path) -> usize {
    let root = root.as_os_str().as_encoded_bytes();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| fs::read(entry.path().join("environ")).ok())
        .filter(|environ| environ.windows(root.len()).any(|part| part == root))
        .count()
}

/// Waits: a killed process takes a moment to be gone.
fn wait_until_none_is_about(root: &Path) {
    let started = Instant::now();
    while processes_about(root) > 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "still running");
        thread::sleep(Duration::from_millis(5));
    }
}

fn succeed(directory: &Path, arguments: &[&str]) {
    let output = git(directory, arguments);
    assert!(output.status.success(), "git {arguments:?}: {output:?}");
}

fn git(directory: &Path, arguments: &[&str]) -> Output {
    git_command(directory, arguments).output().unwrap()
}

fn git_command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(directory)
        .args(arguments)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_AUTHOR_NAME", "nobody")
        .env("GIT_AUTHOR_EMAIL", "nobody@example.org")
        .env("GIT_COMMITTER_NAME", "nobody")
        .env("GIT_COMMITTER_EMAIL", "nobody@example.org")
        .env("NO_PROXY", "127.0.0.1")
        .env("no_proxy", "127.0.0.1");
    command
}
