//! File systems that are soon full.
//!
//! Mounting one takes root, or a user namespace of one's own: [`where_mounting_is_allowed`] sees to
//! that.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Set where a test has been started again, in a namespace in which it may mount.
const INSIDE: &str = "REPOFLEET_TEST_MAY_MOUNT";

/// Runs `test`, which mounts [`SmallDisk`]s: here where that is allowed, else in a process of its
/// own in a user namespace. `name` is the test's full name as the test harness knows it, such as
/// `fs_store::a_full_disk`; for the other process runs that one test only.
///
/// # Panics
/// When `test` does, or where neither is possible.
pub fn where_mounting_is_allowed(name: &str, test: impl FnOnce()) {
    let probe = tempfile::tempdir().expect("a temporary folder");
    let outside = match try_mount(probe.path(), "64k") {
        Ok(disk) => {
            drop(disk);
            return test();
        }
        Err(outside) => outside,
    };
    let how = "run the tests as root, or where users may make namespaces \
               (sysctl kernel.unprivileged_userns_clone=1)";
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

/// A small file system in memory; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of `size` (such as `1m`) at `at`, a folder.
    ///
    /// # Panics
    /// Where that is not allowed; see [`where_mounting_is_allowed`].
    pub fn mount(at: &Path, size: &str) -> Self {
        try_mount(at, size).unwrap_or_else(|error| panic!("mounting a small tmpfs: {error}"))
    }
}

fn try_mount(at: &Path, size: &str) -> Result<SmallDisk, String> {
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
        .arg(at)
        .output()
        .map_err(|error| error.to_string())?;
    match mount.status.success() {
        true => Ok(SmallDisk(at.to_owned())),
        false => Err(String::from_utf8_lossy(&mount.stderr).into_owned()),
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: somebody may still have a file open there.
        let umount = Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .stderr(Stdio::null())
            .status();
        umount.ok();
    }
}
