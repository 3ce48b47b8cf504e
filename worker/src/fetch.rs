//! Fetching: a shallow copy of HEAD in a bare scratch repository, or a local repository in place.
//!
//! The only user of git2. Nothing is ever checked out: no filter, hook, symbolic link or submodule of
//! a repository can do anything.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Once};

use common::fault::{Fault, FaultKind};
use git2::{AutotagOption, ErrorCode, FetchOptions, Oid, RemoteCallbacks, Repository};

use crate::fetch::http::{HttpSession, ProgressSink};
use crate::fetch::objects::Objects;
use crate::fetch::policy::{FetchPolicy, FetchSource};

pub mod policy;

pub mod address;

pub mod http;

pub mod answer;

mod packets;

pub mod objects;

/// The ref in the scratch repository that holds the remote's HEAD.
const HEAD: &str = "refs/repofleet/head";

/// Bytes without which a disk counts as full.
const ROOM: u64 = 64 << 10;

/// A fetched repository.
pub struct Fetched {
    /// The repository, ready to be read.
    pub source: Objects,
    /// Bytes received over the network.
    pub bytes: u64,
    /// Where redirects led, if that is another path.
    pub renamed_to: Option<String>,
}

/// Fetches HEAD of `url` into `scratch`, an empty folder, or opens `url` if it is local.
///
/// # Errors
/// Any class that a source can cause; see [`FaultKind`].
pub fn fetch(
    url: &str,
    policy: &FetchPolicy,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<Fetched, Fault> {
    configure();
    match policy.source(url)? {
        FetchSource::Local(path) => Ok(Fetched {
            source: Objects::open(&path)?.report_to(sink),
            bytes: 0,
            renamed_to: None,
        }),
        FetchSource::Remote { url, named } => {
            let session = HttpSession::new(url.clone(), named, policy, Arc::clone(&sink))?;
            let result = session.run(|| download(url.as_str(), scratch, Arc::clone(&sink)));
            let (repository, head) = result.map_err(|error| {
                let fault = session.take_fault();
                fault.unwrap_or_else(|| local_fault(&error, scratch))
            })?;
            let refs = session.refs();
            if head.is_none() && !refs.is_empty() {
                let branch = session.unborn_branch();
                return Err(answer::unborn_head(branch.as_deref(), &refs));
            }
            let source = Objects::new(repository, head.map(objects::object_id))?;
            Ok(Fetched {
                source: source.report_to(sink),
                bytes: session.received(),
                renamed_to: session.renamed_to(),
            })
        }
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

/// Fetches into a new scratch repository. Returns it and the remote's HEAD, if it has one.
fn download(
    url: &str,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<(Repository, Option<Oid>), git2::Error> {
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
    repository.remote_anonymous(url)?.fetch(
        &[format!("+HEAD:{HEAD}")],
        Some(&mut options),
        None,
    )?;
    let head = match repository.refname_to_id(HEAD) {
        Ok(head) => Some(head),
        Err(error) if error.code() == ErrorCode::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok((repository, head))
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
