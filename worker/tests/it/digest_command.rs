//! `worker digest`: where the text goes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use testing::small_disk::SmallDisk;

use crate::fixture::as_root;

/// Runs `worker digest` on a repository with one file of 300 kB, in `folder`.
fn digest(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let repository = folder.join("repository");
    if !repository.exists() {
        let git = |arguments: &[&str]| {
            let git = Command::new("git")
                .args(["-c", "user.name=x", "-c", "user.email=x@example.org"])
                .args(arguments)
                .current_dir(&repository)
                .status();
            assert!(git.unwrap().success(), "{arguments:?}");
        };
        fs::create_dir(&repository).unwrap();
        let line = "All of it is text.\n";
        fs::write(repository.join("text"), line.repeat(16_000)).unwrap();
        git(&["init", "--quiet"]);
        git(&["add", "text"]);
        git(&["commit", "--quiet", "--message", "text"]);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
    command
        .args(["digest", "repository"])
        .args(arguments)
        .current_dir(folder);
    command
}

#[test]
fn a_digest_is_written_whole_or_not_at_all() {
    as_root(
        "digest_command::a_digest_is_written_whole_or_not_at_all",
        async {
            let folder = tempfile::tempdir().unwrap();
            let printed = digest(folder.path(), &["-o", "-"]);
            assert!(printed.status.success(), "{printed:?}");
            assert!(printed.stdout.len() > 300_000);
            assert!(!folder.path().join("-").exists());

            let written = |name: &str| {
                let written = digest(folder.path(), &["--output", name]);
                assert!(written.status.success(), "{written:?}");
                assert!(written.stdout.is_empty());
                assert_eq!(fs::read(folder.path().join(name)).unwrap(), printed.stdout);
            };
            written("new");
            fs::write(folder.path().join("old"), "old").unwrap();
            written("old");
            symlink("old", folder.path().join("link")).unwrap();
            written("link");
            assert!(folder.path().join("link").is_symlink());

            let full = folder.path().join("full");
            fs::create_dir(&full).unwrap();
            let _disk = SmallDisk::mount(&full, "100k");
            fs::write(full.join("old"), "old").unwrap();
            for name in ["full/new", "full/old"] {
                let failed = digest(folder.path(), &["-o", name]);
                assert_eq!(failed.status.code(), Some(1), "{failed:?}");
                let said = String::from_utf8(failed.stderr).unwrap();
                for part in [name, "No space left on device", "nothing was written"] {
                    assert!(said.contains(part), "{part:?} in {said}");
                }
            }
            assert_eq!(fs::read(full.join("old")).unwrap(), b"old");
            assert_eq!(fs::read_dir(&full).unwrap().count(), 1);
        },
    );
}

#[test]
fn who_has_read_enough_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = command(folder.path(), &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("what is not committed is left out"), "{said}");
}

/// Runs `worker digest` with these arguments, and `token` as GITHUB_TOKEN, in an empty folder.
fn of(token: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
    command.arg("digest").args(arguments);
    let command = command.current_dir(&folder).env("GITHUB_TOKEN", token);
    command.output().unwrap()
}

#[test]
fn what_is_no_address_of_a_repository_is_refused_with_what_to_say_instead() {
    for (source, said) in [
        (
            "octocat/Hello-World",
            "https://github.com/octocat/Hello-World",
        ),
        ("https://github.com/octocat/Hello-World#main", "# part"),
        (
            "https://github.com/octocat",
            "https://github.com/OWNER/NAME",
        ),
        ("nothing-here", "neither a URL nor a path"),
    ] {
        let ended = of("", &[source]);
        assert_eq!(ended.status.code(), Some(2), "{source}: {ended:?}");
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert!(stderr.contains(said), "{source}: {stderr}");
    }
}

/// At a host that is asked through a proxy which is not there.
#[test]
fn what_people_write_is_asked_for_as_a_repository() {
    for (source, left_out) in [
        ("github.com/octocat/Hello-World/tree/main", true),
        ("https://github.com/octocat/Hello-World/issues/5", true),
        ("git@github.com:octocat/Hello-World.git", false),
    ] {
        let ended = of("", &[source, "--fetch-proxy", "http://127.0.0.1:1"]);
        assert_eq!(ended.status.code(), Some(69), "{source}: {ended:?}");
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert!(stderr.contains("transient: "), "{source}: {stderr}");
        assert_eq!(stderr.contains("always of HEAD"), left_out, "{stderr}");
    }
}

#[test]
fn what_cannot_be_a_token_is_refused_at_once() {
    for token in ["ghp_sesame\n", "\"ghp_sesame\"", " ghp_sesame"] {
        let ended = of(token, &["https://github.com/octocat/Hello-World"]);
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert!(stderr.contains("GITHUB_TOKEN is not a token"), "{stderr}");
        assert!(!stderr.contains("sesame"), "{stderr}");
    }
    // A worker of a fleet does not wait for its broker first.
    let folder = tempfile::tempdir().unwrap();
    let ended = Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["run", "--broker-url", "amqp://127.0.0.1:1"])
        .current_dir(&folder)
        .env("GITHUB_TOKEN", "'ghp_sesame'")
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
}
