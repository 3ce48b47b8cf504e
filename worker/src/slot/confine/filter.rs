//! The system calls that a slot is refused, with EPERM.
//!
//! A list of what is refused, not of what is allowed: what libc, the runtime and the kernel's
//! version make of an ordinary call differs between machines and years, and a call that an
//! allow-list lacks would fail as somebody's repository. Refused is what reaches other processes,
//! starts programs, changes the system or opens parts of the kernel that nobody here uses, and what
//! Landlock does not see.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use libc::*;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{self, Eq, MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter, sock_filter,
};

/// Refused whatever their arguments.
#[rustfmt::skip]
const REFUSED: &[c_long] = &[
    // Programs and processes.
    SYS_execve, SYS_execveat, SYS_setsid, SYS_setpgid,
    SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_process_madvise, SYS_kcmp,
    SYS_pidfd_open, SYS_pidfd_getfd, SYS_pidfd_send_signal, SYS_tkill,
    SYS_sched_setaffinity, SYS_sched_setattr, SYS_sched_setparam, SYS_sched_setscheduler,
    SYS_setpriority, SYS_ioprio_set, SYS_migrate_pages, SYS_move_pages,
    // To be connected to.
    SYS_listen, SYS_accept, SYS_accept4,
    // What Landlock does not see of files: length by path, modes, owners, times, attributes, handles.
    SYS_truncate, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_utimensat,
    SYS_setxattr, SYS_lsetxattr, SYS_fsetxattr, SYS_removexattr, SYS_lremovexattr, SYS_fremovexattr,
    SYS_name_to_handle_at, SYS_open_by_handle_at, SYS_memfd_create,
    // Parts of the kernel with many doors.
    SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_personality,
    SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register,
    SYS_add_key, SYS_keyctl, SYS_request_key,
    // The system, for a worker that runs as root.
    SYS_unshare, SYS_setns, SYS_chroot, SYS_pivot_root, SYS_mknodat,
    SYS_mount, SYS_umount2, SYS_mount_setattr, SYS_move_mount, SYS_open_tree,
    SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_fspick, SYS_quotactl, SYS_quotactl_fd, SYS_fanotify_init,
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, KEXEC_FILE_LOAD,
    SYS_reboot, SYS_swapon, SYS_swapoff, SYS_acct, SYS_syslog, SYS_sethostname, SYS_setdomainname,
    SYS_settimeofday, SYS_clock_settime, SYS_adjtimex, SYS_clock_adjtime,
    // The same number everywhere, but not in libc: fchmodat2, setxattrat, removexattrat, open_tree_attr.
    452, 463, 466, 467,
];

/// The same, but musl's resolver binds the socket that it asks DNS with.
#[cfg(not(target_env = "musl"))]
const REFUSED_BIND: &[c_long] = &[SYS_bind];
#[cfg(target_env = "musl")]
const REFUSED_BIND: &[c_long] = &[];

#[cfg(target_arch = "x86_64")]
const KEXEC_FILE_LOAD: c_long = SYS_kexec_file_load;
/// The same number everywhere else, but not in every libc.
#[cfg(not(target_arch = "x86_64"))]
const KEXEC_FILE_LOAD: c_long = 294;

/// Older forms of these, on x86-64 alone.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const REFUSED_OLD: &[c_long] = &[
    SYS_fork, SYS_vfork, SYS_chmod, SYS_chown, SYS_lchown, SYS_utime, SYS_utimes, SYS_futimesat,
    SYS_mknod, SYS_uselib, SYS_ioperm, SYS_iopl, SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_OLD: &[c_long] = &[];

/// A condition on an argument's lower half, which is all that the kernel looks at in an `int`.
type On = (u8, SeccompCmpOp, c_int);

/// Adds the filter to this thread and those that it starts later. `network` allows TCP and UDP.
pub(super) fn install(network: bool) -> Result<(), Error> {
    apply_filter(&program(network)?)
}

