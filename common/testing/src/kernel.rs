//! Kernels that can do less than this one.

use std::env::consts::ARCH;

use libc::{ENOSYS, SYS_landlock_create_ruleset, SYS_seccomp, c_long};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// For [`without`]: Landlock's first system call.
pub const LANDLOCK: c_long = SYS_landlock_create_ruleset;
/// For [`without`]: that which filters system calls.
pub const SECCOMP: c_long = SYS_seccomp;

/// Runs `test` on a thread for which the kernel has none of the system calls `missing`, nor for those
/// that it starts, nor for their children.
///
/// # Panics
/// When `test` does, or where system calls cannot be filtered.
pub fn without<T: Send + 'static>(
    missing: &[c_long],
    test: impl FnOnce() -> T + Send + 'static,
) -> T {
    let rules = missing.iter().map(|number| (*number, Vec::new())).collect();
    let absent = SeccompAction::Errno(ENOSYS.cast_unsigned());
    let architecture = ARCH
        .try_into()
        .expect("an architecture that seccompiler knows");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, absent, architecture);
    let program: BpfProgram = filter
        .and_then(TryInto::try_into)
        .expect("a filter of a few system calls");
    let thread = std::thread::spawn(move || {
        apply_filter(&program).expect("this kernel filters system calls");
        test()
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
