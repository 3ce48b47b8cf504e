//! A full disk under the store or the scratch folder: said clearly, nothing half-written, nobody's
//! fault but the machine's, and over as soon as there is room.

use std::fs;
use std::path::Path;

use common::exit::{TERMINATED, TOO_MANY_FAILED, UNAVAILABLE};
use rustix::process::Signal;
use serde_json::json;
use testing::repositories::Builder;
use testing::root::as_root;
use testing::small_disk::SmallDisk;

use crate::fleet::{Ended, Fleet, expected_text, files_below};

const REPOS: [&str; 3] = ["disk/small", "disk/large", "disk/last"];

/// Repositories of which one is large: 400 KiB that do not compress.
fn fleet() -> Fleet {
    let fleet = Fleet::of(&REPOS);
    let mut random = fastrand::Rng::with_seed(1);
    let text: String = (0..400 << 10).map(|_| random.alphanumeric()).collect();
    fs::remove_dir_all(fleet.repositories().join("disk/large.git")).unwrap();
    Builder::new()
        .file("large.txt", text)
        .build(&fleet.repositories(), "disk", "large");
    fleet
}

/// The way of fetching that writes to the scratch folder, however small the repository.
const ON_DISK: [&str; 2] = ["--fetch", "git2"];

/// Fills the disk at `folder` up to the last byte; the file is to be removed for room.
fn fill(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("something-else");
    let mut size = 1 << 20;
    let mut filled = Vec::new();
    while size > 0 {
        filled.resize(filled.len() + size, 0_u8);
        if fs::write(&path, &filled).is_err() {
            filled.truncate(filled.len() - size);
            size /= 2;
        }
    }
    fs::write(&path, &filled).ok();
    path
}

fn assert_all_there(fleet: &Fleet) {
    for repo in REPOS {
        let path = fleet.repositories().join(format!("{repo}.git"));
        let digest = fleet.digest(repo).unwrap();
        assert_eq!(digest.text, expected_text(&path, repo), "{repo}");
    }
    fleet.assert_nothing_left();
}

/// It gave up for want of room in `folder`, blamed no repository, and said what to do.
fn assert_given_up(run: &Ended, folder: &Path, remedy: &str) {
    assert_eq!(run.summary()["closed"], false);
    assert_eq!(run.summary()["failed"], 0);
    let log = run.log();
    let said = log.iter().filter(|line| {
        let message = line["message"].as_str().unwrap();
        line["level"] == "error"
            && message.contains("No space left on device")
            && message.contains(folder.to_str().unwrap())
            && message.contains("make room")
            && message.contains(remedy)
    });
    assert_ne!(said.count(), 0, "{}", run.stdout);
    // Why it ended is said right before how far it got.
    let errors = log.iter().filter(|line| line["level"] == "error");
    let errors: Vec<_> = errors
        .map(|line| line["message"].as_str().unwrap())
        .collect();
    assert!(errors.iter().any(|e| e.contains("gave up")), "{errors:#?}");
}

#[test]
fn a_full_store_ends_the_run_and_room_lets_it_go_on() {
    let name = "full_disk::a_full_store_ends_the_run_and_room_lets_it_go_on";
    as_root(name, || {
        let fleet = fleet();
        let store = fleet.store_folder();
        fs::create_dir(&store).unwrap();
        let disk = SmallDisk::mount(&store, "300k");
        let run = fleet.run(&["--patience", "2", "--concurrency", "1"]);
        let run = run.with(UNAVAILABLE);
        assert_given_up(&run, &store, "--store");
        // Nothing half-written: what is there is whole, and nothing else is there.
        assert!(fleet.digest("disk/small").is_some());
        assert_eq!(fleet.digest("disk/large"), None);
        let left = files_below(&store.join("gitingest"));
        assert!(
            left.iter()
                .all(|path| !path.to_str().unwrap().contains("tmp")),
            "{left:?}"
        );
        fleet.assert_nothing_left();

        drop(disk);
        let run = fleet.run(&[]).with(0);
        assert_eq!(run.summary()["closed"], true);
        assert_all_there(&fleet);
    });
}

