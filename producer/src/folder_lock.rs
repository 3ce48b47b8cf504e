//! The lock of a store in a folder: one run at a time.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::exit::{self, ExitError};
use common::store::fs::make_folder;

/// Makes this process the only one that runs on a store in a folder, until dropped. What was
/// created for that is removed then, unless a run has put something into the folder.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    /// The folders that were created, the deepest first.
    made: Vec<PathBuf>,
    _lock: File,
}

impl FolderLock {
    /// Takes the lock of the store in `folder`, which is created if it is missing.
    ///
    /// # Errors
    /// [`exit::BUSY`] if another process holds it, [`exit::UNAVAILABLE`] if the folder cannot be
    /// written.
    pub fn on(folder: &Path) -> Result<Self, ExitError> {
        let path = folder.join(".producer.lock");
        let unavailable = |e: &io::Error| {
            ExitError::new(
                exit::UNAVAILABLE,
                format!(
                    "cannot write {}: {e}; give this user the right to, or choose another folder with --store",
                    path.display()
                ),
            )
        };
        let mut made = Vec::new();
        loop {
            let absent = folder
                .ancestors()
                .take_while(|folder| !folder.as_os_str().is_empty() && !folder.is_dir());
            made.extend(absent.map(Path::to_owned));
            make_folder(folder).map_err(|fault| ExitError::new(exit::UNAVAILABLE, fault))?;
            let lock = match File::create(&path) {
                Ok(lock) => lock,
                // The process that created the folder has just removed it.
                Err(e) if e.kind() == ErrorKind::NotFound && !folder.is_dir() => continue,
                Err(e) => return Err(unavailable(&e)),
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(busy(folder)),
                Err(TryLockError::Error(e)) => return Err(unavailable(&e)),
            }
            // A file that its holder has just removed locks nothing.
            let held = lock.metadata().map_err(|e| unavailable(&e))?;
            if fs::metadata(&path).is_ok_and(|there| there.ino() == held.ino()) {
                return Ok(Self {
                    path,
                    made,
                    _lock: lock,
                });
            }
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Still held, so no other process takes the file for its own.
        fs::remove_file(&self.path).ok();
        for folder in &self.made {
            // Removes only an empty one.
            fs::remove_dir(folder).ok();
        }
    }
}

fn busy(folder: &Path) -> ExitError {
    ExitError::new(
        exit::BUSY,
        format!(
            "another run is at work on {}; wait for its end, or choose another folder with --store",
            folder.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    /// Also where some take the lock's file away while others open it.
    #[test]
    fn one_process_at_a_time_holds_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let (holders, turns) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while turns.load(Ordering::SeqCst) < 500 {
                        let lock = match FolderLock::on(folder.path()) {
                            Ok(lock) => lock,
                            Err(error) => {
                                assert_eq!(error.code, exit::BUSY, "{error}");
                                continue;
                            }
                        };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        turns.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(lock);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
