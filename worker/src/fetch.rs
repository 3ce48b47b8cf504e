//! Fetching: HEAD's one commit, or a local repository in place.
//!
//! By git's protocol v2 (`wire`) a server leaves out the files that no digest shows, and the pack is
//! read as it comes (`pack`). Whatever surprises there is left to libgit2, which makes a shallow copy
//! in a bare scratch repository ([`objects`]). Both ways make the same digests.
//!
//! The only user of git2. Nothing is ever checked out: no filter, hook, symbolic link or submodule of
//! a repository can do anything.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Once};

use common::fault::{Fault, FaultKind};
use git2::{AutotagOption, Direction, ErrorCode, FetchOptions, Oid, RemoteCallbacks, Repository};
use url::Url;

use crate::fetch::http::{HttpSession, ProgressSink};
use crate::fetch::objects::Objects;
use crate::fetch::pack::limits::Failure;
use crate::fetch::policy::{FetchMode, FetchPolicy, FetchSource, FetchWay};
use crate::source::{ObjectId, Source};

pub mod policy;

pub mod host;

pub mod token;

pub mod address;

pub mod http;

pub mod answer;

mod packets;

pub mod objects;

pub mod local;

mod wire;

mod pack;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

/// The ref in the scratch repository that holds the remote's HEAD.
const HEAD: &str = "refs/repofleet/head";
/// The scratch repository's folder in the scratch folder, where there may be a pack already.
const REPOSITORY: &str = "repository";

/// Bytes without which a disk counts as full.
const ROOM: u64 = 64 << 10;

/// A fetched repository.
pub struct Fetched {
    /// The repository, ready to be read.
    pub source: Box<dyn Source>,
    /// Bytes received over the network.
    pub bytes: u64,
    /// Where redirects led, if that is another path.
    pub renamed_to: Option<String>,
}

/// What a fetch came to.
pub enum FetchResult {
    /// The repository can be read.
    Repository(Fetched),
    /// HEAD is the known commit: nothing was asked for but the refs.
    Unmoved {
        /// Bytes received over the network.
        bytes: u64,
        /// As [`Fetched::renamed_to`].
        renamed_to: Option<String>,
    },
}

/// What is wanted of a repository.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Files of more than this many bytes may be left out.
    pub largest: u64,
    /// If HEAD is this commit, nothing is wanted.
    pub known: Option<ObjectId>,
}

/// Fetches HEAD of `url` with the help of `scratch`, an empty folder, or opens `url` if it is local.
/// Stops after the refs if HEAD is known.
///
/// # Errors
/// Any class that a source can cause; see [`FaultKind`].
pub fn fetch(
    url: &str,
    wanted: Wanted,
    policy: &FetchPolicy,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<FetchResult, Fault> {
    match policy.source(url)? {
        FetchSource::Local(path) => {
            configure();
            let source = Objects::open(&path)?.report_to(sink);
            let head = source.head()?.map(|head| head.commit);
            if wanted.known.is_some() && head == wanted.known {
                return Ok(FetchResult::Unmoved {
                    bytes: 0,
                    renamed_to: None,
                });
            }
            Ok(FetchResult::Repository(Fetched {
                source: Box::new(source),
                bytes: 0,
                renamed_to: None,
            }))
        }
        FetchSource::Remote { url, named } => {
            let session = HttpSession::new(url.clone(), named, policy, Arc::clone(&sink))?;
            let remote = Remote {
                session: &session,
                url,
                wanted,
                scratch,
                sink,
            };
            let source = remote.fetch(policy.mode)?;
            let (bytes, renamed_to) = (session.received(), session.renamed_to());
            Ok(match source {
                Some(source) => FetchResult::Repository(Fetched {
                    source,
                    bytes,
                    renamed_to,
                }),
                None => FetchResult::Unmoved { bytes, renamed_to },
            })
        }
    }
}

/// A repository on a host. Its methods return `None` if HEAD is known.
struct Remote<'a> {
    session: &'a Arc<HttpSession>,
    url: Url,
    wanted: Wanted,
    scratch: &'a Path,
    sink: Arc<dyn ProgressSink>,
}