/// Somebody makes room while the run waits: it closes by itself.
#[test]
fn room_in_the_store_is_noticed() {
    let name = "full_disk::room_in_the_store_is_noticed";
    as_root(name, || {
        let fleet = fleet();
        let store = fleet.store_folder();
        fs::create_dir(&store).unwrap();
        let _disk = SmallDisk::mount(&store, "3m");
        let filling = fill(&store);
        // The manifest fits into the last pages.
        let filled = fs::metadata(&filling).unwrap().len();
        fs::OpenOptions::new()
            .write(true)
            .open(&filling)
            .unwrap()
            .set_len(filled - (40 << 10))
            .unwrap();
        let run = fleet.start(&["--patience", "1000", "--concurrency", "1"]);
        run.wait_for_line("still not well");
        fs::remove_file(filling).unwrap();
        let run = run.wait().with(0);
        assert_eq!(run.summary()["processed"], 3);
        let said = run.messages("infra");
        assert_eq!(said.last().unwrap(), "machine and store are well again");
        assert_all_there(&fleet);
    });
}

/// Whoever waits for room can be told to stop, and does not wait for it then.
#[test]
fn a_signal_ends_the_wait_for_room() {
    let name = "full_disk::a_signal_ends_the_wait_for_room";
    as_root(name, || {
        let fleet = fleet();
        let store = fleet.store_folder();
        fs::create_dir(&store).unwrap();
        let _disk = SmallDisk::mount(&store, "300k");
        let run = fleet.start(&["--patience", "1000", "--drain", "1000"]);
        run.wait_for_line("not a repository's fault");
        run.signal(Signal::TERM);
        let run = run.wait().with(TERMINATED);
        assert_eq!(run.summary()["closed"], false);
        fleet.assert_nothing_left();
    });
}

#[test]
fn a_full_scratch_folder_ends_the_run_and_room_lets_it_go_on() {
    let name = "full_disk::a_full_scratch_folder_ends_the_run_and_room_lets_it_go_on";
    as_root(name, || {
        let fleet = fleet();
        let scratch = fleet.scratch_folder();
        let disk = SmallDisk::mount(&scratch, "3m");
        fill(&scratch);
        let run = fleet.run(&[&ON_DISK[..], &["--patience", "2", "--concurrency", "1"]].concat());
        let run = run.with(UNAVAILABLE);
        assert_given_up(&run, &scratch, "--scratch");

        drop(disk);
        fleet.run(&[]).with(0);
        assert_all_there(&fleet);
        fleet.assert_nothing_left();
    });
}

/// The disk looks well whenever it is looked at, and no wait will make it larger.
#[test]
fn a_repository_larger_than_the_scratch_disk_fails_alone() {
    let name = "full_disk::a_repository_larger_than_the_scratch_disk_fails_alone";
    as_root(name, || {
        let fleet = fleet();
        let scratch = fleet.scratch_folder();
        let disk = SmallDisk::mount(&scratch, "200k");
        // One of three.
        let run = fleet.run(&[&ON_DISK[..], &["--concurrency", "4"]].concat());
        let run = run.with(TOO_MANY_FAILED);
        let summary = run.summary();
        assert_eq!(
            (&summary["processed"], &summary["failed"]),
            (&json!(2), &json!(1))
        );
        let summary = fleet.document(&run.run_id(), "summary.json");
        let failure = &summary["failures"][0];
        assert_eq!(
            (&failure["repo"], &failure["class"]),
            (&json!("disk/large"), &json!("infra"))
        );
        let message = failure["message"].as_str().unwrap();
        assert!(message.contains("--scratch"), "{message}");

        drop(disk);
        fleet.run(&[]).with(0);
        assert_all_there(&fleet);
        fleet.assert_nothing_left();
    });
}

#[test]
fn room_in_the_scratch_folder_is_noticed() {
    let name = "full_disk::room_in_the_scratch_folder_is_noticed";
    as_root(name, || {
        let fleet = fleet();
        let scratch = fleet.scratch_folder();
        let _disk = SmallDisk::mount(&scratch, "3m");
        let filling = fill(&scratch);
        let run =
            fleet.start(&[&ON_DISK[..], &["--patience", "1000", "--concurrency", "1"]].concat());
        run.wait_for_line("not a repository's fault");
        fs::remove_file(filling).unwrap();
        let run = run.wait().with(0);
        assert_eq!(run.summary()["processed"], 3);
        assert_all_there(&fleet);
    });
}
