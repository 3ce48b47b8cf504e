//! Walls around slots: a slot that tries to break out is refused, and can do its work.
//!
//! The slot's program is this test's own, started by a script: it enters as a slot does, tries what is
//! in [`ATTACKS`] and [`NEEDS`], and reports what came of it as its failure.

use std::env;
use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{self, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::fault::{Fault, FaultKind};
use common::telemetry::registry::Expose;
use libc::*;
use rustix::process::{DumpableBehavior, dumpable_behavior, getppid};
use rustix::thread::no_new_privs;
use serde::{Deserialize, Serialize};
use strum::VariantArray;
use testing::kernel;
use testing::root::assert_private;
use worker::metrics::Metrics;
use worker::slot::child;
use worker::slot::confine::Wall;
use worker::slot::slots::Slots;

use crate::fixture::{Fixture, TEXT, git, work};

use Wall::{LandlockFiles, LandlockNetwork, LandlockSignals, Seccomp};

/// Where the attacker finds its [`Targets`], as JSON.
const TARGETS: &str = "REPOFLEET_TEST_TARGETS";
/// Where it finds its job's folder.
const SCRATCH: &str = "REPOFLEET_TEST_SCRATCH";

/// Something to try: its name, the walls of which each alone refuses it, and how.
type Attack = (&'static str, &'static [Wall], Try);
type Try = fn(&Targets) -> io::Result<()>;

/// What is none of a slot's business.
#[rustfmt::skip]
const ATTACKS: &[Attack] = &[
    ("read a file", &[LandlockFiles], |_| File::open("/etc/passwd").map(drop)),
    ("list a folder", &[LandlockFiles], |_| fs::read_dir("/").map(drop)),
    ("list other jobs", &[LandlockFiles], |t| fs::read_dir(t.scratch.join("..")).map(drop)),
    ("list processes", &[LandlockFiles], |_| fs::read_dir("/proc").map(drop)),
    ("read an environment", &[LandlockFiles], |_| {
        File::open(format!("/proc/{}/environ", parent())).map(drop)
    }),
    ("write a file", &[LandlockFiles], |t| {
        File::options().append(true).open(t.outside.join("file")).map(drop)
    }),
    ("make a file", &[LandlockFiles], |t| File::create_new(t.outside.join("new")).map(drop)),
    ("make a folder", &[LandlockFiles], |t| fs::create_dir(t.outside.join("folder"))),
    ("move a file", &[LandlockFiles], |t| {
        fs::rename(t.outside.join("third"), t.outside.join("moved"))
    }),
    ("remove a file", &[LandlockFiles], |t| fs::remove_file(t.outside.join("other"))),
    ("cut a file", &[Seccomp], |t| {
        call(SYS_truncate, &[c_string(&t.outside.join("file")).as_ptr() as _, 1])
    }),
    ("change a mode", &[Seccomp], |t| {
        fs::set_permissions(t.outside.join("file"), Permissions::from_mode(0o755))
    }),
    ("make a file in memory", &[Seccomp], |_| call(SYS_memfd_create, &[c"x".as_ptr() as _, 0])),
    // Not a program, which would replace this one.
    ("execute", &[LandlockFiles, Seccomp], |t| {
        let nothing = [std::ptr::null::<c_char>()].as_ptr();
        let file = c_string(&t.outside.join("program"));
        call(SYS_execve, &[file.as_ptr() as _, nothing as _, nothing as _])
    }),
    ("fork", &[Seccomp], |_| fork()),
    ("fork by clone3", &[Seccomp], |_| {
        // This error has libc go on with clone.
        call(SYS_clone3, &[0, 0]).map_err(|error| match error.raw_os_error() {
            Some(ENOSYS) => io::ErrorKind::PermissionDenied.into(),
            _ => error,
        })
    }),
    #[cfg(target_arch = "x86_64")]
    ("call by x32", &[Seccomp], |_| call(0x4000_0000 | SYS_getpid, &[])),
    ("leave the group", &[Seccomp], |_| call(SYS_setpgid, &[0, 0])),
    // No such process, but that would be found out later.
    ("trace", &[Seccomp], |_| call(SYS_ptrace, &[PTRACE_ATTACH as _, i32::MAX as _])),
    ("read memory", &[Seccomp], |_| call(SYS_process_vm_readv, &[i32::MAX as _])),
    ("signal", &[LandlockSignals, Seccomp], |_| call(SYS_kill, &[parent()])),
    ("signal a thread", &[LandlockSignals, Seccomp], |_| {
        call(SYS_tgkill, &[parent(), parent()])
    }),
    ("hold a process", &[Seccomp], |_| call(SYS_pidfd_open, &[parent()])),
    ("limit a process", &[Seccomp], |_| call(SYS_prlimit64, &[parent(), RLIMIT_CORE as _])),
    ("outlive the parent", &[Seccomp], |_| call(SYS_prctl, &[PR_SET_PDEATHSIG as _, 0])),
    ("become dumpable", &[Seccomp], |_| {
        call(SYS_prctl, &[PR_SET_DUMPABLE as _, 1])?;
        call(SYS_prctl, &[PR_SET_DUMPABLE as _, 0])
    }),
    ("type", &[Seccomp], |_| call(SYS_ioctl, &[0, TIOCSTI as _])),
    ("connect", &[LandlockNetwork], |t| TcpStream::connect(t.other).map(drop)),
    // Both are TCP, but Landlock does not see it.
    ("connect by sending", &[Seccomp], |t| connect_by_sending(t.other)),
    ("connect by MPTCP", &[Seccomp], |_| socket_of(AF_INET, SOCK_STREAM, IPPROTO_MPTCP)),
    ("bind", &[LandlockNetwork, Seccomp], |_| TcpListener::bind("127.0.0.1:0").map(drop)),
    ("listen", &[Seccomp], |_| call(SYS_listen, &[-1])),
    ("connect on this machine", &[Seccomp], |t| {
        UnixStream::connect(t.outside.join("socket")).map(drop)
    }),
    ("connect by a name", &[LandlockSignals, Seccomp], |t| {
        UnixStream::connect_addr(&t.abstract_socket()).map(drop)
    }),
    ("send on this machine", &[Seccomp], |_| UnixDatagram::pair().map(drop)),
    ("ask the kernel", &[Seccomp], |_| socket_of(AF_NETLINK, SOCK_RAW, 0)),
    ("be another system", &[Seccomp], |_| call(SYS_personality, &[0xffff_ffff])),
];

/// What a slot needs, or has given up by itself.
#[rustfmt::skip]
const NEEDS: &[(&str, Try)] = &[
    ("its files", |t| {
        let (file, folder) = (t.scratch.join("file"), t.scratch.join("folder"));
        fs::write(&file, TEXT)?;
        fs::rename(&file, t.scratch.join("moved"))?;
        fs::create_dir(&folder)?;
        fs::read_dir(&t.scratch)?;
        fs::remove_dir(&folder)
    }),
    ("its port", |t| TcpStream::connect(t.own).map(drop)),
    ("names", |_| that(dns_lookup::lookup_host("localhost")?.count() > 0)),
    ("certificates", |_| match env::var_os("SSL_CERT_FILE") {
        Some(file) => File::open(file)?.read_exact(&mut [0; 8]),
        None => Ok(()),
    }),
    ("threads", |_| that(std::thread::spawn(|| ()).join().is_ok())),
    ("its own signals", |_| {
        let this = std::process::id().into();
        call(SYS_tgkill, &[this, this])
    }),
    ("no privileges", |_| that(no_new_privs()?)),
    ("to be private", |_| that(dumpable_behavior()? == DumpableBehavior::NotDumpable)),
];

/// What is none of the business of a slot that reads a repository on this machine.
#[rustfmt::skip]
const LOCAL_ATTACKS: &[Attack] = &[
    ("read the working tree", &[LandlockFiles], |t| File::open(t.local().join("text")).map(drop)),
    ("write the repository", &[LandlockFiles], |t| {
        File::options().append(true).open(t.local().join(".git/HEAD")).map(drop)
    }),
    ("connect", &[LandlockNetwork, Seccomp], |t| TcpStream::connect(t.own).map(drop)),
    ("ask a name server", &[Seccomp], |_| socket_of(AF_INET, SOCK_DGRAM, 0)),
];

/// What it needs.
const LOCAL_NEEDS: &[(&str, Try)] = &[("the repository", |t| {
    File::open(t.local().join(".git/HEAD")).map(drop)
})];

/// What an attacker is told.
#[derive(Serialize, Deserialize)]
struct Targets {
    /// Its job's folder.
    #[serde(skip)]
    scratch: PathBuf,
    /// Another folder.
    outside: PathBuf,
    /// The address of its host, and another's.
    own: SocketAddr,
    other: SocketAddr,
    /// The repository that it reads on this machine.
    local: Option<PathBuf>,
    entry: Entry,
}

/// How an attacker begins.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Entry {
    /// Confined.
    AsSlot,
    /// The same on a kernel that lacks what its parent has.
    WithoutLandlock,
    /// Not confined at all, to show that the attacks are some.
    Free,
}

