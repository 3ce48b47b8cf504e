//! File systems that are soon full.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A small file system in memory; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of `size` (such as `1m`) at `at`, a folder.
    ///
    /// # Panics
    /// Where that is not allowed; see [`as_root`](super::root::as_root).
    pub fn mount(at: &Path, size: &str) -> Self {
        try_mount(at, size).unwrap_or_else(|error| panic!("mounting a small tmpfs: {error}"))
    }
}

pub(super) fn try_mount(at: &Path, size: &str) -> Result<SmallDisk, String> {
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
