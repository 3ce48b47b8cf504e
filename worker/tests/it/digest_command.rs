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
    assert!(ended.stderr.is_empty(), "{ended:?}");
}
