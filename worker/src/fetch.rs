//! Fetching: a shallow copy of HEAD in a bare scratch repository, or a local repository in place.
//!
//! The only user of git2. Nothing is ever checked out: no filter, hook, symbolic link or submodule of
//! a repository can do anything.

use std::path::Path;
use std::sync::{Arc, Once};

use common::fault::{Fault, FaultKind};
use git2::{AutotagOption, Direction, ErrorCode, FetchOptions, Oid, RemoteCallbacks, Repository};

use crate::fetch::http::{HttpSession, ProgressSink};
use crate::fetch::objects::Objects;
use crate::fetch::policy::{FetchPolicy, FetchSource};
use crate::source::{ObjectId, Source};

pub mod policy;

pub mod http;

pub mod objects;

/// The ref in the scratch repository that holds the remote's HEAD.
const HEAD: &str = "refs/repofleet/head";

/// A fetched repository.
pub struct Fetched {
    /// The repository, ready to be read.
    pub source: Objects,
    /// Bytes received over the network.
    pub bytes: u64,
}

/// What a fetch came to.
pub enum FetchResult {
    /// The repository can be read.
    Repository(Fetched),
    /// HEAD is the known commit: nothing was asked for but the refs.
    Unmoved {
        /// Bytes received over the network.
        bytes: u64,
    },
}

/// Fetches HEAD of `url` into `scratch`, an empty folder, or opens `url` if it is local. Stops
/// after the ref advertisement if HEAD is `known`.
///
/// # Errors
/// Any class that a source can cause; see [`FaultKind`].
pub fn fetch(
    url: &str,
    policy: &FetchPolicy,
    scratch: &Path,
    known: Option<ObjectId>,
    sink: Arc<dyn ProgressSink>,
) -> Result<FetchResult, Fault> {
    configure();
    match policy.source(url)? {
        FetchSource::Local(path) => {
            let source = Objects::open(&path)?.report_to(sink);
            let head = source.head()?.map(|head| head.commit);
            if known.is_some() && head == known {
                return Ok(FetchResult::Unmoved { bytes: 0 });
            }
            Ok(FetchResult::Repository(Fetched { source, bytes: 0 }))
        }
        FetchSource::Remote { url, named } => {
            let session = HttpSession::new(url.clone(), named, policy, Arc::clone(&sink))?;
            let download = || download(url.as_str(), scratch, known, Arc::clone(&sink));
            let result = session.run(download).map_err(|error| {
                let fault = session.take_fault();
                let mut fault = fault.unwrap_or_else(|| objects::fault("git", &error));
                if fault.kind == FaultKind::Infra {
                    // libgit2 does not always say where.
                    fault.message = format!("in {}: {}", scratch.display(), fault.message);
                }
                fault
            })?;
            let bytes = session.received();
            let Some((repository, head)) = result else {
                return Ok(FetchResult::Unmoved { bytes });
            };
            let source = Objects::new(repository, head.map(objects::object_id))?.report_to(sink);
            Ok(FetchResult::Repository(Fetched { source, bytes }))
        }
    }
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
