//! Walls around a slot's child: what the kernel refuses it from then on.
//!
//! Landlock lets it use its job's folder, its host's port, and the few files that name resolution and
//! TLS read. A filter of system calls ([`filter`]) refuses what it has no use for, and what Landlock
//! does not see. Neither takes any privilege. A wall that the kernel lacks is left out.

use std::fs;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, NetPort, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope, path_beneath_rules,
};
use serde::{Deserialize, Serialize};
use strum::{AsRefStr, VariantArray};
use tracing::debug;

mod filter;

/// What name resolution reads, modules of glibc's included.
const OF_RESOLVER: [&str; 10] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];
/// Where libgit2 gets its random numbers.
const RANDOM: &str = "/dev/urandom";
/// Of name servers, for answers too long for UDP.
const DNS: u16 = 53;

/// A wall around a slot. The names are values of a metric's label.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    AsRefStr,
    VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Wall {
    /// Files: the job's folder, and some to read.
    LandlockFiles,
    /// TCP: connections to the job's ports.
    LandlockNetwork,
    /// Signals: none to processes outside.
    LandlockSignals,
    /// System calls: those that a slot may need.
    Seccomp,
}

impl Wall {
    /// Says what a repository that takes over its slot could do without this wall, and what has it.
    pub fn without(self) -> &'static str {
        match self {
            Self::LandlockFiles => {
                "read and write this user's files (needs Linux 5.13 with Landlock)"
            }
            Self::LandlockNetwork => "connect to any port (needs Linux 6.7 with Landlock)",
            Self::LandlockSignals => {
                "signal this user's processes, unless seccomp stands (needs Linux 6.12 with Landlock)"
            }
            Self::Seccomp => {
                "start programs, trace processes and use all of the kernel (needs seccomp)"
            }
        }
    }
}

/// What a job needs of the system.
#[derive(Debug, Default)]
pub(super) struct Needs {
    /// The folder that it may write to.
    scratch: Option<PathBuf>,
    /// Files, and folders with all that is in them, that it may read.
    readable: Vec<PathBuf>,
    /// TCP ports that it may connect to.
    ports: Vec<u16>,
    /// Whether it may use the network.
    network: bool,
}

impl Needs {
    /// Those of a repository on this machine, which is in `folders`.
    pub(super) fn local(scratch: &Path, folders: Vec<PathBuf>) -> Self {
        Self {
            scratch: Some(scratch.to_owned()),
            readable: folders,
            ..Self::default()
        }
    }

    /// Those of a repository on a host at one of `ports`, with the certificates that this process's
    /// environment names.
    pub(super) fn remote(scratch: &Path, mut ports: Vec<u16>) -> Self {
        ports.push(DNS);
        Self {
            scratch: Some(scratch.to_owned()),
            readable: OF_RESOLVER
                .iter()
                .map(PathBuf::from)
                .chain(certificates())
                .collect(),
            ports,
            network: true,
        }
    }
}

/// Returns where this process's environment says that certificates are.
fn certificates() -> Vec<PathBuf> {
    let named = |name| std::env::var_os(name).map(PathBuf::from);
    let mut places: Vec<_> = named(openssl_probe::ENV_CERT_FILE).into_iter().collect();
    if let Some(folder) = named(openssl_probe::ENV_CERT_DIR) {
        // Most of what is in it are links to files elsewhere.
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let links = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
        places.extend(links.map(|link| link.path()));
        places.push(folder);
    }
    places
}

/// Confines this thread, and those that it starts later, to `needs`. Returns the walls that stand.
pub(super) fn confine(needs: &Needs) -> Vec<Wall> {
    let mut walls = landlock(needs).unwrap_or_else(|error| {
        debug!(operation = "slot", "Landlock does not restrict it: {error}");
        Vec::new()
    });
    match filter::install(needs.network) {
        Ok(()) => walls.push(Wall::Seccomp),
        Err(error) => debug!(operation = "slot", "no system call is filtered: {error}"),
    }
    walls
}

/// Returns the walls that stand in a slot of this process, by raising them around a thread that ends.
pub(super) fn tried() -> Vec<Wall> {
    let thread = std::thread::spawn(|| confine(&Needs::default()));
    thread.join().unwrap_or_default()
}

fn landlock(needs: &Needs) -> Result<Vec<Wall>, RulesetError> {
    // The latest that were tried. What the kernel does not know of them is left out.
    let (files, ports) = (AccessFs::from_all(ABI::V6), AccessNet::from_all(ABI::V6));
    // Nothing may be executed.
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir;
    let connect = |port: &u16| -> Result<NetPort, RulesetError> {
        Ok(NetPort::new(*port, AccessNet::ConnectTcp))
    };
    // What does not exist gets no rule.
    let status = Ruleset::default()
        .handle_access(files)?
        .handle_access(ports)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(path_beneath_rules(&needs.scratch, read | write))?
        .add_rules(path_beneath_rules(&needs.readable, read))?
        .add_rules(path_beneath_rules([RANDOM], AccessFs::ReadFile))?
        .add_rules(needs.ports.iter().map(connect))?
        .restrict_self()?;
    let LandlockStatus::Available { effective_abi, .. } = status.landlock else {
        return Ok(Vec::new());
    };
    let since = [
        (ABI::V1, Wall::LandlockFiles),
        (ABI::V4, Wall::LandlockNetwork),
        (ABI::V6, Wall::LandlockSignals),
    ];
    let stands = |(abi, wall)| (effective_abi >= abi).then_some(wall);
    Ok(since.into_iter().filter_map(stands).collect())
}