impl Targets {
    fn local(&self) -> &Path {
        self.local.as_deref().unwrap()
    }

    fn abstract_socket(&self) -> net::SocketAddr {
        net::SocketAddr::from_abstract_name(self.outside.as_os_str().as_bytes()).unwrap()
    }

    fn attacks(&self) -> &'static [Attack] {
        match self.local {
            Some(_) => LOCAL_ATTACKS,
            None => ATTACKS,
        }
    }

    fn needs(&self) -> &'static [(&'static str, Try)] {
        match self.local {
            Some(_) => LOCAL_NEEDS,
            None => NEEDS,
        }
    }
}

fn that(holds: bool) -> io::Result<()> {
    holds.then_some(()).ok_or(io::ErrorKind::Other.into())
}

fn parent() -> c_long {
    getppid().unwrap().as_raw_nonzero().get().into()
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Makes a system call; arguments that are left out are 0.
#[expect(
    unsafe_code,
    reason = "no safe function makes these calls; memory that they are given outlives them"
)]
fn value(number: c_long, arguments: &[c_long]) -> io::Result<c_long> {
    let [a, b, c, d, e, f] = std::array::from_fn(|i| arguments.get(i).copied().unwrap_or_default());
    // SAFETY: callers pass valid pointers, or none.
    match unsafe { syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn call(number: c_long, arguments: &[c_long]) -> io::Result<()> {
    value(number, arguments).map(drop)
}

#[expect(unsafe_code, reason = "the child must end at once, in this very place")]
fn fork() -> io::Result<()> {
    // SAFETY: the child does nothing but end.
    match unsafe { syscall(SYS_clone, c_long::from(SIGCHLD), 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => unsafe { _exit(0) },
        _ => Ok(()),
    }
}

fn socket_of(family: c_int, kind: c_int, protocol: c_int) -> io::Result<()> {
    call(SYS_socket, &[family.into(), kind.into(), protocol.into()])
}

/// TCP Fast Open: the first datum goes with the connection.
fn connect_by_sending(to: SocketAddr) -> io::Result<()> {
    let socket = value(SYS_socket, &[AF_INET.into(), SOCK_STREAM.into()])?;
    // Family, port, address, nothing.
    let mut address = [0u8; 16];
    address[..2].copy_from_slice(&(AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&to.port().to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    let (data, address) = (c"x".as_ptr() as _, address.as_ptr() as _);
    call(
        SYS_sendto,
        &[socket, data, 1, MSG_FASTOPEN.into(), address, 16],
    )
}

/// Not a test but the program of the slots below.
#[test]
fn attacker() {
    let Some(targets) = env::var_os(TARGETS) else {
        return;
    };
    let mut targets: Targets = serde_json::from_slice(targets.as_bytes()).unwrap();
    targets.scratch = env::var_os(SCRATCH).unwrap().into();
    // Standard output, which the test harness writes to otherwise.
    let mut report = File::options().write(true).open("/proc/self/fd/3").unwrap();
    let enter = |scratch: &Path| child::enter(scratch).unwrap();
    let scratch = targets.scratch.clone();
    let entered = match targets.entry {
        Entry::AsSlot => enter(&scratch).map(drop),
        Entry::WithoutLandlock => {
            kernel::without(&[kernel::LANDLOCK], move || enter(&scratch).map(drop))
        }
        Entry::Free => Ok(()),
    };
    let tries = targets.attacks().iter().map(|(_, _, attempt)| attempt);
    let tries = tries.chain(targets.needs().iter().map(|(_, attempt)| attempt));
    let results: Vec<String> = tries
        .map(|attempt| match attempt(&targets) {
            Ok(()) => "ok".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => "no".to_owned(),
            Err(error) => error.raw_os_error().unwrap_or(-1).to_string(),
        })
        .collect();
    let fault = entered
        .err()
        .unwrap_or_else(|| Fault::transient(results.join(" ")));
    writeln!(report, "{}", serde_json::json!({ "failed": fault })).unwrap();
}

/// Everything that an attacker may attack.
struct Battlefield {
    fixture: Fixture,
    outside: tempfile::TempDir,
    other: TcpListener,
    _sockets: [UnixListener; 2],
}

impl Battlefield {
    fn new() -> Self {
        let (fixture, outside) = (Fixture::new(), tempfile::tempdir().unwrap());
        let at = outside.path();
        for name in ["file", "other", "third", "program"] {
            fs::write(at.join(name), "not a program").unwrap();
        }
        fs::set_permissions(at.join("program"), Permissions::from_mode(0o755)).unwrap();
        let name = net::SocketAddr::from_abstract_name(at.as_os_str().as_bytes()).unwrap();
        Self {
            _sockets: [
                UnixListener::bind(at.join("socket")).unwrap(),
                UnixListener::bind_addr(&name).unwrap(),
            ],
            other: TcpListener::bind("127.0.0.1:0").unwrap(),
            fixture,
            outside,
        }
    }

    fn targets(&self) -> Targets {
        Targets {
            scratch: PathBuf::new(),
            outside: self.outside.path().to_owned(),
            own: self.fixture.server.authority().parse().unwrap(),
            other: self.other.local_addr().unwrap(),
            local: None,
            entry: Entry::AsSlot,
        }
    }

    /// Has a slot for `url` attack `targets`. Returns the walls that are said to stand around it, and
    /// its report, with what came of each attempt.
    async fn attack(&mut self, url: &str, targets: &Targets) -> (Vec<Wall>, Fault) {
        let program = self.outside.path().join("attacker.sh");
        let this = env::current_exe().unwrap();
        let targets = serde_json::to_string(targets).unwrap();
        let script = format!(
            "#!/bin/sh\nexec 3>&1 1>/dev/null\n{SCRATCH}=\"$2\" {TARGETS}='{targets}' \
             exec '{}' walls::attacker --exact --nocapture\n",
            this.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        self.fixture.config.child.program = program;
        let metrics = Metrics::new();
        let slots = self.fixture.slots_counted(&metrics);
        let report = work(&slots, url).await.unwrap_err();
        (standing(&metrics), report)
    }
}

/// Returns the walls that `metrics` shows as standing.
fn standing(metrics: &Metrics) -> Vec<Wall> {
    let text = String::from_utf8(metrics.render()).unwrap();
    let stands = |wall: &Wall| {
        let line = |value| {
            format!(
                "repofleet_slot_walls{{wall=\"{}\"}} {value}\n",
                wall.as_ref()
            )
        };
        assert!(text.contains(&line(0)) || text.contains(&line(1)), "{text}");
        text.contains(&line(1))
    };
    Wall::VARIANTS.iter().copied().filter(stands).collect()
}

/// Asserts that everything was refused that one of the walls `standing` refuses, and nothing that is
/// needed. Returns the number of refused attacks.
fn check(targets: &Targets, standing: &[Wall], report: &Fault) -> usize {
    let attacks = targets.attacks();
    let results: Vec<_> = report.message.split(' ').collect();
    assert_eq!(
        results.len(),
        attacks.len() + targets.needs().len(),
        "{results:?}"
    );
    let mut refused = 0;
    for ((name, walls, _), result) in attacks.iter().zip(&results) {
        if walls.iter().any(|wall| standing.contains(wall)) {
            assert_eq!(*result, "no", "{name}, within {standing:?}");
            refused += 1;
        }
    }
    for ((name, _), result) in targets.needs().iter().zip(&results[attacks.len()..]) {
        assert_eq!(*result, "ok", "{name}, within {standing:?}");
    }
    refused
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(test)
}

#[test]
fn a_slot_that_tries_to_break_out_is_refused_by_each_wall() {
    // Each wall alone as well, and on what it stands. A wall that this kernel lacks too is one that
    // `slot_walls` shows as lacking; nothing is expected of it.
    for (lacking, names) in [
        (&[][..], &[][..]),
        (&[kernel::SECCOMP], &[Seccomp]),
        (
            &[kernel::LANDLOCK],
            &[LandlockFiles, LandlockNetwork, LandlockSignals],
        ),
        (&[kernel::LANDLOCK, kernel::SECCOMP], Wall::VARIANTS),
    ] {
        kernel::without(lacking, move || {
            run(async {
                let mut battlefield = Battlefield::new();
                let (targets, url) = (battlefield.targets(), battlefield.fixture.url("bad"));
                let (standing, report) = battlefield.attack(&url, &targets).await;
                let refused = check(&targets, &standing, &report);
                assert!(names.iter().all(|wall| !standing.contains(wall)));
                assert_eq!(refused == 0, standing.is_empty(), "{standing:?}");
            });
        });
    }
}

/// Otherwise the test above would prove nothing.
#[test]
fn without_walls_no_attack_is_refused() {
    run(async {
        let mut battlefield = Battlefield::new();
        let targets = Targets {
            entry: Entry::Free,
            ..battlefield.targets()
        };
        let url = battlefield.fixture.url("bad");
        let (_, report) = battlefield.attack(&url, &targets).await;
        for ((name, _, _), result) in ATTACKS.iter().zip(report.message.split(' ')) {
            assert_ne!(result, "no", "{name}");
        }
    });
}

#[test]
fn a_slot_without_a_wall_that_its_worker_has_does_no_work() {
    run(async {
        let mut battlefield = Battlefield::new();
        let targets = Targets {
            entry: Entry::WithoutLandlock,
            ..battlefield.targets()
        };
        let url = battlefield.fixture.url("bad");
        let (standing, report) = battlefield.attack(&url, &targets).await;
        // On a kernel without it, nothing is missed.
        let expected = match standing.contains(&LandlockFiles) {
            true => FaultKind::Infra,
            false => FaultKind::Transient,
        };
        assert_eq!(report.kind, expected, "{report}");
    });
}

#[test]
fn of_a_local_repository_a_slot_sees_what_git_keeps_and_no_network() {
    for lacking in [&[][..], &[kernel::SECCOMP], &[kernel::LANDLOCK]] {
        kernel::without(lacking, move || {
            run(async {
                let mut battlefield = Battlefield::new();
                battlefield.fixture.policy.local = true;
                let path = battlefield.outside.path().join("repository");
                commit(&path);
                let targets = Targets {
                    local: Some(path.clone()),
                    ..battlefield.targets()
                };
                let url = path.to_str().unwrap();
                let (standing, report) = battlefield.attack(url, &targets).await;
                check(&targets, &standing, &report);
            });
        });
    }
}

/// Makes a repository with a working tree and one commit.
fn commit(path: &Path) {
    fs::create_dir(path).unwrap();
    git(path, ["init", "--quiet"]);
    fs::write(path.join("text"), TEXT).unwrap();
    git(path, ["add", "text"]);
    let (name, email) = ("user.name=x", "user.email=x@example.org");
    git(
        path,
        ["-c", name, "-c", email, "commit", "--quiet", "-m", "1"],
    );
}

async fn digest(slots: &Arc<Slots>, path: &Path) -> String {
    let made = work(slots, path.to_str().unwrap()).await;
    made.unwrap_or_else(|fault| panic!("{}: {fault}", path.display()))
        .content
}

#[tokio::test]
async fn a_local_repository_may_be_in_several_places() {
    let mut fixture = Fixture::new();
    fixture.policy.local = true;
    let slots = fixture.slots();
    let at = |name: &str| fixture.root.path().join(name);
    commit(&at("main"));
    git(&at("main"), ["worktree", "add", "--quiet", "../worktree"]);
    git(
        &at("main"),
        ["clone", "--quiet", "--shared", ".", "../borrower"],
    );
    git(
        &at("borrower"),
        ["clone", "--quiet", "--shared", ".", "../second"],
    );
    git(&at("main"), ["clone", "--quiet", "--bare", ".", "../bare"]);
    // As `git new-workdir` does.
    fs::create_dir_all(at("linked/.git")).unwrap();
    fs::copy(at("main/.git/HEAD"), at("linked/.git/HEAD")).unwrap();
    for part in ["config", "objects", "refs"] {
        symlink(at("main/.git").join(part), at("linked/.git").join(part)).unwrap();
    }
    git(&at("main"), ["clone", "--quiet", ".", "../including"]);
    let settings = at("settings");
    fs::write(&settings, "[core]\nabbrev = 9\n").unwrap();
    let settings = settings.to_str().unwrap();
    git(&at("including"), ["config", "include.path", settings]);

    for name in [
        "main",
        "worktree",
        "borrower",
        "second",
        "bare",
        "linked",
        "including",
    ] {
        assert!(digest(&slots, &at(name)).await.contains(TEXT), "{name}");
    }
}

#[test]
fn a_worker_lets_nobody_look_into_it() {
    let mut worker = Command::new(env!("CARGO_BIN_EXE_worker"));
    // Nobody answers there, and it waits for the broker.
    worker.args(["run", "--broker-url", "amqp://127.0.0.1:1", "--store", "."]);
    worker.current_dir("/tmp").stdout(Stdio::null());
    assert_private(&mut worker);
}