fn program(network: bool) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::new();
    for number in [REFUSED, REFUSED_BIND, REFUSED_OLD].concat() {
        // Without a condition.
        rules.insert(number, Vec::new());
    }
    for (number, conditions) in conditional() {
        let conditions = conditions.into_iter().map(|(argument, operation, value)| {
            SeccompCondition::new(argument, Dword, operation, value.cast_unsigned().into())
        });
        let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
        rules.entry(number).or_insert_with(Vec::new).push(rule);
    }
    if !network {
        rules.insert(SYS_socket, Vec::new());
    }
    let refuse = SeccompAction::Errno(EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, ARCH.try_into()?)?;
    let mut program = before();
    program.append(&mut filter.try_into()?);
    Ok(program)
}

/// Refused if all conditions hold.
fn conditional() -> Vec<(c_long, Vec<On>)> {
    let this = std::process::id().cast_signed();
    let among = |flags: c_int| MaskedEq(flags.cast_unsigned().into());
    let kind = |kind| (1, among(0xf), kind);
    vec![
        // Processes; threads are allowed.
        (SYS_clone, vec![(0, among(CLONE_THREAD), 0)]),
        // A process may abort itself.
        (SYS_kill, vec![(0, Ne, this)]),
        (SYS_tgkill, vec![(0, Ne, this)]),
        (SYS_rt_sigqueueinfo, vec![(0, Ne, this)]),
        (SYS_rt_tgsigqueueinfo, vec![(0, Ne, this)]),
        (SYS_prlimit64, vec![(0, Ne, 0), (0, Ne, this)]),
        // What this process has given up for good.
        (SYS_prctl, vec![(0, Eq, PR_SET_DUMPABLE)]),
        (SYS_prctl, vec![(0, Eq, PR_SET_PDEATHSIG)]),
        // To type into a terminal.
        (SYS_ioctl, vec![(1, Eq, TIOCSTI as c_int)]),
        (SYS_ioctl, vec![(1, Eq, TIOCLINUX as c_int)]),
        // Sockets of other programs on this machine, and of the kernel.
        (SYS_socket, vec![(0, Ne, AF_INET), (0, Ne, AF_INET6)]),
        // Landlock sees TCP alone, not MPTCP, SCTP and the like.
        (
            SYS_socket,
            vec![(2, Ne, 0), (2, Ne, IPPROTO_TCP), (2, Ne, IPPROTO_UDP)],
        ),
        (SYS_socket, vec![kind(SOCK_RAW)]),
        (SYS_socket, vec![kind(SOCK_SEQPACKET)]),
        (SYS_socket, vec![kind(SOCK_DCCP)]),
        // One of a pair could send to another program's socket.
        (SYS_socketpair, vec![kind(SOCK_DGRAM)]),
        (SYS_socketpair, vec![kind(SOCK_RAW)]),
        // They connect too, which Landlock sees in `connect` alone.
        (SYS_sendto, vec![(3, among(MSG_FASTOPEN), MSG_FASTOPEN)]),
        (SYS_sendmsg, vec![(2, among(MSG_FASTOPEN), MSG_FASTOPEN)]),
        (SYS_sendmmsg, vec![(3, among(MSG_FASTOPEN), MSG_FASTOPEN)]),
    ]
}

/// What goes before seccompiler's program, which refuses with one error and compares whole numbers.
fn before() -> BpfProgram {
    // As in linux/bpf_common.h: load the system call's number, compare it, return.
    const LOAD: c_ushort = 0x20;
    const IS_AT_LEAST: c_ushort = 0x35;
    const IS: c_ushort = 0x15;
    const RETURN: c_ushort = 0x06;
    /// A 64-bit process can also call the kernel by the numbers of x32.
    const X32: u32 = 0x4000_0000;
    let step = |code, k, jf| sock_filter { code, jt: 0, jf, k };
    let refuse = |error: c_int| step(RETURN, SECCOMP_RET_ERRNO | error.cast_unsigned(), 0);
    vec![
        step(LOAD, 0, 0),
        step(IS_AT_LEAST, X32, 1),
        refuse(EPERM),
        // Its flags are in memory, where no filter sees them. libc goes on with `clone`.
        step(IS, SYS_clone3 as u32, 1),
        refuse(ENOSYS),
    ]
}
