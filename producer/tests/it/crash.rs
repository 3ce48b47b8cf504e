//! kill -9 at any moment: no torn digest, no slot left over, and the next run completes.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use testing::git_server::{Fault, Kind};
use testing::repositories::Builder;

use crate::fleet::{Fleet, files_below, names_in, wait_closely, wait_until};

const ROUNDS: u64 = 10;
const REPOS: usize = 40;

/// One repository under many names. Each round pushes to all of them, so that every digest tells
/// which round it is of.
struct Pushed {
    fleet: Fleet,
    repos: Vec<String>,
}

impl Pushed {
    fn new() -> Self {
        let fleet = Fleet::new();
        let repos: Vec<_> = (0..REPOS).map(|i| format!("crash/r{i:02}")).collect();
        fs::create_dir(fleet.repositories().join("crash")).unwrap();
        for repo in &repos {
            let link = fleet.repositories().join(format!("{repo}.git"));
            symlink("../now", link).unwrap();
        }
        Self { fleet, repos }
    }

    fn pushed_at(round: u64) -> String {
        format!("2026-01-{:02}T00:00:00Z", round + 1)
    }

    fn text(round: u64) -> String {
        // Long enough not to be written in one go.
        format!("round {round}\n").repeat(2000 + 500 * (round as usize % 3))
    }

    fn push(&self, round: u64) {
        let root = self.fleet.repositories();
        let name = format!("round-{round}");
        Builder::new()
            .file("text", Self::text(round))
            .build(&root, "rounds", &name);
        let now = root.join("now");
        fs::remove_file(&now).ok();
        symlink(format!("rounds/{name}.git"), now).unwrap();
        let entry = |repo: &String| self.fleet.entry(repo, &Self::pushed_at(round));
        let entries: Vec<_> = self.repos.iter().map(entry).collect();
        self.fleet.write_feed(&entries);
    }

    /// Which files a digest consists of: those of another digest are others.
    fn inodes(&self, repo: &str) -> [Option<u64>; 2] {
        let folder = self.fleet.store_folder().join("gitingest").join(repo);
        ["summary.txt", "summary.meta.json"].map(|name| {
            let metadata = fs::metadata(folder.join(name));
            metadata.ok().map(|metadata| metadata.ino())
        })
    }

    /// Every digest in the store is whole and has its own metadata; gives how many are of `round`.
    fn check(&self, round: u64) -> usize {
        let mut current = 0;
        for repo in self.fleet.stored() {
            let digest = self.fleet.digest(&repo);
            let digest = digest.unwrap_or_else(|| panic!("{repo} is torn after round {round}"));
            let of = (0..=round)
                .find(|round| Self::pushed_at(*round) == digest.meta.pushed_at.as_str())
                .unwrap_or_else(|| panic!("{:?}", digest.meta));
            assert!(digest.text.contains(&Self::text(of)), "{repo}: not {of}'s");
            assert_eq!(digest.meta.bytes, digest.text.len() as u64);
            current += usize::from(of == round);
        }
        current
    }
}

#[test]
fn kill_9_at_any_moment_leaves_no_torn_digest() {
    let pushed = Pushed::new();
    let fleet = &pushed.fleet;
    let mut random = fastrand::Rng::with_seed(0x5eed);
    let (mut killed, mut cut_short) = (0, 0);
    for round in 0..ROUNDS {
        pushed.push(round);
        let before = fleet.requests();
        let watched = &pushed.repos[random.usize(0..REPOS / 3)];
        let files = pushed.inodes(watched);
        let run = fleet.start(&["--concurrency", "3"]);
        if round % 2 == 0 {
            // In the middle of one digest's storing: its first file is new, the other may not be.
            let pause = Duration::from_micros(20);
            wait_closely(pause, "a digest", || pushed.inodes(watched) != files);
        } else {
            // Somewhere between the first job and the last, and there at no moment in particular.
            let jobs = random.u64(0..REPOS as u64 / 3);
            wait_until("some jobs", || fleet.requests() > before + 3 * jobs);
            std::thread::sleep(Duration::from_micros(random.u64(0..50_000)));
        }
        run.signal(Signal::KILL);
        killed += usize::from(run.wait().status.code().is_none());
        // They die with their parent, without anyone's help.
        wait_until("the slots to die", || fleet.slots().is_empty());
        cut_short += usize::from(pushed.check(round) < REPOS);
    }
    // However fast the machine.
    assert!(killed > 0 && cut_short > 0, "{killed} {cut_short}");

    let last = fleet.run(&[]).with(0);
    let current = last.summary()["cached"].as_u64().unwrap();
    assert_eq!(last.summary()["processed"], REPOS as u64 - current);
    assert_eq!(pushed.check(ROUNDS - 1), REPOS);
    fleet.assert_nothing_left();
    let digests = files_below(&fleet.store_folder().join("gitingest"));
    assert_eq!(digests.len(), 2 * REPOS, "{digests:?}");
}

/// One that is killed while another process group works for it: the other dies, its scratch is
/// swept by the next run, and only what was missing is fetched.
#[test]
fn the_next_run_sweeps_up_and_goes_on() {
    let repos = ["k/a", "k/b", "k/c"];
    let fleet = Fleet::of(&repos);
    fleet.server.fault("k/c", Fault::Hang.on(Kind::UploadPack));
    let run = fleet.start(&["--concurrency", "1"]);
    fleet.server.wait_for_requests("k/c", 2);
    assert_eq!(fleet.slots().len(), 1);
    run.signal(Signal::KILL);
    run.wait();
    wait_until("the slot to die", || fleet.slots().is_empty());
    let left = names_in(&fleet.scratch_folder());
    assert_eq!(left.len(), 2, "a folder and its lock: {left:?}");
    // No last word, but what it set out to do.
    let runs = names_in(&fleet.store_folder().join("runs"));
    assert_eq!(
        names_in(&fleet.store_folder().join("runs").join(&runs[0])),
        ["jobs.json", "manifest.json"]
    );

    fleet.server.clear_faults();
    let next = fleet.run(&[]).with(0);
    assert_eq!(
        next.sentence(),
        "Pipeline complete: 3 total, 2 cached (66.7%), 1 processed, 0 failed"
    );
    fleet.assert_nothing_left();
}

/// A slot that is killed from outside, as by the kernel when memory is short, costs its job one
/// attempt and nothing else.
#[test]
fn a_killed_slot_costs_one_attempt() {
    let fleet = Fleet::of(&["k/a", "k/b"]);
    // The second attempt is answered.
    fleet.server.fault("k/a", Fault::Hang.times(1));
    let run = fleet.start(&["--concurrency", "1"]);
    fleet.server.wait_for_requests("k/a", 1);
    let slot = fleet.slots()[0];
    rustix::process::kill_process(rustix::process::Pid::from_raw(slot).unwrap(), Signal::KILL)
        .unwrap();
    let run = run.wait().with(0);
    assert_eq!(run.summary()["processed"], 2);
    let retries = run.log();
    let retries: Vec<&Value> = retries
        .iter()
        .filter(|line| line["context"]["operation"] == "retry")
        .collect();
    assert_eq!(retries.len(), 1, "{retries:?}");
    let message = retries[0]["message"].as_str().unwrap();
    assert!(
        message.contains("k/a") && message.contains("signal 9"),
        "{message}"
    );
    fleet.assert_nothing_left();
}
