//! The test server itself: if it lies, every test that leans on it does.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::testing::git_server::GitServer;
use tempfile::TempDir;

#[test]
fn git_clones_from_it() {
    let (_root, server) = one_repository();
    for protocol in ["0", "2"] {
        for suffix in ["", ".git"] {
            let url = server.repo_url("octo", "hello") + suffix;
            let target = TempDir::new().unwrap();
            let protocol = format!("protocol.version={protocol}");
            let clone = [
                "-c", &protocol, "clone", "--bare", "--depth", "1", &url, ".",
            ];
            assert!(git(target.path(), &clone).status.success());
            let shown = git(target.path(), &["show", "HEAD:README.md"]);
            assert_eq!(shown.stdout, b"hello\n");
        }
    }
    assert_eq!(server.fetches("octo/hello"), 4);
}

/// `octo/hello`: two commits, a small file and one of 300 kB that does not compress.
fn one_repository() -> (TempDir, GitServer) {
    let root = TempDir::new().unwrap();
    let directory = root.path().join("octo/hello.git");
    fs::create_dir_all(&directory).unwrap();
    let work = TempDir::new().unwrap();
    succeed(work.path(), &["init", "--quiet", "--initial-branch=main"]);
    fs::write(work.path().join("README.md"), "hi\n").unwrap();
    succeed(work.path(), &["add", "."]);
    succeed(work.path(), &["commit", "--quiet", "-m", "first"]);
    fs::write(work.path().join("README.md"), "hello\n").unwrap();
    fs::write(work.path().join("noise.bin"), noise(300_000)).unwrap();
    succeed(work.path(), &["add", "."]);
    succeed(work.path(), &["commit", "--quiet", "-m", "second"]);
    let from = work.path().to_str().unwrap();
    succeed(&directory, &["clone", "--quiet", "--bare", from, "."]);
    let server = GitServer::start(root.path());
    (root, server)
}

fn noise(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    std::iter::repeat_with(|| random.u8(..))
        .take(length)
        .collect()
}

fn succeed(directory: &Path, arguments: &[&str]) {
    let output = git(directory, arguments);
    assert!(output.status.success(), "git {arguments:?}: {output:?}");
}

fn git(directory: &Path, arguments: &[&str]) -> Output {
    Command::new("git")
        .current_dir(directory)
        .args(arguments)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_AUTHOR_NAME", "nobody")
        .env("GIT_AUTHOR_EMAIL", "nobody@example.org")
        .env("GIT_COMMITTER_NAME", "nobody")
        .env("GIT_COMMITTER_EMAIL", "nobody@example.org")
        .env_remove("http_proxy")
        .env_remove("HTTP_PROXY")
        .env_remove("ALL_PROXY")
        .output()
        .unwrap()
}