impl Remote<'_> {
    fn fetch(&self, mode: FetchMode) -> Result<Option<Box<dyn Source>>, Fault> {
        if mode == FetchMode::Git2 {
            self.sink.way(FetchWay::Git2, "");
            return self.with_git2();
        }
        let Wanted { largest, known } = self.wanted;
        let sink = Arc::clone(&self.sink);
        match wire::fetch(self.session, largest, self.scratch, known, sink) {
            Ok(pack) => {
                self.sink.way(FetchWay::V2, "");
                Ok(pack.map(|pack| Box::new(pack) as _))
            }
            Err(Failure::Fault(fault)) => Err(fault),
            Err(Failure::Surprise(why)) if mode == FetchMode::V2 => {
                let message = format!("cannot fetch by protocol v2: {why}; --fetch auto goes on");
                Err(Fault::refused(message))
            }
            Err(Failure::Surprise(why)) => {
                self.sink.way(FetchWay::Fallback, &why);
                self.with_git2()
            }
        }
    }

    /// Fetches into a repository in the scratch folder.
    fn with_git2(&self) -> Result<Option<Box<dyn Source>>, Fault> {
        configure();
        let folder = self.scratch.join(REPOSITORY);
        let known = self.wanted.known;
        let sink = || Arc::clone(&self.sink);
        let download = || download(self.url.as_str(), &folder, known, sink());
        let result = self.session.run(download).map_err(|error| {
            let fault = self.session.take_fault();
            fault.unwrap_or_else(|| local_fault(&error, self.scratch))
        })?;
        let Some((repository, head)) = result else {
            return Ok(None);
        };
        if head.is_none() {
            wire::expect_empty(self.session)?;
        }
        let source = Objects::new(repository, head.map(objects::object_id))?;
        Ok(Some(Box::new(source.report_to(sink()))))
    }
}

/// Classifies an error of libgit2 that the host did not cause in words.
///
/// Only what this machine itself shows counts against it: that the system refused libgit2 room, or that
/// the scratch folder cannot be written.
fn local_fault(error: &git2::Error, scratch: &Path) -> Fault {
    let fault = objects::fault("git", error);
    if fault.kind != FaultKind::Infra {
        return fault;
    }
    // libgit2 does not always say where, and has removed what did not fit.
    let found = match objects::is_no_room(error) {
        true => Some(fault.message.clone()),
        false => look_at(scratch).err().map(|found| {
            format!("{found}; make room in the scratch folder or choose another with --scratch")
        }),
    };
    match found {
        Some(found) => Fault::infra(format!("in {}: {found}", scratch.display())),
        None => Fault::transient(fault.message),
    }
}

/// Finds out whether a folder has room and can be written.
fn look_at(folder: &Path) -> io::Result<()> {
    let disk = rustix::fs::statvfs(folder)?;
    // Some file systems count no files.
    let no_files = disk.f_files > 0 && disk.f_favail == 0;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM || no_files {
        return Err(rustix::io::Errno::NOSPC.into());
    }
    let probe = folder.join("probe");
    fs::write(&probe, [0; 4096])?;
    fs::remove_file(&probe)
}

/// Fetches into a new scratch repository. Returns it and the remote's HEAD, if it has one; `None` if
/// HEAD is `known`.
fn download(
    url: &str,
    scratch: &Path,
    known: Option<ObjectId>,
    sink: Arc<dyn ProgressSink>,
) -> Result<Option<(Repository, Option<Oid>)>, git2::Error> {
    let mut init = git2::RepositoryInitOptions::new();
    let repository = Repository::init_opts(scratch, init.bare(true).external_template(false))?;
    let mut callbacks = RemoteCallbacks::new();
    let mut resolved = 0;
    callbacks.transfer_progress(move |progress| {
        // Deltas are resolved after the last byte. Objects indexed before count only as bytes:
        // otherwise a server could drip small ones for ever.
        if progress.indexed_deltas() != resolved {
            resolved = progress.indexed_deltas();
            sink.alive();
        }
        true
    });
    let mut options = FetchOptions::new();
    options
        .depth(1)
        .download_tags(AutotagOption::None)
        .update_fetchhead(false)
        .remote_callbacks(callbacks);
    let refspec = [format!("+HEAD:{HEAD}")];
    {
        let mut remote = repository.remote_anonymous(url)?;
        remote.connect(Direction::Fetch)?;
        let advertised = remote.list()?.iter().find(|head| head.name() == "HEAD");
        let advertised = advertised.map(|head| objects::object_id(head.oid()));
        if known.is_some() && advertised == known {
            return Ok(None);
        }
        // Over the connection that is there.
        remote.fetch(&refspec, Some(&mut options), None)?;
    }
    let head = match repository.refname_to_id(HEAD) {
        Ok(head) => Some(head),
        Err(error) if error.code() == ErrorCode::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(Some((repository, head)))
}

/// Keeps libgit2 from reading any configuration of the machine.
#[expect(
    unsafe_code,
    reason = "libgit2's settings are global; written once, by one thread"
)]
fn configure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for level in [
            git2::ConfigLevel::System,
            git2::ConfigLevel::Global,
            git2::ConfigLevel::XDG,
            git2::ConfigLevel::ProgramData,
        ] {
            // SAFETY: `Once` lets one thread in, before this module opens any repository.
            unsafe { git2::opts::set_search_path(level, "") }.expect("an empty path is a C string");
        }
        // SAFETY: as above. A local source is read whoever owns it: nothing of it is executed,
        // and the operator allowed it.
        unsafe { git2::opts::set_verify_owner_validation(false) }.expect("the option exists");
    });
}
