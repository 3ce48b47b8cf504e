//! The scratch folder's disk: whether it can be written, and what it means if the system refuses.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use common::fault::Fault;
use rustix::io::Errno;

/// Bytes without which a disk counts as full.
const ROOM: u64 = 64 << 10;
/// What helps against a full disk.
const REMEDY: &str = "make room in the scratch folder or choose another with --scratch";

/// Classifies a refusal of the system to a slot, if it is one of room or of a slot's limits.
pub(crate) fn refusal(message: impl fmt::Display, error: Errno) -> Option<Fault> {
    match error {
        Errno::NOSPC | Errno::DQUOT => Some(full(message)),
        Errno::FBIG => Some(Fault::too_large(format!(
            "{message}: over the file limit of a slot"
        ))),
        Errno::NOMEM => Some(Fault::killed(format!(
            "{message}: over the memory limit of a slot"
        ))),
        Errno::MFILE => Some(Fault::killed(message.to_string())),
        _ => None,
    }
}

/// The fault of a scratch folder that cannot be written.
pub(crate) fn full(message: impl fmt::Display) -> Fault {
    Fault::infra(format!("{message}; {REMEDY}"))
}

/// Checks that a folder has room and can be written.
pub(crate) fn probe(folder: &Path) -> io::Result<()> {
    let disk = rustix::fs::statvfs(folder)?;
    // Some file systems count no files.
    let no_files = disk.f_files > 0 && disk.f_favail == 0;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM || no_files {
        return Err(Errno::NOSPC.into());
    }
    let probe = folder.join("probe");
    fs::write(&probe, [0; 4096])?;
    fs::remove_file(&probe)
}
