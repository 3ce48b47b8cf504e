//! Scratch folders: one for each process, in it one for each job.
//!
//! A process locks a file beside its folder as long as it lives. A process that starts removes the
//! folders whose lock is free.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::fault::Fault;
use tempfile::TempDir;

use crate::disk;

const PREFIX: &str = "repofleet-scratch-";

/// This process's scratch folder; removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    folder: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes a scratch folder in `parent`.
    pub(super) fn new(parent: &Path) -> Result<Self, Fault> {
        let make = || {
            fs::create_dir_all(parent)?;
            sweep(parent)?;
            loop {
                let name = format!("{PREFIX}{}-{:08x}", std::process::id(), fastrand::u32(..));
                let (folder, lock_path) = (parent.join(&name), parent.join(format!("{name}.lock")));
                let mut options = File::options();
                options.write(true).create_new(true).mode(0o600);
                let lock = options.open(&lock_path)?;
                lock.lock()?;
                // Another process may have removed the file before it was locked.
                let ours = lock.metadata()?.ino();
                if fs::metadata(&lock_path).is_ok_and(|found| found.ino() == ours) {
                    // Never one that is there. Nobody else is to see into it.
                    DirBuilder::new().mode(0o700).create(&folder)?;
                    return Ok(Self {
                        folder,
                        lock_path,
                        _lock: lock,
                    });
                }
            }
        };
        make().map_err(|e| fault(parent, &e))
    }

    /// Makes an empty folder for one job; removed when dropped.
    pub(super) fn folder(&self) -> Result<TempDir, Fault> {
        tempfile::Builder::new()
            .prefix("job-")
            .tempdir_in(&self.folder)
            .map_err(|e| fault(&self.folder, &e))
    }

    /// Checks that it can be written.
    pub(super) fn probe(&self) -> Result<(), Fault> {
        let folder = self.folder()?;
        disk::probe(folder.path()).map_err(|e| fault(&self.folder, &e))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).ok();
        fs::remove_file(&self.lock_path).ok();
    }
}

/// Removes what dead processes left.
fn sweep(parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let lock_path = entry.path();
        let name = entry.file_name();
        let is_lock = name
            .to_str()
            .is_some_and(|n| n.starts_with(PREFIX) && n.ends_with(".lock"));
        // In a shared folder anyone may make a pipe of that name, and opening it would hang.
        if is_lock
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(lock) = File::open(&lock_path)
            && lock.try_lock().is_ok()
        {
            fs::remove_dir_all(lock_path.with_extension("")).ok();
            fs::remove_file(&lock_path).ok();
        }
    }
    Ok(())
}

fn fault(folder: &Path, error: &io::Error) -> Fault {
    disk::full(format!("scratch folder {}: {error}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_sees_into_it() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(parent.path()).unwrap();
        for (path, expected) in [(&scratch.folder, 0o700), (&scratch.lock_path, 0o600)] {
            let mode = fs::metadata(path).unwrap().mode() & 0o777;
            assert_eq!(mode, expected, "{}", path.display());
        }
    }

    #[test]
    fn what_a_dead_process_left_is_removed_and_what_a_living_one_holds_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let living = Scratch::new(parent.path()).unwrap();
        let job = living.folder().unwrap();

        let dead = parent.path().join(format!("{PREFIX}1-dead"));
        fs::create_dir_all(dead.join("job-x")).unwrap();
        File::create(parent.path().join(format!("{PREFIX}1-dead.lock"))).unwrap();
        fs::create_dir(parent.path().join("not-ours")).unwrap();

        let other = Scratch::new(parent.path()).unwrap();
        assert!(!dead.exists());
        assert!(job.path().is_dir());
        assert!(parent.path().join("not-ours").is_dir());
        other.probe().unwrap();

        drop((job, living, other));
        let left: Vec<_> = fs::read_dir(parent.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
