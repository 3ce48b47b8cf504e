//! Fetching: HEAD's one commit, or a local repository in place.
//!
//! By git's protocol v2 ([`wire`]) a server leaves out the files that no digest shows, and the pack is
//! read as it comes ([`pack`]). Whatever surprises there is left to libgit2, which makes a shallow copy
//! in a bare scratch repository ([`objects`]). Both ways make the same digests.
//!
//! The only user of git2. Nothing is ever checked out: no filter, hook, symbolic link or submodule of
//! a repository can do anything.

use std::path::Path;
use std::sync::{Arc, Once};

use common::fault::{Fault, FaultKind};
use git2::{AutotagOption, ErrorCode, FetchOptions, Oid, RemoteCallbacks, Repository};

use url::Url;

use crate::fetch::http::{HttpSession, ProgressSink};
use crate::fetch::objects::Objects;
use crate::fetch::pack::limits::Failure;
use crate::fetch::policy::{FetchMode, FetchPolicy, FetchSource, FetchWay};
use crate::source::Source;

pub mod policy;

pub mod http;

pub mod objects;

mod wire;

mod pack;

/// The ref in the scratch repository that holds the remote's HEAD.
const HEAD: &str = "refs/repofleet/head";
/// The scratch repository's folder in the scratch folder, where there may be a pack already.
const REPOSITORY: &str = "repository";

/// A fetched repository.
pub struct Fetched {
    /// The repository, ready to be read.
    pub source: Box<dyn Source>,
    /// Bytes received over the network.
    pub bytes: u64,
}

/// Fetches HEAD of `url` with the help of `scratch`, an empty folder, or opens `url` if it is local.
/// Files of more than `largest` bytes may be left out.
///
/// # Errors
/// Any class that a source can cause; see [`FaultKind`].
pub fn fetch(
    url: &str,
    largest: u64,
    policy: &FetchPolicy,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<Fetched, Fault> {
    match policy.source(url)? {
        FetchSource::Local(path) => {
            configure();
            Ok(Fetched {
                source: Box::new(Objects::open(&path)?.report_to(sink)),
                bytes: 0,
            })
        }
        FetchSource::Remote { url, named } => {
            let session = HttpSession::new(url.clone(), named, policy, Arc::clone(&sink))?;
            let source = fetch_remote(&session, &url, largest, policy.mode, scratch, sink)?;
            Ok(Fetched {
                source,
                bytes: session.received(),
            })
        }
    }
}

fn fetch_remote(
    session: &Arc<HttpSession>,
    url: &Url,
    largest: u64,
    mode: FetchMode,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<Box<dyn Source>, Fault> {
    if mode == FetchMode::Git2 {
        sink.way(FetchWay::Git2, "");
        return Ok(Box::new(with_git2(session, url, scratch, sink)?));
    }
    match wire::fetch(session, largest, scratch, Arc::clone(&sink)) {
        Ok(pack) => {
            sink.way(FetchWay::V2, "");
            Ok(Box::new(pack))
        }
        Err(Failure::Fault(fault)) => Err(fault),
        Err(Failure::Surprise(why)) if mode == FetchMode::V2 => Err(Fault::refused(format!(
            "cannot fetch by protocol v2: {why}; --fetch auto tries libgit2 then"
        ))),
        Err(Failure::Surprise(why)) => {
            sink.way(FetchWay::Fallback, &why);
            Ok(Box::new(with_git2(session, url, scratch, sink)?))
        }
    }
}

/// Fetches into a repository below `scratch`.
fn with_git2(
    session: &Arc<HttpSession>,
    url: &Url,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<Objects, Fault> {
    configure();
    let folder = scratch.join(REPOSITORY);
    let result = session.run(|| download(url.as_str(), &folder, Arc::clone(&sink)));
    let (repository, head) = result.map_err(|error| {
        let fault = session.take_fault();
        let mut fault = fault.unwrap_or_else(|| objects::fault("git", &error));
        if fault.kind == FaultKind::Infra {
            // libgit2 does not always say where.
            fault.message = format!("in {}: {}", folder.display(), fault.message);
        }
        fault
    })?;
    let source = Objects::new(repository, head.map(objects::object_id))?;
    Ok(source.report_to(sink))
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
