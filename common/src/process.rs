//! What this process gives up at its start.

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;

/// Keeps other processes of this user from reading this one's memory and environment, which may hold
/// secrets, and gives up gaining privileges by a program. Call it first in `main`; for threads that
/// have started it does only the former.
pub fn harden() {
    // No kernel refuses these, and a filter that does leaves everything as it was.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).ok();
    set_no_new_privs(true).ok();
}
