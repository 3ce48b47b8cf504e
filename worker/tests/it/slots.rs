//! Slots: limits, endings, hostile repositories and hostile children.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::fault::FaultKind;
use common::telemetry::traces::Span;
use rustix::process::{Pid, Signal, kill_process};
use testing::git_server::Fault as Trouble;
use testing::packs::Mode;
use testing::repositories::{
    BombLeaf, Builder, Raw, empty, git_bomb, many_files, nested_directories,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use worker::fetch::policy::FetchMode;
use worker::slot::slots::Slots;
use worker::slot::{SlotError, SlotResult};

use crate::fixture::{
    Fixture, TEXT, as_root, build_over_memory, exists, git, noise, subject, until, work,
};
use testing::small_disk::SmallDisk;

use FaultKind::{Infra, Killed, TooLarge, Transient};

/// Starts work on `owner/bad`, for which the server hangs.
fn start_hanging(
    fixture: &Fixture,
    slots: &Arc<Slots>,
    stop: &CancellationToken,
) -> JoinHandle<Result<SlotResult, SlotError>> {
    fixture.server.fault("owner/bad", Trouble::Hang);
    let (slots, stop, url) = (Arc::clone(slots), stop.clone(), fixture.url("bad"));
    tokio::spawn(async move {
        slots
            .work(&url, subject(), None, &stop, &Span::default())
            .await
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_killed_costs_its_own_job_only() {
    let fixture = Fixture::new();
    let slots = fixture.slots();
    let job = start_hanging(&fixture, &slots, &CancellationToken::new());
    let child = fixture.child_at_work();
    // Out of memory, the kernel would kill it before this process.
    let first = fs::read_to_string(format!("/proc/{}/oom_score_adj", child.as_raw_nonzero()));
    assert_eq!(first.unwrap().trim(), "500");
    kill_process(child, Signal::KILL).unwrap();
    let SlotError::Fault(fault) = job.await.unwrap().unwrap_err() else {
        panic!("nobody stopped it")
    };
    assert_eq!(fault.kind, Killed);
    for part in ["signal 9", "fetching, 0 bytes fetched"] {
        assert!(fault.message.contains(part), "{fault}");
    }
    assert!(work(&slots, &fixture.url("good")).await.is_ok());
    drop(slots);
    fixture.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_stopped_ends_at_once_and_leaves_nothing() {
    let mut fixture = Fixture::new();
    fixture.config.concurrency = Some(1);
    let slots = fixture.slots();
    let stop = CancellationToken::new();
    let job = start_hanging(&fixture, &slots, &stop);
    let child = fixture.child_at_work();
    // This one waits for the only slot.
    let waiting = start_hanging(&fixture, &slots, &stop);
    stop.cancel();
    for job in [job, waiting] {
        assert!(matches!(job.await.unwrap(), Err(SlotError::Stopped)));
    }
    assert!(!exists(child));
    assert_eq!(fixture.children(), []);
    let left = fs::read_dir(fixture.scratch.path()).unwrap().flatten();
    let folders = left.filter(|entry| entry.path().is_dir());
    let jobs: usize = folders
        .map(|folder| fs::read_dir(folder.path()).unwrap().count())
        .sum();
    assert_eq!(jobs, 0);
    assert!(work(&slots, &fixture.url("good")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_dropped_ends_its_slot() {
    let fixture = Fixture::new();
    let slots = fixture.slots();
    let job = start_hanging(&fixture, &slots, &CancellationToken::new());
    let child = fixture.child_at_work();
    job.abort();
    assert!(job.await.unwrap_err().is_cancelled());
    until("the child is gone", || !exists(child)).await;
    assert!(work(&slots, &fixture.url("good")).await.is_ok());
    drop(slots);
    fixture.assert_nothing_left();
}

#[tokio::test]
async fn memory_has_a_limit() {
    let mut fixture = Fixture::new();
    Builder::new()
        .file("zeros", vec![b'0'; 96 << 20])
        .build(fixture.root.path(), "owner", "wide");
    fixture.limits.max_file_bytes = 200 << 20;
    fixture.policy.max_bytes = 16 << 20;
    fixture.config.child.address_space = 64 << 20;
    let fault = fixture.make("wide").await.unwrap_err();
    assert_eq!(fault.kind, Killed, "{fault}");
    assert!(fault.message.contains("memory limit"), "{fault}");
}

#[tokio::test]
async fn files_have_a_limit() {
    let mut fixture = Fixture::new();
    Builder::new()
        .file("noise", noise(1 << 20))
        .build(fixture.root.path(), "owner", "long");
    build_over_memory(fixture.root.path());
    fixture.config.child.file_bytes = Some(100_000);
    for (mode, name) in [(FetchMode::Git2, "long"), (FetchMode::V2, "over-memory")] {
        fixture.policy.mode = mode;
        let fault = fixture.make(name).await.unwrap_err();
        assert_eq!(fault.kind, TooLarge, "{fault}");
        assert!(fault.message.contains("file limit"), "{fault}");
    }
}

#[test]
fn a_full_disk_is_no_repositorys_fault() {
    as_root("slots::a_full_disk_is_no_repositorys_fault", async {
        let mut fixture = Fixture::new();
        let disk = SmallDisk::mount(fixture.scratch.path(), "2m");
        build_over_memory(fixture.root.path());
        for mode in [FetchMode::V2, FetchMode::Git2] {
            fixture.policy.mode = mode;
            let slots = fixture.slots();
            let fault = work(&slots, &fixture.url("over-memory")).await.unwrap_err();
            assert_eq!(fault.kind, Infra, "{fault}");
            for part in ["No space left on device", "make room", "--scratch"] {
                assert!(fault.message.contains(part), "{fault}");
            }
            slots.probe().await.expect("what it left was removed");
            assert!(work(&slots, &fixture.url("good")).await.is_ok());
        }
        let slots = fixture.slots();

        // Full with other data.
        let other = fixture.scratch.path().join("other");
        fs::write(&other, vec![0; 4 << 20]).unwrap_err();
        assert_eq!(slots.probe().await.unwrap_err().kind, Infra);
        let fault = work(&slots, &fixture.url("good")).await.unwrap_err();
        assert_eq!(fault.kind, Infra, "{fault}");
        assert!(fault.message.contains("--scratch"), "{fault}");
        fs::remove_file(&other).unwrap();
        assert!(work(&slots, &fixture.url("good")).await.is_ok());
        drop(slots);
        fixture.assert_nothing_left();
        drop(disk);
    });
}

/// `worker digest` of `owner/bad`, on which it hangs.
fn worker_on_hanging(fixture: &Fixture) -> Child {
    fixture.server.fault("owner/bad", Trouble::Hang);
    Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["digest", &fixture.url("bad"), "--allow-http"])
        .args(["--allow-host", &fixture.server.authority()])
        .arg("--scratch")
        .arg(fixture.scratch.path())
        .env("AWS_SECRET_ACCESS_KEY", "secret-of-the-store")
        .env("GITHUB_TOKEN", "secret-of-github")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Returns the open files of the process in `/proc/…`.
fn files_of(process: &Path) -> BTreeSet<String> {
    fs::read_dir(process.join("fd"))
        .unwrap()
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .map(|file| file.display().to_string())
        .collect()
}

#[test]
fn a_slot_knows_no_secrets_and_holds_no_files_of_its_parent() {
    let name = "slots::a_slot_knows_no_secrets_and_holds_no_files_of_its_parent";
    // Only root can inspect a process that is not dumpable.
    as_root(name, async {
        let fixture = Fixture::new();
        let mut worker = worker_on_hanging(&fixture);
        let child = PathBuf::from(format!("/proc/{}", fixture.child_at_work()));
        for file in ["environ", "cmdline"] {
            let text = String::from_utf8(fs::read(child.join(file)).unwrap()).unwrap();
            assert!(!text.contains("secret"), "{text}");
        }
        let parent = PathBuf::from(format!("/proc/{}", worker.id()));
        // Inherited by every process that this one starts.
        let given = files_of(Path::new("/proc/self"));
        let mut shared: BTreeSet<_> = &files_of(&child) & &files_of(&parent);
        shared.retain(|file| !given.contains(file));
        let pipes = shared.iter().filter(|file| file.starts_with("pipe:"));
        // Its output and error pipes; its input is closed.
        assert_eq!((shared.len(), pipes.count()), (2, 2), "{shared:?}");

        worker.kill().unwrap();
        worker.wait().unwrap();
        until("the slot is gone with its worker", || !child.exists()).await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dies_with_its_worker_and_the_next_start_clears_up() {
    let fixture = Fixture::new();
    let mut worker = worker_on_hanging(&fixture);
    let child = fixture.child_at_work();
    worker.kill().unwrap();
    assert_eq!(worker.wait().unwrap().signal(), Some(9));
    until("the slot is gone with its worker", || !exists(child)).await;
    let left = fs::read_dir(fixture.scratch.path()).unwrap().count();
    assert_eq!(left, 2, "a folder and its lock");

    drop(fixture.slots());
    fixture.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_stop_leaves_nothing() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let fixture = Fixture::new();
        let mut worker = worker_on_hanging(&fixture);
        let child = fixture.child_at_work();
        let id = Pid::from_raw(worker.id().cast_signed()).unwrap();
        kill_process(id, signal).unwrap();
        let status = worker.wait().unwrap();
        let (mut out, mut log) = (String::new(), String::new());
        worker.stdout.unwrap().read_to_string(&mut out).unwrap();
        worker.stderr.unwrap().read_to_string(&mut log).unwrap();
        assert_eq!((status.code(), out.as_str()), (Some(code), ""), "{log}");
        assert!(!exists(child));
        fixture.assert_nothing_left();
    }
}

/// Returns slots whose child is a shell script.
fn with_child(fixture: &mut Fixture, script: &str) -> Arc<Slots> {
    let path = fixture.root.path().join("child.sh");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    fixture.config.child.program = path;
    fixture.slots()
}

#[tokio::test]
async fn a_child_that_lies_is_not_believed() {
    let facts = |commit: &str| {
        format!(
            r#"{{"done":{{"facts":{{"subject":{{"directory":{{"slug":"x"}}}},"commit":{commit},"files":1,"notices":[]}},"millis":1}}}}"#
        )
    };
    let echo = |text: &str| format!("echo '{text}'; exec sleep 1000");
    for (script, expected) in [
        ("exit 0".to_owned(), "ended with code 0"),
        (
            "echo why >&2; exit 3".to_owned(),
            "ended with code 3, fetching, 0 bytes fetched: why",
        ),
        ("kill -SEGV $$".to_owned(), "crashed (signal 11)"),
        ("kill -ABRT $$".to_owned(), "aborted (signal 6"),
        ("kill -XCPU $$".to_owned(), "CPU limit"),
        (echo("not a frame"), "broke the protocol"),
        (
            "printf '{\"progress'; exit 0".to_owned(),
            "ended with code 0",
        ),
        (
            "while :; do printf xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done".to_owned(),
            "longer line",
        ),
        (
            echo(r#"{"text":{"part":"tree","bytes":999999999}}"#),
            "longer piece",
        ),
        (
            echo(r#"{"progress":{"fetched_bytes":999999999}}"#),
            "more bytes fetched",
        ),
        (
            echo(r#"{"unmoved":{"fetched_bytes":1}}"#),
            "no commit was known",
        ),
        (
            echo(r#"{"failed":{"kind":"poison","message":"x"}}"#),
            "cannot meet",
        ),
        (echo(&facts("\"not\\\\na commit\"")), "no commit"),
        (
            "head -c 100 /dev/zero >&2; echo x".to_owned(),
            "broke the protocol",
        ),
    ] {
        let mut fixture = Fixture::new();
        let slots = with_child(&mut fixture, &script);
        let fault = work(&slots, &fixture.url("good")).await.unwrap_err();
        assert_eq!(fault.kind, Killed, "{script}: {fault}");
        assert!(fault.message.contains(expected), "{script}: {fault}");
        assert!(!fault.message.contains(char::is_control), "{fault:?}");
        drop(slots);
        fixture.assert_nothing_left();
    }
    let mut fixture = Fixture::new();
    let slots = with_child(&mut fixture, &echo(&facts("null")));
    let made = work(&slots, &fixture.url("good")).await.unwrap();
    assert_eq!(made.facts.subject, subject());
}

#[tokio::test]
async fn a_child_that_says_nothing_or_too_much_is_ended_with_all_it_started() {
    let text = r#"echo '{"text":{"part":"tree","bytes":1000000}}'; head -c 1000000 /dev/zero"#;
    for (script, kind, expected) in [
        (
            "sleep 1000 & sleep 1000".to_owned(),
            Transient,
            "no progress for 1 s",
        ),
        // A descendant holds its output open.
        (
            "sleep 1000 & exit 3".to_owned(),
            Transient,
            "no progress for 1 s",
        ),
        (
            format!("PATH=/usr/bin:/bin; while :; do {text}; done"),
            Killed,
            "more text",
        ),
        // Endless progress: covered by the time limit.
        (
            r#"while :; do echo '{"progress":{"fetched_bytes":1}}'; done"#.to_owned(),
            TooLarge,
            "not done after 2 s",
        ),
    ] {
        let mut fixture = Fixture::new();
        fixture.config.stall = 1;
        fixture.config.timeout = 2;
        let slots = with_child(&mut fixture, &script);
        let fault = work(&slots, &fixture.url("good")).await.unwrap_err();
        assert_eq!(fault.kind, kind, "{script}: {fault}");
        assert!(fault.message.contains(expected), "{script}: {fault}");
        drop(slots);
        fixture.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_slot_that_cannot_be_started_is_no_repositorys_fault() {
    let mut fixture = Fixture::new();
    fixture.config.child.program = "/no/such/program".into();
    let fault = work(&fixture.slots(), &fixture.url("good"))
        .await
        .unwrap_err();
    assert_eq!(fault.kind, Infra);
    assert!(fault.message.contains("/no/such/program"), "{fault}");
}

#[tokio::test]
async fn hostile_trees_pass_through_a_slot() {
    let fixture = Fixture::new();
    let root = fixture.root.path();
    git_bomb(root, "owner", "bomb", BombLeaf::File("f", b"boom\n"));
    let deep = nested_directories(root, "owner", "deep", 5_000);
    // Otherwise git itself refuses to serve it.
    git(&deep, ["config", "core.maxTreeDepth", "10000"]);
    many_files(root, "owner", "wide", 100_000);
    let raw = Raw::new(root, "owner", "names");
    let (text, link) = (raw.blob(b"text\n"), raw.blob(b"/etc/passwd"));
    let tree = raw.tree(&[
        (Mode::File, "../escape", &text),
        (Mode::File, "bell\u{7}\u{1b}[31m", &text),
        (Mode::Symlink, "passwd", &link),
    ]);
    raw.commit(&tree);

    let bomb = fixture.make("bomb").await.unwrap();
    assert!(!bomb.facts.notices.is_empty());
    let deep = fixture.make("deep").await.unwrap();
    assert_eq!(deep.facts.files, 1, "the other is too deep");
    let wide = fixture.make("wide").await.unwrap();
    assert_eq!(wide.facts.files, 10_000);
    let names = fixture.make("names").await.unwrap();
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    for made in [&bomb, &deep, &wide, &names] {
        assert!(!made.content.contains(passwd.lines().next().unwrap()));
    }
    assert!(
        names.content.contains("SYMLINK: passwd"),
        "{}",
        names.content
    );
}

/// Makes `owner/zeros`: a blob of 2 GiB plus one byte, and a small one.
fn build_zeros(root: &Path) {
    const BYTES: usize = (2 << 30) + 1;
    let path = empty(root, "owner", "zeros");
    let mut git = Command::new("git")
        .current_dir(path)
        .args(["-c", "core.compression=1", "-c", "core.bigFileThreshold=1m"])
        .args(["fast-import", "--quiet", "--done"])
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stream = git.stdin.take().unwrap();
    write!(stream, "blob\nmark :1\ndata {BYTES}\n").unwrap();
    let zeros = vec![0; 1 << 20];
    for _ in 0..BYTES / zeros.len() {
        stream.write_all(&zeros).unwrap();
    }
    stream.write_all(&zeros[..BYTES % zeros.len()]).unwrap();
    write!(
        stream,
        "\ncommit refs/heads/main\ncommitter F <f@example.org> 1700000000 +0000\ndata 1\nx\n\
         M 100644 :1 zeros\nM 100644 inline README.md\ndata {}\n{TEXT}\ndone\n",
        TEXT.len()
    )
    .unwrap();
    drop(stream);
    assert!(git.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_of_two_gigabytes_is_left_out_without_being_held() {
    let mut fixture = Fixture::new();
    build_zeros(fixture.root.path());
    // Less than a tenth of the blob.
    fixture.config.child.address_space = 128 << 20;
    fixture.policy.max_bytes = 32 << 20;
    let made = fixture.make("zeros").await.unwrap();
    assert_eq!(made.facts.files, 1, "{}", made.tree);
    assert!(made.content.contains(TEXT));
    assert!(made.fetched_bytes < 32 << 20);
}
