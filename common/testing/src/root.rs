//! Tests that take root: to mount a [small disk](super::small_disk), or to look into a process that
//! does not let itself be dumped; and whether a process lets nobody else.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::getuid;

use super::small_disk::try_mount;

/// A user without files. Those of root's processes are root's in any case.
const NOBODY: u32 = 65534;
/// Far longer than any program takes to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Set where a test has been started again, in a namespace in which it may mount.
const INSIDE: &str = "REPOFLEET_TEST_MAY_MOUNT";

/// Runs `test`, which does what only root may: here where that is allowed, else in a process of its
/// own in a user namespace. `name` is the test's full name as the test harness knows it, such as
/// `fs_store::a_full_disk`; for the other process runs that one test only.
///
/// # Panics
/// When `test` does, or where neither is possible.
pub fn as_root(name: &str, test: impl FnOnce()) {
    let probe = tempfile::tempdir().expect("a temporary folder");
    let outside = match try_mount(probe.path(), "64k") {
        Ok(disk) => {
            drop(disk);
            return test();
        }
        Err(outside) => outside,
    };
    let how = "run the tests as root, or let users make namespaces (Ubuntu: \
               sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0; older Debian: \
               sudo sysctl kernel.unprivileged_userns_clone=1)";
    assert!(
        std::env::var_os(INSIDE).is_none(),
        "cannot mount a small tmpfs, not in a user namespace either: {outside}; {how}"
    );
    let this = std::env::current_exe().expect("this test's program");
    let again = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--"])
        .arg(this)
        .args([name, "--exact", "--test-threads=1", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare can be started; it is in util-linux");
    let said = String::from_utf8_lossy(&again.stdout);
    assert!(
        again.status.success() && said.contains("1 passed"),
        "in a user namespace, since mounting here failed ({}):\n{said}\n{}\nIf that is not allowed: \
         {how}",
        outside.trim(),
        String::from_utf8_lossy(&again.stderr)
    );
}

/// Starts a program that stays, and asserts that it soon lets only root see its memory and environment,
/// and can gain no privileges.
///
/// # Panics
/// If not. Run by root, the program runs as a user without files, who must be able to reach it.
pub fn assert_private(command: &mut Command) {
    if getuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut program = command.spawn().expect("a program that others may execute");
    let process = format!("/proc/{}", program.id());
    let is_private = || {
        let environment = fs::metadata(format!("{process}/environ")).expect("it runs");
        let status = fs::read_to_string(format!("{process}/status")).expect("it runs");
        environment.uid() == 0 && status.contains("NoNewPrivs:\t1\n")
    };
    let start = Instant::now();
    while !is_private() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = program.try_wait().expect("its status");
    assert!(is_private() && ended.is_none(), "{command:?}: {ended:?}");
    program.kill().expect("it runs");
    program.wait().expect("its status");
}
